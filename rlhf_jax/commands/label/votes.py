"""The file of answers: appended and flushed to the disk one by one, mended after a crash, read back at the start."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

import numpy as np

from rlhf_jax.commands.label.items import Item
from rlhf_jax.data import rankings
from rlhf_jax.data.agreement import agreement, krippendorff_alpha, rater_taus
from rlhf_jax.data.rows import Row
from rlhf_jax.data.sources import read_rows
from rlhf_jax.data.votes import RATING, VOTE
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.files import Lines, hold_lines, mend
from rlhf_jax.hosts.json_text import JsonObject

START = b'{"item": "'
"""How every line begins."""


class Votes:
    """The answers to some items, by item and rater; the last one counts.

    Attributes:
        latest: (item key, rater) -> the vote.
        mended: bytes of a last line that a crash cut short, taken away.
    """

    def __init__(self, path: str, items: list[Item]):
        """Open the file or make it.

        Raises:
            UserError: it cannot be written, another process writes it, or it holds something else.
        """
        self.items = {item.key: item for item in items}
        self.latest: dict[tuple[str, str], Row] = {}
        self._one_at_a_time = threading.Lock()
        if Path(path).is_dir():
            raise UserError(f"output {path} is a directory; name a .jsonl file")
        self._held = hold_lines(path, "`rlhf-jax label`", "stop that one first")
        try:
            self.mended = mend(Path(path), START, "answer of `rlhf-jax label`")
            self._lines = Lines(Path(path))
            for row in read_rows(path) if Path(path).stat().st_size else []:
                self._check(row, path)
                self.latest[row["item"], row["rater"]] = {name: row[name] for name in row if name != "_where"}
        except UserError:
            self.close()
            raise

    def _check(self, row: Row, path: str) -> None:
        named = all(isinstance(row.get(name), str) for name in ("item", "rater"))
        if not (named and set(row) >= VOTE | {"order", "all_bad", "skipped", "comment"}):
            raise UserError(f"{row['_where']}: not an answer of `rlhf-jax label`; choose another --output")
        item = self.items.get(row["item"])
        if item is None:
            raise UserError(
                f"{row['_where']}: an answer to an item that the rows do not hold; {path} belongs to other rows, so "
                "choose another --output"
            )
        for name in ("ranks", *(name for name in row if name.startswith(RATING))):
            if not isinstance(row[name], list) or len(row[name]) != len(item.names):
                raise UserError(f"{row['_where']}: {name} has no entry for each response; remove the line")

    def add(self, vote: Row) -> None:
        """Append a vote; it is on disk when this returns.

        Raises:
            OSError: it is not.
        """
        with self._one_at_a_time:
            self._lines.add([vote], sync=True)
            self.latest[vote["item"], vote["rater"]] = vote

    def close(self) -> None:
        """Let other processes have the file."""
        self._held.close()

    def of(self, rater: str) -> dict[str, Row]:
        """Item key -> what a rater said."""
        with self._one_at_a_time:
            return {item: vote for (item, name), vote in self.latest.items() if name == rater}

    def raters(self) -> list[str]:
        """Who has answered anything, in the order of their first answer."""
        with self._one_at_a_time:
            return list(dict.fromkeys(rater for _, rater in self.latest))

    def checks(self, rater: str) -> tuple[int, int]:
        """(attention checks that a rater passed, those that the rater answered)."""
        said = [vote["check"]["passed"] for vote in self.of(rater).values() if vote.get("check")]
        return sum(said), len(said)

    def agreement(self) -> JsonObject:
        """How far raters agree.

        {share, pairs, alpha} over all verdicts on the same two responses by two raters, alpha being Krippendorff's,
        and for each rater {answers, skipped, tau, pairs}: Kendall's tau-b with all others together, and the pairs of
        verdicts behind it; None without any. Answers to attention checks have no part in it.
        """
        with self._one_at_a_time:
            latest = dict(self.latest)
        names = list(dict.fromkeys(rater for _, rater in latest))
        groups: dict[str, int] = {}
        ballots: list[rankings.Ballot] = []
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for (item, rater), vote in latest.items():
            counts[rater][bool(vote.get("skipped"))] += 1
            ranks = [np.nan if rank is None else float(rank) for rank in vote["ranks"]]
            ballots.append((groups.setdefault(item, len(groups)), names.index(rater), ranks))
        verdicts = rankings.comparisons(ballots, num_raters=len(names))
        share, total = agreement(verdicts)
        alpha = krippendorff_alpha(verdicts)
        taus, pairs = rater_taus(verdicts)
        return {
            "share": share if total else None,
            "pairs": total,
            "alpha": None if np.isnan(alpha) else alpha,
            "raters": [
                {
                    "rater": name,
                    "answers": counts[name][0],
                    "skipped": counts[name][1],
                    "tau": None if np.isnan(taus[i]) else float(taus[i]),
                    "pairs": int(pairs[i]),
                }
                for i, name in enumerate(names)
            ],
        }
