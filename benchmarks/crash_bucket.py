"""Kill and stop commands whose output is in a bucket, at random moments, and compare with what they make on a disk.

python -m benchmarks.crash_bucket --kills 20 --steps 1500 --stages sft reward ppo collect recipe

A command runs to its end on a disk; then with its output in `gs://...`, served by the tests' own service, where
processes are killed (kill -9) or, every third time, stopped and continued once another one has taken over. Models and
rows must be equal bit by bit, metrics.jsonl and samples.jsonl but for times. Prints a JSON line for each kill and each
command.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import crash
from rlhf_jax.cli import code_of
from rlhf_jax.hosts.interrupts import own_process
from rlhf_jax.runs import pieces, twin

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from buckets import Bucket, served

MODULES = ["__main__", "rlhf_jax.ppo", "rlhf_jax.reward", "rlhf_jax.commands.collect", "rlhf_jax.commands.recipe"]
"""What the process has loaded from which those of the commands are forked: a start costs no imports."""

HEAD = ".run/head.json"
STAGES = ("sft", "reward", "ppo", "collect", "recipe")
COLLECT = {"data_path": "ppo.jsonl", "max_prompt_length": 2, "sampling": {"max_new_tokens": 8, "chunk": 4}}
COLLECT |= {"num_samples": 2, "batch_size": 4, "progress": False}


class Command:
    """`rlhf-jax ...` in a process of its own that beats fast."""

    def __init__(self, home: Path, *arguments: str):
        self._process = multiprocessing.get_context("forkserver").Process(target=run, args=(home, arguments))
        self._process.start()

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """Its exit code, once it has ended."""
        self._process.join(seconds)
        code = self.poll()
        return sys.exit(f"it has not ended in {seconds:g} s") if code is None else code

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid or 0, number)


def run(home: Path, arguments: tuple[str, ...]) -> None:
    """The whole of such a process."""
    with open(home / "log.txt", "a") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    twin.BEAT, twin.LIFETIME = 1.0, 4.0
    twin.PASS = pieces.PASS = 1.0
    own_process(lambda: code_of(list(arguments)))


def epoch(bucket: Bucket, place: str) -> int:
    """How often something in the bucket was taken over."""
    data = bucket.objects.get(f"{place}/{HEAD}", (b'{"epoch": 0}', 0))[0]
    found: int = json.loads(data)["epoch"]
    return found


def done(bucket: Bucket) -> set[tuple[str, object]]:
    """What cannot be lost any more: checkpoints, rows that were gathered, and the files that recipes have written."""
    found: set[tuple[str, object]] = set()
    for name, (data, _) in list(bucket.objects.items()):
        if name.endswith(HEAD):
            for path, parts in json.loads(data)["files"].items():
                known = path.split("/")[1] if path.startswith("checkpoints/") else sum(part[1] for part in parts)
                if path.startswith(("checkpoints/", "rows.jsonl", "recipe.json")):
                    found.add((name, known))
    return found


def wait_for(what, process: Command) -> bool:
    """Until `what()`; False if the process ended before."""
    began = time.time()
    while not what():
        if process.poll() is not None:
            return False
        if time.time() - began > crash.TIMEOUT:
            sys.exit("the run does not go on")
        time.sleep(0.03)
    return True


def disturbed(
    bucket: Bucket, home: Path, place: str, command: list[str], kills: int, draw: random.Random
) -> list[int | None]:
    """Run a command, which holds `place`, to its end through so many kills; exit codes of those that were stopped."""
    stopped: list[Command] = []
    before, held = done(bucket), epoch(bucket, place)
    process = Command(home, *command)
    for number in range(kills):
        if not wait_for(lambda held=held: epoch(bucket, place) != held, process):
            sys.exit(f"{command[0]} ended before kill {number + 1}; give it more to do")
        if draw.random() < 0.7:  # else soon after it took over
            wait_for(lambda before=before: not done(bucket) <= before, process)
        time.sleep(draw.uniform(0, 1.5))
        if process.poll() is not None:
            sys.exit(f"{command[0]} ended before kill {number + 1}; give it more to do")
        zombie = number % 3 == 2
        process.send_signal(signal.SIGSTOP if zombie else signal.SIGKILL)
        before, held = done(bucket), epoch(bucket, place)
        kill = {"command": command[0], "kill": number + 1, "zombie": zombie, "epoch": held, "done": len(before)}
        print(json.dumps(kill), flush=True)
        old, process = process, Command(home, *command)
        if zombie:
            wait_for(lambda held=held: epoch(bucket, place) != held, process)
            old.send_signal(signal.SIGCONT)
            stopped.append(old)
    if process.wait(crash.TIMEOUT):
        sys.exit((home / "log.txt").read_text()[-3000:])
    return [each.wait(crash.TIMEOUT) for each in stopped]


def prepared(home: Path, stage: str, steps: int) -> tuple[list[str], str, str]:
    """The command of a stage without its output, the option that names that, and the ending of its name."""
    if stage == "recipe":
        config = recipe_of(home, steps)
    elif stage == "collect":
        config = COLLECT | {"data_path": str(home / "prompts.jsonl"), "model": {"path": str(home / "sft_alone/model")}}
        rows = [json.dumps({"prompt": chr(97 + i % 20)}) for i in range(48 * steps)]
        (home / "prompts.jsonl").write_text("".join(f"{row}\n" for row in rows))
    else:
        config = crash.settings(home, stage, steps)
        config["checkpoint"] = {"every": 6, "keep_last": 2}
    file = home / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    if stage == "recipe":
        return ["recipe", str(file)], "--output_dir", ""
    where = ("--output", ".jsonl") if stage == "collect" else ("--run.output_dir", "")
    return [stage, "--config", str(file)], *where


def recipe_of(home: Path, steps: int) -> dict[str, Any]:
    """SFT, a reward model, and responses of the first that the second scores, one after another."""
    sft, reward = (crash.settings(home, stage, steps) for stage in ("sft", "reward"))
    reward["model"] = {"path": "$sft/model"}
    collect = COLLECT | {"data_path": str(home / "ppo.jsonl"), "model": {"path": "$sft/model"}}
    stages = [{"command": "sft", **sft}, {"command": "reward", **reward}, {"command": "collect", **collect}]
    for each in stages[:2]:
        each["checkpoint"] = {"every": 6, "keep_last": 2}
    return {"stages": stages}


def differences(bucket: Bucket, home: Path, stage: str, ending: str) -> list[str]:
    """What is not in the bucket as it is on the disk."""
    alone, wrong = home / f"{stage}_alone{ending}", []
    for path in sorted(alone.rglob("*")) if alone.is_dir() else [alone]:
        name = f"{stage}{ending}" + (f"/{path.relative_to(alone)}" if path != alone else "")
        there, _ = bucket.objects.get(name, (b"", 0))
        if path.name in ("metrics.jsonl", "samples.jsonl"):
            (home / "there.jsonl").write_bytes(there)
            same = crash.lines(home / "there.jsonl") == crash.lines(path)
        else:
            counts = path.suffix == ".jsonl" or "model" in path.parent.name
            same = not path.is_file() or not counts or path.read_bytes() == there
        wrong += [] if same else [name]
    return wrong


def main() -> None:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=crash.TIMEOUT, help="seconds after which a run hangs")
    given = parser.parse_args()
    crash.TIMEOUT = given.timeout
    draw, bucket, bad = random.Random(given.seed), Bucket(), False
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, served(bucket, patch):
        home = Path(folder)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "compiled"))  # before the process to fork from starts
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        patch.setenv("TMPDIR", folder)
        multiprocessing.set_forkserver_preload(MODULES)
        crash.prepare(home)
        needed = {"ppo": ["sft", "reward"], "reward": ["sft"], "collect": ["sft"], "recipe": ["sft"]}
        asked = {*given.stages, *(other for stage in given.stages for other in needed.get(stage, []))}
        for stage in (stage for stage in STAGES if stage in asked):
            command, option, ending = prepared(home, stage, given.steps)
            if Command(home, *command, option, str(home / f"{stage}_alone{ending}")).wait(crash.TIMEOUT):
                sys.exit((home / "log.txt").read_text()[-3000:])
            if stage not in given.stages:
                continue
            place = f"{stage}{ending}" + (".part" if stage == "collect" else "")
            url = f"gs://{bucket.name}/{stage}{ending}"
            codes = disturbed(bucket, home, place, [*command, option, url], given.kills, draw)
            wrong = differences(bucket, home, stage, ending)
            print(json.dumps({"stage": stage, "kills": given.kills, "zombies ended with": codes, "differ": wrong}))
            bad |= bool(wrong) or 0 in codes
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
