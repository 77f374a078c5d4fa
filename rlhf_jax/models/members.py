"""Members of a reward ensemble on one trunk that have adapters of their own: leaves with a first axis of members."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
from jaxtyping import Array, Float

from rlhf_jax.models.experts import Routing
from rlhf_jax.models.kernels import SUFFIX, layer_by_layer, merged
from rlhf_jax.models.model import Model
from rlhf_jax.types import Params


def axes(params: Params) -> Params:
    """The axis of members in every part: 0 of adapters and heads, None of the trunk, which all share."""
    own = lambda name: name == "score" or name.endswith(SUFFIX)  # noqa: E731
    deeper = lambda node: axes(node) if isinstance(node, Mapping) else None  # noqa: E731
    return {name: 0 if own(name) else deeper(node) for name, node in params.items()}


def scored(
    model: Model, params: Params, *inputs: Array, **more: Array
) -> tuple[Float[Array, "B S *E"], Routing | None]:
    """The score at every position, of an ensemble that of each member, of what `forward` takes; and its routing.

    Members with adapters of their own are E passes in one program, in which each kernel of the trunk is read once.
    """
    if not model.own_adapters:
        hidden, routing = model.forward(params, *inputs, **more)
        return model.scores(params["score"], hidden), routing
    one = dataclasses.replace(model, members=0, own_adapters=False)
    of_member = lambda params: scored(one, params, *inputs, **more)[0]  # noqa: E731
    return jax.vmap(of_member, in_axes=(axes(params),), out_axes=-1)(params), None


def member(params: Params, i: int) -> Params:
    """The parameters of one member: the trunk, and its own adapters and head."""
    first = axes(params)
    none = lambda x: x is None  # noqa: E731
    take = lambda axis, x: x if axis is None else jax.tree.map(lambda leaf: leaf[i], x)  # noqa: E731
    return jax.tree.map(take, first, params, is_leaf=none)


def merged_member(params: Params, i: int, scale: float) -> Params:
    """The same as a model without adapters: they are added to the kernels of the trunk."""
    tree = member(params, i)
    return {**tree, "layers": layer_by_layer(partial(merged, scale=scale), tree["layers"])}
