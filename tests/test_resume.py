"""Laws of a run that is stopped, killed or hurt: it continues as if nothing had happened, or says what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAST
from disk import fails
from test_cli import call, here, home, refused  # noqa: F401 (fixtures)
from test_ppo_stage import fakes, one_device  # noqa: F401
from tiny import TOY_ROWS, bigram_params, toy_run

from rlhf_jax import cli
from rlhf_jax.config import ALWAYS_MAY_CHANGE, MAY_CHANGE, MeshConfig, PPOArgs, RewardSourceConfig, SFTArgs
from rlhf_jax.config.functions import flat, replace
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.hosts import attempts
from rlhf_jax.inference import reward_functions
from rlhf_jax.inference.reward_functions import RewardFailure, call_reward
from rlhf_jax.ppo import train
from rlhf_jax.runs import checkpoint, directory
from rlhf_jax.runs.listing import resume
from rlhf_jax.runs.log import Log
from rlhf_jax.runs.run import Run
from rlhf_jax.sharding import make_mesh
from rlhf_jax.training.loop import run_steps
from rlhf_jax.training.nans import first_nan
from rlhf_jax.training.state import create_state, digest, learning_rates, make_optimizer, make_schedule
from rlhf_jax.training.step import make_train_step

STEPS = 12
RNG = np.random.default_rng(0)
DATA = [RNG.normal(size=(8, 24)).astype(np.float32) for _ in range(STEPS)]
HELD_OUT = RNG.normal(size=(8, 24)).astype(np.float32)


class Rows:
    """Batches by step, which remember what they were asked for; those that are `bad` are `spoilt` times as large."""

    def __init__(self, bad=(), spoilt=np.nan):
        self.asked, self.bad, self.spoilt = [], set(bad), spoilt

    def __getitem__(self, step):
        self.asked.append(step)
        return {"x": DATA[step] * (self.spoilt if step in self.bad else 1), "tokens": np.zeros(8, np.int32)}


def squares(params, batch, key):
    noise = jax.random.normal(key, batch["x"].shape)
    logits = (batch["x"] + 0.1 * noise) @ params["head"]["kernel"].T
    return jnp.mean((logits - batch["x"][:, :16]) ** 2), {}


def settings(path: Path, *, log_every=1, eval_every=4, **kwargs) -> SFTArgs:
    config = replace(SFTArgs(), run__output_dir=str(path), run__progress=False, run__log_every=log_every)
    config = replace(config, run__eval_every=eval_every, optim__warmup_steps=3, optim__learning_rate=0.05)
    return replace(config, **kwargs)


def held_out_loss(kernel) -> float:
    return float(np.mean((HELD_OUT @ kernel.T) ** 2))


def run_fit(
    config: SFTArgs,
    *,
    devices=8,
    batches=None,
    before_step=lambda out, i: None,
    total=STEPS,
    loss=squares,
    measure=held_out_loss,
):
    """A stage without models: `run_steps` on a matrix; returns the final state and the kept parameters."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:devices])
    schedule = make_schedule(config.optim, total)
    tx = make_optimizer(config.optim, schedule)
    batches = batches or Rows()
    with jax.set_mesh(mesh.grid), Run("sft", config, total=total) as out:
        state = create_state({"head": {"kernel": jnp.asarray(bigram_params(0)["policy"]["head"]["kernel"])}}, tx, mesh)
        compiled = make_train_step(loss, tx, mesh=mesh, state=state)
        tree, _ = out.restore({"state": state}, {"training rows": {"seed": 0}})
        out.skips.rows_of = lambda i: [f"rows.jsonl:{i}"]

        def step(state, batch, key):
            before_step(out, int(np.asarray(state.step)))
            return compiled(state, batch, key)

        def evaluate(at, params):
            return {} if measure is None else {"eval/total": measure(np.asarray(params["head"]["kernel"]))}

        key = jax.random.key(0)
        state = run_steps(
            out, step, tree["state"], batches, key, mesh=mesh, rates=learning_rates(schedule),
            evaluate=evaluate, explain=partial(first_nan, jax.grad(lambda p, b, k: loss(p, b, k)[0])),
        )  # fmt: skip
        final = jax.device_get(state)
        best = jax.device_get(out.restore_best({"state": {"params": state.params}})["state"]["params"])
        out.finish({})
    return final, best


def rows_of(path: Path, name: str = "metrics.jsonl") -> list[dict]:
    rows = [json.loads(line) for line in (path / name).read_text().splitlines()]
    return [{n: v for n, v in row.items() if not n.startswith("time/")} for row in rows]


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def signal_at(*steps):
    """Ctrl-C while these steps run."""

    def send(out, i):
        if i in steps:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    return send


def statuses(path: Path) -> str:
    return directory.read_record(path)["status"]


# --- continuing


