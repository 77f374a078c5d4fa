"""The conversation as a page in the browser, served to this machine alone."""

from __future__ import annotations

import copy
import json
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import bottle
import jax

from rlhf_jax.commands.chat.policy import Answer, Policy
from rlhf_jax.commands.chat.talk import UNANSWERED, Talk, comparable, first_said, preference, sides, started
from rlhf_jax.commands.web import LOOPBACK, listening, serve
from rlhf_jax.commands.web.app import make_app as web_app
from rlhf_jax.commands.web.app import posted
from rlhf_jax.config import ChatArgs
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, tell
from rlhf_jax.hosts.files import Lines
from rlhf_jax.hosts.json_text import JsonObject

STATIC = Path(__file__).parent / "static"


@dataclass
class Held:
    """A conversation that a page holds, the last answers, whose they are, and whether there is a vote on them."""

    talk: Talk
    answers: list[Answer] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    voted: bool = False


class Room:
    """What the page may ask, as plain functions of plain data. One answer is drawn at a time, whoever asks."""

    def __init__(self, config: ChatArgs, policies: list[Policy], lines: Lines | None):
        """`lines` gets the rows of the votes."""
        self.config, self.policies, self.lines = config, policies, lines
        self.votes: list[Row] = []
        self._held: dict[str, Held] = {}
        self._number, self._ends = 0, False
        self._one_at_a_time = threading.Lock()

    def start(self) -> JsonObject:
        """What the page says of the policies."""
        plain, system = self.config.plain, self.config.system
        models = ["" for _ in self.policies] if self.config.blind else self.config.models
        return {"models": models, "plain": plain, "system": system, "output": self.config.output}

    def say(self, said: JsonObject) -> Iterator[str]:
        """Answer {talk, text}, or {talk} once more: lines of JSON as they come.

        {side, piece} is more of an answer, {side, text, finished, left_out, remarks} the whole of it. The last line is
        {talk, votes, best, unanswered}: the conversation's name, a new one if none was named, whether a vote is taken,
        what it goes on with, and what to say if that is empty. Where the page goes away meanwhile, nothing was said.
        """
        name, text = said.get("talk"), said.get("text")
        held = self._find(name) if name else Held(started(self.config))
        talk, name = copy.copy(held.talk), str(name or secrets.token_urlsafe(8))
        if isinstance(text, str) and text.strip():
            talk.ask(text)
        elif text is not None or not talk.prompt:
            raise bottle.HTTPError(400, "Say something first.")
        with self._one_at_a_time:
            self._number += 1
            key = jax.random.fold_in(jax.random.key(self.config.seed), self._number)
            order = sides(self.config, self._number)
            drawn = [self.policies[i].answer(talk.prompt, key) for i in order]
            answers = dict[int, Answer]()
            while len(answers) < len(drawn) and not self._ends:
                for side in (side for side in range(len(drawn)) if side not in answers):  # a piece of each in turn
                    try:
                        yield line(side=side, piece=next(drawn[side]))
                    except StopIteration as end:
                        answers[side] = one = end.value
                        told = {"finished": one.finished, "left_out": one.left_out, "remarks": one.remarks}
                        yield line(side=side, text=one.text, **told)
                    except UserError as error:
                        yield line(error=str(error))
                        return
            if self._ends:
                return
        both = [answers[side] for side in range(len(drawn))]
        best = first_said(both)
        talk.answered(both[best].text)
        self._held[name] = Held(talk, both, order)
        unanswered = "" if talk.is_answered else UNANSWERED
        yield line(talk=name, votes=comparable(both), best=best, unanswered=unanswered)

    def vote(self, said: JsonObject) -> JsonObject:
        """Keep a vote {talk, best: 0 or 1, tie} on the last answers; the conversation goes on with the better one."""
        held, best = self._find(said.get("talk")), said.get("best")
        if type(best) is not int or best not in (0, 1) or not comparable(held.answers):
            raise bottle.HTTPError(400, "There are no two answers to compare.")
        with self._one_at_a_time:
            if held.voted:
                raise bottle.HTTPError(400, "There is a vote on these answers already.")
            models = [self.config.models[i] for i in held.order]
            row = preference(held.talk.prompt, held.answers, models, best, tie=said.get("tie") is True)
            try:
                if self.lines is not None:
                    self.lines.add([row], sync=True)
            except OSError as error:
                raise bottle.HTTPError(507, f"The vote could not be written ({error.strerror}); try again.") from error
            held.voted = True
            held.talk.answered(held.answers[best].text)
            self.votes.append(row)
        return {"votes": len(self.votes)}

    def close(self) -> None:
        """End what is being drawn, and wait for it: an interpreter that clears up while XLA computes crashes."""
        self._ends = True
        self._one_at_a_time.acquire()

    def _find(self, name: object) -> Held:
        if str(name) not in self._held:
            raise bottle.HTTPError(404, "The server does not hold this conversation any more; begin a new one.")
        return self._held[str(name)]


def line(**said: object) -> str:
    """A line of JSON."""
    return json.dumps(said) + "\n"


def make_app(room: Room) -> bottle.Bottle:
    """The page and what it asks."""
    app = web_app(STATIC, "chat")

    @app.get("/api/start")
    def start() -> JsonObject:
        return room.start()

    @app.post("/api/say")
    def say() -> Iterator[str]:
        bottle.response.content_type = "application/x-ndjson"
        return room.say(posted())

    @app.post("/api/vote")
    def vote() -> JsonObject:
        return room.vote(posted())

    return app


def converse_on_page(config: ChatArgs, policies: list[Policy], lines: Lines | None) -> list[Row]:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP; the preference rows of the votes, which `lines` gets too."""
    room = Room(config, policies, lines)
    with listening(LOOPBACK[0], config.port, make_app(room)) as (server, address):
        kept = f"votes go to {config.output}" if config.output else "votes are kept nowhere: --output"
        tell(f"open {address}   ({kept}; Ctrl-C ends)")
        serve(server)
    room.close()
    tell()
    return room.votes
