"""Ranges of settings, checked when a config is made, so that a bad value is one line and no traceback inside jit."""

from __future__ import annotations

import math
import os
import re
import urllib.parse
from collections.abc import Callable

from rlhf_jax.errors import UserError, shown

SEEDS = "between 0 and 2**32 - 1"

SMALLEST, LARGEST = 1e-18, 1e18
"""Sizes of numbers whose squares, products and ratios are numbers of float32, in which all is computed."""

COLDEST = 0.01
"""Log-probs over a lower temperature are sampled from, but not learned from: rounding is a part of them."""

SECONDS = "at least 0 and at most 1000000"
"""More is too long for the clocks of threads, sockets and browsers."""

HOLDS: dict[str, Callable[[float], bool]] = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "above 0": lambda x: x > 0,
    "between 0 and 1": lambda x: 0 <= x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    # What is nearer to 1 may be 1 in float32.
    "at least 0 and at most 0.9999999": lambda x: 0 <= x <= 0.9999999,
    "0, or at least 1.000001": lambda x: x == 0 or x >= 1.000001,
    "at least 0.000001": lambda x: x >= 0.000001,
    "0, or at least 0.000001": lambda x: x == 0 or x >= 0.000001,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "at least 0 and below 1/2": lambda x: 0 <= x < 0.5,
    "above 0 and below 1": lambda x: 0 < x < 1,
    "at least 2": lambda x: x >= 2,
    "between 2 and 10": lambda x: 2 <= x <= 10,
    "between 2 and 12": lambda x: 2 <= x <= 12,
    "between 0 and 65535": lambda x: 0 <= x <= 65535,
    "between 0 and 9999": lambda x: 0 <= x <= 9999,
    "between 1 and 9999": lambda x: 1 <= x <= 9999,
    "between 1 and 1000000": lambda x: 1 <= x <= 1e6,
    "between -1000000 and 1000000": lambda x: -1e6 <= x <= 1e6,
    SEEDS: lambda x: 0 <= x < 2**32,
    SECONDS: lambda x: 0 <= x <= 1e6,
    "finite": lambda x: True,
    "finite and not 0": lambda x: x != 0,
}
"""A rule in words, as the error says it -> whether a value keeps it."""


def check(config: object, group: str, rules: dict[str, str]) -> None:
    """Check fields of a config: `rules` maps a rule to the names of fields, `group` is their dotted prefix.

    Raises:
        UserError: the first field that breaks its rule, or that int32 or float32 cannot hold.
    """
    for rule, names in rules.items():
        for name in names.split():
            value = getattr(config, name)
            if not fits(value) and rule != SEEDS:
                size = f"0, or {SMALLEST:g} to {LARGEST:g} in size, whose products and ratios float32 holds"
                cure = "less than 2**31" if isinstance(value, int) else size if math.isfinite(value) else "finite"
                raise UserError(f"{group}{name} is {shown(value)}; make it {cure}")
            if not HOLDS[rule](value):
                raise UserError(f"{group}{name} is {shown(value)}; make it {rule}")


def check_list(config: object, name: str, group: str, rule: str = "finite", *, ascending: bool = False) -> None:
    """Check a field that is a list: different entries, each of which keeps a rule, and if `ascending` in order.

    Raises:
        UserError: they are not.
    """
    values = list(getattr(config, name))
    bad = next((v for v in values if not isinstance(v, str) and not (fits(v) and HOLDS[rule](v))), None)
    empty = any(isinstance(v, str) and not v.strip() for v in values)
    if bad is not None or empty:
        raise UserError(f"{group}{name} {shown(values)} has {bad if not empty else 'an empty text'}; make each {rule}")
    if len(set(values)) < len(values):
        raise UserError(f"{group}{name} {shown(values)} has one twice; give each once")
    if ascending and values != sorted(values):
        raise UserError(f"{group}{name} {shown(values)} do not ascend; sort them")


def fits(value: float) -> bool:
    """Whether int32 holds an integer, or float32 a number and what becomes of it."""
    if isinstance(value, int):
        return abs(value) < 2**31
    return value == 0 or SMALLEST <= abs(value) <= LARGEST  # which a NaN is not


VISIBLE, VARIABLE = re.compile(r"[\x21-\x7e]+"), re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""What an address or a key consists of, and the name of an environment variable."""


def key_of(option: str, variable: str) -> str:
    """The API key in the environment variable that `option` names.

    Raises:
        UserError: there is none, or no request can hold it. Neither is shown: the name may be a key by mistake.
    """
    key = os.environ.get(variable, "") if VARIABLE.fullmatch(variable) else ""
    if not key:
        raise UserError(f"{option} names no environment variable that is set; export the key and name its variable")
    if not VISIBLE.fullmatch(key):
        raise UserError(
            f"{option}: the key in that variable has white space, a line break or characters that no key has; export "
            "it again without them"
        )
    return key


def check_url(option: str, url: str) -> None:
    """Raise a UserError, which does not show it, unless `url` is an http address without anything secret in it."""
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not (fits and VISIBLE.fullmatch(url)):
        raise UserError(f"{option} is no http address; write it as http://localhost:8000/v1")
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise UserError(
            f"{option} has a user, a password, a query or a fragment, in which keys may stand; leave them out"
        )
