"""What a command was asked to write: tried before its work, and kept elsewhere if it cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_jax.errors import UserError, call_it, reason
from rlhf_jax.hosts import buckets
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.copies import upload_tree
from rlhf_jax.hosts.files import check_hub, check_writable, is_stream, replace_files, write_all, write_new
from rlhf_jax.hosts.interrupts import UNFINISHED, temporary

OTHERS = (".csv", ".tsv", ".txt", ".gz", ".parquet")
"""Endings by which rows are read in another form than they are written in."""


def summary_beside(output: str) -> str:
    """Where the summary of an output stands: rows.summary.json of rows.jsonl, and of any other name NAME-summary.json,
    so that no two outputs have one place."""
    stem = output.removesuffix(".jsonl")
    return f"{output}-summary.json" if stem == output else f"{stem}.summary.json"


def check_output(path: str, *, overwrite: bool, summary: str = "") -> None:
    """Raise a UserError if a file cannot be written as `replace_file` will, or exists and may not be replaced, or its
    summary (`summary_beside`, or that of this name) does.

    Its directory is made, and a file of another name in it for a moment, so that a full disk is found now.
    """
    if not path:
        return
    _check_file(path, overwrite=overwrite)
    summary = summary or summary_beside(path)
    if not is_stream(path) and not overwrite and there(summary):
        raise UserError(
            f"{summary} is there, but {path} is not, so it tells of other rows; move it, choose another name or pass "
            "--overwrite true"
        )


def _check_file(path: str, *, overwrite: bool) -> None:
    if path.lower().endswith(OTHERS) and not is_stream(path):
        raise UserError(f"output {path} would be read as something else, and rows are JSON lines; name a .jsonl file")
    if in_bucket(path):
        return _check_object(path, overwrite=overwrite)
    check_hub(path, f"output {path}")
    if Path(path).is_dir() or path.endswith("/"):
        raise UserError(f"output {path} is a directory; name a .jsonl file")
    if Path(path).exists() and not os.access(path, os.W_OK):
        raise UserError(f"output {path} cannot be written to; choose another name or its permissions")
    if is_stream(path):
        return
    if Path(path).exists() and not overwrite:
        raise UserError(f"output {path} exists; choose another name or pass --overwrite true")
    target = Path(os.path.realpath(path))
    check_writable(target.parent, f"output {path}")
    probe = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_new(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, b"\n" * 4096, sync=True)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output {path}: {reason(error)}; choose another place, or mend that") from error


def _check_object(url: str, *, overwrite: bool) -> None:
    """`_check_file` of an object: another one beside it is written and deleted."""
    if url.endswith("/"):
        raise UserError(f"output {url} is a directory; name a .jsonl file")
    with buckets.asked(url):
        if not overwrite and buckets.exists(url):
            raise UserError(f"output {url} exists; choose another name or pass --overwrite true")
        buckets.write(f"{url}.new", b"\n")
        buckets.delete(f"{url}.new")


def there(path: str) -> str:
    """What a path names, of this machine or in a bucket: "file", "object", "directory", or nothing.

    Raises:
        UserError: the bucket cannot be asked.
    """
    if in_bucket(path):
        with buckets.asked(path):
            return buckets.there(path)
    return "directory" if os.path.isdir(path) else "file" if os.path.exists(path) else ""


@contextlib.contextmanager
def writable_directory(path: str, what: str) -> Iterator[Path]:
    """A directory to write to: `path`, or for one in a bucket one of this machine, whose files go there at the end.

    Raises:
        UserError: about `what`, it cannot be written to; what did not reach a bucket is kept, and it is said where.
    """
    if not in_bucket(path):
        check_writable(Path(path), what)
        yield Path(path)
        return
    folder = temporary("rlhf-jax-")
    call_it(str(folder), path.rstrip("/"))
    try:
        yield folder
        with keeping(folder, folder.parent, what):
            upload_tree(folder, path.rstrip("/"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        UNFINISHED.discard(folder)


def put_files(files: Sequence[tuple[str | Path, str | bytes | None]]) -> None:
    """`replace_files`, of which objects take their places one after another.

    Raises:
        OSError: they are not written.
    """
    for path, data in files:
        if in_bucket(path):
            if data is None:
                buckets.delete(str(path))
            else:
                buckets.write(str(path), data.encode() if isinstance(data, str) else data)
    replace_files([(path, data) for path, data in files if not in_bucket(path)])


def write_output(path: str, data: bytes, gone: str = "") -> None:
    """What a command has made, to the file that was asked for, or if none was to standard output.

    `gone` is a file that told of what was in its place, and is deleted.

    Raises:
        UserError: it cannot be written, and what was there is as it was; says where the data are instead.
    """
    try:
        put_files([(path, data), *([(gone, None)] if gone else [])]) if path else _print(data)
    except OSError as error:
        what, ending = (f"output {path}", Path(path).suffix) if path else ("standard output", "")
        raise UserError(f"{what}: {reason(error)}; {rescued(data, ending or '.jsonl')}") from error


def _print(data: bytes) -> None:
    if getattr(sys.stdout, "missing", sys.stdout is None):
        raise OSError(errno.EBADF, "it is closed")
    out = getattr(sys.stdout, "buffer", None)  # bytes, since a terminal may have another encoding
    try:
        sys.stdout.flush()
        if failure := getattr(sys.stdout, "failure", None):  # of what was told before (`cli.streams`)
            raise failure
        out.write(data) if out is not None else sys.stdout.write(data.decode())
        (out or sys.stdout).flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it is tried again when Python ends
        raise


@contextlib.contextmanager
def keeping(folder: Path, beside: Path, what: str) -> Iterator[None]:
    """Around the last steps of a command: if they fail, what `folder` still holds gets a directory of its own.

    That is one `beside`, or else among the temporary ones. `what` could not be written is said.
    """
    try:
        yield
    except (OSError, UserError) as error:
        try:
            try:
                place = tempfile.mkdtemp(prefix="rlhf-jax-made-", dir=beside)
            except OSError:
                place = tempfile.mkdtemp(prefix="rlhf-jax-made-")
            for path in folder.iterdir():
                shutil.move(path, place)
            kept = f"what was to be written is in {place}"
        except OSError as again:
            kept = f"nor could what was to be written be kept ({reason(again)})"
        said = str(error) if isinstance(error, UserError) else f"{what}: {reason(error)}"
        raise UserError(f"{said}; {kept}") from error


def rescued(data: bytes, ending: str = ".jsonl") -> str:
    """Write data to a file of its own among the temporary ones, and say so."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="rlhf-jax-", suffix=ending)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"nor could it be kept in {tempfile.gettempdir()} ({reason(error)}); free space and run it again"
    return f"what was to be written is in {name}"
