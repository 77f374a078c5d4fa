"""The time that chat templates read. It belongs to what is made: a run that goes on renders as it began."""

from __future__ import annotations

import contextlib
from datetime import datetime

_began: datetime | None = None


def begin(text: str | None = None) -> str:
    """Set the clock to a text that `time` returned, else to now; it stands still there. Returns `time()`."""
    global _began
    _began = None
    with contextlib.suppress(ValueError, TypeError):
        _began = datetime.fromisoformat(text) if text else None
    return time()


def time() -> str:
    """Where the clock stands, local, to the second, in ISO 8601; unless it was set, at the time of the first call."""
    global _began
    _began = _began or datetime.now().replace(microsecond=0)
    return _began.isoformat()


def strftime_now(form: str) -> str:
    """The time as a template wants it; templates call this."""
    return datetime.fromisoformat(time()).strftime(form)
