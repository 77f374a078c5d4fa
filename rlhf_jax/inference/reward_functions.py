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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set, Sized
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.config import RewardSourceConfig, resolve
from rlhf_jax.data.messages import Messages, turns_of
from rlhf_jax.data.numbers import LARGEST, float_of, merged
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, reason, shown, tell
from rlhf_jax.hosts.attempts import Failed, persist
from rlhf_jax.hosts.processes import any_of, several
from rlhf_jax.sharding import Mesh, own_rows
from rlhf_jax.types import RewardFn

Columns = dict[str, list[Any]]
"""What a function gets beside prompts and responses: name -> a value for each row."""

ScoreFn = Callable[[list[str], list[str], Columns], np.ndarray]
"""(prompts, responses, columns) -> float[B]."""


class RewardFailure(UserError):
    """A reward function raised or ran out of time in every attempt."""


class WrongRewards(UserError):
    """A reward function gave not one number per response: a mistake that leaving out a batch does not mend."""


class NoRewards(Exception):
    """What a function returned is not one number per response; the text says what it is."""


def function_name(fn: RewardFn) -> str:
    """What messages call a function."""
    return getattr(fn, "__name__", None) or getattr(getattr(fn, "func", None), "__name__", None) or shown(fn)


def call_reward(
    fn: RewardFn, prompts: list[str], responses: list[str], columns: Columns, *, timeout: float, retries: int
) -> np.ndarray:
    """float64[B] from fn(prompts, responses, **columns), within `timeout` seconds (0: any) and so many retries.

    Every attempt gets copies of its own, and what it returns, lazily perhaps, becomes numbers within its time.

    Raises:
        RewardFailure: it raised or ran out of time.
        WrongRewards: it gave not one number per response that float32 holds.
        UserError: it raised one.
    """
    check_call(fn, columns)
    name, columns = function_name(fn), {column: columns[column] for column in _asked(fn, columns)}

    def call() -> np.ndarray:
        own_prompts, own_responses, own_columns = copy.deepcopy((prompts, responses, columns))
        return as_rewards(fn(own_prompts, own_responses, **own_columns), len(responses))

    try:
        return persist(call, timeout=timeout, retries=retries, limit="reward.timeout", final=(NoRewards, UserError))
    except NoRewards as wrong:
        raise WrongRewards(f"reward function {name} returned {wrong}") from None
    except Failed as failure:
        last = failure.__cause__ or failure
        frames = traceback.extract_tb((last.__cause__ or last).__traceback__)
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        raise RewardFailure(
            f"reward function {name} failed {retries + 1} times: {type(last).__name__}: {reason(last)}"
            f"{'' if isinstance(last, TimeoutError) else place}; mend it, or set reward.on_failure skip"
        ) from last


def as_rewards(returned: object, count: int) -> np.ndarray:
    """float64[count] of a list, generator, array or tensor of numbers, each of a size that float32 holds.

    Numbers are those of Python (fractions and decimals too) and what array libraries call so, of any dtype.

    Raises:
        NoRewards: it is something else.
    """
    if isinstance(returned, (str, bytes, bytearray, Mapping, Set)) or not isinstance(returned, Iterable):
        raise NoRewards(f"{shown(returned)}; return a list, one number per response")
    if (dimensions := getattr(returned, "ndim", 1)) != 1:
        raise NoRewards(f"an array of {dimensions} dimensions; return a list, one number per response")
    values = list(itertools.islice(returned, count + 1))  # an endless generator ends here
    if len(values) != count:
        many = len(returned) if isinstance(returned, Sized) else len(values) if len(values) < count else "more"
        raise NoRewards(f"{many} rewards for {count} responses; return one each")
    rewards = np.zeros(count)
    for i, value in enumerate(values):
        number = float_of(value)
        if number is None:
            raise NoRewards(f"{shown(value)} for response {i}; return a number")
        if not abs(number) <= LARGEST:
            raise NoRewards(f"{shown(value)} for response {i}; return a finite number that float32 holds")
        rewards[i] = number
    return rewards


def columns_for(
    functions: Sequence[RewardFn],
    prompts: Sequence[str | Messages],
    columns: Sequence[Mapping[str, Any]],
    where: Sequence[str],
) -> list[Row]:
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
    kinds: dict[frozenset[str], tuple[Collection[str], str]] = {}  # names of columns -> the first row that has these
    for row, place in zip(columns, where, strict=True):
        kinds.setdefault(frozenset(row), (row, place))
    for fn in functions:
        for fields, place in kinds.values():
            check_call(fn, fields, place)
    names = dict.fromkeys(name for row in columns for name in row)
    return [{name: row.get(name) for name in names} for row in columns]


def check_call(fn: RewardFn, columns: Collection[str], where: str = "") -> None:
    """Raise a UserError unless fn takes the call fn(prompts, responses, **columns); `where` is the place of a row."""
    signature = _signature(fn)
    if signature is None:
        return
    name, at, asked, taken = function_name(fn), where and f"{where}: ", _asked(fn, columns), _taken(fn)
    for p in list(signature.parameters.values())[2:]:
        needed = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if where and needed and p.name not in columns:
            raise UserError(f'{at}no field "{p.name}", which reward function {name} asks for; give it to every row')
    for column in asked:
        if column in taken:
            raise UserError(
                f'{at}the column "{column}" has the name of an argument that reward function {name} gets already; '
                f"rename one of them, the column by data.fields"
            )
    try:
        signature.bind([], [], **{column: [] for column in asked})
    except TypeError as error:
        raise _unfit(fn, error, at) from error


