"""Padding of models that score: transformers reads a score at the last token that is not padding."""

from __future__ import annotations

import copy
import math
import re

from rlhf_jax.data.tokenizer import Tokenizer

NEW = "<|pad|>"
_NAMED = re.compile(r"[<\[|]+(finetune_right_)?pad(ding|_id)?[>\]|]+", re.IGNORECASE)
"""Names of tokens that were meant for padding, such as <pad>, [PAD], <|padding|>, <|finetune_right_pad_id|>."""


def with_own_padding(tokenizer: Tokenizer, rows: int) -> tuple[Tokenizer, int]:
    """The tokenizer with a padding token that ends no response, and the rows that an embedding of `rows` needs then.

    Its own if that is no stop token, else a special token named like one, else a new one: in an unused row of the
    embedding, or in new ones, as many as keep the number divisible by what it was (of 2 to 64). It pads on the right,
    where positions are right in families that learn them.
    """
    hf, stops, used = copy.deepcopy(tokenizer.hf), {*tokenizer.eos_ids, tokenizer.end_id}, tokenizer.hf.get_vocab()
    hf.padding_side = "right"
    if hf.pad_token_id is None or hf.pad_token_id in stops:
        special = {i: str(token) for i, token in hf.added_tokens_decoder.items() if i not in stops}
        token = next((text for text in special.values() if _NAMED.fullmatch(text)), NEW)
        hf.add_special_tokens({"pad_token": token})
        if token not in used and hf.pad_token_id in used.values():  # ids with gaps: the next one was not free
            hf.pad_token = None
    padded = copy.copy(tokenizer)
    padded.hf, padded.pad_id, padded.vocab_size = hf, hf.pad_token_id, max(hf.get_vocab().values()) + 1
    return padded, rows if padded.vocab_size <= rows else rows + math.gcd(rows, 64)
