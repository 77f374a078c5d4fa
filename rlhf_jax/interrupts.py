"""Ctrl-C and SIGTERM as a flag that the loop looks at between steps. Floor 1."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The first signal sets `received` and is said; the second ends the process at once.

    A thread takes them, because Python's own handlers wait for the main thread to come back from a long call into
    XLA, such as a compilation. In a notebook the second one raises KeyboardInterrupt instead, as soon as it can.
    Outside the main thread nothing is installed.

    Attributes:
        received: name of the first signal, or empty.
    """

    def __init__(self, say: Callable[[str], None]):
        """`say` is told that the run is stopping, in the thread."""
        self.received = ""
        self._say, self._count = say, 0
        self._interactive = hasattr(sys, "ps1")
        self._installed = threading.current_thread() is threading.main_thread()
        if not self._installed:
            return
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._handlers = {number: signal.signal(number, self._in_main_thread) for number in SIGNALS}
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._thread.start()

    def _in_main_thread(self, number: int, frame: Any) -> None:
        self._count += 1
        if self._interactive and self._count > 1:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while data := self._reader.recv(64):
            for number in data:
                if number not in SIGNALS:
                    continue
                if not self.received:
                    self.received = signal.Signals(number).name
                    self._say(f"{self.received}: finishing the step and saving; a second one stops at once")
                elif not self._interactive:
                    os.write(2, b"\nrlhf-jax: interrupted\n")
                    os._exit(128 + number)

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
