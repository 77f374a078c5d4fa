"""Rows from anywhere: whatever a file, a directory or a Python object is instead of rows, it is one line."""

from __future__ import annotations

import functools
import gzip
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.data import tfds_rows
from rlhf_jax.data.lint import inspect
from rlhf_jax.data.rows import DroppedRow
from rlhf_jax.data.schemas import preference_row, sft_row
from rlhf_jax.data.sources import read_rows, rows_from
from rlhf_jax.errors import UserError

ROW = {"prompt": "p", "response": "r"}
LINE = json.dumps(ROW).encode() + b"\n"


def refused(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert len(str(error.value)) < 1100 and str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", LINE + b"[" * 100_000, ":2: not JSON"),
        ("a.jsonl", LINE + b'{"a": ' + b"9" * 5000 + b"}", ":2: not JSON"),
        ("a.jsonl", LINE + b'{"a": "' + b"x" * 30_000, ":2: not JSON"),
        ("a.jsonl", LINE + b"\xff\n", ":2: not UTF-8"),
        ("a.jsonl", "{}".encode("utf-16"), ":1: not UTF-8"),
        ("a.jsonl", b"\0" * 100, ":1: not JSON"),
        ("a.jsonl", b"1\n", ":1: a JSON int, not an object"),
        ("a.jsonl", b"\n \n", "the file is empty"),
        ("a.jsonl.gz", LINE, "broken gzip after line 0"),
        ("a.jsonl.gz", gzip.compress(LINE * 1000, mtime=0)[:-9], "broken gzip after line"),
        ("a.jsonl.gz", gzip.compress(LINE, mtime=0) + b"rest", "broken gzip after line 1"),
        ("a.jsonl.gz", b"", "the file is empty"),
        ("a.parquet", b"PAR1" + b"\0" * 50 + b"PAR1", "Parquet"),
        ("a.parquet", b"", "Parquet"),
        ("a.tsv", b"a\tb\nc\n", "a.tsv:2: 1 cells under 2 names"),
        ("a.jsonl", LINE + b'{"a": {"b": 1, "b": 2}}', ":2: not JSON ('b' comes twice)"),
        ("a.json", b'[{"a": 1, "a": 2}]', "not JSON ('a' comes twice)"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.csv", b"a,b,a\n1,2,3\n", "there are two columns 'a'; rename one"),
        ("a.tsv", b'a\tb\n1\t"2\n3\t4"5\n', "a.tsv:3: '\\t' expected after '\"'; close each quote"),  # not one row
        ("a.csv", b'a,b\n1,"2\n3,4\n', "a.csv:3: unexpected end of data; close each quote"),
        ("a", LINE, "unknown extension"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    line = refused(lambda: read_rows(str(tmp_path / name)))
    assert words in line and name in line


SHAPES = {
    "a.json": json.dumps([{"instruction": "Add.", "input": "1 1", "output": "2", "text": "all"}]),
    "b.json": json.dumps({"data": [{"instruction": "Add.\n\n1 1", "output": "2"}]}),
    "c.json": '{"prompt": "Add.\\n\\n1 1", "response": "2"}\n' * 2,
    "d.csv": 'prompt,response\n"Add.\n\n1 1",2\n',
    "e.tsv": "instruction\tinput\toutput\nAdd.\t1 1\t2\n",
    "f.jsonl": '{"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "2"}], "id": 3}',
    "g.jsonl": '{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "Add."}],'
    ' "chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "gpt", "value": "3"}}',
    "h.csv": "prompt,completion,label\nAdd.,2,True\n",
    "i.jsonl": '{"conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "2"}], "system": ""}',
    "j.jsonl": '{"conversations": [{"from": "system", "value": " "}, {"from": "human", "value": "Add."},'
    ' {"from": "gpt", "value": "2"}], "system": null}',
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_other_tools_are_rows(tmp_path, name):
    (tmp_path / name).write_text(SHAPES[name])
    row, *more = rows_from(str(tmp_path / name))
    expected = {"prompt": "Add.\n\n1 1", "response": "2"}
    if name[0] in "fij":
        messages = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "2"}]
        expected = {"messages": messages, **({"id": 3} if name == "f.jsonl" else {})}
    if name == "g.jsonl":
        prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "Add."}]
        answers = {which: [{"role": "assistant", "content": n}] for which, n in (("chosen", "2"), ("rejected", "3"))}
        expected = {"prompt": prompt, **answers}
        assert preference_row(row)["chosen"] == answers["chosen"]
    if name == "h.csv":
        expected = {"prompt": "Add.", "completion": "2", "label": True}
    assert {n: v for n, v in row.items() if n != "_where"} == expected and len(more) == (name == "c.json")
    assert row["_where"].startswith(str(tmp_path / name) + ":")


EMPTY_CELLS = "prompt,response,label,note\nhi,yo,true,n\n,yo,true,n\nx,,true,\nz,w,,\n"
NULLS = [
    {"prompt": "hi", "response": "yo", "label": True, "note": "n"},
    {"prompt": None, "response": "yo", "label": True, "note": "n"},
    {"prompt": "x", "response": None, "label": True, "note": None},
    {"prompt": "z", "response": "w", "note": None},
]


def test_an_empty_cell_is_a_null_which_is_dropped_and_counted_where_it_is_the_prompt_or_the_answer(tmp_path):
    (tmp_path / "a.csv").write_text(EMPTY_CELLS)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NULLS))
    read = {name: rows_from(str(tmp_path / name)) for name in ("a.csv", "a.jsonl")}
    without = [[{n: v for n, v in row.items() if n != "_where"} for row in rows] for rows in read.values()]
    assert without[0] == without[1] == NULLS
    for rows in read.values():
        found = inspect(rows, [], None, 9, 9)["dropped"]
        assert {reason: count for reason, (count, _) in found.items()} == {
            "with an empty prompt": 1, "with a null response": 1,
        }  # fmt: skip


