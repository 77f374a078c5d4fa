"""The programs of a stage with abstract arguments: the functions that training runs, without a byte of weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import preference, reward, sft
from rlhf_jax.commands.plan.presets import PRESETS, find_preset
from rlhf_jax.config import (
    ArchConfig,
    DPOArgs,
    GroupArgs,
    KTOArgs,
    ModelConfig,
    OnlineConfig,
    PPOArgs,
    RewardArgs,
    RRHFArgs,
    SFTArgs,
    bind,
)
from rlhf_jax.data.collate import collate_preference, collate_ranking, collate_rated, collate_sft, collate_unpaired
from rlhf_jax.errors import UserError
from rlhf_jax.group import checks as group_checks
from rlhf_jax.group import train as group_train
from rlhf_jax.inference.generate import total_length
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.models import Model
from rlhf_jax.models.hf import config_json
from rlhf_jax.models.kernels import quantized
from rlhf_jax.models.loading import Loaded, adapted, check_length
from rlhf_jax.online.programs import Programs
from rlhf_jax.ppo import checks as ppo_checks
from rlhf_jax.ppo import networks as ppo_networks
from rlhf_jax.ppo import train as ppo_train
from rlhf_jax.preference import own_and_other, sequence_logprobs
from rlhf_jax.sharding import Mesh, batch_sharding, check_rows, replicated, tree_shardings
from rlhf_jax.training.state import create_state, make_optimizer, make_schedule, placed_shapes
from rlhf_jax.training.step import make_train_step
from rlhf_jax.types import LossFn, Params, Rollout


class Program(NamedTuple):
    """A jitted function and its abstract arguments.

    Attributes:
        name: what it is called in the table.
        function: jitted.
        arguments: ShapeDtypeStructs with shardings.
        tokens: tokens that one run trains on, scores or makes.
        loops: most times that its one loop of unknown length runs.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    tokens: int
    loops: int = 1


def find_arch(path: str) -> ArchConfig:
    """The shape of a preset, a directory or a config.json.

    Raises:
        UserError: none of these.
    """
    raw = find_preset(path)
    if raw is not None:
        where = Path(path)
        return config_json.to_arch(raw, config_json.family_of(raw, where), where)
    if path.startswith("hf://"):
        known = ", ".join(PRESETS)
        raise UserError(f"{path} has no preset; known are {known}; or give a directory or a config.json")
    return config_json.read_config(path)[0]


def abstract_model(config: ModelConfig, mesh: Mesh, length: int, *, score_head: bool, attention: str) -> Loaded:
    """The model of a config in bfloat16 (unless it says float32), for `length` tokens, as shapes on the mesh."""
    arch = config.arch or find_arch(config.path)
    if config.compute_dtype == "auto":
        config = dataclasses.replace(config, compute_dtype="bfloat16")
    model = dataclasses.replace(
        Model.from_config(config, arch, mesh.rules, score_head=score_head, length=length), attention=attention
    )
    return Loaded(model, _abstract(mesh, lambda key: quantized(model.init(key, config.param_dtype), config.quantize)))


