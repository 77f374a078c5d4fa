"""Weights onto the mesh and back, heads on trunks, and what it costs the host."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import FAST
from safetensors.numpy import load_file, save_file
from tiny import TOY_ROWS, toy_directory, toy_run

from benchmarks import loading
from rlhf_jax import ppo
from rlhf_jax.cli import main
from rlhf_jax.config import MeshConfig, ModelConfig, RewardSourceConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf
from rlhf_jax.models.hf import weights as hf_weights
from rlhf_jax.models.hf.config_json import to_arch
from rlhf_jax.models.hf.layout import flattened, leaf_shapes, nested
from rlhf_jax.models.loading import load_model
from rlhf_jax.sharding import make_mesh, replicated, tree_shardings

SIZES = {  # divide by every mesh below
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 4, "intermediate_size": 48, "max_position_embeddings": 24, "tie_word_embeddings": False,
    "n_embd": 32, "n_layer": 3, "n_head": 8, "n_inner": 48, "n_positions": 24,
    "attention_bias": True, "use_sliding_window": True, "max_window_layers": 1,
}  # fmt: skip
OWN = {
    "gpt_neox": {"rotary_pct": 0.5}, "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4, "ffn_hidden_size": 48, "bias": True},
    "opt": {"ffn_dim": 48}, "gptj": {"rotary_dim": 2}, "nemotron": {"mlp_bias": True}, "arcee": {"mlp_bias": True},
    "ernie4_5": {"use_bias": True}, "smollm3": {"no_rope_layers": [0, 1, 0]}, "exaone4": {"sliding_window": 8},
    "gemma4_text": {
        "hidden_size_per_layer_input": 0, "sliding_window": 8, "global_head_dim": 6, "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_key_value_heads": 8,
        "num_global_key_value_heads": 4,
    },
    "qwen3_5_text": {
        "partial_rotary_factor": 0.5, "full_attention_interval": 2, "linear_num_key_heads": 4,
        "linear_num_value_heads": 8, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
    },
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 8, "kv_lora_rank": 16, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
OWN |= {"deepseek_v3": LATENT, "glm4_moe_lite": LATENT}
OWN |= {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16}, "olmoe": {"num_experts": 8},
    "glm4_moe": {"n_routed_experts": 8, "moe_intermediate_size": 16}, "gpt_oss": {"num_local_experts": 8},
}  # fmt: skip
WINDOWED = ("mistral", "phi3", "qwen2", "qwen3", "gemma2", "gemma3_text")
MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]
KEY = jax.random.key(0)
ROOT = Path(__file__).parents[1]


def arch_of(family, **changes):
    """A shape of the family, with all that it has: biases, windows, query-key norms; the head is untied."""
    raw = {"model_type": family} | SIZES | ({"sliding_window": 8} if family in WINDOWED else {})
    raw |= OWN.get(family, {}) | changes
    return to_arch(raw, hf.FAMILIES[family], Path("config.json"))


def tree_of(arch, *, score_head=False, seed=0):
    rng = np.random.default_rng(seed)
    shapes = leaf_shapes(arch, score_head=score_head)
    return nested({leaf: rng.standard_normal(shape).astype(np.float32) for leaf, shape in shapes.items()})


def write(path, family="llama", *, score_head=False, dtype="float32", **changes):
    """(directory, shape, parameters)"""
    arch = arch_of(family, **changes)
    params, base = tree_of(arch, score_head=score_head), {"model_type": family}
    hf.save_model(path, arch, params, eos_ids=[2], score_head=score_head, dtype=dtype, base_config=base)
    return path, arch, params


def edit(path, change):
    """Rewrite the weights: change(tensors) -> tensors."""
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"})


def mesh_of(*sizes, expert=1):
    return make_mesh(MeshConfig(*sizes, expert=expert))


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


# ---- onto the mesh


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_every_device_gets_its_slice_of_the_whole(tmp_path, family):
    path, arch, params = write(tmp_path / "m", family)
    assert hf.read_config(path)[0] == arch and hf.read_config(path)[1]["model_type"] == family
    over_experts = [((1, 1, 2), 4)] if arch.num_experts else []
    for sizes, experts in [(sizes, 1) for sizes in MESHES] + over_experts:
        mesh, split = mesh_of(*sizes, expert=experts), 0
        loaded = hf.load_params(path, arch, score_head=False, mesh=mesh)
        assert jax.tree.map(lambda x: x.sharding, loaded) == tree_shardings(mesh, params)
        for leaf, whole in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
            assert len(leaf.addressable_shards) == 8
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index])
                split += shard.data.size < whole.size
        assert (split > 0) == (sizes != (8, 1, 1))


def test_a_score_head_and_bfloat16_on_the_mesh(tmp_path):
    path, arch, params = write(tmp_path / "m", score_head=True)
    for mesh in (mesh_of(2, 2, 2), None):
        loaded = hf.load_params(path, arch, score_head=True, mesh=mesh, dtype="bfloat16")
        for leaf, array in flattened(loaded).items():
            expected = flattened(params)[leaf]
            assert array.dtype == (np.float32 if leaf.startswith("score/") else ml_dtypes.bfloat16)
            np.testing.assert_array_equal(array, expected.astype(array.dtype), err_msg=leaf)


@pytest.mark.parametrize(("family", "head"), [("gpt2", "vocabulary"), ("gpt2", "normal"), ("glm4_moe", "normal")])
def test_param_dtype_is_the_dtype_of_loaded_and_of_fresh_weights(tmp_path, family, head):
    """But of scalar heads, and of the bias by which a router chooses."""
    path, arch, _ = write(tmp_path / "m", family)
    mesh, kept = mesh_of(1, 8, 1), ("score/kernel", "score/bias", "layers/experts/router_choice_bias")
    settings = ModelConfig(path=str(path), param_dtype="bfloat16")
    for config in (settings, replace(settings, path="", arch=arch)):
        for leaf, array in flattened(load_model(config, mesh, KEY, head=head).params).items():
            assert array.dtype == (np.float32 if leaf in kept else ml_dtypes.bfloat16), leaf


def test_only_stored_dtypes_that_are_numbers_load(tmp_path):
    """float16 and float64 are read as they are; the arrays have the dtype that was asked for."""
    path, arch, params = write(tmp_path / "m")
    for dtype in (np.float16, np.float64, ml_dtypes.bfloat16):
        hf.save_model(path, arch, params, eos_ids=[2])
        edit(path, lambda tensors, dtype=dtype: {name: x.astype(dtype) for name, x in tensors.items()})
        loaded = hf.load_params(path, arch, score_head=False, mesh=mesh_of(1, 8, 1))
        assert_equal(loaded, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype).astype(np.float32), params))


@pytest.mark.parametrize(
    ("stored", "read"),
    [pair.split() for pair in ("float32 bfloat16", "float64 float32", "float16 bfloat16", "bfloat16 float32")],
)
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_5_text"])
def test_weights_that_a_narrower_type_rounds_are_counted_once(tmp_path, capsys, family, stored, read):
    """On any mesh, whose devices read their parts; heads of scores keep what they are."""
    path, arch, _ = write(tmp_path / "m", family, score_head=True)
    edit(path, lambda tensors: {name: np.round(x.astype(float), 2).astype(stored) for name, x in tensors.items()})
    tensors, changed, size = load_file(path / "model.safetensors"), 0, 0
    for name, x in tensors.items():
        dtype = "float32" if name.startswith("score") else read
        changed += np.sum(x != x.astype(dtype).astype(stored))
        size += x.size if dtype == read else 0
    line = f"{path}: {changed:,} of {size:,} weights are rounded, from {stored} to {read}\n" if changed else ""
    for mesh in (None, mesh_of(2, 2, 2)):
        hf.load_params(path, arch, score_head=True, mesh=mesh, dtype=read)
        assert capsys.readouterr().err == line
    assert bool(changed) == (stored == "float64" or (read == "bfloat16"))


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_checkpoints_of_the_bare_trunk(tmp_path, family):
    """Written by AutoModel, as openai-community/gpt2 is: `wte.weight` where others have `transformer.wte.weight`."""
    path, _, _ = write(tmp_path / "m", family, tie_word_embeddings=True)
    arch = arch_of(family, tie_word_embeddings=True)
    want, prefix = hf.load_params(path, arch, score_head=False), hf.FAMILIES[family].prefix
    edit(path, lambda tensors: {name.removeprefix(prefix): x for name, x in tensors.items()})
    assert not any(name.startswith(prefix) for name in load_file(path / "model.safetensors"))
    assert_equal(hf.load_params(path, arch, score_head=False, mesh=mesh_of(1, 8, 1)), want)
    edit(path, lambda tensors: dict(sorted(tensors.items())[1:]))
    assert "lacks tensors that config.json asks for" in message(hf.load_params, path, arch, score_head=False)


def test_a_bare_trunk_with_an_untied_head_is_no_policy_but_makes_a_reward_model(tmp_path):
    path, _, params = write(tmp_path / "m")
    edit(path, lambda tensors: {n.removeprefix("model."): x for n, x in tensors.items() if n != "lm_head.weight"})
    config, mesh = ModelConfig(path=str(path)), mesh_of(1, 8, 1)
    assert "holds no vocabulary head (lm_head.weight)" in message(load_model, config, mesh, KEY)
    loaded = load_model(config, mesh, KEY, head="normal")
    assert_equal(
        {name: loaded.params[name] for name in ("embed", "layers")}, {n: params[n] for n in ("embed", "layers")}
    )


# ---- what cannot be loaded


def test_damaged_shards(tmp_path):
    path, arch, params = write(tmp_path / "m")
    hf.save_model(path, arch, params, eos_ids=[2], shard_bytes=20_000)
    files = sorted(path.glob("model-*.safetensors"))
    assert len(files) > 2
    content, index = files[1].read_bytes(), path / "model.safetensors.index.json"
    files[1].write_bytes(content[:-1])
    said = message(hf.load_params, path, arch, score_head=False)
    assert f"{files[1]} is no complete safetensors file" in said and "download or save it again" in said
    files[1].unlink()
    assert f"{files[1]} is missing" in message(hf.load_params, path, arch, score_head=False)
    files[1].write_bytes(files[0].read_bytes())  # a download that mixed them up
    assert "lacks tensors that config.json asks for" in message(hf.load_params, path, arch, score_head=False)
    files[1].write_bytes(content)
    assert_equal(hf.load_params(path, arch, score_head=False), params)
    index.write_text(index.read_text()[:-3])
    assert f"{index} holds no JSON object" in message(hf.load_params, path, arch, score_head=False)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
            "no support for mlp_only_layers [0]; choose a checkpoint",
        ),
        ({"model_type": "qwen3_moe", "num_experts": 0}, "num_experts is 0; take a dense family"),
        ({"model_type": "glm4_moe", "n_shared_experts": 0}, "no support for n_shared_experts 0"),
        ({"model_type": "glm4_moe", "first_k_dense_replace": 9}, "leaves none of 3 layers to experts"),
        (
            {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 9}},
            "no support for mixture-of-experts, model_type 'db",
        ),
        ({"model_type": "gemma3n", "text_config": {}}, "no support for model_type 'gemma3n'; use one of: llama"),
        ({"model_type": "llama", "architectures": ["LlamaForQuestionAnswering"]}, "'LlamaForQuestionAnswering'; use"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "xpos", "factor": 2.0}},
            "no support for rope scaling 'xpos'",
        ),
    ],
)
def test_unsupported_architectures(tmp_path, capsys, raw, said):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | raw))
    assert said in message(hf.read_config, tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["sft", "--model.path", str(tmp_path), "--model.tokenizer", str(toy_directory() / "tokenizer"),
              "--data.path", "rows.jsonl"])  # fmt: skip
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1


@pytest.mark.parametrize("score_head", [False, True])
def test_bin_files_are_refused_with_their_conversion(tmp_path, score_head):
    path, _, _ = write(tmp_path / "m", score_head=score_head)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    kind = "SequenceClassification" if score_head else "CausalLM"
    said = message(hf.read_config, path)
    assert f"where torch is installed, run python -c 'import transformers as t; t.LlamaFor{kind}.from_pre" in said


def test_the_conversion_of_bin_files_works(tmp_path):
    torch = pytest.importorskip("torch")
    path, arch, params = write(tmp_path / "m", score_head=True)
    tensors = {name: torch.from_numpy(array) for name, array in load_file(path / "model.safetensors").items()}
    tensors.pop("score.bias", None)
    torch.save(tensors, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    command = shlex.split(message(hf.read_config, path).split(" run python ")[1])
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    params["score"]["bias"] = np.float32(0)
    assert_equal(hf.load_params(path, arch, score_head=True), params)


# ---- back to files


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_sharded_arrays_save_as_whole_ones_do(tmp_path, family):
    path, arch, params = write(tmp_path / "m", family)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for sizes in MESHES:
        placed = jax.device_put(params, tree_shardings(mesh_of(*sizes), params))
        hf.save_model(path, arch, placed, eos_ids=[2], base_config={"model_type": family})
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    hf.save_model(path, arch, placed, eos_ids=[2], base_config={"model_type": family}, shard_bytes=20_000)
    assert not (path / "model.safetensors").exists() and len(list(path.glob("model-*.safetensors"))) > 2
    assert_equal(hf.load_params(path, arch, score_head=False, mesh=mesh_of(1, 2, 4)), params)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from rlhf_jax.models import hf
from rlhf_jax.models.hf import weights
save, calls = weights.save_file, []
def dying(*args, **options):
    calls.append(save(*args, **options))
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
weights.save_file = dying
path = Path(sys.argv[1])
arch, raw = hf.read_config(path)
params = hf.load_params(path, arch, score_head=False)
hf.save_model(path, arch, {**params, "final_norm": {"scale": np.zeros(arch.width, np.float32)}}, eos_ids=[3],
              base_config=raw, shard_bytes=20_000)
"""


