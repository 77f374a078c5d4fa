"""Which operation makes the first NaN of a computation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental import checkify

JAX = str(Path(jax.__file__).parent)


def first_nan(fn: Callable[..., object], *args: object) -> str:
    """The operation, file and line where fn(*args) first makes a NaN, inside scans, remat and the backward pass too.

    `checkify` adds a test after every operation, so this is slow, and for debugging.
    """
    fn = inspect.unwrap(fn)  # a jitted function may have options that only a program of its own takes
    error, _ = jax.jit(checkify.checkify(fn, errors=checkify.nan_checks))(*args)
    nan = error.get_exception()
    if nan is None:
        return "no operation made a NaN, so a value overflowed to infinity; lower optim.learning_rate"
    place = next((frame for frame in nan.traceback_info.frames if not frame.file_name.startswith(JAX)), None)
    where = f" in {place.function_name} at {place.file_name}:{place.line_num}" if place else ""
    return f"the first NaN came from {nan.prim}{where}"
