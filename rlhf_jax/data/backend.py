"""What a Hugging Face tokenizer puts round a text by itself, and which stop ids a model's files name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.errors import UserError, shown
from rlhf_jax.hosts.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_BLANK: dict[str, dict[str, object]] = {
    "normalizer": {"strip_left": False},
    "pre_tokenizer": {"prepend_scheme": "never", "add_prefix_space": False},
    "decoder": {"prepend_scheme": "never", "start": 0},
}
"""Part of tokenizer.json -> settings under which it neither adds a blank before a text nor takes one off."""


def plain_ids(hf: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text without special tokens around it; verbose=False: our own length limits say what is too long."""
    try:
        return list(hf(text, add_special_tokens=False, verbose=False)["input_ids"])
    except (TypeError, UnicodeEncodeError) as error:
        raise UserError(f"the text cannot be tokenised ({error}); remove its lone surrogates") from error


def decoded(hf: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of some ids, with their special tokens or without, and no blank that is theirs tidied away."""
    text = hf.decode([int(i) for i in ids], skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    return str(text)


def token_text(hf: PreTrainedTokenizerBase, token: int) -> str:
    return str(hf.convert_ids_to_tokens(token))


def declared_eos(directory: Path) -> int | list[int] | None:
    """eos_token_id of generation_config.json, else of config.json, else of the text_config in it."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        whole = read_object(file, "write it again", ours=False) if file.is_file() else {}
        parts = [part for part in (whole, whole.get("text_config")) if isinstance(part, dict)]
        declared = next((part["eos_token_id"] for part in parts if part.get("eos_token_id") is not None), None)
        if declared is None:
            continue
        if not all(type(i) is int for i in (declared if isinstance(declared, list) else [declared])):
            raise UserError(f"{file}: eos_token_id is {shown(declared)}, which are no token ids; correct it")
        return declared
    return None


def prefix_specials(hf: PreTrainedTokenizerBase) -> list[int]:
    """The special ids that the tokenizer puts before a text: [bos], or []."""
    whole, plain = list(hf("a")["input_ids"]), plain_ids(hf, "a")
    if not plain:  # a vocabulary without "a"
        return [i for i in whole if i == hf.bos_token_id][:1]
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def continuing(hf: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer for texts that go on where another ended: without the blank that it puts before every text.

    SentencePiece vocabularies do so, and byte-level ones with `add_prefix_space`; decoding then takes it off again.
    Others, and those without a fast backend, are returned as they are.
    """
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        return hf
    parts = {name: getattr(backend, name) for name in NO_BLANK}
    states = {name: json.loads(part.__getstate__()) for name, part in parts.items() if part is not None}
    changed = {name: _without_blank(state, NO_BLANK[name]) for name, state in states.items()}
    if changed == states:
        return hf
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole = {**json.loads(backend.to_str()), **changed, "truncation": None, "padding": None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))


def _without_blank(part: Any, settings: Mapping[str, object]) -> Any:
    """A part of tokenizer.json with these settings wherever it has them, and without a normaliser that prepends."""
    if isinstance(part, list):
        return [kept for kept in (_without_blank(each, settings) for each in part) if kept is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    return {name: settings.get(name, _without_blank(value, settings)) for name, value in part.items()}
