"""Losses and advantages of GRPO, RLOO and kin: equal to TRL's in values and gradients, known answers, microbatches."""

from __future__ import annotations

import functools
import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import advantages as adv
from rlhf_jax import losses
from rlhf_jax.tokens import token_weights

GOLDEN = Path(__file__).parent / "golden"
spec = importlib.util.spec_from_file_location("make_group", GOLDEN / "make_group.py")
make_group = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_group)
B, T, GROUP, LOW, HIGH = make_group.B, make_group.T, make_group.GROUP, make_group.LOW, make_group.HIGH

CLIP = {"clip_ratio": LOW, "clip_ratio_high": HIGH, "max_log_ratio": 60.0}
SURROGATE = CLIP | {"dual_clip": 0.0}
CASES = {
    "grpo": (losses.clipped_policy_loss, "sequence", SURROGATE, 0.0),
    "bnpo": (losses.clipped_policy_loss, "token", SURROGATE, 0.0),
    "dr_grpo": (losses.clipped_policy_loss, "fixed", SURROGATE, 0.0),
    "dapo": (losses.clipped_policy_loss, "token", SURROGATE, 0.0),
    "dapo_delta": (losses.clipped_policy_loss, "token", CLIP | {"dual_clip": make_group.DELTA}, 0.0),
    "grpo_kl": (losses.clipped_policy_loss, "sequence", SURROGATE, make_group.BETA),
    "dr_grpo_kl": (losses.clipped_policy_loss, "fixed", SURROGATE, make_group.BETA),
    "dapo_kl": (losses.clipped_policy_loss, "token", SURROGATE, make_group.BETA),
    "cispo": (losses.cispo_policy_loss, "token", CLIP, 0.0),
    "gspo": (losses.sequence_mean_policy_loss, "sequence", SURROGATE, 0.0),
    "gspo_delta": (losses.sequence_mean_policy_loss, "sequence", CLIP | {"dual_clip": make_group.DELTA}, 0.0),
    "rloo": (losses.sequence_policy_loss, "sequence", SURROGATE, 0.0),
    **{mode: (losses.clipped_policy_loss, "sequence", SURROGATE, make_group.BETA) for mode in make_group.MODES},
}
"""Case of the golden file -> (loss, reduction, its options, coefficient of the KL in the loss)."""


@functools.cache
def stored():
    with np.load(GOLDEN / "group.npz") as arrays:
        return dict(arrays)


def value_of(case, x, logprobs):
    loss, reduction, options, beta = CASES[case]
    weights = token_weights(x["mask"], reduction)
    advantages = jnp.broadcast_to(x["advantages"][:, None], (B, T))
    if case in make_group.MODES:  # TRL's names: where, and what happens beyond the cap
        where, beyond = case.split("_")
        beyond = "clip" if beyond == "truncate" else "mask"
        options_of_case = {"importance": where, "importance_cap": make_group.CAP, "importance_beyond": beyond}
        advantages *= losses.importance_weights(x["old"], x["sampler"], x["mask"], **options_of_case)[0]
    total, metrics = loss(logprobs, x["old"], advantages, weights, **options)
    if beta:
        total += beta * losses.reference_kl_loss(logprobs, x["ref"], weights, max_log_ratio=60.0)[0]
    return total, metrics


def check_against(arrays, rows):
    x = {name: arrays[f"{rows}/{name}"] for name in ("mask", "logprobs", "old", "ref", "sampler", "advantages")}
    for case in CASES:
        (loss, _), grad = jax.value_and_grad(partial(value_of, case, x), has_aux=True)(jnp.asarray(x["logprobs"]))
        np.testing.assert_allclose(loss, arrays[f"{rows}/{case}/loss"], rtol=1e-5, atol=1e-5, err_msg=case)
        expected = arrays[f"{rows}/{case}/grad"]
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6, err_msg=case)
        assert np.abs(expected).max() > 1e-3 and not expected[~x["mask"]].any()


@pytest.mark.parametrize("rows", ["ordinary", "extreme"])
def test_losses_and_gradients_equal_those_of_trl(rows):
    check_against(stored(), rows)


