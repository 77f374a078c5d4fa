"""Training and held-out rows of a config, as examples and batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rlhf_jax.config import DataConfig
from rlhf_jax.config.rates import BATCH
from rlhf_jax.data.collate import Batch, Collate, eval_batches
from rlhf_jax.data.encoding import Example, Report, mark_of
from rlhf_jax.data.examples import prompt_key, row_key, split_by_prompt
from rlhf_jax.data.rows import Row
from rlhf_jax.data.sources import mix, rows_from
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import say

Rows = str | Sequence[Row]
"""A path or the rows themselves, as `sources.rows_from` takes them."""


def load_rows(data: DataConfig, rows: Rows | None, eval_rows: Rows | None, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, from the arguments where given, else from the paths of the config."""
    if rows is None and not data.path:
        raise UserError("data.path is empty; give a .jsonl, .jsonl.gz, .txt, .txt.gz or .parquet file")
    sources = [rows_from(source, data.fields) for source in (data.path if rows is None else rows, *data.mixture)]
    train = [row for source in sources for row in source]
    if eval_rows is not None or data.eval_path:
        held_out = rows_from(data.eval_path if eval_rows is None else eval_rows, data.fields)
        _say_shared(train, held_out)
    else:
        train, held_out = split_by_prompt(train, data.eval_fraction, seed)
    if data.mixture_weights:
        kept = set(map(id, train))
        parts = [[row for row in s if id(row) in kept] for s in sources]
        train = mix(parts, data.mixture_weights, seed)
        times = Counter(map(id, train))
        counts = ", ".join(f"{sum(times[id(row)] for row in part)} from {len(part)}" for part in parts)
        say(f"mixture: rows of an epoch from rows of each source: {counts}")
    return train, held_out


def _say_shared(train: list[Row], held_out: list[Row]) -> None:
    """Say how many held-out rows are not: they, or their prompts, are among the training rows."""
    asked = Counter(map(prompt_key, held_out))
    again = [(key, row) for row in train if (key := prompt_key(row)) in asked]
    if count := sum(asked[key] for key in {key for key, _ in again}):
        whole = {row_key(row) for _, row in again}
        same = sum(row_key(row) in whole for row in held_out)
        what = f"{count} of {len(held_out)} have a prompt of the training rows, {same} are equal to one of these"
        say(f"{mark_of(same, len(held_out))}held-out rows: {what}; what they measure is not held out")


def batch_of(data: DataConfig, multiple: int) -> int:
    """data.batch_size; where it is 0, BATCH or the next multiple."""
    return data.batch_size or -(-BATCH // multiple) * multiple


def filled_batch(data: DataConfig, count: int, multiple: int) -> int:
    """`batch_of`; if it is 0 in the config and `count` examples are fewer, the largest multiple that they fill."""
    size, fewer = batch_of(data, multiple), count // multiple * multiple
    if data.batch_size or count >= size or not fewer:
        return size
    say(f"data.batch_size {fewer}, since {count} training examples do not fill a batch of {size}, the default")
    return fewer


def held_out_batches(data: DataConfig, examples: list[Example], collate: Collate) -> list[Batch]:
    """The held-out examples in order, at most data.eval_batches batches; says how many are never looked at."""
    if not examples:
        return []
    batches = eval_batches(examples, batch_size=data.batch_size, collate=collate, limit=data.eval_batches)
    if (left := len(examples) - len(batches) * data.batch_size) > 0:
        say(f"held-out examples: the last {left} of {len(examples)} are not evaluated (data.eval_batches)")
    return batches


def length_buckets(data: DataConfig) -> list[int]:
    """The lengths that training batches are padded to, or none where all are padded to data.max_length."""
    return [*data.length_buckets, data.max_length] if data.length_buckets else []


def make_examples(
    build: Callable[[list[Row]], tuple[list[Example], Report]], train: list[Row], held_out: list[Row]
) -> tuple[list[Example], list[Example], list[str]]:
    """Token examples of both splits, and what to say again at the end; what was kept, dropped and cut is printed."""
    examples, report = build(train)
    say(f"{report.mark}training rows: {report}")
    again = [f"most training rows were not read: {report}"] if report.kept < report.lost else []
    if not held_out:
        say("held-out rows: none (data.eval_fraction 0), so nothing is evaluated and the last weights are kept")
        return examples, [], again
    eval_examples, report = build(held_out)
    say(f"{report.mark}held-out rows: {report}")
    return examples, eval_examples, again
