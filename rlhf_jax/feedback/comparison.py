"""Models beside one another: what is known of each, and how often it beats a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.rows import Row
from rlhf_jax.feedback.judge import verdicts_of
from rlhf_jax.feedback.report import Summary, judge_lines
from rlhf_jax.inference.intervals import mean_and_error, share_and_interval
from rlhf_jax.runs.curves import text_table

SHOWN = {"score": "reward", "gold": "gold"}
"""Columns of responses that a model wins or loses by -> what a summary calls them."""


def compare(
    rows: Sequence[Row], names: Sequence[str], each: Sequence[int], baseline: int, perplexities: Sequence[float]
) -> dict[str, Summary]:
    """What is known of every source, by name.

    Args:
        rows: of the prompts, {prompt, responses, verdicts?}, responses source by source.
        names, each: of the sources, and their responses to a prompt.
        baseline: number of the source that the others are compared with.
        perplexities: of the sources on held-out rows; empty if there are none.
    """
    prompts = [prompt_key(row) for row in rows]
    measured = rows[0]["responses"][0]
    of = {  # column -> [N, K] for each source of K responses
        column: np.split(
            np.array([[item.get(column) for item in row["responses"]] for row in rows], float),
            np.cumsum(each)[:-1],
            axis=1,
        )
        for column in ("finished", "tokens", "logprob", "ref_logprob", *SHOWN)
        if column in measured
    }
    judged = judged_shares(rows, names, each, baseline) if "verdicts" in rows[0] else {}
    models = {}
    for s, name in enumerate(names):
        model: Summary = {"responses": of["tokens"][s].size, "tokens": float(of["tokens"][s].mean())}
        model["unfinished"] = float(1 - of["finished"][s].mean())
        model |= {shown: mean_of(of[column][s], prompts) for column, shown in SHOWN.items() if column in of}
        if perplexities:
            model["perplexity"] = perplexities[s]
        if "ref_logprob" in of:
            ratio = of["logprob"][s] - of["ref_logprob"][s]
            model["kl"] = mean_of(ratio, prompts)
            model["kl_per_token"] = float(ratio.sum() / of["tokens"][s].sum())
        if s != baseline:
            wins = {shown: wins_over(of[c][s], of[c][baseline]) for c, shown in SHOWN.items() if c in of}
            wins |= {"judge": judged[name]} if judged else {}
            model["wins"] = {by: win_rate(shares, prompts) for by, shares in wins.items()}
        models[name] = model
    return models


def judged_shares(
    rows: Sequence[Row], names: Sequence[str], each: Sequence[int], baseline: int
) -> dict[str, np.ndarray]:
    """Source -> float[N], the share of the verdicts on each prompt that it wins, ties half; NaN without one.

    The verdicts of a row are, source by source, on pairs of a response of the source and one of the baseline.
    """
    counts = {name: min(k, each[baseline]) for name, k in zip(names, each, strict=True) if name != names[baseline]}
    shares = {name: np.full(len(rows), np.nan) for name in counts}
    for i, row in enumerate(rows):
        verdicts = iter(verdicts_of(row))
        for name, count in counts.items():
            of_one = [next(verdicts) for _ in range(count)]
            outcomes = [(np.sign(v.share - 0.5) + 1) / 2 for v in of_one if v.share is not None]
            if outcomes:
                shares[name][i] = float(np.mean(outcomes))
    return shares


def mean_of(values: np.ndarray, prompts: Sequence[str]) -> dict[str, float | None]:
    """{mean, se} of values [N, K] of K responses to each of N `prompts`; NaN where there is none.

    The standard error is that of independent prompts, since the responses to one prompt are alike, whether they are in
    one row or in several.
    """
    each = values.mean(axis=1)
    known = ~np.isnan(each)
    if not known.any():
        return {"mean": None, "se": None}
    mean, error = mean_and_error(each[known], _chosen(prompts, known))
    return {"mean": mean, "se": error}


def wins_over(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float[N]: the share of all pairs of a response of `own` [N, K] and one of `other` [N, J] that the former wins.

    Equal ones are half won.
    """
    return ((np.sign(own[:, :, None] - other[:, None, :]) + 1) / 2).mean(axis=(1, 2))


def win_rate(shares: np.ndarray, prompts: Sequence[str]) -> Summary:
    """{rate, interval, prompts}: the mean of the shares won on each prompt, float[N] (NaN: no verdict), and 95% of it.

    The interval is `intervals.share_and_interval` over prompts, as in `mean_of`.
    """
    known = ~np.isnan(shares)
    if not known.any():
        return {"rate": None, "interval": None, "prompts": 0}
    own = _chosen(prompts, known)
    rate, interval = share_and_interval(shares[known], own)
    return {"rate": rate, "interval": list(interval), "prompts": len(set(own))}


def _chosen(prompts: Sequence[str], known: np.ndarray) -> list[str]:
    return [prompt for prompt, one in zip(prompts, known, strict=True) if one]


def evaluation_lines(summary: Summary) -> list[str]:
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
        row: list[str | float | None] = [name]
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
    return said + (judge_lines(summary["judge"]) if "judge" in summary else [])
