"""A disk that fails, and a kill in the middle of writing: the functions of `os` that the package writes with."""

from __future__ import annotations

import errno
import os
import re
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
    """A kill at a change of a file: that one and all later ones do not happen.

    Attributes:
        count: changes seen.
        log: what they were: the function of `os`, and the last two parts of the path, digits as #.
    """

    def __init__(self, patch, at: int | tuple[str, str] | None):
        """`at` is the number of the change, from 0 on, or what it is, as in `log`; None kills nothing."""
        self.at, self.count, self.log, self.dead = at, 0, [], False
        for name in SEAMS:
            patch.setattr(os, name, self._seam(name, getattr(os, name)))

    def _seam(self, name, real):
        def call(*args, **kwargs):
            flags = args[1] if name == "open" and len(args) > 1 else 0
            if name == "open" and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real(*args, **kwargs)
            seen = (name, re.sub(r"\d+", "#", "/".join(str(path_of(args[0])).split("/")[-2:])))
            self.count += 1
            self.dead |= (
                seen == self.at if isinstance(self.at, tuple) else self.at is not None and self.count > self.at
            )
            if self.dead:
                raise Killed(seen)
            self.log.append(seen)
            return real(*args, **kwargs)

        return call