def test_a_null_is_no_word_of_a_template(tmp_path):
    given = [{"q": None, "a": {"t": "b"}}, {"q": "q", "a": {"t": None}}, {"q": "q", "a": {"t": 0}}]
    rows = rows_from(given, ["prompt={q}: {q}", "response= {a.t}"])
    assert [row["prompt"] for row in rows] == [None, "q: q", "q: q"]
    assert [row["response"] for row in rows] == [" b", None, " 0"]
    for row in rows[:2]:
        with pytest.raises(DroppedRow):
            sft_row(row)
    with pytest.raises(UserError, match=r'row 0: "a" is no text, and stands in one .*; map it alone'):
        rows_from(given, ["prompt={q}", "response= {a}"])


def test_what_other_tools_rows_say_is_read_or_refused():
    line = '"instruction" is a str and "input" a int; give texts'
    with pytest.raises(UserError, match=line):
        rows_from([{"instruction": "Add.", "input": 5, "output": "2"}])
    said = [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "2"}]
    with pytest.raises(UserError, match="message 0 has content a int; give a string"):
        sft_row(rows_from([{"conversations": said, "system": 3}])[0])


def test_rows_that_look_alike_are_refused_with_their_field_map_and_a_map_sees_them_as_they_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a", "better": "b", "worse": "c"}')
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"try data.fields '\[prompt=\{question\}, response=\{answer\}\]'$"):
        sft_row(rows_from(path)[0])
    with pytest.raises(UserError, match=r"'\[prompt=\{question\}, chosen=\{better\}, rejected=\{worse\}\]'$"):
        preference_row(rows_from(path)[0])
    (tmp_path / "b.jsonl").write_text('{"instruction": "q", "output": "a"}')
    assert rows_from(str(tmp_path / "b.jsonl"), ["prompt={output}"])[0]["prompt"] == "a"


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") * 2)
    assert [row["prompt"] for row in read_rows(str(tmp_path / "a.jsonl"))] == ["p", "p"]


