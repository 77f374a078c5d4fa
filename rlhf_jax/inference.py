"""`rlhf-jax sample` and `rlhf-jax score`. Floor 4."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.config import SampleRun, ScoreRun
from rlhf_jax.data.batches import collate_sft, eval_batches
from rlhf_jax.data.examples import sft_examples
from rlhf_jax.data.schemas import prompt_row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError
from rlhf_jax.generate import Generator
from rlhf_jax.reward import score_sequences
from rlhf_jax.sharding import make_mesh, put_batch
from rlhf_jax.stage import check_length, check_vocabulary, load_model, load_tokenizer


def check_output(path: str, overwrite: bool) -> None:
    """Raise a UserError if `path` exists and may not be replaced."""
    if path and Path(path).exists() and not overwrite:
        raise UserError(f"output {path} exists; choose another name or pass --overwrite true")


def write_rows(rows: list[dict[str, Any]], path: str) -> None:
    """Rows as JSON lines, to a file or to standard output."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path:
        Path(path).write_text(lines, encoding="utf-8")
    else:
        sys.stdout.write(lines)


def run_sample(config: SampleRun) -> list[dict[str, Any]]:
    """num_samples responses to every prompt, as rows {prompt, response}; written or printed, and returned."""
    check_output(config.output, config.overwrite)
    rows: list[dict[str, Any]] = [{"prompt": text, "_where": f"prompt {i}"} for i, text in enumerate(config.prompts)]
    if config.data_path:
        rows += [prompt_row(row) for row in rows_from(config.data_path)]
    if not rows:
        raise UserError('there are no prompts; give --prompts \'["Once upon a time"]\' or --data_path FILE.jsonl')
    if config.num_samples < 1 or config.batch_size < 1:
        raise UserError(f"num_samples {config.num_samples} and batch_size {config.batch_size} must be at least 1")
    tokenizer = load_tokenizer(config.model)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        loaded = load_model(config.model, mesh, jax.random.key(config.seed))
        check_vocabulary(loaded.model.arch, tokenizer, config.model.path)
        generator = Generator(
            loaded.model, tokenizer, config.sampling, mesh, max_prompt_length=config.max_prompt_length
        )
        repeated = [row for row in rows for _ in range(config.num_samples)]
        size = min(config.batch_size, len(repeated))
        _, responses = generator.texts(loaded.params, repeated, jax.random.key(config.seed), batch_size=size)
    out = [{"prompt": row["prompt"], "response": r} for row, r in zip(repeated, responses, strict=True)]
    write_rows(out, config.output)
    return out


def run_score(config: ScoreRun) -> list[dict[str, Any]]:
    """The rows of data_path with "score" added; written or printed, and returned."""
    check_output(config.output, config.overwrite)
    if not config.data_path:
        raise UserError("data_path is empty; give a .jsonl file of {prompt, response} rows")
    tokenizer = load_tokenizer(config.model)
    rows = rows_from(config.data_path)
    limits = {"max_prompt_length": config.max_prompt_length, "max_length": config.max_length}
    examples, report = sft_examples(rows, tokenizer, too_long="truncate", loss_on="response", **limits)
    if len(examples) != len(rows):
        raise UserError(f"{config.data_path}: {report}; remove the rows that cannot be scored")
    mesh = make_mesh(config.mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-min(config.batch_size, len(examples)) // ways) * ways
    collate = partial(collate_sft, length=config.max_length, reduction="token", pad_id=tokenizer.pad_id)
    with jax.set_mesh(mesh):
        loaded = load_model(config.model, mesh, jax.random.key(0), head="trained")
        check_vocabulary(loaded.model.arch, tokenizer, config.model.path)
        check_length(loaded.model.arch, config.max_length, "max_length")
        forward = jax.jit(partial(score_sequences, loaded.model))
        scores: list[float] = []
        for batch in eval_batches(examples, batch_size=size, collate=collate):
            arrays = {name: batch[name] for name in ("tokens", "positions", "segment_ids")}
            arrays["last"] = (batch["segment_ids"] > 0).sum(axis=1, dtype=np.int32) - 1
            scores += jax.device_get(forward(loaded.params, **put_batch(mesh, arrays))).tolist()
    out = [
        {**{name: value for name, value in row.items() if name != "_where"}, "score": score}
        for row, score in zip(rows, scores, strict=False)
    ]
    write_rows(out, config.output)
    return out
