"""Settings of a conversation."""

from __future__ import annotations

from dataclasses import field

from rlhf_jax.config.checks import SEEDS, check
from rlhf_jax.config.parts import MeshConfig, ModelConfig, SamplingConfig
from rlhf_jax.config.rates import lengths_within, positions_of
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError, shown

ANSWER = 256
"""Tokens of the longest answer, where sampling.max_new_tokens is 0 and the positions hold them."""


@settings
class ChatArgs:
    """All of `rlhf-jax chat DIR [DIR]`: talk to a policy, or to two that answer with the same noise.

    Args:
        models: directories of one policy, or of two (before and after).
        model: settings of both; its path stays empty.
        sampling: how answers are drawn. `sampling.chunk` tokens appear at once.
        max_prompt_length: tokens of the conversation that are seen, the last ones; 0 takes what the model's positions
            leave beside an answer, at most 4096.
        system: a first message of the system.
        plain: what is typed is a text that is continued, without template and history, as base models and toys want.
        blind: of two policies, do not say which is which: each pair of answers stands in an order by `seed`. The rows
            of the votes name them, and the end says how often each was preferred.
        page: talk on a page in the browser, not in the terminal; it is served to this machine alone.
        port: of the page; 0 takes a free one.
        seed: of the noise; each answer has other noise.
        output: a .jsonl file to which preference rows are appended, one for each vote.
        mesh: the devices.
    """

    models: list[PathText] = field(default_factory=list)
    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig(chunk=8)
    max_prompt_length: int = 0
    system: str = ""
    plain: bool = False
    blind: bool = False
    page: bool = False
    port: int = 8766
    seed: int = 0
    output: PathText = ""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check(self, "", {"at least 0": "max_prompt_length", "between 0 and 65535": "port", SEEDS: "seed"})
        positions = positions_of(self.model, *self.models)
        _, sampling = lengths_within(positions, self.max_prompt_length, self.sampling, responses=ANSWER)
        object.__setattr__(self, "sampling", sampling)
        self.sampling.check_whole()
        if len(self.models) > 2:
            raise UserError(f"models {shown(self.models)} are more than two; name one policy, or two to compare")
        if self.system and self.plain:
            raise UserError("system is a message, and plain has none; leave one out")
        if self.blind and len(self.models) != 2:
            raise UserError(
                f"blind hides which of two policies said what, and models has {len(self.models)}; name two"
            )
        if self.output and not self.output.endswith(".jsonl"):
            raise UserError(f"output is {self.output!r}; name a .jsonl file for the votes")
