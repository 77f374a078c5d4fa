"""A file of JSON lines that a run appends to and cuts where it resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_jax.hosts.files import Lines, replace_file


class Log:
    """A .jsonl file of a run. Lines that the disk refuses wait in memory and go with the next ones.

    Attributes:
        path: of the file.
        count: how many lines there are, those that wait included.
    """

    def __init__(self, path: Path):
        """Touches nothing."""
        self.path, self.count = path, 0
        self._lines, self._waiting = Lines(path), list[Mapping[str, object]]()

    def begin(self, step: int | None) -> None:
        """Make the file, or leave in it what belongs to steps up to `step`."""
        self.count = 0 if step is None else cut_after(self.path, step)
        self._lines.add([])

    def add(self, rows: Sequence[Mapping[str, object]], *, sync: bool = False) -> None:
        """Append rows; with `sync` they have reached the disk when this returns.

        Raises:
            OSError: they are not on disk, but in memory.
        """
        self.count += len(rows)
        self._waiting += rows
        self._lines.add(self._waiting, sync=sync)
        self._waiting = []

    def sync(self) -> None:
        """Have what is in the file reach the disk."""
        self._lines.sync()


def cut_after(path: Path, step: int) -> int:
    """Leave in a .jsonl file only the whole lines of steps up to `step`, and say how many; later ones come again."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short, or that we did not write
            continue
    replace_file(path, "".join(kept))
    return len(kept)
