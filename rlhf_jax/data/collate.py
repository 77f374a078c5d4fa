"""Examples to numpy arrays of one shape; an example that is longer is a UserError.

Shapes: B rows, S = `length` tokens, P = prompt bucket. Sequences are right-padded, prompts left-padded. What is real
is said by segment_ids (0 = padding), mask and last, never by token ids: pad_id may be a stop id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from rlhf_jax.data.encoding import Example
from rlhf_jax.errors import UserError

Batch = dict[str, Any]
Collate = Callable[..., Batch]
"""examples -> batch; where lengths come in buckets it takes `length=` too."""


def eval_batches(examples: Sequence[Example], *, batch_size: int, collate: Collate, limit: int = 0) -> list[Batch]:
    """All examples in order, as batches of one shape; `limit` caps their number, 0 takes all.

    The last one is filled with copies of the last example whose "weight" is zero. The weights sum to one over all the
    batches together, so that metrics add up. Batches without weights get "valid" bool[B] instead.
    """
    if not examples:
        raise UserError("no examples to evaluate on; raise data.eval_fraction or set data.eval_path")
    count = -(-len(examples) // batch_size)
    count = min(count, limit) if limit else count
    used = list(examples[: count * batch_size])
    fillers = [{**used[-1], "weight": 0.0}] * (count * batch_size - len(used))
    # Collating everything at once weighs the rows against each other as one big batch would.
    batch = collate(used + fillers)
    if "weights" not in batch:
        batch["valid"] = np.arange(count * batch_size) < len(used)
    return [_rows(batch, slice(start, start + batch_size)) for start in range(0, count * batch_size, batch_size)]


def collate_sft(examples: Sequence[Example], *, length: int, reduction: str, pad_id: int = 0) -> Batch:
    """tokens, segment_ids, positions i32[B, S] and weights f32[B, S]; packed and plain examples alike.

    weights[b, t] is the weight of predicting token t (from the tokens before it), zero off the loss mask, and they sum
    to one over the batch. reduction = token: 1 / (loss tokens of the batch). sequence: 1 / (documents * loss tokens
    of this document), a mean of means; packing does not change it. Any other is a UserError.
    """
    batch = padded([example["tokens"] for example in examples], length, pad_id)
    for name in ("segment_ids", "positions"):
        if name in examples[0]:
            batch[name] = _right_pad([example[name] for example in examples], length, 0, np.int32)
    is_target = _right_pad([example["loss_mask"] for example in examples], length, 0, bool)
    is_target &= _weights(examples)[:, None] > 0
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
    """What `_responses` gives of (chosen, rejected), K = 2, imitating the chosen; labels, margins f32[B]."""
    pairs = [[example["chosen"], example["rejected"]] for example in examples]
    imitated = np.array([[True, False]] * len(pairs))
    return {**_responses(examples, pairs, imitated, length, pad_id), **_columns(examples, "label", "margin")}


def collate_unpaired(examples: Sequence[Example], *, length: int, pad_id: int = 0) -> Batch:
    """What `_responses` gives of (response, that to another prompt), K = 2, label 1 is imitated; labels f32[B]."""
    both = [[example["response"], example["other"]] for example in examples]
    imitated = np.array([[example["label"] == 1, False] for example in examples])
    return {**_responses(examples, both, imitated, length, pad_id), **_columns(examples, "label")}


def collate_rated(examples: Sequence[Example], *, length: int, pad_id: int = 0) -> Batch:
    """What `_responses` gives of one response, K = 1; ratings f32[B]."""
    single = [[example["response"]] for example in examples]
    none = np.zeros((len(single), 1), bool)
    return {**_responses(examples, single, none, length, pad_id), **_columns(examples, "rating")}


def collate_ranking(examples: Sequence[Example], *, length: int, width: int, pad_id: int = 0) -> Batch:
    """What `_responses` gives, K = `width`; ranks f32[B, K], mask bool[B, K].

    The mask says which of a row's K places hold a response; the first of the best is what to imitate. An example of
    more than `width` responses is a UserError.
    """
    if (most := max(len(example["responses"]) for example in examples)) > width:
        raise UserError(f"a ranking of {most} responses does not fit into {width}; shorten it")
    empty = [np.zeros(0, np.int32)]
    responses = [example["responses"] + empty * (width - len(example["responses"])) for example in examples]
    best = np.array([int(np.argmin(example["ranks"])) for example in examples])
    batch = _responses(examples, responses, np.arange(width) == best[:, None], length, pad_id)
    ranks = _right_pad([example["ranks"] for example in examples], width, 0, np.float32)
    return {**batch, "ranks": ranks, "mask": batch["lengths"] > 0}


def of_most_responses(examples: Sequence[Example]) -> Collate:
    """`collate_ranking` for rankings of which one of `examples` has the most responses."""
    return partial(collate_ranking, width=max(len(example["responses"]) for example in examples))


def real_tokens(batch: Batch) -> int:
    """Tokens of a batch that a network reads, padding left out where the batch says which is."""
    if "packed" not in batch and "segment_ids" not in batch:
        return int(batch["tokens"].size)
    read = batch["packed"].segment_ids if "packed" in batch else batch["segment_ids"]
    return int((read > 0).sum()) + (real_tokens(batch["other"]) if "other" in batch else 0)


def example_of_all(width: int) -> Example:
    """The fields of every kind of example that becomes a batch: sequences of two tokens, `width` responses."""
    ids = np.zeros(2, np.int32)
    return {
        "tokens": ids, "loss_mask": np.ones(2, bool), "prompt_length": 1, "label": 1.0, "margin": 0.0, "rating": 1.0,
        "chosen": ids, "rejected": ids, "response": ids, "other": ids,
        "responses": [ids] * width, "ranks": list(range(width)),
    }  # fmt: skip


def collate_prompts(examples: Sequence[Example], *, buckets: Sequence[int], pad_id: int = 0) -> Batch:
    """tokens i32[B, P], mask bool[B, P] (True on real tokens), lists prompts, given and seen, columns {name: list}.

    Left-padded to P, the smallest bucket that holds the longest prompt. `given` are the prompts as texts or messages,
    `seen` is {prompt_seen} of those that were cut and {} of others.
    A column is there if every row has it; `reward_functions.columns_for` gives all rows of a data set the same.
    """
    longest = max(len(example["tokens"]) for example in examples)
    width = min((bucket for bucket in buckets if bucket >= longest), default=None)
    if width is None:
        raise UserError(
            f"a prompt of {longest} tokens fits no bucket of {sorted(buckets)}; raise the largest of "
            "sampling.prompt_buckets to data.max_prompt_length"
        )
    mask = np.array([np.arange(width) >= width - len(example["tokens"]) for example in examples])
    tokens = np.full(mask.shape, pad_id, np.int32)
    tokens[mask] = np.concatenate([example["tokens"] for example in examples])
    shared = [name for name in examples[0]["columns"] if all(name in example["columns"] for example in examples)]
    columns = {name: [example["columns"][name] for example in examples] for name in shared}
    prompts = [example["prompt"] for example in examples]
    given = [example.get("given", example["prompt"]) for example in examples]
    seen = [example.get("seen", {}) for example in examples]
    return {"tokens": tokens, "mask": mask, "prompts": prompts, "given": given, "seen": seen, "columns": columns}


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


def _responses(
    examples: Sequence[Example], responses: list[list[np.ndarray]], imitated: np.ndarray, length: int, pad_id: int
) -> Batch:
    """K responses to each of B prompts, every array prompt and response; an empty one is no response.

    tokens, segment_ids, positions i32[B, K, S]; last i32[B, K], the index of the last real token; prompt_lengths
    i32[B]; lengths f32[B, K], tokens of the responses alone; weights f32[B], which sum to one; token_weights
    f32[B, K], the weight of one token in the mean over all tokens of the responses that are `imitated` bool[B, K].
    And ref_logprobs f32[B, K] and member_weights f32[B, E], if the examples have them.
    """
    sequences, rows = [ids for row in responses for ids in row], len(responses)
    batch = {name: array.reshape(rows, -1, length) for name, array in padded(sequences, length, pad_id).items()}
    sizes = np.array([len(ids) for ids in sequences], np.int32).reshape(rows, -1)
    prompts = np.array([example["prompt_length"] for example in examples], np.int32)
    lengths = np.maximum(sizes - prompts[:, None], 0)
    weights = _weights(examples)
    token_weights = weights[:, None] * imitated
    if "ref_logprobs" in examples[0]:
        logprobs = [example["ref_logprobs"] for example in examples]
        batch["ref_logprobs"] = _right_pad(logprobs, sizes.shape[1], 0, np.float32)
    if "member_weights" in examples[0]:
        batch["member_weights"] = np.stack([example["member_weights"] for example in examples])
    return {
        **batch,
        "last": np.maximum(sizes - 1, 0),
        "prompt_lengths": prompts,
        "lengths": lengths.astype(np.float32),
        "weights": (weights / weights.sum()).astype(np.float32),
        "token_weights": (token_weights / max((token_weights * lengths).sum(), 1e-9)).astype(np.float32),
    }


def _columns(examples: Sequence[Example], *names: str) -> Batch:
    """Numbers of the examples as f32[B], each named in the plural."""
    return {f"{name}s": np.array([example[name] for example in examples], np.float32) for name in names}


def _weights(examples: Sequence[Example]) -> np.ndarray:
    return np.array([example.get("weight", 1.0) for example in examples])


def padded(sequences: Sequence[np.ndarray], length: int, pad_id: int) -> Batch:
    """tokens, segment_ids (1 on real tokens) and positions, each i32[len(sequences), length]."""
    return {
        "tokens": _right_pad(sequences, length, pad_id, np.int32),
        "segment_ids": _right_pad([np.ones(len(tokens)) for tokens in sequences], length, 0, np.int32),
        "positions": _right_pad([np.arange(len(tokens)) for tokens in sequences], length, 0, np.int32),
    }


def _right_pad(sequences: Sequence[np.ndarray], length: int, fill: int, dtype: DTypeLike) -> np.ndarray:
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
