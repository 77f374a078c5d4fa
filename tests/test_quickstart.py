"""The quickstart's chain from end to end, small."""

import json
from dataclasses import replace

import pytest
from safetensors.numpy import load_file

from rlhf_jax.commands import quickstart
from rlhf_jax.config import QuickstartArgs, SFTConfig


@pytest.mark.slow
def test_the_chain_runs_through_every_stage_and_round(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = quickstart.sft_stage
    monkeypatch.setattr(quickstart, "sft_stage", lambda *args: replace(whole(*args), sft=SFTConfig(steps=60)))
    quickstart.run(QuickstartArgs(output_dir="q", progress=False, rounds=2, comparisons=400, iterations=2))
    said = capsys.readouterr().out
    assert all(f"mean optimality, {stage}" in said for stage in ("data", "sft", "ppo"))
    assert (tmp_path / "q" / "learning_curves.png").stat().st_size > 1000
    sft, ppo = (load_file(tmp_path / "q" / stage / "model" / "model.safetensors") for stage in ("sft", "ppo"))
    assert sft.keys() == ppo.keys() and any((sft[name] != ppo[name]).any() for name in sft)
    metrics = [json.loads(line) for line in (tmp_path / "q" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in metrics) == 2
    summary = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert summary["gold"].keys() == {"data", "sft", "ppo"} and "accuracy" in summary["reward_model"]
    assert {"kl", "wall_s"} <= summary.keys()
