"""Comparisons to token examples: pairs, or all responses to a prompt together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np

from rlhf_jax.data.ballots import Ranking, rankings_of
from rlhf_jax.data.examples import Example, Report, collect, encode, prompt_key
from rlhf_jax.data.gathering import gather
from rlhf_jax.data.layouts import PREFERENCES, layout_of
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.numbers import SMALLEST, in_order, is_number, off_centre
from rlhf_jax.data.rankings import components
from rlhf_jax.data.rows import DroppedRow, Row
from rlhf_jax.data.schemas import preference_row
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

Answer = tuple[Any, bool, list[int] | None]
"""A response, whether it is finished, and the ids that were sampled for it, if any."""


def preference_examples(
    rows: list[Row],
    tokenizer: Tokenizer,
    limits: Limits,
    *,
    aggregate: str = "votes",
    prior: float = 0.5,
) -> tuple[list[Example], Report]:
    """[{chosen int32[n], rejected int32[m], prompt_length, label, margin, weight, prompt_key}].

    `chosen` and `rejected` are prompt and response in one array. `label` is the share of raters that prefer `chosen`,
    or what aggregation (`gathering.gather`) makes of them; where it is below 1/2 the two change places.
    `prompt_key` is equal for rows of one prompt. A ranking gives all pairs that were compared and are not tied, the
    preferred one first, whose weights sum to one, so that a prompt weighs the same however many responses it has.

    Raises:
        UserError: a bad row, one that the limits refuse, or no row left.
    """
    remarks = Counter[str]()

    def build(row: Row) -> tuple[list[Example], bool]:
        if layout_of(row) not in PREFERENCES:
            examples, cut = _rankings(row, tokenizer, limits, remarks)
            return [pair for example in examples for pair in _pairs(example)], cut
        row = preference_row(row)
        example = {"label": row["label"], "margin": row["margin"], "weight": 1.0, "prompt_key": prompt_key(row)}
        both = [row["chosen"], row["rejected"]]
        (example["chosen"], example["rejected"]), length, cut = response_tokens(
            row, list(zip(both, row["finished"], row["ids"], strict=True)), tokenizer, limits, remarks
        )
        example["prompt_length"] = length
        if row["label"] < 0.5:
            example |= {"chosen": example["rejected"], "rejected": example["chosen"], "label": 1 - row["label"]}
        if np.array_equal(example["chosen"], example["rejected"]):  # cutting can take the difference away
            raise DroppedRow(f"{row['_where']}: chosen and rejected are the same", "with chosen equal to rejected")
        return [example], cut

    gathered, note = gather(rows, prompt_key, aggregate=aggregate, prior=prior)
    _count_margins(rows, aggregate, remarks, used=True)
    return collect(gathered, build, strict=limits.strict, note=note, remarks=remarks)


def ranking_examples(
    rows: list[Row],
    tokenizer: Tokenizer,
    limits: Limits,
    *,
    aggregate: str = "votes",
    prior: float = 0.5,
) -> tuple[list[Example], Report]:
    """[{responses: K times int32[n], prompt_length, ranks float32[K], labels float32[K, K], weight, prompt_key}].

    Of rankings or preferences; each array is prompt and response. ranks are the consensus of the raters, lower is
    better; labels[i, j] is the share that prefers i to j, or what aggregation makes of it, NaN where nothing is known.
    Equal token sequences are one response. A row gives several rankings where it has pairs that nobody compared: those
    that comparisons link, and no two responses of one of them are in order without a label. Their weights sum to one.

    Raises:
        UserError: a bad row, one that the limits refuse, or no row left.
    """
    remarks = Counter[str]()

    def build(row: Row) -> tuple[list[Example], bool]:
        return _rankings(row, tokenizer, limits, remarks)

    gathered, note = gather(rows, prompt_key, aggregate=aggregate, prior=prior)
    _count_margins(rows, aggregate, remarks, used=False)
    return collect(gathered, build, strict=limits.strict, note=note, remarks=remarks)


def _rankings(row: Row, tokenizer: Tokenizer, limits: Limits, remarks: Counter[str]) -> tuple[list[Example], bool]:
    """The rankings of a row, whose weights are in the ratio of their pairs and sum to one."""
    found: list[Example] = []
    cut = False
    drops: list[DroppedRow] = []
    for one in rankings_of(row):
        try:
            examples, was_cut = _ranking(one, tokenizer, limits, remarks)
        except DroppedRow as drop:
            drops.append(drop)
            continue
        found, cut = found + examples, cut or was_cut
    if not found:
        raise drops[0]
    remarks.update(f"parts of a prompt dropped {drop.reason}" for drop in drops)
    sizes = [len(_ordered(example)) for example in found]
    return [{**example, "weight": size / sum(sizes)} for example, size in zip(found, sizes, strict=True)], cut


def _ranking(
    ranking: Ranking, tokenizer: Tokenizer, limits: Limits, remarks: Counter[str]
) -> tuple[list[Example], bool]:
    """Rankings in which every pair of responses that are not tied was compared: the whole one, or what is linked."""
    row: Row = {"prompt": ranking.prompt, "_where": ranking.where}
    ranks, labels = ranking.consensus()
    ranked = np.flatnonzero(~np.isnan(ranks))
    if len(ranked) < 2:
        raise DroppedRow(
            f"{ranking.where}: fewer than two responses are ranked", "with fewer than two ranked responses"
        )
    answers = [(ranking.responses[i], ranking.finished[i], ranking.ids[i]) for i in ranked]
    tokens, length, cut = response_tokens(row, answers, tokenizer, limits, remarks)
    first: dict[bytes, int] = {}
    same = np.array([first.setdefault(ids.tobytes(), i) for i, ids in enumerate(tokens)])
    kept = np.unique(same)
    share = (same[None, :] == kept[:, None]) / np.bincount(same)[kept][:, None]  # [kept, ranked], rows sum to one
    ranks = np.array(in_order((share @ ranks[ranked]).tolist()), np.float32)
    labels = labels[np.ix_(ranked, ranked)]
    known = share @ ~np.isnan(labels) @ share.T
    total = share @ np.nan_to_num(labels) @ share.T
    labels = np.divide(total, known, out=np.full(known.shape, np.nan), where=known > 0)
    labels = np.where(abs(labels - 0.5) < 1e-12, labels, [[off_centre(x, x > 0.5) for x in line] for line in labels])
    gaps = np.count_nonzero((ranks[:, None] < ranks[None, :]) & np.isnan(labels))
    groups = _linked(ranks, labels) if gaps else [(np.arange(len(kept)), ranks)]
    remarks += Counter({"pairs of responses that nobody compared, not trained on": int(gaps)})
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


def _linked(ranks: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(places, their ranks) of what comparisons link; but of each compared pair that is not tied, by itself, where
    two that nobody compared would be in order."""
    side = components(~np.isnan(labels) * 1.0)
    groups = []
    for number in np.unique(side):
        group = np.flatnonzero(side == number)
        better, own = ranks[group][:, None] < ranks[group][None, :], labels[np.ix_(group, group)]
        if (better & np.isnan(own)).any():
            groups += [(group[pair], np.array([0, 1], np.float32)) for pair in np.argwhere(own > 0.5)]
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


