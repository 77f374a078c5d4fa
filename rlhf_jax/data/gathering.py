"""Rankings of one prompt by several raters, joined and aggregated."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from rlhf_jax.data import rankings
from rlhf_jax.data.ballots import Ranking, Response, ranking_row
from rlhf_jax.data.consensus import aggregate
from rlhf_jax.data.layouts import Joined, layout_of
from rlhf_jax.data.messages import key_of
from rlhf_jax.data.rows import DroppedRow, Row
from rlhf_jax.errors import UserError


def gather(rows: list[Row], key: Callable[[Row], str], *, aggregate: str, prior: float) -> tuple[list[Row], str]:
    """(rows, those of one prompt joined to one, for `rankings_of`; what to say about it).

    aggregate = votes joins unpaired preferences only. bradley_terry, plackett_luce and crowd_bt join all rows of a
    prompt, equal responses once, and fit strengths to all ballots of each of its `parts`; a row with nothing to learn
    stays as it is. Ballots of a row that a mixture has several times count once, and what is joined is there as often.
    """
    together: list[Ranking] = []
    others: list[Row] = []
    times = Counter(map(id, rows))
    copies: dict[str, int] = {}  # prompt -> how often a mixture has its rows
    for row in {id(row): row for row in rows}.values():
        if aggregate == "votes" and layout_of(row) != "unpaired preference":
            others += [row] * times[id(row)]
            continue
        try:
            together.append(ranking_row(row))
            prompt = key({"prompt": together[-1].prompt})
            copies[prompt] = max(copies.get(prompt, 1), times[id(row)])
        except DroppedRow:
            others += [row] * times[id(row)]
    if not together:
        return others, ""
    joined = join(together, key)
    said = [f"{len(together)} rows joined to {len(joined)} prompts"]
    apart = [[one] for one in joined]
    if aggregate != "votes":
        apart = [parts(one) for one in joined]
        fitted, raters, facts = fit([part for pieces in apart for part in pieces], method=aggregate, prior=prior)
        each = iter(fitted)
        apart = [[next(each) for _ in pieces] for pieces in apart]
        said += [*describe(raters, facts), *gaps(joined, apart)]
    for one, own in zip(joined, apart, strict=True):
        others += [Joined({"prompt": one.prompt, "_where": one.where}, own)] * copies[key({"prompt": one.prompt})]
    return others, "; ".join(said)


Identity = Callable[[Response, bool, Row], Any]
"""(response, whether it is finished, its other fields) -> what is equal for responses that are one."""


def same_text(response: Response, done: bool, extra: Row) -> Any:
    """Responses of one text are one; a whole one and one that was cut off are two."""
    return key_of(response), done


def join(together: list[Ranking], key: Callable[[Row], str], identity: Identity = same_text) -> list[Ranking]:
    """One ranking per prompt, in which responses that are one stand once: `key` of {prompt} is equal for its rows."""
    of_prompt: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in together:
        of_prompt[key({"prompt": ranking.prompt})].append(ranking)
    return [_join(members, identity) for members in of_prompt.values()]


def _join(members: list[Ranking], identity: Identity) -> Ranking:
    """All rows of one prompt as one. Every verdict on a response counts for what it is one with."""
    places: dict[Any, int] = {}
    kept: list[tuple[Response, bool, Row, Any]] = []
    found: list[tuple[str, dict[int, float], float, int]] = []  # rater, ranks by place, times, unit
    of_one: dict[str, dict[int, list[float]]] = {}  # what a rater said of single responses is one ballot
    unit = 0
    for member in members:
        given = list(zip(member.responses, member.finished, member.extra, member.ids, strict=True))
        for one in given:
            if places.setdefault(identity(*one[:3]), len(kept)) == len(kept):
                kept.append(one)
        at = [places[identity(*one[:3])] for one in given]
        own = member.units or range(len(member.ballots))
        for (rater, ranks), count, part in zip(member.ballots, member.counts(), own, strict=True):
            if len(at) == 1:
                of_one.setdefault(rater, {}).setdefault(at[0], []).append(ranks[0])
            else:
                found += [(rater, by_place, float(count), unit + part) for by_place in _by_place(at, ranks)]
        unit += max(own, default=-1) + 1
    for number, (rater, told) in enumerate(of_one.items()):
        # Of several labels of one response, that of a named rater is the last, a change of mind; else their mean.
        means = {place: said[-1] if rater else float(np.mean(said)) for place, said in told.items()}
        found.append((rater, means, 1.0, unit + number))
    return replace(
        members[0],
        responses=[one[0] for one in kept],
        finished=[one[1] for one in kept],
        extra=[one[2] for one in kept],
        ids=[one[3] for one in kept],
        ballots=[(rater, [ranks.get(i, float("nan")) for i in range(len(kept))]) for rater, ranks, _, _ in found],
        times=[count for _, _, count, _ in found],
        units=[part for *_, part in found],
    )


def _by_place(at: list[int], ranks: list[float]) -> list[dict[int, float]]:
    """The ranks of responses as ranks of the places `at` which they stand: one ballot, or, where several responses
    have one place, a ballot for each two that have not: every verdict counts, and none overwrites another."""
    if len(set(at)) == len(at):
        return [dict(zip(at, ranks, strict=True))]
    known = [(place, rank) for place, rank in zip(at, ranks, strict=True) if not np.isnan(rank)]
    return [{i: a, j: b} for (i, a), (j, b) in combinations(known, 2) if i != j]


def parts(one: Ranking) -> list[Ranking]:
    """What comparisons link, each part as a ranking of its own; a response that nobody compared is in none.

    Strengths of two parts say nothing of one another. A ranking without any comparison stays as it is.
    """
    wins = one.wins()
    side = rankings.components(wins)
    groups = [np.flatnonzero(side == number) for number in np.unique(side)]
    groups = [group for group in groups if len(group) > 1]
    if not groups or len(groups[0]) == len(side):
        return [one]
    units = one.units or list(range(len(one.ballots)))
    found = []
    for group in groups:
        ballots = [(rater, [ranks[i] for i in group]) for rater, ranks in one.ballots]
        own = [n for n, (_, ranks) in enumerate(ballots) if np.count_nonzero(~np.isnan(ranks)) > 1]
        part: dict[str, Any] = {
            name: [getattr(one, name)[i] for i in group] for name in ("responses", "finished", "extra", "ids")
        }
        counts, told = one.counts(), [ballots[n] for n in own]
        found.append(replace(one, **part, ballots=told, times=[counts[n] for n in own], units=[units[n] for n in own]))
    return found


def gaps(joined: list[Ranking], apart: list[list[Ranking]]) -> list[str]:
    """What to say about rankings and the `parts` of each."""
    sizes = [len(own) for own in apart if len(own) > 1]
    left = sum(len(one.responses) for one in joined) - sum(len(part.responses) for own in apart for part in own)
    said = [f"{len(sizes)} fall apart into {sum(sizes)} parts that nobody compared, no label across"] if sizes else []
    return said + ([f"{left} responses that nobody compared are left out"] if left else [])


def fit(
    together: list[Ranking], *, method: str, prior: float
) -> tuple[list[Ranking], dict[str, float], dict[str, float]]:
    """(rankings with strengths, rater -> reliability, facts) by `consensus.aggregate`, raters known by name."""
    ballots, names, times, _ = numbered(together)
    told: dict[str, Any] = {"times": times, "sizes": [len(ranking.responses) for ranking in together]}
    try:
        found = aggregate(ballots, num_raters=len(names), method=method, prior=prior, **told)
    except ValueError as error:
        raise UserError(f"{error}; aggregate with bradley_terry or crowd_bt") from error
    fitted = [replace(r, strengths=found.strengths[g, : len(r.responses)]) for g, r in enumerate(together)]
    return fitted, dict(zip(names, found.reliability.tolist(), strict=True)), found.facts


def numbered(together: list[Ranking]) -> tuple[list[rankings.Ballot], list[str], list[float], list[int]]:
    """(ballots of all rankings, with numbers for groups and raters; names of the raters; times and units)."""
    names = sorted({rater for ranking in together for rater, _ in ranking.ballots})
    number = {name: i for i, name in enumerate(names)}
    ballots: list[rankings.Ballot] = [
        (g, number[rater], ranks) for g, ranking in enumerate(together) for rater, ranks in ranking.ballots
    ]
    times = [count for ranking in together for count in ranking.counts().tolist()]
    units: list[int] = []
    for ranking in together:
        start = max(units, default=-1) + 1
        units += [start + unit for unit in ranking.units or range(len(ranking.ballots))]
    return ballots, names, times, units


def describe(raters: dict[str, float], facts: dict[str, float]) -> list[str]:
    """What a summary says of an aggregation."""
    said = [f"{facts[name]:.0f} {name}" for name in facts if name != "agreement" and facts[name]]
    if facts["agreement"] == facts["agreement"]:
        said.append(f"agreement {facts['agreement']:.3f}")
    if len(raters) > 1:
        worst = sorted(raters, key=raters.__getitem__)[:3]
        said.append("least reliable: " + ", ".join(f"{name or 'unnamed'} {raters[name]:.2f}" for name in worst))
    return said
