"""The labelling page in a real browser: the bar, texts as Markdown, and what a study asks beside the order."""

from __future__ import annotations

import json
from pathlib import Path

from test_label_browser import browser, by_keys, drag, labelling, letters, opened, order, saved  # noqa: F401

from rlhf_jax.data.sources import rows_from

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
MARKDOWN = """# Sums

Add **both** and `x_1 * x_2`; a [link](https://example.org/a) and ![image](https://example.org/b.png).

| a | b |
|---|--:|
| 1 | 22 |

```python
def f(x):
    return x < 1  # _not_ *Markdown*
```

\\[ a_1 * b_2 = \\frac{c}{d} * e_1 \\]
So \\(x_1 * y_1 * z\\), $a_1 * b_1 * c$, and $5 or $6.

<script>document.title = "hacked"</script> [bad](javascript:alert(1))"""
"""Every backslash is doubled here alone."""
HEBREW = "\u05e9\u05dc\u05d5\u05dd a"


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def in_sight(page) -> bool:
    """Whether every place of the ranking can be seen within the bar."""
    return page.evaluate(
        "() => { const b = document.getElementById('strip').getBoundingClientRect();"
        "return [...document.querySelectorAll('.tier')].map(e => e.getBoundingClientRect()).every(a =>"
        "a.left >= b.left && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1); }"
    )


def test_the_bar_takes_what_is_dropped_anywhere_and_twelve_letters_leave_it_in_sight(browser, tmp_path):  # noqa: F811
    rows = [
        {"prompt": "three", "responses": ["a", "b", "c"]},
        {"prompt": "twelve", "responses": [f"answer {i}" for i in range(12)]},
        {"prompt": HEBREW, "responses": [HEBREW, "no"]},
    ]
    path = written(tmp_path / "rows.jsonl", rows)
    with labelling(path) as (_, url):
        with opened(browser, url, "anna") as page:
            drag(page, page.locator(".card .key").nth(1), page.locator("#strip .hint"))
            assert order(page) == "B"
            page.keyboard.press("Escape")
            page.keyboard.press("c")
            page.keyboard.press("Shift+A")
            assert order(page) == "AC > B"  # the last one takes its place behind a tie, too
            assert page.locator("h1:not(#entry h1)").count() == 1 and "Item 1 of 3" in page.inner_text("h1#title")
            page.keyboard.press("ArrowRight")
            page.wait_for_function("() => document.getElementById('at').textContent === '2 of 3'")
            page.keyboard.type("abcdefghijk")
            assert order(page) == " > ".join("ABCDEFGHIJKL") and in_sight(page)
            page.keyboard.press("ArrowRight")
            page.wait_for_function("() => document.getElementById('at').textContent === '3 of 3'")
            hebrew = page.locator(".text", has_text=HEBREW).first
            assert hebrew.evaluate("e => getComputedStyle(e).direction") == "rtl"
        with opened(browser, url, "ben", **PHONE) as page:
            page.locator(".card .key").nth(2).tap()
            page.locator(".card .key").nth(0).tap()
            assert order(page) == "C > A > B"
            page.locator("#clear").tap()
            assert order(page) == ""
            page.locator("#forth").tap()
            page.wait_for_function("() => document.getElementById('at').textContent === '2 of 3'")
            for i in range(11):
                page.locator(".card .key").nth(i).tap()
            assert in_sight(page)
            assert page.evaluate("document.querySelector('footer').offsetHeight") < 844 / 2


