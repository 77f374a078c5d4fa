"""The programs of a stage with abstract arguments: the functions that training runs, without a byte of weights."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rlhf_jax.cli.commands import COMMANDS
from rlhf_jax.commands.plan.presets import PRESETS, find_preset
from rlhf_jax.config import ArchConfig, GroupArgs, ModelConfig, OnlineArgs, OnlineConfig, PPOArgs, StageArgs, TrainArgs
from rlhf_jax.data.collate import example_of_all
from rlhf_jax.errors import UserError
from rlhf_jax.group import train as group_train
from rlhf_jax.inference.generate import spread, total_length
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.inference.slots import choose_slots, layout
from rlhf_jax.models import Model, hf
from rlhf_jax.models.cache import column_bytes, state_bytes
from rlhf_jax.models.hf import config_json, hub
from rlhf_jax.models.kernels import quantized
from rlhf_jax.models.loading import Loaded, adapted, check_length
from rlhf_jax.online.checks import check_batches
from rlhf_jax.online.method import stacked
from rlhf_jax.online.networks import Networks, together
from rlhf_jax.online.pool import Pool
from rlhf_jax.online.programs import Programs
from rlhf_jax.ppo import train as ppo_train
from rlhf_jax.ppo.networks import make_networks
from rlhf_jax.sharding import Mesh, batch_sharding, check_rows, path_name, placed, replicated, rollout_mesh
from rlhf_jax.training.state import TrainState, create_state, make_optimizer, make_schedule
from rlhf_jax.training.step import make_train_step
from rlhf_jax.training.supervised import WORTH, Task, packing_of
from rlhf_jax.types import Batch, Params, Rollout


class Program(NamedTuple):
    """A jitted function and its abstract arguments.

    Attributes:
        name: what it is called in the table.
        function: jitted.
        arguments: ShapeDtypeStructs with shardings.
        tokens: tokens that one run trains on, scores or makes.
        loops: most times that its one loop of unknown length runs.
        least: of the share of slots that hold tokens: bytes that a device has to read for its loop at least.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    tokens: int
    loops: int = 1
    least: Callable[[float], float] = lambda fill: 0.0


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
    return hf.read_config(hub.local_directory(path))[0]


def abstract_model(
    config: ModelConfig, mesh: Mesh, length: int, *, score_head: bool, attention: str, **more: Any
) -> Loaded:
    """The model of a config in bfloat16 (unless it says float32), for `length` tokens, as shapes on the mesh.

    Unless it asks for plain attention, that is `attention`, and not of the platform that plans.
    """
    arch = config.arch or find_arch(config.path)
    dtype = "bfloat16" if config.compute_dtype == "auto" else config.compute_dtype
    config, asked = dataclasses.replace(config, compute_dtype=dtype, attention="plain"), config.attention
    model = Model.from_config(config, arch, mesh.rules, score_head=score_head, length=length, **more)
    model = model if asked == "plain" else dataclasses.replace(model, attention=attention)
    init = lambda key: quantized(model.init(key, config.param_dtype), config.quantize)  # noqa: E731
    return Loaded(model, placed(mesh, init, _key(mesh)))


def programs_of(config: StageArgs, mesh: Mesh, *, attention: str, width: int = 2, fill: float = 1.0) -> list[Program]:
    """The programs of a stage's config over a mesh, rankings of `width`; call it inside `jax.set_mesh(mesh.grid)`.

    Where as little as `fill` of the slots hold tokens batches may be packed, as the stage would choose.

    Raises:
        UserError: what the stage itself would refuse: batches, lengths, heads that do not divide.
    """
    if isinstance(config, PPOArgs):
        return _ppo(config, mesh, attention)
    if isinstance(config, GroupArgs):
        return _group(config, mesh, attention)
    return _training(config, mesh, attention, width, fill)


def _rows(mesh: Mesh, **shapes: tuple[tuple[int, ...], Any]) -> dict[str, Any]:
    sharding = batch_sharding(mesh)
    return {n: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for n, (shape, dtype) in shapes.items()}


def _whole(mesh: Mesh, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))


