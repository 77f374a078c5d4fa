"""Where metrics go beside metrics.jsonl: TensorBoard, W&B, MLflow, Trackio, or a function of a fork.

All write to the run directory unless their own variables of the environment say where else (WANDB_MODE,
MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID): nothing leaves the machine that was not asked to.

What goes on begins anew there, with the lines so far, but in W&B online, which goes on with its own run.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.config import resolve
from rlhf_jax.config.parts import LOGGERS
from rlhf_jax.errors import UserError, named, reason
from rlhf_jax.hosts import clock
from rlhf_jax.hosts.json_text import JsonObject, from_json, to_json

PROJECT = "rlhf-jax"
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "GRADIO_ANALYTICS_ENABLED": "False"}
"""Without these the packages would tell their makers that they are used."""

Log = Callable[[int, Mapping[str, float]], None]
"""(step, metrics): what a logger is, and what `run.loggers` may name as module:function."""


class Place(NamedTuple):
    """What a logger knows of its run: the directory, the settings, and the step after which it goes on, if it does.

    Of a run in a bucket the directory is that of this machine, and all that is told has the bucket's names.
    """

    path: Path
    settings: JsonObject
    step: int | None

    @property
    def config(self) -> JsonObject:
        """The settings as they were given."""
        return from_json(named(to_json(self.settings)))

    @property
    def name(self) -> str:
        """What the run is called."""
        return Path(named(self.path)).name

    def key(self, anew: bool) -> str:
        """The same for a run and what continues it, unless that is to begin `anew`."""
        more = secrets.token_hex(8) if anew and self.step is not None else ""
        return hashlib.sha256(f"{named(self.path.absolute())} {clock.time()}{more}".encode()).hexdigest()[:16]


class Logger(NamedTuple):
    """`log` takes metrics; `close` ends it, and takes the report along if the run has one.

    One that is `anew` holds nothing of the run yet, and is told first what metrics.jsonl has: after a kill nobody
    knows which lines a package had kept, and those after the checkpoint come again.
    """

    name: str
    log: Log
    close: Callable[[Path | None], None]
    anew: bool = True


def tensorboard(place: Place) -> Logger:
    """TensorBoard events in output_dir/tensorboard."""
    from tensorboardX import SummaryWriter

    purge = None if place.step is None else 0  # of earlier files TensorBoard shows nothing
    events = SummaryWriter(str(place.path / "tensorboard"), purge_step=purge)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            events.add_scalar(name, value, step)

    return Logger("tensorboard", log, lambda report: events.close())


def wandb(place: Place) -> Logger:
    """Weights & Biases; offline, in output_dir/wandb, unless WANDB_MODE says otherwise."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    anew = mode != "online"  # there it goes on with the run, and takes no step twice
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=place.name, id=place.key(anew), resume="allow",
        dir=str(place.path), config=place.config, mode=mode, settings=wandb.Settings(silent=True),
        reinit="create_new",  # beside the run of which this one is a round
    )  # fmt: skip

    def close(report: Path | None) -> None:
        if report is not None:
            run.log({"report": wandb.Html(report.read_text(), inject=False)})
        run.finish()

    return Logger("wandb", lambda step, metrics: run.log(dict(metrics), step=step), close, anew)


def mlflow(place: Place) -> Logger:
    """MLflow; in output_dir/mlflow unless MLFLOW_TRACKING_URI says otherwise."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    own, elsewhere = place.path.absolute() / "mlflow", os.environ.get("MLFLOW_TRACKING_URI")
    if not elsewhere:
        own.mkdir(exist_ok=True)
    client = MlflowClient(elsewhere or f"sqlite:///{own}/runs.db")
    found = client.get_experiment_by_name(PROJECT)
    files = None if elsewhere else own.as_uri()
    experiment = client.create_experiment(PROJECT, files) if found is None else found.experiment_id
    run = client.create_run(experiment, run_name=place.name).info.run_id

    def log(step: int, metrics: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        client.log_batch(run, [Metric(name, value, now, step) for name, value in metrics.items()])

    def close(report: Path | None) -> None:
        if report is not None:
            client.log_artifact(run, str(report))
        client.set_terminated(run)

    return Logger("mlflow", log, close)


def trackio(place: Place) -> Logger:
    """Trackio, on this machine; `trackio show` shows it. It tells runs apart by their names alone."""
    import trackio

    name = f"{place.name}-{place.key(True)}"
    run = trackio.init(project=PROJECT, name=name, config=place.config, resume="allow", embed=False)
    return Logger("trackio", lambda step, metrics: run.log(dict(metrics), step=step), lambda report: run.finish())


BEGIN = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}


def check_loggers(names: list[str]) -> None:
    """Raise a UserError for a logger whose package is missing."""
    for name in names:
        if name in LOGGERS and find_spec(package := LOGGERS[name]) is None:
            raise UserError(f'run.loggers has {name}, but {package} is missing; pip install "rlhf-jax[{name}]"')


def begin(name: str, place: Place) -> Logger:
    """The logger of a name, or of a function module:function.

    Raises:
        UserError: there is no such function, or the package does not begin.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    if name in BEGIN:
        try:
            return BEGIN[name](place)
        except Exception as error:  # whatever these packages make of their settings
            why = f"{type(error).__name__}: {reason(error)}"
            raise UserError(f"run.loggers {name} does not begin ({why}); mend that or leave it out") from error
    return Logger(name, resolve(name), lambda report: None, anew=False)


def guarded(logger: Logger, say: Callable[[str], None]) -> Logger:
    """The logger, which after its first failure says so and does nothing more: a run does not end for it."""
    broken = False

    def safe(call: Callable[..., object]) -> Callable[..., None]:
        def called(*arguments: object) -> None:
            nonlocal broken
            if broken:
                return
            try:
                call(*arguments)
            except Exception as error:
                broken = True
                why = f"{type(error).__name__}: {reason(error)}"
                say(f"! run.loggers {logger.name} failed and gets nothing more ({why}); training continues")

        return called

    return logger._replace(log=safe(logger.log), close=safe(logger.close))
