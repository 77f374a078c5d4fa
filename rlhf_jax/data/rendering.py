"""A chat template as a program: the one place where it runs, and what its code reads and marks."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rlhf_jax.data.messages import TEMPLATE, Message, Messages, turns_of
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import clock
from rlhf_jax.hosts.attempts import limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_RENDERING = 5.0
"""Seconds that a chat template may compute for one conversation."""
Span = tuple[int, int]
"""(start, end) of a part of a text, in characters."""


class Endless(UserError):
    """A chat template that does not end."""


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, hf: PreTrainedTokenizerBase):
        self.hf = hf
        try:
            hf.get_chat_template()
        except ValueError as error:
            names = sorted(hf.chat_template) if isinstance(hf.chat_template, dict) else []
            kind = "one of several" if len(names) == 1 else "several"
            raise UserError(
                f"the tokenizer has {kind} chat templates and none named default: {', '.join(names)}; save the one to "
                "use as chat_template.jinja, or call it default in tokenizer_config.json"
            ) from error

    def _source(self, messages: Messages) -> str:
        """The code that writes these messages: there may be another where tools are given."""
        return self.hf.get_chat_template(tools=split_given(messages)[0].get("tools"))

    def words(self, messages: Messages) -> set[str]:
        """The names and strings in the code that writes these messages."""
        return _read(self._source(messages))[0]

    def marks_answers(self, messages: Messages) -> bool:
        """Whether that code has the tag {% generation %}."""
        return _read(self._source(messages))[1]

    def text(self, messages: Messages, *, answer_next: bool = False) -> str:
        """The messages as text; `answer_next`: with the header of an answer after them."""
        return self.render(messages, answer_next=answer_next)[0]

    def render(self, messages: Messages, *, answer_next: bool) -> tuple[str, list[Span]]:
        """(text, spans that {% generation %} marks)."""
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        given, turns = split_given(messages)
        source = self._source(messages)
        marks = _read(source)[1]

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
            texts, spans = limited(run, LONGEST_RENDERING)
        except TimeoutError:
            raise Endless(
                f"the chat template has not ended after {LONGEST_RENDERING:g} s of computing; use another"
            ) from None
        except Exception as error:  # templates raise their own errors, for instance on two user turns in a row
            message = f"the chat template refuses these messages ({error}); change them or the template"
            raise UserError(message) from error
        return texts[0], spans[0] if marks else []


def split_given(messages: Messages) -> tuple[Message, Messages]:
    """(what the template is given beside the messages, such as tools; the messages as it reads them)."""
    given = {k: v for turn in messages if turn["role"] == TEMPLATE for k, v in turn.items()}
    given = {k: v for k, v in given.items() if k not in ("role", "content")}
    return given, [{k: v for k, v in turn.items() if k != "weight"} for turn in turns_of(messages)]


@cache
def _read(source: str) -> tuple[set[str], bool]:
    """(the names and strings in a template's code, whether it has the tag {% generation %})."""
    from jinja2 import Environment

    tokens = [(kind, value) for _, kind, value in Environment().lex(source) if kind != "whitespace"]
    words = {value.strip("'\"") for kind, value in tokens if kind in ("name", "string")}
    return words, any(a[0] == "block_begin" and b == ("name", "generation") for a, b in pairwise(tokens))
