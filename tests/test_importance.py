"""The law that was sampled from: the policy gradient on a chain whose responses are all enumerated."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BIGRAMS, bigram_params, make_rollout

from rlhf_jax import group, ppo
from rlhf_jax.config import GroupConfig, PPOConfig
from rlhf_jax.losses import cispo_policy_loss, clipped_policy_loss, importance_weights, sequence_policy_loss
from rlhf_jax.tokens import Blocks, token_logprobs

V, T = 3, 4
RESPONSES = np.array(list(itertools.product(range(V), repeat=T)))  # [81, T]
BEFORE = np.pad(RESPONSES, ((0, 0), (1, 0)))[:, :T]  # 0 stands before the first token
MASK = np.ones(RESPONSES.shape, bool)
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(T, V, V)), jnp.float32)  # the policy: of token t after token t - 1
REWARDS = jnp.asarray(RNG.normal(size=(64, len(RESPONSES))), jnp.float32)  # 64 rewards of every response
CLIP = {"clip_ratio": 0.2, "clip_ratio_high": 0.0, "max_log_ratio": 20.0}
LOSSES = {clipped_policy_loss: {"dual_clip": 0.0}, sequence_policy_loss: {"dual_clip": 0.0}, cispo_policy_loss: {}}
SAMPLERS = {"warm": LOGITS / 1.4, "cold": LOGITS / 0.7, "stale": LOGITS + jnp.asarray(RNG.normal(size=LOGITS.shape))}


def logprobs_of(logits):
    """Log-probs [81, T] of the tokens of all responses."""
    return jax.nn.log_softmax(logits)[np.arange(T)[None], BEFORE, RESPONSES]


@jax.jit
def right(logits):
    """The gradient of the expected reward, for each reward: [64, T, V, V]."""
    return jax.jacrev(lambda x: REWARDS @ jnp.exp(logprobs_of(x).sum(1)))(logits)


def estimated(loss, sampler, weigh):
    """The mean over the sampler's responses of what the first step ascends, the policy at LOGITS, for each reward."""
    old, drawn = logprobs_of(LOGITS), logprobs_of(sampler.astype(jnp.float32))
    share = jnp.broadcast_to(jnp.exp(drawn.sum(axis=1, keepdims=True)), old.shape)  # of each response; they sum to 1
    options = {**CLIP, **LOSSES[loss]}
    if loss is sequence_policy_loss:  # in which a response weighs as much as its tokens together
        share = share / T

    def value(logits, rewards):
        advantages = rewards[:, None] * weigh(old, drawn)
        return -loss(logprobs_of(logits), old, jnp.broadcast_to(advantages, old.shape), share, **options)[0]

    return jax.jit(jax.vmap(jax.grad(value), in_axes=(None, 0)))(LOGITS, REWARDS)


def weighing(importance, cap=0.0, beyond="clip"):
    options = {"importance": importance, "importance_cap": cap, "importance_beyond": beyond}
    return lambda old, drawn: importance_weights(old, drawn, MASK, **options)[0]


def error(loss, sampler, weigh):
    """Of the estimate, over all rewards, as a share of the right gradient."""
    true = right(LOGITS)
    return float(jnp.linalg.norm(estimated(loss, sampler, weigh) - true) / jnp.linalg.norm(true))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_weights_of_the_response_make_the_gradient_unbiased_and_those_of_tokens_make_it_better(loss, name):
    of = lambda weigh: error(loss, SAMPLERS[name], weigh)  # noqa: E731
    none, token, sequence = of(lambda old, drawn: 1.0), of(weighing("token")), of(weighing("sequence"))
    assert sequence < 1e-5 < token < none
    clipped, masked = of(weighing("sequence", 3.0)), of(weighing("sequence", 3.0, "mask"))
    assert sequence <= clipped <= masked < none  # a cap trades bias for spread, and masking costs more than clipping


def test_a_policy_that_samples_itself_has_weights_of_exactly_one_at_every_setting():
    logprobs = logprobs_of(LOGITS)
    for where, beyond in itertools.product(("token", "sequence"), ("clip", "mask")):
        weights = weighing(where, 1.0, beyond)(logprobs, logprobs)
        assert (np.asarray(weights) == 1).all()


