"""config.json of a Hugging Face directory <-> ArchConfig. What cannot be represented is refused, never dropped."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.config import ArchConfig, RopeScaling
from rlhf_jax.errors import UserError, reason, shown
from rlhf_jax.hosts.files import read_object
from rlhf_jax.models.hf.family import ConfigJson, Family, Only
from rlhf_jax.models.hf.refusals import unknown_type
from rlhf_jax.models.hf.table import FAMILIES
from rlhf_jax.models.rotary import check_law

Fields = dict[str, Any]
"""Fields of ArchConfig by name, each of its own type."""
MOST = 2**31  # no size in a config.json is as large
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}
_ACTIVATION_NAMES = {v: k for k, v in ACTIVATIONS.items()} | {"swish": "silu", "gelu_new": "gelu_tanh"}
_SWITCHES = ("use_sliding_window", "use_qk_norm", "use_double_wide_mlp", "new_decoder_architecture", "multi_query")
_ONLY: Only = {"is_causal": (True,), "transformers_weights": (None, "model.safetensors")}  # of every family
_ONLY |= dict.fromkeys(_SWITCHES, (True, False, None))  # a text would be a yes whatever it says
_FACTORS = ("attention_multiplier", "glu_limit", "attn_softcap", "logit_softcap")  # of which 0 stands for none here
_MAYBE_NONE = ("attn_softcap", "logit_softcap", "latent_query_width")  # null in config.json, 0 here
_ORIGINAL, _LOG_SCALE = "original_max_position_embeddings", "llama_4_scaling_beta"
_SCALING = {  # fields of RopeScaling by kind
    "linear": "factor", "dynamic": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_positions",
    "yarn": "factor beta_fast beta_slow truncate attention_factor mscale mscale_all_dim original_max_positions",
    "longrope": "factor short_factor long_factor attention_factor original_max_positions",
    "proportional": "factor fraction",
}  # fmt: skip
_OTHERWISE = {"original_max_positions": _ORIGINAL, "fraction": "partial_rotary_factor"}
_SCALING_KEYS = {  # kind -> field -> key, mostly the same
    kind: {name: _OTHERWISE.get(name, name) for name in names.split()} for kind, names in _SCALING.items()
} | {"ntk": {"factor": "alpha"}}
_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"}
_NOT_SCALING = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
MEMBERS = "reward_members"
"""Key of config.json whose number says that the labels of a classifier are the members of a reward ensemble."""
OWN_ADAPTERS = "reward_member_adapters"
"""Key beside it: true if the directory holds their trunk, and each member's adapters and head lie below it."""
_NOT_KEPT = ("torch_dtype", "auto_map", "quantization_config", "transformers_weights", MEMBERS, OWN_ADAPTERS)
"""The old name of dtype; code that lay beside the model; how its weights were packed, and in which file."""


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


def family_of(raw: ConfigJson, where: Path) -> Family:
    """The family that config.json names.

    Raises:
        UserError: an unknown family, or an architecture that is neither language nor reward model.
    """
    family = FAMILIES.get(model_type_of(raw))
    if family is None:
        raise UserError(f"{where}: {unknown_type(raw)}")
    known = (family, FAMILIES.get(str(raw["model_type"]), family))  # the Mistral that is a Ministral says either
    supported = list(dict.fromkeys(name for one in known for name in (one.causal, one.classifier)))
    named = raw.get("architectures") or supported
    if not isinstance(named, list) or not set(supported) & {str(name) for name in named}:
        first = named[0] if isinstance(named, list) else named
        raise UserError(f"{where}: no support for architecture {shown(first)}; use one of: {', '.join(supported)}")
    return family


def model_type_of(raw: ConfigJson) -> str:
    """model_type, by which transformers chooses the code: a Mistral that has layer_types is a Ministral to it."""
    name = str(raw.get("model_type"))
    return "ministral" if name == "mistral" and "layer_types" in raw else name


