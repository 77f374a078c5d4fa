"""Floating-point operations of the matrix products in a jaxpr: exact, and free of any device."""

from __future__ import annotations

import math
import re
from typing import Any

from jax.extend.core import ClosedJaxpr
from jax.interpreters.partial_eval import dce_jaxpr

RARELY = "rarely"
"""The name scope of a loop that runs only where experts have far more tokens on some devices than on others."""


def without_unread(jaxpr: ClosedJaxpr) -> Any:
    """The jaxpr without what no result needs, such as gradients of frozen weights: XLA leaves it out, too."""
    return dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[0]


def count_flops(jaxpr: Any, *, unknown_trips: int = 1, fill: float = 1.0) -> float:
    """Two per multiply-add of all dot products, recomputation included; a while loop runs as `trips_of` says."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if rare(str(equation.source_info.name_stack)):
            continue
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
            continue
        inner = [
            count_flops(sub, unknown_trips=unknown_trips, fill=fill)
            for value in params.values()
            for sub in _jaxprs(value)
        ]
        if name == "cond":
            total += max(inner, default=0.0)
        elif name == "while":
            total += trips_of(str(equation.source_info.name_stack), unknown_trips, fill) * sum(inner)
        elif name == "shard_map":  # shapes within are those of one device
            total += sum(inner) * params["mesh"].size
        else:
            total += sum(inner) * (params["length"] if name == "scan" else 1)
    return total


def rare(scopes: str) -> bool:
    """Whether what has these name scopes, or op_name, is within `RARELY`, whatever transformations wrap it."""
    return re.search(rf"\b{RARELY}\b", scopes) is not None


def trips_of(scopes: str, unknown: int, fill: float) -> float:
    """Of a loop that ends when its data say so, from its innermost name scope that tells; 0 if `unknown` is 0.

    trips_N: N times. filled_N: `fill` of that, as it follows the tokens. unfilled_N: N times in each round of such a
    loop where all slots are filled, and as often in all however they are. None of these: `unknown` times.
    """
    named = re.findall(r"\b(trips|filled|unfilled)_([\d.]+)", scopes)
    if not named or not unknown:
        return unknown
    kind, number = named[-1]
    return float(number) * {"trips": 1.0, "filled": fill, "unfilled": 1 / fill}[kind]


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [sub for part in value for sub in _jaxprs(part)]
    value = getattr(value, "jaxpr", value)  # of a closed jaxpr
    return [value] if hasattr(value, "eqns") else []
