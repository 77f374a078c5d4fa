"""Experts over the devices of a mesh: what each makes of its tokens, and tokens sent to the devices of their experts.

Shapes as in `experts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models.grouped import Places, by_key, collect, spread
from rlhf_jax.models.kernels import Adapted, ExpertKernel, Split, dense
from rlhf_jax.sharding import data_ways, row_axes

SPARE = 0.25
"""Of an even share, so much more a device can take at once of what another sends."""
DEVIATIONS = 4
"""So many roots of an even share more, at least: what chance makes of few pairs, those of a token that is decoded."""

Apart = Callable[[Array, Array, ExpertKernel, ExpertKernel, Array | None], Array]
"""(tokens [n, D], experts [n, k] of a device, E where there is none, up, down, bias of up) -> [n, k, D]."""


def over_devices(
    apart: Apart,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    up: ExpertKernel,
    down: ExpertKernel,
    up_bias: Float[Array, "E M F"] | None,
) -> Float[Array, "B T k D"]:
    """`apart` on every device: tokens where their rows lie, experts over the mesh axis expert, F over tensor.

    Anything, also what is no number, for pairs without an expert.
    Rows that do not divide over their axes are computed by all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape.get("expert", 1)
    run = apart if ways == 1 else partial(exchanged, apart, ways)

    def of_rows(x: Array, chosen: Array, up: ExpertKernel, down: ExpertKernel, up_bias: Array | None) -> Array:
        y = run(x.reshape(-1, x.shape[-1]), chosen.reshape(-1, chosen.shape[-1]), up, down, up_bias)
        y = y if mesh.empty else jax.lax.psum(y, "tensor")  # each has made a part of the sum over F
        return y.reshape(*chosen.shape, -1)

    if mesh.empty:
        return of_rows(x, chosen, up, down, up_bias)
    tokens = P(row_axes() if len(x) % data_ways() == 0 else None, None, None)
    expert = "expert" if ways > 1 else None
    specs = _specs(up, P(expert, None, None, "tensor")), _specs(down, P(expert, "tensor", None))
    up, down = (_dense_base(kernel) for kernel in (up, down))
    places, of_bias = P(*tokens, None), P(expert, None, "tensor")
    return jax.shard_map(of_rows, in_specs=(tokens, tokens, *specs, of_bias), out_specs=places, check_vma=False)(
        x, chosen, up, down, up_bias
    )


def _dense_base(kernel: ExpertKernel) -> ExpertKernel:
    """An `Adapted` kernel on a dense one; any other dense."""
    if isinstance(kernel, Split):
        return kernel
    return replace(kernel, kernel=dense(kernel.kernel)) if isinstance(kernel, Adapted) else dense(kernel)


def _specs(kernel: Any, spec: P) -> Any:
    """Where a kernel [E, inputs, outputs] lies, and of an `Adapted` one A [E, inputs, R] and B [E, R, outputs] too."""
    if isinstance(kernel, Split):
        return Split(cast(Any, (P(*spec[:2], *spec[3:]),) * len(kernel.parts)))
    if not isinstance(kernel, Adapted):
        return spec
    return replace(cast(Any, kernel), kernel=spec, a=P(*spec[:2], None), b=P(spec[0], None, *spec[2:]))


def room(pairs: int, ways: int) -> int:
    """How many of its pairs a device can send to each of so many devices in one round."""
    share = pairs / ways
    return min(math.ceil(share + max(SPARE * share, DEVIATIONS * math.sqrt(share))), pairs)


def exchanged(
    apart: Apart,
    ways: int,
    x: Float[Array, "n D"],
    chosen: Int[Array, "n k"],
    up: ExpertKernel,
    down: ExpertKernel,
    up_bias: Array | None,
) -> Float[Array, "n k D"]:
    """`apart` where each of `ways` devices of the mesh axis expert has so many of the experts, one after another.

    Pairs go to the device of their expert and back, more to each in one round than if all had equally many (`room`).
    What is left goes in further rounds, which run only if some device has anything left.
    """
    own, pairs = down.shape[0], chosen.size
    capacity = room(pairs, ways)
    # Pairs in order of their devices; how many each device gets, and the first of them.
    device = (chosen // own).reshape(-1)
    order, rank, counts, first = by_key(device, ways)
    number = rank - first[jnp.minimum(device, ways - 1)]  # of a pair, among those of its device

    def served(i: Int[Array, ""] | int) -> Bool[Array, " pairs"]:
        return (device < ways) & (number // capacity == i)

    def one_round(i: Int[Array, ""] | int) -> Float[Array, "n k D"]:
        # Which pair goes to which place [ways, capacity] of the exchange, and where each pair finds its answer.
        nth = i * capacity + jnp.arange(capacity, dtype=jnp.int32)[None]
        source = jnp.where(nth < counts[:, None], order[jnp.minimum(first[:, None] + nth, pairs - 1)], pairs)
        place = jnp.where(served(i), device * capacity + number % capacity, ways * capacity)
        places = Places(source.reshape(-1), place.reshape(chosen.shape), counts, counts)
        ids = jnp.append(chosen.reshape(-1) % own, own)[source]  # of the experts of the device that it goes to
        swap = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0)
        sent = swap(spread(x, places).reshape(ways, capacity, -1))
        y = apart(sent.reshape(ways * capacity, -1), swap(ids).reshape(-1, 1), up, down, up_bias)
        return collect(swap(y.reshape(ways, capacity, -1)).reshape(ways * capacity, -1), places)

    @jax.checkpoint
    def further(y: Array, i: Array) -> tuple[Array, None]:
        left = jax.lax.pmax((counts > i * capacity).any().astype(jnp.int32), "expert") > 0
        here = served(i).reshape(*chosen.shape, 1)
        return jax.lax.cond(left, lambda y: jnp.where(here, one_round(i), y), lambda y: y, y), None

    y = one_round(0)
    with jax.named_scope("rarely"):
        return jax.lax.scan(further, y, jnp.arange(1, -(-pairs // capacity)))[0]
