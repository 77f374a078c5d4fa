"""Our own steps for `benchmarks.speed`: what the commands run, on rows of random ids, without text and files.

Each maker returns run(i) -> (what to wait for, a function that tells the step's real tokens afterwards).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rlhf_jax
from benchmarks.peers.common import SIZES, WARMUP, Clock, Row, Work, left_padded, rows, stop_ids, work_of
from rlhf_jax.config import (
    ArchConfig,
    DataConfig,
    DPOArgs,
    GRPOArgs,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PPOArgs,
    PPOConfig,
    RewardArgs,
    RewardConfig,
    SamplingConfig,
    SFTArgs,
)
from rlhf_jax.config.group import GroupConfig
from rlhf_jax.group import train as group_train
from rlhf_jax.inference.generate import make_sampler, spread
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.models import Model
from rlhf_jax.models.loading import Loaded
from rlhf_jax.online.networks import Networks
from rlhf_jax.online.programs import Programs
from rlhf_jax.ppo import core
from rlhf_jax.ppo.train import make_programs
from rlhf_jax.preference import task_of as dpo_task
from rlhf_jax.reward import task_of as reward_task
from rlhf_jax.sft import task_of as sft_task
from rlhf_jax.sharding import Mesh, batch_sharding, data_ways, make_mesh, put_batch, replicated
from rlhf_jax.training.state import TrainState, create_state, make_optimizer, make_schedule
from rlhf_jax.training.step import make_train_step
from rlhf_jax.training.supervised import Claim, choose_packing

Run = Callable[[int], tuple[Any, Callable[[], float]]]


def example_of(row: Row) -> dict[str, Any]:
    """The fields of a method's example on rows, as the readers of files make them."""
    whole = [np.array(row.prompt + ids, np.int32) for ids in row.responses]
    ranks = list(range(len(whole)))
    return {
        "tokens": whole[0], "loss_mask": np.arange(len(whole[0])) >= len(row.prompt), "prompt_length": len(row.prompt),
        "label": 1.0, "margin": 0.0, "chosen": whole[0], "rejected": whole[-1], "responses": whole, "ranks": ranks,
        "ref_logprobs": np.full(len(whole), -9.0, np.float32),
    }  # fmt: skip


def make_training(
    task: str, work: Work, steps: Sequence[list[Row]], model: Model, mesh: Mesh, *, pack: str = "auto"
) -> Run:
    """Optimiser steps of a method on rows: AdamW with a clip at 1.0."""
    optim = OptimConfig(learning_rate=1e-4, weight_decay=0.01, clip_norm=1.0)
    data = DataConfig(batch_size=work.prompts, max_length=work.prompt, pack=pack)
    kind = "pairs" if task == "reward" else "rankings"
    config: Any = {"sft": SFTArgs(data=data), "dpo": DPOArgs(data=data)}.get(
        task, RewardArgs(data=data, reward=RewardConfig(comparisons=kind))
    )
    method = {"sft": sft_task, "dpo": dpo_task}.get(task, reward_task)(config)
    model = dataclasses.replace(model, score_head=method.head != "vocabulary")
    examples = [[example_of(row) for row in step] for step in steps]
    collate = partial(method.collate([one for step in examples for one in step]), length=work.prompt, pad_id=0)
    collated: Any = [collate(step) for step in examples]
    settings, key = getattr(config, method.group), jax.device_put(jax.random.key(1), replicated(mesh))
    claim = Claim(
        name=task, asked=config, config=config, settings=settings, given=(), files={}, mesh=mesh, key=key,
        tokenizer=None, rows=[], held_out_rows=[],
    )  # fmt: skip
    packs = choose_packing(method, claim, model, collated, collated)
    batches = [put_batch(mesh, batch if packs is None else packs(batch)) for batch in collated]
    tokens = [sum(len(row.prompt) + len(ids) for row in step for ids in row.responses) for step in steps]

    tx = make_optimizer(optim, make_schedule(optim, 1000))
    box = [create_state(jax.jit(model.init)(jax.random.key(0)), tx, mesh)]
    step = make_train_step(method.objective(model), tx, mesh=mesh, state=box[0])

    def run(i: int) -> tuple[Any, Callable[[], float]]:
        box[0], metrics = step(box[0], batches[i], key)
        return (box[0], metrics), lambda: tokens[i]

    return run


