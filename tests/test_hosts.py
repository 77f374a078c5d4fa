"""Two processes with four devices each are one program with eight."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from buckets import Bucket, served
from conftest import FAST
from safetensors.numpy import load_file

from benchmarks import crash
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import processes
from rlhf_jax.hosts.processes import GIVEN, LOST, glob, initialize

MESHES = {"sft": {"data": 1, "fsdp": 8}, "reward": {"data": 8}, "ppo": {"data": 2, "fsdp": 2, "tensor": 2}}
MAIN = "from rlhf_jax import __main__, hosts; hosts.HEARTBEAT_SECONDS = 10; __main__.main()"
TIMEOUT = 240


# With STOP_AT=N the last process gets a SIGTERM after step N, which the thread that takes it may notice late. With
# KILL_AT=N it waits after step N, and is killed once its part of that checkpoint is there, before it says so.
STOP = """
import os, signal, time
from rlhf_jax.runs import pieces, twin
from rlhf_jax.runs.run import Run
look, write = Run.save_if_due, pieces.buckets.write
def stop(run, step, *saved):
    if str(step) == os.environ.get("STOP_AT") and os.environ["LAST"]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)
    look(run, step, *saved)
    if str(step) == os.environ.get("KILL_AT") and os.environ["LAST"]:
        time.sleep(1000.0)
def killed(url, data):
    if url.endswith(f"-of-{os.environ['KILL_AT']:0>8}.json"):
        time.sleep(1.0)  # in which process 0 could name the checkpoint
        os.kill(os.getpid(), signal.SIGKILL)
    write(url, data)
Run.save_if_due = stop
if "KILL_AT" in os.environ:
    twin.BEAT, twin.LIFETIME, twin.PASS, pieces.PASS = 1.0, 4.0, 0.3, 0.3
    pieces.buckets.write = killed
