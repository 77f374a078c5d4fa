"""The decoder's modules, in flax NNX; `pure.py` turns them into pure functions. No jax transform is used here.

Shapes: B batch, T query positions, S key positions, D width, K key-value heads, G = H / K query heads per key-value
head, N head width, F MLP width, M = 2 if gated else 1, V vocabulary. Weights are float32 masters; every module
computes in the dtype of its input, and norms and softmax in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import ArchConfig
from rlhf_jax.models.attention import Attend
from rlhf_jax.models.cache import Cache, Columns
from rlhf_jax.models.delta import GatedDelta
from rlhf_jax.models.experts import Experts, Routing
from rlhf_jax.models.kernels import einsum
from rlhf_jax.models.rotary import Tables, rotate

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv 2109.08668
}


class Kind(NamedTuple):
    """Of a layer: what mixes tokens, whether it has the window (`local`) or the full view, whether queries turn."""

    mixer: str
    local: bool
    turned: bool


def kinds_of(arch: ArchConfig) -> list[Kind]:
    """The kind of every layer."""
    near, still = arch.window_layers, arch.nope_layers
    return [Kind(mixer, i in near, i not in still) for i, mixer in enumerate(arch.mixers)]


def times(x: Array, factor: float) -> Array:
    """x * factor in float32, rounded to the dtype of x."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


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


class Attention(nnx.Module):
    """Causal self-attention with grouped queries. One fused projection: slots 0..G-1 queries, G key, G+1 value.

    With a gate each query is followed by its own, slots 0..2G-1 (Qiu et al. 2025, arXiv 2505.06708).

    Args:
        mixer: attn, or full, in a layer whose full view has heads of its own; there is no slot of values if they are
            the keys.
    """

    def __init__(self, arch: ArchConfig, mixer: str = "attn", *, rngs: nnx.Rngs):
        d, (k, n) = arch.width, arch.heads_of(mixer)
        g, self.gated = arch.num_heads // k, arch.attn_gate
        self.keys_as_values = mixer == "full" and arch.full_keys_as_values
        self.queries = queries = 2 * g if arch.attn_gate else g
        slots, self.value_eps = queries + 2 - self.keys_as_values, arch.norm_eps if arch.value_norm else None
        self.qkv = nnx.Param(arch.init_std * jax.random.normal(rngs.params(), (d, k, slots, n)))
        out_std = arch.init_std / (2 * arch.num_layers) ** 0.5  # GPT-2's scaling of what adds to the residual stream
        self.out = nnx.Param(out_std * jax.random.normal(rngs.params(), (k, g, n, d)))
        if arch.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros((k, slots, n)))
        if arch.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(d))
        if arch.attn_sinks:
            self.sinks = nnx.Param(jnp.zeros((k, g)))
        self.pairs, self.norm_turned = arch.rope_pairs, arch.qk_norm == "turned"
        if arch.qk_norm != "none":
            self.q_norm = Norm(arch, (k, g, n) if arch.qk_norm == "all" else (n,), centered=False)
            self.k_norm = Norm(arch, (k, 1, n) if arch.qk_norm == "all" else (n,), centered=False)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables | None,
        attend: Attend,
        cache: Columns | None = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Columns]:
        """Without a cache T = S. With one, T new columns are written at `index`; `attend` covers all of it."""
        # [B, T, D] -> [B, T, K, G + 2, N], cut into q [B, T, K, G, N] and k, v [B, T, K, 1, N].
        qkv = einsum("btd,dkgn->btkgn", x, self.qkv[...])
        if hasattr(self, "qkv_bias"):
            qkv = qkv + self.qkv_bias[None, None].astype(x.dtype)
        q, k, v = jnp.split(qkv, [self.queries, self.queries + 1], axis=3)  # its gradient is one concatenation
        v = k if self.keys_as_values else v
        if self.value_eps is not None:
            v = normalized(v, (-1,), self.value_eps).astype(v.dtype)
        if self.gated:  # [B, T, K, 2G, N] is q and gate in turns
            pairs = q.reshape(*q.shape[:3], -1, 2, q.shape[-1])
            q, gate = pairs[..., 0, :], jax.nn.sigmoid(pairs[..., 1, :])
        if hasattr(self, "q_norm") and not self.norm_turned:
            q, k = self.q_norm(q), self.k_norm(k)
        # [B, K, ., T, N], turned by position; k and v lose their 1.
        q, k, v = (jnp.moveaxis(a, 1, 3) for a in (q, k, v))
        if tables is not None:
            q, k = rotate(q, tables, pairs=self.pairs), rotate(k, tables, pairs=self.pairs)
            q = q if tables.gain is None else (q * tables.gain[:, None, None]).astype(q.dtype)
        if self.norm_turned:
            q, k = self.q_norm(q), self.k_norm(k)
        k, v = k[:, :, 0], v[:, :, 0]
        k, v = written(cache, index, k, v)
        sinks = self.sinks[...] if hasattr(self, "sinks") else None
        # [B, K, G, T, N] -> [B, T, D].
        y = jnp.moveaxis(attend(q, k, v, sinks), 3, 1)
        y = einsum("btkgn,kgnd->btd", y * gate if self.gated else y, self.out[...])
        if hasattr(self, "out_bias"):
            y = y + self.out_bias[None, None].astype(x.dtype)
        return y, (k, v)


