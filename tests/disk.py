"""A disk that fails, and a kill in the middle of writing: the functions of `os` that the package writes with."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection

SEAMS = ("open", "write", "fsync", "ftruncate", "truncate", "rename", "replace", "unlink", "rmdir", "mkdir")
"""What changes files."""


def path_of(target) -> str:
    """The path of a descriptor or path."""
    return os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)


def fails(patch, name: str, calls: Collection[int], *, of: str = "", code: int = errno.ENOSPC) -> list[str]:
    """os.`name` fails at its calls number `calls`, from 0 on, whose path has `of` in it; returns the paths it saw.

    Before it a write puts half of the bytes on the disk: it is taken in two calls, the second of which fails.
    """
    real, seen = getattr(os, name), []

    def failing(target, *rest, **kwargs):
        if of not in str(path_of(target)):
            return real(target, *rest, **kwargs)
        seen.append(str(path_of(target)))
        if name == "write" and len(seen) in calls and len(rest[0]) > 1:  # the next one fails
            return real(target, rest[0][: len(rest[0]) // 2])
        if len(seen) - 1 in calls:
            raise OSError(code, os.strerror(code))
        return real(target, *rest, **kwargs)

    patch.setattr(os, name, failing)
    return seen


class Killed(BaseException):
    """Stands in for kill -9 where the process must live on."""


class Kill:
    """A kill at the `at`th change of a file, from 0 on: that one and all later ones do not happen.

    Attributes:
        count: changes seen.
        log: what they were.
    """

    def __init__(self, patch, at: int | None):
        self.at, self.count, self.log = at, 0, []
        for name in SEAMS:
            patch.setattr(os, name, self._seam(name, getattr(os, name)))

    def _seam(self, name, real):
        def call(*args, **kwargs):
            flags = args[1] if name == "open" and len(args) > 1 else 0
            if name == "open" and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real(*args, **kwargs)
            self.count += 1
            if self.at is not None and self.count > self.at:
                raise Killed(f"{name} {args[:1]}")
            self.log.append((name, args[0]))
            return real(*args, **kwargs)

        return call
