"""Which scalar heads a directory holds: one, those of an ensemble on one trunk, or none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.hf.config_json import MEMBERS, OWN_ADAPTERS, read_json
from rlhf_jax.models.hf.directory import ADAPTER, model_directory
from rlhf_jax.models.hf.families import MEMBERS as HEADS
from rlhf_jax.models.hf.family import Family
from rlhf_jax.models.hf.layout import Leaves
from rlhf_jax.models.hf.stored import stored_tensors


def has_score_head(path: str | os.PathLike[str]) -> bool:
    """Whether a Hugging Face directory holds the trained scalar head of a reward or value model, or several."""
    return "score.weight" in stored_tensors(Path(path)) or own_adapters(path)


def own_adapters(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds the trunk of a reward ensemble whose members have adapters (`peft.load_members`)."""
    config = Path(path) / "config.json"
    return config.is_file() and read_json(config).get(OWN_ADAPTERS) is True


def heads_in(leaves: Leaves) -> int:
    """The members of the ensemble whose heads are among leaves; 0 if there is a single head or none."""
    kernel = leaves.get("score/kernel")
    return len(kernel) if kernel is not None and np.ndim(kernel) == 2 else 0


def members_of(path: str | os.PathLike[str]) -> int:
    """The members of the reward ensemble in a directory; 0 if it holds a model of another kind.

    Raises:
        UserError: config.json says something else than a number.
    """
    adapter = Path(path) / ADAPTER
    where = adapter if adapter.is_file() else model_directory(path) / "config.json"
    members = read_json(where).get(MEMBERS) or 0
    if type(members) is not int or members < 0:
        raise UserError(f"{where}: {MEMBERS} is {members!r}; make it the number of heads, or leave it out")
    return members


def with_heads(family: Family, members: int) -> Family:
    """The family whose score head is that of an ensemble, if there are members."""
    return family._replace(tensors=family.tensors | HEADS) if members else family
