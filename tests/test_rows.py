"""Laws of rows across commands: whatever else a row holds, it is read for what it is, and every stage runs on it."""

import json

import pytest
from tiny import toy_directory

from rlhf_jax import reward, sft
from rlhf_jax.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RewardRun,
    RunConfig,
    SamplingConfig,
    SFTConfig,
    SFTRun,
)
from rlhf_jax.errors import UserError

USER, ANSWER = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}


def settings(out, **data):
    """What makes a stage on the toy model quick."""
    return {
        "model": ModelConfig(path=str(toy_directory() / "policy")),
        "data": DataConfig(**{"batch_size": 8, "max_prompt_length": 6, "max_length": 16, **data}),
        "optim": OptimConfig(learning_rate=1e-3),
        "run": RunConfig(output_dir=str(out), progress=False),
    }


DEMONSTRATIONS = {
    "messages": lambda i: {"messages": [{"role": "user", "content": "abcd"[i % 4]}, ANSWER]},
    "text": lambda i: {"text": f"{'abcd'[i % 4]} b c d e"},
    "both": lambda i: [{"text": "a b c"}, {"prompt": "a", "response": " b"}][i % 2],
    "unpaired": lambda i: {"prompt": "a b", "completion": " c", "label": i % 2 == 0},
}


@pytest.mark.parametrize("kind", DEMONSTRATIONS)
def test_sft_runs_with_its_defaults_on_every_kind_of_row(kind, tmp_path):
    """The table of samples has the prompts that there are; it is written, or not, before the model is saved."""
    rows = [DEMONSTRATIONS[kind](i) for i in range(16)]
    config = SFTRun(**settings(tmp_path / "run"), sft=SFTConfig(steps=1), sampling=SamplingConfig(max_new_tokens=2))
    sft.run(config, rows=rows, eval_rows=rows)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    prompted = {"text": 0, "both": 8, "unpaired": 8}.get(kind, 16)
    assert len(samples) == min(prompted, SFTConfig().num_samples)
    assert all(json.loads(line)["prompt"] for line in samples)


def test_a_run_without_a_finite_step_is_an_error_and_keeps_what_it_has(tmp_path):
    """Ratings whose squares are infinite in float32."""
    rows = [{"prompt": "a", "response": "b", "rating": 1e30}, {"prompt": "b", "response": "c", "rating": -1e30}] * 8
    config = RewardRun(**settings(tmp_path / "run"), reward=RewardConfig(steps=3))
    with pytest.raises(UserError, match="none of 3 updates had a finite loss and gradient: nothing was trained"):
        reward.run(config, rows=rows, eval_rows=rows)
    assert '"optim/skipped": 1.0' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
