"""Numbers that a report gives: whom they count, that they are of one definition everywhere, and how sure they are."""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BIGRAMS, ONE, bigram_params, byte_tokenizer

from rlhf_jax import cli, losses, reward, sft
from rlhf_jax.config import MeshConfig
from rlhf_jax.data.ballots import ranking_row
from rlhf_jax.data.collate import collate_preference, collate_sft, eval_batches
from rlhf_jax.data.comparisons import preference_examples, ranking_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.feedback.judge import Verdict
from rlhf_jax.feedback.report import label_agreement, mean_of, share_of, summary_lines, win_rate
from rlhf_jax.inference import intervals
from rlhf_jax.runs.run import Run
from rlhf_jax.sharding import make_mesh
from rlhf_jax.training.loop import make_evaluate
from rlhf_jax.training.step import add_metrics, settled

NAN = float("nan")
LIMITS = Limits(16, 32, "error")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer())


# --- a judge and labels


def verdict(first: int, second: int, share: float | None) -> Verdict:
    return Verdict(first, second, [0.5], [0.5], share, 0)


def rankings_of(*ranks: list[float | None]) -> list:
    names = "abcdef"
    rows = [
        {"prompt": f"p{n}", "responses": [{"text": names[i], "rank": rank} for i, rank in enumerate(each)]}
        for n, each in enumerate(ranks)
    ]
    return [ranking_row(row, unlabelled=True) for row in rows]


def test_a_judge_agrees_on_labelled_pairs_alone():
    """A pair that nobody ranked or chose among cannot agree; ties and missing verdicts are counted apart."""
    given = rankings_of([0, 1, None], [None, None], [0, 0, 1])
    unlabelled = ranking_row({"prompt": "q", "responses": ["a", "b"]}, unlabelled=True)
    best = ranking_row({"prompt": "r", "responses": ["a", "b", "c"], "best": 1})
    pairs = [(0, 1), (0, 2), (1, 2)]
    found = label_agreement(
        [*given, unlabelled, best],
        [
            [verdict(0, 1, 1.0), verdict(0, 2, 1.0), verdict(1, 2, 0.0)],  # right, and two of no label
            [verdict(0, 1, 0.0)],  # no label
            [verdict(0, 1, 1.0), verdict(0, 2, 0.2), verdict(1, 2, None)],  # a tied label, wrong, no verdict
            [verdict(0, 1, 0.3)],
            [verdict(i, j, share) for (i, j), share in zip(pairs, [0.0, 0.9, 0.5], strict=True)],  # right, -, -: 1 > 2
        ],
    )
    assert (found["agreement"], found["pairs"], found["prompts"]) == (2 / 3, 3, 3)
    assert (found["unlabelled"], found["no_verdict"], found["ties"]) == (5, 1, 2)
    assert label_agreement(given[1:2], [[verdict(0, 1, 0.0)]])["agreement"] is None


def test_what_a_summary_says_of_an_agreement_names_what_it_left_out():
    agreed = share_of([("p", True), ("q", False)])
    [line] = summary_lines({"labels": {**agreed, "unlabelled": 7, "ties": 1}})
    assert "of 2 pairs of 2 prompts; 7 without a label; 1 tied" in line
    [line] = summary_lines({"labels": {"agreement": None, "pairs": 0, "prompts": 0, "unlabelled": 3}})
    assert line.startswith("! no pair can be compared")


# --- accuracy


def losses_over(loss, batches, scores, columns) -> dict[str, float]:
    """Metrics of a loss over several batches, as an evaluation adds them up."""
    total, start = None, 0
    for batch in batches:
        size = len(batch["weights"])
        own = np.zeros((size, scores.shape[1]), np.float32)
        own[: len(scores[start : start + size])] = scores[start : start + size]
        start += size
        metrics = loss(*columns(own, batch), center_coef=0.0)[1]
        total = metrics if total is None else add_metrics(total, metrics)
    return {name: float(value) for name, value in settled(total).items()}


