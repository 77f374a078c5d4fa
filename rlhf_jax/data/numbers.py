"""Numbers of rows, which are exact, and what float32 makes of them. Nothing here raises."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, SupportsFloat

import numpy as np

LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
"""Sizes of what float32 holds; smaller numbers than the latter count as 0 on some devices."""


def is_number(value: object) -> bool:
    """Whether it is a finite number, of Python or numpy; an integer may be of any size."""
    value = number_of(value)
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def number_of(value: Any) -> Any:
    """A number of numpy as one of Python, anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def float_of(value: object) -> float | None:
    """A real number, or a scalar of any array library, as a float; None if it is something else."""
    if getattr(value, "ndim", 0) == 0 and hasattr(value, "item"):
        value = value.item()
    if getattr(value, "ndim", 0) or not isinstance(value, SupportsFloat):  # numbers are that, texts are not
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def in_order(values: Sequence[float | None], sign: int = 1) -> list[float]:
    """sign * values, to be compared in float32, NaN for None: their places from 0 where float32 loses their order.

    1700000001 and 1700000000 are one number there, and 1e39 is infinite; their places are not.
    """
    signed = [None if value is None else sign * value for value in values]
    known = sorted({value for value in signed if value is not None})
    held = [float(np.float32(v)) if abs(v) <= LARGEST else math.inf for v in known]
    kept = all(a < b for a, b in pairwise(held)) and all(v == 0 or SMALLEST <= abs(v) < math.inf for v in held)
    place = {value: float(value) if kept else float(i) for i, value in enumerate(known)}
    return [math.nan if value is None else place[value] for value in signed]


def equal_in_float32(values: Iterable[float]) -> list[float]:
    """Of different numbers, those that float32 makes equal to one before them."""
    first: dict[float, float] = {}
    return [value for value in dict.fromkeys(values) if first.setdefault(float(np.float32(value)), value) != value]


def merged(values: np.ndarray) -> int:
    """How many numbers float32 makes equal to the next smaller one though they differ, by a part in 10^12 or more:
    less is rounding of float64.
    """
    ordered = np.sort(values)
    differ = np.diff(ordered) > 1e-12 * np.abs(ordered[1:])
    return int(np.count_nonzero(differ & (np.diff(ordered.astype(np.float32)) == 0)))


def off_centre(share: float, more: bool) -> float:
    """A share that is above 1/2 if `more`, else below it, also where float32 would round it to 1/2."""
    return share if np.float32(share) != 0.5 else 0.5 + 2.0**-24 * (1 if more else -1)
