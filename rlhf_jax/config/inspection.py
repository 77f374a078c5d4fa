"""`inspect` and `convert`."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.checks import check
from rlhf_jax.config.parts import MeshConfig
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError


@settings
class InspectArgs:
    """All of `rlhf-jax inspect MODEL`: what a model is and what it costs.

    Args:
        model: a Hugging Face directory, its config.json alone, or hf://owner/name.
        mesh: sizes of the mesh axes; where any is given, a table says for each parameter how it is sharded.
        batch: rows of the rollout whose KV cache is counted.
        length: tokens of every row, prompt and response.
    """

    model: PathText = ""
    mesh: MeshConfig = MeshConfig()
    batch: int = 64
    length: int = 1024

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "batch length"})
        if not self.model:
            raise UserError("no model is named; give a directory: rlhf-jax inspect MODEL")


@settings
class ConvertArgs:
    """All of `rlhf-jax convert MODEL --output DIR`: a model in another dtype or file size, or averaged with others.

    Args:
        model: a Hugging Face directory or hf://owner/name: a policy, or a reward or value model. Or the directory of a
            run that has not finished (or keeps its checkpoints, checkpoint.keep_finished), for the model in one of
            them, of PPO or GRPO the policy.
        output: the directory to write: config, generation config, weights, tokenizer and chat template.
        dtype: of the weights written; auto keeps float32 of a run's checkpoint, and makes bfloat16 of all else.
        shard_gb: largest weight file, in 10^9 bytes; more than one come with an index.
        overwrite: replace the model in `output`.
        step: of a run's checkpoints, the one of this step; 0 takes the newest.
        push: OWNER/NAME of a model of the Hugging Face Hub, made private if it is not there, to which what was written
            goes, with a card; of a run's model with the figures of the run. `output` may be left out then.
        average: directories of more models, of the same shape and tokenizer: what is written has the mean of the
            weights of all of them (of reward models: WARM, Rame et al. 2024, arXiv 2401.12187).
    """

    model: PathText = ""
    output: PathText = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    shard_gb: float = 5.0
    overwrite: bool = False
    step: int = 0
    push: str = ""
    average: list[PathText] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self, "", {"above 0": "shard_gb", "at least 0": "step"})
        for name in ("model", "output"):
            if not getattr(self, name) and not (name == "output" and self.push):
                raise UserError(f"{name} is empty; write rlhf-jax convert MODEL --output DIR")
