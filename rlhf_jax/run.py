"""The run directory: config.yaml, metrics.jsonl, samples.jsonl, summary.json, model/; written by process 0 only."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
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


def check_output_dir(config: RunConfig) -> None:
    """Raise a UserError unless a run may write to output_dir; touches nothing."""
    if not config.output_dir:
        raise UserError("run.output_dir is empty; say where to write, as --run.output_dir runs/first")
    path = Path(config.output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"run.output_dir {path} is a file; choose a directory")
    found = [name for name in OURS if (path / name).exists()]
    if found and not config.overwrite:
        raise UserError(
            f"run.output_dir {path} holds another run ({found[0]}); choose another directory or pass --run.overwrite true"
        )


class Run:
    """Where a stage reports. Metrics are fetched one step late, so that logging never stalls the devices."""

    def __init__(self, stage: str, config: Any, *, total: int, shown: tuple[str, ...] = ()):
        """Claim config.run.output_dir and write config.yaml; `shown` are the metrics on the progress bar."""
        check_output_dir(config.run)
        self.config, self.stage, self.shown = config.run, stage, shown
        self.dir = Path(config.run.output_dir)
        self.is_writer = jax.process_index() == 0
        self.started = self._since = time.time()
        self.last_metrics: dict[str, float] = {}
        self.best: tuple[int, float] | None = None
        self._pending: tuple[Any, ...] | None = None
        self._writer: Any = None
        if self.is_writer:
            self._prepare(config)
        self.bar = tqdm(total=total, desc=stage, disable=not (config.run.progress and self.is_writer), dynamic_ncols=True)

    def _prepare(self, config: Any) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        for name in OURS:
            path = self.dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        header = f"# rlhf-jax {self.stage} --config {self.dir / 'config.yaml'} --run.output_dir ANOTHER\n"
        (self.dir / "config.yaml").write_text(header + yaml.safe_dump(to_dict(config), sort_keys=False))
        for name in ("metrics.jsonl", "samples.jsonl"):
            (self.dir / name).touch()
        if self.config.tensorboard:
            self._writer = make_tensorboard(self.dir / "tensorboard")

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_writer:
            tqdm.write(text)

    def advance(self) -> None:
        """One step of the progress bar."""
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
        self.bar.set_postfix({n.split("/")[-1]: f"{self.last_metrics[n]:.3g}" for n in self.shown if n in self.last_metrics})

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append rows, each a dict of text and numbers, to samples.jsonl."""
        if self.is_writer:
            with open(self.dir / "samples.jsonl", "a") as file:
                for row in rows:
                    file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")

    def keep_if_best(self, step: int, value: float, params: Any) -> bool:
        """Whether these parameters are to be kept: those with the highest `value` so far, which go to disk, or the last."""
        if not self.config.keep_best:
            return True
        if self.best is not None and value <= self.best[1]:
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
        summary = {"stage": self.stage, **summary, "wall_s": round(time.time() - self.started, 2)}
        if self.best is not None:
            summary["best_step"] = self.best[0]
        if self.is_writer:
            (self.dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
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


def make_tensorboard(path: Path) -> Any:
    """A TensorBoard writer. Raises UserError where tensorboardX is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise UserError("run.tensorboard is true, but tensorboardX is missing; pip install tensorboardX") from error
    return SummaryWriter(str(path))