def test_what_is_no_file_is_said_at_once(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    os.mkfifo(tmp_path / "b.jsonl")
    for path, words in {
        tmp_path / "a.jsonl": "a directory",
        tmp_path / "b.jsonl": "a pipe or a device",
        "/dev/zero": "a pipe or a device",
        "a\0b.jsonl": "no such name",
        tmp_path / ("x" * 5000): "no such file|too long",
        "": "no path",
    }.items():
        found: list[str] = []
        call = functools.partial(read_rows, str(path))
        thread = threading.Thread(target=lambda call=call, found=found: found.append(refused(call)))
        thread.daemon = True
        thread.start()
        thread.join(5)
        assert found and any(word in found[0] for word in words.split("|"))


def test_home_and_at_signs_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = tmp_path / "me@home"
    odd.mkdir()
    (odd / "a@b.jsonl").write_bytes(LINE)
    assert len(rows_from("~/me@home/a@b.jsonl")) == len(rows_from(odd / "a@b.jsonl")) == 1
    assert "a@c.jsonl: no such file; did you mean" in refused(lambda: rows_from("~/me@home/a@c.jsonl"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    rows = [tfds_rows.stored({**ROW, "_where": f"a:{i}"}, "sft") for i in range(4)]
    return tfds_rows.prepare(
        {"train": rows, "test": rows[:1]}, "sft", str(tmp_path_factory.mktemp("tfds") / "at@home")
    )


def test_a_prepared_directory_below_an_at_sign_is_found_with_its_split(prepared):
    assert [len(read_rows(f"{prepared}{split}")) for split in ("", "@train", "@test", "@train[:50%]")] == [4, 4, 1, 2]


@pytest.mark.parametrize("harm", ["cut", "empty", "zeros", "gone", "info", "features", "split"])
def test_a_broken_prepared_directory_is_one_line(prepared, tmp_path, harm):
    there = tmp_path / "copy" / "feedback" / "sft" / "1.0.0"
    there.mkdir(parents=True)
    for path in prepared.iterdir():
        (there / path.name).write_bytes(path.read_bytes())
    (shard,) = there.glob("*train.array_record*")
    data = shard.read_bytes()
    if harm == "gone":
        shard.unlink()
    elif harm in ("info", "features"):
        name = {"info": "dataset_info.json", "features": "features.json"}[harm]
        (there / name).write_text((there / name).read_text()[: 40 if harm == "info" else 200])
    elif harm == "split":
        assert "no such split" in refused(lambda: read_rows(f"{there}@nothing"))
        return
    else:
        shard.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "zeros": b"\0" * len(data)}[harm])
    assert str(there) in refused(lambda: read_rows(str(there)))


def test_a_dataset_that_cannot_be_written_is_one_line(tmp_path):
    row = tfds_rows.stored({"prompt": "half \ud83d", "_where": "a:1"}, "prompts")
    assert "could not be written" in refused(lambda: tfds_rows.prepare({"train": [row]}, "prompts", str(tmp_path)))
    (tmp_path / "file").write_text("in the way")
    row = tfds_rows.stored({"prompt": "whole", "_where": "a:1"}, "prompts")
    assert "written" in refused(lambda: tfds_rows.prepare({"train": [row]}, "prompts", str(tmp_path / "file")))


class Frame:
    """As pandas frames are."""

    iloc, to_dict, index = None, None, SimpleNamespace(names=[None])

    def __init__(self, *columns):
        self.columns, self.rows = columns or tuple(ROW), [{**ROW, "response": float("nan")}, ROW]

    def notna(self):
        return [[value == value for value in row.values()] for row in self.rows]

    def astype(self, kind):
        assert kind is object
        return self

    def where(self, keep, other):
        kept = [
            {name: value if yes else other for (name, value), yes in zip(row.items(), marks, strict=True)}
            for row, marks in zip(self.rows, keep, strict=True)
        ]
        return SimpleNamespace(to_dict={"records": kept}.__getitem__)


class Series:
    iloc = None

    def to_dict(self):
        return {0: "p"}


class Split:
    column_names = ("prompt",)


class Lazy:
    """As some data sets are: no iterator, but len and indexing."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        assert isinstance(i, int)
        return ROW


@pytest.mark.parametrize(
    "rows",
    [
        lambda: [ROW, ROW],
        lambda: (ROW for _ in range(2)),
        lambda: iter((ROW, ROW)),
        lambda: {1: ROW, 2: ROW}.values(),
        lambda: np.array([ROW, ROW], object),
        Lazy,
    ],
)
def test_whatever_yields_dicts_is_rows(rows):
    assert rows_from(rows()) == [{"_where": "row 0", **ROW}, {"_where": "row 1", **ROW}]


def test_what_a_frame_lacks_is_null_and_two_columns_of_one_name_are_refused():
    assert [row["response"] for row in rows_from(Frame())] == [None, ROW["response"]]
    assert "two columns 'prompt'" in refused(lambda: rows_from(Frame("label", "prompt", "prompt")))


def test_pandas_frames_are_rows():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([ROW, {**ROW, "response": None, "margin": 1.5}])
    assert rows_from(frame) == [
        {"_where": "row 0", **ROW, "margin": None},
        {"_where": "row 1", **ROW, "response": None, "margin": 1.5},
    ]
    assert rows_from(frame.set_index("prompt"))[0]["prompt"] == "p"
    assert "Series" in refused(lambda: rows_from(pandas.Series(["p"])))


def failing():
    yield ROW
    raise OSError("the disk went away")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"train": Split(), "test": Split()}, "splits train, test; give one, as rows=data['train']"),
        (ROW, "a dict, which is one row or one table"),
        (Series(), "a pandas Series"),
        ({"p"}, "not from a set"),
        (b"rows", "not from a bytes"),
        (7, "not from a int"),
        (np.ones((2, 2)), "an array of 2 dimensions"),
        (np.ones(2), "row 0: a float64, not a dict"),
        (["p"], "row 0: a str, not a dict"),
        ([ROW, None], "row 1: a NoneType"),
        ([{0: "p"}], "row 0: the column 0 has no name"),
        ([], "empty"),
        (iter(()), "empty"),
        (failing, "OSError: the disk went away"),
    ],
)
def test_what_is_no_rows_is_one_line(rows, words):
    assert words in refused(lambda: rows_from(rows() if callable(rows) else rows))
