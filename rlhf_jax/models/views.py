"""What layers of each kind are given to read a text: rotary tables, and attention or the path of a state."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Int

from rlhf_jax.config import ArchConfig
from rlhf_jax.models.attention import Attend, Branches, make_attend
from rlhf_jax.models.delta import Path
from rlhf_jax.models.rotary import Tables, latent_gain, rotary_tables


class Kind(NamedTuple):
    """Of a layer: what mixes tokens, whether it has the window (`local`) or the full view, whether queries turn."""

    mixer: str
    local: bool
    turned: bool


def kinds_of(arch: ArchConfig) -> list[Kind]:
    """The kind of every layer."""
    near, still = arch.window_layers, arch.nope_layers
    return [Kind(mixer, i in near, i not in still) for i, mixer in enumerate(arch.mixers)]


def tables_of(arch: ArchConfig, length: int, positions: Int[Array, "B T"], kind: Kind) -> Tables | None:
    """Of queries and keys in layers of this kind, in a run whose longest sequence has `length` tokens."""
    if arch.positions != "rotary" or not kind.turned:
        return None
    return rotary_tables(positions, arch, length, local=kind.local)


def scale_of(arch: ArchConfig, kind: Kind) -> float:
    """Of attention scores."""
    gain = latent_gain(arch.rope_scaling) if kind.mixer == "latent" else 1.0
    width = arch.query_pre_attn_scalar or arch.heads_of(kind.mixer)[1]
    return arch.attention_multiplier or gain * width**-0.5


def views_of(
    arch: ArchConfig,
    attention: str,
    length: int,
    heads_over: str | None,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    branches: Int[Array, "B T"] | None = None,
) -> dict[Kind, tuple[Tables | None, Attend | Path]]:
    """By kind, for all of a text at once: `attention` is the program, whose heads lie over a mesh axis."""
    kept_apart = None if branches is None else Branches(branches, positions)

    def view(kind: Kind) -> tuple[Tables | None, Attend | Path]:
        if kind.mixer == "delta":
            return None, Path.of(segment_ids, branches)
        attend = make_attend(
            attention,
            segment_ids,
            kept_apart,
            window=arch.sliding_window if kind.local else 0,
            scale=scale_of(arch, kind),
            softcap=arch.attn_softcap,
            heads_over=heads_over,
        )
        return tables_of(arch, length, positions, kind), attend

    return {kind: view(kind) for kind in sorted(set(kinds_of(arch)))}