def written(cache: Columns | None, index: Array | None, k: Array, v: Array) -> Columns:
    """Keys and values [B, K, T, N] in the cache [B, K, S, N], which is then attended to; themselves without one."""
    if cache is None or index is None:
        return k, v
    write = jax.lax.dynamic_update_slice_in_dim
    keys, values = (write(old, new.astype(old.dtype), index, axis=2) for old, new in zip(cache, (k, v), strict=True))
    return keys, values


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434).

    Keys and values of all heads are made of one vector, and queries of another or of the stream. Of every head the
    last dimensions turn, by a key that all heads share. The cache has keys and values, the latter filled up with zeros
    to the width of keys, as every attention program takes them.

    Shapes: H heads of width N, of which R turn; X, Z, Y, A, B as in `config/rules.py`.
    """

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        d, h, n, z, x = arch.width, arch.num_heads, arch.head_dim, arch.latent_width, arch.latent_query_width
        self.still, self.z, self.pairs = n - arch.latent_rope_dim, z, arch.rope_pairs
        std, norms = arch.init_std, dataclasses.replace(arch, norm_eps=1e-6)  # whatever that of the others is
        draw = lambda std, *shape: nnx.Param(std * jax.random.normal(rngs.params(), shape))  # noqa: E731
        if x:
            self.q_down, self.q_up, self.q_norm = (
                draw(std, d, x),
                draw(std, x, h, n),
                Norm(norms, (x,), centered=False),
            )
        else:
            self.q = draw(std, d, h, n)
        self.kv_down, self.kv_norm = draw(std, d, z + arch.latent_rope_dim), Norm(norms, (z,), centered=False)
        self.kv_up = draw(std, z, h, self.still + arch.latent_value_dim)
        self.out = draw(std / (2 * arch.num_layers) ** 0.5, h, arch.latent_value_dim, d)
        if arch.qkv_bias and x:
            self.q_down_bias = nnx.Param(jnp.zeros(x))
        if arch.qkv_bias:
            self.kv_down_bias = nnx.Param(jnp.zeros(z + arch.latent_rope_dim))
        if arch.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(d))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables,
        attend: Attend,
        cache: Columns | None = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Columns]:
        """As `Attention`."""
        if hasattr(self, "q_down"):
            q = self.q_norm(self._plus("q_down_bias", einsum("btd,dx->btx", x, self.q_down[...])))
            q = einsum("btx,xhn->bthn", q, self.q_up[...])
        else:
            q = einsum("btd,dhn->bthn", x, self.q[...])
        # The latent [B, T, Z], and the key [B, T, R] that all heads share; of the first keys and values [B, T, H, .].
        latent = self._plus("kv_down_bias", einsum("btd,dy->bty", x, self.kv_down[...]))
        latent, shared = jnp.split(latent, [self.z], axis=-1)
        k, v = jnp.split(einsum("btz,zha->btha", self.kv_norm(latent), self.kv_up[...]), [self.still], axis=-1)
        # [B, H, 1, T, .], what turns behind what does not, and zeros behind values.
        q, k, v, shared = (jnp.moveaxis(a, 1, -2)[:, :, None] for a in (q, k, v, shared[:, :, None]))
        q, turning = jnp.split(q, [self.still], axis=-1)
        turning, shared = (rotate(a, tables, pairs=self.pairs) for a in (turning, shared))
        q = jnp.concatenate([q, turning], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(shared, turning.shape)], axis=-1)[:, :, 0]
        width = v.shape[-1]
        v = jnp.pad(v[:, :, 0], [(0, 0)] * 3 + [(0, k.shape[-1] - width)])
        k, v = written(cache, index, k, v)
        y = jnp.moveaxis(attend(q, k, v, None)[:, :, 0, :, :width], 1, 2)
        return self._plus("out_bias", einsum("bthv,hvd->btd", y, self.out[...])), (k, v)

    def _plus(self, name: str, x: Array) -> Array:
        return x + getattr(self, name)[None, None].astype(x.dtype) if hasattr(self, name) else x


class MLP(nnx.Module):
    """down(act(gate x) * up x) (Shazeer 2020, arXiv 2002.05202), or down(act(up x)); gate and up are one product."""

    def __init__(self, arch: ArchConfig, f: int, *, rngs: nnx.Rngs):
        d, m = arch.width, 2 if arch.gated_mlp else 1
        self.activation = arch.activation
        self.up = nnx.Param(arch.init_std * jax.random.normal(rngs.params(), (d, m, f)))
        down_std = arch.init_std / (2 * arch.num_layers) ** 0.5
        self.down = nnx.Param(down_std * jax.random.normal(rngs.params(), (f, d)))
        if arch.mlp_bias:
            self.up_bias = nnx.Param(jnp.zeros((m, f)))
            self.down_bias = nnx.Param(jnp.zeros(d))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up = einsum("btd,dmf->btmf", x, self.up[...])  # gate and up, or up alone
        if hasattr(self, "up_bias"):
            up = up + self.up_bias[None, None].astype(x.dtype)
        # M arrays [B, T, F]; the first goes through the nonlinearity.
        gate, *rest = (part[..., 0, :] for part in jnp.split(up, up.shape[-2], axis=-2))
        act = ACTIVATIONS[self.activation](gate)
        y = einsum("btf,fd->btd", act * rest[0] if rest else act, self.down[...])
        if hasattr(self, "down_bias"):
            y = y + self.down_bias[None, None].astype(x.dtype)
        return y


class Gain(nnx.Module):
    """A number that multiplies what a layer leaves, and that no gradient trains."""

    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(1))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gain = jax.lax.stop_gradient(self.scale[...].astype(jnp.float32))
        return (x.astype(jnp.float32) * gain[None, None]).astype(x.dtype)


class Block(nnx.Module):
    """A residual layer: norms before attention and MLP, on what they add, or both; the two in turn or side by side.

    Args:
        mixer: attn, full, latent or delta, what there is for attention.
        sparse: it has experts in place of the MLP, perhaps with a shared one beside them.
    """

    def __init__(self, arch: ArchConfig, mixer: str = "attn", *, sparse: bool, rngs: nnx.Rngs):
        def norm() -> Norm:
            return Norm(arch, (arch.width,), centered=arch.norm != "rms")

        self.parallel, self.one_norm, self.factor = arch.parallel_residual, arch.shared_norm, arch.residual_multiplier
        self.mixer = mixer
        if mixer == "delta":
            self.delta = GatedDelta(arch, ACTIVATIONS[arch.activation], rngs=rngs)
        elif mixer == "latent":
            self.latent = LatentAttention(arch, rngs=rngs)
        else:
            setattr(self, mixer, Attention(arch, mixer, rngs=rngs))
        if sparse:
            self.experts = Experts(arch, ACTIVATIONS[arch.activation], rngs=rngs)
        else:
            self.mlp = MLP(arch, arch.dense_width if arch.num_experts else arch.ffn_width, rngs=rngs)
        if sparse and arch.shared_width:
            self.shared = MLP(arch, arch.shared_width, rngs=rngs)
        if arch.norm_position in ("pre", "both"):
            self.attn_norm = norm()
        if arch.norm_position in ("pre", "both") and not arch.shared_norm:
            self.mlp_norm = norm()
        if arch.norm_position in ("post", "both"):
            self.attn_post_norm, self.mlp_post_norm = norm(), norm()
        if arch.layer_gain:
            self.gain = Gain()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables | None,
        before: Any,
        cache: Any = None,
        index: Int[Array, ""] | None = None,
        real: Bool[Array, "B T"] | None = None,
        given: Int[Array, "B T k"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache, Routing | None]:
        """Experts are those `given`, or else chosen by a router; tokens off `real` (None: all are) have none.

        What stands before a token is said by an `Attend`, or where a layer has a state by a `Path` or that in a cache.
        """
        near = self._norm("attn_norm", x)
        if hasattr(self, "delta"):
            y, cache = self.delta(near, before if cache is None else cache)
        else:
            y, cache = getattr(self, self.mixer)(near, tables, before, cache, index)
        mixed = x + times(self._norm("attn_post_norm", y), self.factor)
        y, routing = near if self.one_norm else self._norm("mlp_norm", x if self.parallel else mixed), None
        if hasattr(self, "experts"):
            of_all = self.shared(y) if hasattr(self, "shared") else None
            y, routing = self.experts(y, jnp.ones(x.shape[:2], bool) if real is None else real, given)
            y = y if of_all is None else y + of_all
        else:
            y = self.mlp(y)
        x = mixed + times(self._norm("mlp_post_norm", y), self.factor)
        return self._norm("gain", x), cache, routing

    def _norm(self, name: str, x: Array) -> Array:
        return getattr(self, name)(x) if hasattr(self, name) else x


class Embedding(nnx.Module):
    """Token rows, plus learned position rows where the family has them."""

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        self.tokens = nnx.Param(arch.init_std * jax.random.normal(rngs.params(), (arch.vocab_size, arch.width)))
        if arch.positions == "learned":
            self.positions = nnx.Param(
                arch.init_std * jax.random.normal(rngs.params(), (arch.position_rows, arch.width))
            )
        self.scale = arch.width**0.5 if arch.scale_embedding else 1.0
        self.factor, self.offset = arch.embedding_multiplier, arch.position_offset

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: jnp.dtype) -> Array:
        x = jnp.take(self.tokens[...], tokens, axis=0, mode="clip").astype(dtype)
        if self.scale != 1:
            x = x * jnp.asarray(self.scale, dtype)  # rounded to the compute dtype, as Gemma was trained
        x = times(x, self.factor)
        if hasattr(self, "positions"):
            x = x + jnp.take(self.positions[...], positions + self.offset, axis=0, mode="clip").astype(dtype)
        return x


class VocabularyHead(nnx.Module):
    """What the projection to the vocabulary has beside a tied embedding: a kernel if it is untied, a bias or none."""

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        if not arch.tied_head:
            self.kernel = nnx.Param(arch.init_std * jax.random.normal(rngs.params(), (arch.width, arch.vocab_size)))
        if arch.head_bias:
            self.bias = nnx.Param(jnp.zeros(arch.vocab_size))


class ScoreHead(nnx.Module):
    """A scalar per position, in float32: drawn from N(0, 1/(D+1)) (Stiennon et al. 2020), or zeros; bias 0.

    With `members` E there are so many of them, on a last axis; the first of them is not the one of a single head.
    """

    def __init__(self, arch: ArchConfig, *, zeros: bool, members: int = 0, rngs: nnx.Rngs):
        std, each = 0.0 if zeros else (arch.width + 1) ** -0.5, (members,) if members else ()
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*each, arch.width)))
        self.bias = nnx.Param(jnp.zeros(each))

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"] | Float[Array, "B T E"]:
        hidden, kernel, bias = hidden.astype(jnp.float32), self.kernel[...], self.bias[...]
        of = lambda kernel, bias: einsum("btd,d->bt", hidden, kernel) + bias  # noqa: E731
        if kernel.ndim == 1:
            return of(kernel, bias)
        # One product for each head rounds as a model of its own would; all of them are nothing beside the trunk.
        return jnp.stack([of(kernel[i], bias[i]) for i in range(len(kernel))], axis=-1)
