"""Supervised fine-tuning on demonstrations, and pretraining on packed text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import PretrainArgs, SFTArgs, bind
from rlhf_jax.data.collate import collate_sft
from rlhf_jax.data.encoding import Encoder, Example, Limits, Report
from rlhf_jax.data.examples import pack, sft_examples
from rlhf_jax.data.loading import Rows
from rlhf_jax.data.rows import DroppedRow, Row, where_of
from rlhf_jax.data.schemas import kind_of, sft_row
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.inference.generate import Generator
from rlhf_jax.keys import branch
from rlhf_jax.models import Model
from rlhf_jax.models.experts import balanced
from rlhf_jax.models.kernels import count
from rlhf_jax.runs.directory import Summary
from rlhf_jax.runs.twin import in_buckets
from rlhf_jax.training.supervised import Task, begin, finish, fit, setup
from rlhf_jax.types import Batch, LossFn, Metrics, Params

TokenLoss = Callable[[jax.Array, jax.Array], tuple[jax.Array, Metrics]]


def objective(model: Model, loss: TokenLoss) -> LossFn:
    """loss(logprobs, weights) over a batch of tokens, positions, segment_ids and weights, all [B, S].

    `weights[b, t]` weighs the prediction of `tokens[b, t]`, which the hidden state at t - 1 makes: tokens [a, b, c]
    give hidden states [.., a, ab], targets [b, c]. loss/nll is the mean over target tokens, whatever the weights.
    """

    def loss_fn(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        targets = batch["weights"][:, 1:] > 0
        read = (batch[name] for name in ("tokens", "positions", "segment_ids"))
        hidden, routing = model.forward(params, *read)
        logprobs, _ = model.logprobs(params, hidden[:, :-1], batch["tokens"][:, 1:], needed=targets)
        value, metrics = loss(logprobs, batch["weights"][:, 1:])
        value, metrics = balanced(model.balance_coef, value, metrics, routing, batch["weights"].sum())
        nll = {"loss/nll": -jnp.sum(logprobs, where=targets), "loss/nll_weight": targets.sum(dtype=jnp.float32)}
        return value, {**metrics, **nll}

    return loss_fn


def task_of(config: SFTArgs, loss: TokenLoss | None = None) -> Task:
    """SFT and pretraining; `loss` replaces the config's."""
    settings = config.sft

    def build(rows: list[Row], tokenizer: Tokenizer, limits: Limits) -> tuple[list[Example], Report]:
        examples, report = sft_examples(rows, tokenizer, limits, loss_on=settings.loss_on)
        return pack(examples, limits.max_length) if settings.pack else examples, report

    return Task(
        "sft",
        build,
        collate=lambda _: partial(collate_sft, reduction=settings.loss_reduction),
        objective=lambda model: objective(model, bind(loss or settings.loss, settings)),
        shown=("loss/nll", "eval/nll", "time/tokens_per_s"),
    )


@in_buckets
def run(
    config: SFTArgs, *, rows: Rows | None = None, eval_rows: Rows | None = None, loss: TokenLoss | None = None
) -> Summary:
    """Train as configured and write the run directory; returns its summary.

    `rows` and `eval_rows` (lists of dicts) replace the config's files, `loss` its loss.
    """
    name = "pretrain" if isinstance(config, PretrainArgs) else "sft"
    claim = begin(name, config, "sft", rows=rows, eval_rows=eval_rows, loss=loss)
    if isinstance(claim, dict):  # it is finished
        return claim
    with jax.set_mesh(claim.mesh.grid):
        work = setup(task_of(config, loss), claim)
        model, key, length = work.loaded.model, branch(claim.key, "evaluation"), config.data.max_prompt_length
        num = config.sft.num_samples if config.sft.loss_on != "all" else 0
        prompts = prompts_of(claim.held_out_rows, Encoder(claim.tokenizer, Limits.of(config.data)), num)
        sampler = None
        if prompts:
            sampler = Generator(model, claim.tokenizer, config.sampling, claim.mesh, max_prompt_length=length)
        with work.open() as out:

            def sample(step: int, params: Params) -> None:
                if sampler is not None:
                    out.metrics.samples(step, sampler.rows(params, prompts, jax.random.fold_in(key, step)))

            params = fit(work, out, sample)
            results = work.evaluate(params)
            perplexity = {"eval/perplexity": float(np.exp(results["eval/nll"]))} if "eval/nll" in results else {}
            size = count(work.loaded.whole(params))
            return finish(work, out, params, {"parameters": size, **results, **perplexity})


def prompts_of(rows: list[Row], encoder: Encoder, num: int) -> list[Row]:
    """{prompt, prompt_seen?} of the first `num` sft rows that have one to sample from; a document has none."""
    prompts: list[Row] = []
    for row in rows:
        if len(prompts) == num:
            break
        with contextlib.suppress(DroppedRow):
            prompt = None if kind_of(row) == "text" else sft_row(row)["prompt"]
            made = {"prompt": prompt, "_where": where_of(row)}
            if prompt and (found := encoder.prompt(made))[0]:
                prompts.append(made | encoder.seen(*found))
    return prompts
