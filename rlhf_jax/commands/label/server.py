"""The labelling page: what it may ask, and the command that serves it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import bottle

from rlhf_jax.commands.label.items import AGAIN, Item, check_of, in_batch, items_of, with_checks
from rlhf_jax.commands.label.votes import Votes
from rlhf_jax.commands.web import LOOPBACK, listening, serve
from rlhf_jax.commands.web.app import make_app as web_app
from rlhf_jax.commands.web.app import posted
from rlhf_jax.config import LabelArgs
from rlhf_jax.config.label import LONGEST_NAME
from rlhf_jax.data.rows import READ, Row, carried, layout_of, tell_left
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.votes import RATING, beside_vote
from rlhf_jax.errors import UserError, printable, tell
from rlhf_jax.hosts.files import read_text
from rlhf_jax.hosts.json_text import JsonObject

if TYPE_CHECKING:
    from rlhf_jax.commands.label.drawing import Supply

STATIC = Path(__file__).parent / "static"
LONGEST_COMMENT = 10_000
ALIKE = "prompts without two different responses"


class Page:
    """What the page may ask, as plain functions of plain data; an HTTPError says why not, in a line for the rater."""

    def __init__(self, items: list[Item], votes: Votes, config: LabelArgs):
        """`config` gives the seed and the names that raters may have."""
        self.items, self.votes, self.config = items, votes, config
        self.by_key = {item.key: item for item in items}
        self.guidelines = read_text(config.guidelines, "guidelines") if config.guidelines else ""

    def add(self, items: list[Item]) -> None:
        """Further items, which stand behind those that are there."""
        for item in items:
            if self.by_key.setdefault(item.key, item) is item:
                self.items.append(item)

    def waiting(self) -> int:
        """Items that the rater with the most answers has left."""
        return len(self.items) - max((len(self.votes.of(name)) for name in self.votes.raters()), default=0)

    def start(self) -> JsonObject:
        """What the entry shows: the rows, who may or did answer, how many items there are, and what is asked."""
        names = self.config.raters or self.votes.raters()
        return {
            "title": Path(self.config.path).name,
            "raters": [{"name": name, "done": len(self.votes.of(name))} for name in names],
            "fixed": bool(self.config.raters),
            "total": len(self.items),
            "guidelines": self.guidelines,
            "criteria": self.config.criteria,
            "scale": self.config.scale,
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
            said = vote["check"]["ranks"] if vote.get("check") else vote["ranks"]
            ranks = dict(zip(item.names, said, strict=True))
            columns = {name: vote.get(RATING + name) for name in self.config.criteria}
            ratings = {name: dict(zip(item.names, column, strict=True)) for name, column in columns.items() if column}
            about = {name: vote[name] for name in ("comment", "all_bad", "skipped")}
            answer = {"ranks": ranks, "ratings": ratings, **about}
        return {"at": at, "states": states, "answer": answer, **item.shown(order)}

    def answer(self, said: JsonObject) -> JsonObject:
        """Keep an answer {rater, item, ranks: {name: place}, ratings?: {criterion: {name: rating}}, all_bad, skipped,
        comment, seconds}."""
        rater, item = self.rater(said.get("rater")), self.by_key.get(str(said.get("item")))
        if item is None:
            raise bottle.HTTPError(404, "These rows do not hold that item.")
        before = self.votes.of(rater).get(item.key)
        ranks, took = ranks_of(item, said), said.get("seconds")
        vote: Row = {
            "item": item.key,
            "rater": rater,
            "prompt": item.ranking.prompt,
            "responses": item.ranking.items(),
            "ranks": ranks if item.known is None else [None] * len(ranks),  # what is known already is no label
            **ratings_of(item, said, self.config),
            "all_bad": said.get("all_bad") is True,
            "skipped": said.get("skipped") is True,
            "comment": str(said.get("comment") or "")[:LONGEST_COMMENT],
            "order": before["order"] if before else item.order(rater, self.config.seed),
            "seconds": round(float(took), 1) if isinstance(took, (int, float)) and 0 <= took < 1e9 else None,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        vote |= beside_vote(item.ranking.fields)
        if item.known is not None and not vote["skipped"]:
            vote["check"] = {"ranks": ranks, "passed": item.passes(ranks)}
        try:
            self.votes.add(vote)
        except OSError as error:
            line = f"The answer could not be written ({error.strerror}). It is kept here; try again."
            raise bottle.HTTPError(507, line) from error
        return {"saved": True, "state": _state(vote)}


def _state(vote: Row | None) -> str:
    return "" if vote is None else "skipped" if vote["skipped"] else "done"


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


def ratings_of(item: Item, said: JsonObject, config: LabelArgs) -> dict[str, list[int | None]]:
    """A column for each criterion, of ratings in row order; null where the item is skipped, or all bad and not rated.

    Raises:
        HTTPError: a response is not rated, or not by 1 to the scale.
    """
    given = said.get("ratings")
    if said.get("skipped") is True or (said.get("all_bad") is True and not given):
        return {RATING + criterion: [None] * len(item.names) for criterion in config.criteria}
    tables = given if isinstance(given, dict) else {}
    columns = {}
    for criterion in config.criteria:
        table = tables.get(criterion)
        column = [table.get(name) if isinstance(table, dict) else None for name in item.names]
        if any(type(rating) is not int or not 1 <= rating <= config.scale for rating in column):
            raise bottle.HTTPError(400, f"Rate every response first: {criterion}, 1 to {config.scale}.")
        columns[RATING + criterion] = column
    return columns


def make_app(page: Page) -> bottle.Bottle:
    """The page and what it asks."""
    app = web_app(STATIC, "label")

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
        return page.answer(posted())

    return app


def summary(votes: Votes, total: int) -> str:
    """What was gathered, in lines."""
    said = votes.agreement()
    lines = [f"{sum(one['answers'] for one in said['raters'])} answers by {len(said['raters'])} raters"]
    if said["share"] is not None:
        lines[0] += f"; two raters agree on {said['share']:.1%} of {said['pairs']} pairs"
    if said["alpha"] is not None:
        lines[0] += f", Krippendorff's alpha {said['alpha']:+.2f}"
    for one in said["raters"]:
        tau = "" if one["tau"] is None else f", Kendall's tau with the others {one['tau']:+.2f}"
        passed, asked = votes.checks(one["rater"])
        checks = f", {passed} of {asked} checks passed" if asked else ""
        counts = f"{one['answers']} of {total} answered, {one['skipped']} skipped"
        lines.append(f"  {printable(one['rater'])}: {counts}{checks}{tau}")
    return "\n".join(lines)


def checks_for(config: LabelArgs) -> list[Item]:
    """The config's attention checks."""
    return [check_of(row) for row in rows_from(config.checks)] if config.checks else []


