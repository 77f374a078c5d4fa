"""The tables of families with experts (`experts.py` of the decoder)."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_jax.models.hf.families import (
    EVEN_HEADS,
    GATE,
    LLAMA,
    MISTRAL,
    OLMO2,
    QWEN3,
    UP,
    head_dim,
    head_dim_or,
    heads_or,
    without,
)
from rlhf_jax.models.hf.family import ConfigJson, Derived, Tensor, without_mlp

_LAYER = "model.layers.{}."
_EXPERT = _LAYER + "mlp.experts.{}."


def _gated(part: str, gate: str, up: str, down: str) -> dict[str, Tensor]:
    """Tensors of the MLP or experts that `part` is, named so."""
    return {
        gate + ".weight": Tensor(f"layers/{part}/up", "MF D", GATE),
        up + ".weight": Tensor(f"layers/{part}/up", "MF D", UP),
        down + ".weight": Tensor(f"layers/{part}/down", "D F"),
    }


def _sparse(dense: Mapping[str, Tensor], router: str, *names: str) -> dict[str, Tensor]:
    """Tensors with experts, named so, in place of the MLP."""
    return (
        without_mlp(dense) | {router + ".weight": Tensor("layers/experts/router", "E D")} | _gated("experts", *names)
    )


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_MLP = (_LAYER + "mlp.gate", *(_EXPERT + name for name in _PROJECTIONS))
_PLAIN = without(LLAMA.config, "mlp_bias")
_CHOICE = {"experts_per_token": "num_experts_per_tok"}

QWEN3_MOE = QWEN3._replace(
    model_type="qwen3_moe",
    causal="Qwen3MoeForCausalLM",
    classifier="Qwen3MoeForSequenceClassification",
    config=_PLAIN
    | _CHOICE
    | {"ffn_width": "moe_intermediate_size", "num_experts": "num_experts", "norm_topk": "norm_topk_prob"},
    defaults=QWEN3.defaults
    | {"num_key_value_heads": heads_or(4), "head_dim": LLAMA.defaults["head_dim"]}
    | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False},
    tensors=_sparse(QWEN3.tensors, *_MLP),
    aliases={"num_local_experts": "num_experts"},
    only={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    windows="all",
)
MIXTRAL = MISTRAL._replace(
    model_type="mixtral",
    causal="MixtralForCausalLM",
    classifier="MixtralForSequenceClassification",
    config=MISTRAL.config | _CHOICE | {"num_experts": "num_local_experts"},
    defaults=MISTRAL.defaults
    | {"rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2},
    fixed=LLAMA.fixed | {"norm_topk": True},
    tensors=_sparse(
        LLAMA.tensors,
        _LAYER + "block_sparse_moe.gate",
        *(_LAYER + f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2")),
    ),
    rotary={"rope_theta": ("rope_theta", 1e6)},
    aliases={"num_experts": "num_local_experts"},
)
OLMOE = LLAMA._replace(
    model_type="olmoe",
    causal="OlmoeForCausalLM",
    classifier="OlmoeForSequenceClassification",
    config=without(_PLAIN, "head_dim") | _CHOICE | {"num_experts": "num_experts", "norm_topk": "norm_topk_prob"},
    defaults=without(LLAMA.defaults, "head_dim")
    | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8}
    | {"norm_topk_prob": False},
    fixed=LLAMA.fixed | {"qk_norm": "all", "head_dim": head_dim},
    tensors=_sparse(
        LLAMA.tensors | {name: OLMO2.tensors[name] for name in OLMO2.tensors if "_norm.weight" in name}, *_MLP
    ),
    aliases={"num_local_experts": "num_experts"},
    only=EVEN_HEADS | {"clip_qkv": (None,)},
)


def _shared_width(default: int) -> Derived:
    return lambda raw: raw.get("n_shared_experts", 1) * raw.get("moe_intermediate_size", default)


GLM4_MOE = LLAMA._replace(
    model_type="glm4_moe",
    causal="Glm4MoeForCausalLM",
    classifier="Glm4MoeForSequenceClassification",
    config=without(_PLAIN, "out_bias")
    | _CHOICE
    | {"ffn_width": "moe_intermediate_size", "num_experts": "n_routed_experts", "norm_topk": "norm_topk_prob"}
    | {"router_groups": "n_group", "router_top_groups": "topk_group", "routed_scale": "routed_scaling_factor"}
    | {"dense_layers": "first_k_dense_replace", "dense_width": "intermediate_size"},
    defaults=LLAMA.defaults
    | {"num_key_value_heads": heads_or(8), "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    | {"moe_intermediate_size": 1408, "n_routed_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1}
    | {"intermediate_size": 10944},
    fixed=LLAMA.fixed
    | {"router": "sigmoid", "qk_norm": lambda raw: "head" if raw.get("use_qk_norm") else "none"}
    | {"shared_width": _shared_width(1408)},
    saved={
        "use_qk_norm": lambda arch: arch.qk_norm == "head",
        "n_shared_experts": lambda arch: arch.shared_width // arch.ffn_width,
    },
    tensors=_sparse(QWEN3.tensors, *_MLP)
    | {_LAYER + "mlp.gate.e_score_correction_bias": Tensor("layers/experts/router_choice_bias", "E")}
    | _gated("mlp", *(_LAYER + f"mlp.{name}" for name in _PROJECTIONS))
    | _gated("shared", *(_LAYER + f"mlp.shared_experts.{name}" for name in _PROJECTIONS)),
    rotary=LLAMA.rotary | {"rope_fraction": ("partial_rotary_factor", 0.5)},
    aliases={"num_local_experts": "n_routed_experts"},
    only={"n_shared_experts": tuple(range(1, 100))},
    ignored=rf"{LLAMA.ignored}|model\.layers\.(46|92)\.",
)

_LATENT = _LAYER + "self_attn."


def _key_width(still: int, turning: int = 64) -> Derived:
    return lambda raw: raw.get("qk_nope_head_dim", still) + raw.get("qk_rope_head_dim", turning)


DEEPSEEK_V3 = GLM4_MOE._replace(
    model_type="deepseek_v3",
    causal="DeepseekV3ForCausalLM",
    classifier="DeepseekV3ForSequenceClassification",
    config=without(GLM4_MOE.config, "head_dim", "num_kv_heads")
    | {"out_bias": "attention_bias", "rope_pairs": "rope_interleave", "latent_width": "kv_lora_rank"}
    | {"latent_query_width": "q_lora_rank", "latent_rope_dim": "qk_rope_head_dim", "latent_value_dim": "v_head_dim"},
    defaults=GLM4_MOE.defaults
    | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "moe_intermediate_size": 2048, "n_routed_experts": 256}
    | {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3}
    | {"intermediate_size": 18432, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64}
    | {"v_head_dim": 128, "rope_interleave": True},
    fixed=LLAMA.fixed
    | {"router": "sigmoid", "num_kv_heads": lambda raw: raw["num_attention_heads"]}
    | {"head_dim": _key_width(128), "shared_width": _shared_width(2048)},
    saved={
        "qk_nope_head_dim": lambda arch: arch.head_dim - arch.latent_rope_dim,
        "num_key_value_heads": lambda arch: arch.num_heads,
        "n_shared_experts": lambda arch: arch.shared_width // arch.ffn_width,
    },
    tensors={name: tensor for name, tensor in GLM4_MOE.tensors.items() if "self_attn" not in name}
    | {
        _LATENT + "q_proj.weight": Tensor("layers/latent/q", "KN D"),
        _LATENT + "q_a_proj.weight": Tensor("layers/latent/q_down", "X D"),
        _LATENT + "q_a_proj.bias": Tensor("layers/latent/q_down_bias", "X"),
        _LATENT + "q_a_layernorm.weight": Tensor("layers/latent/q_norm/scale", "X"),
        _LATENT + "q_b_proj.weight": Tensor("layers/latent/q_up", "KN X"),
        _LATENT + "kv_a_proj_with_mqa.weight": Tensor("layers/latent/kv_down", "Y D"),
        _LATENT + "kv_a_proj_with_mqa.bias": Tensor("layers/latent/kv_down_bias", "Y"),
        _LATENT + "kv_a_layernorm.weight": Tensor("layers/latent/kv_norm/scale", "Z"),
        _LATENT + "kv_b_proj.weight": Tensor("layers/latent/kv_up", "KA Z"),
        _LATENT + "o_proj.weight": Tensor("layers/latent/out", "D KB"),
        _LATENT + "o_proj.bias": Tensor("layers/latent/out_bias", "D"),
    },
    rotary=LLAMA.rotary,
    scalings=("yarn",),
    only=GLM4_MOE.only
    | {"num_key_value_heads": lambda raw: (None, raw["num_attention_heads"])}
    | {"head_dim": lambda raw: (raw.get("qk_rope_head_dim", 64),)},
    ignored=rf"{LLAMA.ignored}|model\.layers\.61\.",
)


def _dense_layers(raw: ConfigJson) -> int:
    kinds = raw.get("mlp_layer_types")
    return 1 if kinds is None else kinds.count("dense")


GLM4_MOE_LITE = DEEPSEEK_V3._replace(
    model_type="glm4_moe_lite",
    causal="Glm4MoeLiteForCausalLM",
    classifier="Glm4MoeLiteForSequenceClassification",
    config=without(DEEPSEEK_V3.config, "dense_layers"),
    defaults=DEEPSEEK_V3.defaults
    | {"max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "moe_intermediate_size": 1536, "n_routed_experts": 64}
    | {"num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8}
    | {"intermediate_size": 10240, "q_lora_rank": 768, "v_head_dim": 256},
    fixed=DEEPSEEK_V3.fixed
    | {"dense_layers": _dense_layers, "head_dim": _key_width(192), "shared_width": _shared_width(1536)},
    saved=DEEPSEEK_V3.saved
    | {"mlp_layer_types": lambda arch: ["dense"] * arch.dense_layers + ["sparse"] * arch.expert_layers},
    aliases=DEEPSEEK_V3.aliases | {"head_dim": "qk_rope_head_dim"},
    only=DEEPSEEK_V3.only
    | {
        "mlp_layer_types": lambda raw: (
            None,
            ["dense"] * _dense_layers(raw) + ["sparse"] * (raw["num_hidden_layers"] - _dense_layers(raw)),
        )
    },
    ignored=rf"{LLAMA.ignored}|model\.layers\.47\.",
)

GPT_OSS = LLAMA._replace(
    model_type="gpt_oss",
    causal="GptOssForCausalLM",
    classifier="GptOssForSequenceClassification",
    config=_PLAIN
    | _CHOICE
    | {"num_experts": "num_local_experts", "glu_limit": "swiglu_limit", "glu_alpha": "swiglu_alpha"},
    defaults=LLAMA.defaults
    | {"num_key_value_heads": heads_or(8), "head_dim": head_dim_or(64), "max_position_embeddings": 131072}
    | {"rms_norm_eps": 1e-5, "attention_bias": True, "sliding_window": 128, "num_local_experts": 128}
    | {"num_experts_per_tok": 4, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    fixed=LLAMA.fixed
    | {"mlp_bias": True, "router_bias": True, "attn_sinks": True}
    | {"activation": "silu"},  # whatever hidden_act says, as in transformers
    tensors=without_mlp(LLAMA.tensors)
    | {
        _LAYER + "self_attn.sinks": Tensor("layers/attn/sinks", "KG"),
        _LAYER + "mlp.router.weight": Tensor("layers/experts/router", "E D"),
        _LAYER + "mlp.router.bias": Tensor("layers/experts/router_bias", "E"),
        _LAYER + "mlp.experts.gate_up_proj": Tensor("layers/experts/up", "E D FM"),
        _LAYER + "mlp.experts.gate_up_proj_bias": Tensor("layers/experts/up_bias", "E FM"),
        _LAYER + "mlp.experts.down_proj": Tensor("layers/experts/down", "E F D"),
        _LAYER + "mlp.experts.down_proj_bias": Tensor("layers/experts/down_bias", "E D"),
    },
    rotary={"rope_theta": ("rope_theta", 150000.0)},
    default_rope={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    windows="types",
    window_rule=lambda raw, layer: layer % 2 == 0,
    aliases={"num_experts": "num_local_experts"},
    packed=("mxfp4",),
)  # fmt: skip

EXPERTS = (QWEN3_MOE, MIXTRAL, OLMOE, GLM4_MOE, GPT_OSS, DEEPSEEK_V3, GLM4_MOE_LITE)
