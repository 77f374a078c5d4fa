"""Our JSON is JSON for everybody: no NaN, no Infinity, no half character, and nothing of it is lost."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rlhf_jax.hosts.files import Lines
from rlhf_jax.hosts.json_text import from_json, to_json
from rlhf_jax.runs.directory import as_json

NAN, INF = float("nan"), float("inf")


def strict(text: str):
    def refuse(name: str):
        raise ValueError(name)

    return json.loads(text.encode(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ({"loss": NAN, "step": 1}, {"loss": None, "loss_is": "nan", "step": 1}),
        ({"a": {"b": -INF}}, {"a": {"b": None, "b_is": "-inf"}}),
        ({"xs": [1.0, INF, NAN]}, {"xs": [1.0, None, None], "xs_is": "inf"}),
        ({"xs": [[1.0], (NAN,)]}, {"xs": [[1.0], [None]], "xs_is": "nan"}),
        ({"xs": [{"x": NAN}]}, {"xs": [{"x": None, "x_is": "nan"}]}),
        ({"x": NAN, "x_is": "ours"}, {"x": None, "x_is": "ours"}),
        ([NAN, 1], [None, 1]),
        (np.float64("nan"), None),
        ({"text": "half \ud83d", "é": "日"}, {"text": "half \ud83d", "é": "日"}),
    ],
)
def test_numbers_that_are_not_finite_are_null_with_the_reason_beside(value, written):
    assert strict(to_json(value)) == written == as_json(value)


def test_what_is_finite_is_written_as_it_is():
    row = {"a": [1, 2.5, None, True, "é 日本 😀"], "b": {"c": 1e308}}
    assert to_json(row) == json.dumps(row, ensure_ascii=False) and from_json(to_json(row)) == row


def test_what_is_not_seen_is_escaped_and_the_same_when_read():
    text = "\x1b[31m \x9b2J \u202e \u2028 \ud83d \x7f é"
    written = to_json({"text": text, text: 1}, indent=1)
    assert (
        written.isascii() == ("é" not in text)
        and "é" in written
        and not set(written) & set("\x1b\x9b\u202e\u2028\x7f")
    )
    assert from_json(written.encode()) == {"text": text, text: 1}


def test_numbers_come_back():
    assert from_json('{"x": null, "x_is": "ours", "y_is": "nan"}') == {"x": None, "x_is": "ours", "y_is": "nan"}
    row = from_json(to_json({"nan": NAN, "inf": INF, "less": -INF, "none": None, "deep": {"nan": NAN}}))
    assert math.isnan(row["nan"]) and (row["inf"], row["less"], row["none"]) == (INF, -INF, None)
    assert math.isnan(row["deep"].pop("nan")) and set(row) == {"nan", "inf", "less", "none", "deep"}


def test_lines_of_a_file_are_json_for_everybody(tmp_path):
    Lines(tmp_path / "m.jsonl").add([{"step": 1, "loss": NAN}, {"step": 2, "text": "\udc80"}])
    found = [strict(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert found == [{"step": 1, "loss": None, "loss_is": "nan"}, {"step": 2, "text": "\udc80"}]
