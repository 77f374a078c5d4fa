"""Votes: rows {item, rater, prompt, responses, ranks}, one of each rater on each item, joined to rankings."""

from __future__ import annotations

from collections import Counter

from rlhf_jax.data.rows import Row, bad_row, counts_of, where_of
from rlhf_jax.errors import tell

VOTE = {"item", "rater", "prompt", "responses", "ranks"}
"""A row with all of these fields is a vote: one rater's ranks of the responses of one item."""
ABOUT_THE_VOTE = ("rater", "ranks", "comment", "all_bad", "skipped", "check")
RATING = "rating_"
"""How the columns of a vote begin that rate each of the responses, as rating_helpful: [7, 2]."""
OF_A_VOTE = {*VOTE, *ABOUT_THE_VOTE, "order", "seconds", "time"}
"""All that a vote says itself."""


def join_votes(rows: list[Row]) -> list[Row]:
    """The votes on one item as one row {prompt, responses, raters: [{rater, ranks, ...}]}, in the place of the first.

    Of several votes of a rater on an item the last one counts: it is a change of mind. Those of nobody in particular
    (rater null or empty) all do. What they carry along the first one says, of the responses too (`ids`, `strength`):
    a rater saw their texts alone. Fields in which others differ are counted. Other rows stay as they are.

    Raises:
        UserError: two votes on one item that differ in the prompt, or in what a rater saw of the responses.
    """
    joined: dict[str, tuple[Row, Row, dict[object, Row]]] = {}  # item -> its first vote, the row made, rater -> vote
    out: list[Row] = []
    differ: Counter[str] = Counter()
    for row in rows:
        if not set(row) >= VOTE or row["item"] is None:
            out.append(row)
            continue
        item = str(row["item"])
        if item not in joined:
            made = {"prompt": row["prompt"], "responses": row["responses"], "item": item, "_where": where_of(row)}
            made = beside_vote(row) | made
            joined[item] = row, made, {}
            out.append(made)
        first, _, votes = joined[item]
        these, those = _responses(first), _responses(row)
        if row["prompt"] != first["prompt"] or list(map(_seen, these)) != list(map(_seen, those)):
            raise bad_row(row, f'another prompt or responses than {where_of(first)}, but both are item "{item}"')
        pairs = zip([beside_vote(first), *these], [beside_vote(row), *those], strict=True)
        differ.update({name for a, b in pairs for name in (a | b).keys() - {"_where"} if a.get(name) != b.get(name)})
        about = [*ABOUT_THE_VOTE, *(name for name in row if name.startswith(RATING))]
        votes[str(row["rater"]) if row["rater"] else len(votes)] = {name: row[name] for name in about if name in row}
    for _, made, votes in joined.values():
        made["raters"] = list(votes.values())
    counted = sum(len(made["raters"]) for _, made, _ in joined.values())
    if changed := len(rows) - len(out) + len(joined) - counted:
        tell(f"{changed} votes do not count, their raters having changed them later", error=True)
    if differ:
        what = "fields in which votes are not as the first on their item, which counts"
        tell(f"{what}: {counts_of(dict(sorted(differ.items())))}", error=True)
    return out


def _responses(vote: Row) -> list[Row]:
    """The responses of a vote as rows {text, ...}."""
    given = vote["responses"] if isinstance(vote["responses"], list) else [vote["responses"]]
    return [each if isinstance(each, dict) and "text" in each else {"text": each} for each in given]


def _seen(response: Row) -> tuple[object, bool]:
    """What a rater saw of a response: the text, and whether it was cut off."""
    return response["text"], response.get("finished") in (None, True)


def beside_vote(row: Row) -> Row:
    """The fields of a row that a vote on it carries along: all that no vote says itself."""
    return {name: row[name] for name in row if name not in OF_A_VOTE and not name.startswith(RATING)}
