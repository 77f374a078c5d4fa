"""Recipes: nothing runs before everything fits, nothing finished runs again, and nothing stale is taken for fresh."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml
from tiny import toy_directory

from rlhf_jax import cli
from rlhf_jax.commands import recipe
from rlhf_jax.commands.recipe.reading import read, replaced
from rlhf_jax.commands.recipe.record import Record
from rlhf_jax.config import RecipeArgs, rates
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.hosts import interrupts
from rlhf_jax.runs.directory import write_record

FILES = """
import json
calls = []
def write(directory, num, seed):
    calls.append(("write", num, seed))
    rows = [{"prompt": f"p{i}", "responses": ["a", "bb", "ccc" * (1 + seed)]} for i in range(num)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
def length(prompts, responses, **columns):
    calls.append(("length", len(responses)))
    return [float(len(text)) for text in responses]
def broken(prompts, responses, **columns):
    raise RuntimeError("out of raters")
"""
RECIPE = """
output_dir: out
variables: {noise: 0.5}
defaults: {seed: 1, intervals: 0}
stages:
- {name: task, command: data make, function: "recipe_parts:write", num: 4}
- {name: first, command: rate, path: $task/rows.jsonl, function: "recipe_parts:length", raters: 2, noise: $noise}
- {name: joined, command: data aggregate, path: $first, method: bradley_terry}
"""
ROUNDS = """
output_dir: out
stages:
- {name: task, command: data make, function: "recipe_parts:write", num: 2}
- rounds: 3
  carry:
    before: {first: $task/rows.jsonl, then: $rated}
    all: {first: [], then: [$all, $rated]}
  stages:
  - {name: rated, command: rate, path: $before, function: "recipe_parts:length", seed: $round}
- {command: reward, model: {path: lm}, data: {path: $rated, mixture: $all}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A fresh working directory with the functions that recipes name."""
    (tmp_path / "recipe_parts.py").write_text(FILES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("recipe_parts", None)
    yield tmp_path
    sys.modules.pop("recipe_parts", None)


def tree(text: str) -> dict:
    return yaml.safe_load(text)


def run(text: str, changes=None, **options):
    return recipe.run(RecipeArgs(**options), changes, recipe=tree(text))


def stages(text: str, changes=None) -> dict:
    """label -> stage."""
    found, _ = recipe.stages_of(RecipeArgs(), changes, tree(text))
    return {one.label: one for one in found}


def refusal(text: str, changes=None) -> str:
    with pytest.raises(UserError) as error:
        stages(text, changes)
    line = str(error.value)
    assert "\n" not in line
    return line


def calls() -> list:
    """What the functions were called with since the last look."""
    import recipe_parts

    made = list(recipe_parts.calls)
    recipe_parts.calls.clear()
    return made


def test_references_defaults_and_outputs_become_options():
    found = stages(RECIPE)
    assert list(found) == ["task", "first", "joined"]
    assert found["task"].output == "out/task" and found["first"].output == "out/first.jsonl"
    first = found["first"].config
    assert (first.path, first.noise, first.seed, first.output) == ("out/task/rows.jsonl", 0.5, 1, "out/first.jsonl")
    assert stages(RECIPE.replace("$task/rows", "$$none/rows"))["first"].config.path == "$none/rows.jsonl"
    assert found["joined"].config.path == "out/first.jsonl" and found["joined"].config.intervals == 0
    assert [one.inputs for one in found.values()] == [(), ("task",), ("first",)]


def test_a_stage_outweighs_defaults_and_the_command_line_outweighs_both():
    text = RECIPE.replace("raters: 2", "raters: 2, seed: 5")
    assert stages(text)["first"].config.seed == 5
    changed = stages(text, {"stages.first.seed": 6, "defaults.seed": 7, "variables.noise": "0.25"})
    assert (changed["first"].config.seed, changed["joined"].config.seed) == (6, 7)
    assert changed["first"].config.noise == 0.25
    dotted = "output_dir: out\ndefaults: {run: {seed: 1}, run.eval_every: 5}\nstages:\n"
    dotted += "- {command: sft, model: {path: x}, data: {path: a.jsonl}, sft: {epochs: 2}, sft.num_samples: 3}"
    sft = stages(dotted, {"stages.sft.sft.num_samples": 9, "defaults.run.eval_every": 7})["sft"].config
    assert (sft.sft.num_samples, sft.run.eval_every, sft.sft.epochs, sft.run.seed) == (9, 7, 2, 1)


def test_rounds_carry_what_the_round_before_made():
    found = stages(ROUNDS)
    assert list(found) == ["task", "round1/rated", "round2/rated", "round3/rated", "reward"]
    paths = [found[f"round{i}/rated"].config.path for i in (1, 2, 3)]
    assert paths == ["out/task/rows.jsonl", "out/round1/rated.jsonl", "out/round2/rated.jsonl"]
    assert [found[f"round{i}/rated"].config.seed for i in (1, 2, 3)] == [1, 2, 3]
    assert found["round2/rated"].inputs == ("round1/rated",)
    last = found["reward"]
    assert last.config.data.path == "out/round3/rated.jsonl"
    assert last.config.data.mixture == [f"out/round{i}/rated.jsonl" for i in (1, 2, 3)]
    assert set(last.inputs) == {"round1/rated", "round2/rated", "round3/rated"}


def test_a_group_of_options_may_be_a_variable():
    arch = "{vocab_size: 24, width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2, head_dim: 8, ffn_width: 32, "
    text = f"""
output_dir: out
variables: {{shape: {arch}max_positions: 40}}}}
stages:
- {{command: sft, model: {{arch: $shape, tokenizer: tok}}, data: {{path: a.jsonl}}, optim: {{learning_rate: 1.0e-5}}}}
- {{command: ppo, model: {{path: "${{sft}}/model"}}, reward: {{gold: "a:b"}}, sampling: {{top_p: 1}}}}
"""
    found = stages(text)
    assert found["sft"].config.model.arch.max_positions == 40
    assert found["sft"].config.optim.learning_rate == 1e-5
    assert found["ppo"].config.model.path == "out/sft/model"


def test_a_group_of_several_stages_is_each_ones_own_and_is_merged_with_defaults():
    text = """
