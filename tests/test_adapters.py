"""PEFT adapters: those that peft made, against what it computed; ours, read back and, where it is installed, by peft.

`golden/make_adapters.py` says what the golden file holds and how peft came to it.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_families
from safetensors.numpy import load, load_file, save_file
from test_lora import KEY, adapters, merged
from tiny import ONE, toy_directory

from rlhf_jax import errors
from rlhf_jax.config import LoRAConfig, MeshConfig, ModelConfig
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model, hf
from rlhf_jax.models.hf.layout import flattened
from rlhf_jax.models.hf.peft import adapter_config
from rlhf_jax.models.loading import load_model, load_tokenizer, save_model
from rlhf_jax.models.lora import scale_of, sites
from rlhf_jax.sharding import make_mesh

GOLDEN = Path(__file__).with_name("golden")
ARRAYS = np.load(GOLDEN / "adapters.npz")
CASES = tuple(dict.fromkeys(key.split("/")[0] for key in ARRAYS.files))


def golden(case):
    return {key.removeprefix(f"{case}/"): ARRAYS[key] for key in ARRAYS.files if key.startswith(f"{case}/")}


def write(home, case="llama", **changes):
    """base and adapter as peft wrote them, with changes to adapter_config.json; returns the adapter's directory."""
    arrays = golden(case)
    for name in ("base", "adapter"):
        (home / name).mkdir(exist_ok=True)
    raw = json.loads(arrays["adapter_config"].tobytes()) | {"base_model_name_or_path": str(home / "base")} | changes
    (home / "base" / "config.json").write_bytes(arrays["config"].tobytes())
    (home / "base" / "model.safetensors").write_bytes(arrays["weights"].tobytes())
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(raw))
    (home / "adapter" / "adapter_model.safetensors").write_bytes(arrays["adapter_weights"].tobytes())
    return home / "adapter"


