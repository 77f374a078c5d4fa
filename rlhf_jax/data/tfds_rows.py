"""Rows from TFDS datasets and to one of our own, without TensorFlow. Imports TFDS when it is used."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data.ballots import ranking_row, rater_of, remarks_of
from rlhf_jax.data.encoding import naming
from rlhf_jax.data.fields import catalogue
from rlhf_jax.data.messages import Messages, Text
from rlhf_jax.data.rows import Row, bad_row
from rlhf_jax.data.schemas import columns_of, margins_unused, preference_row, prompt_row, sft_row
from rlhf_jax.errors import UserError, reason
from rlhf_jax.hosts.copies import DATASET
from rlhf_jax.hosts.json_text import to_json

UNSTORED = {
    "sft": ("id", "item", "rating", "rater"),
    "preference": ("id", "item"),
    "ranking": ("id", "item"),  # and margins, which are counted as everywhere where nothing uses them
}
"""Schema -> fields that rows of its kinds have by `rows.READ` and that are not stored."""

NAME = "feedback"
"""Name of our builder; its configs are the schemas."""


def is_prepared(path: str) -> bool:
    return (Path(path).expanduser() / DATASET).is_file()


def read_builder(name: str, split: str, data_dir: str | None = None) -> list[Row]:
    """Rows of a split of a builder by its name ("imdb_reviews", "reddit_tifu/long:1.1.2").

    Nothing is downloaded: it must be prepared, in the array_record format, in `data_dir`, else $TFDS_DATA_DIR or
    ~/tensorflow_datasets.

    Raises:
        UserError: no such builder, not prepared, prepared in another format, or no such split.
    """
    import tensorflow_datasets as tfds

    logging.getLogger("absl").addFilter(_no_folder_yet)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, ImportError) as error:
        why = str(error).strip().splitlines()[0]
        known = ", ".join(key.removeprefix("tfds:") for key in catalogue() if key.startswith("tfds:"))
        raise UserError(f"tfds:{name}: {why}; the catalogue here knows {known}") from error
    if not builder.is_prepared():
        command = f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        raise UserError(
            f"tfds:{name} is not prepared in {builder.data_dir}, and nothing is downloaded here; where there is "
            f'network run python -c "import tensorflow_datasets as tfds; {command}" and copy that directory'
        )
    return _read(builder, split, f"tfds:{name}@{split}")


def read_directory(path: str, split: str) -> list[Row]:
    """Rows of a split of a prepared directory; those that `rlhf-jax data prepare` wrote come back as they were.

    Raises:
        UserError: unreadable, another format than array_record, or no such split.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(Path(path).expanduser()))
    except Exception as error:  # TFDS raises anything from KeyError to protobuf errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no readable TFDS dataset ({reason}); prepare it again") from error
    rows = _read(builder, split, f"{path}@{split}")
    return [_restored(row) for row in rows] if builder.name == NAME else rows


def _no_folder_yet(record: logging.LogRecord) -> bool:
    return f"has no {DATASET}" not in record.getMessage()  # `is_prepared` says so, in our words


def _read(builder: Any, split: str, where: str) -> list[Row]:
    form = builder.info.file_format.value if builder.info.file_format else "unknown"
    if form != "array_record":
        raise UserError(f"{where}: prepared as {form}, which needs TensorFlow; prepare it with array_record")
    try:
        source = builder.as_data_source(split=split)
    except (ValueError, KeyError, AssertionError) as error:
        known = ", ".join(builder.info.splits) or "none"
        raise UserError(
            f"{where}: no such split, or an empty one; there are {known}, and slices such as train[:10%]"
        ) from error
    features = builder.info.features
    return [{**_plain(source[i], features), "_where": f"{where}:{i}"} for i in range(len(source))]


def _plain(value: Any, feature: Any) -> Any:
    """What TFDS decodes as plain Python: texts for bytes, lists of dicts for dicts of lists, numbers for arrays."""
    inner = getattr(feature, "feature", None)
    if inner is not None:  # a sequence, of dicts or of something else
        if isinstance(value, dict):
            value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
        return [_plain(item, inner) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item, feature[name]) for name, item in value.items()}
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):  # what is no text stays what it is
            return value.decode()
        return value
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def prepare(splits: dict[str, list[Row]], schema: str, out: str) -> Path:
    """Write normalised rows (see `stored`) as a TFDS dataset in array_record; returns its directory.

    `tfds.builder_from_directory` opens it anywhere, with or without this package.

    Raises:
        UserError: the disk is full, or a text is no Unicode.
    """
    import tensorflow_datasets as tfds

    from rlhf_jax.data.tfds_builder import Feedback

    tfds.disable_progress_bar()
    builder = Feedback(config=schema, data_dir=out, file_format="array_record")
    builder.rows = splits
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # TFDS wraps what the disk or a codec says in errors of its own
            cause = cause.__cause__
        raise UserError(f"{out}: the dataset could not be written ({reason(cause)}); nothing is there") from error
    return Path(builder.data_dir)


