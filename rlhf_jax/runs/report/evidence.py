"""What a diagnosis is made of: figures in words, and whether a run gained anything."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from rlhf_jax.runs.report.reading import RunData, Series


class Finding(NamedTuple):
    """What is wrong, what shows it, and what helps; `level` is "wrong" or "look"."""

    level: Literal["wrong", "look"]
    title: str
    evidence: str
    cure: str


def move(series: Series, what: str) -> str:
    """The first and last value of a metric, and where its extreme lies."""
    text = f"{what} went from {series.first:.3g} to {series.last:.3g} (steps {span(series)})"
    high, ends = int(np.argmax(series.values)), (series.first, series.last)
    if series.values[high] - max(ends) > 0.2 * max(map(abs, ends)):
        text += f", highest {series.values[high]:.3g} at {series.steps[high]:g}"
    return text


def span(series: Series) -> str:
    """The first and last step."""
    return f"{series.steps[0]:g} to {series.steps[-1]:g}"


def gained(run: RunData) -> Series | None:
    """What the run maximises: reward less the price of the KL, on the rollouts."""
    return run.series("rollout/objective", "rollout/reward")


def improved(run: RunData) -> bool:
    """Whether what the run maximises rose, and the gold reward, if there is one, did not fall."""
    objective, gold = gained(run), run.series("rollout/gold", "eval/gold")
    return objective is not None and objective.rose() and not (gold is not None and gold.fell())


def rate_of(run: RunData) -> str:
    """The learning rate, in words."""
    optim = run.config.get("optim")
    rate = optim.get("learning_rate") if isinstance(optim, dict) else None
    return f"optim.learning_rate {rate:g}" if isinstance(rate, (int, float)) else "optim.learning_rate"


LOWER = "take a tenth of it, and see docs/algorithms.md (Rates); optim.warmup_steps helps at the beginning"
