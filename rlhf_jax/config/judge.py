"""Judges: who says which of two responses is better, or how good one is."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rlhf_jax.config.checks import SECONDS, check, check_url, key_of
from rlhf_jax.config.parts import ModelConfig
from rlhf_jax.config.settings import settings
from rlhf_jax.errors import UserError

TEMPLATE = """Which of two responses to a prompt is better?

Prompt:
{prompt}

Response A:
{a}

Response B:
{b}

Answer with one letter, A or B. The better response is"""


@settings
class JudgeConfig:
    """Who says which of two responses is better: one of `function`, `model` and `url`.

    Args:
        function: fn(prompt, a, b) as "module:name", which returns the chance that `a` is better, or a text as `parse`
            reads it.
        model: a language model of our own, by model.path.
        url: an OpenAI-style endpoint, as http://localhost:8000/v1; requests go to URL/chat/completions.
        url_model: the "model" of those requests.
        api_key_env: name of the environment variable that holds the key of `url`; empty sends none.
        template: what a model or `url` is asked, with {prompt}, {a} and {b}.
        answer: of `model`: logprob compares the log-probs of A and B, sample reads what it writes.
        votes: answers to each question.
        both_orders: ask with each response in either place, so that a liking for a place cancels.
        inconsistent: a pair whose two orders contradict each other is a tie, the mean of the two, or dropped.
        top_logprobs: of `url`: so many of the likeliest first tokens are asked for with their log-probs (20 at most in
            OpenAI's API), and the answer is the expectation over those that are a choice; 0 reads what is written.
        temperature: of the answers that are written.
        max_new_tokens: longest answer that is written.
        max_prompt_length: longest question to `model`, in tokens; a longer one is an error.
        batch_size: questions that `model` reads at once.
        timeout: seconds for one answer of `function` or `url`; 0 waits for ever.
        retries: further attempts after an answer that timed out or a server that failed; the wait doubles with each.
        workers: requests to `url` at once.
    """

    group = "judge."  # the dotted prefix of these settings

    function: str = ""
    model: ModelConfig = ModelConfig()
    url: str = ""
    url_model: str = ""
    api_key_env: str = ""
    template: str = TEMPLATE
    answer: Literal["logprob", "sample"] = "logprob"
    votes: int = 1
    both_orders: bool = True
    inconsistent: Literal["tie", "mean", "drop"] = "tie"
    top_logprobs: int = 0
    temperature: float = 0.0
    max_new_tokens: int = 16
    max_prompt_length: int = 1024
    batch_size: int = 16
    timeout: float = 60.0
    retries: int = 2
    workers: int = 4

    def __post_init__(self) -> None:
        rules = {
            "at least 1": "votes max_new_tokens max_prompt_length batch_size workers",
            "at least 0": "retries top_logprobs temperature",
            SECONDS: "timeout",
        }
        check(self, self.group, rules)
        if self.url:
            check_url(f"{self.group}url", self.url)
        for name in ("url_model", "api_key_env", "top_logprobs"):
            if getattr(self, name) and not self.url:  # what is there may be a key
                url = f"{self.group}url"
                raise UserError(f"{self.group}{name} is of {url}, which is empty; give that one, or leave it out")
        if self.api_key_env:
            key_of(f"{self.group}api_key_env", self.api_key_env)
        missing = [place for place in self.places if f"{{{place}}}" not in (self.template or self.default)]
        if missing:
            *most, last = (f"{{{place}}}" for place in self.places)
            where = f"write {', '.join(most)} and {last} where they belong"
            raise UserError(f"{self.group}template has no {{{missing[0]}}}; {where}")
        if self.votes > 1 and (self.model.path and self.answer == "logprob"):
            raise UserError(
                f"{self.group}votes {self.votes}: log-probs are the same each time; set {self.group}answer sample"
            )
        if self.votes > 1 and self.top_logprobs:
            raise UserError(
                f"{self.group}votes {self.votes}: log-probs are the same each time; set {self.group}top_logprobs 0"
            )
        if self.votes > 1 and self.temperature == 0 and (self.model.path or self.url):
            raise UserError(
                f"{self.group}votes {self.votes} at {self.group}temperature 0 are the same each time; raise it"
            )

    @property
    def places(self) -> tuple[str, ...]:
        """What the template must have, in braces, in the order of a question's parts."""
        return ("prompt", "a", "b")

    @property
    def default(self) -> str:
        """What an empty template stands for."""
        return TEMPLATE

    def named(self) -> list[str]:
        """The kinds of judge that are named."""
        return [name for name in ("function", "url") if getattr(self, name)] + ["model.path"] * bool(self.model.path)

    def check_one(self) -> None:
        """Raise a UserError unless exactly one kind of judge is named."""
        named = self.named()
        if len(named) != 1:
            what = "none is" if not named else " and ".join(f"{self.group}{name}" for name in named) + " are"
            known = [f"{self.group}{name}" for name in ("function", "model.path", "url")]
            raise UserError(f"{what} given; name one judge: {known[0]}, {known[1]} or {known[2]}")


SCORE_TEMPLATE = """How good is a response to a prompt, on a scale from 1 (worst) to {scale} (best)?

Prompt:
{prompt}

Response:
{response}

Answer with one number from 1 to {scale}. The score is"""


@settings
class RewardJudgeConfig(JudgeConfig):
    """A judge whose opinion is paid, a number from -1 to 1: of each response, or of each beside another one.

    A judge of single responses says a score from 1 to `scale`, which is brought to [-1, 1]; a model of our own with
    answer logprob by its expectation over the probabilities of the scores (Lee et al. 2023, arXiv 2309.00267, direct
    RLAIF). One of pairs (`against`) says the chance p that the response is better, which pays 2 p - 1.

    Args:
        against: the column of the prompt rows that holds the response which others are compared with, such as the
            reference model's; empty has each response scored by itself.
        template: what is asked: with {a} and {b} of pairs, else with {response}; empty takes ours.
        scale: the best score.
        weight: factor of what it says.
        max_prompt_length: longest question to `model`, in tokens; a longer one counts as without an answer.
    """

    group = "reward.judge."

    against: str = ""
    template: str = ""
    scale: int = 10
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, self.group, {"at least 2": "scale", "finite and not 0": "weight"})
        if self.function and not self.against:
            raise UserError(
                f"reward.judge.function {self.function} compares two responses; set reward.judge.against, or name a "
                "function of single ones in reward.functions"
            )
        if self.named():
            self.check_one()
        elif any(getattr(self, field.name) != field.default for field in dataclasses.fields(self)):
            raise UserError(
                "reward.judge has settings, but no judge; name reward.judge.model.path, reward.judge.url or, of "
                "pairs, reward.judge.function"
            )

    @property
    def places(self) -> tuple[str, ...]:
        """As of a judge of pairs, or of single responses."""
        return super().places if self.against else ("prompt", "response")

    @property
    def default(self) -> str:
        """Our question about two responses, or about one."""
        return TEMPLATE if self.against else SCORE_TEMPLATE.replace("{scale}", str(self.scale))
