"""Every model family against transformers: golden files always, transformers itself where torch is installed.

`golden/make_families.py` says what the golden files hold and how transformers came to it.
"""

import dataclasses
import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from rlhf_jax.inference.sampling import SamplingLaw, sample
from rlhf_jax.models import Model, decoding, hf
from rlhf_jax.models.cache import apart, together
from rlhf_jax.models.hf import config_json
from rlhf_jax.models.model import of_length
from rlhf_jax.sharding import path_name
from rlhf_jax.tokens import positions_from_mask

GOLDEN = Path(__file__).with_name("golden")
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2", "gpt_neox",
    "ministral", "seed_oss", "olmo3", "cwm", "vaultgemma", "starcoder2", "smollm3", "exaone4", "granite", "glm",
    "glm4", "cohere", "cohere2", "phi", "stablelm", "falcon", "nemotron", "arcee", "ernie4_5", "ministral3",
    "hunyuan_v1_dense", "opt", "gptj", "qwen3_moe", "mixtral", "olmoe",
    "glm4_moe", "gpt_oss", "qwen3_5_text", "gemma4_text", "deepseek_v3",
    "glm4_moe_lite",
)  # fmt: skip
WITHOUT_CLASSIFIER = {
    "cwm",
    "vaultgemma",
    "granite",
    "cohere",
    "cohere2",
    "ernie4_5",
    "olmoe",
    "glm4_moe",
    "gemma4_text",
    "glm4_moe_lite",
}  # in transformers
BF16 = jnp.dtype("bfloat16")
GREEDY = SamplingLaw(jnp.float32(0), jnp.int32(0), jnp.float32(1), jnp.int32(0))


@cache
def golden_file(family):
    return np.load(GOLDEN / f"{family}.npz")


def golden(name):
    """The arrays of one case."""
    family, case = name.split("/")
    file = golden_file(family)
    return {key.removeprefix(f"{case}/"): file[key] for key in file.files if key.startswith(f"{case}/")}


CASES = [f"{f}/{case}" for f in FAMILIES for case in dict.fromkeys(k.split("/")[0] for k in golden_file(f).files)]
EXPERTS = ("qwen3_moe", "mixtral", "olmoe", "glm4_moe", "gpt_oss")
LIGHT = {f"{family}/{case}" for family in EXPERTS for case in ("hub", "deep", "tied", "all", "few", "one")}
LIGHT |= {f"qwen3_5_text/{case}" for case in ("bias", "heads", "old", "full")}
LIGHT |= {f"deepseek_v3/{case}" for case in ("plain", "gain", "dense")}
LIGHT |= {f"glm4_moe_lite/{case}" for case in ("plain", "hub", "mixed", "wide", "bias")}
LIGHT |= {f"gemma4_text/{case}" for case in ("plain", "by_layer", "sixth", "small_hub", "shared", "inputs")}
LIGHT |= {"gemma4_text/experts_hub"}
"""Cases whose compilation is spared: of them logits alone are compared, by the code that has the others' gradients.

So are those that differ from an earlier one of their family in NUMBERS alone, or in the table of rotations.
"""
NUMBERS = ("num_layers", "ffn_width", "max_positions", "sliding_window", "init_std", "norm_eps", "rope_theta")
NUMBERS += ("head_dim", "width", "num_heads", "num_kv_heads", "query_pre_attn_scalar", "logit_multiplier")
NUMBERS += ("embedding_multiplier", "activation")
STAY_FLOAT32 = ("score.weight", "e_score_correction_bias")
LANGUAGE_MODELS = [name for name in CASES if not name.endswith("/score")]
CLASSIFIERS = [name for name in CASES if name.endswith("/score")]
each_case = pytest.mark.parametrize("name", CASES)
each_language_model = pytest.mark.parametrize("name", LANGUAGE_MODELS)


def write(path, arrays, **changes):
    """The directory that transformers saved, with changes to its config.json; an Ellipsis takes a key out."""
    path.mkdir(parents=True, exist_ok=True)
    config = json.loads(arrays["config"].tobytes()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    (path / "model.safetensors").write_bytes(arrays["weights"].tobytes())
    return path


def load_model(path, *, score_head=False):
    arch, _ = hf.read_config(path)
    return Model(arch, score_head=score_head), hf.load_params(path, arch, score_head=score_head)


def hidden_of(model, params, tokens, mask):
    return model.apply(params, tokens, positions_from_mask(mask), mask.astype(np.int32))


@partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, mask):
    return model.project(params, hidden_of(model, params, tokens, mask))


