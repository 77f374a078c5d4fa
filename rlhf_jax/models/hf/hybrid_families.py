"""The tables of families whose layers are of several kinds: a state instead of attention, or heads of other widths."""

from __future__ import annotations

from rlhf_jax.config import ArchConfig
from rlhf_jax.errors import UserError, shown
from rlhf_jax.models.hf.families import GEMMA3, LLAMA, QWEN3, without
from rlhf_jax.models.hf.family import ConfigJson, Derived, Tensor

_LAYER = "model.layers.{}."
_DELTA = _LAYER + "linear_attn."
_CHANNELS = ("delta_query", "delta_key", "delta_value")


def _linear(raw: ConfigJson) -> tuple[int, ...]:
    """Qwen3.5: the layers of linear_attention, by default all but every fourth."""
    layers, kinds = raw["num_hidden_layers"], raw.get("layer_types")
    if kinds is None:
        interval = raw.get("full_attention_interval", 4)
        kinds = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
    return tuple(i for i, kind in enumerate(kinds) if kind == "linear_attention")


QWEN3_5 = LLAMA._replace(
    model_type="qwen3_5_text",
    causal="Qwen3_5ForCausalLM",
    classifier="Qwen3_5TextForSequenceClassification",
    config=without(LLAMA.config, "mlp_bias")
    | {
        "delta_key_heads": "linear_num_key_heads", "delta_value_heads": "linear_num_value_heads",
        "delta_key_dim": "linear_key_head_dim", "delta_value_dim": "linear_value_head_dim",
        "delta_kernel": "linear_conv_kernel_dim",
    },
    defaults=LLAMA.defaults
    | {
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 32768, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
    fixed=LLAMA.fixed | {"norm_offset": True, "qk_norm": "head", "attn_gate": True, "delta_layers": _linear},
    saved={"layer_types": lambda arch: [f"{'linear' if m == 'delta' else 'full'}_attention" for m in arch.mixers]},
    tensors=QWEN3.tensors
    | {
        _DELTA + "in_proj_qkv.weight": Tensor("layers/delta/qkv", "JC D", _CHANNELS),
        _DELTA + "in_proj_z.weight": Tensor("layers/delta/gate", "JU D"),
        _DELTA + "in_proj_b.weight": Tensor("layers/delta/beta", "JI D"),
        _DELTA + "in_proj_a.weight": Tensor("layers/delta/decay", "JI D"),
        _DELTA + "conv1d.weight": Tensor("layers/delta/conv", "JC 1 W", _CHANNELS),
        _DELTA + "A_log": Tensor("layers/delta/log_rate", "JI"),
        _DELTA + "dt_bias": Tensor("layers/delta/rate_bias", "JI"),
        _DELTA + "norm.weight": Tensor("layers/delta/out_norm", "O"),
        _DELTA + "out_proj.weight": Tensor("layers/delta/out", "D JU"),
    },
    rotary=LLAMA.rotary | {"rope_fraction": ("partial_rotary_factor", 0.25)},
    unread_rope=("mrope_section", "mrope_interleaved"),
    kinds=("linear_attention",),
    whole="qwen3_5",
    ignored=rf"{LLAMA.ignored}|^mtp\.",
)  # fmt: skip


_WINDOW, _FULL, _VOCABULARY = "sliding_attention", "full_attention", 262144


def _gemma4(raw: ConfigJson) -> ConfigJson:
    """Gemma 4: the last layer has no window, whatever is said; heads by layer, in files of transformers, by kind."""
    layers, kinds = raw["num_hidden_layers"], raw.get("layer_types")
    kinds = [_WINDOW if (i + 1) % 6 else _FULL for i in range(layers)] if kinds is None else kinds
    kinds = [*kinds[:-1], _FULL]
    near = {"head_dim": raw.get("head_dim", 256), "num_key_value_heads": raw.get("num_key_value_heads", 4)}
    full = near | {"head_dim": raw.get("global_head_dim", 512)}
    by_layer = {int(i): own for i, own in (raw.get("per_layer_config") or {}).items()}  # "05" of ten layers or more
    if raw.get("attention_k_eq_v") and raw.get("num_global_key_value_heads") is not None:
        full["num_key_value_heads"] = raw["num_global_key_value_heads"]
    if "per_layer_config" in raw:
        full = near | by_layer.get(layers - 1, {})
        own = [near | by_layer.get(i, {}) for i in range(layers)]
        by_kind = own == [near if kind == _WINDOW else full for kind in kinds] and full.keys() == near.keys()
        if not by_kind or not by_layer.keys() <= set(range(layers)):
            what = shown(raw["per_layer_config"])
            raise UserError(f"no support for per_layer_config {what}; heads may differ by kind alone")
    said = {"hidden_size_per_layer_input": 256, "enable_moe_block": False}
    raw = said | without(raw, "per_layer_config") | {"layer_types": kinds}
    rows = raw.get("vocab_size_per_layer_input", _VOCABULARY)
    if raw["hidden_size_per_layer_input"] and rows != raw.get("vocab_size", _VOCABULARY):
        raise UserError(f"no support for vocab_size_per_layer_input {shown(rows)} other than vocab_size")
    return raw | {"global_head_dim": full["head_dim"], "num_global_key_value_heads": full["num_key_value_heads"]}


def _of_experts(key: str) -> Derived:
    """The setting if there are experts, else 0: config.json may have both."""
    return lambda raw: raw[key] if raw.get("enable_moe_block") else 0


def _wide(raw: ConfigJson) -> int:
    """The MLP of layers that share keys and values is as wide, or twice."""
    shared = raw.get("use_double_wide_mlp") and raw.get("num_kv_shared_layers")
    return 2 * raw["intermediate_size"] if shared else 0


def _by_layer(arch: ArchConfig) -> ConfigJson:
    own = {"head_dim": arch.full_head_dim, "num_key_value_heads": arch.full_kv_heads}
    return {str(i): own for i, mixer in enumerate(arch.mixers) if mixer.startswith("full")}


GEMMA4 = GEMMA3._replace(
    model_type="gemma4_text",
    causal="Gemma4ForCausalLM",
    classifier="Gemma4ForSequenceClassification",
    config=without(GEMMA3.config, "query_pre_attn_scalar")
    | {"full_head_dim": "global_head_dim", "full_kv_heads": "num_global_key_value_heads"}
    | {"full_keys_as_values": "attention_k_eq_v", "shared_kv_layers": "num_kv_shared_layers"}
    | {"layer_input_width": "hidden_size_per_layer_input"},
    defaults=GEMMA3.defaults
    | {"vocab_size": _VOCABULARY, "sliding_window": 512, "attention_k_eq_v": False, "num_kv_shared_layers": 0},
    fixed=without(GEMMA3.fixed, "norm_offset")
    | {"value_norm": True, "layer_gain": True, "attention_multiplier": 1.0, "shared_kv_ffn_width": _wide}
    | {"num_experts": _of_experts("num_experts"), "experts_per_token": _of_experts("top_k_experts")}
    | {"expert_width": _of_experts("moe_intermediate_size"), "router_scaled": lambda raw: raw["enable_moe_block"]},
    tensors=GEMMA3.tensors
    | {
        _LAYER + "layer_scalar": Tensor("layers/gain/scale", "1"),
        "model.embed_tokens_per_layer.weight": Tensor("embed/by_layer", "V LD"),
        "model.per_layer_model_projection.weight": Tensor("embed/context", "LT D"),
        "model.per_layer_projection_norm.weight": Tensor("embed/context_norm/scale", "T"),
        _LAYER + "per_layer_input_gate.weight": Tensor("layers/input/gate", "T D"),
        _LAYER + "per_layer_projection.weight": Tensor("layers/input/out", "D T"),
        _LAYER + "post_per_layer_input_norm.weight": Tensor("layers/input/post_norm/scale", "D"),
        _LAYER + "router.proj.weight": Tensor("layers/experts/router", "E D"),
        _LAYER + "router.scale": Tensor("layers/experts/router_norm/scale", "D"),
        _LAYER + "router.per_expert_scale": Tensor("layers/experts/router_gain", "E"),
        _LAYER + "experts.gate_up_proj": Tensor("layers/experts/up", "E MF D"),
        _LAYER + "experts.down_proj": Tensor("layers/experts/down", "E D F"),
        _LAYER + "pre_feedforward_layernorm_2.weight": Tensor("layers/experts_norm/scale", "D"),
        _LAYER + "post_feedforward_layernorm_1.weight": Tensor("layers/mlp_out_norm/scale", "D"),
        _LAYER + "post_feedforward_layernorm_2.weight": Tensor("layers/experts_out_norm/scale", "D"),
    },
    rotary={"rope_theta": ("", None), "rope_local_theta": ("", None)},
    scalings=("proportional", "linear"),
    default_rope={
        _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        _WINDOW: {"rope_type": "default", "rope_theta": 1e4},
    },
    plain=_gemma4,
    whole="gemma4",
    saved={
        "per_layer_config": _by_layer, "vocab_size_per_layer_input": lambda arch: arch.vocab_size,
        "use_double_wide_mlp": lambda arch: arch.shared_kv_ffn_width > 0,
        "enable_moe_block": lambda arch: arch.num_experts > 0,
        "num_experts": lambda arch: arch.num_experts or None,
        "top_k_experts": lambda arch: arch.experts_per_token or None,
        "moe_intermediate_size": lambda arch: arch.expert_width or None,
    },
    only={
        "enable_moe_block": (False, True),
        "use_bidirectional_attention": (None, "vision"), "rope_scaling": (None,),
    },
)  # fmt: skip

HYBRIDS = (QWEN3_5, GEMMA4)
