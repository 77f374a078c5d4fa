"""Standard output and error on a disk that is full: a command goes on, and what it said is kept."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stream:
    """A standard stream that may remember what it was given.

    Attributes:
        told: all of it, if it `remembers`.
        missing: the process was started without one.
        failure: why it is not all where it should be, if it is not; from then on nothing more is.
    """

    def __init__(self, stream: TextIO | None, *, remembers: bool):
        self.missing, self._remembers = stream is None, remembers
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self.told: list[str] = []
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        if self._remembers:
            self.told.append(text)
        with self._noticing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._noticing():
            self._stream.flush()

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL or self.failure:
                raise
            self.failure = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # for what the stream still holds
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def kept() -> Iterator[Stream]:
    """Both streams as a `Stream`, of which that of standard output is given; it remembers, unless it is a terminal.

    Standard error has the bar, which is drawn anew for as long as a run lasts.
    """
    out, error = sys.stdout, sys.stderr
    mine = Stream(out, remembers=out is not None and not out.isatty())
    sys.stdout, sys.stderr = cast(TextIO, mine), cast(TextIO, Stream(error, remembers=False))
    try:
        yield mine
    finally:
        sys.stdout, sys.stderr = out, error