@pytest.mark.parametrize("changes", [{}, {"log_every": 3}, {"eval_every": 0}, {"checkpoint__every": 2}])
def test_a_run_stopped_twice_ends_as_one_left_alone_bit_by_bit(tmp_path, changes, capsys):
    alone = run_fit(settings(tmp_path / "alone", **changes))
    config = settings(tmp_path / "stopped", **changes)
    for at in (2, 6):
        with pytest.raises(
            Stopped, match=rf"^sft: stopped by SIGINT after step {at + 1} of 12 and saved; continue "
        ) as stopped:
            run_fit(config, before_step=signal_at(at))
        assert stopped.value.code == 0 and statuses(tmp_path / "stopped") == "stopped"
    batches = Rows()
    assert same_bits(run_fit(config, batches=batches), alone)
    assert batches.asked == list(range(7, STEPS))
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "alone")
    assert statuses(tmp_path / "stopped") == "finished" and not (tmp_path / "stopped" / "checkpoints").exists()
    assert "SIGINT: finishing the step and saving; a second one stops at once" in capsys.readouterr().out


class Killed(BaseException):
    """Stands in for kill -9 where the process must live on."""


def kill_at(step):
    def kill(out, i):
        if i == step:
            out.checkpoints.wait()
            out.metrics._pending = None  # what was not written is lost
            raise Killed

    return kill


@pytest.mark.parametrize("at", [1, 4, 5, 8, 11])
def test_a_run_killed_at_any_step_goes_back_to_its_checkpoint_and_writes_no_line_twice(tmp_path, at):
    alone = run_fit(settings(tmp_path / "alone", checkpoint__every=3))
    config = settings(tmp_path / "killed", checkpoint__every=3)
    with pytest.raises(Killed):
        run_fit(config, before_step=kill_at(at))
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "loss/to')  # a line cut short
    assert same_bits(run_fit(config), alone)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "alone")


