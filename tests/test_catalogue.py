"""Data sets by name: rows of the shape of each set of the catalogue are read by the stages that it names."""

from __future__ import annotations

import json

import pytest
from test_data import CHATML, WORDS, tiny

from rlhf_jax import reward
from rlhf_jax.commands.rewards import bench_of, of_bench
from rlhf_jax.config import RewardConfig
from rlhf_jax.config.settings import HUB_ROWS
from rlhf_jax.data import fields, hub_rows, tfds_rows
from rlhf_jax.data.ballots import ranking_row
from rlhf_jax.data.comparisons import preference_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import prompt_examples, sft_examples
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.tasks import gsm8k, verifiers

WORD = {word: 5 + i for i, word in enumerate(WORDS)}
"""Word -> its id: five special tokens come first."""
HUB = [name for name in fields.catalogue() if name.startswith(HUB_ROWS)]


def said(*texts):
    """Messages whose roles alternate from the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


PAIR = {"chosen": said("a", "b", "c", "yes"), "rejected": said("a", "b", "c", "no")}
RATED = {"prompt": "a", "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
MATH = {"problem": "a", "solution": "b $\\boxed{1}$"}
SHAPES = {  # the columns that the cards of the sets name; of a set with two rows to a prompt, both
    "HuggingFaceH4/no_robots": [{"prompt": "a", "prompt_id": "9", "messages": said("a", "b"), "category": "Chat"}],
    "allenai/tulu-3-sft-mixture": [{"id": "9", "messages": said("a", "b"), "source": "x"}],
    "teknium/OpenHermes-2.5": [
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": None}],
            "source": "x", "system_prompt": None, "title": None,
        }
    ],
    "Anthropic/hh-rlhf": [{x: f"\n\nHuman: a\n\nAssistant: {PAIR[x][-1]['content']}" for x in PAIR}],
    "trl-lib/ultrafeedback_binarized": [{**PAIR, "score_chosen": 8.0, "score_rejected": 6.5}],
    "HuggingFaceH4/ultrafeedback_binarized": [
        {"prompt": "a", "prompt_id": "9", **PAIR, "messages": PAIR["chosen"], "score_chosen": 8.0}
    ],
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": [{"id": "9", "prompt": "a", **PAIR, "source": "x"}],
    "Skywork/Skywork-Reward-Preference-80K-v0.2": [{**PAIR, "source": "x"}],
    "nvidia/HelpSteer2": [
        {**RATED, "response": "yes", "helpfulness": 4}, {**RATED, "response": "no", "helpfulness": 1}
    ],
    "nvidia/HelpSteer2/preference": [
        {
            "split": "train", "prompt": "a", "response_1": "no", "response_2": "yes", "preference_strength": 2,
            "preference_statement": "x", "all_preferences_unprocessed": [{"strength": 2}],
        }
    ],
    "nvidia/HelpSteer3": [
        {
            "domain": "general", "language": "english", "context": said("a", "b", "c"), "response1": "yes",
            "response2": "no", "overall_preference": -3, "individual_preference": [{"score": -3, "reasoning": "x"}],
        }
    ],
    "allenai/reward-bench": [
        {
            "prompt": "a", "chosen": "yes", "chosen_model": "x", "rejected": "no", "rejected_model": "x",
            "subset": "alpacaeval-easy", "id": 9,
        }
    ],
    "openai/gsm8k": [{"question": "a", "answer": "b <<1+1=2>>2\n#### 2"}],
    "DigitalLearningGmbH/MATH-lighteval": [{**MATH, "level": "Level 5", "type": "Algebra"}],
    "EleutherAI/hendrycks_math": [{**MATH, "level": "Level 5", "type": "Algebra"}],
    "HuggingFaceH4/MATH-500": [{**MATH, "answer": "1", "subject": "Algebra", "level": 5, "unique_id": "x"}],
}  # fmt: skip


def of_hub(name, rows, tmp_path, monkeypatch, fields=()):
    """The rows as they are read by the name of their set."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(hub_rows, "files_of", lambda path: [(f"{path}:{file.name}", file)])
    return rows_from(name, fields)


def liked(example):
    """What an example prefers, and to what: the last word of each, [better, worse]; ratings one example each."""
    if "responses" in example:
        return [
            ids[-2] for _, ids in sorted(zip(example["ranks"], example["responses"], strict=True), key=lambda x: x[0])
        ]
    return [example["chosen"][-2], example["rejected"][-2]]


