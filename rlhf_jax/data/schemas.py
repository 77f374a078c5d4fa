"""One row in, one normalised row out; a bad one is an error that says where it is, what is wrong and the cure.

A prompt is a str or a message list [{role, content, ...}]; the response that belongs to it has the same form: a str,
or [{role: "assistant", content, ...}]. Every function takes a dict with an optional "_where" and returns a new one.
"""

from __future__ import annotations

import contextlib
import json
import re
from fractions import Fraction
from typing import Any, cast

from rlhf_jax.data.layouts import PREFERENCES, RANKINGS, layout_of
from rlhf_jax.data.numbers import LARGEST, is_number, number_of, off_centre
from rlhf_jax.errors import UserError, shown

Row = dict[str, Any]
Message = dict[str, Any]
Messages = list[Message]

SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
ROLES = {speaker: role for role, speaker in SPEAKERS.items()}
OTHER_ROLES = ("developer", "tool")  # which only a chat template can write
TEMPLATE = "template"  # role of a first turn with what a chat template is given beside the messages, such as tools
GIVEN = ("tools", "documents", "chat_template_kwargs")
NOT_GIVEN = {"role", "content", "messages", "weight", "conversations", "chat_template", "add_generation_prompt"}
NOT_GIVEN |= {"continue_final_message", "return_assistant_tokens_mask"}  # what is decided for every rendering
SAID = frozenset(
    ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "audio", "images")
)
"""Fields of a message that say something: what does not write them would train something else."""
TURN = re.compile(r"\n\n(System|Human|Assistant):")


