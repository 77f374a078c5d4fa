"""Gold reward after PPO with n labels, chosen at random or where a reward ensemble doubts, on random walks.

    python -m benchmarks.labels --output_dir runs/labels

For every seed an SFT model; then labels, each of a pair of eight SFT walks from one start, no pair twice. `random`
takes any; so does the first batch of `disagreement` and `top_two`, which in the next ones, of `--batch` labels, ask
the four heads of the reward model of the batches before (`collect --select`), and keep the starts of the most
information. A rater errs one time in ten. After each of `--sizes` labels: a reward model of four heads, PPO against
their mean, gold of its last tenth. With `--own` the batches are the sizes; half of the 16 walks of a start are of the
policy that PPO made of the labels before, in all runs; and that a rater finds two walks equal is learned, too.
Prints a JSON line per run and size, appends it to labels.jsonl, goes on with what is missing there, and ends with a
figure, labels.png, and a table of gold less that of random labels of the same seed and size.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ensembles import measured
from benchmarks.studies import Lines, Walks, from_scratch, shown
from rlhf_jax import reward
from rlhf_jax.commands import quickstart as q
from rlhf_jax.commands.collect import run_collect
from rlhf_jax.config import CollectArgs, ModelConfig, RewardSourceConfig, SourceConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.runs.curves import COLOUR_MAP, text_table
from rlhf_jax.tasks import random_walks as walks

RUNS = ("random", "disagreement", "top_two")
MEMBERS, SAMPLES, NOISE, EPOCHS, STEPS = 4, 8, 0.1, 8, 96


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is the same in all runs of a line: labels of a batch, heat of the walks, PPO's price of a nat, whether
    reward models stand on the SFT model's trunk or on a random one, and whether walks of the policy are labelled and
    ties learned, by heads that draw rows, not starts, in as many steps for any number of labels.
    """

    batch: int = 64
    temperature: float = 1.0
    kl_coef: float = 0.1
    trunk: str = "sft"
    own: bool = False


