"""From many raters' comparisons to strengths, a consensus ranking and soft labels. Floor 0.

Items are compared within groups: the K responses to one prompt, or all models in one group. Raters work across groups.
It runs once, on the host, in float64: numpy, batched over groups, nothing to compile.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

LARGEST_TIE = 12
"""Items of one tie that `plackett_luce` takes: it looks at all their subsets."""


@dataclass(frozen=True)
class Comparisons:
    """N verdicts on two items each. G groups of at most K items, R raters, L ballots.

    Attributes:
        groups: int[N], the group of the two items, below G.
        first, second: int[N], the items, below sizes[group].
        shares: float[N], 1 if `first` is preferred, 0 if `second` is, 0.5 for a tie.
        raters: int[N], who said so, below num_raters.
        ballots: int[N], which ranking the verdict is part of; verdicts of one ballot are not independent.
        sizes: int[G], items of each group.
        num_raters: R.
    """

    groups: Int[np.ndarray, " N"]
    first: Int[np.ndarray, " N"]
    second: Int[np.ndarray, " N"]
    shares: Float[np.ndarray, " N"]
    raters: Int[np.ndarray, " N"]
    ballots: Int[np.ndarray, " N"]
    sizes: Int[np.ndarray, " G"]
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
    told: dict[int, int] = {}
    for ballot, (group, rater, ranks) in enumerate(ballots):
        told[group] = len(ranks)
        ranked = [(i, rank) for i, rank in enumerate(ranks) if not np.isnan(rank)]
        for (i, a), (j, b) in combinations(ranked, 2):
            rows.append((group, i, j, 1.0 if a < b else 0.0 if a > b else 0.5, rater, ballot))
    columns = np.array(rows, np.float64).reshape(-1, 6).T
    groups, first, second, raters, of_ballot = (columns[i].astype(np.int64) for i in (0, 1, 2, 4, 5))
    if sizes is None:
        sizes = [told.get(g, 0) for g in range(max(told, default=-1) + 1)]
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
        loses = _sigmoid(strengths[..., None, :] - strengths[..., :, None])  # [i, j]: i loses to j
        surprise, curvature = wins * loses, games * loses * (1 - loses)
        above = _sigmoid(strengths)
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
        above = _sigmoid(strengths)
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
    found = []
    for rank in np.unique(ranks[~np.isnan(ranks)]):
        tied, worse = np.flatnonzero(ranks == rank), ranks > rank
        if len(tied) > LARGEST_TIE:
            raise ValueError(f"a tie of {len(tied)} items is more than Plackett-Luce takes ({LARGEST_TIE})")
        for count in range(1, len(tied) + 1):
            for left in combinations(tied, count):
                members = worse.copy()
                members[list(left)] = True
                found.append((members, 1 / comb(len(tied), count)))
    return found


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
        beats = _sigmoid(strengths[c.groups, c.first] - strengths[c.groups, c.second])
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
    straight, crossed = reliability * probability, (1 - reliability) * (1 - probability)
    return straight / (straight + crossed)


def soft_labels(strengths: Float[np.ndarray, "*G K"]) -> Float[np.ndarray, "*G K K"]:
    """labels[..., i, j] = sigmoid(s_i - s_j), the chance that a reliable rater prefers i to j."""
    return _sigmoid(strengths[..., :, None] - strengths[..., None, :])


def consensus_ranks(strengths: Float[np.ndarray, " K"], *, tolerance: float = 1e-4) -> Int[np.ndarray, " K"]:
    """Ranks from 0, the best; strengths that differ by no more than `tolerance` share one, and no rank is left out."""
    order = np.argsort(-strengths, kind="stable")
    falls = np.diff(-strengths[order], prepend=-strengths[order[:1]]) > tolerance
    ranks = np.empty(len(strengths), np.int64)
    ranks[order] = np.cumsum(falls)
    return ranks


def bootstrap_intervals(
    ballots: Sequence[Ballot],
    *,
    num_raters: int,
    method: str,
    prior: float,
    num_samples: int,
    level: float,
    seed: int,
    times: Sequence[float] | None = None,
    units: Sequence[int] | None = None,
    whole: bool = False,
    sizes: Sequence[int] | None = None,
) -> tuple[Float[np.ndarray, "G K"], Float[np.ndarray, "G K"]]:
    """(lower, upper) percentile intervals of `aggregate`'s strengths, ballots drawn with replacement (Efron 1979).

    Whole ballots are drawn, since the pairs of one ranking are not independent; those with one number in `units` are
    parts of one. Each group draws as many of its own as it has, so that none is left with none; a ballot that counts
    several `times` is as many ballots, unless units are drawn as a `whole`, each as one. The interval of a group of
    one ballot has no width. `sizes` as in `comparisons`.
    """
    c, rng = comparisons(ballots, num_raters=num_raters, sizes=sizes), np.random.default_rng(seed)
    counts = np.ones(len(ballots)) if times is None else np.asarray(times, np.float64)
    start = _fit(ballots, c, counts, method, prior, None)
    _, first, unit = np.unique(
        np.arange(len(ballots)) if units is None else units, return_index=True, return_inverse=True
    )
    group_of, size_of = np.array([ballots[i][0] for i in first]), np.ones(len(first)) if whole else counts[first]
    drawn = np.zeros((num_samples, len(first)))
    for group in np.unique(group_of):
        own = np.flatnonzero(group_of == group)
        total = size_of[own].sum()
        num = max(round(total), 1)  # fractional votes count as the number of raters that they add up to
        drawn[:, own] = rng.multinomial(num, size_of[own] / total, num_samples) * (total / num)
    drawn = (drawn / size_of)[:, unit.reshape(-1)] * counts
    fits = [_fit(ballots, c, each, method, prior, start)[0] for each in drawn]
    tail = 100 * (1 - level) / 2
    lower, upper = np.percentile(fits, [tail, 100 - tail], axis=0)
    return lower, upper


def _fit(
    ballots: Sequence[Ballot], c: Comparisons, times: np.ndarray, method: str, prior: float, start: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(strengths [G, K], reliabilities [R]) of ballots that count `times` each, going on from `start`."""
    weights = times[c.ballots]
    if method == "crowd_bt":
        return crowd_bradley_terry(c, prior=prior, agreed=9.0, disagreed=1.0, weights=weights, start=start)
    if method == "bradley_terry":
        return bradley_terry(c.wins(weights, c.shares), prior=prior, items=c.items), np.ones(c.num_raters)
    strengths = np.zeros(c.items.shape)
    members: dict[int, list[int]] = {}
    for i, (group, _, _) in enumerate(ballots):
        if times[i]:
            members.setdefault(group, []).append(i)
    for group, own in members.items():
        ranks = [ballots[i][2] for i in own]
        strengths[group, : c.sizes[group]] = plackett_luce(ranks, prior=prior, times=times[own])
    return strengths, np.ones(c.num_raters)


