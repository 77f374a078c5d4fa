"""The run directory on disk: what belongs to it, who writes there now, and which config may continue it.

Imports no jax, so that `rlhf-jax runs` answers at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from rlhf_jax.config import ALWAYS_MAY_CHANGE, MAY_CHANGE, EvaluateArgs, QuickstartArgs, StageArgs, to_dict
from rlhf_jax.config.functions import flat, texts
from rlhf_jax.config.settings import Settings
from rlhf_jax.errors import UserError, named, printable, reason, tell
from rlhf_jax.hosts import yamls
from rlhf_jax.hosts.files import check_writable, hold, read_text, replace_file, write_json
from rlhf_jax.hosts.json_text import JsonObject, to_json
from rlhf_jax.runs.loggers import check_loggers
from rlhf_jax.runs.push import check_repository

RECORD, LOCK, METRICS, SAMPLES, SUMMARY = "run.json", ".lock", "metrics.jsonl", "samples.jsonl", "summary.json"
REPORT = "report.html"
RESPONSES, SCORED = "responses.jsonl", "scored.jsonl"
"""Rows of an evaluation of models, and of one of a reward."""
CONFIG, CHECKPOINTS, PROFILE = "config.yaml", "checkpoints", "profile"
RECIPE = "recipe.json"
"""What a recipe says of its stages; beside it lie their directories."""
OURS = (
    RECORD, CONFIG, METRICS, SAMPLES, SUMMARY, "model", "value_model", CHECKPOINTS, "tensorboard",
    "wandb", "mlflow", PROFILE, REPORT, LOCK,
)  # fmt: skip
"""What a run writes."""

Record = JsonObject
"""What run.json holds, or a checkpoint's record says of its run; see `read_record`."""

Summary = JsonObject
"""What summary.json holds: how a run or command ended."""


VOID = "void"
"""Status of a run that is being deleted; whoever comes next starts anew."""


def check_name(path: Path, what: str) -> None:
    """Raise a UserError, about `what`, if a path is one that files of text or orbax's checkpoints cannot hold."""
    name = str(path.absolute())
    if printable(name) != name or "\\" in name or "[" in name:
        odd = "control characters or bytes that are no UTF-8" if printable(name) != name else "\\ or ["
        raise UserError(f"{what}: its path has {odd}, below which no run can be saved; choose another name")


def check_output_dir(
    stage: str, config: StageArgs, given: Sequence[str] | None = None, files: Mapping[str, str] | None = None
) -> Summary | None:
    """The summary, if output_dir holds this very run and it is finished; None if the run may start or continue there.

    Touches nothing, but checkpoints that a kill has left in a finished run. `given` names what the caller passed in
    Python, `files` are the `contents` of the config.

    Raises:
        UserError: it may not.
    """
    run = config.run
    if not run.output_dir:
        raise UserError("run.output_dir is empty; say where to write, as --run.output_dir runs/first")
    path = Path(run.output_dir)
    check_name(path, f"run.output_dir {path}")
    if path.exists() and not path.is_dir():
        raise UserError(f"run.output_dir {path} is a file; choose a directory")
    check_writable(path, f"run.output_dir {path}")
    check_loggers(run.loggers)
    check_inputs(stage, config)
    if is_held(path):
        raise in_use(path)
    if run.push_to_hub:
        check_repository(run.push_to_hub, "run.push_to_hub")
    there = [name for name in OURS if os.path.lexists(path / name) and name != LOCK]
    record = read_record(path)
    if run.overwrite or not there or (record is not None and record["status"] == VOID):
        return None
    if record is None:
        raise UserError(
            f"run.output_dir {path} holds another run ({there[0]}); choose another directory or pass "
            "--run.overwrite true"
        )
    same = check_same(stage, config, record, given, files)
    if record["status"] != "finished":
        return None
    if not record["config"].get("checkpoint", {}).get("keep_finished"):
        drop_checkpoints(path)
    if same:
        tell(f"{stage}: {path} is finished; --run.overwrite true would run it again")
        return read_summary(path, "--run.overwrite true")
    if not steps_in(path / CHECKPOINTS):
        raise UserError(f"run.output_dir {path} {gone(path)}")
    return None


def gone(path: Path) -> str:
    """Says that a finished run cannot be continued, and what trains its model on instead."""
    model, other = (shlex.quote(str(place)) for place in (path / "model", f"{path}-more"))
    return (
        "is finished and its checkpoints are gone; to train its model on, give the same command with --model.path "
        f"{model} --model.arch null --run.output_dir {other} (checkpoint.keep_finished true would have kept them)"
    )