@pytest.mark.parametrize("name", HUB)
def test_rows_of_a_set_are_read_by_the_stages_that_the_catalogue_names(name, tmp_path, monkeypatch):
    tokenizer, limits = Tokenizer(tiny(CHATML)), Limits(64, 96, "error")
    _, owner, set_, *folder = name.removeprefix("hf://").split("/")
    path = "/".join(["hf://datasets", owner, f"{set_}@v1", *folder, "x.jsonl"])
    rows = of_hub(path, SHAPES[name.removeprefix(HUB_ROWS)], tmp_path, monkeypatch)
    for stage in fields.catalogue()[name]["stages"]:
        if stage == "sft":
            (example,), _ = sft_examples(rows, tokenizer, limits, loss_on="response")
            assert example["tokens"][example["loss_mask"]][0] == WORD["b"]
        elif stage in ("ppo", "grpo"):
            (prompt,), _ = prompt_examples(rows, tokenizer, limits)
            assert prompt["prompt"].startswith("<start> user a\n\nThink step by step. ")
            assert prompt["columns"]["answer"] == rows[0]["response"]
        elif stage == "evaluate":
            assert bench_of(rows[0]) == 1 and len(ranking_row(of_bench(rows[0])).answers) == 2
        else:
            kind = reward.KINDS[reward.kind_of_rows(RewardConfig(), rows)]
            build = kind.build(RewardConfig()) if stage == "reward" else preference_examples
            examples, report = build(rows, tokenizer, limits)
            assert not report.lost
            if "rating" in examples[0]:
                assert [(each["response"][1], each["rating"]) for each in examples] == [
                    (WORD["yes"], 4),
                    (WORD["no"], 1),
                ]
            else:
                assert list(map(liked, examples)) == [[WORD["yes"], WORD["no"]]]


def test_a_sets_own_answers_are_right_by_the_verifier_that_the_catalogue_names(tmp_path, monkeypatch):
    (row,) = of_hub("hf://datasets/openai/gsm8k@train", SHAPES["openai/gsm8k"], tmp_path, monkeypatch)
    assert verifiers.gsm8k(["", ""], [row["response"], "#### 3"], answer=[row["answer"]] * 2) == [1, 0]
    assert row["prompt"] == gsm8k.prompts(SHAPES["openai/gsm8k"])[0]["prompt"]
    pytest.importorskip("math_verify", reason='needs math-verify: pip install "rlhf-jax[verifiers]"')
    (row,) = of_hub("hf://datasets/HuggingFaceH4/MATH-500", SHAPES["HuggingFaceH4/MATH-500"], tmp_path, monkeypatch)
    assert verifiers.math(["", ""], [row["response"], "\\boxed{2}"], answer=[row["answer"]] * 2) == [1, 0]


def test_fields_that_are_given_and_other_sets_are_read_without_the_catalogue(tmp_path, monkeypatch):
    (row,) = of_hub(
        "hf://datasets/openai/gsm8k", [{"question": "a", "answer": "b"}], tmp_path, monkeypatch, ["text={question}"]
    )
    assert row == {"text": "a", "_where": "hf://datasets/openai/gsm8k:rows.jsonl:1"}
    (row,) = of_hub("hf://datasets/openai/gsm8k-more", [{"prompt": "a", "x": 3}], tmp_path, monkeypatch)
    assert row["x"] == 3
    with pytest.raises(UserError, match=r'rows.jsonl:1: no field "question" \(found: a\); give data.fields'):
        of_hub("hf://datasets/openai/gsm8k", [{"a": "b"}], tmp_path, monkeypatch)
    monkeypatch.setattr(
        tfds_rows, "read_builder", lambda name, split: [{"text": "a", "label": 1, "_where": name + split}]
    )
    path = "tfds:imdb_reviews:1.0.0@test[:1%]"
    assert rows_from(path) == [{"text": "a", "_where": "imdb_reviews:1.0.0test[:1%]"}]
    assert rows_from(path, ["rating={label}"]) == [{"rating": 1, "_where": "imdb_reviews:1.0.0test[:1%]"}]


def test_of_several_configurations_the_catalogue_names_one_and_files_without_a_split_are_train():
    card = "---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: main, data_files: b.jsonl}\n---\n"
    assert hub_rows.of_split("x", ["a.jsonl", "b.jsonl"], card, "train", "main") == ["b.jsonl"]
    with pytest.raises(UserError, match=r"several configurations \(a, main\)"):
        hub_rows.of_split("x", ["a.jsonl", "b.jsonl"], card, "train", "other")
    assert hub_rows.of_split("x", ["README.md", "openhermes2_5.json"], "", "train") == ["openhermes2_5.json"]
    for names, split in ((["a.jsonl"], "test"), (["a.jsonl", "test.jsonl"], "train")):
        with pytest.raises(UserError, match="no file has the split"):
            hub_rows.of_split("x", names, "", split)
