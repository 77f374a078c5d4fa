"""Laws of rlhf_jax.data that need no file from outside: rows, tokenising, examples, packing and batches."""

import gzip
import json
from collections import Counter
from functools import partial

import numpy as np
import pytest

from rlhf_jax.config import DataConfig
from rlhf_jax.data import schemas, sources
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.collate import (
    collate_preference,
    collate_prompts,
    collate_ranking,
    collate_rated,
    collate_sft,
    collate_unpaired,
    eval_batches,
)
from rlhf_jax.data.comparisons import preference_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import pack, prompt_examples, prompt_key, sft_examples, split_by_prompt
from rlhf_jax.data.loading import load_rows
from rlhf_jax.data.messages import transcript
from rlhf_jax.data.rows import DroppedRow
from rlhf_jax.data.tokenizer import UNKNOWN, Tokenizer
from rlhf_jax.errors import UserError

WORDS = [*"abcdefgh:", "Human", "Assistant", "System", "yes", "no"]
CHATML = (
    "{%- for m in messages %}{{ '<start> ' + m['role'] + ' ' + m['content'] + '<end>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start> assistant ' }}{%- endif %}"
)
USER = [{"role": "user", "content": "a b"}]
LIMITS = Limits(8, 16, "drop")


def tiny(template=None, add_bos=False, **special):
    """A word-level Hugging Face tokenizer; eos is id 0, and pad is eos as in GPT-2."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<eos>", "<bos>", "<start>", "<end>", "<unk>"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(specials + WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if add_bos:
        ids = [("<bos>", 1), ("<eos>", 0)]
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    names = {"eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>", "pad_token": "<eos>", **special}
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<start>", "<end>"], **names)
    hf.chat_template = template
    return hf


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tiny())


@pytest.fixture(scope="module")
def chat():
    return Tokenizer(tiny(CHATML))


def turn(role, content):
    return {"role": role, "content": content}


def numbered(count):
    """Examples whose first token is their index, so that a batch shows which rows it holds."""
    return [
        {
            "tokens": np.arange(i, i + 2 + i % 3, dtype=np.int32),
            "loss_mask": np.arange(2 + i % 3) > 0,
            "where": f"row {i}",
        }
        for i in range(count)
    ]


SFT_COLLATE = partial(collate_sft, length=6, reduction="token")


# --- sources


def test_rows_know_their_line_in_every_format(tmp_path):
    lines = '{"a": 1}\n\n{"a": "x\u2028y"}\n'.encode()
    (tmp_path / "r.jsonl").write_bytes(lines)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "r.txt").write_text("one\ntwo\n<|endoftext|>\n\n<|endoftext|>\nthree <|endoftext|>\n")
    for name in ("r.jsonl", "r.jsonl.gz"):
        path = str(tmp_path / name)
        assert sources.read_rows(path) == [
            {"a": 1, "_where": f"{path}:1"},
            {"a": "x\u2028y", "_where": f"{path}:3"},
        ]
    path = str(tmp_path / "r.txt")
    assert sources.read_rows(path) == [
        {"text": "one\ntwo", "_where": f"{path}:1"},
        {"text": "three <|endoftext|>", "_where": f"{path}:6"},
    ]


def test_rows_from_copies_the_callers_dicts():
    mine = [{"prompt": "a"}, {"prompt": "b"}]
    rows = sources.rows_from(mine)
    rows[0]["prompt"] = "changed"
    assert mine == [{"prompt": "a"}, {"prompt": "b"}]
    assert rows[1] == {"prompt": "b", "_where": "row 1"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.txt", b" \n\n", "the file is empty"),
        (
            "rows.yaml",
            b"{}",
            "unknown extension; known are .jsonl, .jsonl.gz, .json, .csv, .tsv, .txt, .txt.gz, .parquet",
        ),
        ("bad.jsonl", b'{"a": 1}\n{"a": \n', "bad.jsonl:2: not JSON"),
        ("array.jsonl", b"[1]\n", "array.jsonl:1: a JSON list, not an object"),
        ("latin.txt", "ok\ncafé".encode("latin-1"), "latin.txt:2: not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-12], "broken gzip after line"),
        ("plain.txt.gz", b"not gzip", "broken gzip after line 0"),
    ],
)
def test_unreadable_files_say_what_and_where(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        sources.read_rows(str(tmp_path / name))
    assert expected in str(caught.value)


def test_missing_files_name_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    for path, expected in [
        (tmp_path / "trian.jsonl", "did you mean .*/train.jsonl"),
        (tmp_path / "zzz.txt", "no file of a similar name"),
        (tmp_path / "no" / "x.txt", "no directory"),
        (tmp_path, "a directory without a TFDS dataset"),
        ("", "set data.path"),
    ]:
        with pytest.raises(UserError, match=expected):
            sources.read_rows(str(path))
    wrong = [
        ([], "empty"),
        (["a"], "row 0: a str"),
        ({"prompt": "a"}, "not a dict, which is one row"),
        (7, "not from a int"),
    ]
    for source, expected in wrong:
        with pytest.raises(UserError, match=expected):
            sources.rows_from(source)


# --- schemas


def test_every_form_of_an_sft_row_becomes_the_same():
    answer = [{"role": "assistant", "content": "yes"}]
    wanted = {"prompt": USER, "response": answer, "finished": True, "_where": "f:1"}
    for row in [
        {"prompt": USER, "response": "yes"},
        {"prompt": USER, "response": answer},
        {"prompt": USER, "completion": answer},
        {"messages": USER + answer},
    ]:
        assert schemas.sft_row({**row, "_where": "f:1"}) == wanted
    transcript = {"prompt": "\n\nHuman: a\n\nAssistant:", "response": answer}
    assert schemas.sft_row(transcript)["response"] == " yes"
    assert schemas.sft_row({"prompt": "a", "response": answer})["response"] == "yes"


def test_votes_become_a_soft_label():
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert schemas.preference_row(row)["label"] == 1.0
    assert schemas.preference_row({**row, "votes": [2, 1, 0]})["label"] == pytest.approx(2 / 3)
    assert schemas.preference_row({**row, "votes": [1, 1, 1]})["label"] == pytest.approx(0.5)
    assert schemas.preference_row({**row, "margin": 2})["margin"] == 2.0


def test_raw_hh_transcripts_and_message_lists_split_at_the_last_turn():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = schemas.preference_row({"chosen": start + " yes", "rejected": start + " no"})
    assert transcript(row["prompt"]) + "\n\nAssistant:" == start
    assert (row["chosen"], row["rejected"]) == ([turn("assistant", "yes")], [turn("assistant", "no")])
    lists = {"chosen": USER + row["chosen"], "rejected": USER + row["rejected"]}
    assert schemas.preference_row(lists)["prompt"] == USER


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("sft", {"prompt": "a", "response": None}, "with a null response"),
        ("sft", {"prompt": "a", "response": " \n"}, "with an empty turn"),
        ("sft", {"prompt": "", "response": "b"}, "with an empty prompt"),
        ("sft", {"messages": [turn("user", "a"), turn("assistant", None)]}, "with a null response"),
        ("sft", {"prompt": [turn("user", "")], "response": "b"}, "with an empty turn"),
        ("preference", {"prompt": "a", "chosen": None, "rejected": "b"}, "with a null response"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": ""}, "with an empty turn"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b "}, "with chosen equal to rejected"),
        (
            "preference",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "whose two prompts differ",
        ),
        (
            "preference",
            {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: d"},
            "with an empty turn",
        ),
        (
            "preference",
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: d"},
            "that end in no assistant turn",
        ),
        ("prompt", {"prompt": []}, "with an empty prompt"),
        ("prompt", {"prompt": None}, "with an empty prompt"),
        ("sft", {"messages": None}, "with an empty turn"),
        ("text", {"text": None}, "with an empty text"),
        ("text", {"text": "\n"}, "with an empty text"),
    ],
)
def test_rows_with_nothing_to_learn_are_drops_with_a_reason(kind, row, reason):
    with pytest.raises(DroppedRow, match=r"^f:7: ") as caught:
        getattr(schemas, f"{kind}_row")({**row, "_where": "f:7"})
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("sft", {"prompt": "a", "answer": "b"}, r'no field "response" \(found: prompt, answer\); an sft row is'),
        ("sft", {"prompt": 3, "response": "b"}, '"prompt" is a int; give a string or a list'),
        ("sft", {"prompt": [turn("bot", "a")], "response": "b"}, "message 0 has role 'bot'; use one of system, user"),
        ("sft", {"prompt": [turn("user", 1)], "response": "b"}, "message 0 has content a int; give a string"),
        ("sft", {"prompt": [turn("assistant", "a")], "response": "b"}, "ends in an assistant turn; move"),
        ("sft", {"prompt": "a", "response": [turn("user", "b")]}, "must be one assistant message; put"),
        ("sft", {"messages": USER}, "end in an assistant turn; add"),
        ("preference", {"prompt": "a", "chosen": "b"}, 'no field "rejected"'),
        ("preference", {"chosen": "b", "rejected": "c"}, 'no "prompt", and .* share no beginning; add the field'),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "votes": [1, 2]}, "give three counts"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "votes": [0, 0, 0]}, "all zero; leave"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "'x'; give a finite number"),
        ("prompt", {"question": "a"}, 'no field "prompt"'),
        ("text", {"text": 1}, '"text" is a int; give a string'),
    ],
)
def test_wrong_rows_say_where_what_and_the_cure(kind, row, expected):
    with pytest.raises(UserError, match=f"^f:7: .*{expected}") as caught:
        getattr(schemas, f"{kind}_row")({**row, "_where": "f:7"})
    assert not isinstance(caught.value, DroppedRow)


# --- tokenizer


def test_response_ends_in_the_stop_id_and_prompt_does_not():
    with_bos = Tokenizer(tiny(add_bos=True))
    a, b = with_bos.encode_prompt("a b")[1:]
    assert with_bos.encode_prompt("a b") == [1, a, b]
    assert with_bos.encode_prompt("<bos> a b") == [1, a, b]  # not twice
    assert with_bos.encode_response("a b") == [a, b, 0]
    assert with_bos.decode([1, a, b, 0]) == "a b"


def test_chat_template_decides_the_closing_id(chat, tokenizer):
    assert chat.eos_ids == (0, 3)
    assert chat.end_id == 3
    answer = [turn("assistant", "yes")]
    rendered = chat.hf.apply_chat_template(USER + answer, tokenize=False)
    assert chat.encode_prompt(USER) + chat.encode_response(answer) == chat.hf(rendered)["input_ids"]
    assert chat.encode_response("yes")[-1] == 0
    assert chat.prompt_text(USER) == "<start> user a b<end><start> assistant "
    assert tokenizer.prompt_text(USER) == "\n\nHuman: a b\n\nAssistant:"
    assert tokenizer.end_id == 0
    assert Tokenizer(tiny(CHATML), eos_ids=[2]).end_id == 2  # explicit ids win


def test_stop_ids_come_from_the_directory_in_order(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert Tokenizer.load(str(tmp_path)).eos_ids == (0,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert Tokenizer.load(str(tmp_path)).eos_ids == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert Tokenizer.load(str(tmp_path)).eos_ids == (2, 3)
    assert Tokenizer.load(str(tmp_path), eos_ids=[1]).eos_ids == (1,)


def test_a_saved_tokenizer_loads_the_same(tmp_path, chat):
    chat.save(str(tmp_path))
    again = Tokenizer.load(str(tmp_path))
    assert (again.vocab_size, again.eos_ids, again.pad_id) == (chat.vocab_size, chat.eos_ids, chat.pad_id)
    assert again.encode_prompt(USER) == chat.encode_prompt(USER)


def test_tokenizer_errors(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no such directory"):
        Tokenizer.load(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 17, "num_attention_heads": 2}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"unusable tokenizer \(.*: .*17.*\); check config.json, and that"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="unusable tokenizer"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(UserError, match="outside the vocabulary of 19"):
        Tokenizer(tiny(), eos_ids=[19])
    with pytest.raises(UserError, match=r"set model.eos_ids"):
        Tokenizer(tiny(eos_token=None, pad_token=None))
    with pytest.raises(UserError, match="lone surrogates"):
        tokenizer.encode_prompt("a\ud83d")
    strict = Tokenizer(tiny("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(UserError, match=r"row 0: the chat template refuses .*roles must alternate"):
        sft_examples(sources.rows_from([{"prompt": USER, "response": "a"}]), strict, LIMITS, loss_on="response")


# --- examples


def test_loss_is_on_the_response_and_its_stop_id_only(tokenizer):
    rows = sources.rows_from([{"prompt": "a b", "response": "c"}, {"prompt": "a", "response": "c d"}])
    for row, example in zip(rows, sft_examples(rows, tokenizer, LIMITS, loss_on="response")[0], strict=True):
        batch = collate_sft([example], length=16, reduction="token", pad_id=tokenizer.pad_id)
        targets = batch["tokens"][batch["weights"] > 0].tolist()
        assert targets == tokenizer.encode_response(row["response"])
        assert targets[-1] == tokenizer.eos_ids[0] == tokenizer.pad_id
    first = sft_examples(rows, tokenizer, LIMITS, loss_on="all")[0][0]
    assert first["loss_mask"].tolist() == [False, True, True, True]


def test_long_documents_become_consecutive_windows(tokenizer):
    text = "a b c d e f g"
    limits = Limits(8, 3, "drop")
    examples, report = sft_examples(sources.rows_from([{"text": text}]), tokenizer, limits, loss_on="all")
    joined = np.concatenate([example["tokens"] for example in examples])
    assert joined.tolist() == [*tokenizer.encode_prompt(text), tokenizer.eos_ids[0]]
    assert [len(example["tokens"]) for example in examples] == [3, 3, 2]
    assert not any(example["loss_mask"][0] for example in examples)
    assert report.kept == 1


def test_too_long_rows_are_dropped_cut_or_refused(tokenizer):
    rows = sources.rows_from([{"prompt": "a b c d", "response": "e f g"}, {"prompt": "a", "response": "b"}])
    make = partial(sft_examples, rows, tokenizer, loss_on="response")
    _, report = make(limits=Limits(3, 9, "drop"))
    assert (
        str(report)
        == "kept 1 of 2 rows; dropped 1 with a prompt over 3 tokens; truncated 0; read as 2 prompt-completion"
    )
    _, report = make(limits=Limits(4, 7, "drop"))
    assert report.dropped == {"longer than 7 tokens": 1}
    examples, report = make(limits=Limits(2, 4, "truncate"))
    assert tokenizer.decode(examples[0]["tokens"]) == "c d e f"  # the prompt's end, the response's start, no stop id
    assert examples[0]["tokens"][-1] != tokenizer.eos_ids[0]
    assert (report.kept, report.truncated) == (2, 1)
    with pytest.raises(UserError, match=r"row 0: a prompt of 4 tokens is over data.max_prompt_length = 3; raise it"):
        make(limits=Limits(3, 9, "error"))
    with pytest.raises(UserError, match=r"row 0: 8 tokens is over data.max_length = 7"):
        make(limits=Limits(4, 7, "error"))
    with pytest.raises(UserError, match="max_prompt_length 7 must be below max_length 7"):
        make(limits=Limits(7, 7, "drop"))
    with pytest.raises(UserError, match="no row is left: kept 0 of 2 rows; dropped 2 longer than 2 tokens"):
        sft_examples(rows[1:] * 2, tokenizer, Limits(1, 2, "drop"), loss_on="all")
    with pytest.raises(UserError, match="too_long 'cut' is unknown"):
        make(limits=Limits(3, 9, "cut"))


def test_a_cut_prompt_keeps_its_bos():
    with_bos = Tokenizer(tiny(add_bos=True))
    rows = sources.rows_from([{"prompt": "a b c d"}])
    [example], _ = prompt_examples(rows, with_bos, Limits(3, too_long="truncate"))
    assert example["tokens"].tolist() == [1, *with_bos.encode_prompt("c d")[1:]]


def test_preferences_count_drops_and_stop_at_wrong_rows(tokenizer):
    rows = sources.rows_from(
        [
            {"prompt": "a", "chosen": "b", "rejected": "c", "votes": [1, 2, 0], "margin": 0.5},
            {"prompt": "a", "chosen": "b", "rejected": None},
            {"prompt": "a", "chosen": "b", "rejected": ""},
            {"prompt": "a", "chosen": "b c d e", "rejected": "b c d f"},
        ]
    )
    make = partial(preference_examples, tokenizer=tokenizer, limits=Limits(2, 4, "truncate"))
    [example], report = make(rows)
    assert example["chosen"].tolist() == tokenizer.encode_prompt("a") + tokenizer.encode_response(
        "c"
    )  # most prefer it
    assert (example["label"], example["margin"], example["prompt_key"]) == (pytest.approx(2 / 3), 0.5, "a")
    assert example["prompt_length"] == 1
    assert report.dropped == {
        "with a null response": 1,
        "with an empty turn": 1,
        "with chosen equal to rejected": 1,  # once cut to four tokens
    }
    with pytest.raises(UserError, match='row 1: no field "chosen"'):
        make(sources.rows_from([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}]))


def test_prompts_keep_their_columns(chat):
    rows = sources.rows_from([{"prompt": USER, "answer": "7", "id": 1}])
    [example], _ = prompt_examples(rows, chat, Limits(8, too_long="drop"))
    assert example["columns"] == {"answer": "7", "id": 1}
    assert example["prompt"] == chat.prompt_text(USER)
    assert example["tokens"].tolist() == chat.encode_prompt(USER)


def test_split_by_prompt_leaks_no_prompt_and_is_stable():
    rows = sources.rows_from([{"prompt": f"p{i % 40}", "response": str(i)} for i in range(200)])
    train, held_out = split_by_prompt(rows, 0.25, seed=3)
    assert {prompt_key(r) for r in train}.isdisjoint(prompt_key(r) for r in held_out)
    assert len(train) + len(held_out) == 200
    assert 0 < len(held_out) < 100
    assert split_by_prompt(rows, 0.25, seed=3) == (train, held_out)
    assert split_by_prompt(rows, 0.25, seed=4) != (train, held_out)
    fewer = split_by_prompt(rows[:100], 0.25, seed=3)[1]
    assert fewer == [row for row in held_out if row in rows[:100]]
    assert split_by_prompt(rows, 0, seed=3) == (rows, [])


def test_split_gives_one_prompt_one_key_in_every_kind_of_row():
    hh = {"chosen": "\n\nHuman: a b\n\nAssistant: yes", "rejected": "\n\nHuman: a b\n\nAssistant: no"}
    messages = {"messages": [*USER, turn("assistant", "yes")]}
    assert prompt_key(hh) == prompt_key(messages) == prompt_key({"prompt": USER})
    assert isinstance(prompt_key({"nonsense": object()}), str)


def test_held_out_rows_that_are_trained_on_are_counted_whatever_kind_of_row_they_are(tmp_path, capsys):
    hh = "\n\nHuman: a b\n\nAssistant: "
    train = [
        {"messages": [*USER, turn("assistant", "yes")], "id": 1},
        {"prompt": "p", "response": "r"},
        {"text": "d\n"},
    ]
    held_out = [
        {"id": 2, "messages": [*USER, turn("assistant", "yes")]},  # the same row
        {"chosen": f"{hh}x", "rejected": f"{hh}y"},  # another of that prompt
        {"prompt": "p", "response": "other"},
        {"prompt": "q", "response": "r"},
        {"text": "d"},
        {"prompt": [1]},  # whose fault another says
    ]
    for name, rows in (("train", train), ("eval", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=f"{tmp_path}/train.jsonl", eval_path=f"{tmp_path}/eval.jsonl")
    line = "have a prompt of the training rows, 1 are equal to one of these; what they measure is not held out\n"
    for given in ((None, None), (train, held_out)):
        rows = load_rows(data, *given, 0)
        assert capsys.readouterr().out == f"! held-out rows: 3 of 6 {line}" and [*map(len, rows)] == [3, 6]
    load_rows(data, None, held_out[3:5], 0)
    load_rows(DataConfig(path=data.path, eval_fraction=0.5), None, None, 0)
    assert capsys.readouterr().out == ""


def test_split_cuts_a_single_document_at_a_line_break():
    [row] = sources.rows_from([{"text": "".join(f"line {i}\n" for i in range(100))}])
    [train], [held_out] = split_by_prompt([row], 0.1, seed=0)
    assert train["text"] + held_out["text"] == row["text"]
    assert held_out["text"].startswith("line ")
    assert 0.05 < len(held_out["text"]) / len(row["text"]) < 0.15


def test_few_rows_have_a_prompt_on_either_side_and_one_prompt_has_none():
    for count, fraction in ((2, 1e-9), (3, 0.05), (3, 1 - 1e-9), (40, 1e-9)):
        rows = sources.rows_from([{"prompt": f"p{i}"} for i in range(count)] * 2)
        train, held_out = split_by_prompt(rows, fraction, seed=0)
        assert len(train) + len(held_out) == 2 * count and 2 in (len(train), len(held_out))
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    rows = sources.rows_from([{"prompt": "same"}] * 4)
    assert split_by_prompt(rows, 0, seed=0) == (rows, [])
    with pytest.raises(UserError, match=r"all 4 rows have one prompt.*data\.eval_fraction 0"):
        split_by_prompt(rows, 0.5, seed=0)
    with pytest.raises(UserError, match="below 1"):
        split_by_prompt(rows, 1.0, seed=0)


# --- packing


def test_packing_keeps_every_token_and_restarts_positions():
    examples = numbered(500)
    packed = pack(examples, 7)
    restored = []
    for row in packed:
        assert len(row["tokens"]) <= 7
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            assert row["positions"][inside].tolist() == list(range(inside.sum()))
            restored.append((row["tokens"][inside].tolist(), row["loss_mask"][inside].tolist()))
    wanted = [(example["tokens"].tolist(), example["loss_mask"].tolist()) for example in examples]
    assert sorted(restored) == sorted(wanted)
    assert sum(len(row["tokens"]) for row in packed) / (7 * len(packed)) > 0.95
    with pytest.raises(UserError, match="4 tokens does not fit into 3"):
        pack(examples, 3)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_packing_changes_no_weight(reduction):
    examples = numbered(9)
    plain = collate_sft(examples, length=6, reduction=reduction)
    packed = collate_sft(pack(examples, 6), length=6, reduction=reduction)
    for example in examples:
        starts = (packed["positions"] == 0) & (packed["segment_ids"] > 0)
        row, start = np.argwhere(starts & (packed["tokens"] == example["tokens"][0]))[0]
        segment = packed["segment_ids"][row] == packed["segment_ids"][row, start]
        got = packed["weights"][row][segment]
        wanted = plain["weights"][int(example["tokens"][0])][: len(got)]
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


# --- collates


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_sft_weights_sum_to_one_by_the_reduction(reduction):
    examples = numbered(5)
    batch = collate_sft(examples, length=8, reduction=reduction)
    assert batch["weights"].dtype == np.float32
    assert batch["weights"].sum() == pytest.approx(1)
    targets = [example["loss_mask"].sum() for example in examples]
    each = [1 / sum(targets)] * 5 if reduction == "token" else [1 / (5 * n) for n in targets]
    for row, (example, weight) in enumerate(zip(examples, each, strict=True)):
        n = len(example["tokens"])
        np.testing.assert_allclose(batch["weights"][row, :n], weight * example["loss_mask"], rtol=1e-6)
        assert not batch["weights"][row, n:].any()


def test_masks_are_never_inferred_from_ids():
    """With every token equal to the pad id, masks still tell real tokens from padding."""
    tokens = np.zeros(3, np.int32)
    sft = collate_sft([{"tokens": tokens, "loss_mask": np.array([False, True, True])}], length=5, reduction="token")
    assert sft["segment_ids"].tolist() == [[1, 1, 1, 0, 0]]
    assert sft["positions"].tolist() == [[0, 1, 2, 0, 0]]
    assert (sft["weights"] > 0).tolist() == [[False, True, True, False, False]]
    pair = {"chosen": tokens, "rejected": tokens[:2], "label": 1.0, "margin": 0.0, "prompt_length": 1}
    preference = collate_preference([pair], length=4)
    assert preference["segment_ids"].tolist() == [[[1, 1, 1, 0], [1, 1, 0, 0]]]
    assert preference["last"].tolist() == [[2, 1]]
    prompts = collate_prompts([{"tokens": tokens[:2], "prompt": "", "columns": {}}], buckets=[4])
    assert prompts["mask"].tolist() == [[False, False, True, True]]


def test_padding_takes_the_pad_id():
    pair = {"chosen": np.array([1, 2]), "rejected": np.array([3, 4, 5])[:1], "label": 0.5, "margin": 2.0}
    pair |= {"prompt_length": 1}
    batch = collate_preference([pair, pair], length=3, pad_id=9)
    assert batch["tokens"][0].tolist() == [[1, 2, 9], [3, 9, 9]]
    assert {name: array.shape for name, array in batch.items()} == {
        "tokens": (2, 2, 3), "segment_ids": (2, 2, 3), "positions": (2, 2, 3), "last": (2, 2),
        "weights": (2,), "labels": (2,), "margins": (2,),
        "prompt_lengths": (2,), "lengths": (2, 2), "token_weights": (2, 2),
    }  # fmt: skip
    assert batch["weights"].sum() == 1
    assert (batch["labels"][0], batch["margins"][0]) == (0.5, 2.0)
    with pytest.raises(UserError, match="2 tokens does not fit into 1"):
        collate_preference([pair], length=1)
    with pytest.raises(UserError, match="reduction 'mean' is unknown"):
        collate_sft(numbered(2), length=4, reduction="mean")


def prompt_example(size, **columns):
    return {"tokens": np.arange(1, size + 1, dtype=np.int32), "prompt": "p" * size, "columns": columns}


def test_prompts_pad_left_to_the_smallest_bucket():
    batch = collate_prompts([prompt_example(2, a=1, b=2), prompt_example(3, a=3)], buckets=[2, 4, 8], pad_id=7)
    assert batch["tokens"].tolist() == [[7, 7, 1, 2], [7, 1, 2, 3]]
    assert batch["prompts"] == ["pp", "ppp"]
    assert batch["columns"] == {"a": [1, 3]}
    with pytest.raises(UserError, match=r"a prompt of 9 tokens fits no bucket of \[2, 4, 8\]"):
        collate_prompts([prompt_example(9)], buckets=[2, 4, 8])


# --- batches


def test_batches_are_a_pure_function_of_seed_and_step():
    make = partial(Batches, numbered(11), batch_size=4, collate=SFT_COLLATE)
    batches, again = make(seed=1), make(seed=1)
    assert len(batches) == 2
    for step in (5, 0, 3, 1000):  # asked for in any order, from a fresh object
        for name, array in batches[step].items():
            np.testing.assert_array_equal(array, again[step][name])
    assert any((make(seed=2)[step]["tokens"] != batches[step]["tokens"]).any() for step in range(2))


def order_of(batches, epoch):
    steps = range(epoch * len(batches), (epoch + 1) * len(batches))
    return [int(i) for step in steps for i in batches[step]["tokens"][:, 0]]


def test_every_epoch_sees_each_row_once_in_a_fresh_order():
    batches = Batches(numbered(12), batch_size=4, seed=0, collate=SFT_COLLATE)
    orders = [order_of(batches, epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def sized(kind, sizes):
    """Examples of a kind whose longest sequence has these lengths, each token the example's number."""
    ids = [np.full(size, i, np.int32) for i, size in enumerate(sizes)]
    one = [np.full(1, i, np.int32) for i in range(len(sizes))]
    rest = {"prompt_length": 1, "label": 1.0, "margin": 0.0, "rating": 1.0}
    of = {
        "sft": lambda i: {"tokens": ids[i], "loss_mask": np.ones(sizes[i], bool)},
        "pairs": lambda i: {"chosen": one[i], "rejected": ids[i], **rest},
        "unpaired": lambda i: {"response": ids[i], "other": one[i], **rest},
        "ratings": lambda i: {"response": ids[i], **rest},
        "rankings": lambda i: {"responses": [one[i], ids[i], one[i]], "ranks": np.arange(3.0), **rest},
    }[kind]
    return [{**of(i), "where": f"row {i}"} for i in range(len(sizes))]


