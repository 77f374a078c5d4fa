"""`plan --suggest`: other meshes, rules, batches and microbatches: of many, ranked by hand, the best are compiled."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, use_abstract_mesh

from rlhf_jax.commands.plan.chips import Chip
from rlhf_jax.commands.plan.plan import RESERVED, analyse, fits, verdict
from rlhf_jax.commands.plan.programs import find_arch
from rlhf_jax.config import ArchConfig, MeshConfig, OnlineArgs, PlanArgs, PPOArgs, SFTArgs, StageArgs
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError, tell
from rlhf_jax.models.hf.layout import leaf_shapes
from rlhf_jax.sharding import mesh_sizes
from rlhf_jax.training.packing import Layout, Sharing

FEW = 4
"""Settings that fit, after which no more are compiled."""
TRIED = 6
"""Settings that are compiled at most."""
IMPROVED = 3
"""Settings that are compiled after the fastest of these, at most."""
ROUGH = 0.2
"""How far the sum by hand may be off."""
SCATTERED = "D=fsdp+data"
"""The rule by which weights lie over data as well: an axis for each of the two dimensions of a slice."""


class Estimate(NamedTuple):
    """What a sum by hand says of a setting: good for an order, not for a plan.

    Attributes:
        seconds: at the roofline for each row of a step or an iteration.
        network: those of the network alone.
        memory: bytes of a device for weights, gradients, optimiser and the copy that decodes.
    """

    seconds: float
    network: float
    memory: float


def candidates(config: StageArgs, count: int) -> Iterator[StageArgs]:
    """The config on other meshes, with weights over data too, the batch halved and doubled, and fewer minibatches."""
    name, steps = _group(config)
    powers, expert = [2**i for i in range(count.bit_length())], config.mesh.expert
    given = getattr(steps, "minibatches", 0)
    for tensor, fsdp, factor in itertools.product(powers[:5], powers, (1, 2, 0.5)):
        data, rest = divmod(count, tensor * fsdp * expert)
        if rest or not data or data % config.mesh.slices:
            continue
        mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)
        rows = dataclasses.replace(config.data, batch_size=int(config.data.batch_size * factor))
        for rules, parts in itertools.product(_rules(mesh), [given, *(n for n in powers if n < given)]):
            if rows.batch_size % (data * fsdp * expert * steps.accumulate * max(parts, 1)):
                continue
            changed: dict[str, Any] = {"mesh": dataclasses.replace(mesh, rules=rules), "data": rows}
            if parts != given:
                changed[name] = dataclasses.replace(steps, minibatches=parts)
            yield dataclasses.replace(config, **changed)


def _rules(mesh: MeshConfig) -> list[list[str]]:
    """Those of a mesh, and with weights over data too, where that is another layout within one slice."""
    said = any(line.partition("=")[0].strip() == "D" for line in mesh.rules)
    another = mesh.data > 1 and mesh.fsdp > 1 and mesh.slices == 1 and not said
    return [mesh.rules, *([[*mesh.rules, SCATTERED]] if another else [])]


def _group(config: StageArgs) -> tuple[str, Any]:
    """The name and the settings of a stage's method."""
    return next((name, group) for name, group in vars(config).items() if hasattr(group, "accumulate"))


class _Work(NamedTuple):
    """Columns that a program computes over all devices, in how many passes over the weights of how many networks."""

    columns: int
    passes: int
    networks: int
    backward: bool


