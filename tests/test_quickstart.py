"""The quickstart's chain from end to end, small."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from rlhf_jax import cli
from rlhf_jax.commands import quickstart
from rlhf_jax.config import QuickstartArgs, SFTConfig


@pytest.mark.slow
def test_the_chain_runs_through_every_stage_and_round(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = quickstart.sft_stage
    monkeypatch.setattr(quickstart, "sft_stage", lambda *args: replace(whole(*args), sft=SFTConfig(steps=60)))
    quickstart.run(QuickstartArgs(progress=False, rounds=2, comparisons=400, iterations=2))
    said, home = capsys.readouterr().out, tmp_path / "runs" / "quickstart"
    assert all(f"mean optimality, {stage}" in said for stage in ("data", "sft", "ppo"))
    assert (home / "learning_curves.png").stat().st_size > 1000
    sft, ppo = (load_file(home / stage / "model" / "model.safetensors") for stage in ("sft", "ppo"))
    assert sft.keys() == ppo.keys() and any((sft[name] != ppo[name]).any() for name in sft)
    metrics = [json.loads(line) for line in (home / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in metrics) == 2
    summary = json.loads((home / "summary.json").read_text())
    assert summary["gold"].keys() == {"data", "sft", "ppo"} and "accuracy" in summary["reward_model"]
    assert {"kl", "wall_s"} <= summary.keys()

    # What it says to try next, and README's Python, work as they are printed.
    commands = re.findall(r"^  rlhf-jax (.*)$", said, re.M)
    assert len(commands) == 3
    for command in commands:
        assert cli.code_of(shlex.split(command)) == 0, command
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)
    exec(code, {})
    assert json.loads((tmp_path / "runs" / "shorter" / "summary.json").read_text())["iterations"] == 5
