"""Passes over prompts, piece by piece into a journal that the same command goes on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_jax.config import (
    DrawArgs,
    EvaluateArgs,
    JudgeArgs,
    SampleArgs,
    ScoreArgs,
    SourceConfig,
    SourcesArgs,
    to_dict,
)
from rlhf_jax.config.functions import flat
from rlhf_jax.config.rules import EXPERT_AXES
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import Stopped, UserError, tell
from rlhf_jax.hosts import processes
from rlhf_jax.hosts.files import once_more
from rlhf_jax.hosts.interrupts import Interrupts
from rlhf_jax.models.contents import OPTIONS, contents
from rlhf_jax.runs.directory import RESPONSES, SCORED, SUMMARY, Summary, write_config
from rlhf_jax.runs.journal import Journal
from rlhf_jax.runs.progress import Progress, write

Make = Callable[[int, int], Iterable[Row]]
"""(start, stop) -> the journal's rows for the things start .. stop - 1; those that come before an error are kept."""

UNMADE = {"output", "output_dir", "overwrite", "progress", "schema", "length_filter"}
UNMADE |= {"data_path", "path", "fields", "prompts", "text_path", "preference_path"}
UNMADE |= {
    "reward.gold",
    *(f"{group}.{name}" for group in ("reward", "judge", "reward.judge") for name in ("timeout", "retries")),
}
UNMADE |= {f"{group}.{name}" for group in ("judge", "reward.judge") for name in ("workers", "api_key_env")}
UNMADE |= {"mesh.rollout_tensor", *(f"mesh.{axis}" for axis in EXPERT_AXES)}
"""Options that do not decide what OUTPUT.part holds; rows count by their digest."""


CONTENTS = "contents of "
"""What stands before the name of an option in what OUTPUT.part is made of, where it is a digest."""


@dataclass(frozen=True)
class Phase:
    """A pass over `count` things, `size` of them at once. Once it is made, phase[i] is the row of thing i.

    Attributes:
        begin: loads what the pass needs, when its turn comes, and says how rows are made.
        journal, start: the rows are those of the journal from `start` on.
        apart: a thing's row is the same whatever else is in its batch.
    """

    count: int
    size: int
    begin: Callable[[], Make]
    journal: Journal
    start: int
    apart: bool = False

    def __getitem__(self, i: int) -> Row:
        return self.journal.rows[self.start + i]

    @property
    def rows(self) -> list[Row]:
        return self.journal.rows[self.start : self.start + self.count]

    def scores(self) -> list[float | None]:
        """Of rows {scores}: those of all that are made, in a row."""
        return [score for row in self.rows for score in row["scores"]]


class Phases:
    """Passes one after another, whose results are the rows of a journal."""

    def __init__(self, journal: Journal):
        self.journal, self.phases = journal, list[Phase]()

    @property
    def total(self) -> int:
        """Rows of all passes."""
        return sum(phase.count for phase in self.phases)

    def add(self, count: int, size: int, begin: Callable[[], Make], *, apart: bool = False) -> Phase:
        """A further pass."""
        self.phases.append(Phase(count, size, begin, self.journal, self.total, apart))
        return self.phases[-1]

    def fill(self, name: str, *, progress: bool) -> None:
        """Make the rows that the journal lacks; how far they are is said on standard error, which no row goes to.

        Work begins at the start of a batch, so the shapes and the noise of every batch are the same after any end; but
        where things are apart, at the first that is not made.

        Raises:
            Stopped: a signal came; the batch that was being made is on disk.
        """
        journal, total = self.journal, self.total
        interrupts = Interrupts(write, install=journal.path is not None)
        told = partial(tell, error=True) if processes.is_first() else None
        bar = Progress(name, total, len(journal.rows), bar=progress and processes.is_first(), say=told)
        try:
            for phase in self.phases:
                done = len(journal.rows) - phase.start
                if done >= phase.count:
                    continue
                first = done if phase.apart else done // phase.size * phase.size
                journal.cut(phase.start + first)
                bar.doing("loading")
                make = phase.begin()
                bar.doing("compiling")
                for start in range(first, phase.count, phase.size):
                    made = list[Row]()
                    try:
                        made.extend(make(start, min(start + phase.size, phase.count)))
                    finally:
                        journal.add(made)
                    bar.update(len(journal.rows) - bar.done)
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


