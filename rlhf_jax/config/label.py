"""Settings of the page on which people rank responses."""

from __future__ import annotations

import re
from dataclasses import field

from rlhf_jax.config.checks import SEEDS, check
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError, printable, shown

LONGEST_NAME = 60
"""Characters of a rater's name."""


@settings
class LabelArgs:
    """All of `rlhf-jax label ROWS --output VOTES.jsonl`: a local page on which people rank responses.

    Args:
        path: prompts with responses {prompt, responses} or preference rows, as data.path of a stage. Ranks that are
            there already are not shown.
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
        seed: of the order in which each rater sees the responses to each prompt.
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

    def __post_init__(self) -> None:
        check(self, "", {"between 0 and 65535": "port", SEEDS: "seed", "between 2 and 10": "scale"})
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
