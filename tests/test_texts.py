"""What a tokenizer makes of a text otherwise than it stands is counted, wherever texts become ids."""

import json
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
import tokenizers
from chats import TEMPLATES, answer, chat_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st
from test_round_trip import CHATML, KINDS, LIMITS
from tiny import ARCH, ONE, byte_tokenizer, iteration, metaspace_tokenizer, model_params, toy_directory, toy_run
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.commands.label.items import turns_of as label_turns
from rlhf_jax.config import MeshConfig, ModelConfig, RewardJudgeConfig, SamplingConfig
from rlhf_jax.data import lint, tfds_rows
from rlhf_jax.data.ballots import ranking_row
from rlhf_jax.data.chat import TURNED, in_transcript
from rlhf_jax.data.comparisons import preference_examples, unpaired_examples
from rlhf_jax.data.encoding import Encoder, Limits
from rlhf_jax.data.examples import prompt_examples, sft_examples
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import (
    ALTERED,
    BROKEN,
    HIDDEN,
    OTHER_IDS,
    RESPACED,
    SPOILED,
    STOPPED,
    UNKNOWN,
    WITHIN,
    Tokenizer,
)  # fmt: skip
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judges import plain_text
from rlhf_jax.feedback.reward_judge import RewardJudge
from rlhf_jax.feedback.sources import fitting
from rlhf_jax.inference.generate import Generator, decode
from rlhf_jax.inference.scoring import score_example
from rlhf_jax.models import Model
from rlhf_jax.models.loading import Loaded, check_same_tokenizer, load_model, load_tokenizer, save_model
from rlhf_jax.ppo import train as ppo_train
from rlhf_jax.runs.outcome import not_seen, widened
from rlhf_jax.sharding import make_mesh
from rlhf_jax.types import Rollout

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["<s>", "</s>", "<unk>"]


def wrapped(fast, chat_template=None, **tokens) -> PreTrainedTokenizerFast:
    fast.add_special_tokens([name for name in SPECIAL if fast.token_to_id(name) is not None])
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", bos_token="<s>", **tokens)
    hf.chat_template = chat_template
    return hf


def characters(chat_template=None, unknown=False) -> PreTrainedTokenizerFast:
    """BPE of a few characters, without bytes; what it has no token for it drops, or makes <unk>."""
    names = [*SPECIAL[: 2 + unknown], *LETTERS, *" ,.'\n|<>_"]
    tokens = {"unk_token": "<unk>"} if unknown else {}
    fast = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], **tokens))
    fast.decoder = decoders.Fuse()
    return wrapped(fast, chat_template, **tokens)


def unigram(chat_template=None) -> PreTrainedTokenizerFast:
    """SentencePiece's, with NFKC, white space collapsed and stripped."""
    pieces = [(name, 0.0) for name in SPECIAL] + [(c, -3.0) for c in f"▁{LETTERS}ABé12\u2044,.'<>|_"]
    fast = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    one_blank = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    fast.normalizer = normalizers.Sequence([normalizers.NFKC(), one_blank, normalizers.Strip()])
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return wrapped(fast, chat_template, unk_token="<unk>")


def lower_case(chat_template=None) -> PreTrainedTokenizerFast:
    """BERT's: no case, no accents, no control characters, and no white space."""
    words = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *",.'12"]
    fast = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.normalizer, fast.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(cleanup=False)
    return wrapped(fast, chat_template, unk_token="<unk>")


def hungry(chat_template=CHATML) -> PreTrainedTokenizerFast:
    """Bytes, and added tokens that take the white space beside them, or whose text decoders take for a byte."""
    hf = byte_tokenizer(chat_template=chat_template)
    both = AddedToken("<|both|>", special=True, lstrip=True, rstrip=True)
    hf.add_tokens([both, AddedToken("<left>", special=False, lstrip=True), AddedToken("é")])
    return hf


def remarks_of(hf, row) -> dict[str, int]:
    return sft_examples(rows_from([row]), Tokenizer(hf), LIMITS, loss_on="response")[1].remarks


