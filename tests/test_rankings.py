"""Strengths from comparisons: closed forms, slow references, brute-force optimisation, odd raters and odd graphs."""

import itertools
import warnings

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import spearmanr

from rlhf_jax.data import consensus, rankings
from rlhf_jax.data.agreement import agreement, elo
from rlhf_jax.data.consensus import aggregate, best_of_n, bootstrap_intervals, consensus_ranks, soft_labels
from rlhf_jax.data.rankings import bradley_terry, comparisons, components, crowd_bradley_terry, plackett_luce

NAN = float("nan")


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def creep(wins, prior, num_steps=20_000):
    """The slow and sure way: Hunter's (2004) minorise-maximise iteration."""
    games, gamma = wins + wins.T, np.ones(len(wins))
    for _ in range(num_steps):
        expected = (games / (gamma[:, None] + gamma[None, :])).sum(1) + 2 * prior / (gamma + 1)
        gamma = (wins.sum(1) + prior) / expected
    return np.log(gamma) - np.log(gamma).mean()


def best(objective, size):
    """The minimum of a plain function by scipy, first entry onwards; the reference for every likelihood."""
    found = minimize(objective, np.zeros(size), method="BFGS", options={"gtol": 1e-9})
    return found.x


def tournament(seed=0, items=6, games=200):
    """Strengths and the wins of noisy comparisons."""
    rng = np.random.default_rng(seed)
    strengths = rng.normal(size=items)
    wins = np.zeros((items, items))
    for i in range(items):
        for j in range(i):
            wins[i, j] = rng.binomial(games, 1 / (1 + np.exp(strengths[j] - strengths[i])))
            wins[j, i] = games - wins[i, j]
    return strengths - strengths.mean(), wins


# --- Bradley-Terry


def test_three_wins_to_one_is_a_difference_of_ln_3():
    strengths = bradley_terry(np.array([[0, 3], [1, 0]]), prior=0.0)
    np.testing.assert_allclose(strengths, [np.log(3) / 2, -np.log(3) / 2], rtol=1e-6)


def test_cycle_leaves_all_equal():
    strengths = bradley_terry(np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]]), prior=0.0)
    np.testing.assert_allclose(strengths, 0, atol=1e-6)


def test_noisy_comparisons_recover_the_strengths():
    strengths, wins = tournament()
    found = bradley_terry(wins, prior=0.1)
    np.testing.assert_array_equal(np.argsort(found), np.argsort(strengths))
    np.testing.assert_allclose(found, strengths, atol=0.25)


def test_fit_is_the_maximum_of_the_likelihood():
    _, wins = tournament(seed=1, games=7)
    wins[0, 1:], wins[1:, 0] = [7, 0, 6, 7, 5], [0, 0, 1, 0, 2]  # items 0 and 2 never met
    for prior in (0.0, 0.5):
        np.testing.assert_allclose(bradley_terry(wins, prior=prior), creep(wins, prior), atol=1e-5)


