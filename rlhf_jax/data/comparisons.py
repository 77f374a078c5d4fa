"""What raters say of responses to token examples: pairs, all responses to a prompt together, or one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import numpy as np

from rlhf_jax.data.ballots import Ranking, ranking_row, remarks_of
from rlhf_jax.data.encoding import Encoder, Example, Limits, Report, collect
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.gathering import gather
from rlhf_jax.data.numbers import equal_in_float32, in_order, number_of, off_centre
from rlhf_jax.data.rankings import components
from rlhf_jax.data.rows import PREFERENCES, DroppedRow, Joined, Row, bad_row, layout_of, require
from rlhf_jax.data.schemas import (
    Answer,
    answer_of,
    both_answers,
    flag_of,
    float32_of,
    margins_lost,
    margins_unused,
    preference_row,
    single_answer,
)
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

EQUAL_RATINGS = "ratings that float32 cannot tell from another"


def preference_examples(
    rows: list[Row],
    tokenizer: Tokenizer,
    limits: Limits,
    *,
    aggregate: str = "votes",
    prior: float = 0.5,
    margins: bool = True,
) -> tuple[list[Example], Report]:
    """[{chosen int32[n], rejected int32[m], prompt_length, label, margin, weight, prompt_key}].

    `chosen` and `rejected` are prompt and response in one array. `label` is the share of raters that prefer `chosen`,
    or what aggregation (`gathering.gather`) makes of them; where it is below 1/2 the two change places.
    `prompt_key` is equal for rows of one prompt. A ranking gives all pairs that were compared and are not tied, the
    preferred one first, whose weights sum to one, so that a prompt weighs the same however many responses it has.
    Without `margins` nothing is made of them, and they are counted.
    """
    encoder = Encoder(tokenizer, limits)

    def build(row: Row) -> tuple[list[Example], bool]:
        if layout_of(row) not in PREFERENCES:
            examples, cut = _rankings(row, encoder)
            return [pair for example in examples for pair in _pairs(example)], cut
        row = preference_row(row)
        (chosen, rejected), length, cut = encoder.sequences(row, both_answers(row))
        label = row["label"]
        if label < 0.5:
            chosen, rejected, label = rejected, chosen, 1 - label
        if np.array_equal(chosen, rejected):  # cutting can take the difference away
            raise DroppedRow(f"{row['_where']}: chosen and rejected are the same", "with chosen equal to rejected")
        example = {"chosen": chosen, "rejected": rejected, "prompt_length": length, "label": label}
        return [{**example, "margin": row["margin"], "weight": 1.0, "prompt_key": prompt_key(row)}], cut

    return _gathered(rows, build, encoder, aggregate, prior, margins=margins)


def ranking_examples(
    rows: list[Row], tokenizer: Tokenizer, limits: Limits, *, aggregate: str = "votes", prior: float = 0.5
) -> tuple[list[Example], Report]:
    """[{responses: K times int32[n], prompt_length, ranks float32[K], labels float32[K, K], weight, prompt_key}].

    Of rankings or preferences; each array is prompt and response. ranks are the consensus of the raters, lower is
    better; labels[i, j] is the share that prefers i to j, or what aggregation makes of it, NaN where nothing is known.
    Equal token sequences are one response. A row gives several rankings where it has pairs that nobody compared: those
    that comparisons link, and no two responses of one of them are in order without a label. Their weights sum to one.
    """
    encoder = Encoder(tokenizer, limits)
    return _gathered(rows, lambda row: _rankings(row, encoder), encoder, aggregate, prior, margins=False)


def _gathered(
    rows: list[Row],
    build: Callable[[Row], tuple[list[Example], bool]],
    encoder: Encoder,
    aggregate: str,
    prior: float,
    *,
    margins: bool,
) -> tuple[list[Example], Report]:
    """The examples that `build` makes of rows that are joined by prompt; says what becomes of their margins.

    `margins`: rows that are not joined use theirs.
    """
    joined, note = gather(rows, prompt_key, aggregate=aggregate, prior=prior)
    lost = margins_lost(rows) if margins and aggregate == "votes" else margins_unused(rows)
    encoder.remarks.update(lost + remarks_of(rows))
    return collect(joined, build, strict=encoder.limits.strict, note=note, remarks=encoder.remarks)


def _rankings(row: Row, encoder: Encoder) -> tuple[list[Example], bool]:
    """The rankings of a row, whose weights are in the ratio of their pairs and sum to one."""
    examples: list[Example] = []
    cut = False
    drops: list[DroppedRow] = []
    for ranking in row.rankings if isinstance(row, Joined) else [ranking_row(row)]:
        try:
            more, was_cut = _ranking(ranking, encoder)
            examples, cut = examples + more, cut or was_cut
        except DroppedRow as drop:
            drops.append(drop)
    if not examples:
        raise drops[0]
    encoder.remarks.update(f"parts of a prompt dropped {drop.reason}" for drop in drops)
    sizes = [len(_ordered(example)) for example in examples]
    return [{**example, "weight": size / sum(sizes)} for example, size in zip(examples, sizes, strict=True)], cut


def _ranking(ranking: Ranking, encoder: Encoder) -> tuple[list[Example], bool]:
    """Rankings in which every pair of responses that are not tied was compared: the whole one, or what is linked."""
    row: Row = {"prompt": ranking.prompt, "_where": ranking.where}
    ranks, labels = ranking.consensus()
    ranked = np.flatnonzero(~np.isnan(ranks))
    if len(ranked) < 2:
        message = f"{ranking.where}: fewer than two responses are ranked"
        raise DroppedRow(message, "with fewer than two ranked responses")
    tokens, length, cut = encoder.sequences(row, [ranking.answers[i] for i in ranked])
    kept, ranks, labels = _distinct(tokens, ranks[ranked], labels[np.ix_(ranked, ranked)])
    unknown = int(np.count_nonzero((ranks[:, None] < ranks[None, :]) & np.isnan(labels)))
    groups = _linked(ranks, labels) if unknown else [(np.arange(len(kept)), ranks)]
    left = {
        "pairs of responses that nobody compared, not trained on": unknown,
        "responses that nobody ranked, left out": len(ranking.answers) - len(ranked),
        "responses equal to another of their prompt, joined with it": len(ranked) - len(kept),
    }
    encoder.remarks.update(+Counter(left))
    examples: list[Example] = [
        {
            "responses": [tokens[kept[i]] for i in group],
            "prompt_length": length,
            "prompt_key": prompt_key(row),
            "ranks": order,
            "labels": labels[np.ix_(group, group)].astype(np.float32),
        }
        for group, order in groups
    ]
    examples = [example for example in examples if _ordered(example)]
    if not examples:
        raise DroppedRow(f"{ranking.where}: no response is better than another", "with all responses tied")
    return examples, cut


def _distinct(
    tokens: list[np.ndarray], ranks: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places of the responses that differ in tokens, K of N; their ranks float32[K] and labels [K, K]).

    Equal responses are one, with the mean of their ranks and of what is known of their labels.
    """
    first: dict[bytes, int] = {}
    same = np.array([first.setdefault(ids.tobytes(), i) for i, ids in enumerate(tokens)])
    kept = np.unique(same)
    share = (same[None, :] == kept[:, None]) / np.bincount(same)[kept][:, None]  # [K, N], rows sum to one
    ranks = np.array(in_order((share @ ranks).tolist()), np.float32)
    known = share @ ~np.isnan(labels) @ share.T
    total = share @ np.nan_to_num(labels) @ share.T
    labels = np.divide(total, known, out=np.full(known.shape, np.nan), where=known > 0)
    labels = np.where(abs(labels - 0.5) < 1e-12, labels, [[off_centre(x, x > 0.5) for x in line] for line in labels])
    return kept, ranks, labels


