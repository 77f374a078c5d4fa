"""The labelling page in a notebook: served by a thread of its process, shown in a frame."""

from __future__ import annotations

import contextlib
import secrets
import threading
from typing import Any, Self
from urllib.parse import urlsplit

from rlhf_jax.commands.label.server import Page, items_for, make_app, summary
from rlhf_jax.commands.label.votes import Votes
from rlhf_jax.commands.web import HEADERS, LOOPBACK, guard, make_server
from rlhf_jax.config import LabelArgs
from rlhf_jax.errors import UserError, tell

_open: dict[str, LabelPage] = {}
"""The file of answers -> the page that writes it."""

HEIGHT = 700
"""Pixels of the frame."""


class LabelPage(contextlib.AbstractContextManager["LabelPage"]):
    """The page of `rlhf-jax label` while cells run: as the value of a cell it is shown in a frame.

        page = LabelPage(LabelArgs(output="votes.jsonl"), rows=rows)
        page                                                # people label; config.output has every answer at once
        page.close()                                        # prints what was gathered

    Attributes:
        address: of the page, on this machine alone; whoever knows it may answer.
    """

    def __init__(self, config: LabelArgs, *, rows: object = None):
        """Serve `rows`, or those of config.path; a page of this process with the same file of answers is closed.

        Raises:
            UserError: nothing to rank, or the file of answers belongs to other rows or to another process.
        """
        if earlier := _open.pop(config.output, None):  # its cell was run again
            earlier.close()
        if config.model.path:
            raise UserError(f"model.path {config.model.path} answers in the command alone; give its answers as rows")
        self._items, note = items_for(config, config.path if rows is None else rows)
        self._votes = Votes(config.output, self._items)
        self._token = secrets.token_urlsafe(24)
        try:
            self._app = make_app(Page(self._items, self._votes, config))
            self._server = make_server(config.host, config.port, self._app)
        except BaseException:
            self._votes.close()
            raise
        self._answer_to()
        self.address = f"http://{config.host}:{self._server.server_port}/{self._token}/"
        self._thread = threading.Thread(target=self._server.serve_forever, name="label", daemon=True)
        self._thread.start()
        _open[config.output] = self
        tell(f"{len(self._items)} items to rank" + (f"; left out: {note}" if note else ""))

    def _answer_to(self, *names: str) -> None:
        """Answer under the names of this machine and these; a frame of a page that knows the token may show it."""
        headers = [(name, value.replace("frame-ancestors 'none'", "frame-ancestors *")) for name, value in HEADERS]
        self._server.set_app(guard(self._app, self._token, (*LOOPBACK, *names), headers))

    def _ipython_display_(self) -> None:
        """Show the page: Colab has a way of its own to a port of its machine, elsewhere that is the browser's too."""
        try:
            from google.colab import output
        except ImportError:
            from IPython.display import IFrame, display

            display(IFrame(self.address, "100%", HEIGHT))
            return
        port: Any = self._server.server_port
        self._answer_to(urlsplit(output.eval_js(f"google.colab.kernel.proxyPort({port})")).hostname or "")
        output.serve_kernel_port_as_iframe(port, path=f"/{self._token}/", height=str(HEIGHT))

    def close(self) -> None:
        """Stop serving and say what was gathered; again does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._votes.close()
            tell(summary(self._votes, len(self._items)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
