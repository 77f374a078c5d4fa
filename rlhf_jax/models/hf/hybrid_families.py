"""The tables of families whose layers are of several kinds: some with a state instead of attention (`delta.py`)."""

from __future__ import annotations

from rlhf_jax.models.hf.families import LLAMA, QWEN3, without
from rlhf_jax.models.hf.family import ConfigJson, Tensor

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
    saved={"layer_types": lambda arch: [{"attn": "full", "delta": "linear"}[m] + "_attention" for m in arch.mixers]},
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
    ignored=rf"{LLAMA.ignored}|^mtp\.|^model\.visual\.",
)  # fmt: skip

HYBRIDS = (QWEN3_5,)
