"""`rlhf-jax sample` and `rlhf-jax score`."""

from __future__ import annotations

from typing import Any

import jax

from rlhf_jax.config import SampleArgs, ScoreArgs
from rlhf_jax.data.examples import Report, prompt_examples
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.schemas import prompt_row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.phases import Make, Phase, Phases, digest, open_journal
from rlhf_jax.hosts.json_text import json_lines
from rlhf_jax.hosts.outputs import write_output
from rlhf_jax.hosts.processes import is_first
from rlhf_jax.inference.generate import Generator, sampled_row, total_length
from rlhf_jax.inference.scoring import RewardModel
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import check_vocabulary, load_model, load_tokenizer
from rlhf_jax.sharding import make_mesh


def print_rows(rows: list[dict[str, Any]], path: str) -> None:
    """Rows as JSON lines, to a file or to standard output, by process 0."""
    if is_first():
        write_output(path, json_lines(rows))


def report_cut(report: Report) -> None:
    """Say on standard error, which keeps rows on standard output clean, how many rows were cut to their limits."""
    if report.truncated:
        tell(f"rows: {report}", error=True)


def run_sample(config: SampleArgs) -> list[dict[str, Any]]:
    """num_samples responses to every prompt, as sft rows with `response_ids`; written or printed, and returned."""
    rows: list[dict[str, Any]] = [{"prompt": text, "_where": f"prompt {i}"} for i, text in enumerate(config.prompts)]
    rows += rows_from(config.data_path) if config.data_path else []
    if not rows:
        raise UserError("there are no prompts; give --prompts '[\"Once upon a time\"]' or --data_path FILE.jsonl")
    rows = [prompt_row(row) for row in rows]
    tokenizer = load_tokenizer(config.model)
    examples, report = prompt_examples(rows, tokenizer, Limits(config.max_prompt_length))
    if len(examples) != len(rows):
        raise UserError(f"prompts: {report}; remove the empty ones")
    report_cut(report)
    longest = max(len(example["tokens"]) for example in examples)
    repeated = [row for row in rows for _ in range(config.num_samples)]
    size = min(config.batch_size, len(repeated))
    mesh = make_mesh(config.mesh)

    def begin() -> Make:
        with jax.set_mesh(mesh.grid):
            length, key = total_length(config.sampling, longest), jax.random.key(config.seed)
            loaded = load_model(config.model, mesh, branch(key, "sampler's weights"), length=length)
            check_vocabulary(loaded.model.arch, tokenizer, config.model.path)
            generator = Generator(loaded.model, tokenizer, config.sampling, mesh, max_prompt_length=longest)

        def make(start: int, stop: int) -> list[dict[str, Any]]:
            part = repeated[start:stop]
            with jax.set_mesh(mesh.grid):
                found = generator.responses(loaded.params, part, key, batch_size=size, first=start // size)
            return [
                sampled_row(row["prompt"], one.text, one.ids.tolist(), one.finished)
                for row, one in zip(part, found, strict=True)
            ]

        return make

    return in_batches("sample", config, {"prompts": digest(rows)}, Phase(len(repeated), size, begin))


def run_score(config: ScoreArgs) -> list[dict[str, Any]]:
    """The rows of data_path with "score" added; written or printed, and returned."""
    if not config.data_path:
        raise UserError("data_path is empty; give a .jsonl file of {prompt, response} rows")
    rows = rows_from(config.data_path)
    json_lines(rows)  # what could not be written is found before it is scored
    limits = {"max_prompt_length": config.max_prompt_length, "max_length": config.max_length}

    def begin() -> Make:
        size = min(config.batch_size, len(rows))
        reader = RewardModel(config.model, make_mesh(config.mesh), **limits, batch_size=size)
        examples = [reader.example(row) for row in rows]
        report_cut(Report(len(rows), {}, sum(example["cut"] for example in examples)))
        longest = max(len(example["tokens"]) for example in examples)

        def make(start: int, stop: int) -> list[dict[str, Any]]:
            scores = reader.scores(examples[start:stop], longest)
            plain = ({name: value for name, value in row.items() if name != "_where"} for row in rows[start:stop])
            return [{**row, "score": score} for row, score in zip(plain, scores, strict=True)]

        return make

    return in_batches("score", config, {"rows": digest(rows)}, Phase(len(rows), config.batch_size, begin))


def in_batches(
    name: str, config: SampleArgs | ScoreArgs, decided_by: dict[str, Any], phase: Phase
) -> list[dict[str, Any]]:
    """The rows of a phase, which OUTPUT.part gathers; written or printed, and returned."""
    with open_journal(config, config.output, decided_by) as journal:
        phases = Phases(journal)
        phases.add(phase)
        phases.fill(name, progress=False)
        journal.finish(journal.rows)
        return journal.rows
