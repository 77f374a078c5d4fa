"""Simulated raters."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.checks import SEEDS, check
from rlhf_jax.config.settings import PathText, settings


@settings
class RateArgs:
    """All of `rlhf-jax rate ROWS`: verdicts of simulated raters, to rehearse a study before people are asked.

    Args:
        path: ranking or preference rows, labelled or not, as `rlhf-jax collect` writes them.
        fields: a field map, as data.fields of a stage.
        function: what raters value, fn(prompts, responses, **columns) -> list of floats, as "module:name".
        tokenizer: a directory whose chat template writes prompts of messages, as the model is shown them; empty writes
            a transcript.
        raters: how many judge every row.
        noise: standard deviation of a rater's error on a response, in standard deviations of the function's values.
        verdict: ranks of the responses to a prompt, by each rater (ranks), or a row for each response with the mean of
            their ratings from 1 to `levels` (rating).
        levels: of a rating; they part the range of the function's values into equal pieces.
        seed: of the errors.
        output: the .jsonl file to write; empty prints the rows.
        overwrite: replace `output`.
    """

    path: PathText = ""
    fields: list[str] = field(default_factory=list)
    function: str = ""
    tokenizer: PathText = ""
    raters: int = 1
    noise: float = 0.0
    verdict: Literal["ranks", "rating"] = "ranks"
    levels: int = 5
    seed: int = 0
    output: PathText = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "raters", "at least 2": "levels", "at least 0": "noise", SEEDS: "seed"})
