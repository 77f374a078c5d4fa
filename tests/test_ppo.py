"""Laws of PPO's pure functions: scores, advantages, the loss, epochs of minibatches. `train` is in test_ppo_stage."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    ARCH,
    BIGRAMS,
    STOP,
    V,
    bigram_law,
    bigram_logprobs,
    bigram_params,
    bigram_values,
    f64,
    log_softmax,
    make_experience,
    make_rollout,
    model_params,
    states_before,
)

from rlhf_jax import sft
from rlhf_jax.config import OptimConfig, PPOArgs, PPOConfig, RewardSourceConfig, SamplingConfig
from rlhf_jax.errors import UserError
from rlhf_jax.inference.reward_functions import call_reward, combine
from rlhf_jax.inference.sampling import SamplingLaw, sample
from rlhf_jax.losses import clipped_policy_loss
from rlhf_jax.models import Model
from rlhf_jax.online import core as online_core
from rlhf_jax.ppo import Models, core, make_ppo_step, make_ppo_update, make_score, objective
from rlhf_jax.tokens import positions_from_mask, token_weights
from rlhf_jax.training.state import TrainState
from rlhf_jax.types import Rollout

KEY = jax.random.key(0)
PARAMS, REF, REWARD = bigram_params(0), bigram_params(1)["policy"], bigram_params(2)["value"]
NO_REWARD = Models(BIGRAMS.policy, BIGRAMS.value)

ONCE = {"timeout": 0, "retries": 0}


def ppo_run(rate: float = 0.05, **ppo) -> PPOArgs:
    optim = OptimConfig(learning_rate=rate, schedule="constant", eps=1e-5)
    return PPOArgs(ppo=PPOConfig(**ppo), optim=optim, value_optim=optim)


def score(config, rollout, *, params=PARAMS, ref=REF, host=None, kl_coef=0.1, temperature=1.0, **kwargs):
    """The scoring program on bigrams, not compiled: fast enough, and the ops are the same."""
    models = kwargs.pop("models", BIGRAMS)
    program = make_score(models, config, **{"recompute": True, **kwargs})
    host = jnp.zeros(rollout.mask.shape[0]) if host is None else jnp.asarray(host, jnp.float32)
    return program(params, ref, REWARD, rollout, host, jnp.float32(kl_coef), jnp.float32(temperature))


@functools.cache
def compiled_update(ppo: PPOConfig, optim: OptimConfig, models: Models, *losses):
    """(the compiled update, its optimiser): compiling is most of the time here, so equal settings share it."""
    run = PPOArgs(ppo=ppo, optim=optim, value_optim=optim)
    program, tx, _ = make_ppo_step(models, run, *losses)
    return jax.jit(program), tx


def updater(run: PPOArgs, models=BIGRAMS, params=PARAMS, policy_loss=None, value_loss=None):
    """(a first state, the compiled update with the temperature filled in)."""
    program, tx = compiled_update(run.ppo, run.optim, models, policy_loss, value_loss)
    state = TrainState.create(params, tx)
    return state, lambda state, experience, key=KEY, ptx=None: program(state, experience, key, jnp.float32(1.0), ptx)


def batch_of(experience, reduction="token", temperature=1.0, **more) -> dict:
    """What the objective takes, for the whole experience."""
    weights, value_weights = (token_weights(m, reduction) for m in (experience.mask, experience.value_mask))
    named = {"weights": weights, "value_weights": value_weights, "temperature": jnp.float32(temperature)}
    return {"experience": experience, "packed": online_core.packed(experience).at(0), **named, **more}


def grad_of(config: PPOConfig, batch, params=PARAMS, models=BIGRAMS, policy_loss=None):
    return jax.grad(objective(models, config, policy_loss), has_aux=True)(params, batch, KEY)[0]


def assert_close(a, b, atol=1e-6, rtol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=rtol), a, b)


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def largest(tree) -> float:
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


# --- the gradient

SURROGATE_ONLY = PPOConfig(value_coef=0.0, entropy_coef=0.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_on_policy_gradient_is_reinforces_gradient_as_numpy_derives_it(temperature):
    experience = make_experience(3, PARAMS, temperature=temperature)
    rollout = make_rollout(3, PARAMS["policy"], temperature=temperature)
    batch = batch_of(experience, temperature=temperature)
    found = grad_of(SURROGATE_ONLY, batch)["policy"]

    # d/dz of -sum w A log p(a) with p = softmax(z / temperature) is -w A (onehot(a) - p) / temperature.
    probs = np.exp(bigram_law(PARAMS["policy"], rollout, temperature))
    onehot = np.eye(V)[np.asarray(rollout.tokens)]
    scale = f64(batch["weights"]) * f64(experience.advantages)
    by_logits = -scale[..., None] * (onehot - probs) / temperature
    policy, before = f64(PARAMS["policy"]), states_before(rollout)
    by_embed = np.zeros_like(policy["embed"]["tokens"])
    np.add.at(by_embed, before, by_logits @ policy["head"]["kernel"].T)
    by_head = np.einsum("btd,btv->dv", policy["embed"]["tokens"][before], by_logits)
    assert_close(found, {"embed": {"tokens": by_embed}, "head": {"kernel": by_head}})
    assert largest(found) > 1e-2


def test_on_policy_gradient_is_reinforces_gradient_for_a_decoder():
    model = Model(ARCH)
    policy = model_params(model, 0)
    models, params = Models(model, BIGRAMS.value), {"policy": policy, "value": PARAMS["value"]}
    x = make_experience(3, PARAMS)
    num, weights = x.mask.shape[1], token_weights(x.mask, "token")

    def logprobs_of(policy):  # all logits of all positions, and a plain log-softmax
        hidden = model.apply(policy, x.tokens, positions_from_mask(x.segment_ids > 0), x.segment_ids)
        logits = jnp.einsum("bsd,vd->bsv", hidden, policy["embed"]["tokens"], precision="highest")
        chosen = jax.nn.log_softmax(logits)[:, :-1]
        return jnp.take_along_axis(chosen, x.tokens[:, 1:, None], axis=-1)[:, -num:, 0]

    @jax.jit
    def both(params):
        on_policy = dataclasses.replace(x, old_logprobs=jax.lax.stop_gradient(logprobs_of(params["policy"])))
        reinforce = jax.grad(lambda p: -jnp.sum(weights * x.advantages * logprobs_of(p)))(params["policy"])
        ppo = jax.grad(objective(models, SURROGATE_ONLY), has_aux=True)(params, batch_of(on_policy), KEY)[0]
        return ppo["policy"], reinforce

    ppo, reinforce = both(params)
    assert_close(ppo, reinforce, atol=2e-6)
    assert largest(reinforce) > 1e-2


def test_the_stop_token_gets_gradient():
    x = make_experience(3, PARAMS)
    ends = np.asarray(x.mask) & (np.asarray(x.tokens[:, -x.mask.shape[1] :]) == STOP)
    assert ends.any()
    only_there = dataclasses.replace(x, advantages=jnp.asarray(ends, jnp.float32))
    gradient = grad_of(SURROGATE_ONLY, batch_of(only_there))["policy"]
    lifted = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS["policy"], gradient)
    rollout = make_rollout(3, PARAMS["policy"])
    gain = bigram_logprobs(lifted, rollout) - bigram_logprobs(PARAMS["policy"], rollout)
    assert gain[ends].mean() > 1e-4


def ptx_text() -> dict:
    return {
        "tokens": jnp.arange(12, dtype=jnp.int32).reshape(2, 6) + 2,
        "positions": jnp.broadcast_to(jnp.arange(6), (2, 6)),
        "segment_ids": jnp.ones((2, 6), jnp.int32),
        "weights": jnp.full((2, 6), 0.1).at[:, 0].set(0.0),
    }


def test_ptx_gradient_is_the_sum_of_both_gradients_and_takes_one_step():
    ptx, run, x = ptx_text(), ppo_run(ptx_coef=27.8, epochs=1), make_experience(3, PARAMS)
    lm = sft.objective(BIGRAMS.policy, lambda logprobs, weights: (-jnp.sum(weights * logprobs), {}))
    by_lm = jax.grad(lambda params: lm(params["policy"], ptx, KEY)[0])(PARAMS)
    summed = jax.tree.map(lambda a, b: a + 27.8 * b, grad_of(run.ppo, batch_of(x)), by_lm)
    assert_close(grad_of(run.ppo, batch_of(x, ptx=ptx)), summed, atol=1e-6, rtol=1e-6)

    state, update = updater(run)
    state, metrics = update(state, x, ptx=jax.tree.map(lambda a: a[None], ptx))
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0 and leaf.dtype == jnp.int32]
    assert state.step == 1 and counts and all(count == 1 for count in counts)
    np.testing.assert_allclose(metrics["ptx/nll"], lm(PARAMS["policy"], ptx, KEY)[0], rtol=1e-5)


@pytest.mark.parametrize("coef", [0.0, 3.0])
def test_ptx_nll_is_of_the_text_alone_and_of_steps_without_a_trained_token_as_well(coef):
    """Whatever experts add to what is trained."""
    arch = dataclasses.replace(ARCH, num_experts=4, experts_per_token=2)
    models, ptx = Models(Model(arch, balance_coef=coef), BIGRAMS.value), ptx_text()
    params, none = {**PARAMS, "policy": model_params(models.policy, 0)}, np.zeros((8, 6), bool)
    x = dataclasses.replace(make_experience(3, PARAMS), mask=none, value_mask=none)
    run = ppo_run(ptx_coef=0.5, epochs=2, minibatches=1, rate=0.0)
    state, update = updater(run, models, params)
    _, metrics = update(state, x, ptx=jax.tree.map(lambda a: jnp.stack([a, a]), ptx))
    said = models.policy.next_logprobs(params["policy"], *(ptx[n] for n in ("tokens", "positions", "segment_ids")))
    np.testing.assert_allclose(metrics["ptx/nll"], -said.mean(), rtol=1e-5)
    assert (metrics["loss/total"] > 0.5 * metrics["ptx/nll"] + 0.1) == bool(coef)
    assert jnp.isnan(metrics["policy/loss"]) and metrics["optim/grad_norm"] > 0


def test_entropy_bonus_is_the_weighted_entropy_that_numpy_computes():
    x, rollout = make_experience(3, PARAMS), make_rollout(3, PARAMS["policy"])
    logs = bigram_law(PARAMS["policy"], rollout)
    entropy = (f64(token_weights(x.mask, "token")) * -(np.exp(logs) * logs).sum(-1)).sum()
    losses = [objective(BIGRAMS, PPOConfig(entropy_coef=c))(PARAMS, batch_of(x), KEY) for c in (0.0, 0.5)]
    np.testing.assert_allclose(losses[1][1]["policy/entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(losses[0][0] - losses[1][0], 0.5 * entropy, rtol=1e-5)


def test_the_whole_loss_is_the_sum_of_its_parts_as_numpy_computes_them():
    config = PPOConfig(clip_ratio=0.1, dual_clip=1.5, value_clip=0.3, value_coef=0.7)
    rng, x = np.random.default_rng(0), make_experience(3, PARAMS)
    move = lambda a, size: jnp.where(x.mask, a + size * rng.normal(size=a.shape), 0.0).astype(jnp.float32)  # noqa: E731
    x = dataclasses.replace(x, old_logprobs=move(x.old_logprobs, 0.5), old_values=move(x.old_values, 0.5))
    rollout, weights = make_rollout(3, PARAMS["policy"]), f64(token_weights(x.mask, "token"))
    ratio = np.exp(bigram_logprobs(PARAMS["policy"], rollout) - f64(x.old_logprobs))
    gain = np.minimum(ratio * f64(x.advantages), np.clip(ratio, 0.9, 1.1) * f64(x.advantages))
    gain = np.where(f64(x.advantages) < 0, np.maximum(gain, 1.5 * f64(x.advantages)), gain)
    values, old, target = bigram_values(PARAMS["value"], rollout), f64(x.old_values), f64(x.returns)
    error = np.maximum((values - target) ** 2, (np.clip(values, old - 0.3, old + 0.3) - target) ** 2)
    expected = -(weights * gain).sum() + 0.7 * 0.5 * (weights * error).sum()
    loss, metrics = objective(BIGRAMS, config)(PARAMS, batch_of(x), KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    outside = weights * ((ratio < 0.9) | (ratio > 1.1))
    np.testing.assert_allclose(metrics["policy/clip_fraction"], outside.sum(), rtol=1e-5)


def test_a_shared_trunk_hears_the_value_loss_and_a_separate_one_does_not():
    x = make_experience(3, PARAMS)
    silent = batch_of(dataclasses.replace(x, advantages=jnp.zeros_like(x.advantages)))
    shared = Models(BIGRAMS.policy, BIGRAMS.value, shared_trunk=True)
    on_trunk = {"policy": PARAMS["policy"], "value": {"score": PARAMS["value"]["score"]}}
    found = grad_of(PPOConfig(), silent, on_trunk, shared)
    assert largest(found["policy"]["embed"]) > 1e-3 and largest(found["value"]) > 1e-3
    assert largest(grad_of(PPOConfig(), silent)["policy"]) == 0.0


# --- the invariants of the first minibatch and of step 0


@functools.cache
def decoder_parts():
    """A decoder as policy and critic, its compiled sampler, and its compiled scoring, {recompute: program}."""
    policy, value = Model(ARCH), Model(ARCH, score_head=True)
    params = {"policy": model_params(policy, 0), "value": model_params(value, 1)}
    models = Models(policy, value)
    sampler = jax.jit(
        functools.partial(sample, policy, max_new_tokens=6, stop_ids=(STOP, 2, 3), chunk=3, filtered=False)
    )
    scorers = {r: jax.jit(make_score(models, PPOConfig(), recompute=r)) for r in (True, False)}
    return models, params, sampler, scorers


def decoder_rollout(temperature: float = 1.0, pad: int = 0, fill: int = 0) -> Rollout:
    """Sampled from the decoder, `pad` more columns of padding on the left, filled with the id `fill`."""
    _, params, sampler, _ = decoder_parts()
    rng = np.random.default_rng(5)
    prompt = np.pad(rng.integers(2, V, (8, 3)), ((0, 0), (pad, 0)), constant_values=fill)
    mask = np.arange(3 + pad) >= pad + rng.integers(0, 3, 8)[:, None]
    law = SamplingLaw.from_config(SamplingConfig(temperature=temperature))
    prompt = jnp.asarray(np.where(mask, prompt, fill), jnp.int32)
    return sampler(params["policy"], prompt, jnp.asarray(mask), jax.random.key(7), law)


def decoder_score(rollout: Rollout, temperature: float = 1.0, *, recompute: bool, ref=None):
    _, params, _, scorers = decoder_parts()
    ref = params["policy"] if ref is None else ref
    host = jnp.linspace(-1.0, 1.0, 8)
    return scorers[recompute](params, ref, None, rollout, host, jnp.float32(0.1), jnp.float32(temperature))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl_to_the_reference_is_exactly_0_at_step_0_with_recomputed_logprobs(temperature):
    _, _, metrics, per_row = decoder_score(decoder_rollout(temperature), temperature, recompute=True)
    assert metrics["rollout/kl"] == metrics["rollout/kl_k3"] == 0.0
    assert (per_row["kl"] == 0.0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl_to_the_reference_is_0_at_step_0_with_the_samplers_logprobs(temperature):
    # One forward pass against decoding with a cache: float32 sums in another order, 2e-6 nats per token at T = 0.5.
    _, _, metrics, per_row = decoder_score(decoder_rollout(temperature), temperature, recompute=False)
    assert np.abs(per_row["kl"]).max() < 1e-5
    assert 0 <= metrics["rollout/kl_k3"] < 1e-10


def test_a_reference_at_another_temperature_would_be_paid_for():
    rollout = decoder_rollout(0.5)
    _, _, metrics, _ = decoder_score(rollout, 1.0, recompute=False)  # old log-probs at 0.5, the reference at 1
    assert abs(metrics["rollout/kl"]) > 1e-2


@pytest.mark.parametrize("recompute", [True, False])
def test_first_minibatch_has_ratio_1_no_kl_and_no_clipping(recompute):
    models, params, _, _ = decoder_parts()
    x = decoder_score(decoder_rollout(), recompute=recompute)[0]
    run = ppo_run(epochs=1)
    state, update = updater(run, models, params)
    _, metrics = update(state, x)
    # Recomputed by the same forward pass over the same rows: the same bits. The sampler decodes with a cache: between
    # -4 and -8 nats a float32 has steps of 4.8e-7, and four of them are allowed.
    assert abs(metrics["policy/first_ratio_max"] - 1.0) <= (0.0 if recompute else 2e-6)
    assert abs(metrics["policy/ratio"] - 1.0) <= (0.0 if recompute else 1e-6)
    assert abs(metrics["policy/first_approx_kl"]) <= (0.0 if recompute else 1e-12)
    assert metrics["policy/first_clip_fraction"] == 0.0


def test_sampled_rows_end_at_a_stop_token_that_is_part_of_the_response():
    rollout = decoder_rollout()
    last = np.asarray(rollout.mask).sum(1) - 1
    ends = np.isin(np.asarray(rollout.tokens)[np.arange(8), last], (STOP, 2, 3))
    assert rollout.finished.any() and not rollout.finished.all()
    assert (ends == np.asarray(rollout.finished)).all()


# --- masks and padding


def test_padding_changes_nothing():
    models, params, _, _ = decoder_parts()
    loss_fn = jax.jit(lambda batch: objective(models, PPOConfig())(params, batch, KEY)[0])
    found = []
    for pad in (0, 4):
        rollout = decoder_rollout(pad=pad)
        x, _, metrics, per_row = decoder_score(rollout, recompute=True, ref=model_params(models.policy, 9))
        assert 0 < metrics.pop("data/filled") <= 1  # of all slots, padding too
        moved = dataclasses.replace(x, old_logprobs=x.old_logprobs + 0.1 * x.mask)
        numbers = (x.old_logprobs, x.old_values, x.advantages, x.returns, metrics, per_row, loss_fn(batch_of(moved)))
        found.append((rollout.tokens, numbers))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1], atol=2e-6, rtol=2e-6)
    assert found[0][1][4]["rollout/kl"] > 0.1


@pytest.mark.parametrize("fill", [STOP, 5])
def test_masks_are_carried_and_not_read_off_the_ids(fill):
    """pad == eos: stop ids in prompts and responses count, and whatever id fills the unused places does not."""
    models, _, _, _ = decoder_parts()
    rollout = decoder_rollout()
    stop_inside = Rollout(**{**vars(rollout), "prompt": rollout.prompt.at[:, -1].set(STOP)})
    refilled = Rollout(
        **{
            **vars(stop_inside),
            "prompt": jnp.where(rollout.prompt_mask, stop_inside.prompt, fill),
            "tokens": jnp.where(rollout.mask, rollout.tokens, fill),
        }
    )
    outputs = [decoder_score(r, recompute=True, ref=model_params(models.policy, 9)) for r in (stop_inside, refilled)]
    assert same_bits(*[(o[0].mask, o[0].old_logprobs, o[0].old_values, o[0].advantages, o[1:]) for o in outputs])
    assert int(outputs[0][0].segment_ids.sum()) == int(rollout.prompt_mask.sum() + rollout.mask.sum())
    assert (np.asarray(outputs[0][0].segment_ids)[:, 2] == 1).all()  # the stop id that ends each prompt is a token


def test_a_stop_id_within_a_response_neither_ends_nor_masks_it():
    rollout = make_rollout(3, PARAMS["policy"])
    tokens = rollout.tokens.at[0, 1].set(STOP)
    x = score(PPOConfig(), Rollout(**{**vars(rollout), "tokens": tokens}))[0]
    assert x.mask[0].all() and x.segment_ids[0, -rollout.mask.shape[1] :].all()
    assert x.old_logprobs[0, 1] < 0


def test_no_kl_is_estimated_over_prompt_tokens():
    rollout = make_rollout(3, PARAMS["policy"])
    prompt = jnp.full_like(rollout.prompt, 20).at[:, -1].set(7)  # id 20 stands in prompts only
    tokens = jnp.where(rollout.tokens == 20, 21, rollout.tokens)
    rollout = Rollout(**{**vars(rollout), "prompt": prompt, "tokens": tokens})
    perturbed = {**REF, "embed": {"tokens": REF["embed"]["tokens"].at[20].add(3.0)}}
    before, after = (score(PPOConfig(), rollout, ref=ref) for ref in (REF, perturbed))
    assert same_bits(before, after)
    mattering = {**REF, "embed": {"tokens": REF["embed"]["tokens"].at[7].add(3.0)}}  # the state before the first token
    assert not same_bits(before[3]["kl"], score(PPOConfig(), rollout, ref=mattering)[3]["kl"])


# --- scores and advantages


def numpy_score(config, rollout, host, kl_coef, temperature=1.0, model_weight=1.0) -> dict:
    """The scoring program in plain float64 loops, on bigrams."""
    old, ref = (bigram_logprobs(p, rollout, temperature) for p in (PARAMS["policy"], REF))
    values, reward = bigram_values(PARAMS["value"], rollout), f64(REWARD)
    mask, tokens = np.asarray(rollout.mask), np.asarray(rollout.tokens)
    rows, num = mask.shape
    trained, rewards, raw = np.zeros_like(mask), np.zeros((rows, num)), np.zeros(rows)
    for b in range(rows):
        length = int(mask[b].sum())
        last = reward["embed"]["tokens"][tokens[b, length - 1]]
        raw[b] = model_weight * (last @ reward["score"]["kernel"] + reward["score"]["bias"]) + host[b]
        paid = raw[b]
        if not rollout.finished[b]:
            change = {"off": paid, "replace": config.missing_eos_value, "subtract": paid - config.missing_eos_value}
            paid = change[config.missing_eos]
        slot = length - 1 if config.score_at == "last" else min(length, num - 1)
        trained[b, : slot + 1] = True
        for t in range(length):
            d = ref[b, t] - old[b, t]
            rewards[b, t] = -kl_coef * (-d if config.kl_estimator == "k1" else np.exp(d) - 1 - d)
        rewards[b, slot] += paid
    if config.whiten_rewards:
        rewards = whitened(rewards, trained, config.whiten_variance, keep_mean=True)
    advantages = np.zeros((rows, num))
    for b, t in itertools.product(range(rows), reversed(range(num))):
        ahead = t + 1 < num and trained[b, t + 1]
        after = advantages[b, t + 1] if ahead else 0.0
        if trained[b, t]:
            delta = rewards[b, t] + config.discount * (values[b, t + 1] if ahead else 0.0) - values[b, t]
            advantages[b, t] = delta + config.discount * config.gae_lambda * after
    returns = np.where(trained, advantages + values, 0.0)
    if config.whiten_advantages:
        advantages = whitened(advantages, mask, config.whiten_variance, keep_mean=False)
    return {
        "old_logprobs": old,
        "old_values": np.where(trained, values, 0.0),
        "value_mask": trained,
        "advantages": np.where(mask, advantages, 0.0),
        "returns": returns,
        "reward": raw,
        "kl": (old - ref).sum(1),
    }


def whitened(x: np.ndarray, mask: np.ndarray, variance: str, *, keep_mean: bool) -> np.ndarray:
    valid = x[mask]
    mean, var = valid.mean(), valid.var(ddof=int(variance == "bessel"))
    return np.where(mask, (x - mean) / np.sqrt(var + 1e-8) + (mean if keep_mean else 0.0), 0.0)


VARIANTS = {
    "default": {},
    "k3": {"kl_estimator": "k3"},
    "after_eos": {"score_at": "after_eos"},
    "replace": {"missing_eos": "replace", "missing_eos_value": -1.0},
    "subtract": {"missing_eos": "subtract", "missing_eos_value": 0.4},
    "rewards": {"whiten_rewards": True},
    "bessel": {"whiten_rewards": True, "whiten_variance": "bessel"},
    "rewards_after_eos": {"whiten_rewards": True, "score_at": "after_eos"},
    "raw_advantages": {"whiten_advantages": False},
    "discounted": {"discount": 0.9, "gae_lambda": 0.5, "whiten_advantages": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_scoring_follows_the_plain_loops(name):
    config, rollout = PPOConfig(**VARIANTS[name]), make_rollout(4, PARAMS["policy"], temperature=0.7)
    host = np.random.default_rng(0).normal(size=8)
    expected = numpy_score(config, rollout, host, 0.3, temperature=0.7, model_weight=0.5)
    x, _, metrics, per_row = score(config, rollout, host=host, kl_coef=0.3, temperature=0.7, model_weight=0.5)
    for key, value in expected.items():
        found = per_row[key] if key in per_row else getattr(x, key)
        np.testing.assert_allclose(found, value, atol=2e-5, rtol=2e-5, err_msg=key)
    np.testing.assert_allclose(metrics["rollout/reward"], expected["reward"].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["rollout/kl"], expected["kl"].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["rollout/eos_fraction"], np.asarray(rollout.finished).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["rollout/response_length"], np.asarray(rollout.mask).sum(1).mean(), rtol=1e-6)


PAID_ALONE = {"discount": 1.0, "gae_lambda": 0.0, "whiten_advantages": False}


@pytest.mark.parametrize(("score_at", "later"), [("last", 0), ("after_eos", 1)])
def test_exactly_one_score_is_paid_per_row_in_its_slot(score_at, later):
    """With lambda 0, no KL and a critic that says 0, the returns are the rewards."""
    rollout = make_rollout(4, PARAMS["policy"])
    blind = {**PARAMS, "value": jax.tree.map(jnp.zeros_like, PARAMS["value"])}
    config = PPOConfig(score_at=score_at, **PAID_ALONE)
    host = np.arange(1.0, 9.0)
    x, _, _, _ = score(config, rollout, params=blind, host=host, kl_coef=0.0, models=NO_REWARD)
    length = np.asarray(rollout.mask).sum(1)
    expected = np.zeros(rollout.mask.shape)
    expected[np.arange(8), np.minimum(length - 1 + later, rollout.mask.shape[1] - 1)] = host
    np.testing.assert_array_equal(x.returns, expected)


@pytest.mark.parametrize(
    "rewards", [[0.7, 1, 0, 1], np.array([0.7, 1, 0, 1]), [np.float64(0.7), True, 0, np.int64(1)]]
)
def test_rewards_stay_floats(rewards):
    found = call_reward(lambda prompts, responses: rewards, ["p"] * 4, ["r"] * 4, {}, **ONCE)
    assert found.tolist() == [0.7, 1, 0, 1]
    total = combine(RewardSourceConfig(function_weights=[0.5]), [lambda prompts, responses: rewards])
    paid = total(["p"] * 4, ["r"] * 4, {})
    assert paid.dtype == np.float32 and paid.tolist() == np.float32([0.35, 0.5, 0, 0.5]).tolist()


def test_a_reward_of_seven_tenths_arrives_in_the_returns():
    rollout = make_rollout(4, PARAMS["policy"])
    blind = {**PARAMS, "value": jax.tree.map(jnp.zeros_like, PARAMS["value"])}
    config = PPOConfig(**PAID_ALONE)
    x, _, metrics, _ = score(config, rollout, params=blind, host=np.full(8, 0.7), kl_coef=0.0, models=NO_REWARD)
    np.testing.assert_array_equal(x.returns.sum(1), np.full(8, np.float32(0.7)))
    np.testing.assert_allclose(metrics["rollout/reward"], 0.7, rtol=1e-6)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([0.5], "1 rewards for 2 responses"),
        ([0.5, "good"], "'good' for response 1"),
        ([0.5, None], "None for response 1"),
        ([0.5, float("nan")], "nan for response 1"),
        ([float("inf"), 0.5], "inf for response 0"),
        (None, "None"),
    ],
)
def test_a_reward_function_that_returns_something_else_is_named(returned, words):
    def my_reward(prompts, responses):
        return returned

    with pytest.raises(UserError, match=f"my_reward.*{words}") as error:
        call_reward(my_reward, ["p"] * 2, ["r"] * 2, {}, **ONCE)
    assert "\n" not in str(error.value)


def test_rewards_of_any_numeric_array_library_are_numbers():
    found = call_reward(lambda prompts, responses: jnp.array([0.7, 1.0]), ["p"] * 2, ["r"] * 2, {}, **ONCE)
    np.testing.assert_array_equal(found, np.float32([0.7, 1.0]))


def test_weights_of_reward_functions_must_match_them():
    with pytest.raises(UserError, match="2 entries for 1 functions"):
        combine(RewardSourceConfig(function_weights=[1.0, 2.0]), [lambda prompts, responses: responses])


def test_the_adaptive_controller_moves_the_coefficient_towards_the_target_and_the_fixed_one_does_not():
    """The known answers from 0.15 with target 6, 512 rows and horizon 10000; here 8 rows and horizon 10000 / 64."""
    rollout = make_rollout(4, PARAMS["policy"])
    per_row = 1.0 / rollout.mask.sum(1, keepdims=True)
    ref = jnp.asarray(bigram_logprobs(REF, rollout), jnp.float32)
    for kl, expected in ((12.0, 0.151536), (3.0, 0.148464), (6.6, 0.150768)):
        far = Rollout(**{**vars(rollout), "logprobs": jnp.where(rollout.mask, ref + kl * per_row, 0.0)})
        config = PPOConfig(kl_target=6.0, kl_horizon=10000 / 64)
        _, coef, metrics, _ = score(config, far, kl_coef=0.15, recompute=False)
        np.testing.assert_allclose(metrics["rollout/kl"], kl, rtol=1e-4)
        np.testing.assert_allclose(coef, expected, rtol=1e-4)
        fixed = dataclasses.replace(config, kl_controller="fixed")
        assert score(fixed, far, kl_coef=0.15, recompute=False)[1] == np.float32(0.15)


@pytest.mark.parametrize("recompute", [True, False])
def test_scoring_in_microbatches_equals_scoring_at_once(recompute):
    rollout = make_rollout(4, PARAMS["policy"])
    host = np.random.default_rng(0).normal(size=8)
    whole, parts = (
        score(PPOConfig(score_microbatch=rows), rollout, host=host, recompute=recompute) for rows in (0, 2)
    )
    assert_close(whole, parts, atol=2e-6, rtol=2e-6)


def test_old_logprobs_come_from_the_sampler_or_from_a_forward_pass():
    rollout = make_rollout(4, PARAMS["policy"])
    rollout = Rollout(**{**vars(rollout), "logprobs": jnp.where(rollout.mask, rollout.logprobs - 0.25, 0.0)})
    sampler, forward = (score(PPOConfig(), rollout, recompute=r) for r in (False, True))
    np.testing.assert_array_equal(sampler[0].old_logprobs, rollout.logprobs)
    np.testing.assert_allclose(forward[0].old_logprobs, bigram_logprobs(PARAMS["policy"], rollout), atol=1e-5)
    assert sampler[2]["rollout/logprob_gap_max"] == 0
    np.testing.assert_allclose(forward[2]["rollout/logprob_gap_max"], 0.25, atol=1e-5)


# --- truncation


def plain_truncation(tokens, stop_ids, after):
    """(kept tokens, whether it stopped) of one row, plain Python."""
    for i, token in enumerate(tokens):
        if token in stop_ids and i >= after:
            return tokens[: i + 1], True
    return tokens, False


@pytest.mark.parametrize("after", [0, 2, 5])
def test_truncation_cuts_after_the_first_stop_id_at_or_after_truncate_after(after):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 6, (64, 6))
    everything = jnp.ones((64, 6), bool)
    full = Rollout(
        prompt=jnp.zeros((64, 2), jnp.int32),
        prompt_mask=jnp.ones((64, 2), bool),
        tokens=jnp.asarray(tokens, jnp.int32),
        mask=everything,
        logprobs=jnp.asarray(rng.normal(size=(64, 6)), jnp.float32),
        finished=jnp.zeros(64, bool),
    )
    cut = online_core.truncated(full, (1, 4), after)
    stopped = set()
    for b, row in enumerate(tokens.tolist()):
        kept, stops = plain_truncation(row, (1, 4), after)
        assert np.asarray(cut.tokens)[b][np.asarray(cut.mask)[b]].tolist() == kept
        assert bool(cut.finished[b]) == stops
        np.testing.assert_array_equal(cut.logprobs[b, : len(kept)], full.logprobs[b, : len(kept)])
        assert not cut.logprobs[b, len(kept) :].any() and not cut.mask[b, len(kept) :].any()
        stopped.add(stops)
    assert stopped == {True, False}


# --- epochs and minibatches


def recorded(config: PPOConfig, key, rows: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The rows [steps, rows per step] and noise keys [steps] that an update hands to its optimiser steps."""
    x = make_experience(3, PARAMS, rows=rows)
    x = dataclasses.replace(x, old_values=jnp.broadcast_to(jnp.arange(rows, dtype=jnp.float32)[:, None], x.mask.shape))
    steps = config.epochs * config.minibatches

    def step(state, batch, key, frozen):
        seen, keys = state.params
        seen = seen.at[state.step].set(batch["experience"].old_values[:, 0])
        keys = keys.at[state.step].set(jax.random.key_data(key))
        return TrainState(state.step + 1, (seen, keys), ()), {"optim/grad_norm": jnp.zeros(())}

    start = (jnp.zeros((steps, rows // config.minibatches)), jnp.zeros((steps, 2), jnp.uint32))
    state = TrainState(jnp.zeros((), jnp.int32), start, ())
    state, _ = jax.jit(make_ppo_update(step, config))(state, x, key, jnp.float32(1.0))
    return np.asarray(state.params[0]), np.asarray(state.params[1])


def test_every_epoch_takes_every_row_once_in_an_order_of_its_own():
    config = PPOConfig(epochs=4, minibatches=2)
    seen, keys = recorded(config, KEY)
    epochs = seen.reshape(4, 8)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(8.0), (4, 1)))
    assert len({tuple(order) for order in epochs.tolist()}) == 4
    assert len({tuple(key) for key in keys.tolist()}) == 8


def test_orders_and_noise_differ_between_iterations_and_follow_the_key():
    config = PPOConfig(epochs=2, minibatches=2)
    one, same, other = (recorded(config, jax.random.fold_in(KEY, i)) for i in (0, 0, 1))
    assert same_bits(one, same)
    assert (one[0] != other[0]).any() and not {tuple(k) for k in one[1].tolist()} & {
        tuple(k) for k in other[1].tolist()
    }


def test_four_epochs_move_the_ratio_until_clipping_acts_and_one_does_not():
    x, found = make_experience(3, PARAMS), {}
    for epochs in (1, 4):
        state, update = updater(ppo_run(epochs=epochs))
        found[epochs] = update(state, x)
    (one, first), (four, later) = found[1], found[4]
    assert abs(first["policy/ratio_max"] - 1.0) < 1e-6 and first["policy/clip_fraction"] == 0.0
    assert later["policy/ratio_max"] > 1.2 and later["policy/clip_fraction"] > 0.0
    assert later["policy/first_clip_fraction"] == 0.0 and abs(later["policy/first_ratio_max"] - 1.0) < 1e-6
    assert not same_bits(one.params, four.params)
    assert (one.step, four.step) == (1, 4)


def test_accumulating_microbatches_equals_the_whole_minibatch():
    x = make_experience(3, PARAMS)
    ends = {}
    for accumulate in (1, 4):
        # A large epsilon keeps Adam's update smooth in the gradient: near 0 it is the sign, and rounding would decide.
        optim = OptimConfig(learning_rate=0.1, schedule="constant", eps=1e-2)
        config = PPOConfig(epochs=2, accumulate=accumulate)
        state, update = updater(PPOArgs(ppo=config, optim=optim, value_optim=optim))
        ends[accumulate] = update(state, x)
    assert_close(ends[1][0].params, ends[4][0].params, atol=1e-6)
    share = {"optim/filled": 1}  # of larger microbatches fewer columns are real
    assert_close(ends[1][1] | share, ends[4][1] | share, atol=1e-5, rtol=1e-5)


def test_minibatches_are_optimiser_steps_with_weights_that_sum_to_one():
    x = make_experience(3, PARAMS)
    state, update = updater(ppo_run(epochs=2, minibatches=4))
    end, metrics = update(state, x)
    assert end.step == 8
    counts = [leaf for leaf in jax.tree.leaves(end.opt_state) if leaf.ndim == 0 and leaf.dtype == jnp.int32]
    assert sorted(counts) == [8 - metrics["optim/empty"], 8]  # where every ratio is clipped the critic alone moves
    np.testing.assert_allclose(metrics["policy/ratio"], 1.0, atol=0.1)  # a weighted mean, not a sum over minibatches


@pytest.mark.parametrize("reduction", ["token", "sequence", "fixed"])
def test_loss_reduction_builds_the_weights_of_each_minibatch(reduction):
    """The critic's own mask may be one slot longer than the policy's, where the score is paid after the stop token."""
    x, seen = make_experience(3, PARAMS), []
    x = dataclasses.replace(x, value_mask=x.mask | jnp.roll(x.mask, 1, axis=1))

    def step(state, batch, key, frozen):
        seen.append((batch["experience"].mask, batch["weights"]))
        seen.append((batch["experience"].value_mask, batch["value_weights"]))
        return state, {"optim/grad_norm": jnp.zeros(())}

    with jax.disable_jit():
        update = make_ppo_update(step, PPOConfig(epochs=1, minibatches=2, loss_reduction=reduction))
        update(TrainState(jnp.zeros((), jnp.int32), (), ()), x, KEY, jnp.float32(1.0))
    assert len(seen) == 4 and (seen[0][0] != seen[1][0]).any()
    for mask, weights in seen:
        valid = f64(mask.astype(jnp.float32))
        row = valid / valid.sum(1, keepdims=True) / len(valid)
        expected = {"token": valid / valid.sum(), "sequence": row, "fixed": valid / valid.size}[reduction]
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_fixed_weights_scale_the_loss_but_not_what_is_said_of_tokens():
    """Of rows that fill half of their columns, an entropy in nats per token would be half of itself."""
    x, said = make_experience(3, PARAMS), {}
    for reduction in ("token", "fixed"):
        config = PPOConfig(loss_reduction=reduction)
        said[reduction] = objective(BIGRAMS, config)(PARAMS, batch_of(x, reduction), KEY)[1]
    share = x.mask.mean()
    assert share < 0.8
    for name, value in said["token"].items():
        np.testing.assert_allclose(said["fixed"][name], value * (share if name.endswith("/loss") else 1), rtol=1e-5)


@pytest.mark.parametrize(("kl", "price"), [(np.nan, 0.1), (np.inf, 0.1 * (1 + 0.2 * 4 / 100)), (6.0, 0.1)])
def test_a_kl_that_is_no_number_leaves_its_price_as_it_was(kl, price):
    """An iteration whose numbers are not finite is skipped; its NaN in the price would skip all that follow."""
    config = PPOConfig(kl_controller="adaptive", kl_target=6.0, kl_horizon=100.0)
    found = core.next_kl_coef(jnp.float32(0.1), jnp.array([6.0, 6.0, kl, 6.0]), config)
    np.testing.assert_allclose(found, price, rtol=1e-6)


def test_target_kl_stops_the_epochs_but_not_the_schedule():
    x, ends = make_experience(3, PARAMS), {}
    for epochs in (2, 3):
        state, update = updater(ppo_run(epochs=epochs))
        ends[epochs] = update(state, x)
    kl_before_third = float(3 * ends[3][1]["policy/approx_kl"] - 2 * ends[2][1]["policy/approx_kl"])
    kl_before_second = float(2 * ends[2][1]["policy/approx_kl"])
    assert 0 < kl_before_second < kl_before_third
    state, update = updater(ppo_run(epochs=3, target_kl=(kl_before_second + kl_before_third) / 2))
    end, metrics = update(state, x)
    assert metrics["policy/epochs_taken"] == 2
    assert_close(end.params, ends[2][0].params, atol=1e-6)
    assert end.step == 3  # the next iteration's learning rate and key are those of an iteration that ran through
    np.testing.assert_allclose(metrics["policy/approx_kl"], ends[3][1]["policy/approx_kl"], rtol=1e-4)


def test_a_target_that_is_never_reached_changes_nothing():
    x = make_experience(3, PARAMS)
    (state, free), (_, bound) = (updater(ppo_run(epochs=2, target_kl=k)) for k in (0.0, 1e6))
    a, b = free(state, x), bound(state, x)
    assert_close(a[0].params, b[0].params, atol=1e-6)
    assert b[1]["policy/epochs_taken"] == 2 and b[0].step == 2


def test_target_kl_with_a_loss_that_does_not_report_it_says_so():
    silent = lambda logprobs, old, advantages, weights: (-jnp.sum(weights * logprobs * advantages), {})  # noqa: E731
    state, update = updater(ppo_run(target_kl=0.1), policy_loss=silent)
    with pytest.raises(UserError, match="policy/approx_kl"):
        update(state, make_experience(3, PARAMS))


def test_updates_that_are_not_finite_are_skipped_and_counted():
    x = make_experience(3, PARAMS)
    poisoned = dataclasses.replace(x, advantages=x.advantages.at[0, 0].set(jnp.nan))
    state, update = updater(ppo_run(epochs=2, minibatches=4))
    end, metrics = update(state, poisoned)
    assert metrics["optim/skipped"] == 2  # row 0 is in one minibatch of each epoch
    assert end.step == 8 and np.isfinite(largest(end.params)) and not same_bits(end.params, state.params)
    spoilt = dataclasses.replace(x, returns=jnp.full_like(x.returns, jnp.inf))
    end, metrics = update(state, spoilt)
    assert metrics["optim/skipped"] == 8 and end.step == 8
    assert same_bits((end.params, end.opt_state), (state.params, state.opt_state))


def test_an_update_without_a_token_that_is_trained_on_moves_nothing_and_is_counted():
    x, none = make_experience(3, PARAMS), np.zeros((8, 6), bool)
    state, update = updater(ppo_run(epochs=2, minibatches=2))
    state, metrics = update(state, x)
    end, said = update(state, dataclasses.replace(x, mask=none, value_mask=none))
    assert (metrics["optim/empty"], said["optim/empty"], said["optim/skipped"], end.step) == (0, 4, 0, 8)
    assert same_bits((end.params, end.opt_state), (state.params, state.opt_state))


def test_a_half_without_gradient_stays_as_it_is_while_the_other_learns():
    """Policy and critic have an optimiser each: momentum and weight decay move neither without its gradient."""
    x, optim = make_experience(3, PARAMS), OptimConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.1)
    run = PPOArgs(ppo=PPOConfig(epochs=1, value_clip=0.0), optim=optim, value_optim=optim)
    state, update = updater(run)
    state, said = update(state, x)
    still = lambda name, a, b: same_bits(  # noqa: E731
        *((each.params[name], each.opt_state.inner_states[name]) for each in (a, b))
    )
    values, _ = core.values_of(BIGRAMS, state.params, online_core.packed(x).at(0), 6)
    for changes, unmoved, moved, empty in (
        ({"advantages": jnp.zeros_like(x.advantages)}, "policy", "value", 1),
        ({"returns": jnp.where(x.value_mask, values, 0)}, "value", "policy", 0),
    ):
        after, found = update(state, dataclasses.replace(x, **changes))
        assert still(unmoved, state, after) and not still(moved, state, after)
        assert (said["optim/empty"], found["optim/empty"], found["optim/skipped"]) == (0, empty, 0)


