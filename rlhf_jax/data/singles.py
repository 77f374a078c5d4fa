"""Rows of one response each to token examples: labelled good or bad (KTO), or rated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlhf_jax.data.encoding import Encoder, Example, Report, collect
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.layouts import PREFERENCES, layout_of
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.numbers import is_number, number_of
from rlhf_jax.data.rows import DroppedRow, Row, bad_row, require
from rlhf_jax.data.schemas import Answer, answer_of, both_answers, flag_of, float32_of, preference_row, single_answer
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError


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
            labels = [float(pair["label"] > 0.5), float(pair["label"] < 0.5)]
            return _singles(pair, encoder, both_answers(pair), [{"label": label} for label in labels])
        require(row, ("label",), "an unpaired preference is {prompt, response, label}")
        answer = answer_of(row)
        label = float(flag_of(row, "label"))
        return _singles(answer, encoder, [single_answer(answer)], [{"label": label}])

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
    if not is_number(row["rating"]):
        raise bad_row(row, f'"rating" is {row["rating"]!r}; give a finite number')
    return float32_of(row, "rating", row["rating"])


def rating_examples(rows: list[Row], tokenizer: Tokenizer, limits: Limits) -> tuple[list[Example], Report]:
    """[{response int32[n], prompt_length, rating, prompt_key}] of rows {prompt, response, rating}."""
    encoder = Encoder(tokenizer, limits)
    ratings: set[float] = set()

    def build(row: Row) -> tuple[list[Example], bool]:
        rating, answer = rating_of(row), answer_of(row)
        made = _singles(answer, encoder, [single_answer(answer)], [{"rating": rating}])
        ratings.add(number_of(row["rating"]))
        return made

    examples, report = collect(rows, build, strict=limits.strict, remarks=encoder.remarks)
    lost = len(ratings) - len({float(np.float32(rating)) for rating in ratings})
    remark = {"ratings that float32 cannot tell from another": lost} if lost else {}
    return examples, replace(report, remarks={**report.remarks, **remark})
