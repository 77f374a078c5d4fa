"""Messages as text, by a chat template or as a transcript: what a model is shown, and what it is to answer.

Prompt and answer side by side are what the template writes for the whole conversation, wherever the prompt is a
beginning of that; where it is not, the prompt is the one that is sampled from, and the answer follows it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise, takewhile
from typing import Any

from rlhf_jax.data.messages import SAID, SPEAKERS, TEMPLATE, Message, Messages, transcript, turns_of
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import clock
from rlhf_jax.hosts.attempts import limited

MARKER, QUESTION = "0x5EED", "0x7EA"  # what is said where a chat template is probed; it leaves such text alone
ASKED: Messages = [{"role": "user", "content": QUESTION}]
OPENS = re.compile(r"(?P<tag><[\w:.-]+>|\[[\w:.-]+\]|◁[\w:.-]+▷)(?P<space>\s*)$")  # a thought, at a prompt's end
LONGEST_TAG = 64
LONGEST_RENDERING = 5.0
"""Seconds that a chat template may compute for one conversation."""
REASONING = {"reasoning_content", "reasoning", "thinking"}  # names of one thing, which transformers hands over as all
FOLLOWS = "answers to a prompt that the chat template writes otherwise once they are there"
MERGED = "answers whose start and the prompt's end would be one token, had they been one text"
CHANGED = "turns whose text the chat template changes or leaves out"


class Endless(UserError):
    """A chat template that does not end."""


class Transcript:
    """Messages without a chat template: "\\n\\nHuman: ...\\n\\nAssistant:", and an answer after a space."""

    closings: tuple[int, ...] = ()

    def prompt(self, messages: Messages) -> str:
        """The conversation, open for an answer."""
        return transcript(messages) + "\n\nAssistant:"

    def answer(self, messages: Messages, prompt: str, turn: Message, remarks: Counter[str], *, closed: bool) -> str:
        """What follows `prompt`, that of the messages; nothing closes it."""
        self.check([turn], prompt, remarks)
        return " " + turn["content"]

    def check(self, messages: Messages, prompt: str, remarks: Counter[str]) -> None:
        """Count fields that are not in `prompt`; raise a UserError at what only a chat template could say."""
        for turn in messages:
            if turn["role"] not in SPEAKERS:
                what = '"tools" and the like' if turn["role"] == TEMPLATE else f"messages of role {turn['role']}"
                raise UserError(f"{what} need a chat template, which this tokenizer does not have; leave them out")
            for name in _extras(turn):
                if name in SAID:
                    raise UserError(
                        f'"{name}" needs a chat template, which this tokenizer does not have; leave it out'
                    )
                remarks[_unseen(name)] += 1

    def spans(self, messages: Messages) -> list[tuple[int, int]]:
        """(start, end) of earlier answers in `prompt(messages)`, in characters."""
        return _spans(self, messages)


class ChatTemplate:
    """A tokenizer's chat template, and how it sets off an answer.

    Attributes:
        closings: ids of special tokens with which it closes every answer, in their order; usually one or none.
    """

    def __init__(self, hf: Any):
        self.hf = hf
        self.closings = ()
        self._silent = False
        self._header = self._lead = self._after = self._closing = ""
        try:
            hf.get_chat_template()
        except ValueError as error:
            raise UserError("the tokenizer has several chat templates and none named default; name one so") from error
        try:
            prompt, bare = (self._text(ASKED, answer_next=flag) for flag in (True, False))
            before, found, self._after = self._text([*ASKED, _answer(MARKER)]).partition(MARKER)
        except Endless:
            raise
        except UserError:
            return  # a template for other roles; the first real prompt reports it with its row
        self._silent = not found
        if self._silent:
            return
        if before.startswith(prompt):
            self._lead = before.removeprefix(prompt)
            if prompt == bare and self._lead.strip():  # it knows no add_generation_prompt
                self._header = self._lead.rstrip(" ")
                self._lead = self._lead.removeprefix(self._header)
        else:  # it writes the question otherwise once it is answered, but maybe the same after it
            ends = [text.rpartition(QUESTION)[2] for text in (prompt, before)]
            self._lead = ends[1].removeprefix(ends[0]) if ends[1].startswith(ends[0]) else ""
        self._find_closing()

    def _find_closing(self) -> None:
        """What closes every answer: what follows one that is the last, and one that is not."""
        always = self._after
        try:
            text = self._text([*ASKED, _answer(MARKER), *ASKED])
            _, found, later = text.partition(MARKER)
        except UserError:
            found = later = ""
        ids, others = (self.hf(one, add_special_tokens=False)["input_ids"] for one in (self._after, later))
        special = specials(self.hf)
        if found and special & set(shared := _shared(ids, others)):
            ids = shared
        elif found:
            always = _shared(self._after, later)
        places = [place for place, i in enumerate(ids) if i in special]
        run = [place for n, place in enumerate(places) if place == places[0] + n]
        self.closings = tuple(ids[place] for place in run)
        self._closing = always.rstrip()

    def close_with(self, stop: int | None) -> None:
        """Have answers end in this special token, one of those after them; None: in none, and their text alone."""
        if stop is not None:
            name = self.hf.convert_ids_to_tokens(stop)
            head, found, _ = self._after.partition(name)
            self._closing = head + name if found else name
        elif self.closings:
            self._closing = ""

    def prompt(self, messages: Messages) -> str:
        """The conversation, open for an answer: with the header that the template writes before one.

        Raises:
            UserError: the template refuses the messages.
        """
        if not turns_of(messages):  # of a conversation that starts with an answer
            return self._text([*messages, _answer(MARKER)]).partition(MARKER)[0].removesuffix(self._lead)
        text = self._text(messages, answer_next=True)
        return text if text.endswith(self._header) else text + self._header

    def answer(self, messages: Messages, prompt: str, turn: Message, remarks: Counter[str], *, closed: bool) -> str:
        """What follows `prompt`, that of the messages: the answer as the template writes it, and what closes it.

        Raises:
            UserError: the template refuses the messages or has no place for the answer after the prompt, or the
                answer has something to say that the template does not write.
        """
        if self._silent:
            raise UserError(
                "the chat template leaves out answers whose content is a text, or rewrites all of it; use another"
            )
        whole = self._text([*messages, turn])
        if whole.startswith(prompt):
            rest = whole[len(prompt) :]
        else:
            remarks[FOLLOWS] += 1
            rest = self._following(prompt, messages, turn, whole)
        self._check_fields([*messages, turn], [len(messages)], lambda bare: self._text(bare) != whole, remarks)
        if rest.endswith(self._after):
            rest = rest.removesuffix(self._after)
        elif self._closing in rest:
            rest = rest[: rest.rindex(self._closing)]
        remarks[CHANGED] += _squeezed(turn["content"]) not in _squeezed(prompt[-LONGEST_TAG:] + rest)
        return rest + self._closing * closed

    def _following(self, prompt: str, messages: Messages, turn: Message, whole: str) -> str:
        """The answer to a prompt that is no beginning of the whole conversation.

        Where the prompt opens a thought (as "<think>\\n") and the conversation goes on in it, the answer does so too.
        Where the conversation has no thought there, an answer that has one goes on in it, and one that has none closes
        it at once. Else the answer is what the template writes in the place of its content.
        """
        content, opens = turn["content"], OPENS.search(prompt)
        if opens and whole.startswith(prompt[: opens.end("tag")]):
            return whole[opens.end("tag") :].lstrip()
        if opens and whole.startswith(prompt[: opens.start()]):
            written = whole[opens.start() :].removesuffix(self._after)
            content = content if content.endswith(written) else content.rstrip()  # a template that trims
            if content.lstrip().startswith(opens["tag"]):
                return content.lstrip().removeprefix(opens["tag"]).removeprefix(opens["space"]) + self._after
            close = f"{opens['tag'][0]}/{opens['tag'][1:]}"
            return content + self._after if close in content else f"\n{close}\n\n{content}{self._after}"
        before, found, after = self._text([*messages, {**turn, "content": MARKER}]).rpartition(MARKER)
        inner = whole.removeprefix(before).removesuffix(after)
        if not found or before + inner + after != whole:
            raise UserError(
                "the chat template writes the prompt otherwise once it is answered, and nothing shows where the "
                "answer begins; use a template whose generation prompt is a beginning of the whole conversation"
            )
        return self._lead + inner + after

    def check(self, messages: Messages, prompt: str, remarks: Counter[str]) -> None:
        """Count what of messages is not in `prompt`, their text.

        Raises:
            UserError: that is a field that says something, such as tools.
        """
        given, turns = _split(messages)
        words = _words(self.hf.get_chat_template(tools=given.get("tools"))) if given else set()
        if unread := [name for name in given if name not in words]:
            raise UserError(f'the chat template does not read "{unread[0]}", which the row has; leave it out')
        for name in {"tools", "documents"} & set(given) if given and self.prompt(turns) == prompt else ():
            remarks[_unseen(name)] += 1
        places = list(range(len(messages)))
        self._check_fields(messages, places, lambda bare: self.prompt(bare) != prompt, remarks)
        shown = _squeezed(prompt)
        remarks[CHANGED] += sum(_squeezed(turn["content"]) not in shown for turn in messages)

    def _check_fields(
        self, messages: Messages, places: list[int], changes: Callable[[Messages], bool], remarks: Counter[str]
    ) -> None:
        """The fields of the messages at these places: whether the text `changes` without them."""
        for name in sorted({name for i in places for name in _extras(messages[i])}):
            bare = [
                {k: v for k, v in turn.items() if k != name} if i in places else turn
                for i, turn in enumerate(messages)
            ]
            try:
                written = changes(bare)
            except UserError:
                written = True
            names = REASONING if name in REASONING else {name}
            words = _words(self.hf.get_chat_template(tools=_split(messages)[0].get("tools")))
            if not written and name in SAID and not names & words:
                raise UserError(f'the chat template does not write "{name}", which a message has; leave it out')
            if not written:
                remarks[_unseen(name)] += 1

    def spans(self, messages: Messages) -> list[tuple[int, int]]:
        """(start, end) of earlier answers in `prompt(messages)`, in characters.

        Exact where the template marks answers with {% generation %}; else what it writes of each by itself.

        Raises:
            UserError: it changes earlier turns when later ones follow, or its marks are on none of these.
        """
        given, _ = _split(messages)
        if not _marks_answers(self.hf.get_chat_template(tools=given.get("tools"))):
            return _spans(self, messages)
        found = self.render(messages, answer_next=True)[1]
        if not found:
            raise UserError("the chat template marks none of these answers with {% generation %}; mend the template")
        weights = [turn.get("weight", 1) for turn in messages if turn["role"] == "assistant"]
        if set(weights) == {1}:
            return found
        if len(found) != len(weights):
            raise UserError('the chat template marks other answers than those that have a "weight"; leave it out')
        return [span for span, weight in zip(found, weights, strict=True) if weight]

    def render(self, messages: Messages, *, answer_next: bool) -> tuple[str, list[tuple[int, int]]]:
        """(text, spans that {% generation %} marks): the one place where a chat template runs.

        Raises:
            UserError: the template refuses the messages.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        given, turns = _split(messages)
        source = self.hf.get_chat_template(tools=given.get("tools"))
        marks = _marks_answers(source)

        def run() -> Any:
            _compile_jinja_template(source).globals["strftime_now"] = clock.strftime_now  # of the cached template
            return render_jinja_template(
                conversations=[turns],
                chat_template=source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=answer_next,
                **{**self.hf.special_tokens_map, **given},
            )

        try:
            rendered = limited(run, LONGEST_RENDERING)
        except TimeoutError:
            raise Endless(
                f"the chat template has not ended after {LONGEST_RENDERING:g} s of computing; use another"
            ) from None
        except Exception as error:  # templates raise their own errors, for instance on two user turns in a row
            message = f"the chat template refuses these messages ({error}); change them or the template"
            raise UserError(message) from error
        texts, spans = rendered
        return texts[0], spans[0] if marks else []

    def _text(self, messages: Messages, *, answer_next: bool = False) -> str:
        return self.render(messages, answer_next=answer_next)[0]