def test_the_critic_learns_alone_while_it_warms_up():
    x = make_experience(3, PARAMS)
    state, update = updater(ppo_run(epochs=2, critic_warmup=2))
    for warming in (True, True, False):
        new, _ = update(state, x)
        assert same_bits(new.params["policy"], state.params["policy"]) == warming
        assert not same_bits(new.params["value"], state.params["value"])
        state = new


def test_learning_rates_go_by_the_iteration_and_not_by_the_optimiser_step():
    optim = OptimConfig(learning_rate=0.4, schedule="linear")
    value_optim = OptimConfig(learning_rate=0.2, schedule="constant")
    run = PPOArgs(ppo=PPOConfig(iterations=4, epochs=3, minibatches=2), optim=optim, value_optim=value_optim)
    tx, schedule = core.make_ppo_optimizer(run)
    np.testing.assert_allclose([schedule(i) for i in range(4)], [0.4, 0.3, 0.2, 0.1], rtol=1e-6)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    for step in (0, 5, 6, 23):
        updates, _ = tx.update(ones, tx.init(PARAMS), PARAMS, step=jnp.asarray(step))
        # Adam's first update is -rate for every positive gradient.
        np.testing.assert_allclose(updates["policy"]["head"]["kernel"], -schedule(step // 6), rtol=1e-3)
        np.testing.assert_allclose(updates["value"]["score"]["kernel"], -0.2, rtol=1e-3)


def test_policy_and_critic_are_clipped_each_by_its_own_norm():
    run = ppo_run()
    tx, _ = core.make_ppo_optimizer(run)
    huge = {
        "policy": jax.tree.map(jnp.ones_like, PARAMS["policy"]),
        "value": jax.tree.map(jnp.zeros_like, PARAMS["value"]),
    }
    alone = tx.update(huge, tx.init(PARAMS), PARAMS, step=jnp.zeros((), jnp.int32))[1]
    beside = {**huge, "value": jax.tree.map(lambda p: jnp.full_like(p, 1e3), PARAMS["value"])}
    both = tx.update(beside, tx.init(PARAMS), PARAMS, step=jnp.zeros((), jnp.int32))[1]
    assert same_bits(alone.inner_states["policy"], both.inner_states["policy"])


def test_the_average_follows_the_policy_by_its_decay():
    average, policy = {"x": jnp.asarray([1.0, 2.0])}, {"x": jnp.asarray([3.0, 0.0])}
    for _ in range(3):
        average = online_core.ema(average, policy, 0.9)
    expected = np.array([3.0, 0.0]) + 0.9**3 * (np.array([1.0, 2.0]) - np.array([3.0, 0.0]))
    np.testing.assert_allclose(average["x"], expected, rtol=1e-6)


def test_a_better_action_becomes_likelier_and_the_value_nears_the_return():
    """The signs are right: one update lifts log-probs where advantages are positive and lowers the value's error."""
    x, rollout = make_experience(3, PARAMS), make_rollout(3, PARAMS["policy"])
    state, update = updater(ppo_run(epochs=1))
    end, _ = update(state, x)
    gain = bigram_logprobs(f64(end.params["policy"]), rollout) - bigram_logprobs(PARAMS["policy"], rollout)
    assert (gain * f64(x.advantages)).sum() > 0
    error = [
        ((bigram_values(p["value"], rollout) - f64(x.returns)) ** 2)[np.asarray(x.mask)].mean()
        for p in (PARAMS, end.params)
    ]
    assert error[1] < error[0]


def test_the_default_loss_is_the_clipped_surrogate():
    x = make_experience(3, PARAMS)
    named = grad_of(SURROGATE_ONLY, batch_of(x))
    bound = functools.partial(
        clipped_policy_loss, clip_ratio=0.2, clip_ratio_high=0.0, dual_clip=0.0, max_log_ratio=20.0
    )
    assert same_bits(named, grad_of(SURROGATE_ONLY, batch_of(x), policy_loss=bound))


def test_the_numpy_log_softmax_sums_to_one():
    np.testing.assert_allclose(np.exp(log_softmax(np.array([[1e3, 0.0], [1.0, 2.0]]))).sum(-1), 1.0)
