"""AI ranking: which of two responses is better, asked of a model, a Python function or a server.

Judges like places and lengths. So every pair is asked in both orders, and the report says what this one likes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax.data import rankings
from rlhf_jax.data.agreement import length_bias
from rlhf_jax.data.consensus import consensus_ranks
from rlhf_jax.data.numbers import float_of

Question = tuple[str, str, str]
"""(prompt, response A, response B)"""

Answer = float | str
"""The chance that response A is better, or why there is none: NONSENSE or NO_ANSWER."""

Ask = Callable[[Sequence[Question], jax.Array], list[Answer]]
"""(questions, key) -> an answer to each."""

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


def parse(answer: Any) -> Answer:
    """What an answer says: a number from 0 to 1 as it is; of a text, what it states, the first of these that it has.

    1. [[A]], [[B]] or [[C]] (a tie; Zheng et al. 2023, arXiv 2306.05685), or [[tie]], anywhere.
    2. A first or last line that is a choice and nothing else: "A", "(B)", "**A**", "Response B.", "Answer: A", "The
       better response is B", "a tie".
    3. A choice that opens the text and a reason that names no other: "A. It is shorter", "B because it is right".
    4. A sentence that prefers one: "A is better than B", "I prefer B", "A good answer is B", "It is a tie", without a
       not, worse or if before it.

    Nothing of these is NONSENSE, and so are two that differ: a letter that merely occurs is no vote, least of all the
    article "A".
    """
    if not isinstance(answer, str):
        chance = float_of(answer)
        return chance if chance is not None and 0 <= chance <= 1 else NONSENSE
    text = re.sub(r"[*_`#]", "", answer).strip()
    for said in (BRACKETED.findall(text), _lines(text), _opening(text), _stated(text)):
        if found := {CHANCE[name.upper()] for name in said}:
            return found.pop() if len(found) == 1 else NONSENSE
    return NONSENSE


def _lines(text: str) -> list[str]:
    """What the first and the last line are, where they are a choice."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [found[1] for line in (lines[:1] + lines[-1:]) if (found := WHOLE.match(line.strip()))]


def _opening(text: str) -> list[str]:
    """The choice that a text opens with, if the rest does not name another."""
    found = OPENING.match(text)
    if found is None or re.search(rf"\b{'AB'.replace(found[1], '')}\b", text[found.end() :]):
        return []
    return [found[1]]


def _stated(text: str) -> list[str]:
    """The choices of sentences that prefer one; a question prefers none."""
    said = []
    for sentence in re.split(r"(?<=[.!?;])\s+|\n+", text):
        if sentence.endswith("?"):
            continue
        for pattern in STATED:
            found = pattern.finditer(sentence)
            said += [m[1] for m in found if not NEGATED.search(sentence[max(m.start() - 300, 0) : m.end()])]
    return said


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


class Judge:
    """Asks about pairs, in both orders and several times, and makes verdicts of the answers."""

    def __init__(
        self,
        ask: Ask,
        *,
        votes: int = 1,
        both_orders: bool = True,
        inconsistent: Literal["tie", "mean", "drop"] = "tie",
    ):
        """`ask` answers questions; the rest as in `config.JudgeConfig`."""
        self.ask, self.votes, self.both_orders, self.inconsistent = ask, votes, both_orders, inconsistent

    def __call__(self, prompt: str, a: str, b: str, key: jax.Array | None = None) -> float | None:
        """How much `a` is preferred to `b`, in [0, 1]; None without a verdict."""
        return self.verdicts([(prompt, [a, b])], jax.random.key(0) if key is None else key)[0][0].share

    def verdicts(self, groups: Sequence[tuple[str, Sequence[str]]], key: jax.Array) -> list[list[Verdict]]:
        """Verdicts on every pair of the K responses of each (prompt, responses); equal texts are a tie, unasked."""
        pairs = [(g, i, j) for g, (_, texts) in enumerate(groups) for i, j in combinations(range(len(texts)), 2)]
        asked = [(g, i, j) for g, i, j in pairs if groups[g][1][i] != groups[g][1][j]]
        questions: list[Question] = []
        for g, i, j in asked:
            prompt, texts = groups[g]
            questions += [(prompt, texts[i], texts[j])] * self.votes
            questions += [(prompt, texts[j], texts[i])] * (self.votes * self.both_orders)
        answers = self.ask(questions, key) if questions else []
        each = self.votes * (1 + self.both_orders)
        of_pair = {pair: answers[n * each : (n + 1) * each] for n, pair in enumerate(asked)}
        found: list[list[Verdict]] = [[] for _ in groups]
        for g, i, j in pairs:
            said = of_pair.get((g, i, j), [])
            longer = len(groups[g][1][i]) - len(groups[g][1][j])
            found[g].append(self.verdict(i, j, said[: self.votes], said[self.votes :], longer))
        return found

    def verdict(self, i: int, j: int, forward: list[Answer], backward: list[Answer], longer: int) -> Verdict:
        """The mean of both orders if they agree; None if one has no answer, since then its place would decide."""
        verdict = Verdict(i, j, forward, backward, None, longer)
        shares = verdict.shares()
        if not forward:  # equal texts
            share: float | None = 0.5
        elif len(shares) < 1 + self.both_orders:
            share = None
        elif verdict.contradicts_itself() and self.inconsistent != "mean":
            share = 0.5 if self.inconsistent == "tie" else None
        else:
            share = float(np.mean(shares))
        return Verdict(i, j, forward, backward, share, longer)


