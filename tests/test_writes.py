"""Laws of what is written: no failure and no kill loses what was there, or what was computed."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from disk import Kill, Killed, fails
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.commands.sample import print_rows
from rlhf_jax.data.sources import read_rows
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.files import Lines, replace_file, replace_files, replacing
from rlhf_jax.hosts.json_text import from_json, to_json
from rlhf_jax.hosts.outputs import check_output, write_output
from rlhf_jax.runs.journal import Journal

LONE = "a\udc80\ud800b\U0001f600\u2028"


def rows_in(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- JSON


@pytest.mark.parametrize("value", [LONE, {LONE: [LONE, {"x": LONE}]}, "\udfff", ["\ud83d"], "\x7f\x9b"])
def test_any_text_is_written_as_utf8_and_comes_back(value):
    text = to_json(value)
    assert json.loads(text.encode()) == value == from_json(text)


def test_arrays_and_dates_have_a_form_and_what_has_none_is_named_by_its_row(tmp_path):
    import datetime

    row = {"a": np.float32(0.5), "b": np.arange(3), "t": datetime.date(2020, 1, 2)}
    Lines(tmp_path / "x.jsonl").add([row])
    assert rows_in(tmp_path / "x.jsonl") == [{"a": 0.5, "b": [0, 1, 2], "t": "2020-01-02"}]
    for bad in (b"raw", {1, 2}, object()):
        with pytest.raises(UserError, match=r"^rows.jsonl:2: this cannot be written as JSON \(.*; leave it out"):
            Lines(tmp_path / "x.jsonl").add([{"a": 1}, {"a": bad, "_where": "rows.jsonl:2"}])
    assert len(rows_in(tmp_path / "x.jsonl")) == 1


# --- appending

FAULTS = st.sampled_from([errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])


class Disk:
    """os.write, fsync, ftruncate and close whose calls do what a script says, then what they always do.

    A step of the script: how many bytes a write takes (None: all that it is given), and the error that follows.
    """

    def __init__(self, script):
        self.script, self.real = list(script), {name: getattr(os, name) for name in ("write", "fsync", "ftruncate")}

    def next(self):
        return self.script.pop(0) if self.script else (None, 0)

    def write(self, descriptor, data):
        size, code = self.next()
        if code and not size:
            raise OSError(code, os.strerror(code))
        taken = self.real["write"](descriptor, data if size is None else bytes(data)[: max(size, 1)])
        if code:
            self.script.insert(0, (0, code))
        return taken

    def other(self, name):
        def call(*args):
            _, code = self.next()
            if code:
                raise OSError(code, os.strerror(code))
            return self.real[name](*args)

        return call

    @contextlib.contextmanager
    def __call__(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", self.write)
            for name in ("fsync", "ftruncate"):
                patch.setattr(os, name, self.other(name))
            yield


STEP = st.tuples(st.one_of(st.none(), st.integers(0, 12)), st.one_of(st.just(0), FAULTS))
CALL = st.tuples(st.integers(0, 3), st.booleans(), st.lists(STEP, max_size=5))


@settings(max_examples=150, deadline=None)
@given(st.lists(CALL, max_size=6), st.sampled_from(["", '{"n": -1}\n', '{"n": -1}\n{"n', '{"n']))
def test_an_appended_file_holds_what_was_reported_as_written_and_nothing_else(calls, before):
    """Calls of so many rows, each on a disk with a script of its own; what was there may end in half a line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text(before)
        lines, told, number = Lines(path), rows_whole(before), 0
        for count, sync, script in calls:
            rows = [{"n": number + i, "text": LONE} for i in range(count)]
            number += count
            with contextlib.suppress(OSError), Disk(script)():
                lines.add(rows, sync=sync)
                told += rows
        lines.add([{"n": "last"}])
        assert rows_in(path) == [*told, {"n": "last"}]


