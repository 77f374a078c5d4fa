"""How far a run is: a bar on a terminal, else a plain line now and then, so that a log can be read."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping

from tqdm import tqdm

from rlhf_jax.errors import named, printable

EVERY = 30.0
"""Seconds between two plain lines."""

COLUMNS = 100
"""Of a notebook's cell, which does not say how wide it is."""

FORMAT = "{desc} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix} |{bar}|"
"""Numbers first: on a narrow terminal the bar goes, not they."""

OPEN: weakref.WeakSet[Progress] = weakref.WeakSet()


def close_bars() -> None:
    """End the progress bars that an error or Ctrl-C left open, so that a message gets a line of its own."""
    with contextlib.suppress(OSError):  # the terminal may have gone
        for progress in list(OPEN):
            progress.close()


def write(text: str) -> None:
    """A line on standard output, above the bar if there is one."""
    with contextlib.suppress(OSError):  # nobody may be there to read it, after SIGHUP
        tqdm.write(printable(named(text), lines=True))


class Progress:
    """Steps done of `total`, and the newest values. A bar where standard error is a terminal, or in a notebook, and
    `bar` asks for one; else `say` is given a line every EVERY seconds, before the first step too, which compiles, and
    nothing for what takes less.
    """

    def __init__(self, name: str, total: int, start: int, *, bar: bool, say: Callable[[str], None] | None):
        """`start` steps were done before. Without `say` there are no lines."""
        self.name, self.total, self.done, self._say = name, total, start, say
        self._values, self._what, self._moved = "", "compiling", threading.Event()
        self._began = self._said = time.monotonic()
        self._first: tuple[int, float] | None = (
            None  # steps and time once one was done; it compiled, the others do not
        )
        self._bar: tqdm | None = None
        # In a cell of a notebook, which is no terminal, a carriage return begins its line anew as well.
        cell = type(sys.stdout).__module__.partition(".")[0] == "ipykernel"
        if bar and (cell or sys.stderr.isatty()):
            self._bar = tqdm(
                total=total, initial=start, desc=name, bar_format=FORMAT, mininterval=0.5 if cell else 0.1,
                file=sys.stdout if cell else sys.stderr, ncols=COLUMNS if cell else None, dynamic_ncols=not cell,
            )  # fmt: skip
        elif say is not None and start < total:
            threading.Thread(target=_wait, args=(weakref.ref(self), self._moved), daemon=True).start()
        OPEN.add(self)

    def update(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self.done += steps
        self._moved.set()
        now, first = time.monotonic(), self._first
        self._first = first or (self.done, now)
        if self._bar is not None:
            self._bar.update(steps)
        elif self._say is not None and now - self._said >= EVERY:
            self._said, pace = now, f"the first after {now - self._began:.3g} s"
            if first is not None:
                each = (now - first[1]) / max(self.done - first[0], 1)
                pace = f"{each:.3g} s each, {tqdm.format_interval(each * (self.total - self.done))} left"
            self._say(f"{self.name}: {self.done} of {self.total}, {pace}{self._values}")

    def values(self, numbers: Mapping[str, float]) -> None:
        """The newest values, by name."""
        short = {n: tqdm.format_sizeof(v) if abs(v) >= 1000 else f"{v:.3g}" for n, v in numbers.items()}
        self._values = "".join(f", {name} {value}" for name, value in short.items())
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(f"{name} {value}" for name, value in short.items()))

    def doing(self, what: str) -> None:
        """What takes its time now, while no step is done; a line of it where all steps of a long command are."""
        self._what = what
        if self._bar is not None:
            self._bar.set_postfix_str(what)
        elif self._say is not None and self.done == self.total and time.monotonic() - self._began >= EVERY:
            self._say(f"{self.name}: {self.done} of {self.total}, {what}")

    def close(self) -> None:
        """End the bar, if it has not ended."""
        self._moved.set()
        if self._bar is not None:
            self._bar.close()

    def waited(self) -> None:
        """A line of what takes its time before the first step is done."""
        if self._say is not None:
            waited = time.monotonic() - self._began
            self._say(f"{self.name}: {self.done} of {self.total}, {self._what}, {waited:.0f} s so far")


def _wait(progress: weakref.ref[Progress], moved: threading.Event) -> None:
    """Every EVERY seconds until the first step, or until nobody holds the progress any more."""
    while not moved.wait(EVERY) and (one := progress()) is not None:
        one.waited()
        del one
