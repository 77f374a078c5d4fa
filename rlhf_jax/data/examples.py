"""Demonstrations, documents and prompts to token examples; held-out rows; packing.

Rows become examples once, when data is loaded: what is dropped or cut is counted and said. Lengths are in tokens; the
stop id counts. `Limits.too_long` is drop (counted), truncate (a prompt loses its start, a response its end and with it
the stop id), or error. What makes examples raises a UserError at a bad row, at one that the limits refuse, and where
no row is left.
"""

from __future__ import annotations

import hashlib

import numpy as np

from rlhf_jax.data import schemas
from rlhf_jax.data.encoding import Encoder, Example, Limits, Report, collect, naming
from rlhf_jax.data.messages import as_key
from rlhf_jax.data.rows import ANSWERS, DroppedRow, Row, bad_row, layout_of
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

EMPTY = "with an empty prompt"
"""Why a prompt is left out."""

OPEN_PACKS = 64  # sequences that `pack` keeps open: more fill better, but every row looks at all of them


def sft_examples(
    rows: list[Row], tokenizer: Tokenizer, limits: Limits, *, loss_on: str
) -> tuple[list[Example], Report]:
    """[{tokens int32[n], loss_mask bool[n]}] of sft or text rows; loss_mask[i]: token i is a target.

    `loss_on` is response, assistant (earlier answers in the prompt too), or all. The first token of an example is
    never a target, nothing stands before it to predict it from. A {text} row is a document: all of its tokens and the
    stop id are targets, and one longer than `max_length` becomes consecutive windows of `max_length` (a last window of
    one token has no target and is left).
    """
    encoder = Encoder(tokenizer, limits)

    def build(row: Row) -> tuple[list[Example], bool]:
        if layout_of(row) == "text":
            text = schemas.text_row(row)["text"]
            with naming(row):
                ids = tokenizer.encode_document(text, encoder.remarks)
            if len(ids) < 2:
                raise DroppedRow(f"{row['_where']}: the text has no tokens", "with a text that has no tokens")
            starts = range(0, len(ids), limits.max_length)
            windows = [np.asarray(ids[start : start + limits.max_length], np.int32) for start in starts]
            return [{"tokens": w, "loss_mask": np.arange(len(w)) > 0} for w in windows if len(w) > 1], False
        row = schemas.sft_row(row)
        prompt, cut_prompt = encoder.prompt(row)
        response, cut_response = encoder.response(row, schemas.single_answer(row), len(prompt))
        is_target = np.full(len(prompt) + len(response), loss_on == "all")
        if loss_on == "assistant":  # a cut prompt keeps its end, and maybe a bos, which is no answer
            with naming(row):
                in_answer = tokenizer.answers_in(row["prompt"])
            is_target[: len(prompt)] = in_answer[len(in_answer) - len(prompt) :]
            is_target[0] &= not cut_prompt
        is_target[len(prompt) :] = _is_learned(row, loss_on)
        is_target[:1] = False
        if not is_target.any():
            raise UserError(f"{row['_where']}: no token of it is learned with sft.loss_on {loss_on}; remove the row")
        tokens = np.asarray(prompt + response, np.int32)
        return [{"tokens": tokens, "loss_mask": is_target}], cut_prompt or cut_response

    return collect(rows, build, strict=limits.strict, remarks=encoder.remarks)


def prompt_examples(rows: list[Row], tokenizer: Tokenizer, limits: Limits) -> tuple[list[Example], Report]:
    """[{tokens int32[n], prompt: str, given, seen: dict, columns: dict}].

    `prompt` is the whole prompt as text, even if cut; `given` is it as the row has it, a text or messages; `seen` is
    {prompt_seen} if it was cut; `columns` are the row's other fields.
    """
    encoder = Encoder(tokenizer, limits)

    def build(row: Row) -> tuple[list[Example], bool]:
        row = schemas.prompt_row(row)
        tokens, cut = encoder.prompt(row)
        if not tokens:
            raise DroppedRow(f"{row['_where']}: the prompt has no tokens", EMPTY)
        given, ids = row["prompt"], np.asarray(tokens, np.int32)
        text, columns = tokenizer.prompt_text(given), schemas.columns_of(row)
        seen = encoder.seen(tokens, cut)
        return [{"tokens": ids, "prompt": text, "given": given, "seen": seen, "columns": columns}], cut

    return collect(rows, build, strict=limits.strict, remarks=encoder.remarks, columns=True)


