"""What a process has on its machine of a run in a bucket: a directory, filled from the bucket as files are needed.

Process 0 has the `Twin` of the run. Each of the others has a `Piece`: its own files of every checkpoint, and of those
of others what its devices are to hold. It puts its files into objects, and says which in a letter that only process 0
opens: a checkpoint is named in the head, by process 0, once the letters of all are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from rlhf_jax.errors import call_it, tell
from rlhf_jax.hosts import buckets, interrupts
from rlhf_jax.hosts.json_text import JsonObject, from_json, to_json
from rlhf_jax.runs.directory import CHECKPOINTS, steps_in
from rlhf_jax.runs.manifests import manifest_of

Value = TypeVar("Value")

HIDDEN, HEAD = ".run", ".run/head.json"
PASS = 30.0
"""Seconds between looks at what is new."""

FILES, SIZE, LONGEST = 8, 16, 64 << 20
"""Files that are written or read at a time, bytes of a digest, and most of an object of a checkpoint."""

Parts = list[list[Any]]
"""[object, size, digest] of each of the objects that make up a file."""


class Sent(NamedTuple):
    """What the bucket holds of a file.

    Attributes:
        mark: time of the last change, size and inode of the file.
        size: bytes that were sent.
        digest: of these; empty if it is not known.
    """

    mark: tuple[int, int, int]
    size: int
    digest: bytes


_copies: dict[Path, Copy] = {}


def copy_at(directory: Path) -> Copy | None:
    """The copy that a directory of this machine is; None if it is no run of a bucket."""
    return _copies.get(directory)


class Copy(contextlib.AbstractContextManager["Copy"]):
    """A directory of this machine that stands for a run in a bucket.

    Attributes:
        url: of the run.
        place: the directory.
        number: of this process, from 0.
        count: how many processes there are.
        epoch: how often a process had taken the run over when this one's did.
    """

    def __init__(self, url: str, number: int, count: int):
        buckets.split(url)
        self.url, self.number, self.count = url.rstrip("/"), number, count
        self.epoch, self._written = 0, itertools.count(1)
        self._pushing, self._over = threading.Lock(), threading.Event()
        self._sent: dict[str, Sent] = {}
        self._threads: list[threading.Thread] = []

    def _open(self) -> None:
        self.place = interrupts.temporary("rlhf-jax-run-")
        call_it(str(self.place), self.url)
        _copies[self.place] = self

    def files(self) -> JsonObject:
        """Path -> `Parts` of all files that the bucket has of the run."""
        raise NotImplementedError

    def push(self) -> None:
        """Have the bucket hold what is whole in the directory.

        Raises:
            OSError: it does not.
        """
        raise NotImplementedError

    def has(self, step: int) -> bool:
        """Whether the bucket has what this process made of a checkpoint."""
        raise NotImplementedError

    def bring(self, below: str, wanted: Callable[[str], bool]) -> None:
        """Fetch the files below `below` that are wanted (by their paths after that) and not here.

        Raises:
            OSError: they cannot be read.
        """
        missing = {}
        for path, parts in self.files().items():
            target = self.place / path
            within = path.startswith(below) and target.resolve().is_relative_to(self.place)
            if within and wanted(path[len(below) :]) and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                missing[path] = parts
        with self._pushing:  # else half a file is sent in the place of the whole one
            fetched = together(lambda path: fetch(self.url, missing[path], self.place / path), missing)
            for path in fetched:
                mark = mark_of(self.place / path)
                self._sent[path] = Sent(mark, mark[1], fetched[path])
        for path, digest in fetched.items():
            if not digest:
                tell(f"{self.url}/{path}: not all of it is there as it was written; what comes before is used")

    def _put(self, path: str, data: bytes, *, own: bool = False) -> list[Any]:
        """Write an object of a name that is not used again, or of the file's `own`; what `Parts` has of it."""
        number = f"{self.epoch:06d}-{self.number:03d}-{next(self._written):06d}"
        name = path if own else f"{HIDDEN}/{number}-{Path(path).name}"
        buckets.write(f"{self.url}/{name}", data)
        return [name, len(data), digest_of(data).hex()]

    def _put_file(self, path: str) -> Parts:
        """Write a file of a checkpoint as objects of at most `LONGEST` bytes each, one of them in memory at a time."""
        with open(self.place / path, "rb") as file:
            first = self._put(path, file.read(LONGEST))
            return [first, *(self._put(path, data) for data in iter(lambda: file.read(LONGEST), b""))]

    def _letter(self, step: int, number: int) -> str:
        """Where process `number` says what it has put into the bucket of a checkpoint."""
        return f"{self.url}/{HIDDEN}/{self.epoch:06d}-{number:03d}-of-{step:08d}.json"

    def _begin(self, *work: tuple[float, Callable[[], object]]) -> None:
        """Do things every so many seconds, in threads."""
        self._threads = [threading.Thread(target=self._again, args=each, name="bucket", daemon=True) for each in work]
        for thread in self._threads:
            thread.start()

    def _again(self, every: float, what: Callable[[], object]) -> None:
        while not self._over.wait(every):
            with contextlib.suppress(OSError):  # the next time, or at the end, where it is said
                what()

    def _end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        _copies.pop(self.place, None)

    def _leave(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        interrupts.UNFINISHED.discard(self.place)


class Piece(Copy):
    """What one of several processes has, which is not the first."""

    def __init__(self, url: str, number: int, count: int, epoch: int):
        """`epoch` is that of the head which process 0 has taken over.

        Raises:
            UserError: the bucket cannot be read.
        """
        super().__init__(url, number, count)
        self.epoch, self._told = epoch, set[int]()
        with buckets.asked(self.url):
            self.files()
        self._open()
        self._begin((PASS, self.push))

    def files(self) -> JsonObject:
        found = buckets.read(f"{self.url}/{HEAD}")
        return from_json(found.data)["files"] if found else {}

    def has(self, step: int) -> bool:
        return step in self._told

    def push(self) -> None:
        with self._pushing:
            for step in steps_in(self.place / CHECKPOINTS):
                below = f"{CHECKPOINTS}/{step:08d}"
                manifest = f"{below}/{manifest_of(self.number)}"
                if step in self._told or manifest in self._sent:  # which came from the bucket
                    continue
                try:
                    mine = [f"{below}/{name}" for name in from_json((self.place / manifest).read_text())["files"]]
                    told = together(self._put_file, [*mine, manifest])
                except FileNotFoundError:  # it was deleted meanwhile
                    continue
                buckets.write(self._letter(step, self.number), to_json(told).encode())
                self._told.add(step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end()
        self._leave()


def together(do: Callable[[str], Value], names: Iterable[str]) -> dict[str, Value]:
    """Name -> what `do` returns of it, for a few names at a time."""
    listed = list(names)
    with ThreadPoolExecutor(FILES) as pool:
        return dict(zip(listed, pool.map(do, listed), strict=True))


def fetch(url: str, parts: Parts, target: Path) -> bytes:
    """Write the objects that make up a file one after another, and return the digest of all.

    If one is missing or is not what was put there, what comes before it is written, and the digest is empty: a file
    that grows was once just that.

    Raises:
        OSError: they cannot be read; there is no file then.
    """
    try:
        with open(target, "wb") as file:
            whole = hashlib.blake2b(digest_size=SIZE)
            for name, size, digest in parts:
                begin, one = file.tell(), hashlib.blake2b(digest_size=SIZE)
                try:
                    for piece in buckets.stream(f"{url}/{name}", size):
                        file.write(piece)
                        one.update(piece)
                        whole.update(piece)
                    same = one.hexdigest() == digest
                except buckets.Gone:
                    same = False
                if not same:
                    file.truncate(begin)
                    return b""
            return whole.digest()
    except OSError:
        target.unlink(missing_ok=True)
        raise


def mark_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written: its time, size and inode."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def digest_of(data: bytes) -> bytes:
    """A few bytes that tell contents apart."""
    return hashlib.blake2b(data, digest_size=SIZE).digest()
