"""Log-probs of whole responses: of the trained model, and once before training of the reference. Floor 2."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.hosts import to_host
from rlhf_jax.models import Model
from rlhf_jax.sharding import put_batch
from rlhf_jax.supervised import Stage
from rlhf_jax.types import Params


def response_logprobs(model: Model, params: Params, batch: Any) -> Float[Array, "B K"]:
    """log p(response | prompt) in nats of the K responses to each prompt, in one forward pass of B K rows.

    A batch of `collate_preference`, `collate_unpaired` or `collate_ranking`; 0 where there is no response.
    """
    tokens, positions, segment_ids = (
        batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "positions", "segment_ids")
    )
    hidden = model.apply(params, tokens, positions, segment_ids)
    logprobs, _ = model.logprobs(params, hidden[:, :-1], tokens[:, 1:])
    logprobs = logprobs.reshape(*batch["tokens"].shape[:2], -1)
    # Tokens [a, b, c] of a prompt a: the targets b, c stand at positions 1, 2, not below its length 1.
    targets = (batch["positions"] >= batch["prompt_lengths"][:, None, None]) & (batch["segment_ids"] > 0)
    return jnp.sum(jnp.where(targets[:, :, 1:], logprobs, 0.0), axis=-1)


def add_reference(stage: Stage) -> None:
    """Put `ref_logprobs` float32[K] into every example: what the model that training starts from says.

    Computed once, so that no reference is in memory while the policy is trained.
    """
    forward = jax.jit(partial(response_logprobs, stage.loaded.model))
    params = stage.loaded.whole(stage.loaded.params)
    size = stage.config.data.batch_size
    for examples in (stage.train_set, stage.held_out_set):
        for start in range(0, len(examples), size):
            rows = examples[start : start + size]
            [batch] = stage.in_batches(rows)
            found = to_host(forward(params, put_batch(stage.mesh, batch)))
            for example, logprobs in zip(rows, found[: len(rows)], strict=True):
                example["ref_logprobs"] = logprobs
