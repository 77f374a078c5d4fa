"""What a method that learns from its own samples is made of. Nothing of it changes while it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import numpy as np

from rlhf_jax.config import OnlineArgs, OnlineConfig, resolve
from rlhf_jax.config.functions import replace
from rlhf_jax.data.batches import Batches, fingerprint
from rlhf_jax.data.collate import Batch, collate_prompts, repeat_rows
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.loading import Rows, held_out_batches, load_rows, make_examples
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.reward_judge import RewardJudge, check_against
from rlhf_jax.hosts.processes import say
from rlhf_jax.inference.generate import spread, total_length
from rlhf_jax.inference.reward_functions import ScoreFn, columns_for, combine, functions_of
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.models.loading import arch_of, check_length, load_tokenizer, save_model
from rlhf_jax.online.networks import Networks
from rlhf_jax.online.programs import Programs
from rlhf_jax.sharding import Mesh, put, replicated
from rlhf_jax.training.state import digest
from rlhf_jax.types import RewardFn


@dataclass(frozen=True)
class Inputs:
    """What is there before any network.

    Attributes:
        tokenizer: the policy's.
        batches: the prompts of an iteration, each once.
        held_out: the prompts of an evaluation, in batches.
        reward: (prompts, responses, columns) -> float32[B], the sum of the Python rewards; None without any.
        gold: what is only logged.
        key: the run's, on every device.
        law: what is sampled from, on every device.
        remarks: what the run says of its rows at its end.
        judge: whose opinion of responses is paid, too; None without any.
    """

    tokenizer: Tokenizer
    batches: Batches
    held_out: list[Batch]
    reward: ScoreFn | None
    gold: RewardFn | None
    key: jax.Array
    law: SamplingLaw
    remarks: list[str]
    judge: RewardJudge | None = None


class Sources(TypedDict, total=False):
    """What Python code gives instead of what the config names."""

    rows: Rows | None
    eval_rows: Rows | None
    reward_functions: Sequence[RewardFn] | None
    gold: RewardFn | None


def read_inputs(config: OnlineArgs, mesh: Mesh, *, group_size: int = 1, **sources: Unpack[Sources]) -> Inputs:
    """The inputs of a config, whose sources are replaced by the given ones; `group_size` responses answer each prompt.

    Raises:
        UserError: there is no reward, the policy has too few positions, or something is wrong with the rows.
    """
    data, seed, reward_functions = config.data, config.run.seed, sources.get("reward_functions")
    reward = combine(config.reward, reward_functions)
    gold = sources.get("gold") or (resolve(config.reward.gold) if config.reward.gold else None)
    if reward is None and not (config.reward.named() or config.reward.teacher):
        raise UserError("there is no reward; set reward.model, reward.judge, or reward.functions to [module:name]")
    length = total_length(config.sampling, data.max_prompt_length)
    teachers = [config.reward.teacher] if config.reward.teacher else []
    for path in (config.model.path, *config.reward.paths, *teachers):  # before rows are read
        model = config.model if path == config.model.path else replace(config.model, path=path, arch=None)
        check_length(arch_of(model), length, f"{path or 'model.arch'}: prompt length + sampling.max_new_tokens =")
    tokenizer = load_tokenizer(config.model)
    asked = functions_of(config.reward, reward_functions) + ([gold] if gold else [])
    build = partial(prompt_examples, tokenizer=tokenizer, limits=Limits.of(data))
    train, held_out, remarks = make_examples(
        build, *load_rows(data, sources.get("rows"), sources.get("eval_rows"), seed)
    )
    if len(train) < (wanted := data.batch_size // group_size):
        say(f"{len(train)} prompts are taken {-(-wanted // len(train))} times each, to fill an iteration of {wanted}")
        train = train * -(-wanted // len(train))
    examples = [*train, *held_out]
    prompts, columns, where = ([one[name] for one in examples] for name in ("given", "columns", "where"))
    for example, own in zip(examples, columns_for(asked, prompts, columns, where), strict=True):
        example["columns"] = own
    check_against(config.reward.judge, columns, where)
    judge = RewardJudge(config.reward.judge, mesh) if config.reward.judge.named() else None
    buckets = tuple(config.sampling.prompt_buckets or [data.max_prompt_length])
    collate = partial(collate_prompts, buckets=buckets, pad_id=tokenizer.pad_id)
    batches = Batches(train, batch_size=data.batch_size // group_size, seed=seed, collate=collate)
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=replicated(mesh))()
    law = SamplingLaw.from_config(config.sampling, replicated(mesh))
    rows = batches, held_out_batches(data, held_out, collate)
    return Inputs(tokenizer, *rows, reward, gold, key, law, remarks, judge)


def stacked(batches: Sequence[Batch]) -> Batch:
    """Batches of arrays as one, with a leading axis of their number: the text of an iteration's optimiser steps."""
    return jax.tree.map(lambda *xs: np.stack(xs), *batches)


