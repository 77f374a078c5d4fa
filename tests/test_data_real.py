"""Laws of rlhf_jax.data on real rows and real tokenizers; skipped where ../shared/data is absent."""

import dataclasses
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import ARCH

from benchmarks import data as bench
from rlhf_jax.data import schemas, sources
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.collate import collate_preference, collate_prompts, collate_sft
from rlhf_jax.data.comparisons import preference_examples, ranking_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import pack, prompt_examples, prompt_key, sft_examples, split_by_prompt
from rlhf_jax.data.messages import transcript
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data in {DATA}")

NAMES = {"gpt2": "tokenizers/gpt2", "bpe4k": "tokenizers/rlhf-tiny-bpe4k", "stories": "models/stories260K-hf"}
LOOSE = Limits(4096, 8192, "error")


def rows(name):
    return sources.read_rows(str(DATA / "rows" / f"{name}.jsonl.gz"))


@pytest.fixture(scope="module")
def tokenizers():
    return {name: Tokenizer.load(str(DATA / path)) for name, path in NAMES.items()}


def test_ids_that_the_real_tokenizers_declare(tokenizers):
    found = {name: (t.vocab_size, t.eos_ids, t.end_id, t.pad_id) for name, t in tokenizers.items()}
    assert found == {
        "gpt2": (50257, (50256,), 50256, 50256),  # pad is eos
        "bpe4k": (4096, (4,), 4, 0),
        "stories": (512, (2,), 2, 0),
    }


