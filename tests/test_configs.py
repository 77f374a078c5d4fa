"""Every preset loads, is short, and says at its head how it is run."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml

from rlhf_jax import cli
from rlhf_jax.cli.parsing import read
from rlhf_jax.commands import quickstart
from rlhf_jax.commands.plan.chips import CHIPS, GIB, SLICES
from rlhf_jax.commands.plan.programs import find_arch
from rlhf_jax.config import QuickstartArgs, rates, to_dict
from rlhf_jax.errors import UserError
from rlhf_jax.models.hf.layout import leaf_shapes
from rlhf_jax.sharding import mesh_sizes

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICK = QuickstartArgs(output_dir="quick")


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


ONLINE = ("ppo", "grpo", "rloo", "reinforce_pp", "distill")
STAGES = ("pretrain", "sft", "rejection", "reward", "dpo", "kto", "rrhf", *ONLINE)
NAMES = {"pretrain": "sft", "rejection": "sft", "rloo": "grpo", "reinforce_pp": "grpo", "distill": "grpo"}


@pytest.mark.parametrize("stage", STAGES)
def test_an_open_rate_is_that_of_the_docs_for_fresh_weights_pretrained_ones_and_adapters(stage, tmp_path):
    rows = (ROOT / "docs" / "algorithms.md").read_text().partition("## Rates")[2].partition("\n## ")[0].splitlines()
    table = {row.split("`")[1]: [float(cell) for cell in row.split("|")[2:5]] for row in rows[::-1] if "| 0." in row}
    table["value"] = next([float(c) for c in row.split("|")[2:5]] for row in rows if "value_optim`" in row)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 60}')
    pretrained, named = ["--model.path", str(tmp_path)], ["--optim.learning_rate", "0.5"]
    groups = {"optim": NAMES.get(stage, stage)} | ({"value_optim": "value"} if stage == "ppo" else {})
    for group, name in groups.items():
        fresh, full, warmup = table[name]
        for options, rate, ratio in (
            ([], fresh, 0), (pretrained, full, warmup), ([*pretrained, "--lora.rank", "4"], 10 * full, warmup),
            ([*pretrained, f"--{group}.warmup_steps", "7"], full, 0),
        ):  # fmt: skip
            optim = getattr(cli.parse(stage, options), group)
            assert (optim.learning_rate, optim.warmup_ratio) == (pytest.approx(rate), ratio), (group, options)
    config = cli.parse(stage, [*pretrained, *named])
    assert (config.optim.learning_rate, config.optim.warmup_ratio) == (0.5, 0)
    assert (config.data.max_length, config.data.max_prompt_length) == (60, 30)
    assert cli.parse(stage, ["--data.max_length", "64"]).data.max_prompt_length == 32
    path = tmp_path / "config.yaml"  # a resumed run has what was chosen, wherever the choice would be another one
    path.write_text(yaml.safe_dump(to_dict(config)))
    (tmp_path / "config.json").unlink()
    assert cli.parse(stage, ["--config", str(path)]) == config


def test_presets_and_the_quickstart_name_their_rates(monkeypatch):
    monkeypatch.setattr(rates, "RATES", dict.fromkeys(rates.RATES, rates.Rate(99.0, 99.0)))
    found = [
        quickstart.sft_stage(QUICK, ROOT),
        quickstart.reward_stage(QUICK, ROOT),
        quickstart.ppo_stage(QUICK, ROOT),
    ]
    for path in CONFIGS:
        command = re.search(r"^#   rlhf-jax (\w+) --config", path.read_text(), re.MULTILINE)[1]
        found.append(cli.parse(command, ["--config", str(path)]))
    rated = [
        getattr(config, group) for config in found for group in ("optim", "value_optim") if hasattr(config, group)
    ]
    assert len(rated) > 15 and all(optim.learning_rate < 1 for optim in rated)


def test_there_are_presets_of_real_sizes():
    assert {"llama3_8b_sft", "llama3_8b_reward", "llama3_8b_ppo", "llama3_70b_ppo"} <= {path.stem for path in CONFIGS}


def test_every_method_has_a_preset():
    commands = {re.search(r"rlhf-jax (\w+) --config", path.read_text())[1] for path in CONFIGS}
    drawn = {"sample", "bestofn", "rejection", "collect", "judge", "evaluate"}
    assert commands >= drawn | ({*STAGES} - {"pretrain"})


def test_a_bare_name_is_a_preset_unless_a_file_has_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("instructgpt", "stories_sample", "llama3.2_1b_sft"):  # of recipes and of commands
        text, _ = read(name)
        assert text == next((ROOT / "configs").rglob(f"{name}.yaml")).read_text()
    cli.dispatch(["recipe", "instructgpt", "--dry_run", "true"])
    assert "rlhf-jax ppo" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file, nor a preset; did you mean instructgpt"):
        read("instructgtp")
    with pytest.raises(UserError, match=r"no such file, nor a preset; presets are .*, instructgpt,"):
        read("xyzzy")
    (tmp_path / "instructgpt").write_text("a: 1")
    assert read("instructgpt") == ("a: 1", {"a": "1"})


PLANNED = re.compile(
    r"^#   (\w+):([\dx]+) +([\d.]+) of ([\d.]+) GiB, ([\d.]+) s(?:, ([\d.]+) s where 40 % is real)?$", re.M
)
"""What a preset's head has of a plan: slice, peak and room of a device, seconds of a step at the roofline."""


def planned(path: Path) -> list[tuple[str, ...]]:
    return PLANNED.findall(path.read_text())


@pytest.mark.parametrize("path", [path for path in CONFIGS if planned(path)], ids=lambda path: path.stem)
def test_what_a_preset_says_of_a_slice_can_be_and_stands_in_the_docs(path):
    """Rows go evenly over the devices, what is trained is in the peak, and the table of docs/tpu.md says the same."""
    stage = re.search(r"^#   rlhf-jax (\w+)", path.read_text(), re.MULTILINE)[1]
    config = cli.parse(stage, ["--config", str(path)])
    shapes = leaf_shapes(find_arch(config.model.path), score_head=stage == "reward")
    experts = sum(math.prod(shape) for name, shape in shapes.items() if "/experts/" in name)
    others = sum(map(math.prod, shapes.values())) - experts
    settings, table = getattr(config, {"pretrain": "sft"}.get(stage, stage)), (ROOT / "docs" / "tpu.md").read_text()
    for kind, shape, peak, room, *seconds in planned(path):
        cores, chips = 2 if kind == "tpu7x" else 1, math.prod(map(int, shape.split("x")))
        assert shape in SLICES[kind] and float(room) == CHIPS[kind].memory / cores / GIB - 0.25
        rows = config.data.batch_size // settings.accumulate // getattr(settings, "minibatches", 1)
        assert rows % (cores * chips) == 0
        # Masters and two moments in float32, each device its share; or a frozen base as it is.
        size = 12 if not config.lora.rank else 2 if config.model.param_dtype == "bfloat16" else 4
        ways = mesh_sizes(config.mesh, cores * chips)
        least = size * (others + experts / ways.get("expert", 1)) / ways["fsdp"] / GIB
        assert least < float(peak) <= float(room), (least, peak, room)
        told = f"{seconds[0]} s" + (f", {seconds[1]} s" if seconds[1] else "")
        assert f"| `{path.stem}` | {kind}:{shape} | {peak} of {room} | {told} |" in table
