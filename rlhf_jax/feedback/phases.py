"""Passes over prompts, piece by piece into a journal that the same command goes on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf_jax.config import SourceConfig, to_dict
from rlhf_jax.config.functions import flat
from rlhf_jax.errors import Stopped
from rlhf_jax.hosts import processes
from rlhf_jax.models.contents import OPTIONS, contents
from rlhf_jax.runs.interrupts import Interrupts
from rlhf_jax.runs.journal import Journal

Make = Callable[[int, int], list[dict[str, Any]]]
"""(start, stop) -> the journal's rows for the things start .. stop - 1."""

UNMADE = {"output", "output_dir", "overwrite", "progress", "schema", "length_filter"}
UNMADE |= {"data_path", "path", "fields", "prompts", "text_path"}
UNMADE |= {"reward.gold", *(f"{group}.{name}" for group in ("reward", "judge") for name in ("timeout", "retries"))}
UNMADE |= {"judge.workers", "judge.api_key_env", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.rollout_tensor"}
"""Options that do not decide what OUTPUT.part holds; rows count by their digest."""


@dataclass(frozen=True)
class Phase:
    """A pass over `count` things, `size` of them at once; `begin` loads what it needs when its turn comes."""

    count: int
    size: int
    begin: Callable[[], Make]


class Phases:
    """Passes one after another, whose results are the rows of a journal."""

    def __init__(self, journal: Journal):
        self.journal, self.phases = journal, list[Phase]()
        self.starts = [0]

    def add(self, phase: Phase) -> int:
        """The number of the phase, by which `row` knows it."""
        self.phases.append(phase)
        self.starts.append(self.starts[-1] + phase.count)
        return len(self.phases) - 1

    def row(self, number: int, i: int) -> dict[str, Any]:
        """What phase `number` made of its thing i."""
        return self.journal.rows[self.starts[number] + i]

    def fill(self, name: str, *, progress: bool) -> None:
        """Make the rows that the journal lacks.

        Work begins at the start of a batch, so the shapes and the noise of every batch are the same after any end.

        Raises:
            Stopped: a signal came; the batch that was being made is on disk.
        """
        journal, total = self.journal, self.starts[-1]
        interrupts = Interrupts(tqdm.write, install=journal.path is not None)
        bar = tqdm(total=total, initial=len(journal.rows), desc=name, disable=not progress, dynamic_ncols=True)
        try:
            for begins, phase in zip(self.starts, self.phases, strict=False):
                done = len(journal.rows) - begins
                if done >= phase.count:
                    continue
                first = done // phase.size * phase.size
                journal.cut(begins + first)
                make = phase.begin()
                for start in range(first, phase.count, phase.size):
                    journal.add(make(start, min(start + phase.size, phase.count)))
                    bar.update(len(journal.rows) - bar.n)
                    (stop,) = processes.any_of([bool(interrupts.received)])
                    if stop and len(journal.rows) < total:
                        by = interrupts.received or "a signal"
                        raise Stopped(
                            f"{name}: stopped by {by} after {len(journal.rows)} of {total} rows, "
                            f"which {journal.path} holds; the same command goes on"
                        )
        finally:
            bar.close()
            interrupts.close()


def open_journal(config: Any, output: str | Path, decided_by: dict[str, Any]) -> Journal:
    """OUTPUT.part, made of the config and of `decided_by`; models count by their contents, wherever they lie."""
    options = {name: value for name, value in flat(to_dict(config)) if name not in UNMADE}
    files = {name: digest for name, digest in contents(config).items() if name in options}
    made_of = {name: value for name, value in options.items() if name not in files}
    made_of |= {f"contents of {name}": digest for name, digest in files.items()}
    if sources := options.get("sources"):
        plainly = [{k: v for k, v in each.items() if k not in OPTIONS} for each in sources]
        made_of["sources"] = [
            {**each, "name": name_of(source)} for each, source in zip(plainly, config.sources, strict=True)
        ]
    made_of["rows"] = "with ids"  # earlier versions wrote none
    return Journal(output, {**made_of, **decided_by}, overwrite=config.overwrite)


def digest(rows: Sequence[Any]) -> str:
    """16 hexadecimal digits that change with rows, but not with where they come from."""
    told = [{k: v for k, v in row.items() if k != "_where"} if isinstance(row, dict) else row for row in rows]
    return hashlib.blake2b(json.dumps(told, sort_keys=True, default=repr).encode(), digest_size=8).hexdigest()


def name_of(source: SourceConfig) -> str:
    """What rows call a source."""
    shown = {"temperature": source.temperature, "top_p": source.top_p, "shots": source.shots or None}
    parts = [Path(source.path).name, *(f"{name}={value:g}" for name, value in shown.items() if value is not None)]
    return source.name or " ".join(part for part in parts if part) or "model"
