"""Commands about the program itself: schemas, completion, what a bug report needs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from rlhf_jax import cli
from rlhf_jax.cli.commands import COMMANDS
from rlhf_jax.cli.completion import completion
from rlhf_jax.cli.schema import schema_of
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import yamls

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_every_preset_fits_the_schema_of_its_command_and_mistakes_do_not():
    jsonschema = pytest.importorskip("jsonschema", reason='needs jsonschema: pip install "rlhf-jax[verifiers]"')
    for path in CONFIGS:
        command = next(line for line in path.read_text().splitlines() if "--config" in line).split("rlhf-jax ")[1]
        tree = yamls.read(path.read_text(), str(path), yamls.Values)
        jsonschema.Draft202012Validator(schema_of(command.split()[0])).validate(tree)
    ppo = jsonschema.Draft202012Validator(schema_of("ppo"))
    good = {"ppo": {"stop": "eos", "kl_coef": 1}, "model": {"arch": None}, "reward": {"functions": ["a:b"]}}
    wrong = [{"ppo": {"stop": "never"}}, {"ppo": {"kl": 1}}, {"pp": {}}, {"reward": {"functions": [1]}}, {"model": 3}]
    assert ppo.is_valid(good) and not any(map(ppo.is_valid, wrong))


def options_of(schema, prefix=""):
    """Dotted names of a schema's properties."""
    for part in (schema, *schema.get("anyOf", [])):
        for name, value in part.get("properties", {}).items():
            yield prefix + name
            yield from options_of(value, f"{prefix}{name}.")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_schema_has_every_option_with_words_and_its_default(command):
    schema = schema_of(command)
    assert set(options_of(schema)) == set(COMMANDS[command].options)
    assert schema == json.loads(json.dumps(schema)) and schema["description"]
    plain = [one for one in schema["properties"].values() if "properties" not in one and "anyOf" not in one]
    assert all(one.get("description") and "default" in one for one in plain)


def test_bash_completes_commands_options_and_choices(tmp_path):
    script = tmp_path / "complete.sh"
    asked = ["''", "re", "data ins", "ppo --ppo.kl_c", "ppo --ppo.stop ''", "data inspect --exa", "sft --run.report t"]
    ask = "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _rlhf_jax; echo ${COMPREPLY[@]}"
    calls = [f"COMP_WORDS=(rlhf-jax {line})\n{ask}\n" for line in asked]
    script.write_text(completion("bash") + "".join(calls))
    found = subprocess.run(["bash", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"ppo", "data", "resume", "schema"} <= set(found[0].split()) and "recipe" in found[1]
    assert found[2:] == ["inspect", "--ppo.kl_coef --ppo.kl_controller", "eos truncate", "--examples", "true"]


def test_env_says_versions_and_no_secret_and_nobodys_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XLA_DUMP", f"{tmp_path}/dump:/home/jane/x")
    for name in ("JAX_API_KEY", "TPU_AUTH_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    cli.dispatch(["env"])
    out = capsys.readouterr().out
    assert "jaxlib" in out and "8 x cpu (cpu), of 1 process(es)" in out and "~/dump:~/x" in out
    assert "hunter2" not in out and "jane" not in out and str(tmp_path) not in out
    cli.dispatch(["env", "--devices", "false"])
    assert "devices" not in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["schema", "schema pp", "completion", "completion fish"])
def test_an_unknown_command_or_shell_is_one_line(wrong, capsys):
    with pytest.raises(UserError, match=r"write rlhf-jax \w+ and one of"):
        cli.dispatch(wrong.split())
    cli.dispatch(["schema", "data", "make"])
    assert yaml.safe_load(capsys.readouterr().out)["title"] == "rlhf-jax data make"
