"""The PPO stage: prompts, networks and rewards wired to the programs of `core`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import PPORun, resolve
from rlhf_jax.data.batches import Batches, collate_prompts, collate_sft, eval_batches, fingerprint
from rlhf_jax.data.examples import pack, prompt_examples, sft_examples
from rlhf_jax.data.sources import rows_from
from rlhf_jax.directory import check_output_dir, names_given
from rlhf_jax.errors import UserError
from rlhf_jax.generate import decode, make_sampler
from rlhf_jax.nans import first_nan
from rlhf_jax.ppo import core
from rlhf_jax.ppo.checks import check, check_batches, filters
from rlhf_jax.ppo.networks import Networks, load_networks
from rlhf_jax.rewards import RewardFailure, call_reward, combine
from rlhf_jax.run import Run
from rlhf_jax.sampling import SamplingLaw
from rlhf_jax.sharding import batch_sharding, make_mesh, put_batch, replicated, rollout_mesh, tree_shardings
from rlhf_jax.stage import (
    Rows,
    check_length,
    describe,
    load_rows,
    load_tokenizer,
    make_examples,
    save_model,
)
from rlhf_jax.state import TrainState, create_state, digest, learning_rates
from rlhf_jax.types import Params, PolicyLoss, Rollout


@dataclass(frozen=True)
class Programs:
    """The compiled programs of an iteration."""

    rollout: Callable[..., Rollout]
    score: Callable[..., Any]
    update: Callable[..., Any]
    state: TrainState
    schedule: Callable[[Any], Any]


def make_programs(
    config: PPORun, nets: Networks, mesh: Mesh, stop_ids: tuple[int, ...], policy_loss: PolicyLoss | None = None
) -> Programs:
    """rollout(policy, tokens, mask, key, law), score and update of `core`, the first state; nets.params is donated."""
    update, tx, schedule = core.make_ppo_step(nets.models, config, policy_loss)
    state = create_state(nets.params, tx, mesh)
    sampler = make_sampler(nets.models.policy, config.sampling, () if config.ppo.stop == "truncate" else stop_ids)

    def rollout(*args: Any) -> Rollout:
        drawn = sampler(*args)
        return drawn if config.ppo.stop == "eos" else core.truncated(drawn, stop_ids, config.ppo.truncate_after)

    exact = nets.models.policy.compute_dtype == jnp.float32 and not filters(config.sampling)
    recompute = config.ppo.old_logprobs == "recompute" or (config.ppo.old_logprobs == "auto" and not exact)
    score = core.make_score(nets.models, config.ppo, recompute=recompute, model_weight=config.reward.model_weight)
    rows, whole, sampling_mesh = batch_sharding(mesh), replicated(mesh), rollout_mesh(config.mesh, mesh)
    tree_shardings(sampling_mesh, nets.ref)  # refuses heads that do not divide by rollout_tensor
    rollout = jax.jit(rollout, out_shardings=rows)
    return Programs(
        rollout=rollout if sampling_mesh is mesh else OnMesh(sampling_mesh, rollout),
        score=jax.jit(score, out_shardings=(rows, whole, whole, rows)),
        # To look for a NaN the update is run again, from the state before it.
        update=jax.jit(
            update,
            donate_argnums=() if config.faults.debug_nans else 0,
            out_shardings=(tree_shardings(mesh, state), whole),
        ),
        state=state,
        schedule=schedule,
    )


class OnMesh:
    """A jitted function that is traced and run with another mesh than the rest."""

    def __init__(self, mesh: Mesh, function: Any):
        self.mesh, self.function = mesh, function

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.function(*args)

    def trace(self, *args: Any) -> Any:
        """As of a jitted function."""
        with jax.set_mesh(self.mesh):
            return self.function.trace(*args)


def key_at(key: jax.Array, *indices: int) -> jax.Array:
    """fold_in(fold_in(key, i), j)...; the integers go to the device explicitly, as a transfer guard demands."""
    for index in indices:
        key = jax.random.fold_in(key, jax.device_put(np.uint32(index), key.sharding))
    return key


class PPO:
    """The loop's parts. One iteration is `iteration(i)`; nothing here is traced."""

    def __init__(
        self,
        config: PPORun,
        *,
        rows: Rows | None = None,
        eval_rows: Rows | None = None,
        reward_functions: Sequence[Callable[..., Any]] | None = None,
        gold: Callable[..., Any] | None = None,
        policy_loss: PolicyLoss | None = None,
    ):
        """Read the data, load the networks, build the programs; writes nothing."""
        check(config)
        self.config = config
        self.mesh = make_mesh(config.mesh)
        check_batches(config, self.mesh)
        self.python_reward = combine(config.reward, reward_functions)
        self.gold = gold or (resolve(config.reward.gold) if config.reward.gold else None)
        if self.python_reward is None and not config.reward.model:
            raise UserError("there is no reward; set reward.model, or reward.functions to [module:name]")
        self.tokenizer = load_tokenizer(config.model)
        self.batches, self.held_out, self.ptx = self._data(rows, eval_rows)
        self.key = jax.device_put(jax.random.key(config.run.seed), replicated(self.mesh))
        with jax.set_mesh(self.mesh):
            self.nets = load_networks(config, self.mesh, self.tokenizer, self.key)
            self._check_length()
            self.programs = make_programs(config, self.nets, self.mesh, self.tokenizer.eos_ids, policy_loss)
        self.state = self.programs.state
        self.average = jax.tree.map(jnp.copy, self.state.params["policy"]) if config.ppo.ema_decay else None
        places = tree_shardings(self.mesh, self.state.params["policy"])  # else the average could lie elsewhere
        self._ema = jax.jit(partial(core.ema, decay=config.ppo.ema_decay), donate_argnums=0, out_shardings=places)
        self.law = jax.device_put(SamplingLaw.from_config(config.sampling), replicated(self.mesh))
        self.kl_coef = jax.device_put(np.float32(config.ppo.kl_coef), replicated(self.mesh))

    def _data(self, rows: Rows | None, eval_rows: Rows | None) -> tuple[Batches, list[Any], Batches | None]:
        data, ppo, seed = self.config.data, self.config.ppo, self.config.run.seed
        build = partial(
            prompt_examples,
            tokenizer=self.tokenizer,
            max_prompt_length=data.max_prompt_length,
            too_long=data.too_long,
            strict=data.strict,
        )
        train, held_out = make_examples(build, *load_rows(data, rows, eval_rows, seed))
        self.buckets = tuple(self.config.sampling.prompt_buckets or [data.max_prompt_length])
        collate = partial(collate_prompts, buckets=self.buckets, pad_id=self.tokenizer.pad_id)
        batches = Batches(train, batch_size=data.batch_size, seed=seed, collate=collate)
        held_out = eval_batches(held_out, batch_size=data.batch_size, collate=collate, limit=data.eval_batches)
        if not ppo.ptx_coef:
            return batches, held_out, None
        text, report = sft_examples(
            rows_from(ppo.ptx_path),
            self.tokenizer,
            max_prompt_length=data.max_prompt_length,
            max_length=data.max_length,
            too_long=data.too_long,
            strict=data.strict,
            loss_on="all",
        )
        print(f"ptx rows: {report}")
        ptx_collate = partial(collate_sft, length=data.max_length, reduction="token", pad_id=self.tokenizer.pad_id)
        text = pack(text, data.max_length)
        return batches, held_out, Batches(text, batch_size=ppo.ptx_batch_size, seed=seed, collate=ptx_collate)

    def _check_length(self) -> None:
        longest = self.buckets[-1] + self.config.sampling.max_new_tokens
        for model in (self.nets.models.policy, self.nets.models.reward):
            if model is not None:
                check_length(model.arch, longest, "prompt length + sampling.max_new_tokens =")

    def policy(self) -> Params:
        """The policy that is evaluated and saved: the average if there is one."""
        return self.state.params["policy"] if self.average is None else self.average

    def rewards_from_python(self, batch: Any, rollout: Rollout) -> tuple[jax.Array, float | None]:
        """Python rewards f32[B] (zeros without any) and the mean gold reward; text leaves the device if needed."""
        host, gold = np.zeros(len(batch["prompts"]), np.float32), None
        if self.python_reward is not None or self.gold is not None:
            responses = decode(self.tokenizer, rollout)
            if self.python_reward is not None:
                host = self.python_reward(batch["prompts"], responses, batch["columns"])
            if self.gold is not None:
                source = self.config.reward
                prompts, columns = batch["prompts"], batch["columns"]
                golds = call_reward(
                    self.gold, prompts, responses, columns, timeout=source.timeout, retries=source.retries
                )
                gold = float(golds[np.asarray(batch.get("valid", np.ones(len(golds), bool)))].mean())
        return jax.device_put(host, batch_sharding(self.mesh)), gold

    def roll_out(self, params: Params, batch: Any, key: jax.Array) -> tuple[Rollout, Any, float | None]:
        """A rollout of a batch of prompts, its score, and its mean gold reward."""
        placed = put_batch(self.mesh, {name: batch[name] for name in ("tokens", "mask")})
        rollout = self.programs.rollout(params, placed["tokens"], placed["mask"], key, self.law)
        host, gold = self.rewards_from_python(batch, rollout)
        nets = self.nets
        all_params = {**self.state.params, "policy": params}
        scored = self.programs.score(
            all_params, nets.ref, nets.reward, rollout, host, self.kl_coef, self.law.temperature
        )
        return rollout, scored, gold

    def iteration(self, i: int) -> tuple[dict[str, jax.Array], dict[str, float], Any]:
        """Rollout, score, update. Returns device metrics, host metrics and the arrays of a sample table."""
        key = key_at(self.key, 1, i)
        rollout_key, update_key = jax.random.split(key)
        rollout, scored, gold = self.roll_out(self.state.params["policy"], self.batches[i], rollout_key)
        experience, self.kl_coef, metrics, per_row = scored
        num = self.config.ppo.epochs * self.config.ppo.minibatches
        ptx = None
        if self.ptx is not None:
            stacked = jax.tree.map(lambda *xs: np.stack(xs), *[self.ptx[i * num + j] for j in range(num)])
            ptx = jax.device_put(stacked, replicated(self.mesh))
        arguments = (self.state, experience, update_key, self.law.temperature, ptx)
        self.state, updates = self.programs.update(*arguments)
        if self.config.faults.debug_nans and updates["optim/skipped"] > 0:
            raise UserError(f"iteration {i}, update: {first_nan(self.programs.update, *arguments)}")
        if self.average is not None:
            self.average = self._ema(self.average, self.state.params["policy"])
        host = {} if gold is None else {"rollout/gold": gold}
        return {**metrics, **updates}, host, {"rollout": rollout, **per_row}

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """eval/reward, kl, objective and gold over the held-out prompts, the same noise every time; and samples."""
        rewards, kls, golds, weights = [], [], [], []
        samples: list[dict[str, Any]] = []
        for i, batch in enumerate(self.held_out):
            key, _ = jax.random.split(key_at(self.key, 2, i))  # made as in `iteration`, so that nothing compiles anew
            rollout, (_, _, _, per_row), gold = self.roll_out(self.policy(), batch, key)
            reward, kl = jax.device_get((per_row["reward"], per_row["kl"]))
            rewards.append(reward[batch["valid"]])
            kls.append(kl[batch["valid"]])
            golds.append(gold or 0.0)
            weights.append(batch["valid"].sum())
            if len(samples) < self.config.ppo.num_samples:
                table = jax.device_get({"rollout": rollout, **per_row})
                samples += self.table(table, batch["prompts"])[: self.config.ppo.num_samples]
        reward, kl = np.concatenate(rewards), np.concatenate(kls)
        metrics = {
            "eval/reward": float(reward.mean()),
            "eval/reward_se": float(reward.std() / max(len(reward) - 1, 1) ** 0.5),
            "eval/kl": float(kl.mean()),
            "eval/objective": float((reward - self.config.ppo.kl_coef * kl).mean()),
        }
        if self.gold is not None:
            metrics["eval/gold"] = float(np.average(golds, weights=weights))
        return metrics, samples

    def table(self, host: Any, prompts: list[str]) -> list[dict[str, Any]]:
        """Rows {prompt, response, reward, kl, finished} of a fetched rollout."""
        rollout, num = host["rollout"], self.config.ppo.num_samples
        texts = self.tokenizer.decode_batch(rollout.tokens[:num], rollout.mask[:num])
        columns = zip(prompts, texts, host["reward"], host["kl"], rollout.finished, strict=False)
        return [
            {"prompt": p, "response": t, "reward": float(r), "kl": float(k), "finished": bool(f)}
            for p, t, r, k, f in columns
        ]

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
            "ptx rows": self.ptx and self.ptx.cursor(),
            "weights of the reference model": digest(self.nets.ref),
            "weights of the reward model": digest(self.nets.reward),
        }

    def skip_update(self) -> None:
        """Count an iteration without updates, so that the learning rate goes on."""
        num = self.config.ppo.epochs * self.config.ppo.minibatches
        self.state = TrainState(self.state.step + num, self.state.params, self.state.opt_state)

    def to_save(self) -> dict[str, Params]:
        """What the results need of `tree`: the policy that is evaluated, and the critic's half if it is asked for."""
        params = {"average": self.average} if self.average is not None else {}
        halves = [] if self.average is not None else ["policy"]
        if self.config.ppo.save_value_model:
            halves = ["policy", "value"] if self.config.ppo.shared_trunk else [*halves, "value"]
        return {**params, "state": {"params": {name: self.state.params[name] for name in halves}}}

    def save(self, directory: Path, tree: dict[str, Any]) -> None:
        """Write the models in a tree of the form of `to_save`."""
        params = tree["state"]["params"]
        policy = tree["average"] if "average" in tree else params["policy"]
        save_model(directory / "model", self.nets.policy, policy, self.tokenizer)
        if "value" in params:
            value = params["value"]
            if self.config.ppo.shared_trunk:
                value = self.nets.policy.model.with_score(params["policy"], value["score"])
            save_model(directory / "value_model", self.nets.value, value, self.tokenizer)


