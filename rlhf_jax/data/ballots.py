"""Rankings of several responses to one prompt by several raters, as rows give them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rlhf_jax.data import rankings, schemas
from rlhf_jax.data.consensus import consensus_ranks, soft_labels
from rlhf_jax.data.messages import SAID, Text, prompt_of, response_of, written
from rlhf_jax.data.numbers import in_order, is_number, number_of
from rlhf_jax.data.rows import Row, bad_row, empty_row, layout_of, require, type_of, where_of
from rlhf_jax.data.schemas import Answer, finished_of, flag_of, ids_of
from rlhf_jax.errors import UserError

EMPTY = "responses that are null or empty, left out"
OTHERS = "rankings with other labels beside those that count: of raters, else best, else ranks, else scores"


class Ballot(NamedTuple):
    """What one rater says of all responses to a prompt."""

    rater: str  # a name, "" for anybody
    ranks: list[float]  # lower is better, equal is a tie, NaN is not ranked
    times: float = 1.0  # how often the ballot counts
    unit: int = 0  # the bootstrap draws ballots of a ranking with one number together


@dataclass(frozen=True)
class Ranking:
    """K responses to a prompt and what raters think of them."""

    prompt: Text
    answers: list[Answer]
    ballots: list[Ballot]
    where: str  # file:line
    strengths: np.ndarray | None = None  # float[K], once aggregated
    fields: Row = field(default_factory=dict)  # that rows made of it carry along

    @property
    def responses(self) -> list[Text]:
        return [answer.response for answer in self.answers]

    def wins(self) -> np.ndarray:
        """float[K, K], how often response i was preferred to j, a tie as half."""
        ballots = [(0, 0, ballot.ranks) for ballot in self.ballots]
        c = rankings.comparisons(ballots, num_raters=1, sizes=[len(self.answers)])
        times = np.array([ballot.times for ballot in self.ballots])
        return c.wins(times[c.ballots], c.shares)[0]

    def items(self) -> list[Row]:
        """The responses as rows hold them: {text, ids?, finished, ...}, without who is better."""
        return [
            {"text": written(response), **({} if ids is None else {"ids": ids}), "finished": finished, **extra}
            for response, finished, ids, extra in self.answers
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
            if len(self.ballots) == 1:
                return np.array(self.ballots[0].ranks, np.float64), labels
            order = np.nansum(labels, axis=1) / np.maximum((games > 0).sum(axis=1), 1)
            tolerance = 1e-12  # shares of whole votes are exact, a fit is not
        else:
            part = rankings.components(wins)
            labels = np.where(part[:, None] == part[None, :], soft_labels(self.strengths), np.nan)
            order, tolerance = self.strengths, 1e-4
        ranks = consensus_ranks(order, tolerance=tolerance).astype(np.float64)
        return np.where(games.any(axis=1), ranks, np.nan), labels


def ranking_row(row: Row, *, unlabelled: bool = False) -> Ranking:
    """A prompt with several responses.

    {prompt, responses, ...} where responses are texts, messages, or {text, rank?, score?, finished?}. Who is better is
    said by `rank` (lower is better, equal is a tie, null is not ranked), else by `score` (higher is better), as a list
    `ranks` or `scores` beside the responses (RRHF) or in each of them; what is null for all says nothing. Or `best` is
    the place of the one that was chosen (Ziegler et al. 2019), from 0, and the others are not compared. The row's
    `rater` said so. Or several did: `raters`: [{rater, ranks or best}, ...].

    A preference row is a ranking of two, and its votes are ballots. An unpaired preference {prompt, completion, label}
    is one response with rank 0 or 1, to be joined with others by `gather`.
    `unlabelled` also takes responses that nobody has compared.

    Raises:
        DroppedRow: fewer than two responses that are neither null nor empty.
        UserError: a missing field, a wrong type, or ranks that are no ranking.
    """
    kind = layout_of(row)
    if kind == "unpaired preference":
        answer = schemas.answer_of(row)
        ranks = [0.0 if flag_of(row, "label") else 1.0]
        return Ranking(
            answer["prompt"], [schemas.single_answer(answer)], [Ballot(rater_of(row), ranks)], where_of(row)
        )
    if kind == "stepwise supervision":
        cure = "give whole answers, such as {chosen, rejected}"
        raise bad_row(row, f"stepwise supervision labels parts of one answer; {cure}")
    if kind != "ranking":
        pair = schemas.preference_row(row)
        return Ranking(pair["prompt"], schemas.both_answers(pair), _ballots_of_votes(row), where_of(row))
    require(row, ("prompt", "responses"), "a ranking row is {prompt, responses: [{text, rank}, ...]}")
    prompt = prompt_of(row, row["prompt"])
    items = _items(row)
    labelled = any(row.get(name) is not None for name in ("raters", "ranks", "scores", "best"))
    labelled = labelled or any({"rank", "score"} & set(item) for item in items)
    ballots = _ballots(row, items) if labelled or not unlabelled else []
    ballots = [each for each in ballots if not (unlabelled and np.isnan(each[1]).all())]
    kept = [i for i, says_something in enumerate(with_text(row)) if says_something]
    if len(kept) < 2:
        raise empty_row(row, f"{len(kept)} of {len(items)} responses have a text", "with fewer than two responses")
    columns = (
        [response_of(row, f"responses {i}", items[i]["text"], prompt) for i in kept],
        [finished_of({**items[i], "_where": where_of(row)}) for i in kept],
        [ids_of({**items[i], "_where": f"{where_of(row)}: responses {i}"}, "ids") for i in kept],
        [{k: v for k, v in items[i].items() if k not in ("text", "rank", "score", "finished", "ids")} for i in kept],
    )
    return Ranking(
        prompt,
        [Answer(*fields) for fields in zip(*columns, strict=True)],
        [Ballot(rater, [ranks[i] for i in kept], unit=unit) for unit, (rater, ranks) in enumerate(ballots)],
        where_of(row),
    )


def _items(row: Row) -> list[Row]:
    if not isinstance(row["responses"], list):
        raise bad_row(row, f'"responses" is {type_of(row["responses"])}; give a list of {{text, rank}}')
    items = []
    for number, item in enumerate(row["responses"]):
        if not isinstance(item, dict) or "role" in item:
            item = {"text": [item] if isinstance(item, dict) else item}
        if "text" not in item:
            raise bad_row(row, f'responses {number} has no "text" (found: {", ".join(item) or "nothing"}); add it')
        items.append(item)
    return items


def remarks_of(rows: Sequence[Row]) -> Counter[str]:
    """What a report says of ranking rows: responses `without_text`, and labels that do not count."""
    return without_text(rows) + Counter({OTHERS: sum(_has_others(row) for row in rows if layout_of(row) == "ranking")})


def without_text(rows: Sequence[Row]) -> Counter[str]:
    """How many responses of ranking rows are null or empty, which leave their ranking."""
    return +Counter({EMPTY: sum(with_text(row).count(False) for row in rows if layout_of(row) == "ranking")})


def with_text(row: Row) -> list[bool]:
    """Whether each response of a ranking row is neither null nor empty; those that are not leave their ranking."""
    return [_has_text(item["text"]) for item in _items(row)]


def _has_text(value: object) -> bool:
    """Whether a response, a text or messages, says something."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        if any(value[-1].get(name) for name in SAID):
            return True
        value = value[-1].get("content")
    return value is not None and bool(str(value).strip())


