"""Rows to token examples, once, when data is loaded: what is dropped or cut is counted and said.

An example is a dict of small numpy arrays, and "where", the file and line it comes from. Lengths are in tokens; the
stop id counts. `Limits.too_long` is drop (counted), truncate (a prompt loses its start, a response its end and with it
the stop id), or error.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rlhf_jax.data import schemas
from rlhf_jax.data.layouts import ANSWERS, layout_of, unread_of
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.rows import DroppedRow, Row, where_of
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError, shown

Example = dict[str, Any]
OPEN_PACKS = 64  # sequences that `pack` keeps open: more fill better, but every row looks at all of them


@dataclass(frozen=True)
class Report:
    """What became of the rows: how many were kept, dropped for which reason, and cut; of which kinds they were.

    `remarks` counts what tokenising had to say, such as "responses whose ids were not of their text"; `unread` the
    rows that have a field that nothing reads, by its name.
    """

    kept: int
    dropped: dict[str, int]
    truncated: int
    kinds: dict[str, int] = field(default_factory=dict)
    note: str = ""
    remarks: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """For instance: kept 812 of 815 rows; dropped 3 with an empty turn; truncated 0; read as 815 preference."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "0"
        total = self.kept + sum(self.dropped.values())
        said = [f"kept {self.kept} of {total} rows", f"dropped {reasons}", f"truncated {self.truncated}"]
        if self.kinds:
            said.append("read as " + ", ".join(f"{count} {kind}" for kind, count in self.kinds.items()))
        said += [f"{count} {remark}" for remark, count in self.remarks.items()]
        if self.unread:
            said.append("fields not read: " + ", ".join(f"{shown(name)} of {n}" for name, n in self.unread.items()))
        return "; ".join([*said, self.note] if self.note else said)


def sft_examples(
    rows: list[Row], tokenizer: Tokenizer, limits: Limits, *, loss_on: str
) -> tuple[list[Example], Report]:
    """[{tokens int32[n], loss_mask bool[n]}] of sft or text rows; loss_mask[i]: token i is a target.

    `loss_on` is response, assistant (earlier answers in the prompt too), or all. The first token of an example is
    never a target, nothing stands before it to predict it from. A {text} row is a document: all of its tokens and the
    stop id are targets, and one longer than `max_length` becomes consecutive windows of `max_length` (a last window of
    one token has no target and is left).

    Raises:
        UserError: a bad row, one that the limits refuse, or no row left.
    """
    remarks = Counter[str]()

    def build(row: Row) -> tuple[list[Example], bool]:
        if layout_of(row) == "text":
            encoder = partial(tokenizer.encode_document, remarks=remarks)
            return _windows(encode(encoder, schemas.text_row(row), "text"), limits.max_length), False
        row = schemas.sft_row(row)
        ids = encode(partial(tokenizer.encode_prompt, remarks=remarks), row, "prompt")
        prompt, cut_prompt = limits.prompt(row, ids, tokenizer.bos_id)
        said = {"prompt": row["prompt"], "finished": row["finished"], "ids": row.get("ids"), "remarks": remarks}
        response = encode(partial(tokenizer.encode_response, **said), row, "response")
        response, cut_response = limits.response(row, len(prompt), response)
        is_target = np.full(len(prompt) + len(response), loss_on == "all")
        if loss_on == "assistant":  # a cut prompt keeps its end, and maybe a bos, which is no answer
            answers = np.asarray(encode(tokenizer.answers_in, row, "prompt"))
            is_target[: len(prompt)] = answers[len(ids) - len(prompt) :]
            is_target[0] &= not cut_prompt
        is_target[len(prompt) :] = _is_learned(row, loss_on)
        example = _sft_example(prompt + response, is_target)
        if not example["loss_mask"].any():
            raise UserError(f"{row['_where']}: no token of it is learned with sft.loss_on {loss_on}; remove the row")
        return [example], cut_prompt or cut_response

    return collect(rows, build, strict=limits.strict, remarks=remarks)