def elo(strengths: np.ndarray) -> np.ndarray:
    """Strengths on the scale of Elo 1978, for display: 1000 is the mean, 400 more are odds of ten to one."""
    return 1000 + 400 / np.log(10) * strengths


def components(wins: Float[np.ndarray, "*G M M"]) -> Int[np.ndarray, "*G M"]:
    """The smallest item that each item is linked to by comparisons; a group with two numbers falls apart."""
    linked = (wins + np.swapaxes(wins, -1, -2) > 0) | np.eye(wins.shape[-1], dtype=bool)
    for _ in range(max(wins.shape[-1] - 1, 1).bit_length()):
        linked = linked @ linked  # walks of twice the length
    return linked.argmax(-1)


def agreement(verdicts: Comparisons, weights: Float[np.ndarray, " N"] | None = None) -> tuple[float, int]:
    """(share of equal pairs among pairs of verdicts on the same two items, number of those); NaN if there are none.

    `weights` counts each verdict so often, else once.
    """
    weights = np.ones(len(verdicts.shares)) if weights is None else weights
    flip = verdicts.first > verdicts.second
    low, high = np.minimum(verdicts.first, verdicts.second), np.maximum(verdicts.first, verdicts.second)
    shares = np.where(flip, 1 - verdicts.shares, verdicts.shares)
    items = np.stack([verdicts.groups, low, high], 1)
    _, of_item = np.unique(items, axis=0, return_inverse=True)
    of_item = of_item.reshape(-1)
    _, of_said = np.unique(np.stack([of_item, (2 * shares).astype(np.int64)], 1), axis=0, return_inverse=True)
    pairs, same = (
        sum(n * max(n - 1, 0.0) / 2 for n in np.bincount(of, weights).tolist())
        for of in (of_item, of_said.reshape(-1))
    )
    return (same / pairs if pairs else float("nan")), round(pairs)


def rater_taus(verdicts: Comparisons) -> tuple[Float[np.ndarray, " R"], Int[np.ndarray, " R"]]:
    """(Kendall's tau-b of each rater with all others together, pairs of verdicts behind it); NaN where it is unknown.

    With s = 1, 0, -1 for first, tie, second: sum s_a s_b / sqrt(sum s_a^2 sum s_b^2) over all pairs of items that
    rater a and a rater b judged (Kendall 1945). 1 is the same order everywhere, -1 the opposite, 0 chance.
    """
    c = verdicts
    flip = c.first > c.second
    low, high = np.minimum(c.first, c.second), np.maximum(c.first, c.second)
    pairs, of_pair = np.unique(np.stack([c.groups, low, high], 1), axis=0, return_inverse=True)
    said = np.zeros((c.num_raters, len(pairs)))
    judged = np.zeros((c.num_raters, len(pairs)))
    said[c.raters, of_pair.reshape(-1)] = (2 * c.shares - 1) * np.where(flip, -1, 1)
    judged[c.raters, of_pair.reshape(-1)] = 1
    others, squares = said.sum(0) - said, (said**2).sum(0) - said**2
    shared = judged * (judged.sum(0) - judged)
    norm = np.sqrt((said**2 * shared).sum(1) * (judged * squares).sum(1))
    tau = np.divide((said * others).sum(1), norm, out=np.full(c.num_raters, np.nan), where=norm > 0)
    return tau, shared.sum(1).astype(np.int64)


