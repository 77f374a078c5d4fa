"""Files that no failure and no kill makes worse: replaced in one step, or appended to in whole lines.

All that reaches the disk here goes through functions of `os`, so that a test can have any one of them fail.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from rlhf_jax.errors import UserError, reason
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.copies import local
from rlhf_jax.hosts.interrupts import UNFINISHED
from rlhf_jax.hosts.json_text import JsonObject, from_json, json_lines, strict_json, to_json

DESCRIPTORS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")
"""Paths that are what a descriptor is open on, which may be a file."""

Place = str | os.PathLike[str]
"""A path."""

LARGEST_TEXT = 1 << 24
"""Bytes of a text file, such as one of options, that is read whole."""


def read_text(path: Place, what: str = "") -> str:
    """A text file that somebody else may have written; `what` is said before its name.

    Raises:
        UserError: it cannot be read, is not one, or is far too long.
    """
    said = f"{what} {os.fspath(path)}".strip()
    try:
        if in_bucket(path):
            path = local(str(path))
        if is_stream(path):
            raise UserError(f"{said}: a pipe or a device, not a file; write it to a file first")
        if os.stat(path).st_size > LARGEST_TEXT:
            raise UserError(f"{said}: more than {LARGEST_TEXT} bytes, which no such file has; check the path")
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{said}: not UTF-8 text; check the path") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{said}: {reason(error)}; check the path") from error


def read_object(path: Place, cure: str, *, ours: bool = True) -> JsonObject:
    """A file that holds one JSON object; one that is not `ours` another program wrote: it is read by `strict_json`.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    text = read_text(path)
    try:
        value = from_json(text) if ours else strict_json(text)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}{', no JSON object' if ours else ''}")
        return value
    except (ValueError, RecursionError) as error:
        wrong = "is broken" if ours else "holds no JSON object"
        raise UserError(f"{os.fspath(path)} {wrong} ({reason(error)}); {cure}") from error


def is_stream(path: Place) -> bool:
    """Whether a path is written to rather than replaced: a device, a pipe, a socket, or a descriptor."""
    if os.path.abspath(path).startswith(DESCRIPTORS):
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def replace_file(path: Place, data: str | bytes) -> None:
    """Write a file in one step: a failure or a kill leaves the old or the new one, whole. A stream is written to.

    Raises:
        OSError: it is not written, and what was there is as it was.
    """
    replace_files([(path, data)])


def replace_files(files: Sequence[tuple[Place, str | bytes | None]]) -> None:
    """`replace_file` several files: all are whole on the disk under other names before the first takes its own.

    None is no file: what is there of that name is deleted, once the others have theirs.
    """
    asides: list[tuple[Path, Path]] = []
    try:
        for path, data in files:
            if data is None:
                continue
            if is_stream(path):
                _write_stream(os.path.abspath(path), data)
                continue
            target = Path(os.path.realpath(path))  # the file, not the link to it
            aside = target.with_name(f".{target.name}.new")
            asides.append((aside, target))
            UNFINISHED.add(aside)
            write_new(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, data, sync=True)
            with contextlib.suppress(OSError):  # no such file, or not ours
                os.chmod(aside, stat.S_IMODE(os.stat(target).st_mode))
        for aside, target in asides:
            os.replace(aside, target)
        for path in [path for path, data in files if data is None]:
            Path(path).unlink(missing_ok=True)
    except BaseException:
        for aside, _ in asides:
            with contextlib.suppress(OSError):
                os.unlink(aside)
        raise
    finally:
        UNFINISHED.difference_update(aside for aside, _ in asides)
    for folder in {target.parent for _, target in asides}:
        sync(folder)


def _write_stream(path: str, data: str | bytes) -> None:
    if not path.startswith(DESCRIPTORS):
        return write_new(Path(path), os.O_WRONLY | os.O_APPEND, data)
    sys.stdout.flush()
    number = {"stdout": 1, "stderr": 2}.get(name := os.path.basename(path), name)
    descriptor = os.dup(int(number))  # to open a pipe whose reader has gone would wait for ever
    try:
        write_all(descriptor, data)
    finally:
        os.close(descriptor)


def write_new(path: Path, flags: int, data: str | bytes, *, sync: bool = False) -> None:
    """Write a file that `flags` of os.open open; with `sync` it has reached the disk when this returns."""
    descriptor = os.open(path, flags, 0o666)
    try:
        write_all(descriptor, data)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: str | bytes) -> None:
    """Write all of it, however little a call takes."""
    left = memoryview(data.encode() if isinstance(data, str) else data)
    while left:
        left = left[os.write(descriptor, left) :]