def test_the_same_data_in_the_same_order_and_losses_within_rounding_on_8_then_4_then_2_devices(tmp_path):
    run_fit(settings(tmp_path / "alone"))
    config, batches = settings(tmp_path / "moved"), Rows()
    for devices, at in ((8, 3), (4, 7), (2, None)):
        before_step = signal_at(at) if at else lambda out, i: None
        try:
            run_fit(config, devices=devices, batches=batches, before_step=before_step)
        except Stopped:
            assert at
    assert batches.asked == list(range(STEPS))
    for row, other in zip(rows_of(tmp_path / "moved"), rows_of(tmp_path / "alone"), strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert value == pytest.approx(other[name], rel=1e-5), name


def test_a_finished_run_is_not_run_again_but_gives_its_summary(tmp_path, capsys):
    config = settings(tmp_path / "run")
    run_fit(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    summary = directory.check_output_dir("sft", config)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text()) and summary["best_step"] > 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "is finished" in capsys.readouterr().out


def test_more_steps_continue_a_finished_run_that_kept_its_checkpoints_and_what_is_changed_is_said(tmp_path, capsys):
    constant = {"checkpoint__keep_finished": True, "optim__schedule": "constant"}
    config = settings(tmp_path / "run", sft__steps=8, **constant)
    run_fit(config, total=8)
    batches = Rows()
    more = replace(config, sft__steps=STEPS, checkpoint__allow_changes=True)
    assert directory.check_output_dir("sft", more) is None
    last, _ = run_fit(more, batches=batches)
    assert batches.asked == list(range(8, STEPS))
    assert f"run: continuing after step 8 of {STEPS}, sft.steps {STEPS} in place of 8\n" in capsys.readouterr().out
    alone, _ = run_fit(settings(tmp_path / "alone", **constant))
    assert same_bits(last, alone)


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_lost(tmp_path):
    config = settings(tmp_path / "run", sft__steps=8)
    with pytest.raises(Stopped):
        run_fit(config, total=8, before_step=signal_at(4))
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    fewer = replace(config, sft__steps=3, checkpoint__allow_changes=True)
    with pytest.raises(
        UserError, match=r"has done 5 steps, more than the 3 that are asked for; ask for as many or more"
    ):
        run_fit(fewer, total=3)
    files.pop(tmp_path / "run" / directory.LOCK)
    assert all(path.read_bytes() == held for path, held in files.items())
    run_fit(replace(fewer, sft__steps=5), total=5)
    assert [row["step"] for row in rows_of(tmp_path / "run") if "loss/total" in row] == [1, 2, 3, 4, 5]


def test_without_its_checkpoints_a_finished_run_refuses_more_steps(tmp_path):
    config = settings(tmp_path / "run", sft__steps=8)
    run_fit(config, total=8)
    for allowed in (True, False):  # one step, whatever else would be asked for
        with pytest.raises(UserError, match=r"is finished and its checkpoints are gone; .* --model.path \S+/model --"):
            directory.check_output_dir("sft", replace(config, sft__steps=9, checkpoint__allow_changes=allowed))


def test_a_run_killed_before_its_first_checkpoint_starts_anew_and_overwrite_always_does(tmp_path, capsys):
    config = settings(tmp_path / "run", checkpoint__minutes=0.0, eval_every=0)
    with pytest.raises(Killed):
        run_fit(config, before_step=kill_at(5))
    batches = Rows()
    run_fit(config, batches=batches)
    assert batches.asked[0] == 0 and [row["step"] for row in rows_of(tmp_path / "run")][:STEPS] == [
        *range(1, STEPS + 1)
    ]
    assert "no checkpoint, starting anew" in capsys.readouterr().out
    batches = Rows()
    run_fit(replace(config, run__overwrite=True), batches=batches)
    assert batches.asked[0] == 0


def test_without_held_out_rows_nothing_is_evaluated_and_the_last_weights_are_kept(tmp_path):
    last, kept = run_fit(settings(tmp_path / "run", eval_every=2), measure=None)
    assert same_bits(last.params, kept)
    assert not any(name.startswith("eval/") for row in rows_of(tmp_path / "run") for name in row)
    assert "best_step" not in json.loads((tmp_path / "run" / "summary.json").read_text())


def test_other_data_is_not_continued_with(tmp_path):
    config = settings(tmp_path / "run")
    with pytest.raises(Stopped):
        run_fit(config, before_step=signal_at(2))
    with Run("sft", config, total=STEPS) as out, pytest.raises(UserError, match=r"the training rows are not those"):
        out.restore({}, {"training rows": {"seed": 1}})


def test_the_digest_of_a_model_sees_one_bit_and_a_swap_but_no_mesh():
    params = bigram_params(0)
    first = digest(params)
    assert digest(jax.tree.map(jnp.copy, params)) == first and digest(None) is None
    kernel = params["policy"]["head"]["kernel"]
    for changed in (
        kernel.at[3, 5].set(jnp.nextafter(kernel[3, 5], 9)),
        kernel[::-1],
        kernel.at[:, 0].set(-kernel[:, 0]),
    ):
        assert digest({**params, "policy": {**params["policy"], "head": {"kernel": changed}}}) != first
    mesh = make_mesh(MeshConfig(tensor=8, data=1))
    where = jax.sharding.NamedSharding(mesh.grid, jax.sharding.PartitionSpec(None, "tensor"))
    assert digest(jax.device_put(kernel, where)) == digest(kernel)


# --- the best evaluation


def test_the_best_weights_come_from_its_checkpoint_and_survive_a_stop(tmp_path):
    """The held-out loss here rises with training, so the first evaluation is the best."""
    config = settings(tmp_path / "run", eval_every=2, checkpoint__every=1, checkpoint__keep_last=1)
    grown = replace(config, optim__learning_rate=0.5)
    _, alone = run_fit(replace(grown, run__output_dir=str(tmp_path / "alone")))
    summary = json.loads((tmp_path / "alone" / "summary.json").read_text())
    values = {row["step"]: row["eval/total"] for row in rows_of(tmp_path / "alone") if "eval/total" in row}
    assert summary["best_step"] == min(values, key=values.get) < STEPS
    assert held_out_loss(alone["head"]["kernel"]) == pytest.approx(min(values.values()), rel=1e-6)
    with pytest.raises(Stopped):
        run_fit(grown, before_step=signal_at(9))
    _, best = run_fit(grown)
    assert same_bits(best, alone)


def test_damaged_best_weights_are_said_and_never_taken(tmp_path, capsys):
    config = settings(tmp_path / "run", eval_every=2, checkpoint__every=1, optim__learning_rate=0.5)

    def harm(out, i):
        if i == STEPS - 1:
            out.checkpoints.wait()
            for path in out.checkpoints.path(out.best.step).rglob("*"):
                if path.is_file():
                    path.write_bytes(path.read_bytes()[:-1])

    last, best = run_fit(config, before_step=harm)
    assert same_bits(last.params, best)
    out = capsys.readouterr().out
    assert "is damaged: " in out and "the weights of the best evaluation, of step 2, are lost" in out


def test_a_reward_that_fails_in_another_process_fails_here(monkeypatch):
    monkeypatch.setattr(reward_functions, "several", lambda: True)
    monkeypatch.setattr(reward_functions, "own_rows", lambda mesh, count: np.arange(count) < 1)
    monkeypatch.setattr(reward_functions, "any_of", lambda flags: [True, True])
    with pytest.raises(RewardFailure, match="failed in another process"):
        reward_functions.of_own_rows(lambda *_: np.ones(1), None, ["a", "b"], ["c", "d"], {"id": [1, 2]})


# --- configs


def sections(cls) -> list[str]:
    return [name for name, _ in flat(directory.plain(cls()))]


STAGES = ("sft", "reward", "dpo", "kto", "rrhf", "ppo", "grpo", "rloo", "reinforce_pp", "distill", "rejection")


def test_every_setting_that_may_change_exists():
    known = {name for stage in (*STAGES, "recipe", "collect") for name in sections(cli.COMMANDS[stage].args)}
    for name in (*MAY_CHANGE, *ALWAYS_MAY_CHANGE):
        assert name in known or any(other.startswith(name) for other in known if name.endswith("."))


def other_value(value):
    return {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, str: lambda v: v + "x",
            list: lambda v: [*v, 1], type(None): lambda v: {"width": 8}}[type(value)](value)  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_changed_setting_is_refused_by_name_unless_it_is_safe_and_that_is_allowed(tmp_path, stage):
    cls = cli.COMMANDS[stage].args
    config = replace(cls(), run__output_dir=str(tmp_path))
    record = {"stage": stage, "status": "stopped", "config": directory.plain(config)}
    directory.check_same(stage, config, record)
    allowing = replace(config, checkpoint__allow_changes=True)
    for name in sections(cls):
        parts, then = name.split("."), json.loads(json.dumps(record))
        group = then["config"]
        for part in parts[:-1]:
            group = group[part]
        now = group[parts[-1]]
        group[parts[-1]] = other_value(now)
        if name in ALWAYS_MAY_CHANGE:
            directory.check_same(stage, config, then)
            continue
        with pytest.raises(UserError, match=rf"another config: {re.escape(name)}[ .]") as error:
            directory.check_same(stage, config, then)
        safe = name in MAY_CHANGE or f"{parts[0]}." in MAY_CHANGE
        assert (
            f"{'nothing' if now is None else now} here" in str(error.value)
            and ("allow_changes" in str(error.value)) == safe
        )
        if safe:
            directory.check_same(stage, allowing, then)
        else:
            with pytest.raises(UserError, match=r"this cannot change within a run"):
                directory.check_same(stage, allowing, then)


def test_every_changed_setting_is_named_and_another_stage_refused(tmp_path):
    config = settings(tmp_path)
    record = {
        "stage": "sft",
        "status": "stopped",
        "config": directory.plain(replace(config, run__seed=3, data__path="a")),
    }
    with pytest.raises(UserError, match=r": run.seed 3 there, 0 here; this cannot change"):
        directory.check_same("sft", config, record)
    with pytest.raises(UserError, match=r"holds a run of sft, not of reward; choose another directory"):
        directory.check_same("reward", config, record)


# --- faults of the numbers


def test_after_so_many_updates_that_are_not_finite_the_run_stops_with_step_rows_and_checkpoint(tmp_path):
    config = settings(tmp_path / "run", faults__max_skipped=3, checkpoint__every=2)
    with pytest.raises(UserError) as error:
        run_fit(config, batches=Rows(bad=[1, 4, 5, 6, 7]))
    line = str(error.value)
    assert line.startswith("step 7: loss or gradient was not finite in 3 steps in a row (faults.max_skipped); ")
    assert "rows rows.jsonl:6; the last checkpoint before is of step 4; " in line and "\n" not in line
    assert statuses(tmp_path / "run") == "failed"
    lines = rows_of(tmp_path / "run")
    assert [row["optim/skipped"] for row in lines if "optim/skipped" in row] == [0, 1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("log_every", [1, 3])
def test_the_count_of_skipped_updates_is_kept_over_a_stop(tmp_path, log_every):
    config = settings(tmp_path / "run", faults__max_skipped=3, log_every=log_every)
    bad = Rows(bad=[0, 4, 5, 6])
    with pytest.raises(Stopped):
        run_fit(config, batches=bad, before_step=signal_at(5))
    with pytest.raises(UserError, match=r"step 7: .* in 3 steps in a row"):
        run_fit(config, batches=bad)
    never = replace(config, faults__max_skipped=0, checkpoint__allow_changes=True)
    run_fit(never, batches=bad)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped"] == 4


@pytest.mark.parametrize("log_every", [1, 3])
def test_steps_without_gradient_are_counted_over_a_stop_after_which_all_is_as_if_there_had_been_none(
    tmp_path, log_every
):
    def loss(params, batch, key):
        return squares(params, batch, key)[0] * batch["x"].any(), {}

    empty = lambda: Rows(bad=[1, 4, 5, 9], spoilt=0.0)  # noqa: E731
    alone, stopped = (settings(tmp_path / name, log_every=log_every) for name in ("alone", "stopped"))
    wanted = run_fit(alone, batches=empty(), loss=loss)
    with pytest.raises(Stopped):
        run_fit(stopped, batches=empty(), loss=loss, before_step=signal_at(4))
    assert same_bits(run_fit(stopped, batches=empty(), loss=loss), wanted)
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "alone")
    for name in ("alone", "stopped"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert (summary["skipped"], summary["empty"]) == (0, 4)
        assert any("4 updates had a gradient of 0 and changed nothing" in line for line in summary["remarks"])


def logs(params, batch, key):
    values = jax.lax.scan(jax.checkpoint(lambda c, x: (c, jnp.log(x))), 0.0, batch["x"])[1]
    return jnp.sum(values * params["head"]["kernel"].sum()), {}


def test_debug_nans_names_the_first_operation_and_its_line(tmp_path):
    config = settings(tmp_path / "run", faults__debug_nans=True)
    with pytest.raises(UserError) as error:
        run_fit(config, loss=logs)
    line = logs.__code__.co_firstlineno + 1
    found = rf"^step 1: the first NaN came from log in \S+ at {re.escape(__file__)}:{line}; rows rows.jsonl:0$"
    assert re.search(found, str(error.value))


def test_an_overflow_without_a_nan_is_told_apart():
    assert first_nan(lambda x: jnp.exp(x), jnp.float32(1e3)).startswith("no operation made a NaN")


# --- faults of the disk


def fail_saves(*steps):
    def fail(out, i):
        if i in steps:
            out.checkpoints.wait()
            out.checkpoints.failure = (i, "No space left on device")

    return fail


def test_a_save_that_fails_is_said_and_training_continues(tmp_path, capsys):
    alone = run_fit(settings(tmp_path / "alone", checkpoint__every=2))
    assert same_bits(run_fit(settings(tmp_path / "run", checkpoint__every=2), before_step=fail_saves(7)), alone)
    found = re.findall(
        r"sft: the checkpoint of step 7 could not be written \(No space left on device\); .*", capsys.readouterr().out
    )
    assert found == [
        "sft: the checkpoint of step 7 could not be written (No space left on device); the one of step 6 is intact; "
        "training continues"
    ]
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "alone")


def test_a_save_that_fails_stops_the_run_if_so_configured_and_it_continues_later(tmp_path):
    alone = run_fit(settings(tmp_path / "alone", checkpoint__every=2))
    config = settings(tmp_path / "run", checkpoint__every=2, checkpoint__on_failure="stop")
    with pytest.raises(UserError, match=r"step 7 could not be written .*; the one of step 6 is intact; free space or"):
        run_fit(config, before_step=fail_saves(7))
    assert same_bits(run_fit(config), alone)


def test_a_signal_whose_save_fails_is_an_error_not_a_promise(tmp_path, monkeypatch):
    config = settings(tmp_path / "run", eval_every=0)

    def refuse(self, step, tree, record):
        self.last, self.failure = step, (step, "No space left on device")

    monkeypatch.setattr("rlhf_jax.runs.checkpoint.Checkpoints.save", refuse)
    with pytest.raises(
        UserError, match=r"step 4 could not be written \(No space left on device\); there is none before"
    ):
        run_fit(config, before_step=signal_at(3))


def test_an_evaluation_whose_save_failed_is_not_the_best(tmp_path, monkeypatch):
    """The losses 1 (not saved), 3, 2, 4, 5, 6: the third evaluation is the best one that is on disk."""
    config, losses = settings(tmp_path / "run", eval_every=2), iter([1.0, 3.0, 2.0, 4.0, 5.0, 6.0])
    save = Run._save

    def failing(self, step, tree, notes):
        if step == 2:
            self.checkpoints.failure, self.checkpoints.last = (2, "No space left on device"), 2
        else:
            save(self, step, tree, notes)

    monkeypatch.setattr(Run, "_save", failing)
    run_fit(config, measure=lambda kernel: next(losses))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_step"] == 6


def test_lines_that_a_full_disk_refuses_come_with_the_next_ones_whole_and_in_order(tmp_path, monkeypatch):
    log = Log(tmp_path / "metrics.jsonl")
    log.begin(None)
    log.add([{"step": 1}])
    with monkeypatch.context() as patch:
        fails(patch, "write", {1, 3}, of="metrics.jsonl")
        for step in (2, 3):
            with pytest.raises(OSError, match="No space left"):
                log.add([{"step": step}])
    assert log.path.read_text() == '{"step": 1}\n' and log.count == 3
    log.add([{"step": 4}])
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_metrics_that_cannot_be_written_follow_the_same_setting(tmp_path, monkeypatch, capsys, on_failure):
    config = settings(tmp_path / "run", checkpoint__on_failure=on_failure)
    fails(monkeypatch, "write", {5, 7, 9}, of="metrics.jsonl")
    if on_failure == "stop":
        with pytest.raises(UserError, match=r"metrics.jsonl could not be written \(No space left on device\); free"):
            run_fit(config)
    else:
        run_fit(config)
        assert capsys.readouterr().out.count("could not be written") == 1
        monkeypatch.undo()
        run_fit(settings(tmp_path / "alone"))
        assert rows_of(tmp_path / "run") == rows_of(tmp_path / "alone")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("write: No space left on device")]
)
def test_a_disk_that_is_full_at_the_end_is_one_line_and_the_run_continues_later(tmp_path, monkeypatch, error):
    """The models are written by others, which raise errors of their own."""
    alone = run_fit(settings(tmp_path / "alone", checkpoint__every=4))
    config = settings(tmp_path / "run", checkpoint__every=4)

    def full(self, like):
        raise error

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"run: No space left on device; mend that, then"),
    ):
        patch.setattr(Run, "restore_best", full)
        run_fit(config)
    assert statuses(tmp_path / "run") == "failed"
    assert same_bits(run_fit(config), alone)