SHOWN = ("rollout/reward", "rollout/gold", "rollout/kl", "time/tokens_per_s")


def run(config: PPORun, **overrides: Any) -> dict[str, Any]:
    """Train as configured and write the run directory; returns its summary.

    Keyword arguments replace what the config names: `rows`, `eval_rows` (lists of dicts), `reward_functions`, `gold`
    (Python functions) and `policy_loss`.
    """
    if (finished := check_output_dir("ppo", config)) is not None:
        return finished
    ppo = PPO(config, **overrides)
    total = config.ppo.iterations
    tokens = config.data.batch_size * config.sampling.max_new_tokens
    given = names_given(**overrides)
    with jax.set_mesh(ppo.mesh):
        params = ppo.state.params["policy"]
        describe("ppo", ppo.mesh, ppo.nets.models.policy, params, iterations=total, new_tokens_per_iteration=tokens)
        with Run("ppo", config, total=total, shown=SHOWN, given=given, agree_every=1) as out:
            tree, notes = out.restore(ppo.tree(), ppo.identity())
            ppo.put_tree(tree)
            out.rows_of = ppo.batches.where
            notes = train(out, ppo, notes)
            ppo.save(out.dir, out.restore_best(ppo.to_save()))
            return out.finish({"iterations": total, **notes, "kl_coef": float(ppo.kl_coef)})


