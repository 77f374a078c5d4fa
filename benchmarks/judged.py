"""A judge as the reward on stories, then distillation of what it made, against PPO by sampled tokens.

    python -m benchmarks.judged --model STORIES_MODEL --output_dir runs/judged

For every seed: REINFORCE++ as in configs/stories_reinforce_pp.yaml, paid by a judge who compares each story with the
base model's to the same opening (`reward.judge`, direct RLAIF: no reward model); that is the teacher. The base model
learns by `distill` from it. So does a student of half the size, the base model's first and last layer after SFT on the
base model's stories (shrink and fine-tune: Shleifer and Rush 2020, arXiv 2010.13002), and beside it the same one by
`ppo` from the judge, with the same rollouts and epochs. Gold of 512 stories to held-out
openings before and after, with the standard error of the difference by opening; `tokens_to_90` is that of
benchmarks.distill. Prints a JSON line per run, appends it to judged.jsonl, goes on with what is missing there, and
ends with a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.distill import by_tokens, reached
from benchmarks.stories import CONFIGS, drawn_from
from benchmarks.studies import Lines, shown
from rlhf_jax import group, ppo, sft
from rlhf_jax.cli.parsing import parse
from rlhf_jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig, SFTArgs, SFTConfig
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.runs.curves import text_table
from rlhf_jax.tasks import stories, write_rows

RUNS = ("judge", "distill", "student, distill", "student, ppo")
OPENINGS, HELD_OUT, DRAWS = 768, 256, 4
BATCH, PROMPT, END = 64, 32, 1  # as in the presets: rows of an iteration, tokens of an opening, the id of an end
JUDGE = ("--reward.judge.function", "rlhf_jax.tasks.stories:judge", "--reward.judge.against", "response")
GOLD = ("--reward.gold", "rlhf_jax.tasks.stories:sentiment")


class Seed:
    """Openings with stories of the base model, the teacher and the student; what an earlier call made is kept."""

    def __init__(self, seed: int, root: Path, model: str):
        self.seed, self.base, self.path = seed, model, root / f"seed_{seed}"
        self.path.mkdir(parents=True, exist_ok=True)
        tokens, every = Tokenizer.load(model).encode_prompt, stories.prompts(2 * OPENINGS, seed)
        rows = [row for row in every if len(tokens(row["prompt"])) <= PROMPT][: OPENINGS + HELD_OUT]
        self.held_out, told = rows[OPENINGS:], self.path / "told.jsonl"
        if not told.exists():
            drawn = drawn_from(model, rows[:OPENINGS], [seed * DRAWS + i for i in range(DRAWS)])
            of_draws = (zip(rows[:OPENINGS], *draw, strict=True) for draw in drawn)
            each = itertools.chain.from_iterable(of_draws)
            write_rows(told, [{**row, "response": text, "finished": ended} for row, text, ended in each])
        self.rows = [json.loads(line) for line in told.read_text().splitlines()]
        write_rows(self.path / "answered.jsonl", self.rows[:OPENINGS])

    def config(self, stage: str, out: str, model: str, *more: str, overwrite: bool = True) -> Any:
        """The preset of a stage for this seed, a directory below its own, and a model that learns."""
        options = {
            "model.path": model, "data.path": self.path / "answered.jsonl", "data.eval_fraction": 0.1,
            "run.output_dir": self.path / out, "run.overwrite": str(overwrite).lower(), "run.seed": self.seed,
            "run.progress": "false", "run.log_every": 1, "run.eval_every": 0,
        }  # fmt: skip
        given = (text for name, value in options.items() for text in (f"--{name}", str(value)))
        return parse(stage, ["--config", str(CONFIGS / f"stories_{stage}.yaml"), *given, *GOLD, *more])

    def judged(self, overwrite: bool) -> str:
        """The directory of the teacher."""
        mute = ("--reward.functions", "[]")
        group.run(self.config("reinforce_pp", "judge", self.base, *JUDGE, *mute, overwrite=overwrite))
        return str(self.path / "judge" / "model")

    def student(self, steps: int) -> str:
        """The directory of a model of half the size that learned the base model's stories."""
        shrink(Path(self.base), self.path / "shrunk")
        config = SFTArgs(
            model=ModelConfig(path=str(self.path / "shrunk"), eos_ids=[END]),
            data=DataConfig(batch_size=BATCH, max_length=112),
            sft=SFTConfig(steps=steps),
            optim=OptimConfig(learning_rate=2e-3),
            run=RunConfig(output_dir=str(self.path / "student"), overwrite=False, seed=self.seed, progress=False),
        )
        sft.run(config, rows=self.rows[:-BATCH], eval_rows=self.rows[-BATCH:])
        return str(self.path / "student" / "model")

    def run(self, name: str, rate: float, iterations: int, steps: int) -> dict[str, Any]:
        """One line about one run."""
        about: dict[str, Any] = {"run": name, "seed": self.seed}
        if name == "judge":
            return {**about, **self.measured(self.base, self.judged(overwrite=True))}
        teacher, out = self.judged(overwrite=False), name.replace(", ", "_")
        before = self.student(steps) if name.startswith("student") else self.base
        if name.endswith("ppo"):
            # No reward model starts the critic and the judge speaks once a story: credit does not fade with tokens.
            price = ("--ppo.kl_controller", "fixed", "--ppo.kl_coef", "0.1", "--ppo.gae_lambda", "1")
            more = ("--reward.model", "", "--ppo.value_init", "zeros", "--ppo.iterations", str(iterations))
            ppo.run(self.config("ppo", out, before, *JUDGE, *price, *more))
        else:
            learn = ("--optim.learning_rate", str(rate), "--distill.epochs", "4")
            more = ("--reward.teacher", teacher, "--distill.iterations", str(iterations))
            group.run(self.config("distill", out, before, *learn, *more))
        # Rollouts are to other openings than those that are held out, and some openings promise more.
        golds = (self.golds(teacher, rows).mean() for rows in (self.held_out, self.rows[:HELD_OUT]))
        about |= {name: round(float(gold), 4) for name, gold in zip(("teacher", "goal"), golds, strict=True)}
        line = self.measured(before, str(self.path / out / "model"))
        return {**about, **line, **by_tokens(self.path / out / "metrics.jsonl", BATCH, about["goal"])}

    def golds(self, model: str, rows: list[dict[str, Any]]) -> np.ndarray:
        """[N] of each opening, the mean of two stories."""
        prompts = [row["prompt"] for row in rows]
        drawn = drawn_from(model, [{"prompt": prompt} for prompt in prompts], [99, 100])
        return np.mean([stories.sentiment(prompts, texts) for texts, _ in drawn], axis=0)

    def measured(self, before: str, after: str) -> dict[str, float]:
        """Gold before and after, and the gain by opening with its standard error."""
        first, last = (self.golds(model, self.held_out) for model in (before, after))
        error = (last - first).std(ddof=1) / len(first) ** 0.5
        found = {"before": first.mean(), "after": last.mean(), "gain": (last - first).mean(), "gain_se": error}
        return {name: round(float(value), 4) for name, value in found.items()}