def prompt_key(row: Row) -> str:
    """A text that is equal for rows with the same prompt, whatever the kind of row; never raises."""
    kind = layout_of(row)
    try:
        if kind == "text":
            prompt = row["text"]
        elif kind in ANSWERS:
            prompt = schemas.answer_of(row)["prompt"]
        else:
            prompt = row["prompt"] if "prompt" in row else schemas.preference_row(row)["prompt"]
    except UserError:  # a bad row: the loader that wants it reports it
        prompt = {name: value for name, value in row.items() if name != "_where"}
    return as_key(prompt)


def row_key(row: Row) -> str:
    """A text that is equal for equal rows, whatever their id."""
    return as_key({name: value for name, value in row.items() if name not in ("_where", "id")})


def split_by_prompt(rows: list[Row], eval_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, eval) rows; all rows of one prompt land on the same side, which only the prompt and `seed` decide.

    So a row stays on its side when others are added. A single text document is cut in two at a line break instead,
    its end held out.

    At least one prompt is on either side: of a few rows, the one nearest to it.

    Raises:
        UserError: eval_fraction is outside [0, 1), or it is positive and all rows have one prompt.
    """
    if not 0 <= eval_fraction < 1:
        raise UserError(f"eval_fraction {eval_fraction} must be at least 0 and below 1; set data.eval_fraction")
    if eval_fraction == 0:
        return list(rows), []
    if len(rows) == 1 and layout_of(rows[0]) == "text" and isinstance(rows[0]["text"], str):
        return _cut_document(rows[0], eval_fraction)
    places = [_place(row, seed) for row in rows]
    if len(set(places)) < 2:
        raise UserError(
            f"all {len(rows)} rows have one prompt, so none can be held out; set data.eval_fraction 0 to evaluate "
            "nothing, or data.eval_path to a file of held-out rows"
        )
    border = max(min(eval_fraction * 2**64, max(places)), min(places) + 1)
    sides: tuple[list[Row], list[Row]] = [], []
    for row, place in zip(rows, places, strict=True):
        sides[place < border].append(row)
    return sides


def _place(row: Row, seed: int) -> int:
    """A number below 2**64 that the prompt and the seed decide."""
    text = f"{seed} {prompt_key(row)}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def pack(examples: list[Example], length: int) -> list[Example]:
    """Whole examples side by side: [{tokens, loss_mask, segment_ids int32 from 1, positions int32}], at most `length`.

    Each goes into the first open sequence with room (first fit), so rows stay roughly in order. Positions restart at
    0 in every segment; attention must stay within equal segment_ids.
    """
    done: list[list[Example]] = []
    packs: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example["tokens"])
        if size > length:
            raise UserError(f"an example of {size} tokens does not fit into {length}; raise data.max_length")
        fits = next((i for i, free in enumerate(room) if size <= free), None)
        if fits is None:
            if len(packs) == OPEN_PACKS:
                fullest = room.index(min(room))
                done.append(packs.pop(fullest))
                room.pop(fullest)
            packs.append([])
            room.append(length)
            fits = -1
        packs[fits].append(example)
        room[fits] -= size
    return [_side_by_side(members) for members in done + packs]


def _side_by_side(members: list[Example]) -> Example:
    sizes = [len(example["tokens"]) for example in members]
    return {
        "tokens": np.concatenate([example["tokens"] for example in members]),
        "loss_mask": np.concatenate([example["loss_mask"] for example in members]),
        "segment_ids": np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes),
        "positions": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        "where": " ".join(dict.fromkeys(example["where"] for example in members)),
    }


def _cut_document(row: Row, eval_fraction: float) -> tuple[list[Row], list[Row]]:
    text = row["text"]
    middle = int(len(text) * (1 - eval_fraction))
    cut = text.rfind("\n", 0, middle) + 1 or middle
    if not text[:cut].strip() or not text[cut:].strip():
        raise UserError(
            f"{row.get('_where', 'a row')}: eval_fraction {eval_fraction} of one document of {len(text)} characters "
            "leaves one side empty; set data.eval_path to a file of held-out text"
        )
    return [{**row, "text": text[:cut]}], [{**row, "text": text[cut:]}]


def _is_learned(row: Row, loss_on: str) -> bool:
    """Whether the answer of an sft row is learned, by its `weight`; a row of which nothing is, is dropped."""
    turns = [turn for part in (row["prompt"], row["response"]) if not isinstance(part, str) for turn in part]
    if loss_on == "all" and any("weight" in turn for turn in turns):
        raise bad_row(row, 'a message has a "weight", which sft.loss_on all does not know; leave it out')
    learned = not turns or bool(turns[-1].get("weight", 1))
    if not learned and loss_on == "response":
        raise DroppedRow(f"{row['_where']}: the answer has weight 0", "with an answer of weight 0")
    return learned