def test_a_killed_save_leaves_the_old_directory(tmp_path):
    path, arch, params = write(tmp_path / "m")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, env=os.environ | {"XLA_FLAGS": FAST})
    assert done.returncode == -9
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert_equal(hf.load_params(path, arch, score_head=False), params)


def test_further_files_are_part_of_the_save(tmp_path):
    path, arch, params = write(tmp_path / "m")
    (path / "tokenizer.json").write_text("old")

    def failing(folder):
        (folder / "tokenizer.json").write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save_model(path, arch, params, eos_ids=[3], write_more=failing)
    assert (path / "tokenizer.json").read_text() == "old"
    assert hf.read_config(path)[1]["eos_token_id"] == 2
    hf.save_model(path, arch, params, eos_ids=[3], write_more=lambda f: (f / "tokenizer.json").write_text("new"))
    assert (path / "tokenizer.json").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


# ---- heads


def trunk(params):
    return {name: params[name] for name in ("embed", "layers", "final_norm")}


@pytest.mark.parametrize("score_head", [False, True], ids=["policy", "reward"])
@pytest.mark.parametrize("tied", [False, True])
def test_fresh_heads_on_the_trunk_of_any_directory(tmp_path, score_head, tied):
    """Reward or value model from a policy, value model from a reward model whose vocabulary head is gone."""
    path, arch, params = write(tmp_path / "m", score_head=score_head, tie_word_embeddings=tied)
    mesh = mesh_of(2, 2, 2)
    for head in ("normal", "zeros"):
        loaded = load_model(ModelConfig(path=str(path)), mesh, KEY, head=head)
        assert_equal(trunk(loaded.params), trunk(params))
        assert loaded.params.keys() == {*trunk(params), "score"} and loaded.model.score_head
        kernel, bias = (np.asarray(loaded.params["score"][name]) for name in ("kernel", "bias"))
        assert kernel.shape == (arch.width,) and bias == 0 and (kernel == 0).all() == (head == "zeros")
        assert loaded.params["score"]["kernel"].sharding == replicated(mesh)
        if score_head:
            assert (kernel != params["score"]["kernel"]).any()
        again = load_model(ModelConfig(path=str(path)), mesh, jax.random.key(1), head=head)
        assert (np.asarray(again.params["score"]["kernel"]) == kernel).all() == (head == "zeros")  # drawn by the key