def shrink(model: Path, out: Path) -> None:
    """A Hugging Face directory of a Llama's first and last layer, with its embedding."""
    shutil.copytree(model, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    renamed = {
        "model.layers.0.": "model.layers.0.",
        f"model.layers.{config['num_hidden_layers'] - 1}.": "model.layers.1.",
    }
    kept = {}
    for name, array in load_file(model / "model.safetensors").items():
        layer = re.match(r"model\.layers\.\d+\.", name)
        if layer is None or layer[0] in renamed:
            kept[renamed[layer[0]] + name[layer.end() :] if layer else name] = array
    save_file(kept, out / "model.safetensors", {"format": "pt"})


def table(lines: list[dict[str, Any]]) -> str:
    """Per run: gold before and after, and the tokens that it took, over the seeds that got there."""
    headers = ["run", "seeds", "teacher", "before", "after", "gain", "share of teacher's", "tokens to 90 %", "reached",
               "fewer than ppo's"]  # fmt: skip
    ppo = {line["seed"]: line["tokens_to_90"] for line in lines if line["run"] == RUNS[-1]}
    rows = []
    for run in RUNS:
        own = [line for line in lines if line["run"] == run]
        columns = [[line[name] for line in own if name in line] for name in ("teacher", "before", "after", "gain")]
        shares = [line["after"] / line["teacher"] for line in own if "teacher" in line]
        got = reached(own) if shares else ["", ""]
        pairs = [(ppo.get(line["seed"]), line.get("tokens_to_90")) for line in own if run.startswith("student, d")]
        fewer = shown([float(a - b) for a, b in pairs if a is not None and b is not None])
        rows += [[run, len(own), *map(shown, columns), shown(shares), *got, fewer]] if own else []
    return text_table(headers, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory of a stories model")
    parser.add_argument("--output_dir", default="runs/judged")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--rate", type=float, default=5e-4, help="of distillation; the others have their presets'")
    parser.add_argument("--iterations", type=int, default=30, help="of 64 stories, of all but the judge's run")
    parser.add_argument("--steps", type=int, default=150, help="of the student's SFT")
    args = parser.parse_args()
    root = Path(args.output_dir)
    lines = Lines(root / "judged.jsonl")
    how = {"rate": args.rate, "iterations": args.iterations, "steps": args.steps}
    runs = [{"run": run} for run in args.runs]
    lines.fill(args.seeds, runs, lambda seed: Seed(seed, root, args.model), partial(Seed.run, **how))
    print("\n" + table(lines.all))


if __name__ == "__main__":
    main()