@partial(jax.jit, static_argnums=0)
def forward_and_backward(model, params, tokens, mask):
    """(mean log-prob, logits), gradients."""

    def mean_logprob(params):
        logits, pairs = model.project(params, hidden_of(model, params, tokens, mask)), mask[:, :-1] & mask[:, 1:]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(chosen, where=pairs) / pairs.sum(), logits

    return jax.value_and_grad(mean_logprob, has_aux=True)(params)


@partial(jax.jit, static_argnums=0)
def greedy(model, params, tokens, mask):
    key = jax.random.key(0)
    return sample(model, params, tokens, mask, key, GREEDY, max_new_tokens=8, stop_ids=(), chunk=8, filtered=False)


@partial(jax.jit, static_argnums=0)
def best_next(model, params, tokens, mask, forced):
    """Of prompts and continuations int32[B, T]: the likeliest token at each place of these, through the cache."""
    (rows, new), positions = forced.shape, positions_from_mask(mask)
    model, params = of_length(model, tokens.shape[1] + new), model.decoding_params(params)
    logits, cache = model.prefill(params, tokens, mask, positions)
    shared, states = apart(cache)
    own = jax.tree.map(lambda c: jnp.zeros((rows, c.shape[1], new, c.shape[3]), c.dtype), shared)
    cache = together(own, states)
    columns = jnp.concatenate([positions, positions[:, -1:] + 1 + jnp.arange(new)[None]], axis=1)

    def step(cache, inputs):
        i, token = inputs
        position = positions[:, -1] + 1 + i
        sees = jnp.concatenate([mask, jnp.broadcast_to(jnp.arange(new)[None] <= i, (rows, new))], axis=1)
        apart = position[:, None] - columns
        logits, cache, _ = model.decode(params, token, position, sees, apart, shared, cache, i)
        return cache, logits.argmax(-1)

    _, rest = jax.lax.scan(step, cache, (jnp.arange(new - 1), forced[:, :-1].T))
    return jnp.concatenate([logits.argmax(-1)[None], rest]).T


@pytest.fixture(autouse=True)
def programs_are_let_go():
    """Every case is a program of its own: thousands kept in one process have run it out of memory maps."""
    yield
    for program in (logits_of, forward_and_backward, greedy, best_next):
        program.clear_cache()


@cache
def first_of_each_program(family):
    """Of the family's cases outside LIGHT the first of each shape, but for numbers."""
    found = {}
    for name in (name for name in LANGUAGE_MODELS if name.startswith(f"{family}/") and name not in LIGHT):
        arch = config_json.to_arch(json.loads(golden(name)["config"].tobytes()), hf.FAMILIES[family], Path(name))
        shape = dataclasses.asdict(arch) | dict.fromkeys(NUMBERS)
        shape["heads"] = arch.num_kv_heads == 1, arch.num_kv_heads == arch.num_heads
        by_length = arch.rope_scaling and arch.rope_scaling.kind in ("dynamic", "longrope")
        shape["rope_scaling"] = arch.rope_scaling if by_length else None
        for layers in ("window_layers", "nope_layers", "delta_layers"):
            shape[layers] = len(shape[layers]) > 0, len(shape[layers]) == arch.num_layers
        found.setdefault(repr(shape), name)
    return set(found.values())


def inputs(arrays):
    return arrays["input_ids"].astype(np.int32), arrays["attention_mask"].astype(bool)


# ---- golden


def test_golden_files_have_every_family():
    assert set(FAMILIES) == set(hf.FAMILIES)
    assert {name.split("/")[0] for name in LANGUAGE_MODELS} == set(FAMILIES)
    assert {name.split("/")[0] for name in CLASSIFIERS} == set(FAMILIES) - WITHOUT_CLASSIFIER


