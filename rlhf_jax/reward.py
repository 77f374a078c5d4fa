"""Reward models from comparisons: pairs, or rankings of K responses in one forward pass. Floor 3."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from rlhf_jax.config import RewardConfig, RewardRun, bind
from rlhf_jax.data.batches import Batches, Collate, collate_preference, collate_ranking, eval_batches
from rlhf_jax.data.comparisons import preference_examples, ranking_examples
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.directory import names_given
from rlhf_jax.hosts import to_host
from rlhf_jax.loop import num_steps, train
from rlhf_jax.models import Model
from rlhf_jax.run import Run, check_output_dir
from rlhf_jax.sharding import check_rows, make_mesh, put_batch
from rlhf_jax.stage import (
    Rows,
    check_length,
    check_vocabulary,
    length_buckets,
    load_model,
    load_rows,
    load_tokenizer,
    make_examples,
    save_model,
)
from rlhf_jax.types import LossFn, Params

NORMALIZE_PAIRS = 1024
"""Training comparisons whose scores set the head's gain and bias."""


def score_sequences(
    model: Model,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    last: Int[Array, " B"],
) -> Float[Array, " B"]:
    """The reward of each sequence: the scalar head at index `last`, its last real token, the stop token if any."""
    hidden = model.apply(params, tokens, positions, segment_ids)
    at_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return model.scores(params["score"], at_last)[:, 0]


def response_scores(model: Model, params: Params, batch: Any) -> Float[Array, "B K"]:
    """Scores of the K responses to each prompt, of pairs (chosen, rejected), in one forward pass of B K rows."""
    flat = {
        name: batch[name].reshape(-1, *batch[name].shape[2:])
        for name in ("tokens", "positions", "segment_ids", "last")
    }
    return score_sequences(model, params, **flat).reshape(batch["last"].shape)


