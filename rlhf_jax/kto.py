"""KTO: a policy from responses that are each labelled good or bad. Floor 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.config import KTORun
from rlhf_jax.data.answers import unpaired_examples
from rlhf_jax.data.batches import collate_unpaired
from rlhf_jax.models import Model
from rlhf_jax.responses import objective, response_logprobs, train_policy
from rlhf_jax.stage import Rows
from rlhf_jax.types import Params

__all__ = ["objective", "own_and_other", "run"]


def own_and_other(model: Model, params: Params, batch: Any) -> jax.Array:
    """As `response_logprobs`, but the second response, which only measures the KL, gets no backward pass."""
    own, other = (
        {name: array[:, i : i + 1] if array.ndim > 2 else array for name, array in batch.items()} for i in range(2)
    )
    frozen = jax.lax.stop_gradient(params)
    both = response_logprobs(model, params, own), response_logprobs(model, frozen, other)
    return jnp.concatenate(both, axis=1)


def run(
    config: KTORun,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    loss: Callable[..., Any] | None = None,
) -> Any:
    """As `dpo.run`, on rows {prompt, response, label}, or on preferences, taken apart."""
    singles = lambda examples: collate_unpaired  # noqa: E731
    return train_policy(
        "kto", config, config.kto, unpaired_examples, singles, own_and_other, loss=loss, rows=rows, eval_rows=eval_rows
    )
