"""Laws of the source tree: who may import whom, how long things may be, and that every setting is read."""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
from pathlib import Path

import pytest

import rlhf_jax
from rlhf_jax import config

ROOT = Path(rlhf_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

ORDER = (
    ("errors", "types", "tokens", "advantages", "keys"),
    ("losses", "config", "hosts"),
    ("cli", "sharding", "tasks", "data", "runs"),
    ("models",),
    ("inference", "training"),
    ("sft", "reward", "preference", "feedback"),
    ("online",),
    ("ppo", "group"),
    ("commands",),
    ("__init__", "__main__"),
)
"""The entries of rlhf_jax. A file imports what stands before its own entry's line, or its own folder: nothing else."""

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def unit_of(path: Path) -> str:
    """The name in ORDER: the folder for files of a folder."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> set[str]:
    """Dotted names of all that a module imports, inside functions too: `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[str]:
    """The units of rlhf_jax among imported names."""
    parts = [name.split(".") for name in names if name.split(".")[0] == "rlhf_jax"]
    return {p[1] for p in parts if len(p) > 1 and not p[1].startswith("__")}


def others(names: set[str]) -> set[str]:
    """Top-level names of imported packages outside rlhf_jax and the standard library."""
    return {name.split(".")[0] for name in names} - {"rlhf_jax", "__future__"} - sys.stdlib_module_names


def id_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_reader_of_imports_sees_nested_ones_and_submodules():
    source = (
        "import a.b\nfrom rlhf_jax.ppo import core\nfrom rlhf_jax import sft\ndef f():\n    import orbax.checkpoint"
    )
    names = imports_of(ast.parse(source))
    assert ours(names) == {"ppo", "sft"} and others(names) == {"a", "orbax"}


def test_the_order_lists_every_entry_once_and_a_reader_can_take_them_in():
    named = [unit for line in ORDER for unit in line]
    assert sorted(named) == sorted({unit_of(path) for path in FILES}) and len(named) <= 26


@pytest.mark.parametrize("path", FILES, ids=id_of)
def test_a_file_imports_what_stands_before_it_or_its_own_folder(path):
    unit = unit_of(path)
    place = next(i for i, line in enumerate(ORDER) if unit in line)
    allowed = {name for line in ORDER[:place] for name in line} | ({unit} if path.parent != ROOT else set())
    assert ours(imports_of(tree_of(path))) <= allowed


@pytest.mark.parametrize("path", FILES, ids=id_of)
def test_what_begins_with_an_underscore_is_used_in_its_own_file_alone(path):
    imported = [name.split(".")[-1] for name in imports_of(tree_of(path)) if name.startswith("rlhf_jax.")]
    assert [name for name in imported if name.startswith("_") and not name.startswith("__")] == []


def test_one_place_alone_imports_a_framework():
    importers = {p: {id_of(f) for f in FILES if p in others(imports_of(tree_of(f)))} for p in ("orbax", "flax")}
    assert importers["orbax"] == {"runs/checkpoint.py"}
    assert {path.split("/")[0] for path in importers["flax"]} == {"models"}


@pytest.mark.parametrize("name", ["config", "errors"])
def test_the_config_imports_no_package_at_all(name):
    assert set().union(*[others(imports_of(tree_of(path))) for path in FILES if unit_of(path) == name]) == set()


@pytest.mark.parametrize("name", ["types", "tokens", "advantages", "keys", "losses", "sharding"])
def test_formulas_import_jax_and_numpy_alone(name):
    found = set().union(*[others(imports_of(tree_of(path))) for path in FILES if unit_of(path) == name])
    assert found <= {"jax", "numpy", "jaxtyping"}


@pytest.mark.parametrize("path", FILES, ids=id_of)
def test_no_file_is_longer_than_a_reader_has_patience(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", FILES, ids=id_of)
def test_no_function_is_longer_than_a_screen(path):
    functions = [n for n in ast.walk(tree_of(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {f"{n.name}:{n.lineno}": (n.end_lineno or 0) - n.lineno + 1 for n in functions}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_one_function_prints_so_that_no_text_of_others_acts_on_a_terminal():
    """`errors.tell` does; `data inspect` prints colours of its own around texts that are escaped."""
    calls = {
        id_of(path)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert calls == {"errors.py", "commands/datasets.py"}


CONFIGS = [c for c in vars(config).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]


@functools.cache
def names_read() -> frozenset[str]:
    """Attributes read anywhere outside config.py, and keyword-only arguments of formulas, which `bind` fills."""
    found = set()
    for path in FILES:
        if unit_of(path) == "config":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            if isinstance(node, ast.FunctionDef) and unit_of(path) in ("losses", "advantages"):
                found |= {argument.arg for argument in node.args.kwonlyargs}
    return frozenset(found)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_every_config_field_is_read_somewhere(cls):
    assert {f.name for f in dataclasses.fields(cls)} - names_read() == set()


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda c: c.__name__)
def test_every_plain_config_field_is_documented(cls):
    plain = [f.name for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(f.default)]
    docs = "".join(base.__doc__ or "" for base in cls.__mro__)
    assert [name for name in plain if f"        {name}: " not in docs] == []
