"""Attention by programs with the same masks: plain XLA, whole or by blocks, splash on TPU, cuDNN's flash on GPU.

Shapes as in `decoder.py`: B batch, T queries, S keys, K key-value heads, G query heads for each of them, N head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.errors import UserError
from rlhf_jax.models.blockwise import (
    KERNEL_OUTPUT,
    SIZE,
    blockwise_attention,
    masked_scores,
    softcapped,
    tiles_of,
)
from rlhf_jax.sharding import data_ways, row_axes
from rlhf_jax.tokens import sees

Attend = Callable[..., Array]
"""(q [B K G T N], k [B K S N], v [B K S N], sinks [K G] | None) -> [B K G T N], mask, scale and cap closed over."""

LANES = 128
_KEPT = jax.checkpoint_policies.save_only_these_names(KERNEL_OUTPUT)
_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT = {"dots": jax.checkpoint_policies.save_from_both_policies(_DOTS, _KEPT), "full": None}


def platform_dtype(name: str) -> jnp.dtype:
    """The compute dtype that a config names; auto is float32 on CPU, bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def platform_attention(name: str) -> str:
    """The attention program that a config names: flash is the splash kernel on TPU and cuDNN's on GPU, auto as well.

    On CPU auto is attention by blocks.

    Raises:
        UserError: flash on CPU.
    """
    platform = jax.default_backend()
    kinds = {"tpu": "splash", "gpu": "cudnn"}
    if name == "flash" and platform not in kinds:
        raise UserError(f"model.attention flash needs a TPU or GPU, not {platform}; set it to auto or plain")
    return {"auto": kinds.get(platform, "blockwise"), "flash": kinds.get(platform, "")}.get(name, name)


@dataclass(frozen=True)
class Branches:
    """Several continuations of one text side by side in its segment.

    Attributes:
        ids: 0 on what all see, k on continuation k.
        positions: distances, which a window counts: a continuation stands behind the shared text, not behind the one
            before it.
    """

    ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]


def exponentials(
    scores: Float[Array, "B K G T S"], sinks: Float[Array, "K G"] | None
) -> tuple[Float[Array, "B K G T S"], Float[Array, "B K G T 1"]]:
    """exp(score - max) and its sum over keys, in which a sink counts as the score of one more key without a value."""
    of_head = None if sinks is None else sinks.astype(jnp.float32)[None, :, :, None, None]
    peak = scores.max(axis=-1, keepdims=True)
    peak = jax.lax.stop_gradient(peak if of_head is None else jnp.maximum(peak, of_head))
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    return weights, total if of_head is None else total + jnp.exp(of_head - peak)


def attention(
    q: Float[Array, "B K G T N"],
    k: Float[Array, "B K S N"],
    v: Float[Array, "B K S N"],
    mask: Bool[Array, "B T S"],
    sinks: Float[Array, "K G"] | None = None,
    *,
    scale: float,
    softcap: float,
) -> Float[Array, "B K G T N"]:
    """Softmax attention, scores in float32; every query may see at least one key.

    `softcap` bends scores to cap * tanh(score / cap) (Gemma 2); 0 leaves them. `sinks` take a part of every query's
    attention and give nothing (GPT-OSS; Xiao et al. 2023, arXiv 2309.17453). The division by the sum of exponentials
    comes after the product with the values, on [T, N] instead of [T, S]: with its backward pass that is a third faster
    on CPU than softmax then product.
    """
    # exp(scores - max) v, then over the sum of exp: [B, K, G, T, S] x [B, K, S, N] -> [B, K, G, T, N].
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    weights, total = exponentials(masked_scores(q * scale, k, mask, softcap), sinks)
    mixed = jnp.einsum("bkgts,bksn->bkgtn", weights.astype(q.dtype), v, precision=precision)
    return mixed / total.astype(q.dtype)


