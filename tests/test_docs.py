"""The pages say what is so: every block of code runs or is parsed, and links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml
from chats import CHATML, chat_tokenizer
from tiny import ONE, model_params

from rlhf_jax import cli
from rlhf_jax.config import ArchConfig, MeshConfig
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model
from rlhf_jax.models.loading import Loaded, save_model
from rlhf_jax.sharding import make_mesh, tree_shardings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HUB = "hf://HuggingFaceTB/SmolLM2-135M"
SMALL = {  # what makes a command of a tutorial cheap
    "reward": "--data.max_length 96",
    "ppo": "--data.max_length 80 --data.max_prompt_length 48 --ppo.iterations 2 --sampling.max_new_tokens 8",
    "collect": "--max_prompt_length 48 --sampling.max_new_tokens 8",
    "evaluate": "--max_length 128 --max_prompt_length 64",
    "sample": "--max_prompt_length 48 --sampling.max_new_tokens 8",
}


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """(why it is not run, language, text) of the blocks of a page that name their language."""
    return BLOCK.findall(path.read_text("utf-8"))


def commands(text: str) -> list[list[str]]:
    """The arguments of every rlhf-jax in a block of shell, wherever it stands in its line."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|\s|/)rlhf-jax\s+(.*)", line) for line in lines if not line.startswith("#")]
    return [shlex.split(one[1], comments=True) for one in found if one]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_command_of_a_page_is_understood(path, monkeypatch):
    """Its options and files of options are read; what would run it is not called."""
    monkeypatch.chdir(ROOT)
    for _, language, text in blocks(path):
        for arguments in commands(text) if language == "sh" else []:
            asked = []
            monkeypatch.setattr(cli, "execute", lambda *given: asked.append(given))  # noqa: B023
            monkeypatch.setattr(cli, "run_directory", lambda *given: asked.append(given))  # noqa: B023
            written = [each for each in arguments if each not in ("...", "|")]
            if "--config" in written and "cat > " + written[written.index("--config") + 1] in text:
                continue  # it is run where the file is written
            cli.dispatch(written)
            assert asked or written[0] in ("schema", "completion"), written


def test_every_block_of_yaml_is_what_a_command_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "block.yaml"
    found = [(page, text) for page in PAGES for _, language, text in blocks(page) if language == "yaml"]
    for page, text in found:
        file.write_text(text)
        if "stages" in yaml.safe_load(text):
            file.rename("summaries.yaml")
            assert cli.code_of(["recipe", "summaries.yaml", "--variables.base", "my-model", "--dry_run", "true"]) == 0
            continue
        assert any(takes(command, file) for command in ("sft", "collect", "evaluate")), (page.name, text)


def takes(command: str, file: Path) -> bool:
    """Whether a command reads a file of options."""
    try:
        cli.parse(command, ["--config", str(file)])
    except UserError:
        return False
    return True


def test_links_lead_to_pages_and_files_that_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            made = page.parent.name == "docs" and target.startswith("reference/")  # by hooks.py
            assert "://" in target or made or (page.parent / target).exists(), (page.name, target)


# --- the tutorials, from the first block to the last, in one directory


