"""Data on one core: rows to tokens and batches; K-wise against pairwise reward models; soft labels against votes.

    python -m benchmarks.data --rows ROWS_DIR --tokenizer DIR

ROWS_DIR holds hh_harmless_test.pref, pandalm_human.pref and qa_feedback_dev.rank (.jsonl.gz). Seconds are of CPU time,
on one core. Prints JSON lines:

tokenise    preference rows to token examples, once per run
batches     those examples to batches, as training asks for them; `ms_per_batch` is what a step waits for at most
reward      one training step on the rankings of the same prompts, each response run once (rankings) or in every pair
            that it is in (pairs): `sequences` run, loss at equal parameters, steps per second
raters      PandaLM's three raters: mean log-likelihood of a vote given the two others, by soft labels and by their
            majority, each tuned on one half and measured on the other
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data.encoding import Limits

LIMITS = Limits(192, 320, "truncate")
BATCH = 32


def best_of(repeats: int, function: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds of the fastest call, its value): on one core the wall time, were nobody else there."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        value = function()
        found.append((time.process_time() - start, value))
    return min(found, key=lambda one: one[0])


def pipeline(path: str, tokenizer: Any, repeats: int) -> list[dict[str, Any]]:
    """Throughput of tokenising and of batching the preference rows of a file."""
    from rlhf_jax.data.batches import Batches
    from rlhf_jax.data.collate import collate_preference
    from rlhf_jax.data.comparisons import preference_examples
    from rlhf_jax.data.sources import rows_from

    rows, name = rows_from(path), Path(path).name
    seconds, (examples, _) = best_of(repeats, lambda: preference_examples(rows, tokenizer, LIMITS))
    tokens = sum(len(example["chosen"]) + len(example["rejected"]) for example in examples)
    found = [{"what": "tokenise", "file": name, "rows": len(rows), "tokens": tokens, "rows_per_s": len(rows) / seconds,
              "tokens_per_s": tokens / seconds}]  # fmt: skip
    collate = partial(collate_preference, length=LIMITS.max_length, pad_id=tokenizer.pad_id)
    for buckets in ([], [96, 160, 224, LIMITS.max_length]):
        batches = Batches(examples, batch_size=BATCH, seed=0, collate=collate, buckets=buckets)
        steps = len(batches)
        seconds, made = best_of(repeats, partial(lambda batches: [batches[i] for i in range(len(batches))], batches))
        real = sum(int((batch["segment_ids"] > 0).sum()) for batch in made)
        slots = sum(batch["tokens"].size for batch in made)
        found.append({
            "what": "batches", "file": name, "buckets": buckets, "batches": steps, "real_share": real / slots,
            "rows_per_s": steps * BATCH / seconds, "tokens_per_s": real / seconds,
            "ms_per_batch": 1000 * seconds / steps,
        })  # fmt: skip
    return found


def reward_batches(rows: list[Any], tokenizer: Any, limits: Limits) -> dict[str, tuple[Any, Any, Any]]:
    """Kind of comparison -> (objective of a model and a loss, loss, one batch of all rows)."""
    from rlhf_jax import losses, reward
    from rlhf_jax.data.comparisons import preference_examples, ranking_examples

    found = {}
    for kind, build, loss in (
        ("rankings", ranking_examples, losses.kwise_reward_loss),
        ("pairs", preference_examples, losses.pairwise_reward_loss),
    ):
        examples, _ = build(rows, tokenizer, limits)
        collate = partial(reward.KINDS[kind].collate(examples), length=limits.max_length, pad_id=tokenizer.pad_id)
        objective = partial(reward.objective, inputs=reward.KINDS[kind].inputs)
        found[kind] = objective, partial(loss, center_coef=0.01), collate(examples)
    return found


def reward_steps(path: str, tokenizer: Any, repeats: int, num_prompts: int = 16) -> list[dict[str, Any]]:
    """Steps per second of the K-wise and of the pairwise reward model on the same prompts, at equal parameters."""
    import jax
    import optax

    from rlhf_jax.config import ArchConfig
    from rlhf_jax.data.sources import rows_from
    from rlhf_jax.models import Model

    arch = ArchConfig(
        vocab_size=tokenizer.vocab_size, width=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32,
        ffn_width=352, max_positions=512,
    )  # fmt: skip
    model, found = Model(arch, score_head=True), []
    params, tx = jax.jit(model.init)(jax.random.key(0)), optax.adam(1e-4)
    rows = rows_from(path)[:num_prompts]
    limits = Limits(64, 192, "truncate")
    for kind, (objective, loss, batch) in reward_batches(rows, tokenizer, limits).items():
        step = jax.jit(make_step(objective(model, loss), tx))
        run = partial(lambda step, *rest: jax.block_until_ready(step(*rest)), step, params, tx.init(params), batch)
        value, *_ = run()  # compiles
        seconds, _ = best_of(repeats, run)
        found.append({
            "what": "reward", "comparisons": kind, "prompts": num_prompts, "loss": float(value),
            "sequences": int((batch["last"] > 0).sum()), "steps_per_s": 1 / seconds,
        })  # fmt: skip
    return found


def make_step(loss_fn: Any, tx: Any) -> Any:
    """(params, opt_state, batch) -> (loss, params, opt_state)."""
    import jax
    import optax

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        (value, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, None)
        updates, opt_state = tx.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    return step


def log_likelihoods(votes: np.ndarray, probability: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """float[N], summed log-likelihood of each vote of votes[N, 3] = (first, second, ties), given the rest of its row.

    `probability` of the others' counts [N, 3] is that of a vote for the first; a tie is half a vote of each.
    """
    total = np.zeros(len(votes))
    for kind, share in enumerate((1.0, 0.0, 0.5)):
        given = votes[:, kind] > 0
        p = probability(np.maximum(votes - np.eye(3, dtype=int)[kind], 0))
        total += np.where(given, votes[:, kind] * (share * np.log(p) + (1 - share) * np.log(1 - p)), 0)
    return total


def soft(prior: float) -> Callable[[np.ndarray], np.ndarray]:
    """Soft labels by Bradley-Terry with a prior, as `reward.aggregate: bradley_terry` makes them."""
    from rlhf_jax.data.consensus import soft_labels
    from rlhf_jax.data.rankings import bradley_terry

    def probability(others: np.ndarray) -> np.ndarray:
        wins = np.zeros((len(others), 2, 2))
        wins[:, 0, 1], wins[:, 1, 0] = others[:, 0] + others[:, 2] / 2, others[:, 1] + others[:, 2] / 2
        return soft_labels(bradley_terry(wins, prior=prior))[:, 0, 1]

    return probability


def majority(doubt: float) -> Callable[[np.ndarray], np.ndarray]:
    """The winner of the others' votes with certainty 1 - doubt; a draw is 1/2."""
    return lambda others: np.clip((np.sign(others[:, 0] - others[:, 1]) + 1) / 2, doubt, 1 - doubt)