def _count_margins(rows: list[Row], aggregate: str, remarks: Counter[str], *, used: bool) -> None:
    """Say what becomes of margins: `used` says whether rows that are not joined use theirs."""
    margins = [row["margin"] for row in rows if layout_of(row) in PREFERENCES and is_number(row.get("margin"))]
    if aggregate != "votes" or not used:
        found = Counter({"margins not used": sum(margin != 0 for margin in margins)})
    else:
        found = Counter({"margins that are 0 in float32": sum(0 < abs(margin) < SMALLEST for margin in margins)})
    remarks += +found


def response_tokens(
    row: Row,
    answers: Sequence[Answer],
    tokenizer: Tokenizer,
    limits: Limits,
    remarks: Counter[str],
) -> tuple[list[np.ndarray], int, bool]:
    """(prompt and response of each answer, within the limits; length of the prompt; whether something was cut)."""
    encoder = partial(tokenizer.encode_prompt, remarks=remarks)
    prompt, cut = limits.prompt(row, encode(encoder, row, "prompt"), tokenizer.bos_id)
    found = []
    for response, done, sampled in answers:
        if not isinstance(response, str) and "weight" in response[-1]:
            raise UserError(f'{row["_where"]}: a response has a "weight", which only sft knows; leave it out')
        said = {"prompt": row["prompt"], "finished": done, "ids": sampled, "remarks": remarks}
        tokens = encode(partial(tokenizer.encode_response, **said), {**row, "response": response}, "response")
        tokens, cut_response = limits.response(row, len(prompt), tokens)
        found.append(np.asarray(prompt + tokens, np.int32))
        cut |= cut_response
    return found, len(prompt), cut
