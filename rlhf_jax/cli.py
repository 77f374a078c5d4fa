"""The command line. Imports jax only after the arguments are understood, so help and typos answer at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import sys
import traceback
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
from rlhf_jax import __version__, config
from rlhf_jax.config.guess import nearest, same_idea
from rlhf_jax.config.settings import words
from rlhf_jax.errors import Stopped, UserError, reason, shown, tell
from rlhf_jax.hosts import files, yamls
from rlhf_jax.hosts.yamls import Tree

Hint = object
"""What stands behind the colon of a field: a type, or what `typing` makes of several."""


class Command(NamedTuple):
    """What a command is.

    Attributes:
        args: the class of its settings.
        where: its function, as module:function of this package; with a dot before it, of `commands`.
        about: a line for the help.
        first: the option whose value may stand first, without its --name.
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
    "bestofn": Command(config.BestOfNArgs, ".bestofn:run", "of several responses to a prompt the one a reward likes"),
    "rejection": Command(config.RejectionArgs, ".rejection:run", "SFT on the best of n, in rounds"),
    "sample": Joint(config.SampleArgs, ".sample:run_sample", "responses of a model to prompts"),
    "score": Joint(config.ScoreArgs, ".sample:run_score", "a reward model's scores of responses"),
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
    "inspect": Command(config.InspectArgs, ".inspection:run_inspect", "what a model is, and what it costs", "model"),
    "convert": Command(
        config.ConvertArgs, ".inspection:run_convert", "a model in another dtype or file size", "model"
    ),
    "certify": Joint(config.CertifyArgs, ".certify:run", "whether sampler and training agree to the bit", "config"),
    "plan": Command(config.PlanArgs, ".plan:run", "what a stage needs on a TPU slice, compiled without one"),
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
    about = {name: command.about for name, command in COMMANDS.items()} | OF_A_RUN
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


def read(path: str, option: str = "--config") -> tuple[str, Tree]:
    """A YAML file as it is, and as nested dicts and lists of texts; UserError if it is something else."""
    text = files.read_text(path, option)
    tree = yamls.read(text, path)
    if not isinstance(tree, dict):
        what = "empty" if tree is None else "a list" if isinstance(tree, list) else "plain text"
        raise UserError(f"{path}: the file is {what}; write options such as `data: {{batch_size: 8}}`")
    return text, tree


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


def misfit(name: str, value: object, hint: Hint) -> str:
    """Says that a value does not fit its option."""
    if fields(hint):
        return f"{name} is {value!r}; it is a group of options, such as {name}.{next(iter(fields(hint)))}"
    if typing.get_origin(hint) is list and (known := fields(typing.get_args(hint)[0])):
        return (
            f"{name} is {value!r}; give a list of groups such as [{{{next(iter(known))}: ...}}] of {', '.join(known)}"
        )
    return f"{name} is {value!r}; give {words(hint)}"


def refusal(name: str, value: object, hints: Mapping[str, Hint], command: str) -> str:
    """Says that there is no such option, or that it is or is not a group, or cannot be null; else empty."""
    if name not in hints:
        return f"unknown option {name!r}{nearest(name, list(hints), command + ' ')}"
    hint = hints[name]
    if isinstance(value, str) and hint is not str and value != "null":
        with contextlib.suppress(yaml.YAMLError):
            if yamls.load(value) is None:  # blank, or a comment
                return misfit(name, value, hint)
    fits = NoneType in typing.get_args(hint) if value == "null" else isinstance(value, dict) == bool(fields(hint))
    return "" if fits else misfit(name, value, hint)


@functools.cache  # a recipe has many stages of few commands, and to make one takes half a second
def parser_of(command: str) -> ArgumentParser:
    """The parser of a command's options; what its help says comes from the docstrings of the config classes."""
    from jsonargparse import ActionConfigFile, ArgumentParser, set_loader

    set_loader("texts", yamls.load, (yaml.YAMLError,))
    prog, usage = f"rlhf-jax {command}", "%(prog)s [--config FILE.yaml] [--dotted.option VALUE ...]"
    parser = ArgumentParser(
        prog=prog, usage=usage, description=COMMANDS[command].about, parser_mode="texts", exit_on_error=False,
        print_config=None,
    )  # fmt: skip
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file; what comes later wins")
    parser.add_class_arguments(COMMANDS[command].args, None, as_group=False)
    hints = COMMANDS[command].options
    for action in parser._actions:  # its own text offers a file for each group, which `refusal` does not know
        if fields(hints.get(action.dest)) and action.metavar:
            action.metavar, action.help = "{NAME: VALUE, ...}", "several of the following at once"
    return parser


