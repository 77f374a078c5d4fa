"""AI ranking: which of two responses is better, asked of a model, a Python function or a server.

Judges like places and lengths. So every pair is asked in both orders, and the report says what this one likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import jax
import numpy as np

from rlhf_jax.data import rankings
from rlhf_jax.data.consensus import consensus_ranks
from rlhf_jax.data.rows import Row
from rlhf_jax.feedback.answers import Answer

Question = tuple[str, str, str]
"""(prompt, response A, response B)"""

Ask = Callable[[Sequence[Question], jax.Array], list[Answer]]
"""(questions, key) -> an answer to each."""


@dataclass(frozen=True)
class Verdict:
    """What a judge thinks of two responses to one prompt.

    Attributes:
        first, second: their places among the responses.
        forward: answers to the question with `first` as A.
        backward: answers with `second` as A; empty if one order was asked.
        share: how much it prefers `first`, in [0, 1]; None if it gave no verdict.
        longer: characters by which `first` is longer.
    """

    first: int
    second: int
    forward: list[Answer]
    backward: list[Answer]
    share: float | None
    longer: int

    def shares(self) -> list[float]:
        """How much each order prefers `first`; an order without an answer is left out."""
        straight = [a for a in self.forward if not isinstance(a, str)]
        turned = [1 - a for a in self.backward if not isinstance(a, str)]
        return [float(np.mean(said)) for said in (straight, turned) if said]

    def contradicts_itself(self) -> bool:
        """Whether each order prefers another response."""
        both = self.shares()
        return len(both) == 2 and (both[0] - 0.5) * (both[1] - 0.5) < 0


def verdicts_of(row: Row) -> list[Verdict]:
    """The verdicts of a row {verdicts}; none of one without."""
    return [Verdict(**verdict) for verdict in row.get("verdicts", [])]


class Judge:
    """Asks about pairs, in both orders and several times, and makes verdicts of the answers."""

    def __init__(
        self,
        ask: Ask,
        *,
        votes: int = 1,
        both_orders: bool = True,
        inconsistent: Literal["tie", "mean", "drop"] = "tie",
    ):
        """`ask` answers questions; the rest as in `config.JudgeConfig`."""
        self.ask, self.votes, self.both_orders, self.inconsistent = ask, votes, both_orders, inconsistent

    def __call__(self, prompt: str, a: str, b: str, key: jax.Array | None = None) -> float | None:
        """How much `a` is preferred to `b`, in [0, 1]; None without a verdict."""
        return self.verdicts([(prompt, [a, b])], jax.random.key(0) if key is None else key)[0][0].share

    def verdicts(self, groups: Sequence[tuple[str, Sequence[str]]], key: jax.Array) -> list[list[Verdict]]:
        """Verdicts on every pair of the K responses of each (prompt, responses); equal texts are a tie, unasked."""
        pairs = [(g, i, j) for g, (_, texts) in enumerate(groups) for i, j in combinations(range(len(texts)), 2)]
        asked = [(g, i, j) for g, i, j in pairs if groups[g][1][i] != groups[g][1][j]]
        questions: list[Question] = []
        for g, i, j in asked:
            prompt, texts = groups[g]
            questions += [(prompt, texts[i], texts[j])] * self.votes
            questions += [(prompt, texts[j], texts[i])] * (self.votes * self.both_orders)
        answers = self.ask(questions, key) if questions else []
        each = self.votes * (1 + self.both_orders)
        of_pair = {pair: answers[n * each : (n + 1) * each] for n, pair in enumerate(asked)}
        of_groups: list[list[Verdict]] = [[] for _ in groups]
        for g, i, j in pairs:
            said = of_pair.get((g, i, j), [])
            longer = len(groups[g][1][i]) - len(groups[g][1][j])
            verdict = Verdict(i, j, said[: self.votes], said[self.votes :], None, longer)
            of_groups[g].append(replace(verdict, share=self._share(verdict)))
        return of_groups

    def _share(self, verdict: Verdict) -> float | None:
        """The mean of both orders if they agree; None if one has no answer, since then its place would decide."""
        shares = verdict.shares()
        if not verdict.forward:  # equal texts
            return 0.5
        if len(shares) < 1 + self.both_orders:
            return None
        if verdict.contradicts_itself() and self.inconsistent != "mean":
            return 0.5 if self.inconsistent == "tie" else None
        return float(np.mean(shares))


def ranks(size: int, verdicts: Sequence[Verdict]) -> list[int | None]:
    """Ranks of `size` responses from 0, the best, by their mean share of the comparisons (Borda); equal is a tie.

    None for a response without a verdict.
    """
    won, games = np.zeros(size), np.zeros(size)
    for v in verdicts:
        if v.share is not None:
            np.add.at(won, [v.first, v.second], [v.share, 1 - v.share])
            np.add.at(games, [v.first, v.second], 1)
    order = np.full(size, None, object)
    known = np.flatnonzero(games)
    order[known] = consensus_ranks(won[known] / games[known], tolerance=1e-9)
    return [None if rank is None else int(rank) for rank in order]


def ranks_by_part(size: int, verdicts: Sequence[Verdict]) -> list[list[int | None]]:
    """The `ranks` within each part of the responses that verdicts link; none says anything of another part's."""
    decided = [v for v in verdicts if v.share is not None]
    games = np.zeros((size, size))
    for v in decided:
        games[v.first, v.second] = 1
    part = rankings.components(games)
    return [ranks(size, [v for v in decided if part[v.first] == n]) for n in sorted({part[v.first] for v in decided})]


def judged(items: Sequence[Row], verdicts: Sequence[Verdict]) -> Row:
    """{responses, rater} with a judge's ranks, or {responses, raters} where its verdicts do not link all responses:
    a ranking of each part, so that nothing is said of two that are not linked."""
    parts = ranks_by_part(len(items), verdicts) or [[None] * len(items)]
    if len(parts) > 1:
        return {"responses": list(items), "raters": [{"rater": "judge", "ranks": ranks} for ranks in parts]}
    return {"responses": [{**item, "rank": r} for item, r in zip(items, parts[0], strict=True)], "rater": "judge"}