def train(out: Run, ppo: PPO, notes: dict[str, Any]) -> dict[str, Any]:
    """The iterations from out.start on. `notes` {before, after}: the first evaluation and that of the kept policy."""
    config, total = ppo.config, out.total
    tokens = config.data.batch_size * config.sampling.max_new_tokens
    rates = learning_rates(ppo.programs.schedule, total)
    if not notes:
        before = _evaluate(out, ppo, 0)
        notes = {"before": before, "after": before}
        out.save_if_due(0, ppo.tree(), notes)
    out.restart_clock()
    logged = out.start
    for i in range(out.start, total):
        done = _iterate(out, ppo, i, notes)
        show = done is not None and config.ppo.num_samples and (i + 1) % config.ppo.sample_every == 0
        if done is not None and (show or (i + 1) % config.run.log_every == 0 or i + 1 == total):
            metrics, host, table = done
            prompts = ppo.batches[i]["prompts"] if show else []
            write = lambda fetched, i=i, prompts=prompts: out.samples(i + 1, ppo.table(fetched, prompts))  # noqa: E731
            host["optim/lr"] = rates[i]
            new = tokens * (i + 1 - logged)
            out.log(i + 1, metrics, host, tokens=new, table=table if show else None, on_table=write)
            logged = i + 1
        if i + 1 == total or (config.run.eval_every and (i + 1) % config.run.eval_every == 0):
            notes = {**notes, "after": _evaluate(out, ppo, i + 1) or notes["after"]}
            out.restart_clock()
        out.save_if_due(i + 1, ppo.tree(), notes)
    return notes