@partial(jax.jit, static_argnums=0)
def outputs(model, params, tokens):
    """Logits [B, S, V], or scores of the last token [B]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.apply(params, tokens, positions, jnp.ones_like(tokens))
    return model.scores(params["score"], hidden)[:, -1] if model.score_head else model.project(params, hidden)


def read(path, *, score_head=False):
    arch, _ = hf.read_config(path)
    return Model(arch, score_head=score_head), hf.load_params(path, arch, score_head=score_head)


# --- read


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_computes_what_it_does_with_peft(tmp_path, capsys, case):
    arrays, path = golden(case), write(tmp_path, case)
    tokens = arrays["tokens"].astype(np.int32)
    got = outputs(*read(path, score_head="scores" in arrays), tokens)
    expected = arrays.get("logits", arrays.get("scores"))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert not capsys.readouterr().err
    whole = hf.read_config(path)[0].tied_head
    assert whole == (
        hf.read_config(tmp_path / "base")[0].tied_head
        and case not in ("embedding", "head_pair", "gpt2_tied", "gpt2_table", "table", "table_tied")
    )
    if "scores" not in arrays:
        assert np.abs(outputs(*read(tmp_path / "base"), tokens) - expected).max() > 0.1


@pytest.mark.parametrize(("case", "flag"), [("llama", True), ("gpt2", False)])  # PEFT goes by the layer
def test_fan_in_fan_out_says_nothing(tmp_path, case, flag):
    plain, told = (read(write(tmp_path, case, **changes))[1] for changes in ({}, {"fan_in_fan_out": flag}))
    jax.tree.map(np.testing.assert_array_equal, plain, told)


def test_a_pattern_as_peft_writes_it_for_fused_layers(tmp_path):
    names = "layers.1.mlp.down_proj", r".*\.layers\.1\.mlp\.down_proj", r"layers\.1\.(self_attn|mlp)\.[a-e]own_proj|q"
    plain, *told = (read(write(tmp_path, "patterns", alpha_pattern={name: 3}))[1] for name in names)
    jax.tree.map(np.testing.assert_array_equal, [plain] * 2, told)


def test_an_adapter_is_found_on_a_base_of_the_bare_trunk(tmp_path):
    path = write(tmp_path, "gpt2")
    bare = {name.removeprefix("transformer."): x for name, x in load_file(tmp_path / "base/model.safetensors").items()}
    save_file(bare, tmp_path / "base/model.safetensors")
    tokens = golden("gpt2")["tokens"].astype(np.int32)
    np.testing.assert_allclose(outputs(*read(path), tokens), golden("gpt2")["logits"], atol=1e-4)


@pytest.mark.parametrize("case", ["embedding", "gpt2_tied", "neox_pair", "table"])
def test_a_pair_that_an_adapter_unties_is_saved_untied(tmp_path, case):
    path = write(tmp_path, case)
    arch, base = hf.read_config(path)
    params = hf.load_params(path, arch, score_head=False)
    hf.save_model(tmp_path / "merged", arch, params, eos_ids=[2], base_config=base)
    assert hf.read_config(tmp_path / "merged") == (arch, hf.read_config(tmp_path / "merged")[1])
    tokens = golden(case)["tokens"].astype(np.int32)
    np.testing.assert_allclose(outputs(*read(tmp_path / "merged"), tokens), golden(case)["logits"], atol=1e-4)


def test_an_adapter_on_the_bare_trunk_of_a_tied_model(tmp_path):
    path = write(tmp_path, "gpt2_tied")
    bare = {name.removeprefix("transformer."): x for name, x in load_file(tmp_path / "base/model.safetensors").items()}
    save_file(bare, tmp_path / "base/model.safetensors")
    tokens = golden("gpt2_tied")["tokens"].astype(np.int32)
    np.testing.assert_allclose(outputs(*read(path), tokens), golden("gpt2_tied")["logits"], atol=1e-4)


ATTENTION = r"model\.layers\.\d+\.(?:self_attn|attn)\.(?:(?:q|v)_proj)"


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"target_modules": ["q_proj", "mlp.down_proj"]}, r".*(q_proj|mlp\.down_proj)"),
        ({"target_modules": ["proj", "layers.1.self_attn.q_proj"]}, r".*layers\.1\.self_attn\.q_proj"),
        ({"target_modules": ATTENTION}, ATTENTION),
        ({"target_modules": "All-Linear", "exclude_modules": ["v_proj"]}, r".*(?<!v_proj)"),
        ({"exclude_modules": r".*\.layers\.1\..*"}, r".*layers\.0.*"),
        ({"modules_to_save": ["up_proj"]}, r".*(?<!up_proj)"),
        ({"layers_to_transform": [1, 5]}, r".*layers\.1.*"),
        ({"layers_to_transform": 0, "layers_pattern": ["h", "layers"]}, r".*layers\.0.*"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, None),
    ],
    ids=str,
)
def test_pairs_of_modules_that_an_adapter_does_not_target_are_left_out_as_by_peft_and_counted(
    tmp_path, capsys, changes, kept
):
    path = write(tmp_path, **changes)
    pairs = load_file(path / "adapter_model.safetensors")
    module = re.compile(r"base_model\.model\.(.*)\.lora_[AB]\.weight")
    least = {name: x for name, x in pairs.items() if kept and re.fullmatch(kept, module.fullmatch(name)[1])}
    told = read(path)[1]
    count = (len(pairs) - len(least)) // 2
    assert f"{path}: {count} adapters of modules that it does not target are left out: " in capsys.readouterr().err
    save_file(least, path / "adapter_model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, told, read(path)[1])
    assert not capsys.readouterr().err and len(least) < len(pairs) and bool(least) == bool(kept)


def test_every_shard_of_a_mesh_has_its_part_of_the_sum(tmp_path):
    path = write(tmp_path)
    arch, _ = hf.read_config(path)
    split = hf.load_params(path, arch, score_head=False, mesh=make_mesh(MeshConfig(2, 2, 2)))
    for leaf, array in flattened(hf.load_params(path, arch, score_head=False)).items():
        np.testing.assert_array_equal(flattened(split)[leaf], array, err_msg=leaf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "no support for use_dora True; merge"),
        ({"use_bdlora": {"nblocks": 2}}, "no support for use_bdlora {'nblocks': 2}; merge"),
        ({"init_lora_weights": "pissa"}, "no support for init_lora_weights 'pissa'"),
        ({"target_parameters": ["a.weight", "gate_up_proj"]}, "no support for target_parameters 'gate_up_proj'"),
        ({"peft_type": "IA3"}, "no support for peft_type 'IA3'"),
        ({"base_model_name_or_path": "no/where"}, "stands on no/where, which is neither a directory nor downloaded"),
        ({"base_model_name_or_path": None}, "stands on none, which is neither"),
    ],
)
def test_what_an_adapter_says_and_we_cannot_do_is_refused(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read(path)


def test_an_adapter_of_another_model_or_with_unknown_tensors_is_refused(tmp_path):
    path = write(tmp_path)
    weights = load(golden("llama")["adapter_weights"].tobytes())
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    for change, message in (
        (lambda w: w | {name.replace("1", "7"): w[name]}, "layers.7.mlp.up_proj is not in the model"),
        (lambda w: {n: x for n, x in w.items() if n != name}, "layers.1.mlp.up_proj is not in the model .* half"),
        (
            lambda w: w | {name.replace("lora_A.weight", "lora_magnitude_vector"): w[name]},
            "no support for .*magnitude",
        ),
    ):
        save_file(change(weights), path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=message):
            read(path)
    (path / "adapter_model.safetensors").write_bytes(golden("llama")["adapter_weights"].tobytes()[:-9])
    with pytest.raises(UserError, match="no complete safetensors"):
        read(path)


# --- written


def trained(directory, lora, *, head="vocabulary"):
    """A model with random adapters, and a random head if it has one."""
    mesh = make_mesh(MeshConfig(), devices=ONE)
    loaded = load_model(ModelConfig(path=str(directory)), mesh, KEY, head=head, lora=lora)
    own = adapters(loaded.model.arch, lora.targets, lora.rank)
    heads = {"score": jax.tree.map(lambda x: x + 0.5, loaded.params["score"])} if "score" in loaded.params else {}
    return loaded, {**own, **heads}


def saved(home, case, lora, *, head="vocabulary"):
    """Of a base in adapters.npz, or in the golden file of a family."""
    write(home, case) if case in CASES else test_families.write(home / "base", test_families.golden(case))
    loaded, params = trained(home / "base", lora, head=head)
    tokenizer = Tokenizer.load(str(toy_directory() / "tokenizer"))
    save_model(home / "model", loaded, params, tokenizer)
    return loaded, params


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_our_adapters_have_the_names_and_shapes_of_peft(tmp_path, case):
    saved(tmp_path, case, LoRAConfig(rank=3))
    expected = load(golden(case)["adapter_weights"].tobytes())
    got = load_file(tmp_path / "model/adapter/adapter_model.safetensors")
    assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in expected.items()}


@pytest.mark.parametrize("case", ["llama", "gpt2", "deepseek_v3/plain"])
@pytest.mark.parametrize(
    "lora", [LoRAConfig(rank=2, alpha=3), LoRAConfig(rank=4, alpha=3, rank_stabilized=True)], ids=str
)
@pytest.mark.parametrize("head", ["vocabulary", "normal"])
def test_the_adapter_beside_a_model_read_back_is_that_model(tmp_path, case, lora, head):
    loaded, params = saved(tmp_path, case, lora, head=head)
    with_score = head != "vocabulary"
    assert hf.has_score_head(tmp_path / "model/adapter") == with_score
    tokens = golden("llama")["tokens"].astype(np.int32) % loaded.model.arch.vocab_size
    expected = outputs(loaded.model, loaded.whole(params), tokens)
    for name in ("model", "model/adapter"):
        got = outputs(*read(tmp_path / name, score_head=with_score), tokens)
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=name)


def test_an_adapter_of_an_adapter_and_its_tokenizer_are_found(tmp_path):
    policy, tokenizer = toy_directory() / "policy", Tokenizer.load(str(toy_directory() / "tokenizer"))
    at = policy
    for name in ("one", "two"):
        loaded, params = trained(at, LoRAConfig(rank=2, alpha=2))
        save_model(tmp_path / name, loaded, params, tokenizer)
        at = tmp_path / name / "adapter"
    assert load_tokenizer(ModelConfig(path=str(at))).hf.get_vocab() == tokenizer.hf.get_vocab()
    tree = jax.tree.map(np.asarray, merged(loaded.model, loaded.whole(params)))
    for leaf, array in flattened(read(at)[1]).items():
        np.testing.assert_allclose(array, flattened(tree)[leaf], atol=1e-5, err_msg=leaf)


def test_an_adapter_has_the_tokenizer_of_its_directory_and_the_stop_ids_of_its_model(tmp_path):
    """Other programs save the tokenizer, and the chat template that an adapter was trained with, beside it."""
    path = write(tmp_path)
    tokenizer = Tokenizer.load(str(toy_directory() / "tokenizer"))
    for folder, template in ((tmp_path / "base", "{{ messages[0].content }}"), (path, "a{{ messages[0].content }}")):
        tokenizer.hf.chat_template = template
        tokenizer.hf.save_pretrained(folder)
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    base, found, named = (load_tokenizer(ModelConfig(path=str(model), tokenizer=tokens)) for model, tokens in (
        (tmp_path / "base", ""), (path, ""), (tmp_path / "base", str(path))))  # fmt: skip
    assert found.hf.chat_template == named.hf.chat_template == "a" + base.hf.chat_template
    assert found.eos_ids == named.eos_ids == base.eos_ids == (5, 7)
    assert load_tokenizer(ModelConfig(path=str(path), eos_ids=[3])).eos_ids == (3,)


def test_an_adapter_names_its_base_by_its_whole_path_or_as_the_hub_or_a_bucket_does(tmp_path, monkeypatch):
    of = lambda base: adapter_config(LoRAConfig(rank=2), [], base=base, score_head=False)  # noqa: E731
    assert of(str(tmp_path))["base_model_name_or_path"] == str(tmp_path)
    found = of("hf://owner/name@v1")
    assert (found["base_model_name_or_path"], found["revision"]) == ("owner/name", "v1")
    monkeypatch.setattr(errors, "_NAMES", {str(tmp_path): "gs://bucket/run"})  # which is here while a run lasts
    assert of(f"{tmp_path}/round1/model")["base_model_name_or_path"] == "gs://bucket/run/round1/model"


@pytest.mark.parametrize(("family", "stabilized"), [("llama", True), ("qwen3_moe", False), ("mixtral", False)])
def test_the_factor_of_adapters_on_experts_is_one_that_peft_keeps(family, stabilized):
    """It doubles rank and alpha of gate and up, which leaves alpha / rank alone as it is."""
    for lora in LoRAConfig(rank=4, alpha=3, rank_stabilized=True), LoRAConfig(rank=4, alpha=3):
        raw = adapter_config(lora, sites(hf.FAMILIES[family]), base="base", score_head=False)
        assert raw["use_rslora"] == (stabilized and lora.rank_stabilized)
        assert raw["lora_alpha"] / raw["r"] ** (0.5 if raw["use_rslora"] else 1) == scale_of(lora)
    few = adapter_config(LoRAConfig(4, 3, True), sites(hf.FAMILIES[family], ["q_proj"]), base="base", score_head=False)
    assert few["use_rslora"] and few["lora_alpha"] == 3


@pytest.mark.parametrize(("targets", "said"), [(["gate_proj", "up_proj"], True), ([], False), (["down_proj"], False)])
def test_pairs_of_experts_that_peft_does_not_read_are_said_when_they_are_written(tmp_path, capsys, targets, said):
    """It keeps gate and up within what it makes of down, and loses them without a word where there is none."""
    saved(tmp_path, "qwen3_moe/plain", LoRAConfig(2, 3, targets=targets))
    line = "! adapter: peft reads what experts have in gate_proj, up_proj only beside pairs in down_proj, "
    assert (line in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("targets", "modules", "weights"),
    [
        (["down_proj"], ["down_proj"], ["mlp.down_proj", "mlp.shared_experts.down_proj"]),
        (["shared_experts.down_proj"], [], ["mlp.shared_experts.down_proj"]),
        (["q_proj", "mlp.up_proj"], ["self_attn.q_proj"], ["mlp.up_proj"]),
        (["q_proj"], ["self_attn.q_proj"], []),
    ],
)
def test_layers_beside_experts_are_named_by_their_weights_whatever_else_is_trained(targets, modules, weights):
    """As a module peft takes one that ends as an expert's layer does for these."""
    known, lora = sites(hf.FAMILIES["glm4_moe"]), LoRAConfig(2, 3, targets=targets)
    chosen = sites(hf.FAMILIES["glm4_moe"], targets)
    raw = adapter_config(lora, chosen, base="base", score_head=False, known=known)
    assert sorted(raw["target_modules"]) == modules
    assert sorted(raw.get("target_parameters", ())) == [f"{name}.weight" for name in weights]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's use of transformers