def test_a_value_model_takes_over_the_head_of_a_reward_model(tmp_path):
    path, _, params = write(tmp_path / "m", score_head=True)
    loaded = load_model(ModelConfig(path=str(path)), mesh_of(1, 8, 1), KEY, head="trained")
    assert_equal(loaded.params, params)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_reward_models_trained_elsewhere(tmp_path, family):
    """transformers' classifiers: score.weight [1, D], no bias, one label by the length of id2label."""
    path, arch, params = write(tmp_path / "m", family, score_head=True)
    edit(path, lambda tensors: {name: x for name, x in tensors.items() if name != "score.bias"})
    raw = json.loads((path / "config.json").read_text())
    assert raw["architectures"] == [hf.FAMILIES[family].classifier]
    del raw["num_labels"]
    (path / "config.json").write_text(json.dumps(raw))
    final = flattened(params)
    stored = load_file(path / "model.safetensors")
    np.testing.assert_array_equal(stored["score.weight"], params["score"]["kernel"][None])
    loaded = load_model(ModelConfig(path=str(path)), mesh_of(1, 2, 4), KEY, head="trained").params
    assert loaded["score"]["bias"] == 0
    if "final_norm/bias" in final:  # where our bias went when the directory was written
        shift = params["score"]["kernel"] * params["score"]["bias"] / (params["score"]["kernel"] ** 2).sum()
        np.testing.assert_allclose(loaded["final_norm"]["bias"], final["final_norm/bias"] + shift, rtol=1e-5)
    assert_equal(loaded["layers"], params["layers"])
    edit(path, lambda tensors: tensors | {"score.weight": np.ones((3, arch.width), np.float32)})
    said = message(load_model, ModelConfig(path=str(path)), mesh_of(1, 2, 4), KEY, head="trained")
    assert "does not give one score: score.weight [3, 32], not [1, 32]; take a reward model with one label" in said


