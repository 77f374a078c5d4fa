"""Settings of the command that compares models."""

from __future__ import annotations

from dataclasses import field

from rlhf_jax.config.checks import COLDEST, check
from rlhf_jax.config.feedback import SourcesArgs
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError, shown


@settings
class EvaluateArgs(SourcesArgs):
    """All of `rlhf-jax evaluate`: how good models are, one beside the other, and how often each beats a baseline; or
    how good a reward is, on responses that people compared.

    Args:
        preference_path: preference or ranking rows, such as those of RewardBench, on which `reward` itself is
            evaluated, by their `subset`; no model responds then.
        baseline: the name of the source that the others are compared with; empty is the first.
        reference: a model directory, the distance of the sources to which is measured (KL); empty leaves that out.
        text_path: held-out rows, as data.path of `sft`, whose perplexity is measured; empty leaves that out.
        pass_at: numbers k; the table has pass@k, the share of prompts of which one of k responses has the gold reward
            (without one, the reward) of at least 1, from all responses of a source that draws as many.
        max_length: longest held-out row in tokens; documents are cut into windows of it. Of preferences, the longest
            prompt and response together; longer ones are cut, which is said.
        output_dir: holds config.yaml, responses.jsonl and summary.json. The same command goes on after any end.
    """

    baseline: str = ""
    reference: PathText = ""
    text_path: PathText = ""
    pass_at: list[int] = field(default_factory=list)
    preference_path: PathText = ""
    max_length: int = 512
    output_dir: PathText = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_preferences()
        check(self, "", {"at least 1": "max_length"})
        drawn = max([source.num_samples or self.num_samples for source in self.sources] or [self.num_samples])
        if any(not 1 <= k <= drawn for k in self.pass_at) or len(set(self.pass_at)) < len(self.pass_at):
            raise UserError(
                f"pass_at {shown(self.pass_at)} are not different numbers from 1 to {drawn}, the responses to a "
                "prompt; raise num_samples, or leave them out"
            )
        temperatures = [self.sampling.temperature, *(s.temperature for s in self.sources if s.temperature is not None)]
        laws = {
            "sampling.top_k": self.sampling.top_k > 0,
            "top_p": min([self.sampling.top_p, *(s.top_p for s in self.sources if s.top_p is not None)]) < 1,
            "sampling.min_new_tokens": self.sampling.min_new_tokens > 0,
            f"temperature {min(temperatures):g}": min(temperatures) < COLDEST,
        }
        if self.reference and any(laws.values()):
            name = next(name for name, other in laws.items() if other)
            raise UserError(
                f"reference asks for the KL of a model's own samples, but {name} draws them from another law; leave "
                "one of the two out"
            )

    def _check_preferences(self) -> None:
        if not self.preference_path:
            return
        names = ("prompts", "data_path", "sources", "reference", "text_path", "pass_at", "baseline")
        unused = [name for name in names if getattr(self, name)]
        unused += ["model.path"] * bool(self.model.path) + ["judge"] * bool(self.judge.named())
        if unused:
            raise UserError(f"{unused[0]} does nothing with preference_path, which evaluates a reward; leave one out")
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"max_prompt_length {self.max_prompt_length} is not below max_length {self.max_length}, so a response "
                "has no room; lower it or raise max_length"
            )
