"""`rlhf-jax evaluate` of a reward: every figure beside one in plain Python, and RewardBench's scores by hand."""

from __future__ import annotations

import errno
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import ONE, toy_directory

from rlhf_jax.commands import rewards
from rlhf_jax.commands.evaluate import run_evaluate
from rlhf_jax.config import EvaluateArgs, RewardSourceConfig
from rlhf_jax.data.sources import read_rows
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.reward_report import (
    SECTIONS,
    Pairs,
    Scored,
    accuracy,
    best_of,
    calibration,
    likings,
    pairs_of,
    reward_bench,
    ties_score,
)
from rlhf_jax.sharding import make_mesh

DATA = Path(__file__).parents[2] / "shared" / "data" / "rows"


def scored(scores, ranks=None, *, prompt="p", subset="", golds=None, lengths=None, ordered=True, bench=0, id=""):
    ranks = list(range(len(scores))) if ranks is None else ranks
    labels = np.array([[(np.sign(b - a) + 1) / 2 for b in ranks] for a in ranks])
    golds = None if golds is None else np.array(golds, float)
    lengths = np.array(lengths or [1] * len(scores))
    if bench == 2:
        labels = np.where(labels == 0.5, np.nan, labels)
    return Scored(prompt, subset, labels, np.array(scores, float), golds, lengths, ordered, bench, id)


def test_accuracy_is_the_mean_over_rows_of_the_share_of_their_pairs():
    rows = [
        scored([2, 1, 0], subset="a"),  # all of three pairs
        scored([1, 2, 0], prompt="q", subset="a"),  # two of three
        scored([1, 1], prompt="r", subset="b"),  # equal scores: half
        scored([3, 1], [0, 0], prompt="s", subset="b"),  # a tied label
    ]
    pairs = pairs_of(rows)
    found = accuracy(rows, pairs)
    assert found["accuracy"] == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert (found["pairs"], found["ties"], found["rows"], found["prompts"]) == (7, 1, 3, 3)
    inside = accuracy(rows, pairs, np.array([one.subset == "b" for one in rows]))
    assert (inside["accuracy"], inside["pairs"], inside["ties"]) == (0.5, 1, 1)
    wide = accuracy([replace(one, prompt="p") for one in rows[:2]] * 50, pairs_of(rows[:2] * 50))["interval"]
    narrow = [replace(one, prompt=str(i)) for i, one in enumerate(rows[:2] * 50)]
    narrow = accuracy(narrow, pairs_of(narrow))["interval"]
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0]), "rows of one prompt are not independent"


def test_calibration_of_probabilities_that_are_true_and_of_a_head_in_other_units():
    """Margins whose sigmoid is the label: no error, and a temperature of 1; times 3, that temperature is 3."""
    margin = np.linspace(-4, 4, 200)
    label, none = 1 / (1 + np.exp(-margin)), np.zeros(200)
    found = calibration(Pairs(none.astype(int), margin, label, none))
    assert found["ece"] < 1e-12 and found["temperature"] == pytest.approx(1, abs=1e-3)
    found = calibration(Pairs(none.astype(int), 3 * margin, label, none))
    assert found["temperature"] == pytest.approx(3, rel=1e-3) and found["ece"] > 0.1 > 1e-3 > found["ece_fitted"]
    assert sum(of["pairs"] for of in found["bins"]) == 200
    hard = calibration(
        Pairs(np.array([0, 1]), np.array([math.log(3), -math.log(3)]), np.array([1.0, 1.0]), np.zeros(2))
    )
    assert hard["bins"] == [{"confidence": pytest.approx(0.75), "accuracy": 0.5, "pairs": 2}]
    assert hard["ece"] == pytest.approx(0.25)
    assert hard["loss"] == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_likings_are_those_of_the_reward_beside_those_of_the_labels():
    rows = [
        scored([2, 1], lengths=[9, 5]),
        scored([0, 1], lengths=[3, 4]),
        scored([5, 1], ordered=False, lengths=[1, 1]),
    ]
    found = likings(rows, pairs_of(rows))
    assert (found["reward"]["longer_wins"], found["labels"]["longer_wins"]) == (1.0, 0.5)
    assert (found["reward"]["first"], found["labels"]["first"]) == (0.5, 1.0)
    assert found["reward"]["length_correlation"] == pytest.approx(5 / math.sqrt(17 * 18))