def objective(model: Model, loss: Callable[..., Any]) -> LossFn:
    """loss(chosen, rejected, weights, margins, labels), each [B], over a batch of `collate_preference`."""

    def loss_fn(params: Params, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        scores = response_scores(model, params, batch)
        return loss(scores[:, 0], scores[:, 1], batch["weights"], batch["margins"], batch["labels"])

    return loss_fn


def ranking_objective(model: Model, loss: Callable[..., Any]) -> LossFn:
    """loss(scores, ranks, mask, weights), [B, K] and weights [B], over a batch of `collate_ranking`."""

    def loss_fn(params: Params, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        return loss(response_scores(model, params, batch), batch["ranks"], batch["mask"], batch["weights"])

    return loss_fn


def as_rankings(settings: RewardConfig, rows: Sequence[Any]) -> bool:
    """Whether a batch holds rankings; auto: if every row is one."""
    if settings.comparisons == "auto":
        return all("responses" in row for row in rows)
    return settings.comparisons == "rankings"


def load_examples(
    config: RewardRun, tokenizer: Tokenizer, rows: Rows | None, eval_rows: Rows | None
) -> tuple[list[Any], list[Any]]:
    """Training and held-out examples, of rankings or of pairs; what was kept, dropped and joined is printed."""
    train_rows, held_out_rows = load_rows(config.data, rows, eval_rows, config.run.seed)
    build = partial(
        ranking_examples if as_rankings(config.reward, train_rows) else preference_examples,
        tokenizer=tokenizer,
        max_prompt_length=config.data.max_prompt_length,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
        strict=config.data.strict,
        aggregate=config.reward.aggregate,
        prior=config.reward.aggregate_prior,
    )
    return make_examples(build, train_rows, held_out_rows)


def make_collate(ranked: bool, examples: Sequence[Any], *, length: int, pad_id: int) -> Collate:
    """Examples of pairs or rankings to batches; K is the most responses that one of `examples` has."""
    if not ranked:
        return partial(collate_preference, length=length, pad_id=pad_id)
    width = max(len(example["responses"]) for example in examples)
    return partial(collate_ranking, length=length, width=width, pad_id=pad_id)


def score_all(model: Model, params: Params, mesh: Mesh, batches: list[Any]) -> np.ndarray:
    """Scores [N, K] of all rows of `eval_batches`, fillers left out; NaN where there is no response."""
    forward = jax.jit(partial(response_scores, model))
    found = []
    for batch in batches:
        scores = to_host(forward(params, put_batch(mesh, batch)))
        found.append(np.where(batch.get("mask", True), scores, np.nan)[batch["weights"] > 0])
    return np.concatenate(found)


def normalised(params: Params, scores: np.ndarray, how: str) -> Params:
    """The head shifted (mean) and scaled (mean_std) so that `scores` would have mean 0 and standard deviation 1.

    Ziegler et al. 2019, section 2.2: a gain and a bias, here folded into the linear head, so they are saved with it.
    """
    if how == "off":
        return params
    gain = 1.0 / max(float(np.nanstd(scores)), 1e-6) if how == "mean_std" else 1.0
    score = params["score"]
    head = {"kernel": score["kernel"] * gain, "bias": (score["bias"] - float(np.nanmean(scores))) * gain}
    return {**params, "score": head}


def pair_accuracy(scores: np.ndarray, batches: list[Any]) -> tuple[float, int]:
    """Share of pairs [N, 2] whose higher score is what most raters chose (equal scores count half), and N."""
    labels = np.concatenate([batch["labels"][batch["weights"] > 0] for batch in batches])
    agrees = np.sign(scores[:, 0] - scores[:, 1]) * np.where(labels >= 0.5, 1, -1)
    return float(np.mean((agrees + 1) / 2)), len(labels)


def order_accuracy(scores: np.ndarray, batches: list[Any]) -> tuple[float, int]:
    """(mean over rankings [N, K] of the share of their pairs in the raters' order, equal scores counting half, N)."""
    ranks = np.concatenate([batch["ranks"][batch["weights"] > 0] for batch in batches])
    better = (ranks[:, :, None] < ranks[:, None, :]) & ~np.isnan(scores[:, :, None] + scores[:, None, :])
    agrees = (np.sign(scores[:, :, None] - scores[:, None, :]) + 1) / 2
    shares = np.where(better, agrees, 0).sum((1, 2)) / better.sum((1, 2))
    return float(shares.mean()), len(shares)


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a share of n independent trials (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def run(
    config: RewardRun,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    loss: Callable[..., Any] | None = None,
) -> Any:
    """Train as configured and write the run directory; returns its summary.

    `rows` and `eval_rows` (lists of dicts) replace the config's files, `loss` its loss. eval/* in the summary are of
    the kept parameters before their head is normalised.
    """
    if (finished := check_output_dir("reward", config)) is not None:
        return finished
    init_key, step_key = jax.random.split(jax.random.key(config.run.seed))
    mesh = make_mesh(config.mesh)
    size = config.data.batch_size
    check_rows(mesh, size // config.reward.accumulate, "data.batch_size / reward.accumulate =")
    tokenizer = load_tokenizer(config.model)
    train_set, held_out_set = load_examples(config, tokenizer, rows, eval_rows)
    ranked = "responses" in train_set[0]
    collate = make_collate(ranked, train_set + held_out_set, length=config.data.max_length, pad_id=tokenizer.pad_id)
    batches = Batches(
        train_set, batch_size=size, seed=config.run.seed, collate=collate, buckets=length_buckets(config.data)
    )
    in_order = partial(eval_batches, batch_size=size, collate=collate)
    held_out = in_order(held_out_set, limit=config.data.eval_batches)
    with jax.set_mesh(mesh):
        loaded = load_model(config.model, mesh, init_key, head=config.reward.head_init)
        model = loaded.model
        check_vocabulary(model.arch, tokenizer, config.model.path or "model.arch")
        check_length(model.arch, config.data.max_length, "data.max_length")
        named = config.reward.kwise_loss if ranked else config.reward.loss
        shown = ("loss/total", "reward_model/accuracy", "eval/accuracy", "time/tokens_per_s")
        loss_fn = (ranking_objective if ranked else objective)(model, bind(loss or named, config.reward))
        given = names_given(rows=rows, eval_rows=eval_rows, loss=loss)
        with Run("reward", config, total=num_steps(config.reward, batches), shown=shown, given=given) as out:
            params, evaluate = train(
                out, config, config.reward, loaded, loss_fn, batches, held_out, mesh=mesh, key=step_key
            )
            results = evaluate(params)
            accuracy, n = (order_accuracy if ranked else pair_accuracy)(
                score_all(model, params, mesh, held_out), held_out
            )
            reference = score_all(model, params, mesh, in_order(train_set, limit=-(-NORMALIZE_PAIRS // size)))
            params = normalised(params, reference, config.reward.normalize)
            save_model(out.dir / "model", loaded, params, tokenizer)
            interval = wilson_interval(accuracy, n)
            return out.finish({"accuracy": accuracy, "accuracy_interval": interval, "n": n, **results})
