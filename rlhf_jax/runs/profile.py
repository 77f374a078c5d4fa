"""A trace of some steps of a run, by JAX's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from rlhf_jax.runs.directory import PROFILE


class Trace:
    """A trace of the steps first to last, which every process writes below `output_dir`; without `steps` none.

    It has what the devices computed, which programs they were given and when, and the compilation of what those steps
    are the first to need. xprof opens the folder, https://ui.perfetto.dev the file perfetto_trace.json.gz in it.
    """

    def __init__(self, output_dir: str, steps: list[int]):
        self._folder, self._steps, self._open = Path(output_dir, PROFILE), steps, False

    def after(self, step: int, made: Any = None) -> None:
        """Begin or end the trace after `step`, 0 before the first; `made` are arrays that the step makes last."""
        if not self._steps:
            return
        first, last = self._steps
        if not self._open and first - 1 <= step < last:
            jax.block_until_ready(made)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python would crowd out what the devices did
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            self._open = True
        elif self._open and step >= last:
            jax.block_until_ready(made)
            self.close()

    def close(self) -> None:
        """Write the trace, if it is open."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
