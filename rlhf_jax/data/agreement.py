"""How far raters agree, and whether length decides."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.data.rankings import Comparisons


def elo(strengths: np.ndarray) -> np.ndarray:
    """Strengths on the scale of Elo 1978, for display: 1000 is the mean, 400 more are odds of ten to one."""
    return 1000 + 400 / np.log(10) * strengths


def agreement(verdicts: Comparisons, weights: Float[np.ndarray, " N"] | None = None) -> tuple[float, int]:
    """(share of equal pairs among pairs of verdicts on the same two items, number of those); NaN if there are none.

    `weights` counts each verdict so often, else once.
    """
    weights = np.ones(len(verdicts.shares)) if weights is None else weights
    of_pair, wins = _by_pair(verdicts)
    _, of_verdict = np.unique(np.stack([of_pair, wins], 1), axis=0, return_inverse=True)
    pairs, same = (
        sum(n * max(n - 1, 0.0) / 2 for n in np.bincount(number, weights).tolist())
        for number in (of_pair, of_verdict.reshape(-1))
    )
    return (same / pairs if pairs else float("nan")), round(pairs)


def rater_taus(verdicts: Comparisons) -> tuple[Float[np.ndarray, " R"], Int[np.ndarray, " R"]]:
    """(Kendall's tau-b of each rater with all others together, pairs of verdicts behind it); NaN where it is unknown.

    With s = 1, 0, -1 for first, tie, second: sum s_a s_b / sqrt(sum s_a^2 sum s_b^2) over all pairs of items that
    rater a and a rater b judged (Kendall 1945). 1 is the same order everywhere, -1 the opposite, 0 chance.
    """
    of_pair, wins = _by_pair(verdicts)
    signs, judged = np.zeros((2, verdicts.num_raters, of_pair.max(initial=-1) + 1))  # each [rater, pair]
    signs[verdicts.raters, of_pair] = wins - 1
    judged[verdicts.raters, of_pair] = 1
    others, squares = signs.sum(0) - signs, (signs**2).sum(0) - signs**2
    shared = judged * (judged.sum(0) - judged)
    norm = np.sqrt((signs**2 * shared).sum(1) * (judged * squares).sum(1))
    tau = np.divide((signs * others).sum(1), norm, out=np.full(verdicts.num_raters, np.nan), where=norm > 0)
    return tau, shared.sum(1).astype(np.int64)


def krippendorff_alpha(verdicts: Comparisons) -> float:
    """Krippendorff's alpha of all raters: 1 the same order everywhere, 0 chance, NaN where no pair has two verdicts.

    Units are pairs of items, values s = 1, 0, -1 for first, tie, second, each pair both ways round, since which of the
    two is the first means nothing. alpha = 1 - D_o / D_e with the metric (s - s')^2 (Krippendorff 2011, Computing
    Krippendorff's Alpha-Reliability); the ordinal metric is the same one here, as wins are as frequent as losses.
    """
    of_pair, wins = _by_pair(verdicts)
    many, total, squares = (np.bincount(of_pair, values) for values in (np.ones(len(wins)), wins - 1, (wins - 1) ** 2))
    several = many > 1  # a verdict without a second one says nothing
    n, spread = many[several].sum(), squares[several].sum()
    if not spread:
        return float("nan")
    observed = 2 * ((many * squares - total**2)[several] / (many[several] - 1)).sum() / n
    expected = 4 * spread / (2 * n - 1)  # of 2 n values whose sum is 0
    return float(1 - observed / expected)


def _by_pair(verdicts: Comparisons) -> tuple[np.ndarray, np.ndarray]:
    """(number of the pair of items int[N], 2, 1 or 0: the lower item of it wins, ties, loses) of each verdict."""
    first, second = verdicts.first, verdicts.second
    items = np.stack([verdicts.groups, np.minimum(first, second), np.maximum(first, second)], 1)
    _, of_pair = np.unique(items, axis=0, return_inverse=True)
    wins = (2 * np.where(first > second, 1 - verdicts.shares, verdicts.shares)).astype(np.int64)
    return of_pair.reshape(-1), wins


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
