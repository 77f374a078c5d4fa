"""Settings of `rlhf-jax recipe`; the stages and their options stand in its file."""

from __future__ import annotations

from rlhf_jax.config.settings import PathText, settings


@settings
class RecipeArgs:
    """What `rlhf-jax recipe FILE.yaml` takes beside the file; docs/recipes.md has its format.

    `--variables.NAME`, `--defaults.OPTION` and `--stages.STAGE.OPTION` replace what the file says there.

    Args:
        path: the recipe.
        output_dir: where the stages go, each in a directory or file of its name; empty takes the file's.
        dry_run: check all stages, print what each would be told, and end.
        overwrite: make stages anew whose settings have changed since, and those that read what they made.
    """

    path: PathText = ""
    output_dir: PathText = ""
    dry_run: bool = False
    overwrite: bool = False
