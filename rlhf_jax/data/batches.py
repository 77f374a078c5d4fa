"""Examples to numpy batches: B examples in, arrays of one shape out, the same for a step whenever it is asked for.

Shapes: B rows, S = `length` tokens, P = prompt bucket. Sequences are right-padded, prompts left-padded. What is real
is said by segment_ids (0 = padding), mask and last, never by token ids: pad_id may be a stop id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.examples import Example
from rlhf_jax.errors import UserError

Batch = dict[str, Any]
Collate = Callable[..., Batch]
"""examples -> batch; where lengths come in buckets it takes `length=` too."""


class Batches:
    """`batches[step]`: the batch of a step, a pure function of (examples, seed, step); `len` is steps per epoch.

    Every epoch has a fresh order and drops N % B rows. Resuming is indexing at a later step. With `buckets`, rows of
    similar length share a batch, which is padded to the smallest bucket that holds them: an epoch's order is cut into
    batches bucket by bucket, what does not fill one goes on to the next longer bucket, and the batches are shuffled.
    With several processes, each collates the whole global batch, so that weights sum to one over all and all pad to
    the same shape; `sharding.put` then takes the rows that a process's devices hold, on any mesh.
    """

    __iter__ = None  # steps never end: iterating by [0], [1], ... would not stop

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        collate: Collate,
        buckets: Sequence[int] = (),
    ):
        """Check the sizes and build the grain pipeline.

        Raises:
            UserError: no or fewer examples than `batch_size`, a seed that grain cannot use, or an example longer than
                the last bucket.
        """
        import grain

        if len(examples) < batch_size:
            raise UserError(
                f"{len(examples)} examples do not fill one batch of {batch_size}; "
                f"set data.batch_size to at most {len(examples)}, or give more rows"
            )
        if not 0 <= seed < 2**32:
            raise UserError(f"seed {seed} is outside 0 .. 2**32 - 1; set run.seed within it")
        self._steps = len(examples) // batch_size
        self._examples, self._seed, self._size = examples, seed, batch_size
        self._collate = collate
        source = grain.MapDataset.source(range(len(examples))).seed(seed).shuffle()
        if not buckets:
            source = source[: self._steps * batch_size]
        self._order = source.repeat(reseed_each_epoch=True)
        self._buckets = sorted(buckets)
        self._bucket = [_bucket(example, self._buckets) for example in examples] if buckets else []
        self._planned: tuple[int, list[tuple[int, list[int]]]] = (-1, [])

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        length, rows = self._rows_of(int(step))
        options = {"length": length} if length else {}
        return self._collate([self._examples[i] for i in rows], **options)

    def _rows_of(self, step: int) -> tuple[int, list[int]]:
        """(bucket, or 0 without, indices of the examples) of the global batch of a step."""
        if not self._buckets:
            return 0, [self._order[step * self._size + i] for i in range(self._size)]
        epoch, place = divmod(step, self._steps)
        if self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        return self._planned[1][place]

    def _plan(self, epoch: int) -> list[tuple[int, list[int]]]:
        """Every batch of an epoch."""
        waiting: dict[int, list[int]] = {bucket: [] for bucket in self._buckets}
        for i in range(epoch * len(self._examples), (epoch + 1) * len(self._examples)):
            index = self._order[i]
            waiting[self._bucket[index]].append(index)
        batches: list[tuple[int, list[int]]] = []
        left: list[int] = []
        for bucket in self._buckets:
            rows = left + waiting[bucket]
            whole = len(rows) // self._size * self._size
            batches += [(bucket, rows[i : i + self._size]) for i in range(0, whole, self._size)]
            left = rows[whole:]
        return [batches[i] for i in np.random.default_rng([self._seed, epoch]).permutation(len(batches))]

    def where(self, step: int) -> list[str]:
        """The file and line of every row of the global batch of a step."""
        return [self._examples[i]["where"] for i in self._rows_of(step)[1]]

    def cursor(self) -> dict[str, Any]:
        """What, with a step, says which batch comes next: seed, global_batch, num_records and their fingerprint."""
        return {
            "seed": self._seed,
            "global_batch": self._size,
            "num_records": len(self._examples),
            "fingerprint": fingerprint(self._examples),
        }


def fingerprint(examples: Sequence[Example]) -> str:
    """16 hexadecimal digits that change with the examples and their order, but not with where they come from."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        for name in sorted(set(example) - {"where"}):
            arrays = example[name] if name == "responses" else [example[name]]
            for value in arrays:
                if isinstance(value, np.ndarray):
                    digest.update(f"{name} {value.dtype} {value.shape}".encode())
                    digest.update(np.ascontiguousarray(value).data)
                else:
                    digest.update(f"{name} {value!r}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def eval_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    collate: Collate,
    limit: int = 0,
) -> list[Batch]:
    """All examples in order, as batches of one shape; `limit` caps their number, 0 takes all.

    The last one is filled with copies of the last example. Their weights are zero, and "weights" sum to one over all
    the batches together, so that metrics add up. Batches without weights get "valid" bool[B] instead.

    Raises:
        UserError: no examples.
    """
    if not examples:
        raise UserError("no examples to evaluate on; raise data.eval_fraction or set data.eval_path")
    count = -(-len(examples) // batch_size)
    count = min(count, limit) if limit else count
    used = list(examples[: count * batch_size])
    valid = np.arange(count * batch_size) < len(used)
    # Collating everything at once weighs the rows against each other as one big batch would.
    batch = collate(used + [used[-1]] * (count * batch_size - len(used)))
    if "weights" in batch:
        weights = batch["weights"].astype(np.float64)
        weights[~valid] = 0
        batch["weights"] = (weights / (weights.sum() or 1)).astype(np.float32)
    else:
        batch["valid"] = valid
    return [_rows(batch, slice(start, start + batch_size)) for start in range(0, count * batch_size, batch_size)]


def collate_sft(examples: Sequence[Example], *, length: int, reduction: str, pad_id: int = 0) -> Batch:
    """tokens, segment_ids, positions i32[B, S] and weights f32[B, S]; packed and plain examples alike.

    weights[b, t] is the weight of predicting token t (from the tokens before it), zero off the loss mask, and they sum
    to one over the batch. reduction = token: 1 / (loss tokens of the batch). sequence: 1 / (documents * loss tokens
    of this document), a mean of means; packing does not change it.

    Raises:
        UserError: unknown reduction, or an example longer than `length`.
    """
    batch = _padded([example["tokens"] for example in examples], length, pad_id)
    for name in ("segment_ids", "positions"):
        if name in examples[0]:
            batch[name] = _right_pad([example[name] for example in examples], length, 0, np.int32)
    is_target = _right_pad([example["loss_mask"] for example in examples], length, False, bool)
    if reduction == "token":
        weights = is_target / max(is_target.sum(), 1)
    elif reduction == "sequence":
        segments = batch["segment_ids"]
        document = np.arange(len(segments))[:, None] * (segments.max() + 1) + segments
        targets = np.bincount(document[is_target], minlength=document.max() + 1)
        weights = is_target / np.maximum(targets[document] * np.count_nonzero(targets), 1)
    else:
        raise UserError(f"loss reduction {reduction!r} is unknown; set sft.loss_reduction to token or sequence")
    return {**batch, "weights": weights.astype(np.float32)}


def collate_preference(examples: Sequence[Example], *, length: int, pad_id: int = 0) -> Batch:
    """tokens, segment_ids, positions i32[B, 2, S]; last i32[B, 2]; weights, labels, margins f32[B].

    The axis of two is (chosen, rejected); `last` indexes the last real token of each sequence; weights, in the ratio
    of the examples', sum to one.

    Raises:
        UserError: an example longer than `length`.
    """
    sequences = [example[name] for example in examples for name in ("chosen", "rejected")]
    flat = _padded(sequences, length, pad_id)
    batch = {name: array.reshape(len(examples), 2, length) for name, array in flat.items()}
    weights = np.array([example["weight"] for example in examples])
    return {
        **batch,
        "last": np.array([len(tokens) - 1 for tokens in sequences], np.int32).reshape(-1, 2),
        "weights": (weights / weights.sum()).astype(np.float32),
        "labels": np.array([example["label"] for example in examples], np.float32),
        "margins": np.array([example["margin"] for example in examples], np.float32),
    }


def collate_ranking(examples: Sequence[Example], *, length: int, width: int, pad_id: int = 0) -> Batch:
    """tokens, segment_ids, positions i32[B, K, S]; last i32[B, K]; ranks f32[B, K], mask bool[B, K]; weights f32[B].

    K = `width`; the mask says which of a row's K places hold a response. Weights are 1 / B.

    Raises:
        UserError: an example longer than `length`, or of more than `width` responses.
    """
    most = max(len(example["responses"]) for example in examples)
    if most > width:
        raise UserError(f"a ranking of {most} responses does not fit into {width}; shorten it")
    empty = [np.zeros(0, np.int32)]
    sequences = [ids for e in examples for ids in e["responses"] + empty * (width - len(e["responses"]))]
    flat = _padded(sequences, length, pad_id)
    batch = {name: array.reshape(len(examples), width, length) for name, array in flat.items()}
    sizes = np.array([len(ids) for ids in sequences], np.int32).reshape(-1, width)
    return {
        **batch,
        "last": np.maximum(sizes - 1, 0),
        "mask": sizes > 0,
        "ranks": _right_pad([example["ranks"] for example in examples], width, 0, np.float32),
        "weights": np.full(len(examples), 1 / len(examples), np.float32),
    }


def collate_prompts(examples: Sequence[Example], *, buckets: Sequence[int], pad_id: int = 0) -> Batch:
    """tokens i32[B, P] and mask bool[B, P] (True on real tokens), prompts list[str], columns {name: list}.

    Left-padded to P, the smallest bucket that holds the longest prompt. A column is there if every row has it.

    Raises:
        UserError: a prompt longer than the largest bucket.
    """
    longest = max(len(example["tokens"]) for example in examples)
    width = min((bucket for bucket in buckets if bucket >= longest), default=None)
    if width is None:
        raise UserError(
            f"a prompt of {longest} tokens fits no bucket of {sorted(buckets)}; raise the largest of "
            "sampling.prompt_buckets to data.max_prompt_length"
        )
    tokens = np.full((len(examples), width), pad_id, np.int32)
    mask = np.zeros((len(examples), width), bool)
    for row, example in enumerate(examples):
        start = width - len(example["tokens"])
        tokens[row, start:] = example["tokens"]
        mask[row, start:] = True
    shared = [name for name in examples[0]["columns"] if all(name in example["columns"] for example in examples)]
    columns = {name: [example["columns"][name] for example in examples] for name in shared}
    return {"tokens": tokens, "mask": mask, "prompts": [example["prompt"] for example in examples], "columns": columns}


def repeat_rows(batch: Batch, times: int) -> Batch:
    """Every row of every array and list of a batch `times` times in a row: [a, b] twice is [a, a, b, b]."""
    if times == 1:
        return batch
    return {
        name: repeat_rows(value, times)
        if isinstance(value, dict)
        else np.repeat(value, times, axis=0)
        if isinstance(value, np.ndarray)
        else [row for row in value for _ in range(times)]
        for name, value in batch.items()
    }


def _bucket(example: Example, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds the longest sequence of an example."""
    sequences = [example[name] for name in ("tokens", "chosen", "rejected") if name in example]
    longest = max(len(ids) for ids in [*sequences, *example.get("responses", [])])
    found = next((bucket for bucket in buckets if bucket >= longest), None)
    if found is None:
        raise UserError(f"an example of {longest} tokens fits no bucket of {list(buckets)}; raise the last one")
    return found


def _padded(sequences: Sequence[np.ndarray], length: int, pad_id: int) -> Batch:
    """tokens, segment_ids (1 on real tokens) and positions, each i32[len(sequences), length]."""
    return {
        "tokens": _right_pad(sequences, length, pad_id, np.int32),
        "segment_ids": _right_pad([np.ones(len(tokens)) for tokens in sequences], length, 0, np.int32),
        "positions": _right_pad([np.arange(len(tokens)) for tokens in sequences], length, 0, np.int32),
    }


def _right_pad(sequences: Sequence[np.ndarray], length: int, fill: Any, dtype: Any) -> np.ndarray:
    """[len(sequences), length] with each sequence at the start of its row."""
    padded = np.full((len(sequences), length), fill, dtype)
    for row, sequence in enumerate(sequences):
        if len(sequence) > length:
            raise UserError(f"a row of {len(sequence)} tokens does not fit into {length}; raise data.max_length")
        padded[row, : len(sequence)] = sequence
    return padded


def _rows(batch: Batch, chosen: slice) -> Batch:
    """Some rows of every array and list of a batch."""
    return {name: _rows(value, chosen) if isinstance(value, dict) else value[chosen] for name, value in batch.items()}
