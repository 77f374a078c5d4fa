"""Models by their names: a directory, hf://owner/name of the Hugging Face Hub, gs://bucket/name of a bucket."""

from __future__ import annotations

import functools
from pathlib import Path

from rlhf_jax.config.guess import of_the_hub
from rlhf_jax.config.settings import HUB
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.copies import OF_A_MODEL, local

_WANTED = [f"*{ending}" for ending in OF_A_MODEL]
_TWICE = ["consolidated*", "*/consolidated*", "*/model*.safetensors"]
"""The same weights in the form of another program, or of other steps: nobody reads them."""


def local_directory(path: str) -> str:
    """The path itself, or where the files of hf://owner/name or hf://owner/name@revision lie after a download.

    Of gs://bucket/name it is where `copies.local` has them.

    Raises:
        UserError: no such repository, revision or bucket, no network, or a path that is none but may be such a name.
    """
    if in_bucket(path):
        return str(local(path))
    if path.startswith(HUB):
        return downloaded(path)
    if path and not Path(path).expanduser().exists() and (cure := of_the_hub(path)):
        raise UserError(f"{path}: no such directory; {cure}")
    return path


@functools.cache
def downloaded(path: str) -> str:
    """Where the files of hf://owner/name or hf://owner/name@revision lie, asked for once."""
    name, _, revision = path.removeprefix(HUB).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{path} is no name of the Hub; write hf://owner/name or hf://owner/name@revision")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_TWICE)
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
        return snapshot_download(
            name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_TWICE, local_files_only=True
        )
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