def _iterate(out: Run, ppo: PPO, i: int, notes: dict[str, Any]) -> tuple[Any, dict[str, float], Any] | None:
    """Iteration i, or None if its reward failed and the batch is to be skipped."""
    try:
        done = ppo.iteration(i)
    except RewardFailure as error:
        if ppo.config.reward.on_failure == "stop":
            out.save_now(i, ppo.tree(), notes)
            raise UserError(f"iteration {i + 1}: {error}; then {out.how_to_continue()}") from error
        out.flush()
        out.write(i + 1, {"rollout/skipped": 1.0})
        out.say(f"ppo: iteration {i + 1} is skipped: {error}")
        ppo.skip_update()
        out.bar.update(1)
        return None
    out.advance(i + 1, done[0]["optim/skipped"], ppo.config.ppo.epochs * ppo.config.ppo.minibatches)
    return done


def _evaluate(out: Run, ppo: PPO, step: int) -> dict[str, float]:
    """Log an evaluation and its samples; returns it if its policy is the one to keep, else nothing.

    The best one has the highest reward less KL at the configured kl_coef: reward alone would pick the most
    over-optimised policy.
    """
    out.flush()
    try:
        results, samples = ppo.evaluate()
    except RewardFailure as error:
        if ppo.config.reward.on_failure == "stop":
            raise UserError(f"evaluation after iteration {step}: {error}; then {out.how_to_continue()}") from error
        out.say(f"ppo: the evaluation after iteration {step} is skipped: {error}")
        return {}
    out.write(step, results)
    out.samples(step, samples)
    return results if out.keep_if_best(step, results["eval/objective"]) else {}
