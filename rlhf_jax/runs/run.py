"""A run as its stage sees it: the directory, checkpoints, interruptions, the end.

Files are written by process 0 only, but the arrays of a checkpoint, which every process writes its part of.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import jax
import numpy as np

from rlhf_jax.config import StageArgs, resolve
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.hosts import buckets, clock, processes
from rlhf_jax.hosts.files import write_json
from rlhf_jax.hosts.interrupts import Interrupts
from rlhf_jax.runs import directory, progress
from rlhf_jax.runs.best import Best
from rlhf_jax.runs.checkpoint import Checkpoints, Tree, reason_of
from rlhf_jax.runs.metrics import RunMetrics
from rlhf_jax.runs.outcome import not_seen, nothing_learned
from rlhf_jax.runs.push import model_card, push
from rlhf_jax.runs.report import write_beside
from rlhf_jax.runs.skips import Skips


class Run(contextlib.AbstractContextManager["Run"]):
    """Where a stage reports and saves.

        with Run("sft", config, total=steps) as out:
            state, notes = out.restore(state, identity)      # of the newest checkpoint, if the run was here before
            for i in range(out.start, steps):
                ...
                out.save_if_due(i + 1, state, notes)         # raises Stopped after Ctrl-C and SIGTERM
            out.finish(summary)

    Attributes:
        start: steps done when this process took over; 0 in a new run.
        resumed: whether a checkpoint was found.
    """

    def __init__(
        self,
        stage: str,
        config: StageArgs,
        *,
        total: int,
        shown: tuple[str, ...] = (),
        given: tuple[str, ...] = (),
        files: Mapping[str, str] | None = None,
        agree_every: int = 10,
        of_runs: bool = False,
    ):
        """Claim config.run.output_dir and find where to continue.

        `shown` are the metrics on the progress bar; `given` names what the caller passed in Python, which
        `rlhf-jax resume` cannot know. `files` are the contents of the config, as `claim_directory` returns them.
        Several processes ask one another every `agree_every` steps whether to save or stop: it waits for the devices.
        A step of a run `of_runs` is one that trains and traces its own steps.
        """
        self.settings, self.config, self.stage, self.total = config, config.run, stage, total
        self.dir, self.given, self.agree_every = Path(config.run.output_dir), given, agree_every
        self.is_writer = processes.is_first()
        self._files, self._identity = dict(files or {}), dict[str, object]()
        keep = config.checkpoint
        place = self.dir / directory.CHECKPOINTS
        self.checkpoints = Checkpoints(place, keep_last=keep.keep_last, keep_every=keep.keep_every)
        self.skips = Skips(config.faults.max_skipped, self.checkpoints)
        self.best = Best(choose=config.run.keep_best)
        said = self.say, self.how_to_continue()
        self.metrics = RunMetrics(config, stage, shown, self.skips, *said, traced=not of_runs)
        self._lock: BinaryIO | None = None
        self._unsaved: tuple[int, object, Mapping[str, object]] | None = None  # the end, for which nothing was due
        step = self._take()
        self.checkpoints.last = step
        self.resumed, self.start = step is not None, step or 0
        if self.checkpoints.copy is None:
            processes.check_shared(self.dir / directory.RECORD, f"run.output_dir {self.dir}")
        self._saved_at = time.time()
        self.interrupts = Interrupts(self.say)
        self.metrics.start(self.start, total)

    def _take(self) -> int | None:
        """Hold the directory and make its files ready; the step to continue after, if any."""
        try:
            goes_on, about = processes.from_first(self._claim)
            step = self.checkpoints.newest_intact(self.say) if goes_on else None
            if step is not None and step > self.total:
                raise UserError(
                    f"run.output_dir {self.dir} has done {step} steps, more than the {self.total} that are asked for; "
                    "ask for as many or more, or choose another directory"
                )
            processes.from_first(partial(self._begin, step))
        except BaseException as error:
            if self._lock is not None:
                self._lock.close()
            if not isinstance(error, OSError):
                raise
            raise UserError(f"run.output_dir {self.dir}: {reason_of(error)}; choose another place") from error
        if goes_on:
            where = "no checkpoint, starting anew" if step is None else f"continuing after step {step} of {self.total}"
            self.say(f"{self.stage}: {self.dir}: {where}{about}")
        return step

    def _claim(self) -> tuple[bool, str]:
        """Hold the directory: whether a run goes on there, and what is to be said of it. Process 0."""
        directory.check_output_dir(self.stage, self.settings, self.given, self._files)
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = directory.claim(self.dir)
        record = directory.read_record(self.dir) or {"status": directory.VOID}
        if record["status"] == directory.VOID or self.config.overwrite:
            return False, ""
        changes = directory.changes(self.settings, record).items()
        changed = "".join(f", {name} {now} in place of {then}" for name, (then, now) in changes)
        return True, changed + f" ({directory.RECORD} was broken)" * ("recovered" in record)

    def _begin(self, step: int | None) -> None:
        """Make the files ready, which the bucket then has, if the run is in one. Process 0."""
        if step is None:
            directory.wipe(self.stage, self.dir)
        directory.write_config(self.dir, self.stage, self.settings)
        self.metrics.prepare(step)
        self._record("running", step or 0)
        if (copy := self.checkpoints.copy) is not None:
            with buckets.asked(copy.url):
                copy.push()

    def _record(self, status: str, step: int, note: str = "") -> None:
        directory.write_record(self.dir, {**self._about(), "status": status, "note": note, "step": step})

    def _about(self) -> directory.Record:
        """What run.json and every checkpoint say of the run."""
        about = {"stage": self.stage, "total": self.total, "given": list(self.given), "cwd": str(Path.cwd())}
        return {**about, "time": clock.time(), "files": self._files, "config": directory.plain(self.settings)}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the save under way, put the signal handlers back, say in run.json how it ended."""
        if error is None or isinstance(error, (Stopped, UserError)) or not processes.several():
            self.checkpoints.wait()  # else it may need a process that has gone
        self.interrupts.close()
        self.metrics.close()
        full = isinstance(error, OSError) or ("No space left" in str(error) and not isinstance(error, UserError))
        if full:
            self._save_unsaved()
        if self._lock is not None:
            with self._lock, contextlib.suppress(OSError):  # which may be what the error is about
                if error is not None:
                    status = "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else "failed"
                    self._record(status, (self.checkpoints.steps() or [0])[-1], f"{type(error).__name__}: {error}")
        if full:
            where, reason = getattr(error, "filename", None) or self.dir, reason_of(error or OSError())
            raise UserError(f"{where}: {reason}; mend that, then {self.how_to_continue()}") from error

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_writer:
            progress.write(text)

    def restore(self, tree: Tree, identity: Mapping[str, object]) -> tuple[Tree, dict[str, Any]]:
        """The arrays of `tree` and the notes of `save_if_due` as the checkpoint has them; in a new run `tree` and {}.

        `tree` is freed if there is a checkpoint. `identity` (name -> JSON value) is what must not have changed since:
        the cursors of the data, digests of frozen models.

        Raises:
            UserError: it has changed.
        """
        self._identity = directory.as_json(identity)
        if not self.resumed:
            return tree, {}
        record = processes.from_first(partial(self.checkpoints.record, self.start))
        for name, value in self._identity.items():
            then = record["identity"].get(name)
            if then != value:
                raise UserError(
                    f"{self.dir} cannot be continued: the {name} are not those that it started with ({then} there, "
                    f"{value} here); give the same again or choose another run.output_dir"
                )
        self.best.restore(record["improvements"])
        self.metrics.restore(record, self.start)
        tree = self.checkpoints.restore(self.start, tree)
        self._saved_at = time.time()
        self.metrics.parts.mark("start")
        return tree, record["notes"]

    def save_if_due(self, step: int, tree: object, notes: Mapping[str, object] | None = None) -> None:
        """Save `tree` (arrays), `notes` (JSON) and the run's own state after `step`, in the background, if it is time.

        Raises:
            Stopped: a signal came; all is saved.
            UserError: a save failed, and checkpoint.on_failure is stop or there is no later chance.
        """
        keep = self.settings.checkpoint
        stop, clock, failed = self._agreed(step)
        counts = any(every and step and step % every == 0 for every in (keep.every, keep.keep_every))
        due = stop or clock or counts or self.best.step == step if step < self.total else keep.keep_finished
        if failed:
            self._check_failure()
        if due:
            self._save(step, tree, notes or {})
        elif step == self.total:
            self._unsaved = step, tree, notes or {}
        if stop and step < self.total:
            self.save_now(step, tree, notes or {})
            raise Stopped(
                f"{self.stage}: stopped by {self.interrupts.received or 'a signal'} after step {step} of {self.total} "
                f"and saved; {self.how_to_continue()}",
                self.config.exit_code_when_stopped,
            )

    def save_now(self, step: int, tree: object, notes: Mapping[str, object]) -> None:
        """Save after `step` and wait for it, because the run is about to stop."""
        self._save(step, tree, notes)
        self.checkpoints.wait()
        self._check_failure(last_chance=True)
        self.checkpoints.settle()

    def _save_unsaved(self) -> None:
        """Save the last step of a run that could not write what comes after it, so that nothing is trained again.

        If it still can: the disk may have no room for that either.
        """
        if self._unsaved is None or processes.several():
            return
        with contextlib.suppress(UserError, OSError):
            self.save_now(*self._unsaved)
            self.say(f"{self.stage}: saved after step {self._unsaved[0]} of {self.total}")

    def _agreed(self, step: int) -> list[bool]:
        """[stop, the clock asks for a save, a save failed], the same in all processes."""
        if processes.several() and step % self.agree_every:
            return [False, False, False]
        minutes = self.settings.checkpoint.minutes
        clock = bool(minutes) and time.time() - self._saved_at >= 60 * minutes
        return processes.any_of([bool(self.interrupts.received), clock, self.checkpoints.failure is not None])

    def _save(self, step: int, tree: object, notes: Mapping[str, object]) -> None:
        if step == self.checkpoints.last:
            return
        self.metrics.flush()
        record = {
            "step": step,
            "best": self.best.step,
            "improvements": self.best.improvements,
            "skipped": self.skips.total,
            "empty": self.skips.empty,
            "streak": self.skips.streak,
            "metrics": self.metrics.last,
            "extremes": self.metrics.extremes,
            "elapsed_s": self.metrics.elapsed(),
            "notes": notes,
            "identity": self._identity,
            "run": self._about(),
            "lines": self.metrics.sync(),
        }
        self.checkpoints.save(step, tree, record)
        self._saved_at = time.time()

    def _check_failure(self, *, last_chance: bool = False) -> None:
        (failed,) = processes.any_of([self.checkpoints.failure is not None])
        if not failed:
            return
        step, reason = self.checkpoints.failure or (self.checkpoints.last or 0, "by another process; see its output")
        self.checkpoints.failure = self.checkpoints.last = None
        self.checkpoints.drop(step)
        self.best.forget(step)
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

    def restore_best(self, like: Tree) -> Tree:
        """The arrays of `like`, a part of what was saved, of the best evaluation; as they are if it is the last one.

        `like` is freed if they are others; the host keeps those of the last step until what comes after it is written.
        """
        self.checkpoints.wait()
        self._check_failure()
        while (step := self.best.step) not in (None, self.total):
            self.checkpoints.settle()
            if self.checkpoints.holds(step, self.say):
                break
            self.say(
                f"{self.stage}: the weights of the best evaluation, of step {step}, are lost; taking the next best"
            )
            self.best.forget(step)
        else:
            return like
        if self._unsaved is not None and not processes.several():
            last, tree, notes = self._unsaved
            going = set(map(id, jax.tree.leaves(like)))
            self._unsaved = last, jax.tree.map(lambda x: np.asarray(x) if id(x) in going else x, tree), notes
        return self.checkpoints.restore(step, like)

    def calibration(self, config: StageArgs, width: int = 2) -> dict[str, Any]:
        """{"calibration": what programs took over what they should}, of the config as it was run; {} if not asked for.

        `width` is how many responses rankings had room for.

        A summary that says why not is better than a run that fails at its end.
        """
        if not self.config.calibrate:
            return {}
        self.metrics.flush()
        self.metrics.parts.take(self.metrics.parts.marked)
        self.metrics.bar.doing("calibrating")
        self._unsaved = None  # its arrays would take the room of what is measured
        of_run = resolve("rlhf_jax.commands.plan.calibration:of_run")  # by name, as it stands above all stages
        try:
            fill = min(self.metrics.last.get("data/filled", 1.0), 1.0)
            return {"calibration": of_run(config, self.metrics.parts.usual(), fill, width)}
        except (UserError, RuntimeError) as error:  # that of XLA, too
            return {"calibration": {"none": str(error)}}

    def finish(
        self, summary: Mapping[str, object], remarks: Sequence[str] = (), step: int | None = None
    ) -> directory.Summary:
        """Write summary.json; the summary gains the wall time, idle updates and the step that was kept.

        `step` is the last one, where a run ended before its total.
        It ends with the `remarks` and with what the metrics say against the run, if there is any such thing.
        """
        self.metrics.finish()
        self.metrics.bar.doing("writing the summary")
        summary = {"stage": self.stage, **summary, "skipped": self.skips.total, "empty": self.skips.empty}
        summary["wall_s"] = round(self.metrics.elapsed(), 2)
        if self.best.step is not None:
            summary["best_step"] = self.best.step
        extremes = self.metrics.extremes
        remarks = [*remarks, *self.skips.remarks(), *nothing_learned(extremes), *not_seen(extremes)]
        self.checkpoints.wait()
        if self.settings.checkpoint.keep_finished:
            self.checkpoints.settle()
        if self.config.push_to_hub and self.is_writer:
            remarks += self._push(summary)
        if remarks:
            summary["remarks"] = remarks
        if self.is_writer:
            write_json(self.dir / directory.SUMMARY, summary)
            self._record("finished", self.total if step is None else step)
            if not self.settings.checkpoint.keep_finished:
                directory.drop_checkpoints(self.dir)
            if self.config.report:
                self.metrics.bar.doing("writing the report")
                remarks = [*remarks, *filter(None, [write_beside(self.dir)])]
        self.metrics.bar.close()
        self.say(f"{self.stage}: done in {summary['wall_s']} s, written to {self.dir}")
        for remark in remarks:
            self.say(f"! {remark}")
        return summary

    def _push(self, summary: directory.Summary) -> list[str]:
        """Upload the model, which the summary then says; a remark if that failed, since the run has finished."""
        self.metrics.bar.doing("pushing the model")
        name, model = self.config.push_to_hub, self.dir / "model"
        card = model_card(name, self.stage, directory.plain(self.settings), summary)
        command = f"rlhf-jax convert {shlex.quote(str(model))} --dtype float32 --push {name}"
        try:
            summary["pushed"] = push(model, name, card, f"{model} is whole; push it with {command}")
        except UserError as error:
            return [str(error)]
        return []
