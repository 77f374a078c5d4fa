"""Python rewards: what they may return, what they are given, and whatever they do instead is one failure."""

from __future__ import annotations

import functools
import itertools
import sys
import time
from decimal import Decimal
from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rlhf_jax.config import RewardSourceConfig
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import attempts
from rlhf_jax.inference.reward_functions import RewardFailure, call_reward, columns_for, combine

PROMPTS, RESPONSES = ["p", "q"], ["r", "s"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(attempts, "RETRY_WAIT", 0.0)


def rewards(returned, **options):
    """What becomes of a returned value; a callable makes it anew in each attempt."""
    fn = returned if callable(returned) else lambda prompts, responses: returned
    return call_reward(fn, PROMPTS, RESPONSES, {}, **{"timeout": 9, "retries": 0, **options})


class Scalar:
    """As scalars of other array libraries are."""

    ndim = 0

    def item(self):
        return 2

    def __float__(self):
        return 2.0


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2],
        (1.0, 2.0),
        lambda p, r: (x for x in (1, 2)),
        lambda p, r: iter([1, 2]),
        {"a": 1, "b": 2}.values(),
        range(1, 3),
        [Fraction(1), Decimal("2")],
        [np.array(1.0), jnp.array(2)],
        [True, Scalar()],
        [np.longdouble(1), np.uint8(2)],
        np.array([1, 2], object),
        np.array([1, 2], ml_dtypes.bfloat16),
        list(np.array([1, 2], ml_dtypes.float8_e4m3fn)),
        jnp.array([1, 2], jnp.bfloat16),
        jnp.array([1, 2], jnp.int8),
    ],
)
def test_numbers_of_any_kind_are_rewards(returned):
    found = rewards(returned)
    assert found.dtype == np.float64 and found.tolist() == [1.0, 2.0]


def test_tensors_of_torch_are_rewards():
    torch = pytest.importorskip("torch")
    for options in ({"dtype": torch.bfloat16}, {"requires_grad": True}, {"dtype": torch.uint8}):
        kept = {"dtype": torch.float32, **options}
        assert rewards(torch.tensor([1, 2], **kept)).tolist() == [1.0, 2.0]
        assert rewards([torch.tensor(1, **kept), torch.tensor(2, **kept)]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ({1, 2}, "{1, 2}; return a list"),
        ({"a": 1, "b": 2}, "return a list"),
        ("12", "'12'; return a list"),
        (b"12", "return a list"),
        (1.0, "1.0; return a list"),
        (np.array(1.0), "an array of 0 dimensions"),
        (np.ones((2, 1)), "an array of 2 dimensions"),
        ([[1], [2]], r"\[1\] for response 0"),
        ([np.ones(1), 2], r"array\(\[1.\]\) for response 0"),
        ([1, "2"], "'2' for response 1"),
        ([1, None], "None for response 1"),
        ([1, 1j], "1j for response 1"),
        ([1, np.datetime64("2020")], "for response 1; return a number"),
        ([1], "1 rewards for 2"),
        (np.ones(3), "3 rewards for 2"),
        (lambda p, r: itertools.count(), "more rewards for 2"),
        ([1, float("nan")], "nan for response 1; return a finite"),
        ([1, -float("inf")], "-inf for response 1"),
        ([1e39, 1], r"1e\+39 for response 0; return a finite number that float32 holds"),
        ([1, 10**400], "for response 1; return a finite"),
        ([Decimal("1e999"), 1], "for response 0; return a finite"),
        (["x" * 30_000, 1], "for response 0"),
    ],
)
def test_all_else_is_named_in_one_line_and_not_tried_again(returned, words):
    calls = []

    def mine(prompts, responses):
        calls.append(1)
        return returned(prompts, responses) if callable(returned) else returned

    with pytest.raises(UserError, match=f"^reward function mine returned .*{words}") as error:
        rewards(mine, retries=3)
    assert len(str(error.value)) < 600 and len(calls) == 1 and not isinstance(error.value, RewardFailure)


def deep(prompts, responses):
    return deep(prompts, responses)


def lazy(prompts, responses):
    yield 1.0
    raise ConnectionError("late")


def drip(prompts, responses):
    yield 1.0
    time.sleep(9)
    yield 2.0


def ending(prompts, responses):
    sys.exit("enough")


def interrupted(prompts, responses):
    raise KeyboardInterrupt


def exhausted(prompts, responses):
    raise MemoryError


class Mute(Exception):
    def __str__(self):
        raise RuntimeError


def mute(prompts, responses):
    raise Mute


def long(prompts, responses):
    raise ValueError("\x1b[31m" + "x" * 20_000)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (deep, "RecursionError"),
        (lazy, "ConnectionError: late at .*test_rewards.py"),
        (drip, "TimeoutError: no answer in 0.5 s"),
        (ending, "ended the program .SystemExit enough"),
        (interrupted, "ended the program .KeyboardInterrupt"),
        (exhausted, "MemoryError"),
        (mute, "Mute"),
        (long, r"ValueError: \\x1b\[31mxxx"),
    ],
)
def test_whatever_a_reward_does_instead_is_a_failure(fn, why):
    with pytest.raises(RewardFailure, match=f"failed 2 times: .*{why}") as error:
        rewards(fn, timeout=0.5, retries=1)
    assert len(str(error.value)) < 600 and str(error.value).isprintable()


