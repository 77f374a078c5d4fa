"""The labelling page without a browser: who may ask, what is kept, and what a crash leaves."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.commands.label.items import check_of, item_of, items_of, turns_of, with_checks
from rlhf_jax.commands.label.notebook import LabelPage
from rlhf_jax.commands.label.server import STATIC, Page, items_for, make_app, run, summary
from rlhf_jax.commands.label.votes import Votes
from rlhf_jax.commands.web import LOOPBACK, guard, make_server
from rlhf_jax.commands.web.app import SHARED
from rlhf_jax.config import LabelArgs
from rlhf_jax.data import rankings
from rlhf_jax.data.agreement import krippendorff_alpha, rater_taus
from rlhf_jax.data.ballots import ranking_row
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, tell

TOKEN = "t0ken"
VENDORED = {"markdown-it.min.js": "391f2aa638e75e6c", "purify.min.js": "f69a46022ab1f53e"}
"""The beginnings of the digests of the libraries in their packages."""
ROWS = [
    {
        "prompt": f"Question {i}?",
        "responses": [{"text": f" answer {j} of {i}", "model": f"m{j}", "rank": j} for j in range(4)],
    }
    for i in range(5)
]


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@contextlib.contextmanager
def served(tmp_path: Path, rows=ROWS, checks=(), **options):
    """(ask, page): a server of the rows in a thread; ask(method, path, body, **headers) -> (status, headers, text)."""
    path = write_lines(tmp_path / "rows.jsonl", rows)
    config = LabelArgs(path=path, output=str(tmp_path / "votes.jsonl"), port=0, **options)
    items, _ = items_of(rows_from(path))
    items = with_checks(items, [check_of(row) for row in rows_from(checks)] if checks else [], config.seed)
    page = Page(items, Votes(config.output, items), config)
    server = make_server(config.host, config.port, guard(make_app(page), TOKEN, LOOPBACK))
    page.port = server.server_port
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
    thread.start()

    def ask(method: str, path: str, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, text

    try:
        yield ask, page
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        page.votes.close()


def by_text(shown: dict, ranks_of_text: dict[str, int]) -> dict[str, int]:
    """What the page posts: name -> place, out of text -> place."""
    return {r["name"]: ranks_of_text[r["text"]] for r in shown["responses"]}


def place(text: str) -> int:
    """ "answer 2 of 0" -> 2: the place that the tests give it."""
    return int(text.split()[1])


def test_nothing_is_answered_without_the_token_or_under_another_name(tmp_path):
    with served(tmp_path) as (ask, _):
        assert ask("GET", f"/{TOKEN}/")[0] == 200
        for path in ("/", "/api/start", "/wrong/api/start", f"/{TOKEN}x/api/start", f"/{TOKEN[:-1]}/api/start"):
            status, _, text = ask("GET", path)
            assert status == 403 and "token" in text and "items" not in text
        for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]:80"):
            status, _, text = ask("GET", f"/{TOKEN}/api/start", Host=name)
            assert status == 403 and "name" in text
        for name in ("localhost:9", "127.0.0.1", "[::1]:8765", "LOCALHOST"):  # ports may be forwarded
            assert ask("GET", f"/{TOKEN}/api/start", Host=name)[0] == 200


def test_every_answer_forbids_what_the_page_does_not_need(tmp_path):
    with served(tmp_path) as (ask, _):
        for path in (f"/{TOKEN}/", f"/{TOKEN}/app.js", f"/{TOKEN}/api/start", f"/{TOKEN}/nothing", "/"):
            headers = ask("GET", path)[1]
            assert headers["content-security-policy"].startswith("default-src 'none'")
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert ask("GET", f"/{TOKEN}/../server.py")[0] == 404
        assert ask("GET", f"/{TOKEN}/static/..%2fserver.py")[0] == 404


def test_the_page_is_whole_in_itself():
    others = [SHARED / name for name in VENDORED]
    assert {path.name for path in STATIC.iterdir()} == {"page.html", "app.css", "app.js"}
    for path in {*STATIC.iterdir(), *SHARED.iterdir()} - {*others, SHARED / "LICENSES.txt"}:
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(
            r"https?://|//[a-z0-9.-]+\.[a-z]{2,}/|innerHTML|insertAdjacentHTML|eval\(|document\.write", text
        )
    # The libraries are those that were published; none makes code of texts, which the policy would refuse.
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in others} == VENDORED
    assert all(not re.search(r"\beval\(|new Function", path.read_text()) for path in others)
    assert all(f"{name} is dist/" in (SHARED / "LICENSES.txt").read_text() for name in VENDORED)
    html = (STATIC / "page.html").read_text()
    assert all(
        (STATIC / name).exists() or (SHARED / name).exists() for name in re.findall(r'(?:src|href)="(.+?)"', html)
    )
    assert not re.search(r"<style|\son\w+=|style=|<script(?! src)", html)  # the policy would block them
    script = (STATIC / "app.js").read_text() + (SHARED / "common.js").read_text()
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= set(re.findall(r'id="([\w-]+)"', html))


def test_the_static_files_are_in_the_wheel():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "commands/*/static/*" in project["tool"]["setuptools"]["package-data"]["rlhf_jax"]


def test_ranks_are_stored_in_row_order_whatever_the_order_on_the_page(tmp_path):
    with served(tmp_path) as (ask, _):
        orders = []
        for rater in ("anna", "ben", "cleo"):
            for at in range(5):
                shown = json.loads(ask("GET", f"/{TOKEN}/api/item?rater={rater}&at={at}")[2])
                orders.append([place(r["text"]) for r in shown["responses"]])
                posted = {r["name"]: [2, 0, 1, 1][place(r["text"])] for r in shown["responses"]}
                answer = {"rater": rater, "item": shown["item"], "ranks": posted}
                assert json.loads(ask("POST", f"/{TOKEN}/api/answer", answer)[2]) == {"saved": True, "state": "done"}
        votes = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
        assert len(votes) == 15 and all(vote["ranks"] == [2, 0, 1, 1] for vote in votes)
        assert [vote["order"] for vote in votes] == orders
        assert len({tuple(order) for order in orders}) > 5
        again = json.loads(ask("GET", f"/{TOKEN}/api/item?rater=anna&at=3")[2])
        assert {r["text"]: again["answer"]["ranks"][r["name"]] for r in again["responses"]} == {
            f"answer {j} of 3": [2, 0, 1, 1][j] for j in range(4)
        }
    (joined, *_) = rows_from(str(tmp_path / "votes.jsonl"))
    ranking = ranking_row(joined)
    assert ranking.responses == [f" answer {j} of 0" for j in range(4)]
    verdicts = [(ballot.rater, ballot.ranks) for ballot in ranking.ballots]
    assert verdicts == [(rater, [2.0, 0.0, 1.0, 1.0]) for rater in ("anna", "ben", "cleo")]


def test_the_order_on_the_page_is_fair_and_a_function_of_seed_rater_and_item():
    item = item_of({**ROWS[0], "_where": "row 0"})
    assert item.order("anna", 0) == item.order("anna", 0)
    seen = np.array([item.order(f"rater {i}", seed) for i in range(200) for seed in range(10)])
    counts = np.array([np.bincount(seen[:, place], minlength=4) for place in range(4)])
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 3 / 16)  # five standard deviations
    others = items_of([{**row, "_where": "x"} for row in ROWS])[0]
    assert len({tuple(other.order("anna", 0)) for other in others}) > 1


def test_the_page_does_not_say_where_a_response_comes_from(tmp_path):
    with served(tmp_path) as (ask, _):
        text = ask("GET", f"/{TOKEN}/api/item?rater=anna")[2]
        assert '"m1"' not in text and "rank" not in text and "order" not in text
        ask("POST", f"/{TOKEN}/api/answer", {"rater": "anna", "item": json.loads(text)["item"], "all_bad": True})
    assert '"model": "m1"' in (tmp_path / "votes.jsonl").read_text()


def answer_all(ask, rater: str, ranks: list[int], count: int = 5) -> None:
    for at in range(count):
        shown = json.loads(ask("GET", f"/{TOKEN}/api/item?rater={rater}&at={at}")[2])
        posted = {r["name"]: ranks[place(r["text"])] for r in shown["responses"]}
        assert ask("POST", f"/{TOKEN}/api/answer", {"rater": rater, "item": shown["item"], "ranks": posted})[0] == 200


def test_a_later_answer_of_a_rater_wins_and_the_first_unanswered_item_comes_next(tmp_path):
    with served(tmp_path) as (ask, page):
        answer_all(ask, "anna", [0, 1, 2, 3], 2)
        answer_all(ask, "anna", [3, 2, 1, 0], 1)
        assert json.loads(ask("GET", f"/{TOKEN}/api/item?rater=anna")[2])["at"] == 2
        assert json.loads(ask("GET", f"/{TOKEN}/api/item?rater=ben")[2])["at"] == 0
        assert summary(page.votes, 5).splitlines()[0] == "2 answers by 1 raters"
    rows = rows_from(str(tmp_path / "votes.jsonl"))
    assert [row["raters"][0]["ranks"] for row in rows] == [[3, 2, 1, 0], [0, 1, 2, 3]]


def test_skips_comments_and_all_bad_are_kept(tmp_path):
    with served(tmp_path) as (ask, page):
        keys = [item.key for item in page.items]
        post = lambda **said: ask("POST", f"/{TOKEN}/api/answer", {"rater": " anna ", **said})  # noqa: E731
        assert post(item=keys[0], skipped=True, comment="unclear")[0] == 200
        assert post(item=keys[1], all_bad=True, seconds=12.34)[0] == 200
        assert json.loads(ask("GET", f"/{TOKEN}/api/item?rater=anna")[2])["states"] == ["skipped", "done", "", "", ""]
        assert page.votes.agreement()["raters"] == [
            {"rater": "anna", "answers": 1, "skipped": 1, "tau": None, "pairs": 0}
        ]
    one, two = (json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines())
    assert (one["ranks"], one["skipped"], one["comment"]) == ([None] * 4, True, "unclear")
    assert (two["ranks"], two["all_bad"], two["seconds"]) == ([0] * 4, True, 12.3)


@pytest.mark.parametrize(
    ("said", "status", "line"),
    [
        ({"item": "nothing"}, 404, "hold"),
        ({"ranks": {}}, 400, "place"),
        ({"ranks": {"a": 0}}, 400, "place"),
        ({"ranks": "some"}, 400, "place"),
        ({"rater": " "}, 400, "name"),
        ({"rater": "x" * 61}, 400, "name"),
        ({"rater": "cleo"}, 400, "cleo"),
        ([1], 400, "object"),
        (b"{", 400, "JSON"),
        (b"x" * 200_000, 413, ""),
        (b"[" * 90_000, 400, "JSON"),
        (b'{"seconds": %s}' % (b"9" * 5000), 400, "JSON"),
        ({"rater": "an\ud83dna"}, 400, "control"),
        ({"rater": "\x1b[31manna"}, 400, "control"),
    ],
)
def test_an_answer_that_is_none_is_refused_and_nothing_is_written(tmp_path, said, status, line):
    with served(tmp_path, raters=["anna", "ben"]) as (ask, page):
        if isinstance(said, dict):
            said = {"rater": "anna", "item": page.items[0].key, **said}
        got, _, text = ask("POST", f"/{TOKEN}/api/answer", said)
        assert got == status and line in json.loads(text)["error"]
        assert (tmp_path / "votes.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "size",
    [
        {"Content-Length": "9" * 400},
        {"Content-Length": "-1"},
        {"Content-Length": "x"},
        {"Transfer-Encoding": "chunked"},
    ],
)
def test_a_post_of_no_known_size_is_refused_unread(tmp_path, size, capfd):
    with served(tmp_path) as (ask, _):
        assert ask("POST", f"/{TOKEN}/api/answer", None, **size)[0] == 413
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1, 10**400, "1", [1]])
def test_a_time_that_is_none_is_left_out(tmp_path, seconds):
    with served(tmp_path) as (ask, page):
        answer = {"rater": "anna", "item": page.items[0].key, "all_bad": True, "seconds": seconds}
        assert ask("POST", f"/{TOKEN}/api/answer", answer)[0] == 200
    assert json.loads((tmp_path / "votes.jsonl").read_text())["seconds"] is None


def test_forty_raters_may_come_before_the_first_is_served(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    config = LabelArgs(path=path, output=str(tmp_path / "votes.jsonl"), port=0)
    with make_server(config.host, config.port, lambda *_: []) as server, contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(socket.create_connection(server.server_address, timeout=0.5))


def test_clients_that_are_slow_or_go_away_hold_up_nobody_and_say_nothing(tmp_path, capfd):
    with served(tmp_path) as (ask, page), contextlib.ExitStack() as stack:
        address = ("127.0.0.1", page.port)
        for half in (b"", b"GET /", b"POST /%s/api/answer HTTP/1.1\r\nContent-Length: 50\r\n\r\n{" % TOKEN.encode()):
            stack.enter_context(socket.create_connection(address)).sendall(half)
        assert ask("GET", f"/{TOKEN}/api/start")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_what_acts_on_a_terminal_or_is_no_character_goes_through_a_vote_unharmed(tmp_path, capfd):
    odd = "\x1b]0;mine\x07 \x9b2J \ud83d \u2028"
    rows = [{"prompt": odd, "responses": [{"text": f"{odd} {j}", "model": odd} for j in range(2)]}]
    with served(tmp_path, rows) as (ask, page):
        shown = json.loads(ask("GET", f"/{TOKEN}/api/item?rater=anna")[2])
        assert shown["turns"][0]["content"] == odd.strip()
        answer = {"rater": "anna", "item": shown["item"], "comment": odd}
        answer["ranks"] = {response["name"]: i for i, response in enumerate(shown["responses"])}
        assert ask("POST", f"/{TOKEN}/api/answer", answer)[0] == 200
        page.votes.latest[shown["item"], odd] = page.votes.latest[shown["item"], "anna"]  # of another version
        tell(summary(page.votes, 1))
    assert set(capfd.readouterr().out) & set("\x1b\x07\x9b\u2028") == set()
    (row,) = rows_from(str(tmp_path / "votes.jsonl"))
    assert row["prompt"] == odd and row["raters"][0]["comment"] == odd


def test_half_ranked_and_nearly_ranked_answers_are_refused(tmp_path):
    with served(tmp_path) as (ask, page):
        item = page.items[0]
        for ranks in (
            {item.names[0]: 0},
            {**dict.fromkeys(item.names, 0), item.names[1]: None},
            dict.fromkeys(item.names, 1.5),
        ):
            assert ask("POST", f"/{TOKEN}/api/answer", {"rater": "anna", "item": item.key, "ranks": ranks})[0] == 400
        kept = dict(zip(item.names, [7, 3, 3, 9], strict=True))
        assert ask("POST", f"/{TOKEN}/api/answer", {"rater": "anna", "item": item.key, "ranks": kept})[0] == 200
        assert page.votes.latest[item.key, "anna"]["ranks"] == [1, 0, 0, 2]


def test_an_answer_that_the_disk_refuses_is_not_called_saved(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with served(tmp_path) as (ask, page):
        answer = {"rater": "anna", "item": page.items[0].key, "all_bad": True}
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            status, _, text = ask("POST", f"/{TOKEN}/api/answer", answer)
            assert status == 507 and "No space left" in text and not page.votes.latest
        assert ask("POST", f"/{TOKEN}/api/answer", answer)[0] == 200
    assert len(rows_from(str(tmp_path / "votes.jsonl"))) == 1


@pytest.mark.parametrize("cut", [1, 10, 11, 40, 300])
def test_a_last_line_that_a_crash_cut_short_is_mended(tmp_path, cut):
    with served(tmp_path) as (ask, _):
        answer_all(ask, "anna", [0, 1, 2, 3], 2)
    path = tmp_path / "votes.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[: -1 if cut == 1 else cut])
    with served(tmp_path) as (ask, page):
        assert len(page.votes.latest) == (2 if cut == 1 else 1)  # only its line break was missing
        assert page.votes.mended == (0 if cut == 1 else cut)
        answer_all(ask, "ben", [0, 1, 2, 3], 1)
    assert path.read_bytes().startswith(first) and len(path.read_bytes().splitlines()) == (3 if cut == 1 else 2)
    rows_from(str(path))


def test_files_of_others_are_left_alone(tmp_path):
    path = tmp_path / "votes.jsonl"
    items, _ = items_of(rows_from(ROWS))
    for text, line in (
        ('{"note": "mine"}', "last line is no answer"),
        ('{"note": "mine"}\n', r"votes.jsonl:1: not an answer"),
        ('{"item": "x", "rater": "a", "prompt": "p", "responses": [], "ranks": [], "order": [], "all_bad": false, '
         '"skipped": false, "comment": ""}\n', "votes.jsonl:1: an answer to an item that the rows do not hold"),
        ('{"item": ["x"], "rater": "a", "prompt": "p", "responses": [], "ranks": [], "order": [], "all_bad": false, '
         '"skipped": false, "comment": ""}\n', "votes.jsonl:1: not an answer"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=line):
            Votes(str(path), items)
        assert path.read_text() == text


def test_answers_go_on_when_rows_are_added_and_not_when_they_change(tmp_path):
    with served(tmp_path) as (ask, _):
        answer_all(ask, "anna", [0, 1, 2, 3], 1)
    more = {"prompt": "More?", "responses": ["yes", "no"]}
    with served(tmp_path, rows=[more, *ROWS]) as (ask, _):
        assert json.loads(ask("GET", f"/{TOKEN}/api/item?rater=anna")[2])["states"] == ["", "done", "", "", "", ""]
    with pytest.raises(UserError, match="belongs to other rows"), served(tmp_path, rows=ROWS[1:]):
        pass


def test_two_processes_do_not_write_one_file(tmp_path):
    items, _ = items_of(rows_from(ROWS))
    first = Votes(str(tmp_path / "votes.jsonl"), items)
    with pytest.raises(UserError, match="another `rlhf-jax label`"):
        Votes(str(tmp_path / "votes.jsonl"), items)
    first.close()
    Votes(str(tmp_path / "votes.jsonl"), items).close()


def test_preference_and_chat_rows_are_items_too():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "ok"},
    ]
    chat = {
        "prompt": messages,
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }
    transcript = {"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: bad"}
    for row in (chat, transcript):
        item = item_of({**row, "_where": "x"})
        assert [r["text"] for r in item.ranking.items()] == ["good", "bad"] and item.ranking.ballots == []
    assert [turn["role"] for turn in turns_of(messages)] == ["user", "assistant", "user"]
    assert turns_of("\n\nHuman: hi\n\nAssistant:") == [{"role": "user", "content": "hi"}]
    assert turns_of("Once upon") == [{"role": "prompt", "content": "Once upon"}]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "p", "responses": ["a"]}, "fewer than two responses"),
        ({"prompt": "p", "responses": ["a", "a", ""]}, "fewer than two different"),
        ({"prompt": "p", "responses": [{"txt": "a"}, "b"]}, r'row 0: responses 0 has no "text"'),
        ({"prompt": "p", "response": "a"}, "row 0: a prompt-completion row has no responses"),
        ({"prompt": "p", "responses": [f"{i}" for i in range(13)]}, "row 0: 13 responses are more"),
    ],
)
def test_rows_that_nobody_can_rank_are_one_line(row, line):
    with pytest.raises(UserError, match=line):
        items_for(LabelArgs(output="votes.jsonl"), [row])


def test_equal_rows_and_equal_responses_are_there_once():
    more = [{"prompt": "p", "responses": ["a", "b", "a"]}, {"prompt": "p", "responses": ["a", "a"]}]
    items, note = items_for(LabelArgs(output="votes.jsonl"), [*ROWS, ROWS[0], *more])
    assert [len(item.names) for item in items] == [4] * 5 + [2]
    assert note == "1 there already; 1 with fewer than two different responses"


def test_votes_of_one_item_join_and_other_rows_stay():
    vote = lambda rater, ranks, **more: {  # noqa: E731
        "item": "x", "rater": rater, "prompt": "p", "responses": ["a", "b"], "ranks": ranks, **more
    }  # fmt: skip
    plain = {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 1], "item": ["odd"]}
    rows = rows_from([vote("anna", [0, 1]), plain, vote("ben", [1, 0]), vote("anna", [0, 0], comment="both")])
    assert [row["_where"] for row in rows] == ["row 0", "row 1"]
    assert rows[0]["raters"] == [
        {"rater": "anna", "ranks": [0, 0], "comment": "both"},
        {"rater": "ben", "ranks": [1, 0]},
    ]
    assert rows[1]["item"] == ["odd"] and prompt_key(rows[0]) == "p"
    [anonymous] = rows_from([vote(None, [0, 1]), vote("", [1, 0]), vote(None, [1, 0])])
    assert [said["ranks"] for said in anonymous["raters"]] == [[0, 1], [1, 0], [1, 0]]
    with pytest.raises(UserError, match=r"row 1: another prompt or responses than row 0"):
        rows_from([vote("anna", [0, 1]), {**vote("ben", [0, 1]), "responses": ["a", "c"]}])
    with pytest.raises(UserError, match=r"row 1: another prompt or responses than row 0"):
        rows_from(
            [vote("anna", [0, 1]), {**vote("ben", [0, 1]), "responses": ["a", {"text": "b", "finished": False}]}]
        )
    table = [{**plain, "item": None, "rater": None}] * 2  # of rows some of which are votes
    assert rows_from([{**row, "prompt": p} for row, p in zip(table, "rs", strict=True)])[1]["prompt"] == "s"


def test_rows_of_the_same_texts_may_say_other_things_of_them_and_it_is_counted(tmp_path, capsys):
    """The rows were aggregated anew, or sampled ids were added, between one rater and the next."""

    def rows(strength, **more):
        items = [
            {"text": text, "ids": [i, strength], "strength": strength / 2} for i, text in enumerate(("a 0", "b 1"))
        ]
        return [{"prompt": "p", "responses": items, **more}]

    for rater, strength, source in (("anna", 1, "old"), ("ben", 2, "new"), ("cleo", 2, "new")):
        with served(tmp_path, rows=rows(strength, source=source)) as (ask, _):
            answer_all(ask, rater, [0, 1], 1)
    capsys.readouterr()
    [row] = rows_from(str(tmp_path / "votes.jsonl"))
    assert [each["rater"] for each in row["raters"]] == ["anna", "ben", "cleo"] and row["source"] == "old"
    assert row["responses"][0] == {"text": "a 0", "ids": [0, 1], "finished": True, "strength": 0.5}
    said = "fields in which votes are not as the first on their item, which counts: "
    assert f"{said}'ids' of 2, 'source' of 2, 'strength' of 2" in capsys.readouterr().err


def plain_tau(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """(sum s_a s_b, sum s_a^2, sum s_b^2) over the pairs of one item, by loops."""
    total = [0.0, 0.0, 0.0]
    for i in range(len(a)):
        for j in range(i):
            if not np.isnan([a[i], a[j], b[i], b[j]]).any():
                x, y = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
                total = [total[0] + x * y, total[1] + x * x, total[2] + y * y]
    return tuple(total)


def test_rater_taus_are_kendalls():
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 3, (3, 4, 5)).astype(float)  # rater, item, response
    ranks[0, 1, 2] = ranks[2, 3] = np.nan
    order = [(g, r, ranks[r, g].tolist()) for g in range(4) for r in range(3)]
    taus, pairs = rater_taus(rankings.comparisons(order, num_raters=4))
    for r in range(3):
        parts = np.sum([plain_tau(ranks[r, g], ranks[o, g]) for g in range(4) for o in range(3) if o != r], axis=0)
        np.testing.assert_allclose(taus[r], parts[0] / np.sqrt(parts[1] * parts[2]), atol=1e-12)
    assert np.isnan(taus[3]) and pairs[3] == 0 and pairs[2] == 10 + 6 + 10 + 10 + 10 + 10
    same = [(0, 0, [0, 1, 2]), (0, 1, [0, 1, 2]), (1, 0, [2, 0]), (1, 1, [1, 0])]
    assert rater_taus(rankings.comparisons(same, num_raters=2))[0].tolist() == [1, 1]
    scipy = pytest.importorskip("scipy.stats")
    two = rankings.comparisons([(0, 0, [1, 2, 2, 4, 0]), (0, 1, [0, 1, 3, 3, 2])], num_raters=2)
    assert rater_taus(two)[0][0] == pytest.approx(scipy.kendalltau([1, 2, 2, 4, 0], [0, 1, 3, 3, 2]).statistic)


def alpha_by_definition(values: list[list[float]]) -> float:
    """1 - observed / expected disagreement over all pairs of values, in a unit and everywhere, by loops."""
    units = [unit for unit in values if len(unit) > 1]
    n = sum(map(len, units))
    observed = sum(
        (a - b) ** 2 / (len(u) - 1) for u in units for i, a in enumerate(u) for j, b in enumerate(u) if i != j
    )
    every = [value for unit in units for value in unit]
    return 1 - observed / n / (sum((a - b) ** 2 for a in every for b in every) / (n * (n - 1)))


def test_krippendorffs_alpha_is_that_of_the_definition_and_of_the_package():
    rng = np.random.default_rng(1)
    ranks = rng.integers(0, 3, (3, 4, 4)).astype(float)  # rater, item, response
    ranks[0, 1, 2] = ranks[2, 3] = ranks[1, 3] = np.nan  # one item has one rater, who says nothing then
    given = rankings.comparisons([(g, r, ranks[r, g].tolist()) for g in range(4) for r in range(3)], num_raters=3)
    signs = np.sign(ranks[..., None] - ranks[..., None, :])  # [rater, item, response, response]: both ways round
    table = signs[..., ~np.eye(4, dtype=bool)].reshape(3, -1)
    units = [column[~np.isnan(column)].tolist() for column in table.T]
    assert krippendorff_alpha(given) == pytest.approx(alpha_by_definition(units))
    same = [(0, 0, [0, 1, 2]), (0, 1, [0, 1, 2]), (1, 0, [2, 0])]
    assert krippendorff_alpha(rankings.comparisons(same, num_raters=2)) == 1
    assert np.isnan(krippendorff_alpha(rankings.comparisons(same[2:], num_raters=2)))
    package = pytest.importorskip("krippendorff")
    for level in ("interval", "ordinal"):  # one metric, as wins are as many as losses
        assert krippendorff_alpha(given) == pytest.approx(package.alpha(table, level_of_measurement=level))


def test_checks_stand_among_the_items_by_seed_and_those_who_contradict_them_fail():
    items = items_of([{**row, "_where": "x"} for row in ROWS])[0]
    row = {
        "prompt": "check",
        "responses": ["right", "wrong", "any", "wrong"],
        "ranks": [0, 1, None, 1],
        "_where": "c:1",
    }
    check = check_of(row)
    assert [check.passes(ranks) for ranks in ([0, 1, 2], [2, 3, 0], [1, 0, 2], [0, 0, 0])] == [
        True,
        True,
        False,
        False,
    ]
    places = {[item.known is not None for item in with_checks(items, [check], seed)].index(True) for seed in range(30)}
    assert places == set(range(6)) and with_checks(items, [], 0) == items
    two = with_checks(items, [check, check, replace(items[4], known=np.arange(4))], 0)
    assert len(two) == 6 and [item.known is not None for item in two].count(True) == 2
    for bad in ({"ranks": [0, 0, 0, 0]}, {"ranks": [None] * 4}, {"responses": ["a", "a"], "ranks": [0, 1]}):
        with pytest.raises(UserError, match="c:1: a check"):
            check_of({**row, **bad})


def test_an_answer_to_a_check_is_no_label_and_counts_in_the_summary_alone(tmp_path):
    checks = [{"prompt": "2 + 2?", "chosen": "answer 0 of x", "rejected": "answer 1 of x"}]
    with served(tmp_path, ROWS[:1], checks=checks) as (ask, page):
        answer_all(ask, "anna", [0, 1, 2, 3], 2)
        answer_all(ask, "ben", [1, 0, 2, 3], 2)
        assert page.votes.agreement()["pairs"] == 6
        said = summary(page.votes, 2)
        assert "anna: 2 of 2 answered, 0 skipped, 1 of 1 checks passed" in said and "0 of 1 checks passed" in said
        again = [json.loads(ask("GET", f"/{TOKEN}/api/item?rater=ben&at={at}")[2]) for at in (0, 1)]
        assert all(
            sorted(shown["answer"]["ranks"].values()) == list(range(len(shown["responses"]))) for shown in again
        )
    assert [sum(rank is not None for v in row["raters"] for rank in v["ranks"])
            for row in rows_from(str(tmp_path / "votes.jsonl")) if row["prompt"] == "2 + 2?"] == [0]  # fmt: skip


def test_every_response_is_rated_by_every_criterion_or_the_answer_is_refused(tmp_path):
    with served(tmp_path, ROWS[:2], criteria=["helpful", "kind"], scale=3) as (ask, page):
        one, two = page.items
        post = lambda item, **said: ask("POST", f"/{TOKEN}/api/answer", {"rater": "a", "item": item.key, **said})  # noqa: E731
        ranks, good = dict(zip(one.names, range(4), strict=True)), dict.fromkeys(one.names, 3)
        kinds = [{**good, one.names[0]: 4}, 3, {**good, one.names[2]: True}]
        for bad in (None, {}, {"helpful": good}, *({"helpful": good, "kind": kind} for kind in kinds)):
            status, _, text = post(one, ranks=ranks, ratings=bad)
            assert status == 400 and "Rate every response first" in text
        kind = dict(zip(one.names, [1, 2, 3, 1], strict=True))
        assert post(one, ranks=ranks, ratings={"helpful": good, "kind": kind})[0] == 200
        assert post(two, skipped=True)[0] == 200
    first, second = (json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines())
    assert (first["rating_helpful"], first["rating_kind"]) == ([3] * 4, [1, 2, 3, 1])
    assert second["rating_kind"] == [None] * 4
    assert rows_from(str(tmp_path / "votes.jsonl"))[0]["raters"][0]["rating_kind"] == [1, 2, 3, 1]


def test_agreement_of_raters_is_told(tmp_path):
    with served(tmp_path) as (ask, page):
        answer_all(ask, "anna", [0, 1, 2, 3])
        answer_all(ask, "ben", [0, 1, 3, 2])
        found = json.loads(ask("GET", f"/{TOKEN}/api/agreement")[2])
        assert (found["share"], found["pairs"]) == (pytest.approx(5 / 6), 30)
        assert [one["tau"] for one in found["raters"]] == [pytest.approx(4 / 6)] * 2
        assert found["alpha"] == pytest.approx(1 - 2 / 6 * 119 / 120)  # 2 n = 120 values whose squares are 1
        assert "two raters agree on 83.3% of 30 pairs, Krippendorff's alpha +0.67" in summary(page.votes, 5)
        page.votes.raters = lambda: ["anna"]  # ben's first answer comes while it is looked at
        assert len(page.votes.agreement()["raters"]) == 2


def test_in_a_notebook_a_page_is_served_while_cells_run_and_its_cell_may_run_again(tmp_path, capfd):
    config = LabelArgs(output=str(tmp_path / "votes.jsonl"), port=0)
    first = LabelPage(config, rows=ROWS)
    with LabelPage(config, rows=ROWS) as page:  # the same file: the page before is closed
        with pytest.raises(OSError):  # nobody listens
            urllib.request.urlopen(first.address, timeout=10)
        with urllib.request.urlopen(page.address, timeout=10) as response:
            assert "frame-ancestors *" in response.headers["Content-Security-Policy"]
        with urllib.request.urlopen(f"{page.address}api/item?rater=ada", timeout=10) as response:
            shown = json.load(response)
        ranks = {r["name"]: i for i, r in enumerate(shown["responses"])}
        said = json.dumps({"rater": "ada", "item": shown["item"], "ranks": ranks}).encode()
        answer = urllib.request.Request(f"{page.address}api/answer", said, {"Content-Type": "application/json"})
        urllib.request.urlopen(answer, timeout=10).close()
    assert "1 answers by 1 raters" in capfd.readouterr().out
    with contextlib.closing(Votes(config.output, items_of(ROWS)[0])) as votes:  # the file is free again
        assert len(votes.of("ada")) == 1


def test_several_raters_may_answer_at_once(tmp_path):
    with served(tmp_path) as (ask, page):
        threads = [
            threading.Thread(target=answer_all, args=(ask, f"rater {i}".replace(" ", ""), [0, 1, 2, 3]))
            for i in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(page.votes.latest) == 30
    assert sum(len(row["raters"]) for row in rows_from(str(tmp_path / "votes.jsonl"))) == 30


def test_bad_settings_are_one_line(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match="no such file"):
        run(LabelArgs(path=str(tmp_path / "row.jsonl"), output=str(tmp_path / "v.jsonl")))
    for bad, line in (
        ({"output": ""}, "output"),
        ({"output": "v.txt"}, "jsonl"),
        ({"host": "0.0.0.0"}, "every address"),
        ({"raters": ["anna", "anna"]}, "different names"),
        ({"raters": ["anna", ""]}, "different names"),
        ({"raters": [" anna"]}, "different names"),
        ({"raters": ["\x1b[1m"]}, "different names"),
        ({"raters": ["x" * 61]}, "different names"),
        ({"port": 70000}, "port"),
        ({"criteria": ["kind", "kind"]}, "different names"),
        ({"criteria": ["very kind"]}, "different names"),
        ({"scale": 1}, "scale"),
    ):
        with pytest.raises(UserError, match=line):
            LabelArgs(**{"path": path, "output": "v.jsonl", **bad})
    with pytest.raises(UserError, match=r"guidelines .*g\.md: No such file"):
        run(LabelArgs(path=path, output=str(tmp_path / "v.jsonl"), guidelines=str(tmp_path / "g.md")))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(
            UserError, match=r"cannot listen on 127\.0\.0\.1:\d+ \(address already in use\); give another --port"
        ):
            run(LabelArgs(path=path, output=str(tmp_path / "v.jsonl"), port=taken.getsockname()[1]))


@contextlib.contextmanager
def command(path: str, output: Path):
    """(process, port, token) of `rlhf-jax label` in a process of its own."""
    arguments = [sys.executable, "-m", "rlhf_jax", "label", path, "--output", str(output), "--port", "0"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = next(line for line in process.stdout if line.startswith("open "))
        port, token = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/", line).groups()
        yield process, int(port), token
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_ctrl_c_ends_it_with_a_summary_and_a_kill_loses_nothing(tmp_path):
    path, output = write_lines(tmp_path / "rows.jsonl", ROWS), tmp_path / "new" / "votes.jsonl"
    tokens = []
    for i, end in enumerate((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)):
        with command(path, output) as (process, port, token):
            tokens.append(token)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", f"/{token}/api/item?rater=anna")
            shown = json.loads(connection.getresponse().read())
            assert shown["at"] == i
            answer = json.dumps({"rater": "anna", "item": shown["item"], "all_bad": True})
            connection.request("POST", f"/{token}/api/answer", answer, {"Content-Type": "application/json"})
            assert json.loads(connection.getresponse().read())["saved"]
            connection.close()
            process.send_signal(end)
            said, _ = process.communicate(timeout=20)
            if end != signal.SIGKILL:
                assert process.returncode == 0 and f"anna: {i + 1} of 5 answered" in said and "Traceback" not in said
    assert len(set(tokens)) == 3 and min(map(len, tokens)) >= 32
    assert len(output.read_text().splitlines()) == 3
