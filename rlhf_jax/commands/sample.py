"""`rlhf-jax sample` and `rlhf-jax score`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from itertools import chain, pairwise
from operator import or_

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import SampleArgs, ScoreArgs
from rlhf_jax.data.encoding import Limits, Report
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.rows import OF_SCORES, PREFERENCES, DroppedRow, Row, carried, layout_of, tell_anew
from rlhf_jax.data.schemas import preference_row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.phases import Make, Phases, digest, open_journal
from rlhf_jax.feedback.sources import load_drawer, prompts_of, within_limits
from rlhf_jax.hosts.files import is_stream
from rlhf_jax.hosts.json_text import json_lines
from rlhf_jax.hosts.outputs import summary_beside, write_output
from rlhf_jax.hosts.processes import is_first
from rlhf_jax.inference.scoring import RewardModel, check_combine, combined
from rlhf_jax.losses.reward import pairs_right
from rlhf_jax.models.loading import load_tokenizer
from rlhf_jax.sharding import make_mesh


def print_rows(rows: list[Row], path: str) -> None:
    """Rows as JSON lines, to a file, in the place of one and its summary, or to standard output, by process 0."""
    if is_first():
        write_output(path, json_lines(rows), "" if is_stream(path) else summary_beside(path))


def say_loaded(what: str) -> None:
    """On standard error, which keeps rows on standard output clean: the first batch of a toy takes long, too."""
    if is_first():
        tell(f"{what}; the model is loaded, the first batch compiles", error=True)


def run_sample(config: SampleArgs) -> list[Row]:
    """num_samples responses to every prompt, as sft rows with `response_ids`; written or printed, and returned."""
    prompts, tokenizer = within_limits(config, prompts_of(config)), load_tokenizer(config.model)
    examples, _ = prompt_examples(prompts, tokenizer, Limits(config.max_prompt_length))
    longest = max(len(example["tokens"]) for example in examples)
    each, count = config.num_samples, len(prompts) * config.num_samples
    size = min(max(config.batch_size // each, 1) * each, count)  # whole prompts
    mesh = make_mesh(config.mesh)

    def begin() -> Make:
        drawer = load_drawer(config.model, tokenizer, config.sampling, mesh, seed=config.seed, longest=longest)
        lengths = f"prompts up to {config.max_prompt_length} tokens, responses {config.sampling.max_new_tokens}"
        say_loaded(f"sample: {count} responses; {lengths}")

        def make(start: int, stop: int) -> list[Row]:
            part = prompts[start // each : stop // each]
            with jax.set_mesh(mesh.grid):
                key, at_once = jax.random.key(config.seed), {"batch_size": size, "first": start // size}
                made = drawer.generator.rows(drawer.loaded.params, part, key, samples=each, **at_once)
            return [{**carried(part[i // each]), **row} for i, row in enumerate(made)]

        return make

    return _in_one_phase("sample", config, {"prompts": digest(prompts)}, count, size, begin)


def answered(path: str) -> tuple[list[Row], list[list[Row]], Counter[str]]:
    """(rows of a file that can be scored, of each what is scored of it, reasons of the others and how often)."""
    rows, answers, dropped = list[Row](), list[list[Row]](), Counter[str]()
    for row in rows_from(path):
        try:
            answers.append(answers_of(row))
            rows.append(row)
        except DroppedRow as drop:
            dropped[drop.reason] += 1
    if not rows:
        raise UserError(f"{path}: no row is left: {Report(0, dict(dropped), 0)}; mend the file")
    return rows, answers, dropped


def run_score(config: ScoreArgs) -> list[Row]:
    """The rows of data_path with "score" added, of an ensemble "scores" too; written or printed, and returned.

    A pair gets both of each, as score_chosen and score_rejected; the share that is the right way round is said.
    """
    if not config.data_path:
        raise UserError("data_path is empty; give a .jsonl file of {prompt, response} rows, or of pairs")
    rows, answers, dropped = answered(config.data_path)
    places = np.cumsum([0, *map(len, answers)])
    tell_anew(rows, OF_SCORES)
    json_lines(rows)  # what could not be written is found before it is scored

    def begin() -> Make:
        limits = Limits(config.max_prompt_length, config.max_length)
        size, mesh = min(config.batch_size, int(places[-1])), make_mesh(config.mesh)
        named = [replace(config.model, path=path) for path in config.models] or [config.model]
        readers = [RewardModel(one, mesh, limits, batch_size=size) for one in named]
        check_combine(config.combine, [reader.loaded for reader in readers], "combine")
        flat, remarks = list(chain.from_iterable(answers)), [Counter[str]() for _ in readers]
        read = [[reader.example(one, own) for one in flat] for reader, own in zip(readers, remarks, strict=True)]
        cuts = [any(one["cut"] for one in same) for same in zip(*read, strict=True)]
        cuts = [any(cuts[slice(*ends)]) for ends in pairwise(places.tolist())]
        report = Report(len(rows), dict(dropped), sum(cuts), remarks=dict(+reduce(or_, remarks)))
        if report.truncated or dropped or report.remarks:
            tell(f"{report.mark}rows: {report}", error=True)
        longest = [max(len(one["tokens"]) for one in examples) for examples in read]
        say_loaded(f"score: {len(rows)} rows")

        def make(start: int, stop: int) -> list[Row]:
            first, parts = places[start], zip(readers, read, longest, strict=True)
            each = [reader.scores(examples[first : places[stop]], length) for reader, examples, length in parts]
            scores, members = combined(each, combine=config.combine, combine_coef=config.combine_coef)
            made = []
            for i in range(start, stop):
                new = {name: value for name, value in rows[i].items() if name not in OF_SCORES | {"_where"}}
                sides = ("_chosen", "_rejected") if len(answers[i]) == 2 else ("",)
                for place, side in enumerate(sides, places[i] - first):
                    new[f"score{side}"] = float(scores[place])
                    if members.shape[1] > 1:
                        new[f"scores{side}"] = members[place].tolist()
                made.append(new | ({"cut": True} if cuts[i] else {}))
            return made

        return make

    scored = _in_one_phase("score", config, {"rows": digest(rows)}, len(rows), config.batch_size, begin)
    pairs = [(new, preference_row(row)) for new, row in zip(scored, rows, strict=True) if "score_chosen" in new]
    margins = jnp.array([new["score_chosen"] - new["score_rejected"] for new, _ in pairs])
    right, counts = map(np.asarray, pairs_right(margins, jnp.array([pair["label"] for _, pair in pairs])))
    if counts.any():
        tell(f"score: accuracy {right[counts].mean():.3f} of {counts.sum()} pairs, equal scores half", error=True)
    return scored


def answers_of(row: Row) -> list[Row]:
    """{prompt, response, finished, response_ids} of the chosen and the rejected response of a pair; else the row.

    Raises:
        DroppedRow: a pair that training drops, too.
    """
    if layout_of(row) not in PREFERENCES:
        return [row]
    pair = preference_row(row)
    ends = zip(("chosen", "rejected"), pair["finished"], pair["ids"], strict=True)
    return [
        {"prompt": pair["prompt"], "response": pair[name], "finished": finished, "response_ids": ids}
        for name, finished, ids in ends
    ]


def _in_one_phase(
    name: str, config: SampleArgs | ScoreArgs, decided_by: Row, count: int, size: int, begin: Callable[[], Make]
) -> list[Row]:
    with open_journal(config, config.output, decided_by) as journal:
        phases = Phases(journal)
        made = phases.add(count, size, begin)
        phases.fill(name, progress=True)
        journal.finish(made.rows)
    return made.rows