def test_exiting_is_a_failure_in_the_main_thread_too_but_ctrl_c_is_not():
    with pytest.raises(RewardFailure, match="SystemExit"):
        rewards(ending, timeout=0)
    with pytest.raises(KeyboardInterrupt):
        rewards(interrupted, timeout=0)


def test_inputs_are_copies_in_every_attempt():
    kept = []

    def greedy(prompts, responses, tags):
        seen = (list(prompts), list(responses), [list(tag) for tag in tags])
        prompts.clear()
        responses[0] = "changed"
        tags[0].append("changed")
        kept.append((tags, seen))
        if len(kept) == 1:
            raise OSError("once more")
        return [1.0, 2.0]

    given = (list(PROMPTS), list(RESPONSES), {"tags": [["a"], []]})
    total = combine(RewardSourceConfig(retries=1, function_weights=[1.0, 1.0]), [greedy, greedy])
    assert total(*given).tolist() == [2.0, 4.0]
    assert given == (PROMPTS, RESPONSES, {"tags": [["a"], []]})
    assert all(seen == (PROMPTS, RESPONSES, [["a"], []]) for _, seen in kept) and len(kept) == 3


@pytest.mark.parametrize(
    ("rewards", "lost"),
    [
        ([1700000001.0, 1700000000.0, 1700000002.0, 1.7e9], 2),
        ([1e6, 1e6 + 0.01, 5.0, 5.0], 1),
        ([1e6, 1e6 + 0.5, 0.3, 0.1 + 0.2], 0),
        ([0.1, 0.1, 1e-7, 2e-7], 0),
    ],
)
def test_rewards_that_differ_by_less_than_float32_can_say_are_counted_once(rewards, lost, capsys):
    total = combine(RewardSourceConfig(), [lambda prompts, responses: rewards])
    found = [total(["p"] * 4, ["r"] * 4, {}) for _ in range(2)]
    np.testing.assert_array_equal(found, [np.float32(rewards)] * 2)
    assert capsys.readouterr().err.count(f"! {lost} of 4 rewards, ") == bool(lost)


def test_what_functions_share_goes_before_float32_rounds():
    """Each rounded by itself, 1.7e9 + x less 1.7e9 was 0 for every x up to 64."""
    stamps = [lambda prompts, responses: [1.7e9 + 0.25, 1.7e9 + 31], lambda prompts, responses: [1.7e9, 1.7e9]]
    total = combine(RewardSourceConfig(function_weights=[1.0, -1.0]), stamps)
    assert total(PROMPTS, RESPONSES, {}).tolist() == [0.25, 31.0]


def test_a_weighted_sum_beyond_float32_is_refused():
    total = combine(RewardSourceConfig(function_weights=[1e18]), [lambda prompts, responses: [1e30, 0.0]])
    with pytest.raises(UserError, match="float32 does not hold"):
        total(PROMPTS, RESPONSES, {})


class Object:
    def __call__(self, prompts, responses, **columns):
        return [0.0] * len(prompts)

    def method(me, prompts, responses, **columns):
        return [0.0] * len(prompts)


def plain(prompts, responses, **columns):
    return [0.0] * len(prompts)


def other_names(queries, answers, **columns):
    return [0.0] * len(queries)


def chosen(scale, prompts, responses, bias=0, **columns):
    return [scale + bias] * len(prompts)


@pytest.mark.parametrize(
    ("fn", "column"),
    [
        (plain, "prompts"),
        (plain, "responses"),
        (other_names, "queries"),
        (Object(), "self"),
        (Object().method, "me"),
        (functools.partial(chosen, 2.0), "scale"),
        (functools.partial(chosen, 2.0, bias=1), "bias"),
        (functools.partial(functools.partial(chosen, 2.0), bias=1), "prompts"),
    ],
)
def test_a_column_that_clashes_with_an_argument_is_named_with_its_row(fn, column):
    rows, where = [{"id": 1}, {"id": 2, column: 3}], ["a.jsonl:1", "a.jsonl:2"]
    with pytest.raises(UserError, match=f'^a.jsonl:2: the column "{column}" has the name of an argument'):
        columns_for([fn], PROMPTS, rows, where)
    with pytest.raises(UserError, match=f'^the column "{column}"'):
        call_reward(fn, PROMPTS, RESPONSES, {column: [1, 2]}, timeout=9, retries=0)


@pytest.mark.parametrize("fn", [plain, Object(), Object().method, functools.partial(chosen, 2.0), max])
def test_other_columns_are_taken(fn):
    columns_for([fn], PROMPTS, [{"id": 1, "answer": 2}, {"id": 1}], ["a", "b"])


def test_a_column_that_is_asked_for_is_in_every_row():
    asking = lambda prompts, responses, answer, *, unit, hint="", **columns: [0.0] * len(prompts)  # noqa: E731
    whole = {"answer": 1, "unit": 2}
    columns_for([asking], PROMPTS, [whole, whole], ["a", "b"])
    for lacks in whole:
        row = {name: 1 for name in whole if name != lacks}
        with pytest.raises(UserError, match=f'^rows.jsonl:7: no field "{lacks}", which reward function'):
            columns_for([asking], PROMPTS, [whole, row], ["rows.jsonl:6", "rows.jsonl:7"])
