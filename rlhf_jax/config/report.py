"""Settings of the report of runs."""

from __future__ import annotations

from dataclasses import field

from rlhf_jax.config.checks import check
from rlhf_jax.config.settings import PathText, settings


@settings
class ReportArgs:
    """All of `rlhf-jax report RUN [RUN ...]`: one page, a file that needs no network.

    Args:
        runs: run directories, or directories with runs below them, such as a recipe's.
        output: the file to write, as HTML.
    """

    runs: list[PathText] = field(default_factory=list)
    output: PathText = "report.html"


@settings
class WatchArgs:
    """All of `rlhf-jax watch RUN`: the report of a run that goes on, served to this machine alone.

    Args:
        run: a run directory, or one with runs below it.
        port: on the loopback address; 0 takes a free one.
        seconds: after which the page looks for news.
    """

    run: PathText = ""
    port: int = 0
    seconds: float = 5.0

    def __post_init__(self) -> None:
        check(self, "", {"between 0 and 65535": "port", "between 1 and 1000000": "seconds"})
