"""A run as its stage sees it: metrics out, checkpoints, interruptions, the best evaluation.

Files are written by process 0 only, but the arrays of a checkpoint, which every process writes its part of.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
from tqdm import tqdm

from rlhf_jax.errors import Stopped, UserError, printable
from rlhf_jax.hosts import clock, processes
from rlhf_jax.hosts.files import write_json
from rlhf_jax.hosts.processes import pack
from rlhf_jax.runs import directory
from rlhf_jax.runs.checkpoint import Checkpoints, reason_of
from rlhf_jax.runs.interrupts import Interrupts
from rlhf_jax.runs.log import Log
from rlhf_jax.types import Metrics

BARS: weakref.WeakSet[tqdm] = weakref.WeakSet()

AGREE_EVERY = 10
"""Steps after which several processes ask one another whether to save or stop; asking waits for the devices."""


def close_bars() -> None:
    """End the progress bars that an error or Ctrl-C left open, so that a message gets a line of its own."""
    for bar in BARS:
        bar.close()


class Run:
    """Where a stage reports and saves. Metrics are fetched one step late, so that logging never stalls the devices.

        with Run("sft", config, total=steps) as out:
            state, notes = out.restore(state, identity)      # of the newest checkpoint, if the run was here before
            for i in range(out.start, steps):
                ...
                out.save_if_due(i + 1, state, notes)         # raises Stopped after Ctrl-C and SIGTERM
            out.finish(summary)

    Attributes:
        start: steps done when this process took over; 0 in a new run.
        resumed: whether a checkpoint was found.
        best: (step, value) of the best evaluation, if one is kept.
        last_metrics: the newest value of every metric.
        rows_of: i -> where the rows of batch i come from, for messages; a stage sets it.
    """

    def __init__(
        self,
        stage: str,
        config: Any,
        *,
        total: int,
        shown: tuple[str, ...] = (),
        given: tuple[str, ...] = (),
        files: Mapping[str, str] | None = None,
        agree_every: int = AGREE_EVERY,
    ):
        """Claim config.run.output_dir and find where to continue.

        `shown` are the metrics on the progress bar; `given` names what the caller passed in Python, which
        `rlhf-jax resume` cannot know. `files` are the contents of the config, as `claim_directory` returns them.
        """
        self.settings, self.config, self.stage, self.total = config, config.run, stage, total
        self.dir, self.shown, self.given, self.agree_every = Path(config.run.output_dir), shown, given, agree_every
        self.is_writer = processes.is_first()
        self.last_metrics: dict[str, float] = {}
        self._improvements: list[tuple[int, float]] = []
        self._skipped: list[tuple[int, jax.Array, int]] = []
        self.skipped, self._streak = 0, 0
        self._identity: dict[str, Any] = {}
        self.rows_of: Callable[[int], list[str]] = lambda i: []
        self._pending: tuple[Any, ...] | None = None
        self._writer: Any = None
        self._metrics, self._samples = (Log(self.dir / n) for n in (directory.METRICS, directory.SAMPLES))
        self._disk_full = False
        keep = config.checkpoint
        place = self.dir / directory.CHECKPOINTS
        self.checkpoints = Checkpoints(place, keep_last=keep.keep_last, keep_every=keep.keep_every)
        self._lock: Any = None
        self._files = dict(files or {})
        step = processes.from_first(self._take)
        self.checkpoints.last = step
        self.resumed, self.start = step is not None, step or 0
        processes.check_shared(self.dir / directory.RECORD, f"run.output_dir {self.dir}")
        self.started = self._since = self._saved_at = time.time()
        self.interrupts = Interrupts(self.say)
        shows = config.run.progress and self.is_writer
        self.bar = tqdm(total=total, initial=self.start, desc=stage, disable=not shows, dynamic_ncols=True)
        BARS.add(self.bar)

    def _take(self) -> int | None:
        """Hold the directory and make its files ready; the step to continue after, if any. Process 0 only."""
        try:
            directory.check_output_dir(self.stage, self.settings, self.given, self._files)
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = directory.claim(self.dir)
            record = directory.read_record(self.dir) or {"status": directory.VOID}
            found = record["status"] != directory.VOID and not self.config.overwrite
            step = self.checkpoints.newest_intact(self.say) if found else None
            self.resumed, self.start = step is not None, step or 0
            self._prepare()
        except BaseException as error:
            getattr(self._lock, "close", int)()
            if not isinstance(error, OSError):
                raise
            raise UserError(f"run.output_dir {self.dir}: {reason_of(error)}; choose another place") from error
        if found:
            where = f"continuing after step {step} of {self.total}" if self.resumed else "no checkpoint, starting anew"
            broken = f" ({directory.RECORD} was broken)" if "recovered" in record else ""
            self.say(f"{self.stage}: {self.dir}: {where}{broken}")
        return step

    def _prepare(self) -> None:
        if not self.resumed:
            directory.wipe(self.stage, self.dir)
        directory.write_config(self.dir, self.stage, self.settings)
        for log in (self._metrics, self._samples):
            log.begin(self.start if self.resumed else None)
        self._record("running")
        if self.config.tensorboard:
            from tensorboardX import SummaryWriter

            purge = self.start + 1 if self.resumed else None
            self._writer = SummaryWriter(str(self.dir / "tensorboard"), purge_step=purge)

    def _record(self, status: str, note: str = "", step: int | None = None) -> None:
        at = {"status": status, "note": note, "step": self.start if step is None else step}
        directory.write_record(self.dir, {**self._about(), **at})

    def _about(self) -> dict[str, Any]:
        """What run.json and every checkpoint say of the run."""
        about = {"stage": self.stage, "total": self.total, "given": list(self.given), "cwd": str(Path.cwd())}
        return {**about, "time": clock.time(), "files": self._files, "config": directory.plain(self.settings)}

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the save under way, put the signal handlers back, say in run.json how it ended."""
        if error is None or isinstance(error, (Stopped, UserError)) or not processes.several():
            self.checkpoints.wait()  # else it may need a process that has gone
        self.bar.close()
        self.interrupts.close()
        if self._writer is not None:
            self._writer.close()
        if self.is_writer:
            with contextlib.closing(self._lock), contextlib.suppress(OSError):  # which may be what the error is about
                if error is not None:
                    status = "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed"
                    self._record(status, f"{type(error).__name__}: {error}", (self.checkpoints.steps() or [0])[-1])
        if isinstance(error, OSError) or ("No space left" in str(error) and not isinstance(error, UserError)):
            where, reason = getattr(error, "filename", None) or self.dir, reason_of(error or OSError())
            raise UserError(f"{where}: {reason}; mend that, then {self.how_to_continue()}") from error

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_writer:
            with contextlib.suppress(OSError):  # nobody may be there to read it, after SIGHUP
                tqdm.write(printable(text, lines=True))

    # --- continuing

    def restore(self, tree: Any, identity: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arrays of `tree` and the notes of `save_if_due` as the checkpoint has them; in a new run `tree` and {}.

        `tree` is freed if there is a checkpoint. `identity` (name -> JSON value) is what must not have changed since:
        the cursors of the data, digests of frozen models.

        Raises:
            UserError: it has changed.
        """
        self._identity = directory.as_json(identity)
        if not self.resumed:
            return tree, {}
        record = self.checkpoints.record(self.start)
        for name, value in self._identity.items():
            then = record["identity"].get(name)
            if then != value:
                raise UserError(
                    f"{self.dir} cannot be continued: the {name} are not those that it started with ({then} there, "
                    f"{value} here); give the same again or choose another run.output_dir"
                )
        self._improvements = [(step, v) for step, v in record["improvements"] if v is not None and math.isfinite(v)]
        self.skipped, self._streak = record["skipped"], record["streak"]
        self.last_metrics = record["metrics"]
        for log in (self._metrics, self._samples):
            written = record.get("lines", {}).get(log.path.name, log.count)
            if log.count != written:
                line = f"has {log.count} whole lines up to step {self.start}, but {written} were written"
                self.say(f"{self.stage}: {log.path} {line}; what is missing is lost")
        self.started = time.time() - record["elapsed_s"]
        tree = self.checkpoints.restore(self.start, tree)
        self._saved_at = self._since = time.time()
        return tree, record["notes"]

    def save_if_due(self, step: int, tree: Any, notes: dict[str, Any] | None = None) -> None:
        """Save `tree` (arrays), `notes` (JSON) and the run's own state after `step`, in the background, if it is time.

        Raises:
            Stopped: a signal came; all is saved.
            UserError: a save failed, and checkpoint.on_failure is stop or there is no later chance.
        """
        keep = self.settings.checkpoint
        stop, clock, failed = self._agreed(step)
        counts = any(every and step and step % every == 0 for every in (keep.every, keep.keep_every))
        improved = bool(self._improvements) and self._improvements[-1][0] == step
        due = stop or clock or counts or improved if step < self.total else keep.keep_finished
        if failed:
            self._check_failure()
        if due and step != self.checkpoints.last:
            self._save(step, tree, notes or {})
        if stop and step < self.total:
            self.save_now(step, tree, notes or {})
            raise Stopped(
                f"{self.stage}: stopped by {self.interrupts.received or 'a signal'} after step {step} of {self.total} "
                f"and saved; {self.how_to_continue()}"
            )

    def save_now(self, step: int, tree: Any, notes: dict[str, Any]) -> None:
        """Save after `step` and wait for it, because the run is about to stop."""
        if step != self.checkpoints.last:
            self._save(step, tree, notes)
        self.checkpoints.wait()
        self._check_failure(last_chance=True)

    def _agreed(self, step: int) -> list[bool]:
        """[stop, the clock asks for a save, a save failed], the same in all processes."""
        if processes.several() and step % self.agree_every:
            return [False, False, False]
        minutes = self.settings.checkpoint.minutes
        clock = bool(minutes) and time.time() - self._saved_at >= 60 * minutes
        return processes.any_of([bool(self.interrupts.received), clock, self.checkpoints.failure is not None])

    def _save(self, step: int, tree: Any, notes: dict[str, Any]) -> None:
        self.flush()
        self._count_skipped(self._skipped, jax.device_get([count for _, count, _ in self._skipped]))
        self._skipped = []
        best = self.best
        record = {
            "step": step,
            "best": None if best is None else best[0],
            "improvements": self._improvements,
            "skipped": self.skipped,
            "streak": self._streak,
            "metrics": self.last_metrics,
            "elapsed_s": time.time() - self.started,
            "notes": notes,
            "identity": self._identity,
            "run": self._about(),
            "lines": {log.path.name: log.count for log in (self._metrics, self._samples)},
        }
        if self.is_writer:
            self._metrics.sync()
            self._samples.sync()
        self.checkpoints.save(step, tree, record)
        self._saved_at = time.time()

    def _check_failure(self, *, last_chance: bool = False) -> None:
        (failed,) = processes.any_of([self.checkpoints.failure is not None])
        if not failed:
            return
        step, reason = self.checkpoints.failure or (self.checkpoints.last or 0, "by another process; see its output")
        self.checkpoints.failure = self.checkpoints.last = None
        self._improvements = [found for found in self._improvements if found[0] != step]
        kept = self.checkpoints.steps()
        where = f"the one of step {kept[-1]} is intact" if kept else "there is none before it"
        line = f"the checkpoint of step {step} could not be written ({reason}); {where}"
        if last_chance or self.settings.checkpoint.on_failure == "stop":
            raise UserError(f"{line}; free space or mend the permissions of {self.dir}, then {self.how_to_continue()}")
        self.say(f"{self.stage}: {line}; training continues")

    def how_to_continue(self) -> str:
        """What a user does to continue this run."""
        if self.given:
            return f"continue by the same call again ({', '.join(self.given)} came from Python)"
        return f"continue with: rlhf-jax resume {shlex.quote(str(self.dir))}"

    # --- the best evaluation

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, value) of the best evaluation so far."""
        return self._improvements[-1] if self._improvements else None

    def keep_if_best(self, step: int, value: float) -> bool:
        """Whether to keep the parameters of this evaluation: of the highest finite `value` so far, or the last.

        The next `save_if_due` saves them.
        """
        if not self.config.keep_best:
            return True
        if not math.isfinite(value) or (self.best is not None and value <= self.best[1]):
            return False
        self._improvements.append((step, value))
        return True

    def restore_best(self, like: Any) -> Any:
        """The arrays of `like`, a part of what was saved, of the best evaluation; as they are if it is the last one.

        `like` is freed if they are others.
        """
        self.checkpoints.wait()
        self._check_failure()
        while self.best is not None and self.best[0] != self.total:
            step = self.best[0]
            if processes.from_first(partial(self.checkpoints.holds, step, self.say)):
                return self.checkpoints.restore(step, like)
            self.say(
                f"{self.stage}: the weights of the best evaluation, of step {step}, are lost; taking the next best"
            )
            self._improvements.pop()
        return like

    # --- metrics

    def advance(self, step: int, skipped: jax.Array, updates: int = 1) -> None:
        """One step of the progress bar; `skipped` of its `updates` were not finite and changed nothing."""
        self._skipped.append((step, skipped, updates))
        self.bar.update(1)

    def log(
        self,
        step: int,
        metrics: Metrics,
        host: dict[str, float],
        *,
        tokens: int,
        table: Any = None,
        on_table: Callable[[Any], None] = print,
    ) -> None:
        """Device metrics and host numbers of a step; written when the next ones arrive, or at the end.

        `tokens` were processed since the last call. `table` (a pytree of device arrays) comes to the host in the same
        transfer and is handed to `on_table`.
        """
        pending = (step, tuple(metrics), pack(tuple(metrics.values())), host, tokens, table, on_table, self._skipped)
        self._skipped = []
        self.flush()
        self._pending = pending

    def flush(self) -> None:
        """Fetch and write the metrics that are still pending.

        Raises:
            UserError: no update was finite for faults.max_skipped steps.
        """
        if self._pending is None:
            return
        step, names, packed, host, tokens, table, on_table, skipped = self._pending
        self._pending = None
        values, table, counts = processes.to_host((packed, table, [count for _, count, _ in skipped]))
        now = time.time()
        host = {**host, "time/tokens_per_s": round(tokens / (now - self._since), 1)}
        self._since = now
        self.write(step, {**dict(zip(names, map(float, values), strict=True)), **host})
        if table is not None:
            on_table(table)
        self._count_skipped(skipped, counts)

    def _count_skipped(self, skipped: list[tuple[int, jax.Array, int]], counts: list[Any]) -> None:
        for (step, _, updates), count in zip(skipped, counts, strict=True):
            self.skipped += int(count)
            self._streak = self._streak + 1 if count >= updates else 0
            if self._streak == self.settings.faults.max_skipped > 0:
                self._stop_skipping(step)

    def _stop_skipping(self, step: int) -> NoReturn:
        good = [kept for kept in self.checkpoints.steps() if kept <= step - self._streak]
        where = f"the last checkpoint before is of step {good[-1]}" if good else "there is no checkpoint before"
        raise UserError(
            f"step {step}: loss or gradient was not finite in {self._streak} steps in a row (faults.max_skipped); "
            f"rows {', '.join(self.rows_of(step - 1))}; {where}; lower optim.learning_rate or find the operation with "
            "--faults.debug_nans true"
        )

    def report_nan(self, step: int, operation: str) -> NoReturn:
        """Stop at a step whose loss or gradient is not finite, because of `operation` (faults.debug_nans)."""
        self.flush()
        raise UserError(f"step {step}: {operation}; rows {', '.join(self.rows_of(step - 1))}")

    def restart_clock(self) -> None:
        """Leave what happened until now (an evaluation) out of time/tokens_per_s."""
        self._since = time.time()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write host numbers at once."""
        self.last_metrics = {**self.last_metrics, **metrics}
        if not self.is_writer:
            return
        row = {"step": step, "time/elapsed_s": round(time.time() - self.started, 3), **metrics}
        self._append(self._metrics, [row])
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        last = self.last_metrics
        self.bar.set_postfix({n.split("/")[-1]: f"{last[n]:.3g}" for n in self.shown if n in last})

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append rows, each a dict of text and numbers, to samples.jsonl."""
        if self.is_writer and rows:
            self._append(self._samples, [{"step": step, **row} for row in rows])

    def _append(self, log: Log, rows: list[dict[str, Any]]) -> None:
        try:
            log.add(rows)
            self._disk_full = False
        except OSError as error:
            text = f"{log.path} could not be written ({reason_of(error)})"
            if self.settings.checkpoint.on_failure == "stop":
                raise UserError(f"{text}; free space, then {self.how_to_continue()}") from error
            if not self._disk_full:
                self.say(f"{self.stage}: {text}; training continues, its lines are tried again with the next ones")
            self._disk_full = True

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json; the summary gains the wall time, the skipped updates and the step that was kept."""
        self.flush()
        if self.is_writer:
            for log in (self._metrics, self._samples):
                log.add([], sync=True)  # what a full disk had refused
        summary = {"stage": self.stage, **summary, "skipped": self.skipped}
        summary["wall_s"] = round(time.time() - self.started, 2)
        if self.best is not None:
            summary["best_step"] = self.best[0]
        self.checkpoints.wait()
        if self.is_writer:
            write_json(self.dir / directory.SUMMARY, summary)
            self._record("finished", step=self.total)
            if not self.settings.checkpoint.keep_finished:
                directory.drop_checkpoints(self.dir)
        self.bar.close()
        self.say(f"{self.stage}: done in {summary['wall_s']} s, written to {self.dir}")
        return summary
