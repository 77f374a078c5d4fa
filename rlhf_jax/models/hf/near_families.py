"""Tables of the families that have a part of their own: layers that do not turn, a shared norm, multipliers, ..."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_jax.models.hf.families import (
    EVEN_HEADS,
    GPT2,
    GPT_NEOX,
    LLAMA,
    MISTRAL,
    OLMO2,
    PHI3,
    QWEN3,
    STARCODER2,
    head_dim,
    head_dim_or,
    heads_or,
    without,
)
from rlhf_jax.models.hf.family import ConfigJson, Family, Tensor

_LAYER = "model.layers.{}."
_NORM_BIASES = {name: tensor for name, tensor in STARCODER2.tensors.items() if tensor.leaf.endswith("norm/bias")}
_TWO_MATRICES = {  # an MLP without a gate
    _LAYER + "mlp.up_proj.weight": Tensor("layers/mlp/up", "MF D"),
    _LAYER + "mlp.up_proj.bias": Tensor("layers/mlp/up_bias", "MF"),
    _LAYER + "mlp.down_proj.weight": Tensor("layers/mlp/down", "D F"),
    _LAYER + "mlp.down_proj.bias": Tensor("layers/mlp/down_bias", "D"),
}
_NO_GATE = without(LLAMA.tensors, *(name for name in LLAMA.tensors if ".mlp." in name)) | _TWO_MATRICES
_NO_MLP_BIAS = without(LLAMA.config, "mlp_bias")


def _named(family: Family, model_type: str, name: str, **changes: object) -> Family:
    """A family with changes and the names of its own."""
    names = {"causal": f"{name}ForCausalLM", "classifier": f"{name}ForSequenceClassification"}
    return family._replace(**{"model_type": model_type, **names, **changes})  # type: ignore[arg-type]


def _without_rotation(raw: ConfigJson, near: Sequence[int]) -> tuple[int, ...]:
    """SmolLM3: the layers with a 0 in no_rope_layers, by default every fourth."""
    layers, given = raw["num_hidden_layers"], raw.get("no_rope_layers")
    if given is None:
        return tuple(i for i in range(layers) if (i + 1) % raw.get("no_rope_layer_interval", 4) == 0)
    return tuple(i for i in range(layers) if not given[i])


def _wherever_no_window(raw: ConfigJson, near: Sequence[int]) -> tuple[int, ...]:
    """The layers with the full view."""
    return tuple(i for i in range(raw["num_hidden_layers"]) if i not in near)


SMOLLM3 = _named(
    LLAMA, "smollm3", "SmolLM3",
    defaults=LLAMA.defaults
    | {"num_key_value_heads": heads_or(4), "max_position_embeddings": 32768, "tie_word_embeddings": True},
    rotary={"rope_theta": ("rope_theta", 2e6)},
    windows="types",
    window_rule=lambda raw, layer: raw.get("use_sliding_window", False) and layer in _without_rotation(raw, ()),
    nope=_without_rotation,
    saved={
        "no_rope_layers": lambda arch: [int(i not in arch.nope_layers) for i in range(arch.num_layers)],
        "use_sliding_window": lambda arch: bool(arch.window_layers),
    },
)  # fmt: skip
EXAONE4 = _named(
    OLMO2, "exaone4", "Exaone4",
    config=without(_NO_MLP_BIAS, "qkv_bias", "out_bias"),
    defaults=OLMO2.defaults | {"num_key_value_heads": 32, "sliding_window": 4096},
    fixed=OLMO2.fixed | {"qk_norm": "head"},
    tensors=without(OLMO2.tensors, _LAYER + "self_attn.q_norm.weight", _LAYER + "self_attn.k_norm.weight")
    | {name: QWEN3.tensors[name] for name in QWEN3.tensors if name not in LLAMA.tensors},
    windows="types",
    window_rule=lambda raw, layer: (layer + 1) % raw.get("sliding_window_pattern", 4) != 0,
    nope=lambda raw, near: () if raw.get("sliding_window", 4096) is None else _wherever_no_window(raw, near),
    # A size, though no layer has a window, says that none turns; none, that all do.
    saved={"sliding_window": lambda arch: arch.sliding_window or (4096 if arch.nope_layers else None)},
)  # fmt: skip
GRANITE = _named(
    LLAMA, "granite", "Granite",
    config=LLAMA.config
    | {"embedding_multiplier": "embedding_multiplier", "residual_multiplier": "residual_multiplier"}
    | {"attention_multiplier": "attention_multiplier", "logit_multiplier": "logits_scaling"},
    defaults=LLAMA.defaults
    | {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0},
    inverse=("logit_multiplier",),
)  # fmt: skip
GLM = _named(
    LLAMA, "glm", "Glm",
    config=without(_NO_MLP_BIAS, "out_bias"),
    defaults=LLAMA.defaults
    | {"num_key_value_heads": 2, "head_dim": head_dim_or(128), "max_position_embeddings": 131072}
    | {"rms_norm_eps": 1.5625e-7, "attention_bias": True},
    fixed=LLAMA.fixed | {"rope_pairs": True},
    tensors=without(LLAMA.tensors, *(name for name in LLAMA.tensors if "gate_proj" in name or "up_proj" in name))
    | {name: tensor for name, tensor in PHI3.tensors.items() if "gate_up_proj" in name},
    rotary=LLAMA.rotary | {"rope_fraction": ("partial_rotary_factor", 0.5)},
)  # fmt: skip
GLM4 = _named(
    GLM, "glm4", "Glm4",
    fixed=GLM.fixed | {"norm_position": "both"},
    tensors=GLM.tensors
    | {
        _LAYER + "post_self_attn_layernorm.weight": Tensor("layers/attn_post_norm/scale", "D"),
        _LAYER + "post_mlp_layernorm.weight": Tensor("layers/mlp_post_norm/scale", "D"),
    },
)  # fmt: skip
COHERE = _named(
    LLAMA, "cohere", "Cohere",
    config=without(_NO_MLP_BIAS, "norm_eps") | {"norm_eps": "layer_norm_eps"}
    | {"logit_multiplier": "logit_scale"},
    defaults=without(LLAMA.defaults, "rms_norm_eps")
    | {"max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "tie_word_embeddings": True, "logit_scale": 0.0625},
    fixed=LLAMA.fixed | {"norm": "layer_no_bias", "rope_pairs": True, "parallel_residual": True, "shared_norm": True},
    tensors=without(LLAMA.tensors, _LAYER + "post_attention_layernorm.weight"),
    rotary={"rope_theta": ("rope_theta", 5e5)},
    only={"use_qk_norm": (False, None)},
)  # fmt: skip
COHERE2 = _named(
    COHERE, "cohere2", "Cohere2",
    defaults=COHERE.defaults | {"sliding_window": 4096},
    rotary=LLAMA.rotary,
    windows="types",
    window_rule=lambda raw, layer: (layer + 1) % raw.get("sliding_window_pattern", 4) != 0,
    nope=_wherever_no_window,
    only={},
)  # fmt: skip
PHI = _named(
    LLAMA, "phi", "Phi",
    config=without(LLAMA.config, "norm_eps", "qkv_bias", "out_bias", "mlp_bias") | {"norm_eps": "layer_norm_eps"},
    defaults=without(LLAMA.defaults, "rms_norm_eps") | {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new"},
    fixed={
        "norm": "layer", "positions": "rotary", "gated_mlp": False, "qkv_bias": True, "out_bias": True,
        "mlp_bias": True, "head_bias": True, "parallel_residual": True, "shared_norm": True,
    },
    tensors={
        name.replace("o_proj", "dense").replace("up_proj", "fc1").replace("down_proj", "fc2")
        .replace("model.norm", "model.final_layernorm"): tensor
        for name, tensor in (_NO_GATE | _NORM_BIASES).items()
        if "post_attention_layernorm" not in name
    } | {"lm_head.bias": Tensor("head/bias", "V")},
    rotary=LLAMA.rotary | {"rope_fraction": ("partial_rotary_factor", 0.5)},
    only={"qk_layernorm": (False,)},
)  # fmt: skip
STABLELM = _named(
    LLAMA, "stablelm", "StableLm",
    config=without(LLAMA.config, "norm_eps", "head_dim", "out_bias", "mlp_bias")
    | {"norm_eps": "layer_norm_eps", "qkv_bias": "use_qkv_bias"}
    | {"parallel_residual": "use_parallel_residual", "shared_norm": "use_parallel_residual"},
    defaults=without(LLAMA.defaults, "rms_norm_eps", "num_key_value_heads")
    | {"num_key_value_heads": 32, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "use_qkv_bias": False}
    | {"use_parallel_residual": False},
    fixed=LLAMA.fixed | {"norm": "layer", "head_dim": head_dim},
    tensors=LLAMA.tensors | _NORM_BIASES,
    rotary=LLAMA.rotary | {"rope_fraction": ("partial_rotary_factor", 0.25)},
    only=EVEN_HEADS | {"qk_layernorm": (False,)},
)  # fmt: skip


def _falcon_heads(raw: ConfigJson) -> object:
    if raw.get("multi_query", True) and not raw.get("new_decoder_architecture", False):
        return 1
    heads = raw.get("num_kv_heads")
    return raw["num_attention_heads"] if heads is None else heads


def _falcon_shares(raw: ConfigJson) -> bool:
    """Whether there is one norm; two are the default of the new architecture."""
    return not (raw.get("new_decoder_architecture", False) and raw.get("num_ln_in_parallel_attn") in (None, 2))


_BLOCK = "transformer.h.{}."
_FALCON_NAMES = {
    "gpt_neox.embed_in": "transformer.word_embeddings", "gpt_neox.final_layer_norm": "transformer.ln_f",
    "gpt_neox.layers.{}.": _BLOCK, "attention.": "self_attention.", "input_layernorm": "ln_attn",
    "post_attention_layernorm": "ln_mlp", "embed_out": "lm_head",
}  # fmt: skip


def _renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


FALCON = _named(
    GPT_NEOX, "falcon", "Falcon",
    prefix="transformer.",
    config={
        "vocab_size": "vocab_size", "width": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "ffn_width": "ffn_hidden_size", "max_positions": "max_position_embeddings",
        "norm_eps": "layer_norm_epsilon", "activation": "activation", "qkv_bias": "bias", "out_bias": "bias",
        "mlp_bias": "bias", "tied_head": "tie_word_embeddings", "init_std": "initializer_range",
    },
    defaults={
        "ffn_hidden_size": lambda raw: 4 * raw["hidden_size"], "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5, "activation": "gelu", "bias": False, "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
    fixed={
        "norm": "layer", "positions": "rotary", "gated_mlp": False, "head_dim": head_dim, "parallel_residual": True,
        "num_kv_heads": _falcon_heads, "shared_norm": _falcon_shares,
    },
    saved={
        "new_decoder_architecture": True, "parallel_attn": True, "alibi": False,
        "num_kv_heads": lambda arch: arch.num_kv_heads,
        "num_ln_in_parallel_attn": lambda arch: 1 if arch.shared_norm else 2,
    },
    tensors=_renamed(GPT_NEOX.tensors, _FALCON_NAMES),
    shared_names={_BLOCK + f"ln_attn.{kind}": _BLOCK + f"input_layernorm.{kind}" for kind in ("weight", "bias")},
    rotary=LLAMA.rotary,
    aliases={"n_embed": "hidden_size"},
    only={"alibi": (False, None), "parallel_attn": (True,), "num_ln_in_parallel_attn": (None, 1, 2)},
    renamed={},
)  # fmt: skip
NEMOTRON = _named(
    LLAMA, "nemotron", "Nemotron",
    config=without(LLAMA.config, "norm_eps") | {"norm_eps": "norm_eps"},
    defaults=without(LLAMA.defaults, "rms_norm_eps")
    | {"max_position_embeddings": 4096, "norm_eps": 1e-5, "hidden_act": "relu2", "initializer_range": 0.0134},
    fixed={"norm": "layer", "norm_offset": True, "positions": "rotary", "gated_mlp": False},
    tensors=_NO_GATE | _NORM_BIASES,
    rotary=LLAMA.rotary | {"rope_fraction": ("partial_rotary_factor", 0.5)},
)  # fmt: skip
ARCEE = _named(
    LLAMA, "arcee", "Arcee",
    defaults=LLAMA.defaults | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "relu2"},
    fixed=LLAMA.fixed | {"gated_mlp": False},
    tensors=_NO_GATE,
)  # fmt: skip
ERNIE4_5 = _named(
    LLAMA, "ernie4_5", "Ernie4_5",
    config=LLAMA.config | {"qkv_bias": "use_bias", "out_bias": "use_bias", "mlp_bias": "use_bias"},
    defaults=LLAMA.defaults
    | {"num_key_value_heads": heads_or(2), "head_dim": head_dim_or(128), "max_position_embeddings": 131072}
    | {"rms_norm_eps": 1e-5, "use_bias": False, "tie_word_embeddings": True},
    fixed=LLAMA.fixed | {"rope_pairs": True},
    rotary={"rope_theta": ("rope_theta", 5e5)},
)  # fmt: skip
MINISTRAL3 = _named(
    MISTRAL, "ministral3", "Ministral3",
    defaults=MISTRAL.defaults
    | {"head_dim": head_dim_or(128), "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "sliding_window": None},
    rotary=LLAMA.rotary | {"query_log_scale": ("", None)},
    scalings=("llama3", "yarn", "longrope"),
    default_rope={
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
    },
)  # fmt: skip
HUNYUAN = _named(
    LLAMA, "hunyuan_v1_dense", "HunYuanDenseV1",
    config=_NO_MLP_BIAS,
    defaults=LLAMA.defaults | {"rms_norm_eps": 1e-5},
    fixed=LLAMA.fixed | {"qk_norm": "turned"},
    tensors=LLAMA.tensors
    | {
        _LAYER + "self_attn.query_layernorm.weight": Tensor("layers/attn/q_norm/scale", "N"),
        _LAYER + "self_attn.key_layernorm.weight": Tensor("layers/attn/k_norm/scale", "N"),
    },
    scalings=(*LLAMA.scalings, "ntk"),
)  # fmt: skip

_OPT_LAYER = "model.decoder.layers.{}."
_OPT_NAMES = {
    "transformer.wte": "model.decoder.embed_tokens", "transformer.wpe": "model.decoder.embed_positions",
    "transformer.ln_f": "model.decoder.final_layer_norm",
}  # fmt: skip
_OPT_LAYER_NAMES = {
    _LAYER: _OPT_LAYER, "o_proj": "out_proj", "input_layernorm": "self_attn_layer_norm",
    "post_attention_layernorm": "final_layer_norm", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2",
}  # fmt: skip
OPT = _named(
    GPT2, "opt", "OPT",
    prefix="model.",
    config={
        "vocab_size": "vocab_size", "width": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "num_kv_heads": "num_attention_heads", "ffn_width": "ffn_dim",
        "max_positions": "max_position_embeddings", "activation": "activation_function", "qkv_bias": "enable_bias",
        "out_bias": "enable_bias", "mlp_bias": "enable_bias", "tied_head": "tie_word_embeddings",
        "init_std": "init_std",
    },
    defaults={
        "max_position_embeddings": 2048, "ffn_dim": 3072, "activation_function": "relu", "enable_bias": True,
        "tie_word_embeddings": True, "init_std": 0.02,
    },
    fixed={
        "norm": "layer", "norm_eps": 1e-5, "positions": "learned", "position_offset": 2, "gated_mlp": False,
        "head_dim": head_dim,
    },
    saved={"word_embed_proj_dim": lambda arch: arch.width},
    tensors=_renamed({name: t for name, t in GPT2.tensors.items() if not name.startswith(_BLOCK)}, _OPT_NAMES)
    | _renamed({n: t for n, t in (_NO_GATE | _NORM_BIASES).items() if n.startswith(_LAYER)}, _OPT_LAYER_NAMES),
    aliases={},
    only={
        "word_embed_proj_dim": lambda raw: (None, raw["hidden_size"]),
        "do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
    ignored=GPT_NEOX.ignored,
)  # fmt: skip


def _gptj_fraction(raw: ConfigJson) -> float:
    """rotary_dim as the part of a head whose product with its width is no less in floating point either."""
    heads = raw["n_embd"] // raw["n_head"]
    fraction = raw.get("rotary_dim", 64) / heads
    return fraction if int(heads * fraction) == raw.get("rotary_dim", 64) else math.nextafter(fraction, 2)


GPTJ = _named(
    GPT2, "gptj", "GPTJ",
    defaults=GPT2.defaults | {"n_positions": 2048, "tie_word_embeddings": False},
    fixed={
        "norm": "layer", "positions": "rotary", "gated_mlp": False, "mlp_bias": True, "head_bias": True,
        "parallel_residual": True, "shared_norm": True, "rope_pairs": True, "rope_fraction": _gptj_fraction,
        "head_dim": GPT2.fixed["head_dim"],
    },
    saved={"rotary_dim": lambda arch: arch.rotary_dim},
    tensors={name: t for name, t in GPT2.tensors.items() if not name.startswith(_BLOCK) or "ln_1" in name}
    | _renamed(
        {name: t for name, t in _NO_GATE.items() if name.startswith(_LAYER) and "norm" not in name},
        {_LAYER: _BLOCK, "self_attn": "attn", "o_proj": "out_proj", "up_proj": "fc_in", "down_proj": "fc_out"},
    )
    | {"lm_head.bias": Tensor("head/bias", "V")},
    rotary={},
    only={},
)  # fmt: skip

NEAR = (
    *(SMOLLM3, EXAONE4, GRANITE, GLM, GLM4, COHERE, COHERE2, PHI, STABLELM, FALCON, NEMOTRON, ARCEE, ERNIE4_5),
    *(MINISTRAL3, HUNYUAN, OPT, GPTJ),
)