@dataclass(frozen=True)
class Method:
    """A method with all that it computes with; `setup` of its own module makes it, with the first `LoopState`.

    Attributes:
        settings: the method's group of the config.
        group_size: responses to each prompt.
        redraws: rounds in which groups that are paid alike are drawn again.
        text: pretraining text for every optimiser step; None without any.
        identity: what a continued run must find unchanged, beside the config, the rows and the frozen models.
    """

    config: OnlineArgs
    settings: OnlineConfig
    mesh: Mesh
    inputs: Inputs
    nets: Networks
    programs: Programs
    group_size: int = 1
    redraws: int = 0
    text: Batches | None = None
    identity: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def temperature(self) -> jax.Array:
        """float32[], of the log-probs that are trained: the sampler's, unless the config has another."""
        own = self.settings.train_temperature
        return put(np.float32(own), replicated(self.mesh)) if own else self.inputs.law.temperature

    @property
    def steps(self) -> int:
        """Optimiser steps of an iteration."""
        return self.settings.epochs * self.settings.minibatches

    def batch(self, i: int) -> Batch:
        """What iteration i reads: its prompts, and as "ptx" a step's text each."""
        return self.spread(self.inputs.batches[i], i)

    def spread(self, prompts: Batch, i: int) -> Batch:
        """Prompts as iteration i reads them.

        Text and columns stand there `group_size` times in a row, once for each response; arrays once, or as often as
        the mesh must have them (`generate.spread`).
        """
        ways = self.mesh.row_ways
        times = spread(len(prompts["tokens"]), self.group_size, ways)
        arrays = {name: np.repeat(prompts[name], times, axis=0) for name in ("tokens", "mask")}
        batch = {**repeat_rows(prompts, self.group_size), **arrays}
        if self.text is None:
            return batch
        text = stacked([self.text[i * self.steps + j] for j in range(self.steps)])
        return {**batch, "ptx": put(text, replicated(self.mesh))}

    def facts(self) -> dict[str, object]:
        """What a continued run must find unchanged, beside the config."""
        judge = self.inputs.judge
        further = {"judge": judge and judge.params, "teacher model": self.nets.teacher}
        return {
            "training rows": self.inputs.batches.cursor(),
            "held-out rows": fingerprint(self.inputs.held_out),
            "weights of the reference model": digest(self.nets.ref),
            "weights of the reward model": digest(self.nets.reward),
            **{f"weights of the {name}": digest(params) for name, params in further.items() if params is not None},
            **self.identity,
        }

    def save(self, directory: Path, tree: Mapping[str, Any]) -> None:
        """Write the models; `tree` is what `LoopState.kept` makes, or a checkpoint's part of that form."""
        params = tree.get("state", {"params": {}})["params"]
        policy = tree["average"] if "average" in tree else params["policy"]
        save_model(directory / "model", self.nets.policy, policy, self.inputs.tokenizer)
        if self.nets.critic is not None:
            trunk = params["policy"] if self.nets.models.shared_trunk else {}
            critic = {**{name: part for name, part in trunk.items() if name != "head"}, **params["value"]}
            save_model(directory / "value_model", self.nets.critic, critic, self.inputs.tokenizer)
