"""Parameters as decoding reads them: one dict per layer, dense, in the compute dtype."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax.tree_util import KeyPath, tree_map_with_path
from jaxtyping import Array

from rlhf_jax.config import ArchConfig
from rlhf_jax.config.rules import Rules
from rlhf_jax.models.kernels import STACKS, Split, layer_by_layer, merged
from rlhf_jax.models.stacking import layer_of, runs_of
from rlhf_jax.sharding import constrain_gathered, path_name
from rlhf_jax.types import Params

FLOAT32 = ("_norm", "router", "sinks", "_rate", "rate_", "gain", "conv", "head/bias")
"""Parts of the names of parameters that training reads unrounded, as decoding does then."""


def unstacked(params: Params, arch: ArchConfig, dtype: jnp.dtype, rules: Rules, lora_scale: float) -> Params:
    """`Model.decoding_params`."""

    def cast(path: KeyPath, x: Array) -> Array:
        return x if any(part in path_name(path) for part in FLOAT32) else x.astype(dtype)

    def dense(layer: Params) -> Params:
        """A layer as plain arrays; `copy` sees to what is plain already."""
        return tree_map_with_path(cast, merged(layer, lora_scale))

    def copy(path: KeyPath, x: Array, *, stacked: bool) -> Array | Split:
        name = "layers/" + path_name(path) if stacked else path_name(path)
        x = constrain_gathered(rules, name, cast(path, x), stacked=stacked)
        return Split(tuple(x[:, :, m] for m in range(x.shape[2]))) if name.endswith("/experts/up") else x

    # [L, ...] -> L dicts; then what is not of a layer.
    layers = [
        tree_map_with_path(partial(copy, stacked=True), layer_of(stack, mixers, i))
        for run, mixers in runs_of(params, arch)
        for stack in [layer_by_layer(dense, run)]
        for i in range(len(mixers))
    ]
    rest = {name: tree for name, tree in params.items() if name not in STACKS}
    rest = tree_map_with_path(partial(copy, stacked=False), rest)
    return {**rest, "layers": layers}
