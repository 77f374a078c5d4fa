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
