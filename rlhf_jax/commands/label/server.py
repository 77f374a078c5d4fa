"""The labelling page: what it may ask, and the command that serves it."""

from __future__ import annotations

import contextlib
import json
import secrets
from datetime import UTC, datetime
from pathlib import Path

import bottle

from rlhf_jax.commands.label.items import Item, items_of
from rlhf_jax.commands.label.votes import Votes
from rlhf_jax.commands.web import LOOPBACK, guard, make_server, serve
from rlhf_jax.config import LabelArgs
from rlhf_jax.config.label import LONGEST_NAME
from rlhf_jax.data.rows import Row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import printable, reason, tell
from rlhf_jax.hosts.json_text import JsonObject

STATIC = Path(__file__).parent / "static"
LONGEST_COMMENT = 10_000


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
