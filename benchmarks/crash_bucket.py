"""Kill and stop runs whose directory is in a bucket, at random moments, and compare with a run on a disk.

python -m benchmarks.crash_bucket --kills 10

A stage runs to its end on a disk; then with `--run.output_dir gs://...`, served by the tests' own service, where
processes are killed (kill -9) or, every third time, stopped and continued once another one has taken the run over. The
saved model must be equal bit by bit, metrics.jsonl and samples.jsonl but for times. Prints a JSON line for each kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from benchmarks import crash

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from buckets import Bucket, served

PROGRAM = """
from rlhf_jax.runs import twin
twin.BEAT, twin.PASS, twin.LIFETIME = 0.3, 0.5, 3.0
from rlhf_jax.cli import main
main()
"""
URL, HEAD = "gs://bucket/run", "run/.run/head.json"


def start(home: Path, *arguments: str) -> subprocess.Popen:
    """`rlhf-jax ...` in a process of its own that beats fast, with compilations kept on disk."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"), "TMPDIR": str(home)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    log = open(home / "log.txt", "a")  # noqa: SIM115 (the process has it)
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=env, stdout=log, stderr=log)


def head(bucket: Bucket) -> dict:
    """What the bucket says of the run."""
    data = bucket.objects.get(HEAD, (b'{"epoch": 0, "files": {}}', 0))[0]
    return json.loads(data)


def newest_of(head: dict) -> str:
    """The newest checkpoint that a head names; empty if there is none."""
    return max((path.split("/")[1] for path in head["files"] if path.startswith("checkpoints/")), default="")


def newest(bucket: Bucket) -> str:
    """`newest_of` what the bucket says."""
    return newest_of(head(bucket))


def wait_for(what, process: subprocess.Popen) -> bool:
    """Until `what()`; False if the process ended before."""
    began = time.time()
    while not what():
        if process.poll() is not None:
            return False
        if time.time() - began > crash.TIMEOUT:
            sys.exit("the run does not go on")
        time.sleep(0.01)
    return True


def disturbed(bucket: Bucket, home: Path, command: list[str], kills: int, draw: random.Random) -> list[int | None]:
    """Run a command to its end through so many kills; the exit codes of those that were stopped for a while."""
    stopped: list[subprocess.Popen] = []
    process = start(home, *command)
    for number in range(kills):
        before = head(bucket)
        if not wait_for(lambda before=before: head(bucket)["epoch"] > before["epoch"], process):
            break
        if draw.random() < 0.7:  # else soon after it took over
            wait_for(lambda before=before: newest(bucket) > newest_of(before), process)
        time.sleep(draw.uniform(0, 1.5))
        if process.poll() is not None:
            break
        zombie = number % 3 == 2
        process.send_signal(signal.SIGSTOP if zombie else signal.SIGKILL)
        print(json.dumps({"kill": number + 1, "zombie": zombie, "epoch": head(bucket)["epoch"]}), flush=True)
        old, process = process, start(home, *command)
        if zombie:
            held = head(bucket)
            wait_for(lambda held=held: head(bucket)["epoch"] > held["epoch"], process)
            old.send_signal(signal.SIGCONT)
            stopped.append(old)
    if process.wait(crash.TIMEOUT):
        sys.exit((home / "log.txt").read_text()[-3000:])
    return [each.wait(crash.TIMEOUT) for each in stopped]


def main() -> None:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, bucket = random.Random(given.seed), Bucket()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, served(bucket, patch):
        home = Path(folder)
        crash.prepare(home)
        settings = crash.settings(home, "sft", given.steps)
        settings["checkpoint"] = {"every": 6, "keep_last": 2}
        (home / "sft.yaml").write_text(yaml.safe_dump(settings))
        command = ["sft", "--config", str(home / "sft.yaml"), "--run.output_dir"]
        crash.finish(crash.start(home, *command, str(home / "alone")), home)
        codes = disturbed(bucket, home, [*command, URL], given.kills, draw)
        wrong = [name for name in ("metrics.jsonl", "samples.jsonl") if not same_lines(bucket, home, name)]
        for path in (home / "alone" / "model").iterdir():
            if bucket.objects[f"run/model/{path.name}"][0] != path.read_bytes():
                wrong.append(f"model/{path.name}")
        print(json.dumps({"epochs": head(bucket)["epoch"], "zombies ended with": codes, "differ": wrong}))
        if wrong or 0 in codes:
            sys.exit(1)


def same_lines(bucket: Bucket, home: Path, name: str) -> bool:
    """Whether a file of lines is that of the run on a disk, times apart."""
    (home / "there.jsonl").write_bytes(bucket.objects[f"run/{name}"][0])
    return crash.lines(home / "there.jsonl") == crash.lines(home / "alone" / name)


if __name__ == "__main__":
    main()
