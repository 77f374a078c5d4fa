"""The PPO stage: networks, text and rewards wired to the programs of `core`; `online` has the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.config import PPOArgs
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.collate import collate_sft
from rlhf_jax.data.examples import pack, sft_examples
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.loading import Rows
from rlhf_jax.data.sources import rows_from
from rlhf_jax.hosts.processes import say
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import save_model
from rlhf_jax.online import loop
from rlhf_jax.online.programs import Programs, compile_programs, recomputes
from rlhf_jax.online.stage import Online
from rlhf_jax.ppo import core
from rlhf_jax.ppo.checks import check, check_batches
from rlhf_jax.ppo.networks import Networks, load_networks
from rlhf_jax.sharding import Mesh, make_mesh, put, replicated, rollout_mesh, tree_shardings
from rlhf_jax.training.state import create_state
from rlhf_jax.types import PolicyLoss


def make_programs(
    config: PPOArgs, nets: Networks, mesh: Mesh, stop_ids: tuple[int, ...], policy_loss: PolicyLoss | None = None
) -> Programs:
    """The sampler, score and update of `core`, and the first state; nets.params is donated."""
    update, tx, schedule = core.make_ppo_step(nets.models, config, policy_loss)
    tree_shardings(rollout_mesh(config.mesh, mesh), nets.ref)  # adapters may lack the heads that must divide
    recompute = recomputes(config, config.ppo, nets.models.policy)
    score = core.make_score(nets.models, config.ppo, recompute=recompute, model_weight=config.reward.model_weight)
    return compile_programs(
        config,
        config.ppo,
        mesh,
        nets.models.policy,
        stop_ids,
        score=score,
        update=update,
        state=create_state(nets.params, tx, mesh),
        schedule=schedule,
    )


class PPO(Online):
    """PPO's parts: a critic beside the policy, and pretraining text if it is asked for."""

    def __init__(
        self,
        config: PPOArgs,
        *,
        rows: Rows | None = None,
        eval_rows: Rows | None = None,
        reward_functions: Sequence[Callable[..., Any]] | None = None,
        gold: Callable[..., Any] | None = None,
        policy_loss: PolicyLoss | None = None,
    ):
        """Read the data, load the networks, build the programs; writes nothing."""
        check(config)
        mesh = make_mesh(config.mesh)
        check_batches(config, mesh)
        super().__init__(
            config, config.ppo, mesh, rows=rows, eval_rows=eval_rows, reward_functions=reward_functions, gold=gold
        )
        self.ptx = self._text_batches() if config.ppo.ptx_coef else None
        with jax.set_mesh(mesh.grid):
            nets = load_networks(config, mesh, self.tokenizer, branch(self.key, "weights"), self.length)
            self.check_lengths(nets.models.policy, nets.models.reward)
            self.start(nets, make_programs(config, nets, mesh, self.tokenizer.eos_ids, policy_loss))

    def _text_batches(self) -> Batches:
        data, ppo = self.config.data, self.config.ppo
        text, report = sft_examples(rows_from(ppo.ptx_path), self.tokenizer, Limits.of(data), loss_on="all")
        say(f"ptx rows: {report}")
        collate = partial(collate_sft, length=data.max_length, reduction="token", pad_id=self.tokenizer.pad_id)
        text = pack(text, data.max_length)
        return Batches(text, batch_size=ppo.ptx_batch_size, seed=self.config.run.seed, collate=collate)

    def text(self, i: int) -> Any:
        """Pretraining text for every optimiser step of iteration i, on the devices; None without any."""
        if self.ptx is None:
            return None
        num = self.config.ppo.epochs * self.config.ppo.minibatches
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *[self.ptx[i * num + j] for j in range(num)])
        return put(stacked, replicated(self.mesh))

    def identity(self) -> dict[str, Any]:
        """What a continued run must find unchanged, beside the config."""
        return {**super().identity(), "ptx rows": self.ptx and self.ptx.cursor()}

    def to_save(self) -> dict[str, Any]:
        """What the results need of `tree`: the policy that is evaluated, and the critic's half if it is asked for."""
        tree, params = super().to_save(), self.state.params
        if not self.config.ppo.save_value_model:
            return tree
        halves = params if self.config.ppo.shared_trunk else {"value": params["value"]}
        kept = tree.get("state", {"params": {}})["params"]
        return {**tree, "state": {"params": {**kept, **halves}}}

    def save(self, directory: Path, tree: dict[str, Any]) -> None:
        """Write the models in a tree of the form of `to_save`."""
        super().save(directory, tree)
        params = tree.get("state", {"params": {}})["params"]
        if "value" in params:
            save_model(directory / "value_model", self.nets.value, self.nets.critic(params), self.tokenizer)


def run(config: PPOArgs, **overrides: Any) -> dict[str, Any]:
    """Train as configured and write the run directory; returns its summary.

    Keyword arguments replace what the config names: `rows`, `eval_rows` (lists of dicts), `reward_functions`, `gold`
    (Python functions) and `policy_loss`.
    """
    return loop.run("ppo", config, PPO, **overrides)
