"""Field maps: rows of any shape to the rows that stages take; those of known data sets are in catalogue.yaml."""

from __future__ import annotations

import re
from collections.abc import Sequence
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


def map_row(row: Row, fields: dict[str, str]) -> Row:
    """A row with the mapped fields alone: {name} is a field, {name.part} a part of it, and text around them stays.

    A template that is one field keeps its type, so that lists of messages and numbers can be mapped too.
    """
    return {name: _fill(template, row) for name, template in fields.items()} | {"_where": row["_where"]}


def _fill(template: str, row: Row) -> object:
    whole = PLACE.fullmatch(template)
    return _part(row, whole[1]) if whole else PLACE.sub(lambda place: str(_part(row, place[1])), template)


def _part(row: Row, path: str) -> object:
    value: object = row
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(k for k in row if k != "_where")
            raise UserError(f'{row["_where"]}: no field "{path}" (found: {there}); correct data.fields')
        value = value[name]
    return value


@cache
def catalogue() -> dict[str, Row]:
    """TFDS name -> {fields, split, about} of sets that are known to be useful."""
    return yaml.safe_load((Path(__file__).parent / "catalogue.yaml").read_text("utf-8"))
