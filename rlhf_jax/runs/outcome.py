"""What a run should say at its end: that it learned nothing, and how that shows in its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

UNSEEN = {
    "rollout/hidden_fraction": "special tokens, which their texts do not show to the reward "
    "(rollout/hidden_fraction); if one of them ends an answer, add it to model.eos_ids",
    "rollout/broken_fraction": "bytes of no whole character, which their texts show to the reward as U+FFFD "
    "(rollout/broken_fraction); where that is the end of what is cut off, raise sampling.max_new_tokens",
}
"""Metric of responses that a reward does not see whole -> what they had."""

WATCHED = ("optim/grad_norm", "optim/lr", "group/equal_fraction", "rollout/reward_std", *UNSEEN)
"""Metrics whose extremes tell whether there was anything to learn, and whether a reward saw it."""

Extremes = Mapping[str, list[float]]
"""Metric -> its lowest and its highest value in the logged steps."""


def widened(extremes: Extremes, metrics: Mapping[str, float]) -> dict[str, list[float]]:
    """The extremes with those of more `metrics`; what is not finite is left out."""
    new = {n: v for n in WATCHED if (v := metrics.get(n)) is not None and math.isfinite(v)}
    both = {n: [min(extremes.get(n, [v])[0], v), max(extremes.get(n, [v])[-1], v)] for n, v in new.items()}
    return {**extremes, **both}


def nothing_learned(extremes: Extremes) -> list[str]:
    """What the metrics of all logged steps say against a run; usually nothing."""
    smallest = {"rollout/reward_std": 1e-6}  # of equal rewards: the mean of float32 numbers is rounded
    never = {name: high <= smallest.get(name, 0) for name, (_, high) in extremes.items()}
    if extremes.get("group/equal_fraction", [0])[0] == 1:
        return [
            "nothing was learned from the reward: the responses to each prompt were all paid the same, in every "
            "logged iteration, so every advantage was 0; take a reward that tells responses apart, other prompts, a "
            "larger group_size or a higher sampling.temperature (samples.jsonl shows what was rewarded)"
        ]
    if never.get("rollout/reward_std"):
        return [
            "nothing was learned from the reward: all responses had one and the same in every logged iteration; take "
            "one that tells responses apart (samples.jsonl shows what was rewarded)"
        ]
    if never.get("optim/grad_norm"):
        return [
            "nothing was learned: the gradient was 0 in every logged step; look at what the loss reads of the rows"
        ]
    if never.get("optim/lr"):
        return ["nothing was learned: the learning rate was 0 in every logged step; raise optim.learning_rate"]
    return []


def not_seen(extremes: Extremes) -> list[str]:
    """What a reward that reads texts did not see of them, where it is more than a little."""
    most = {name: extremes.get(name, [0])[-1] for name in UNSEEN}
    return [
        f"up to {most[n]:.0%} of the responses of an iteration had {what}"
        for n, what in UNSEEN.items()
        if most[n] > 0.05
    ]


def not_rewarded(failed: Mapping[str, int]) -> list[str]:
    """A line about the iterations and evaluations whose reward failed; none where there were none."""
    told = [f"{count} {what}" for what, count in failed.items() if count]
    if not told:
        return []
    return [f"the reward failed in {' and '.join(told)}, which were skipped (reward.on_failure skip); mend the reward"]


def not_better(first: Mapping[str, float], last: Mapping[str, float], best_step: int | None) -> list[str]:
    """What the `first` evaluation, before training, and the `last` one say against a run; usually nothing."""
    finite = {name: value for name, value in first.items() if math.isfinite(value)}
    if finite and all(last.get(name) == value for name, value in finite.items()):
        return [
            "the last evaluation equals the one before training in every number: the policy did not change, or not so "
            "that the held-out prompts show it"
        ]
    if best_step == 0:
        return [
            "the policy that is kept is the one before training: no later evaluation had a higher eval/objective; "
            "run.keep_best false keeps the last one"
        ]
    return []