def group_attention(
    q: Float[Array, "B K G 1 N"],
    k: Float[Array, "B K S N"],
    v: Float[Array, "B K S N"],
    sinks: Float[Array, "K G"] | None = None,
    *,
    shared: tuple[Float[Array, "X K P N"], Float[Array, "X K P N"]],
    mask: Bool[Array, "B P+S"],
    scale: float,
    softcap: float,
) -> Float[Array, "B K G 1 N"]:
    """`attention` of one query of each row to S columns of its own, and P that it shares with the rows beside it.

    The rows lie in X groups, one after another; a shared column is read once for all queries of its group. `mask` has
    the shared columns first.
    """
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    (shared_k, shared_v), groups = shared, shared[0].shape[0]

    def by_group(x: Array) -> Array:
        """[B, K, G, 1, .] as [X, K, B / X, G, .]."""
        return jnp.moveaxis(x.reshape(groups, -1, *x.shape[1:3], x.shape[4]), 1, 2)

    def by_row(x: Array) -> Array:
        """Undo `by_group`."""
        return jnp.moveaxis(x, 2, 1).reshape(q.shape[0], *q.shape[1:4], x.shape[4])

    # Scores [B, K, G, 1, P + S] side by side under one softmax; the two parts of the mixture are added in float32 and
    # rounded once, as the one product of `attention` is.
    q = q * scale
    parts = (
        by_row(product("xkrgn,xkpn->xkrgp", by_group(q), shared_k)),
        product("bkgtn,bksn->bkgts", q, k),
    )
    scores = softcapped(jnp.concatenate(parts, axis=-1), softcap)
    scores = jnp.where(mask[:, None, None, None], scores, jnp.finfo(jnp.float32).min)
    weights, total = exponentials(scores, sinks)
    of_shared, of_own = jnp.split(weights.astype(q.dtype), [shared_k.shape[2]], axis=-1)
    mixed = product("bkgts,bksn->bkgtn", of_own, v)
    mixed = mixed + by_row(product("xkrgp,xkpn->xkrgn", by_group(of_shared), shared_v))
    return mixed.astype(q.dtype) / total.astype(q.dtype)


def by_device(
    rows: Callable[..., Array],
    q: Float[Array, "B K G T N"],
    k: Float[Array, "B K T N"],
    v: Float[Array, "B K T N"],
    seen: Array,
    sinks: Float[Array, "K G"] | None,
    heads_over: str | None,
) -> Float[Array, "B K G T N"]:
    """rows(q, k, v, seen, sinks) of a device's own rows and heads; `seen` is of rows, [B, ...]."""
    if jax.sharding.get_abstract_mesh().empty or len(q) % data_ways():
        return rows(q, k, v, seen, sinks)
    heads, keys = P(row_axes(), heads_over, None, None, None), P(row_axes(), heads_over, None, None)
    specs = (heads, keys, keys, P(row_axes(), *[None] * (seen.ndim - 1)), P(heads_over, None))
    return jax.shard_map(rows, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, seen, sinks)


