"""config.json of a Hugging Face directory <-> ArchConfig. What cannot be represented is refused, never dropped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.config import ArchConfig, RopeScaling
from rlhf_jax.errors import UserError, reason, shown
from rlhf_jax.hosts.files import read_object
from rlhf_jax.models.hf import hub
from rlhf_jax.models.hf.families import FAMILIES, ConfigJson, Family
from rlhf_jax.models.rotary import check_law

Fields = dict[str, Any]
"""Fields of ArchConfig by name, each of its own type."""
ADAPTER = "adapter_config.json"
"""What makes a directory one of a PEFT adapter."""
MOST_LAYERS = 8
"""Adapters that may stand on one another."""
MOST = 2**31
"""No size in a config.json is as large."""
MOST_LAYERS_OF_A_MODEL = 10_000
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
_ACTIVATION_NAMES = {v: k for k, v in ACTIVATIONS.items()} | {"swish": "silu", "gelu_new": "gelu_tanh"}
_MAYBE_NONE = ("attn_softcap", "logit_softcap")  # null in config.json, 0 here
_ORIGINAL = "original_max_position_embeddings"
_SCALING = {  # fields of RopeScaling by kind
    "linear": "factor", "dynamic": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_positions",
    "yarn": "factor beta_fast beta_slow truncate attention_factor mscale mscale_all_dim original_max_positions",
    "longrope": "factor short_factor long_factor attention_factor original_max_positions",
}  # fmt: skip
_SCALING_KEYS = {  # kind -> field -> key: the same but one
    kind: {name: _ORIGINAL if name == "original_max_positions" else name for name in names.split()}
    for kind, names in _SCALING.items()
}
_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"}
_NOT_SCALING = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_json(file: Path) -> ConfigJson:
    """A JSON object; a UserError if the file holds none."""
    return read_object(file, "download or save it again", ours=False)


@contextlib.contextmanager
def understood(file: Path) -> Iterator[None]:
    """A block that reads values of any type: whatever error they cause becomes a UserError that names the file."""
    try:
        yield
    except UserError as error:
        raise error if str(file) in str(error) else UserError(f"{file}: {error}") from error
    except Exception as error:  # whatever a wrong type leads to
        said = f"a value of the wrong type or size ({type(error).__name__}: {reason(error)})"
        raise UserError(f"{file} holds {said}; download or save it again") from error


def stands_on(folder: Path) -> Path | None:
    """The directory of the model that a PEFT adapter was made for; None of a directory that holds a model itself.

    Raises:
        UserError: it is neither a directory nor in the Hub's cache on this machine.
    """
    if not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
        return None
    raw = read_json(folder / ADAPTER)
    with understood(folder / ADAPTER):
        name = _typed(raw.get("base_model_name_or_path") or "none", str, "base_model_name_or_path", folder / ADAPTER)
        folder_of_base = name if Path(name).is_dir() else hub.cached_directory(name, raw.get("revision"))
    if folder_of_base is None:
        cure = "download that model, or write its directory into base_model_name_or_path"
        raise UserError(f"{folder / ADAPTER} stands on {name}, which is neither a directory nor downloaded; {cure}")
    return Path(folder_of_base)


def model_directory(path: str | os.PathLike[str]) -> Path:
    """The path itself, or of a PEFT adapter the directory of the model that it stands on."""
    return layers_of(path)[-1]


def layers_of(path: str | os.PathLike[str]) -> list[Path]:
    """The directory of a model and, before it, those of the adapters that stand on one another on it.

    Raises:
        UserError: one stands on itself, by whatever way, or there are more than anybody makes.
    """
    folders, seen = [Path(path)], {os.path.realpath(path)}
    while (below := stands_on(folders[-1])) is not None:
        if os.path.realpath(below) in seen or len(folders) == MOST_LAYERS:
            what = "stands on itself" if os.path.realpath(below) in seen else f"stands on {MOST_LAYERS} others"
            cure = "write the model's own directory into base_model_name_or_path"
            raise UserError(f"{Path(path) / ADAPTER} {what} ({folders[-1]} names {below}); {cure}")
        folders.append(below)
        seen.add(os.path.realpath(below))
    return folders


def read_config(path: str | os.PathLike[str]) -> tuple[ArchConfig, ConfigJson]:
    """The shape of the model in a Hugging Face directory (or of a config.json alone), and its config.json.

    Of a PEFT adapter, those of the model that it stands on.

    Raises:
        UserError: no such directory or config, an unknown family, a feature that the decoder lacks, or .bin weights.
    """
    folder = model_directory(path)
    where = folder / "config.json"
    if folder.is_file():
        folder, where = folder.parent, folder
    elif not folder.is_dir():
        raise UserError(f"no directory {folder}; for a model of the Hub, give hf://owner/name")
    if not where.is_file():
        run = (folder / "model" / "config.json").is_file()
        cure = str(folder / "model") if run else "a directory that `save_pretrained` or rlhf-jax wrote"
        raise UserError(f"{folder} has no config.json; give {cure}")
    raw = read_json(where)
    family = family_of(raw, where)
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        kind = family.classifier if family.classifier in (raw.get("architectures") or ()) else family.causal
        place = json.dumps(str(path), ensure_ascii=False)  # Python's string too, plain in a shell's quotes
        convert = f"import transformers as t; t.{kind}.from_pretrained({place}).save_pretrained({place})"
        command = f"python -c {shlex.quote(convert)}"
        raise UserError(f"{folder} has .bin weights only, which are pickles; where torch is installed, run {command}")
    return to_arch(raw, family, where), raw


def read_generation(path: str | os.PathLike[str]) -> ConfigJson:
    """generation_config.json of a directory; empty if there is none."""
    file = model_directory(path) / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def family_of(raw: ConfigJson, where: Path) -> Family:
    """The family that config.json names.

    Raises:
        UserError: an unknown family, or an architecture that is neither language nor reward model.
    """
    name = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        supported = ", ".join(FAMILIES)
        experts = "mixture-of-experts, " if any("experts" in key for key in raw) else ""
        raise UserError(f"{where}: no support for {experts}model_type {shown(name)}; use one of: {supported}")
    named = raw.get("architectures") or [family.causal]
    if not isinstance(named, list) or not any(name in named for name in (family.causal, family.classifier)):
        first = named[0] if isinstance(named, list) else named
        supported = f"{family.causal}, {family.classifier}"
        raise UserError(f"{where}: no support for architecture {shown(first)}; use one of: {supported}")
    return family


def to_arch(raw: ConfigJson, family: Family, where: Path) -> ArchConfig:
    """The shape that a config.json describes.

    Raises:
        UserError: a value is missing, of the wrong type, or beyond the decoder.
    """
    with understood(where):
        refused = {key: raw[key] for key, allowed in family.only.items() if key in raw and raw[key] not in allowed}
        if raw.get("quantization_config") is not None:
            refused["quantization_config"] = raw["quantization_config"]
        for key, value in refused.items():
            raise UserError(f"{where}: no support for {key} {shown(value)}; choose a checkpoint without it")
        fields: Fields = {field: _value(field, key, family, raw, where) for field, key in family.config.items()}
        if fields["num_layers"] > MOST_LAYERS_OF_A_MODEL:
            raise UserError(f"{where}: {fields['num_layers']} layers are more than any model has; correct it")
        fields |= {field: value(raw) if callable(value) else value for field, value in family.fixed.items()}
        fields |= _windows(raw, family, where, fields["num_layers"])
        if fields["positions"] == "rotary":
            fields |= _rope(raw, family, where, fields["max_positions"])
        arch = ArchConfig(**fields)
        check_law(arch)
        return arch


def _default(key: str, family: Family, raw: ConfigJson) -> object:
    value = family.defaults.get(key)
    return value(raw) if callable(value) else value


def _value(field: str, key: str, family: Family, raw: ConfigJson, where: Path) -> object:
    value = raw.get(key)
    if value is None and key not in family.defaults:
        raise UserError(f"{where} lacks {key!r}; download or save it again")
    if value is None and not (key in raw and field in _MAYBE_NONE):
        value = _default(key, family, raw)
    if value is None and field in _MAYBE_NONE:
        return 0.0
    value = _typed(value, type(getattr(ArchConfig(), field)), key, where)
    if field != "activation":
        return value
    names = _ACTIVATION_NAMES | family.activations
    if value not in names:
        raise UserError(f"{where}: no support for {key} {value!r}; use one of: {', '.join(names)}")
    return names[value]


def _typed(value: object, kind: type, key: str, where: Path) -> Any:
    value = float(value) if kind is float and type(value) is int else value
    if kind is tuple and isinstance(value, list) and all(type(x) in (int, float) for x in value):
        return tuple(float(x) for x in value)
    if type(value) is not kind:
        raise UserError(f"{where}: {key} is {shown(value)}, which is no {kind.__name__}; correct it")
    if isinstance(value, (int, float)) and not abs(value) < (MOST if kind is int else math.inf):
        raise UserError(f"{where}: {key} is {shown(value)}, which no model has; correct it")
    return value


def _windows(raw: ConfigJson, family: Family, where: Path, layers: int) -> Fields:
    kinds = raw.get("layer_types")
    window = raw["sliding_window"] if "sliding_window" in raw else _default("sliding_window", family, raw)
    if "use_sliding_window" in raw or family.model_type.startswith("qwen"):
        window = window if raw.get("use_sliding_window", False) else None
    if kinds is not None and (len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}):
        raise UserError(f"{where}: no support for layer_types {shown(kinds)}; they must be {layers} of "
                        "sliding_attention and full_attention")  # fmt: skip
    if family.windows == "none" and ("sliding_attention" in (kinds or ()) or window is not None):
        raise UserError(f"{where}: no support for sliding windows in {family.model_type}; choose a checkpoint without")
    if not window or family.windows == "none":
        return {}
    if family.windows == "all":
        chosen = tuple(range(layers))
    elif kinds is not None:
        chosen = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    else:
        chosen = tuple(i for i in range(layers) if family.window_rule(raw, i))
    return {"sliding_window": _typed(window, int, "sliding_window", where), "window_layers": chosen} if chosen else {}


def _rope(raw: ConfigJson, family: Family, where: Path, max_positions: int) -> Fields:
    """transformers 5 has rope_parameters, perhaps by layer type; 4 has rope_scaling and keys beside it."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    local = given.get("sliding_attention")
    if "rope_local_base_freq" in family.defaults and "rope_type" in given and given is raw.get("rope_parameters"):
        raise UserError(f"{where}: {family.model_type} needs rope_parameters by layer type; write them so")
    if isinstance(given.get("full_attention"), dict):
        if "rope_local_base_freq" not in family.defaults:
            raise UserError(f"{where}: no support for rope by layer type in {family.model_type}; use a plain one")
        given = given["full_attention"]
    theta = _first(given.get("rope_theta"), raw.get("rope_theta"), raw.get("rotary_emb_base"))
    theta = _first(theta, _default("rope_theta", family, raw), 10000.0)
    fraction = _first(given.get("partial_rotary_factor"), raw.get("partial_rotary_factor"), raw.get("rotary_pct"))
    fraction = _first(fraction, _default("partial_rotary_factor", family, raw), 1.0)
    if fraction != 1 and "partial_rotary_factor" not in family.defaults:
        raise UserError(f"{where}: no support for partial_rotary_factor {fraction} in {family.model_type}; choose "
                        "a checkpoint without it")  # fmt: skip
    fields = {"rope_theta": theta, "rope_fraction": fraction}
    if "rope_local_base_freq" in family.defaults:
        near = _first((local or {}).get("rope_theta"), raw.get("rope_local_base_freq"))
        fields["rope_local_theta"] = _first(near, _default("rope_local_base_freq", family, raw))
    if (local or {}).get("rope_type", "default") != "default":
        raise UserError(f"{where}: no support for rope scaling of sliding layers; choose a checkpoint without it")
    typed = {field: _typed(value, float, field, where) for field, value in fields.items()}
    return typed | {"rope_scaling": _scaling(given, raw, where, max_positions)}


