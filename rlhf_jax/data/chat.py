"""Messages as text, by a chat template or as a transcript: what a model is shown, and what it is to answer.

Prompt and answer side by side are what the template writes for the whole conversation, wherever the prompt is a
beginning of that; where it is not, the prompt is the one that is sampled from, and the answer follows it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from rlhf_jax.data.backend import token_text
from rlhf_jax.data.messages import SAID, SPEAKERS, TEMPLATE, TURN, Message, Messages, Text, transcript, turns_of
from rlhf_jax.data.rendering import Endless, Span, Template, split_given
from rlhf_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER, QUESTION = "0x5EED", "0x7EA"  # what is said where a chat template is probed; it leaves such text alone
ASKED: Messages = [{"role": "user", "content": QUESTION}]
OPENS = re.compile(r"(?P<tag><[\w:.-]+>|\[[\w:.-]+\]|◁[\w:.-]+▷)(?P<space>\s*)$")  # a thought, at a prompt's end
LONGEST_TAG = 64
REASONING = {"reasoning_content", "reasoning", "thinking"}  # names of one thing, which transformers hands over as all
FOLLOWS = "answers to a prompt that the chat template writes otherwise once they are there"
MERGED = "answers whose start and the prompt's end would be one token, had they been one text"
CHANGED = "turns whose text the chat template changes or leaves out"
TURNED = "turns in which the beginning of another is written out, and read as one"


class Transcript:
    """Messages without a chat template: "\\n\\nHuman: ...\\n\\nAssistant:", and an answer after a space."""

    closings: tuple[int, ...] = ()
    closed_earlier = ""

    def prompt(self, messages: Messages) -> str:
        return transcript(messages) + "\n\nAssistant:"

    def answer(self, messages: Messages, prompt: str, turn: Message, remarks: Counter[str], *, closed: bool) -> str:
        self.check([turn], prompt, remarks)
        return " " + turn["content"]

    def check(self, messages: Messages, prompt: str, remarks: Counter[str]) -> None:
        """Count fields that are not in `prompt`; raise a UserError at what only a chat template could say."""
        for turn in messages:
            if turn["role"] not in SPEAKERS:
                what = '"tools" and the like' if turn["role"] == TEMPLATE else f"messages of role {turn['role']}"
                raise UserError(f"{what} need a chat template, which this tokenizer does not have; leave them out")
            remarks[TURNED] += bool(TURN.search(turn["content"]))
            for name in _extras(turn):
                if name in SAID:
                    message = f'"{name}" needs a chat template, which this tokenizer does not have; leave it out'
                    raise UserError(message)
                remarks[_unseen(name)] += 1

    def spans(self, messages: Messages) -> list[Span]:
        return _spans_by_difference(self, messages)


def in_transcript(prompt: Text) -> str:
    """A prompt as it is shown where no tokenizer says how messages are written."""
    return prompt if isinstance(prompt, str) else Transcript().prompt(prompt)


class ChatTemplate:
    """A tokenizer's chat template, and how it sets off an answer.

    What it writes around answers is found by probing it with a question and a marker for the answer:
    question [header] [lead] MARKER [closing ...], where the closing begins what stands after the last answer. Messages
    that the template refuses are a UserError.

    Attributes:
        closings: ids of special tokens with which it closes every answer, in their order; usually one or none.
    """

    def __init__(self, hf: PreTrainedTokenizerBase):
        """Probe the template; one that does not end is an error."""
        self.hf, self._template = hf, Template(hf)
        self.closings: tuple[int, ...] = ()
        self._silent = False  # it leaves out, or rewrites, an answer that is a text
        self._header = ""  # what it writes before an answer but not at the end of a prompt
        self._lead = ""  # what it writes between a prompt and the answer's content
        self._after = ""  # what it writes after the content of a last answer
        self._closing = ""  # what of that closes an answer
        self._earlier: str | None = None  # what closes one that is not the last, if that is something else
        try:
            prompt, bare = (self._template.text(ASKED, answer_next=flag) for flag in (True, False))
            before, marker, self._after = self._template.text([*ASKED, _answer(MARKER)]).partition(MARKER)
        except Endless:
            raise
        except UserError:
            return  # a template for other roles; the first real prompt reports it with its row
        self._silent = not marker
        if self._silent:
            return
        if before.startswith(prompt):
            self._lead = before.removeprefix(prompt)
            if prompt == bare and self._lead.strip():  # it knows no add_generation_prompt
                self._header = self._lead.rstrip(" ")
                self._lead = self._lead.removeprefix(self._header)
        else:  # it writes the question otherwise once it is answered, but maybe the same after it
            unanswered, answered = (text.rpartition(QUESTION)[2] for text in (prompt, before))
            self._lead = answered.removeprefix(unanswered) if answered.startswith(unanswered) else ""
        self._find_closing(bare)

    def _find_closing(self, bare: str) -> None:
        """What closes every answer: what follows both one that is the last and one that is not."""
        closing = self._after
        try:
            _, marker, later = self._template.text([*ASKED, _answer(MARKER), *ASKED]).partition(MARKER)
        except UserError:
            marker = later = ""
        ids, later_ids = (self.hf(text, add_special_tokens=False)["input_ids"] for text in (self._after, later))
        special = specials(self.hf)
        if marker and special & set(shared := ids[: _num_shared(ids, later_ids)]):
            ids = shared
        elif marker:
            closing = self._after[: self._num_closing(bare, later)]
            self._earlier = closing.rstrip()
        places = [place for place, i in enumerate(ids) if i in special]
        first_run = [place for n, place in enumerate(places) if place == places[0] + n]
        self.closings = tuple(ids[place] for place in first_run)
        self._closing = closing.rstrip()

    def _num_closing(self, bare: str, later: str) -> int:
        """Characters that follow a last answer and one that is not, up to a special token that one of them lacks.

        Nor do they reach into the header of the turn that comes `later`, which stands in the `bare` question too.
        """
        count, (before, asked) = (
            _num_shared(self._after, later),
            (text.partition(QUESTION)[0] for text in (later, bare)),
        )
        header = len(before) - _num_shared(before[::-1], asked[::-1])
        count = header if 0 < header < count else count
        for text in (self._after, later):
            for name in {token_text(self.hf, i) for i in specials(self.hf)}:
                start = text.find(name)
                count = start if 0 <= start < count < start + len(name) else count
        return count

    @property
    def closed_earlier(self) -> str:
        """What closes an answer that is not the last: no token that ends the whole conversation, as Phi-3's does."""
        return self._closing if self._earlier is None else self._earlier

    def close_with(self, stop: int | None) -> None:
        """Have answers end in this special token, one of those after them; None: in none, and their text alone."""
        if stop is not None:
            name = token_text(self.hf, stop)
            before, there, _ = self._after.partition(name)
            self._closing = before + name if there else name
        elif self.closings:
            self._closing = ""

    def prompt(self, messages: Messages) -> str:
        """The conversation, open for an answer: with the header that the template writes before one."""
        if not turns_of(messages):  # of a conversation that starts with an answer
            before, _, _ = self._template.text([*messages, _answer(MARKER)]).partition(MARKER)
            return before.removesuffix(self._lead)
        text = self._template.text(messages, answer_next=True)
        return text if text.endswith(self._header) else text + self._header

    def answer(self, messages: Messages, prompt: str, turn: Message, remarks: Counter[str], *, closed: bool) -> str:
        """What follows `prompt`, that of the messages: the answer as the template writes it, and what closes it.

        Raises:
            UserError: the template refuses the messages or has no place for the answer after the prompt, or the
                answer has something to say that the template does not write.
        """
        if self._silent:
            what = "leaves out answers whose content is a text, or rewrites all of it"
            raise UserError(f"the chat template {what}; use another")
        whole = self._template.text([*messages, turn])
        if whole.startswith(prompt):
            rest = whole.removeprefix(prompt)
        else:
            remarks[FOLLOWS] += 1
            rest = self._following(prompt, messages, turn, whole)
        last = [len(messages)]
        self._check_fields([*messages, turn], last, lambda bare: self._template.text(bare) != whole, remarks)
        if rest.endswith(self._after):
            rest = rest.removesuffix(self._after)
        elif self._closing in rest:
            rest = rest[: rest.rindex(self._closing)]
        remarks[CHANGED] += squeezed(turn["content"]) not in squeezed(prompt[-LONGEST_TAG:] + rest)
        return rest + self._closing * closed

    def _following(self, prompt: str, messages: Messages, turn: Message, whole: str) -> str:
        """The answer to a prompt that is no beginning of the whole conversation.

        Where the prompt opens a thought (as "<think>\\n"), `_in_thought` may know how the answer goes on in it. Else
        the answer is what the template writes in the place of its content.
        """
        opens = OPENS.search(prompt)
        in_thought = self._in_thought(prompt, opens, turn["content"], whole) if opens else None
        if in_thought is not None:
            return in_thought
        marked = [*messages, {**turn, "content": MARKER}]
        before, marker, after = self._template.text(marked).rpartition(MARKER)
        inner = whole.removeprefix(before).removesuffix(after)
        if not marker or before + inner + after != whole:
            raise UserError(
                "the chat template writes the prompt otherwise once it is answered, and nothing shows where the "
                "answer begins; use a template whose generation prompt is a beginning of the whole conversation"
            )
        return self._lead + inner + after

    def _in_thought(self, prompt: str, opens: re.Match[str], content: str, whole: str) -> str | None:
        """The answer that goes on in the thought that its prompt opens, or None if the prompt differs before it.

        Where the whole conversation goes on in the thought, the answer does so too. Where it has no thought there, an
        answer that has one goes on in it, and one that has none closes it at once.
        """
        if whole.startswith(prompt[: opens.end("tag")]):
            return whole[opens.end("tag") :].lstrip()
        if not whole.startswith(prompt[: opens.start()]):
            return None
        written = whole[opens.start() :].removesuffix(self._after)
        content = content if content.endswith(written) else content.rstrip()  # a template that trims
        if content.lstrip().startswith(opens["tag"]):
            return content.lstrip().removeprefix(opens["tag"]).removeprefix(opens["space"]) + self._after
        close = f"{opens['tag'][0]}/{opens['tag'][1:]}"
        return content + self._after if close in content else f"\n{close}\n\n{content}{self._after}"

    def check(self, messages: Messages, prompt: str, remarks: Counter[str]) -> None:
        """Count what of messages is not in `prompt`, their text.

        Raises:
            UserError: that is a field that says something, such as tools.
        """
        given, turns = split_given(messages)
        words = self._template.words(messages) if given else set()
        if unread := [name for name in given if name not in words]:
            raise UserError(f'the chat template does not read "{unread[0]}", which the row has; leave it out')
        for name in {"tools", "documents"} & set(given) if given and self.prompt(turns) == prompt else ():
            remarks[_unseen(name)] += 1
        places = list(range(len(messages)))
        self._check_fields(messages, places, lambda bare: self.prompt(bare) != prompt, remarks)
        shown = squeezed(prompt)
        remarks[CHANGED] += sum(squeezed(turn["content"]) not in shown for turn in messages)

    def _check_fields(
        self, messages: Messages, places: list[int], changes: Callable[[Messages], bool], remarks: Counter[str]
    ) -> None:
        """Count the fields of the messages at these places without which the text is the same: nothing `changes`.

        Raises:
            UserError: such a field says something, and the template does not know its name.
        """
        for name in sorted({name for i in places for name in _extras(messages[i])}):
            bare = [
                {k: v for k, v in turn.items() if k != name} if i in places else turn
                for i, turn in enumerate(messages)
            ]
            try:
                if changes(bare):
                    continue
            except UserError:
                continue
            names = REASONING if name in REASONING else {name}
            if name in SAID and not names & self._template.words(messages):
                raise UserError(f'the chat template does not write "{name}", which a message has; leave it out')
            remarks[_unseen(name)] += 1

    def spans(self, messages: Messages) -> list[Span]:
        """(start, end) of earlier answers in `prompt(messages)`, in characters.

        Exact where the template marks answers with {% generation %}; else what it writes of each by itself.

        Raises:
            UserError: it changes earlier turns when later ones follow, or its marks are on none of these.
        """
        if not self._template.marks_answers(messages):
            return _spans_by_difference(self, messages)
        spans = self._template.render(messages, answer_next=True)[1]
        if not spans:
            raise UserError("the chat template marks none of these answers with {% generation %}; mend the template")
        weights = [turn.get("weight", 1) for turn in messages if turn["role"] == "assistant"]
        if set(weights) == {1}:
            return spans
        if len(spans) != len(weights):
            raise UserError('the chat template marks other answers than those that have a "weight"; leave it out')
        return [span for span, weight in zip(spans, weights, strict=True) if weight]


