"""Rows as plain dicts, each knowing where it came from, so that a bad row is reported as file:line."""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config.settings import HUB
from rlhf_jax.data import hub_rows, tfds_rows
from rlhf_jax.data.fields import entry_of, map_row, parse_fields
from rlhf_jax.data.rows import EXTENSIONS, Row, layout_of
from rlhf_jax.data.shapes import shaped
from rlhf_jax.data.votes import join_votes
from rlhf_jax.errors import UserError, reason, shown
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.copies import local
from rlhf_jax.hosts.files import is_stream
from rlhf_jax.hosts.json_text import once
from rlhf_jax.hosts.outputs import there

NOT_TEXT = {"label", "rating", "votes", "margin", "finished", "responses", "messages", "conversations", "ranks"}
"""Columns of .csv files whose cells are JSON; all others are texts."""
LARGEST_MIXTURE = 10**8
"""Rows of one source in an epoch, copies counted."""
DOCUMENT_END = "<|endoftext|>"


class File(NamedTuple):
    """A file of rows.

    Attributes:
        name: what messages call it.
        path: where it, or a copy of it, lies on this machine.
    """

    name: str
    path: Path

    def __str__(self) -> str:
        return self.name


def rows_from(source: Any, fields: Sequence[str] = ()) -> list[Row]:
    """Rows of a path (see `read_rows`) or of an iterable of dicts, as new dicts; the caller's are never changed.

    `fields` maps them, as ["prompt={question}", "response={answer}"] (see `rlhf_jax.data.fields`). Without it, those
    of sets in the catalogue are mapped as it says, and rows of Alpaca's and ShareGPT's shapes become ours
    (`shapes.shaped`).

    Lists, generators, arrays of objects, Hugging Face datasets and pandas frames will do. Rows get "_where" = "row i",
    i from 0. Votes on one item become one row (`join_votes`).

    Raises:
        UserError: nothing to read, or an element is not a dict.
    """
    if fields:
        templates = parse_fields(fields)
        return [map_row(row, templates) for row in join_votes(_rows_as_they_are(source))]
    rows, known = _rows_as_they_are(source), entry_of(source).get("fields") if isinstance(source, str) else None
    return join_votes([shaped(map_row(row, known) if known else row) for row in rows])


def _rows_as_they_are(source: Any) -> list[Row]:
    if isinstance(source, (str, os.PathLike)):
        return read_rows(os.fspath(source))
    try:
        rows = [_as_row(f"row {i}", row) for i, row in enumerate(_elements(source))]
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a generator or a lazy data set raises
        raise UserError(f"the rows cannot be read ({type(error).__name__}: {reason(error)})") from error
    if not rows:
        raise UserError("the list of rows is empty; give at least one row")
    return rows


def _elements(source: Any) -> Iterable[object]:
    if hasattr(source, "to_dict") and hasattr(source, "iloc"):  # a pandas frame, or a part of one
        if not hasattr(source, "columns"):
            raise UserError("a pandas Series is one column; give the frame, which has a name for each")
        if any(name is not None for name in source.index.names):
            source = source.reset_index()  # what groupby and set_index moved there is a column too
        if len(names := list(source.columns)) > len(set(names)):
            raise UserError(f"the frame has two columns {shown(max(names, key=names.count))}; rename one")
        return source.astype(object).where(source.notna(), None).to_dict("records")  # NaN is pandas' null
    if hasattr(source, "to_dicts") and hasattr(source, "columns"):  # polars
        return source.to_dicts()
    if isinstance(source, Mapping):
        cure = "give one, as rows=data['train']" if all(hasattr(v, "column_names") for v in source.values()) else ""
        what = f"splits {', '.join(map(str, source))}" if cure else "a dict, which is one row or one table"
        raise UserError(f"rows are a list of dicts, not {what}; {cure or 'give [{...}, ...]'}")
    if isinstance(source, (bytes, bytearray, Set)) or not (
        isinstance(source, Iterable) or (hasattr(source, "__len__") and hasattr(source, "__getitem__"))
    ):
        raise UserError(f"rows come from a path or a list of dicts, not from a {type(source).__name__}")
    if getattr(source, "ndim", 1) != 1:
        raise UserError(f"rows are a list of dicts, not an array of {source.ndim} dimensions")
    return source if isinstance(source, Iterable) else (source[i] for i in range(len(source)))


