"""The decorator of every class of settings: a frozen dataclass that checks the types of its values."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import os
import re
import typing
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, cast, dataclass_transform

from rlhf_jax.errors import UserError, shown

PathText = Annotated[str, "a path"]
"""A path, as text. A leading ~ or ~user becomes the home directory where the settings are made."""

KINDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list such as [4, 8]",
    list[float]: "a list such as [0.5, 2]",
    list[str]: "a list such as '[one, two]'",
    tuple[int, ...]: "a list such as [4, 8]",
    tuple[float, ...]: "a list such as [0.5, 2]",
}

Class = TypeVar("Class", bound=type)


class Settings(Protocol):
    """An instance of a class that `settings` made."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def words(hint: object) -> str:
    """What to give for a type."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(parts)
    if type(None) in parts:
        return f"{words(parts[0])}, or nothing"
    return KINDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


@functools.cache
def hints_of(cls: type) -> dict[str, object]:
    """Field -> type, paths told apart from other texts."""
    return typing.get_type_hints(cls, include_extras=True)


@dataclass_transform(frozen_default=True)
def settings(cls: Class) -> Class:
    """Make a frozen dataclass that checks its values against its types, in notebooks too, without a command line.

    A list may be given for a tuple and the other way round, a whole number for a number, a path object for a path.
    """
    check = cls.__post_init__ if hasattr(cls, "__post_init__") else None

    def __post_init__(self: Any) -> None:
        for name, hint in hints_of(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, fitted(value, hint))
            except TypeError:
                known = typing.get_type_hints(type(self))[name]
                raise UserError(f"{name} of {type(self).__name__} is {shown(value)}; give {words(known)}") from None
        if check is not None:
            check(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cast(Class, dataclasses.dataclass(frozen=True)(cls))


HUB, HUB_ROWS = "hf://", "hf://datasets/"
"""How the names of models and of rows on the Hugging Face Hub begin."""

SCHEMES = {"gs": "gs://BUCKET/NAME", "hf": "hf://OWNER/NAME, of rows hf://datasets/OWNER/NAME/FILE"}
"""How a path begins that names no file of this machine -> how the whole of it is written."""


def path_text(path: str) -> str:
    """A path as somebody gave it, with the home directory for a leading ~ or ~user.

    Raises:
        UserError: it is of a kind that nothing here reads, such as s3://bucket/name, or has one slash for two.
    """
    scheme = re.match("([A-Za-z][A-Za-z0-9]+):/", path)
    if scheme and not re.match("(gs|hf)://", path) and not os.path.exists(path):
        cure = SCHEMES.get(scheme[1].lower(), f"a path of this machine, or {' or '.join(SCHEMES.values())}")
        raise UserError(f"{path}: nothing of that kind is read or written here; write {cure}")
    return os.path.expanduser(path)


def fitted(value: Any, hint: object) -> object:
    """A value as an instance of a type.

    Raises:
        TypeError: it does not fit.
    """
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is PathText:
        path = os.fspath(value)
        if not isinstance(path, str) or "\0" in path:
            raise TypeError
        return path_text(path)
    if kind in (list, tuple) and isinstance(value, (list, tuple)):
        return kind(fitted(item, parts[0]) for item in value)
    if type(None) in parts:
        return None if value is None else fitted(value, parts[0])
    numeric = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is int and numeric and isinstance(value, numbers.Integral):
        return int(value)
    if hint is float and numeric:
        return value if isinstance(value, (int, float)) else float(value)
    if kind is Literal:
        fits = isinstance(value, str) and value in parts
    else:
        fits = hint not in (int, float) and isinstance(hint, type) and isinstance(value, hint)
    if not fits:
        raise TypeError
    return value
