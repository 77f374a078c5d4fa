"""Ctrl-C, SIGTERM and a lost terminal: as a flag that a loop looks at between steps, or as the end of the process.

A thread takes them from a wake-up descriptor, because Python's own handlers wait for the main thread to come back from
a long call into XLA, such as a compilation.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Watch:
    """Signals go to `in_main_thread`, once the main thread is in Python, and at once to `seen`, in a thread.

    Of two watches the later one has them until it is closed. A SIGHUP that is ignored, as it is under nohup, stays so.
    A SIGINT is taken even so: shells start background jobs with it ignored, and `kill -INT` should stop these too.
    Outside the main thread nothing is installed.

    Attributes:
        received: name of the first signal that a loop was asked to stop by; here one that had no step left to stop
            after, so that what comes next has to.
    """

    def __init__(self, *, install: bool = True):
        """Without `install` signals are left as they are."""
        below = in_force()
        self.received: str = below.received if below else ""
        self._installed = install and threading.current_thread() is threading.main_thread()
        if not self._installed:
            return
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        taken = [number for number in SIGNALS if not (number == signal.SIGHUP and nohup)]
        self._handlers = {number: signal.getsignal(number) for number in taken}
        self._thread = threading.Thread(target=self._read, name="interrupts", daemon=True)
        self._thread.start()
        self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in taken:
            signal.signal(number, self.in_main_thread)

    def in_main_thread(self, number: int, frame: FrameType | None) -> None:
        """What the main thread does after a signal."""

    def seen(self, number: int) -> None:
        """What is done at once."""

    def _read(self) -> None:
        while data := os.read(self._reader, 64):
            for number in data:
                if number in self._handlers and signal.getsignal(number) == self.in_main_thread:
                    self.seen(number)

    def close(self) -> None:
        """Put the handlers back that were there before."""
        if not self._installed:
            return
        self._installed = False
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)


def in_force() -> Watch | None:
    """The watch that has the signals, if one has."""
    watch = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return watch if isinstance(watch, Watch) else None


class Interrupts(Watch):
    """The first signal sets `received` and is said; the watch below has it, too, when this one is closed.

    The second ends the process at once, unless it is a SIGHUP: a terminal that closes, or a machine that shuts down,
    may send that one beside others. In a notebook the second one raises KeyboardInterrupt instead, as soon as it can.
    """

    def __init__(self, say: Callable[[str], None], *, install: bool = True):
        """`say` is told that the run is stopping, in the thread."""
        self._say, self._count, self._said = say, 0, False
        self._interactive = hasattr(sys, "ps1")
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        super().__init__(install=install)

    def in_main_thread(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.received = self.received or signal.Signals(number).name  # the thread may come later than the next step
        if self._interactive and self._count > 1:
            raise KeyboardInterrupt

    def seen(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        if not self._said:
            self._said = True
            self.received = self.received or signal.Signals(number).name
            with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
                self._say(f"{self.received}: finishing the step and saving; a second one stops at once")
        elif number != signal.SIGHUP and not self._interactive:
            end(number, "\n")

    def close(self) -> None:
        super().close()
        if below := in_force():
            below.received = below.received or self.received

    def _leave_terminal(self) -> None:
        """What is still to be said goes nowhere: to a terminal that is gone it would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


class Ending(Watch):
    """A signal ends the process at once, whatever it is in: a KeyboardInterrupt would wait for a compilation, be
    swallowed by a callback of the garbage collector, or break an extension module that is being loaded.
    """

    def seen(self, number: int) -> None:
        end(number)

    def at_last(self) -> None:
        """From here on the main thread does it, while the interpreter ends and no thread runs any more."""
        for number in self._handlers:
            signal.signal(number, lambda number, frame: end(number))


def own_process(main: Callable[[], int]) -> NoReturn:
    """main() and the end of the process with the exit code that it returns; signals end it from here on (`Ending`)."""
    ending = Ending()
    code = main()
    if code:  # an interpreter that clears up while XLA computes may crash, or hang in a thread of ours
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed, or None
                stream.flush()
        clear()
        os._exit(code)
    ending.at_last()
    sys.exit(0)


UNFINISHED: set[Path] = set()
"""Files and directories that are being written and have no use before they are whole."""

_ended = threading.Lock()


def temporary(prefix: str) -> Path:
    """A new directory among the temporary ones, which goes when this process ends, however it does but by kill -9."""
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix=prefix)))
    UNFINISHED.add(folder)
    return folder


@atexit.register
def clear() -> None:
    """Delete what is unfinished."""
    for path in list(UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def leave_if_ending() -> None:
    """Does not return where a signal is ending the process: what fails then may fail since `clear` took its file."""
    if _ended.locked():
        _ended.acquire()


def end(number: int, before: str = "") -> NoReturn:
    """End the process with a line, as a signal does; exit code 128 + number, as shells have it."""
    _ended.acquire()  # for good: whoever comes second waits for the end
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    with contextlib.suppress(OSError):
        os.write(2, f"{before}rlhf-jax: interrupted{by}\n".encode())
    clear()
    os._exit(128 + number)
