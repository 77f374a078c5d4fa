"""Which responses to a prompt are worth a label: those whose order the members of a reward ensemble doubt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

TRIES = 30
"""Draws of a member until one prefers another response (Dwaracherla et al. 2024, algorithm 5); then any other one."""


@dataclass(frozen=True)
class Selection:
    """What is kept of a prompt.

    Attributes:
        places: of the responses, in their order; fewer than two if no two that say something differ.
        information: the mean over pairs of them of `doubt`; None where nobody was asked.
    """

    places: list[int]
    information: float | None


def doubt(scores: Float[np.ndarray, "K M"]) -> Float[np.ndarray, "K K"]:
    """The standard deviation over M members of the chance sigmoid(s_i - s_j) that response i is better than j."""
    scores = scores.astype(np.float64)
    apart = scores[:, None] - scores[None, :]
    return (0.5 * (1 + np.tanh(apart / 2))).std(axis=-1)


def select(
    how: str, texts: Sequence[str], scores: Float[np.ndarray, "K M"] | None, count: int, rng: np.random.Generator
) -> Selection:
    """`count` different responses of K, or as many as there are; `scores` of M members, None for random.

    An empty one is none of them: nobody can rank it.
    random: any. disagreement: the pair of the largest doubt, then, one by one, what adds the largest doubt beside
    those that are chosen (infomax of Dwaracherla et al. 2024, arXiv 2402.00396, by pairs). top_two: double Thompson
    sampling (algorithm 5 there): the one that a random member likes best, then the one that another likes best.
    """
    places = [texts.index(text) for text in dict.fromkeys(texts) if text.strip()]
    count = min(count, len(places))
    if scores is None or count < 2:
        return Selection(sorted(rng.choice(places, count, replace=False).tolist()), None)
    among = doubt(scores[places])
    chosen = _most_doubted(among, count) if how == "disagreement" else _liked(scores[places], count, rng)
    pairs = among[np.ix_(chosen, chosen)][np.triu_indices(count, 1)]
    return Selection(sorted(places[i] for i in chosen), float(pairs.mean()))


def _most_doubted(among: Float[np.ndarray, "K K"], count: int) -> list[int]:
    chosen = [int(i) for i in np.unravel_index(among.argmax(), among.shape)]
    if chosen[0] == chosen[1]:  # no two are doubted
        chosen = [0, 1]
    while len(chosen) < count:
        gain = among[:, chosen].sum(axis=1)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
    return chosen


def _liked(scores: Float[np.ndarray, "K M"], count: int, rng: np.random.Generator) -> list[int]:
    best, chosen = scores.argmax(axis=0), list[int]()
    while len(chosen) < count:
        drawn = best[rng.integers(len(best), size=TRIES if chosen else 1)]
        new = [int(i) for i in drawn if i not in chosen]
        others = [i for i in range(len(scores)) if i not in chosen]
        chosen.append(new[0] if new else int(rng.choice(others)))
    return chosen
