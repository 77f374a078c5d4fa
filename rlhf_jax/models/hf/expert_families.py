"""The tables of families with experts (`experts.py` of the decoder)."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_jax.models.hf.families import GATE, LLAMA, MISTRAL, OLMO2, QWEN3, UP, head_dim, heads_or, without
from rlhf_jax.models.hf.family import Tensor

_LAYER = "model.layers.{}."
_EXPERT = _LAYER + "mlp.experts.{}."


def _sparse(dense: Mapping[str, Tensor], router: str, gate: str, up: str, down: str) -> dict[str, Tensor]:
    """Tensors with experts, named so, in place of the MLP."""
    kept = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    return kept | {
        router + ".weight": Tensor("layers/experts/router", "E D"),
        gate + ".weight": Tensor("layers/experts/up", "MF D", GATE),
        up + ".weight": Tensor("layers/experts/up", "MF D", UP),
        down + ".weight": Tensor("layers/experts/down", "D F"),
    }


_MLP = (_LAYER + "mlp.gate", *(_EXPERT + name for name in ("gate_proj", "up_proj", "down_proj")))
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
    only={"clip_qkv": (None,)},
)

EXPERTS = (QWEN3_MOE, MIXTRAL, OLMOE)