def _ballots(row: Row, items: list[Row]) -> list[tuple[str, list[float]]]:
    """(rater, ranks of all items) of every ballot of a ranking row."""
    if (verdicts := row.get("raters")) is not None:
        if not isinstance(verdicts, list) or not all(isinstance(verdict, dict) for verdict in verdicts):
            raise bad_row(row, f'"raters" is {type_of(verdicts)}; give a list of {{rater, ranks}}')
        return [(rater_of(v, row), ranks) for v in verdicts for ranks in _verdict_ranks(row, v, len(items))]
    if row.get("best") is not None:
        return [(rater_of(row), ranks) for ranks in _verdict_ranks(row, row, len(items))]
    columns = _columns(row, items)
    if not columns:
        raise bad_row(row, 'nobody says which response is better; give each a "rank" (0 is best) or a "score"')
    values, sign = next((column for column in columns if not _says_nothing(column[0])), columns[0])
    return [(rater_of(row), _ranks(row, values, len(items), sign))]


def _columns(row: Row, items: list[Row]) -> list[tuple[object, int]]:
    """(what a row says of its responses, 1 if lower is better else -1): the first that says something counts."""
    columns: list[tuple[object, int]] = []
    for name, sign in (("rank", 1), ("score", -1)):
        of_items = [item.get(name) for item in items] if any(name in item for item in items) else None
        columns += [(values, sign) for values in (row.get(f"{name}s"), of_items) if values is not None]
    return columns


def _says_nothing(values: object) -> bool:
    return isinstance(values, list) and all(value is None for value in values)


def _has_others(row: Row) -> bool:
    """Whether a ranking row has labels that do not count and are not those that do: of another order, or none."""
    items = _items(row)
    sources = [(values, sign) for values, sign in _columns(row, items) if not _says_nothing(values)]
    beside = row.get("raters") is not None, row.get("best") is not None
    if any(beside):
        verdicts = row["raters"] if isinstance(row.get("raters"), list) else []
        both = [{"best", "ranks"} <= {name for name in each if each[name] is not None} for each in verdicts]
        return sum(beside) + len(sources) > 1 or any(both)
    try:
        orders = [_places(_ranks(row, values, len(items), sign)) for values, sign in sources]
    except UserError:  # the first one is refused where it is read
        return len(sources) > 1
    return any(order != orders[0] for order in orders)


def _places(ranks: Sequence[float]) -> list[float]:
    """The places of ranks from 0, equal ones at one; -1 for NaN."""
    places = {rank: float(i) for i, rank in enumerate(sorted({rank for rank in ranks if rank == rank}))}
    return [places.get(rank, -1.0) for rank in ranks]


def _verdict_ranks(row: Row, verdict: Row, size: int) -> list[list[float]]:
    """The ranks in a rater's verdict. A choice of the `best` is a pair with each of the others, which it does not
    compare with one another."""
    best = verdict.get("best")
    if best is None:
        return [_ranks(row, verdict.get("ranks"), size)]
    if type(best) is not int or not 0 <= best < size:
        raise bad_row(row, f'"best" is {best!r}; give the place of one of the {size} responses, from 0')
    places = range(size)
    return [[{best: 0.0, j: 1.0}.get(i, float("nan")) for i in places] for j in places if j != best]


def _ranks(row: Row, values: object, size: int, sign: int = 1) -> list[float]:
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


def _ballots_of_votes(row: Row) -> list[Ballot]:
    """The ballots of a preference row: as its `votes` count, or the one of its rater."""
    if (votes := row.get("votes")) is None:
        return [Ballot(rater_of(row), [0.0, 1.0])]
    counted = [(ranks, float(n)) for n, ranks in zip(votes, ([0.0, 1.0], [1.0, 0.0], [0.0, 0.0]), strict=True) if n]
    return [Ballot("", ranks, times, unit) for unit, (ranks, times) in enumerate(counted)]
