"""`rlhf-jax collect` and `judge`: the same file whatever stops them, labels of every kind, and filters of pairs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST
from tiny import ONE, TOY_ROWS, toy_directory

from rlhf_jax import cli
from rlhf_jax.commands.collect import run_collect, run_judge
from rlhf_jax.commands.rejection import sampling_of
from rlhf_jax.commands.sample import print_rows, run_score
from rlhf_jax.config import (
    CollectArgs,
    DataConfig,
    JudgeArgs,
    JudgeConfig,
    MeshConfig,
    ModelConfig,
    RejectionArgs,
    RewardSourceConfig,
    SamplingConfig,
    SourceConfig,
)
from rlhf_jax.data.ballots import ranking_row
from rlhf_jax.data.consensus import consensus_ranks
from rlhf_jax.data.pairs import Pair, almost_filter, balance_filter, length_bias, pairs_of, shares_of
from rlhf_jax.data.rows import carried
from rlhf_jax.data.schemas import columns_of, preference_row, sft_row
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.feedback import judges, phases, sources
from rlhf_jax.feedback.judge import Judge
from rlhf_jax.feedback.phases import source_name
from rlhf_jax.feedback.sources import prompts_of, with_shots, within_limits
from rlhf_jax.runs import journal
from rlhf_jax.sharding import make_mesh

PROMPTS = TOY_ROWS["rows"][:7]
HOT, COLD = SourceConfig(name="hot", temperature=2.0, num_samples=3), SourceConfig(name="cold", temperature=0.5)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Compiling for eight costs more than these tests are worth."""
    for module in (judges, sources):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, devices=ONE))


def settings(output: Path, **changes) -> CollectArgs:
    config = CollectArgs(
        model=ModelConfig(path=str(toy_directory() / "policy")),
        sampling=SamplingConfig(max_new_tokens=5, chunk=5),
        sources=[HOT, COLD],
        num_samples=2,
        max_prompt_length=2,
        batch_size=6,
        output=str(output),
        progress=False,
    )
    return replace(config, **changes)


def vowels(prompts, responses, **columns):
    return [float(sum(letter in "aeiou" for letter in text)) for text in responses]


def more_vowels(prompt, a, b):
    counts = vowels([], [a, b])
    return "A" if counts[0] > counts[1] else "B" if counts[1] > counts[0] else "tie"


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- prompts that are too long


def test_long_prompts_are_dropped_or_their_rows_say_what_was_seen_and_rejection_draws_none_that_its_sft_drops(
    tmp_path, capsys
):
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(("b", "c d e f", "d"))]
    config = settings(tmp_path / "a.jsonl", max_prompt_length=2)

    def seen(rows=rows, **changes):
        changed = replace(config, **changes)
        return within_limits(changed, prompts_of(changed, rows))

    assert [row["id"] for row in seen()] == [0, 2]
    assert capsys.readouterr().err == (
        "! prompts: kept 2 of 3 rows; dropped 1 with a prompt over 2 tokens; truncated 0\n"  # once for both sources
    )
    cut = seen(too_long="truncate")
    told = [(row["prompt"], carried(row).get("prompt_seen")) for row in cut]
    assert told == [("b", None), ("c d e f", "e f"), ("d", None)] and len(capsys.readouterr().err.splitlines()) == 1
    assert columns_of(cut[1]) == {"id": 1}  # which is no column of a reward function
    with pytest.raises(UserError, match=r"row 1: a prompt of 4 tokens is over max_prompt_length = 2; .* too_long=tr"):
        seen(too_long="error")
    with pytest.raises(UserError, match="no prompt is left: kept 0 of 1 rows; dropped 1 with a prompt over 2"):
        seen(rows[1:2])
    for too_long in ("drop", "truncate"):
        data = DataConfig(max_prompt_length=2, max_length=9, too_long=too_long)
        drawn = sampling_of(RejectionArgs(model=config.model, data=data), 0)
        assert (drawn.max_prompt_length, drawn.too_long) == (2, too_long)


