"""The child process of `texts`: a script that imports nothing of ours and reads lines [response, wanted] of JSON.

To each it answers true, false, or a text that says what is wrong with `wanted`. A timer of the kernel ends the process
with a response that computes too long, be it in C code that no Python exception reaches.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

Check = Callable[[str, Any], bool]

NAMED = re.compile(r"\\(?:begin|end|text\w*|math\w+|mbox|operatorname)\s*\{[^{}]*\}")
"""What a formula names in words."""

WORD = re.compile(
    r"(?<![\\A-Za-z])(?!(?:and|arc\w+|cos|cot|exp|inf|log|sin|sqrt|tan)(?![A-Za-z]))"
    r"(?:[A-Za-z]{3,}|(?:is|it|of|to|we)\b)"
)
"""A word that is no function or command: a text that has one is prose."""

THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,!]|\{,\})(?=[0-9]{3}(?![0-9]))")
"""How LaTeX parts thousands."""

MIXED = re.compile(r"(?<![\w.,/^)}\]])([0-9]{1,9}) +([0-9]{1,9}) ?/ ?([0-9]{1,9})(?![\w./])")
"""1 1/2, which math-verify takes for a product or for 1."""

SPACED = re.compile(r"(?<![\w.,/^)}\]])[0-9]{1,3}(?: [0-9]{3})+(?!\w| ?/)")
"""5 000, which it takes for 0 where it is a formula."""


class Wrong(Exception):
    """What the row wants cannot be read; the text says why."""


def maths() -> Check:
    """Whether math-verify takes two answers for one."""
    from math_verify import parse, verify

    def read(text: str) -> list[Any]:
        # A formula is read whole; of prose, which would be a product of its letters, the last formula or number.
        text = THOUSANDS.sub("", text)
        text = MIXED.sub(lambda one: f"{int(one[1]) * int(one[3]) + int(one[2])}/{one[3]}", text)
        text = SPACED.sub(lambda one: one[0].replace(" ", ""), text)
        both = [f"\\boxed{{{text}}}", text]
        if WORD.search(NAMED.sub("", text)):
            both.reverse()
        return parse(both[0], parsing_timeout=None) or parse(both[1], parsing_timeout=None)

    def check(response: str, wanted: str) -> bool:
        gold = read(wanted)
        if not gold:
            raise Wrong(f"the answer {wanted[:100]!r} is neither a number nor LaTeX; mend or remove the row")
        return verify(gold, read(response), timeout_seconds=None)

    return check


def regex() -> Check:
    """Whether a pattern is found."""

    def check(response: str, wanted: str) -> bool:
        try:
            pattern = re.compile(wanted)
        except (re.error, TypeError) as error:
            raise Wrong(f"the pattern {str(wanted)[:100]!r} does not compile ({error}); mend the row") from error
        return pattern.search(response) is not None

    return check


def json_schema() -> Check:
    """Whether a response is JSON that a schema allows."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    def check(response: str, wanted: Any) -> bool:
        try:
            schema = json.loads(wanted) if isinstance(wanted, str) else wanted
            kind = validator_for(schema)
            kind.check_schema(schema)
        except (SchemaError, ValueError, TypeError, AttributeError) as error:
            why = getattr(error, "message", error)
            raise Wrong(f"the schema {str(wanted)[:100]!r} is none ({why}); mend the row") from error
        fenced = re.fullmatch(r"\s*```(?i:json)?\s*\n(.*)\n\s*```\s*", response, re.DOTALL)
        value = json.loads(fenced[1] if fenced else response, parse_constant=refuse, object_pairs_hook=once)
        return kind(schema, registry=Registry()).is_valid(value)

    return check


CHECKS = {"math": maths, "regex": regex, "json_schema": json_schema}


def main(name: str, seconds: float, memory: int) -> None:
    check = CHECKS[name]()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        verdict: bool | str = False
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = bool(check(*json.loads(line)))
        except Wrong as wrong:
            verdict = str(wrong)
        except Exception:  # the response cannot be read, or not in this memory
            pass
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(verdict) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
