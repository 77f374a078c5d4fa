"""What the answer of a judge means: which of two responses it calls better, if it says so."""

from __future__ import annotations

import re

from rlhf_jax.data.numbers import float_of

Answer = float | str
"""The chance that response A is better, or why there is none: NONSENSE or NO_ANSWER."""

NONSENSE, NO_ANSWER = "nonsense", "no answer"

CHANCE = {"A": 1.0, "B": 0.0, "C": 0.5, "TIE": 0.5}
_NAME = r"(?:(?i:response|answer|option|choice|candidate|completion|assistant)\s+)?[\"'(\[]?([AB])[\"')\]]?"
_BETTER = r"(?:better|best|superior|preferable|preferred|stronger|the winner|more \w+)"
_ENDS = r"(?=\s*(?:[.,;:!)}\n]|$)|\s+(?:over|to|because|since|as|for|due)\b)"
BRACKETED = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
WHOLE = re.compile(
    r"(?:(?:so|therefore|thus|overall|final)[\s,]+)*(?:(?:my|the|your|i'd say|i say|it is|it's|this is|call it)\s+)*"
    r"(?:(?:final|better|best|preferred)\s+)*"
    r"(?:(?:response|answer|option|choice|candidate|completion|assistant|verdict|winner|preference|one|judgment)\s*)?"
    r"(?:is\b|[:=\uff1a])?\s*(?:(?:response|answer|option|assistant)\s+)?"
    r"[\"'(\[]*(?:a\s+(?=tie))?(A|B|tie)[\"')\]]*[\s.!)]*$",
    re.IGNORECASE,
)
OPENING = re.compile(rf"{_NAME}(?:[.,;)]\s|\s+[-\u2013\u2014]\s|\s*\n|\s+(?:because|since|as it)\b)")
STATED = (
    re.compile(rf"\b{_NAME} (?:is|was|seems|looks|appears)(?: to be)?(?: \w+){{0,2}}? {_BETTER}\b"),
    re.compile(rf"\b{_NAME} (?:wins|won)\b"),
    re.compile(rf"\b(?i:prefer|choose|chose|pick|select|favou?r|go with|vote for|better is|best is) {_NAME}{_ENDS}"),
    re.compile(rf"\b(?i:think|say) {_NAME}(?=\s*(?:[.;!]|$)|,?\s+(?:because|since)\b)"),  # and not more of it
    re.compile(rf"(?:\b(?i:is|winner|verdict|answer|choice|preference)\b:?|(?<![AB])[:=]) ?{_NAME}{_ENDS}"),
    re.compile(r"\b(?:a|an even|is|:) (tie)\b(?!-)"),
)
_NOT = "not? never neither nor hardly less least worse worst weaker inferior los\\w+ wrong bad if whether unless"
NEGATED = re.compile(rf"\b(?:{'|'.join(_NOT.split())})\b|n't\b", re.IGNORECASE)


def parse(answer: object) -> Answer:
    """What an answer says: a number from 0 to 1 as it is; of a text, the first of these that it has.

    1. [[A]], [[B]] or [[C]] (a tie; Zheng et al. 2023, arXiv 2306.05685), or [[tie]], anywhere.
    2. A first or last line that is a choice and nothing else: "A", "(B)", "**A**", "Response B.", "Answer: A", "The
       better response is B", "a tie".
    3. A choice that opens the text and a reason that names no other: "A. It is shorter", "B because it is right".
    4. A sentence that prefers one: "A is better than B", "I prefer B", "A good answer is B", "It is a tie", without a
       not, worse or if before it.

    A text with none of these is NONSENSE, and so is one with two that differ: a letter that merely occurs is no vote,
    least of all the article "A".
    """
    if not isinstance(answer, str):
        chance = float_of(answer)
        return chance if chance is not None and 0 <= chance <= 1 else NONSENSE
    text = re.sub(r"[*_`#]", "", answer).strip()
    for choices in (BRACKETED.findall(text), _of_lines(text), _of_opening(text), _of_sentences(text)):
        chances = {CHANCE[choice.upper()] for choice in choices}
        if chances:
            return chances.pop() if len(chances) == 1 else NONSENSE
    return NONSENSE


def _of_lines(text: str) -> list[str]:
    """The first and the last line, where they are a choice and nothing else."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [match[1] for line in lines[:1] + lines[-1:] if (match := WHOLE.match(line))]


def _of_opening(text: str) -> list[str]:
    """The choice that opens a text, if the rest names no other."""
    match = OPENING.match(text)
    if match is None or re.search(rf"\b{'AB'.replace(match[1], '')}\b", text[match.end() :]):
        return []
    return [match[1]]


def _of_sentences(text: str) -> list[str]:
    """The choices of sentences that prefer one; a question prefers none."""
    sentences = [each for each in re.split(r"(?<=[.!?;])\s+|\n+", text) if not each.endswith("?")]
    return [
        match[1]
        for sentence in sentences
        for pattern in STATED
        for match in pattern.finditer(sentence)
        if not NEGATED.search(sentence[max(match.start() - 300, 0) : match.end()])
    ]
