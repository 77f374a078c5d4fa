"""The command line. Imports jax only after the arguments are understood, so help and typos answer at once."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import os
import signal
import sys
import traceback
import typing
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
from rlhf_jax import __version__, config
from rlhf_jax.config.settings import words
from rlhf_jax.errors import Stopped, UserError, reason, shown, tell
from rlhf_jax.hosts import files, yamls
from rlhf_jax.hosts.yamls import texts

COMMANDS: dict[str, tuple[type, str, str]] = {
    "quickstart": (
        config.QuickstartArgs,
        "rlhf_jax.commands.quickstart:run",
        "the whole chain on a toy, in minutes",
    ),
    "pretrain": (config.PretrainArgs, "rlhf_jax.sft:run", "next-token training on packed text"),
    "sft": (config.SFTArgs, "rlhf_jax.sft:run", "supervised fine-tuning on demonstrations"),
    "reward": (config.RewardArgs, "rlhf_jax.reward:run", "a reward model from comparisons"),
    "dpo": (config.DPOArgs, "rlhf_jax.preference:run_dpo", "DPO, IPO, SimPO, ORPO and kin: a policy from pairs alone"),
    "kto": (config.KTOArgs, "rlhf_jax.preference:run_kto", "a policy from responses labelled good or bad"),
    "rrhf": (config.RRHFArgs, "rlhf_jax.preference:run_rrhf", "a policy that ranks responses as the raters do"),
    "ppo": (config.PPOArgs, "rlhf_jax.ppo:run", "PPO against a reward model or Python functions"),
    "grpo": (
        config.GRPOArgs,
        "rlhf_jax.group:run",
        "GRPO and kin: responses to a prompt against one another, no critic",
    ),
    "rloo": (config.RLOOArgs, "rlhf_jax.group:run", "RLOO: each response against the mean of the others"),
    "reinforce_pp": (config.ReinforcePPArgs, "rlhf_jax.group:run", "REINFORCE++: one response a prompt, no critic"),
    "bestofn": (
        config.BestOfNArgs,
        "rlhf_jax.commands.bestofn:run",
        "of several responses to a prompt the one a reward likes",
    ),
    "rejection": (config.RejectionArgs, "rlhf_jax.commands.rejection:run", "SFT on the best of n, in rounds"),
    "sample": (config.SampleArgs, "rlhf_jax.commands.sample:run_sample", "responses of a model to prompts"),
    "score": (config.ScoreArgs, "rlhf_jax.commands.sample:run_score", "a reward model's scores of responses"),
    "label": (config.LabelArgs, "rlhf_jax.commands.label:run", "a local page on which people rank responses"),
    "collect": (
        config.CollectArgs,
        "rlhf_jax.commands.collect:run_collect",
        "several responses to a prompt, labelled",
    ),
    "judge": (
        config.JudgeArgs,
        "rlhf_jax.commands.collect:run_judge",
        "a judge's verdicts on responses, and its biases",
    ),
    "rate": (config.RateArgs, "rlhf_jax.commands.rate:run", "verdicts of simulated raters, whose taste is a function"),
    "recipe": (
        config.RecipeArgs,
        "rlhf_jax.commands.recipe:run",
        "stages chained with their artefacts, any number of rounds",
    ),
    "evaluate": (
        config.EvaluateArgs,
        "rlhf_jax.commands.evaluate:run_evaluate",
        "reward, wins, KL, perplexity over models",
    ),
    "inspect": (config.InspectArgs, "rlhf_jax.commands.inspection:run_inspect", "what a model is, and what it costs"),
    "convert": (
        config.ConvertArgs,
        "rlhf_jax.commands.inspection:run_convert",
        "a model in another dtype or file size",
    ),
    "plan": (config.PlanArgs, "rlhf_jax.commands.plan:run", "what a stage needs on a TPU slice, compiled without one"),
    "data inspect": (
        config.DataInspectArgs,
        "rlhf_jax.commands.datasets:run_inspect",
        "what rows hold and what is wrong",
    ),
    "data prepare": (config.DataPrepareArgs, "rlhf_jax.commands.datasets:run_prepare", "rows as a TFDS dataset"),
    "data aggregate": (
        config.DataAggregateArgs,
        "rlhf_jax.commands.datasets:run_aggregate",
        "many raters, one ranking",
    ),
    "data make": (config.DataMakeArgs, "rlhf_jax.commands.datasets:run_make", "files that a Python function writes"),
}
ON_THE_MESH = {"quickstart", "pretrain", "sft", "reward", "dpo", "kto", "rrhf", "ppo", "grpo", "rloo", "reinforce_pp"}
ON_THE_MESH |= {"sample", "score", "recipe"}
"""Commands that several processes run together."""

POSITIONAL = {
    "label": "path",
    "inspect": "model",
    "convert": "model",
    "judge": "path",
    "data inspect": "path",
    "data prepare": "path",
    "data aggregate": "path",
    "data make": "function",
    "rate": "path",
    "recipe": "path",
}
"""Commands whose first argument may stand without its --name."""

DIRECTORY_COMMANDS: dict[str, tuple[str, str]] = {
    "resume": ("rlhf_jax.runs.listing:resume", "continue a run that was stopped or killed: resume RUN_DIR [options]"),
    "runs": ("rlhf_jax.runs.listing:show", "the runs below a directory and how they stand: runs [DIR]"),
}

HELP = """usage: rlhf-jax COMMAND [--config FILE.yaml] [--dotted.option VALUE ...]

