"""A conversation on a page: lines as they are drawn, votes as rows, and nothing kept of what was broken off."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import bottle
import jax
import pytest

from rlhf_jax.commands.chat.page import Room
from rlhf_jax.commands.chat.policy import Answer
from rlhf_jax.commands.chat.talk import preferred
from rlhf_jax.config import ChatArgs
from rlhf_jax.data.messages import key_of
from rlhf_jax.data.schemas import preference_row
from rlhf_jax.hosts.files import Lines


class Parrot:
    """Stands in for a policy: says its word and what it was asked, word by word, and waits where it is told to."""

    def __init__(self, word: str):
        self.word, self.asked, self.keys, self.goes_on = word, [], [], threading.Event()
        self.goes_on.set()

    def answer(self, prompt, key):
        self.asked.append(prompt)
        self.keys.append(jax.random.key_data(key).tolist())
        text = f"**{self.word}** {prompt if isinstance(prompt, str) else prompt[-1]['content']}"
        for piece in text.replace(" ", " |").split("|"):
            self.goes_on.wait(20)
            yield piece
        return Answer(text, [ord(self.word[0])], self.word != "cut", left_out=3 * (self.word == "cut"))


def room_of(output: Path | None, *words: str, **options) -> Room:
    models = [f"runs/{word}/model" for word in words]
    config = ChatArgs(models=models, output=str(output or ""), **options)
    return Room(config, [Parrot(word) for word in words], Lines(output) if output else None)


def said(room: Room, **body) -> list[dict]:
    return [json.loads(one) for one in room.say(body)]


def test_two_policies_are_drawn_in_turn_with_one_noise_and_a_vote_decides_what_the_talk_goes_on_with(tmp_path):
    room = room_of(tmp_path / "votes.jsonl", "one", "two", system="s")
    first, second = room.policies
    lines = said(room, text="hello you")
    assert [one["side"] for one in lines[:4]] == [0, 1, 0, 1] and [one["piece"] for one in lines[:2]] == [
        "**one** ",
        "**two** ",
    ]
    pieces = ["".join(one["piece"] for one in lines if one.get("side") == side and "piece" in one) for side in (0, 1)]
    assert pieces == [one["text"] for one in lines if "text" in one] == ["**one** hello you", "**two** hello you"]
    end = lines[-1]
    assert end["votes"] and end["best"] == 0 and first.keys == second.keys
    assert room.vote({"talk": end["talk"], "best": 1}) == {"votes": 1}
    for again in ({"talk": end["talk"], "best": 1}, {"talk": end["talk"], "best": 2}, {"talk": "other", "best": 0}):
        with pytest.raises(bottle.HTTPError):
            room.vote(again)
    said(room, talk=end["talk"])  # once more, with other noise
    assert first.asked[0] == first.asked[1] and first.keys[0] != first.keys[1]
    room.vote({"talk": end["talk"], "best": 1, "tie": True})
    said(room, talk=end["talk"], text="and you?")
    assert [turn["content"] for turn in second.asked[-1]] == ["s", "hello you", "**two** hello you", "and you?"]
    rows = [json.loads(one) for one in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert rows == room.votes and [preference_row(row)["label"] for row in rows] == [1, 0.5]
    assert (
        rows[0]["models"] == ["runs/two/model", "runs/one/model"] and key_of(rows[0]["chosen"]) == "**two** hello you"
    )


def test_blind_the_sides_change_by_the_seed_unsaid_and_the_rows_and_the_end_name_them(tmp_path):
    orders = []
    for _ in range(2):  # the same seed, the same sides
        room = room_of(None, "one", "two", blind=True, plain=True, seed=3)
        assert room.start()["models"] == ["", ""]
        shown = [said(room, text=f"hello {i}") for i in range(8)]
        assert all("runs/" not in json.dumps(lines) for lines in shown)
        orders.append([lines[0]["piece"] for lines in shown])
        for i, lines in enumerate(shown):
            room.vote({"talk": lines[-1]["talk"], "best": i % 2})
    assert orders[0] == orders[1] and set(orders[0]) == {"**one** ", "**two** "}
    for row in room.votes:
        assert [f"runs/{row[name][2:5]}/model" for name in ("chosen", "rejected")] == row["models"]
    ones = sum(row["models"][0] == "runs/one/model" for row in room.votes)
    assert preferred(room.votes, room.config.models) == f"runs/one/model {ones}; runs/two/model {8 - ones}; ties 0"


def test_what_is_broken_off_was_not_said_and_an_end_waits_for_no_whole_answer():
    room = room_of(None, "one")
    name = said(room, text="a b")[-1]["talk"]
    drawn = room.say({"talk": name, "text": "c d"})
    next(drawn)
    drawn.close()  # as when the page goes away
    said(room, talk=name, text="e")
    assert [turn["content"] for turn in room.policies[0].asked[-1]] == ["a b", "**one** a b", "e"]
    for nothing in ({}, {"talk": name, "text": " "}, {"talk": "other", "text": "x"}, {"text": ["x"]}):
        with pytest.raises(bottle.HTTPError):
            said(room, **nothing)
    drawn = room.say({"talk": name, "text": "f g h"})
    next(drawn)
    ending = threading.Thread(target=room.close)
    ending.start()
    while not room._ends:
        ending.join(0.01)
    assert len(list(drawn)) <= 1
    ending.join(20)
    assert not ending.is_alive()
