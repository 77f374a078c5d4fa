"""Settings of the page on which people rank responses."""

from __future__ import annotations

import re
from dataclasses import field, fields
from typing import Literal

from rlhf_jax.config.checks import SEEDS, check
from rlhf_jax.config.online import RewardSourceConfig
from rlhf_jax.config.parts import MeshConfig, ModelConfig, SamplingConfig
from rlhf_jax.config.rates import settle_lengths
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError, printable, shown

LONGEST_NAME = 60
"""Characters of a rater's name."""

MOST_RANKED = 12
"""Responses to one prompt: more than this nobody ranks, and Plackett-Luce takes no larger tie."""

DRAWN = ("num_samples", "select", "selected", "reward", "sampling", "max_prompt_length", "batch_size", "ahead", "mesh")
"""Settings of what a policy draws."""


@settings
class LabelArgs:
    """All of `rlhf-jax label ROWS --output VOTES.jsonl`: a local page on which people rank responses.

    Args:
        path: prompts with responses {prompt, responses} or preference rows, as data.path of a stage. Ranks that are
            there already are not shown. With `model` prompts alone.
        fields: a field map, as data.fields of a stage.
        output: a .jsonl file, one line per answer; answers that are there already are continued.
        guidelines: a Markdown file with the instructions of the study, which raters see first and can open again.
        criteria: what each response is rated for beside the order, as [helpful, honest, harmless]; of letters,
            digits and _. An answer has a column rating_NAME for each.
        scale: the best rating; 1 is the worst.
        checks: attention checks, rows as `path` whose order is known, by ranks or as chosen and rejected. They stand
            among the others unmarked, are no training data, and who passed how many is said at the end.
        raters: the names that may be chosen; empty lets everyone type one.
        host: the address to listen on. Another than this machine's own sends what is typed unencrypted.
        port: 0 takes a free one.
        seed: of the order in which each rater sees the responses to each prompt, and of what is drawn.
        model: a policy (model.path) that draws responses while people rank those before; it needs no file of them.
        num_samples: responses that it draws to each prompt.
        select: which of them are shown: any (random), those whose order members of a reward ensemble doubt most
            (disagreement), or those that two random members like best (top_two), as of `collect`.
        selected: how many are shown.
        reward: names the ensemble.
        sampling: how responses are drawn.
        max_prompt_length: longest prompt in tokens; longer ones are left out and counted. 0 takes 256, or what the
            model's positions leave.
        batch_size: responses drawn at once; of their prompts those of the most information come first.
        ahead: more is drawn while the busiest rater has fewer items left.
        mesh: the devices.
    """

    path: PathText = ""
    fields: list[str] = field(default_factory=list)
    output: PathText = ""
    guidelines: PathText = ""
    criteria: list[str] = field(default_factory=list)
    scale: int = 7
    checks: PathText = ""
    raters: list[str] = field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = 8765
    seed: int = 0
    model: ModelConfig = ModelConfig()
    num_samples: int = 4
    select: Literal["random", "disagreement", "top_two"] = "random"
    selected: int = 2
    reward: RewardSourceConfig = RewardSourceConfig()
    sampling: SamplingConfig = SamplingConfig()
    max_prompt_length: int = 0
    batch_size: int = 64
    ahead: int = 16
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        rules = {
            "between 0 and 65535": "port",
            SEEDS: "seed",
            "between 2 and 10": "scale",
            f"between 2 and {MOST_RANKED}": "selected",
        }
        rules |= {"at least 1": "num_samples batch_size ahead", "at least 0": "max_prompt_length"}
        check(self, "", rules)
        idle = [each.name for each in fields(self) if each.name in DRAWN and getattr(self, each.name) != each.default]
        if idle and not self.model.path:
            raise UserError(f"{idle[0]} is of responses that a model draws; give model.path, or leave it out")
        if self.model.path:
            settle_lengths(self)
        if not self.output.endswith(".jsonl"):
            raise UserError(f"output is {self.output!r}; name a .jsonl file for the answers, as --output votes.jsonl")
        if any(not re.fullmatch(r"\w{1,30}", name) for name in self.criteria) or _repeats(self.criteria):
            raise UserError(
                f"criteria {shown(self.criteria)} are not different names of 1 to 30 letters, digits and _; correct"
                " them"
            )
        odd = [name for name in self.raters if name != printable(name).strip() or not 0 < len(name) <= LONGEST_NAME]
        if odd or _repeats(self.raters):
            raise UserError(
                f"raters {shown(self.raters)} are not different names of 1 to {LONGEST_NAME} characters, none of them "
                "white space at an end or a control character; correct them"
            )
        if self.host in ("", "0.0.0.0", "::"):
            raise UserError(f"host is {self.host!r}, every address; name the one that raters will type")


def _repeats(names: list[str]) -> bool:
    return len(set(names)) < len(names)
