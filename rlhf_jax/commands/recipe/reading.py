"""A recipe file to its stages: references filled in, rounds written out, every option checked. Nothing runs here."""

from __future__ import annotations

import copy
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rlhf_jax.cli.commands import COMMANDS, dotted, fields
from rlhf_jax.cli.parsing import misfit, parse
from rlhf_jax.config.guess import nearest
from rlhf_jax.config.settings import Settings
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.yamls import Tree, Value, load
from rlhf_jax.runs.directory import OURS

OUTPUTS = ("run.output_dir", "output", "out", "output_dir")
"""Options that say where a command writes; a stage's is set to a place of its name."""

ENDINGS = {"convert": "", "report": ".html"}
"""How the `output` of a command ends where that is no file of rows."""

MOST_ROUNDS = 10_000
"""All stages of all rounds are made before the first runs."""

NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
PART = re.compile(r"(?<!\$)(?:\$\$)*\$(?:(\w+)|\{(\w+)\})/([\w.]+)", re.ASCII)


@dataclass(frozen=True)
class Stage:
    """A command with all that it is told.

    Attributes:
        label: the name that no other stage has, such as round2/ppo.
        round: from 1; 0 outside of rounds.
        command: such as "data aggregate".
        options: what the file says, references filled in.
        config: of the command.
        output: the file or directory that `$name` stands for.
        inputs: labels of the stages whose artefacts it reads.
    """

    label: str
    round: int
    command: str
    options: Tree
    config: Settings
    output: str
    inputs: tuple[str, ...]

    def now(self) -> Stage:
        """The stage as it is told once those before it have run: lengths that are left open follow their models."""
        return replace(self, config=config_of(self.command, self.options))


def config_of(command: str, options: Tree) -> Settings:
    """The command's settings of a stage's options."""
    return parse(command, [f"--{key}={as_argument(value)}" for key, value in options.items()])


@dataclass(frozen=True)
class Known:
    """What `$name` stands for, the labels of the stages it comes from, and whether it is the run directory of one."""

    value: Value
    stages: frozenset[str] = frozenset()
    run: bool = False


Scope = dict[str, Known]


def read(tree: Tree, where: str, output_dir: str) -> tuple[list[Stage], str]:
    """All stages of all rounds of a recipe, as `replaced` returns it, in order, and its directory.

    `where` is the file's name, for messages; `output_dir` replaces the file's unless empty.

    Raises:
        UserError: the first thing that does not fit, with the file and the stage.
    """
    group_of(tree, f"{where}: a recipe", ("output_dir", "variables", "defaults", "stages"))
    root = output_dir or tree.get("output_dir", "")
    if not isinstance(root, str) or not root:
        raise UserError(f"{where}: there is no output_dir; say where to write, as --output_dir runs/first")
    root = root.rstrip("/") if in_bucket(root) else str(Path(root))
    recipe = Recipe(where, root, group_of(tree.get("defaults", {}), f"{where}: defaults"))
    names: Scope = {}
    for name, value in group_of(tree.get("variables", {}), f"{where}: variables").items():
        if value == "null":
            raise UserError(f"{where}: variable {name} has no value; give --variables.{name} VALUE")
        recipe.add(names, name, recipe.known(value, names, f"variables.{name}"))
    stages = list(recipe.stages(tree.get("stages"), names))
    recipe.check_defaults(stages)
    recipe.check_outputs(stages)
    return stages, root


