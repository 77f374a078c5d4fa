"""Laws of rows across commands: whatever else a row holds, it is read for what it is, and every stage runs on it."""

import json
from functools import partial

import numpy as np
import pytest
from test_data import tiny
from tiny import toy_directory

from rlhf_jax import preference, reward, sft
from rlhf_jax.commands.label.items import item_of
from rlhf_jax.config import (
    DataConfig,
    DPOArgs,
    DPOConfig,
    ModelConfig,
    OptimConfig,
    RewardArgs,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    SFTArgs,
    SFTConfig,
)
from rlhf_jax.data import lint, tfds_rows
from rlhf_jax.data.ballots import ranking_row
from rlhf_jax.data.comparisons import preference_examples, ranking_examples, rating_examples, unpaired_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import prompt_examples, prompt_key, sft_examples
from rlhf_jax.data.rows import LAYOUTS, READ, layout_of
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.inference.scoring import score_example

USER, ANSWER = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}


def settings(out, **data):
    """What makes a stage on the toy model quick."""
    return {
        "model": ModelConfig(path=str(toy_directory() / "policy")),
        "data": DataConfig(**{"batch_size": 8, "max_prompt_length": 6, "max_length": 16, **data}),
        "optim": OptimConfig(learning_rate=1e-3),
        "run": RunConfig(output_dir=str(out), progress=False),
    }


DEMONSTRATIONS = {
    "messages": lambda i: {"messages": [{"role": "user", "content": "abcd"[i % 4]}, ANSWER]},
    "text": lambda i: {"text": f"{'abcd'[i % 4]} b c d e"},
    "both": lambda i: [{"text": "a b c"}, {"prompt": "a", "response": " b"}][i % 2],
    "unpaired": lambda i: {"prompt": "a b", "completion": " c", "label": i % 2 == 0},
}


@pytest.mark.parametrize("kind", DEMONSTRATIONS)
def test_sft_runs_with_its_defaults_on_every_kind_of_row(kind, tmp_path):
    """The table of samples has the prompts that there are; it is written, or not, before the model is saved."""
    rows = [DEMONSTRATIONS[kind](i) for i in range(16)]
    config = SFTArgs(**settings(tmp_path / "run"), sft=SFTConfig(steps=1), sampling=SamplingConfig(max_new_tokens=2))
    sft.run(config, rows=rows, eval_rows=rows)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    prompted = {"text": 0, "both": 8, "unpaired": 8}.get(kind, 16)
    assert len(samples) == min(prompted, SFTConfig().num_samples)
    assert all(json.loads(line)["prompt"] for line in samples)


def test_a_run_without_a_finite_step_is_an_error_and_keeps_what_it_has(tmp_path):
    """Ratings whose squares are infinite in float32."""
    rows = [{"prompt": "a", "response": "b", "rating": 1e30}, {"prompt": "b", "response": "c", "rating": -1e30}] * 8
    config = RewardArgs(**settings(tmp_path / "run"), reward=RewardConfig(steps=3))
    with pytest.raises(UserError, match="none of 3 updates had a finite loss and gradient: nothing was trained"):
        reward.run(config, rows=rows, eval_rows=rows)
    assert '"optim/skipped": 1.0' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


# --- what else a row holds

SMALL = Limits(8, 16, "drop")
PREFERENCE = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5, "votes": [0.7, 0.3, 0]}
ROWS = {
    "preference": PREFERENCE,
    "both": {"chosen": "a b", "rejected": "a c", "margin": 2},
    "chat": {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "e"}]},
    "ranking": {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [0, 1, 2]},
    "unpaired": {"prompt": "a", "response": "b", "label": False},
    "rating": {"prompt": "a", "response": "b", "rating": 3},
    "completion": {"prompt": "a", "completion": "b"},
    "response": {"prompt": [USER], "response": "b"},
    "messages": {"messages": [USER, ANSWER]},
    "text": {"text": "a b c"},
    "prompt": {"prompt": "a"},
}
ANYWHERE = {"score": 7, "ranking": 3, "_ranking": 2, "item": 1, "id": 3, "weight": 0.1, "labels": [1], "rank": 2}
ANSWERED = {"response": "e", "completion": "f", "messages": [USER, ANSWER], "text": "x", "label": 0.3, "rating": 9}
BESIDE = {
    **dict.fromkeys(["preference", "both", "chat"], ANSWERED),
    "ranking": {**ANSWERED, "chosen": "g", "rejected": "h"},
    "unpaired": {"text": "x", "messages": [USER, ANSWER], "chosen": "g"},
    "rating": {"text": "x", "messages": [USER, ANSWER], "chosen": "g"},
    "completion": {"text": "x", "messages": [USER, ANSWER], "chosen": "g"},
    "response": {"text": "x", "messages": [USER, ANSWER], "rejected": "g"},
    "messages": {"text": "x", "chosen": "g"},
    "text": {"label": 1, "rating": 3, "chosen": "g"},
    "prompt": {"label": 1, "rating": 3, "chosen": "g", "text": "x"},
}
"""Kind of row -> fields of other kinds that are no part of it."""
TOKENIZER = Tokenizer(tiny())
OTHER_PAIR = {"prompt": "z", "chosen": "y", "rejected": "x", "margin": None, "_where": "other"}
OTHER = {"prompt": "z", "completion": "y", "label": True, "_where": "other"}