def test_a_run_whose_model_cannot_be_written_trains_no_step_again(tmp_path, capsys):
    """Nothing was saved on the way: the end is, once it cannot write what comes after it."""
    alone, config, taken = run_fit(settings(tmp_path / "alone")), settings(tmp_path / "run"), []
    lines = rows_of(tmp_path / "alone")

    def full(self, *rest):
        raise OSError(28, "No space left on device")

    for name in ("restore_best", "finish"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"No space left .* resume"):
            patch.setattr(Run, name, full)
            run_fit(config, before_step=lambda out, i: taken.append(i))
        assert taken == list(range(STEPS)) and statuses(tmp_path / "run") == "failed"
    assert capsys.readouterr().out.count(f"saved after step {STEPS} of {STEPS}") == 1
    assert same_bits(run_fit(config, before_step=lambda out, i: taken.append(i)), alone)
    assert taken == list(range(STEPS)) and rows_of(tmp_path / "run") == lines
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("devices", [1, 8])
def test_nor_does_one_whose_best_weights_are_not_the_last(tmp_path, capsys, devices):
    """The last ones were given up for them; they are kept on the host until the model is written."""
    worse = {"measure": lambda kernel: -held_out_loss(kernel), "devices": devices}
    alone, config, taken = run_fit(settings(tmp_path / "alone"), **worse), settings(tmp_path / "run"), []
    worse["before_step"] = lambda out, i: taken.append(i)

    def full(self, *rest):
        raise OSError(28, "No space left on device")

    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"No space left .* resume"):
            patch.setattr(Run, "finish", full)
            run_fit(config, **worse)
        assert taken == list(range(STEPS)) and statuses(tmp_path / "run") == "failed"
    assert capsys.readouterr().out.count(f"saved after step {STEPS} of {STEPS}") == 1
    assert same_bits(run_fit(config, **worse), alone) and not same_bits(alone[0].params, alone[1])
    assert taken == list(range(STEPS)) and rows_of(tmp_path / "run") == rows_of(tmp_path / "alone")


