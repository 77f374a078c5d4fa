"""The benchmarks' arithmetic on numbers whose answer is known."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks import distill, ensembles, judged, labels, methods, optimum, speed
from benchmarks import overoptimization as study
from benchmarks.peers import common
from rlhf_jax.tasks import random_walks as walks


def curve(method, size, a, b):
    """R = d (a - b f(d)) without noise; the proxy rises all along."""
    d = np.linspace(0.1, 6)
    return study.Curve(method, size, d, d, d * (a - b * study.FITS[method][0](d)), np.full(len(d), 1e-3))


@pytest.mark.parametrize(("method", "peak"), [("best-of-n", 2 / 1.4), ("PPO", np.exp(2 / 0.7 - 1))])
def test_a_fit_finds_the_curve_it_is_given_and_its_peak(method, peak):
    found = curve(method, 1, 2.0, 0.7)
    np.testing.assert_allclose(found.fit(), [2.0, 0.7], rtol=1e-6)
    assert found.peak() == pytest.approx(peak, rel=1e-6)
    f = study.FITS[method][0]
    near = [d * (2.0 - 0.7 * f(d)) for d in (0.99 * peak, peak, 1.01 * peak)]
    assert near[1] > max(near[0], near[2])
    assert curve(method, 1, 2.0, -0.1).peak() is None


def test_the_gold_reward_of_the_best_of_n_rises_with_n_and_falls_where_the_proxy_is_overdone():
    """gold = p - 0.3 p^2 of a normal proxy p is largest at p = 1.67, near which is the best of 16, at d = 1.355."""
    proxy = np.random.default_rng(0).normal(size=(600, 64))
    found = study.best_of_curve(128, proxy, proxy - 0.3 * proxy**2)
    assert (np.diff(found.proxy) > 0).all()
    assert found.gold[0] < found.gold[2] < found.gold[4] and found.gold[4] - found.gold[6] > 2 * found.gold_se[6]
    assert found.d[4] == pytest.approx((np.log(16) - 15 / 16) ** 0.5, rel=1e-6)
    assert found.peak() == pytest.approx(found.d[4], abs=0.15)


def test_the_verdict_names_the_sizes_that_fall_and_says_whether_the_peak_moves():
    def said(*sizes):
        prices = (0.8, 0.4, 0.2)
        return study.verdict([curve("PPO", n, 1.0, b) for n, b in zip(sizes, prices, strict=True)], "PPO")

    assert "at its largest with 128, 512, 3072 comparisons" in said(128, 512, 3072)
    assert "two standard errors with 128, 512;" in said(128, 512, 3072)
    assert "peak moves to the right" in said(128, 512, 3072)
    assert "peak does not always move to the right" in said(3072, 512, 128)


def test_a_method_is_above_sft_by_two_standard_errors_on_the_same_seeds_or_is_named():
    """Seeds differ by far more than the gains, so only pairs tell; a seed without SFT's line tells nothing."""
    seeds = [0.1, 0.3, 0.5, 0.7]
    gains = {"SFT": [0] * 4, "DPO": [0.04, 0.05, 0.06], "RRHF": [0.05, -0.04, 0.02, 0.0], "PPO": [0.9, 0, 0, 0.8]}
    lines = [
        {"method": name, "seed": seed, "gold": gold + gain, "kl": 1.0, "wall_s": 2.0}
        for name, of_seeds in gains.items()
        for seed, (gold, gain) in enumerate(zip(seeds, of_seeds, strict=False))
    ]
    lines.append({"method": "RRHF", "seed": 9, "gold": 1e6, "kl": 1.0, "wall_s": 2.0})
    told = methods.table(lines)
    assert told.splitlines()[-1] == "Above SFT by more than two standard errors: DPO. Not: RRHF, PPO."
    assert "0.050 +- 0.006" in next(line for line in told.splitlines() if line.startswith("DPO"))
    alone = methods.table([line for line in lines if line["seed"] == 0])
    assert alone.splitlines()[-1] == "Above SFT by more than two standard errors: none."


def test_every_system_gets_the_same_ragged_rows_and_no_special_id():
    for task in common.TASKS:
        work = common.work_of(task, "ragged")
        steps = common.rows(task, "ragged", 512, 70)
        assert steps == common.rows(task, "ragged", 512, 70) and steps[0] != steps[1]
        assert {len(step) for step in steps} == {work.prompts}
        flat = [row for step in steps for row in step]
        assert {len(row.responses) for row in flat} == {0 if work.new else work.responses}
        longest = max(len(row.prompt) + max(map(len, row.responses), default=0) for row in flat)
        assert longest == work.prompt  # the bound is met, and no row is over it
        assert min(min(ids) for row in flat for ids in (row.prompt, *row.responses)) >= 3


CHILD = """
import json, sys
for i in range(4):
    print("ready", flush=True); sys.stdin.readline(); print(f"{NAME} step {i}", file=open(PATH, "a"))
    if NAME == "broken": raise RuntimeError("out of luck")
print(json.dumps({"system": NAME, "task": "t", "model": "m", "lengths": "l", "seconds_median": SECONDS,
                  "cpu_seconds_median": 1, "seconds": [SECONDS], "tokens": [SECONDS * TOKENS]}))
"""


