"""`rlhf-jax chat`: talk to a policy in the terminal, or to two side by side, and keep what is preferred."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.config import ChatArgs
from rlhf_jax.data.messages import Messages, Text
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError, tell
from rlhf_jax.hosts.files import Lines, check_writable
from rlhf_jax.hosts.processes import to_host
from rlhf_jax.inference.generate import make_sampler
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import Loaded, check_length, check_vocabulary, load_model, load_tokenizer
from rlhf_jax.models.model import of_length
from rlhf_jax.sharding import Mesh, make_mesh, put_batch

MOST_SEEN, SMALLEST = 4096, 64
"""Tokens of a conversation that are seen by default; the least length that contexts are padded to."""
NAMES = "AB"
HELP = "type to talk; /again another answer, /reset forgets the conversation, /quit (or Ctrl-D) ends"
VOTE = "better: a, b, t (tie), or Enter: "

Write = Callable[[str], None]
"""Takes a piece of an answer as soon as it is drawn."""


@dataclass(frozen=True)
class Answer:
    """What a policy said: its text, its ids with the stop id if it `finished`."""

    text: str
    ids: list[int]
    finished: bool


class Policy:
    """A policy that answers piece by piece: each is drawn behind what is there, in one of few compiled lengths."""

    def __init__(self, path: str, config: ChatArgs, mesh: Mesh):
        """Load the policy of a directory.

        Raises:
            UserError: it is none, or the conversation and an answer are longer than its positions.
        """
        settings, self.config, self.mesh = replace(config.model, path=path), config, mesh
        self.tokenizer: Tokenizer = load_tokenizer(settings)
        with jax.set_mesh(mesh.grid):
            self.loaded: Loaded = load_model(settings, mesh, branch(jax.random.key(config.seed), "sampler's weights"))
        arch, most = self.loaded.model.arch, config.sampling.max_new_tokens
        check_vocabulary(arch, self.tokenizer, path)
        self.seen = config.max_prompt_length or min(MOST_SEEN, arch.max_positions - most)
        check_length(arch, max(self.seen, 1) + most, "max_prompt_length + sampling.max_new_tokens =")
        self.piece = min(config.sampling.chunk, most)
        model = of_length(self.loaded.model, self.seen + most)
        pieces = replace(config.sampling, max_new_tokens=self.piece, min_new_tokens=0, chunk=self.piece, slots=0)
        self.sampler = jax.jit(make_sampler(model, pieces, self.tokenizer.eos_ids))

    def answer(self, prompt: Text, key: jax.Array, write: Write) -> Answer:
        """Answer a text or messages; `write` gets what can be read of each piece."""
        context = self.tokenizer.encode_prompt(prompt)
        if not context:
            raise UserError("the prompt has no token; type something")
        ids, said, finished = list[int](), "", False
        sampling = self.config.sampling
        left_out = max(len(context) - self.seen, 0)
        while not finished and len(ids) < sampling.max_new_tokens:
            noise = jax.random.fold_in(key, len(ids))
            minimum = max(sampling.min_new_tokens - len(ids), 0)
            new, finished = self._draw([*context[left_out:], *ids], noise, minimum)
            ids += new[: sampling.max_new_tokens - len(ids)]
            whole = self.tokenizer.response_text(ids, prompt)
            text = whole if finished else whole.rstrip("\ufffd")  # a character of which bytes are still to come
            if text.startswith(said):
                write(text[len(said) :])
                said = text
        return Answer(self.tokenizer.response_text(ids, prompt), ids, finished)

    def _draw(self, context: list[int], key: jax.Array, minimum: int) -> tuple[list[int], bool]:
        """(ids of the next piece, whether it ended)."""
        longest = self.seen + self.config.sampling.max_new_tokens
        width = next(w for w in widths(longest) if w >= len(context))
        tokens = np.full((self.mesh.row_ways, width), self.tokenizer.pad_id, np.int32)
        mask = np.broadcast_to(np.arange(width) >= width - len(context), tokens.shape).copy()
        tokens[mask] = np.tile(context, self.mesh.row_ways)
        law = SamplingLaw.from_config(replace(self.config.sampling, min_new_tokens=minimum))
        with jax.set_mesh(self.mesh.grid):
            rows = put_batch(self.mesh, (tokens, mask))
            drawn = self.sampler(self.loaded.params, *rows, key, law)
        found, there, finished = to_host((drawn.tokens, drawn.mask, drawn.finished))
        return found[0][there[0]].tolist(), bool(finished[0])


def widths(longest: int) -> Iterator[int]:
    """Lengths that contexts are padded to: doubled from the smallest up to the longest."""
    width = SMALLEST
    while width < longest:
        yield width
        width *= 2
    yield longest


def run(config: ChatArgs) -> list[Row]:
    """Talk until /quit or the end of the input; the preference rows of the votes, which `output` has too.

    With two policies, both answer the same conversation with the same noise; it goes on with the answer that is
    preferred, or with that of the first one.

    Raises:
        UserError: no policy is named, or one is none.
    """
    if not config.models:
        raise UserError("no policy is named; write rlhf-jax chat DIR, or chat DIR DIR to compare two")
    if config.output:
        check_writable(Path(config.output).parent, f"output {config.output}")
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    mesh, votes = make_mesh(config.mesh), list[Row]()
    policies = [Policy(path, config, mesh) for path in config.models]
    lines = Lines(Path(config.output)) if config.output else None
    tell(HELP)
    talk, number = _started(config), 0
    while (typed := asked("> ")) is not None and typed != "/quit":
        if typed in ("/reset", "/help", ""):
            talk = _started(config) if typed == "/reset" else talk
            tell(HELP if typed == "/help" else "", end="\n" if typed else "")
            continue
        if typed != "/again":
            talk.ask(typed)
        elif not talk.prompt:
            tell("there is nothing to answer yet")
            continue
        number += 1
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        answers = [_told(policy, talk.prompt, key, name if policies[1:] else "")
                   for policy, name in zip(policies, NAMES, strict=False)]  # fmt: skip
        texts = [answer.text.strip() for answer in answers]
        best = 0 if texts[0] or not texts[-1] else 1
        if len(set(texts)) == 2 and all(texts):  # rows of empty or equal answers are none
            said = (asked(VOTE) or "").strip().lower()
            best = 1 if said == "b" else 0
            if said in ("a", "b", "t"):
                votes.append(preference(talk.prompt, answers, config.models, best, tie=said == "t"))
                if lines is not None:
                    lines.add(votes[-1:], sync=True)
        talk.answered(answers[best].text)
    if votes:
        tell(f"{len(votes)} votes" + (f" in {config.output}" if lines is not None else ", kept nowhere (--output)"))
    return votes


class Talk:
    """A conversation: `prompt` is what is to be answered, empty before anything is asked."""

    def __init__(self, messages: Messages | None):
        """`messages` begin it; None is of texts without history."""
        self.prompt: Text = ""
        self._messages, self._answer = messages, ""

    def ask(self, text: str) -> None:
        """Go on with what the user says."""
        if self._messages is None:
            self.prompt = text
            return
        if isinstance(self.prompt, list):
            self._messages = [*self.prompt, {"role": "assistant", "content": self._answer}]
        self.prompt = [*self._messages, {"role": "user", "content": text}]

    def answered(self, text: str) -> None:
        """What the conversation goes on with."""
        self._answer = text


def _started(config: ChatArgs) -> Talk:
    system: Messages = [{"role": "system", "content": config.system}] if config.system else []
    return Talk(None if config.plain else system)


def _told(policy: Policy, prompt: Text, key: jax.Array, name: str) -> Answer:
    """The answer of a policy, written while it is drawn."""
    tell(f"{name}: " if name else "", end="")
    answer = policy.answer(prompt, key, lambda piece: tell(piece, end=""))
    tell("" if answer.finished else " [cut off: sampling.max_new_tokens]")
    return answer


def preference(prompt: Text, answers: list[Answer], models: list[str], best: int, *, tie: bool) -> Row:
    """A vote as a preference row, with the ids that were sampled and the directories of who said it."""
    chosen, rejected = answers[best], answers[1 - best]
    return {
        "prompt": prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_ids": chosen.ids,
        "rejected_ids": rejected.ids,
        "finished": [chosen.finished, rejected.finished],
        "votes": [0, 0, 1] if tie else [1, 0, 0],
        "models": [models[best], models[1 - best]],
    }


def asked(question: str) -> str | None:
    """A line that the user types; None at the end of the input."""
    try:
        return input(question)
    except EOFError:
        tell()
        return None