def prompt_examples(rows: list[Row], tokenizer: Tokenizer, limits: Limits) -> tuple[list[Example], Report]:
    """[{tokens int32[n], prompt: str, given, columns: dict}].

    `prompt` is the whole prompt as text, even if cut; `given` is it as the row has it, a text or messages; `columns`
    are the row's other fields.

    Raises:
        UserError: a bad row, one that the limits refuse, or no row left.
    """
    remarks = Counter[str]()
    encoder = partial(tokenizer.encode_prompt, remarks=remarks)

    def build(row: Row) -> tuple[list[Example], bool]:
        row = schemas.prompt_row(row)
        tokens, cut = limits.prompt(row, encode(encoder, row, "prompt"), tokenizer.bos_id)
        if not tokens:
            raise DroppedRow(f"{row['_where']}: the prompt has no tokens", "with an empty prompt")
        shown = {"prompt": tokenizer.prompt_text(row["prompt"]), "given": row["prompt"], "columns": columns_of(row)}
        return [{"tokens": np.asarray(tokens, np.int32), **shown}], cut

    return collect(rows, build, strict=limits.strict, remarks=remarks, columns=True)


def columns_of(row: Row) -> Row:
    """The fields of a prompt row that reward functions get as columns: all but the prompt."""
    return {name: value for name, value in row.items() if name not in ("prompt", "_where")}


def prompt_key(row: Row) -> str:
    """A text that is equal for rows with the same prompt, whatever the kind of row; never raises."""
    kind = layout_of(row)
    try:
        if kind == "text":
            prompt = row["text"]
        elif kind in ANSWERS:
            prompt = schemas.answer_of(row)["prompt"]
        else:
            prompt = row["prompt"] if "prompt" in row else schemas.preference_row(row)["prompt"]
    except UserError:  # a bad row: the loader that wants it reports it
        prompt = {name: value for name, value in row.items() if name != "_where"}
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=repr)


