"""Verifiers of texts. What may hang on a hostile response runs in child processes that a kernel timer ends."""

from __future__ import annotations

import atexit
import json
import os
import queue
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from unicodedata import normalize

from rlhf_jax.errors import UserError, shown, tell

SECONDS, MEMORY = 5, 2 << 30
"""What a child may take for one response: seconds of computing, and bytes."""

WORKERS = min(os.cpu_count() or 1, 8)
"""Children of a verifier that judge at once."""

NUMBER = re.compile(
    r"((?<![\w)\]])-)?(?:\\?[$€£] ?)?"  # a sign that is no operator
    r"(?<![0-9])(?<![0-9]\.)"  # at the beginning of a number
    r"(?:([0-9]{1,3}) +(?=[0-9]+ ?/ ?[0-9]))?"  # the 1 of 1 1/2
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"([eE][+-]?[0-9]{1,2}(?![0-9]))?(?: ?/ ?([0-9]+))?"
)
TYPED = {ord(minus): "-" for minus in "\u2010\u2011\u2212\ufe63\uff0d"} | {0x2044: "/", 0x2215: "/"}
TYPED |= {
    ord(part): normalize("NFKC", part).replace("\u2044", "/")
    for part in map(chr, (*range(188, 191), *range(8528, 8543)))
}
TYPED |= {
    ord(sign): rf"\{name} " for sign, name in zip(
        "\u03c0\u221e\u2264\u2265\u2260\u00b7\u22c5\u00d7\u00f7\u00b1\u222a\u2229",
        ["pi", "infty", "le", "ge", "ne", "cdot", "cdot", "times", "div", "pm", "cup", "cap"], strict=True,
    )
}  # fmt: skip
TYPED[ord("\u00b0")] = r"^\circ "
"""Signs and fractions of one character -> how a keyboard writes them, or LaTeX."""
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALED = re.compile(
    r"(?<![\w.,/^])((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,15})(?:\.[0-9]{1,9})?)"
    rf"(?:\\[,;: ]|[ ~-])*(\\text\w*\{{ *)?({'|'.join(SCALES)})s?(?![A-Za-z])"
)
"""5 million, 1.5\\text{ billion dollars}."""
SPACED = (
    (re.compile("(?<=[0-9])(?:[\u00a0\u2009\u202f]|\\\\[;: ])(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])"), " "),
    (
        re.compile("[\u207a\u207b]?[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+"),
        lambda one: f"^{{{normalize('NFKC', one[0])}}}",
    ),
    (re.compile("[\u2080-\u2089]+"), lambda one: f"_{{{normalize('NFKC', one[0])}}}"),
    (re.compile(r"\u221a *([0-9]+(?:\.[0-9]+)?|[A-Za-z]|\([^()]*\))"), r"\\sqrt{\1}"),
    (SCALED, lambda one: f"{Decimal(one[1].replace(',', '')) * SCALES[one[3]]:f}{one[2] or ''}"),
)
"""Spaces that part thousands, the place between 1 and a half, powers, indices, roots and millions -> as LaTeX is."""
LATEX = (
    (re.compile(r"(\\[cdt]?frac(?:\{[^{}]*\})?) ?([0-9])"), r"\1{\2}"),
    (re.compile(r"(\\[cdt]?frac\{[^{}]*\}) ?([0-9])"), r"\1{\2}"),
    (re.compile(r"(?<=[0-9])(?=\\[cdt]?frac)"), " "),
    (re.compile(r"\\[cdt]?frac *\{ *(-?[0-9,.]+) *\} *\{ *([0-9]+) *\}"), r"\1/\2"),
    (re.compile(r"\{,\}|\\[,!]"), ""),
    (re.compile(r"\\text\w* *\{([^{}]*)\}|\\[ ;:]"), r" \1"),
    (re.compile("\u2013"), "-"),
    (re.compile(r"([=:({\[$] *)(?:- *|(?i:minus|negative) +)"), r"\1-"),
)
"""How LaTeX writes fractions and thousands, typesetters a minus and people a sign -> how `NUMBER` reads them."""
_OPERATOR = r"(?:[-+*^_/]|\\times|\\cdot|\\div)"
WITHIN = re.compile(
    rf"\\(?:[cdt]?frac|sqrt|binom|pm|mp)|\u221a|sqrt\(|(?<![A-Za-z])[A-Za-z] *(?:{_OPERATOR} *[({{]*|\()$|\^[({{]*$"
)
"""Before a number: it is a part of a formula."""
GOES_ON = re.compile(
    r"[,._':]?[0-9]| +[0-9]|!|\\(?:sqrt|pi)|[kKM](?![\w&'])"
    rf"| *(?:{_OPERATOR}|[:xX]) *\\?[$({{]* *-?[0-9]"
    r"| *(?:[-+*^]|\\times|\\cdot) *[({]*\\?[A-Za-z](?![A-Za-z])"
    rf"| +(?:squared|cubed|{'|'.join(SCALES)})\b"
    r"|(?: +[A-Za-z]+)? +(?:and|or|to|of|plus|minus|times)(?: an?)? +(?:\$?[0-9]|half|quarter)"
    r"| +[A-Za-z]+ +[0-9]"
)
"""Behind a number: it is a part of a formula or one of several, or written in another way, and not the answer."""

BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|(?<!\\)[{}]")

TAIL = 2000
"""Characters at the end of a response in which an answer without a mark is looked for."""


def gsm8k(prompts: list[str], responses: list[str], *, answer: list[object], **columns: object) -> list[float]:
    """1.0 where the final number of a response equals that of the row's `answer` exactly, as GSM8K has them.

    It stands behind the last "####", else in the last \\boxed{}, else it is the last number of the response. 1,234 is
    1234, $18.00 is 18, 3/4 is 0.75, - $3 is -3, 5 million is 5000000; what follows a number (units, percent signs, a
    dozen) is not read. A marked formula is none: of 10 - 3 = 7 it is 7, of 10 - 3, 5!, 2 or 3, or \\sqrt{9} none.
    `answer` is a number or a text with one, such as a whole solution.

    Raises:
        UserError: an answer without a number.
    """
    wanted = [number_of(str(one)) for one in answer]
    for one, number in zip(answer, wanted, strict=True):
        if number is None:
            raise UserError(f"gsm8k: the answer {shown(one)} holds no number; give every row one")
    return [float(number_of(response) == gold) for response, gold in zip(responses, wanted, strict=True)]


def math(prompts: list[str], responses: list[str], *, answer: list[object], **columns: object) -> list[float]:
    """1.0 where the final answer of a response is mathematically that of the row's `answer`, as math-verify sees it.

    It stands behind the last "####", else in the last \\boxed{}, else it is the last formula or number there is.
    `answer` is LaTeX or a number, or a whole solution that marks it so. Numbers are compared at 6 decimals, words as
    words. A unit counts where both name one. An answer that takes too long to compare, such as 9^{9^{9^9}}, is wrong,
    and such are counted.

    Raises:
        UserError: an answer that cannot be read.
    """
    wanted = [(marked(one) or one).strip() for one in (typed("" if one is None else str(one)) for one in answer)]
    return _judged("math", [marked(text) or text[-TAIL:] for text in map(typed, responses)], wanted)


def regex(prompts: list[str], responses: list[str], *, pattern: list[str], **columns: object) -> list[float]:
    r"""1.0 where the row's `pattern` (of Python's `re`) is found in the response; \A and \Z bind it to the whole.

    Raises:
        UserError: a pattern that does not compile.
    """
    return _judged("regex", responses, pattern)


def json_schema(prompts: list[str], responses: list[str], *, schema: list[object], **columns: object) -> list[float]:
    """1.0 where a response is JSON, alone or in one ``` fence, that the row's `schema` (an object, or JSON) allows.

    The schema's draft is what its "$schema" says, else the newest. References to other documents are not fetched.

    Raises:
        UserError: a schema that is none.
    """
    return _judged("json_schema", responses, schema)