def _first(*values: object) -> object:
    return next((value for value in values if value is not None), None)


def _scaling(given: ConfigJson, raw: ConfigJson, where: Path, max_positions: int) -> RopeScaling:
    kind = given.get("rope_type", given.get("type", "default"))
    if raw["model_type"] == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # its first names
    if kind == "default":
        return RopeScaling()
    if kind not in _SCALING_KEYS:
        supported = ", ".join(_SCALING_KEYS)
        raise UserError(f"{where}: no support for rope scaling {kind!r}; use one of: {supported}")
    keys, numbers = _SCALING_KEYS[kind], dict(given)
    if raw["model_type"] == "phi3" and _ORIGINAL in given and _ORIGINAL not in raw:
        raise UserError(f"{where}: {_ORIGINAL} in rope_scaling is not read by transformers; move it to the top")
    if _ORIGINAL in keys.values():
        numbers[_ORIGINAL] = _first(raw.get(_ORIGINAL), given.get(_ORIGINAL), max_positions)
        if numbers.get("factor") is None and kind in ("yarn", "longrope"):
            numbers["factor"] = max_positions / numbers[_ORIGINAL]
    unknown = sorted(set(numbers) - set(keys.values()) - _NOT_SCALING - {_ORIGINAL})
    if unknown:
        raise UserError(
            f"{where}: no support for {unknown[0]!r} in rope scaling {kind!r}; choose a checkpoint without"
        )
    lacking = [key for key in keys.values() if key in _REQUIRED and numbers.get(key) is None]
    if lacking:
        raise UserError(f"{where}: rope scaling {kind!r} lacks {lacking[0]!r}; download or save it again")
    plain = RopeScaling()
    given_here = {field: key for field, key in keys.items() if numbers.get(key) is not None}
    typed = {f: _typed(numbers[key], type(getattr(plain, f)), key, where) for f, key in given_here.items()}
    return RopeScaling(kind=kind, **typed)


