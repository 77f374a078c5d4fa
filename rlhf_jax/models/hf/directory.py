"""Where a model lies: the directory itself, or of a PEFT adapter that of the model which it stands on."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.models.hf import hub
from rlhf_jax.models.hf.config_json import read_json, typed, understood

ADAPTER = "adapter_config.json"
"""What makes a directory one of a PEFT adapter."""
MOST_LAYERS = 8
"""Adapters that may stand on one another."""


def stands_on(folder: Path) -> Path | None:
    """The directory of the model that a PEFT adapter was made for; None of a directory that holds a model itself.

    Raises:
        UserError: it is neither a directory nor in the Hub's cache on this machine.
    """
    if not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
        return None
    raw = read_json(folder / ADAPTER)
    with understood(folder / ADAPTER):
        name = typed(raw.get("base_model_name_or_path") or "none", str, "base_model_name_or_path", folder / ADAPTER)
        if in_bucket(name):
            return Path(hub.local_directory(name))
        folder_of_base = name if Path(name).is_dir() else hub.cached_directory(name, raw.get("revision"))
    if folder_of_base is None:
        cure = "download that model, or write its directory into base_model_name_or_path"
        raise UserError(f"{folder / ADAPTER} stands on {name}, which is neither a directory nor downloaded; {cure}")
    return Path(folder_of_base)


def model_directory(path: str | os.PathLike[str]) -> Path:
    """The path itself, or of a PEFT adapter the directory of the model that it stands on."""
    return layers_of(path)[-1]


def layers_of(path: str | os.PathLike[str]) -> list[Path]:
    """The directory of a model and, before it, those of the adapters that stand on one another on it.

    Raises:
        UserError: one stands on itself, by whatever way, or there are more than anybody makes.
    """
    folders, seen = [Path(path)], {os.path.realpath(path)}
    while (below := stands_on(folders[-1])) is not None:
        if os.path.realpath(below) in seen or len(folders) == MOST_LAYERS:
            what = "stands on itself" if os.path.realpath(below) in seen else f"stands on {MOST_LAYERS} others"
            cure = "write the model's own directory into base_model_name_or_path"
            raise UserError(f"{Path(path) / ADAPTER} {what} ({folders[-1]} names {below}); {cure}")
        folders.append(below)
        seen.add(os.path.realpath(below))
    return folders
