"""Rewards from Python functions. Floor 2."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.config import RewardSourceConfig, resolve
from rlhf_jax.errors import UserError


def call_reward(
    fn: Callable[..., Any], prompts: list[str], responses: list[str], columns: dict[str, list[Any]]
) -> np.ndarray:
    """float32[B] from fn(prompts, responses, **columns).

    Raises:
        UserError: not one finite number per response.
    """
    name = getattr(fn, "__name__", None) or getattr(getattr(fn, "func", None), "__name__", repr(fn))
    try:
        inspect.signature(fn).bind(prompts, responses, **columns)
    except TypeError as error:
        raise UserError(f"reward function {name}: {error}; define it as fn(prompts, responses, **columns)") from error
    rewards = fn(prompts, responses, **columns)
    if isinstance(rewards, (str, Mapping)) or not isinstance(rewards, Iterable):
        raise UserError(f"reward function {name} returned {rewards!r}; return a list, one number per response")
    rewards = list(rewards)
    if len(rewards) != len(responses):
        raise UserError(
            f"reward function {name} returned {len(rewards)} rewards for {len(responses)} responses; return one each"
        )
    for i, reward in enumerate(rewards):
        array = np.asarray(reward)  # a scalar of any array library
        if not isinstance(reward, numbers.Real) and (array.ndim or array.dtype.kind not in "biuf"):
            raise UserError(f"reward function {name} returned {reward!r} for response {i}; return a number")
        if not np.isfinite(reward):
            raise UserError(f"reward function {name} returned {reward} for response {i}; return a finite number")
    return np.asarray(rewards, np.float32)


def combine(
    config: RewardSourceConfig, functions: Sequence[Callable[..., Any]] | None
) -> Callable[..., np.ndarray] | None:
    """(prompts, responses, columns) -> float32[B], the weighted sum of the Python rewards; None if there are none.

    `functions` replace the config's names. Raises UserError when the weights do not match the functions.
    """
    found = list(functions) if functions is not None else [resolve(name) for name in config.functions]
    weights = config.function_weights or [1.0] * len(found)
    if len(weights) != len(found):
        raise UserError(
            f"reward.function_weights has {len(weights)} entries for {len(found)} functions; give one each, or none"
        )
    if not found:
        return None

    def total(prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> np.ndarray:
        parts = [w * call_reward(fn, prompts, responses, columns) for fn, w in zip(found, weights, strict=True)]
        return np.stack(parts).sum(axis=0, dtype=np.float32)

    return total