def parse(command: str, arguments: list[str]) -> Any:
    """The command's config from YAML files and dotted options, later ones winning.

    Raises:
        UserError: anything in the arguments or the file that does not fit.
    """
    cls, hints = COMMANDS[command].args, COMMANDS[command].options
    given: list[tuple[str, str, Any]] = []
    plain: list[str] = []
    hints |= {f"{name}+": hint for name, hint in hints.items() if typing.get_origin(hint) is list}  # appends
    for name, text in pairs(arguments):
        if name == "config":
            text, tree = read(path := text)
            lines = yamls.lines(text)
            given += [(f"{path}:{lines[option]}: ", option, value) for option, value in dotted(tree)]
        else:
            name = same_idea(name, hints)
            hint = hints.get(name)
            if typing.get_origin(hint) in (list, tuple) and not fields(typing.get_args(hint)[0]):
                text = yamls.as_list(text)
            tree = Tree({name: text})
            if fields(hint):
                with contextlib.suppress(yaml.YAMLError):
                    tree = {name: yamls.load(text)}
            given += [("", option, value) for option, value in dotted(tree)]
        plain.append(f"--{name}={text}")
    for where, option, value in given:
        if line := refusal(option, value, hints, command):
            raise UserError(where + line)
    parser = parser_of(command)
    try:
        parsed = parser.instantiate(parser.parse_args(plain))
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
    return cls(**{name: parsed[name] for name in fields(cls)})