# --- resuming


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [1, 4, 9])
def test_whatever_line_a_kill_leaves_the_file_is_the_same(tmp_path, monkeypatch, kill_at):
    """Dies within the write number kill_at, which leaves a whole line and a half; then goes on to the same bytes."""
    config = settings(tmp_path / "whole.jsonl", label="reward")
    whole = run_collect(config, rows=PROMPTS, functions=[vowels])
    writes = 0
    add = journal.Journal.add

    def dying(self, rows):
        nonlocal writes
        writes += 1
        if writes == kill_at:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            with open(self.path, "a") as file:
                file.write(lines[: len(lines) * 2 // 3])
            raise Killed
        add(self, rows)

    broken = replace(config, output=str(tmp_path / "broken.jsonl"))
    monkeypatch.setattr(journal.Journal, "add", dying)
    with pytest.raises(Killed):
        run_collect(broken, rows=PROMPTS, functions=[vowels])
    assert not (tmp_path / "broken.jsonl").exists() and (tmp_path / "broken.jsonl.part").exists()
    assert run_collect(broken, rows=PROMPTS, functions=[vowels]) == whole
    assert (tmp_path / "broken.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "broken.jsonl.part").exists()


def test_every_byte_of_the_journal_may_be_the_last(tmp_path, monkeypatch):
    """Cut at random bytes, the journal grows to what it was; nothing but the missing batches is made again."""
    config = settings(tmp_path / "a.jsonl", label="judge", judge=JudgeConfig(function="test_collecting:more_vowels"))
    monkeypatch.setattr(journal.Journal, "finish", lambda self, *_: None)
    run_collect(config, rows=PROMPTS)
    path = tmp_path / "a.jsonl.part"
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(whole.index(b"\n"), len(whole), 6):
        path.write_bytes(whole[:place])
        run_collect(config, rows=PROMPTS)
        assert path.read_bytes() == whole


@pytest.mark.slow
def test_a_signal_stops_after_a_batch_and_the_same_command_goes_on(tmp_path):
    """A real process, SIGTERM, exit code 0; then the output of the two together is that of one."""
    print_rows(PROMPTS * 8, str(tmp_path / "prompts.jsonl"))
    arguments = [
        "--model.path", str(toy_directory() / "policy"), "--data_path", str(tmp_path / "prompts.jsonl"),
        "--max_prompt_length", "2", "--sampling.max_new_tokens", "3", "--batch_size", "2", "--num_samples", "2",
        "--progress", "false", "--mesh.data", "1",
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": FAST, "PYTHONUNBUFFERED": "1"}
    start = [sys.executable, "-m", "rlhf_jax", "collect", *arguments, "--output"]
    part = tmp_path / "stopped.jsonl.part"
    with subprocess.Popen(
        [*start, str(tmp_path / "stopped.jsonl")], env=environment, stdout=subprocess.PIPE
    ) as process:
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 3):
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        out = process.communicate()[0].decode()
    assert process.returncode == 0
    if part.exists():  # it was not done before the signal came
        assert "the same command goes on" in out
    for name in ("stopped", "whole"):
        if not (tmp_path / f"{name}.jsonl").exists():
            subprocess.run([*start, str(tmp_path / f"{name}.jsonl")], env=environment, check=True, capture_output=True)
    assert (tmp_path / "stopped.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_settings_or_prompts_do_not_go_on_with_a_journal(tmp_path, monkeypatch):
    config = settings(tmp_path / "a.jsonl")
    monkeypatch.setattr(journal.Journal, "finish", lambda self, *_: None)
    run_collect(config, rows=PROMPTS)
    with pytest.raises(UserError, match=r"a\.jsonl\.part is made with seed 0, not 1; give the same"):
        run_collect(replace(config, seed=1), rows=PROMPTS)
    with pytest.raises(UserError, match=r"is made with prompts '\w+', not '\w+'"):
        run_collect(config, rows=PROMPTS[1:])
    before = (tmp_path / "a.jsonl.part").read_bytes()
    run_collect(replace(config, seed=1, overwrite=True), rows=PROMPTS)
    assert (tmp_path / "a.jsonl.part").read_bytes() != before
    with pytest.raises(UserError, match="is being written by another process"):
        code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print(1, flush=True); input()"
        holder = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "a.jsonl.part")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        holder.stdout.readline()
        try:
            run_collect(replace(config, seed=1), rows=PROMPTS)
        finally:
            holder.communicate(b"\n")


def test_a_batch_is_not_another_for_what_was_before_it(tmp_path):
    """Noise comes from the place of the prompt: more prompts after it, or another source before, change nothing."""
    few = run_collect(settings(tmp_path / "few.jsonl"), rows=PROMPTS[:4])
    many = run_collect(settings(tmp_path / "many.jsonl"), rows=PROMPTS)
    assert many[:4] == few
    assert len({r["text"] for r in many[0]["responses"] + many[1]["responses"]}) > 2


# --- labels


def test_rows_hold_every_source_and_are_read_by_the_reward_stage(tmp_path):
    rows = run_collect(settings(tmp_path / "a.jsonl", label="reward"), rows=PROMPTS, functions=[vowels])
    assert rows == read(tmp_path / "a.jsonl") and len(rows) == len(PROMPTS)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row["prompt"] == prompt["prompt"]
        assert [r["source"] for r in row["responses"]] == ["hot"] * 3 + ["cold"] * 2
        assert [r["score"] for r in row["responses"]] == vowels([], [r["text"] for r in row["responses"]])
        assert ranking_row(row).ballots[0][0] == "reward"
    summary = json.loads((tmp_path / "a.summary.json").read_text())
    assert summary["sources"]["hot"]["responses"] == 21 and summary["sources"]["cold"]["responses"] == 14


def test_a_reward_model_labels_as_score_does_and_its_accuracy_on_pairs_is_said(tmp_path, capsys):
    reward = RewardSourceConfig(model=str(toy_directory() / "reward"), model_weight=2.0)
    rows = run_collect(settings(tmp_path / "a.jsonl", label="reward", reward=reward), rows=PROMPTS[:3])
    from rlhf_jax.config import ScoreArgs

    flat = [
        {"prompt": row["prompt"], "response": r["text"], "response_ids": r["ids"], "finished": r["finished"]}
        for row in rows
        for r in row["responses"]
    ]
    of_one = sorted((r for r in rows[0]["responses"] if r["text"].strip()), key=lambda r: r["score"])
    pairs = [
        {"prompt": rows[0]["prompt"], "finished": [a["finished"], b["finished"]], "votes": votes}
        | {"chosen": a["text"], "rejected": b["text"], "chosen_ids": a["ids"], "rejected_ids": b["ids"]}
        for a, b, votes in ((of_one[-1], of_one[0], [2, 1, 0]), (of_one[0], of_one[-1], [2, 1, 0]),
                            (of_one[0], of_one[-1], [1, 2, 0]), (of_one[0], of_one[-1], [1, 1, 0]))
    ]  # fmt: skip
    same = {"prompt": "b", "chosen": "c", "rejected": "c"}
    print_rows([*flat, *pairs, same], str(tmp_path / "flat.jsonl"))
    limits = {"max_prompt_length": 2, "max_length": 7, "mesh": MeshConfig()}
    config = ModelConfig(path=str(toy_directory() / "reward"))
    scored = run_score(
        ScoreArgs(model=config, data_path=str(tmp_path / "flat.jsonl"), output=str(tmp_path / "s"), **limits)
    )
    mine = [r["score"] for row in rows for r in row["responses"]]
    np.testing.assert_allclose(mine, [2 * row["score"] for row in scored[: len(flat)]], rtol=1e-5, atol=1e-5)
    best, worst = of_one[-1]["score"], of_one[0]["score"]
    found = [[2 * row["score_chosen"], 2 * row["score_rejected"]] for row in scored[len(flat) :]]
    np.testing.assert_allclose(found, [[best, worst]] + [[worst, best]] * 3, rtol=1e-5, atol=1e-5)
    said = capsys.readouterr().err
    assert "dropped 1 with chosen equal to rejected" in said
    assert "score: accuracy 0.667 of 3 pairs" in said  # the fourth is undecided


def test_unlabelled_rows_wait_for_people_and_a_judge_labels_them_later(tmp_path):
    rows = run_collect(settings(tmp_path / "a.jsonl"), rows=PROMPTS)
    assert all(set(r) == {"text", "ids", "finished", "source"} for row in rows for r in row["responses"])
    judged = run_judge(JudgeArgs(path=str(tmp_path / "a.jsonl"), output=str(tmp_path / "b.jsonl"), progress=False,
                                judge=JudgeConfig(function="test_collecting:more_vowels")))  # fmt: skip
    at_once = settings(tmp_path / "c.jsonl", label="judge", judge=JudgeConfig(function="test_collecting:more_vowels"))
    texts = lambda rows: [[(r["text"], r["rank"]) for r in row["responses"] if r["text"]] for row in rows]  # noqa: E731
    assert texts(judged) == texts(run_collect(at_once, rows=PROMPTS))
    for row in judged:
        counts = vowels([], [r["text"] for r in row["responses"]])
        order = consensus_ranks(
            -np.array([sum(c < d for d in counts) + sum(c <= d for d in counts) for c in counts], float)
        )
        assert [r["rank"] for r in row["responses"]] == order.tolist()


def test_a_judge_is_compared_with_the_labels_of_people(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a" * (i % 3 + 1), "rejected": "b" * 5} for i in range(12)]
    rows += [{"prompt": "q", "chosen": "bb", "rejected": "aa"}, {"prompt": "r", "chosen": "x", "rejected": None}]
    config = JudgeArgs(
        output=str(tmp_path / "a.jsonl"), progress=False, judge=JudgeConfig(function="test_collecting:more_vowels")
    )
    run_judge(config, rows=rows)
    summary = json.loads((tmp_path / "a.summary.json").read_text())
    assert summary["labels"]["agreement"] == pytest.approx(12 / 13) and summary["labels"]["pairs"] == 13
    assert summary["rows"] == 13 and summary["dropped"] == 1 and summary["judge"]["consistency"] == 1


def test_a_judge_says_nothing_of_what_its_verdicts_do_not_link(tmp_path, capsys):
    """It has no opinion of a pair with one response of each side; a row of one answer has no pair."""
    sides = {"aa": 0, "a": 0, "bb": 1, "b": 1}
    config = JudgeArgs(output=str(tmp_path / "a.jsonl"), progress=False)
    ask = lambda questions, key: [  # noqa: E731
        float(len(a) > len(b)) if sides[a] == sides[b] else "nonsense" for _, a, b in questions
    ]
    rows = [{"prompt": "p", "responses": ["a", "bb", "aa", "b"]}, {"prompt": "p", "completion": "a", "label": True}]
    [row] = run_judge(config, rows=rows, judge=Judge(ask))
    capsys.readouterr()
    assert run_judge(replace(config, output=""), rows=rows, judge=Judge(ask)) == [row]
    alone = capsys.readouterr().out
    assert alone.endswith("judge: 1 rows\n") and '"prompt"' not in alone
    said = [{"rater": "judge", "ranks": [1, None, 0, None]}, {"rater": "judge", "ranks": [None, 0, None, 1]}]
    assert row["raters"] == said and not any("rank" in item for item in row["responses"])
    labels = ranking_row(row).consensus()[1]
    assert np.argwhere(labels > 0.5).tolist() == [[1, 3], [2, 0]] and np.isnan(labels[0, 1])
    summary = json.loads((tmp_path / "a.summary.json").read_text())
    assert (summary["rows"], summary["dropped"], summary["apart"]) == (1, 1, 1)


def test_pairs_and_demonstrations_of_labels_and_what_is_left_out_is_counted_and_said(tmp_path, capsys):
    ranked = run_collect(settings(tmp_path / "r.jsonl", label="reward"), rows=PROMPTS, functions=[vowels])
    pairs = run_collect(
        settings(tmp_path / "p.jsonl", label="reward", schema="preference"),
        rows=PROMPTS,
        functions=[vowels],
        gold=vowels,
    )
    told = capsys.readouterr().out
    best = run_collect(settings(tmp_path / "s.jsonl", label="reward", schema="sft"), rows=PROMPTS, functions=[vowels])
    shortest = lambda prompts, responses: [-float(len(text)) for text in responses]  # noqa: E731
    run_collect(settings(tmp_path / "e.jsonl", label="reward", schema="sft"), rows=PROMPTS, functions=[shortest])
    wanted = {
        (row["prompt"], a["text"], b["text"])
        for row in ranked for a in row["responses"] for b in row["responses"]
        if a["score"] > b["score"] and a["text"].strip() and b["text"].strip()
    }  # fmt: skip
    assert {(row["prompt"], row["chosen"], row["rejected"]) for row in pairs} == wanted and wanted
    assert all(preference_row(row)["label"] == 1 for row in pairs)
    top = {row["prompt"]: max(r["score"] for r in row["responses"]) for row in ranked}
    assert all(vowels([], [sft_row(row)["response"]])[0] == top[row["prompt"]] for row in best)
    summary = json.loads((tmp_path / "p.summary.json").read_text())
    gold, left = summary["gold"], summary["pairs_left_out"]
    assert gold["agreement"] == 1 and gold["pairs"] == len(pairs)
    assert len(pairs) + sum(left.values()) == len(PROMPTS) * 10 and {"tied", "with an empty response"} <= set(left)
    assert f"{left['tied']} tied" in told
    assert summary["without_pair"] == len(PROMPTS) - len({row["prompt"] for row in pairs})
    empty = sum(not all(r["text"].strip() for r in row["responses"]) for row in ranked)
    assert json.loads((tmp_path / "e.summary.json").read_text())["best_empty"] == empty > 0


def test_a_judges_doubt_becomes_a_soft_label(tmp_path):
    judge = Judge(lambda questions, key: [0.7 if a < b else 0.2 for _, a, b in questions])
    config = settings(tmp_path / "p.jsonl", label="judge", schema="preference")
    pairs = run_collect(config, rows=PROMPTS, judge=judge)
    assert pairs and all(preference_row(row)["label"] == pytest.approx(0.75) for row in pairs)
    assert all(row["chosen"] < row["rejected"] for row in pairs)


def test_a_failing_function_leaves_its_batch_without_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_jax.hosts.attempts.RETRY_WAIT", 0.0)

    def moody(prompts, responses, **columns):
        if prompts[0] == PROMPTS[0]["prompt"]:
            raise OSError("gone")
        return vowels(prompts, responses)

    reward = RewardSourceConfig(functions=["a:b"], on_failure="skip", retries=0)
    rows = run_collect(settings(tmp_path / "a.jsonl", label="reward", reward=reward), rows=PROMPTS, functions=[moody])
    assert [r["score"] for r in rows[0]["responses"]] == [None] * 5 and rows[-1]["responses"][0]["score"] is not None
    lost = sum(r["score"] is None for row in rows for r in row["responses"])
    assert f"! {lost} responses have no score: the reward failed" in capsys.readouterr().out
    stopping = settings(tmp_path / "b.jsonl", label="reward", reward=replace(reward, on_failure="stop"))
    with pytest.raises(UserError, match="gone"):
        run_collect(stopping, rows=PROMPTS, functions=[moody])
    assert (tmp_path / "b.jsonl.part").exists()  # what was sampled is not lost


def test_demonstrations_stand_before_a_prompt_as_it_is_written():
    shots = [{"prompt": f"Q{i}:", "response": f" A{i}", "_where": "x"} for i in range(2)]
    assert with_shots({"prompt": "Q:"}, shots)["prompt"] == "Q0: A0\n\nQ1: A1\n\nQ:"
    user, told = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yes"}]
    chat = with_shots({"prompt": user}, [{"prompt": user, "response": told}])
    assert [turn["role"] for turn in chat["prompt"]] == ["user", "assistant", "user"]
    with pytest.raises(UserError, match="both be texts, or both messages"):
        with_shots({"prompt": user}, shots)


def test_a_source_changes_what_it_names(tmp_path):
    """Greedy samples are all the same, hot ones are not; shots change the prompt that is shown but not the row's."""
    print_rows([{"prompt": "b", "response": " c d"}], str(tmp_path / "demos.jsonl"))
    sources = [
        SourceConfig(temperature=0.0), SourceConfig(temperature=3.0),
        SourceConfig(temperature=0.0, demonstrations=str(tmp_path / "demos.jsonl"), shots=1),
    ]  # fmt: skip
    config = settings(tmp_path / "a.jsonl", sources=sources, num_samples=4, max_prompt_length=8)
    rows = run_collect(config, rows=PROMPTS)
    of = lambda s: [[r["text"] for r in row["responses"]][4 * s : 4 * s + 4] for row in rows]  # noqa: E731
    assert all(len(set(texts)) == 1 for texts in of(0)) and any(len(set(texts)) > 1 for texts in of(1))
    assert of(2) != of(0) and [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]
    assert [source_name(s) for s in sources] == ["temperature=0", "temperature=3", "temperature=0 shots=1"]


# --- rules and filters (ALMoST)


def made_pairs(seed: int, longer_wins: float, count: int = 400):
    """Rows of one pair each, whose longer response is chosen with a chance."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        sizes = np.sort(rng.permutation(np.arange(1, 60))[:2])[:: 1 if rng.random() < longer_wins else -1]
        items = [{"text": "x" * sizes[k], "rank": 1 - k, "finished": True} for k in (0, 1)]
        rows.append({"prompt": f"p{i}", "responses": items})
    return rows, pairs_of(rows, [shares_of(row) for row in rows])


def test_the_order_of_the_sources_is_the_label(tmp_path):
    rows = run_collect(settings(tmp_path / "a.jsonl", label="sources"), rows=PROMPTS)
    assert all([r["rank"] for r in row["responses"]] == [0, 0, 0, 1, 1] for row in rows)


@pytest.mark.parametrize("longer_wins", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_balancing_takes_the_length_out_of_the_labels(seed, longer_wins):
    rows, pairs = made_pairs(seed, longer_wins)
    kept = balance_filter(rows, pairs)
    before, after = (length_bias(rows, p) for p in (pairs, kept))
    assert abs(after["length_correlation"]) < min(0.05, abs(before["length_correlation"]) + 0.01)
    assert after["longer_wins"] == 0.5 and len(kept) >= 2 * 0.15 * len(pairs) and set(kept) <= set(pairs)


def test_almost_drops_pairs_whose_chosen_response_is_short():
    items = [{"text": "x" * n, "finished": True} for n in (10, 20, 30, 8)]
    rows = [{"prompt": "p", "responses": items}]
    mean, spread = np.mean([10, 20, 30, 8]), np.std([10, 20, 30, 8])
    assert 10 < mean - spread / 2 < 20
    pairs = [Pair(0, *pair) for pair in [(0, 1), (1, 2), (0, 3), (3, 0), (2, 1)]]
    assert almost_filter(rows, pairs) == [pairs[1], pairs[2], pairs[4]]


def test_almost_weakens_a_liking_for_short_responses_and_strengthens_one_for_long_ones():
    """What docs/data.md says: what it drops has a shorter chosen response, so the correlation rises."""
    for longer_wins in (0.2, 0.8):
        rows, pairs = made_pairs(0, longer_wins)
        before = length_bias(rows, pairs)["length_correlation"]
        assert length_bias(rows, almost_filter(rows, pairs))["length_correlation"] > before


# --- mistakes

MISTAKES = {
    "collect --model.path lm": "there are no prompts",
    "collect --model.path lm --prompts [b]": "output is empty; name the .jsonl file to write",
    "collect --prompts [b] --output x.jsonl": "model.tokenizer and model.path are both empty",
    "collect --prompts [b] --label judge": "none is given; name one judge",
    "collect --prompts [b] --label reward": "label is reward, but nothing scores",
    "collect --label sources": "label is sources, of which there are 0; give two or more",
    r"collect --prompts [b] --output x --sources [{path:\ a/m},{path:\ b/m}]": "sources m, m are not told apart",
    "collect --schema sft": "label is none, so schema sft cannot be written",
    "collect --length_filter almost": "leaves out pairs; set schema preference",
    "collect --sources 3": r"sources is '3'; give a list of groups such as \[\{name: \.\.\.\}\] of name, path",
    "collect --sources [{path:x,heat:2}]": "sources",
    "collect --judge.template hello": r"judge.template has no \{prompt\}",
    "collect --judge.votes 3 --judge.model.path x": "log-probs are the same each time; set judge.answer sample",
    "judge rows.jsonl": "none is given; name one judge",
    "judge rows.jsonl --judge.url http://x": "rows.jsonl: no such file",
}


@pytest.mark.parametrize(("line", "expected"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_one_line(line, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        cli.dispatch(shlex.split(line))


def test_sources_come_from_yaml_and_the_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("sources:\n  - {path: a, temperature: 0.7}\n  - {name: b, shots: 0}\n")
    config = cli.parse("collect", ["--config", str(tmp_path / "c.yaml")])
    assert config.sources == [SourceConfig(path="a", temperature=0.7), SourceConfig(name="b")]
    config = cli.parse("collect", ["--sources", "[{path: a, top_p: null}]"])
    assert config.sources == [SourceConfig(path="a")]


def test_stopped_is_what_an_interrupt_raises(tmp_path, monkeypatch):
    class Pressed:
        received = "SIGINT"

        def __init__(self, say, **_):
            pass

        def close(self):
            pass

    monkeypatch.setattr(phases, "Interrupts", Pressed)
    with pytest.raises(Stopped, match=r"stopped by SIGINT after 2 of 14 rows"):
        run_collect(settings(tmp_path / "a.jsonl"), rows=PROMPTS)
