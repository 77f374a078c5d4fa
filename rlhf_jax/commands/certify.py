"""`rlhf-jax certify`: whether the sampler's log-probs are those of the scorer, bit for bit, and where they part."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhf_jax import group, ppo
from rlhf_jax.config import ArchConfig, CertifyArgs, OnlineArgs, PPOArgs
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import tell
from rlhf_jax.group.train import settings_of
from rlhf_jax.hosts.processes import is_first, say, to_host
from rlhf_jax.inference.generate import make_sampler
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.models import Model
from rlhf_jax.models.kernels import STACKS, depth, stacks_of
from rlhf_jax.models.stacking import cut
from rlhf_jax.online.core import response_logprobs, summed
from rlhf_jax.online.iteration import LoopState, key_at
from rlhf_jax.online.law import hidden_filter
from rlhf_jax.online.method import Method
from rlhf_jax.online.programs import EXACT, OnMesh
from rlhf_jax.sharding import put_batch, replicated, rollout_mesh
from rlhf_jax.training.loop import describe
from rlhf_jax.types import Params, Rollout

_OF_EXPERTS = ("num_experts", "experts_per_token", "router", "router_groups", "router_top_groups", "dense_layers")


def run(config: CertifyArgs, args: OnlineArgs) -> dict[str, Any]:
    """Draw and score one batch by the programs of a method, print how they agree, and return it."""
    name = "ppo" if isinstance(args, PPOArgs) else settings_of(args)[0]
    # The trained law is the sampler's, whatever the config trains, its log-probs come from a forward pass, and rows
    # that are cut count: without a token that is trained on there is no ratio.
    same = {"old_logprobs": "recompute", "train_temperature": 0.0, "importance": "off"}
    same |= {} if isinstance(args, PPOArgs) else {"mask_truncated": False}
    args = replace(args, **{f"{name}__{field}": value for field, value in same.items()})
    method, loop = ppo.train.setup(args) if isinstance(args, PPOArgs) else group.train.setup(args)
    with jax.set_mesh(method.mesh.grid):
        if not config.json:
            for line in describe(f"certify: {name}", method.mesh, method.nets.policy)[:2]:
                say(line)
        found = compared(method, loop, config.batch, layers=config.layers)
    if is_first():
        tell(json.dumps(found) if config.json else "\n".join(lines(found)))
    return found


def compared(method: Method, loop: LoopState, number: int, *, layers: bool) -> dict[str, Any]:
    """How sampler, scorer and the update's first step agree on the responses to batch `number`."""
    nets, programs, mesh, batch = method.nets, method.programs, method.mesh, method.batch(number)
    samples, key = len(batch["prompts"]) // len(batch["tokens"]), key_at(method, "training", number)
    prompts = put_batch(mesh, (batch["tokens"], batch["mask"]))
    policy = nets.policy.whole(loop.policy)
    rollout = programs.rollout(policy, *prompts, key, method.inputs.law, None, samples)
    host = put_batch(mesh, np.zeros(len(batch["prompts"]), np.float32))
    law = loop.kl_coef, method.temperature
    experience = programs.score(loop.state.params, nets.ref, nets.reward, rollout, host, *law, nets.teacher)[0]
    mask, sampler, scorer = to_host((rollout.mask, rollout.logprobs, experience.old_logprobs))
    found = {"tokens": int(mask.sum()), **gap(mask, sampler, scorer), "hidden": hidden_filter(method.config.sampling)}
    if layers and found["first"] and not found["hidden"]:
        found["layer"] = lowest(method, policy, prompts, key, rollout)
    _, metrics = programs.update(loop.state, experience, key, method.temperature, batch.get("ptx"), nets.frozen)
    ratio, kl = (float(metrics.get(f"policy/first_{name}", np.nan)) for name in ("ratio_max", "approx_kl"))
    return {**found, "update_ratio_max": ratio, "update_approx_kl": kl}


