"""Rankings of several responses by several raters: one row each, and all rows of a prompt together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from rlhf_jax import rankings
from rlhf_jax.data.layouts import Joined, layout_of
from rlhf_jax.data.numbers import in_order, is_number, number_of
from rlhf_jax.data.schemas import (
    SAID,
    DroppedRow,
    Messages,
    Row,
    answer_of,
    bad_row,
    empty_row,
    finished_of,
    flag_of,
    ids_of,
    key_of,
    preference_row,
    prompt_of,
    require,
    response_of,
    type_of,
    where_of,
    written,
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
        times: how often each ballot counts; empty where each counts once.
        units: ballots with one number are parts of one, which the bootstrap draws together; empty where none are.
    """

    prompt: Response
    responses: list[Response]
    finished: list[bool]
    ballots: list[Ballot]
    where: str
    extra: list[Row] = field(default_factory=list)
    strengths: np.ndarray | None = None
    ids: list[list[int] | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    units: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.ids:
            object.__setattr__(self, "ids", [None] * len(self.responses))

    def counts(self) -> np.ndarray:
        """float[len(ballots)], how often each ballot counts."""
        return np.array(self.times or [1.0] * len(self.ballots))

    def wins(self) -> np.ndarray:
        """float[K, K], how often response i was preferred to j, a tie as half."""
        ballots = [(0, 0, ranks) for _, ranks in self.ballots]
        c = rankings.comparisons(ballots, num_raters=1, sizes=[len(self.responses)])
        return c.wins(self.counts()[c.ballots], c.shares)[0]

    def items(self) -> list[Row]:
        """The responses as rows hold them: {text, ids?, finished, ...}, without who is better."""
        columns = zip(self.responses, self.ids, self.finished, self.extra, strict=True)
        return [
            {"text": written(response), **({} if ids is None else {"ids": ids}), "finished": done, **more}
            for response, ids, done, more in columns
        ]

    def consensus(self) -> tuple[np.ndarray, np.ndarray]:
        """(ranks float[K], NaN for what nobody ranked; labels float[K, K], share that prefers i to j, NaN if unknown).

        Of aggregated strengths, or of the votes: each ranking gives its pairs, and the mean share of pairs that a
        response wins is its place (Borda).
        """
        wins = self.wins()
        games = wins + wins.T
        if self.strengths is None:
            labels = np.divide(wins, games, out=np.full(wins.shape, np.nan), where=games > 0)
            order = np.nansum(labels, axis=1) / np.maximum((games > 0).sum(axis=1), 1)
        else:
            side = rankings.components(wins)
            labels = np.where(side[:, None] == side[None, :], rankings.soft_labels(self.strengths), np.nan)
            order = self.strengths
        if self.strengths is None and len(self.ballots) == 1:
            return np.array(self.ballots[0][1], np.float64), labels
        tolerance = 1e-12 if self.strengths is None else 1e-4  # shares of whole votes are exact, a fit is not
        ranks = rankings.consensus_ranks(order, tolerance=tolerance).astype(np.float64)
        return np.where(games.any(axis=1), ranks, np.nan), labels


def ranking_row(row: Row, *, unlabelled: bool = False) -> Ranking:
    """A prompt with several responses.

    {prompt, responses, ...} where responses are texts, messages, or {text, rank?, score?, finished?}. Who is better is
    said by `rank` (lower is better, equal is a tie, null is not ranked), else by `score` (higher is better), in each
    response or as a list `ranks` or `scores` beside them (RRHF); or `best` is the place of the one that was chosen
    (Ziegler et al. 2019), from 0, and the others are not compared. The row's `rater` said so. Or several did:
    `raters`: [{rater, ranks or best}, ...].

    A preference row is a ranking of two, and its votes are ballots. An unpaired preference {prompt, completion, label}
    is one response with rank 0 or 1, to be joined with others by `gather`.
    `unlabelled` also takes responses that nobody has compared.

    Raises:
        DroppedRow: fewer than two responses that are neither null nor empty.
        UserError: a missing field, a wrong type, or ranks that are no ranking.
    """
    kind = layout_of(row)
    if kind == "unpaired preference":
        answer = answer_of(row)
        ranks = [0.0 if flag_of(row, "label") else 1.0]
        only, ids = [answer["response"]], [answer.get("ids")]
        said = [(rater_of(row), ranks)]
        return Ranking(answer["prompt"], only, [answer["finished"]], said, where_of(row), [{}], ids=ids)
    if kind == "stepwise supervision":
        raise bad_row(
            row, "stepwise supervision labels parts of one answer; give whole answers, such as {chosen, rejected}"
        )
    if kind != "ranking":
        pair = preference_row(row)
        both, (said, times) = [pair["chosen"], pair["rejected"]], _votes(row)
        more = {"ids": pair["ids"], "times": times}
        return Ranking(pair["prompt"], both, pair["finished"], said, where_of(row), [{}, {}], **more)
    require(row, ("prompt", "responses"), "a ranking row is {prompt, responses: [{text, rank}, ...]}")
    prompt = prompt_of(row, row["prompt"])
    items = _items(row)
    labels = any(row.get(name) is not None for name in ("raters", "ranks", "scores", "best"))
    labels = labels or any({"rank", "score"} & set(item) for item in items)
    ballots = _ballots(row, items) if labels or not unlabelled else []
    kept = [i for i, item in enumerate(items) if _has_text(item["text"])]
    if len(kept) < 2:
        raise empty_row(row, f"{len(kept)} of {len(items)} responses have a text", "with fewer than two responses")
    return Ranking(
        prompt,
        [response_of(row, f"responses {i}", items[i]["text"], prompt) for i in kept],
        [finished_of({**items[i], "_where": where_of(row)}) for i in kept],
        [(rater, [ranks[i] for i in kept]) for rater, ranks in ballots],
        where_of(row),
        [{k: v for k, v in items[i].items() if k not in ("text", "rank", "score", "finished", "ids")} for i in kept],
        ids=[ids_of({**items[i], "_where": f"{where_of(row)}: responses {i}"}, "ids") for i in kept],
    )


def rankings_of(row: Row) -> list[Ranking]:
    """The `ranking_row` of a row, or the parts of the one that `gather` has made of several."""
    return row.rankings if isinstance(row, Joined) else [ranking_row(row)]


def _items(row: Row) -> list[Row]:
    """The responses as dicts with a "text"."""
    found = row["responses"]
    if not isinstance(found, list):
        raise bad_row(row, f'"responses" is {type_of(found)}; give a list of {{text, rank}}')
    items = []
    for number, item in enumerate(found):
        if isinstance(item, dict) and "role" not in item:
            if "text" not in item:
                raise bad_row(row, f'responses {number} has no "text" (found: {", ".join(item) or "nothing"}); add it')
            items.append(item)
        else:
            items.append({"text": [item] if isinstance(item, dict) else item})
    return items


def _has_text(value: Any) -> bool:
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        if any(value[-1].get(name) for name in SAID):
            return True
        value = value[-1].get("content")
    return value is not None and bool(str(value).strip())


def _ballots(row: Row, items: list[Row]) -> list[Ballot]:
    if row.get("raters") is not None:
        if not isinstance(row["raters"], list) or not all(isinstance(one, dict) for one in row["raters"]):
            raise bad_row(row, f'"raters" is {type_of(row["raters"])}; give a list of {{rater, ranks}}')
        return [(rater_of(one, row), ranks) for one in row["raters"] for ranks in _said(row, one, len(items))]
    if row.get("best") is not None:
        return [(rater_of(row), ranks) for ranks in _said(row, row, len(items))]
    for name, sign in (("rank", 1), ("score", -1)):
        values = row.get(f"{name}s")
        if values is None and any(name in item for item in items):
            values = [item.get(name) for item in items]
        if values is not None:
            return [(rater_of(row), _ranks(row, values, len(items), sign))]
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


def _ranks(row: Row, values: Any, size: int, sign: int = 1) -> list[float]:
    """A rank for each response, NaN for null; `sign` is -1 where a higher value is better."""
    if not isinstance(values, list) or len(values) != size:
        shown = len(values) if isinstance(values, list) else type_of(values)
        raise bad_row(row, f"ranks are {shown} for {size} responses; give one number, or null, for each")
    for value in values:
        if value is not None and not is_number(value):
            raise bad_row(row, f"the rank {value!r} is no finite number; number responses from 0, the best")
    return in_order([None if value is None else number_of(value) for value in values], sign)


def rater_of(row: Row, outer: Row | None = None) -> str:
    """The name of who said it, "" for anybody."""
    name = "" if row.get("rater") is None else row["rater"]
    if not isinstance(name, str):
        raise bad_row(outer or row, f'"rater" is {type_of(name)}; give a name')
    return name


def _votes(row: Row) -> tuple[list[Ballot], list[float]]:
    """(the ballots of a preference row, how often each counts): as `votes` says, or the one of its rater."""
    votes = row.get("votes")
    if votes is None:
        return [(rater_of(row), [0.0, 1.0])], [1.0]
    said = ([0.0, 1.0], [1.0, 0.0], [0.0, 0.0])
    given = [(("", ranks), float(count)) for count, ranks in zip(votes, said, strict=True) if count]
    return [ballot for ballot, _ in given], [count for _, count in given]


def gather(rows: list[Row], key: Callable[[Row], str], *, aggregate: str, prior: float) -> tuple[list[Row], str]:
    """(rows, those of one prompt joined to one, for `rankings_of`; what to say about it).

    aggregate = votes joins unpaired preferences only. bradley_terry, plackett_luce and crowd_bt join all rows of a
    prompt, equal responses once, and fit strengths to all ballots of each of its `parts`; a row with nothing to learn
    stays as it is. Ballots of a row that a mixture has several times count once, and what is joined is there as often.
    """
    together: list[Ranking] = []
    others: list[Row] = []
    times = Counter(map(id, rows))
    copies: dict[str, int] = {}  # prompt -> how often a mixture has its rows
    for row in {id(row): row for row in rows}.values():
        if aggregate == "votes" and layout_of(row) != "unpaired preference":
            others += [row] * times[id(row)]
            continue
        try:
            together.append(ranking_row(row))
            prompt = key({"prompt": together[-1].prompt})
            copies[prompt] = max(copies.get(prompt, 1), times[id(row)])
        except DroppedRow:
            others += [row] * times[id(row)]
    if not together:
        return others, ""
    joined = join(together, key)
    said = [f"{len(together)} rows joined to {len(joined)} prompts"]
    apart = [[one] for one in joined]
    if aggregate != "votes":
        apart = [parts(one) for one in joined]
        fitted, raters, facts = fit([part for pieces in apart for part in pieces], method=aggregate, prior=prior)
        each = iter(fitted)
        apart = [[next(each) for _ in pieces] for pieces in apart]
        said += [*describe(raters, facts), *gaps(joined, apart)]
    for one, own in zip(joined, apart, strict=True):
        others += [Joined({"prompt": one.prompt, "_where": one.where}, own)] * copies[key({"prompt": one.prompt})]
    return others, "; ".join(said)


Identity = Callable[[Response, bool, Row], Any]
"""(response, whether it is finished, its other fields) -> what is equal for responses that are one."""


def same_text(response: Response, done: bool, extra: Row) -> Any:
    """Responses of one text are one; a whole one and one that was cut off are two."""
    return key_of(response), done


def join(together: list[Ranking], key: Callable[[Row], str], identity: Identity = same_text) -> list[Ranking]:
    """One ranking per prompt, in which responses that are one stand once: `key` of {prompt} is equal for its rows."""
    of_prompt: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in together:
        of_prompt[key({"prompt": ranking.prompt})].append(ranking)
    return [_join(members, identity) for members in of_prompt.values()]


def _join(members: list[Ranking], identity: Identity) -> Ranking:
    """All rows of one prompt as one. Every verdict on a response counts for what it is one with."""
    places: dict[Any, int] = {}
    kept: list[tuple[Response, bool, Row, Any]] = []
    found: list[tuple[str, dict[int, float], float, int]] = []  # rater, ranks by place, times, unit
    of_one: dict[str, dict[int, list[float]]] = {}  # what a rater said of single responses is one ballot
    unit = 0
    for member in members:
        given = list(zip(member.responses, member.finished, member.extra, member.ids, strict=True))
        for one in given:
            if places.setdefault(identity(*one[:3]), len(kept)) == len(kept):
                kept.append(one)
        at = [places[identity(*one[:3])] for one in given]
        own = member.units or range(len(member.ballots))
        for (rater, ranks), count, part in zip(member.ballots, member.counts(), own, strict=True):
            if len(at) == 1:
                of_one.setdefault(rater, {}).setdefault(at[0], []).append(ranks[0])
            else:
                found += [(rater, by_place, float(count), unit + part) for by_place in _by_place(at, ranks)]
        unit += max(own, default=-1) + 1
    for number, (rater, told) in enumerate(of_one.items()):
        # Of several labels of one response, that of a named rater is the last, a change of mind; else their mean.
        means = {place: said[-1] if rater else float(np.mean(said)) for place, said in told.items()}
        found.append((rater, means, 1.0, unit + number))
    return replace(
        members[0],
        responses=[one[0] for one in kept],
        finished=[one[1] for one in kept],
        extra=[one[2] for one in kept],
        ids=[one[3] for one in kept],
        ballots=[(rater, [ranks.get(i, float("nan")) for i in range(len(kept))]) for rater, ranks, _, _ in found],
        times=[count for _, _, count, _ in found],
        units=[part for *_, part in found],
    )


def _by_place(at: list[int], ranks: list[float]) -> list[dict[int, float]]:
    """The ranks of responses as ranks of the places `at` which they stand: one ballot, or, where several responses
    have one place, a ballot for each two that have not: every verdict counts, and none overwrites another."""
    if len(set(at)) == len(at):
        return [dict(zip(at, ranks, strict=True))]
    known = [(place, rank) for place, rank in zip(at, ranks, strict=True) if not np.isnan(rank)]
    return [{i: a, j: b} for (i, a), (j, b) in combinations(known, 2) if i != j]


def parts(one: Ranking) -> list[Ranking]:
    """What comparisons link, each part as a ranking of its own; a response that nobody compared is in none.

    Strengths of two parts say nothing of one another. A ranking without any comparison stays as it is.
    """
    wins = one.wins()
    side = rankings.components(wins)
    groups = [np.flatnonzero(side == number) for number in np.unique(side)]
    groups = [group for group in groups if len(group) > 1]
    if not groups or len(groups[0]) == len(side):
        return [one]
    units = one.units or list(range(len(one.ballots)))
    found = []
    for group in groups:
        ballots = [(rater, [ranks[i] for i in group]) for rater, ranks in one.ballots]
        own = [n for n, (_, ranks) in enumerate(ballots) if np.count_nonzero(~np.isnan(ranks)) > 1]
        part: dict[str, Any] = {
            name: [getattr(one, name)[i] for i in group] for name in ("responses", "finished", "extra", "ids")
        }
        counts, told = one.counts(), [ballots[n] for n in own]
        found.append(replace(one, **part, ballots=told, times=[counts[n] for n in own], units=[units[n] for n in own]))
    return found


def gaps(joined: list[Ranking], apart: list[list[Ranking]]) -> list[str]:
    """What to say about rankings and the `parts` of each."""
    sizes = [len(own) for own in apart if len(own) > 1]
    left = sum(len(one.responses) for one in joined) - sum(len(part.responses) for own in apart for part in own)
    said = [f"{len(sizes)} fall apart into {sum(sizes)} parts that nobody compared, no label across"] if sizes else []
    return said + ([f"{left} responses that nobody compared are left out"] if left else [])


def fit(
    together: list[Ranking], *, method: str, prior: float
) -> tuple[list[Ranking], dict[str, float], dict[str, float]]:
    """(rankings with strengths, rater -> reliability, facts) by `rankings.aggregate`, raters known by name."""
    ballots, names, times, _ = numbered(together)
    told: dict[str, Any] = {"times": times, "sizes": [len(ranking.responses) for ranking in together]}
    try:
        found = rankings.aggregate(ballots, num_raters=len(names), method=method, prior=prior, **told)
    except ValueError as error:
        raise UserError(f"{error}; aggregate with bradley_terry or crowd_bt") from error
    fitted = [replace(r, strengths=found.strengths[g, : len(r.responses)]) for g, r in enumerate(together)]
    return fitted, dict(zip(names, found.reliability.tolist(), strict=True)), found.facts


def numbered(together: list[Ranking]) -> tuple[list[rankings.Ballot], list[str], list[float], list[int]]:
    """(ballots of all rankings, with numbers for groups and raters; names of the raters; times and units)."""
    names = sorted({rater for ranking in together for rater, _ in ranking.ballots})
    number = {name: i for i, name in enumerate(names)}
    ballots: list[rankings.Ballot] = [
        (g, number[rater], ranks) for g, ranking in enumerate(together) for rater, ranks in ranking.ballots
    ]
    times = [count for ranking in together for count in ranking.counts().tolist()]
    units: list[int] = []
    for ranking in together:
        start = max(units, default=-1) + 1
        units += [start + unit for unit in ranking.units or range(len(ranking.ballots))]
    return ballots, names, times, units


def describe(raters: dict[str, float], facts: dict[str, float]) -> list[str]:
    """What a summary says of an aggregation."""
    said = [f"{facts[name]:.0f} {name}" for name in facts if name != "agreement" and facts[name]]
    if facts["agreement"] == facts["agreement"]:
        said.append(f"agreement {facts['agreement']:.3f}")
    if len(raters) > 1:
        worst = sorted(raters, key=raters.__getitem__)[:3]
        said.append("least reliable: " + ", ".join(f"{name or 'unnamed'} {raters[name]:.2f}" for name in worst))
    return said
