"""Toys whose true ("gold") reward is known, for learning tests, notebooks and over-optimisation studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.hosts.files import replace_file
from rlhf_jax.hosts.json_text import json_lines


def label_pairs(
    prompts: Sequence[str],
    responses_a: Sequence[str],
    responses_b: Sequence[str],
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    seed: int,
    noise: float,
) -> list[dict[str, str]]:
    """At most N rows {"prompt", "chosen", "rejected"}, as a rater gives them who errs on a share `noise` of N pairs.

    Larger gold scores are better. Ties in score and identical responses are skipped. Whether pair i is flipped depends
    on `seed` and i alone, so that dropping other pairs does not change it.

    Raises:
        UserError: the five lists differ in length, or `noise` is no probability.
    """
    lengths = [len(column) for column in (prompts, responses_a, responses_b, scores_a, scores_b)]
    if len(set(lengths)) > 1:
        raise UserError(f"prompts, responses and scores have lengths {lengths}; give one of each per comparison")
    if not 0 <= noise <= 1:
        raise UserError(f"noise {noise} is not a probability; set it between 0 and 1")
    flips = np.random.default_rng(seed).random(len(prompts)) < noise
    rows = []
    for prompt, a, b, score_a, score_b, flip in zip(
        prompts, responses_a, responses_b, scores_a, scores_b, flips, strict=True
    ):
        if a == b or score_a == score_b:
            continue
        a_wins = (score_a > score_b) != flip
        rows.append({"prompt": prompt, "chosen": a if a_wins else b, "rejected": b if a_wins else a})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows as JSON lines."""
    replace_file(path, json_lines(rows))
