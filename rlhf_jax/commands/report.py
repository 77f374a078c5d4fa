"""`rlhf-jax report` and `rlhf-jax watch`: the page of runs, as a file or live."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from rlhf_jax.commands.web import HEADERS, LOOPBACK, listening, serve
from rlhf_jax.config import ReportArgs, WatchArgs
from rlhf_jax.errors import UserError, shortened, tell
from rlhf_jax.hosts.files import check_writable
from rlhf_jax.hosts.outputs import write_output
from rlhf_jax.runs.report import html_of, is_page
from rlhf_jax.runs.report.reading import state_of, unreadable

OWN_POLICY = [header for header in HEADERS if header[0] != "Content-Security-Policy"]
"""The page says itself which script it has; see its template."""


def run(config: ReportArgs) -> None:
    """Write the page.

    Raises:
        UserError: no run is named, a directory holds none, or the page cannot be written or would replace something.
    """
    if not config.runs:
        raise UserError("no run is named; write rlhf-jax report RUN [RUN ...] --output report.html")
    output = Path(config.output)
    check_writable(output.parent, f"output {output}")
    if output.is_dir():
        raise UserError(f"output {output} is a directory; name an .html file in it")
    if output.is_file() and not is_page(output):
        raise UserError(f"output {output} is there and no report; choose another --output")
    html = html_of(config.runs)
    if left := unreadable(config.runs):
        tell(
            f"! {len(left)} are left out, since their run.json cannot be read: {shortened(', '.join(left))}",
            error=True,
        )
    with contextlib.suppress(OSError):  # the next line says why
        output.parent.mkdir(parents=True, exist_ok=True)
    write_output(config.output, html.encode())
    tell(f"report: {config.output} ({len(html.encode()) / 1e6:.2g} MB), to be opened in a browser")


def run_watch(config: WatchArgs) -> None:
    """Serve the page of a run to this machine until Ctrl-C; it is made anew when its files have changed.

    Raises:
        UserError: no run is named, there is none, or the port is taken.
    """
    if not config.run:
        raise UserError("no run is named; write rlhf-jax watch RUN")
    with listening(LOOPBACK[0], config.port, app_of(config), OWN_POLICY) as (server, address):
        tell(f"open {address}   (Ctrl-C ends)")
        serve(server)


def app_of(config: WatchArgs) -> WSGIApplication:
    """The page of a run as it is now, at /.

    Raises:
        UserError: there is no run.
    """
    lock = threading.Lock()

    def made() -> tuple[object, bytes]:
        return state_of(config.run), html_of([config.run], live=round(1000 * config.seconds)).encode()

    latest = made()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        nonlocal latest
        if environ["PATH_INFO"] != "/":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"There is one page here, at /.\n"]
        with lock:  # matplotlib draws one at a time
            if state_of(config.run) != latest[0]:  # a run that is killed writes nothing
                latest = made()
        start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
        return [latest[1]]

    return app
