"""The labelling page in a real headless browser; skips where playwright or a Chromium is not installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import toy_directory

from rlhf_jax import reward
from rlhf_jax.config import DataConfig, ModelConfig, OptimConfig, RewardArgs, RewardConfig, RunConfig
from rlhf_jax.data.sources import rows_from

playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install "rlhf-jax[browser]"')
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

WALKS = [[" a", " b a", " c b a", " d c b a"][:count] for count in (3, 4, 2, 4, 3)]
"""Responses to the five prompts, each one node longer than the one before."""

ANNA = [
    ["a", "b a", "c b a"],
    ["a", "=b a", "c b a", "d c b a"],
    ["a", "b a"],
    ["a", "b a", "c b a", "d c b a"],
    ["a", "=b a", "=c b a"],
]
BEN = [
    ["a", "c b a", "b a"],
    ["a", "b a", "=c b a", "d c b a"],
    ["a", "b a"],
    ["a", "b a", "c b a", "d c b a"],
    ["a", "b a", "c b a"],
]
"""What two raters say of them, from the best to the worst; = is tied with the one before."""


@pytest.fixture(scope="module")
def browser():
    """A headless browser of this machine."""
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = own if os.path.exists(own) else next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None:
            pytest.skip("needs a browser: apt-get install chromium, or playwright install chromium")
        chromium = driver.chromium.launch(executable_path=found, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def rows(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": "stuvr"[i], "responses": [{"text": text, "model": "m"} for text in WALKS[i]]} for i in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@contextmanager
def labelling(rows: str, port: int = 0, *options: str):
    """(process, url) of `rlhf-jax label`."""
    output = Path(rows).with_name("votes.jsonl")
    arguments = [
        sys.executable,
        "-m",
        "rlhf_jax",
        "label",
        rows,
        "--output",
        str(output),
        "--port",
        str(port),
        *options,
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = next(line for line in process.stdout if line.startswith("open "))
        yield process, re.search(r"http\S+", line).group()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextmanager
def opened(browser, url: str, rater: str, **options):
    """The page with its first item, in a browser that has seen nothing before; any error of its script fails."""
    context = browser.new_context(**options)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    try:
        enter(page, url, rater)
        yield page
        assert errors == []
    finally:
        context.close()


def enter(page, url: str, rater: str) -> None:
    page.goto(url)
    page.fill("#name", rater)
    page.keyboard.press("Enter")
    page.wait_for_selector("#work:visible")


def letters(page) -> dict[str, str]:
    """Text of a response -> its letter on the page."""
    cards = page.locator(".card").all()
    return {c.locator(".text").inner_text().strip(): c.locator(".key").inner_text() for c in cards}


def order(page) -> str:
    """The ranking in the bar, as "AB > C"."""
    return " > ".join(tier.inner_text().replace("\n", "") for tier in page.locator(".tier").all())


def saved(page, at: str) -> None:
    """Wait until the item `at` is shown and the last answer called saved."""
    page.wait_for_selector("#status.saved")
    page.wait_for_function("at => document.getElementById('at').textContent === at", arg=at)


def by_keys(page, texts: list[str]) -> None:
    """Rank by typing, texts from the best to the worst; one that starts with = is tied with the one before."""
    of = letters(page)
    for text in texts:
        page.keyboard.press(f"Shift+{of[text[1:]]}" if text[0] == "=" else of[text].lower())


def drag(page, start, goal) -> None:
    """With the mouse, from the middle of one element to that of another."""
    ends = [box["x"] + box["width"] / 2 for box in (start.bounding_box(), goal.bounding_box())]
    heights = [box["y"] + box["height"] / 2 for box in (start.bounding_box(), goal.bounding_box())]
    page.mouse.move(ends[0], heights[0])
    page.mouse.down()
    page.mouse.move(ends[0] + 12, heights[0] - 3)
    page.mouse.move(ends[1], heights[1], steps=4)
    page.mouse.up()
    page.wait_for_timeout(50)  # the click that follows comes to nothing first


def by_mouse(page, texts: list[str]) -> None:
    """Rank by dragging the letters of the cards, then of the bar, each to the worst end."""
    of = letters(page)
    for text in texts:
        tied = text[0] == "="
        source = page.locator(f".card:has(.key:text-is('{of[text.lstrip('=')]}')) .key")
        drag(page, source, page.locator(".tier").last if tied else page.locator(".gap").last)


@pytest.mark.slow
def test_two_raters_five_prompts_a_kill_and_a_reward_model(browser, rows, tmp_path):
    with labelling(rows) as (process, url), opened(browser, url, "anna") as one, opened(browser, url, "ben") as two:
        for at, texts in enumerate(ANNA[:3]):
            by_keys(one, texts)
            one.keyboard.press("Enter")
            saved(one, f"{at + 2} of 5")
        for at, texts in enumerate(BEN[:2]):
            by_mouse(two, texts)
            two.click("#save")
            saved(two, f"{at + 2} of 5")
        by_mouse(two, BEN[2])
        process.send_signal(signal.SIGKILL)
        process.wait()
        two.click("#save")
        two.wait_for_selector("#status.failed")
        assert "does not answer" in two.inner_text("#status") and two.inner_text("#at") == "3 of 5"
        with open(tmp_path / "votes.jsonl", "ab") as file:
            file.write(b'{"item": "half a li')  # as if the kill had come while a line was written
        port = int(re.search(r":(\d+)/", url).group(1))
        with labelling(rows, port) as (process, url):
            one.goto(url)  # the tab still knows who it is
            one.wait_for_selector("#work:visible")
            assert one.inner_text("#at") == "4 of 5"
            two.goto(url)
            two.wait_for_selector("#work:visible")
            of = letters(two)
            assert two.inner_text("#at") == "3 of 5" and order(two) == " > ".join(of[t] for t in BEN[2])  # the draft
            two.click("#save")
            saved(two, "4 of 5")
            for page, mine in ((one, ANNA), (two, BEN)):
                for at in (3, 4):
                    by_keys(page, mine[at])
                    page.keyboard.press("Enter")
                    if at == 3:
                        saved(page, "5 of 5")
                page.wait_for_selector("#progress[open]")
                assert "All 5 items are answered" in page.inner_text("#agreement")
            assert "Two raters agree on" in two.inner_text("#agreement")
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=20)
            assert process.returncode == 0 and "10 answers by 2 raters" in said
    check_votes(tmp_path / "votes.jsonl", {"anna": ANNA, "ben": BEN})
    train(tmp_path)


def check_votes(path: Path, said: dict[str, list[list[str]]]) -> None:
    """Every ranking is in the file as it was made, whatever the order on the page."""
    joined = rows_from(str(path))
    assert len(joined) == 5
    for i, row in enumerate(joined):
        texts = [response["text"].strip() for response in row["responses"]]
        for vote in row["raters"]:
            rank, expected = -1, {}
            for text in said[vote["rater"]][i]:
                rank += text[0] != "="
                expected[text.lstrip("=")] = rank
            assert dict(zip(texts, vote["ranks"], strict=True)) == expected, (i, vote)
    votes = [json.loads(line) for line in path.read_text().splitlines()]
    assert any(vote["order"] != sorted(vote["order"]) for vote in votes)  # else this test shows nothing


def train(tmp_path: Path) -> None:
    """A reward model on the file, which learns that short walks were preferred."""
    path = str(tmp_path / "votes.jsonl")
    summary = reward.run(
        RewardArgs(
            model=ModelConfig(path=str(toy_directory() / "policy")),
            data=DataConfig(path=path, eval_path=path, batch_size=8, max_prompt_length=4, max_length=12),
            reward=RewardConfig(steps=60, comparisons="pairs"),
            optim=OptimConfig(learning_rate=1e-2),
            run=RunConfig(output_dir=str(tmp_path / "run"), progress=False, eval_every=0),
        )
    )
    assert summary["n"] >= 14 and summary["accuracy"] > 0.9


def test_undo_ties_and_moves_by_keys(browser, rows):
    with labelling(rows) as (_, url), opened(browser, url, "anna") as page:
        page.keyboard.press("b")
        assert order(page) == "B"
        page.keyboard.press("Shift+C")
        assert order(page) == "BC > A"  # the last one takes its place by itself, behind a tie too
        page.keyboard.press("Backspace")
        page.keyboard.press("c")
        assert order(page) == "B > C > A"
        page.keyboard.press("Shift+A")
        assert order(page) == "B > AC"
        page.locator("#strip .key", has_text="A").focus()
        page.keyboard.press("ArrowLeft")
        assert order(page) == "B > A > C"
        page.keyboard.press("ArrowLeft")
        assert order(page) == "AB > C"
        page.keyboard.press("x")
        page.keyboard.press("n")
        page.keyboard.type("both <b>short</b>; a b c")
        page.keyboard.press("Escape")
        page.keyboard.press("Enter")
        saved(page, "2 of 5")
        page.keyboard.press("s")
        saved(page, "3 of 5")
        page.keyboard.press("z")
        page.keyboard.press("z")
        page.wait_for_function("() => document.getElementById('at').textContent === '1 of 5'")
        assert order(page) == "AB > C" and page.input_value("#comment") == "both <b>short</b>; a b c"
        page.keyboard.press("c")  # a full ranking starts anew
        page.keyboard.press("a")
        page.keyboard.press("Enter")
        saved(page, "3 of 5")
    votes = [json.loads(line) for line in Path(rows).with_name("votes.jsonl").read_text().splitlines()]
    assert [vote["skipped"] for vote in votes] == [False, True, False]
    assert votes[0]["comment"] == "both <b>short</b>; a b c" and votes[0]["all_bad"]
    assert len(rows_from(str(Path(rows).with_name("votes.jsonl")))) == 2


def test_a_change_of_an_answer_outlives_a_reload_and_other_items_and_says_that_it_is_not_saved(browser, rows):
    with labelling(rows) as (_, url), opened(browser, url, "anna") as page:
        for at, letters_of in ((2, "abc"), (3, "abcd")):
            by_letters(page, letters_of)
            saved(page, f"{at} of 5")
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("() => document.getElementById('at').textContent === '2 of 5'")
        by_letters(page, "dcba", save=False)
        page.keyboard.press("n")
        page.keyboard.type("a <b>comment</b>")
        for _ in range(2):
            page.reload()
            page.wait_for_selector("#work:visible")
            assert page.inner_text("#at") == "2 of 5" and order(page) == "D > C > B > A"
            assert page.input_value("#comment") == "a <b>comment</b>"
            assert "Changed since it was saved" in page.inner_text("#status")
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("() => document.getElementById('at').textContent === '1 of 5'")
        assert order(page) == "A > B > C" and "change of item 2 is not saved" in page.inner_text("#status")
        page.keyboard.press("ArrowRight")
        page.wait_for_function("() => document.getElementById('at').textContent === '2 of 5'")
        assert order(page) == "D > C > B > A"
        page.keyboard.press("Enter")
        saved(page, "3 of 5")
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("() => document.getElementById('at').textContent === '2 of 5'")
        assert order(page) == "D > C > B > A" and "Answered earlier" in page.inner_text("#status")
        by_letters(page, "ab", save=False)  # left as it is
        page.evaluate("sessionStorage.setItem('at', 99)")  # as of other rows behind the same port
        page.reload()
        page.wait_for_selector("#work:visible")
        assert page.inner_text("#at") == "3 of 5" and order(page) == ""
    votes = [json.loads(line) for line in Path(rows).with_name("votes.jsonl").read_text().splitlines()]
    assert [vote["comment"] for vote in votes] == ["", "", "a <b>comment</b>"]


def test_who_changes_or_leaves_an_item_while_it_is_being_saved_loses_nothing(browser, rows):
    with labelling(rows) as (_, url), opened(browser, url, "anna") as page:
        held = []
        page.route("**/api/answer", lambda route: held.append(route))
        at = lambda here: page.wait_for_function("at => document.getElementById('at').textContent === at", arg=here)  # noqa: E731

        def asked():
            while not held:
                page.wait_for_timeout(10)
            return held.pop()

        def arrives():
            with page.expect_response("**/api/answer"):
                asked().continue_()

        by_letters(page, "abc")
        page.keyboard.press("ArrowRight")
        at("2 of 5")
        by_letters(page, "cb", save=False)
        page.keyboard.press("Enter")
        assert "Place A and D first" in page.inner_text("#status") or "Still saving" in page.inner_text("#status")
        arrives()  # of item 1, while item 2 is half ranked
        page.wait_for_function("() => document.getElementById('left').textContent === '4 left'")
        assert page.inner_text("#at") == "2 of 5" and order(page) == "C > B"
        by_letters(page, "ad")
        by_letters(page, "dcba", save=False)
        arrives()  # of item 2, which was changed since
        page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Changed since')")
        assert page.inner_text("#at") == "2 of 5" and order(page) == "D > C > B > A"
        page.keyboard.press("Enter")
        arrives()
        saved(page, "3 of 5")
        by_letters(page, "ab")
        page.keyboard.press("ArrowLeft")
        at("2 of 5")
        assert "Answered earlier" in page.inner_text("#status") and order(page) == "D > C > B > A"
        asked().abort()
        page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Item 3 is not saved')")
        page.keyboard.press("ArrowRight")
        at("3 of 5")
        assert order(page) == "A > B"  # as it was typed
    votes = [json.loads(line) for line in Path(rows).with_name("votes.jsonl").read_text().splitlines()]
    assert len(votes) == 3 and votes[1]["item"] == votes[2]["item"]
    assert votes[2]["ranks"] == [(rank + 1) % 4 for rank in votes[1]["ranks"]]  # C > B > A > D, then D > C > B > A


def by_letters(page, letters_of: str, *, save: bool = True) -> None:
    """Type the letters of responses, the best first."""
    for letter in letters_of:
        page.keyboard.press(letter)
    if save:
        page.keyboard.press("Enter")


def test_a_browser_that_keeps_nothing_asks_before_an_answer_is_lost(browser, rows):
    """As in a frame of another site, where to touch its storage is an error."""
    refuse = "Object.defineProperty(window, '{}', {{get() {{ throw new DOMException('no', 'SecurityError'); }}}});"
    with labelling(rows) as (_, url):
        context = browser.new_context()
        context.add_init_script("".join(map(refuse.format, ("localStorage", "sessionStorage"))))
        page, asked, errors = context.new_page(), [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
        enter(page, url, "anna")
        by_letters(page, "abc")
        saved(page, "2 of 5")
        page.click("#raw")
        by_letters(page, "a", save=False)
        assert order(page) == "A"
        for key, at in (("ArrowRight", "3 of 5"), ("ArrowLeft", "2 of 5"), ("ArrowRight", "3 of 5")):
            page.keyboard.press(key)
            page.locator("#at", has_text=at).wait_for()
            assert order(page) == ("A" if at == "2 of 5" else "")  # the page itself keeps it
        page.reload()
        assert asked == ["beforeunload"] and errors == []
        context.close()


def test_text_is_never_markup_and_a_phone_has_room(browser, tmp_path):
    evil = "<img src=x onerror=\"document.title='hacked'\"><b>bold</b>"
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"prompt": evil, "responses": [evil, "<script>document.title='hacked'</script>"]}) + "\n"
    )
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with labelling(str(path)) as (_, url), opened(browser, url, "anna", **phone) as page:
        assert page.inner_text("#prompt .text") == evil
        assert page.locator("#item img, #item b, #item script").count() == 0
        assert "hacked" not in page.title()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        small = page.evaluate(
            "[...document.querySelectorAll('button')].filter(b => b.offsetParent && "
            "(b.offsetWidth < 40 || b.offsetHeight < 40)).map(b => b.outerHTML)"
        )
        assert small == []
        page.locator(".card .key").nth(1).tap()
        assert order(page) == "B > A"
        page.locator("#save").tap()
        page.wait_for_selector("#progress[open]")