def placed_prompts(mesh: Mesh, steps: Sequence[list[Row]], work: Work) -> list[dict[str, Any]]:
    """Prompts int32[B, P] and their masks on the devices, by step."""
    named = [dict(zip(("tokens", "mask"), left_padded(step, work.prompt), strict=True)) for step in steps]
    return [put_batch(mesh, batch) for batch in named]


def make_generate(work: Work, steps: Sequence[list[Row]], model: Model, mesh: Mesh, stops: tuple[int, ...]) -> Run:
    """Generation: of exactly `new` tokens with top-k and top-p, or of up to as many by temperature alone."""
    filters = {} if stops else {"min_new_tokens": work.new, "top_p": 0.9, "top_k": 50, "chunk": 64}
    config = SamplingConfig(max_new_tokens=work.new, **filters)
    rollout = jax.jit(make_sampler(model, config, stops))
    params, law = jax.jit(model.init)(jax.random.key(0)), SamplingLaw.from_config(config)
    prompts = placed_prompts(mesh, steps, work)

    def run(i: int) -> tuple[Any, Callable[[], float]]:
        out = rollout(params, prompts[i]["tokens"], prompts[i]["mask"], jax.random.key(i), law)
        return out, lambda: int(out.mask.sum())

    return run


def make_ppo(work: Work, steps: Sequence[list[Row]], model: Model, mesh: Mesh, stops: tuple[int, ...]) -> Run:
    """PPO iterations: four models of the same size, 4 epochs of one minibatch."""
    made, nets, sampling = ppo_programs(work, model, mesh, stops, epochs=4)
    return iterations(made, nets, work, steps, mesh, sampling)


def ppo_programs(
    work: Work, model: Model, mesh: Mesh, stops: tuple[int, ...], *, epochs: int
) -> tuple[tuple[Programs, TrainState], Networks, SamplingConfig]:
    """The programs of PPO with random models, and their first state; one minibatch."""
    sampling = SamplingConfig(max_new_tokens=work.new)
    data = DataConfig(batch_size=work.prompts, max_prompt_length=work.prompt)
    config = PPOArgs(sampling=sampling, data=data, ppo=PPOConfig(epochs=epochs, minibatches=1))
    scalar = dataclasses.replace(model, score_head=True)
    keys = jax.random.split(jax.random.key(0), 3)
    policy, reward, value = (jax.jit(m.init)(k) for m, k in zip((model, scalar, scalar), keys, strict=True))
    params = {"policy": jax.tree.map(jnp.copy, policy), "value": value}
    nets = Networks(core.Models(model, scalar, scalar), Loaded(model, policy), policy, reward, None)
    return make_programs(config, nets, params, mesh, stops), nets, sampling


def make_grpo(work: Work, steps: Sequence[list[Row]], model: Model, mesh: Mesh, stops: tuple[int, ...]) -> Run:
    """GRPO iterations without a reference: random rewards, one optimiser step."""
    sampling = SamplingConfig(max_new_tokens=work.new)
    data = DataConfig(batch_size=work.sequences, max_prompt_length=work.prompt)
    grpo = GroupConfig(epochs=1, minibatches=1, group_size=work.responses, kl_coef=0.0)
    config = GRPOArgs(sampling=sampling, data=data, grpo=grpo)
    policy = jax.jit(model.init)(jax.random.key(0))
    models = group_train.core.Models(model)
    nets = Networks(models, Loaded(model, policy), None, None, None)
    programs = group_train.make_programs(config, nets, {"policy": policy}, mesh, stops)
    return iterations(programs, nets, work, steps, mesh, sampling)


