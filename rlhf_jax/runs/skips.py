"""Updates that changed nothing: those not finite, of which too many in a row stop the run, and those of gradient 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.runs.checkpoint import Checkpoints

Counts = tuple[jax.Array, jax.Array]
"""How many updates of a step were not finite, and how many had a gradient of 0; scalars on the devices."""

Noted = tuple[int, Counts, int]
"""A step, its counts, and how many updates there were."""


class Skips:
    """Counts them as their numbers come to the host.

    Attributes:
        total: updates so far that were not finite.
        empty: updates so far whose gradient was 0.
        streak: steps in a row, up to the last one, without any update that was not skipped.
        rows_of: i -> where the rows of batch i come from, for messages.
        drawn: the same of batches that are no function of i.
    """

    def __init__(self, most: int, checkpoints: Checkpoints):
        """A streak of `most` (faults.max_skipped; 0: none) raises; the message names a checkpoint from before it."""
        self.most, self.checkpoints = most, checkpoints
        self.total = self.empty = self.streak = 0
        self.rows_of: Callable[[int], list[str]] = lambda i: []
        self.drawn: dict[int, list[str]] = {}
        self._noted: list[Noted] = []

    def note(self, step: int, counts: Counts, updates: int) -> None:
        """Remember a step, whose counts stay on the devices."""
        self._noted.append((step, counts, updates))

    def take(self) -> list[Noted]:
        """The steps noted since the last call, for who fetches their counts and calls `count`."""
        noted, self._noted = self._noted, []
        return noted

    def settle(self) -> None:
        """Fetch and count what is noted."""
        if noted := self.take():
            self.count(noted, jax.device_get([counts for _, counts, _ in noted]))

    def count(self, noted: Sequence[Noted], counts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Count steps whose numbers have come to the host.

        Raises:
            UserError: no update was finite for faults.max_skipped steps.
        """
        for (step, _, updates), (skipped, empty) in zip(noted, counts, strict=True):
            self.total, self.empty = self.total + int(skipped), self.empty + int(empty)
            self.streak = self.streak + 1 if skipped >= updates else 0
            if not self.streak == self.most > 0:
                self.drawn.pop(step - 1, None)
                continue
            good = [kept for kept in self.checkpoints.steps() if kept <= step - self.streak]
            where = f"the last checkpoint before is of step {good[-1]}" if good else "there is no checkpoint before"
            raise UserError(
                f"step {step}: loss or gradient was not finite in {self.streak} steps in a row (faults.max_skipped); "
                f"rows {self.rows(step)}; {where}; lower optim.learning_rate or find the operation with "
                "--faults.debug_nans true"
            )

    def remarks(self) -> list[str]:
        """A line about updates whose gradient was 0; none where there were none."""
        if not self.empty:
            return []
        return [
            f"{self.empty} updates had a gradient of 0 and changed nothing (optim/empty; a critic apart): they had no "
            "token to train on, their responses were all paid alike, or every ratio was clipped"
        ]

    def rows(self, step: int) -> str:
        """Where the rows of a step come from."""
        return ", ".join(self.drawn.get(step - 1) or self.rows_of(step - 1))
