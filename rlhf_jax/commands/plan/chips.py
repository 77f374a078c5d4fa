"""TPU generations and their topologies."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from rlhf_jax.errors import UserError


class Chip(NamedTuple):
    """What a chip can do: memory in bytes, bfloat16 FLOP/s, bytes/s of memory, of one mesh axis and between slices.

    The network's figure is both directions of a ring along one axis; a program that uses two axes at once can have
    twice that, so the plan is on the safe side. So it is where two devices of a chip share its links: each has half.
    """

    memory: float
    flops: float
    bandwidth: float
    network: float
    between: float


GIB = 1024**3
_QUIET = {  # else the compiler asks the network where it is, says what it thinks, and wants to be the only one
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
}  # fmt: skip
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.228e12, 90e9, 6.25e9),
    "v5e": Chip(16 * GIB, 197e12, 0.819e12, 90e9, 3.125e9),
    "v5p": Chip(95 * GIB, 459e12, 2.765e12, 180e9, 6.25e9),
    "v6e": Chip(32 * GIB, 918e12, 1.64e12, 180e9, 12.5e9),
    "tpu7x": Chip(192 * GIB, 2307e12, 7.38e12, 180e9, 12.5e9),
}
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
"""What JAX calls a device -> its generation."""
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SLICES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}
"""Shapes of slices that are lent, from 1 or 4 to 256 chips, smallest first."""


def find_topology(name: str, slices: int = 1) -> tuple[Chip, list[jax.Device]]:
    """A device's share of a chip, and the devices of slices of a topology such as v5e:4x4; no TPU is needed.

    To JAX a chip of tpu7x is two devices, each with half of everything. The two cores of v4 and v5p are one.

    Raises:
        UserError: no such generation or shape, or the compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not shape or not all(part.isdigit() for part in shape.split("x")):
        raise UserError(
            f"topology {name!r} is unknown; write a generation ({', '.join(CHIPS)}) and its shape: v5e:4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed; pip install 'rlhf-jax[tpu]'")
    if jax.default_backend() != "tpu":  # of which the compiler is loaded, and knows where it is
        for variable, value in _QUIET.items():
            os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if set(shape.split("x")) == {"1"}:  # hosts are taken for 2x2
        options["chips_per_host_bounds"] = (1, 1, 1)
    if kind == "v4":  # without it the compiler takes each core for a device, as no v4 machine does
        options["chip_config_name"] = "megacore"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # XLA's own errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"topology {name}: the TPU compiler refuses it ({reason}); choose another shape") from error
    return share_of(kind, devices), list(devices)


def share_of(kind: str, devices: Sequence[Any]) -> Chip:
    """What one of these devices of a generation can do."""
    return Chip(*(figure / per_chip(devices) for figure in CHIPS[kind]))


def per_chip(devices: Sequence[Any]) -> int:
    """Devices of one chip, 1 or 2."""
    return max(getattr(device, "core_on_chip", 0) for device in devices) + 1
