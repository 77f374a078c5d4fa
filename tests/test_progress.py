"""How far a run is, on a terminal and in a log."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pty
import queue
import re
import subprocess
import sys
import threading

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runs import outcome, parts, progress
from rlhf_jax.runs.metrics import on_bar
from rlhf_jax.runs.progress import Progress

BAR = """
import fcntl, struct, sys, termios
fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
from rlhf_jax.runs.progress import Progress, write
bar = Progress("rloo", 10000, 9990, bar=True, say=None)
write("a line above")
bar.update(7)
bar.values({"reward": -12.345, "gold": 0.123, "kl": 0.000123, "tok/s": 12345.0})
bar.doing("evaluating")
bar.close()
"""


def test_on_80_columns_the_bar_keeps_its_numbers_and_a_line_does_not_collide_with_it():
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", BAR], stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # which is the end of a terminal
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", said.decode()) if line.strip()]
    assert "a line above" in lines and all(len(line) <= 80 for line in lines)
    (full,) = (line for line in lines if "tok/s" in line and "9997" in line)
    assert all(
        part in full for part in ("rloo 9997/10000", "reward -12.3", "gold 0.123", "kl 0.000123", "tok/s 12.3k")
    )
    assert "evaluating" in lines[-1]


def test_the_bar_tells_a_held_out_number_from_that_of_the_step():
    shown = ("loss/nll", "eval/nll", "reward_model/accuracy", "eval/accuracy", "time/tokens_per_s")
    assert [on_bar(name) for name in shown] == ["nll", "eval nll", "accuracy", "eval accuracy", "tok/s"]


def test_in_a_notebook_there_is_a_bar_on_the_stream_of_the_lines_and_an_error_is_one_line(monkeypatch):
    said = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr("sys.stdout", said)
    bar = Progress("sft", 3, 0, bar=True, say=lambda line: pytest.fail(line))
    progress.write("a line above")
    bar.update(2)
    bar.values({"nll": 0.5})
    bar.close()
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", said.getvalue()) if line.strip()]
    assert "a line above" in lines and lines[-1].startswith("sft 2/3 ") and "nll 0.5" in lines[-1]
    assert UserError("lr is -1")._render_traceback_() == ["rlhf_jax: error: lr is -1"]  # IPython asks for this


@pytest.mark.parametrize("bar", [True, False])
def test_in_a_log_there_is_a_plain_line_now_and_then_and_no_fragment(monkeypatch, capfd, bar):
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    one = Progress("sft", 100, 10, bar=bar, say=said.append)
    one.values({"nll": 2.5})
    for i in range(90):
        now[0] += 31.0 if i == 0 else 1.0  # the first step compiles
        one.update()
        one.doing("evaluating")
    one.close()
    assert said == [
        "sft: 11 of 100, the first after 31 s, nll 2.5",
        "sft: 41 of 100, 1 s each, 00:59 left, nll 2.5",
        "sft: 71 of 100, 1 s each, 00:29 left, nll 2.5",
        "sft: 100 of 100, evaluating",
    ]
    assert capfd.readouterr() == ("", "")


def test_a_log_says_what_is_waited_for_before_the_first_step_and_not_once_nobody_waits(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.001)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    one = Progress("sft", 3, 0, bar=False, say=said.put)
    assert said.get().startswith("sft: 0 of 3, compiling, ")
    one.doing("evaluating")
    while not said.get().startswith("sft: 0 of 3, evaluating, "):
        pass
    waiting = [thread for thread in threading.enumerate() if thread.name.endswith("(_wait)")]
    del one
    gc.collect()
    for thread in waiting:
        thread.join()


def test_the_time_of_a_run_goes_to_what_the_devices_waited_for(monkeypatch):
    host, device = [0.0], [0.0]
    here = threading.get_ident()
    monkeypatch.setattr(
        parts.time, "perf_counter", lambda: host[0] if threading.get_ident() == here else max(device[0], host[0])
    )
    monkeypatch.setattr(parts.jax, "block_until_ready", lambda ready: device.__setitem__(0, ready))
    one = parts.Parts()
    one.start()
    for at, name, ready in [
        (1, "data", None),  # the devices had nothing to do
        (1, "rollout", 5.0),
        (2, "save", None),  # beside the rollout
        (2, "update", 8.0),
    ]:
        host[0] = at
        one.mark(name, ready)
    first = one.marked
    assert one.take(first) == {"data": 1, "rollout": 4, "save": 0, "update": 3}
    host[0] = 12  # the host was late
    one.mark("data")
    assert one.take(first) == {} and one.take(one.marked) == {"data": 4}
    assert one.shares() == "data 42%, rollout 33%, update 25%"
    one.close()


@pytest.mark.parametrize(
    "steps, said",
    [
        (
            [{"group/equal_fraction": 1.0, "optim/grad_norm": 0.1, "rollout/reward_std": 0.3}] * 2,
            "every advantage was 0",
        ),
        ([{"group/equal_fraction": 1.0}, {"group/equal_fraction": 0.9, "optim/grad_norm": 0.1}], ""),
        ([{"rollout/reward_std": 0.0, "optim/grad_norm": 0.1}, {"eval/reward": 0.0}], "all responses had one"),
        ([{"optim/grad_norm": 0.0, "optim/lr": 1e-3}, {"optim/grad_norm": float("nan")}], "gradient was 0"),
        ([{"optim/grad_norm": 0.0}, {"optim/grad_norm": 1e-9}], ""),
        ([{"optim/grad_norm": 1.0, "optim/lr": 0.0}], "learning rate was 0"),
        ([], ""),
    ],
)
def test_a_run_that_had_nothing_to_learn_says_so(steps, said):
    extremes = {}
    for metrics in steps:
        extremes = outcome.widened(extremes, metrics)
    remarks = outcome.nothing_learned(extremes)
    assert len(remarks) == bool(said) and all(said in remark for remark in remarks)


@pytest.mark.parametrize(
    "last, best, said",
    [
        ({"eval/reward": 1.0, "eval/kl": 0.0, "optim/lr": 1.0}, 0, "equals the one before training"),
        ({"eval/reward": 0.9, "eval/kl": 0.5}, 0, "the one before training: no later evaluation"),
        ({"eval/reward": 1.1, "eval/kl": 0.5}, 3, ""),
        ({"eval/reward": 1.1, "eval/kl": 0.5}, None, ""),
    ],
)
def test_a_policy_that_is_no_better_says_so(last, best, said):
    remarks = outcome.not_better({"eval/reward": 1.0, "eval/kl": 0.0, "eval/reward_se": float("nan")}, last, best)
    assert len(remarks) == bool(said) and all(said in remark for remark in remarks)
    assert outcome.not_better({}, {}, None) == []  # no evaluation
