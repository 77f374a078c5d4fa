"""What `collect`, `judge` and `evaluate` say at their end: counts, biases, agreement, who beats whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.config import CollectArgs
from rlhf_jax.data.ballots import Ranking
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.pairs import Pair, length_bias
from rlhf_jax.data.rows import Row
from rlhf_jax.feedback import judge as judging
from rlhf_jax.feedback.judge import Verdict
from rlhf_jax.inference.intervals import mean_and_error, share_and_interval
from rlhf_jax.runs.curves import text_table

LEFT_OUT = {"unlabelled": "without a label", "no_verdict": "labelled without a verdict", "ties": "tied"}
"""Pairs that an agreement leaves out -> what a summary says of them."""


def describe(
    config: CollectArgs, ranked: Sequence[Row], pairs: Sequence[Pair], kept: Sequence[Pair]
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
        found["pairs"] = length_bias(ranked, pairs)
    if config.length_filter != "off":
        found["pairs_kept"] = length_bias(ranked, kept)
    return found


def gold_agreement(prompts: Sequence[Row], pairs: Sequence[Pair], gold: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Share of the pairs, but those that are equal in gold, whose chosen response has the higher gold reward."""
    gaps = [(prompt_key(prompts[p.group]), gold[p.group][p.chosen] - gold[p.group][p.rejected]) for p in pairs]
    agreed = share_of([(key, gap > 0) for key, gap in gaps if gap])
    return {**agreed, "ties": sum(not gap for _, gap in gaps)}


def label_agreement(given: Sequence[Ranking], verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """Share of the pairs on which a judge says what the labels of the rows say, and what could not be compared.

    Counted are `pairs` that have a label and a verdict, neither a tie; of the others `unlabelled` have no label,
    `no_verdict` have one but no verdict, and of `ties` one or both are a tie.
    """
    agrees: list[tuple[str, bool]] = []
    found = {"unlabelled": 0, "no_verdict": 0, "ties": 0}
    for one, judged in zip(given, verdicts, strict=True):
        told = one.consensus()[1] if one.ballots else np.full([len(one.responses)] * 2, np.nan)
        for v in judged:
            label = told[v.first, v.second]
            if np.isnan(label):
                found["unlabelled"] += 1
            elif v.share is None:
                found["no_verdict"] += 1
            elif label == 0.5 or v.share == 0.5:
                found["ties"] += 1
            else:
                agrees.append((prompt_key({"prompt": one.prompt}), (v.share > 0.5) == (label > 0.5)))
    return {**share_of(agrees), **found}


def share_of(agrees: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """{agreement, interval (95%), pairs, prompts} of pairs (prompt, whether they agree)."""
    if not agrees:
        return {"agreement": None, "pairs": 0, "prompts": 0}
    prompts = [prompt for prompt, _ in agrees]
    share, interval = share_and_interval(np.array([same for _, same in agrees], float), prompts)
    return {"agreement": share, "interval": list(interval), "pairs": len(agrees), "prompts": len(set(prompts))}


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
    for name, what in (
        ("apart", "rows fall apart where the judge gave no verdict; each part is ranked by itself"),
        ("without_best", "prompts give no row: nothing says which response is the best"),
    ):
        said += [f"! {summary[name]} {what}"] if summary.get(name) else []
    said += [curve_table(summary["curve"])] if "curve" in summary else []
    for name, what in (("gold", "the gold reward"), ("labels", "the labels of the rows")):
        if name in summary and not summary[name]["pairs"]:
            said.append(f"! no pair can be compared with {what}")
        elif name in summary:
            of = summary[name]
            ends = "{:.3f} to {:.3f}".format(*of["interval"])
            left = [f"{of[k]} {said_of}" for k, said_of in LEFT_OUT.items() if of.get(k)]
            counts = "; ".join([f"{of['pairs']} pairs of {of['prompts']} prompts", *left])
            said.append(f"  agrees with {what} on {of['agreement']:.3f} ({ends}) of {counts}")
    return said


def curve_table(curve: Sequence[dict[str, Any]]) -> str:
    """Best-of-n: n, its KL to the policy that is sampled from, and rewards with their standard errors."""
    names = [name for name in ("proxy", "gold") if name in curve[0]]
    headers = ["best of", "KL, nats", *(header for name in names for header in (name, "+-"))]
    return text_table(
        headers, [[at["n"], at["kl"], *(at[x][y] for x in names for y in ("mean", "se"))] for at in curve]
    )


def mean_of(values: np.ndarray, prompts: Sequence[str] | None = None) -> dict[str, float | None]:
    """{mean, se} of values [N, K] of K responses to each of N `prompts`; NaN where there is none.

    The standard error is that of independent prompts, since the responses to one prompt are alike, whether they are in
    one row or in several; without `prompts` all rows have one of their own.
    """
    each = values.mean(axis=1)
    own = [prompt for prompt, value in zip(_or_own(prompts, len(each)), each, strict=True) if not np.isnan(value)]
    if not own:
        return {"mean": None, "se": None}
    return dict(zip(("mean", "se"), mean_and_error(each[~np.isnan(each)], own), strict=True))


def _or_own(prompts: Sequence[str] | None, count: int) -> Sequence[str]:
    return [str(i) for i in range(count)] if prompts is None else prompts


def wins_over(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float[N]: the share of all pairs of a response of `own` [N, K] and one of `other` [N, J] that the former wins.

    Equal ones are half won.
    """
    return ((np.sign(own[:, :, None] - other[:, None, :]) + 1) / 2).mean(axis=(1, 2))


def win_rate(shares: np.ndarray, prompts: Sequence[str] | None = None) -> dict[str, Any]:
    """{rate, interval, prompts}: the mean of the shares won on each prompt, float[N] (NaN: no verdict), and 95% of it.

    The interval is `intervals.share_and_interval` over prompts, as in `mean_of`.
    """
    own = [prompt for prompt, share in zip(_or_own(prompts, len(shares)), shares, strict=True) if not np.isnan(share)]
    if not own:
        return {"rate": None, "interval": None, "prompts": 0}
    rate, interval = share_and_interval(shares[~np.isnan(shares)], own)
    return {"rate": rate, "interval": list(interval), "prompts": len(set(own))}


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
