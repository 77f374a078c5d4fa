"""What `collect`, `judge` and `bestofn` say at their end: counts, biases, agreement; as numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import numpy as np

from rlhf_jax.data.agreement import length_bias
from rlhf_jax.data.ballots import Ranking
from rlhf_jax.data.consensus import best_of_n
from rlhf_jax.data.encoding import mark_of
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.pairs import Pair
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import tell
from rlhf_jax.feedback.judge import NO_ANSWER, NONSENSE, Verdict, verdicts_of
from rlhf_jax.inference.intervals import mean_and_error, share_and_interval
from rlhf_jax.runs.curves import text_table
from rlhf_jax.runs.directory import Summary
from rlhf_jax.runs.journal import Journal

LEFT_OUT = {"unlabelled": "without a label", "no_verdict": "labelled without a verdict", "ties": "tied"}
"""Pairs that an agreement leaves out -> what a summary says of them."""

UNSCORED = "unscored", "responses have no score: the reward failed, or a judge gave no answer"
"""What counts them in a summary -> how it is said."""

SHOWN = {"score": "reward", "gold": "gold"}
"""Columns of responses that a model wins or loses by -> what a summary calls them."""


def write_and_tell(name: str, journal: Journal, rows: list[Row], summary: Summary) -> None:
    """Write OUTPUT, if there is one, and the summary beside it, and print it."""
    if journal.output:
        journal.finish(rows, summary)
    tell("\n".join([*summary_lines(summary), ", ".join(filter(None, [f"{name}: {len(rows)} rows", journal.output]))]))


def source_counts(ranked: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Responses of each source: how many, the share that finished, and their mean length."""
    items = [item for row in ranked for item in row["responses"]]
    counts = {}
    for name in dict.fromkeys(item["source"] for item in items):
        of_one = [item for item in items if item["source"] == name]
        counts[name] = {
            "responses": len(of_one),
            "finished": float(np.mean([item["finished"] for item in of_one])),
            "characters": float(np.mean([len(item["text"]) for item in of_one])),
        }
    return counts


def judge_report(verdicts: Sequence[Verdict]) -> dict[str, float | int | None]:
    """What a judge did and what it likes: counts, and shares that are None where nothing tells.

    slot_a: share of the answers for the response in place A; 1/2 is no liking for a place.
    raw_first, first: win rate of the response that comes first in the rows, by the first order alone and by the
    verdicts. consistency: share of the pairs whose two orders do not contradict each other. longer_wins and
    length_correlation: as `agreement.length_bias`, of the verdicts.
    """
    asked = [v for v in verdicts if v.forward]
    said = [a for v in asked for a in (*v.forward, *v.backward)]
    numbers = [a for a in said if not isinstance(a, str)]
    forward = [a for v in asked for a in v.forward if not isinstance(a, str)]
    decided = [(v.share, v.longer) for v in asked if v.share is not None]
    twice = [v for v in asked if len(v.shares()) == 2]
    correlation, longer = length_bias(
        np.array([longer for _, longer in decided], float), np.array([share - 0.5 for share, _ in decided])
    )
    return {
        "pairs": len(verdicts),
        "equal": len(verdicts) - len(asked),
        "answers": len(said),
        "nonsense": said.count(NONSENSE),
        "no_answer": said.count(NO_ANSWER),
        "no_verdict": len(asked) - len(decided),
        "ties": sum(share == 0.5 for share, _ in decided),
        "contradictions": sum(v.contradicts_itself() for v in twice),
        "consistency": _mean_or_none([not v.contradicts_itself() for v in twice]),
        "slot_a": _mean_or_none(numbers),
        "raw_first": _mean_or_none(forward),
        "first": _mean_or_none([share for share, _ in decided]),
        "longer_wins": longer,
        "length_correlation": correlation,
    }


def gold_agreement(prompts: Sequence[Row], pairs: Sequence[Pair], gold: Sequence[Sequence[float]]) -> Summary:
    """Share of the pairs, but those that are equal in gold, whose chosen response has the higher gold reward."""
    gaps = [(prompt_key(prompts[p.group]), gold[p.group][p.chosen] - gold[p.group][p.rejected]) for p in pairs]
    agreed = share_of([(key, gap > 0) for key, gap in gaps if gap])
    return {**agreed, "ties": sum(not gap for _, gap in gaps)}


