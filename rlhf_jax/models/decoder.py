"""The decoder's modules, in flax NNX; `pure.py` turns them into pure functions. No jax transform is used here.

Shapes: B batch, T query positions, S key positions, D width, K key-value heads, G = H / K query heads per key-value
head, N head width, F MLP width, M = 2 if gated else 1, V vocabulary, I width of what a layer is given of each token.
Weights are float32 masters; every module computes in the dtype of its input, and norms and softmax in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import ArchConfig
from rlhf_jax.models.attention import Attend
from rlhf_jax.models.cache import Cache, Columns, written
from rlhf_jax.models.delta import GatedDelta
from rlhf_jax.models.experts import Experts, Routing
from rlhf_jax.models.kernels import einsum
from rlhf_jax.models.latent import LatentAttention
from rlhf_jax.models.norms import Gain, Norm, biased, normalized, times
from rlhf_jax.models.rotary import Tables, rotate

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv 2109.08668
}


class Attention(nnx.Module):
    """Causal self-attention with grouped queries. One fused projection: slots 0..G-1 queries, G key, G+1 value.

    With a gate each query is followed by its own, slots 0..2G-1 (Qiu et al. 2025, arXiv 2505.06708).

    Args:
        mixer: attn, or full, in a layer whose full view has heads of its own; there is no slot of values if they are
            the keys. Of queries and full_queries there are slots of queries alone (`SharedAttention`).
    """

    def __init__(self, arch: ArchConfig, mixer: str = "attn", *, rngs: nnx.Rngs):
        d, (k, n) = arch.width, arch.heads_of(mixer)
        g, self.gated = arch.num_heads // k, arch.attn_gate
        self.keys_as_values = mixer == "full" and arch.full_keys_as_values
        self.queries = queries = 2 * g if arch.attn_gate else g
        shares, self.value_eps = mixer.endswith("queries"), arch.norm_eps if arch.value_norm else None
        slots = queries if shares else queries + 2 - self.keys_as_values
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
        if arch.qk_norm != "none" and not shares:
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
        qkv = biased(self, "qkv_bias", einsum("btd,dkgn->btkgn", x, self.qkv[...]))
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
        return biased(self, "out_bias", y), (k, v)


class SharedAttention(Attention):
    """Attention to the keys and values of a layer below (`ArchConfig.shared_kv_layers`): qkv has queries alone."""

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tables: Tables | None,
        attend: Attend,
        cache: Columns | None = None,
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Columns]:
        """As `Attention`, of a cache that has the columns of all tokens already."""
        assert cache is not None
        q = biased(self, "qkv_bias", einsum("btd,dkgn->btkgn", x, self.qkv[...]))
        q = jnp.moveaxis(self.q_norm(q) if hasattr(self, "q_norm") else q, 1, 3)  # [B, K, G, T, N]
        if tables is not None:
            q = rotate(q, tables, pairs=self.pairs)
        y = einsum("btkgn,kgnd->btd", jnp.moveaxis(attend(q, *cache, None), 3, 1), self.out[...])
        return biased(self, "out_bias", y), cache


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
        up = biased(self, "up_bias", einsum("btd,dmf->btmf", x, self.up[...]))  # gate and up, or up alone

        def inner(up: Float[Array, "B T M F"]) -> Float[Array, "B T F"]:
            gate, *rest = (part[..., 0, :] for part in jnp.split(up, up.shape[-2], axis=-2))
            act = ACTIVATIONS[self.activation](gate)
            return act * rest[0] if rest else act

        # Computed again for its gradient, of which each factor would be stored: of GELU five arrays [B, T, F].
        inner = jax.checkpoint(inner, prevent_cse=False)
        return biased(self, "down_bias", einsum("btf,fd->btd", inner(up), self.down[...]))


class LayerInput(nnx.Module):
    """What a layer adds of its own input by token, gated by the stream (per-layer embeddings, Gemma 3n and 4)."""

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        shape, out_std = (arch.width, arch.layer_input_width), arch.init_std / (2 * arch.num_layers) ** 0.5
        self.gate = nnx.Param(arch.init_std * jax.random.normal(rngs.params(), shape))
        self.out = nnx.Param(out_std * jax.random.normal(rngs.params(), shape[::-1]))
        self.post_norm = Norm(arch, (arch.width,), centered=arch.norm != "rms")
        self.activation = ACTIVATIONS[arch.activation]

    def __call__(self, x: Float[Array, "B T D"], own: Float[Array, "B T I"]) -> Float[Array, "B T D"]:
        gate = self.activation(einsum("btd,di->bti", x, self.gate[...]))
        return self.post_norm(einsum("bti,id->btd", gate * own, self.out[...]))


class Block(nnx.Module):
    """A residual layer: norms before attention and MLP, on what they add, or both; the two in turn or side by side.

    Args:
        mixer: what there is for attention (`ArchConfig.mixers`).
        sparse: it has experts in place of the MLP, perhaps with a shared one beside them, or beside it.
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
            shares = mixer.endswith("queries")
            setattr(self, mixer, (SharedAttention if shares else Attention)(arch, mixer, rngs=rngs))
        if sparse:
            self.experts = Experts(arch, ACTIVATIONS[arch.activation], rngs=rngs)
        if sparse and arch.expert_width:
            self.mlp, self.mlp_out_norm = MLP(arch, arch.ffn_width, rngs=rngs), norm()
            self.experts_norm, self.experts_out_norm = norm(), norm()
        elif arch.shared_kv_ffn_width and mixer.endswith("queries"):
            self.wide = MLP(arch, arch.shared_kv_ffn_width, rngs=rngs)
        elif not sparse:
            self.mlp = MLP(arch, arch.dense_width if arch.num_experts else arch.ffn_width, rngs=rngs)
        if sparse and arch.shared_width:
            self.shared = MLP(arch, arch.shared_width, rngs=rngs)
        if arch.norm_position in ("pre", "both"):
            self.attn_norm = norm()
        if arch.norm_position in ("pre", "both") and not arch.shared_norm:
            self.mlp_norm = norm()
        if arch.norm_position in ("post", "both"):
            self.attn_post_norm, self.mlp_post_norm = norm(), norm()
        if arch.layer_input_width:
            self.input = LayerInput(arch, rngs=rngs)
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
        own: Float[Array, "B T I"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache, Routing | None]:
        """Experts are those `given`, or else chosen by a router; tokens off `real` (None: all are) have none.

        What stands before a token is said by an `Attend`, or where a layer has a state by a `Path` or that in a cache;
        without keys and values of its own the cache is that of the layer that has them. `own` is a layer's own input.
        """
        near = self._norm("attn_norm", x)
        if hasattr(self, "delta"):
            y, cache = self.delta(near, before if cache is None else cache)
        else:
            y, cache = getattr(self, self.mixer)(near, tables, before, cache, index)
        mixed = x + times(self._norm("attn_post_norm", y), self.factor)
        y, routing = near if self.one_norm else self._norm("mlp_norm", x if self.parallel else mixed), None
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        if hasattr(self, "experts_norm"):  # beside the MLP; the router sees the stream as it is
            of_mlp = self.mlp_out_norm(self.mlp(y))
            y, routing = self.experts(self.experts_norm(mixed), real, given, mixed)
            y = of_mlp + self.experts_out_norm(y)
        elif hasattr(self, "experts"):
            of_all = self.shared(y) if hasattr(self, "shared") else None
            y, routing = self.experts(y, real, given)
            y = y if of_all is None else y + of_all
        else:
            y = self.wide(y) if hasattr(self, "wide") else self.mlp(y)
        x = mixed + times(self._norm("mlp_post_norm", y), self.factor)
        if own is not None:
            x = x + self.input(x, own)
        return self._norm("gain", x), cache, routing

    def _norm(self, name: str, x: Array) -> Array:
        return getattr(self, name)(x) if hasattr(self, name) else x


