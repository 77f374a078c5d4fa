"""The quickstart's chain from end to end, small, in a bucket, whose files are then those of a disk."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from buckets import Bucket, served
from safetensors.numpy import load_file

from rlhf_jax import cli
from rlhf_jax.commands import quickstart
from rlhf_jax.config import QuickstartArgs, SFTConfig
from rlhf_jax.hosts import buckets

URL = "gs://bucket/quickstart"


@pytest.fixture
def bucket(monkeypatch):
    buckets.store.cache_clear()
    with served(Bucket(), monkeypatch) as service:
        yield service
    buckets.store.cache_clear()


def test_what_it_says_first_fits_a_terminal():
    assert max(map(len, quickstart.ABOUT.splitlines())) < 80


@pytest.mark.slow
def test_the_chain_runs_through_every_stage_and_round(tmp_path, capsys, monkeypatch, bucket):
    monkeypatch.chdir(tmp_path)
    whole = quickstart.sft_stage
    monkeypatch.setattr(quickstart, "sft_stage", lambda *args: replace(whole(*args), sft=SFTConfig(steps=60)))
    small = QuickstartArgs(output_dir=URL, progress=False, rounds=2, comparisons=400, iterations=2)
    done = quickstart.run(small)
    said, home = capsys.readouterr().out, tmp_path / "runs" / "quickstart"
    for name, (data, _) in bucket.objects.items():
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).write_bytes(data)
    assert [path.name for path in home.glob(".run/*")] == ["head.json"]
    assert quickstart.run(small) == done and f"{URL} is finished" in capsys.readouterr().out
    assert all(f"mean optimality, {stage}" in said for stage in ("data", "sft", "ppo"))
    assert (home / "learning_curves.png").stat().st_size > 1000
    sft, ppo = (load_file(home / stage / "model" / "model.safetensors") for stage in ("sft", "ppo"))
    assert sft.keys() == ppo.keys() and any((sft[name] != ppo[name]).any() for name in sft)
    metrics = [json.loads(line) for line in (home / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in metrics) == 2
    summary = json.loads((home / "summary.json").read_text())
    assert summary["gold"].keys() == {"data", "sft", "ppo"} and "accuracy" in summary["reward_model"]
    assert {"kl", "wall_s"} <= summary.keys()

    # What it says to try next, and README's Python, work as they are printed; the first reads from the bucket.
    commands = re.findall(r"^  rlhf-jax (.*)$", said, re.M)
    assert len(commands) == 3
    for command in commands:
        assert URL in command
        assert cli.code_of(shlex.split(command)) == 0, command
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)
    exec(code, {})
    assert json.loads((tmp_path / "runs" / "shorter" / "summary.json").read_text())["iterations"] == 5