COLLATES = {
    "sft": partial(collate_sft, reduction="sequence"),
    "pairs": collate_preference,
    "unpaired": collate_unpaired,
    "ratings": collate_rated,
    "rankings": partial(collate_ranking, width=3),
}
SIZES = {
    "few_long": [3] * 25 + [30] * 2,  # the longest bucket has fewer rows than a batch
    "few_short": [3] + [12] * 11 + [30] * 9,
    "equal": [3] * 19,
    "all_long": [31] * 10,
    "mixed": np.random.default_rng(3).integers(1, 32, 45).tolist(),
}


@pytest.mark.parametrize(
    ("kind", "sizes", "buckets", "size"),
    [
        *[("sft", "few_long", (4, 16, 32), size) for size in (4, 7, 10)],
        *[("sft", sizes, (4, 16, 32), 7) for sizes in SIZES],
        *[(kind, "few_long", (4, 16, 32), 6) for kind in COLLATES],
        *[(kind, "mixed", (), 7) for kind in ("sft", "rankings")],
    ],
)
def test_over_epochs_every_row_is_trained_equally_often(kind, sizes, buckets, size):
    """Whatever its length: what an epoch leaves over goes round."""
    examples = sized(kind, SIZES[sizes])
    num, collate = len(examples), partial(COLLATES[kind], length=32)
    batches = Batches(examples, batch_size=size, seed=2, collate=collate, buckets=buckets)
    assert (len(batches), batches.left_over) == divmod(num, size)
    epochs, times = 7, np.zeros(num, int)
    for epoch in range(epochs):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        rows = [int(w.removeprefix("row ")) for step in steps for w in batches.where(step)]
        assert len(set(rows)) == len(rows) == num - batches.left_over
        times[rows] += 1
        if epoch == 0:  # what `where` says is what is trained
            first = batches[0]["tokens"].reshape(size, -1)[:, 0].tolist()
            assert first == [int(w.removeprefix("row ")) for w in batches.where(0)]
    trained = {int(w.removeprefix("row ")) for step in range(2) for w in batches.where(step)}
    assert batches.reached(2) == sorted(trained)
    assert batches.reached(epochs * len(batches)) == np.flatnonzero(times).tolist()
    assert times.max() - times.min() <= 1
    assert times.sum() == epochs * (num - batches.left_over)


