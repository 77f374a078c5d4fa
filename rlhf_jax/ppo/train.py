"""The PPO stage: networks, text and rewards wired to the programs of `core`; `online` has the loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from rlhf_jax.config import PPOArgs
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.collate import Collate, collate_sft
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import pack, sft_examples
from rlhf_jax.data.loading import Rows
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.hosts.processes import say
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.keys import branch
from rlhf_jax.online import loop
from rlhf_jax.online.iteration import LoopState, first_state
from rlhf_jax.online.method import Critic, Method, read_inputs
from rlhf_jax.online.networks import Networks, load_policy_and_reward
from rlhf_jax.online.programs import Programs, compile_programs, recomputes
from rlhf_jax.ppo import core
from rlhf_jax.ppo.checks import check, check_batches
from rlhf_jax.ppo.networks import make_networks, whole_critic
from rlhf_jax.sharding import Mesh, make_mesh, replicated
from rlhf_jax.training.state import TrainState, create_state
from rlhf_jax.types import Advantage, Params, PolicyLoss, RewardFn, ValueLoss


def make_programs(
    config: PPOArgs,
    nets: Networks[core.Models],
    params: Params,
    mesh: Mesh,
    stop_ids: tuple[int, ...],
    policy_loss: PolicyLoss | None = None,
    value_loss: ValueLoss | None = None,
    advantage: Advantage | None = None,
) -> tuple[Programs, TrainState]:
    """The sampler, score and update of `core`, and the first state; params, what is trained, is donated."""
    ppo, models = config.ppo, nets.models
    update, tx, schedule = core.make_ppo_step(models, config, policy_loss, value_loss)
    recompute = recomputes(config, ppo, models.policy)
    weight = config.reward.model_weight
    score = core.make_score(models, ppo, recompute=recompute, model_weight=weight, advantage=advantage)
    state = create_state(params, tx, mesh)
    parts = compile_programs(config, ppo, nets, state, mesh, stop_ids, score=score, update=update, schedule=schedule)
    return parts, state


def collate_text(config: PPOArgs, pad_id: int = 0) -> Collate:
    """Makes batches of pretraining text."""
    return partial(collate_sft, length=config.data.max_length, reduction="token", pad_id=pad_id)


def text_batches(config: PPOArgs, tokenizer: Tokenizer) -> Batches:
    """Pretraining text, packed, for one optimiser step after the other."""
    text, report = sft_examples(rows_from(config.ppo.ptx_path), tokenizer, Limits.of(config.data), loss_on="all")
    say(f"ptx rows: {report}")
    collate, seed = collate_text(config, tokenizer.pad_id), config.run.seed
    return Batches(
        pack(text, config.data.max_length), batch_size=config.ppo.ptx_batch_size, seed=seed, collate=collate
    )


def setup(
    config: PPOArgs,
    *,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    reward_functions: Sequence[RewardFn] | None = None,
    gold: RewardFn | None = None,
    policy_loss: PolicyLoss | None = None,
    value_loss: ValueLoss | None = None,
    advantage: Advantage | None = None,
) -> tuple[Method, LoopState]:
    """PPO of a config, and what its loop carries at first; writes nothing."""
    check(config)
    mesh, ppo = make_mesh(config.mesh), config.ppo
    check_batches(config, mesh)
    inputs = read_inputs(config, mesh, rows=rows, eval_rows=eval_rows, reward_functions=reward_functions, gold=gold)
    tokenizer, key = inputs.tokenizer, branch(inputs.key, "weights")
    text = text_batches(config, tokenizer) if ppo.ptx_coef else None
    with jax.set_mesh(mesh.grid):
        policy, reward = load_policy_and_reward(config, mesh, tokenizer, key)
        nets, params, value = make_networks(config, mesh, policy, reward, key)
        swapped = policy_loss, value_loss, advantage
        programs, state = make_programs(config, nets, params, mesh, tokenizer.eos_ids, *swapped)
        critic = None
        if ppo.save_value_model:
            halves = ("policy", "value") if ppo.shared_trunk else ("value",)
            critic = Critic(value, halves, partial(whole_critic, ppo.shared_trunk))
        law = SamplingLaw.from_config(config.sampling, replicated(mesh))
        facts = {"ptx rows": text and text.cursor()}
        method = Method(config, ppo, mesh, inputs, nets, programs, law, text=text, critic=critic, identity=facts)
        return method, first_state(method, state)


def run(config: PPOArgs, **overrides: Any) -> dict[str, Any]:
    """Train as configured and write the run directory; returns its summary.

    Keyword arguments replace what the config names: `rows`, `eval_rows` (lists of dicts), `reward_functions`, `gold`
    (Python functions), `policy_loss`, `value_loss` and `advantage`.
    """
    return loop.run("ppo", config, setup, **overrides)
