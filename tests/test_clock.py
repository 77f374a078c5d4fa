"""Chat templates: the time that they see belongs to the run, and one that does not end is ended."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import datetime

import pytest
from tiny import byte_tokenizer

from rlhf_jax.config import RunConfig, SFTArgs
from rlhf_jax.data import rendering
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import attempts, clock
from rlhf_jax.hosts.attempts import limited
from rlhf_jax.runs import directory
from rlhf_jax.runs.journal import Journal
from rlhf_jax.runs.run import Run
from rlhf_jax.training.loop import claim_directory

DATED = (
    "{{ strftime_now('%d %b %Y, %H:%M:%S') }}|{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = DATED.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
ASKED = [{"role": "user", "content": "what day is it?"}]
THEN = "2021-03-04T05:06:07"


@pytest.fixture(autouse=True)
def today():
    yield clock.begin()
    clock.begin()


@pytest.mark.parametrize("template", [DATED, MARKED])
def test_a_template_sees_the_time_of_the_run(template):
    tokenizer = Tokenizer(byte_tokenizer(chat_template=template))
    for text, shown in ((THEN, "04 Mar 2021, 05:06:07|"), ("1999-12-31T23:59:59", "31 Dec 1999, 23:59:59|")):
        clock.begin(text)
        assert tokenizer.prompt_text([*ASKED]).startswith(shown)
        assert tokenizer.decode(tokenizer.encode_prompt([*ASKED])).startswith(shown)


def test_the_clock_stands():
    began = clock.begin()
    assert abs((datetime.now() - datetime.fromisoformat(began)).total_seconds()) < 60
    assert clock.begin(THEN) == clock.time() == THEN and clock.strftime_now("%j") == "063"
    for broken in ("", "yesterday", None, 7):
        assert clock.begin(broken) not in (THEN, "") and clock.time()[:4] > "2024"


def settings(where, **options) -> SFTArgs:
    return SFTArgs(run=RunConfig(output_dir=str(where / "run"), progress=False, **options))


def test_a_run_that_goes_on_renders_at_the_time_when_it_began(tmp_path):
    clock.begin(THEN)
    with pytest.raises(KeyboardInterrupt), Run("sft", settings(tmp_path), total=3):
        raise KeyboardInterrupt
    clock.begin("2030-01-01T00:00:00")
    assert claim_directory("sft", settings(tmp_path))[0] is None and clock.time() == THEN
    with pytest.raises(KeyboardInterrupt), Run("sft", settings(tmp_path), total=3):
        raise KeyboardInterrupt
    record = directory.read_record(tmp_path / "run")
    assert record is not None and record["time"] == THEN
    claim_directory("sft", settings(tmp_path, overwrite=True))
    assert clock.time()[:4] > "2024"


def test_an_output_that_is_gone_on_with_renders_at_the_time_when_it_was_begun(tmp_path):
    for number, overwrite in enumerate((False, True)):
        output = tmp_path / f"{number}.jsonl"
        with Journal(output, {"a": 1}, overwrite=overwrite) as journal:
            journal.add([{"row": 1}])
            began = clock.time()
        part = output.with_name(output.name + ".part")
        part.write_text(part.read_text().replace(began, THEN))
        clock.begin("2030-01-01T00:00:00")
        with Journal(output, {"a": 1}, overwrite=overwrite) as journal:
            assert clock.time() == THEN and journal.rows == [{"row": 1}]
    with pytest.raises(UserError, match="is made with a 1, not 2"):
        Journal(tmp_path / "0.jsonl", {"a": 2}, overwrite=False)
    with Journal(tmp_path / "0.jsonl", {"a": 2}, overwrite=True) as journal:
        assert clock.time()[:4] > "2024" and journal.rows == []


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(rendering, "LONGEST_RENDERING", 0.2)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}" + "{% endfor %}" * 3
SORTED = "{% for i in range(99999) %}{% set x = range(9999) | map('string') | sort | join %}{% endfor %}"
NAMES = (
    "{% set n = namespace(s='x') %}{% for i in range(99999) %}{% for j in range(9999) %}"
    "{% set n.s = (n.s ~ 'x')[:9] %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("endless", [LOOPS, NAMES, SORTED])
@pytest.mark.parametrize("where", ["main", "other"])
def test_a_template_that_does_not_end_is_one_line_in_any_thread(soon, endless, where):
    found: list[str] = []

    def load() -> None:
        with pytest.raises(UserError, match=r"the chat template has not ended after 0\.2 s of computing") as error:
            Tokenizer(byte_tokenizer(chat_template=endless + DATED))
        found.append(str(error.value))

    began = time.monotonic()
    if where == "main":
        load()
    else:
        thread = threading.Thread(target=load)
        thread.start()
        thread.join(20)
    assert found and time.monotonic() - began < 20


def test_one_that_does_not_end_for_some_rows_only_is_said_at_the_row(soon):
    sometimes = "{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}"
    tokenizer = Tokenizer(byte_tokenizer(chat_template=sometimes + DATED))
    tokenizer.encode_prompt([*ASKED])
    with pytest.raises(UserError, match="has not ended"):
        tokenizer.encode_prompt([{"role": "user", "content": "loop"}])
    assert "what day" in tokenizer.prompt_text([*ASKED])


def test_what_ends_in_time_is_left_alone_and_waiting_is_no_computing(monkeypatch):
    monkeypatch.setattr(attempts._Watch, "EVERY", 0.01)
    assert [limited(lambda i=i: i, 0.05) for i in range(2000)] == list(range(2000))
    assert limited(lambda: time.sleep(0.5) or 3, 0.3) == 3
    with pytest.raises(ZeroDivisionError):
        limited(lambda: 1 / 0, 1)


def test_an_end_at_the_last_moment_strikes_nobody_else(monkeypatch):
    """Calls about as long as their limit: each ends by itself or is ended, and nothing after it is."""
    monkeypatch.setattr(attempts._Watch, "EVERY", 0.0005)

    def work(size: int) -> int:
        return sum(1 for _ in range(size))

    ended = 0
    for size in range(0, 90_000, 300):
        try:
            assert limited(lambda size=size: work(size), 0.001) == size
        except TimeoutError:
            ended += 1
        assert sum(range(100)) == 4950
    assert 0 < ended < 300


@pytest.mark.parametrize("watcher", ["setprofile", "settrace"])
def test_a_program_that_rendered_goes_on_under_a_profiler(watcher):
    """A pending end that was taken back stays pending in Python 3.11, where a traced call then never begins."""
    code = (
        "import sys; from rlhf_jax.hosts.attempts import limited; assert limited(lambda: 1, 5.0) == 1; "
        f"sys.{watcher}(lambda *seen: None); print((lambda: sum(range(3)))())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "3\n", done.stderr
