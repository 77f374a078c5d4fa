"""Log-probs that a language model gives to texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from rlhf_jax.data.collate import collate_sft, eval_batches
from rlhf_jax.data.encoding import Example
from rlhf_jax.hosts.processes import to_host
from rlhf_jax.models import Model
from rlhf_jax.sharding import Mesh, put_batch
from rlhf_jax.types import Params


class Likelihood:
    """A compiled model that reads texts; all batches have one shape per length."""

    def __init__(self, model: Model, mesh: Mesh, *, pad_id: int, batch_size: int, multiple: int = 64):
        """`batch_size` rows are read at once, padded to a multiple of `multiple` tokens."""
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self.mesh, self.pad_id, self.multiple = mesh, pad_id, multiple
        self.size, self.limit = -(-batch_size // ways) * ways, model.arch.max_positions
        self.forward = jax.jit(model.next_logprobs)

    def targets(self, params: Params, examples: Sequence[Example], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probs float32[n] of the n targets of each {tokens, loss_mask} example, in nats."""
        longest = max(len(example["tokens"]) for example in examples)
        length = max(longest, min(-(-longest // self.multiple) * self.multiple, self.limit))
        collate = partial(collate_sft, length=length, reduction="token", pad_id=self.pad_id)
        rows: list[np.ndarray] = []
        for batch in eval_batches(examples, batch_size=self.size, collate=collate):
            arrays = put_batch(self.mesh, {name: batch[name] for name in ("tokens", "positions", "segment_ids")})
            rows += list(to_host(self.forward(params, **arrays, temperature=np.float32(temperature))))
        return [
            row[: len(example["tokens"]) - 1][np.asarray(example["loss_mask"])[1:]]
            for row, example in zip(rows, examples, strict=False)  # the last batch is filled up
        ]


def example_of(prompt: Sequence[int] | np.ndarray, response: Sequence[int] | np.ndarray) -> Example:
    """{tokens, loss_mask} of a prompt and the response whose tokens are targets."""
    tokens: np.ndarray = np.asarray([*prompt, *response], np.int32)
    return {"tokens": tokens, "loss_mask": np.arange(len(tokens)) >= max(len(prompt), 1)}
