"""Where the time of a run goes: seconds of the parts of its steps, without a wait of the host for the devices."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import defaultdict, deque
from queue import SimpleQueue
from typing import Any, Protocol

import jax

LATEST = 1000
"""Times of a part that are kept."""

ASIDE = ("start", "evaluation")
"""Parts in which no token is trained on."""


class Mark(Protocol):
    """Says that a part has ended: when the arrays that it makes are there, or without any, now."""

    def __call__(self, name: str, made: Any = None) -> None: ...


def unmarked(name: str, made: Any = None) -> None:
    """A mark of which nobody keeps the time."""


class Parts:
    """Every mark ends a part, which began when the one before ended; the devices make things in the order of marks.

    A thread waits for the arrays, so that what is dispatched after them need not. What the host does while the devices
    are busy with an earlier part takes no time of its own.

    Attributes:
        marked: how many marks there were.
        total: seconds of each part that was taken.
        latest: seconds of the latest marks of each part, up to LATEST.
    """

    def __init__(self) -> None:
        self.marked, self.total = 0, defaultdict[str, float](float)
        self.latest = defaultdict[str, deque[float]](lambda: deque(maxlen=LATEST))
        self._taken, self._since = 0, 0.0
        self._marks: SimpleQueue[tuple[str, Any, float] | None] = SimpleQueue()
        self._spent: SimpleQueue[tuple[str, float]] = SimpleQueue()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Start the clock of the first part."""
        self._since = time.perf_counter()
        self._thread.start()

    def mark(self, name: str, made: Any = None) -> None:
        """A `Mark`; the arrays may be deleted meanwhile."""
        self.marked += 1
        self._marks.put((name, made, time.perf_counter()))

    def take(self, marked: int) -> dict[str, float]:
        """Seconds by part of the first so many marks, without those that were taken before; waits for their arrays."""
        spent = defaultdict[str, float](float)
        while self._taken < marked:
            name, seconds = self._spent.get()
            spent[name] += seconds
            self.total[name] += seconds
            self.latest[name].append(seconds)
            self._taken += 1
        return dict(spent)

    def shares(self) -> str:
        """What was taken so far, the largest first, as "rollout 61%, update 30%, score 9%"."""
        whole = sum(self.total.values()) or 1.0
        parts = sorted(((name, seconds / whole) for name, seconds in self.total.items()), key=lambda part: -part[1])
        return ", ".join(f"{name} {share:.0%}" for name, share in parts if share >= 0.005)

    def usual(self) -> dict[str, float]:
        """The median of the latest seconds of each part: a first time, with the compiler in it, is an outlier."""
        return {name: statistics.median(seconds) for name, seconds in self.latest.items()}

    def close(self) -> None:
        """End the thread."""
        if self._thread.is_alive():
            self._marks.put(None)
            self._thread.join(10.0)  # of a program that hangs nobody waits

    def _watch(self) -> None:
        while (mark := self._marks.get()) is not None:
            name, made, now = mark
            if made is not None:
                with contextlib.suppress(RuntimeError):  # deleted, or a program that failed: the loop meets it
                    jax.block_until_ready(made)
                now = time.perf_counter()
            self._spent.put((name, max(now - self._since, 0.0)))
            self._since = max(now, self._since)