@pytest.mark.filterwarnings(
    "ignore:The following .* keys did not match:RuntimeWarning"
)  # which it makes itself for experts
@pytest.mark.parametrize(
    "case",
    ["llama", "gpt2"]
    + [f"{family}/plain" for family in ("qwen3_5_text", "qwen3_moe", "glm4_moe", "deepseek_v3", "glm4_moe_lite")],
)
@pytest.mark.parametrize(("head", "stabilized"), [("vocabulary", True), ("zeros", False)])
def test_peft_loads_ours_and_computes_the_same(tmp_path, monkeypatch, case, head, stabilized):
    pytest.importorskip("torch", reason="needs torch and peft: the golden file stands in for them")
    pytest.importorskip("peft")
    if head != "vocabulary" and case.startswith("glm4_moe"):
        pytest.skip("transformers has no classifier of it")
    loaded, params = saved(tmp_path, case, LoRAConfig(2, 3, stabilized), head=head)
    if head != "vocabulary":
        params["score"]["bias"] = jnp.zeros(())  # transformers' head has none
    tokens = golden("llama")["tokens"].astype(np.int32) % loaded.model.arch.vocab_size
    np.save(tmp_path / "inputs.npy", tokens)
    monkeypatch.syspath_prepend(GOLDEN)
    import make_adapters

    make_adapters.read_back(tmp_path)
    got = np.load(tmp_path / "outputs.npy")
    expected = outputs(loaded.model, loaded.whole(params), tokens)
    np.testing.assert_allclose(got if head == "vocabulary" else got[:, 0], expected, atol=1e-4)
    assert sys.modules["make_adapters"]
