"""`plan`."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.checks import check
from rlhf_jax.config.settings import PathText, settings
from rlhf_jax.errors import UserError, shown

CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
"""The generations of TPU that a plan knows."""


@settings
class PlanArgs:
    """What `rlhf-jax plan` adds to the options of the stage that it plans.

    Args:
        topology: TPU generation and shape of the slice, such as v5e:4x4 or v5p:4x4x4.
        stage: auto tells it by the groups of options given; pretrain must be said.
        responses: to each prompt, where rankings are trained on (rrhf; reward with reward.comparisons rankings).
        fill: share of the token slots of prompts and responses that hold tokens. What is packed or refilled costs less
            by as much; what cannot be, and what is refilled or packed imperfectly, does not.
        chips: generations such as [v5e, v6e] whose slices are tried instead of one topology, each of which is compiled
            for; those that fit are ranked by `goal`. The mesh is that of the stage, with an axis of -1 for the rest.
        goal: what is to be least: hours, chip_hours, or price.
        prices: YAML file with the price of a chip-hour by generation, such as `v5e: 1.0`. None come with the package:
            they differ by region, by contract and by year.
        rows: of data (of packed text: sequences), where a run's length follows from them; 0 counts those of data.path.
        max_chips: of the largest slice that is tried.
        calibration: runs (or their summary.json) with run.calibrate: seconds are multiplied by what these measured
            over what was planned, on chips of the same generation.
        suggest: try other meshes, rules, batch sizes and fewer minibatches. A sum by hand says which are worth
            compiling, minutes each; these are ranked, and the fastest is tried with fewer microbatches or with matrix
            products kept, whichever it waits for.
        json: print one JSON object per line instead of tables.
    """

    topology: str = ""
    stage: Literal[
        "auto",
        "pretrain",
        "sft",
        "reward",
        "dpo",
        "kto",
        "rrhf",
        "ppo",
        "grpo",
        "rloo",
        "reinforce_pp",
        "distill",
    ] = "auto"
    responses: int = 4
    fill: float = 1.0
    chips: list[str] = field(default_factory=list)
    goal: Literal["hours", "chip_hours", "price"] = "chip_hours"
    prices: PathText = ""
    rows: int = 0
    max_chips: int = 64
    calibration: list[PathText] = field(default_factory=list)
    suggest: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        rules = {"at least 1": "responses max_chips", "above 0 and at most 1": "fill", "at least 0": "rows"}
        check(self, "", rules)
        object.__setattr__(self, "chips", [chip.strip() for some in self.chips for chip in some.split(",")])
        if unknown := [chip for chip in self.chips if chip not in CHIPS]:
            raise UserError(f"chips has {shown(unknown[0])}; give some of {', '.join(CHIPS)}")
        if bool(self.chips) == bool(self.topology) or (self.chips and self.suggest):
            raise UserError(
                "topology is empty; write --topology v5e:4x4, or another slice, or --chips [v5e, v6e] to compare"
                if not self.chips
                else "chips compares slices as they are; leave out topology and suggest"
            )
