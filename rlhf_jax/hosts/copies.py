"""Copies on this machine of what is read from a bucket, for as long as the process runs.

Small files are copied whole. Weights are files with holes: `have` fetches the ranges that are about to be read, so
that a host of many takes only what its own devices hold.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rlhf_jax.errors import call_it
from rlhf_jax.hosts import buckets, interrupts

WANTED = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Endings of the files of a model directory that are copied whole."""

WEIGHTS, PICKLES = ".safetensors", ".bin"
"""Endings of those that are fetched range by range, and of those whose names alone count."""

OF_A_MODEL = (*WANTED, WEIGHTS)
"""Endings of all files that make up a model directory."""

BESIDE = ("adapter", "members")
"""Directories in one that are of the same model."""

TEMPLATES = "additional_chat_templates"
"""The one of chat templates by name, which a tokenizer has beside its first (transformers writes it)."""

DATASET = "dataset_info.json"
"""What makes a directory one that TFDS prepared, of which all is copied."""

WEIGHTS_OF_A_MODEL = re.compile(
    r"(model|pytorch_model|adapter_model)\b.*\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
)
TEXT_OF_A_MODEL = re.compile(
    r"(tokenizer\w*|special_tokens_map|added_tokens|vocab)\.json|(vocab|merges)\.txt|.*chat_template.*|.*\.(model|tiktoken)"
)
"""Names that go when another model is written where one lies, its tokenizer's among them; all else stays."""

HEADS = ("config.json", DATASET)
"""Files without which a directory is no model and no dataset."""

LONGEST_HEADER = 100 << 20
"""Bytes of the header of a safetensors file, as that format bounds them."""

BLOCK, PIECE = 1 << 16, 16 << 20
"""Bytes that are fetched as a whole, and most of them in one request."""


@dataclass
class Holes:
    """A copy that is not whole.

    Attributes:
        url: where the object is.
        generation: which version of it is being read.
        header: bytes at the beginning that are always here.
        here: for every block whether it is here.
    """

    url: str
    generation: bytes
    header: int
    here: bytearray


_whole: dict[str, bytes] = {}  # url -> generation of the copy
_holes: dict[Path, Holes] = {}


@functools.cache
def _home() -> Path:
    folder = interrupts.temporary("rlhf-jax-")
    call_it(f"{folder}/", buckets.SCHEME)
    return folder


def place_of(url: str) -> Path:
    """Where the copy of an object or directory lies."""
    return _home().joinpath(*buckets.split(url))


def local(url: str) -> Path:
    """Where on this machine an object is to be read, or a directory: of that what belongs to a model or a dataset.

    What was copied before is asked for again only if it has changed.

    Raises:
        UserError: there is neither, or it cannot be read; says why.
    """
    url = buckets.trimmed(url)
    with buckets.asked(url):
        if _copied(url):
            return place_of(url)
        names = buckets.below(url)
        if not names:
            raise buckets.nothing(url)
        _copy_directory(url, names)
        return place_of(url)


def local_tree(url: str, wanted: Callable[[str], bool]) -> Path:
    """Where on this machine the object `url` is, or those below whose names are wanted; weights as files with holes.

    Raises:
        UserError: they cannot be read; says why.
    """
    with buckets.asked(url):
        names, place = [name for name in buckets.below(url) if wanted(name)], place_of(url)
        if not names:
            _copied(url)
        for gone in {path for path in place.rglob("*") if path.is_file()} - {place / name for name in names}:
            gone.unlink()
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (_copy_header if name.endswith(WEIGHTS) else _copied)(f"{url}/{name}")
    return place


def _copied(url: str) -> bool:
    """Whether there is such an object, whose copy is then whole and its newest version."""
    place, known = place_of(url), _whole.get(url)
    found = buckets.read(url, unless=known)
    if found is not None and found.generation != known:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(found.data)
        _whole[url] = found.generation
    return found is not None