class Seed(Walks):
    """With the pairs on which its reward models are measured."""

    def __init__(self, seed: int, root: Path, iterations: int, setting: Setting):
        super().__init__(seed, root, iterations=iterations)
        self.held_out, self.setting = self.compared(20, 3, 0.0), setting

    def asked(
        self, run: str, batch: int, number: int, heads: str, policy: str, before: set[tuple[str, str, str]]
    ) -> list[dict[str, Any]]:
        """The pairs of a batch, compared, which a run chooses, none of those `before`, to which they are added.

        `heads` is the model that is asked, `policy` the one whose walks stand beside those of SFT, if there is one.
        """
        select, alone = run if heads else "random", self.setting.own and not policy
        config = CollectArgs(
            model=ModelConfig(path=self.base), num_samples=2 * SAMPLES if alone else SAMPLES, batch_size=1280,
            sources=[SourceConfig("sft", self.base), SourceConfig("policy", policy)] if policy else [],
            sampling=replace(q.SAMPLING, temperature=self.setting.temperature),
            max_prompt_length=q.DATA.max_prompt_length, select=select, most=3 * batch, progress=False, overwrite=True,
            reward=RewardSourceConfig(model=heads if select != "random" else ""),
            seed=1000 * self.config.seed + number, output=str(self.path / f"{run}_asked.jsonl"),
        )  # fmt: skip
        repeats = -(-4 * batch // len(walks.start_prompts()))  # four prompts for each label
        rows = run_collect(config, rows=walks.start_prompts() * repeats)
        of_rows = [(row["prompt"], *sorted(item["text"] for item in row["responses"])) for row in rows]
        new = [pair for pair in dict.fromkeys(of_rows) if pair not in before][:batch]
        before |= {*new}
        prompts, first, second = zip(*new, strict=True)
        rows = walks.comparisons(self.graph, prompts, first, second, config.seed, NOISE)
        golds = zip(self.gold(prompts, first), self.gold(prompts, second), strict=True)
        ties = [pair for pair, (a, b) in zip(new, golds, strict=True) if a == b and self.setting.own]
        return [*rows, *({"prompt": start, "chosen": a, "rejected": b, "votes": [0, 0, 1]} for start, a, b in ties)]

    def reward_model(self, run: str, pairs: list[dict[str, Any]]) -> tuple[str, float]:
        """(directory, accuracy) of four heads on all pairs so far."""
        out = self.path / f"{run}_reward"
        rows = 1 << min(max(len(pairs) // 4, 1).bit_length() - 1, 6)  # a power of two: few programs
        how = {"reward__steps": STEPS, "reward__bootstrap": "rows"} if self.setting.own else {"reward__epochs": EPOCHS}
        config = replace(
            q.reward_stage(self.config, self.path), run__output_dir=str(out), run__overwrite=True, run__eval_every=0,
            reward__members=MEMBERS, data__batch_size=rows,
            **(from_scratch(self.path) if self.setting.trunk == "random" else how),
        )  # fmt: skip
        made = reward.run(config, rows=pairs, eval_rows=self.held_out)
        return str(out / "model"), made["accuracy"]

    def lines(self, run: str, sizes: list[int], there: Callable[[int], bool]) -> Iterator[dict[str, Any]]:
        """One line for each number of labels that is not `there`."""
        pairs, asked, heads, policy = list[dict[str, Any]](), set[tuple[str, str, str]](), "", ""
        by_batch, batch = run != "random" and not self.setting.own, self.setting.batch
        rounds = range(batch, max(sizes) + 1, batch) if by_batch else sorted(sizes)
        for number, (before, labels) in enumerate(itertools.pairwise([0, *rounds])):
            pairs += self.asked(run, labels - before, number, heads, policy, asked)
            heads, accuracy = self.reward_model(run, pairs)
            out = self.path / f"{run}_ppo_{labels}"
            policy = str(out / "model") if self.setting.own else ""
            if labels not in sizes or there(labels):
                continue
            config = replace(
                q.ppo_stage(self.config, self.path), reward__model=heads, run__output_dir=str(out),
                run__overwrite=True, run__eval_every=0, checkpoint__keep_last=1, ppo__kl_coef=self.setting.kl_coef,
            )  # fmt: skip
            self.train(config)
            about = {
                **dataclasses.asdict(self.setting),
                "run": run,
                "labels": labels,
                "asked": len(asked),
                "pairs": len(pairs),
                "seed": self.config.seed,
            }
            yield {**about, "accuracy": accuracy, **measured(out / "metrics.jsonl")}


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


def draw(path: Path, lines: list[dict[str, Any]]) -> None:
    """Gold after PPO by the number of labels: means over the seeds and their standard errors, a colour per run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for run, colour in zip(RUNS, colormaps[COLOUR_MAP](np.linspace(0.1, 0.8, len(RUNS))), strict=True):
        sizes = sorted({line["labels"] for line in lines if line["run"] == run})
        golds = [[x["gold_last"] for x in lines if (x["run"], x["labels"]) == (run, n)] for n in sizes]
        error = [np.std(each, ddof=1) / len(each) ** 0.5 if len(each) > 1 else 0.0 for each in golds]
        if sizes:
            axes.errorbar(
                sizes, [np.mean(each) for each in golds], error, fmt="o-", color=colour, label=run, capsize=3
            )
    axes.set_xscale("log", base=2)
    ticks = sorted({line["labels"] for line in lines})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set(xlabel="labels", ylabel="gold reward after PPO")
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512], help="labels, of whole batches")
    parser.add_argument("--batch", type=int, default=64, help="labels between two reward models")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the walks that are labelled")
    parser.add_argument("--kl_coef", type=float, default=0.1, help="price of a nat in PPO")
    parser.add_argument("--trunk", choices=("sft", "random"), default="sft", help="of a reward model")
    parser.add_argument("--own", action="store_true", help="label the policy's walks too, and learn of ties")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--iterations", type=int, default=40, help="of PPO")
    args = parser.parse_args()
    if not args.own and any(size % args.batch for size in args.sizes):
        parser.error(f"--sizes {args.sizes} are not whole batches of {args.batch}")
    root, setting = Path(args.output_dir), Setting(args.batch, args.temperature, args.kl_coef, args.trunk, args.own)
    lines, same = Lines(root / "labels.jsonl"), dataclasses.asdict(setting)
    for number in args.seeds:
        about = {**same, "seed": number}
        missing = [run for run in args.runs if not all(lines.has(**about, run=run, labels=n) for n in args.sizes)]
        seed = Seed(number, root, args.iterations, setting) if missing else None
        for run in missing:
            assert seed is not None
            there = lambda labels, run=run, about=about: lines.has(**about, run=run, labels=labels)  # noqa: E731
            for line in seed.lines(run, args.sizes, there):
                lines.add(line)
    shown_lines = [line for line in lines.all if same.items() <= line.items()]
    print("\n" + table(shown_lines))
    draw(root / "labels.png", shown_lines)


if __name__ == "__main__":
    main()
