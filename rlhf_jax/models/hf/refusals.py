"""What is said of a model_type that no family has: the nearest one, and what it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile

from rlhf_jax.errors import shown
from rlhf_jax.models.hf.family import ConfigJson, Family
from rlhf_jax.models.hf.table import FAMILIES

EXPERTS = "mixture-of-experts"
_COUNTS = re.compile(r"(^|_)(num|n)_(\w+_)?experts$")
_PARTS = {
    "shared experts": r"shared_expert|n_shared_experts|num_shared_experts",
    EXPERTS: r"experts|moe_|router_|decoder_sparse_step|mlp_only_layers|norm_topk_prob",
    "latent attention": r"kv_lora_rank|q_lora_rank|qk_nope_head_dim|qk_rope_head_dim|v_head_dim",
    "linear attention": r"linear_|lightning|short_conv|conv_L_cache",
    "state-space layers": r"mamba|ssm|state_size|d_conv|time_step|hybrid_override_pattern|lru_width|block_types",
    "images or sound": r"vision|image|video|audio|mm_|boi_|eoi_|boa_|eoa_",
    "an encoder": r"is_encoder_decoder|encoder_|d_kv",
    "embeddings by layer": r"per_layer_input",
    "caches that layers share": r"kv_shared|kv_sharing",
    "keys that are values": r"k_eq_v",
    "head widths by layer": r"global_head_dim|num_global_key_value_heads",
    "layers without rotary positions": r"no_rope|nope_",
    "multipliers": r"(residual|embedding|attention|logits?|lm_head)_(multiplier|scal\w+)|scale_(emb|depth)",
    "ALiBi positions": r"alibi",
}
"""What the decoder lacks -> the keys of config.json that ask for it."""
_CODE = {
    "xIELU": "apertus",
    "value norms": "gemma3n gemma3n_text",
    "norms without weights": "olmo nanochat",
}
"""What the decoder lacks -> model types whose code has it whatever config.json says."""
_GENERAL = re.compile(
    r"_.*|.*(dropout|pdrop|drop|token_id|token_ids|_index|dtype|version|label|labels|_loss|_range|_std)$"
    r"|architectures|model_type|auto_map|use_cache|pretraining_tp|vocab_size.*|output_.*|return_dict|is_decoder"
    r"|intermediate_size|transformers_version|text_config|problem_type|attn_implementation|tie_.*|initializer_.*|task_specific_params"
)
"""Keys that say nothing about what is computed, or that every family has."""


def unknown_type(raw: ConfigJson) -> str:
    """That there is no family for this model_type, and what the nearest one would need, in one line."""
    name = raw.get("model_type")
    text = raw.get("text_config")
    shape = raw | text if isinstance(text, dict) else raw  # what the language model of several is like
    nearest = min(FAMILIES.values(), key=lambda family: _distance(str(name), shape, family))
    lacking = list(dict.fromkeys(_lacking(str(name), shape, nearest)))
    few = f"{', '.join(lacking[:4])}{f' and {len(lacking) - 4} more' if len(lacking) > 4 else ''}"
    experts = f"{EXPERTS}, " if EXPERTS in lacking else ""
    missing = f"lacks {few}" if lacking else "has the same settings but may compute otherwise"
    said = f"no support for {experts}model_type {shown(name)}; use one of: {', '.join(FAMILIES)}"
    return f"{said}; the nearest, {nearest.model_type}, {missing}"


def _has_experts(name: str, shape: ConfigJson) -> bool:
    """By the counts that config.json gives, else by the name: dense models may have the keys too, empty or 0."""
    inner = [value for value in shape.values() if isinstance(value, dict)]
    counts = [v for part in (shape, *inner) for k, v in part.items() if _COUNTS.search(str(k))]
    if not counts:
        return "moe" in name or any("experts" in key and bool(value) for key, value in shape.items())
    most = max((max(v, default=0) if isinstance(v, list) else v for v in counts if v), default=0)
    return bool(shape.get("enable_moe_block", True)) and isinstance(most, int) and most > 1


def _settings(family: Family) -> set[str]:
    """Keys of config.json that the family reads."""
    known = {*family.config.values(), *family.saved, *family.only, *family.aliases}
    known |= {key for key, _ in family.rotary.values()}
    known |= {"rope_parameters", "rope_scaling"} if family.fixed["positions"] == "rotary" else set()
    known |= {"sliding_window", "layer_types"} if family.windows != "none" else set()
    return known | ({"use_sliding_window", "max_window_layers"} if family.window_switch else set())


def _distance(name: str, shape: ConfigJson, family: Family) -> float:
    """How far a family is: settings that one has and the other lacks, less for a common name and a newer family."""
    stem = re.split(r"\d", family.model_type)[0]
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(name, family.model_type, strict=False)))
    required = {key for key in family.config.values() if key not in family.defaults}
    unknown = {str(key) for key, value in shape.items() if value and not _GENERAL.fullmatch(str(key))} - _settings(
        family
    )
    newest = name.startswith(stem) * (4 + list(FAMILIES).index(family.model_type) / 100)
    of_experts = "num_experts" in family.config and not _has_experts(name, shape)
    return 4 * of_experts + 2 * len(required - set(shape)) + len(unknown) - newest - (common > 1) * common / 4


def _lacking(name: str, shape: ConfigJson, family: Family) -> Iterator[str]:
    """What a config.json asks for and a family does not have: parts of a decoder by name, other settings by key."""
    experts = _has_experts(name, shape) and "num_experts" not in family.config
    if experts:
        yield EXPERTS
    yield from (part for part, names in _CODE.items() if name in names.split())
    kinds = shape.get("layer_types")
    odd = {kind for kind in kinds if isinstance(kind, str)} if isinstance(kinds, list) else set()
    yield from sorted(odd - {"full_attention", "sliding_attention", *family.kinds})
    for key, value in shape.items():
        if key in _settings(family) or not value or not isinstance(key, str):
            continue
        part = next(
            (part for part, pattern in _PARTS.items() if re.match(pattern, key) or re.search(rf"_({pattern})", key)),
            None,
        )
        if part is not None and (part != EXPERTS or experts):
            yield part
    for key, value in shape.items():
        known = key in _settings(family) or _GENERAL.fullmatch(key) or any(re.search(p, key) for p in _PARTS.values())
        if value and not known and not isinstance(value, dict):
            yield key
