"""Makes FAMILY.npz: what transformers computes for tiny random models, for tests that have no torch.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 && peer/bin/pip install transformers==5.23.0 safetensors
    peer/bin/python tests/golden/make_families.py [CASE ...]

Without arguments all of CASES, else those named (their files keep the other cases). FAMILY/CASE is stored in
FAMILY.npz under these keys (float32, int64 ids; B=3 rows, S=12 left-padded tokens, T=8 new ones):
    CASE/config            config.json as bytes (uint8), as save_pretrained writes it or as files of the Hub look
    CASE/weights           model.safetensors as bytes, as save_pretrained writes it
    CASE/input_ids         [B, S]; the padding id also occurs as a real token
    CASE/attention_mask    [B, S]
    CASE/logits            [B, S, V], zero where attention_mask is zero
    CASE/logprob           mean of log p(token t+1 | tokens up to t) over pairs of real tokens t, t+1
    CASE/gradients         safetensors as bytes: gradients of that mean with respect to some of the stored tensors
    CASE/generated         [B, T] greedy continuation with the cache of `generate`, no stop token; where the rotary
                           law depends on length, by the law of S + T tokens from the first token on
    CASE/margin            smallest lead of a greedily chosen logit over the next best
and for classifiers, instead of the last five: CASE/scores [B], the score at the last token, which is not pad_token_id.

Attention is "eager", the one implementation that has soft-caps. Matrices are multiples of 1/32, which makes the files
a third as large; vectors are not, so that a norm offset which is folded in and out again cannot be bit-equal.

What transformers does that one might not expect:
  * Rope kind "dynamic" takes the longest row of the batch, so rows influence one another. It keeps its frequencies in
    the module until a longer text or one below max_position_embeddings comes, so results depend on what ran before:
    here every computation starts from a fresh copy. In `generate` cached keys keep the rotation of the length at which
    they were written, so that its tokens are of no law that a forward pass could have.
  * Rope kind "longrope" switches to the long factors by the longest row, too. When `generate` crosses
    original_max_position_embeddings, Phi3 throws its cache away and computes all of it again: the tokens before are of
    another law than those after.
  * Gemma3 reads attn_logit_softcapping but never applies it.
  * A classifier takes the last token that is not pad_token_id, so that id may stand within a text, not at its end. An
    embedding with a pad_token_id has no gradient in that row, so language models are made without one.
  * GPT-NeoX has its head as lm_head in memory and as embed_out in files.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

PAD, LENGTHS, NEW_TOKENS = 0, (12, 5, 9), 8
LEAST_MARGIN, LEAST_VARIETY = 2e-3, 3  # of logits; of tokens in a continuation, many of which repeat one token


EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


class Case(NamedTuple):
    """One model: what its config.json says."""

    settings: dict[str, Any]
    as_written: bool = False  # store these settings, the dialect of the Hub, not what save_pretrained makes of them


TOKENS = {"vocab_size": 37, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
SCORE = {"num_labels": 1, "pad_token_id": PAD}
SHAPE = TOKENS | {
    "hidden_size": 24, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-4,
}  # fmt: skip

# Of yarn, and of llama3, whose wavelengths at theta 100 are 6.3 (kept, below 8), 20 (blended), 63 and 199 (divided).
SHORT = {"factor": 4.0, "original_max_position_embeddings": 8}
BANDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def _rope(kind: str, theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def _llama() -> dict[str, Case]:
    shape = SHAPE | {"model_type": "llama"}
    beta = {"beta_fast": 1.0, "beta_slow": 0.05}  # a ramp of several steps; the defaults 32 and 1 leave one
    return {
        "gqa_tied": Case(shape | _rope("default", 500.0) | {"head_dim": 8, "tie_word_embeddings": True}),
        "bias_untied": Case(
            shape | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}
        ),
        "mqa_wide": Case(
            shape | {"num_key_value_heads": 1, "head_dim": 10, "attention_bias": True}
            | {"hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.3}
        ),
        "smollm": Case(
            shape | {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
            | {"rope_theta": 100000.0, "rope_scaling": None},
            as_written=True,
        ),
        "rope_linear": Case(shape | _rope("linear", 30.0, factor=2.5) | {"head_dim": 8}),
        "rope_linear_old": Case(
            shape | {"head_dim": 8, "rope_theta": 30.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
            as_written=True,
        ),
        "rope_dynamic": Case(
            shape | _rope("dynamic", 40.0, factor=2.0) | {"head_dim": 8, "max_position_embeddings": 8}
        ),
        "rope_llama3": Case(shape | _rope("llama3", 100.0, **BANDS) | {"head_dim": 8}),
        "rope_llama3_old": Case(
            shape | {"head_dim": 8, "eos_token_id": [2, 3], "tie_word_embeddings": True, "rope_theta": 100.0}
            | {"rope_scaling": {"rope_type": "llama3", **BANDS, "factor": 3.0}},
            as_written=True,
        ),
        "rope_yarn": Case(shape | _rope("yarn", 90.0, **SHORT) | {"head_dim": 8}),
        "rope_yarn_factors": Case(
            shape | _rope("yarn", 90.0, **SHORT, **beta, attention_factor=1.3) | {"head_dim": 8}
        ),
        "rope_yarn_mscale": Case(
            shape | _rope("yarn", 90.0, **SHORT, **beta, truncate=False, mscale=1.5, mscale_all_dim=0.4)
            | {"head_dim": 8}
        ),
        "score": Case(shape | SCORE | _rope("default", 70.0) | {"head_dim": 8}),
    }  # fmt: skip


def _mistral() -> dict[str, Case]:
    shape = SHAPE | {"model_type": "mistral", "head_dim": 8}
    return {
        "window": Case(shape | _rope("default", 300.0) | {"sliding_window": 5}),
        "window_old": Case(
            shape | {"rope_theta": 200.0, "sliding_window": 3, "tie_word_embeddings": True}, as_written=True
        ),
        "mqa": Case(
            shape | _rope("linear", 40.0, factor=2.0) | {"num_key_value_heads": 1, "head_dim": 10}
            | {"hidden_act": "gelu", "rms_norm_eps": 1e-3, "sliding_window": None}
        ),
        "yarn_old": Case(
            shape | {"rope_theta": 90.0, "rope_scaling": {"type": "yarn", **SHORT}, "sliding_window": 4},
            as_written=True,
        ),
        "llama3": Case(
            shape | _rope("llama3", 100.0, **BANDS) | {"num_key_value_heads": 4, "num_hidden_layers": 3}
            | {"sliding_window": 6, "hidden_act": "relu"}
        ),
        "score": Case(shape | SCORE | {"sliding_window": None}),
    }  # fmt: skip


def _qwen() -> dict[str, Case]:
    two = SHAPE | {"model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4}
    three = two | {"model_type": "qwen3", "head_dim": 8}
    mixed = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return {
        "qwen2/window": Case(two | _rope("default", 400.0) | {"max_window_layers": 1}),
        "qwen2/window_old": Case(
            two | {"rope_theta": 600.0, "max_window_layers": 2, "head_dim": 8, "tie_word_embeddings": True},
            as_written=True,
        ),
        "qwen2/yarn": Case(
            two | {"use_sliding_window": False, "rope_theta": 80.0, "num_hidden_layers": 2}
            | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
            as_written=True,
        ),
        "qwen2/mqa": Case(
            two | mixed | _rope("llama3", 100.0, **BANDS)
            | {"num_key_value_heads": 1, "hidden_act": "gelu", "rms_norm_eps": 1e-3}
        ),
        "qwen2/rope_dynamic": Case(
            two | _rope("dynamic", 40.0, factor=2.0)
            | {"max_position_embeddings": 8, "head_dim": 10, "max_window_layers": 0, "num_hidden_layers": 2}
        ),
        "qwen2/score": Case(two | SCORE | {"use_sliding_window": False, "num_hidden_layers": 2}),
        "qwen3/tied": Case(
            three | {"rope_theta": 700.0, "max_window_layers": 3, "use_sliding_window": False}
            | {"sliding_window": None, "tie_word_embeddings": True, "num_hidden_layers": 2},
            as_written=True,
        ),
        "qwen3/bias_window": Case(three | _rope("default", 50.0) | mixed | {"attention_bias": True}),
        "qwen3/mqa_old": Case(
            three | {"rope_theta": 40.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 10}
            | {"num_key_value_heads": 1, "hidden_act": "gelu_new", "max_window_layers": 2},
            as_written=True,
        ),
        "qwen3/yarn": Case(three | _rope("yarn", 90.0, **SHORT) | {"max_window_layers": 1, "rms_norm_eps": 1e-3}),
        "qwen3/deep": Case(
            three | _rope("llama3", 100.0, **BANDS) | {"num_hidden_layers": 4, "max_window_layers": 0}
            | {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}
        ),
        "qwen3/score": Case(three | SCORE | {"max_window_layers": 1, "sliding_window": 6}),
    }  # fmt: skip


def _gemma() -> dict[str, Case]:
    one = SHAPE | {"model_type": "gemma", "head_dim": 8}
    two = one | {"model_type": "gemma2", "num_hidden_layers": 3, "query_pre_attn_scalar": 10, "sliding_window": 5}
    two |= {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
    three = two | {"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None}
    local = {"rope_type": "default", "rope_theta": 40.0}
    whole = {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.5}
    nested = {"rope_parameters": {"sliding_attention": local, "full_attention": whole}}
    mixed = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    yarn = {"rope_type": "yarn", "rope_theta": 90.0, **SHORT, "attention_factor": 1.2}
    return {
        "gemma/bias": Case(one | _rope("default", 60.0) | {"attention_bias": True, "hidden_act": "silu"}),
        # In Gemma 1 "gelu" means the tanh approximation, whatever hidden_activation says.
        "gemma/gelu_old": Case(
            one | {"num_key_value_heads": 1, "rope_theta": 90.0, "hidden_act": "gelu", "hidden_activation": None},
            as_written=True,
        ),
        "gemma/score": Case(one | SCORE | {"tie_word_embeddings": False}),
        "gemma/wide": Case(
            one | _rope("linear", 40.0, factor=2.0) | {"head_dim": 10, "num_key_value_heads": 4}
            | {"tie_word_embeddings": False, "num_hidden_layers": 3}
        ),
        "gemma/yarn_old": Case(
            one | {"rope_theta": 90.0, "rope_scaling": {"type": "yarn", **SHORT}, "attention_bias": True}
            | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
            as_written=True,
        ),
        "gemma/llama3": Case(
            one | _rope("llama3", 100.0, **BANDS)
            | {"hidden_act": "relu", "rms_norm_eps": 1e-2, "num_key_value_heads": 1}
        ),
        "gemma2/caps": Case(two | _rope("default", 60.0) | {"hidden_activation": "gelu"}),
        "gemma2/caps_old": Case(
            two | {"rope_theta": 90.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
            | {"attention_bias": True, "query_pre_attn_scalar": 3, "sliding_window": 4},
            as_written=True,
        ),
        "gemma2/nocaps": Case(
            two | mixed
            | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}
        ),
        "gemma2/score": Case(two | SCORE),
        "gemma2/mqa": Case(
            two | mixed | _rope("linear", 40.0, factor=2.0) | {"num_key_value_heads": 1, "head_dim": 10}
            | {"final_logit_softcapping": None, "rms_norm_eps": 1e-2, "attention_bias": True}
        ),
        "gemma2/yarn_old": Case(
            two | {"rope_theta": 90.0, "rope_scaling": {"type": "yarn", **SHORT}, "hidden_activation": "silu"}
            | {"attn_logit_softcapping": None, "query_pre_attn_scalar": 24, "num_hidden_layers": 2},
            as_written=True,
        ),
        "gemma3_text/layers": Case(three | nested | mixed | {"final_logit_softcapping": 2.0, "attention_bias": True}),
        "gemma3_text/layers_old": Case(
            three | {"rope_theta": 800.0, "rope_local_base_freq": 30.0, "sliding_window_pattern": 2}
            | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "sliding_window": 4},
            as_written=True,
        ),
        "gemma3_text/score": Case(three | SCORE | nested | mixed),
        "gemma3_text/mqa": Case(
            three | mixed | {"rope_parameters": {"sliding_attention": local, "full_attention": yarn}}
            | {"num_key_value_heads": 1, "head_dim": 10, "query_pre_attn_scalar": 24, "rms_norm_eps": 1e-2}
        ),
        "gemma3_text/untied_old": Case(
            three | {"rope_theta": 60.0, "rope_local_base_freq": 20.0, "sliding_window_pattern": 3}
            | {"num_hidden_layers": 4, "tie_word_embeddings": False, "hidden_activation": "silu"},
            as_written=True,
        ),
        "gemma3_text/full": Case(
            three | nested | {"layer_types": ["full_attention"] * 3, "num_key_value_heads": 4}
            | {"hidden_activation": "gelu", "attention_bias": True}
        ),
    }  # fmt: skip


def _phi3() -> dict[str, Case]:
    shape = SHAPE | {"model_type": "phi3", "hidden_size": 32, "intermediate_size": 14}
    partial = shape | _rope("default", 50.0, partial_rotary_factor=0.5)
    factors = {"short_factor": [1.0, 1.3, 1.9], "long_factor": [1.5, 2.5, 4.0]}
    long = shape | _rope("longrope", 60.0, partial_rotary_factor=0.75, **factors)
    old = {"rope_theta": 60.0, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", **factors}}
    return {
        "window": Case(partial | {"sliding_window": 5}),
        "partial_old": Case(
            shape | {"rope_theta": 50.0, "partial_rotary_factor": 0.5, "rope_scaling": None, "sliding_window": None}
            | {"original_max_position_embeddings": 64, "tie_word_embeddings": True},
            as_written=True,
        ),
        "longrope_short": Case(long | {"original_max_position_embeddings": 24}),  # 12 + 8 tokens stay below
        "longrope_long": Case(long | {"original_max_position_embeddings": 8}),
        "longrope_crossed": Case(long | {"original_max_position_embeddings": 14}),  # 12 below, 12 + 8 above
        "longrope_long_old": Case(
            shape | old | {"original_max_position_embeddings": 10, "sliding_window": 7}, as_written=True
        ),
        "score": Case(partial | SCORE),
    }  # fmt: skip


def _olmo2() -> dict[str, Case]:
    shape = SHAPE | {"model_type": "olmo2"}
    return {
        "post_norm": Case(shape | _rope("default", 500.0) | {"attention_bias": True}),
        "wide_old": Case(
            shape | {"head_dim": 8, "rope_theta": 300.0, "rope_scaling": None, "tie_word_embeddings": True},
            as_written=True,
        ),
        "mqa": Case(
            shape | _rope("linear", 40.0, factor=2.0) | {"num_key_value_heads": 1, "hidden_act": "gelu"}
            | {"rms_norm_eps": 1e-2, "num_hidden_layers": 3}
        ),
        "yarn_old": Case(
            shape | {"rope_theta": 90.0, "rope_scaling": {"type": "yarn", **SHORT}, "num_key_value_heads": None},
            as_written=True,
        ),
        "llama3": Case(
            shape | _rope("llama3", 100.0, **BANDS) | {"head_dim": 10, "attention_bias": True}
            | {"tie_word_embeddings": True, "hidden_act": "relu"}
        ),
        "score": Case(shape | SCORE),
    }  # fmt: skip


def _near() -> dict[str, Case]:
    """Families that differ from those above in settings alone."""
    mixed = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "num_hidden_layers": 3}
    ministral = SHAPE | {"model_type": "ministral", "head_dim": 8, "sliding_window": 4} | mixed
    seed = SHAPE | {"model_type": "seed_oss", "head_dim": 8}
    olmo = SHAPE | {"model_type": "olmo3", "sliding_window": 4, "num_hidden_layers": 4}
    short = {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 1.0, "beta_slow": 0.05}
    yarn = {"rope_type": "yarn", "rope_theta": 90.0, "attention_factor": 1.2, **short}
    by_layer = {"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 40.0}}
    cwm = SHAPE | {"model_type": "cwm", "head_dim": 8, "sliding_window": 5} | mixed
    vault = SHAPE | {"model_type": "vaultgemma", "head_dim": 8, "num_hidden_layers": 3, "query_pre_attn_scalar": 10}
    vault |= {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "sliding_window": 5}
    coder = SHAPE | {"model_type": "starcoder2", "norm_epsilon": 1e-3}
    return {
        "ministral/mixed": Case(ministral | _rope("default", 300.0)),
        # A Mistral that says layer_types, null even, is a Ministral to transformers.
        "ministral/as_mistral": Case(
            ministral | {"model_type": "mistral", "rope_theta": 200.0, "tie_word_embeddings": True}, as_written=True
        ),
        "ministral/yarn": Case(ministral | _rope("yarn", 90.0, **short) | {"num_key_value_heads": 1}),
        "ministral/score": Case(ministral | SCORE),
        "seed_oss/out_bias": Case(
            seed | _rope("default", 500.0) | {"attention_out_bias": True, "mlp_bias": True, "attention_bias": False}
        ),
        "seed_oss/defaults_old": Case(
            seed | {"rope_theta": 300.0, "num_key_value_heads": None, "tie_word_embeddings": True}, as_written=True
        ),
        "seed_oss/score": Case(seed | SCORE | _rope("linear", 30.0, factor=2.5)),
        "olmo3/yarn": Case(olmo | {"rope_parameters": by_layer, "attention_bias": True}),
        "olmo3/yarn_old": Case(
            olmo | {"rope_theta": 500000, "rope_scaling": {"rope_type": "yarn", **short}, "head_dim": 8}
            | {"tie_word_embeddings": True},
            as_written=True,
        ),
        "olmo3/mixed": Case(olmo | mixed | {"rope_theta": 70.0, "num_key_value_heads": 4}),
        "olmo3/score": Case(olmo | mixed | SCORE),
        "cwm/mixed": Case(cwm | _rope("llama3", 100.0, **BANDS) | {"mlp_bias": True}),
        "cwm/defaults_old": Case(
            cwm | {"layer_types": None, "num_hidden_layers": 5, "tie_word_embeddings": True}, as_written=True
        ),
        "cwm/plain": Case(cwm | _rope("default", 60.0) | {"num_key_value_heads": 4, "sliding_window": 3}),
        "vaultgemma/caps": Case(vault | _rope("default", 60.0) | {"hidden_activation": "gelu"}),
        "vaultgemma/caps_old": Case(
            vault | {"rope_theta": 90.0, "attention_bias": True, "query_pre_attn_scalar": 3, "sliding_window": 4},
            as_written=True,
        ),
        "vaultgemma/nocaps": Case(
            vault | mixed | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
            | {"tie_word_embeddings": False}
        ),
        "starcoder2/window": Case(coder | _rope("default", 300.0) | {"sliding_window": 5}),
        "starcoder2/plain_old": Case(
            coder | {"rope_theta": 200.0, "use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"},
            as_written=True,
        ),
        "starcoder2/wide": Case(
            coder | _rope("linear", 40.0, factor=2.0) | {"num_key_value_heads": 1, "head_dim": 10}
        ),
        "starcoder2/score": Case(coder | SCORE | {"sliding_window": 4}),
        "ministral/llama3_old": Case(
            ministral | {"rope_theta": 100.0, "rope_scaling": {"rope_type": "llama3", **BANDS}, "layer_types": None}
            | {"num_hidden_layers": 2}, as_written=True,
        ),
        "ministral/full": Case(
            ministral | _rope("linear", 40.0, factor=2.0) | {"layer_types": ["full_attention"] * 3, "head_dim": 10}
        ),
        "seed_oss/yarn": Case(seed | _rope("yarn", 90.0, **short) | {"num_key_value_heads": 1}),
        "seed_oss/mlp_bias_old": Case(
            seed | {"rope_theta": 70.0, "mlp_bias": True, "rope_scaling": {"type": "linear", "factor": 3.0}},
            as_written=True,
        ),
        "seed_oss/gelu": Case(seed | {"hidden_act": "gelu", "attention_out_bias": True, "num_hidden_layers": 3}),
        "olmo3/mqa": Case(olmo | mixed | {"num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-3}),
        "olmo3/full_old": Case(
            olmo | {"rope_theta": 300.0, "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
            as_written=True,
        ),
        "cwm/yarn": Case(cwm | _rope("yarn", 90.0, **short) | {"num_key_value_heads": 1}),
        "cwm/linear_old": Case(
            cwm | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 50.0, "hidden_act": "gelu"},
            as_written=True,
        ),
        "cwm/wide": Case(cwm | _rope("llama3", 100.0, **BANDS) | {"head_dim": 10, "rms_norm_eps": 1e-3}),
        "vaultgemma/mqa": Case(vault | mixed | {"num_key_value_heads": 1, "final_logit_softcapping": None}),
        "vaultgemma/linear_old": Case(
            vault | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 70.0}, as_written=True
        ),
        "vaultgemma/wide": Case(vault | _rope("default", 80.0) | {"head_dim": 10, "attn_logit_softcapping": 3.0}),
        "starcoder2/hub_old": Case(
            coder | {"rope_theta": 400.0, "sliding_window": 4, "use_bias": True, "activation_function": "gelu"}
            | {"attention_softmax_in_fp32": True, "layer_norm_epsilon": 1e-5, "norm_type": "layer_norm"},
            as_written=True,
        ),
        "starcoder2/yarn": Case(coder | _rope("yarn", 90.0, **short) | {"num_key_value_heads": 4}),
    }  # fmt: skip


def _parts() -> dict[str, Case]:
    """Families with a part of their own."""
    smol, exaone = SHAPE | {"model_type": "smollm3"}, SHAPE | {"model_type": "exaone4", "num_hidden_layers": 3}
    mixed = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "num_hidden_layers": 3}
    every_second = {"num_hidden_layers": 3, "no_rope_layer_interval": 2}
    old_yarn, old_linear = {"type": "yarn", **SHORT}, {"type": "linear", "factor": 2.5}
    granite = SHAPE | {"model_type": "granite", "embedding_multiplier": 3.0, "attention_multiplier": 0.5}
    granite |= {"residual_multiplier": 0.6, "logits_scaling": 0.7}
    glm, glm4 = (SHAPE | {"model_type": name, "head_dim": 8} for name in ("glm", "glm4"))
    eps = {key: value for key, value in SHAPE.items() if key != "rms_norm_eps"} | {"layer_norm_eps": 1e-3}
    cohere, cohere2 = (eps | {"model_type": name, "logit_scale": 0.8} for name in ("cohere", "cohere2"))
    cohere2 |= {"num_hidden_layers": 3, "sliding_window": 4, "sliding_window_pattern": 2}
    phi, stable = eps | {"model_type": "phi", "hidden_size": 32}, eps | {"model_type": "stablelm", "hidden_size": 32}
    return {
        "smollm3/interval": Case(smol | every_second | _rope("default", 500.0)),
        "smollm3/hub_old": Case(
            smol | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4}
            | {"rope_theta": 5000.0, "rope_scaling": None, "use_sliding_window": False, "sliding_window": None}
            | {"layer_types": ["full_attention"] * 4, "max_window_layers": 28, "attention_bias": False},
            as_written=True,
        ),
        "smollm3/window": Case(
            smol | every_second | _rope("default", 60.0) | {"use_sliding_window": True, "sliding_window": 4}
        ),
        "smollm3/mixed": Case(
            smol | mixed | {"no_rope_layers": [0, 1, 0], "sliding_window": 5, "attention_bias": True}
            | {"mlp_bias": True, "tie_word_embeddings": False}
        ),
        "smollm3/yarn_old": Case(
            smol | {"rope_theta": 90.0, "rope_scaling": old_yarn, "no_rope_layers": [1, 0], "head_dim": 8},
            as_written=True,
        ),
        "smollm3/score": Case(smol | SCORE | every_second),
        "exaone4/hybrid": Case(exaone | _rope("default", 300.0) | {"sliding_window": 4, "sliding_window_pattern": 3}),
        "exaone4/full_old": Case(  # the 1.2B
            exaone | {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 3}
            | {"rope_theta": 100.0, "rope_scaling": {"rope_type": "llama3", **BANDS}, "tie_word_embeddings": True},
            as_written=True,
        ),
        "exaone4/hybrid_old": Case(
            exaone | mixed | {"sliding_window": 5, "sliding_window_pattern": "LLG", "rope_theta": 70.0, "head_dim": 8},
            as_written=True,
        ),
        "exaone4/nowhere": Case(exaone | {"layer_types": ["full_attention"] * 3, "sliding_window": 4}),
        "exaone4/mqa": Case(exaone | mixed | _rope("yarn", 90.0, **SHORT) | {"num_key_value_heads": 1}),
        "exaone4/score": Case(exaone | mixed | SCORE | {"sliding_window": 4}),
        "granite/multipliers": Case(granite | _rope("default", 500.0)),
        "granite/hub_old": Case(
            granite | {"rope_theta": 300.0, "rope_scaling": None, "logits_scaling": 3, "attention_multiplier": 0.25}
            | {"embedding_multiplier": 12, "tie_word_embeddings": True, "attention_bias": False},
            as_written=True,
        ),
        "granite/bias": Case(granite | {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 1.0}),
        "granite/plain": Case(SHAPE | {"model_type": "granite", "num_key_value_heads": None, "num_hidden_layers": 3}),
        "granite/yarn": Case(granite | _rope("yarn", 90.0, **SHORT) | {"head_dim": 8, "num_key_value_heads": 1}),
        "granite/gelu": Case(granite | _rope("linear", 40.0, factor=2.0) | {"hidden_act": "gelu"}),
        "glm/half": Case(glm | _rope("default", 50.0, partial_rotary_factor=0.5)),
        "glm/half_old": Case(glm | {"rope_theta": 60.0, "attention_bias": False}, as_written=True),
        "glm/whole": Case(glm | _rope("default", 50.0, partial_rotary_factor=1.0) | {"tie_word_embeddings": True}),
        "glm/linear_old": Case(
            glm | {"rope_theta": 40.0, "partial_rotary_factor": 0.25, "rope_scaling": old_linear}, as_written=True
        ),
        "glm/mqa": Case(glm | {"num_key_value_heads": 1, "hidden_act": "gelu", "num_hidden_layers": 3}),
        "glm/score": Case(glm | SCORE),
        "glm4/half": Case(glm4 | _rope("default", 50.0, partial_rotary_factor=0.5)),
        "glm4/half_old": Case(
            glm4 | {"rope_theta": 60.0, "partial_rotary_factor": 0.5, "attention_bias": False}, as_written=True
        ),
        "glm4/whole": Case(glm4 | _rope("yarn", 90.0, partial_rotary_factor=1.0, **SHORT)),
        "glm4/tied_old": Case(
            glm4 | {"rope_theta": 40.0, "tie_word_embeddings": True, "rope_scaling": old_linear}, as_written=True
        ),
        "glm4/wide": Case(glm4 | {"num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-3}),
        "glm4/score": Case(glm4 | SCORE | {"num_key_value_heads": 1}),
        "cohere/shared": Case(cohere | _rope("default", 300.0)),
        "cohere/hub_old": Case(
            cohere | {"rope_theta": 80.0, "use_qk_norm": False, "logit_scale": 0.0625, "num_key_value_heads": 4},
            as_written=True,
        ),
        "cohere/bias": Case(cohere | _rope("linear", 40.0, factor=2.0) | {"attention_bias": True, "logit_scale": 1.0}),
        "cohere/untied": Case(cohere | {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        "cohere/deep_old": Case(cohere | {"num_hidden_layers": 3, "hidden_act": "gelu"}, as_written=True),
        "cohere/yarn": Case(cohere | _rope("yarn", 90.0, **SHORT) | {"num_key_value_heads": None}),
        "cohere2/windows": Case(cohere2 | _rope("default", 300.0)),
        "cohere2/hub_old": Case(
            cohere2 | {"rope_theta": 80.0, "sliding_window_pattern": 3, "layer_switch": 3, "rotary_pct": 1.0}
            | {"use_gated_activation": True, "use_parallel_block": True, "position_embedding_type": "rope_gptj"},
            as_written=True,
        ),
        "cohere2/mixed": Case(cohere2 | mixed | {"attention_bias": True, "sliding_window": 5}),
        "cohere2/untied": Case(cohere2 | mixed | {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        "cohere2/nowhere": Case(cohere2 | {"layer_types": ["full_attention"] * 3, "logit_scale": 0.3}),
        "cohere2/yarn": Case(cohere2 | _rope("yarn", 90.0, **SHORT) | {"layer_types": ["sliding_attention"] * 3}),
        "phi/half": Case(phi | _rope("default", 50.0, partial_rotary_factor=0.5)),
        "phi/hub_old": Case(
            phi | {"rope_theta": 60.0, "partial_rotary_factor": 0.5, "rope_scaling": None, "qk_layernorm": False}
            | {"embd_pdrop": 0.0, "resid_pdrop": 0.1, "num_key_value_heads": 4},
            as_written=True,
        ),
        "phi/tied": Case(phi | {"tie_word_embeddings": True, "hidden_act": "gelu"}),
        "phi/quarter_old": Case(phi | {"partial_rotary_factor": 0.25, "rope_theta": 40.0}, as_written=True),
        "phi/whole": Case(phi | _rope("linear", 40.0, factor=2.0, partial_rotary_factor=1.0)),
        "phi/score": Case(phi | SCORE),
        "stablelm/quarter": Case(stable | _rope("default", 50.0, partial_rotary_factor=0.25)),
        "stablelm/hub_old": Case(
            stable | {"rope_theta": 60.0, "partial_rotary_factor": 0.5, "use_qkv_bias": True, "rotary_scaling": 1.0},
            as_written=True,
        ),
        "stablelm/parallel": Case(stable | {"use_parallel_residual": True, "use_qkv_bias": True}),
        "stablelm/parallel_old": Case(
            stable | {"use_parallel_residual": True, "rope_theta": 40.0, "tie_word_embeddings": True}, as_written=True
        ),
        "stablelm/whole": Case(stable | _rope("yarn", 90.0, partial_rotary_factor=1.0, **SHORT)),
        "stablelm/score": Case(stable | SCORE | {"num_key_value_heads": 4}),
    }  # fmt: skip


def _more_parts() -> dict[str, Case]:
    short = {"factor": 4.0, "original_max_position_embeddings": 4, "beta_fast": 2.0}
    falcon = TOKENS | {"model_type": "falcon", "hidden_size": 32, "ffn_hidden_size": 18, "num_attention_heads": 4}
    falcon |= {"num_hidden_layers": 2, "layer_norm_epsilon": 1e-3, "max_position_embeddings": 64}
    new = falcon | {"new_decoder_architecture": True, "num_kv_heads": 2}
    eps = {key: value for key, value in SHAPE.items() if key != "rms_norm_eps"}
    nemotron = eps | {"model_type": "nemotron", "norm_eps": 1e-3, "head_dim": 8}
    arcee = SHAPE | {"model_type": "arcee"}
    ernie, hunyuan = (SHAPE | {"model_type": name, "head_dim": 8} for name in ("ernie4_5", "hunyuan_v1_dense"))
    alpha = {"type": "dynamic", "alpha": 50.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0, "mscale_all_dim": 0.0}
    three = SHAPE | {"model_type": "ministral3", "head_dim": 8}
    scaled = {"rope_type": "yarn", "rope_theta": 100.0, "llama_4_scaling_beta": 0.5, **short}
    opt = TOKENS | {"model_type": "opt", "hidden_size": 24, "ffn_dim": 14, "num_attention_heads": 4}
    opt |= {"num_hidden_layers": 2, "max_position_embeddings": 24, "word_embed_proj_dim": 24}
    gptj = TOKENS | {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 24, "n_inner": 18}
    gptj |= {"rotary_dim": 6, "layer_norm_epsilon": 1e-3}
    return {
        "falcon/new": Case(new | _rope("default", 300.0)),
        "falcon/40b_old": Case(
            new | {"rope_theta": 80.0, "alibi": False, "bias": False, "parallel_attn": True, "multi_query": True},
            as_written=True,
        ),
        "falcon/11b_old": Case(
            new | {"num_ln_in_parallel_attn": 1, "bias": True, "activation": "relu"}, as_written=True
        ),
        "falcon/7b_old": Case(
            falcon | {"alibi": False, "bias": False, "multi_query": True, "parallel_attn": True, "rope_theta": 60.0},
            as_written=True,
        ),
        "falcon/heads": Case(falcon | {"multi_query": False, "tie_word_embeddings": False}),
        "falcon/score": Case(new | SCORE | {"num_ln_in_parallel_attn": 1}),
        "nemotron/half": Case(nemotron | _rope("default", 50.0, partial_rotary_factor=0.5)),
        "nemotron/hub_old": Case(
            nemotron | {"rope_theta": 60.0, "partial_rotary_factor": 0.5, "mlp_bias": False, "num_hidden_layers": 3},
            as_written=True,
        ),
        "nemotron/bias": Case(nemotron | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        "nemotron/whole_old": Case(
            nemotron | {"partial_rotary_factor": 1.0, "rope_theta": 40.0, "hidden_act": "silu"}, as_written=True
        ),
        "nemotron/mqa": Case(nemotron | {"num_key_value_heads": 1, "head_dim": 12}),
        "nemotron/score": Case(nemotron | SCORE),
        "arcee/squared": Case(arcee | _rope("default", 300.0)),
        "arcee/hub_old": Case(
            arcee | {"rope_theta": 90.0, "head_dim": 8, "rope_scaling": {"rope_type": "yarn", **short}},
            as_written=True,
        ),
        "arcee/bias": Case(arcee | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None}),
        "arcee/tied_old": Case(arcee | {"tie_word_embeddings": True, "rope_theta": 50.0}, as_written=True),
        "arcee/silu": Case(arcee | _rope("linear", 40.0, factor=2.0) | {"hidden_act": "silu"}),
        "arcee/score": Case(arcee | SCORE | {"num_key_value_heads": 1}),
        "ernie4_5/pairs": Case(ernie | _rope("default", 300.0)),
        "ernie4_5/hub_old": Case(
            ernie | {"rope_theta": 90.0, "use_bias": False, "rope_scaling": None}, as_written=True
        ),
        "ernie4_5/bias": Case(ernie | {"use_bias": True, "tie_word_embeddings": False}),
        "ernie4_5/null_old": Case(
            ernie | {"head_dim": None, "num_key_value_heads": None, "rope_theta": 50.0}, as_written=True
        ),
        "ernie4_5/yarn": Case(ernie | _rope("yarn", 90.0, **short) | {"num_key_value_heads": 1}),
        "ernie4_5/gelu": Case(ernie | _rope("linear", 40.0, factor=2.0) | {"hidden_act": "gelu", "head_dim": 10}),
        "ministral3/scaled": Case(three | {"rope_parameters": scaled}),
        "ministral3/hub_old": Case(
            three | {"rope_parameters": {**scaled, "type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}}
            | {"sliding_window": None, "tie_word_embeddings": True},
            as_written=True,
        ),
        "ministral3/window": Case(three | {"rope_parameters": scaled, "sliding_window": 5}),
        "ministral3/llama3": Case(
            three
            | _rope("llama3", 100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, llama_4_scaling_beta=0.4)
            | {"max_position_embeddings": 24, "num_key_value_heads": 1}
        ),
        "ministral3/wide": Case(three | {"rope_parameters": scaled | {"factor": 2.0}, "head_dim": 12}),
        "ministral3/score": Case(three | SCORE | {"rope_parameters": scaled}),
        "hunyuan_v1_dense/alpha": Case(hunyuan | {"rope_theta": 20.0, "rope_scaling": alpha}),
        "hunyuan_v1_dense/alpha_old": Case(
            hunyuan | {"rope_theta": 30.0, "rope_scaling": alpha | {"alpha": 20.0}, "use_qk_norm": True}
            | {"tie_word_embeddings": True, "use_cla": False},
            as_written=True,
        ),
        "hunyuan_v1_dense/plain": Case(hunyuan | _rope("default", 60.0) | {"num_key_value_heads": None}),
        "hunyuan_v1_dense/bias": Case(hunyuan | {"attention_bias": True, "hidden_act": "gelu"}),
        "hunyuan_v1_dense/yarn": Case(hunyuan | _rope("yarn", 90.0, **short) | {"num_key_value_heads": 1}),
        "hunyuan_v1_dense/score": Case(hunyuan | SCORE),
        "opt/offset": Case(opt),
        "opt/hub_old": Case(
            opt | {"dropout": 0.1, "attention_dropout": 0.0, "do_layer_norm_before": True, "enable_bias": True}
            | {"_remove_final_layer_norm": False, "activation_dropout": 0.0, "prefix": "</s>", "init_std": 0.03},
            as_written=True,
        ),
        "opt/no_bias": Case(opt | {"enable_bias": False, "num_hidden_layers": 3}),
        "opt/untied": Case(opt | {"tie_word_embeddings": False, "activation_function": "gelu"}),
        "opt/small_old": Case(opt | {"num_attention_heads": 2, "word_embed_proj_dim": None}, as_written=True),
        "opt/score": Case(opt | SCORE),
        "gptj/pairs": Case(gptj),
        "gptj/hub_old": Case(
            gptj | {"rotary_dim": 8, "rotary": True, "scale_attn_weights": True, "attn_pdrop": 0.0, "n_inner": None},
            as_written=True,
        ),
        "gptj/whole": Case(gptj | {"rotary_dim": 16, "activation_function": "relu"}),
        "gptj/tied": Case(gptj | {"tie_word_embeddings": True, "n_head": 4, "rotary_dim": 2}),
        "gptj/deep_old": Case(gptj | {"n_layer": 3, "activation_function": "gelu"}, as_written=True),
        "gptj/score": Case(gptj | SCORE),
    }  # fmt: skip


def _gpt() -> dict[str, Case]:
    two = TOKENS | {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 24}
    two |= {"layer_norm_epsilon": 1e-3}
    neox = TOKENS | {"model_type": "gpt_neox", "hidden_size": 32, "intermediate_size": 18, "num_attention_heads": 2}
    neox |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "layer_norm_eps": 1e-3}
    return {
        "gpt2/inner": Case(two | {"n_inner": 18}),
        "gpt2/old": Case(two | {"n_ctx": 24, "n_layer": 3, "activation_function": "gelu"}, as_written=True),
        "gpt2/untied": Case(two | {"n_inner": 18, "activation_function": "relu", "tie_word_embeddings": False}),
        "gpt2/heads": Case(two | {"n_head": 2, "n_inner": 14, "activation_function": "silu", "n_layer": 1}),
        "gpt2/hub": Case(  # with what openai-community's say beside the settings
            two | {"n_head": 3, "n_inner": None, "n_ctx": 24, "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.1}
            | {"summary_type": "cls_index", "reorder_and_upcast_attn": True, "scale_attn_weights": True},
            as_written=True,
        ),
        "gpt2/score": Case(two | SCORE | {"n_inner": 18}),
        "gpt_neox/parallel": Case(neox | _rope("default", 50.0, partial_rotary_factor=0.25)),
        "gpt_neox/parallel_old": Case(
            neox | {"rotary_pct": 0.375, "rotary_emb_base": 70, "use_parallel_residual": True}, as_written=True
        ),
        "gpt_neox/sequential": Case(
            neox | _rope("default", 50.0, partial_rotary_factor=0.5)
            | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"}
        ),
        "gpt_neox/tied_full": Case(
            neox | _rope("linear", 40.0, partial_rotary_factor=1.0, factor=2.0) | {"tie_word_embeddings": True}
        ),
        "gpt_neox/deep_old": Case(
            neox | {"rotary_pct": 0.5, "rotary_emb_base": 90, "rope_scaling": {"type": "yarn", **SHORT}}
            | {"num_hidden_layers": 3, "num_attention_heads": 4, "attention_bias": False, "layer_norm_eps": 1e-2},
            as_written=True,
        ),
        "gpt_neox/score": Case(neox | SCORE | {"use_parallel_residual": False}),
    }  # fmt: skip


def _experts() -> dict[str, Case]:
    three = SHAPE | {"model_type": "qwen3_moe", "head_dim": 8, "moe_intermediate_size": 10, "intermediate_size": 14}
    three |= {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}
    mixtral = SHAPE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    olmo = SHAPE | {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 3, "eos_token_id": 3}
    glm = SHAPE | {"model_type": "glm4_moe", "head_dim": 8, "moe_intermediate_size": 10, "intermediate_size": 14}
    glm |= {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
    oss = SHAPE | {"model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 2}
    oss |= {"sliding_window": 4, "swiglu_limit": 0.8}
    without_theta = {"rope_type": "yarn", "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, **SHORT}
    yarn = {"rope_theta": 90.0, **without_theta}
    return {
        "qwen3_moe/plain": Case(three | _rope("default", 400.0)),
        "qwen3_moe/hub": Case(
            three | {"rope_theta": 700.0, "tie_word_embeddings": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
            | {"use_sliding_window": False, "max_window_layers": 2, "rope_scaling": None, "sliding_window": None},
            as_written=True,
        ),
        "qwen3_moe/window": Case(
            three | _rope("default", 50.0) | {"use_sliding_window": True, "sliding_window": 4, "attention_bias": True}
        ),
        "qwen3_moe/unnormalised": Case(
            three | _rope("default", 60.0) | {"norm_topk_prob": False, "num_experts_per_tok": 4, "hidden_act": "gelu"}
        ),
        "qwen3_moe/one": Case(
            three | _rope("yarn", 90.0, **SHORT) | {"num_experts_per_tok": 1, "norm_topk_prob": False, "head_dim": 6}
        ),
        "qwen3_moe/all": Case(
            three | _rope("linear", 40.0, factor=2.0) | {"num_experts": 3, "num_experts_per_tok": 3}
            | {"num_hidden_layers": 3, "num_key_value_heads": 1}
        ),
        "qwen3_moe/score": Case(three | SCORE | {"num_experts": 4}),
        "mixtral/plain": Case(mixtral | _rope("default", 300.0)),
        "mixtral/hub": Case(
            mixtral | {"rope_theta": 200.0, "sliding_window": None, "tie_word_embeddings": True}
            | {"router_aux_loss_coef": 0.02}, as_written=True,
        ),
        "mixtral/window": Case(mixtral | _rope("default", 80.0) | {"sliding_window": 5, "head_dim": 8}),
        "mixtral/few": Case(mixtral | _rope("default", 70.0) | {"num_local_experts": 3, "num_key_value_heads": 1}),
        "mixtral/wide": Case(
            mixtral | _rope("llama3", 100.0, **BANDS) | {"num_local_experts": 7, "num_experts_per_tok": 3}
            | {"head_dim": 10, "num_key_value_heads": 4, "hidden_act": "gelu_pytorch_tanh"}
        ),
        "mixtral/deep": Case(mixtral | {"num_hidden_layers": 4, "rms_norm_eps": 1e-3}),
        "mixtral/score": Case(mixtral | SCORE),
        "olmoe/plain": Case(olmo | _rope("default", 300.0)),
        "olmoe/hub": Case(
            olmo | {"rope_theta": 500.0, "rope_scaling": None, "clip_qkv": None, "num_key_value_heads": None},
            as_written=True,
        ),
        "olmoe/normalised": Case(olmo | _rope("default", 60.0) | {"norm_topk_prob": True, "attention_bias": True}),
        "olmoe/tied": Case(
            olmo | _rope("linear", 40.0, factor=2.0) | {"tie_word_embeddings": True, "num_experts_per_tok": 8}
        ),
        "olmoe/one": Case(
            olmo | _rope("default", 70.0) | {"num_experts_per_tok": 1, "num_experts": 2, "num_key_value_heads": 1}
        ),
        "olmoe/deep": Case(
            olmo | _rope("yarn", 90.0, **SHORT) | {"num_hidden_layers": 3, "hidden_act": "gelu", "num_experts": 5}
        ),
        "glm4_moe/plain": Case(
            glm | _rope("default", 300.0) | {"num_hidden_layers": 3, "use_qk_norm": True, "attention_bias": True}
            | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
        ),
        "glm4_moe/hub": Case(
            glm | {"rope_theta": 500.0, "rope_scaling": None, "partial_rotary_factor": 0.75, "use_qk_norm": True}
            | {"num_nextn_predict_layers": 1, "n_group": 1, "topk_group": 1},
            as_written=True,
        ),
        "glm4_moe/deep": Case(
            glm | _rope("yarn", 90.0, partial_rotary_factor=1.0, **SHORT)
            | {"num_hidden_layers": 4, "first_k_dense_replace": 2, "n_shared_experts": 3}
            | {"n_group": 3, "topk_group": 1}
        ),
        "glm4_moe/all": Case(
            glm | {"first_k_dense_replace": 0, "n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 2}
            | {"topk_group": 2, "hidden_act": "gelu"}
        ),
        "glm4_moe/tied": Case(
            glm | _rope("linear", 40.0, factor=2.0) | {"tie_word_embeddings": True, "norm_topk_prob": False}
        ),
        "glm4_moe/one": Case(
            glm | {"num_experts_per_tok": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 3}
            | {"topk_group": 2, "num_key_value_heads": 1}
        ),
        "gpt_oss/plain": Case(oss | {"rope_parameters": yarn}),
        "gpt_oss/hub": Case(
            oss | {"rope_theta": 90.0, "rope_scaling": without_theta, "experts_per_token": 2, "swiglu_limit": 7.0}
            | {"initial_context_length": 8, "layer_types": ["sliding_attention", "full_attention"]},
            as_written=True,
        ),
        "gpt_oss/deep": Case(
            oss | _rope("default", 70.0) | {"num_hidden_layers": 3, "attention_bias": False, "swiglu_alpha": 1.0}
            | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
        ),
        "gpt_oss/all": Case(oss | {"num_local_experts": 3, "num_experts_per_tok": 3, "num_key_value_heads": 1}),
        "gpt_oss/tied": Case(oss | _rope("linear", 40.0, factor=2.0) | {"tie_word_embeddings": True}),
        "gpt_oss/score": Case(oss | SCORE | {"rope_parameters": yarn | {"truncate": True}}),
    }  # fmt: skip


def _hybrids() -> dict[str, Case]:
    delta = SHAPE | {"model_type": "qwen3_5_text", "head_dim": 8, "num_hidden_layers": 3, "linear_num_key_heads": 2}
    delta |= {"linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5}
    delta |= {"full_attention_interval": 3}
    text = {"mrope_interleaved": True, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    kinds = {"l": "linear_attention", "f": "full_attention"}
    of = lambda letters: {"layer_types": [kinds[x] for x in letters], "num_hidden_layers": len(letters)}  # noqa: E731
    return {
        "qwen3_5_text/plain": Case(delta | _rope("default", 50.0, partial_rotary_factor=0.5)),
        "qwen3_5_text/hub": Case(
            delta | of("lllfl") | _rope("default", 70.0, **text) | {"mtp_num_hidden_layers": 1}
            | {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "tie_word_embeddings": True},
            as_written=True,
        ),
        "qwen3_5_text/bias": Case(delta | of("fl") | {"attention_bias": True, "linear_conv_kernel_dim": 2}),
        "qwen3_5_text/heads": Case(
            delta | {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_value_head_dim": 8}
            | {"num_key_value_heads": 1, "hidden_act": "gelu", "linear_conv_kernel_dim": 5}
        ),
        "qwen3_5_text/old": Case(
            delta | {"rope_theta": 90.0, "partial_rotary_factor": 1.0, "linear_num_key_heads": 1},
            as_written=True,
        ),
        "qwen3_5_text/full": Case(delta | of("ff") | _rope("yarn", 90.0, **SHORT, partial_rotary_factor=0.75)),
        "qwen3_5_text/score": Case(delta | SCORE | of("lf")),
    }  # fmt: skip


def _gemma4() -> dict[str, Case]:
    shape = SHAPE | {"model_type": "gemma4_text", "num_hidden_layers": 3, "head_dim": 8, "global_head_dim": 12}
    shape |= {"hidden_size_per_layer_input": 0, "sliding_window": 5}
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    of = lambda letters: {"layer_types": [kinds[x] for x in letters], "num_hidden_layers": len(letters)}  # noqa: E731
    local = {"rope_type": "default", "rope_theta": 40.0}
    rope = lambda **full: {"rope_parameters": {"sliding_attention": local, "full_attention": full}}  # noqa: E731
    whole = rope(rope_type="proportional", rope_theta=70.0, partial_rotary_factor=0.7)
    values = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 6}
    inputs = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": TOKENS["vocab_size"]}
    return {
        "plain": Case(shape | of("sff") | whole),
        "values": Case(shape | of("fsf") | whole | values | {"final_logit_softcapping": 2.0, "sliding_window": 4}),
        # The Hub's dialect, the default rotary law, and a last layer that is forced to be without a window.
        "hub": Case(
            shape | of("ssss") | values | {"use_bidirectional_attention": "vision", "num_global_key_value_heads": 2}
            | {"use_double_wide_mlp": True, "tie_word_embeddings": True, "global_head_dim": 16, "num_experts": None},
            as_written=True,
        ),
        "bias": Case(
            shape | of("sf") | rope(rope_type="linear", rope_theta=90.0, factor=2.5)
            | {"attention_bias": True, "tie_word_embeddings": False, "hidden_activation": "silu"}
        ),
        "full": Case(
            shape | of("ff") | values | {"attention_bias": True, "num_global_key_value_heads": 4}
            | rope(rope_type="proportional", rope_theta=50.0, factor=1.5)
        ),
        "by_layer": Case(
            shape | of("sf") | whole | {"per_layer_config": {"1": {"head_dim": 6, "num_key_value_heads": 4}}}
        ),
        "sixth": Case(
            shape | whole | values | {"num_hidden_layers": 7, "global_head_dim": 8, "intermediate_size": 6},
            as_written=True,
        ),
        # The small ones: inputs of every layer, keys and values of a layer below, and a wider MLP where these are.
        "small": Case(
            shape | of("sfssff") | whole | inputs | {"num_kv_shared_layers": 3, "use_double_wide_mlp": True}
            | {"tie_word_embeddings": True, "final_logit_softcapping": 3.0, "intermediate_size": 10}
        ),
        "small_hub": Case(
            shape | of("fssf") | inputs | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
            | {"num_global_key_value_heads": None, "attention_k_eq_v": False, "enable_moe_block": False},
            as_written=True,
        ),
        "shared": Case(
            shape | of("sfsf") | whole | values | inputs | {"num_kv_shared_layers": 2, "attention_bias": True}
        ),
        "experts": Case(shape | of("sf") | whole | values | experts),
        "experts_hub": Case(
            shape | of("sf") | experts | {"top_k_experts": 1, "moe_intermediate_size": 10, "num_kv_shared_layers": 0}
            | {"tie_word_embeddings": True},
            as_written=True,
        ),
        "inputs": Case(shape | of("sf") | whole | inputs | {"hidden_activation": "silu", "use_double_wide_mlp": True}),
    }  # fmt: skip


def _latent() -> dict[str, Case]:
    shape = SHAPE | {"num_key_value_heads": 4, "num_hidden_layers": 3, "moe_intermediate_size": 6, "kv_lora_rank": 10}
    shape |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 9, "qk_rope_head_dim": 4}
    shape |= {"v_head_dim": 5, "qk_nope_head_dim": 6, "n_group": 2, "topk_group": 1}
    deep = shape | {"model_type": "deepseek_v3", "first_k_dense_replace": 1}
    lite = shape | {"model_type": "glm4_moe_lite", "v_head_dim": 10}
    yarn = {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 1.0, "beta_slow": 0.05}
    kinds = lambda *kinds: {"mlp_layer_types": list(kinds), "num_hidden_layers": len(kinds)}  # noqa: E731
    return {
        "deepseek_v3/plain": Case(deep | _rope("default", 60.0)),
        # The Hub's dialect, by which scores have a gain of yarn's.
        "deepseek_v3/hub": Case(
            deep | {"rope_theta": 90.0, "num_nextn_predict_layers": 1, "topk_method": "noaux_tc"}
            | {"n_shared_experts": 2}
            | {"rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, **yarn}, "moe_layer_freq": 1},
            as_written=True,
        ),
        "deepseek_v3/gain": Case(deep | _rope("yarn", 70.0, mscale_all_dim=0.7, **yarn) | {"num_hidden_layers": 2}),
        "deepseek_v3/wide": Case(
            deep | {"q_lora_rank": None, "num_hidden_layers": 2, "rope_interleave": False, "norm_topk_prob": False}
        ),
        "deepseek_v3/bias": Case(deep | {"attention_bias": True, "num_hidden_layers": 2, "tie_word_embeddings": True}),
        "deepseek_v3/dense": Case(deep | {"first_k_dense_replace": 0, "num_hidden_layers": 1, "v_head_dim": 10}),
        "deepseek_v3/score": Case(deep | SCORE | {"num_hidden_layers": 2}),
        "glm4_moe_lite/plain": Case(lite | _rope("default", 60.0)),
        "glm4_moe_lite/hub": Case(
            lite | {"rope_theta": 50.0, "partial_rotary_factor": 1.0, "first_k_dense_replace": 2, "n_group": 1}
            | {"topk_method": "noaux_tc", "num_nextn_predict_layers": 1},
            as_written=True,
        ),
        "glm4_moe_lite/mixed": Case(lite | kinds("dense", "dense", "sparse") | {"routed_scaling_factor": 1.3}),
        "glm4_moe_lite/wide": Case(lite | kinds("sparse", "sparse") | {"q_lora_rank": None, "v_head_dim": 3}),
        "glm4_moe_lite/bias": Case(lite | kinds("dense", "sparse") | {"attention_bias": True, "hidden_act": "gelu"}),
        "glm4_moe_lite/yarn": Case(
            lite | kinds("dense", "sparse") | _rope("yarn", 70.0, mscale=0.5, mscale_all_dim=1.2, **yarn)
        ),
    }  # fmt: skip


CASES: dict[str, Case] = {f"llama/{name}": case for name, case in _llama().items()}
CASES |= {f"mistral/{name}": case for name, case in _mistral().items()}
CASES |= {f"phi3/{name}": case for name, case in _phi3().items()}
CASES |= {f"olmo2/{name}": case for name, case in _olmo2().items()}
CASES |= _qwen() | _gemma() | _gpt() | _near() | _parts() | _more_parts() | _experts() | _hybrids() | _latent()
CASES |= {f"gemma4_text/{name}": case for name, case in _gemma4().items()}


def make_model(case: Case, folder: Path, generator: torch.Generator) -> torch.nn.Module:
    """A model with weights large enough for attention, norms and biases all to matter."""
    (folder / "config.json").write_text(json.dumps(case.settings))
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSequenceClassification if "num_labels" in case.settings else AutoModelForCausalLM
    model = auto.from_config(config, **EAGER, dtype=torch.float32).eval()
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    with_one = {name for name in norms if re.search("gemma(?!4)|nemotron|qwen3_5", config.model_type)} - {
        name for name, module in model.named_modules() if "Gated" in type(module).__name__
    }  # these multiply by 1 + weight
    with torch.no_grad():
        for key, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if key.removesuffix(".weight") in norms:  # the last one: about 0, else a tied head repeats tokens
                weight.copy_(1 + 0.3 * noise if re.search(r"\.\d+\.", key) else noise)
                weight.sub_(float(key.removesuffix(".weight") in with_one))
            elif key.endswith(("router.scale", "per_expert_scale")):
                weight.copy_(1 + 0.3 * noise)
            elif key.endswith("sinks"):
                weight.copy_(noise)
            elif key.endswith("A_log"):  # rates that let tokens be seen for long
                weight.copy_(0.5 * noise - 1.5)
            elif weight.ndim == 1:
                weight.copy_(0.1 * noise)
            else:
                conv1d = config.model_type == "gpt2" and re.search("c_(attn|proj|fc)", key)  # multiplies from the left
                inputs = weight.shape[0 if conv1d else -1]
                scale = 0.3 if re.search("embed|wte|wpe", key) else 1.5 / inputs**0.5
                weight.copy_((scale * noise * 32).round() / 32)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):  # of the size of what scores differ by
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif key.endswith("layer_scalar"):
                buffer.copy_(1 + 0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def as_array(content: bytes) -> np.ndarray:
    """A file as an array."""
    return np.frombuffer(content, np.uint8)


def make_inputs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids [3, 12], the padding id among them too, and their mask."""
    length = max(LENGTHS)
    ids = torch.randint(1, TOKENS["vocab_size"], (len(LENGTHS), length), generator=generator)
    mask = torch.stack([(torch.arange(length) >= length - n).long() for n in LENGTHS])
    ids = torch.where(mask == 1, ids, PAD)
    ids[0, 3] = ids[2, 7] = PAD
    return ids, mask


