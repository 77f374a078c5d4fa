"""Calls of code that is not ours, such as users' functions and servers: with a time limit, and tried again."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

RETRY_WAIT = 1.0
"""Seconds before the first further attempt; they double with each."""


class Failed(Exception):
    """Every attempt raised or ran out of time; the cause is what the last one raised."""


def attempt(fn: Callable[[], Result], timeout: float, limit: str) -> Result:
    """fn(). With a timeout (seconds; 0: none) it runs in a thread of its own, which is left behind if it hangs.

    `limit` names the option that sets the timeout. If fn ends the program, as sys.exit does, that is an error like
    others; but a Ctrl-C during a call without a timeout stays what it is.

    Raises:
        TimeoutError: fn is not done in time.
        Exception: whatever fn raises.
    """
    done = Future[Result]()

    def call() -> None:
        try:
            done.set_result(fn())
        except BaseException as error:
            done.set_exception(error)

    if timeout:
        thread = threading.Thread(target=call, name="attempt", daemon=True)
        thread.start()
        thread.join(timeout)
        if not done.done():
            raise TimeoutError(f"no answer in {timeout:g} s ({limit})")
    else:
        call()
    if (error := done.exception()) is None:
        return done.result()
    if isinstance(error, Exception) or (isinstance(error, KeyboardInterrupt) and not timeout):
        raise error
    raise RuntimeError(f"it ended the program ({type(error).__name__} {error})") from error


def persist(
    fn: Callable[[], Result], *, timeout: float, retries: int, limit: str, final: tuple[type[Exception], ...]
) -> Result:
    """attempt(fn), with up to `retries` further attempts; an error of a kind in `final` is raised at once.

    Raises:
        Failed: every attempt raised or ran out of time.
    """
    for i in range(retries + 1):
        try:
            return attempt(fn, timeout, limit)
        except final:
            raise
        except Exception as error:
            last = error
            if i < retries:
                time.sleep(RETRY_WAIT * 2**i)
    raise Failed from last


class _Late(BaseException):
    """Raised in a thread whose time is over; not an Exception, so that fn's own handlers let it pass."""


class _Watch:
    """A thread that looks after the calls of `limited`."""

    EVERY = 0.1
    """Seconds between two looks."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends: dict[int, float] = {}
        self.ended: set[int] = set()
        self.needed = threading.Event()
        self.thread: threading.Thread | None = None

    def enter(self, thread: int, seconds: float) -> None:
        """Look after a thread from now on."""
        with self.lock:
            self.ends[thread] = _spent(thread) + seconds
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self.look, name="watch", daemon=True)
                self.thread.start()
        self.needed.set()

    def leave(self, thread: int) -> None:
        """Leave it alone, and take back an end that is on its way."""
        with self.lock:
            self.ends.pop(thread, None)
            if thread in self.ended:  # else Python 3.11 looks for an end for ever after, and hangs under a profiler
                self.ended.remove(thread)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def look(self) -> None:
        """End those whose time is over."""
        while True:
            self.needed.wait()
            time.sleep(self.EVERY)
            with self.lock:
                for thread in [thread for thread, end in self.ends.items() if _spent(thread) > end]:
                    self.ended.add(thread)
                    self.ends[thread] = _spent(thread) + 1.0  # once more, should code that ignores errors have had it
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Late))
                if not self.ends:
                    self.needed.clear()


_watch = _Watch()


def _spent(thread: int) -> float:
    """Seconds for which a thread has computed; where the system does not tell, seconds of the clock."""
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.monotonic()


def limited(fn: Callable[[], Result], seconds: float) -> Result:
    """fn(), in the calling thread, ended after so many seconds of computing in Python.

    Raises:
        TimeoutError: it was not done by then, and has been ended.
    """
    thread, collects = threading.get_ident(), gc.isenabled()
    try:
        try:
            gc.disable()  # callbacks of a collection, where the end may strike, print errors and go on
            _watch.enter(thread, seconds)
            return fn()
        finally:
            _watch.leave(thread)
    except _Late:  # the next one is a second of computing away
        _watch.leave(thread)
        raise TimeoutError(f"not done in {seconds:g} s") from None
    finally:
        if collects:
            gc.enable()
