"""Laws of layers of two kinds, a state or attention, heads of two shapes: chunks, slots, meshes, stacks, adapters."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import V, model_params, text_batch

from rlhf_jax import losses, sft
from rlhf_jax.config import ArchConfig, LoRAConfig, MeshConfig, OptimConfig, RopeScaling
from rlhf_jax.inference.sampling import SamplingLaw, sample
from rlhf_jax.models import Model, delta, hf
from rlhf_jax.models.delta import GatedDelta, Path, Recurrent
from rlhf_jax.models.hf.layout import flattened, leaf_shapes
from rlhf_jax.models.hf.peft import save_adapter
from rlhf_jax.models.kernels import Stack, depth, joined, quantized, stacks_of
from rlhf_jax.models.lora import init_adapters, sites
from rlhf_jax.models.pure import pure
from rlhf_jax.models.stacking import period
from rlhf_jax.sharding import batch_sharding, make_mesh, put_batch, tree_shardings
from rlhf_jax.training.state import TrainState, create_state, make_optimizer, make_schedule
from rlhf_jax.training.step import make_train_step, make_update

ARCH = ArchConfig(  # two periods of two layers, and one layer more
    vocab_size=V, width=16, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=16, max_positions=40,
    qk_norm="head", attn_gate=True, norm_offset=True, rope_fraction=0.5, delta_layers=(0, 2, 4),
    delta_key_heads=2, delta_value_heads=4, delta_key_dim=3, delta_value_dim=5, delta_kernel=3,
)  # fmt: skip
SMALL = dataclasses.replace(ARCH, num_layers=2, delta_layers=(0,), tied_head=False)
HEADS = ArchConfig(  # as in Gemma 4: two shapes of heads; two layers with the keys and values of two below; inputs
    vocab_size=V, width=16, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=16, max_positions=40,
    norm_position="both", qk_norm="head", scale_embedding=True, activation="gelu_tanh", attention_multiplier=1.0,
    sliding_window=3, window_layers=(0, 2, 4), full_head_dim=12, full_kv_heads=2, full_keys_as_values=True,
    value_norm=True, layer_gain=True, rope_local_theta=100.0, shared_kv_layers=2, shared_kv_ffn_width=32,
    layer_input_width=6,
    rope_scaling=RopeScaling(kind="proportional", fraction=0.5),
)  # fmt: skip
LATENT = ArchConfig(  # keys and values of one vector, as in DeepSeek-V3
    vocab_size=V, width=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=10, ffn_width=6, max_positions=40,
    rope_pairs=True, latent_width=6, latent_query_width=8, latent_rope_dim=4, latent_value_dim=7, num_experts=4,
    experts_per_token=2, router="sigmoid", shared_width=6, dense_layers=1, dense_width=16, tied_head=False,
)  # fmt: skip
FEW_HEADS = dataclasses.replace(HEADS, num_layers=4, window_layers=(0, 2), tied_head=False)
KEY = jax.random.key(0)
SEGMENTS = [0] * 2 + [1] * 16 + [2] * 4 + [3] * 5
BRANCHES = [0] * 2 + [0] * 5 + [1] * 3 + [2] * 6 + [3] * 2 + [0] * 4 + [1] * 3 + [2] * 2
"""Padding; a prompt of 5 with three answers; a text; two answers to no prompt."""


@pytest.fixture(autouse=True)
def chunks_are_short(monkeypatch):
    """So that all of these texts have several."""
    monkeypatch.setattr(delta, "CHUNK", 4)


def paths():
    """(columns of what a branch consists of, which of them are its own) of every segment."""
    segments, branches = np.array(SEGMENTS), np.array(BRANCHES)
    for segment in (1, 2, 3):
        for branch in sorted(set(branches[segments == segment])):
            columns = np.flatnonzero((segments == segment) & np.isin(branches, (0, branch)))
            yield columns, branches[columns] == branch


def test_chunks_are_token_by_token_whatever_lies_beside_a_text():
    layer, rng = pure(lambda rngs: GatedDelta(ARCH, jax.nn.silu, rngs=rngs)), np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.4 * rng.normal(size=x.shape).astype(np.float32), layer.init(KEY))
    params["log_rate"] -= 2  # states that last
    x = jnp.asarray(rng.normal(size=(1, len(SEGMENTS), 16)), jnp.float32)
    y, state = layer.apply(params, x, Path.of(jnp.array([SEGMENTS]), jnp.array([BRANCHES])))
    one = jax.jit(lambda x, state: layer.apply(params, x, state))
    for columns, own in paths():
        last, found = Recurrent(jnp.zeros((1, 2, 2, 16)), jnp.zeros((1, 2, 2, 3, 5))), []
        for column in columns:
            token, last = one(x[:, column : column + 1], last)
            found.append(token[0, 0])
        np.testing.assert_allclose(np.stack(found)[own], y[0, columns][own], atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), last, state)


@pytest.mark.parametrize("arch", [ARCH, HEADS, LATENT], ids=["delta", "heads", "latent"])
def test_padding_packing_and_a_shared_prompt_change_nothing(arch):
    """Of a model of both kinds of layers; every text is alone in a row of the same shape, at its ends."""
    model = Model(arch)
    params = model_params(model, 0)
    tokens = np.random.default_rng(1).integers(2, V, (1, len(SEGMENTS)))
    logits = jax.jit(lambda *inputs: model.project(params, model.apply(params, *inputs)))
    positions, size = np.zeros((1, len(SEGMENTS)), int), len(SEGMENTS)
    for columns, _ in paths():
        positions[0, columns] = np.arange(len(columns))
    together = logits(tokens, positions, np.array([SEGMENTS]), np.array([BRANCHES]))[0]
    for columns, own in paths():
        for first in (0, size - len(columns)):
            row = np.zeros((3, 1, size), int)  # tokens, positions, segments
            for i, values in enumerate((tokens[0, columns], np.arange(len(columns)), 1)):
                row[i, 0, first : first + len(columns)] = values
            alone = logits(*row, np.zeros((1, size), int))[0, first : first + len(columns)]
            np.testing.assert_allclose(alone[own], together[columns][own], atol=1e-4)


@pytest.mark.parametrize("arch", [SMALL, FEW_HEADS, LATENT], ids=["delta", "heads", "latent"])
def test_slots_and_rows_that_go_on_give_the_same_tokens_on_a_mesh(arch):
    """Of 2 x 2 x 2 devices, each shard with half of its rows in slots, cut after every two tokens."""
    model, mesh, rng = Model(arch), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), np.random.default_rng(0)
    params = jax.tree.map(lambda x: 3 * x, model_params(model, 0))
    law = SamplingLaw(jnp.float32(1), jnp.int32(0), jnp.float32(1), jnp.int32(0))
    mask = np.arange(6) >= 6 - rng.integers(1, 7, (8, 1))
    prompt = np.where(mask, rng.integers(3, V, mask.shape), 0).astype(np.int32)
    stops = (1, 2) if arch == SMALL else tuple(range(1, 7))
    run = partial(sample, model, max_new_tokens=7, stop_ids=stops, chunk=2, samples=2, filtered=False)
    expected = jax.jit(run)(params, prompt, mask, KEY, law)
    noise, rollout = jax.random.uniform(KEY, (16, 7)), jax.tree.map(jnp.zeros_like, expected)
    with jax.set_mesh(mesh.grid):
        placed = jax.device_put(params, tree_shardings(mesh, params)), *put_batch(mesh, (prompt, mask))
        refilled = jax.jit(partial(run, slots=8, budget=2), out_shardings=batch_sharding(mesh))
        rollout, noise = put_batch(mesh, jax.device_get((rollout, noise)))
        for _ in range(4):
            rollout = refilled(*placed, KEY, law, put_batch(mesh, np.ones(8, bool)), noise, rollout)
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(expected, name))
    np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=2e-4)  # weights are three times as large
    assert len(set(np.asarray(expected.mask).sum(1))) > 2


@pytest.mark.parametrize("arch", [ARCH, HEADS, LATENT], ids=["delta", "heads", "latent"])
def test_a_step_is_the_same_on_a_mesh(arch):
    model, mesh = Model(arch, remat="dots"), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params, loss = model_params(model, 0), sft.objective(model, losses.next_token_loss)
    optim = OptimConfig(learning_rate=0.01, schedule="constant", eps=1e-2)
    tx, batch = make_optimizer(optim, make_schedule(optim, 1)), text_batch(8, 7, 2)
    gains = np.array(params["layers"]["gain"]["scale"]) if arch == HEADS else None
    expected, _ = jax.jit(make_update(loss, tx))(TrainState.create(params, tx), batch, KEY)
    with jax.set_mesh(mesh.grid):
        state = create_state(params, tx, mesh)
        state, _ = make_train_step(loss, tx, mesh=mesh, state=state)(state, put_batch(mesh, batch), KEY)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), state.params, jax.device_get(expected.params))
    layers = state.params["layers"]
    kernels = {ARCH: ("delta", "qkv", (3, 8, 1, 16)), HEADS: ("full", "qkv", (1, 8, 1, 3, 12))}
    part, kernel, shape = kernels.get(arch, ("latent", "kv_up", (2, 6, 2, 13)))
    assert layers[part][kernel].addressable_shards[0].data.shape == shape
    if arch == HEADS:  # which no gradient trains, and no decay
        np.testing.assert_array_equal(layers["gain"]["scale"], gains)


# --- stacks


@pytest.mark.parametrize(
    ("mixers", "size"),
    [("aaaa", 1), ("dddadddadd", 4), ("dada", 2), ("ad", 2), ("dda", 3), ("dddda", 5), ("addadda", 3)],
)
def test_the_period_of_layers(mixers, size):
    assert period(mixers) == size


def test_a_program_has_as_many_operations_however_deep_the_model_is():
    def operations(periods, of_one_kind):
        size = of_one_kind + 1
        layers = tuple(i for i in range(size * periods) if i % size != of_one_kind)
        model = Model(dataclasses.replace(ARCH, num_layers=size * periods, delta_layers=layers))
        ids = jax.ShapeDtypeStruct((2, 6), "int32")
        params = jax.eval_shape(model.init, KEY)
        return str(jax.make_jaxpr(jax.grad(lambda p, *x: model.apply(p, *x).sum()))(params, ids, ids, ids)).count("=")

    assert operations(2, 2) == operations(5, 2) == operations(2, 4)


@pytest.mark.parametrize(("arch", "top"), [(ARCH, 1), (ARCH, 2), (HEADS, 2)], ids=["one", "two", "heads"])
def test_two_stacks_compute_what_one_does_and_are_read_as_one(arch, top):
    model, batch = Model(arch), text_batch(2, 7, 2)
    params = model.init(KEY)
    assert {name: leaf.shape for name, leaf in flattened(params).items()} == leaf_shapes(arch, score_head=False)
    split = model.split(params, top)
    assert [depth(stack) for stack in stacks_of(split)] == [5 - top, top]
    inputs = [batch[name] for name in ("tokens", "positions", "segment_ids")]
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(split, *inputs), apply(params, *inputs), atol=1e-6)
    for name, leaf in flattened(model.merged(split)).items():
        whole = flattened(params)[name]
        assert leaf.shape == whole.shape
        if name.startswith("layers"):
            np.testing.assert_array_equal([leaf[i] for i in range(len(whole))], whole)


# --- adapters


@pytest.mark.parametrize(("arch", "how"), [(SMALL, "none"), (SMALL, "nf4"), (FEW_HEADS, "none"), (LATENT, "none")])
def test_adapters_of_all_linear_layers_are_what_they_are_merged_and_come_back_from_files(tmp_path, arch, how):
    model = Model(arch, lora_scale=2.0)
    chosen = sites(hf.find_family(arch))
    modules = {site.module.partition("{}.")[2] for site in chosen if "linear_attn" in site.module}
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj") if arch == SMALL else ()
    assert modules == {f"linear_attn.{name}" for name in names}
    noise = lambda x: x + 0.2 * jax.random.normal(jax.random.fold_in(KEY, x.size), x.shape)  # noqa: E731
    base = quantized(model_params(model, 0), how)
    assert arch != SMALL or isinstance(base["layers"]["delta"]["decay"], jax.Array)
    adapters = jax.tree.map(noise, init_adapters(arch, chosen, 2, KEY))
    params = joined(base, adapters)
    if arch == FEW_HEADS:
        assert set(params["layers"]["full"]["qkv_lora"]) == {"query", "key_value"}
    array = lambda x: jnp.stack([x[i] for i in range(x.shape[0])]) if isinstance(x, Stack) else x  # noqa: E731
    merged, batch = jax.tree.map(array, model.merged(params)), text_batch(2, 7, 2)
    inputs, apply = [batch[name] for name in ("tokens", "positions", "segment_ids")], jax.jit(model.apply)
    found, expected, plain = (apply(p, *inputs) for p in (params, merged, base))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - plain).max() > 0.1
    if how == "none":
        folder, lora = tmp_path / "adapter", LoRAConfig(rank=2, alpha=4.0)
        hf.save_model(tmp_path / "base", arch, base, eos_ids=[2])
        save_adapter(folder, arch, hf.find_family(arch), lora, jax.device_get(adapters), base=str(tmp_path / "base"))
        read = hf.load_params(folder, arch, score_head=False)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), read, merged)
