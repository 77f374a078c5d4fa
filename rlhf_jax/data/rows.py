"""A row of data as it is read, what it is by the fields that it has, and what is said of a bad one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from rlhf_jax.errors import UserError, shown, tell
from rlhf_jax.hosts.json_text import to_json

if TYPE_CHECKING:
    from rlhf_jax.data.ballots import Ranking

Row = dict[str, Any]
"""One object of a file or a list: fields as JSON has them, and "_where", the file and line that it comes from."""


EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".txt", ".txt.gz", ".parquet")
"""Endings of files of rows."""


class DroppedRow(UserError):
    """A row that is well-formed but holds nothing to learn from; loaders count it and go on.

    `message` is the full sentence, with file:line; `reason` what follows a count, such as "with an empty turn".
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def require(row: Row, names: tuple[str, ...], expected: str) -> None:
    """Raise a UserError that says what was `expected` if a row lacks one of these fields."""
    if missing := [name for name in names if name not in row]:
        there = ", ".join(name for name in row if name != "_where") or "nothing"
        raise bad_row(row, f'no field "{missing[0]}" (found: {there}); {expected}')


def type_of(value: object) -> str:
    """What a value is, for an error."""
    return "null" if value is None else f"a {type(value).__name__}"


def where_of(row: Row) -> str:
    return row.get("_where", "a row")


def bad_row(row: Row, message: str) -> UserError:
    return UserError(f"{where_of(row)}: {message}")


def empty_row(row: Row, message: str, reason: str) -> DroppedRow:
    """The error for a row with nothing to learn from, counted as `reason`."""
    return DroppedRow(f"{where_of(row)}: {message}; fix or remove the row", reason)


class Joined(dict[str, Any]):
    """A row {prompt} that `gathering.gather` has made of several; no field that a file holds can make one."""

    def __init__(self, fields: Row, rankings: list[Ranking]):
        super().__init__(fields)
        self.rankings = rankings


LAYOUTS = (
    ("ranking", {"responses"}),
    ("preference", {"prompt", "chosen", "rejected"}),
    ("preference with its prompt in both", {"chosen", "rejected"}),
    ("stepwise supervision", {"completions", "labels"}),
    ("unpaired preference", {"prompt", "completion", "label"}),
    ("unpaired preference", {"prompt", "response", "label"}),
    ("unpaired preference", {"messages", "label"}),
    ("rating", {"prompt", "completion", "rating"}),
    ("rating", {"prompt", "response", "rating"}),
    ("rating", {"messages", "rating"}),
    ("prompt-completion", {"prompt", "completion"}),
    ("prompt-completion", {"prompt", "response"}),
    ("messages", {"messages"}),
    ("prompt-only", {"prompt"}),
    ("text", {"text"}),
)
"""Kind of row -> its fields; the first that a row has all of, and its other fields are no part of it. The names are
those of TRL's dataset types."""

RANKINGS = ("joined ranking", "ranking")
PREFERENCES = ("preference", "preference with its prompt in both")
ANSWERS = ("unpaired preference", "rating", "prompt-completion", "messages")
"""Kinds of rows with one answer to a prompt."""


def layout_of(row: Row) -> str:
    """The kind of a row; "unknown" if it is none."""
    if isinstance(row, Joined):
        return "joined ranking"
    return next((name for name, names in LAYOUTS if names <= set(row)), "unknown")


ALWAYS = {"prompt", "id", "item", "tools", "documents", "chat_template_kwargs", "_where"}
BESIDE = {
    **{kind: {"votes", "margin", "finished", "rater", "chosen_ids", "rejected_ids"} for kind in PREFERENCES},
    **{kind: {"finished", "response_ids", "rater"} for kind in ANSWERS},
    "ranking": {"rater", "raters", "ranks", "scores", "best"},
}
READ = {
    kind: ALWAYS.union(BESIDE.get(kind, set()), *(names for name, names in LAYOUTS if name == kind))
    for kind in {name for name, _ in LAYOUTS}
}
"""Kind of row -> the fields that are read of it, and names of rows: others are not, but of prompts, whose fields are
columns."""

OF_SCORES = {f"{name}{side}" for name in ("score", "scores") for side in ("", "_chosen", "_rejected")} | {"cut"}
"""Fields that `score` writes."""
OF_ANSWERS = set().union(*READ.values(), OF_SCORES) - {"prompt", "id", "item", "text"}
OF_ANSWERS |= {"gold", "information", "verdicts", "sources"}
"""Fields that say what the answers of a row are, how good these are, or what its template was given."""


def carried(row: Row) -> Row:
    """The fields of a row that rows with other answers to its prompt keep: all but OF_ANSWERS and what JSON cannot
    hold."""
    return {name: value for name, value in row.items() if name not in OF_ANSWERS and _is_json(value)}


def _is_json(value: object) -> bool:
    try:
        return isinstance(value, str) or bool(to_json(value))
    except UserError:
        return False


def tell_left(rows: Sequence[Row], kept: Callable[[Row], Set[str]]) -> None:
    """Say on standard error which fields of rows are not among those `kept`, if any."""
    lost = ((row, row.keys() - kept(row) - {"_where"}) for row in rows)
    if left := Counter(name for row, names in lost for name in sorted(names) if row[name] is not None):
        why = "fields that are not carried along, being of other answers, no JSON or names of ours"
        tell(f"{why}: {counts_of(left)}; rename what should be", error=True)


def tell_anew(rows: Sequence[Row], names: Set[str]) -> None:
    """Say on standard error which of the fields that are written anew rows have already."""
    if old := Counter(name for row in rows for name in sorted(names & row.keys()) if row[name] is not None):
        tell(f"fields that are written anew, the old ones are not kept: {counts_of(old)}", error=True)


def counts_of(names: Mapping[str, int]) -> str:
    """Names of fields and how many rows have each, in words."""
    return ", ".join(f"{shown(name)} of {count}" for name, count in names.items())


def unread_of(row: Row) -> list[str]:
    """The fields of a row that nothing reads; none of a row of unknown kind, which is refused."""
    return [str(name) for name in row if name not in READ.get(layout_of(row), row)]
