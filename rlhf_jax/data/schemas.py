"""One row in, one normalised row out; a bad one is an error that says where it is, what is wrong and the cure.

A prompt is a str or a message list [{role, content, ...}]; the response that belongs to it has the same form: a str,
or [{role: "assistant", content, ...}]. Every function takes a dict with an optional "_where" and returns a new one. It
raises a UserError at a missing field or a wrong type, a DroppedRow where there is nothing to learn: a null or empty
turn, a false label, two answers that are equal or answer two prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, cast

from rlhf_jax.data.messages import (
    GIVEN,
    Text,
    conversation_of,
    key_of,
    messages_of,
    prompt_of,
    response_of,
    split_transcript,
)
from rlhf_jax.data.numbers import LARGEST, SMALLEST, is_number, number_of, off_centre
from rlhf_jax.data.rows import PREFERENCES, RANKINGS, Row, bad_row, empty_row, layout_of, require, type_of, where_of
from rlhf_jax.data.shapes import proposal
from rlhf_jax.errors import shown


class Answer(NamedTuple):
    """A response to a prompt: a text or, to messages, one message."""

    response: Text
    finished: bool = True  # it was not cut off
    ids: list[int] | None = None  # those that a model sampled for it, stop id included, if anything says so
    extra: Row = {}  # noqa: RUF012 (other fields that a ranking has of it, such as "model")


def kind_of(row: Row) -> str:
    """`layout_of` in words, for reports: such as "conversational preference" or "preference of HH transcripts"."""
    kind = layout_of(row)
    first = next((row[name] for name in ("prompt", "chosen", "messages") if name in row), None)
    if isinstance(first, list):
        return f"conversational {kind}" if kind != "messages" else kind
    if kind == "preference with its prompt in both" and isinstance(first, str) and split_transcript(first):
        return "preference of HH transcripts"
    return kind


def sft_row(row: Row) -> Row:
    """`answer_of`, but of TRL's unpaired preferences only those whose `label` is true."""
    answer = answer_of(row)
    if layout_of(row) == "unpaired preference" and not flag_of(row, "label"):
        raise empty_row(row, '"label" is false, an answer not to learn', "labelled as bad")
    return answer


def answer_of(row: Row) -> Row:
    """The prompt and the one answer of a row -> {prompt, response, finished, ids?}.

    {prompt, response} (or TRL's `completion`), or {messages} that end in an assistant turn; a row with all of these is
    the former. With `finished` false the response was cut off, so no stop id belongs to it. `ids` are the row's
    `response_ids`, as sampled.
    """
    if layout_of(row) in (*RANKINGS, *PREFERENCES):
        raise bad_row(
            row, f'a {kind_of(row)} row has no one answer to learn; map one with data.fields, as "response={{chosen}}"'
        )
    said = [row[name] for name in ("response", "completion") if row.get(name) is not None]
    if len(said) == 2 and said[0] != said[1]:
        raise bad_row(row, '"response" and "completion" differ; map the one to learn with data.fields')
    if "messages" in row and not {"response", "completion"} & set(row):
        turns = messages_of(row, "messages", row["messages"])
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise bad_row(row, '"messages" must hold a prompt and end in an assistant turn; add the turn to learn')
        prompt, response = prompt_of(row, turns[:-1]), cast(Text, turns[-1:])
    else:
        name = "completion" if "completion" in row and row.get("response") is None else "response"
        expected = "an sft row is {prompt, response}, {messages} or {text}"
        require(row, ("prompt", name), expected + proposal(row, {"prompt", "response"}))
        prompt = prompt_of(row, row["prompt"])
        response = response_of(row, name, row[name], prompt)
    sampled = {} if (ids := ids_of(row, "response_ids")) is None else {"ids": ids}
    return {"prompt": prompt, "response": response, "finished": finished_of(row), **sampled, "_where": where_of(row)}


def single_answer(answer: Row) -> Answer:
    """That of what `answer_of` returns."""
    return Answer(answer["response"], answer["finished"], answer.get("ids"))


def preference_row(row: Row) -> Row:
    """{prompt, chosen, rejected, votes?, margin?, finished?, rater?} -> with label, margin, finished and ids.

    `votes` = [for chosen, for rejected, ties] gives label = (chosen + ties / 2) / total, the share of raters that
    prefer `chosen`; without votes it is 1. `finished` = [of chosen, of rejected] says which were not cut off; `ids` =
    [chosen_ids, rejected_ids], those that a model sampled, or None.

    Without a prompt, `chosen` and `rejected` are whole conversations (transcripts "\\n\\nHuman: ...\\n\\nAssistant:
    ..." as in Anthropic's HH files, or message lists) that differ in their last turn only, or other texts, whose
    common beginning up to a white space is the prompt.
    """
    expected = "a preference row is {prompt, chosen, rejected, votes?} or two transcripts {chosen, rejected}"
    require(row, ("chosen", "rejected"), expected + proposal(row, {"chosen", "rejected"}))
    if "prompt" in row:
        prompt = prompt_of(row, row["prompt"])
        chosen, rejected = (response_of(row, name, row[name], prompt) for name in ("chosen", "rejected"))
    elif all(isinstance(row[name], str) and not split_transcript(row[name]) for name in ("chosen", "rejected")):
        prompt, chosen, rejected = _common_prompt(row)
    else:
        prompt, chosen = conversation_of(row, "chosen")
        other, rejected = conversation_of(row, "rejected")
        if prompt != other:
            raise empty_row(row, "chosen and rejected answer different prompts", "whose two prompts differ")
    if key_of(chosen).strip() == key_of(rejected).strip():
        raise empty_row(row, "chosen and rejected are the same text", "with chosen equal to rejected")
    finished = [True, True] if row.get("finished") is None else row["finished"]
    if not (isinstance(finished, list) and [type(f) for f in finished] == [bool, bool]):
        raise bad_row(row, f'"finished" is {finished!r}; give [true or false of chosen, of rejected]')
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "label": _label(row),
        "margin": 0.0 if row.get("margin") is None else float32_of(row, "margin", row["margin"]),
        "finished": finished,
        "ids": [ids_of(row, "chosen_ids"), ids_of(row, "rejected_ids")],
        "_where": where_of(row),
    }


