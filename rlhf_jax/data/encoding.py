"""Rows to token ids within the limits of one load, and the report of what became of every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_jax.config import DataConfig
from rlhf_jax.data.rows import DroppedRow, Row, counts_of, unread_of, where_of
from rlhf_jax.data.schemas import Answer, kind_of
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

Example = dict[str, Any]
"""Small numpy arrays and numbers by name, and "where", the file and line that it comes from."""


def mark_of(lost: int, total: int) -> str:
    """What stands before a line that counts lost rows: "! " where they are more than a twentieth."""
    return "! " if lost > 0.05 * total else ""


@dataclass(frozen=True)
class Report:
    """What became of the rows: how many were kept, dropped for which reason, and cut; of which kinds they were.

    `remarks` counts what tokenising had to say, such as "responses whose ids were not of their text"; `unread` the
    rows that have a field that nothing reads, by its name.
    """

    kept: int
    dropped: dict[str, int]
    truncated: int
    kinds: dict[str, int] = field(default_factory=dict)
    note: str = ""
    remarks: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        """What stands before a line about it: "! " where more than a twentieth of the rows is lost or cut."""
        return mark_of(self.lost + self.truncated, self.kept + self.lost)

    @property
    def lost(self) -> int:
        """Rows that were dropped."""
        return sum(self.dropped.values())

    def __str__(self) -> str:
        """For instance: kept 812 of 815 rows; dropped 3 with an empty turn; truncated 0; read as 815 preference."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "0"
        total = self.kept + self.lost
        parts = [f"kept {self.kept} of {total} rows", f"dropped {reasons}", f"truncated {self.truncated}"]
        if self.kinds:
            parts.append("read as " + ", ".join(f"{count} {kind}" for kind, count in self.kinds.items()))
        parts += [f"{count} {remark}" for remark, count in self.remarks.items()]
        if self.unread:
            parts.append("fields not read: " + counts_of(self.unread))
        return "; ".join([*parts, self.note] if self.note else parts)


@dataclass(frozen=True)
class Limits:
    """How long rows may be, and what becomes of those that are longer: the fields of `data` of these names."""

    max_prompt_length: int  # in tokens
    max_length: int = 0  # of prompt and response together; 0 where there are prompts alone
    too_long: str = "truncate"  # drop, truncate or error
    strict: bool = False  # whether a dropped row is an error, for whatever reason it is dropped
    group: str = "data."  # what stands before the names of these options

    def __post_init__(self) -> None:
        if self.too_long not in ("drop", "truncate", "error"):
            raise UserError(f"too_long {self.too_long!r} is unknown; set data.too_long to drop, truncate or error")

    @classmethod
    def of(cls, data: DataConfig) -> Limits:
        return cls(data.max_prompt_length, data.max_length, data.too_long, data.strict)

    def prompt(self, row: Row, ids: list[int], bos_id: int | None) -> tuple[list[int], bool]:
        """(prompt ids within the limit, whether they were cut); the start is cut, but a leading bos survives."""
        limit = self.max_prompt_length
        if limit < 1:
            raise UserError(f"max_prompt_length {limit} leaves no prompt; set data.max_prompt_length to at least 1")
        if len(ids) <= limit:
            return ids, False
        self._refuse(row, f"a prompt of {len(ids)}", "max_prompt_length", limit, f"with a prompt over {limit} tokens")
        head = ids[:1] if ids[0] == bos_id and limit > 1 else []
        return head + ids[len(ids) - limit + len(head) :], True

    def response(self, row: Row, prompt_length: int, ids: list[int]) -> tuple[list[int], bool]:
        """(response ids that fit after the prompt, whether they were cut); the end is cut, with it the stop id."""
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"max_prompt_length {self.max_prompt_length} must be below max_length {self.max_length}, or a "
                "response has no room; set data.max_prompt_length or data.max_length"
            )
        total = prompt_length + len(ids)
        if total <= self.max_length:
            return ids, False
        self._refuse(row, f"{total}", "max_length", self.max_length, f"longer than {self.max_length} tokens")
        return ids[: self.max_length - prompt_length], True

    def _refuse(self, row: Row, what: str, name: str, limit: int, reason: str) -> None:
        """Raise unless rows are to be cut."""
        cure = f"raise it or set {self.group}too_long=truncate"
        message = f"{row['_where']}: {what} tokens is over {self.group}{name} = {limit}; {cure}"
        if self.too_long == "drop":
            raise DroppedRow(message, reason)
        if self.too_long == "error":
            raise UserError(message)