def of_pairs(scores, batch):
    return scores[:, 0], scores[:, 1], batch["weights"], batch["margins"], batch["labels"]


def of_rankings(scores, batch):
    return scores, batch["ranks"], batch["mask"], batch["weights"]


ROWS = [
    {"prompt": "p", "responses": [{"text": f"{n}", "rank": n} for n in range(4)]},
    {"prompt": "q", "responses": [{"text": "x", "rank": 0}, {"text": "y", "rank": 1}]},
    {"prompt": "r", "responses": [{"text": "u", "rank": 0}, {"text": "v", "rank": 0}, {"text": "w", "rank": 3}]},
    {"prompt": "p", "chosen": "1", "rejected": "0", "votes": [1, 1, 0]},
    {"prompt": "s", "chosen": "a", "rejected": "b", "votes": [1, 3, 1]},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_the_accuracy_of_the_summary_is_that_of_the_evaluation(tokenizer, kind, seed):
    """Rankings of 4, 2 and 3, a tie of votes, votes that turn a pair; equal scores; batches that are filled up."""
    rows = rows_from(ROWS if kind == "pairs" else [row for row in ROWS if "responses" in row])
    build = {"pairs": preference_examples, "rankings": ranking_examples}[kind]
    examples, _ = build(rows, tokenizer, LIMITS)
    batches = eval_batches(
        examples, batch_size=3, collate=partial(reward.KINDS[kind].collate(examples), length=32, pad_id=0)
    )
    width = batches[0]["tokens"].shape[1]
    scores = np.random.default_rng(seed).integers(0, 3, (len(examples), width)).astype(np.float32)
    mask = np.concatenate([b.get("mask", b["last"] >= 0) for b in batches])[: len(examples)]
    loss, columns = {
        "pairs": (losses.pairwise_reward_loss, of_pairs), "rankings": (losses.kwise_reward_loss, of_rankings)
    }[kind]  # fmt: skip
    metric = losses_over(loss, batches, scores, columns)["reward_model/accuracy"]
    report = {"pairs": reward.pair_accuracy, "rankings": reward.order_accuracy}[kind]
    found = report(np.where(mask, scores, NAN), batches, [example["prompt_key"] for example in examples])
    assert found["accuracy"] == pytest.approx(metric, abs=1e-6)
    assert found["accuracy_interval"][0] <= found["accuracy"] <= found["accuracy_interval"][1]
    assert (found["prompts"], found["ties"]) == ((4, 1) if kind == "pairs" else (3, 0))


def test_rankings_weigh_the_same_as_pairs_and_as_rankings(tokenizer):
    """Six pairs of one prompt wrong, the one of another right: 1/2 of the prompts, not 1/7 of the pairs."""
    rows = rows_from(ROWS[:2])
    examples, _ = preference_examples(rows, tokenizer, LIMITS)
    batches = eval_batches(examples, batch_size=7, collate=partial(collate_preference, length=32))
    scores = np.array([[0, 1]] * 6 + [[1, 0]], np.float32)
    keys = [example["prompt_key"] for example in examples]
    found = reward.pair_accuracy(scores, batches, keys)
    assert (found["accuracy"], found["n"], found["prompts"]) == (pytest.approx(0.5), 7, 2)
    assert found["accuracy_interval"][0] < 0.15 and found["accuracy_interval"][1] > 0.85


def test_a_tied_label_is_no_win_and_a_tied_score_is_half(tokenizer):
    votes = [[1, 1, 0], [0, 0, 2], [2, 1, 0], [0, 1, 0], [3, 0, 0]]  # two ties; the fourth turns its pair
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "votes": each} for n, each in enumerate(votes)]
    examples, _ = preference_examples(rows_from(rows), tokenizer, LIMITS)
    batches = eval_batches(examples, batch_size=5, collate=partial(collate_preference, length=32))
    scores = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [2, 2]], np.float32)
    found = reward.pair_accuracy(scores, batches, [f"p{n}" for n in range(5)])
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3) and (found["n"], found["ties"]) == (3, 2)
    metric = losses_over(losses.pairwise_reward_loss, batches, scores, of_pairs)["reward_model/accuracy"]
    assert metric == pytest.approx(0.5)
    none = eval_batches(examples[:2], batch_size=2, collate=partial(collate_preference, length=32))
    assert reward.pair_accuracy(scores[:2], none, ["p0", "p1"])["accuracy"] is None
    assert np.isnan(losses_over(losses.pairwise_reward_loss, none, scores, of_pairs)["reward_model/accuracy"])


