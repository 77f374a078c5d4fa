"""One table per Hugging Face model family: its names for our settings and for our tensors.

Axis letters as in `rlhf_jax.config.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

_T = TypeVar("_T")
ConfigJson = dict[str, Any]
"""config.json, or another JSON object beside it, as it was read: values are of any type until they are checked."""
Derived = Callable[[ConfigJson], object]
"""What a config.json makes of a setting that it leaves out."""


class Tensor(NamedTuple):
    """Which leaf a stored tensor is, or which parts of it one after the other, and its axes.

    "KGN D" is torch's Linear, "D KGN" Conv1D. In a part of the fused projection G stands for what the part has of S:
    G queries, one key or one value; in a part of the MLP's, M for one of gate and up.
    """

    leaf: str
    axes: str
    parts: tuple[str, ...] = ()


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
        tensors: by stored name, {} being the layer.
        windows: layers with a sliding window: none, all of them, or as layer_types says.
        window_rule: which layers have the window if layer_types is absent: (config.json, layer) -> bool.
        activations: names of nonlinearities that mean something else in this family.
        only: keys of config.json whose other values the decoder cannot do -> the values that it can.
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
    windows: Literal["none", "all", "types"] = "none"
    window_rule: Callable[[ConfigJson, int], bool] = lambda raw, layer: False
    activations: dict[str, str] = {}  # noqa: RUF012
    only: dict[str, tuple[object, ...]] = {}  # noqa: RUF012
    ignored: str = r"rotary_emb\.inv_freq$"


def _head_dim(raw: ConfigJson) -> int:
    return raw["hidden_size"] // raw["num_attention_heads"]


def _without(table: Mapping[str, _T], *keys: str) -> dict[str, _T]:
    return {key: value for key, value in table.items() if key not in keys}


QUERY, KEY, VALUE, GATE, UP = ("query",), ("key",), ("value",), ("gate",), ("up",)
_SCORE = {"score.weight": Tensor("score/kernel", "1 D"), "score.bias": Tensor("score/bias", "1")}
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
        "num_key_value_heads": lambda raw: raw["num_attention_heads"], "head_dim": _head_dim,
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
    config=_without(LLAMA.config, "qkv_bias", "out_bias", "mlp_bias"),
    defaults=LLAMA.defaults | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    windows="all",
)


QWEN2 = MISTRAL._replace(
    model_type="qwen2",
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    defaults=LLAMA.defaults | {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    fixed=LLAMA.fixed | {"qkv_bias": True},
    windows="types",
    window_rule=lambda raw, layer: layer >= raw.get("max_window_layers", 28),
)
QWEN3 = QWEN2._replace(
    model_type="qwen3",
    causal="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    config=_without(LLAMA.config, "mlp_bias"),
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
    config=_without(LLAMA.config, "mlp_bias"),
    defaults=LLAMA.defaults
    | {"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}
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
    | {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
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
    config=_without(GEMMA2.config, "attn_softcap"),  # transformers reads its key and does not apply it
    defaults=GEMMA2.defaults
    | {"max_position_embeddings": 131072, "final_logit_softcapping": None}
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
    fixed=GEMMA2.fixed | {"qk_norm": "head"},
    tensors=GEMMA2.tensors | {name: QWEN3.tensors[name] for name in QWEN3.tensors if name not in LLAMA.tensors},
    window_rule=lambda raw, layer: (layer + 1) % raw.get("sliding_window_pattern", 6) != 0,
)
_SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
PHI3 = LLAMA._replace(
    model_type="phi3",
    causal="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    config=MISTRAL.config,
    defaults=LLAMA.defaults | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0},
    tensors=_without(LLAMA.tensors, *(name for name in LLAMA.tensors if name.split(".")[-2] in _SPLIT))
    | {
        _LAYER + "self_attn.qkv_proj.weight": Tensor("layers/attn/qkv", "KGN D", (*QUERY, *KEY, *VALUE)),
        _LAYER + "mlp.gate_up_proj.weight": Tensor("layers/mlp/up", "MF D"),
    },
    windows="all",
)
OLMO2 = LLAMA._replace(
    model_type="olmo2",
    causal="Olmo2ForCausalLM",
    classifier="Olmo2ForSequenceClassification",
    config=_without(LLAMA.config, "mlp_bias"),
    defaults=LLAMA.defaults | {"rms_norm_eps": 1e-5},
    fixed=LLAMA.fixed | {"norm_position": "post", "qk_norm": "all"},
    tensors=_without(LLAMA.tensors, _LAYER + "input_layernorm.weight")
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
        "partial_rotary_factor": 0.25,
    },
    fixed={"norm": "layer", "positions": "rotary", "gated_mlp": False, "mlp_bias": True, "head_dim": _head_dim},
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
    ignored=r"rotary_emb\.inv_freq$|attention\.(masked_)?bias$",
)  # fmt: skip

FAMILIES = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, GPT2, GPT_NEOX)
}
"""By model_type; the first that can hold a shape is taken for a model with random weights."""
