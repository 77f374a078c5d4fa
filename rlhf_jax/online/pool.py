"""Partial rollouts: rows that a rollout cuts go on in the next iteration (Kimi k1.5, arXiv 2501.12599; APRIL,
arXiv 2509.18521). Pure functions.

A pool holds twice as many rows as an iteration trains on, in groups of one prompt. Every rollout gives each row that
has not ended some tokens; an iteration takes the oldest groups of which all rows have ended, and the others wait for
the next one, whose policy goes on where another one stopped. Log-probs stay those of the policy that drew the token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.types import Params, Rollout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """Rows under way, R.

    Attributes:
        number: int32[R], of the row's prompt in the order of the training rows; -1 where there is no row.
        noise: float32[R, T], what its tokens are drawn with, in whichever iteration.
        rollout: what there is of it.
    """

    number: Int[Array, " R"]
    noise: Float[Array, "R T"]
    rollout: Rollout

    @classmethod
    def of(cls, number: Array, noise: Array, prompt: Array, mask: Array, kept: int) -> Pool:
        """Rows of these prompts [R, P] that have no token yet; with `kept` > 0, so many ids of each token."""
        tokens = jnp.zeros(noise.shape, jnp.int32)
        falses = tokens > 0
        ids = jnp.full((*noise.shape, kept), -1, jnp.int32) if kept else None
        return cls(number, noise, Rollout(prompt, mask, tokens, falses, jnp.zeros(noise.shape), falses[:, 0], ids))

    def ended(self) -> Bool[Array, " R"]:
        """Rows that stopped or are as long as rows get."""
        return (self.number >= 0) & (self.rollout.finished | self.rollout.mask.all(axis=1))


def go_on(
    sampler: Callable[..., Rollout],
    policy: Params,
    pool: Pool,
    number: Int[Array, " R"],
    prompt: Int[Array, "R P"],
    mask: Bool[Array, "R P"],
    key: Array,
    law: SamplingLaw,
    samples: int,
) -> tuple[Pool, Bool[Array, " R"]]:
    """The pool after one more rollout, and which of its rows have ended.

    Places without a row take the row of the given arrays, if one is there, with noise of the key. `samples` responses
    to a prompt stand one after another.
    """
    kept = 0 if pool.rollout.kept is None else pool.rollout.kept.shape[2]
    new = Pool.of(number, jax.random.uniform(key, pool.noise.shape), prompt, mask, kept)
    begins = pool.number < 0
    pool = jax.tree.map(lambda x, n: jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), n, x), pool, new)
    wanted = ((pool.number >= 0) & ~pool.ended()).reshape(-1, samples).any(axis=1)
    prompt, mask = pool.rollout.prompt[::samples], pool.rollout.prompt_mask[::samples]
    rollout = sampler(policy, prompt, mask, key, law, wanted, pool.noise, pool.rollout, samples=samples)
    pool = dataclasses.replace(pool, rollout=rollout)
    return pool, pool.ended()


def take(pool: Pool, rows: Int[Array, " B"]) -> tuple[Rollout, Pool]:
    """Some rows of a pool, and the pool without them."""
    rollout = jax.tree.map(lambda x: x[rows], pool.rollout)
    return rollout, dataclasses.replace(pool, number=pool.number.at[rows].set(-1))