def test_the_best_of_n_is_the_mean_over_all_choices_of_n():
    rows = [scored([3, 1, 2, 0], golds=[0, 5, 2, 9]), scored([1, 2, 3, 4, 5], golds=[1, 2, 3, 4, 5]), scored([1, 2])]
    curve = best_of(rows)
    assert [at["n"] for at in curve] == [1, 2, 4]
    for at in curve:
        for name in ("gold", "oracle"):
            wanted = []
            for one in rows[:2]:
                by = one.scores if name == "gold" else one.golds
                choices = itertools.combinations(range(len(by)), at["n"])
                wanted.append(np.mean([one.golds[max(choice, key=by.__getitem__)] for choice in choices]))
            assert at[name]["mean"] == pytest.approx(np.mean(wanted))
    assert best_of(rows[2:]) == []


def test_the_scores_of_the_first_reward_bench():
    """Weights are rows, but math-prm counts as all code; equal scores are lost; prior sets count half."""
    won = {
        "alpacaeval-easy": [1, 0],
        "mt-bench-med": [1],
        "math-prm": [0],
        "hep-cpp": [1],
        "hep-go": [1],
        "shp": [1, 1],
    }
    rows = [scored([x, 0], subset=name, bench=1) for name, of in won.items() for x in of]
    found = reward_bench(rows)["RewardBench"]
    chat, reasoning = (0.5 * 100 + 40) / 140, (2 * 164) / (984 + 2 * 164)
    assert found["sections"] == {
        "Chat": pytest.approx(chat), "Reasoning": pytest.approx(reasoning), "Prior Sets": 1.0
    }  # fmt: skip
    assert found["score"] == pytest.approx((chat + reasoning + 0.5) / 2.5)
    assert "refusals-dangerous" in found["missing"] and "summarize" not in found["missing"]
    assert sum(SECTIONS["Reasoning"].values()) == 2 * 984


def test_the_scores_of_the_second_reward_bench_and_of_its_ties():
    rows = [scored(s, [0, 1, 1, 1], subset="Math", bench=2) for s in ([3, 1, 2, 0], [1, 3, 0, 0], [2, 2, 1, 0])]
    found = reward_bench(rows)["RewardBench 2"]
    assert found["score"] == pytest.approx((1 + 0 + 1 / 2) / 3) and found["missing"][0] == "Factuality"
    ties = [
        scored([5, 4, 1], [0, 0, 1], subset="Ties", bench=2, id="tied:0"),  # gap 3, spread 1
        scored([1.5, 1], subset="Ties", bench=2, id="ref:0"),  # gap 1/2
        scored([9, 4, 3], [0, 0, 1], subset="Ties", bench=2, id="tied:1"),  # gap 1, spread 5
        scored([1, 3], subset="Ties", bench=2, id="ref:1"),  # gap -2
        scored([1, 1, 0], [0, 0, 1], subset="Ties", bench=2, id="tied:2"),  # gap 1, spread 0
        scored([1, 0], subset="Ties", bench=2, id="ref:2"),
        scored([0, 1, 2], [0, 0, 1], subset="Ties", bench=2, id="tied:3"),  # no ref row: in the accuracy alone
    ]
    wanted = 0.3 * 3 / 4 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3
    wanted += 0.01 * (math.tanh(0.5 / 1 - 1) + math.tanh(-2 / 5 - 1) + 1) / 3
    assert ties_score(ties) == pytest.approx(wanted)
    assert reward_bench(rows + ties)["RewardBench 2"]["score"] == pytest.approx((0.5 + wanted) / 2)
    for wrong in (replace(ties[0], id="0"), replace(ties[0], id="tie:0"), scored([1, 1], [0, 0], bench=2, id="ref:0")):
        with pytest.raises(UserError, match="a row of RewardBench 2's Ties has the id"):
            ties_score([wrong])


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(rewards, "make_mesh", lambda config: make_mesh(config, devices=ONE))


def length(prompts, responses, **columns):
    return [len(text) for text in responses]


def settings(path, **changes):
    return replace(
        EvaluateArgs(output_dir=str(path), batch_size=8, max_prompt_length=8, max_length=32, progress=False), **changes
    )


