"""The device mesh, and where on it parameters, batches and activations lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from rlhf_jax.config import MeshConfig
from rlhf_jax.config.rules import EXPERT_AXES, MESH_AXES, Rules, Split, entry, kept_split, parse_rules
from rlhf_jax.errors import UserError
from rlhf_jax.types import Batch

ROW_AXES = EXPERT_AXES[:3]
"""The mesh axes that rows of a batch lie over, those of them that a mesh has."""


@dataclass(frozen=True)
class Mesh:
    """The devices in a grid of named axes, and the table that says where on it parameters lie.

    Attributes:
        grid: jax's mesh, as `jax.set_mesh` takes it.
        rules: the table. A model that runs here is given it too (`Model.rules`): inside jit there is only the grid.
    """

    grid: jax.sharding.Mesh
    rules: Rules

    @property
    def shape(self) -> Mapping[str, int]:
        """Size of every axis."""
        return self.grid.shape

    @property
    def row_ways(self) -> int:
        """Devices that rows of a batch lie over."""
        return _row_ways(self.shape)


def _row_ways(sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.get(axis, 1) for axis in ROW_AXES)


def mesh_sizes(config: MeshConfig, count: int | None = None) -> dict[str, int]:
    """Size of every axis over `count` devices, which the one that is -1 fills; without a count, -1 is 1.

    Raises:
        UserError: more than one -1, or the sizes do not multiply to the number of devices.
    """
    axes = MESH_AXES if config.expert == 1 else EXPERT_AXES
    sizes = [getattr(config, axis) for axis in axes]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {dict(zip(axes, sizes, strict=True))}: sizes are positive, and one at most may be -1")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max((count or known) // known, 1)
    if count is not None and math.prod(sizes) != count:
        raise UserError(
            f"mesh {'*'.join(axes)} = {'*'.join(map(str, sizes))} = {math.prod(sizes)}, but there are {count} devices"
            "; change mesh.data, mesh.fsdp or mesh.tensor, or set one of them to -1"
        )
    return dict(zip(axes, sizes, strict=True))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config over all devices, with its rules; one axis may be -1 for the rest.

    The data axis leads from slice to slice first, and all else stays within one.

    Raises:
        UserError: more than one -1, the sizes do not multiply to the number of devices, or the slices are not those of
            the devices.
    """
    sizes = mesh_sizes(config, len(devices) if devices is not None else jax.device_count())
    known = len({getattr(device, "slice_index", 0) for device in devices or jax.devices() if device.platform == "tpu"})
    if known not in (0, config.slices):
        raise UserError(
            f"mesh.slices is {config.slices}, but the devices are in {known} TPU slice(s); set it to {known}"
        )
    if config.slices == 1:
        shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
        try:
            grid = jax.make_mesh(shape, tuple(sizes), axis_types=types, devices=devices)
        except NotImplementedError:  # of a torus of chips, 4x4x4 say, an axis must be cut: for 8 x 8
            cut = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            grid = _grid_of(cut, tuple(sizes))
    else:
        grid = _grid_of(_in_slices(config, sizes, devices or jax.devices(), known > 0), tuple(sizes))
    return Mesh(grid, parse_rules(config.rules, expert=config.expert != 1))


def _grid_of(devices: np.ndarray, axes: Split) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


