"""The decoder's modules, in flax NNX; `model.py` turns them into pure functions. No jax transform is used here.

Shapes: B batch, T query positions, S key positions, D width, K key-value heads, G = H / K query heads per key-value
head, N head width, F MLP width, M = 2 if gated else 1, V vocabulary. Weights are float32 masters; every module
computes in the dtype of its input, and norms and softmax in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import ArchConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}

Cache = tuple[Float[Array, "B K S N"], Float[Array, "B K S N"]]
"""Keys and values of one layer; a model's cache is a list of these."""


def einsum(letters: str, x: Array, kernel: Array) -> Array:
    """A product in x's dtype; float32 means float32 on TPU too, whose default would round the inputs to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(letters, x, kernel.astype(x.dtype), precision=precision)


def rotary_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines of positions * theta^(-2i/N) (Su et al. 2021, arXiv 2104.09864), float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B K G T N"], tables: tuple[Array, Array]) -> Float[Array, "B K G T N"]:
    """Rotary embedding in the half-split layout: dimension i turns with dimension i + N/2."""
    cos, sin = (t[:, None, None] for t in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(
    q: Float[Array, "B K G T N"], k: Float[Array, "B K S N"], v: Float[Array, "B K S N"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B K G T N"]:
    """Softmax attention, scores in float32; every query may see at least one key.

    The division by the sum of exponentials comes after the product with the values, on [T, N] instead of [T, S]: with
    its backward pass that is a third faster on CPU than softmax then product.
    """
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "bkgtn,bksn->bkgts", q * q.shape[-1] ** -0.5, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum("bkgts,bksn->bkgtn", weights.astype(q.dtype), v, precision=precision)
    return mixed / weights.sum(axis=-1, keepdims=True).astype(q.dtype)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm with bias (Ba et al. 2016), computed in float32."""

    def __init__(self, arch: ArchConfig):
        self.eps = arch.norm_eps
        self.centered = arch.norm == "layer"
        self.scale = nnx.Param(jnp.ones(arch.width))
        if self.centered:
            self.bias = nnx.Param(jnp.zeros(arch.width))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = x.astype(jnp.float32)
        if self.centered:
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps) * self.scale[None, None]
        if self.centered:
            y = y + self.bias[None, None]
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries. One fused projection: slots 0..G-1 queries, G key, G+1 value."""

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        d, k, n = arch.width, arch.num_kv_heads, arch.head_dim
        self.groups = g = arch.num_heads // k
        self.qkv = nnx.Param(arch.init_std * jax.random.normal(rngs.params(), (d, k, g + 2, n)))
        out_std = arch.init_std / (2 * arch.num_layers) ** 0.5  # GPT-2's scaling of what adds to the residual stream
        self.out = nnx.Param(out_std * jax.random.normal(rngs.params(), (k, g, n, d)))
        if arch.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((k, g + 2, n)))
        if arch.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(d))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: tuple[Array, Array] | None,
        mask: Bool[Array, "B T S"],
        cache: Cache | None = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Without a cache T = S. With one, T new columns are written at `index`; the mask covers all of it."""
        qkv = einsum("btd,dkgn->btkgn", x, self.qkv[...])
        if hasattr(self, "qkv_bias"):
            qkv = qkv + self.qkv_bias[None, None].astype(x.dtype)
        qkv = jnp.moveaxis(qkv, 1, 3)  # B K G+2 T N
        qk, v = jnp.split(qkv, [self.groups + 1], axis=2)  # the gradient of a split is one concatenation
        if tables is not None:
            qk = rotate(qk, tables)
        q, k = jnp.split(qk, [self.groups], axis=2)
        k, v = k[:, :, 0], v[:, :, 0]
        if cache is not None and index is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), index, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), index, axis=2)
        y = einsum("btkgn,kgnd->btd", jnp.moveaxis(attention(q, k, v, mask), 3, 1), self.out[...])
        if hasattr(self, "out_bias"):
            y = y + self.out_bias[None, None].astype(x.dtype)
        return y, (k, v)


class MLP(nnx.Module):
    """down(act(gate x) * up x) (Shazeer 2020, arXiv 2002.05202), or down(act(up x)); gate and up are one product."""

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        d, f, m = arch.width, arch.ffn_width, 2 if arch.gated_mlp else 1
        self.activation = arch.activation
        self.up = nnx.Param(arch.init_std * jax.random.normal(rngs.params(), (d, m, f)))
        down_std = arch.init_std / (2 * arch.num_layers) ** 0.5
        self.down = nnx.Param(down_std * jax.random.normal(rngs.params(), (f, d)))
        if arch.mlp_bias:
            self.up_bias = nnx.Param(jnp.zeros((m, f)))
            self.down_bias = nnx.Param(jnp.zeros(d))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up = einsum("btd,dmf->btmf", x, self.up[...])
        if hasattr(self, "up_bias"):
            up = up + self.up_bias[None, None].astype(x.dtype)
        gate, *rest = (part[..., 0, :] for part in jnp.split(up, up.shape[-2], axis=-2))
        act = ACTIVATIONS[self.activation](gate)
        y = einsum("btf,fd->btd", act * rest[0] if rest else act, self.down[...])
        if hasattr(self, "down_bias"):
            y = y + self.down_bias[None, None].astype(x.dtype)
        return y


class Block(nnx.Module):
    """Pre-norm residual layer."""

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        self.attn_norm, self.attn = Norm(arch), Attention(arch, rngs=rngs)
        self.mlp_norm, self.mlp = Norm(arch), MLP(arch, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: tuple[Array, Array] | None,
        mask: Bool[Array, "B T S"],
        cache: Cache | None = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        y, cache = self.attn(self.attn_norm(x), tables, mask, cache, index)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Embedding(nnx.Module):
    """Token rows, plus learned position rows where the family has them."""

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        self.tokens = nnx.Param(arch.init_std * jax.random.normal(rngs.params(), (arch.vocab_size, arch.width)))
        if arch.positions == "learned":
            self.positions = nnx.Param(
                arch.init_std * jax.random.normal(rngs.params(), (arch.max_positions, arch.width))
            )

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: jnp.dtype) -> Array:
        x = jnp.take(self.tokens[...], tokens, axis=0, mode="clip").astype(dtype)
        if hasattr(self, "positions"):
            x = x + jnp.take(self.positions[...], positions, axis=0, mode="clip").astype(dtype)
        return x


class VocabularyHead(nnx.Module):
    """An untied projection to the vocabulary."""

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(arch.init_std * jax.random.normal(rngs.params(), (arch.width, arch.vocab_size)))


class ScoreHead(nnx.Module):
    """A scalar per position, in float32: drawn from N(0, 1/(D+1)) (Stiennon et al. 2020), or zeros; bias 0."""

    def __init__(self, arch: ArchConfig, *, zeros: bool, rngs: nnx.Rngs):
        std = 0.0 if zeros else (arch.width + 1) ** -0.5
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (arch.width,)))
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        return einsum("btd,d->bt", hidden.astype(jnp.float32), self.kernel[...]) + self.bias[...]
