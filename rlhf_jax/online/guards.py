"""Guards against a reward that is exploited: its scale by the first policy's responses, limits of a run, an alarm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import OnlineConfig
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import say
from rlhf_jax.models.loading import Loaded
from rlhf_jax.online.iteration import LoopState, held_out
from rlhf_jax.online.method import Method
from rlhf_jax.online.networks import members, together
from rlhf_jax.training.responses import standardised

DISAGREEMENT = "eval/reward_disagreement"
ALARM = 1.5
"""Times the disagreement before training, at which the alarm is given."""

Scale = dict[str, list[float]]
"""Of every member of an ensemble, or of a single reward model: its mean and standard deviation."""


def first_scale(method: Method, loop: LoopState) -> Scale:
    """The scores of the policy's own responses to the held-out prompts, with the noise of an evaluation.

    Reward functions and a judge, which have no scale to set, are not asked.

    Raises:
        UserError: no prompt is held out.
    """
    if not method.inputs.held_out:
        raise UserError("reward_standardize needs held-out prompts; set data.eval_fraction or data.eval_path")
    alone = replace(method, inputs=replace(method.inputs, reward=None, judge=None, gold=None))
    scores = np.concatenate([rows["members"] for _, _, rows, _ in held_out(alone, loop)]).astype(np.float64)  # [N, M]
    scale = {"mean": scores.mean(axis=0).tolist(), "std": scores.std(axis=0).tolist()}
    each = ", ".join(f"{mean:.3g} +- {std:.3g}" for mean, std in zip(*scale.values(), strict=True))
    say(f"the first policy's {len(scores)} responses to held-out prompts have the scores {each}, the reward's scale")
    return scale


def on_scale(method: Method, scale: Scale) -> Method:
    """The method with every reward model shifted, and scaled if its settings ask, folded into the models' heads."""
    mean, std = (np.array(scale[name], np.float32) for name in ("mean", "std"))
    if method.settings.reward_standardize == "mean":
        std = np.ones_like(std)
    models, start = [], 0
    for one in members(Loaded(method.nets.models.reward, method.nets.reward)):
        count = one.model.members or 1
        part = slice(start, start + count) if one.model.members else start
        score = standardised(one.params["score"], mean[part], std[part])
        models.append(replace(one, params={**one.params, "score": score}))
        start += count
    reward = together(models)
    return replace(method, nets=replace(method.nets, reward=reward and reward.params))


def critic_on_scale(method: Method, loop: LoopState) -> LoopState:
    """The first state, with the head of a critic that starts from the reward model on the scale of `on_scale`."""
    state, head_of = loop.state, method.nets.critic_head
    if head_of is None:
        return loop
    value = state.params["value"]
    place = lambda new, old: jax.device_put(jnp.copy(new), old.sharding)  # noqa: E731
    score = jax.tree.map(place, head_of(method.nets.reward), value["score"])
    return replace(loop, state=replace(state, params={**state.params, "value": {**value, "score": score}}))


def beyond(settings: OnlineConfig, before: Mapping[str, float], results: Mapping[str, float]) -> str:
    """Which limit an evaluation is beyond, in words; empty if none. `before` is the first evaluation."""
    kl, budget = results.get("eval/kl", 0.0), settings.kl_budget
    if budget and not kl <= budget:
        return f"the KL of {kl:.3g} nats is above kl_budget {budget:g}"
    disagree, most = results.get(DISAGREEMENT, 0.0), settings.disagreement_budget * before.get(DISAGREEMENT, np.inf)
    if settings.disagreement_budget and not disagree <= most:
        return f"the reward ensemble's disagreement {disagree:.3g} is above disagreement_budget, {most:.3g}"
    return ""


def alarm(before: Mapping[str, float], results: Mapping[str, float]) -> str:
    """A line where the reward and the disagreement about it have both risen; else empty."""
    if DISAGREEMENT not in before or DISAGREEMENT not in results:
        return ""
    reward, disagree = ([x[name] for x in (before, results)] for name in ("eval/reward", DISAGREEMENT))
    if disagree[1] <= ALARM * disagree[0] or not reward[1] > reward[0]:
        return ""
    return (
        f"the reward rose from {reward[0]:.3g} to {reward[1]:.3g} and the disagreement of its members from "
        f"{disagree[0]:.3g} to {disagree[1]:.3g}: it may be exploited; see kl_budget, reward.combine lower_bound"
    )


def check(method: Method, before: Mapping[str, float]) -> None:
    """Raise a UserError for a limit of what the first evaluation could not measure."""
    asked = {"kl_budget": "eval/kl", "disagreement_budget": DISAGREEMENT}
    cures = {"kl_budget": "a reference (kl_coef above 0)", "disagreement_budget": "several members (reward.models)"}
    for name, metric in asked.items():
        if getattr(method.settings, name) and metric not in before:
            cure = f"{cures[name]} and held-out prompts (data.eval_fraction)"
            raise UserError(f"{name} {getattr(method.settings, name):g} needs {cure}; or set it to 0")