@pytest.mark.parametrize(
    ("make", "text", "remark"),
    [
        (characters, "caf\u00e9", ALTERED),
        (characters, "Yes", ALTERED),
        (characters, "a 茶", ALTERED),
        (characters, "a\x00b", ALTERED),
        (characters, "a\tb", RESPACED),
        (characters, "yes, it\n is", None),
        (lambda: characters(unknown=True), "caf\u00e9", UNKNOWN),
        (unigram, "½ é", ALTERED),
        (unigram, "ﬁ", ALTERED),
        (unigram, "yes  it", RESPACED),
        (unigram, "yes\n", RESPACED),
        (unigram, "yes it", None),
        (lower_case, "Yes", ALTERED),
        (lower_case, "naïve", ALTERED),
        (lower_case, "a\u200bb", ALTERED),
        (lower_case, "yes, it", RESPACED),
        (lower_case, "yes it", None),
        (hungry, "a <left> b", RESPACED),
        (hungry, "caf\u00e9", ALTERED),
        (hungry, "茶 and ½\r\n", None),
        (byte_tokenizer, "\ufeffa\x00\x85b\u2028 \r\n\t½ ﬁ 😀 e\u0301", None),
        (metaspace_tokenizer, "茶 ½  \r\n\t😀", None),
        (metaspace_tokenizer, "a▁b", ALTERED),
    ],
)
def test_a_text_that_its_ids_do_not_say_is_counted(make, text, remark):
    """As a document, as a response, and as a prompt; by what is trained and by `data inspect`."""
    expected = {} if remark is None else {remark: 1}
    rows = [{"text": text}, {"prompt": "a", "response": text}, {"prompt": text, "response": "a"}]
    for row in rows:
        assert remarks_of(make(), row) == expected
        found = lint.inspect(rows_from([row]), [], Tokenizer(make()), 100, 200)["remarks"]
        assert {name: count for name, (count, _) in found.items()} == expected
    assert prompt_examples(rows_from([{"prompt": text}]), Tokenizer(make()), LIMITS)[1].remarks == expected
    pair = {"prompt": text, "chosen": f"{text} a", "rejected": f"{text} b"}
    counts = preference_examples(rows_from([pair]), Tokenizer(make()), LIMITS)[1].remarks
    assert counts == {name: 3 * count for name, count in expected.items()}
    labelled = [{"prompt": f"{text} {i}", "response": text, "label": True} for i in "ab"]
    counts = unpaired_examples(rows_from(labelled), Tokenizer(make()), LIMITS)[1].remarks
    assert counts == {name: 4 * count for name, count in expected.items()}


@pytest.mark.parametrize("make", [unigram, lower_case, hungry])
def test_of_a_conversation_its_turns_are_looked_at(make):
    """The blanks that a tokenizer has round a template's special tokens are none of the turns'."""
    talk = [user("yes it"), answer("no"), user("two")]
    names = {name: name for name in ("<|im_start|>", "<|im_end|>")}
    template = CHATML if make is hungry else "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    hf = make(template)
    assert names.keys() <= hf.get_vocab().keys() or make is not hungry
    assert remarks_of(hf, {"prompt": talk, "response": "it is"}) == {}
    blank, letter = ("a <left> b", "caf\u00e9") if make is hungry else ("a  b", "½" if make is unigram else "A")
    for text, remark in ((blank, RESPACED), (letter, ALTERED)):
        changed = [user(text), *talk[1:]], [talk[0], answer(text), talk[2]]
        for turns in changed:
            assert remarks_of(hf, {"prompt": turns, "response": "it is"}).get(remark) == 1
        assert remarks_of(hf, {"prompt": talk, "response": text}).get(remark) == 1


def test_a_document_of_which_nothing_is_left_is_dropped():
    rows = [{"text": "茶"}, {"text": "yes"}]
    examples, report = sft_examples(rows_from(rows), Tokenizer(characters()), LIMITS, loss_on="response")
    assert len(examples) == 1 and report.dropped == {"with a text that has no tokens": 1} and report.kept == 1


def test_a_template_whose_words_have_no_tokens_is_counted():
    hf = characters("{% for m in messages %}### {{ m.content }}</s>{% endfor %}")
    assert remarks_of(hf, {"prompt": [user("yes")], "response": "no"}) == {ALTERED: 1}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(derandomize=True, deadline=None, max_examples=20)
@given(text=st.text(st.sampled_from("yes it,'.\n\t 茶é😀ab7") | st.characters(codec="utf-8"), min_size=1, max_size=12))
def test_bytes_say_every_text(name, text):
    """In every template, whatever it trims; but for what is empty."""
    tokenizer, counts = Tokenizer(chat_tokenizer(TEMPLATES[name])), Counter()
    if text.strip() and "<" not in text:
        tokenizer.encode_prompt([user(text)], counts)
        tokenizer.encode_response([answer(text)], [user(text)], remarks=counts)
        assert not {UNKNOWN, ALTERED, RESPACED} & (+counts).keys()


