"""The loop around a train step: batches in, metrics and the best parameters out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.data.batches import fingerprint
from rlhf_jax.errors import UserError, tell
from rlhf_jax.hosts.processes import is_first
from rlhf_jax.keys import branch
from rlhf_jax.models.kernels import count
from rlhf_jax.models.loading import Loaded
from rlhf_jax.runs.run import Run
from rlhf_jax.sharding import Mesh, put_batch
from rlhf_jax.training.nans import first_nan
from rlhf_jax.training.state import (
    Schedule,
    TrainState,
    create_state,
    digest,
    learning_rates,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.training.step import Step, accumulated_grads, add_metrics, fetch_scalars, make_train_step, settled
from rlhf_jax.types import LossFn, Params

Evaluate = Callable[[Params], dict[str, float]]


def make_evaluate(loss_fn: LossFn, mesh: Mesh, batches: list[Any], key: jax.Array) -> Evaluate:
    """params -> metrics over all the batches, whose weights sum to one together, as eval/name."""

    @jax.jit
    def forward(params: Params, batch: Any, key: jax.Array) -> Any:
        loss, metrics = loss_fn(params, batch, key)
        return {"loss/total": loss, **metrics}

    def evaluate(params: Params) -> dict[str, float]:
        total = None
        for batch in batches:
            metrics = forward(params, put_batch(mesh, batch), key)
            total = metrics if total is None else add_metrics(total, metrics)
        return {f"eval/{name.split('/')[-1]}": value for name, value in fetch_scalars(settled(total or {})).items()}

    return evaluate


def num_steps(settings: Any, batches: Any) -> int:
    """Optimiser steps of a stage: settings.steps, or settings.epochs over the batches."""
    return settings.steps or settings.epochs * len(batches)


def train(
    out: Run,
    config: Any,
    settings: Any,
    loaded: Loaded,
    loss_fn: LossFn,
    batches: Any,
    held_out: list[Any],
    *,
    mesh: Mesh,
    key: jax.Array,
    on_eval: Callable[[Run, int, Params], None] | None = None,
    identity: dict[str, Any] | None = None,
) -> tuple[Params, Evaluate]:
    """Train `loaded` (its parameters are donated) on batches[out.start], ... up to out.total.

    The held-out loss decides which parameters are kept. `on_eval(out, step, params)` follows every evaluation.
    `identity` is what a continued run must find unchanged, beside the rows and what is frozen.
    Returns the kept parameters and the evaluation of such. With a frozen base all this is of the adapters and heads;
    only on_eval gets all parameters.
    """
    frozen = loaded.frozen
    schedule = make_schedule(config.optim, out.total)
    tx = make_optimizer(config.optim, schedule)
    facts = {"steps": out.total, "tokens_per_step": batches[0]["tokens"].size, "epoch_steps": len(batches)}
    facts["rows_left_over_by_each_epoch"] = batches.left_over
    describe(out.stage, mesh, loaded, **facts)
    evaluate = make_evaluate(loss_fn, mesh, held_out, branch(key, "held-out loss"))

    def on_whole(params: Params, *rest: Any) -> Any:
        return loss_fn(loaded.whole(params), *rest)

    def evaluate_and_report(step: int, params: Params) -> dict[str, float]:
        if on_eval is not None:
            on_eval(out, step, loaded.whole(params))
        return evaluate(loaded.whole(params))

    state = create_state(loaded.params, tx, mesh)
    compiled = make_train_step(loss_fn, tx, settings.accumulate, mesh=mesh, state=state, frozen=frozen)
    step = compiled if frozen is None else lambda *args: compiled(*args, frozen)
    identity = {"training rows": batches.cursor(), "held-out rows": fingerprint(held_out), **(identity or {})}
    if frozen is not None:
        identity["weights of the frozen model"] = digest(frozen)
    tree, _ = out.restore({"state": state}, identity)
    out.rows_of = batches.where
    state = fit(
        out,
        step,
        tree["state"],
        batches,
        mesh=mesh,
        key=branch(key, "training"),
        schedule=schedule,
        tokens_of=lambda batch: batch["tokens"].size,
        evaluate=evaluate_and_report,
        explain=partial(first_nan, partial(accumulated_grads, on_whole, num=settings.accumulate)),
    )
    check_trained(out.skipped, out.total, out.dir)
    best = out.restore_best({"state": {"params": state.params}})
    return best["state"]["params"], lambda params: evaluate(loaded.whole(params))


def fit(
    run: Run,
    step: Step,
    state: TrainState,
    batches: Any,
    *,
    mesh: Mesh,
    key: jax.Array,
    schedule: Schedule,
    tokens_of: Callable[[Any], int],
    evaluate: Callable[[int, Params], dict[str, float]],
    explain: Callable[..., str],
) -> TrainState:
    """Run the steps run.start .. run.total - 1; batch i is batches[i] and its key fold_in(key, i).

    Every run.eval_every steps, and at the end, `evaluate(step, params)` is logged, and the parameters with the lowest
    eval/total are kept. With faults.debug_nans, `explain(params, batch, key)` says what is not finite in a step.
    """
    steps = run.total
    rates = learning_rates(schedule, steps)
    tokens = 0
    run.restart_clock()
    for i in range(run.start, steps):
        batch, step_key = put_batch(mesh, batches[i]), jax.random.fold_in(key, i)
        state, metrics = step(state, batch, step_key)
        tokens += tokens_of(batch)
        if run.settings.faults.debug_nans and metrics["optim/skipped"] > 0:  # the parameters are as they were before
            run.report_nan(i + 1, explain(state.params, batch, step_key))
        run.advance(i + 1, metrics["optim/skipped"])
        if (i + 1) % run.config.log_every == 0 or i + 1 == steps:
            run.log(i + 1, metrics, {"optim/lr": rates[i]}, tokens=tokens)
            tokens = 0
        if i + 1 == steps or (run.config.eval_every and (i + 1) % run.config.eval_every == 0):
            run.flush()
            results = evaluate(i + 1, state.params)
            run.write(i + 1, results)
            run.keep_if_best(i + 1, -results["eval/total"])
            run.restart_clock()
        run.save_if_due(i + 1, {"state": state})
    return state


def check_trained(skipped: int, updates: int, directory: Path) -> None:
    """Raise a UserError if all updates of a run were skipped as not finite; call it before a model is written."""
    if skipped >= updates > 0:
        raise UserError(
            f"none of {updates} updates had a finite loss and gradient: nothing was trained, no model is written; "
            f"{directory} keeps the metrics; lower optim.learning_rate, scale the numbers of the rows, or find the "
            "operation with --faults.debug_nans true"
        )


def describe(stage: str, mesh: Mesh, loaded: Loaded, **facts: Any) -> None:
    """Print what is about to happen."""
    if not is_first():
        return
    kind = jax.devices()[0].device_kind
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    tell(f"{stage}: {mesh.grid.size} device(s) ({kind}), mesh {axes}")
    layers, dtype = loaded.model.arch.num_layers, loaded.model.compute_dtype.name
    trained = "" if loaded.frozen is None else f", of which {count(loaded.params):,} are trained"
    tell(f"model: {count(loaded.whole(loaded.params)):,} parameters{trained}, {layers} layers, computing in {dtype}")
    tell(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in facts.items()))
