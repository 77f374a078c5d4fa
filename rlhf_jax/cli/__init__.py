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
from rlhf_jax.cli.parsing import pairs, parse, parser_of, read, tell_replaced
from rlhf_jax.cli.schema import schema_of
from rlhf_jax.cli.streams import kept
from rlhf_jax.config.guess import nearest
from rlhf_jax.config.rates import BATCH
from rlhf_jax.config.settings import path_text
from rlhf_jax.errors import Stopped, UserError, reason, shown, tell
from rlhf_jax.hosts.interrupts import leave_if_ending


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
    if about := (OF_A_RUN | OF_COMMANDS).get(command):
        if {"-h", "--help"} & set(rest):
            return tell(about)
        return run_directory(command, rest) if command in OF_A_RUN else of_commands(command, rest)
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
    told = settings_of(command, [argument for argument in rest if argument != "--print_config"])
    if "--print_config" in rest:
        trees = [one if isinstance(one, dict) else config.to_dict(one) for one in told]
        tell("---\n".join(yaml.safe_dump(tree, sort_keys=False) for tree in trees if tree).rstrip())
        if any(tree.get("data") and tree["data"].get("batch_size") == 0 for tree in trees):
            tell(f"# data.batch_size 0: {BATCH}, or as many rows as there are; the start of the run says it")
        return None
    execute(command, *told)


def settings_of(command: str, rest: list[str]) -> tuple[Any, ...]:
    """What a command's function is called with: its settings, and of a command that looks at a stage that one's."""
    if command in ("plan", "certify", "data inspect"):
        return of_stage(command, rest)
    if command == "recipe":  # the options that replace parts of its file stay texts
        given = list(pairs(rest))
        others = {name: text for name, text in given if name.partition(".")[0] in ("variables", "defaults", "stages")}
        made = parse(command, [f"--{name}={text}" for name, text in given if name not in others])
        tell_replaced([("", name, text) for name, text in given if name in others])
        return made, others
    return (parse(command, rest),)


def of_stage(command: str, rest: list[str]) -> tuple[Any, ...]:
    """The settings of `plan`, `certify` or `data inspect`, and those of the stage that it looks at, if it does."""
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
        return (settings,)
    stages = typing.get_args(fields(args).get("stage", fields(config.PlanArgs)["stage"]))[1:]
    stage = getattr(settings, "stage", "auto")
    if stage == "auto":  # the one whose group is given; PPO has a group of the reward stage's name, too
        named = [name for name in stages if name in groups]
        stage = next((name for name in named if set(named) <= set(fields(COMMANDS[name].args))), "auto")
    if stage == "auto" and command == "data inspect":
        stage = "sft"  # rows, tokenizer and limits stand at the same place in all of them
    if stage == "auto":
        raise UserError(f"the options do not say which stage this is; write --stage and one of {', '.join(stages)}")
    return settings, parse(stage, others)


def run_directory(command: str, rest: list[str]) -> None:
    """`resume RUN_DIR [options]` or `runs [DIR]`."""
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text that the terminal's encoding lacks is no error
    with kept() as out:
        code = _code_of(arguments)
        if out.failure is None:
            return code
        told = "".join(out.told).encode(errors="backslashreplace")
        where = config.resolve("rlhf_jax.hosts.outputs:rescued")(told, ".txt")
        return fail(f"error: standard output: {reason(out.failure)}; {where}", code or 2)


def _code_of(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        dispatch([a for a in arguments if a != "--debug"])
    except UserError as error:
        if debug:
            raise
        return fail(f"error: {error}", 2)
    except SystemExit as ended:  # of --help
        return int(ended.code or 0)
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
    except Exception as error:
        leave_if_ending()
        traceback.print_exc()
        processes = sys.modules.get("rlhf_jax.hosts.processes")  # without it there is one
        return fail(why, processes.LOST) if processes and (why := processes.why_lost(error)) else 1
    return 0


def fail(line: str, code: int) -> int:
    """The exit code, after a line on standard error, below the progress bar if there is one."""
    leave_if_ending()
    if "rlhf_jax.runs.progress" in sys.modules:
        sys.modules["rlhf_jax.runs.progress"].close_bars()
    tell(f"rlhf-jax: {line}", error=True)
    return code
