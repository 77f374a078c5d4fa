"""Settings of the commands that look at data or change its form."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.checks import SEEDS, check
from rlhf_jax.config.settings import PathText, settings


@settings
class DataPrepareArgs:
    """All of `rlhf-jax data prepare ROWS --schema NAME --out DIR`: rows as a TFDS dataset.

    Args:
        path: rows, as data.path of a stage.
        eval_path: rows of the split "test"; empty makes "train" alone.
        fields: a field map, as data.fields of a stage.
        schema: sft, preference, ranking or prompts.
        out: a directory; the dataset goes to out/feedback/SCHEMA/1.0.0.
        strict: stop at the first row that would be dropped.
        overwrite: replace the dataset that is there.
    """

    path: PathText = ""
    eval_path: PathText = ""
    fields: list[str] = field(default_factory=list)
    schema: Literal["sft", "preference", "ranking", "prompts"] = "preference"
    out: PathText = ""
    strict: bool = False
    overwrite: bool = False


@settings
class DataInspectArgs:
    """All of `rlhf-jax data inspect ROWS`: what is in the rows and what may be wrong with them. The config of a stage
    will do too, and options of it: its rows, tokenizer and limits are looked at.

    Args:
        path: rows, as data.path of a stage.
        eval_path: held-out rows, which must share no prompt with `path`.
        fields: a field map, as data.fields of a stage.
        tokenizer: a tokenizer directory; empty counts no tokens and renders no examples.
        loss_on: tokens that SFT would train on: response, assistant (all assistant turns), or all.
        max_prompt_length: the limit whose truncations are counted.
        max_length: likewise, of prompt and response together.
        examples: rendered examples with the loss mask in colour.
        color: always, never, or auto: if standard output is a terminal.
        seed: which rows are rendered.
    """

    path: PathText = ""
    eval_path: PathText = ""
    fields: list[str] = field(default_factory=list)
    tokenizer: PathText = ""
    loss_on: Literal["response", "assistant", "all"] = "response"
    max_prompt_length: int = 256
    max_length: int = 512
    examples: int = 5
    color: Literal["auto", "always", "never"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "at least 1": "max_prompt_length max_length",
            "at least 0": "examples",
            SEEDS: "seed",
        }
        check(self, "", rules)


@settings
class DataAggregateArgs:
    """All of `rlhf-jax data aggregate ROWS --output FILE.jsonl`: several raters' verdicts as one ranking per prompt.

    Args:
        path: ranking, preference or unpaired rows, as data.path of a stage.
        fields: a field map, as data.fields of a stage.
        method: bradley_terry, plackett_luce, or crowd_bt, which also finds how reliable each rater is.
        prior: wins and losses that every strength starts with against one of strength 0.
        intervals: draws of the bootstrap over ballots, for 95% intervals; each is a fit anew. 0 leaves them out.
        by: a field of the responses, such as model, that names what is compared; then all prompts are one group and
            the table is of its values. Empty compares the responses to each prompt.
        seed: of the bootstrap.
        output: a .jsonl file for the rankings; empty prints the summary alone.
        overwrite: replace `output`.
    """

    path: PathText = ""
    fields: list[str] = field(default_factory=list)
    method: Literal["bradley_terry", "plackett_luce", "crowd_bt"] = "crowd_bt"
    prior: float = 0.5
    intervals: int = 100
    by: str = ""
    seed: int = 0
    output: PathText = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        check(self, "", {"above 0": "prior", "at least 0": "intervals", SEEDS: "seed"})


@settings
class DataMakeArgs:
    """All of `rlhf-jax data make MODULE:NAME --out DIR`: files of rows, and what else a Python function makes.

    Args:
        function: fn(directory, num, seed), which writes files there, as "module:name"; random_walks:write and
            stories:write of rlhf_jax.tasks are two.
        out: a directory; files of the same name in it are replaced if `overwrite`, others stay.
        num: how many rows, as the function understands it.
        seed: of what it draws.
        overwrite: replace files that are there.
    """

    function: str = ""
    out: PathText = ""
    num: int = 1000
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "num", SEEDS: "seed"})
