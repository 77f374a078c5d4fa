"""Laws of ppo.trainable_layers: the frozen trunk is there once, and the reference on it is a full copy's."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ppo_stage import assert_stopped_and_continued_is_left_alone, load
from test_step import assert_same_bits, differ
from tiny import ARCH, ONE, STOP, TOY_ROWS, V, iteration, model_params, toy_directory, toy_run

from rlhf_jax.config import LoRAConfig, MeshConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.inference.sampling import SamplingLaw, sample
from rlhf_jax.models import Model
from rlhf_jax.models.hf.layout import flattened
from rlhf_jax.models.kernels import depth, stacks_of
from rlhf_jax.models.loading import Loaded, save_model
from rlhf_jax.online.core import packed, response_logprobs
from rlhf_jax.ppo import train
from rlhf_jax.sharding import make_mesh, tree_shardings

DEEP = dataclasses.replace(ARCH, num_layers=3, tied_head=False)
WINDOWED = dataclasses.replace(DEEP, sliding_window=2, window_layers=(1,), tied_head=True)
SPARSE_ABOVE = dataclasses.replace(
    DEEP, num_experts=4, experts_per_token=2, shared_width=8, dense_layers=2, dense_width=8
)
TRUNK = ("embed", "lower")


@functools.cache
def directory() -> str:
    """policy/ and reward/ of three layers beside those of `toy_directory`."""
    path, mesh = toy_directory() / "deep", make_mesh(MeshConfig(), devices=ONE)
    tokenizer = Tokenizer.load(str(toy_directory() / "tokenizer"))
    for seed, name in enumerate(("policy", "reward")):
        model = Model(DEEP, score_head=name == "reward")
        params = model_params(model, seed)
        save_model(path / name, Loaded(model, jax.device_put(params, tree_shardings(mesh, params))), params, tokenizer)
    return str(path)


def config(output_dir="", top=2, **changes):
    run = replace(toy_run(output_dir, trainable_layers=top), model__path=f"{directory()}/policy")
    return replace(run, reward__model=f"{directory()}/reward", **changes)


@pytest.fixture
def one_device(monkeypatch):
    """The stage on one device, where compiling is cheapest."""
    monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=ONE))


# --- two stacks are one model


def assert_same_layers(found, expected):
    """The bits of two trees, of which one is read layer by layer."""
    found, expected = flattened(found), flattened(expected)
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert leaf.shape == expected[name].shape and not any(differ(leaf[i], x) for i, x in enumerate(expected[name]))


def batch():
    tokens = jax.random.randint(jax.random.key(0), (4, 9), 2, V)
    positions = jnp.broadcast_to(jnp.arange(9), (4, 9))
    return tokens, positions, jnp.ones_like(tokens)


@pytest.mark.parametrize("arch", [DEEP, WINDOWED, SPARSE_ABOVE], ids=["plain", "windowed", "sparse above"])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_layers_in_two_stacks_compute_what_they_do_in_one(arch, top):
    model = Model(arch)
    params = model_params(model, 0)
    split = model.split(params, top)
    assert [depth(stack) for stack in stacks_of(split)] == [3 - top, top]
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(split, *batch()), apply(params, *batch()), rtol=1e-6, atol=1e-6)
    assert_same_layers(model.merged(split), params)


@pytest.mark.parametrize("arch", [DEEP, WINDOWED], ids=["plain", "windowed"])
def test_the_sampler_draws_the_same_from_two_stacks(arch):
    model, key = Model(arch), jax.random.key(1)
    params, prompt = model_params(model, 0), batch()[0][:, :3]
    law = SamplingLaw(jnp.float32(1), jnp.int32(0), jnp.float32(1), jnp.int32(0))
    drawn = [
        sample(model, tree, prompt, jnp.ones_like(prompt, bool), key, law, max_new_tokens=6, stop_ids=(STOP,), chunk=3,
               candidates=0, filtered=False, microbatch=0)
        for tree in (params, model.split(params, 2))
    ]  # fmt: skip
    assert_same_bits(drawn[0], drawn[1])


# --- what is trained, and what is there once


@pytest.mark.parametrize(
    ("ppo", "base"), [({}, "reward"), ({"value_init": "zeros"}, "ref"), ({"shared_trunk": True}, None)], ids=str
)
def test_the_frozen_trunk_is_there_once(one_device, ppo, base):
    changed = replace(config(), **{f"ppo__{name}": value for name, value in ppo.items()})
    method, loop = train.setup(changed, **TOY_ROWS)
    nets, params = method.nets, loop.state.params
    whole = nets.models.whole(nets.frozen, params)
    assert set(params["policy"]) == {"layers", "final_norm", "head"} and depth(params["policy"]["layers"]) == 2
    for name in TRUNK:
        assert jax.tree.leaves(nets.ref[name])[0] is jax.tree.leaves(whole["policy"][name])[0]
        assert jax.tree.leaves(nets.policy.frozen[name])[0] is jax.tree.leaves(nets.ref[name])[0]
    if base is None:
        assert set(params["value"]) == {"score"}
    else:
        on = {"ref": nets.ref, "reward": nets.reward}[base]
        assert set(params["value"]) == {"layers", "final_norm", "score"}
        assert jax.tree.leaves(on["lower"])[0] is jax.tree.leaves(whole["value"]["lower"])[0]
    pointers = lambda tree: {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}  # noqa: E731
    assert not pointers(params) & (pointers(nets.ref) | pointers(nets.reward))  # the state is donated, these are not
    moments = [x for x in jax.tree.leaves(loop.state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(params) if x.ndim)


def test_training_moves_the_top_alone_and_the_reference_stays_a_full_copy_of_the_start(one_device, tmp_path):
    run = config(tmp_path / "run", ppo__old_logprobs="recompute", ppo__save_value_model=True, run__keep_best=False)
    method, loop = train.setup(run, **TOY_ROWS)
    frozen, before = (jax.tree.map(np.array, tree) for tree in (method.nets.frozen, loop.state.params))
    kls = []
    with jax.set_mesh(method.mesh.grid):
        for i in range(2):
            loop, metrics, table = iteration(method, loop, i)
            kls.append(float(metrics["rollout/kl_k3"]))
            assert metrics["rollout/logprob_gap_max"] < 1e-5  # the sampler reads the same two stacks
            assert abs(metrics["policy/first_ratio_max"] - 1) < 2e-6
        method.save(tmp_path / "run", loop.kept(method))
    assert kls[0] == 0 and kls[1] > 1e-6
    assert_same_bits(frozen, method.nets.frozen)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(loop.state.params), strict=True):
        assert differ(x, y)
    model, full = Model(DEEP), load(f"{directory()}/policy", False)
    view, num = packed(table["rollout"]).at(0), table["rollout"].tokens.shape[1]
    logprobs = jax.jit(lambda tree: response_logprobs(model, tree, view, jnp.ones(()), num)[0])
    np.testing.assert_allclose(logprobs(method.nets.ref), logprobs(full), rtol=1e-6, atol=1e-6)
    # What is written is the whole policy, and the whole critic.
    saved, critic = (load(tmp_path / "run" / name, head) for name, head in (("model", False), ("value_model", True)))
    whole = method.nets.policy.whole(loop.policy)
    assert_same_layers(model.merged(whole), saved)
    lower = lambda tree: jax.tree.map(lambda x: np.asarray(x)[:1], tree["layers"])  # noqa: E731
    assert_same_bits(lower(saved), lower(full))
    assert_same_bits(lower(critic), lower(load(f"{directory()}/reward", True)))
    np.testing.assert_allclose(logprobs(saved), logprobs(whole), rtol=1e-6, atol=1e-6)


def test_the_top_layers_step_is_the_one_they_take_when_all_layers_are_trained(one_device):
    """One step of Adam without a clip, in which no parameter sees another's gradient."""
    options = {"ppo__epochs": 1, "optim__clip_norm": 0.0, "value_optim__clip_norm": 0.0}
    found = []
    for top in (2, 0):
        method, loop = train.setup(config(top=top, **options), **TOY_ROWS)
        with jax.set_mesh(method.mesh.grid):
            loop, _, _ = iteration(method, loop, 0)
        found.append(loop.state.params)
    part, whole = found
    for name in ("policy", "value"):
        upper = jax.tree.map(lambda x: x[1:], whole[name]["layers"])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, part[name], {**{n: whole[name][n] for n in part[name]}, "layers": upper})