def label_agreement(given: Sequence[Ranking], verdicts: Sequence[Sequence[Verdict]]) -> Summary:
    """Share of the pairs on which a judge says what the labels of the rows say, and what could not be compared.

    Counted are `pairs` that have a label and a verdict, neither a tie; of the others `unlabelled` have no label,
    `no_verdict` have one but no verdict, and of `ties` one or both are a tie.
    """
    agrees: list[tuple[str, bool]] = []
    left = {"unlabelled": 0, "no_verdict": 0, "ties": 0}
    for one, judged in zip(given, verdicts, strict=True):
        told = one.consensus()[1] if one.ballots else np.full([len(one.responses)] * 2, np.nan)
        for v in judged:
            label = told[v.first, v.second]
            if np.isnan(label):
                left["unlabelled"] += 1
            elif v.share is None:
                left["no_verdict"] += 1
            elif label == 0.5 or v.share == 0.5:
                left["ties"] += 1
            else:
                agrees.append((prompt_key({"prompt": one.prompt}), (v.share > 0.5) == (label > 0.5)))
    return {**share_of(agrees), **left}


def share_of(agrees: Sequence[tuple[str, bool]]) -> Summary:
    """{agreement, interval (95%), pairs, prompts} of pairs (prompt, whether they agree)."""
    if not agrees:
        return {"agreement": None, "pairs": 0, "prompts": 0}
    prompts = [prompt for prompt, _ in agrees]
    share, interval = share_and_interval(np.array([same for _, same in agrees], float), prompts)
    return {"agreement": share, "interval": list(interval), "pairs": len(agrees), "prompts": len(set(prompts))}


def summary_lines(summary: Summary) -> list[str]:
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
    if of := summary.get("pairs_left_out"):
        said.append(f"  pairs left out: {', '.join(f'{count} {why}' for why, count in of.items())}")
    said += judge_lines(summary["judge"]) if "judge" in summary else []
    if dropped := summary.get("dropped"):
        mark = mark_of(dropped, summary["rows"] + dropped) or "  "
        said.append(f"{mark}{dropped} rows dropped, without two responses to compare")
    for name, what in (
        ("apart", "rows fall apart where the judge gave no verdict; each part is ranked by itself"),
        ("without_pair", "prompts give no row: no two of their responses make a pair"),
        ("without_best", "prompts give no row: nothing says which response is the best"),
        ("best_empty", "prompts have an empty response as their best, which is no demonstration"),
        ("without_score", "prompts give no row: no response to them has a score"),
        UNSCORED,
    ):
        said += [f"! {summary[name]} {what}"] if summary.get(name) else []
    if "curve" in summary:  # of best-of-n: n, its KL to the policy that is sampled from, rewards with their errors
        names = [name for name in ("proxy", "gold") if name in summary["curve"][0]]
        rows = [[at["n"], at["kl"], *(at[x][y] for x in names for y in ("mean", "se"))] for at in summary["curve"]]
        said.append(text_table(["best of", "KL, nats", *(h for name in names for h in (name, "+-"))], rows))
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


def judge_lines(report: Summary) -> list[str]:
    """The report in words; `!` marks what should make one doubt the judge."""
    shown = {name: "unknown" if value is None else f"{value:.3f}" for name, value in report.items()}

    def mark(name: str, fair: float, off: float) -> str:
        return "!" if report[name] is not None and abs(report[name] - fair) > off else " "

    lost = report["nonsense"] + report["no_answer"]
    never = [f"! the judge gave no usable answer to any of {lost} questions, so nothing is labelled by it"]
    return [
        f"  judge: {report['pairs']} pairs ({report['equal']} of equal texts), {report['answers']} answers, "
        f"{report['ties']} ties",
        f"{'!' if lost > 0.1 * report['answers'] else ' '} not usable: {report['nonsense']} nonsense, "
        f"{report['no_answer']} timed out or failed; {report['no_verdict']} pairs without a verdict",
        f"{mark('slot_a', 0.5, 0.1)} place: A wins {shown['slot_a']} of the answers",
        f"{mark('consistency', 1, 0.3)} consistency: {shown['consistency']} of the pairs, "
        f"{report['contradictions']} contradictions",
        f"{mark('length_correlation', 0, 0.2)} length: the longer response wins {shown['longer_wins']}, correlation "
        f"with the verdict {shown['length_correlation']}",
        *(never if lost == report["answers"] > 0 else []),
    ]


