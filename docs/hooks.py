"""What mkdocs builds besides the pages in docs/: options of every command, the API, notebooks, the changelog."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

from rlhf_jax.cli.commands import COMMANDS, OF_A_RUN, OF_COMMANDS
from rlhf_jax.cli.schema import schema_of

API = {
    "Stages": ["sft.run", "reward.run", "preference.run", "ppo.run", "group.run", "commands.recipe.run"],
    "Losses": ["losses.policy", "losses.group", "losses.preference", "losses.reward"],
    "Formulas": ["advantages", "tokens"],
    "PPO and groups as pure functions": ["ppo.core", "group.core"],
    "Training": ["training.step", "training.state", "sharding"],
    "Models": ["models.model.Model", "models.loading"],
    "Data": ["data.sources.rows_from", "data.batches.Batches", "data.examples", "data.comparisons"],
    "Rewards": ["tasks.verifiers.texts", "tasks.gsm8k"],
    "Reports": ["runs.report.html_of", "runs.report.diagnoses.diagnose"],
}
"""Heading of the API page -> names below rlhf_jax; of a module all that is public."""


def on_config(config: Any) -> Any:
    """The navigation with a page for every command and every notebook."""
    reference = next(part["Reference"] for part in config.nav if "Reference" in part)
    reference.insert(1, {"Options": [f"reference/commands/{slug(name)}.md" for name in COMMANDS]})
    tutorials = next(i for i, part in enumerate(config.nav) if "Tutorials" in part)
    config.nav.insert(tutorials + 1, {"Notebooks": [f"notebooks/{path.stem}.md" for path in notebooks(config)]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages that are made of the code."""
    pages = {"reference/index.md": commands_page(), "reference/api.md": api_page()}
    pages["reference/changelog.md"] = Path(config.config_file_path).with_name("CHANGELOG.md").read_text("utf-8")
    pages |= {f"reference/commands/{slug(name)}.md": options_page(name) for name in COMMANDS}
    for path in notebooks(config):
        named = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
        pages[f"notebooks/{path.stem}.md"], made = MarkdownExporter().from_filename(str(path), resources=named)
        pages |= {f"notebooks/{name}": content for name, content in made["outputs"].items()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files outside of docs/, which the site does not have, as their names."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]+)\]\({re.escape(up)}([^)]+)\)", r"\1 (`\2`)", markdown)


def notebooks(config: Any) -> list[Path]:
    """The notebooks with their stored outputs, the first one first."""
    found = Path(config.config_file_path).parent.glob("notebooks/*.ipynb")
    return sorted(found, key=lambda path: (path.stem != "quickstart", path.stem))


def slug(command: str) -> str:
    return command.replace(" ", "_")


def commands_page() -> str:
    """The list of commands."""
    lines = [f"| [`{name}`](commands/{slug(name)}.md) | {one.about} |" for name, one in COMMANDS.items()]
    lines += [f"| `{name}` | {about} |" for name, about in (OF_A_RUN | OF_COMMANDS).items()]
    about = "Every option of a command, as its config classes have it; `rlhf-jax COMMAND --help` prints the same."
    return "\n".join(["# Commands", "", about, "", "| command | what |", "|---|---|", *lines, ""])


def options_page(command: str) -> str:
    """Every option of a command: its type, default and meaning."""
    schema = schema_of(command)
    first = COMMANDS[command].first
    usage = (
        f"rlhf-jax {command} {first.upper() + ' ' if first else ''}[--config FILE.yaml] [--dotted.option VALUE ...]"
    )
    lines = [f"# {command}", "", COMMANDS[command].about + ".", "", f"`{usage}`", ""]
    for name, group in groups_of(schema):
        plain = {key: one for key, one in group["properties"].items() if not group_in(one)}
        if not plain:
            continue
        lines += [f"## {name}", "", cell(group["description"]), ""] if name else []
        lines += ["| option | type | default | what |", "|---|---|---|---|"]
        for key, one in plain.items():
            option = f"{name}.{key}" if name else key
            default = f"`{json.dumps(one['default'])}`".replace("|", "\\|") if "default" in one else ""
            lines.append(f"| `{option}` | {cell(type_of(one))} | {default} | {cell(one.get('description', ''))} |")
        lines.append("")
    return "\n".join(lines)


def groups_of(schema: dict[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted name, schema) of a group and of those within it."""
    yield name, schema
    for key, one in schema["properties"].items():
        if group := group_in(one):
            yield from groups_of(group, f"{name}.{key}" if name else key)


def group_in(one: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of the group that an option is, or may be."""
    return next((part for part in (one, *one.get("anyOf", [])) if "properties" in part), None)


def type_of(one: dict[str, Any]) -> str:
    """A type in words."""
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    if "anyOf" in one:
        return " or ".join(type_of(part) for part in one["anyOf"])
    inner = one.get("items")
    return f"list of {'groups' if inner and group_in(inner) else type_of(inner)}" if inner else one.get("type", "any")


def cell(text: str) -> str:
    """A text within a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")


def api_page() -> str:
    """The directives of mkdocstrings for what is public."""
    lines = ["# API", "", 'What a fork calls. Shapes stand in the types: `Float[Array, "B T"]` is float[B, T].', ""]
    for heading, names in API.items():
        lines += [f"## {heading}", ""]
        for name in names:
            lines += [f"::: rlhf_jax.{name}", "    options:", f"      toc_label: {name}", ""]
    return "\n".join(lines)
