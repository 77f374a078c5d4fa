"""Gold and proxy reward against the distance from the reference, d = sqrt(KL), for best-of-n and PPO on stories.

    python -m benchmarks.overoptimization --model STORIES_MODEL --output_dir runs/overoptimization

Gao, Schulman and Hilton 2022 (arXiv 2210.10760) on a scale of two CPU cores: reward models (proxies) from training
sets of several sizes, labelled by the gold reward of `rlhf_jax.tasks.stories` with errors. Best-of-n and PPO maximise
each; the gold reward gained is fitted by R = d (a - b d) for best-of-n and R = d (a - b log d) for PPO (their eq. 1).
Writes a figure, a table, and curves.jsonl, one line per point.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stories import CONFIGS, drawn_from
from rlhf_jax import ppo, reward
from rlhf_jax.advantages import best_of_n_kl
from rlhf_jax.cli.parsing import parse
from rlhf_jax.commands.sample import run_score
from rlhf_jax.config import ModelConfig, ScoreArgs
from rlhf_jax.data.consensus import best_of_n
from rlhf_jax.runs.curves import COLOUR_MAP, text_table
from rlhf_jax.tasks import label_pairs, stories, write_rows

METHODS = ("best-of-n", "PPO")
FITS = {
    "best-of-n": (lambda d: d, lambda a, b: a / (2 * b)),
    "PPO": (np.log, lambda a, b: float(np.exp(a / b - 1))),
}
"""f of R = d (a - b f(d)), and the d at which that is largest."""


@dataclass(frozen=True)
class Curve:
    """Rewards of one method against one proxy, both less those of the reference; equal lengths, in order.

    Attributes:
        size: comparisons that the proxy was trained on.
        d: sqrt of the KL to the reference, nats.
        proxy: in units of its standard deviation on the reference's samples.
        gold: as `stories.sentiment` gives it.
        gold_se: standard error of each gold value.
    """

    method: str
    size: int
    d: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray
    gold_se: np.ndarray

    def fit(self) -> tuple[float, float]:
        """(a, b) of gold = d (a - b f(d)) by least squares."""
        f, _ = FITS[self.method]
        d, gold = self.d[self.d > 0], self.gold[self.d > 0]
        (a, b), *_ = np.linalg.lstsq(np.stack([d, -d * f(d)], axis=1), gold, rcond=None)
        return float(a), float(b)

    def peak(self) -> float | None:
        """The d at which the fitted gold reward is largest, if it has a largest."""
        a, b = self.fit()
        return FITS[self.method][1](a, b) if b > 0 else None

    def ends(self) -> dict[str, float]:
        """Largest and last value of both rewards, means over a tenth of the curve, the last gold's standard error."""
        width = max(len(self.d) // 10, 1)
        smooth = {name: np.convolve(x, np.ones(width) / width, "valid") for name, x in vars(self).items() if name in
                  ("proxy", "gold")}  # fmt: skip
        return {
            "gold_max": float(smooth["gold"].max()),
            "gold_last": float(smooth["gold"][-1]),
            "se": float(np.sqrt((self.gold_se[-width:] ** 2).mean() / width)),
            "proxy_max": float(smooth["proxy"].max()),
            "proxy_last": float(smooth["proxy"][-1]),
        }


def best_of_curve(size: int, proxy: np.ndarray, gold: np.ndarray) -> Curve:
    """Best-of-n of [B, N] scores for n = 1, 2, 4, ..., N, each the mean over all subsets of n of the N samples."""
    ns = 2 ** np.arange(int(np.log2(proxy.shape[1])) + 1)
    golds = np.stack([best_of_n(proxy, gold, n) for n in ns.tolist()], axis=1)
    golds = golds - golds[:, :1]
    proxies = np.array([best_of_n(proxy, proxy, n).mean() for n in ns.tolist()])
    d = np.sqrt(best_of_n_kl(ns))
    se = golds.std(axis=0, ddof=1) / len(golds) ** 0.5
    return Curve("best-of-n", size, d, proxies - proxies[0], golds.mean(axis=0), se)


def ppo_curve(size: int, metrics: Path, rows: int, reference: tuple[float, float, float]) -> Curve:
    """A run's rollouts of `rows` responses; `reference` is the proxy's and the gold mean, and gold's deviation."""
    lines = [line for line in map(json.loads, metrics.read_text().splitlines()) if "rollout/gold" in line]
    kl, proxy, gold = (np.array([line[f"rollout/{name}"] for line in lines]) for name in ("kl", "reward", "gold"))
    se = np.full(len(lines), reference[2] / rows**0.5)
    return Curve("PPO", size, np.sqrt(np.maximum(kl, 0)), proxy - reference[0], gold - reference[1], se)


def comparisons(prompts: list[str], drawn: list[Any], num: int, seed: int) -> list[dict[str, Any]]:
    """`num` rows that the gold reward labels with one error in ten, two samples of a prompt each, in random order."""
    rows = []
    for (a, a_done), (b, b_done) in zip(drawn[::2], drawn[1::2], strict=True):
        golds = stories.sentiment(prompts, a), stories.sentiment(prompts, b)
        cut = {(p, t): done for p, t, done in zip(prompts * 2, a + b, a_done + b_done, strict=True)}
        rows += [
            {**row, "finished": [cut[row["prompt"], row[name]] for name in ("chosen", "rejected")]}
            for row in label_pairs(prompts, a, b, *golds, seed, 0.1)
        ]
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[:num]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    write_rows(path, rows)
    return str(path)


def study(args: argparse.Namespace, path: Path) -> list[Curve]:
    """Every curve; the models and rows that it needs are left in `path`."""
    rows = stories.prompts(args.prompts + 256, args.seed)
    train, held_out = rows[:-256], rows[-256:]
    drawn = drawn_from(args.model, train, [args.seed + i for i in range(8)])
    pairs = comparisons([row["prompt"] for row in train], drawn, max(args.sizes) + 512, args.seed)
    test, pairs = pairs[:512], pairs[512:]
    of_n = drawn_from(args.model, held_out, [1000 + args.seed + i for i in range(args.n)])
    texts = [row["prompt"] for row in held_out]
    golds = np.stack([stories.sentiment(texts, responses) for responses, _ in of_n], axis=1)
    scored = write(path / "samples.jsonl", [
        {"prompt": p, "response": r, "finished": done}
        for responses, finished in of_n for p, r, done in zip(texts, responses, finished, strict=True)
    ])  # fmt: skip
    prompts = write(path / "prompts.jsonl", train)
    common = ["--model.path", args.model, "--run.progress", args.progress, "--run.overwrite", "true"]
    curves = []
    for size in args.sizes:
        where = path / f"reward_model_{size}"
        options = ["--config", str(CONFIGS / "stories_reward.yaml"), *common, "--run.output_dir", str(where),
                   "--data.batch_size", "32", "--reward.steps", str(max(size // 16, 64)),
                   "--run.eval_every", "16"]  # fmt: skip
        reward.run(parse("reward", options), rows=pairs[:size], eval_rows=test)
        model = str(where / "model")
        scores = run_score(ScoreArgs(ModelConfig(path=model, eos_ids=[1]), scored, output=str(path / "scores.jsonl"),
                                    max_prompt_length=32, max_length=96, batch_size=256, overwrite=True))  # fmt: skip
        proxies = np.array([row["score"] for row in scores]).reshape(args.n, -1).T
        curves.append(best_of_curve(size, proxies, golds))
        options = ["--config", str(CONFIGS / "stories_ppo.yaml"), *common, "--data.path", prompts,
                   "--run.output_dir", str(path / f"ppo_{size}"), "--reward.model", model, "--run.log_every", "1",
                   "--ppo.kl_controller", "fixed", "--ppo.kl_coef", str(args.kl_coef), "--run.eval_every", "0",
                   "--ppo.iterations", str(args.iterations), "--run.seed", str(args.seed)]  # fmt: skip
        config = parse("ppo", options)
        ppo.run(config)
        reference = float(proxies.mean()), float(golds.mean()), float(golds.std())
        metrics = path / f"ppo_{size}" / "metrics.jsonl"
        curves.append(ppo_curve(size, metrics, config.data.batch_size, reference))
    return curves


def table(curves: list[Curve]) -> str:
    """Per curve: how far it went, both rewards at their largest and at the end, and the fit."""
    headers = ["method", "comparisons", "last d", "proxy max", "proxy last", "gold max", "gold last", "+-", "a", "b",
               "peak at d"]  # fmt: skip
    rows = []
    for curve in curves:
        (a, b), ends = curve.fit(), curve.ends()
        rows.append([curve.method, curve.size, float(curve.d[-1]), ends["proxy_max"], ends["proxy_last"],
                     ends["gold_max"], ends["gold_last"], ends["se"], a, b, curve.peak()])  # fmt: skip
    return text_table(headers, rows)


def verdict(curves: list[Curve], method: str) -> str:
    """Whether the known shape appears: the proxy keeps rising, gold peaks and falls, later with more data."""
    chosen = sorted((c for c in curves if c.method == method), key=lambda c: c.size)
    ends = [c.ends() for c in chosen]
    falls = [e["gold_max"] - e["gold_last"] > 2 * e["se"] for e in ends]
    rises = [e["proxy_last"] > 0.95 * e["proxy_max"] for e in ends]
    final = [e["gold_last"] for e in ends]
    peaks = [c.peak() for c in chosen]
    moves = all(a is not None and (b is None or b > a) for a, b in itertools.pairwise(peaks))
    sizes = [c.size for c in chosen]

    def which(flags: list[bool]) -> str:
        return ", ".join(str(s) for s, flag in zip(sizes, flags, strict=True) if flag) or "none"

    return (
        f"{method}: the proxy ends at its largest with {which(rises)} comparisons; gold falls from its peak by more "
        f"than two standard errors with {which(falls)}; with more data the fitted peak "
        f"{'moves' if moves else 'does not always move'} to the right, and the last gold reward "
        f"{'rises' if final == sorted(final) else 'does not always rise'}."
    )


def draw(path: Path, curves: list[Curve]) -> None:
    """Two panels, a method each: gold as measured (dots) and fitted (lines), the proxy dashed; a colour per size."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    sizes = sorted({curve.size for curve in curves})
    colours = dict(zip(sizes, colormaps[COLOUR_MAP](np.linspace(0.1, 0.8, len(sizes))), strict=True))
    figure = Figure(figsize=(10.5, 4.6), dpi=150, layout="constrained")
    for axes, method in zip(figure.subplots(1, 2), METHODS, strict=True):
        other = axes.twinx()
        for curve in (c for c in curves if c.method == method):
            colour = colours[curve.size]
            axes.errorbar(curve.d, curve.gold, curve.gold_se, fmt="o", ms=3, lw=0.6, color=colour, alpha=0.5)
            d = np.linspace(1e-3, curve.d.max(), 200)
            (a, b), (f, _) = curve.fit(), FITS[method]
            axes.plot(d, d * (a - b * f(d)), color=colour, lw=2, label=str(curve.size))
            order = np.argsort(curve.d)
            other.plot(curve.d[order], curve.proxy[order], "--", color=colour, lw=1)
        axes.set(xlabel="d = sqrt(KL from the reference), nats$^{1/2}$", ylabel=f"gold reward gained by {method}")
        other.set_ylabel("reward-model reward gained (dashed)")
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(title="comparisons", loc="upper left", frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory of a stories model")
    parser.add_argument("--output_dir", default="runs/overoptimization")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512, 3072], help="comparisons of each proxy")
    parser.add_argument("--prompts", type=int, default=1024, help="for comparisons and PPO")
    parser.add_argument("--n", type=int, default=128, help="samples per prompt for best-of-n")
    parser.add_argument("--iterations", type=int, default=80, help="of PPO")
    parser.add_argument("--kl_coef", type=float, default=0.02, help="price of a nat in PPO, small to go far")
    parser.add_argument("--progress", default="true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = Path(args.output_dir)
    path.mkdir(parents=True, exist_ok=True)
    curves = study(args, path)
    points = []
    for curve in curves:
        columns = ("d", "proxy", "gold", "gold_se")
        for values in zip(*(getattr(curve, name).tolist() for name in columns), strict=True):
            points.append({"method": curve.method, "size": curve.size, **dict(zip(columns, values, strict=True))})
    write(path / "curves.jsonl", points)
    draw(path / "overoptimization.png", curves)
    print("\n" + table(curves))
    for method in METHODS:
        print(verdict(curves, method))
    print(f"figure: {path / 'overoptimization.png'}   points: {path / 'curves.jsonl'}")


if __name__ == "__main__":
    main()
