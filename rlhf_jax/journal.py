"""A file that a long command fills piece by piece and goes on with after any end. Floor 1."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rlhf_jax.directory import Lines, as_json, to_json, write_text
from rlhf_jax.errors import UserError


class Journal:
    """OUTPUT.part while OUTPUT is being made: a line that says of what, then JSON lines in an order fixed beforehand.

    A kill at any moment leaves whole lines and perhaps part of one, which is cut. So what is there says how far the
    command came, and going on gives the same bytes as if nothing had happened.

    Attributes:
        rows: the lines after the first.
    """

    def __init__(self, output: Path, made_of: dict[str, Any], *, overwrite: bool):
        """Claim OUTPUT.part and read it; `made_of` is all that decides its content.

        Raises:
            UserError: another process writes it, or it is made of something else.
        """
        self.output, self.path = output, output.with_name(output.name + ".part")
        self._file: IO[bytes] = open(self.path, "ab")  # noqa: SIM115 (it stays open, for the lock)
        try:  # flock, since lockf would let go when `Lines` closes the file
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.close()
            raise UserError(f"{self.path} is being written by another process; wait for it, or stop it") from error
        except OSError:  # a file system without locks
            pass
        try:
            self.rows = self._read(made_of, overwrite)
        except BaseException:
            self._file.close()
            raise

    def _read(self, made_of: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
        if overwrite:
            os.truncate(self.path, 0)
        self._lines = Lines(self.path)
        whole = [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        os.truncate(self.path, sum(map(len, whole)))
        wanted = as_json({"made of": made_of})
        if not whole:
            self._lines.add([wanted])
            return []
        try:
            header, *rows = [json.loads(line) for line in whole]
        except ValueError as error:
            raise UserError(f"{self.path} is damaged ({error}); delete it or pass --overwrite true") from error
        if header != wanted:
            raise UserError(f"{self.path} {_difference(header, wanted)}; give the same, or pass --overwrite true")
        return rows

    def cut(self, count: int) -> None:
        """Keep the first `count` rows."""
        lines = self.path.read_bytes().splitlines(keepends=True)[: count + 1]
        os.truncate(self.path, sum(map(len, lines)))
        self.rows = self.rows[:count]

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; they are on disk when this returns.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._lines.add(rows)
            self._lines.sync()
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; free space, then give the same command again") from error
        self.rows += as_json(rows)

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Write OUTPUT in one step and forget what led to it."""
        write_text(self.output, "".join(to_json(row) + "\n" for row in rows))
        self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()


def _difference(header: Any, wanted: dict[str, Any]) -> str:
    """What OUTPUT.part is made of that is another now."""
    then, now = (each.get("made of") if isinstance(each, dict) else None for each in (header, wanted))
    if not isinstance(then, dict) or now is None:
        return "was not written by this command"
    name = next(name for name in [*then, *now] if then.get(name) != now.get(name))
    return f"is made with {name} {then.get(name, 'nothing')!r}, not {now.get(name, 'nothing')!r}"
