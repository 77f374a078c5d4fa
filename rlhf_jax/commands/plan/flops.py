"""Floating-point operations of the matrix products in a jaxpr: exact, and free of any device."""

from __future__ import annotations

import math
from typing import Any


def count_flops(jaxpr: Any, *, unknown_trips: int = 1) -> float:
    """Two per multiply-add of all dot products, recomputation included; a while loop runs `unknown_trips` times."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
            continue
        inner = [count_flops(sub, unknown_trips=unknown_trips) for value in params.values() for sub in _jaxprs(value)]
        if name == "cond":
            total += max(inner, default=0.0)
        elif name == "while":
            total += unknown_trips * sum(inner)
        else:
            total += sum(inner) * (params["length"] if name == "scan" else 1)
    return total


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [sub for part in value for sub in _jaxprs(part)]
    value = getattr(value, "jaxpr", value)  # of a closed jaxpr
    return [value] if hasattr(value, "eqns") else []