def examples_of(build, **settings):
    return lambda row: build([row], TOKENIZER, SMALL, **settings)[0]


def inspected(row):
    found = lint.inspect([row], [], TOKENIZER, 8, 16)
    return {**found, "kinds": None, "unread": None}, lint.render(row, TOKENIZER, loss_on="response", color=False)


READERS = {
    "sft": examples_of(sft_examples, loss_on="response"),
    "reward pairs": examples_of(preference_examples),
    "reward aggregated": examples_of(preference_examples, aggregate="bradley_terry"),
    "reward rankings": examples_of(ranking_examples),
    "reward ratings": examples_of(rating_examples),
    "reward auto": lambda row: reward.kind_of_rows(RewardConfig(), [row]),
    "kto": lambda row: unpaired_examples([row, OTHER], TOKENIZER, SMALL)[0][:-1],
    "score": lambda row: score_example(row, TOKENIZER, Limits(8, 16, "truncate")),
    "ppo": lambda row: [
        {**example, "columns": None} for example in prompt_examples([row], TOKENIZER, Limits(8, too_long="drop"))[0]
    ],
    "judge": lambda row: vars(ranking_row(row, unlabelled=True)),
    "label": lambda row: item_of(row).key,
    "inspect": inspected,
    "split": prompt_key,
    **{f"prepare {schema}": partial(tfds_rows.stored, schema=schema) for schema in ("sft", "preference", "ranking")},
}


def read(reader, row):
    """What a command makes of a row, in words, or that it is refused."""
    try:
        return repr(READERS[reader]({**row, "_where": "f:1"}))
    except UserError:
        return "refused"


@pytest.mark.parametrize("kind", ROWS)
def test_other_fields_are_no_part_of_a_row(kind):
    for name, value in {**ANYWHERE, **BESIDE[kind]}.items():
        for reader in READERS:
            if kind == "ranking" and name == "rank":  # a field of its items
                continue
            assert read(reader, {name: value, **ROWS[kind]}) == read(reader, ROWS[kind]), (name, reader)


@pytest.mark.parametrize("kind", ROWS)
def test_a_null_field_is_as_if_it_were_not_there(kind):
    """Tables have null where a row lacks what others of its kind have; what says of what kind it is, is no such."""
    row, tells = ROWS[kind], set().union(*(names for _, names in LAYOUTS))
    tells -= {"completion", "response"} if {"completion", "response"} & set(row) else set()
    for name in sorted(READ[layout_of(row)] - set(row) - {"_where"} - tells):
        for reader in READERS:
            assert read(reader, {**row, name: None}) == read(reader, row), (name, reader)
    assert reward.kind_of_rows(RewardConfig(), [{**ROWS["unpaired"], "rating": None}]) == "pairs"
    report = preference_examples([{**PREFERENCE, "more": None, "_where": "f:1"}], TOKENIZER, SMALL)[1]
    assert "fields not read" not in str(report)


@pytest.mark.parametrize("kind", ROWS)
def test_every_row_is_read_by_some_command(kind):
    assert any(read(reader, ROWS[kind]) != "refused" for reader in READERS if reader not in ("split", "reward auto"))


