"""The chat page in a real headless browser; skips where playwright or a Chromium is not installed."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from test_chat_page import room_of
from test_label_browser import browser  # noqa: F401 (a fixture)

from rlhf_jax.commands.chat.page import Room, make_app
from rlhf_jax.commands.web import listening


@contextmanager
def served(room: Room):
    """The address of the page of a room, served by a thread."""
    with listening("127.0.0.1", 0, make_app(room)) as (server, address):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield address
        finally:
            server.shutdown()
            thread.join()


def test_the_page_streams_both_answers_keeps_a_vote_and_shows_the_history(tmp_path, browser):  # noqa: F811
    room = room_of(tmp_path / "votes.jsonl", "one", "cut")
    with served(room) as address:
        page, errors = browser.new_context(viewport={"width": 390, "height": 844}).new_page(), list[str]()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(address)
        page.wait_for_selector(".intro")
        room.policies[1].goes_on.clear()
        page.fill("#text", "what is <b>this</b>?")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('.card .text')?.innerText === 'one'")
        page.click("#stop")
        page.wait_for_function("() => document.getElementById('status').innerText.startsWith('Stopped')")
        assert page.locator("section.turn").count() == 0 and page.input_value("#text") == "what is <b>this</b>?"
        room.policies[1].goes_on.set()
        page.keyboard.press("Enter")
        page.wait_for_selector(".choices")
        assert page.locator(".card strong").all_inner_texts() == ["one", "cut"]
        assert page.inner_text(".said") == "what is <b>this</b>?" and page.locator("#talk b:not(.head b)").count() == 0
        notes = page.locator(".notes").nth(1).inner_text()
        assert "cut off" in notes and "first 3 tokens" in notes
        page.click("text=B is better")
        page.wait_for_selector(".card.best")
        assert "1 vote in" in page.inner_text("#status") and page.locator("text=Tie").count() == 0
        page.reload()
        page.wait_for_selector(".card.best")
        page.fill("#text", "go on")
        page.click("#send")
        page.wait_for_function(
            "() => document.querySelectorAll('section.turn').length === 2 && document.querySelector('.choices')"
        )
        assert [turn["content"] for turn in room.policies[0].asked[-1]][1] == "**cut** what is <b>this</b>?"
        page.click("#raw")
        assert page.locator(".card .text").first.inner_text().startswith("**one**")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.click("#new")
        assert page.locator(".intro").count() == 1 and errors == []
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1


def test_a_vote_that_is_on_its_way_is_on_the_answers_that_were_there(tmp_path, browser):  # noqa: F811
    room, held = room_of(tmp_path / "votes.jsonl", "one", "two"), []
    with served(room) as address:
        page = browser.new_context().new_page()
        page.route("**/api/vote", lambda route: held.append(route))
        page.goto(address)
        page.fill("#text", "hello")
        page.keyboard.press("Enter")
        page.click("text=B is better")
        page.click("text=B is better")
        page.fill("#text", "go on")
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        held.pop(0).abort()
        page.wait_for_function("() => document.getElementById('status').innerText.startsWith('The server does not')")
        assert page.input_value("#text") == "go on" and page.locator("section.turn").count() == 1
        page.click("text=B is better")
        page.focus("#text")
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        [route] = held
        route.continue_()
        page.wait_for_function(
            "() => document.querySelectorAll('section.turn').length === 2 && document.querySelector('.choices')"
        )
        assert [turn["content"] for turn in room.policies[0].asked[-1]] == ["hello", "**two** hello", "go on"]
    assert len(room.votes) == 1 and room.votes[0]["chosen"] == "**two** hello"


def test_a_blind_page_names_nobody(browser):  # noqa: F811
    with served(room_of(None, "one", "two", blind=True)) as address:
        page = browser.new_context().new_page()
        page.goto(address)
        page.fill("#text", "hello")
        page.keyboard.press("Enter")
        page.click("text=A is better")
        page.wait_for_selector(".card.best")
        assert page.title() == "Chat" and "runs/" not in page.content()
