"""Supervised fine-tuning on demonstrations, and pretraining on packed text. Floor 3."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhf_jax.config import PretrainRun, SFTRun, bind
from rlhf_jax.data.batches import Batches, collate_sft, eval_batches
from rlhf_jax.data.examples import pack, sft_examples
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.directory import names_given
from rlhf_jax.generate import Generator
from rlhf_jax.loop import num_steps, train
from rlhf_jax.models import Model
from rlhf_jax.run import Run, check_output_dir
from rlhf_jax.sharding import check_rows, make_mesh
from rlhf_jax.stage import (
    Rows,
    check_length,
    check_vocabulary,
    count,
    length_buckets,
    load_model,
    load_rows,
    load_tokenizer,
    make_examples,
    save_model,
)
from rlhf_jax.types import LossFn

TokenLoss = Callable[[jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def objective(model: Model, loss: TokenLoss) -> LossFn:
    """loss(logprobs, weights) over a batch of tokens, positions, segment_ids and weights, all [B, S].

    `weights[b, t]` weighs the prediction of `tokens[b, t]`, which the hidden state at t - 1 makes: tokens [a, b, c]
    give hidden states [.., a, ab], targets [b, c].
    """

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden = model.apply(params, batch["tokens"], batch["positions"], batch["segment_ids"])
        logprobs, _ = model.logprobs(params, hidden[:, :-1], batch["tokens"][:, 1:])
        return loss(logprobs, batch["weights"][:, 1:])

    return loss_fn


def run(
    config: SFTRun, *, rows: Rows | None = None, eval_rows: Rows | None = None, loss: TokenLoss | None = None
) -> Any:
    """Train as configured and write the run directory; returns its summary.

    `rows` and `eval_rows` (lists of dicts) replace the config's files, `loss` its loss.
    """
    stage = "pretrain" if isinstance(config, PretrainRun) else "sft"
    if (finished := check_output_dir(stage, config)) is not None:
        return finished
    init_key, step_key, sample_key = jax.random.split(jax.random.key(config.run.seed), 3)
    mesh = make_mesh(config.mesh)
    check_rows(mesh, config.data.batch_size // config.sft.accumulate, "data.batch_size / sft.accumulate =")
    tokenizer = load_tokenizer(config.model)
    batches, held_out, held_out_rows = load_batches(config, tokenizer, rows, eval_rows)
    with jax.set_mesh(mesh):
        loaded = load_model(config.model, mesh, init_key)
        check_vocabulary(loaded.model.arch, tokenizer, config.model.path or "model.arch")
        check_length(loaded.model.arch, config.data.max_length, "data.max_length")
        sampled = held_out_rows[: config.sft.num_samples] if config.sft.loss_on != "all" else []
        length = config.data.max_prompt_length
        generator = (
            Generator(loaded.model, tokenizer, config.sampling, mesh, max_prompt_length=length) if sampled else None
        )

        def on_eval(out: Run, step: int, params: Any) -> None:
            if generator is not None:
                out.samples(step, generator.table(params, sampled, jax.random.fold_in(sample_key, step)))

        loss_fn = objective(loaded.model, bind(loss or config.sft.loss, config.sft))
        total, shown = num_steps(config.sft, batches), ("loss/nll", "eval/nll", "time/tokens_per_s")
        given = names_given(rows=rows, eval_rows=eval_rows, loss=loss)
        with Run(stage, config, total=total, shown=shown, given=given) as out:
            params, evaluate = train(
                out,
                config,
                config.sft,
                loaded,
                loss_fn,
                batches,
                held_out,
                mesh=mesh,
                key=step_key,
                on_eval=on_eval,
            )
            save_model(out.dir / "model", loaded, params, tokenizer)
            results = evaluate(params)
            perplexity = float(np.exp(results["eval/total"]))
            return out.finish({"parameters": count(params), **results, "eval/perplexity": perplexity})


def load_batches(
    config: SFTRun, tokenizer: Tokenizer, rows: Rows | None, eval_rows: Rows | None
) -> tuple[Batches, list[Any], list[Any]]:
    """Training batches, held-out batches and the held-out rows."""
    data, seed = config.data, config.run.seed
    train_rows, held_out_rows = load_rows(data, rows, eval_rows, seed)
    build = partial(
        sft_examples,
        tokenizer=tokenizer,
        max_prompt_length=data.max_prompt_length,
        max_length=data.max_length,
        too_long=data.too_long,
        strict=data.strict,
        loss_on=config.sft.loss_on,
    )
    train_set, held_out = make_examples(build, train_rows, held_out_rows)
    if config.sft.pack:
        train_set, held_out = (pack(examples, data.max_length) for examples in (train_set, held_out))
    collate = partial(
        collate_sft, length=data.max_length, reduction=config.sft.loss_reduction, pad_id=tokenizer.pad_id
    )
    batches = Batches(train_set, batch_size=data.batch_size, seed=seed, collate=collate, buckets=length_buckets(data))
    held_out = eval_batches(held_out, batch_size=data.batch_size, collate=collate, limit=data.eval_batches)
    return batches, held_out, held_out_rows
