"""Settings of the commands that make feedback: sampling responses and having them judged."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.checks import SEEDS, check
from rlhf_jax.config.judge import JudgeConfig
from rlhf_jax.config.online import RewardSourceConfig
from rlhf_jax.config.parts import MeshConfig, ModelConfig, SamplingConfig
from rlhf_jax.config.rates import settle_lengths
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError


@settings
class SourceConfig:
    """A model, or one way to draw from it, among several.

    Args:
        name: what the rows call it; empty takes path, temperature and shots.
        path: a model directory; empty takes model.path.
        num_samples: responses to each prompt; 0 takes the command's num_samples.
        temperature: null takes sampling.temperature.
        top_p: null takes sampling.top_p.
        demonstrations: a file of {prompt, response} rows.
        shots: that many of the first of them stand before every prompt.
    """

    name: str = ""
    path: PathText = ""
    num_samples: int = 0
    temperature: float | None = None
    top_p: float | None = None
    demonstrations: PathText = ""
    shots: int = 0

    def __post_init__(self) -> None:
        check(self, "sources.", {"at least 0": "num_samples shots"})
        if self.temperature is not None:
            check(self, "sources.", {"at least 0": "temperature"})
        if self.top_p is not None:
            check(self, "sources.", {"above 0 and at most 1": "top_p"})
        if self.demonstrations and not self.shots:
            raise UserError(f"sources.demonstrations {self.demonstrations} do nothing with sources.shots 0; raise it")
        if self.shots and not self.demonstrations:
            raise UserError(f"sources.shots is {self.shots}, but no sources.demonstrations are named; name a file")


@settings
class DrawArgs:
    """What the commands share that draw several responses to every prompt.

    Args:
        model: which model.
        prompts: prompts as text.
        data_path: a file of prompt rows, instead of or besides `prompts`.
        num_samples: responses of each source to each prompt.
        sampling: how responses are drawn.
        max_prompt_length: longest prompt, demonstrations included, in tokens; 0 takes 256, or what the models'
            positions leave.
        too_long: what happens to longer prompts, as data.too_long of a stage: drop (counted and said), truncate (they
            lose their start; their rows say in `prompt_seen` what was left), or error.
        batch_size: rows decoded at once.
        reward: reward model and Python functions that score responses; reward.gold is reported and labels nothing.
        seed: of the noise.
        overwrite: replace what an earlier run of the command wrote, whole or in part.
        progress: show a progress bar.
        mesh: the devices.
    """

    model: ModelConfig = ModelConfig()
    prompts: list[str] = field(default_factory=list)
    data_path: PathText = ""
    num_samples: int = 4
    sampling: SamplingConfig = SamplingConfig()
    max_prompt_length: int = 0
    too_long: Literal["drop", "truncate", "error"] = "drop"
    batch_size: int = 64
    reward: RewardSourceConfig = RewardSourceConfig()
    seed: int = 0
    overwrite: bool = False
    progress: bool = True
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "num_samples batch_size", "at least 0": "max_prompt_length", SEEDS: "seed"})
        settle_lengths(self, *(source.path for source in getattr(self, "sources", [])))
        if self.reward.teacher:
            raise UserError(
                f"reward.teacher {self.reward.teacher} pays tokens, and here responses are scored; leave it out, or "
                "train with distill, ppo, grpo and their kin"
            )
        self.sampling.check_buckets("max_prompt_length", self.max_prompt_length)
        self.sampling.check_whole()


@settings
class SourcesArgs(DrawArgs):
    """What the commands share that have several models respond to the same prompts.

    Args:
        sources: several models or settings instead of `model`, as [{path: DIR, temperature: 0.7}, ...]; best first for
            `label: sources`.
        judge: who compares responses two by two.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    judge: JudgeConfig = JudgeConfig()
