"""Losses: known answers, plain Python references in float64, and gradients against finite differences of those."""

import inspect
import math
from functools import partial

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.tokens import token_weights


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def next_token_reference(logprobs, weights):
    return -sum(w * p for w, p in zip(weights.flat, logprobs.flat, strict=True))


def pairwise_reference(chosen, rejected, weights, margins, labels, *, center_coef):
    total = 0.0
    for a, b, w, m, y in zip(chosen, rejected, weights, margins, labels, strict=True):
        total += w * (y * softplus(-(a - b - m)) + (1 - y) * softplus(-(b - a - m)) + center_coef * (a + b) ** 2)
    return total


def kwise_reference(scores, ranks, mask, weights, *, center_coef):
    total = 0.0
    for row, rank, valid, w in zip(scores, ranks, mask, weights, strict=True):
        order = [(i, j) for i in range(len(row)) for j in range(len(row)) if rank[i] < rank[j]]
        pairs = [(i, j) for i, j in order if valid[i] and valid[j]]
        each = [softplus(row[j] - row[i]) + center_coef * (row[i] + row[j]) ** 2 for i, j in pairs]
        total += w * sum(each) / max(len(pairs), 1)
    return total


def plackett_luce_reference(scores, ranks, mask, weights, *, center_coef):
    total = kwise_reference(scores, ranks, mask, weights, center_coef=center_coef) - kwise_reference(
        scores, ranks, mask, weights, center_coef=0.0
    )
    for row, rank, valid, w in zip(scores, ranks, mask, weights, strict=True):
        left = {i: [j for j in range(len(row)) if valid[j] and rank[j] > rank[i]] for i in range(len(row)) if valid[i]}
        each = [np.log(np.exp(row[[i, *worse]]).sum()) - row[i] for i, worse in left.items() if worse]
        total += w * sum(each) / max(len(each), 1)
    return total


def rrhf_reference(logprobs, lengths, ranks, mask, weights, *, length_penalty):
    total = 0.0
    for sums, n, r, valid, w in zip(logprobs, lengths, ranks, mask, weights, strict=True):
        p = sums / n**length_penalty
        for i in range(len(p)):
            for j in range(len(p)):
                if valid[i] and valid[j] and r[i] > r[j]:
                    total += w * max(0.0, p[i] - p[j])
    return total


def best_of_n_reference(scores, ranks, mask, weights, *, center_coef):
    total = kwise_reference(scores, ranks, mask, weights, center_coef=center_coef) - kwise_reference(
        scores, ranks, mask, weights, center_coef=0.0
    )
    for row, rank, valid, w in zip(scores, ranks, mask, weights, strict=True):
        there = np.flatnonzero(valid)
        best = [i for i in there if rank[i] == min(rank[there])]
        if len(best) < len(there):
            total += w * sum(np.log(np.exp(row[there]).sum()) - row[i] for i in best) / len(best)
    return total


def squared_rating_reference(scores, ratings, weights):
    return sum(w * (s - r) ** 2 for s, r, w in zip(scores, ratings, weights, strict=True))


def ordinal_rating_reference(scores, ratings, weights, *, rating_low, rating_high):
    below = lambda border: 1 / (1 + math.exp(-border))  # noqa: E731
    total = 0.0
    for s, r, w in zip(scores, ratings, weights, strict=True):
        upper = 1.0 if r == rating_high else below(r + 0.5 - s)
        lower = 0.0 if r == rating_low else below(r - 0.5 - s)
        total -= w * math.log(upper - lower)
    return total


def policy_reference(
    logprobs, old_logprobs, advantages, weights, *, clip_ratio, clip_ratio_high, dual_clip, max_log_ratio
):
    total, above = 0.0, clip_ratio_high or clip_ratio
    for p, old, a, w in zip(logprobs.flat, old_logprobs.flat, advantages.flat, weights.flat, strict=True):
        ratio = math.exp(min(max(p - old, -max_log_ratio), max_log_ratio))
        objective = min(ratio * a, min(max(ratio, 1 - clip_ratio), 1 + above) * a)
        if dual_clip and a < 0:
            objective = max(objective, dual_clip * a)
        total -= w * objective
    return total


def value_reference(values, old_values, returns, weights, *, value_clip):
    total = 0.0
    for v, old, target, w in zip(values.flat, old_values.flat, returns.flat, weights.flat, strict=True):
        error = (v - target) ** 2
        if value_clip:
            error = max(error, (min(max(v, old - value_clip), old + value_clip) - target) ** 2)
        total += 0.5 * w * error
    return total


