"""The programs of a stage with abstract arguments: the functions that training runs, without a byte of weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax import reward, sft
from rlhf_jax.config import ArchConfig, ModelConfig, PPORun, RewardRun, SFTRun, bind
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model, config_json
from rlhf_jax.planning.presets import PRESETS, find_preset
from rlhf_jax.ppo.checks import check_batches
from rlhf_jax.ppo.networks import Networks, assemble
from rlhf_jax.ppo.train import make_programs
from rlhf_jax.sampling import SamplingLaw
from rlhf_jax.sharding import batch_sharding, check_rows, replicated, tree_shardings
from rlhf_jax.stage import Loaded, check_length
from rlhf_jax.state import create_state, make_optimizer, make_schedule, placed_shapes
from rlhf_jax.step import make_train_step
from rlhf_jax.types import Params, Rollout


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


def abstract_model(config: ModelConfig, mesh: Mesh, *, score_head: bool, attention: str) -> Loaded:
    """The model of a config in bfloat16 (unless it says float32), its parameters as shapes on the mesh."""
    arch = config.arch or find_arch(config.path)
    if config.compute_dtype == "auto":
        config = dataclasses.replace(config, compute_dtype="bfloat16")
    model = dataclasses.replace(Model.from_config(config, arch, score_head=score_head), attention=attention)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), config.param_dtype)
    )  # nothing may run: the mesh's chips do not exist
    return Loaded(model, placed_shapes(shapes, tree_shardings(mesh, shapes)))


def programs_of(config: Any, mesh: Mesh, *, attention: str) -> list[Program]:
    """The programs of a stage's config over a mesh; call it inside `jax.set_mesh(mesh)`.

    Raises:
        UserError: what the stage itself would refuse: batches, lengths, heads that do not divide.
    """
    if isinstance(config, PPORun):
        return _ppo(config, mesh, attention)
    return [_sft(config, mesh, attention) if isinstance(config, SFTRun) else _reward(config, mesh, attention)]


def _rows(mesh: Mesh, **shapes: tuple[tuple[int, ...], Any]) -> dict[str, Any]:
    sharding = batch_sharding(mesh)
    return {n: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for n, (shape, dtype) in shapes.items()}


def _whole(mesh: Mesh, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))


def _key(mesh: Mesh) -> Any:
    return _whole(mesh, jax.eval_shape(lambda: jax.random.key(0)).dtype)


def _train_step(
    config: Any, group: Any, mesh: Mesh, loaded: Loaded, loss_fn: Any, batch: Any
) -> tuple[Any, tuple[Any, Any]]:
    tx = make_optimizer(config.optim, make_schedule(config.optim, 1000))
    state = create_state(loaded.params, tx, mesh)
    return make_train_step(loss_fn, tx, group.accumulate, mesh=mesh, state=state), (state, batch)


def _sft(config: SFTRun, mesh: Mesh, attention: str) -> Program:
    size, length = config.data.batch_size, config.data.max_length
    check_rows(mesh, size // config.sft.accumulate, "data.batch_size / sft.accumulate =")
    loaded = abstract_model(config.model, mesh, score_head=False, attention=attention)
    check_length(loaded.model.arch, length, "data.max_length")
    ids = ((size, length), jnp.int32)
    batch = _rows(mesh, tokens=ids, positions=ids, segment_ids=ids, weights=((size, length), jnp.float32))
    loss_fn = sft.objective(loaded.model, bind(config.sft.loss, config.sft))
    step, arguments = _train_step(config, config.sft, mesh, loaded, loss_fn, batch)
    return Program("step", step, (*arguments, _key(mesh)), size * length)


def _reward(config: RewardRun, mesh: Mesh, attention: str) -> Program:
    size, length = config.data.batch_size, config.data.max_length
    check_rows(mesh, size // config.reward.accumulate, "data.batch_size / reward.accumulate =")
    loaded = abstract_model(config.model, mesh, score_head=True, attention=attention)
    check_length(loaded.model.arch, length, "data.max_length")
    ids, numbers = ((size, 2, length), jnp.int32), ((size,), jnp.float32)
    batch = _rows(
        mesh, tokens=ids, positions=ids, segment_ids=ids, last=((size, 2), jnp.int32),
        weights=numbers, labels=numbers, margins=numbers,
    )  # fmt: skip
    loss_fn = reward.objective(loaded.model, bind(config.reward.loss, config.reward))
    step, arguments = _train_step(config, config.reward, mesh, loaded, loss_fn, batch)
    return Program("step", step, (*arguments, _key(mesh)), 2 * size * length)


def _networks(config: PPORun, mesh: Mesh, attention: str) -> Networks:
    policy = abstract_model(config.model, mesh, score_head=False, attention=attention)
    reward_model = None
    if config.reward.model:
        named = dataclasses.replace(config.model, path=config.reward.model, arch=None)
        reward_model = abstract_model(named, mesh, score_head=True, attention=attention)

    def fresh_score() -> Params:
        shapes = jax.eval_shape(lambda: policy.model.init_score(jax.random.key(0), zeros=True))
        return placed_shapes(shapes, tree_shardings(mesh, {"score": shapes})["score"])

    return assemble(config.ppo, policy, reward_model, fresh_score=fresh_score, copy=lambda params: params)


def _ppo(config: PPORun, mesh: Mesh, attention: str) -> list[Program]:
    check_batches(config, mesh)
    nets = _networks(config, mesh, attention)
    size, new = config.data.batch_size, config.sampling.max_new_tokens
    length = max(config.sampling.prompt_buckets or [config.data.max_prompt_length])
    check_length(nets.policy.model.arch, length + new, "prompt length + sampling.max_new_tokens =")
    programs = make_programs(config, nets, mesh, stop_ids=(0,))
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
    ptx = None
    if config.ppo.ptx_coef:
        num, rows = config.ppo.epochs * config.ppo.minibatches, config.ppo.ptx_batch_size
        ids = jax.ShapeDtypeStruct((num, rows, config.data.max_length), jnp.int32, sharding=replicated(mesh))
        weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=replicated(mesh))
        ptx = {"tokens": ids, "positions": ids, "segment_ids": ids, "weights": weights}
    chunks = -(-new // min(config.sampling.chunk, new))
    everything, seen = (length + new) * size, config.ppo.epochs
    return [
        Program("rollout", programs.rollout, (state.params["policy"], *prompt.values(), key, law), new * size, chunks),
        Program("score", programs.score, scored, everything),
        Program("update", programs.update, (state, experience, key, number, ptx), seen * everything),
    ]
