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
from dataclasses import replace
from decimal import Decimal
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

EXPONENT = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]+)?|\.[0-9]+)[eE]([+-]?[0-9]{1,2})(?!\w|\.[0-9])")
"""1.5e-3, which it takes for a product."""

TYPED = (
    (THOUSANDS, ""),
    (EXPONENT, lambda one: f"{Decimal(one[0]):f}"),
    (MIXED, lambda one: f"{int(one[1]) * int(one[3]) + int(one[2])}/{one[3]}"),
    (SPACED, lambda one: one[0].replace(" ", "")),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<=[0-9]) [xX] (?=[0-9])"), r" \\times "),
)
"""What is written on a keyboard, or to be read by people -> what math-verify reads as it is meant."""

FRAME = re.compile(r"\\(?:text\w*|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}")
"""Words within a formula."""

FLAT = (
    (FRAME, r" \1"),
    (re.compile(r"\\[,;:! ]|~"), " "),
    (re.compile(r"\^\{(-?[1-9])\}"), r"^\1"),
    (re.compile(r"\\cdot"), "*"),
    (re.compile(r"\^(?:\\circ|\{\\circ\}) *(?=[CF])"), " \u00b0"),
)
"""How LaTeX writes units -> how `UNITS` reads them."""

SIGNS = """m meter metre, cm centimeter centimetre, mm millimeter millimetre, km kilometer kilometre, in inch inche,
    ft foot feet, yd yard, mi mile, g gram, kg kilogram, mg milligram, lb pound lbs, oz ounce, L l liter litre,
    mL ml milliliter millilitre, s sec second, ms millisecond, min minute, h hr hour, day, week, month, year yr,
    N newton, J joule, kJ, W watt, kW, V volt, A ampere amp, K kelvin, Hz hertz, Pa pascal, kPa, mol mole,
    \u00b0C, \u00b0F, mi/h mph, km/h kmh kph, unit, cent, dollar, rad radian"""
NAMES = {name: names.split()[0] for names in SIGNS.split(",") for name in names.split()}
"""Name of a unit, or its sign -> its sign."""
POWERS = {"s": "2", "c": "3"}  # square and cubic

UNIT = (
    r"(?:(?P<power{0}>square|sq\.?|cubic|cu\.?) +)?(?P<name{0}>"
    + "|".join(sorted(map(re.escape, NAMES), key=len, reverse=True))
    + r")(?:(?<=[a-z]{{3}})s)?(?![A-Za-z])(?:\^?(?P<to{0}>[23]|-[123]))?"
)
UNITS = UNIT.format(1) + rf"(?: *(?P<by>/|per|\*) *{UNIT.format(2)})?"
MEASURED = re.compile(rf"(?:(?<=[0-9)}}])|(?<=\\pi))(?P<space> *){UNITS}\s*\.?\s*$")
"""A unit behind a value, at the end: 20 cm^2, 5 km/h, 4\\pi square inches."""
TWO_PARTS = re.compile(rf"[0-9] *{UNIT.format(3)},? *(?:and )?[0-9.]+$")
"""The 3 hours 20 of 3 hours 20 minutes."""


class Wrong(Exception):
    """What the row wants cannot be read; the text says why."""


def maths() -> Check:
    """Whether math-verify takes two answers for one."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    forms = replace(NormalizationConfig(), units=False, malformed_operators=True, nits=True)  # 5t is no 5
    targets = (LatexExtractionConfig(normalization_config=forms), ExprExtractionConfig())

    def read(text: str) -> list[Any]:
        # A formula is read whole; of prose, which would be a product of its letters, the last formula or number.
        both = [f"\\boxed{{{text}}}", text]
        if WORD.search(NAMED.sub("", text)):
            both.reverse()
        return parse(both[0], targets, parsing_timeout=None) or parse(both[1], targets, parsing_timeout=None)

    def check(response: str, wanted: str) -> bool:
        gold, unit = measured(keyed(wanted), "")
        value, its_unit = measured(keyed(response), gold)
        said = read(gold)
        if not said:
            raise Wrong(f"the answer {wanted[:100]!r} is neither a number nor LaTeX; mend or remove the row")
        words = [words_of(gold), words_of(value)]
        if any(WORD.search(" ".join(each)) for each in words):
            return words[0] == words[1]
        return (not (unit and its_unit) or unit == its_unit) and verify(said, read(value), timeout_seconds=None)

    return check


def keyed(text: str) -> str:
    """A text as math-verify reads it."""
    for pattern, simple in TYPED:
        text = pattern.sub(simple, text)
    return text


def measured(text: str, gold: str) -> tuple[str, str]:
    """(the value of an answer, its unit by its sign); of one in two units, as 3 hours 20 minutes, there is no value.

    A unit of one letter may be a variable: of the row's answer it has a blank before it, and where `gold`, what a
    response is compared with, has variables, the response has no such unit.
    """
    flat = text
    for pattern, simple in FLAT:
        flat = pattern.sub(simple, flat)
    found = MEASURED.search(flat)
    letters = re.search(r"(?<![\\A-Za-z])[A-Za-z]", gold)
    if found and len(found[0].strip(" .")) == 1 and (letters or not (gold or found["space"])):
        found = None
    if found is None:
        value = re.sub(rf"(?<=.)(?:\\[,;: ]|~)*{FRAME.pattern}(?:\^\{{?[0-9]\}}?)?\s*$", "", text)
        return value if value.strip() else text, ""
    value = flat[: found.start()]
    both = sign(found, 1) + (found["by"] or "").replace("per", "/") + sign(found, 2)
    return "" if TWO_PARTS.search(value) else value, both


def sign(found: re.Match[str], place: int) -> str:
    """The sign of the first or second unit that was found, with its power; "" of none."""
    name, power = found[f"name{place}"], found[f"power{place}"] or ""
    return NAMES[name] + (found[f"to{place}"] or POWERS.get(power[:1], "")) if name else ""


def words_of(text: str) -> list[str]:
    """An answer in words, as "not even" or "red and blue", whose letters are no factors; [] of a formula."""
    flat = FRAME.sub(r" \1 ", text).strip(" .$")
    if not re.fullmatch(r"[A-Za-z][A-Za-z' ,-]*", flat):
        return []
    words = re.split(r"[ ,]+(?:(?:and|or)[ ,]+)?", flat)
    return [word.lower() if word[1:].islower() else word for word in words]


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
