"""What the models and data files of a config hold, in a few digits: whether they are still what they were."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from rlhf_jax.config import to_dict
from rlhf_jax.config.functions import flat, texts
from rlhf_jax.config.settings import HUB_ROWS, Settings
from rlhf_jax.data import hub_rows
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.copies import DATASET, OF_A_MODEL, TEMPLATES, WANTED, have, local_tree
from rlhf_jax.hosts.outputs import there
from rlhf_jax.models import hf
from rlhf_jax.models.hf import directory, hub
from rlhf_jax.models.loading import OF_MEMBERS
from rlhf_jax.runs import listing
from rlhf_jax.runs.directory import METRICS, SAMPLES, SUMMARY

OPTIONS = {"path", "model", "models", "tokenizer", "reference", "teacher", "mixture", "demonstrations"}
OPTIONS |= {"data_path", "eval_path", "text_path", "ptx_path", "preference_path", "average", "checks", "guidelines"}
"""Last parts of the names of options that say what to read."""

RUNS = "runs"
"""That of options that name runs, or directories with runs below them."""

OF_NO_ACCOUNT = (
    "run.json",
    "config.yaml",
    "checkpoints",
    "tensorboard",
    "wandb",
    "mlflow",
    "profile",
    "report.html",
)
"""What a run leaves that is no result."""

SMALL, BLOCK, BLOCKS = 64 << 20, 4096, 4096
"""Bytes of a file that is read whole; of larger ones so many blocks of such a size, evenly apart."""


def contents(config: Settings) -> dict[str, str]:
    """Option -> a digest of what it names, for the models and data files that a config reads and that are there.

    It changes with any byte of a file of up to 64 MiB. Of a larger one it takes the size and 4096 blocks of 4 KiB
    evenly apart, of safetensors the header and two blocks of every tensor. Of a model directory it takes the files
    that make up the model, of one that `tokenizer` names those without weights, of an adapter those of its model too,
    and of runs their metrics, samples and summaries. A builder of TFDS counts by its name.
    """
    digests: dict[str, str] = {}
    for option, tree in flat(to_dict(config)):
        told = [(name.rpartition(".")[2], text) for name, text in texts({option: tree})]
        found = [digest_of(text, weights=last != "tokenizer") for last, text in told if last in OPTIONS]
        found += [digest_of_runs(text) for last, text in told if last == RUNS]
        if found and all(found):
            digests[option] = _as_one(found)
    return digests


def _as_one(digests: list[str]) -> str:
    """A digest of several; of one, that itself, and of none nothing."""
    return hashlib.blake2b(" ".join(digests).encode()).hexdigest()[:32] if digests[1:] else "".join(digests)


def digest_of(name: str, *, weights: bool = True) -> str:
    """32 hexadecimal digits of a file or directory, by any name that a command takes; empty if it is not there.

    Without `weights`, which a tokenizer has no need of, they are neither read nor fetched."""
    if name.startswith("tfds:"):
        return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    try:
        places = _places(name, weights=weights)
        places += [place for trunk in places if weights for place in _members(name, trunk)]
        return _as_one([_digest(place, OF_A_MODEL if weights else WANTED) for place in places])
    except (OSError, ValueError, RuntimeError):  # it is said where it is read
        return ""


def _places(name: str, *, weights: bool) -> list[Path]:
    """Where what a name stands for lies on this machine, or a copy of it: files of the Hub, a file, or a directory."""
    if name.startswith(HUB_ROWS):
        return [place for _, place in hub_rows.files_of(name)]
    with_split = in_bucket(name) and "@" in name and not there(name)
    local = hub.local_directory(name.rpartition("@")[0] if with_split else name, weights=weights)
    places = [Path(place).expanduser() for place in (local, local.partition("@")[0])]
    return [place for place in places if place.exists()][:1]


def _members(name: str, trunk: Path) -> list[Path]:
    """Where the adapters of an ensemble's members lie, whose `trunk` `name` stands for; nothing of another model."""
    if not hf.own_adapters(trunk):
        return []
    where = name if in_bucket(name) else str(trunk)
    return [Path(hub.local_directory(f"{where}/{OF_MEMBERS}/{i}")) for i in range(hf.members_of(trunk))]


def digest_of_runs(name: str) -> str:
    """32 hexadecimal digits of what a report reads of a run and of those below it; empty if there is none."""
    digest, runs = hashlib.blake2b(digest_size=16), sorted(listing.below(Path(name)))
    for run in runs:
        for file in (run / METRICS, run / SAMPLES, run / SUMMARY):
            digest.update(json.dumps(str(file.relative_to(name))).encode())
            with contextlib.suppress(OSError):  # not every run has each
                _add(digest, file)
    return digest.hexdigest() if runs else ""


def digest_below(output: str) -> str:
    """32 hexadecimal digits of an output: a file, or all files of a directory but what only going on with it needs."""
    counts = lambda name: not any(part in OF_NO_ACCOUNT or part.startswith(".") for part in Path(name).parts)  # noqa: E731
    place = local_tree(output.rstrip("/"), counts) if in_bucket(output) else Path(output)
    digest = hashlib.blake2b(digest_size=16)
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    for file in files:
        below = str(file.relative_to(place))
        if counts(below):
            digest.update(json.dumps(below).encode())
            _add(digest, file)
    return digest.hexdigest()


def _digest(place: Path, endings: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if place.is_file():
        _add(digest, place)
        return digest.hexdigest()
    is_data = (place / DATASET).is_file()
    found = place.glob("**/*") if is_data else (*place.glob("*"), *place.glob(f"{TEMPLATES}/*"))
    files = (file for file in found if file.is_file())
    for file in sorted(file for file in files if is_data or file.name.endswith(endings)):
        digest.update(json.dumps(str(file.relative_to(place))).encode())
        _add(digest, file)
    with contextlib.suppress(UserError):
        if not is_data and (below := directory.stands_on(place)) is not None:
            digest.update(_digest(below, endings).encode())
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f" {size} ".encode())
    with open(file, "rb") as stream:
        if size <= SMALL:
            have(file, [(0, size)])
            while block := stream.read(1 << 20):
                digest.update(block)
            return
        starts = _starts(file, size)
        have(file, [(start, min(start + BLOCK, size)) for start in starts])
        for start in starts:
            stream.seek(start)
            digest.update(stream.read(BLOCK))


def _starts(file: Path, size: int) -> list[int]:
    """Where the blocks of a large file begin."""
    if file.suffix != ".safetensors":
        return [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, SMALL)))
    ends = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    places = {8 + length + at for start, end in ends for at in (start, (start + end) // 2)}
    return [*range(0, 8 + length, BLOCK), *sorted(places)]
