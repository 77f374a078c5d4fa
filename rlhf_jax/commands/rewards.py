"""`rlhf-jax evaluate` of the reward itself, on rows that people compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.config import EvaluateArgs, resolve
from rlhf_jax.data.ballots import Ranking, ranking_row
from rlhf_jax.data.chat import in_transcript
from rlhf_jax.data.encoding import Limits, Report
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.messages import text_of
from rlhf_jax.data.rows import DroppedRow, Row, layout_of, unread_of
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.phases import Make, Phases, digest, open_journal
from rlhf_jax.feedback.reward_report import SECTIONS, SECTIONS_2, Scored, reward_lines, reward_report
from rlhf_jax.inference.reward_functions import call_reward, columns_for, functions_of
from rlhf_jax.inference.scoring import Scorer, function_inputs
from rlhf_jax.runs.directory import SUMMARY, Summary, earlier_summary, names_given, write_config
from rlhf_jax.sharding import make_mesh
from rlhf_jax.types import RewardFn

SCORED = "scored.jsonl"

BENCHES = {*SECTIONS_2, *(subset for section in SECTIONS.values() for subset in section)}
"""Subsets of RewardBench."""


def evaluate_reward(
    config: EvaluateArgs, *, rows: object, functions: Sequence[RewardFn] | None, gold: RewardFn | None
) -> Summary:
    """Score, measure, and write config.output_dir (scored.jsonl, summary.json); prints tables, returns the summary.

    `rows`, `functions` and `gold` replace those that the config names.
    """
    asked = functions_of(config.reward, functions)
    if not (asked or config.reward.paths):
        raise UserError("nothing is evaluated; give reward.model, reward.models or reward.functions")
    gold = gold or (resolve(config.reward.gold) if config.reward.gold else None)
    given, compared = _compared(rows if rows is not None else config.preference_path)
    fields = [{name: row[name] for name in unread_of(row)} for row in given]
    where = [one.where for one in compared]
    columns = columns_for([*asked, *([gold] if gold else [])], [one.prompt for one in compared], fields, where)
    made_of = {"preferences": digest(given), "given in Python": list(names_given(functions=functions, gold=gold))}
    summary = earlier_summary("evaluate", config, [SCORED, SUMMARY], made_of)
    if summary is None:
        path = Path(config.output_dir)
        path.mkdir(parents=True, exist_ok=True)
        with open_journal(config, path / SCORED, made_of) as journal:
            scorer = _Reader(config, compared, columns, functions, gold)
            phases = Phases(journal)
            phase = phases.add(len(compared), config.batch_size, scorer.begin)
            write_config(path, "evaluate", config, "output_dir")
            phases.fill("evaluate", progress=config.progress)
            plain = [{name: value for name, value in row.items() if name != "_where"} for row in given]
            out = [row | said for row, said in zip(plain, phase.rows, strict=True)]
            summary = reward_report([_scored(*each) for each in zip(given, compared, phase.rows, strict=True)])
            summary["made_of"] = made_of
            journal.finish(out, summary, path / SUMMARY)
    tell("\n".join(reward_lines(summary)))
    return summary


def _compared(source: Any) -> tuple[list[Row], list[Ranking]]:
    """The rows that can be used, and the responses of each; says what is dropped."""
    given, compared, dropped = [], [], dict[str, int]()
    for row in rows_from(source):
        row = of_bench(row)
        try:
            compared.append(ranking_row(row, unlabelled=True))
        except DroppedRow as drop:
            dropped[drop.reason] = dropped.get(drop.reason, 0) + 1
        else:
            given.append(row)
    report = Report(len(given), dropped, 0)
    tell(f"{report.mark}rows: {report}")
    if not given:
        raise UserError("no row holds two responses to a prompt; give preference or ranking rows")
    return given, compared


def of_bench(row: Row) -> Row:
    """A row of RewardBench as its own code reads it: the prompt is a message of the user, and where there are lists of
    texts, `chosen` and `rejected`, it is a ranking of them all; any other row as it is.
    """
    if not isinstance(row.get("prompt"), str) or row.get("subset") not in BENCHES or layout_of(row) != "preference":
        return row
    row = {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
    chosen, rejected = row["chosen"], row["rejected"]
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return row
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    ranks = [0] * len(chosen) + [1] * len(rejected)
    return {**rest, "responses": [{"text": text} for text in [*chosen, *rejected]], "ranks": ranks}


class _Reader:
    """Makes the journal's rows {scores, golds?} of the responses of each row."""

    def __init__(
        self,
        config: EvaluateArgs,
        compared: Sequence[Ranking],
        columns: Sequence[Row],
        functions: Sequence[RewardFn] | None,
        gold: RewardFn | None,
    ):
        self.config, self.compared, self.columns = config, compared, columns
        self.functions, self.gold = functions, gold

    def begin(self) -> Make:
        config = self.config
        limits = Limits(config.max_prompt_length, config.max_length)
        mesh, size = make_mesh(config.mesh), config.batch_size
        scorer = Scorer(config.reward, mesh, limits, batch_size=size, functions=self.functions)
        shown = scorer.models[0].tokenizer.prompt_text if scorer.models else in_transcript

        def make(start: int, stop: int) -> list[Row]:
            rows = [
                {
                    "prompt": one.prompt,
                    "response": text_of(response),
                    "finished": finished,
                    "response_ids": ids,
                    "shown": shown(one.prompt),
                    "columns": columns,
                }
                for one, columns in zip(self.compared[start:stop], self.columns[start:stop], strict=True)
                for response, finished, ids, _ in one.answers
            ]
            told = {"scores": iter(scorer(rows).tolist())}
            if self.gold:
                timeout, retries = config.reward.timeout, config.reward.retries
                golds = call_reward(self.gold, *function_inputs(rows), timeout=timeout, retries=retries)
                told["golds"] = iter(golds.tolist())
            return [
                {name: [next(values) for _ in one.answers] for name, values in told.items()}
                for one in self.compared[start:stop]
            ]

        return make


def _scored(row: Row, one: Ranking, said: Row) -> Scored:
    """A row, its responses and {scores, golds?} as the report takes them.

    `gold` of the responses stands in for golds, and where nobody says who is better they do.
    """
    golds = said.get("golds") or [answer.extra.get("gold") for answer in one.answers]
    known = np.array(golds, np.float64) if all(isinstance(value, int | float) for value in golds) else None
    if one.ballots:
        labels = one.consensus()[1]
    elif known is not None:
        labels = (np.sign(known[:, None] - known[None, :]) + 1) / 2
    else:
        labels = np.full([len(golds)] * 2, np.nan)
    bench = row.get("subset") in BENCHES
    if bench:  # which compares no two that are chosen, or rejected
        labels = np.where(labels == 0.5, np.nan, labels)
    return Scored(
        prompt=prompt_key(row),
        subset=str(row.get("subset") or ""),
        labels=labels,
        scores=np.array(said["scores"], np.float64),
        golds=known,
        lengths=np.array([len(text_of(response)) for response in one.responses]),
        ordered=layout_of(row) == "ranking" and not bench,
        id=str(row.get("id", "")),
    )
