"""Simulated raters agree with their taste as far as their noise lets them; made files are whole or not there."""

from __future__ import annotations

import errno
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from disk import fails

from rlhf_jax.commands import datasets, rate
from rlhf_jax.commands.datasets import run_make
from rlhf_jax.config import DataMakeArgs, RateArgs
from rlhf_jax.data.ballots import ranking_row
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import outputs
from rlhf_jax.tasks import random_walks as walks

ROWS = [{"prompt": f"p{i}", "responses": ["ccc", {"text": "a", "finished": False}, "bb", "a"]} for i in range(200)]


def length(prompts, responses, **columns):
    return [float(len(text)) for text in responses]


def test_without_noise_every_rater_says_what_the_function_says():
    rows = rate.run(RateArgs(raters=3), rows=ROWS, function=length)
    assert len(rows) == 200
    assert [one["ranks"] for one in rows[0]["raters"]] == [[0, 2, 1, 2]] * 3
    assert [item["finished"] for item in rows[0]["responses"]] == [True, False, True, True]
    assert len(ranking_row(rows[0]).ballots) == 3


def test_noise_is_in_standard_deviations_and_each_raters_own():
    rows = rate.run(RateArgs(raters=2, noise=1.0, seed=1), rows=ROWS, function=length)
    ranks = np.array([[one["ranks"] for one in row["raters"]] for row in rows])  # [rows, raters, K]
    right = (ranks[..., 0] < ranks[..., 2]).mean()  # lengths 3 and 2 differ by 1, the noise of both by sqrt(2) std
    std = np.std([3, 1, 2, 1])
    assert abs(right - 0.5 * (1 + np.vectorize(math.erf)(1 / (2 * std)))) < 0.06
    assert 0.1 < (ranks[:, 0] != ranks[:, 1]).mean() < 0.9
    again = rate.run(RateArgs(raters=2, noise=1.0, seed=1), rows=ROWS, function=length)
    assert again == rows and rate.run(RateArgs(raters=2, noise=1.0, seed=2), rows=ROWS, function=length) != rows


def test_ratings_part_the_range_into_equal_levels():
    rows = rate.run(RateArgs(verdict="rating", levels=2), rows=ROWS[:1], function=length)
    assert [(row["response"], row["rating"]) for row in rows] == [("ccc", 2.0), ("a", 1.0), ("bb", 2.0), ("a", 1.0)]
    assert rate.levels(np.array([0.0, 0.19, 0.21, 1.0, 1.5, -3]), 0.0, 1.0, 5).tolist() == [1, 1, 2, 5, 5, 1]
    assert rate.levels(np.array([4.0, 4.0]), 4.0, 4.0, 5).tolist() == [1, 1]  # all equal: no range to part


@pytest.mark.parametrize("output", ["", "o.jsonl"])
def test_rows_and_responses_that_are_left_out_are_counted_wherever_the_others_go(tmp_path, capsys, output):
    rows = [*ROWS[:2], {"prompt": "p", "responses": ["a", None]}, {"prompt": "p", "responses": ["a", "b", ""]}]
    rows.append({"prompt": "p", "completion": "alone", "label": True})
    rate.run(RateArgs(output=output and str(tmp_path / output)), rows=rows, function=length)
    said = capsys.readouterr()
    assert "2 responses that are null or empty, left out" in said.err
    assert "! rate: 3 rows, 2 dropped, 1 raters; 3 rows" in (said.out if output else said.err)
    assert output or len(said.out.splitlines()) == 3


def test_rows_without_two_responses_are_left_out():
    with pytest.raises(UserError, match="none of 1 rows has two responses"):
        rate.run(RateArgs(), rows=[{"prompt": "p", "responses": ["a", None]}], function=length)


