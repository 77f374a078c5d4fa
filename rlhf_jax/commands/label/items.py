"""Rows as items to rank: what a rater may see of them, and in which order."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from rlhf_jax.config.label import MOST_RANKED
from rlhf_jax.data.ballots import Ranking, ranking_row, without_text
from rlhf_jax.data.gathering import join
from rlhf_jax.data.messages import Messages, in_words, key_of, split_transcript
from rlhf_jax.data.numbers import float_of, is_number
from rlhf_jax.data.rows import PREFERENCES, DroppedRow, Row, bad_row, carried, empty_row, layout_of
from rlhf_jax.data.schemas import kind_of
from rlhf_jax.hosts.json_text import JsonObject

AGAIN = "there already"
"""Why an item is left out that is equal to another."""


def digest(*parts: object) -> str:
    """A short name of some JSON, the same on every machine."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Item:
    """A prompt and its different responses.

    Attributes:
        key: a digest of both, equal for equal items.
        names: a digest of each response, by which the page calls it. The place of a response on the page says nothing
            about its place in the row, and nothing has to be turned back into row order.
        ranking: the row, without verdicts.
        known: of an attention check the ranks that are right, NaN where nothing is known; else None.
    """

    key: str
    names: list[str]
    ranking: Ranking
    known: np.ndarray | None = None

    def order(self, rater: str, seed: int) -> list[int]:
        """The order in which a rater sees the responses: random, and the same every time."""
        order = list(range(len(self.names)))
        random.Random(f"{seed} {self.key} {rater}").shuffle(order)
        return order

    def passes(self, ranks: list[int | None]) -> bool:
        """Whether the ranks of a rater have all known pairs in their order; a tie of two that differ has not."""
        known, said = np.asarray(self.known, np.float64), np.array(ranks, np.float64)
        better = known[:, None] < known[None, :]
        return bool((said[:, None] < said[None, :])[better].all())

    def shown(self, order: list[int]) -> JsonObject:
        """What a rater sees; where a response comes from is not said."""
        answers = self.ranking.answers
        return {
            "item": self.key,
            "turns": turns_of(self.ranking.prompt),
            "responses": [
                {"name": self.names[i], "text": key_of(answers[i].response).strip(), "finished": answers[i].finished}
                for i in order
            ],
        }


def turns_of(prompt: str | Messages) -> Messages:
    """A prompt as turns [{role, content}]; the role of plain text is "prompt"."""
    turns = split_transcript(prompt) if isinstance(prompt, str) else in_words(prompt)
    turns = [turn for turn in turns if turn["content"]]  # an open "Assistant:" at the end
    return turns or [{"role": "prompt", "content": str(prompt).strip()}]


def item_of(row: Row) -> Item:
    """The item of a row {prompt, responses} or a preference row; equal responses are one.

    Raises:
        DroppedRow: fewer than two different responses.
        UserError: a malformed row, or more responses than a person can rank.
    """
    if layout_of(row) not in ("ranking", *PREFERENCES):
        raise bad_row(
            row,
            f"a {kind_of(row)} row has no responses to compare; give {{prompt, responses}}, as `sample` rows joined",
        )
    ranking = replace(ranking_row({**row, "raters": []}), ballots=[], fields=carried(row))
    ranking = join([ranking], lambda _: "")[0]
    size = len(ranking.responses)
    if size < 2:
        raise empty_row(row, "all responses are the same", "with fewer than two different responses")
    if size > MOST_RANKED:
        raise bad_row(row, f"{size} responses are more than a person can rank; give at most {MOST_RANKED}")
    texts = [[key_of(answer.response), answer.finished] for answer in ranking.answers]
    return Item(digest(ranking.prompt, texts), [digest(each) for each in texts], ranking)


def check_of(row: Row) -> Item:
    """The attention check of a row whose ranks, or chosen and rejected, are the known answer.

    Raises:
        UserError: it is no item, or no two of its responses have a known order.
    """
    try:
        item = item_of(row)
        known = join([ranking_row(row)], lambda _: "")[0].consensus()[0]
    except DroppedRow as drop:
        raise bad_row(row, f"a check {drop.reason}; give responses of which one is known to be better") from drop
    if len(np.unique(known[~np.isnan(known)])) < 2:
        raise bad_row(row, "a check in which no response is known to be better than another; give ranks that differ")
    return replace(item, known=known)


def with_checks(items: list[Item], checks: list[Item], seed: int | str) -> list[Item]:
    """The items with a check at a random place of each of as many equal stretches."""
    rng, mixed = random.Random(f"{seed} checks"), list[Item]()
    known = {check.key: check for check in checks}
    left = [item for item in items if item.key not in known]
    for i, check in enumerate(known.values()):
        stretch = left[len(left) * i // len(known) : len(left) * (i + 1) // len(known)]
        stretch.insert(rng.randint(0, len(stretch)), check)
        mixed += stretch
    return mixed or left


def in_batch(items: list[Item], checks: list[Item], batch: int, batches: int, seed: int) -> list[Item]:
    """The items of one of `batches`, its share of all checks among them. What is a check anywhere is no item."""
    known = {check.key for check in checks}
    share = checks[len(checks) * batch // batches : len(checks) * (batch + 1) // batches]
    return with_checks([item for item in items if item.key not in known], share, f"{seed} {batch}")


def _little_information(row: Row) -> float:
    """Minus what `collect --select` says of a row; 0 of one that says nothing."""
    said = row.get("information")
    return -(float_of(said) or 0.0) if is_number(said) else 0.0


def items_of(rows: list[Row]) -> tuple[list[Item], Counter[str]]:
    """(the different items of all rows, the most informative first, else in their order; what is left out, counted).

    Raises:
        UserError: a malformed row.
    """
    items: dict[str, Item] = {}
    dropped: Counter[str] = Counter()
    for row in sorted(rows, key=_little_information):
        try:
            item = item_of(row)
        except DroppedRow as drop:
            dropped[drop.reason] += 1
            continue
        if items.setdefault(item.key, item) is not item:
            dropped[AGAIN] += 1
    return list(items.values()), dropped + without_text(rows)
