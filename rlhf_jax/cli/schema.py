"""The JSON schema of a command's YAML, for editors and checks outside of this library."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from types import NoneType
from typing import Any, Literal

from rlhf_jax.cli.commands import COMMANDS, Hint
from rlhf_jax.hosts.json_text import JsonObject

PLAIN = {int: "integer", float: "number", bool: "boolean", str: "string", NoneType: "null"}


def schema_of(command: str) -> JsonObject:
    """The schema, of draft 2020-12, of what a file for `--config` of a command may hold.

    It knows types and choices; ranges, and what excludes what, are known to the command alone.
    """
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"rlhf-jax {command}"}
    return {**head, **of_group(COMMANDS[command].args)}


def of_group(cls: type[Any]) -> JsonObject:
    """Of a class of settings."""
    about, hints, properties = described(cls), typing.get_type_hints(cls), JsonObject()
    for one in dataclasses.fields(cls):
        factory = one.default_factory
        default = one.default if factory is dataclasses.MISSING else factory()
        properties[one.name] = of_type(hints[one.name])
        if one.name in about:
            properties[one.name]["description"] = about[one.name]
        if default is not dataclasses.MISSING and not dataclasses.is_dataclass(default):
            properties[one.name]["default"] = list(default) if isinstance(default, tuple) else default
    text = (inspect.getdoc(cls) or "").partition("\n")[0]
    return {"type": "object", "description": text, "properties": properties, "additionalProperties": False}


def of_type(hint: Hint) -> JsonObject:
    """Of the type of a field."""
    parts, origin = typing.get_args(hint), typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return of_group(hint)
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in (list, tuple):
        return {"type": "array", "items": of_type(parts[0])}
    if parts:
        return {"anyOf": [of_type(part) for part in parts]}
    return {"type": PLAIN[hint]} if hint in PLAIN else {}


def described(cls: type[Any]) -> dict[str, str]:
    """Field -> what the docstrings of a class of settings and of its bases say of it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, arguments = (inspect.cleandoc(base.__doc__ or "")).partition("Args:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", arguments, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found
