"""Arguments -> the config of a command, from YAML files and dotted options."""

from __future__ import annotations

import contextlib
import functools
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
from rlhf_jax.cli.commands import COMMANDS, Hint, dotted, fields
from rlhf_jax.cli.presets import preset
from rlhf_jax.config.guess import nearest, same_idea
from rlhf_jax.config.settings import path_text, words
from rlhf_jax.errors import UserError, reason, shown, tell
from rlhf_jax.hosts import files, yamls
from rlhf_jax.hosts.yamls import Tree

Given = tuple[str, str, Any]
"""Where an option was given, "FILE:LINE: " or "" for the command line; its dotted name; its value."""

MOST_SAID = 8
"""So many replaced values are named, the others counted."""


def read(path: str, option: str = "--config") -> tuple[str, Tree]:
    """A YAML file, or a preset of that name, as it is, and as nested dicts and lists of texts.

    Raises:
        UserError: it is something else.
    """
    text = files.read_text(preset(path_text(path), option), option)
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
    named = {"prog": f"rlhf-jax {command}", "usage": "%(prog)s [--config FILE.yaml] [--dotted.option VALUE ...]"}

    class Parser(ArgumentParser):
        """The help of a group (--model.arch.help) is that of another parser of this class, and begins likewise."""

        def __init__(self, **given: Any):
            super().__init__(**{**named, **given})

    about = COMMANDS[command].about
    parser = Parser(description=about, parser_mode="texts", exit_on_error=False, print_config=None)
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
    given: list[Given] = []
    plain: list[str] = []
    hints |= {f"{name}+": hint for name, hint in hints.items() if typing.get_origin(hint) is list}  # appends
    for name, text in pairs(arguments):
        if name == "config":
            text, tree = read(path := text)
            lines = yamls.lines(text)
            text = yaml.safe_dump(tree := with_lists(tree, hints), allow_unicode=True, default_style='"')
            told = [(f"{path}:{lines[option]}: ", option, value) for option, value in dotted(tree)]
        else:
            name = same_idea(name, hints)
            hint = hints.get(name)
            if of_values(hint):
                text = yamls.as_list(text)
            tree = Tree({name: yamls.read(text, f"--{name}") if fields(hint) else text})
            told = [("", option, value) for option, value in dotted(tree)]
        names = set[str]()
        for where, option, _ in told:
            if option in names:  # as `a: {b: 1}` and `a.b: 2`
                raise UserError(f"{where}{option} comes twice; leave one out")
            names.add(option)
        given += told
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
        cause = error if isinstance(error, UserError) else error.__cause__
        if isinstance(cause, UserError):
            raise at_line(cause, given) from None
        raise
    except Exception as error:  # whatever the parser makes of odd input
        raise UserError(f"the options cannot be read ({type(error).__name__}: {reason(error)})") from error
    try:
        made = cls(**{name: parsed[name] for name in fields(cls)})
    except UserError as error:
        raise at_line(error, given) from None
    tell_replaced(given)  # last: a refusal is one line
    return made


def of_values(hint: Hint) -> bool:
    """Whether a type is a list or tuple, and not of groups."""
    return typing.get_origin(hint) in (list, tuple) and not fields(typing.get_args(hint)[0])


def with_lists(tree: Tree, hints: Mapping[str, Hint], prefix: str = "") -> Tree:
    """The tree with a list of one in place of a single value, where an option is a list."""
    found = Tree()
    for name, value in tree.items():
        if isinstance(value, dict):
            found[name] = with_lists(value, hints, f"{prefix}{name}.")
        else:
            found[name] = yamls.listed(value) if of_values(hints.get(prefix + name)) else value
    return found


def tell_replaced(given: Sequence[Given]) -> None:
    """Say on standard error which values hold no more, because another one comes later.

    What a file says and a command line says otherwise, which is what both are for, is left out.
    """
    held: dict[str, tuple[str, object]] = {}
    said = []
    for where, option, value in given:
        if isinstance(value, dict):  # its options follow
            continue
        for name in [] if option.endswith("+") else [name for name in held if is_one(name.removesuffix("+"), option)]:
            place, old = held.pop(name)
            if old != value and (where or not place):
                first, then = (f" ({each.removesuffix(': ')})" if each else "" for each in (place, where))
                other = "" if name == option else f"{option} "
                said.append(f"{name} {shown(old)}{first}, then {other}{shown(value)}{then}")
        held[option] = where, value
    if said:
        more = f" and {len(said) - MOST_SAID} more" if len(said) > MOST_SAID else ""
        tell(f"given twice, the last one holds: {'; '.join(said[:MOST_SAID])}{more}", error=True)


def is_one(a: str, b: str) -> bool:
    """Whether two options are the same, or one is a group that holds the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def at_line(error: UserError, given: Sequence[Given]) -> UserError:
    """The error with the line of the file where the option with which it begins was given last, if a file did."""
    option = str(error).split(maxsplit=1)[0].rstrip(":")
    where = next((where for where, name, _ in reversed(given) if name == option), "")
    return UserError(f"{where}{error}") if where else error
