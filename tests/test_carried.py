"""What rows of prompts hold besides stands in the rows that commands make of them, or it is said what does not."""

from __future__ import annotations

import functools
import json

import pytest
from tiny import ONE, toy_directory, toy_run

from rlhf_jax import sft
from rlhf_jax.commands import bestofn, collect, datasets, evaluate, rate, sample
from rlhf_jax.commands.label.items import items_of
from rlhf_jax.commands.label.server import Page, items_for
from rlhf_jax.commands.label.votes import Votes
from rlhf_jax.config import (
    BestOfNArgs,
    CollectArgs,
    DataAggregateArgs,
    DataConfig,
    EvaluateArgs,
    GroupConfig,
    GRPOArgs,
    JudgeArgs,
    LabelArgs,
    ModelConfig,
    RateArgs,
    RunConfig,
    SampleArgs,
    SamplingConfig,
    ScoreArgs,
    SFTArgs,
    SFTConfig,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.data.rows import layout_of
from rlhf_jax.data.sources import rows_from
from rlhf_jax.feedback import judges, sources
from rlhf_jax.feedback.judge import Judge
from rlhf_jax.group import train as group_train
from rlhf_jax.sharding import make_mesh

OWN = {
    "id": 7, "answer": "18", "subset": None, "source": "a\u2028\ud800", "text": "t", "nested": {"a": [1, {"b": 0.1}]},
    "": 1, "item": 3, "instruction": "none", "output": "o", "time": "now",
}  # fmt: skip
"""Fields of the prompt alone."""
OTHERS = {"response": "old", "label": "positive", "rating": 3, "score": 0.5, "gold": 1, "documents": "d", "rank": 1}
"""Fields of an answer that the row had, and one that is no more than it looks."""
ROWS = [{"prompt": prompt, **OWN, **OTHERS, "prompt_seen": "x"} for prompt in "bcd"]
SAID = (
    "fields that are not carried along, being of other answers, no JSON or names of ours: 'documents' of 3, 'gold' of "
    "3, 'label' of 3, 'rating' of 3, 'response' of 3, 'score' of 3; rename what should be\n"
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    for module in (judges, sources, sample):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, devices=ONE))


def length(prompts, responses, **columns):
    assert columns["answer"] == ["18"] * len(prompts) and set(columns["label"]) == {"positive"}
    return [float(len(text)) for text in responses]


def drawn(tmp_path, name, **changes):
    """The rows that a command makes of ROWS."""
    common = {
        "model": ModelConfig(path=str(toy_directory() / "policy")), "max_prompt_length": 4, "batch_size": 12,
        "sampling": SamplingConfig(max_new_tokens=5, chunk=5), "num_samples": 4,
    }  # fmt: skip
    if name == "sample":
        path = tmp_path / "rows.jsonl"
        sample.print_rows(ROWS, str(path))
        return sample.run_sample(SampleArgs(data_path=str(path), output=str(tmp_path / "o.jsonl"), **common))
    common |= {"progress": False, **changes}
    if name == "evaluate":
        evaluate.run_evaluate(EvaluateArgs(output_dir=str(tmp_path / "e"), **common), rows=ROWS)
        return rows_from(str(tmp_path / "e" / "responses.jsonl"))
    common["output"] = str(tmp_path / "o.jsonl")
    if name == "bestofn":
        bestofn.run(BestOfNArgs(**common), rows=ROWS, functions=[length])
        return rows_from(common["output"])
    return collect.run_collect(CollectArgs(label="reward", **common), rows=ROWS, functions=[length])


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("sample", "prompt-completion", {}),
        ("bestofn", "prompt-completion", {}),
        ("evaluate", "ranking", {}),
        ("collect", "ranking", {}),
        ("collect", "preference", {"schema": "preference"}),
        ("collect", "prompt-completion", {"schema": "sft"}),
    ],
)
def test_rows_with_responses_hold_what_their_prompts_held(tmp_path, capsys, name, kind, changes):
    rows = drawn(tmp_path, name, **changes)
    assert capsys.readouterr().err.count(SAID) == 1
    assert {row["prompt"] for row in rows} == set("bcd") and {layout_of(row) for row in rows} == {kind}
    for row in rows:
        assert {name: row[name] for name in OWN} == OWN and row["rank"] == 1
        assert not {"label", "rating", "documents", "prompt_seen"} & set(row)
        assert row.get("response") != "old" and row.get("score") != 0.5 and "gold" not in row


def test_rows_with_verdicts_hold_what_rows_with_responses_held(tmp_path, capsys):
    rows = [{"prompt": p, "responses": ["a", "bb"], "ranks": [1, 0], **OWN, "score": 1} for p in "bcd"]
    pairs = [{"prompt": p, "chosen": "a", "rejected": "bb", "votes": [2, 1, 0], **OWN} for p in "bcd"]
    held = lambda rows: all({name: row[name] for name in OWN} == OWN for row in rows)  # noqa: E731
    longer = Judge(lambda questions, key: [float(len(a) > len(b)) for _, a, b in questions])
    for given in (rows, pairs):
        capsys.readouterr()
        judged = collect.run_judge(JudgeArgs(output=str(tmp_path / "j.jsonl"), progress=False, overwrite=True),
                                   rows=given, judge=longer)  # fmt: skip
        said = capsys.readouterr().err
        assert ("'score' of 3; rename" in said) == (given is rows) and "votes" not in said
        none = lambda prompts, responses, **columns: [0.0] * len(prompts)  # noqa: E731
        rated = [rate.run(RateArgs(verdict=verdict), rows=given, function=none) for verdict in ("ranks", "rating")]
        assert [len(judged), *map(len, rated)] == [3, 3, 6] and held([*judged, *rated[0], *rated[1]])


