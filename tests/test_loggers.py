"""Where metrics go beside metrics.jsonl: each package of its own with its files, functions, and what fails."""

from __future__ import annotations

import contextlib
import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from rlhf_jax import cli, config, errors
from rlhf_jax.config.parts import LOGGERS
from rlhf_jax.errors import UserError
from rlhf_jax.runs import loggers
from rlhf_jax.runs.report import write_beside
from rlhf_jax.runs.run import Run

SEEN: list[tuple[int, dict[str, float]]] = []


def remember(step, metrics):
    SEEN.append((step, dict(metrics)))


def fails(step, metrics):
    raise OSError(f"no network at {step}")


class Killed(BaseException):
    """Stands in for kill -9."""


def killed_twice(path, name: str):
    """Six steps of a run, saved after the second one, killed after the fourth and the fifth, and gone on with."""
    options = ["--run.output_dir", str(path), "--run.progress", "false", "--run.loggers", json.dumps([name])]
    for kill in (4, 5, 7):
        with contextlib.suppress(Killed), Run("sft", cli.parse("sft", options), total=6) as out:
            out.restore({"w": jnp.zeros(2)}, {})
            for step in range(out.start + 1, 7):
                out.metrics.write(step, {"loss/total": float("nan") if step == 1 else float(step)})
                if step == 2:
                    out.save_now(step, {"w": jnp.ones(2)}, {})
                if step == kill:
                    raise Killed
            out.finish({})


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_a_package_is_told_is_what_metrics_has_once_however_often_a_run_was_killed(
    tmp_path, monkeypatch, name, mode
):
    told: dict[str, list] = {}  # by the name of their runs

    def init(**options):
        mine = told.setdefault(options.get("id", options["name"]), [])
        log = lambda metrics, step: mine.append((step, str(metrics["loss/total"])))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: None)

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init, Settings=dict))
    monkeypatch.setattr(loggers, "find_spec", lambda package: True)
    monkeypatch.setenv("WANDB_MODE", mode)
    killed_twice(tmp_path / "r", name)
    last, runs = [(1, "nan"), *((i, f"{i}.0") for i in range(2, 7))], list(told.values())
    if (name, mode) == ("wandb", "online"):  # which leaves out steps that it has
        assert [step for step, _ in runs[0]] == [1, 2, 3, 4, 3, 4, 5, 3, 4, 5, 6] and len(runs) == 1
    else:
        assert runs == [last[:4], last[:5], last]


def test_the_newest_events_of_tensorboard_are_all_that_it_shows_and_what_metrics_has(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    killed_twice(tmp_path / "r", "tensorboard")
    file = max((tmp_path / "r" / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    data, told, start = file.read_bytes(), [], []
    while data:
        size = int.from_bytes(data[:8], "little")
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        told += [(event.step, value.tag) for value in event.summary.value]
        start += [event.step] if event.HasField("session_log") else []
    assert told == [(step, "loss/total") for step in range(1, 7)] and start == [0]


def a_run(path, *names: str):
    """Two steps of a run with these loggers."""
    options = ["--run.output_dir", str(path), "--run.progress", "false", "--run.loggers", json.dumps(names)]
    with Run("sft", cli.parse("sft", options), total=2) as out:
        out.metrics.write(1, {"loss/total": 3.0})
        out.metrics.write(2, {"loss/total": 2.5, "eval/total": float("nan")})
        out.finish({})


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A home of its own, and a report at the end of a run."""
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("rlhf_jax.runs.run.write_beside", write_beside)
    return tmp_path


def needs(name: str):
    return pytest.mark.skipif(find_spec(LOGGERS[name]) is None, reason=f'needs {name}: pip install "rlhf-jax[{name}]"')


def test_functions_get_every_line_and_one_that_fails_is_said_once_and_ends_no_run(tmp_path, capsys):
    SEEN.clear()
    a_run(tmp_path / "r", f"{__name__}:remember", f"{__name__}:fails")
    assert [(step, metrics["loss/total"]) for step, metrics in SEEN] == [(1, 3.0), (2, 2.5)]
    said = capsys.readouterr()
    assert (said.out + said.err).count(f"! run.loggers {__name__}:fails failed") == 1
    assert (tmp_path / "r" / "summary.json").exists()


@needs("wandb")
@pytest.mark.filterwarnings("default")
def test_wandb_writes_offline_into_the_run_directory(alone):
    a_run(alone / "r", "wandb")
    [file] = (alone / "r" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"loss/total" in file.read_bytes() and list((alone / "r" / "wandb").rglob("*.html"))


@needs("mlflow")
@pytest.mark.filterwarnings("default")
def test_mlflow_writes_into_the_run_directory_once_a_step(alone, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delattr(MlflowClient, "log_metric")  # a request for each number
    a_run(alone / "r", "mlflow")
    client = MlflowClient(f"sqlite:///{alone}/r/mlflow/runs.db")
    [run] = client.search_runs([client.get_experiment_by_name(loggers.PROJECT).experiment_id])
    assert [point.value for point in client.get_metric_history(run.info.run_id, "loss/total")] == [3.0, 2.5]
    assert run.info.status == "FINISHED" and run.info.run_name == "r"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]


@needs("trackio")
@pytest.mark.filterwarnings("default")
def test_trackio_writes_on_this_machine(alone):
    a_run(alone / "r", "trackio")
    assert list(alone.rglob(f"{loggers.PROJECT}.db"))


def test_a_run_in_a_bucket_has_its_name_there_wherever_it_is_gone_on_with(tmp_path, monkeypatch):
    begun, url = [], "gs://bucket/runs/first"
    package = SimpleNamespace(init=lambda **options: begun.append(options), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setitem(sys.modules, "trackio", package)
    monkeypatch.setattr(errors, "_NAMES", {str(tmp_path / name): url for name in "ab"})
    for name in "ab":
        loggers.wandb(loggers.Place(tmp_path / name, {"run": {"output_dir": str(tmp_path / name)}}, None))
    first, again = ({name: value for name, value in one.items() if name != "dir"} for one in begun)
    assert first == again and (first["name"], first["config"]) == ("first", {"run": {"output_dir": url}})
    assert first["reinit"] == "create_new"  # beside that of the run of which it is a round
    for name in ("a", "other/first"):
        loggers.trackio(loggers.Place(tmp_path / name, {}, None))
    assert begun[2]["name"].startswith("first-") and begun[3]["name"].startswith("first-")
    assert begun[2]["name"] != begun[3]["name"]


def test_a_package_that_does_not_begin_is_one_line_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(loggers.BEGIN, "tensorboard", lambda place: 1 / 0)
    with pytest.raises(UserError, match=r"run.loggers tensorboard does not begin \(ZeroDivisionError"):
        a_run(tmp_path / "r", "tensorboard")


def test_every_name_begins_and_what_is_none_is_one_line():
    assert set(loggers.BEGIN) == set(LOGGERS)
    with pytest.raises(UserError, match=r"run.loggers has 'wanb'; give some of tensorboard, wandb, mlflow, trackio"):
        config.RunConfig(loggers=["wanb"])
    with pytest.raises(UserError):
        loggers.begin("no_such_module:f", None)