def earlier_summary(
    command: str,
    config: QuickstartArgs | EvaluateArgs,
    files: Sequence[str],
    made_of: Mapping[str, object] | None = None,
    lines: Callable[[Summary], object] | None = None,
) -> Summary | None:
    """The summary, if config.output_dir holds all `files` of this very command, which is then finished; else None.

    For commands whose directory is their own to lay out, with config.yaml and summary.json. `made_of` is what decides
    the outcome beside the config; the summary holds it too. `lines` is what will print the summary.

    Raises:
        UserError: the directory holds something else, or it cannot be written to.
    """
    if not config.output_dir:
        raise UserError("output_dir is empty; say where to write, as --output_dir runs/first")
    path = Path(config.output_dir)
    check_name(path, f"output_dir {path}")
    check_writable(path, f"output_dir {path}")
    other = next((name for name in (RECORD, RECIPE) if (path / name).exists()), "")
    if other and (object_in(path / other) or {}).get("status") != VOID:
        raise UserError(f"output_dir {path} holds a run or a recipe ({other}); choose another directory, or one below")
    there = [name for name in (CONFIG, *files) if (path / name).exists()]
    if config.overwrite or not there:
        return None
    cure = "choose another directory or pass --overwrite true"
    text = read_text(path / CONFIG) if CONFIG in there else ""
    if not text.startswith(f"# rlhf-jax {command} "):
        raise UserError(f"output_dir {path} holds another run ({there[0]}); {cure}")
    then = yamls.read(text, str(path / CONFIG), yamls.Values)
    if not isinstance(then, dict):
        raise UserError(f"output_dir {path}: config.yaml holds no settings; {cure}")
    differ = changes(config, {"config": as_json(then)})
    if differ:
        shown = ", ".join(f"{name} {a} there, {b} here" for name, (a, b) in differ.items())
        raise UserError(f"output_dir {path} holds {command} with another config: {shown}; {cure}")
    begun = any((path / f"{name}.part").exists() for name in files)  # config.yaml may be of what did not end
    if begun or not all((path / name).exists() for name in files):
        return None
    summary = read_summary(path, "--overwrite true")
    if made_of is not None and summary.get("made_of") != as_json(made_of):
        raise UserError(f"output_dir {path} holds {command} of other rows or functions; {cure}")
    try:
        if lines is not None:
            lines(summary)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{path / SUMMARY} is not as this version writes it ({why}); {cure}") from error
    tell(f"{command}: {path} is finished; --overwrite true would run it again")
    return summary


def read_summary(path: Path, cure: str) -> Summary:
    """summary.json of a finished run."""
    if (summary := object_in(path / SUMMARY)) is not None:
        return summary
    raise UserError(f"{path} is finished, but its {SUMMARY} is missing or broken; pass {cure} to run it again")


def owned(stage: str, path: Path) -> list[Path]:
    """What a run of a stage writes, or has written, in its directory; run.json first."""
    rounds = sorted(path.glob("round[0-9]*")) if stage == "rejection" else []
    return [*(path / name for name in OURS), *rounds]


def check_inputs(stage: str, config: StageArgs) -> None:
    """Raise a UserError if the config reads something that starting its run would delete."""
    real = os.path.realpath  # Path.resolve raises where links go in a circle
    replaced = [real(place) for place in owned(stage, Path(config.run.output_dir))]
    check_inside(config, lambda value: any(Path(real(value)).is_relative_to(path) for path in replaced))


def check_inside(config: StageArgs, replaced: Callable[[str], bool]) -> None:
    """Raise a UserError if the config names something that is `replaced`."""
    for option, value in texts(to_dict(config)):
        if replaced(value):
            raise UserError(
                f"{option} {value} is part of the run that would be replaced; choose another run.output_dir"
            )


def as_json(value: object) -> Any:
    """A value as JSON gives it back."""
    return json.loads(to_json(value))


def plain(config: Settings) -> JsonObject:
    """A config as JSON gives it back."""
    return as_json(to_dict(config))


def changes(config: Settings, record: Record) -> dict[str, tuple[object, object]]:
    """Dotted name -> (value of the recorded run, value now) of settings that matter and differ.

    Settings that the recorded version did not know are left out.
    """
    then, now = dict(flat(record["config"])), dict(flat(plain(config)))
    names = [name for name in then if name not in ALWAYS_MAY_CHANGE]
    pairs = {name: (then[name], now.get(name, "nothing")) for name in names}  # nothing: a group is null on one side
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def names_given(**arguments: object) -> tuple[str, ...]:
    """The names of arguments that are not None: what the caller of a stage passed in Python."""
    return tuple(name for name, value in arguments.items() if value is not None)