@dataclass
class Recipe:
    """What all stages share: the file's name, the directory, and options for every stage that has them."""

    where: str
    root: str
    defaults: Tree

    def error(self, place: str, line: str) -> UserError:
        """A UserError with the file's name and a place in it."""
        return UserError(f"{self.where}: {place}: {line}")

    def stages(self, entries: object, names: Scope) -> Iterator[Stage]:
        """The stages of a recipe; `names` gains what they make."""
        for entry in self.entries(entries, "stages"):
            if "rounds" in entry:
                yield from self.rounds(entry, names)
            else:
                yield self.stage(entry, names, 0)

    def entries(self, value: object, place: str) -> list[Tree]:
        """A list of stages or rounds."""
        if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
            raise self.error(place, f"{value!r} is no list of stages; write [{{name: sft, command: sft, ...}}, ...]")
        return value

    def rounds(self, entry: Tree, names: Scope) -> Iterator[Stage]:
        """The stages of every round. A carried name is `first` in round 1, and what `then` was in the round before."""
        group_of(entry, f"{self.where}: rounds", ("rounds", "carry", "stages"))
        count = filled(entry["rounds"], names, f"{self.where}: rounds", set())
        if not isinstance(count, str) or not count.isdecimal() or not 1 <= int(count) <= MOST_ROUNDS:
            raise self.error("rounds", f"{count!r} is no number of rounds; give one between 1 and {MOST_ROUNDS}")
        carry = {
            name: group_of(both, f"{self.where}: carry.{name}", ("first", "then"), all_of_them=True)
            for name, both in group_of(entry.get("carry", {}), f"{self.where}: carry").items()
        }
        carried = {name: self.known(both["first"], names, f"carry.{name}.first") for name, both in carry.items()}
        for round_ in range(1, int(count) + 1):
            scope = {**names, "round": Known(str(round_))}
            for name, value in carried.items():
                self.add(scope, name, value)
            for one in self.entries(entry.get("stages"), "stages of rounds"):
                yield self.stage(one, scope, round_)
            carried = {name: self.known(both["then"], scope, f"carry.{name}.then") for name, both in carry.items()}
        del scope["round"]
        names |= scope | carried

    def known(self, value: Value, names: Scope, place: str) -> Known:
        """What a value with references stands for."""
        stages: set[str] = set()
        return Known(filled(value, names, f"{self.where}: {place}", stages), frozenset(stages))

    def add(self, names: Scope, name: str, value: Known) -> None:
        """Give a name a meaning."""
        if not NAME.fullmatch(name) or name == "round":
            raise self.error(f"name {name!r}", "give one of letters, digits and _ that is not round")
        if name in names:
            raise self.error(f"name {name}", "it comes twice; names of stages, variables and carry must differ")
        names[name] = value

    def stage(self, entry: Tree, names: Scope, round_: int) -> Stage:
        """One stage; `names` gains what it makes."""
        if "rounds" in entry:
            raise self.error("rounds", "they stand in rounds; write them one after another")
        command = entry.get("command")
        name = entry.get("name", command)
        if not isinstance(command, str) or not isinstance(name, str):
            raise self.error(f"stage {name}", f"command is {command!r}; name one, as command: sft")
        place, label = f"stage {name}", f"round{round_}/{name}" if round_ else name
        if command not in COMMANDS:
            raise self.error(place, f"unknown command {command!r}{nearest(command, list(COMMANDS), '')}")
        hints = COMMANDS[command].options
        target = next((option for option in OUTPUTS if option in hints), "")
        if not target or command == "recipe":
            raise self.error(place, f"{command} leaves nothing that another stage could read; leave it out")
        used: set[str] = set()

        def meant(tree: Tree) -> Tree:
            return {key: filled(value, names, f"{self.where}: {place}: {key}", used) for key, value in tree.items()}

        own = meant({key: value for key, value in entry.items() if key not in ("name", "command")})
        given, below = dict(dotted(own)), Tree()
        for option, value in dotted(self.defaults):
            if option in hints and option not in given and not isinstance(value, dict):
                put(below, option, value)
        options = merged(meant(below), own)
        ending = ENDINGS.get(command, ".jsonl") if target == "output" else ""
        output = dict(dotted(options)).get(target) or f"{self.root}/{label}{ending}"
        put(options, target, output)
        self.add(names, name, Known(output, frozenset([label]), target == "run.output_dir"))
        try:
            config = config_of(command, options)
        except UserError as error:
            raise self.error(place, str(error)) from error
        return Stage(label, round_, command, options, config, output, tuple(sorted(used)))

    def check_outputs(self, stages: Sequence[Stage]) -> None:
        """Raise a UserError if two stages write to one place, or one below that of another."""
        places: dict[Path, Stage] = {}
        for one in stages:
            place = Path(one.output if in_bucket(one.output) else os.path.realpath(one.output))
            if (other := places.setdefault(place, one)) is not one:
                line = f"{other.label} writes to {one.output}, too; give each its own"
                raise self.error(f"stage {one.label}", line)
        for place, one in places.items():
            if above := next((places[up] for up in place.parents if up in places), None):
                line = f"{one.output} is within what {above.label} makes; give another place"
                raise self.error(f"stage {one.label}", line)

    def check_defaults(self, stages: Sequence[Stage]) -> None:
        """Raise a UserError if a default is an option of no stage."""
        hints = {name: hint for stage in stages for name, hint in COMMANDS[stage.command].options.items()}
        for option, value in dotted(self.defaults):
            if option not in hints:
                raise self.error("defaults", f"no stage has an option {option!r}{nearest(option, list(hints), '')}")
            if isinstance(value, dict) != bool(fields(hints[option])) and value != "null":
                raise self.error("defaults", misfit(option, value, hints[option]))


