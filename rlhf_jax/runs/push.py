"""A model to the Hugging Face Hub, with a card that says what it is, what it was made of and with which figures.

The token is the one that huggingface_hub finds (HF_TOKEN, `hf auth login`); it is never read here and never written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from rlhf_jax.config.functions import flat
from rlhf_jax.config.settings import HUB, HUB_ROWS
from rlhf_jax.errors import UserError, reason, tell
from rlhf_jax.hosts.copies import of_a_model
from rlhf_jax.hosts.json_text import JsonObject

LOGIN = "run `hf auth login` or set HF_TOKEN to a token that may write"
CARD = "README.md"
TASKS = {"reward": "text-classification"}
"""Stage -> what the Hub calls what its model does, where that is not text-generation."""


@functools.cache
def check_repository(repository: str, what: str) -> None:
    """Make a repository of the Hub, private, unless it is there; a UserError about `what` if that is refused."""
    if repository.count("/") != 1 or not all(repository.split("/")) or repository.startswith(HUB):
        raise UserError(f"{what} {repository} is no name of the Hub; write OWNER/NAME")
    from huggingface_hub import HfApi, repo_exists

    try:
        if not repo_exists(repository):
            HfApi().create_repo(repository, private=True, exist_ok=True)
        else:
            HfApi().whoami()
    except Exception as error:  # from httpx and the Hub
        raise UserError(
            f"{what} {repository} cannot be written to ({type(error).__name__}: {reason(error)}); check the network, "
            f"or {LOGIN}"
        ) from error


def push(folder: Path, repository: str, card: str, again: str) -> str:
    """Upload a model directory and its card as one commit; returns where they are. `again` says what to do if not.

    Of the directory that is what is of the model, and of the repository what is left of an older one goes by the same
    commit, or readers would take its weights for these.

    Raises:
        UserError: it was refused; the directory is as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = {str(path.relative_to(folder)): str(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    added: dict[str, str | bytes] = {name: path for name, path in files.items() if of_a_model(name)}
    added[CARD] = card.encode()
    try:
        gone = [name for name in HfApi().list_repo_files(repository) if of_a_model(name) and name not in added]
        changes = list[CommitOperationAdd | CommitOperationDelete]()
        changes += [CommitOperationAdd(name, data) for name, data in added.items()]
        changes += [CommitOperationDelete(name) for name in gone]
        made = HfApi().create_commit(repository, changes, commit_message="Model of rlhf-jax")
    except Exception as error:  # from httpx and the Hub
        raise UserError(f"{repository} of the Hub: {type(error).__name__}: {reason(error)}; {again}") from error
    where = str(made.commit_url).partition("/commit/")[0]
    tell(f"pushed {folder} to {where}")
    return where


def model_card(repository: str, stage: str, config: Mapping[str, object], summary: Mapping[str, object]) -> str:
    """The README.md of a run's model: a header that the Hub reads, what was done, figures, and the settings.

    Of paths of this machine the last part stands for the whole.
    """
    settings = dict(flat(dict(config)))
    paths = [str(value) for value in settings.values() if isinstance(value, str)]
    base = str(settings.get("model.path") or "")
    header: JsonObject = {"library_name": "transformers", "pipeline_tag": TASKS.get(stage, "text-generation")}
    header["tags"] = ["rlhf-jax", stage]
    if base.startswith(HUB):
        header["base_model"] = base.removeprefix(HUB).partition("@")[0]
    named = ("/".join(path.removeprefix(HUB_ROWS).split("/")[:2]) for path in paths if path.startswith(HUB_ROWS))
    if rows := sorted({name.partition("@")[0] for name in named}):
        header["datasets"] = rows
    lines = [f"# {repository}", "", f"Made by `rlhf-jax {stage}`" + (f" from {_named(base)}." if base else ".")]
    lines += ["", "| figure | value |", "|---|---|", *_figures(summary)]
    plainly = yaml.safe_dump(_without_places(config), sort_keys=False, allow_unicode=True)
    lines += ["", "## Settings", "", "```yaml", plainly.rstrip(), "```", ""]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n".join(lines)


def _figures(summary: Mapping[str, object]) -> Iterator[str]:
    for name, value in flat(dict(summary)):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"| {name} | {value:.6g} |"


def _named(text: str) -> str:
    """A text; of a whole path of this machine the last part."""
    return Path(text).name if Path(text).is_absolute() else text


def _without_places(value: object) -> object:
    """Settings in which a path of this machine is its last part, and what says where to write is left out."""
    if isinstance(value, Mapping):
        return {
            key: _without_places(inner) for key, inner in value.items() if key not in ("output_dir", "push_to_hub")
        }
    if isinstance(value, list | tuple):
        return [_without_places(inner) for inner in value]
    return _named(value) if isinstance(value, str) else value
