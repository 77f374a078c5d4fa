"""Rankings of one prompt by several raters, joined and aggregated."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import replace
from itertools import combinations

import numpy as np

from rlhf_jax.data import rankings
from rlhf_jax.data.ballots import Ballot, Ranking, ranking_row
from rlhf_jax.data.consensus import aggregate
from rlhf_jax.data.messages import as_key, key_of
from rlhf_jax.data.rows import DroppedRow, Joined, Row, layout_of
from rlhf_jax.data.schemas import Answer
from rlhf_jax.errors import UserError


def gather(rows: list[Row], key: Callable[[Row], str], *, aggregate: str, prior: float) -> tuple[list[Row], str]:
    """(rows, those of one prompt joined to one; what to say about it).

    aggregate = votes joins unpaired preferences only. bradley_terry, plackett_luce and crowd_bt join all rows of a
    prompt, equal responses once, and fit strengths to all ballots of each of its `linked_parts`; a row with nothing to
    learn stays as it is. Ballots of a row that a mixture has several times count once, and what is joined is there as
    often.
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
    notes = [f"{len(together)} rows joined to {len(joined)} prompts"]
    parts = [[ranking] if aggregate == "votes" else linked_parts(ranking) for ranking in joined]
    if aggregate != "votes":
        fitted, raters, facts = fit([part for each in parts for part in each], method=aggregate, prior=prior)
        in_turn = iter(fitted)
        parts = [[next(in_turn) for _ in each] for each in parts]
        notes += [*describe(raters, facts), *describe_parts(joined, parts)]
    for ranking, each in zip(joined, parts, strict=True):
        row = Joined({"prompt": ranking.prompt, "_where": ranking.where}, each)
        others += [row] * copies[key({"prompt": ranking.prompt})]
    return others, "; ".join(notes)


def same_text(answer: Answer) -> Hashable:
    """Responses of one text are one; a whole one and one that was cut off are two."""
    return key_of(answer.response), answer.finished


def join(
    together: list[Ranking], key: Callable[[Row], str], identity: Callable[[Answer], Hashable] = same_text
) -> list[Ranking]:
    """One ranking per prompt, in which responses that are one stand once.

    `key` of {prompt} is equal for the rankings of one prompt, `identity` for answers that are one.
    """
    of_prompt: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in together:
        of_prompt[key({"prompt": ranking.prompt})].append(ranking)
    return [_join(members, identity) for members in of_prompt.values()]


def _join(members: list[Ranking], identity: Callable[[Answer], Hashable]) -> Ranking:
    """All rankings of one prompt as one, with the fields in which they are alike.

    Every verdict on a response counts for what it is one with.
    """
    places: dict[Hashable, int] = {}
    answers: list[Answer] = []
    verdicts: list[tuple[str, dict[int, float], float, int]] = []  # rater, ranks by place, times, unit
    # What a rater said of single responses is one ballot: rater -> place -> its ranks.
    singles: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    unit = 0
    for member in members:
        for answer in member.answers:
            if places.setdefault(identity(answer), len(answers)) == len(answers):
                answers.append(answer)
        at = [places[identity(answer)] for answer in member.answers]
        for ballot in member.ballots:
            if len(at) == 1:
                singles[ballot.rater][at[0]].append(ballot.ranks[0])
            else:
                ranks = _ranks_by_place(at, ballot.ranks)
                verdicts += [(ballot.rater, by_place, ballot.times, unit + ballot.unit) for by_place in ranks]
        unit += max((ballot.unit for ballot in member.ballots), default=-1) + 1
    for number, (rater, ranks_at) in enumerate(singles.items()):
        # Of several labels of one response, that of a named rater is the last, a change of mind; else their mean.
        labels = {place: ranks[-1] if rater else float(np.mean(ranks)) for place, ranks in ranks_at.items()}
        verdicts.append((rater, labels, 1.0, unit + number))
    ballots = [
        Ballot(rater, [by_place.get(i, float("nan")) for i in range(len(answers))], times, unit)
        for rater, by_place, times, unit in verdicts
    ]
    first, *others = members
    same = lambda name: all(as_key(one.fields.get(name)) == as_key(first.fields[name]) for one in others)  # noqa: E731
    fields = {name: value for name, value in first.fields.items() if same(name)}
    return replace(first, answers=answers, ballots=ballots, fields=fields)


