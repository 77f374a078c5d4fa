"""A run directory in a bucket: a directory on this machine, where all happens, and its last whole state in the bucket.

`.run/head.json` names the objects that hold every file. It is replaced by compare-and-swap alone, and the objects are
written before it and never again: so the bucket holds one state of the run, whole, whatever is killed when. The head
also says who writes: a process beats it every few seconds, and whoever finds it still for a lifetime of its own clock
takes it over. One that was stopped meanwhile finds its next swap refused. The files of a run that has finished have
their own names.
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import os
import shlex
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError, call_it, reason, tell
from rlhf_jax.hosts import buckets, interrupts
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.json_text import JsonObject, from_json, to_json
from rlhf_jax.runs.directory import CHECKPOINTS, SUMMARY, check_inside, mark_void
from rlhf_jax.runs.heads import put_there, said
from rlhf_jax.runs.manifests import is_chunk
from rlhf_jax.runs.pieces import (
    HEAD,
    HIDDEN,
    LONGEST,
    PASS,
    Copy,
    Parts,
    Piece,
    Sent,
    digest_of,
    mark_of,
    together,
)

BEAT, LIFETIME = 15.0, 60.0
"""Seconds between signs of life, and without one until somebody else may take over."""

LEFT = ("model", "value_model")
"""What is not needed to go on and made as a whole, so that it stays in the bucket alone."""

MOST_PARTS = 64
"""Objects that a file which is appended to may consist of."""

UNDER_WAY = ("writing-", "deleting-", ".")
"""How names begin of what is no whole thing yet, or no more."""


class Twin(Copy):
    """Holds a run directory of a bucket for this process.

    Attributes:
        place: the directory on this machine, with what the bucket has of the run.
        lost: who has taken over; empty while nobody has.
    """

    def __init__(self, url: str, *, fresh: bool = False, count: int = 1):
        """Take it over and fetch what is there, which `fresh` leaves out; `count` is that of the run's processes.

        Raises:
            UserError: another process holds it, it was put there by other means and is not to be left out, or the
                bucket cannot be read or written.
        """
        super().__init__(url, 0, count)
        self.lost = ""
        self._at, self._id, self._lock = f"{self.url}/{HEAD}", uuid.uuid4().hex, threading.Lock()
        self._long = threading.Lock()
        self._head: JsonObject
        self._generation: bytes | None
        with said(self.url):
            self._take(fresh=fresh)
            self._open()
            self._left = () if fresh else LEFT
            try:
                if not fresh:
                    later = lambda path: path.startswith(CHECKPOINTS) and is_chunk(path)  # noqa: E731
                    self.bring("", lambda path: path.split("/")[0] not in LEFT and not later(path))
            except BaseException:
                with contextlib.suppress(OSError):
                    self._swap(holder="")
                self._end()
                self._leave()
                raise
        self._begin((BEAT, self._swap), (PASS, self.push))

    def files(self) -> JsonObject:
        files: JsonObject = self._head["files"]
        return files

    def has(self, step: int) -> bool:
        return self.count == 1 or any(path.startswith(f"{CHECKPOINTS}/{step:08d}/") for path in self.files())

    def _take(self, *, fresh: bool) -> None:
        if not fresh and (copied := put_there(self.url)):
            raise UserError(
                f"{self.url} holds {copied}, but no {HEAD}: it was copied there, and nothing goes on with that; "
                "choose another place, or delete it"
            )
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
        self.epoch = self._head["epoch"]
        if not self._swap():
            raise UserError(f"{self.url} was just taken by {self.lost}; stop that one first")
        kept = self._objects(self._head)
        there = {f"{HIDDEN}/{name}" for name in buckets.below(f"{self.url}/{HIDDEN}")} - {HEAD}
        together(buckets.delete, [f"{self.url}/{name}" for name in there - kept])  # of a state that was never whole

    def _objects(self, head: JsonObject) -> set[str]:
        return {part[0] for parts in head["files"].values() for part in parts}

    def _swap(self, **changes: Any) -> bool:
        """Replace the head, changed or with another beat alone; whether this process still holds it."""
        with self._lock:
            while not self.lost:
                head = {**self._head, **changes, "beat": self._head["beat"] + 1}
                data = to_json(head).encode()
                if (generation := buckets.swap(self._at, data, self._generation)) is None:
                    found = buckets.read(self._at)
                    there = json.loads(found.data) if found else {}
                    if found is None or there.get("id") != self._id:
                        self.lost = there.get("holder") or "another process, which has ended"
                        break
                    self._generation = found.generation  # a swap came through, but its reply was lost:
                    generation = found.generation if found.data == data else None  # this one, or an earlier one
                if generation is not None:
                    self._head, self._generation = head, generation
                    return True
        return False

    def _again(self, every: float, what: Callable[[], object]) -> None:
        def once() -> None:
            what()
            if self.lost:
                tell(f"{self.url} was taken over by {self.lost}, which had not heard of this process; stopping")
                os.kill(os.getpid(), signal.SIGTERM)
                self._over.set()

        super()._again(every, once)

    def _files(self) -> Iterator[str]:
        """Paths of all whole files below the directory: checkpoints first, whose lines are in the files by then."""
        for top in sorted(self.place.iterdir(), key=lambda path: path.name != CHECKPOINTS):
            for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
                below = path.relative_to(self.place)
                names = below.parts[:2] if top.name == CHECKPOINTS else below.parts  # orbax has files named .zarray
                if path.is_file() and not any(name.startswith(UNDER_WAY) for name in names):
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
                files, sent, letters = self._uploaded(before, finished)
                break
        else:
            return
        if files != before and self._swap(files=files):
            self._sent = sent
            gone = self._objects({"files": before}) - self._objects({"files": files})
            with contextlib.suppress(OSError):  # what the head does not name the next holder deletes
                together(buckets.delete, [*(f"{self.url}/{name}" for name in gone), *letters])

    def _uploaded(self, before: JsonObject, finished: bool) -> tuple[JsonObject, dict[str, Sent], list[str]]:
        """path -> `Parts` after what is new was written, what was sent, and the letters that were read."""
        files, letters, waits = self._kept(before)
        sent: dict[str, Sent] = {}
        paths = [path for path in self._files() if not path.startswith(waits)]
        last = [path for path in paths if path == "model/config.json"]  # without which it is no model
        for some in ([path for path in paths if path not in last], last):
            done = together(lambda path: self._upload(path, before.get(path), finished), some)
            files |= {path: parts for path, (parts, _) in done.items()}
            sent |= {path: known for path, (_, known) in done.items()}
        return files, sent, letters

    def _upload(self, path: str, parts: Parts | None, finished: bool) -> tuple[Parts, Sent]:
        """What the bucket has of a file, of which it had `parts`, after what is new was written."""
        old, mark = self._sent.get(path), mark_of(self.place / path)
        in_checkpoint = path.startswith(CHECKPOINTS)
        own = finished and not in_checkpoint
        if old and parts and mark == old.mark and (not own or parts[0][0] == path):
            return parts, old
        if in_checkpoint:
            return self._put_file(path), Sent(mark, mark[1], b"")
        with self._long if mark[1] > LONGEST else contextlib.nullcontext():
            return self._upload_lines(path, mark, parts or [], old or Sent(mark, 0, b""), own)

    def _upload_lines(
        self, path: str, mark: tuple[int, int, int], parts: Parts, old: Sent, own: bool
    ) -> tuple[Parts, Sent]:
        """`_upload` of a file that may have grown since `old` was sent, or is to be one object of its `own` name."""
        data = (self.place / path).read_bytes()
        data = data[: data.rfind(b"\n") + 1] if path.endswith(".jsonl") else data
        kept: Parts = []
        tail = data
        if parts and len(parts) < MOST_PARTS and not own and digest_of(data[: old.size]) == old.digest:
            kept, tail = parts, data[old.size :]
        if tail or not kept:
            kept = [*kept, self._put(path, tail, own=own)]
        return kept, Sent(mark, len(data), digest_of(data))

    def _kept(self, before: JsonObject) -> tuple[JsonObject, list[str], tuple[str, ...]]:
        """Files that are not all here but stay or come: of what `LEFT` names, and of the checkpoints that are here.

        And the letters in which other processes said so, and where checkpoints begin that wait for one.
        """
        left = {name for name in self._left if not (self.place / name).exists()}
        files = {path: parts for path, parts in before.items() if path.split("/")[0] in left}
        letters, waits = [], []
        folder = self.place / CHECKPOINTS
        for name in sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []:
            if name.startswith(UNDER_WAY):
                continue
            below, was = f"{CHECKPOINTS}/{name}/", f"{CHECKPOINTS}/{name.partition('.')[0]}/"
            known = {path: parts for path, parts in before.items() if path.startswith(below)}
            if known or ".damaged" in name:  # which had another name before
                known = known or {
                    below + path.removeprefix(was): parts for path, parts in before.items() if path.startswith(was)
                }
                files |= known
                continue
            asked = [self._letter(int(name), number) for number in range(1, self.count) if name.isdigit()]
            told = [buckets.read(letter) for letter in asked]
            for each in told:
                files |= from_json(each.data) if each else {}
            letters += asked
            waits += [] if all(told) else [below]
        return {path: files[path] for path in files if not path.startswith(tuple(waits))}, letters, tuple(waits)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(finished=error is None and (self.place / SUMMARY).is_file())

    def close(self, *, finished: bool = False) -> None:
        """Have the bucket hold the last state, and others have it; of an empty directory nothing is left there.

        Raises:
            UserError: that failed, or another process has taken over.
        """
        self._end()
        if not self.lost:
            try:
                self.push(finished=finished)
                if self._swap(holder="") and not self._head["files"]:
                    with contextlib.suppress(OSError):  # it says that nobody holds anything
                        buckets.delete(self._at)
            except OSError as failed:
                interrupts.UNFINISHED.discard(self.place)
                call_it(str(self.place), str(self.place))  # from here on it has its own name
                raise UserError(
                    f"{self.url}: what came last could not be written ({reason(failed)}); it is in "
                    f"{shlex.quote(str(self.place))}, and the bucket has what was before"
                ) from failed
        self._leave()
        self.check_held()

    def check_held(self) -> None:
        """Raise a UserError if another process has taken over, as far as is known."""
        if self.lost:
            raise UserError(f"{self.url} was taken over by {self.lost}; what this process did since then is not kept")


def void(output: str) -> None:
    """`directory.mark_void`, of a run in a bucket too, of which nothing else stays there."""
    if not in_bucket(output):
        return mark_void(Path(output))
    with Twin(output, fresh=True) as twin:
        mark_void(twin.place)


def hold_copy(url: str, *, fresh: bool) -> Copy:
    """This process's copy of a run, which process 0 takes over; all of its processes call it.

    Raises:
        UserError: what `Twin` says, or another process cannot read the bucket.
    """
    from rlhf_jax.hosts import processes  # imports jax

    number, count = processes.share()
    held: list[Twin] = []

    def take() -> int:
        held.append(Twin(url, fresh=fresh, count=count))
        return held[0].epoch

    epoch = processes.from_first(take)
    copy: Copy | None = None
    wrong = ""
    try:
        copy = held[0] if held else Piece(url, number, count, epoch)
    except UserError as error:
        wrong = str(error)
    (failed,) = processes.any_of([bool(wrong)])
    if copy is None or failed:
        if copy is not None:
            copy.__exit__(None, None, None)
        raise UserError(wrong or f"{url}: not all processes can read it; see what the others say")
    return copy


def in_buckets(run: Callable[..., Any], *, option: str = "run.output_dir") -> Callable[..., Any]:
    """A command whose directory, which `option` names, may be in a bucket."""

    @functools.wraps(run)
    def kept(config: Any, **given: Any) -> Any:
        url, of_a_run = operator.attrgetter(option)(config), option.startswith("run.")
        if not in_bucket(url):
            return run(config, **given)
        url = buckets.SCHEME + "/".join(buckets.split(url))
        if of_a_run:
            check_inside(config, lambda value: value.rstrip("/").startswith(f"{url}/"))
        with hold_copy(url, fresh=of_a_run and config.run.overwrite) as copy:
            if copy.count > 1 and not of_a_run:
                raise UserError(f"{option} {url}: several processes need a directory that all hosts share; name one")
            return run(replace(config, **{option.replace(".", "__"): str(copy.place)}), **given)

    return kept
