"""What a Hugging Face model family is: its names for our settings and for our tensors.

Axis letters as in `rlhf_jax.config.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlhf_jax.config import ArchConfig

ConfigJson = dict[str, Any]
"""config.json, or another JSON object beside it, as it was read: values are of any type until they are checked."""
Derived = Callable[[ConfigJson], object]
"""What a config.json makes of a setting that it leaves out."""
Only = dict[str, tuple[object, ...] | Callable[[ConfigJson], tuple[object, ...]]]
"""Keys of config.json -> the values that are supported, or a function of config.json that gives these."""


class Tensor(NamedTuple):
    """Which leaf a stored tensor is, or which parts of it one after the other, and its axes.

    "KGN D" is torch's Linear, "D KGN" Conv1D. In a part of the fused projection G stands for what the part has of S:
    G queries, one key or one value; in a part of the MLP's, M for one of gate and up.
    """

    leaf: str
    axes: str
    parts: tuple[str, ...] = ()


def without_mlp(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of layers that have experts in its place."""
    return {name: tensor for name, tensor in tensors.items() if not tensor.leaf.startswith("layers/mlp/")}


class Family(NamedTuple):
    """A model family of transformers, as tables.

    Attributes:
        model_type: its name in config.json.
        causal: architecture of a language model.
        classifier: architecture of a reward or value model.
        prefix: of the trunk's tensors; checkpoints of the bare trunk lack it.
        config: ArchConfig field -> key of config.json; fields that share a key are always equal.
        defaults: for absent or null keys: a value, or a function of config.json. Other keys are required.
        fixed: ArchConfig fields that no key sets: a value, or a function of config.json.
        saved: keys that say what `fixed` or `nope` read in another form: a value, or a function of the ArchConfig.
        inverse: ArchConfig fields whose key holds 1 / field.
        tensors: by stored name, {} being the layer, and a second one the expert.
        rotary: ArchConfig field -> (key beside rope_parameters, its default); a key of "" is never read. With
            rope_local_theta among them rope_parameters are by layer type. Empty where no key says anything.
        nope: layers without rotary positions: (config.json, layers with a window) -> layers.
        scalings: kinds of rotary scaling that transformers takes in this family.
        scaling_names: names of such kinds that mean something else in this family.
        unread_rope: keys of rope_parameters that say nothing of text.
        default_rope: rope_parameters of a config.json without any, by layer type where they are so.
        windows: layers with a sliding window: none, all of them, or as layer_types says.
        window_rule: which layers have the window if layer_types is absent: (config.json, layer) -> bool.
        window_switch: whether use_sliding_window turns windows on; in other families it says nothing.
        kinds: other values of layer_types, which `fixed` reads.
        activations: names of nonlinearities that mean something else in this family.
        aliases: other names of keys, which stand above them.
        plain: a config.json of any dialect as one in the keys of this table.
        only: keys of config.json whose other values the decoder cannot do.
        shared_names: names of tensors that are others where attention and MLP share a norm.
        packed: methods of quantization_config whose checkpoints are read, and made dense.
        renamed: names of tensors in memory, which PEFT keeps, that have another in files.
        whole: model_type of models beside whose text, which is of this family, are images or sound.
        ignored: pattern of stored tensors that are not weights.
    """

    model_type: str
    causal: str
    classifier: str
    prefix: str
    config: dict[str, str]
    defaults: dict[str, object | Derived]
    fixed: dict[str, object | Derived]
    tensors: dict[str, Tensor]
    saved: dict[str, object | Callable[[ArchConfig], object]] = {}  # noqa: RUF012
    inverse: tuple[str, ...] = ()
    rotary: dict[str, tuple[str, float | None]] = {"rope_theta": ("rope_theta", 1e4)}  # noqa: RUF012
    scalings: tuple[str, ...] = ("linear", "dynamic", "llama3", "yarn", "longrope")
    scaling_names: dict[str, str] = {}  # noqa: RUF012
    unread_rope: tuple[str, ...] = ()
    default_rope: ConfigJson = {}  # noqa: RUF012
    windows: Literal["none", "all", "types"] = "none"
    window_rule: Callable[[ConfigJson, int], bool] = lambda raw, layer: False
    window_switch: bool = False
    nope: Callable[[ConfigJson, Sequence[int]], tuple[int, ...]] = lambda raw, near: ()
    kinds: tuple[str, ...] = ()
    activations: dict[str, str] = {}  # noqa: RUF012
    aliases: dict[str, str] = {}  # noqa: RUF012
    plain: Callable[[ConfigJson], ConfigJson] = lambda raw: raw
    only: Only = {}  # noqa: RUF012
    shared_names: dict[str, str] = {}  # noqa: RUF012
    packed: tuple[str, ...] = ()
    renamed: dict[str, str] = {}  # noqa: RUF012
    whole: str | None = None
    ignored: str = r"rotary_emb\.inv_freq$"

    def of(self, arch: ArchConfig) -> Family:
        """The family with the names that tensors have in a model of this shape, without parts that no layer has."""
        names = self.shared_names if arch.shared_norm else {}
        absent = [r"layers/latent/q$" if arch.latent_query_width else r"layers/latent/q_"]  # the way that it lacks
        absent += ["layers/mlp/"] if arch.expert_layers == arch.num_layers and not arch.expert_width else []
        absent += [] if arch.layer_input_width else [r"layers/input/|embed/(by_layer|context)"]
        kept = {name: tensor for name, tensor in self.tensors.items() if not re.match("|".join(absent), tensor.leaf)}
        return self._replace(tensors={names.get(name, name): tensor for name, tensor in kept.items()})
