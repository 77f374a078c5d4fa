"""A run directory in a bucket: a directory on this machine, where all happens, and its last whole state in the bucket.

`.run/head.json` names the objects that hold every file. It is replaced by compare-and-swap alone, and the objects are
written before it and never again: so the bucket holds one state of the run, whole, whatever is killed when. The head
also says who writes: a process beats it every few seconds, and whoever finds it still for a lifetime of its own clock
takes it over. One that was stopped meanwhile finds its next swap refused. The files of a run that has finished have
their own names.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rlhf_jax.config import to_dict
from rlhf_jax.config.functions import flat, replace
from rlhf_jax.errors import UserError, call_it, reason, tell
from rlhf_jax.hosts import buckets
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.json_text import JsonObject, to_json
from rlhf_jax.runs.directory import CHECKPOINTS, CONFIG, METRICS, RECORD, SUMMARY

HIDDEN, HEAD = ".run", ".run/head.json"
BEAT, LIFETIME, PASS = 15.0, 60.0, 30.0
"""Seconds between signs of life, without one until somebody else may take over, and between looks at what is new."""

LEFT = ("model", "value_model", "tensorboard", "profile")
"""What is not needed to go on, and stays in the bucket alone."""

MOST_PARTS = 64
"""Objects that a file which is appended to may consist of."""

UNDER_WAY = ("writing-", "deleting-", ".")
"""How names begin of what is no whole thing yet, or no more."""


class Sent(NamedTuple):
    """What the bucket holds of a file.

    Attributes:
        mark: time of the last change, size and inode of the file.
        size: bytes that were sent.
        digest: of these.
    """

    mark: tuple[int, int, int]
    size: int
    digest: bytes


class Twin(contextlib.AbstractContextManager["Twin"]):
    """Holds a run directory of a bucket for this process.

    Attributes:
        place: the directory on this machine, with what the bucket has of the run.
        lost: who has taken over; empty while nobody has.
    """

    def __init__(self, url: str, *, fresh: bool = False):
        """Take it over and fetch what is there, which `fresh` leaves out.

        Raises:
            UserError: another process holds it, or the bucket cannot be read or written.
        """
        self.url, self.lost = url.rstrip("/"), ""
        self._at, self._id, self._count = f"{self.url}/{HEAD}", uuid.uuid4().hex, 0
        self._lock, self._pushing, self._over = threading.Lock(), threading.Lock(), threading.Event()
        self._sent: dict[str, Sent] = {}
        self._head: JsonObject
        self._generation: bytes | None
        with said(self.url):
            self._take()
            self.place = Path(os.path.realpath(tempfile.mkdtemp(prefix="rlhf-jax-run-")))
            call_it(str(self.place), self.url)
            self._left = () if fresh else LEFT
            try:
                if not fresh:
                    self._fetch()
            except BaseException:
                with contextlib.suppress(OSError):
                    self._swap(holder="")
                shutil.rmtree(self.place, ignore_errors=True)
                raise
        self._threads = [
            threading.Thread(target=self._again, args=(every, what), name="bucket", daemon=True)
            for every, what in ((BEAT, self._swap), (PASS, self.push))
        ]
        for thread in self._threads:
            thread.start()

    def _take(self) -> None:
        seen: bytes | None = None
        since = time.monotonic()
        while True:
            found = buckets.read(self._at)
            head: JsonObject = json.loads(found.data) if found else {"epoch": 0, "holder": "", "beat": 0, "files": {}}
            if not head["holder"] or (found and found.generation == seen and time.monotonic() - since >= LIFETIME):
                break
            if found and found.generation != seen:
                if seen is not None:
                    raise UserError(f"{self.url} is being written by {head['holder']}; stop that one first")
                tell(f"{self.url} was being written by {head['holder']}; waiting {LIFETIME:g} s for a sign of life")
                seen, since = found.generation, time.monotonic()
            time.sleep(BEAT / 3)
        self._generation = found.generation if found else None
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        self._head = {**head, "epoch": head["epoch"] + 1, "holder": holder, "id": self._id}
        if not self._swap():
            raise UserError(f"{self.url} was just taken by {self.lost}; stop that one first")
        kept = self._objects(self._head)
        for name in set(buckets.below(f"{self.url}/{HIDDEN}")) - {HEAD.partition("/")[2]}:
            if f"{HIDDEN}/{name}" not in kept:
                buckets.delete(f"{self.url}/{HIDDEN}/{name}")  # of a state that was never whole

    def _objects(self, head: JsonObject) -> set[str]:
        return {name for parts in head["files"].values() for name, _ in parts}

    def _swap(self, **changes: Any) -> bool:
        """Replace the head, changed or with another beat alone; whether this process still holds it."""
        with self._lock:
            while not self.lost:
                head = {**self._head, **changes, "beat": self._head["beat"] + 1}
                generation = buckets.swap(self._at, to_json(head).encode(), self._generation)
                if generation is not None:
                    self._head, self._generation = head, generation
                    return True
                found = buckets.read(self._at)
                there = json.loads(found.data) if found else {}
                if found is None or there.get("id") != self._id:
                    self.lost = there.get("holder") or "another process, which has ended"
                else:  # an earlier swap came through, but its reply was lost
                    self._generation = found.generation
        return False

    def _fetch(self) -> None:
        for path, parts in self._head["files"].items():
            target = self.place / path
            if path.split("/")[0] in LEFT or not target.resolve().is_relative_to(self.place):
                continue
            found = [buckets.read(f"{self.url}/{name}") for name, _ in parts]
            data = b"".join(each.data for each in found if each)
            if None in found or len(data) != sum(size for _, size in parts):
                tell(f"{self.url}/{path}: not all of it is there")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            self._sent[path] = Sent(mark_of(target), len(data), digest_of(data))

    def _again(self, every: float, what: Callable[[], object]) -> None:
        """Do something every so many seconds, until the end or until another process has taken over."""
        while not self._over.wait(every):
            with contextlib.suppress(OSError):  # the next time, or at the end, where it is said
                what()
            if self.lost:
                tell(f"{self.url} was taken over by {self.lost}, which had not heard of this process; stopping")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _files(self) -> Iterator[str]:
        """Paths of all whole files below the directory: checkpoints first, whose lines are in the files by then."""
        for top in sorted(self.place.iterdir(), key=lambda path: path.name != CHECKPOINTS):
            for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
                below = path.relative_to(self.place)
                if path.is_file() and not any(part.startswith(UNDER_WAY) for part in below.parts):
                    yield str(below)

    def push(self, *, finished: bool = False) -> None:
        """Have the bucket hold what the directory holds now; a run that has `finished` under the files' own names.

        Raises:
            OSError: the bucket holds what it held before.
        """
        with self._pushing:  # the thread and whoever holds the directory take turns
            self._push(finished)

    def _push(self, finished: bool) -> None:
        before = self._head["files"]
        if finished and not self._swap():  # the files' own names are written by the holder alone
            return
        for _ in range(9):  # a checkpoint may go while it is read
            with contextlib.suppress(FileNotFoundError):
                files, sent = self._uploaded(before, finished)
                break
        else:
            return
        if files != before and self._swap(files=files):
            self._sent = sent
            for name in self._objects({"files": before}) - self._objects({"files": files}):
                buckets.delete(f"{self.url}/{name}")

    def _uploaded(self, before: JsonObject, finished: bool) -> tuple[JsonObject, dict[str, Sent]]:
        """path -> [object, size] of its parts, after what is new was written; and what was sent."""
        paths = list(self._files())
        left = set(self._left) - {path.split("/")[0] for path in paths}
        files = {path: parts for path, parts in before.items() if path.split("/")[0] in left}
        sent: dict[str, Sent] = {}
        for path in sorted(paths, key=lambda path: path == "model/config.json"):  # without which it is no model
            old, parts, mark = self._sent.get(path), before.get(path), mark_of(self.place / path)
            own = finished and not path.startswith(CHECKPOINTS)
            if old and parts and mark == old.mark and (not own or parts[0][0] == path):
                files[path], sent[path] = parts, old
                continue
            data = (self.place / path).read_bytes()
            data = data[: data.rfind(b"\n") + 1] if path.endswith(".jsonl") else data
            kept, tail = [], data
            if old and parts and len(parts) < MOST_PARTS and not own and digest_of(data[: old.size]) == old.digest:
                kept, tail = parts, data[old.size :]
            files[path] = [*kept, self._put(path, tail, own)] if tail or not kept else kept
            sent[path] = Sent(mark, len(data), digest_of(data))
        return files, sent

    def _put(self, path: str, data: bytes, own: bool) -> list[str | int]:
        self._count += 1
        name = path if own else f"{HIDDEN}/{self._head['epoch']:06d}-{self._count:06d}-{Path(path).name}"
        buckets.write(f"{self.url}/{name}", data)
        return [name, len(data)]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(finished=error is None and (self.place / SUMMARY).is_file())

    def close(self, *, finished: bool = False) -> None:
        """Have the bucket hold the last state, and others have it; of an empty directory nothing is left there.

        Raises:
            UserError: that failed, or another process has taken over.
        """
        self._over.set()
        for thread in self._threads:
            thread.join()
        if not self.lost:
            try:
                self.push(finished=finished)
                if self._swap(holder="") and not self._head["files"]:
                    buckets.delete(self._at)
            except OSError as failed:
                raise UserError(
                    f"{self.url}: what came last could not be written ({reason(failed)}); it is in "
                    f"{shlex.quote(str(self.place.parent))}/{self.place.name}, and the bucket has what was before"
                ) from failed
        shutil.rmtree(self.place, ignore_errors=True)
        self.check_held()

    def check_held(self) -> None:
        """Raise a UserError if another process has taken over, as far as is known."""
        if self.lost:
            raise UserError(f"{self.url} was taken over by {self.lost}; what this process did since then is not kept")


def mark_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written: its time, size and inode."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def digest_of(data: bytes) -> bytes:
    """16 bytes that tell contents apart."""
    return hashlib.blake2b(data, digest_size=16).digest()


@contextlib.contextmanager
def said(url: str) -> Iterator[None]:
    """Around what is asked of a bucket: a refusal becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{getattr(error, 'filename', None) or url}: {reason(error)}") from error
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{url}/{HEAD} is broken ({reason(error)}); choose another directory") from error