def iterations(
    made: tuple[Programs, TrainState],
    nets: Networks,
    work: Work,
    steps: Sequence[list[Row]],
    mesh: Mesh,
    sampling: SamplingConfig,
) -> Run:
    """Rollout, score and update of programs and their first state; random rewards come from the host."""
    programs, first = made
    law = jax.device_put(SamplingLaw.from_config(sampling), replicated(mesh))
    times = spread(work.prompts, work.responses, data_ways())
    prompts = placed_prompts(mesh, [[row for row in step for _ in range(times)] for step in steps], work)
    rng, box = np.random.default_rng(0), [first, jax.device_put(np.float32(0.05), replicated(mesh))]

    def run(i: int) -> tuple[Any, Callable[[], float]]:
        k1, k2 = jax.random.split(jax.device_put(jax.random.key(i), replicated(mesh)))
        state, coef = box
        rollout = programs.rollout(
            state.params["policy"], prompts[i]["tokens"], prompts[i]["mask"], k1, law, None, work.responses // times
        )
        host = jax.device_put(rng.random(work.sequences, np.float32), batch_sharding(mesh))
        experience, coef, metrics, _ = programs.score(
            state.params, nets.ref, nets.reward, rollout, host, coef, law.temperature
        )
        state, updates = programs.update(state, experience, k2, law.temperature, None, None)
        box[:] = [state, coef]
        return (state, metrics, updates), lambda: int(rollout.mask.sum())

    return run


def model_of(name: str, mesh: Mesh, dtype: str) -> Model:
    """The model of a size."""
    size = SIZES[name]
    own: dict[str, Any] = {}
    if "experts" in size:
        own = {"qk_norm": "head", "num_experts": size["experts"], "experts_per_token": size["top"]}
    if "delta_heads" in size:
        heads, width = size["delta_heads"], size["delta_width"]
        own = {
            "qk_norm": "head", "norm_offset": True, "attn_gate": True, "rope_fraction": 0.25,
            "delta_layers": tuple(i for i in range(size["layers"]) if i % 4 != 3), "delta_kernel": 4,
            "delta_key_heads": heads, "delta_value_heads": heads, "delta_key_dim": width, "delta_value_dim": width,
        }  # fmt: skip
    arch = ArchConfig(
        width=size["width"], num_layers=size["layers"], num_heads=size["heads"], num_kv_heads=size["heads"],
        head_dim=size["width"] // size["heads"], ffn_width=size["ffn"], vocab_size=size["vocab"], **own,
    )  # fmt: skip
    return Model.from_config(ModelConfig(compute_dtype=dtype), arch, mesh.rules)


def measure(args: argparse.Namespace) -> None:
    """Time `args.task` in this process and print its line."""
    compiles: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiles.append(name) if name.endswith("backend_compile_duration") else None
    )
    size, work = SIZES[args.size], work_of(args.task, args.lengths)
    stops = tuple(stop_ids(args.lengths, size["vocab"]))
    mesh = make_mesh(MeshConfig())
    model = model_of(args.size, mesh, args.dtype)
    steps = rows(args.task, args.lengths, size["vocab"], WARMUP + args.repeats)
    clock, warm = Clock(args.turns), 0
    sampled = {"generate": make_generate, "ppo": make_ppo, "grpo": make_grpo}
    with jax.set_mesh(mesh.grid):
        if args.task in sampled:
            run = sampled[args.task](work, steps, model, mesh, stops)
        else:
            run = make_training(args.task, work, steps, model, mesh)
        for i in range(len(steps)):
            clock.begin()
            out, tokens = run(i)
            jax.block_until_ready(out)
            clock.end(0)
            clock.count(tokens())
            if args.lengths == "full" and work.new and tokens() != work.sequences * work.new:
                raise RuntimeError(f"drew {tokens()} tokens, not {work.sequences} x {work.new}")
            warm = len(compiles) if i < WARMUP else warm
    version = f"{rlhf_jax.__version__} (jax {jax.__version__}, {jax.devices()[0].device_kind})"
    clock.report(args, "rlhf_jax", version, len(compiles) - warm)