# --- rewards


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(attempts, "RETRY_WAIT", 0.0)


NAN = float("nan")
PROMPTS = ["a", "b"]


def test_a_reward_that_raises_is_tried_again(at_once):
    calls = []

    def shaky(prompts, responses):
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("busy")
        return [1.0, 2.0]

    assert call_reward(shaky, PROMPTS, PROMPTS, {}, timeout=9, retries=2).tolist() == [1.0, 2.0] and len(calls) == 3
    del calls[:]
    with pytest.raises(RewardFailure) as error:
        call_reward(shaky, PROMPTS, PROMPTS, {}, timeout=9, retries=1)
    line = shaky.__code__.co_firstlineno + 3
    assert str(error.value).startswith(
        f"reward function shaky failed 2 times: ConnectionError: busy at {__file__}:{line}"
    )


def test_a_reward_that_hangs_is_left_behind(at_once):
    calls = []

    def slow(prompts, responses):
        calls.append(1)
        time.sleep(30 if len(calls) == 1 else 0)
        return [1.0, 2.0]

    began = time.time()
    assert call_reward(slow, PROMPTS, PROMPTS, {}, timeout=0.2, retries=1).tolist() == [1.0, 2.0]
    del calls[:]
    with pytest.raises(
        RewardFailure, match=r"slow failed 1 times: TimeoutError: no answer in 0.2 s \(reward.timeout\)"
    ):
        call_reward(slow, PROMPTS, PROMPTS, {}, timeout=0.2, retries=0)
    assert time.time() - began < 5


