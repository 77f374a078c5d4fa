"""Where rollouts are cut (`sampling.budget`): which rows an iteration draws, and which it trains on."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from rlhf_jax.data.collate import Batch
from rlhf_jax.hosts.processes import to_host
from rlhf_jax.inference.generate import spread
from rlhf_jax.online.method import Method
from rlhf_jax.online.pool import Pool
from rlhf_jax.online.programs import Cut
from rlhf_jax.runs.parts import Mark, unmarked
from rlhf_jax.sharding import batch_sharding, put, put_batch, replicated
from rlhf_jax.types import Params, Rollout


class Drawn(NamedTuple):
    """The responses to a batch, drawn in part by earlier policies.

    Attributes:
        where: file and line of each prompt.
        counts: numbers for the metrics.
    """

    rollout: Rollout
    where: list[str]
    counts: dict[str, float]


def no_rows(method: Method) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers [R], prompts [R, P] and their masks of a pool without a row."""
    config = method.config
    shape = 2 * config.data.batch_size, max(config.sampling.prompt_buckets or [config.data.max_prompt_length])
    mask = np.zeros(shape, bool)
    mask[:, -1] = True  # logits come from a token
    return np.full(shape[0], -1, np.int32), np.zeros(shape, np.int32), mask


def empty_pool(method: Method) -> Pool:
    """The pool before the first iteration."""
    number, prompt, mask = no_rows(method)
    noise = np.zeros((len(number), method.config.sampling.max_new_tokens), np.float32)
    kept = min(method.config.sampling.top_k, method.nets.models.policy.arch.vocab_size)
    make = jax.jit(lambda n, u, p, m: Pool.of(n, u, p, m, kept), out_shardings=batch_sharding(method.mesh))
    return make(*put_batch(method.mesh, (number, noise, prompt, mask)))


def gather(
    method: Method, cut: Cut, policy: Params, pool: Pool, i: int, key: jax.Array, mark: Mark = unmarked
) -> tuple[Pool, Batch, Drawn]:
    """(the pool without them, the batch of iteration i, its responses); `mark` is told when data and rollout end.

    Free places of the pool get the next prompts, as many as the run has left. Rollouts follow until the rows of a
    batch have ended, in whole groups, of which the oldest are taken: every prompt is trained on once, the last ones in
    the last iteration.
    """
    # Prompts of the pool, group by group, and those that begin.
    size, last = method.group_size, method.settings.iterations
    wanted = method.config.data.batch_size // size
    groups = to_host(pool.number)[::size].copy()
    old = groups >= 0
    begun = i * wanted + int(old.sum())  # every iteration before took `wanted`
    free = np.flatnonzero(~old)[: max(last * wanted - begun, 0)]
    groups[free] = begun + np.arange(len(free))
    number, tokens, mask = no_rows(method)
    number[:] = np.repeat(groups, size)
    if len(free):
        prompts, _ = method.inputs.batches.rows(groups[free].tolist())
        begins = _rows(free, size)
        tokens[begins], mask[begins] = (np.repeat(prompts[name], size, axis=0) for name in ("tokens", "mask"))

    # One rollout after another.
    new, rounds, whole = put_batch(method.mesh, (number, tokens, mask)), 0, np.zeros(len(groups), bool)
    samples = size // spread(len(groups), size, method.mesh.row_ways)
    mark("data")
    while whole.sum() < wanted:
        pool, ended = cut.go_on(policy, pool, *new, key, method.inputs.law, samples)
        rounds, ended = rounds + 1, to_host(ended)
        whole = ended.reshape(-1, size).all(axis=1)
    mark("rollout")

    # The oldest groups that have ended.
    chosen = np.flatnonzero(whole)
    chosen = chosen[np.argsort(groups[chosen])][:wanted]
    rollout, pool = cut.take(pool, put(_rows(chosen, size), replicated(method.mesh)))
    batch, where = method.inputs.batches.rows(groups[chosen].tolist())
    mark("data")
    counts = {
        "rollout/continued": size * old[chosen].sum(),
        "rollout/unfinished": ((number >= 0) & ~ended).sum(),
        "rollout/waiting": ended.sum() - len(chosen) * size,
        "rollout/rounds": rounds,
    }
    return pool, method.spread(batch, i), Drawn(rollout, where, {name: float(n) for name, n in counts.items()})


def _rows(groups: np.ndarray, size: int) -> np.ndarray:
    return (groups[:, None] * size + np.arange(size, dtype=np.int32)).ravel().astype(np.int32)