@pytest.mark.parametrize(
    ("reader", "row", "expected"),
    [
        ("sft", {**ROWS["completion"], "response": "c"}, '"response" and "completion" differ'),
        ("sft", {**ROWS["completion"], "label": "good"}, "\"label\" is 'good'; give true or false"),
        ("sft", {**ROWS["text"], "response": "c"}, 'an answer, but no "prompt", beside "text"'),
        ("sft", {**ROWS["preference"], "response": "c"}, "a preference row has no one answer to learn"),
        ("sft", {**ROWS["prompt"], "text": "c"}, 'no field "response"'),
        ("reward auto", {**ROWS["unpaired"], "rating": 2}, "rows have both label and rating; set reward.comparisons"),
        ("reward pairs", {**PREFERENCE, "responses": ["d", "e"]}, "nobody says which response is better"),
        ("kto", {**ROWS["ranking"], "ranks": [0, 1, 2]}, 'no field "label"'),
    ],
)
def test_rows_that_may_be_two_things_are_refused_by_name(reader, row, expected):
    with pytest.raises(UserError, match=f"^(f:1: )?.*{expected}"):
        READERS[reader]({**row, "_where": "f:1"})


@pytest.mark.parametrize("fields", [{}, {"label": True}, {"label": 0.4}, {"rating": 2, "label": 1}, {"text": "x"}])
def test_margins_and_votes_are_those_of_the_row_whatever_else_it_has(fields):
    [example], report = preference_examples([{**PREFERENCE, **fields, "_where": "f:1"}], TOKENIZER, SMALL)
    assert (example["label"], example["margin"]) == (pytest.approx(0.7), 0.5)
    assert report.unread == dict.fromkeys(fields, 1)
    ipo = preference.task_of(DPOArgs(dpo=DPOConfig(loss="rlhf_jax.losses:ipo_loss"))).build
    for build in (ranking_examples, partial(preference_examples, aggregate="crowd_bt"), unpaired_examples, ipo):
        assert "1 margins not used" in str(
            build([{**PREFERENCE, **fields, "_where": "f:1"}, OTHER_PAIR], TOKENIZER, SMALL)[1]
        )
    dpo = preference.task_of(DPOArgs()).build([{**PREFERENCE, "_where": "f:1"}], TOKENIZER, SMALL)[1]
    assert "margins" not in str(dpo)


# --- numbers

LARGE = [
    (1700000001, 1700000000),
    (10**400, 10**400 - 1),
    (1e39, 1e38),
    (2e-46, 1e-46),
    (0.1 + 1e-12, 0.1),
    (2**60 + 1, 2**60),
]


@pytest.mark.parametrize(("high", "low"), LARGE)
def test_the_order_of_scores_and_ranks_is_that_of_the_exact_numbers(high, low):
    ways = [
        {"responses": ["b", "c"], "scores": [low, high]},
        {"responses": ["b", "c"], "ranks": [high, low]},
        {"responses": [{"text": "b", "score": low}, {"text": "c", "score": high}]},
        {"responses": ["b", "c"], "raters": [{"rater": "x", "ranks": [high, low]}]},
    ]
    for row in ways:
        [example], _ = ranking_examples([{"prompt": "a", **row, "_where": "f:1"}], TOKENIZER, SMALL)
        assert example["ranks"].dtype == np.float32 and np.isfinite(example["ranks"]).all()
        assert example["ranks"][1] < example["ranks"][0]
        [pair], _ = preference_examples([{"prompt": "a", **row, "_where": "f:1"}], TOKENIZER, SMALL)
        assert TOKENIZER.decode(pair["chosen"]).endswith("c")


@pytest.mark.parametrize(
    "votes",
    [
        [10**17 + 1, 10**17, 0],
        [10**10, 10**10 + 1, 3],
        [1e30, 1e30 * (1 + 1e-15), 1],
        [3e-300, 1e-300, 0],
        [1, 0, 1e9],
    ],
)
def test_the_side_of_uneven_votes_survives_float32(votes):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "votes": votes, "_where": "f:1"}
    [example], _ = preference_examples([row], TOKENIZER, SMALL)
    assert np.float32(example["label"]) > 0.5
    assert TOKENIZER.decode(example["chosen"]).endswith("b" if votes[0] > votes[1] else "c")
    if abs(votes[0] - votes[1]) > 1e-11 * sum(votes):
        [ranking], _ = ranking_examples([row], TOKENIZER, SMALL)
        assert (ranking["ranks"][0] < ranking["ranks"][1]) == (votes[0] > votes[1])


