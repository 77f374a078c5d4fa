"""config.json in the spellings that people have: read as transformers does, kept when saved, or refused by name."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load, save_file
from test_families import golden
from test_families import write as write_golden
from test_hf import message
from test_loading import tree_of

from rlhf_jax.config import ArchConfig, RopeScaling
from rlhf_jax.models import Model, hf
from rlhf_jax.models.hf import config_json
from rlhf_jax.tokens import positions_from_mask

SHAPE = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
}  # fmt: skip
OWN = {
    family: {"head_dim": 8, "sliding_window": 5}
    for family in ("mistral", "ministral", "gemma2", "gemma3_text", "vaultgemma")
}
OWN |= {
    "qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8}, "phi3": {"sliding_window": 5}, "cwm": {"head_dim": 8},
    "seed_oss": {"head_dim": 8}, "starcoder2": {"sliding_window": 5}, "gpt2": {"hidden_size": ..., "n_inner": 14},
    "gptj": {"hidden_size": ..., "n_inner": 14, "rotary_dim": 4}, "ernie4_5": {"head_dim": 8}, "opt": {"ffn_dim": 14},
    "glm": {"head_dim": 8}, "glm4": {"head_dim": 8}, "ministral3": {"head_dim": 8}, "falcon": {"ffn_hidden_size": 14},
    "hunyuan_v1_dense": {"head_dim": 8}, "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": {"head_dim": 8, "sliding_window": 5, "global_head_dim": 12, "hidden_size_per_layer_input": 0},
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 6, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 6, "first_k_dense_replace": 1,
}  # fmt: skip
OWN |= {"deepseek_v3": LATENT, "glm4_moe_lite": LATENT}
SMALL = {"vocab_size": 37, "width": 32, "num_heads": 4, "head_dim": 8, "norm_eps": 1e-6, "ffn_width": 14}
FULL = {"layer_types": ["full_attention"] * 2}


def config(family, **changes):
    """config.json of a small model; an Ellipsis takes a key out."""
    raw = {"model_type": family} | SHAPE | OWN.get(family, {}) | changes
    if family in ("gpt2", "gptj"):  # transformers takes the general names for its own
        general = {"num_hidden_layers", "num_attention_heads", "max_position_embeddings"} - set(changes)
        raw = {key: value for key, value in raw.items() if key not in general}
    return {key: value for key, value in raw.items() if value is not ...}


def write(path, raw):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    return path


# ---- read


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
SAME = [  # family, changes, and changes that mean the same
    ("mistral", {"use_sliding_window": False}, {}),
    ("phi3", {"use_sliding_window": False}, {}),
    ("gemma2", {"use_sliding_window": False}, {}),
    ("starcoder2", {"use_sliding_window": False}, {}),
    ("phi3", FULL, {}),
    ("mistral", FULL, {"sliding_window": None}),
    ("gpt_neox", {"partial_rotary_factor": 0.5}, {}),
    ("gpt_neox", {"rope_theta": 77.0}, {}),
    ("gpt_neox", {"rotary_emb_base": 77, "rope_theta": 5.0}, {"rotary_emb_base": 77.0}),
    ("gpt_neox", {"rope_parameters": {"rope_theta": 77, "partial_rotary_factor": 0.5}, "rotary_pct": 0.25},
     {"rotary_emb_base": 77, "rotary_pct": 0.5}),
    ("llama", {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0}}, {"rope_scaling": YARN}),
    ("qwen2", {"rope_scaling": YARN | {"beta_fast": 0.0}}, {"rope_scaling": YARN | {"beta_fast": 32}}),
    ("llama", {"rope_scaling": YARN | {"truncate": None}}, {"rope_scaling": YARN | {"truncate": False}}),
    ("gemma3_text", {"rope_scaling": YARN | {"truncate": False}}, {"rope_scaling": YARN}),
    ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, {}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 2.0},
                     "rope_parameters": {"full_attention": {"rope_theta": 50.0}, "sliding_attention": None}},
     {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 50}),
    ("mistral", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
    ("qwen2", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
    ("qwen3", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
    ("seed_oss", {"head_dim": None}, {"head_dim": 8}),
    ("gpt2", {"n_embd": ..., "n_head": ..., "hidden_size": 32, "num_attention_heads": 4}, {}),
    ("gpt2", {"num_hidden_layers": 2, "n_layer": 7}, {}),
    ("olmo3", {"rope_theta": 300.0, "sliding_window": 5},
     {"sliding_window": 5, "rope_parameters": {"full_attention": {"rope_theta": 300.0}}}),
    ("llama", {"per_layer_config": {}}, {}),
    *((family, {"rope_parameters": {}, "rope_theta": 71.0}, {"rope_parameters": {"rope_theta": 71.0}})
      for family in ("cwm", "gpt_oss")),  # none at all is yarn or llama3
    ("smollm3", {"no_rope_layers": [1, 0]}, {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("smollm3", {"no_rope_layers": [3, 0, 0]}, {"no_rope_layer_interval": 2}),
    ("smollm3", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2, "use_sliding_window": False},
     {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2}),
    ("smollm3", {"sliding_window": 5, "use_sliding_window": False}, {}),
    ("exaone4", {"sliding_window_pattern": "LLG", "layer_types": ["full_attention"] * 2}, FULL),
    ("cohere2", {"sliding_window_pattern": 2, "sliding_window": 5},
     {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}),
    ("glm4", {"partial_rotary_factor": None}, {"partial_rotary_factor": 1.0}),
    ("glm4", {"rope_parameters": {"rope_theta": 1e4}}, {"partial_rotary_factor": 0.5}),
    ("phi", {"head_dim": 8}, {}),
    ("falcon", {"multi_query": True}, {"new_decoder_architecture": True, "num_kv_heads": 1,
     "num_ln_in_parallel_attn": 1}),
    ("falcon", {"multi_query": False, "alibi": None}, {"new_decoder_architecture": True, "num_kv_heads": None,
     "num_ln_in_parallel_attn": 1}),
    ("falcon", {"n_embed": 32, "hidden_size": 7}, {}),
    ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "alpha": 9.0, "factor": 1.0, "beta_fast": 32}},
     {"rope_scaling": {"type": "dynamic", "alpha": 9.0, "factor": 3.0}}),
    ("opt", {"word_embed_proj_dim": 32, "dropout": 0.1}, {}),
    ("gptj", {"rotary": True, "rope_theta": 7.0}, {}),
    ("gemma4_text", {"layer_types": ["sliding_attention"] * 2},
     {"layer_types": ["sliding_attention", "full_attention"]}),
    *(("gemma4_text", {"per_layer_config": {number: {"head_dim": 16}}, "global_head_dim": 4}, {"global_head_dim": 16})
      for number in ("1", "01")),  # of ten layers or more transformers writes the second
    ("gemma4_text", {"num_global_key_value_heads": 1, "rope_theta": 7.0, "rope_local_base_freq": 3.0}, {}),
    ("gemma4_text", {"num_kv_shared_layers": 0, "use_double_wide_mlp": True}, {}),
    ("olmo2", {"sliding_window": 64, "is_causal": True}, {}),  # a window that no text outgrows
    ("deepseek_v3", {"sliding_window": 4096, "head_dim": 4}, {}),
    ("glm4_moe_lite", {"head_dim": 2}, {"qk_rope_head_dim": 2}),
    ("gpt_neox", {"head_dim": 8}, {"head_dim": None}),
    *(("deepseek_v3", {key: None}, {key: False}) for key in ("norm_topk_prob", "rope_interleave")),
    ("falcon", {"bias": None, "multi_query": None}, {"multi_query": False}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "same"), SAME)
def test_spellings_that_mean_the_same(tmp_path, family, changes, same):
    read = [
        hf.read_config(write(tmp_path / name, config(family, **c)))[0] for name, c in (("a", changes), ("b", same))
    ]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"eos_token_id": "x"}, "eos_token_id is 'x', which is no token id; correct it"),
        ("qwen2", {"eos_token_id": [2, "3"]}, "eos_token_id is [2, '3']"),
        ("gpt2", {"eos_token_id": True}, "eos_token_id is True"),
        ("gemma2", {"bos_token_id": 1.0}, "bos_token_id is 1.0"),
        ("llama", {"pad_token_id": [0]}, "pad_token_id is [0]"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, in which no token sees itself; write null"),
        ("gemma3_text", {"sliding_window": -1}, "sliding_window is -1"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "has sliding_attention, but there is no sliding_window"),
        ("qwen3", {"per_layer_config": {"0": {"head_dim": 4}}}, "no support for per_layer_config {'0'"),
        (
            "phi3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope scaling 'linear'; use one of: longrope",
        ),
        ("llama", {"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor is 0, by which no token has a"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "needs rope_parameters by layer type"),
        *(
            (
                family,
                {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}},
                "no support for rope scaling of sliding layers",
            )
            for family in ("gemma3_text", "olmo3", "gemma4_text")
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            "factor 0.5 in gem",
        ),
        ("gemma4_text", {"per_layer_config": {"0": {"head_dim": 16}}}, "heads may differ by kind alone"),
        ("gemma4_text", {"per_layer_config": {"2": {"head_dim": 16}}}, "heads may differ by kind alone"),
        ("gemma4_text", {"per_layer_config": {"1": {"sliding_window": 3}}}, "heads may differ by kind alone"),
        ("gemma4_text", {"hidden_size_per_layer_input": ...}, "vocab_size_per_layer_input 262144"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "no support for num_key_value_heads 2"),
        *((family, {"head_dim": 16}, "support for head_dim 16") for family in ("deepseek_v3", "gpt_neox", "stablelm")),
        ("gemma", {"sliding_window": 63}, "in gemma, which transformers leaves out of all but its cache; choose"),
        ("qwen2", {"use_sliding_window": "false"}, "no support for use_sliding_window 'false'"),
        ("falcon", {"multi_query": "no"}, "no support for multi_query 'no'; choose"),
        ("llama", {"transformers_weights": "other.safetensors"}, "no support for transformers_weights 'other.safet"),
        *((family, {"is_causal": False}, "no support for is_causal False") for family in ("gpt2", "qwen3", "opt")),
        (
            "glm4_moe_lite",
            {"mlp_layer_types": ["sparse", "dense"]},
            "no support for mlp_layer_types ['sparse', 'dense']",
        ),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "shared_kv_layers 2 of 2 layers have none below them with the"),
        ("gemma4_text", {"num_kv_shared_layers": 1}, "shared_kv_layers 1 of 2 layers have none below them with the"),
        ("gemma4_text", {"enable_moe_block": True}, "config.json holds a value of the wrong type or size"),
        (
            "gemma4_text",
            {"rope_parameters": {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}},
            "rope_theta is None",
        ),
        ("smollm3", {"no_rope_layers": [1]}, "config.json holds a value of the wrong type or size"),
        ("granite", {"attention_multiplier": 0}, "attention_multiplier is 0, by which nothing is left; correct it"),
        ("granite", {"logits_scaling": 0.0}, "logits_scaling is 0, by which nothing is left"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0, by which nothing is left"),
        ("gemma4_text", {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0, by which nothing is left"),
        ("falcon", {"alibi": True}, "no support for alibi True; choose a checkpoint without it"),
        ("falcon", {"parallel_attn": False}, "no support for parallel_attn False"),
        ("phi", {"qk_layernorm": True}, "no support for qk_layernorm True"),
        ("opt", {"word_embed_proj_dim": 16}, "no support for word_embed_proj_dim 16"),
        ("ministral3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "query_log_scale is None"),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "query_log_scale needs rope_scaling.original_max_positions",
        ),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "no support for rope by layer type",
        ),
    ],
)
def test_what_transformers_could_not_run_is_refused(tmp_path, family, changes, said):
    assert said in message(hf.read_config, write(tmp_path / "m", config(family, **changes)))


# ---- kept


EXTRA = {
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attention_dropout": 0.25, "use_cache": False,
    "summary_first_dropout": 0, "task_specific_params": {"x": {"max_length": 50}}, "a_note": "mine", "nothing": None,
    "_name_or_path": "somebody/model", "transformers_version": "4.40.0", "pretraining_tp": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize("score_head", [False, True])
def test_what_is_no_setting_of_ours_is_kept(tmp_path, family, score_head):
    old = {
        "torch_dtype": "float16",
        "auto_map": {"AutoConfig": "code.C"},
        "transformers_weights": "model.safetensors",  # which it is not where there are several
        "problem_type": "single_label_classification",
    }
    arch, raw = hf.read_config(write(tmp_path / "m", config(family, **EXTRA, **old)))
    params = tree_of(arch, score_head=score_head)
    hf.save_model(tmp_path / "new", arch, params, eos_ids=[2], score_head=score_head, base_config=raw)
    found, saved = hf.read_config(tmp_path / "new")
    assert found == arch and EXTRA.items() <= saved.items()
    assert not {"torch_dtype", "auto_map", "transformers_weights"} & set(saved) and saved["dtype"] == "float32"
    assert ("problem_type" in saved) != score_head  # with which transformers refuses one label
    hf.save_model(tmp_path / "again", found, params, eos_ids=[2], score_head=score_head, base_config=saved)
    assert hf.read_config(tmp_path / "again")[1] == saved


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 21}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 7, **FULL}),
        ("gemma2", {"sliding_window": 9, **FULL}),
        ("gemma3_text", {"sliding_window": 9, "sliding_window_pattern": 1, **FULL}),
        ("phi3", {"original_max_position_embeddings": 8, "sliding_window": None}),
        ("qwen3_5_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 1.0,
                                              "mrope_section": [2, 1, 1], "mrope_interleaved": True}}),
        ("qwen3_5_text", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [2, 1, 1],
                                           "rope_theta": 9.0, "partial_rotary_factor": 1.0}}),
    ],
)  # fmt: skip
def test_settings_that_change_nothing_are_kept(family, settings):
    raw = config(family, **settings)
    arch = config_json.to_arch(raw, hf.FAMILIES[family], Path("config.json"))
    saved = config_json.to_json_like(hf.FAMILIES[family], arch, raw, score_head=False)
    assert arch.sliding_window == 0 and {k: saved[k] for k in settings if settings[k]} == {
        k: v for k, v in settings.items() if v
    }


def test_nothing_of_another_familys_config_is_kept(tmp_path):
    arch, raw = hf.read_config(write(tmp_path / "m", config("llama", a_note="x", rope_scaling=YARN)))
    mine = hf.FAMILIES["qwen3"]
    assert "a_note" not in config_json.to_json_like(mine, arch, raw, score_head=False)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo3", "cwm", "vaultgemma", "ministral"])
def test_a_model_without_windows_is_saved_with_the_size_that_transformers_wants(family):
    raw = config(family, **FULL, sliding_window=...)
    arch = config_json.to_arch(raw, hf.FAMILIES[family], Path("config.json"))
    assert arch.window_layers == ()
    assert config_json.to_json(hf.FAMILIES[family], arch, score_head=False)["sliding_window"] >= 4096


# ---- refused by name


@pytest.mark.parametrize(
    ("raw", "nearest", "parts", "experts"),
    [
        ({"model_type": "gemma3n_text", "num_experts": None, "top_k_experts": None, "enable_moe_block": False,
          "altup_num_inputs": 4, "hidden_size_per_layer_input": 256}, "gemma3_text", ["value norms"], False),
        ({"model_type": "gemma5_text", "enable_moe_block": True, "num_experts": 128}, "gemma3_text", [], True),
        ({"model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 2}, "granite", [], False),
        ({"model_type": "qwen2_moe", "num_experts": 8, "moe_intermediate_size": 8,
          "shared_expert_intermediate_size": 9}, "qwen3_moe", ["shared experts"], False),
        ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, None, [], True),
        ({"model_type": "minicpm", "num_experts": [0, 0], "scale_emb": 12}, None, ["multipliers"], False),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"], "num_experts": 8,
          "shared_expert_intermediate_size": 4}, "qwen3_moe", ["linear_attention", "shared experts"], False),
        ({"model_type": "olmo_hybrid", "layer_types": ["linear_attention", "full_attention"]}, "olmo3",
         ["linear_attention"], False),
        ({"model_type": "gemma3n", "text_config": {"hidden_size": 8}, "vision_config": {"a": 1}}, "gemma3_text",
         ["images or sound"], False),
        ({"model_type": "deepseek_v2", "n_routed_experts": 256, "kv_lora_rank": 9}, None, [], False),
        ({"model_type": "olmo", "clip_qkv": 8.0}, "olmo3", ["norms without weights", "clip_qkv"], False),
        ({"model_type": 7, "hidden_size": [1]}, None, [], False),
    ],
)  # fmt: skip
def test_a_refusal_names_the_nearest_family_and_what_it_lacks(tmp_path, raw, nearest, parts, experts):
    shape = {key: value for key, value in SHAPE.items() if not key.startswith("n_")}
    said = message(hf.read_config, write(tmp_path / "m", shape | raw))
    assert ("mixture-of-experts" in said) == experts and f"model_type {raw['model_type']!r}; use one of: llama" in said
    last = said.split("; the nearest, ")[1]
    assert last.split(",")[0] in hf.FAMILIES and (nearest is None or last.startswith(f"{nearest}, "))
    assert all(part in last for part in parts)


# ---- models of several parts


@pytest.mark.parametrize(
    ("name", "whole", "prefix"),
    [
        ("qwen3_5_text/hub", "qwen3_5", "model.language_model."),
        ("gemma4_text/small_hub", "gemma4", "model.language_model."),
        ("gemma3_text/layers_old", "gemma3", "language_model.model."),
    ],
)
def test_of_a_model_with_images_the_language_model_is_read(tmp_path, capsys, name, whole, prefix):
    arrays = golden(name)
    alone, text = write_golden(tmp_path / "alone", arrays), json.loads(arrays["config"].tobytes())
    top = {key: text.pop(key) for key in ("architectures", "tie_word_embeddings", "eos_token_id") if key in text}
    top["architectures"] = [top["architectures"][0].replace("CausalLM", "ConditionalGeneration")]
    path = write(tmp_path / "m", top | {"model_type": whole, "text_config": text, "vision_config": {"depth": 1}})
    tensors = {n.replace("model.", prefix): t for n, t in load(arrays["weights"].tobytes()).items()}
    beside = {"model.visual.patch_embed.weight": np.ones((2, 2), np.float32), "vision_tower.bias": np.ones(2)}
    unused = [f"{prefix}layers.{i}.self_attn.k_norm.weight" for i in (2, 3) if "small" in name]  # as the Hub has them
    save_file(tensors | beside | dict.fromkeys(unused, np.ones(8)), path / "model.safetensors")
    (arch, raw), expected = hf.read_config(path), hf.read_config(alone)
    assert (arch, raw) == expected
    params, plain = (hf.load_params(folder, arch, score_head=False) for folder in (path, alone))
    said = capsys.readouterr().err
    assert "2 tensors of images or sound are not read" in said
    assert ("2 tensors of keys and values in layers that see those of others are not read" in said) == bool(unused)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    hf.save_model(tmp_path / "new", arch, params, eos_ids=[2], base_config=raw)
    assert hf.read_config(tmp_path / "new")[0] == arch
    packed = top | {"model_type": whole, "text_config": text, "quantization_config": {"quant_method": "fp8"}}
    assert "no support for quantization_config" in message(hf.read_config, write(path, packed))
    text["model_type"] = "another_text"
    assert "use one of: llama" in message(
        hf.read_config, write(path, top | {"model_type": whole, "text_config": text})
    )


# ---- live


@pytest.fixture(scope="module")
def maker():
    """make_families as a module."""
    torch = pytest.importorskip("torch", reason="needs torch")
    torch.set_num_threads(1)
    from golden import make_families

    return make_families


@partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, mask):
    return model.project(params, model.apply(params, tokens, positions_from_mask(mask), mask.astype(np.int32)))


def theirs(maker, path, ids, mask):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, **maker.EAGER, dtype=torch.float32).eval()
    with torch.no_grad():
        return (maker.forward(model, ids, mask) * mask[..., None]).numpy()


REFUSED_THERE = ({"per_layer_config": {}}, {"num_key_value_heads": None})  # of a Mistral
LIVE = [case[:2] for case in SAME if case[1] not in REFUSED_THERE or case[0].startswith("qwen")]
LIVE += [
    (family, {**FULL, **EXTRA}) for family in ("gemma2", "gemma3_text", "olmo3", "cwm", "vaultgemma", "ministral")
]


@pytest.mark.parametrize(("family", "changes"), LIVE)
def test_transformers_reads_it_so_and_runs_what_we_save(tmp_path, family, changes, maker):
    import torch

    raw = config(family, **changes)
    ids, mask = maker.make_inputs(torch.Generator().manual_seed(0))
    maker.make_model(maker.Case(raw), write(tmp_path / "m", raw), torch.Generator()).save_pretrained(tmp_path / "m")
    path = write(tmp_path / "m", raw)
    arch, base = hf.read_config(path)
    params = hf.load_params(path, arch, score_head=False)
    found = logits_of(Model(arch), params, ids.numpy().astype(np.int32), mask.numpy().astype(bool))
    found = np.asarray(found) * mask.numpy()[..., None]
    np.testing.assert_allclose(found, theirs(maker, path, ids, mask), rtol=0, atol=1e-4)
    hf.save_model(tmp_path / "new", arch, params, eos_ids=[2], base_config=base)
    np.testing.assert_allclose(theirs(maker, tmp_path / "new", ids, mask), found, rtol=0, atol=1e-4)


GEMMA3 = {"norm_offset": True, "scale_embedding": True, "norm_position": "both", "activation": "gelu_tanh",
          "query_pre_attn_scalar": 8.0, "qk_norm": "head"}  # fmt: skip
SHARED = {"norm": "layer", "parallel_residual": True, "shared_norm": True, "gated_mlp": False}
BIASED = {"norm": "layer", "positions": "learned", "gated_mlp": False, "activation": "relu"}
BIASED |= dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
OLMO3 = {"qk_norm": "all", "norm_position": "post", "sliding_window": 4, "window_layers": (0,)}
FRESH = [
    ("gemma3_text", GEMMA3 | {"rope_local_theta": 10.0}),
    ("gemma2", {**GEMMA3, "qk_norm": "none"}),
    (
        "gemma4_text",
        {**GEMMA3, "norm_offset": False, "query_pre_attn_scalar": 0.0, "attention_multiplier": 1.0, "value_norm": True}
        | {"layer_gain": True, "full_head_dim": 12, "full_kv_heads": 1, "full_keys_as_values": True}
        | {"rope_local_theta": 10.0, "rope_scaling": RopeScaling(kind="proportional", fraction=0.5)}
        | {"sliding_window": 4, "window_layers": (0,)},
    ),
    ("olmo3", OLMO3),  # one theta for all layers
    ("olmo3", OLMO3 | {"rope_local_theta": 10.0, "rope_scaling": RopeScaling(kind="linear", factor=2.0)}),
    ("cwm", {"mlp_bias": True, "sliding_window": 4, "window_layers": (1,)}),  # which must have a bos_token_id
    ("ministral", {"sliding_window": 4, "window_layers": (1,)}),
    ("vaultgemma", {**GEMMA3, "qk_norm": "none", "norm_position": "pre"}),
    ("smollm3", {"nope_layers": (1,)}),
    ("smollm3", {"nope_layers": (0,), "sliding_window": 4, "window_layers": (0, 1)}),
    ("exaone4", {"qk_norm": "head", "norm_position": "post", "tied_head": False}),
    ("exaone4", {"qk_norm": "head", "norm_position": "post", "nope_layers": (0, 1)}),
    ("granite", {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logit_multiplier": 0.125}),
    ("glm4", {"rope_pairs": True, "norm_position": "both", "rope_fraction": 0.5, "qkv_bias": True}),
    (
        "cohere2",
        SHARED
        | {
            "norm": "layer_no_bias",
            "rope_pairs": True,
            "gated_mlp": True,
            "nope_layers": (1,),
            "sliding_window": 4,
            "window_layers": (0,),
            "logit_multiplier": 0.3,
        },
    ),
    ("phi", SHARED | {"head_bias": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "rope_fraction": 0.5}),
    ("stablelm", {"norm": "layer", "rope_fraction": 0.5, "qkv_bias": True}),
    ("stablelm", SHARED | {"gated_mlp": True}),
    ("falcon", SHARED),
    ("falcon", SHARED | {"shared_norm": False, "num_kv_heads": 2}),
    ("nemotron", {"norm": "layer", "norm_offset": True, "gated_mlp": False, "activation": "relu2"}),
    ("arcee", {"gated_mlp": False, "activation": "relu2", "mlp_bias": True}),
    ("glm", {"rope_pairs": True}),
    ("ernie4_5", {"rope_pairs": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True}),
    ("ministral3", {"query_log_scale": 0.3, "rope_scaling": RopeScaling("yarn", 2.0, original_max_positions=4)}),
    ("hunyuan_v1_dense", {"qk_norm": "turned", "rope_scaling": RopeScaling("ntk", 20.0)}),
    ("opt", BIASED | {"position_offset": 2, "norm_eps": 1e-5}),
    ("gptj", SHARED | {"rope_pairs": True, "head_bias": True, "mlp_bias": True, "rope_fraction": 0.75}),
]


@pytest.mark.parametrize(("family", "changes"), FRESH)
def test_a_fresh_shape_is_saved_as_a_family_that_holds_it(tmp_path, family, changes):
    arch = ArchConfig(**SMALL | changes)
    assert hf.find_family(arch).model_type == family
    raw = config_json.to_json(hf.FAMILIES[family], arch, score_head=False)
    held = config_json.to_arch(raw, hf.FAMILIES[family], Path("config.json"))
    assert dataclasses.replace(held, rope_local_theta=arch.rope_local_theta) == arch
    assert held.rope_local_theta in (arch.rope_local_theta, arch.rope_theta)


def test_one_theta_does_for_layers_of_two_kinds_only_without_scaling():
    arch = ArchConfig(**SMALL | OLMO3 | {"rope_scaling": RopeScaling(kind="linear", factor=2.0)})
    assert "olmo3 needs rope_local_theta" in message(hf.find_family, arch)


@pytest.mark.parametrize(("family", "changes"), FRESH)
def test_transformers_runs_fresh_models(tmp_path, family, changes, maker):
    import torch

    arch = ArchConfig(**SMALL | changes)
    params = jax.tree.map(lambda x: 0.3 * x, tree_of(arch))
    hf.save_model(tmp_path / "m", arch, params, eos_ids=[2])
    ids, mask = maker.make_inputs(torch.Generator().manual_seed(0))
    found = logits_of(Model(arch), params, ids.numpy().astype(np.int32), mask.numpy().astype(bool))
    expected = theirs(maker, tmp_path / "m", ids, mask)
    np.testing.assert_allclose(np.asarray(found) * mask.numpy()[..., None], expected, rtol=0, atol=5e-4)
