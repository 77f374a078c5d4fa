"""Texts of others where they are shown: no control character reaches a terminal, no long value is echoed whole."""

from __future__ import annotations

import json

import pytest

from rlhf_jax import cli
from rlhf_jax.errors import LONGEST_LINE, UserError, printable, reason, shown


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("red \x1b[31m\x07", r"red \x1b[31m\x07"),
        ("\x9b2J", r"\x9b2J"),  # the one-byte form of ESC [
        ("a\rb\n", r"a\rb\n"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("half \ud83d", r"half \ud83d"),
        ("Zoë 😀 日本", "Zoë 😀 日本"),
    ],
)
def test_what_would_act_on_a_terminal_is_escaped(text, seen):
    assert printable(text) == seen == printable(seen) == str(UserError(text))
    printable(text).encode()


def test_line_breaks_stay_where_they_are_meant():
    assert printable("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"


def test_an_error_is_one_line_with_its_beginning_and_its_cure():
    line = str(UserError(f"option is {'x' * 20_000!r}\n; give a number"))
    assert len(line) < LONGEST_LINE + 50 and "\n" not in line
    assert line.startswith("option is 'xxx") and line.endswith("; give a number")


def test_values_that_cannot_be_shown_have_a_type():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    assert shown(Odd()) == "a Odd" and len(shown("y" * 9000)) < 300 and shown(10**5000) == "a int"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError(""), "ValueError"),
        (KeyError("x"), "'x'"),
        (ValueError("\n first\nsecond"), "first"),
    ],
)
def test_the_reason_of_an_error_is_one_line(error, said):
    assert reason(error) == said


@pytest.mark.parametrize("command", [["inspect"], ["aggregate"], ["aggregate", "--by", "model"]])
def test_rows_and_raters_are_printed_without_acting_on_the_terminal(tmp_path, capfd, command):
    odd = "\x1b]0;mine\x07\x9b2J\u202e\ud83d"
    responses = [{"text": f"{odd} {i}", "model": f"{odd} {i}", "rank": i} for i in range(2)]
    rows = [{"prompt": f"{odd} {n}", "responses": responses, "rater": f"{odd} {n % 3}"} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = ["--intervals", "2"] if command[0] == "aggregate" else []
    with pytest.raises(SystemExit) as end:
        cli.main(["data", command[0], str(tmp_path / "rows.jsonl"), *command[1:], *fixed])
    out, err = capfd.readouterr()
    assert end.value.code == 0 and err == "" and set(out) & set("\x1b\x07\x9b\u202e") == set()
    assert command[0] == "inspect" or r"\x1b]0;mine" in out


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "mo\ndel"),
        OSError(36, "File name too long", "x" * 9000),
        OSError(5, "Input/output error"),
        OSError("half a sentence\nand more"),
    ],
)
def test_what_the_system_refuses_anywhere_is_one_line(error, monkeypatch, capsys):
    def refuse(*_):
        raise error

    monkeypatch.setattr(cli, "execute", refuse)
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", "model"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("rlhf-jax: error: ") and err.count("\n") == 1 and len(err) < 500
    assert (error.strerror or "half a sentence") in err
    with pytest.raises(OSError, match=r"."):
        cli.main(["inspect", "model", "--debug"])


def test_a_directory_of_links_in_a_circle_is_no_traceback(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    for arguments in (["sft", "--data.path", "x.jsonl", "--run.output_dir"], ["resume"], ["ppo", "--run.output_dir"]):
        with pytest.raises(SystemExit) as end:
            cli.main([*arguments, str(tmp_path / "loop")])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1
