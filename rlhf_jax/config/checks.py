"""Ranges of settings, checked when a config is made, so that a bad value is one line and no traceback inside jit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rlhf_jax.errors import UserError

SEEDS = "between 0 and 2**32 - 1"

HOLDS: dict[str, Callable[[Any], bool]] = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "above 0": lambda x: x > 0,
    "between 0 and 1": lambda x: 0 <= x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "at least 0 and below 1/2": lambda x: 0 <= x < 0.5,
    "above 0 and below 1": lambda x: 0 < x < 1,
    "between 0 and 65535": lambda x: 0 <= x <= 65535,
    "0 or above 1": lambda x: x == 0 or x > 1,
    SEEDS: lambda x: 0 <= x < 2**32,
    "finite": math.isfinite,
}
"""A rule in words, as the error says it -> whether a value keeps it."""


def check(config: Any, group: str, rules: dict[str, str]) -> None:
    """Check fields of a config: `rules` maps a rule to the names of fields, `group` is their dotted prefix.

    Raises:
        UserError: the first field that breaks its rule or is not finite.
    """
    for rule, names in rules.items():
        for name in names.split():
            value = getattr(config, name)
            if not math.isfinite(value):
                raise UserError(f"{group}{name} is {value}; make it finite")
            if not HOLDS[rule](value):
                raise UserError(f"{group}{name} is {value}; make it {rule}")