def length_bias(
    longer: Float[np.ndarray, " N"], preferred: Float[np.ndarray, " N"]
) -> tuple[float | None, float | None]:
    """(correlation of label and length, share of decided pairs that the longer response wins); None if undefined.

    `longer` is by how much the one response of a pair is longer than the other, `preferred` its label less 1/2. Each
    pair counts both ways round, so the means are 0: correlation = sum(l p) / sqrt(sum(l^2) sum(p^2)).
    """
    spread = np.sqrt((longer**2).sum() * (preferred**2).sum())
    decided = (longer != 0) & (preferred != 0)
    correlation = float((longer * preferred).sum() / spread) if spread else None
    return correlation, float((longer * preferred > 0)[decided].mean()) if decided.any() else None


@dataclass(frozen=True)
class Consensus:
    """What many raters think together.

    Attributes:
        strengths: float[G, K] in nats, 0 where there is no item.
        reliability: float[R] of Crowd-BT, else ones.
        facts: what a summary counts, name -> number.
    """

    strengths: Float[np.ndarray, "G K"]
    reliability: Float[np.ndarray, " R"]
    facts: dict[str, float]


def best_of_n(proxy: Float[np.ndarray, "B N"], rewards: Float[np.ndarray, "B N"], n: int) -> Float[np.ndarray, " B"]:
    """E[reward of the sample with the largest proxy among n], unbiased, from N >= n samples of each prompt.

    A sample with L smaller ones is the best of C(L, n - 1) of the C(N, n) choices of n (Nakano et al. 2021, arXiv
    2112.09332, appendix I). Samples with equal proxy share theirs evenly.
    """
    num = proxy.shape[1]
    # The chance that all n are among the k lowest; of a sample's own share, the difference from one k to the next.
    among = np.array([comb(k, n) / comb(num, n) for k in range(num + 1)])
    chances = np.empty(proxy.shape)
    for row, scores in zip(chances, proxy, strict=True):
        low, high = (np.searchsorted(np.sort(scores), scores, side) for side in ("left", "right"))
        row[:] = (among[high] - among[low]) / (high - low)
    return (chances * rewards).sum(axis=1)


def aggregate(
    ballots: Sequence[Ballot],
    *,
    num_raters: int,
    method: str,
    prior: float,
    times: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
) -> Consensus:
    """Strengths of all items by bradley_terry, plackett_luce or crowd_bt, and what is odd about the ballots.

    Each ballot counts `times`, else once; `sizes` as in `comparisons`. Warns if some group has comparisons
    that do not link all its items: strengths across the gap come from the prior alone.
    """
    c = comparisons(ballots, num_raters=num_raters, sizes=sizes)
    counts = np.ones(len(ballots)) if times is None else np.asarray(times, np.float64)
    weights = counts[c.ballots]
    wins = c.wins(weights, c.shares)
    strengths, reliability = _fit(ballots, c, counts, method, prior, None)
    games = wins + np.swapaxes(wins, -1, -2)
    apart = ((components(wins) != 0) & c.items).any(-1) & games.any((-1, -2))
    if apart.any():
        warnings.warn(
            f"comparisons do not link all items in {apart.sum()} of {len(c.sizes)} groups; across the gap the prior "
            "alone decides, so compare items of the two sides",
            stacklevel=2,
        )
    facts = {
        "verdicts": round(weights.sum()),
        "ties": round(weights[c.shares == 0.5].sum()),
        "raters": num_raters,
        "raters with one ballot": int((np.bincount([b[1] for b in ballots], counts, num_raters) == 1).sum()),
        "groups not linked": int(apart.sum()),
        "undefeated items": int(((games.sum(-1) > 0) & (np.swapaxes(wins, -1, -2).sum(-1) == 0)).sum()),
        "items without a verdict": int((c.items & (games.sum(-1) == 0)).sum()),
        "agreement": agreement(c, weights)[0],
    }
    return Consensus(strengths, reliability, facts)


def _newton(x: np.ndarray, gradient: np.ndarray, hessian: np.ndarray) -> tuple[np.ndarray, float]:
    """(x after a Newton step uphill, the largest move). No move above 1 in a group, lest it overshoot."""
    diagonal = np.diagonal(hessian, axis1=-2, axis2=-1)
    # Without a prior nothing fixes the mean; the ridge makes the matrix regular and moves no optimum.
    ridge = np.maximum(1e-6 * diagonal.mean(-1), 1e-12)[..., None, None] * np.eye(x.shape[-1])
    step = np.linalg.solve(hessian + ridge, gradient[..., None])[..., 0]
    step = step / np.maximum(np.abs(step).max(-1, keepdims=True, initial=0), 1.0)
    return x + step, float(np.abs(step).max(initial=0))


def _centred(strengths: np.ndarray, items: np.ndarray) -> np.ndarray:
    mean = np.where(items, strengths, 0).sum(-1, keepdims=True) / np.maximum(items.sum(-1, keepdims=True), 1)
    return np.where(items, strengths - mean, 0.0)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