def test_sharded_equals_unsharded(monkeypatch):
    options = {"optim__eps": 1e-2, "value_optim__eps": 1e-2}  # keeps the update smooth in the gradient
    found = []
    for devices, mesh in ((ONE, MeshConfig()), (jax.devices(), MeshConfig(2, 2, 2))):
        monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=devices))
        method, loop = train.setup(config(mesh=mesh, **options), **TOY_ROWS)
        with jax.set_mesh(method.mesh.grid):
            loop, metrics, table = iteration(method, loop, 0)
            found.append(jax.device_get((loop.state.params, metrics["rollout/reward"], table["rollout"].tokens)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), *found)


@pytest.mark.slow
def test_a_run_stopped_and_continued_ends_as_one_left_alone_bit_by_bit(one_device, tmp_path):
    options = {"run__keep_best": False, "ppo__ema_decay": 0.5}
    assert_stopped_and_continued_is_left_alone(lambda name: config(tmp_path / name, **options))


def test_more_layers_than_there_are_and_adapters_beside_them_are_refused(one_device):
    with pytest.raises(UserError, match=r"ppo\.trainable_layers 4 is more than the 3 layers"):
        train.setup(config(top=4), **TOY_ROWS)
    with pytest.raises(UserError, match=r"ppo\.trainable_layers 2 and lora\.rank 2"):
        train.setup(replace(config(), lora=LoRAConfig(rank=2)), **TOY_ROWS)
