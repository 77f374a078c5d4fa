"""Hugging Face directories: config.json and safetensors in and out, driven by one table per model family.

Axis letters: L layers, D width, V vocabulary, P positions, K key-value heads, G query heads for each of them, N head
width, S = G + 2 slots of the fused projection (queries, key, value), M = 2 (gate, up) or 1 if ungated, F MLP width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.config import ArchConfig
from rlhf_jax.errors import UserError

AXES = {
    "embed/tokens": "VD", "embed/positions": "PD", "layers/attn_norm/scale": "LD", "layers/attn_norm/bias": "LD",
    "layers/attn/qkv": "LDKSN", "layers/attn/qkv_bias": "LKSN", "layers/attn/out": "LKGND",
    "layers/attn/out_bias": "LD", "layers/mlp_norm/scale": "LD", "layers/mlp_norm/bias": "LD",
    "layers/mlp/up": "LDMF", "layers/mlp/up_bias": "LMF", "layers/mlp/down": "LFD", "layers/mlp/down_bias": "LD",
    "final_norm/scale": "D", "final_norm/bias": "D", "head/kernel": "DV", "score/kernel": "D", "score/bias": "",
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
_ACTIVATION_NAMES = {v: k for k, v in ACTIVATIONS.items()} | {"swish": "silu", "gelu_new": "gelu_tanh"}
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_STALE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")  # weights we supersede


class Tensor(NamedTuple):
    """Which leaf, or part of it, a stored tensor is, and its axes: "KGN D" is torch's Linear, "D KGN" Conv1D."""

    leaf: str
    axes: str
    part: str = "all"


class Family(NamedTuple):
    """A model family of transformers, as tables."""

    model_type: str
    causal: str  # architecture of a language model
    classifier: str  # architecture of a reward or value model
    config: Mapping[str, str]  # ArchConfig field -> key of config.json; fields that share a key are always equal
    defaults: Mapping[str, Any]  # for absent or null keys: a value, or a function of config.json; others are required
    fixed: Mapping[str, Any]  # ArchConfig fields that are the same in all the family
    tensors: Mapping[str, Tensor]  # by stored name, {} being the layer
    ignored: str  # pattern of stored tensors that are not weights