class Embedding(nnx.Module):
    """Token rows, plus learned position rows where the family has them; and of each layer what it is given of a token.

    That is the mean of a row of a table and of a projection of the embedded token, times the root of 2.
    """

    def __init__(self, arch: ArchConfig, *, rngs: nnx.Rngs):
        self.tokens = nnx.Param(arch.init_std * jax.random.normal(rngs.params(), (arch.vocab_size, arch.width)))
        if arch.positions == "learned":
            self.positions = nnx.Param(
                arch.init_std * jax.random.normal(rngs.params(), (arch.position_rows, arch.width))
            )
        self.scale = arch.width**0.5 if arch.scale_embedding else 1.0
        self.factor, self.offset = arch.embedding_multiplier, arch.position_offset
        if i := arch.layer_input_width:
            draw = lambda *shape: nnx.Param(arch.init_std * jax.random.normal(rngs.params(), shape))  # noqa: E731
            self.by_layer, self.context = (
                draw(arch.vocab_size, arch.num_layers, i),
                draw(arch.width, arch.num_layers, i),
            )
            self.context_norm = Norm(arch, (i,), centered=arch.norm != "rms")

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: jnp.dtype
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T L I"] | None]:
        x = jnp.take(self.tokens[...], tokens, axis=0, mode="clip").astype(dtype)
        if self.scale != 1:
            x = x * jnp.asarray(self.scale, dtype)  # rounded to the compute dtype, as Gemma was trained
        x = times(x, self.factor)
        if hasattr(self, "positions"):
            x = x + jnp.take(self.positions[...], positions + self.offset, axis=0, mode="clip").astype(dtype)
        if not hasattr(self, "by_layer"):
            return x, None
        rows = jnp.take(self.by_layer[...], tokens, axis=0, mode="clip").astype(dtype)
        context = times(einsum("btd,dli->btli", x, self.context[...]), x.shape[-1] ** -0.5)
        rows = rows * jnp.asarray(rows.shape[-1] ** 0.5, dtype)  # rounded as those of the embedding are
        return x, times(self.context_norm(context) + rows, 2**-0.5)


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