def as_row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON holds it; Verdict(**row) is the way back."""
    return asdict(verdict)


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
    side = rankings.components(games)
    return [ranks(size, [v for v in decided if side[v.first] == n]) for n in sorted({side[v.first] for v in decided})]


def report(verdicts: Sequence[Verdict]) -> dict[str, float | int | None]:
    """What a judge did and what it likes: counts, and shares that are None where nothing tells.

    slot_a: share of the answers for the response in place A; 1/2 is no liking for a place.
    raw_first, first: win rate of the response that comes first in the rows, by the first order alone and by the
    verdicts. consistency: share of the pairs whose two orders do not contradict each other. longer_wins and
    length_correlation: as `rankings.length_bias`, of the verdicts.
    """
    asked = [v for v in verdicts if v.forward]
    said = [a for v in asked for a in (*v.forward, *v.backward)]
    numbers = [a for a in said if not isinstance(a, str)]
    forward = [a for v in asked for a in v.forward if not isinstance(a, str)]
    decided = [(v.share, v.longer) for v in asked if v.share is not None]
    twice = [v for v in asked if len(v.shares()) == 2]
    correlation, longer = length_bias(
        np.array([longer for _, longer in decided], float), np.array([share - 0.5 for share, _ in decided])
    )
    return {
        "pairs": len(verdicts),
        "equal": len(verdicts) - len(asked),
        "answers": len(said),
        "nonsense": said.count(NONSENSE),
        "no_answer": said.count(NO_ANSWER),
        "no_verdict": len(asked) - len(decided),
        "ties": sum(share == 0.5 for share, _ in decided),
        "contradictions": sum(v.contradicts_itself() for v in twice),
        "consistency": _mean([not v.contradicts_itself() for v in twice]),
        "slot_a": _mean(numbers),
        "raw_first": _mean(forward),
        "first": _mean([share for share, _ in decided]),
        "longer_wins": longer,
        "length_correlation": correlation,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The report in words; `!` marks what should make one doubt the judge."""
    shown = {name: "unknown" if value is None else f"{value:.3f}" for name, value in found.items()}

    def mark(name: str, fair: float, off: float) -> str:
        return "!" if found[name] is not None and abs(found[name] - fair) > off else " "

    lost = found["nonsense"] + found["no_answer"]
    return [
        f"  judge: {found['pairs']} pairs ({found['equal']} of equal texts), {found['answers']} answers, "
        f"{found['ties']} ties",
        f"{'!' if lost > 0.1 * found['answers'] else ' '} not usable: {found['nonsense']} nonsense, "
        f"{found['no_answer']} timed out or failed; {found['no_verdict']} pairs without a verdict",
        f"{mark('slot_a', 0.5, 0.1)} place: A wins {shown['slot_a']} of the answers",
        f"{mark('consistency', 1, 0.3)} consistency: {shown['consistency']} of the pairs, "
        f"{found['contradictions']} contradictions",
        f"{mark('length_correlation', 0, 0.2)} length: the longer response wins {shown['longer_wins']}, correlation "
        f"with the verdict {shown['length_correlation']}",
    ]


def _mean(values: Sequence[float | bool]) -> float | None:
    return float(np.mean(values)) if len(values) else None
