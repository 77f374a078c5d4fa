"""The command: one topology in tables, other meshes of it (`suggest`), or slices of several generations (`chips`)."""

from __future__ import annotations

import dataclasses

import jax

from rlhf_jax.commands.plan import calibration, slices
from rlhf_jax.commands.plan.chips import find_topology, per_chip
from rlhf_jax.commands.plan.plan import analyse, cost_line, decode_lines, exchange_lines, fits, gib, shown
from rlhf_jax.commands.plan.suggest import suggest
from rlhf_jax.config import PlanArgs, StageArgs
from rlhf_jax.config.functions import replace
from rlhf_jax.data.loading import batch_of
from rlhf_jax.errors import tell
from rlhf_jax.hosts.json_text import to_json
from rlhf_jax.sharding import make_mesh


def run_alone(plan: PlanArgs, config: StageArgs) -> bool:
    """`run` for a process that does nothing else: it computes on the CPU and leaves the chips of a TPU VM alone."""
    jax.config.update("jax_platforms", "cpu")
    return run(plan, config)


def run(plan: PlanArgs, config: StageArgs) -> bool:
    """Print the plan of a stage's config; returns whether it fits. A notebook on a TPU goes on as before.

    Raises:
        UserError: an unknown topology, or what the stage would refuse.
    """
    known = [calibration.read(path) for path in plan.calibration]
    if plan.chips:
        return slices.compare(plan, replace(config, data__batch_size=batch_of(config.data, 1)), known)
    chip, devices = find_topology(plan.topology, config.mesh.slices)
    config = replace(config, data__batch_size=batch_of(config.data, make_mesh(config.mesh, devices).row_ways))
    if plan.suggest:
        suggest(config, chip, devices, plan)
        return True
    rows, costs = analyse(config, chip, devices, plan.responses, plan.fill)
    seconds, calibrated = calibration.seconds_of(rows, plan.topology.partition(":")[0], known)
    if plan.json:
        facts = {"topology": plan.topology, "devices": len(devices), "chips": len(devices) // per_chip(devices)}
        facts |= {"fill": plan.fill, "fits": fits(rows, chip)} | ({"calibrated_s": seconds} if calibrated else {})
        tell("\n".join(to_json({**facts, **dataclasses.asdict(row), "bound": row.bound}) for row in rows))
    else:
        axes = " x ".join(f"{axis} {size}" for axis, size in make_mesh(config.mesh, devices).shape.items())
        of = f"{config.mesh.slices} slices of " if config.mesh.slices > 1 else ""
        cores = per_chip(devices)
        chips = f"{len(devices) // cores} chips of {gib(cores * chip.memory)}"
        of_two = f" with two devices of {gib(chip.memory)} each" if cores > 1 else ""
        tell(f"{of}{plan.topology}: {chips}{of_two}, mesh {axes}; figures are per device\n")
        lines = [*shown(rows, chip, len(devices)), *decode_lines(rows), *exchange_lines(rows), cost_line(costs)]
        tell("\n".join(lines))
        if known:
            planned = sum(calibration.by_part(rows).values())
            said = f"{seconds:.3g} s, as measured" if calibrated else "no run on such chips"
            tell(f"calibration: {said}; {planned:.3g} s at the roofline")
    return fits(rows, chip)
