"""`rlhf-jax evaluate` of the reward itself, on rows that people compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.config import EvaluateArgs, resolve
from rlhf_jax.data.ballots import Ranking, ranking_row, remarks_of, with_text
from rlhf_jax.data.chat import in_transcript
from rlhf_jax.data.encoding import Limits, Report
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.messages import text_of
from rlhf_jax.data.numbers import is_number
from rlhf_jax.data.rows import DroppedRow, Row, layout_of, tell_anew, unread_of
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.phases import Make, Phases, digest, finish_evaluation, models_of, open_journal
from rlhf_jax.feedback.reward_judge import check_against
from rlhf_jax.feedback.reward_report import CORE, SECTIONS, SECTIONS_2, Scored, reward_lines, reward_report
from rlhf_jax.feedback.scorer import Scorer, golds_of
from rlhf_jax.inference.reward_functions import columns_for, functions_of
from rlhf_jax.runs.directory import SCORED, SUMMARY, Summary, earlier_summary, names_given
from rlhf_jax.sharding import make_mesh
from rlhf_jax.types import RewardFn

WHY = "the reward failed, or a judge gave no answer"

PRIOR_SETS = SECTIONS["Prior Sets"]


class Item(NamedTuple):
    """A row, whether it is of RewardBench (`bench_of`), and its responses."""

    row: Row
    bench: int
    ranking: Ranking


def evaluate_reward(
    config: EvaluateArgs, *, rows: object, functions: Sequence[RewardFn] | None, gold: RewardFn | None
) -> Summary:
    """Score, measure, and write config.output_dir (scored.jsonl, summary.json); prints tables, returns the summary.

    `rows`, `functions` and `gold` replace those that the config names.
    """
    asked = functions_of(config.reward, functions)
    if not (asked or config.reward.named()):
        raise UserError("nothing is evaluated; give reward.model, reward.models, reward.judge or reward.functions")
    judge = gold or (resolve(config.reward.gold) if config.reward.gold else None)
    items = _items(config.preference_path if rows is None else rows)
    fields = [{name: item.row[name] for name in unread_of(item.row)} for item in items]
    tell_anew([item.row for item in items], {"scores", "golds"})
    prompts, where = zip(*((item.ranking.prompt, item.ranking.where) for item in items), strict=True)
    columns = columns_for([*asked, *([judge] if judge else [])], prompts, fields, where)
    check_against(config.reward.judge, columns, where)
    made_of = {
        "preferences": digest([item.row for item in items]),
        "given in Python": list(names_given(functions=functions, gold=gold)),
    }
    made_of |= models_of(config)
    summary = earlier_summary("evaluate", config, [SCORED, SUMMARY], made_of, reward_lines)
    if summary is None:
        path = Path(config.output_dir)
        path.mkdir(parents=True, exist_ok=True)
        with open_journal(config, path / SCORED, made_of, path / SUMMARY) as journal:
            phases = Phases(journal)
            phase = phases.add(len(items), config.batch_size, partial(_scoring, config, items, columns, functions))
            phases.fill("evaluate", progress=config.progress)
            said = phase.rows
            if judge:
                shown = [in_transcript(item.ranking.prompt) for item in items]
                golds = golds_of(judge, list(map(_answers, items, shown, columns)), config.reward)
                said = [{**scores, "golds": own} for scores, own in zip(said, golds, strict=True)]
            whole = [each for each in zip(items, said, strict=True) if None not in each[1]["scores"]]
            if not whole:
                raise UserError(f"every row has a response that has no score: {WHY}; look at the reward")
            summary = reward_report([_scored(*each) for each in whole])
            if len(whole) < len(items):
                tell(f"! {len(items) - len(whole)} rows with a response that has no score are left out: {WHY}")
                summary["unscored"] = len(items) - len(whole)
            summary["made_of"] = made_of
            plain = [{name: value for name, value in item.row.items() if name != "_where"} for item in items]
            out = [row | _in_place(row, own) for row, own in zip(plain, said, strict=True)]
            finish_evaluation(config, journal, out, summary)
    tell("\n".join(reward_lines(summary)))
    return summary


def _scoring(
    config: EvaluateArgs, items: Sequence[Item], columns: Sequence[Row], functions: Sequence[RewardFn] | None
) -> Make:
    """Makes the rows {scores} of the responses of each item."""
    limits = Limits(config.max_prompt_length, config.max_length)
    mesh, size, key = make_mesh(config.mesh), config.batch_size, jax.random.key(config.seed)
    scorer = Scorer(config.reward, mesh, limits, batch_size=size, functions=functions)
    shown = scorer.models[0].tokenizer.prompt_text if scorer.models else in_transcript

    def make(start: int, stop: int) -> list[Row]:
        groups = [_answers(items[i], shown(items[i].ranking.prompt), columns[i]) for i in range(start, stop)]
        return scorer.of_groups(groups, jax.random.fold_in(key, start))

    return make


def _in_place(row: Row, said: Row) -> Row:
    """What is said of the responses of an item, null in the places of those that are empty and so are not asked."""
    if layout_of(row) != "ranking":
        return said
    values = {name: iter(column) for name, column in said.items()}
    return {name: [next(own) if text else None for text in with_text(row)] for name, own in values.items()}


def _items(source: Any) -> list[Item]:
    """The rows that can be used; says what is dropped."""
    items, dropped = list[Item](), Counter[str]()
    given = [(of_bench(row), bench_of(row)) for row in rows_from(source)]
    for row, bench in given:
        try:
            items.append(Item(row, bench, ranking_row(row, unlabelled=True)))
        except DroppedRow as drop:
            dropped[drop.reason] += 1
    report = Report(len(items), dict(dropped), 0, remarks=remarks_of([row for row, _ in given]))
    tell(f"{report.mark}rows: {report}")
    if not items:
        raise UserError("no row holds two responses to a prompt; give preference or ranking rows")
    return items


def bench_of(row: Row) -> int:
    """1 for a row of RewardBench (or of its prior sets), 2 for one of RewardBench 2, 0 for any other."""
    subset, chosen = row.get("subset"), row.get("chosen")
    lists = isinstance(chosen, list) and all(isinstance(text, str) for text in chosen)
    if layout_of(row) != "preference" or not isinstance(subset, str):
        return 0
    return 2 if lists and subset in SECTIONS_2 else int(not lists and subset in (*CORE, *PRIOR_SETS))


def of_bench(row: Row) -> Row:
    """A row as RewardBench reads its own: the prompt is a message of the user, and where `chosen` and `rejected` are
    lists of texts, it is a ranking of them all; any other row as it is.
    """
    bench = bench_of(row)
    if bench and isinstance(row["prompt"], str) and row["subset"] not in PRIOR_SETS:
        row = {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if bench != 2 or not (isinstance(chosen, list) and isinstance(rejected, list)):
        return row
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    ranks = [0] * len(chosen) + [1] * len(rejected)
    return {**rest, "responses": [{"text": text} for text in [*chosen, *rejected]], "ranks": ranks}


def _answers(item: Item, shown: str, columns: Row) -> list[Row]:
    """The responses of an item as `Scorer` takes them."""
    seen = {"prompt": item.ranking.prompt, "shown": shown, "columns": columns}
    return [
        {**seen, "response": text_of(response), "finished": finished, "response_ids": ids}
        for response, finished, ids, _ in item.ranking.answers
    ]


def _scored(item: Item, said: Row) -> Scored:
    """An item and its {scores, golds?} as the report takes them.

    `gold` of the responses stands in for golds, and where nobody says who is better they do.
    """
    row, bench, ranking = item
    golds = said.get("golds") or [answer.extra.get("gold") for answer in ranking.answers]
    known = np.array(golds, np.float64) if all(is_number(value) for value in golds) else None
    if ranking.ballots:
        labels = ranking.consensus()[1]
    elif known is not None:
        labels = (np.sign(known[:, None] - known[None, :]) + 1) / 2
    else:
        labels = np.full([len(golds)] * 2, np.nan)
    if bench == 2:  # which compares no two that are chosen, or rejected
        labels = np.where(labels == 0.5, np.nan, labels)
    return Scored(
        prompt=prompt_key(row),
        subset=str(row.get("subset") or ""),
        labels=labels,
        scores=np.array(said["scores"], np.float64),
        golds=known,
        lengths=np.array([len(text_of(response)) for response in ranking.responses]),
        ordered=layout_of(row) == "ranking" and not bench,
        bench=bench,
        id=str(row.get("id", "")),
    )
