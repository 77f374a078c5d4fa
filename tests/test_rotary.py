"""Rotary laws that depend on length: one law for all that a run samples, scores and trains."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ARCH, ONE, model_params, toy_directory, toy_run

from rlhf_jax import ppo, sft
from rlhf_jax.config import MeshConfig, ModelConfig, PPOConfig, RopeScaling, SamplingConfig
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.inference.generate import Generator
from rlhf_jax.inference.sampling import SamplingLaw, sample
from rlhf_jax.models import Model
from rlhf_jax.models.loading import Loaded, load_model, save_model
from rlhf_jax.models.model import of_length
from rlhf_jax.models.rotary import rotary_tables
from rlhf_jax.online.core import packed, response_logprobs
from rlhf_jax.sharding import make_mesh, tree_shardings

KEY = jax.random.key(0)
NUM = ARCH.head_dim // 2
LONG = RopeScaling(
    "longrope",
    factor=6.0,
    original_max_positions=7,
    short_factor=(1.0, 1.1, 1.2, 1.3),
    long_factor=(3.0, 5.0, 8.0, 9.0),
)
LAWS = {
    "longrope": dataclasses.replace(ARCH, rope_scaling=LONG, max_positions=42),
    "dynamic": dataclasses.replace(ARCH, rope_scaling=RopeScaling("dynamic", factor=4.0), max_positions=7),
}
each_law = pytest.mark.parametrize("name", LAWS)


def expected_tables(arch, length, positions):
    """Cosines and sines in float64, from the papers' formulae."""
    i, scaling = np.arange(NUM), arch.rope_scaling
    if scaling.kind == "dynamic":
        stretch = max(1.0, scaling.factor * length / arch.max_positions - (scaling.factor - 1))
        base = arch.rope_theta * stretch ** (2 * NUM / (2 * NUM - 2))
        frequencies, gain = base ** (-i / NUM), 1.0
    else:
        divisors = scaling.long_factor if length > scaling.original_max_positions else scaling.short_factor
        frequencies = arch.rope_theta ** (-i / NUM) / np.array(divisors)
        gain = math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_positions))
    angles = positions[..., None] * frequencies
    return gain * np.cos(angles), gain * np.sin(angles)


@each_law
@pytest.mark.parametrize("length", [1, 7, 8, 30])
def test_the_law_is_that_of_the_length_whatever_the_positions(name, length):
    for positions in (np.arange(length)[None], np.array([[3, 0], [5, 1]])):
        found = rotary_tables(jnp.asarray(positions), LAWS[name], length)
        for table, expected in zip(found[:2], expected_tables(LAWS[name], length, positions), strict=True):
            np.testing.assert_allclose(table, expected, atol=2e-6)


@each_law
def test_transformers_has_the_same_law_for_a_sequence_of_that_length(name):
    torch = pytest.importorskip("torch", reason="needs torch: the golden files stand in for transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    arch, scaling = LAWS[name], LAWS[name].rope_scaling
    rope = {"rope_type": scaling.kind, "rope_theta": arch.rope_theta, "factor": scaling.factor}
    if name == "longrope":
        rope |= {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)}
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    shape = {"hidden_size": arch.width, "num_attention_heads": arch.num_heads, "head_dim": arch.head_dim}
    config = LlamaConfig(**shape, max_position_embeddings=arch.max_positions, rope_parameters=rope)
    for length in (3, 7, 8, 12):
        frequencies, gain = ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu", seq_len=length)
        angles = np.arange(length)[None, :, None] * frequencies.to(torch.float64).numpy()
        found = rotary_tables(jnp.arange(length)[None], arch, length)
        np.testing.assert_allclose(found[0], gain * np.cos(angles), atol=2e-6)


def gap(model, params, rollout):
    """Largest difference between the sampler's log-probs and those of a forward pass over the whole sequence."""
    forward = jax.jit(
        lambda p, r: response_logprobs(model, p, packed(r).at(0), jnp.float32(1.0), r.tokens.shape[1])[0]
    )
    return np.abs(np.where(rollout.mask, forward(params, rollout) - rollout.logprobs, 0)).max()


