"""Field maps: rows of any shape to the rows that stages take; those of known data sets are in catalogue.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError

PLACE = re.compile(r"\{([\w.]+)\}")


def parse_fields(fields: Sequence[str]) -> dict[str, str]:
    """["prompt={question}", ...] as {"prompt": "{question}"}."""
    templates = {}
    for text in fields:
        name, equals, template = text.partition("=")
        if not (equals and name.strip() and PLACE.search(template)):
            raise UserError(f"data.fields {text!r} is no field map; write name={{field}}, as prompt={{question}}")
        templates[name.strip()] = template
    return templates


def map_row(row: Row, fields: Mapping[str, object]) -> Row:
    """A row with the mapped fields alone: {name} is a field, {name.part} a part of it, and text around them stays.

    A template that is one field keeps its type, so that lists of messages and numbers can be mapped too; one of text
    and a field that is null is null. A list or an object of templates becomes one of what they give; a number stays.
    """
    return {name: _fill(template, row) for name, template in fields.items()} | {"_where": row["_where"]}


def _fill(template: object, row: Row) -> object:
    if isinstance(template, list):
        return [_fill(part, row) for part in template]
    if isinstance(template, dict):
        return {name: _fill(part, row) for name, part in template.items()}
    if not isinstance(template, str):
        return template
    if whole := PLACE.fullmatch(template):
        return _part(row, whole[1])
    parts = {path: _part(row, path) for path in PLACE.findall(template)}
    if odd := next((path for path, part in parts.items() if isinstance(part, (list, dict))), ""):
        raise UserError(f'{row["_where"]}: "{odd}" is no text, and stands in one ({template!r}); map it alone')
    return None if None in parts.values() else PLACE.sub(lambda place: str(parts[place[1]]), template)


def _part(row: Row, path: str) -> object:
    value: object = row
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(k for k in row if k != "_where")
            raise UserError(f'{row["_where"]}: no field "{path}" (found: {there}); give data.fields that fit')
        value = value[name]
    return value


@cache
def catalogue() -> dict[str, Row]:
    """Name -> {about, stages, fields, configuration?} of data sets that are known to be useful."""
    return yaml.safe_load((Path(__file__).parent / "catalogue.yaml").read_text("utf-8"))


def entry_of(path: str) -> Row:
    """What the catalogue has of a path: the entry with the longest name that is the path's beginning, or {}."""
    parts = re.split(r"(?=[/:])", re.sub(r"@[^/]*", "", path))  # without split or revision
    names = ("".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((catalogue()[name] for name in names if name in catalogue()), {})
