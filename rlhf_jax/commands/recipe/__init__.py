"""`rlhf-jax recipe`: stages chained with their artefacts, any number of rounds.

A recipe is a loop over commands in one process: `reading` makes stages of the file, `record` knows which are done,
and each stage is the command itself. docs/recipes.md has the format.
"""

from __future__ import annotations

import gc
import re
import shlex
import time
from collections.abc import Mapping, Sequence

from rlhf_jax import cli
from rlhf_jax.commands.recipe.reading import Stage, as_argument, read, replaced
from rlhf_jax.commands.recipe.record import Action, Record
from rlhf_jax.config import RecipeArgs, functions
from rlhf_jax.config.settings import Settings
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.hosts import processes
from rlhf_jax.hosts.files import check_hub, read_object
from rlhf_jax.hosts.interrupts import in_force
from rlhf_jax.hosts.json_text import JsonObject
from rlhf_jax.hosts.outputs import summary_beside, there
from rlhf_jax.hosts.processes import say
from rlhf_jax.runs.curves import text_table
from rlhf_jax.runs.directory import SUMMARY, Summary
from rlhf_jax.runs.report.outcome import figures_in_words

IN_ONE_PROCESS = {"rate", "convert", "data prepare", "data aggregate", "data make"}
"""Commands that process 0 runs while the others wait."""

WORDS: dict[Action, str] = {"skip": "finished before", "run": "to do", "replace": "to make anew"}
"""What is done about a stage."""

Figures = dict[str, float]
"""Dotted name -> a number of what a command returned or wrote."""

GOLD = re.compile(r"after\.eval/gold|models\..*\.gold\.mean")
"""Figures that are the gold reward of what a stage made; of several models that it evaluated, the last one's."""


def stages_of(
    config: RecipeArgs, changes: Mapping[str, object] | None = None, recipe: Mapping[str, object] | None = None
) -> tuple[list[Stage], str]:
    """All stages of all rounds and the directory they go to, checked; see `run`."""
    tree: Mapping[str, object]
    if recipe is not None:
        where, tree = "recipe", recipe
    elif config.path:
        where, (_, tree) = config.path, cli.read(config.path, "recipe")
    else:
        raise UserError("no recipe is named; write rlhf-jax recipe FILE.yaml")
    check_hub(config.output_dir, f"output_dir {config.output_dir}")
    stages, root = read(replaced(tree, changes or {}, where), where, config.output_dir)
    if processes.several():
        for one in stages:
            if not cli.COMMANDS[one.command].joint and one.command not in IN_ONE_PROCESS:
                raise UserError(
                    f"stage {one.label}: {one.command} runs in one process only, and this recipe has "
                    "several; run it without the others, then start all of them"
                )
    return stages, root


def run(
    config: RecipeArgs, changes: Mapping[str, object] | None = None, *, recipe: Mapping[str, object] | None = None
) -> Summary:
    """Run the stages that are not finished, in order; prints a table, writes summary.json and returns the summary.

    Args:
        config: the file and where to write.
        changes: dotted name -> value that replaces a variable, a default or an option of a stage in the file, as
            {"stages.sft.optim.learning_rate": 1e-3}.
        recipe: what the file would hold, as nested dicts and lists; config.path is not read then.

    Raises:
        UserError: something does not fit, before anything runs; or what a stage says.
        Stopped: a signal came in a stage, which saved; the same call goes on.
    """
    stages, root = stages_of(config, changes, recipe)
    record = Record(root)
    if config.dry_run:
        record.load()
        say(planned(stages, record.actions(stages, overwrite=config.overwrite)))
        return {}

    def begin() -> dict[str, Action]:
        record.claim()
        record.load()
        return record.actions(stages, overwrite=config.overwrite)

    def conclude() -> Summary:
        summary = summary_of(stages, actions, record.entries)
        record.conclude(summary)
        return summary

    try:
        actions = processes.from_first(begin)
        for number, one in enumerate(stages, 1):
            say(f"\n[{number}/{len(stages)}] {one.label}: {one.command}, {WORDS[actions[one.label]]}")
            if actions[one.label] != "skip":
                perform(one.now(), actions[one.label], record)
            (stop,) = processes.any_of([bool((watch := in_force()) and watch.received)])
            if stop and number < len(stages):
                code = getattr(getattr(one.config, "run", None), "exit_code_when_stopped", 0)
                raise Stopped(f"recipe: stopped after stage {one.label}; the same command goes on there", code)
        summary = processes.from_first(conclude)
    finally:
        record.close()
    say("\n" + table(summary) + f"\n\nrecipe: {root}/{SUMMARY}")
    return summary


def perform(one: Stage, action: Action, record: Record) -> None:
    """Run a stage and record what came of it."""
    settings = one.config
    if action == "replace" and hasattr(settings, "run"):
        settings = functions.replace(settings, run__overwrite=True)
    elif action == "replace" and hasattr(settings, "overwrite"):
        settings = functions.replace(settings, overwrite=True)
    processes.from_first(lambda: record.start(one, action))
    started = time.time()

    def call() -> Figures:
        return figures_of(one, cli.execute(one.command, settings))

    try:
        figures = processes.from_first(call) if one.command in IN_ONE_PROCESS else call()
    except Stopped as stopped:
        raise Stopped(
            f"recipe: stopped in stage {one.label}; the same command goes on there", stopped.code
        ) from stopped
    except UserError as error:
        raise UserError(f"stage {one.label}: {error}") from error
    wall_s = max(round(time.time() - started, 2), figures.get("wall_s", 0.0))  # a run that went on counts it all
    processes.from_first(lambda: record.finish(one, wall_s, figures))
    gc.collect()  # models in reference cycles would stay on the devices while the next stage loads its own


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
    if there(beside := summary_beside(stage.output)) in ("file", "object"):
        told |= read_object(beside, "make the stage anew")
    return {
        name: value
        for name, value in functions.flat(told)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
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
        rows.append([row["stage"], row["command"], row["wall_s"], figures_in_words(row["figures"])])
    lines = [text_table(["stage", "command", "wall s", "figures"], [*rows, ["total", "", summary["wall_s"], ""]])]
    if summary["rounds"]:
        golds = [f"{one['gold']:.3f}" for one in summary["rounds"]]
        lines.append(f"gold reward by round: {', '.join(golds)}")
    return "\n".join(lines)