class DroppedRow(UserError):
    """A row that is well-formed but holds nothing to learn from; loaders count it under `reason` and go on.

    Args:
        message: the full sentence, with file:line.
        reason: what follows a count, such as "with an empty turn".
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def kind_of(row: Row) -> str:
    """`layout_of` in words, for reports: such as "conversational preference" or "preference of HH transcripts"."""
    kind = layout_of(row)
    told = next((row[name] for name in ("prompt", "chosen", "messages") if name in row), None)
    if isinstance(told, list):
        return f"conversational {kind}" if kind != "messages" else kind
    if kind == "preference with its prompt in both" and isinstance(told, str) and split_transcript(told):
        return "preference of HH transcripts"
    return kind


def sft_row(row: Row) -> Row:
    """A demonstration -> {prompt, response, finished, ids?}: `answer_of`, but of TRL's unpaired preferences only those
    whose `label` is true.

    Raises:
        DroppedRow, UserError: as `answer_of`, and a false label.
    """
    answer = answer_of(row)
    if layout_of(row) == "unpaired preference" and not flag_of(row, "label"):
        raise empty_row(row, '"label" is false, an answer not to learn', "labelled as bad")
    return answer


def answer_of(row: Row) -> Row:
    """The prompt and the one answer of a row -> {prompt, response, finished, ids?}.

    {prompt, response} (or TRL's `completion`), or {messages} that end in an assistant turn; a row with all of these is
    the former. With `finished` false the response was cut off, so no stop id belongs to it. `ids` are the row's
    `response_ids`, as sampled.

    Raises:
        DroppedRow: null response, or an empty turn.
        UserError: a missing field, a wrong type, or a row that is made for something else.
    """
    if layout_of(row) in (*RANKINGS, *PREFERENCES):
        raise bad_row(
            row,
            f'a {kind_of(row)} row has no one answer to learn; map one with data.fields, as "response={{chosen}}"',
        )
    if {"response", "completion"} <= set(row) and row["response"] != row["completion"]:
        raise bad_row(row, '"response" and "completion" differ; map the one to learn with data.fields')
    if "messages" in row and not {"response", "completion"} & set(row):
        turns = _messages(row, "messages", row["messages"])
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise bad_row(row, '"messages" must hold a prompt and end in an assistant turn; add the turn to learn')
        prompt, response = prompt_of(row, turns[:-1]), cast(str | Messages, turns[-1:])
    else:
        name = "completion" if "completion" in row and "response" not in row else "response"
        require(row, ("prompt", name), "an sft row is {prompt, response}, {messages} or {text}")
        prompt = prompt_of(row, row["prompt"])
        response = response_of(row, name, row[name], prompt)
    ids = ids_of(row, "response_ids")
    sampled = {} if ids is None else {"ids": ids}
    return {"prompt": prompt, "response": response, "finished": finished_of(row), **sampled, "_where": where_of(row)}


def preference_row(row: Row) -> Row:
    """{prompt, chosen, rejected, votes?, margin?, finished?, rater?} -> with label, margin, finished and ids.

    `votes` = [for chosen, for rejected, ties] gives label = (chosen + ties / 2) / total, the share of raters that
    prefer `chosen`; without votes it is 1. `finished` = [of chosen, of rejected] says which were not cut off; `ids` =
    [chosen_ids, rejected_ids], those that a model sampled, or None.

    Without a prompt, `chosen` and `rejected` are whole conversations (transcripts "\\n\\nHuman: ...\\n\\nAssistant:
    ..." as in Anthropic's HH files, or message lists) that differ in their last turn only, or other texts, whose
    common beginning up to a white space is the prompt.

    Raises:
        DroppedRow: null response, empty turn, the two prompts differ, or chosen equals rejected.
        UserError: a missing field or a wrong type.
    """
    expected = "a preference row is {prompt, chosen, rejected, votes?} or two transcripts {chosen, rejected}"
    require(row, ("chosen", "rejected"), expected)
    if "prompt" in row:
        prompt = prompt_of(row, row["prompt"])
        chosen, rejected = (response_of(row, name, row[name], prompt) for name in ("chosen", "rejected"))
    elif all(isinstance(row[name], str) and not split_transcript(row[name]) for name in ("chosen", "rejected")):
        prompt, chosen, rejected = _common_prompt(row)
    else:
        prompt, chosen = _conversation(row, "chosen")
        other, rejected = _conversation(row, "rejected")
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
        "margin": _margin(row),
        "finished": finished,
        "ids": [ids_of(row, "chosen_ids"), ids_of(row, "rejected_ids")],
        "_where": where_of(row),
    }


def prompt_row(row: Row) -> Row:
    """{prompt, ...}: the prompt validated, every other column kept as it is.

    Raises:
        DroppedRow: an empty prompt or turn.
        UserError: a missing field or a wrong type.
    """
    require(row, ("prompt",), "a prompts row is {prompt, ...}")
    columns = ("documents", *(GIVEN if isinstance(row["prompt"], str) else ()))  # these are for reward functions
    told = {name: value for name, value in row.items() if name not in columns}
    return {**row, "prompt": prompt_of(told, row["prompt"]), "_where": where_of(row)}


def text_row(row: Row) -> Row:
    """{text}: one document.

    Raises:
        DroppedRow: an empty document.
        UserError: a missing field or a wrong type.
    """
    require(row, ("text",), "a text row is {text}")
    if {"response", "completion"} & set(row):
        raise bad_row(row, 'an answer, but no "prompt", beside "text"; say what they are with data.fields')
    if not isinstance(row["text"], str):
        raise bad_row(row, f'"text" is {type_of(row["text"])}; give a string')
    if not row["text"].strip():
        raise empty_row(row, '"text" is empty', "with an empty text")
    return {"text": row["text"], "_where": where_of(row)}


def transcript(messages: Messages) -> str:
    """Messages as "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's HH form), without an open last turn."""
    said = turns_of(messages)
    return "".join(f"\n\n{SPEAKERS.get(turn['role'], turn['role'].title())}: {turn['content']}" for turn in said)


def turns_of(messages: Messages) -> Messages:
    """What was said: messages without what a chat template is given beside them."""
    return [turn for turn in messages if turn["role"] != TEMPLATE]


def split_transcript(text: str) -> Messages:
    """The messages of a transcript, stripped of white space; [] if `text` does not start as one.

    "\\n\\nHuman: hi\\n\\nAssistant: yes" -> [{user, "hi"}, {assistant, "yes"}].
    """
    before, *rest = TURN.split("\n\n" + text.lstrip("\n"))
    if before.strip():
        return []
    return [{"role": ROLES[name], "content": said.strip()} for name, said in zip(rest[::2], rest[1::2], strict=True)]


def prompt_of(row: Row, value: Any) -> str | Messages:
    """A prompt: a non-empty str as it is, or messages that leave the next turn to the assistant.

    Before messages stands a turn of role "template" with the row's `tools`, `documents` and what is in
    `chat_template_kwargs`, if it has some: what the chat template is given beside them.
    """
    given = _given(row)
    if isinstance(value, str):
        if given:
            raise bad_row(row, f'"{next(iter(set(GIVEN) & set(row)))}" needs a prompt of messages; leave it out')
        if not value:
            raise empty_row(row, '"prompt" is empty', "with an empty prompt")
        return value
    messages = _messages(row, "prompt", value)
    if messages[-1]["role"] == "assistant":
        raise bad_row(row, '"prompt" ends in an assistant turn; move that turn to the response')
    if given and messages[0]["role"] == TEMPLATE:  # a row that was read before
        return [{**messages[0], **given[0]}, *messages[1:]]
    return given + messages


def response_of(row: Row, name: str, value: Any, prompt: str | Messages) -> str | Messages:
    """A response in the form of its prompt: a str after a str, one assistant message after messages."""
    if value is None:
        raise empty_row(row, f'"{name}" is null', "with a null response")
    turn: Message = {"role": "assistant", "content": value}
    if not isinstance(value, str):
        turns = _messages(row, name, value)
        if len(turns) > 1 or turns[0]["role"] != "assistant":
            message = f'"{name}" must be one assistant message; put earlier turns into "prompt"'
            raise bad_row(row, message)
        [turn] = turns
        if isinstance(prompt, str) and (said := SAID & set(turn)):
            raise bad_row(row, f'"{name}" has "{min(said)}", which needs a prompt of messages; leave it out')
        # After a transcript's "Assistant:" the answer starts with a space, as in the transcript itself.
        if isinstance(prompt, str) and prompt.endswith("Assistant:"):
            turn = {**turn, "content": " " + turn["content"]}
    if not turn["content"].strip() and not SAID & set(turn):
        raise empty_row(row, f'"{name}" is empty', "with an empty turn")
    return turn["content"] if isinstance(prompt, str) else [turn]


def _conversation(row: Row, name: str) -> tuple[Messages, Messages]:
    """(prompt, [last turn]) of a whole conversation: a transcript or a message list."""
    value = row[name]
    if value is None:
        raise empty_row(row, f'"{name}" is null', "with a null response")
    turns = split_transcript(value) if isinstance(value, str) else value
    if isinstance(value, str) and not turns:
        raise bad_row(row, f'no "prompt", and "{name}" is not a "\\n\\nHuman: ..." transcript; add the field "prompt"')
    turns = _messages(row, name, turns)
    if turns[-1]["role"] != "assistant":
        raise empty_row(row, f'"{name}" does not end in an assistant turn', "that end in no assistant turn")
    if len(turns) < 2:
        raise bad_row(row, f'no "prompt", and "{name}" holds the answer only; add the field "prompt"')
    if turns[-2]["role"] == "assistant":
        raise empty_row(row, f'"{name}" ends in two assistant turns', "that end in two assistant turns")
    return _given(row) + turns[:-1], turns[-1:]


def _messages(row: Row, name: str, value: Any) -> Messages:
    """A validated copy of a message list; fields that are null or empty are left out, parts of text joined."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise bad_row(row, f'"{name}" is {type_of(value)}; give a string or a list of {{role, content}} messages')
    given = [{"content": "", **turn} for turn in value[:1] if turn.get("role") == TEMPLATE]
    if not value[len(given) :]:
        raise empty_row(row, f'"{name}" has no messages', f"with an empty {'prompt' if name == 'prompt' else 'turn'}")
    turns = [_turn(row, f'"{name}" message {number}', turn) for number, turn in enumerate(value[len(given) :])]
    return given + turns


def _turn(row: Row, what: str, turn: Row) -> Message:
    """A message {role, content, ...}; a `weight` of 1 says nothing, one of 0 stays."""
    role, content = turn.get("role"), turn.get("content")
    known = (*SPEAKERS, *OTHER_ROLES)
    if role not in known:
        raise bad_row(row, f"{what} has role {shown(role)}; use one of {', '.join(known)}")
    more = {k: v for k, v in turn.items() if k not in ("role", "content") and v is not None and v not in ("", [], {})}
    weight = more.pop("weight", 1)
    if weight not in (0, 1):
        raise bad_row(row, f"{what} has weight {shown(weight)}; give 1, or 0 for an answer not to learn")
    if isinstance(content, list):
        content = "".join(_part_text(row, what, part) for part in content)
    says = bool(SAID & set(more)) or role == "tool"
    if content is None and role == "assistant" and not says:
        raise empty_row(row, f"{what} is null", "with a null response")
    content = "" if content is None and says else content
    if not isinstance(content, str):
        raise bad_row(row, f"{what} has content {type_of(content)}; give a string")
    if not content.strip() and not says:
        raise empty_row(row, f"{what} is empty", "with an empty turn")
    return {"role": role, "content": content, **more, **({} if weight else {"weight": 0})}


def _part_text(row: Row, what: str, part: Any) -> str:
    if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
        kind = part.get("type") if isinstance(part, dict) else type_of(part)
        raise bad_row(
            row, f"{what} has a content part of type {shown(kind)}; only parts {{type: text, text}} are read"
        )
    return part["text"]


def _given(row: Row, names: tuple[str, ...] = ("tools", "documents")) -> Messages:
    """What a row gives to the chat template beside its messages, as a turn of its own before them; [] if nothing."""
    found: Row = {}
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value:
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if value and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
            raise bad_row(row, f'"{name}" is {type_of(value)}; give a list of objects')
        found |= {name: value} if value else {}
    more = row.get("chat_template_kwargs") or {}
    if not isinstance(more, dict) or NOT_GIVEN & set(more):
        raise bad_row(row, f'"chat_template_kwargs" is {shown(more)}; give an object of what the template reads')
    return [{"role": TEMPLATE, "content": "", **found, **more}] if found or more else []


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


def _margin(row: Row) -> float:
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if not is_number(margin):
        raise bad_row(row, f'"margin" is {margin!r}; give a finite number')
    return float32_of(row, "margin", margin)


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
        raise bad_row(row, f'"{name}" is {type_of(ids)}; give a list of token ids, or leave it out')
    return ids


def float32_of(row: Row, name: str, value: Any) -> float:
    """A number of a row that is computed with in float32.

    Raises:
        UserError: it is infinite there.
    """
    try:
        fits = abs(number_of(value)) <= LARGEST
    except OverflowError:
        fits = False
    if not fits:
        raise bad_row(row, f'"{name}" is over {LARGEST:.2g}, the largest number of float32; scale it')
    return float(value)


def text_of(response: str | Messages) -> str:
    return response if isinstance(response, str) else response[-1]["content"]


def written(response: str | Messages) -> str | Messages:
    """A response as a row holds it: its text, or the message where that says more, as tool calls do."""
    plain = isinstance(response, str) or set(response[-1]) == {"role", "content"}
    return text_of(response) if plain else response


def key_of(response: str | Messages) -> str:
    """A text that is equal for equal responses: theirs, where they are nothing else."""
    found = written(response)
    return found if isinstance(found, str) else json.dumps(found, sort_keys=True, default=repr)


def require(row: Row, names: tuple[str, ...], expected: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        found = ", ".join(name for name in row if name != "_where") or "nothing"
        raise bad_row(row, f'no field "{missing[0]}" (found: {found}); {expected}')


def type_of(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def where_of(row: Row) -> str:
    return row.get("_where", "a row")


def bad_row(row: Row, message: str) -> UserError:
    return UserError(f"{where_of(row)}: {message}")


def empty_row(row: Row, message: str, reason: str) -> DroppedRow:
    return DroppedRow(f"{where_of(row)}: {message}; fix or remove the row", reason)
