"""RRHF: a policy whose log-probs rank responses as the raters do, and that imitates the best. Floor 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rlhf_jax.config import RRHFRun
from rlhf_jax.data.batches import Collate, collate_ranking
from rlhf_jax.data.comparisons import ranking_examples
from rlhf_jax.responses import objective, train_policy
from rlhf_jax.stage import Rows

__all__ = ["collate_for", "objective", "run"]


def collate_for(examples: Sequence[Any]) -> Collate:
    """What makes batches of rankings; K is the most responses that one of `examples` has."""
    return partial(collate_ranking, width=max(len(example["responses"]) for example in examples))


def run(
    config: RRHFRun,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    loss: Callable[..., Any] | None = None,
) -> Any:
    """As `dpo.run`, on rankings of several responses to a prompt; preferences are rankings of two."""
    return train_policy(
        "rrhf", config, config.rrhf, ranking_examples, collate_for, loss=loss, rows=rows, eval_rows=eval_rows
    )
