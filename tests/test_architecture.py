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

FLOORS = {
    **dict.fromkeys(
        [
            "errors",
            "attempts",
            "clock",
            "config",
            "types",
            "tokens",
            "losses",
            "advantages",
            "rankings",
            "intervals",
            "hosts",
            "rules",
            "keys",
            "sharding",
            "files",
            "outputs",
            "__init__",
        ],
        0,
    ),
    **dict.fromkeys(["state", "step", "nans", "checkpoint", "directory", "interrupts", "journal", "yamls"], 1),
    "contents": 1,
    **dict.fromkeys(["models", "sampling", "data", "tasks"], 1),
    **dict.fromkeys(["run", "runs", "stage", "loop", "generate", "rewards", "online", "supervised", "responses"], 2),
    **dict.fromkeys(["judge", "likelihood", "asking", "endpoint"], 2),
    **dict.fromkeys(["sft", "reward", "dpo", "kto", "rrhf", "ppo", "group"], 3),
    **dict.fromkeys(["cli", "quickstart", "inference", "datasets", "inspection", "planning", "label", "__main__"], 4),
    **dict.fromkeys(["scoring", "drawing", "collecting", "evaluating", "summaries", "rating", "recipe"], 4),
    **dict.fromkeys(["bestofn", "rejection"], 4),
}
"""Module or package of rlhf_jax -> its floor; it imports floors below and itself, and what SAME_FLOOR allows."""

SAME_FLOOR = {
    "config": {"errors", "rules"},
    "rules": {"errors"},
    "losses": {"errors", "types"},
    "hosts": {"errors"},
    "files": {"errors"},
    "outputs": {"errors", "files"},
    "sharding": {"config", "errors", "rules"},
    "step": {"state"},
    "sampling": {"models"},
    "generate": {"stage"},
    "directory": {"yamls"},
    "journal": {"directory"},
    "contents": {"directory", "models"},
    "asking": {"endpoint", "generate", "judge", "likelihood", "stage"},
    "inference": {"drawing", "scoring"},
    "collecting": {"drawing", "summaries"},
    "bestofn": {"collecting", "drawing", "summaries"},
    "rejection": {"bestofn", "drawing"},
    "drawing": {"scoring"},
    "evaluating": {"drawing", "summaries"},
    "loop": {"run", "stage"},
    "online": {"generate", "rewards", "run", "stage"},
    "supervised": {"loop", "run", "stage"},
    "responses": {"stage", "supervised"},
    "ppo": {"sft"},
    "datasets": {"inference"},
    "rating": {"inference", "scoring"},
    "recipe": {"cli"},
    "inspection": {"cli"},
    "__main__": {"cli"},
}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def unit_of(path: Path) -> str:
    """The name in FLOORS: the package for files of a package."""
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


def test_every_module_has_a_floor_and_every_floor_entry_a_module():
    assert {unit_of(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=id_of)
def test_a_module_imports_only_floors_below_it(path):
    unit = unit_of(path)
    allowed = {name for name, floor in FLOORS.items() if floor < FLOORS[unit]} | {unit} | SAME_FLOOR.get(unit, set())
    assert ours(imports_of(tree_of(path))) <= allowed


def test_the_table_of_same_floor_edges_holds_no_edge_that_is_not_there():
    used: dict[str, set[str]] = {}
    for path in FILES:
        used.setdefault(unit_of(path), set()).update(ours(imports_of(tree_of(path))))
    for unit, targets in SAME_FLOOR.items():
        assert {FLOORS[t] for t in targets} == {FLOORS[unit]}
        assert targets <= used[unit]


@pytest.mark.parametrize(("package", "owner"), [("orbax", "checkpoint"), ("flax", "models")])
def test_one_place_alone_imports_a_framework(package, owner):
    assert {unit_of(path) for path in FILES if package in others(imports_of(tree_of(path)))} == {owner}


@pytest.mark.parametrize("name", ["config", "errors"])
def test_the_config_imports_no_package_at_all(name):
    assert set().union(*[others(imports_of(tree_of(path))) for path in FILES if unit_of(path) == name]) == set()


@pytest.mark.parametrize("name", sorted(n for n, floor in FLOORS.items() if floor == 0 and n != "config"))
def test_floor_0_imports_jax_and_numpy_only(name):
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
        unit_of(path)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert calls == {"errors", "datasets"}


CONFIGS = [c for c in vars(config).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]


@functools.cache
def names_read() -> frozenset[str]:
    """Attributes read anywhere outside config.py, and the keyword-only arguments of losses, which `bind` fills."""
    found = set()
    for path in FILES:
        if unit_of(path) == "config":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            if isinstance(node, ast.FunctionDef) and unit_of(path) == "losses":
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