def test_without_a_timeout_a_reward_runs_in_the_main_thread(at_once):
    import threading

    seen = []
    noting = lambda prompts, responses: seen.append(threading.current_thread()) or [0.0, 0.0]  # noqa: E731
    call_reward(noting, PROMPTS, PROMPTS, {}, timeout=0, retries=0)
    assert seen == [threading.main_thread()]


def flaky(calls: set[int], returns: float | None = None):
    """A reward that raises, or `returns` this, at these calls (0 is the evaluation before the first iteration)."""
    count = iter(range(10**6))

    def reward(prompts, responses, **columns):
        fails = next(count) in calls
        if fails and returns is None:
            raise RuntimeError("the judge is down")
        return [returns if fails else 0.5] * len(prompts)

    return reward


def ppo_config(path: Path, on_failure: str) -> PPOArgs:
    config = replace(toy_run(path, reward_model=False), reward=RewardSourceConfig(on_failure=on_failure, retries=0))
    return replace(config, checkpoint__keep_finished=True)


def test_a_batch_whose_reward_fails_is_skipped_and_counted(fakes, at_once, tmp_path):  # noqa: F811
    summary = train.run(ppo_config(tmp_path / "run", "skip"), reward_functions=[flaky({2, 6})], **TOY_ROWS)
    lines = rows_of(tmp_path / "run")
    assert [row["step"] for row in lines if row.get("rollout/skipped")] == [2]
    assert [row["step"] for row in lines if "rollout/reward" in row] == [1, 3, 4]
    assert [row["step"] for row in lines if "eval/reward" in row] == [0, 2]  # call 6 was the last evaluation
    assert summary["iterations"] == 4
    assert len([what for what, *_ in fakes if what == "update"]) == 3


