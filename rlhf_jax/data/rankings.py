"""From many raters' comparisons to strengths, a consensus ranking and soft labels.

Items are compared within groups: the K responses to one prompt, or all models in one group. Raters work across groups.
It runs once, on the host, in float64: numpy, batched over groups, nothing to compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from jaxtyping import Bool, Float, Int

LARGEST_TIE = 12
"""Items of one tie that `plackett_luce` takes: it looks at all their subsets."""


@dataclass(frozen=True)
class Comparisons:
    """N verdicts on two items each. G groups of at most K items, R raters, L ballots."""

    groups: Int[np.ndarray, " N"]  # the group of the two items, below G
    first: Int[np.ndarray, " N"]  # the items, below sizes[group]
    second: Int[np.ndarray, " N"]
    shares: Float[np.ndarray, " N"]  # 1 if `first` is preferred, 0 if `second` is, 0.5 for a tie
    raters: Int[np.ndarray, " N"]  # who said so, below R
    ballots: Int[np.ndarray, " N"]  # which ranking the verdict is part of; those of one are not independent
    sizes: Int[np.ndarray, " G"]  # items of each group
    num_raters: int

    @property
    def items(self) -> Bool[np.ndarray, "G K"]:
        """Which places of [G, K] hold an item."""
        return np.arange(self.sizes.max(initial=0)) < self.sizes[:, None]

    def wins(self, weights: Float[np.ndarray, " N"], shares: Float[np.ndarray, " N"]) -> Float[np.ndarray, "G K K"]:
        """wins[g, i, j]: weighted verdicts for i over j; a tie is half a win of each."""
        size = int(self.sizes.max(initial=0))
        shape, row = (len(self.sizes), size, size), self.groups * size
        places = np.concatenate([(row + self.first) * size + self.second, (row + self.second) * size + self.first])
        counts = np.concatenate([weights * shares, weights * (1 - shares)])
        return np.bincount(places, counts, len(self.sizes) * size * size).reshape(shape)


Ballot = tuple[int, int, Sequence[float]]
"""(group, rater, ranks of the group's items): lower is better, equal is a tie, NaN is not ranked."""


def comparisons(ballots: Sequence[Ballot], *, num_raters: int, sizes: Sequence[int] | None = None) -> Comparisons:
    """Every pair that a ballot ranks, as a verdict. Ballots of one group have the same length.

    `sizes` are the items of each group; without them, what the ballots say, and a group without one has none.
    """
    rows = []
    size_of: dict[int, int] = {}
    for ballot, (group, rater, ranks) in enumerate(ballots):
        size_of[group] = len(ranks)
        ranked = [(i, rank) for i, rank in enumerate(ranks) if not np.isnan(rank)]
        for (i, a), (j, b) in combinations(ranked, 2):
            rows.append((group, i, j, 1.0 if a < b else 0.0 if a > b else 0.5, rater, ballot))
    columns = np.array(rows, np.float64).reshape(-1, 6).T
    groups, first, second, raters, of_ballot = (columns[i].astype(np.int64) for i in (0, 1, 2, 4, 5))
    if sizes is None:
        sizes = [size_of.get(g, 0) for g in range(max(size_of, default=-1) + 1)]
    return Comparisons(groups, first, second, columns[3], raters, of_ballot, np.array(sizes, np.int64), num_raters)


def bradley_terry(
    wins: Float[np.ndarray, "*G M M"],
    *,
    prior: float,
    items: Bool[np.ndarray, "*G M"] | None = None,
    start: Float[np.ndarray, "*G M"] | None = None,
    num_steps: int = 100,
) -> Float[np.ndarray, "*G M"]:
    """Maximum-likelihood Bradley-Terry strengths in nats, of mean 0 in a group: P(i beats j) = sigmoid(s_i - s_j).

    Bradley and Terry 1952, by Newton's method, for all groups at once. (Hunter's minorise-maximise iteration creeps,
    and is far off after thousands of steps, where an item is undefeated and the prior is weak.) `wins[i, j]` counts
    how often i beat j, a tie as half a win of each; `prior` adds that many wins and losses of every item against one
    of strength 0, which keeps the undefeated finite and puts items without games at 0 (before centring). `items`
    marks the places that hold an item; the others are 0.
    """
    wins = np.asarray(wins, np.float64)
    strengths = np.zeros(wins.shape[:-1]) if start is None else start
    games, eye = wins + np.swapaxes(wins, -1, -2), np.eye(wins.shape[-1])
    for _ in range(num_steps):
        loses = sigmoid(strengths[..., None, :] - strengths[..., :, None])  # [i, j]: i loses to j
        surprise, curvature = wins * loses, games * loses * (1 - loses)
        above = sigmoid(strengths)
        gradient = (surprise - np.swapaxes(surprise, -1, -2)).sum(-1) + prior * (1 - 2 * above)
        diagonal = curvature.sum(-1) + 2 * prior * above * (1 - above)
        strengths, moved = _newton(strengths, gradient, diagonal[..., None] * eye - curvature)
        if moved < 1e-9:
            break
    return _centred(strengths, np.ones(strengths.shape, bool) if items is None else items)


def plackett_luce(
    ballots: Sequence[Sequence[float]],
    *,
    prior: float,
    times: Sequence[float] | np.ndarray | None = None,
    num_steps: int = 100,
) -> np.ndarray:
    """Maximum-likelihood Plackett-Luce strengths float64[M], mean 0, of one group of M items from whole rankings.

    Plackett 1975: the best of those left is i with probability exp(s_i) / sum of exp(s_j) over those left. Each ballot
    is ranks [M]: lower is better, NaN is not ranked. Tied items stand for all their orders, in equal parts: the mean
    log-likelihood of the orders, so a tie of two is half a win of each. Each ballot counts `times`, else once. `prior`
    as in `bradley_terry`; on pairs both give the same.

    Raises:
        ValueError: more than LARGEST_TIE items in one tie.
    """
    size = len(ballots[0])
    counts = np.ones(len(ballots)) if times is None else np.asarray(times, np.float64)
    chosen = counts @ ~np.isnan(np.asarray(ballots, np.float64))
    choices = [
        (left, part * count)
        for ranks, count in zip(ballots, counts, strict=True)
        for left, part in _choice_sets(np.asarray(ranks, np.float64))
    ]
    members = np.array([left for left, _ in choices], bool).reshape(-1, size)
    weight = np.array([[part] for _, part in choices]).reshape(-1, 1)
    strengths, eye = np.zeros(size), np.eye(size)
    for _ in range(num_steps):
        odds = np.where(members, np.exp(strengths - strengths.max()), 0.0)
        share = odds / odds.sum(1, keepdims=True)
        above = sigmoid(strengths)
        gradient = chosen - (weight * share).sum(0) + prior * (1 - 2 * above)
        diagonal = (weight * share).sum(0) + 2 * prior * above * (1 - above)
        strengths, moved = _newton(strengths, gradient, diagonal * eye - (weight * share).T @ share)
        if moved < 1e-9:
            break
    return strengths - strengths.mean()


def _choice_sets(ranks: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """(who is left to choose from, weight) of each choice: log-likelihood = sum s_i - sum weight logsumexp(s[left]).

    Ranks [0, 1, 1] leave {0, 1, 2}, then {1, 2}, then {1} or {2}, half each.
    """
    choices = []
    for rank in np.unique(ranks[~np.isnan(ranks)]):
        tied, worse = np.flatnonzero(ranks == rank), ranks > rank
        if len(tied) > LARGEST_TIE:
            raise ValueError(f"a tie of {len(tied)} items is more than Plackett-Luce takes ({LARGEST_TIE})")
        for count in range(1, len(tied) + 1):
            for left in combinations(tied, count):
                members = worse.copy()
                members[list(left)] = True
                choices.append((members, 1 / comb(len(tied), count)))
    return choices


def crowd_bradley_terry(
    verdicts: Comparisons,
    *,
    prior: float,
    agreed: float,
    disagreed: float,
    weights: Float[np.ndarray, " N"] | None = None,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    num_steps: int = 500,
) -> tuple[Float[np.ndarray, "G K"], Float[np.ndarray, " R"]]:
    """Bradley-Terry strengths and how reliable each rater is, together.

    Chen et al. 2013 (WSDM, "Pairwise ranking aggregation in a crowdsourced setting"), eq. 4: rater k says "i beats j"
    with probability e_k sigmoid(s_i - s_j) + (1 - e_k) sigmoid(s_j - s_i). e_k is 1 for a rater as good as the model,
    1/2 for noise, which then has no weight, and 0 for one who always says the opposite, whose votes then count turned
    round. By expectation maximisation: the chance that a verdict was meant as said weighs it. Every rater starts with
    `agreed` verdicts meant so and `disagreed` meant otherwise, so one who voted once stays near their ratio. `weights`
    counts each verdict so often, else once; `start` is an earlier result to go on from.
    """
    c = verdicts
    weights = np.ones(len(c.shares)) if weights is None else weights
    votes = np.bincount(c.raters, weights, c.num_raters)
    if start is None:
        reliability = np.full(c.num_raters, agreed / (agreed + disagreed))
        strengths = bradley_terry(c.wins(weights, c.shares), prior=prior, items=c.items)
    else:
        strengths, reliability = start
    for _ in range(num_steps):
        beats = sigmoid(strengths[c.groups, c.first] - strengths[c.groups, c.second])
        e = reliability[c.raters]
        # A verdict "first" was meant so with chance e p / (e p + (1 - e)(1 - p)); "second", with 1 - p for p.
        if_first, if_second = _meant(e, beats), _meant(e, 1 - beats)
        meant = c.shares * if_first + (1 - c.shares) * if_second
        turned = c.shares * if_first + (1 - c.shares) * (1 - if_second)  # share of "first" once meant is meant
        before, old = reliability, strengths
        reliability = (np.bincount(c.raters, weights * meant, c.num_raters) + agreed) / (votes + agreed + disagreed)
        wins = c.wins(weights, turned)
        strengths = bradley_terry(wins, prior=prior, items=c.items, start=strengths, num_steps=20)
        if max(np.abs(reliability - before).max(initial=0), np.abs(strengths - old).max(initial=0)) < 1e-7:
            break
    return strengths, reliability


def _meant(reliability: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """The chance that a verdict of this `probability` was meant as said."""
    straight, crossed = reliability * probability, (1 - reliability) * (1 - probability)
    return straight / (straight + crossed)


def components(wins: Float[np.ndarray, "*G M M"]) -> Int[np.ndarray, "*G M"]:
    """The smallest item that each item is linked to by comparisons; a group with two numbers falls apart."""
    linked = (wins + np.swapaxes(wins, -1, -2) > 0) | np.eye(wins.shape[-1], dtype=bool)
    for _ in range(max(wins.shape[-1] - 1, 1).bit_length()):
        linked = linked @ linked  # walks of twice the length
    return linked.argmax(-1)


def _newton(x: np.ndarray, gradient: np.ndarray, hessian: np.ndarray) -> tuple[np.ndarray, float]:
    """(x after a Newton step uphill, the largest move). No move above 1 in a group, lest it overshoot."""
    diagonal = np.diagonal(hessian, axis1=-2, axis2=-1)
    # Without a prior nothing fixes the mean; the ridge makes the matrix regular and moves no optimum.
    ridge = np.maximum(1e-6 * diagonal.mean(-1), 1e-12)[..., None, None] * np.eye(x.shape[-1])
    step = np.linalg.solve(hessian + ridge, gradient[..., None])[..., 0]
    step = step / np.maximum(np.abs(step).max(-1, keepdims=True, initial=0), 1.0)
    return x + step, float(np.abs(step).max(initial=0))


def _centred(strengths: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Strengths of mean 0 in each group, 0 where there is no item."""
    mean = np.where(items, strengths, 0).sum(-1, keepdims=True) / np.maximum(items.sum(-1, keepdims=True), 1)
    return np.where(items, strengths - mean, 0.0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
