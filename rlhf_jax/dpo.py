"""Direct preference optimisation and its kin: a policy from pairs, without a reward model. Floor 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_jax.config import DPORun
from rlhf_jax.data.batches import collate_preference
from rlhf_jax.data.comparisons import preference_examples
from rlhf_jax.responses import objective, train_policy
from rlhf_jax.stage import Rows

__all__ = ["objective", "run"]


def run(
    config: DPORun,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    loss: Callable[..., Any] | None = None,
) -> Any:
    """Train as configured and write the run directory; returns its summary.

    `rows` and `eval_rows` (lists of dicts) replace the config's files, `loss` its loss.
    """
    pairs = lambda examples: collate_preference  # noqa: E731
    return train_policy(
        "dpo", config, config.dpo, preference_examples, pairs, loss=loss, rows=rows, eval_rows=eval_rows
    )
