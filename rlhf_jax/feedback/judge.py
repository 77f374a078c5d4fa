"""AI ranking: which of two responses is better, asked of a model, a Python function or a server.

Judges like places and lengths. So every pair is asked in both orders, and the report says what this one likes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Literal

import jax
import numpy as np

from rlhf_jax.data import rankings
from rlhf_jax.data.consensus import consensus_ranks
from rlhf_jax.data.numbers import float_of
from rlhf_jax.data.rows import Row

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
CUT = re.compile(r"(?:\b[Ii]s|'s|\bsay|\bcall it) a$")
"""How a line ends that was cut behind the article of what it says."""
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
NEGATED = re.compile(rf"\b(?:cannot|{'|'.join(_NOT.split())})\b|n't\b", re.IGNORECASE)

Question = tuple[str, ...]
"""(prompt, response A, response B), or of a judge of single ones (prompt, response)"""

Ask = Callable[[Sequence[Question], jax.Array], Iterable[Answer]]
"""(questions, key) -> an answer to each, in order, maybe one after another as they come."""


@dataclass(frozen=True)
class Verdict:
    """What a judge thinks of two responses to one prompt.

    Attributes:
        first, second: their places among the responses.
        forward: answers to the question with `first` as A.
        backward: answers with `second` as A; empty if one order was asked.
        share: how much it prefers `first`, in [0, 1]; None if it gave no verdict.
        longer: characters by which `first` is longer.
    """

    first: int
    second: int
    forward: list[Answer]
    backward: list[Answer]
    share: float | None
    longer: int

    def shares(self) -> list[float]:
        """How much each order prefers `first`; an order without an answer is left out."""
        straight = [a for a in self.forward if not isinstance(a, str)]
        turned = [1 - a for a in self.backward if not isinstance(a, str)]
        return [float(np.mean(said)) for said in (straight, turned) if said]

    def contradicts_itself(self) -> bool:
        """Whether each order prefers another response."""
        both = self.shares()
        return len(both) == 2 and (both[0] - 0.5) * (both[1] - 0.5) < 0


def verdicts_of(row: Row) -> list[Verdict]:
    """The verdicts of a row {verdicts}; none of one without."""
    return [Verdict(**verdict) for verdict in row.get("verdicts", [])]


@dataclass(frozen=True)
class Judge:
    """Makes verdicts on pairs of what `ask` answers; the rest as in `config.JudgeConfig`."""

    ask: Ask
    votes: int = 1
    both_orders: bool = True
    inconsistent: Literal["tie", "mean", "drop"] = "tie"

    def __call__(self, prompt: str, a: str, b: str, key: jax.Array | None = None) -> float | None:
        """How much `a` is preferred to `b`, in [0, 1]; None without a verdict."""
        return self.verdicts([(prompt, [a, b])], jax.random.key(0) if key is None else key)[0][0].share

    def verdicts(self, groups: Sequence[tuple[str, Sequence[str]]], key: jax.Array) -> list[list[Verdict]]:
        """Verdicts on every pair of the K responses of each (prompt, responses); equal texts are a tie, unasked."""
        return list(self.in_turn(groups, key))

    def in_turn(self, groups: Sequence[tuple[str, Sequence[str]]], key: jax.Array) -> Iterator[list[Verdict]]:
        """`verdicts` one group after another, each when its answers have come."""
        questions: list[Question] = []
        for prompt, texts in groups:
            for a, b in combinations(texts, 2):
                if a != b:
                    questions += [(prompt, a, b)] * self.votes
                    questions += [(prompt, b, a)] * (self.votes * self.both_orders)
        answers = iter(self.ask(questions, key) if questions else [])
        for _, texts in groups:
            of_group: list[Verdict] = []
            for (i, a), (j, b) in combinations(enumerate(texts), 2):
                said = list(islice(answers, self.votes * (1 + self.both_orders))) if a != b else []
                verdict = Verdict(i, j, said[: self.votes], said[self.votes :], None, len(a) - len(b))
                of_group.append(replace(verdict, share=self._share(verdict)))
            yield of_group

    def _share(self, verdict: Verdict) -> float | None:
        """The mean of both orders if they agree; None if one has no answer, since then its place would decide."""
        shares = verdict.shares()
        if not verdict.forward:  # equal texts
            return 0.5
        if len(shares) < 1 + self.both_orders:
            return None
        if verdict.contradicts_itself() and self.inconsistent != "mean":
            return 0.5 if self.inconsistent == "tie" else None
        return float(np.mean(shares))


def ranks(size: int, verdicts: Sequence[Verdict]) -> list[int | None]:
    """Ranks of `size` responses from 0, the best, by their mean share of the comparisons (Borda); equal is a tie.

    None for a response without a verdict.
    """
    won, games = np.zeros(size), np.zeros(size)
    for v in verdicts:
        if v.share is not None:
            np.add.at(won, [v.first, v.second], [v.share, 1 - v.share])
            np.add.at(games, [v.first, v.second], 1)
    order = np.full(size, None, object)
    known = np.flatnonzero(games)
    order[known] = consensus_ranks(won[known] / games[known], tolerance=1e-9)
    return [None if rank is None else int(rank) for rank in order]


def ranks_by_part(size: int, verdicts: Sequence[Verdict]) -> list[list[int | None]]:
    """The `ranks` within each part of the responses that verdicts link; none says anything of another part's."""
    decided = [v for v in verdicts if v.share is not None]
    games = np.zeros((size, size))
    for v in decided:
        games[v.first, v.second] = 1
    part = rankings.components(games)
    return [ranks(size, [v for v in decided if part[v.first] == n]) for n in sorted({part[v.first] for v in decided})]


def judged(items: Sequence[Row], verdicts: Sequence[Verdict]) -> Row:
    """{responses, rater} with a judge's ranks, or {responses, raters} where its verdicts do not link all responses:
    a ranking of each part, so that nothing is said of two that are not linked."""
    parts = ranks_by_part(len(items), verdicts) or [[None] * len(items)]
    if len(parts) > 1:
        return {"responses": list(items), "raters": [{"rater": "judge", "ranks": ranks} for ranks in parts]}
    return {"responses": [{**item, "rank": r} for item, r in zip(items, parts[0], strict=True)], "rater": "judge"}


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
    text = re.sub(r"[*_`#]", "", answer).replace("\u2019", "'").strip()
    for choices in (BRACKETED.findall(text), _of_lines(text), _of_opening(text), _of_sentences(text)):
        chances = {CHANCE[choice.upper()] for choice in choices}
        if chances:
            return chances.pop() if len(chances) == 1 else NONSENSE
    return NONSENSE


def _of_lines(text: str) -> list[str]:
    """The first and the last line, where they are a choice and nothing else, not even the beginning of more."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [match[1] for line in lines[:1] + lines[-1:] if (match := WHOLE.match(line)) and not CUT.search(line)]


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