WHERE = {5: ("iteration 4", 3), 3: ("evaluation after iteration 2", 2), 6: ("evaluation after iteration 4", 4)}


@pytest.mark.parametrize(("failing", "returns"), [(5, None), (3, None), (6, None), (5, NAN), (3, NAN)])
def test_a_reward_that_fails_stops_the_run_saved_and_it_continues_without_a_gap(
    fakes,  # noqa: F811
    at_once,
    tmp_path,
    failing,
    returns,
):
    """What is no number is never skipped; an evaluation that failed is made when the run goes on."""
    config, (where, saved) = ppo_config(tmp_path / "run", "stop" if returns is None else "skip"), WHERE[failing]
    with pytest.raises(UserError) as error:
        train.run(config, reward_functions=[flaky({failing}, returns)], **TOY_ROWS)
    what = "failed 1 times: RuntimeError: the judge is down" if returns is None else "returned nan for response 0"
    assert str(error.value).startswith(f"{where}: reward function reward {what}")
    assert "continue by the same call again (reward_functions, rows, eval_rows came from Python)" in str(error.value)
    assert (tmp_path / "run" / "checkpoints" / f"{saved:08}").is_dir()
    train.run(config, reward_functions=[flaky(set())], **TOY_ROWS)
    train.run(ppo_config(tmp_path / "alone", "stop"), reward_functions=[flaky(set())], **TOY_ROWS)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [row["step"] for row in rows_of(tmp_path / "alone")]
    with pytest.raises(UserError, match=r"got reward_functions, rows, eval_rows from Python, which no file holds"):
        resume(str(tmp_path / "run"), [])


# --- the command line


def test_resume_names_what_is_missing(refused, tmp_path):  # noqa: F811
    assert refused("resume") == "resume needs a run directory; write rlhf-jax resume RUN_DIR"
    assert refused("resume", tmp_path).startswith(f"{tmp_path} holds no run (run.json is missing or broken)")
    assert refused("runs", tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} is no directory; write rlhf-jax runs DIR"


HOLD = """
import sys, time
from pathlib import Path
from rlhf_jax.runs import checkpoint, directory
file = directory.claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_runs_lists_stage_status_step_and_metrics_without_jax(tmp_path):
    config = settings(tmp_path)
    for name, status in (("a", "finished"), ("b/c", "stopped"), ("d", "running"), ("e", "running"), ("f", "failed")):
        path = tmp_path / name
        path.mkdir(parents=True)
        record = {"stage": "sft", "status": status, "step": 4, "total": 9, "config": directory.plain(config)}
        directory.write_record(path, record)
        (path / "metrics.jsonl").write_text(
            '{"step": 5, "loss/nll": 2.5}\n{"step": 6, "eval/total": 3.25}\n3\n[1]\n{"ste'
        )
    broken = tmp_path / "g"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    shutil.copytree(tmp_path / "f", tmp_path / "h")
    (tmp_path / "h" / "run.json").write_text(json.dumps(record | {"total": "many"}))
    assert directory.read_record(tmp_path / "h") is None  # broken, and nothing else says what it was
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "d")], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        listing = f"c.main(['runs', {str(tmp_path)!r}])"
        code = f"import sys, rlhf_jax.cli as c\ntry: {listing}\nfinally: print('jax' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        with pytest.raises(UserError, match=rf"is being written by process {process.pid} on "):
            directory.check_output_dir("sft", replace(config, run__output_dir=str(tmp_path / "d")))
        with pytest.raises(UserError, match=r"is being written by process"):
            directory.claim(tmp_path / "d")
        process.kill()
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    rows = {Path(row.split()[0]).name: row.split() for row in done.stdout.splitlines()[1:-1]}
    expected = {"a": "finished", "c": "stopped", "d": "running", "e": "crashed", "f": "failed"}
    assert {name: row[2] for name, row in rows.items() if name not in "gh"} == expected
    assert rows["a"][1] == "sft" and rows["a"][3] == "6/9" and "nll 2.5, total 3.25" in " ".join(rows["a"])
    assert rows["g"][2] == "unreadable"
    directory.claim(tmp_path / "d").close()  # the dead hold nothing


SIGNALS = """
import os, signal
import jax
from rlhf_jax import losses
from rlhf_jax.runs import checkpoint

def now(phase):  # once the run listens: before, it tries the loss on numbers of its own
    if os.environ["PHASE"] == phase and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        os.environ["PHASE"] = ""
        os.kill(os.getpid(), signal.SIGTERM)

def reward(prompts, responses, **columns):
    return [float(len(r)) / 10 for r in responses]

def policy_loss(logprobs, old_logprobs, advantages, weights, *, clip_ratio,
                clip_ratio_high, max_log_ratio, dual_clip):
    now("compile")
    jax.debug.callback(lambda: now("update"))
    return losses.clipped_policy_loss(logprobs, old_logprobs, advantages, weights, clip_ratio=clip_ratio,
                                      clip_ratio_high=clip_ratio_high, max_log_ratio=max_log_ratio,
                                      dual_clip=dual_clip)