output_dir: out
variables: {often: {eval_every: 5}, policy: {path: a, quantize: int8}}
defaults: {run: {seed: 3, eval_every: 9}, data: {path: $none}}
stages:
- {command: sft, model: $policy, lora: {rank: 4}, data: {path: a.jsonl}, run: $often}
- {command: reward, model: {path: $sft/model}, data: {path: b.jsonl}, run: $often}
"""
    found = stages(text)
    assert [one.output for one in found.values()] == ["out/sft", "out/reward"]
    assert {(one.config.run.seed, one.config.run.eval_every) for one in found.values()} == {(3, 5)}
    assert "model.path: the file has '$policy' for model" in refusal(text, {"stages.sft.model.path": "b"})
    assert stages(text, {"stages.sft.model": "{path: b}"})["sft"].config.model.path == "b"


WRONG = [
    ("raters: 2", "ratters: 2", "stage first: unknown option 'ratters'; did you mean raters?"),
    ("raters: 2", "raters: two", "stage first: raters is 'two'; give a whole number"),
    ("raters: 2", "raters: 0", "stage first: raters is 0; make it at least 1"),
    ("path: $task/", "path: $tsak/", "path: '$tsak/rows.jsonl': there is no $tsak at this point; did you mean $task?"),
    ("path: $first", "path: $joined", "there is no $joined at this point"),
    ("path: $first", "path: 5$", "has a $ that starts no name"),
    ("command: rate", "command: rat", "stage first: unknown command 'rat'; did you mean rate?"),
    ("command: rate", "command: inspect", "stage first: inspect leaves nothing"),
    ("command: rate", "command: recipe", "stage first: recipe leaves nothing"),
    ("name: first", "name: task", "name task: it comes twice"),
    ("name: first", "name: fi-rst", "name 'fi-rst': give one of letters"),
    ("seed: 1, ", "sede: 1, ", "defaults: no stage has an option 'sede'; did you mean seed?"),
    ("path: $first", "path: $first, output: ./out/first.jsonl", "joined: first writes to ./out/first.jsonl, too"),
    (
        "path: $first",
        "path: $first, output: ./out/task/j.jsonl",
        "joined: ./out/task/j.jsonl is within what task makes",
    ),
    ("noise: 0.5", "noise: null", "variable noise has no value; give --variables.noise VALUE"),
    ("output_dir: out", "outptu_dir: out", "a recipe has no 'outptu_dir'"),
    ("output_dir: out", "", "there is no output_dir"),
]


@pytest.mark.parametrize(("right", "wrong", "said"), WRONG, ids=[wrong for _, wrong, _ in WRONG])
def test_what_does_not_fit_is_one_line_with_the_stage_and_a_cure(right, wrong, said):
    assert RECIPE.count(right) >= 1
    assert said in refusal(RECIPE.replace(right, wrong))


@pytest.mark.parametrize("count", ["0", "-1", "99999999", "1.5", "many", "[1]"])
def test_a_number_of_rounds_that_is_none_is_one_line(count):
    assert "is no number of rounds; give one between 1 and 10000" in refusal(
        ROUNDS.replace("rounds: 3", f"rounds: {count}")
    )


def test_a_mistake_in_the_last_round_is_found_before_the_first_runs(here):
    text = ROUNDS.replace("mixture: $all", "mixture: $al")
    with pytest.raises(UserError, match=r"stage reward: data: mixture: '\$al': there is no \$al .*mean \$all"):
        run(text)
    assert not Path("out").exists()
    for number in ("0", "00", "-1", "²"):
        assert f"rounds: '{number}' is no number" in refusal(ROUNDS.replace("rounds: 3", f"rounds: '{number}'"))
    assert "carry.all has no then" in refusal(ROUNDS.replace(", then: [$all, $rated]", ""))
    text = ROUNDS.replace("path: lm", "path: lm/$all")
    assert "$all is no text" in refusal(text)
    text = ROUNDS + "- {name: again, command: reward, model: {path: $reward/modle}}\n"
    assert "the run directory of reward has no modle; did you mean model?" in refusal(text)


def test_changes_to_what_is_not_there_are_refused():
    assert "no stage 'frist'; did you mean first?" in refusal(RECIPE, {"stages.frist.seed": 1})
    assert "no variable 'nois'; did you mean noise?" in refusal(RECIPE, {"variables.nois": 1})
    assert "close its brackets" in refusal(RECIPE, {"variables.noise": "[1"})


def test_what_is_finished_is_not_run_again(here, capsys):
    first = run(RECIPE)
    assert [one[0] for one in calls()] == ["write", "length"]
    assert [row["finished_before"] for row in first["stages"]] == [False] * 3
    rows = [json.loads(line) for line in Path("out/joined.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and first["stages"][2]["figures"] == {"rows": 4}
    second = run(RECIPE)
    assert calls() == []
    assert [row["finished_before"] for row in second["stages"]] == [True] * 3
    assert second["stages"][0]["wall_s"] == first["stages"][0]["wall_s"]
    assert json.loads(Path("out/summary.json").read_text()) == second
    assert "joined  data aggregate" in re.sub(" +", "  ", capsys.readouterr().out).replace("data  agg", "data agg")


def test_a_changed_stage_is_refused_and_remade_with_what_follows_if_asked(here):
    run(RECIPE)
    calls()
    before = Path("out/joined.jsonl").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"stage first: out/first.jsonl was made with noise 0.5, not 0.25; pass"):
        run(RECIPE, {"variables.noise": 0.25})
    assert calls() == []
    summary = run(RECIPE, {"variables.noise": 0.25}, overwrite=True)
    assert [one[0] for one in calls()] == ["length"]
    assert [row["finished_before"] for row in summary["stages"]] == [True, False, False]
    assert Path("out/joined.jsonl").stat().st_mtime_ns > before
    run(RECIPE, {"variables.noise": 0.25})
    assert calls() == []


def test_a_finished_stage_is_not_taken_for_another_where_a_run_may_change(here):
    text = "output_dir: out\nstages:\n- {command: sft, model: {path: lm}, checkpoint: {allow_changes: true}}"
    Path("out").mkdir()
    record, changed = Record("out"), stages(text, {"stages.sft.optim.learning_rate": 1e-3})["sft"]
    record.start(stages(text)["sft"], "run")
    assert record.actions([changed], overwrite=False) == {"sft": "run"}
    record.entries["sft"] |= {"status": "finished"}
    with pytest.raises(UserError, match=r"stage sft: out/sft was made with optim.learning_rate .*, not 0.001; pass"):
        record.actions([changed], overwrite=False)
    assert record.actions([changed], overwrite=True) == {"sft": "replace"}


def test_what_was_made_of_something_else_is_stale(here):
    run(RECIPE)
    Path("out/first.jsonl").unlink()  # it is made anew, but what follows was not made of that
    with pytest.raises(UserError, match=r"stage joined: out/joined.jsonl was made of another first"):
        run(RECIPE)
    summary = run(RECIPE, overwrite=True)
    assert [row["finished_before"] for row in summary["stages"]] == [True, False, False]


def test_a_stage_that_failed_goes_on_where_it_was(here):
    broken = RECIPE.replace("recipe_parts:length", "recipe_parts:broken")
    with pytest.raises(UserError, match=r"stage first: reward function broken failed .*out of raters"):
        run(broken)
    mended = FILES.replace('raise RuntimeError("out of raters")', "return [0.0, 1.0, 2.0] * 4")
    Path("recipe_parts.py").write_text(mended)
    sys.modules.pop("recipe_parts")
    summary = run(broken)
    assert [row["finished_before"] for row in summary["stages"]] == [True, False, False]


def test_a_file_that_a_kill_left_unrecorded_is_made_again(here):
    run(RECIPE)
    record = json.loads(Path("out/recipe.json").read_text())
    record["joined"] = {k: v for k, v in record["joined"].items() if k in ("command", "output", "inputs", "config")}
    record["joined"]["status"] = "started"
    Path("out/recipe.json").write_text(json.dumps(record))
    Path("out/joined.jsonl").write_text('{"prompt": "half a')
    run(RECIPE)
    assert len([json.loads(line) for line in Path("out/joined.jsonl").read_text().splitlines()]) == 4


@pytest.mark.parametrize("name", ["first.jsonl", "task/rows.jsonl", "run.json", "summary.json"])
def test_a_recipe_leaves_a_file_alone_that_it_did_not_make_however_often_it_is_given(here, name):
    """The stage is under way from the first time on, but what lies there is not its work."""
    file = Path("out", name)
    file.parent.mkdir(parents=True)
    file.write_text('"precious"')
    for _ in range(3):
        with pytest.raises(UserError, match=r"out/.* exists|^output_dir out holds something else"):
            run(RECIPE)
        assert file.read_text() == '"precious"'
    assert run(RECIPE, overwrite=True)["stages"][2]["figures"] == {"rows": 4}


REPORT = """
output_dir: out
stages:
- {name: page, command: report, runs: [old]}
"""


def test_a_report_is_stale_when_a_run_below_what_it_names_has_changed(here):
    run_dir = Path("old/deep/one")
    run_dir.mkdir(parents=True)
    write_record(run_dir, {"stage": "sft", "config": {}, "status": "finished", "step": 1, "total": 1})
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n')
    run(REPORT)
    assert Path("out/page.html").read_text().startswith("<!doctype html>")
    assert [row["finished_before"] for row in run(REPORT)["stages"]] == [True]
    for name in ("metrics.jsonl", "samples.jsonl", "summary.json"):
        (run_dir / name).write_text(f'{{"step": 1, "loss/total": 1.0, "name": "{name}"}}\n')
        with pytest.raises(UserError, match=r"stage page: out/page.html was made when runs had other contents"):
            run(REPORT)
        run(REPORT, overwrite=True)
    (run_dir / "profile").mkdir()
    assert [row["finished_before"] for row in run(REPORT)["stages"]] == [True]
    shutil.copytree(run_dir, "old/two")
    with pytest.raises(UserError, match="had other contents"):
        run(REPORT)


def test_the_command_line_replaces_parts_of_the_file_and_shows_them(here, capsys):
    Path("r.yaml").write_text(RECIPE)
    with pytest.raises(SystemExit) as stop:
        cli.main(["recipe", "r.yaml", "--dry_run", "true", "--variables.noise", "0.125", "--output_dir", "there"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "first (to do; after task)\n  rlhf-jax rate\n" in said
    assert "--noise 0.125" in said and "--output there/first.jsonl" in said
    assert not Path("there").exists()


def test_the_figures_of_a_stage_are_beside_its_output_whatever_that_is_called(tmp_path):
    one = next(iter(stages(ROUNDS).values()))
    for output, beside in (("rows.jsonl", "rows.summary.json"), ("rows.r2", "rows.r2-summary.json")):
        (tmp_path / beside).write_text('{"kept": 3, "path": "a"}')
        assert recipe.figures_of(dataclasses.replace(one, output=str(tmp_path / output)), [{}] * 4) == {
            "rows": 4, "kept": 3
        }  # fmt: skip


def test_a_stage_that_was_stopped_took_the_time_before_that_too(here, monkeypatch):
    monkeypatch.setattr(cli, "execute", lambda *_: {"wall_s": 3600.0})  # as a run that went on says
    assert [one["wall_s"] for one in run(RECIPE)["stages"]] == [3600.0] * 3


def test_the_gold_reward_of_a_round_is_that_of_its_last_stage_that_has_one():
    found = list(stages(ROUNDS).values())
    entries = {one.label: {"wall_s": 1.0, "figures": {}} for one in found}
    entries["round1/rated"]["figures"] = {"before.eval/gold": 0.1, "after.eval/gold": 0.25}
    entries["round3/rated"]["figures"] = {"models.a.gold.mean": 0.5, "models.b.gold.mean": 0.75}
    summary = recipe.summary_of(found, dict.fromkeys(entries, "run"), entries)
    assert [(one["round"], one["gold"]) for one in summary["rounds"]] == [(1, 0.25), (3, 0.75)]
    assert summary["wall_s"] == 5
    said = recipe.table(summary)
    assert "gold reward by round: 0.250, 0.750" in said and "gold of a 0.5, gold of b 0.75" in said


def test_a_tree_of_texts_survives_the_way_through_the_command_line():
    odd = 'judge {prompt}: "{a}" or {b}? #1, 100%\nAnswer:'
    text = f"""
