"""Laws of the table that says where parameters lie, and of what a config changes in it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import STOP, D, V, model_params

from rlhf_jax import cli, losses, sft
from rlhf_jax.config import ArchConfig, MeshConfig, OptimConfig, SamplingConfig
from rlhf_jax.config.rules import LEAVES, parse_rules
from rlhf_jax.errors import UserError
from rlhf_jax.inference.generate import make_sampler
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.models import Model
from rlhf_jax.models.hf.layout import leaf_shapes
from rlhf_jax.sharding import Mesh, make_mesh, put_batch, rollout_mesh, tree_shardings
from rlhf_jax.tokens import positions_from_mask
from rlhf_jax.training.state import TrainState, create_state, make_optimizer, make_schedule
from rlhf_jax.training.step import make_train_step, make_update

ARCH = ArchConfig(  # 2 key-value heads, which 8 does not divide
    vocab_size=V,
    width=D,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffn_width=32,
    tied_head=False,
    max_positions=16,
)
MODEL, KEY = Model(ARCH), jax.random.key(0)
TX = make_optimizer(OptimConfig(schedule="constant", eps=1e-2), make_schedule(OptimConfig(learning_rate=3e-4), 1))


def text_batch() -> dict:
    tokens = np.random.default_rng(0).integers(0, V, (8, 7)).astype(np.int32)
    ones = np.ones((8, 7), np.int32)
    weights = np.full((8, 7), 1 / 56, np.float32)
    return {"tokens": tokens, "positions": np.cumsum(ones, 1) - 1, "segment_ids": ones, "weights": weights}


def specs(config: MeshConfig) -> TrainState:
    """The PartitionSpec of every parameter and of every moment."""
    params = jax.eval_shape(MODEL.init, KEY)
    state = jax.eval_shape(lambda p: TrainState.create(p, TX), params)
    return jax.tree.map(lambda place: place.spec, tree_shardings(make_mesh(config), state))


def test_the_default_table():
    found = specs(MeshConfig(data=2, fsdp=2, tensor=2)).params
    assert found["layers"]["attn"] == {"qkv": P(None, "fsdp", "tensor", None, None),
                                       "out": P(None, "tensor", None, None, "fsdp")}  # fmt: skip
    assert found["layers"]["mlp"] == {"up": P(None, "fsdp", None, "tensor"), "down": P(None, "tensor", "fsdp")}
    assert found["layers"]["attn_norm"] == {"scale": P(None, None)} and found["final_norm"] == {"scale": P(None)}
    assert (found["embed"]["tokens"], found["head"]["kernel"]) == (P("tensor", "fsdp"), P("fsdp", "tensor"))


def test_rules_move_parameters_and_their_moments():
    lines = ["V=-", "F=fsdp+tensor", "D=-", "mlp/down=-,tensor,fsdp", "final_norm/.*=data"]
    found = specs(MeshConfig(data=2, fsdp=2, tensor=2, rules=lines))
    for tree in (found.params, found.opt_state[1].mu, found.opt_state[1].nu):  # [0] is the clip
        assert tree["embed"]["tokens"] == P(None, None)
        assert tree["layers"]["mlp"] == {
            "up": P(None, None, None, ("fsdp", "tensor")),
            "down": P(None, "tensor", "fsdp"),
        }
        assert tree["layers"]["attn"]["qkv"] == P(None, None, "tensor", None, None)
        assert tree["final_norm"]["scale"] == P("data") and tree["layers"]["attn_norm"]["scale"] == P(None, None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fsdp", ["'fsdp' is no rule", "LETTER=AXES"]),
        ("=fsdp", ["is no rule"]),
        ("D=fsdp,tensor", ["to one letter of", "D=fsdp"]),
        ("Q=fsdp", ["to one letter of"]),
        ("D=model", ["'model' is no mesh axis", "data, fsdp, tensor or -"]),
        ("D=", ["'' is no mesh axis"]),
        ("D=fsdp+fsdp", ["twice"]),
        ("embed/tokens=fsdp,fsdp", ["twice"]),
        ("embed/tokens=fsdp", ["1 dimensions, but embed/tokens has 2: V D"]),
        ("embd/tokens=-,fsdp", ["matches no parameter", "inspect"]),
        ("tokens(=-,fsdp", ["no regular expression"]),
    ],
)
def test_a_bad_rule_is_one_line(line, words):
    with pytest.raises(UserError) as error:
        MeshConfig(rules=[line])
    said = str(error.value)
    assert "\n" not in said and said.startswith("mesh.rules ") and all(word in said for word in words), said


def test_rules_come_from_yaml_and_from_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text('mesh:\n  tensor: 4\n  rules: ["K=-", "V=fsdp+tensor"]\n')
    assert cli.parse("sft", ["--config", str(path)]).mesh.rules == ["K=-", "V=fsdp+tensor"]
    assert cli.parse("ppo", ["--mesh.rules", '["embed/tokens=-,fsdp"]']).mesh.rules == ["embed/tokens=-,fsdp"]
    with pytest.raises(UserError, match="no mesh axis"):
        cli.parse("sft", ["--mesh.rules", '["K=up"]'])


def test_every_leaf_of_a_model_has_axes_of_its_rank():
    for wide in ("none", "head", "all"):
        arch = dataclasses.replace(ARCH, qk_norm=wide, qkv_bias=True, mlp_bias=True, out_bias=True)
        for head in (None, False, True):
            for name, shape in leaf_shapes(arch, score_head=head).items():
                assert len(parse_rules(()).of(name, shape)) == len(shape), name


# --- results do not depend on them

RULES = {
    "heads that do not divide": MeshConfig(data=1, tensor=8, rules=["K=-"]),
    "vocabulary over both": MeshConfig(data=2, fsdp=2, tensor=2, rules=["V=fsdp+tensor", "D=-"]),
    "all in one copy": MeshConfig(data=2, fsdp=2, tensor=2, rules=["D=-", "V=-", "K=-", "F=-"]),
    "over data too": MeshConfig(data=4, fsdp=2, rules=["D=data+fsdp", "embed/tokens=fsdp,-"]),
    "two slices": MeshConfig(slices=2, data=4, fsdp=2),
}


@pytest.mark.parametrize("name", RULES)
def test_a_step_is_the_same_under_every_rule(name):
    """To 2e-6, as on every mesh."""
    params, batch, mesh = model_params(MODEL, 0), text_batch(), make_mesh(RULES[name])
    loss_fn = sft.objective(MODEL, losses.next_token_loss)
    expected, metrics = jax.jit(make_update(loss_fn, TX))(TrainState.create(params, TX), batch, KEY)
    loss_fn = sft.objective(dataclasses.replace(MODEL, rules=mesh.rules), losses.next_token_loss)
    with jax.set_mesh(mesh.grid):
        state = create_state(jax.tree.map(np.asarray, params), TX, mesh)
        step = make_train_step(loss_fn, TX, mesh=mesh, state=state)
        state, found = step(state, put_batch(mesh, batch), KEY)
    for a, b in zip(jax.tree.leaves((state.params, found)), jax.tree.leaves((expected.params, metrics)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)
    places = tree_shardings(mesh, state)
    jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim) or pytest.fail(str(place)), state, places)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RULES)[:3])
def test_greedy_tokens_are_the_same_under_every_rule(name):
    params = model_params(MODEL, 0)
    config = SamplingConfig(max_new_tokens=6, temperature=0.0)
    prompt, mask = np.full((8, 3), 2, np.int32) + np.arange(8)[:, None], np.ones((8, 3), bool)
    sample, law = make_sampler(MODEL, config, (STOP,)), SamplingLaw.from_config(config)
    expected = jax.jit(sample)(params, prompt, mask, KEY, law)
    mesh = make_mesh(RULES[name])
    sample = make_sampler(dataclasses.replace(MODEL, rules=mesh.rules), config, (STOP,))
    with jax.set_mesh(mesh.grid):
        placed = jax.device_put(params, tree_shardings(mesh, params))
        found = jax.jit(sample)(placed, *put_batch(mesh, (prompt, mask)), KEY, law)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


# --- slices


def chips(slices: int, each: int) -> list:
    """Devices of several TPU slices, out of order."""
    found = [
        SimpleNamespace(
            platform="tpu",
            device_kind="none",
            slice_index=s,
            id=i,
            process_index=0,
            coords=(i % 2, i // 2, 0),
            core_on_chip=0,
        )
        for i in range(each)
        for s in range(slices)
    ]
    return found[::-1]


def test_the_data_axis_goes_over_slices_first_and_all_else_stays_within_one(monkeypatch):
    monkeypatch.setattr("rlhf_jax.sharding._grid_of", lambda devices, axes: SimpleNamespace(
        devices=devices, shape=dict(zip(axes, devices.shape, strict=True))))  # fmt: skip
    mesh = make_mesh(MeshConfig(slices=2, data=4, fsdp=-1, tensor=2), chips(2, 8))
    assert mesh.shape == {"data": 4, "fsdp": 2, "tensor": 2}
    where = np.vectorize(lambda chip: chip.slice_index)(mesh.grid.devices)
    np.testing.assert_array_equal(where, np.broadcast_to(np.array([0, 0, 1, 1])[:, None, None], (4, 2, 2)))


def test_an_axis_of_the_torus_is_cut_where_no_product_of_its_axes_is_the_mesh(monkeypatch):
    monkeypatch.setattr("rlhf_jax.sharding._grid_of", lambda devices, axes: SimpleNamespace(devices=devices))
    given = chips(1, 64)  # 2 x 32
    devices = make_mesh(MeshConfig(data=1, fsdp=8, expert=8), given).grid.devices
    assert devices.shape == (1, 8, 8, 1) and {d.id for d in devices.flat} == set(range(64))


def test_slices_that_do_not_fit_are_one_line():
    with pytest.raises(UserError, match=r"mesh.data 3 is not a multiple of mesh.slices 2"):
        make_mesh(MeshConfig(slices=2, data=3), jax.devices()[:3])
    for config in (MeshConfig(), MeshConfig(slices=4)):
        with pytest.raises(UserError, match=rf"mesh.slices is {config.slices}, but the devices are in 2 TPU slice"):
            make_mesh(config, chips(2, 8))
    with pytest.raises(UserError, match=r"mesh.slices is 0; make it at least 1"):
        MeshConfig(slices=0)


def test_the_table_names_no_axis_twice():
    assert all(len(set(axes)) == len(axes) for axes in LEAVES.values())


def lies_in(mesh: Mesh) -> tuple:
    """Shape of a device's part of logits, of the cache [B, K, ...], and where splash has [B, K, G, T, N]."""
    model, params = Model(ARCH, rules=mesh.rules), model_params(MODEL, 0)
    tokens, mask = put_batch(mesh, (np.full((8, 3), 2, np.int32), np.ones((8, 3), bool)))

    def both(model, params, tokens, mask):
        at = positions_from_mask(mask)
        logits = model.project(params, model.apply(params, tokens, at, mask.astype(np.int32)))
        return logits, model.prefill(model.decoding_params(params), tokens, mask, at)[1]

    with jax.set_mesh(mesh.grid):
        args = jax.device_put(params, tree_shardings(mesh, params)), tokens, mask
        logits, cache = jax.jit(both, static_argnums=0)(model, *args)
        program = jax.make_jaxpr(both, static_argnums=0)(
            dataclasses.replace(model, attention="splash_interpret"), *args
        )
    (cached,) = {x.addressable_shards[0].data.shape[:2] for x in jax.tree.leaves(cache)}
    (kernel,) = {e.params["out_specs"] for e in program.eqns if e.primitive.name == "shard_map"}
    return logits.addressable_shards[0].data.shape, cached, kernel[0]