def test_texts_are_shown_as_markdown_and_one_key_shows_them_as_they_are(browser, tmp_path):  # noqa: F811
    path = written(tmp_path / "rows.jsonl", [{"prompt": MARKDOWN, "responses": [MARKDOWN, "plain"]}])
    with labelling(path) as (_, url), opened(browser, url, "anna") as page:
        requests = list[str]()
        page.on("request", lambda request: requests.append(request.url))
        text = page.locator("#prompt .text")
        assert text.locator("strong").inner_text() == "both" and text.locator("h3").inner_text() == "Sums"
        assert text.locator("td").all_inner_texts() == ["1", "22"]
        assert text.locator("td").last.evaluate("e => getComputedStyle(e).textAlign") == "right"
        assert "    return x < 1  # _not_ *Markdown*" in text.locator("pre").inner_text()
        assert text.locator("em, img, script").count() == 0  # nothing of a formula, of the code, or loaded
        shown = text.inner_text()
        formulas = (r"\[ a_1 * b_2 = \frac{c}{d} * e_1 \]", r"\(x_1 * y_1 * z\)", "$a_1 * b_1 * c$")
        assert all(part in shown for part in (*formulas, "$5 or $6", "<script>"))
        assert text.locator("a").all_inner_texts() == ["link", "image"]
        assert text.locator("a").first.get_attribute("rel") == "noopener noreferrer"
        page.keyboard.press("r")
        assert text.inner_text() == MARKDOWN and page.get_attribute("#raw", "aria-pressed") == "true"
        page.click("#raw")
        assert text.locator("strong").count() == 1 and requests == [] and "hacked" not in page.title()


def test_a_study_has_guidelines_ratings_and_checks_and_its_file_stays_training_data(browser, tmp_path):  # noqa: F811
    path = written(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "responses": ["good", "bad"]} for i in range(2)])
    checks = written(tmp_path / "checks.jsonl", [{"prompt": "2 + 2?", "chosen": "four", "rejected": "a fish"}])
    (tmp_path / "guide.md").write_text("Prefer **honest** answers.")
    options = ("--guidelines", str(tmp_path / "guide.md"), "--criteria", "[helpful, honest]", "--checks", checks)
    with labelling(path, 0, *options) as (process, url):
        for rater, best in (("anna", ("good", "four")), ("ben", ("good", "a fish"))):
            with opened(browser, url, rater) as page:
                assert page.inner_text("#guidelines strong") == "honest"
                page.keyboard.press("Escape")
                for at in range(3):
                    of = letters(page)
                    page.keyboard.press(next(of[text] for text in best if text in of).lower())
                    assert order(page).count(">") == 1 and page.is_disabled("#save")
                    page.keyboard.press("Enter")
                    assert "helpful, honest" in page.inner_text("#status")
                    for card in page.locator(".card").all():
                        good = card.locator(".text").inner_text() in ("good", "four")
                        card.locator("fieldset").nth(0).locator("label").nth(6 if good else 0).click()
                        card.locator("fieldset").nth(1).locator("input").nth(3).focus()
                        page.keyboard.press("2")
                    page.keyboard.press("Enter")
                    if at < 2:
                        saved(page, f"{at + 2} of 3")
                page.wait_for_selector("#progress[open]")
                said = page.inner_text("#agreement")
                assert ("alpha is 1.00" in said) == (rater == "ben") and "check" not in page.inner_text("body").lower()
                page.click("#progress button.primary")
                page.keyboard.press("ArrowLeft")
                page.wait_for_function("() => document.getElementById('at').textContent === '2 of 3'")
                assert page.locator(".scale input:checked").count() == 4 and order(page).count(">") == 1
                page.keyboard.press("u")
                assert page.is_visible("#guidelines")
        process.terminate()
        said, _ = process.communicate(timeout=20)
    assert "anna: 3 of 3 answered, 0 skipped, 1 of 1 checks passed" in said and "0 of 1 checks passed" in said
    votes = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    real, asked = ([vote for vote in votes if ("check" in vote) == checked] for checked in (False, True))
    assert [vote["ranks"] for vote in real] == [[0, 1]] * 4 and [vote["ranks"] for vote in asked] == [[None, None]] * 2
    assert [vote["check"] for vote in asked] == [{"ranks": [0, 1], "passed": True}, {"ranks": [1, 0], "passed": False}]
    assert all(vote["rating_helpful"] == [7, 1] and vote["rating_honest"] == [2, 2] for vote in votes)
    joined = [row for row in rows_from(str(tmp_path / "votes.jsonl")) if row["prompt"] != "2 + 2?"]
    assert [rater["rating_helpful"] for row in joined for rater in row["raters"]] == [[7, 1]] * 4