def glance(url: str) -> tuple[Path, str]:
    """A copy of what says how a run in a bucket stands, and who holds it (empty: nobody).

    Raises:
        UserError: the bucket cannot be read.
    """
    place = Path(os.path.realpath(tempfile.mkdtemp(prefix="rlhf-jax-run-")))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    call_it(str(place), url)
    with said(url):
        found = buckets.read(f"{url}/{HEAD}")
        head: JsonObject = json.loads(found.data) if found else {"holder": "", "files": {}}
        for name in (RECORD, CONFIG, METRICS):
            parts = [buckets.read(f"{url}/{part}") for part, _ in head["files"].get(name, [])]
            if parts:
                (place / name).write_bytes(b"".join(part.data for part in parts if part))
    return place, head["holder"]


def runs_below(url: str) -> list[str]:
    """Where the runs at or below a place of a bucket are.

    Raises:
        UserError: the bucket cannot be read.
    """
    with said(url):
        names = [name for name in buckets.below(url) if f"/{name}".endswith(f"/{HEAD}")]
    return [f"{url}/{name.removesuffix(HEAD)}".rstrip("/") for name in names]


def in_buckets(run: Callable[..., Any]) -> Callable[..., Any]:
    """A stage whose run.output_dir may be in a bucket."""

    @functools.wraps(run)
    def kept(config: Any, **given: Any) -> Any:
        url = config.run.output_dir.rstrip("/")
        if not in_bucket(url):
            return run(config, **given)
        from rlhf_jax.hosts.processes import several  # imports jax

        if several():
            raise UserError(f"run.output_dir {url}: several processes need a directory that all hosts share; name one")
        for option, value in flat(to_dict(config)):
            if isinstance(value, str) and value.rstrip("/").startswith(f"{url}/"):
                raise UserError(
                    f"{option} {value} is part of the run that would be replaced; choose another run.output_dir"
                )
        with Twin(url, fresh=config.run.overwrite) as twin:
            return run(replace(config, run__output_dir=str(twin.place)), **given)

    return kept
