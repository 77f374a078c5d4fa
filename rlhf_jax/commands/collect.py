"""`rlhf-jax collect` and `rlhf-jax judge`: responses to prompts, and which of them are better."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from rlhf_jax.config import CollectArgs, JudgeArgs
from rlhf_jax.data.messages import key_of
from rlhf_jax.data.pairs import (
    FILTERS,
    Pair,
    best_is_empty,
    demonstration_of,
    left_out,
    length_bias,
    pairs_of,
    preference_of,
    shares_of,
)
from rlhf_jax.data.rows import Row, carried
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import report
from rlhf_jax.feedback.judge import Judge, judged, verdicts_of
from rlhf_jax.feedback.judges import Group, asks_alone, verdicts
from rlhf_jax.feedback.phases import Phase, Phases, digest, named, open_journal
from rlhf_jax.feedback.selection import Selection, select
from rlhf_jax.feedback.sources import (
    Sources,
    check_rewards,
    prompts_of,
    rankings_given,
    shots_of,
    within_limits,
)
from rlhf_jax.runs.directory import Summary, names_given
from rlhf_jax.types import RewardFn


def run_collect(
    config: CollectArgs,
    *,
    rows: object = None,
    functions: Sequence[RewardFn] | None = None,
    judge: Judge | None = None,
    gold: RewardFn | None = None,
) -> list[Row]:
    """Sample, label, and write config.output; prints a summary, writes it beside the output, and returns the rows.

    `rows` (dicts with a prompt), `functions`, `judge` and `gold` replace those that the config names.
    """
    prompts = prompts_of(config, rows)
    if config.label == "reward" and not (functions or config.reward.named()):
        raise UserError("label is reward, but nothing scores; give reward.model, reward.judge or reward.functions")
    if config.label == "judge" and judge is None:
        config.judge.check_one()
    check_rewards(config, prompts, functions if config.label == "reward" else [], gold)
    output, prompts = named(config.output), within_limits(config, prompts)
    decided_by = {
        "prompts": digest(prompts),
        "demonstrations": [digest(shots_of(source)) for source in config.sources],
        "given in Python": names_given(functions=functions, judge=judge),
    }
    with open_journal(config, output, decided_by) as journal:
        phases = Phases(journal)
        sources = Sources(config, prompts, phases, config.sources)
        for number in range(len(sources.names)):
            sources.draw(number)
        if config.label == "reward":
            sources.score(functions)
        chosen = Chosen(config, sources)
        of_chosen = lambda i, items: [(prompts[i]["prompt"], [items[j]["text"] for j in chosen[i].places])]  # noqa: E731
        compared = sources.judge(config, judge, of_chosen) if config.label == "judge" else None
        phases.fill("collect", progress=config.progress)

        order = chosen.order()
        ranked = [ranked_row(config, sources, compared, i, chosen[i]) for i in order]
        decided, shares = [], [shares_of(row) for row in ranked]
        if compared:
            decided = [verdicts_of(compared[i]) for i in order]
            shares = [{(v.first, v.second): v.share for v in each if v.share is not None} for each in decided]
        pairs = pairs_of(ranked, shares)
        kept = FILTERS[config.length_filter](ranked, pairs)
        out = in_schema(config, ranked, kept)
        summary: Summary = {"prompts": len(ranked), "sources": report.source_counts(ranked)}
        summary |= {**sources.unscored(), **chosen.summary(order)}
        of_pairs = {"pairs": (config.label != "none", pairs), "pairs_kept": (config.length_filter != "off", kept)}
        summary |= {name: length_bias(ranked, each) for name, (told, each) in of_pairs.items() if told}
        if compared:
            summary["judge"] = report.judge_report([verdict for each in decided for verdict in each])
            summary["apart"] = sum("raters" in row for row in ranked)
        if config.label != "none":
            summary["pairs_left_out"] = left_out(ranked, shares)
        summary |= not_in_schema(config, ranked, kept, out)
        if (golds := sources.gold(gold)) is not None:
            of_kept = [[golds[i][j] for j in chosen[i].places] for i in order]
            summary["gold"] = report.gold_agreement([prompts[i] for i in order], kept, of_kept)
        report.write_and_tell("collect", journal, out, summary)
    return out


class Chosen:
    """What is kept of the responses to each prompt, by config.select; known once those before it are made."""

    def __init__(self, config: CollectArgs, sources: Sources):
        """Add a phase to those of `sources` if the members of a reward ensemble are asked."""
        self.config, self.sources = config, sources
        self.members = sources.members() if config.select in ("disagreement", "top_two") else None
        self._found: dict[int, Selection] = {}

    def __getitem__(self, i: int) -> Selection:
        config = self.config
        if i not in self._found:
            items = self.sources.responses(i)
            if config.select == "all":
                return Selection(list(range(len(items))), None)
            texts = ["" if item.get("score", 0.0) is None else item["text"] for item in items]
            scores = np.array(self.members[i]["members"]) if self.members else None
            rng = np.random.default_rng([config.seed, i])
            self._found[i] = select(config.select, texts, scores, config.selected, rng)
        return self._found[i]

    def order(self) -> list[int]:
        """The prompts that are kept, those of the most information first."""
        config, numbers = self.config, list(range(len(self.sources.prompts)))
        if config.select == "all":
            return numbers
        numbers = [i for i in numbers if len(self[i].places) > 1]
        if not numbers:
            raise UserError("no prompt has two different responses; raise num_samples, or a temperature")
        if config.select != "random":
            return sorted(numbers, key=lambda i: -(self[i].information or 0.0))[: config.most or None]
        drawn = np.random.default_rng(config.seed).permutation(numbers)[: config.most or None]
        return sorted(drawn.tolist())

    def summary(self, order: Sequence[int]) -> Summary:
        """{drawn: responses of all prompts, alike: prompts without two different ones, information: its mean}."""
        if self.config.select == "all":
            return {}
        count = len(self.sources.prompts)
        alike = sum(len(self[i].places) < 2 for i in range(count))
        information = {"information": float(np.mean([self[i].information for i in order]))} if self.members else {}
        return {"drawn": count * sum(self.sources.each), "alike": alike, **information}


def ranked_row(config: CollectArgs, sources: Sources, compared: Phase | None, i: int, chosen: Selection) -> Row:
    """A ranking row of what is chosen for prompt i, labelled if there are labels."""
    row, responses = carried(sources.prompts[i]), sources.responses(i)
    items = [responses[j] for j in chosen.places]
    if chosen.information is not None:
        row["information"] = chosen.information
    if compared:
        return {**row, **judged(items, verdicts_of(compared[i]))}
    if config.label == "sources":
        items = [{**item, "rank": sources.names.index(item["source"])} for item in items]
    return {**row, "responses": items, **({"rater": config.label} if config.label != "none" else {})}


def in_schema(config: CollectArgs, ranked: list[Row], pairs: Sequence[Pair]) -> list[Row]:
    """The rows of OUTPUT: ranking rows, a row for each of the pairs, or the best response of each ranking."""
    if config.schema == "ranking":
        return ranked
    if config.schema == "preference":
        return [preference_of(ranked, pair) for pair in pairs]
    return [best for row in ranked if (best := demonstration_of(row)) is not None]


def not_in_schema(config: CollectArgs, ranked: Sequence[Row], kept: Sequence[Pair], out: Sequence[Row]) -> Summary:
    """How many prompts give no row of OUTPUT, or not that of their best response."""
    if config.schema == "preference":
        return {"without_pair": len(ranked) - len({pair.group for pair in kept})}
    if config.schema == "sft":
        return {"without_best": len(ranked) - len(out), "best_empty": sum(map(best_is_empty, ranked))}
    return {}


def run_judge(config: JudgeArgs, *, rows: object = None, judge: Judge | None = None) -> list[Row]:
    """Have the responses of rows compared and write config.output, if any; prints a report, and returns the rankings.

    `rows` and `judge` replace those that the config names. Labels that are there are compared with the verdicts.
    """
    if judge is None:
        config.judge.check_one()
    labelled, dropped = rankings_given(config.path if rows is None else rows, config.fields)
    several = [one for one in labelled if len(one.responses) > 1]  # a row of one labelled answer may be among them
    dropped += len(labelled) - len(several)
    if not several:
        raise UserError(f"none of {dropped} rows has two responses to compare; give ranking or preference rows")
    given = several[: config.limit or None]
    groups: list[Group] = [(one.prompt, [key_of(response) for response in one.responses]) for one in given]
    decided_by = {"rows": digest(groups), "given in Python": names_given(judge=judge)}
    with open_journal(config, config.output, decided_by) as journal:
        phases = Phases(journal)
        begin = partial(verdicts, config, judge, lambda i: [groups[i]], jax.random.key(config.seed))
        compared = phases.add(len(groups), config.batch_size, begin, apart=asks_alone(config.judge, judge))
        phases.fill("judge", progress=config.progress)

        decided = [verdicts_of(row) for row in compared.rows]
        out = [
            {**one.fields, "prompt": one.prompt, **judged(one.items(), each)}
            for one, each in zip(given, decided, strict=True)
        ]
        summary: Summary = {"rows": len(out), "dropped": dropped, "apart": sum("raters" in row for row in out)}
        summary["judge"] = report.judge_report([verdict for each in decided for verdict in each])
        if any(one.ballots for one in given):
            summary["labels"] = report.label_agreement(given, decided)
        report.write_and_tell("judge", journal, out, summary)
    return out
