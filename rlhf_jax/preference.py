"""DPO, KTO, RRHF and kin: a policy from preferences alone, without a reward model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from tqdm import tqdm

from rlhf_jax.config import DPOArgs, KTOArgs, RRHFArgs, bind
from rlhf_jax.data.collate import Collate, collate_preference, collate_ranking, collate_unpaired
from rlhf_jax.data.comparisons import preference_examples, ranking_examples
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.loading import Rows, load_rows, make_examples
from rlhf_jax.data.singles import unpaired_examples
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import is_first, to_host
from rlhf_jax.losses import next_token_loss
from rlhf_jax.models import Model
from rlhf_jax.runs.directory import names_given
from rlhf_jax.sharding import put_batch
from rlhf_jax.training.state import digest
from rlhf_jax.training.supervised import Stage, run_stage
from rlhf_jax.types import LossFn, Params


def own_and_other(model: Model, params: Params, batch: Any) -> jax.Array:
    """As `response_logprobs`, but the second response, which only measures the KL, gets no backward pass."""
    own, other = (
        {name: array[:, i : i + 1] if array.ndim > 2 else array for name, array in batch.items()} for i in range(2)
    )
    frozen = jax.lax.stop_gradient(params)
    both = sequence_logprobs(model, params, own), sequence_logprobs(model, frozen, other)
    return jnp.concatenate(both, axis=1)


def run_kto(
    config: KTOArgs,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    loss: Callable[..., Any] | None = None,
) -> Any:
    """As `dpo.run`, on rows {prompt, response, label}, or on preferences, taken apart."""
    singles = lambda examples: collate_unpaired  # noqa: E731
    return train_policy(
        "kto", config, config.kto, unpaired_examples, singles, own_and_other, loss=loss, rows=rows, eval_rows=eval_rows
    )


def run_dpo(
    config: DPOArgs,
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


def sequence_logprobs(model: Model, params: Params, batch: Any) -> Float[Array, "B K"]:
    """log p(response | prompt) in nats of the K responses to each prompt, in one forward pass of B K rows.

    A batch of `collate_preference`, `collate_unpaired` or `collate_ranking`; 0 where there is no response.
    """
    tokens, positions, segment_ids = (
        batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "positions", "segment_ids")
    )
    hidden = model.apply(params, tokens, positions, segment_ids)
    logprobs, _ = model.logprobs(params, hidden[:, :-1], tokens[:, 1:])
    logprobs = logprobs.reshape(*batch["tokens"].shape[:2], -1)
    # Tokens [a, b, c] of a prompt a: the targets b, c stand at positions 1, 2, not below its length 1.
    targets = (batch["positions"] >= batch["prompt_lengths"][:, None, None]) & (batch["segment_ids"] > 0)
    return jnp.sum(jnp.where(targets[:, :, 1:], logprobs, 0.0), axis=-1)


def add_reference(stage: Stage) -> dict[str, Any]:
    """Put `ref_logprobs` float32[K] into every example: what the model that training starts from says.

    Computed once, so that no reference is in memory while the policy is trained; returns its digest, by name.
    """
    forward = jax.jit(partial(sequence_logprobs, stage.loaded.model))
    params = stage.loaded.whole(stage.loaded.params)
    size, sets = stage.config.data.batch_size, (stage.train_set, stage.held_out_set)
    batches = [examples[i : i + size] for examples in sets for i in range(0, len(examples), size)]
    shows = stage.config.run.progress and is_first()
    for rows in tqdm(batches, desc="reference", disable=not shows, dynamic_ncols=True):
        [batch] = stage.in_batches(rows)
        found = to_host(forward(params, put_batch(stage.mesh, batch)))
        for example, logprobs in zip(rows, found[: len(rows)], strict=True):
            example["ref_logprobs"] = logprobs
    return {"weights of the reference model": digest(params)}


def columns_read(loss: Callable[..., Any]) -> list[str]:
    """The arguments of a loss that come from a batch: those without a default."""
    return [name for name, p in inspect.signature(loss).parameters.items() if p.default is p.empty]


def objective(
    model: Model,
    loss: Callable[..., Any],
    *,
    sft_coef: float = 0.0,
    logprobs: Callable[..., jax.Array] = sequence_logprobs,
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
    logprobs: Callable[..., jax.Array] = sequence_logprobs,
    *,
    loss: Callable[..., Any] | None,
    **rows: Rows | None,
) -> Any:
    """Train on the examples that `build` makes of rows; `collate_for` them is what makes batches."""
    bound = bind(loss or settings.loss, settings)

    def load(tokenizer: Tokenizer) -> tuple[list[Any], list[Any], Collate]:
        split = load_rows(config.data, rows["rows"], rows["eval_rows"], config.run.seed)
        sets = make_examples(partial(build, tokenizer=tokenizer, limits=Limits.of(config.data)), *split)
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


def collate_for(examples: Sequence[Any]) -> Collate:
    """What makes batches of rankings; K is the most responses that one of `examples` has."""
    return partial(collate_ranking, width=max(len(example["responses"]) for example in examples))


def run_rrhf(
    config: RRHFArgs,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    loss: Callable[..., Any] | None = None,
) -> Any:
    """As `dpo.run`, on rankings of several responses to a prompt; preferences are rankings of two."""
    return train_policy(
        "rrhf", config, config.rrhf, ranking_examples, collate_for, loss=loss, rows=rows, eval_rows=eval_rows
    )
