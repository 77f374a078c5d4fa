"""What is said of weights when they have been read: what no trained model has, and what was rounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.config import ArchConfig
from rlhf_jax.errors import tell
from rlhf_jax.hosts.processes import is_first


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Seen:
    """Of the weights that this process reads: tensors with values that are not finite, and tensors of zeros alone.

    And, of those whose type in the file is wider than the one asked for, how many that one rounds.
    """

    def __init__(self, arch: ArchConfig):
        self.offset, self.broken, self.some = arch.norm_offset, set[str](), dict[str, bool]()
        self.wider, self.rounded, self.types = 0, 0, dict[str, None]()

    def look(self, name: str, leaf: str, stored: np.ndarray, values: np.ndarray) -> None:
        """Take a part of a tensor into account, as it is stored and as it is read."""
        with np.errstate(all="ignore"):
            total = values.sum(dtype=np.float32)  # a tenth of the time of looking at each value
            if not np.can_cast(stored.dtype, values.dtype):
                self.wider += stored.size
                self.types[f"{stored.dtype} to {values.dtype}"] = None
                lying = np.atleast_2d(stored.transpose(np.argsort(stored.strides)[::-1]))  # as in the file
                same = ((x == x.astype(values.dtype).astype(x.dtype)) | (x != x) for x in lying)
                self.rounded += stored.size - sum(int(np.count_nonzero(row)) for row in same)
        if not np.isfinite(total) and not np.isfinite(values).all():
            self.broken.add(name)
        if not (leaf.endswith("bias") or (self.offset and "norm" in leaf)):
            self.some[name] = self.some.get(name, False) or bool(total != 0 or values.any())

    def report(self, folder: Path) -> None:
        """Say what no trained model has, on standard error, since rows may go to standard output."""
        zero = [name for name, some in self.some.items() if not some]
        for names, what in ((sorted(self.broken), "are not finite"), (zero, "are all zero")):
            if names and is_first():
                tell(f"{folder}: weights of {len(names)} tensors {what}: {few(names)}", error=True)
        if self.rounded and is_first():
            how = " and ".join(self.types)
            tell(f"{folder}: {self.rounded:,} of {self.wider:,} weights are rounded, from {how}", error=True)