def test_a_fresh_head_where_a_trained_one_was_expected_is_an_error(tmp_path, capsys):
    policy = str(toy_directory() / "policy")
    mesh = mesh_of(1, 1, 8)
    said = message(load_model, ModelConfig(path=policy), make_mesh(MeshConfig()), KEY, head="trained")
    assert "holds no trained score head (score.weight); train one with `rlhf-jax reward`" in said
    arch = arch_of("llama", num_key_value_heads=8)
    said = message(load_model, ModelConfig(arch=arch), mesh, KEY, head="trained")
    assert "a trained score head was asked for, but model.path is empty" in said
    config = dataclasses.replace(toy_run(tmp_path / "run"), reward=RewardSourceConfig(model=policy))
    assert "holds no trained score head" in message(ppo.run, config, **TOY_ROWS)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(SystemExit) as exit:
        main(["score", "--model.path", policy, "--data_path", str(tmp_path / "rows.jsonl")])
    assert exit.value.code == 2 and "holds no trained score head" in capsys.readouterr().err


def test_a_reward_model_is_no_policy():
    said = message(load_model, ModelConfig(path=str(toy_directory() / "reward")), make_mesh(MeshConfig()), KEY)
    assert "is a reward or value model; give a language model" in said


# ---- what it costs


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_holds_little_beside_the_shards(dtype):
    found = loading.measure(0.1, dtype, dtype, devices=8)
    assert found["ok"] and 0.9 < found["ratio"] < 1.5, found
    assert found["checkpoint_bytes"] > 0.1 * 2**30


def test_a_copy_on_several_devices_is_read_once(tmp_path, monkeypatch):
    path, arch, _ = write(tmp_path / "m")
    reads, read = [], hf_weights._read_shard
    monkeypatch.setattr(hf_weights, "_read_shard", lambda *args: reads.append(args[-1]) or read(*args))
    leaves = len(leaf_shapes(arch, score_head=False))
    hf.load_params(path, arch, score_head=False, mesh=mesh_of(8, 1, 1))
    assert len(reads) == leaves
    reads.clear()
    loaded = hf.load_params(path, arch, score_head=False, mesh=mesh_of(4, 2, 1))
    parts = [len({str(s.index) for s in leaf.addressable_shards}) for leaf in jax.tree.leaves(loaded)]
    assert len(reads) == sum(parts) > leaves
