"""Rankings of several responses by several raters: one row each, and all rows of a prompt together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlhf_jax import rankings
from rlhf_jax.data.schemas import (
    DroppedRow,
    Messages,
    Row,
    bad_row,
    empty_row,
    flag_of,
    ids_of,
    is_number,
    kind_of,
    preference_row,
    prompt_of,
    require,
    response_of,
    sft_row,
    text_of,
    type_of,
    where_of,
)
from rlhf_jax.errors import UserError

Response = str | Messages
Ballot = tuple[str, list[float]]
"""(rater, ranks of the responses): lower is better, equal is a tie, NaN is not ranked. Rater "" is anybody."""


@dataclass(frozen=True)
class Ranking:
    """K responses to a prompt and what raters think of them.

    Attributes:
        prompt, responses: as in `schemas`, K responses.
        finished: which of them were not cut off.
        ids: the token ids that a model sampled for each, None where nothing says so.
        ballots: the raters' verdicts.
        where: file:line.
        extra: fields of each response that are nobody's business here, such as "model".
        strengths: float[K], once aggregated.
    """

    prompt: Response
    responses: list[Response]
    finished: list[bool]
    ballots: list[Ballot]
    where: str
    extra: list[Row] = field(default_factory=list)
    strengths: np.ndarray | None = None
    ids: list[list[int] | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.ids:
            object.__setattr__(self, "ids", [None] * len(self.responses))

    def consensus(self) -> tuple[np.ndarray, np.ndarray]:
        """(ranks float[K], NaN for what nobody ranked; labels float[K, K], share that prefers i to j, NaN if unknown).

        Of aggregated strengths, or of the votes: each ranking gives its pairs, and the mean share of pairs that a
        response wins is its place (Borda).
        """
        size = len(self.responses)
        c = rankings.comparisons([(0, 0, ranks) for _, ranks in self.ballots], num_raters=1)
        wins = c.wins(np.ones(len(c.shares)), c.shares)[0]
        games = wins + wins.T
        if self.strengths is None:
            labels = np.divide(wins, games, out=np.full((size, size), np.nan), where=games > 0)
            order = np.nansum(labels, axis=1) / np.maximum((games > 0).sum(axis=1), 1)
        else:
            side = rankings.components(wins)
            labels = np.where(side[:, None] == side[None, :], rankings.soft_labels(self.strengths), np.nan)
            order = self.strengths
        if self.strengths is None and len(self.ballots) == 1:
            return np.array(self.ballots[0][1], np.float64), labels
        ranks = rankings.consensus_ranks(order).astype(np.float64)
        return np.where(games.any(axis=1), ranks, np.nan), labels


def ranking_row(row: Row, *, unlabelled: bool = False) -> Ranking:
    """A prompt with several responses.

    {prompt, responses, ...} where responses are texts, messages, or {text, rank?, score?, finished?}. Who is better is
    said by `rank` (lower is better, equal is a tie, null is not ranked), else by `score` (higher is better), in each
    response or as a list `ranks` or `scores` beside them (RRHF); or `best` is the place of the one that was chosen
    (Ziegler et al. 2019), from 0, and the others are not compared. The row's `rater` said so. Or several did:
    `raters`: [{rater, ranks or best}, ...].

    A preference row is a ranking of two, and its votes are ballots. An unpaired preference {prompt, completion, label}
    is one response with rank 0 or 1, to be joined with others by `gather`; what that made is taken as it is.
    `unlabelled` also takes responses that nobody has compared.

    Raises:
        DroppedRow: fewer than two responses that are neither null nor empty.
        UserError: a missing field, a wrong type, or ranks that are no ranking.
    """
    if "ranking" in row:
        return row["ranking"]
    kind = kind_of(row)
    if kind.endswith("stepwise supervision"):
        raise bad_row(
            row, "stepwise supervision labels parts of one answer; give whole answers, such as {chosen, rejected}"
        )
    if kind.endswith("unpaired preference"):
        answer = sft_row({**row, "label": True})
        ranks = [0.0 if flag_of(row, "label") else 1.0]
        ids, said = [answer.get("ids")], [(_rater(row), ranks)]
        return Ranking(
            answer["prompt"], [answer["response"]], [answer["finished"]], said, where_of(row), [{}], ids=ids
        )
    if "responses" not in row:
        pair = preference_row(row)
        both = [pair["chosen"], pair["rejected"]]
        said = _votes(row)
        return Ranking(pair["prompt"], both, pair["finished"], said, where_of(row), [{}, {}], ids=pair["ids"])
    require(row, ("prompt", "responses"), "a ranking row is {prompt, responses: [{text, rank}, ...]}")
    prompt = prompt_of(row, row["prompt"])
    items = _items(row)
    labels = {"raters", "ranks", "scores", "best"} & set(row) or any({"rank", "score"} & set(item) for item in items)
    ballots = _ballots(row, items) if labels or not unlabelled else []
    kept = [i for i, item in enumerate(items) if _has_text(item["text"])]
    if len(kept) < 2:
        raise empty_row(row, f"{len(kept)} of {len(items)} responses have a text", "with fewer than two responses")
    return Ranking(
        prompt,
        [response_of(row, f"responses {i}", items[i]["text"], prompt) for i in kept],
        [flag_of({**items[i], "_where": where_of(row)}, "finished") for i in kept],
        [(rater, [ranks[i] for i in kept]) for rater, ranks in ballots],
        where_of(row),
        [{k: v for k, v in items[i].items() if k not in ("text", "rank", "score", "finished", "ids")} for i in kept],
        ids=[ids_of({**items[i], "_where": f"{where_of(row)}: responses {i}"}, "ids") for i in kept],
    )


def _items(row: Row) -> list[Row]:
    """The responses as dicts with a "text" and "finished"."""
    found = row["responses"]
    if not isinstance(found, list):
        raise bad_row(row, f'"responses" is {type_of(found)}; give a list of {{text, rank}}')
    items = []
    for number, item in enumerate(found):
        if isinstance(item, dict) and "role" not in item:
            if "text" not in item:
                raise bad_row(row, f'responses {number} has no "text" (found: {", ".join(item) or "nothing"}); add it')
            items.append({"finished": True, **item})
        else:
            items.append({"finished": True, "text": [item] if isinstance(item, dict) else item})
    return items


def _has_text(value: Any) -> bool:
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value is not None and bool(str(value).strip())


def _ballots(row: Row, items: list[Row]) -> list[Ballot]:
    if "raters" in row:
        if not isinstance(row["raters"], list) or not all(isinstance(one, dict) for one in row["raters"]):
            raise bad_row(row, f'"raters" is {type_of(row["raters"])}; give a list of {{rater, ranks}}')
        return [(_rater(one, row), ranks) for one in row["raters"] for ranks in _said(row, one, len(items))]
    if "best" in row:
        return [(_rater(row), ranks) for ranks in _said(row, row, len(items))]
    for name, sign in (("rank", 1.0), ("score", -1.0)):
        values = row.get(f"{name}s", [item.get(name) for item in items])
        if f"{name}s" in row or any(name in item for item in items):
            return [(_rater(row), [sign * rank for rank in _ranks(row, values, len(items))])]
    raise bad_row(row, 'nobody says which response is better; give each a "rank" (0 is best) or a "score"')


def _said(row: Row, one: Row, size: int) -> list[list[float]]:
    """The ranks of a rater; of a choice, one against each of the others, which are not compared with one another."""
    best = one.get("best")
    if best is None:
        return [_ranks(row, one.get("ranks"), size)]
    if type(best) is not int or not 0 <= best < size:
        raise bad_row(row, f'"best" is {best!r}; give the place of one of the {size} responses, from 0')
    pair = {best: 0.0}
    return [[{**pair, j: 1.0}.get(i, float("nan")) for i in range(size)] for j in range(size) if j != best]


def _ranks(row: Row, values: Any, size: int) -> list[float]:
    """A rank for each response, NaN for null."""
    if not isinstance(values, list) or len(values) != size:
        shown = len(values) if isinstance(values, list) else type_of(values)
        raise bad_row(row, f"ranks are {shown} for {size} responses; give one number, or null, for each")
    for value in values:
        if value is not None and not is_number(value):
            raise bad_row(row, f"the rank {value!r} is no finite number; number responses from 0, the best")
    return [float("nan") if value is None else float(value) for value in values]


def _rater(row: Row, outer: Row | None = None) -> str:
    name = row.get("rater", "")
    if not isinstance(name, str):
        raise bad_row(outer or row, f'"rater" is {type_of(name)}; give a name')
    return name


def _votes(row: Row) -> list[Ballot]:
    """The ballots of a preference row: the counts of `votes`, or the one of its rater."""
    votes = row.get("votes")
    if votes is None:
        return [(_rater(row), [0.0, 1.0])]
    if any(count != int(count) for count in votes):
        raise bad_row(row, f'"votes" is {votes!r}; aggregation counts whole raters, so give whole numbers')
    said = ([0.0, 1.0], [1.0, 0.0], [0.0, 0.0])
    return [("", ranks) for count, ranks in zip(votes, said, strict=True) for _ in range(int(count))]


def gather(rows: list[Row], key: Callable[[Row], str], *, aggregate: str, prior: float) -> tuple[list[Row], str]:
    """(rows, those of one prompt joined to one {prompt, ranking: Ranking}; what to say about it).

    aggregate = votes joins unpaired preferences only. bradley_terry, plackett_luce and crowd_bt join all rows of a
    prompt, equal responses once, and fit strengths to all ballots; a row with nothing to learn stays as it is.
    """
    together: list[Ranking] = []
    others: list[Row] = []
    for row in rows:
        if aggregate == "votes" and not kind_of(row).endswith("unpaired preference"):
            others.append(row)
            continue
        try:
            together.append(ranking_row(row))
        except DroppedRow:
            others.append(row)
    if not together:
        return others, ""
    count, together = len(together), join(together, key)
    said = [f"{count} rows joined to {len(together)} prompts"]
    if aggregate != "votes":
        together, raters, facts = fit(together, method=aggregate, prior=prior)
        said += describe(raters, facts)
    others += [{"prompt": one.prompt, "ranking": one, "_where": one.where} for one in together]
    return others, "; ".join(said)


def join(together: list[Ranking], key: Callable[[Row], str]) -> list[Ranking]:
    """One ranking per prompt: `key` of {prompt} is equal for rows of one."""
    of_prompt: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in together:
        of_prompt[key({"prompt": ranking.prompt})].append(ranking)
    return [_join(members) for members in of_prompt.values()]


def _join(members: list[Ranking]) -> Ranking:
    """All rows of one prompt as one, equal responses once."""
    places: dict[tuple[str, bool], int] = {}
    first = members[0]
    responses: list[Response] = []
    finished: list[bool] = []
    extra: list[Row] = []
    ids: list[list[int] | None] = []
    for member in members:
        columns = zip(member.responses, member.finished, member.extra, member.ids, strict=True)
        for response, done, more, sampled in columns:
            if places.setdefault((text_of(response), done), len(responses)) == len(responses):
                responses.append(response)
                finished.append(done)
                extra.append(more)
                ids.append(sampled)
    ballots: list[Ballot] = []
    of_one: dict[str, list[float]] = {}  # what a rater said of single responses is one ballot
    for member in members:
        at = [places[text_of(r), done] for r, done in zip(member.responses, member.finished, strict=True)]
        for rater, ranks in member.ballots:
            ballot = of_one.setdefault(rater, []) if len(at) == 1 else []
            if not ballot:
                ballot += [float("nan")] * len(responses)
                ballots.append((rater, ballot))
            for place, rank in zip(at, ranks, strict=True):
                ballot[place] = rank
    return replace(first, responses=responses, finished=finished, extra=extra, ballots=ballots, ids=ids)


def fit(
    together: list[Ranking], *, method: str, prior: float
) -> tuple[list[Ranking], dict[str, float], dict[str, float]]:
    """(rankings with strengths, rater -> reliability, facts) by `rankings.aggregate`, raters known by name."""
    ballots, names = numbered(together)
    try:
        found = rankings.aggregate(ballots, num_raters=len(names), method=method, prior=prior)
    except ValueError as error:
        raise UserError(f"{error}; aggregate with bradley_terry or crowd_bt") from error
    fitted = [replace(r, strengths=found.strengths[g, : len(r.responses)]) for g, r in enumerate(together)]
    return fitted, dict(zip(names, found.reliability.tolist(), strict=True)), found.facts


def numbered(together: list[Ranking]) -> tuple[list[rankings.Ballot], list[str]]:
    """(the ballots of all rankings, with numbers for groups and raters; the names of the raters)."""
    names = sorted({rater for ranking in together for rater, _ in ranking.ballots})
    number = {name: i for i, name in enumerate(names)}
    ballots: list[rankings.Ballot] = [
        (g, number[rater], ranks) for g, ranking in enumerate(together) for rater, ranks in ranking.ballots
    ]
    return ballots, names


def describe(raters: dict[str, float], facts: dict[str, float]) -> list[str]:
    """What a summary says of an aggregation."""
    said = [f"{facts[name]:.0f} {name}" for name in facts if name != "agreement" and facts[name]]
    if facts["agreement"] == facts["agreement"]:
        said.append(f"agreement {facts['agreement']:.3f}")
    if len(raters) > 1:
        worst = sorted(raters, key=raters.__getitem__)[:3]
        said.append("least reliable: " + ", ".join(f"{name or 'unnamed'} {raters[name]:.2f}" for name in worst))
    return said
