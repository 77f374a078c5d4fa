"""How runs ended, in a sentence and in tables: the outcome, where the time went, settings, a recipe's stages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.config.functions import flat
from rlhf_jax.runs.directory import RECIPE, SUMMARY, object_in
from rlhf_jax.runs.report.reading import RunData, is_number

PART = re.compile("time/(?!elapsed|tokens)(\\w+)_s")
"""What a line of metrics calls the seconds of a part."""

Rows = list[tuple[str, ...]]
"""Cells of a table."""

FIGURES = {
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
"""Figure of a recipe's stage -> what its tables call it."""


def figures_in_words(figures: Mapping[str, float]) -> str:
    """What came of a recipe's stage."""
    told = {what: figures[name] for name, what in FIGURES.items() if name in figures}
    models = [re.fullmatch(r"models\.(.*)\.(gold|kl)\.mean", name) for name in figures]
    told |= {f"{name[2]} of {name[1]}": figures[name[0]] for name in models if name}
    return ", ".join(f"{what} {value:.4g}" for what, value in told.items())


def outcome(run: RunData) -> str:
    """How a run ended, or how it stands, in a sentence."""
    summary = run.summary
    before, after = (part if isinstance(part := summary.get(name), dict) else {} for name in ("before", "after"))
    said = ""
    if is_number(after.get("eval/reward")) and is_number(before.get("eval/reward")):
        said = change("the held-out reward", before["eval/reward"], after["eval/reward"])
        if is_number(error := after.get("eval/reward_se")):
            said += f" (95% of where its mean may lie: +- {1.96 * error:.2g})"
        said += f", at a KL of {nats(after['eval/kl'])} nats" if is_number(after.get("eval/kl")) else ""
        if is_number(after.get("eval/gold")) and is_number(before.get("eval/gold")):
            said += "; " + change("gold", before["eval/gold"], after["eval/gold"])
    elif is_number(summary.get("accuracy")):
        said = f"{summary['accuracy']:.1%} of {summary.get('n', '?')} held-out pairs are ranked as the raters did"
    elif (held_out := run.series("eval/accuracy")) is not None:
        said = f"{held_out.values[-1]:.1%} of the held-out pairs are ranked as the raters did"
    elif (loss := run.series("eval/total", "loss/total")) is not None:
        what = "the held-out loss" if run.series("eval/total") else "the loss"
        ends = loss.values[0], loss.values[-1]
        said = change(what, *ends) if len(loss.values) > 1 else f"{what} is {ends[1]:.3g}"
    elif (reward := run.series("rollout/reward")) is not None:
        said = change("the reward", reward.first, reward.last)
    unit = "iteration" if run.series("rollout/reward") is not None else "step"
    length = f"{run.step} of {run.total} {unit}s"
    if run.status == "finished":
        kept = summary.get("best_step")
        time = f" in {duration(summary['wall_s'])}" if is_number(summary.get("wall_s")) else ""
        best = f"; what is kept is of {unit} {kept}" if kept is not None and kept != run.step else ""
        ended = f"{run.step} {unit}s{time}{best}"
    else:
        ended = f"{run.status} after {length}" + (f" ({run.note})" if run.note else "")
    return f"{run.stage}: {said + '; ' if said else ''}{ended}."


def change(what: str, before: float, after: float) -> str:
    """A number before and after."""
    way = "did not change from" if before == after else "rose from" if after > before else "fell from"
    return f"{what} {way} {before:.3g}" + ("" if before == after else f" to {after:.3g}")


def nats(kl: float) -> str:
    """A KL, without the noise of one that is 0."""
    return f"{round(kl, 4) + 0.0:.3g}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def time_by_part(run: RunData) -> Rows:
    """(part, time, share) as the lines of metrics say, the largest first; then what came after the last of them."""
    parts: dict[str, float] = {}
    for line in run.history:
        for name in line:
            if (found := PART.fullmatch(name)) and is_number(line[name]):
                parts[found[1]] = parts.get(found[1], 0.0) + line[name]
    parts = dict(sorted(parts.items(), key=lambda part: -part[1]))
    if parts and is_number(wall := run.summary.get("wall_s")):
        parts["the end: last evaluation, weights, summary"] = max(wall - sum(parts.values()), 0.0)
    total = sum(parts.values())
    return [(part, duration(seconds), f"{seconds / total:.0%}") for part, seconds in parts.items() if total]


def differences(runs: Sequence[RunData]) -> Rows:
    """(setting, its value in every run) of what differs between runs of one stage.

    Of a group that some do not have, such as `model.arch`, it is said which do.
    """
    flats = [dict(flat(run.config)) for run in runs]
    names = [name for name in dict.fromkeys(n for one in flats for n in one) if name != "run.output_dir"]
    groups = tuple(f"{name}." for name in names if any(other.startswith(f"{name}.") for other in names))
    for one in flats:
        one |= {group[:-1]: "given" for group in groups if any(name.startswith(group) for name in one)}
    names = [name for name in names if not name.startswith(groups)]
    rows = [(name, *(str(one.get(name, "")) for one in flats)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


class Story(NamedTuple):
    """A recipe: (stage, command, status, time, figures) of its stages, and (round, gold) of its rounds."""

    name: str
    stages: Rows
    rounds: Rows


def stories_of(paths: Sequence[str | Path]) -> list[Story]:
    """The recipes among directories."""
    found = []
    for path in {os.path.realpath(path): Path(path) for path in paths}.values():
        entries, summary = (object_in(path / name) or {} for name in (RECIPE, SUMMARY))
        stages: Rows = []
        for label, entry in entries.items():
            if isinstance(entry, dict):
                wall = duration(entry["wall_s"]) if is_number(entry.get("wall_s")) else ""
                figures = entry.get("figures")
                figures = {n: v for n, v in figures.items() if is_number(v)} if isinstance(figures, dict) else {}
                about = (str(label), str(entry.get("command", "")), str(entry.get("status", "")))
                stages.append((*about, wall, figures_in_words(figures)))
        golds = summary.get("rounds")
        rounds = [one for one in golds if isinstance(one, dict)] if isinstance(golds, list) else []
        told: Rows = [(str(one.get("round")), f"{one['gold']:.3g}") for one in rounds if is_number(one.get("gold"))]
        found += [Story(path.absolute().name, stages, told)] if stages else []
    return found
