"""`rlhf-jax resume` and `rlhf-jax runs`: run directories from outside. Imports no jax."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from rlhf_jax.errors import UserError, named, tell
from rlhf_jax.hosts.buckets import in_bucket, trimmed
from rlhf_jax.hosts.json_text import from_json
from rlhf_jax.runs.directory import CONFIG, METRICS, RECORD, VOID, check_name, is_held, read_record, write_config
from rlhf_jax.runs.heads import begun, glance, runs_below

SHOWN = ("loss/nll", "loss/pairwise", "rollout/reward", "rollout/kl", "eval/total", "eval/accuracy", "eval/objective")
"""Metrics in the list, as far as a run has them."""


def resume(directory: str, options: list[str]) -> tuple[str, list[str]]:
    """The command and its arguments that continue a run; changes to the working directory that it was started in.

    Raises:
        UserError: it holds no run, or one that took something from Python.
    """
    remote = in_bucket(directory)
    path = glance(trimmed(directory))[0] if remote else Path(directory).absolute()
    record = read_record(path)
    if remote and record is not None and not begun(directory):
        raise UserError(
            f"{directory} holds no run that goes on there: its files were copied, or are those of a quickstart; copy "
            "them to a disk and resume that, or go on with the quickstart"
        )
    if record is None or record["status"] == VOID:
        if remote:
            runs_below(trimmed(directory))  # where nothing lies at all it says so
        raise UserError(f"{directory} holds no run ({RECORD} is missing or broken); `rlhf-jax runs` lists runs")
    check_name(path, directory)
    if not (path / CONFIG).is_file():
        write_config(path, record["stage"], record["config"])
    if record["given"]:
        raise UserError(
            f"{directory} got {', '.join(record['given'])} from Python, which no file holds; call "
            f"{record['stage']}.run with them and the same config again"
        )
    if Path(record["cwd"]).is_dir():
        os.chdir(record["cwd"])
    place = directory if remote else str(path)
    config = ["--config", str(path / CONFIG), "--run.output_dir", place, "--run.overwrite", "false"]
    return record["stage"], [*config, *options]


def last_metrics(path: Path) -> dict[str, float]:
    """The newest value of every metric near the end of metrics.jsonl, and "step"."""
    newest: dict[str, float] = {}
    try:
        with open(path / METRICS, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 65536, 0))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in lines:
        with contextlib.suppress(ValueError):  # the first one is cut, and the last one may be under way
            said = from_json(line)
            newest |= said if isinstance(said, dict) else {}
    return newest


def describe(path: Path, *, held: bool | None = None) -> list[str]:
    """One row of the list. Status is running, finished, stopped (by a signal, saved), failed, or crashed (killed).

    `held` says of a copy whether a process writes what it is a copy of.
    """
    record = read_record(path)
    if record is None:
        return [str(path), "?", "unreadable", "", "", ""]
    ended = "crashed" if record["status"] in ("running", VOID) else record["status"]
    status = "running" if (is_held(path) if held is None else held) else ended
    metrics = last_metrics(path)
    values = [f"{name.split('/')[-1]} {metrics[name]:.4g}" for name in SHOWN if name in metrics]
    newest = written(path, copied=held is not None)
    step = f"{metrics.get('step', record['step'])}/{record['total']}"
    since = max(time.time() - newest, 0)
    size, unit = next((each for each in ((86400, "d"), (3600, "h"), (60, "min")) if since >= each[0]), (1, "s"))
    return [named(path), record["stage"], status, step, f"{since / size:.0f} {unit}", ", ".join(values)]


def below(path: Path) -> set[Path]:
    """The run directories at or below a directory, up to three levels down."""
    return {file.parent for depth in ("", "*/", "*/*/", "*/*/*/") for file in path.glob(depth + RECORD)}


def written(path: Path, *, copied: bool = False) -> float:
    """When a run wrote last; of a run that is `copied` run.json says it."""
    if copied:
        return float((read_record(path) or {}).get("updated", 0.0))
    return max((file.stat().st_mtime for file in (path / RECORD, path / METRICS) if file.exists()), default=0.0)


def show(directory: str = "runs") -> None:
    """Print the runs at or below a directory, up to three levels down, the one written last at the end.

    Raises:
        UserError: no such directory.
    """
    root = Path(directory)
    if in_bucket(directory):
        found = [glance(url) for url in runs_below(trimmed(directory))]
        found = sorted(
            (each for each in found if (each[0] / RECORD).exists()), key=lambda each: written(each[0], copied=True)
        )
        made = [describe(path, held=bool(holder)) for path, holder in found]
    elif root.is_dir():
        made = [describe(path) for path in sorted(below(root), key=lambda path: (path / RECORD).stat().st_mtime)]
    else:
        raise UserError(f"{directory} is no directory; write rlhf-jax runs DIR")
    if not made:
        tell(f"no runs in {directory}")
        return
    rows = [["run", "stage", "status", "step", "written", "last metrics"], *made]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        tell("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