LLAMA = Family(
    model_type="llama",
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    config={
        "vocab_size": "vocab_size", "width": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
        "ffn_width": "intermediate_size", "max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta", "activation": "hidden_act", "qkv_bias": "attention_bias",
        "out_bias": "attention_bias", "mlp_bias": "mlp_bias", "tied_head": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    defaults={
        "num_key_value_heads": lambda raw: raw["num_attention_heads"],
        "head_dim": lambda raw: raw["hidden_size"] // raw["num_attention_heads"],
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "initializer_range": 0.02,
    },
    fixed={"norm": "rms", "positions": "rotary", "gated_mlp": True},
    tensors={
        "model.embed_tokens.weight": Tensor("embed/tokens", "V D"),
        "model.layers.{}.input_layernorm.weight": Tensor("layers/attn_norm/scale", "D"),
        "model.layers.{}.self_attn.q_proj.weight": Tensor("layers/attn/qkv", "KGN D", "query"),
        "model.layers.{}.self_attn.k_proj.weight": Tensor("layers/attn/qkv", "KN D", "key"),
        "model.layers.{}.self_attn.v_proj.weight": Tensor("layers/attn/qkv", "KN D", "value"),
        "model.layers.{}.self_attn.q_proj.bias": Tensor("layers/attn/qkv_bias", "KGN", "query"),
        "model.layers.{}.self_attn.k_proj.bias": Tensor("layers/attn/qkv_bias", "KN", "key"),
        "model.layers.{}.self_attn.v_proj.bias": Tensor("layers/attn/qkv_bias", "KN", "value"),
        "model.layers.{}.self_attn.o_proj.weight": Tensor("layers/attn/out", "D KGN"),
        "model.layers.{}.self_attn.o_proj.bias": Tensor("layers/attn/out_bias", "D"),
        "model.layers.{}.post_attention_layernorm.weight": Tensor("layers/mlp_norm/scale", "D"),
        "model.layers.{}.mlp.gate_proj.weight": Tensor("layers/mlp/up", "F D", "gate"),
        "model.layers.{}.mlp.up_proj.weight": Tensor("layers/mlp/up", "F D", "up"),
        "model.layers.{}.mlp.gate_proj.bias": Tensor("layers/mlp/up_bias", "F", "gate"),
        "model.layers.{}.mlp.up_proj.bias": Tensor("layers/mlp/up_bias", "F", "up"),
        "model.layers.{}.mlp.down_proj.weight": Tensor("layers/mlp/down", "D F"),
        "model.layers.{}.mlp.down_proj.bias": Tensor("layers/mlp/down_bias", "D"),
        "model.norm.weight": Tensor("final_norm/scale", "D"),
        "lm_head.weight": Tensor("head/kernel", "V D"),
        "score.weight": Tensor("score/kernel", "1 D"),
        "score.bias": Tensor("score/bias", "1"),
    },
    ignored=r"rotary_emb\.inv_freq$",
)  # fmt: skip
FAMILIES = {family.model_type: family for family in (LLAMA,)}
_Sizes = dict[str, int]  # axis letter -> size
_Wanted = dict[str, tuple[Tensor, int]]  # stored name -> tensor, layer


def read_config(path: str | os.PathLike[str]) -> tuple[ArchConfig, dict[str, Any]]:
    """The shape of the model in a Hugging Face directory, and its config.json.

    Raises:
        UserError: no such directory or config, an unknown family, a feature that the decoder lacks, or .bin weights.
    """
    folder = Path(path)
    where = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"no directory {folder}; for a model of the Hub, first run `hf download`")
    if not where.is_file():
        raise UserError(f"{folder} has no config.json; give a directory that `save_pretrained` or rlhf-jax wrote")
    raw = _read_json(where)
    family = _family_of(raw, where)
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        convert = f"import transformers as t; t.{family.causal}.from_pretrained('{path}').save_pretrained('{path}')"
        raise UserError(f'{folder} has .bin weights only; where torch is installed, run python -c "{convert}"')
    _refuse_unsupported(raw, where)
    fields = {field: _config_value(field, key, family, raw, where) for field, key in family.config.items()}
    return ArchConfig(**family.fixed, **fields), raw


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{file} holds no JSON object ({error}); download or save it again") from error


def _family_of(raw: Mapping[str, Any], where: Path) -> Family:
    family = FAMILIES.get(raw.get("model_type") or "")
    if family is None:
        name, supported = raw.get("model_type"), ", ".join(FAMILIES)
        raise UserError(f"{where}: no support for model_type {name!r}; use one of: {supported}")
    found = raw.get("architectures") or [family.causal]
    if not {family.causal, family.classifier} & set(found):
        supported = f"{family.causal}, {family.classifier}"
        raise UserError(f"{where}: no support for architecture {found[0]!r}; use one of: {supported}")
    return family


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary positions: transformers 5 has rope_parameters, 4 rope_scaling and rope_theta."""
    top = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if raw.get(key) is not None}
    return top | (raw.get("rope_scaling") or raw.get("rope_parameters") or {})


def _refuse_unsupported(raw: Mapping[str, Any], where: Path) -> None:
    rope, window = _rope(raw), raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    scaling, rotated = rope.get("rope_type", rope.get("type", "default")), rope.get("partial_rotary_factor")
    reasons = {
        f"rope scaling {scaling!r}": scaling != "default",
        "rope scaling by layer type": any(isinstance(value, dict) for value in rope.values()),
        f"partial_rotary_factor {rotated}": rotated not in (None, 1),
        f"sliding_window {window}": window is not None,
        "a mix of layer_types": bool(set(raw.get("layer_types") or []) - {"full_attention"}),
        "quantization_config": raw.get("quantization_config") is not None,
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise UserError(f"{where}: no support for {reason}; choose a checkpoint without it")


def _config_value(field: str, key: str, family: Family, raw: Mapping[str, Any], where: Path) -> Any:
    value = _rope(raw).get(key) if field == "rope_theta" else raw.get(key)
    if value is None and key not in family.defaults:
        raise UserError(f"{where} lacks {key!r}; download or save it again")
    if value is None:
        value = family.defaults[key]
        value = value(raw) if callable(value) else value
    kind = type(getattr(ArchConfig(), field))
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
        raise UserError(f"{where}: {key} is {value!r}, which is no {kind.__name__}; correct it")
    if field == "activation" and value not in _ACTIVATION_NAMES:
        raise UserError(f"{where}: no support for {key} {value!r}; use one of: {', '.join(_ACTIVATION_NAMES)}")
    return _ACTIVATION_NAMES[str(value)] if field == "activation" else value


def leaf_shapes(arch: ArchConfig, *, score_head: bool) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of the parameter tree by its path; a model with a score head has no vocabulary head."""
    sizes, biased = _sizes(arch), arch.norm == "layer"
    optional = {
        "embed/positions": arch.positions == "learned",
        "layers/attn_norm/bias": biased, "layers/mlp_norm/bias": biased, "final_norm/bias": biased,
        "layers/attn/qkv_bias": arch.qkv_bias, "layers/attn/out_bias": arch.out_bias,
        "layers/mlp/up_bias": arch.mlp_bias, "layers/mlp/down_bias": arch.mlp_bias,
        "head/kernel": not (arch.tied_head or score_head), "score/kernel": score_head, "score/bias": score_head,
    }  # fmt: skip
    return {leaf: tuple(sizes[a] for a in axes) for leaf, axes in AXES.items() if optional.get(leaf, True)}


