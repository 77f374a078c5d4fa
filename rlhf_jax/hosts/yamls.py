"""YAML that somebody else wrote: every mistake in it, and every trick, is one kind of error."""

from __future__ import annotations

import contextlib
import json
from types import NoneType
from typing import Any

import yaml

from rlhf_jax.errors import UserError, reason, shortened

Value = str | list["Value"] | dict[str, "Value"]
Tree = dict[str, Value]
"""Nested dicts and lists of texts: YAML before an option's type says what a text means."""

MOST_NODES = 100_000
"""Values of a file, aliases written out."""


class Strict:
    """Refuses what a few lines of aliases blow up to, before anything is made of it, and a name that comes twice."""

    def get_single_data(self: Any) -> object:
        node = self.get_single_node()
        if node is None:
            return None
        size_of(node, {})
        return self.construct_document(node)

    def construct_mapping(self: Any, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in names[:i]:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} comes twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep=deep)  # type: ignore[misc]


def size_of(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values at and below a node; `sizes` has those of nodes that were seen, 0 while they are under way."""
    if id(node) not in sizes:
        sizes[id(node)] = 0
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
        sizes[id(node)] = 1 + sum(size_of(part, sizes) for part in flat)
        if sizes[id(node)] > MOST_NODES:
            raise yaml.MarkedYAMLError(problem="too many values, aliases counted", problem_mark=node.start_mark)
    elif not sizes[id(node)]:
        raise yaml.MarkedYAMLError(problem="an alias stands within what it names", problem_mark=node.start_mark)
    return sizes[id(node)]


class Texts(Strict, yaml.BaseLoader):
    """YAML whose values stay text, so that the option's type decides what `off`, `1e-3` and `123` mean."""


class Values(Strict, yaml.SafeLoader):
    """YAML with numbers, as `config.yaml` is written."""


def load(text: str, loader: Any = Texts) -> Any:
    """What a text says; by default all values are texts.

    Raises:
        yaml.YAMLError: nothing that can be read.
    """
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, OverflowError) as error:  # no such date, too long a number
        raise yaml.YAMLError(reason(error)) from None


def listed(value: Value) -> Value:
    """A list of a single value; what is a list, or null, or a blank, as it is."""
    return [value] if isinstance(value, str) and value not in ("", "null") else value


def as_list(text: str) -> str:
    """YAML of a list: the text, if it is one (or nothing, or broken), else a list of it alone."""
    with contextlib.suppress(yaml.YAMLError):
        if not isinstance(load(text), (list, NoneType)) and text != "null":
            return json.dumps([text])
    return text


def lines(text: str) -> dict[str, int]:
    """Dotted name -> line, from 1, of every key of a text that `load` reads; no name of what a list holds."""
    found: dict[str, int] = {}
    left: list[tuple[str, yaml.Node | None]] = [("", yaml.compose(text, Loader=Texts))]
    while left:
        prefix, node = left.pop()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
            found[prefix + key.value] = key.start_mark.line + 1
            left.append((f"{prefix}{key.value}.", value))
    return found


def read(text: str, where: str, loader: Any = Texts) -> Any:
    """`load` of the file `where`.

    Raises:
        UserError: nothing that can be read, with the line.
    """
    try:
        return load(text, loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: invalid YAML ({shortened(' '.join(problem.split()))}); correct it") from error