output_dir: out
stages:
- command: collect
  judge: {{template: {json.dumps(odd)}}}
  sources: [{{name: "yes", temperature: 1e-3}}, {{name: "0x1"}}]
  data_path: rows.jsonl
"""
    config = next(iter(stages(text).values())).config
    assert config.judge.template == odd
    assert [(one.name, one.temperature) for one in config.sources] == [("yes", 0.001), ("0x1", None)]


def test_reading_does_not_change_the_recipe_it_is_given():
    given = tree(ROUNDS)
    before = json.dumps(given)
    read(replaced(given, {"stages.rated.seed": "9"}, "recipe"), "recipe", "out")
    assert json.dumps(given) == before


RECIPES = sorted((Path(__file__).parents[1] / "configs" / "recipes").glob("*.yaml"))
TINY = {"walks": 128, "rankings": 64, "steps": 2, "iterations": 2, "rounds": 2}


def tiny(path: Path) -> dict:
    """Changes that make a recipe as small as can be."""
    known = yaml.safe_load(path.read_text())["variables"]
    return {f"variables.{name}": value for name, value in TINY.items() if name in known}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_we_ship_fits_its_commands_and_names_its_rates(path, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "RATES", dict.fromkeys(rates.RATES, rates.Rate(99.0, 99.0)))
    found, _ = recipe.stages_of(RecipeArgs(path=str(path), output_dir=str(tmp_path)), tiny(path))
    assert len(found) >= 4 and not list(tmp_path.iterdir())
    optims = [getattr(stage.config, name, None) for stage in found for name in ("optim", "value_optim")]
    assert max(optim.learning_rate for optim in optims if optim is not None) < 1


SIGNAL = """
import os, signal
left = [3]
def reward(prompts, responses, **columns):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(text)) for text in responses]
"""
CHAIN = """
output_dir: out
defaults:
  data: {batch_size: 16, max_prompt_length: 2, max_length: 8, eval_batches: 1}
  sampling: {max_new_tokens: 4, chunk: 2}
  run: {progress: false, eval_every: 0}