def _sizes(arch: ArchConfig) -> _Sizes:
    group = arch.num_heads // arch.num_kv_heads
    return {
        "L": arch.num_layers, "D": arch.width, "V": arch.vocab_size, "P": arch.max_positions, "K": arch.num_kv_heads,
        "G": group, "S": group + 2, "N": arch.head_dim, "M": 2 if arch.gated_mlp else 1, "F": arch.ffn_width, "1": 1,
    }  # fmt: skip


def _view(leaf: np.ndarray, tensor: Tensor, layer: int, sizes: _Sizes) -> np.ndarray:
    """The part of a leaf that a stored tensor is, axes in its order: a view, which loading fills and saving reads."""
    axes = AXES[tensor.leaf]
    if axes.startswith("L"):
        leaf, axes = leaf[layer], axes[1:]
    parts: dict[str, tuple[str, int | slice, str]] = {  # the axis to cut, where, and the axis that is left of it
        "query": ("S", slice(sizes["G"]), "G"), "key": ("S", sizes["G"], ""), "value": ("S", sizes["G"] + 1, ""),
        "gate": ("M", 0, ""), "up": ("M", 1, ""),
    }  # fmt: skip
    if tensor.part != "all":
        axis, index, rest = parts[tensor.part]
        leaf = leaf[(slice(None),) * axes.index(axis) + (index,)]
        axes = axes.replace(axis, rest)
    return leaf[...].transpose([axes.index(a) for a in tensor.axes if a in axes])


def _stored_shape(tensor: Tensor, sizes: _Sizes) -> tuple[int, ...]:
    return tuple(math.prod(sizes[a] for a in dimension) for dimension in tensor.axes.split())


def _names(family: Family, arch: ArchConfig, leaves: Iterable[str]) -> _Wanted:
    """Stored name -> (tensor, layer) of all that these leaves consist of."""
    chosen = {name: tensor for name, tensor in family.tensors.items() if tensor.leaf in leaves}
    layers = {name: range(arch.num_layers if "{}" in name else 1) for name in chosen}
    return {name.format(layer): (chosen[name], layer) for name in chosen for layer in layers[name]}


