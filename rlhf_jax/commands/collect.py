"""`rlhf-jax collect` and `rlhf-jax judge`: responses to prompts, and which of them are better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from rlhf_jax.config import BestOfNArgs, CollectArgs, JudgeArgs
from rlhf_jax.data import pairs
from rlhf_jax.data.ballots import Ranking, ranking_row
from rlhf_jax.data.messages import key_of
from rlhf_jax.data.pairs import FILTERS, demonstration_of, pairs_of, preference_of, shares_of
from rlhf_jax.data.rows import DroppedRow, Row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback import judge as judging
from rlhf_jax.feedback.judge import Judge, Verdict
from rlhf_jax.feedback.judges import make_judge
from rlhf_jax.feedback.phases import Phase, Phases, digest, open_journal
from rlhf_jax.feedback.report import describe, gold_agreement, label_agreement, lines
from rlhf_jax.feedback.sources import Sources, check_rewards, prompts_of, shots_of, verdicts, verdicts_of
from rlhf_jax.runs.directory import names_given
from rlhf_jax.runs.journal import Journal
from rlhf_jax.sharding import make_mesh


class Collection:
    """What `rlhf-jax collect` works on: the responses of each source, then the labels."""

    def __init__(
        self,
        config: CollectArgs,
        prompts: Sequence[Row],
        journal: Journal,
        functions: Sequence[Callable[..., Any]] | None,
        judge: Judge | None,
    ):
        """Plan all phases."""
        self.config, self.prompts, self.phases = config, prompts, Phases(journal)
        self.work = Sources(config, prompts, self.phases, config.sources)
        for number in range(len(self.work.sources)):
            self.work.draw(number)
        self._labels = -1
        if config.label == "reward":
            self._labels = self.work.score(functions)
        if config.label == "judge":
            self._labels = self.phases.add(self._judging(judge))

    def _judging(self, judge: Judge | None) -> Phase:
        """Rows {verdicts} on all pairs of the responses to a prompt."""
        work = self.work
        key = jax.random.fold_in(jax.random.key(self.config.seed), len(work.sources))
        make_one = (lambda: judge) if judge else partial(make_judge, self.config.judge, work.mesh)
        groups = lambda i: [(self.prompts[i]["prompt"], [item["text"] for item in work.responses(i)])]  # noqa: E731
        return Phase(len(self.prompts), work.rows_at_once, partial(verdicts, make_one, groups, key))

    def label(self, i: int) -> dict[str, Any]:
        """The scores or verdicts on the responses to prompt i; empty without."""
        return self.phases.row(self._labels, i) if self._labels >= 0 else {}

    def ranked(self, i: int) -> Row:
        """A ranking row of prompt i, labelled if there are labels."""
        items, label = self.work.responses(i), self.label(i)
        if self.config.label == "sources":
            items = [{**item, "rank": self.work.names.index(item["source"])} for item in items]
        if "scores" in label:
            items = [{**item, "score": score} for item, score in zip(items, label["scores"], strict=True)]
        rater = {"rater": self.config.label} if self.config.label != "none" else {}
        said = judged(items, verdicts_of(label)) if "verdicts" in label else {"responses": items, **rater}
        kept = {name: self.prompts[i][name] for name in ("id",) if name in self.prompts[i]}
        return {**kept, "prompt": self.prompts[i]["prompt"], **said}


def run_collect(
    config: CollectArgs,
    *,
    rows: Any = None,
    functions: Sequence[Callable[..., Any]] | None = None,
    judge: Judge | None = None,
    gold: Callable[..., Any] | None = None,
) -> list[Row]:
    """Sample, label, and write config.output; prints a summary, writes it beside the output, and returns the rows.

    `rows` (dicts with a prompt), `functions`, `judge` and `gold` replace those that the config names.
    """
    prompts = prompts_of(config, rows)
    given = names_given(functions=functions, judge=judge)
    if config.label == "reward" and not (functions or config.reward.model or config.reward.functions):
        raise UserError("label is reward, but nothing scores; give reward.model or reward.functions")
    if config.label == "judge" and judge is None:
        config.judge.check_one()
    check_rewards(config, prompts, functions if config.label == "reward" else [], gold)
    decided_by = {"prompts": digest(prompts), "demonstrations": [digest(shots_of(each)) for each in config.sources]}
    with claim(config, {**decided_by, "given in Python": given}) as journal:
        work = Collection(config, prompts, journal, functions, judge)
        work.phases.fill("collect", progress=config.progress)
        ranked = [work.ranked(i) for i in range(len(prompts))]
        found = [verdicts_of(work.label(i)) for i in range(len(prompts))]
        shares = [
            judged_shares(v) if config.label == "judge" else shares_of(r) for v, r in zip(found, ranked, strict=True)
        ]
        pairs = pairs_of(ranked, shares)
        kept = FILTERS[config.length_filter](ranked, pairs)
        if config.schema == "ranking":
            out = ranked
        elif config.schema == "preference":
            out = [preference_of(ranked, pair) for pair in kept]
        else:
            out = [best for row in ranked if (best := demonstration_of(row)) is not None]
        summary = describe(config, ranked, pairs, kept)
        if config.label == "judge":
            summary["judge"] = judging.report([verdict for each in found for verdict in each])
            summary["apart"] = sum("raters" in row for row in ranked)
        if config.schema == "sft":
            summary["without_best"] = len(ranked) - len(out)
        if gold is not None or config.reward.gold:
            summary["gold"] = gold_agreement(prompts, kept, work.work.gold(gold))
        return end("collect", config, journal, out, summary)


def run_judge(config: JudgeArgs, *, rows: Any = None, judge: Judge | None = None) -> list[Row]:
    """Have the responses of rows compared and write config.output; prints a report, and returns the rankings.

    `rows` and `judge` replace those that the config names. Labels that are there are compared with the verdicts.
    """
    if judge is None:
        config.judge.check_one()
    given: list[Ranking] = []
    dropped = 0
    for row in rows_from(config.path if rows is None else rows, config.fields):
        try:
            given.append(ranking_row(row, unlabelled=True))
        except DroppedRow:
            dropped += 1
    several = [one for one in given if len(one.responses) > 1]  # a row of one labelled answer has nothing to compare
    dropped += len(given) - len(several)
    given = several[: config.limit or None]
    if not given:
        raise UserError(f"none of {dropped} rows has two responses to compare; give ranking or preference rows")
    groups = [(one.prompt, [key_of(response) for response in one.responses]) for one in given]
    decided_by = {"rows": digest(groups), "given in Python": names_given(judge=judge)}
    with claim(config, decided_by) as journal:
        make_one = (lambda: judge) if judge else partial(make_judge, config.judge, make_mesh(config.mesh))
        key = jax.random.key(config.seed)
        phases = Phases(journal)
        phases.add(Phase(len(groups), config.batch_size, partial(verdicts, make_one, lambda i: [groups[i]], key)))
        phases.fill("judge", progress=config.progress)
        found = [verdicts_of(row) for row in journal.rows]
        out = [ranking_of(one, each) for one, each in zip(given, found, strict=True)]
        summary: dict[str, Any] = {"rows": len(out), "dropped": dropped, "apart": sum("raters" in row for row in out)}
        summary["judge"] = judging.report([verdict for each in found for verdict in each])
        summary |= {"labels": label_agreement(given, found)} if any(one.ballots for one in given) else {}
        return end("judge", config, journal, out, summary)


def claim(config: BestOfNArgs | CollectArgs | JudgeArgs, decided_by: dict[str, Any]) -> Journal:
    """OUTPUT.part.

    Raises:
        UserError: no output is named, or it cannot be written.
    """
    if not config.output:
        raise UserError("output is empty; name the .jsonl file to write, as --output rows.jsonl")
    return open_journal(config, config.output, decided_by)


def end(
    name: str, config: BestOfNArgs | CollectArgs | JudgeArgs, journal: Journal, out: list[Row], summary: dict[str, Any]
) -> list[Row]:
    """Write OUTPUT and the summary beside it, and print it."""
    journal.finish(out, summary)
    tell("\n".join([*lines(summary), f"{name}: {len(out)} rows, {config.output}"]))
    return out


def judged_shares(verdicts: Sequence[Verdict]) -> pairs.Shares:
    """What a judge says of the pairs that it has decided."""
    return {(v.first, v.second): v.share for v in verdicts if v.share is not None}


def judged(items: Sequence[Row], verdicts: Sequence[Verdict]) -> Row:
    """{responses, rater} with a judge's ranks, or {responses, raters} where its verdicts do not link all responses:
    a ranking of each part, so that nothing is said of two that are not linked."""
    parts = judging.ranks_by_part(len(items), verdicts) or [[None] * len(items)]
    if len(parts) > 1:
        return {"responses": list(items), "raters": [{"rater": "judge", "ranks": ranks} for ranks in parts]}
    return {"responses": [{**item, "rank": r} for item, r in zip(items, parts[0], strict=True)], "rater": "judge"}


def ranking_of(one: Ranking, verdicts: Sequence[Verdict]) -> Row:
    """A ranking row by a judge."""
    return {"prompt": one.prompt, **judged(one.items(), verdicts)}
