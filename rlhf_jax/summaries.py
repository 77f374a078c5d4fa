"""What `collect` and `judge` say at their end: counts, biases, and agreement with other labels. Floor 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax import judge as judging
from rlhf_jax.config import CollectRun
from rlhf_jax.data import labels
from rlhf_jax.data.ballots import Ranking
from rlhf_jax.data.schemas import Row
from rlhf_jax.judge import Verdict
from rlhf_jax.reward import wilson_interval


def describe(
    config: CollectRun, ranked: Sequence[Row], pairs: Sequence[labels.Pair], kept: Sequence[labels.Pair]
) -> dict[str, Any]:
    """Counts of responses by source, and what length tells of the labels before and after the filter."""
    items = [item for row in ranked for item in row["responses"]]
    sources = {}
    for name in dict.fromkeys(item["source"] for item in items):
        of_one = [item for item in items if item["source"] == name]
        sources[name] = {
            "responses": len(of_one),
            "finished": float(np.mean([item["finished"] for item in of_one])),
            "characters": float(np.mean([len(item["text"]) for item in of_one])),
        }
    found: dict[str, Any] = {"prompts": len(ranked), "sources": sources}
    if config.label != "none":
        found["pairs"] = labels.length_bias(ranked, pairs)
    if config.length_filter != "off":
        found["pairs_kept"] = labels.length_bias(ranked, kept)
    return found


def gold_agreement(pairs: Sequence[labels.Pair], gold: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Share of the pairs, but those that are equal in gold, whose chosen response has the higher gold reward."""
    gaps = [gold[p.group][p.chosen] - gold[p.group][p.rejected] for p in pairs]
    return share_of([gap > 0 for gap in gaps if gap])


def label_agreement(given: Sequence[Ranking], verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """Share of the pairs, decided by both, on which a judge says what the labels of the rows say."""
    same = []
    for one, found in zip(given, verdicts, strict=True):
        told = one.consensus()[1] if one.ballots else None
        for v in found:
            if told is not None and v.share is not None and (v.share - 0.5) * (told[v.first, v.second] - 0.5):
                same.append((v.share > 0.5) == (told[v.first, v.second] > 0.5))
    return share_of(same)


def share_of(agrees: Sequence[bool]) -> dict[str, Any]:
    """{agreement, interval (Wilson, 95%), pairs}."""
    if not agrees:
        return {"agreement": None, "pairs": 0}
    share = float(np.mean(agrees))
    return {"agreement": share, "interval": list(wilson_interval(share, len(agrees))), "pairs": len(agrees)}


def lines(summary: dict[str, Any]) -> list[str]:
    """A summary in words."""
    said = [
        f"  {name}: {of['responses']} responses, {of['finished']:.1%} finished, {of['characters']:.0f} characters"
        for name, of in summary.get("sources", {}).items()
    ]
    for name, what in (("pairs", "pairs"), ("pairs_kept", "pairs after the length filter")):
        if name in summary:
            of = summary[name]
            told = ["unknown" if of[k] is None else f"{of[k]:.3f}" for k in ("longer_wins", "length_correlation")]
            said.append(f"  {of['pairs']} {what}: the longer wins {told[0]}, correlation with the label {told[1]}")
    said += judging.lines(summary["judge"]) if "judge" in summary else []
    for name, what in (("gold", "the gold reward"), ("labels", "the labels of the rows")):
        if name in summary and summary[name]["pairs"]:
            of = summary[name]
            ends = "{:.3f} to {:.3f}".format(*of["interval"])
            said.append(f"  agrees with {what} on {of['agreement']:.3f} ({ends}) of {of['pairs']} pairs")
    return said
