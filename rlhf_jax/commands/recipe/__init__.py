"""`rlhf-jax recipe`: stages chained with their artefacts, any number of rounds.

A recipe is a loop over commands in one process: `reading` makes stages of the file, `record` knows which are done,
and each stage is the command itself. docs/recipes.md has the format.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_jax import cli
from rlhf_jax.commands.recipe.reading import Stage, read, replaced
from rlhf_jax.commands.recipe.record import Action, Record
from rlhf_jax.commands.recipe.report import Figures, figures_of, planned, summary_of, table
from rlhf_jax.config import RecipeArgs, functions
from rlhf_jax.config.settings import Settings
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.hosts import processes
from rlhf_jax.hosts.files import write_json
from rlhf_jax.hosts.processes import say
from rlhf_jax.runs.directory import SUMMARY, Summary

IN_ONE_PROCESS = {"rate", "convert", "data prepare", "data aggregate", "data make"}
"""Commands that process 0 runs while the others wait."""

WORDS: dict[Action, str] = {"skip": "finished before", "run": "to do", "replace": "to make anew"}
"""What is done about a stage."""


def stages_of(
    config: RecipeArgs, changes: Mapping[str, object] | None = None, recipe: Mapping[str, object] | None = None
) -> tuple[list[Stage], Path]:
    """All stages of all rounds and the directory they go to, checked; see `run`."""
    tree: Mapping[str, object]
    if recipe is not None:
        where, tree = "recipe", recipe
    elif config.path:
        where, (_, tree) = config.path, cli.read(config.path, "recipe")
    else:
        raise UserError("no recipe is named; write rlhf-jax recipe FILE.yaml")
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

    try:
        actions = processes.from_first(begin)
        for number, one in enumerate(stages, 1):
            say(f"\n[{number}/{len(stages)}] {one.label}: {one.command}, {WORDS[actions[one.label]]}")
            if actions[one.label] != "skip":
                perform(one, actions[one.label], record)
        summary = processes.from_first(lambda: conclude(stages, actions, record))
    finally:
        record.close()
    say("\n" + table(summary) + f"\n\nrecipe: {root / SUMMARY}")
    return summary


def perform(one: Stage, action: Action, record: Record) -> None:
    """Run a stage and record what came of it."""
    settings = with_overwrite(one.config) if action == "replace" else one.config
    processes.from_first(lambda: record.start(one, action))
    started = time.time()

    def call() -> Figures:
        return figures_of(one, cli.execute(one.command, settings))

    try:
        figures = processes.from_first(call) if one.command in IN_ONE_PROCESS else call()
    except Stopped as stopped:
        raise Stopped(f"recipe: stopped in stage {one.label}; the same command goes on there") from stopped
    except UserError as error:
        raise UserError(f"stage {one.label}: {error}") from error
    wall_s = round(time.time() - started, 2)
    processes.from_first(lambda: record.finish(one, wall_s, figures))
    gc.collect()  # models in reference cycles would stay on the devices while the next stage loads its own


def conclude(stages: Sequence[Stage], actions: Mapping[str, Action], record: Record) -> Summary:
    """Write summary.json; returns what it holds."""
    summary = summary_of(stages, actions, record.entries)
    write_json(record.root / SUMMARY, summary)
    return summary


def with_overwrite(config: Settings) -> Settings:
    """The config of a command that may replace what it made before."""
    if hasattr(config, "run"):
        return functions.replace(config, run__overwrite=True)
    return functions.replace(config, overwrite=True) if hasattr(config, "overwrite") else config
