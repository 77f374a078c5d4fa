"""Prompts and responses as text, as messages, and as transcripts that are read as messages."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from rlhf_jax.data.rows import Row, bad_row, empty_row, type_of
from rlhf_jax.errors import shown

Message = dict[str, Any]
Messages = list[Message]
Text = str | Messages
"""A prompt or a response: a plain text, or messages."""

SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
ROLES = {speaker: role for role, speaker in SPEAKERS.items()}
OTHER_ROLES = ("developer", "tool")  # which only a chat template can write
TEMPLATE = "template"  # role of a first turn with what a chat template is given beside the messages, such as tools
GIVEN = ("tools", "documents", "chat_template_kwargs")
NOT_GIVEN = {"role", "content", "messages", "weight", "conversations", "chat_template", "add_generation_prompt"}
NOT_GIVEN |= {"continue_final_message", "return_assistant_tokens_mask"}  # what is decided for every rendering
SAID = {"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "audio", "images"}
"""Fields of a message that say something: what does not write them would train something else."""
TURN = re.compile(r"\n\n(System|Human|Assistant):")


def transcript(messages: Messages) -> str:
    """Messages as "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's HH form), without an open last turn."""
    turns = in_words(messages)
    return "".join(f"\n\n{SPEAKERS.get(turn['role'], turn['role'].title())}: {turn['content']}" for turn in turns)


def in_words(messages: Messages) -> Messages:
    """Messages of role and content alone, for who reads them without a chat template: what else they say, such as
    calls, and the tools and documents that they are given, stands there as JSON."""
    turns: Messages = []
    for turn in messages:
        if turn["role"] == TEMPLATE:
            turns += [{"role": name, "content": _json(turn[name])} for name in ("tools", "documents") if name in turn]
            continue
        more = {name: turn[name] for name in turn if name in SAID}
        said = [turn["content"], *([_json(more)] if more else [])]
        turns.append({"role": turn["role"], "content": "\n".join(filter(None, said))})
    return turns


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
    return [{"role": ROLES[name], "content": text.strip()} for name, text in zip(rest[::2], rest[1::2], strict=True)]


def prompt_of(row: Row, value: object) -> Text:
    """A prompt: a non-empty str as it is, or messages that leave the next turn to the assistant.

    Before messages stands a turn of role "template" with the row's `tools`, `documents` and what is in
    `chat_template_kwargs`, if it has some: what the chat template is given beside them.
    """
    given = given_of(row)
    if value is None:
        raise empty_row(row, '"prompt" is null', "with an empty prompt")
    if isinstance(value, str):
        if given:
            raise bad_row(row, f'"{next(iter(set(GIVEN) & set(row)))}" needs a prompt of messages; leave it out')
        if not value:
            raise empty_row(row, '"prompt" is empty', "with an empty prompt")
        return value
    messages = messages_of(row, "prompt", value)
    if messages[-1]["role"] == "assistant":
        raise bad_row(row, '"prompt" ends in an assistant turn; move that turn to the response')
    if given and messages[0]["role"] == TEMPLATE:  # a row that was read before
        return [{**messages[0], **given[0]}, *messages[1:]]
    return given + messages


def response_of(row: Row, name: str, value: object, prompt: Text) -> Text:
    """A response in the form of its prompt: a str after a str, one assistant message after messages."""
    if value is None:
        raise empty_row(row, f'"{name}" is null', "with a null response")
    turn: Message = {"role": "assistant", "content": value}
    if not isinstance(value, str):
        turns = messages_of(row, name, value)
        if len(turns) > 1 or turns[0]["role"] != "assistant":
            raise bad_row(row, f'"{name}" must be one assistant message; put earlier turns into "prompt"')
        [turn] = turns
        if isinstance(prompt, str) and (unwritten := SAID & set(turn)):
            raise bad_row(row, f'"{name}" has "{min(unwritten)}", which needs a prompt of messages; leave it out')
        # After a transcript's "Assistant:" the answer starts with a space, as in the transcript itself.
        if isinstance(prompt, str) and prompt.endswith("Assistant:"):
            turn = {**turn, "content": " " + turn["content"]}
    if not turn["content"].strip() and not SAID & set(turn):
        raise empty_row(row, f'"{name}" is empty', "with an empty turn")
    return turn["content"] if isinstance(prompt, str) else [turn]


def conversation_of(row: Row, name: str) -> tuple[Messages, Messages]:
    """(prompt, [last turn]) of a whole conversation: a transcript or a message list."""
    if (value := row[name]) is None:
        raise empty_row(row, f'"{name}" is null', "with a null response")
    turns = split_transcript(value) if isinstance(value, str) else value
    if isinstance(value, str) and not turns:
        raise bad_row(row, f'no "prompt", and "{name}" is not a "\\n\\nHuman: ..." transcript; add the field "prompt"')
    turns = messages_of(row, name, turns)
    if turns[-1]["role"] != "assistant":
        raise empty_row(row, f'"{name}" does not end in an assistant turn', "that end in no assistant turn")
    if len(turns) < 2:
        raise bad_row(row, f'no "prompt", and "{name}" holds the answer only; add the field "prompt"')
    if turns[-2]["role"] == "assistant":
        raise empty_row(row, f'"{name}" ends in two assistant turns', "that end in two assistant turns")
    return given_of(row) + turns[:-1], turns[-1:]


def messages_of(row: Row, name: str, value: object) -> Messages:
    """A validated copy of a message list; fields that are null or empty are left out, parts of text joined."""
    if value is None:
        raise empty_row(row, f'"{name}" is null', "with an empty turn")
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
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = shown(part.get("type") if isinstance(part, dict) else type_of(part))
                what = f"{what} has a content part of type {kind}"
                raise bad_row(row, f"{what}; only parts {{type: text, text}} are read")
        content = "".join(part["text"] for part in content)
    says = bool(SAID & set(more)) or role == "tool"
    if content is None and role == "assistant" and not says:
        raise empty_row(row, f"{what} is null", "with a null response")
    content = "" if content is None and says else content
    if not isinstance(content, str):
        raise bad_row(row, f"{what} has content {type_of(content)}; give a string")
    if not content.strip() and not says:
        raise empty_row(row, f"{what} is empty", "with an empty turn")
    return {"role": role, "content": content, **more, **({} if weight else {"weight": 0})}


def given_of(row: Row) -> Messages:
    """What a row gives to the chat template beside its messages, as a turn of its own before them; [] if nothing."""
    given: Row = {}
    for name in ("tools", "documents"):
        value = row.get(name)
        if isinstance(value, str) and value:
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if value and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise bad_row(row, f'"{name}" is {type_of(value)}; give a list of objects')
        given |= {name: value} if value else {}
    more = row.get("chat_template_kwargs") or {}
    if not isinstance(more, dict) or NOT_GIVEN & set(more):
        raise bad_row(row, f'"chat_template_kwargs" is {shown(more)}; give an object of what the template reads')
    return [{"role": TEMPLATE, "content": "", **given, **more}] if given or more else []


def text_of(response: Text) -> str:
    return response if isinstance(response, str) else response[-1]["content"]


def written(response: Text) -> Text:
    """A response as a row holds it: its text, or the message where that says more, as tool calls do."""
    plain = isinstance(response, str) or set(response[-1]) == {"role", "content"}
    return text_of(response) if plain else response


def key_of(response: Text) -> str:
    """A text that is equal for equal responses: theirs, where they are nothing else."""
    return as_key(written(response))


def as_key(value: object) -> str:
    """A text that is equal for equal values: a text itself, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=repr)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)