def to_arch(raw: ConfigJson, family: Family, where: Path) -> ArchConfig:
    """The shape that a config.json describes.

    Raises:
        UserError: a value is missing, of the wrong type, or beyond the decoder.
    """
    with understood(where):
        raw = raw | {key: raw[alias] for alias, key in family.aliases.items() if alias in raw}
        layers = _value("num_layers", family.config["num_layers"], family, raw, where)
        if layers > 10_000:
            raise UserError(f"{where}: {layers} layers are more than any model has; correct it")
        raw = family.plain(raw)
        only = {key: allowed(raw) if callable(allowed) else allowed for key, allowed in (_ONLY | family.only).items()}
        refused = {key: raw[key] for key, allowed in only.items() if key in raw and raw[key] not in allowed}
        refused |= {key: raw[key] for key in ("quantization_config", "per_layer_config") if raw.get(key)}
        if (raw.get("quantization_config") or {}).get("quant_method") in family.packed:
            del refused["quantization_config"]
        for key, value in refused.items():
            raise UserError(f"{where}: no support for {key} {shown(value)}; choose a checkpoint without it")
        _check_tokens(raw, where)
        fields: Fields = {field: _value(field, key, family, raw, where) for field, key in family.config.items()}
        if fields.get("num_experts", 1) < 1:
            raise UserError(f"{where}: {family.config['num_experts']} is {fields['num_experts']}; take a dense family")
        fields |= {field: value(raw) if callable(value) else value for field, value in family.fixed.items()}
        fields |= _windows(raw, family, where, fields["num_layers"], fields["max_positions"])
        fields["nope_layers"] = family.nope(raw, fields.get("window_layers", ()))
        if fields["positions"] == "rotary" and family.rotary:
            fields |= _rope(raw, family, where, fields["max_positions"])
        arch = ArchConfig(**fields)
        check_law(arch)
        return arch


def _default(key: str, family: Family, raw: ConfigJson) -> object:
    return value(raw) if callable(value := family.defaults.get(key)) else value


def _value(field: str, key: str, family: Family, raw: ConfigJson, where: Path) -> Any:
    value, kind = raw.get(key), type(getattr(ArchConfig(), field))
    if value is None and key not in family.defaults:
        raise UserError(f"{where} lacks {key!r}; download or save it again")
    none = field in _MAYBE_NONE or kind is bool  # where null is no default
    if value is None and not (key in raw and none):
        value = _default(key, family, raw)
    if value is None and none:
        return kind()
    value = typed(value, kind, key, where)
    if (field in family.inverse or field in _FACTORS) and value == 0:
        raise UserError(f"{where}: {key} is 0, by which nothing is left; correct it")
    if field in family.inverse:
        return 1 / value
    if field != "activation":
        return value
    names = _ACTIVATION_NAMES | family.activations
    if value not in names:
        raise UserError(f"{where}: no support for {key} {value!r}; use one of: {', '.join(names)}")
    return names[value]


def _check_tokens(raw: ConfigJson, where: Path) -> None:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = raw.get(key)
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if value is not None and any(type(i) is not int for i in ids):
            raise UserError(f"{where}: {key} is {shown(value)}, which is no token id; correct it")


def typed(value: object, kind: type, key: str, where: Path) -> Any:
    """A value, if it is of this type; whole numbers stand for floats, lists of numbers for tuples.

    Raises:
        UserError: it is of another, or of a size that no model has.
    """
    value = float(value) if kind is float and type(value) is int else value
    if kind is tuple and isinstance(value, list) and all(type(x) in (int, float) for x in value):
        return tuple(float(x) for x in value)
    if type(value) is not kind:
        raise UserError(f"{where}: {key} is {shown(value)}, which is no {kind.__name__}; correct it")
    if isinstance(value, (int, float)) and not abs(value) < (MOST if kind is int else math.inf):
        raise UserError(f"{where}: {key} is {shown(value)}, which no model has; correct it")
    return value


