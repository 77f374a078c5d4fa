"""Tokenizers of every temper, and the border between prompt and response: training sees what sampling produces."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import byte_tokenizer, metaspace_tokenizer

from rlhf_jax.config import SamplingConfig
from rlhf_jax.data.collate import collate_prompts, collate_sft
from rlhf_jax.data.comparisons import preference_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import prompt_examples, sft_examples
from rlhf_jax.data.sources import read_rows, rows_from
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.inference.generate import decode
from rlhf_jax.inference.sampling import SamplingLaw, sample

DATA = Path(__file__).parents[2] / "shared" / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = 261  # <pad> <bos> <eos>, 256 bytes, ChatML's two
LIMITS = Limits(64, 256, "error")
KINDS = {
    "plain": {},
    "bos": {"bos": True},
    "pad is eos": {"pad": "<eos>"},
    "no pad": {"pad": None},
    "chat template": {"chat_template": CHATML},
    "left": {"padding_side": "left", "truncation_side": "left", "model_max_length": 4},
    "right": {"padding_side": "right", "truncation_side": "right", "model_max_length": 4},
}
EDGES = [  # where a tokenizer that saw prompt and response as one text would merge across the border
    ("Once upon a", " time"),
    ("Once upon a ", "time"),
    ("hel", "lo there"),
    ("7", "77"),
    ("one\n", "\ntwo"),
    ("x ", "  y"),
    ("\n\nHuman: tea?\n\nAssistant:", " Yes."),
    ("café", "s and naïve 茶"),
]


def tokenizer_of(name):
    """A byte tokenizer by its kind, or a real one."""
    if name in KINDS:
        return Tokenizer(byte_tokenizer(**KINDS[name]))
    if not (DATA / "tokenizers" / name).is_dir():
        pytest.skip("needs the real tokenizers in ../shared/data")
    return Tokenizer.load(str(DATA / "tokenizers" / name))


each_kind = pytest.mark.parametrize("name", KINDS)
every_tokenizer = pytest.mark.parametrize("name", [*KINDS, "gpt2", "rlhf-tiny-bpe4k"])


# ---- pad, stop and begin ids


@each_kind
def test_ids(name):
    tokenizer = tokenizer_of(name)
    assert tokenizer.vocab_size == SIZE
    assert tokenizer.pad_id == (2 if name in ("pad is eos", "no pad") else 0)
    assert tokenizer.eos_ids == ((2, 260) if name == "chat template" else (2,))
    assert tokenizer.bos_id == (1 if name == "bos" else None)
    assert tokenizer.encode_prompt("ab")[:1] == ([1] if name == "bos" else tokenizer.encode_prompt("a"))
    assert tokenizer.encode_response("")[:1] == [2]  # no bos before a response


@each_kind
def test_the_stop_id_is_learned_and_padding_is_not(name):
    tokenizer = tokenizer_of(name)
    rows = [{"prompt": "ab", "response": "c"}, {"prompt": "a", "response": "bcdef"}]
    examples, _ = sft_examples(rows_from(rows), tokenizer, LIMITS, loss_on="response")
    batch = collate_sft(examples, length=12, reduction="token", pad_id=tokenizer.pad_id)
    for row, tokens, weights, segments in zip(
        rows, *map(batch.get, ("tokens", "weights", "segment_ids")), strict=True
    ):
        used = int(segments.sum())
        assert (segments[:used] == 1).all() and (tokens[used:] == tokenizer.pad_id).all()
        targets = tokens[weights > 0]  # a weight stands at the token that is predicted
        assert targets.tolist() == tokenizer.encode_response(row["response"])
        assert targets[-1] == 2 and not weights[used:].any()


def test_padding_side_and_length_limit_of_the_tokenizer_change_nothing():
    """Ours pads: prompts left, sequences right, whatever tokenizer_config.json says."""
    rows = [{"prompt": "a longer prompt", "response": "b"}, {"prompt": "c", "response": "d"}]
    batches = []
    for name in ("plain", "left", "right"):
        tokenizer = tokenizer_of(name)
        prompts, _ = prompt_examples(rows_from(rows), tokenizer, Limits(64, too_long="error"))
        examples, _ = sft_examples(rows_from(rows), tokenizer, LIMITS, loss_on="response")
        batches.append((collate_prompts(prompts, buckets=[16]), collate_sft(examples, length=24, reduction="token")))
    for other in batches[1:]:
        jax.tree.map(np.testing.assert_array_equal, {"b": [b["tokens"] for b in other]},
                     {"b": [b["tokens"] for b in batches[0]]})  # fmt: skip
    mask = batches[0][0]["mask"]
    assert mask[:, -1].all() and not mask[1, :-1].any()


def test_without_a_template_messages_are_a_transcript():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "tea?"}]
    answer = [{"role": "assistant", "content": "Yes."}]
    plain, chat = tokenizer_of("bos"), tokenizer_of("chat template")
    text = "\n\nSystem: Be brief.\n\nHuman: tea?\n\nAssistant:"
    assert plain.prompt_text(messages) == text
    assert plain.encode_prompt(messages) == [1, *plain.encode_response(text)[:-1]]
    assert plain.encode_response(answer) == plain.encode_response(" Yes.")
    assert chat.prompt_text(messages).endswith("<|im_start|>assistant\n")
    assert chat.encode_response(answer) == [*chat.encode_response("Yes.")[:-1], 260]  # closes with <|im_end|>


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [259, 2]}, {"eos_token_id": 0}, (259, 2)),
        ({"eos_token_id": 259}, {"eos_token_id": 0}, (259,)),
        ({"eos_token_id": None}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"temperature": 0.6}, {}, (2,)),
        ({}, {"eos_token_id": None, "text_config": {"eos_token_id": [5, 6]}}, (5, 6)),
        ({}, {"eos_token_id": 7, "text_config": {"eos_token_id": [5, 6]}}, (7,)),
        (None, None, (2,)),
    ],
)
def test_stop_ids_of_the_generation_config(tmp_path, generation, config, expected):
    for kind, closing in ((byte_tokenizer(), ()), (byte_tokenizer(chat_template=CHATML), (260,))):
        kind.save_pretrained(tmp_path)
        for name, content in (("generation_config", generation), ("config", config)):
            (tmp_path / f"{name}.json").unlink(missing_ok=True)
            if content is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(content))
        tokenizer = Tokenizer.load(str(tmp_path))
        assert tokenizer.eos_ids == (*expected, *closing)
        assert tokenizer.end_id == (260 if closing else expected[0])
        assert tokenizer.encode_response("a")[-1] == expected[0]
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize("legacy", [True, False, None])
def test_a_llama_tokenizer_is_the_same_tokenizer_when_it_is_saved(tmp_path, legacy):
    metaspace_tokenizer("always" if legacy else "first", CHATML).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    raw = json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    found = [Tokenizer.load(str(tmp_path / "base"))]
    for name in ("one", "two"):
        found[-1].save(str(tmp_path / name))
        found.append(Tokenizer.load(str(tmp_path / name)))
    texts = "two", "</s>two", "it</s>is", [{"role": "user", "content": "yes</s>it"}]
    ids = [[each.encode_prompt(text) for text in texts] for each in found]
    assert ids[0] == ids[1] == ids[2]
    assert (ids[0][1] == [2, *ids[0][0]]) == bool(legacy)


# ---- the border


@every_tokenizer
def test_the_prompt_that_is_trained_on_is_the_prompt_that_is_sampled_from(name):
    tokenizer = tokenizer_of(name)
    merged = 0
    for prompt, response in EDGES:
        row = {"prompt": prompt, "response": response}
        prompts, _ = prompt_examples(rows_from([row]), tokenizer, Limits(64, too_long="error"))
        batch, given = collate_prompts(prompts, buckets=[64], pad_id=tokenizer.pad_id), prompts[0]["tokens"].tolist()
        assert batch["tokens"][batch["mask"]].tolist() == given  # nothing is added on the way to the sampler
        own = tokenizer.encode_response(response)
        sft = sft_examples(rows_from([row]), tokenizer, LIMITS, loss_on="response")[0][0]
        assert sft["tokens"].tolist() == given + own
        assert sft["tokens"][sft["loss_mask"]].tolist() == own
        both = {"prompt": prompt, "chosen": response, "rejected": response + "!"}
        pair = preference_examples(rows_from([both]), tokenizer, LIMITS)[0][0]
        assert pair["chosen"].tolist() == given + own
        assert tokenizer.decode(own) == response  # what a reward function reads
        merged += tokenizer.encode_response(prompt + response) != tokenizer.encode_response(prompt)[:-1] + own
    assert (merged > 2) == (name not in KINDS)  # as one text, some of these would be other tokens


@every_tokenizer
def test_the_chat_prompt_that_is_trained_on_is_the_one_that_is_sampled_from(name):
    tokenizer = tokenizer_of(name)
    messages = [{"role": "user", "content": "tea?"}]
    for answer in ("Yes.", "no", "1 2", "naïve"):
        row = {"prompt": messages, "response": answer}
        given = prompt_examples(rows_from([row]), tokenizer, Limits(64, too_long="error"))[0][0]["tokens"].tolist()
        found = sft_examples(rows_from([row]), tokenizer, LIMITS, loss_on="response")[0][0]
        assert found["tokens"].tolist()[: len(given)] == given
        assert not found["loss_mask"][: len(given)].any() and found["loss_mask"][len(given) :].all()
        assert found["tokens"][-1] in tokenizer.eos_ids


class Chain:
    """A policy whose next token depends on the last one only; params are logits [V, V]."""

    arch = SimpleNamespace(vocab_size=SIZE, num_layers=1, expert_layers=0, experts_per_token=0)

    def decoding_params(self, params):
        return params

    def prefill(self, params, tokens, mask, positions):
        return params[tokens[:, -1]], [(jnp.zeros((len(tokens), 1, tokens.shape[1], 1)),)]

    def pinned(self, cache):
        return cache

    def decode(self, params, token, position, sees, apart, shared, cache, index):
        return params[token], cache, None


@pytest.mark.parametrize("name", ["plain", "bos", "pad is eos", "no pad", "chat template"])
def test_training_on_sampled_text_sees_the_sampled_tokens(name):
    """Prompts in, text out of the real sampler, the text back in as demonstrations: the same ids, stop id included."""
    tokenizer = tokenizer_of(name)
    ascii_ids = sorted({i for code in range(32, 127) for i in tokenizer.encode_response(chr(code))[:-1]})
    table = np.full((SIZE, SIZE), -1e9, np.float32)
    table[:, ascii_ids] = np.random.default_rng(0).standard_normal((SIZE, len(ascii_ids)))
    table[:, tokenizer.eos_ids[0]] = 3.0
    texts = ["a", "Tell me about tea. ", "x\n", "naïve 茶"]
    prompts, _ = prompt_examples(
        rows_from([{"prompt": text} for text in texts * 4]), tokenizer, Limits(32, too_long="error")
    )
    batch = collate_prompts(prompts, buckets=[32], pad_id=tokenizer.pad_id)
    law = SamplingLaw.from_config(SamplingConfig(temperature=1.0))
    rollout = jax.jit(
        lambda prompt, mask: sample(
            Chain(), jnp.asarray(table), prompt, mask, jax.random.key(0), law, max_new_tokens=24,
            stop_ids=tokenizer.eos_ids, chunk=8, filtered=False,
        )
    )(batch["tokens"], batch["mask"])  # fmt: skip
    assert 3 < int(rollout.finished.sum()) < 16
    said, _ = decode(tokenizer, rollout, [""] * len(rollout.tokens))
    rows = [
        {"prompt": text, "response": response, "finished": bool(done)}
        for text, response, done in zip(texts * 4, said, rollout.finished, strict=True)
        if response
    ]
    examples, report = sft_examples(rows_from(rows), tokenizer, LIMITS, loss_on="response")
    assert report.kept == len(rows) > 10
    used = [i for i, response in enumerate(said) if response]
    for i, example in zip(used, examples, strict=True):
        prompt = np.asarray(rollout.prompt)[i][np.asarray(rollout.prompt_mask)[i]]
        response = np.asarray(rollout.tokens)[i][np.asarray(rollout.mask)[i]]
        assert example["tokens"].tolist() == [*prompt, *response]
        assert example["tokens"][example["loss_mask"]].tolist() == response.tolist()


@pytest.mark.parametrize("name", ["gpt2", "rlhf-tiny-bpe4k"])
def test_answers_of_real_rows_come_back_token_by_token(name):
    tokenizer = tokenizer_of(name)
    rows = read_rows(str(DATA / "rows" / "gsm8k_test.sft.jsonl.gz"))[:200]
    for row in rows:
        response = row["response"] if isinstance(row["response"], str) else row["response"][-1]["content"]
        ids = tokenizer.encode_response(response)
        assert tokenizer.decode(ids) == response
        assert tokenizer.encode_response(tokenizer.decode(ids)) == ids


def test_rows_made_in_python_need_not_say_where_they_come_from():
    """As the quickstart's: {prompt} alone, straight into `prompt_examples`."""
    examples, report = prompt_examples(
        [{"prompt": "a"}, {"prompt": "bc"}], Tokenizer(byte_tokenizer()), Limits(8, too_long="truncate")
    )
    assert [example["where"] for example in examples] == ["", ""] and report.kept == 2


@pytest.mark.parametrize(
    ("content", "missing", "package", "extra"),
    [
        (b"\n\x0e\n\x05<unk>", "sentencepiece", "sentencepiece", "sentencepiece"),
        (b"\n\x0e\n\x05<unk>", "google.protobuf", "protobuf", "sentencepiece"),
        (b"IQ== 0\nIg== 1\n", "tiktoken", "tiktoken", "tiktoken"),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer.model", "spiece.model"])
def test_a_vocabulary_that_needs_a_package_names_it_and_the_extra(
    tmp_path, monkeypatch, content, missing, package, extra, file
):
    (tmp_path / file).write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    for module in ("sentencepiece", "google.protobuf", "tiktoken"):  # those that are there stand in for one another
        monkeypatch.setitem(sys.modules, module, None if module == missing else sys)
    with pytest.raises(UserError, match=rf"{file} is a .* vocabulary, and the package {package} is not") as caught:
        Tokenizer.load(str(tmp_path))
    assert f"pip install 'rlhf-jax[{extra}]'" in str(caught.value) and "\n" not in str(caught.value)
    byte_tokenizer().save_pretrained(tmp_path)  # tokenizer.json needs no package
    assert Tokenizer.load(str(tmp_path)).eos_ids
