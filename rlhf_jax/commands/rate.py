"""`rlhf-jax rate`: simulated raters of responses, whose taste is a Python function and who err."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.commands.sample import print_rows
from rlhf_jax.config import ModelConfig, RateArgs, resolve
from rlhf_jax.data.ballots import Ranking
from rlhf_jax.data.chat import in_transcript
from rlhf_jax.data.consensus import consensus_ranks
from rlhf_jax.data.encoding import mark_of
from rlhf_jax.data.messages import text_of
from rlhf_jax.data.pairs import answer_fields
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.sources import rankings_given
from rlhf_jax.hosts.outputs import check_output
from rlhf_jax.inference.reward_functions import call_reward, columns_for
from rlhf_jax.inference.scoring import function_inputs
from rlhf_jax.models.loading import load_tokenizer
from rlhf_jax.types import RewardFn

TIMEOUT, RETRIES = 600.0, 0
"""Seconds that a call of the function may take, and further attempts."""


def run(config: RateArgs, *, rows: object = None, function: RewardFn | None = None) -> list[Row]:
    """Rate as configured, write or print the rows, and return them; `rows` and `function` replace the config's.

    Rater r sees value + noise * std(values) * e, e from N(0, 1), anew for every response of every row.
    """
    check_output(config.output, overwrite=config.overwrite)
    labelled, dropped = rankings_given(config.path if rows is None else rows, config.fields)
    given = [one for one in labelled if len(one.responses) > 1 or config.verdict == "rating"]
    dropped += len(labelled) - len(given)  # a label of one answer ranks nothing
    if not given:
        raise UserError(f"none of {dropped} rows has two responses to rate; give ranking or preference rows")
    values = values_of(function or resolve(config.function), given, config.tokenizer)
    errors = np.random.default_rng(config.seed).standard_normal((len(values), config.raters))
    seen = values[:, None] + config.noise * values.std() * errors
    if config.verdict == "rating":
        seen = levels(seen, values.min(), values.max(), config.levels)
    parts = np.split(seen, np.cumsum([len(one.responses) for one in given])[:-1])
    make = ratings_of if config.verdict == "rating" else ranked_of
    out = [row for one, part in zip(given, parts, strict=True) for row in make(one, part)]
    print_rows(out, config.output)
    mark = mark_of(dropped, len(given) + dropped)
    counted = f"{mark}rate: {len(given)} rows, {dropped} dropped, {config.raters} raters; {len(out)} rows"
    tell(f"{counted}, {config.output}" if config.output else counted, error=not config.output)
    return out


def values_of(function: RewardFn, given: Sequence[Ranking], tokenizer: str) -> np.ndarray:
    """float64, what a function says of all responses; `tokenizer` is a directory whose template writes prompts."""
    shown = load_tokenizer(ModelConfig(tokenizer=tokenizer)).prompt_text if tokenizer else in_transcript
    prompts, fields, where = zip(*((one.prompt, one.fields, one.where) for one in given), strict=True)
    own = columns_for([function], prompts, fields, where)
    rows = [
        {"shown": shown(one.prompt), "response": text_of(response), "columns": columns}
        for one, columns in zip(given, own, strict=True)
        for response in one.responses
    ]
    return call_reward(function, *function_inputs(rows), timeout=TIMEOUT, retries=RETRIES)


def levels(seen: np.ndarray, low: float, high: float, count: int) -> np.ndarray:
    """1 to `count`: the piece, of equal ones that part [low, high], that a value lies in."""
    width = (high - low) / count or 1.0
    return np.clip(1 + np.floor((seen - low) / width), 1, count)


def ranked_of(one: Ranking, seen: np.ndarray) -> Sequence[Row]:
    """A ranking row with each rater's ranks; `seen` [K, raters]."""
    items = one.items()
    verdicts = [
        {"rater": f"rater {r}", "ranks": consensus_ranks(column, tolerance=0.0).tolist()}
        for r, column in enumerate(seen.T)
    ]
    return [{**one.fields, "prompt": one.prompt, "responses": items, "raters": verdicts}]


def ratings_of(one: Ranking, seen: np.ndarray) -> Sequence[Row]:
    """A row {prompt, response, finished, rating} for each response; `seen` [K, raters]."""
    rated = zip(one.items(), seen.mean(axis=1), strict=True)
    return [
        {**one.fields, "prompt": one.prompt, **answer_fields(item), "rating": float(rating)} for item, rating in rated
    ]
