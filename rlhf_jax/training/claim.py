"""Whether a stage may begin in its run directory, as all processes are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.config import StageArgs
from rlhf_jax.hosts import clock, processes
from rlhf_jax.models.contents import contents
from rlhf_jax.runs.directory import Summary, check_output_dir, read_record


def claim_directory(stage: str, config: StageArgs, given: Sequence[str] = ()) -> tuple[Summary | None, dict[str, str]]:
    """(`check_output_dir`, the `contents` of the config, which `Run` takes), as process 0 finds them.

    Chat templates see the time at which the run that is there began, else that of now.
    """

    def claim() -> tuple[Summary | None, dict[str, str], str]:
        files = contents(config)
        summary = check_output_dir(stage, config, given, files)
        there = None if config.run.overwrite else read_record(Path(config.run.output_dir))
        return summary, files, clock.begin((there or {}).get("time"))

    summary, files, time = processes.from_first(claim)
    clock.begin(time)
    return summary, files