@each_law
def test_sampled_log_probs_are_those_of_a_forward_pass_across_the_border(name):
    """Rows of several lengths, some of which stop before the border and some of which cross it."""
    model = Model(LAWS[name])
    params = model_params(model, 3)
    prompt, mask = np.full((8, 5), 5, np.int32), np.arange(5) >= np.array([0, 1, 2, 4] * 2)[:, None]
    law = SamplingLaw.from_config(SamplingConfig())
    draw = jax.jit(lambda *args: sample(model, *args, max_new_tokens=6, stop_ids=(1, 2, 3), chunk=4, filtered=False))
    rollout = draw(params, prompt, mask, KEY, law)
    lengths = np.asarray(mask.sum(1) + rollout.mask.sum(1))
    assert lengths.min() <= 7 < lengths.max()
    assert gap(model, params, rollout) < 2e-5
    assert gap(dataclasses.replace(model, length=7), params, rollout) > 1e-3  # the other law would be noticed


def test_decoding_refuses_to_guess_the_length():
    model = Model(LAWS["longrope"])
    args = (np.ones((1, 3), np.int32), np.ones((1, 3), bool), np.arange(3)[None])
    with pytest.raises(ValueError, match="depends on length"):
        jax.eval_shape(lambda: model.prefill(model.decoding_params(model.init(KEY)), *args))
    assert of_length(model, 9).length == 9 and of_length(of_length(model, 9), 4).length == 9


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """policy/ and reward/ with the longrope law and the tokenizer of the toy."""
    path, tokenizer = tmp_path_factory.mktemp("longrope"), Tokenizer.load(str(toy_directory() / "tokenizer"))
    mesh = make_mesh(MeshConfig(), devices=ONE)
    for seed, name in enumerate(("policy", "reward")):
        model = Model(LAWS["longrope"], score_head=name == "reward")
        params = model_params(model, seed)
        save_model(path / name, Loaded(model, params), jax.device_put(params, tree_shardings(mesh, params)), tokenizer)
    return path


def test_all_buckets_of_a_generator_have_one_law(directory):
    """A bucket of 2 and 4 new tokens stay within the original length, one of 4 does not: the law is that of 8."""
    mesh = make_mesh(MeshConfig(), devices=ONE)
    with jax.set_mesh(mesh.grid):
        loaded = load_model(ModelConfig(path=str(directory / "policy")), mesh, KEY, length=8)
        tokenizer = Tokenizer.load(str(directory / "policy"))
        sampling = SamplingConfig(max_new_tokens=4, chunk=4, prompt_buckets=[2, 4])
        for model in (loaded.model, dataclasses.replace(loaded.model, length=0)):
            generator = Generator(model, tokenizer, sampling, mesh, max_prompt_length=4)
            prompts = np.full((2, 2), 4, np.int32)
            rollout = generator.rollout(loaded.params, prompts, np.ones_like(prompts, bool), KEY, generator.law)
            assert gap(loaded.model, loaded.params, rollout) < 2e-5
            assert gap(dataclasses.replace(loaded.model, length=6), loaded.params, rollout) > 1e-3


def test_ppo_samples_from_the_law_that_it_trains(directory, tmp_path):
    config = toy_run(tmp_path / "run", iterations=1, epochs=1, old_logprobs="recompute")
    replace = dataclasses.replace
    config = replace(
        config,
        model=replace(config.model, path=str(directory / "policy")),
        reward=replace(config.reward, model=str(directory / "reward")),
    )
    rows = [{"prompt": text} for text in ("a", "a b", "b")] * 8
    ppo.run(config, rows=rows, eval_rows=rows[:4])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in lines if "rollout/logprob_gap_max" in line)
    assert found["rollout/response_length"] > 1 and found["rollout/logprob_gap_max"] < 2e-5
    assert abs(found["policy/first_ratio_max"] - 1) < 1e-4


@each_law
@pytest.mark.parametrize("own", [6, 20])  # tokens of prompt and response, below and above those of the text
def test_the_text_of_ppo_has_the_law_of_its_own_length_as_in_pretraining(name, own):
    model = Model(LAWS[name], length=own)
    params, shape = {"policy": model_params(model, 0)}, (2, 10)
    text = {
        "tokens": jax.random.randint(KEY, shape, 4, ARCH.vocab_size),
        "positions": jnp.broadcast_to(jnp.arange(10), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "weights": jnp.full(shape, 1 / 18).at[:, 0].set(0.0),
    }
    nll = lambda logprobs, weights: (-jnp.sum(weights * logprobs), {})  # noqa: E731
    of_length = lambda n: sft.objective(dataclasses.replace(model, length=n), nll)(params["policy"], text, KEY)[0]  # noqa: E731
    trained = ppo.objective(ppo.Models(model, model), PPOConfig(ptx_coef=1.0))(params, {"ptx": text}, KEY)
    np.testing.assert_allclose(trained[0], of_length(10), rtol=1e-6)
    assert (name == "longrope" and own > 7) or abs(of_length(own) - of_length(10)) > 1e-4