def _copy_directory(url: str, names: list[str]) -> None:
    folder, whole = place_of(url), DATASET in names
    wanted = [name for name in names if whole or "/" not in name or name.startswith(f"{TEMPLATES}/")]
    folder.mkdir(parents=True, exist_ok=True)
    there = [path for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")) if path.is_file()]
    for gone in set(there) - {folder / name for name in wanted}:
        gone.unlink()
    for name in wanted:
        if whole or name.endswith(WANTED):
            _copied(f"{url}/{name}")
        elif name.endswith(WEIGHTS):
            _copy_header(f"{url}/{name}")
        elif name.endswith(PICKLES):
            (folder / name).touch()


def _copy_header(url: str) -> None:
    """A file as long as the object, of which the header is here; of what is no safetensors file, its beginning."""
    place = place_of(url)
    (start,) = buckets.read_parts(url, [(0, 8)])
    if (known := _holes.get(place)) is not None and known.generation == start.generation:
        return
    header = 8 + min(int.from_bytes(start.data, "little"), LONGEST_HEADER)
    (rest,) = buckets.read_parts(url, [(8, header)], of=start.generation)
    place.write_bytes(start.data + rest.data)
    try:
        tensors = [entry for name, entry in json.loads(rest.data).items() if name != "__metadata__"]
        size = header + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):  # it is said where the file is read
        return
    if size > header:
        buckets.read_parts(url, [(size - 1, size)], of=start.generation)  # else it is cut short
    os.truncate(place, size)
    _holes[place] = Holes(url, start.generation, header, bytearray(size // BLOCK + 1))


def have(file: Path, bounds: Iterable[tuple[int, int]]) -> None:
    """Have the bytes from `first` to before `last` of each of the bounds in a file, if that is a copy with holes.

    Raises:
        UserError: they cannot be read; says why.
    """
    holes = _holes.get(file)
    if holes is None:
        return
    size = os.path.getsize(file)
    wanted = {block for first, last in bounds for block in range(first // BLOCK, -(-last // BLOCK))}
    missing = sorted(block for block in wanted if not holes.here[block])
    # Neighbours come together, up to PIECE: [3, 4, 5, 9] as (3, 6) and (9, 10).
    cuts = [i for i, (a, b) in enumerate(pairwise(missing), 1) if b != a + 1 or i % (PIECE // BLOCK) == 0]
    runs = [(missing[a], missing[b - 1] + 1) for a, b in pairwise([0, *cuts, len(missing)]) if b > a]
    parts = [(first * BLOCK, min(last * BLOCK, size)) for first, last in runs]
    with buckets.asked(holes.url):
        found = buckets.read_parts(holes.url, parts, of=holes.generation)
    with open(file, "r+b") as stream:
        for (first, _), part in zip(parts, found, strict=True):
            stream.seek(first)
            stream.write(part.data)
    for block in missing:
        holes.here[block] = 1


def upload_tree(folder: Path, url: str) -> None:
    """Put all files of a directory below `url`/; what makes one a model or a dataset comes last.

    Raises:
        UserError: it was refused; says why.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with buckets.asked(url):
        for name in names:
            if name.endswith(HEADS):
                buckets.delete(f"{url}/{name}")
        for name in sorted(names, key=lambda name: name.endswith(HEADS)):
            buckets.write(f"{url}/{name}", (folder / name).read_bytes())


def of_a_model(name: str) -> bool:
    """Whether what lies in a directory by this name is of the model there, and goes when another takes its place."""
    first = name.partition("/")[0]
    return first in (*BESIDE, "config.json", "generation_config.json") or bool(
        WEIGHTS_OF_A_MODEL.fullmatch(first) or TEXT_OF_A_MODEL.fullmatch(first)
    )


def upload_model(folder: Path, url: str) -> None:
    """Put a model directory in the place of what is below `url`/: config.json, without which nothing is a model, goes
    first of the old one and comes last of the new one, so that there is never half a model.

    Raises:
        UserError: it was refused; says why.
    """
    with buckets.asked(url):
        for name in sorted(filter(of_a_model, buckets.below(url)), key=lambda name: name not in HEADS):
            buckets.delete(f"{url}/{name}")
    upload_tree(folder, url)


def release(folder: Path) -> None:
    """Give the disk back what the weights of a directory take, if that is a copy; they are fetched anew if need be."""
    for file, holes in _holes.items():
        if file.parent == folder:
            size = os.path.getsize(file)
            os.truncate(file, holes.header)
            os.truncate(file, size)
            holes.here[:] = bytes(len(holes.here))