def split_by_prompt(rows: list[Row], eval_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, eval) rows; all rows of one prompt land on the same side, which only the prompt and `seed` decide.

    So a row stays on its side when others are added. A single text document is cut in two at a line break instead,
    its end held out.

    Raises:
        UserError: eval_fraction is outside [0, 1), or it is positive and a side ends empty.
    """
    if not 0 <= eval_fraction < 1:
        raise UserError(f"eval_fraction {eval_fraction} must be at least 0 and below 1; set data.eval_fraction")
    if eval_fraction == 0:
        return list(rows), []
    if len(rows) == 1 and layout_of(rows[0]) == "text" and isinstance(rows[0]["text"], str):
        return _cut_document(rows[0], eval_fraction)
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        digest = hashlib.blake2b(f"{seed} {prompt_key(row)}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        side = held_out if int.from_bytes(digest, "big") < eval_fraction * 2**64 else train
        side.append(row)
    if not train or not held_out:
        name, cure = ("training", "lower") if not train else ("held-out", "raise")
        raise UserError(
            f"eval_fraction {eval_fraction} of {len(rows)} rows leaves no {name} rows; "
            f"{cure} data.eval_fraction, or set data.eval_path to a file of held-out rows"
        )
    return train, held_out


def pack(examples: list[Example], length: int) -> list[Example]:
    """Whole examples side by side: [{tokens, loss_mask, segment_ids int32 from 1, positions int32}], at most `length`.

    Each goes into the first open sequence with room (first fit), so rows stay roughly in order. Positions restart at
    0 in every segment; attention must stay within equal segment_ids.

    Raises:
        UserError: an example is longer than `length`.
    """
    done: list[list[Example]] = []
    packs: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example["tokens"])
        if size > length:
            raise UserError(f"an example of {size} tokens does not fit into {length}; raise data.max_length")
        fits = next((i for i, free in enumerate(room) if size <= free), None)
        if fits is None:
            if len(packs) == OPEN_PACKS:
                fullest = room.index(min(room))
                done.append(packs.pop(fullest))
                room.pop(fullest)
            packs.append([])
            room.append(length)
            fits = -1
        packs[fits].append(example)
        room[fits] -= size
    return [_join(members) for members in done + packs]


def _join(members: list[Example]) -> Example:
    sizes = [len(example["tokens"]) for example in members]
    return {
        "tokens": np.concatenate([example["tokens"] for example in members]),
        "loss_mask": np.concatenate([example["loss_mask"] for example in members]),
        "segment_ids": np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes),
        "positions": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        "where": " ".join(dict.fromkeys(example["where"] for example in members)),
    }


def _cut_document(row: Row, eval_fraction: float) -> tuple[list[Row], list[Row]]:
    text = row["text"]
    middle = int(len(text) * (1 - eval_fraction))
    cut = text.rfind("\n", 0, middle) + 1 or middle
    if not text[:cut].strip() or not text[cut:].strip():
        raise UserError(
            f"{row.get('_where', 'a row')}: eval_fraction {eval_fraction} of one document of {len(text)} characters "
            "leaves one side empty; set data.eval_path to a file of held-out text"
        )
    return [{**row, "text": text[:cut]}], [{**row, "text": text[cut:]}]


def collect(
    rows: Sequence[Any],
    build: Callable[[Any], tuple[list[Example], bool]],
    *,
    strict: bool,
    note: str = "",
    remarks: Counter[str] | None = None,
    columns: bool = False,
) -> tuple[list[Example], Report]:
    """Examples of all rows and their report; build(row) -> (examples, whether something was cut).

    `remarks` is what `build` counts into. With `columns` all fields of a row are of use.

    Raises:
        UserError: a bad row, a dropped one if `strict`, or no row left.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    truncated = 0
    for row in rows:
        try:
            built, cut = build(row)
        except DroppedRow as drop:
            if strict:
                raise UserError(f"{drop} (data.strict is true)") from drop
            dropped[drop.reason] += 1
            continue
        examples += [{**example, "where": row.get("_where", "")} for example in built]
        truncated += cut
    kinds = Counter(schemas.kind_of(row) for row in rows if isinstance(row, dict))
    report = Report(
        len(rows) - sum(dropped.values()),
        dict(dropped),
        truncated,
        dict(kinds),
        note,
        dict(+remarks) if remarks else {},
        {} if columns else unread_in(rows),
    )
    if not examples:
        raise UserError(f"no row is left: {report}; raise data.max_length or mend the file")
    return examples, report


def unread_in(rows: Sequence[Any]) -> dict[str, int]:
    """Names of fields that nothing reads -> how many rows have them."""
    return dict(Counter(name for row in rows if isinstance(row, dict) for name in unread_of(row)))


def encode(encoder: Callable[[Any], Any], row: Row, name: str) -> Any:
    """encoder(row[name]); its error names the row."""
    try:
        return encoder(row[name])
    except UserError as error:
        raise UserError(f"{where_of(row)}: {error}") from error


def _is_learned(row: Row, loss_on: str) -> bool:
    """Whether the answer of an sft row is, by its `weight`.

    Raises:
        DroppedRow: it is not, and nothing else of the row.
        UserError: `loss_on` is all, which knows no weights.
    """
    turns = [turn for part in (row["prompt"], row["response"]) if not isinstance(part, str) for turn in part]
    if loss_on == "all" and any("weight" in turn for turn in turns):
        raise UserError(
            f'{row["_where"]}: a message has a "weight", which sft.loss_on all does not know; leave it out'
        )
    learned = not turns or bool(turns[-1].get("weight", 1))
    if not learned and loss_on == "response":
        raise DroppedRow(f"{row['_where']}: the answer has weight 0", "with an answer of weight 0")
    return learned


def _sft_example(tokens: list[int], is_target: np.ndarray) -> Example:
    return {"tokens": np.asarray(tokens, np.int32), "loss_mask": is_target & (np.arange(len(tokens)) > 0)}


def _windows(tokens: list[int], max_length: int) -> list[Example]:
    parts = [tokens[i : i + max_length] for i in range(0, len(tokens), max_length)]
    return [_sft_example(part, np.ones(len(part), bool)) for part in parts if len(part) > 1]
