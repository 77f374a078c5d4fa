"""JSON as this library writes it, ours and that of others as it reads it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from rlhf_jax.errors import UserError, reason, shown

UNSEEN_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that JSON may leave as they are, but that trouble terminals, readers of lines and UTF-8; see
`errors.UNSEEN`."""

JsonObject = dict[str, Any]
"""A JSON object as Python's dict."""


def to_json(value: object, indent: int | None = None) -> str:
    """JSON as other programs read it too: every file of ours is written with this.

    A number that is not finite is null, and another field beside it says which it was: {"loss": null, "loss_is":
    "nan"}. For a list that field tells of the first such number: {"losses": [0.5, null], "losses_is": "nan"}.
    Characters that cannot be seen, lone surrogates among them, are escaped; all others stay as they are. Arrays
    become lists, and dates the text of ISO 8601.

    Raises:
        UserError: JSON has no form for a part of it.
    """
    options: dict[str, Any] = {"indent": indent, "allow_nan": False, "ensure_ascii": False, "default": _plain}
    try:
        try:
            text = json.dumps(value, **options)
        except ValueError:
            text = json.dumps(_finite(json.loads(json.dumps(value, default=_plain)))[0], **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"this cannot be written as JSON ({reason(error)})") from error
    return UNSEEN_IN_JSON.sub(lambda unseen: f"\\u{ord(unseen[0]):04x}", text)


def _plain(value: object) -> object:
    for method in ("tolist", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"a {type(value).__name__} has no form there")


def _finite(value: Any) -> tuple[Any, str]:
    """A value of JSON with null for numbers that are not finite; "nan", "inf" or "-inf" if one of them stood in it
    outside of any field, for the field that it is the value of to say so."""
    if isinstance(value, float):
        return (value, "") if math.isfinite(value) else (None, str(value))
    if isinstance(value, list):
        parts = [_finite(item) for item in value]
        return [part for part, _ in parts], next((why for _, why in parts if why), "")
    if isinstance(value, dict):
        fields: JsonObject = {}
        for name, item in value.items():
            fields[name], why = _finite(item)
            if why:
                fields.setdefault(f"{name}_is", why)
        return fields, ""
    return value, ""


def from_json(text: str | bytes) -> Any:
    """What `to_json` was given, numbers that are not finite included (those within lists stay null)."""

    def restored(fields: JsonObject) -> JsonObject:
        lost = [name for name, value in fields.items() if value is None]
        for name in [name for name in lost if fields.get(f"{name}_is") in ("nan", "inf", "-inf")]:
            fields[name] = float(fields.pop(f"{name}_is"))
        return fields

    return json.loads(text, object_hook=restored)


def once(pairs: list[tuple[str, Any]]) -> JsonObject:
    """The object of these names and values.

    Raises:
        ValueError: a name comes twice, of which all but the last would be lost.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{shown(twice)} comes twice")
    return fields


def strict_json(text: str | bytes) -> Any:
    """JSON that somebody else wrote. No name may come twice, and NaN or Infinity is no number.

    Raises:
        ValueError: it is something else, or a number is too long.
        RecursionError: it is too deep.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)


def json_lines(rows: Sequence[object]) -> bytes:
    """Rows as JSON, a line each.

    Raises:
        UserError: JSON has no form for a part of a row, which is named if it knows where it came from.
    """
    lines = []
    for number, row in enumerate(rows):
        try:
            lines.append(to_json(row) + "\n")
        except UserError as error:
            where = row.get("_where", f"row {number}") if isinstance(row, dict) else f"row {number}"
            raise UserError(f"{where}: {error}; leave it out or give it as text") from error
    return "".join(lines).encode()
