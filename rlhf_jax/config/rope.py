"""How rotary frequencies are stretched beyond the length that they were trained for."""

from __future__ import annotations

from typing import Literal

from rlhf_jax.config.checks import check, fits
from rlhf_jax.config.settings import settings
from rlhf_jax.errors import UserError


@settings
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that they were trained for.

    Args:
        kind: none; linear (Chen et al. 2023, arXiv 2306.15595); dynamic (NTK, by the length of a whole sequence); ntk
            (the base grows by factor^(d / (d - 2)) for d turning dimensions, at any length); llama3; yarn (Peng et al.
            2023, arXiv 2309.00071); longrope (Ding et al. 2024, arXiv 2402.13753); proportional (Gemma 4: only the
            fastest frequencies of the whole head turn).
        factor: how many times longer.
        original_max_positions: the length that the frequencies were trained for (llama3, yarn, longrope).
        low_freq_factor: llama3: waves longer than the original length over this are stretched.
        high_freq_factor: llama3: waves shorter than the original length over this are left alone.
        beta_fast: yarn: dimensions that turn more often than this within the original length are left alone.
        beta_slow: yarn: dimensions that turn less often than this are stretched.
        truncate: yarn: round the two dimensions to whole ones.
        attention_factor: yarn, longrope: cosines and sines times this; 0 computes the paper's.
        mscale: yarn: numerator of the computed attention factor; 0 leaves it out.
        mscale_all_dim: yarn: its denominator.
        short_factor: longrope: a divisor for every frequency, up to the original length.
        long_factor: longrope: the same, beyond it.
        fraction: proportional: the part of the frequencies that turn; the others stand still.
    """

    kind: Literal["none", "linear", "dynamic", "ntk", "llama3", "yarn", "longrope", "proportional"] = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    fraction: float = 1.0

    def __post_init__(self) -> None:
        where = "model.arch.rope_scaling."
        rules = {
            "above 0": "factor low_freq_factor high_freq_factor beta_fast beta_slow",
            "at least 0": "original_max_positions attention_factor mscale mscale_all_dim fraction",
        }
        check(self, where, rules)
        if self.fraction > 1:
            raise UserError(f"{where}fraction {self.fraction:g} is more than all frequencies; make it at most 1")
        if any(not (number > 0 and fits(number)) for number in (*self.short_factor, *self.long_factor)):
            raise UserError(f"{where}short_factor and long_factor are not all above 0; correct them")
        if self.kind == "none" and self.factor != 1:
            raise UserError(f"{where}factor {self.factor:g} does nothing with kind none; give the kind")
        if self.kind in ("llama3", "yarn", "longrope") and self.original_max_positions < 1:
            raise UserError(f"{where}original_max_positions {self.original_max_positions} must be at least 1")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"{where}high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )
