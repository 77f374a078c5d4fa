"""The length limits of one load, applied to one row at a time."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_jax.config import DataConfig
from rlhf_jax.data.rows import DroppedRow, Row
from rlhf_jax.errors import UserError


@dataclass(frozen=True)
class Limits:
    """How long rows may be, and what becomes of those that are longer: the fields of `data` of these names.

    Attributes:
        max_prompt_length: of a prompt, in tokens.
        max_length: of prompt and response together; 0 where there are prompts alone.
        too_long: drop, truncate or error.
        strict: whether a dropped row is an error, for whatever reason it is dropped.
    """

    max_prompt_length: int
    max_length: int = 0
    too_long: str = "truncate"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.too_long not in ("drop", "truncate", "error"):
            raise UserError(f"too_long {self.too_long!r} is unknown; set data.too_long to drop, truncate or error")

    @classmethod
    def of(cls, data: DataConfig) -> Limits:
        """Those of a config."""
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
        cure = "raise it or set data.too_long=truncate"
        message = f"{row['_where']}: {what} tokens is over data.{name} = {limit}; {cure}"
        if self.too_long == "drop":
            raise DroppedRow(message, reason)
        if self.too_long == "error":
            raise UserError(message)
