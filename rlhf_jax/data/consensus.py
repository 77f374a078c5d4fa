"""One order of the responses to a prompt from the ballots of several raters, by the method that is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.data import rankings
from rlhf_jax.data.agreement import agreement
from rlhf_jax.data.rankings import Ballot, Comparisons, comparisons, components, sigmoid

Fit = tuple[np.ndarray, np.ndarray]
"""(strengths [G, K], reliabilities [R])."""


def soft_labels(strengths: Float[np.ndarray, "*G K"]) -> Float[np.ndarray, "*G K K"]:
    """labels[..., i, j] = sigmoid(s_i - s_j), the chance that a reliable rater prefers i to j."""
    return sigmoid(strengths[..., :, None] - strengths[..., None, :])


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
        members = np.flatnonzero(group_of == group)
        total = size_of[members].sum()
        num = max(round(total), 1)  # fractional votes count as the number of raters that they add up to
        drawn[:, members] = rng.multinomial(num, size_of[members] / total, num_samples) * (total / num)
    drawn = (drawn / size_of)[:, unit.reshape(-1)] * counts
    fits = [_fit(ballots, c, each, method, prior, start)[0] for each in drawn]
    tail = 100 * (1 - level) / 2
    lower, upper = np.percentile(fits, [tail, 100 - tail], axis=0)
    return lower, upper


def _fit(
    ballots: Sequence[Ballot], c: Comparisons, times: np.ndarray, method: str, prior: float, start: Fit | None
) -> Fit:
    """Strengths and reliabilities of ballots that count `times` each, going on from `start`."""
    weights = times[c.ballots]
    if method == "crowd_bt":
        return rankings.crowd_bradley_terry(c, prior=prior, agreed=9.0, disagreed=1.0, weights=weights, start=start)
    if method == "bradley_terry":
        return rankings.bradley_terry(c.wins(weights, c.shares), prior=prior, items=c.items), np.ones(c.num_raters)
    strengths = np.zeros(c.items.shape)
    members: dict[int, list[int]] = {}
    for i in np.flatnonzero(times).tolist():
        members.setdefault(ballots[i][0], []).append(i)
    for group, places in members.items():
        ranks = [ballots[i][2] for i in places]
        strengths[group, : c.sizes[group]] = rankings.plackett_luce(ranks, prior=prior, times=times[places])
    return strengths, np.ones(c.num_raters)


@dataclass(frozen=True)
class Consensus:
    """What many raters think together."""

    strengths: Float[np.ndarray, "G K"]  # in nats, 0 where there is no item
    reliability: Float[np.ndarray, " R"]  # of Crowd-BT, else ones
    facts: dict[str, float]  # what a summary counts, name -> number


def best_of_n(proxy: Float[np.ndarray, "B N"], rewards: Float[np.ndarray, "B N"], n: int) -> Float[np.ndarray, " B"]:
    """E[reward of the sample with the largest proxy among n], unbiased, from N >= n samples of each prompt.

    A sample with L smaller ones is the best of C(L, n - 1) of the C(N, n) choices of n (Nakano et al. 2021, arXiv
    2112.09332, appendix I). Samples with equal proxy share theirs evenly. One whose proxy is NaN is never the best:
    the chances are those of the choices that hold another; NaN where there is none.
    """
    num = proxy.shape[1]
    # The chance that all n are among the k lowest; of a sample's own share, the difference from one k to the next.
    among = np.array([comb(k, n) / comb(num, n) for k in range(num + 1)])
    out = np.full(len(proxy), np.nan)
    for i, known in enumerate(~np.isnan(proxy)):
        scores, without = proxy[i, known], num - known.sum()
        low, high = (without + np.searchsorted(np.sort(scores), scores, side) for side in ("left", "right"))
        if len(scores):
            chances = (among[high] - among[low]) / (high - low) / (1 - among[without])
            out[i] = (chances * rewards[i, known]).sum()
    return out


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
