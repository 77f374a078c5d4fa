"""Epochs of minibatches over what was sampled, as one program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from rlhf_jax.config import OnlineConfig
from rlhf_jax.errors import UserError
from rlhf_jax.online.core import Update, packed
from rlhf_jax.sharding import constrain
from rlhf_jax.tokens import token_weights
from rlhf_jax.training.packing import Sharing, zeros_of
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.step import Step
from rlhf_jax.types import Batch, Metrics, Params

TRAINED = "update/trained"
"""A metric of a step, whether its minibatch has a token that is trained on."""


def make_epochs(step: Step, config: OnlineConfig, masks: Mapping[str, str], sharing: Sharing | None = None) -> Update:
    """update(state, experience, key, temperature, ptx=None, frozen=None): epochs over its rows, each in a fresh order.

    Rows that answer one prompt stay together, all of them or as many as a minibatch is a multiple of.
    `step` is `step.make_update` of the method's objective. Its batch holds rows of the experience, in order, the same
    rows packed, those without a weight left out; the temperature; weights by name, each of a mask of the experience
    (`masks`); and text if there is any: `ptx` has a leading axis of epochs * minibatches. The step reads `frozen`.
    A minibatch of all rows is packed as scoring packed it, so that the first step's ratio is exactly 1.
    Metrics are means over the optimiser steps, those of responses over steps with a token that is trained on;
    policy/first_* are those of the first of these, whose ratio should be 1.
    """
    num = config.epochs * config.minibatches

    def update(
        state: TrainState,
        experience: Any,
        key: Array,
        temperature: Array,
        ptx: Batch | None = None,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        # The rows of every step, in order: int32[num, B / minibatches], num = epochs * minibatches.
        num_rows = experience.mask.shape[0]
        together = math.gcd(sharing.rows if sharing else 1, num_rows // config.minibatches)
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(config.epochs))
        orders = jax.vmap(lambda k: jax.random.permutation(k, num_rows // together))(keys).reshape(num, -1)
        firsts = together * jnp.sort(orders, axis=1)
        orders = (firsts[:, :, None] + jnp.arange(together)[None, None]).reshape(num, -1)

        # One step: M = B / minibatches rows of every leaf [B, ...] of the experience, and text [ptx rows, S] if given.
        def take(state: TrainState, xs: Any) -> tuple[TrainState, Metrics]:
            rows, number, text = xs
            x = jax.tree.map(lambda leaf: constrain(leaf[rows]), experience)
            weights = {name: token_weights(getattr(x, mask), config.loss_reduction) for name, mask in masks.items()}
            wanted = jnp.any(jnp.stack([getattr(x, mask) for mask in masks.values()]), axis=(0, 2))
            views = packed(x, config, most=rows.shape[0] // config.accumulate, wanted=wanted, sharing=sharing)
            batch = {"experience": x, "packed": views, **weights, "temperature": temperature}
            batch = batch if text is None else {**batch, "ptx": text}
            state, metrics = step(state, batch, jax.random.fold_in(key, config.epochs + number), frozen)
            return state, {**metrics, TRAINED: wanted.any()}

        # All steps, one after the other: metrics [num] each, and bool[num], whether a step was measured.
        xs, start = (orders, jnp.arange(num), ptx), state.step
        if config.target_kl:
            (state, _), (metrics, measured) = jax.lax.scan(stopping(take, config), (state, jnp.zeros((), bool)), xs)
        else:
            (state, metrics), measured = jax.lax.scan(take, state, xs), jnp.ones(num, bool)
        state = TrainState(start + num, state.params, state.opt_state)  # skipped steps count: the schedule goes on
        return state, summarise(metrics, measured)

    return update


def stopping(
    take: Callable[[TrainState, Any], tuple[TrainState, Metrics]], config: OnlineConfig
) -> Callable[..., Any]:
    """A step of `make_epochs` that takes no more once approx KL exceeds config.target_kl.

    It carries (state, whether steps have ended) and returns (metrics, whether they were measured).
    """

    def maybe_take(carry: tuple[TrainState, Array], xs: Any) -> tuple[Any, tuple[Metrics, Array]]:
        state, stopped = carry
        shapes = jax.eval_shape(take, state, xs)[1]
        if "policy/approx_kl" not in shapes:
            raise UserError("target_kl needs the metric policy/approx_kl; let the policy loss return it")

        def skip(state: TrainState, xs: Any) -> tuple[TrainState, Metrics]:
            return state, zeros_of(shapes)

        new, metrics = jax.lax.cond(stopped, skip, take, state, xs)
        measured = ~stopped
        # approx KL is that of the policy before this step: where it is too large the step is not taken.
        stopped = stopped | (metrics["policy/approx_kl"] > config.target_kl)
        state = jax.tree.map(lambda n, o: jnp.where(stopped, o, n), new, state)
        return (state, stopped), ({**metrics, "policy/epochs_taken": ~stopped / config.minibatches}, measured)

    return maybe_take


def summarise(metrics: Metrics, measured: Bool[Array, " N"]) -> Metrics:
    """Metrics [N] of an update's steps: means, maxima of *_max, sums of counts, and the first step's invariants.

    Steps off `measured` did not happen. Those off TRAINED had no token of a response to train on, and none to say
    anything of; what they did with text they say.
    """
    out, trained = {}, measured & metrics[TRAINED]
    of_all = {name for name in metrics if name.startswith(("optim/", "ptx/"))}
    of_all |= {"loss/total"} if "ptx/nll" in metrics else set()
    for name, values in metrics.items():
        if name.endswith("_max"):
            out[name] = values.max(where=trained, initial=-jnp.inf)
        elif name in ("optim/skipped", "optim/empty", "policy/epochs_taken"):
            out[name] = values.sum()
        elif name != TRAINED:
            out[name] = values.mean(where=measured if name in of_all else trained)
    for name in ("ratio_max", "approx_kl", "clip_fraction"):
        if f"policy/{name}" in metrics:
            out[f"policy/first_{name}"] = metrics[f"policy/{name}"][jnp.argmax(trained)]
    return out
