"""Checkpoints on disk: atomic, checked, written in the background; the only file that imports orbax.

    00000120/state/         the arrays, as orbax writes them, each process its own shards
    00000120/record.json    what the loop remembers on the host
    00000120/manifest.json  size and SHA-256 of every other file, written last

Of a run in a bucket each process has such a directory for itself, with its shards alone and, but for process 0, a
manifest-K.json of them; `pieces` brings them together.

A checkpoint is made under the name writing-00000120 and renamed when it is whole and on disk, so a kill leaves the
name either absent or complete. What is found damaged all the same is renamed to 00000120.damaged, never deleted.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from rlhf_jax.errors import UserError
from rlhf_jax.hosts import buckets, processes
from rlhf_jax.hosts.files import replace_file, sync
from rlhf_jax.hosts.json_text import JsonObject, from_json, to_json
from rlhf_jax.runs.directory import steps_in
from rlhf_jax.runs.manifests import (
    STATE,
    Damaged,
    chunks_of,
    damage,
    is_chunk,
    keep_chunks,
    listed,
    overlapping,
    write_manifest,
)
from rlhf_jax.runs.pieces import copy_at

Tree = TypeVar("Tree")
"""A pytree of arrays."""

Say = Callable[[str], None]
"""Tells the user a line."""

RECORD = "record.json"
ELSEWHERE = "in another process; see its output"
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
        self.copy = copy_at(directory.parent.absolute())
        self._writes = self.copy is not None or processes.is_first()
        self._options: dict[str, Any] = {}  # of orbax: how several processes write, and into which files
        if self.copy is not None:
            self._options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(primary_host=None)

    def _handler(self) -> ocp.PyTreeCheckpointHandler:
        return ocp.PyTreeCheckpointHandler(use_ocdbt=self.copy is None, **self._options)

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
        reason = begin(writing, record) if self._writes else ""
        (failed,) = processes.any_of([bool(reason)])
        if failed:
            self._failed(step, reason or ELSEWHERE)
            return
        try:
            checkpointer = ocp.AsyncCheckpointer(self._handler(), **self._options)
            checkpointer.save(writing / STATE, args=ocp.args.PyTreeSave(tree))
        except Exception as error:  # orbax and tensorstore raise many kinds
            self._failed(step, reason_of(error))
            return
        self._thread = threading.Thread(target=self._commit, args=(step, writing, checkpointer), name="checkpoint")
        self._thread.start()

    def _commit(self, step: int, writing: Path, checkpointer: ocp.AsyncCheckpointer) -> None:
        try:
            checkpointer.close()  # waits until all is written, and raises what went wrong there
            if self._writes:
                number = self.copy.number if self.copy else 0
                if number:
                    keep_chunks(writing / STATE)
                    shutil.rmtree(self.path(step), ignore_errors=True)  # of a save that failed in another process
                write_manifest(writing, number)
                writing.rename(self.path(step))
                sync(self.directory)
                sync(self.directory.parent)
                self._prune()
        except Exception as error:
            self._failed(step, reason_of(error))

    def _failed(self, step: int, reason: str) -> None:
        self.failure = (step, reason)
        if self._writes:
            shutil.rmtree(self.directory / f"writing-{step:08d}", ignore_errors=True)

    def wait(self) -> None:
        """Until the save under way has succeeded or failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def drop(self, step: int) -> None:
        """Forget a checkpoint that another process could not write its part of."""
        if self.copy is not None:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def settle(self) -> None:
        """Have the bucket, if the run is in one, hold the newest checkpoint of all processes, which all call this.

        What fails is said at the run's end, where it is tried once more.
        """
        if self.copy is None or self.copy.count == 1:
            return
        for first in (False, True):  # process 0 names what the others have written
            if processes.is_first() == first:
                with contextlib.suppress(OSError):
                    self.copy.push()
            processes.barrier("parts of checkpoints")

    def _prune(self) -> None:
        steps = self.steps()
        there = [step for step in steps if self.copy is None or self.copy.has(step)]
        kept = set(there[-self.keep_last :]) | (set(steps) - set(there))
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
        """The newest checkpoint that passes its checksums; None if none was made. All processes call it.

        Damaged ones are set aside, and `say` is told.

        Raises:
            UserError: there are checkpoints, but all are damaged.
        """
        if self._writes:
            for leftover in [*self.directory.glob("writing-*"), *self.directory.glob("deleting-*")]:
                shutil.rmtree(leftover)
        steps = processes.from_first(self.steps)
        newest = next((step for step in reversed(steps) if self.holds(step, say)), None)
        if newest is None and processes.from_first(lambda: any(self.directory.glob("*.damaged*"))):
            raise UserError(
                f"{self.directory} holds damaged checkpoints only; start anew with --run.overwrite true, or put an "
                "intact copy there"
            )
        return newest

    def holds(self, step: int, say: Say) -> bool:
        """Whether there is an intact checkpoint of a step; a damaged one is set aside, `say` told. All processes.

        Of one in a bucket each process looks at a part, which it fetches for that.
        """
        path = self.path(step)
        if not processes.from_first(path.exists):
            return False
        wrong = self._damage(step) if self._writes else ""
        (damaged,) = processes.any_of([bool(wrong)])
        if not damaged:
            return True
        if self._writes and path.exists():
            endings = (f".damaged-{i}" if i else ".damaged" for i in itertools.count())
            aside = next(place for ending in endings if not (place := Path(f"{path}{ending}")).exists())
            path.rename(aside)
            wrong = f"{wrong or ELSEWHERE}; set aside as {aside}"
        say(f"checkpoint of step {step} is damaged: {wrong}, the one before it is used")
        return False

    def _damage(self, step: int) -> str:
        if self.copy is None:
            return damage(self.path(step))
        number, count, path = self.copy.number, self.copy.count, self.path(step)
        with buckets.asked(self.copy.url):
            self._bring(step, lambda name: not is_chunk(name))
            try:
                mine = {name for name, (of, _, _) in listed(path).items() if of % count == number}
            except Damaged as error:
                return str(error)
            self._bring(step, mine.__contains__)
        return damage(path, mine)

    def _bring(self, step: int, wanted: Callable[[str], bool]) -> None:
        if self.copy is not None:
            self.copy.bring(f"{self.directory.name}/{step:08d}/", wanted)

    def restore(self, step: int, like: Tree) -> Tree:
        """The arrays of `like` (all or a part of what was saved) as they were at `step`; `like` is freed first.

        They get the shapes, dtypes and shardings of `like`, on whatever mesh these are.

        Raises:
            UserError: the checkpoint does not hold such arrays.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        if self.copy is not None:
            self._bring_shards(step, abstract)
        for leaf in jax.tree.leaves(like):
            leaf.delete()
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        try:
            with ocp.Checkpointer(self._handler(), **self._options) as checkpointer:
                tree: Tree = checkpointer.restore(self.path(step) / STATE, args=args)
            if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
                raise KeyError("it lacks arrays")  # orbax leaves their descriptions in their place
            return tree
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"checkpoint {self.path(step)} does not fit this run ({reason_of(error)}); continue with the version "
                "and config that wrote it"
            ) from error

    def _bring_shards(self, step: int, abstract: object) -> None:
        """Fetch what the devices of this process are to hold, and check it; of the rest holes stay."""
        path, needed = self.path(step), set[str]()
        with buckets.asked(str(path)):
            self._bring(step, lambda name: not is_chunk(name))
            shapes, leaves = chunks_of(path / STATE), ocp.tree.to_flat_dict(abstract, sep=".")
            if shapes and (lacking := leaves.keys() - shapes.keys()):  # orbax would take zeros for what is not there
                raise UserError(f"checkpoint {path} does not fit this run: it lacks {min(lacking)}")
            for name, leaf in leaves.items():
                held = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
                boxes = [[each.indices(size)[:2] for each, size in zip(box, leaf.shape, strict=True)] for box in held]
                needed |= {f"{STATE}/{name}/{chunk}" for chunk in overlapping(boxes, shapes.get(name))}
            self._bring(step, needed.__contains__)
        if wrong := damage(path, needed):
            raise UserError(f"checkpoint {path} is damaged: {wrong}; give the same command again")


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
