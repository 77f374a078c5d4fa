"""Shapes of rows that other tools write, as the rows that stages take; and a field map for others that look alike."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_jax.data.rows import Row, bad_row, layout_of, type_of

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "observation": "tool",
}  # fmt: skip
"""Who speaks in ShareGPT -> the role."""

ALIKE = {
    "prompt": ("question", "query", "instruction", "input", "problem", "context", "post", "title"),
    "response": ("answer", "output", "reply", "response", "completion", "solution", "target", "summary"),
    "chosen": ("preferred", "better", "accepted", "winner", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "worse", "loser", "rejected_response", "response_rejected"),
}
"""Field of ours -> names that others give it."""


def shaped(row: Row) -> Row:
    """The row, of Alpaca's shape {instruction, input?, output} or ShareGPT's {conversations: [{from, value}]} as ours.

    Alpaca's prompt is the instruction, and after an empty line the input. With `chosen` and `rejected` either is a
    preference. An empty input or system turn says nothing. Other fields stay; so does a row that has a shape of ours.
    """
    if layout_of(row) not in ("unknown", "text", "preference with its prompt in both"):
        return row
    if isinstance(turns := row.get("conversations"), list):
        return _share_gpt(row, turns)
    answers = {"output"} if "output" in row else {"chosen", "rejected"}
    if "instruction" in row and answers <= set(row):
        rest = {name: value for name, value in row.items() if name not in ("instruction", "input", "output", "text")}
        prompt = row["instruction"]
        if prompt is not None and (more := row.get("input")):
            if not (isinstance(prompt, str) and isinstance(more, str)):
                raise bad_row(row, f'"instruction" is {type_of(prompt)} and "input" {type_of(more)}; give texts')
            prompt = f"{prompt}\n\n{more}"
        return {"prompt": prompt, **({"response": row["output"]} if "output" in row else {}), **rest}
    return row


def _share_gpt(row: Row, turns: list[object]) -> Row:
    rest = {name: value for name, value in row.items() if name not in ("conversations", "system")}
    messages = [{"role": "system", "content": row.get("system")}, *(_message(row, turn) for turn in turns)]
    messages = [turn for turn in messages if turn["role"] != "system" or str(turn["content"] or "").strip()]
    if {"chosen", "rejected"} <= set(row):
        both = {name: [_message(row, row[name])] for name in ("chosen", "rejected") if isinstance(row[name], dict)}
        return {**rest, "prompt": messages, **both}
    return {**rest, "messages": messages}


def _message(row: Row, turn: object) -> Row:
    """A turn {from, value}, or one of ours, as a message."""
    if not isinstance(turn, Mapping) or not ({"from", "value"} <= set(turn) or {"role", "content"} <= set(turn)):
        raise bad_row(row, '"conversations" has a turn that is no {from, value}; write [{"from": "human", ...}, ...]')
    if "role" in turn:
        return dict(turn)
    if turn["from"] not in ROLES:
        raise bad_row(row, f"a turn is from {turn['from']!r}; write one of {', '.join(ROLES)}")
    return {"role": ROLES[turn["from"]], "content": turn["value"]}


def proposal(row: Row, needed: set[str]) -> str:
    """The data.fields that could make the fields `needed` and their kin of a row, as the end of an error, or ""."""
    for names in (("prompt", "chosen", "rejected"), ("prompt", "response"), ("prompt",)):
        found = [next((other for other in (name, *ALIKE[name]) if other in row), "") for name in names]
        if needed <= set(names) and all(found) and len(set(found)) == len(names):
            fields = ", ".join(f"{name}={{{other}}}" for name, other in zip(names, found, strict=True))
            return f"; try data.fields '[{fields}]'"
    return ""
