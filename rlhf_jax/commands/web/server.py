"""A web server for few people: who may ask, what goes with every answer, and its end."""

from __future__ import annotations

import contextlib
import io
import re
import secrets
import signal
import socket
import socketserver
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from rlhf_jax.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = [
    ("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
     "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]  # fmt: skip
LARGEST_POST = 100_000


def guard(
    app: WSGIApplication, token: str, hosts: tuple[str, ...], headers: Sequence[tuple[str, str]] = tuple(HEADERS)
) -> WSGIApplication:
    """Answers only below /TOKEN/ and only under a known name, and adds the headers that keep the page to itself.

    A page of another site cannot know the token; that it cannot reach us under a name of its own (DNS rebinding) is
    what the Host header is for. Its port may be another, since ports are forwarded.
    """

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def start(status: str, own: list[tuple[str, str]], *rest: Any) -> Callable[[bytes], object]:
            return start_response(status, [*own, *headers], *rest)

        name = environ.get("HTTP_HOST", "").lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        _, given, path = [*environ.get("PATH_INFO", "").split("/", 2), "", ""][:3]
        size = environ.get("CONTENT_LENGTH") or "0"
        if name not in hosts:
            line = f"This server does not answer to the name {name[:80]!r}."
        elif not secrets.compare_digest(given.encode(), token.encode()):
            line = "The token in the address is missing or wrong. Open the address that was printed last."
        elif "HTTP_TRANSFER_ENCODING" in environ or not re.fullmatch(r"[0-9]+", size) or float(size) > LARGEST_POST:
            start("413 Content Too Large", [("Content-Type", "application/json")])
            return [b'{"error": "What is posted is at most 100 000 bytes, whose number comes first."}']
        else:
            return app({**environ, "SCRIPT_NAME": f"/{token}", "PATH_INFO": f"/{path}"}, start)
        start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [(line + "\n").encode()]

    return guarded


class Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread per request, so that a slow one holds up nobody; no name is looked up."""

    daemon_threads = True
    request_queue_size = 256
    """Connections that may wait for their thread: a room full of raters who click at once."""

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, *args: object) -> None:
        """Says nothing of a client that went away or was too slow."""


class QuietHandler(WSGIRequestHandler):
    """Writes no line per request, and gives up on one that says nothing."""

    timeout = 60

    def log_message(self, *args: object) -> None:
        pass

    def get_stderr(self) -> io.StringIO:
        return io.StringIO()  # the app says what went wrong in a line of its own


def make_server(host: str, port: int, app: WSGIApplication) -> Server:
    """A server that listens there.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = type("Server", (Server,), {"address_family": family})
    try:
        server = kind((host, port), QuietHandler)
    except OSError as error:
        what = f"{error.strerror or error}".lower()
        raise UserError(f"cannot listen on {host}:{port} ({what}); give another --port, 0 for any") from error
    server.set_app(app)
    return server


@contextlib.contextmanager
def listening(
    host: str, port: int, app: WSGIApplication, headers: Sequence[tuple[str, str]] = tuple(HEADERS)
) -> Iterator[tuple[Server, str]]:
    """(a server that listens there and answers behind a new token, the address with it).

    Raises:
        UserError: as `make_server`.
    """
    token = secrets.token_urlsafe(24)
    hosts = LOOPBACK if host in LOOPBACK else (*LOOPBACK, host.lower())
    with make_server(host, port, guard(app, token, hosts, headers)) as server:
        name = f"[{host}]" if ":" in host else host
        yield server, f"http://{name}:{server.server_port}/{token}/"


def serve(server: Server) -> None:
    """Answer until Ctrl-C, SIGTERM or SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
