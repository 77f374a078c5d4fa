"""Laws of the mesh: the same numbers on every layout of the devices, and parameters that are really split."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import BIGRAMS, ONE, STOP, V, bigram_params, make_rollout, model_params, text_batch

from rlhf_jax import losses, reward, sft
from rlhf_jax.config import (
    ArchConfig,
    DataConfig,
    MeshConfig,
    OptimConfig,
    PPOArgs,
    PPOConfig,
    RewardSourceConfig,
    SamplingConfig,
)
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.collate import collate_sft
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.models import Model
from rlhf_jax.online.networks import Networks
from rlhf_jax.ppo import Models, make_score, train
from rlhf_jax.sharding import batch_sharding, make_mesh, put_batch, replicated, tree_shardings
from rlhf_jax.training.state import TrainState, create_state, make_optimizer, make_schedule
from rlhf_jax.training.step import make_train_step, make_update

ARCH = ArchConfig(  # heads, widths and vocabulary divide by 8
    vocab_size=V, width=16, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=2, ffn_width=16, max_positions=16
)
POLICY, SCALAR = Model(ARCH), Model(ARCH, score_head=True)
KEY = jax.random.key(0)
ROWS, PROMPT, NEW = 16, 3, 6
# A large epsilon keeps Adam's update smooth in the gradient: near 0 it is the sign, which rounding would decide.
OPTIM = OptimConfig(learning_rate=0.01, schedule="constant", eps=1e-2)
MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8), "2x2x2": (2, 2, 2)}


def mesh_of(name: str) -> Mesh:
    data, fsdp, tensor = MESHES[name]
    return make_mesh(MeshConfig(data, fsdp, tensor), devices=ONE if name == "1x1x1" else None)


def pairs_batch() -> dict:
    one, other = text_batch(ROWS, 7, 2), text_batch(ROWS, 7, 2)
    batch = {n: np.stack([one[n], other[n][::-1]], axis=1) for n in ("tokens", "positions", "segment_ids")}
    last = batch["segment_ids"].sum(2).astype(np.int32) - 1
    zeros = np.zeros(ROWS, np.float32)
    return {**batch, "last": last, "weights": zeros + 1 / ROWS, "labels": zeros + 1, "margins": zeros}


def supervised(kind: str) -> tuple[Any, Any, dict]:
    """(loss function, parameters, batch) of an SFT or a reward step."""
    if kind == "sft":
        return sft.objective(POLICY, losses.next_token_loss), model_params(POLICY, 0), text_batch(ROWS, 7, 2)
    loss = functools.partial(losses.pairwise_reward_loss, center_coef=0.01)
    return reward.objective(SCALAR, loss), model_params(SCALAR, 0), pairs_batch()


@functools.cache
def single_step(kind: str) -> tuple[Any, dict]:
    """Parameters and metrics after one step, by a plain jit without any mesh."""
    loss_fn, params, batch = supervised(kind)
    tx = make_optimizer(OPTIM, make_schedule(OPTIM, 1))
    state, metrics = jax.jit(make_update(loss_fn, tx))(TrainState.create(params, tx), batch, KEY)
    return jax.device_get((state.params, metrics))


def close(found, expected, bound: float, what: str):
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(expected), strict=True):
        name = what + jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=bound, rtol=bound, err_msg=name)


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_a_supervised_step_is_the_same_on_every_mesh(kind, mesh_name):
    """Sums over devices run in another order: 1e-6 in the metrics, 2e-6 in the parameters."""
    loss_fn, params, batch = supervised(kind)
    mesh, tx = mesh_of(mesh_name), make_optimizer(OPTIM, make_schedule(OPTIM, 1))
    with jax.set_mesh(mesh.grid):
        state = create_state(params, tx, mesh)
        step = make_train_step(loss_fn, tx, mesh=mesh, state=state)
        state, metrics = step(state, put_batch(mesh, batch), KEY)
    expected_params, expected_metrics = single_step(kind)
    close(metrics, expected_metrics, 2e-6, "metrics")
    close(state.params, expected_params, 2e-6, "params")
    assert_split(state, mesh)


def assert_split(state: TrainState, mesh) -> None:
    """Every leaf of the state lies as the rule table says, and the large ones are really in parts."""
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(tree_shardings(mesh, state)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        shards = leaf.addressable_shards
        assert len(shards) == mesh.grid.size
        assert {shard.data.shape for shard in shards} == {place.shard_shape(leaf.shape)}
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    params = state.params.get("policy", state.params)
    per_device = {
        "qkv": (params["layers"]["attn"]["qkv"], (1, 16 // fsdp, 8 // tensor, 3, 2)),
        "out": (params["layers"]["attn"]["out"], (1, 8 // tensor, 1, 2, 16 // fsdp)),
        "up": (params["layers"]["mlp"]["up"], (1, 16 // fsdp, 2, 16 // tensor)),
        "down": (params["layers"]["mlp"]["down"], (1, 16 // tensor, 16 // fsdp)),
        "embed": (params["embed"]["tokens"], (V // tensor, 16 // fsdp)),
        "norm": (params["final_norm"]["scale"], (16,)),
    }
    for name, (leaf, shape) in per_device.items():
        assert leaf.addressable_shards[0].data.shape == shape, name


@functools.cache
def ppo_iteration(mesh_name: str) -> dict:
    """One iteration through the stage's programs: a greedy and a drawn rollout, the scoring and the update.

    Critic and reward are bigrams, to compile less; the scalar decoder is in the supervised reward step.
    """
    config = PPOArgs(
        data=DataConfig(batch_size=ROWS),
        reward=RewardSourceConfig(model="given"),
        sampling=SamplingConfig(max_new_tokens=NEW, chunk=3),
        ppo=PPOConfig(epochs=2, minibatches=2, old_logprobs="recompute", entropy_coef=0.01, microbatch_tokens=9),
        optim=OPTIM,
        value_optim=OPTIM,
        mesh=MeshConfig(rollout_tensor={"1x8x1": 4}.get(mesh_name, 0)),
    )
    mesh = mesh_of(mesh_name)
    place = lambda params: jax.device_put(params, tree_shardings(mesh, params))  # noqa: E731
    params = {"policy": place(model_params(POLICY, 0)), "value": place(bigram_params(1)["value"])}
    ref, scorer = place(model_params(POLICY, 2)), place(bigram_params(3)["value"])
    nets = Networks(Models(POLICY, BIGRAMS.value, BIGRAMS.reward), None, ref, scorer, None)
    rng = np.random.default_rng(1)
    prompt = {"tokens": rng.integers(2, V, (ROWS, PROMPT)).astype(np.int32), "mask": np.ones((ROWS, PROMPT), bool)}
    prompt["mask"][::3, 0] = False
    whole = functools.partial(jax.device_put, device=replicated(mesh))
    with jax.set_mesh(mesh.grid):
        programs, state = train.make_programs(config, nets, params, mesh, (STOP, 2, 3, 4))
        prompt = put_batch(mesh, prompt)
        law = lambda t: whole(SamplingLaw.from_config(SamplingConfig(temperature=t)))  # noqa: E731
        drawn, greedy = (
            programs.rollout(state.params["policy"], prompt["tokens"], prompt["mask"], whole(KEY), law(t))
            for t in (1.0, 0.0)
        )
        host = jax.device_put(np.linspace(-1, 1, ROWS).astype(np.float32), batch_sharding(mesh))
        scored = programs.score(
            state.params, nets.ref, nets.reward, greedy, host, whole(np.float32(0.1)), whole(np.float32(1.0))
        )
        state, metrics = programs.update(state, scored[0], whole(KEY), whole(np.float32(1.0)), None)
    assert_split(state, mesh)
    metrics.pop("optim/filled")  # what is computed for how many tokens is the mesh's
    rows = ROWS // (mesh.shape["data"] * mesh.shape["fsdp"])
    assert greedy.tokens.addressable_shards[0].data.shape == (rows, NEW)
    return jax.device_get(
        {"greedy": greedy, "drawn": drawn, "scored": scored, "params": state.params, "metrics": metrics}
    )


SPLIT = [name for name in MESHES if name != "1x1x1"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", SPLIT)
def test_greedy_rollouts_are_the_same_on_every_mesh(mesh_name):
    found, expected = ppo_iteration(mesh_name)["greedy"], ppo_iteration("1x1x1")["greedy"]
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert 0 < expected.finished.sum() < ROWS


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", SPLIT)
def test_drawn_rollouts_are_the_same_on_every_mesh_for_the_same_key(mesh_name):
    found, expected = ppo_iteration(mesh_name)["drawn"], ppo_iteration("1x1x1")["drawn"]
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=5e-6)
    assert (expected.tokens != ppo_iteration("1x1x1")["greedy"].tokens).any()


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", SPLIT)
def test_scoring_is_the_same_on_every_mesh(mesh_name):
    """Whitened advantages divide by a standard deviation: 1e-5."""
    close(ppo_iteration(mesh_name)["scored"], ppo_iteration("1x1x1")["scored"], 1e-5, "scored")


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", SPLIT)
def test_four_optimiser_steps_of_an_update_are_the_same_on_every_mesh(mesh_name):
    close(ppo_iteration(mesh_name)["metrics"], ppo_iteration("1x1x1")["metrics"], 1e-5, "metrics")
    close(ppo_iteration(mesh_name)["params"], ppo_iteration("1x1x1")["params"], 5e-6, "params")


@pytest.mark.slow
def test_the_update_moved_what_is_compared():
    before, after = model_params(POLICY, 0), ppo_iteration("1x1x1")["params"]["policy"]
    moves = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert min(jax.tree.leaves(moves)) > 1e-3  # a hundred times the bounds


@pytest.mark.parametrize("mesh_name", ["8x1x1", "1x8x1", "2x2x2"])
def test_whitening_is_over_the_whole_rollout_and_not_per_device(mesh_name):
    """Row b earns about b, one row per device: whitened on each device alone, every row's mean would be 0."""
    mesh, params = mesh_of(mesh_name), bigram_params(0)
    rollout = make_rollout(4, params["policy"])
    program = make_score(
        Models(BIGRAMS.policy, BIGRAMS.value), PPOConfig(discount=1.0, gae_lambda=1.0), recompute=False
    )
    rows = batch_sharding(mesh)
    host = jax.device_put(10.0 * np.arange(8, dtype=np.float32), rows)
    with jax.set_mesh(mesh.grid):
        score = jax.jit(program, out_shardings=(rows, replicated(mesh), replicated(mesh), rows))
        x = score(params, params["policy"], None, put_batch(mesh, rollout), host, jnp.float32(0.0), jnp.float32(1.0))[
            0
        ]
    assert len(x.advantages.addressable_shards) == 8
    found, mask = np.asarray(x.advantages), np.asarray(x.mask)
    np.testing.assert_allclose(found[mask].mean(), 0.0, atol=1e-5)
    np.testing.assert_allclose(found[mask].std(), 1.0, atol=1e-4)
    means = np.array([row[valid].mean() for row, valid in zip(found, mask, strict=True)])
    assert np.abs(means).max() > 1.0 and (np.diff(means) > 0).all()


