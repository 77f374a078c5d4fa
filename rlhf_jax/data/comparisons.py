"""Comparisons to token examples: pairs, or all responses to a prompt together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np

from rlhf_jax.data.ballots import Ranking, gather, ranking_row
from rlhf_jax.data.examples import Example, Report, collect, encode, prompt_key
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.schemas import DroppedRow, Row, preference_row
from rlhf_jax.data.tokenizer import Tokenizer

Answer = tuple[Any, bool, list[int] | None]
"""A response, whether it is finished, and the ids that were sampled for it, if any."""


def preference_examples(
    rows: list[Row],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    max_length: int,
    too_long: str,
    strict: bool = False,
    aggregate: str = "votes",
    prior: float = 0.5,
) -> tuple[list[Example], Report]:
    """[{chosen int32[n], rejected int32[m], prompt_length, label, margin, weight, prompt_key}].

    `chosen` and `rejected` are prompt and response in one array. `label` is the share of raters that prefer `chosen`,
    or what aggregation (`ballots.gather`) makes of them; where it is below 1/2 the two change places.
    `prompt_key` is equal for rows of one prompt. A ranking gives all pairs that are not tied, best first, whose
    weights sum to one, so that a prompt weighs the same however many responses it has.

    Raises:
        UserError: a bad row, a row too long under too_long = error, a dropped one if `strict`, or no row left.
    """
    limits, remarks = Limits(max_prompt_length, max_length, too_long), Counter[str]()

    def build(row: Row) -> tuple[list[Example], bool]:
        if {"ranking", "responses", "label"} & set(row):
            example, cut = _ranking(ranking_row(row), tokenizer, limits, remarks)
            return _pairs(example), cut
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
    return collect(gathered, build, strict=strict, note=note, remarks=remarks)


def ranking_examples(
    rows: list[Row],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    max_length: int,
    too_long: str,
    strict: bool = False,
    aggregate: str = "votes",
    prior: float = 0.5,
) -> tuple[list[Example], Report]:
    """[{responses: K times int32[n], prompt_length, ranks float32[K], labels float32[K, K], prompt_key}].

    Of rankings or preferences; each array is prompt and response. ranks are the consensus of the raters, lower is
    better; labels[i, j] is the share that prefers i to j, or what aggregation makes of it, NaN where nothing is known.
    Equal token sequences are one response.

    Raises:
        UserError: a bad row, a row too long under too_long = error, a dropped one if `strict`, or no row left.
    """
    limits, remarks = Limits(max_prompt_length, max_length, too_long), Counter[str]()

    def build(row: Row) -> tuple[list[Example], bool]:
        example, cut = _ranking(ranking_row(row), tokenizer, limits, remarks)
        return [example], cut

    gathered, note = gather(rows, prompt_key, aggregate=aggregate, prior=prior)
    return collect(gathered, build, strict=strict, note=note, remarks=remarks)


def _ranking(ranking: Ranking, tokenizer: Tokenizer, limits: Limits, remarks: Counter[str]) -> tuple[Example, bool]:
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
    ranks = share @ ranks[ranked]
    labels = labels[np.ix_(ranked, ranked)]
    known = share @ ~np.isnan(labels) @ share.T
    total = share @ np.nan_to_num(labels) @ share.T
    labels = np.divide(total, known, out=np.full(known.shape, np.nan), where=known > 0)
    if len(set(ranks.tolist())) < 2:
        raise DroppedRow(f"{ranking.where}: no response is better than another", "with all responses tied")
    example = {"responses": [tokens[i] for i in kept], "prompt_length": length, "prompt_key": prompt_key(row)}
    return {**example, "ranks": ranks.astype(np.float32), "labels": labels.astype(np.float32)}, cut


def _pairs(example: Example) -> list[Example]:
    """The pairs of a ranking that are not tied, the better one first; one that nobody compared has the label 1."""
    ranks, labels = example["ranks"], example["labels"]
    pairs = [(i, j) for i, j in permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
    return [
        {
            "chosen": example["responses"][i],
            "rejected": example["responses"][j],
            "prompt_length": example["prompt_length"],
            "label": 1.0 if np.isnan(labels[i, j]) else float(labels[i, j]),
            "margin": 0.0,
            "weight": 1 / len(pairs),
            "prompt_key": example["prompt_key"],
        }
        for i, j in pairs
    ]


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
        said = {"prompt": row["prompt"], "finished": done, "ids": sampled, "remarks": remarks}
        tokens = encode(partial(tokenizer.encode_response, **said), {**row, "response": response}, "response")
        tokens, cut_response = limits.response(row, len(prompt), tokens)
        found.append(np.asarray(prompt + tokens, np.int32))
        cut |= cut_response
    return found, len(prompt), cut