@pytest.mark.parametrize("labels", [[1.0, 0.5, 0.0, 0.75], [0.5, 0.5, 1.0, 1.0], [0.2, 0.5, 0.5, 0.5]])
def test_an_accuracy_is_the_same_whatever_the_microbatches(labels):
    """As `accumulate` adds them: the mean is over the labelled pairs of all, not a mean of the parts' means."""
    rng = np.random.default_rng(0)
    logprobs = rng.normal(size=(4, 2)).astype(np.float32)
    weights, labels = np.full(4, 0.25, np.float32), np.array(labels, np.float32)

    def metrics(rows):
        return losses.dpo_loss(
            logprobs[rows], np.zeros_like(logprobs[rows]), labels[rows], np.zeros(len(labels[rows]), np.float32),
            weights[rows], beta=0.1, label_smoothing=0.1,
        )[1]  # fmt: skip

    whole = settled(metrics(slice(0, 4)))
    parts = settled(add_metrics(add_metrics(metrics(slice(0, 1)), metrics(slice(1, 2))), metrics(slice(2, 4))))
    right = [(a > b) == (y > 0.5) for (a, b), y in zip(logprobs, labels, strict=True) if y != 0.5]
    for found in (whole, parts):
        assert float(found["rewards/accuracy"]) == pytest.approx(np.mean(right))
        assert "rewards/accuracy_weight" not in found


# --- intervals and errors


@pytest.mark.parametrize(("size", "likeness"), [(1, 1.0), (6, 1.0), (6, 4.0), (15, 0.5)])
def test_an_interval_holds_the_truth_however_alike_the_pairs_of_a_prompt_are(size, likeness):
    """Prompts differ in how easy they are. Pairs taken as independent hold it too seldom where they are alike."""
    rng = np.random.default_rng(0)
    held, naive = [], []
    for _ in range(800):
        easy = rng.beta(0.7 * likeness, 0.3 * likeness, 30)
        sizes = rng.integers(1, size + 1, 30)
        right = rng.random(sizes.sum()) < np.repeat(easy, sizes)
        prompts = np.repeat(np.arange(30), sizes).tolist()
        low, high = intervals.share_and_interval(right.astype(float), prompts)[1]
        held.append(low <= 0.7 <= high)
        low, high = intervals.wilson_interval(right.mean(), len(right))
        naive.append(low <= 0.7 <= high)
    assert np.mean(held) > 0.92
    assert size == 1 or np.mean(naive) < np.mean(held) - 0.04


def test_what_repeats_a_prompt_tells_no_more():
    """Every row k times, as pairs, or as prompts of `evaluate`: the same share, the same error."""
    rng = np.random.default_rng(1)
    shares, prompts = rng.random(12), [f"p{n}" for n in range(12)]
    for times in (2, 5):
        again, names = np.repeat(shares, times), [name for name in prompts for _ in range(times)]
        assert win_rate(again, names)["interval"] == pytest.approx(win_rate(shares, prompts)["interval"])
        assert mean_of(again[:, None], names)["se"] == pytest.approx(mean_of(shares[:, None], prompts)["se"])
        assert share_of([(name, True) for name in names])["interval"] == pytest.approx(
            share_of([(name, True) for name in prompts])["interval"]
        )
    assert mean_of(np.ones((4, 2)), ["p"] * 4) == {"mean": 1.0, "se": None}  # one prompt tells no spread