def normal(*shape, seed, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def ragged_weights(rows=6, length=5):
    """Weights with zeros off responses of lengths 5, 3, 0, 4, 1, 5, summing to one."""
    mask = np.arange(length) < np.array([5, 3, 0, 4, 1, 5])[:rows, None]
    return (mask / mask.sum()).astype(np.float32)


ROW_WEIGHTS = np.array([0.1, 0.3, 0.2, 0.05, 0.25, 0.1], np.float32)
LABELS = np.array([1, 1, 0, 0.5, 0.75, 0.25], np.float32)
RANKS = np.array([[1, 2, 3, 4], [1, 1, 2, 2], [2, 2, 2, 2], [4, 1, 3, 2], [1, 2, 3, 3], [2, 1, 1, 1]], np.float32)
PRESENT = np.array([[1] * 4, [1] * 4, [1] * 4, [1, 0, 1, 1], [1, 0, 0, 0], [1, 1, 0, 1]], bool)
POLICY = {
    "logprobs": normal(6, 5, seed=0),
    "old_logprobs": normal(6, 5, seed=1),
    "advantages": normal(6, 5, seed=2),
    "weights": ragged_weights(),
}
PPO = {"clip_ratio": 0.2, "clip_ratio_high": 0.0, "dual_clip": 0.0, "max_log_ratio": 1.5}
VALUE = {
    "values": normal(6, 5, seed=3),
    "old_values": normal(6, 5, seed=4),
    "returns": normal(6, 5, seed=5),
    "weights": ragged_weights(),
}
PAIRS = {
    "chosen": normal(6, seed=6),
    "rejected": normal(6, seed=7),
    "weights": ROW_WEIGHTS,
    "margins": np.abs(normal(6, seed=8)),
    "labels": LABELS,
}
KWISE = {"scores": normal(6, 4, seed=9), "ranks": RANKS, "mask": PRESENT, "weights": ROW_WEIGHTS}
LENGTHS = np.random.default_rng(11).integers(1, 7, (6, 4)).astype(np.float32)
RRHF = {"logprobs": 4 * normal(6, 4, seed=10), "lengths": LENGTHS, "ranks": RANKS, "mask": PRESENT}
RRHF["weights"] = ROW_WEIGHTS
RATED = {"scores": 3 + 2 * normal(6, seed=12), "ratings": np.array([1, 5, 3, 2, 4, 3], np.float32)}
RATED["weights"] = ROW_WEIGHTS
# name: loss, its hyperparameters, reference, arrays, the arrays it is differentiated by
CASES = {
    "next_token": (losses.next_token_loss, {}, next_token_reference, POLICY, ["logprobs"]),
    "pairwise": (losses.pairwise_reward_loss, {"center_coef": 0.1}, pairwise_reference, PAIRS, ["chosen", "rejected"]),
    "kwise": (losses.kwise_reward_loss, {"center_coef": 0.1}, kwise_reference, KWISE, ["scores"]),
    "plackett_luce": (
        losses.plackett_luce_reward_loss,
        {"center_coef": 0.1},
        plackett_luce_reference,
        KWISE,
        ["scores"],
    ),
    "best_of_n": (losses.best_of_n_reward_loss, {"center_coef": 0.1}, best_of_n_reference, KWISE, ["scores"]),
    "squared_rating": (losses.squared_rating_loss, {}, squared_rating_reference, RATED, ["scores"]),
    "ordinal_rating": (
        losses.ordinal_rating_loss,
        {"rating_low": 1.0, "rating_high": 5.0},
        ordinal_rating_reference,
        RATED,
        ["scores"],
    ),
    "rrhf": (losses.rrhf_ranking_loss, {"length_penalty": 0.5}, rrhf_reference, RRHF, ["logprobs"]),
    "policy": (losses.clipped_policy_loss, PPO, policy_reference, POLICY, ["logprobs"]),
    "policy_dual": (losses.clipped_policy_loss, PPO | {"dual_clip": 1.5}, policy_reference, POLICY, ["logprobs"]),
    "policy_high": (
        losses.clipped_policy_loss,
        PPO | {"clip_ratio_high": 0.4},
        policy_reference,
        POLICY,
        ["logprobs"],
    ),
    "value": (losses.clipped_value_loss, {"value_clip": 0.3}, value_reference, VALUE, ["values"]),
    "value_unclipped": (losses.clipped_value_loss, {"value_clip": 0.0}, value_reference, VALUE, ["values"]),
}


def case(name):
    loss, options, reference, arrays, by = CASES[name]
    if name == "next_token":
        arrays = {key: arrays[key] for key in ("logprobs", "weights")}
    return partial(run, loss, tuple(options.items()), tuple(by)), partial(reference, **options), arrays, by


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(loss, options, by, arrays):
    """(loss, metrics, gradients by name)."""

    def of(chosen):
        return loss(**{**arrays, **chosen}, **dict(options))

    (value, metrics), grads = jax.value_and_grad(of, has_aux=True)({name: arrays[name] for name in by})
    return value, metrics, grads


@pytest.mark.parametrize("name", CASES)
def test_loss_equals_its_reference(name):
    loss, reference, arrays, _ = case(name)
    np.testing.assert_allclose(loss(arrays)[0], reference(**arrays), rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_arguments_and_results_are_as_annotated(name):
    loss, options, _, arrays, _ = CASES[name]
    checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)(loss)
    named = {key: x for key, x in arrays.items() if key in inspect.signature(loss).parameters}
    value, _ = jax.eval_shape(partial(checked, **options), **jax.tree.map(jnp.asarray, named))
    assert value.shape == () and value.dtype == jnp.float32


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_finite_differences_of_the_reference(name):
    loss, reference, arrays, by = case(name)
    exact = {key: array.astype(np.float64) if array.dtype == np.float32 else array for key, array in arrays.items()}
    grads = loss(arrays)[2]
    for wanted in by:
        expected = np.zeros(arrays[wanted].shape)
        for index in np.ndindex(expected.shape):
            step = np.zeros(expected.shape)
            step[index] = 1e-5
            ends = [reference(**{**exact, wanted: exact[wanted] + sign * step}) for sign in (1, -1)]
            expected[index] = (ends[0] - ends[1]) / 2e-5
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(grads[wanted], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_losses_promote_no_dtype(name):
    loss, _, arrays, _ = case(name)
    with jax.numpy_dtype_promotion("strict"):
        shapes = jax.eval_shape(loss, arrays)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_metrics_of_microbatches_add_up(name):
    loss, _, arrays, _ = case(name)
    whole = loss(arrays)
    parts = [loss({key: array[rows] for key, array in arrays.items()}) for rows in (slice(0, 3), slice(3, 6))]
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0], rtol=1e-5)
    for metric, value in whole[1].items():
        a, b = (part[1][metric] for part in parts)
        np.testing.assert_allclose(max(a, b) if metric.endswith("_max") else a + b, value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_what_weighs_nothing_changes_nothing(name):
    loss, _, arrays, by = case(name)
    off = arrays["weights"] == 0 if (arrays["weights"] == 0).any() else np.arange(6) == 5
    arrays = {**arrays, "weights": np.where(off, 0, arrays["weights"])}
    junk = {key: arrays[key] + 3.0 * off.reshape(off.shape + (1,) * (arrays[key].ndim - off.ndim)) for key in by}
    before, metrics, _ = loss(arrays)
    after, junk_metrics, grads = loss({**arrays, **junk})
    assert (before, metrics) == (after, junk_metrics)
    for grad in grads.values():
        assert not np.any(grad[off])


def test_token_weights_mean_over_tokens():
    mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    values = jnp.arange(12.0).reshape(3, 4)
    assert jnp.sum(token_weights(mask, "token") * values) == (0 + 1 + 2 + 3 + 4) / 5


def test_sequence_weights_mean_over_rows_of_means_over_tokens():
    mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    values = jnp.arange(12.0).reshape(3, 4)
    assert jnp.sum(token_weights(mask, "sequence") * values) == (1.5 + 4) / 2


def test_fixed_weights_do_not_depend_on_the_lengths():
    mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(token_weights(mask, "fixed"), np.asarray(mask) / 12, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence", "fixed"])
def test_weights_of_an_empty_mask_are_zero(reduction):
    with jax.numpy_dtype_promotion("strict"):
        weights = token_weights(jnp.zeros((2, 3), bool), reduction)
    assert weights.dtype == jnp.float32
    assert not weights.any()


def test_unknown_reduction_is_an_error():
    with pytest.raises(ValueError, match="unknown reduction 'mean'; use token, sequence or fixed"):
        token_weights(jnp.ones((2, 3), bool), "mean")


def pairwise(chosen, rejected, *, margin=0.0, label=1.0, center_coef=0.0):
    """Loss, metrics and gradients by (chosen, rejected) of one pair."""
    arrays = {"chosen": [chosen], "rejected": [rejected], "weights": [1.0], "margins": [margin], "labels": [label]}
    arrays = {key: np.array(value, np.float32) for key, value in arrays.items()}
    options = (("center_coef", center_coef),)
    value, metrics, grads = run(losses.pairwise_reward_loss, options, ("chosen", "rejected"), arrays)
    return float(value), metrics, (float(grads["chosen"][0]), float(grads["rejected"][0]))


def test_pairwise_makes_the_winners_score_rise():
    _, _, (by_chosen, by_rejected) = pairwise(0.3, 0.1)
    assert by_chosen < 0 < by_rejected


def test_pairwise_known_answers():
    assert pairwise(0.7, 0.7)[0] == pytest.approx(math.log(2))
    assert pairwise(2.0, 1.0)[0] == pytest.approx(math.log(1 + math.exp(-1)))
    assert pairwise(2.0, 1.0, margin=1.0)[0] == pytest.approx(math.log(2))
    assert pairwise(2.0, 1.0, label=0.0)[0] == pytest.approx(math.log(1 + math.e))
    assert pairwise(2.0, 1.0, center_coef=0.01)[0] - pairwise(2.0, 1.0)[0] == pytest.approx(0.09, abs=1e-6)


def test_soft_label_of_one_half_has_no_gradient_at_equal_scores():
    assert pairwise(0.4, 0.4, label=0.5)[2] == (0.0, 0.0)
    assert pairwise(0.5, 0.4, label=0.5)[2][0] > 0


def test_swapping_a_pair_and_its_label_changes_nothing():
    assert pairwise(0.9, -0.2, margin=0.3, label=0.8)[0] == pytest.approx(
        pairwise(-0.2, 0.9, margin=0.3, label=0.2)[0], rel=1e-6
    )


@pytest.mark.parametrize("difference", [-1e4, 1e4])
def test_pairwise_is_finite_at_extreme_scores(difference):
    value, _, (by_chosen, by_rejected) = pairwise(difference, 0.0)
    assert value == (1e4 if difference < 0 else 0.0)
    assert (by_chosen, by_rejected) == ((-1.0, 1.0) if difference < 0 else (0.0, 0.0))


def test_pairwise_accuracy_counts_ties_as_half_and_follows_the_label():
    accuracy = [
        float(pairwise(*scores, label=label)[1]["reward_model/accuracy"])
        for scores, label in [((2, 1), 1.0), ((1, 2), 1.0), ((1, 1), 1.0), ((2, 1), 0.2), ((1, 2), 0.2)]
    ]
    assert accuracy == [1.0, 0.0, 0.5, 0.0, 1.0]


def kwise(scores, ranks, mask=None, loss=losses.kwise_reward_loss):
    scores, ranks = np.array([scores], np.float32), np.array([ranks], np.float32)
    mask = np.ones(scores.shape, bool) if mask is None else np.array([mask], bool)
    arrays = {"scores": scores, "ranks": ranks, "mask": mask, "weights": np.ones(1, np.float32)}
    value, metrics, grads = run(loss, (("center_coef", 0.0),), ("scores",), arrays)
    return float(value), metrics, np.asarray(grads["scores"][0])


LISTWISE = pytest.mark.parametrize(
    "loss", [losses.kwise_reward_loss, losses.plackett_luce_reward_loss, losses.best_of_n_reward_loss]
)


@LISTWISE
def test_two_responses_of_a_ranking_are_a_pair(loss):
    for winner, loser in [(0.3, -1.2), (-1.2, 0.3)]:
        value, metrics, grad = kwise([loser, winner], [2, 1], loss=loss)
        expected, pair_metrics, pair_grad = pairwise(winner, loser)
        assert value == pytest.approx(expected, rel=1e-6)
        np.testing.assert_allclose(grad[::-1], pair_grad, rtol=1e-6)
        assert metrics["reward_model/accuracy"] == pair_metrics["reward_model/accuracy"]


def test_kwise_is_the_mean_over_all_pairs():
    scores = [2.0, 1.0, 0.5, -1.0]
    pairs = [math.log1p(math.exp(scores[j] - scores[i])) for i in range(4) for j in range(i + 1, 4)]
    assert len(pairs) == 6
    assert kwise(scores, [1, 2, 3, 4])[0] == pytest.approx(sum(pairs) / 6, rel=1e-6)


@LISTWISE
def test_all_tied_prompt_gives_zero_and_no_gradient(loss):
    value, metrics, grad = kwise([1.0, 2.0, 3.0], [1, 1, 1], loss=loss)
    assert (value, float(metrics["reward_model/accuracy"])) == (0.0, 0.0)
    np.testing.assert_array_equal(grad, 0.0)


@LISTWISE
def test_prompt_of_one_response_gives_zero_and_no_gradient(loss):
    value, _, grad = kwise([1.0, 2.0, 3.0], [1, 2, 3], [0, 1, 0], loss=loss)
    assert value == 0.0
    np.testing.assert_array_equal(grad, 0.0)


@LISTWISE
def test_missing_response_makes_no_pair(loss):
    value, metrics, grad = kwise([2.0, 9.0, 1.0], [1, 3, 2], [1, 0, 1], loss=loss)
    expected, expected_metrics, expected_grad = kwise([2.0, 1.0], [1, 2], loss=loss)
    assert value == pytest.approx(expected)
    assert metrics["reward_model/accuracy"] == expected_metrics["reward_model/accuracy"] == 1.0
    np.testing.assert_allclose(grad[[0, 2]], expected_grad, rtol=1e-6)
    assert grad[1] == 0.0


def test_the_choice_of_one_among_many_is_softmax_cross_entropy():
    scores = np.array([2.0, 1.0, 0.5, -1.0])
    expected = math.log(np.exp(scores).sum()) - 0.5
    assert kwise(scores, [1, 1, 0, 1], loss=losses.best_of_n_reward_loss)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("score", [-1e4, 1e4])
@pytest.mark.parametrize("rating", [1.0, 3.0, 5.0])
def test_ordinal_ratings_are_finite_at_extreme_scores_and_pull_towards_the_rating(score, rating):
    def loss(s):
        one = jnp.ones(1)
        return losses.ordinal_rating_loss(s * one, rating * one, one, rating_low=1.0, rating_high=5.0)[0]

    value, grad = jax.value_and_grad(loss)(score)
    far = not (rating == 1 and score < 0) and not (rating == 5 and score > 0)
    assert np.isfinite(value) and grad == (np.sign(score) if far else 0.0)


def rrhf(logprobs, rewards, mask=(1, 1, 1), lengths=(1, 1, 1), length_penalty=1.0):
    arrays = {"logprobs": [logprobs], "ranks": -np.array([rewards]), "lengths": [lengths]}
    arrays = {name: np.array(value, np.float32) for name, value in arrays.items()}
    arrays |= {"mask": np.array([mask], bool), "weights": np.ones(1, np.float32)}
    return float(run(losses.rrhf_ranking_loss, (("length_penalty", length_penalty),), ("logprobs",), arrays)[0])


def test_rrhf_known_answers():
    assert rrhf([-1, -2, -3], [0, 1, 2]) == 4.0
    assert rrhf([-1, -2, -3], [2, 1, 0]) == 0.0
    assert rrhf([-1, -2, -3], [1, 1, 1]) == 0.0
    assert rrhf([-1, -2, -3], [0, 1, 2], (1, 0, 1)) == 2.0
    assert rrhf([-4, -8, -27], [0, 1, 2], lengths=(4, 4, 9)) == 1 + 2 + 1
    assert rrhf([-4, -8, -27], [0, 1, 2], lengths=(4, 4, 9), length_penalty=0.5) == 2 + 7 + 5
    assert rrhf([-4, -8, -27], [0, 1, 2], lengths=(4, 4, 9), length_penalty=0.0) == 4 + 23 + 19


def policy(log_ratio, advantage, **options):
    """Loss, metrics and gradient by the log-prob of one token with old log-prob -1."""
    arrays = {"logprobs": log_ratio - 1, "old_logprobs": -1.0, "advantages": advantage, "weights": 1.0}
    arrays = {key: np.full((1, 1), value, np.float32) for key, value in arrays.items()}
    options = tuple((PPO | options).items())
    value, metrics, grads = run(losses.clipped_policy_loss, options, ("logprobs",), arrays)
    return float(value), {key: float(metric) for key, metric in metrics.items()}, float(grads["logprobs"][0, 0])


def test_on_policy_gradient_is_reinforce():
    arrays = {**POLICY, "old_logprobs": POLICY["logprobs"]}
    value, metrics, grads = case("policy")[0](arrays)
    np.testing.assert_allclose(value, -np.sum(arrays["weights"] * arrays["advantages"]), rtol=1e-5)
    np.testing.assert_allclose(grads["logprobs"], -arrays["weights"] * arrays["advantages"], rtol=1e-6)
    assert metrics["policy/approx_kl"] == 0
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/ratio_max"] == 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the clip
        (1.5, 2.0, -2.4, 0.0),  # too far up already: no gradient
        (0.5, 2.0, -1.0, -1.0),  # too far down: pulled back
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_clip_known_answers(ratio, advantage, loss, grad):
    value, metrics, by_logprob = policy(math.log(ratio), advantage)
    assert (value, by_logprob) == (pytest.approx(loss, rel=1e-5), pytest.approx(grad, rel=1e-5))
    assert metrics["policy/clip_fraction"] == float(abs(ratio - 1) > 0.2)
    assert metrics["policy/ratio"] == pytest.approx(ratio, rel=1e-5)
    assert metrics["policy/approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-4)


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    assert policy(1.4, -2.0, dual_clip=3.0)[::2] == (6.0, 0.0)
    assert policy(0.5, -2.0, dual_clip=3.0)[::2] == policy(0.5, -2.0)[::2]


def test_dual_clip_leaves_positive_advantages_alone():
    assert policy(1.4, 2.0, dual_clip=3.0) == policy(1.4, 2.0)
    assert policy(-1.4, 2.0, dual_clip=3.0) == policy(-1.4, 2.0)


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("log_ratio", [-1e4, 1e4, -math.inf, math.inf])
def test_stale_log_probs_stay_finite(log_ratio, advantage):
    value, metrics, grad = policy(log_ratio, advantage, max_log_ratio=20.0)
    assert np.isfinite([value, grad, *metrics.values()]).all()
    assert grad == 0.0


def test_approx_kl_is_never_negative():
    """exp(d) - 1 - d in float32 would round to -6e-8 here."""
    differences = np.linspace(-1e-2, 1e-2, 2001, dtype=np.float32)[:, None, None]
    kl = jax.vmap(lambda d: losses.clipped_policy_loss(d, 0 * d, d, d * 0 + 1, **PPO)[1]["policy/approx_kl"])
    assert jax.jit(kl)(differences).min() >= 0


def test_ratio_max_is_of_weighted_tokens_only():
    arrays = {**POLICY, "weights": ragged_weights() * (np.arange(6)[:, None] == 3)}
    ratio = np.exp((arrays["logprobs"] - arrays["old_logprobs"]).clip(-1.5, 1.5))
    metrics = case("policy")[0](arrays)[1]
    np.testing.assert_allclose(metrics["policy/ratio_max"], ratio[3, :4].max(), rtol=1e-6)
    assert ratio.max() > metrics["policy/ratio_max"]


def value(v, old, target, clip):
    arrays = {"values": v, "old_values": old, "returns": target, "weights": 1.0}
    arrays = {key: np.full((1, 1), x, np.float32) for key, x in arrays.items()}
    loss, metrics, _ = run(losses.clipped_value_loss, (("value_clip", clip),), ("values",), arrays)
    return float(loss), float(metrics["value/clip_fraction"])


def test_value_loss_known_answers():
    assert value(1.0, 0.0, 2.0, 0.2) == (pytest.approx(0.5 * 1.8**2), 1.0)  # moved up by .2 only, as the loss sees it
    assert value(1.0, 0.0, -1.0, 0.2) == (pytest.approx(0.5 * 2**2), 0.0)  # wrong way: the clip does not hide it
    assert value(0.1, 0.0, 2.0, 0.2) == (pytest.approx(0.5 * 1.9**2), 0.0)


@pytest.mark.parametrize("value", [1.0, -300.0, 1e7])
def test_values_that_have_not_moved_are_within_a_clip_that_float32_cannot_add_to_them(value):
    """At the bounds half of the gradient was lost, and where both losses were equal half of the rest."""
    values = jnp.array([value], jnp.float32)
    of = lambda clip: jax.grad(lambda v: losses.clipped_value_loss(v, values, values + 4, one, value_clip=clip)[0])  # noqa: E731
    one = jnp.ones(1)
    np.testing.assert_array_equal(of(1e-9)(values), of(0.0)(values))


def test_value_clip_zero_is_off():
    assert value(1.0, 0.0, 2.0, 0.0) == (0.5, 0.0)


def test_next_token_loss_is_the_weighted_nll():
    loss, metrics = losses.next_token_loss(jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[0.5, 0.5, 0.0]]))
    assert loss == metrics["loss/nll"] == 1.5
