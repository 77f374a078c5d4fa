"""Files that no failure and no kill makes worse: replaced in one step, or appended to in whole lines.

All that reaches the disk here goes through functions of `os`, so that a test can have any one of them fail.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError, reason, shown

UNSEEN_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What JSON need not escape, but terminals, readers of lines and UTF-8 would have it; see `errors.UNSEEN`."""
DESCRIPTORS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")
"""Paths that are what a descriptor is open on, which may be a file."""

NOT_FINITE = ("nan", "inf", "-inf")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as other programs read it too: every file of ours is written with this.

    A number that is not finite is null, and a neighbouring field says which it was: {"loss": null, "loss_is": "nan"};
    of a list the first one, {"losses": [0.5, null], "losses_is": "nan"}. Characters stay as they are, but those that
    are not seen, lone surrogates among them, are escaped, and come back.
    Arrays become lists, and dates the text of ISO 8601.

    Raises:
        UserError: JSON has no form for a part of it.
    """
    options: dict[str, Any] = {"indent": indent, "allow_nan": False, "ensure_ascii": False, "default": _plain}
    try:
        try:
            text = json.dumps(value, **options)
        except ValueError:
            text = json.dumps(_finite(json.loads(json.dumps(value, default=_plain)))[0], **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"this cannot be written as JSON ({reason(error)})") from error
    return UNSEEN_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: Any) -> Any:
    for method in ("tolist", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"a {type(value).__name__} has no form there")


def _finite(value: Any) -> tuple[Any, str]:
    """(a value with null for numbers that are not finite, what the first was of those that no field of it says)."""
    if isinstance(value, float):
        return (value, "") if math.isfinite(value) else (None, str(value))
    if isinstance(value, list):
        parts = [_finite(item) for item in value]
        return [part for part, _ in parts], next((why for _, why in parts if why), "")
    if isinstance(value, dict):
        found: dict[Any, Any] = {}
        for name, item in value.items():
            found[name], why = _finite(item)
            if why:
                found.setdefault(f"{name}_is", why)
        return found, ""
    return value, ""


def from_json(text: str | bytes) -> Any:
    """What `to_json` was given, numbers that are not finite included (those within lists stay null)."""

    def restored(found: dict[str, Any]) -> dict[str, Any]:
        for name in [name for name in found if found[name] is None and found.get(f"{name}_is") in NOT_FINITE]:
            found[name] = float(found.pop(f"{name}_is"))
        return found

    return json.loads(text, object_hook=restored)


def strict_json(text: str | bytes) -> Any:
    """JSON of somebody else, in which no name comes twice and every number is one.

    Raises:
        ValueError: it is something else, or a number is too long.
        RecursionError: it is too deep.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ValueError(f"{shown(twice)} comes twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)


def json_lines(rows: Sequence[Any]) -> bytes:
    """Rows as JSON, a line each.

    Raises:
        UserError: JSON has no form for a part of a row, which is named if it knows where it came from.
    """
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(to_json(row) + "\n")
        except UserError as error:
            where = row.get("_where", f"row {number}") if isinstance(row, dict) else f"row {number}"
            raise UserError(f"{where}: {error}; leave it out or give it as text") from error
    return "".join(found).encode()


LARGEST_TEXT = 1 << 24
"""Bytes of a text file, such as one of options, that is read whole."""


def read_text(path: str | os.PathLike[str], what: str = "") -> str:
    """A text file that somebody else may have written; `what` is said before its name.

    Raises:
        UserError: it cannot be read, is not one, or is far too long.
    """
    said = f"{what} {os.fspath(path)}".strip()
    try:
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


def read_object(path: str | os.PathLike[str], cure: str) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    text = read_text(path)
    try:
        found = from_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{os.fspath(path)} is broken ({reason(error)}); {cure}") from error
    if not isinstance(found, dict):
        raise UserError(f"{os.fspath(path)} is broken (a {type(found).__name__}, no JSON object); {cure}")
    return found


def read_strict(path: str | os.PathLike[str], cure: str) -> dict[str, Any]:
    """A JSON object that another program wrote, by `strict_json`.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    text = read_text(path)
    try:
        found = strict_json(text)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
        return found
    except (ValueError, RecursionError) as error:
        raise UserError(f"{os.fspath(path)} holds no JSON object ({reason(error)}); {cure}") from error


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path is written to rather than replaced: a device, a pipe, a socket, or a descriptor."""
    if os.path.abspath(path).startswith(DESCRIPTORS):
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def replace(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file in one step: a failure or a kill leaves the old or the new one, whole. A stream is written to.

    Raises:
        OSError: it is not written, and what was there is as it was.
    """
    replace_all([(path, data)])


def replace_all(files: Sequence[tuple[str | os.PathLike[str], str | bytes]]) -> None:
    """`replace` several files: all are whole on the disk under other names before the first takes its own."""
    asides: list[tuple[Path, Path]] = []
    try:
        for path, data in files:
            if is_stream(path):
                _write_stream(os.path.abspath(path), data)
                continue
            target = Path(os.path.realpath(path))  # the file, not the link to it
            aside = target.with_name(f".{target.name}.new")
            asides.append((aside, target))
            write_new(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, data, sync=True)
            with contextlib.suppress(OSError):  # no such file, or not ours
                os.chmod(aside, stat.S_IMODE(os.stat(target).st_mode))
        for aside, target in asides:
            os.replace(aside, target)
    except BaseException:
        for aside, _ in asides:
            with contextlib.suppress(OSError):
                os.unlink(aside)
        raise
    for folder in {target.parent for _, target in asides}:
        sync(folder)


def _write_stream(path: str, data: str | bytes) -> None:
    if not path.startswith(DESCRIPTORS):
        return write_new(Path(path), os.O_WRONLY | os.O_APPEND, data)
    sys.stdout.flush()
    number = {"stdout": 1, "stderr": 2}.get(name := os.path.basename(path), name)
    descriptor = os.dup(int(number))  # to open a pipe whose reader has gone would wait for ever
    try:
        write_all(descriptor, data.encode() if isinstance(data, str) else data)
    finally:
        os.close(descriptor)


def write_new(path: Path, flags: int, data: str | bytes, *, sync: bool = False) -> None:
    """Write a file that `flags` of os.open open; with `sync` it has reached the disk when this returns."""
    descriptor = os.open(path, flags, 0o666)
    try:
        write_all(descriptor, data.encode() if isinstance(data, str) else data)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it, however little a call takes."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def sync(path: str | os.PathLike[str]) -> None:
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


class Lines:
    """Appends JSON objects to a file, a whole line each; all of a call, or after a failure nothing of it.

    Where even that cannot be taken back, as on a disk that fails, the next call takes it back first.
    """

    def __init__(self, path: Path):
        """`path` is made by the first `add`."""
        self.path = path
        self._end: int | None = None  # of what was reported as written

    def add(self, rows: Sequence[dict[str, Any]], *, sync: bool = False) -> None:
        """Append rows; with `sync` they have reached the disk when this returns.

        Raises:
            OSError: none of them is in the file.
        """
        data = json_lines(rows)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            known = self._end is not None and self._end <= size
            end = self._end if known and self._end is not None else whole_end(descriptor)
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

    def sync(self) -> None:
        """Have all lines, and the name of the file, reach the disk."""
        if self.path.exists():
            sync(self.path)
            sync(self.path.parent)


def whole_end(descriptor: int) -> int:
    """Where the last whole line of an open file ends; what is after it was cut short by a kill."""
    at = os.fstat(descriptor).st_size
    while at > 0:
        start = max(at - 65536, 0)
        found = os.pread(descriptor, at - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return 0


def check_writable(directory: Path, what: str) -> None:
    """Raise a UserError, about `what`, if the directory or what is there of its parents cannot be written to."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{what}: {there} is a file, not a directory; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{what}: {there} cannot be written to; choose another place or its permissions")


@contextlib.contextmanager
def written(what: str) -> Iterator[None]:
    """Around what writes by other libraries: what the disk refuses becomes a UserError about `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or "os error" in str(error) or "No space left" in str(error)):
            raise
        raise UserError(f"{what}: {reason(error)}; what was there is as it was; mend that and run it again") from error


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A directory in `folder`, which is made, to work in; it is gone afterwards, after a kill with the next one."""
    place = folder / ".making"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
