"""A file of JSON lines that a run appends to and cuts where it resumes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_jax.hosts.files import Lines, replace_file, sync
from rlhf_jax.hosts.json_text import JsonObject, from_json


class Log:
    """A .jsonl file of a run. Lines that the disk refuses wait in memory for the next ones; `count` has them too."""

    def __init__(self, path: Path):
        """Touches nothing."""
        self.path, self.count = path, 0
        self._lines, self._waiting = Lines(path), list[Mapping[str, object]]()

    def begin(self, step: int | None) -> None:
        """Make the file, or leave in it only the whole lines of steps up to `step`; later ones come again."""
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill cut it short, or we did not write it
                if step is not None and line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
        if step is not None:
            replace_file(self.path, b"".join(kept))
        self.count = len(kept)
        self._lines.add([])

    def told(self) -> list[JsonObject]:
        """The rows of the file."""
        return [from_json(line) for line in self.path.read_bytes().splitlines()]

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
        """Have what is in the file, and its name, reach the disk."""
        if self.path.exists():
            sync(self.path)
            sync(self.path.parent)
