"""Laws of comparisons that fall apart: no label across a gap, by any aggregation, in any command that ranks."""

import json
from itertools import combinations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import LIMITS, tiny
from tiny import toy_directory

from rlhf_jax import losses, reward
from rlhf_jax.commands import datasets
from rlhf_jax.config import (
    DataAggregateArgs,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RewardArgs,
    RewardConfig,
    RunConfig,
)
from rlhf_jax.data import sources
from rlhf_jax.data.comparisons import preference_examples, ranking_examples
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judge import Verdict, ranks_by_part

AGGREGATES = ("votes", "bradley_terry", "plackett_luce", "crowd_bt")
TOKENIZER = Tokenizer(tiny())
NAN = float("nan")


def in_one_row(*ballots, prompt="a"):
    """Ballots, each {response: rank}, as the raters of one row."""
    texts = sorted({text for ballot in ballots for text in ballot})
    raters = [{"rater": f"r{n}", "ranks": [ballot.get(text) for text in texts]} for n, ballot in enumerate(ballots)]
    return [{"prompt": prompt, "responses": texts, "raters": raters}]


def in_rows(*ballots, prompt="a"):
    """Ballots as a row each."""
    return [
        {"prompt": prompt, "responses": list(ballot), "ranks": list(ballot.values()), "rater": f"r{n}"}
        for n, ballot in enumerate(ballots)
    ]


def trained(rows, build, aggregate):
    """{(preferred, other): weight} of all pairs that enter the loss, as the loss counts them; what the report says."""
    examples, report = build(sources.rows_from(rows), TOKENIZER, LIMITS, aggregate=aggregate)
    found: dict = {}
    for example in examples:
        if "responses" not in example:
            pairs = [(example["chosen"], example["rejected"])] if example["label"] != 0.5 else []
        else:
            ranks, ids = example["ranks"], example["responses"]  # in order, as `losses.reward.ordered_pairs` has them
            pairs = [(ids[i], ids[j]) for i, j in np.argwhere(ranks[:, None] < ranks[None, :])]
        for pair in pairs:
            names = tuple(TOKENIZER.decode(ids).removeprefix("a ") for ids in pair)
            found[names] = found.get(names, 0) + example["weight"] / len(pairs)
    return found, str(report)


def links(ballots):
    """(pairs that a ballot compares, sets of responses that comparisons link)."""
    pairs = {
        frozenset(p) for ballot in ballots for p in combinations([t for t, r in ballot.items() if r is not None], 2)
    }
    parts: list = []
    for pair in pairs:
        touched = [part for part in parts if part & pair]
        parts = [part for part in parts if not part & pair] + [frozenset(pair).union(*touched)]
    return pairs, parts


APART = {
    "two_pairs": [{"b": 0, "c": 1}, {"d": 0, "e": 1}],
    "three_pairs": [{"b": 0, "c": 1}, {"d": 0, "e": 1}, {"f": 1, "g": 0}],
    "a_pair_and_a_triple": [{"b": 0, "c": 1}, {"d": 2, "e": 1, "f": 0}],
    "two_raters_of_each": [{"b": 0, "c": 1}, {"b": 0, "c": 1}, {"d": 0, "e": 1}, {"d": 1, "e": 0}, {"d": 0, "e": 1}],
}


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("make", [in_one_row, in_rows])
@pytest.mark.parametrize("name", APART)
def test_no_pair_is_trained_across_a_gap(name, make, aggregate):
    ballots = APART[name]
    compared, parts = links(ballots)
    for build in (preference_examples, ranking_examples):
        found, said = trained(make(*ballots), build, aggregate)
        assert {frozenset(pair) for pair in found} == compared
        if make is in_one_row or aggregate != "votes":
            assert sum(found.values()) == pytest.approx(1)  # the prompt counts once
            assert len(set(found.values())) == 1
        if aggregate != "votes":
            assert f"1 fall apart into {len(parts)} parts" in said
        elif make is in_one_row:
            assert "pairs of responses that nobody compared, not trained on" in said


ballot = st.dictionaries(st.sampled_from("bcdefg"), st.integers(0, 3), min_size=2, max_size=4)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(ballots=st.lists(ballot, min_size=1, max_size=4), data=st.data())
def test_labels_are_where_comparisons_are_whatever_the_order_of_rows(ballots, data):
    compared, parts = links(ballots)
    turned = [{text: -rank for text, rank in ballot.items()} for ballot in ballots]
    mixed = data.draw(st.permutations(ballots))
    for make, aggregate in ((in_one_row, "votes"), (in_rows, "bradley_terry"), (in_one_row, "plackett_luce")):
        results = []
        for told in (ballots, mixed, turned):
            try:
                pairs, _ = trained(make(*told), preference_examples, aggregate)
                whole, _ = trained(make(*told), ranking_examples, aggregate)
            except UserError as error:
                assert "with all responses tied" in str(error)
                pairs = whole = {}
            assert {*pairs, *whole} <= {(a, b) for part in parts for a in part for b in part}
            if aggregate == "votes":
                assert {frozenset(pair) for pair in (*pairs, *whole)} <= compared
            assert set(pairs) <= set(whole) or aggregate == "votes"
            results.append(set(whole))
        assert results[1] == results[0]
        if aggregate != "plackett_luce":  # which chooses from the best down
            assert results[2] == {(b, a) for a, b in results[0]}


