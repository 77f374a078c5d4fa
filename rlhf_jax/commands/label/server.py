"""The web server of the labelling page: who may ask, what is answered, and the end of it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import secrets
import signal
import socket
import socketserver
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import bottle

from rlhf_jax.commands.label.items import Item, items_of
from rlhf_jax.commands.label.votes import Votes
from rlhf_jax.config import LabelArgs
from rlhf_jax.config.label import LONGEST_NAME
from rlhf_jax.data.rows import Row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, printable, reason, tell
from rlhf_jax.hosts.json_text import JsonObject

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = [
    ("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
     "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]  # fmt: skip
LONGEST_COMMENT, LARGEST_POST = 10_000, 100_000


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
            return [b'{"error": "An answer is at most 100 000 bytes, whose number comes first."}']
        else:
            return app({**environ, "SCRIPT_NAME": f"/{token}", "PATH_INFO": f"/{path}"}, start)
        start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [(line + "\n").encode()]

    return guarded


class Page:
    """What the page may ask, as plain functions of plain data; an HTTPError says why not, in a line for the rater."""

    def __init__(self, items: list[Item], votes: Votes, config: LabelArgs):
        """`config` gives the seed and the names that raters may have."""
        self.items, self.votes, self.config = items, votes, config
        self.by_key = {item.key: item for item in items}

    def start(self) -> JsonObject:
        """What the entry shows: the rows, who may or did answer, and how many items there are."""
        names = self.config.raters or self.votes.raters()
        return {
            "title": Path(self.config.path).name,
            "raters": [{"name": name, "done": len(self.votes.of(name))} for name in names],
            "fixed": bool(self.config.raters),
            "total": len(self.items),
        }

    def rater(self, name: object) -> str:
        """A rater's name, without white space around it."""
        name = name.strip() if isinstance(name, str) else ""
        if not 0 < len(name) <= LONGEST_NAME:
            raise bottle.HTTPError(400, f"Give a name of 1 to {LONGEST_NAME} characters.")
        if name != printable(name):
            raise bottle.HTTPError(400, "Give a name without control characters.")
        if self.config.raters and name not in self.config.raters:
            raise bottle.HTTPError(400, f"{name} is not among the raters of this project.")
        return name

    def item(self, rater: str, at: int | None = None) -> JsonObject:
        """The item at a place, by default the first that the rater has not answered, as this rater sees it."""
        rater = self.rater(rater)
        done = self.votes.of(rater)
        states = [_state(done.get(item.key)) for item in self.items]
        if at is None:
            at = states.index("") if "" in states else len(self.items) - 1
        if not 0 <= at < len(self.items):
            raise bottle.HTTPError(404, f"There is no item {at + 1}; there are {len(self.items)}.")
        item = self.items[at]
        vote = done.get(item.key)
        order = vote["order"] if vote else item.order(rater, self.config.seed)
        answer = None
        if vote:
            ranks = dict(zip(item.names, vote["ranks"], strict=True))
            answer = {"ranks": ranks, **{name: vote[name] for name in ("comment", "all_bad", "skipped")}}
        return {"at": at, "states": states, "answer": answer, **item.shown(order)}

    def answer(self, said: object) -> JsonObject:
        """Keep an answer {rater, item, ranks: {name: place}, all_bad, skipped, comment, seconds}."""
        if not isinstance(said, dict):
            raise bottle.HTTPError(400, "An answer is a JSON object.")
        rater, item = self.rater(said.get("rater")), self.by_key.get(str(said.get("item")))
        if item is None:
            raise bottle.HTTPError(404, "These rows do not hold that item.")
        before = self.votes.of(rater).get(item.key)
        vote: Row = {
            "item": item.key,
            "rater": rater,
            "prompt": item.ranking.prompt,
            "responses": item.ranking.items(),
            "ranks": ranks_of(item, said),
            "all_bad": said.get("all_bad") is True,
            "skipped": said.get("skipped") is True,
            "comment": str(said.get("comment") or "")[:LONGEST_COMMENT],
            "order": before["order"] if before else item.order(rater, self.config.seed),
            "seconds": _seconds(said.get("seconds")),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            self.votes.add(vote)
        except OSError as error:
            line = f"The answer could not be written ({error.strerror}). It is kept here; try again."
            raise bottle.HTTPError(507, line) from error
        return {"saved": True, "state": _state(vote)}


def _state(vote: Row | None) -> str:
    return "" if vote is None else "skipped" if vote["skipped"] else "done"


def _seconds(said: object) -> float | None:
    return round(float(said), 1) if isinstance(said, (int, float)) and 0 <= said < 1e9 else None


def ranks_of(item: Item, said: JsonObject) -> list[int | None]:
    """Ranks in row order, 0 the best, none left out; all null if skipped, all 0 if all are bad and none is ranked.

    Raises:
        HTTPError: not every response has a place.
    """
    given = said.get("ranks")
    if said.get("skipped") is True:
        return [None] * len(item.names)
    if said.get("all_bad") is True and not given:
        return [0] * len(item.names)
    if not isinstance(given, dict) or set(given) != set(item.names) or any(type(r) is not int for r in given.values()):
        raise bottle.HTTPError(400, "Give every response a place first.")
    places = sorted(set(given.values()))
    return [places.index(given[name]) for name in item.names]


def make_app(page: Page) -> bottle.Bottle:
    """The routes of the page; every answer but files is JSON, errors are {"error": line}."""
    app = bottle.Bottle()

    @app.get("/")
    def index() -> bottle.HTTPResponse:
        return bottle.static_file("page.html", root=STATIC)

    @app.get("/<name:re:[a-z]+\\.(css|js|svg)>")
    def static(name: str) -> bottle.HTTPResponse:
        return bottle.static_file(name, root=STATIC)

    @app.get("/api/start")
    def start() -> JsonObject:
        return page.start()

    @app.get("/api/item")
    def item() -> JsonObject:
        at = bottle.request.query.get("at", type=int)
        return page.item(bottle.request.query.getunicode("rater"), at)

    @app.get("/api/agreement")
    def agreement() -> JsonObject:
        return page.votes.agreement()

    @app.post("/api/answer")
    def answer() -> JsonObject:
        try:
            said = bottle.request.json
        except RecursionError:
            raise bottle.HTTPError(400, "An answer is a JSON object.") from None
        return page.answer(said)

    @app.error(400)
    @app.error(404)
    @app.error(405)
    @app.error(413)
    @app.error(500)
    @app.error(507)
    def failed(error: bottle.HTTPError) -> str:
        if error.exception is not None:
            tell(f"label: {type(error.exception).__name__}: {reason(error.exception)}", error=True)
        bottle.response.content_type = "application/json"
        return json.dumps({"error": str(error.body)})

    return app


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


def serve(server: Server) -> None:
    """Answer until Ctrl-C, SIGTERM or SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def summary(votes: Votes, total: int) -> str:
    """What was gathered, in lines."""
    said = votes.agreement()
    lines = [f"{sum(one['answers'] for one in said['raters'])} answers by {len(said['raters'])} raters"]
    if said["share"] is not None:
        lines[0] += f"; two raters agree on {said['share']:.1%} of {said['pairs']} pairs"
    for one in said["raters"]:
        tau = "" if one["tau"] is None else f", Kendall's tau with the others {one['tau']:+.2f}"
        lines.append(
            f"  {printable(one['rater'])}: {one['answers']} of {total} answered, {one['skipped']} skipped{tau}"
        )
    return "\n".join(lines)


def run(config: LabelArgs) -> None:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP, then say what was gathered."""
    items, note = items_of(rows_from(config.path, config.fields))
    with contextlib.closing(Votes(config.output, items)) as votes:
        token = secrets.token_urlsafe(24)
        hosts = LOOPBACK if config.host in LOOPBACK else (*LOOPBACK, config.host.lower())
        app = guard(make_app(Page(items, votes, config)), token, hosts)
        with make_server(config.host, config.port, app) as server:
            tell(f"{config.path}: {len(items)} items to rank" + (f"; left out: {note}" if note else ""))
            if votes.mended:
                tell(f"{config.output}: a crash cut the last answer short; its {votes.mended} bytes are removed")
            if config.host not in LOOPBACK:
                tell(f"! {config.host} is open to its network, and what is typed is not encrypted")
            name = f"[{config.host}]" if ":" in config.host else config.host
            tell(f"open http://{name}:{server.server_port}/{token}/   (answers go to {config.output}; Ctrl-C ends)")
            serve(server)
        tell("\n" + summary(votes, len(items)))
