"""Every preset loads, is short, and says at its head how it is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_jax import cli

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_preset_is_short_and_its_command_reads_it(path):
    text = path.read_text()
    lines = text.splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert len(lines) < 30 and len(head) >= 2 and lines[: len(head)] == head
    command = re.search(rf"^#   rlhf-jax (\w+) --config configs/{re.escape(path.name)}", text, re.MULTILINE)
    assert command, head
    config = cli.parse(command[1], ["--config", str(path)])
    assert type(config) is cli.COMMANDS[command[1]].args


def test_there_are_presets_of_real_sizes():
    assert {"llama3_8b_sft", "llama3_8b_reward", "llama3_8b_ppo", "llama3_70b_ppo"} <= {path.stem for path in CONFIGS}


def test_every_method_has_a_preset():
    commands = {re.search(r"rlhf-jax (\w+) --config", path.read_text())[1] for path in CONFIGS}
    drawn = {"sample", "bestofn", "rejection", "collect", "judge", "evaluate"}
    assert commands >= drawn | {"sft", "reward", "ppo", "grpo", "rloo", "reinforce_pp", "dpo", "kto", "rrhf"}
