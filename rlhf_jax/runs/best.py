"""Which evaluation of a run is the best; its weights are those of the checkpoint of its step, no second copy."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Best:
    """The best evaluation so far.

    Attributes:
        improvements: (step, value) of every evaluation that was the best of its time, both ascending.
    """

    def __init__(self, *, choose: bool):
        """Without `choose` (run.keep_best) no evaluation is better than a later one, and none is remembered."""
        self.choose = choose
        self.improvements: list[tuple[int, float]] = []

    @property
    def step(self) -> int | None:
        """Its step; None if there is none."""
        return self.improvements[-1][0] if self.improvements else None

    def keep(self, step: int, value: float) -> bool:
        """Whether to keep the parameters of this evaluation: of the highest finite `value` so far, or the last.

        The next `Run.save_if_due` saves them.
        """
        if not self.choose:
            return True
        if not math.isfinite(value) or (self.improvements and value <= self.improvements[-1][1]):
            return False
        self.improvements.append((step, value))
        return True

    def forget(self, step: int) -> None:
        """The evaluation of a step whose checkpoint is lost: the one before it is the best again."""
        self.improvements = [each for each in self.improvements if each[0] != step]

    def restore(self, improvements: Sequence[tuple[int, float | None]]) -> None:
        """What a checkpoint's record says of `improvements`."""
        self.improvements = [(step, v) for step, v in improvements if v is not None and math.isfinite(v)]
