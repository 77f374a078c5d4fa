"""Kernels that are more than an array: quantised ones, and ones with low-rank adapters beside them.

In a tree of parameters an adapter lies beside its kernel, qkv_lora/query/{a, b} beside qkv, and a quantised kernel is
a `qwix.QArray` in place of the array. Shapes here are of one layer: a [inputs, R], b [R, outputs], kernel
[inputs, outputs], each side of one or more axes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jaxtyping import Array

from rlhf_jax.config.rules import INPUTS, NOT_QUANTIZED, stacked
from rlhf_jax.sharding import on_one_cpu
from rlhf_jax.types import Params


def joined(frozen: Params, params: Params) -> Params:
    """One nested dict of both; where both have a leaf, that of `params`. Dicts are made, arrays are not."""
    if not (isinstance(frozen, Mapping) and isinstance(params, Mapping)):
        return frozen if params is None else params
    names = [*frozen, *(name for name in params if name not in frozen)]
    return {name: joined(frozen.get(name), params.get(name)) for name in names}


def stacks_of(params: Params) -> list[Params]:
    """The stacked layers of a model from the lowest on: one stack, or the two that `split` made of it."""
    return [params["lower"]["layers"], params["layers"]] if "lower" in params else [params["layers"]]


def chained(stacks: Sequence[Params], join: Callable[..., Any]) -> Params:
    """Stacks one on the other: `join` of the arrays of every part that several have."""
    parts = dict.fromkeys(part for stack in stacks for part in stack)
    return {part: jax.tree.map(join, *(stack[part] for stack in stacks if part in stack)) for part in parts}


def depth(stack: Params) -> int:
    """Layers of a stack; parts that some layers lack have fewer."""
    return max(x.shape[0] for x in jax.tree.leaves(stack))


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


STACKS = ("lower", "layers")
"""Where layers lie in a tree of parameters: all in "layers", or the lower ones, frozen, in "lower/layers"."""

Quantization = Literal["none", "int8", "nf4"]
SUFFIX = "_lora"
WHOLE = "whole"
CUT_AXIS = {"qkv": 2, "up": 1}
"""Kernels that are several of transformers' modules side by side -> the axis of b in which they follow one another."""
_OF_EXPERTS = {"up": 4, "down": 3}
"""Kernels that may be of experts -> their axes in a layer, if they are: the first is E, and adapters have it too."""
_STARTS = {"query": 0, "key": -2, "value": -1, "key_value": -1, "gate": 0, "up": -1}
KERNELS = {path: (len(stacked(path)), len(axes)) for path, axes in INPUTS.items()}
"""The kernels that can be quantised and adapted -> how many axes lead, L or L and E, and how many then are inputs."""
BLOCK = 64
"""Weights that share a scale in nf4 (Dettmers et al. 2023)."""