def _block(length: int) -> int:
    """Side of the splash kernel's blocks for so many columns: that of least time, the last ones filled up.

    A step takes .35 us beside what it computes (Pallas' documentation): on v5e what a block of 370 columns takes.
    """
    return min((512, 384, 256, LANES), key=lambda side: (-(-length // side)) ** 2 * (side**2 + 370**2))


def _splash_kernel(
    heads: int,
    length: int,
    block: int,
    window: int,
    softcap: float,
    interpret: bool,
    seen: Bool[Array, "T T"] | None = None,
) -> Callable[..., Array]:
    """Causal attention of `heads` query heads over one key-value head; `length` is a multiple of `block`.

    `seen` is a mask that says all: the kernel then reads its blocks instead of computing them, leaves out those in
    which nothing is seen, and takes no segments.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    made = kernel.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * heads) if seen is None else seen[None],  # one mask for all heads
        block_sizes=sizes,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=KERNEL_OUTPUT,
        interpret=interpret,
    )
    if seen is None:
        return lambda q, k, v, ids, sinks: made(q, k, v, kernel.SegmentIds(ids, ids), sinks)
    made.fwd_mask_info = made.fwd_mask_info._replace(is_dynamic_mask=True)  # jit has made an array of it
    return lambda q, k, v, sinks: made(q, k, v, None, sinks)


def splash_attention(
    q: Float[Array, "B K G T N"],
    k: Float[Array, "B K T N"],
    v: Float[Array, "B K T N"],
    sinks: Float[Array, "K G"] | None = None,
    *,
    segment_ids: Int[Array, "B T"],
    branches: Branches | None = None,
    window: int,
    scale: float,
    softcap: float,
    heads_over: str | None,
    interpret: bool = False,
) -> Float[Array, "B K G T N"]:
    """Causal attention within segments by the splash kernel, whose memory grows with T instead of its square.

    Rows lie over data and fsdp, key-value heads over the mesh axis `heads_over`, if any: the kernel runs on each
    device's share. `window` > 0 sees that many tokens, the query's own included. The mask of branches
    is data, [T, T] of one row at a time: rows run one after another, each with the blocks in which it sees any.
    """
    # T is padded to whole blocks; padding has segment 0, as the prompt's has.
    length, block = q.shape[3], _block(q.shape[3])
    pad = -length % block
    q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad), (0, 0)]) for x in (q * scale, k, v))
    seen = jnp.pad(segment_ids, ((0, 0), (0, pad)))  # by segment, int32[B, T], or by mask, bool[B, T, T]
    if branches is not None:
        padded = Branches(*(jnp.pad(x, ((0, 0), (0, pad))) for x in (branches.ids, branches.positions)))
        seen = causal_mask(seen, window, padded)

    def row(sinks: Array | None, args: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, seen = args
        kernel = _splash_kernel(q.shape[1], q.shape[2], block, window, softcap, interpret, seen)
        return jax.vmap(kernel)(q, k, v, sinks)  # K

    def rows(q: Array, k: Array, v: Array, seen: Array, sinks: Array | None) -> Array:
        if branches is not None:
            return jax.lax.map(functools.partial(row, sinks), (q, k, v, seen))
        kernel = _splash_kernel(q.shape[2], q.shape[3], block, window, softcap, interpret)
        return jax.vmap(jax.vmap(kernel, (0, 0, 0, None, 0)), (0, 0, 0, 0, None))(q, k, v, seen, sinks)  # K, B

    return by_device(rows, q, k, v, seen, sinks, heads_over)[:, :, :, :length].astype(q.dtype)


def cudnn_attention(
    q: Float[Array, "B K G T N"],
    k: Float[Array, "B K T N"],
    v: Float[Array, "B K T N"],
    mask: Bool[Array, "B T T"],
    *,
    scale: float,
) -> Float[Array, "B K G T N"]:
    """Attention by cuDNN's flash kernel, in bfloat16 or float16 and without a soft-cap, which it lacks."""
    rows, kv_heads, groups, length, width = q.shape
    q = q.reshape(rows, kv_heads * groups, length, width)
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))  # B T heads N
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")
    return jnp.moveaxis(out, 2, 1).reshape(rows, kv_heads, groups, length, width)


def causal_mask(segment_ids: Int[Array, "B T"], window: int, branches: Branches | None = None) -> Bool[Array, "B T T"]:
    """A token sees itself and what is before it in its own segment, `window` tokens if that is not 0.

    With branches, that of its own continuation and of what all share.
    """
    near = sees(segment_ids, None if branches is None else branches.ids)
    places = jnp.arange(segment_ids.shape[1])[None] if branches is None else branches.positions
    return near & (places[:, :, None] - places[:, None, :] < window) if window else near


def make_attend(
    kind: str,
    segment_ids: Int[Array, "B T"],
    branches: Branches | None = None,
    *,
    window: int,
    scale: float,
    softcap: float,
    heads_over: str | None,
) -> Attend:
    """Causal attention within segments by `kind`: plain, blockwise, splash, splash_interpret (on CPU, slow) or cudnn.

    Rows of at most two blocks are plain. cuDNN has no float32, soft-caps, sinks or heads wider than 256; such a call
    is plain, too.
    """
    if kind.startswith("splash"):
        return functools.partial(
            splash_attention,
            segment_ids=segment_ids,
            branches=branches,
            window=window,
            scale=scale,
            softcap=softcap,
            heads_over=heads_over,
            interpret=kind == "splash_interpret",
        )
    mask = causal_mask(segment_ids, window, branches)
    if kind == "blockwise" and mask.shape[1] > 2 * SIZE:
        tiles = tiles_of(mask & (segment_ids > 0)[:, :, None])  # what padding sees is asked by nobody
        rows = functools.partial(blockwise_attention, softcap=softcap)
        return lambda q, k, v, sinks=None: by_device(rows, q * scale, k, v, tiles, sinks, heads_over)

    def attend(q: Array, k: Array, v: Array, sinks: Array | None = None) -> Array:
        if kind == "cudnn" and not softcap and sinks is None and q.dtype != jnp.float32 and q.shape[-1] <= 256:
            return cudnn_attention(q, k, v, mask, scale=scale)
        return attention(q, k, v, mask, sinks, scale=scale, softcap=softcap)

    return attend