def to_json(family: Family, arch: ArchConfig, *, score_head: bool) -> ConfigJson:
    """config.json of a shape; `to_arch` reads the same shape from it if the family can hold it."""
    values = {key: getattr(arch, field) for field, key in family.config.items()}
    values[family.config["activation"]] = ACTIVATIONS[arch.activation]
    if "query_pre_attn_scalar" in family.config:  # transformers takes whole numbers only
        values["query_pre_attn_scalar"] = int(arch.query_pre_attn_scalar)
    values |= {family.config[f]: None for f in _MAYBE_NONE if f in family.config and not getattr(arch, f)}
    if family.windows != "none":
        values["sliding_window"] = arch.sliding_window or None
    if family.windows == "types":
        near = set(arch.window_layers)
        values["layer_types"] = [
            "sliding_attention" if i in near else "full_attention" for i in range(arch.num_layers)
        ]
    if family.model_type.startswith("qwen"):
        values |= {"use_sliding_window": bool(arch.window_layers)}
        values |= {"max_window_layers": min(arch.window_layers, default=arch.num_layers)}
    if arch.positions == "rotary":
        values |= _rope_json(family, arch)
    if score_head:
        values |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    architecture = family.classifier if score_head else family.causal
    return {"architectures": [architecture], "model_type": family.model_type} | values