def gap(mask: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Of log-probs [B, T]: the share that is equal to the bit, the mean and largest difference, and where it is.

    `first` is (row, token) of the first token that differs, the lowest row of those; None where all are equal.
    """
    apart = np.where(mask, np.abs(a - b), 0.0)
    row, token = np.unravel_index(apart.argmax(), apart.shape)
    tokens, rows = np.nonzero(apart.T)
    return {
        "equal": float((apart[mask] == 0).mean()),
        "mean": float(apart[mask].mean()),
        "largest": float(apart.max()),
        "largest_at": [int(row), int(token)],
        "first": [int(rows[0]), int(tokens[0])] if len(rows) else None,
    }


def shallow(model: Model, params: Params, layers: int) -> tuple[Model, Params]:
    """The model of the lowest layers, with the norm and the head of the whole."""
    arch, mixers = model.arch, model.arch.mixers
    names = "window_layers", "nope_layers", "delta_layers"
    kept: dict[str, Any] = {name: tuple(i for i in getattr(arch, name) if i < layers) for name in names}
    window = arch.sliding_window if kept["window_layers"] else 0
    if layers <= arch.dense_layers:  # none of these has experts
        none: dict[str, Any] = {name: getattr(ArchConfig(), name) for name in _OF_EXPERTS}
        arch = dataclasses.replace(arch, **none, ffn_width=arch.dense_width)
    shared = max(0, layers + arch.shared_kv_layers - arch.num_layers)
    kept |= {"shared_kv_layers": shared, "shared_kv_ffn_width": arch.shared_kv_ffn_width if shared else 0}
    arch = dataclasses.replace(arch, num_layers=layers, sliding_window=window, **kept)
    model = replace(model, arch=arch)
    rest = {name: tree for name, tree in params.items() if name not in STACKS}
    inputs = {name: x[:, :layers] for name, x in rest["embed"].items() if name in ("by_layer", "context")}
    rest["embed"] = {**rest["embed"], **inputs}
    lower, *upper = stacks_of(params)
    below = depth(lower)
    if not upper or layers <= below:
        return model, {**rest, "layers": cut(lower, mixers[:below], 0, layers)}
    return model, {**rest, "lower": {"layers": lower}, "layers": cut(upper[0], mixers[below:], 0, layers - below)}


def lowest(method: Method, policy: Params, prompts: Any, key: jax.Array, rollout: Rollout) -> int | None:
    """With how many of its lowest layers the model's sampler and scorer part on the tokens of a rollout, by halving.

    Both are run alone, over the whole vocabulary. None: they agree then, and part in the method's programs only.
    """
    config, settings = method.config, method.settings
    sampling = replace(config.sampling, top_k=0, top_p=1.0, min_new_tokens=0)
    law = SamplingLaw.from_config(sampling, replicated(method.mesh))
    stop_ids = () if settings.stop == "truncate" else method.inputs.tokenizer.eos_ids
    samples, num = len(rollout.tokens) // len(prompts[0]), rollout.tokens.shape[1]

    def part(layers: int) -> bool:
        model, params = shallow(method.nets.models.policy, policy, layers)
        sampler = jax.jit(partial(make_sampler(model, sampling, stop_ids), samples=samples), compiler_options=EXACT)
        drawn = OnMesh(rollout_mesh(config.mesh, method.mesh), sampler)(
            params, *prompts, key, law, None, rollout.tokens
        )

        def score(params: Params, rollout: Rollout, temperature: jax.Array) -> jax.Array:
            of = lambda view: {"": response_logprobs(model, params, view, temperature, num)[0]}  # noqa: E731
            return summed(rollout, settings, of)[""]

        scored = jax.jit(score, compiler_options=EXACT)(params, replace(rollout, kept=None), law.temperature)
        return bool(gap(*to_host((rollout.mask, drawn.logprobs, scored)))["first"])

    good, bad = 0, method.nets.models.policy.arch.num_layers
    if not part(bad):
        return None
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if part(middle) else (middle, bad)
    return bad


def lines(found: dict[str, Any]) -> list[str]:
    """The result in words."""
    out = [f"sampler and scorer: {found['tokens']:,} tokens, {found['equal']:.2%} equal to the bit"]
    if found["first"]:
        (row, token), (far_row, far) = found["first"], found["largest_at"]
        out += [
            f"gap: {found['mean']:.2g} in the mean, {found['largest']:.2g} at most (row {far_row}, token {far})",
            f"first difference: token {token}, in row {row}",
        ]
        if found["hidden"]:
            what = "draws from a part of the vocabulary, and the scorer's log-probs are of all of it"
            out.append(f"law: sampling.{found['hidden']} {what}; sampling.top_k carries its ids along")
        if found.get("layer"):
            out.append(f"layer: with the lowest {found['layer']} layer(s) alone they part, with fewer they do not")
        elif "layer" in found:
            out.append("layer: none, if both are run alone; they part where other networks share their program")
    exact = found["update_ratio_max"] == 1 and found["update_approx_kl"] == 0
    ratio = "exactly 1" if exact else f"up to {found['update_ratio_max']:.8g}"
    out.append(f"scorer and update: the first step's ratio is {ratio}")
    verdict = "exact: what was sampled is what is trained" if not found["first"] and exact else "not exact"
    return [*out, verdict]
