"""Reward models from pairwise comparisons. Floor 3."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from rlhf_jax.config import RewardRun, bind
from rlhf_jax.data.batches import Batches, collate_preference, eval_batches
from rlhf_jax.data.examples import preference_examples
from rlhf_jax.directory import check_output_dir, names_given
from rlhf_jax.loop import num_steps, train
from rlhf_jax.models import Model
from rlhf_jax.run import Run
from rlhf_jax.sharding import check_rows, make_mesh, put_batch
from rlhf_jax.stage import (
    Rows,
    check_length,
    check_vocabulary,
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


def pair_scores(model: Model, params: Params, batch: Any) -> Float[Array, "B 2"]:
    """Scores of (chosen, rejected), in one forward pass of 2B rows."""
    flat = {
        name: batch[name].reshape(-1, *batch[name].shape[2:])
        for name in ("tokens", "positions", "segment_ids", "last")
    }
    return score_sequences(model, params, **flat).reshape(-1, 2)


def objective(model: Model, loss: Callable[..., Any]) -> LossFn:
    """loss(chosen, rejected, weights, margins, labels), each [B], over a batch of `collate_preference`."""

    def loss_fn(params: Params, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        scores = pair_scores(model, params, batch)
        return loss(scores[:, 0], scores[:, 1], batch["weights"], batch["margins"], batch["labels"])

    return loss_fn


def score_all(model: Model, params: Params, mesh: Mesh, batches: list[Any]) -> np.ndarray:
    """Scores [N, 2] of all pairs of `eval_batches`, fillers left out."""
    forward = jax.jit(partial(pair_scores, model))
    scores = [jax.device_get(forward(params, put_batch(mesh, batch)))[batch["weights"] > 0] for batch in batches]
    return np.concatenate(scores)


def normalised(params: Params, scores: np.ndarray, how: str) -> Params:
    """The head shifted (mean) and scaled (mean_std) so that `scores` would have mean 0 and standard deviation 1.

    Ziegler et al. 2019, section 2.2: a gain and a bias, here folded into the linear head, so they are saved with it.
    """
    if how == "off":
        return params
    gain = 1.0 / max(float(scores.std()), 1e-6) if how == "mean_std" else 1.0
    score = params["score"]
    head = {"kernel": score["kernel"] * gain, "bias": (score["bias"] - float(scores.mean())) * gain}
    return {**params, "score": head}


def pair_accuracy(scores: np.ndarray, batches: list[Any]) -> tuple[float, int]:
    """Share of pairs [N, 2] whose higher score is what most raters chose (equal scores count half), and N."""
    labels = np.concatenate([batch["labels"][batch["weights"] > 0] for batch in batches])
    agrees = np.sign(scores[:, 0] - scores[:, 1]) * np.where(labels >= 0.5, 1, -1)
    return float(np.mean((agrees + 1) / 2)), len(labels)


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
    build = partial(
        preference_examples,
        tokenizer=tokenizer,
        max_prompt_length=config.data.max_prompt_length,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
    )
    train_set, held_out_set = make_examples(build, *load_rows(config.data, rows, eval_rows, config.run.seed))
    collate = partial(collate_preference, length=config.data.max_length, pad_id=tokenizer.pad_id)
    batches = Batches(train_set, batch_size=size, seed=config.run.seed, collate=collate)
    in_order = partial(eval_batches, batch_size=size, collate=collate)
    held_out = in_order(held_out_set, limit=config.data.eval_batches)
    with jax.set_mesh(mesh):
        loaded = load_model(config.model, mesh, init_key, head=config.reward.head_init)
        model = loaded.model
        check_vocabulary(model.arch, tokenizer, config.model.path or "model.arch")
        check_length(model.arch, config.data.max_length, "data.max_length")
        shown = ("loss/pairwise", "reward_model/accuracy", "eval/accuracy", "time/tokens_per_s")
        loss_fn = objective(model, bind(loss or config.reward.loss, config.reward))
        given = names_given(rows=rows, eval_rows=eval_rows, loss=loss)
        with Run("reward", config, total=num_steps(config.reward, batches), shown=shown, given=given) as out:
            params, evaluate = train(
                out, config, config.reward, loaded, loss_fn, batches, held_out, mesh=mesh, key=step_key
            )
            results = evaluate(params)
            accuracy, pairs = pair_accuracy(score_all(model, params, mesh, held_out), held_out)
            reference = score_all(model, params, mesh, in_order(train_set, limit=-(-NORMALIZE_PAIRS // size)))
            params = normalised(params, reference, config.reward.normalize)
            save_model(out.dir / "model", loaded, params, tokenizer)
            interval = wilson_interval(accuracy, pairs)
            return out.finish({"accuracy": accuracy, "accuracy_interval": interval, "n": pairs, **results})
