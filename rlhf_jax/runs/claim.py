"""Whether a run may begin in its directory, as all processes are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.hosts import clock, processes
from rlhf_jax.models.contents import contents
from rlhf_jax.runs import directory


def claim_directory(stage: str, config: Any, given: Sequence[str] = ()) -> dict[str, Any] | None:
    """`directory.check_output_dir` as process 0 finds it, since it holds the directory soon after.

    Chat templates see the time at which the run that is there began, else that of now.
    """

    def find() -> tuple[dict[str, Any] | None, str]:
        found = directory.check_output_dir(stage, config, given, contents(config))
        there = None if config.run.overwrite else directory.read_record(Path(config.run.output_dir))
        return found, clock.begin((there or {}).get("time"))

    found, time = processes.from_first(find)
    clock.begin(time)
    return found
