"""Supervised fine-tuning on demonstrations, and pretraining on packed text. Floor 3."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhf_jax.config import SFTRun, bind
from rlhf_jax.data.batches import Batches, collate_sft, eval_batches
from rlhf_jax.data.examples import pack, sft_examples
from rlhf_jax.generate import Generator
from rlhf_jax.loop import fit, make_evaluate
from rlhf_jax.models import Model
from rlhf_jax.run import Run, check_output_dir
from rlhf_jax.sharding import check_rows, make_mesh
from rlhf_jax.stage import (
    Rows,
    check_length,
    check_vocabulary,
    describe,
    load_model,
    load_rows,
    load_tokenizer,
    make_examples,
    save_model,
)
from rlhf_jax.state import create_state, make_optimizer, make_schedule
from rlhf_jax.step import make_train_step
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


def run(config: SFTRun, *, rows: Rows | None = None, eval_rows: Rows | None = None, loss: TokenLoss | None = None) -> Any:
    """Train as configured and write the run directory; returns its summary.

    `rows` and `eval_rows` (lists of dicts) replace the config's files, `loss` its loss.
    """
    check_output_dir(config.run)
    key = jax.random.key(config.run.seed)
    mesh = make_mesh(config.mesh)
    check_rows(mesh, config.data.batch_size, "data.batch_size")
    check_rows(mesh, config.data.batch_size // config.sft.accumulate, "data.batch_size / sft.accumulate")
    tokenizer = load_tokenizer(config.model)
    build = partial(
        sft_examples,
        tokenizer=tokenizer,
        max_prompt_length=config.data.max_prompt_length,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
        loss_on=config.sft.loss_on,
    )
    train_rows, held_out = load_rows(config.data, rows, eval_rows, config.run.seed)
    train, held_out_examples = make_examples(build, train_rows, held_out)
    if config.sft.pack:
        train, held_out_examples = (pack(x, config.data.max_length) for x in (train, held_out_examples))
    collate = partial(
        collate_sft, length=config.data.max_length, reduction=config.sft.loss_reduction, pad_id=tokenizer.pad_id
    )
    batches = Batches(train, batch_size=config.data.batch_size, seed=config.run.seed, collate=collate)
    held_out_batches = eval_batches(
        held_out_examples, batch_size=config.data.batch_size, collate=collate, limit=config.data.eval_batches
    )

    with jax.set_mesh(mesh):
        loaded = load_model(config.model, mesh, jax.random.fold_in(key, 0))
        model = loaded.model
        check_vocabulary(model.arch, tokenizer, config.model.path or "model.arch")
        check_length(model.arch, config.data.max_length, "data.max_length")
        steps = config.sft.steps or config.sft.epochs * len(batches)
        schedule = make_schedule(config.optim, steps)
        tx = make_optimizer(config.optim, schedule)
        tokens = config.data.batch_size * config.data.max_length
        describe("sft", mesh, model, loaded.params, steps=steps, tokens_per_step=tokens, rows=len(train))
        out = Run("sft", config, total=steps, shown=("loss/nll", "eval/nll", "time/tokens_per_s"))
        loss_fn = objective(model, loss or bind(config.sft.loss, config.sft))
        score = make_evaluate(loss_fn, mesh, held_out_batches, key)
        generator = Generator(model, tokenizer, config.sampling, mesh, max_prompt_length=config.data.max_prompt_length)

        def evaluate(step: int, params: Any) -> dict[str, float]:
            sampled = held_out[: config.sft.num_samples] if config.sft.loss_on == "response" else []
            if sampled:
                out.samples(step, generator.table(params, sampled, jax.random.fold_in(key, step)))
            return score(params) if held_out_batches else {}

        state = create_state(loaded.params, tx, mesh)
        state = fit(
            out,
            make_train_step(loss_fn, tx, config.sft.accumulate, mesh=mesh, state=state),
            state,
            batches,
            steps=steps,
            mesh=mesh,
            key=key,
            schedule=schedule,
            tokens_per_step=tokens,
            evaluate=evaluate,
            better=lambda results: -results["eval/total"],
        )
        params = out.best_params(state.params)
        save_model(out.dir / "model", loaded, params, tokenizer)
        results = score(params) if held_out_batches else {}
    if results:
        results["eval/perplexity"] = float(np.exp(results["eval/total"]))
    return out.finish({"steps": steps, "parameters": sum(x.size for x in jax.tree.leaves(params)), **results})