def _rope_json(family: Family, arch: ArchConfig) -> ConfigJson:
    """What transformers 5 reads (rope_parameters), and the plain keys that 4 does."""
    scaling = arch.rope_scaling
    kind = "default" if scaling.kind == "none" else scaling.kind
    rope: ConfigJson = {"rope_type": kind, "rope_theta": arch.rope_theta}
    numbers = {key: getattr(scaling, field) for field, key in _SCALING_KEYS.get(scaling.kind, {}).items()}
    numbers = {k: list(v) if isinstance(v, tuple) else v for k, v in numbers.items()}
    optional = {"attention_factor", "mscale", "mscale_all_dim"}
    numbers = {k: v for k, v in numbers.items() if v != 0 or k not in optional}
    values: ConfigJson = {"rope_theta": arch.rope_theta}
    if family.model_type == "phi3":
        original = scaling.original_max_positions or arch.max_positions
        values["original_max_position_embeddings"] = original
        if scaling.kind == "longrope" and scaling.factor == arch.max_positions / original:
            del numbers["factor"]  # what transformers computes from the two lengths
    if "partial_rotary_factor" in family.defaults:
        rope["partial_rotary_factor"] = values["partial_rotary_factor"] = arch.rope_fraction
    if family.model_type == "gpt_neox":
        values |= {"rotary_pct": arch.rope_fraction, "rotary_emb_base": arch.rope_theta}
    rope |= numbers
    if scaling.kind != "none":
        values["rope_scaling"] = dict(rope)
    values["rope_parameters"] = rope
    if "rope_local_base_freq" in family.defaults:
        values["rope_local_base_freq"] = arch.rope_local_theta
        local = {"rope_type": "default", "rope_theta": arch.rope_local_theta}
        values["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return values


def find_family(arch: ArchConfig, base_config: ConfigJson | None = None) -> Family:
    """The family that can hold this shape, preferably that of `base_config`; call it before training, too.

    Raises:
        UserError: none can; it says what does not fit the best of them.
    """
    preferred, reasons = (base_config or {}).get("model_type"), []
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred):
        try:
            held = to_arch(to_json(family, arch, score_head=False), family, Path("config.json"))
        except UserError as error:
            reasons.append((99, f"{family.model_type}: {error}"))
            continue
        names = [field.name for field in dataclasses.fields(ArchConfig)]
        misfits = [f"{n} {getattr(held, n)!r} (not {getattr(arch, n)!r})" for n in names
                   if getattr(held, n) != getattr(arch, n)]  # fmt: skip
        if base_config is None and arch.width % arch.num_heads:  # transformers refuses it whatever head_dim is
            misfits.append(f"width {arch.width} to be a multiple of num_heads {arch.num_heads}")
        if not misfits:
            return family
        reasons.append((len(misfits), f"{family.model_type} needs {', '.join(misfits)}"))
    nearest = min(reasons, key=lambda reason: reason[0])[1]
    raise UserError(f"no Hugging Face family has this shape; the nearest, {nearest}; change model.arch")
