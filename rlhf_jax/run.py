"""The run directory: config.yaml, metrics.jsonl, samples.jsonl, summary.json, model/; written by process 0 only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from tqdm import tqdm

from rlhf_jax import checkpoint
from rlhf_jax.config import RunConfig, to_dict
from rlhf_jax.errors import UserError
from rlhf_jax.types import Metrics

OURS = ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "model", "value_model", "best", "tensorboard")


BARS: weakref.WeakSet[tqdm] = weakref.WeakSet()


def close_bars() -> None:
    """End the progress bars that an error or Ctrl-C left open, so that a message gets a line of its own."""
    for bar in BARS:
        bar.close()


def check_output_dir(config: RunConfig) -> None:
    """Raise a UserError unless a run may write to output_dir; touches nothing."""
    if not config.output_dir:
        raise UserError("run.output_dir is empty; say where to write, as --run.output_dir runs/first")
    path = Path(config.output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"run.output_dir {path} is a file; choose a directory")
    found = [name for name in OURS if os.path.lexists(path / name)]
    if found and not config.overwrite:
        raise UserError(
            f"run.output_dir {path} holds another run ({found[0]}); choose another directory or pass "
            "--run.overwrite true"
        )
    check_writable(path, f"run.output_dir {path}")
    if config.tensorboard and find_spec("tensorboardX") is None:
        raise UserError("run.tensorboard is true, but tensorboardX is missing; pip install tensorboardX")


def check_writable(directory: Path, what: str) -> None:
    """Raise a UserError, about `what`, if the directory or what is there of its parents cannot be written to."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{what}: {there} is a file, not a directory; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{what}: {there} cannot be written to; choose another place or its permissions")


def check_inputs(config: Any) -> None:
    """Raise a UserError if the config reads something that starting its run would delete."""
    replaced = [(Path(config.run.output_dir) / name).resolve() for name in OURS]
    for option, value in texts(to_dict(config)):
        if value and any(Path(value).resolve().is_relative_to(path) for path in replaced):
            raise UserError(
                f"{option} {value} is part of the run that would be replaced; choose another run.output_dir"
            )


def texts(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of every text in nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from texts(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield prefix + name, value


class Run:
    """Where a stage reports. Metrics are fetched one step late, so that logging never stalls the devices."""

    def __init__(self, stage: str, config: Any, *, total: int, shown: tuple[str, ...] = ()):
        """Claim config.run.output_dir and write config.yaml; `shown` are the metrics on the progress bar."""
        self.config, self.stage, self.shown = config.run, stage, shown
        self.dir = Path(config.run.output_dir)
        self.is_writer = jax.process_index() == 0
        self.started = self._since = time.time()
        self.last_metrics: dict[str, float] = {}
        self.best: tuple[int, float] | None = None
        self._pending: tuple[Any, ...] | None = None
        self._writer: Any = None
        if self.is_writer:
            check_output_dir(config.run)
            check_inputs(config)
            self._prepare(config)
        self._catch_interrupts()
        shows = config.run.progress and self.is_writer
        self.bar = tqdm(total=total, desc=stage, disable=not shows, dynamic_ncols=True)
        BARS.add(self.bar)

    def _prepare(self, config: Any) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            for name in OURS:
                path = self.dir / name
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"run.output_dir {self.dir}: {error.strerror}; choose another place") from error
        header = f"# rlhf-jax {self.stage} --config {self.dir / 'config.yaml'} --run.output_dir ANOTHER\n"
        (self.dir / "config.yaml").write_text(header + yaml.safe_dump(to_dict(config), sort_keys=False))
        for name in ("metrics.jsonl", "samples.jsonl"):
            (self.dir / name).touch()
        if self.config.tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self.dir / "tensorboard"))

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_writer:
            tqdm.write(text)

    def _catch_interrupts(self) -> None:
        """Remember a Ctrl-C: inside a callback of a library its KeyboardInterrupt would be swallowed for good."""
        self._interrupted = False

        def remember(*_: Any) -> None:
            self._interrupted = True
            raise KeyboardInterrupt

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, remember)

    def advance(self) -> None:
        """One step of the progress bar; raises a KeyboardInterrupt that was swallowed before."""
        if self._interrupted:
            raise KeyboardInterrupt
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

        `tokens` were processed since the last call, for time/tokens_per_s. `table` (a pytree of device arrays) comes
        to the host in the same transfer and is handed to `on_table`.
        """
        pending = (step, tuple(metrics), pack(tuple(metrics.values())), host, tokens, table, on_table)
        self.flush()
        self._pending = pending

    def flush(self) -> None:
        """Fetch and write the metrics that are still pending."""
        if self._pending is None:
            return
        step, names, packed, host, tokens, table, on_table = self._pending
        self._pending = None
        values, table = jax.device_get((packed, table))
        now = time.time()
        host = {**host, "time/tokens_per_s": round(tokens / (now - self._since), 1)}
        self._since = now
        self.write(step, {**dict(zip(names, map(float, values), strict=True)), **host})
        if table is not None:
            on_table(table)

    def restart_clock(self) -> None:
        """Leave what happened until now (an evaluation) out of time/tokens_per_s."""
        self._since = time.time()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write host numbers at once."""
        self.last_metrics = {**self.last_metrics, **metrics}
        if not self.is_writer:
            return
        line = {"step": step, "time/elapsed_s": round(time.time() - self.started, 3), **metrics}
        with open(self.dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        last = self.last_metrics
        self.bar.set_postfix({n.split("/")[-1]: f"{last[n]:.3g}" for n in self.shown if n in last})

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append rows, each a dict of text and numbers, to samples.jsonl."""
        if self.is_writer:
            with open(self.dir / "samples.jsonl", "a") as file:
                for row in rows:
                    file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")

    def keep_if_best(self, step: int, value: float, params: Any) -> bool:
        """Whether to keep these parameters: those of the highest `value` so far, which go to disk, or the last."""
        if not self.config.keep_best:
            return True
        if self.best is not None and not value > self.best[1]:  # a NaN is never better
            return False
        self.best = (step, value)
        checkpoint.save(self.dir / "best", params)
        return True

    def best_params(self, params: Any) -> Any:
        """The parameters of the best evaluation; the given ones if none was kept. Removes the copy on disk."""
        if self.best is None:
            return params
        restored = checkpoint.restore(self.dir / "best", params)
        if self.is_writer:
            shutil.rmtree(self.dir / "best")
        return restored

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json and close; the summary gains the wall time and the step that was kept."""
        self.flush()
        self.bar.close()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        summary = {"stage": self.stage, **summary, "wall_s": round(time.time() - self.started, 2)}
        if self.best is not None:
            summary["best_step"] = self.best[0]
        if self.is_writer:
            (self.dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            print(f"{self.stage}: done in {summary['wall_s']} s, written to {self.dir}")
        if self._writer is not None:
            self._writer.close()
        return summary


@jax.jit
def pack(values: tuple[jax.Array, ...]) -> jax.Array:
    """Scalars as one float32 array, so that they leave the device in one transfer."""
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in values])


def fetch_scalars(metrics: Metrics) -> dict[str, float]:
    """Metrics on the host, in one transfer."""
    return dict(zip(metrics, map(float, jax.device_get(pack(tuple(metrics.values())))), strict=True))
