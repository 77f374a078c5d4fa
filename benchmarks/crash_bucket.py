"""Kill and stop commands whose output is in a bucket, at random moments, and compare with what they make on a disk.

python -m benchmarks.crash_bucket --kills 20 --stages sft reward ppo collect recipe

A command runs to its end on a disk; then with its output in `gs://...`, served by the tests' own service, where
processes are killed (kill -9) or, every third time, stopped and continued once another one has taken over. Models and
rows must be equal bit by bit, metrics.jsonl and samples.jsonl but for times. Prints a JSON line for each kill and each
command.
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
from typing import Any

import pytest
import yaml

from benchmarks import crash

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from buckets import Bucket, served

PROGRAM = """
from rlhf_jax.runs import pieces, twin
twin.BEAT, twin.LIFETIME = 0.3, 3.0
twin.PASS = pieces.PASS = 0.5
from rlhf_jax.cli import main
main()
"""
HEAD = ".run/head.json"
STAGES = ("sft", "reward", "ppo", "collect", "recipe")
COLLECT = {"data_path": "ppo.jsonl", "max_prompt_length": 2, "sampling": {"max_new_tokens": 8, "chunk": 4}}
COLLECT |= {"num_samples": 2, "batch_size": 4, "progress": False}


def start(home: Path, *arguments: str) -> subprocess.Popen:
    """`rlhf-jax ...` in a process of its own that beats fast, with compilations kept on disk."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"), "TMPDIR": str(home)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    log = open(home / "log.txt", "a")  # noqa: SIM115 (the process has it)
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=env, stdout=log, stderr=log)


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
                known = path.split("/")[1] if path.startswith("checkpoints/") else sum(size for _, size in parts)
                if path.startswith(("checkpoints/", "rows.jsonl", "recipe.json")):
                    found.add((name, known))
    return found


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


def disturbed(
    bucket: Bucket, home: Path, place: str, command: list[str], kills: int, draw: random.Random
) -> list[int | None]:
    """Run a command, which holds `place`, to its end through so many kills; exit codes of those that were stopped."""
    stopped: list[subprocess.Popen] = []
    before, held = done(bucket), epoch(bucket, place)
    process = start(home, *command)
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
        old, process = process, start(home, *command)
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
        rows = [json.dumps({"prompt": chr(97 + i % 20)}) for i in range(16 * steps)]
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
    given = parser.parse_args()
    draw, bucket, bad = random.Random(given.seed), Bucket(), False
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, served(bucket, patch):
        home = Path(folder)
        crash.prepare(home)
        needed = {"ppo": ["sft", "reward"], "reward": ["sft"], "collect": ["sft"], "recipe": ["sft"]}
        asked = {*given.stages, *(other for stage in given.stages for other in needed.get(stage, []))}
        for stage in (stage for stage in STAGES if stage in asked):
            command, option, ending = prepared(home, stage, given.steps)
            crash.finish(crash.start(home, *command, option, str(home / f"{stage}_alone{ending}")), home)
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
