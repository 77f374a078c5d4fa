"""Kill runs at random moments, resume them, and compare bit by bit with a run that was left alone.

python -m benchmarks.crash --kills 20

For each stage: one run to the end; another that is killed (kill -9) so many times, at random steps, while it starts
and inside saves, and resumed each time with `rlhf-jax resume`. Parameters, optimiser state and all else in the last
checkpoint, the saved model, metrics.jsonl (times apart) and samples.jsonl must be equal. Prints a JSON line for each
kill and each stage, then a table.
"""

from __future__ import annotations

import argparse
import contextlib
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

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml

from rlhf_jax.runs.curves import text_table
from rlhf_jax.tasks import random_walks as walks

STAGES = {
    "sft": "sft", "reward": "reward", "heads": "reward", "adapters": "reward", "ppo": "ppo", "ppo_lora": "ppo",
    "ppo_ensemble": "ppo", "grpo_ensemble": "grpo", "ppo_judge": "ppo", "distill": "distill",
}  # fmt: skip
"""What is killed -> its command; heads and adapters are ensembles, with whose guarded lower bound two others learn."""
NEEDS = {
    "sft": (), "reward": ("sft",), "ppo": ("sft", "reward"), "distill": ("sft", "reward", "ppo"),
    "ppo_ensemble": ("sft", "heads", "adapters"), "grpo_ensemble": ("sft", "heads", "adapters"), "ppo_judge": ("sft",),
}  # fmt: skip
"""A stage, or else a command -> the stages whose models it starts from, run but not killed unless asked for."""
ENSEMBLES: dict[str, dict[str, Any]] = {"heads": {"members": 2}, "adapters": {"members": 2, "member_adapters": True}}
GUARDS = {"reward_standardize": "mean_std", "reward_clip": 2.0, "overlong_tokens": 3, "kl_budget": 1e6,
          "disagreement_budget": 1e6}  # fmt: skip
WAYS = ("step", "save", "start")
"""Kill once a drawn step is reached and no save is under way, inside a save after it, or soon after the start."""
TIMEOUT = 300.0
ARCH = {
    "vocab_size": 24, "width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "ffn_width": 64,
    "max_positions": 32,
}  # fmt: skip
SHARED = {
    "optim": {"learning_rate": 3e-3, "warmup_steps": 5, "weight_decay": 0.01},
    "run": {"progress": False, "eval_every": 10},
    "checkpoint": {"every": 6, "keep_last": 2, "keep_finished": True},
}


def settings(home: Path, stage: str, steps: int) -> dict[str, Any]:
    """The config of a stage with so many steps."""
    data = {"batch_size": 16, "max_prompt_length": 2, "max_length": 14, "eval_fraction": 0.2, "eval_batches": 2}
    data["path"] = str(home / f"{STAGES[stage] if STAGES[stage] in ('sft', 'reward') else 'ppo'}.jsonl")
    sampling, walked = {"max_new_tokens": 8, "chunk": 4}, str(home / "sft.jsonl")
    trained = {"path": str(home / "sft_alone" / "model")}
    if stage == "sft":
        model = {"arch": ARCH, "tokenizer": str(home / "tokenizer")}
        return {**SHARED, "model": model, "data": data, "sft": {"steps": steps}, "sampling": sampling}
    if STAGES[stage] == "reward":
        lora, members = {"rank": 2 if stage == "adapters" else 0}, ENSEMBLES.get(stage, {})
        return {**SHARED, "model": trained, "data": data, "reward": {"steps": steps, **members}, "lora": lora}
    if stage == "distill":
        distill = {"iterations": steps, "sample_every": 3, "ema_decay": 0.9}
        reward = {"teacher": str(home / "ppo_alone" / "model")}
        return {**SHARED, "model": trained, "data": data, "reward": reward, "distill": distill, "sampling": sampling}
    ppo = {"iterations": steps, "epochs": 2, "minibatches": 2, "kl_target": 1.0, "kl_horizon": 200.0,
           "ema_decay": 0.9, "sample_every": 3, "save_value_model": True}  # fmt: skip
    reward: dict[str, Any] = {"model": str(home / "reward_alone" / "model")}
    if stage.endswith("_ensemble"):
        reward = {"models": [str(home / f"{name}_alone" / "model") for name in ENSEMBLES], "combine": "lower_bound"}
        ppo |= GUARDS
    if stage == "grpo_ensemble":
        grpo = {
            "iterations": steps,
            "group_size": 4,
            "kl_coef": 0.05,
            "epochs": 2,
            "ema_decay": 0.9,
            "sample_every": 3,
            **GUARDS,
        }
        return {**SHARED, "model": trained, "data": data, "reward": reward, "grpo": grpo, "sampling": sampling}
    if stage == "ppo_judge":
        reward, data["path"] = {"judge": {"function": "benchmarks.crash:shorter", "against": "response"}}, walked
    if stage == "ppo_lora":
        trained |= {"quantize": "nf4"}
    lora = {"rank": 2 if stage == "ppo_lora" else 0}
    return {**SHARED, "lora": lora, "model": trained, "data": data, "reward": reward, "ppo": ppo, "sampling": sampling,
            "value_optim": SHARED["optim"]}  # fmt: skip