def _unfit(fn: RewardFn, error: TypeError, at: str = "") -> UserError:
    """Says that a function cannot be called as rewards are."""
    return UserError(
        f"{at}reward function {function_name(fn)}: {error}; define it as fn(prompts, responses, **columns)"
    )


def _signature(fn: RewardFn) -> inspect.Signature | None:
    """How a function is called; None of C code that does not say."""
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return None


def _asked(fn: RewardFn, columns: Iterable[str]) -> list[str]:
    """Columns without `messages`, which is ours and no field of a row, for a function that does not ask for it."""
    signature = _signature(fn)
    parameters = signature.parameters.values() if signature else []
    asks = not signature or any(p.name == "messages" or p.kind is p.VAR_KEYWORD for p in parameters)
    return [column for column in columns if asks or column != "messages"]


def _taken(fn: Callable[..., object]) -> set[str]:
    """Names of arguments that a column cannot pass: the first two, an object's own, and those a partial has chosen."""
    names = lambda of, count: set(list(inspect.signature(of).parameters)[:count])  # noqa: E731
    taken = names(fn, 2)
    while isinstance(fn, functools.partial):
        taken |= set(fn.keywords) | names(fn.func, len(fn.args))
        fn = fn.func
    if inspect.ismethod(fn):
        taken |= names(fn.__func__, 1)
    elif not (inspect.isroutine(fn) or isinstance(fn, type)):
        taken |= names(type(fn).__call__, 1)
    return taken


def of_own_rows(
    score: ScoreFn,
    mesh: Mesh,
    prompts: list[str],
    responses: list[str],
    columns: Columns,
    *,
    wanted: np.ndarray | None = None,
    everywhere: bool = False,
) -> np.ndarray:
    """float32[B] from score(prompts, responses, columns), of several processes each for rows of its own.

    Rows that are not `wanted`, bool[B], are not asked for and get 0. What computes on the devices of all processes is
    asked for all rows `everywhere`.

    Raises:
        RewardFailure, WrongRewards: in any process.
        UserError: it raised one in any process.
    """
    wanted = np.ones(len(prompts), bool) if wanted is None else wanted
    apart = several() and not everywhere
    if not several() and wanted.all():
        return score(prompts, responses, columns)
    own = wanted & own_rows(mesh, len(prompts)) if apart else wanted
    chosen = np.flatnonzero(own)
    scores, wrong = np.zeros(len(prompts), np.float32), None
    mine = [[values[i] for i in chosen] for values in (prompts, responses, *columns.values())]
    try:
        scores[own] = score(mine[0], mine[1], dict(zip(columns, mine[2:], strict=True))) if len(chosen) else []
    except Exception as error:  # the others wait for an answer
        wrong = error
    kinds = RewardFailure, WrongRewards
    *failed, broken = any_of([*(isinstance(wrong, kind) for kind in kinds), wrong is not None])
    if wrong is not None:
        raise wrong
    if broken:
        kind = next((kind for kind, there in zip(kinds, failed, strict=True) if there), UserError)
        raise kind("the reward function failed in another process, whose output says why")
    if not apart:
        return scores
    return multihost_utils.process_allgather(scores).sum(axis=0, dtype=np.float32)  # one process has each row


def functions_of(config: RewardSourceConfig, functions: Sequence[RewardFn] | None) -> list[RewardFn]:
    """The Python rewards: `functions`, which replace the config's names, or those.

    Raises:
        UserError: one that does not take prompts and responses; `columns_for` knows what it gets beside them.
    """
    found = list(functions) if functions is not None else [resolve(name) for name in config.functions]
    for fn, signature in ((fn, _signature(fn)) for fn in found):
        try:
            _ = signature and signature.bind_partial([], [])
        except TypeError as error:
            raise _unfit(fn, error) from error
    return found


def combine(config: RewardSourceConfig, functions: Sequence[RewardFn] | None) -> ScoreFn | None:
    """The weighted sum of the Python rewards, float32[B]; None if there are none. `functions` replace the config's
    names. Where rewards that differ are one number in float32, a line says so, once.

    Raises:
        UserError: the weights do not match the functions.
    """
    rewards = functions_of(config, functions)
    weights = config.function_weights or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise UserError(
            f"reward.function_weights has {len(weights)} entries for {len(rewards)} functions; give one each, or none"
        )
    if not rewards:
        return None
    said: list[int] = []

    def total(prompts: list[str], responses: list[str], columns: Columns) -> np.ndarray:
        parts = [
            call_reward(fn, prompts, responses, columns, timeout=config.timeout, retries=config.retries)
            for fn in rewards
        ]
        exact = np.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum(axis=0)
        if not (abs(exact) <= LARGEST).all():
            raise WrongRewards(
                f"reward.function_weights {weights} make rewards that float32 does not hold; lower them"
            )
        if not said and (lost := merged(exact)):
            said.append(lost)
            tell(
                f"! {lost} of {len(exact)} rewards, up to {abs(exact).max():.10g}, differ from another by less than "
                "float32 can say, and are equal to it; subtract what they share, or scale the difference",
                error=True,
            )
        return exact.astype(np.float32)

    return total