def _work(config: StageArgs, mesh: AbstractMesh, width: int) -> list[_Work]:
    """What a step trains on; or an iteration scores and trains on. All slots are full."""
    _, steps = _group(config)
    size = config.data.batch_size
    if not isinstance(config, OnlineArgs):
        return [_Work(size * config.data.max_length, steps.accumulate, 1, True)]
    sharing, new = Sharing(getattr(steps, "group_size", 1), width), config.sampling.max_new_tokens
    of = partial(Layout.of, prompt=config.data.max_prompt_length, new=new, tokens=steps.microbatch_tokens)
    with use_abstract_mesh(mesh):
        score = of(size, most=steps.score_microbatch, sharing=sharing)
        rows = size // steps.minibatches
        update = of(rows, most=rows // steps.accumulate, sharing=sharing)
    trained, frozen = _networks(config)
    times = steps.epochs * steps.minibatches
    return [
        _Work(score.full * score.sequences * score.length, score.full, trained + frozen, False),
        _Work(times * update.full * update.sequences * update.length, times * update.full, trained, True),
    ]


def _networks(config: StageArgs) -> tuple[int, int]:
    """How many are trained, and how many only score; a reference that is the policy without adapters counts as one."""
    if not isinstance(config, OnlineArgs):
        return 1, 0
    critic = isinstance(config, PPOArgs) and not config.ppo.shared_trunk
    reference = isinstance(config, PPOArgs) or _group(config)[1].kl_coef > 0
    return 1 + critic, len(config.reward.paths) + bool(config.reward.teacher) + reference


def estimate(config: StageArgs, chip: Chip, dims: tuple[int, ...]) -> Estimate:
    """Seconds and bytes of a config with a whole mesh on a slice of chips [dims], by hand.

    Compute is 2 FLOPs a weight and token, twice more with the backward pass, once more where layers are computed
    again. The network gathers weights for each pass over them and scatters their gradients, or sums these whole where
    one axis lies over several dimensions of a large slice; over tensor it sums activations. Decoding reads the weights
    for every token.
    """
    shape, arch = mesh_sizes(config.mesh), _arch(config)
    data, fsdp, tensor, count = shape["data"], shape["fsdp"], shape["tensor"], math.prod(shape.values())
    active, near = _weights(arch, config.mesh.expert)
    over = data if SCATTERED in config.mesh.rules else 1

    # Bytes that a device gets of a pass: weights in bfloat16, gradients, and both sums of activations of every layer.
    gathered = 2 * near / tensor if fsdp * over > 1 else 0.0
    scattered = gathered * (2 if count >= 64 and fsdp > max(dims) else 1)
    scattered += 2 * near / tensor / fsdp * (1 if over > 1 else 2) if data > 1 else 0.0
    scattered *= not config.lora.rank
    summed = 8 * arch.width * arch.num_layers * tensor / count if tensor > 1 else 0.0  # for each column of all

    again, seconds, network = config.model.remat == "full", 0.0, 0.0
    for columns, passes, networks, backward in _work(config, AbstractMesh((*shape.values(),), (*shape,)), arch.width):
        compute = 2 * active * columns * networks * (1 + backward * (2 + again)) / (count * chip.flops)
        moved = passes * (gathered * (1 + backward) + scattered * backward)
        moved += columns * summed * (1 + backward * (1 + again))
        seconds += max(compute, networks * moved / chip.network)
        network += networks * moved / chip.network

    held = _bytes_a_weight(config) * near / (fsdp * over * tensor)
    if isinstance(config, OnlineArgs):
        copy = 2 * near / (config.mesh.rollout_tensor or tensor)
        held, seconds = held + copy, seconds + config.sampling.max_new_tokens * copy / chip.bandwidth
    return Estimate(seconds / config.data.batch_size, network / config.data.batch_size, held)


def _arch(config: StageArgs) -> ArchConfig:
    return config.model.arch or find_arch(config.model.path)


def _weights(arch: ArchConfig, ways: int) -> tuple[float, float]:
    """Those that multiply a token, and those that a group of devices holds, of which `ways` share the experts."""
    sizes = {name: math.prod(shape) for name, shape in leaf_shapes(arch, score_head=False).items()}
    experts = sum(size for name, size in sizes.items() if "/experts/" in name)
    others = sum(sizes.values()) - experts
    return others + experts * arch.experts_per_token / max(arch.num_experts, 1), others + experts / ways


def _bytes_a_weight(config: StageArgs) -> int:
    """Of all networks: master, gradient and moments of what is trained; with adapters, bases that also score."""
    trained, scoring = _networks(config)
    frozen = 2 if config.model.param_dtype == "bfloat16" else 4
    return frozen * max(trained, scoring) if config.lora.rank else 16 * trained + frozen * scoring


def ranked(config: StageArgs, chip: Chip, count: int, dims: tuple[int, ...]) -> list[StageArgs]:
    """The candidates whose weights fit, fastest first, one for each tensor, batch and number of minibatches.

    Of those within a `ROUGH` part of each other that comes first which changes least of what is learned, then that
    which sends least.
    """
    heads = _arch(config).num_kv_heads if not any(line.startswith("K=") for line in config.mesh.rules) else 0
    known = [one for one in candidates(config, count) if heads % one.mesh.tensor == 0]
    found = [(estimate(one, chip, dims), one) for one in known]
    found = [(guess, one) for guess, one in found if guess.memory < chip.memory - RESERVED]
    least = min((guess.seconds for guess, _ in found), default=0.0)

    def order(pair: tuple[Estimate, StageArgs]) -> tuple[float, ...]:
        guess, one = pair
        return math.log(guess.seconds / least) // math.log1p(ROUGH), _changes(config, one), guess.network

    best: dict[tuple[int, ...], StageArgs] = {}
    for _, one in sorted(found, key=order):
        best.setdefault((one.mesh.tensor, one.data.batch_size, getattr(_group(one)[1], "minibatches", 1)), one)
    return list(best.values())


def _changes(given: StageArgs, one: StageArgs) -> float:
    """How often the batch is doubled or halved, and the minibatches halved."""
    before, after = (getattr(_group(config)[1], "minibatches", 1) for config in (given, one))
    return abs(math.log2(one.data.batch_size / given.data.batch_size)) + math.log2(before / after)


def improved(config: StageArgs, bound: str) -> StageArgs | None:
    """The config, which waits for `bound` most, with another order of the same sums; None if none is left to try.

    Where compute binds, matrix products are kept, not computed again; else weights are read for fewer microbatches.
    """
    name, steps = _group(config)
    if bound == "compute":
        return replace(config, model__remat="dots") if config.model.remat == "full" else None
    if steps.accumulate > 1:
        return replace(config, **{f"{name}__accumulate": 1})
    if isinstance(config, SFTArgs) or (not isinstance(config, OnlineArgs) and config.data.pack == "off"):
        return None
    part, group = (name, steps) if isinstance(config, OnlineArgs) else ("data", config.data)
    return replace(config, **{f"{part}__microbatch_tokens": 2 * group.microbatch_tokens})


def options(config: StageArgs, given: StageArgs) -> str:
    """What is tried of a config, as options of the command; remat and microbatches where they are not as given."""
    name, steps = _group(config)
    mesh = config.mesh
    told = [f"--mesh.data {mesh.data} --mesh.fsdp {mesh.fsdp} --mesh.tensor {mesh.tensor}"]
    told += [f"--mesh.rules '[{', '.join(mesh.rules)}]'"] if mesh.rules else []
    told += [f"--data.batch_size {config.data.batch_size}"]
    told += [f"--{name}.minibatches {steps.minibatches}"] if hasattr(steps, "minibatches") else []
    tokens = "microbatch_tokens"
    for part, field in (("model", "remat"), (name, "accumulate"), (name, tokens), ("data", tokens)):
        value, before = (getattr(getattr(one, part), field, None) for one in (config, given))
        told += [f"--{part}.{field} {value}"] if value != before else []
    return " ".join(told)


def suggest(config: StageArgs, chip: Chip, devices: list[jax.Device], plan: PlanArgs) -> None:
    """Compile the best candidates until a few fit, then `improved` ones of the fastest; print them, fastest first."""
    dims = tuple(map(int, plan.topology.partition(":")[2].split("x")))
    order, fitting = ranked(config, chip, len(devices), dims), list[tuple[float, StageArgs, str]]()
    tell(f"{len(order)} settings may fit; compiling the best by a sum by hand, until {FEW} fit or {TRIED} are tried")

    def add(one: StageArgs, which: str) -> None:
        """Compile it; it is among `fitting`, the fastest of which is the first, if it fits."""
        name = options(one, config)
        tell(f"plan: {which} at most, minutes each: {name}", error=True)
        try:
            rows, _ = analyse(one, chip, devices, plan.responses, plan.fill, chip.memory - RESERVED)
        except (UserError, jax.errors.JaxRuntimeError) as error:
            tell(f"  no     {name}: {str(error).splitlines()[0][:120]}")
            return
        # Roofline seconds of all programs for each token trained on or made.
        cost = sum(max(r.seconds.values()) for r in rows) / max(r.tokens for r in rows)
        good, used = fits(rows, chip), f"{rows[-1].mfu(chip, len(devices)):.0%} MFU in the {rows[-1].name}"
        tell(f"  {'fits' if good else 'no  '}   {name}: {verdict(rows, chip)}; {cost * 1e6:.3g} us per token, {used}")
        if good:
            bisect.insort(fitting, (cost, one, rows[-1].bound), key=itemgetter(0))

    for number, one in enumerate(order[:TRIED], 1):
        if len(fitting) < FEW:
            add(one, f"setting {number} of {TRIED}")
    # From the fastest on, as long as each that fits is faster than the one before.
    for number in range(1, IMPROVED + 1):
        better = improved(*fitting[0][1:]) if fitting else None
        if better is None:
            break
        add(better, f"improvement {number} of {IMPROVED}")
        if fitting[0][1] is not better:
            break
    tell("\nfastest by the roofline:" if fitting else "\nnone fits; take a larger slice")
    for cost, one, _ in fitting:
        tell(f"  {cost * 1e6:.3g} us per token  {options(one, config)}")
    if fitting:
        tell("batch_size and minibatches change what is learned; meshes, rules, remat and microbatches do not")
