"""The command line. Imports jax only after the arguments are understood, so help and typos answer at once."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import typing
from typing import Any, NoReturn

from rlhf_jax import __version__, config
from rlhf_jax.errors import UserError

COMMANDS: dict[str, tuple[type, str, str]] = {
    "quickstart": (config.QuickstartConfig, "rlhf_jax.quickstart:run", "the whole chain on a toy, in minutes"),
    "pretrain": (config.PretrainRun, "rlhf_jax.sft:run", "next-token training on packed text"),
    "sft": (config.SFTRun, "rlhf_jax.sft:run", "supervised fine-tuning on demonstrations"),
    "reward": (config.RewardRun, "rlhf_jax.reward:run", "a reward model from comparisons"),
    "ppo": (config.PPORun, "rlhf_jax.ppo:run", "PPO against a reward model or Python functions"),
    "sample": (config.SampleRun, "rlhf_jax.inference:run_sample", "responses of a model to prompts"),
    "score": (config.ScoreRun, "rlhf_jax.inference:run_score", "a reward model's scores of responses"),
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
    return HELP.format(commands="\n".join(f"  {name:<12} {about}" for name, (_, _, about) in COMMANDS.items()))


def dotted_names(cls: Any, prefix: str = "") -> list[str]:
    """Every option of a config class, nested ones dotted."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        names.append(prefix + name)
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                names += dotted_names(part, f"{prefix}{name}.")
    return names


def nearest(word: str, known: list[str]) -> str:
    """ "; did you mean X?" or nothing."""
    last = {name.split(".")[-1]: name for name in reversed(known)}
    close = difflib.get_close_matches(word, known, 1, 0.6)
    close = close or [last[name] for name in difflib.get_close_matches(word.split(".")[-1], last, 1, 0.6)]
    return f"; did you mean {close[0]}?" if close else ""


def one_line(error: Exception, cls: type, command: str) -> str:
    """jsonargparse's message as one line with the nearest option."""
    text = str(error)
    cause = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        if isinstance(cause, UserError):
            return str(cause)
    known = dotted_names(cls)
    for pattern in (
        r"unrecognized arguments: (?:--)?([\w.\-]+)",
        r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'",
        r"Option '([\w.]+)' is not accepted",
        r"[Kk]ey '?([\w.]+)'? is not expected",
        r"does not accept option '([\w.]+)'",
    ):
        found = re.search(pattern, text)
        if found:
            named = found.groupdict()
            word = f"{named['group']}.{named['name']}" if named else found.group(1)
            return f"unknown option {word!r}{nearest(word, known)} (`rlhf-jax {command} --help` lists them all)"
    refused = re.search(r"^\s*- (.*; .*)$", text, re.MULTILINE)  # a UserError of a nested config
    if refused:
        return refused.group(1)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r'Parser key "([\w.]+)":', r"option \1:", text)
    return re.sub(r"\s+", " ", text).strip()


def parse(command: str, arguments: list[str]) -> Any:
    """The command's config from YAML and dotted overrides.

    Raises:
        UserError: anything in the arguments or the file that does not fit.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser

    cls, _, about = COMMANDS[command]
    parser = ArgumentParser(prog=f"rlhf-jax {command}", description=about, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file; later options override it")
    parser.add_class_arguments(cls, None, as_group=False)
    try:
        found = parser.instantiate(parser.parse_args(arguments))
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises several kinds
        raise UserError(one_line(error, cls, command)) from error
    return cls(**{f.name: found[f.name] for f in dataclasses.fields(cls)})


def dispatch(arguments: list[str]) -> None:
    """Run a command.

    Raises:
        UserError: what the user can mend.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest(command, list(COMMANDS))} (`rlhf-jax --help` lists them)")
    settings = parse(command, rest)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that PyTorch is missing
    config.resolve(COMMANDS[command][1])(settings)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: exit code 0, 2 with one line for what the user can mend, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        dispatch([a for a in arguments if a != "--debug"])
    except UserError as error:
        if debug:
            raise
        print(f"rlhf-jax: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("rlhf-jax: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
