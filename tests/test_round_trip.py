"""What a model sampled is written as text and ids; read again, it is the same tokens: on every kind of tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, metaspace_tokenizer, word_tokenizer

from rlhf_jax.data.comparisons import preference_examples, ranking_examples, rating_examples, unpaired_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import sft_examples
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import ALTERED, HIDDEN, OTHER_IDS, RESPACED, UNKNOWN, Tokenizer
from rlhf_jax.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACED = (  # as Mistral's: the answer starts with a blank
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
KINDS = {
    "byte BPE": lambda: byte_tokenizer(),
    "always": lambda: metaspace_tokenizer("always"),
    "first": lambda: metaspace_tokenizer("first"),
    "never": lambda: metaspace_tokenizer("never"),
    "legacy": lambda: metaspace_tokenizer("legacy"),
    "WordPiece": lambda: word_tokenizer("WordPiece"),
    "white space": lambda: word_tokenizer(),
    "ChatML": lambda: byte_tokenizer(chat_template=CHATML),
    "blank before an answer": lambda: byte_tokenizer(chat_template=SPACED),
    "blank, always": lambda: metaspace_tokenizer("always", SPACED),
    "blank, legacy": lambda: metaspace_tokenizer("legacy", SPACED),
}
LIMITS = Limits(200, 400, "error")
OF_SOME = {UNKNOWN, ALTERED, RESPACED, HIDDEN}  # what some vocabularies say of a template, and of what is drawn
each_kind = pytest.mark.parametrize("tokenizer", [Tokenizer(make()) for make in KINDS.values()], ids=list(KINDS))
MESSAGES = [{"role": "user", "content": "yes, it is"}]
PROMPTS = ["it is", MESSAGES]


def drawn(tokenizer, seed, finished):
    """Ids that a sampler may draw: any but stop ids, and then one if it finished."""
    rng = np.random.default_rng(seed)
    free = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.eos_ids]
    ids = rng.choice(free, size=rng.integers(1, 9)).tolist()
    return ids + [int(rng.choice(tokenizer.eos_ids))] * finished


def written(tokenizer, prompt, ids, finished):
    return {
        "prompt": prompt,
        "response": tokenizer.response_text(ids, prompt),
        "finished": finished,
        "response_ids": ids,
    }


@each_kind
@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "messages"])
def test_sampled_ids_are_what_is_trained(tokenizer, prompt):
    seen = 0
    for seed in range(40):
        finished = bool(seed % 2)
        ids = drawn(tokenizer, seed, finished)
        row = written(tokenizer, prompt, ids, finished)
        if not row["response"].strip():
            continue
        seen += 1
        [example], report = sft_examples(rows_from([row]), tokenizer, LIMITS, loss_on="response")
        assert example["tokens"][example["loss_mask"]].tolist() == ids
        assert not report.remarks.keys() - OF_SOME
    assert seen > 20


@each_kind
def test_pairs_rankings_and_labelled_answers_carry_their_ids_too(tokenizer):
    for prompt in PROMPTS:
        a, b = (drawn(tokenizer, seed, finished=True) for seed in (3, 5))
        texts = [tokenizer.response_text(ids, prompt) for ids in (a, b)]
        given = tokenizer.encode_prompt(prompt)
        pair = {"prompt": prompt, "chosen": texts[0], "rejected": texts[1], "chosen_ids": a, "rejected_ids": b}
        [found], _ = preference_examples(rows_from([pair]), tokenizer, LIMITS)
        assert found["chosen"].tolist() == given + a and found["rejected"].tolist() == given + b
        items = [
            {"text": text, "rank": rank, "ids": ids}
            for rank, (text, ids) in enumerate(zip(texts, (a, b), strict=True))
        ]
        for rows in ([pair], [{"prompt": prompt, "responses": items}]):
            [found], _ = ranking_examples(rows_from(rows), tokenizer, LIMITS)
            assert [ids.tolist() for ids in found["responses"]] == [given + a, given + b]
        one = written(tokenizer, prompt, a, True)
        [found], _ = rating_examples(rows_from([{**one, "rating": 3}]), tokenizer, LIMITS)
        assert found["response"].tolist() == given + a
        rows = [{**one, "label": True}, {**one, "prompt": "another", "label": False}]
        assert unpaired_examples(rows_from(rows), tokenizer, LIMITS)[0][0]["response"].tolist() == given + a


@each_kind
def test_ids_of_another_text_are_left_and_counted(tokenizer):
    ids = drawn(tokenizer, 3, True)
    row = written(tokenizer, "it is", ids, True)
    changed = [{**row, "response": row["response"] + " two"}, {**row, "finished": False}]
    changed += [{**row, "response_ids": [*ids[:-1], ids[-1], ids[-1]]}, {**row, "response_ids": [10**6, *ids]}]
    examples, report = sft_examples(rows_from(changed), tokenizer, LIMITS, loss_on="response")
    assert {name: count for name, count in report.remarks.items() if name not in OF_SOME} == {OTHER_IDS: 4}
    assert "4 responses whose ids were not of their text" in str(report)
    for row, example in zip(changed, examples, strict=True):
        wanted = tokenizer.encode_response(row["response"], finished=row["finished"])
        assert example["tokens"][example["loss_mask"]].tolist() == wanted


@pytest.mark.parametrize("ids", ["1 2", [1, "2"], [1.0], [True], 7, {"a": 1}])
def test_ids_that_are_none_are_a_bad_row(ids):
    tokenizer = Tokenizer(byte_tokenizer())
    rows = rows_from([{"prompt": "a", "response": "b", "response_ids": ids}])
    with pytest.raises(UserError, match=r'row 0: "response_ids" is .*; give a list of token ids, or leave it out'):
        sft_examples(rows, tokenizer, LIMITS, loss_on="response")


TEXTS = [" it is", ", yes", "'s", "\n", "  two", "yes", " 茶", "😀 it", "it\n", " "]


@pytest.mark.parametrize("scheme", ["always", "first", "never", "legacy"])
def test_a_response_is_the_continuation_that_its_text_says(scheme):
    """Prompt and response decode to their two texts side by side: no blank is added, none is lost."""
    tokenizer = Tokenizer(metaspace_tokenizer(scheme))
    for text in TEXTS:
        ids = tokenizer.encode_response(text)
        assert tokenizer.decode(tokenizer.encode_prompt("two") + ids) == "two" + text
        assert tokenizer.response_text(ids, "two") == text
        assert "▁" not in tokenizer.hf.convert_ids_to_tokens(ids)[: 1 - text.startswith(" ")]
    assert tokenizer.encode_response(" yes") == tokenizer.hf.convert_tokens_to_ids(["▁yes", "</s>"])


# ---- any row: rows -> tokens -> text -> rows

LAWS = settings(derandomize=True, deadline=None, max_examples=25)
SAID = st.text(st.sampled_from("yes it, two'.\n\t 茶é😀ab7") | st.characters(codec="utf-8"), min_size=1, max_size=12)


@each_kind
@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "messages"])
@LAWS
@given(data=st.data())
def test_whatever_is_drawn_is_trained(tokenizer, prompt, data):
    """Ids of a sampler -> text and ids in a row -> tokens of an example: the same ids; and the text stays."""
    finished = data.draw(st.booleans())
    free = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.eos_ids]
    ids = data.draw(st.lists(st.sampled_from(free), min_size=1, max_size=12))
    ids = ids + [data.draw(st.sampled_from(tokenizer.eos_ids))] * finished
    row = json.loads(json.dumps(written(tokenizer, prompt, ids, finished)))
    if not row["response"].strip():
        return
    [example], report = sft_examples(rows_from([row]), tokenizer, LIMITS, loss_on="response")
    assert example["tokens"].tolist() == tokenizer.encode_prompt(prompt) + ids
    assert not report.remarks.keys() - OF_SOME
    assert written(tokenizer, prompt, example["tokens"][example["loss_mask"]].tolist(), finished) == row


@each_kind
@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "messages"])
@LAWS
@given(text=SAID, finished=st.booleans())
def test_ids_that_the_tokenizer_makes_come_back_from_their_text_alone(tokenizer, prompt, text, finished):
    """Text -> ids -> text -> ids, without ids in the row; and round by round nothing is added to the text."""
    if not text.strip():
        return
    row = {"prompt": prompt, "response": text, "finished": finished}
    rounds = []
    for _ in range(3):
        [example], _ = sft_examples(rows_from([row]), tokenizer, LIMITS, loss_on="response")
        rounds.append(example["tokens"][example["loss_mask"]].tolist())
        row = {**row, "response": tokenizer.response_text(rounds[-1], prompt)}
        if not row["response"].strip():
            return
    assert rounds[1] == rounds[2] and (rounds[0] == rounds[1] or tokenizer.hf.unk_token_id in rounds[0])


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("WordPiece", "white space")])
@LAWS
@given(text=SAID, before=SAID)
def test_prompt_and_response_say_their_texts_side_by_side(name, text, before):
    tokenizer, before = (
        Tokenizer(KINDS[name]()),
        "two" + before,
    )  # a blank at a prompt's start is the tokenizer's affair
    ids = tokenizer.encode_response(text)
    assert tokenizer.response_text(ids, before) == text
    assert tokenizer.decode([*tokenizer.encode_prompt(before), *ids]) == before + text