class Shell:
    """Runs blocks in a directory: bash runs shell, but that rlhf-jax is called in this process, made cheap."""

    def __init__(self, swaps: dict[str, str]):
        self.swaps = swaps

    def swapped(self, text: str) -> str:
        for name, ours in self.swaps.items():
            text = text.replace(name, ours)
        return text

    def sh(self, text: str) -> None:
        (ask, asks), (said, say) = os.pipe(), os.pipe()
        call = (
            f"rlhf-jax() {{ local IFS=$'\\x1f' code; echo \"$*\" >&{asks}; read -r code <&{said}; return $code; }}\n"
        )
        bash = subprocess.Popen(["bash", "-euc", call + self.swapped(text)], pass_fds=(asks, said))
        os.close(asks)
        with os.fdopen(ask) as requests, os.fdopen(say, "w", buffering=1) as answers:
            for request in requests:
                arguments = request.rstrip("\n").split("\x1f")
                print(cli.code_of([*arguments, *SMALL.get(arguments[0], "").split()]), file=answers)
        os.close(said)
        assert bash.wait() == 0, text

    def python(self, text: str) -> dict:
        """What a block defines. One that begins with the name of a file is written to it and imported by others."""
        if name := re.match(r"# (\S+\.py)\n", text):
            file = Path(name[1])
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        names = {"__name__": "__main__"}
        exec(compile(self.swapped(text), name[1] if name else "block", "exec"), names)
        return names


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A small policy that reads any text, and has a chat template."""
    path, tokenizer = tmp_path_factory.mktemp("docs") / "policy", chat_tokenizer(CHATML)
    tokenizer.save_pretrained(path)
    loaded, mesh = Tokenizer.load(str(path)), make_mesh(MeshConfig(), devices=ONE)
    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "ffn_width": 32, "max_positions": 128}
    model = Model(ArchConfig(vocab_size=len(tokenizer), width=16, **sizes))
    params = model_params(model, 0)
    params = jax.device_put(params, tree_shardings(mesh, params))
    save_model(path, Loaded(model, params), params, loaded)
    return str(path)


@pytest.fixture
def shell(policy, tmp_path, monkeypatch):
    """A `Shell` in an empty directory, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # one device compiles faster
    before = set(sys.modules)
    quick = {"runs/quickstart/sft/model": policy, "runs/quickstart/reward_model/model": "runs/reward/model"}
    yield Shell({HUB: policy, **quick})
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("brief", "mine", "taste", "my_fork"):
            del sys.modules[name]


@pytest.mark.slow
def test_the_tutorials_and_the_page_of_forks_run_from_top_to_bottom(shell):
    """In the order of reading: each goes on with what the one before left."""
    pages = [ROOT / "docs" / "tutorials" / f"{name}.md" for name in ("reward_model", "ppo", "swap", "study")]
    for page in [*pages, ROOT / "docs" / "forks.md"]:
        for why, language, text in blocks(page):
            if why or language == "diff":
                continue
            names = getattr(shell, language)(text)
            if "dpo_loss" in (names or {}):
                pairs = [{"prompt": f"a{i}", "chosen": "b", "rejected": "c"} for i in range(8)]
                names["run"](shell.swaps[HUB], pairs, "runs/dpo", steps=2, batch_size=8, max_length=16)
    for name, stage in {"reward": "reward", "ppo": "ppo", "brief": "ppo", "mine": "ppo", "cispo": "ppo"}.items():
        assert json.loads(Path(f"runs/{name}/run.json").read_text())["stage"] == stage
    few, *_ = json.loads(Path("runs/reward/summary.json").read_text())["remarks"]
    assert few.startswith("4 optimiser steps are few for 39 rows to be learned; raise reward.epochs (1)")
    rows = [json.loads(line) for line in Path("rehearsed.jsonl").read_text().splitlines()]
    assert rows and all(len(row["raters"]) == 3 and 2 <= len(row["responses"]) <= 4 for row in rows)
    assert Path("compared.html").stat().st_size > 10_000


def test_other_blocks_of_python_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}) + "\n")
    yaml_of = [text for _, language, text in blocks(ROOT / "docs" / "recipes.md") if language == "yaml"]
    Path("summaries.yaml").write_text(yaml_of[0])
    for page in ("data", "recipes", "report"):
        for _, language, text in blocks(ROOT / "docs" / f"{page}.md"):
            if language == "python":
                exec(compile(text, page, "exec"), {})
    assert json.loads(Path("gsm8k_train.prompts.jsonl").read_text())["answer"] == "2"
    assert "rlhf-jax ppo" in capsys.readouterr().out
