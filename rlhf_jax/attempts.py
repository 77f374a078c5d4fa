"""Calls of what is not ours, functions of users and servers: within a time limit, tried again. Floor 1."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

RETRY_WAIT = 1.0
"""Seconds before the first further attempt; they double with each."""


class Failed(Exception):
    """Every attempt raised or ran out of time; the cause is what the last one raised."""


def attempt(fn: Callable[[], Any], timeout: float, limit: str) -> Any:
    """fn(), in a thread of its own if there is a timeout in seconds: whoever hangs there is left behind.

    `limit` names the option that sets the timeout. What fn raises to end the program, as sys.exit does, is an error
    like others; but Ctrl-C, which comes to a call without a timeout, is not.

    Raises:
        TimeoutError: it is not done by then.
        Exception: whatever fn raises.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def call() -> None:
        try:
            outcome.append((fn(), None))
        except BaseException as error:
            outcome.append((None, error))

    if timeout:
        thread = threading.Thread(target=call, name="attempt", daemon=True)
        thread.start()
        thread.join(timeout)
        if not outcome:
            raise TimeoutError(f"no answer in {timeout:g} s ({limit})")
    else:
        call()
    value, error = outcome[0]
    if error is None or isinstance(error, Exception):
        if error is not None:
            raise error
        return value
    if isinstance(error, KeyboardInterrupt) and not timeout:
        raise error
    raise RuntimeError(f"it ended the program ({type(error).__name__} {error})") from error


def persist(
    fn: Callable[[], Any], *, timeout: float, retries: int, limit: str, final: tuple[type[Exception], ...] = ()
) -> Any:
    """attempt(fn), tried again `retries` times, but not after an error of a kind in `final`, which is raised.

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
