"""`sample` and `score`."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.checks import SEEDS, check
from rlhf_jax.config.online import check_paths
from rlhf_jax.config.parts import MeshConfig, ModelConfig, SamplingConfig
from rlhf_jax.config.rates import settle_lengths
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError


@settings
class SampleArgs:
    """All of `rlhf-jax sample`: responses of a model to prompts.

    Args:
        model: which model.
        prompts: prompts as text.
        data_path: a file of prompt rows, instead of or besides `prompts`.
        num_samples: responses to each prompt.
        sampling: how responses are drawn.
        max_prompt_length: longest prompt, in tokens; 0 takes 256, or what the model's positions leave.
        too_long: what happens to longer prompts, as data.too_long of a stage: drop (counted and said), truncate (they
            lose their start; their rows say in `prompt_seen` what was left), or error.
        batch_size: responses decoded at once, those to one prompt together.
        seed: of the noise.
        output: a .jsonl file to write {prompt, response, finished} rows to; finished: it ended by itself and was
            not cut off. Empty prints them.
        overwrite: replace `output`.
        mesh: the devices.
    """

    model: ModelConfig = ModelConfig()
    prompts: list[str] = field(default_factory=list)
    data_path: PathText = ""
    num_samples: int = 1
    sampling: SamplingConfig = SamplingConfig()
    max_prompt_length: int = 0
    too_long: Literal["drop", "truncate", "error"] = "drop"
    batch_size: int = 64
    seed: int = 0
    output: PathText = ""
    overwrite: bool = False
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "num_samples batch_size", "at least 0": "max_prompt_length", SEEDS: "seed"})
        settle_lengths(self)
        self.sampling.check_buckets("max_prompt_length", self.max_prompt_length)
        self.sampling.check_whole()


@settings
class ScoreArgs:
    """All of `rlhf-jax score`: a reward model's scores of {prompt, response} rows, and its accuracy on pairs.

    Args:
        model: a reward model's directory; with several heads it is an ensemble.
        models: directories of several reward models instead; `model` then says how they compute.
        combine: the "score" of an ensemble: mean, min, or lower_bound (mean - combine_coef * standard deviation).
        combine_coef: standard deviations that lower_bound takes off.
        data_path: rows {prompt, response}, as `rlhf-jax sample --output` writes them, or pairs, whose rows get
            score_chosen and score_rejected.
        max_prompt_length: longest prompt, in tokens.
        max_length: longest prompt and response together, in tokens; longer rows are cut, counted, and say so in `cut`.
        batch_size: rows scored at once.
        output: a .jsonl file to write the rows with "score" added to; empty prints them.
        overwrite: replace `output`.
        mesh: the devices.
    """

    model: ModelConfig = ModelConfig()
    models: list[PathText] = field(default_factory=list)
    combine: Literal["mean", "min", "lower_bound"] = "mean"
    combine_coef: float = 1.0
    data_path: PathText = ""
    max_prompt_length: int = 256
    max_length: int = 512
    batch_size: int = 64
    output: PathText = ""
    overwrite: bool = False
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "max_prompt_length max_length batch_size", "at least 0": "combine_coef"})
        check_paths("", self.model.path, self.models)
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"max_prompt_length {self.max_prompt_length} is not below max_length {self.max_length}, so a response "
                "has no room; lower it or raise max_length"
            )
