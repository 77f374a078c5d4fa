"""Gated DeltaNet, linear attention with a state (Yang et al. 2024, arXiv 2412.06464), as in Qwen3.5.

Each value head keeps a state S [N, O]. A token multiplies it by its decay, takes away a part beta of what its key
reads from it, puts the same part of its value there, and reads with its query:
    S <- e^g S;   S <- S + beta k (v - S^T k)^T;   o = S^T q
Queries, keys and values are what a short convolution over tokens makes of a projection. A text is computed in chunks
of tokens, whose inner part is a triangular system, and a state goes from chunk to chunk (Yang et al. 2024, arXiv
2406.06484, section 3): equal to token by token but for rounding.

Shapes: B rows, T tokens, D width, J key heads, I value heads for each of them, N and O the widths of their heads, C
channels of the convolution of a key head, W tokens that it sees; n chunks of c tokens; r states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import ArchConfig
from rlhf_jax.models.kernels import einsum
from rlhf_jax.tokens import sees

CHUNK = 64
_EPS = 1e-6
"""Added to the squared length of queries and keys, whatever the eps of norms is."""
product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Recurrent(NamedTuple):
    """What a layer knows of the tokens so far.

    Attributes:
        past: what the convolution saw of the last tokens, the newest first.
        memory: the state of every value head, float32.
    """

    past: Float[Array, "B W-1 J C"]
    memory: Float[Array, "B J I N O"]


class Path(NamedTuple):
    """What stands before a token: of its segment what is of branch 0 or its own, however many segments are in a row.

    With branches a chunk hands on two states: that after its last token, from which the next one goes on, and that
    after the last token that all branches share, from which the next branch begins.

    Attributes:
        first: nothing stands before it.
        previous: the column of the one before it; None where that is the column before.
        before: in a chunk, which tokens [., d] are those before [c], itself included.
        reads: which of the states handed to the chunk a token goes on from, if any.
        ends: in a chunk, the tokens after which the states are handed on: all before it.
        kept: which state each of these goes on from.
    """

    first: Bool[Array, "B T"]
    previous: Int[Array, "B T"] | None
    before: Bool[Array, "n B c c"]
    reads: Bool[Array, "n r B c"]
    ends: Bool[Array, "n r B c"]
    kept: Bool[Array, "n r r B"]

    @classmethod
    def of(cls, segments: Int[Array, "B T"], branches: Int[Array, "B T"] | None = None) -> Path:
        """Of rows with segments of tokens, side by side, and the branches of each, one after another behind 0."""
        size = min(CHUNK, segments.shape[1])
        segment = in_chunks(segments, size, -1)
        last = jnp.full_like(segment[:1, :, -1], -2)
        handed = jnp.concatenate([last, segment[:-1, :, -1]])[..., None]  # the segment of the chunk before
        branch = None if branches is None else in_chunks(branches, size)
        here, before = segment == handed, sees(segment, branch)
        joined = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        if branches is None or branch is None:
            return cls(joined, None, before, here[:, None], before[:, None, :, -1], here[:, None, None, :, -1])
        # A token of another branch than the last one of the chunk before goes on from the state that is shared.
        handed = jnp.concatenate([jnp.zeros_like(last), branch[:-1, :, -1]])[..., None]
        goes_on = (handed == 0) | (branch == handed)
        reads = jnp.stack([here & goes_on, here & ~goes_on], axis=1)
        shared = (segment == segment[..., -1:]) & (branch == 0)
        own = jnp.stack([jnp.zeros_like(here[..., -1]), here[..., -1]], axis=1)
        kept = jnp.stack([reads[..., -1], own], axis=1)
        return cls(
            *_previous(segments, branches, joined), before, reads, jnp.stack([before[..., -1, :], shared], 1), kept
        )

    def shifted(self, x: Float[Array, "B T J C"]) -> Float[Array, "B T J C"]:
        """Of every token what x has for the one before it; 0 for the first."""
        if self.previous is None:
            x = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        else:
            x = jnp.take_along_axis(x, self.previous[..., None, None], axis=1)
        return jnp.where(self.first[..., None, None], jnp.zeros((), x.dtype), x)


def _previous(
    segments: Int[Array, "B T"], branches: Int[Array, "B T"], begins: Bool[Array, "B T"]
) -> tuple[Bool[Array, "B T"], Int[Array, "B T"]]:
    """(whether nothing stands before a token, the column of what does): a branch begins behind what all share."""
    columns = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None], segments.shape)
    last = jnp.pad(branches[:, :-1], ((0, 0), (1, 0)))
    goes_on = ~begins & ((last == 0) | (last == branches))
    shared = jax.lax.cummax(jnp.where(branches == 0, columns, -1), axis=1)
    behind = (
        (branches > 0) & (jnp.take_along_axis(segments, jnp.maximum(shared, 0), axis=1) == segments) & (shared >= 0)
    )
    return ~goes_on & ~behind, jnp.maximum(jnp.where(goes_on, columns - 1, shared), 0)


def in_chunks(x: Array, size: int, fill: float = 0) -> Array:
    """[B, T, ...] as [n, B, size, ...], filled up on the left: the last token stays the last one."""
    pad = -x.shape[1] % size
    x = jnp.pad(x, ((0, 0), (pad, 0), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


@jax.custom_vjp
def unit_inverse(lower: Float[Array, "*m c c"]) -> Float[Array, "*m c c"]:
    """(1 + lower)^-1 of matrices that are 0 on and above the diagonal.

    The inverse of blocks of twice the size is that of their halves A and C, and -C^-1 B A^-1 below. Only products: on
    a TPU faster than substitution, and every device does its own matrices.
    """
    size, half = lower.shape[-1], 1
    rows = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    while half < size:
        same, low = rows // (2 * half), rows // half % 2 == 1
        below = (same[:, None] == same[None]) & low[:, None] & ~low[None]
        part = lower * below.reshape((1,) * (lower.ndim - 2) + below.shape)
        inverse = inverse - product("...ab,...bc,...cd->...ad", inverse, part, inverse)
        half *= 2
    return inverse


def _inverse_gradient(inverse: Array, grad: Array) -> tuple[Array]:
    return (-product("...ba,...bc,...dc->...ad", inverse, grad, inverse),)


unit_inverse.defvjp(lambda lower: (inverse := unit_inverse(lower), inverse), _inverse_gradient)


def by_chunks(
    q: Float[Array, "B T J N"],
    k: Float[Array, "B T J N"],
    v: Float[Array, "B T J I O"],
    decay: Float[Array, "B T J I"],
    beta: Float[Array, "B T J I"],
    path: Path,
) -> tuple[Float[Array, "B T J I O"], Float[Array, "B J I N O"]]:
    """What every token reads, and the state after the last one; all float32, `decay` the logarithm of e^g."""
    size = path.before.shape[-1]
    q, k, v, decay, beta = (in_chunks(x, size) for x in (q, k, v, decay, beta))
    # Decay from the start of a chunk up to a token [n, B, J, I, c], and between two of them [n, B, J, I, c, c].
    beta, before = jnp.moveaxis(beta, 2, 4), path.before[:, :, None, None]
    since = product("nbcd,nbdji->nbjic", path.before.astype(q.dtype), decay)
    between = jnp.exp(jnp.where(before, since[..., :, None] - since[..., None, :], -jnp.inf))
    # What a token puts into the state is beta (v - S^T k) of the S that those before it left: a triangular system.
    keys = product("nbcjk,nbdjk->nbjcd", k, k)[:, :, :, None] * between * beta[..., None]
    solved = unit_inverse(jnp.where(jnp.eye(size, dtype=bool)[None, None, None, None], 0.0, keys))
    puts = product("nbjicd,nbdjio->nbjico", solved * beta[..., None, :], v)
    takes = product("nbjicd,nbdjk->nbjick", solved * (beta * jnp.exp(since))[..., None, :], k)
    mixes = product("nbcjk,nbdjk->nbjcd", q, k)[:, :, :, None] * between
    asks = jnp.moveaxis(q, 2, 3)[:, :, :, None] * jnp.exp(since)[..., None]
    # Of the states that a chunk hands on: what is left there of those handed to it, and of what its tokens put.
    end = product("nrbd,nbdji->nrbji", path.ends.astype(q.dtype), decay)
    kept = path.kept[..., None, None] * jnp.exp(end)[:, :, None]  # [n, r, r, B, J, I]
    left = jnp.where(path.ends[..., None, None, :], end[..., None] - since[:, None], -jnp.inf)
    left = jnp.exp(left)  # [n, r, B, J, I, c]

    def chunk(states: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        k, puts, takes, mixes, asks, left, kept, reads = inputs
        of_states = lambda x: product("sbc,bjick,sbjiko->bjico", reads, x, states)  # noqa: E731
        puts = puts - of_states(takes)
        out = of_states(asks) + product("bjicd,bjido->bjico", mixes, puts)
        new = product("sbjic,bcjk,bjico->sbjiko", left, k, puts)
        return product("rsbji,sbjiko->rbjiko", kept, states) + new, out

    reads = path.reads.astype(q.dtype)
    start = jnp.zeros((reads.shape[1], *v.shape[1:2], *v.shape[3:5], k.shape[-1], v.shape[-1]), q.dtype)
    states, out = jax.lax.scan(chunk, start, (k, puts, takes, mixes, asks, left, kept, reads))
    out = jnp.moveaxis(out, (0, 4), (1, 2))  # [B, n, c, J, I, O]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, -path.first.shape[1] :], states[0]


def by_token(
    q: Float[Array, "B J N"],
    k: Float[Array, "B J N"],
    v: Float[Array, "B J I O"],
    decay: Float[Array, "B J I"],
    beta: Float[Array, "B J I"],
    memory: Float[Array, "B J I N O"],
) -> tuple[Float[Array, "B J I O"], Float[Array, "B J I N O"]]:
    """What one more token reads, and the state after it."""
    memory = memory * jnp.exp(decay)[..., None, None]
    put = beta[..., None] * (v - product("bjk,bjiko->bjio", k, memory))
    memory = memory + k[:, :, None, :, None] * put[..., None, :]
    return product("bjk,bjiko->bjio", q, memory), memory


def unit(x: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)


class GatedDelta(nnx.Module):
    """The layer: projections, convolution, the rule, an RMSNorm by head times a gate, and a projection.

    Args:
        activation: the nonlinearity after the convolution.
    """

    def __init__(self, arch: ArchConfig, activation: Callable[[Array], Array], *, rngs: nnx.Rngs):
        j, n, o = arch.delta_key_heads, arch.delta_key_dim, arch.delta_value_dim
        i, d, w = arch.delta_value_heads // j, arch.width, arch.delta_kernel
        self.eps, self.n, self.o, self.activation = arch.norm_eps, n, o, activation
        draw = lambda *shape: nnx.Param(arch.init_std * jax.random.normal(rngs.params(), shape))  # noqa: E731
        self.qkv, self.gate = draw(d, j, 2 * n + i * o), draw(d, j, i * o)
        self.beta, self.decay = draw(d, j, i), draw(d, j, i)
        self.conv = nnx.Param(jax.random.uniform(rngs.params(), (j, 2 * n + i * o, w), minval=-1, maxval=1) * w**-0.5)
        # e^g = exp(-rate softplus(x + bias)), rates up to 16 (Gu and Dao 2023, arXiv 2312.00752).
        self.log_rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (j, i), minval=0.01, maxval=16)))
        self.rate_bias = nnx.Param(jnp.ones((j, i)))
        self.out_norm = nnx.Param(jnp.ones(o))
        self.out = nnx.Param(draw(j, i * o, d)[...] / (2 * arch.num_layers) ** 0.5)

    def __call__(self, x: Float[Array, "B T D"], before: Path | Recurrent) -> tuple[Float[Array, "B T D"], Recurrent]:
        """Of whole texts with their path, or of one more token, T = 1, with the state of those before it."""
        mixed, past = self.convolved(einsum("btd,djc->btjc", x, self.qkv[...]), before)
        q, k, v = jnp.split(mixed, [self.n, 2 * self.n], axis=-1)
        q, k, v = unit(q) * self.n**-0.5, unit(k), v.reshape(*v.shape[:3], -1, self.o)
        # beta in (0, 1) and the logarithm of the decay, of every value head [B, T, J, I].
        beta = jax.nn.sigmoid(einsum("btd,dji->btji", x, self.beta[...]).astype(jnp.float32))
        rate, bias = (p[None, None].astype(jnp.float32) for p in (self.log_rate, self.rate_bias))
        step = einsum("btd,dji->btji", x, self.decay[...]).astype(jnp.float32)
        decay = -jnp.exp(rate) * jax.nn.softplus(step + bias)
        if isinstance(before, Path):
            y, memory = by_chunks(q, k, v, decay, beta, before)
        else:
            y, memory = by_token(q[:, 0], k[:, 0], v[:, 0], decay[:, 0], beta[:, 0], before.memory)
            y = y[:, None]
        # [B, T, J, I, O]: normalised by head, times the gate; then [B, T, D].
        y = (
            y
            * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
            * self.out_norm[None, None, None, None]
        )
        gate = jax.nn.silu(einsum("btd,dju->btju", x, self.gate[...]).astype(jnp.float32))
        y = (y.reshape(gate.shape) * gate).astype(x.dtype)
        return einsum("btju,jud->btd", y, self.out[...]), Recurrent(past, memory)

    def convolved(
        self, x: Float[Array, "B T J C"], before: Path | Recurrent
    ) -> tuple[Float[Array, "B T J C"], Float[Array, "B W-1 J C"]]:
        """The convolution, float32, and what the next token needs of its inputs."""
        kernel = self.conv[...].astype(jnp.float32)
        seen = [x]  # by every token: itself, the one before it, the one before that
        for i in range(kernel.shape[-1] - 1):
            seen.append(before.shifted(seen[-1]) if isinstance(before, Path) else before.past[:, i : i + 1])
        parts = [part.astype(jnp.float32) * kernel[None, None, ..., -1 - i] for i, part in enumerate(seen)]
        last = [part[:, -1:] for part in seen[:-1]]
        return self.activation(sum(parts[1:], parts[0])), jnp.concatenate(last, axis=1) if last else x[:, :0]
