"""Functions by name, and configs as plain dicts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from rlhf_jax.config.settings import Settings
from rlhf_jax.errors import UserError, reason

Config = TypeVar("Config", bound=Settings)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def texts(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every text in nested dicts and their lists that is not empty."""
    for name, value in flat(tree, prefix):
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, str) and item:
                yield name, item
            elif isinstance(item, (dict, list, tuple)):
                yield from texts({name: item})


def replace(config: Config, **changes: object) -> Config:
    """A copy of a (nested, frozen) config; keys are dotted paths with __ for the dot: replace(cfg, run__seed=1)."""
    for path, value in changes.items():
        first, _, rest = path.partition("__")
        value = replace(getattr(config, first), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: value})
    return config


class _Guard:
    """Finds no module, but refuses those at or below a directory."""

    def __init__(self, directory: Path):
        self.directory = Path(os.path.realpath(directory))

    def holds(self, place: str) -> bool:
        return Path(os.path.realpath(place)).is_relative_to(self.directory)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        spec = PathFinder.find_spec(name, path, target)
        places = [*(spec.submodule_search_locations or ()), *[spec.origin] * spec.has_location] if spec else []
        if any(place and self.holds(place) for place in places):
            raise UserError(
                f"module {name} lies in {self.directory}, and a run directory is data, not code; install the module, "
                "or move it to the directory that you are in"
            )


@contextlib.contextmanager
def no_code_below(directory: Path) -> Iterator[None]:
    """Import nothing from a directory, which may be anybody's: functions that it names are looked for in installed
    packages and in the working directory of this moment, unless that is a part of it.
    """
    guard, path = _Guard(directory), list(sys.path)
    sys.path[:] = [str(Path.cwd()), *(place for place in path if place)]
    sys.path[:] = [place for place in sys.path if not guard.holds(place)]
    sys.meta_path.insert(0, guard)
    try:
        yield
    finally:
        sys.meta_path.remove(guard)
        sys.path[:] = path


def resolve(name: str) -> Callable[..., Any]:
    """The function that "package.module:name" points to; the working directory is searched too.

    Raises:
        UserError: the text has no colon, the module does not import, or it has no such callable.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute) or module_name.startswith("."):
        raise UserError(f'{name!r} names no function; write it as "package.module:function"')
    guarded = any(isinstance(finder, _Guard) for finder in sys.meta_path)
    if "" not in sys.path and not guarded and module_name.partition(".")[0] != "rlhf_jax":
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{name!r}: {error}; check the spelling or run where the module lies") from error
    except (Exception, SystemExit) as error:  # whatever the module's code raises
        raise UserError(f"{name!r}: importing it failed ({type(error).__name__}: {reason(error)}); mend it") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{name!r}: module {module_name} has no function {attribute!r}; check the spelling")
    return function


def bind(function: str | Callable[..., object], config: Settings) -> Callable[..., Any]:
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


def to_dict(config: Settings) -> dict[str, Any]:
    """A config as nested plain dicts, every field present; `config.yaml` of a run is this."""
    return dataclasses.asdict(config)
