"""Reward models in transformers: the saved directory gives our score, one row at a time and padded on either side."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from test_families import golden, hidden_of
from tiny import byte_tokenizer, model_params
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model, hf
from rlhf_jax.models.hf.config_json import to_arch
from rlhf_jax.models.loading import Loaded, check_same_tokenizer, save_model

FAMILIES = ("llama", "gpt2", "qwen2", "gemma", "mistral", "phi3", "gpt_neox")
TOKENIZERS = ("pad", "pad is eos", "no pad", "named", "unused rows")
LENGTHS = (9, 4, 7)


def make_tokenizer(kind):
    """A byte tokenizer: with a pad token, one that is the stop token, none, none declared, none but unused rows."""
    if kind in ("pad", "named"):
        return byte_tokenizer(pad="<pad>" if kind == "pad" else None, padding_side="left")
    names = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(["<eos>"])
    more = {"pad_token": "<eos>"} if kind == "pad is eos" else {}
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", **more)


def base_of(family, size):
    """Shape and config.json of a family's classifier with a vocabulary of `size`."""
    raw = json.loads(golden(f"{family}/score")["config"].tobytes())
    return dataclasses.replace(to_arch(raw, hf.FAMILIES[family], Path(family)), vocab_size=size), raw


def save(path, family, kind):
    """A random reward model as a stage saves it: (model, params, tokenizer)."""
    tokenizer = Tokenizer(make_tokenizer(kind))
    arch, raw = base_of(family, tokenizer.vocab_size + 5 * (kind == "unused rows"))
    model = Model(arch, score_head=True)
    params = model_params(model, 1)
    save_model(path, Loaded(model, params, raw), params, tokenizer)
    return model, params, tokenizer


def rows_of(tokenizer, size, seed=0):
    """Responses that end in the stop token, the padding id and the stop id among their tokens."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, size, length) for length in LENGTHS]
    for row in rows:
        row[1], row[2], row[-1] = tokenizer.pad_id, tokenizer.eos_ids[0], tokenizer.eos_ids[0]
    return rows


def padded(rows, pad_id, side):
    """ids and mask [B, S], S one more than the longest."""
    ids = np.full((len(rows), max(map(len, rows)) + 1), pad_id)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(-len(row), None)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def our_scores(model, params, rows):
    ids, mask = padded(rows, 0, "right")
    hidden = jax.jit(functools.partial(hidden_of, model))(params, ids.astype(np.int32), mask.astype(bool))
    last = np.array([len(row) - 1 for row in rows])
    return np.asarray(model.scores(params["score"], hidden))[np.arange(len(rows)), last]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_last_token_that_is_no_padding_is_the_last_of_the_response(tmp_path, family, kind):
    """What transformers reads, in numpy; and what we read of the saved directory is what we saved."""
    model, params, before = save(tmp_path / "m", family, kind)
    arch, config = hf.read_config(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    pad_id = config["pad_token_id"]
    assert tokenizer.pad_token_id == pad_id and tokenizer.padding_side == "right"
    assert pad_id not in before.eos_ids and pad_id < arch.vocab_size
    for side in ("left", "right"):
        rows = rows_of(Tokenizer(tokenizer), before.vocab_size)
        ids, mask = padded(rows, pad_id, side)
        read = np.where(ids != pad_id, np.arange(ids.shape[1]), 0).argmax(1)
        np.testing.assert_array_equal(read, np.where(mask, np.arange(ids.shape[1]), 0).argmax(1))
    grown = arch.vocab_size - model.arch.vocab_size
    assert grown == (1 if kind in ("no pad", "pad is eos") else 0)
    check_same_tokenizer(before, str(tmp_path / "m"), "reward model")
    again = hf.load_params(tmp_path / "m", arch, score_head=True)
    np.testing.assert_array_equal(again["embed"]["tokens"][: model.arch.vocab_size], params["embed"]["tokens"])
    text = "tea <eos> é"
    assert before.hf(text)["input_ids"] == tokenizer(text)["input_ids"]  # one more token, no other change
    save_model(tmp_path / "again", Loaded(Model(arch, score_head=True), again, config), again, Tokenizer(tokenizer))
    assert hf.read_config(tmp_path / "again")[0] == arch  # it grows once


def test_only_padding_may_differ_between_tokenizers(tmp_path):
    save(tmp_path / "m", "llama", "no pad")
    other = make_tokenizer("no pad")
    other.add_tokens(["<more>"])
    with pytest.raises(UserError, match="another tokenizer"):
        check_same_tokenizer(Tokenizer(other), str(tmp_path / "m"), "reward model")


def test_a_language_model_keeps_its_tokenizer(tmp_path):
    tokenizer = Tokenizer(make_tokenizer("no pad"))
    arch, raw = base_of("llama", tokenizer.vocab_size)
    params = model_params(Model(arch), 0)
    save_model(tmp_path / "m", Loaded(Model(arch), params, raw), params, tokenizer)
    assert hf.read_config(tmp_path / "m")[0].vocab_size == tokenizer.vocab_size
    assert AutoTokenizer.from_pretrained(tmp_path / "m").pad_token is None


def test_a_classifier_without_tokenizer_never_pads_with_a_stop_token(tmp_path):
    arch, raw = base_of("llama", 37)
    params = model_params(Model(arch, score_head=True), 0)
    hf.save_model(tmp_path, arch, params, eos_ids=[2], base_config=raw | {"pad_token_id": 2}, score_head=True)
    assert hf.read_config(tmp_path)[1]["pad_token_id"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_our_scores(tmp_path, family):
    torch = pytest.importorskip("torch", reason="needs torch: the test above has its rule in numpy")
    from transformers import AutoModelForSequenceClassification

    kinds = TOKENIZERS if family == "gpt2" else ("pad", "pad is eos")
    for kind in kinds:
        path = tmp_path / kind
        model, params, before = save(path, family, kind)
        params["score"]["bias"] = np.zeros(())  # transformers' head has none
        save_model(path, Loaded(model, params, base_of(family, model.arch.vocab_size)[1]), params, before)
        found = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()
        tokenizer = Tokenizer.load(str(path))
        rows = rows_of(tokenizer, before.vocab_size)
        rows = [np.minimum(row, model.arch.vocab_size - 1) for row in rows]
        expected = our_scores(model, params, rows)
        with torch.no_grad():
            alone = [found(torch.from_numpy(row[None])).logits.item() for row in rows]
            np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-4)
            for side in ("right", "left"):
                ids, mask = map(torch.from_numpy, padded(rows, tokenizer.pad_id, side))
                positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if side == "left" else {}
                together = found(ids, attention_mask=mask, **positions).logits[:, 0]
                np.testing.assert_allclose(together.numpy(), expected, rtol=0, atol=1e-4)