def stored(row: Row, schema: str, remarks: Counter[str] | None = None) -> Row:
    """A row checked and normalised for `prepare`, every field flat; what the schema does not know is left out.

    `remarks` counts what responses lose.
    """
    if schema == "sft":
        answer = sft_row(row)
        kept = {"response": _text(answer["response"]), "finished": answer["finished"]}
        return {**kept, "prompt": _turns(answer["prompt"]), **_flat([answer.get("ids")])}
    if schema == "preference":
        pair = preference_row(row)
        return {
            "chosen": _text(pair["chosen"]),
            "rejected": _text(pair["rejected"]),
            "finished": pair["finished"],
            "margin": pair["margin"],
            "votes": [float(count) for count in row.get("votes") or []],
            "rater": rater_of(row),
            "prompt": _turns(pair["prompt"]),
            **_flat(pair["ids"]),
        }
    if schema == "ranking":
        ranking = ranking_row(row)
        if any(ballot.times % 1 for ballot in ranking.ballots):
            message = '"votes" are no whole numbers, and a ranking is stored as whole ballots; store a preference'
            raise bad_row(row, message)
        if remarks is not None:
            others = (name for answer in ranking.answers for name in answer.extra)
            remarks.update(f'responses with "{name}", which is not stored' for name in others)
            remarks.update(remarks_of([row]) + margins_unused([row]))
        ballots = [ballot for ballot in ranking.ballots for _ in range(int(ballot.times))]
        return {
            "prompt": _turns(ranking.prompt),
            "responses": [_text(response) for response in ranking.responses],
            "finished": [answer.finished for answer in ranking.answers],
            "raters": [ballot.rater for ballot in ballots],
            "ranks": [rank for ballot in ballots for rank in ballot.ranks],
            **_flat([answer.ids for answer in ranking.answers]),
        }
    row = prompt_row(row)
    with naming(row):
        return {"prompt": _turns(row["prompt"]), "columns": to_json(columns_of(row))}


def _turns(prompt: Text) -> Messages:
    """A prompt as messages of role and content alone; a text is one of no role."""
    if isinstance(prompt, str):
        return [{"role": "", "content": prompt}]
    if more := {name for turn in prompt for name in turn} - {"role", "content"}:
        raise UserError(f'a message has "{min(more)}", and TFDS rows keep role and content alone; use JSON lines')
    return prompt


def _text(response: Text) -> str:
    """What a response says, which must be all there is of it."""
    return _turns(response)[-1]["content"]


def _flat(ids: Sequence[list[int] | None]) -> Row:
    """The ids of several responses side by side, and how many each has; -1 where there are none."""
    counts = [-1 if each is None else len(each) for each in ids]
    return {"ids": [i for each in ids for i in each or []], "num_ids": counts}


def _restored(row: Row) -> Row:
    """A stored row as `rlhf_jax.data.schemas` takes it; the inverse of `stored`."""
    turns = row["prompt"]
    prompt = turns[0]["content"] if [turn["role"] for turn in turns] == [""] else turns
    if "columns" in row:
        return {**json.loads(row["columns"]), "prompt": prompt, "_where": row["_where"]}
    size = len(row["responses"]) if "raters" in row else 1 + ("votes" in row)
    flat, counts = iter(row.get("ids", [])), row.get("num_ids", [-1] * size)  # earlier versions stored none
    ids = [None if count < 0 else list(islice(flat, count)) for count in counts]
    if "raters" in row:
        ranks = [None if rank != rank else rank for rank in row["ranks"]]
        ballots = [ranks[start : start + size] for start in range(0, len(ranks), size)]
        items = [
            {"text": text, "finished": finished, **({} if sampled is None else {"ids": sampled})}
            for text, finished, sampled in zip(row["responses"], row["finished"], ids, strict=True)
        ]
        raters = [{"rater": name, "ranks": ranks} for name, ranks in zip(row["raters"], ballots, strict=True)]
        return {"prompt": prompt, "responses": items, "raters": raters, "_where": row["_where"]}
    kept = {k: v for k, v in row.items() if k not in ("ids", "num_ids") and (v or k not in ("votes", "rater"))}
    names = ("chosen_ids", "rejected_ids") if "votes" in row else ("response_ids",)
    given = {name: sampled for name, sampled in zip(names, ids, strict=True) if sampled is not None}
    return {**kept, "prompt": prompt, **given}
