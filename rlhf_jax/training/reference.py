"""What the model says of the rows before it is trained, as DPO and KTO compare it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from rlhf_jax.config import TrainArgs
from rlhf_jax.data.collate import Collate, eval_batches
from rlhf_jax.data.encoding import Example
from rlhf_jax.hosts.processes import is_first, say, to_host
from rlhf_jax.models.loading import Loaded
from rlhf_jax.runs.progress import Progress
from rlhf_jax.sharding import Mesh, put_batch
from rlhf_jax.training.state import digest
from rlhf_jax.types import Batch, Params


def add_reference(
    forward: Callable[[Params, Batch], jax.Array],
    loaded: Loaded,
    config: TrainArgs,
    mesh: Mesh,
    sets: Sequence[Sequence[Example]],
    collate: Collate,
    pack: Callable[[Batch], Batch] | None,
) -> dict[str, int | None]:
    """Put `ref_logprobs` float32[K] into the examples of `sets`; returns the digest of the model that said them.

    Computed once, so that no reference is in memory while the policy is trained.
    """
    params, size = loaded.whole(loaded.params), config.data.batch_size
    parts = [examples[i : i + size] for examples in sets for i in range(0, len(examples), size)]
    progress = Progress("reference", len(parts), 0, bar=config.run.progress and is_first(), say=say)
    for examples in parts:
        [batch] = eval_batches(examples, batch_size=size, collate=collate)
        batch = batch if pack is None else pack(batch)
        said = to_host(forward(params, put_batch(mesh, batch)))
        for example, logprobs in zip(examples, said[: len(examples)], strict=True):
            example["ref_logprobs"] = logprobs
        progress.update()
    progress.close()
    return {"weights of the reference model": digest(params)}
