"""Files of rows in datasets of the Hugging Face Hub: hf://datasets/owner/name."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.config.settings import HUB_ROWS
from rlhf_jax.data.fields import entry_of
from rlhf_jax.data.rows import EXTENSIONS
from rlhf_jax.errors import UserError, reason
from rlhf_jax.hosts import yamls

CARD = "README.md"
"""Its header may say which files make up a split."""
KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")
"""Endings of files of rows, the one first whose files are taken where a split is there in several."""
SPLITS = re.compile(r"(^|[/._-])(train|valid|validation|dev|test|eval)[/._-]")


@functools.cache
def files_of(path: str) -> list[tuple[str, Path]]:
    """(name for messages, place on this machine) of the files that a path names, in order, after a download.

    hf://datasets/OWNER/NAME[@REVISION]/FILE is one file; hf://datasets/OWNER/NAME[@SPLIT] all files of a split.

    Raises:
        UserError: no such dataset, revision, file or split, or no network.
    """
    owner, name, file = [*path.removeprefix(HUB_ROWS).split("/", 2), "", ""][:3]
    name, at, last = name.partition("@")
    if not path.startswith(HUB_ROWS) or not owner or not name or (at and not last):
        raise UserError(
            f"{path} is no name of rows on the Hub; write {HUB_ROWS}OWNER/NAME/FILE or {HUB_ROWS}OWNER/NAME@SPLIT"
        )
    repository, revision = f"{owner}/{name}", (last or None) if file else None
    if file and not file.endswith(EXTENSIONS):
        raise UserError(f"{path}: unknown extension; known are {', '.join(EXTENSIONS)}")
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = [file]
        if not file:
            revision = HfApi().repo_info(repository, repo_type="dataset").sha  # all files of one commit
            names = HfApi().list_repo_files(repository, repo_type="dataset", revision=revision)
            has_card = CARD in names
            card = hf_hub_download(repository, CARD, repo_type="dataset", revision=revision) if has_card else None
            text = Path(card).read_text("utf-8") if card else ""
            configuration = entry_of(path).get("configuration", "default")
            names = of_split(path, names, text, last or "train", configuration)
        places = [hf_hub_download(repository, each, repo_type="dataset", revision=revision) for each in names]
    except UserError:
        raise
    except Exception as error:  # from httpx, the Hub and the file system
        why = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{path} cannot be downloaded ({why}); check the name and the network") from error
    return [(f"{HUB_ROWS}{repository}/{each}", Path(place)) for each, place in zip(names, places, strict=True)]


def of_split(path: str, names: Sequence[str], card: str, split: str, configuration: str = "default") -> list[str]:
    """The files of a split: those that the card's header lists, else those with the split's name in theirs.

    Where no file has the name of any split, all are train.
    """
    told = _told(path, card, configuration)
    if told:
        if split not in told:
            raise UserError(f"{path}: no such split; there are {', '.join(told)}")
        found = [name for name in sorted(names) if any(fnmatch.fnmatch(name, glob) for glob in told[split])]
        if not found:
            raise UserError(f"{path}: {CARD} names files of this split that are not there; name a file")
        return found
    apart = re.compile(rf"(^|[/._-]){re.escape(split)}[/._-]")  # data/train-00000-of-00002.parquet, my_train.jsonl
    whole = split == "train" and not any(SPLITS.search(name) for name in names if name.endswith(KINDS))
    for ending in KINDS:
        if found := [name for name in sorted(names) if name.endswith(ending) and (whole or apart.search(name))]:
            return found
    there = ", ".join([name for name in names if name.endswith(KINDS)][:8])
    raise UserError(f"{path}: no file has the split {split} in its name; name one of {there or 'none that is read'}")


def _told(path: str, card: str, name: str) -> dict[str, list[str]]:
    """Split -> patterns of its files, of the configuration `name` or the default one in a card's header."""
    header = card.split("---")[1] if card.startswith("---") and card.count("---") > 1 else ""
    try:
        tree: Any = yamls.load(header) or {}
        entries = [entry for entry in tree.get("configs", []) if "data_files" in entry]
        named = [e for e in entries if e.get("config_name") == name]
        chosen = named or [e for e in entries if e.get("default") == "true"] or entries
        parts = chosen[0]["data_files"] if chosen else []
        if isinstance(parts, str) or not isinstance(parts[0], dict):
            parts = [{"split": "train", "path": parts}]
        told = {part["split"]: [part["path"]] if isinstance(part["path"], str) else part["path"] for part in parts}
    except Exception:  # a header of another's making
        return {}
    if len(chosen) > 1:
        known = ", ".join(str(each.get("config_name")) for each in chosen)
        raise UserError(f"{path}: the dataset has several configurations ({known}); name a file of one")
    return told
