"""The signatures that the parts of the library agree on; documentation and type checking only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

Params = Any
"""A nested dict of arrays."""

Metrics = dict[str, Array]
"""Scalars named group/name. Weighted means, so microbatches add them; names that end in _max take the maximum.

A NAME with a NAME_weight beside it is divided by that once both are added up (`step.settled`)."""

Batch = Any
"""A pytree of arrays with rows on the leading axis."""

LossFn = Callable[[Params, Batch, Array], tuple[Array, Metrics]]
"""(params, batch, key) -> (scalar, metrics), what `step.make_train_step` takes."""

ArrayLoss = Callable[..., tuple[Array, Metrics]]
"""A loss of arrays, (what it names of a batch) -> (scalar, metrics); `losses` has the library's own."""


PolicyLoss = Callable[[Array, Array, Array, Array], tuple[Array, Metrics]]
"""(logprobs, old_logprobs, advantages, weights), each float32[B, T], -> (scalar, metrics)."""

ValueLoss = Callable[[Array, Array, Array, Array], tuple[Array, Metrics]]
"""(values, old_values, returns, weights), each float32[B, T], -> (scalar, metrics)."""

Advantage = Callable[[Array, Array], Array]
"""(rewards, values), each float32[B, T] and 0 off the slots whose value is trained, -> advantages float32[B, T].

They become the critic's returns, advantages + values, before they are whitened."""

GroupAdvantage = Callable[[Array], Array]
"""scores float32[B] -> advantages float32[B]; the group_size rows that answer one prompt stand side by side.

A score is NaN where a judge gave no answer; its row is not trained on, whatever its advantage."""

RewardFn = Callable[..., list[float]]
"""A plain Python reward, (prompts: list[str], responses: list[str], **columns) -> one number per response.

Prompts are what the model is shown, responses what it wrote, as text; columns are the other fields of the prompts'
rows, and `messages` where prompts are messages, if it is taken (None beside a text). See `reward_functions`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """Sampled responses; everything stays on the devices.

    Attributes:
        prompt: int32[B, P], left-padded prompts.
        prompt_mask: bool[B, P], true on prompt tokens.
        tokens: int32[B, T], response tokens, the stop token included; off the mask they mean nothing.
        mask: bool[B, T], true up to and including the stop token.
        logprobs: float32[B, T], nats, of the law that the tokens were drawn from; 0 off the mask.
        finished: bool[B], the row ended at a stop token (false: it was cut off by the length).
        kept: int32[B, T, K], the ids that each token was drawn from, -1 in the places of none and off the mask; None
            where that was the whole vocabulary, or is not carried along.
        experts: int16[B, T, L, k], those that each layer chose for each token as the sampler read it, -1 off the mask;
            None where they are not carried along.
    """

    prompt: Int[Array, "B P"]
    prompt_mask: Bool[Array, "B P"]
    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprobs: Float[Array, "B T"]
    finished: Bool[Array, " B"]
    kept: Int[Array, "B T K"] | None = None
    experts: Int[Array, "B T L k"] | None = None
