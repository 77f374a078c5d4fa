"""A file that a long command fills piece by piece, and continues after it was stopped or killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from rlhf_jax.errors import UserError, tell
from rlhf_jax.hosts import clock, processes
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.copies import local
from rlhf_jax.hosts.files import Lines, hold, is_stream, once_more
from rlhf_jax.hosts.json_text import JsonObject, json_lines, to_json
from rlhf_jax.hosts.outputs import check_output, put_files, summary_beside, write_output
from rlhf_jax.runs.directory import as_json
from rlhf_jax.runs.twin import Twin

START = b'{"made of"'
"""How OUTPUT.part begins."""

WRITTEN = "written"
"""Key of the line that comes before OUTPUT is written: the digest of that."""


class Journal(contextlib.AbstractContextManager["Journal"]):
    """OUTPUT.part, in which rows gather until OUTPUT is written: a header that says what they are made of, then JSON
    lines in an order fixed beforehand.

    A kill at any moment leaves whole lines and perhaps part of one, which is cut. So the file says how far the command
    came, and going on gives the same bytes as if nothing had happened. Where the output is a device, a pipe or nothing
    at all, there is no such file, and the rows are in memory. Process 0 writes.

    Attributes:
        rows: the lines after the first.
    """

    def __init__(
        self,
        output: str | Path,
        made_of: Mapping[str, object],
        *,
        overwrite: bool,
        cure: str = "give the same, or pass --overwrite true",
        summary: Path | None = None,
    ):
        """Claim OUTPUT.part and read it; `made_of` is all that decides the rows.

        With `overwrite` it continues only what was begun with `overwrite` too. `cure` is what to do where it is made
        of something else, `summary` the place of a summary that is not beside OUTPUT (`summary_beside`).

        Raises:
            UserError: OUTPUT cannot be written, or it or a summary is there and may not be replaced; another process
                writes OUTPUT.part, or it is made of something else.
        """
        self.output, self._cure = str(output), cure
        self._summary = str(summary or summary_beside(self.output))
        self._twin: Twin | None = None
        self.path = None if not self.output or is_stream(output) else Path(f"{output}.part")
        self._file: BinaryIO | None = None
        header = {"made of": made_of, "time": clock.begin(), **({"overwrite": True} if overwrite else {})}
        self._header = as_json(header)
        try:
            self.rows: list[JsonObject]
            self.rows, time = processes.from_first(lambda: (self._open(overwrite), clock.time()))
            clock.begin(time)
        except BaseException:
            self.close()
            raise

    def _open(self, overwrite: bool) -> list[JsonObject]:
        if in_bucket(self.output):
            self._twin = Twin(f"{self.output}.part")
            self.path = self._twin.place / "rows.jsonl"
        overwrite = overwrite or self._is_written()
        check_output(self.output, overwrite=overwrite, summary=self._summary)
        if self.path is None:
            return []
        with once_more(str(self.path)):
            self._file = hold(self.path)
            if self._file is None:
                raise UserError(f"{self.path} is being written by another process; wait for it, or stop it")
            self._lines = Lines(self.path)
            return self._read(self.path)

    def _read(self, path: Path) -> list[JsonObject]:
        data = path.read_bytes()
        lines = [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
        header = (_loaded(lines[0]) if lines else None) or {}
        same = {**header, "time": None} == {**self._header, "time": None}
        begun = START.startswith(data[: len(START)])  # else it is somebody else's
        empty = begun and len(lines) < 2  # nothing is lost with a command that failed before its first row
        if not same and (empty or "overwrite" in self._header):
            os.truncate(path, 0)
            self._lines.add([self._header], sync=True)
            return []
        made_of = header.get("made of")
        if made_of != self._header["made of"]:
            raise UserError(f"{path} {_difference(made_of, self._header['made of'])}; {self._cure}")
        clock.begin(header.get("time"))  # chat templates see when it was begun
        rows = [_loaded(line) for line in lines[1:]]
        count = next((i for i, row in enumerate(rows) if row is None or WRITTEN in row), len(rows))
        if count < len(rows) and rows[count] is None:
            tell(f"{path}: line {count + 2} is damaged; going on from there")
        os.truncate(path, sum(map(len, lines[: count + 1])))
        return [row for row in rows[:count] if row is not None]

    def _is_written(self) -> bool:
        """Whether OUTPUT is what OUTPUT.part was finished with: a kill came before that was removed."""
        if self.path is None:  # a device may have no end
            return False
        try:
            *_, last = self.path.read_bytes().splitlines()
            digest = json.loads(last).get(WRITTEN)
            place = local(self.output) if digest and in_bucket(self.output) else self.output
            return bool(digest and hashlib.sha256(Path(place).read_bytes()).hexdigest() == digest)
        except (OSError, ValueError, AttributeError, UserError):
            return False

    def cut(self, count: int) -> None:
        """Keep the first `count` rows."""
        self.rows = self.rows[:count]
        path = self.path
        if path is not None:
            self._on_first(lambda: os.truncate(path, sum(map(len, path.read_bytes().splitlines(True)[: count + 1]))))

    def add(self, rows: Sequence[JsonObject]) -> None:
        """Append rows; they are on disk when this returns.

        Raises:
            UserError: the disk is full.
        """
        if self.path is not None:
            self._on_first(lambda: self._lines.add(rows, sync=True))
        self.rows += as_json(rows)

    def _on_first(self, change: Callable[[], None]) -> None:
        def tried() -> None:
            with once_more(str(self.path), f"; {len(self.rows)} rows are whole there"):
                change()

        processes.from_first(tried)

    def finish(self, rows: Sequence[JsonObject], summary: Mapping[str, object] | None = None) -> None:
        """Write OUTPUT (empty: standard output) and the summary, if there is one, and delete OUTPUT.part.

        Without one the summary of what was in its place is deleted.

        Raises:
            UserError: they cannot be written; earlier files of these names are as they were, OUTPUT.part is whole.
        """
        processes.from_first(lambda: self._finish(json_lines(rows), summary))

    def _finish(self, data: bytes, summary: Mapping[str, object] | None) -> None:
        if self.path is None:
            return write_output(self.output, data)
        about = None if summary is None else to_json(summary, indent=1) + "\n"
        with once_more(f"output {self.output}", f"; what was computed is in {self.path}"):
            self._lines.add([{WRITTEN: hashlib.sha256(data).hexdigest()}], sync=True)
            if self._twin is not None:
                self._twin.push()
                self._twin.check_held()
            put_files([(self.output, data), (self._summary, about)])
        with contextlib.suppress(OSError):  # it is of no account now, and gone on with next time
            os.unlink(self.path)

    def close(self) -> None:
        """Let other processes have OUTPUT.part."""
        if self._file is not None:
            self._file.close()
        if self._twin is not None:
            twin, self._twin = self._twin, None
            twin.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _loaded(line: bytes) -> JsonObject | None:
    """The JSON object on a line; None if there is something else."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _difference(then: object, now: JsonObject) -> str:
    """What OUTPUT.part is made of that is another now."""
    if not isinstance(then, dict):
        return "was not written by this command"
    name = next(name for name in [*then, *now] if then.get(name) != now.get(name))
    return f"is made with {name} {then.get(name, 'nothing')!r}, not {now.get(name, 'nothing')!r}"
