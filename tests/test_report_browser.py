"""The report in a real headless browser; skips where playwright or a Chromium is not installed."""

from __future__ import annotations

import json

import pytest
from test_label_browser import browser  # noqa: F401 (a fixture)

from rlhf_jax.runs.report import html_of

ROWS = [
    {"step": step, "prompt": f"question {i}", "response": f"{'before' if not step else 'after'} {i}", "reward": step}
    for step in (0, 9)
    for i in range(5)
]


@pytest.fixture
def page_file(tmp_path):
    """The page of a run whose responses were cut off."""
    record = {"stage": "ppo", "status": "finished", "step": 20, "total": 20, "config": {"ppo": {"kl_coef": 0.1}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    lines = [{"step": i, "rollout/reward": i / 20, "rollout/truncated_fraction": 0.5} for i in range(1, 21)]
    for name, rows in (("metrics", lines), ("samples", ROWS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "report.html"
    file.write_text(html_of([tmp_path]))
    return file


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")])
def test_the_page_is_readable_at_both_widths_in_both_themes_and_searchable(page_file, browser, width, scheme):  # noqa: F811
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, said = context.new_page(), list[str]()
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: said.extend([request.url] * (not request.url.startswith("file:"))))
    page.goto(page_file.as_uri())
    assert page.locator("h1").inner_text() == page_file.parent.name and "Half of" in page.inner_text(".finding h4")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box, picture = page.locator("figure").first.bounding_box(), page.locator("svg").first.bounding_box()
    assert box["width"] <= width and picture["width"] > 250 and picture["height"] > 100

    # Ink on paper: the theme is the reader's, until the button turns it round; axes are drawn in the same colours.
    shade = "e => Math.max(...getComputedStyle(e).{}.match(/\\d+/g).slice(0, 3).map(Number))"
    dark = lambda: page.eval_on_selector("body", shade.format("backgroundColor")) < 80  # noqa: E731
    light_text = lambda: page.eval_on_selector("svg text", shade.format("fill")) > 128  # noqa: E731
    assert dark() == light_text() == (scheme == "dark")
    page.click("#theme")
    assert dark() == light_text() == (scheme == "light")

    page.fill("#search", "QUESTION 3")
    assert page.inner_text("#found") == "1 of 5" and page.locator(".sample:visible").count() == 1
    shown = page.locator(".sample:visible").inner_text()
    assert shown.index("before training") < shown.index("before 3") < shown.index("step 9") < shown.index("after 3")
    assert said == []
    context.close()
