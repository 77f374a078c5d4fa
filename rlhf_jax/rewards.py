"""Rewards from Python functions. Floor 2."""

from __future__ import annotations

import inspect
import numbers
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rlhf_jax.config import RewardSourceConfig, resolve
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import any_of, several
from rlhf_jax.sharding import own_rows

RETRY_WAIT = 1.0
"""Seconds before the first retry of a reward function; they double with each."""


class RewardFailure(UserError):
    """A reward function raised or ran out of time in every attempt."""


def attempt(fn: Callable[[], Any], timeout: float) -> Any:
    """fn(), in a thread of its own if there is a timeout in seconds: whoever hangs there is left behind.

    Raises:
        TimeoutError: it is not done by then.
    """
    if not timeout:
        return fn()
    outcome: dict[str, Any] = {}

    def call() -> None:
        try:
            outcome["value"] = fn()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=call, name="reward", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {timeout:g} s (reward.timeout)")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def persist(name: str, fn: Callable[[], Any], *, timeout: float, retries: int) -> Any:
    """fn(), tried again `retries` times.

    Raises:
        RewardFailure: every attempt raised or ran out of time.
    """
    for i in range(retries + 1):
        try:
            return attempt(fn, timeout)
        except Exception as error:
            last = error
            if i < retries:
                time.sleep(RETRY_WAIT * 2**i)
    frames = traceback.extract_tb(last.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames and not isinstance(last, TimeoutError) else ""
    raise RewardFailure(
        f"reward function {name} failed {retries + 1} times: {type(last).__name__}: {last}{where}; mend it, or set "
        "reward.on_failure skip"
    ) from last


def call_reward(
    fn: Callable[..., Any],
    prompts: list[str],
    responses: list[str],
    columns: dict[str, list[Any]],
    *,
    timeout: float,
    retries: int,
) -> np.ndarray:
    """float32[B] from fn(prompts, responses, **columns), within `timeout` seconds (0: any) and so many retries.

    Raises:
        RewardFailure: it raised or ran out of time.
        UserError: not one finite number per response.
    """
    name = getattr(fn, "__name__", None) or getattr(getattr(fn, "func", None), "__name__", None) or repr(fn)
    try:
        inspect.signature(fn).bind(prompts, responses, **columns)
    except TypeError as error:
        raise UserError(f"reward function {name}: {error}; define it as fn(prompts, responses, **columns)") from error
    rewards = persist(name, lambda: fn(prompts, responses, **columns), timeout=timeout, retries=retries)
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


def of_own_rows(
    score: Callable[..., np.ndarray],
    mesh: Mesh,
    prompts: list[str],
    responses: list[str],
    columns: dict[str, list[Any]],
) -> np.ndarray:
    """float32[B] from score(prompts, responses, columns); of several processes, each asks for rows of its own.

    Raises:
        RewardFailure: it failed in any process.
        UserError: it raised one in any process.
    """
    if not several():
        return score(prompts, responses, columns)
    own = own_rows(mesh, len(prompts))
    chosen = np.flatnonzero(own)
    found, wrong = np.zeros(len(prompts), np.float32), None
    mine = [[values[i] for i in chosen] for values in (prompts, responses, *columns.values())]
    try:
        found[own] = score(mine[0], mine[1], dict(zip(columns, mine[2:], strict=True))) if len(chosen) else []
    except Exception as error:  # the others wait for an answer
        wrong = error
    failed, broken = any_of([isinstance(wrong, RewardFailure), wrong is not None])
    if wrong is not None:
        raise wrong
    if broken:
        kind = RewardFailure if failed else UserError
        raise kind("the reward function failed in another process, whose output says why")
    return multihost_utils.process_allgather(found).sum(axis=0, dtype=np.float32)  # one process has each row


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
        parts = [
            w * call_reward(fn, prompts, responses, columns, timeout=config.timeout, retries=config.retries)
            for fn, w in zip(found, weights, strict=True)
        ]
        return np.stack(parts).sum(axis=0, dtype=np.float32)

    return total
