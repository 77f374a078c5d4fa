"""The parts of a method that learns from its own samples: prompts, rewards, networks, programs, state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import OnlineConfig, resolve
from rlhf_jax.data.batches import Batches, fingerprint
from rlhf_jax.data.collate import collate_prompts, repeat_rows
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.loading import Rows, held_out_batches, load_rows, make_examples
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import to_host
from rlhf_jax.inference.generate import decode, sampled_row, total_length
from rlhf_jax.inference.intervals import mean_and_error
from rlhf_jax.inference.reward_functions import call_reward, columns_for, combine, functions_of, of_own_rows
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.keys import NUMBERS
from rlhf_jax.models.loading import check_length, load_tokenizer, save_model
from rlhf_jax.online import core
from rlhf_jax.online.programs import Programs
from rlhf_jax.sharding import Mesh, put, put_batch, replicated, tree_shardings
from rlhf_jax.training.nans import first_nan
from rlhf_jax.training.state import TrainState, digest
from rlhf_jax.types import Params, Rollout


def key_at(key: jax.Array, *indices: int) -> jax.Array:
    """fold_in(fold_in(key, i), j)...; the integers go to the device explicitly, as a transfer guard demands."""
    for index in indices:
        key = jax.random.fold_in(key, put(np.uint32(index), key.sharding))
    return key


class Online:
    """A method's parts. One iteration is `iteration(i)`; nothing here is traced.

    A method's own class checks its settings, loads its networks and calls `start` with them and its programs.

    Attributes:
        nets: has `policy` (Loaded), the frozen parameters `ref` and `reward`, or None for each, and `frozen`, what
            the update reads of these, or None.
        programs: rollout, score and update.
        state: the training state; its parameters are {"policy": ...} and what else the method trains.
        average: the averaged policy, if there is one.
        kl_coef: the price of a nat, on the devices.
    """

    def __init__(
        self,
        config: Any,
        settings: OnlineConfig,
        mesh: Mesh,
        *,
        group_size: int = 1,
        rows: Rows | None = None,
        eval_rows: Rows | None = None,
        reward_functions: Sequence[Callable[..., Any]] | None = None,
        gold: Callable[..., Any] | None = None,
    ):
        """Read the data; `settings` is the method's group of the config, `group_size` the responses to each prompt."""
        self.config, self.settings, self.mesh, self.group_size = config, settings, mesh, group_size
        self.python_reward = combine(config.reward, reward_functions)
        self.gold = gold or (resolve(config.reward.gold) if config.reward.gold else None)
        if self.python_reward is None and not config.reward.model:
            raise UserError("there is no reward; set reward.model, or reward.functions to [module:name]")
        self.tokenizer = load_tokenizer(config.model)
        asked = functions_of(config.reward, reward_functions) + ([self.gold] if self.gold else [])
        self.batches, self.held_out = self._prompts(rows, eval_rows, asked)
        self.key = jax.jit(lambda: jax.random.key(config.run.seed), out_shardings=replicated(mesh))()

    def _prompts(
        self, rows: Rows | None, eval_rows: Rows | None, asked: Sequence[Callable[..., Any]]
    ) -> tuple[Batches, list[Any]]:
        data, seed = self.config.data, self.config.run.seed
        build = partial(prompt_examples, tokenizer=self.tokenizer, limits=Limits.of(data))
        train, held_out = make_examples(build, *load_rows(data, rows, eval_rows, seed))
        given, columns, where = ([one[name] for one in (*train, *held_out)] for name in ("given", "columns", "where"))
        for example, own in zip((*train, *held_out), columns_for(asked, given, columns, where), strict=True):
            example["columns"] = own
        self.buckets = tuple(self.config.sampling.prompt_buckets or [data.max_prompt_length])
        collate = partial(collate_prompts, buckets=self.buckets, pad_id=self.tokenizer.pad_id)
        batches = Batches(train, batch_size=data.batch_size // self.group_size, seed=seed, collate=collate)
        return batches, held_out_batches(data, held_out, collate)

    def start(self, nets: Any, programs: Programs) -> None:
        """Take the networks and the programs with the state that they start from."""
        self.nets, self.programs, self.state = nets, programs, programs.state
        decay = self.settings.ema_decay
        self.average = jax.tree.map(jnp.copy, self.state.params["policy"]) if decay else None
        places = tree_shardings(self.mesh, self.state.params["policy"])  # else the average could lie elsewhere
        self._ema = jax.jit(partial(core.ema, decay=decay), donate_argnums=0, out_shardings=places)
        self.law = SamplingLaw.from_config(self.config.sampling, replicated(self.mesh))
        self.kl_coef = put(np.float32(self.settings.kl_coef), replicated(self.mesh))

    @property
    def length(self) -> int:
        """Tokens of the longest prompt and response together."""
        return total_length(self.config.sampling, self.config.data.max_prompt_length)

    def check_lengths(self, *models: Any) -> None:
        """Raise a UserError if prompt and response together exceed the positions of a model."""
        for model in models:
            if model is not None:
                check_length(model.arch, self.length, "prompt length + sampling.max_new_tokens =")

    def policy(self) -> Params:
        """The policy that is evaluated and saved: the average if there is one."""
        return self.state.params["policy"] if self.average is None else self.average

    def batch(self, i: int) -> Any:
        """The prompts of iteration i, each `group_size` times in a row."""
        return repeat_rows(self.batches[i], self.group_size)

    def text(self, i: int) -> Any:
        """Pretraining text for every optimiser step of iteration i, on the devices; None without any."""
        return None

    def rewards_from_python(self, batch: Any, rollout: Rollout) -> tuple[jax.Array, float | None]:
        """Python rewards f32[B] (zeros without any) and the mean gold reward; text leaves the device if needed."""
        host, gold = np.zeros(len(batch["prompts"]), np.float32), None
        if self.python_reward is not None or self.gold is not None:
            source, texts = self.config.reward, decode(self.tokenizer, rollout, batch["given"])
            rows = batch["prompts"], texts, batch["columns"]
            if self.python_reward is not None:
                host = of_own_rows(self.python_reward, self.mesh, *rows)
            if self.gold is not None:
                of_gold = partial(call_reward, self.gold, timeout=source.timeout, retries=source.retries)
                golds = of_own_rows(of_gold, self.mesh, *rows)
                gold = float(golds[np.asarray(batch.get("valid", np.ones(len(golds), bool)))].mean())
        return put_batch(self.mesh, host), gold

    def roll_out(self, params: Params, batch: Any, key: jax.Array) -> tuple[Rollout, Any, float | None]:
        """A rollout of a batch of prompts, its score, and its mean gold reward."""
        placed = put_batch(self.mesh, {name: batch[name] for name in ("tokens", "mask")})
        whole = self.nets.policy.whole(params)
        rollout = self.programs.rollout(whole, placed["tokens"], placed["mask"], key, self.law)
        host, gold = self.rewards_from_python(batch, rollout)
        nets = self.nets
        all_params = {**self.state.params, "policy": params}
        scored = self.programs.score(
            all_params, nets.ref, nets.reward, rollout, host, self.kl_coef, self.law.temperature
        )
        return rollout, scored, gold

    def iteration(self, i: int) -> tuple[dict[str, jax.Array], dict[str, float], Any]:
        """Rollout, score, update. Returns device metrics, host metrics and the arrays of a sample table."""
        key = key_at(self.key, NUMBERS["training"], i)
        rollout_key, update_key = jax.random.split(key)
        rollout, scored, gold = self.roll_out(self.state.params["policy"], self.batch(i), rollout_key)
        experience, self.kl_coef, metrics, per_row = scored
        arguments = (self.state, experience, update_key, self.law.temperature, self.text(i), self.nets.frozen)
        self.state, updates = self.programs.update(*arguments)
        if self.config.faults.debug_nans and updates["optim/skipped"] > 0:
            rows = ", ".join(self.batches.where(i))
            raise UserError(f"step {i + 1}: {first_nan(self.programs.update, *arguments)}; rows {rows}")
        if self.average is not None:
            self.average = self._ema(self.average, self.state.params["policy"])
        host = {} if gold is None else {"rollout/gold": gold}
        return {**metrics, **updates}, host, {"rollout": rollout, **per_row}

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """eval/reward, kl, objective and gold over the held-out prompts, the same noise every time; and samples."""
        found: list[dict[str, np.ndarray]] = []
        golds, weights, prompts = [], [], list[str]()
        samples: list[dict[str, Any]] = []
        for i, batch in enumerate(self.held_out):
            key = key_at(self.key, NUMBERS["evaluation"], i)
            key, _ = jax.random.split(key)  # made as in `iteration`, so that nothing compiles anew
            rollout, (_, _, _, per_row), gold = self.roll_out(self.policy(), batch, key)
            found.append({name: x[batch["valid"]] for name, x in to_host(per_row).items()})
            golds.append(gold or 0.0)
            weights.append(batch["valid"].sum())
            prompts += [prompt for prompt, valid in zip(batch["prompts"], batch["valid"], strict=True) if valid]
            if len(samples) < self.settings.num_samples:
                table = to_host({"rollout": rollout, **per_row})
                samples += self.table(table, batch["given"])[: self.settings.num_samples]
        rows = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        reward = objective = rows["reward"]
        if "kl" in rows:
            objective = reward - self.settings.kl_coef * rows["kl"]
        mean, error = mean_and_error(reward, prompts)
        metrics = {
            "eval/reward": mean,
            "eval/reward_se": float("nan") if error is None else error,
            **({"eval/kl": float(rows["kl"].mean())} if "kl" in rows else {}),
            "eval/objective": float(objective.mean()),
        }
        if self.gold is not None:
            metrics["eval/gold"] = float(np.average(golds, weights=weights))
        return metrics, samples

    def table(self, host: Any, prompts: list[Any]) -> list[dict[str, Any]]:
        """sft rows, with reward and, where there is a reference, kl, of a fetched rollout; `prompts` as given."""
        rollout, found = host["rollout"], []
        for i, prompt in enumerate(prompts[: self.settings.num_samples]):
            ids = rollout.tokens[i][rollout.mask[i]].tolist()
            row = sampled_row(prompt, self.tokenizer.response_text(ids, prompt), ids, bool(rollout.finished[i]))
            found.append({**row, **{name: float(host[name][i]) for name in ("reward", "kl") if name in host}})
        return found

    def tree(self) -> dict[str, Any]:
        """All arrays that an iteration changes: what a checkpoint holds."""
        tree = {"state": self.state, "kl_coef": self.kl_coef}
        return tree if self.average is None else {**tree, "average": self.average}

    def put_tree(self, tree: dict[str, Any]) -> None:
        """Take over what `tree` gave, or a checkpoint of it."""
        self.state, self.kl_coef, self.average = tree["state"], tree["kl_coef"], tree.get("average")

    def identity(self) -> dict[str, Any]:
        """What a continued run must find unchanged, beside the config."""
        return {
            "training rows": self.batches.cursor(),
            "held-out rows": fingerprint(self.held_out),
            "weights of the reference model": digest(self.nets.ref),
            "weights of the reward model": digest(self.nets.reward),
        }

    def skip_update(self) -> None:
        """Count an iteration without updates, so that the learning rate goes on."""
        num = self.settings.epochs * self.settings.minibatches
        self.state = TrainState(self.state.step + num, self.state.params, self.state.opt_state)

    def to_save(self) -> dict[str, Any]:
        """What the results need of `tree`: the policy that is evaluated."""
        if self.average is not None:
            return {"average": self.average}
        return {"state": {"params": {"policy": self.state.params["policy"]}}}

    def save(self, directory: Path, tree: dict[str, Any]) -> None:
        """Write the models in a tree of the form of `to_save`."""
        policy = tree["average"] if "average" in tree else tree["state"]["params"]["policy"]
        save_model(directory / "model", self.nets.policy, policy, self.tokenizer)
