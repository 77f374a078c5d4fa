"""`plan --chips`: one run on every slice of some generations, ranked by hours, chip-hours or price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from rlhf_jax.commands.plan.calibration import Calibration, seconds_of
from rlhf_jax.commands.plan.chips import CHIPS, SLICES, find_topology
from rlhf_jax.commands.plan.plan import RESERVED, analyse, fits, verdict
from rlhf_jax.config import GroupArgs, PlanArgs, PPOArgs, StageArgs
from rlhf_jax.data.sources import read_rows
from rlhf_jax.errors import UserError, tell
from rlhf_jax.group.train import settings_of
from rlhf_jax.hosts import yamls
from rlhf_jax.hosts.files import read_text
from rlhf_jax.hosts.json_text import to_json
from rlhf_jax.runs.curves import text_table


class Slice(NamedTuple):
    """What a run takes on a slice.

    Attributes:
        topology: generation and shape.
        chips: how many.
        peak_gib: of the program that needs most of a device.
        step_s: seconds of a step or iteration.
        hours: of all steps.
        chip_hours: hours times chips.
        price: chip-hours times what one costs; None where nobody said.
        calibrated: whether seconds are corrected by what a run measured on such chips.
    """

    topology: str
    chips: int
    peak_gib: float
    step_s: float
    hours: float
    chip_hours: float
    price: float | None
    calibrated: bool


def read_prices(path: str) -> dict[str, float]:
    """Price of a chip-hour by generation, of a YAML file such as `v5e: 1.0`; none without a path.

    Raises:
        UserError: the file holds something else.
    """
    if not path:
        return {}
    prices, rule = yamls.read(read_text(path, "prices"), path), "write one line for each generation, such as v5e: 1.0"
    try:
        found = {str(name): float(price) for name, price in prices.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"prices {path} is no table of numbers; {rule}") from None
    bad = [f"{name}: {price:g}" for name, price in found.items() if name not in CHIPS or not 0 < price < math.inf]
    if bad:
        raise UserError(f"prices {path} has {bad[0]}; {rule} (known are {', '.join(CHIPS)})")
    return found


def steps_of(config: StageArgs, rows: int) -> int:
    """Steps or iterations of a run: those of the config, else its epochs over so many rows (0: those of data.path).

    Raises:
        UserError: neither says how many.
    """
    if isinstance(config, PPOArgs):
        return config.ppo.iterations
    if isinstance(config, GroupArgs):
        return settings_of(config)[1].iterations
    settings = next(group for group in vars(config).values() if hasattr(group, "epochs"))
    if settings.steps:
        return int(settings.steps)
    if not (rows or config.data.path):
        raise UserError("rows is 0 and data.path empty: how long the run is depends on them; write --rows N")
    rows = rows or len(read_rows(config.data.path))
    return int(settings.epochs) * max(rows // config.data.batch_size, 1)


def compare(plan: PlanArgs, config: StageArgs, known: Sequence[Calibration]) -> bool:
    """Compile for every slice of the generations, one after another, and print those that fit, best first.

    A slice on which the arguments alone do not fit is told without compiling. Returns whether any fits.

    Raises:
        UserError: prices that are none, or a run of unknown length.
    """
    prices, steps = read_prices(plan.prices), steps_of(config, plan.rows)
    if plan.goal == "price" and (missing := [chip for chip in plan.chips if chip not in prices]):
        raise UserError(f"goal price needs what a chip-hour of {missing[0]} costs; give --prices FILE.yaml with it")
    sizes = {f"{kind}:{shape}": math.prod(map(int, shape.split("x"))) for kind in plan.chips for shape in SLICES[kind]}
    names = [name for name, chips in sizes.items() if chips <= plan.max_chips]
    found: list[Slice] = []
    for number, name in enumerate(names, start=1):
        tell(f"plan: {name}, {number} of {len(names)}", error=True)
        chip, devices = find_topology(name, config.mesh.slices)
        try:
            room = chip.memory - RESERVED
            rows, _ = analyse(config, chip, devices, plan.responses, plan.fill, room)
            why = "" if fits(rows, chip) else verdict(rows, chip)
        except (UserError, jax.errors.JaxRuntimeError) as error:
            why = str(error).splitlines()[0]
        if why:
            tell(f"plan: {name} is out: {why}", error=True)
            continue
        kind, peak = name.partition(":")[0], max(row.peak for row in rows) / 2**30
        seconds, calibrated = seconds_of(rows, kind, known)
        hours, chips = steps * seconds / 3600, sizes[name] * config.mesh.slices
        price = prices[kind] * hours * chips if kind in prices else None
        found.append(Slice(name, chips, peak, seconds, hours, hours * chips, price, calibrated))
    found.sort(key=lambda one: (getattr(one, plan.goal), one.hours))
    if plan.json:
        tell("\n".join(to_json(one._asdict()) for one in found))
    else:
        tell("\n".join(lines_of(found, plan, steps)))
    return bool(found)


def lines_of(found: Sequence[Slice], plan: PlanArgs, steps: int) -> list[str]:
    """A table of the slices, and what its figures are."""
    if not found:
        return ["no slice fits: raise max_chips, give --mesh.data 1 --mesh.fsdp -1, or smaller batches"]
    heads = ["slice", "chips", "peak GiB", "s a step", "hours", "chip-hours", *(["price"] if plan.prices else [])]
    cells = [[*one[:6], *([one.price] if plan.prices else [])] for one in found]
    measured = sorted({one.topology.partition(":")[0] for one in found if one.calibrated})
    by = f"; those of {', '.join(measured)} times what a run measured" if measured else ""
    what = (
        f"{steps} steps by {plan.goal.replace('_', '-')}; seconds at the roofline{by}, evaluations and saving left out"
    )
    return [text_table(heads, cells), "", what]