class _Stored(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no complete safetensors file ({error}); download or save it again") from error


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """What the safetensors files of a directory hold, from their headers."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not files[0].is_file() and index.is_file():
        files = [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    found: dict[str, _Stored] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; download or save the model again")
        with _opened(file) as handle:
            headers = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            found |= {name: _Stored(file, tuple(h.get_shape()), h.get_dtype()) for name, h in headers.items()}
    return found


def has_score_head(path: str | os.PathLike[str]) -> bool:
    """Whether a Hugging Face directory holds the trained scalar head of a reward or value model."""
    return "score.weight" in _stored_tensors(Path(path))


def load_params(path: str | os.PathLike[str], arch: ArchConfig, *, score_head: bool) -> dict[str, Any]:
    """The weights of a Hugging Face directory, whose shape `read_config` gives, as our tree of float32 numpy arrays.

    With `score_head` they have the scalar head of a reward or value model and no vocabulary head, else the reverse.

    Raises:
        UserError: tensors are missing, unknown, misshapen, quantized or cut short, or there is no trained score head.
    """
    folder, sizes = Path(path), _sizes(arch)
    family = _family_of(_read_json(folder / "config.json"), folder / "config.json")
    stored = _stored_tensors(folder)
    head = next(name for name, tensor in family.tensors.items() if tensor.leaf == "head/kernel")
    full = dataclasses.replace(arch, tied_head=arch.tied_head and head not in stored)
    shapes = leaf_shapes(full, score_head=score_head)
    wanted = _names(family, arch, shapes)
    _check_stored(folder, family, stored, wanted, sizes)
    leaves = {leaf: np.zeros(shape, np.float32) for leaf, shape in shapes.items()}
    for file in {entry.file for entry in stored.values()}:
        with _opened(file) as handle:
            for name in (name for name in wanted if name in stored and stored[name].file == file):
                view = _view(leaves[wanted[name][0].leaf], *wanted[name], sizes)
                view[...] = handle.get_tensor(name).reshape(view.shape)
    stored_too = arch.tied_head and "head/kernel" in leaves
    if stored_too and not np.array_equal(leaves.pop("head/kernel").T, leaves["embed/tokens"]):
        raise UserError(f"{folder}: {head} is not the tied embedding; set tie_word_embeddings to false in config.json")
    return _nest(leaves)


def _check_stored(folder: Path, family: Family, stored: dict[str, _Stored], wanted: _Wanted, sizes: _Sizes) -> None:
    missing = {name: tensor.leaf for name, (tensor, _) in wanted.items() if name not in stored}
    missing = {name: leaf for name, leaf in missing.items() if leaf != "score/bias"}
    if "score/kernel" in missing.values():
        raise UserError(f"{folder} holds no trained score head (score.weight); train one with `rlhf-jax reward`")
    if set(missing.values()) == {"head/kernel"}:
        cure = "give a language model, or set tie_word_embeddings to true in config.json if its head is tied"
        raise UserError(f"{folder} holds no vocabulary head ({', '.join(missing)}); {cure}")
    heads = {name for name, tensor in family.tensors.items() if tensor.leaf.startswith(("head/", "score/"))}
    extra = [n for n in stored if n not in wanted and n not in heads and not re.search(family.ignored, n)]
    shapes = {name: _stored_shape(wanted[name][0], sizes) for name in wanted if name in stored}
    shaped = [f"{n} {list(stored[n].shape)}, not {list(s)}" for n, s in shapes.items() if s != stored[n].shape]
    typed = [f"{n} ({stored[n].dtype})" for n in shapes if stored[n].dtype not in ("F64", "F32", "F16", "BF16")]
    again = "make config.json agree with the weights, or download the directory again"
    for items, what, cure in (
        (list(missing), "lacks tensors that config.json asks for", again),
        (extra, "has tensors that config.json does not mention", again),
        (shaped, "has tensors of other shapes than config.json says", again),
        (typed, "has quantized tensors", "save the model in bfloat16"),
    ):
        if items:
            more = f" and {len(items) - 3} more" if len(items) > 3 else ""
            raise UserError(f"{folder} {what}: {', '.join(items[:3])}{more}; {cure}")


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, node in tree.items():
        flat |= _flatten(node, f"{prefix}{key}/") if isinstance(node, Mapping) else {f"{prefix}{key}": node}
    return flat


def find_family(arch: ArchConfig, base_config: Mapping[str, Any] | None = None) -> Family:
    """The family that can hold this shape, preferably that of `base_config`; call it before training, too.

    Raises:
        UserError: none can; it says what does not fit.
    """
    preferred, reasons = (base_config or {}).get("model_type"), []
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred):
        first = {key: field for field, key in reversed(list(family.config.items()))}
        wanted = dict(family.fixed) | {field: getattr(arch, first[key]) for field, key in family.config.items()}
        misfits = [f"{f} {v!r} (not {getattr(arch, f)!r})" for f, v in wanted.items() if getattr(arch, f) != v]
        if arch.width % arch.num_heads:  # transformers refuses this whatever head_dim is
            misfits.append(f"width {arch.width} to be a multiple of num_heads {arch.num_heads}")
        if not misfits:
            return family
        reasons.append(f"{family.model_type} needs {', '.join(misfits)}")
    raise UserError(f"no Hugging Face family has this shape: {'; '.join(reasons)}; change model.arch")


def save_model(
    path: str | os.PathLike[str],
    arch: ArchConfig,
    params: Mapping[str, Any],
    *,
    eos_ids: Sequence[int],
    pad_id: int | None = None,
    score_head: bool = False,
    dtype: str = "float32",
    base_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, generation_config.json and model.safetensors; other files in `path` (a tokenizer) stay.

    The directory is written beside `path` and renamed, so that an interruption leaves the old one as it was.

    Args:
        params: our tree, jax or numpy arrays.
        score_head: a reward or value model; its bias is stored as score.bias, which transformers ignores.
        dtype: float32 or bfloat16.
        base_config: config.json of the model that training began with; gives the family, bos and (default) pad.

    Raises:
        UserError: no family has this shape, or params do not have it.
    """
    family, leaves, shapes = find_family(arch, base_config), _flatten(params), leaf_shapes(arch, score_head=score_head)
    if dtype not in _DTYPES:
        raise UserError(f"cannot save in dtype {dtype!r}; use one of: {', '.join(_DTYPES)}")
    wrong = {leaf: np.shape(array) for leaf, array in leaves.items()}.items() ^ shapes.items()
    if wrong:
        names = ", ".join(sorted({leaf for leaf, _ in wrong})[:3])
        raise UserError(f"arch and params disagree about {names}; save params with the arch that they have")
    tokens = _token_ids(eos_ids, pad_id, base_config or {})
    config = _hf_config(family, arch, score_head) | tokens | {"dtype": dtype}
    generation = {key: ids for key, ids in tokens.items() if ids is not None}
    with _replacing(Path(path)) as folder:
        for name, content in {"config.json": config, "generation_config.json": generation}.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tensors = dict(_hf_tensors(family, arch, leaves, _DTYPES[dtype]))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # save_file makes it private


def _token_ids(eos_ids: Sequence[int], pad_id: int | None, base: Mapping[str, Any]) -> dict[str, Any]:
    eos, pad = [int(token) for token in eos_ids], base.get("pad_token_id") if pad_id is None else int(pad_id)
    stop = eos[0] if len(eos) == 1 else eos or None
    return {"bos_token_id": base.get("bos_token_id"), "eos_token_id": stop, "pad_token_id": pad}


def _hf_config(family: Family, arch: ArchConfig, score_head: bool) -> dict[str, Any]:
    values = {key: getattr(arch, field) for field, key in family.config.items()}
    values[family.config["activation"]] = ACTIVATIONS[arch.activation]
    if arch.positions == "rotary":  # transformers 5 reads this, 4 the plain key
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": arch.rope_theta}
    if score_head:
        values |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    architecture = family.classifier if score_head else family.causal
    return {"architectures": [architecture], "model_type": family.model_type} | values


def _hf_tensors(family: Family, arch: ArchConfig, leaves: dict[str, Any], dtype: Any) -> Iterator[tuple[str, Any]]:
    """Stored names and arrays, leaf by leaf; a sharded save would write them as they come."""
    sizes = _sizes(arch)
    for path, leaf in leaves.items():
        array = np.asarray(leaf)
        for name, (tensor, layer) in _names(family, arch, [path]).items():
            stored = _view(array, tensor, layer, sizes).reshape(_stored_shape(tensor, sizes))
            yield name, np.ascontiguousarray(stored, dtype)  # save_file would write a strided array as it lies


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new directory that takes the place of `path` when the block ends well, with the files it did not write."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{word}-{uuid.uuid4().hex[:8]}") for word in ("new", "old"))
    new.mkdir()
    try:
        yield new
        for file in path.iterdir() if path.exists() else []:
            if not (new / file.name).exists() and not _STALE.fullmatch(file.name):
                (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
