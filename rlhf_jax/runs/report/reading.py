"""What a report reads of run directories: settings, metrics, samples, how it ended. Imports no jax."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np

from rlhf_jax.errors import UserError, named, printable, shown
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.json_text import JsonObject, from_json
from rlhf_jax.runs.directory import CONFIG, METRICS, RECORD, SAMPLES, SUMMARY, VOID, is_held, object_in, read_record
from rlhf_jax.runs.listing import below


class Series(NamedTuple):
    """The finite values of a metric and their steps, each float[n]."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The values of the beginning, a fiftieth and at most five, and those of the end, a fifth and at most ten."""
        num = len(self.values)
        return self.values[: max(1, min(num // 50, 5))], self.values[-max(1, min(num // 5, 10)) :]

    @property
    def first(self) -> float:
        """Mean of the beginning."""
        return float(self.ends[0].mean())

    @property
    def last(self) -> float:
        """Mean of the end."""
        return float(self.ends[1].mean())

    @property
    def errors(self) -> tuple[float, float]:
        """Standard errors of `first` and `last`, from how much neighbours differ; a few jumps do not count."""
        if len(self.values) < 3:
            return 0.0, 0.0
        deviation = np.quantile(np.abs(np.diff(self.values)), 0.75) / (1.15 * 2**0.5)  # of a Gaussian's differences
        first, last = (float(deviation / len(part) ** 0.5) for part in self.ends)
        return first, last

    @property
    def mean(self) -> float:
        """Mean of all."""
        return float(self.values.mean())

    def thinned(self, most: int) -> Series:
        """At most so many values: means of neighbours."""
        size = -(-len(self.values) // most)
        starts = np.arange(0, len(self.values), size)
        counts = np.diff(starts, append=len(self.values))
        return Series(*(np.add.reduceat(part, starts) / counts for part in self))

    def rose(self) -> bool:
        """Whether the end is above the beginning by more than chance, two standard errors."""
        return self.last - self.first > max(2 * math.hypot(*self.errors), 1e-6 * abs(self.first))

    def fell(self) -> bool:
        """Whether the end is below the beginning by more than chance."""
        return Series(self.steps, -self.values).rose()


class Sample(NamedTuple):
    """A response that was drawn on the way.

    Attributes:
        prompt, response: as text.
        length: tokens, or characters where no ids were kept.
        reward, kl: None where there is none.
    """

    step: int
    prompt: str
    response: str
    length: int
    reward: float | None
    kl: float | None


@dataclass(frozen=True)
class RunData:
    """A run directory.

    Attributes:
        name: as the report calls it.
        stage: the command.
        status: running, finished, stopped, failed or crashed.
        note: why it ended, if not by itself.
        step, total: steps that were taken, and asked for.
        config, summary: as the files say.
        history: the lines of metrics.jsonl.
        samples: of samples.jsonl.
    """

    path: Path
    name: str
    stage: str
    status: str
    note: str
    step: int
    total: int
    config: JsonObject
    summary: JsonObject
    history: Sequence[JsonObject]
    samples: Sequence[Sample]

    def series(self, *names: str) -> Series | None:
        """The first of several metrics that has a finite value; None if none has."""
        for name in names:
            found = [(line["step"], line[name]) for line in self.history if is_number(line.get(name))]
            if found:
                steps, values = zip(*found, strict=True)
                return Series(np.array(steps, float), np.array(values, float))
        return None

    @property
    def settings(self) -> JsonObject:
        """The settings of the stage's own group."""
        group = self.config.get("sft" if self.stage == "pretrain" else self.stage)
        return group if isinstance(group, dict) else {}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def lines_of(path: Path) -> Iterator[JsonObject]:
    """The objects of a .jsonl file that have a step; none if there is no such file. A broken line is left out."""
    try:
        with open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):  # the last one may be under way
                    row = from_json(line)
                    if isinstance(row, dict) and isinstance(row.get("step"), int):
                        yield row
    except OSError:
        return


def text_of(value: object) -> str:
    """A prompt or response as text: of messages, each behind its role."""
    if isinstance(value, list):
        parts = [one if isinstance(one, dict) else {"content": one} for one in value]
        return "\n".join(f"{one.get('role', '')}: {one.get('content', '')}" for one in parts)
    return str(value)


def samples_of(path: Path) -> list[Sample]:
    """The rows of samples.jsonl."""
    found = []
    for row in lines_of(path / SAMPLES):
        prompt, response = text_of(row.get("prompt", "")), text_of(row.get("response", ""))
        ids = row.get("response_ids")
        length = len(ids) if isinstance(ids, list) else len(response)
        reward, kl = (float(v) if is_number(v := row.get(name)) else None for name in ("reward", "kl"))
        found.append(Sample(row["step"], prompt, response, length, reward, kl))
    return found


def read_run(path: Path, name: str = "") -> RunData:
    """All of a run directory.

    Raises:
        UserError: it holds no run.
    """
    record = read_record(path)
    if record is None or record["status"] == VOID:
        raise UserError(f"{path} holds no run ({RECORD} is missing or broken); `rlhf-jax runs` lists runs")
    history = list(lines_of(path / METRICS))
    status = record["status"]
    if status == "running":
        status = "running" if is_held(path) else "crashed"
    step = max([int(record.get("step") or 0), *(line["step"] for line in history[-2:])])
    return RunData(
        path=path,
        name=printable(name or Path(named(path.absolute())).name),
        stage=str(record["stage"]),
        status=status,
        note=str(record.get("note") or ""),
        step=step,
        total=int(record.get("total") or 0),
        config=record["config"],
        summary=object_in(path / SUMMARY) or {},
        history=history,
        samples=samples_of(path),
    )


def state_of(path: str | Path) -> tuple[float, list[Path]]:
    """When a run, or one below, was last written to, in seconds of the clock; and which of them processes hold."""
    runs = sorted(below(Path(path)))
    files = [each / name for each in runs for name in (RECORD, METRICS, SAMPLES, SUMMARY)]
    latest = max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
    return latest, [each for each in runs if is_held(each)]


def read_runs(paths: Sequence[str | Path]) -> list[RunData]:
    """The runs of directories, or at or below them, each named once; those below one in the order of their beginning.

    Raises:
        UserError: there is none, or it is in a bucket.
    """
    named_once: dict[str, Path] = {}  # real path -> as it was given
    for given in paths:
        if in_bucket(given):
            raise UserError(
                f"{given}: a report is made of runs on this machine; a run that has ended in a bucket has its "
                "report.html there, and rlhf-jax runs lists them"
            )
        path = Path(given)
        begun = sorted(below(path), key=lambda each: (begun_at(each), str(each)))
        runs = [each for each in begun if (read_record(each) or {"status": VOID})["status"] != VOID]
        if not runs:
            raise UserError(f"{shown(str(path))} holds no run, nor does a directory below it; name a run's directory")
        for each in runs:
            named_once.setdefault(os.path.realpath(each), each)
    places = list(named_once.values())
    shared = common(places)
    return [read_run(each, str(each.absolute().relative_to(shared)) if len(places) > 1 else "") for each in places]


def unreadable(paths: Sequence[str | Path]) -> list[str]:
    """The run directories at or below directories whose run.json nobody can read, so that they are no runs here."""
    return sorted(str(each) for path in paths for each in below(Path(path)) if read_record(each) is None)


def begun_at(path: Path) -> float:
    """When a run began, in seconds of the clock: config.yaml is written once."""
    return next((f.stat().st_mtime for f in (path / CONFIG, path / RECORD) if f.exists()), 0.0)


def common(places: Sequence[Path]) -> Path:
    """The directory below which all lie."""
    whole = [each.absolute().parent for each in places]
    return next(each for each in (whole[0], *whole[0].parents) if all(p.is_relative_to(each) for p in whole))
