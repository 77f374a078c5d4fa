"""What others give us (models, runs) is data: no code in it runs, and nobody is asked to allow it."""

import json
import os
import shutil

import pytest
from tiny import byte_tokenizer, toy_directory, toy_run

from rlhf_jax.cli import main
from rlhf_jax.config.functions import replace
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.runs import directory

CODE = "open({marker!r}, 'w').close()\nclass Evil: pass\ndef reward(prompts, responses, **columns): return [0.0]\n"


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said, said
    return said


def model_with_code(path, marker):
    """The toy's policy whose every config names code that lies beside it."""
    shutil.copytree(toy_directory() / "policy", path)
    (path / "evil.py").write_text(CODE.format(marker=str(marker)))
    autos, tokenizer = ("AutoConfig", "AutoModelForCausalLM"), {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name, more in (
        ("config.json", {"auto_map": dict.fromkeys(autos, "evil.Evil")}),
        ("tokenizer_config.json", {"auto_map": tokenizer, "tokenizer_class": "Evil"}),
    ):
        there = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**there, **more}))
    return path


def test_a_tokenizer_that_names_code_is_refused_or_read_without_it(tmp_path):
    path = model_with_code(tmp_path / "m", tmp_path / "ran")
    try:
        assert Tokenizer.load(str(path)).vocab_size > 0
    except UserError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["inspect", "sample", "convert"])
def test_commands_on_a_model_that_names_code(tmp_path, capsys, command):
    path, rest = model_with_code(tmp_path / "m", tmp_path / "ran"), []
    if command == "sample":
        path, rest = f"--model.path={path}", ["--prompts=[a]", "--sampling.max_new_tokens=2"]
    if command == "convert":
        rest = [f"--output={tmp_path / 'new'}"]
    with pytest.raises(SystemExit) as ended:
        main([command, str(path), *rest])
    assert ended.value.code in (0, 2) and not (tmp_path / "ran").exists()


def run_with_code(path, marker, function, cwd):
    """A run that was stopped, whose reward is `function`, and its code in the directory of the run."""
    config = toy_run(path)
    config = replace(config, reward__model="", reward__functions=[function])
    path.mkdir(parents=True)
    (path / "evil_of_run.py").write_text(CODE.format(marker=str(marker)))
    directory.write_config(path, "ppo", config)
    record = {"stage": "ppo", "status": "stopped", "note": "", "step": 0, "total": 4, "given": [], "cwd": str(cwd)}
    directory.write_record(path, {**record, "config": directory.plain(config)})


@pytest.mark.parametrize(
    ("function", "stand", "cwd"),
    [
        ("evil_of_run:reward", "elsewhere", "runs/x"),
        ("evil_of_run:reward", "elsewhere", "{}/runs/x"),
        ("evil_of_run:reward", "runs/x", "."),
        ("runs.x.evil_of_run:reward", ".", "."),
        ("x.evil_of_run:reward", "runs", "{}/runs"),
        ("evil_of_run:reward", "link", "{}/link"),
        ("evil_of_archive:reward", "elsewhere", "{}/archive"),
    ],
)
def test_resume_runs_no_code_of_the_run(tmp_path, capsys, monkeypatch, function, stand, cwd):
    """From below the run, or from where the run says that it was started."""
    for name in ("elsewhere", "archive"):
        (tmp_path / name).mkdir()
    (tmp_path / "archive" / "evil_of_archive.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    run_with_code(tmp_path / "runs" / "x", tmp_path / "ran", function, cwd.format(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "x")
    monkeypatch.chdir(tmp_path / stand)
    before = os.sys.path[:]
    said = refused(capsys, "resume", tmp_path / "runs" / "x")
    assert ("evil" in said or "not code" in said) and not (tmp_path / "ran").exists()
    assert os.sys.path == before


def test_resume_takes_functions_from_where_one_stands(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "reward_of_mine.py").write_text("def reward(prompts, responses, **columns): 1 / 0\n")
    run_with_code(tmp_path / "mine" / "x", tmp_path / "ran", "reward_of_mine:reward", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    said = refused(capsys, "resume", "x")
    assert "data.path is empty" in said  # the function was found, and the rows are what is missing


@pytest.mark.parametrize("stage", ["data make", "convert", "nothing", "resume", ["ppo"], None])
def test_resume_runs_stages_alone(tmp_path, capsys, stage):
    run_with_code(tmp_path / "x", tmp_path / "ran", "evil_of_run:reward", ".")
    record = json.loads((tmp_path / "x" / "run.json").read_text())
    (tmp_path / "x" / "run.json").write_text(json.dumps({**record, "stage": stage}))
    refused(capsys, "resume", tmp_path / "x")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_code_is_read(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert Tokenizer.load(str(tmp_path)).vocab_size == 261