@dataclass(frozen=True)
class Encoder:
    """What makes rows token ids."""

    tokenizer: Tokenizer
    limits: Limits
    remarks: Counter[str] = field(default_factory=Counter)  # what tokenising has to say, counted

    def prompt(self, row: Row) -> tuple[list[int], bool]:
        """(ids of the row's prompt within the limit, whether they were cut)."""
        with naming(row):
            ids = self.tokenizer.encode_prompt(row["prompt"], self.remarks)
        return self.limits.prompt(row, ids, self.tokenizer.bos_id)

    def seen(self, ids: list[int], cut: bool) -> Row:
        """{prompt_seen} of a prompt that was cut, the text that its ids are; else {}."""
        return {"prompt_seen": self.tokenizer.seen(ids)} if cut else {}

    def response(self, row: Row, answer: Answer, prompt_length: int) -> tuple[list[int], bool]:
        """(ids of an answer to the row's prompt, as far as they fit after it, whether they were cut)."""
        (text, finished, sampled, _), remarks = answer, self.remarks
        with naming(row):
            ids = self.tokenizer.encode_response(text, row["prompt"], finished=finished, ids=sampled, remarks=remarks)
        return self.limits.response(row, prompt_length, ids)

    def sequences(self, row: Row, answers: Sequence[Answer]) -> tuple[list[np.ndarray], int, bool]:
        """(prompt and response of each answer as int32[n], the length of the prompt, whether something was cut)."""
        prompt, cut = self.prompt(row)
        sequences = []
        for answer in answers:
            if not isinstance(answer.response, str) and "weight" in answer.response[-1]:
                raise UserError(f'{row["_where"]}: a response has a "weight", which only sft knows; leave it out')
            ids, cut_response = self.response(row, answer, len(prompt))
            sequences.append(np.asarray(prompt + ids, np.int32))
            cut |= cut_response
        return sequences, len(prompt), cut


def collect(
    rows: list[Row],
    build: Callable[[Row], tuple[list[Example], bool]],
    *,
    strict: bool,
    note: str = "",
    remarks: Counter[str] | None = None,
    columns: bool = False,
) -> tuple[list[Example], Report]:
    """Examples of all rows and their report; build(row) -> (examples, whether something was cut).

    `remarks` is what `build` counts into. With `columns` all fields of a row are of use. A bad row is a UserError, a
    dropped one if `strict`, and that no row is left.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    truncated = 0
    for row in rows:
        try:
            built, cut = build(row)
        except DroppedRow as drop:
            if strict:
                raise UserError(f"{drop} (data.strict is true)") from drop
            dropped[drop.reason] += 1
            continue
        examples += [{**example, "where": row.get("_where", "")} for example in built]
        truncated += cut
    kinds, said = dict(Counter(map(kind_of, rows))), dict(+(remarks or Counter()))
    unread = {} if columns else unread_in(rows)
    report = Report(len(rows) - dropped.total(), dict(dropped), truncated, kinds, note, said, unread)
    if not examples:
        raise UserError(f"no row is left: {report}; raise data.max_length or mend the file")
    return examples, report


def unread_in(rows: Sequence[Row]) -> dict[str, int]:
    """Names of fields that nothing reads -> how many rows have them; null is none."""
    return dict(Counter(name for row in rows for name in unread_of(row) if row[name] is not None))


@contextmanager
def naming(row: Row) -> Iterator[None]:
    """A UserError within says which row it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where_of(row)}: {error}") from error