def _abstract(mesh: Mesh, init: Callable[[jax.Array], Params]) -> Params:
    """Shapes of init(key) on the mesh; nothing may run, since its chips do not exist."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    return placed_shapes(shapes, tree_shardings(mesh, shapes))


def _adapted(loaded: Loaded, config: Any, mesh: Mesh) -> Loaded:
    return adapted(loaded, config.lora, partial(_abstract, mesh))


def programs_of(config: Any, mesh: Mesh, *, attention: str, width: int = 2) -> list[Program]:
    """The programs of a stage's config over a mesh, rankings of `width`; call it inside `jax.set_mesh(mesh.grid)`.

    Raises:
        UserError: what the stage itself would refuse: batches, lengths, heads that do not divide.
    """
    if isinstance(config, PPOArgs):
        return _ppo(config, mesh, attention)
    if isinstance(config, GroupArgs):
        return _group(config, mesh, attention)
    return _training(config, mesh, attention, width)


def _rows(mesh: Mesh, **shapes: tuple[tuple[int, ...], Any]) -> dict[str, Any]:
    sharding = batch_sharding(mesh)
    return {n: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for n, (shape, dtype) in shapes.items()}


def _whole(mesh: Mesh, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))


def _key(mesh: Mesh) -> Any:
    return _whole(mesh, jax.eval_shape(lambda: jax.random.key(0)).dtype)


class _Stage(NamedTuple):
    """What is particular to a stage that trains one model: its group of settings, batches and loss.

    Attributes:
        group: name of its settings in the config.
        collate: makes a batch of examples.
        example: one, of two tokens.
        objective: of a model.
        reference: what the untrained model is asked of every batch before training, (model, params, batch).
    """

    group: str
    collate: Callable[..., Any]
    example: dict[str, Any]
    objective: Callable[[Model], LossFn]
    reference: Callable[..., Any] | None = None


def _stage(config: Any, width: int) -> _Stage:
    text = np.zeros(2, np.int32)
    if isinstance(config, SFTArgs):
        collate = partial(collate_sft, reduction=config.sft.loss_reduction)
        document = {"tokens": text, "loss_mask": np.ones(2, bool)}
        return _Stage("sft", collate, document, lambda m: sft.objective(m, bind(config.sft.loss, config.sft)))
    example: dict[str, Any] = {
        "prompt_length": 1, "label": 1.0, "margin": 0.0, "rating": 1.0, "ranks": list(range(width)),
        "chosen": text, "rejected": text, "response": text, "other": text, "responses": [text] * width,
    }  # fmt: skip
    rankings: Callable[..., Any] = partial(collate_ranking, width=width)
    if isinstance(config, RewardArgs):
        settings = config.reward
        name = "pairs" if settings.comparisons == "auto" else settings.comparisons
        kind = reward.KINDS[name]
        of_kind: dict[str, Callable[..., Any]]
        of_kind = {"pairs": collate_preference, "rankings": rankings, "ratings": collate_rated}
        return _Stage(
            "reward", of_kind[name], example, lambda m: kind.objective(m, bind(kind.loss(settings), settings))
        )
    kinds: dict[type, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
        DPOArgs: ("dpo", collate_preference, sequence_logprobs),
        KTOArgs: ("kto", collate_unpaired, own_and_other),
        RRHFArgs: ("rrhf", rankings, sequence_logprobs),
    }
    group, collate_for, logprobs = kinds[type(config)]
    own = getattr(config, group)
    loss = bind(own.loss, own)
    read = "ref_logprobs" in preference.columns_read(loss)
    if read:
        example["ref_logprobs"] = np.zeros(width if group == "rrhf" else 2, np.float32)
    objective = partial(preference.objective, loss=loss, sft_coef=own.sft_coef, logprobs=logprobs)
    return _Stage(group, collate_for, example, objective, sequence_logprobs if read else None)


def _training(config: Any, mesh: Mesh, attention: str, width: int) -> list[Program]:
    """The step of a stage that trains one model on rows, after what it asks of the untrained one."""
    stage, size, length = _stage(config, width), config.data.batch_size, config.data.max_length
    accumulate = getattr(config, stage.group).accumulate
    check_rows(mesh, size // accumulate, f"data.batch_size / {stage.group}.accumulate =")
    loaded = abstract_model(config.model, mesh, length, score_head=stage.group == "reward", attention=attention)
    loaded = _adapted(loaded, config, mesh)
    check_length(loaded.model.arch, length, "data.max_length")
    one = stage.collate([stage.example], length=length)
    batch = _rows(mesh, **{name: ((size, *x.shape[1:]), x.dtype) for name, x in one.items()})
    tx = make_optimizer(config.optim, make_schedule(config.optim, 1000))
    state, frozen = create_state(loaded.params, tx, mesh), loaded.frozen
    step = make_train_step(stage.objective(loaded.model), tx, accumulate, mesh=mesh, state=state, frozen=frozen)
    tokens = math.prod(batch["tokens"].shape)
    arguments = (state, batch, _key(mesh)) if frozen is None else (state, batch, _key(mesh), frozen)
    found = [Program("step", step, arguments, tokens)]
    if stage.reference is not None:
        asked = {name: x for name, x in batch.items() if name != "ref_logprobs"}
        forward = jax.jit(partial(stage.reference, loaded.model))
        found.insert(0, Program("reference", forward, (loaded.whole(loaded.params), asked), tokens))
    return found


def _policy_and_reward(config: PPOArgs | GroupArgs, mesh: Mesh, attention: str) -> tuple[Loaded, Loaded | None]:
    length = total_length(config.sampling, config.data.max_prompt_length)
    policy = abstract_model(config.model, mesh, length, score_head=False, attention=attention)
    if not config.reward.model:
        return policy, None
    named = dataclasses.replace(config.model, path=config.reward.model, arch=None)
    return policy, abstract_model(named, mesh, length, score_head=True, attention=attention)


def _group(config: GroupArgs, mesh: Mesh, attention: str) -> list[Program]:
    group_checks.check_batches(config, mesh)
    _, settings = group_checks.settings_of(config)
    policy, reward_model = _policy_and_reward(config, mesh, attention)
    nets = group_train.assemble(settings, _adapted(policy, config, mesh), reward_model, copy=lambda params: params)
    return _online(config, settings, mesh, nets, group_train.make_programs(config, nets, mesh, stop_ids=(0,)))


def _ppo(config: PPOArgs, mesh: Mesh, attention: str) -> list[Program]:
    ppo_checks.check_batches(config, mesh)
    policy, reward_model = _policy_and_reward(config, mesh, attention)

    def fresh_score() -> Params:
        shapes = jax.eval_shape(lambda: policy.model.init_score(jax.random.key(0), zeros=True))
        return placed_shapes(shapes, tree_shardings(mesh, {"score": shapes})["score"])

    nets = ppo_networks.assemble(
        config.ppo,
        mesh,
        policy,
        reward_model,
        fresh_score=fresh_score,
        copy=lambda params: params,
        adapt=lambda loaded, _: _adapted(loaded, config, mesh),
    )
    ptx = None
    if config.ppo.ptx_coef:
        num, rows = config.ppo.epochs * config.ppo.minibatches, config.ppo.ptx_batch_size
        ids = jax.ShapeDtypeStruct((num, rows, config.data.max_length), jnp.int32, sharding=replicated(mesh))
        weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=replicated(mesh))
        ptx = {"tokens": ids, "positions": ids, "segment_ids": ids, "weights": weights}
    return _online(config, config.ppo, mesh, nets, ppo_train.make_programs(config, nets, mesh, stop_ids=(0,)), ptx)


def _online(
    config: PPOArgs | GroupArgs, settings: OnlineConfig, mesh: Mesh, nets: Any, programs: Programs, ptx: Any = None
) -> list[Program]:
    """Rollout, score and update of a method that learns from its own samples."""
    size, new = config.data.batch_size, config.sampling.max_new_tokens
    length = max(config.sampling.prompt_buckets or [config.data.max_prompt_length])
    check_length(nets.policy.model.arch, length + new, "prompt length + sampling.max_new_tokens =")
    state, key = programs.state, _key(mesh)
    number = _whole(mesh, jnp.float32)
    law = SamplingLaw(number, _whole(mesh, jnp.int32), number, _whole(mesh, jnp.int32))
    prompt = _rows(mesh, tokens=((size, length), jnp.int32), mask=((size, length), jnp.bool_))
    drawn = _rows(
        mesh, tokens=((size, new), jnp.int32), mask=((size, new), jnp.bool_), logprobs=((size, new), jnp.float32),
        finished=((size,), jnp.bool_), host=((size,), jnp.float32),
    )  # fmt: skip
    host = drawn.pop("host")
    rollout = Rollout(prompt=prompt["tokens"], prompt_mask=prompt["mask"], **drawn)
    scored = (state.params, nets.ref, nets.reward, rollout, host, number, number)
    experience = jax.eval_shape(programs.score, *scored)[0]
    experience = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), experience
    )
    chunks = -(-new // min(config.sampling.chunk, new))
    everything, seen = (length + new) * size, settings.epochs
    return [
        Program(
            "rollout",
            programs.rollout,
            (nets.policy.whole(state.params["policy"]), *prompt.values(), key, law),
            new * size,
            chunks,
        ),
        Program("score", programs.score, scored, everything),
        Program("update", programs.update, (state, experience, key, number, ptx, nets.frozen), seen * everything),
    ]
