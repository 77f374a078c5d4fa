"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434).

Keys and values of all heads are made of one vector, and queries of another or of the stream. Of every head the last
dimensions turn, by a key that all heads share.

Shapes: B batch, T positions, D width, H heads of width N, of which R turn; X, Z, Y, A, B as in `config/rules.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rlhf_jax.config import ArchConfig
from rlhf_jax.models.attention import Attend
from rlhf_jax.models.cache import Columns, written
from rlhf_jax.models.kernels import einsum
from rlhf_jax.models.norms import Norm, biased
from rlhf_jax.models.rotary import Tables, rotate


class Latents(nnx.Module):
    """The projections, down to latents and up to heads."""

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        d, h, n, z, x = arch.width, arch.num_heads, arch.head_dim, arch.latent_width, arch.latent_query_width
        y, b, self.still, self.z = z + arch.latent_rope_dim, arch.latent_value_dim, n - arch.latent_rope_dim, z
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
        self.kv_down, self.kv_norm = draw(std, d, y), Norm(norms, (z,), centered=False)
        self.kv_up, self.out = draw(std, z, h, self.still + b), draw(std / (2 * arch.num_layers) ** 0.5, h, b, d)
        if arch.qkv_bias:
            self.kv_down_bias = nnx.Param(jnp.zeros(y))
        if arch.qkv_bias and x:
            self.q_down_bias = nnx.Param(jnp.zeros(x))
        if arch.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(d))

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H N"]:
        """Of all heads, not yet turned."""
        if not hasattr(self, "q_down"):
            return einsum("btd,dhn->bthn", x, self.q[...])
        latent = self.q_norm(biased(self, "q_down_bias", einsum("btd,dx->btx", x, self.q_down[...])))
        return einsum("btx,xhn->bthn", latent, self.q_up[...])

    def keys_and_values(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Float[Array, "B T R"]]:
        """Of all heads [B, T, H, .], keys without what turns; and the key that turns, not yet turned."""
        latent = biased(self, "kv_down_bias", einsum("btd,dy->bty", x, self.kv_down[...]))
        latent, shared = jnp.split(latent, [self.z], axis=-1)
        k, v = jnp.split(einsum("btz,zha->btha", self.kv_norm(latent), self.kv_up[...]), [self.still], axis=-1)
        return k, v, shared


class LatentAttention(Latents):
    """Attention of them. The cache has keys and values, filled up with zeros to the width of keys.

    So every attention program takes them.
    """

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        super().__init__(arch, rngs=rngs)
        self.pairs = arch.rope_pairs

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables,
        attend: Attend,
        cache: Columns | None = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Columns]:
        """As `Attention`."""
        q, (k, v, shared) = self.queries(x), self.keys_and_values(x)
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
        return biased(self, "out_bias", einsum("bthv,hvd->btd", y, self.out[...])), (k, v)