def test_logits_lie_over_the_vocabulary_and_cache_and_attention_over_heads():
    where = lies_in(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert where == ((2, 3, V // 2), (2, 1), P(("data", "fsdp"), "tensor", None, None, None))


def test_two_meshes_of_one_shape_each_follow_their_own_rules():
    """Both are made before either is used: parameters, and within jit logits, cache and attention."""
    configs = [MeshConfig(data=2, fsdp=2, tensor=2, rules=rules) for rules in ([], ["D=-", "K=-", "V=-"])]
    split, whole = (make_mesh(config) for config in configs)
    assert split.grid is whole.grid
    table = {"embed": {"tokens": jax.ShapeDtypeStruct((V, D), np.float32)}}
    places = [tree_shardings(mesh, table)["embed"]["tokens"].spec for mesh in (split, whole)]
    assert places == [P("tensor", "fsdp"), P(None, None)]
    assert lies_in(whole) == ((2, 3, V), (2, 2), P(("data", "fsdp"), None, None, None, None))
    assert lies_in(split)[0] == (2, 3, V // 2)


def test_a_rollout_mesh_has_the_rules_of_its_own_config():
    configs = [MeshConfig(data=2, fsdp=2, tensor=2, rollout_tensor=4, rules=rules) for rules in ([], ["V=-"])]
    meshes = [(config, make_mesh(config)) for config in configs]
    split, whole = (rollout_mesh(config, mesh) for config, mesh in meshes)
    assert split.grid is whole.grid and split.shape["tensor"] == 4 and split.rules != whole.rules
    assert whole.rules == meshes[1][1].rules
