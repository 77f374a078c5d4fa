"""Reward models from pairs, from rankings of K responses in one forward pass, or from ratings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.config import RewardArgs, RewardConfig, bind
from rlhf_jax.config.functions import replace
from rlhf_jax.data.collate import (
    Batch,
    Collate,
    collate_preference,
    collate_rated,
    eval_batches,
    of_most_responses,
)
from rlhf_jax.data.comparisons import preference_examples, ranking_examples, rating_examples
from rlhf_jax.data.encoding import Example
from rlhf_jax.data.loading import Rows, batch_of
from rlhf_jax.data.packing import pack_responses
from rlhf_jax.data.rows import Row, layout_of
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import say, to_host
from rlhf_jax.inference.intervals import share_and_interval
from rlhf_jax.losses.reward import order_right, ordered_pairs, pairs_right
from rlhf_jax.models import Model
from rlhf_jax.models.experts import balanced
from rlhf_jax.runs.directory import Summary
from rlhf_jax.runs.twin import in_buckets
from rlhf_jax.sharding import Mesh, put_batch
from rlhf_jax.training.responses import (
    by_example,
    of_batch,
    of_view,
    response_scores,
    scores_and_routing,
    standardised,
    view_of,
)
from rlhf_jax.training.sums import is_ours
from rlhf_jax.training.supervised import Build, Task, begin, finish, fit, setup
from rlhf_jax.types import ArrayLoss, LossFn, Metrics, Params

NORMALIZE_PAIRS = 1024
"""Training comparisons whose scores set the head's gain and bias."""


Inputs = Callable[[Float[Array, "B K"], Batch], tuple[Array, ...]]
"""(scores, their batch) -> the arguments of a loss."""


def of_pairs(scores: Float[Array, "B 2"], batch: Batch) -> tuple[Array, ...]:
    """(chosen, rejected, weights, margins, labels), each [B], of a batch of `collate_preference`."""
    return scores[:, 0], scores[:, 1], batch["weights"], batch["margins"], batch["labels"]


