"""A fork swaps policy loss, value loss and advantages in four ways; each shows that its function ran and changed what
is learnt.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_ppo import KEY, PARAMS, assert_close, batch_of, grad_of, ppo_run, same_bits, score, updater
from tiny import BIGRAMS, ONE, TOY_ROWS, make_experience, make_rollout, toy_run

from rlhf_jax import advantages, group, losses, ppo, sft
from rlhf_jax.config import GroupConfig, MeshConfig, PPOConfig, bind
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError
from rlhf_jax.online.checks import check_losses
from rlhf_jax.online.core import packed, response_logprobs
from rlhf_jax.sharding import make_mesh
from rlhf_jax.tokens import positions_from_mask
from rlhf_jax.training.state import create_state
from rlhf_jax.training.step import make_train_step

X = make_experience(3, PARAMS)


def minus_logprob(logprobs, old_logprobs, advantages, weights):
    """A fork's loss: behaviour cloning of the rollout, whatever the advantages."""
    loss = -jnp.sum(weights * logprobs)
    return loss, {"policy/fork": loss}


def expected_gradient() -> dict:
    """Of `minus_logprob` through the model, without PPO."""
    forward = lambda params: response_logprobs(BIGRAMS.policy, params["policy"], packed(X).at(0), 1.0, 6)[0]  # noqa: E731
    return jax.grad(lambda params: -jnp.sum(batch_of(X)["weights"] * forward(params)))(PARAMS)["policy"]


def update_with(run, policy_loss=None):
    state, update = updater(run, policy_loss=policy_loss)
    state, metrics = update(state, X)
    return jax.device_get((state.params["policy"], metrics))


@pytest.fixture(scope="module")
def ours():
    """The policy and the metrics after an update with the library's loss."""
    return update_with(ppo_run(epochs=1))


def test_a_replaced_function_in_losses_is_what_trains(monkeypatch, ours):
    """Stands for an edit of losses.py: the default config names rlhf_jax.losses:clipped_policy_loss."""
    monkeypatch.setattr(losses, "clipped_policy_loss", minus_logprob)
    policy, metrics = update_with(ppo_run(epochs=1, num_samples=5))  # no other test's program, which would be reused
    assert "policy/fork" in metrics and "policy/fork" not in ours[1]
    assert not same_bits(policy, ours[0])
    assert_close(grad_of(PPOConfig(), batch_of(X))["policy"], expected_gradient())


def test_a_function_given_to_the_objective_is_what_trains(ours):
    loss_fn = ppo.objective(BIGRAMS, PPOConfig(), policy_loss=minus_logprob)
    loss, metrics = loss_fn(PARAMS, batch_of(X), KEY)
    assert "policy/fork" in metrics
    assert_close(jax.grad(loss_fn, has_aux=True)(PARAMS, batch_of(X), KEY)[0]["policy"], expected_gradient())
    np.testing.assert_allclose(loss, metrics["policy/fork"] + 0.1 * metrics["value/loss"], rtol=1e-6)
    policy, metrics = update_with(ppo_run(epochs=1), policy_loss=minus_logprob)
    assert "policy/fork" in metrics and not same_bits(policy, ours[0])


def test_off_the_mask_a_loss_sees_a_ratio_of_one_and_no_weight():
    """Whatever id fills the unused places, a fork's loss need not guard against it."""
    seen = []

    def watching(logprobs, old_logprobs, advantages, weights):
        seen.append((logprobs, old_logprobs, advantages, weights))
        return jnp.zeros(()), {}

    ppo.objective(BIGRAMS, PPOConfig(), policy_loss=watching)(PARAMS, batch_of(X), KEY)
    off = ~np.asarray(X.mask)
    logprobs, old_logprobs, advantages, weights = (np.asarray(x)[off] for x in seen[0])
    assert off.any() and (logprobs == old_logprobs).all() and not advantages.any() and not weights.any()


def a_mean(logprobs, old_logprobs, advantages, weights):
    return -jnp.mean(logprobs * advantages), {}


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_a_loss_that_is_no_sum_over_rows_is_refused_where_rows_come_in_parts(name):
    apart = PPOConfig(microbatch_tokens=0)
    for loss, config in ((a_mean, apart), (minus_logprob, PPOConfig()), ("rlhf_jax.losses:clipped_value_loss", apart)):
        check_losses(config, "ppo", **{name: loss})
    for config in (PPOConfig(), replace(apart, accumulate=2)):
        cure = r"make it a sum of weights \* something, or set ppo.microbatch_tokens 0 and ppo.accumulate 1"
        with pytest.raises(UserError, match=rf"ppo.{name} is -?[\d.e-]+ of some rows and .* {cure}"):
            check_losses(config, "ppo", **{name: a_mean})


