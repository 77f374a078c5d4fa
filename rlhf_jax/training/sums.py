"""Whether a loss and its metrics are sums over rows, as they must be to be computed in microbatches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError, tell
from rlhf_jax.training.step import add_metrics, settled
from rlhf_jax.types import Metrics

Differences = dict[str, tuple[float, float]]
"""What is no sum over rows, "loss" or a metric's name -> (its value of some rows, of two halves of them together)."""


def differences(loss: Callable[[jax.Array], tuple[jax.Array, Metrics]], rows: int) -> Differences:
    """Of `loss`, which takes bool[rows]: the rows that weigh something."""
    first = np.arange(rows) < rows // 2

    def named(held: np.ndarray) -> Metrics:
        value, metrics = jax.jit(loss)(jnp.asarray(held))
        return {"loss": value, **metrics}

    whole = {name: float(x) for name, x in settled(named(np.ones(rows, bool))).items()}
    halves = {name: float(x) for name, x in settled(add_metrics(named(first), named(~first))).items()}
    return {
        name: (whole[name], halves[name])
        for name in whole
        if not np.isclose(whole[name], halves[name], rtol=1e-3, atol=1e-5, equal_nan=True)
    }


def is_ours(loss: Callable[..., Any]) -> bool:
    """Whether a loss is of this library, whose tests say that it is a sum."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "__module__", "").startswith("rlhf_jax.")


def check_sum(loss: Callable[..., Any], name: str, cure: str) -> None:
    """Raise a UserError unless a loss (x, y, z, weights), each f32[16, 6], is the sum of those of two halves.

    The rows of the other half have the weight 0, as `PolicyLoss` and `ValueLoss` have it of other microbatches.
    Metrics that are no sums are named.
    """
    if is_ours(loss):
        return
    x, y, z = np.random.default_rng(0).normal(scale=0.1, size=(3, 16, 6)).astype(np.float32)
    each = np.full(x.shape, 1 / x.size, np.float32)
    differing = differences(lambda held: loss(x, y, z, held[:, None] * each), len(x))
    if "loss" in differing:
        whole, halves = differing["loss"]
        raise UserError(
            f"{name} is {whole:.5g} of some rows and {halves:.5g} of two halves of them together, but rows are "
            f"computed in parts, others with weight 0; make it a sum of weights * something, or {cure}"
        )
    if differing:
        tell(
            f"{name}: its metrics {sorted(differing)} are no sums over rows, and are added up over the parts of a step"
        )
