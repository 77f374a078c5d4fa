"""Means and shares over prompts, and how sure they are: rows of one prompt are not independent."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

Z = 1.96
"""Standard errors to either side of a mean that hold 95%."""


def wilson_interval(share: float, n: float, z: float = Z) -> tuple[float, float]:
    """95% confidence interval of a share of n independent trials (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _clusters(groups: Sequence[Hashable]) -> np.ndarray:
    """int[N], a number from 0 on for each distinct group."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(group, len(number)) for group in groups], np.int64)


def mean_and_error(
    values: Float[np.ndarray, " N"], groups: Sequence[Hashable], weights: Float[np.ndarray, " N"] | None = None
) -> tuple[float, float | None]:
    """(weighted mean of N > 0 values, its standard error), where values of one group are alike and groups independent.

    Cluster-robust (Liang and Zeger 1986): G/(G - 1) sum over groups of (sum of w (x - mean))^2, root, over the sum of
    w. With a value per group it is the standard error of the mean; None of a single group.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    mean = float(weights @ values / weights.sum())
    sums = np.bincount(_clusters(groups), weights * (values - mean))
    if len(sums) < 2:
        return mean, None
    return mean, float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / weights.sum())


def share_and_interval(
    values: Float[np.ndarray, " N"], groups: Sequence[Hashable], weights: Float[np.ndarray, " N"] | None = None
) -> tuple[float, tuple[float, float]]:
    """(weighted mean of N > 0 values in [0, 1], its 95% interval); values of one group are alike, groups independent.

    Wilson's interval of as many independent trials as would have the variance seen between groups, r (1 - r) / var
    (Kish 1965, the design effect), but at least as many as there are groups of equal weight: Wilson's does not shrink
    to nothing where all are won. Where few groups tell the variance, fewer: 1 - (z^2 + 1) / (2 (G - 1)) of them, about
    (z / t)^2 for Student's t of G - 1 degrees of freedom.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    share, error = mean_and_error(values, groups, weights)
    sizes = np.bincount(_clusters(groups), weights)
    trials = float(sizes.sum() ** 2 / (sizes**2).sum())
    if error:
        trials = max(trials, share * (1 - share) / error**2 * (1 - (Z * Z + 1) / 2 / (len(sizes) - 1)))
    return share, wilson_interval(share, trials)