def number_of(text: str) -> Fraction | None:
    """The final number of a text, see `gsm8k`; None if it has none or one of thousands of digits."""
    text = typed(text)
    final = marked(text)
    text = (text if final is None else final)[-TAIL:]
    text = text if "\n" in text else f"={text}"  # where a dash is a sign, not that of a list
    for pattern, simple in LATEX:
        text = pattern.sub(simple, text)
    start = max(text.rfind("="), 0)
    found = NUMBER.search(text, start)
    if final is None:
        *_, found = None, *NUMBER.finditer(text)
    if found is None:
        return None
    if final is not None and (WITHIN.search(text, start, found.start()) or GOES_ON.match(text, found.end())):
        return None
    sign, whole, digits, exponent, divisor = found.groups()
    try:
        size = Fraction(digits.replace(",", "") + (exponent or "")) / int(divisor or 1) + int(whole or 0)
    except (ValueError, ZeroDivisionError):
        return None
    return -size if sign else size


def typed(text: str) -> str:
    """A text whose minus signs, spaces between thousands and fractions are those of a keyboard."""
    for pattern, simple in SPACED:
        text = pattern.sub(simple, text)
    return text.translate(TYPED)


def marked(text: str) -> str | None:
    """What a text marks as its answer: the line behind the last "####", or the last \\boxed{} (or \\fbox{}).

    Braces are balanced; a box that never closes is none. A full stop at the end is no part of it.
    """
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].rstrip(" .")
    opened: list[re.Match[str]] = []
    start, end = -1, 0
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            opened.append(brace)
        elif opened and len((last := opened.pop())[0]) > 1 and last.end() > start:  # a box
            start, end = last.end(), brace.start()
    return None if start < 0 else text[start:end].strip().rstrip(" .")


class _Child:
    """A process of checks.py: one response after another, until it is ended for one that took too much."""

    def __init__(self, check: str):
        script = str(Path(__file__).with_name("checks.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-P", script, check, str(SECONDS), str(MEMORY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.questions, self.answers = self.process.stdin, self.process.stdout
        if self.answers.readline() != "ready\n":
            self.end()
            raise RuntimeError(f"the process that checks {check} did not start")

    def ask(self, response: str, wanted: object) -> tuple[float | None, str]:
        """(verdict, ""), (None, "") if it died of the question, or (None, what is wrong with `wanted`)."""
        try:
            self.questions.write(json.dumps([response, wanted]) + "\n")
            self.questions.flush()
            said = self.answers.readline()
        except BrokenPipeError:
            said = ""
        if not said:
            self.end()
            return None, ""
        verdict = json.loads(said)
        return (None, verdict) if isinstance(verdict, str) else (float(verdict), "")

    def end(self) -> None:
        """Kill it, if it lives, and close its pipes."""
        self.process.kill()
        self.process.communicate()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


_idle: dict[str, queue.SimpleQueue[_Child]] = defaultdict(queue.SimpleQueue)
"""Check -> children that wait. Should this process be killed, their input closes, and they end."""


@atexit.register
def _end_all() -> None:
    for waiting in _idle.values():
        while not waiting.empty():
            waiting.get().end()


def _judged(check: str, responses: Sequence[str], wanted: Sequence[object]) -> list[float]:
    """The verdicts of one check; a response that no child survives is wrong, and counted."""

    def judge(pair: tuple[str, object]) -> tuple[float | None, str]:
        try:
            child = _idle[check].get_nowait()
        except queue.Empty:
            child = _Child(check)
        verdict = child.ask(*pair)
        if child.alive:
            _idle[check].put(child)
        return verdict

    with ThreadPoolExecutor(WORKERS) as pool:
        verdicts = list(pool.map(judge, zip(responses, wanted, strict=True)))
    for _, wrong in verdicts:
        if wrong:
            raise UserError(f"{check}: {wrong}")
    if lost := sum(verdict is None for verdict, _ in verdicts):
        limits = f"{SECONDS} s of computing or {MEMORY >> 30} GiB"
        tell(f"{check}: {lost} of {len(responses)} responses took more than {limits} to check and count as wrong")
    return [verdict or 0.0 for verdict, _ in verdicts]