def test_the_walks_by_name_are_those_of_graph_0(tmp_path):
    run_make(DataMakeArgs(function="rlhf_jax.tasks.random_walks:write", out=str(tmp_path / "t"), num=30))
    read = lambda name: [json.loads(line) for line in (tmp_path / "t" / name).read_text().splitlines()]  # noqa: E731
    demos, held_out = read("demonstrations.jsonl"), read("held_out.jsonl")
    assert [len(demos), len(held_out), len(read("prompts.jsonl")), len(read("eval_prompts.jsonl"))] == [30, 3, 30, 240]
    assert demos + held_out == walks.demonstrations(walks.make_graph(0), 33, 0)
    prompts, texts = [row["prompt"] for row in demos], [row["response"] for row in demos]
    gold = walks.gold(prompts, texts)
    assert gold == walks.optimality(walks.make_graph(0), prompts, texts) and max(gold) > 0
    best, worst = int(np.argmax(gold)), int(np.argmin(gold))
    straight = walks.judge(prompts[best], texts[best], "b")
    turned = walks.judge(prompts[best], "b", texts[best])
    assert straight > 0.5 and straight > 1 - turned > 0.5 - gold[best]  # it likes the first place
    assert walks.judge(prompts[worst], texts[worst], texts[worst]) > 0.5


def make(directory: Path, num: int, seed: int) -> None:
    (directory / "rows.jsonl").write_text("x" * num)
    if seed:
        raise UserError("no such seed")


def make_several(directory: Path, num: int, seed: int) -> None:
    for name in "abc"[:num]:
        (directory / name).write_text("new")
    if num > 2:
        (directory / "d").mkdir()
        (directory / "d" / "e").write_text("new")


def nothing(directory: Path, num: int, seed: int) -> None:
    pass


@pytest.mark.parametrize("refused", ["", "a", "c", "exists", "bucket"])
def test_what_a_function_made_outlives_the_failure_to_put_it_in_place(tmp_path, monkeypatch, refused):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b").write_text("old")
    settings = DataMakeArgs(function=f"{__name__}:make_several", out=str(out), num=3, overwrite=refused != "exists")

    def upload(folder, url):
        raise UserError(f"{url}: no answer")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        if refused == "bucket":
            settings = replace(settings, out="gs://nobody/there")
            patch.setattr(datasets, "there", lambda path: "")
            patch.setattr(outputs, "upload_tree", upload)
        elif refused != "exists":
            fails(patch, "replace", {0}, of=f".making/{refused}" if refused else "nothing", code=errno.EROFS)
        if not refused:
            run_make(settings)
            assert not [path for path in tmp_path.rglob("*") if "made" in path.name or "making" in path.name]
            return
        said = {"bucket": "gs://nobody/there: no answer", "exists": "b exists.*true"}.get(refused, "Read-only.*")
        with pytest.raises(UserError, match=rf"{said}; what was to be written is in /") as error:
            run_make(settings)
    kept = Path(str(error.value).split()[-1])
    found = [
        *(path for path in out.iterdir() if path != kept and (path.name != "b" or path.read_text() != "old")),
        *kept.iterdir(),
    ]
    assert not list(tmp_path.rglob(".making")) and {path.name for path in found} == set("abcd")
    assert (kept / "d" / "e").read_text() == "new" or (out / "d" / "e").read_text() == "new"
    if refused != "c":
        assert (out / "b").read_text() == "old"


def test_a_function_that_makes_nothing_is_an_error(tmp_path):
    settings = DataMakeArgs(function=f"{__name__}:nothing", out=str(tmp_path))
    with pytest.raises(UserError, match="nothing wrote nothing into the folder that it was given; correct it"):
        run_make(settings)


def test_files_are_made_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    settings = {"function": f"{__name__}:make", "out": str(out)}
    with pytest.raises(UserError, match="no such seed"):
        run_make(DataMakeArgs(**settings, seed=1))
    assert list(out.iterdir()) == []
    (out / "notes.txt").write_text("mine")
    assert run_make(DataMakeArgs(**settings, num=3)) == ["rows.jsonl"]
    with pytest.raises(UserError, match=r"rows.jsonl exists; choose another --out or pass --overwrite true; what was"):
        run_make(DataMakeArgs(**settings, num=4))
    assert (out / "rows.jsonl").read_text() == "xxx"
    run_make(DataMakeArgs(**settings, num=4, overwrite=True))
    assert (out / "rows.jsonl").read_text() == "xxxx" and (out / "notes.txt").read_text() == "mine"


def test_the_function_gets_the_other_fields_of_rows():
    """As everywhere: a verifier asks for the answer."""
    rows = [{"prompt": "2 + 2?", "responses": ["#### 4", "#### 5"], "answer": "#### 4", "id": 7}]
    rated = rate.run(RateArgs(function="rlhf_jax.tasks.verifiers:gsm8k"), rows=rows)
    assert rated[0]["raters"][0]["ranks"] == [0, 1] and rated[0]["answer"] == "#### 4"
