"""Scores to advantages: known answers, numpy definitions, and the invariances that PPO relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import advantages as adv

RNG = np.random.default_rng(0)
LENGTHS = np.array([6, 1, 4, 0, 6, 3, 2, 5])
MASK = np.arange(6) < LENGTHS[:, None]
X = RNG.standard_normal((8, 6)).astype(np.float32) * 3 + 1
NINE = np.array([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], np.float32)

gae = jax.jit(adv.gae, static_argnames=("discount", "gae_lambda"))
whiten = jax.jit(adv.whiten, static_argnames=("shift_mean", "variance"))
explained_variance = jax.jit(adv.explained_variance)


def test_k1_and_k3_of_identical_weights_are_exactly_zero():
    logprobs = jnp.asarray(-np.abs(X) * 10)
    assert not adv.kl_k1(logprobs, logprobs).any()
    assert not adv.kl_k3(logprobs, logprobs).any()


def test_k3_is_never_negative():
    """exp(d) - 1 - d in float32 rounds below zero for a quarter of these."""
    d = RNG.standard_normal(100_000) * 10.0 ** RNG.uniform(-8, 0.5, 100_000)
    assert jax.jit(adv.kl_k3)(jnp.zeros(d.shape), jnp.asarray(d, jnp.float32)).min() >= 0


@pytest.mark.parametrize("estimator", [adv.kl_k1, adv.kl_k3])
def test_kl_estimators_are_unbiased(estimator):
    p, q = RNG.dirichlet(np.ones(7)), RNG.dirichlet(np.ones(7))
    log_p, log_q = (jnp.asarray(np.log(x), jnp.float32) for x in (p, q))
    np.testing.assert_allclose(np.sum(p * estimator(log_p, log_q)), np.sum(p * np.log(p / q)), rtol=1e-5)


def test_score_is_paid_at_its_slot_and_the_kl_everywhere():
    kl = jnp.array([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]])
    rewards = adv.shaped_rewards(jnp.array([2.0, -1.0]), kl, jnp.array([2, 0]), 0.5)
    np.testing.assert_allclose(rewards, [[-0.05, -0.1, 2 - 0.15], [-1.2, 0, 0]], rtol=1e-6)


def test_score_of_seven_tenths_is_not_rounded_to_a_token_id():
    """The reward row was created with the dtype of the token ids, so 0.7 became 0."""
    slots = jnp.array([1, 2], jnp.int32)
    scores = jnp.array([0.7, -0.3])
    scores = adv.missing_eos_penalty(scores, jnp.array([True, False]), missing_eos="subtract", missing_eos_value=0.5)
    rewards = adv.shaped_rewards(scores, jnp.zeros((2, 4)), slots, 0.05)
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, [[0, 0.7, 0, 0], [0, 0, -0.8, 0]], rtol=1e-6)


def test_scores_of_integer_dtype_are_refused_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"), pytest.raises(ValueError, match="no available implicit dtype promotion"):
        adv.shaped_rewards(jnp.array([1]), jnp.zeros((1, 2)), jnp.array([1]), 0.1)


@pytest.mark.parametrize(
    ("mode", "expected"), [("off", [0.7, -0.2]), ("replace", [0.7, -1.5]), ("subtract", [0.7, -0.2 + 1.5])]
)
def test_missing_eos_penalty(mode, expected):
    scores = adv.missing_eos_penalty(
        jnp.array([0.7, -0.2]), jnp.array([True, False]), missing_eos=mode, missing_eos_value=-1.5
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("rewards", "values", "expected"),
    [
        ([0, 0, 1, 0, 0], [0.1, 0.2, 0.3, 0, 0], [0.82675, 0.765, 0.7, 0, 0]),
        ([0, 0, 0, 1, 0], [0.1, 0.2, 0.3, 0.4, 0], [0.799675, 0.7365, 0.67, 0.6, 0]),  # score one slot after EOS
    ],
)
def test_gae_known_answers(rewards, values, expected):
    rewards, values = (jnp.array([x], jnp.float32) for x in (rewards, values))
    np.testing.assert_allclose(gae(rewards, values, discount=1.0, gae_lambda=0.95), [expected], rtol=1e-5)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_equals_its_definition(discount, gae_lambda):
    """A_t = sum over u >= t of (gamma lambda)^(u - t) (r_u + gamma V_{u+1} - V_u), in O(T^2)."""
    rewards, values = X, X[::-1] * 0.7
    expected = np.zeros(X.shape)
    for b, t in np.ndindex(X.shape):
        for u in range(t, X.shape[1]):
            following = values[b, u + 1] if u + 1 < X.shape[1] else 0.0
            expected[b, t] += (discount * gae_lambda) ** (u - t) * (
                rewards[b, u] + discount * following - values[b, u]
            )
    found = gae(rewards, values, discount=discount, gae_lambda=gae_lambda)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_padding_after_the_response_changes_no_advantage():
    alone = gae(X, X * 0.5, discount=0.9, gae_lambda=0.8)
    padded = gae(*(np.pad(x, ((0, 0), (0, 5))) for x in (X, X * 0.5)), discount=0.9, gae_lambda=0.8)
    np.testing.assert_array_equal(padded[:, :6], alone)
    np.testing.assert_array_equal(padded[:, 6:], 0)


@pytest.mark.parametrize(
    ("variance", "expected"),
    [
        ("biased", [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]),
        ("bessel", [[0.1394, 0.5046, 0.8697], [1.2349, 1.6, 1.9652], [2.3303, 2.6954, 3.0606]]),
    ],
)
def test_whitening_known_answers(variance, expected):
    white = whiten(NINE, np.ones((3, 3), bool), shift_mean=False, variance=variance)
    np.testing.assert_allclose(white, expected, atol=6e-5)
    centred = whiten(NINE, np.ones((3, 3), bool), shift_mean=True, variance=variance)
    np.testing.assert_allclose(centred, np.array(expected) - 1.6, atol=6e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize(("variance", "ddof"), [("biased", 0), ("bessel", 1)])
def test_whitening_sees_the_valid_entries_only(shift_mean, variance, ddof):
    valid = X[MASK].astype(np.float64)
    expected = np.zeros(X.shape)
    expected[MASK] = (valid - valid.mean()) / np.sqrt(valid.var(ddof=ddof) + 1e-8)
    expected[MASK] += 0 if shift_mean else valid.mean()
    junk = np.where(MASK, X, np.float32(np.nan))
    white = whiten(junk, MASK, shift_mean=shift_mean, variance=variance)
    np.testing.assert_allclose(white, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variance", ["biased", "bessel"])
@pytest.mark.parametrize("valid", [0, 1, 3])
def test_whitening_what_does_not_vary_is_finite(variance, valid):
    white = whiten(np.ones((1, 3), np.float32), np.arange(3)[None] < valid, shift_mean=True, variance=variance)
    np.testing.assert_array_equal(white, 0)


@pytest.mark.parametrize("value", [0.1, -1.7, 100.3, 1000.7, 12345.6, 1e6 + 0.5])
def test_equal_values_have_nothing_to_whiten_or_explain_whatever_their_size(value):
    """The mean of equal floats may be a bit off, and what is left of them was scaled up to a variance of 1."""
    equal, mask = np.full((64, 37), value, np.float32), RNG.random((64, 37)) < 0.7
    np.testing.assert_array_equal(whiten(equal, mask, shift_mean=True, variance="biased"), 0)
    np.testing.assert_array_equal(whiten(equal, mask, shift_mean=False, variance="bessel"), np.where(mask, equal, 0))
    assert explained_variance(RNG.normal(size=(64, 37)).astype(np.float32), equal, mask) == 0
    rounded = equal + (RNG.integers(-1, 2, equal.shape) * np.spacing(equal)).astype(np.float32)
    assert explained_variance(RNG.normal(size=(64, 37)).astype(np.float32), rounded, mask) == 0


@pytest.mark.parametrize("offset", [0.0, 1e3, -3e4, 1e6])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_a_large_offset_costs_what_float32_rounds_off_the_values_and_no_more(offset, spread):
    x = (offset + spread * RNG.normal(size=(64, 8))).astype(np.float32)
    exact = x.astype(np.float64)
    alike = np.ptp(exact) <= 4 * np.finfo(np.float32).eps * abs(exact).max()  # rounding alone is no difference
    white = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-8) * (not alike)
    got = whiten(x, np.ones(x.shape, bool), shift_mean=True, variance="biased")
    last_bit = np.spacing(np.float32(abs(offset))) / np.sqrt(exact.var() + 1e-8)  # of the mean
    np.testing.assert_allclose(got, white, atol=1e-5 + last_bit / 2)
    apart = np.ptp(exact, axis=1, keepdims=True) > 4 * np.finfo(np.float32).eps * abs(exact).max(axis=1, keepdims=True)
    centred = (exact - exact.mean(axis=1, keepdims=True)) * apart
    for scale, std in ("group", exact.std(axis=1, ddof=1, keepdims=True)), ("batch", exact.std(ddof=1)):
        options = {"group_size": 8, "baseline": "group", "scale_rewards": scale}
        got = adv.group_advantages(jnp.asarray(x.reshape(-1)), **options)
        np.testing.assert_allclose(got, (centred / (std + 1e-4)).reshape(-1), atol=1e-5, rtol=1e-5)


def test_whitening_is_over_the_whole_batch_not_per_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, mask = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (X, MASK))
    sharded = whiten(x, mask, shift_mean=True, variance="biased")
    np.testing.assert_allclose(sharded, whiten(X, MASK, shift_mean=True, variance="biased"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kl", "expected"), [(12.0, 0.151536), (3.0, 0.148464), (6.6, 0.150768), (6.0, 0.15), (1e9, 0.151536)]
)
def test_adaptive_kl_known_answers(kl, expected):
    found = adv.adaptive_kl_coef(jnp.float32(0.15), jnp.float32(kl), 512, kl_target=6.0, kl_horizon=1e4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_best_of_n_kl_known_answers():
    found = adv.best_of_n_kl(jnp.array([1, 2, 4, 16, 64, 256]))
    np.testing.assert_allclose(found, [0, 0.1931, 0.6363, 1.8351, 3.1745, 4.5491], atol=6e-5)


def test_explained_variance_is_one_of_perfect_and_zero_of_constant_values():
    assert explained_variance(X, X, MASK) == 1
    np.testing.assert_allclose(explained_variance(np.full_like(X, 0.3), X, MASK), 0, atol=1e-6)


def test_explained_variance_equals_numpy_on_the_valid_entries():
    values = np.where(MASK, X * 0.6 + 0.2 * X[::-1], np.float32(np.nan))
    expected = 1 - (X - values)[MASK].var() / X[MASK].var()
    np.testing.assert_allclose(explained_variance(values, np.where(MASK, X, np.nan), MASK), expected, rtol=1e-5)


def test_explained_variance_of_returns_that_do_not_vary_is_zero():
    assert explained_variance(X, np.ones_like(X), MASK) == 0
    assert explained_variance(X, X, np.zeros_like(MASK)) == 0


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, row, mask: adv.kl_k3(x, x) + adv.kl_k1(x, x),
        lambda x, row, mask: adv.shaped_rewards(row, x, jnp.sum(mask, 1, dtype=jnp.int32) - 1, 0.1),
        lambda x, row, mask: adv.shaped_rewards(row, x, jnp.sum(mask, 1, dtype=jnp.int32) - 1, jnp.float32(0.1)),
        lambda x, row, mask: adv.missing_eos_penalty(row, mask[:, 0], missing_eos="replace", missing_eos_value=-1.0),
        lambda x, row, mask: adv.missing_eos_penalty(row, mask[:, 0], missing_eos="subtract", missing_eos_value=1.0),
        lambda x, row, mask: adv.gae(x, x, discount=0.9, gae_lambda=0.8),
        lambda x, row, mask: adv.whiten(x, mask, shift_mean=False, variance="bessel"),
        lambda x, row, mask: adv.adaptive_kl_coef(row[0], row[1], 512, kl_target=6.0, kl_horizon=1e4),
        lambda x, row, mask: adv.explained_variance(x, x, mask),
        lambda x, row, mask: adv.best_of_n_kl(jnp.arange(1, 4)),
    ],
)
def test_advantages_promote_no_dtype(fn):
    shapes = (jax.ShapeDtypeStruct(s, d) for s, d in [((8, 6), "float32"), ((8,), "float32"), ((8, 6), "bool")])
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(fn, *shapes).dtype == jnp.float32
