"""Rankings of several responses by several raters: one row each, and all rows of a prompt together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_jax.data import rankings
from rlhf_jax.data.consensus import consensus_ranks, soft_labels
from rlhf_jax.data.layouts import Joined, layout_of
from rlhf_jax.data.messages import SAID, Messages, prompt_of, response_of, written
from rlhf_jax.data.numbers import in_order, is_number, number_of
from rlhf_jax.data.rows import Row, bad_row, empty_row, require, type_of, where_of
from rlhf_jax.data.schemas import answer_of, finished_of, flag_of, ids_of, preference_row

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
            labels = np.where(side[:, None] == side[None, :], soft_labels(self.strengths), np.nan)
            order = self.strengths
        if self.strengths is None and len(self.ballots) == 1:
            return np.array(self.ballots[0][1], np.float64), labels
        tolerance = 1e-12 if self.strengths is None else 1e-4  # shares of whole votes are exact, a fit is not
        ranks = consensus_ranks(order, tolerance=tolerance).astype(np.float64)
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
