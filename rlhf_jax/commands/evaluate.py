"""`rlhf-jax evaluate`: models beside one another, and how often each beats a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from rlhf_jax.config import EvaluateArgs
from rlhf_jax.data.rows import Row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.comparison import compare, evaluation_lines
from rlhf_jax.feedback.judge import Judge, verdicts_of
from rlhf_jax.feedback.judges import Group
from rlhf_jax.feedback.measures import held_out, measuring
from rlhf_jax.feedback.phases import Phase, Phases, digest, open_journal
from rlhf_jax.feedback.prompts import check_rewards, kept_fields, prompts_of, shots_of
from rlhf_jax.feedback.report import Summary, judge_report
from rlhf_jax.feedback.sources import Sources
from rlhf_jax.runs.directory import SUMMARY, earlier_summary, names_given, write_config
from rlhf_jax.types import RewardFn

RESPONSES = "responses.jsonl"


def run_evaluate(
    config: EvaluateArgs,
    *,
    rows: object = None,
    text_rows: object = None,
    functions: Sequence[RewardFn] | None = None,
    judge: Judge | None = None,
    gold: RewardFn | None = None,
) -> Summary:
    """Sample, measure, compare, and write config.output_dir; prints a table and returns the summary.

    `rows` (prompts), `text_rows` (held-out rows), `functions`, `judge` and `gold` replace those that the config names.
    """
    if judge is None and config.judge.named():
        config.judge.check_one()
    prompts, text_source = prompts_of(config, rows), config.text_path if text_rows is None else text_rows
    text = rows_from(text_source) if text_source else []
    check_rewards(config, prompts, functions, gold)
    made_of = {
        "prompts": digest(prompts),
        "text": digest(text),
        "demonstrations": [digest(shots_of(source)) for source in config.sources],
        "given in Python": list(names_given(functions=functions, judge=judge, gold=gold)),
    }
    summary = earlier_summary("evaluate", config, [RESPONSES, SUMMARY], made_of)
    if summary is None:
        summary = _evaluate(config, prompts, text, made_of, functions, judge, gold)
    tell("\n".join(evaluation_lines(summary)))
    return summary


def _evaluate(
    config: EvaluateArgs,
    prompts: Sequence[Row],
    text: Sequence[Row],
    made_of: Mapping[str, object],
    functions: Sequence[RewardFn] | None,
    judge: Judge | None,
    gold: RewardFn | None,
) -> Summary:
    path = Path(config.output_dir)
    path.mkdir(parents=True, exist_ok=True)
    with open_journal(config, path / RESPONSES, made_of) as journal:
        phases = Phases(journal)
        sources = Sources(config, prompts, phases, config.sources)
        if config.baseline and config.baseline not in sources.names:
            named = ", ".join(sources.names)
            raise UserError(f"baseline {config.baseline!r} is none of the sources: {named}; name one")
        baseline = sources.names.index(config.baseline) if config.baseline else 0
        measure, read = measuring(config, sources), []
        for number, source in enumerate(sources.sources):
            sources.draw(number, measure)
            if text:
                read.append(phases.add(1, 1, partial(held_out, config, sources, source, text)))
        scores = functions or config.reward.model or config.reward.functions
        scored = sources.score(functions) if scores else None
        judges = judge or config.judge.named()
        pairs_of = partial(beside_baseline, sources, baseline)
        compared = sources.judge(config, judge, pairs_of) if judges else None
        write_config(path, "evaluate", config, "output_dir")
        phases.fill("evaluate", progress=config.progress)

        golds = sources.gold(gold)
        out = [row_of(sources, i, scored, golds, compared) for i in range(len(prompts))]
        perplexities = [float(np.exp(phase[0]["nll"] / phase[0]["tokens"])) for phase in read]
        models = compare(out, sources.names, sources.each, baseline, perplexities)
        summary: Summary = {"prompts": len(out), "baseline": sources.names[baseline], "models": models}
        if compared:
            summary["judge"] = judge_report([verdict for row in out for verdict in verdicts_of(row)])
        summary["made_of"] = made_of
        journal.finish(out, summary, path / SUMMARY)
    return summary


def beside_baseline(sources: Sources, baseline: int, i: int, items: list[Row]) -> list[Group]:
    """Of the responses to prompt i: (prompt, [one of another source, one of the baseline]), source by source."""
    texts = {name: [item["text"] for item in items if item["source"] == name] for name in sources.names}
    base = texts.pop(sources.names[baseline])
    return [(sources.prompts[i]["prompt"], [a, b]) for own in texts.values() for a, b in zip(own, base, strict=False)]


def row_of(
    sources: Sources, i: int, scored: Phase | None, golds: Sequence[Sequence[float]] | None, compared: Phase | None
) -> Row:
    """The row of prompt i: its responses with all that was measured of them, and the verdicts on them."""
    items = sources.responses(i)
    if scored:
        items = [{**item, "score": score} for item, score in zip(items, scored[i]["scores"], strict=True)]
    if golds is not None:
        items = [{**item, "gold": value} for item, value in zip(items, golds[i], strict=True)]
    return {**kept_fields(sources.prompts[i]), "responses": items, **(compared[i] if compared else {})}
