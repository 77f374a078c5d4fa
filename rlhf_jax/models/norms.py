"""Normalisation and numbers that multiply, in float32 and rounded to the dtype of what comes in; and biases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rlhf_jax.config import ArchConfig


def times(x: Array, factor: float) -> Array:
    """x * factor in float32, rounded to the dtype of x."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def biased(module: nnx.Module, name: str, x: Float[Array, "B T *X"]) -> Float[Array, "B T *X"]:
    """x with the module's bias [*X] of this name, if it has one."""
    return x + getattr(module, name)[None, None].astype(x.dtype) if hasattr(module, name) else x


def normalized(x: Float[Array, "..."], axes: tuple[int, ...], eps: float) -> Float[Array, "..."]:
    """x over the root of its mean square along axes, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016), with a bias or not, computed in float32.

    Args:
        shape: the trailing axes that are normalised as one vector; scale and bias have this shape.
    """

    def __init__(self, arch: ArchConfig, shape: tuple[int, ...], *, centered: bool):
        self.eps, self.offset, self.centered = arch.norm_eps, float(arch.norm_offset), centered
        self.scale = nnx.Param(jnp.full(shape, 1 - self.offset))
        if centered and arch.norm == "layer":
            self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        # The trailing axes of x that scale has too are one vector; the leading ones of `wide` broadcast.
        scale = self.scale[...].astype(jnp.float32)
        axes, y = tuple(range(x.ndim - scale.ndim, x.ndim)), x.astype(jnp.float32)
        wide = (1,) * (x.ndim - scale.ndim) + scale.shape
        if self.centered:
            y = y - y.mean(axis=axes, keepdims=True)
        y = normalized(y, axes, self.eps)
        y = y * (scale + self.offset).reshape(wide)
        if hasattr(self, "bias"):
            y = y + self.bias[...].astype(jnp.float32).reshape(wide)
        return y.astype(x.dtype)


class Gain(nnx.Module):
    """A number that multiplies what a layer leaves, and that no gradient trains."""

    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(1))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gain = jax.lax.stop_gradient(self.scale[...].astype(jnp.float32))
        return (x.astype(jnp.float32) * gain[None, None]).astype(x.dtype)