def filled(value: Value, names: Scope, where: str, used: set[str]) -> Value:
    """A value with its references filled in; `used` gains the stages that they come from.

    Of a list, an item that is a reference to a list becomes the items of that one.
    """
    if isinstance(value, dict):
        return {name: filled(inner, names, f"{where}: {name}", used) for name, inner in value.items()}
    if isinstance(value, list):
        items: list[Value] = []
        for item in value:
            new = filled(item, names, where, used)
            items += new if isinstance(item, str) and isinstance(new, list) else [new]
        return items
    template = string.Template(value)
    if not template.is_valid():
        raise UserError(f"{where}: {value!r} has a $ that starts no name; write $$ for the sign itself")
    wanted = template.get_identifiers()
    for name in wanted:
        if name not in names:
            near = nearest(name, list(names), "").replace("mean ", "mean $")
            if not near.startswith("; did you mean "):
                near = f"; there are {', '.join('$' + one for one in names)}" if names else "; nothing comes before it"
            raise UserError(f"{where}: {value!r}: there is no ${name} at this point{near}")
        used |= names[name].stages
    for plain, braced, part in PART.findall(value):
        name = plain or braced
        if names[name].run and part not in OURS:
            near = nearest(part, list(OURS), "").partition("; `")[0]
            raise UserError(f"{where}: {value!r}: the run directory of {name} has no {part}{near}")
    if wanted and value in (f"${wanted[0]}", f"${{{wanted[0]}}}"):
        return copy.deepcopy(names[wanted[0]].value)  # a stage adds to its own
    if whole := next((name for name in wanted if not isinstance(names[name].value, str)), ""):
        raise UserError(f"{where}: {value!r}: ${whole} is no text and cannot be part of one; let it stand alone")
    return template.substitute({name: names[name].value for name in wanted})


def group_of(value: object, where: str, known: Sequence[str] = (), *, all_of_them: bool = False) -> Tree:
    """A group as it is; UserError if it is none, or has other names than the known ones, or not all of them."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; write names and values")
    if odd := [name for name in value if known and name not in known]:
        raise UserError(f"{where} has no {odd[0]!r}; it has {', '.join(known)}")
    if all_of_them and (missing := [name for name in known if name not in value]):
        raise UserError(f"{where} has no {missing[0]}; give {', '.join(known)}")
    return value


def put(tree: Tree, dotted: str, value: Value) -> None:
    """Set what stands at a dotted name, making the groups on the way; what was there goes, however it is written."""
    *groups, last = dotted.split(".")
    for i, group in enumerate(groups):
        tree.pop(".".join([*groups[i:], last]), None)
        inner = tree.get(group)
        if isinstance(inner, str) and "$" in inner:
            raise UserError(f"{dotted}: the file has {inner!r} for {group}, of which no part changes; give the whole")
        if not isinstance(inner, dict):
            inner = tree[group] = {}
        tree = inner
    tree[last] = value


def merged(below: Tree, above: Tree) -> Tree:
    """Two trees as one; where both have a value, that of `above`."""
    both = {
        name: merged(under, over) if isinstance(under := below.get(name), dict) and isinstance(over, dict) else over
        for name, over in above.items()
    }
    return {**below, **both}


def as_texts(value: object) -> Value:
    """A tree of Python's values as one of texts."""
    if isinstance(value, Mapping):
        return {str(name): as_texts(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_texts(inner) for inner in value]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Plain(yaml.SafeDumper):
    """YAML that does not quote texts because they look like numbers: `yamls.Texts` reads them back as they are."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        """The tag of a text is that of texts, whatever it looks like."""
        return super().resolve(kind, value, implicit) if kind is not yaml.ScalarNode else self.DEFAULT_SCALAR_TAG


def as_argument(value: Value) -> str:
    """A tree as the text that the command line takes for it."""
    if isinstance(value, str):
        return value
    return yaml.dump(value, Dumper=Plain, default_flow_style=True, width=10**9, sort_keys=False).strip()


def replaced(tree: Mapping[str, object], changes: Mapping[str, object], where: str) -> Tree:
    """A recipe with other values at variables.NAME, defaults.OPTION and stages.STAGE.OPTION.

    Raises:
        UserError: there is no such variable or stage.
    """
    recipe = {str(name): as_texts(value) for name, value in tree.items()}
    for option, value in changes.items():
        group, _, rest = option.partition(".")
        new = as_texts(value)
        if isinstance(new, str) and new[:1] in ("[", "{"):
            try:
                new = load(new)
            except yaml.YAMLError as error:
                raise UserError(f"--{option} {new!r} is no list or group; close its brackets") from error
        if group == "stages":
            name, _, rest = rest.partition(".")
            stages = {str(one.get("name", one.get("command"))): one for one in entries_of(recipe.get("stages"))}
            if name not in stages or not rest:
                raise UserError(f"--{option}: {where} has no stage {name!r}{nearest(name, list(stages), '')}")
            put(stages[name], rest, new)
        elif group == "variables" and rest not in (variables := recipe.get("variables", {})):
            raise UserError(f"--{option}: {where} has no variable {rest!r}{nearest(rest, [*map(str, variables)], '')}")
        else:
            put(recipe, option, new)
    return recipe


def entries_of(stages: object) -> Iterator[Tree]:
    """Every stage that stands in a list, in rounds too."""
    for entry in stages if isinstance(stages, list) else []:
        if isinstance(entry, dict):
            yield from entries_of(entry.get("stages")) if "rounds" in entry else [entry]
