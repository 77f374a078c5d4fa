"""Models by their names: a directory, hf://owner/name of the Hugging Face Hub, gs://bucket/name of a bucket."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

from rlhf_jax.config.guess import of_the_hub
from rlhf_jax.config.settings import HUB
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.copies import BESIDE, WANTED, local

_TEXTS = [f"*{ending}" for ending in WANTED]
_WEIGHTS = ["model.safetensors", "adapter_model.safetensors", f"{BESIDE[1]}/*"]
"""Those that are read, but for the shards of an index."""


def local_directory(path: str, *, weights: bool = True) -> str:
    """The path itself, or where the files of hf://owner/name or hf://owner/name@revision lie after a download, the
    `weights` if they are needed.

    Of gs://bucket/name it is where `copies.local` has them.

    Raises:
        UserError: no such repository, revision or bucket, no network, or a path that is none but may be such a name.
    """
    if in_bucket(path):
        return str(local(path))
    if path.startswith(HUB):
        return downloaded(path, weights)
    if path and not Path(path).expanduser().exists() and (cure := of_the_hub(path)):
        raise UserError(f"{path}: no such directory; {cure}")
    return path


@functools.cache
def downloaded(path: str, weights: bool) -> str:
    """Where the files of hf://owner/name or hf://owner/name@revision lie, asked for once.

    With `weights` those of them that are read are there: of a model in shards what its index names.
    """
    name, _, revision = path.removeprefix(HUB).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{path} is no name of the Hub; write hf://owner/name or hf://owner/name@revision")
    if not weights:
        return _snapshot(path, name, revision or None, _TEXTS)
    place, wanted = Path(downloaded(path, False)), [*_WEIGHTS]
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # said where it is read
        index = json.loads((place / "model.safetensors.index.json").read_bytes())
        wanted = [*set(index["weight_map"].values()), *_WEIGHTS[1:]]
    return _snapshot(path, name, place.name, wanted)  # of the same commit


def _snapshot(path: str, name: str, revision: str | None, wanted: list[str]) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision, allow_patterns=wanted)
    except Exception as error:  # from requests, httpx, the Hub and the file system
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be downloaded ({reason}); check the name and the network, or give a directory"
        ) from error


def cached_directory(name: str, revision: str | None = None) -> str | None:
    """Where an earlier download put owner/name, or None; without the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, revision=revision, allow_patterns=_TEXTS, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
