"""The networks that every method needs: policy, and a reward model if the config names one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import hub
from rlhf_jax.stage import Loaded, check_vocabulary, load_model, replace


def load_policy_and_reward(
    config: Any, mesh: Mesh, tokenizer: Tokenizer, key: jax.Array
) -> tuple[Loaded, Loaded | None]:
    """config.model and config.reward.model, which must know the tokenizer's ids.

    Raises:
        UserError: a vocabulary that is too small, or a reward model with another tokenizer.
    """
    policy = load_model(config.model, mesh, key)
    check_vocabulary(policy.model.arch, tokenizer, config.model.path or "model.arch")
    if not config.reward.model:
        return policy, None
    reward = load_model(replace(config.model, path=config.reward.model, arch=None), mesh, key, head="trained")
    check_vocabulary(reward.model.arch, tokenizer, config.reward.model)
    check_same_tokenizer(tokenizer, config.reward.model)
    return policy, reward


def check_same_tokenizer(tokenizer: Tokenizer, path: str) -> None:
    """Raise a UserError if the directory holds a tokenizer that maps text to other ids."""
    directory = hub.local_directory(path)
    if not any((Path(directory) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    if Tokenizer.load(directory).hf.get_vocab() != tokenizer.hf.get_vocab():
        raise UserError(f"reward model {path} has another tokenizer than the policy; train it with the policy's")
