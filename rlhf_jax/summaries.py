"""What `collect`, `judge` and `evaluate` say at their end: counts, biases, agreement, who beats whom. Floor 4."""

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
from rlhf_jax.tasks.report import text_table


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
    said += [curve_table(summary["curve"])] if "curve" in summary else []
    for name, what in (("gold", "the gold reward"), ("labels", "the labels of the rows")):
        if name in summary and summary[name]["pairs"]:
            of = summary[name]
            ends = "{:.3f} to {:.3f}".format(*of["interval"])
            said.append(f"  agrees with {what} on {of['agreement']:.3f} ({ends}) of {of['pairs']} pairs")
    return said


def curve_table(curve: Sequence[dict[str, Any]]) -> str:
    """Best-of-n: n, its KL to the policy that is sampled from, and rewards with their standard errors."""
    names = [name for name in ("proxy", "gold") if name in curve[0]]
    headers = ["best of", "KL, nats", *(header for name in names for header in (name, "+-"))]
    return text_table(
        headers, [[at["n"], at["kl"], *(at[x][y] for x in names for y in ("mean", "se"))] for at in curve]
    )


def mean_of(values: np.ndarray) -> dict[str, float | None]:
    """{mean, se} of values [N, K] of K responses to N prompts; NaN where there is none.

    The standard error is that of N independent prompts, since the responses to one prompt are alike.
    """
    each = values.mean(axis=1)
    each = each[~np.isnan(each)]
    if not len(each):
        return {"mean": None, "se": None}
    return {"mean": float(each.mean()), "se": float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else None}


def wins(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float[N]: the share of all pairs of a response of `own` [N, K] and one of `other` [N, J] that the former wins.

    Equal ones are half won.
    """
    return ((np.sign(own[:, :, None] - other[:, None, :]) + 1) / 2).mean(axis=(1, 2))


def win_rate(shares: np.ndarray) -> dict[str, Any]:
    """{rate, interval, prompts}: the mean of the shares won on each prompt, float[N] (NaN: no verdict), and 95% of it.

    Wilson's interval of as many independent comparisons as there would have to be for so small a variance between
    prompts, N r (1 - r) / var (Kish 1965, the design effect): N where every prompt is won or lost as a whole, more
    where ties or several samples of a prompt average out. Wilson's does not shrink to nothing where all are won.
    """
    known = shares[~np.isnan(shares)]
    if not len(known):
        return {"rate": None, "interval": None, "prompts": 0}
    rate, spread = float(known.mean()), float(known.var())
    trials = len(known) * max(rate * (1 - rate) / spread, 1.0) if spread else len(known)
    return {"rate": rate, "interval": list(wilson_interval(rate, trials)), "prompts": len(known)}


def evaluation_lines(summary: dict[str, Any]) -> list[str]:
    """A table over models, and what its columns are of."""
    models, baseline = summary["models"], summary["baseline"]
    judges = next((list(of["wins"]) for name, of in models.items() if name != baseline), [])
    headers, means = ["model"], [name for name in ("reward", "gold", "kl") if name in models[baseline]]
    for name in means:
        headers += [{"kl": "KL, nats"}.get(name, name), "+-"]
    single = [name for name in ("kl_per_token", "perplexity", "tokens", "unfinished") if name in models[baseline]]
    headers += [{"kl_per_token": "per token"}.get(name, name) for name in single]
    for by in judges:
        headers += [f"wins by {by}", "95%"]
    rows = []
    for name, of in models.items():
        row: list[Any] = [name]
        for column in means:
            row += [of[column]["mean"], of[column]["se"]]
        row += [of[column] for column in single]
        for by in judges:
            won = of.get("wins", {}).get(by, {"rate": None, "interval": None})
            row += [won["rate"], won["interval"] and "{:.3f} to {:.3f}".format(*won["interval"])]
        rows.append(row)
    said = [text_table(headers, rows), f"{summary['prompts']} prompts; +- is the standard error over them"]
    if judges:
        said.append(f"wins against {baseline}, ties half; Wilson's intervals over prompts")
    return said + (judging.lines(summary["judge"]) if "judge" in summary else [])
