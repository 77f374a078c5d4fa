"""The run directory on disk: what belongs to it, who writes there now, and which config may continue it. Floor 1.

Imports no jax, so that `rlhf-jax runs` answers at once.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import yaml

from rlhf_jax.config import ALWAYS_MAY_CHANGE, MAY_CHANGE, to_dict
from rlhf_jax.errors import UserError, tell

RECORD, LOCK, METRICS, SAMPLES, SUMMARY = "run.json", ".lock", "metrics.jsonl", "samples.jsonl", "summary.json"
CHECKPOINTS = "checkpoints"
OURS = (
    RECORD, "config.yaml", METRICS, SAMPLES, SUMMARY, "model", "value_model", CHECKPOINTS, "tensorboard", LOCK,
)  # fmt: skip
"""What a run writes; run.json comes first, since a directory without it is no run to continue."""

NOT_FINITE = ("nan", "inf", "-inf")
UNSEEN_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What JSON need not escape, but terminals, readers of lines and UTF-8 would have it; see `errors.UNSEEN`."""


def check_writable(directory: Path, what: str) -> None:
    """Raise a UserError, about `what`, if the directory or what is there of its parents cannot be written to."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{what}: {there} is a file, not a directory; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{what}: {there} cannot be written to; choose another place or its permissions")


def check_output_dir(stage: str, config: Any) -> dict[str, Any] | None:
    """The summary, if output_dir holds this very run and it is finished; None if the run may start or continue there.

    Touches nothing.

    Raises:
        UserError: it may not.
    """
    run = config.run
    if not run.output_dir:
        raise UserError("run.output_dir is empty; say where to write, as --run.output_dir runs/first")
    path = Path(run.output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"run.output_dir {path} is a file; choose a directory")
    check_writable(path, f"run.output_dir {path}")
    if run.tensorboard and find_spec("tensorboardX") is None:
        raise UserError("run.tensorboard is true, but tensorboardX is missing; pip install tensorboardX")
    check_inputs(config)
    if is_held(path):
        raise UserError(
            f"run.output_dir {path} is being written by {holder(path)}; stop that one or choose another directory"
        )
    found = [name for name in OURS if os.path.lexists(path / name) and name != LOCK]
    if run.overwrite or not found:
        return None
    record = read_record(path)
    if record is None:
        raise UserError(
            f"run.output_dir {path} holds another run ({found[0]}); choose another directory or pass "
            "--run.overwrite true"
        )
    check_same(stage, config, record)
    if record["status"] != "finished":
        return None
    if not changes(config, record):
        tell(f"{stage}: {path} is finished; --run.overwrite true would run it again")
        return json.loads((path / SUMMARY).read_text())
    if not (path / CHECKPOINTS).is_dir():
        raise UserError(
            f"run.output_dir {path} is finished and its checkpoints are gone; start a new run with model.path "
            f"{path / 'model'}, or set checkpoint.keep_finished true another time"
        )
    return None


def earlier_summary(
    command: str, config: Any, files: Sequence[str], made_of: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """The summary, if config.output_dir holds all `files` of this very command, which is then finished; else None.

    For commands whose directory is their own to lay out, with config.yaml and summary.json. `made_of` is what decides
    the outcome beside the config; the summary holds it too.

    Raises:
        UserError: the directory holds something else, or it cannot be written to.
    """
    if not config.output_dir:
        raise UserError("output_dir is empty; say where to write, as --output_dir runs/first")
    path = Path(config.output_dir)
    check_writable(path, f"output_dir {path}")
    found = [name for name in ("config.yaml", *files) if (path / name).exists()]
    if config.overwrite or not found:
        return None
    cure = "choose another directory or pass --overwrite true"
    text = (path / "config.yaml").read_text() if "config.yaml" in found else ""
    if not text.startswith(f"# rlhf-jax {command} "):
        raise UserError(f"output_dir {path} holds another run ({found[0]}); {cure}")
    differ = changes(config, {"config": as_json(yaml.safe_load(text))})
    if differ:
        shown = ", ".join(f"{name} {a} there, {b} here" for name, (a, b) in differ.items())
        raise UserError(f"output_dir {path} holds {command} with another config: {shown}; {cure}")
    if not all((path / name).exists() for name in files):
        return None
    summary = json.loads((path / SUMMARY).read_text())
    if made_of is not None and summary.get("made_of") != as_json(made_of):
        raise UserError(f"output_dir {path} holds {command} of other rows or functions; {cure}")
    tell(f"{command}: {path} is finished; --overwrite true would run it again")
    return summary


def check_inputs(config: Any) -> None:
    """Raise a UserError if the config reads something that starting its run would delete."""
    replaced = [(Path(config.run.output_dir) / name).resolve() for name in OURS]
    for option, value in flat(to_dict(config)):
        if isinstance(value, str) and value and any(Path(value).resolve().is_relative_to(path) for path in replaced):
            raise UserError(
                f"{option} {value} is part of the run that would be replaced; choose another run.output_dir"
            )


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as other programs read it too: every file of ours is written with this.

    A number that is not finite is null, and a neighbouring field says which it was: {"loss": null, "loss_is": "nan"};
    of a list the first one, {"losses": [0.5, null], "losses_is": "nan"}. Characters stay as they are, but those that
    are not seen, lone surrogates among them, are escaped.
    """
    options: dict[str, Any] = {"indent": indent, "allow_nan": False}
    try:
        text = json.dumps(value, ensure_ascii=False, **options)
    except ValueError:
        value, _ = _finite(value)
        text = json.dumps(value, ensure_ascii=False, **options)
    return UNSEEN_IN_JSON.sub(lambda c: f"\\u{ord(c[0]):04x}", text)


