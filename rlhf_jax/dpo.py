"""Direct preference optimisation and its kin: a policy from pairs, without a reward model. Floor 3."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from rlhf_jax.config import DPORun, bind
from rlhf_jax.data.batches import Collate, collate_preference
from rlhf_jax.data.comparisons import preference_examples
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.directory import names_given
from rlhf_jax.errors import UserError
from rlhf_jax.losses import next_token_loss
from rlhf_jax.models import Model
from rlhf_jax.responses import add_reference, response_logprobs
from rlhf_jax.stage import Rows, limits, load_rows, make_examples
from rlhf_jax.supervised import run_stage
from rlhf_jax.types import LossFn


def columns_read(loss: Callable[..., Any]) -> list[str]:
    """The arguments of a loss that come from a batch: those without a default."""
    return [name for name, p in inspect.signature(loss).parameters.items() if p.default is p.empty]


def objective(
    model: Model,
    loss: Callable[..., Any],
    *,
    sft_coef: float = 0.0,
    logprobs: Callable[..., jax.Array] = response_logprobs,
) -> LossFn:
    """loss(columns of the batch by name) + sft_coef * NLL of the responses to imitate.

    The columns are those of `collate_preference` (or its siblings) and logprobs [B, K], summed over each response.
    """

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        columns = {**batch, "logprobs": logprobs(model, params, batch)}
        if unknown := set(columns_read(loss)) - set(columns):
            raise UserError(f"the loss reads {sorted(unknown)}, which a batch does not have; it has {sorted(columns)}")
        value, metrics = loss(**{name: columns[name] for name in columns_read(loss)})
        nll, nll_metrics = next_token_loss(columns["logprobs"], batch["token_weights"])
        return value + sft_coef * nll, {**metrics, **nll_metrics}

    return loss_fn


def train_policy(
    name: str,
    config: Any,
    settings: Any,
    build: Callable[..., Any],
    collate_for: Callable[[Sequence[Any]], Collate],
    logprobs: Callable[..., jax.Array] = response_logprobs,
    *,
    loss: Callable[..., Any] | None,
    **rows: Rows | None,
) -> Any:
    """Train on the examples that `build` makes of rows; `collate_for` them is what makes batches."""
    bound = bind(loss or settings.loss, settings)

    def load(tokenizer: Tokenizer) -> tuple[list[Any], list[Any], Collate]:
        split = load_rows(config.data, rows["rows"], rows["eval_rows"], config.run.seed)
        sets = make_examples(partial(build, tokenizer=tokenizer, **limits(config.data)), *split)
        collate = partial(collate_for([*sets[0], *sets[1]]), length=config.data.max_length, pad_id=tokenizer.pad_id)
        return *sets, collate

    return run_stage(
        name,
        config,
        settings,
        load=load,
        objective=lambda stage: objective(stage.loaded.model, bound, sft_coef=settings.sft_coef, logprobs=logprobs),
        prepare=add_reference if "ref_logprobs" in columns_read(bound) else None,
        shown=("loss/total", "rewards/accuracy", "eval/accuracy", "time/tokens_per_s"),
        given=names_given(**rows, loss=loss),
    )


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
