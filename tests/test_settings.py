"""Settings as a whole: what YAML holds of them is what they are, and whatever else is given is one line."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rlhf_jax import cli, config
from rlhf_jax.cli.commands import dotted, fields
from rlhf_jax.config.settings import PathText
from rlhf_jax.errors import UserError

DERANDOMISED = settings(
    max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
REQUIRED = {
    "inspect": {"model": "m"},
    "convert": {"model": "m", "output": "o"},
    "plan": {"topology": "v5e:4x4"},
    "label": {"output": "votes.jsonl"},
}
CLASSES = [c for c in vars(config).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]
ODD_TEXTS = ["", "~", "yes", "1", "1e3", "0x1f", "a: b", "# c", " a ", "a\nb", "'", '"', "é 日", "{", "@", "-"]


def values_of(hint: Any) -> st.SearchStrategy:
    """Values of a type, the odd ones among them."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return st.sampled_from(parts)
    if kind in (list, tuple):
        return st.lists(values_of(parts[0]), max_size=3).map(kind)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(-2, 2**31)
    if hint is float:
        return st.floats(allow_nan=False) | st.sampled_from([0.0, 0.5, 1.0, 1e-5, -1.0])
    return st.sampled_from(ODD_TEXTS) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)


@pytest.mark.parametrize("command", ["sft", "grpo", "collect", "data inspect", "label"])
@DERANDOMISED
@given(data=st.data())
def test_settings_come_back_from_yaml_as_they_were(command, data, tmp_path_factory):
    cls = cli.COMMANDS[command].args
    hints = {
        name: hint
        for name, hint in dotted(fields(cls))
        if not fields(hint) and name.split(".")[0] not in ("sources",) and type(None) not in typing.get_args(hint)
    }
    name = data.draw(st.sampled_from(sorted(name for name in hints if ".arch." not in name)))
    value = data.draw(values_of(hints[name]))
    tree: dict[str, Any] = {**REQUIRED.get(command, {})}
    assume(value != "null" and "null" not in (value if isinstance(value, list) else []))  # is nothing, and refused
    level = tree
    for part in name.split(".")[:-1]:
        level = level.setdefault(part, {})
    level[name.split(".")[-1]] = value
    try:
        made = build(cls, tree)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 1100
        assume(False)
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(made), allow_unicode=True))
    assert cli.parse(command, ["--config", str(path)]) == made


