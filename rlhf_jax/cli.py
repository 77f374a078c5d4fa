"""The command line. Imports jax only after the arguments are understood, so help and typos answer at once."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, NoReturn

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

COMMAND_HELP = """usage: rlhf-jax {command} [--config FILE.yaml] [--dotted.option VALUE ...]

{about}

  --config FILE.yaml
        options from a file; what comes later on the command line wins
"""

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def help_text() -> str:
    """What `rlhf-jax --help` prints."""
    return HELP.format(commands="\n".join(f"  {name:<12} {about}" for name, (_, _, about) in COMMANDS.items()))


def kind(hint: Any) -> str:
    """A type in words: "a whole number", "one of rms, layer"."""
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if typing.get_origin(hint) is list:
        example = {int: "[4, 8]", float: "[0.5, 2]", str: "'[one, two]'"}[typing.get_args(hint)[0]]
        return f"a list such as {example}"
    return WORDS[hint]


def group_of(hint: Any) -> type | None:
    """The config class that a type is, or is if it is not null."""
    parts = (part for part in (hint, *typing.get_args(hint)) if isinstance(part, type))
    return next((part for part in parts if dataclasses.is_dataclass(part)), None)


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Field -> type."""
    return typing.get_type_hints(cls)


def dotted(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(option, type) of every setting, nested ones dotted; of a group, the group first."""
    for name, hint in hints_of(cls).items():
        yield prefix + name, hint
        group = group_of(hint)
        if group is not None:
            yield from dotted(group, f"{prefix}{name}.")


def described(cls: type) -> dict[str, str]:
    """Field -> description, from the "Args:" of the docstring."""
    text = inspect.getdoc(cls) or ""
    return {name: " ".join(about.split()) for name, about in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", text, re.M)}


def group_help(cls: type, defaults: Any, prefix: str = "") -> Iterator[str]:
    """Lines about every option of a group and of the groups in it."""
    about = described(cls)
    for name, hint in hints_of(cls).items():
        default, group = getattr(defaults, name), group_of(hint)
        if group is not None:
            summary = about.get(name) or (inspect.getdoc(group) or "").partition("\n")[0]
            yield f"\n{prefix}{name}: {summary}{'' if default else ' Off unless one of these is given.'}"
            yield from group_help(group, group() if default is None else default, f"{prefix}{name}.")
            continue
        shown = str(default).lower() if isinstance(default, bool) else default if default != "" else "''"
        line = f"{about[name]} [{kind(hint)}; default {shown}]"
        yield f"  --{prefix}{name}"
        yield textwrap.fill(line, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)


def command_help(command: str) -> str:
    """What `rlhf-jax COMMAND --help` prints."""
    cls, _, about = COMMANDS[command]
    return COMMAND_HELP.format(command=command, about=about) + "\n".join(group_help(cls, cls()))


def nearest(word: str, known: list[str], command: str) -> str:
    """ "; did you mean X?" or where to look. The last part of a dotted name may match on its own."""
    last = {name.split(".")[-1]: name for name in reversed(known)}
    close = difflib.get_close_matches(word, known, 1, 0.6)
    close = close or [last[name] for name in difflib.get_close_matches(word.split(".")[-1], last, 1, 0.6)]
    return f"; did you mean {close[0]}?" if close else f"; `rlhf-jax {command}--help` lists all"


def converted(text: Any, hint: Any, name: str) -> Any:
    """A value from its text, or a list of values from texts, in the type of option `name`.

    Raises:
        UserError: it does not fit.
    """
    wrong = UserError(f"{name} is {text!r}; give {kind(hint)}")
    if typing.get_origin(hint) is list:
        if not isinstance(text, list):
            raise wrong
        return [converted(item, typing.get_args(hint)[0], f"{name}[{i}]") for i, item in enumerate(text)]
    if not isinstance(text, str):
        raise wrong
    if hint is str and text != "null":
        return text
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if typing.get_origin(hint) is Literal and text in typing.get_args(hint):
        return text
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass
    raise wrong


def fill(settings: dict[str, Any], given: dict[str, Any], cls: type, command: str, prefix: str = "") -> None:
    """Put what is given for a group, nested dicts of texts, into `settings`, nested dicts of values.

    Raises:
        UserError: an option that `cls` does not have, or a value of another type.
    """
    for key, value in given.items():
        name, _, rest = key.partition(".")
        value = {rest: value} if rest else value
        if name not in hints_of(cls):
            known = [option for option, _ in dotted(COMMANDS[command][0])]
            raise UserError(f"unknown option {prefix + key!r}{nearest(prefix + key, known, command + ' ')}")
        hint = hints_of(cls)[name]
        group = group_of(hint)
        if group is None:
            settings[name] = converted(value, hint, prefix + name)
        elif isinstance(value, dict):
            settings[name] = settings.get(name) or {}
            fill(settings[name], value, group, command, f"{prefix}{name}.")
        elif value in ("null", "") and NoneType in typing.get_args(hint):
            settings[name] = None
        else:
            example = f"{prefix}{name}.{next(iter(hints_of(group)))}"
            raise UserError(f"{prefix}{name} is {value!r}; it is a group of options, such as {example}")


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file as nested dicts and lists of texts; types come from the options, so that `off` and 1e-3 stay text.

    Raises:
        UserError: no such file, invalid YAML, a name that comes twice, or something else than options.
    """
    import yaml

    def plain(node: Any) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [plain(item) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            return node.value
        options: dict[str, Any] = {}
        for key, value in node.value:
            name = str(key.value)
            if name in options:
                raise UserError(f"{path}:{key.start_mark.line + 1}: {name!r} comes twice; keep one of them")
            options[name] = plain(value)
        return options

    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.compose(file, Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 text; give a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: invalid YAML ({error.problem}); correct it") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: invalid YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(found, yaml.MappingNode):
        what = "empty" if found is None else "a list" if isinstance(found, yaml.SequenceNode) else "plain text"
        raise UserError(f"{path}: the file is {what}; write options such as `data: {{batch_size: 8}}`")
    return plain(found)


def pairs(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """(option, text) of `--option text` and `--option=text`.

    Raises:
        UserError: something that is no option, or an option without a value.
    """
    left = iter(arguments)
    for argument in left:
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}; options are written --name VALUE")
        name, equals, text = argument[2:].partition("=")
        value = text if equals else next(left, None)
        if value is None or (not equals and value.startswith("--")):
            raise UserError(f"--{name} has no value; write --{name} VALUE")
        yield name, value


def text_or_list(text: str, hint: Any) -> Any:
    """An argument as `fill` wants it: lists and groups are written as in YAML, all else is text."""
    if typing.get_origin(hint) is not list and group_of(hint) is None:
        return text
    import yaml

    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return text


def build(cls: type, settings: dict[str, Any], default: Any = None) -> Any:
    """The config of nested settings; what they leave out comes from `default`, else from the class."""
    changes = {}
    for name, value in settings.items():
        group = group_of(hints_of(cls)[name])
        changes[name] = value if group is None or value is None else build(group, value, getattr(default, name))
    return cls(**changes) if default is None else dataclasses.replace(default, **changes)


def parse(command: str, arguments: list[str]) -> Any:
    """The command's config from YAML files and dotted options, later ones winning.

    Raises:
        UserError: anything in the arguments or the file that does not fit.
    """
    cls = COMMANDS[command][0]
    hints = dict(dotted(cls))
    settings: dict[str, Any] = {}
    for name, text in pairs(arguments):
        if name != "config":
            fill(settings, {name: text_or_list(text, hints.get(name))}, cls, command)
            continue
        given = read_yaml(text)
        try:
            fill(settings, given, cls, command)
        except UserError as error:
            raise UserError(f"{text}: {error}") from error
    return build(cls, settings, cls())


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
        raise UserError(f"unknown command {command!r}{nearest(command, list(COMMANDS), '')}")
    if {"-h", "--help"} & set(rest):
        print(command_help(command))
        return
    settings = parse(command, rest)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that PyTorch is missing
    config.resolve(COMMANDS[command][1])(settings)


def fail(line: str, code: int) -> NoReturn:
    """Exit with a line on standard error, below the progress bar if there is one."""
    if "rlhf_jax.run" in sys.modules:
        sys.modules["rlhf_jax.run"].close_bars()
    print(f"rlhf-jax: {line}", file=sys.stderr)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: exit code 0, 2 with one line for what the user can mend, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        dispatch([a for a in arguments if a != "--debug"])
    except UserError as error:
        if debug:
            raise
        fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    sys.exit(0)
