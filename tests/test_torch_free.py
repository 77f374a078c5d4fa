"""The library never imports torch, which CI installs for comparisons, and works without it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FAST

import rlhf_jax

ROOT = Path(rlhf_jax.__file__).parent

IMPORTS = """
import importlib, pkgutil, sys
import rlhf_jax
names = [module.name for module in pkgutil.walk_packages(rlhf_jax.__path__, "rlhf_jax.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert len(names) > 40, names
assert "torch" not in sys.modules
"""
# transformers' AutoTokenizer imports torch wherever it is installed. None hides it: importing it then fails.
RUN = """
import sys
from pathlib import Path
sys.modules["torch"] = None
from rlhf_jax import sft
from rlhf_jax.cli import main
from rlhf_jax.config import ArchConfig, DataConfig, ModelConfig, RunConfig, SFTConfig, SFTArgs
from rlhf_jax.tasks import random_walks as walks
home = Path(sys.argv[1])
walks.make_tokenizer().save_pretrained(home / "tokenizer")
rows = walks.demonstrations(walks.make_graph(0), 40, 0)
arch = ArchConfig(vocab_size=24, width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, ffn_width=8,
                  max_positions=96)
sft.run(SFTArgs(model=ModelConfig(arch=arch, tokenizer=str(home / "tokenizer")), sft=SFTConfig(steps=2),
               data=DataConfig(batch_size=8, max_prompt_length=2, max_length=14, eval_fraction=0.2),
               run=RunConfig(output_dir=str(home / "run"), progress=False)), rows=rows)
assert sys.modules["torch"] is None
main(["inspect", str(home / "run" / "model")])
"""


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_no_file_imports_torch():
    assert [path for path in ROOT.rglob("*.py") if imported(path) & {"torch", "accelerate", "tensorflow"}] == []


@pytest.mark.slow
@pytest.mark.parametrize("program", [IMPORTS, RUN], ids=["import", "sft"])
def test_a_process_of_its_own_does_without_torch(tmp_path, program):
    env = {**os.environ, "XLA_FLAGS": FAST}
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(arguments, env=env, cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