def _as_row(where: str, row: object) -> Row:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a {type(row).__name__}, not a dict; give rows such as {{'prompt': ...}}")
    if odd := [name for name in row if not isinstance(name, str)]:
        raise UserError(f"{where}: the column {shown(odd[0])} has no name; give each a text")
    return {"_where": where, **row}


def mix(sources: Sequence[list[Row]], weights: Sequence[float], seed: int) -> list[Row]:
    """Rows of several sources in the ratio of `weights`: all of the one largest for its weight, the others repeated.

    Sizes 100 and 30 with weights 1 and 1 give 100 rows of each: the second three times, and 10 rows that `seed` draws.

    Raises:
        UserError: weights so unequal that an epoch has more than LARGEST_MIXTURE rows of one source.
    """
    rng = np.random.default_rng(seed)
    size = max(len(rows) / weight for rows, weight in zip(sources, weights, strict=True))
    if not (largest := size * max(weights)) <= LARGEST_MIXTURE:
        raise UserError(
            f"data.mixture_weights {list(weights)} make an epoch of {largest:.3g} rows of one source, over "
            f"{LARGEST_MIXTURE:.3g}; make them less unequal, or leave a source out"
        )
    mixed = []
    for rows, weight in zip(sources, weights, strict=True):
        whole, rest = divmod(round(size * weight), len(rows)) if rows else (0, 0)
        mixed += rows * whole + [rows[i] for i in rng.permutation(len(rows))[:rest]]
    return mixed


def read_rows(path: str) -> list[Row]:
    """The rows of a source, each with an extra key "_where" = "file:line" (lines and rows count from 1).

    "tfds:NAME@SPLIT" is a TFDS builder that is prepared on this machine, a directory "DIR@SPLIT" one that holds a
    prepared dataset; the split is train unless it is named and may be a slice, as train[:10%]. All else is a file.

    A file or such a directory may lie in a bucket, as gs://bucket/name. hf://datasets/OWNER/NAME/FILE is a file of a
    dataset of the Hugging Face Hub, with NAME@REVISION that of another revision than main, and
    hf://datasets/OWNER/NAME@SPLIT all files of one of its splits, train unless it is named.

    .jsonl and .jsonl.gz give one dict per line, blank lines skipped; .json a list of dicts, or an object that holds
    one list of them, as {"data": [...]}. .csv and .tsv name their columns in the first line; cells are texts, null
    where they are empty, but JSON in the columns NOT_TEXT, and left out there. .txt and .txt.gz give rows {"text":
    document}: documents end at lines that hold exactly <|endoftext|>, and lose the line breaks at their two ends.
    .parquet needs pyarrow.

    Raises:
        UserError: missing, empty, unreadable, truncated, not UTF-8, of unknown extension, or not one object per line.
    """
    path = os.path.expanduser(path)
    try:
        rows = list(_read(path))
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # a reader of some format, on bytes that nobody has thought of
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {reason(error)}); write it again") from error
    if not rows:
        raise UserError(f"{path}: the file is empty; give one with at least one row")
    return rows


def _read(path: str) -> Iterable[Row]:
    """The rows of what a path names: the path itself if it is there, else what stands before its last @, a split."""
    if path.startswith(HUB):
        return chain.from_iterable(_of_file(File(name, place)) for name, place in hub_rows.files_of(path))
    where, _, split = (path, "", "") if "@" not in path or there(path) else path.rpartition("@")
    if path.startswith("tfds:"):
        return tfds_rows.read_builder(where.removeprefix("tfds:"), split or "train")
    place = str(local(where)) if in_bucket(where) else where
    if tfds_rows.is_prepared(place):
        return tfds_rows.read_directory(place, split or "train")
    return _of_file(File(path, _existing(place if in_bucket(path) else path)))


def _of_file(file: File) -> Iterable[Row]:
    name = file.name.lower()
    if not name.endswith(EXTENSIONS):
        raise UserError(f"{file}: unknown extension; known are {', '.join(EXTENSIONS)}")
    readers = {".parquet": _parquet, ".txt": _documents, ".json": _array, ".csv": _table, ".tsv": _table}
    return readers.get(Path(name.removesuffix(".gz")).suffix, _objects)(file)