@each_language_model
def test_logits_gradients_and_greedy_tokens(tmp_path, name):
    arrays = golden(name)
    assert arrays["margin"] >= 2e-3
    model, params = load_model(write(tmp_path / "m", arrays))
    if name not in first_of_each_program(name.split("/")[0]):
        logits = logits_of(model, params, *inputs(arrays)) * arrays["attention_mask"][..., None]
        np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-4)
        return
    (value, logits), grads = forward_and_backward(model, params, *inputs(arrays))
    np.testing.assert_allclose(logits * arrays["attention_mask"][..., None], arrays["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(value, arrays["logprob"], rtol=1e-5)
    raw = hf.read_config(tmp_path / "m")[1]
    hf.save_model(tmp_path / "grads", model.arch, grads, eos_ids=[], base_config=raw)  # in the layout of the weights
    found, expected = load_file(tmp_path / "grads" / "model.safetensors"), load(arrays["gradients"].tobytes())
    assert len(expected) > 5
    for key, gradient in expected.items():
        error = found[key] - gradient
        still = ".experts." in key or key.endswith("k_proj.bias")  # an expert without a token; keys that do not turn
        if still and np.abs(gradient).max() < 1e-6:
            assert np.abs(error).max() < 1e-6
            continue
        assert np.abs(gradient).max() > 1e-4, key  # it is no rounding error itself
        assert np.linalg.norm(error) <= 1e-3 * np.linalg.norm(gradient), key
        assert np.abs(error).max() <= 1e-3 * np.abs(gradient).max(), key
    expected = arrays["generated"].astype(np.int32)
    np.testing.assert_array_equal(best_next(model, params, *inputs(arrays), expected), expected)


@pytest.mark.parametrize(
    "name", ["gpt2/inner", "phi/half", "gpt_oss/plain", "qwen3_5_text/plain", "gemma4_text/plain", "deepseek_v3/plain"]
)
def test_in_bfloat16_training_rounds_the_weights_that_the_sampler_rounds(tmp_path, name):
    arrays = golden(name)
    model, params = load_model(write(tmp_path, arrays))
    model, params = (
        dataclasses.replace(model, compute_dtype=BF16),
        jax.tree.map(lambda x: x * np.float32(1.003), params),
    )

    def rounded(path, x):
        return x if any(part in path_name(path) for part in decoding.FLOAT32) else x.astype(BF16).astype(np.float32)

    alike = jax.tree_util.tree_map_with_path(rounded, params)
    np.testing.assert_array_equal(*(logits_of(model, each, *inputs(arrays)) for each in (params, alike)))


@pytest.mark.parametrize("name", ["gemma3_text/layers", "phi3/longrope_crossed", "gpt2/inner", "smollm3/mixed"])
def test_the_sampler_finds_the_same_tokens(tmp_path, name):
    arrays = golden(name)
    model, params = load_model(write(tmp_path, arrays))
    np.testing.assert_array_equal(greedy(model, params, *inputs(arrays)).tokens, arrays["generated"])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores(tmp_path, name):
    arrays = golden(name)
    model, params = load_model(write(tmp_path, arrays), score_head=True)
    hidden = jax.jit(partial(hidden_of, model))(params, *inputs(arrays))
    scores = model.scores(params["score"], hidden)[:, -1]
    np.testing.assert_allclose(scores, arrays["scores"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral/window", {"sliding_window": 4}),
        ("mistral/window", {"sliding_window": 6}),
        ("mistral/window", {"sliding_window": None}),
        ("mistral/window_old", {"rope_theta": 210.0}),
        ("qwen2/window", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("qwen2/window_old", {"max_window_layers": 1}),
        ("qwen2/window_old", {"use_sliding_window": False}),
        ("qwen3/bias_window", {"rms_norm_eps": 1e-2}),
        ("gemma/gelu_old", {"hidden_act": "silu"}),
        ("gemma2/caps", {"attn_logit_softcapping": 1.6}),
        ("gemma2/caps", {"attn_logit_softcapping": None}),
        ("gemma2/caps", {"final_logit_softcapping": None}),
        ("gemma2/caps", {"query_pre_attn_scalar": 8}),
        ("gemma2/caps", {"hidden_activation": "gelu_pytorch_tanh"}),
        ("gemma2/caps_old", {"sliding_window": 5}),
        ("gemma3_text/layers_old", {"rope_local_base_freq": 800.0}),
        ("gemma3_text/layers_old", {"rope_scaling": None}),
        ("gemma3_text/layers_old", {"sliding_window_pattern": 3}),
        ("phi3/partial_old", {"partial_rotary_factor": 0.75}),
        ("phi3/longrope_long", {"original_max_position_embeddings": 24}),
        ("phi3/longrope_short", {"original_max_position_embeddings": 23}),
        ("llama/rope_linear_old", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama/rope_dynamic", {"max_position_embeddings": 9}),
        ("llama/rope_llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("llama/smollm", {"rope_theta": 10000.0}),
        ("gpt_neox/parallel_old", {"rotary_pct": 0.25}),
        ("gpt_neox/parallel", {"use_parallel_residual": False}),
        ("gpt_neox/parallel", {"hidden_act": "gelu_new"}),
        ("gpt2/inner", {"layer_norm_epsilon": 1e-5}),
        ("ministral/as_mistral", {"layer_types": ["sliding_attention"] * 3}),
        ("ministral/mixed", {"sliding_window": 5}),
        ("seed_oss/defaults_old", {"rope_theta": 310.0}),
        ("olmo3/yarn", {"layer_types": ["full_attention"] * 4}),
        ("olmo3/yarn_old", {"rope_scaling": None}),
        ("olmo3/mixed", {"sliding_window": 5}),
        ("cwm/defaults_old", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("cwm/mixed", {"sliding_window": 4}),
        ("vaultgemma/caps", {"attn_logit_softcapping": None}),
        ("vaultgemma/caps_old", {"sliding_window": 5}),
        ("starcoder2/window", {"norm_epsilon": 1e-5}),
        ("starcoder2/window", {"sliding_window": None}),
        ("smollm3/window", {"sliding_window": 5}),
        ("smollm3/hub_old", {"no_rope_layers": [1, 1, 0, 1]}),
        ("exaone4/nowhere", {"sliding_window": None}),
        ("exaone4/hybrid", {"sliding_window": 5}),
        ("glm/half_old", {"partial_rotary_factor": None}),
        ("cohere2/mixed", {"layer_types": ["sliding_attention"] * 3}),
        ("phi/quarter_old", {"partial_rotary_factor": 0.5}),
        ("stablelm/quarter", {"layer_norm_eps": 1e-5}),
        ("nemotron/whole_old", {"hidden_act": "relu2"}),
        ("hunyuan_v1_dense/alpha_old", {"rope_scaling": {"type": "dynamic", "alpha": 30.0, "factor": 1.0}}),
        ("gptj/pairs", {"rotary_dim": 8}),
    ],
)  # fmt: skip
def test_the_golden_logits_notice_a_wrong_config(tmp_path, name, changes):
    """Each setting matters at least five times more than the tolerance: a decoder that ignored it would fail above."""
    arrays = golden(name)
    model, params = load_model(write(tmp_path, arrays, **changes))
    logits = logits_of(model, params, *inputs(arrays)) * arrays["attention_mask"][..., None]
    assert np.abs(logits - arrays["logits"]).max() > 5e-4


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("smollm3/interval", {"nope_layers": ()}),
        ("exaone4/hybrid", {"nope_layers": ()}),
        ("granite/multipliers", {"embedding_multiplier": 1.0}),
        ("granite/multipliers", {"residual_multiplier": 1.0}),
        ("granite/multipliers", {"attention_multiplier": 0.0}),
        ("granite/multipliers", {"logit_multiplier": 1.0}),
        ("glm4/half", {"rope_pairs": False}),
        ("nemotron/half", {"activation": "relu"}),
        ("ministral3/scaled", {"query_log_scale": 0.0}),
        ("hunyuan_v1_dense/plain", {"qk_norm": "head"}),
        ("opt/offset", {"position_offset": 0}),
        ("glm4_moe/hub", {"routed_scale": 1.0}),
        ("gpt_oss/tied", {"glu_limit": 7.0}),
        ("gpt_oss/deep", {"glu_alpha": 1.702}),
        ("glm4_moe/plain", {"router_groups": 1, "router_top_groups": 1}),
        ("qwen3_5_text/plain", {"rope_fraction": 0.25}),
    ],
)
def test_the_golden_logits_notice_a_part_left_out(tmp_path, name, plain):
    arrays = golden(name)
    model, params = load_model(write(tmp_path, arrays))
    model = Model(dataclasses.replace(model.arch, **plain))
    logits = logits_of(model, params, *inputs(arrays)) * arrays["attention_mask"][..., None]
    assert np.abs(logits - arrays["logits"]).max() > 5e-4


# ---- in and out


@each_case
def test_round_trip(tmp_path, name):
    arrays, score_head = golden(name), name in CLASSIFIERS
    path = write(tmp_path / "m", arrays)
    arch, raw = hf.read_config(path)
    params, weights = hf.load_params(path, arch, score_head=score_head), load(arrays["weights"].tobytes())
    for dtype in (np.float32, ml_dtypes.bfloat16):
        new, kind = tmp_path / np.dtype(dtype).name, {"dtype": np.dtype(dtype).name, "score_head": score_head}
        eos = raw["eos_token_id"] if isinstance(raw["eos_token_id"], list) else [raw["eos_token_id"]]
        hf.save_model(new, arch, params, eos_ids=eos, base_config=raw, **kind)
        found, again = hf.read_config(new)
        assert found == arch
        assert again["model_type"] == name.split("/")[0]
        for key in ("architectures", "bos_token_id", "eos_token_id", "pad_token_id"):
            assert again[key] == raw[key], key
        stored = load_file(new / "model.safetensors")
        assert stored.keys() == weights.keys()
        for key, array in weights.items():
            expected = array if key.endswith(STAY_FLOAT32) else array.astype(dtype)
            assert stored[key].dtype == expected.dtype, key
            assert stored[key].tobytes() == expected.tobytes(), key


@pytest.mark.parametrize("name", ["gpt2/old", "gpt_neox/parallel_old", "llama/rope_llama3_old"])
def test_old_checkpoints_of_the_hub(tmp_path, name):
    """Without the trunk's prefix (openai-community/gpt2), and with buffers beside the weights (gpt2, Pythia)."""
    arrays = golden(name)
    params = load_model(write(tmp_path / "m", arrays))[1]
    weights = load(arrays["weights"].tobytes())
    attention = {"gpt2": "transformer.h.0.attn", "gpt_neox": "gpt_neox.layers.0.attention"}
    layer = attention.get(name.split("/")[0], "model.layers.0.self_attn")
    buffers = {} if layer.startswith("model") else {f"{layer}.bias": np.ones((1, 1, 24, 24), np.uint8)}
    buffers |= {f"{layer}.masked_bias": np.float32([-1e9])} if buffers else {}
    buffers |= {} if name.startswith("gpt2") else {f"{layer}.rotary_emb.inv_freq": np.ones(3, np.float32)}
    weights |= buffers
    if name.startswith("gpt2"):
        weights = {key.removeprefix("transformer."): array for key, array in weights.items()}
    path = write(tmp_path / "old", arrays)
    save_file(weights, path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_model(path)[1], params)


# ---- live


@pytest.fixture(scope="module")
def maker():
    """make_families as a module."""
    torch = pytest.importorskip("torch", reason="needs torch: the golden files stand in for transformers")
    torch.set_num_threads(1)
    from golden import make_families

    return make_families


def test_the_script_and_the_golden_files_have_the_same_cases(maker):
    assert sorted(maker.CASES) == sorted(CASES)


@pytest.mark.parametrize("name", CASES[::4])
def test_golden_files_are_not_stale(tmp_path, name, maker):
    """transformers, now and here, computes what the file holds; torch differs a little between processors."""
    old, new = golden(name), maker.make_case(name)
    assert old.keys() == new.keys()
    archs = [hf.read_config(write(tmp_path / word, arrays))[0] for word, arrays in (("old", old), ("new", new))]
    assert archs[0] == archs[1]
    for word in ("weights", "gradients") if name in LANGUAGE_MODELS else ("weights",):
        tensors = [load(arrays[word].tobytes()) for arrays in (old, new)]
        assert tensors[0].keys() == tensors[1].keys()
        for key in tensors[0]:
            atol = 1e-5 if word == "weights" else 1e-5 + 1e-3 * np.abs(tensors[0][key]).max()
            np.testing.assert_allclose(tensors[1][key], tensors[0][key], rtol=0, atol=atol, err_msg=key)
    for key in old.keys() - {"config", "weights", "gradients"}:
        np.testing.assert_allclose(new[key], old[key], rtol=1e-4, atol=5e-5, err_msg=key)


@each_case
def test_transformers_loads_what_we_save(tmp_path, name, maker):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    arrays, score_head = golden(name), name in CLASSIFIERS
    arch, raw = hf.read_config(write(tmp_path / "m", arrays))
    params = hf.load_params(tmp_path / "m", arch, score_head=score_head)
    hf.save_model(tmp_path / "new", arch, params, eos_ids=[2], base_config=raw, score_head=score_head)
    auto = AutoModelForSequenceClassification if score_head else AutoModelForCausalLM
    model, report = auto.from_pretrained(tmp_path / "new", **maker.EAGER, output_loading_info=True)
    assert {key: value for key, value in report.items() if value} == {}
    assert type(model).__name__ == raw["architectures"][0]
    ids, mask = (torch.from_numpy(arrays[key]) for key in ("input_ids", "attention_mask"))
    with torch.no_grad():
        outputs = maker.forward(model.eval(), ids, mask).numpy()
    if score_head:
        np.testing.assert_allclose(outputs[:, 0], arrays["scores"], rtol=0, atol=1e-4)
    else:
        outputs = outputs * arrays["attention_mask"][..., None]
        np.testing.assert_allclose(outputs, arrays["logits"], rtol=0, atol=1e-4)
