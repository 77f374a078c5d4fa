"""The configs and recipes that come with the package, by a bare name such as instructgpt or stories_ppo."""

from __future__ import annotations

from pathlib import Path

from rlhf_jax.config.guess import nearest
from rlhf_jax.errors import UserError

PRESETS = Path(__file__).parents[1] / "presets"
"""In a checkout a link to configs/; a wheel has the files."""


def preset(path: str, option: str) -> str:
    """The file that a bare name stands for; any other path, and one that is there, as it is.

    Raises:
        UserError: there is neither a file nor a preset of that name.
    """
    if Path(path).name != path or Path(path).exists():
        return path
    known = {file.stem: str(file) for folder in ("recipes", ".") for file in sorted((PRESETS / folder).glob("*.yaml"))}
    if path in known or path.endswith((".yaml", ".yml")):
        return known.get(path, path)
    cure = nearest(path, list(known), "").partition("; `")[0] or f"; presets are {', '.join(known)}"
    raise UserError(f"{option} {path}: no such file, nor a preset{cure}")