def _existing(path: str) -> Path:
    """`path` as a Path to an existing file; the error names the closest file beside it."""
    if not path:
        raise UserError(f"no path of a data file is given; set data.path to a {' or '.join(EXTENSIONS)} file")
    file = Path(path)
    if "\0" in path:
        raise UserError(f"{path}: a file has no such name; check the path")
    if is_stream(file):
        raise UserError(f"{path}: a pipe or a device, which is read once at most; write it to a file first")
    if file.is_dir():
        raise UserError(f"{path}: a directory without a TFDS dataset; name one {', '.join(EXTENSIONS)} file in it")
    if file.is_file():
        return file
    if not file.parent.is_dir():
        raise UserError(f"{path}: no such file, and no directory {file.parent}; check the path")
    close = difflib.get_close_matches(file.name, os.listdir(file.parent), n=1)
    hint = f"did you mean {file.parent / close[0]}?" if close else f"{file.parent} has no file of a similar name"
    raise UserError(f"{path}: no such file; {hint}")


def _lines(file: File) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its line feed) of a plain or gzipped file."""
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opener(file.path, "rb") as stream:
            # Bytes are split before decoding, so that an invalid byte has a line number, and so that U+2028 inside a
            # JSON string does not end the line.
            for number, raw in enumerate(stream, 1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                yield number, raw.decode(encoding).removesuffix("\n")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 ({error.reason} at byte {error.start} of the line)"
        raise UserError(f"{file}:{number}: {what}; save it as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        message = f"{file}: broken gzip after line {number} ({error}); download or compress it again"
        raise UserError(message) from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error


def _objects(file: File) -> Iterator[Row]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:  # nested too deeply, too long a number
            why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else reason(error)
            raise UserError(f"{where}: not JSON ({why}); write one object per line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON {type(row).__name__}, not an object; write one object per line")
        yield {**row, "_where": where}


def _array(file: File) -> Iterator[Row]:
    """The objects of a .json file; one that holds a line for each, as a .jsonl does, is read as that."""
    text = "\n".join(line for _, line in _lines(file))
    try:
        value = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _objects(file)
            return
        raise UserError(f"{file}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); mend it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({reason(error)}); mend it") from error
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        value = lists[0] if len(lists) == 1 and layout_of(value) == "unknown" else [value]
    if not isinstance(value, list):
        raise UserError(f"{file}: a JSON {type(value).__name__}; write a list of objects, as [{{...}}, ...]")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: a JSON {type(row).__name__}, not an object; write a list of objects")
        yield {**row, "_where": f"{file}:{number}"}


def _table(file: File) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if file.name.lower().endswith(".tsv") else ","
    reader = csv.reader((f"{line}\n" for _, line in _lines(file)), delimiter=delimiter, strict=True)
    cells_of = _strictly(file, reader)
    names = next(cells_of, [])
    if len(set(names)) < len(names):  # a row has one value for a name
        raise UserError(f"{file}: there are two columns {shown(max(names, key=names.count))}; rename one")
    for cells in cells_of:
        if not cells:
            continue
        where = f"{file}:{reader.line_num}"
        if len(cells) != len(names):
            raise UserError(
                f"{where}: {len(cells)} cells under {len(names)} names; put texts with {delimiter!r} in quotes"
            )
        kept = {n: _cell(where, n, c) for n, c in zip(names, cells, strict=True) if c or n not in NOT_TEXT}
        yield {**kept, "_where": where}


def _strictly(file: File, reader: Any) -> Iterator[list[str]]:
    """The cells of each line; a quote that is not closed where a cell ends would make one row of several."""
    try:
        yield from reader
    except csv.Error as error:
        cure = "close each quote at the end of its cell, and double one within"
        raise UserError(f"{file}:{reader.line_num}: {reason(error)}; {cure}") from error


def _cell(where: str, name: str, cell: str) -> object:
    if name not in NOT_TEXT:
        return cell or None
    try:
        return json.loads(cell.lower() if cell.lower() in ("true", "false") else cell)
    except ValueError as error:
        raise UserError(f'{where}: "{name}" is {shown(cell)}; write JSON there, such as true, 3 or [1, 0]') from error


def _parquet(file: File) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(
            f"{file}: Parquet needs pyarrow; pip install pyarrow, or convert the file to .jsonl"
        ) from error
    try:
        table = parquet.read_table(file.path)
    except (ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{file}: no readable Parquet ({reason}); download it again") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield {**row, "_where": f"{file}:{number}"}


def _documents(file: File) -> Iterator[Row]:
    """The documents of a text file; those of white space only are skipped."""
    start = 1
    lines: list[str] = []
    for number, line in chain(_lines(file), [(0, DOCUMENT_END)]):
        if line.removesuffix("\r") != DOCUMENT_END:
            lines.append(line)
            continue
        if (text := "\n".join(lines).strip("\r\n")).strip():
            yield {"text": text, "_where": f"{file}:{start}"}
        start, lines = number + 1, []
