"""Rows of one response each to token examples: labelled good or bad (KTO), or rated."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_jax.data.comparisons import response_tokens
from rlhf_jax.data.examples import Example, Report, collect, prompt_key
from rlhf_jax.data.layouts import PREFERENCES, layout_of
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.numbers import is_number, number_of
from rlhf_jax.data.rows import DroppedRow, Row, bad_row, require
from rlhf_jax.data.schemas import answer_of, flag_of, float32_of, preference_row
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError


def unpaired_examples(rows: list[Row], tokenizer: Tokenizer, limits: Limits) -> tuple[list[Example], Report]:
    """[{response int32[n], other int32[m], prompt_length, label 0 or 1, prompt_key}], each array with its prompt.

    Of rows {prompt, response, label}, and of preferences, whose two responses then count one by one. `other` is the
    same prompt with the response of the next example that has another prompt, its end cut, by
    which KTO measures the KL.

    Raises:
        UserError: a bad row, one that the limits refuse, no row left, or one prompt only.
    """
    remarks = Counter[str]()

    def build(row: Row) -> tuple[list[Example], bool]:
        if layout_of(row) in PREFERENCES:
            pair = preference_row(row)
            if pair["label"] == 0.5:
                raise DroppedRow(f"{pair['_where']}: the raters are divided", "on which the raters are divided")
            answers = list(zip([pair["chosen"], pair["rejected"]], pair["finished"], pair["ids"], strict=True))
            labels = [float(pair["label"] > 0.5), float(pair["label"] < 0.5)]
        else:
            require(row, ("label",), "an unpaired preference is {prompt, response, label}")
            pair = answer_of(row)
            answers, labels = [(pair["response"], pair["finished"], pair.get("ids"))], [float(flag_of(row, "label"))]
        tokens, length, cut = response_tokens(pair, answers, tokenizer, limits, remarks)
        shared = {"prompt_length": length, "prompt_key": prompt_key(pair)}
        return [{"response": t, "label": label, **shared} for t, label in zip(tokens, labels, strict=True)], cut

    examples, report = collect(rows, build, strict=limits.strict, remarks=remarks)
    if len({example["prompt_key"] for example in examples}) < 2:
        raise UserError("all rows have one prompt, but KTO needs responses to other prompts; give rows of two or more")
    return [{**example, "other": _other(examples, i, limits.max_length)} for i, example in enumerate(examples)], report


def _other(examples: list[Example], i: int, max_length: int) -> np.ndarray:
    """The prompt of example i with the response of the next one, round the end, of another prompt."""
    mine = examples[i]
    following = (examples[(i + step) % len(examples)] for step in range(1, len(examples)))
    other = next(example for example in following if example["prompt_key"] != mine["prompt_key"])
    parts = [mine["response"][: mine["prompt_length"]], other["response"][other["prompt_length"] :]]
    return np.concatenate(parts)[:max_length]


def rating_of(row: Row) -> float:
    """The rating of a row, a finite number that float32 holds."""
    require(row, ("rating",), "a rating row is {prompt, response, rating}")
    if not is_number(row["rating"]):
        raise bad_row(row, f'"rating" is {row["rating"]!r}; give a finite number')
    return float32_of(row, "rating", row["rating"])


def rating_examples(rows: list[Row], tokenizer: Tokenizer, limits: Limits) -> tuple[list[Example], Report]:
    """[{response int32[n], prompt_length, rating, prompt_key}] of rows {prompt, response, rating}.

    Raises:
        UserError: a bad row, one that the limits refuse, or no row left.
    """
    remarks = Counter[str]()
    ratings: set[Any] = set()

    def build(row: Row) -> tuple[list[Example], bool]:
        rating = rating_of(row)
        answer = answer_of(row)
        answers = [(answer["response"], answer["finished"], answer.get("ids"))]
        [tokens], length, cut = response_tokens(answer, answers, tokenizer, limits, remarks)
        shared = {"prompt_length": length, "prompt_key": prompt_key(answer)}
        ratings.add(number_of(row["rating"]))
        return [{"response": tokens, "rating": rating, **shared}], cut

    examples, report = collect(rows, build, strict=limits.strict, remarks=remarks)
    lost = len(ratings) - len({float(np.float32(rating)) for rating in ratings})
    said = {"ratings that float32 cannot tell from another": lost} if lost else {}
    return examples, replace(report, remarks={**report.remarks, **said})
