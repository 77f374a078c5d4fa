"""One table per Hugging Face model family: its names for our settings and for our tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from rlhf_jax.models.hf.family import ConfigJson, Derived, Family, Only, Tensor

_T = TypeVar("_T")


def head_dim(raw: ConfigJson) -> int:
    return raw["hidden_size"] // raw["num_attention_heads"]


def heads_or(number: int) -> Derived:
    """The default of num_key_value_heads where null means as many as there are query heads."""
    return lambda raw: raw["num_attention_heads"] if "num_key_value_heads" in raw else number


def head_dim_or(number: int) -> Derived:
    """The default of head_dim where null means that heads share the width."""
    return lambda raw: head_dim(raw) if "head_dim" in raw else number


EVEN_HEADS: Only = {"head_dim": lambda raw: (None, head_dim(raw))}
"""`only` of a family in which another width of heads would be that of its rotary table alone."""


def without(table: Mapping[str, _T], *keys: str) -> dict[str, _T]:
    return {key: value for key, value in table.items() if key not in keys}


QUERY, KEY, VALUE, GATE, UP = ("query",), ("key",), ("value",), ("gate",), ("up",)
_SCORE = {"score.weight": Tensor("score/kernel", "1 D"), "score.bias": Tensor("score/bias", "1")}
MEMBERS = {"score.weight": Tensor("score/kernel", "H D"), "score.bias": Tensor("score/bias", "H")}
"""The heads of an ensemble, in transformers the labels of a classifier."""
_LAYER = "model.layers.{}."
LLAMA = Family(
    model_type="llama",
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    prefix="model.",
    config={
        "vocab_size": "vocab_size", "width": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
        "ffn_width": "intermediate_size", "max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps",
        "activation": "hidden_act", "qkv_bias": "attention_bias", "out_bias": "attention_bias",
        "mlp_bias": "mlp_bias", "tied_head": "tie_word_embeddings", "init_std": "initializer_range",
    },
    defaults={
        "num_key_value_heads": lambda raw: raw["num_attention_heads"], "head_dim": head_dim,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": False, "initializer_range": 0.02,
    },
    fixed={"norm": "rms", "positions": "rotary", "gated_mlp": True},
    tensors={
        "model.embed_tokens.weight": Tensor("embed/tokens", "V D"),
        _LAYER + "input_layernorm.weight": Tensor("layers/attn_norm/scale", "D"),
        _LAYER + "self_attn.q_proj.weight": Tensor("layers/attn/qkv", "KGN D", QUERY),
        _LAYER + "self_attn.k_proj.weight": Tensor("layers/attn/qkv", "KGN D", KEY),
        _LAYER + "self_attn.v_proj.weight": Tensor("layers/attn/qkv", "KGN D", VALUE),
        _LAYER + "self_attn.q_proj.bias": Tensor("layers/attn/qkv_bias", "KGN", QUERY),
        _LAYER + "self_attn.k_proj.bias": Tensor("layers/attn/qkv_bias", "KGN", KEY),
        _LAYER + "self_attn.v_proj.bias": Tensor("layers/attn/qkv_bias", "KGN", VALUE),
        _LAYER + "self_attn.o_proj.weight": Tensor("layers/attn/out", "D KGN"),
        _LAYER + "self_attn.o_proj.bias": Tensor("layers/attn/out_bias", "D"),
        _LAYER + "post_attention_layernorm.weight": Tensor("layers/mlp_norm/scale", "D"),
        _LAYER + "mlp.gate_proj.weight": Tensor("layers/mlp/up", "MF D", GATE),
        _LAYER + "mlp.up_proj.weight": Tensor("layers/mlp/up", "MF D", UP),
        _LAYER + "mlp.gate_proj.bias": Tensor("layers/mlp/up_bias", "MF", GATE),
        _LAYER + "mlp.up_proj.bias": Tensor("layers/mlp/up_bias", "MF", UP),
        _LAYER + "mlp.down_proj.weight": Tensor("layers/mlp/down", "D F"),
        _LAYER + "mlp.down_proj.bias": Tensor("layers/mlp/down_bias", "D"),
        "model.norm.weight": Tensor("final_norm/scale", "D"),
        "lm_head.weight": Tensor("head/kernel", "V D"),
        **_SCORE,
    },
)  # fmt: skip

MISTRAL = LLAMA._replace(
    model_type="mistral",
    causal="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    config=without(LLAMA.config, "qkv_bias", "out_bias", "mlp_bias"),
    defaults=LLAMA.defaults
    | {"num_key_value_heads": heads_or(8), "max_position_embeddings": 131072, "sliding_window": 4096},
    windows="all",
)


QWEN2 = MISTRAL._replace(
    model_type="qwen2",
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    defaults=LLAMA.defaults
    | {"num_key_value_heads": heads_or(32), "max_position_embeddings": 32768, "sliding_window": 4096},
    fixed=LLAMA.fixed | {"qkv_bias": True},
    windows="types",
    window_rule=lambda raw, layer: layer >= raw.get("max_window_layers", 28),
    window_switch=True,
)
QWEN3 = QWEN2._replace(
    model_type="qwen3",
    causal="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    config=without(LLAMA.config, "mlp_bias"),
    defaults=QWEN2.defaults | {"head_dim": 128},
    fixed=LLAMA.fixed | {"qk_norm": "head"},
    tensors=LLAMA.tensors
    | {
        _LAYER + "self_attn.q_norm.weight": Tensor("layers/attn/q_norm/scale", "N"),
        _LAYER + "self_attn.k_norm.weight": Tensor("layers/attn/k_norm/scale", "N"),
    },
)
GEMMA = LLAMA._replace(
    model_type="gemma",
    causal="GemmaForCausalLM",
    classifier="GemmaForSequenceClassification",
    config=without(LLAMA.config, "mlp_bias"),
    defaults=LLAMA.defaults
    | {
        "num_key_value_heads": heads_or(16),
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    | {"hidden_act": "gelu_pytorch_tanh"},
    fixed=LLAMA.fixed | {"norm_offset": True, "scale_embedding": True},
    activations={"gelu": "gelu_tanh"},  # what the first releases said and never meant
    only={"use_bidirectional_attention": (None, False)},
)


GEMMA2 = GEMMA._replace(
    model_type="gemma2",
    causal="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    config=GEMMA.config
    | {"activation": "hidden_activation", "query_pre_attn_scalar": "query_pre_attn_scalar"}
    | {"attn_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
    defaults=GEMMA.defaults
    | {"num_key_value_heads": heads_or(4), "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
    fixed=GEMMA.fixed | {"norm_position": "both"},
    activations={},
    tensors=LLAMA.tensors
    | {
        _LAYER + "post_attention_layernorm.weight": Tensor("layers/attn_post_norm/scale", "D"),
        _LAYER + "pre_feedforward_layernorm.weight": Tensor("layers/mlp_norm/scale", "D"),
        _LAYER + "post_feedforward_layernorm.weight": Tensor("layers/mlp_post_norm/scale", "D"),
    },
    windows="types",
    window_rule=lambda raw, layer: layer % 2 == 0,
)
GEMMA3 = GEMMA2._replace(
    model_type="gemma3_text",
    causal="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    config=without(GEMMA2.config, "attn_softcap"),  # transformers reads its key and does not apply it
    defaults=GEMMA2.defaults
    | {"max_position_embeddings": 131072, "final_logit_softcapping": None}
    | {"vocab_size": 262208, "num_attention_heads": 8},  # which the Hub's text_config leaves out
    fixed=GEMMA2.fixed | {"qk_norm": "head"},
    tensors=GEMMA2.tensors | {name: QWEN3.tensors[name] for name in QWEN3.tensors if name not in LLAMA.tensors},
    rotary={"rope_theta": ("rope_theta", 1e6), "rope_local_theta": ("rope_local_base_freq", 1e4)},
    window_rule=lambda raw, layer: (layer + 1) % raw.get("sliding_window_pattern", 6) != 0,
    whole="gemma3",
)
_SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
PHI3 = LLAMA._replace(
    model_type="phi3",
    causal="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    config=MISTRAL.config,
    defaults=LLAMA.defaults | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    tensors=without(LLAMA.tensors, *(name for name in LLAMA.tensors if name.split(".")[-2] in _SPLIT))
    | {
        _LAYER + "self_attn.qkv_proj.weight": Tensor("layers/attn/qkv", "KGN D", (*QUERY, *KEY, *VALUE)),
        _LAYER + "mlp.gate_up_proj.weight": Tensor("layers/mlp/up", "MF D"),
    },
    rotary=LLAMA.rotary | {"rope_fraction": ("partial_rotary_factor", 1.0)},
    scalings=("longrope",),
    scaling_names={"su": "longrope", "yarn": "longrope"},  # its first names
    windows="all",
)
OLMO2 = LLAMA._replace(
    model_type="olmo2",
    causal="Olmo2ForCausalLM",
    classifier="Olmo2ForSequenceClassification",
    config=without(LLAMA.config, "mlp_bias"),
    defaults=LLAMA.defaults | {"rms_norm_eps": 1e-5},
    fixed=LLAMA.fixed | {"norm_position": "post", "qk_norm": "all"},
    tensors=without(LLAMA.tensors, _LAYER + "input_layernorm.weight")
    | {
        _LAYER + "post_attention_layernorm.weight": Tensor("layers/attn_post_norm/scale", "D"),
        _LAYER + "post_feedforward_layernorm.weight": Tensor("layers/mlp_post_norm/scale", "D"),
        _LAYER + "self_attn.q_norm.weight": Tensor("layers/attn/q_norm/scale", "KGN"),
        _LAYER + "self_attn.k_norm.weight": Tensor("layers/attn/k_norm/scale", "K1N"),
    },
)

_BLOCK = "transformer.h.{}."
GPT2 = Family(
    model_type="gpt2",
    causal="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    prefix="transformer.",
    config={
        "vocab_size": "vocab_size", "width": "n_embd", "num_layers": "n_layer", "num_heads": "n_head",
        "num_kv_heads": "n_head", "ffn_width": "n_inner", "max_positions": "n_positions",
        "norm_eps": "layer_norm_epsilon", "activation": "activation_function", "tied_head": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    defaults={
        "n_inner": lambda raw: 4 * raw["n_embd"], "n_positions": 1024, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new", "tie_word_embeddings": True, "initializer_range": 0.02,
    },
    fixed={
        "norm": "layer", "positions": "learned", "gated_mlp": False, "qkv_bias": True, "out_bias": True,
        "mlp_bias": True, "head_dim": lambda raw: raw["n_embd"] // raw["n_head"],
    },
    tensors={
        "transformer.wte.weight": Tensor("embed/tokens", "V D"),
        "transformer.wpe.weight": Tensor("embed/positions", "P D"),
        _BLOCK + "ln_1.weight": Tensor("layers/attn_norm/scale", "D"),
        _BLOCK + "ln_1.bias": Tensor("layers/attn_norm/bias", "D"),
        _BLOCK + "attn.c_attn.weight": Tensor("layers/attn/qkv", "D KGN", (*QUERY, *KEY, *VALUE)),
        _BLOCK + "attn.c_attn.bias": Tensor("layers/attn/qkv_bias", "KGN", (*QUERY, *KEY, *VALUE)),
        _BLOCK + "attn.c_proj.weight": Tensor("layers/attn/out", "KGN D"),
        _BLOCK + "attn.c_proj.bias": Tensor("layers/attn/out_bias", "D"),
        _BLOCK + "ln_2.weight": Tensor("layers/mlp_norm/scale", "D"),
        _BLOCK + "ln_2.bias": Tensor("layers/mlp_norm/bias", "D"),
        _BLOCK + "mlp.c_fc.weight": Tensor("layers/mlp/up", "D MF"),
        _BLOCK + "mlp.c_fc.bias": Tensor("layers/mlp/up_bias", "MF"),
        _BLOCK + "mlp.c_proj.weight": Tensor("layers/mlp/down", "F D"),
        _BLOCK + "mlp.c_proj.bias": Tensor("layers/mlp/down_bias", "D"),
        "transformer.ln_f.weight": Tensor("final_norm/scale", "D"),
        "transformer.ln_f.bias": Tensor("final_norm/bias", "D"),
        "lm_head.weight": Tensor("head/kernel", "V D"),
        **_SCORE,
    },
    only={
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    aliases={
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    ignored=r"attn\.(masked_)?bias$",
)  # fmt: skip

_NEOX = "gpt_neox.layers.{}."
GPT_NEOX = Family(
    model_type="gpt_neox",
    causal="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    prefix="gpt_neox.",
    config={
        "vocab_size": "vocab_size", "width": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "num_kv_heads": "num_attention_heads", "ffn_width": "intermediate_size",
        "max_positions": "max_position_embeddings", "norm_eps": "layer_norm_eps", "activation": "hidden_act",
        "parallel_residual": "use_parallel_residual", "qkv_bias": "attention_bias", "out_bias": "attention_bias",
        "tied_head": "tie_word_embeddings", "init_std": "initializer_range",
    },
    defaults={
        "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": True,
        "attention_bias": True, "tie_word_embeddings": False, "initializer_range": 0.02,
    },
    rotary={"rope_theta": ("rotary_emb_base", 1e4), "rope_fraction": ("rotary_pct", 0.25)},
    fixed={"norm": "layer", "positions": "rotary", "gated_mlp": False, "mlp_bias": True, "head_dim": head_dim},
    tensors={
        "gpt_neox.embed_in.weight": Tensor("embed/tokens", "V D"),
        _NEOX + "input_layernorm.weight": Tensor("layers/attn_norm/scale", "D"),
        _NEOX + "input_layernorm.bias": Tensor("layers/attn_norm/bias", "D"),
        _NEOX + "attention.query_key_value.weight": Tensor("layers/attn/qkv", "KSN D"),
        _NEOX + "attention.query_key_value.bias": Tensor("layers/attn/qkv_bias", "KSN"),
        _NEOX + "attention.dense.weight": Tensor("layers/attn/out", "D KGN"),
        _NEOX + "attention.dense.bias": Tensor("layers/attn/out_bias", "D"),
        _NEOX + "post_attention_layernorm.weight": Tensor("layers/mlp_norm/scale", "D"),
        _NEOX + "post_attention_layernorm.bias": Tensor("layers/mlp_norm/bias", "D"),
        _NEOX + "mlp.dense_h_to_4h.weight": Tensor("layers/mlp/up", "MF D"),
        _NEOX + "mlp.dense_h_to_4h.bias": Tensor("layers/mlp/up_bias", "MF"),
        _NEOX + "mlp.dense_4h_to_h.weight": Tensor("layers/mlp/down", "D F"),
        _NEOX + "mlp.dense_4h_to_h.bias": Tensor("layers/mlp/down_bias", "D"),
        "gpt_neox.final_layer_norm.weight": Tensor("final_norm/scale", "D"),
        "gpt_neox.final_layer_norm.bias": Tensor("final_norm/bias", "D"),
        "embed_out.weight": Tensor("head/kernel", "V D"),
        **_SCORE,
    },
    only=EVEN_HEADS,
    renamed={"lm_head.weight": "embed_out.weight"},
    ignored=r"rotary_emb\.inv_freq$|attention\.(masked_)?bias$",
)  # fmt: skip

MINISTRAL = MISTRAL._replace(
    model_type="ministral",
    causal="MinistralForCausalLM",
    classifier="MinistralForSequenceClassification",
    windows="types",
    window_rule=lambda raw, layer: True,
)
SEED_OSS = LLAMA._replace(
    model_type="seed_oss",
    causal="SeedOssForCausalLM",
    classifier="SeedOssForSequenceClassification",
    config=LLAMA.config | {"out_bias": "attention_out_bias"},
    defaults=LLAMA.defaults
    | {"num_key_value_heads": heads_or(8), "head_dim": head_dim_or(128), "max_position_embeddings": 524288}
    | {"attention_bias": True, "attention_out_bias": False},
)
OLMO3 = OLMO2._replace(
    model_type="olmo3",
    causal="Olmo3ForCausalLM",
    classifier="Olmo3ForSequenceClassification",
    defaults=OLMO2.defaults | {"sliding_window": 4096},
    rotary={"rope_theta": ("rope_theta", 5e5), "rope_local_theta": ("", 5e5)},
    windows="types",
    window_rule=lambda raw, layer: (layer + 1) % 4 != 0,
)
CWM = LLAMA._replace(
    model_type="cwm",
    causal="CwmForCausalLM",
    classifier="CwmForSequenceClassification",
    config=without(LLAMA.config, "qkv_bias", "out_bias"),
    defaults=LLAMA.defaults
    | {"num_key_value_heads": heads_or(8), "head_dim": head_dim_or(128), "max_position_embeddings": 131072}
    | {"rms_norm_eps": 1e-5, "sliding_window": 8192, "bos_token_id": 128000},
    rotary={"rope_theta": ("rope_theta", 1e6)},
    default_rope={
        "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    windows="types",
    window_rule=lambda raw, layer: layer % 4 != 0,
)  # fmt: skip
VAULTGEMMA = GEMMA2._replace(
    model_type="vaultgemma",
    causal="VaultGemmaForCausalLM",
    classifier="VaultGemmaForSequenceClassification",
    fixed=GEMMA.fixed,
    tensors=without(LLAMA.tensors, _LAYER + "post_attention_layernorm.weight")
    | {_LAYER + "pre_feedforward_layernorm.weight": Tensor("layers/mlp_norm/scale", "D")},
)
STARCODER2 = MISTRAL._replace(
    model_type="starcoder2",
    causal="Starcoder2ForCausalLM",
    classifier="Starcoder2ForSequenceClassification",
    config=without(LLAMA.config, "norm_eps", "qkv_bias", "out_bias", "mlp_bias")
    | {"norm_eps": "norm_epsilon", "qkv_bias": "use_bias", "out_bias": "use_bias", "mlp_bias": "use_bias"},
    defaults=LLAMA.defaults
    | {"num_key_value_heads": heads_or(2), "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "use_bias": True}
    | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "initializer_range": 0.018042},
    fixed={"norm": "layer", "positions": "rotary", "gated_mlp": False},
    tensors=without(LLAMA.tensors, *(name for name in LLAMA.tensors if ".mlp." in name))
    | {
        _LAYER + "input_layernorm.bias": Tensor("layers/attn_norm/bias", "D"),
        _LAYER + "post_attention_layernorm.bias": Tensor("layers/mlp_norm/bias", "D"),
        _LAYER + "mlp.c_fc.weight": Tensor("layers/mlp/up", "MF D"),
        _LAYER + "mlp.c_fc.bias": Tensor("layers/mlp/up_bias", "MF"),
        _LAYER + "mlp.c_proj.weight": Tensor("layers/mlp/down", "D F"),
        _LAYER + "mlp.c_proj.bias": Tensor("layers/mlp/down_bias", "D"),
        "model.norm.bias": Tensor("final_norm/bias", "D"),
    },
)

FIRST = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, GPT2, GPT_NEOX),
    *(MINISTRAL, SEED_OSS, OLMO3, CWM, VAULTGEMMA, STARCODER2),
)