def _shapes(tree: Any, sharding: NamedSharding) -> Any:
    """The shapes of arrays of one layout."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _key(mesh: Mesh) -> Any:
    return _whole(mesh, jax.eval_shape(lambda: jax.random.key(0)).dtype)


def task_of(config: TrainArgs) -> Task:
    """The method whose settings these are, as the module of its command describes it."""
    where = next(command.where for command in COMMANDS.values() if command.args is type(config))
    task: Task = importlib.import_module(f"rlhf_jax.{where.partition(':')[0]}").task_of(config)
    return task


def _training(config: TrainArgs, mesh: Mesh, attention: str, width: int, fill: float) -> list[Program]:
    """The step of a method that trains one model on rows, after what it asks of the untrained one."""
    task, size, length = task_of(config), config.data.batch_size, config.data.max_length
    accumulate = getattr(config, task.group).accumulate
    check_rows(mesh, size // accumulate, f"data.batch_size / {task.group}.accumulate =")
    scalar = task.head != "vocabulary"
    members = {"members": task.members, "own_adapters": task.own_adapters}
    loaded = abstract_model(config.model, mesh, length, score_head=scalar, attention=attention, **members)
    loaded = adapted(loaded, config.lora, mesh, _key(mesh))
    check_length(loaded.model.arch, length, "data.max_length")
    examples = [example_of_all(width)] * size
    batch = task.collate(examples)(examples, length=length)
    programs, shape = [], batch["tokens"].shape
    auto = config.data.pack == "auto" and fill <= WORTH and not config.data.length_buckets
    if task.pack is not None and (config.data.pack == "on" or auto):
        batch = task.pack(batch, packing_of(config.data, shape, accumulate, mesh))
    batch = _shapes(batch, batch_sharding(mesh))
    if task.reference is not None:
        forward = jax.jit(partial(task.reference, loaded.model))
        programs.append(Program("reference", forward, (loaded.whole(loaded.params), batch), math.prod(shape)))
        batch = {**batch, **_rows(mesh, ref_logprobs=(shape[:2], jnp.float32))}
    tx = make_optimizer(config.optim, make_schedule(config.optim, 1000))
    state, frozen = create_state(loaded.params, tx, mesh), loaded.frozen
    loss_fn, prepare = task.objective(loaded.model), task.preparation(loaded.model)
    step = make_train_step(loss_fn, tx, accumulate, mesh=mesh, state=state, frozen=frozen, prepare=prepare)
    arguments = (state, batch, _key(mesh)) if frozen is None else (state, batch, _key(mesh), frozen)
    return [*programs, Program("step", step, arguments, math.prod(shape))]


def _loaded(config: OnlineArgs, mesh: Mesh, attention: str) -> tuple[Loaded, Loaded | None, jax.Array, Loaded | None]:
    """Policy, reward model, a key and teacher, as `make_networks` takes them."""
    length = total_length(config.sampling, config.data.max_prompt_length)
    policy = abstract_model(config.model, mesh, length, score_head=False, attention=attention)
    named = [dataclasses.replace(config.model, path=path, arch=None) for path in config.reward.paths]
    rewards = [abstract_model(one, mesh, length, score_head=True, attention=attention) for one in named]
    teacher = None
    if path := config.reward.teacher:
        named_so = dataclasses.replace(config.model, path=path, arch=None)
        teacher = abstract_model(named_so, mesh, length, score_head=False, attention=attention)
    return policy, together(rewards), _key(mesh), teacher


def _group(config: GroupArgs, mesh: Mesh, attention: str) -> list[Program]:
    name, settings = group_train.settings_of(config)
    check_batches(config, settings, name, mesh)
    nets, params = group_train.make_networks(config, mesh, *_loaded(config, mesh, attention))
    programs, state = group_train.make_programs(config, nets, params, mesh, stop_ids=(0,))
    return _online(config, settings, mesh, nets, programs, state)


def _ppo(config: PPOArgs, mesh: Mesh, attention: str) -> list[Program]:
    ppo_train.check_batches(config, mesh)
    nets, params = make_networks(config, mesh, *_loaded(config, mesh, attention))
    programs, state = ppo_train.make_programs(config, nets, params, mesh, stop_ids=(0,))
    text = None
    if config.ppo.ptx_coef:
        batch = ppo_train.collate_text(config)([example_of_all(2)] * config.ppo.ptx_batch_size)
        text = _shapes(stacked([batch] * (config.ppo.epochs * config.ppo.minibatches)), replicated(mesh))
    return _online(config, config.ppo, mesh, nets, programs, state, text)


def _online(
    config: OnlineArgs,
    settings: OnlineConfig,
    mesh: Mesh,
    nets: Networks,
    programs: Programs,
    state: TrainState,
    text: Batch | None = None,
) -> list[Program]:
    """Rollout, score and update of a method that learns from its own samples; each is given what the one before makes.

    `text` is for PPO's updates.
    """
    size, new = config.data.batch_size, config.sampling.max_new_tokens
    length = max(config.sampling.prompt_buckets or [config.data.max_prompt_length])
    check_length(nets.policy.model.arch, length + new, "prompt length + sampling.max_new_tokens =")
    key, number, rows = _key(mesh), _whole(mesh, jnp.float32), batch_sharding(mesh)
    law = _shapes(SamplingLaw.from_config(config.sampling), replicated(mesh))
    ways, group = mesh.row_ways, getattr(settings, "group_size", 1)
    samples = group // spread(size // group, group, ways)
    shape = (size // samples, length)
    prompt = _rows(mesh, tokens=(shape, jnp.int32), mask=(shape, jnp.bool_))
    drawn_from = (nets.policy.whole(state.params["policy"]), *prompt.values(), key, law, None, samples)
    rollout = _shapes(programs.rollout.trace(*drawn_from).out_info, rows)
    host = _rows(mesh, host=((size,), jnp.float32))["host"]
    scored = (state.params, nets.ref, nets.reward, rollout, host, number, number, nets.teacher)
    experience = _shapes(programs.score.trace(*scored).out_info[0], rows)
    least = partial(_decoded, nets.policy.model, drawn_from[0], config, mesh, shape, samples)
    chunks, everything = -(-new // min(config.sampling.chunk, new)), (length + new) * size
    updated = (state, experience, key, number, text, nets.frozen)
    rolled_out = Program("rollout", programs.rollout, drawn_from, new * size, chunks, least)
    if programs.cut is not None:  # all rows under way, each as far as the budget
        rolled_out = Program("rollout", programs.cut.go_on, _pool(config, mesh, rollout, drawn_from), new * size)
    return [
        rolled_out,
        Program("score", programs.score, scored, everything),
        Program("update", programs.update, updated, settings.epochs * everything),
    ]


def _pool(config: OnlineArgs, mesh: Mesh, rollout: Rollout, drawn_from: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of `Cut.go_on`, where those of a rollout without a cut are given with what it makes."""
    policy, _, _, key, law, _, samples = drawn_from
    twice = lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype, sharding=batch_sharding(mesh))  # noqa: E731
    rows = jax.tree.map(twice, rollout)
    number = _rows(mesh, number=(rows.finished.shape, jnp.int32))["number"]
    return policy, Pool(number, rows.logprobs, rows), number, rows.prompt, rows.prompt_mask, key, law, samples


