"""Supervised fine-tuning on demonstrations, and pretraining on packed text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import PretrainArgs, SFTArgs, bind
from rlhf_jax.data.collate import Collate, collate_sft
from rlhf_jax.data.examples import pack, sft_examples
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.loading import Rows, load_rows, make_examples
from rlhf_jax.data.rows import DroppedRow, Row, where_of
from rlhf_jax.data.schemas import kind_of, sft_row
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.inference.generate import Generator
from rlhf_jax.models import Model
from rlhf_jax.models.kernels import count
from rlhf_jax.runs.directory import names_given
from rlhf_jax.runs.run import Run
from rlhf_jax.training.loop import Evaluate
from rlhf_jax.training.supervised import Stage, run_stage
from rlhf_jax.types import LossFn

TokenLoss = Callable[[jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def objective(model: Model, loss: TokenLoss) -> LossFn:
    """loss(logprobs, weights) over a batch of tokens, positions, segment_ids and weights, all [B, S].

    `weights[b, t]` weighs the prediction of `tokens[b, t]`, which the hidden state at t - 1 makes: tokens [a, b, c]
    give hidden states [.., a, ab], targets [b, c]. loss/nll is the mean over target tokens, whatever the weights.
    """

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden = model.apply(params, batch["tokens"], batch["positions"], batch["segment_ids"])
        logprobs, _ = model.logprobs(params, hidden[:, :-1], batch["tokens"][:, 1:])
        value, metrics = loss(logprobs, batch["weights"][:, 1:])
        targets = batch["weights"][:, 1:] > 0
        nll = {"loss/nll": -jnp.sum(logprobs, where=targets), "loss/nll_weight": targets.sum(dtype=jnp.float32)}
        return value, {**metrics, **nll}

    return loss_fn


def run(
    config: SFTArgs, *, rows: Rows | None = None, eval_rows: Rows | None = None, loss: TokenLoss | None = None
) -> Any:
    """Train as configured and write the run directory; returns its summary.

    `rows` and `eval_rows` (lists of dicts) replace the config's files, `loss` its loss.
    """
    held_out_rows: list[Any] = []

    def load(tokenizer: Tokenizer) -> tuple[list[Any], list[Any], Collate]:
        train_rows, held_out_rows[:] = load_rows(config.data, rows, eval_rows, config.run.seed)
        return load_examples(config, tokenizer, train_rows, held_out_rows)

    def watch(stage: Stage) -> Callable[[Run, int, Any], None]:
        num = config.sft.num_samples if config.sft.loss_on != "all" else 0
        sampled = prompts_of(held_out_rows, stage.tokenizer, num)
        length, model = config.data.max_prompt_length, stage.loaded.model
        generator = (
            Generator(model, stage.tokenizer, config.sampling, stage.mesh, max_prompt_length=length)
            if sampled
            else None
        )

        def on_eval(out: Run, step: int, params: Any) -> None:
            if generator is not None:
                out.samples(step, generator.rows(params, sampled, jax.random.fold_in(stage.key, step)))

        return on_eval

    def conclude(stage: Stage, params: Any, evaluate: Evaluate) -> tuple[Any, dict[str, Any]]:
        results = evaluate(params)
        perplexity = float(np.exp(results["eval/nll"]))
        return params, {"parameters": count(stage.loaded.whole(params)), **results, "eval/perplexity": perplexity}

    return run_stage(
        "pretrain" if isinstance(config, PretrainArgs) else "sft",
        config,
        config.sft,
        group="sft",
        load=load,
        objective=lambda stage: objective(stage.loaded.model, bind(loss or config.sft.loss, config.sft)),
        shown=("loss/nll", "eval/nll", "time/tokens_per_s"),
        given=names_given(rows=rows, eval_rows=eval_rows, loss=loss),
        watch=watch,
        conclude=conclude,
    )


def prompts_of(rows: list[Row], tokenizer: Tokenizer, num: int) -> list[Row]:
    """{prompt} of the first `num` sft rows that have one to sample from; a document has none."""
    found: list[Row] = []
    for row in rows:
        if len(found) == num:
            break
        with contextlib.suppress(DroppedRow):
            prompt = None if kind_of(row) == "text" else sft_row(row)["prompt"]
            if prompt and tokenizer.encode_prompt(prompt):
                found.append({"prompt": prompt, "_where": where_of(row)})
    return found


def load_examples(
    config: SFTArgs, tokenizer: Tokenizer, train_rows: list[Any], held_out_rows: list[Any]
) -> tuple[list[Any], list[Any], Collate]:
    """Training and held-out examples, packed if asked, and what makes batches of them."""
    data = config.data
    build = partial(sft_examples, tokenizer=tokenizer, limits=Limits.of(data), loss_on=config.sft.loss_on)
    train_set, held_out_set = make_examples(build, train_rows, held_out_rows)
    if config.sft.pack:
        train_set, held_out_set = (pack(examples, data.max_length) for examples in (train_set, held_out_set))
    reduction = config.sft.loss_reduction
    collate = partial(collate_sft, length=data.max_length, reduction=reduction, pad_id=tokenizer.pad_id)
    return train_set, held_out_set, collate