NF4 = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
"""Quantiles of a normal distribution, by code (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("kernel", "a", "b"), meta_fields=("scale", "of_experts")
)
@dataclass(frozen=True)
class Adapted:
    """kernel + scale A B, not multiplied out; where it is `of_experts`, one for each of them."""

    kernel: Array | qwix.QArray
    a: Array
    b: Array
    scale: float
    of_experts: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.kernel.shape

    def __getitem__(self, index: object) -> Adapted:
        """Itself, for the `[...]` by which flax reads a parameter."""
        return self


@functools.partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=())
@dataclass(frozen=True)
class Split:
    """A kernel of experts [E, D, M, F] as M arrays [E, D, F]: a TPU's ragged product reads each as it lies, and would
    copy it out of one of all for every token that is decoded."""

    parts: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return *self.parts[0].shape[:2], len(self.parts), *self.parts[0].shape[2:]

    def __getitem__(self, index: object) -> Split:
        """Itself, as of `Adapted`."""
        return self


Kernel: TypeAlias = Array | qwix.QArray | Adapted
"""What stands for the weights of a linear layer."""
ExpertKernel: TypeAlias = Kernel | Split
"""Or for those of a layer of experts."""


def einsum(letters: str, x: Array, kernel: Kernel) -> Array:
    """A product in x's dtype; float32 means float32 on TPU too, whose default would round the inputs to bfloat16.

    Of an `Adapted` kernel x W + scale (x A) B, which never makes the product A B.
    """
    # btd,dkgn->btkgn: bt are rows, d is summed over, kgn are the kernel's own.
    inputs, weight, outputs = re.split(",|->", letters)
    summed, kept = ("".join(c for c in weight if (c in outputs) == out) for out in (False, True))
    rows = "".join(c for c in inputs if c not in summed)
    if isinstance(kernel, Adapted):
        # btd,dr->btr and then btr,rkgn->btkgn: through the rank R, which is small.
        low = kernel.scale * einsum(f"{inputs},{summed}r->{rows}r", x, kernel.a)
        return einsum(letters, x, kernel.kernel) + einsum(f"{rows}r,r{kept}->{outputs}", low, kernel.b)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)
    weights = dense(kernel).astype(x.dtype)
    if not on_one_cpu() or letters != f"{rows}{summed},{summed}{kept}->{rows}{kept}":
        return product(letters, x, weights)
    # Of matrices: with more axes the gradient of the weights would copy that of the output, the largest array of a
    # layer, into another order. (On TPU it is the matrices that cost copies, and across devices they cut split axes.)
    inner, own = weights.shape[: len(summed)], weights.shape[len(summed) :]
    y = product("rs,sk->rk", x.reshape(-1, math.prod(inner)), weights.reshape(-1, math.prod(own)))
    return y.reshape(*x.shape[: len(rows)], *own)


def dense(kernel: Array | qwix.QArray) -> Array:
    """A kernel as an array; of a quantised one, float32 values."""
    if not isinstance(kernel, qwix.QArray):
        return kernel
    if kernel.qtype != "nf4":
        return qwix.dequantize(kernel)
    scale = kernel.scale
    for axis, (size, num_scales) in enumerate(zip(kernel.shape, scale.shape, strict=True)):
        scale = scale if size == num_scales else jnp.repeat(scale, size // num_scales, axis=axis)
    return _nf4_values(kernel.qvalue) * scale


def _nf4_values(codes: Array) -> Array:
    """The values of 4-bit codes by selects, bit by bit: looking them up would be a gather, which a TPU does slowly."""
    values: list[Array] = list(NF4)
    for bit in range(4):
        is_set = (codes.astype(jnp.int32) >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def multiplied_out(kernel: Kernel) -> Array:
    """The array that a kernel of any kind stands for; W + scale A B in float32, which W's dtype may not hold."""
    if not isinstance(kernel, Adapted):
        return dense(kernel)

    def summed(base: Array, a: Array, b: Array) -> Array:
        rank = b.shape[0]
        a, b = a.reshape(-1, rank), b.reshape(rank, -1)
        delta = kernel.scale * jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST).reshape(base.shape)
        return base + delta

    return (jax.vmap(summed) if kernel.of_experts else summed)(dense(kernel.kernel), kernel.a, kernel.b)


def side_by_side(name: str, parts: Mapping[str, Params], size: int) -> tuple[Array, Array]:
    """One A and one B for all adapters of a kernel whose cut axis has `size`: A's in a row, B's block by block.

    Adapters of query and value, rank r each: A [D, 2r], B [2r, K, G+2, N] with zeros in the slots of the key.
    """
    if WHOLE in parts:
        return parts[WHOLE]["a"], parts[WHOLE]["b"]
    # Every B lies in the slots of its part and is zero in the others, so that (x A) B adds each to its own.
    axis, blocks = CUT_AXIS[name], []
    for part in sorted(parts):
        b = parts[part]["b"]
        start = _STARTS[part] % size
        pads = [(0, 0)] * b.ndim
        pads[axis] = (start, size - start - b.shape[axis])
        blocks.append(jnp.pad(b, pads))
    return jnp.concatenate([parts[part]["a"] for part in sorted(parts)], axis=-1), jnp.concatenate(blocks)


def attached(layer: Params, scale: float) -> Params:
    """The parameters of a layer with `Adapted` kernels for kernels that have adapters beside them."""
    tree = {
        name: attached(node, scale) if isinstance(node, Mapping) else node
        for name, node in layer.items()
        if not name.endswith(SUFFIX)
    }
    for beside in layer:
        if beside.endswith(SUFFIX):
            name = beside.removesuffix(SUFFIX)
            kernel, of_experts = tree[name], len(tree[name].shape) == _OF_EXPERTS.get(name)
            width = kernel.shape[CUT_AXIS.get(name, 0) + of_experts]
            join = functools.partial(side_by_side, name, size=width)
            a, b = (jax.vmap(join) if of_experts else join)(layer[beside])
            tree[name] = Adapted(kernel, a, b, scale, of_experts)
    return tree