def items_for(config: LabelArgs, rows: object) -> tuple[list[Item], str]:
    """(the items of rows or of a path, with the config's checks among them; what to say of rows that are left out)."""
    given = rows_from(rows, config.fields if isinstance(rows, str) else ())
    tell_left(given, lambda row: beside_vote(carried(row)).keys() | READ.get(layout_of(row), set()))
    items, left = items_of(given)
    if not items:
        raise UserError(
            f"no row has anything to rank: {counted(left)}; give rows with at least two different responses"
        )
    return with_checks(items, checks_for(config), config.seed), counted(left)


def counted(left: Counter[str]) -> str:
    """What is left out, in words."""
    return "; ".join(f"{count} {reason}" for reason, count in left.items())


def items_drawn(config: LabelArgs, supply: Supply) -> tuple[Callable[[int, list[Row]], list[Item]], list[Item]]:
    """(what makes items of a drawn batch, the checks spread over all batches; the items of the batches there are).

    `supply.left` counts what gives no item.
    """
    checks, keys = checks_for(config), set[str]()

    def made(batch: int, rows: list[Row]) -> list[Item]:
        items, left = items_of(rows)
        new = [item for item in items if item.key not in keys]
        keys.update(item.key for item in new)
        left += Counter({AGAIN: len(items) - len(new), ALIKE: supply.prompts_in(batch) - len(rows)})
        supply.left = supply.left + left  # a new one, since others read it
        return in_batch(new, checks, batch, supply.count, config.seed)

    there = [item for batch, rows in enumerate(supply.batches) for item in made(batch, rows)]
    return made, list({item.key: item for item in there}.values())


def run(config: LabelArgs) -> None:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP, then say what was gathered."""
    with contextlib.ExitStack() as stack:
        supply: Supply | None = None
        if config.model.path:
            from rlhf_jax.commands.label.drawing import Supply  # which imports jax

            supply = stack.enter_context(Supply(config))
            made, items = items_drawn(config, supply)
            note = counted(supply.left)
        else:
            items, note = items_for(config, config.path)
        votes = stack.enter_context(contextlib.closing(Votes(config.output, items)))
        page = Page(items, votes, config)
        with listening(config.host, config.port, make_app(page)) as (server, address):
            checks = sum(item.known is not None for item in items)
            known, left_out = f", {checks} of them checks" * bool(checks), f"; left out: {note}" * bool(note)
            tell(f"{config.path}: {len(items)} items to rank{known}{left_out}")
            if votes.mended:
                tell(f"{config.output}: a crash cut the last answer short; its {votes.mended} bytes are removed")
            if config.host not in LOOPBACK:
                tell(f"! {config.host} is open to its network, and what is typed is not encrypted")
            tell(f"open {address}   (answers go to {config.output}; Ctrl-C ends)")
            if supply:
                supply.start(lambda batch, rows: page.add(made(batch, rows)), page.waiting)
            serve(server)
        tell("\n" + summary(votes, len(items)))
        if supply and supply.left:
            tell(f"left out of what was drawn: {counted(supply.left)}")
