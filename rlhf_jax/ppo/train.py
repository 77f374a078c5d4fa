"""The PPO stage: networks, text and rewards wired to the programs of `core`; `online` has the loop."""

from __future__ import annotations

from functools import partial
from typing import Any, Unpack

import jax

from rlhf_jax.config import PPOArgs
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.collate import Collate, collate_sft
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import pack, sft_examples
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import say
from rlhf_jax.models.loading import arch_of, check_length
from rlhf_jax.online import checks, loop
from rlhf_jax.online.iteration import LoopState, first_state
from rlhf_jax.online.method import Method, Sources, read_inputs
from rlhf_jax.online.networks import Networks, load_policy_and_reward, load_teacher
from rlhf_jax.online.programs import Programs, compile_programs
from rlhf_jax.ppo import core
from rlhf_jax.ppo.networks import make_networks
from rlhf_jax.runs.twin import in_buckets
from rlhf_jax.sharding import Mesh, check_rows, make_mesh
from rlhf_jax.training.state import TrainState
from rlhf_jax.types import Advantage, Params, PolicyLoss, ValueLoss


def check(config: PPOArgs) -> None:
    """Raise a UserError for settings that contradict each other."""
    ppo = config.ppo
    checks.check(config, ppo, "ppo")
    if ppo.kl_controller == "adaptive" and ppo.kl_target <= 0:
        raise UserError(f"ppo.kl_target {ppo.kl_target} must be positive; or set ppo.kl_controller fixed")
    if ppo.ptx_coef and not ppo.ptx_path:
        raise UserError(f"ppo.ptx_coef {ppo.ptx_coef} needs text; set ppo.ptx_path")
    if ppo.trainable_layers and config.lora.rank:
        raise UserError(
            f"ppo.trainable_layers {ppo.trainable_layers} and lora.rank {config.lora.rank} both say what is trained; "
            "set one of them to 0"
        )
    if ppo.value_init == "reward_model" and (not config.reward.paths or ppo.shared_trunk):
        raise UserError("ppo.value_init reward_model needs reward.model, and ppo.shared_trunk false")


def check_batches(config: PPOArgs, mesh: Mesh) -> None:
    """Raise a UserError unless every batch and microbatch divides over the mesh."""
    ppo = config.ppo
    if ppo.ptx_coef and ppo.ptx_batch_size % ppo.accumulate:
        raise UserError(
            f"ppo.ptx_batch_size {ppo.ptx_batch_size} is not divisible by ppo.accumulate {ppo.accumulate}; "
            "change one of them"
        )
    checks.check_batches(config, ppo, "ppo", mesh)
    if ppo.ptx_coef:
        check_rows(mesh, ppo.ptx_batch_size // ppo.accumulate, "ppo.ptx_batch_size / ppo.accumulate =")


def make_programs(
    config: PPOArgs,
    nets: Networks,
    params: Params,
    mesh: Mesh,
    stop_ids: tuple[int, ...],
    policy_loss: PolicyLoss | None = None,
    value_loss: ValueLoss | None = None,
    advantage: Advantage | None = None,
) -> tuple[Programs, TrainState]:
    """The sampler, score and update of `core`, and the first state; params, what is trained, is donated."""
    losses = {"policy_loss": policy_loss or config.ppo.policy_loss, "value_loss": value_loss or config.ppo.value_loss}
    checks.check_losses(config.ppo, "ppo", **losses)
    training = core.make_ppo_step(nets.models, config, policy_loss, value_loss)
    score = partial(core.make_score, nets.models, config.ppo, advantage=advantage)
    return compile_programs(config, config.ppo, nets, params, mesh, stop_ids, training, score)


def collate_text(config: PPOArgs, pad_id: int = 0) -> Collate:
    """Makes batches of pretraining text."""
    return partial(collate_sft, length=config.data.max_length, reduction="token", pad_id=pad_id)


def text_batches(config: PPOArgs, tokenizer: Tokenizer) -> Batches:
    """Pretraining text, packed, for one optimiser step after the other.

    Raises:
        UserError: the policy has too few positions for it, or there is too little of it for a batch.
    """
    check_length(arch_of(config.model), config.data.max_length, "data.max_length")
    text, report = sft_examples(rows_from(config.ppo.ptx_path), tokenizer, Limits.of(config.data), loss_on="all")
    say(f"ptx rows: {report}")
    collate, size = collate_text(config, tokenizer.pad_id), config.ppo.ptx_batch_size
    packed = pack(text, config.data.max_length)
    return Batches(packed, batch_size=size, seed=config.run.seed, collate=collate, option="ppo.ptx_batch_size")


def setup(
    config: PPOArgs,
    *,
    policy_loss: PolicyLoss | None = None,
    value_loss: ValueLoss | None = None,
    advantage: Advantage | None = None,
    **sources: Unpack[Sources],
) -> tuple[Method, LoopState]:
    """PPO of a config, and what its loop carries at first; writes nothing."""
    check(config)
    mesh, ppo = make_mesh(config.mesh), config.ppo
    check_batches(config, mesh)
    inputs = read_inputs(config, mesh, **sources)
    tokenizer, swapped = inputs.tokenizer, (policy_loss, value_loss, advantage)
    text = text_batches(config, tokenizer) if ppo.ptx_coef else None
    with jax.set_mesh(mesh.grid):
        loaded = load_policy_and_reward(config, mesh, tokenizer, inputs.key)
        nets, params = make_networks(config, mesh, *loaded, load_teacher(config, mesh, tokenizer, inputs.key))
        programs, state = make_programs(config, nets, params, mesh, tokenizer.eos_ids, *swapped)
        facts = {"ptx rows": text and text.cursor()}
        method = Method(config, ppo, mesh, inputs, nets, programs, text=text, identity=facts)
        return method, first_state(method, state)


@in_buckets
def run(config: PPOArgs, **overrides: Any) -> dict[str, Any]:
    """Train as configured and write the run directory; returns its summary.

    Keyword arguments replace what the config names: `rows`, `eval_rows` (lists of dicts), `reward_functions`, `gold`
    (Python functions), `policy_loss`, `value_loss` and `advantage`.
    """
    return loop.run("ppo", config, setup, **overrides)