def open_journal(
    config: DrawArgs | JudgeArgs | SampleArgs | ScoreArgs,
    output: str | Path,
    decided_by: Mapping[str, object],
    summary: Path | None = None,
) -> Journal:
    """OUTPUT.part, made of the config and of `decided_by`; models count by their contents, wherever they lie."""
    options = {name: value for name, value in flat(to_dict(config)) if name not in UNMADE}
    models = _models(config)
    made_of = {name: value for name, value in options.items() if CONTENTS + name not in models} | models
    if isinstance(config, SourcesArgs) and config.sources:
        plainly = [{k: v for k, v in each.items() if k not in OPTIONS} for each in options["sources"]]
        made_of["sources"] = [
            {**each, "name": source_name(source)} for each, source in zip(plainly, config.sources, strict=True)
        ]
    made_of["rows"] = "with ids"  # earlier versions wrote none
    return Journal(output, {**made_of, **decided_by}, overwrite=config.overwrite, summary=summary)


def _models(config: DrawArgs | JudgeArgs | SampleArgs | ScoreArgs) -> dict[str, str]:
    """Digests, by "contents of OPTION", of what a config reads that decides what OUTPUT.part holds."""
    return {CONTENTS + name: digest for name, digest in contents(config).items() if name not in UNMADE}


def models_of(config: EvaluateArgs) -> dict[str, str]:
    """`_models` as the summary in config.output_dir has them, if there is one: what is gone since is as it was.

    Raises:
        UserError: one of them that is there holds something else now.
    """
    models = _models(config)
    if config.overwrite or not config.output_dir:
        return models
    try:
        before = json.loads(Path(config.output_dir, SUMMARY).read_bytes())["made_of"]
        then = {name: digest for name, digest in before.items() if name.startswith(CONTENTS)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # `earlier_summary` looks at what that is
        return models
    if differ := [name for name in then if models.get(name, then[name]) != then[name]]:
        raise UserError(
            f"output_dir {config.output_dir} holds an evaluation of other {differ[0]}; choose another directory or "
            "pass --overwrite true"
        )
    return then


def finish_evaluation(config: EvaluateArgs, journal: Journal, rows: list[Row], summary: Summary) -> None:
    """Write config.yaml, the rows and, last, the summary of an evaluation; what was computed survives a failure."""
    path = Path(config.output_dir)
    with once_more(f"output_dir {path}", f"; what was computed is in {journal.path}"):
        write_config(path, "evaluate", config, "output_dir")
    journal.finish(rows, summary)
    for name in {RESPONSES, SCORED} - {Path(journal.output).name}:  # of the evaluation that was there
        (path / name).unlink(missing_ok=True)


def named(output: str) -> str:
    """The output of a command, or a UserError if it is empty."""
    if not output:
        raise UserError("output is empty; name the .jsonl file to write, as --output rows.jsonl")
    return output


def digest(rows: Sequence[object]) -> str:
    """16 hexadecimal digits that change with rows, but not with where they come from."""
    told = [{k: v for k, v in row.items() if k != "_where"} if isinstance(row, dict) else row for row in rows]
    return hashlib.blake2b(json.dumps(told, sort_keys=True, default=repr).encode(), digest_size=8).hexdigest()


def source_name(source: SourceConfig) -> str:
    """What rows call a source."""
    law = {"temperature": source.temperature, "top_p": source.top_p, "shots": source.shots or None}
    parts = [Path(source.path).name, *(f"{name}={value:g}" for name, value in law.items() if value is not None)]
    return source.name or " ".join(part for part in parts if part) or "model"