def margins_of(rows: Sequence[Row]) -> list[float]:
    """The margins of all preferences that have one."""
    return [row["margin"] for row in rows if layout_of(row) in PREFERENCES and is_number(row.get("margin"))]


def margins_lost(rows: Sequence[Row]) -> Counter[str]:
    """How many preferences have a margin that is too small for float32, for a report."""
    return +Counter({"margins that are 0 in float32": sum(0 < abs(m) < SMALLEST for m in margins_of(rows))})


def margins_unused(rows: Sequence[Row]) -> Counter[str]:
    """How many preferences have a margin, for a report where nothing is made of it."""
    return +Counter({"margins not used": sum(margin != 0 for margin in margins_of(rows))})


def both_answers(pair: Row) -> list[Answer]:
    """[chosen, rejected] of what `preference_row` returns."""
    return list(map(Answer, (pair["chosen"], pair["rejected"]), pair["finished"], pair["ids"]))


def prompt_row(row: Row) -> Row:
    """{prompt, ...}: the prompt validated, every other column kept as it is."""
    require(row, ("prompt",), "a prompts row is {prompt, ...}" + proposal(row, {"prompt"}))
    columns = ("documents", *(GIVEN if isinstance(row["prompt"], str) else ()))  # these are for reward functions
    fields = {name: value for name, value in row.items() if name not in columns}
    return {**row, "prompt": prompt_of(fields, row["prompt"]), "_where": where_of(row)}


def columns_of(row: Row) -> Row:
    """The fields of a prompt row that reward functions get as columns: all but the prompt, and what was seen of it."""
    return {name: value for name, value in row.items() if name not in ("prompt", "prompt_seen", "_where")}


def text_row(row: Row) -> Row:
    """{text}: one document."""
    require(row, ("text",), "a text row is {text}")
    if {"response", "completion"} & set(row):
        raise bad_row(row, 'an answer, but no "prompt", beside "text"; say what they are with data.fields')
    if not isinstance(row["text"], str | None):
        raise bad_row(row, f'"text" is {type_of(row["text"])}; give a string')
    if not (row["text"] or "").strip():
        raise empty_row(row, '"text" is empty', "with an empty text")
    return {"text": row["text"], "_where": where_of(row)}


def _label(row: Row) -> float:
    """The share of raters that prefer `chosen`, ties counted half; as float32 holds it, but 1/2 for a tie alone."""
    votes = row.get("votes")
    if votes is None:
        return 1.0
    if not isinstance(votes, list) or len(votes) != 3 or not all(is_number(v) and v >= 0 for v in votes):
        raise bad_row(row, f'"votes" is {votes!r}; give three counts [chosen, rejected, ties]')
    for count in votes:
        float32_of(row, "votes", count)
    if not any(votes):
        raise bad_row(row, '"votes" are all zero; leave the field out if nobody voted')
    won, lost, tied = (Fraction(number_of(count)) for count in votes)
    share = (won + tied / 2) / (won + lost + tied)
    return float(share) if share == Fraction(1, 2) else off_centre(float(share), won > lost)


def _common_prompt(row: Row) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts: "The sky is blue" and "The sky is grey" give "The sky is", " blue"."""
    chosen, rejected = row["chosen"], row["rejected"]
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if same is None:
        raise empty_row(row, "chosen or rejected is the beginning of the other", "with an empty turn")
    while same and not (chosen[same].isspace() and rejected[same].isspace()):  # the border is not within a word
        same -= 1
    while same and chosen[same - 1].isspace():  # nor within a white space, parts of which may be one token
        same -= 1
    if not chosen[:same].strip():
        raise bad_row(row, 'no "prompt", and "chosen" and "rejected" share no beginning; add the field "prompt"')
    return chosen[:same], chosen[same:], rejected[same:]


def flag_of(row: Row, name: str) -> bool:
    """A field that must be true or false; 0 and 1 will do."""
    value = number_of(row[name])
    if value not in (0, 1):
        raise bad_row(row, f'"{name}" is {value!r}; give true or false')
    return bool(value)


def finished_of(row: Row) -> bool:
    """Whether a response was not cut off; it was not if nothing says so."""
    return row.get("finished") is None or flag_of(row, "finished")


def ids_of(row: Row, name: str) -> list[int] | None:
    """The token ids that a row gives for a response, or None."""
    ids = row.get(name)
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise bad_row(row, f'"{name}" is {shown(ids)}; give a list of token ids, or leave it out')
    return ids


def float32_of(row: Row, name: str, value: object) -> float:
    """A finite number of a row that is computed with in float32."""
    if not is_number(value):
        raise bad_row(row, f'"{name}" is {value!r}; give a finite number')
    if abs(number := number_of(value)) > LARGEST:
        raise bad_row(row, f'"{name}" is over {LARGEST:.2g}, the largest number of float32; scale it')
    return float(number)
