"""The files of a checkpoint: whether they are as they were written, and which of them hold what part of an array.

Imports no jax.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Container, Sequence
from pathlib import Path

from rlhf_jax.hosts.files import sync, sync_tree, write_new

MANIFESTS, STATE = "manifest*.json", "state"
_CHUNK = re.compile(rf"(.*/)?{STATE}/[^/]+/\d+(\.\d+)*")


def manifest_of(number: int) -> str:
    """The file of a checkpoint that lists what process `number` wrote of it, where each has a disk of its own."""
    return f"manifest-{number}.json" if number else "manifest.json"


def is_chunk(name: str) -> bool:
    """Whether a file of a checkpoint is a part of an array, of which a host of many needs a few."""
    return _CHUNK.fullmatch(name) is not None


def files_of(directory: Path) -> list[Path]:
    """All files below a directory but manifests, sorted."""
    manifests = set(directory.glob(MANIFESTS))
    return sorted(path for path in directory.rglob("*") if path.is_file() and path not in manifests)


def keep_chunks(state: Path) -> None:
    """Leave the chunks of arrays alone: all else that orbax writes process 0 has too."""
    for path in state.rglob("*"):
        if path.is_file() and not is_chunk(f"{STATE}/{path.relative_to(state)}"):
            path.unlink()


def write_manifest(directory: Path, number: int = 0) -> None:
    """The manifest of process `number`, of all that the directory holds now, after all of it has reached the disk.

    But for process 0 the record is not its own.
    """
    sync_tree(directory)
    sums = {}
    for path in files_of(directory / STATE if number else directory):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sums[str(path.relative_to(directory))] = [path.stat().st_size, digest]
    data = json.dumps({"files": sums}, indent=1)
    write_new(directory / manifest_of(number), os.O_WRONLY | os.O_CREAT, data, sync=True)
    sync(directory)


class Damaged(ValueError):
    """A manifest is missing or cannot be read."""


def listed(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Name -> (number of the process that wrote it, size, SHA-256) of every file that the manifests list.

    Raises:
        Damaged: says which is missing or broken.
    """
    found: dict[str, tuple[int, int, str]] = {}
    if not (directory / manifest_of(0)).exists():
        raise Damaged(f"{manifest_of(0)} is missing")
    for file in sorted(directory.glob(MANIFESTS)):
        try:
            number = int(file.stem.partition("-")[2] or 0)
            sums = json.loads(file.read_text())["files"]
            found |= {str(name): (number, int(size), str(digest)) for name, (size, digest) in sums.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise Damaged(f"{file.name} cannot be read") from None
    return found


def damage(directory: Path, names: Container[str] | None = None) -> str:
    """What is wrong with the first bad file of a checkpoint; empty if it is as it was written.

    With `names` only these files have to be there; others may lie elsewhere.
    """
    try:
        sums = listed(directory)
    except Damaged as error:
        return str(error)
    there = {str(path.relative_to(directory)) for path in files_of(directory)}
    wanted = {name for name in sums if names is None or name in names}
    if odd := (there - set(sums)) | (wanted - there):
        return f"{min(odd)} is missing, or does not belong there"
    for name in sorted(wanted):
        _, size, digest = sums[name]
        try:
            with open(directory / name, "rb") as file:
                if (there_are := os.fstat(file.fileno()).st_size) != size:
                    return f"{name} has {there_are} bytes instead of {size}"
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} has changed (checksum)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


Box = Sequence[tuple[int, int]]
"""Of each axis where it begins and ends."""


def chunks_of(state: Path) -> dict[str, list[int]]:
    """Name of an array -> the shape of its chunks, of arrays that are saved chunk by chunk."""
    return {file.parent.name: json.loads(file.read_text())["chunks"] for file in state.glob("*/.zarray")}


def overlapping(boxes: Sequence[Box], chunk: Sequence[int] | None) -> set[str]:
    """Names of the chunks of an array that share elements with one of the boxes; "0" of a scalar.

    An array [4, 6] in chunks [2, 3] has 0.0, 0.1, 1.0 and 1.1; the box [(0, 2), (2, 4)] shares elements with the
    first two. Without `chunk`, the shape of chunks, none: all is in files of another kind.
    """
    if chunk is None:
        return set()
    found: set[tuple[int, ...]] = set()
    for box in boxes:
        spans = (range(first // size, -(-last // size)) for (first, last), size in zip(box, chunk, strict=True))
        found |= set(itertools.product(*spans))
    return {".".join(map(str, at)) or "0" for at in found}
