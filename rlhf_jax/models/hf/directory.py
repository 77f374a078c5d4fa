"""Where a model lies: the directory itself, or of a PEFT adapter that of the model which it stands on.

And what of a directory goes when another model is written there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.copies import BESIDE, TEXT_OF_A_MODEL, WEIGHTS_OF_A_MODEL
from rlhf_jax.hosts.files import replacing
from rlhf_jax.models.hf import hub
from rlhf_jax.models.hf.config_json import read_json, typed, understood

ADAPTER = "adapter_config.json"
"""What makes a directory one of a PEFT adapter."""
_BESIDE = re.compile("|".join(BESIDE))
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


@contextlib.contextmanager
def replacing_model(path: Path, *, in_place: bool, with_text: bool) -> Iterator[Path]:
    """`files.replacing` of a directory, of which all stays that is not of its old model.

    Of a model that is written `in_place` all but the weights stays; else a tokenizer stays that the new model, which
    comes `with_text`, does not replace.
    """
    gone = [WEIGHTS_OF_A_MODEL, *[_BESIDE] * (not in_place)]
    gone += [TEXT_OF_A_MODEL] * (with_text and not in_place and (path / "config.json").exists())
    with replacing(path) as new:
        yield new
        for file in path.iterdir() if path.exists() else []:
            if not (new / file.name).exists() and not any(names.fullmatch(file.name) for names in gone):
                (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
