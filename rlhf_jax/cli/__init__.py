"""The command line. Imports jax only after the arguments are understood, so help and typos answer at once."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
import typing
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

import yaml

from rlhf_jax import __version__, config
from rlhf_jax.cli.commands import COMMANDS, OF_A_RUN, OF_COMMANDS, fields, help_text
from rlhf_jax.cli.completion import SHELLS, completion
from rlhf_jax.cli.parsing import pairs, parse, parser_of, read
from rlhf_jax.cli.schema import schema_of
from rlhf_jax.config.guess import nearest
from rlhf_jax.config.settings import path_text
from rlhf_jax.errors import Stopped, UserError, reason, shown, tell


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
    if command in OF_COMMANDS:
        return of_commands(command, rest)
    if command not in COMMANDS:
        if parts := [name for name in COMMANDS if name.startswith(f"{command} ")]:
            if not rest:
                raise UserError(f"{command} is not a whole command; write one of {', '.join(parts)}")
            command = f"{command} {rest[0]}"
        raise UserError(f"unknown command {command!r}{nearest(command, [*COMMANDS, *OF_A_RUN, *OF_COMMANDS], '')}")
    if (first := COMMANDS[command].first) and rest and not rest[0].startswith("-"):
        several = typing.get_origin(COMMANDS[command].options.get(first)) is list  # certify FILE is --config
        count = next((i for i, one in enumerate(rest) if one.startswith("-")), len(rest)) if several else 1
        rest = [f"--{first}={json.dumps(rest[:count]) if several else rest[0]}", *rest[count:]]
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
    known = (
        "ppo",
        "grpo",
        "rloo",
        "reinforce_pp",
        "distill",
        "sft",
        "dpo",
        "kto",
        "rrhf",
        "reward",
    )  # PPO has a reward, too
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
        config.resolve("rlhf_jax.runs.listing:show")(*map(path_text, rest))
        return
    if not rest or rest[0].startswith("--"):
        raise UserError("resume needs a run directory; write rlhf-jax resume RUN_DIR")
    directory = path_text(rest[0])
    with config.no_code_below(Path(directory)):
        stage, options = config.resolve("rlhf_jax.runs.listing:resume")(directory, rest[1:])
        if stage not in COMMANDS or "run" not in COMMANDS[stage].options:
            raise UserError(f"{directory} says that it holds a run of {shown(stage)}, which is no stage of ours")
        execute(stage, parse(stage, options))


def of_commands(command: str, rest: list[str]) -> None:
    """`schema COMMAND` or `completion SHELL`."""
    if {"-h", "--help"} & set(rest):
        return tell(OF_COMMANDS[command])
    asked, known = " ".join(rest), COMMANDS if command == "schema" else SHELLS
    if asked not in known:
        what = f"; {asked!r} is none of them" if asked else ""
        raise UserError(f"write rlhf-jax {command} and one of {', '.join(known)}{what}")
    tell(json.dumps(schema_of(asked), indent=1) if command == "schema" else completion(asked).rstrip())


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
    """The exit code of a command line: 0, also where a signal stopped a run and it saved (or what
    run.exit_code_when_stopped says); 2, after one line on
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
        return stopped.code
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
