"""`rlhf-jax sample` and `rlhf-jax score`. Floor 4."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.config import SampleRun, ScoreRun
from rlhf_jax.data.examples import Report, prompt_examples
from rlhf_jax.data.schemas import prompt_row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.directory import check_writable, to_json
from rlhf_jax.errors import UserError, tell
from rlhf_jax.generate import Generator, total_length
from rlhf_jax.hosts import is_first
from rlhf_jax.scoring import RewardModel
from rlhf_jax.sharding import make_mesh
from rlhf_jax.stage import check_vocabulary, load_model, load_tokenizer


def check_output(path: str, overwrite: bool) -> None:
    """Raise a UserError if `path` cannot be written, or exists and may not be replaced."""
    if not path:
        return
    if Path(path).is_dir():
        raise UserError(f"output {path} is a directory; name a .jsonl file")
    if Path(path).exists() and not overwrite:
        raise UserError(f"output {path} exists; choose another name or pass --overwrite true")
    check_writable(Path(path).parent, f"output {path}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def write_rows(rows: list[dict[str, Any]], path: str) -> None:
    """Rows as JSON lines, to a file or to standard output, by process 0."""
    if not is_first():
        return
    lines = "".join(to_json(row) + "\n" for row in rows)
    if path:
        Path(path).write_text(lines, encoding="utf-8")
    else:
        sys.stdout.write(lines)


def report_cut(report: Report) -> None:
    """Say on standard error, which keeps rows on standard output clean, how many rows were cut to their limits."""
    if report.truncated:
        tell(f"rows: {report}", error=True)


def run_sample(config: SampleRun) -> list[dict[str, Any]]:
    """num_samples responses to every prompt, rows {prompt, response, finished}; written or printed, and returned."""
    check_output(config.output, config.overwrite)
    rows: list[dict[str, Any]] = [{"prompt": text, "_where": f"prompt {i}"} for i, text in enumerate(config.prompts)]
    rows += rows_from(config.data_path) if config.data_path else []
    if not rows:
        raise UserError("there are no prompts; give --prompts '[\"Once upon a time\"]' or --data_path FILE.jsonl")
    rows = [prompt_row(row) for row in rows]
    tokenizer = load_tokenizer(config.model)
    limit = max([config.max_prompt_length, *config.sampling.prompt_buckets])
    examples, report = prompt_examples(rows, tokenizer, max_prompt_length=limit, too_long="truncate")
    if len(examples) != len(rows):
        raise UserError(f"prompts: {report}; remove the empty ones")
    report_cut(report)
    longest = max(len(example["tokens"]) for example in examples)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        loaded = load_model(
            config.model, mesh, jax.random.key(config.seed), length=total_length(config.sampling, longest)
        )
        check_vocabulary(loaded.model.arch, tokenizer, config.model.path)
        generator = Generator(loaded.model, tokenizer, config.sampling, mesh, max_prompt_length=longest)
        repeated = [row for row in rows for _ in range(config.num_samples)]
        size = min(config.batch_size, len(repeated))
        _, responses, finished = generator.texts(loaded.params, repeated, jax.random.key(config.seed), batch_size=size)
    columns = zip(repeated, responses, finished, strict=True)
    out = [{"prompt": row["prompt"], "response": text, "finished": done} for row, text, done in columns]
    write_rows(out, config.output)
    return out


def run_score(config: ScoreRun) -> list[dict[str, Any]]:
    """The rows of data_path with "score" added; written or printed, and returned."""
    check_output(config.output, config.overwrite)
    if not config.data_path:
        raise UserError("data_path is empty; give a .jsonl file of {prompt, response} rows")
    rows = rows_from(config.data_path)
    limits = {"max_prompt_length": config.max_prompt_length, "max_length": config.max_length}
    reader = RewardModel(config.model, make_mesh(config.mesh), **limits, batch_size=min(config.batch_size, len(rows)))
    examples = [reader.example(row) for row in rows]
    report_cut(Report(len(rows), {}, sum(example["cut"] for example in examples)))
    scores = reader.scores(examples, max(len(example["tokens"]) for example in examples))
    out = [
        {**{name: value for name, value in row.items() if name != "_where"}, "score": score}
        for row, score in zip(rows, scores, strict=True)
    ]
    write_rows(out, config.output)
    return out
