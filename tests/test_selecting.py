"""Labels well spent: which responses a reward ensemble doubts, what collect keeps, and the order of the page."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections import Counter

import numpy as np
import pytest
from test_collecting import PROMPTS, more_vowels, one_device, read, settings  # noqa: F401
from test_ensembles import other  # noqa: F401
from tiny import ONE, toy_directory

from rlhf_jax.commands.collect import run_collect
from rlhf_jax.commands.label import drawing
from rlhf_jax.commands.label.items import items_of
from rlhf_jax.commands.label.server import Page, items_drawn
from rlhf_jax.commands.label.votes import Votes
from rlhf_jax.config import (
    CollectArgs,
    JudgeConfig,
    LabelArgs,
    ModelConfig,
    RewardJudgeConfig,
    RewardSourceConfig,
    SamplingConfig,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.selection import doubt, select
from rlhf_jax.runs import journal
from rlhf_jax.sharding import make_mesh

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(6, 5))
TEXTS = [f"r{i}" for i in range(6)]


def by_hand(i, j):
    chances = [1 / (1 + math.exp(float(b - a))) for a, b in zip(SCORES[i], SCORES[j], strict=True)]
    mean = sum(chances) / len(chances)
    return math.sqrt(sum((p - mean) ** 2 for p in chances) / len(chances))


def test_doubt_is_the_deviation_of_the_chances_and_the_pair_with_the_largest_is_chosen():
    expected = np.array([[by_hand(i, j) for j in range(6)] for i in range(6)])
    np.testing.assert_allclose(doubt(SCORES), expected, atol=1e-12)
    best = max(itertools.combinations(range(6), 2), key=lambda pair: by_hand(*pair))
    found = select("disagreement", TEXTS, SCORES, 2, RNG)
    assert tuple(found.places) == best and found.information == pytest.approx(by_hand(*best))
    three = select("disagreement", TEXTS, SCORES, 3, RNG)
    added = max(set(range(6)) - set(best), key=lambda k: by_hand(k, best[0]) + by_hand(k, best[1]))
    assert set(three.places) == {*best, added}
    assert three.information == pytest.approx(np.mean([by_hand(*p) for p in itertools.combinations(three.places, 2)]))
    shifted = SCORES + RNG.normal(size=(1, 5))  # a member's own zero says nothing of an order
    np.testing.assert_allclose(doubt(shifted), expected, atol=1e-12)
    agreed = np.repeat(SCORES[:, :1], 5, axis=1)
    assert select("disagreement", TEXTS, agreed, 2, RNG).information == pytest.approx(0)


def test_top_two_are_those_that_two_drawn_members_like_best():
    """Members 0 to 3 like r0, member 4 likes r1; so this pair is drawn but where thirty draws miss member 4."""
    scores = np.zeros((4, 5))
    scores[0, :4], scores[1, 4] = 1.0, 1.0
    found = Counter(tuple(select("top_two", TEXTS[:4], scores, 2, RNG).places) for _ in range(300))
    assert found[0, 1] >= 295 and all(0 in pair or 1 in pair for pair in found)
    alone = Counter(tuple(select("top_two", TEXTS[:4], scores[:, :4], 2, RNG).places) for _ in range(300))
    assert set(alone) == {(0, 1), (0, 2), (0, 3)} and min(alone.values()) > 60  # all like r0: then any other


@pytest.mark.parametrize("how", ["random", "disagreement", "top_two"])
def test_equal_texts_are_one_and_a_prompt_of_one_text_has_nothing_to_compare(how):
    scores = None if how == "random" else SCORES[:4]
    for _ in range(20):
        places = select(how, ["a", "b", "a", "c"], scores, 3, RNG).places
        assert places == [0, 1, 3]
        assert select(how, ["", "b", " \n", "c"], scores, 3, RNG).places == [1, 3]  # nobody can rank nothing
    assert len(select(how, ["a"] * 4, scores, 2, RNG).places) == 1
    assert select(how, ["", "a", "", " "], scores, 2, RNG).places == [1]
    assert select(how, [""] * 4, scores, 2, RNG).places == []


def test_collect_keeps_the_most_doubted_and_what_they_say_of_it_is_what_the_members_score(tmp_path, other):  # noqa: F811
    """By the scores that a labelled collect of each model writes for the same responses."""
    models = [str(toy_directory() / "reward"), other]
    each = []
    for number, model in enumerate(models):
        reward = RewardSourceConfig(model=model)
        each.append(run_collect(settings(tmp_path / f"{number}.jsonl", label="reward", reward=reward), rows=PROMPTS))
    # Together they say what `combine` makes of them, here and in all else that scores outside of training.
    reward = RewardSourceConfig(models=models, combine="lower_bound", combine_coef=0.5, model_weight=2.0)
    both = run_collect(settings(tmp_path / "both.jsonl", label="reward", reward=reward), rows=PROMPTS)
    said = [[[item["score"] for item in row["responses"]] for row in rows] for rows in (*each, both)]
    a, b, together = (np.concatenate(rows) for rows in said)
    np.testing.assert_allclose(together, (a + b) - np.abs(a - b) / 2, rtol=1e-4, atol=1e-5)
    chosen = {"select": "disagreement", "reward": RewardSourceConfig(models=models)}
    rows = run_collect(settings(tmp_path / "a.jsonl", **chosen), rows=PROMPTS)
    expected = []
    for first, second in zip(*each, strict=True):
        texts = [item["text"] for item in first["responses"]]
        scores = np.array([[item["score"] for item in row["responses"]] for row in (first, second)]).T
        found = select("disagreement", texts, scores, 2, RNG)
        if len(found.places) > 1:
            expected.append((found.information, first["prompt"], [texts[i] for i in found.places]))
    expected.sort(key=lambda each: -each[0])
    assert [(r["prompt"], [x["text"] for x in r["responses"]]) for r in rows] == [each[1:] for each in expected]
    np.testing.assert_allclose([r["information"] for r in rows], [each[0] for each in expected], atol=1e-5)
    summary = json.loads((tmp_path / "a.summary.json").read_text())
    assert summary["drawn"] == 35 and summary["information"] > 0 and summary["alike"] == 7 - len(rows)
    few = run_collect(settings(tmp_path / "few.jsonl", most=3, **chosen), rows=PROMPTS)
    assert few == rows[:3]
    with pytest.raises(UserError, match="has no other member to disagree with; name several in"):
        alone = RewardSourceConfig(model=models[0])
        run_collect(settings(tmp_path / "b.jsonl", select="top_two", reward=alone), rows=PROMPTS)


@pytest.mark.parametrize(("how", "share"), [("disagreement", 0.95), ("top_two", 0.5)])
def test_a_collect_that_chooses_goes_on_wherever_its_journal_was_cut(tmp_path, other, monkeypatch, how, share):  # noqa: F811
    """Within what the members say, which comes last, and within the responses."""
    reward = RewardSourceConfig(models=[str(toy_directory() / "reward"), other])
    config = settings(tmp_path / "a.jsonl", select=how, reward=reward)
    monkeypatch.setattr(journal.Journal, "finish", lambda self, *_: None)
    run_collect(config, rows=PROMPTS)
    path = tmp_path / "a.jsonl.part"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    run_collect(config, rows=PROMPTS)
    assert path.read_bytes() == whole and b'"members"' in whole


def test_only_what_is_kept_is_judged_and_any_are_kept_at_random_by_the_seed(tmp_path):
    judge = JudgeConfig(function="test_collecting:more_vowels")
    config = settings(tmp_path / "a.jsonl", select="random", most=5, label="judge", judge=judge)
    rows = run_collect(config, rows=PROMPTS)
    summary = json.loads((tmp_path / "a.summary.json").read_text())
    assert summary["judge"]["pairs"] <= 7 and 0 < len(rows) <= 5 and "information" not in rows[0]
    for row in rows:
        a, b = row["responses"]
        assert np.sign(a["rank"] - b["rank"]) == {"A": -1, "B": 1, "tie": 0}[more_vowels("", a["text"], b["text"])]
    assert read(tmp_path / "a.jsonl") == rows
    again = run_collect(settings(tmp_path / "b.jsonl", select="random", most=5, seed=1), rows=PROMPTS)
    assert [r["prompt"] for r in again] != [r["prompt"] for r in rows]


def of_no_b(prompt, a, b):
    return "?" if "b" in a + b else more_vowels(prompt, a, b)


def test_a_response_without_a_score_is_not_chosen_where_the_reward_labels(tmp_path):
    judge = RewardJudgeConfig(function="test_selecting:of_no_b", against="response")
    config = settings(tmp_path / "a.jsonl", label="reward", reward=RewardSourceConfig(judge=judge))
    prompts = [{**row, "response": " c d e"} for row in PROMPTS]
    drawn = run_collect(config, rows=prompts)
    unscored = [[item["score"] is None for item in row["responses"]] for row in drawn]
    assert 0 < sum(map(sum, unscored)) < sum(map(len, unscored))
    kept = run_collect(replace(config, select="random", overwrite=True), rows=prompts)
    assert len(kept) > 1 and all(item["score"] is not None for row in kept for item in row["responses"])
    answered = [{item["text"] for item in row["responses"] if item["score"] is not None} - {""} for row in drawn]
    assert len(kept) == sum(len(texts) > 1 for texts in answered)


def test_the_page_begins_with_the_row_of_the_most_information():
    rows = [{"prompt": str(i), "responses": ["a", "b"], "_where": "x", **({"information": x} if x else {})}
            for i, x in enumerate([0.1, None, 0.4, 0.2])]  # fmt: skip
    assert [item.ranking.prompt for item in items_of(rows)[0]] == ["2", "3", "0", "1"]


def labelling(tmp_path, **changes) -> LabelArgs:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    config = LabelArgs(
        path=str(path), output=str(tmp_path / "votes.jsonl"), model=ModelConfig(path=str(toy_directory() / "policy")),
        sampling=SamplingConfig(max_new_tokens=5, chunk=5), num_samples=3, max_prompt_length=2, batch_size=9,
    )  # fmt: skip
    return replace(config, **changes)


def wait_for(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_page_draws_what_collect_chooses_batch_by_batch_and_goes_on(tmp_path, other, monkeypatch):  # noqa: F811
    monkeypatch.setattr(drawing, "make_mesh", lambda config: make_mesh(config, devices=ONE))
    reward = RewardSourceConfig(models=[str(toy_directory() / "reward"), other])
    config = labelling(tmp_path, select="disagreement", reward=reward)
    same = {"sources": [], "num_samples": 3, "batch_size": 9, "select": "disagreement", "reward": reward}
    wanted = run_collect(settings(tmp_path / "a.jsonl", **same), rows=PROMPTS)
    with drawing.Supply(config) as supply:  # three batches: of 3, 3 and 1 prompts
        batches, waiting = list(supply.batches), [config.ahead]
        supply.start(lambda batch, rows: batches.insert(batch, rows), lambda: waiting[0])
        rows = batches[0]
        first = {row["prompt"] for row in PROMPTS[:3]}
        assert rows and {row["prompt"] for row in rows} <= first and len(supply.journal.rows) == 1
        waiting[0] = 0  # somebody has answered all of them
        wait_for(lambda: len(batches) == supply.count == 3)
    rows = [row for batch in batches for row in batch]
    said = lambda row: (row["prompt"], row["information"], [item["text"] for item in row["responses"]])  # noqa: E731
    assert [said(row) for row in sorted(rows, key=lambda row: -row["information"])] == [said(row) for row in wanted]
    with drawing.Supply(config) as again:
        assert again.batches == batches
    with pytest.raises(UserError, match=r"votes.jsonl.drawn.part is made with seed 0, not 1; .* or another --o"):
        drawing.Supply(replace(config, seed=1))
    monkeypatch.setattr(drawing, "contents", lambda config: {"model.path": "trained anew"})
    with pytest.raises(UserError, match=r"votes.jsonl.drawn.part is made with contents of model.path "):
        drawing.Supply(config)
    with pytest.raises(UserError, match=r"num_samples is of responses that a model draws; give model.path"):
        replace(config, model=ModelConfig())
    with pytest.raises(UserError, match="select disagreement asks a reward ensemble what it doubts"):
        drawing.Supply(replace(config, output=str(tmp_path / "other.jsonl"), reward=RewardSourceConfig()))


def test_a_policy_that_fails_leaves_the_page_with_what_is_there_and_its_rows_are_gone_on_with(tmp_path, monkeypatch):
    class Fake:
        """A row for every prompt, and none of the third while it is broken."""

        broken = True

        def __init__(self, config):
            self.prompts, self.size = PROMPTS[:4], 1

        def __call__(self, start):
            if start == 2 and self.broken:
                raise RuntimeError("out of memory")
            return [{"prompt": PROMPTS[start]["prompt"], "responses": [{"text": "a"}, {"text": "b"}]}]

    monkeypatch.setattr(drawing, "Drawing", Fake)
    checks = [{"prompt": f"check {i}", "chosen": "yes", "rejected": "no"} for i in range(2)]
    (tmp_path / "checks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checks))
    config = labelling(tmp_path, checks=str(tmp_path / "checks.jsonl"))
    with pytest.raises(UserError, match=r"drawing failed \(out of memory\); mend"), drawing.Supply(config) as supply:
        made, items = items_drawn(config, supply)
        with contextlib.closing(Votes(config.output, items)) as votes:
            page = Page(items, votes, config)
            assert (page.start()["total"], page.waiting()) == (1, 1)
            supply.start(lambda batch, rows: page.add(made(batch, rows)), page.waiting)
            wait_for(lambda: page.start()["total"] == 3)  # and the first of two checks, which four batches share
            shown = page.item("ada", 1)
            page.answer({"rater": "ada", "item": shown["item"], "ranks": {r["name"]: 0 for r in shown["responses"]}})
            assert page.waiting() == 2 and page.item("ada")["at"] == 0
            wait_for(lambda: supply.failure is not None)
    monkeypatch.setattr(Fake, "__call__", lambda self, start: [])
    with pytest.raises(UserError, match="no prompt has two different responses; raise num_samples or"):
        drawing.Supply(replace(config, output=str(tmp_path / "alike.jsonl")))
    monkeypatch.undo()
    monkeypatch.setattr(drawing, "Drawing", Fake)
    Fake.broken = False
    with drawing.Supply(config) as supply:
        made, again = items_drawn(config, supply)
        with contextlib.closing(Votes(config.output, again)) as votes:
            assert votes.raters() == ["ada"]  # whose answer is to an item that was drawn, or to its batch's check
    assert [item.key for item in again] == [item.key for item in page.items] and len(supply.batches) == 2
    kinds = [[item.known is not None for item in made(batch, [])] for batch in range(supply.count)]
    assert kinds == [[], [True], [], [True]]


def test_a_batch_of_which_nothing_can_be_ranked_is_counted_and_drawing_goes_on(tmp_path, monkeypatch):
    """Rows of which earlier versions said that they can be, prompts whose responses are alike, and an item again."""
    prompts = [{"prompt": name} for name in "abcd"]
    texts = {0: ["x", "y"], 1: ["x", ""], 3: ["x", "y"]}

    class Fake:
        def __init__(self, config):
            self.prompts, self.size = prompts, 1

        def __call__(self, start):
            responses = [{"text": text} for text in texts.get(start, ())]
            return [{"prompt": "a", "responses": responses}] * bool(responses)

    monkeypatch.setattr(drawing, "Drawing", Fake)
    paths = {"path": "prompts.jsonl", "output": str(tmp_path / "votes.jsonl"), "model": ModelConfig(path="policy")}
    config, items = LabelArgs(**paths, max_prompt_length=2), []
    for batches in (1, 4):
        with drawing.Supply(config) as supply:
            assert len(supply.batches) == batches
            made, items = items_drawn(config, supply)
            supply.start(lambda batch, rows: items.extend(made(batch, rows)), lambda: 0)  # noqa: B023
            wait_for(lambda: len(supply.journal.rows) == 4 and not supply._thread.is_alive())
        assert len(items) == 1 and supply.left == {
            "with fewer than two responses": 1,
            "responses that are null or empty, left out": 1,
            "prompts without two different responses": 1,
            "there already": 1,
        }
    with pytest.raises(UserError, match="selected is 13; make it between 2 and 12"):
        replace(config, selected=13, num_samples=16)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"select": "disagreement"}, "so it labels nothing; name it by reward.models"),
        ({"select": "top_two", "label": "reward", "reward": {"model": "a"}}, "set label none, judge or sources"),
        ({"most": 3}, "most and selected do nothing with select all"),
        ({"select": "random", "selected": 1}, "selected is 1; make it at least 2"),
        ({"select": "random", "num_samples": 1}, "selected 2 of 1 responses to a prompt cannot be; raise num_samples"),
        ({"select": "random", "reward": {"model": "a"}}, "reward does nothing with label none"),
        ({"select": "top_two", "reward": {"model": "a", "functions": ["a:b"]}}, "asks reward models; leave out"),
    ],
)
def test_selections_that_cannot_be_made_say_so(options, line):
    reward = RewardSourceConfig(**options.pop("reward", {}))
    with pytest.raises(UserError, match=line):
        CollectArgs(reward=reward, **options)
