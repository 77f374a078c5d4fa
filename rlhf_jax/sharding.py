"""The device mesh and one ordered table that says where every parameter lies. Floor 0."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.config import MeshConfig
from rlhf_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))
"""Batches: rows over both data axes."""

RULES: tuple[tuple[str, P], ...] = (
    # Stacked layers lead with L; the letters are those of models/decoder.py.
    (r"layers/attn/qkv$", P(None, "fsdp", "tensor", None, None)),  # L D K G+2 N
    (r"layers/attn/qkv_bias$", P(None, "tensor", None, None)),  # L K G+2 N
    (r"layers/attn/out$", P(None, "tensor", None, None, "fsdp")),  # L K G N D
    (r"layers/mlp/up$", P(None, "fsdp", None, "tensor")),  # L D M F
    (r"layers/mlp/up_bias$", P(None, None, "tensor")),  # L M F
    (r"layers/mlp/down$", P(None, "tensor", "fsdp")),  # L F D
    (r"layers/(attn/out_bias|mlp/down_bias)$", P(None, None)),
    (r"layers/(attn|mlp)(_post)?_norm/(scale|bias)$", P(None, None)),
    (r"layers/attn/[qk]_norm/scale$", P()),  # of any rank: L N, or L K G N
    (r"embed/tokens$", P("tensor", "fsdp")),  # V D
    (r"embed/positions$", P(None, "fsdp")),  # Pmax D
    (r"head/kernel$", P("fsdp", "tensor")),  # D V
    (r"final_norm/(scale|bias)$", P(None)),
    (r"score/kernel$", P(None)),
    (r"score/bias$", P()),
)
"""(path pattern, spec), first match wins; a parameter without a match is an error, never replicated by accident."""


def mesh_sizes(config: MeshConfig, count: int | None = None) -> dict[str, int]:
    """Size of every axis over `count` devices, which the one that is -1 fills; without a count, -1 is 1.

    Raises:
        UserError: more than one -1, or the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, and one at most may be -1")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max((count or known) // known, 1)
    if count is not None and math.prod(sizes) != count:
        raise UserError(
            f"mesh data*fsdp*tensor = {'*'.join(map(str, sizes))} = {math.prod(sizes)}, but there are {count} devices"
            "; change mesh.data, mesh.fsdp or mesh.tensor, or set one of them to -1"
        )
    return dict(zip(AXES, sizes, strict=True))


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; one axis may be -1 for the rest.

    Raises:
        UserError: more than one -1, or the sizes do not multiply to the number of devices.
    """
    sizes = mesh_sizes(config, len(devices) if devices is not None else jax.device_count())
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def rollout_mesh(config: MeshConfig, mesh: Mesh) -> Mesh:
    """The same devices, in the same order, with tensor = rollout_tensor; `mesh` itself where that is 0 or no change.

    Raises:
        UserError: the devices do not divide into groups of that size.
    """
    ways = config.rollout_tensor
    if ways in (0, mesh.shape["tensor"]):
        return mesh
    if ways < 0 or mesh.size % ways:
        raise UserError(
            f"mesh.rollout_tensor {ways} does not divide the {mesh.size} devices; choose a divisor or 0 (mesh.tensor)"
        )
    return Mesh(mesh.devices.reshape(-1, 1, ways), AXES, axis_types=(AxisType.Auto,) * 3)


def shard_shape(name: str, shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a device's part of a parameter.

    Raises:
        UserError: a sharded dimension does not divide by its mesh axes.
    """
    out = list(shape)
    for i, axes in enumerate(spec):
        ways = math.prod(sizes[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
        if shape[i] % ways:
            raise UserError(
                f"parameter {name} with shape {shape}: dimension {shape[i]} does not divide by {axes} = {ways}; "
                "choose another mesh"
            )
        out[i] //= ways
    return tuple(out)


def path_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_of(path: str, shape: tuple[int, ...]) -> P:
    """The table's entry for a parameter. Scalars (counters, coefficients) are replicated."""
    if not shape:
        return P()
    for pattern, spec in RULES:
        if re.search(pattern, path):
            return spec
    raise UserError(f"parameter {path} with shape {shape} matches no rule; add one to rlhf_jax.sharding.RULES")


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or ShapeDtypeStructs: parameters, gradients, optimisers.

    Raises:
        UserError: a leaf matches no rule, or a sharded dimension does not divide by its mesh axes.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, spec = path_name(path), spec_of(path_name(path), leaf.shape)
        shard_shape(name, tuple(leaf.shape), spec, mesh.shape)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, ROWS)


def check_rows(mesh: Mesh, rows: int, what: str) -> None:
    """Raise a UserError unless `rows`, called `what` in the config, divides over the data and fsdp axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise UserError(f"{what} {rows} is not divisible by data*fsdp = {ways}; set it to a multiple of {ways}")


def put(tree: Any, sharding: Sharding) -> Any:
    """Host arrays, the same in every process, onto the mesh: each process transfers what its devices hold.

    Explicit, so a transfer guard lets it pass.
    """
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, np.shape(x)), tree)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """A global batch onto the mesh, rows sharded."""
    return put(batch, batch_sharding(mesh))


def own_rows(mesh: Mesh, count: int) -> np.ndarray:
    """bool[count]: the rows of a batch that this process answers for; of several that hold a row, the first does."""
    owner = np.full(count, jax.process_count())
    places = batch_sharding(mesh).devices_indices_map((count,))
    for device in mesh.devices.flat:
        (rows,) = places[device]
        owner[rows] = np.minimum(owner[rows], device.process_index)
    return owner == jax.process_index()


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Pin the layout of an activation; nothing happens outside a `with jax.set_mesh(mesh)` block."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def constrain_gathered(path: str, x: jax.Array, *, stacked: bool) -> jax.Array:
    """Pin a weight as decoding reads it: whole over data and fsdp, sharded over tensor alone.

    `stacked` leaves come without their leading L here.
    """
    spec = spec_of(path, (1, *x.shape) if stacked else x.shape)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["fsdp"] == 1 < mesh.shape["tensor"]:
        x = constrain(x, *(None,) * x.ndim)  # from the layout of another mesh there is no shorter way
    return constrain(x, *(axis if axis == "tensor" else None for axis in spec[1 if stacked else 0 :]))