def _windows(raw: ConfigJson, family: Family, where: Path, layers: int, max_positions: int) -> Fields:
    kinds = raw.get("layer_types")
    window: Any = raw["sliding_window"] if "sliding_window" in raw else _default("sliding_window", family, raw)
    if family.window_switch or (family.windows == "none" and "use_sliding_window" in raw):
        window = window if raw.get("use_sliding_window", False) else None
    known = ("sliding_attention", "full_attention", *family.kinds)
    if kinds is not None and (len(kinds) != layers or set(kinds) - set(known)):
        raise UserError(f"{where}: no support for layer_types {shown(kinds)}; they must be {layers} of "
                        f"{' and '.join(known)}")  # fmt: skip
    if family.windows == "none" and window is not None and window >= max_positions:
        window = None  # which no text outgrows
    if family.windows == "none" and ("sliding_attention" in (kinds or ()) or window is not None):
        raise UserError(f"{where}: no support for sliding windows in {family.model_type}, which transformers leaves "
                        "out of all but its cache; choose a checkpoint without")  # fmt: skip
    if family.windows == "all":
        chosen = tuple(range(layers))
    elif kinds is not None:
        chosen = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    else:
        chosen = tuple(i for i in range(layers) if window is not None and family.window_rule(raw, i))
    if window is None and family.windows == "types" and chosen:
        raise UserError(f"{where}: layer_types has sliding_attention, but there is no sliding_window; give its size")
    if window is None or not chosen:
        return {}
    if typed(window, int, "sliding_window", where) < 1:
        raise UserError(f"{where}: sliding_window is {window}, in which no token sees itself; write null for none")
    return {"sliding_window": window, "window_layers": chosen}


def _rope(raw: ConfigJson, family: Family, where: Path, max_positions: int) -> Fields:
    """transformers 5 has rope_parameters, perhaps by layer type; 4 has rope_scaling and keys beside it."""
    scaled: ConfigJson = raw.get("rope_scaling") or {}
    given: ConfigJson = family.default_rope if raw.get("rope_parameters") is None else raw["rope_parameters"]
    local, by_layer = ConfigJson(), "rope_local_theta" in family.rotary
    if by_layer:
        if any(value is not None and not isinstance(value, dict) for value in given.values()):
            raise UserError(f"{where}: {family.model_type} needs rope_parameters by layer type; write them so")
        local, full = given.get("sliding_attention") or {}, given.get("full_attention")
        given = ({"rope_type": "default"} if full is None else full) | scaled
    else:
        given = scaled or given
    if any(isinstance(value, dict) for value in given.values()):
        raise UserError(f"{where}: no support for rope by layer type in {family.model_type}; use a plain one")
    fractions = [local.get("partial_rotary_factor", 1)]
    if "rope_fraction" not in family.rotary and _kind_of(given) != "proportional":
        fractions.append(_first(given.get("partial_rotary_factor"), raw.get("partial_rotary_factor"), 1))
    if fractions := [fraction for fraction in fractions if fraction != 1]:
        raise UserError(f"{where}: no support for partial_rotary_factor {shown(fractions[0])} in {family.model_type}; "
                        "choose a checkpoint without it")  # fmt: skip
    stated = {
        "rope_theta": given.get("rope_theta"),
        "rope_fraction": given.get("partial_rotary_factor"),
        "rope_local_theta": local.get("rope_theta"),
        "query_log_scale": given.get(_LOG_SCALE),
    }
    null = {"partial_rotary_factor": 1.0}  # of keys whose null is not their default
    fields = {
        field: _first(stated[field], raw.get(key), null.get(key, default) if key in raw else default)
        for field, (key, default) in family.rotary.items()
    }
    if _kind_of(local) != "default":
        raise UserError(f"{where}: no support for rope scaling of sliding layers; choose a checkpoint without it")
    numbers = {field: typed(value, float, field, where) for field, value in fields.items()}
    if numbers.get("rope_local_theta", 1) <= 0:
        raise UserError(f"{where}: rope_theta of sliding layers is {numbers['rope_local_theta']:g}; make it above 0")
    return numbers | {"rope_scaling": _scaling(given, raw, family, where, max_positions)}


def _kind_of(rope: ConfigJson) -> Any:
    """Of rotary scaling, by the older name of its key too."""
    return rope.get("rope_type", rope.get("type", "default"))


def _first(*values: object) -> object:
    return next((value for value in values if value is not None), None)