"""


def start(home, count, *arguments):
    """`rlhf-jax ...` on 8 fake devices in `count` processes, each with a directory for temporary files of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={8 // count} {FAST}"
    found = []
    for i in range(count):
        mine = home / f"tmp{i}"
        mine.mkdir(exist_ok=True)
        env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TMPDIR": str(mine)}
        env["LAST"] = "yes" if i == count - 1 else ""
        if count > 1:
            env |= dict(zip(GIVEN, (address, str(count), str(i)), strict=True))
        with open(home / f"log{i}.txt", "w") as log:
            found.append(
                subprocess.Popen([sys.executable, "-c", STOP + MAIN, *arguments], env=env, stdout=log, stderr=log)
            )
    return found


def codes(processes, home):
    """Exit codes; the processes' output is what a failing assert shows."""
    try:
        found = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return found, [(home / f"log{i}.txt").read_text() for i in range(len(processes))]


def settings(home, stage, steps):
    config = {**crash.settings(home, stage, steps), "mesh": MESHES[stage]}
    if stage == "ppo":  # rewards of Python functions, each process its own rows; rows are cut and go on
        gold = "rlhf_jax.tasks.random_walks:gold"
        config["sampling"] = {**config["sampling"], "budget": 4}
        config["reward"] = {**config["reward"], "functions": [gold], "gold": gold}
    path = home / f"{stage}_{steps}.yaml"
    path.write_text(yaml.safe_dump(config))
    return [stage, "--config", str(path)]


def run(home, count, stage, steps, name):
    found, logs = codes(start(home, count, *settings(home, stage, steps), "--run.output_dir", str(home / name)), home)
    assert found == [0] * count, logs
    return logs


def wait_for(directory, step, processes):
    deadline = time.monotonic() + TIMEOUT
    while crash.last_step(directory) < step:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def check_same(a, b):
    """Metrics within 1e-4 and parameters within 1e-5: sums over processes are added in another order."""
    for x, y in zip(lines(a), lines(b), strict=True):
        names = [name for name in x if not name.startswith("time/")]
        assert names == [name for name in y if not name.startswith("time/")]
        np.testing.assert_allclose([x[n] for n in names], [y[n] for n in names], rtol=1e-4, atol=1e-5)
    one, two = (load_file(d / "model" / "model.safetensors") for d in (a, b))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, and the models of one process that reward and ppo start from."""
    path = tmp_path_factory.mktemp("hosts")
    crash.prepare(path)
    run(path, 1, "sft", 6, "sft_alone")
    run(path, 1, "reward", 6, "reward_alone")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "ppo"])  # sft: by those that are stopped, below
def test_two_processes_give_what_one_gives(home, stage):
    if stage == "ppo":
        run(home, 1, "ppo", 6, "ppo_alone")
    logs = run(home, 2, stage, 6, f"{stage}_two")
    check_same(home / f"{stage}_alone", home / f"{stage}_two")
    assert "mesh" in logs[0] and "mesh" not in logs[1]  # the second process has nothing to say


@pytest.mark.slow
def test_a_signal_to_one_process_saves_all_and_another_number_of_them_continues(home):
    directory, steps, done = home / "sft_stopped", 40, 0
    run(home, 1, "sft", steps, "sft_whole")
    command = [*settings(home, "sft", steps), "--run.output_dir", str(directory)]
    for count in (2, 1):
        processes = start(home, count, *command)
        wait_for(directory, done + 3, processes)
        processes[-1].send_signal(signal.SIGTERM)
        found, logs = codes(processes, home)
        assert found == [0] * count, logs
        last, done = done, crash.last_step(directory)
        assert last + 3 <= done < steps, "it ended before the signal came"
        command = ["resume", str(directory)]
    found, logs = codes(start(home, 2, *command), home)
    assert found == [0, 0], logs
    check_same(home / "sft_whole", directory)


@pytest.mark.slow
def test_processes_that_share_nothing_but_a_bucket_are_stopped_or_killed_and_go_on_in_any_number(home, monkeypatch):
    if not (home / "ppo_alone").exists():
        run(home, 1, "ppo", 6, "ppo_alone")
    with served(Bucket(), monkeypatch) as bucket:
        of_the_run = ["--run.output_dir", "gs://bucket/ppo", "--run.exit_code_when_stopped", "75"]
        arguments = [*settings(home, "ppo", 6), *of_the_run, "--checkpoint.every", "2"]
        for count, stop, kill, begun in ((2, 2, None, 0), (2, None, 4, 2), (1, 4, None, 2), (2, None, None, 4)):
            monkeypatch.setenv("STOP_AT", str(stop))
            monkeypatch.setenv("KILL_AT", str(kill))
            found, logs = codes(start(home, count, *arguments), home)
            head = json.loads(bucket.objects["ppo/.run/head.json"][0])
            # What a process has written has its number in its name.
            writers = {name.split("-")[1] for name in bucket.objects if name.startswith("ppo/.run/0")}
            if kill:
                assert found[0] in (2, LOST) and found[1] == -signal.SIGKILL, logs
                assert "another one of the run" in logs[0].strip().splitlines()[-1], logs
                assert "ppo/.run/000002-001-" in "".join(bucket.objects), logs
                assert not [path for path in head["files"] if f"{kill:08d}" in path], logs
                left = set((home / "tmp1").glob("rlhf-jax-*"))  # by what was killed
                continue
            assert found == [75 if stop else 0] * count and head["holder"] == "", logs
            assert not begun or f"continuing after step {begun} of 6" in logs[0], logs
            if stop:
                assert writers == {"000", "001"} if stop == 2 else "000" in writers
                named = {part for parts in head["files"].values() for part, *_ in parts}
                assert named == {name[len("ppo/") :] for name in bucket.objects} - {".run/head.json"}
        for name, (data, _) in bucket.objects.items():
            (home / "bucket" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / "bucket" / name).write_bytes(data)
    check_same(home / "ppo_alone", home / "bucket" / "ppo")
    assert {path for i in range(2) for path in (home / f"tmp{i}").glob("rlhf-jax-*")} == left


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_a_clear_line(home):
    """The one that the others meet at; one of these is killed above."""
    processes = start(home, 2, *settings(home, "sft", 4000), "--run.output_dir", str(home / "sft_killed"))
    wait_for(home / "sft_killed", 3, processes)
    processes[0].kill()
    found, logs = codes(processes, home)
    assert found[0] == -signal.SIGKILL and found[1] in (2, LOST), logs
    last = logs[1].strip().splitlines()[-1]
    assert last.startswith("rlhf-jax: error: ") and "another one of the run" in last, logs


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (("", "2", ""), "JAX_COORDINATOR_ADDRESS is not set, but JAX_NUM_PROCESSES is"),
        (("localhost:1234", "2", "2"), "do not name a process"),
        (("localhost", "2", "0"), "do not name a process"),
        (("localhost:1234", "two", "0"), "do not name a process"),
    ],
)
def test_variables_that_name_no_process_are_refused(monkeypatch, values, line):
    for name, value in zip(GIVEN, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=line):
        initialize()


def test_one_process_does_not_look_for_others(monkeypatch):
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("it looked"))
    assert not initialize()


RECIPE = """
variables: {num: 64}
defaults: {mesh: {fsdp: 2}, run: {progress: false, eval_every: 0}}
stages:
- {name: task, command: data make, function: "rlhf_jax.tasks.random_walks:write", num: $num}
- command: sft
  model: {tokenizer: $task/tokenizer, arch: {vocab_size: 24, width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2,
    head_dim: 8, ffn_width: 32, max_positions: 32}}
  data: {path: $task/demonstrations.jsonl, eval_path: $task/held_out.jsonl, batch_size: 16, max_prompt_length: 2,
    max_length: 14}
  sft: {steps: 2, num_samples: 0}
- {command: sample, model: {path: $sft/model}, data_path: $task/prompts.jsonl, max_prompt_length: 2,
   sampling: {max_new_tokens: 4, chunk: 4}}
"""
COLLECT = "- {command: collect, model: {path: $sft/model}, data_path: $task/prompts.jsonl}\n"


@pytest.mark.slow
def test_two_processes_run_a_recipe_and_refuse_what_only_one_can(home):
    path, out = home / "recipe.yaml", home / "recipe"
    path.write_text(RECIPE + COLLECT)
    found, logs = codes(start(home, 2, "recipe", str(path), "--output_dir", str(out)), home)
    assert all(code != 0 for code in found) and not out.exists()
    assert any("stage collect: collect runs in one process only" in log for log in logs), logs
    path.write_text(RECIPE)
    found, logs = codes(start(home, 2, "recipe", str(path), "--output_dir", str(out)), home)
    assert found == [0, 0], logs
    record = json.loads((out / "recipe.json").read_text())
    assert [entry["status"] for entry in record.values()] == ["finished"] * 3
    assert (out / "sft" / "model" / "model.safetensors").exists()
    assert "[2/3] sft" in logs[0] and "[2/3] sft" not in logs[1]
    assert len((out / "sample.jsonl").read_text().splitlines()) == 64


@pytest.mark.parametrize(("found", "looks"), [
    ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, True), ({"SLURM_STEP_NODELIST": "n1"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True), ({"OMPI_COMM_WORLD_SIZE": "2", "JAX_NUM_PROCESSES": "1"}, False),
    ({}, False),
])  # fmt: skip
def test_a_launcher_of_several_is_recognised(monkeypatch, found, looks):
    for name in (*GIVEN, "SLURM_STEP_NODELIST", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(glob, "glob", lambda _: [])
    assert processes._has_company() == looks
