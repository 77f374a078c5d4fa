"""Comparisons to token examples: pairs, or all responses to a prompt together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations

import numpy as np

from rlhf_jax.data.ballots import Ranking, ranking_row
from rlhf_jax.data.encoding import Encoder, Example, Report, collect
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.gathering import gather
from rlhf_jax.data.layouts import PREFERENCES, Joined, layout_of
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.numbers import SMALLEST, in_order, is_number, off_centre
from rlhf_jax.data.rankings import components
from rlhf_jax.data.rows import DroppedRow, Row
from rlhf_jax.data.schemas import both_answers, preference_row
from rlhf_jax.data.tokenizer import Tokenizer


def preference_examples(
    rows: list[Row], tokenizer: Tokenizer, limits: Limits, *, aggregate: str = "votes", prior: float = 0.5
) -> tuple[list[Example], Report]:
    """[{chosen int32[n], rejected int32[m], prompt_length, label, margin, weight, prompt_key}].

    `chosen` and `rejected` are prompt and response in one array. `label` is the share of raters that prefer `chosen`,
    or what aggregation (`gathering.gather`) makes of them; where it is below 1/2 the two change places.
    `prompt_key` is equal for rows of one prompt. A ranking gives all pairs that were compared and are not tied, the
    preferred one first, whose weights sum to one, so that a prompt weighs the same however many responses it has.
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
        example = {
            "chosen": chosen,
            "rejected": rejected,
            "prompt_length": length,
            "label": label,
            "margin": row["margin"],
            "weight": 1.0,
            "prompt_key": prompt_key(row),
        }
        return [example], cut

    return _gathered(rows, build, encoder, aggregate, prior, margins=True)


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
    sizes = [abs(row["margin"]) for row in rows if layout_of(row) in PREFERENCES and is_number(row.get("margin"))]
    if margins and aggregate == "votes":
        lost = Counter({"margins that are 0 in float32": sum(0 < size < SMALLEST for size in sizes)})
    else:
        lost = Counter({"margins not used": sum(size != 0 for size in sizes)})
    encoder.remarks.update(+lost)
    return collect(joined, build, strict=encoder.limits.strict, note=note, remarks=encoder.remarks)


def _rankings(row: Row, encoder: Encoder) -> tuple[list[Example], bool]:
    """The rankings of a row, whose weights are in the ratio of their pairs and sum to one."""
    examples: list[Example] = []
    cut = False
    drops: list[DroppedRow] = []
    for ranking in row.rankings if isinstance(row, Joined) else [ranking_row(row)]:
        try:
            more, was_cut = _ranking(ranking, encoder)
        except DroppedRow as drop:
            drops.append(drop)
            continue
        examples, cut = examples + more, cut or was_cut
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
        raise DroppedRow(
            f"{ranking.where}: fewer than two responses are ranked", "with fewer than two ranked responses"
        )
    tokens, length, cut = encoder.sequences(row, [ranking.answers[i] for i in ranked])
    kept, ranks, labels = _distinct(tokens, ranks[ranked], labels[np.ix_(ranked, ranked)])
    unknown = int(np.count_nonzero((ranks[:, None] < ranks[None, :]) & np.isnan(labels)))
    groups = _linked(ranks, labels) if unknown else [(np.arange(len(kept)), ranks)]
    remarks = encoder.remarks
    remarks += Counter({"pairs of responses that nobody compared, not trained on": unknown})
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
    pairs = _ordered(example)
    labels = example["labels"]
    return [
        {
            "chosen": example["responses"][i],
            "rejected": example["responses"][j],
            "prompt_length": example["prompt_length"],
            "label": float(labels[i, j]),
            "margin": 0.0,
            "weight": example["weight"] / len(pairs),
            "prompt_key": example["prompt_key"],
        }
        for i, j in ((i, j) if labels[i, j] >= 0.5 else (j, i) for i, j in pairs)
    ]
