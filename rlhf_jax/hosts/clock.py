"""The time that chat templates read. It belongs to what is made: a run that goes on renders as it began."""

from __future__ import annotations

import contextlib
from datetime import datetime

_began: datetime | None = None


def begin(text: str | None = None) -> str:
    """Have the clock stand, at a time that `time` gave or now; returns `time`."""
    global _began
    _began = None
    with contextlib.suppress(ValueError, TypeError):
        _began = datetime.fromisoformat(text) if text else None
    return time()


def time() -> str:
    """Where the clock stands, in ISO 8601 and local time, to the second; at first it is now."""
    global _began
    _began = _began or datetime.now().replace(microsecond=0)
    return _began.isoformat()


def strftime_now(form: str) -> str:
    """What templates call."""
    return datetime.fromisoformat(time()).strftime(form)