def forward(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V], or scores [B, 1]."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


def gradients(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits, the mean log-probability, and its gradients in embeddings, vectors, a query and an MLP matrix.

    Of experts in all matrices of a layer, by the names of the files: in memory they are one tensor.
    """
    logits = forward(model, ids, mask)
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    pairs = mask[:, :-1] * mask[:, 1:]
    mean = (logprobs * pairs).sum() / pairs.sum()
    mean.backward()
    last = model.config.num_hidden_layers - 1
    matrices = r"embed|per_layer|wte|wpe|\.0\..*(q_proj|qkv_proj|c_attn|query_key_value)"
    matrices += rf"|\.{last}\..*(\bup_proj|gate_up_proj|c_fc|fc1|fc_in|h_to_4h)"
    grads = {name: w.grad for name, w in model.named_parameters()}
    matrices += r"|linear_attn\.(in_proj|out_proj)"
    chosen = {
        name: g
        for name, g in grads.items()
        if g.ndim == 1 or (g.ndim == 2 and re.search(matrices, name)) or "conv1d" in name
    }
    if hasattr(model.config, "num_experts_per_tok") or getattr(model.config, "enable_moe_block", False):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.grad)
            model.save_pretrained(folder)
            stored = load_file(Path(folder) / "model.safetensors")
        routed = rf"\.{last}\..*(experts|gate\.weight|router\.proj)"
        chosen |= {name: g for name, g in stored.items() if re.search(routed, name)}
    return {
        "logits": (logits * mask[..., None]).detach().numpy(),
        "logprob": mean.detach().numpy(),
        "gradients": as_array(save({name: gradient.numpy() for name, gradient in chosen.items()})),
    }


def greedy(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """The continuation that `generate` finds with its cache."""
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
        pad_token_id=PAD, use_cache=True,
    )  # fmt: skip
    return out[:, ids.shape[1] :].numpy()


@torch.no_grad()
def greedy_of_whole(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
    """The same by a forward pass for each new token over a sequence that has its full length from the start."""
    margin, rows = torch.inf, len(ids)
    total = ids.shape[1] + NEW_TOKENS
    for _ in range(NEW_TOKENS):
        positions, left = (mask.cumsum(-1) - 1).clamp(min=0), total - ids.shape[1]
        whole = {
            "input_ids": torch.cat([ids, torch.full((rows, left), PAD)], dim=1),
            "attention_mask": torch.cat([mask, torch.zeros((rows, left), dtype=mask.dtype)], dim=1),
            "position_ids": torch.cat([positions, torch.full((rows, left), total - 1)], dim=1),
        }
        best = copy.deepcopy(model)(**whole).logits[:, ids.shape[1] - 1].topk(2)
        margin = min(margin, (best.values[:, 0] - best.values[:, 1]).min().item())
        ids, mask = (
            torch.cat([ids, best.indices[:, :1]], dim=1),
            torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
        )
    return {"generated": ids[:, -NEW_TOKENS:].numpy(), "margin": np.float32(margin)}


def make_arrays(name: str, attempt: int) -> dict[str, np.ndarray]:
    """All arrays of one case with the random numbers of this attempt."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + attempt)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(case, Path(folder), generator)
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        weights = (Path(folder) / "model.safetensors").read_bytes()
    if case.as_written:
        config = case.settings | {"architectures": config["architectures"]}
    config.pop("transformers_version", None)
    ids, mask = make_inputs(generator)
    arrays = {"config": as_array(json.dumps(config).encode()), "weights": as_array(weights)}
    arrays |= {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    if "num_labels" in case.settings:
        return arrays | {"scores": forward(model, ids, mask)[:, 0].detach().numpy()}
    arrays |= gradients(copy.deepcopy(model), ids, mask) | greedy_of_whole(model, ids, mask)
    by_length = "rope_dynamic" in name or "longrope_crossed" in name
    if not by_length and (arrays["generated"] != greedy(copy.deepcopy(model), ids, mask)).any():
        raise ValueError(f"{name}: the cache of `generate` changes the tokens")
    return arrays


def make_case(name: str) -> dict[str, np.ndarray]:
    """All arrays of one case, keys without the case, from the first seed whose greedy tokens tell something.

    Raises:
        ValueError: none of many seeds has tokens that rounding cannot change and that are not all alike.
    """
    for attempt in range(30):
        arrays = make_arrays(name, attempt)
        if "scores" in arrays:
            return arrays
        variety = min(len(set(row)) for row in arrays["generated"].tolist())
        if arrays["margin"] >= LEAST_MARGIN and variety >= LEAST_VARIETY:
            return arrays
    raise ValueError(f"{name}: greedy tokens are close to a tie, or repeat one token, whatever the seed")


def write(names: list[str]) -> None:
    """Makes these cases and puts them in the files of their families."""
    for family in sorted({name.split("/")[0] for name in names}):
        target = Path(__file__).with_name(f"{family}.npz")
        old, arrays = (dict(np.load(target)) if target.exists() else {}), {}
        for name in (name for name in CASES if name.startswith(f"{family}/")):
            case = f"{name.split('/')[1]}/"
            if name in names:
                arrays |= {case + key: array for key, array in make_case(name).items()}
            else:
                arrays |= {key: array for key, array in old.items() if key.startswith(case)}
        np.savez_compressed(target, **arrays)
        print(f"{target.name}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    write(sys.argv[1:] or list(CASES))
