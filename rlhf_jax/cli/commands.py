"""Every command: its settings, its function, its line of help. Imports nothing of jax."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rlhf_jax import config

Hint = object
"""What stands behind the colon of a field: a type, or what `typing` makes of several."""


class Command(NamedTuple):
    """What a command is.

    Attributes:
        args: the class of its settings.
        where: its function, as module:function of this package; with a dot before it, of `commands`.
        about: a line for the help.
        first: the option whose value may stand first, without its --name; all values of one that is a list.
        joint: whether several processes run it together.
    """

    args: type[Any]
    where: str
    about: str
    first: str = ""
    joint: bool = False

    @property
    def options(self) -> dict[str, Hint]:
        """Dotted name -> type of every option; of a group, the group first."""
        return dict(dotted(fields(self.args)))


Joint = functools.partial(Command, joint=True)

COMMANDS: dict[str, Command] = {
    "quickstart": Joint(config.QuickstartArgs, ".quickstart:run", "the whole chain on a toy, in minutes"),
    "pretrain": Joint(config.PretrainArgs, "sft:run", "next-token training on packed text"),
    "sft": Joint(config.SFTArgs, "sft:run", "supervised fine-tuning on demonstrations"),
    "reward": Joint(config.RewardArgs, "reward:run", "a reward model from comparisons"),
    "dpo": Joint(config.DPOArgs, "preference:run", "DPO, IPO, SimPO, ORPO and kin: a policy from pairs alone"),
    "kto": Joint(config.KTOArgs, "preference:run", "a policy from responses labelled good or bad"),
    "rrhf": Joint(config.RRHFArgs, "preference:run", "a policy that ranks responses as the raters do"),
    "ppo": Joint(config.PPOArgs, "ppo:run", "PPO against a reward model or Python functions"),
    "grpo": Joint(config.GRPOArgs, "group:run", "GRPO and kin: responses to a prompt against one another, no critic"),
    "rloo": Joint(config.RLOOArgs, "group:run", "RLOO: each response against the mean of the others"),
    "reinforce_pp": Joint(config.ReinforcePPArgs, "group:run", "REINFORCE++: one response a prompt, no critic"),
    "distill": Joint(config.DistillArgs, "group:run", "on-policy distillation: a teacher pays the student's tokens"),
    "bestofn": Command(config.BestOfNArgs, ".bestofn:run", "of several responses to a prompt the one a reward likes"),
    "rejection": Command(config.RejectionArgs, ".rejection:run", "SFT on the best of n, in rounds"),
    "sample": Joint(config.SampleArgs, ".sample:run_sample", "responses of a model to prompts"),
    "score": Joint(config.ScoreArgs, ".sample:run_score", "a reward model's scores of responses"),
    "chat": Command(config.ChatArgs, ".chat:run", "talk to a policy, or to two side by side", "models"),
    "label": Command(config.LabelArgs, ".label:run", "a local page on which people rank responses", "path"),
    "collect": Command(config.CollectArgs, ".collect:run_collect", "several responses to a prompt, labelled"),
    "judge": Command(
        config.JudgeArgs, ".collect:run_judge", "a judge's verdicts on responses, and its biases", "path"
    ),
    "rate": Command(config.RateArgs, ".rate:run", "verdicts of simulated raters, whose taste is a function", "path"),
    "recipe": Joint(
        config.RecipeArgs, ".recipe:run", "stages chained with their artefacts, any number of rounds", "path"
    ),
    "evaluate": Command(config.EvaluateArgs, ".evaluate:run_evaluate", "reward, wins, KL, perplexity over models"),
    "report": Command(config.ReportArgs, ".report:run", "runs as one page: curves, samples, what went wrong", "runs"),
    "watch": Command(config.WatchArgs, ".report:run_watch", "that page of a run, live in a browser", "run"),
    "inspect": Command(config.InspectArgs, ".inspection:run_inspect", "what a model is, and what it costs", "model"),
    "convert": Command(
        config.ConvertArgs, ".inspection:run_convert", "a model in another dtype or file size", "model"
    ),
    "certify": Joint(config.CertifyArgs, ".certify:run", "whether sampler and training agree to the bit", "config"),
    "plan": Command(config.PlanArgs, ".plan:run_alone", "what a stage needs on a TPU slice, compiled without one"),
    "env": Command(config.EnvArgs, ".env:run", "versions and devices, for a bug report"),
    "data inspect": Command(
        config.DataInspectArgs, ".datasets:run_inspect", "what rows hold and what is wrong", "path"
    ),
    "data prepare": Command(config.DataPrepareArgs, ".datasets:run_prepare", "rows as a TFDS dataset", "path"),
    "data aggregate": Command(config.DataAggregateArgs, ".datasets:run_aggregate", "many raters, one ranking", "path"),
    "data make": Command(config.DataMakeArgs, ".datasets:run_make", "files that a Python function writes", "function"),
}

OF_A_RUN = {
    "resume": "continue a run that was stopped or killed: resume RUN_DIR [options]",
    "runs": "the runs below a directory and how they stand: runs [DIR]",
}
"""Commands that take a run directory and have no settings of their own."""

OF_COMMANDS = {
    "schema": "the JSON schema of a command's YAML, for editors: schema COMMAND",
    "completion": "a script for the shell's completion: completion bash, completion zsh",
}
"""Commands about commands, which have no settings either."""

HELP = """usage: rlhf-jax COMMAND [--config FILE.yaml] [--dotted.option VALUE ...]

Reinforcement learning from human feedback in JAX.

commands:
{commands}

options:
  --help       this text; `rlhf-jax COMMAND --help` lists every option of a command
  --print_config   of a command and its options: every setting as it would be, what was left open chosen
  --version    the version
  --debug      show the traceback of an error
"""


def help_text() -> str:
    """What `rlhf-jax --help` prints."""
    about = {name: command.about for name, command in COMMANDS.items()} | OF_A_RUN | OF_COMMANDS
    return HELP.format(commands="\n".join(f"  {name:<14} {what}" for name, what in about.items()))


def fields(hint: Hint) -> dict[str, Hint]:
    """Field -> type of the config class that a type is, or is if it is not null; empty for all other types."""
    parts = () if typing.get_origin(hint) is list else typing.get_args(hint)
    group = next((part for part in (hint, *parts) if dataclasses.is_dataclass(part)), None)
    return typing.get_type_hints(group) if group else {}


def dotted(level: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested dicts, or (dotted name, type) of `fields`; of a group, the group first."""
    for name, value in level.items():
        yield prefix + name, value
        yield from dotted(value if isinstance(value, dict) else fields(value), f"{prefix}{name}.")
