"""What the bucket has of a run, seen from outside: its head, or files that have their own names."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_jax.errors import UserError, call_it, reason
from rlhf_jax.hosts import buckets, interrupts
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.json_text import JsonObject
from rlhf_jax.runs.directory import CONFIG, LOCK, METRICS, OURS, RECIPE, RECORD
from rlhf_jax.runs.pieces import HEAD, fetch


@contextlib.contextmanager
def said(url: str) -> Iterator[None]:
    """`buckets.asked`, of a head that may be broken."""
    try:
        with buckets.asked(url):
            yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{url}/{HEAD} is broken ({reason(error)}); choose another directory") from error


def glance(url: str, names: Sequence[str] = (RECORD, CONFIG, METRICS)) -> tuple[Path, str]:
    """A copy of some files of a run in a bucket, those that say how it stands, and who holds it (empty: nobody).

    Raises:
        UserError: the bucket cannot be read.
    """
    place = interrupts.temporary("rlhf-jax-run-")
    call_it(str(place), url)
    with said(url):
        found = buckets.read(f"{url}/{HEAD}")
        head: JsonObject = json.loads(found.data) if found else {"holder": "", "files": {}}
        for name in names:
            if name in head["files"]:
                fetch(url, head["files"][name], place / name)
            elif not found and (own := buckets.read(f"{url}/{name}")):  # of a stage of a quickstart
                (place / name).write_bytes(own.data)
    return place, head["holder"]


def put_there(url: str) -> str:
    """What lies at a place of a bucket under its own name, as of a run on a disk, where no process wrote a head."""
    if buckets.read(f"{url}/{HEAD}") is not None:
        return ""
    tops = {name.split("/")[0] for name in buckets.below(url)}
    return next((name for name in (*OURS, RECIPE) if name in tops and name != LOCK), "")


def runs_below(url: str) -> list[str]:
    """Where the runs at or below a place of a bucket are.

    Raises:
        UserError: the bucket cannot be read, or nothing lies there.
    """
    with said(url):
        there = buckets.below(url)
    if not there:
        raise buckets.nothing(url)
    found = {name.removesuffix(end) for end in (HEAD, RECORD) for name in there if f"/{name}".endswith(f"/{end}")}
    return sorted(f"{url}/{name}".rstrip("/") for name in found)


def begun(output: str) -> bool:
    """Whether a run has its directory, in a bucket or not."""
    return bool(buckets.there(f"{output.rstrip('/')}/{HEAD}")) if in_bucket(output) else Path(output, RECORD).exists()
