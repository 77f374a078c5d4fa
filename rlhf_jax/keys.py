"""Where the random numbers of a run come from: every use has a branch of the run's key to itself.

`split(key, n)[i]` is `fold_in(key, i)`, so a key is a path of integers from the seed, and two uses with one path would
draw the same numbers. What counts something (steps, prompts, batches, layers) folds its number into a branch; the
branches themselves are named here and nowhere else:

    seed > weights              embedding, layers, final norm and head, or a score head on a trunk (0 .. 3)
    seed > weights > adapters   then a leaf; the critic's have a branch of their own
    seed > training             then a step or iteration: rollout and update, or a loss's noise
    seed > evaluation           then a held-out batch, or a step whose table of samples this is
    seed > held-out loss        the same noise at every evaluation
    a rollout's > judge         what a judge of its responses writes
    seed > (a number)           of a batch or source, in commands that sample without training
    seed > sampler's weights    of a random model in such a command
"""

from __future__ import annotations

from typing import Literal, get_args

import jax

Purpose = Literal[
    "weights",
    "training",
    "evaluation",
    "held-out loss",
    "adapters",
    "critic's adapters",
    "sampler's weights",
    "judge",
]
NUMBERS: dict[Purpose, int] = {name: number for number, name in enumerate(get_args(Purpose))}
NUMBERS["sampler's weights"] = 2**31  # beside batches and sources, which count from 0
NUMBERS["judge"] = 2**31 + 1  # beside the splits of a rollout's key


def branch(key: jax.Array, purpose: Purpose) -> jax.Array:
    """The key of a use."""
    return jax.random.fold_in(key, NUMBERS[purpose])
