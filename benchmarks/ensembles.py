"""Whether ensembles and limits keep PPO from exploiting a reward model of few comparisons, on random walks.

    python -m benchmarks.ensembles --output_dir runs/ensembles

Coste et al. 2023 (arXiv 2310.02743) on a scale of two CPU cores. Reward models from comparisons as in the quickstart,
of SFT's walks with others, as likely and hotter ones, by a rater who errs one time in ten; PPO with a small price on
the KL, so that it goes far; the gold reward, which no run sees, at the end against its own peak, both means over a
tenth of the run. `--seeds` have a graph each. Prints a JSON line per run and appends it to ensembles.jsonl, goes on
with what is missing there, and ends with a table, and with one of what `ppo.kl_budget` (`--budgets`) would have kept
of the same runs, were every iteration an evaluation: up to where it ends a run, that run is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies import Lines, Walks, from_scratch, shown, with_gold
from rlhf_jax import reward
from rlhf_jax.commands import quickstart as q
from rlhf_jax.config.functions import replace
from rlhf_jax.runs.curves import text_table

MEMBERS, EPOCHS = 4, 8


@dataclasses.dataclass(frozen=True)
class Reward:
    """What a run of PPO is paid.

    Attributes:
        changes: of its config.
        members: reward models, or their heads.
        heads: on one trunk.
        own: half of the comparisons are of the policy's own walks, which learned from the other half (price .1).
        random: the models' trunks have random values, not the SFT model's.
    """

    changes: dict[str, Any]
    members: int = MEMBERS
    heads: bool = False
    own: bool = False
    random: bool = False


MEAN, MIN, SINGLE = ({"reward__combine": "mean"}, {"reward__combine": "min"}, dict[str, Any]())
LOWER = {"reward__combine": "lower_bound", "reward__combine_coef": 2.0}
RUNS = {
    "single": Reward(SINGLE, 1),
    "mean": Reward(MEAN),
    "min": Reward(MIN),
    "lower_bound": Reward(LOWER),
    "heads mean": Reward(MEAN, heads=True),
    "heads lower_bound": Reward(LOWER, heads=True),
    "single, kl_budget": Reward({"ppo__kl_budget": 3.0}, 1),
    "single, clip": Reward({"ppo__reward_standardize": "mean_std", "ppo__reward_clip": 2.0}, 1),
    "mean, disagreement": Reward({**MEAN, "ppo__disagreement_budget": 2.0}),
    "single, own walks": Reward(SINGLE, 1, own=True),
    "lower_bound, own walks": Reward(LOWER, own=True),
    "lower_bound, random trunks": Reward(LOWER, random=True),
    "lower_bound of 8": Reward(LOWER, 8),
    "lower_bound of 8, own walks": Reward(LOWER, 8, own=True),
}


class Seed(Walks):
    """With the reward models that runs ask for."""

    def __init__(self, seed: int, root: Path, iterations: int):
        super().__init__(seed, root, iterations=iterations)
        self.held_out, self._pairs = self.compared(20, 3, 0.0), dict[tuple[int, bool], list[dict[str, str]]]()

    def pairs(self, size: int, own: bool = False) -> list[dict[str, str]]:
        """`size` comparisons in random order, of the SFT model's walks; the `own` half behind the others."""
        if (size, own) not in self._pairs:
            before, policy, count = list[dict[str, str]](), self.base, size
            if own:
                count = size // 2
                before, policy = self.pairs(count), self.policy(count)
            rows = q.collect(self.graph, policy, replace(self.config, comparisons=3 * count), int(own))
            order = np.random.default_rng(self.config.seed).permutation(len(rows))[:count]
            self._pairs[size, own] = [*before, *(rows[i] for i in order)]
        return self._pairs[size, own]

    def policy(self, size: int) -> str:
        """The directory of one that learned from a single model of so many comparisons."""
        out, model = self.path / f"policy_{size}", self.reward_model(size, RUNS["single"], 0)[0]
        config = replace(
            q.ppo_stage(self.config, self.path), reward__model=model, run__output_dir=str(out),
            run__overwrite=False, run__eval_every=0, checkpoint__keep_last=1,
        )  # fmt: skip
        self.train(config)
        return str(out / "model")

    def reward_model(self, size: int, of: Reward, member: int) -> tuple[str, float]:
        """(directory, accuracy) of a member, whose first head and order of rows are its own, or of all the heads."""
        sort = "_".join(["own"] * of.own + ["random"] * of.random + [""])
        name = f"reward_{sort}{size}_{'heads' if of.heads else member}"
        config = replace(
            q.reward_stage(self.config, self.path), run__output_dir=str(self.path / name), run__overwrite=False,
            run__seed=1000 * self.config.seed + member, run__eval_every=0,
            reward__members=of.members if of.heads else 1,
            **(from_scratch(self.path) if of.random else {"reward__epochs": EPOCHS}),
        )  # fmt: skip
        made = reward.run(config, rows=self.pairs(size, of.own), eval_rows=self.held_out)
        return str(self.path / name / "model"), made["accuracy"]

    def run(self, name: str, size: int, kl_coef: float) -> dict[str, Any]:
        """One line about one run of PPO."""
        of = RUNS[name]
        members = range(1 if of.heads else of.members)
        models, accuracy = zip(*(self.reward_model(size, of, member) for member in members), strict=True)
        out = self.path / directory_of(name, size, kl_coef)
        config = replace(
            q.ppo_stage(self.config, self.path), reward__model="", reward__models=list(models), ppo__kl_coef=kl_coef,
            run__output_dir=str(out), run__overwrite=True, run__eval_every=10, checkpoint__keep_last=1, **of.changes,
        )  # fmt: skip
        made = self.train(config)
        about = {"run": name, "size": size, "kl_coef": kl_coef, "seed": self.config.seed}
        about["accuracy"] = float(np.mean(accuracy))
        kept = {f"kept_{n}": made["after"][f"eval/{n}"] for n in ("gold", "kl")}
        return {**about, **measured(out / "metrics.jsonl"), **kept, "iterations": made["iterations"]}