def test_a_weighted_mean_over_groups_is_that_of_its_definition():
    rng = np.random.default_rng(2)
    values, weights, groups = rng.random(9), rng.random(9), list("aaabbcccc")
    mean, error = intervals.mean_and_error(values, groups, weights)
    assert mean == pytest.approx((values * weights).sum() / weights.sum())
    sums = [
        sum(w * (x - mean) for x, w, g in zip(values, weights, groups, strict=True) if g == name) for name in "abc"
    ]
    assert error == pytest.approx(math.sqrt(1.5 * sum(s * s for s in sums)) / weights.sum())


# --- perplexity


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_perplexity_is_over_tokens_whatever_is_trained(reduction, size):
    """Five documents of different lengths: exp of the mean over all their targets, in any batches."""
    rng, params = np.random.default_rng(0), bigram_params(0)["policy"]
    examples = [
        {"tokens": rng.integers(2, 24, n).astype(np.int32), "loss_mask": np.arange(n) >= 2} for n in (3, 12, 4, 9, 3)
    ]
    mesh = make_mesh(MeshConfig(), devices=ONE)
    collate = partial(collate_sft, length=12, reduction=reduction)
    loss = sft.objective(BIGRAMS.policy, losses.next_token_loss)
    with jax.set_mesh(mesh.grid):
        evaluate = make_evaluate(
            loss, mesh, eval_batches(examples, batch_size=size, collate=collate), jax.random.key(0)
        )
        found = evaluate(params)
    embed, head = (np.asarray(params[a][b], np.float64) for a, b in (("embed", "tokens"), ("head", "kernel")))
    each = []
    for example in examples:
        logits = embed[example["tokens"][:-1]] @ head
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = example["tokens"][1:]
        each.append(-logprobs[np.arange(len(targets)), targets][example["loss_mask"][1:]])
    assert found["eval/nll"] == pytest.approx(np.concatenate(each).mean(), rel=1e-5)
    trained = np.concatenate(each).mean() if reduction == "token" else np.mean([x.mean() for x in each])
    assert found["eval/total"] == pytest.approx(trained, rel=1e-5)


# --- the best evaluation

HOSTILE = [NAN, math.inf, -math.inf]


def a_run(path, total=4, **options) -> Run:
    arguments = ["--run.output_dir", str(path), "--run.progress", "false", "--checkpoint.keep_last", "9"]
    return Run("sft", cli.parse("sft", [*arguments, *[f"--{k}={v}" for k, v in options.items()]]), total=total)


@pytest.mark.parametrize("values", [p for n in (1, 2) for p in itertools.product([*HOSTILE, 1.0, 2.0], repeat=n)])
def test_what_is_not_finite_is_never_the_best(tmp_path, values):
    """Of any order of values the best is the first of the highest finite ones; of none of these, nothing."""
    with a_run(tmp_path / "run") as run:
        for step, value in enumerate(values, 1):
            run.best.keep(step, value)
        finite = [(value, -step) for step, value in enumerate(values, 1) if math.isfinite(value)]
        assert run.best.improvements[-1:] == ([(-max(finite)[1], max(finite)[0])] if finite else [])


@pytest.mark.parametrize("first", HOSTILE)
def test_a_run_that_began_with_a_nan_keeps_the_best_after_it_and_after_going_on(tmp_path, first):
    tree = lambda step: {"x": jnp.full(2, float(step))}  # noqa: E731
    with a_run(tmp_path / "run") as run:
        run.restore(tree(0), {})
        for step, value in enumerate([first, -2.0, NAN], 1):
            run.best.keep(step, value)
            run.save_now(step, tree(step), {})
        assert run.best.improvements[-1] == (2, -2.0)
    with a_run(tmp_path / "run") as run:
        assert run.start == 3 and run.restore(tree(0), {})[0]["x"][0] == 3
        assert run.best.improvements[-1] == (2, -2.0) and not run.best.keep(4, NAN)
        assert run.restore_best(tree(4))["x"][0] == 2