def test_rows_joined_to_one_hold_that_in_which_they_are_alike(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "b", "responses": ["a", "bb"], "ranks": [1, 0], "rater": r, "id": 1, "x": r} for r in "st"]
    rows += [{"prompt": "c", "responses": ["a", "bb"], "ranks": [1, 0], **OWN}]
    rows += [{"prompt": "c", "responses": ["a", "bb"], "ranks": [1, 0], **OWN, "more": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = datasets.run_aggregate(DataAggregateArgs(path=str(path), output=str(tmp_path / "o.jsonl")))
    assert first["id"] == 1 and "x" not in first and {name: second[name] for name in OWN} == OWN
    assert "fields in which rows of a prompt differ are left out: 'x' of 1, 'more' of 1" in capsys.readouterr().out


def test_votes_hold_what_their_rows_held_and_what_they_say_themselves_is_theirs(tmp_path, capsys):
    own = {**OWN, "comment": "mine", "check": {"passed": True}, "rating_x": "high", "seconds": "few"}
    rows = [{"prompt": p, "responses": ["a", "bb"], **own} for p in "bc"]
    path, config = tmp_path / "rows.jsonl", LabelArgs(output=str(tmp_path / "votes.jsonl"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, _ = items_for(config, str(path))
    said = capsys.readouterr().err
    assert all(f"'{name}' of 2" in said for name in ("comment", "check", "rating_x", "seconds", "time"))
    for _ in range(2):  # a second time they are read
        votes = Votes(config.output, items)
        page = Page(items, votes, config)
        for rater in ("ann", "ben"):
            for item in items:
                page.answer(
                    {"rater": rater, "item": item.key, "ranks": {name: i for i, name in enumerate(item.names)}}
                )
        assert page.votes.checks("ann") == (0, 0) and len(page.votes.agreement()["raters"]) == 2
        votes.close()
    kept = {name: value for name, value in OWN.items() if name not in ("time", "item")}
    for row in (read := rows_from(config.output)):
        assert {name: row[name] for name in kept} == kept and layout_of(row) == "ranking" and "time" not in row
    assert "4 votes do not count, their raters having changed them later\n" in capsys.readouterr().err
    again, _ = items_of(read)  # and ranked anew
    assert [item.ranking.fields["answer"] for item in again] == ["18", "18"]


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_samples_of_sft_are_of_prompts_that_it_reads_and_say_what_was_seen(tmp_path, too_long):
    rows = [{"prompt": prompt, "response": " a"} for prompt in ("b", "c d e f", "d")]
    config = SFTArgs(
        model=ModelConfig(path=str(toy_directory() / "policy")),
        data=DataConfig(batch_size=8, max_prompt_length=2, max_length=8, too_long=too_long),
        sft=SFTConfig(steps=1, num_samples=3),
        sampling=SamplingConfig(max_new_tokens=4, chunk=4),
        run=RunConfig(output_dir=str(tmp_path / "run"), progress=False),
    )
    sft.run(config, rows=rows * 4, eval_rows=rows)
    told = [(row["prompt"], row.get("prompt_seen")) for row in rows_from(str(tmp_path / "run" / "samples.jsonl"))]
    assert set(told) == {("b", None), ("d", None)} | ({("c d e f", "e f")} if too_long == "truncate" else set())


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_samples_of_an_online_run_say_what_was_seen_of_prompts_that_were_cut(tmp_path, monkeypatch, too_long):
    monkeypatch.setattr(group_train, "make_mesh", functools.partial(make_mesh, devices=ONE))
    toy, rows = toy_run(), [{"prompt": prompt} for prompt in ("b", "c d e f", "d")]
    config = GRPOArgs(
        model=toy.model, data=replace(toy.data, batch_size=6, max_prompt_length=2, too_long=too_long),
        sampling=toy.sampling, run=replace(toy.run, output_dir=str(tmp_path / "run"), eval_every=1),
        grpo=GroupConfig(iterations=2, group_size=2, num_samples=6, sample_every=1),
    )  # fmt: skip
    asked = []

    def reward(prompts, responses):
        asked.append(len(prompts))
        return [1.0] * len(prompts)

    group_train.run(config, rows=rows, eval_rows=rows, reward_functions=[reward])
    held_out = 3 if too_long == "truncate" else 2  # without the copies that fill a batch up
    assert asked == [held_out, 6, held_out, 6, held_out]
    samples = rows_from(str(tmp_path / "run" / "samples.jsonl"))
    assert len({row["step"] for row in samples}) == 3 and len(samples) > 6
    told = {(row["prompt"], row.get("prompt_seen")) for row in samples}
    assert told == {("b", None), ("d", None)} | ({("c d e f", "e f")} if too_long == "truncate" else set())


def test_scores_that_rows_have_are_not_those_that_are_written_and_it_is_said(tmp_path, capsys):
    own = {"score": 9.0, "scores": [1, 2], "cut": True, "id": 1, "votes": None}
    rows = [
        {"prompt": "b", "response": "c", **own},
        {"prompt": "b", "chosen": "c", "rejected": "d", "score_chosen": 8.0},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ModelConfig(path=str(toy_directory() / "reward"))
    limits = {"max_prompt_length": 4, "max_length": 8}
    first, second = sample.run_score(ScoreArgs(model=model, data_path=str(path), output=str(tmp_path / "o"), **limits))
    names = "'cut' of 1, 'score' of 1, 'scores' of 1, 'score_chosen' of 1"
    assert f"fields that are written anew, the old ones are not kept: {names}\n" in capsys.readouterr().err
    assert set(first) == {"prompt", "response", "id", "votes", "score"} and first["score"] != 9
    assert set(second) == {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}