def test_padding_counts_nowhere_and_metrics_say_what_was_cut():
    old, drawn = jnp.log(jnp.asarray([[4.0, 0.5, 1.0], [1.0, 9.0, 9.0]])), jnp.zeros((2, 3))
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    options = {"importance_cap": 3.0, "importance_beyond": "mask"}
    token, seen = importance_weights(old, drawn, mask, importance="token", **options)
    np.testing.assert_allclose(token, [[0, 0.5, 1], [1, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(seen["rollout/importance"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(seen["rollout/importance_max"], 4.0, rtol=1e-6)
    np.testing.assert_allclose(seen["rollout/importance_beyond"], 1 / 3, rtol=1e-6)
    sequence, seen = importance_weights(old, drawn, mask, importance="sequence", **options)
    np.testing.assert_allclose(sequence, [[2.0], [1.0]], rtol=1e-6)
    assert seen["rollout/importance_beyond"] == 0


@pytest.mark.parametrize("carried", [True, False])
def test_with_the_kept_ids_carried_the_gradient_is_that_of_the_filtered_law(carried):
    """Top-2 of 3 tokens at temperature 0.8: with log-probs of all three, every response's gradient has another sum."""
    ids = jnp.argsort(-LOGITS, axis=-1)[..., :2].astype(jnp.int32)  # [T, V, 2]
    places = (np.arange(T)[None], BEFORE)

    def filtered(logits, kept=ids):
        kept = None if kept is None else kept[places]
        return token_logprobs(
            Blocks(jnp.zeros((1, 0)), lambda _, x: x), logits[places], RESPONSES, 0.8, chunk=7, kept=kept
        )[0]

    possible = (ids[places] == RESPONSES[..., None]).any(-1).all(-1)  # responses of kept tokens alone
    rewards = jnp.where(possible, REWARDS, 0.0)
    expected = jax.jacrev(lambda x: rewards @ jnp.exp(filtered(x).sum(1)))(LOGITS)
    share = jnp.where(possible, jnp.exp(filtered(LOGITS).sum(1)), 0.0)
    np.testing.assert_allclose(share.sum(), 1.0, rtol=1e-5)
    law = filtered if carried else partial(filtered, kept=None)
    old = law(LOGITS)

    def value(logits, rewards):
        arrays = (jnp.broadcast_to(x[:, None], old.shape) for x in (rewards, share))
        return -clipped_policy_loss(law(logits), old, *arrays, dual_clip=0.0, **CLIP)[0]

    found = jax.jit(jax.vmap(jax.grad(value), in_axes=(None, 0)))(LOGITS, rewards)
    error = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    assert error < 1e-5 if carried else error > 0.1


METHODS = {
    "ppo": (ppo.make_score, BIGRAMS, PPOConfig()),
    "grpo": (group.make_score, group.Models(BIGRAMS.policy, BIGRAMS.reward), GroupConfig(group_size=4)),
}


@pytest.mark.parametrize("name", METHODS)
def test_weights_reach_the_advantages_and_nothing_else(name):
    """Of a rollout at temperature 0.7 that is trained at 1."""
    make_score, models, config = METHODS[name]
    params, ref, reward = bigram_params(0), bigram_params(1)["policy"], bigram_params(2)["value"]
    rollout = make_rollout(4, params["policy"], temperature=0.7)
    arguments = (params, ref, reward, rollout, jnp.zeros(len(rollout.mask)), jnp.float32(0.1), jnp.float32(1.0))
    off, on = (make_score(models, config, recompute=True, importance=by)(*arguments) for by in ("off", "sequence"))
    options = {"importance": "sequence", "importance_cap": 3.0, "importance_beyond": "mask"}
    weights, _ = importance_weights(off[0].old_logprobs, rollout.logprobs, rollout.mask, **options)
    assert 0 < np.count_nonzero(weights) < len(weights) and np.ptp(weights) > 0.1
    np.testing.assert_allclose(on[0].advantages, weights * off[0].advantages, rtol=1e-6)
    for x in (off[0], on[0]):
        object.__setattr__(x, "advantages", None)
    jax.tree.map(np.testing.assert_array_equal, on[0], off[0])
    new = {name: on[2].pop(name) for name in list(on[2]) if name.startswith("rollout/importance")}
    jax.tree.map(np.testing.assert_array_equal, on[1:], off[1:])
    assert len(new) == 4
