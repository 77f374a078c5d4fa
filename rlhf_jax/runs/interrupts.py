"""Ctrl-C, SIGTERM and a lost terminal as a flag that the loop looks at between steps."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """The first signal sets `received` and is said; the second ends the process at once, unless it is a SIGHUP: a
    terminal that closes, or a machine that shuts down, may send that one beside others.

    A thread takes them, because Python's own handlers wait for the main thread to come back from a long call into
    XLA, such as a compilation. In a notebook the second one raises KeyboardInterrupt instead, as soon as it can.
    Outside the main thread nothing is installed, nor for a SIGHUP that is ignored, as it is under nohup. A SIGINT is
    taken even so: shells start background jobs with it ignored, and `kill -INT` should stop these too.

    Attributes:
        received: name of the first signal, or empty.
    """

    def __init__(self, say: Callable[[str], None], *, install: bool = True):
        """`say` is told that the run is stopping, in the thread. Without `install` signals are left as they are."""
        self.received = ""
        self._say, self._count = say, 0
        self._interactive = hasattr(sys, "ps1")
        self._installed = install and threading.current_thread() is threading.main_thread()
        if not self._installed:
            return
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        taken = [number for number in SIGNALS if not (number == signal.SIGHUP and nohup)]
        self._handlers = {number: signal.signal(number, self._in_main_thread) for number in taken}
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._thread.start()

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._interactive and self._count > 1:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while data := self._reader.recv(64):
            for number in data:
                if number not in self._handlers:
                    continue
                if number == signal.SIGHUP:
                    self._leave_terminal()
                if not self.received:
                    self.received = signal.Signals(number).name
                    with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
                        self._say(f"{self.received}: finishing the step and saving; a second one stops at once")
                elif number != signal.SIGHUP and not self._interactive:
                    with contextlib.suppress(OSError):
                        os.write(2, b"\nrlhf-jax: interrupted\n")
                    os._exit(128 + number)

    def _leave_terminal(self) -> None:
        """What is still to be said goes nowhere: to a terminal that is gone it would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)

    def close(self) -> None:
        """Put the handlers back that were there before."""
        if not self._installed:
            return
        self._installed = False
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()