def _scaling(given: ConfigJson, raw: ConfigJson, family: Family, where: Path, max_positions: int) -> RopeScaling:
    kind = family.scaling_names.get(_kind_of(given), _kind_of(given))
    by_layer = "rope_local_theta" in family.rotary
    if kind == "dynamic" and given.get("alpha") and "ntk" in family.scalings:
        kind, given = "ntk", {"alpha": given["alpha"]}  # the rest is not looked at
    if kind == "default":
        return RopeScaling()
    if kind not in family.scalings:
        supported = ", ".join(family.scalings)
        raise UserError(f"{where}: no support for rope scaling {kind!r}; use one of: {supported}")
    keys, numbers = _SCALING_KEYS[kind], dict(given)
    if family.model_type == "phi3" and _ORIGINAL in given and _ORIGINAL not in raw:
        raise UserError(f"{where}: {_ORIGINAL} in rope_scaling is not read by transformers; move it to the top")
    if _ORIGINAL in keys.values():
        numbers[_ORIGINAL] = _first(None if by_layer else raw.get(_ORIGINAL), given.get(_ORIGINAL), max_positions)
        if numbers.get("factor") is None and kind in ("yarn", "longrope"):
            numbers["factor"] = max_positions / numbers[_ORIGINAL]
    if kind == "yarn":  # transformers takes 0 for not given, and looks for truncate where by_layer has layer types
        numbers = {k: v for k, v in numbers.items() if v != 0 or k not in ("beta_fast", "beta_slow")}
        numbers["truncate"] = by_layer or bool(numbers.get("truncate", True))
    if kind == "proportional":
        numbers.setdefault("factor", 1.0)
    if numbers.get("attention_factor") == 0:
        raise UserError(f"{where}: attention_factor is 0, by which no token has a place; null computes it")
    unread = _NOT_SCALING | ({_LOG_SCALE, "max_position_embeddings"} if "query_log_scale" in family.rotary else set())
    if unknown := sorted(set(numbers) - set(keys.values()) - unread - {_ORIGINAL, *family.unread_rope}):
        raise UserError(f"{where}: no support for {unknown[0]!r} in rope scaling {kind!r}; choose another checkpoint")
    if lacking := [key for key in keys.values() if key in _REQUIRED and numbers.get(key) is None]:
        raise UserError(f"{where}: rope scaling {kind!r} lacks {lacking[0]!r}; download or save it again")
    plain = RopeScaling()
    given_here = {field: key for field, key in keys.items() if numbers.get(key) is not None}
    fields = {f: typed(numbers[key], type(getattr(plain, f)), key, where) for f, key in given_here.items()}
    return RopeScaling(kind=kind, **fields)


def to_json(family: Family, arch: ArchConfig, *, score_head: bool, members: int = 0) -> ConfigJson:
    """config.json of a shape; `to_arch` reads the same shape from it if the family can hold it."""
    values = {key: getattr(arch, field) for field, key in family.config.items()}
    values |= {family.config[field]: _inverse(getattr(arch, field)) for field in family.inverse}
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
    if family.window_switch:
        values["use_sliding_window"] = bool(arch.window_layers)
    if family.window_switch and family.windows == "types":
        values["max_window_layers"] = min(near, default=arch.num_layers)
    elif family.windows == "types" and not near:  # transformers wants a size, though no layer has a window
        values["sliding_window"] = family.defaults.get("sliding_window")
    if arch.positions == "rotary" and family.rotary:
        values |= _rope_json(family, arch)
    values |= {key: value(arch) if callable(value) else value for key, value in family.saved.items()}
    if score_head:
        labels = [f"LABEL_{i}" for i in range(members or 1)]
        values |= {"num_labels": len(labels), "id2label": {str(i): name for i, name in enumerate(labels)}}
        values |= {"label2id": {name: i for i, name in enumerate(labels)}} | ({MEMBERS: members} if members else {})
    name = family.classifier if score_head else family.causal
    return {"architectures": [name], "model_type": family.model_type} | values


def _inverse(number: float) -> float:
    """1 / number, as the decimal of 15 digits whose own inverse it is, if there is one."""
    short = float(f"{1 / number:.15g}")
    return short if 1 / short == number else 1 / number


