"""Files of options: whatever stands in one, or is there instead of one, is one line and exit code 2."""

from __future__ import annotations

import os

import pytest
import yaml

from rlhf_jax import cli
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import yamls
from rlhf_jax.hosts.files import read_object

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def refused(capfd, *arguments: str) -> str:
    """What the command line says of arguments that it refuses."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    err = capfd.readouterr().err
    assert end.value.code == 2 and err.startswith("rlhf-jax: error: ") and err.count("\n") == 1 and len(err) < 1100
    return err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "invalid YAML (too many values, aliases counted)"),
        ("data: &d {fields: *d}", "an alias stands within what it names"),
        ("a: " + "[" * 3000, "invalid YAML (nested too deeply)"),
        ("{a: " * 3000, "invalid YAML (nested too deeply)"),
        ("data: {batch_size: " + "9" * 5000 + "}", "data.batch_size is '999"),
        ("data: {batch_size: " + "9" * 4000 + "}", "data.batch_size is 999"),
        ("data: {path: " + "x" * 30_000 + "\x00}", "invalid YAML"),
        ("data: !!python/object/apply:os.system [ls]", "data"),
        ("? [a, b]\n: c", "invalid YAML"),
        ("a: b: c", "invalid YAML"),
        ("data: {batch_size: 1, batch_size: 2}", "'batch_size' comes twice"),
        ("- a", "the file is a list"),
        ("", "the file is empty"),
        ("a", "the file is plain text"),
        ("data: 3", "data is '3'"),
        ("data: [1]", "data is ['1']"),
        ("'': 1", "unknown option"),
        ("data: {'': 1}", "unknown option"),
        ("1: 2", "unknown option"),
        ("? " + "x" * 5000 + "\n: 1", "unknown option"),
        ("data.path.x: 1", "unknown option"),
        ("data: {mixture: {a: b}}", "data.mixture"),
        ("data: {mixture: [{a: b}]}", "data.mixture"),
        ("data: {length_buckets: [[1]]}", "data.length_buckets"),
        ("model: {arch: {norm: '# c'}}", "model.arch.norm is '# c'; give one of rms, layer"),
        ("model: {arch: {norm: ' '}}", "model.arch.norm"),
        ("model: {arch: [1]}", "model.arch"),
    ],
)
def test_a_mistake_in_a_file_of_options_is_one_line(tmp_path, capfd, text, words):
    (tmp_path / "a.yaml").write_text(text)
    for command in ("sft", "ppo"):
        assert words in refused(capfd, command, "--config", str(tmp_path / "a.yaml"))
    refused(capfd, "recipe", str(tmp_path / "a.yaml"))
    refused(capfd, "plan", "--topology", "v5e:4x4", "--config", str(tmp_path / "a.yaml"))


def test_what_is_no_file_of_options_is_one_line(tmp_path, capfd):
    (tmp_path / "latin.yaml").write_bytes("data: {path: é}".encode("latin1"))
    os.mkfifo(tmp_path / "pipe.yaml")
    with open(tmp_path / "long.yaml", "wb") as file:
        file.truncate(1 << 30)
    for name, words in {
        "latin.yaml": "not UTF-8",
        "pipe.yaml": "a pipe or a device",
        "long.yaml": "more than",
        "missing.yaml": "No such file",
        ".": "Is a directory",
        "a\0b": "null",
        "x" * 3000: "name too long",
    }.items():
        assert words in refused(capfd, "sft", "--config", f"{tmp_path}/{name}")


def test_a_byte_order_mark_is_no_part_of_the_options(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfdata: {batch_size: 8}\r\n")
    assert cli.parse("sft", ["--config", str(tmp_path / "a.yaml")]).data.batch_size == 8


def test_honest_aliases_are_read():
    assert yamls.load("a: &x {b: 1}\nc: *x\nd: [*x, *x]") == {"a": {"b": "1"}, "c": {"b": "1"}, "d": [{"b": "1"}] * 2}


@pytest.mark.parametrize("text", ["a: 2020-13-45", "a: " + "9" * 5000, BOMB, "[" * 3000, "a: &a [*a]"])
def test_values_are_as_safe_as_texts(text):
    with pytest.raises(yaml.YAMLError):
        yamls.load(text, yamls.Values)


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b"null", b"{", b"[" * 100_000, b"\xff", b"\0", b"9" * 5000])
def test_an_object_that_is_none_is_one_line(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.json"):
        read_object(tmp_path / "a.json", "delete it")
