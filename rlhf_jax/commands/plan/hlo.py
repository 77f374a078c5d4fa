"""What a compiled program moves: a walk over its HLO text, loops multiplied by their trip counts."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

from rlhf_jax.commands.plan.flops import rare, trips_of

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2,
          "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}  # fmt: skip
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_BRANCHES = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)="
    r"(?:\{([\w.\-, %]+)\}|%?([\w.\-]+))"
)
_COUNTING = {"parameter", "constant", "get-tuple-element", "compare", "fusion", "bitcast", "copy", "tuple"}
_CUTS = {"slice", "dynamic-slice", "gather"}
"""Of their first operand they read no more than they return."""
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
         "after-all", "partition-id", "replica-id", "opt-barrier"}  # fmt: skip
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"
_WINDOWED = {"windowed_dot_general_body_ag": "all-gather", "windowed_dot_general_body_rs": "reduce-scatter"}
"""Loops in which the compiler hands shards around a ring while it multiplies them -> the collective that they are."""


@dataclass
class Traffic:
    """Bytes per device of one run of a program, and float32 shapes it ever holds.

    Attributes:
        collectives: kind -> bytes that a device sends or receives: of an all-gather its result, of a reduce-scatter
            its operand, of an all-reduce twice its operand. BETWEEN_SLICES is what it hands to the hosts for those.
        memory: bytes of high-bandwidth memory read and written, an estimate from above.
        buffers: every float32 shape of a result.
    """

    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    memory: float = 0.0
    buffers: set[tuple[int, ...]] = field(default_factory=set)

    def total(self) -> float:
        """All bytes."""
        return self.memory + sum(self.collectives.values())

    def add(self, other: Traffic) -> None:
        """What runs besides."""
        self.memory += other.memory
        self.buffers |= other.buffers
        for kind, size in other.collectives.items():
            self.collectives[kind] += size


@dataclass
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str

    def operands(self) -> list[str]:
        depths = itertools.accumulate(({"(": 1, ")": -1}.get(char, 0) for char in self.rest), initial=1)
        end = next((i for i, depth in enumerate(depths) if depth == 0), len(self.rest))
        return re.findall(r"%([\w.\-]+)", self.rest[:end])

    def called(self, part: str) -> str:
        """Name of the computation that it uses as calls, body or condition."""
        name = re.search(part + r"=%?([\w.\-]+)", self.rest)
        return name[1] if name else ""

    def branches(self) -> list[str]:
        """Names of the computations that it calls, of which a conditional runs one."""
        return re.findall(r"[\w.\-]+", " ".join(map(" ".join, _BRANCHES.findall(self.rest))))


_Computations = dict[str, list[_Instruction]]


def _size(text: str) -> float:
    """Bytes of all shapes in a piece of HLO that lie in the device's memory; S(1) and S(3) are on the chip."""
    return sum(_BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in _SHAPE.findall(text))


@functools.lru_cache(maxsize=1)  # the same program is asked about for several shares of real tokens
def _parse(text: str) -> tuple[_Computations, str]:
    computations: _Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (parts := _INSTRUCTION.match(line)):
            current.append(_Instruction(*parts.groups()))
    return computations, entry


