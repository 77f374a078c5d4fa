"""The command line as a newcomer meets it: every mistake is one line with a cure, and no run is lost to one."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import typing
from importlib.metadata import EntryPoint
from pathlib import Path

import jax
import pytest
import yaml
from conftest import FAST
from tiny import ARCH, model_params

from rlhf_jax import __main__, cli, config
from rlhf_jax.cli import parsing
from rlhf_jax.cli.commands import COMMANDS, dotted
from rlhf_jax.config import guess
from rlhf_jax.config.checks import HOLDS
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model, hf
from rlhf_jax.tasks import random_walks as walks

HEAVY = ("jax", "transformers", "jsonargparse", "numpy", "flax")
SFT = """
model:
  tokenizer: tok
  arch: {vocab_size: 24, width: 16, num_layers: 1, num_heads: 2, num_kv_heads: 2, head_dim: 8, ffn_width: 32,
    max_positions: 40}
data: {path: sft.jsonl, batch_size: 8, max_prompt_length: 4, max_length: 16, eval_fraction: 0.2}
sft: {steps: 2, num_samples: 2}
sampling: {max_new_tokens: 4, chunk: 2}
optim: {learning_rate: 1e-3}
run: {output_dir: out}
"""
PPO = """
model: {path: lm}
data: {path: prompts.jsonl, batch_size: 8, max_prompt_length: 2, eval_fraction: 0.2}
reward: {functions: ["cli_rewards:length"]}
sampling: {max_new_tokens: 4, chunk: 2}
ppo: {iterations: 2, epochs: 1, sample_every: 1}
run: {output_dir: out}
"""
REWARDS = """
import numpy as np
def length(prompts, responses, **columns): return [float(len(r)) for r in responses]
def short(prompts, responses, **columns): return [1.0]
def nan(prompts, responses, **columns): return [float("nan")] * len(responses)
def text(prompts, responses, **columns): return ["good"] * len(responses)
def none(prompts, responses, **columns): return None
def nones(prompts, responses, **columns): return [None] * len(responses)
def lonely(responses): return [1.0] * len(responses)
"""


def save_tiny(path: Path, *, score_head: bool, nodes: int = walks.NUM_NODES) -> None:
    """A directory with a tiny model and a random-walk tokenizer, made without compiling anything."""
    model = Model(ARCH, score_head=score_head)
    hf.save_model(path, ARCH, model_params(model, 0), eos_ids=[1], pad_id=0, score_head=score_head)
    walks.make_tokenizer(nodes).save_pretrained(path)


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tokenizer, language model, reward model, data and configs, as a user would have them side by side."""
    home = tmp_path_factory.mktemp("home")
    walks.make_tokenizer().save_pretrained(home / "tok")
    save_tiny(home / "lm", score_head=False)
    save_tiny(home / "rm", score_head=True)
    save_tiny(home / "rm_other_tokenizer", score_head=True, nodes=15)
    demos = walks.demonstrations(walks.make_graph(0), 60, 0)
    write_rows(home / "sft.jsonl", demos)
    write_rows(home / "prompts.jsonl", walks.start_prompts() * 3)
    write_rows(home / "one_long.jsonl", [*demos, {"prompt": "b c d e f g", "response": "a"}])
    write_rows(home / "no_field.jsonl", [*demos, {"prompt": "b"}])
    (home / "empty.jsonl").write_text("")
    (home / "sft.yaml").write_text(SFT)
    (home / "ppo.yaml").write_text(PPO)
    (home / "cli_rewards.py").write_text(REWARDS)
    return home


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A fresh working directory with links to all of `home`."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(home))
    return tmp_path


@pytest.fixture
def call(capsys):
    """call(*arguments) -> (exit code, stdout, stderr) of the command line, in this process."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        return (stop.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(call):
    """refused(*arguments) -> the error's line, after checking that there is nothing else and the exit code is 2."""

    def refused(*arguments: str) -> str:
        code, _, err = call(*arguments)
        assert code == 2
        lines = [line for line in re.split(r"[\r\n]", err) if line]
        assert len(lines) == 1, err
        assert lines[0].startswith("rlhf-jax: error: ") and "Traceback" not in err
        return lines[0].removeprefix("rlhf-jax: error: ")

    return refused


