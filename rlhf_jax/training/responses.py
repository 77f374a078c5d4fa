"""What a network says of the responses of a batch, whether they are padded one by one or packed."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.models import Model
from rlhf_jax.tokens import Packed
from rlhf_jax.training.packing import over_views
from rlhf_jax.types import Batch, Params

Says = Callable[[Model, Params, Packed], Float[Array, " R"]]
"""A number for every response of a view [M, S], 0 for those that it does not hold."""


def view_of(batch: Batch) -> Packed:
    """The view of a batch: that of a microbatch of packed rows, else its B K rows, each a sequence of its own."""
    if "packed" in batch:
        return batch["packed"]
    tokens, positions, segment_ids = (
        batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "positions", "segment_ids")
    )
    rows, width = tokens.shape[0], batch["last"].shape[1]
    place = positions - jnp.repeat(batch["prompt_lengths"], width)[:, None] + 1
    speaks = (segment_ids > 0) & (place >= 0)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    ends = speaks & (positions == batch["last"].reshape(-1, 1))
    return Packed(tokens, positions, segment_ids, jnp.where(speaks, row, rows), place, ends, num_rows=rows)


def of_view(batch: Batch, view: Packed) -> Batch:
    """The batch with weights 0 for examples that the view does not hold: losses add up over microbatches."""
    if "packed" not in batch:
        return batch
    held = view.rows.reshape(len(batch["weights"]), -1)  # all responses of an example, or none
    weighed = {"weights": batch["weights"] * held.any(axis=1)}
    if "token_weights" in batch:
        weighed["token_weights"] = batch["token_weights"] * held
    return {**batch, **weighed}


def of_batch(says: Says, model: Model, params: Params, batch: Batch) -> Float[Array, "B K"]:
    """What a network says of all responses of a batch, of all its microbatches if it is packed."""
    if "packed" not in batch:
        said = says(model, params, view_of(batch))
    else:
        nothing = lambda shape: jnp.zeros(shape.shape, shape.dtype)  # noqa: E731
        said = over_views(batch["packed"], lambda view, _: says(model, params, view), nothing, jnp.add)
    return said.reshape(len(batch["weights"]), -1)