def _trips(loop: _Instruction, computations: _Computations) -> int | None:
    """How often a loop runs whose condition is counter < constant, from 0; None if it is anything else."""
    counting = list(computations.get(loop.called("condition"), ()))
    for i in counting:  # it grows: a fusion's instructions belong to the condition
        if i.op == "fusion":
            counting += computations.get(i.called("calls"), ())
    if not {i.op for i in counting} <= _COUNTING:
        return None
    numbers = [i for i in counting if i.shape.startswith(("s32[]", "u32[]"))]
    limits = [int(i.rest.split(")")[0]) for i in numbers if i.op == "constant"]
    if not limits:
        return None
    places = [re.search(r"index=(\d+)", i.rest) for i in numbers if i.op == "get-tuple-element"]
    steps = [_step(computations.get(loop.called("body"), []), int(place[1])) for place in places if place]
    return -(-max(limits) // max(steps, default=1))


def _step(body: list[_Instruction], place: int) -> int:
    """The constant that a loop adds to what it carries in a place, 1 if it is not seen to add one."""
    by_name = {i.name: i for i in body}
    carried = body[-1].operands() if body and body[-1].op == "tuple" else []
    added = by_name.get(carried[place]) if place < len(carried) else None
    if added is None or added.op != "add":
        return 1
    terms = [by_name[name] for name in added.operands() if name in by_name]
    return next((int(i.rest.split(")")[0]) for i in terms if i.op == "constant"), 1)


def traffic(text: str, *, unknown_trips: int = 1, fill: float = 1.0) -> Traffic:
    """What one run moves; a loop that ends when its data say so runs as often as `trips_of` says."""
    computations, entry = _parse(text)
    out = Traffic()
    seen: set[tuple[str, ...]] = set()

    def walk(name: str, times: float, outside: float, parent: str = "") -> None:
        """`times` that the computation runs, and that the windowed products around it do as a whole.

        `parent` is the computation that a fusion belongs to.
        """
        shapes = {i.name: i.shape for i in computations.get(name, ())}
        scatters = parent and any(i.op == "dynamic-slice" for i in computations.get(name, ()))
        ring = next((kind for part, kind in _WINDOWED.items() if part in name), "")
        for i in computations.get(name, ()):
            kind, operands = i.op.removesuffix("-start"), sum(_size(shapes.get(name, "")) for name in i.operands())
            if kind in COLLECTIVES:
                result = _size(i.shape) - (operands if i.op.endswith("-start") else 0)  # a start returns its operand
                moved = times * {"all-gather": result, "all-reduce": 2 * operands}.get(kind, operands)
                if scatters and kind == "all-reduce":  # how the TPU compiler writes a reduce-scatter
                    kind, moved = "reduce-scatter", moved / 2
                elif ring and kind == "collective-permute":
                    kind = ring
                if parent and times:
                    # The TPU compiler spreads one collective over several fusions, beside the steps of a product.
                    piece = (parent, kind, i.shape, (re.search(r'op_name="([^"]*)"', i.rest) or [""])[0])
                    moved = 0 if piece in seen else moved * outside / times
                    seen.add(piece)
                out.collectives[kind] += moved
            elif i.op == "send" and "xla_megascale" in i.rest:
                out.collectives[BETWEEN_SLICES] += times * _size(shapes.get(i.operands()[0], ""))
            elif i.op == "while":
                scopes = (re.search(r'op_name="([^"]*)"', i.rest) or ["", ""])[1]
                # Of a loop that has a name of its own the condition may look like a count, and be none.
                trips = None if re.search(r"_[\d.]+/while$", scopes) else _trips(i, computations)
                trips = 0 if rare(scopes) else trips
                inner = times * (trips_of(scopes, unknown_trips, fill) if trips is None else trips)
                walk(i.called("body"), inner, outside if "windowed" in i.called("body") else inner)
            elif i.op == "conditional":  # one branch runs: that which moves most
                moves = [apart(name, times, outside, parent) for name in i.branches()]
                out.add(max(moves, key=Traffic.total, default=Traffic()))
                out.buffers |= set().union(*(one.buffers for one in moves))
            elif i.op in ("call", "call-start", "async-start"):  # call-start: tpu7x's sparse cores
                for branch in i.branches():
                    walk(branch, times, outside, parent)
            elif i.op == "fusion":
                walk(i.called("calls"), times, outside, parent or name)
            if not parent and kind not in COLLECTIVES:
                _add_memory(i, shapes, computations, times, out)

    def apart(name: str, times: float, outside: float, parent: str) -> Traffic:
        """What one branch moves."""
        nonlocal out
        whole, out = out, Traffic()
        walk(name, times, outside, parent)
        whole, out = out, whole
        return whole

    walk(entry, 1.0, 1.0)
    return out


def _add_memory(
    i: _Instruction, shapes: dict[str, str], computations: _Computations, times: float, out: Traffic
) -> None:
    operands = [shapes.get(name, "") for name in i.operands()]
    if i.op in ("copy-start", "slice-start"):  # to the scratchpad or from it; what it returns has the operand, too
        out.memory += times * (_size(i.shape) - sum(map(_size, operands)))
    if i.op in _FREE or i.op.endswith(("-start", "-done")):
        return
    for kind, dims in _SHAPE.findall(i.shape):
        if kind == "f32":
            out.buffers.add(tuple(int(d) for d in dims.split(",") if d))
    read = [min(_size(_off_chip(shape)), most) for shape, most in zip(operands, _sliced(i, computations), strict=True)]
    inside = {x.op for x in computations.get(i.called("calls"), ())} if i.op == "fusion" else {i.op}
    if "dynamic-update-slice" in inside:  # in place: the large operand is neither read nor written as a whole
        out.memory += times * 2 * sum(sorted(read)[:-1])
    elif "dynamic-slice" in inside:
        result = _size(_off_chip(i.shape))
        out.memory += times * (result + sum(min(size, max(result, 1)) for size in read))
    else:
        out.memory += times * (sum(read) + _size(_off_chip(i.shape)))


def _sliced(i: _Instruction, computations: _Computations) -> list[float]:
    """Of each operand the bytes of what is cut out of it, or looked up, where nothing else is done with it."""
    if i.op in _CUTS:
        return [_size(_off_chip(i.shape)), *[math.inf] * (len(i.operands()) - 1)]
    inside = computations.get(i.called("calls"), ()) if i.op == "fusion" else ()
    cuts = [0.0 if inside else math.inf] * len(i.operands())
    places = {x.name: int(x.rest.split(")")[0]) for x in inside if x.op == "parameter"}
    for x in inside:
        for name, size in zip(x.operands(), _sliced(x, computations), strict=True):  # x may be a fusion, too
            if name in places:
                cuts[places[name]] += size
    return cuts


def _off_chip(shape: str) -> str:
    """A shape without the parts that the compiler keeps on the chip: in memory space 1, of v4 in its CMEM, 3."""
    return re.sub(r"\w+\[[\d,]*\]\{[^}]*S\([13]\)\}", "", shape)