def objective(model: Model, loss: ArrayLoss, inputs: Inputs = of_pairs) -> LossFn:
    """loss(*inputs(scores, batch)) of a batch as `collate_preference` or its siblings make it, or a view of one."""

    def loss_fn(params: Params, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        view = view_of(batch)
        scores, routing = scores_and_routing(model, params, view)
        scores, batch = by_example(scores, batch), of_view(batch, view)
        found = loss(*inputs(scores, batch)) if scores.ndim == 2 else of_members(loss, inputs, scores, batch)
        return balanced(model.balance_coef, *found, routing, batch["weights"].sum())

    return loss_fn


def of_members(loss: ArrayLoss, inputs: Inputs, scores: Float[Array, "B K E"], batch: Batch) -> tuple[Array, Metrics]:
    """The mean of the losses of an ensemble's members, each with the weights of its own draw of prompts, if any."""
    weights = batch["weights"][:, None] * batch.get("member_weights", jnp.ones((1, scores.shape[2])))  # [B, E]
    each = [loss(*inputs(scores[:, :, i], {**batch, "weights": weights[:, i]})) for i in range(scores.shape[2])]
    both = {name: jnp.stack([metrics[name] for _, metrics in each]) for name in each[0][1]}
    metrics = {name: values.max() if name.endswith("_max") else values.mean() for name, values in both.items()}
    return jnp.stack([total for total, _ in each]).mean(), metrics


def resampled(examples: Sequence[Example], *, members: int, seed: int, of: str) -> list[Example]:
    """Examples with member_weights f32[members]: how often each member draws them.

    Every member has a bootstrap of its own (Efron 1979), as many draws as there are, with replacement: of prompts, so
    that all rows of a prompt count alike, or of rows. That of prompts depends on the seed, the member and the prompts,
    whatever the order of the rows.
    """
    names = [example["prompt_key"] for example in examples] if of == "prompts" else list(range(len(examples)))
    keys = sorted({*names})
    even = np.full(len(keys), 1 / len(keys))
    draws = [np.random.default_rng([seed, member]).multinomial(len(keys), even) for member in range(members)]
    counts = dict(zip(keys, np.stack(draws, axis=1).astype(np.float32), strict=True))
    seen = [f"{share:.0%}" for share in (np.stack(draws) > 0).mean(axis=1)]
    say(f"reward.members {members}: drawn with replacement, they see {', '.join(seen)} of {len(keys)} {of}")
    return [{**example, "member_weights": counts[name]} for name, example in zip(names, examples, strict=True)]


class Kind(NamedTuple):
    """What a row of a batch is, and what follows from it.

    Attributes:
        build: of the settings, what makes examples.
        collate: (all examples) -> what makes batches of them.
        inputs: what its losses take.
        loss: what the config calls it.
        agreement: what the summary says of scores [N, K], the batches that they are of and their rows' prompts [N].
    """

    build: Callable[[RewardConfig], Build]
    collate: Callable[[Sequence[Example]], Collate]
    inputs: Inputs
    loss: Callable[[RewardConfig], str]
    agreement: Callable[[np.ndarray, list[Batch], Sequence[str]], Summary]


def kind_of_rows(settings: RewardConfig, rows: Sequence[Row]) -> str:
    """pairs, rankings or ratings; auto: rankings or ratings if every row is one."""
    if settings.comparisons != "auto":
        return settings.comparisons
    kinds = {layout_of(row) for row in rows}
    if kinds == {"unpaired preference"} and all(row.get("rating") is not None for row in rows):
        raise UserError("rows have both label and rating; set reward.comparisons to pairs (of labels) or to ratings")
    return "rankings" if kinds == {"ranking"} else "ratings" if kinds == {"rating"} else "pairs"


def score_all(model: Model, params: Params, mesh: Mesh, batches: list[Batch]) -> np.ndarray:
    """Scores [N, K] of all rows of `eval_batches`, fillers left out; NaN where there is no response.

    Of an ensemble [N, K, E].
    """
    forward = jax.jit(partial(of_batch, response_scores, model))
    parts = []
    for batch in batches:
        scores = to_host(forward(params, put_batch(mesh, batch)))
        there = np.broadcast_to(batch.get("mask", True), scores.shape[:2])
        parts.append(np.where(there if scores.ndim == 2 else there[..., None], scores, np.nan)[batch["weights"] > 0])
    return np.concatenate(parts)


def normalised(params: Params, scores: np.ndarray, how: str) -> Params:
    """The head shifted (mean) and scaled (mean_std) so that `scores` would have mean 0 and standard deviation 1.

    Ziegler et al. 2019, section 2.2: a gain and a bias, here folded into the linear head, so they are saved with it.
    Of an ensemble, scores [N, K, E], each head by its own.
    """
    if how == "off":
        return params
    scores = scores.astype(np.float64)
    mean = np.nanmean(scores, axis=(0, 1))
    std = np.nanstd(scores, axis=(0, 1)) if how == "mean_std" else np.ones_like(mean)
    return {**params, "score": standardised(params["score"], mean, std)}


def pair_accuracy(scores: np.ndarray, batches: list[Batch], prompts: Sequence[str]) -> Summary:
    """How many of the pairs [N, 2] have the higher score where the label says; as `losses.pairwise_reward_loss`."""
    labels = jnp.asarray(_real(batches, "labels"))
    return _accuracy(*pairs_right(jnp.asarray(scores[:, 0] - scores[:, 1]), labels), batches, prompts)


def order_accuracy(scores: np.ndarray, batches: list[Batch], prompts: Sequence[str]) -> Summary:
    """How far the scores of rankings [N, K] are in the raters' order; as `losses.kwise_reward_loss`."""
    better, mean = ordered_pairs(*(jnp.asarray(_real(batches, name)) for name in ("ranks", "mask")))
    margin = jnp.asarray(scores[:, :, None] - scores[:, None, :])
    return _accuracy(*order_right(margin, better, mean), batches, prompts)


def _real(batches: list[Batch], name: str) -> np.ndarray:
    """A column of all rows of `eval_batches`, fillers left out."""
    return np.concatenate([batch[name][batch["weights"] > 0] for batch in batches])


def _accuracy(right: Array, counts: Array, batches: list[Batch], prompts: Sequence[str]) -> Summary:
    """{accuracy, accuracy_interval, n rows that count, prompts, ties}: the mean over the rows of a label, weighed.

    The same as eval/accuracy. Rows of one prompt (equal in `prompts` [N]) are not independent in the interval.
    """
    kept, weights = np.asarray(counts), _real(batches, "weights")
    own = [prompt for prompt, counted in zip(prompts, kept, strict=True) if counted]
    share, interval = share_and_interval(np.asarray(right)[kept], own, weights[kept]) if own else (None, None)
    about = {"n": len(own), "prompts": len(set(own)), "ties": int((~kept).sum())}
    return {"accuracy": share, "accuracy_interval": interval, **about}


def rating_agreement(scores: np.ndarray, batches: list[Batch], prompts: Sequence[str]) -> Summary:
    """Spearman's correlation of scores [N, 1] and ratings: Pearson's of their ranks, ties at their mean rank."""
    ratings = _real(batches, "ratings")
    ranks = _mean_ranks(scores[:, 0]), _mean_ranks(ratings)
    defined = min(map(np.ptp, ranks)) > 0
    return {"spearman": float(np.corrcoef(*ranks)[0, 1]) if defined else None, "n": len(ratings)}


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


KINDS = {
    "pairs": Kind(
        lambda s: partial(preference_examples, aggregate=s.aggregate, prior=s.aggregate_prior),
        lambda _: collate_preference,
        of_pairs,
        lambda s: s.loss,
        pair_accuracy,
    ),
    "rankings": Kind(
        lambda s: partial(ranking_examples, aggregate=s.aggregate, prior=s.aggregate_prior),
        of_most_responses,
        lambda scores, batch: (scores, batch["ranks"], batch["mask"], batch["weights"]),
        lambda s: s.kwise_loss,
        order_accuracy,
    ),
    "ratings": Kind(
        lambda s: partial(rating_examples, ends=(s.rating_low, s.rating_high) if s.of_whole_ratings else None),
        lambda _: collate_rated,
        lambda scores, batch: (scores[:, 0], batch["ratings"], batch["weights"]),
        lambda s: s.rating_loss,
        rating_agreement,
    ),
}


def task_of(config: RewardArgs, loss: ArrayLoss | None = None) -> Task:
    """A reward model of rows of the kind that the config names, pairs if it does not; `loss` replaces the config's."""
    settings, kind = config.reward, KINDS[kind_of_rows(config.reward, [])]
    bound, inputs = bind(loss or kind.loss(settings), settings), kind.inputs
    members = settings.members if settings.members > 1 else 0
    draw = partial(resampled, members=members, seed=config.run.seed, of=settings.bootstrap)
    return Task(
        "reward",
        kind.build(settings),
        kind.collate,
        objective=lambda model: objective(model, bound, inputs),
        shown=("loss/total", "reward_model/accuracy", "eval/accuracy", "time/tokens_per_s"),
        head=settings.head_init,
        members=members,
        own_adapters=settings.member_adapters,
        resample=draw if members and settings.bootstrap != "off" else None,
        pack=pack_responses,
        foreign=None if is_ours(bound) else lambda scores, batch: bound(*inputs(scores, batch)),
    )


def as_saved(
    config: RewardArgs,
    model: Model,
    params: Params,
    whole: Params,
    mesh: Mesh,
    train_set: Sequence[Example],
    collate: Collate,
) -> Params:
    """`params`, of the model `whole`, as a run saves them: the head normalised by scores of training comparisons."""
    if config.reward.normalize == "off":
        return params
    size = batch_of(config.data, mesh.row_ways)
    some = eval_batches(train_set, batch_size=size, collate=collate, limit=-(-NORMALIZE_PAIRS // size))
    return normalised(params, score_all(model, whole, mesh, some), config.reward.normalize)


@in_buckets
def run(
    config: RewardArgs, *, rows: Rows | None = None, eval_rows: Rows | None = None, loss: ArrayLoss | None = None
) -> Summary:
    """Train as configured and write the run directory; returns its summary.

    `rows` and `eval_rows` (lists of dicts) replace the config's files, `loss` its loss. eval/* in the summary are of
    the kept parameters before their head is normalised, and means over the members of an ensemble.
    """
    claim = begin("reward", config, "reward", rows=rows, eval_rows=eval_rows, loss=loss)
    if isinstance(claim, dict):  # it is finished
        return claim
    told = replace(config, reward__comparisons=kind_of_rows(config.reward, claim.rows))
    kind, mesh = KINDS[told.reward.comparisons], claim.mesh
    with jax.set_mesh(mesh.grid):
        work = setup(task_of(told, loss), replace(claim, config__reward=told.reward))
        with work.open() as out:
            params = fit(work, out)
            model, whole = work.loaded.model, work.loaded.whole(params)
            results, agreement = work.evaluate(params), {}
            saved = as_saved(config, model, params, whole, mesh, work.train_set, work.collate)
            if work.held_out:
                scores = score_all(model, work.loaded.whole(saved), mesh, work.held_out)
                prompts = [example["prompt_key"] for example in work.held_out_set[: len(scores)]]
                agreement = agreements(kind, scores, work.held_out, prompts)
            return finish(work, out, saved, {**agreement, **results})


def agreements(kind: Kind, scores: np.ndarray, batches: list[Batch], prompts: Sequence[str]) -> Summary:
    """`kind.agreement`; of an ensemble, scores [N, K, E], that of the members' mean and `members`, each one's."""
    if scores.ndim == 2:
        return kind.agreement(scores, batches, prompts)
    each = [kind.agreement(scores[:, :, i], batches, prompts) for i in range(scores.shape[2])]
    main = next(iter(each[0]))  # accuracy or spearman
    return {**kind.agreement(scores.mean(axis=2), batches, prompts), "members": [own[main] for own in each]}
