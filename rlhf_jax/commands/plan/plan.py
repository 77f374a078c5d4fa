"""Compile every program of a stage for a topology, and say what it holds, moves and computes."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax

from rlhf_jax.commands.plan.chips import GIB, Chip
from rlhf_jax.commands.plan.flops import count_flops, without_unread
from rlhf_jax.commands.plan.hlo import BETWEEN_SLICES, Traffic, traffic
from rlhf_jax.commands.plan.programs import Program, programs_of
from rlhf_jax.config import StageArgs
from rlhf_jax.errors import UserError, tell
from rlhf_jax.sharding import make_mesh

RESERVED = 0.25 * GIB
"""What the TPU runtime keeps of a chip's memory for itself."""

FILLED = "weights and optimiser fill it: raise mesh.fsdp or mesh.tensor, or take a larger slice"

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Of token slots that hold tokens, of which the cost of a run is told."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One program, or a part of one, on the topology; sizes in bytes per device, seconds by the roofline.

    Attributes:
        name: of the program.
        arguments: what it is given and keeps.
        temporaries: the compiler's scratch.
        peak: arguments, temporaries and results together.
        flops: of all devices, recomputation included.
        model_flops: the same without recomputation.
        memory: bytes of device memory read and written.
        collectives: bytes of each kind of collective.
        largest_float32: shape of the largest float32 buffer.
        seconds: compute, memory, network (and between slices, if there are several), each if it were alone.
        tokens: of one run, where as many slots hold tokens as is said.
        compile_s: seconds that the compiler took.
        least: of decode: bytes of weights and filled cache, which it cannot do without; else 0.
    """

    name: str
    arguments: float
    temporaries: float
    peak: float
    flops: float
    model_flops: float
    memory: float
    collectives: dict[str, float]
    largest_float32: tuple[int, ...]
    seconds: dict[str, float]
    tokens: int
    compile_s: float
    least: float = 0.0

    @property
    def bound(self) -> str:
        """What the roofline says it waits for."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    def mfu(self, chip: Chip, count: int) -> float:
        """What of so many devices' FLOP/s it uses at the roofline, recomputation not counted."""
        return self.model_flops / (max(self.seconds.values()) * count * chip.flops)


class Compiled(NamedTuple):
    """A program, what the compiler made of it and in what time, and its jaxprs: as configured, without remat."""

    program: Program
    sizes: Any
    text: str
    seconds: float
    jaxpr: Any
    ideal: Any


def compile_all(
    config: StageArgs, devices: list[jax.Device], width: int, fill: float, room: float = math.inf
) -> list[Compiled]:
    """The programs of a stage's config for these devices, rankings of `width`.

    Raises:
        UserError: what the stage would refuse; or what a program is given alone needs more than `room` bytes of a
            device, which is known before anything is compiled.
    """
    mesh = make_mesh(config.mesh, devices)
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    attention = "splash" if devices[0].platform == "tpu" else "plain"
    found = []
    with jax.set_mesh(mesh.grid):
        programs = programs_of(config, mesh, attention=attention, width=width, fill=fill)
        for program in programs:
            if (size := given(program)) > room:
                raise UserError(f"{program.name} is given {gib(size)} of {gib(room)}; {FILLED}")
        counted = programs_of(config, mesh, attention="plain", width=width, fill=fill)
        without = programs_of(plain, mesh, attention="plain", width=width, fill=fill)
        for number, (program, same, ideal) in enumerate(zip(programs, counted, without, strict=True)):
            tell(f"plan: compiling {program.name}, {number + 1} of {len(programs)}", error=True)
            started = time.monotonic()
            compiled = program.function.trace(*program.arguments).lower().compile()
            seconds = time.monotonic() - started
            jaxprs = [without_unread(x.function.trace(*x.arguments).jaxpr) for x in (same, ideal)]
            found.append(Compiled(program, compiled.memory_analysis(), compiled.as_text(), seconds, *jaxprs))
    return found


def given(program: Program) -> int:
    """Bytes of a program's arguments on a device."""
    leaves = [x for x in jax.tree.leaves(program.arguments) if isinstance(x, jax.ShapeDtypeStruct) and x.sharding]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def analyse(
    config: StageArgs,
    chip: Chip,
    devices: list[jax.Device],
    width: int = 2,
    fill: float = 1.0,
    room: float = math.inf,
) -> tuple[list[Row], dict[float, float]]:
    """The programs of a stage's config; rollout is split into prefill and decode.

    And the seconds of one run of them all by the share of slots that hold tokens, each waiting for what binds it.

    Raises:
        UserError: what the stage would refuse.
    """
    rows: list[Row] = []
    costs = dict.fromkeys(SHARES, 0.0)
    for one in compile_all(config, devices, width, fill, room):
        rows += _rows(one, chip, len(devices), fill)
        for share in SHARES:
            costs[share] += sum(max(row.seconds.values()) for row in _rows(one, chip, len(devices), share))
    return rows, costs