def build(cls: type, tree: dict[str, Any]) -> Any:
    """Settings with these values, the defaults of the command's own groups elsewhere."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    parts = {
        name: replaced(defaults[name], value) if isinstance(value, dict) else value for name, value in tree.items()
    }
    return cls(**parts)


def replaced(part: Any, tree: dict[str, Any]) -> Any:
    return dataclasses.replace(
        part, **{n: replaced(getattr(part, n), v) if isinstance(v, dict) else v for n, v in tree.items()}
    )


WRONG: dict[Any, list[Any]] = {
    int: ["8", 1.5, True, None, [1], math.nan],
    float: ["1", True, None, [1.0]],
    bool: [1, 0, "true", None],
    str: [1, None, ["a"], b"a", object()],
    list: ["ab", {"a"}, None, [[1]], [object()], 3],
    tuple: ["ab", None, [object()], 3],
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_values_of_another_type_are_one_line_wherever_settings_are_made(cls):
    given = {"LabelArgs": {"output": "v.jsonl"}, "InspectArgs": {"model": "m"}, "PlanArgs": {"topology": "v5e:4x4"}}
    given["ConvertArgs"] = {"model": "m", "output": "o"}
    for name, hint in typing.get_type_hints(cls).items():
        kind = typing.get_origin(hint) or hint
        wrong = ["", "no such", None, 1] if kind is Literal else WRONG.get(kind, [])
        for value in wrong:
            with pytest.raises(UserError) as error:
                cls(**{**given.get(cls.__name__, {}), name: value})
            assert str(error.value).isprintable() and len(str(error.value)) < 1100 and name in str(error.value)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_path_has_the_home_directory(cls, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    hints = typing.get_type_hints(cls, include_extras=True)
    paths = [name for name, hint in hints.items() if hint is PathText or typing.get_args(hint)[:1] == (PathText,)]
    names = ("path", "eval_path", "data_path", "text_path", "ptx_path", "output", "output_dir", "out", "mixture")
    assert {name for name in hints if name in (*names, "tokenizer", "reference", "demonstrations")} <= set(paths)
    for name in paths:
        many = hints[name] is not PathText
        needed = {"LabelArgs": {"output": "v.jsonl"}, "ConvertArgs": {"model": "m", "output": "o"}}
        needed |= {"PlanArgs": {"topology": "v5e:4x4"}}
        needed |= {"PPOConfig": {"ptx_coef": 1.0}, "SourceConfig": {"shots": 1, "demonstrations": "d"}}
        given = {**needed.get(cls.__name__, {}), name: ["~/x.jsonl", Path("~")] if many else "~/x.jsonl"}
        found = getattr(cls(**given), name)
        assert found == ([f"{tmp_path}/x.jsonl", str(tmp_path)] if many else f"{tmp_path}/x.jsonl")
        with pytest.raises(UserError):
            cls(**{**given, name: ["a\0b"] if many else "a\0b"})


ODD = ["", "-1", "9" * 5000, "nan", "[", "{a: 1}", "[[1]]", "# c", "x" * 9000, "\x1b[31m", "&a [*a]", "\x00"]


@pytest.mark.parametrize("command", ["ppo", "collect", "plan"])
def test_odd_values_of_any_option_are_taken_or_one_line(command, capfd, monkeypatch):
    monkeypatch.setattr(cli, "execute", lambda command, *settings: None)
    names = list(cli.COMMANDS[command].options)
    fixed = ["--topology=v5e:4x4", "--stage=sft"] if command == "plan" else []
    for i, name in enumerate(names[:: 1 + len(names) // 8]):
        for value in ODD[i % 3 :: 3]:
            with pytest.raises(SystemExit) as end:
                cli.main([*command.split(), *fixed, f"--{name}={value}"])
            out, err = capfd.readouterr()
            assert end.value.code in (0, 2) and "Traceback" not in err + out, (name, value)
            if end.value.code:
                assert err.startswith("rlhf-jax: error: ") and err.count("\n") == 1 and len(err) < 1100


@pytest.mark.parametrize(
    ("positions", "command", "given", "prompt", "response"),
    [
        (32, "sft", [], 16, 16),
        (32, "ppo", ["--sampling.max_new_tokens", "20"], 12, 20),
        (32, "grpo", ["--data.max_prompt_length", "4"], 4, 28),
        (32, "sample", ["--sampling.prompt_buckets", "[4, 8]"], 8, 24),
        (32, "collect", [], 16, 16),
        (32, "label", ["--output", "v.jsonl"], 16, 16),
        (32, "ppo", ["--data.max_prompt_length", "30", "--sampling.max_new_tokens", "20"], 30, 20),  # refused later
        (512, "ppo", [], 256, 64),
        (4096, "ppo", [], 512, 64),
        (4096, "bestofn", [], 256, 64),
    ],
)
def test_lengths_left_open_fit_the_positions_of_the_model(tmp_path, positions, command, given, prompt, response):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    made = cli.parse(command, ["--model.path", str(tmp_path), *given])
    longest = made.data.max_prompt_length if hasattr(made, "data") else made.max_prompt_length
    assert (longest, made.sampling.max_new_tokens) == (prompt, response)


def test_lengths_left_open_fit_the_least_of_several_models_and_an_architecture(tmp_path):
    for name, positions in (("short", 32), ("long", 4096)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"n_positions": positions}))
    both = [str(tmp_path / "long"), str(tmp_path / "short")]
    sources = [config.SourceConfig(path=path) for path in both]
    drawn = config.CollectArgs(sources=sources)
    assert (drawn.max_prompt_length, drawn.sampling.max_new_tokens) == (16, 16)
    assert config.ChatArgs(models=both).sampling.max_new_tokens == 16
    assert config.ChatArgs(models=both[:1]).sampling.max_new_tokens == 256
    arch = config.ArchConfig(
        vocab_size=8, width=8, num_layers=1, num_heads=1, num_kv_heads=1, ffn_width=8, max_positions=20
    )
    stage = config.SFTArgs(model=config.ModelConfig(arch=arch))
    assert (stage.data.max_length, stage.data.max_prompt_length, stage.sampling.max_new_tokens) == (20, 10, 10)


def test_all_of_config_hides_no_stage():
    names: dict[str, Any] = {}
    exec("from rlhf_jax import ppo, reward, sft\nfrom rlhf_jax.config import *", names)
    assert all(callable(names[stage].run) for stage in ("ppo", "reward", "sft"))
    assert names["SFTArgs"] is config.SFTArgs and names["TrainArgs"] is config.TrainArgs
