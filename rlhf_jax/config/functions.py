"""Functions by name, and configs as plain dicts."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from rlhf_jax.errors import UserError, reason


def resolve(name: str) -> Callable[..., Any]:
    """The function that "package.module:name" points to; the working directory is searched too.

    Raises:
        UserError: the text has no colon, the module does not import, or it has no such callable.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute) or module_name.startswith("."):
        raise UserError(f'{name!r} names no function; write it as "package.module:function"')
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{name!r}: {error}; check the spelling or run where the module lies") from error
    except (Exception, SystemExit) as error:  # whatever the module's code raises
        raise UserError(f"{name!r}: importing it failed ({type(error).__name__}: {reason(error)}); mend it") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"{name!r}: module {module_name} has no function {attribute!r}; check the spelling")
    return found


def bind(function: str | Callable[..., Any], config: Any) -> Callable[..., Any]:
    """A loss by name or as it is, its keyword-only arguments filled from the config fields of the same name.

    Raises:
        UserError: a keyword-only argument without default that the config has no field for.
    """
    function = resolve(function) if isinstance(function, str) else function
    known = {f.name for f in dataclasses.fields(config)}
    filled = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or name in getattr(function, "keywords", {}):
            continue  # a functools.partial has chosen its own value
        if name in known:
            filled[name] = getattr(config, name)
        elif parameter.default is parameter.empty:
            raise UserError(
                f"{getattr(function, '__name__', function)} asks for {name!r}, which {type(config).__name__} does not "
                "have; give it a default or a field"
            )
    return functools.partial(function, **filled)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain dicts, every field present; `config.yaml` of a run is this."""
    return dataclasses.asdict(config)
