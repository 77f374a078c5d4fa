"""Laws of what may be gone on with: the same contents wherever they lie, and never others under the same name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import typing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import ONE, TOY_ROWS, toy_directory

from rlhf_jax import preference, sft
from rlhf_jax.cli.commands import COMMANDS
from rlhf_jax.commands import bestofn, recipe, rejection
from rlhf_jax.config import (
    BestOfNArgs,
    DataConfig,
    DPOArgs,
    DPOConfig,
    KTOArgs,
    KTOConfig,
    ModelConfig,
    RecipeArgs,
    RejectionArgs,
    RejectionConfig,
    RunConfig,
    SamplingConfig,
    SFTArgs,
    SFTConfig,
)
from rlhf_jax.config.functions import replace, texts
from rlhf_jax.config.settings import PathText, hints_of
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.feedback import sources
from rlhf_jax.models import contents
from rlhf_jax.runs import directory, listing
from rlhf_jax.runs.run import Run
from rlhf_jax.sharding import make_mesh
from rlhf_jax.training import supervised

SAMPLING = SamplingConfig(max_new_tokens=4, chunk=4)
DATA = DataConfig(batch_size=4, max_prompt_length=2, max_length=8, eval_fraction=0.3)
DEMOS = [{"prompt": p, "response": f"{p} c d"} for p in "bcdefghijklm"]
PAIRS = [{**{k: row[k] for k in ("prompt",)}, "chosen": "b c", "rejected": f"d {row['prompt']}"} for row in DEMOS]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Compiling for eight costs more than these tests are worth."""
    for module in (sources, supervised):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, devices=ONE))


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the toy policy that a test may change."""
    return Path(shutil.copytree(toy_directory() / "policy", tmp_path / "policy"))


def changed(model: Path) -> None:
    """Another last bit of one weight, nothing else."""
    tensors = load_file(model / "model.safetensors")
    name = max(tensors, key=lambda each: tensors[each].size)
    tensors[name].reshape(-1)[-1] = np.nextafter(tensors[name].reshape(-1)[-1], np.float32(9))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stop_at(patch, step: int) -> None:
    """A run saves after `step` and ends there."""
    save = Run.save_if_due

    def saving(self, at, tree, notes=None):
        save(self, at, tree, notes)
        if at == step:
            self.save_now(at, tree, notes or {})
            raise Stopped("stopped")

    patch.setattr(Run, "save_if_due", saving)


# --- contents


def test_contents_change_with_any_byte_of_what_is_read_and_not_with_where_it_lies(model, tmp_path):
    rows = write(tmp_path / "rows.jsonl", DEMOS)
    config = SFTArgs(model=ModelConfig(path=str(model)), data=DataConfig(path=rows, mixture=[rows]))
    found = contents.contents(config)
    assert set(found) == {"model.path", "data.path", "data.mixture"} and found["data.path"] == found["data.mixture"]
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    (moved / "README.md").write_text("of no account")
    (moved / "adapter").mkdir()
    assert contents.digest_of(str(moved)) == found["model.path"] == contents.digest_of(os.path.relpath(moved))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        data = (moved / name).read_bytes()
        (moved / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert contents.digest_of(str(moved)) != found["model.path"], name
        (moved / name).write_bytes(data)
    assert contents.digest_of(str(tmp_path / "nowhere")) == contents.digest_of("hf://nobody/nothing@x") == ""
    mixed = lambda name: contents.contents(DataConfig(path=rows, mixture=[name, rows]))["mixture"]  # noqa: E731
    first = mixed("tfds:imdb_reviews@train")
    assert first != mixed("tfds:imdb_reviews@test")  # whose contents are not looked at
    write(tmp_path / "rows.jsonl", DEMOS[:-1])
    assert first != mixed("tfds:imdb_reviews@train")


def paths_of(cls):
    """Names of all fields of a class of settings, and of the groups in it, that hold paths."""
    for name, hint in hints_of(cls).items():
        if hint in (PathText, list[PathText]):
            yield name
        for part in (hint, *typing.get_args(hint)):
            yield from paths_of(part) if dataclasses.is_dataclass(part) else ()


def test_all_that_commands_read_counts_but_what_only_a_plan_and_a_page_of_now_read():
    names = {name for command in COMMANDS.values() for name in paths_of(command.args)}
    written, read_now = {"output", "output_dir", "out"}, {"run", "prices", "calibration"}
    assert names == contents.OPTIONS | {contents.RUNS} | written | read_now
    group = {"a": [{"b": ["x", ""], "c": 1}, {"d": {"e": "y"}}], "f": "z", "g": {"h": None}}
    assert list(texts(group)) == [("a.b", "x"), ("a.d.e", "y"), ("f", "z")]


def test_of_a_large_file_a_change_in_any_tensor_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "SMALL", 1000)
    tensors = {f"t{i}": np.full((200, 100), i, np.float32) for i in range(5)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    first = contents.digest_of(str(tmp_path))
    for name in tensors:
        save_file({**tensors, name: tensors[name] + 1}, file)
        assert contents.digest_of(str(tmp_path)) != first
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(bytes(5000))
    first = contents.digest_of(str(rows))
    rows.write_bytes(bytes(4999) + b"x")
    assert contents.digest_of(str(rows)) != first


# --- runs


def stages(model: Path, out: Path):
    shared = {"model": ModelConfig(path=str(model)), "data": DATA, "run": RunConfig(str(out), progress=False)}
    return {
        "sft": (sft.run, SFTArgs(**shared, sft=SFTConfig(steps=4, num_samples=0)), DEMOS),
        "dpo": (preference.run, DPOArgs(**shared, dpo=DPOConfig(steps=4)), PAIRS),
        "kto": (preference.run, KTOArgs(**shared, kto=KTOConfig(steps=4)), PAIRS),
    }


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_other_weights_at_the_same_path_do_not_continue_a_run_but_the_same_ones_elsewhere_do(
    model, tmp_path, monkeypatch, stage
):
    run, config, rows = stages(model, tmp_path / "run")[stage]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 2)
        run(config, rows=rows)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    moved = shutil.copytree(model, tmp_path / "moved")
    changed(model)
    with pytest.raises(UserError, match=r"another config: model.path .*policy as it was there, with other"):
        run(config, rows=rows)
    shutil.rmtree(model)
    run(replace(config, model__path=str(moved)), rows=rows)
    if stage != "sft":  # whoever forges run.json finds the reference in the checkpoint
        forged = json.loads((tmp_path / "copy" / "run.json").read_text())
        (tmp_path / "copy" / "run.json").write_text(json.dumps({**forged, "files": {}}))
        changed(moved)
        shutil.copytree(moved, model)
        with pytest.raises(UserError, match=r"the weights of the reference model are not those that it started with"):
            run(replace(config, run__output_dir=str(tmp_path / "copy")), rows=rows)


def test_a_finished_run_of_other_rows_or_of_functions_is_not_taken_for_this_one(model, tmp_path):
    _, config, _ = stages(model, tmp_path / "run")["sft"]
    config = replace(config, data__path=write(tmp_path / "rows.jsonl", DEMOS), sft__steps=1)
    summary = sft.run(config)
    assert sft.run(config) == summary
    assert sft.run(replace(config, data__path=os.path.relpath(config.data.path))) == summary
    with pytest.raises(UserError, match="holds a run that got nothing from Python, not rows; give the same, or"):
        sft.run(config, rows=DEMOS)
    write(tmp_path / "rows.jsonl", DEMOS[1:])
    with pytest.raises(
        UserError, match=r"is finished .* differs in data.path .*rows.jsonl as it was there, with other"
    ):
        sft.run(config)
    (tmp_path / "run" / "summary.json").write_text("")
    write(tmp_path / "rows.jsonl", DEMOS)
    with pytest.raises(UserError, match=r"is finished, but its summary.json is missing or broken; pass"):
        sft.run(config)


def test_a_run_without_run_json_goes_on_from_its_checkpoint(model, tmp_path, monkeypatch, capsys):
    _, config, rows = stages(model, tmp_path / "run")["sft"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 2)
        sft.run(config, rows=rows)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    for broken in ("{", "", "[]", '{"stage": 1}', None):
        file = tmp_path / "run" / "run.json"
        file.unlink(missing_ok=True) if broken is None else file.write_text(broken)
        record = directory.read_record(tmp_path / "run")
        assert (record["stage"], record["status"], record["given"]) == ("sft", "crashed", ["rows"])
        with pytest.raises(UserError, match="got rows from Python"):
            listing.resume(str(tmp_path / "run"), [])
    (tmp_path / "run" / "config.yaml").unlink()
    sft.run(config, rows=rows)
    said = capsys.readouterr().out
    assert "continuing after step 2 of 4 (run.json was broken)" in said
    assert "metrics.jsonl has 0 whole lines up to step 2, but 2 were written; what is missing is lost" in said


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\udcffb", "[x]", "\x1b[1m"])
def test_a_directory_below_which_nothing_can_be_saved_is_refused_at_the_start(tmp_path, name):
    with pytest.raises(UserError, match=r"^run.output_dir .*: its path has .*; choose another name$"):
        sft.run(stages(toy_directory() / "policy", tmp_path / name)["sft"][1], rows=DEMOS)
    assert not list(tmp_path.iterdir())


# --- OUTPUT.part


def test_a_part_is_of_the_models_contents(model, tmp_path, monkeypatch):
    config = BestOfNArgs(
        model=ModelConfig(path=str(model)), num_samples=2, sampling=SAMPLING, max_prompt_length=2, batch_size=4,
        output=str(tmp_path / "best.jsonl"), progress=False,
    )  # fmt: skip
    calls = []

    def ends(prompts, responses, **columns):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [float(len(text)) for text in responses]

    config = replace(config, reward__timeout=0.0)
    with pytest.raises(KeyboardInterrupt):
        bestofn.run(config, rows=TOY_ROWS["rows"][:8], functions=[ends])
    moved = shutil.copytree(model, tmp_path / "moved")
    changed(model)
    with pytest.raises(UserError, match=r"best.jsonl.part is made with contents of model.path '\w+', not '\w+'; give"):
        bestofn.run(config, rows=TOY_ROWS["rows"][:8], functions=[ends])
    monkeypatch.chdir(tmp_path)
    before = len(calls)
    bestofn.run(replace(config, model__path=Path(moved).name), rows=TOY_ROWS["rows"][:8], functions=[ends])
    assert len(calls) == before + 3


# --- rejection


def short(prompts, responses, **columns):
    return [-float(len(text.split())) for text in responses]


def rejecting(out: str, model: Path, **changes) -> RejectionArgs:
    config = RejectionArgs(
        model=ModelConfig(path=str(model)),
        data=replace(DATA, max_length=8),
        sampling=SAMPLING,
        rejection=RejectionConfig(rounds=2, num_samples=4, sample_batch_size=32),
        sft=SFTConfig(steps=2, num_samples=0),
        run=RunConfig(output_dir=out, progress=False, eval_every=0),
    )
    return replace(config, **changes)


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def test_rounds_go_on_under_another_name_of_their_directory_and_never_with_others_rounds(model, tmp_path, monkeypatch):
    """Stopped in round 2, then continued by an absolute path, and from elsewhere after a move."""
    prompts = TOY_ROWS["rows"][:12]
    call = lambda out, rows=prompts, **changes: rejection.run(  # noqa: E731
        rejecting(out, model, **changes), rows=rows, functions=[short]
    )
    monkeypatch.chdir(tmp_path)
    call("alone")
    own, count = sft.run, []

    def stops(config, **kwargs):
        count.append(config)
        with monkeypatch.context() as patch:
            if len(count) == 2:
                stop_at(patch, 1)
            return own(config, **kwargs)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Stopped, match=r"^rejection: stopped in round 2 of 2; "),
    ):
        patch.setattr(sft, "run", stops)
        call("run")
    for name in ("absolute", "moved"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    sampled = []
    monkeypatch.setattr(bestofn, "run", lambda config, own=bestofn.run, **kw: sampled.append(1) or own(config, **kw))
    call(str(tmp_path / "absolute"))
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    call("../moved")
    assert not sampled
    for name in ("absolute", "moved"):
        assert weights(tmp_path / name) == weights(tmp_path / "alone")
    others = prompts[::-1]
    with pytest.raises(UserError, match="prompts are not those that it started with"):
        call(str(tmp_path / "run"), rows=others)
    call(str(tmp_path / "run"), rows=others, run__overwrite=True)
    lines = (tmp_path / "run" / "round2" / "best.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [row["prompt"] for row in others]
    assert len(sampled) == 2 and weights(tmp_path / "run") != weights(tmp_path / "alone")


# --- recipes

RECIPE = {
    "output_dir": "out",
    "stages": [
        {"name": "made", "command": "rate", "path": "rows.jsonl", "function": "test_identity:short_one"},
        {"name": "joined", "command": "data aggregate", "path": "$made"},
    ],
}


def short_one(prompts, responses, **columns):
    return short(prompts, responses)


def test_a_finished_stage_whose_output_or_input_has_changed_is_not_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": p, "responses": [{"text": "a b"}, {"text": "c"}]} for p in "xyz"]
    write(tmp_path / "rows.jsonl", rows)
    run = lambda **options: recipe.run(RecipeArgs(**options), recipe=RECIPE)  # noqa: E731
    whole = run()
    assert [stage["finished_before"] for stage in run()["stages"]] == [True, True]
    absolute = recipe.run(RecipeArgs(output_dir=str(tmp_path / "out")), recipe=RECIPE)
    assert [stage["finished_before"] for stage in absolute["stages"]] == [True, True]
    for harm in (b"", (tmp_path / "out" / "made.jsonl").read_bytes()[:-5]):
        (tmp_path / "out" / "made.jsonl").write_bytes(harm)
        with pytest.raises(UserError, match=r"stage made: out/made.jsonl has changed since it was made; pass"):
            run()
        again = run(overwrite=True)
        assert [stage["figures"] for stage in again["stages"]] == [stage["figures"] for stage in whole["stages"]]
    write(tmp_path / "rows.jsonl", rows[1:])
    with pytest.raises(UserError, match=r"stage made: out/made.jsonl was made when path had other contents; pass"):
        run()
    (tmp_path / "rows.jsonl").unlink()  # what a finished stage read may be gone
    assert [stage["finished_before"] for stage in run()["stages"]] == [True, True]
    (tmp_path / "out" / "recipe.json").write_text("{")
    with pytest.raises(UserError, match=r"recipe.json is broken"):
        run()