def _in_slices(config: MeshConfig, sizes: dict[str, int], devices: Sequence[jax.Device], known: bool) -> np.ndarray:
    """Devices [data, fsdp, ..., tensor], data from slice to slice first; where slices are not known, cut in order."""
    if sizes["data"] % config.slices:
        raise UserError(
            f"mesh.data {sizes['data']} is not a multiple of mesh.slices {config.slices}, over which it goes first; "
            "change one of them"
        )
    within = (sizes["data"] // config.slices, *list(sizes.values())[1:])
    if known:
        across = (config.slices, *[1] * (len(sizes) - 1))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(tuple(sizes.values()))


def rollout_mesh(config: MeshConfig, mesh: Mesh) -> Mesh:
    """The same devices, in the same order, with tensor = rollout_tensor; `mesh` itself where that is 0 or no change.

    What fsdp and tensor together have more stays fsdp, so that a weight's way there (`constrain_gathered`) is short.

    Raises:
        UserError: the devices do not divide into groups of that size.
    """
    ways = config.rollout_tensor
    if ways in (0, mesh.shape["tensor"]):
        return mesh
    if ways < 0 or mesh.grid.size % ways:
        raise UserError(
            f"mesh.rollout_tensor {ways} does not divide the {mesh.grid.size} devices; "
            "choose a divisor or 0 (mesh.tensor)"
        )
    rest = mesh.shape["fsdp"] * mesh.shape["tensor"]
    shape = (-1, rest // ways, ways) if rest % ways == 0 else (-1, 1, ways)
    return replace(mesh, grid=_grid_of(mesh.grid.devices.reshape(shape), MESH_AXES))


def shard_shape(
    name: str, shape: tuple[int, ...], splits: Sequence[Split], sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """Shape of a device's part of a parameter.

    Raises:
        UserError: a sharded dimension does not divide by its mesh axes.
    """
    out = list(shape)
    for i, axes in enumerate(splits):
        ways = math.prod(sizes[axis] for axis in axes)
        if shape[i] % ways:
            raise UserError(
                f"parameter {name} with shape {shape}: dimension {shape[i]} does not divide by {'*'.join(axes)} = "
                f"{ways}; choose another mesh, or leave it whole by mesh.rules"
            )
        out[i] //= ways
    return tuple(out)


def path_name(path: KeyPath) -> str:
    """A leaf's path in its tree, names with slashes between."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_shardings(mesh: Mesh, tree: PyTree) -> PyTree[NamedSharding]:
    """A NamedSharding for every leaf of a tree of arrays or ShapeDtypeStructs: parameters, gradients, optimisers.

    Raises:
        UserError: a leaf has no rule, or a sharded dimension does not divide by its mesh axes.
    """

    def of_leaf(path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        name, splits = path_name(path), mesh.rules.of(path_name(path), leaf.shape)
        shard_shape(name, tuple(leaf.shape), splits, mesh.shape)
        return NamedSharding(mesh.grid, P(*map(entry, splits)))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def placed(mesh: Mesh, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), jitted, laid out by the rule table; of abstract arguments, as a key, the shapes of that."""
    shapes = jax.eval_shape(function, *args)
    places = tree_shardings(mesh, shapes)
    return placed_shapes(shapes, places) if abstract(args) else jax.jit(function, out_shardings=places)(*args)


def placed_shapes(shapes: Any, places: Any) -> Any:
    """ShapeDtypeStructs with shardings: arguments for `.lower()` without a byte of memory."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def abstract(tree: Any) -> bool:
    """Whether some of its leaves are ShapeDtypeStructs: nothing may run, since its chips do not exist."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def copied(tree: Any) -> Any:
    """Arrays with buffers of their own, which may be donated; ShapeDtypeStructs as they are."""
    return tree if abstract(tree) else jax.tree.map(jnp.copy, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh.grid, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the axes of `ROW_AXES`."""
    return NamedSharding(mesh.grid, P(tuple(axis for axis in ROW_AXES if axis in mesh.shape)))


def check_rows(mesh: Mesh, rows: int, what: str) -> None:
    """Raise a UserError unless `rows`, called `what` in the config, divides over the axes that rows lie over."""
    ways, axes = mesh.row_ways, "*".join(axis for axis in ROW_AXES if axis in mesh.shape)
    if rows % ways:
        raise UserError(f"{what} {rows} is not divisible by {axes} = {ways}; set it to a multiple of {ways}")


def put(tree: PyTree[np.ndarray], sharding: Sharding) -> PyTree[jax.Array]:
    """Host arrays, the same in every process, onto the mesh: each process transfers what its devices hold.

    Explicit, so a transfer guard lets it pass.
    """
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, np.shape(x)), tree)


def put_batch(mesh: Mesh, batch: PyTree[np.ndarray]) -> Batch:
    """A global batch onto the mesh, rows sharded."""
    return put(batch, batch_sharding(mesh))


def own_rows(mesh: Mesh, count: int) -> np.ndarray:
    """bool[count]: the rows of a batch that this process answers for; of several that hold a row, the first does."""
    owner = np.full(count, jax.process_count())
    places = batch_sharding(mesh).devices_indices_map((count,))
    for device in mesh.grid.devices.flat:
        (rows,) = places[device]
        owner[rows] = np.minimum(owner[rows], device.process_index)
    return owner == jax.process_index()


def data_ways() -> int:
    """Devices that rows lie over, of the mesh of `jax.set_mesh`; 1 outside of one."""
    return _row_ways(jax.sharding.get_abstract_mesh().shape)


def on_one_cpu() -> bool:
    """Whether the mesh of `jax.set_mesh`, or JAX outside of one, is a CPU alone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend() == "cpu"
    return mesh.size == 1 and getattr(mesh.abstract_device, "device_kind", "") == "cpu"


def row_axes() -> Split:
    """The mesh axes that rows lie over, of the mesh of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in ROW_AXES if axis in mesh.shape)


def constrain(x: jax.Array, *axes: str | Split | None) -> jax.Array:
    """Pin an activation's axes to mesh axes (one, several or None); nothing happens outside jit or `jax.set_mesh`."""
    if jax.sharding.get_abstract_mesh().empty or not isinstance(x, jax.core.Tracer):
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def on_own_rows(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """function(x), called by every device with its own rows of x: for what is else done on all rows everywhere."""
    if jax.sharding.get_abstract_mesh().empty or len(x) % data_ways():
        return function(x)
    return jax.shard_map(function, in_specs=P(row_axes()), out_specs=P(row_axes()), check_vma=False)(x)


def constrain_rows(x: jax.Array) -> jax.Array:
    """Pin an activation's rows to their axes, all else whole."""
    return constrain(x, row_axes(), *[None] * (x.ndim - 1))


def looked_up(rules: Rules, path: str, read: Callable[..., Any], *ids: jax.Array) -> Any:
    """read(*ids), arrays [B, T, ..., D], with D and ids [B, T] pinned as their table [V, D] needs them, then to rows.

    So devices that share a table exchange their rows. From one to the other at once the compiler brings the whole
    batch to every device, and in the backward pass its gradient.
    """
    width = rules.of(path, (1, 1))[-1]
    rows = tuple(axis for axis in row_axes() if axis not in width)
    found = read(*(constrain(x, rows, None) for x in ids))
    of_rows = lambda x: constrain_rows(constrain(x, rows, *[None] * (x.ndim - 2), entry(width)))  # noqa: E731
    return jax.tree.map(of_rows, found)


def constrain_gathered(rules: Rules, path: str, x: jax.Array, *, stacked: bool) -> jax.Array:
    """Pin a weight as decoding reads it: whole over data and fsdp, sharded over tensor and experts alone.

    `stacked` leaves come without their leading L here.
    """
    splits = rules.of(path, (1, *x.shape) if stacked else x.shape)[1 if stacked else 0 :]
    # From many ways over fsdp to some over tensor: first within the groups, then a gather of tensor's parts alone.
    x = constrain(x, *map(entry, splits))
    return constrain(x, *map(kept_split, splits))


def constrain_in_turn(rules: Rules, path: str, x: jax.Array) -> jax.Array:
    """Pin a weight of one layer that lies over several of the axes of rows to the first of them alone.

    So it is gathered over the others first, and its gradient scattered over the first before it is summed over the
    others: over both dimensions of a TPU slice at once the compiler has no reduce-scatter, and sums all of it twice.
    """
    splits = rules.of(path, (1, *x.shape))[1:]
    over = [[axis for axis in split if axis in ROW_AXES] for split in splits]
    if all(len(axes) < 2 for axes in over):
        return x
    kept = [tuple(a for a in split if a not in axes[1:]) for split, axes in zip(splits, over, strict=True)]
    return constrain(x, *map(entry, kept))
