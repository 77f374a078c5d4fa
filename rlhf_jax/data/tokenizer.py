"""A Hugging Face tokenizer behind the four things that training needs: prompt ids, response ids, stop ids and text."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_jax.data.backend import continuing, declared_eos, decoded, plain_ids, prefix_specials, token_text
from rlhf_jax.data.chat import ASKED, MARKER, MERGED, ChatTemplate, Transcript, specials, squeezed
from rlhf_jax.data.messages import Messages, Text, text_of
from rlhf_jax.errors import UserError, reason
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.copies import local
from rlhf_jax.hosts.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
MODELS = {
    "SentencePiece": ("sentencepiece", {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}),
    "tiktoken": ("tiktoken", {"tiktoken": "tiktoken"}),
}
"""Kinds of .model files -> our extra that reads them, and its modules with the packages that have them."""
OTHER_IDS = "responses whose ids were not of their text"
UNKNOWN = "texts with something that the tokenizer has no token for"
ALTERED = "texts of which the tokenizer drops or changes characters"
RESPACED = "texts of which the tokenizer changes the white space alone"
STOPPED = "responses or documents that already ended in a stop token's text"
WITHIN = "responses or documents with a stop token before their end"
HIDDEN = "responses whose ids have special tokens that their text does not show"
SPOILED = "texts with U+FFFD, which stands for bytes of no whole character"
BROKEN = "responses whose ids have bytes of no whole character, which their text shows as U+FFFD"
PROMPTS, RESPONSES = "prompts", "responses or documents"


class Tokenizer:
    """Turns prompts and responses into token ids and back.

    A response never merges with its prompt and ends in a stop id, because that is the boundary that sampling produces:
    the prompt's last token is given.

    Attributes:
        hf: the Hugging Face tokenizer.
        vocab_size: largest id + 1.
        eos_ids: ids that end a response. Without `eos_ids=` they are those of generation_config.json, config.json or
            the tokenizer, the first that names any, and the token with which the chat template closes every answer.
        end_id: the id that closes a message response: the chat template's if it has one among `eos_ids`, else
            eos_ids[0], which closes str responses and documents.
        chat: how messages are written.
        pad_id: fills the unused places; may equal a stop id, since masks are carried and never inferred from ids.
        bos_id: the tokenizer's begin-of-sequence id, or None.
    """

    def __init__(
        self, hf: PreTrainedTokenizerBase, eos_ids: Sequence[int] = (), declared: int | Sequence[int] | None = None
    ):
        """`declared` are the stop ids of the model's files, which `eos_ids` replace."""
        self.hf = hf
        ids = set(hf.get_vocab().values())
        self.vocab_size = max(ids) + 1
        self.bos_id = hf.bos_token_id
        self.chat = ChatTemplate(hf) if hf.chat_template else Transcript()
        named = eos_ids or _as_ids(declared) or _as_ids(hf.eos_token_id)
        closing = next((i for i in self.chat.closings if i in named), next(reversed(self.chat.closings), None))
        self.eos_ids = tuple(dict.fromkeys(named if eos_ids or closing is None else [*named, closing]))
        if not self.eos_ids:
            raise UserError("the tokenizer has no end-of-sequence token; set model.eos_ids to ids that end a response")
        if bad := [i for i in self.eos_ids if not 0 <= i < self.vocab_size]:
            raise UserError(f"eos id {bad[0]} is outside the vocabulary of {self.vocab_size} ids; set model.eos_ids")
        self.end_id = closing if closing in self.eos_ids else self.eos_ids[0]
        self.pad_id = hf.pad_token_id if hf.pad_token_id is not None else self.eos_ids[0]
        self._prefix = prefix_specials(hf)
        self._inner = continuing(hf)  # for texts that go on where another ended
        self._last_prompt: tuple[Messages, str, list[int]] | None = None
        self._special = specials(hf)
        others = (hf.bos_token_id, hf.pad_token_id, *self.eos_ids)  # that of GPT-2 ends documents
        self._unknown = None if hf.unk_token_id in others else hf.unk_token_id
        self._stop_texts = [token_text(hf, i) for i in self.eos_ids if i in self._special]
        control = {*hf.all_special_ids, *(i for i, token in hf.added_tokens_decoder.items() if token.special)}
        self._shown = ids - control  # an embedding may have rows that are no token's
        self._names = {token_text(hf, i) for i in control - {hf.unk_token_id}}
        self._heads = re.compile("|".join(sorted({re.escape(name[0]) for name in self._names})))
        self._sizes = {len(name) for name in self._names}
        if isinstance(self.chat, ChatTemplate):
            self.chat.close_with(closing if closing in self.eos_ids else None)
        self._lead, self._tail = self._around_an_answer()

    @classmethod
    def load(cls, path: str, eos_ids: Sequence[int] = (), model: Path | None = None) -> Tokenizer:
        """The tokenizer of a directory, which may lie in a bucket; nothing is taken from the Hub.

        The files that name stop ids are those of the directory `model`, where it is another.

        Raises:
            UserError: no such directory, no tokenizer files in it, or they do not load; a package that they need is
                not installed; no usable stop id.
        """
        directory = local(path) if in_bucket(path) else Path(path).expanduser()
        if not path or not directory.is_dir():
            raise UserError(f"{path or 'tokenizer'}: no such directory; name one that holds the tokenizer")
        if not any((directory / name).is_file() for name in FILES):
            raise UserError(f"{path}: holds no tokenizer; it needs {', '.join(FILES[:2])} or vocab files")
        for name in ("config.json", "tokenizer_config.json"):  # transformers would not say which file is broken
            if (directory / name).is_file():
                read_object(directory / name, "download or save it again", ours=False)
        _check_packages(directory)
        # Without this, importing transformers tells every user that PyTorch is missing.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
            return cls(hf, eos_ids, None if eos_ids else declared_eos(model or directory))
        except UserError:
            raise
        except BaseException as error:  # transformers raises anything, its Rust parts a kind of exception of their own
            if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
                raise
            cure = "check config.json, and that tokenizer_config.json names its class"
            raise UserError(f"{path}: unusable tokenizer ({reason(error)}); {cure}") from error

    def encode_prompt(self, prompt: Text, remarks: Counter[str] | None = None) -> list[int]:
        """Ids of a prompt, ready for the response's first token.

        A str gets the tokenizer's own leading special tokens (bos, if it adds one, and only once) and no trailing
        ones. Messages go through the chat template; without one they become a "\\n\\nHuman: ...\\n\\nAssistant:"
        transcript and then a str prompt. `remarks` counts what of them is not written.

        Raises:
            UserError: the template refuses the messages, or has no place for what they say; or the text is not valid
                Unicode.
        """
        remarks = Counter() if remarks is None else remarks
        if isinstance(prompt, str):
            ids = plain_ids(self.hf, prompt)
            self._compare(ids, [prompt], prompt, PROMPTS, remarks)
            return self._with_prefix(ids)
        text, ids = self._rendered(prompt)
        turns = self._stopped_once(prompt, remarks)
        self.chat.check(turns, text, remarks)
        self._compare(ids, [turn["content"] for turn in turns], text, PROMPTS, remarks)
        return list(ids)

    def encode_document(self, text: str, remarks: Counter[str] | None = None) -> list[int]:
        """Ids of a document, with leading special tokens and one stop id at its end."""
        remarks = Counter() if remarks is None else remarks
        text = self._without_stop(text, remarks)
        ids = plain_ids(self.hf, text)
        self._compare(ids, [text], text, RESPONSES, remarks)
        return self._ended(self._with_prefix(ids), self.eos_ids[0], True, remarks)

    def encode_response(
        self,
        response: Text,
        prompt: Text | None = None,
        *,
        finished: bool = True,
        ids: Sequence[int] | None = None,
        remarks: Counter[str] | None = None,
    ) -> list[int]:
        """Ids of a response without leading special tokens, and the one stop id that closes it if it is `finished`.

        A str is tokenised as what it is, the continuation of a prompt: SentencePiece vocabularies put no blank of
        their own before it. A message is what the chat template writes after its prompt when the conversation has it,
        up to the token that closes it (`chat.ChatTemplate.answer`); a transcript puts a space before it.

        Args:
            prompt: what is answered; a message response needs the messages, by default a bare one of the user.
            ids: those that a model sampled, the stop id included if it finished. They are taken as they are if
                `response_text` of them is the response's text and their end agrees with `finished`.
            remarks: counts what was not as it should be, such as ids of another text.

        Raises:
            UserError: the template has no place for the answer, or for what it says; or the text is not valid Unicode.
        """
        remarks = Counter() if remarks is None else remarks
        if ids is not None:
            if self._are_of(ids, response, finished):
                remarks[HIDDEN] += self.hides(ids)
                return [int(i) for i in ids]
            remarks[OTHER_IDS] += 1
        remarks[SPOILED] += ids is None and "\ufffd" in text_of(response)
        text = self._without_stop(text_of(response), remarks)
        if isinstance(response, str):
            own = plain_ids(self._inner, text)
            self._compare(own, [text], text, RESPONSES, remarks, self._inner)
            return self._ended(own, self.eos_ids[0], finished, remarks)
        asked = prompt if isinstance(prompt, list) else ASKED
        prompt_text, prompt_ids = self._rendered(asked)
        turn = {**response[-1], "content": text}
        written = self.chat.answer(self._stopped_once(asked), prompt_text, turn, remarks, closed=finished)
        answer_ids = self._ids_after(prompt_text, prompt_ids, written)
        if answer_ids is None:
            remarks[MERGED] += isinstance(self.chat, ChatTemplate)
            answer_ids = plain_ids(self._inner, written)
        self._compare(answer_ids, [text], written, RESPONSES, remarks, self._inner)
        return self._ended(answer_ids, self.end_id, finished, remarks)

    def response_text(self, ids: Sequence[int], prompt: Text) -> str:
        """The text of a sampled response to a prompt, as rows hold it; the inverse of `encode_response`.

        Special tokens are left out, and of an answer to messages what the template or the transcript puts around it.
        """
        text = decoded(self._inner, ids)
        if isinstance(prompt, str):
            return text
        return text.removeprefix(self._lead).removesuffix(self._tail if ids and ids[-1] in self.eos_ids else "")

    def hides(self, ids: Sequence[int]) -> bool:
        """Whether a sampled response has special tokens, other than one that ends it, which its text does not show.

        Or ids that no token has, of rows of an embedding beyond the tokenizer.
        """
        return not self._shown.issuperset(ids[:-1] if ids and ids[-1] in self.eos_ids else ids)

    def unshown(self, ids: Sequence[int], text: str) -> Counter[str]:
        """What the text of a sampled response does not show of its ids, to be counted."""
        return +Counter({HIDDEN: int(self.hides(ids)), BROKEN: int("\ufffd" in text)})

    def _around_an_answer(self) -> tuple[str, str]:
        """(what stands before, what after the content of an answer that finished), as its ids are decoded."""
        marked: Messages = [{"role": "assistant", "content": MARKER}]
        try:
            before, there, after = decoded(self._inner, self.encode_response(marked)).partition(MARKER)
        except UserError:
            return "", ""  # a template for other roles
        return (before, after) if there else ("", "")  # a vocabulary without digits has no marker

    def _are_of(self, ids: Sequence[int], response: Text, finished: bool) -> bool:
        """Whether a sampler that stops at the first stop id could have drawn `ids`, and they are of the text.

        That may show the stop tokens at its end or not.
        """
        if not all(0 <= i < self.vocab_size for i in ids):
            return False
        stops, text = [place for place, i in enumerate(ids) if i in self.eos_ids], text_of(response)
        shown = text, self._without_stop(text, None)
        return stops == [len(ids) - 1] * finished and self.response_text(ids, response) in shown

    def _ids_after(self, prompt_text: str, prompt_ids: list[int], written: str) -> list[int] | None:
        """Ids of what follows a prompt; None where prompt and answer as one text do not begin with the prompt's ids.

        Some vocabularies put a blank after the special token that ends a prompt. What stands before the prompt's last
        special token changes nothing of what follows, so it is left out.
        """
        if not isinstance(self.chat, ChatTemplate):
            return None
        last = next((place for place in range(len(prompt_ids) - 1, -1, -1) if prompt_ids[place] in self._special), 0)
        start = prompt_text.rfind(token_text(self.hf, prompt_ids[last])) if prompt_ids else 0
        if last and start > 0:
            prompt_text, prompt_ids = prompt_text[start:], prompt_ids[last:]
        whole = plain_ids(self.hf, prompt_text + written)
        return whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else None

    def _rendered(self, messages: Messages) -> tuple[str, list[int]]:
        """(text, ids) of a prompt of messages; those of the last one are kept, since its responses ask for it."""
        if self._last_prompt is None or self._last_prompt[0] is not messages:
            text = self.prompt_text(messages)
            ids = plain_ids(self.hf, text)
            templated = isinstance(self.chat, ChatTemplate)  # which writes its own special tokens
            self._last_prompt = messages, text, ids if templated else self._with_prefix(ids)
        return self._last_prompt[1:]

    def _ended(self, ids: list[int], stop: int, finished: bool, remarks: Counter[str]) -> list[int]:
        """Ids with one stop id at their end, or none; counts those with others, the special ones at the end apart."""
        size = next((n for n in range(len(ids), 0, -1) if ids[n - 1] not in self.eos_ids), 0)
        remarks[STOPPED] += not self._special.issuperset(ids[size:])
        remarks[WITHIN] += not set(self.eos_ids).isdisjoint(ids[:size])
        return ids[:size] + [stop] * finished

    def _compare(
        self,
        ids: Sequence[int],
        texts: Sequence[str],
        written: str,
        what: str,
        remarks: Counter[str],
        by: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Count what the ids of what is `written` say otherwise, and special tokens that its `texts` write out.

        `what` the texts are; the ids are decoded by `by`, else by the tokenizer. White space is that of the texts as
        they are written, since some tokenizers put a blank beside the special tokens of a template.
        """
        for text in texts:
            for name in dict.fromkeys(self._written_out(text)):
                remarks[f"{what} in which {name} is written out and read as the token"] += 1
        remarks[SPOILED] += by is None and any("\ufffd" in text for text in texts)
        back = decoded(by or self.hf, ids, special=True)
        if self._unknown in ids:
            remarks[UNKNOWN] += 1
        elif written in back:
            return
        elif squeezed(written) not in squeezed(back):
            remarks[ALTERED] += 1
        else:
            parts = (text if text in written else text.strip() for text in texts)
            remarks[RESPACED] += any(part in written and part not in back for part in parts)

    def _written_out(self, text: str) -> Iterable[str]:
        """The special tokens whose text stands in a text, wherever it does."""
        starts = [place.start() for place in self._heads.finditer(text)]
        parts = (text[start : start + size] for start in starts for size in self._sizes)
        return (part for part in parts if part in self._names)

    def _with_prefix(self, ids: list[int]) -> list[int]:
        """Ids with the tokenizer's leading special tokens, once."""
        return ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids

    def _without_stop(self, text: str, remarks: Counter[str] | None) -> str:
        """A text without the stop tokens that are written out at its end, and the white space after them."""
        kept = text
        while stop := next((s for s in self._stop_texts if kept.endswith(s) or kept.rstrip().endswith(s)), ""):
            kept = (kept if kept.endswith(stop) else kept.rstrip()).removesuffix(stop)
        if remarks is not None and kept != text:
            remarks[STOPPED] += 1
        return kept

    def _stopped_once(self, messages: Messages, remarks: Counter[str] | None = None) -> Messages:
        """Messages whose answers end in no stop token, since the template writes one."""
        return [
            {**turn, "content": self._without_stop(turn["content"], remarks)} if turn["role"] == "assistant" else turn
            for turn in messages
        ]

    def answers_in(self, prompt: Text) -> np.ndarray:
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
        spans = self.chat.spans(self._stopped_once(prompt))
        text = self.prompt_text(prompt)
        offsets = self.hf(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
        # A token that an answer shares with what stands before it is learned, as {% generation %} has it elsewhere.
        inside = [any(start < max(to, at + 1) and at < end for start, end in spans) for at, to in offsets]
        return np.array([False] * (len(ids) - len(inside)) + inside)  # leading special tokens are in no text

    def decode(self, ids: Sequence[int]) -> str:
        return decoded(self.hf, ids)

    def prompt_text(self, prompt: Text) -> str:
        """What the model is shown for a prompt, as text: a reward function gets the same."""
        return prompt if isinstance(prompt, str) else self.chat.prompt(self._stopped_once(prompt))

    def seen(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        return decoded(self.hf, ids, special=True)

    def save(self, directory: str) -> None:
        """Write the tokenizer's files and template; stop ids belong to the model's generation_config.json."""
        if hasattr(self.hf, "legacy"):  # by it Llama's puts blanks behind special tokens, and it would not save it
            self.hf.init_kwargs["legacy"] = self.hf.legacy
        self.hf.save_pretrained(directory)


def _check_packages(directory: Path) -> None:
    """Raise a UserError if a .model file is all there is of a vocabulary, and a package that reads it is missing."""
    models = sorted(directory.glob("*.model"))
    if not models or any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return
    with models[0].open("rb") as stream:  # a protocol buffer whose first field is a message, or lines of base64
        kind = "SentencePiece" if stream.read(1) == b"\n" else "tiktoken"
    extra, modules = MODELS[kind]
    for module, package in modules.items():
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(
                f"{models[0]} is a {kind} vocabulary, and the package {package} is not installed; "
                f"pip install 'rlhf-jax[{extra}]', or save the tokenizer as tokenizer.json where it is"
            ) from error


def _as_ids(declared: int | Sequence[int] | None) -> list[int]:
    return [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