@pytest.mark.parametrize("name", make_group.ADVANTAGES)
def test_advantages_equal_those_of_trl(name):
    settings = make_group.ADVANTAGES[name]
    baseline = "group" if name.startswith("grpo") else "leave_one_out"
    scale = settings.get("scale_rewards", "none")
    found = adv.group_advantages(jnp.asarray(stored()["rewards"]), group_size=GROUP, baseline=baseline,
                                 scale_rewards=scale)  # fmt: skip
    np.testing.assert_allclose(found, stored()[f"{name}/advantages"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", ["ordinary", "extreme"])
def test_losses_equal_those_of_trl_live(rows):
    pytest.importorskip("torch", reason="needs torch and trl: the golden file stands in for them")
    pytest.importorskip("trl")
    x = make_group.inputs(rows)
    check_against({f"{rows}/{name}": value for name, value in (x | make_group.losses(x)).items()}, rows)


def test_advantages_equal_those_of_trl_live():
    pytest.importorskip("torch", reason="needs torch and trl: the golden file stands in for them")
    pytest.importorskip("trl")
    for name in make_group.ADVANTAGES:
        np.testing.assert_allclose(make_group.advantages(name), stored()[f"{name}/advantages"], atol=1e-12)


def test_golden_inputs_are_what_the_script_makes():
    for rows in ("ordinary", "extreme"):
        for name, value in make_group.inputs(rows).items():
            np.testing.assert_array_equal(value, stored()[f"{rows}/{name}"])
    np.testing.assert_array_equal(make_group.rewards(), stored()["rewards"])
    extreme = {name: stored()[f"extreme/{name}"] for name in ("logprobs", "old")}
    assert extreme["logprobs"].min() < -1000 and np.abs(extreme["logprobs"] - extreme["old"]).max() > 100


# ---- laws


POLICY_LOSSES = {case: CASES[case][::2] for case in ("grpo", "gspo", "rloo", "cispo")}


def draw(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    old = -np.abs(rng.normal(size=(B, T))).astype(np.float32)
    logprobs = (old + 0.2 * rng.normal(size=(B, T))).astype(np.float32)
    advantages = np.repeat(rng.normal(size=(B, 1)), T, axis=1).astype(np.float32)
    return logprobs, old, advantages, np.array(token_weights(jnp.asarray(mask), "token"))


@pytest.mark.parametrize("case", POLICY_LOSSES)
def test_losses_promote_no_dtype(case):
    loss, options = POLICY_LOSSES[case]
    with jax.numpy_dtype_promotion("strict"):
        shapes = jax.eval_shape(partial(loss, **options), *draw())
        kl = jax.eval_shape(partial(losses.reference_kl_loss, max_log_ratio=9.0), *draw()[1:])
    assert {leaf.dtype for leaf in jax.tree.leaves((shapes, kl))} == {np.dtype(np.float32)}


@pytest.mark.parametrize("case", POLICY_LOSSES)
def test_losses_and_metrics_of_microbatches_add_up(case):
    loss, options = POLICY_LOSSES[case]
    arrays = draw()
    whole = loss(*arrays, **options)
    parts = [loss(*(x[rows] for x in arrays), **options) for rows in (slice(0, 5), slice(5, None))]
    for name, value in whole[1].items():
        a, b = (part[1][name] for part in parts)
        np.testing.assert_allclose(max(a, b) if name.endswith("_max") else a + b, value, rtol=1e-5)
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0], rtol=1e-5)


@pytest.mark.parametrize("case", POLICY_LOSSES)
def test_the_first_step_is_that_of_reinforce(case):
    """At ratio 1 every method's gradient is -w A grad log p; RLOO and GSPO differ in how tokens of a row weigh."""
    loss, options = POLICY_LOSSES[case]
    _, old, advantages, weights = draw()
    grad = jax.grad(lambda p: loss(p, old, advantages, weights, **options)[0])(jnp.asarray(old))
    rows, count = weights.sum(1, keepdims=True), (weights > 0).sum(1, keepdims=True)
    share = {"rloo": rows * (weights > 0), "gspo": rows * (weights > 0) / count}.get(case, weights)
    np.testing.assert_allclose(grad, -share * advantages, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", POLICY_LOSSES)
def test_rows_without_weight_change_nothing_and_give_no_nan(case):
    loss, options = POLICY_LOSSES[case]
    logprobs, old, advantages, weights = draw()
    weights[3] = 0
    before = jax.tree.map(float, loss(logprobs, old, advantages, weights, **options))
    logprobs[3], advantages[3] = -1e4, 1e4
    assert jax.tree.map(float, loss(logprobs, old, advantages, weights, **options)) == before
    grad = jax.grad(lambda p: loss(p, old, advantages, weights, **options)[0])(jnp.asarray(logprobs))
    assert np.isfinite(grad).all() and not np.asarray(grad)[3].any()


def test_the_bound_above_is_that_of_the_low_one_unless_it_is_set():
    def clipped(high, ratio):
        arrays = (jnp.log(jnp.full((1, 1), ratio)), jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)))
        return -float(losses.clipped_policy_loss(*arrays, **SURROGATE | {"clip_ratio_high": high})[0])

    assert clipped(0.0, 2.0) == pytest.approx(1.2) and clipped(0.28, 2.0) == pytest.approx(1.28)
    assert clipped(0.28, 1.25) == pytest.approx(1.25)


