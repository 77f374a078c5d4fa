"""What a row is by the fields that it has: the one place that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_jax.data.rows import Row

if TYPE_CHECKING:
    from rlhf_jax.data.ballots import Ranking


class Joined(dict[str, Any]):
    """A row {prompt} that `gathering.gather` has made of several; no field that a file holds can make one.

    Attributes:
        rankings: its rankings.
    """

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


def unread_of(row: Row) -> list[str]:
    """The fields of a row that nothing reads; none of a row of unknown kind, which is refused."""
    return [str(name) for name in row if name not in READ.get(layout_of(row), row)]