def test_systems_take_turns_and_one_that_fails_is_told_of(tmp_path):
    def child(name, seconds, tokens):
        facts = f"NAME, SECONDS, TOKENS, PATH = {name!r}, {seconds}, {tokens}, {str(tmp_path / 'steps')!r}"
        return speed.Child([sys.executable, "-c", facts + CHILD], {})

    children = {"ours": child("ours", 1, 100), "slow": child("slow", 4, 50), "broken": child("broken", 1, 1)}
    lines = speed.compare(children, 4)
    steps = (tmp_path / "steps").read_text().splitlines()
    assert steps[:5] == ["ours step 0", "slow step 0", "broken step 0", "ours step 1", "slow step 1"]
    assert [line.get("system") for line in lines[:3]] == ["ours", "slow", None]
    assert lines[2]["error"] == ["RuntimeError: out of luck"]
    compared = {"against": "slow", "ratio": 0.25, "cpu_ratio": 1.0, "per_token_ratio": 0.5}
    assert lines[3:] == [{"task": "t", "model": "m", "lengths": "l", **compared}]


def test_labels_are_compared_with_random_ones_of_the_same_seed_and_of_twice_as_many():
    golds = {("random", 128): [0.3, 0.5], ("random", 256): [0.4, 0.6], ("disagreement", 128): [0.45, 0.55]}
    lines = [
        {"run": run, "labels": n, "seed": seed, "gold_last": gold, "accuracy": 0.7}
        for (run, n), of_seeds in golds.items()
        for seed, gold in enumerate(of_seeds)
    ]
    row = next(line for line in labels.table(lines).splitlines() if "disagreement" in line and "128" in line)
    assert "0.500 +- 0.050" in row and "0.100 +- 0.050" in row and "0.000 +- 0.050" in row


def test_what_a_run_has_lost_since_its_peak_is_measured_in_other_iterations_than_the_peak_is_found_in():
    up_and_down = [min(i, 59 - i) / 10 for i in range(60)]  # three of every other one: .2 or .3 at the end, about 2.77
    assert ensembles.fallen(up_and_down) == pytest.approx(0.25 - 2.77, abs=0.01)
    assert ensembles.fallen(sorted(up_and_down)) == 0.0
    noise = np.random.default_rng(0).normal(size=(400, 60))
    lost = [ensembles.fallen([*one]) for one in noise]
    most = [smooth[-1] - smooth.max() for smooth in map(ensembles.smoothed, noise)]
    assert abs(np.mean(lost)) < 3 * np.std(lost) / 20 and np.mean(most) < -0.5


def test_tokens_to_nine_tenths_of_the_teacher_are_those_after_which_five_iterations_are_that_good(tmp_path):
    golds = [0.0, 0.5, 0.8, 1.0, 0.9, 0.9, 0.9, 0.9]  # the first five to be .9 in the mean end at the seventh
    lines = [{"rollout/gold": gold, "rollout/response_length": 4.0} for gold in golds]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"eval/gold": 1}, *lines]))
    found = distill.by_tokens(tmp_path / "metrics.jsonl", 128, 1.0)
    assert found["tokens_to_90"] == 7 * 4 * 128 and found["tokens"] == 8 * 4 * 128
    assert distill.by_tokens(tmp_path / "metrics.jsonl", 128, 2.0)["tokens_to_90"] is None


def test_a_judged_student_is_told_by_its_share_of_the_teacher_and_the_tokens_of_the_seeds_that_got_there():
    told = {"run": "student, ppo", "before": 0.3, "after": 0.6, "gain": 0.3, "teacher": 0.8}
    lines = [
        {**told, "seed": 0, "tokens_to_90": 4000},
        {**told, "seed": 1, "after": 0.8, "gain": 0.5, "tokens_to_90": None},
        *({**told, "seed": seed, "run": "student, distill", "tokens_to_90": 3000} for seed in (0, 1)),
    ]
    row = judged.table([*lines, {"run": "judge", "seed": 0, "before": 0.3, "after": 0.8, "gain": 0.5}]).splitlines()
    assert row[2].split() == ["judge", "1", "0.300", "0.800", "0.500"]
    assert row[3].split()[-4:] == ["2", "of", "2", "1000.000"]  # less than ppo's, of the seed on which both got there
    assert row[4].endswith("1 of 2") and "0.400 +- 0.100  0.875 +- 0.125" in row[4] and "4000.000" in row[4]


def test_the_best_policy_for_a_reward_is_that_of_the_tilt_and_goes_where_the_reward_is_wrong_as_the_price_falls():
    best = optimum.Optimum.__new__(optimum.Optimum)
    best.starts, best.gold = np.array(["b", "b", "c"]), np.array([1.0, 0.0, 0.5])
    best.logprobs = np.log([0.2, 0.05, 0.1])
    gold, kl = best.best(np.array([1.0, 1.5, 7.0]), price=0.5)  # b: .2 e^2 against .05 e^3; c has one walk
    law = np.array([0.2 * np.e**2, 0.05 * np.e**3])
    law /= law.sum()
    assert gold == pytest.approx((law[0] + 0.5) / 2)
    assert kl == pytest.approx((law @ np.log(law / [0.2, 0.05]) - np.log(0.1)) / 2)
    golds = [best.best(np.array([1.0, 1.5, 7.0]), price)[0] for price in (1.0, 0.5, 0.2, 0.05)]
    assert golds == sorted(golds, reverse=True)


def test_walks_that_are_weighed_are_the_legal_ones_to_the_goal_and_some_that_leave_the_graph():
    graph = walks.make_graph(0)
    pairs = optimum.candidates(graph)
    golds = walks.optimality(graph, *zip(*pairs, strict=True))
    drawn = [(row["prompt"], row["response"]) for row in walks.demonstrations(graph, 200, 0)]
    assert len({*pairs}) == len(pairs) and 0.0 in golds
    assert {pair for pair in drawn if walks.optimality(graph, *zip(pair))[0]} <= {*pairs}
