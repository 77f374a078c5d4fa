"""Reward ensembles whose members have adapters of their own on one trunk."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ensembles import pairs, reward_args, same_bits
from tiny import ONE, TOY_ROWS, toy_directory, toy_run

from rlhf_jax import reward
from rlhf_jax.commands import inspection, sample
from rlhf_jax.config import ConvertArgs, InspectArgs, LoRAConfig, MeshConfig, ModelConfig, ScoreArgs
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.losses import pairwise_reward_loss
from rlhf_jax.models import hf
from rlhf_jax.models.contents import digest_of
from rlhf_jax.models.loading import adapted, load_model, load_tokenizer, save_model
from rlhf_jax.models.members import member, scored
from rlhf_jax.ppo import networks, train
from rlhf_jax.sharding import make_mesh
from rlhf_jax.training import supervised

LORA, MEMBERS = LoRAConfig(rank=2), 3
TOKENS = np.random.default_rng(1).integers(3, 20, (8, 6)).astype(np.int32)
INPUTS = (TOKENS, np.broadcast_to(np.arange(6), (8, 6)), np.ones((8, 6), np.int32))


@pytest.fixture
def one_device(monkeypatch):
    for module in (train, supervised, sample):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, devices=ONE))


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """(directory, the model before it was saved, what of it is trained): three drawn members on the toy policy."""
    settings, mesh = ModelConfig(path=str(toy_directory() / "policy")), make_mesh(MeshConfig(), devices=ONE)
    more = {"head": "normal", "lora": LORA, "members": MEMBERS, "own_adapters": True}
    loaded, rng = load_model(settings, mesh, jax.random.key(0), **more), np.random.default_rng(0)
    own = jax.tree.map(lambda x: jnp.float32(x + 0.3 * rng.normal(size=x.shape)), loaded.params)
    path = tmp_path_factory.mktemp("ensemble") / "model"
    save_model(path, loaded, own, load_tokenizer(settings))
    return path, loaded, own


def read(path: Path, devices=ONE, **mesh):
    return load_model(
        ModelConfig(path=str(path)), make_mesh(MeshConfig(**mesh), devices=devices), jax.random.key(0), head="trained"
    )


def alone(model):
    return dataclasses.replace(model, members=0, own_adapters=False)


def test_members_score_and_learn_as_models_of_their_own(ensemble):
    """Values and gradients of the mean of their losses, each with its own draw of the rows."""
    _, loaded, own = ensemble
    rng = np.random.default_rng(2)
    batch = {
        "tokens": TOKENS[:6].reshape(3, 2, 6), "weights": np.full(3, 1 / 3, np.float32),
        "positions": np.broadcast_to(np.arange(6), (3, 2, 6)), "segment_ids": np.ones((3, 2, 6), np.int32),
        "last": np.full((3, 2), 5), "margins": np.zeros(3, np.float32), "labels": np.ones(3, np.float32),
        "member_weights": rng.integers(0, 3, (3, MEMBERS)).astype(np.float32),
    }  # fmt: skip
    loss = functools.partial(pairwise_reward_loss, center_coef=0.0)

    def of(model, trained, batch):
        return reward.objective(model, loss)(loaded.whole(trained), batch, jax.random.key(0))[0]

    total, gradient = jax.jit(jax.value_and_grad(functools.partial(of, loaded.model)))(own, batch)
    single = jax.jit(jax.value_and_grad(functools.partial(of, alone(loaded.model))))
    each = []
    for i in range(MEMBERS):
        drawn = {**batch, "weights": batch["weights"] * batch["member_weights"][:, i]}
        del drawn["member_weights"]
        one, by_it = single(jax.tree.map(lambda x, i=i: x[i], own), drawn)
        each.append(one)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(by_it), strict=True):
            np.testing.assert_allclose(a[i], b / MEMBERS, rtol=1e-4, atol=1e-5)
    assert total == pytest.approx(np.mean(each), rel=1e-5) and len(set(map(float, each))) == MEMBERS
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient["layers"])) > 0


def test_a_directory_holds_the_trunk_and_each_member_is_a_reward_model_by_itself(ensemble, tmp_path):
    path, loaded, own = ensemble
    before, _ = scored(loaded.model, loaded.whole(own), *INPUTS)
    again = read(path)
    assert again.model.members == MEMBERS and again.model.own_adapters and hf.members_of(path) == MEMBERS
    assert "score.weight" not in hf.weights.stored_tensors(path)  # which transformers would take without adapters
    assert same_bits(scored(again.model, again.params, *INPUTS)[0], before)
    other = tmp_path / "other"
    shutil.copytree(path, other)
    assert digest_of(str(other)) == digest_of(str(path)) != ""
    shutil.copytree(path / "members" / "0", other / "members" / "1", dirs_exist_ok=True)  # the trunk is as it was
    assert digest_of(str(other)) != digest_of(str(path))
    for i in range(MEMBERS):
        by_itself = read(path / "members" / str(i))
        np.testing.assert_allclose(scored(by_itself.model, by_itself.params, *INPUTS)[0], before[..., i], atol=1e-5)
    mesh = make_mesh(MeshConfig(), devices=ONE)
    critic = networks.with_one_head(again, mesh)
    assert not critic.model.members and not critic.model.own_adapters
    np.testing.assert_allclose(scored(critic.model, critic.params, *INPUTS)[0], before[..., 0], atol=1e-5)
    assert same_bits(member(again.params, 1)["score"], jax.tree.map(lambda x: x[1], own["score"]))
    # Split over eight devices: no member axis is, and what is said is the same.
    spread = read(path, jax.devices(), data=2, fsdp=2, tensor=2)
    grid = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)).grid
    with jax.set_mesh(grid):
        far = jax.jit(functools.partial(scored, spread.model))(spread.params, *INPUTS)[0]
    np.testing.assert_allclose(far, before, atol=1e-5)
    first = spread.params["layers"]["mlp"]["up_lora"]["up"]
    assert tuple(first["a"].sharding.spec) == (None, None, "fsdp", None)
    assert tuple(first["b"].sharding.spec) == (None, None, None, None, "tensor")


def test_a_run_of_members_goes_on_as_if_left_alone_and_pays_ppo(one_device, tmp_path, monkeypatch):
    data = {"rows": pairs(16, 0), "eval_rows": pairs(8, 1)}

    def config(name):
        own = {"lora": LORA, "reward__members": 2, "reward__member_adapters": True}
        return replace(reward_args(tmp_path / name), **own)

    summary = reward.run(config("alone"), **data)
    make, calls = supervised.make_train_step, iter(range(9))

    def interrupted(*args, **kwargs):
        step = make(*args, **kwargs)

        def stopping(*args):
            if next(calls) == 1:
                signal.raise_signal(signal.SIGTERM)
            return step(*args)

        return stopping

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "make_train_step", interrupted)
        with pytest.raises(Stopped):
            reward.run(config("stopped"), **data)
    again = reward.run(config("stopped"), **data)
    assert {**again, "wall_s": 0} == {**summary, "wall_s": 0} and len(summary["members"]) == 2
    files = sorted((tmp_path / "alone" / "model").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        other = tmp_path / "stopped" / file.relative_to(tmp_path / "alone")
        assert file.read_bytes() == other.read_bytes()
    # The trunk is the model that training began with, and members came apart.
    path = tmp_path / "alone" / "model"
    base = hf.load_params(toy_directory() / "policy", hf.read_config(path)[0], score_head=None)
    loaded = read(path)
    assert same_bits(loaded.params["embed"], base["embed"]) and same_bits(
        loaded.params["layers"]["mlp"]["up"], base["layers"]["mlp"]["up"]
    )
    b = loaded.params["layers"]["attn"]["qkv_lora"]["query"]["b"]
    assert float(jnp.abs(b).max()) > 0 and not same_bits(b[0], b[1])
    # They score rows, and pay PPO.
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": r["prompt"], "response": r["chosen"]}) + "\n" for r in pairs(6, 2)))
    said = sample.run_score(ScoreArgs(
        ModelConfig(path=str(path)), data_path=str(rows), max_prompt_length=2, max_length=10,
        output=str(tmp_path / "scored.jsonl"),
    ))  # fmt: skip
    assert np.array([row["scores"] for row in said]).shape == (6, 2)
    run = replace(toy_run(tmp_path / "ppo", iterations=1, epochs=1), reward__model=str(path))
    paid = train.run(replace(run, reward__combine="lower_bound"), **TOY_ROWS)
    assert paid["before"]["eval/reward_disagreement"] > 0


def test_what_members_cannot_have_is_said_in_a_line(one_device, ensemble, tmp_path):
    path, *_ = ensemble
    with pytest.raises(UserError, match=r"member_adapters: there is one member; raise reward.members"):
        reward_args("", member_adapters=True)
    with pytest.raises(UserError, match=r"member_adapters: lora.rank is 0"):
        reward_args("", members=2, member_adapters=True)
    # Nothing else stands on an ensemble of adapters: no training, no conversion, no adapters of a critic.
    for head in ("normal", "trained"):
        config = replace(reward_args(tmp_path / "run", members=MEMBERS, head_init=head), model__path=str(path))
        with pytest.raises(UserError, match="is a reward ensemble of adapters"):
            reward.run(config, rows=pairs(8, 0), eval_rows=pairs(4, 1))
    with pytest.raises(UserError, match=r"is a reward or value model; give a language model"):
        load_model(ModelConfig(path=str(path)), make_mesh(MeshConfig(), devices=ONE), jax.random.key(0))
    with pytest.raises(UserError, match=r"is the trunk of 3 members; name a reward model, such as .*/members/0"):
        inspection.run_convert(ConvertArgs(str(path), str(tmp_path / "out")))
    config = replace(toy_run(tmp_path / "ppo"), reward__model=str(path), lora=LORA)
    with pytest.raises(UserError, match=r"^lora.rank 2: .*set ppo.value_init zeros"):
        train.run(config, **TOY_ROWS)
    # A member of another run in the place of one.
    shutil.copytree(path, tmp_path / "copy")
    file = tmp_path / "copy" / "members" / "1" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 4.0}))
    with pytest.raises(UserError, match=r"members/1/adapter_config.json has other settings than .*members/0"):
        read(tmp_path / "copy")
    shutil.rmtree(file.parent)
    with pytest.raises(UserError, match=r"members/1"):
        read(tmp_path / "copy")
    loaded = read(path)
    sparse = dataclasses.replace(loaded.model.arch, num_experts=2, experts_per_token=1)
    loaded = replace(loaded, params={}, model__arch=sparse)
    with pytest.raises(UserError, match=r"member_adapters: of a model with experts"):
        adapted(loaded, LORA, make_mesh(MeshConfig(), devices=ONE), jax.random.key(0))
    said = inspection.run_inspect(InspectArgs(str(path)))
    assert "3 members with adapters" in said["family"]