def dispatch(arguments: list[str]) -> None:
    """Run a command.

    Raises:
        UserError: what the user can mend.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return tell(help_text())
    if arguments[0] == "--version":
        return tell(__version__)
    if " ".join(arguments[:2]) in COMMANDS:  # such as "data inspect"
        arguments = [" ".join(arguments[:2]), *arguments[2:]]
    command, *rest = arguments
    if command in OF_A_RUN:
        return run_directory(command, rest)
    if command not in COMMANDS:
        if parts := [name for name in COMMANDS if name.startswith(f"{command} ")]:
            if not rest:
                raise UserError(f"{command} is not a whole command; write one of {', '.join(parts)}")
            command = f"{command} {rest[0]}"
        raise UserError(f"unknown command {command!r}{nearest(command, [*COMMANDS, *OF_A_RUN], '')}")
    if (first := COMMANDS[command].first) and rest and not rest[0].startswith("-"):
        rest = [f"--{first}={rest[0]}", *rest[1:]]
    hints = COMMANDS[command].options.items()
    groups = (name for name, hint in hints if any(t is NoneType or fields(t) for t in typing.get_args(hint)))
    if asked := {"-h", "--help", *(f"--{name}.help" for name in groups)} & set(rest):
        parser_of(command).parse_args([min(asked)])  # prints and exits
    if shows := "--print_config" in rest:
        rest.remove("--print_config")
    if shows and command not in ("plan", "certify", "recipe"):
        tell(yaml.safe_dump(config.to_dict(parse(command, rest)), sort_keys=False).rstrip())
    elif command in ("plan", "certify", "data inspect"):
        stage_command(command, rest)
    elif command == "recipe":
        recipe_command(rest)
    else:
        execute(command, parse(command, rest))


def stage_command(command: str, rest: list[str]) -> None:
    """`plan`, `certify` or `data inspect` with its own options, and those of the stage that it looks at."""
    args = COMMANDS[command].args
    own: list[str] = []
    others: list[str] = []
    groups: set[str] = set()
    for name, text in pairs(rest):
        tree = read(text)[1] if name == "config" else {name.split(".")[0]: ""}
        mine = set(tree) <= set(fields(args)) if command == "data inspect" else name in fields(args)
        (own if mine else others).append(f"--{name}={text}")
        groups |= set() if mine else set(tree)
    settings = parse(command, own)
    if not others and command == "data inspect":
        return execute(command, settings)
    stages = typing.get_args(fields(config.PlanArgs)["stage"])[1:]
    stages = typing.get_args(fields(args)["stage"])[1:] if "stage" in fields(args) else stages
    known = ("ppo", "grpo", "rloo", "reinforce_pp", "sft", "dpo", "kto", "rrhf", "reward")  # PPO has a reward, too
    stage = getattr(settings, "stage", "auto")
    if stage == "auto":
        stage = next((name for name in known if name in groups and name in stages), "auto")
    if stage == "auto" and command == "data inspect":
        stage = "sft"  # rows, tokenizer and limits stand at the same place in all of them
    if stage == "auto":
        raise UserError(f"the options do not say which stage this is; write --stage and one of {', '.join(stages)}")
    execute(command, settings, parse(stage, others))


def recipe_command(rest: list[str]) -> None:
    """`recipe FILE.yaml`, its own options, and those that replace parts of the file."""
    given = list(pairs(rest))
    others = {name: text for name, text in given if name.partition(".")[0] in ("variables", "defaults", "stages")}
    own = [f"--{name}={text}" for name, text in given if name not in others]
    execute("recipe", parse("recipe", own), others)


def run_directory(command: str, rest: list[str]) -> None:
    """`resume RUN_DIR [options]` or `runs [DIR]`."""
    if {"-h", "--help"} & set(rest):
        return tell(OF_A_RUN[command])
    if command == "runs":
        if len(rest) > 1:
            raise UserError(f"unexpected argument {shown(rest[1])}; write rlhf-jax runs DIR")
        config.resolve("rlhf_jax.runs.listing:show")(*map(os.path.expanduser, rest))
        return
    if not rest or rest[0].startswith("--"):
        raise UserError("resume needs a run directory; write rlhf-jax resume RUN_DIR")
    directory = Path(os.path.expanduser(rest[0]))
    with config.no_code_below(directory):
        stage, options = config.resolve("rlhf_jax.runs.listing:resume")(str(directory), rest[1:])
        if stage not in COMMANDS or "run" not in COMMANDS[stage].options:
            raise UserError(f"{directory} says that it holds a run of {shown(stage)}, which is no stage of ours")
        execute(stage, parse(stage, options))


def execute(command: str, *settings: Any) -> Any:
    """What a command's function returns, in company of the other processes of the run if there are any."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that PyTorch is missing
    if COMMANDS[command].joint:
        config.resolve("rlhf_jax.hosts.processes:initialize")()
    where = COMMANDS[command].where
    return config.resolve(f"rlhf_jax{'.commands' if where[0] == '.' else '.'}{where}")(*settings)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exit with `code_of` the arguments, by default those of the process."""
    sys.exit(code_of(list(sys.argv[1:] if arguments is None else arguments)))


def code_of(arguments: list[str]) -> int:
    """The exit code of a command line: 0, also where a signal stopped a run and it saved; 2, after one line on
    standard error, for what the user can mend; 130 when interrupted; 1, after a traceback, for all else.
    """
    debug = "--debug" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text that the terminal's encoding lacks is no error
    try:
        dispatch([a for a in arguments if a != "--debug"])
    except UserError as error:
        if debug:
            raise
        return fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Stopped as stopped:
        tell(stopped)
    except BrokenPipeError:  # as of `| head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as error:  # what the system refuses, such as a directory without permission, wherever that was
        if debug:
            raise
        what = shown(type(error).__name__ if error.filename is None else error.filename)
        return fail(f"error: {UserError(f'{what}: {reason(error)}; mend that (--debug shows where it was)')}", 2)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def fail(line: str, code: int) -> int:
    """The exit code, after a line on standard error, below the progress bar if there is one."""
    if "rlhf_jax.runs.progress" in sys.modules:
        sys.modules["rlhf_jax.runs.progress"].close_bars()
    tell(f"rlhf-jax: {line}", error=True)
    return code