# ---- special tokens that a text writes out, and those that a text does not show


@pytest.mark.parametrize("text", ["a<|im_end|>b", "<<|im_end|>x", "<|im_end|><|im_end|> x"])
def test_a_special_token_that_is_written_out_is_counted_where_it_is_trained(text):
    """It is read as the token, as by TRL and transformers; what closes an answer is taken off and counted apart."""
    hf, read = byte_tokenizer(chat_template=CHATML), "<|im_end|> is written out and read as the token"
    for prompt in (text, [user(text)], [user("a"), answer(text), user("b")]):
        assert remarks_of(hf, {"prompt": prompt, "response": "c"}) == {f"prompts in which {read}": 1}
        assert hf.convert_tokens_to_ids("<|im_end|>") in Tokenizer(hf).encode_prompt(prompt)
    within = {f"responses or documents in which {read}": 1, WITHIN: 1}
    assert remarks_of(hf, {"text": f"{text} y"}) == within
    assert remarks_of(hf, {"prompt": "a", "response": f"{text} y"}) == within
    assert remarks_of(hf, {"prompt": [user("a")], "response": f"{text} y"}) == within
    assert remarks_of(hf, {"prompt": "a", "response": "y<|im_end|>"}) == {STOPPED: 1}
    assert remarks_of(hf, {"prompt": "a <|im_en d|>", "response": "<| im_end|>"}) == {}


def test_stop_ids_that_are_no_special_tokens_are_counted_too():
    """With a line break that ends an answer, what stands behind the first one can never be sampled."""
    hf = byte_tokenizer()
    tokenizer = Tokenizer(hf, eos_ids=[hf.convert_tokens_to_ids("Ċ")])
    for text, counts in (("a", {}), ("a\n", {STOPPED: 1}), ("a\n\n", {STOPPED: 1}), ("a\nb", {WITHIN: 1})):
        row = {"prompt": "c", "response": text}
        [example], report = sft_examples(rows_from([row]), tokenizer, LIMITS, loss_on="response")
        assert report.remarks == counts
        assert tokenizer.seen(example["tokens"].tolist()) == f"c{text.rstrip()}\n"


@pytest.mark.parametrize("prompt", ["a", [user("a")]], ids=["text", "messages"])
def test_sampled_characters_that_spell_a_stop_token_stay_what_was_sampled(prompt):
    """Its bytes are no stop token, and the text is what they say."""
    tokenizer = Tokenizer(byte_tokenizer(chat_template=CHATML))
    spelt = [i for byte in "yes<|im_end|>" for i in tokenizer.encode_response(byte, finished=False)]
    for ids in ([*spelt, tokenizer.end_id], spelt):
        finished = ids != spelt
        row = {"prompt": prompt, "response": tokenizer.response_text(ids, prompt), "response_ids": ids}
        assert row["response"] == "yes<|im_end|>"
        row = json.loads(json.dumps({**row, "finished": finished}))
        [example], report = sft_examples(rows_from([row]), tokenizer, LIMITS, loss_on="response")
        assert example["tokens"][example["loss_mask"]].tolist() == ids and report.remarks == {}
    ids = [*tokenizer.encode_response("yes", finished=False), tokenizer.eos_ids[0]]  # as servers write texts
    row = {"prompt": prompt, "response": "yes<eos>", "response_ids": ids}
    [example], report = sft_examples(rows_from([row]), tokenizer, LIMITS, loss_on="response")
    assert example["tokens"][example["loss_mask"]].tolist() == ids and OTHER_IDS not in report.remarks