def _finite(value: Any) -> tuple[Any, str]:
    """(a value with null for numbers that are not finite, what the first was of those that no field of it says)."""
    if isinstance(value, float):
        return (value, "") if math.isfinite(value) else (None, str(value))
    if isinstance(value, (list, tuple)):
        parts = [_finite(item) for item in value]
        return [part for part, _ in parts], next((why for _, why in parts if why), "")
    if isinstance(value, dict):
        found: dict[Any, Any] = {}
        for name, item in value.items():
            found[name], why = _finite(item)
            if why:
                found.setdefault(f"{name}_is", why)
        return found, ""
    return value, ""


def from_json(text: str | bytes) -> Any:
    """What `to_json` was given, numbers that are not finite included (those within lists stay null)."""

    def restored(found: dict[str, Any]) -> dict[str, Any]:
        for name in [name for name in found if found[name] is None and found.get(f"{name}_is") in NOT_FINITE]:
            found[name] = float(found.pop(f"{name}_is"))
        return found

    return json.loads(text, object_hook=restored)


def as_json(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(to_json(value))


def plain(config: Any) -> dict[str, Any]:
    """A config as JSON gives it back."""
    return as_json(to_dict(config))


def changes(config: Any, record: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value of the recorded run, value now) of settings that matter and differ.

    Settings that the recorded version did not know are left out.
    """
    then, now = dict(flat(record["config"])), dict(flat(plain(config)))
    names = [name for name in then if name not in ALWAYS_MAY_CHANGE]
    found = {name: (then[name], now.get(name, "nothing")) for name in names}  # nothing: a group is null on one side
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def names_given(**arguments: Any) -> tuple[str, ...]:
    """The names of arguments that are not None: what the caller of a stage passed in Python."""
    return tuple(name for name, value in arguments.items() if value is not None)


def check_same(stage: str, config: Any, record: dict[str, Any]) -> None:
    """Raise a UserError, setting by setting, unless the config may continue the recorded run."""
    path = config.run.output_dir
    if record["stage"] != stage:
        raise UserError(
            f"run.output_dir {path} holds a run of {record['stage']}, not of {stage}; choose another directory or "
            "pass --run.overwrite true"
        )
    differ = changes(config, record)
    safe = [name for name in differ if name in MAY_CHANGE or f"{name.partition('.')[0]}." in MAY_CHANGE]
    unsafe = [name for name in differ if name not in safe]
    if not unsafe and (not safe or config.checkpoint.allow_changes):
        return
    shown = ", ".join(f"{name} {differ[name][0]} there, {differ[name][1]} here" for name in unsafe or safe)
    if unsafe:
        why, cure = "this cannot change within a run", "choose another directory or pass --run.overwrite true"
    else:
        why, cure = "this may change", "pass --checkpoint.allow_changes true, or --run.overwrite true to start anew"
    raise UserError(f"run.output_dir {path} holds a run with another config: {shown}; {why}; {cure}")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a kill leaves the old or the new one, whole."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read_record(path: Path) -> dict[str, Any] | None:
    """run.json: stage, config, cwd, given, status, step, total, note, updated; None if it is missing or broken."""
    try:
        record = json.loads((path / RECORD).read_text())
        return record if {"stage", "config", "status"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace run.json."""
    write_text(path / RECORD, to_json({**record, "updated": time.time()}, indent=1) + "\n")


def write_config(path: Path, stage: str, config: Any, option: str = "run.output_dir") -> None:
    """Replace config.yaml; `option` is what the command calls its directory."""
    header = f"# rlhf-jax {stage} --config {path / 'config.yaml'} --{option} ANOTHER\n"
    write_text(path / "config.yaml", header + yaml.safe_dump(to_dict(config), sort_keys=False))


def wipe(path: Path) -> None:
    """Make the directory, without what an earlier run wrote."""
    path.mkdir(parents=True, exist_ok=True)
    for name in (name for name in OURS if name != LOCK):  # this process holds the lock
        old = path / name
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)


def cut_after(path: Path, step: int) -> None:
    """Leave in a .jsonl file only the whole lines of steps up to `step`; what was there of later ones comes again."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short, or that we did not write
            continue
    write_text(path, "".join(kept))


class Lines:
    """Appends JSON objects to a file, a whole line each. What a full disk refuses is kept and tried again."""

    def __init__(self, path: Path):
        """`path` is made if it is not there."""
        self.path = path
        self.waiting = b""
        path.touch()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows.

        Raises:
            OSError: they are not on disk, but in memory, and go with the next ones.
        """
        if not rows and not self.waiting:
            return
        self.waiting += "".join(to_json(row) + "\n" for row in rows).encode()
        with open(self.path, "ab") as file:
            end = file.tell()
            try:
                file.write(self.waiting)
                file.flush()
            except OSError:
                os.truncate(self.path, end)  # no half a line
                raise
        self.waiting = b""

    def sync(self) -> None:
        """Have all lines reach the disk."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())


def hold(path: Path) -> IO[str]:
    """Claim a run directory for this process until the file is closed or the process ends, by kill -9 as well.

    Raises:
        UserError: another process holds it.
    """
    file = open(path / LOCK, "a+")  # noqa: SIM115 (it stays open)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(
            f"run.output_dir {path} is being written by {holder(path)}; stop that one or choose another directory"
        ) from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def is_held(path: Path) -> bool:
    """Whether another process has claimed the directory."""
    try:
        with open(path / LOCK) as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False


def holder(path: Path) -> str:
    """Who has claimed the directory, in words."""
    try:
        return (path / LOCK).read_text() or "another process"
    except OSError:
        return "another process"