Reinforcement learning from human feedback in JAX.

commands:
{commands}

options:
  --help       this text; `rlhf-jax COMMAND --help` lists every option of a command
  --version    the version
  --debug      show the traceback of an error
"""


def help_text() -> str:
    """What `rlhf-jax --help` prints."""
    about = {name: command[-1] for name, command in [*COMMANDS.items(), *DIRECTORY_COMMANDS.items()]}
    return HELP.format(commands="\n".join(f"  {name:<14} {what}" for name, what in about.items()))


def fields(hint: Any) -> dict[str, Any]:
    """Field -> type of the config class that a type is, or is if it is not null; empty for all other types."""
    parts = () if typing.get_origin(hint) is list else typing.get_args(hint)
    group = next((part for part in (hint, *parts) if dataclasses.is_dataclass(part)), None)
    return typing.get_type_hints(group) if group else {}


def flat(level: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested dicts, or (dotted name, type) of `fields`; of a group, the group first."""
    for name, value in level.items():
        yield prefix + name, value
        yield from flat(value if isinstance(value, dict) else fields(value), f"{prefix}{name}.")


def nearest(word: str, known: list[str], command: str) -> str:
    """ "; did you mean X?" or where to look. The last part of a dotted name may match on its own."""
    last = {name.split(".")[-1]: name for name in reversed(known)}
    close = difflib.get_close_matches(word, known, 1, 0.6)
    close = close or [last[name] for name in difflib.get_close_matches(word.split(".")[-1], last, 1, 0.6)]
    return f"; did you mean {close[0]}?" if close else f"; `rlhf-jax {command}--help` lists all"


def read(path: str, option: str = "--config") -> tuple[str, dict[str, Any]]:
    """A YAML file as it is, and as nested dicts and lists of texts; UserError if it is something else."""
    text = files.read_text(path, option)
    found = yamls.read(text, path)
    if not isinstance(found, dict):
        what = "empty" if found is None else "a list" if isinstance(found, list) else "plain text"
        raise UserError(f"{path}: the file is {what}; write options such as `data: {{batch_size: 8}}`")
    return text, found


def pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """(option, text) of `--option text` and `--option=text`; UserError if that is not what they are."""
    left = iter(arguments)
    for argument in left:
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}; options are written --name VALUE")
        name, equals, text = argument[2:].partition("=")
        value = text if equals else next(left, None)
        if value is None or (not equals and value.startswith("--")):
            raise UserError(f"--{name} has no value; write --{name} VALUE")
        yield name, value


def misfit(name: str, value: Any, hint: Any) -> str:
    """Says that a value does not fit its option."""
    if fields(hint):
        return f"{name} is {value!r}; it is a group of options, such as {name}.{next(iter(fields(hint)))}"
    if typing.get_origin(hint) is list and (known := fields(typing.get_args(hint)[0])):
        return (
            f"{name} is {value!r}; give a list of groups such as [{{{next(iter(known))}: ...}}] of {', '.join(known)}"
        )
    return f"{name} is {value!r}; give {words(hint)}"


def nothing(value: str) -> bool:
    """Whether YAML sees nothing in a text: it is blank, or a comment."""
    try:
        return texts(value) is None
    except yaml.YAMLError:
        return False