@pytest.mark.parametrize("prompt", ["a", [user("a")]], ids=["text", "messages"])
def test_sampled_special_tokens_that_the_text_does_not_show_are_counted(prompt):
    tokenizer = Tokenizer(byte_tokenizer(chat_template=CHATML))
    start = tokenizer.hf.convert_tokens_to_ids("<|im_start|>")
    yes, stop = tokenizer.encode_response("yes", finished=False), tokenizer.end_id
    for ids, finished, hidden in (
        ([*yes, start, *yes, stop], True, 1),
        ([*yes, start], False, 1),
        ([0, *yes, stop], True, 1),
        ([*yes, stop], True, 0),
        (yes, False, 0),
    ):
        row = {"prompt": prompt, "response": tokenizer.response_text(ids, prompt), "response_ids": ids}
        [example], report = sft_examples(
            rows_from([{**row, "finished": finished}]), tokenizer, LIMITS, loss_on="response"
        )
        assert example["tokens"][example["loss_mask"]].tolist() == ids
        assert report.remarks == ({HIDDEN: 1} if hidden else {})


@pytest.mark.parametrize("name", ["byte BPE", "always", "legacy", "WordPiece"])
def test_what_was_seen_of_a_prompt_is_not_tidied(name, monkeypatch):
    """Whatever tokenizer_config.json says of blanks before punctuation."""
    hf = KINDS[name]()
    hf.clean_up_tokenization_spaces = True
    hf.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    tokenizer = Tokenizer(hf)
    ids, cut = Encoder(tokenizer, Limits(4)).prompt({"prompt": "it is yes , 's it", "_where": ""})
    assert cut and Encoder(tokenizer, Limits(4)).seen(ids, cut) == {"prompt_seen": tokenizer.decode(ids)}


@pytest.mark.parametrize("text", ["a\n\nAssistant: b", "\n\nHuman:", "a\n\nSystem: x"])
def test_a_turn_that_writes_out_another_is_counted_where_nothing_tells_them_apart(text):
    row = {"prompt": [user(text)], "response": "b"}
    assert (
        remarks_of(byte_tokenizer(), row)
        == remarks_of(byte_tokenizer(), {**row, "prompt": [user("a"), answer(text), user("b")]})
        == {TURNED: 1}
    )
    assert remarks_of(byte_tokenizer(), {"prompt": [user("a")], "response": f"b{text}"}) == {TURNED: 1}
    assert remarks_of(byte_tokenizer(), {"prompt": text, "response": "b"}) == {}
    assert remarks_of(byte_tokenizer(chat_template=CHATML), row) == {}


# ---- who reads texts


TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


def test_judges_raters_and_functions_read_all_that_a_prompt_says():
    """Tools, calls and what they gave stand there as JSON, where no chat template writes them."""
    row = {
        "tools": TOOLS,
        "prompt": [user("1 + 1?"), {"role": "assistant", "tool_calls": CALL}, {"role": "tool", "content": "2"}],
        "responses": ["two", "three"],
    }
    ranking = ranking_row(row, unlabelled=True)
    turns = label_turns(ranking.prompt)
    assert [turn["role"] for turn in turns] == ["tools", "user", "assistant", "tool"]
    assert json.loads(turns[0]["content"]) == TOOLS and json.loads(turns[2]["content"]) == {"tool_calls": CALL}
    for text in (plain_text(ranking.prompt), in_transcript(ranking.prompt)):
        assert all(turn["content"] in text for turn in turns)
    plain = [user("a"), answer("b"), user("c")]
    assert label_turns(plain) == plain
    assert plain_text(plain) == "Human: a\n\nAssistant: b\n\nHuman: c"
    thought = [user("a"), answer("b", reasoning_content="hm 茶"), user("c")]
    assert label_turns(thought)[1]["content"] == 'b\n{"reasoning_content": "hm 茶"}'


def test_a_scorer_says_what_its_tokenizer_makes_of_texts():
    row, counts = {"prompt": "Yes", "response": "caf\u00e9 <s>", "_where": "a"}, Counter()
    example = score_example(row, Tokenizer(lower_case()), LIMITS, counts)
    assert +counts == {ALTERED: 2, "responses or documents in which <s> is written out and read as the token": 1}
    assert example["tokens"].tolist() == score_example(row, Tokenizer(lower_case()), LIMITS)["tokens"].tolist()


def test_commands_that_draw_say_what_becomes_of_prompts(capsys):
    fitting([{"prompt": "Yes", "_where": "a"}, {"prompt": "no", "_where": "b"}], Tokenizer(lower_case()), LIMITS, [])
    assert f"prompts: kept 2 of 2 rows; dropped 0; truncated 0; 1 {ALTERED}" in capsys.readouterr().err
    fitting([{"prompt": "yes", "_where": "a"}], Tokenizer(lower_case()), LIMITS, [])
    assert not capsys.readouterr().err
    empty = [{"prompt": "Yes", "_where": "a"}, {"prompt": " ", "_where": "b"}]
    for shots in ([], [{"prompt": "yes", "response": "no", "_where": "c"}]):
        with pytest.raises(
            UserError, match=r"^prompts: kept 1 of 2 rows; dropped 1 with an empty prompt; .*; remove the"
        ):
            fitting(empty, Tokenizer(lower_case()), LIMITS, shots)
        assert not capsys.readouterr().err


