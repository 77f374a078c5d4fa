"""`rlhf-jax sample` and `rlhf-jax score`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
from rlhf_jax.inference.scoring import RewardModel, combined
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
    """The rows of data_path with "score" added, of an ensemble "scores" too; written or printed, and returned."""
    if not config.data_path:
        raise UserError("data_path is empty; give a .jsonl file of {prompt, response} rows")
    rows = rows_from(config.data_path)
    json_lines(rows)  # what could not be written is found before it is scored

    def begin() -> Make:
        limits = Limits(config.max_prompt_length, config.max_length)
        size, mesh = min(config.batch_size, len(rows)), make_mesh(config.mesh)
        named = [replace(config.model, path=path) for path in config.models] or [config.model]
        readers = [RewardModel(one, mesh, limits, batch_size=size) for one in named]
        read = [[reader.example(row) for row in rows] for reader in readers]
        cuts = [any(one["cut"] for one in same) for same in zip(*read, strict=True)]
        report = Report(len(rows), {}, sum(cuts))
        if report.truncated:
            tell(f"{report.mark}rows: {report}", error=True)  # which keeps rows on standard output clean
        longest = [max(len(one["tokens"]) for one in examples) for examples in read]

        def make(start: int, stop: int) -> list[Row]:
            parts = zip(readers, read, longest, strict=True)
            each = [reader.scores(examples[start:stop], length) for reader, examples, length in parts]
            scores, members = combined(each, combine=config.combine, combine_coef=config.combine_coef)
            plain = ({name: value for name, value in row.items() if name != "_where"} for row in rows[start:stop])
            said = [{"score": score} for score in scores.tolist()]
            if members.shape[1] > 1:
                said = [{**one, "scores": own} for one, own in zip(said, members.tolist(), strict=True)]
            marks = ({"cut": True} if cut else {} for cut in cuts[start:stop])
            return [row | one | mark for row, one, mark in zip(plain, said, marks, strict=True)]

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