@pytest.mark.parametrize("buckets", [(), (3, 6)], ids=["", "buckets"])
def test_seeking_to_a_step_is_iterating_to_it(buckets):
    """Over three epochs; so every process, whenever it asks, has the same global batch."""
    make = partial(Batches, numbered(19), batch_size=8, seed=5, collate=SFT_COLLATE, buckets=buckets)
    iterated = make()
    for step in range(3 * len(iterated)):
        whole, sought = iterated[step], make()[step]
        assert whole["weights"].sum() == pytest.approx(1)
        for name in whole:
            np.testing.assert_array_equal(sought[name], whole[name])


def test_buckets_pad_less():
    rng = np.random.default_rng(0)
    sizes = np.append(rng.integers(1, 65, 202), 64)
    examples = [
        {"tokens": np.full(n, i, np.int32), "loss_mask": np.ones(n, bool), "where": f"row {i}"}
        for i, n in enumerate(sizes)
    ]
    collate = partial(collate_sft, length=64, reduction="token")
    make = partial(Batches, examples, batch_size=8, seed=1, collate=collate)
    plain, buckets = make(), make(buckets=[16, 32, 64])
    assert len(plain) == len(buckets) == 25
    orders = []
    for epoch in range(3):
        batches = [buckets[epoch * 25 + i] for i in range(25)]
        widths = [batch["tokens"].shape[1] for batch in batches]
        assert set(widths) == {16, 32, 64} and widths != sorted(widths)
        assert all(batch["weights"].sum() == pytest.approx(1) for batch in batches)
        rows = [int(i) for batch in batches for i in batch["tokens"][:, 0]]
        assert len(set(rows)) == 200
        orders.append(tuple(rows))
        padded = sum(batch["tokens"].size for batch in batches)
        assert padded < 0.75 * sum(plain[epoch * 25 + i]["tokens"].size for i in range(25))
    assert len(set(orders)) == 3
    assert buckets.where(30) == [f"row {i}" for i in buckets[30]["tokens"][:, 0]]
    pairs = [{"chosen": np.ones(3, np.int32), "rejected": np.ones(9, np.int32), "label": 1, "margin": 0}]
    pairs[0]["prompt_length"] = 1
    batch = Batches(pairs, batch_size=1, seed=0, collate=partial(collate_preference, length=64), buckets=[4, 16, 64])[
        0
    ]
    assert batch["tokens"].shape == (1, 2, 16)
    with pytest.raises(UserError, match=r"an example of \d+ tokens fits no bucket of \[16, 32\]; raise the last one"):
        make(buckets=[16, 32])


