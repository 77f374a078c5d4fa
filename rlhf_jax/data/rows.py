"""A row of data as it is read, and what is said of a bad one."""

from __future__ import annotations

from typing import Any

from rlhf_jax.errors import UserError

Row = dict[str, Any]
"""One object of a file or a list: fields as JSON has them, and "_where", the file and line that it comes from."""


class DroppedRow(UserError):
    """A row that is well-formed but holds nothing to learn from; loaders count it under `reason` and go on.

    Args:
        message: the full sentence, with file:line.
        reason: what follows a count, such as "with an empty turn".
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def require(row: Row, names: tuple[str, ...], expected: str) -> None:
    """Raise a UserError that says what was `expected` if a row lacks one of these fields."""
    missing = [name for name in names if name not in row]
    if missing:
        there = ", ".join(name for name in row if name != "_where") or "nothing"
        raise bad_row(row, f'no field "{missing[0]}" (found: {there}); {expected}')


def type_of(value: object) -> str:
    """What a value is, for an error."""
    return "null" if value is None else f"a {type(value).__name__}"


def where_of(row: Row) -> str:
    """The file and line of a row."""
    return row.get("_where", "a row")


def bad_row(row: Row, message: str) -> UserError:
    """The error for a row that is malformed."""
    return UserError(f"{where_of(row)}: {message}")


def empty_row(row: Row, message: str, reason: str) -> DroppedRow:
    """The error for a row with nothing to learn from, counted as `reason`."""
    return DroppedRow(f"{where_of(row)}: {message}; fix or remove the row", reason)