# ---- files


def test_bytes_of_a_dataset_that_are_no_text_stay_bytes():
    assert tfds_rows._plain({"a": b"caf\xc3\xa9", "b": b"\xff\xd8"}, {"a": None, "b": None}) == {
        "a": "caf\u00e9",
        "b": b"\xff\xd8",
    }


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_breaks_within_a_text_are_those_of_the_file(tmp_path, ending):
    inner = "one\r\ntwo\n\nthree \u2028\x85 four"
    (tmp_path / "a.csv").write_bytes(f'prompt,response{ending}a,"{inner}"{ending}b,c{ending}'.encode())
    rows = rows_from(str(tmp_path / "a.csv"))
    assert [(row["prompt"], row["response"]) for row in rows] == [("a", inner), ("b", "c")]
    lines = ["one", "two \u2028\x85 2", "", "<|endoftext|>", "three", "four"]
    (tmp_path / "a.txt").write_bytes(ending.join([*lines, ""]).encode())
    texts = [row["text"] for row in rows_from(str(tmp_path / "a.txt"))]
    assert texts == [f"one{ending}two \u2028\x85 2", f"three{ending}four"]
    (tmp_path / "a.jsonl").write_bytes((json.dumps({"text": inner}) + ending).encode() * 2)
    (tmp_path / "a.json").write_bytes((json.dumps([{"text": inner}], indent=1).replace("\n", ending)).encode())
    for name in ("a.jsonl", "a.json"):
        assert {row["text"] for row in rows_from(str(tmp_path / name))} == {inner}


def test_special_tokens_that_a_reward_does_not_see_are_counted_in_every_iteration():
    config = toy_run(reward_model=False, iterations=1)
    rows = [{"prompt": letter} for letter in "bcdefghi"]
    given = {
        "rows": rows,
        "eval_rows": rows[:2],
        "reward_functions": [lambda prompts, responses: [1.0] * len(prompts)],
    }
    method, loop = ppo_train.setup(config, **given)
    _, metrics, table = iteration(method, loop, 0)
    rollout, of = table["rollout"], method.inputs.tokenizer
    hidden = [
        bool({of.pad_id, of.hf.unk_token_id} & set(ids[at].tolist()))
        for ids, at in zip(*map(np.asarray, (rollout.tokens, rollout.mask)), strict=True)
    ]
    assert sum(hidden) > 0 and float(metrics["rollout/hidden_fraction"]) == np.float32(np.mean(hidden))
    assert float(metrics["rollout/broken_fraction"]) == 0


def test_ids_that_no_token_has_are_not_shown_either():
    """Embeddings often have more rows than a tokenizer ids, and a sampler draws of all rows."""
    tokenizer = Tokenizer(byte_tokenizer())
    plain, end, beyond = tokenizer.encode_response("ab", finished=False), tokenizer.end_id, tokenizer.vocab_size
    assert not tokenizer.hides(plain) and not tokenizer.hides([*plain, end])
    assert tokenizer.hides([*plain, beyond]) and tokenizer.hides([beyond + 99, *plain, end])
    assert tokenizer.response_text([*plain, beyond], "x") == "ab"