def to_json_like(
    family: Family, arch: ArchConfig, base: ConfigJson, *, score_head: bool, members: int = 0
) -> ConfigJson:
    """`to_json` with what the config.json of the model that training began with holds beside our settings."""
    values = to_json(family, arch, score_head=score_head, members=members)
    if model_type_of(base) != family.model_type:
        return values
    gone = {*_NOT_KEPT, *family.aliases, *(["problem_type"] if score_head else [])}
    gone |= {"rope_scaling"} if "rope_parameters" in values and base.get("rope_scaling") else set()
    unused = [_ORIGINAL] * (arch.rope_scaling.kind == "none")  # keys that say nothing of this shape
    if family.windows == "types" and not arch.window_layers:
        unused += ["use_sliding_window", "sliding_window", "max_window_layers"]
    values |= {key: base[key] for key in unused if key in values and base.get(key)}
    rope = base.get("rope_parameters") or base.get("rope_scaling") or {}
    kept = {key: rope[key] for key in family.unread_rope if key in rope}
    values |= {key: values[key] | kept for key in ("rope_parameters", "rope_scaling") if key in values}
    return {key: value for key, value in base.items() if key not in gone} | values


def _rope_json(family: Family, arch: ArchConfig) -> ConfigJson:
    """What transformers 5 reads (rope_parameters), and the plain keys that 4 does."""
    scaling = arch.rope_scaling
    kind = {"none": "default", "ntk": "dynamic"}.get(scaling.kind, scaling.kind)
    rope: ConfigJson = {"rope_type": kind, "rope_theta": arch.rope_theta}
    numbers = {key: getattr(scaling, field) for field, key in _SCALING_KEYS.get(scaling.kind, {}).items()}
    numbers = {k: list(v) if isinstance(v, tuple) else v for k, v in numbers.items()}
    numbers |= {"factor": 1.0} if scaling.kind == "ntk" else {}  # which transformers wants beside alpha
    optional = {"attention_factor", "mscale", "mscale_all_dim"}
    numbers = {k: v for k, v in numbers.items() if v != 0 or k not in optional}
    fields = dict.fromkeys(family.rotary, arch.rope_theta)
    fields |= {field: getattr(arch, field) for field in family.rotary if getattr(arch, field)}
    values: ConfigJson = {key: fields[field] for field, (key, _) in family.rotary.items() if key}
    if family.model_type == "phi3":
        original = scaling.original_max_positions or arch.max_positions
        values["original_max_position_embeddings"] = original
        if scaling.kind == "longrope" and scaling.factor == arch.max_positions / original:
            del numbers["factor"]  # what transformers computes from the two lengths
    if "rope_fraction" in family.rotary:
        rope["partial_rotary_factor"] = arch.rope_fraction
    if "query_log_scale" in family.rotary:
        rope[_LOG_SCALE] = arch.query_log_scale
    rope |= numbers
    if scaling.kind != "none" and values:  # of a family that has such keys beside rope_parameters
        values["rope_scaling"] = dict(rope)
    values["rope_parameters"] = rope
    if "rope_local_theta" in family.rotary:
        local = {"rope_type": "default", "rope_theta": arch.rope_local_theta or arch.rope_theta}
        values["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return values


def find_family(arch: ArchConfig, base_config: ConfigJson | None = None) -> Family:
    """The family that can hold this shape, preferably that of `base_config`; call it before training, too.

    Raises:
        UserError: none can; it says what does not fit the best of them.
    """
    preferred, reasons = model_type_of(base_config or {}), []
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred):
        try:
            held = to_arch(to_json(family, arch, score_head=False), family, Path("config.json"))
        except UserError as error:
            reasons.append((99, f"{family.model_type}: {error}"))
            continue
        if held.rope_local_theta == held.rope_theta and held.rope_scaling == RopeScaling():  # said or not
            held = dataclasses.replace(held, rope_local_theta=arch.rope_local_theta and held.rope_local_theta)
        both = ((f.name, getattr(held, f.name), getattr(arch, f.name)) for f in dataclasses.fields(ArchConfig))
        misfits = [f"{name} {has!r} (not {wanted!r})" for name, has, wanted in both if has != wanted]
        if base_config is None and arch.width % arch.num_heads:  # transformers refuses it whatever head_dim is
            misfits.append(f"width {arch.width} to be a multiple of num_heads {arch.num_heads}")
        if not misfits:
            return family.of(arch)
        reasons.append((len(misfits), f"{family.model_type} needs {', '.join(misfits)}"))
    nearest = min(reasons, key=lambda reason: reason[0])[1]
    raise UserError(f"no Hugging Face family has this shape; the nearest, {nearest}; change model.arch")
