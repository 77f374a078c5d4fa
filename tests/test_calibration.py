"""What a run measured against the plan, and plans of many slices: the plumbing, as no TPU is at hand."""

from __future__ import annotations

import json

import pytest
from tiny import toy_directory

from rlhf_jax import cli, reward
from rlhf_jax.commands.plan import calibration, chips, slices
from rlhf_jax.commands.plan.plan import Row
from rlhf_jax.config import (
    DataConfig,
    ModelConfig,
    PlanArgs,
    PPOArgs,
    PPOConfig,
    RewardArgs,
    RewardConfig,
    RewardSourceConfig,
    RunConfig,
    SFTArgs,
    SFTConfig,
)
from rlhf_jax.errors import UserError

SLOW = chips.Chip(16 * chips.GIB, 1e9, 1e9, 1e9, 1e9)


def row(name, seconds, peak=1.0):
    waits = {"compute": seconds, "memory": seconds / 2, "network": 0.0}
    return Row(name, 0, 0, peak * chips.GIB, 1, 1, 1, {}, (), waits, 1, 0)


def test_a_run_says_what_it_took_over_what_it_should_and_a_plan_reads_it(tmp_path, monkeypatch):
    """A reward model on the devices of this machine, as if they were a chip; its rankings are packed."""
    rows, analyse = [], calibration.analyse
    monkeypatch.setattr(calibration, "analyse", lambda *given: rows.append(analyse(*given)) or rows[0])
    monkeypatch.setitem(chips.KINDS, "cpu", "cpu")
    monkeypatch.setitem(chips.CHIPS, "cpu", SLOW)
    three = {"responses": ["c d", "d", "d c"], "ranks": [0, 1, 2]}
    rankings = [{"prompt": p, **three} for p in "bcdefghijklm"]
    config = RewardArgs(
        model=ModelConfig(path=str(toy_directory() / "policy")),
        data=DataConfig(batch_size=8, max_prompt_length=2, max_length=8, eval_fraction=0.3, pack="on"),
        reward=RewardConfig(steps=3),
        run=RunConfig(output_dir=str(tmp_path / "run"), calibrate=True, report=False),
    )
    said = reward.run(config, rows=rankings)["calibration"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    times = sorted(line["time/update_s"] for line in lines if "time/update_s" in line)
    [(part, figures)] = said["parts"].items()
    assert (said["chip"], said["devices"], part) == ("cpu", 8, "update")
    assert figures["measured_s"] == pytest.approx(times[1], abs=1e-4)  # of three the first has the compiler in it
    assert figures["ratio"] == figures["measured_s"] / figures["planned_s"] and figures["planned_s"] > 0
    filled = {line["data/filled"] for line in lines if "data/filled" in line}
    assert 0 < max(filled) < 1 and said["fill"] in filled
    assert rows[0][0][0].tokens == round(8 * 3 * 8 * said["fill"])  # rows, responses, columns
    for path in (tmp_path / "run", tmp_path / "run" / "summary.json"):
        assert calibration.read(str(path)) == calibration.Calibration("cpu", {"update": figures["ratio"]})


def test_what_was_measured_on_chips_of_a_generation_corrects_plans_for_it():
    known = [
        calibration.Calibration("cpu", {"update": 5.0}),
        calibration.Calibration("cpu", {"rollout": 2.0, "update": 3.0}),
    ]
    rows = [row("prefill", 1.0), row("decode", 4.0), row("score", 1.5), row("update", 2.0)]
    assert calibration.seconds_of(rows, "cpu", known) == (2 * 5 + 1.5 + 3 * 2, True)
    assert calibration.seconds_of(rows, "v5e", known) == (8.5, False)


def test_a_run_on_devices_without_figures_says_so_and_ends_well(monkeypatch):
    with pytest.raises(UserError, match=r"the figures of a cpu are not known"):
        calibration.of_run(SFTArgs(), {}, 1.0, 2)


def test_slices_that_fit_are_ranked_by_what_is_asked_for(monkeypatch, capsys, tmp_path):
    """Seconds fall with the chips, but for a constant; below four chips of v5e nothing fits."""
    seen = []

    def analyse(config, chip, devices, width, fill, room):
        seen.append(len(devices))
        if len(devices) == 1:
            raise UserError("update is given 20 GiB of 15.75 GiB; raise mesh.fsdp")
        return [row("step", 3600 * (1 + 1e15 / chip.flops / len(devices)), peak=20 if len(devices) == 2 else 1)], {}

    monkeypatch.setattr(slices, "analyse", analyse)
    shapes = {"v5e": ("1x1", "1x2", "2x2", "2x4", "4x8"), "v6e": ("2x2", "2x4")}
    monkeypatch.setattr(slices, "SLICES", shapes)
    sizes = {"1x1": 1, "1x2": 2, "2x2": 4, "2x4": 8}
    find = lambda name, count: (chips.CHIPS[name[:3]], [None] * sizes[name[4:]])  # noqa: E731
    monkeypatch.setattr(slices, "find_topology", find)
    (tmp_path / "prices.yaml").write_text("v5e: 1\nv6e: 2.5\n")

    def ranked(goal, *known, **more):
        plan = PlanArgs(
            chips=["v5e, v6e"], goal=goal, max_chips=8, json=True, prices=str(tmp_path / "prices.yaml"), **more
        )
        assert slices.compare(plan, SFTArgs(sft=SFTConfig(steps=2)), known)
        out, err = capsys.readouterr()
        assert "v5e:1x1 is out: update is given 20 GiB" in err and "v5e:1x2 is out: does not fit" in err
        return [json.loads(line) for line in out.splitlines()]

    cost = {"v5e": 1e15 / 197e12, "v6e": 1e15 / 918e12}
    rows = ranked("hours")
    assert {one["topology"]: one["hours"] for one in rows} == {
        f"{kind}:{shape}": pytest.approx(2 * (1 + cost[kind] / count))
        for kind in cost
        for shape, count in (("2x2", 4), ("2x4", 8))
    }
    assert [one["topology"] for one in rows] == ["v6e:2x4", "v6e:2x2", "v5e:2x4", "v5e:2x2"]
    assert all(one["price"] == one["chip_hours"] * (2.5 if "v6e" in one["topology"] else 1) for one in rows)
    assert ranked("chip_hours")[0]["topology"] == "v6e:2x2"
    assert ranked("price")[0]["topology"] == "v5e:2x2"
    slower = ranked("hours", calibration.Calibration("v6e", {"update": 4.0}))
    assert [one["calibrated"] for one in slower] == [False, False, True, True] and 32 not in seen

    plan = PlanArgs(chips=["v6e"])
    assert slices.compare(plan, SFTArgs(sft=SFTConfig(steps=2)), [])
    table = capsys.readouterr().out
    assert "price" not in table and table.splitlines()[2].split()[0] == "v6e:2x2" and "2 steps by chip-hours" in table


def test_the_length_of_a_run_is_that_of_its_config_or_of_its_rows(tmp_path):
    config = PPOArgs(ppo=PPOConfig(iterations=7), reward=RewardSourceConfig(functions=["a:b"]))
    assert slices.steps_of(config, 0) == 7
    sft = SFTArgs(sft=SFTConfig(epochs=3), data=DataConfig(batch_size=4))
    assert slices.steps_of(sft, 10) == 6
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 9)
    sft = SFTArgs(sft=SFTConfig(epochs=3), data=DataConfig(batch_size=4, path=str(tmp_path / "rows.jsonl")))
    assert slices.steps_of(sft, 0) == 6
    with pytest.raises(UserError, match=r"write --rows N"):
        slices.steps_of(SFTArgs(), 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "is no table of numbers"),
        ("v5e: free", "is no table"),
        ("v9: 1", "has v9: 1"),
        ("v5e: -1", "has v5e: -1"),
    ],
)
def test_prices_that_are_none_are_one_line(tmp_path, text, says):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        slices.read_prices(str(tmp_path / "prices.yaml"))


@pytest.mark.parametrize(
    "text", ["{}", '{"calibration": {"none": "why"}}', '{"chip": "v5e", "parts": {"a": {"ratio": 0}}}']
)
def test_a_file_without_a_calibration_is_one_line(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"give the directory of a run with run.calibrate"):
        calibration.read(str(tmp_path))


def test_what_is_compared_is_said_once(capsys):
    def said(*arguments):
        assert cli.code_of(["plan", "--stage", "sft", *arguments]) == 2
        return capsys.readouterr().err

    assert "chips has 'v9'; give some of v4, v5e" in said("--chips", "v5e,v9")
    assert "leave out topology and suggest" in said("--chips", "v5e", "--topology", "v5e:2x2")
    assert "what a chip-hour of v5e costs; give --prices" in said("--chips", "v5e", "--goal", "price", "--rows", "99")
