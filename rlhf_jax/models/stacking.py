"""Stacks of layers of which some have parts that others lack, and how to run over them.

A stack holds what all of its layers have as [L, ...]. What mixes tokens is of the layers with that mixer alone
(`ArchConfig.mixers`), an MLP of the lowest layers where experts, or wider ones, are of the rest; such a part is [their
number, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlhf_jax.config import ArchConfig
from rlhf_jax.config.rules import MIXERS
from rlhf_jax.models.kernels import depth, stacks_of
from rlhf_jax.types import Params


def cut(stack: Params, mixers: Sequence[str], first: int, last: int) -> Params:
    """Layers first to last - 1 of a stack of layers with these mixers."""
    out, total = {}, len(mixers)
    for part, tree in stack.items():
        size = depth(tree)
        if part in MIXERS:
            a, b = (list(mixers[:end]).count(part) for end in (first, last))
        else:
            start = 0 if part == "mlp" else total - size
            a, b = max(first - start, 0), min(last - start, size)
        if a < b or size == total:
            out[part] = jax.tree.map(lambda x, a=a, b=b: x[a:b], tree)
    return out


def layer_of(stack: Params, mixers: Sequence[str], i: int) -> Params:
    """Layer i of it, without the leading axis."""
    return jax.tree.map(lambda x: x[0], cut(stack, mixers, i, i + 1))


def runs_of(params: Params, arch: ArchConfig) -> list[tuple[Params, Sequence[str]]]:
    """The stacks of a model with their mixers, cut where layers with experts, or with queries alone, follow others.

    Of the layers whose keys and values others see (`ArchConfig.kept_layers`) each is a run of its own.
    """
    runs, at = list[tuple[Params, Sequence[str]]](), 0
    starts = (arch.num_layers - arch.expert_layers, *arch.kept_layers, arch.num_layers - arch.shared_kv_layers)
    for stack in filter(depth, stacks_of(params)):
        size = depth(stack)
        own, ends = arch.mixers[at : at + size], sorted({0, size} | {i - at for i in starts if at < i < at + size})
        runs += [(cut(stack, own, *end), own[slice(*end)]) for end in pairwise(ends)]
        at += size
    return runs


def interleaved(made: Mapping[Any, Params], sorts: Sequence[Any]) -> Params:
    """The stack of all layers, of stacks of those of each sort; `sorts` says of which each is."""
    parts = {}
    for part in dict.fromkeys(part for stack in made.values() for part in stack):
        having = [sort for sort in made if part in made[sort]]
        at = np.concatenate([[i for i, other in enumerate(sorts) if other == sort] for sort in having])
        join = lambda *of, order=np.argsort(at): jnp.concatenate(of)[order] if len(of) > 1 else of[0]  # noqa: E731, B008
        parts[part] = jax.tree.map(join, *(made[sort][part] for sort in having))
    return parts


def period(mixers: Sequence[str]) -> int:
    """After how many layers mixers repeat, so that the layers of one period and of the rest are the fewest."""
    count = len(mixers)
    repeats = [p for p in range(1, count + 1) if all(mixers[i] == mixers[i - p] for i in range(p, count))]
    return min(repeats, key=lambda p: p + count % p)


Step = Callable[[str, Array, Params, Any], tuple[Array, Any]]
"""(mixer, x, parameters of a layer, what else it is given) -> (x, what else it makes)."""


def scanned(step: Step, x: Array, stack: Params, mixers: Sequence[str], each: Any) -> tuple[Array, Any]:
    """x through all layers, and what else they make, [L, ...]; `each` has [L, ...] of what else they are given.

    The layers of a period are compiled once, however many there are, and those of a rest; of those with one mixer that
    follow each other one.
    """
    one = lambda mixer: lambda x, inputs: step(mixer, x, *inputs)  # noqa: E731
    size = period(mixers)
    if size == 1:
        return jax.lax.scan(one(mixers[0]), x, (stack, each))
    rounds, made = len(mixers) // size, []

    def layers(x: Array, stack: Params, each: Any, mixers: Sequence[str]) -> tuple[Array, Any]:
        out, at = [], 0
        for mixer, run in groupby(mixers):
            end = at + len(list(run))
            part = cut(stack, mixers, at, end), jax.tree.map(itemgetter(slice(at, end)), each)
            x, more = jax.lax.scan(one(mixer), x, part)
            out.append(more)
            at = end
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *out)

    def turn(x: Array, inputs: tuple[Params, Any]) -> tuple[Array, Any]:
        return layers(x, *inputs, mixers[:size])

    last = rounds * size
    whole = cut(stack, mixers, 0, last), jax.tree.map(lambda a: a[:last], each)
    x, out = jax.lax.scan(turn, x, jax.tree.map(lambda a: a.reshape(rounds, -1, *a.shape[1:]), whole))
    made.append(jax.tree.map(lambda a: a.reshape(last, *a.shape[2:]), out))
    if last < len(mixers):
        rest = cut(stack, mixers, last, len(mixers)), jax.tree.map(lambda a: a[last:], each)
        x, out = layers(x, *rest, mixers[last:])
        made.append(out)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *made)