def test_batches_say_which_sizes_do_not_fit():
    make = partial(Batches, numbered(5), seed=0, collate=SFT_COLLATE)
    with pytest.raises(UserError, match=r"5 examples do not fill one batch of 8; set data.batch_size to at most 5"):
        make(batch_size=8)
    with pytest.raises(UserError, match="seed -1 is outside"):
        Batches(numbered(5), seed=-1, collate=SFT_COLLATE, batch_size=1)
    with pytest.raises(TypeError, match="not iterable"):
        iter(make(batch_size=1))


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_eval_weights_sum_to_one_over_all_batches(reduction):
    examples = numbered(10)
    collate = partial(collate_sft, length=6, reduction=reduction)
    batches = eval_batches(examples, batch_size=4, collate=collate)
    assert [len(batch["tokens"]) for batch in batches] == [4, 4, 4]
    got = np.concatenate([batch["weights"] for batch in batches])
    np.testing.assert_allclose(got[:10], collate(examples)["weights"], rtol=1e-6)
    assert not got[10:].any()
    assert np.concatenate([batch["tokens"] for batch in batches])[:10, 0].tolist() == list(range(10))
    limited = eval_batches(examples, batch_size=4, collate=collate, limit=2)
    assert len(limited) == 2
    assert sum(batch["weights"].sum() for batch in limited) == pytest.approx(1)
    assert len(eval_batches(examples, batch_size=4, collate=collate, limit=9)) == 3