def tree_bytes(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def leave_run(path: Path) -> None:
    """What an earlier run and its user left in a directory."""
    (path / "model").mkdir(parents=True)
    (path / "model" / "weights").write_text("precious")
    (path / "metrics.jsonl").write_text("{}\n")
    (path / "notes.txt").write_text("foreign")
    (path / "figures").mkdir()
    (path / "figures" / "a.png").write_bytes(b"png")


def options(cls, prefix=""):
    """Every dotted option of a config class that takes a value, found by other means than cli's."""
    for f in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[f.name]
        group = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if group:
            yield from options(group, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.name, cls


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--help"], [], ["--version"], ["ppo", "--help"], ["ppo", "--ppo.clip_ration", "0.1"], ["pppo"]],
    ids=" ".join,
)
def test_help_and_typos_import_nothing_heavy(arguments):
    # The help of a command is jsonargparse's own; everything else answers without it.
    heavy = set(HEAVY) - ({"jsonargparse"} if arguments == ["ppo", "--help"] else set())
    code = (
        "import sys\n"
        "from rlhf_jax import __main__, cli\n"
        f"try: cli.main({arguments!r})\n"
        f"finally: print('loaded', [m for m in {heavy!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert done.returncode == (2 if done.stderr else 0)


def test_python_m_is_the_same_program():
    project = tomllib.loads(Path(cli.__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    script = EntryPoint("rlhf-jax", project["scripts"]["rlhf-jax"], "console_scripts")
    assert script.load() is __main__.main
    done = subprocess.run([sys.executable, "-m", "rlhf_jax", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, cli.help_text() + "\n", "")


def test_the_help_names_every_command(call):
    code, out, err = call("--help")
    assert code == 0 and not err
    for name, command in cli.COMMANDS.items():
        assert f"{name} " in out and command.about in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_lists_every_option_with_its_description(call, command):
    code, out, err = call(command, "--help")
    assert code == 0 and not err and max(map(len, out.splitlines())) <= 119
    for group in re.findall(r"--(\S+)\.help\s", out):
        code, arch, err = call(command, f"--{group}.help")
        assert code == 0 and not err and max(map(len, arch.splitlines())) <= 119
        assert arch.startswith(f"usage: rlhf-jax {command} ")
        out += arch
    flat = "".join(out.split())  # words may be broken at hyphens
    for option, name, cls in options(cli.COMMANDS[command].args):
        docs = "".join(base.__doc__ or "" for base in cls.__mro__)
        about = re.search(rf"\n        {name}: (.*(?:\n            .*)*)", docs).group(1)
        about = re.escape("".join(about.split()))
        choice = r"([A-Z0-9_]+|\{[^}]+\}|\[ITEM,\.\.\.\](,--\S+?\+\[ITEM,\.\.\.\])?)"
        assert re.search(rf"--{re.escape(option)}{choice}{about}\(type:[^()]+,default:", flat), option
    assert {"ppo": "(type:Literal['eos','truncate'],default:eos)"}.get(command, "") in flat


# --- options --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "pp": "unknown command 'pp'; did you mean ppo?",
    "zzzz": "unknown command 'zzzz'; `rlhf-jax --help` lists all",
    "ppo --ppo.clip_ration 0.1": "unknown option 'ppo.clip_ration'; did you mean ppo.clip_ratio?",
    "ppo --pppo.clip_ratio 0.1": "unknown option 'pppo.clip_ratio'; did you mean ppo.clip_ratio?",
    "ppo --clip_ratio=0.1": "unknown option 'clip_ratio'; did you mean ppo.clip_ratio?",
    "sft --modl {}": "unknown option 'modl'; did you mean model?",
    "sft --model.arch.widht 8": "unknown option 'model.arch.widht'; did you mean model.arch.width?",
    "sft --model.arch {widht: 8}": "unknown option 'model.arch.widht'; did you mean model.arch.width?",
    "sft --xyzzy 1": "unknown option 'xyzzy'; `rlhf-jax sft --help` lists all",
    "sft runs/first": "unexpected argument 'runs/first'; options are written --name VALUE",
    "sft --data.path": "--data.path has no value; write --data.path VALUE",
    "sft --run.overwrite --run.seed 1": "--run.overwrite has no value; write --run.overwrite VALUE",
    "sft --data.batch_size many": "data.batch_size is 'many'; give a whole number",
    "sft --data.batch_size 8.0": "data.batch_size is '8.0'; give a whole number",
    "sft --optim.learning_rate high": "optim.learning_rate is 'high'; give a number, or nothing",
    "sft --run.exit_code_when_stopped 256": "run.exit_code_when_stopped 256 is not from 0 to 255; give 75",
    "sft --run.profile [3]": "run.profile [3] is not a first and a last step; give two such as [10, 12]",
    "sft --run.profile [3,2]": "run.profile [3, 2] is not a first and a last step; give two such as [10, 12]",
    "sft --run.overwrite maybe": "run.overwrite is 'maybe'; give true or false",
    "sft --data.path null": "data.path is 'null'; give text",
    "sft --data 3": "data is '3'; it is a group of options, such as data.path",
    "sft --model.arch tiny": "model.arch is 'tiny'; it is a group of options, such as model.arch.vocab_size",
    "sft --model.arch.width wide": "model.arch.width is 'wide'; give a whole number",
    "sft --model.arch.norm batch": "model.arch.norm is 'batch'; give one of rms, layer, layer_no_bias",
    "ppo --ppo.stop never": "ppo.stop is 'never'; give one of eos, truncate",
    "ppo --reward.functions a:b,": "run.output_dir is empty; say where to write, as --run.output_dir runs/first",
    "ppo --sampling.prompt_buckets [4,x]": "sampling.prompt_buckets is '[4,x]'; give a list such as [4, 8]",
    "ppo --sampling.prompt_buckets x": """sampling.prompt_buckets is '["x"]'; give a list such as [4, 8]""",
    "ppo --lr 1e-3": "unknown option 'lr'; did you mean optim.learning_rate?",
    "rloo --beta 0.1": "unknown option 'beta'; did you mean rloo.kl_coef?",
    "dpo --sft.pack true": "unknown option 'sft.pack'; did you mean data.pack?",
    "sft --per_device_train_batch_size 8": (
        "unknown option 'per_device_train_batch_size'; did you mean data.batch_size?"
    ),
    "data inspct rows.jsonl": "unknown command 'data inspct'; did you mean data inspect?",
    "train": "unknown command 'train'; did you mean sft?",
    "sft --output_dir . --model.path gpt2": "gpt2: no such directory; did you mean hf://openai-community/gpt2?",
    "score --data.path none/rows.jsonl": "none/rows.jsonl: no such file, and no directory none; check the path",
    "data": "data is not a whole command; write one of data inspect, data prepare, data aggregate, data make",
    "inspect a/b": "a/b: no such directory; give a directory, or hf://a/b for a model of the Hub",
    "sft --config nope.yaml": "--config nope.yaml: No such file or directory; check the path",
    "sft --config .": "--config .: Is a directory; check the path",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line(refused, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    assert refused(*re.findall(r"\{.*?\}|\S+", line)) == MISTAKES[line]


def test_what_other_libraries_call_an_option_leads_to_one_of_ours():
    """No alias points nowhere, and none stands for a name that is ours in every command."""
    known = {name: list(command.options) for name, command in cli.COMMANDS.items()}
    everything = [*known, *dict.fromkeys(option for options in known.values() for option in options)]
    for alias, ends in guess.ALIASES.items():
        assert all(any(f".{name}".endswith(f".{end}") for name in everything) for end in ends.split()), alias
    for name in (name for names in guess.SAME for name in names):
        assert name in everything and guess.same_idea(name, everything) == name
    assert guess.same_idea("data_path", known["sft"]) == "data.path"
    assert guess.same_idea("run.output_dir", known["sample"]) == "output"
    assert guess.same_idea("path", known["sft"]) == "path"  # which may be that of a model


FILES = {
    "modl: {path: x}": ":1: unknown option 'modl'; did you mean model?",
    "data: {path: x}\nmodel:\n  arch: null\n  pth: x": ":4: unknown option 'model.pth'; did you mean model.path?",
    "model: {arch: {widht: 8}}": ":1: unknown option 'model.arch.widht'; did you mean model.arch.width?",
    "batch_size: 8": ":1: unknown option 'batch_size'; did you mean data.batch_size?",
    "1: x": ":1: unknown option '1'; did you mean optim.b1?",
    "model: {eos_ids: [4, x]}": ":1: model.eos_ids is [4, 'x']; give a list such as [4, 8]",
    "data: {path: [x]}": ":1: data.path is ['x']; give text",
    "model: {arch: {width: wide}}": ":1: model.arch.width is 'wide'; give a whole number",
    "model: {arch: {norm: batch}}": ":1: model.arch.norm is 'batch'; give one of rms, layer, layer_no_bias",
    "sft: {loss_on: everything}": ":1: sft.loss_on is 'everything'; give one of response, assistant, all",
    "data: {batch_size: null}": ":1: data.batch_size is 'null'; give a whole number",
    "data: {batch_size: true}": ":1: data.batch_size is 'true'; give a whole number",
    "data: {batch_size: [8]}": ":1: data.batch_size is ['8']; give a whole number",
    "data: 3": ":1: data is '3'; it is a group of options, such as data.path",
    "data: [path]": ":1: data is ['path']; it is a group of options, such as data.path",
    "model: {eos_ids: x}": ":1: model.eos_ids is ['x']; give a list such as [4, 8]",
    "data:\n  path: x\n  batch_size: -1": ":3: data.batch_size is -1; make it at least 0",
    "optim: {learning_rate: -1}": ":1: optim.learning_rate is -1.0; make it at least 0",
    "data: {seed: 1}\ndata: {path: x}": ":2: invalid YAML ('data' comes twice); correct it",
    "data: {path: x}\ndata.path: y": ":1: data.path comes twice; leave one out",
    "data.path: y\ndata: {path: y}": ":2: data.path comes twice; leave one out",
    "data: [1, 2": ":1: invalid YAML (",
    "data:\n\tpath: x": ":2: invalid YAML (",
    "data: *nowhere": ":1: invalid YAML (",
    "- data": ": the file is a list; write options such as `data: {batch_size: 8}`",
    "data": ": the file is plain text; write options such as `data: {batch_size: 8}`",
    "": ": the file is empty; write options such as `data: {batch_size: 8}`",
}


@pytest.mark.parametrize("text", FILES)
def test_a_mistake_in_a_file_is_one_line_that_names_the_file(refused, tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    line = refused("sft", "--config", path).removeprefix(str(path))
    assert line.startswith(FILES[text]) if FILES[text].endswith("(") else line == FILES[text]


def test_a_file_that_is_no_text_is_one_line(refused, tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refused("sft", "--config", tmp_path / "a.yaml")


def test_debug_shows_the_traceback_and_its_absence_hides_it():
    run = [sys.executable, "-m", "rlhf_jax", "sft", "--data.batch_size", "many"]
    plain = subprocess.run(run, capture_output=True, text=True)
    assert (plain.returncode, plain.stderr.count("\n"), "Traceback" in plain.stderr) == (2, 1, False)
    debug = subprocess.run([*run, "--debug"], capture_output=True, text=True)
    assert debug.returncode == 1 and "Traceback" in debug.stderr
    assert debug.stderr.splitlines()[-1] == "rlhf_jax.errors.UserError: data.batch_size is 'many'; give a whole number"


def test_values_reach_the_config_and_later_ones_win(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "optim: {learning_rate: 1e-3}\nppo: {missing_eos: off, kl_coef: 0.1}\ndata.batch_size: 4\n"
        "model: {path: 123, arch: {num_heads: 8, norm: rms}}\nrun: {keep_best: False}\nreward: {functions: ['a:b']}"
    )
    got = cli.parse("ppo", ["--ppo.kl_coef", "9", "--config", str(path), "--sampling.prompt_buckets=[4, 256]"])
    assert got.optim == dataclasses.replace(config.PPO_OPTIM, learning_rate=1e-3), "the others stay PPO's"
    assert (got.ppo.missing_eos, got.ppo.kl_coef) == ("off", 0.1)
    assert (got.model.path, got.data.batch_size, got.run.keep_best) == ("123", 4, False)
    assert (got.model.arch.num_heads, got.model.arch.width) == (8, config.ArchConfig().width)
    assert (got.reward.functions, got.sampling.prompt_buckets) == (["a:b"], [4, 256])
    got = cli.parse("ppo", ["--config", str(path), "--reward.functions+", "c:d", "--model.arch", "{width: 16}"])
    assert got.reward.functions == ["a:b", "c:d"], "name+ appends"
    assert (got.model.arch.num_heads, got.model.arch.width) == (8, 16), "a group adds to what the file says"
    got = cli.parse(
        "ppo", ["--config", str(path), "--model.arch", "null", "--optim", "{b1: 0.5}", "--ppo.kl_coef", "2"]
    )
    assert (got.model.arch, got.optim.learning_rate, got.optim.b1, got.ppo.kl_coef) == (None, 1e-3, 0.5, 2.0)


TWICE = {
    "--optim.b1 .5 --optim.b1 .6": "optim.b1 '.5', then '.6'",
    "--optim.b1 .5 --optim.b1 .5": "",
    "--data_path x --data.path y": "data.path 'x', then 'y'",
    "--optim {b1:\u00a0.5} --optim {b1:\u00a0.6,\u00a0b2:\u00a0.9}": "optim.b1 '.5', then '.6'",
    "--optim.b1 .5 --optim.b2 .6": "",
    "--config a --optim.b1 .7": "",
    "--optim.b1 .7 --config a": "optim.b1 '.7', then '.5' (a:1)",
    "--config a --config b": "optim.b1 '.5' (a:1), then '.6' (b:2); data.path 'x' (a:2), then 'z' (b:3)",
    "--config a --config b --optim.b1 .7 --config b": (
        "optim.b1 '.5' (a:1), then '.6' (b:2); data.path 'x' (a:2), then 'z' (b:3); optim.b1 '.7', then '.6' (b:2)"
    ),
    "--reward.functions+ a:b --reward.functions c:d": (
        "reward.functions+ '[\"a:b\"]', then reward.functions '[\"c:d\"]'"
    ),
    "--reward.functions c:d --reward.functions+ a:b --reward.functions+ e:f": "",
    "--model.arch.width 8 --model.arch null": "model.arch.width '8', then model.arch 'null'",
}


@pytest.mark.parametrize("line", TWICE)
def test_what_is_given_twice_is_said_unless_a_command_line_changes_what_a_file_says(
    line, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("optim: {b1: .5, b2: .9}\ndata.path: x")
    Path("b").write_text("# more\noptim: {b1: .6, b2: .9}\ndata: {path: z}")
    cli.parse("grpo", [word.replace("\u00a0", " ") for word in line.split(" ")])
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"given twice, the last one holds: {TWICE[line]}\n" if TWICE[line] else "")


def test_what_is_given_twice_is_not_said_before_a_refusal(capfd):
    for command in ("grpo --optim.b1 .5 --optim.b1 2", "plan --stage sft --topology v5e:4x4 --topology="):
        assert cli.code_of(command.split()) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1) and err.startswith("rlhf-jax: error: "), err


def test_of_very_many_given_twice_some_are_named_and_the_rest_is_counted(capfd):
    names = [f"optim.{name}" for name in ("learning_rate", "eps", "weight_decay", "clip_norm", "warmup_steps")]
    names += [f"data.{name}" for name in ("max_length", "max_prompt_length", "batch_size", "path", "eval_path")]
    cli.parse("ppo", [f"--{name}={i + 1}" for i in range(2) for name in names])
    err = capfd.readouterr().err
    assert err.count("'1', then '2'") == parsing.MOST_SAID and f" and {10 - parsing.MOST_SAID} more\n" in err


def test_a_part_of_a_recipe_given_twice_is_said(capfd, tmp_path):
    assert cli.settings_of("recipe", ["--path", "x", "--variables.n", "1", "--variables.n", "2"])[1] == {
        "variables.n": "2"
    }
    assert capfd.readouterr().err == "given twice, the last one holds: variables.n '1', then '2'\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_no_arguments_give_the_defaults_and_a_dumped_config_gives_itself(command, tmp_path):
    required = {
        "inspect": {"model": "m"},
        "convert": {"model": "m", "output": "o"},
        "plan": {"topology": "v5e:4x4"},
        "label": {"output": "votes.jsonl"},
    }
    given = required.get(command, {})
    settings = cli.COMMANDS[command].args(**given)
    assert cli.parse(command, [f"--{name}={value}" for name, value in given.items()]) == settings
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(settings)))
    assert cli.parse(command, ["--config", str(path)]) == settings


@pytest.mark.parametrize(("arguments", "given"), [
    ("plan --topology v5e:4x4 --responses 3 --ppo.kl_coef 7 --reward.model r", [{"responses": 3}, {"ppo.kl_coef": 7}]),
    ("certify --batch 2 --grpo.group_size 6", [{"batch": 2}, {"grpo.group_size": 6}]),
    ("data inspect r.jsonl --data.max_length 9", [{"path": "r.jsonl"}, {"data.max_length": 9}]),
    ("recipe r.yaml --stages.sft.sft.steps 5", [{"path": "r.yaml"}, {"stages.sft.sft.steps": "5"}]),
    ("report a b", [{"runs": ["a", "b"]}]),
])  # fmt: skip
def test_print_config_shows_what_a_command_and_the_stage_that_it_looks_at_would_be_told(call, arguments, given):
    code, out, _ = call(*arguments.split(), "--print_config")
    found = [dict(dotted(tree)) for tree in yaml.safe_load_all(out)]
    assert code == 0 and len(found) == len(given)
    for told, some in zip(found, given, strict=True):
        assert some.items() <= told.items()


# --- ranges ---------------------------------------------------------------------------------------------------------

RANGES = {
    "sft": """data.batch_size -1, data.max_length -1, data.max_prompt_length -1, data.eval_fraction 1,
        data.eval_fraction -0.1, data.eval_fraction .nan, data.eval_batches -1,
        model.logprob_chunk 0,
        model.arch.width 0, model.arch.num_layers 0, model.arch.vocab_size 0, model.arch.norm_eps 0,
        sft.epochs 0, sft.steps -1, sft.accumulate 0, sft.num_samples -1, run.log_every 0, run.eval_every -1,
        run.seed -1, run.seed 4294967296, optim.learning_rate -1, optim.learning_rate .inf, optim.b1 1, optim.b2 -0.1,
        optim.eps 0, optim.end_fraction 2, optim.warmup_steps -1, optim.clip_norm -1, optim.weight_decay -1""",
    "reward": """data.microbatch_tokens 0, reward.epochs 0, reward.accumulate 0, reward.steps -1, optim.b1 .nan,
        reward.center_coef -1""",
    "ppo": """sampling.top_p 0, sampling.top_p 1.5, sampling.temperature -1, sampling.max_new_tokens -1,
        ppo.clip_ratio 1e-8, ppo.clip_ratio_high 1e-9, ppo.dual_clip 1.0000000001, ppo.ema_decay 0.99999999,
        reward.timeout 1e10, reward.judge.timeout 1e7, sampling.min_new_tokens -1,
        sampling.top_k -1, sampling.chunk 0, sampling.microbatch -1, ppo.epochs 0,
        ppo.iterations 0, ppo.minibatches 0, ppo.accumulate 0, ppo.clip_ratio 0, ppo.clip_ratio -0.2,
        ppo.clip_ratio_high -1,
        ppo.sample_every 0, ppo.discount 1.1, ppo.gae_lambda -1, ppo.kl_coef -1, ppo.kl_horizon 0, ppo.value_clip -1,
        ppo.dual_clip 0.5, ppo.max_log_ratio 0, ppo.ema_decay 1, ppo.target_kl -1, ppo.critic_warmup -1,
        ppo.ptx_batch_size 0, ppo.truncate_after -1, ppo.score_microbatch -1,
        ppo.microbatch_tokens -1, ppo.missing_eos_value .nan,
        reward.model_weight .nan, reward.model_weight 0, mesh.rollout_tensor -1, value_optim.eps 0""",
    "sample": "num_samples 0, batch_size 0, max_prompt_length -1, seed -1",
    "score": "batch_size 0, max_length 0, max_prompt_length -3",
    "watch": "seconds 0, seconds 1e9",
    "quickstart": "comparisons 0, iterations 0, rounds 0, rater_noise 1.5, seed -1",
}
BAD = [(command, *pair.split()) for command, text in RANGES.items() for pair in text.split(",")]


@pytest.mark.parametrize(("command", "option", "value"), BAD)
def test_a_value_out_of_range_is_one_line_with_option_value_and_cure(refused, command, option, value):
    line = refused(command, f"--{option}", value)
    shown, cure = re.fullmatch(rf"{re.escape(option)} is (\S+); make it (.*)", line).groups()
    assert shown == value.removeprefix(".") or float(shown) == float(value)  # YAML writes .nan and .inf
    assert cure in HOLDS


NUMBERS = {float: (math.nan, math.inf, -1e39, 1e19, 1e-19, -1e-46), int: (2**32, -(2**31), 10**30)}
"""What float32, or a product or ratio of two there, and int32 do not hold."""
GIVEN = {
    "label": {"output": "a.jsonl"}, "inspect": {"model": "m"}, "convert": {"model": "m", "output": "o"},
    "plan": {"topology": "v5e:2x2"},
}  # fmt: skip
"""What commands need to be made."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_of_every_command_is_refused_where_it_is_not_what_would_be_computed_with(command):
    """Whoever adds a field has to say its range."""
    known = COMMANDS[command]
    whole = known.args(**GIVEN.get(command, {}))
    for option, hint in known.options.items():
        parts = [hint, *typing.get_args(hint)]
        for value in NUMBERS.get(next((part for part in parts if part in (int, float)), None), ()):
            if typing.get_origin(hint) in (list, tuple):
                value = [value]
            _, _, rest = option.partition("model.arch.")
            with pytest.raises(UserError) as error:
                if rest:
                    replace(config.ArchConfig(), **{rest.replace(".", "__"): value})
                else:
                    replace(whole, **{option.replace(".", "__"): value})
                pytest.fail(f"--{option} {value} is taken")
            assert isinstance(value, list) or option.split(".")[-1] in str(error.value), option


def test_the_edges_of_the_ranges_are_allowed():
    cli.parse("sft", ["--sft.steps", "0", "--optim.end_fraction", "1"])
    cli.parse("ppo", ["--sampling.top_p", "1", "--sampling.temperature", "0", "--ppo.dual_clip", "3"])


TOGETHER = {
    "sft --model.arch.num_heads 3 --model.arch.num_kv_heads 2": "model.arch.num_heads 3 is not a multiple of "
    "model.arch.num_kv_heads 2; change one of them",
    "sft --model.arch.head_dim 7": "model.arch.head_dim 7 and rope_fraction 1 make 7 rotary dimensions; "
    "choose them so that it is an even number of at most head_dim",
    "sft --data.batch_size 8 --sft.accumulate 3": "data.batch_size 8 is not divisible by sft.accumulate 3; "
    "change one of them",
    "reward --data.batch_size 8 --reward.accumulate 3": "data.batch_size 8 is not divisible by reward.accumulate 3; "
    "change one of them",
    "ppo --sampling.min_new_tokens 65": "sampling.min_new_tokens 65 is more than sampling.max_new_tokens 64; lower it",
    "ppo --sampling.prompt_buckets [8,4]": "sampling.prompt_buckets [8, 4] do not ascend; sort them",
    "ppo --sampling.prompt_buckets [0,256]": "sampling.prompt_buckets [0, 256] has 0; make each at least 1",
    "reward --data.length_buckets [64] --data.pack on": "data.pack on makes sequences of data.max_length; leave out "
    "data.length_buckets",
    "sft --data.length_buckets [64,32]": "data.length_buckets [64, 32] do not ascend; sort them",
    "sft --data.length_buckets [32,32]": "data.length_buckets [32, 32] has one twice; give each once",
    "sft --lora.targets [q_proj]": "lora.targets does nothing with lora.rank 0, which trains the whole model; set "
    "lora.rank",
    "ppo --reward.function_weights [1,0]": "reward.function_weights [1.0, 0.0] are not all finite and other than 0; "
    "leave out a function that should not count, or make it reward.gold",
    "collect --reward.functions [a:b]": "reward does nothing with label none; set label reward, or leave it out",
    "judge --judge.api_key_env KEY --judge.function a:b": "judge.api_key_env is of judge.url, which is empty; give "
    "that one, or leave it out",
    "ppo --data.max_prompt_length 256 --sampling.prompt_buckets [8]": "sampling.prompt_buckets [8] ends below "
    "data.max_prompt_length 256; append "
    "256 to it or lower data.max_prompt_length",
    "sample --max_prompt_length 9 --sampling.prompt_buckets [8]": "sampling.prompt_buckets [8] ends below "
    "max_prompt_length 9; append 9 to it or lower max_prompt_length",
    "score --max_length 256": "max_prompt_length 256 is not below max_length 256, so a response has no room; lower it "
    "or raise max_length",
    "ppo --data.batch_size 64 --ppo.kl_horizon 12.8": "ppo.kl_horizon 12.8 lets one batch of 64 rows bring kl_coef to "
    "0 or below; raise it above 12.8, or set ppo.kl_controller fixed",
    "ppo --ppo.kl_horizon 1": "ppo.kl_horizon 1 lets one batch of 32 rows bring kl_coef to 0 or below; raise it above "
    "6.4, or set ppo.kl_controller fixed",
    "kto --kto.desirable_weight 0 --kto.undesirable_weight 0": "kto.desirable_weight and kto.undesirable_weight are "
    "both 0; raise one of them",
    "reward --reward.rating_loss rlhf_jax.losses:ordinal_rating_loss --reward.rating_low 0 "
    "--reward.rating_high 0.5": "reward.rating_low 0 is not 1 or more below reward.rating_high 0.5, and "
    "ordinal_rating_loss is of whole ratings; multiply those of a finer scale, or leave reward.rating_loss at "
    "squared_rating_loss, which needs no ends",
    "ppo --ppo.stop truncate --ppo.truncate_after 64": "ppo.truncate_after 64 is not below sampling.max_new_tokens "
    "64, so no row would ever stop; lower it",
}


@pytest.mark.parametrize("line", TOGETHER)
def test_settings_that_do_not_go_together_are_one_line(refused, line):
    assert refused(*line.split()) == TOGETHER[line]


def test_notebooks_get_the_same_errors_from_the_classes():
    with pytest.raises(UserError, match=r"^sampling.top_p is 0; make it above 0 and at most 1$"):
        config.SamplingConfig(top_p=0)
    with pytest.raises(UserError, match=r"^value_optim.b1 is 2; make it at least 0 and at most 0.9999999$"):
        config.PPOArgs(value_optim=config.OptimConfig(b1=2))


# --- data, models, meshes -------------------------------------------------------------------------------------------

SFT_MISTAKES = {
    "--data.path sft.json": r"sft\.json: no such file; did you mean sft\.jsonl\?",
    "--data.path=": r"data\.path is empty; give a .*",
    "--data.path empty.jsonl": r"empty\.jsonl: the file is empty; give one with at least one row",
    "--data.path no_field.jsonl": r'no_field\.jsonl:61: no field "response" \(found: prompt\); .*',
    "--data.path sft.yaml": r"sft\.yaml: unknown extension; known are .*",
    "--data.path one_long.jsonl --data.too_long error": r"one_long\.jsonl:61: a prompt of 6 tokens is over "
    r"data\.max_prompt_length = 4; .*",
    "--data.batch_size 800": r"\d+ examples do not fill one batch of 800; set data\.batch_size to at most \d+, .*",
    "--data.path x.jsonl --data.max_length 41": r"data\.max_length 41 is more than the model's 40 positions; lower it",
    "--data.max_length 4": r"max_prompt_length 4 must be below max_length 4, .*",
    "--data.batch_size 12": r"data\.batch_size.* 12 is not divisible by data\*fsdp = 8; set it to a multiple of 8",
    "--data.batch_size 24 --sft.accumulate 2": r"data\.batch_size / sft\.accumulate.* 12 is not divisible by .* = 8.*",
    "--mesh.data 3": r"mesh data\*fsdp\*tensor = 3\*1\*1 = 3, but there are 8 devices; .*",
    "--mesh.data 0": r"mesh .*: sizes are positive, .*",
    "--mesh.tensor 4": r"parameter .* dimension 2 does not divide by tensor = 4; "
    r"choose another mesh, or leave it whole by mesh.rules",
    "--model.tokenizer=": r"model\.tokenizer and model\.path are both empty; give one of them",
    "--model.tokenizer out": r"out: no such directory; name one that holds the tokenizer",
    "--model.tokenizer .": r"\.: holds no tokenizer; it needs tokenizer\.json, .*",
    "--model.arch null": r"model\.path and model\.arch are both empty; give a Hugging Face directory or a shape",
    "--model.path lm": r"model\.path and model\.arch are both given; leave one out .*",
    "--model.arch null --model.path nope": r"no directory nope; .*",
    "--model.arch null --model.path tok": r"tok has no config\.json; .*",
    "--model.arch null --model.path rm": r"rm is a reward or value model; give a language model",
    "--model.arch.norm layer --model.arch.positions learned": r"no Hugging Face family has this shape; the nearest, .*"
    r"; change model\.arch",
    "--run.output_dir=": r"run\.output_dir is empty; say where to write, as --run\.output_dir runs/first",
    "--run.output_dir sft.jsonl": r"run\.output_dir sft\.jsonl is a file; choose a directory",
    "--run.output_dir sft.jsonl/x": r"run\.output_dir sft\.jsonl/x: \S+ is a file, not a directory; .*",
}


@pytest.mark.parametrize("arguments", SFT_MISTAKES)
def test_a_run_that_cannot_be_is_refused_before_it_writes(here, refused, arguments):
    line = refused("sft", "--config", "sft.yaml", *arguments.split())
    assert re.fullmatch(SFT_MISTAKES[arguments], line)
    assert not (here / "out").exists()


PPO_MISTAKES = {
    "--reward.functions []": r"there is no reward; set reward\.model, reward\.judge, or reward\.functions to .*",
    "--reward.functions [cli_rewards]": r"'cli_rewards' names no function; write it as .*",
    "--reward.functions [./cli_rewards.py:length]": r"'\./cli_rewards\.py:length' names no function; write it as .*",
    "--reward.functions [cli_rewards:lenght]": r"'cli_rewards:lenght': module cli_rewards has no function 'lenght'.*",
    "--reward.functions [nowhere:f]": r"'nowhere:f': No module named 'nowhere'; check the spelling or .*",
    "--reward.function_weights [1,2]": r"reward\.function_weights has 2 entries for 1 functions; .*",
    "--reward.model lm": r"lm holds no trained score head \(score\.weight\); train one with `rlhf-jax reward`",
    "--reward.model nope": r"no directory nope; .*",
    "--reward.model rm_other_tokenizer": r"reward model rm_other_tokenizer has another tokenizer than the policy; .*",
    "--model.path rm": r"rm is a reward or value model; give a language model",
    # Before the rows are read, which are not there:
    "--data.path x.jsonl --reward.functions cli_rewards:lonely": r"reward function lonely: too many .*; define .*",
    "--data.path x.jsonl --sampling.max_new_tokens 39": r"lm: prompt length \+ .* = 41 is more .*",
    "--ppo.minibatches 3": r"data\.batch_size 8 is not divisible by ppo\.minibatches \* ppo\.accumulate = 3; .*",
    "--ppo.accumulate 16": r"data\.batch_size 8 is not divisible by ppo\.minibatches \* ppo\.accumulate = 16; .*",
    "--sampling.microbatch 3": r"data\.batch_size 8 is not a multiple of sampling\.microbatch 3; .*",
    "--ppo.score_microbatch 3": r"data\.batch_size 8 is not a multiple of ppo\.score_microbatch 3; .*",
    "--data.batch_size 12": r"data\.batch_size 12 is not divisible by data\*fsdp = 8; .*",
    "--sampling.temperature 0": r"sampling\.temperature 0\.0: PPO learns from log-probs of random samples; make it "
    r"at least 0\.01",
    "--ppo.train_temperature 0.001": r"ppo\.train_temperature 0\.001: PPO learns from .*; make it at least 0\.01",
    "--model.path= --model.tokenizer tok --model.arch {norm: layer, positions: learned}": r"no Hugging Face family .*",
}


@pytest.mark.parametrize("arguments", PPO_MISTAKES)
def test_a_ppo_run_that_cannot_be_is_refused_before_it_writes(here, refused, arguments):
    line = refused("ppo", "--config", "ppo.yaml", *re.findall(r"\{.*?\}|\S+", arguments))
    assert re.fullmatch(PPO_MISTAKES[arguments], line)
    assert not (here / "out").exists()


def test_a_reward_model_with_few_positions_is_refused_before_rows_are_read(here, refused):
    config = json.loads((here / "rm/config.json").read_text())
    (here / "short").mkdir()
    (here / "short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 3}))
    line = refused("ppo", "--config", "ppo.yaml", "--data.path", "x.jsonl", "--reward.model", "short")
    assert re.fullmatch(r"short: prompt length \+ .* = \d+ is more than the model's 3 positions; lower sampl.*", line)


def test_a_file_may_give_one_value_for_a_list(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text('reward: {functions: "mod:fn", function_weights: 2}\nmodel: {eos_ids: 3}\n# é, 😀\n')
    parsed = cli.parsing.parse("ppo", ["--config", str(path), "--reward.functions+", "mod:other"])
    assert parsed.reward.functions == ["mod:fn", "mod:other"]
    assert (parsed.reward.function_weights, list(parsed.model.eos_ids)) == ([2.0], [3])


@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(here, refused, command):
    walks.make_tokenizer(25).save_pretrained(here / "large")
    arguments = ["--model.arch", "null", "--model.path", "lm", "--model.tokenizer", "large"]
    line = refused(command, "--config", f"{command}.yaml", *arguments)
    assert line.startswith("lm: the tokenizer has 28 ids, the model's vocabulary 24; ")
    assert not (here / "out").exists()


def test_a_directory_that_cannot_be_made_is_one_line(here, refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused("sft", "--config", "sft.yaml")
    assert line == f"run.output_dir out: {here} cannot be written to; choose another place or its permissions"


def test_a_directory_that_fails_to_be_made_is_one_line_too(tmp_path, monkeypatch):
    from rlhf_jax.runs.run import Run

    def mkdir(self, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    settings = cli.parse("sft", ["--run.output_dir", str(tmp_path / "new")])
    with pytest.raises(UserError, match=r"new: No space left on device; choose another place$"):
        Run("sft", settings, total=1)


def test_tensorboard_without_tensorboardx_is_refused_at_once(here, refused, monkeypatch):
    monkeypatch.setattr("rlhf_jax.runs.loggers.find_spec", lambda name: None)
    line = refused("sft", "--config", "sft.yaml", "--run.loggers", "tensorboard")
    assert line == 'run.loggers has tensorboard, but tensorboardX is missing; pip install "rlhf-jax[tensorboard]"'


@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_a_run_directory_in_use_is_refused_and_stays_as_it_is(here, refused, command):
    leave_run(here / "out")
    before = tree_bytes(here / "out")
    line = refused(command, "--config", f"{command}.yaml")
    assert line == (
        "run.output_dir out holds another run (metrics.jsonl); choose another directory or pass --run.overwrite true"
    )
    assert tree_bytes(here / "out") == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model.path", "out/model"),
        ("data.path", "out/samples.jsonl"),
        ("model.tokenizer", "out/checkpoints"),
        ("data.mixture", "out/samples.jsonl"),
    ],
)
def test_a_run_never_deletes_what_it_reads(tmp_path, monkeypatch, option, value):
    from rlhf_jax.runs.run import Run

    monkeypatch.chdir(tmp_path)
    leave_run(tmp_path / "out")
    before = tree_bytes(tmp_path / "out")
    given = f"[a.jsonl, {value}]" if option == "data.mixture" else value
    arguments = [f"--{option}", given, "--run.output_dir", "../" + tmp_path.name + "/out", "--run.overwrite", "true"]
    with pytest.raises(
        UserError, match=rf"^{option} {value} is part of the run that would be replaced; choose another"
    ):
        Run("sft", cli.parse("sft", arguments), total=1)
    assert tree_bytes(tmp_path / "out") == before


# --- runs -----------------------------------------------------------------------------------------------------------


WRITTEN = {".lock", "run.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "model"}


def without_times(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.mark.slow
def test_a_ppo_run_from_start_to_finish_and_again_from_its_own_config(here, call, monkeypatch):
    from transformers import AutoConfig, AutoTokenizer

    from rlhf_jax.runs.report import write_beside

    monkeypatch.setattr("rlhf_jax.runs.run.write_beside", write_beside)
    leave_run(here / "out")
    arguments = ["--data.path", "prompts_and_long.jsonl", "--run.overwrite", "true"]
    rows = [*walks.start_prompts() * 3, {"prompt": "b c d e f g"}]
    write_rows(here / "prompts_and_long.jsonl", rows)
    code, out, err = call("ppo", "--config", "ppo.yaml", *arguments)
    assert code == 0, err

    # The screen: standard output says what runs, standard error, which is no terminal here, has no progress bar.
    assert re.search(r"kept \d+ of \d+ rows; dropped 1 with a prompt over 2 tokens; truncated 0", out)
    assert "ppo: 8 device(s) (cpu), mesh data 8 x fsdp 1 x tensor 1" in out
    assert "model: 2,992 parameters, 1 layers, computing in float32" in out
    assert "iterations 2, new tokens per iteration at most 32" in out
    done, *remarks = out.splitlines()[-3:]  # nothing got better; special tokens within responses
    assert re.fullmatch(r"ppo: done in \S+ s, written to out", done)
    assert remarks == [f"! {remark}" for remark in json.loads((here / "out" / "summary.json").read_text())["remarks"]]
    assert not err

    # The directory: our files are new, foreign ones as they were, TensorBoard was not asked for.
    made = here / "out"
    assert {path.name for path in made.iterdir()} == {*WRITTEN, "report.html", "notes.txt", "figures"}
    assert "ppo: the held-out reward" in (made / "report.html").read_text()
    assert (made / "notes.txt").read_text() == "foreign" and (made / "figures" / "a.png").read_bytes() == b"png"
    assert not (made / "model" / "weights").exists()
    assert AutoTokenizer.from_pretrained(made / "model").eos_token == "<eos>"
    assert AutoConfig.from_pretrained(made / "model").model_type == "llama"
    assert json.loads((made / "summary.json").read_text())["iterations"] == 2
    metrics = without_times(made / "metrics.jsonl")
    assert [row["step"] for row in metrics if "rollout/reward" in row] == [1, 2]
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    parts = ("start", "data", "rollout", "reward", "score", "update", "save")
    spent = [{part: line[f"time/{part}_s"] for part in parts if f"time/{part}_s" in line} for line in lines]
    assert [set(line) for line in spent if line] == [set(parts) - {"save"}, set(parts) - {"start"}]
    assert sum(sum(line.values()) for line in spent) <= lines[-1]["time/elapsed_s"]
    samples = [json.loads(line) for line in (made / "samples.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "response", "reward"} <= set(samples[0])

    # The config names every setting, and gives the same run again.
    saved = yaml.safe_load((made / "config.yaml").read_text())
    unset = ("model.arch.", "reward.judge.")  # groups that may be null
    flat = {option for option, _, _ in options(config.PPOArgs) if not option.startswith(unset)}
    assert {name for name in flat if not known(saved, name)} == set()
    command = (made / "config.yaml").read_text().splitlines()[0].removeprefix("# rlhf-jax ")
    code, _, err = call(*shlex.split(command))
    assert code == 0, err
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_times(here / "out-again" / name) == without_times(made / name)
    weights = "model/model.safetensors"
    assert (here / "out-again" / weights).read_bytes() == (made / weights).read_bytes()


def known(tree: dict, dotted: str) -> bool:
    """Whether nested dicts have a dotted name."""
    first, _, rest = dotted.partition(".")
    return first in tree and (not rest or known(tree[first], rest))


@pytest.mark.slow
def test_an_sft_run_of_ten_rows_with_tensorboard_and_a_trace_and_without_a_bar(here, call):
    (here / "few.jsonl").write_text("\n".join((here / "sft.jsonl").read_text().splitlines()[:10]))
    given = [
        "--config",
        "sft.yaml",
        "--run.loggers",
        "tensorboard",
        "--run.progress",
        "false",
        "--sft.num_samples",
        "0",
    ]
    given += ["--data.path", "few.jsonl", "--data.batch_size", "0", "--run.profile", "[2, 9]"]
    code, _, err = call("sft", *given, "--data.batch_size", "32")  # the default size, but given
    assert code == 2 and " examples do not fill one batch of 32; set data.batch_size to at most " in err
    code, out, err = call("sft", *given)
    assert (code, err) == (0, "")
    assert re.search(r"^data\.batch_size 8, since \d training examples do not fill a batch of 32", out, re.M)
    assert "; batches of 8, prompts up to 4 tokens, responses " in out
    assert "sft: 8 device(s) (cpu), mesh data 8 x fsdp 1 x tensor 1" in out
    assert "steps 2, tokens of the first step " in out
    assert {path.name for path in (here / "out").iterdir()} == {*WRITTEN, "tensorboard", "profile"}
    [trace] = (here / "out" / "profile").rglob("perfetto_trace.json.gz")  # of step 2 of 2
    assert b"PjitFunction(" in gzip.decompress(trace.read_bytes())
    assert [p.name[:18] for p in (here / "out" / "tensorboard").iterdir()] == ["events.out.tfevent"]
    saved = cli.parse("sft", ["--config", "out/config.yaml"])
    assert saved == cli.parse("sft", given) and saved.data.batch_size == 0  # a resumed run chooses again
    assert saved.model.arch == ARCH


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("short", r"returned 1 rewards for 8 responses; .*"),
        ("nan", r"returned nan for response 0; .*"),
        ("text", r"returned 'good' for response 0; .*"),
        ("none", r"returned None; return a list.*"),
        ("nones", r"returned None for response 0; .*"),
    ],
)
def test_a_reward_function_that_returns_something_else_is_one_line(here, refused, monkeypatch, name, says):
    # Sampling has nothing to do with it, and compiling it for each case would take a minute.
    from rlhf_jax.online import iteration

    def roll_out(method, loop, policy, batch, key):
        return method.inputs.reward(batch["prompts"], ["b"] * len(batch["prompts"]), batch["columns"])

    monkeypatch.setattr(iteration, "roll_out", roll_out)
    arguments = ["--reward.functions", f"[cli_rewards:{name}]", "--run.progress", "false"]
    line = refused("ppo", "--config", "ppo.yaml", *arguments)
    assert re.fullmatch(rf"evaluation after iteration 0: reward function {name} {says}; then continue .*", line)


def test_an_error_in_the_middle_of_a_run_stands_on_its_own_line(here, call):
    code, _, err = call("ppo", "--config", "ppo.yaml", "--reward.functions", "[cli_rewards:nan]")
    assert code == 2
    last = err.rstrip("\n").split("\n")[-1]
    what = "evaluation after iteration 0: reward function nan returned nan for response 0; return a finite number"
    assert last.startswith(f"rlhf-jax: error: {what}")


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_the_command_that_continues_it_and_leaves_valid_metrics(here):
    run = ["sft", "--config", "sft.yaml", "--sft.steps", "1000000", "--sft.num_samples", "0"]
    run += ["--run.exit_code_when_stopped", "75"]
    env = {**os.environ, "XLA_FLAGS": FAST}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    metrics = here / "out" / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-m", "rlhf_jax", *run], **pipes) as process:
        deadline = time.time() + 120
        while not (metrics.exists() and metrics.stat().st_size > 1000):
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in out + err
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert out.splitlines()[-1] == (
        f"sft: stopped by SIGINT after step {len(rows)} of 1000000 and saved; continue with: rlhf-jax resume out"
    )
    assert [path.name for path in (here / "out" / "checkpoints").iterdir()] == [f"{len(rows):08d}"]


# --- sample and score -----------------------------------------------------------------------------------------------


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_sample_and_score_on_saved_models(here, call):
    ask = ["--prompts", "[b, c d]", "--num_samples", "2", "--sampling.max_new_tokens", "4"]
    code, out, err = call("sample", "--model.path", "lm", *ask, "--output", "made/rows.jsonl")
    loaded = "the model is loaded, the first batch compiles\n"
    begun = f"sample: 4 responses; prompts up to 36 tokens, responses 4; {loaded}"
    hidden = "2 of 4 responses whose ids have special tokens that their text does not show\n"
    assert (code, out, err) == (0, "", begun + hidden)
    rows = rows_of((here / "made" / "rows.jsonl").read_text())
    assert [row["prompt"] for row in rows] == ["b", "b", "c d", "c d"]
    assert all(set(row) == {"prompt", "response", "response_ids", "finished"} for row in rows)
    assert {row["finished"] for row in rows} == {True, False}
    assert len({row["response"] for row in rows}) > 1

    # An empty response is a stop token and nothing else: it has a score.
    write_rows(
        here / "rows.jsonl", [{**row, "id": i} for i, row in enumerate(rows)] + [{"prompt": "b", "response": ""}]
    )
    code, out, err = call("score", "--model.path", "rm", "--data_path", "rows.jsonl", "--output", "scored.jsonl")
    unseen = "2 responses whose ids have special tokens that their text does not show\n"
    kept = "rows: kept 5 of 5 rows; dropped 0; truncated"
    assert (code, out, err) == (0, "", f"{kept} 0; {unseen}score: 5 rows; {loaded}")
    scored = rows_of((here / "scored.jsonl").read_text())
    assert [{k: v for k, v in row.items() if k != "score"} for row in scored] == rows_of(
        (here / "rows.jsonl").read_text()
    )
    model = Model(ARCH, score_head=True)
    params = hf.load_params("rm", ARCH, score_head=True)
    tokenizer = walks.make_tokenizer()
    for row in scored:
        ids = tokenizer.encode(row["prompt"]) + row.get("response_ids", [1])
        tokens = jax.numpy.asarray([ids])
        hidden = model.apply(params, tokens, jax.numpy.arange(len(ids))[None], jax.numpy.ones_like(tokens))
        expected = model.scores(params["score"], hidden)[0, -1]
        assert row["score"] == pytest.approx(float(expected), abs=1e-4)

    # Standard output is rows and nothing else, so that it can be piped.
    code, out, err = call("score", "--model.path", "rm", "--data_path", "rows.jsonl", "--max_prompt_length", "1")
    assert code == 0 and [row["id"] for row in rows_of(out)[:4]] == [0, 1, 2, 3]
    assert err == f"! {kept} 2; {unseen}score: 5 rows; {loaded}"
    assert ["cut" in row for row in rows_of(out)] == [False, False, True, True, False]

    assert call("score", "--model.path", "nowhere", "--data_path", "rows.jsonl", "--output", "again.jsonl")[0] == 2
    assert call("score", "--model.path", "rm", "--data_path", "rows.jsonl", "--output", "again.jsonl")[0] == 0

    before = tree_bytes(here / "made"), (here / "scored.jsonl").read_bytes()
    for command, model_path, where in (("sample", "lm", "made/rows.jsonl"), ("score", "rm", "scored.jsonl")):
        arguments = ask if command == "sample" else ["--data_path", "rows.jsonl"]
        code, out, err = call(command, "--model.path", model_path, *arguments, "--output", where)
        assert code == 2
        assert err == f"rlhf-jax: error: output {where} exists; choose another name or pass --overwrite true\n"
    assert before == (tree_bytes(here / "made"), (here / "scored.jsonl").read_bytes())


def test_sample_decodes_in_microbatches_and_says_what_it_cut(here, call):
    arguments = ["--prompts", "[b c d e, c]", "--sampling.microbatch", "3", "--sampling.max_new_tokens", "2"]
    code, out, err = call("sample", "--model.path", "lm", *arguments, "--max_prompt_length", "2", "--batch_size", "1")
    assert code == 0 and [row["prompt"] for row in rows_of(out)] == ["c"]
    assert err.startswith("! prompts: kept 1 of 2 rows; dropped 1 with a prompt over 2 tokens; truncated 0\n")
    cutting = ["--max_prompt_length", "2", "--batch_size", "1", "--too_long", "truncate"]
    code, out, err = call("sample", "--model.path", "lm", *arguments, *cutting)
    assert [(row["prompt"], row.get("prompt_seen")) for row in rows_of(out)] == [("b c d e", "d e"), ("c", None)]
    assert err.startswith("! prompts: kept 2 of 2 rows; dropped 0; truncated 1\n")


INFERENCE_MISTAKES = {
    "sample --model.path lm": r"there are no prompts; give --prompts .*",
    "sample --model.path lm --prompts [b": r"prompts is '\[b'; give a list such as '\[one, two\]'",
    "sample --model.path lm --prompts ['']": r'prompt 0: "prompt" is empty; fix or remove the row',
    "sample --model.path lm --prompts [b,'_']": r"prompts: kept 1 of 2 rows; .*; remove the empty ones",
    "sample --prompts [b]": r"model\.tokenizer and model\.path are both empty; give one of them",
    "sample --model.path rm --prompts [b]": r"rm is a reward or value model; give a language model",
    "sample --model.path lm --prompts [b] --output tok": r"output tok is a directory; name a \.jsonl file",
    "sample --model.path lm --prompts prompts.jsonl": r"prompts are texts, and prompts\.jsonl is a file; .*",
    "sample --model.path lm --prompts [b] --output o.csv": r"output o\.csv would be read as something else, .*",
    "sample --model.path lm --prompts [b] --output o.jsonl.gz": r"output o\.jsonl\.gz would be read as .*",
    "sample --model.path lm --prompts [b] --output sft.yaml/x": r"output sft\.yaml/x: \S+ is a file, .*",
    "sample --model.path lm --prompts [b] --sampling.max_new_tokens 40": r"prompt length \+ sampling\.max_new_tokens "
    r"= 41 is more than the model's 40 positions; lower sampling\.max_new_tokens",
    "score --model.path rm": r"data_path is empty; give a \.jsonl file of .*",
    "score --model.path rm --data_path nope.jsonl": r"nope\.jsonl: no such file; .*",
    "score --model.path rm --data_path no_field.jsonl": r'no_field\.jsonl:61: no field "response" .*',
    "score --model.path lm --data_path sft.jsonl": r"lm holds no trained score head .*",
}


@pytest.mark.parametrize("line", INFERENCE_MISTAKES)
def test_mistakes_of_sample_and_score_are_one_line(here, refused, line):
    arguments = [part.replace("_'", " '") if part == "[b,'_']" else part for part in line.split()]
    assert re.fullmatch(INFERENCE_MISTAKES[line], refused(*arguments))


LATE = {
    "bestofn --output o.jsonl --reward.model lm": r"lm holds no trained score head .*",
    "bestofn --output o.jsonl --reward.model cut": r"cut/model\.safetensors is no complete safetensors file .*",
    "bestofn --output o.jsonl --reward.model short": r"short: prompt length \+ .* = 6 is more than the model's 3 .*",
    "collect --output o.jsonl --label reward --reward.models [rm,lm]": r"lm holds no trained score head .*",
    "collect --output o.jsonl --select top_two --reward.models [rm,lm]": r"lm holds no trained score head .*",
    "collect --output o.jsonl --select random --selected 3": r"selected 3 of 2 responses to a prompt cannot be; .*",
    "collect --output o.jsonl --label judge --judge.model.path rm": r"rm is a reward or value model; .*",
    "collect --output o.jsonl --label sources --sources [{name:_a},{name:_b,path:_rm}]": r"rm is a reward or .*",
    "evaluate --output_dir o --reward.model lm": r"lm holds no trained score head .*",
    "evaluate --output_dir o --judge.model.path rm": r"rm is a reward or value model; .*",
    "evaluate --output_dir o --text_path prompts.jsonl": r'prompts\.jsonl:1: no field "response" .*',
    "rejection --run.output_dir o --reward.model lm --data.batch_size 8": r"lm holds no trained score head .*",
    "rejection --run.output_dir o --data.batch_size 8": r"nothing says which response is best; .*",
}


@pytest.mark.parametrize("line", LATE)
def test_what_would_be_wrong_after_hours_of_sampling_is_said_before_and_leaves_the_place_free(
    here, refused, monkeypatch, line
):
    monkeypatch.setattr("rlhf_jax.feedback.sources.load_drawer", lambda *_, **__: pytest.fail("it samples"))
    for name in ("cut", "short"):
        shutil.copytree(here / "rm", here / name)
    weights = here / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    config = json.loads((here / "rm" / "config.json").read_text())
    (here / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 3}))
    limits = ["--sampling.max_new_tokens", "4", "--model.path", "lm", "--data_path", "prompts.jsonl"]
    each = (
        ["--data.max_prompt_length", "2"]
        if "rejection" in line
        else ["--max_prompt_length", "2", "--num_samples", "2"]
    )
    assert re.fullmatch(
        LATE[line],
        refused(*[part.replace("_", " ") if "{" in part else part for part in line.split()], *limits, *each),
    )
    assert all(
        len(path.read_bytes().splitlines()) < 2 for path in here.rglob("*.part")
    )  # a header, which binds nobody
    assert not (here / "o.jsonl").exists() and not (here / "o" / "config.yaml").exists()


PLACES = (
    "sample --prompts [b] --model.path lm --output",
    "score --data_path sft.jsonl --model.path rm --output",
    "bestofn --prompts [b] --model.path lm --reward.functions cli_rewards:length --output",
    "rate sft.jsonl --function a:b --output",
    "data aggregate sft.jsonl --output",
    "convert lm --output",
    "data prepare sft.jsonl --out",
    "report out --output",
    "evaluate --prompts [b] --model.path lm --output_dir",
    "recipe instructgpt --output_dir",
)


@pytest.mark.parametrize("line", PLACES)
def test_nothing_is_written_to_a_directory_named_after_the_hub(here, refused, line):
    assert "to the Hub go models alone" in refused(*line.split(), "hf://own/name.jsonl")
    assert not (here / "hf:").exists()


def test_quickstart_refuses_a_directory_in_use(here, refused):
    (here / "q" / "sft").mkdir(parents=True)
    assert refused("quickstart", "--output_dir", "q").startswith("output_dir q holds another run (sft); ")