def specials(hf: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special tokens, and of others that were added to a vocabulary."""
    return {*hf.added_tokens_decoder, *hf.all_special_ids}


def _spans_by_difference(chat: Transcript | ChatTemplate, messages: Messages) -> list[Span]:
    """(start, end) of earlier answers: how much longer the text is with each than without it and what follows."""
    text = chat.prompt(messages)
    spans: list[Span] = []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        start = chat.prompt(messages[:i])
        whole = start + chat.answer(messages[:i], start, turn, Counter(), closed=False) + chat.closed_earlier
        if not text.startswith(whole):
            raise UserError(
                "the chat template changes earlier turns when later ones follow, so they cannot be trained on in "
                "one sequence; set sft.loss_on to response, or mark answers with {% generation %}"
            )
        spans += [(len(start), len(whole))] * bool(turn.get("weight", 1))
    return spans


def _num_shared(a: Sequence[object], b: Sequence[object]) -> int:
    """How many characters or ids two texts or lists begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def squeezed(text: str) -> str:
    return "".join(text.split())


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _extras(turn: Message) -> set[str]:
    """The fields of a message that a template may or may not write."""
    return set(turn) - {"role", "content", "weight"} if turn["role"] != TEMPLATE else set()


def _unseen(name: str) -> str:
    return f'prompts or answers whose "{name}" is not written'