def _decoded(
    model: Model, params: Params, config: OnlineArgs, mesh: Mesh, shape: tuple[int, int], samples: int, fill: float
) -> float:
    """Bytes of weights and filled cache that a device reads to decode `samples` of prompts [N, P], token by token."""
    sampling, mesh = config.sampling, rollout_mesh(config.mesh, mesh)
    ways = math.gcd(mesh.row_ways, shape[0])
    prompts, length, new = shape[0] // ways, shape[1], sampling.max_new_tokens
    weights, arch = jax.eval_shape(model.decoding_params, params), model.arch
    chosen = choose_slots(model, weights, prompts, samples, length, new)
    groups, width, contexts = layout(prompts, samples, sampling.slots // ways or chosen)
    refills = groups * width < prompts * samples
    steps = new * fill * prompts * samples / (groups * width) if refills else new
    # A slot has on average half of its tokens behind it, a context all of its prompt.
    size = model.compute_dtype.itemsize
    cache = groups * (contexts * length + width * new / 2) * fill * column_bytes(arch, size)
    cache += groups * width * state_bytes(arch, size)
    # Of an embedding apart from the head rows are read; of experts each device has its own.
    whole = {name: part for name, part in weights.items() if name != "embed" or arch.tied_head}
    sizes = {path_name(path): x.size * x.dtype.itemsize for path, x in jax.tree_util.tree_leaves_with_path(whole)}
    experts = sum(n for name, n in sizes.items() if "/experts/" in name)
    size = sum(sizes.values()) - experts + experts / mesh.shape.get("expert", 1)
    return steps * (size + cache) / mesh.shape["tensor"]
