"""Updates whose loss or gradient was not finite: they changed nothing, and too many in a row stop the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.runs.checkpoint import Checkpoints

Noted = tuple[int, jax.Array, int]
"""A step, how many of its updates were skipped (a scalar on the devices), and how many there were."""


class Skips:
    """Counts them as their numbers come to the host.

    Attributes:
        total: skipped updates so far.
        streak: steps in a row, up to the last one, without any update that was not skipped.
        rows_of: i -> where the rows of batch i come from, for messages.
        drawn: the same of batches that are no function of i.
    """

    def __init__(self, most: int, checkpoints: Checkpoints):
        """A streak of `most` (faults.max_skipped; 0: none) raises; the message names a checkpoint from before it."""
        self.most, self.checkpoints = most, checkpoints
        self.total = self.streak = 0
        self.rows_of: Callable[[int], list[str]] = lambda i: []
        self.drawn: dict[int, list[str]] = {}
        self._noted: list[Noted] = []

    def note(self, step: int, skipped: jax.Array, updates: int) -> None:
        """Remember a step, whose count stays on the devices."""
        self._noted.append((step, skipped, updates))

    def take(self) -> list[Noted]:
        """The steps noted since the last call, for who fetches their counts and calls `count`."""
        noted, self._noted = self._noted, []
        return noted

    def settle(self) -> None:
        """Fetch and count what is noted."""
        noted = self.take()
        self.count(noted, jax.device_get([skipped for _, skipped, _ in noted]))

    def count(self, noted: Sequence[Noted], counts: Sequence[np.ndarray]) -> None:
        """Count steps whose numbers have come to the host.

        Raises:
            UserError: no update was finite for faults.max_skipped steps.
        """
        for (step, _, updates), count in zip(noted, counts, strict=True):
            self.total += int(count)
            self.streak = self.streak + 1 if count >= updates else 0
            if not self.streak == self.most > 0:
                continue
            good = [kept for kept in self.checkpoints.steps() if kept <= step - self.streak]
            where = f"the last checkpoint before is of step {good[-1]}" if good else "there is no checkpoint before"
            raise UserError(
                f"step {step}: loss or gradient was not finite in {self.streak} steps in a row (faults.max_skipped); "
                f"rows {self.rows(step)}; {where}; lower optim.learning_rate or find the operation with "
                "--faults.debug_nans true"
            )

    def rows(self, step: int) -> str:
        """Where the rows of a step come from."""
        return ", ".join(self.drawn.get(step - 1) or self.rows_of(step - 1))
