"""How long programs took over what the roofline says: a run on devices writes it, and a plan reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rlhf_jax.commands.plan.chips import KINDS, share_of
from rlhf_jax.commands.plan.plan import Row, analyse
from rlhf_jax.config import StageArgs
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.files import read_object

PARTS = {"prefill": "rollout", "decode": "rollout", "step": "update"}
"""A row of the plan -> the part of a run whose time it is, where that has another name."""

CURE = "give the directory of a run with run.calibrate, or its summary.json"


class Calibration(NamedTuple):
    """Measured over planned seconds by part of a run, and the generation of chips on which they were measured."""

    chip: str
    ratios: dict[str, float]


def of_run(config: StageArgs, spent: Mapping[str, float], fill: float, width: int) -> dict[str, Any]:
    """What a run's summary says: of each part the seconds that it took once, those of the roofline, and the ratio.

    `spent` are seconds by part; `fill` is the share of token slots that held tokens, `width` how many responses
    rankings had room for. The programs are compiled once more, for the devices of this process's run.

    Raises:
        UserError: the devices are of no generation whose figures are known.
    """
    devices = jax.devices()
    name = KINDS.get(devices[0].device_kind)
    if name is None:
        raise UserError(
            f"run.calibrate: the figures of a {devices[0].device_kind} are not known, so there is nothing to compare "
            f"with; known are {', '.join(KINDS)}"
        )
    rows, _ = analyse(config, share_of(name, devices), devices, width, fill)
    planned = by_part(rows)
    parts = {
        part: {"measured_s": spent[part], "planned_s": seconds, "ratio": spent[part] / seconds}
        for part, seconds in planned.items()
        if spent.get(part)
    }
    return {"chip": name, "devices": len(devices), "fill": fill, "parts": parts}


def by_part(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds at the roofline of each part of a run."""
    seconds: dict[str, float] = {}
    for row in rows:
        part = PARTS.get(row.name, row.name)
        seconds[part] = seconds.get(part, 0.0) + max(row.seconds.values())
    return seconds


def read(path: str) -> Calibration:
    """What a run wrote, from its directory or from a file.

    Raises:
        UserError: there is none.
    """
    file = Path(path, "summary.json") if Path(path).is_dir() else Path(path)
    found = read_object(file, CURE, ours=False)
    found = found.get("calibration", found)
    try:
        ratios = {str(part): float(figures["ratio"]) for part, figures in found["parts"].items()}
        chip = str(found["chip"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"calibration {file} has no chip and parts with a ratio each; {CURE}") from None
    if not ratios or not all(0 < ratio < math.inf for ratio in ratios.values()):
        raise UserError(f"calibration {file} has no ratios above 0; {CURE}")
    return Calibration(chip, ratios)


def seconds_of(rows: Sequence[Row], chip: str, known: Sequence[Calibration]) -> tuple[float, bool]:
    """Seconds of all programs, times what was measured on such chips (the last of several), and whether any was."""
    ratios = next((one.ratios for one in reversed(known) if one.chip == chip), {})
    planned = by_part(rows)
    return sum(ratios.get(part, 1.0) * seconds for part, seconds in planned.items()), bool({*ratios} & {*planned})
