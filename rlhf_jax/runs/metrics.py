"""The numbers of a run, from the devices to metrics.jsonl, the progress bar and TensorBoard; its samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from rlhf_jax.config import StageArgs
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import processes
from rlhf_jax.runs.checkpoint import Say, reason_of
from rlhf_jax.runs.directory import METRICS, REPORT, SAMPLES, plain
from rlhf_jax.runs.log import Log
from rlhf_jax.runs.loggers import Logger, Place, begin, guarded
from rlhf_jax.runs.outcome import widened
from rlhf_jax.runs.parts import ASIDE, Parts
from rlhf_jax.runs.profile import Trace
from rlhf_jax.runs.progress import EVERY, Progress
from rlhf_jax.runs.skips import Skips
from rlhf_jax.types import Metrics

ELAPSED = "time/elapsed_s"
"""What metrics.jsonl alone has of a line."""

Table = TypeVar("Table")
"""A pytree of arrays, which come to the host as numpy's."""


def on_bar(name: str) -> str:
    """What the progress bar calls a metric: loss/nll is nll, and eval/nll, which is older, eval nll."""
    group, _, last = name.rpartition("/")
    return {"tokens_per_s": "tok/s"}.get(last, f"eval {last}" if group == "eval" else last)


class RunMetrics:
    """What a run reports of its steps. Device metrics are fetched one step late: logging never stalls the devices.

    Process 0 writes.

    Attributes:
        last: the newest value of every metric.
        extremes: of some metrics the lowest and the highest value; see `outcome`.
        started: when the run would have begun had it never stood still, in seconds of the clock.
        bar: the progress bar.
        parts: where the time goes; a line of metrics has the seconds since the one before as time/PART_s.
    """

    def __init__(
        self, settings: StageArgs, stage: str, shown: Sequence[str], skips: Skips, say: Say, cure: str, *, traced: bool
    ):
        """Touches nothing. `shown` are the metrics on the progress bar, `cure` says how a stopped run goes on.

        `traced`: whether the steps of run.profile are its own.
        """
        self.settings, self.stage, self.shown = settings, stage, shown
        self.skips, self.say, self.cure = skips, say, cure
        self.is_writer = processes.is_first()
        self.last: dict[str, float] = {}
        self.extremes: dict[str, list[float]] = {}
        self.started = time.time()
        self.parts = Parts()
        self._pending: Callable[[], None] | None = None
        self._logs = {name: Log(Path(settings.run.output_dir, name)) for name in (METRICS, SAMPLES)}
        self._trace = Trace(settings.run.output_dir, settings.run.profile if traced else [])
        self._disk_full = False
        self._loggers: list[Logger] = []

    def prepare(self, step: int | None) -> None:
        """Make the files ready, of a run that goes on after `step` if there is one; process 0 only."""
        for log in self._logs.values():
            log.begin(step)
        place = Place(Path(self.settings.run.output_dir), plain(self.settings), step)
        self._loggers = [guarded(begin(name, place), self.say) for name in self.settings.run.loggers]
        for logger in self._loggers if step is not None else []:
            for told in self._logs[METRICS].told() if logger.anew else []:
                logger.log(told.pop("step"), {n: v for n, v in told.items() if n != ELAPSED})

    def start(self, step: int, total: int) -> None:
        """Start the clock and the progress bar."""
        self.started = time.time()
        shown = self.settings.run.progress and self.is_writer
        self.bar = Progress(self.stage, total, step, bar=shown, say=self.say)
        self.parts.start()
        self._trace.after(step)

    def restore(self, record: Mapping[str, Any], step: int) -> None:
        """Go on where a checkpoint's record says that the run stood after `step`; says which lines are lost."""
        self.skips.total, self.skips.streak = record["skipped"], record["streak"]
        self.skips.empty = record.get("empty", 0)
        self.last, self.extremes = record["metrics"], record.get("extremes", {})
        for name, log in self._logs.items():
            written = record.get("lines", {}).get(name, log.count)
            if log.count != written:
                line = f"has {log.count} whole lines up to step {step}, but {written} were written"
                self.say(f"{self.stage}: {log.path} {line}; what is missing is lost")
        self.started = time.time() - record["elapsed_s"]

    def advance(self, step: int, metrics: Metrics, updates: int = 1) -> None:
        """One step of the progress bar; its `metrics` say which of its `updates` changed nothing."""
        counts = metrics["optim/skipped"], metrics["optim/empty"]
        self.skips.note(step, counts, updates)
        self.bar.update(1)
        self._trace.after(step, counts)

    def log(
        self,
        step: int,
        metrics: Metrics,
        host: Mapping[str, float],
        *,
        tokens: int | Sequence[jax.Array],
        table: Table | None = None,
        on_table: Callable[[Table], None] = lambda table: None,
    ) -> None:
        """Device metrics and host numbers of a step; written when the next ones arrive, or at the end.

        `tokens`, or as many as these say together, were processed since the last call, in the seconds of the parts
        marked since then but those ASIDE. `table` comes to the host in the same transfer, for `on_table`.
        """
        names, values, noted = tuple(metrics), processes.pack(tuple(metrics.values())), self.skips.take()
        marked = self.parts.marked

        def write() -> None:
            unmoved = [counts for _, counts, _ in noted]
            numbers, rows, counts, processed = processes.to_host((values, table, unmoved, tokens))
            spent = self.parts.take(marked)
            trained = sum(seconds for name, seconds in spent.items() if name not in ASIDE)
            timed = {"time/tokens_per_s": round(float(np.sum(processed)) / max(trained, 1e-6), 1)}
            timed |= {f"time/{name}_s": round(seconds, 4) for name, seconds in spent.items()}
            self.write(step, {**dict(zip(names, map(float, numbers), strict=True)), **host, **timed})
            if rows is not None:
                on_table(rows)
            self.skips.count(noted, counts)

        self.flush()
        self._pending = write

    def flush(self) -> None:
        """Fetch and write the metrics that are still pending; count the updates of steps since then.

        Raises:
            UserError: no update was finite for faults.max_skipped steps.
        """
        write, self._pending = self._pending, None
        if write is not None:
            write()
        self.skips.settle()

    def report_nan(self, step: int, operation: str) -> NoReturn:
        """Stop at a step whose loss or gradient is not finite, because of `operation` (faults.debug_nans)."""
        self.flush()
        raise UserError(f"step {step}: {operation}; rows {self.skips.rows(step)}")

    def elapsed(self) -> float:
        """Seconds that the run took so far."""
        return time.time() - self.started

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write host numbers at once."""
        self.last, self.extremes = {**self.last, **metrics}, widened(self.extremes, metrics)
        if not self.is_writer:
            return
        self._append(METRICS, [{"step": step, ELAPSED: round(self.elapsed(), 3), **metrics}])
        for logger in self._loggers:
            logger.log(step, metrics)
        self.bar.values({on_bar(name): self.last[name] for name in self.shown if name in self.last})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, of text and numbers, to samples.jsonl."""
        if self.is_writer and rows:
            self._append(SAMPLES, [{"step": step, **row} for row in rows])

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        log = self._logs[name]
        try:
            log.add(rows)
            self._disk_full = False
        except OSError as error:
            text = f"{log.path} could not be written ({reason_of(error)})"
            if self.settings.checkpoint.on_failure == "stop":
                raise UserError(f"{text}; free space, then {self.cure}") from error
            if not self._disk_full:
                self.say(f"{self.stage}: {text}; training continues, its lines are tried again with the next ones")
            self._disk_full = True

    def sync(self) -> dict[str, int]:
        """Have all lines reach the disk; how many each file has, those that a full disk refused included."""
        if self.is_writer:
            for log in self._logs.values():
                log.sync()
        return {name: log.count for name, log in self._logs.items()}

    def finish(self) -> None:
        """Write what is pending, and what a full disk had refused; of a long run, say where its time went."""
        self.flush()
        self.parts.take(self.parts.marked)
        if self.elapsed() >= EVERY and self.parts.total:
            self.say(f"{self.stage}: time: {self.parts.shares()}")
        if self.is_writer:
            for log in self._logs.values():
                log.add([], sync=True)

    def close(self) -> None:
        """End the bar, the watch on parts, a trace and the loggers, which take the report along if there is one."""
        self.bar.close()
        self.parts.close()
        self._trace.close()
        report = Path(self.settings.run.output_dir, REPORT)
        for logger in self._loggers:
            logger.close(report if report.exists() else None)
