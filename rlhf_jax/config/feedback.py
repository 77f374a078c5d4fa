"""Settings of the commands that make feedback: sampling responses and having them judged."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.checks import SEEDS, check, check_url, key_of
from rlhf_jax.config.online import RewardSourceConfig
from rlhf_jax.config.parts import MeshConfig, ModelConfig, SamplingConfig
from rlhf_jax.config.settings import PathText, settings
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
        temperature: of the answers that are written.
        max_new_tokens: longest answer that is written.
        max_prompt_length: longest question to `model`, in tokens; a longer one is an error.
        batch_size: questions that `model` reads at once.
        timeout: seconds for one answer of `function` or `url`; 0 waits for ever.
        retries: further attempts after an answer that timed out or a server that failed; the wait doubles with each.
        workers: requests to `url` at once.
    """

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
            "at least 0": "temperature timeout retries",
        }
        check(self, "judge.", rules)
        if self.url:
            check_url("judge.url", self.url)
        for name in ("url_model", "api_key_env"):
            if getattr(self, name) and not self.url:  # what is there may be a key
                raise UserError(f"judge.{name} is of judge.url, which is empty; give that one, or leave it out")
        if self.api_key_env:
            key_of("judge.api_key_env", self.api_key_env)
        missing = [place for place in ("{prompt}", "{a}", "{b}") if place not in self.template]
        if missing:
            raise UserError(f"judge.template has no {missing[0]}; write {{prompt}}, {{a}} and {{b}} where they belong")
        if self.votes > 1 and (self.model.path and self.answer == "logprob"):
            raise UserError(f"judge.votes {self.votes}: log-probs are the same each time; set judge.answer sample")
        if self.votes > 1 and self.temperature == 0 and (self.model.path or self.url):
            raise UserError(f"judge.votes {self.votes} at judge.temperature 0 are the same each time; raise it")

    def named(self) -> list[str]:
        """The kinds of judge that are named."""
        return [name for name in ("function", "url") if getattr(self, name)] + ["model.path"] * bool(self.model.path)

    def check_one(self) -> None:
        """Raise a UserError unless exactly one kind of judge is named."""
        named = self.named()
        if len(named) != 1:
            what = "none is" if not named else " and ".join(f"judge.{name}" for name in named) + " are"
            raise UserError(f"{what} given; name one judge: judge.function, judge.model.path or judge.url")


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
        max_prompt_length: longest prompt, demonstrations included, in tokens.
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
    max_prompt_length: int = 256
    too_long: Literal["drop", "truncate", "error"] = "drop"
    batch_size: int = 64
    reward: RewardSourceConfig = RewardSourceConfig()
    seed: int = 0
    overwrite: bool = False
    progress: bool = True
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check(self, "", {"at least 1": "num_samples max_prompt_length batch_size", SEEDS: "seed"})
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