def test_eval_prompts_say_which_rows_are_real():
    examples = [prompt_example(size, row=size) for size in (1, 2, 3)]
    batches = eval_batches(examples, batch_size=2, collate=partial(collate_prompts, buckets=[4]))
    assert [batch["valid"].tolist() for batch in batches] == [[True, True], [True, False]]
    assert batches[1]["columns"] == {"row": [3, 3]}


def test_there_is_nothing_to_evaluate_on_without_examples():
    with pytest.raises(UserError, match="no examples to evaluate on"):
        eval_batches([], batch_size=4, collate=SFT_COLLATE)


def test_importing_the_data_package_imports_no_heavy_library():
    import subprocess
    import sys

    code = "import sys, rlhf_jax.data.batches; print({'jax', 'grain', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- all assistant turns

TALK = [turn("user", "a b"), turn("assistant", "c d"), turn("user", "e"), turn("assistant", "f"), turn("user", "g")]
MARKED = (
    "{%- for m in messages %}{{ '<start> ' + m['role'] + ' ' }}{%- if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<end>' }}{% endgeneration %}{%- else %}{{ m['content'] + '<end>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start> assistant ' }}{%- endif %}"
)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefix difference", "generation marks"])
def test_answers_in_a_prompt_are_those_of_the_assistant_with_their_closing_token(template):
    tokenizer = Tokenizer(tiny(template, add_bos=True))
    ids, mask = np.array(tokenizer.encode_prompt(TALK)), tokenizer.answers_in(TALK)
    assert mask.shape == ids.shape
    wanted = [*tokenizer.encode_response(TALK[1:2]), *tokenizer.encode_response(TALK[3:4])]
    assert ids[mask].tolist() == wanted
    assert not tokenizer.answers_in("a b").any() and not tokenizer.answers_in(USER).any()


