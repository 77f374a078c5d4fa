"""DPO, KTO, RRHF and kin: a policy from preferences alone, without a reward model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax.config import DPOArgs, DPOConfig, KTOArgs, KTOConfig, RRHFArgs, RRHFConfig, bind
from rlhf_jax.data.collate import collate_preference, collate_unpaired, of_most_responses
from rlhf_jax.data.comparisons import preference_examples, ranking_examples, unpaired_examples
from rlhf_jax.data.loading import Rows
from rlhf_jax.data.packing import PADDED, Packing, pack_responses
from rlhf_jax.errors import UserError
from rlhf_jax.losses import next_token_loss
from rlhf_jax.models import Model
from rlhf_jax.models.experts import Routing, balanced
from rlhf_jax.runs.directory import Summary
from rlhf_jax.runs.twin import in_buckets
from rlhf_jax.tokens import Packed
from rlhf_jax.training.responses import of_batch, of_view, view_of
from rlhf_jax.training.sums import is_ours
from rlhf_jax.training.supervised import Build, Task, begin, finish, fit, setup
from rlhf_jax.types import ArrayLoss, Batch, LossFn, Metrics, Params

Said = tuple[Float[Array, "..."], Routing | None]
"""Log-probs of responses, and what the model's routers did, if it has any."""


def sequence_logprobs(model: Model, params: Params, view: Packed) -> Float[Array, " R"]:
    """log p(response | prompt) in nats of every response of a view; 0 for those that it does not hold."""
    return logprobs_and_routing(model, params, view)[0]


def logprobs_and_routing(model: Model, params: Params, view: Packed) -> Said:
    """`sequence_logprobs`, and what the model's routers did, if it has any."""
    hidden, routing = model.forward(params, **view.inputs)
    logprobs = model.logprobs(params, hidden, view.targets, needed=view.predicts)[0]
    return jnp.zeros(view.num_rows, logprobs.dtype).at[view.row].add(logprobs, mode="drop"), routing