def refusal(name: str, value: Any, hints: dict[str, Any], command: str) -> str:
    """Says that there is no such option, or that it is or is not a group, or cannot be null; else empty."""
    if name not in hints:
        return f"unknown option {name!r}{nearest(name, list(hints), command + ' ')}"
    hint = hints[name]
    if isinstance(value, str) and hint is not str and value != "null" and nothing(value):
        return misfit(name, value, hint)
    fits = NoneType in typing.get_args(hint) if value == "null" else isinstance(value, dict) == bool(fields(hint))
    return "" if fits else misfit(name, value, hint)


@functools.cache  # a recipe has many stages of few commands, and to make one takes half a second
def parser_of(command: str) -> ArgumentParser:
    """The parser of a command's options; what its help says comes from the docstrings of the config classes."""
    from jsonargparse import ActionConfigFile, ArgumentParser, set_loader

    cls, _, about = COMMANDS[command]
    set_loader("texts", texts, (yaml.YAMLError,))
    prog, usage = f"rlhf-jax {command}", "%(prog)s [--config FILE.yaml] [--dotted.option VALUE ...]"
    parser = ArgumentParser(
        prog=prog, usage=usage, description=about, parser_mode="texts", exit_on_error=False, print_config=None
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file; what comes later wins")
    parser.add_class_arguments(cls, None, as_group=False)
    hints = dict(flat(fields(cls)))
    for action in parser._actions:  # its own text offers a file for each group, which `refusal` does not know
        if fields(hints.get(action.dest)) and action.metavar:
            action.metavar, action.help = "{NAME: VALUE, ...}", "several of the following at once"
    return parser


def parse(command: str, arguments: list[str]) -> Any:
    """The command's config from YAML files and dotted options, later ones winning.

    Raises:
        UserError: anything in the arguments or the file that does not fit.
    """
    cls = COMMANDS[command][0]
    hints, given, plain = dict(flat(fields(cls))), [], []
    hints |= {f"{name}+": hint for name, hint in hints.items() if typing.get_origin(hint) is list}  # appends
    for name, text in pairs(arguments):
        where, tree = "", {name: text}
        if name == "config":
            where = f"{text}: "
            text, tree = read(text)
        elif fields(hints.get(name)):
            with contextlib.suppress(yaml.YAMLError):
                tree = {name: texts(text)}
        given += [(where, option, value) for option, value in flat(tree)]
        plain.append(f"--{name}={text}")
    for where, option, value in given:
        if line := refusal(option, value, hints, command):
            raise UserError(where + line)
    parser = parser_of(command)
    try:
        found = parser.instantiate(parser.parse_args(plain))
    except ArgumentError as error:
        for where, option, value in given:
            try:
                parser.parse_object({option: value})
            except ArgumentError:
                if not isinstance(value, dict):
                    raise UserError(where + misfit(option, value, hints[option])) from error
        raise UserError(" ".join(str(error).split())) from error
    except ValueError as error:  # jsonargparse wraps what an optional group raises
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    except Exception as error:  # whatever the parser makes of odd input
        raise UserError(f"the options cannot be read ({type(error).__name__}: {reason(error)})") from error
    return cls(**{name: found[name] for name in fields(cls)})


def dispatch(arguments: list[str]) -> None:
    """Run a command.

    Raises:
        UserError: what the user can mend.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        tell(help_text())
        return
    if arguments[0] == "--version":
        tell(__version__)
        return
    if " ".join(arguments[:2]) in COMMANDS:  # such as "data inspect"
        arguments = [" ".join(arguments[:2]), *arguments[2:]]
    command, *rest = arguments
    if command in DIRECTORY_COMMANDS:
        return directory_command(command, rest)
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest(command, [*COMMANDS, *DIRECTORY_COMMANDS], '')}")
    if command in POSITIONAL and rest and not rest[0].startswith("-"):
        rest = [f"--{POSITIONAL[command]}={rest[0]}", *rest[1:]]
    hints = flat(fields(COMMANDS[command][0]))
    groups = (name for name, hint in hints if any(t is NoneType or fields(t) for t in typing.get_args(hint)))
    if asked := {"-h", "--help", *(f"--{name}.help" for name in groups)} & set(rest):
        parser_of(command).parse_args([min(asked)])  # prints and exits
    if command == "plan":
        plan_command(rest)
    elif command == "recipe":
        recipe_command(rest)
    else:
        run_command(command, rest)


def plan_command(rest: list[str]) -> None:
    """`plan --topology NAME`, its other options, and those of the stage that is planned."""
    own: list[str] = []
    others: list[str] = []
    groups: set[str] = set()
    for name, text in pairs(rest):
        (own if name in fields(config.PlanArgs) else others).append(f"--{name}={text}")
        groups |= set(read(text)[1]) if name == "config" else {name.split(".")[0]}
    plan = parse("plan", own)
    stage = plan.stage
    if stage == "auto":
        # PPO and its kin have a group named reward, too.
        known = ("ppo", "grpo", "rloo", "reinforce_pp", "sft", "dpo", "kto", "rrhf", "reward")
        stage = next((name for name in known if name in groups), "auto")
    if stage == "auto":
        stages = ", ".join(typing.get_args(fields(config.PlanArgs)["stage"])[1:])
        raise UserError(f"the options do not say which stage this is; write --stage and one of {stages}")
    execute("plan", plan, parse(stage, others))


def recipe_command(rest: list[str]) -> None:
    """`recipe FILE.yaml`, its own options, and those that replace parts of the file."""
    own, others = [], {}
    for name, text in pairs(rest):
        if name.partition(".")[0] in ("variables", "defaults", "stages"):
            others[name] = text
        else:
            own.append(f"--{name}={text}")
    execute("recipe", parse("recipe", own), others)


def directory_command(command: str, rest: list[str]) -> None:
    """`resume RUN_DIR [options]` or `runs [DIR]`."""
    where, about = DIRECTORY_COMMANDS[command]
    if {"-h", "--help"} & set(rest):
        tell(about)
        return
    if command == "runs":
        if len(rest) > 1:
            raise UserError(f"unexpected argument {shown(rest[1])}; write rlhf-jax runs DIR")
        config.resolve(where)(*map(os.path.expanduser, rest))
        return
    if not rest or rest[0].startswith("--"):
        raise UserError("resume needs a run directory; write rlhf-jax resume RUN_DIR")
    directory = Path(os.path.expanduser(rest[0]))
    with config.no_code_below(directory):
        stage, options = config.resolve(where)(str(directory), rest[1:])
        if "run" not in fields(COMMANDS.get(stage, (None,))[0]):
            raise UserError(f"{directory} says that it holds a run of {shown(stage)}, which is no stage of ours")
        run_command(stage, options)


def run_command(command: str, arguments: list[str]) -> None:
    """Run a command that has a config.

    Raises:
        UserError: what the user can mend.
    """
    execute(command, parse(command, arguments))


def execute(command: str, *settings: Any) -> Any:
    """What a command's function returns, in company of the other processes of the run if there are any."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that PyTorch is missing
    if command in ON_THE_MESH:
        config.resolve("rlhf_jax.hosts.processes:initialize")()
    return config.resolve(COMMANDS[command][1])(*settings)


def fail(line: str, code: int) -> NoReturn:
    """Exit with a line on standard error, below the progress bar if there is one."""
    if "rlhf_jax.runs.metrics" in sys.modules:
        sys.modules["rlhf_jax.runs.metrics"].close_bars()
    tell(f"rlhf-jax: {line}", error=True)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exit after an error; of several processes, without waiting for the others."""
    if "rlhf_jax.hosts.processes" in sys.modules:
        sys.modules["rlhf_jax.hosts.processes"].leave(code)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: exit code 0, also where a signal stopped a run and it saved; 2 with one line for what the user can
    mend; 130 when interrupted.
    """
    own_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text that the terminal's encoding lacks is no error
    try:
        dispatch([a for a in arguments if a != "--debug"])
    except UserError as error:
        if debug:
            raise
        fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Stopped as stopped:
        tell(stopped)
    except OSError as error:  # what the system refuses, such as a directory without permission, wherever that was
        if debug:
            raise
        what = shown(type(error).__name__ if error.filename is None else error.filename)
        fail(f"error: {UserError(f'{what}: {reason(error)}; mend that (--debug shows where it was)')}", 2)
    except Exception:
        traceback.print_exc()
        leave(1)
    if own_process:  # all is done: what comes while the interpreter ends is no death by a signal
        signal.signal(signal.SIGINT, interrupted)
    sys.exit(0)


def interrupted(number: int, frame: Any) -> NoReturn:
    """End the process at once, as `KeyboardInterrupt` does earlier."""
    os.write(2, b"rlhf-jax: interrupted\n")
    os._exit(130)
