"""Modules as pure functions: the only place that splits and merges them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array

from rlhf_jax.types import Params


class Pure(NamedTuple):
    """A module as two functions: init(key) -> nested dict of arrays, apply(that, *args) -> what the module returns."""

    init: Callable[[Array], Params]
    apply: Callable[..., Any]


def pure(build: Callable[[nnx.Rngs], nnx.Module]) -> Pure:
    """The functions of the module that `build` makes."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(params=key))))

    def apply(params: Params, *args: Any) -> Any:
        return nnx.merge(graph, params)(*args)

    return Pure(init, apply)
