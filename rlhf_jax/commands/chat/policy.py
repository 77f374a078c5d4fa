"""A policy that answers piece by piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np

from rlhf_jax.config import ChatArgs
from rlhf_jax.data.messages import Text
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import to_host
from rlhf_jax.inference.generate import make_sampler
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import Loaded, check_length, check_vocabulary, load_model, load_tokenizer
from rlhf_jax.models.model import of_length
from rlhf_jax.sharding import Mesh, put_batch

MOST_SEEN, SMALLEST = 4096, 64
"""Tokens of a conversation that are seen by default; the least length that contexts are padded to."""


@dataclass(frozen=True)
class Answer:
    """What a policy said: its text, its ids with the stop id if it `finished`.

    Of a conversation longer than `max_prompt_length` the first `left_out` tokens were not seen; `seen` is the rest.
    `remarks` are of what the policy sees of the conversation, and one sees of the answer, otherwise than it stands.
    """

    text: str
    ids: list[int]
    finished: bool
    left_out: int = 0
    seen: str = ""
    remarks: tuple[str, ...] = ()


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

    def answer(self, prompt: Text, key: jax.Array) -> Generator[str, None, Answer]:
        """Answer a text or messages: yields what can be read of each piece when it is drawn, returns the whole."""
        remarks = Counter[str]()
        context = self.tokenizer.encode_prompt(prompt, remarks)
        if not context:
            raise UserError("the prompt has no token; type something")
        ids, said, finished = list[int](), "", False
        sampling = self.config.sampling
        left_out = max(len(context) - self.seen, 0)
        while not finished and len(ids) < sampling.max_new_tokens:
            noise = jax.random.fold_in(key, len(ids))
            minimum = max(sampling.min_new_tokens - len(ids), 0)
            new, finished = self._draw([*context[left_out:], *ids], noise, minimum)
            left = sampling.max_new_tokens - len(ids)
            finished = finished and len(new) <= left  # else its stop stands behind what is kept
            ids += new[:left]
            whole = self.tokenizer.response_text(ids, prompt)
            ended = finished or len(ids) == sampling.max_new_tokens
            text = whole if ended else whole.rstrip("\ufffd")  # a character of which bytes are still to come
            if text.startswith(said):
                yield text[len(said) :]
                said = text
        seen = self.tokenizer.seen(context[left_out:]) if left_out else ""
        text = self.tokenizer.response_text(ids, prompt)
        remarks.update(self.tokenizer.unshown(ids, text))
        notes = tuple(f"{count} {remark}" for remark, count in (+remarks).items())
        return Answer(text, ids, finished, left_out, seen, notes)

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
