"""What a recipe has done already: OUTPUT_DIR/recipe.json, and what follows from it. Process 0 only."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, cast

from rlhf_jax.commands.recipe.reading import Stage
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import files
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.json_text import JsonObject
from rlhf_jax.hosts.outputs import summary_beside, there
from rlhf_jax.models.contents import contents, digest_below
from rlhf_jax.runs import directory
from rlhf_jax.runs.heads import begun, glance
from rlhf_jax.runs.twin import Twin, void

ENTRY = {"command", "status", "output", "inputs", "config"}

OF_NO_ACCOUNT = ("overwrite", "progress", "output", "out")
"""Settings, besides those of a run directory, that say nothing about what a stage makes."""

GROWS = ("label",)
"""Commands whose output may grow after their end."""

NEVER_GO_ON = ("convert", "data make", "data prepare")
"""Commands that put files into a directory, and begin anew after a kill."""

Action = Literal["skip", "run", "replace"]


class Record:
    """The directory of a recipe, held by this process.

    recipe.json maps the label of a stage to {command, status, output, inputs, files, config, replaces, found}:
    `inputs` are the stages that it read from (label -> id of what they had made), `files` the contents of what it
    read, `replaces` whether it was to replace what was there, `found` whether that is somebody else's. Once it is
    finished, to {id, wall_s, figures, made} too, the last a digest.
    """

    def __init__(self, root: str):
        """Of the directory `root`; touches nothing."""
        self.root, self.entries = root, cast(JsonObject, {})
        self._place = Path(root)
        self._lock: BinaryIO | None = None
        self._twin: Twin | None = None

    @property
    def path(self) -> Path:
        """recipe.json, or of a recipe in a bucket its copy."""
        return self._place / directory.RECIPE

    def claim(self) -> None:
        """Make the directory and keep other processes out until `close`.

        Raises:
            UserError: it cannot be written to, or another process holds it.
        """
        if in_bucket(self.root):
            self._twin = Twin(self.root)
            self._place = self._twin.place
            return
        files.check_writable(self._place, f"output_dir {self.root}")
        self._place.mkdir(parents=True, exist_ok=True)
        self._lock = directory.claim(self._place)

    def load(self) -> None:
        """Read recipe.json, if there is one.

        Raises:
            UserError: it is broken.
        """
        if self._twin is None and in_bucket(self.root):  # it is looked at alone
            self._place, _ = glance(self.root, [directory.RECIPE])
        cure = "delete it: runs are then taken as they are, and other outputs made anew with --overwrite true"
        self.entries = files.read_object(self.path, cure) if self.path.exists() else {}
        if not all(isinstance(entry, dict) and set(entry) >= ENTRY for entry in self.entries.values()):
            raise UserError(f"{self.path} is broken (an entry is no stage); {cure}")

    def actions(self, stages: Sequence[Stage], *, overwrite: bool) -> dict[str, Action]:
        """What to do about each stage: leave it as it is, start or continue it, or make it anew.

        Raises:
            UserError: the directory is that of something else, or a stage has changed, or what it reads has, since it
                was made, and not `overwrite`.
        """
        other = [name for name in (directory.RECORD, directory.SUMMARY) if (self._place / name).exists()]
        if other and not self.entries and not overwrite:
            raise UserError(
                f"output_dir {self.root} holds something else ({other[0]}); choose another directory or pass "
                "--overwrite true"
            )
        actions: dict[str, Action] = {}
        for stage in stages:
            entry = self.entries.get(stage.label)
            why = self.changed(stage, actions) if entry else ""
            if why and not overwrite:
                raise UserError(
                    f"stage {stage.label}: {stage.output} {why}; pass --overwrite true to make it and what follows "
                    "anew, or choose another output_dir"
                )
            if why:
                actions[stage.label] = "replace"
            elif entry and entry["status"] == "finished" and there(stage.output):
                actions[stage.label] = "skip"
            else:  # a run directory knows itself what of it is this stage's work
                ours = overwrite or (entry and not entry.get("found"))
                replaces = entry and entry.get("replaces") and not begun(stage.output)
                place = there_of(stage)
                whole = place in ("file", "object") or (place and stage.command in NEVER_GO_ON)
                actions[stage.label] = "replace" if ours and (whole or replaces) else "run"
        return actions

    def changed(self, stage: Stage, actions: dict[str, Action]) -> str:
        """How a stage differs from what there is of it, in words; empty if it does not."""
        entry = self.entries[stage.label]
        if entry["command"] != stage.command:
            return f"was made by {entry['command']}, not {stage.command}"
        before, files = entry.get("files", {}), contents(stage.config)
        same = {name for name in files if before.get(name) == files[name]} | set(OF_NO_ACCOUNT)
        differ = {name: pair for name, pair in directory.changes(stage.config, entry).items() if name not in same}
        keeps = getattr(stage.config, "checkpoint", None)
        may_change = keeps is not None and keeps.allow_changes and entry["status"] != "finished"
        if differ and not may_change:
            name, (then, now) = next(iter(differ.items()))
            return f"was made with {name} {then}, not {now}"
        for label in stage.inputs:
            if actions[label] != "skip" or entry["inputs"].get(label) != self.entries[label]["id"]:
                return f"was made of another {label}"
        for name in files:
            if before.get(name, files[name]) != files[name]:
                return f"was made when {name} had other contents"
        made = entry.get("made")
        if made and there(stage.output) and stage.command not in GROWS and made != digest_below(stage.output):
            return "has changed since it was made"
        return ""

    def start(self, stage: Stage, action: Action) -> None:
        """Write that a stage is under way; what it replaces is no longer taken for its work, whatever happens next."""
        if action == "replace" and begun(stage.output):
            void(stage.output)
        inputs = {label: self.entries[label]["id"] for label in stage.inputs}
        before = self.entries.get(stage.label)
        found = bool(there_of(stage)) if before is None else before.get("found", False)
        self.entries[stage.label] = {
            "command": stage.command,
            "status": "started",
            "output": stage.output,
            "inputs": inputs,
            "files": contents(stage.config),
            "config": directory.plain(stage.config),
            "replaces": action == "replace",
            "found": action == "run" and found,
        }
        self._write()

    def finish(self, stage: Stage, wall_s: float, figures: Mapping[str, float]) -> None:
        """Write that it is done, and what came out."""
        self.entries[stage.label] |= {
            "status": "finished",
            "id": secrets.token_hex(8),
            "wall_s": wall_s,
            "figures": figures,
            "made": digest_below(stage.output),
        }
        self._write()

    def _write(self) -> None:
        with files.once_more(str(self.path)):
            files.write_json(self.path, self.entries)
            if self._twin is not None:
                self._twin.push()
                self._twin.check_held()

    def conclude(self, summary: JsonObject) -> None:
        """Write summary.json."""
        with files.once_more(f"{self.root}/{directory.SUMMARY}"):
            files.write_json(self._place / directory.SUMMARY, summary)
        if self._twin is not None:
            self._twin.push(finished=True)

    def close(self) -> None:
        """Let others have the directory."""
        if self._twin is not None:
            self._twin.close(finished=(self._place / directory.SUMMARY).is_file())
        if self._lock is not None:
            self._lock.close()


def there_of(stage: Stage) -> str:
    """What a stage would replace (`outputs.there`): its output, or a summary that an earlier one left."""
    return there(stage.output) or there(summary_beside(stage.output))