def rows_whole(text):
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@settings(max_examples=60, deadline=None)
@given(st.lists(CALL, min_size=1, max_size=5), st.integers(0, 4))
def test_a_journal_that_failed_anywhere_goes_on_with_what_it_reported(calls, kill):
    """Every `kill` calls the command ends and another goes on, and finds nothing else but perhaps rows that a disk
    failed to take back, whole."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        output, told, lost = Path(folder) / "out.jsonl", [], []
        start = lambda: stack.enter_context(Journal(output, {"x": 1}, overwrite=False))  # noqa: E731
        journal = start()
        for number, (count, _, script) in enumerate(calls):
            if kill and number % kill == 0:
                journal.close()
                journal = start()
                more = journal.rows[len(told) :]
                assert not more or more in [rows[: len(more)] for rows in lost]
                told += more
            assert journal.rows == told
            rows = [{"n": number, "i": i, "text": LONE} for i in range(count)]
            try:
                with Disk(script)():
                    journal.add(rows)
                told += rows
            except UserError:
                lost.append(rows)
        with contextlib.suppress(UserError), Disk(calls[0][2])():
            journal.finish(told)
        journal.close()
        if Path(f"{output}.part").exists():
            start().finish(told)
        assert rows_in(output) == told and {path.name for path in Path(folder).iterdir()} == {"out.jsonl"}


@pytest.mark.parametrize("sync", [False, True])
def test_a_real_limit_of_the_file_size_takes_back_the_half_line(tmp_path, sync):
    lines, rows = Lines(tmp_path / "x.jsonl"), [{"n": i} for i in range(5)]
    lines.add(rows)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, old[1]))
        with pytest.raises(OSError, match="File too large"):
            lines.add([{"long": "x" * 400}], sync=sync)
        lines.add([{"n": 5}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    lines.add([{"n": 6}])
    assert [row["n"] for row in rows_in(lines.path)] == list(range(7))


def test_a_vote_that_could_not_be_written_is_none_and_the_file_is_read_again(tmp_path):
    from rlhf_jax.commands.label.items import items_of
    from rlhf_jax.commands.label.votes import Votes
    from rlhf_jax.data.ballots import ranking_row

    items, _ = items_of([{"prompt": LONE, "responses": [{"text": LONE}, {"text": "b"}], "_where": "x"}])
    assert ranking_row and items
    vote = {
        "item": items[0].key, "rater": "ann", "prompt": LONE, "responses": items[0].ranking.items(), "ranks": [0, 1],
        "all_bad": False, "skipped": False, "comment": "", "order": [0, 1], "seconds": 1.0, "time": "now",
    }  # fmt: skip
    path = str(tmp_path / "votes.jsonl")
    with contextlib.closing(Votes(path, items)) as votes:
        votes.add(vote)
        for name in ("write", "fsync"):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
                fails(patch, name, {0, 1}, of="votes.jsonl")
                votes.add({**vote, "rater": "lost"})
        assert votes.raters() == ["ann"]
        votes.add({**vote, "rater": "bob"})
    with contextlib.closing(Votes(path, items)) as votes:
        assert votes.raters() == ["ann", "bob"] and not votes.mended
    assert len(read_rows(path)) == 2


# --- replacing


@pytest.mark.parametrize(("name", "call"), [("write", 0), ("fsync", 0), ("replace", 0), ("open", 0), ("write", 1)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_file_that_cannot_be_replaced_is_as_it_was(tmp_path, monkeypatch, name, call, code):
    for file in "ab":
        (tmp_path / file).write_text("old")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        fails(patch, name, {call}, of=".b.new" if name == "replace" else ".a.new", code=code)
        replace_files([(tmp_path / "b", "new"), (tmp_path / "a", "new")])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_a_file_keeps_its_mode_and_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "x"
    target.write_text("old")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to(target)
    replace_file(tmp_path / "link", LONE.encode("utf-8", "replace"))
    assert (tmp_path / "link").is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o640
    assert [path.name for path in target.parent.iterdir()] == ["x"]
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    check_output(str(tmp_path / "dangling"), overwrite=False)
    replace_file(tmp_path / "dangling", "x")
    assert (tmp_path / "new").read_text() == "x"


def test_pipes_and_devices_are_written_to(tmp_path):
    for path in ("/dev/null", "/dev/stdout"):
        check_output(path, overwrite=False)
    write_output("/dev/null", b"x")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    check_output(str(fifo), overwrite=False)
    with subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE) as reader:
        write_output(str(fifo), b"through\n")
        assert reader.stdout.read() == b"through\n"


KEPT = "No space left on device; what was to be written is in "


@pytest.mark.parametrize("output", ["", "/dev/full", "/dev/stdout", "fifo"])
def test_work_for_a_stream_is_in_memory_and_the_stream_is_never_read(tmp_path, monkeypatch, capfd, output):
    """/dev/full gives zeros without end to who reads it, and a pipe waits for who writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.mkfifo("fifo")
    with Journal(output, {"x": 1}, overwrite=False) as journal:
        journal.add([{"n": 0}])
        if output == "/dev/full":
            with pytest.raises(UserError, match=KEPT):
                journal.finish(journal.rows, {"rows": 1})
        elif output == "fifo":
            with subprocess.Popen(["cat", output], stdout=subprocess.PIPE) as reader:
                journal.finish(journal.rows, {"rows": 1})
                assert reader.stdout.read() == b'{"n": 0}\n'
        else:
            journal.finish(journal.rows, {"rows": 1})
            assert capfd.readouterr().out == '{"n": 0}\n'
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*summary*"))


