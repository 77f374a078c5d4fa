"""What all measurements share: shapes, tasks, the lengths of ragged rows, turns, and the line that is printed.

Runs in every system's environment, so it needs NumPy alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np

SIZES = {
    "42m": dict(width=512, layers=8, heads=8, ffn=1408, vocab=32000),
    "5m": dict(width=256, layers=4, heads=4, ffn=704, vocab=4096),
    "42m_experts": dict(width=512, layers=8, heads=8, ffn=352, vocab=32000, experts=16, top=4),  # 94m, 42m of a token
    "5m_hybrid": dict(width=256, layers=4, heads=4, ffn=704, vocab=4096, delta_heads=4, delta_width=64),
    "tiny": dict(width=64, layers=1, heads=1, ffn=64, vocab=512),  # to see that a program runs
    "tiny_experts": dict(width=64, layers=1, heads=1, ffn=64, vocab=512, experts=4, top=2),
    "tiny_hybrid": dict(width=64, layers=4, heads=1, ffn=64, vocab=512, delta_heads=2, delta_width=16),
}
"""With `experts` a Qwen3-MoE, of which a token has `top`; with `delta_heads` a Qwen3.5, attention in every fourth."""
LLAMAS = tuple(name for name, size in SIZES.items() if not {"experts", "delta_heads"} & set(size))
WARMUP = 2


class Work(NamedTuple):
    """What one step works on.

    Attributes:
        prompts: of a step.
        responses: to each prompt.
        prompt: tokens of a prompt, or the most of them. Where nothing is sampled, of prompt and response together.
        new: tokens that are sampled for each response, or the most of them.
    """

    prompts: int
    responses: int
    prompt: int
    new: int = 0

    @property
    def sequences(self) -> int:
        return self.prompts * self.responses


FULL = {
    "sft": Work(8, 1, 256),
    "reward": Work(8, 2, 256),
    "generate": Work(16, 1, 64, 128),
    "ppo": Work(16, 1, 64, 64),
}
"""Every sequence is as long as it may be."""

RAGGED = {
    "sft": Work(16, 1, 512),
    "reward": Work(8, 2, 512),
    "kwise4": Work(4, 4, 512),
    "kwise9": Work(2, 9, 512),
    "dpo": Work(8, 2, 512),
    "generate": Work(64, 1, 256, 256),
    "ppo": Work(32, 1, 256, 128),
    "grpo": Work(4, 8, 256, 128),
}
"""Rows have the lengths of LENGTHS, but for grpo's prompts, which are full; what is sampled ends at `stop_ids`."""

TASKS = tuple(RAGGED)

LENGTHS = """
    279/26/55 11/11/132 242/79/70 237/120/109 100/12/38 15/23/171 111/73/77 159/42/17 147/24/60 55/18/9 116/22/91
    24/39/22 60/15/8 180/69/45 307/44/64 221/31/33 170/27/16 159/12/48 68/44/51 11/23/17 149/6/72 104/56/47
    272/65/41 16/8/21 123/16/37 51/50/269 111/4/81 11/10/130 24/93/46 118/17/52 66/12/47 34/47/25 99/27/17 262/34/48
    19/46/58 34/14/23 13/15/12 86/7/85 166/76/25 17/264/28 18/22/26 74/20/76 62/20/27 15/27/66 13/32/45 36/20/6
    9/10/32 124/31/35 10/11/17 368/129/105 178/18/54 325/20/53 324/27/7 142/6/13 17/35/156 407/81/184 104/7/8
    13/25/18 40/22/5 181/72/49 254/11/75 174/150/59 19/29/21 77/9/3 115/44/33 12/101/19 189/38/115 205/82/32
    112/19/9 177/78/55 173/27/27 60/10/171 185/50/124 124/38/20 24/52/22 50/47/16 172/45/31 16/24/136 49/37/38
    16/89/17 218/32/47 114/203/42 24/32/27 120/61/39 55/14/59 103/33/65 17/25/9 198/43/64 29/10/70 547/236/146
    104/103/65 110/25/29 127/32/97 156/8/12 133/10/31 94/3/13 73/38/33 23/11/27 15/46/13 19/45/15 154/18/8 66/45/58
    150/85/83 157/39/96 86/13/123 197/54/30 110/60/13 11/11/59 18/16/24 295/28/59 80/42/40 160/25/8 26/124/45
    12/32/18 83/38/31 20/117/36 18/164/7 11/5/48 130/19/157 97/14/14 167/14/93 109/20/17 179/30/54 40/10/31 17/29/49
    90/16/15 97/23/63 57/13/25 102/50/21 100/118/63 73/5/23 249/75/96 76/59/115 99/14/7 122/27/4 125/108/163
    146/29/59 97/7/18 22/35/22 434/49/21 105/33/37 208/19/33 53/16/51 212/30/125 17/82/37 10/8/7 154/17/19 304/38/88
    134/89/19 447/3/21 55/7/5 78/33/70 81/28/3 160/10/10 14/57/46 13/37/8 288/27/56 106/27/9 124/25/12 52/85/35
    8/14/9 29/12/220 77/72/17 8/16/10 332/36/4 122/35/20 15/124/10 64/20/63 297/202/157 20/4/155 137/143/7 99/52/73
    62/7/7 284/11/224 169/28/151 220/28/58 17/30/43 128/72/64 72/55/32 146/27/23 333/72/249 215/40/72 56/17/5
    21/3/10 18/30/58 165/81/95 129/27/8 81/31/26 19/8/37 550/76/239 23/38/57 68/22/25 90/53/76 109/87/41 46/8/7
    168/24/42 30/25/18 460/13/33 69/3/4 128/45/44 63/40/11 11/18/37 86/67/86 319/39/76 17/16/15 118/51/12 41/55/50
    69/81/43 150/39/30 21/113/41 138/128/126 131/32/54 73/61/82 37/9/11 38/11/17 80/21/34 170/28/34 85/22/45
    147/9/19 7/6/29 243/14/18 169/23/55 140/84/40 215/21/38 139/36/123 100/12/30 102/12/24 215/122/82 88/31/103
    42/41/18 252/126/173 112/124/90 496/180/86 613/56/66 101/38/50 457/12/167 13/26/37 32/8/104 179/67/157 327/75/46
"""
"""prompt/chosen/rejected of 240 rows of HH harmless-base's test split, in tokens of GPT-2; an end counts as one."""


