"""Rotary positions (Su et al. 2021, arXiv 2104.09864) and the ways to stretch them for longer texts."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.config import ArchConfig, RopeScaling
from rlhf_jax.errors import UserError


class Tables(NamedTuple):
    """What positions do to queries and keys.

    Attributes:
        cos: of the angles.
        sin: of the angles.
        gain: queries are multiplied by it after the rotation; None for 1.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    gain: Float[Array, "B T 1"] | None = None


BY_LENGTH = ("dynamic", "longrope")
"""Kinds of scaling whose frequencies depend on the length of a sequence."""


def rotary_tables(positions: Int[Array, "B T"], arch: ArchConfig, length: int = 0, *, local: bool = False) -> Tables:
    """Cosines and sines of positions * frequencies, float32, for layers with or without (`local`) the full view.

    With `query_log_scale` s the gain of queries is 1 + s log(1 + floor(position / the original length)) (Llama 4).

    `length` is the tokens of a whole sequence, prompt and response, by which dynamic and longrope choose their
    frequencies; 0 takes T. Layers with a theta of their own (`rope_local_theta`) are not stretched.
    """
    if local and arch.rope_local_theta:
        scaling, theta = RopeScaling(), arch.rope_local_theta
    else:
        scaling, theta = arch.rope_scaling, arch.rope_theta
    length = length or positions.shape[1]
    turning = arch.rotary_dim if local else arch.full_rotary_dim
    frequencies, gain = _frequencies(scaling, theta, turning, arch.max_positions, length)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
    scale = None
    if arch.query_log_scale:
        periods = (positions // scaling.original_max_positions).astype(jnp.float32)[..., None]
        scale = 1 + arch.query_log_scale * jnp.log1p(periods)
    return Tables(jnp.cos(angles) * gain, jnp.sin(angles) * gain, scale)


def rotate(x: Float[Array, "B K G T N"], tables: Tables, *, pairs: bool = False) -> Float[Array, "B K G T N"]:
    """Turn the first dimensions of each head; the rest passes. i turns with i + half, in `pairs` 2i with 2i + 1."""
    cos, sin = (t[:, None, None] for t in tables[:2])
    half = cos.shape[-1]
    whole, rest = jnp.split(x, [2 * half], axis=-1)
    a, b = (whole[..., ::2], whole[..., 1::2]) if pairs else jnp.split(whole, 2, axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = jnp.stack([a, b], axis=-1).reshape(whole.shape) if pairs else jnp.concatenate([a, b], axis=-1)
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _powers(theta: float, dim: int) -> np.ndarray:
    """theta^(2i/dim) in float32, as the models were trained with."""
    return np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


def check_law(arch: ArchConfig) -> None:
    """Raise a UserError, or whatever arithmetic does, unless the frequencies of short and long texts are numbers."""
    for length in (1, arch.max_positions) if arch.positions == "rotary" else ():
        with np.errstate(all="ignore"):
            law = arch.rope_scaling, arch.rope_theta, arch.full_rotary_dim, arch.max_positions
            frequencies, gain = _frequencies(*law, length)
        if not np.isfinite(frequencies).all() or not np.isfinite(gain):
            raise UserError(f"rope_theta {arch.rope_theta} and the rotary scaling give angles that are no numbers")


def _frequencies(
    scaling: RopeScaling, theta: float, dim: int, max_positions: int, length: int
) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, and the gain of cosines and sines."""
    plain, factor = 1 / _powers(theta, dim), scaling.factor
    if scaling.kind == "linear":
        return plain / np.float32(factor), 1.0
    if scaling.kind == "proportional":
        turns = np.arange(dim // 2) < int(scaling.fraction * dim // 2)
        return np.where(turns, plain / np.float32(factor), np.float32(0)), 1.0
    if scaling.kind == "llama3":
        return _llama3(scaling, plain), 1.0
    if scaling.kind == "yarn":
        return _yarn(scaling, theta, dim), _yarn_gain(scaling)
    if scaling.kind in ("dynamic", "ntk"):
        by_length = factor * max(length, max_positions) / max_positions - (factor - 1)
        stretch = by_length if scaling.kind == "dynamic" else factor
        return 1 / _powers(theta * stretch ** (dim / (dim - 2)), dim), 1.0
    if scaling.kind == "longrope":
        original = scaling.original_max_positions
        divisors = scaling.long_factor if length > original else scaling.short_factor
        gain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return 1 / (np.asarray(divisors, np.float32) * _powers(theta, dim)), scaling.attention_factor or gain
    return plain, 1.0


def _llama3(scaling: RopeScaling, plain: np.ndarray) -> np.ndarray:
    """Long waves divided by the factor, short ones kept, a linear blend between (Llama 3.1)."""
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions
    waves = length * plain / np.float32(2 * math.pi)  # within the original length
    blend = np.clip((waves - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - blend) * plain / np.float32(scaling.factor) + blend * plain


def _yarn(scaling: RopeScaling, theta: float, dim: int) -> np.ndarray:
    """Between two dimensions, found from how often they turn within the original length, a linear blend."""

    def dimension(turns: float) -> float:
        return dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    blend = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(span), 0, 1)
    plain = 1 / _powers(theta, dim)
    return plain / np.float32(scaling.factor) * (1 - blend) + plain * blend


def _yarn_scale(scaling: RopeScaling, weight: float) -> float:
    return 0.1 * weight * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0


def _yarn_gain(scaling: RopeScaling) -> float:
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _yarn_scale(scaling, scaling.mscale) / _yarn_scale(scaling, scaling.mscale_all_dim)
    return _yarn_scale(scaling, 1.0)


def latent_gain(scaling: RopeScaling) -> float:
    """By what latent attention multiplies its scores: what does not turn has none of yarn's gain."""
    return _yarn_scale(scaling, scaling.mscale_all_dim) ** 2