def sync(path: Place) -> None:
    """Have a file, or the names in a directory, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing for directories
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have all files and names below a directory reach the disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `path` when the block ends well, after all of it is on the disk.

    A kill leaves the old one, whole, under its name or beside it, where the next call here finds it.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{word}") for word in ("new", "old"))
    if old.is_dir() and not path.exists():
        os.rename(old, path)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir()
    UNFINISHED.add(new)
    try:
        yield new
        sync_tree(new)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        UNFINISHED.discard(new)


class Lines:
    """Appends JSON objects to a file, a line each; if a call fails, nothing of it stays in the file.

    If even that fails, as on a broken disk, the next call first takes away what is left.
    """

    def __init__(self, path: Path):
        """`path` is made by the first `add`."""
        self.path = path
        self._end: int | None = None  # of what was reported as written

    def add(self, rows: Sequence[Mapping[str, object]], *, sync: bool = False) -> None:
        """Append rows; with `sync` they have reached the disk when this returns.

        Raises:
            OSError: none of them is in the file.
        """
        data = json_lines(rows)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            end = whole_end(descriptor) if self._end is None or self._end > size else self._end
            self._end = end
            if end != size:
                os.ftruncate(descriptor, end)
            try:
                write_all(descriptor, data)
                if sync:
                    os.fsync(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
        self._end = end + len(data)


def whole_end(descriptor: int) -> int:
    """Where the last whole line of an open file ends; what is after it was cut short by a kill."""
    at = os.fstat(descriptor).st_size
    while at > 0:
        start = max(at - 65536, 0)
        last = os.pread(descriptor, at - start, start).rfind(b"\n")
        if last >= 0:
            return start + last + 1
        at = start
    return 0


def mend(path: Path, start: bytes, what: str) -> int:
    """Give the last line its end, or take it away if a crash cut it short; returns the bytes taken away.

    Raises:
        UserError: it does not begin with `start`, as each line does that is `what`, so the file is somebody else's.
    """
    data = path.read_bytes()
    last = data[data.rfind(b"\n") + 1 :]
    if not last:
        return 0
    if not (last.startswith(start) or start.startswith(last)):
        raise UserError(f"output {path}: the last line is no {what}; choose another --output")
    try:
        from_json(last)
    except ValueError:
        os.truncate(path, len(data) - len(last))
        return len(last)
    with open(path, "ab") as file:
        file.write(b"\n")
    return 0


def write_json(path: Place, value: object) -> None:
    """`replace_file` a file by a value as JSON, spread over lines for people."""
    replace_file(path, to_json(value, indent=1) + "\n")


def hold(path: Path, lock: Callable[[BinaryIO, int], None] = fcntl.flock) -> BinaryIO | None:
    """Claim a file, made if need be, until what is returned is closed or the process ends, by kill -9 as well.

    `lock` is fcntl.flock, which other closings of the file leave alone, or fcntl.lockf, which processes that this one
    forked do not hold after its end. None if another process holds it; a file system without locks lets everybody.
    """
    file = open(path, "ab")  # noqa: SIM115 (it stays open)
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        pass
    return file


def hold_lines(path: str, who: str, cure: str) -> BinaryIO:
    """`hold` an output to which what people say is added, line by line; its directory is made.

    Raises:
        UserError: it cannot be written, or another `who` writes it, against which `cure` is.
    """
    check_writable(Path(path).parent, f"output {path}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        held = hold(Path(path))
    except OSError as error:
        raise UserError(f"output {path}: {error.strerror}; choose another --output") from error
    if held is None:
        raise UserError(f"output {path} is being written by another {who}; {cure}")
    return held


def check_hub(path: Place, what: str) -> None:
    """Raise a UserError, about `what`, of a path on the Hub, to which nothing is written by its name."""
    if Path(path).parts[:1] == ("hf:",):
        raise UserError(
            f"{what}: to the Hub go models alone, by run.push_to_hub or `rlhf-jax convert --push`; give a path of "
            "this machine"
        )


def check_place(path: Place, what: str) -> None:
    """Raise a UserError, about `what`, of a path on the Hub, or in a bucket, where no pages, votes and talks go."""
    check_hub(path, what)
    if Path(path).parts[:1] == ("gs:",):
        raise UserError(
            f"{what}: of what is written only runs, evaluations, recipes, rows and models may be in a bucket; give a "
            "path of this machine"
        )


def check_writable(directory: Path, what: str) -> None:
    """Raise a UserError, about `what`, if the directory or what is there of its parents cannot be written to."""
    check_place(directory, what)
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{what}: {there} is a file, not a directory; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{what}: {there} cannot be written to; choose another place or its permissions")


@contextlib.contextmanager
def written(what: str) -> Iterator[None]:
    """Around writing by other libraries: what the disk refuses becomes a UserError about `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or "os error" in str(error) or "No space left" in str(error)):
            raise
        raise UserError(f"{what}: {reason(error)}; what was there is as it was; mend that and run it again") from error


@contextlib.contextmanager
def once_more(what: str, kept: str = "") -> Iterator[None]:
    """Around writing what a command goes on from: an OSError becomes a UserError on `what`; `kept`: what is safe."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {reason(error)}{kept}; mend that, then give the same command again") from error


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A directory to work in, below `folder`; deleted afterwards, or if a kill left it, by the next call."""
    place = folder / ".making"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    UNFINISHED.add(place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        UNFINISHED.discard(place)
