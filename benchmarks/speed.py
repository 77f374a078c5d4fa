"""Steady-state speed of steps against other systems; one JSON line per measurement and one per comparison.

    python -m benchmarks.speed --task sft --task ppo --size 42m
    python -m benchmarks.speed --lengths ragged --peer trl=PYTHON --peer trl_ppo=PYTHON --peer tunix=PYTHON

Every system runs in a process of its own, and they take turns: step by step, so that whatever else the machine does
falls on all of them (benchmarks/peers/README.md has the settings and how to make the peers' environments). A
comparison is the ratio of medians, ours / theirs: of seconds, of CPU seconds and of seconds per real token. Random
weights, float32 on CPU unless --dtype says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from benchmarks.peers.common import SIZES, TASKS, WARMUP

PEERS = {"trl": "trl_peer.py", "trl_ppo": "trl_ppo_peer.py", "tunix": "tunix_peer.py", "bare": "bare_jax.py"}
PEER_TASKS = {
    ("trl", "full"): ("sft", "reward", "generate"),
    ("trl", "ragged"): ("sft", "reward", "kwise4", "kwise9", "dpo", "generate", "grpo"),
    ("trl_ppo", "full"): ("ppo",),
    ("trl_ppo", "ragged"): ("ppo",),
    ("tunix", "full"): ("sft", "generate", "ppo"),
    ("tunix", "ragged"): ("sft", "generate", "ppo", "grpo"),
    ("bare", "full"): ("sft", "generate"),
    ("bare", "ragged"): (),
}
HUGE_PAGES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}
"""A step's temporaries are gigabytes that are given back and faulted in again; this keeps them, in 2 MiB pages."""


class Child:
    """A system's process, which stands before its next step or has said its line."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.command, self.errors = command, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | environment,
        )  # fmt: skip
        self.line: dict[str, Any] | None = None
        self._listen()

    def step(self) -> None:
        """Let it take one step and come to the next one."""
        if self.line is None:
            pipe = self._pipe(self.process.stdin)
            pipe.write("go\n")
            pipe.flush()
            self._listen()

    def _listen(self) -> None:
        """Read on until it is ready, has said its line or has failed."""
        for said in self._pipe(self.process.stdout):
            if said == "ready\n":
                return
            if said.startswith("{"):
                self.line = json.loads(said)
                break
        self.process.communicate()
        with self.errors as errors:
            errors.seek(0)
            if self.line is None:
                self.line = {"failed": self.command[1:], "error": errors.read().strip().splitlines()[-1:]}

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def compare(children: dict[str, Child], steps: int) -> list[dict[str, Any]]:
    """The line of each system after `steps` in turns, and for each peer its comparison with the first, ours."""
    for _ in range(steps):
        for child in children.values():
            child.step()
    lines = [child.line or {"failed": child.command[1:], "error": "said nothing"} for child in children.values()]
    ours, *peers = lines
    return [*lines, *(against(ours, theirs) for theirs in peers if "failed" not in ours | theirs)]


def against(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Ratios of medians, ours / theirs."""

    def per_token(line: dict[str, Any]) -> float:
        return statistics.median(s / t for s, t in zip(line["seconds"], line["tokens"], strict=True))

    return {
        **{name: ours[name] for name in ("task", "model", "lengths")},
        "against": theirs["system"],
        "ratio": round(ours["seconds_median"] / theirs["seconds_median"], 3),
        "cpu_ratio": round(ours["cpu_seconds_median"] / theirs["cpu_seconds_median"], 3),
        "per_token_ratio": round(per_token(ours) / per_token(theirs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="repeat for several; default all")
    parser.add_argument("--size", action="append", choices=tuple(SIZES), help="repeat for several; default 42m and 5m")
    parser.add_argument("--lengths", choices=["full", "ragged"], default="full", help="of rows and responses")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--huge-pages", action="store_true", help="glibc's huge pages, for all systems")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        from benchmarks.programs import measure

        [args.task], [args.size] = args.task, args.size
        return measure(args)
    peers = dict(peer.split("=", 1) for peer in args.peer)
    unknown = set(peers) - set(PEERS)
    if unknown:
        parser.error(f"unknown peer {sorted(unknown)}; choose from {sorted(PEERS)}")
    pages = HUGE_PAGES if args.huge_pages else {}
    known = {task for (_, lengths), tasks in PEER_TASKS.items() if lengths == args.lengths for task in tasks}
    for size in args.size or ("42m", "5m"):
        for task in args.task or [task for task in TASKS if task in known]:
            common = ["--task", task, "--size", size, "--lengths", args.lengths, "--turns"]
            common += ["--repeats", str(args.repeats)]
            ours = [sys.executable, "-m", "benchmarks.speed", "--in-process", "--dtype", args.dtype, *common]
            commands = {"ours": ours} | {
                name: [python, str(Path(__file__).parent / "peers" / PEERS[name]), *common]
                for name, python in peers.items()
                if task in PEER_TASKS[name, args.lengths]
            }
            children = {name: Child(command, pages) for name, command in commands.items()}
            for line in compare(children, WARMUP + args.repeats):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