def test_a_reward_on_the_rows_of_a_file_with_what_its_functions_are_given(tmp_path, capsys):
    """Both forms of RewardBench's rows, a ranking and a preference in one file; it goes on where it was finished."""
    rows = [
        {"prompt": "a", "chosen": "bb", "rejected": "b", "subset": "hep-go", "id": 7, "answer": "x"},
        {
            "prompt": "a",
            "chosen": ["bbb", "bb"],
            "rejected": ["b"],
            "subset": "Ties",
            "id": "tied:1",
            "num_correct": 2,
        },
        {"prompt": "a", "chosen": ["bb"], "rejected": ["b", "c"], "subset": "Ties", "id": "ref:1"},
        {"prompt": "b", "responses": [{"text": "a", "rank": 1, "gold": 3}, {"text": "aaa", "rank": 0, "gold": 9}]},
        {
            "prompt": "c",
            "chosen": "d",
            "rejected": "dd",
            "subset": "Math",
        },  # a name of RewardBench 2, but not its form
        {"prompt": "c", "chosen": "d", "rejected": "d"},
    ]
    path, seen = tmp_path / "rows.jsonl", []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def mine(prompts, responses, *, answer=None, **columns):
        seen.extend(zip(prompts, answer, strict=True))
        return length(prompts, responses)

    config = settings(tmp_path / "out", preference_path=str(path))
    summary = run_evaluate(config, functions=[mine])
    assert summary["accuracy"]["accuracy"] == pytest.approx(4 / 5) and summary["rows"] == 5
    assert (summary["accuracy"]["pairs"], summary["accuracy"]["ties"]) == (7, 0), "equals of RewardBench are no ties"
    assert {name: of["accuracy"] for name, of in summary["subsets"].items()} == {
        "hep-go": 1,
        "Ties": 1,
        "none": 1,
        "Math": 0,
    }
    assert summary["reward_bench"]["RewardBench"]["sections"] == {"Reasoning": 1.0}
    gap_and_spread = 0.3 + 0.3 + 0.01 * math.tanh(1 / 1 - 1)  # both gaps are 1, and so is the spread
    assert summary["reward_bench"]["RewardBench 2"]["sections"] == {"Ties": pytest.approx(gap_and_spread)}
    assert [at["gold"]["mean"] for at in summary["best_of_n"]] == [6.0, 9.0]
    assert seen[0] == ("\n\nHuman: a\n\nAssistant:", "x") and seen[-1] == ("c", None)
    told = capsys.readouterr().out
    assert "rows: kept 5 of 6 rows; dropped 1 with chosen equal to rejected" in told and "RewardBench 2: 0.600" in told
    (first, *_) = read_rows(str(tmp_path / "out" / "scored.jsonl"))
    assert first["scores"] == [2.0, 1.0] and first["answer"] == "x"
    count = len(seen)
    assert run_evaluate(config, functions=[mine]) == summary and len(seen) == count
    older = {name: value for name, value in summary.items() if name != "likings"}
    (tmp_path / "out" / "summary.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"summary.json is not as this version writes it \(KeyError: 'likings'\)"):
        run_evaluate(config, functions=[mine])
    given = run_evaluate(settings(tmp_path / "gold"), preference_rows=rows[4:5], functions=[length], gold=length)
    assert given["best_of_n"][-1]["gold"]["mean"] == 2.0
    unsaid = [{"prompt": "u", "responses": ["a", "bb"]}, {"prompt": "v", "responses": ["a", "b"], "ranks": [0, 0]}]
    some = run_evaluate(settings(tmp_path / "some"), preference_rows=[*rows[4:5], *unsaid], functions=[length])
    assert (some["rows"], some["accuracy"]["rows"]) == (3, 1)
    assert "2 of 3 rows have no two responses that labels order, and no accuracy\n" in capsys.readouterr().out


def test_what_is_said_of_responses_stands_in_their_places_and_a_reward_that_fails_may_be_skipped(tmp_path, capsys):
    rows = [
        {"prompt": "p", "responses": ["a", "", "ccc"], "ranks": [0, 1, 2]},
        {"prompt": "q", "responses": [{"text": "a"}, {"text": "bb"}, {"text": None}], "ranks": [1, 0, None]},
        {"prompt": "s", "responses": ["dd", "d"], "ranks": [None, None]},  # so nobody said, and gold is asked
    ]

    def moody(prompts, responses, **columns):
        if "q" in prompts:
            raise OSError("gone")
        return length(prompts, responses)

    reward = RewardSourceConfig(functions=["a:b"], retries=0)
    config = settings(tmp_path / "out", batch_size=1, reward=reward)
    with pytest.raises(UserError, match=r"set reward\.on_failure skip"):
        run_evaluate(config, preference_rows=rows, functions=[moody], gold=length)
    config = replace(config, output_dir=str(tmp_path / "skip"), reward=replace(reward, on_failure="skip"))
    summary = run_evaluate(config, preference_rows=rows, functions=[moody], gold=length)
    assert (summary["unscored"], summary["accuracy"]["pairs"], summary["accuracy"]["accuracy"]) == (1, 2, 0.5)
    told = capsys.readouterr().out
    assert "kept 3 of 3 rows; dropped 0; truncated 0; 2 responses that are null or empty, left out" in told
    assert (
        "! 1 rows with a response that has no score are left out: the reward failed, or a judge gave no answer" in told
    )
    said = read_rows(str(tmp_path / "skip" / "scored.jsonl"))
    assert [row["scores"] for row in said] == [[1.0, None, 3.0], [None, None, None], [2.0, 1.0]]
    assert [row["golds"] for row in said] == [[1.0, None, 3.0], [1.0, 2.0, None], [2.0, 1.0]]


def test_an_evaluation_whose_last_write_failed_is_not_that_which_was_to_be_replaced(tmp_path, monkeypatch):
    pairs = [{"prompt": "a", "chosen": "bb", "rejected": "b"}]
    place, given = tmp_path / "e", {"preference_rows": pairs, "functions": [length]}
    (place / "below").mkdir(parents=True)
    (place / "responses.jsonl").write_text("{}\n")  # of another evaluation
    (place / "below" / "responses.jsonl").write_text("{}\n")
    run_evaluate(settings(place, overwrite=True), **given)
    left = {"below", "config.yaml", "scored.jsonl", "summary.json"}
    assert {path.name for path in place.iterdir()} == left and (place / "below" / "responses.jsonl").exists()
    (place / "summary.json").write_text((place / "summary.json").read_text().replace('"rows": 1', '"rows": 9'))
    (place / "scored.jsonl").write_text("{}\n")
    other = settings(place, seed=5, overwrite=True)

    def full(files):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"computed is in .*scored.jsonl.part; mend"):
        patch.setattr("rlhf_jax.runs.journal.put_files", full)
        run_evaluate(other, **given)
    with pytest.raises(UserError, match=r"scored.jsonl exists; choose another name or pass --overwrite true"):
        run_evaluate(replace(other, overwrite=False), **given)
    assert run_evaluate(other, **given)["rows"] == 1 and {path.name for path in place.iterdir()} == left
    assert run_evaluate(replace(other, overwrite=False), **given)["rows"] == 1


