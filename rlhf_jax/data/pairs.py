"""Labelled responses to rows: rankings to pairs or demonstrations, and which pairs to leave out."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rlhf_jax.data import agreement
from rlhf_jax.data.rows import Row, carried


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, of which `chosen` is preferred; both are places in the ranking row."""

    group: int  # number of the prompt
    chosen: int
    rejected: int
    share: float = 1.0  # how much `chosen` is preferred, above 1/2 and at most 1


Shares = dict[tuple[int, int], float]
"""(i, j) -> how much response i is preferred to j."""


def shares_of(row: Row) -> Shares:
    """The order of all pairs of a ranking row {prompt, responses: [{text, rank or score}]} that are labelled."""
    places = [_place(item) for item in row["responses"]]
    known = [(i, place) for i, place in enumerate(places) if place is not None]
    return {(i, j): (1.0 if a < b else 0.0 if a > b else 0.5) for (i, a), (j, b) in combinations(known, 2)}


def pairs_of(rows: Sequence[Row], shares: Sequence[Shares]) -> list[Pair]:
    """All pairs of ranking rows that are not tied and whose texts differ, neither of them empty."""
    return [pair for pair, why_not in _labelled(rows, shares) if not why_not]


def left_out(rows: Sequence[Row], shares: Sequence[Shares]) -> dict[str, int]:
    """Labelled pairs that `pairs_of` leaves out, by the reason: tied, of equal texts, with an empty response."""
    return dict(Counter(why_not for _, why_not in _labelled(rows, shares) if why_not))


def _labelled(rows: Sequence[Row], shares: Sequence[Shares]) -> Iterator[tuple[Pair, str]]:
    """Every labelled pair, and why nothing is learned from it, if so."""
    for group, (row, of_row) in enumerate(zip(rows, shares, strict=True)):
        texts = [item["text"].strip() for item in row["responses"]]
        for (i, j), share in sorted(of_row.items()):
            pair = Pair(group, i, j, share) if share >= 0.5 else Pair(group, j, i, 1 - share)
            equal, empty = texts[i] == texts[j], not (texts[i] and texts[j])
            why_not = "of equal texts" if equal else "with an empty response" if empty else "tied"
            yield pair, why_not if equal or empty or share == 0.5 else ""


def _place(item: Row) -> float | None:
    """Lower is better; None without a label."""
    if item.get("rank") is not None:
        return float(item["rank"])
    return -float(item["score"]) if item.get("score") is not None else None


def preference_of(rows: Sequence[Row], pair: Pair) -> Row:
    row = rows[pair.group]
    both = [row["responses"][pair.chosen], row["responses"][pair.rejected]]
    preference: Row = carried(row)
    for name, item in zip(("chosen", "rejected"), both, strict=True):
        preference |= {name: item["text"], **({f"{name}_ids": item["ids"]} if item.get("ids") is not None else {})}
    preference["finished"] = [item["finished"] for item in both]
    if pair.share < 1:
        preference["votes"] = [pair.share, 1 - pair.share, 0]
    return {**preference, "sources": [item.get("source", "") for item in both]}


def demonstration_of(row: Row) -> Row | None:
    """An sft row of the best response that has a text (of equals the first), or None if none of these is labelled."""
    best = _best([item for item in row["responses"] if item["text"].strip()])
    return None if best is None else {**carried(row), **answer_fields(best)}


def best_is_empty(row: Row) -> bool:
    """Whether the best response of all has no text, so that another one is the demonstration."""
    best = _best(row["responses"])
    return best is not None and not best["text"].strip()


def _best(items: Sequence[Row]) -> Row | None:
    known = [item for item in items if _place(item) is not None]
    return min(known, key=lambda item: _place(item) or 0.0, default=None)


def answer_fields(item: Row) -> Row:
    """An item {text, ids?, finished} of a ranking as the answer of an sft row: {response, response_ids?, finished}."""
    ids = {} if item.get("ids") is None else {"response_ids": item["ids"]}
    return {"response": item["text"], **ids, "finished": item["finished"]}


def lengths(rows: Sequence[Row], pairs: Sequence[Pair]) -> np.ndarray:
    """int[N, 2], characters of the chosen and the rejected response of each pair."""
    sizes = [[len(rows[p.group]["responses"][k]["text"]) for k in (p.chosen, p.rejected)] for p in pairs]
    return np.array(sizes, np.int64).reshape(-1, 2)


def almost_filter(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs whose chosen response is longer than the rejected one, or than M - S/2.

    Kim et al. 2023 (ALMoST, arXiv 2305.13735), section 2.1: a short response is often a failure to generate. M and S
    are mean and standard deviation of the characters of all responses to the prompt, which is our reading of theirs.
    What it drops has a chosen response that is shorter, so the correlation of label and length rises.
    """
    kept = []
    for pair, (chosen, rejected) in zip(pairs, lengths(rows, pairs), strict=True):
        sizes = [len(item["text"]) for item in rows[pair.group]["responses"]]
        if chosen > rejected or chosen > np.mean(sizes) - np.std(sizes) / 2:
            kept.append(pair)
    return kept


def balance_filter(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[Pair]:
    """As many pairs with the longer response chosen as with the shorter one, matched by how much longer it is.

    Each pair of the rarer kind keeps the one of the other kind whose difference in length is nearest and that is not
    taken yet, largest differences first; pairs of equal lengths stay. So length alone tells almost nothing of the
    label.
    """
    longer = np.diff(-lengths(rows, pairs), axis=1)[:, 0]
    sides = [np.flatnonzero(longer > 0), np.flatnonzero(longer < 0)]
    few, many = sorted(sides, key=len)
    kept = {*np.flatnonzero(longer == 0).tolist(), *few.tolist()}
    free = sorted((abs(int(longer[i])), int(i)) for i in many)
    for place in sorted(few.tolist(), key=lambda i: (-abs(longer[i]), i)):
        size = abs(int(longer[place]))
        at = bisect_left(free, (size, -1))
        if at == len(free) or (at and size - free[at - 1][0] <= free[at][0] - size):
            at -= 1
        kept.add(free.pop(at)[1])
    return [pairs[i] for i in sorted(kept)]


FILTERS: dict[str, Callable[[Sequence[Row], Sequence[Pair]], list[Pair]]] = {
    "off": lambda rows, pairs: list(pairs),
    "almost": almost_filter,
    "balance": balance_filter,
}
"""What `length_filter` names."""


def length_bias(rows: Sequence[Row], pairs: Sequence[Pair]) -> dict[str, float | None]:
    """How much length alone tells of the label, as `agreement.length_bias`."""
    sizes = lengths(rows, pairs)
    preferred = np.array([pair.share - 0.5 for pair in pairs])
    correlation, wins = agreement.length_bias((sizes[:, 0] - sizes[:, 1]).astype(float), preferred)
    return {"pairs": len(pairs), "length_correlation": correlation, "longer_wins": wins}
