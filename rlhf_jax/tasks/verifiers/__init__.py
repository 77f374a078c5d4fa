"""Rewards that check a response against a known answer: reward functions by name, as "rlhf_jax.tasks.verifiers:math".

gsm8k: the final number, exactly (column `answer`). math: numbers and LaTeX (`answer`; math-verify). regex: a pattern
is found (`pattern`). json_schema: valid JSON (`schema`; jsonschema). code: unit tests pass (`tests`; off by default).
Each gives 1.0 or 0.0.

What a function needs is looked for when it is named, so that a run without it ends before it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rlhf_jax.errors import UserError

MODULES = {"gsm8k": "texts", "math": "texts", "regex": "texts", "json_schema": "texts", "code": "programs"}
"""Verifier -> the file that has it."""

PACKAGES = {"math": ("math_verify", "math-verify"), "json_schema": ("jsonschema", "jsonschema")}
"""Verifier -> the module that it needs, and the package that has it."""


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    module, package = PACKAGES.get(name, ("", ""))
    if module and find_spec(module) is None:
        raise UserError(
            f"the verifier {name} needs the package {package}, which is not installed; "
            "pip install 'rlhf-jax[verifiers]'"
        )
    if name == "code":
        import_module(f"{__name__}.programs").check_allowed()
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