def test_the_seed_is_of_what_a_judge_writes(tmp_path, monkeypatch):
    keys = []

    class Scorer(rewards.Scorer):
        def __call__(self, rows, key):
            keys.append(str(jax.random.key_data(key)))
            return super().__call__(rows, key)

    monkeypatch.setattr(rewards, "Scorer", Scorer)
    rows = [{"prompt": p, "chosen": "bb", "rejected": "b"} for p in "abc"]
    for seed in (0, 1):
        config = settings(tmp_path / str(seed), batch_size=2, seed=seed)
        run_evaluate(config, preference_rows=rows, functions=[length])
    assert len(set(keys)) == 4


def test_a_reward_model_is_scored_as_score_does(tmp_path):
    rows = [{"prompt": p, "chosen": "b c d", "rejected": "c"} for p in ("b", "c", "d")]
    model = RewardSourceConfig(model=str(toy_directory() / "reward"))
    summary = run_evaluate(settings(tmp_path / "e", reward=model), preference_rows=rows)
    margins = [row["scores"][0] - row["scores"][1] for row in read_rows(str(tmp_path / "e" / "scored.jsonl"))]
    assert summary["accuracy"]["accuracy"] == np.mean([(1 + np.sign(m)) / 2 for m in margins])
    assert len(set(margins)) == 3 and summary["calibration"]["loss"] == pytest.approx(
        np.mean([math.log1p(math.exp(-m)) for m in margins])
    )


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^nothing is evaluated; give reward.model"):
        run_evaluate(settings(tmp_path / "e"), preference_rows=[{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(UserError, match=r"^no two responses to a prompt are compared; give preference rows"):
        run_evaluate(
            settings(tmp_path / "e"), preference_rows=[{"prompt": "a", "responses": ["b", "c"]}], functions=[length]
        )
    with pytest.raises(UserError, match="pass_at does nothing with preference_path, which evaluates a reward"):
        settings(tmp_path / "e", preference_path="x", pass_at=[1])
    with pytest.raises(UserError, match="max_prompt_length 8 is not below max_length 8, so a response has no room"):
        settings(tmp_path / "e", preference_path="x", max_length=8)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data in {DATA}")
def test_on_real_preferences_length_is_a_poor_reward_and_its_calibration_is_worse(tmp_path):
    pairs = run_evaluate(
        settings(tmp_path / "a", preference_path=str(DATA / "pandalm_human.pref.jsonl.gz"), batch_size=900),
        functions=[length],
    )
    assert 0.4 < pairs["accuracy"]["accuracy"] < 0.7 and pairs["likings"]["reward"]["longer_wins"] == 1.0
    assert pairs["prompts"] < pairs["rows"] == 855 and pairs["calibration"]["ece"] > 0.2
    assert pairs["likings"]["labels"]["longer_wins"] == pytest.approx(pairs["accuracy"]["accuracy"], abs=0.05)
