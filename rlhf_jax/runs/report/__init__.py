"""A report of runs: one page that says how they ended, what went wrong, and shows curves and samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.errors import reason
from rlhf_jax.hosts.files import replace_file
from rlhf_jax.runs.directory import REPORT
from rlhf_jax.runs.report.outcome import stories_of
from rlhf_jax.runs.report.page import HERE, page
from rlhf_jax.runs.report.reading import read_runs


def html_of(paths: Sequence[str | Path], *, live: int = 0) -> str:
    """The page of runs, or of the runs below directories; `live` as in `page`.

    Raises:
        UserError: there is no run.
    """
    return page(read_runs(paths), stories_of(paths), live=live)


def is_page(path: Path) -> bool:
    """Whether a file is empty or a page of ours, as it begins."""
    start = (HERE / "page.html").read_bytes().partition(b"{{")[0]
    with open(path, "rb") as file:
        return file.read(len(start)) in (b"", start)


def write_beside(directory: Path) -> str:
    """Write the report of a run or recipe that has ended into its directory; why not, or nothing: it never raises."""
    try:
        replace_file(directory / REPORT, html_of([directory]))
    except Exception as error:  # a picture of a run is worth no run
        return f"{directory / REPORT} could not be written ({type(error).__name__}: {reason(error)})"
    return ""