FORK = """
import jax.numpy as jnp

def cispo(logprobs, old_logprobs, advantages, weights, *, clip_ratio, boost=3.0):
    ratio = jnp.exp(logprobs - old_logprobs)
    scale = jnp.clip(ratio, 0.0, 1 + clip_ratio)
    return -boost * jnp.sum(weights * scale * advantages * logprobs), {"policy/clip_seen": jnp.float32(clip_ratio)}

def greedy(logprobs, old_logprobs, advantages, weights, *, sharpness):
    return jnp.zeros(()), {}

def monte_carlo(rewards, values, *, discount):
    weights = discount ** jnp.maximum(jnp.arange(rewards.shape[1])[None] - jnp.arange(rewards.shape[1])[:, None], 0)
    return rewards @ jnp.triu(weights).T - values

def squared(values, old_values, returns, weights, *, value_clip, factor=2.0):
    loss = factor * jnp.sum(weights * (values - returns) ** 2)
    return loss, {"value/fork": loss}

def best(scores, *, group_size):
    groups = scores.reshape(-1, group_size)
    return (groups == groups.max(axis=1, keepdims=True)).astype(jnp.float32).reshape(-1)

not_a_function = 3
"""


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A module my_fork on the path."""
    (tmp_path / "my_fork.py").write_text(FORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_fork"
    sys.modules.pop("my_fork", None)


def test_a_function_named_in_the_config_is_what_trains_with_arguments_from_the_config(fork, ours):
    run = replace(ppo_run(epochs=1, clip_ratio=0.125), ppo__policy_loss=f"{fork}:cispo")
    policy, metrics = update_with(run)
    assert metrics["policy/clip_seen"] == 0.125 and not same_bits(policy, ours[0])
    weights, advantages = batch_of(X)["weights"], X.advantages
    loss = bind(f"{fork}:cispo", run.ppo)(X.old_logprobs, X.old_logprobs, advantages, weights)[0]
    np.testing.assert_allclose(loss, -3.0 * jnp.sum(weights * advantages * X.old_logprobs), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_fork:greedy", ["greedy", "'sharpness'", "PPOConfig", "default"]),
        ("my_fork:missing", ["my_fork", "'missing'"]),
        ("my_fork:not_a_function", ["my_fork", "'not_a_function'"]),
        ("my_folk:cispo", ["my_folk"]),
        ("my_fork.cispo", ["my_fork.cispo", "module:function"]),
    ],
)
def test_a_name_that_cannot_be_used_is_one_line_that_says_why(fork, name, words):
    with pytest.raises(UserError) as error:
        ppo.objective(BIGRAMS, PPOConfig(policy_loss=name))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


# --- advantages and the value loss, the same four ways; the fourth is the one below

ROLLOUT = make_rollout(4, PARAMS["policy"])


def forked(name):
    return getattr(importlib.import_module("my_fork"), name)


def swapped(way, monkeypatch, module, name, config, **field):
    """(config, arguments): `module.name` edited, or the function of the fork passed or named by the config's field."""
    [(field, fork)] = field.items()
    if way == "edited":
        monkeypatch.setattr(module, name, forked(fork))
    return (
        replace(config, **{field: f"my_fork:{fork}"}) if way == "named" else config,
        {field: forked(fork)} if way == "passed" else {},
    )


def advantages_with(config=PPOConfig(), **given):  # noqa: B008 (it is frozen)
    """float32[B, T], as scored, not whitened."""
    config = replace(config, whiten_advantages=False)
    return np.asarray(score(config, ROLLOUT, host=np.linspace(-1, 1, 8), **given)[0].advantages)


@pytest.mark.parametrize("way", ["edited", "passed", "named"])
def test_advantages_are_swapped_three_ways(fork, monkeypatch, way):
    """Monte-Carlo returns are GAE with lambda 1, with gamma from the config."""
    wanted = advantages_with(PPOConfig(discount=0.9, gae_lambda=1.0))
    config, given = swapped(way, monkeypatch, advantages, "gae", PPOConfig(discount=0.9), advantage="monte_carlo")
    assert not np.allclose(wanted, advantages_with(PPOConfig(discount=0.9)), atol=1e-3) or way == "edited"
    np.testing.assert_allclose(advantages_with(config, **given), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["edited", "passed", "named"])
def test_the_value_loss_is_swapped_three_ways(fork, monkeypatch, way):
    config, given = swapped(way, monkeypatch, losses, "clipped_value_loss", PPOConfig(), value_loss="squared")
    _, metrics = ppo.objective(BIGRAMS, config, **given)(PARAMS, batch_of(X), KEY)
    wanted = 2 * jnp.sum(batch_of(X)["value_weights"] * (X.old_values - X.returns) ** 2)
    np.testing.assert_allclose(metrics["value/fork"], wanted, rtol=1e-4)


@pytest.mark.parametrize("way", ["edited", "passed", "named"])
def test_the_advantages_of_groups_are_swapped_three_ways(fork, monkeypatch, way):
    config, given = swapped(
        way, monkeypatch, advantages, "group_advantages", GroupConfig(group_size=4), advantage="best"
    )
    program = group.make_score(group.Models(BIGRAMS.policy), config, recompute=False, **given)
    scores, one = jnp.array([1.0, 4.0, 2.0, 3.0, 8.0, 7.0, 6.0, 5.0]), jnp.float32(1.0)
    found = program({"policy": PARAMS["policy"]}, None, None, ROLLOUT, scores, one, one)[0].advantages
    np.testing.assert_array_equal(found[:, 0], [0, 1, 0, 0, 1, 0, 0, 0])