write_manifest = checkpoint.write_manifest

def slowly(directory, number):
    now("save")
    write_manifest(directory, number)

checkpoint.write_manifest = slowly
"""
STOPPED = re.compile(r"ppo: stopped by SIGTERM after step (\d+) of 9 and saved; continue with: rlhf-jax resume \S*out")


@pytest.mark.slow
def test_sigterm_while_a_run_compiles_updates_and_saves_ends_as_if_it_had_not_come(
    here,  # noqa: F811
    call,  # noqa: F811
    monkeypatch,
    one_device,  # noqa: F811
):
    (here / "signals.py").write_text(SIGNALS)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr(checkpoint, "write_manifest", checkpoint.write_manifest)  # as it was, afterwards
    options = [
        "--reward.functions", "[signals:reward]", "--ppo.policy_loss", "signals:policy_loss", "--ppo.iterations", "9",
        "--run.progress", "false", "--checkpoint.every", "2", "--run.eval_every", "3",
    ]  # fmt: skip

    def run(phase, *arguments):
        monkeypatch.setenv("PHASE", phase)
        code, out, err = call(*arguments)
        assert code == 0, err
        return out.splitlines()

    run("", "ppo", "--config", "ppo.yaml", *options, "--run.output_dir", "alone")
    steps = []
    command = ["ppo", "--config", "ppo.yaml", *options]
    for phase in ("compile", "update", "save"):
        lines = run(phase, *command)
        found = STOPPED.fullmatch(lines[-1])
        assert found, lines
        steps.append(int(found.group(1)))
        assert any(line.startswith("SIGTERM: finishing the step and saving") for line in lines)
        command = ["resume", "out"]
    assert steps == sorted(set(steps)) and steps[-1] < 9
    run("", "ppo", "--config", "ppo.yaml", *options)  # the same command resumes too
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows_of(here / "out", name) == rows_of(here / "alone", name)
    weights = "model/model.safetensors"
    assert (here / "out" / weights).read_bytes() == (here / "alone" / weights).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_a_run_ends_the_process_with_a_line(here, number):  # noqa: F811
    """While a fork's own module is imported, of all the moments in which no loop listens."""
    (here / "signals.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n")
    command = [
        sys.executable,
        "-m",
        "rlhf_jax",
        "ppo",
        "--config",
        "ppo.yaml",
        "--reward.functions",
        "[signals:reward]",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    by = " by SIGTERM" if number == signal.SIGTERM else ""
    assert (done.returncode, done.stderr) == (128 + number, f"rlhf-jax: interrupted{by}\n")
    assert not (here / "out").exists()


INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
from rlhf_jax.hosts import files
from rlhf_jax.hosts.interrupts import own_process

class Left:
    def __del__(self):  # from which Python lets no exception out
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)

def main():
    if sys.argv[1] == "error":
        return 7
    with files.replacing(Path("model")) as new:
        (new / "part").write_text("x" * 9)
        Left()

own_process(main)
"""


def test_what_was_being_written_goes_with_an_interrupted_process_and_errors_leave_at_once(tmp_path):
    for way, code, err in (("write", 130, "rlhf-jax: interrupted\n"), ("error", 7, "")):
        command = [sys.executable, "-c", INTERRUPTED, way]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (code, err)
        assert list(tmp_path.iterdir()) == []


def test_what_fails_since_an_interrupted_process_deletes_its_files_says_nothing():
    code = """if 1:
        import threading, time
        from rlhf_jax import cli
        from rlhf_jax.hosts import interrupts
        interrupts.clear = lambda: time.sleep(0.5)
        threading.Thread(target=interrupts.end, args=(2,)).start()
        time.sleep(0.1)
        cli.fail("error: No such file", 2)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "rlhf-jax: interrupted\n")


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_the_run_resumes(here):  # noqa: F811
    run = [
        "sft",
        "--config",
        "sft.yaml",
        "--sft.steps",
        "1000000",
        "--sft.num_samples",
        "0",
        "--run.progress",
        "false",
    ]
    env = {**os.environ, "XLA_FLAGS": FAST}
    metrics = here / "out" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf_jax", *run], stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        deadline = time.time() + 120
        while not metrics.exists():  # the first step still compiles
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    assert err.splitlines() == (["rlhf-jax: interrupted"] if process.returncode else []) or err.split() == [
        "rlhf-jax:", "interrupted"
    ]  # fmt: skip
    assert (here / "out" / "run.json").exists()


@pytest.mark.slow
def test_three_kills_change_no_bit_of_an_online_stage(tmp_path):
    root = Path(cli.__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks.crash", "--kills", "3", "--steps", "20", "--keep", str(tmp_path)]
    command += ["--stages", "ppo_lora"]
    env = {**os.environ, "XLA_FLAGS": FAST}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [outcome] = [json.loads(line) for line in done.stdout.splitlines() if '"equal"' in line]
    assert outcome["equal"] and outcome["kills"] == 3 and outcome["arrays"] > 20
