"""Responses of a batch side by side in sequences of one length, a prompt once before several responses to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.collate import Batch, padded
from rlhf_jax.data.encoding import Example
from rlhf_jax.tokens import Packed

PADDED = ("tokens", "segment_ids", "positions", "last")
"""What `Packed` replaces in a batch of responses."""

MOST = 16
"""Texts behind one prompt that `pack_texts` puts into a segment."""

TIMES = 4
"""Padded rows that a sequence is made for, at most."""

Group = tuple[int, ...]
"""Places of an example's responses that stand in one segment, behind one copy of their prompt."""


@dataclass(frozen=True)
class Packing:
    """The shape of packed batches, one for any lengths.

    Attributes:
        sequences: M, of a microbatch over all devices.
        microbatches: N, as many as any lengths may need.
        length: S, columns of a sequence.
        shared: a prompt stands once before as many of its responses as a sequence holds.
    """

    sequences: int
    microbatches: int
    length: int
    shared: bool

    @classmethod
    def of(cls, rows: int, needed: int, length: int, *, tokens: int, most: int, ways: int, shared: bool) -> Packing:
        """For `rows` examples that need up to `needed` sequences of `length` each, and `ways` parts of the mesh.

        A microbatch has about `tokens` tokens in each part, at least one sequence, and at most `most` sequences in
        all, unless one example alone needs more.
        """
        sequences = max(min(ways * max(tokens // length, 1), most), needed)
        sequences = -(-sequences // ways) * ways
        return cls(sequences, -(-rows // (sequences // needed)), length, shared)


def pack_responses(batch: Batch, packing: Packing) -> Batch:
    """A batch of responses [B, K, S] as `collate` makes it, with `packed` (row b K + k) in place of its sequences.

    All responses of an example are in one microbatch, so that a loss over them sees them all. Examples go, longest
    first, into the first microbatch with room, each of their segments into the first sequence with room. An example
    that needs more sequences than the packing is made for may find none, a ValueError.
    """
    rows, width, _ = batch["tokens"].shape
    shape = (packing.sequences, packing.microbatches, packing.length)
    names = "tokens", "positions", "segment_ids", "place", "branches"
    arrays: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in names}
    arrays["row"], arrays["ends"] = np.full(shape, rows * width, np.int32), np.zeros(shape, bool)
    sizes, prompts = (batch["segment_ids"] > 0).sum(axis=-1), batch["prompt_lengths"]
    groups, columns = _segments(batch, packing.length, packing.shared)
    for b, i, (sequence, microbatch), start in _first_fit(columns, packing):
        at = sequence, microbatch, slice(start, start + columns[b][i])
        number = arrays["segment_ids"][sequence, microbatch].max() + 1
        said = _segment(batch["tokens"][b], sizes[b], int(prompts[b]), groups[b][i])
        for name, value in {**said, "row": np.where(said["row"] < 0, rows * width, b * width + said["row"])}.items():
            arrays[name][at] = value
        arrays["segment_ids"][at] = number
    if not packing.shared or width == 1:
        arrays.pop("branches")
    rest = {name: value for name, value in batch.items() if name not in PADDED}
    return {**rest, "packed": Packed(**arrays, num_rows=rows * width)}


def sequences_needed(batch: Batch, length: int, *, shared: bool) -> int:
    """The most sequences of `length` columns that one example of a batch of responses needs by itself."""
    most = 1
    for sizes in _segments(batch, length, shared)[1]:
        room: list[int] = []
        for size in sorted(sizes, reverse=True):
            to = next((i for i, left in enumerate(room) if left >= size), len(room))
            room[to : to + 1] = [(room[to] if to < len(room) else length) - size]
        most = max(most, len(room))
    return most


def pack_texts(examples: Sequence[Example], length: int, sequences: int) -> list[Packed]:
    """Views [`sequences`, `length`] that hold {tokens, loss_mask} examples, row i example i; equal prompts stand once.

    The response of an example begins at its first target; what stands before is its prompt, and never asked for.
    """
    tokens = [example["tokens"] for example in examples]
    starts = [max(int(np.argmax(example["loss_mask"])), 1) for example in examples]
    segments = _equal_prompts(tokens, starts, length)
    width = max(map(len, segments))
    of_row = np.full(len(segments) * width + 1, len(examples), np.int32)  # the last: columns of no row
    for number, members in enumerate(segments):
        of_row[number * width : number * width + len(members)] = members
    empty = np.zeros(0, np.int32)
    read = padded([*(tokens[i] if i < len(examples) else empty for i in of_row[:-1])], length, 0)
    batch = {name: read[name].reshape(len(segments), width, length) for name in ("tokens", "segment_ids")}
    batch["prompt_lengths"] = np.array([starts[members[0]] for members in segments])
    packing = Packing.of(len(segments), 1, length, tokens=sequences * length, most=sequences, ways=1, shared=True)
    packed: Packed = pack_responses(batch, packing)["packed"]
    packed = replace(packed, row=of_row[packed.row], num_rows=len(examples))
    used = int((packed.segment_ids > 0).any(axis=(0, 2)).sum())
    return [jax.tree.map(lambda x, i=i: x[:, i], packed) for i in range(used)]


def _equal_prompts(tokens: Sequence[np.ndarray], starts: Sequence[int], length: int) -> list[list[int]]:
    """The texts in segments: those of one prompt together, at most MOST and what fits into `length`."""
    open_: dict[bytes, tuple[list[int], int]] = {}
    segments: list[list[int]] = []
    for i, (ids, start) in enumerate(zip(tokens, starts, strict=True)):
        prompt = ids[:start].tobytes()
        members, columns = open_.get(prompt, ([], 0))
        more = columns + len(ids) - (start - 1 if members else 0)
        if not members or len(members) == MOST or more > length:
            members, more = [], len(ids)
            segments.append(members)
        members.append(i)
        open_[prompt] = members, more
    return segments


def fill(batches: Sequence[Batch], length: int) -> tuple[float, float]:
    """Of packed batches: columns that are computed, and real ones, as shares of those of rows padded to `length`."""
    packed: list[Packed] = [batch["packed"] for batch in batches]
    used = sum(int((x.segment_ids > 0).any(axis=(0, 2)).sum()) * x.tokens[:, 0].size for x in packed)
    real = sum(int((x.segment_ids > 0).sum()) for x in packed)
    whole = sum(x.num_rows * length for x in packed)
    return used / whole, real / whole


def cheapest_packing(
    make: Callable[[Batch, Packing], Batch],
    of: Callable[[int, int], Packing],
    some: Sequence[Batch],
    everything: Iterable[Batch],
    *,
    times: int,
    width: int,
) -> tuple[Callable[[Batch], Batch], list[Batch]]:
    """What packs `some` batches so that they cost a network of a width least, and these packed.

    `of`(n, m) is a packing for examples of `everything`, of which none needs more than n sequences (0: any number),
    each for m padded rows; m is at most `times` and TIMES.
    """
    length = some[0]["tokens"].shape[-1]
    needed = dict.fromkeys(range(1, max(min(times, TIMES), 1) + 1), 0)
    if any(of(0, m).sequences > of(1, m).sequences for m in needed):  # an example may need fewer than K full rows do
        for batch in everything:
            needed = {m: max(most, sequences_needed(batch, m * length, shared=True)) for m, most in needed.items()}

    def tried(packing: Packing) -> tuple[float, Callable[[Batch], Batch], list[Batch]]:
        pack = lambda batch: make(batch, packing)  # noqa: E731
        packed = list(map(pack, some))
        return fill(packed, length)[0] * (1 + packing.length / (6 * width)), pack, packed

    return min((tried(of(n, m)) for m, n in needed.items()), key=lambda one: one[0])[1:]


def _segments(batch: Batch, length: int, shared: bool) -> tuple[list[list[Group]], list[list[int]]]:
    """Of every example of a batch of responses, its responses by segments and the columns of each segment."""
    rows, _, padded = batch["tokens"].shape
    sizes, prompts = (batch["segment_ids"] > 0).sum(axis=-1), batch["prompt_lengths"]
    behind = (np.arange(padded) >= prompts[:, None, None]) | (sizes == 0)[:, :, None]  # or an empty place
    same = behind | (batch["tokens"] == batch["tokens"][:, :1])
    once = shared & same.all(axis=(1, 2)) & (prompts > 1)
    groups = [_groups(sizes[b], prompts[b], length, once[b]) for b in range(rows)]
    return groups, [[_columns(sizes[b], prompts[b], group) for group in groups[b]] for b in range(rows)]


def _groups(sizes: np.ndarray, prompt: int, length: int, shared: bool) -> list[Group]:
    """An example's responses by segments: together as long as they fit, or each its own; none for empty places."""
    groups: list[Group] = []
    for k in np.flatnonzero(sizes).tolist():
        if shared and groups and _columns(sizes, prompt, (*groups[-1], k)) <= length:
            groups[-1] = (*groups[-1], k)
        else:
            groups.append((k,))
    return groups


def _columns(sizes: np.ndarray, prompt: int, group: Group) -> int:
    """Of a segment: the prompt but for its last token, then each response behind a copy of that token."""
    return int(sizes[list(group)].sum()) - (len(group) - 1) * (int(prompt) - 1)


def _first_fit(columns: list[list[int]], packing: Packing) -> Iterator[tuple[int, int, tuple[int, int], int]]:
    """(example, its segment, (sequence, microbatch), first column) of every segment.

    Where an example does not fit beside others, its segments go into empty sequences alone, of which a microbatch that
    holds fewer examples than it must has enough.
    """
    length = packing.length
    room = np.full((packing.microbatches, packing.sequences), length)
    most = room.max(axis=1)  # that one sequence of each microbatch has left
    for b in np.argsort([-sum(sizes) for sizes in columns], kind="stable").tolist():
        order = np.argsort([-size for size in columns[b]], kind="stable").tolist()
        found = False
        for n in np.flatnonzero(most >= max(columns[b], default=0)).tolist():
            for usable in (room[n], np.where(room[n] == length, length, 0)):
                left, placed = usable.copy(), []
                for i in order:
                    to = int(np.argmax(left >= columns[b][i]))
                    placed.append((b, i, (to, n), length - int(left[to])))
                    left[to] -= columns[b][i]
                if found := bool(left.min() >= 0):
                    room[n] -= usable - left
                    most[n] = room[n].max()
                    yield from placed
                    break
            if found:
                break
        if not found:
            raise ValueError(f"an example of segments {columns[b]} finds no room; make the packing for its needs")


def _segment(tokens: np.ndarray, sizes: np.ndarray, prompt: int, group: Group) -> dict[str, np.ndarray]:
    """Of a segment's columns: tokens, positions, branches, row (place k of its response, -1 none), place, ends.

    Prompt [p, q] and responses [a, b], [c] are p, q a b, q c: every response begins with its own copy of q, which
    predicts its first token. A prompt of one token is such a copy alone.
    """
    shared = max(prompt - 1, 0)
    parts = [(tokens[group[0], :shared], np.arange(shared), 0, -1)]
    parts += [(tokens[k, shared : sizes[k]], np.arange(shared, sizes[k]), i, k) for i, k in enumerate(group, 1)]
    positions = np.concatenate([at for _, at, _, _ in parts])
    lengths = [len(ids) for ids, _, _, _ in parts]
    row = np.repeat([k for _, _, _, k in parts], lengths)
    return {
        "tokens": np.concatenate([ids for ids, _, _, _ in parts]),
        "positions": positions,
        "branches": np.repeat([branch for _, _, branch, _ in parts], lengths),
        "row": row,
        "place": np.where(row < 0, 0, positions - prompt + 1),
        "ends": np.append(row[1:] != row[:-1], True) & (row >= 0),
    }