def test_answers_in_a_transcript_are_the_words_alone(tokenizer):
    with_bos = Tokenizer(tiny(add_bos=True))
    ids = np.array(with_bos.encode_prompt(TALK))
    assert with_bos.decode(ids[with_bos.answers_in(TALK)]) == "c d f"
    assert ids[0] == 1 and not with_bos.answers_in(TALK)[0]


def test_loss_on_the_assistant_is_on_every_answer(chat):
    row = {"messages": [*TALK, turn("assistant", "h")], "_where": "f:1"}
    wide = Limits(40, 60, "drop")
    masks = {}
    for loss_on in ("response", "assistant", "all"):
        [example], _ = sft_examples([row], chat, wide, loss_on=loss_on)
        masks[loss_on] = example["loss_mask"]
    assert chat.decode(example["tokens"][masks["assistant"]]) == "c d f h"
    assert (masks["response"] <= masks["assistant"]).all() and (masks["assistant"] <= masks["all"]).all()
    cut = Limits(10, 60, "truncate")
    [example], report = sft_examples([row], chat, cut, loss_on="assistant")
    assert chat.decode(example["tokens"][example["loss_mask"]]) == "f h" and report.truncated == 1


def test_a_template_that_rewrites_history_is_refused():
    forgets = "{{ messages | length }} {% for m in messages %}{{ '<start> ' + m['content'] + '<end>' }}{% endfor %}"
    with pytest.raises(UserError, match=r"changes earlier turns when later ones follow.* set sft.loss_on to response"):
        Tokenizer(tiny(forgets)).answers_in(TALK)


def test_what_the_tokenizer_has_no_token_for_is_counted(chat):
    known, other = "a b", "a \u4e2d b"
    for text, wanted in ((known, 0), (other, 1)):
        turns, remarks = [turn("user", text)], [Counter() for _ in range(5)]
        chat.encode_prompt(text, remarks[0])
        chat.encode_prompt(turns, remarks[1])
        chat.encode_document(text, remarks[2])
        chat.encode_response(text, remarks=remarks[3])
        chat.encode_response([turn("assistant", text)], turns, remarks=remarks[4])
        assert [count[UNKNOWN] for count in remarks] == [wanted, 1, *[wanted] * 3]  # 1: words of the template itself
    rows = [{"prompt": known, "response": "b"}, {"prompt": known, "response": other}, {"text": other}]
    rows = sources.rows_from(rows)
    assert sft_examples(rows, Tokenizer(tiny()), Limits(9, 20), loss_on="response")[1].remarks == {UNKNOWN: 2}
    remarks = Counter()
    Tokenizer(tiny(unk_token="<eos>")).encode_document(known, remarks)  # as of GPT-2
    assert not +remarks
