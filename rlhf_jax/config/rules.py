"""Where parameters lie: the axes of every leaf by letter, and the mesh axes that each is split over; no jax here.

Letters: L layers, D width, V vocabulary, P positions, K key-value heads, G query heads for each of them, N head width,
S = G + 2 slots of the fused projection (queries, key, value), M = 2 (gate, up) or 1 if ungated, F MLP width,
E experts, H scalar heads of an ensemble. Of a gated DeltaNet: J key heads, I value heads for each of them, O width of
a value head, U = I O, C = U and two key widths, the channels of a key head, W tokens of the convolution. Of latent
attention: Z and X widths of the latents of keys and of queries, Y = Z and the shared key that turns, B width of a
value, A = B and the width of a key that does not turn. T width of what each layer is given of a token, which is D of
`embed/by_layer`, that it may lie as the embedding does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from rlhf_jax.errors import UserError

_T = TypeVar("_T")
MESH_AXES = ("data", "fsdp", "tensor")
EXPERT_AXES = ("data", "fsdp", "expert", "tensor")
"""Those of a mesh with an axis for experts."""

LEAVES = {
    "embed/tokens": "VD", "embed/positions": "PD",
    "embed/by_layer": "VLD", "embed/context": "DLT", "embed/context_norm/scale": "T",
    "layers/attn_norm/scale": "LD", "layers/attn_norm/bias": "LD",
    "layers/attn_post_norm/scale": "LD", "layers/attn_post_norm/bias": "LD",
    "layers/attn/qkv": "LDKSN", "layers/attn/qkv_bias": "LKSN", "layers/attn/out": "LKGND",
    "layers/attn/out_bias": "LD", "layers/attn/sinks": "LKG",
    "layers/attn/q_norm/scale": "LN", "layers/attn/k_norm/scale": "LN",
    "layers/latent/q": "LDKN", "layers/latent/q_down": "LDX", "layers/latent/q_down_bias": "LX",
    "layers/latent/q_norm/scale": "LX", "layers/latent/q_up": "LXKN", "layers/latent/kv_down": "LDY",
    "layers/latent/kv_down_bias": "LY", "layers/latent/kv_norm/scale": "LZ", "layers/latent/kv_up": "LZKA",
    "layers/latent/out": "LKBD", "layers/latent/out_bias": "LD",
    "layers/delta/qkv": "LDJC", "layers/delta/gate": "LDJU", "layers/delta/out": "LJUD",
    "layers/delta/beta": "LDJI", "layers/delta/decay": "LDJI", "layers/delta/log_rate": "LJI",
    "layers/delta/rate_bias": "LJI", "layers/delta/conv": "LJCW", "layers/delta/out_norm": "LO",
    "layers/mlp_norm/scale": "LD", "layers/mlp_norm/bias": "LD",
    "layers/mlp_post_norm/scale": "LD", "layers/mlp_post_norm/bias": "LD",
    "layers/mlp/up": "LDMF", "layers/mlp/up_bias": "LMF", "layers/mlp/down": "LFD", "layers/mlp/down_bias": "LD",
    "layers/input/gate": "LDT", "layers/input/out": "LTD", "layers/input/post_norm/scale": "LD",
    "layers/mlp_out_norm/scale": "LD", "layers/experts_norm/scale": "LD", "layers/experts_out_norm/scale": "LD",
    "layers/experts/router_norm/scale": "LD", "layers/experts/router_gain": "LE",
    "layers/experts/router": "LDE", "layers/experts/router_bias": "LE", "layers/experts/router_choice_bias": "LE",
    "layers/experts/up": "LEDMF", "layers/experts/up_bias": "LEMF",
    "layers/experts/down": "LEFD", "layers/experts/down_bias": "LED",
    "layers/shared/up": "LDMF", "layers/shared/down": "LFD",
    "final_norm/scale": "D", "final_norm/bias": "D", "head/kernel": "DV", "head/bias": "V",
    "score/kernel": "D", "score/bias": "", "layers/gain/scale": "L1",
}  # fmt: skip
"""Every parameter by its path, and its axes."""

_HOMES = {
    "layers/attn/": ("layers/full/", "layers/queries/", "layers/full_queries/"), "layers/mlp/": ("layers/wide/",)
}  # fmt: skip
_OF_KEYS = re.compile(r"/(sinks|k_norm/scale|qkv_lora/(key|value)/[ab])$")


def homes(leaf: str) -> list[str]:
    """The leaf, and the same in layers with heads of other sizes, with queries alone, or with a wider MLP."""
    others = [leaf.replace(part, other) for part, names in _HOMES.items() if part in leaf for other in names]
    return [leaf, *(home for home in others if "queries/" not in home or not _OF_KEYS.search(home))]


def with_homes(table: Mapping[str, _T]) -> dict[str, _T]:
    """A table by leaf with all of their `homes`."""
    return {home: value for leaf, value in table.items() for home in homes(leaf)} | dict(table)


LEAVES = with_homes(LEAVES)
WIDE_QK_NORM = with_homes({"layers/attn/q_norm/scale": "LKGN", "layers/attn/k_norm/scale": "LK1N"})
"""Axes that differ where all heads are normalised as one vector."""

MEMBERS = {"score/kernel": "HD", "score/bias": "H"}
"""Axes that differ where a reward model has several scalar heads."""

OTHER_AXES = WIDE_QK_NORM | MEMBERS

INPUTS = with_homes({
    "layers/attn/qkv": "D", "layers/attn/out": "KGN", "layers/mlp/up": "D", "layers/mlp/down": "F",
    "layers/input/gate": "D", "layers/input/out": "T",
    "layers/experts/up": "D", "layers/experts/down": "F", "layers/shared/up": "D", "layers/shared/down": "F",
    "layers/delta/qkv": "D", "layers/delta/gate": "D", "layers/delta/beta": "D", "layers/delta/decay": "D",
    "layers/delta/out": "JU",
    "layers/latent/q": "D", "layers/latent/q_down": "D", "layers/latent/q_up": "X", "layers/latent/kv_down": "D",
    "layers/latent/kv_up": "Z", "layers/latent/out": "KB",
})  # fmt: skip
"""The kernels of a layer, which can be quantised and have adapters, and the axes that they sum over."""

NOT_QUANTIZED = ("layers/delta/beta", "layers/delta/decay")
"""Kernels that stay as they are: small, and a state multiplies what they get wrong."""

FLOAT32 = ("score/kernel", "score/bias", "layers/experts/router_choice_bias")
"""Parameters of this type whatever `model.param_dtype` and files say, as transformers has them."""

MIXERS = ("attn", "delta", "full", "latent", "queries", "full_queries")
"""Parts of a layer of which each layer has one: "layers/attn/..." are stacked over the layers with attention alone."""

Split = tuple[str, ...]
"""The mesh axes that one axis of an array is split over; none is ()."""

SPLIT: dict[str, Split] = {"D": ("fsdp",), "V": ("tensor",), "K": ("tensor",), "J": ("tensor",), "F": ("tensor",)}
"""The default: D of matrices, and the others wherever they come; what is not named is whole on every device."""


@dataclass(frozen=True)
class Rules:
    """The table of a mesh.

    Attributes:
        letters: axis letter -> mesh axes.
        leaves: (pattern of the end of a path, mesh axes of every dimension), the first match before all letters.
    """

    letters: Mapping[str, Split] = field(default_factory=lambda: SPLIT, hash=False)
    leaves: tuple[tuple[str, tuple[Split, ...]], ...] = ()

    def of(self, path: str, shape: Sequence[int]) -> tuple[Split, ...]:
        """Mesh axes for every dimension of a parameter, or of what an optimiser keeps for it. Scalars are whole.

        Raises:
            UserError: there is no such leaf.
        """
        if not shape:
            return ()
        path = path.removesuffix("/qvalue")  # the numbers of a quantised kernel lie as it would
        for pattern, splits in self.leaves:
            if _ends_in(path, pattern) and len(splits) == len(shape):
                return splits
        axes = _beside_a_kernel(path)
        if len(axes) == len(shape):
            return self._of_letters(axes)
        if axes and len(axes) + 1 == len(shape):  # of each member of an ensemble
            return self._of_letters("H" + axes)
        leaf = next((name for name in LEAVES if _ends_in(path, re.escape(name))), None)
        if leaf is None:
            raise UserError(
                f"parameter {path} with shape {tuple(shape)} has no axes; name them in rlhf_jax.config.rules.LEAVES"
            )
        axes = LEAVES[leaf] if len(LEAVES[leaf]) == len(shape) else OTHER_AXES.get(leaf, "")
        if len(axes) != len(shape):
            raise UserError(
                f"parameter {path} with shape {tuple(shape)} should have the axes {' '.join(LEAVES[leaf])}"
            )
        if not set(axes) - set("LDEH"):  # norms, biases of the residual stream, routers, scalar heads: used whole
            return ((),) * len(axes)
        return self._of_letters(axes)

    def _of_letters(self, axes: str) -> tuple[Split, ...]:
        """Mesh axes by letter; what the experts E are split over no other dimension is."""
        taken = self.letters.get("E", ()) if "E" in axes else ()
        return tuple(tuple(axis for axis in self.letters.get(a, ()) if a == "E" or axis not in taken) for a in axes)


def _beside_a_kernel(path: str) -> str:
    """Letters of the scales of a quantised kernel, or of an adapter's a [L, inputs, R] and b [L, R, outputs].

    1 stands for axes that are never split, R for the adapter's rank. Empty for all other leaves.
    """
    match = re.search(r"(?:^|/)(layers/\w+/\w+?)(?:/(scale)|_lora/\w+/(a|b))$", path)
    if match is None or match[1] not in INPUTS:
        return ""
    kernel, scale, adapter = match.groups()
    inputs, first = INPUTS[kernel], stacked(kernel)
    outputs = LEAVES[kernel].removeprefix(first + inputs)
    if scale:
        return first + "1" * len(inputs) + outputs
    return f"{first}{inputs}R" if adapter == "a" else f"{first}R" + re.sub("[SM]", "1", outputs)


def stacked(kernel: str) -> str:
    """The axes before the inputs of a kernel: layers, and experts where it is one of many."""
    return LEAVES[kernel].partition(INPUTS[kernel])[0]


def _ends_in(path: str, pattern: str) -> bool:
    return re.search(rf"(^|/)(?:{pattern})$", path) is not None


def parse_rules(lines: Sequence[str], *, expert: bool = False) -> Rules:
    """The default table changed by lines LETTER=AXES or PATH=AXES, AXES, ...; `expert`: of a mesh with that axis.

    AXES is a mesh axis, several joined by +, or - for none. LETTER changes an axis wherever it comes, in activations
    too. PATH is a regular expression of the end of a parameter's path, and has AXES for every dimension of it:
    `V=fsdp+tensor`, `K=-`, `embed/tokens=-,fsdp`.

    Raises:
        UserError: a line that is none of these, or a path that no parameter has.
    """
    letters, leaves = dict(SPLIT), []
    if expert:
        letters["E"] = ("expert",)
    for line in lines:
        name, equals, right = (part.strip() for part in line.partition("="))
        if not (name and equals):
            raise UserError(
                f"mesh.rules {line!r} is no rule; write LETTER=AXES or PATH=AXES,AXES: K=- or embed/tokens=-,fsdp"
            )
        splits = tuple(_split(text, line, EXPERT_AXES if expert else MESH_AXES) for text in right.split(","))
        used = [axis for split in splits for axis in split]
        if len(used) != len(set(used)):
            raise UserError(f"mesh.rules {line!r} uses a mesh axis twice; an array is split over each once at most")
        if len(name) == 1:
            if name not in set("".join(LEAVES.values())) or len(splits) != 1:
                known = " ".join(sorted(set("".join(LEAVES.values()))))
                raise UserError(
                    f"mesh.rules {line!r} gives no axes to one letter of {known}; write for example D=fsdp"
                )
            letters[name] = splits[0]
        else:
            _check_path(name, len(splits), line)
            leaves.append((name, splits))
    return Rules(letters, tuple(leaves))


def _split(text: str, line: str, known: Split) -> Split:
    axes = tuple(part.strip() for part in text.split("+"))
    if axes == ("-",):
        return ()
    if unknown := [axis for axis in axes if axis not in known]:
        raise UserError(f"mesh.rules {line!r}: {unknown[0]!r} is no mesh axis; use {', '.join(known)} or -")
    return axes


def _check_path(pattern: str, count: int, line: str) -> None:
    try:
        names = [name for name in LEAVES if _ends_in(name, pattern)]
    except re.error as error:
        raise UserError(f"mesh.rules {line!r}: {pattern!r} is no regular expression ({error}); correct it") from error
    if not names:
        raise UserError(f"mesh.rules {line!r} matches no parameter; `rlhf-jax inspect MODEL --mesh.fsdp 2` lists them")
    for name in names:
        if count not in {len(axes) for axes in (LEAVES[name], OTHER_AXES.get(name, LEAVES[name]))}:
            raise UserError(
                f"mesh.rules {line!r} gives axes to {count} dimensions, but {name} has {len(LEAVES[name])}: "
                f"{' '.join(LEAVES[name])}; write one for each, - for none"
            )


def entry(split: Split) -> str | Split | None:
    """A mesh axis, a tuple of several, or None: as PartitionSpec takes it."""
    return split[0] if len(split) == 1 else split or None


def kept_split(split: Split) -> str | None:
    """What of a weight's split is kept where it is used whole: the tensor axis, or that of the experts."""
    return over_tensor(split) or ("expert" if "expert" in split else None)


def over_tensor(split: Split) -> str | None:
    """The tensor axis if it is among the mesh axes: activations leave the others to rows."""
    return "tensor" if "tensor" in split else None
