"""A Hugging Face tokenizer behind the four things that training needs: prompt ids, response ids, stop ids and text."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data.schemas import Messages, text_of, transcript
from rlhf_jax.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
NO_BLANK: dict[str, dict[str, Any]] = {
    "normalizer": {"strip_left": False},
    "pre_tokenizer": {"prepend_scheme": "never", "add_prefix_space": False},
    "decoder": {"prepend_scheme": "never", "start": 0},
}
"""Part of tokenizer.json -> settings under which it neither adds a blank before a text nor takes one off."""
OTHER_IDS = "responses whose ids were not of their text"
MARKER = "0x5EED"  # stands for the answer where a chat template is probed; templates leave such text alone


class Tokenizer:
    """Turns prompts and responses into token ids and back.

    A response is tokenised by itself and ends in a stop id, because that is the boundary that sampling produces: the
    prompt's last token is given, and the first response token never merges with it.

    Attributes:
        hf: the Hugging Face tokenizer.
        vocab_size: largest id + 1.
        eos_ids: ids that end a response. Without `eos_ids=` they are those of generation_config.json, config.json or
            the tokenizer, the first that names any, and the token with which the chat template closes an answer.
        end_id: the id that closes a message response: the chat template's if it has one among `eos_ids`, else
            eos_ids[0], which closes str responses and documents.
        pad_id: fills the unused places; may equal a stop id, since masks are carried and never inferred from ids.
        bos_id: the tokenizer's begin-of-sequence id, or None.
    """

    def __init__(self, hf: Any, eos_ids: Sequence[int] = ()):
        self.hf = hf
        self.vocab_size = max(hf.get_vocab().values()) + 1
        self.bos_id = hf.bos_token_id
        self._lead, closing = _template_borders(hf)
        self.eos_ids = tuple(int(i) for i in eos_ids) or _stop_ids(hf.eos_token_id, closing)
        self._check_eos_ids()
        self.end_id = closing if closing in self.eos_ids else self.eos_ids[0]
        self.pad_id = hf.pad_token_id if hf.pad_token_id is not None else self.eos_ids[0]
        self._prefix = _prefix_specials(hf)
        self._inner = _continuing(hf)

    @classmethod
    def load(cls, path: str, eos_ids: Sequence[int] = ()) -> Tokenizer:
        """The tokenizer of a local directory; nothing is ever downloaded.

        Raises:
            UserError: no such directory, no tokenizer files in it, or they do not load; no usable stop id.
        """
        directory = Path(path).expanduser()
        if not path or not directory.is_dir():
            raise UserError(f"{path or 'tokenizer'}: no such directory; set model.tokenizer to a local directory")
        if not any((directory / name).is_file() for name in FILES):
            raise UserError(f"{path}: holds no tokenizer; it needs {', '.join(FILES[:2])} or vocab files")
        # Without this, importing transformers tells every user that PyTorch is missing.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # transformers raises anything from OSError to KeyError
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            message = f"{path}: unusable tokenizer ({reason}); check that tokenizer_config.json names its class"
            raise UserError(message) from error
        if not eos_ids:
            declared = _declared_eos(directory)
            eos_ids = _stop_ids(declared, _template_borders(hf)[1]) if declared is not None else ()
        return cls(hf, eos_ids)

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """Ids of a prompt, ready for the response's first token.

        A str gets the tokenizer's own leading special tokens (bos, if it adds one, and only once) and no trailing
        ones. Messages go through the chat template; without one they become a "\\n\\nHuman: ...\\n\\nAssistant:"
        transcript and then a str prompt.

        Raises:
            UserError: the template refuses the messages, or the text is not valid Unicode.
        """
        ids = self._ids(self.prompt_text(prompt))
        if self._templated(prompt) or ids[: len(self._prefix)] == self._prefix:
            return ids  # a template writes its own special tokens
        return self._prefix + ids

    def encode_response(
        self,
        response: str | Messages,
        *,
        finished: bool = True,
        ids: Sequence[int] | None = None,
        remarks: Counter[str] | None = None,
    ) -> list[int]:
        """Ids of a response without leading special tokens, and the stop id that closes it if it is `finished`.

        It is tokenised as what it is, the continuation of a prompt: SentencePiece vocabularies put no blank of their
        own before it. A message is preceded by what the chat template or the transcript puts there, usually nothing
        or a space.

        Args:
            ids: those that a model sampled, the stop id included if it finished. They are taken as they are if
                `response_text` of them is the response's text and their end agrees with `finished`.
            remarks: counts what was not as it should be, such as ids of another text.
        """
        if ids is not None:
            if self._are_of(ids, response, finished):
                return [int(i) for i in ids]
            if remarks is not None:
                remarks[OTHER_IDS] += 1
        if isinstance(response, str):
            return [*_plain_ids(self._inner, response), *self.eos_ids[: int(finished)]]
        return [*_plain_ids(self._inner, self._lead + response[-1]["content"]), *[self.end_id] * finished]

    def response_text(self, ids: Sequence[int], prompt: str | Messages) -> str:
        """The text of a sampled response to a prompt, as rows hold it; the inverse of `encode_response`.

        Special tokens are left out, and of an answer to messages what the template or the transcript puts before it.
        """
        text = self._inner.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if isinstance(prompt, str) else text.removeprefix(self._lead)

    def _are_of(self, ids: Sequence[int], response: str | Messages, finished: bool) -> bool:
        """Whether a sampler that stops at the first stop id could have drawn `ids`, and they are the response's."""
        if not all(0 <= i < self.vocab_size for i in ids):
            return False
        stops = [place for place, i in enumerate(ids) if i in self.eos_ids]
        return stops == [len(ids) - 1] * finished and self.response_text(ids, response) == text_of(response)

    def answers_in(self, prompt: str | Messages) -> np.ndarray:
        """bool[n] over `encode_prompt(prompt)`: the tokens of earlier assistant turns, their closing tokens included.

        Exact where the chat template marks answers with {% generation %}; else the difference between a rendering up
        to the answer and one with it. A transcript has nothing that closes an earlier answer.

        Raises:
            UserError: the template changes earlier turns when later ones follow, or the tokenizer tells no offsets.
        """
        ids = self.encode_prompt(prompt)
        if isinstance(prompt, str) or all(turn["role"] != "assistant" for turn in prompt):
            return np.zeros(len(ids), bool)
        if not self.hf.is_fast:
            raise UserError("this tokenizer tells no offsets, so earlier answers cannot be found; use a fast one")
        spans = self._answer_spans(prompt)
        found = self.hf(
            self.prompt_text(prompt), add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )["offset_mapping"]
        inside = [any(start <= at < end for start, end in spans) for at, _ in found]
        return np.array([False] * (len(ids) - len(inside)) + inside)  # leading special tokens are in no text

    def _answer_spans(self, prompt: Messages) -> list[tuple[int, int]]:
        """(start, end) of earlier answers in `prompt_text(prompt)`, in characters."""
        text = self.prompt_text(prompt)
        places = [i for i, turn in enumerate(prompt) if turn["role"] == "assistant"]
        if self.hf.chat_template and "generation" in self.hf.chat_template.replace("add_generation_prompt", ""):
            from transformers.utils.chat_template_utils import render_jinja_template

            given = {**self.hf.special_tokens_map, "chat_template": self.hf.chat_template}
            rendered: Any = render_jinja_template(
                conversations=[prompt], add_generation_prompt=True, return_assistant_tokens_mask=True, **given
            )
            return rendered[1][0]
        spans = []
        for i in places:
            start = self.prompt_text(prompt[:i])
            whole = transcript(prompt[: i + 1])
            if self.hf.chat_template:
                whole = self.hf.apply_chat_template(prompt[: i + 1], tokenize=False).rstrip()
            if not (whole.startswith(start) and text.startswith(whole)):
                raise UserError(
                    "the chat template changes earlier turns when later ones follow, so they cannot be trained on in "
                    "one sequence; set sft.loss_on to response, or mark answers with {% generation %}"
                )
            spans.append((len(start), len(whole)))
        return spans

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_batch(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
        """The texts of tokens i32[B, T] where mask bool[B, T] is set."""
        rows = zip(np.asarray(tokens), np.asarray(mask, bool), strict=True)
        return [self.decode(row[keep]) for row, keep in rows]

    def prompt_text(self, prompt: str | Messages) -> str:
        """What the model is shown for a prompt, as text: a reward function gets the same."""
        if isinstance(prompt, str):
            return prompt
        if not self._templated(prompt):
            return transcript(prompt) + "\n\nAssistant:"
        try:
            return self.hf.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise their own errors, for instance on two user turns in a row
            raise UserError(f"the chat template refuses these messages ({error}); change their roles") from error

    def save(self, directory: str) -> None:
        """Write the tokenizer's files and template; stop ids belong to the model's generation_config.json."""
        self.hf.save_pretrained(directory)

    def _templated(self, prompt: str | Messages) -> bool:
        return not isinstance(prompt, str) and bool(self.hf.chat_template)

    def _ids(self, text: str) -> list[int]:
        return _plain_ids(self.hf, text)

    def _check_eos_ids(self) -> None:
        if not self.eos_ids:
            raise UserError("the tokenizer has no end-of-sequence token; set model.eos_ids to ids that end a response")
        bad = [i for i in self.eos_ids if not 0 <= i < self.vocab_size]
        if bad:
            raise UserError(f"eos id {bad[0]} is outside the vocabulary of {self.vocab_size} ids; set model.eos_ids")


def _plain_ids(hf: Any, text: str) -> list[int]:
    """Ids of a text without special tokens around it; verbose=False: our own length limits say what is too long."""
    try:
        return list(hf(text, add_special_tokens=False, verbose=False)["input_ids"])
    except (TypeError, UnicodeEncodeError) as error:
        raise UserError(f"the text cannot be tokenised ({error}); remove its lone surrogates") from error


def _stop_ids(declared: int | Sequence[int] | None, closing: int | None) -> tuple[int, ...]:
    """Declared stop ids and, last, the template's closing id, without which a trained answer would never stop."""
    ids = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return tuple(dict.fromkeys(ids if closing is None else [*ids, closing]))


def _declared_eos(directory: Path) -> int | list[int] | None:
    """eos_token_id of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((directory / name).read_text("utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError) as error:
            raise UserError(f"{directory / name}: not a JSON object ({error}); write it again") from error
        if found is not None:
            return found
    return None


def _prefix_specials(hf: Any) -> list[int]:
    """The special ids that the tokenizer puts before a text: [bos], or []."""
    whole, plain = list(hf("a")["input_ids"]), _plain_ids(hf, "a")
    if not plain:  # a vocabulary without "a"
        return [i for i in whole if i == hf.bos_token_id][:1]
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def _continuing(hf: Any) -> Any:
    """The tokenizer for texts that go on where another ended: without the blank that it puts before every text.

    SentencePiece vocabularies do so, and byte-level ones with `add_prefix_space`; decoding then takes it off again.
    Others, and those without a fast backend, are returned as they are.
    """
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        return hf
    given = {name: getattr(backend, name) for name in NO_BLANK}
    states = {name: json.loads(part.__getstate__()) for name, part in given.items() if part is not None}
    changed = {name: _without_blank(state, NO_BLANK[name]) for name, state in states.items()}
    if changed == states:
        return hf
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    whole = {**json.loads(backend.to_str()), **changed, "truncation": None, "padding": None}
    return PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(json.dumps(whole)))


def _without_blank(part: Any, settings: dict[str, Any]) -> Any:
    """A part of tokenizer.json with these settings wherever it has them, and without a normaliser that prepends."""
    if isinstance(part, list):
        return [one for one in (_without_blank(each, settings) for each in part) if one is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    return {name: settings.get(name, _without_blank(value, settings)) for name, value in part.items()}


def _template_borders(hf: Any) -> tuple[str, int | None]:
    """(text between the generation prompt and an answer, id of the special token that closes the answer).

    Found by rendering a conversation with an answer and the same one without: ChatML gives "...assistant\\n" and then
    "...assistant\\nANSWER<|im_end|>\\n", thus ("", id of <|im_end|>). Without a template: a transcript's (" ", None).
    """
    if not hf.chat_template:
        return " ", None
    from jinja2 import TemplateError

    asked = [{"role": "user", "content": "a"}]
    try:
        prompt = hf.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        answered = [*asked, {"role": "assistant", "content": MARKER}]
        before, found, after = hf.apply_chat_template(answered, tokenize=False).partition(MARKER)
    except (TemplateError, LookupError, TypeError, ValueError):
        return "", None  # a template for other roles; the first real prompt reports it with its row
    ids = _plain_ids(hf, after.lstrip())
    closing = ids[0] if found and ids and ids[0] in {*hf.added_tokens_decoder, *hf.all_special_ids} else None
    # More than white space is not part of the answer: templates of reasoning models put an empty thought there.
    lead = before.removeprefix(prompt)
    return lead if lead.isspace() else "", closing