def work_of(task: str, lengths: str) -> Work:
    return (FULL if lengths == "full" else RAGGED)[task]


def stop_ids(lengths: str, vocab: int) -> list[int]:
    """One id in a hundred where lengths are ragged, none else."""
    return list(range(50, vocab, 100)) if lengths == "ragged" else []


class Row(NamedTuple):
    """Ids of a prompt and of the responses to it; 3 and up, so that none is special."""

    prompt: list[int]
    responses: list[list[int]]


def rows(task: str, lengths: str, vocab: int, steps: int) -> list[list[Row]]:
    """The rows of each step: a list of random ids and lengths that is the same in every system.

    The first two responses are those of their row of LENGTHS, further ones those of rows drawn at random. A prompt
    that leaves no room loses what is too much. Where responses are sampled there are none.
    """
    work, rng = work_of(task, lengths), np.random.default_rng(0)
    table = np.array([row.split("/") for row in LENGTHS.split()], int)
    order = np.concatenate([rng.permutation(len(table)) for _ in range(1 + steps * work.prompts // len(table))])

    def ids(length: int) -> list[int]:
        return rng.integers(3, vocab, length).tolist()

    def row(index: int) -> Row:
        if lengths == "full" and work.new:
            return Row(ids(work.prompt), [])
        if lengths == "full":
            return Row(ids(work.prompt // 2), [ids(work.prompt - work.prompt // 2) for _ in range(work.responses)])
        if work.new:
            return Row(ids(work.prompt if task == "grpo" else min(table[index, 0], work.prompt)), [])
        sizes = np.minimum([*table[index, 1:], *rng.permutation(table[:, 1:].ravel())], work.prompt // 2)
        sizes = sizes[: work.responses]
        return Row(ids(min(table[index, 0], work.prompt - sizes.max())), [ids(size) for size in sizes])

    return [[row(i) for i in order[s * work.prompts : (s + 1) * work.prompts]] for s in range(steps)]


def left_padded(step: list[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts of a step, int32 and bool [prompts, width]."""
    mask = np.array([np.arange(width) >= width - len(row.prompt) for row in step])
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([row.prompt for row in step])
    return tokens, mask


class Clock:
    """Times steps. With `turns` each begins when the parent says so: "ready" goes out, a line comes in."""

    def __init__(self, turns: bool):
        self.turns, self.out = turns, sys.stdout
        self.steps: list[tuple[float, float, float]] = []  # wall and CPU seconds, real tokens

    def begin(self) -> None:
        if self.turns:
            print("ready", file=self.out, flush=True)
            sys.stdin.readline()
        self.start = time.perf_counter(), time.process_time()

    def end(self, tokens: float) -> None:
        """`tokens` that the step generated, or that it trained on."""
        wall, cpu = self.start
        self.steps.append((time.perf_counter() - wall, time.process_time() - cpu, tokens))

    def count(self, tokens: float) -> None:
        """Of the last step, where they are known only after it."""
        self.steps[-1] = (*self.steps[-1][:2], tokens)

    def report(self, args: argparse.Namespace, system: str, version: str, compiles: int | None) -> None:
        """Print the line. `compiles` are those after the warm-up, None where nothing compiles."""
        work, steady = work_of(args.task, args.lengths), self.steps[WARMUP:]
        if len(self.steps) != WARMUP + args.repeats:
            raise RuntimeError(f"measured {len(self.steps)} steps, not {WARMUP + args.repeats}")
        median = statistics.median(wall for wall, _, _ in steady)
        line = {
            "system": system,
            "version": version,
            "task": args.task,
            "model": args.size,
            "lengths": args.lengths,
            "batch": work.sequences,
            "prompt_len": work.prompt,
            "gen_len": work.new,
            "seconds_median": round(median, 4),
            "seconds_min": round(min(wall for wall, _, _ in steady), 4),
            "cpu_seconds_median": round(statistics.median(cpu for _, cpu, _ in steady), 4),
            "seconds": [round(wall, 4) for wall, _, _ in steady],
            "tokens": [round(tokens) for _, _, tokens in steady],
            "tokens_per_s": round(statistics.median(tokens / wall for wall, _, tokens in steady), 1),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "compile_s": round(self.steps[0][0] - median, 2),
            "compiles_after_warmup": compiles,
        }
        print(json.dumps(line), file=self.out, flush=True)


def parse(description: str | None, tasks: tuple[str, ...], sizes: tuple[str, ...] = LLAMAS) -> argparse.Namespace:
    """The options of a peer's program, which has models of these sizes."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--task", choices=tasks, default=tasks[0])
    parser.add_argument("--size", choices=sizes, default="42m")
    parser.add_argument("--lengths", choices=["full", "ragged"], default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turns", action="store_true", help="begin each step at a line of standard input")
    return parser.parse_args()
