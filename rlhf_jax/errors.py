"""The exceptions a user is meant to read, and how texts of others are shown: bounded, without control characters."""

import re
import sys

LONGEST_LINE, LONGEST_VALUE = 1000, 200
"""Characters of an error line, and of a value in one, that are shown."""

UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line and paragraph separators, marks that turn the direction of writing, lone surrogates."""


_NAMES: dict[str, str] = {}


def call_it(place: str, name: str) -> None:
    """Have every text call a place of this machine, and what is below it, by the name of what it is a copy of."""
    _NAMES[place] = name


def named(text: object) -> str:
    """A text in which places of this machine have the names that `call_it` gave them."""
    said = str(text)
    for place, name in _NAMES.items():
        said = said.replace(place, name)
    return said


def printable(text: object, *, lines: bool = False) -> str:
    """A text for a terminal: what would move the cursor, change colours or not encode is written as an escape.

    With `lines`, line breaks and tabs stay.
    """
    keep = "\n\t" if lines else ""
    return UNSEEN.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), str(text))


def tell(text: object = "", *, error: bool = False, end: str = "\n") -> None:
    """Print a text, line breaks and tabs as they are, all else as `printable` has it; `error`: on standard error."""
    print(printable(named(text), lines=True), file=sys.stderr if error else sys.stdout, flush=True, end=end)


def shortened(text: str, longest: int = LONGEST_VALUE) -> str:
    """A text, its middle left out if it is longer than so many characters."""
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]} ... {len(text) - longest} characters ... {text[head - longest :]}"


def shown(value: object) -> str:
    """repr(value), shortened; of what has no repr that works, its type."""
    try:
        return shortened(repr(value))
    except Exception:
        return f"a {type(value).__name__}"


def reason(error: BaseException) -> str:
    """Why, in one short line: what an OSError says of its code, else the first line of the error, else its type.

    A first line that ends in a colon has the second one behind it; a full stop at the end is left out.
    """
    try:
        said = getattr(error, "strerror", None) or str(error)
    except Exception:
        said = ""
    first, *rest = [line.strip() for line in str(said).splitlines() if line.strip()] or [type(error).__name__]
    return shortened((f"{first} {rest[0]}" if rest and first.endswith(":") else first).removesuffix("."))


class UserError(ValueError):
    """What is wrong, the value, and the cure, in one line; the command line prints it and exits with 2.

    Whatever texts of others the line holds, it is made `printable` and `shortened` here.
    """

    def __init__(self, line: object):
        super().__init__(shortened(printable(named(line)), LONGEST_LINE))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows below a cell; `traceback.print_last()` has the rest."""
        return [f"rlhf_jax: error: {self}"]


class Stopped(Exception):
    """A signal asked the run to stop; it has finished its step and saved. The line says how to continue it.

    Attributes:
        code: the exit code that the command line ends with.
    """

    def __init__(self, line: object, code: int = 0):
        super().__init__(named(line))
        self.code = code

    def _render_traceback_(self) -> list[str]:
        """What IPython shows below the cell that was interrupted."""
        return [f"rlhf_jax: {self}"]
