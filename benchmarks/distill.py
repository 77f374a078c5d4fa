"""On-policy distillation against PPO, by sampled tokens: a student of half the size, on random walks.

    python -m benchmarks.distill --output_dir runs/distill

For every seed a teacher: SFT, a reward model of comparisons and PPO as in the quickstart; and an SFT student of half
the width. Then the student learns by `distill` from the teacher (discount 0 and 1; forward KL and Jensen-Shannon), by
`ppo` from the reward model, or by `ppo` from a judge who compares its walks with SFT's (`reward.judge`, direct RLAIF),
with the same rollouts and epochs; gold of its own rollouts by the tokens that it has sampled. `tokens_to_90` is the
first number of tokens after which the mean gold of five iterations is at least 0.9 times the teacher's; null if it
never is. Prints a JSON line per run, appends it to distill.jsonl, goes on with what is missing there, and ends with a
table.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies import Lines, Walks, shown, with_gold
from rlhf_jax import reward
from rlhf_jax.commands import quickstart as q
from rlhf_jax.config import DISTILL, DistillArgs, RewardJudgeConfig, RewardSourceConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.runs.curves import text_table

RUNS = ("distill", "distill, discount 1", "distill, forward_kl", "distill, jsd", "ppo", "judge")
SMALL = dataclasses.replace(q.ARCH, width=32, ffn_width=88, num_heads=2, num_kv_heads=2)
SMOOTH = 5


class Seed(Walks):
    """With a teacher, the reward model that it learned from, and a student."""

    def __init__(self, seed: int, root: Path, iterations: int):
        super().__init__(seed, root, iterations=iterations)
        self.fit(SMALL, "student")
        pairs, path = q.collect(self.graph, self.base, self.config, 0), self.path
        kept = {"run__overwrite": False}
        reward.run(replace(q.reward_stage(self.config, path), **kept), rows=pairs[:-200], eval_rows=pairs[-200:])
        made = self.train(replace(q.ppo_stage(self.config, path), **kept))
        self.teacher, self.teacher_gold = str(path / "ppo" / "model"), made["after"]["eval/gold"]

    def run(self, name: str) -> dict[str, Any]:
        """One line about one student."""
        out = self.path / f"student_{name}".replace(", ", "_").replace(" ", "_")
        like = q.ppo_stage(self.config, self.path)
        changes = {
            "model__path": str(self.path / "student" / "model"), "run__output_dir": str(out), "run__overwrite": True,
            "run__log_every": 1, "run__eval_every": 0, "run__keep_best": False,
        }  # fmt: skip
        if name == "ppo":
            # Its critic is a model of the student's own shape: the reward model has the teacher's.
            self.train(replace(like, ppo__value_init="zeros", **changes))
        elif name == "judge":
            judged = RewardJudgeConfig(function="benchmarks.studies:judge", against="response")
            config = replace(like, reward=RewardSourceConfig(judge=judged), ppo__value_init="zeros", **changes)
            train, held_out = (self.answered(num, seed) for num, seed in ((32, 7), (6, 8)))
            self.train(config, rows=train, eval_rows=held_out)
        else:
            divergence = next((how for how in ("forward_kl", "jsd") if how in name), "reverse_kl")
            same = {"iterations": self.config.iterations, "epochs": like.ppo.epochs}
            config = DistillArgs(
                model=like.model, data=like.data, sampling=like.sampling, optim=like.optim, run=like.run,
                reward=RewardSourceConfig(teacher=self.teacher, teacher_divergence=divergence),
                distill=replace(DISTILL, discount=float("discount" in name), **same),
            )  # fmt: skip
            self.train(replace(config, **changes))
        tokens = by_tokens(out / "metrics.jsonl", like.data.batch_size, self.teacher_gold)
        return {"run": name, "seed": self.config.seed, "teacher": self.teacher_gold, **tokens}

    def answered(self, num_each: int, seed: int) -> list[dict[str, str]]:
        """Prompts with a walk of the SFT model."""
        prompts, walked = q.sample_walks(self.base, num_each, self.config.seed + seed)
        return [{"prompt": prompt, "response": walk} for prompt, walk in zip(prompts, walked, strict=True)]


def by_tokens(metrics: Path, rows: int, teacher: float) -> dict[str, Any]:
    """Gold at first and at the end, tokens sampled in all, and up to nine tenths of the teacher's gold.

    `rows` is how many an iteration samples.
    """
    lines = with_gold(metrics)
    tokens = np.cumsum([rows * line["rollout/response_length"] for line in lines])
    smooth = np.convolve([line["rollout/gold"] for line in lines], np.ones(SMOOTH) / SMOOTH, "valid")
    there = np.flatnonzero(smooth >= 0.9 * teacher)
    first = int(tokens[there[0] + SMOOTH - 1]) if len(there) else None
    return {
        "gold_first": round(lines[0]["rollout/gold"], 4), "gold_last": round(float(smooth[-1]), 4),
        "tokens": int(tokens[-1]), "tokens_to_90": first,
    }  # fmt: skip


def reached(lines: list[dict[str, Any]]) -> list[str]:
    """The tokens that runs took, of those that got there, and how many did."""
    there = [float(line["tokens_to_90"]) for line in lines if line["tokens_to_90"] is not None]
    return [shown(there), f"{len(there)} of {len(lines)}"]


def table(lines: list[dict[str, Any]]) -> str:
    """Per run: gold of teacher and student, and the tokens that it took, over the seeds that got there."""
    headers = [
        "run",
        "seeds",
        "teacher",
        "gold, first",
        "gold, last",
        "share of teacher's",
        "tokens to 90 %",
        "reached",
    ]
    rows = []
    for run in RUNS:
        own = [line for line in lines if line["run"] == run]
        if not own:
            continue
        shares = [line["gold_last"] / line["teacher"] for line in own]
        columns = ([line[name] for line in own] for name in ("teacher", "gold_first", "gold_last"))
        rows.append([run, len(own), *map(shown, columns), shown(shares), *reached(own)])
    return text_table(headers, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/distill")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--iterations", type=int, default=60, help="of the teacher's PPO and of every student")
    args = parser.parse_args()
    root = Path(args.output_dir)
    lines = Lines(root / "distill.jsonl")
    lines.fill(
        args.seeds, [{"run": run} for run in args.runs], lambda seed: Seed(seed, root, args.iterations), Seed.run
    )
    print("\n" + table(lines.all))


if __name__ == "__main__":
    main()
