"""Training one model on rows that stay as they are. A method's `run` reads begin -> setup -> fit -> finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax

from rlhf_jax.config import DataConfig, StepsConfig, TrainArgs
from rlhf_jax.config.functions import replace
from rlhf_jax.data.batches import Batches, fingerprint
from rlhf_jax.data.collate import Batch, Collate, real_tokens
from rlhf_jax.data.encoding import Example, Limits, Report
from rlhf_jax.data.loading import Rows, filled_batch, held_out_batches, length_buckets, load_rows, make_examples
from rlhf_jax.data.packing import Packing, cheapest_packing, fill
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError, tell
from rlhf_jax.hosts.processes import is_first, say
from rlhf_jax.keys import branch
from rlhf_jax.models import Model, hf
from rlhf_jax.models.hf import hub
from rlhf_jax.models.loading import (
    Head,
    Loaded,
    arch_of,
    check_balance,
    check_length,
    check_targets,
    check_vocabulary,
    load_model,
    load_tokenizer,
    save_model,
)
from rlhf_jax.runs.directory import Summary, names_given
from rlhf_jax.runs.run import Run
from rlhf_jax.sharding import Mesh, check_rows, make_mesh
from rlhf_jax.training.loop import (
    Evaluate,
    check_trained,
    claim_directory,
    describe,
    make_evaluate,
    run_steps,
    settled_on,
)
from rlhf_jax.training.nans import first_nan
from rlhf_jax.training.reference import add_reference
from rlhf_jax.training.responses import OfSaid, no_sums
from rlhf_jax.training.state import create_state, digest, learning_rates, make_optimizer, make_schedule
from rlhf_jax.training.step import accumulated_grads, make_train_step
from rlhf_jax.types import ArrayLoss, LossFn, Metrics, Params

LOOKED_AT = 8
"""Batches from which `data.pack` auto chooses."""

WORTH = 0.9
"""It packs where that computes at most this share of what padding does."""

Pack = Callable[[Batch], Batch]
"""A padded batch of responses, packed."""

Build = Callable[[list[Row], Tokenizer, Limits], tuple[list[Example], Report]]
"""Makes token examples of rows; the report says what became of each row."""


@dataclass(frozen=True)
class Task:
    """What a method is. The module of its command has a `task_of(config)`, from which `rlhf-jax plan` knows it, too.

    Attributes:
        group: name of its settings in the config.
        build: makes examples.
        collate: (all examples) -> what makes a batch of some of them, given length= and pad_id=.
        objective: of a model, what to minimise.
        shown: metrics of the progress bar.
        head: as for `load_model`, and so are `members` and `own_adapters`.
        resample: what becomes of the training examples, and of no held-out ones; None if nothing.
        reference: (model, params, batch) -> f32[B, K]: what the model says of every example before it is trained,
            which the example has as ref_logprobs from then on.
        pack: (batch, packing) -> a packed batch, which objective and reference take as well; None if there is none.
        prepare: (model, params, batch) -> batch: what the objective needs of a whole batch, before its microbatches
            and without gradient; None if nothing.
        foreign: somebody else's loss, which may not be the sum over rows that microbatches need; None for our own.
    """

    group: str
    build: Build
    collate: Callable[[Sequence[Example]], Collate]
    objective: Callable[[Model], LossFn]
    shown: tuple[str, ...]
    head: Head = "vocabulary"
    members: int = 0
    own_adapters: bool = False
    resample: Callable[[Sequence[Example]], list[Example]] | None = None
    reference: Callable[[Model, Params, Batch], jax.Array] | None = None
    pack: Callable[[Batch, Packing], Batch] | None = None
    prepare: Callable[[Model, Params, Batch], Batch] | None = None
    foreign: OfSaid | None = None

    def preparation(self, model: Model) -> Callable[[Params, Batch], Batch] | None:
        """`prepare` of a model."""
        return None if self.prepare is None else partial(self.prepare, model)


@dataclass(frozen=True)
class Claim:
    """A run that has its directory, devices, tokenizer and rows.

    Attributes:
        name: of the command.
        asked: the config as it was given, which the run's directory holds.
        config: the same, its batch made smaller where there are few rows, and with what kind of rows they are.
        settings: the group of `config` that is the method's own.
        given: names of the arguments that replaced parts of the config.
        files: contents of the files that the config names.
        key: the run's.
    """

    name: str
    asked: TrainArgs
    config: TrainArgs
    settings: StepsConfig
    given: tuple[str, ...]
    files: Mapping[str, str]
    mesh: Mesh
    key: jax.Array
    tokenizer: Tokenizer
    rows: list[Row]
    held_out_rows: list[Row]

    def steps(self, batches: Batches) -> int:
        """Optimiser steps of the run.

        Raises:
            UserError: more than int32 counts.
        """
        epochs, total = self.settings.epochs, self.settings.steps or self.settings.epochs * len(batches)
        if total >= 2**31:
            raise UserError(f"epochs {epochs} of {len(batches)} batches are {total} steps, over 2**31 - 1; lower it")
        return total


FEW_STEPS = 10
"""A run that its rows give fewer steps says so at its end."""


@dataclass(frozen=True)
class Work:
    """What is there before the first step.

    Attributes:
        loaded: the model; `fit` donates its parameters.
        batches: of the training examples, by step.
        held_out: batches of the held-out examples, packed as those of training are.
        loss_fn: of all parameters.
        evaluate: the held-out loss and its metrics, of parameters as they are trained (`Loaded.params`).
        identity: what a continued run must find unchanged, beside the rows and what is frozen.
        remarks: what the run says of its rows and steps at its end.
    """

    task: Task
    claim: Claim
    loaded: Loaded
    train_set: list[Example]
    held_out_set: list[Example]
    collate: Collate
    batches: Batches
    held_out: list[Batch]
    loss_fn: LossFn
    evaluate: Evaluate
    identity: dict[str, int | str | None]
    remarks: list[str]

    def open(self) -> Run:
        """The run, to be entered; as many steps as the settings say, else as their epochs have."""
        claim, total = self.claim, self.claim.steps(self.batches)
        return Run(claim.name, claim.asked, total=total, shown=self.task.shown, given=claim.given, files=claim.files)


def begin(
    name: str, config: TrainArgs, group: str, *, rows: Rows | None, eval_rows: Rows | None, loss: ArrayLoss | None
) -> Claim | Summary:
    """Claim the run directory and load all but the model; the summary of a run that is finished there already.

    `rows` and `eval_rows` replace the config's files, `loss` its loss. `group` is the name of the method's settings.
    """
    given = names_given(rows=rows, eval_rows=eval_rows, loss=loss)
    finished, files = claim_directory(name, config, given)
    if finished is not None:
        return finished
    key, settings = jax.random.key(config.run.seed), getattr(config, group)
    mesh, tokenizer, *split = inputs_of(config, group, rows, eval_rows)
    return Claim(name, config, config, settings, given, files, mesh, key, tokenizer, *split)


def inputs_of(
    config: TrainArgs, group: str, rows: Rows | None, eval_rows: Rows | None
) -> tuple[Mesh, Tokenizer, list[Row], list[Row]]:
    """Devices, tokenizer, training and held-out rows; a UserError where the config does not fit devices or model."""
    mesh, rows_at_once = make_mesh(config.mesh), config.data.batch_size // getattr(config, group).accumulate
    check_rows(mesh, rows_at_once, f"data.batch_size / {group}.accumulate =")
    check_length(arch := arch_of(config.model), config.data.max_length, "data.max_length")  # before rows are read
    check_balance(config.model, arch)
    check_targets(config.model, config.lora, arch)
    return mesh, load_tokenizer(config.model), *load_rows(config.data, rows, eval_rows, config.run.seed)


def examples_of(
    task: Task, data: DataConfig, tokenizer: Tokenizer, rows: list[Row], held_out_rows: list[Row]
) -> tuple[list[Example], list[Example], Collate, list[str]]:
    """Training and held-out examples, what makes batches of them, and what to say of the rows at the end."""
    limits = Limits.of(data)
    build = lambda part: task.build(part, tokenizer, limits)  # noqa: E731
    train_set, held_out_set, remarks = make_examples(build, rows, held_out_rows)
    collate = partial(task.collate([*train_set, *held_out_set]), length=data.max_length, pad_id=tokenizer.pad_id)
    return train_set, held_out_set, collate, remarks


def setup(task: Task, claim: Claim) -> Work:
    """Examples, batches, the model on the mesh and what the reference says; call it inside `jax.set_mesh`."""
    config, data, mesh, key = claim.config, claim.config.data, claim.mesh, claim.key
    rows = claim.rows, claim.held_out_rows
    train_set, held_out_set, collate, remarks = examples_of(task, data, claim.tokenizer, *rows)
    train_set = task.resample(train_set) if task.resample else train_set
    multiple = mesh.row_ways * claim.settings.accumulate
    claim = replace(claim, config__data__batch_size=filled_batch(data, len(train_set), multiple))
    config, data = claim.config, claim.config.data
    seed, buckets = config.run.seed, length_buckets(data)
    batches = Batches(train_set, batch_size=data.batch_size, seed=seed, collate=collate, buckets=buckets)
    if (total := claim.steps(batches)) < FEW_STEPS and not claim.settings.steps:
        cure = f"raise {task.group}.epochs ({claim.settings.epochs}) or lower data.batch_size ({data.batch_size})"
        remarks.append(f"{total} optimiser steps are few for {len(train_set)} rows to be learned; {cure}")
    if config.model.path and hf.own_adapters(hub.local_directory(config.model.path)):
        cure = "train adapters on the model that they stand on"
        raise UserError(
            f"{config.model.path} is a reward ensemble of adapters, on which no other model stands; {cure}"
        )
    loaded = load_model(
        config.model, mesh, branch(key, "weights"), head=task.head, lora=config.lora, length=data.max_length,
        members=task.members, own_adapters=task.own_adapters,
    )  # fmt: skip
    if loaded.model.members != task.members:
        held, wanted = loaded.model.members or 1, task.members or 1
        raise UserError(f"{config.model.path} has {held} trained heads, not reward.members {wanted}; set it to {held}")
    check_vocabulary(loaded.model.arch, claim.tokenizer, config.model.path or "model.arch")
    parts = (examples[i : i + 64] for examples in (train_set, held_out_set) for i in range(0, len(examples), 64))
    pack = choose_packing(task, claim, loaded.model, batches, map(collate, parts))
    if pack is not None:
        packed = lambda examples: pack(collate(examples))  # noqa: E731
        batches = Batches(train_set, batch_size=data.batch_size, seed=seed, collate=packed)
    identity: dict[str, int | str | None] = {}
    if task.reference is not None:
        forward = jax.jit(partial(task.reference, loaded.model))
        read = [train_set[i] for i in batches.reached(total)]
        say(f"reference: asked about {len(read)} of {len(train_set)} training examples, all that {total} steps reach")
        asked = [read, held_out_set[: data.batch_size * data.eval_batches or None]]
        identity |= add_reference(forward, loaded, config, mesh, asked, collate, pack)
    held_out, loss_fn = held_out_batches(data, held_out_set, collate), task.objective(loaded.model)
    identity["held-out rows"] = fingerprint(held_out)
    held_out = held_out if pack is None else [pack(batch) for batch in held_out]
    prepare = task.preparation(loaded.model)
    evaluate = make_evaluate(loss_fn, mesh, held_out, branch(key, "held-out loss"), prepare=prepare)
    of_trained = lambda params: evaluate(loaded.whole(params))  # noqa: E731
    return Work(
        task, claim, loaded, train_set, held_out_set, collate, batches, held_out, loss_fn, of_trained, identity,
        remarks,
    )  # fmt: skip


def packing_of(
    data: DataConfig, shape: tuple[int, ...], accumulate: int, mesh: Mesh, needed: int = 0, times: int = 1
) -> Packing:
    """How padded batches of responses [B, K, S] are packed into sequences of `times` S.

    An example needs `needed` of them at most, 0 if all its responses may be of S tokens.
    """
    rows, width, length = shape
    size, most = (rows, needed or -(-width // times), times * length), -(-rows * width // (accumulate * times))
    return Packing.of(*size, tokens=data.microbatch_tokens, most=most, ways=mesh.row_ways, shared=True)


def choose_packing(
    task: Task, claim: Claim, model: Model, batches: Batches | Sequence[Batch], everything: Iterable[Batch]
) -> Pack | None:
    """What packs the batches of a run, None where they stay padded; says what `data.pack` auto chose and why.

    The first batches decide, on the length of sequences as well: they are for as many padded rows as cost least, a
    column its matrix products and attention over the S columns of a sequence about S / (6 width) times as much.
    `everything` are all examples that it will ever pack.

    Raises:
        UserError: packing is asked for, and the method has no use for it.
    """
    data = claim.config.data
    if data.pack == "on" and task.pack is None:
        raise UserError(f"data.pack on: {task.group} does not pack responses; set it to auto (sft has sft.pack)")
    if data.pack == "off" or task.pack is None or data.length_buckets:
        return None
    some = [batches[step] for step in range(min(len(batches), LOOKED_AT))]
    if task.foreign is not None and (apart := no_sums(task.foreign, some[0], baseline=task.prepare is not None)):
        name = "loss" if "loss" in apart else min(apart)
        whole, halves = apart[name]
        what = f"{name} is {whole:.5g} of some rows and {halves:.5g} of two halves of them together, no sum over rows"
        if data.pack == "on":
            raise UserError(f"data.pack on: {what}; make it a sum of weights * something, or set data.pack off")
        tell(f"data.pack auto: padded; {what}")
        return None
    shape = some[0]["tokens"].shape
    length, of = shape[-1], partial(packing_of, data, shape, claim.settings.accumulate, claim.mesh)
    times = data.microbatch_tokens // length
    pack, packed = cheapest_packing(task.pack, of, some, everything, times=times, width=model.arch.width)
    computed, real = fill(packed, length)
    packs = data.pack == "on" or computed <= WORTH
    if is_first():
        columns = packed[0]["packed"].tokens.shape[-1]
        once = ", prompts once for their responses" if packed[0]["packed"].branches is not None else ""
        what = f"packing computes {computed:.0%} of columns padded to {length} tokens, {real:.0%} are real{once}"
        tell(f"data.pack {data.pack}: {'packed' if packs else 'padded'}; {what}, in sequences of {columns}")
    return pack if packs else None


def fit(work: Work, run: Run, at_evaluation: Callable[[int, Params], None] | None = None) -> Params:
    """Train on batches[run.start] .. up to run.total, from the run's checkpoint if it has one; the kept parameters.

    The held-out loss decides which are kept. `at_evaluation(step, params)` comes before each evaluation. With a frozen
    base what is trained and kept are the adapters and heads; only at_evaluation gets all parameters.
    """
    claim, loaded, batches, frozen = work.claim, work.loaded, work.batches, work.loaded.frozen
    mesh, optim, accumulate = claim.mesh, claim.config.optim, claim.settings.accumulate
    facts = {"steps": run.total, "tokens_of_the_first_step": real_tokens(batches[0]), "epoch_steps": len(batches)}
    facts["rows_left_over_by_each_epoch"] = batches.left_over
    for line in (*describe(run.stage, mesh, loaded, **facts), settled_on(claim.config, run.total)):
        run.say(line)
    schedule = make_schedule(optim, run.total)
    tx = make_optimizer(optim, schedule)
    state = create_state(loaded.params, tx, mesh)
    prepare = work.task.preparation(loaded.model)
    compiled = make_train_step(work.loss_fn, tx, accumulate, mesh=mesh, state=state, frozen=frozen, prepare=prepare)
    identity = {"training rows": batches.cursor(), **work.identity}
    if frozen is not None:
        identity["weights of the frozen model"] = digest(frozen)
    tree, notes = run.restore({"state": state}, identity)
    run.skips.rows_of = batches.where

    def evaluate(step: int, params: Params) -> dict[str, float]:
        if at_evaluation is not None:
            at_evaluation(step, loaded.whole(params))
        return work.evaluate(params)

    def on_whole(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        return work.loss_fn(loaded.whole(params), batch, key)

    def grads_of(params: Params, batch: Batch, key: jax.Array) -> tuple[Params, Metrics]:
        batch = batch if prepare is None else prepare(loaded.whole(params), batch)
        return accumulated_grads(on_whole, params, batch, key, accumulate)

    state = run_steps(
        run,
        compiled if frozen is None else lambda *args: compiled(*args, frozen),
        tree["state"],
        batches,
        branch(claim.key, "training"),
        mesh=mesh,
        rates=learning_rates(schedule),
        evaluate=evaluate,
        explain=partial(first_nan, grads_of),
        notes=notes,
    )
    check_trained(run.skips.total, run.total, run.dir)
    return run.restore_best({"state": {"params": state.params}})["state"]["params"]


def finish(work: Work, run: Run, params: Params, summary: Summary) -> Summary:
    """Write the model of the kept parameters and the summary, which is returned."""
    run.metrics.bar.doing("writing the model")
    save_model(run.dir / "model", work.loaded, params, work.claim.tokenizer)
    width = max(len(example.get("responses", "ab")) for example in [*work.train_set, *work.held_out_set])
    return run.finish({**summary, **run.calibration(work.claim.config, width)}, work.remarks)