@dataclass(frozen=True)
class Stack:
    """A kernel of all layers that `multiplied_out` makes an array, one layer at a time when it is asked for.

    Attributes:
        name: of the kernel in a layer.
        layers: it, and its adapters if there are any, stacked.
        scale: of the adapters.
    """

    name: str
    layers: Params
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layers[self.name].shape

    def __getitem__(self, index: int | slice) -> Array:
        """The array of one layer."""
        return _merged(jax.tree.map(lambda x: x[index], self.layers), self.scale)[self.name]


@dataclass(frozen=True)
class Chained:
    """Stacked layers in several parts, read as one stack."""

    parts: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(len(part) for part in self.parts), *self.parts[0].shape[1:]

    def __getitem__(self, index: int) -> Array:
        """The array of one layer."""
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(f"there is no layer {index} after the last")


def stacks(layers: Params, scale: float) -> Params:
    """The parameters of all layers with a `Stack` in place of every kernel that is more than an array."""
    out = {}
    for name, node in layers.items():
        beside = {name: node} | ({name + SUFFIX: layers[name + SUFFIX]} if name + SUFFIX in layers else {})
        if isinstance(node, qwix.QArray) or len(beside) > 1:
            out[name] = Stack(name, beside, scale)
        elif not name.endswith(SUFFIX):
            out[name] = stacks(node, scale) if isinstance(node, Mapping) else node
    return out


def _is_kernel(node: object) -> bool:
    return isinstance(node, (Adapted, qwix.QArray))


def is_composed(layers: Params) -> bool:
    """Whether a kernel has adapters or is quantised, so that `merged` computes something."""
    return any(
        name.endswith(SUFFIX) or _is_kernel(node) or (isinstance(node, Mapping) and is_composed(node))
        for name, node in layers.items()
    )


def merged(layer: Params, scale: float) -> Params:
    """The parameters of a layer as plain arrays: adapters multiplied out and added, quantised kernels as float32."""
    return jax.tree.map(multiplied_out, attached(layer, scale), is_leaf=_is_kernel)


def layer_by_layer(plain: Callable[[Params], Params], stack: Params) -> Params:
    """The parts [L, ...] of a stack that are not plain arrays by `plain` of each layer, in loops that compile one."""
    return {name: jax.lax.map(plain, node) if is_composed(node) else node for name, node in stack.items()}


_merged = jax.jit(merged, static_argnames="scale")


def quantized(params: Params, how: Quantization, *, free: bool = False) -> Params:
    """The kernels of all layers as QArrays, other leaves as they are; with `free` each original is then deleted.

    int8: w = q s with s = max |w| / 127.5 over the inputs of each output. nf4: the 16 quantiles of a normal
    distribution of Dettmers et al. 2023 (arXiv 2305.14314, appendix E), s = max |w| over every 64 inputs, or as many
    as divide the last input axis.
    """
    if how == "none":
        return params
    tree = jax.tree.map(lambda x: x, params)
    for path, (first, inputs) in KERNELS.items():
        _, part, leaf = path.split("/")
        if part not in tree["layers"] or path in NOT_QUANTIZED:
            continue
        kernel = tree["layers"][part][leaf]
        tree["layers"][part][leaf] = _quantize(kernel, how, first, inputs)
        if free:
            jax.block_until_ready(tree["layers"][part][leaf])
            kernel.delete()
    return tree


@functools.partial(jax.jit, static_argnames=("how", "first", "inputs"))
def _quantize(kernel: Array, how: str, first: int, inputs: int) -> qwix.QArray:
    kernel = kernel.astype(jnp.float32)
    if how == "int8":
        return qwix.quantize(kernel, jnp.int8, channelwise_axes=(*range(first), *range(first + inputs, kernel.ndim)))
    last = first + inputs - 1
    others = tuple(axis for axis in range(kernel.ndim) if axis != last)
    block = math.gcd(BLOCK, kernel.shape[last])
    return qwix.quantize(kernel, "nf4", channelwise_axes=others, tiled_axes={last: block})