@pytest.mark.parametrize(
    ("reader", "fields", "expected"),
    [
        ("reward pairs", {"margin": 1e39}, '"margin" is over 3.4e.38, the largest number of float32; scale it'),
        ("reward pairs", {"margin": -(10**400)}, '"margin" is over 3.4e.38'),
        ("reward pairs", {"margin": True}, '"margin" is True; give a finite number'),
        ("reward pairs", {"margin": "1"}, "\"margin\" is '1'; give a finite number"),
        ("reward pairs", {"votes": [10**400, 1, 0]}, '"votes" is over 3.4e.38'),
        ("reward pairs", {"votes": [float("nan"), 1, 0]}, '"votes" is .* give three counts'),
        ("reward ratings", {"response": "b", "rating": 1e39}, '"rating" is over 3.4e.38'),
        ("reward ratings", {"response": "b", "rating": float("inf")}, '"rating" is inf; give a finite number'),
    ],
)
def test_what_float32_cannot_hold_is_refused_with_its_row(reader, fields, expected):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} if reader == "reward pairs" else {"prompt": "a"}
    with pytest.raises(UserError, match=f"^f:1: {expected}"):
        READERS[reader]({**row, **fields, "_where": "f:1"})


def test_what_float32_takes_from_numbers_is_said():
    rows = [{**PREFERENCE, "margin": margin, "_where": "f:1"} for margin in (1e-50, 0, -1e-45, np.float32(2))]
    examples, report = preference_examples(rows, TOKENIZER, SMALL)
    assert "2 margins that are 0 in float32" in str(report)
    assert examples[3]["margin"] == 2
    rated = [
        {"prompt": "a", "response": "b", "rating": r, "_where": "f:1"}
        for r in (1700000001, 1700000000, 5, np.int64(5))
    ]
    assert "1 ratings that float32 cannot tell from another" in str(rating_examples(rated, TOKENIZER, SMALL)[1])
    rated = [{**row, "_where": f"f:{number}"} for number, row in enumerate([*rows, *rated])]
    assert lint.inspect(rated, [], None, 9, 9)["remarks"] == {
        "margins that are 0 in float32": (2, ["f:0", "f:2"]),
        "ratings that float32 cannot tell from another": (1, ["f:5"]),
    }


ANSWERED = {"prompt": "a", "response": "b", "label": True}
COMPARED = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "responses": [{"text": "b", "rank": 0}, {"text": "c", "rank": 1}]},
    {"prompt": "a", "responses": ["b", "c"], "scores": [1, 0]},
    {"prompt": "a", "responses": ["b", "c"], "scores": [1, 0], "ranks": [None, None]},
    {"prompt": "a", "responses": [{"text": "b", "score": 1}, {"text": "c", "score": 0}], "ranks": [None, None]},
    {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1]},
    {"prompt": "a", "responses": ["b", "c"], "best": 0},
]


@pytest.mark.parametrize(
    ("build", "rows"),
    [
        (partial(sft_examples, loss_on="response"), [ANSWERED]),
        (unpaired_examples, [ANSWERED, {**ANSWERED, "prompt": "d"}]),
        (preference_examples, COMPARED),
        (ranking_examples, COMPARED),
    ],
)
def test_a_null_column_says_nothing(build, rows):
    """Tables have null where a row lacks what others have: it is as if the column were not there."""
    names = [
        "finished",
        "response_ids",
        "chosen_ids",
        "rejected_ids",
        "votes",
        "margin",
        "rater",
        "raters",
        "best",
        "ranks",
        "scores",
        "tools",
    ]
    filled = [{**dict.fromkeys(names), **row} for row in rows]
    for row in filled:
        items = [one if isinstance(one, dict) else {"text": one} for one in row.get("responses", [])]
        blank = dict.fromkeys(["rank", "score", "finished", "ids"])
        row |= {"responses": [{**blank, **one} for one in items]} if items else {}
    limits = Limits(5, 9, "error")
    found, wanted = (build(rows_from(each), Tokenizer(tiny()), limits)[0] for each in (filled, rows))
    assert repr(found) == repr(wanted) and len(found) == len(rows)
    if "response" in rows[0]:
        score = partial(score_example, tokenizer=Tokenizer(tiny()), limits=Limits(5, 9, "error"))
        blank, plain = ([repr(score({**row, "response": " "})) for row in each] for each in (filled, rows))
        assert blank == plain
