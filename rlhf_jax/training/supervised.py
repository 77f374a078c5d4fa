"""A stage that trains one model on rows that stay as they are, from its config to its summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from rlhf_jax.data.batches import Batches
from rlhf_jax.data.collate import Batch, Collate, eval_batches
from rlhf_jax.data.examples import Example
from rlhf_jax.data.loading import held_out_batches, length_buckets
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import Loaded, check_length, check_vocabulary, load_model, load_tokenizer, save_model
from rlhf_jax.runs.run import Run
from rlhf_jax.sharding import Mesh, check_rows, make_mesh
from rlhf_jax.training.claim import claim_directory
from rlhf_jax.training.loop import Evaluate, num_steps, train
from rlhf_jax.types import LossFn, Params


@dataclass(frozen=True)
class Stage:
    """What is there before the first step.

    Attributes:
        config: all of the command.
        mesh: the devices.
        tokenizer: the model's.
        loaded: the model; training donates its parameters.
        train_set, held_out_set: token examples.
        collate: makes batches of them.
        key: for what is random beside training.
    """

    config: Any
    mesh: Mesh
    tokenizer: Tokenizer
    loaded: Loaded
    train_set: list[Example]
    held_out_set: list[Example]
    collate: Collate
    key: jax.Array

    def in_batches(self, examples: list[Example], limit: int = 0) -> list[Batch]:
        """Examples in order, in batches of the training's size; `limit` caps their number, 0 takes all."""
        size = self.config.data.batch_size
        return eval_batches(examples, batch_size=size, collate=self.collate, limit=limit)


def run_stage(
    name: str,
    config: Any,
    settings: Any,
    *,
    load: Callable[[Tokenizer], tuple[list[Example], list[Example], Collate]],
    objective: Callable[[Stage], LossFn],
    shown: Sequence[str],
    given: tuple[str, ...],
    group: str = "",
    head: Literal["vocabulary", "trained", "normal", "zeros"] = "vocabulary",
    prepare: Callable[[Stage], dict[str, Any]] | None = None,
    watch: Callable[[Stage], Callable[[Run, int, Params], None]] | None = None,
    conclude: Callable[[Stage, Params, Evaluate], tuple[Params, dict[str, Any]]] | None = None,
) -> Any:
    """Train as configured and write the run directory; returns its summary.

    Args:
        name: of the command.
        config: all of it.
        settings: the part of `config` that holds steps, epochs and accumulate; `group` is its name, if not `name`.
        load: training and held-out examples, and what makes batches of them.
        objective: what to minimise.
        shown: metrics of the progress bar.
        given: names of the arguments that replaced parts of the config.
        head: as for `stage.load_model`.
        prepare: adds to the examples what the untrained model makes of them; returns what of it a continued run must
            find unchanged.
        watch: makes what follows every evaluation, (out, step, params) -> None.
        conclude: (the parameters to save, the summary) of the kept ones, with a frozen base those of the adapters and
            heads; without it these and their evaluation.
    """
    finished, files = claim_directory(name, config, given)
    if finished is not None:
        return finished
    key = jax.random.key(config.run.seed)
    mesh, data = make_mesh(config.mesh), config.data
    check_rows(mesh, data.batch_size // settings.accumulate, f"data.batch_size / {group or name}.accumulate =")
    tokenizer = load_tokenizer(config.model)
    train_set, held_out_set, collate = load(tokenizer)
    batches = Batches(
        train_set, batch_size=data.batch_size, seed=config.run.seed, collate=collate, buckets=length_buckets(data)
    )
    with jax.set_mesh(mesh.grid):
        options: dict[str, Any] = {"head": head, "lora": config.lora, "length": data.max_length}
        loaded = load_model(config.model, mesh, branch(key, "weights"), **options)
        check_vocabulary(loaded.model.arch, tokenizer, config.model.path or "model.arch")
        check_length(loaded.model.arch, data.max_length, "data.max_length")
        stage = Stage(config, mesh, tokenizer, loaded, train_set, held_out_set, collate, branch(key, "evaluation"))
        identity = prepare(stage) if prepare is not None else {}
        held_out = held_out_batches(data, held_out_set, collate)
        loss_fn, on_eval = objective(stage), watch(stage) if watch else None
        steps = num_steps(settings, batches)
        with Run(name, config, total=steps, shown=tuple(shown), given=given, files=files) as out:
            parts: dict[str, Any] = {"mesh": mesh, "key": key, "on_eval": on_eval, "identity": identity}
            params, evaluate = train(out, config, settings, loaded, loss_fn, batches, held_out, **parts)
            params, results = conclude(stage, params, evaluate) if conclude else (params, evaluate(params))
            save_model(out.dir / "model", loaded, params, tokenizer)
            return out.finish(results)
