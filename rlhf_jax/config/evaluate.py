"""Settings of the command that compares models."""

from __future__ import annotations

from rlhf_jax.config.checks import check
from rlhf_jax.config.feedback import SourcesArgs
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError


@settings
class EvaluateArgs(SourcesArgs):
    """All of `rlhf-jax evaluate`: how good models are, one beside the other, and how often each beats a baseline.

    Args:
        baseline: the name of the source that the others are compared with; empty is the first.
        reference: a model directory, the distance of the sources to which is measured (KL); empty leaves that out.
        text_path: held-out rows, as data.path of `sft`, whose perplexity is measured; empty leaves that out.
        max_length: longest held-out row in tokens; documents are cut into windows of it.
        output_dir: holds config.yaml, responses.jsonl and summary.json. The same command goes on after any end.
    """

    baseline: str = ""
    reference: PathText = ""
    text_path: PathText = ""
    max_length: int = 512
    output_dir: PathText = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "", {"at least 1": "max_length"})
        temperatures = [self.sampling.temperature, *(s.temperature for s in self.sources if s.temperature is not None)]
        laws = {
            "sampling.top_k": self.sampling.top_k > 0,
            "top_p": min([self.sampling.top_p, *(s.top_p for s in self.sources if s.top_p is not None)]) < 1,
            "sampling.min_new_tokens": self.sampling.min_new_tokens > 0,
            "temperature 0": min(temperatures) == 0,
        }
        if self.reference and any(laws.values()):
            name = next(name for name, other in laws.items() if other)
            raise UserError(
                f"reference asks for the KL of a model's own samples, but {name} draws them from another law; leave "
                "one of the two out"
            )