def _ranks_by_place(at: list[int], ranks: list[float]) -> list[dict[int, float]]:
    """The ranks of responses as ranks of the places `at` which they stand: one ballot, or, where several responses
    have one place, a ballot for each two that have not: every verdict counts, and none overwrites another."""
    if len(set(at)) == len(at):
        return [dict(zip(at, ranks, strict=True))]
    known = [(place, rank) for place, rank in zip(at, ranks, strict=True) if not np.isnan(rank)]
    return [{i: a, j: b} for (i, a), (j, b) in combinations(known, 2) if i != j]


def linked_parts(ranking: Ranking) -> list[Ranking]:
    """What comparisons link, each part as a ranking of its own; a response that nobody compared is in none.

    Strengths of two parts say nothing of one another. A ranking without any comparison stays as it is.
    """
    part_of = rankings.components(ranking.wins())
    groups = [group for number in np.unique(part_of) if len(group := np.flatnonzero(part_of == number)) > 1]
    if not groups or len(groups[0]) == len(part_of):
        return [ranking]
    parts = []
    for group in groups:
        ballots = [ballot._replace(ranks=[ballot.ranks[i] for i in group]) for ballot in ranking.ballots]
        ballots = [ballot for ballot in ballots if np.count_nonzero(~np.isnan(ballot.ranks)) > 1]
        parts.append(replace(ranking, answers=[ranking.answers[i] for i in group], ballots=ballots))
    return parts


def describe_parts(joined: list[Ranking], parts: list[list[Ranking]]) -> list[str]:
    """What to say about rankings and the `linked_parts` of each."""
    sizes = [len(each) for each in parts if len(each) > 1]
    left = sum(len(one.answers) for one in joined) - sum(len(part.answers) for each in parts for part in each)
    notes = [f"{len(sizes)} fall apart into {sum(sizes)} parts that nobody compared, no label across"] if sizes else []
    return notes + ([f"{left} responses that nobody compared are left out"] if left else [])


def fit(
    together: list[Ranking], *, method: str, prior: float
) -> tuple[list[Ranking], dict[str, float], dict[str, float]]:
    """(rankings with strengths, rater -> reliability, facts) by `consensus.aggregate`, raters known by name."""
    ballots, names, times, _ = numbered(together)
    sizes = [len(ranking.answers) for ranking in together]
    try:
        result = aggregate(ballots, num_raters=len(names), method=method, prior=prior, times=times, sizes=sizes)
    except ValueError as error:
        raise UserError(f"{error}; aggregate with bradley_terry or crowd_bt") from error
    strengths = zip(together, result.strengths, sizes, strict=True)
    fitted = [replace(ranking, strengths=of_group[:size]) for ranking, of_group, size in strengths]
    return fitted, dict(zip(names, result.reliability.tolist(), strict=True)), result.facts


def numbered(together: list[Ranking]) -> tuple[list[rankings.Ballot], list[str], list[float], list[int]]:
    """(ballots of all rankings, with numbers for groups and raters; names of the raters; times and units)."""
    names = sorted({ballot.rater for ranking in together for ballot in ranking.ballots})
    number = {name: i for i, name in enumerate(names)}
    ballots: list[rankings.Ballot] = []
    times: list[float] = []
    units: list[int] = []
    for group, ranking in enumerate(together):
        start = max(units, default=-1) + 1
        ballots += [(group, number[ballot.rater], ballot.ranks) for ballot in ranking.ballots]
        times += [ballot.times for ballot in ranking.ballots]
        units += [start + ballot.unit for ballot in ranking.ballots]
    return ballots, names, times, units


def describe(raters: dict[str, float], facts: dict[str, float]) -> list[str]:
    """What a summary says of an aggregation."""
    notes = [f"{facts[name]:.0f} {name}" for name in facts if name != "agreement" and facts[name]]
    if facts["agreement"] == facts["agreement"]:
        notes.append(f"agreement {facts['agreement']:.3f}")
    if len(raters) > 1:
        worst = sorted(raters, key=raters.__getitem__)[:3]
        notes.append("least reliable: " + ", ".join(f"{name or 'unnamed'} {raters[name]:.2f}" for name in worst))
    return notes