@pytest.mark.parametrize("prior", [0.1, 1.0])
def test_prior_keeps_an_undefeated_item_finite(prior):
    wins = np.array([[0, 5, 5], [0, 0, 3], [0, 1, 0]])
    strengths = bradley_terry(wins, prior=prior)
    assert strengths[0] > strengths[1] > strengths[2]
    np.testing.assert_allclose(strengths, creep(wins, prior), atol=1e-6)


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_items_without_games_are_no_nan(prior):
    wins = np.array([[0, 3, 0], [3, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(bradley_terry(wins, prior=prior), 0, atol=1e-9)
    np.testing.assert_array_equal(bradley_terry(np.zeros((4, 4)), prior=prior), 0)


def test_groups_are_fitted_as_each_alone():
    groups = [tournament(seed, items=4, games=5)[1] for seed in range(3)]
    groups[1][3] = groups[1][:, 3] = 0  # a group of three in four places
    items = np.array([[True] * 4, [True] * 3 + [False], [True] * 4])
    together = bradley_terry(np.stack(groups), prior=0.3, items=items)
    np.testing.assert_allclose(together[0], bradley_terry(groups[0], prior=0.3), atol=1e-8)
    np.testing.assert_allclose(together[1, :3], bradley_terry(groups[1][:3, :3], prior=0.3), atol=1e-8)
    assert together[1, 3] == 0


def test_a_tie_is_half_a_win_of_each():
    c = comparisons([(0, 0, [0, 0, 1])], num_raters=1)
    np.testing.assert_array_equal(c.wins(np.ones(3), c.shares)[0], [[0, 0.5, 1], [0.5, 0, 1], [0, 0, 0]])


# --- Plackett-Luce


def plackett_luce_reference(ballots, size, prior):
    """Brute force: the mean log-likelihood over every order that a ballot with ties allows."""

    def one(strengths, order):
        return sum(strengths[i] - np.log(np.exp(strengths[order[n:]]).sum()) for n, i in enumerate(order))

    def objective(strengths):
        total = prior * (log_sigmoid(strengths) + log_sigmoid(-strengths)).sum()
        for ranks in ballots:
            tiers = [[i for i in range(size) if ranks[i] == r] for r in sorted({r for r in ranks if r == r})]
            orders = itertools.product(*[itertools.permutations(tier) for tier in tiers])
            total += np.mean([one(strengths, [i for tier in order for i in tier]) for order in orders])
        return -total

    found = best(objective, size)
    return found - found.mean()


@pytest.mark.parametrize("prior", [0.2, 1.0])
def test_plackett_luce_is_the_maximum_of_the_likelihood_with_ties_and_gaps(prior):
    ballots = [[0, 1, 2, 3], [1, 0, 0, 2], [0, 0, 0, 1], [0, NAN, 1, NAN], [2, 1, 1, 0], [0, 0, 0, 0]]
    wanted = plackett_luce_reference(ballots, 4, prior)
    np.testing.assert_allclose(plackett_luce(ballots, prior=prior), wanted, atol=1e-5)


def test_plackett_luce_on_pairs_is_bradley_terry():
    ballots = [[0, 1, NAN], [0, 1, NAN], [1, 0, NAN], [NAN, 0, 1], [1, NAN, 0], [0, NAN, 0]]
    c = comparisons([(0, 0, b) for b in ballots], num_raters=1)
    wanted = bradley_terry(c.wins(np.ones(6), c.shares)[0], prior=0.4)
    np.testing.assert_allclose(plackett_luce(ballots, prior=0.4), wanted, atol=1e-8)


def test_plackett_luce_closed_form_of_the_favourite():
    """With rankings of three where only the winner matters, exp(s) is proportional to how often an item wins."""
    ballots = [[0, 1, 1]] * 5 + [[1, 0, 1]] * 3 + [[1, 1, 0]] * 2
    found = plackett_luce_reference(ballots, 3, 0.0)
    np.testing.assert_allclose(plackett_luce(ballots, prior=0.0), found, atol=1e-5)
    assert list(consensus_ranks(found)) == [0, 1, 2]
    with pytest.raises(ValueError, match="a tie of 13 items"):
        plackett_luce([[0] * 13], prior=1.0)


# --- Crowd-BT


def crowd(seed, *, items=12, raters=20, verdicts=80, skills=None):
    """Ballots of two items each by raters of given reliability; sharp strengths, so that skill is what errs."""
    rng = np.random.default_rng(seed)
    strengths = rng.permutation(np.linspace(-3, 3, items))
    skills = rng.uniform(0.65, 0.95, raters) if skills is None else np.asarray(skills)
    ballots = []
    for rater, skill in enumerate(skills):
        for _ in range(verdicts):
            i, j = rng.choice(items, 2, replace=False)
            honest = rng.random() < skill
            wins = rng.random() < 1 / (1 + np.exp(strengths[j] - strengths[i]))
            ranks = np.full(items, NAN)
            ranks[i], ranks[j] = (0, 1) if wins == honest else (1, 0)
            ballots.append((0, rater, ranks))
    return strengths, skills, ballots


@pytest.mark.parametrize("seed", range(4))
def test_twenty_noisy_raters_recover_the_strengths(seed):
    strengths, skills, ballots = crowd(seed)
    for method in ("bradley_terry", "crowd_bt"):
        found = aggregate(ballots, num_raters=20, method=method, prior=0.1)
        assert spearmanr(found.strengths[0], strengths).statistic > 0.95, method
    assert spearmanr(found.reliability, skills).statistic > 0.5


def test_an_adversary_a_coin_and_a_rater_with_one_vote():
    strengths, _, ballots = crowd(0, raters=8, skills=[0.9] * 6 + [0.05, 0.5])
    ranks = np.full(12, NAN)
    ranks[[0, 1]] = [0, 1]
    found = aggregate([*ballots, (0, 8, ranks)], num_raters=9, method="crowd_bt", prior=0.1)
    honest, adversary, coin, single = np.split(found.reliability, [6, 7, 8])
    assert honest.min() > 0.75
    assert adversary < 0.3
    assert 0.3 < coin < 0.7
    assert 0.8 < single < 0.95  # near 9 / 10, where all start
    assert found.facts["raters with one ballot"] == 1
    plain = aggregate(ballots, num_raters=8, method="bradley_terry", prior=0.1)
    error = [np.abs(f.strengths[0] - strengths).mean() for f in (found, plain)]
    assert error[0] < error[1]


def test_crowd_is_the_maximum_of_its_posterior():
    _, _, ballots = crowd(3, items=4, raters=3, verdicts=12, skills=[0.9, 0.7, 0.2])
    ballots.append((0, 1, [0, 0, 1, NAN]))  # a tie too
    c = comparisons(ballots, num_raters=3)

    def objective(x):
        strengths, e = x[:4], 1 / (1 + np.exp(-x[4:]))
        d = strengths[c.first] - strengths[c.second]
        e_of, p = e[c.raters], np.exp(log_sigmoid(d))
        said = [np.log(e_of * p + (1 - e_of) * (1 - p)), np.log(e_of * (1 - p) + (1 - e_of) * p)]
        prior = 0.5 * (log_sigmoid(strengths) + log_sigmoid(-strengths)).sum() + (4 * np.log(e) + np.log(1 - e)).sum()
        return -(c.shares * said[0] + (1 - c.shares) * said[1]).sum() - prior

    strengths, reliability = crowd_bradley_terry(c, prior=0.5, agreed=4.0, disagreed=1.0, num_steps=5000)
    x = best(objective, 7)
    np.testing.assert_allclose(reliability, 1 / (1 + np.exp(-x[4:])), atol=1e-4)
    np.testing.assert_allclose(strengths[0], x[:4] - x[:4].mean(), atol=1e-3)


# --- what comes out


def test_soft_labels_and_ranks_of_known_strengths():
    strengths = np.array([np.log(3), 0.0, 0.0, -1.0])
    labels = soft_labels(strengths)
    assert labels[0, 1] == pytest.approx(0.75)
    np.testing.assert_allclose(labels + labels.T, 1)
    assert consensus_ranks(strengths).tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(elo(np.array([np.log(10), 0.0])), [1400, 1000])


def test_bootstrap_intervals_hold_the_truth_about_as_often_as_they_say():
    held = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ballots = [(0, 0, [0, 1] if rng.random() < 0.7 else [1, 0]) for _ in range(60)]
        given = {"num_raters": 1, "method": "bradley_terry", "prior": 0.01}
        lower, upper = bootstrap_intervals(ballots, **given, num_samples=200, level=0.9, seed=seed)
        held.append(lower[0, 0] <= np.log(0.7 / 0.3) / 2 <= upper[0, 0])
    assert 0.75 < np.mean(held) < 1


@pytest.mark.parametrize("method", ["bradley_terry", "plackett_luce", "crowd_bt"])
def test_bootstrap_intervals_are_of_the_strengths_that_aggregate_gives(method):
    rng = np.random.default_rng(0)
    ballots = [(0, i % 3, np.argsort(-np.array([0, 1, 2, 3]) + rng.gumbel(size=4)).argsort()) for i in range(60)]
    found = aggregate(ballots, num_raters=3, method=method, prior=0.5).strengths
    given = {"num_raters": 3, "method": method, "prior": 0.5}
    lower, upper = bootstrap_intervals(ballots, **given, num_samples=60, level=0.95, seed=0)
    assert ((lower < found) & (found < upper)).all()
    twice = aggregate(ballots + ballots[:5], num_raters=3, method=method, prior=0.5)
    times = np.ones(60)
    times[:5] = 2
    again, _ = consensus._fit(ballots, comparisons(ballots, num_raters=3), times, method, 0.5, None)
    np.testing.assert_allclose(again, twice.strengths, atol=1e-5)


@pytest.mark.parametrize("method", ["bradley_terry", "plackett_luce", "crowd_bt"])
@pytest.mark.parametrize("others", [0, 20])
def test_intervals_of_a_small_group_do_not_depend_on_how_many_groups_there_are(method, others):
    """Its two raters agree, so that no draw of its ballots makes its items equal."""
    ballots = [(0, 0, [0, 1]), (0, 1, [0, 1])] + [(g, g % 2, [1, 0]) for g in range(1, others + 1)]
    given = {"num_raters": 2, "method": method, "prior": 0.5}
    lower, upper = bootstrap_intervals(ballots, **given, num_samples=40, level=0.99, seed=0)
    assert lower[0, 0] > 0.3 and upper[0, 1] < -0.3


@pytest.mark.parametrize("method", ["bradley_terry", "plackett_luce", "crowd_bt"])
def test_a_ballot_that_counts_several_times_is_as_many_ballots(method):
    ballots, times = [(0, 0, [0, 1, 2]), (0, 1, [1, 0, 1]), (1, 0, [1, 0, 2])], [3, 1, 2]
    spelled = [ballot for ballot, count in zip(ballots, times, strict=True) for _ in range(count)]
    given = {"num_raters": 2, "method": method, "prior": 0.5}
    once, many = aggregate(ballots, **given, times=times), aggregate(spelled, **given)
    np.testing.assert_allclose(once.strengths, many.strengths, atol=1e-9)
    assert once.facts == pytest.approx(many.facts, nan_ok=True)


def test_disconnected_comparisons_warn_and_are_counted():
    ballots = [(0, 0, [0, 1, NAN, NAN]), (0, 0, [NAN, NAN, 0, 1]), (1, 1, [0, 1, 2])]
    with pytest.warns(UserWarning, match="do not link all items in 1 of 2 groups"):
        found = aggregate(ballots, num_raters=2, method="bradley_terry", prior=0.5)
    assert found.facts["groups not linked"] == 1
    assert np.isfinite(found.strengths).all()
    np.testing.assert_allclose(found.strengths[0, [0, 1]], found.strengths[0, [2, 3]], atol=1e-9)
    chain = np.zeros((9, 9))
    chain[np.arange(8), np.arange(1, 9)] = 1
    assert components(chain).tolist() == [0] * 9
    chain[3, 4] = 0
    assert components(chain).tolist() == [0] * 4 + [4] * 5


@pytest.mark.parametrize("method", ["bradley_terry", "plackett_luce", "crowd_bt"])
def test_every_method_agrees_on_an_easy_case_and_leaves_no_nan(method):
    ballots = [(0, r, [0, 1, 2]) for r in range(3)] + [(0, 2, [NAN, NAN, NAN]), (1, 0, [1, 0, NAN, NAN])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = aggregate(ballots, num_raters=3, method=method, prior=0.5)
    assert found.strengths.shape == (2, 4)
    assert np.isfinite(found.strengths).all()
    assert consensus_ranks(found.strengths[0, :3]).tolist() == [0, 1, 2]
    assert found.strengths[0, 3] == 0
    assert found.strengths[1, 1] > found.strengths[1, 0]
    assert found.facts["items without a verdict"] == 2
    assert found.facts["undefeated items"] == 2


def test_agreement_counts_equal_pairs_of_verdicts():
    ballots = [(0, 0, [0, 1]), (0, 1, [0, 1]), (0, 2, [1, 0]), (1, 0, [0, 0]), (1, 1, [0, 0])]
    share, pairs = agreement(comparisons(ballots, num_raters=3))
    assert (share, pairs) == (pytest.approx(2 / 4), 4)  # 1 of 3 in the first group, 1 of 1 in the second
    turned = rankings.Comparisons(*(np.array(x) for x in ([0, 0], [0, 1], [1, 0], [1.0, 0.0], [0, 1], [0, 1], [2])), 2)
    assert agreement(turned) == (1.0, 1)
    assert np.isnan(agreement(comparisons([(0, 0, [0, 1])], num_raters=1))[0])


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_choices_of_n(n):
    """Of equal proxies each is taken as often as the others."""
    rng = np.random.default_rng(0)
    proxy, rewards = rng.integers(0, 4, (5, 6)).astype(float), rng.normal(size=(5, 6))
    expected = []
    for p, r in zip(proxy, rewards, strict=True):
        choices = [list(c) for c in itertools.combinations(range(6), n)]
        expected.append(np.mean([r[c][p[c] == p[c].max()].mean() for c in choices]))
    np.testing.assert_allclose(best_of_n(proxy, rewards, n), expected, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_sample_without_a_score_is_never_the_best_of_n(n):
    """The mean over the choices of n that hold another; nothing is put in the place of its score."""
    rng = np.random.default_rng(1)
    proxy, rewards = rng.integers(0, 4, (6, 6)).astype(float), rng.normal(size=(6, 6))
    for row, lost in zip(proxy, ([0], [1, 3], [5, 0, 2], [0, 1, 2, 3, 4], range(6), []), strict=True):
        row[list(lost)] = np.nan
    rewards[1, 3] = np.nan
    expected = []
    for p, r in zip(proxy, rewards, strict=True):
        choices = [[i for i in c if not np.isnan(p[i])] for c in itertools.combinations(range(6), n)]
        expected.append([r[c][p[c] == p[c].max()].mean() for c in choices if c])
    np.testing.assert_allclose(
        best_of_n(proxy, rewards, n), [np.mean(each) if each else np.nan for each in expected], rtol=1e-12
    )


def test_best_of_all_samples_is_the_best_and_of_one_the_mean_with_any_number():
    proxy = np.random.default_rng(0).normal(size=(3, 2000))
    np.testing.assert_allclose(best_of_n(proxy, proxy, 2000), proxy.max(1), rtol=1e-9)
    np.testing.assert_allclose(best_of_n(proxy, proxy**2, 1), (proxy**2).mean(1), rtol=1e-9)