def count_pairs(scores, ranks, mask, weights, *, center_coef):
    """The loss of rankings, and how many pairs of a prompt are in it."""
    loss, metrics = losses.kwise_reward_loss(scores, ranks, mask, weights, center_coef=center_coef)
    better, _ = losses.reward.ordered_pairs(ranks, mask)
    return loss, {**metrics, "reward_model/pairs": jnp.sum(better.astype(jnp.float32))}


def test_a_reward_model_is_trained_on_what_was_compared(tmp_path):
    """8 prompts, each with two pairs that nobody compared with one another: a step of all 16 rankings has 16."""
    rows = [row for p in "abcdefgh" for row in in_rows({"m": 0, "n": 1}, {"o": 0, "p": 1}, prompt=p)]
    config = RewardArgs(
        model=ModelConfig(path=str(toy_directory() / "policy")),
        data=DataConfig(max_prompt_length=4, max_length=8),  # a batch that is left open has all 16
        reward=RewardConfig(steps=2, aggregate="bradley_terry"),
        optim=OptimConfig(learning_rate=1e-2),
        run=RunConfig(output_dir=str(tmp_path / "run"), progress=False, eval_every=0, log_every=1),
    )
    reward.run(config, rows=rows, eval_rows=rows, loss=count_pairs)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward_model/pairs"] for line in lines if "reward_model/pairs" in line] == [16, 16]


# --- commands that write rankings


@pytest.mark.parametrize("method", AGGREGATES[1:])
def test_aggregated_rows_say_nothing_across_a_gap_when_they_are_read_again(method, tmp_path, capsys):
    for name, ballots in APART.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in in_rows(*ballots)))
        out = datasets.run_aggregate(DataAggregateArgs(path=str(path), method=method, intervals=0))
        compared, parts = links(ballots)
        assert f"1 fall apart into {len(parts)} parts" in capsys.readouterr().out
        assert {frozenset(item["text"] for item in row["responses"]) for row in out} == set(parts)
        for again in AGGREGATES:
            found, _ = trained(out, ranking_examples, again)
            assert {frozenset(pair) for pair in found} == compared
        for row in out:
            assert sum(item["strength"] for item in row["responses"]) == pytest.approx(0, abs=1e-3)


def test_a_judge_without_some_verdicts_ranks_what_it_has_linked():
    verdict = lambda i, j, share: Verdict(i, j, [], [], share, 0)  # noqa: E731
    said = [verdict(0, 1, 1.0), verdict(0, 2, None), verdict(1, 2, None), verdict(2, 3, 0.2), verdict(0, 3, None)]
    assert ranks_by_part(4, said) == [[0, 1, None, None], [None, None, 1, 0]]
    assert ranks_by_part(4, [*said, verdict(1, 3, 1.0)]) == [[0, 1, 3, 2]]
    assert ranks_by_part(3, [verdict(0, 1, None)]) == []


def test_a_row_that_a_mixture_repeats_is_no_more_ballots():
    rows = sources.rows_from(in_rows({"b": 0, "c": 1}) + in_rows({"b": 0, "c": 1}, prompt="d"))
    once, _ = preference_examples(rows, TOKENIZER, LIMITS, aggregate="bradley_terry")
    mixed, report = preference_examples([*rows, rows[1], rows[1]], TOKENIZER, LIMITS, aggregate="bradley_terry")
    assert [example["label"] for example in mixed] == [once[0]["label"]] * 4
    assert [TOKENIZER.decode(example["chosen"][:1]) for example in mixed] == ["a", "d", "d", "d"]
    assert "2 verdicts" in str(report)


@pytest.mark.parametrize("build", [preference_examples, ranking_examples])
def test_responses_of_which_nothing_is_learned_are_counted_by_what_they_are(build):
    rows = [
        {"prompt": "a", "responses": ["b", "b", "c", None, " ", "d"], "ranks": [0, 0, 1, None, None, None]},
        {"prompt": "a", "responses": ["c", {"text": "d"}, [{"role": "assistant", "content": ""}]], "ranks": [1, 0, 2]},
    ]
    examples, report = build(sources.rows_from(rows), TOKENIZER, LIMITS)
    assert len(examples) == 2 and report.remarks == {
        "responses that are null or empty, left out": 3,
        "responses that nobody ranked, left out": 1,
        "responses equal to another of their prompt, joined with it": 1,
    }
    assert not build(sources.rows_from([{"prompt": "a", "chosen": "b", "rejected": "c"}]), TOKENIZER, LIMITS)[
        1
    ].remarks