def of_all(model: Model, params: Params, batch: Batch) -> Said:
    """`logprobs_and_routing` of the K responses to each prompt, [B, K]; 0 where there is none, or not in this view."""
    logprobs, routing = logprobs_and_routing(model, params, view_of(batch))
    return logprobs.reshape(len(batch["weights"]), -1), routing


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The responses of a batch of `collate_unpaired`, and those to other prompts, as batches of one response each."""
    if "other" in batch:
        return {name: x for name, x in batch.items() if name != "other"}, batch["other"]
    own, other = ({name: x[:, i : i + 1] if name in PADDED else x for name, x in batch.items()} for i in range(2))
    return own, other


def pack_unpaired(batch: Batch, packing: Packing) -> Batch:
    """Own responses packed, and the others under "other": only the first get a backward pass."""
    own, other = (pack_responses(half, packing) for half in halves(batch))
    return {**own, "other": {name: other[name] for name in ("packed", "weights")}}


def both_logprobs(model: Model, params: Params, batch: Batch) -> Float[Array, "B 2"]:
    """`sequence_logprobs` of the own response of each row and of that to another prompt."""
    return jnp.concatenate([of_batch(sequence_logprobs, model, params, half) for half in halves(batch)], axis=1)


def with_baseline(model: Model, params: Params, batch: Batch) -> Batch:
    """The own responses of a batch with `other_logprobs` f32[B], which only measure the KL: once a step, no gradient.

    All are set to what gives each row the batch's mean log-ratio to the reference, where the batch has one, so that
    the mean over any microbatch is that of the batch.
    """
    own, other = halves(batch)
    said, weights = of_batch(sequence_logprobs, model, params, other)[:, 0], batch["weights"]
    if "ref_logprobs" in batch:
        ref = batch["ref_logprobs"][:, 1]
        said = ref + jnp.sum(weights * (said - ref)) / jnp.maximum(jnp.sum(weights), 1e-30)
    return {**own, "other_logprobs": said}


def own_and_baseline(model: Model, params: Params, batch: Batch) -> Said:
    """Log-probs of the own response and what `with_baseline` says of the other, [B, 2]."""
    own, routing = of_all(model, params, batch)
    return jnp.concatenate([own, batch["other_logprobs"][:, None]], axis=1), routing


def columns_read(loss: ArrayLoss) -> list[str]:
    """The arguments of a loss that come from a batch: those without a default."""
    return [name for name, p in inspect.signature(loss).parameters.items() if p.default is p.empty]


def of_columns(loss: ArrayLoss, logprobs: Float[Array, "B K"], batch: Batch) -> tuple[Array, Metrics]:
    """A loss of the columns of a batch that it names."""
    columns = {**batch, "logprobs": logprobs}
    if unknown := set(columns_read(loss)) - set(columns):
        raise UserError(f"the loss reads {sorted(unknown)}, which a batch does not have; it has {sorted(columns)}")
    return loss(**{name: columns[name] for name in columns_read(loss)})


def objective(
    model: Model,
    loss: ArrayLoss,
    *,
    sft_coef: float = 0.0,
    logprobs: Callable[[Model, Params, Batch], Said] = of_all,
) -> LossFn:
    """loss(columns of the batch by name) + sft_coef * NLL of the responses to imitate.

    The columns are those of `collate_preference` (or its siblings) and logprobs [B, K], summed over each response.
    """

    def loss_fn(params: Params, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        (said, routing), batch = logprobs(model, params, batch), of_view(batch, view_of(batch))
        value, metrics = of_columns(loss, said, batch)
        nll, nll_metrics = next_token_loss(said, batch["token_weights"])
        metrics = {**metrics, **nll_metrics}
        return balanced(model.balance_coef, value + sft_coef * nll, metrics, routing, batch["weights"].sum())

    return loss_fn


def task_of(config: DPOArgs | KTOArgs | RRHFArgs, loss: ArrayLoss | None = None) -> Task:
    """The method whose settings these are; `loss` replaces the config's."""
    settings: DPOConfig | KTOConfig | RRHFConfig
    build: Build
    group, collate, logprobs = "dpo", lambda _: collate_preference, of_all
    says: Callable[[Model, Params, Batch], Array] = partial(of_batch, sequence_logprobs)
    pack, prepare = pack_responses, None
    if isinstance(config, KTOArgs):
        settings, group, build, collate = config.kto, "kto", unpaired_examples, lambda _: collate_unpaired
        logprobs, pack, prepare, says = own_and_baseline, pack_unpaired, with_baseline, both_logprobs
    elif isinstance(config, RRHFArgs):
        settings, group, build, collate = config.rrhf, "rrhf", ranking_examples, of_most_responses
    else:
        settings = config.dpo
    bound = bind(loss or settings.loss, settings)
    if group == "dpo":
        build = partial(preference_examples, margins="margins" in columns_read(bound))
    return Task(
        group,
        build,
        collate,
        objective=lambda model: objective(model, bound, sft_coef=settings.sft_coef, logprobs=logprobs),
        shown=("loss/total", "rewards/accuracy", "eval/accuracy", "time/tokens_per_s"),
        reference=says if "ref_logprobs" in columns_read(bound) else None,
        pack=pack,
        prepare=prepare,
        foreign=None if is_ours(bound) else partial(of_columns, bound),
    )


@in_buckets
def run(
    config: DPOArgs | KTOArgs | RRHFArgs,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    loss: ArrayLoss | None = None,
) -> Summary:
    """Train as configured and write the run directory; returns its summary.

    DPO learns from preferences, KTO from rows {prompt, response, label} or from preferences taken apart, RRHF from
    rankings of several responses to a prompt; preferences are rankings of two. `rows` and `eval_rows` (lists of dicts)
    replace the config's files, `loss` its loss.
    """
    task = task_of(config, loss)
    claim = begin(task.group, config, task.group, rows=rows, eval_rows=eval_rows, loss=loss)
    if isinstance(claim, dict):  # it is finished
        return claim
    with jax.set_mesh(claim.mesh.grid):
        work = setup(task, claim)
        with work.open() as out:
            params = fit(work, out)
            return finish(work, out, params, work.evaluate(params))
