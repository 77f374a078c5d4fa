"""What a recipe says: its stages before they run, and what came of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_jax.commands.recipe.reading import Stage, as_argument
from rlhf_jax.commands.recipe.record import Action
from rlhf_jax.config.functions import flat
from rlhf_jax.hosts.files import read_object
from rlhf_jax.hosts.json_text import JsonObject
from rlhf_jax.runs.curves import text_table
from rlhf_jax.runs.directory import Summary

Figures = dict[str, float]
"""Dotted name -> a number of what a command returned or wrote."""

GOLD = re.compile(r"after\.eval/gold|models\..*\.gold\.mean")
"""Figures that are the gold reward of what a stage made; of several models that it evaluated, the last one's."""

SHOWN = {
    "before.eval/gold": "gold before",
    "after.eval/gold": "gold",
    "after.eval/kl": "KL",
    "after.eval/reward": "reward",
    "accuracy": "accuracy",
    "spearman": "Spearman",
    "eval/accuracy": "accuracy",
    "eval/perplexity": "perplexity",
    "gold.agreement": "agrees with gold",
    "rows": "rows",
}
"""Figure -> what the table calls it."""


def planned(stages: Sequence[Stage], actions: Mapping[str, Action]) -> str:
    """Every stage with its command line, references filled in, and what is done about it."""
    words = {"skip": "finished", "run": "to do", "replace": "to be made anew"}
    lines = []
    for stage in stages:
        after = f"; after {', '.join(stage.inputs)}" if stage.inputs else ""
        lines.append(f"{stage.label} ({words[actions[stage.label]]}{after})\n  rlhf-jax {stage.command}")
        lines += [f"    --{name} {shlex.quote(as_argument(value))}" for name, value in stage.options.items()]
    return "\n".join(lines)


def figures_of(stage: Stage, result: object) -> Figures:
    """The numbers of what a command returned, dotted, and of the summary beside its output if there is one."""
    told = dict(result) if isinstance(result, Mapping) else {}
    if isinstance(result, list):
        told["rows"] = len(result)
    beside = Path(stage.output).with_suffix(".summary.json")
    if beside.is_file():
        told |= read_object(beside, "make the stage anew")
    return {
        name: value for name, value in flat(told) if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def summary_of(stages: Sequence[Stage], actions: Mapping[str, Action], entries: Mapping[str, JsonObject]) -> Summary:
    """{stages, rounds, wall_s}: of every stage label, command, output, wall time and figures; of every round its gold
    reward, which is that of its last stage that has one. A stage that was finished before counts with its time then.
    """
    rows, rounds = [], {}
    for stage in stages:
        entry = entries[stage.label]
        figures = entry["figures"]
        rows.append(
            {
                "stage": stage.label,
                "command": stage.command,
                "output": stage.output,
                "finished_before": actions[stage.label] == "skip",
                "wall_s": entry["wall_s"],
                "figures": figures,
            }
        )
        golds = [value for name, value in figures.items() if GOLD.fullmatch(name)]
        if stage.round and golds:
            rounds[stage.round] = {"round": stage.round, "stage": stage.label, "gold": golds[-1]}
    return {"stages": rows, "rounds": list(rounds.values()), "wall_s": round(sum(row["wall_s"] for row in rows), 2)}


def table(summary: Summary) -> str:
    """A line per stage, and the gold reward of every round."""
    rows: list[list[object]] = []
    for row in summary["stages"]:
        told = {what: row["figures"][name] for name, what in SHOWN.items() if name in row["figures"]}
        models = [re.fullmatch(r"models\.(.*)\.(gold|kl)\.mean", name) for name in row["figures"]]
        told |= {f"{name[2]} of {name[1]}": row["figures"][name[0]] for name in models if name}
        said = ", ".join(f"{what} {value:.4g}" for what, value in told.items())
        rows.append([row["stage"], row["command"], row["wall_s"], said])
    lines = [text_table(["stage", "command", "wall s", "figures"], [*rows, ["total", "", summary["wall_s"], ""]])]
    if summary["rounds"]:
        golds = [f"{one['gold']:.3f}" for one in summary["rounds"]]
        lines.append(f"gold reward by round: {', '.join(golds)}")
    return "\n".join(lines)
