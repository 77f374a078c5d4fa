"""Rewards from Python functions.

A function gets the same in every command and stage: `prompts`, the texts that the model is shown, with what the chat
template writes (`Tokenizer.prompt_text`); `responses`, the texts that it wrote (`Tokenizer.response_text`); and as
columns the other fields of the prompts' rows (None in a row that lacks one). Where prompts are messages, a function
that takes it gets `messages` too: their list, or None beside a text.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.config import RewardSourceConfig, resolve
from rlhf_jax.data.messages import turns_of
from rlhf_jax.data.numbers import float_of
from rlhf_jax.errors import UserError, reason, shown
from rlhf_jax.hosts.attempts import Failed, persist
from rlhf_jax.hosts.processes import any_of, several
from rlhf_jax.sharding import Mesh, own_rows


class RewardFailure(UserError):
    """A reward function raised or ran out of time in every attempt."""


def name_of(fn: Callable[..., Any]) -> str:
    """What messages call a function."""
    return getattr(fn, "__name__", None) or getattr(getattr(fn, "func", None), "__name__", None) or shown(fn)


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

    Every attempt gets copies of its own, and what it returns, lazily perhaps, becomes numbers within its time.

    Raises:
        RewardFailure: it raised or ran out of time.
        UserError: not one number per response that float32 holds.
    """
    name, columns = name_of(fn), dict(_asked(fn, columns))
    check_call(fn, columns)

    def call() -> tuple[np.ndarray, str]:
        own = copy.deepcopy((prompts, responses, columns))
        return as_rewards(fn(own[0], own[1], **own[2]), len(responses))

    try:
        found, wrong = persist(call, timeout=timeout, retries=retries, limit="reward.timeout")
    except Failed as failure:
        last = failure.__cause__ or failure
        frames = traceback.extract_tb((last.__cause__ or last).__traceback__)
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        raise RewardFailure(
            f"reward function {name} failed {retries + 1} times: {type(last).__name__}: {reason(last)}"
            f"{'' if isinstance(last, TimeoutError) else place}; mend it, or set reward.on_failure skip"
        ) from last
    if wrong:
        raise UserError(f"reward function {name} returned {wrong}")
    return found


def as_rewards(returned: Any, count: int) -> tuple[np.ndarray, str]:
    """(float32[count], "") of a list, generator, array or tensor of numbers; what is wrong with it in words else.

    Numbers are those of Python (fractions and decimals too) and what array libraries call so, of any dtype.
    """
    nothing = np.zeros(0, np.float32)
    if isinstance(returned, (str, bytes, bytearray, Mapping, Set)) or not isinstance(returned, Iterable):
        return nothing, f"{shown(returned)}; return a list, one number per response"
    if getattr(returned, "ndim", 1) != 1:
        return nothing, f"an array of {returned.ndim} dimensions; return a list, one number per response"  # type: ignore[attr-defined]
    values = list(itertools.islice(returned, count + 1))  # an endless generator ends here
    if len(values) != count:
        many = len(returned) if isinstance(returned, Sized) else len(values) if len(values) < count else "more"
        return nothing, f"{many} rewards for {count} responses; return one each"
    found = np.zeros(count, np.float32)
    for i, value in enumerate(values):
        number = float_of(value)
        if number is None:
            return nothing, f"{shown(value)} for response {i}; return a number"
        with np.errstate(over="ignore"):
            found[i] = number
        if not np.isfinite(found[i]):
            return nothing, f"{shown(value)} for response {i}; return a finite number that float32 holds"
    return found, ""


def check_call(fn: Callable[..., Any], columns: Iterable[str], where: str = "") -> None:
    """Raise a UserError unless fn(prompts, responses, **columns) is a call that fn takes; `where` is whose columns."""
    name, at = name_of(fn), where and f"{where}: "
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # of C code without one
        return
    taken, columns = _taken(fn), list(_asked(fn, columns))
    for column in columns:
        if column in taken:
            raise UserError(
                f'{at}the column "{column}" has the name of an argument that reward function {name} gets already; '
                f"rename one of them, the column by data.fields"
            )
    try:
        signature.bind([], [], **{name: [] for name in columns})
    except TypeError as error:
        raise UserError(
            f"{at}reward function {name}: {error}; define it as fn(prompts, responses, **columns)"
        ) from error


