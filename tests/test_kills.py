"""A kill between any two changes of a file in a run: the same command goes on to the same bits, with no leftovers."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import shutil
import threading
import warnings
from pathlib import Path

import jax.numpy as jnp
import pytest
from disk import Kill, Killed

from rlhf_jax.config import SFTArgs
from rlhf_jax.config.functions import replace as changed
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.files import replace_file, replacing
from rlhf_jax.runs import directory
from rlhf_jax.runs.run import Run
from rlhf_jax.training.loop import claim_directory

STEPS = 4


def config(path: Path, **changes) -> SFTArgs:
    settings = {"run__progress": False, "checkpoint__every": 1, "checkpoint__keep_last": 1, **changes}
    return changed(SFTArgs(), run__output_dir=str(path), **settings)


def stage(settings: SFTArgs) -> None:
    """A run that adds up numbers."""
    if claim_directory("sft", settings)[0] is not None:
        return
    with Run("sft", settings, total=STEPS) as out:
        tree, _ = out.restore({"state": {"step": jnp.float32(settings.run.seed)}}, {"rows": 1})
        value = float(tree["state"]["step"])
        for i in range(out.start, STEPS):
            value = value * 3 + i
            out.metrics.write(i + 1, {"value": value})
            out.metrics.samples(i + 1, [{"text": str(value)}])
            if i == 1:
                out.best.keep(i + 1, value)
            out.save_if_due(i + 1, {"state": {"step": jnp.float32(value)}})
        with replacing(out.dir / "model") as new:
            replace_file(new / "weights", str(value))
        out.finish({"value": value})


def left(path: Path) -> dict:
    """What a run left: names of files, results without times."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {
        "names": sorted(str(file.relative_to(path)) for file in path.rglob("*") if "checkpoints/" not in str(file)),
        "steps": directory.steps_in(path / directory.CHECKPOINTS),
        "metrics": [(row["step"], row["value"]) for row in rows],
        "samples": (path / "samples.jsonl").read_text(),
        "weights": (path / "model" / "weights").read_text(),
        "status": directory.read_record(path)["status"],
        "finished": json.loads((path / "summary.json").read_text())["value"],
    }


@pytest.fixture
def old(tmp_path) -> Path:
    """A finished run of another seed, with its checkpoint."""
    stage(config(tmp_path / "old", run__seed=1, checkpoint__keep_finished=True))
    return tmp_path / "old"


def test_a_kill_at_any_change_of_a_file_leaves_what_the_same_command_goes_on_from(tmp_path, old, monkeypatch):
    """In the wipe of an earlier run, in saves, while checkpoints are deleted, in the last save, and after it."""
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)  # the thread that saves dies with the process
    path = Path(shutil.copytree(old, tmp_path / "0" / "run"))
    with pytest.MonkeyPatch.context() as patch:
        seen = Kill(patch, None)
        stage(config(path, run__overwrite=True))
    alone, before = left(path), left(old)
    of_orbax = re.compile(r"orbax|state|d/|ocdbt|array_metadatas|process_|commit_success|[0-9a-f#]{9,}$")
    moments = [moment for moment in dict.fromkeys(seen.log) if not of_orbax.search(moment[1])]
    moments = [(name, path) for name, path in moments if name in ("write", "replace", "rename", "unlink", "rmdir")]
    files = {Path(name).name for _, name in moments}
    assert files >= {".run.json.new", ".config.yaml.new", ".record.json.new", ".model.new", ".summary.json.new"}
    for number, moment in enumerate(moments, 1):
        path = Path(shutil.copytree(old, tmp_path / str(number) / "run"))
        with warnings.catch_warnings(action="ignore"), pytest.MonkeyPatch.context() as patch:
            kill = Kill(patch, moment)
            with contextlib.suppress(Killed, UserError):
                stage(config(path, run__overwrite=True))
            gc.collect()  # files that the dead did not close
        try:
            stage(config(path))
        except UserError as error:  # nothing of the old run was touched yet
            now = left(path)
            now["names"] = [name for name in now["names"] if name != ".run.json.new"]
            assert "run.seed 1 there, 0 here" in str(error) and now == before, moment
            stage(config(path, run__overwrite=True))
        assert kill.dead and left(path) == alone, moment
        shutil.rmtree(path)