def test_what_a_full_device_refuses_is_kept_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError, match=f"^output /dev/full: {KEPT}") as error:
        write_output("/dev/full", b"precious\n")
    assert Path(str(error.value).split()[-1]).read_bytes() == b"precious\n"

    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(UserError, match=f"^standard output: {KEPT}"):
        write_output("", b"precious\n")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.EDQUOT])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, code):
    (tmp_path / "x.jsonl").write_text("old")
    with monkeypatch.context() as patch:
        fails(patch, "open", {0}, of=".x.jsonl.new", code=code)
        with pytest.raises(UserError, match=rf"^output .*x.jsonl: {os.strerror(code)}; choose another place, or mend"):
            check_output(str(tmp_path / "x.jsonl"), overwrite=True)
    with pytest.raises(UserError, match=r"^output .*: File name too long"):
        check_output(str(tmp_path / ("x" * 253)), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"] and (tmp_path / "x.jsonl").read_text() == "old"


def test_a_directory_is_replaced_whole_wherever_a_kill_comes(tmp_path):
    def make(path, text):
        with replacing(path) as new:
            for name in ("a", "b"):
                replace_file(new / name, text)

    def content(path):
        return {file.name: file.read_text() for file in path.iterdir()}

    with pytest.MonkeyPatch.context() as patch:
        seen = Kill(patch, None)
        make(tmp_path / "x", "old")
        first = seen.count
        make(tmp_path / "x", "new")
    for at in range(seen.count - first):
        path = tmp_path / f"{at}" / "x"
        make(path, "old")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            Kill(patch, at)
            make(path, "new")
        beside = path if path.exists() else path.with_name(".x.old")
        assert content(beside) in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
        make(path, "newer")
        assert content(path) == {"a": "newer", "b": "newer"} and [p.name for p in path.parent.iterdir()] == ["x"]


# --- OUTPUT and OUTPUT.part


def finished(output, overwrite=False, rows=3):
    with Journal(output, {"x": 1}, overwrite=overwrite) as journal:
        made = 0
        for i in range(len(journal.rows), rows):
            journal.add([{"n": i, "text": LONE}])
            made += 1
        journal.finish([{**row, "done": True} for row in journal.rows], {"rows": rows})
    return made


@pytest.mark.parametrize("there", [False, True])
def test_a_kill_anywhere_leaves_what_the_same_command_goes_on_from(tmp_path, there):
    """Between any two changes of a file: no row is made twice but the one under way, and no old output is lost."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Kill(patch, None)
        finished(tmp_path / "alone.jsonl")
    for at in range(seen.count + 4):
        output = tmp_path / str(at) / "out.jsonl"
        output.parent.mkdir()
        if there:
            output.write_text("old")
        with pytest.MonkeyPatch.context() as patch:
            kill = Kill(patch, at)
            try:
                finished(output, overwrite=there)
            except Killed:
                done = sum(name == "write" for name, _ in kill.log)
        if there:
            assert output.read_text() in ("old", (tmp_path / "alone.jsonl").read_text())
        again = finished(output, overwrite=there) if kill.count > at or not output.exists() else 0
        assert again <= max(3 - max(done - 3, 0), 0) + 1
        assert output.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
        assert json.loads(output.with_suffix(".summary.json").read_text()) == {"rows": 3}
        assert {p.name for p in output.parent.iterdir()} == {"out.jsonl", "out.summary.json"}


@pytest.mark.parametrize("name", ["out.jsonl", "out.r1"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_summary_whose_output_was_renamed_is_not_replaced(tmp_path, name, beside):
    output, place = tmp_path / name, None if beside else tmp_path / "summary.json"

    def make(x, **options):
        with Journal(output, {"x": x}, summary=place, **options) as journal:
            journal.finish([{"x": x}], {"x": x})

    make(1, overwrite=False)
    [summary] = tmp_path.glob("*summary.json")
    output.rename(tmp_path / "kept.jsonl")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^{summary} is there, but {output} is not.*--overwrite true$"):
            make(2, overwrite=False)
    assert json.loads(summary.read_text()) == {"x": 1} and not output.exists()
    make(2, overwrite=True)
    assert json.loads(summary.read_text()) == {"x": 2} and rows_in(output) == [{"x": 2}]


@pytest.mark.parametrize("journal", [True, False])
def test_rows_without_a_summary_take_that_of_the_rows_they_replace_with_them(tmp_path, journal):
    output, summary, mine = (tmp_path / name for name in ("out.jsonl", "out.summary.json", "else.summary.json"))
    mine.write_text("1")

    def make(overwrite):
        if journal:
            with Journal(output, {}, overwrite=overwrite) as one:
                one.finish([{"x": 2}])
        else:
            check_output(str(output), overwrite=overwrite)
            print_rows([{"x": 2}], str(output))

    for renamed in (True, False):
        finished(output)
        if renamed:
            output.unlink()
        with pytest.raises(UserError, match="tells of other rows" if renamed else "out.jsonl exists; choose another"):
            make(overwrite=False)
        assert summary.exists()
        make(overwrite=True)
        assert rows_in(output) == [{"x": 2}] and {p.name for p in tmp_path.iterdir()} == {output.name, mine.name}
        output.unlink()


def test_no_two_outputs_have_one_place_for_their_summaries(tmp_path):
    names = ["prefs.r1", "prefs.r2", "rows", "rows.json", "rows.jsonl", "prefs.r1.jsonl"]
    for rows, name in enumerate(names):
        finished(tmp_path / name, rows=rows)
    said = {path.name: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*summary.json")}
    wanted = [f"{name}-summary.json" for name in names[:4]] + ["rows.summary.json", "prefs.r1.summary.json"]
    assert said == {name: rows for rows, name in enumerate(wanted)}


@pytest.mark.parametrize("of", [".out.jsonl.new", ".out.summary.json.new", "out.jsonl.part"])
@pytest.mark.parametrize("name", ["write", "fsync"])
def test_a_last_write_that_fails_keeps_the_old_output_and_the_work(tmp_path, monkeypatch, name, of):
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    output.with_suffix(".summary.json").write_text("old")
    with Journal(output, {"x": 1}, overwrite=True) as journal:
        journal.add([{"n": 0}, {"n": 1}])
        with monkeypatch.context() as patch, pytest.raises(UserError) as error:
            fails(patch, name, {0, 1}, of=of)
            journal.finish(journal.rows, {"rows": 2})
    assert f"No space left on device; what was computed is in {output}.part; mend that, then give the same" in str(
        error.value
    )
    assert output.read_text() == output.with_suffix(".summary.json").read_text() == "old"
    with Journal(output, {"x": 1}, overwrite=True) as journal:
        assert journal.rows == [{"n": 0}, {"n": 1}]


def test_overwrite_goes_on_with_its_own_work_alone(tmp_path):
    output = tmp_path / "out.jsonl"
    with Journal(output, {"x": 1}, overwrite=False) as journal:
        journal.add([{"n": 0}])
    with Journal(output, {"x": 1}, overwrite=True) as journal:
        assert journal.rows == []
        journal.add([{"n": 1}])
    with Journal(output, {"x": 1}, overwrite=True) as journal:
        assert journal.rows == [{"n": 1}]
    with Journal(output, {"x": 2}, overwrite=True) as journal:
        assert journal.rows == []


@pytest.mark.parametrize("foreign", [b"binary\x00", b'{"a": 1}\n{"b": 2}\n', b"[1]\n", b'{"made'])
def test_a_part_of_somebody_else_is_left_alone(tmp_path, foreign):
    part = tmp_path / "out.jsonl.part"
    part.write_bytes(foreign)
    if foreign == b'{"made':  # cut short by a kill
        return Journal(tmp_path / "out.jsonl", {"x": 1}, overwrite=False).close()
    with pytest.raises(UserError, match="was not written by this command"):
        Journal(tmp_path / "out.jsonl", {"x": 1}, overwrite=False)
    assert part.read_bytes() == foreign


def test_a_damaged_line_of_a_part_costs_what_follows_it(tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    with Journal(output, {"x": 1}, overwrite=False) as journal:
        journal.add([{"n": i} for i in range(4)])
    lines = Path(f"{output}.part").read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:4] + b"\x00\x00" + lines[4]
    Path(f"{output}.part").write_bytes(b"".join(lines))
    with Journal(output, {"x": 1}, overwrite=False) as journal:
        assert journal.rows == [{"n": 0}, {"n": 1}]
    assert "line 4 is damaged; going on from there" in capsys.readouterr().out


# --- signals

HANGS_UP = """
import os, signal, sys, time
from rlhf_jax.hosts.interrupts import Interrupts
said = []
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] else signal.SIG_DFL)
found = Interrupts(said.append)
for number in map(int, sys.argv[2:]):
    os.kill(os.getpid(), number)
    time.sleep(0.1)