def _linked(ranks: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(places, their ranks) of what comparisons link; but of each compared pair that is not tied, by itself, where
    two that nobody compared would be in order."""
    part_of = components(~np.isnan(labels) * 1.0)
    groups = []
    for number in np.unique(part_of):
        group = np.flatnonzero(part_of == number)
        better, shares = ranks[group][:, None] < ranks[group][None, :], labels[np.ix_(group, group)]
        if (better & np.isnan(shares)).any():
            groups += [(group[pair], np.array([0, 1], np.float32)) for pair in np.argwhere(shares > 0.5)]
        else:
            groups.append((group, ranks[group]))
    return groups


def _ordered(example: Example) -> list[tuple[int, int]]:
    """(better, worse) of all pairs of a ranking that are not tied."""
    ranks = example["ranks"]
    return [(i, j) for i, j in permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def _pairs(example: Example) -> list[Example]:
    """The pairs of a ranking that are not tied, the preferred one first."""
    pairs, labels, responses = _ordered(example), example["labels"], example["responses"]
    shared = {name: example[name] for name in ("prompt_length", "prompt_key")}
    shared |= {"margin": 0.0, "weight": example["weight"] / len(pairs)}
    return [
        {"chosen": responses[i], "rejected": responses[j], "label": float(labels[i, j]), **shared}
        for i, j in ((i, j) if labels[i, j] >= 0.5 else (j, i) for i, j in pairs)
    ]


def unpaired_examples(rows: list[Row], tokenizer: Tokenizer, limits: Limits) -> tuple[list[Example], Report]:
    """[{response int32[n], other int32[m], prompt_length, label 0 or 1, prompt_key}], each array with its prompt.

    Of rows {prompt, response, label}, and of preferences, whose two responses then count one by one. `other` is the
    same prompt with the response of the next example that has another prompt, its end cut: KTO measures the KL by it.
    """
    encoder = Encoder(tokenizer, limits)

    def build(row: Row) -> tuple[list[Example], bool]:
        if layout_of(row) in PREFERENCES:
            pair = preference_row(row)
            if pair["label"] == 0.5:
                raise DroppedRow(f"{pair['_where']}: the raters are divided", "on which the raters are divided")
            won = float(pair["label"] > 0.5)
            return _singles(pair, encoder, both_answers(pair), [{"label": won}, {"label": 1 - won}])
        require(row, ("label",), "an unpaired preference is {prompt, response, label}")
        answer = answer_of(row)
        return _singles(answer, encoder, [single_answer(answer)], [{"label": float(flag_of(row, "label"))}])

    encoder.remarks.update(margins_unused(rows))
    examples, report = collect(rows, build, strict=limits.strict, remarks=encoder.remarks)
    if len({example["prompt_key"] for example in examples}) < 2:
        raise UserError("all rows have one prompt, but KTO needs responses to other prompts; give rows of two or more")
    return [{**example, "other": _other(examples, i, limits.max_length)} for i, example in enumerate(examples)], report


def _singles(row: Row, encoder: Encoder, answers: list[Answer], judged: list[Example]) -> tuple[list[Example], bool]:
    """({response int32[n], prompt_length, prompt_key} of each answer, and how it was `judged`; whether it was cut)."""
    sequences, length, cut = encoder.sequences(row, answers)
    shared = {"prompt_length": length, "prompt_key": prompt_key(row)}
    return [{"response": ids, **more, **shared} for ids, more in zip(sequences, judged, strict=True)], cut


def _other(examples: list[Example], i: int, max_length: int) -> np.ndarray:
    """The prompt of example i with the response of the next one, round the end, of another prompt."""
    mine = examples[i]
    following = (examples[(i + step) % len(examples)] for step in range(1, len(examples)))
    other = next(example for example in following if example["prompt_key"] != mine["prompt_key"])
    prompt_and_other = [mine["response"][: mine["prompt_length"]], other["response"][other["prompt_length"] :]]
    return np.concatenate(prompt_and_other)[:max_length]


def rating_of(row: Row) -> float:
    """The rating of a row, a finite number that float32 holds."""
    require(row, ("rating",), "a rating row is {prompt, response, rating}")
    return float32_of(row, "rating", row["rating"])


def rating_examples(
    rows: list[Row], tokenizer: Tokenizer, limits: Limits, *, ends: tuple[float, float] | None = None
) -> tuple[list[Example], Report]:
    """[{response int32[n], prompt_length, rating, prompt_key}] of rows {prompt, response, rating}.

    A rating off the `ends` of a scale, if there are any, is an error.
    """
    encoder = Encoder(tokenizer, limits)
    ratings: list[float] = []

    def build(row: Row) -> tuple[list[Example], bool]:
        rating, answer = rating_of(row), answer_of(row)
        if ends and not ends[0] <= rating <= ends[1]:
            scale = f"from reward.rating_low {ends[0]:g} to reward.rating_high {ends[1]:g}"
            raise bad_row(row, f"the rating {rating:g} is not {scale}; set these to the ends of the scale")
        made = _singles(answer, encoder, [single_answer(answer)], [{"rating": rating}])
        ratings.append(number_of(row["rating"]))  # of a row that is kept
        return made

    examples, report = collect(rows, build, strict=limits.strict, remarks=encoder.remarks)
    lost = +Counter({EQUAL_RATINGS: len(equal_in_float32(ratings))})
    return examples, replace(report, remarks={**report.remarks, **lost})