stages:
- {name: task, command: data make, function: "rlhf_jax.tasks.random_walks:write", num: 40}
- {command: ppo, model: {path: lm}, data: {path: $task/prompts.jsonl, eval_path: $task/eval_prompts.jsonl},
   reward: {functions: ["stopping:reward"]}, ppo: {iterations: 4, epochs: 1}}
- {command: sample, model: {path: $ppo/model}, data_path: $task/eval_prompts.jsonl, max_prompt_length: 2}
"""


TWO = """
output_dir: out
stages:
- {name: one, command: data make, function: "rlhf_jax.tasks.random_walks:write", num: 4}
- {name: two, command: data make, function: "rlhf_jax.tasks.random_walks:write", num: 4}
"""


def test_a_signal_that_came_as_a_stage_ended_stops_the_recipe_before_the_next_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute, watch = cli.execute, interrupts.Watch()

    def ends(*given):
        loop = interrupts.Interrupts(print)
        signal.raise_signal(signal.SIGTERM)
        loop.close()
        return execute(*given)

    try:
        with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped after stage one; the same command"):
            patch.setattr(cli, "execute", ends)
            run(TWO)
    finally:
        watch.close()
    assert Path("out/one").exists() and not Path("out/two").exists()
    assert [row["finished_before"] for row in run(TWO)["stages"]] == [True, False]


@pytest.mark.slow
def test_a_stage_that_a_signal_stopped_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "stopping", raising=False)
    (tmp_path / "stopping.py").write_text(SIGNAL)
    (tmp_path / "lm").symlink_to(toy_directory() / "policy")
    with pytest.raises(Stopped, match="recipe: stopped in stage ppo; the same command goes on there"):
        run(CHAIN)
    assert not Path("out/sample.jsonl").exists()
    summary = run(CHAIN)
    assert [row["finished_before"] for row in summary["stages"]] == [True, False, False]
    run(CHAIN, output_dir="whole")
    logged = [Path(out, "ppo", "metrics.jsonl").read_text().splitlines() for out in ("out", "whole")]
    rows = [[row["policy/loss"] for row in map(json.loads, lines) if "policy/loss" in row] for lines in logged]
    assert len(rows[0]) == 4 and rows[0] == rows[1]
    assert Path("out/sample.jsonl").read_text() == Path("whole/sample.jsonl").read_text()
