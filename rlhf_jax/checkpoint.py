"""Trees of arrays on disk; the only file that imports orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def save(path: str | Path, tree: Any) -> None:
    """Write `tree` to the directory `path`, replacing what is there; returns when it is on disk."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), tree, force=True)


def restore(path: str | Path, like: Any) -> Any:
    """The tree at `path`, with the shapes, dtypes and shardings of `like` (arrays or ShapeDtypeStructs)."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(path).absolute(), abstract)