def shorter(prompt: str, a: str, b: str) -> float:
    """A judge by name: of two walks the shorter one."""
    return 0.5 if len(a) == len(b) else float(len(a) < len(b))


def prepare(home: Path) -> None:
    """Tokenizer and data of random walks."""
    walks.make_tokenizer().save_pretrained(home / "tokenizer")
    graph = walks.make_graph(0)
    demos = walks.demonstrations(graph, 120, 0)
    other = walks.demonstrations(graph, 120, 1)
    prompts = [demo["prompt"] for demo in demos]
    pairs = walks.comparisons(
        graph, prompts, [demo["response"] for demo in demos], [demo["response"] for demo in other], 0, 0.0
    )
    for name, rows in (("sft", demos), ("reward", pairs), ("ppo", walks.start_prompts() * 6)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(home: Path, *arguments: str) -> subprocess.Popen:
    """`rlhf-jax ...` in a process of its own, with compilations kept on disk."""
    env = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    log = open(home / "log.txt", "a")  # noqa: SIM115 (the process has it)
    return subprocess.Popen([sys.executable, "-m", "rlhf_jax", *arguments], env=env, stdout=log, stderr=log)


def finish(process: subprocess.Popen, home: Path) -> None:
    """Wait for a process that must succeed."""
    if process.wait(TIMEOUT):
        sys.exit((home / "log.txt").read_text()[-3000:])


def last_step(directory: Path) -> int:
    """The step of the last whole line of metrics.jsonl; -1 before the first."""
    try:
        lines = (directory / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else -1
    except OSError:
        return -1


def writing(directory: Path) -> set[int]:
    """The saves under way, and those that a kill has left; as inodes, since their names come again."""
    found = set()
    for path in (directory / "checkpoints").glob("writing-*"):
        with contextlib.suppress(OSError):
            found.add(path.stat().st_ino)
    return found


def kill_at(process: subprocess.Popen, directory: Path, way: str, step: int, draw: random.Random) -> str | None:
    """Kill -9 in one of WAYS; says what the run was doing, or None if it ended before."""
    began, left = time.time(), writing(directory)
    deadline = began + draw.uniform(0.2, 8.0)

    def reached() -> bool:
        there = last_step(directory) >= step
        if way == "start":
            return there or time.time() >= deadline
        return there and bool(writing(directory) - left) == (way == "save")

    while not reached():
        if process.poll() is not None:
            return None
        if time.time() - began > TIMEOUT:
            sys.exit(f"step {step} was not reached in {TIMEOUT:g} s")
        time.sleep(0.0005)
    if way == "save":
        time.sleep(draw.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode == 0:
        return None
    if writing(directory) - left:
        return "saving"
    checkpoints = [int(path.name) for path in (directory / "checkpoints").glob("[0-9]*") if path.name.isdigit()]
    began_training = last_step(directory) > max(checkpoints, default=-1)
    return "training" if began_training or way == "step" else "starting"


def killed_run(home: Path, stage: str, config: Path, steps: int, kills: int, draw: random.Random) -> list[dict]:
    """Run a stage to its end through so many kills; a line about each."""
    directory = home / f"{stage}_killed"
    process = start(home, STAGES[stage], "--config", str(config), "--run.output_dir", str(directory))
    done: list[dict] = []
    for number in range(kills):
        way = WAYS[number % len(WAYS)]
        step = draw.randrange(number * (steps - 8) // kills, (number + 1) * (steps - 8) // kills + 1)
        found = kill_at(process, directory, way, step, draw)
        if found is None:
            finish(process, home)
            sys.exit(f"{stage} ended before kill {number}; give it more steps")
        done.append({"stage": stage, "kill": number + 1, "way": way, "was": found, "step": last_step(directory)})
        print(json.dumps(done[-1]), flush=True)
        begun = (directory / "run.json").exists()  # killed before that, it is started anew by the same command
        again = ["resume", str(directory)] if begun else [STAGES[stage], "--config", str(config)]
        process = start(home, *again, *([] if begun else ["--run.output_dir", str(directory)]))
    finish(process, home)
    return done


def arrays(directory: Path) -> list[tuple[str, np.ndarray]]:
    """All arrays of the last checkpoint, by path."""
    newest = max((directory / "checkpoints").glob("[0-9]*"))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        shapes = checkpointer.metadata(newest / "state").item_metadata.tree
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = checkpointer.restore(newest / "state", args=ocp.args.PyTreeRestore(restore_args=kinds))
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def lines(path: Path) -> list[dict]:
    """Rows of a .jsonl file without times."""
    rows = map(json.loads, path.read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs, bit by bit."""
    found = []
    first, second = arrays(one), arrays(other)
    if [name for name, _ in first] != [name for name, _ in second]:
        found.append("names of arrays")
    both = zip(first, second, strict=False)
    found += [name for (name, a), (_, b) in both if (a.dtype, a.tobytes()) != (b.dtype, b.tobytes())]
    for name in ("metrics.jsonl", "samples.jsonl"):
        if lines(one / name) != lines(other / name):
            found.append(name)
    for path in sorted(one.glob("*model/**/*.safetensors")):
        if path.read_bytes() != (other / path.relative_to(one)).read_bytes():
            found.append(str(path.relative_to(one)))
    return found


def crash(home: Path, stage: str, steps: int, kills: int, seed: int) -> dict[str, Any]:
    """One stage left alone and killed; the outcome."""
    config = home / f"{stage}.yaml"
    config.write_text(yaml.safe_dump(settings(home, stage, steps)))
    alone, began = home / f"{stage}_alone", time.time()
    finish(start(home, STAGES[stage], "--config", str(config), "--run.output_dir", str(alone)), home)
    if not kills:
        return {"stage": stage}
    done = killed_run(home, stage, config, steps, kills, random.Random(f"{seed} {stage}"))
    differ = differences(alone, home / f"{stage}_killed")
    was = {name: sum(kill["was"] == name for kill in done) for name in ("starting", "training", "saving")}
    arrays_found = len(arrays(alone))
    return {"stage": stage, "steps": steps, "kills": kills, **was, "arrays": arrays_found,
            "lines": len(lines(alone / "metrics.jsonl")), "differ": differ, "equal": not differ,
            "wall_s": round(time.time() - began, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60, help="steps of a run, which the kills share out")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="", help="a directory to work in, kept; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(args.keep or folder).absolute()
        home.mkdir(parents=True, exist_ok=True)
        prepare(home)
        outcomes = []
        needed = {*args.stages}
        for stage in args.stages:
            needed |= {*(NEEDS[stage] if stage in NEEDS else NEEDS[STAGES[stage]])}
        for stage in (stage for stage in STAGES if stage in needed):
            outcome = crash(home, stage, args.steps, args.kills if stage in args.stages else 0, args.seed)
            if stage in args.stages:
                outcomes.append(outcome)
                print(json.dumps(outcome), flush=True)
    columns = ["stage", "kills", "starting", "training", "saving", "arrays", "lines", "equal"]
    print("\n" + text_table(columns, [[str(outcome[name]) for name in columns] for outcome in outcomes]))
    if not all(outcome["equal"] for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
