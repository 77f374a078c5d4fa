"""`rlhf-jax evaluate`: models beside one another, and how often each beats a baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.commands.rewards import evaluate_reward
from rlhf_jax.config import EvaluateArgs, SourceConfig
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import sft_examples
from rlhf_jax.data.rows import DroppedRow, Row, carried, layout_of
from rlhf_jax.data.schemas import sft_row, text_row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.judge import Judge, verdicts_of
from rlhf_jax.feedback.judges import Group
from rlhf_jax.feedback.phases import Make, Phases, digest, finish_evaluation, models_of, open_journal, source_name
from rlhf_jax.feedback.report import compare, evaluation_lines, judge_report
from rlhf_jax.feedback.sources import (
    Drawer,
    Measure,
    Sources,
    check_rewards,
    names_of,
    prompts_of,
    shots_of,
    within_limits,
)
from rlhf_jax.inference.generate import Response, total_length
from rlhf_jax.inference.scoring import Likelihood, example_of
from rlhf_jax.models.loading import Loaded, check_same_tokenizer, load_model
from rlhf_jax.runs.directory import RESPONSES, SUMMARY, Summary, earlier_summary, names_given
from rlhf_jax.runs.twin import in_buckets
from rlhf_jax.types import RewardFn


@partial(in_buckets, option="output_dir")
def run_evaluate(
    config: EvaluateArgs,
    *,
    rows: object = None,
    text_rows: object = None,
    functions: Sequence[RewardFn] | None = None,
    judge: Judge | None = None,
    gold: RewardFn | None = None,
    preference_rows: object = None,
) -> Summary:
    """Sample, measure, compare, and write config.output_dir; prints a table and returns the summary.

    `rows` (prompts), `text_rows` (held-out rows), `functions`, `judge`, `gold` and `preference_rows` replace what the
    config names. With preferences, the reward is evaluated (`rewards.evaluate_reward`) and no model.
    """
    if config.preference_path or preference_rows is not None:
        return evaluate_reward(config, rows=preference_rows, functions=functions, gold=gold)
    if judge is None and config.judge.named():
        config.judge.check_one()
    if config.pass_at and not (functions or gold or config.reward.named() or config.reward.gold):
        raise UserError("pass_at asks for a reward; give reward.functions or reward.gold")
    prompts, text_source = prompts_of(config, rows), config.text_path if text_rows is None else text_rows
    text = rows_from(text_source) if text_source else []
    for row in text:  # of what has no answer to read it is said before hours of sampling
        with suppress(DroppedRow):
            text_row(row) if layout_of(row) == "text" else sft_row(row)
    check_rewards(config, prompts, functions, gold)
    made_of = {
        "prompts": digest(prompts),
        "text": digest(text),
        "demonstrations": [digest(shots_of(source)) for source in config.sources],
        "given in Python": list(names_given(functions=functions, judge=judge, gold=gold)),
    }
    made_of |= models_of(config)
    summary = earlier_summary("evaluate", config, [RESPONSES, SUMMARY], made_of, evaluation_lines)
    if summary is None:
        summary = _evaluate(config, prompts, text, made_of, functions, judge, gold)
    tell("\n".join(evaluation_lines(summary)))
    return summary


def _evaluate(
    config: EvaluateArgs,
    prompts: list[Row],
    text: Sequence[Row],
    made_of: Mapping[str, object],
    functions: Sequence[RewardFn] | None,
    judge: Judge | None,
    gold: RewardFn | None,
) -> Summary:
    path = Path(config.output_dir)
    names = names_of(config.sources or [SourceConfig()])
    if config.baseline and config.baseline not in names:
        raise UserError(f"baseline {config.baseline!r} is none of the sources: {', '.join(names)}; name one")
    prompts = within_limits(config, prompts)
    path.mkdir(parents=True, exist_ok=True)
    with open_journal(config, path / RESPONSES, made_of, path / SUMMARY) as journal:
        phases = Phases(journal)
        sources = Sources(config, prompts, phases, config.sources)
        baseline = sources.names.index(config.baseline) if config.baseline else 0
        measure, read = measuring(config, sources), []
        for number, source in enumerate(sources.sources):
            sources.draw(number, measure)
            if text:
                read.append(phases.add(1, 1, partial(held_out, config, sources, source, text)))
        if functions or config.reward.named():
            sources.score(functions)
        pairs_of = partial(beside_baseline, sources, baseline)
        compared = sources.judge(config, judge, pairs_of) if judge or config.judge.named() else None
        phases.fill("evaluate", progress=config.progress)

        out = [{**carried(prompt), "responses": sources.responses(i)} for i, prompt in enumerate(prompts)]
        golds = sources.gold(gold)
        for i, row in enumerate(out):
            for item, value in zip(row["responses"], golds[i] if golds else (), strict=False):
                item["gold"] = value
            row |= compared[i] if compared else {}
        perplexities = [float(np.exp(phase[0]["nll"] / phase[0]["tokens"])) for phase in read]
        models = compare(out, sources.names, sources.each, baseline, perplexities, config.pass_at)
        summary: Summary = {"prompts": len(out), "baseline": sources.names[baseline], "models": models}
        summary |= sources.unscored()
        if compared:
            summary["judge"] = judge_report([verdict for row in out for verdict in verdicts_of(row)])
        summary["made_of"] = made_of
        finish_evaluation(config, journal, out, summary)
    return summary


def beside_baseline(sources: Sources, baseline: int, i: int, items: list[Row]) -> list[Group]:
    """Of the responses to prompt i: (prompt, [one of another source, one of the baseline]), source by source.

    Each is in a pair; where one of the two has fewer, its responses come round again.
    """
    texts = {name: [item["text"] for item in items if item["source"] == name] for name in sources.names}
    base = texts.pop(sources.names[baseline])
    pairs = [
        [own[k % len(own)], base[k % len(base)]] for own in texts.values() for k in range(max(len(own), len(base)))
    ]
    return [(sources.prompts[i]["prompt"], pair) for pair in pairs]


def measuring(config: EvaluateArgs, sources: Sources) -> Callable[[Drawer], Measure]:
    """Makes, of a model, what adds to its responses their tokens and, where the config names a reference, the
    log-probs that the model itself and the reference give to them."""

    @cache
    def reference() -> Loaded:
        model = replace(config.model, path=config.reference, arch=None)
        length = total_length(config.sampling, config.max_prompt_length)
        return load_model(model, sources.mesh, jax.random.key(0), length=length)

    def begin(drawer: Drawer) -> Measure:
        models: dict[str, Loaded] = {}
        if config.reference:
            check_same_tokenizer(drawer.tokenizer, config.reference, "reference")
            models = {"logprob": drawer.loaded, "ref_logprob": reference()}
        size = config.batch_size
        readers = {name: Likelihood(one.model, sources.mesh, batch_size=size) for name, one in models.items()}

        def measure(drawn: Sequence[Response]) -> list[Row]:
            rows: list[Row] = [{"tokens": len(one.ids)} for one in drawn]
            examples = [example_of(one.prompt_ids, one.ids) for one in drawn]
            for name, reader in readers.items():
                of_each = reader.targets(models[name].params, examples, drawer.temperature)
                for row, logprobs in zip(rows, of_each, strict=True):
                    row[name] = float(logprobs.sum(dtype=np.float64))
            return rows

        return measure

    return begin


def held_out(config: EvaluateArgs, sources: Sources, source: SourceConfig, text: Sequence[Row]) -> Make:
    """Makes the one row {nll, tokens} of a source on all held-out rows."""
    drawer = sources.drawer(source)
    limits = Limits(config.max_prompt_length, config.max_length)
    examples, counts = sft_examples(list(text), drawer.tokenizer, limits, loss_on="response")
    tell(f"{source_name(source)}: held-out rows: {counts}")
    model = replace(drawer.loaded.model, length=config.max_length)  # as `sft` on rows of this length has it
    reader = Likelihood(model, sources.mesh, batch_size=config.batch_size)

    def make(start: int, stop: int) -> list[Row]:
        with jax.set_mesh(sources.mesh.grid):
            logprobs = np.concatenate(reader.targets(drawer.loaded.params, examples))
        return [{"nll": float(-logprobs.sum(dtype=np.float64)), "tokens": len(logprobs)}]

    return make
