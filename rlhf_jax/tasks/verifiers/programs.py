"""Unit tests of code that a model wrote, each in a process of its own with limits."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError, shown, tell

ALLOWED = "RLHF_JAX_RUN_CODE"
"""The environment variable that allows it, when it is 1."""

SECONDS, CLOCK, MEMORY, OUTPUT = 5, 20, 1 << 30, 1 << 20
"""What one program may take: seconds of computing, seconds of the clock, bytes of memory, bytes of a file."""

WORKERS = min(os.cpu_count() or 1, 8)
"""Programs that run at once."""

FENCE = re.compile(r"^```[ \t]*([^\n`]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""What stands behind the sign, such as a language, and the text within."""

PYTHON = re.compile(r"\{?(?:python3?|py)\b.*|\s*", re.IGNORECASE)
"""What stands behind the sign of a fence that may hold a program."""

PROBES = {
    "starting processes": "import os\nif os.fork() == 0: os._exit(0)",
    "the network": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "writing outside a temporary folder": "import tempfile\ntempfile.mkstemp(dir='..')",
}
"""What a program should be kept from -> a program that does it."""


def check_allowed() -> None:
    """Raise a UserError unless the environment allows to run code.

    It is off by default since the limits are no virtual machine, and no file may switch it on: rows, recipes and run
    directories, which name reward functions and hold tests, may be anybody's.
    """
    if os.environ.get(ALLOWED) != "1":
        raise UserError(
            f"the verifier code runs programs that a model wrote; set the environment variable {ALLOWED}=1 on a "
            "machine where that may be (the limits that hold are said then), or leave the verifier out"
        )


def code(prompts: list[str], responses: list[str], *, tests: list[Any], **columns: object) -> list[float]:
    """1.0 where the Python program of a response passes all of the row's `tests`, see `passes`.

    The program is what stands in the last ``` fence of Python or of no language, else the whole response.

    Raises:
        UserError: it is not allowed, cannot work on this machine, or tests are of another form.
    """
    check_allowed()
    _check_machine()
    jobs = [(program_of(response), cases_of(one)) for response, one in zip(responses, tests, strict=True)]
    with ThreadPoolExecutor(WORKERS) as pool:
        return [float(passed) for passed in pool.map(lambda job: passes(*job), jobs)]


def program_of(response: str) -> str:
    """The text in the last ``` fence of a response that names Python or no language, else the whole."""
    fenced = [text for language, text in FENCE.findall(response) if PYTHON.fullmatch(language)]
    return fenced[-1] if fenced else response


def cases_of(tests: object) -> list[dict[str, str]]:
    """What is run with a program: [{tests}] or several {input, output}.

    Raises:
        UserError: no text, list of texts, or list of {input, output} that holds something.
    """
    if isinstance(tests, str) and tests.strip():
        return [{"tests": tests}]
    if isinstance(tests, list) and tests:
        if all(isinstance(one, str) for one in tests):
            return [{"tests": "\n".join(tests)}]
        if all(isinstance(one, dict) and {"input", "output"} == set(one) for one in tests):
            return [{name: str(text) for name, text in one.items()} for one in tests]
    raise UserError(
        f"code: tests {shown(tests)} are no text, list of texts or list of {{input, output}}; mend the row"
    )


def passes(program: str, cases: Sequence[dict[str, str]]) -> bool:
    """Whether a program passes all cases.

    {tests}: statements such as assert, run behind the program in its process, all end without an error. {input,
    output}: it prints `output` (white space at the ends of lines and of the text aside) when it is given `input`.
    """
    for case in cases:
        printed = run(program, case)
        if printed is None or _lines(printed) != _lines(case.get("output", printed)):
            return False
    return True


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def run(program: str, case: dict[str, str]) -> str | None:
    """What a program printed if it came to its end and that of its tests, else None."""
    marker = secrets.token_hex(16)
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, contextlib.ExitStack() as files:
        files.callback(os.close, read_end)
        given, printed = (files.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        given.write(json.dumps({"code": program, "marker": marker, **case}).encode())
        given.seek(0)
        script = Path(__file__).with_name("sandbox.py")
        limits = (str(number) for number in (write_end, SECONDS, MEMORY, OUTPUT))
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(script), home, *limits],
            stdin=given, stdout=printed, stderr=subprocess.DEVNULL, pass_fds=[write_end], start_new_session=True,
            env={"PATH": os.defpath, "HOME": home, "TMPDIR": home, "OPENBLAS_NUM_THREADS": "1"},  # no keys of ours
        )  # fmt: skip
        os.close(write_end)
        try:
            process.wait(CLOCK)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.set_blocking(read_end, False)
        with contextlib.suppress(BlockingIOError):
            if os.read(read_end, 100).decode(errors="replace") == marker:
                printed.seek(0)
                return printed.read().decode(errors="replace")
    return None


@functools.cache
def _check_machine() -> None:
    """Try the sandbox, and say once what it does not keep a program from here.

    Raises:
        UserError: it runs no program at all.
    """
    if not passes("def one():\n    return 1", [{"tests": "assert one() == 1"}]):
        raise UserError("the verifier code cannot run Python in a process of its own here; it needs Linux")
    if held := [what for what, probe in PROBES.items() if passes(probe, [{"tests": "0"}])]:
        tell(f"! code: this system does not keep programs from {' or '.join(held)}; run it in a container")
