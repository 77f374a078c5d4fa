"""The loop around a train step: batches in, metrics and the best parameters out. Floor 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.run import Run, fetch_scalars
from rlhf_jax.sharding import put_batch
from rlhf_jax.state import Schedule, TrainState, learning_rates
from rlhf_jax.step import Step, add_metrics
from rlhf_jax.types import LossFn, Params


def make_evaluate(
    loss_fn: LossFn, mesh: Mesh, batches: list[Any], key: jax.Array
) -> Callable[[Params], dict[str, float]]:
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
        return {f"eval/{name.split('/')[-1]}": value for name, value in fetch_scalars(total).items()}

    return evaluate


def fit(
    run: Run,
    step: Step,
    state: TrainState,
    batches: Any,
    *,
    steps: int,
    mesh: Mesh,
    key: jax.Array,
    schedule: Schedule,
    tokens_per_step: int,
    evaluate: Callable[[int, Params], dict[str, float]],
    better: Callable[[dict[str, float]], float],
) -> TrainState:
    """Run `steps` steps; batch i is batches[i] and its key fold_in(key, i).

    Every run.eval_every steps, and at the end, `evaluate(step, params)` is logged, and `better` of it decides which
    parameters are kept.
    """
    rates = learning_rates(schedule, steps)
    logged = 0
    run.restart_clock()
    for i in range(steps):
        state, metrics = step(state, put_batch(mesh, batches[i]), jax.random.fold_in(key, i))
        run.advance()
        if (i + 1) % run.config.log_every == 0 or i + 1 == steps:
            run.log(i + 1, metrics, {"optim/lr": rates[i]}, tokens=tokens_per_step * (i + 1 - logged))
            logged = i + 1
        if i + 1 == steps or (run.config.eval_every and (i + 1) % run.config.eval_every == 0):
            run.flush()
            results = evaluate(i + 1, state.params)
            run.write(i + 1, results)
            if results:
                run.keep_if_best(i + 1, better(results), state.params)
            run.restart_clock()
    return state