@pytest.mark.parametrize("field", ["advantage", "value_loss"])
def test_an_advantage_or_value_loss_that_asks_for_what_there_is_not_is_one_line(fork, field):
    with pytest.raises(UserError, match="greedy asks for 'sharpness', which PPOConfig does not have"):
        config = PPOConfig(**{field: "my_fork:greedy"})
        ppo.objective(BIGRAMS, config)
        ppo.make_score(BIGRAMS, config, recompute=True)
    if field == "advantage":
        with pytest.raises(UserError, match="greedy asks for 'sharpness', which GroupConfig does not have"):
            group.make_score(group.Models(BIGRAMS.policy), GroupConfig(advantage="my_fork:greedy"), recompute=True)


def test_a_run_takes_them_by_name_and_from_python_and_is_continued_as_it_began(fork, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo.train, "make_mesh", functools.partial(make_mesh, devices=ONE))
    named = toy_run(tmp_path / "named", advantage="my_fork:monte_carlo", value_loss="my_fork:squared", iterations=2)
    ppo.run(named, **TOY_ROWS)
    passed = replace(named, ppo__advantage=PPOConfig().advantage, ppo__value_loss=PPOConfig().value_loss)
    passed = replace(passed, run__output_dir=str(tmp_path / "passed"), reward__retries=0)
    given = {"advantage": forked("monte_carlo"), "value_loss": forked("squared")}
    with pytest.raises(UserError, match=r"iteration 2: .* by the same call again \(advantage, value_loss, reward"):
        ppo.run(passed, **given, reward_functions=[Failing(2)], **TOY_ROWS)
    with pytest.raises(UserError, match="advantage, value_loss"):
        ppo.run(passed, reward_functions=[Failing(-1)], **TOY_ROWS)
    ppo.run(passed, **given, reward_functions=[Failing(-1)], **TOY_ROWS)
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("named", "passed")]
    assert models[0] == models[1]
    assert "value/fork" in (tmp_path / "passed" / "metrics.jsonl").read_text()


class Failing:
    """A reward of 0 that raises at one call."""

    def __init__(self, call: int):
        self.left = call

    def __call__(self, prompts, responses, **columns):
        self.left -= 1
        if self.left == -1:
            raise RuntimeError("down")
        return [0.0] * len(prompts)


def test_a_loss_of_ones_own_trains_without_any_of_ppo():
    """make_train_step(my_loss_fn, tx) bypasses everything; here on the 8 devices, against plain gradient descent."""
    calls = []

    def my_loss(params, batch, key):
        calls.append(batch["tokens"].shape)
        hidden = BIGRAMS.policy.apply(params, batch["tokens"], None, None)[:, :-1]
        logprobs, _ = BIGRAMS.policy.logprobs(params, hidden, batch["tokens"][:, 1:])
        loss = -batch["weights"][:, None] * logprobs
        return loss.sum(), {"mine/loss": loss.sum()}

    mesh, policy, tx = make_mesh(MeshConfig()), PARAMS["policy"], optax.sgd(0.1)
    batch = {"tokens": X.tokens, "weights": jnp.linspace(0.0, 1.0, 8)}
    gradient = jax.grad(lambda params: my_loss(params, batch, KEY)[0])(policy)
    state = create_state(jax.tree.map(jnp.copy, policy), tx, mesh)
    with jax.set_mesh(mesh.grid):
        state, metrics = make_train_step(my_loss, tx, mesh=mesh, state=state)(state, batch, KEY)
    assert calls and np.isfinite(metrics["mine/loss"]) and metrics["optim/skipped"] == 0
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, policy, gradient), atol=2e-6)
    assert not same_bits(state.params, policy)


def test_supervised_training_takes_a_loss_of_ones_own_too():
    twice = lambda logprobs, weights: (-2 * jnp.sum(weights * logprobs), {})  # noqa: E731
    batch = {
        "tokens": X.tokens,
        "positions": positions_from_mask(X.segment_ids > 0),
        "segment_ids": X.segment_ids,
        "weights": jnp.full(X.tokens.shape, 0.1),
    }
    named, own = (
        sft.objective(BIGRAMS.policy, loss)(PARAMS["policy"], batch, KEY)[0]
        for loss in (losses.next_token_loss, twice)
    )
    np.testing.assert_allclose(own, 2 * named, rtol=1e-6)


def test_each_way_in_the_docs_has_fewer_than_15_lines():
    text = (Path(__file__).parents[1] / "docs" / "forks.md").read_text()
    ways = re.findall(r"^## \d\..*?(?=^## )", text, re.MULTILINE | re.DOTALL)
    blocks = [block for way in ways for block in re.findall(r"```\w+\n(.*?)```", way, re.DOTALL)]
    assert len(ways) == len(blocks) == 4
    for block in blocks:
        assert sum(bool(x.strip()) and not x.startswith(("import ", "from ")) for x in block.splitlines()) < 15, block