def directory_of(name: str, size: int, kl_coef: float) -> str:
    """Of a run, below its seed's."""
    return f"{name.replace(',', '').replace(' ', '_')}_{size}_{kl_coef:g}"


def smoothed(values: list[float]) -> np.ndarray:
    """Means over a tenth of a run."""
    width = max(len(values) // 10, 1)
    return np.convolve(values, np.ones(width) / width, "valid")


def fallen(golds: list[float]) -> float:
    """The end less the peak, means over a tenth of a run: the peak is where every other iteration has it, and what is
    there and at the end is measured in those between, both ways, so that luck in the one does not count in the other.
    """
    halves = [smoothed(golds[start : len(golds) // 2 * 2 : 2]) for start in (0, 1)]
    return float(np.mean([there[-1] - there[found.argmax()] for found, there in (halves, halves[::-1])]))


def budgeted(root: Path, lines: list[dict[str, Any]], budgets: list[float]) -> str:
    """Per price, run and budget: gold of the rollout that is kept, the best of those before the KL was above."""
    headers = [
        "comparisons",
        "kl_coef",
        "run",
        "budget",
        "seeds",
        "ended at",
        "kept gold",
        "less the whole run's peak",
    ]
    rows = []
    for size, price, name in sorted({(line["size"], line["kl_coef"], line["run"]) for line in lines}):
        seeds = [line["seed"] for line in lines if (line["size"], line["kl_coef"], line["run"]) == (size, price, name)]
        files = [root / f"seed_{seed}" / directory_of(name, size, price) / "metrics.jsonl" for seed in seeds]
        runs = [with_gold(file) for file in files if file.exists()]
        for budget in budgets if runs else []:
            ends, kept, less = list[float](), list[float](), list[float]()
            for run in runs:
                kl, gold, proxy = ([line[f"rollout/{n}"] for line in run] for n in ("kl", "gold", "reward"))
                end = next((i for i, value in enumerate(kl) if value > budget), len(run))
                ends.append(end)
                kept.append(gold[int(np.argmax(proxy[:end]))])
                less.append(kept[-1] - smoothed(gold).max())
            rows.append([size, price, name, budget, len(runs), shown(ends), shown(kept), shown(less)])
    return text_table(headers, rows)


def measured(metrics: Path) -> dict[str, float]:
    """Gold and proxy at their peak and at the end, means over a tenth of the run; the distance d = sqrt(KL) there."""
    lines = with_gold(metrics)
    smooth = {
        name: smoothed([line.get(f"rollout/{key}", 0.0) for line in lines])
        for name, key in (("gold", "gold"), ("proxy", "reward"), ("kl", "kl"), ("apart", "reward_disagreement"))
    }
    peak, d = int(smooth["gold"].argmax()), np.sqrt(np.maximum(smooth["kl"], 0))
    numbers = {
        "gold_first": smooth["gold"][0], "gold_peak": smooth["gold"][peak], "gold_last": smooth["gold"][-1],
        "proxy_peak": smooth["proxy"].max(), "proxy_last": smooth["proxy"][-1], "d_peak": d[peak], "d_last": d[-1],
        "apart_first": smooth["apart"][0], "apart_last": smooth["apart"][-1],
        "fallen": fallen([line["rollout/gold"] for line in lines]),
    }  # fmt: skip
    return {name: round(float(value), 4) for name, value in numbers.items()}


def table(lines: list[dict[str, Any]]) -> str:
    """Per size, price and run: gold at the end, less its own peak, and less that of the same seed's single model."""
    headers = ["comparisons", "kl_coef", "run", "seeds", "accuracy", "gold, last", "last - peak", "fallen",
               "last - single's", "kept gold", "last d", "disagreement"]  # fmt: skip
    rows = []
    for size, price in sorted({(line["size"], line["kl_coef"]) for line in lines}):
        of_size = [line for line in lines if (line["size"], line["kl_coef"]) == (size, price)]
        single = {line["seed"]: line["gold_last"] for line in of_size if line["run"] == "single"}
        for name in [name for name in RUNS if any(line["run"] == name for line in of_size)]:
            own = [line for line in of_size if line["run"] == name]
            paired = [line["gold_last"] - single[line["seed"]] for line in own if line["seed"] in single]
            rows.append([
                size, price, name, len(own), shown([x["accuracy"] for x in own]), shown([x["gold_last"] for x in own]),
                shown([x["gold_last"] - x["gold_peak"] for x in own]),
                shown([x["fallen"] for x in own if "fallen" in x]), shown(paired),
                shown([x["kept_gold"] for x in own]), shown([x["d_last"] for x in own]),
                f"{np.mean([x['apart_first'] for x in own]):.2f}, {np.mean([x['apart_last'] for x in own]):.2f}",
            ])  # fmt: skip
    return text_table(headers, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/ensembles")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 3072], help="comparisons of a reward model")
    parser.add_argument("--runs", nargs="+", choices=[*RUNS], default=[*RUNS])
    parser.add_argument("--iterations", type=int, default=60, help="of PPO")
    parser.add_argument("--kl_coef", type=float, default=0.01, help="price of a nat in PPO, small to go far")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.5, float("inf")])
    args = parser.parse_args()
    root = Path(args.output_dir)
    lines = Lines(root / "ensembles.jsonl")
    runs = [{"run": run, "size": size, "kl_coef": args.kl_coef} for size in args.sizes for run in args.runs]
    lines.fill(args.seeds, runs, lambda seed: Seed(seed, root, args.iterations), Seed.run)
    print("\n" + table(lines.all))
    print("\n" + budgeted(root, lines.all, args.budgets))


if __name__ == "__main__":
    main()
