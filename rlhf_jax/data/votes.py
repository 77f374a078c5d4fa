"""Answers of raters as `rlhf-jax label` appends them, and one ranking row per item out of them."""

from __future__ import annotations

from rlhf_jax.data.rows import Row, bad_row, where_of

VOTE = {"item", "rater", "prompt", "responses", "ranks"}
"""A row with all of these fields is a vote: one rater's ranks of the responses of one item."""

ABOUT_THE_VOTE = ("rater", "ranks", "comment", "all_bad", "skipped")


def join_votes(rows: list[Row]) -> list[Row]:
    """The votes on one item as one row {prompt, responses, raters: [{rater, ranks, ...}]}, in the place of the first.

    Of several votes of a rater on an item the last one counts: it is a change of mind. Other rows stay as they are.

    Raises:
        UserError: two votes on one item that differ in prompt or responses.
    """
    joined: dict[str, tuple[Row, Row, dict[str, Row]]] = {}  # item -> its first vote, the row made, rater -> vote
    out: list[Row] = []
    for row in rows:
        if not set(row) >= VOTE:
            out.append(row)
            continue
        item = str(row["item"])
        if item not in joined:
            made = {"prompt": row["prompt"], "responses": row["responses"], "item": item, "_where": where_of(row)}
            joined[item] = row, made, {}
            out.append(made)
        first, _, votes = joined[item]
        if any(row[name] != first[name] for name in ("prompt", "responses")):
            raise bad_row(row, f'another prompt or responses than {where_of(first)}, but both are item "{item}"')
        votes[str(row["rater"])] = {name: row[name] for name in ABOUT_THE_VOTE if name in row}
    for _, made, votes in joined.values():
        made["raters"] = list(votes.values())
    return out
