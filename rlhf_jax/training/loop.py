"""A stage's directory claimed, and the loop around a train step: batches in, metrics and the best parameters out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.config import StageArgs
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.collate import real_tokens
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import clock
from rlhf_jax.hosts.processes import from_first
from rlhf_jax.models.contents import contents
from rlhf_jax.models.kernels import count
from rlhf_jax.models.loading import Loaded
from rlhf_jax.runs.directory import Summary, check_output_dir, read_record
from rlhf_jax.runs.run import Run
from rlhf_jax.sharding import Mesh, put_batch
from rlhf_jax.training.packing import over_views
from rlhf_jax.training.state import TrainState, warmup_of
from rlhf_jax.training.step import Step, add_metrics, fetch_scalars, no_metrics, settled
from rlhf_jax.types import Batch, LossFn, Metrics, Params

Evaluate = Callable[[Params], dict[str, float]]


def claim_directory(stage: str, config: StageArgs, given: Sequence[str] = ()) -> tuple[Summary | None, dict[str, str]]:
    """(`check_output_dir`, the `contents` of the config, which `Run` takes), as process 0 finds them.

    Chat templates see the time at which the run that is there began, else that of now.
    """

    def claim() -> tuple[Summary | None, dict[str, str], str]:
        files = contents(config)
        summary = check_output_dir(stage, config, given, files)
        there = None if config.run.overwrite else read_record(Path(config.run.output_dir))
        return summary, files, clock.begin((there or {}).get("time"))

    summary, files, time = from_first(claim)
    clock.begin(time)
    return summary, files


def make_evaluate(
    loss_fn: LossFn,
    mesh: Mesh,
    batches: list[Batch],
    key: jax.Array,
    *,
    prepare: Callable[[Params, Batch], Batch] | None = None,
) -> Evaluate:
    """params -> metrics over all the batches, whose weights sum to one together, as eval/name.

    `prepare` is that of `make_update`.
    """

    def one(params: Params, batch: Batch, key: jax.Array) -> Metrics:
        loss, metrics = loss_fn(params, batch, key)
        return {"loss/total": loss, **metrics}

    @jax.jit
    def forward(params: Params, batch: Batch, key: jax.Array) -> Metrics:
        if prepare is not None:
            batch = prepare(params, batch)
        if "packed" not in batch:
            return one(params, batch, key)
        of_view = lambda view, _: one(params, {**batch, "packed": view}, key)  # noqa: E731
        return over_views(batch["packed"], of_view, no_metrics, add_metrics)

    def evaluate(params: Params) -> dict[str, float]:
        total = None
        for batch in batches:
            metrics = forward(params, put_batch(mesh, batch), key)
            total = metrics if total is None else add_metrics(total, metrics)
        return {f"eval/{name.split('/')[-1]}": value for name, value in fetch_scalars(settled(total or {})).items()}

    return evaluate


def run_steps(
    run: Run,
    step: Step,
    state: TrainState,
    batches: Batches,
    key: jax.Array,
    *,
    mesh: Mesh,
    rates: Callable[[int], float],
    evaluate: Callable[[int, Params], dict[str, float]],
    explain: Callable[[Params, Batch, jax.Array], str],
    notes: Mapping[str, Any] | None = None,
) -> TrainState:
    """Run the steps run.start .. run.total - 1; batch i is batches[i], its key fold_in(key, i) and its rate rates(i).

    `notes` are those of a run that goes on: the real tokens and the slots of packed batches since the last line.

    Every run.eval_every steps, and at the end, `evaluate(step, params)` is logged, and the parameters with the lowest
    eval/total are kept. With faults.debug_nans, `explain(params, batch, key)` says what is not finite in a step.
    """
    steps, tokens = run.total, 0
    real, slots = (notes or {}).get("filled", (0, 0))
    run.metrics.parts.mark("start")
    for i in range(run.start, steps):
        rows = batches[i]
        batch, step_key = put_batch(mesh, rows), jax.random.fold_in(key, i)
        run.metrics.parts.mark("data")
        state, metrics = step(state, batch, step_key)
        run.metrics.parts.mark("update", metrics["optim/skipped"])
        tokens += (held := real_tokens(rows))
        if "packed" in rows:
            real, slots = real + held, slots + rows["packed"].num_rows * run.settings.data.max_length
        if run.settings.faults.debug_nans and metrics["optim/skipped"] > 0:  # the parameters are as they were before
            run.metrics.report_nan(i + 1, explain(state.params, batch, step_key))
        run.metrics.advance(i + 1, metrics)
        if (i + 1) % run.config.log_every == 0 or i + 1 == steps:
            filled = {"data/filled": real / slots} if slots else {}
            run.metrics.log(i + 1, metrics, {"optim/lr": rates(i), **filled}, tokens=tokens)
            tokens = real = slots = 0
        if i + 1 == steps or (run.config.eval_every and (i + 1) % run.config.eval_every == 0):
            run.metrics.flush()
            run.metrics.bar.doing("evaluating")
            if results := evaluate(i + 1, state.params):  # nothing without held-out rows
                run.metrics.write(i + 1, results)
                run.best.keep(i + 1, -results["eval/total"])
            run.metrics.parts.mark("evaluation")
        run.save_if_due(i + 1, {"state": state}, {"filled": [int(real), int(slots)]})
        run.metrics.parts.mark("save")
    return state


def check_rewarded(iterations: int, failed: int, directory: Path) -> None:
    """Raise a UserError if the reward failed in all iterations of a run; call it before a model is written."""
    if failed >= iterations > 0:
        raise UserError(
            f"the reward failed in each of the {iterations} iterations: nothing was trained, no model is written; "
            f"{directory} keeps the metrics; mend the reward, then give the command again with --run.overwrite true"
        )


def check_trained(skipped: int, updates: int, directory: Path) -> None:
    """Raise a UserError if all updates of a run were skipped as not finite; call it before a model is written."""
    if skipped >= updates > 0:
        raise UserError(
            f"none of {updates} updates had a finite loss and gradient: nothing was trained, no model is written; "
            f"{directory} keeps the metrics; lower optim.learning_rate, scale the numbers of the rows, or find the "
            "operation with --faults.debug_nans true"
        )


def describe(stage: str, mesh: Mesh, loaded: Loaded, **facts: int) -> list[str]:
    """What is about to happen, in lines."""
    kind = jax.devices()[0].device_kind
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    layers, dtype = loaded.model.arch.num_layers, loaded.model.compute_dtype.name
    trained = "" if loaded.frozen is None else f", of which {count(loaded.params):,} are trained"
    return [
        f"{stage}: {mesh.grid.size} device(s) ({kind}), mesh {axes}",
        f"model: {count(loaded.whole(loaded.params)):,} parameters{trained}, {layers} layers, computing in {dtype}",
        ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in facts.items()),
    ]


def settled_on(config: StageArgs, total: int) -> str:
    """The rates and lengths of a run of `total` steps, which the config may have left open."""
    said = []
    for name in ("optim", "value_optim"):
        if (optim := getattr(config, name, None)) is not None:
            warmup = warmup_of(optim, total)
            slowly = f" after a warm-up of {warmup}" if warmup else ""
            said.append(f"{name}.learning_rate {optim.learning_rate:g}, {optim.schedule}{slowly}")
    data, sampling = config.data, getattr(config, "sampling", None)
    longest = f"responses {sampling.max_new_tokens}" if sampling else f"rows {data.max_length}"
    return f"{'; '.join(said)}; batches of {data.batch_size}, prompts up to {data.max_prompt_length} tokens, {longest}"