def _asked(fn: Callable[..., Any], columns: Any) -> Any:
    """Columns without `messages`, which is ours and no field of a row, for a function that does not ask for it."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # of C code without one
        return columns
    if "messages" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return columns
    left = [name for name in columns if name != "messages"]
    return {name: columns[name] for name in left} if isinstance(columns, Mapping) else left


def columns_for(
    functions: Sequence[Callable[..., Any]],
    prompts: Sequence[Any],
    columns: Sequence[Mapping[str, Any]],
    where: Sequence[str],
) -> list[dict[str, Any]]:
    """What functions get of each row of a data set as columns: the fields of any row, and perhaps `messages`.

    So a function gets the same columns in every batch; a row that lacks one, which no function needs, has None there.

    `prompts` are texts or messages, `columns` the other fields of their rows, `where` the rows' places.

    Raises:
        UserError: a row has a field `messages` where prompts are messages, or a function does not take its columns.
    """
    if any(not isinstance(prompt, str) for prompt in prompts):
        for row, place in zip(columns, where, strict=True):
            if "messages" in row:
                raise UserError(
                    f'{place}: the field "messages" has the name by which reward functions get a prompt of messages; '
                    "rename it by data.fields"
                )
        said = [None if isinstance(prompt, str) else turns_of(prompt) for prompt in prompts]
        columns = [{**row, "messages": turns} for row, turns in zip(columns, said, strict=True)]
    for fn in functions:
        check_columns(fn, columns, where)
    names = dict.fromkeys(name for row in columns for name in row)
    return [{name: row.get(name) for name in names} for row in columns]


def check_columns(fn: Callable[..., Any], columns: Sequence[Mapping[str, Any]], where: Sequence[str]) -> None:
    """Raise a UserError, with its place, for the first row whose columns fn does not take, or that lacks one it needs.

    Args:
        fn: a reward function.
        columns: of each row, name -> value.
        where: each row's place.
    """
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # of C code without one
        return
    passed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in list(parameters)[2:] if p.default is p.empty and p.kind in passed]
    taken = _taken(fn)
    for row, place in zip(columns, where, strict=True):
        lacks = next((name for name in needed if name not in row), None)
        if lacks is not None:
            raise UserError(
                f'{place}: no field "{lacks}", which reward function {name_of(fn)} asks for; give it to every row'
            )
        if not taken.isdisjoint(row):
            check_call(fn, row, place)
    places = {frozenset(row): place for row, place in zip(reversed(columns), reversed(where), strict=True)}
    for names, place in reversed(places.items()):  # in the order of the rows
        check_call(fn, names, place)


def _taken(fn: Any) -> set[str]:
    """Names of arguments that a column cannot pass: the first two, an object's own, and those a partial has chosen."""
    names = lambda of, count: set(list(inspect.signature(of).parameters)[:count])  # noqa: E731
    found = names(fn, 2)
    while isinstance(fn, functools.partial):
        found |= set(fn.keywords) | names(fn.func, len(fn.args))
        fn = fn.func
    if inspect.ismethod(fn):
        found |= names(fn.__func__, 1)
    elif not (inspect.isroutine(fn) or isinstance(fn, type)):
        found |= names(type(fn).__call__, 1)
    return found


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


def functions_of(
    config: RewardSourceConfig, functions: Sequence[Callable[..., Any]] | None
) -> list[Callable[..., Any]]:
    """The Python rewards: `functions`, which replace the config's names, or those."""
    return list(functions) if functions is not None else [resolve(name) for name in config.functions]


def combine(
    config: RewardSourceConfig, functions: Sequence[Callable[..., Any]] | None
) -> Callable[..., np.ndarray] | None:
    """(prompts, responses, columns) -> float32[B], the weighted sum of the Python rewards; None if there are none.

    `functions` replace the config's names. Raises UserError when the weights do not match the functions.
    """
    found = functions_of(config, functions)
    weights = config.function_weights or [1.0] * len(found)
    if len(weights) != len(found):
        raise UserError(
            f"reward.function_weights has {len(weights)} entries for {len(found)} functions; give one each, or none"
        )
    if not found:
        return None

    def total(prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> np.ndarray:
        calls: dict[str, Any] = {"timeout": config.timeout, "retries": config.retries}
        parts = [call_reward(fn, prompts, responses, columns, **calls) for fn in found]
        with np.errstate(over="ignore", invalid="ignore"):
            weighted = [w * part for w, part in zip(weights, parts, strict=True)]
            rewards = np.stack(weighted).sum(axis=0, dtype=np.float32)
        if not np.isfinite(rewards).all():
            raise UserError(f"reward.function_weights {weights} make rewards that float32 does not hold; lower them")
        return rewards

    return total
