"""Reward models from pairs, from rankings of K responses in one forward pass, or from ratings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.config import RewardArgs, RewardConfig, bind
from rlhf_jax.data.collate import Collate, collate_preference, collate_ranking, collate_rated, eval_batches
from rlhf_jax.data.comparisons import preference_examples, ranking_examples
from rlhf_jax.data.layouts import layout_of
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.loading import Rows, load_rows, make_examples
from rlhf_jax.data.singles import rating_examples
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import to_host
from rlhf_jax.inference.intervals import share_and_interval
from rlhf_jax.inference.scoring import score_sequences
from rlhf_jax.losses.reward import order_right, ordered_pairs, pairs_right
from rlhf_jax.models import Model
from rlhf_jax.runs.directory import names_given
from rlhf_jax.sharding import Mesh, put_batch
from rlhf_jax.training.loop import Evaluate
from rlhf_jax.training.supervised import Stage, run_stage
from rlhf_jax.types import LossFn, Params

NORMALIZE_PAIRS = 1024
"""Training comparisons whose scores set the head's gain and bias."""


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


def rating_objective(model: Model, loss: Callable[..., Any]) -> LossFn:
    """loss(scores, ratings, weights), each [B], over a batch of `collate_rated`."""

    def loss_fn(params: Params, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        return loss(response_scores(model, params, batch)[:, 0], batch["ratings"], batch["weights"])

    return loss_fn


class Kind(NamedTuple):
    """What a row of a batch is, and what follows from it.

    Attributes:
        build: makes examples.
        column: what an example of this kind alone has.
        objective: of a model and the loss.
        loss: what the config calls it.
        agreement: what the summary says of scores [N, K], the batches that they are of and their rows' prompts [N].
    """

    build: Callable[..., Any]
    column: str
    objective: Callable[..., LossFn]
    loss: Callable[[RewardConfig], str]
    agreement: Callable[[np.ndarray, list[Any], Sequence[str]], dict[str, Any]]


def kind_of_rows(settings: RewardConfig, rows: Sequence[Any]) -> str:
    """pairs, rankings or ratings; auto: rankings or ratings if every row is one."""
    if settings.comparisons != "auto":
        return settings.comparisons
    kinds = {layout_of(row) for row in rows}
    if kinds == {"unpaired preference"} and all("rating" in row for row in rows):
        raise UserError("rows have both label and rating; set reward.comparisons to pairs (of labels) or to ratings")
    return "rankings" if kinds == {"ranking"} else "ratings" if kinds == {"rating"} else "pairs"


def make_collate(kind: str, examples: Sequence[Any], *, length: int, pad_id: int) -> Collate:
    """Examples of a kind to batches; K of rankings is the most responses that one of `examples` has."""
    if kind == "rankings":
        width = max(len(example["responses"]) for example in examples)
        return partial(collate_ranking, length=length, width=width, pad_id=pad_id)
    return partial({"pairs": collate_preference, "ratings": collate_rated}[kind], length=length, pad_id=pad_id)


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


def pair_accuracy(scores: np.ndarray, batches: list[Any], prompts: Sequence[str]) -> dict[str, Any]:
    """How many of the pairs [N, 2] have the higher score where the label says; as `losses.pairwise_reward_loss`."""
    return _accuracy(
        *pairs_right(jnp.asarray(scores[:, 0] - scores[:, 1]), _real(batches, "labels")), batches, prompts
    )


def order_accuracy(scores: np.ndarray, batches: list[Any], prompts: Sequence[str]) -> dict[str, Any]:
    """How far the scores of rankings [N, K] are in the raters' order; as `losses.kwise_reward_loss`."""
    better, mean = ordered_pairs(_real(batches, "ranks"), _real(batches, "mask"))
    margin = jnp.asarray(scores[:, :, None] - scores[:, None, :])
    return _accuracy(*order_right(margin, better, mean), batches, prompts)


def _real(batches: list[Any], name: str) -> Any:
    """A column of all rows of `eval_batches`, fillers left out."""
    return np.concatenate([batch[name][batch["weights"] > 0] for batch in batches])


def _accuracy(right: Any, counts: Any, batches: list[Any], prompts: Sequence[str]) -> dict[str, Any]:
    """{accuracy, accuracy_interval, n rows that count, prompts, ties}: the mean over the rows of a label, weighed.

    The same as eval/accuracy. Rows of one prompt (equal in `prompts` [N]) are not independent in the interval.
    """
    counts, weights = np.asarray(counts), _real(batches, "weights")
    own = [prompt for prompt, kept in zip(prompts, counts, strict=True) if kept]
    found: dict[str, Any] = {"accuracy": None, "accuracy_interval": None}
    if own:
        share, interval = share_and_interval(np.asarray(right)[counts], own, weights[counts])
        found = {"accuracy": share, "accuracy_interval": interval}
    return {**found, "n": len(own), "prompts": len(set(own)), "ties": int((~counts).sum())}


def rating_agreement(scores: np.ndarray, batches: list[Any], prompts: Sequence[str]) -> dict[str, Any]:
    """Spearman's correlation of scores [N, 1] and ratings: Pearson's of their ranks, ties at their mean rank."""
    ratings = _real(batches, "ratings")
    ranks = _mean_ranks(scores[:, 0]), _mean_ranks(ratings)
    defined = min(map(np.ptp, ranks)) > 0
    return {"spearman": float(np.corrcoef(*ranks)[0, 1]) if defined else None, "n": len(ratings)}


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


KINDS = {
    "pairs": Kind(preference_examples, "chosen", objective, lambda settings: settings.loss, pair_accuracy),
    "rankings": Kind(
        ranking_examples, "ranks", ranking_objective, lambda settings: settings.kwise_loss, order_accuracy
    ),
    "ratings": Kind(
        rating_examples, "rating", rating_objective, lambda settings: settings.rating_loss, rating_agreement
    ),
}


def load_sets(
    config: RewardArgs, tokenizer: Tokenizer, *, rows: Rows | None = None, eval_rows: Rows | None = None
) -> tuple[list[Any], list[Any], Collate]:
    """Training and held-out examples, of `rows` and `eval_rows` or the config's files, and what batches them."""
    settings, split = config.reward, load_rows(config.data, rows, eval_rows, config.run.seed)
    name = kind_of_rows(settings, split[0])
    build = partial(KINDS[name].build, tokenizer=tokenizer, limits=Limits.of(config.data))
    if name != "ratings":
        build = partial(build, aggregate=settings.aggregate, prior=settings.aggregate_prior)
    sets = make_examples(build, *split)
    collate = make_collate(name, [*sets[0], *sets[1]], length=config.data.max_length, pad_id=tokenizer.pad_id)
    return *sets, collate


def as_saved(
    config: RewardArgs,
    model: Model,
    params: Params,
    whole: Params,
    mesh: Mesh,
    train_set: Sequence[Any],
    collate: Collate,
) -> Params:
    """`params`, of the model `whole`, as a run saves them: the head normalised by scores of training comparisons."""
    if config.reward.normalize == "off":
        return params
    size = config.data.batch_size
    some = eval_batches(train_set, batch_size=size, collate=collate, limit=-(-NORMALIZE_PAIRS // size))
    return normalised(params, score_all(model, whole, mesh, some), config.reward.normalize)


def run(
    config: RewardArgs,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    loss: Callable[..., Any] | None = None,
) -> Any:
    """Train as configured and write the run directory; returns its summary.

    `rows` and `eval_rows` (lists of dicts) replace the config's files, `loss` its loss. eval/* in the summary are of
    the kept parameters before their head is normalised.
    """
    settings = config.reward

    def kind_of(stage: Stage) -> Kind:
        return next(kind for kind in KINDS.values() if kind.column in stage.train_set[0])

    def objective_of(stage: Stage) -> LossFn:
        kind = kind_of(stage)
        return kind.objective(stage.loaded.model, bind(loss or kind.loss(settings), settings))

    def conclude(stage: Stage, params: Params, evaluate: Evaluate) -> tuple[Params, dict[str, Any]]:
        model, whole = stage.loaded.model, stage.loaded.whole(params)
        results, held_out = evaluate(params), stage.in_batches(stage.held_out_set, config.data.eval_batches)
        scores = score_all(model, whole, stage.mesh, held_out)
        prompts = [example["prompt_key"] for example in stage.held_out_set[: len(scores)]]
        agreement = kind_of(stage).agreement(scores, held_out, prompts)
        saved = as_saved(config, model, params, whole, stage.mesh, stage.train_set, stage.collate)
        return saved, {**agreement, **results}

    return run_stage(
        "reward",
        config,
        settings,
        load=partial(load_sets, config, rows=rows, eval_rows=eval_rows),
        objective=objective_of,
        head=settings.head_init,
        shown=("loss/total", "reward_model/accuracy", "eval/accuracy", "time/tokens_per_s"),
        given=names_given(rows=rows, eval_rows=eval_rows, loss=loss),
        conclude=conclude,
    )
