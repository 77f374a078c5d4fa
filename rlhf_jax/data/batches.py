"""Examples to numpy batches: B examples in, arrays of one shape out, the same for a step whenever it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.collate import Batch, Collate
from rlhf_jax.data.encoding import Example
from rlhf_jax.errors import UserError


class Batches:
    """`batches[step]`: the batch of a step, a pure function of (examples, seed, step); `len` is steps per epoch.

    Every epoch has a fresh order and leaves over `left_over` = N % B rows. These go round: each epoch leaves over the
    next ones of one permutation of all rows, so that over epochs every row is left over equally often, but for once.
    Resuming is indexing at a later step. With `buckets`, rows of similar length share a batch, which is padded to the
    smallest bucket that holds them: an epoch's order is cut into batches bucket by bucket, what does not fill one goes
    on to the next longer bucket, which in the last one comes out even, and the batches are shuffled.
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
        option: str = "data.batch_size",
    ):
        """A UserError: fewer examples than `batch_size`, a seed that grain cannot use, one over the last bucket.

        `option` is what says `batch_size`.
        """
        import grain

        if len(examples) < batch_size:
            raise UserError(
                f"{len(examples)} examples do not fill one batch of {batch_size}; "
                f"set {option} to at most {len(examples)}, or give more rows"
            )
        if not 0 <= seed < 2**32:
            raise UserError(f"seed {seed} is outside 0 .. 2**32 - 1; set run.seed within it")
        self._steps, self.left_over = divmod(len(examples), batch_size)
        self._examples, self._seed, self._size, self._collate = examples, seed, batch_size, collate
        self._taken = self._steps * batch_size  # rows of an epoch
        self._order = grain.MapDataset.source(range(self._taken)).seed(seed).shuffle().repeat(reseed_each_epoch=True)
        self._round = np.random.default_rng(seed).permutation(len(examples)) if self.left_over else np.zeros(0, int)
        self._buckets = sorted(buckets)
        self._bucket = [_bucket(example, self._buckets) for example in examples] if buckets else []
        self._planned: tuple[int, list[tuple[int, list[int]]]] = (-1, [])

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        length, rows = self._rows_of(int(step))
        options = {"length": length} if length else {}
        return self._collate([self._examples[i] for i in rows], **options)

    def rows(self, numbers: Sequence[int]) -> tuple[Batch, list[str]]:
        """A batch of rows by their place in the batches, one after another, and the file and line of each."""
        steps = {step: self._rows_of(step)[1] for step in {number // self._size for number in numbers}}
        examples = [self._examples[steps[number // self._size][number % self._size]] for number in numbers]
        return self._collate(examples), [example["where"] for example in examples]

    def _rows_of(self, step: int) -> tuple[int, list[int]]:
        """(bucket, or 0 without, indices of the examples) of the global batch of a step."""
        epoch, place = divmod(step, self._steps)
        if not self._buckets:
            return 0, self._taken_rows(epoch, range(place * self._size, (place + 1) * self._size))
        if self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        return self._planned[1][place]

    def _taken_rows(self, epoch: int, places: range) -> list[int]:
        order = np.array([self._order[epoch * self._taken + place] for place in places])
        if not self.left_over:
            return order.tolist()
        start = epoch * self.left_over
        left = np.sort(np.take(self._round, np.arange(start, start + self.left_over), mode="wrap"))
        # The k-th row that is not left over is k and as many more as rows before it are.
        return (order + np.searchsorted(left - np.arange(len(left)), order, side="right")).tolist()

    def _plan(self, epoch: int) -> list[tuple[int, list[int]]]:
        waiting: dict[int, list[int]] = {bucket: [] for bucket in self._buckets}
        for index in self._taken_rows(epoch, range(self._taken)):
            waiting[self._bucket[index]].append(index)
        batches: list[tuple[int, list[int]]] = []
        left: list[int] = []
        for bucket in self._buckets:
            rows = left + waiting[bucket]
            whole = len(rows) // self._size * self._size
            batches += [(bucket, rows[i : i + self._size]) for i in range(0, whole, self._size)]
            left = rows[whole:]
        return [batches[i] for i in np.random.default_rng([self._seed, epoch]).permutation(len(batches))]

    def reached(self, steps: int) -> list[int]:
        """The places of the examples that the first `steps` batches hold, ascending."""
        found: set[int] = set()
        for step in range(steps):
            if len(found) == len(self._examples):
                break
            found.update(self._rows_of(step)[1])
        return sorted(found)

    def where(self, step: int) -> list[str]:
        """The file and line of every row of the global batch of a step."""
        return [self._examples[i]["where"] for i in self._rows_of(step)[1]]

    def cursor(self) -> dict[str, int | str]:
        """What, with a step, says which batch comes next: seed, global_batch, num_records and their fingerprint."""
        return {
            "seed": self._seed,
            "global_batch": self._size,
            "num_records": len(self._examples),
            "fingerprint": fingerprint(self._examples),
        }


def fingerprint(examples: Sequence[Example]) -> str:
    """16 hexadecimal digits that change with the examples and their order, but not with where they come from.

    Nor with `ref_logprobs`, which a model makes of them, maybe to another last bit on other devices, or with `given`,
    of which a prompt's text and tokens are made, and `seen`, which is made of these.
    """
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        for name in sorted(set(example) - {"where", "ref_logprobs", "given", "seen"}):
            arrays = example[name] if name == "responses" else [example[name]]
            for value in arrays:
                if isinstance(value, np.ndarray):
                    digest.update(f"{name} {value.dtype} {value.shape}".encode())
                    digest.update(np.ascontiguousarray(value).data)
                else:
                    digest.update(f"{name} {value!r}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _bucket(example: Example, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds the longest sequence of an example."""
    sequences = [example[name] for name in ("tokens", "chosen", "rejected", "response", "other") if name in example]
    longest = max(len(ids) for ids in [*sequences, *example.get("responses", [])])
    smallest = next((bucket for bucket in buckets if bucket >= longest), None)
    if smallest is None:
        raise UserError(f"an example of {longest} tokens fits no bucket of {list(buckets)}; raise the last one")
    return smallest
