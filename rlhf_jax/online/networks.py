"""The networks of a method: the policy and what it is compared with and judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from rlhf_jax.config import OnlineArgs
from rlhf_jax.config.functions import replace
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.inference.generate import total_length
from rlhf_jax.inference.scoring import check_combine
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import (
    Loaded,
    check_balance,
    check_same_tokenizer,
    check_vocabulary,
    load_model,
)
from rlhf_jax.sharding import Mesh
from rlhf_jax.training.responses import Ensemble
from rlhf_jax.types import Params


@dataclass(frozen=True)
class Networks:
    """What never changes of a method's networks; what is trained is in the training state.

    Attributes:
        models: the method's `core.Models`, which compute.
        policy: the model; its parameters may have been donated to training.
        ref: parameters of the reference; None without any.
        reward: parameters of the reward model, of an ensemble a list of each one's; None without any.
        frozen: what trained adapters or layers stand on, as `models.whole` and the update take it; None if all is
            trained.
        critic: the critic that is written to output_dir/value_model; None if none is.
        teacher: parameters of the teacher; None without any.
        critic_head: of a critic that starts from the reward model, (parameters of the latter) -> its head.
    """

    models: Any
    policy: Loaded
    ref: Params | None
    reward: Params | None
    frozen: Params | None
    critic: Loaded | None = None
    teacher: Params | None = None
    critic_head: Callable[[Params], Params] | None = None


def load_policy_and_reward(
    config: OnlineArgs, mesh: Mesh, tokenizer: Tokenizer, key: jax.Array
) -> tuple[Loaded, Loaded | None, jax.Array]:
    """config.model and config.reward.paths, which must know the tokenizer's ids and hold prompt and response.

    Also returns the key of new weights, a branch of the run's `key`.

    Raises:
        UserError: a vocabulary that is too small, or a reward model with another tokenizer.
    """
    length, key = total_length(config.sampling, config.data.max_prompt_length), branch(key, "weights")
    policy, rewards = load_model(config.model, mesh, key, length=length), list[Loaded]()
    check_vocabulary(policy.model.arch, tokenizer, config.model.path or "model.arch")
    check_balance(config.model, policy.model.arch)
    for path in config.reward.paths:
        named = replace(config.model, path=path, arch=None)
        rewards.append(load_model(named, mesh, key, head="trained", length=length))
        check_vocabulary(rewards[-1].model.arch, tokenizer, path)
        check_same_tokenizer(tokenizer, path, "reward model")
    check_combine(config.reward.combine, rewards, "reward.combine")
    return policy, together(rewards), key


def load_teacher(config: OnlineArgs, mesh: Mesh, tokenizer: Tokenizer, key: jax.Array) -> Loaded | None:
    """config.reward.teacher, which must have the policy's tokenizer and hold prompt and response; None without any.

    Raises:
        UserError: it has another tokenizer, or too few ids.
    """
    path = config.reward.teacher
    if not path:
        return None
    check_same_tokenizer(tokenizer, path, "teacher")
    length = total_length(config.sampling, config.data.max_prompt_length)
    teacher = load_model(replace(config.model, path=path, arch=None), mesh, key, length=length)
    check_vocabulary(teacher.model.arch, tokenizer, path)
    return teacher


def members(reward: Loaded) -> list[Loaded]:
    """The models of an ensemble, or the single one; `together` is the way back."""
    if not isinstance(reward.model, Ensemble):
        return [reward]
    return [replace(one, params=params) for one, params in zip(reward.model.sources, reward.params, strict=True)]


def together(rewards: Sequence[Loaded]) -> Loaded | None:
    """Reward models as one: None, the only one, or an `Ensemble`, whose parameters are a list."""
    if len(rewards) < 2:
        return rewards[0] if rewards else None
    sources = tuple(replace(one, params={}) for one in rewards)
    return Loaded(Ensemble(sources), [one.params for one in rewards])  # type: ignore[arg-type]