def check_same(
    stage: str,
    config: StageArgs,
    record: Record,
    given: Sequence[str] | None = None,
    files: Mapping[str, str] | None = None,
) -> bool:
    """Whether the config is that of the recorded run; paths to the same contents count as the same.

    Raises:
        UserError: it may not continue that run; names the settings, the files whose contents are others, or what came
            from Python and does not now.
    """
    path = config.run.output_dir
    if record["stage"] != stage:
        raise UserError(
            f"run.output_dir {path} holds a run of {record['stage']}, not of {stage}; choose another directory or "
            "pass --run.overwrite true"
        )
    if given is not None and set(given) != set(record.get("given", given)):
        then, now = (", ".join(names) or "nothing" for names in (record["given"], given))
        raise UserError(
            f"run.output_dir {path} holds a run that got {then} from Python, not {now}; give the same, or choose "
            "another directory or pass --run.overwrite true"
        )
    before, files = record.get("files", {}), files or {}
    differ = {name: pair for name, pair in changes(config, record).items() if files.get(name, "") != before.get(name)}
    paths = dict(flat(plain(config)))
    for name in files:
        if before.get(name, files[name]) != files[name]:
            differ.setdefault(name, (f"{paths[name]} as it was", "with other contents"))
    safe = [name for name in differ if name in MAY_CHANGE or f"{name.partition('.')[0]}." in MAY_CHANGE]
    unsafe = [name for name in differ if name not in safe]
    if not unsafe and (not safe or config.checkpoint.allow_changes):
        return not differ
    shown = ", ".join(f"{name} {differ[name][0]} there, {differ[name][1]} here" for name in unsafe or safe)
    if not unsafe and record["status"] == "finished" and not steps_in(Path(path) / CHECKPOINTS):
        raise UserError(f"run.output_dir {path} {gone(Path(path))}; it differs in {shown}")
    if unsafe:
        why, cure = "this cannot change within a run", "choose another directory or pass --run.overwrite true"
    else:
        why, cure = "this may change", "pass --checkpoint.allow_changes true, or --run.overwrite true to start anew"
    raise UserError(f"run.output_dir {path} holds a run with another config: {shown}; {why}; {cure}")


def read_record(path: Path) -> Record | None:
    """run.json: stage, config, files, cwd, given, status, step, total, note, updated.

    If it is missing or broken, what the newest checkpoint and config.yaml say of the same, with "recovered"; None if
    that does not say it either.
    """
    record = object_in(path / RECORD)
    kinds = {"stage": str, "config": dict, "status": str, "cwd": str, "given": list, "step": int, "total": int}
    record = record and {"cwd": ".", "given": [], "step": 0, "total": 0, **record}
    if record is not None and all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return record
    try:
        header, _, text = (path / CONFIG).read_text().partition("\n")
        config = yamls.load(text, yamls.Values)
    except (OSError, ValueError, yaml.YAMLError):
        header, config = "", None
    saved = [object_in(path / CHECKPOINTS / f"{step:08d}" / "record.json") for step in steps_in(path / CHECKPOINTS)]
    about: Record = next((each["run"] for each in reversed(saved) if each and "run" in each), {})
    if isinstance(config, dict) and header.startswith("# rlhf-jax ") and " --config " in header:
        stage = header.removeprefix("# rlhf-jax ").partition(" --config ")[0]
        about = {"cwd": str(Path.cwd()), "given": [], "step": 0, "total": 0, **about, "stage": stage}
        about["config"] = as_json(config)
    if not {"stage", "config"} <= about.keys():
        return None
    status = "finished" if object_in(path / SUMMARY) is not None else "crashed"
    return {**about, "status": status, "recovered": True}


def object_in(file: Path) -> JsonObject | None:
    """The JSON object in a file, or None."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in their directory, ascending."""
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit() and len(name) >= 8)


def drop_checkpoints(path: Path) -> None:
    """Delete all checkpoints of a run, but those that were set aside as damaged."""
    folder = path / CHECKPOINTS
    if folder.is_dir():
        for each in folder.iterdir():
            if ".damaged" not in each.name:
                shutil.rmtree(each)
        if not any(folder.iterdir()):
            folder.rmdir()


def write_record(path: Path, record: Record) -> None:
    """Replace run.json."""
    write_json(path / RECORD, {**record, "updated": time.time()})


def write_config(path: Path, stage: str, config: Settings | dict[str, Any], option: str = "run.output_dir") -> None:
    """Replace config.yaml; `option` is what the command calls its directory."""
    place = printable(named(path))
    header = f"# rlhf-jax {stage} --config {shlex.quote(f'{place}/{CONFIG}')} --{option} {shlex.quote(place)}-again\n"
    plainly = config if isinstance(config, dict) else to_dict(config)
    replace_file(path / CONFIG, header + named(yaml.safe_dump(plainly, sort_keys=False)))


def mark_void(path: Path) -> None:
    """Have all that a run left in its directory count for nothing, whatever comes before it is deleted."""
    write_record(path, {"stage": "", "config": {}, "status": VOID, "step": 0, "total": 0})


def wipe(stage: str, path: Path) -> None:
    """Delete what an earlier run wrote; run.json says that it is void, until the new one replaces that."""
    mark_void(path)
    for old in owned(stage, path):
        if old.name in (RECORD, LOCK):  # this process holds the lock
            continue
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)


def claim(path: Path) -> BinaryIO:
    """Hold a run directory for this process until the file is closed or the process ends.

    Raises:
        UserError: another process holds it.
    """
    file = hold(path / LOCK, fcntl.lockf)
    if file is None:
        raise in_use(path)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return file


def in_use(path: Path) -> UserError:
    """Says who has claimed a run directory."""
    try:
        holder = (path / LOCK).read_text()
    except OSError:
        holder = ""
    return UserError(
        f"run.output_dir {path} is being written by {holder or 'another process'}; stop that one or choose another "
        "directory"
    )


def is_held(path: Path) -> bool:
    """Whether another process has claimed the directory."""
    try:
        with open(path / LOCK) as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # else there is no such file, or a file system without locks
        return isinstance(error, (BlockingIOError, PermissionError))
    return False