def specials(hf: Any) -> set[int]:
    """Ids of special tokens, and of others that were added to a vocabulary."""
    return {*hf.added_tokens_decoder, *hf.all_special_ids}


def _spans(chat: Transcript | ChatTemplate, messages: Messages) -> list[tuple[int, int]]:
    text, spans = chat.prompt(messages), []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        start = chat.prompt(messages[:i])
        whole = start + chat.answer(messages[:i], start, turn, Counter(), closed=True)
        if not text.startswith(whole):
            raise UserError(
                "the chat template changes earlier turns when later ones follow, so they cannot be trained on in "
                "one sequence; set sft.loss_on to response, or mark answers with {% generation %}"
            )
        spans += [(len(start), len(whole))] * bool(turn.get("weight", 1))
    return spans


def _shared(a: Any, b: Any) -> Any:
    """What two texts or lists begin with alike."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return a[: sum(1 for _ in same)]


def _squeezed(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _split(messages: Messages) -> tuple[dict[str, Any], Messages]:
    """(what the template is given beside the messages, such as tools; the messages as it reads them)."""
    given: dict[str, Any] = {}
    for turn in messages:
        given |= {k: v for k, v in turn.items() if k not in ("role", "content")} if turn["role"] == TEMPLATE else {}
    turns = [turn for turn in messages if turn["role"] != TEMPLATE]
    return given, [{k: v for k, v in turn.items() if k != "weight"} for turn in turns]


def _extras(turn: Message) -> set[str]:
    """The fields of a message that a template may or may not write."""
    return set(turn) - {"role", "content", "weight"} if turn["role"] != TEMPLATE else set()


def _unseen(name: str) -> str:
    return f'prompts or answers whose "{name}" is not written'


def _lexed(source: str) -> list[tuple[str, str]]:
    from jinja2 import Environment

    return [(kind, value) for _, kind, value in Environment().lex(source) if kind != "whitespace"]


@cache
def _words(source: str) -> set[str]:
    """The names and strings in a template's code."""
    return {value.strip("'\"") for kind, value in _lexed(source) if kind in ("name", "string")}


@cache
def _marks_answers(source: str) -> bool:
    """Whether a template has the tag {% generation %}."""
    tokens = _lexed(source)
    return any(a[0] == "block_begin" and b == ("name", "generation") for a, b in pairwise(tokens))
