"""A judge behind http: every way in which it can fail is counted or one line, and its key is nowhere to be found."""

from __future__ import annotations

import contextlib
import json
import logging
import socketserver
import threading
import time
import traceback
from pathlib import Path

import pytest

from rlhf_jax import cli
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judges
from rlhf_jax.hosts import attempts

KEY = "sk-Alpha7-Omega9"
PARTS = (KEY, "Alpha7", "Omega9", "QWxwaGE3")  # as it is, in halves, and what base64 would begin with

FINE = json.dumps({"choices": [{"message": {"content": "A"}}]}).encode()
ECHO = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()


def reply(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def dripping(start: int):
    """A plan that sends a fine answer, byte by byte from `start` on."""

    def plan(n: int):
        whole = reply("200 OK", FINE)
        yield whole[:start]
        for i in range(start % len(whole), len(whole)):
            yield whole[i : i + 1]
            time.sleep(0.02)

    return plan


FAILING = {
    "reset": [],
    "429": [reply(f"429 slow down {KEY}", ECHO)],
    "500": [reply(f"500 {KEY}", ECHO, f"X-Debug: {KEY}")],
    "no http": [f"SSH-2.0 {KEY}\r\n".encode()],
    "a long status line": [b"HTTP/1.1 200 " + KEY.encode() * 9000],
    "no JSON": [reply("200 OK", f"<html>{KEY}".encode())],
    "deep JSON": [reply("200 OK", b"[" * 200_000)],
    "a long number": [reply("200 OK", b"9" * 5000)],
    "no chat": [reply("200 OK", ECHO)],
    "a cut body": [reply("200 OK", FINE)[:-3]],
    "a cut chunk": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + FINE],
    "a chunk too few": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(FINE), FINE)],
    "too long": [reply("200 OK", b" " * (1 << 21) + FINE)],
    "a slow body": dripping(-30),
    "a slow status": dripping(0),
}
REFUSING = {
    "401": [reply(f"401 {KEY}", ECHO)],
    "400": [reply("400 Bad Request", ECHO)],
    "a redirect": [reply(f"302 to {KEY}", ECHO, f"Location: http://other.invalid/?key={KEY}")],
}


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError):
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += self.request.recv(65536)
            self.server.asked.append(asked)
            for part in self.server.plan(len(self.server.asked)):
                self.request.sendall(part)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(attempts, "RETRY_WAIT", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("THE_KEY", KEY)
    socketserver.ThreadingTCPServer.daemon_threads = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as found:
        found.asked = []
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield found
        found.shutdown()


def judge(url: str, where: Path, *options: str, rows: int = 6) -> tuple[int, Path]:
    """`rlhf-jax judge` of so many rows, two at once; its exit code and OUTPUT."""
    made = [{"prompt": f"p{i}", "responses": [{"text": "x"}, {"text": "y"}]} for i in range(rows)]
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    settings = {"url": url, "api_key_env": "THE_KEY", "timeout": "0.3", "retries": "1", "both_orders": "false"}
    given = [f"--judge.{name}={value}" for name, value in settings.items()]
    fixed = ["--output", str(where / "out.jsonl"), "--batch_size", "2", "--progress", "false"]
    with pytest.raises(SystemExit) as end:
        cli.main(["judge", str(where / "rows.jsonl"), *given, *fixed, *options])
    return end.value.code, where / "out.jsonl"


def at(server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def assert_no_key(where: Path, *texts: str) -> None:
    """Neither the texts nor any file below `where` holds the key or a part of it."""
    files = {str(path): path.read_bytes().decode("utf-8", "replace") for path in where.rglob("*") if path.is_file()}
    for name, text in {**files, **dict(enumerate(texts))}.items():
        assert [part for part in PARTS if part in text] == [], name


def plan_of(name: str):
    """What the server sends on connection n, part by part."""
    parts = (FAILING | REFUSING)[name]
    return parts if callable(parts) else lambda n: parts


@pytest.mark.parametrize("name", [*FAILING, *REFUSING])
def test_an_endpoint_that_always_fails_ends_it_with_one_line_and_without_the_key(
    server, tmp_path, capfd, caplog, name
):
    server.plan = plan_of(name)
    with caplog.at_level(logging.DEBUG):
        code, output = judge(at(server), tmp_path)
    out, err = capfd.readouterr()
    assert code == 2 and not output.exists() and output.with_name("out.jsonl.part").exists()
    assert err.count("\n") == 1 and err.startswith("rlhf-jax: error: judge.url") and KEY.encode() in server.asked[0]
    assert ("answered" in err and "check the address" in err) == (name in REFUSING)
    assert_no_key(tmp_path, out, err, caplog.text)


def test_what_was_judged_before_the_endpoint_went_away_is_kept(server, tmp_path, capfd):
    fine = [reply("200 OK", FINE)]
    server.plan = lambda n: fine if n <= 2 else FAILING["500"]  # two rows, asked once each
    code, output = judge(at(server), tmp_path)
    assert code == 2 and "2 questions in a row had no answer" in capfd.readouterr().err
    assert len(output.with_name("out.jsonl.part").read_text().splitlines()) == 1 + 2
    server.plan = lambda n: fine
    code, output = judge(at(server), tmp_path)
    ranks = [[item["rank"] for item in json.loads(line)["responses"]] for line in output.read_text().splitlines()]
    assert code == 0 and ranks == [[0, 1]] * 6


@pytest.mark.parametrize("refuses", [False, True])
def test_answers_of_a_batch_that_came_before_the_endpoint_went_away_are_not_asked_for_again(
    server, tmp_path, monkeypatch, refuses
):
    monkeypatch.setattr(judges, "MOST_FAILURES", 2)
    fine = [reply("200 OK", FINE)]
    server.plan = lambda n: fine if n <= 3 else REFUSING["401"] if refuses else FAILING["500"]
    options = ("--judge.workers", "1", "--judge.retries", "0", "--batch_size", "20")
    code, output = judge(at(server), tmp_path, *options, rows=20)
    assert code == 2 and len(output.with_name("out.jsonl.part").read_text().splitlines()) == 1 + 3
    server.plan, server.asked[:] = lambda n: fine, []
    code, output = judge(at(server), tmp_path, *options, rows=20)
    assert code == 0 and len(server.asked) == 17 and len(output.read_text().splitlines()) == 20


@pytest.mark.parametrize("name", ["a cut body", "a cut chunk", "a chunk too few", "429", "reset", "a slow body"])
def test_a_failure_that_passes_is_tried_again(server, tmp_path, name):
    broken, fine = plan_of(name), [reply("200 OK", FINE)]
    server.plan = lambda n: fine if n % 2 == 0 else broken(n)
    code, output = judge(at(server), tmp_path, "--judge.workers", "1")
    summary = json.loads(output.with_suffix(".summary.json").read_text())["judge"]
    assert code == 0 and summary["no_answer"] == 0 and summary["answers"] == 6 and len(server.asked) == 12


def test_some_failures_are_counted_and_said(server, tmp_path, capfd):
    server.plan = lambda n: FAILING["500"] if n in (1, 2) else [reply("200 OK", FINE)]
    code, output = judge(at(server), tmp_path, "--judge.workers", "1")
    assert code == 0 and "1 timed out or failed; 1 pairs without a verdict" in capfd.readouterr().out
    first = json.loads(output.read_text().splitlines()[0])
    assert [item["rank"] for item in first["responses"]] == [None, None]


@pytest.mark.parametrize(
    "key", [f"{KEY}\n", f"{KEY}\r\nX-Other: 1", f" {KEY}", f"{KEY} {KEY}", f"é{KEY}", f"{KEY}\udcff", f"{KEY}\t"]
)
def test_a_key_that_no_request_can_hold_is_refused_unseen(tmp_path, capfd, monkeypatch, key):
    monkeypatch.setenv("THE_KEY", key)
    code, _ = judge("http://127.0.0.1:9/v1", tmp_path)
    out, err = capfd.readouterr()
    assert code == 2 and "white space, a line break" in err
    assert_no_key(tmp_path, out, err)


@pytest.mark.parametrize("name", ["500", "no http", "a cut chunk", "401", "a redirect"])
def test_no_traceback_holds_the_key(server, tmp_path, name):
    server.plan = plan_of(name)
    with pytest.raises(UserError) as error:
        judge(at(server), tmp_path, "--debug")
    text = "".join(traceback.format_exception(error.value))
    assert "endpoint" in text
    assert_no_key(tmp_path, text)


@pytest.mark.parametrize(
    "options",
    [
        {"api_key_env": KEY},
        {"api_key_env": KEY.replace("-", "_")},  # looks like a name
        {"url": f"http://user:{KEY}@localhost/v1"},
        {"url": f"http://{KEY}@localhost/v1"},
        {"url": f"https://localhost/v1?key={KEY}"},
        {"url": f"https://localhost/v1#{KEY}"},
        {"url": KEY},
        {"url": f"http://localhost:{KEY}/v1"},
        {"url": f"http://[{KEY}/v1"},
        {"url": f"http://localhost/ {KEY}"},
    ],
)
def test_a_key_in_the_wrong_option_is_refused_unseen(tmp_path, capfd, options):
    given = [f"--judge.{name}={value}" for name, value in {"url": "http://127.0.0.1:9/v1", **options}.items()]
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["judge", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl"), *given])
    out, err = capfd.readouterr()
    assert end.value.code == 2 and err.count("\n") == 1
    assert_no_key(tmp_path, out, err)


def test_a_proxy_that_refuses_gives_nothing_away(server, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    server.plan = lambda n: [reply(f"407 {KEY}", ECHO)]
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://me:{KEY}@127.0.0.1:{server.server_address[1]}")
    for url in ("http://judge.invalid/v1", "https://judge.invalid/v1"):
        code, _ = judge(url, tmp_path, "--overwrite", "true")
        out, err = capfd.readouterr()
        assert code == 2 and err.count("\n") == 1 and err.startswith("rlhf-jax: error: judge.url")
        assert_no_key(tmp_path, out, err)


def test_nobody_listens(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(attempts, "RETRY_WAIT", 0.0)
    monkeypatch.setenv("THE_KEY", KEY)
    code, _ = judge("http://127.0.0.1:9/v1", tmp_path)
    assert code == 2 and "had no answer (Connection refused)" in capfd.readouterr().err
