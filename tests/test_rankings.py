"""Bradley-Terry strengths: known answers, a slow and sure reference, and what a prior is for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rankings import bradley_terry

fit = jax.jit(bradley_terry, static_argnames=("prior", "num_steps"))


def creep(wins, prior, num_steps=20_000):
    """The slow and sure way: Hunter's (2004) minorise-maximise iteration, in float64."""
    games, gamma = wins + wins.T, np.ones(len(wins))
    for _ in range(num_steps):
        expected = (games / (gamma[:, None] + gamma[None, :])).sum(1) + 2 * prior / (gamma + 1)
        gamma = (wins.sum(1) + prior) / expected
    return np.log(gamma) - np.log(gamma).mean()


def tournament(seed=0, items=6, games=200):
    """Strengths and the wins of noisy comparisons."""
    rng = np.random.default_rng(seed)
    strengths = rng.normal(size=items)
    wins = np.zeros((items, items))
    for i in range(items):
        for j in range(i):
            wins[i, j] = rng.binomial(games, 1 / (1 + np.exp(strengths[j] - strengths[i])))
            wins[j, i] = games - wins[i, j]
    return strengths - strengths.mean(), wins.astype(np.float32)


def test_three_wins_to_one_is_a_difference_of_ln_3():
    strengths = fit(np.array([[0, 3], [1, 0]], np.float32), prior=0.0)
    np.testing.assert_allclose(strengths, [np.log(3) / 2, -np.log(3) / 2], rtol=1e-5)


def test_cycle_leaves_all_equal():
    strengths = fit(np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]], np.float32), prior=0.0)
    np.testing.assert_allclose(strengths, 0, atol=1e-6)


def test_noisy_comparisons_recover_the_strengths():
    strengths, wins = tournament()
    found = fit(wins, prior=0.1)
    np.testing.assert_array_equal(np.argsort(found), np.argsort(strengths))
    np.testing.assert_allclose(found, strengths, atol=0.25)


def test_fit_is_the_maximum_of_the_likelihood():
    _, wins = tournament(seed=1, games=7)
    wins[0, 1:], wins[1:, 0] = [7, 0, 6, 7, 5], [0, 0, 1, 0, 2]  # items 0 and 2 never met
    for prior in (0.0, 0.5):
        np.testing.assert_allclose(fit(wins, prior=prior), creep(wins.astype(np.float64), prior), atol=1e-4)


@pytest.mark.parametrize("prior", [0.1, 1.0])
def test_prior_keeps_an_undefeated_item_finite(prior):
    wins = np.array([[0, 5, 5], [0, 0, 3], [0, 1, 0]], np.float32)
    strengths = np.asarray(fit(wins, prior=prior))
    assert np.isfinite(strengths).all()
    assert strengths[0] > strengths[1] > strengths[2]
    np.testing.assert_allclose(strengths, creep(wins.astype(np.float64), prior), atol=1e-4)


def test_item_without_a_comparison_stays_at_the_priors_strength():
    wins = np.array([[0, 3, 0], [3, 0, 0], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(fit(wins, prior=0.5), 0, atol=1e-5)


def test_strengths_promote_no_dtype():
    with jax.numpy_dtype_promotion("strict"):
        shape = jax.eval_shape(partial(bradley_terry, prior=0.1), jnp.zeros((3, 3)))
    assert (shape.shape, shape.dtype) == ((3,), jnp.float32)