def test_half_a_character_is_counted_where_a_text_shows_it_as_ufffd_and_its_ids_stay():
    tokenizer, remarks = Tokenizer(byte_tokenizer()), Counter()
    ids = tokenizer.encode_response("a\u8336", finished=False)
    assert tokenizer.unshown(ids, tokenizer.response_text(ids, "")) == {} and len(ids) > 2
    text = tokenizer.response_text(ids[:-1], "")
    assert "\ufffd" in text and tokenizer.unshown(ids[:-1], text) == {BROKEN: 1}
    tokens, counts = np.array([ids, ids]), np.array([[len(ids) - 1], [len(ids)]])
    real, none = np.arange(len(ids)) < counts, np.zeros((2, 1), bool)
    rollout = Rollout(tokens[:, :1], none, tokens, real, np.zeros(tokens.shape), none[:, 0])
    assert decode(tokenizer, rollout, ["", ""]) == ([text, "a\u8336"], {BROKEN: 1})
    [line] = not_seen(widened({}, {"rollout/hidden_fraction": 0.01, "rollout/broken_fraction": 0.5}))
    assert line.startswith("up to 50% of the responses of an iteration had bytes of no whole character")
    kept = tokenizer.encode_response(text, finished=False, ids=ids[:-1], remarks=remarks)
    assert kept == ids[:-1] and not +remarks  # the ids are what is read
    rows = rows_from([{"prompt": "b", "responses": [{"text": text, "rank": 0}, {"text": "c", "rank": 1}]}])
    assert preference_examples(rows, tokenizer, LIMITS)[1].remarks == {SPOILED: 1}


def test_a_run_says_at_its_end_that_a_reward_did_not_see_all():
    assert not not_seen({}) and not not_seen({"rollout/hidden_fraction": [0.0, 0.05]})
    [line] = not_seen(widened({"rollout/hidden_fraction": [0.0, 0.01]}, {"rollout/hidden_fraction": 0.25}))
    assert line.startswith("up to 25% of the responses of an iteration had special tokens")


def test_a_judge_says_what_its_tokenizer_makes_of_questions(tmp_path, capsys):
    """Once for each kind, and with the sums at the end of a run."""
    model = Model(replace(ARCH, vocab_size=Tokenizer(lower_case()).vocab_size, max_positions=256))
    lower_case().save_pretrained(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(str(tmp_path / "tokenizer"))
    params = jax.device_put(model_params(model, 0), jax.sharding.SingleDeviceSharding(ONE[0]))
    save_model(tmp_path / "judge", Loaded(model, params), params, tokenizer)
    of_judge = {"model": ModelConfig(path=str(tmp_path / "judge")), "template": "{prompt} {response}", "scale": 2}
    judge = RewardJudge(RewardJudgeConfig(**of_judge, max_prompt_length=64), make_mesh(MeshConfig(), devices=ONE))
    vocabulary = Counter(judge.ask.remarks)
    judge(["a", "B"], ["b", "c</s>"], {}, jax.random.key(0))
    judge(["A"], ["b"], {}, jax.random.key(0))
    end = "prompts in which </s> is written out and read as the token"
    assert judge.ask.remarks - vocabulary == {ALTERED: 2, end: 1}
    said = capsys.readouterr().err
    assert (
        said.count(f"of 2 questions 1 {ALTERED}") == said.count(f"of 2 questions 1 {end}") == said.count(ALTERED) == 1
    )
    assert judge.remarks() == [
        f"reward.judge.model: of 3 responses {n} {what}" for what, n in ((end, 1), (ALTERED, 2))
    ]


def test_responses_whose_texts_do_not_show_all_are_counted_where_they_are_drawn(capsys):
    mesh, config = make_mesh(MeshConfig(), devices=ONE), ModelConfig(path=str(toy_directory() / "policy"))
    with jax.set_mesh(mesh.grid):
        loaded, tokenizer = load_model(config, mesh, jax.random.key(0)), load_tokenizer(config)
        sampling = SamplingConfig(max_new_tokens=6, chunk=6)
        generator = Generator(loaded.model, tokenizer, sampling, mesh, max_prompt_length=2)
        drawn = generator.responses(loaded.params, [{"prompt": "b"}], jax.random.key(1), samples=8)
    special = {tokenizer.pad_id, tokenizer.hf.unk_token_id}
    hidden = sum(bool(special & set(one.ids.tolist())) for one in drawn)
    assert (
        hidden and f"{hidden} of 8 responses whose ids have special tokens that their text" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("template", "lines"), [(CHATML, 0), (None, 1), (TEMPLATES["trims"], 1)])
def test_a_reward_model_with_another_chat_template_is_said(tmp_path, capsys, template, lines):
    """It reads the policy's ids, and so its template."""
    byte_tokenizer(chat_template=template).save_pretrained(tmp_path)
    check_same_tokenizer(Tokenizer(byte_tokenizer(chat_template=CHATML)), str(tmp_path), "reward model")
    said = capsys.readouterr().out
    assert (
        said.count(f"! reward model {tmp_path} has another chat template than the policy")
        == lines
        == len(said.splitlines())
    )