def _rows(compiled: Compiled, chip: Chip, count: int, fill: float) -> list[Row]:
    program, sizes, text, compile_s, same, ideal = compiled
    arguments, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    peak = arguments + temporaries + sizes.output_size_in_bytes - sizes.alias_size_in_bytes

    def row(name: str, flops: float, model_flops: float, moved: Traffic, tokens: float, least: float = 0.0) -> Row:
        seconds = {
            "compute": flops / (count * chip.flops),
            "memory": moved.memory / chip.bandwidth,
            "network": (sum(moved.collectives.values()) - moved.collectives[BETWEEN_SLICES]) / chip.network,
        }
        if moved.collectives[BETWEEN_SLICES]:
            seconds[BETWEEN_SLICES] = moved.collectives[BETWEEN_SLICES] / chip.between
        collectives = {kind: float(size) for kind, size in moved.collectives.items() if size}
        return Row(
            name, arguments, temporaries, peak, flops, model_flops, moved.memory, collectives,
            max(moved.buffers, key=math.prod, default=()), seconds, round(tokens), compile_s, least,
        )  # fmt: skip

    whole = traffic(text, unknown_trips=program.loops, fill=fill)
    if program.loops == 1:
        flops, model_flops = (count_flops(jaxpr, fill=fill) for jaxpr in (same, ideal))
        return [row(program.name, flops, model_flops, whole, program.tokens * fill)]
    before = traffic(text, unknown_trips=0)
    loop = Traffic(memory=whole.memory - before.memory, buffers=whole.buffers)
    loop.collectives.update({kind: size - before.collectives[kind] for kind, size in whole.collectives.items()})
    once, all_ = (count_flops(same, unknown_trips=loops, fill=fill) for loops in (0, program.loops))
    rows, length = program.arguments[1].shape
    return [
        row("prefill", once, once, before, rows * length),
        row("decode", all_ - once, all_ - once, loop, program.tokens * fill, program.least(fill)),
    ]


def shown(rows: list[Row], chip: Chip, count: int) -> list[str]:
    """Tables of memory, traffic and time, and the verdict; what goes between slices only if anything does."""
    apart = [BETWEEN_SLICES] if any(BETWEEN_SLICES in row.seconds for row in rows) else []
    kinds, times = ["all-gather", "reduce-scatter", "all-reduce"], ["compute", "memory", "network", *apart]
    memory = [("program", "arguments", "temporaries", "peak", "of", "compiled in")]
    heads = "PFLOP", "HBM", "all-gather", "reduce-sc.", "all-reduce", "other"
    moves: list[tuple[str, ...]] = [("program", *heads, *apart)]
    clock: list[tuple[str, ...]] = [("program", *times, "bound", "tokens/s", "MFU")]
    for r in rows:
        other = sum(size for kind, size in r.collectives.items() if kind not in (*kinds, BETWEEN_SLICES))
        moved = [*(r.collectives.get(kind, 0) for kind in kinds), other, *(r.collectives.get(k, 0) for k in apart)]
        seconds = max(r.seconds.values())
        sizes = gib(r.arguments), gib(r.temporaries), gib(r.peak)
        memory.append((r.name, *sizes, f"{r.peak / chip.memory:.0%}", f"{r.compile_s:.0f} s"))
        moves.append((r.name, f"{r.flops / 1e15:.3g}", gib(r.memory), *map(gib, moved)))
        parts = (f"{r.seconds.get(kind, 0) * 1e3:.3g} ms" for kind in times)
        clock.append((r.name, *parts, r.bound, f"{r.tokens / seconds:,.0f}", f"{r.mfu(chip, count):.0%}"))
    lines: list[str] = []
    for table in (memory, moves, clock):
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        lines.append("")
    return [*lines, verdict(rows, chip)]


def decode_lines(rows: list[Row]) -> list[str]:
    """How near decoding is to reading weights and filled cache alone."""
    return [
        f"{r.name}: {r.memory / r.least:.2f} x the bytes of weights and filled cache, {gib(r.least)}"
        for r in rows
        if r.least
    ]


def exchange_lines(rows: list[Row]) -> list[str]:
    """What of the other collectives takes tokens to their experts and back."""
    return [f"{r.name}: all-to-all {gib(size)}" for r in rows if (size := r.collectives.get("all-to-all", 0.0))]


def cost_line(costs: dict[float, float]) -> str:
    """What one run of all programs costs by the share of token slots that hold tokens, and against the line to 0."""
    told = [f"{share:.0%} {cost:.3g} s ({cost / costs[1.0] / share:.2f})" for share, cost in costs.items()]
    return f"all of it by the share of real tokens (against that share of the last): {', '.join(told)}"


def gib(size: float) -> str:
    """A size of memory in words."""
    return f"{size / GIB:.2f} GiB" if size >= 0.995 * GIB / 100 else f"{size / 2**20:.2g} MiB"


def fits(rows: list[Row], chip: Chip) -> bool:
    """Whether every program's peak is below what the runtime leaves of the chip's memory."""
    return all(r.peak <= chip.memory - RESERVED for r in rows)


def verdict(rows: list[Row], chip: Chip) -> str:
    """Fits, or the worst program and what to change."""
    worst = max(rows, key=lambda r: r.peak)
    room = chip.memory - RESERVED
    if fits(rows, chip):
        return f"fits: the largest program, {worst.name}, needs {gib(worst.peak)} of {gib(room)}"
    if worst.arguments > room / 2:
        cure = FILLED
    elif worst.name in ("prefill", "decode"):
        cure = "set sampling.microbatch, raise mesh.tensor, or lower data.batch_size"
    elif worst.name == "score":
        cure = "set score_microbatch or lower model.logprob_chunk"
    elif worst.name == "reference":
        cure = "lower data.batch_size or model.logprob_chunk"
    else:
        cure = "set model.remat to full, raise accumulate or minibatches, lower model.logprob_chunk"
    return f"does not fit: {worst.name} needs {gib(worst.peak)} of {gib(room)}; {cure}"
