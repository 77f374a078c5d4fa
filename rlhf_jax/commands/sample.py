"""`rlhf-jax sample` and `rlhf-jax score`."""

from __future__ import annotations

from collections.abc import Callable

import jax

from rlhf_jax.config import SampleArgs, ScoreArgs
from rlhf_jax.data.encoding import Limits, Report
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.rows import Row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.phases import Make, Phases, digest, open_journal
from rlhf_jax.feedback.sources import kept_fields, load_drawer, prompts_of, within_limits
from rlhf_jax.hosts.json_text import json_lines
from rlhf_jax.hosts.outputs import write_output
from rlhf_jax.hosts.processes import is_first
from rlhf_jax.inference.scoring import RewardModel
from rlhf_jax.models.loading import load_tokenizer
from rlhf_jax.sharding import make_mesh


def print_rows(rows: list[Row], path: str) -> None:
    """Rows as JSON lines, to a file or to standard output, by process 0."""
    if is_first():
        write_output(path, json_lines(rows))


def run_sample(config: SampleArgs) -> list[Row]:
    """num_samples responses to every prompt, as sft rows with `response_ids`; written or printed, and returned."""
    prompts, tokenizer = within_limits(config, prompts_of(config)), load_tokenizer(config.model)
    examples, report = prompt_examples(prompts, tokenizer, Limits(config.max_prompt_length))
    if len(examples) != len(prompts):
        raise UserError(f"prompts: {report}; remove the empty ones")
    longest = max(len(example["tokens"]) for example in examples)
    each, count = config.num_samples, len(prompts) * config.num_samples
    size = min(max(config.batch_size // each, 1) * each, count)  # whole prompts
    mesh = make_mesh(config.mesh)

    def begin() -> Make:
        drawer = load_drawer(config.model, tokenizer, config.sampling, mesh, seed=config.seed, longest=longest)

        def make(start: int, stop: int) -> list[Row]:
            part = prompts[start // each : stop // each]
            with jax.set_mesh(mesh.grid):
                key, at_once = jax.random.key(config.seed), {"batch_size": size, "first": start // size}
                made = drawer.generator.rows(drawer.loaded.params, part, key, samples=each, **at_once)
            return [{**kept_fields(part[i // each]), **row} for i, row in enumerate(made)]

        return make

    return _in_one_phase("sample", config, {"prompts": digest(prompts)}, count, size, begin)


def run_score(config: ScoreArgs) -> list[Row]:
    """The rows of data_path with "score" added; written or printed, and returned."""
    if not config.data_path:
        raise UserError("data_path is empty; give a .jsonl file of {prompt, response} rows")
    rows = rows_from(config.data_path)
    json_lines(rows)  # what could not be written is found before it is scored

    def begin() -> Make:
        limits = Limits(config.max_prompt_length, config.max_length)
        reader = RewardModel(
            config.model, make_mesh(config.mesh), limits, batch_size=min(config.batch_size, len(rows))
        )
        examples = [reader.example(row) for row in rows]
        report = Report(len(rows), {}, sum(example["cut"] for example in examples))
        if report.truncated:
            tell(f"{report.mark}rows: {report}", error=True)  # which keeps rows on standard output clean
        longest = max(len(example["tokens"]) for example in examples)

        def make(start: int, stop: int) -> list[Row]:
            scores = reader.scores(examples[start:stop], longest)
            plain = ({name: value for name, value in row.items() if name != "_where"} for row in rows[start:stop])
            cuts = ({"cut": True} if example["cut"] else {} for example in examples[start:stop])
            return [{**row, "score": score, **cut} for row, score, cut in zip(plain, scores, cuts, strict=True)]

        return make

    return _in_one_phase("score", config, {"rows": digest(rows)}, len(rows), config.batch_size, begin)


def _in_one_phase(
    name: str, config: SampleArgs | ScoreArgs, decided_by: Row, count: int, size: int, begin: Callable[[], Make]
) -> list[Row]:
    with open_journal(config, config.output, decided_by) as journal:
        phases = Phases(journal)
        made = phases.add(count, size, begin)
        phases.fill(name, progress=False)
        journal.finish(made.rows)
    return made.rows