def test_microbatches_keep_every_devices_own_rows():
    """Row i goes to microbatch i % num, so that splitting a sharded batch moves no row: no collective anywhere."""
    from rlhf_jax.tokens import to_microbatches

    mesh = mesh_of("8x1x1")
    split = jax.jit(lambda x: to_microbatches(x, 2) * 2.0)
    x = jax.device_put(jnp.arange(16.0), batch_sharding(mesh))
    text = split.lower(x).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    np.testing.assert_array_equal(split(x)[0], 2.0 * np.arange(0, 16, 2))


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_what_any_number_of_hosts_place_is_the_global_batch(hosts):
    """Three epochs, bit for bit: a host holds the rows of its own devices, none is missing and none there twice."""
    examples = [
        {"tokens": np.arange(i, i + 2 + i % 5, dtype=np.int32), "loss_mask": np.ones(2 + i % 5, bool), "where": str(i)}
        for i in range(37)
    ]
    collate = functools.partial(collate_sft, length=8, reduction="token")
    batches = Batches(examples, batch_size=16, seed=3, collate=collate, buckets=[4, 8])
    mesh = make_mesh(MeshConfig())
    devices = np.array_split(mesh.grid.devices.flatten(), hosts)
    for step in range(3 * len(batches)):
        batch = batches[step]
        for name, array in put_batch(mesh, batch).items():
            own = [[shard for shard in array.addressable_shards if shard.device in set(some)] for some in devices]
            assert [len(shards) for shards in own] == [mesh.grid.size // hosts] * hosts
            rows = [np.asarray(s.data) for shards in own for s in sorted(shards, key=lambda s: s.index[0].start)]
            np.testing.assert_array_equal(np.concatenate(rows), batch[name])
