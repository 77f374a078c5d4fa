"""How the tensors of a family lie in our leaves."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from rlhf_jax.config import ArchConfig
from rlhf_jax.config.rules import INPUTS, LEAVES, MEMBERS, MIXERS, WIDE_QK_NORM, homes, with_homes
from rlhf_jax.models.hf.family import Tensor
from rlhf_jax.types import Params

Leaves = dict[str, jax.Array | np.ndarray]
"""Parameters by their paths, names with slashes between."""


def is_transposed(tensor: Tensor) -> bool:
    """Whether a stored matrix is that of Conv1D, [inputs, outputs]."""
    return tensor.axes.split()[0] == INPUTS.get(tensor.leaf)


class Layout:
    """Axes and sizes of every leaf of a shape; with `rank` and their `axes`, of adapters too.

    `members` is the number of scalar heads of an ensemble; 0 is a single one, without an axis for it.
    """

    def __init__(self, arch: ArchConfig, *, members: int = 0, rank: int = 0, axes: Mapping[str, str] | None = None):
        self.mixers, self.keys_as_values = arch.mixers, arch.full_keys_as_values
        key, value = arch.delta_key_dim, arch.delta_value_dim
        values = arch.delta_value_heads // (arch.delta_key_heads or 1) * value
        self.axes = LEAVES | (WIDE_QK_NORM if arch.qk_norm == "all" else {}) | (MEMBERS if members else {})
        self.axes |= axes or {}
        self.sizes = {
            "L": arch.num_layers, "D": arch.width, "V": arch.vocab_size, "P": arch.position_rows, "1": 1,
            "M": 2 if arch.gated_mlp else 1, "F": arch.ffn_width, "E": arch.num_experts, "R": rank, "H": members,
            **_heads(arch, "attn"), "T": arch.layer_input_width,
            "X": arch.latent_query_width, "Z": arch.latent_width, "B": arch.latent_value_dim,
            "Y": arch.latent_width + arch.latent_rope_dim,
            "A": arch.head_dim - arch.latent_rope_dim + arch.latent_value_dim,
            "J": arch.delta_key_heads, "I": arch.delta_value_heads // (arch.delta_key_heads or 1), "O": value,
            "U": values, "C": 2 * key + values, "W": arch.delta_kernel,
        }  # fmt: skip
        dense = arch.num_layers - arch.expert_layers
        self._some: dict[str, tuple[range, int]] = {} if not arch.num_experts else {  # layers, and F
            "layers/mlp/": (range(dense), arch.dense_width),
            "layers/experts/": (range(dense, arch.num_layers), arch.expert_width or arch.ffn_width),
            "layers/shared/": (range(dense, arch.num_layers), arch.shared_width),
        }  # fmt: skip
        wide = arch.shared_kv_layers if arch.shared_kv_ffn_width else 0
        self._some["layers/wide/"] = range(arch.num_layers - wide, arch.num_layers), arch.shared_kv_ffn_width
        if wide or arch.expert_width:
            self._some["layers/mlp/"] = range(arch.num_layers - wide), arch.ffn_width
        self._of_part: dict[str, dict[str, int]] = {mixer: _heads(arch, mixer) for mixer in set(arch.mixers)}
        self._of_part |= {"by_layer": {"D": arch.layer_input_width}}
        self._parts = {  # the axis to cut, where, and what stands for it in the stored axes
            "gate": ("M", 0, 1, "M"), "up": ("M", 1, 1, "M"),
            "delta_query": ("C", 0, key, "C"), "delta_key": ("C", key, key, "C"),
            "delta_value": ("C", 2 * key, values, "C"),
        }  # fmt: skip

    def layers(self, leaf: str) -> Sequence[int]:
        """The layers that have a leaf, whose axis L they are."""
        if (part := leaf.split("/")[1:2]) and part[0] in MIXERS:
            return [i for i, mixer in enumerate(self.mixers) if mixer == part[0]]
        return next((layers for part, (layers, _) in self._some.items() if leaf.startswith(part)),
                    range(self.sizes["L"]))  # fmt: skip

    def sizes_of(self, leaf: str) -> dict[str, int]:
        """Sizes by letter in a leaf."""
        width = next((width for part, (_, width) in self._some.items() if leaf.startswith(part)), self.sizes["F"])
        part = self._of_part.get(leaf.partition("/")[2].partition("/")[0], {})
        return self.sizes | part | {"L": len(self.layers(leaf)), "F": width}

    def homes(self, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor, and what the same name is in layers with heads of other sizes, or with queries alone."""
        for leaf in homes(tensor.leaf):
            parts = tensor.parts
            if self.keys_as_values and leaf.startswith("layers/full/"):
                if "value" in parts or "_lora/value/" in leaf:
                    continue
                leaf = leaf.replace("_lora/key/", "_lora/key_value/")
                parts = tuple("key_value" if part == "key" else part for part in parts)
            if "queries/" not in leaf or not {"key", "value"} & set(parts):
                yield tensor._replace(leaf=leaf, parts=parts)

    def unused(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Names of keys and values in layers that have queries alone, which files may hold all the same."""
        queries = lambda tensor: any("queries/" in home.leaf for home in self.homes(tensor))  # noqa: E731
        keys = [name for name, one in tensors.items() if one.leaf.startswith("layers/attn/") and not queries(one)]
        return {name.format(i) for name in keys for i, mixer in enumerate(self.mixers) if mixer.endswith("queries")}

    def pieces(self, tensor: Tensor) -> Iterator[tuple[dict[str, int], int, str, str]]:
        """For every part: sizes of the stored axes, where it starts on the leaf's cut axis, that axis, its letter."""
        sizes = self.sizes_of(tensor.leaf)
        queries = sizes["Q"]
        slots = {"query": (0, queries), "key": (queries, 1), "value": (queries + 1, 1), "key_value": (queries, 1)}
        for part in tensor.parts:
            cut, start, count, letter = ("S", *slots[part], "G") if part in slots else self._parts[part]
            yield sizes | {letter: count}, start, cut, letter
        if not tensor.parts:
            yield sizes, 0, "", ""

    def stored_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Shape in the file: parts follow one another in the dimension of their own letter."""
        shapes = [[math.prod(sizes[a] for a in dim) for dim in tensor.axes.split()]
                  for sizes, *_ in self.pieces(tensor)]  # fmt: skip
        along = self.along(tensor)
        return tuple(sum(sizes) if i == along else sizes[0] for i, sizes in enumerate(zip(*shapes, strict=True)))

    def along(self, tensor: Tensor) -> int:
        """The stored dimension in which parts follow one another."""
        letters = {letter for *_, letter in self.pieces(tensor)} - {""}
        return next((i for i, dim in enumerate(tensor.axes.split()) if letters & set(dim)), 0)

    def single(self, tensor: Tensor) -> bool:
        """Whether a tensor is of one expert, of which a leaf holds all."""
        return "E" in self.axes[tensor.leaf] and "E" not in tensor.axes

    def views(self, tensor: Tensor, stored: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[slice, ...]]]:
        """Every part of a stored array, with the axes of one layer's leaf, and where in that leaf it lies.

        Of a `single` expert the leaf is its part of it. Parts are views, which loading reads and saving fills.
        """
        axes, offset, along = self.axes[tensor.leaf].removeprefix("L"), 0, self.along(tensor)
        axes = axes.removeprefix("E") if self.single(tensor) else axes
        for sizes, start, cut, letter in self.pieces(tensor):
            # The part's rows (or columns) of the file, every dimension as its axes: "KGN D" as [K, G, N, D].
            dims = [[sizes[a] for a in dim] for dim in tensor.axes.split()]
            count = math.prod(dims[along]) if dims else 1
            piece = stored[(slice(None),) * along + (slice(offset, offset + count),)]
            offset += count
            piece = piece.reshape(list(itertools.chain(*dims)))
            # Then the axes in the leaf's order: [D, K, G, N].
            letters = tensor.axes.replace(" ", "")
            order = [letters.index(letter if a == cut else a) for a in axes]
            extra = tuple(i for i in range(len(letters)) if i not in order)  # the 1 of a score head
            piece = piece.transpose([*order, *extra]).reshape([piece.shape[i] for i in order])
            starts = [start if a == cut else 0 for a in axes]
            yield piece, tuple(slice(first, first + size) for first, size in zip(starts, piece.shape, strict=True))


def _heads(arch: ArchConfig, mixer: str) -> dict[str, int]:
    """Sizes in attention of this kind."""
    kv_heads, width = arch.heads_of(mixer)
    group = arch.num_heads // kv_heads
    queries = 2 * group if arch.attn_gate else group
    others = 0 if mixer.endswith("queries") else 2 - (mixer == "full" and arch.full_keys_as_values)
    return {"K": kv_heads, "G": group, "Q": queries, "S": queries + others, "N": width}


def leaf_shapes(arch: ArchConfig, *, score_head: bool | None, members: int = 0) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of the parameter tree by its path: with a score head, a vocabulary head (False) or none."""
    layout, biased, sparse = Layout(arch, members=members), arch.norm == "layer", arch.num_experts > 0
    beside, shared = arch.expert_width > 0, sparse and arch.shared_width > 0
    dense = arch.expert_layers < arch.num_layers or beside
    queries, inputs = arch.latent_query_width > 0, arch.layer_input_width > 0
    wide = arch.shared_kv_ffn_width > 0
    pre, post = arch.norm_position in ("pre", "both"), arch.norm_position in ("post", "both")
    optional = {
        "embed/positions": arch.positions == "learned", "final_norm/bias": biased,
        "layers/attn_norm/scale": pre, "layers/mlp_norm/scale": pre and not arch.shared_norm,
        "layers/attn_norm/bias": pre and biased, "layers/mlp_norm/bias": pre and biased and not arch.shared_norm,
        "layers/attn_post_norm/scale": post, "layers/mlp_post_norm/scale": post,
        "layers/attn_post_norm/bias": post and biased, "layers/mlp_post_norm/bias": post and biased,
        "layers/attn/q_norm/scale": arch.qk_norm != "none", "layers/attn/k_norm/scale": arch.qk_norm != "none",
        "layers/attn/qkv_bias": arch.qkv_bias, "layers/attn/out_bias": arch.out_bias,
        "layers/mlp/up": dense, "layers/mlp/up_bias": dense and arch.mlp_bias,
        "layers/mlp/down": dense, "layers/mlp/down_bias": dense and arch.mlp_bias,
        "layers/wide/up": wide, "layers/wide/down": wide, "embed/by_layer": inputs, "embed/context": inputs,
        "embed/context_norm/scale": inputs,
        **dict.fromkeys(("layers/input/gate", "layers/input/out", "layers/input/post_norm/scale"), inputs),
        "layers/experts/router": sparse, "layers/experts/router_choice_bias": sparse and arch.router == "sigmoid",
        **dict.fromkeys(("layers/mlp_out_norm/scale", "layers/experts_norm/scale"), beside),
        "layers/experts_out_norm/scale": beside, "layers/experts/router_norm/scale": arch.router_scaled,
        "layers/experts/router_gain": arch.router_scaled,
        "layers/experts/router_bias": sparse and arch.router_bias,
        "layers/experts/up": sparse, "layers/experts/up_bias": sparse and arch.mlp_bias,
        "layers/experts/down": sparse, "layers/experts/down_bias": sparse and arch.mlp_bias,
        **dict.fromkeys(("layers/latent/q_down", "layers/latent/q_up", "layers/latent/q_norm/scale"), queries),
        "layers/latent/q": not queries, "layers/latent/q_down_bias": queries and arch.qkv_bias,
        "layers/latent/kv_down_bias": arch.qkv_bias, "layers/latent/out_bias": arch.out_bias,
        "layers/attn/sinks": arch.attn_sinks, "layers/gain/scale": arch.layer_gain,
        "layers/shared/up": shared, "layers/shared/down": shared,
        "head/kernel": score_head is False and not arch.tied_head, "head/bias": score_head is False and arch.head_bias,
        "score/kernel": score_head is True, "score/bias": score_head is True,
    }  # fmt: skip
    optional = with_homes(optional)
    chosen = {leaf: axes for leaf, axes in layout.axes.items() if optional.get(leaf, True) and layout.layers(leaf)}
    return {leaf: tuple(layout.sizes_of(leaf)[a] for a in axes) for leaf, axes in chosen.items()}


def nested(leaves: Mapping[str, object]) -> Params:
    """Leaves by their paths, names with slashes between, as a nested dict."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree


def flattened(tree: Params, prefix: str = "") -> Leaves:
    """The leaves of a nested dict by their paths."""
    flat: Leaves = {}
    for key, node in tree.items():
        flat |= flattened(node, f"{prefix}{key}/") if isinstance(node, Mapping) else {f"{prefix}{key}": node}
    return flat
