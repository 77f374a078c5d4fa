"""Checkpoints on disk: atomic, checked, written in the background; the only file that imports orbax.

    00000120/state/         the arrays, as orbax writes them, each process its own shards
    00000120/record.json    what the loop remembers on the host
    00000120/manifest.json  size and SHA-256 of every other file, written last

A checkpoint is made under the name writing-00000120 and renamed when it is whole and on disk, so a kill leaves the
name either absent or complete. What is found damaged all the same is renamed to 00000120.damaged, never deleted.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

from rlhf_jax.errors import UserError
from rlhf_jax.hosts import processes
from rlhf_jax.hosts.files import replace_file, sync, sync_tree, write_new
from rlhf_jax.hosts.json_text import JsonObject, from_json, to_json
from rlhf_jax.runs.directory import steps_in

Tree = TypeVar("Tree")
"""A pytree of arrays."""

Say = Callable[[str], None]
"""Tells the user a line."""

MANIFEST, RECORD, STATE = "manifest.json", "record.json", "state"
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
"""What the system says, in words, within errors that other libraries make of it."""

# What orbax logs, with tracebacks, it raises too, and `Checkpoints` says it in one line. Of a save with many arrays
# one error is raised; those of the others asyncio logs, when their tasks are collected.
ORBAX = os.path.dirname(ocp.__file__)
logging.getLogger("absl").addFilter(lambda record: not record.pathname.startswith(ORBAX))
logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and _through_orbax(record.exc_info[2])))


def _through_orbax(trace: TracebackType | None) -> bool:
    return any(frame.f_code.co_filename.startswith(ORBAX) for frame, _ in walk_tb(trace))


_say_unraisable = sys.unraisablehook


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    """A `sys.unraisablehook` that leaves out what threads of a save that failed report to its closed event loop."""
    if not (what.exc_type is RuntimeError and str(what.exc_value) == "Event loop is closed"):
        _say_unraisable(what)


sys.unraisablehook = _unraisable


class Checkpoints:
    """The checkpoints of one run. One save is under way at a time.

    Attributes:
        failure: (step, reason) of a save that failed and that nobody has taken note of yet.
        last: step of the last save that was begun.
    """

    def __init__(self, directory: Path, *, keep_last: int, keep_every: int):
        """`keep_last` newest ones stay, the multiples of `keep_every` (0: none), and the best one of each of these."""
        self.directory, self.keep_last, self.keep_every = directory.absolute(), keep_last, keep_every
        self.failure: tuple[int, str] | None = None
        self.last: int | None = None
        self._thread: threading.Thread | None = None

    def path(self, step: int) -> Path:
        """The directory of a step."""
        return self.directory / f"{step:08d}"

    def steps(self) -> list[int]:
        """Steps whose checkpoint is on disk, ascending; damaged ones that nobody has read yet count."""
        return steps_in(self.directory)

    def save(self, step: int, tree: object, record: JsonObject) -> None:
        """Copy the arrays of `tree` to the host and write them and `record` in the background.

        Waits for the save before it. When it returns the arrays may be donated. What fails ends up in `failure`.
        `record["best"]` is the step whose checkpoint must stay as long as this one does, or null.
        """
        self.wait()
        self.last = step
        writing = self.directory / f"writing-{step:08d}"
        if reason := processes.from_first(partial(begin, writing, record)):
            self._failed(step, reason)
            return
        try:
            checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            checkpointer.save(writing / STATE, args=ocp.args.PyTreeSave(tree))
        except Exception as error:  # orbax and tensorstore raise many kinds
            self._failed(step, reason_of(error))
            return
        self._thread = threading.Thread(target=self._commit, args=(step, writing, checkpointer), name="checkpoint")
        self._thread.start()

    def _commit(self, step: int, writing: Path, checkpointer: ocp.AsyncCheckpointer) -> None:
        try:
            checkpointer.close()  # waits until all is written, and raises what went wrong there
            if processes.is_first():
                write_manifest(writing)
                writing.rename(self.path(step))
                sync(self.directory)
                sync(self.directory.parent)
                self._prune()
        except Exception as error:
            self._failed(step, reason_of(error))

    def _failed(self, step: int, reason: str) -> None:
        self.failure = (step, reason)
        if processes.is_first():
            shutil.rmtree(self.directory / f"writing-{step:08d}", ignore_errors=True)

    def wait(self) -> None:
        """Until the save under way has succeeded or failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _prune(self) -> None:
        steps = self.steps()
        kept = set(steps[-self.keep_last :])
        kept |= {step for step in steps if self.keep_every and step and step % self.keep_every == 0}
        kept |= {self._best_of(step) for step in kept}
        for step in set(steps) - kept:
            going = self.directory / f"deleting-{step:08d}"
            self.path(step).rename(going)  # a kill in the middle of deleting must not leave a damaged checkpoint
            shutil.rmtree(going)

    def _best_of(self, step: int) -> int:
        """The step that holds the best weights as of `step`; `step` itself if there is no other."""
        try:
            best = self.record(step)["best"]
        except (OSError, ValueError, KeyError):  # damaged, which is found out and said when it is read
            return step
        return step if best is None else best

    def record(self, step: int) -> JsonObject:
        """What `save` was given beside the arrays."""
        return from_json((self.path(step) / RECORD).read_text())

    def newest_intact(self, say: Say) -> int | None:
        """The newest checkpoint that passes its checksums; None if none was made. Process 0 only.

        Damaged ones are set aside, and `say` is told.

        Raises:
            UserError: there are checkpoints, but all are damaged.
        """
        for leftover in [*self.directory.glob("writing-*"), *self.directory.glob("deleting-*")]:
            shutil.rmtree(leftover)
        newest = next((step for step in reversed(self.steps()) if self.holds(step, say)), None)
        if newest is None and any(self.directory.glob("*.damaged*")):
            raise UserError(
                f"{self.directory} holds damaged checkpoints only; start anew with --run.overwrite true, or put an "
                "intact copy there"
            )
        return newest

    def holds(self, step: int, say: Say) -> bool:
        """Whether there is an intact checkpoint of a step; a damaged one is set aside, `say` told. Process 0 only."""
        path = self.path(step)
        if not path.exists():
            return False
        wrong = damage(path)
        if not wrong:
            return True
        endings = (f".damaged-{i}" if i else ".damaged" for i in itertools.count())
        aside = next(place for ending in endings if not (place := Path(f"{path}{ending}")).exists())
        path.rename(aside)
        say(f"checkpoint of step {step} is damaged: {wrong}; set aside as {aside}, the one before it is used")
        return False

    def restore(self, step: int, like: Tree) -> Tree:
        """The arrays of `like` (all or a part of what was saved) as they were at `step`; `like` is freed first.

        They get the shapes, dtypes and shardings of `like`, on whatever mesh these are.

        Raises:
            UserError: the checkpoint does not hold such arrays.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        for leaf in jax.tree.leaves(like):
            leaf.delete()
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                tree: Tree = checkpointer.restore(self.path(step) / STATE, args=args)
            if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
                raise KeyError("it lacks arrays")  # orbax leaves their descriptions in their place
            return tree
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"checkpoint {self.path(step)} does not fit this run ({reason_of(error)}); continue with the version "
                "and config that wrote it"
            ) from error


def begin(writing: Path, record: JsonObject) -> str:
    """Make the directory of a new checkpoint, with its record; why that is not possible, or nothing."""
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        replace_file(writing / RECORD, to_json(record))
    except OSError as error:
        return reason_of(error)
    return ""


def reason_of(error: BaseException) -> str:
    """An exception in one line of bounded length; of an operating system error, what the system says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if code := re.search(r"os[ _]error\D{0,8}(\d+)", text):  # what tensorstore and safetensors make of one
        return os.strerror(int(code[1]))
    if words := next((words for words in map(os.strerror, OF_THE_DISK) if words in text), ""):
        return words
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


def files_of(directory: Path) -> list[Path]:
    """All files below a directory but the manifest, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)


def write_manifest(directory: Path) -> None:
    """manifest.json of all that the directory holds now, after all of it has reached the disk."""
    sync_tree(directory)
    sums = {}
    for path in files_of(directory):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sums[str(path.relative_to(directory))] = [path.stat().st_size, digest]
    write_new(directory / MANIFEST, os.O_WRONLY | os.O_CREAT, json.dumps({"files": sums}, indent=1), sync=True)
    sync(directory)


def damage(directory: Path) -> str:
    """What is wrong with the first bad file of a checkpoint; empty if it is as it was written."""
    try:
        sums = json.loads((directory / MANIFEST).read_text())["files"]
        entries = [(str(name), int(size), str(digest)) for name, (size, digest) in sums.items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if odd := {name for name, _, _ in entries} ^ {str(path.relative_to(directory)) for path in files_of(directory)}:
        return f"{min(odd)} is missing, or does not belong there"
    for name, size, digest in entries:
        try:
            with open(directory / name, "rb") as file:
                if (there := os.fstat(file.fileno()).st_size) != size:
                    return f"{name} has {there} bytes instead of {size}"
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} has changed (checksum)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""