def _mean_or_none(values: Sequence[float | bool]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def compare(
    rows: Sequence[Row],
    names: Sequence[str],
    each: Sequence[int],
    baseline: int,
    perplexities: Sequence[float],
    pass_at: Sequence[int] = (),
) -> dict[str, Summary]:
    """What is known of every source, by name.

    Args:
        rows: of the prompts, {prompt, responses, verdicts?}, responses source by source.
        names, each: of the sources, and their responses to a prompt.
        baseline: number of the source that the others are compared with.
        perplexities: of the sources on held-out rows; empty if there are none.
        pass_at: as in `passes_at`, by the gold reward, else the reward.
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
        if pass_at:
            model |= passes_at(of["gold" if "gold" in of else "score"][s], prompts, pass_at)
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
    counts = {name: max(k, each[baseline]) for name, k in zip(names, each, strict=True) if name != names[baseline]}
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
    mean, error = mean_and_error(each[known], list(compress(prompts, known)))
    return {"mean": mean, "se": error}


def wins_over(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float[N]: the share of all pairs of a response of `own` [N, K] and one of `other` [N, J] that the former wins.

    Equal ones are half won.
    """
    return ((np.sign(own[:, :, None] - other[:, None, :]) + 1) / 2).mean(axis=(1, 2))


def passes_at(rewards: np.ndarray, prompts: Sequence[str], pass_at: Sequence[int]) -> dict[str, Summary]:
    """{"pass@k": {rate, interval, prompts}} for every k of at most K, of rewards [N, K] (1 is right; NaN unknown).

    1 - C(K - c, k)/C(K, k) where c of K responses are right (Chen et al. 2021, arXiv 2107.03374, eq. 1), which is the
    best of k by 0 and 1.
    """
    known, right = ~np.isnan(rewards).any(axis=1), (rewards >= 1).astype(float)
    return {
        f"pass@{k}": win_rate(np.where(known, best_of_n(right, right, k), np.nan), prompts)
        for k in pass_at
        if k <= rewards.shape[1]
    }


def win_rate(shares: np.ndarray, prompts: Sequence[str]) -> Summary:
    """{rate, interval, prompts}: the mean of the shares won on each prompt, float[N] (NaN: no verdict), and 95% of it.

    The interval is `intervals.share_and_interval` over prompts, as in `mean_of`.
    """
    known = ~np.isnan(shares)
    if not known.any():
        return {"rate": None, "interval": None, "prompts": 0}
    own = list(compress(prompts, known))
    rate, interval = share_and_interval(shares[known], own)
    return {"rate": rate, "interval": list(interval), "prompts": len(set(own))}


def evaluation_lines(summary: Summary) -> list[str]:
    """A table over models, and what its columns are of."""
    models, baseline = summary["models"], summary["baseline"]
    judges = next((list(of["wins"]) for name, of in models.items() if name != baseline), [])
    headers, means = ["model"], [name for name in ("reward", "gold", "kl") if name in models[baseline]]
    for name in means:
        headers += [{"kl": "KL, nats"}.get(name, name), "+-"]
    single = [name for name in ("kl_per_token", "perplexity", "tokens", "unfinished") if name in models[baseline]]
    headers += [{"kl_per_token": "per token"}.get(name, name) for name in single]
    rates = list(dict.fromkeys(name for of in models.values() for name in of if name.startswith("pass@")))
    for name in [*rates, *(f"wins by {by}" for by in judges)]:
        headers += [name, "95%"]
    rows = []
    for name, of in models.items():
        row: list[str | float | None] = [name]
        for column in means:
            row += [of[column]["mean"], of[column]["se"]]
        row += [of[column] for column in single]
        for won in [*(of.get(name) for name in rates), *(of.get("wins", {}).get(by) for by in judges)]:
            rate, interval = (won["rate"], won["interval"]) if won else (None, None)
            row += [rate, interval and "{:.3f} to {:.3f}".format(*interval)]
        rows.append(row)
    said = [text_table(headers, rows), f"{summary['prompts']} prompts; +- is the standard error over them"]
    if judges:
        said.append(f"wins against {baseline}, ties half; Wilson's intervals over prompts")
    name, what = UNSCORED
    said += [f"! {summary[name]} {what}; reward is over prompts without one"] if name in summary else []
    return said + (judge_lines(summary["judge"]) if "judge" in summary else [])
