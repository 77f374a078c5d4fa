"""What the studies on random walks share: a seed's graph and SFT model, and lines that a second call goes on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from rlhf_jax import group, ppo, sft
from rlhf_jax.commands import quickstart as q
from rlhf_jax.config import ArchConfig, DistillArgs, ModelConfig, PPOArgs, QuickstartArgs, RunConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.online import loop
from rlhf_jax.online.programs import Programs
from rlhf_jax.tasks import random_walks as walks

T = TypeVar("T")
GRAPHS: list[walks.Graph] = []
"""Of every `Walks` that was made."""


def judge(prompt: str, a: str, b: str) -> float:
    """`random_walks.preference` on the graph of the last `Walks`: a judge by name."""
    return walks.preference(GRAPHS[-1], prompt, a, b)


class Walks:
    """A graph and its SFT model, as in the quickstart; what an earlier call made is taken as it is.

    Attributes:
        made: the summary of SFT.
        base: the directory of the SFT model.
        demos: random walks, of which the last 100 are held out.
        gold: a walk's optimality, as a reward function.
    """

    def __init__(self, seed: int, root: Path, *, arch: ArchConfig = q.ARCH, **options: Any):
        """`options` are settings of the quickstart, such as the iterations of PPO."""
        self.path = root / f"seed_{seed}"
        self.config = QuickstartArgs(str(self.path), seed=seed, progress=False, **options)
        self.graph = walks.make_graph(seed)
        GRAPHS.append(self.graph)
        self.gold = partial(walks.optimality, self.graph)
        walks.make_tokenizer().save_pretrained(self.path / "tokenizer")
        self.demos = walks.demonstrations(self.graph, 1100, seed)
        self.made = self.fit(arch, "sft")
        self.base = str(self.path / "sft" / "model")

    def fit(self, arch: ArchConfig, name: str) -> dict[str, Any]:
        """SFT of a model of a shape in a directory of the seed's; its summary."""
        place = {"run__output_dir": str(self.path / name), "run__overwrite": False}
        changes = {"model__arch": arch, "run__eval_every": 0, **place}
        config = replace(q.sft_stage(self.config, self.path), **changes)
        return sft.run(config, rows=self.demos[:1000], eval_rows=self.demos[1000:])

    def compared(self, num_each: int, offset: int, noise: float) -> list[dict[str, str]]:
        """Two walks of SFT from each start so many times, compared by a rater who errs."""
        seed = self.config.seed
        prompts, first = q.sample_walks(self.base, num_each, seed + offset)
        _, second = q.sample_walks(self.base, num_each, seed + offset + 1)
        return walks.comparisons(self.graph, prompts, first, second, seed, noise)

    def prompts(self) -> dict[str, Any]:
        """{rows, eval_rows} of PPO and its kin."""
        return {"rows": walks.start_prompts() * 32, "eval_rows": walks.start_prompts() * 6}

    def train(self, config: PPOArgs | DistillArgs, **rows: Any) -> dict[str, Any]:
        """A run of PPO or of distillation on these prompts, or on `rows`, which logs gold; its summary."""
        name, setup = ("ppo", ppo.train.setup) if isinstance(config, PPOArgs) else ("distill", group.train.setup)
        return loop.run(name, config, reusing(setup), **(rows or self.prompts()), gold=self.gold)


def from_scratch(path: Path) -> dict[str, Any]:
    """Changes of a reward model's config: its trunk has random values, so that it knows what comparisons say alone."""
    trunk = ModelConfig(arch=q.ARCH, tokenizer=str(path / "tokenizer"))
    return {"model": trunk, "reward__epochs": 20, "optim__learning_rate": 2e-3}


COMPILED: dict[str, Programs] = {}
"""The programs of earlier runs, by all that decides them."""


def reusing(setup: Callable[..., Any]) -> Callable[..., Any]:
    """A `setup` of a method whose runs that differ in weights, seed and directory alone share compiled programs."""

    def made(config: Any, **sources: Any) -> Any:
        method, first = setup(config, **sources)
        none = {"model": "", "models": [], "teacher": ""}
        reward = dataclasses.replace(config.reward, **none)
        what = dataclasses.replace(config, model=ModelConfig(), reward=reward, run=RunConfig())
        nets = method.nets
        shapes = jax.tree.map(np.shape, (first.state.params, nets.ref, nets.reward, nets.teacher))
        programs = COMPILED.setdefault(f"{what} {shapes}", method.programs)
        return dataclasses.replace(method, programs=programs), first

    return made


class Lines:
    """The results of a study: JSON lines in a file, where an earlier call may have left some."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.all = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, **about: object) -> bool:
        """Whether there is a line that says so."""
        return any(about.items() <= line.items() for line in self.all)

    def add(self, line: dict[str, Any]) -> None:
        """A further line, into the file and printed."""
        self.all.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def fill(
        self,
        seeds: Sequence[int],
        runs: Sequence[dict[str, Any]],
        make: Callable[[int], T],
        line: Callable[..., dict[str, Any]],
    ) -> None:
        """Add `line(made, *about.values())` of every seed and each `about` of `runs` that has none.

        `make(seed)` is what a seed's runs share; it is made only where one of them is missing.
        """
        for seed in seeds:
            missing = [about for about in runs if not self.has(seed=seed, **about)]
            if missing:
                made = make(seed)
                for about in missing:
                    self.add(line(made, *about.values()))


def shown(values: list[float]) -> str:
    """Mean and, of several, its standard error."""
    error = f" +- {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{error}" if values else ""


def with_gold(metrics: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics that have the gold reward of rollouts."""
    return [line for line in map(json.loads, metrics.read_text().splitlines()) if "rollout/gold" in line]
