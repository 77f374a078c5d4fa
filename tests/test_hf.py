"""Hugging Face directories: what is saved loads bit for bit, what cannot be loaded is said in one line."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlhf_jax.config import ArchConfig
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf
from rlhf_jax.models.hf import weights as hf_weights
from rlhf_jax.models.hf.layout import flattened, leaf_shapes, nested

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "data" / "models" / "stories260K-hf"
TINY = ArchConfig(
    vocab_size=11, width=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_width=10, max_positions=16
)
Q0 = "model.layers.0.self_attn.q_proj.weight"


def random_arch(rng):
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
    return ArchConfig(
        vocab_size=rng.randint(5, 40),
        width=kv_heads * group * rng.randint(1, 4),
        num_layers=rng.randint(1, 3),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=rng.choice([2, 4, 6]),
        ffn_width=rng.randint(3, 20),
        max_positions=rng.randint(8, 64),
        norm_eps=rng.choice([1e-5, 1e-6]),
        rope_theta=rng.choice([10000.0, 500000.0]),
        activation=rng.choice(["silu", "gelu", "gelu_tanh", "relu"]),
        qkv_bias=(attention_bias := rng.random() < 0.5),
        out_bias=attention_bias,
        mlp_bias=rng.random() < 0.5,
        tied_head=rng.random() < 0.5,
    )


def random_params(arch, *, score_head=False, seed=0):
    rng = np.random.default_rng(seed)
    shapes = leaf_shapes(arch, score_head=score_head)
    return nested({leaf: rng.standard_normal(shape).astype(np.float32) for leaf, shape in shapes.items()})


def assert_same(tree, other):
    tree, other = flattened(tree), flattened(other)
    assert tree.keys() == other.keys()
    for leaf in tree:
        assert other[leaf].dtype == np.float32
        np.testing.assert_array_equal(tree[leaf], other[leaf], err_msg=leaf)


def saved(path, arch=TINY, **options):
    hf.save_model(path, arch, random_params(arch, score_head=options.get("score_head", False)), eos_ids=[2], **options)
    return path


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return path


def edit_weights(path, **changes):
    tensors = load_file(path / "model.safetensors") | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, path / "model.safetensors")
    return path


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("seed", range(20))
def test_round_trip_is_bit_equal(tmp_path, seed):
    arch, score_head = random_arch(random.Random(seed)), seed % 3 == 0
    params = random_params(arch, score_head=score_head, seed=seed)
    hf.save_model(tmp_path / "m", arch, params, eos_ids=[2, 3], pad_id=0, score_head=score_head)
    found, raw = hf.read_config(tmp_path / "m")
    assert found == arch
    assert (raw["eos_token_id"], raw["pad_token_id"], raw["bos_token_id"]) == ([2, 3], 0, None)
    assert hf.has_score_head(tmp_path / "m") == score_head
    assert len({file.stat().st_mode for file in (tmp_path / "m").iterdir()}) == 1
    assert_same(params, hf.load_params(tmp_path / "m", found, score_head=score_head))


def test_bfloat16_rounds_once_and_jax_arrays_save_alike(tmp_path):
    jnp = pytest.importorskip("jax.numpy")
    params = random_params(TINY)
    as_jax = nested({leaf: jnp.asarray(array) for leaf, array in flattened(params).items()})
    hf.save_model(tmp_path / "m", TINY, as_jax, eos_ids=[2], dtype="bfloat16")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="numpy") as handle:
        assert handle.metadata() == {"format": "pt"}
        assert handle.get_slice(Q0).get_dtype() == "BF16"
    rounded = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in flattened(params).items()}
    assert_same(nested(rounded), hf.load_params(tmp_path / "m", TINY, score_head=False))


def test_fused_layout(tmp_path):
    """Query head h of Hugging Face is slot h % G of key-value head h // G; key and value take the last two slots."""
    heads, kv_heads, n, d, group = TINY.num_heads, TINY.num_kv_heads, TINY.head_dim, TINY.width, 2
    path = saved(tmp_path / "m")
    tensors = {
        "q_proj": np.arange(heads * n * d, dtype=np.float32).reshape(heads * n, d),
        "k_proj": -np.arange(kv_heads * n * d, dtype=np.float32).reshape(kv_heads * n, d),
        "v_proj": 1000 + np.arange(kv_heads * n * d, dtype=np.float32).reshape(kv_heads * n, d),
        "o_proj": np.arange(d * heads * n, dtype=np.float32).reshape(d, heads * n),
    }
    edit_weights(path, **{f"model.layers.1.self_attn.{name}.weight": array for name, array in tensors.items()})
    attn = hf.load_params(path, TINY, score_head=False)["layers"]["attn"]
    for h in range(heads):
        rows = slice(h * n, (h + 1) * n)
        np.testing.assert_array_equal(attn["qkv"][1][:, h // group, h % group], tensors["q_proj"][rows].T)
        np.testing.assert_array_equal(attn["out"][1][h // group, h % group], tensors["o_proj"][:, rows].T)
    for k in range(kv_heads):
        rows = slice(k * n, (k + 1) * n)
        np.testing.assert_array_equal(attn["qkv"][1][:, k, group], tensors["k_proj"][rows].T)
        np.testing.assert_array_equal(attn["qkv"][1][:, k, group + 1], tensors["v_proj"][rows].T)
    mlp, stored = hf.load_params(path, TINY, score_head=False)["layers"]["mlp"], load_file(path / "model.safetensors")
    np.testing.assert_array_equal(mlp["up"][0][:, 0], stored["model.layers.0.mlp.gate_proj.weight"].T)
    np.testing.assert_array_equal(mlp["up"][0][:, 1], stored["model.layers.0.mlp.up_proj.weight"].T)


def test_stories_checkpoint_loads():
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not here")
    arch, raw = hf.read_config(STORIES)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.tied_head, raw["eos_token_id"]) == (
        8,
        4,
        8,
        True,
        2,
    )
    params = hf.load_params(STORIES, arch, score_head=False)
    assert params["layers"]["attn"]["qkv"].shape == (5, 64, 4, 4, 8)
    assert sum(leaf.size for leaf in flattened(params).values()) == 260_032
    assert not hf.has_score_head(STORIES)


def test_shards_are_read_through_their_index(tmp_path):
    path = saved(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    want = hf.load_params(path, TINY, score_head=False)
    (path / "model.safetensors").unlink()
    names, shards = sorted(tensors), {}
    for i in range(3):
        shards |= dict.fromkeys(names[i::3], f"model-0000{i + 1}-of-00003.safetensors")
        save_file({name: tensors[name] for name in names[i::3]}, path / f"model-0000{i + 1}-of-00003.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert_same(want, hf.load_params(path, TINY, score_head=False))
    saved(path)  # one file replaces the shards
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert_same(want, hf.load_params(path, TINY, score_head=False))


def test_missing_shard(tmp_path):
    path = saved(tmp_path / "m")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    assert "model-00001-of-00001.safetensors is missing" in message(hf.load_params, path, TINY, score_head=False)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 5.0}, "rope_theta", 7.0),
        ({"rope_parameters": "absent", "rope_theta": 500000}, "rope_theta", 500000.0),
        ({"rope_parameters": "absent", "rope_theta": "absent", "rope_scaling": None}, "rope_theta", 10000.0),
        ({"rope_parameters": "absent", "rope_scaling": {"type": "default"}, "rope_theta": 3.0}, "rope_theta", 3.0),
        ({"head_dim": None}, "head_dim", 2),
        ({"head_dim": "absent"}, "head_dim", 2),
        ({"num_key_value_heads": "absent"}, "num_kv_heads", 4),
        ({"num_key_value_heads": None}, "num_kv_heads", 4),
        ({"tie_word_embeddings": "absent"}, "tied_head", False),
        ({"attention_bias": "absent"}, "qkv_bias", False),
        ({"attention_bias": True}, "out_bias", True),
        ({"mlp_bias": True}, "mlp_bias", True),
        ({"hidden_act": "gelu_new"}, "activation", "gelu_tanh"),
        ({"sliding_window": 4, "use_sliding_window": False}, "max_positions", 16),
        ({"architectures": None}, "width", 8),
    ],
)
def test_config_dialects(tmp_path, changes, field, value):
    found, _ = hf.read_config(edit_config(saved(tmp_path / "m"), **changes))
    assert getattr(found, field) == value
    assert type(getattr(found, field)) is type(value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "no support for model_type 'mamba'; use one of: llama"),
        ({"model_type": "absent"}, "no support for model_type None"),
        ({"architectures": ["LlamaForTokenClassification"]}, "use one of: LlamaForCausalLM, LlamaForSequence"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope scaling 'mrope'; use one of: linear, dynamic, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2', which is no float"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "base": 1}}, "no support for 'base' in rope scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"sliding_window": 4}, "no support for sliding windows in llama"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "no support for sliding windows in llama"),
        ({"layer_types": ["full_attention"] * 3}, "no support for layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "no support for layer_types"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'; use one of: silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "absent"}, "lacks 'hidden_size'"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_unsupported_configs(tmp_path, changes, said):
    assert said in message(hf.read_config, edit_config(saved(tmp_path / "m"), **changes))


def test_directories_that_are_no_models(tmp_path):
    assert "no directory" in message(hf.read_config, tmp_path / "nowhere")
    assert "hf://owner/name" in message(hf.read_config, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in message(hf.read_config, tmp_path / "empty")
    path = saved(tmp_path / "m")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "t.LlamaForCausalLM.from_pretrained(" in message(hf.read_config, path)
    (path / "pytorch_model.bin").unlink()
    assert "model.safetensors is missing" in message(hf.load_params, path, TINY, score_head=False)
    (path / "config.json").write_text("{")
    assert "holds no JSON object" in message(hf.read_config, path)


@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        (TINY, {Q0: None}, f"lacks tensors that config.json asks for: {Q0};"),
        (TINY, {Q0: np.zeros((24, 9), np.float32)}, f"{Q0} [24, 9], not [24, 8]"),
        (TINY, {Q0: np.zeros((24, 8), np.int8)}, f"has quantized tensors: {Q0} (I8); save the model in bfloat16"),
        (TINY, {"model.layers.0.q_norm.weight": np.ones(8)}, "does not mention: model.layers.0.q_norm.weight"),
        (TINY, {"lm_head.weight": np.ones((11, 8))}, "lm_head.weight is not the tied embedding; set tie_word_emb"),
        (dataclasses.replace(TINY, num_layers=1), {}, "does not mention: model.layers.1."),
        (dataclasses.replace(TINY, num_layers=3), {}, "and 6 more; make config.json agree"),
        (dataclasses.replace(TINY, tied_head=False), {}, "holds no vocabulary head (lm_head.weight)"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, arch, changes, said):
    path = edit_weights(saved(tmp_path / "m"), **changes)
    assert said in message(hf.load_params, path, arch, score_head=False)


def test_truncated_weights(tmp_path):
    file = saved(tmp_path / "m") / "model.safetensors"
    content = file.read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        file.write_bytes(content[:size])
        assert "is no complete safetensors file" in message(hf.load_params, file.parent, TINY, score_head=False)
        assert "is no complete safetensors file" in message(hf.has_score_head, file.parent)


def test_harmless_extras_are_ignored(tmp_path):
    path = saved(tmp_path / "m")
    want = hf.load_params(path, TINY, score_head=False)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    edit_weights(path, **{"lm_head.weight": embedding, "score.weight": np.ones((1, 8), np.float32)}, **frequencies)
    assert_same(want, hf.load_params(path, TINY, score_head=False))


def test_score_heads(tmp_path):
    path = saved(tmp_path / "lm")
    assert "holds no trained score head (score.weight)" in message(hf.load_params, path, TINY, score_head=True)
    assert not hf.has_score_head(path)
    untied = dataclasses.replace(TINY, tied_head=False)
    path = saved(tmp_path / "rm", untied, score_head=True)
    raw = hf.read_config(path)[1]
    assert (raw["architectures"], raw["id2label"]) == (["LlamaForSequenceClassification"], {"0": "LABEL_0"})
    stored = load_file(path / "model.safetensors")
    assert stored["score.weight"].shape == (1, 8)
    assert stored["score.bias"].shape == (1,)
    assert "lm_head.weight" not in stored
    assert "holds no vocabulary head" in message(hf.load_params, path, untied, score_head=False)
    edit_weights(path, **{"score.bias": None})  # transformers' own classifiers have none
    assert hf.load_params(path, untied, score_head=True)["score"]["bias"] == 0
    edit_weights(path, **{"score.weight": np.zeros((2, 8), np.float32)})
    assert "score.weight [2, 8], not [1, 8]" in message(hf.load_params, path, untied, score_head=True)


def test_token_ids_and_the_base_config(tmp_path):
    path = saved(tmp_path / "m", base_config={"bos_token_id": 1, "pad_token_id": 5, "eos_token_id": 9})
    config, generation = (json.loads((path / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 5)
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 5}
    for own in ({"bos_token_id": 7}, {"bos_token_id": None}, {}):  # each file's own begin token stays, none as well
        said = own | {"temperature": 0.6, "eos_token_id": 9}
        hf.save_model(path, TINY, random_params(TINY), eos_ids=[2], base_config=config, base_generation=said)
        assert hf.read_generation(path) == said | {"eos_token_id": 2, "pad_token_id": 5}
        assert hf.read_config(path)[1]["bos_token_id"] == 1
    hf.save_model(path, TINY, random_params(TINY), eos_ids=[], pad_id=0, base_config=config)
    assert hf.read_config(path)[1]["eos_token_id"] is None
    assert hf.read_config(path)[1]["pad_token_id"] == 0


def test_shapes_without_a_family(tmp_path):
    arch = dataclasses.replace(TINY, norm="layer", positions="learned", gated_mlp=False, qkv_bias=True, num_kv_heads=4)
    said = message(hf.save_model, tmp_path / "m", arch, random_params(arch), eos_ids=[2])
    for part in ("the nearest, starcoder2 needs", "positions 'rotary' (not 'learned')", "qkv_bias False (not True)"):
        assert part in said
    assert not (tmp_path / "m").exists()
    assert "width 8 to be a multiple of num_heads 3" in message(
        hf.find_family, dataclasses.replace(TINY, num_heads=3, num_kv_heads=1)
    )


def test_params_that_are_not_of_the_arch(tmp_path):
    options = {"arch": TINY, "eos_ids": [2]}
    untied = random_params(dataclasses.replace(TINY, tied_head=False))
    assert "disagree about head/kernel" in message(hf.save_model, tmp_path / "m", params=untied, **options)
    wide = random_params(dataclasses.replace(TINY, ffn_width=9))
    assert "layers/mlp/down, layers/mlp/up" in message(hf.save_model, tmp_path / "m", params=wide, **options)
    assert "dtype 'int8'" in message(
        hf.save_model, tmp_path / "m", params=random_params(TINY), dtype="int8", **options
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["write", "keep", "first rename", "second rename"])
def test_interrupted_save_leaves_the_old_directory(tmp_path, monkeypatch, moment):
    path = saved(tmp_path / "m")
    (path / "tokenizer.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    rename, calls = os.rename, []

    def failing(*args, **kwargs):
        raise KeyboardInterrupt

    def failing_rename(source, target):
        calls.append(target)
        if len(calls) == (1 if moment == "first rename" else 2):
            raise KeyboardInterrupt
        return rename(source, target)

    with monkeypatch.context() as patch:
        if moment == "write":
            patch.setattr(hf_weights, "save_file", failing)
        elif moment == "keep":
            patch.setattr(shutil, "copy2", failing)
        else:
            patch.setattr(os, "rename", failing_rename)
        with pytest.raises(KeyboardInterrupt):
            hf.save_model(path, TINY, random_params(TINY, seed=1), eos_ids=[3])
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_save_keeps_the_tokenizer_and_follows_links(tmp_path):
    path = saved(tmp_path / "real")
    (path / "tokenizer.json").write_text("{}")
    (path / "extra").mkdir()
    (path / "extra" / "note").write_text("kept")
    (path / "pytorch_model.bin").write_text("weights that are replaced")
    (path / "adapter").mkdir()  # of those weights
    (tmp_path / "link").symlink_to(path)
    params = random_params(TINY, seed=1)
    hf.save_model(tmp_path / "link", TINY, params, eos_ids=[3])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "real"]
    assert (path / "tokenizer.json").read_text() == "{}"
    assert (path / "extra" / "note").read_text() == "kept"
    assert not (path / "pytorch_model.bin").exists() and not (path / "adapter").exists()
    assert_same(params, hf.load_params(path, TINY, score_head=False))
    assert hf.read_config(path)[1]["eos_token_id"] == 3