found.close()
print(found.received, len(said), end="")
"""


@pytest.mark.parametrize(("ignored", "signals", "expected"), [
    (False, [signal.SIGHUP], "SIGHUP 1"),
    (False, [signal.SIGHUP, signal.SIGHUP], "SIGHUP 1"),  # the kernel's and the shell's
    (False, [signal.SIGTERM, signal.SIGHUP], "SIGTERM 1"),  # as systemd ends a service
    (True, [signal.SIGHUP], " 0"),  # nohup
])  # fmt: skip
def test_a_lost_terminal_saves_like_sigterm_and_nohup_ignores_it(ignored, signals, expected):
    numbers = [str(int(number)) for number in signals]
    command = [sys.executable, "-c", HANGS_UP, "ignored" if ignored else "", *numbers]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == expected


HANDS_ON = """
import os, signal, time
from rlhf_jax.hosts.interrupts import Ending, Interrupts, in_force
ending, said = Ending(), []
outer = Interrupts(said.append)
first = Interrupts(said.append)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
first.close()
second = Interrupts(said.append)
print(first.received, outer.received, second.received, repr(ending.received), len(said), end=" ")
second.close()
outer.close()
print(in_force() is ending, ending.received, end="")
"""


def test_a_signal_that_came_after_a_loops_last_step_stops_what_comes_next():
    """A loop within a loop, as the SFT of a round, has nothing left to stop; what is around and after it has."""
    command = [sys.executable, "-c", HANDS_ON]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "SIGTERM SIGTERM SIGTERM '' 1 True SIGTERM"


# --- standard output


COMMANDS = ["schema sft", "sft --help", "data inspect rows.jsonl", "data make test_writes:make --out o"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_behind_standard_output_ends_no_command_and_what_it_said_is_kept(tmp_path, command):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": LONE, "response": "b"}) + "\n")
    paths = os.pathsep.join(str(path) for path in (Path(__file__).parent, Path(__file__).parents[1]))
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": paths}

    def run(stdout, stderr=subprocess.PIPE):
        arguments = [sys.executable, "-m", "rlhf_jax", *command.split()]
        return subprocess.run(arguments, stdout=stdout, stderr=stderr, cwd=tmp_path, env=env, text=True)

    whole = run(subprocess.PIPE)
    assert whole.returncode == 0
    for made in (tmp_path / "o").glob("*"):
        made.unlink()
    with open("/dev/full", "w") as full:
        done = run(full)
        assert done.returncode == 2 and done.stderr.startswith(f"rlhf-jax: error: standard output: {KEPT}{tmp_path}")
        assert done.stderr.count("\n") == 1 and Path(done.stderr.split()[-1]).read_text() == whole.stdout
        assert (tmp_path / "o" / "a").exists() == command.startswith("data make")
        command += " --overwrite true" if "make" in command else ""
        assert run(full, full).returncode == 2  # and where nothing can be said at all
    closed = f"exec {shlex.join([sys.executable, '-m', 'rlhf_jax', *command.split()])} >&- 2>&-"
    assert (
        subprocess.run(["bash", "-c", closed], cwd=tmp_path, env=env).returncode == 0
    )  # where nobody wants to hear it


def make(folder, num, seed):
    (folder / "a").write_text("x")


def rated(prompts, responses, **columns):
    return [0.0] * len(prompts)


@pytest.mark.parametrize("count", [1, 1000])  # within a buffer and beyond it
def test_rows_for_a_full_standard_output_are_kept_as_rows(tmp_path, monkeypatch, count):
    row = {"prompt": LONE, "responses": ["a", "b"], "id": 1}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * count)
    paths = os.pathsep.join(str(path) for path in (Path(__file__).parent, Path(__file__).parents[1]))
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": paths}
    arguments = [sys.executable, "-m", "rlhf_jax", "rate", "rows.jsonl", "--function", "test_writes:rated"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path, env=env, text=True)
        closed = f"exec {shlex.join(arguments)} >&-"
        shut = subprocess.run(["bash", "-c", closed], stderr=subprocess.PIPE, cwd=tmp_path, env=env, text=True)
    assert shut.returncode == 2 and "standard output: it is closed; what was to be written is in" in shut.stderr
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith(f"rlhf-jax: error: standard output: {KEPT}{tmp_path}")
    assert [row["id"] for row in read_rows(last.split()[-1])] == [1] * count