def raters(votes: np.ndarray) -> dict[str, float]:
    """Held-out log-likelihood per vote by soft labels and by majority, each tuned on the other half of the rows."""
    even = np.arange(len(votes)) % 2 == 0
    found = {}
    for family, grid in ((soft, np.geomspace(0.005, 1, 24)), (majority, np.geomspace(0.005, 0.4, 24))):
        each = np.stack([log_likelihoods(votes, family(x)) for x in grid])
        held_out = sum(each[each[:, half].sum(1).argmax(), ~half].sum() for half in (even, ~even))
        found[family.__name__] = float(held_out / votes.sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="a directory with the three files")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer directory")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before jax and the tokenizer start threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from rlhf_jax.data.sources import rows_from
    from rlhf_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    path = lambda name: str(Path(args.rows) / f"{name}.jsonl.gz")  # noqa: E731
    for name in ("hh_harmless_test.pref", "pandalm_human.pref"):
        for line in pipeline(path(name), tokenizer, args.repeats):
            show(line)
    for line in reward_steps(path("qa_feedback_dev.rank"), tokenizer, args.repeats):
        show(line)
    votes = np.array([row["votes"] for row in rows_from(path("pandalm_human.pref"))])
    show({"what": "raters", "rows": len(votes), "votes": int(votes.sum()), **raters(votes)})


def show(line: dict[str, Any]) -> None:
    """One JSON line, numbers to four digits."""
    print(json.dumps({name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in line.items()}), flush=True)


if __name__ == "__main__":
    main()