def test_prompt_and_response_join_to_what_the_chat_template_renders(tokenizers):
    bpe = tokenizers["bpe4k"]
    for row in map(schemas.sft_row, rows("gsm8k_test.sft")[:50]):
        joined = bpe.encode_prompt(row["prompt"]) + bpe.encode_response(row["response"])
        rendered = bpe.hf.apply_chat_template(row["prompt"] + row["response"], tokenize=False)
        assert joined == bpe.hf(rendered.removesuffix("\n"), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_messages_come_back_as_text(tokenizers, name):
    tokenizer = tokenizers[name]
    row = schemas.sft_row(rows("gsm8k_test.sft")[0])
    ids = tokenizer.encode_prompt(row["prompt"])
    assert ids.count(1) == (1 if name == "stories" else 0)  # bos where the tokenizer adds one, once
    text = tokenizer.decode(ids + tokenizer.encode_response(row["response"]))
    assert row["prompt"][0]["content"] in text
    assert row["response"][0]["content"] in text


@pytest.mark.parametrize("name", ["gpt2", "stories"])
def test_an_answer_joins_its_prompt_as_in_the_whole_transcript(tokenizers, name):
    """GPT-2 needs the space after "Assistant:" in the answer; Llama's vocabulary puts it there by itself."""
    tokenizer = tokenizers[name]
    row = schemas.sft_row(rows("self_instruct_human.sft")[0])
    joined = tokenizer.encode_prompt(row["prompt"]) + tokenizer.encode_response(row["response"])
    whole = transcript(row["prompt"] + row["response"])
    assert tokenizer.hf(whole)["input_ids"] == joined[:-1]


def test_a_space_that_the_template_puts_before_an_answer_belongs_to_it():
    hf = Tokenizer.load(str(DATA / NAMES["bpe4k"])).hf
    hf.chat_template = (
        "{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{%- else %}{{ ' ' + m['content'] + ' <|eos|>' }}{%- endif %}{%- endfor %}"
    )
    tokenizer = Tokenizer(hf)
    assert tokenizer.eos_ids == (4, 2)  # the tokenizer's own and the template's
    ids = tokenizer.encode_response([{"role": "assistant", "content": "yes"}])
    assert ids == hf(" yes <|eos|>")["input_ids"] and ids[-1] == 2
    assert tokenizer.response_text(ids, [{"role": "user", "content": "tea?"}]) == "yes"


def test_eos_has_weight_where_pad_is_eos(tokenizers):
    gpt2 = tokenizers["gpt2"]
    examples, report = sft_examples(rows("self_instruct_human.sft"), gpt2, LOOSE, loss_on="response")
    short = [example for example in examples if len(example["tokens"]) <= 128][:32]
    batch = collate_sft(short, length=128, reduction="token", pad_id=gpt2.pad_id)
    eos = (batch["tokens"] == gpt2.eos_ids[0]) & (batch["segment_ids"] > 0)
    assert (eos.sum(axis=1) == 1).all()
    assert (batch["weights"][eos] > 0).all()
    assert not batch["weights"][batch["segment_ids"] == 0].any()
    assert batch["weights"].sum() == pytest.approx(1)
    assert report.kept == 427 - sum(report.dropped.values())


def test_every_shared_file_loads_and_says_what_it_drops(tokenizers):
    bpe = tokenizers["bpe4k"]
    reports = {}
    for name in ("gsm8k_test.sft", "self_instruct_human.sft", "qa_feedback_dev.sft"):
        reports[name] = sft_examples(rows(name), bpe, LOOSE, loss_on="response")[1]
    for name in ("hh_harmless_test.pref", "pandalm_human.pref"):
        reports[name] = preference_examples(rows(name), bpe, LOOSE)[1]
    for name in ("qa_feedback_dev.rank", "gsm8k_solutions.rank"):
        reports[name] = ranking_examples(rows(name), bpe, LOOSE)[1]
    assert reports["qa_feedback_dev.rank"].dropped == {"with all responses tied": 12}
    assert reports["gsm8k_solutions.rank"].dropped == {"with all responses tied": 432 + 156}  # all wrong or all right
    del reports["gsm8k_solutions.rank"]
    reports["mixed.prompts"] = prompt_examples(rows("mixed.prompts"), bpe, Limits(4096, too_long="error"))[1]
    totals = {name: report.kept + sum(report.dropped.values()) for name, report in reports.items()}
    assert totals == {
        "gsm8k_test.sft": 1319, "self_instruct_human.sft": 427, "qa_feedback_dev.sft": 500,
        "hh_harmless_test.pref": 2303, "pandalm_human.pref": 855, "mixed.prompts": 2246,
        "qa_feedback_dev.rank": 500,
    }  # fmt: skip
    dropped = {name: report.dropped for name, report in reports.items() if report.dropped}
    assert dropped == {"qa_feedback_dev.rank": {"with all responses tied": 12}}
    assert len([schemas.sft_row(row) for row in rows("gsm8k_train.sft")]) == 7473
    names = {f"{name}.jsonl.gz" for name in (*totals, "gsm8k_solutions.rank", "gsm8k_train.sft")}
    assert names == {path.name for path in (DATA / "rows").iterdir()}


def raw_hh(row):
    """A prepared HH row as Anthropic publishes it: two transcripts and no prompt."""
    return {name: transcript(row["prompt"] + row[name]) for name in ("chosen", "rejected")} | {"_where": row["_where"]}


def test_raw_hh_transcripts_split_as_the_prepared_rows_do(tokenizers):
    prepared = rows("hh_harmless_test.pref")[:300]
    raw = [raw_hh(row) for row in prepared]
    limits = Limits(1024, 2048, "truncate")
    wanted, wanted_report = preference_examples(prepared, tokenizers["bpe4k"], limits)
    got, report = preference_examples(raw, tokenizers["bpe4k"], limits)
    assert replace(report, kinds={}) == replace(wanted_report, kinds={})
    assert report.kinds == {"preference of HH transcripts": 300}
    assert wanted_report.kinds == {"conversational preference": 300}
    different = sum(not np.array_equal(a["chosen"], b["chosen"]) for a, b in zip(got, wanted, strict=True))
    assert different <= 3  # white space around a turn is stripped from a transcript


def test_hh_traps_are_counted_drops(tokenizers):
    raw = [raw_hh(row) for row in rows("hh_harmless_test.pref")[:6]]
    raw[1]["chosen"] = raw[2]["chosen"]
    raw[3]["rejected"] = raw[3]["rejected"].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:"
    raw[4]["rejected"] = raw[4]["chosen"]
    examples, report = preference_examples(raw, tokenizers["bpe4k"], LOOSE)
    assert report.dropped == {
        "whose two prompts differ": 1,
        "with an empty turn": 1,
        "with chosen equal to rejected": 1,
    }
    assert len(examples) == report.kept == 3


def test_pandalm_votes_nulls_and_repeated_prompts(tokenizers):
    data = rows("pandalm_human.pref")
    data[5]["rejected"] = None
    data[6]["chosen"] = [{"role": "assistant", "content": None}]
    examples, report = preference_examples(data, tokenizers["bpe4k"], LOOSE)
    assert report.dropped["with a null response"] == 2
    labels = [example["label"] for example in examples]
    assert min(labels) < 1 == max(labels)
    keys = [prompt_key(row) for row in data]
    assert len(set(keys)) < len(keys)
    train, held_out = split_by_prompt(data, 0.2, seed=0)
    assert {prompt_key(row) for row in train}.isdisjoint(prompt_key(row) for row in held_out)
    assert 0.1 < len(held_out) / len(data) < 0.3


def test_preference_batches_agree_with_their_rows(tokenizers):
    gpt2 = tokenizers["gpt2"]
    limits = Limits(192, 256, "drop")
    examples, _ = preference_examples(rows("pandalm_human.pref"), gpt2, limits)
    collate = partial(collate_preference, length=256, pad_id=gpt2.pad_id)
    batch = Batches(examples, batch_size=16, seed=0, collate=collate)[3]
    ends = np.take_along_axis(batch["tokens"], batch["last"][..., None], axis=-1)[..., 0]
    assert (ends == gpt2.eos_ids[0]).all()
    assert (batch["segment_ids"].sum(-1) == batch["last"] + 1).all()
    assert batch["weights"].sum() == pytest.approx(1)


def test_prompt_batches_decode_to_their_prompts(tokenizers):
    gpt2 = tokenizers["gpt2"]
    examples, _ = prompt_examples(rows("mixed.prompts"), gpt2, Limits(256, too_long="drop"))
    collate = partial(collate_prompts, buckets=[64, 128, 256], pad_id=gpt2.pad_id)
    batch = Batches(examples, batch_size=8, seed=0, collate=collate)[0]
    pairs = zip(batch["tokens"], batch["mask"], strict=True)
    assert [gpt2.decode(ids[mask]) for ids, mask in pairs] == batch["prompts"]
    assert batch["mask"][:, -1].all()
    assert "id" in batch["columns"]


def test_plain_text_packs_full(tokenizers):
    bpe = tokenizers["bpe4k"]
    document = sources.read_rows(str(DATA / "text" / "tinyshakespeare.txt.gz"))
    train, held_out = split_by_prompt(document, 0.05, seed=0)
    limits = Limits(256, 256, "drop")
    examples, report = sft_examples(train, bpe, limits, loss_on="all")
    assert str(report) == "kept 1 of 1 rows; dropped 0; truncated 0; read as 1 text"
    packed = pack(examples, 256)
    text = bpe.decode(np.concatenate([row["tokens"] for row in packed]))
    assert text == train[0]["text"]
    assert train[0]["text"] + held_out[0]["text"] == document[0]["text"]


def test_rankings_and_their_pairs_hold_the_same_comparisons(tokenizers):
    bpe = tokenizers["bpe4k"]
    rankings, _ = ranking_examples(rows("qa_feedback_dev.rank"), bpe, LOOSE)
    pairs, _ = preference_examples(rows("qa_feedback_dev.rank"), bpe, LOOSE)
    of_rankings = {
        (a.tobytes(), b.tobytes())
        for r in rankings
        for a, i in zip(r["responses"], r["ranks"], strict=True)
        for b, j in zip(r["responses"], r["ranks"], strict=True)
        if i < j
    }
    assert of_rankings == {(p["chosen"].tobytes(), p["rejected"].tobytes()) for p in pairs}
    assert sum(p["weight"] for p in pairs) == pytest.approx(len(rankings))


def test_soft_labels_predict_a_third_rater_at_least_as_well_as_the_majority():
    """PandaLM: three raters per pair. Labels from two of them, log-likelihood of the third; both tuned on one half."""
    found = bench.raters(np.array([row["votes"] for row in rows("pandalm_human.pref")]))
    assert np.log(0.5) < found["majority"] <= found["soft"] < 0


def test_real_rankings_and_their_pairs_have_one_loss_and_a_forward_pass_per_response(tokenizers):
    """16 questions with four ranked answers each, cut so that no two become one: equal loss and gradient."""
    bpe, found = tokenizers["bpe4k"], {}
    model = Model(dataclasses.replace(ARCH, vocab_size=bpe.vocab_size, max_positions=192), score_head=True)
    params = model.init(jax.random.key(0))
    limits = Limits(64, 192, "truncate")
    for kind, (objective, loss, batch) in bench.reward_batches(rows("qa_feedback_dev.rank")[:16], bpe, limits).items():
        value, grads = jax.jit(jax.value_and_grad(objective(model, loss), has_aux=True))(params, batch, None)
        found[kind] = value[0], jax.tree.leaves(grads), int((batch["last"] > 0).sum())
    for a, b in zip(*(jax.tree.leaves(found[kind][:2]) for kind in ("rankings", "pairs")), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    kept, _ = ranking_examples(rows("qa_feedback_dev.rank")[:16], bpe, limits)
    assert found["rankings"][2] == sum(len(example["responses"]) for example in kept) < found["pairs"][2] / 2


def test_all_answers_of_real_conversations_are_those_that_transformers_marks(tokenizers):
    bpe = tokenizers["bpe4k"]
    talks = [row["prompt"] + row["chosen"] for row in rows("hh_harmless_test.pref")[:200]]
    examples, _ = sft_examples([{"messages": talk, "_where": "hh"} for talk in talks], bpe, LOOSE, loss_on="assistant")
    assert max(len(talk) for talk in talks) > 4
    for talk, example in zip(talks, examples, strict=True):
        wanted = bpe.hf.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
        size = len(example["tokens"])  # the template adds a line break after the last answer
        assert wanted["input_ids"][:size] == example["tokens"].tolist()
        assert wanted["assistant_masks"][:size] == example["loss_mask"].tolist()


def test_gpt2_files_without_a_class_name_say_what_is_missing(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((DATA / NAMES["gpt2"] / name).read_bytes())
    with pytest.raises(UserError, match=r"unusable tokenizer .* and that tokenizer_config.json names its class"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_bytes((DATA / NAMES["gpt2"] / "tokenizer_config.json").read_bytes())
    assert Tokenizer.load(str(tmp_path)).vocab_size == 50257