def test_the_kl_in_the_loss_pulls_to_the_reference_and_cannot_overflow():
    ref, weights = jnp.full((1, 3), -2.0), jnp.full((1, 3), 1 / 3)
    fun = lambda p: losses.reference_kl_loss(p, ref, weights, max_log_ratio=20.0)[0]  # noqa: E731
    value, grad = jax.value_and_grad(fun)(jnp.array([[-2.0, -1.0, -3.0]]))
    assert float(value) == pytest.approx((np.exp(-1) + np.exp(1) - 2) / 3)
    assert grad[0, 0] == 0 and grad[0, 1] > 0 > grad[0, 2]
    assert np.isfinite(jax.value_and_grad(fun)(jnp.full((1, 3), -1e4))[0])


# ---- advantages


def advantages_of(scores, **options):
    settings = {"group_size": 4, "baseline": "group", "scale_rewards": "none", **options}
    return np.asarray(adv.group_advantages(jnp.asarray(scores, jnp.float32), **settings))


def test_leave_one_out_compares_with_the_mean_of_the_others():
    found = advantages_of([1, 2, 3, 6, 0, 0, 0, 4], baseline="leave_one_out")
    np.testing.assert_allclose(found, [1 - 11 / 3, 2 - 10 / 3, 3 - 3, 6 - 2, -4 / 3, -4 / 3, -4 / 3, 4], atol=1e-6)


def test_group_scores_have_mean_zero_and_standard_deviation_one():
    found = advantages_of([1, 2, 3, 6], scale_rewards="group")
    assert found.mean() == pytest.approx(0, abs=1e-6) and found.std(ddof=1) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_equal_scores_teaches_exactly_nothing(baseline, scale):
    found = advantages_of([0.1] * 4 + [1, 2, 3, 4] + [-1e6 / 3] * 4, baseline=baseline, scale_rewards=scale)
    assert not found[:4].any() and not found[8:].any() and found[4:8].all()
    assert not advantages_of([0.7] * 8, baseline=baseline, scale_rewards=scale).any()


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_row_without_a_score_leaves_its_group_and_the_batch_as_if_it_had_not_been_drawn(baseline, scale):
    """By numpy, of groups of 4, 3, 2, 1 and 0 rows that have a score; the one that has none may be the first."""
    scores = np.random.default_rng(2).normal(3, 2, size=(5, 4))
    scores[1, 2] = scores[2, :2] = scores[3, 1:] = scores[4] = np.nan
    expected = np.full((5, 4), np.nan)
    for row, own in enumerate(scores):
        known = own[~np.isnan(own)]
        others = lambda i, known=known: np.delete(known, i).mean() if len(known) > 1 else known[i]  # noqa: E731
        base = {"group": lambda i, known=known: known.mean(), "leave_one_out": others, "none": lambda i: 0}[baseline]
        std = {"group": known.std(ddof=1) if len(known) > 1 else 0, "batch": np.nanstd(scores, ddof=1), "none": 1}
        scaled = [(x - base(i)) / (std[scale] + (scale != "none") * 1e-4) for i, x in enumerate(known)]
        expected[row, ~np.isnan(own)] = scaled
    found = advantages_of(scores.ravel(), baseline=baseline, scale_rewards=scale)
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [1e-6, 0.3, 7.0, 1e4, -3e7])
def test_scores_that_differ_by_rounding_alone_are_equal(scale, size):
    """Such as 0.1 + 0.2 beside 0.3; what differs by more is not."""
    near = np.float32(size) + np.spacing(np.float32(size)) * np.array([0, 1, -1, 2], np.float32)
    apart = np.float32(size) * np.array([1, 1.001, 0.998, 1], np.float32)
    assert len({*near}) == 4
    found = advantages_of([*near, *apart, np.nan, *near[:3]], scale_rewards=scale)
    assert not found[:4].any() and found[4:8].all() and not found[9:].any()
    assert adv.alike(jnp.array([near, apart, [np.nan] * 4])).tolist() == [True, False, True]
    row = jnp.asarray(near)[None]
    white = adv.whiten(row, row != 0, shift_mean=True, variance="bessel")
    assert not white.any()


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_swapping_rows_inside_a_group_swaps_their_advantages_and_a_group_knows_nothing_of_the_others(baseline, scale):
    rng, scores = np.random.default_rng(0), np.random.default_rng(1).normal(size=12)
    order = np.concatenate([4 * g + rng.permutation(4) for g in (2, 0, 1)])
    of = partial(advantages_of, baseline=baseline, scale_rewards=scale)
    np.testing.assert_allclose(of(scores[order]), of(scores)[order], rtol=1e-4, atol=1e-6)
    if scale != "batch":
        np.testing.assert_allclose(of(scores)[:4], of(scores[:4]), rtol=1e-5)


def test_without_a_baseline_advantages_are_the_scores():
    np.testing.assert_array_equal(advantages_of([1, 2, 3, 4], baseline="none", group_size=1), [1, 2, 3, 4])
