"""Gold reward after PPO with n labels, chosen at random or where a reward ensemble doubts, on random walks.

    python -m benchmarks.labels --output_dir runs/labels

For every seed an SFT model; then labels in batches of `--batch`, each a pair of eight SFT walks from one start. The
first batch is random in every run; in the next ones `random` takes any pairs of any starts, `disagreement` and
`top_two` ask the four heads of the reward model of the batches before (`collect --select`), and keep the starts of the
most information. A rater errs one time in ten. After each of `--sizes` labels: a reward model of four heads, PPO
against their mean, gold of its last tenth. Prints a JSON line per run and size, appends it to labels.jsonl, goes on
with what is missing there, and ends with a table of gold less that of random labels of the same seed and size.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.ensembles import measured
from benchmarks.studies import Lines, Walks, shown
from rlhf_jax import ppo, reward
from rlhf_jax.commands import quickstart as q
from rlhf_jax.commands.collect import run_collect
from rlhf_jax.config import CollectArgs, ModelConfig, RewardSourceConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.runs.curves import text_table
from rlhf_jax.tasks import random_walks as walks

RUNS = ("random", "disagreement", "top_two")
MEMBERS, SAMPLES, NOISE = 4, 8, 0.1


class Seed(Walks):
    """With the pairs on which its reward models are measured."""

    def __init__(self, seed: int, root: Path, iterations: int):
        super().__init__(seed, root, iterations=iterations)
        self.held_out = self.compared(20, 3, 0.0)

    def asked(self, run: str, batch: int, number: int, heads: str) -> list[dict[str, str]]:
        """The pairs of a batch, compared, which a run chooses; `heads` is the model that is asked, if there is one."""
        select = run if heads else "random"
        config = CollectArgs(
            model=ModelConfig(path=self.base), sampling=q.SAMPLING, num_samples=SAMPLES, batch_size=1280,
            max_prompt_length=q.DATA.max_prompt_length, select=select, most=batch, progress=False, overwrite=True,
            reward=RewardSourceConfig(model=heads if select != "random" else ""),
            seed=1000 * self.config.seed + number, output=str(self.path / f"{run}_asked.jsonl"),
        )  # fmt: skip
        repeats = -(-4 * batch // len(walks.start_prompts()))  # four prompts for each label
        rows = run_collect(config, rows=walks.start_prompts() * repeats)
        pairs = [[item["text"] for item in row["responses"]] for row in rows]
        first, second = zip(*pairs, strict=True)
        prompts = [row["prompt"] for row in rows]
        return walks.comparisons(self.graph, prompts, first, second, config.seed, NOISE)

    def reward_model(self, run: str, pairs: list[dict[str, str]]) -> tuple[str, float]:
        """(directory, accuracy) of four heads on all pairs so far."""
        out = self.path / f"{run}_reward"
        config = replace(q.reward_stage(self.config, self.path), run__output_dir=str(out), run__overwrite=True,
                         reward__members=MEMBERS)  # fmt: skip
        made = reward.run(config, rows=pairs, eval_rows=self.held_out)
        return str(out / "model"), made["accuracy"]

    def lines(self, run: str, sizes: list[int], batch: int) -> list[dict[str, Any]]:
        """One line for each number of labels."""
        pairs, heads, found = list[dict[str, str]](), "", []
        for number in range(-(-max(sizes) // batch)):
            pairs += self.asked(run, batch, number, heads)
            heads, accuracy = self.reward_model(run, pairs)
            labels = (number + 1) * batch
            if labels not in sizes:
                continue
            out = self.path / f"{run}_ppo_{labels}"
            config = replace(
                q.ppo_stage(self.config, self.path), reward__model=heads, run__output_dir=str(out),
                run__overwrite=True, run__eval_every=0, checkpoint__keep_last=1,
            )  # fmt: skip
            ppo.run(config, **self.prompts(), gold=self.gold)
            about = {"run": run, "labels": labels, "pairs": len(pairs), "seed": self.config.seed}
            found.append({**about, "accuracy": accuracy, **measured(out / "metrics.jsonl")})
        return found


def table(lines: list[dict[str, Any]]) -> str:
    """Per number of labels and run: gold at the end, and less that of random labels of the same seed."""
    headers = ["labels", "run", "seeds", "accuracy", "gold, last", "less random's", "less that of 2x random"]
    golds = {(line["run"], line["labels"], line["seed"]): line["gold_last"] for line in lines}
    rows = []
    for labels in sorted({line["labels"] for line in lines}):
        for run in RUNS:
            own = [line for line in lines if (line["run"], line["labels"]) == (run, labels)]
            less = [[line["gold_last"] - golds["random", labels * times, line["seed"]] for line in own
                     if ("random", labels * times, line["seed"]) in golds] for times in (1, 2)]  # fmt: skip
            told = ([line[name] for line in own] for name in ("accuracy", "gold_last"))
            rows += [[labels, run, len(own), *map(shown, told), *map(shown, less)]] if own else []
    return text_table(headers, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024], help="labels, of whole batches")
    parser.add_argument("--batch", type=int, default=64, help="labels between two reward models")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--iterations", type=int, default=40, help="of PPO")
    args = parser.parse_args()
    if any(size % args.batch for size in args.sizes):
        parser.error(f"--sizes {args.sizes} are not whole batches of {args.batch}")
    root = Path(args.output_dir)
    lines = Lines(root / "labels.jsonl")
    for number in args.seeds:
        missing = [run for run in args.runs if not all(lines.has(seed=number, run=run, labels=n) for n in args.sizes)]
        seed = Seed(number, root, args.iterations) if missing else None
        for run in missing:
            assert seed is not None
            for line in seed.lines(run, args.sizes, args.batch):
                if not lines.has(seed=number, run=run, labels=line["labels"]):
                    lines.add(line)
    print("\n" + table(lines.all))


if __name__ == "__main__":
    main()
