"""How good a reward is on responses that people compared: accuracy, calibration, likings, best of n, RewardBench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlhf_jax.data.agreement import length_bias
from rlhf_jax.data.consensus import best_of_n
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.report import mean_of
from rlhf_jax.inference.intervals import share_and_interval
from rlhf_jax.losses.reward import pairs_right
from rlhf_jax.runs.curves import text_table
from rlhf_jax.runs.directory import Summary

BINS = np.linspace(0.5, 1, 11)
"""Edges of the confidences in a reliability table."""


@dataclass(frozen=True)
class Scored:
    """K responses to a prompt, what people say of them, and what the reward says.

    Attributes:
        prompt: a text that is equal where prompts are; subset: the row's, or "".
        labels: float[K, K], the share that prefers i to j, NaN where nobody says.
        scores: float[K], of the reward; golds: float[K], or None.
        lengths: int[K], characters.
        ordered: the places in the row say nothing of who is better, as they do in a preference row.
        bench: 1 or 2 for a row of RewardBench or of RewardBench 2, whose `id` is then the row's.
    """

    prompt: str
    subset: str
    labels: Float[np.ndarray, "K K"]
    scores: Float[np.ndarray, " K"]
    golds: Float[np.ndarray, " K"] | None
    lengths: np.ndarray
    ordered: bool
    bench: int = 0
    id: str = ""

    @property
    def best(self) -> np.ndarray:
        """bool[K]: nobody prefers another response."""
        return ~(np.nan_to_num(self.labels, nan=0.5) < 0.5).any(axis=1)


@dataclass(frozen=True)
class Pairs:
    """All labelled pairs (i, j), i < j, of the responses of rows; every array is [N].

    Attributes:
        row: number of the row.
        margin: score of i less that of j; label: share that prefers i; longer: characters of i less those of j.
    """

    row: np.ndarray
    margin: np.ndarray
    label: np.ndarray
    longer: np.ndarray


def pairs_of(scored: Sequence[Scored]) -> Pairs:
    found = [
        (k, i, j) for k, one in enumerate(scored) for i, j in zip(*np.triu_indices(len(one.scores), 1), strict=True)
    ]
    found = [(k, i, j) for k, i, j in found if not np.isnan(scored[k].labels[i, j])]
    columns = [
        (
            k,
            scored[k].scores[i] - scored[k].scores[j],
            scored[k].labels[i, j],
            scored[k].lengths[i] - scored[k].lengths[j],
        )
        for k, i, j in found
    ]
    row, margin, label, longer = np.array(columns, np.float64).reshape(-1, 4).T
    return Pairs(row.astype(np.int64), margin, label, longer)


def reward_report(scored: Sequence[Scored]) -> Summary:
    """All of it, as the summary of `rlhf-jax evaluate` has it."""
    pairs = pairs_of(scored)
    if not (pairs.label != 0.5).any():
        raise UserError("no two responses to a prompt are compared; give preference rows, or rankings with ranks")
    subsets = list(dict.fromkeys(one.subset for one in scored))
    summary: Summary = {"rows": len(scored), "prompts": len({one.prompt for one in scored})}
    summary["accuracy"] = accuracy(scored, pairs)
    if subsets != [""]:
        by_subset = {name or "none": np.array([one.subset == name for one in scored]) for name in subsets}
        summary["subsets"] = {name: accuracy(scored, pairs, inside) for name, inside in by_subset.items()}
    summary["calibration"] = calibration(pairs)
    summary["likings"] = likings(scored, pairs)
    if curve := best_of(scored):
        summary["best_of_n"] = curve
    if benches := reward_bench(scored):
        summary["reward_bench"] = benches
    return summary


def accuracy(scored: Sequence[Scored], pairs: Pairs, inside: np.ndarray | None = None) -> Summary:
    """{accuracy, interval, pairs, ties, rows, prompts}: how often the better response has the higher score.

    The mean over rows of the share of their pairs, equal scores counting half, as `eval/accuracy` of a reward model;
    pairs with a tied label are `ties` and do not count. The interval (95%) is clustered by prompt. `inside`: bool of
    the rows that count.
    """
    known = np.ones(len(scored), bool) if inside is None else inside
    right, decided = map(np.asarray, pairs_right(jnp.asarray(pairs.margin), jnp.asarray(pairs.label)))
    taken = known[pairs.row]
    count = np.bincount(pairs.row[taken & decided], minlength=len(scored))
    won = np.bincount(pairs.row[taken & decided], right[taken & decided], minlength=len(scored))
    rows = np.flatnonzero(count).tolist()
    told = {"pairs": int(count.sum()), "ties": int((taken & ~decided).sum()), "rows": len(rows)}
    prompts = [scored[row].prompt for row in rows]
    if not rows:
        return {"accuracy": None, "interval": None, **told, "prompts": 0}
    share, interval = share_and_interval(won[rows] / count[rows], prompts)
    return {"accuracy": share, "interval": list(interval), **told, "prompts": len(set(prompts))}


def calibration(pairs: Pairs) -> Summary:
    """How far sigmoid(margin) is the chance that the response with the higher score is the better one.

    {loss, ece, bins, temperature, loss_fitted, ece_fitted}: loss is the mean of -y log p - (1 - y) log(1 - p), y the
    label; ece sums |accuracy - confidence| over the bins of the confidence max(p, 1 - p), weighted by their pairs
    (Guo et al. 2017, arXiv 1706.04599, eq. 3); both again at the temperature T, p = sigmoid(margin / T), that makes
    the loss least. A head that was normalised when it was saved has other units than it was trained in, and T takes
    them out.
    """
    temperature = fitted_temperature(pairs)
    loss, ece, bins = _reliability(pairs, 1.0)
    fitted = _reliability(pairs, temperature)
    return {
        "loss": loss,
        "ece": ece,
        "bins": bins,
        "temperature": temperature,
        "loss_fitted": fitted[0],
        "ece_fitted": fitted[1],
    }


def _reliability(pairs: Pairs, temperature: float) -> tuple[float, float, list[Summary]]:
    """(loss, ece, one {confidence, accuracy, pairs} for every bin that holds pairs)."""
    margin = pairs.margin / temperature
    loss = np.logaddexp(0, -margin) * pairs.label + np.logaddexp(0, margin) * (1 - pairs.label)
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = np.where(margin > 0, pairs.label, np.where(margin < 0, 1 - pairs.label, 0.5))
    place = np.clip(np.digitize(confidence, BINS) - 1, 0, len(BINS) - 2)
    bins = [
        {"confidence": float(confidence[at].mean()), "accuracy": float(right[at].mean()), "pairs": int(at.sum())}
        for b in range(len(BINS) - 1)
        if (at := place == b).any()
    ]
    ece = sum(of["pairs"] * abs(of["accuracy"] - of["confidence"]) for of in bins) / len(margin)
    return float(loss.mean()), float(ece), bins


def fitted_temperature(pairs: Pairs) -> float:
    """The T in [1/1000, 1000] of the least loss, by bisection on the slope, which is monotone in 1/T."""
    low, high = -3.0, 3.0  # log10 of 1/T
    for _ in range(60):
        middle = (low + high) / 2
        chance = 1 / (1 + np.exp(-np.clip(pairs.margin * 10**middle, -500, 500)))
        low, high = (low, middle) if ((chance - pairs.label) * pairs.margin).mean() > 0 else (middle, high)
    return float(10 ** -((low + high) / 2))


def likings(scored: Sequence[Scored], pairs: Pairs) -> Summary:
    """What the reward likes beside what people like: {longer_wins, length_correlation, first} of reward and labels.

    As `agreement.length_bias`. first: of rankings, the share of pairs of which the response that stands first in the
    row scores higher, ties left out; None where the order of rows says who is better.
    """
    ordered = np.array([one.ordered for one in scored], bool)[pairs.row]
    told = {}
    for name, preferred in (("reward", pairs.margin), ("labels", pairs.label - 0.5)):
        correlation, longer = length_bias(pairs.longer, preferred)
        first = preferred[ordered & (preferred != 0)] > 0
        told[name] = {
            "longer_wins": longer,
            "length_correlation": correlation,
            "first": float(first.mean()) if len(first) else None,
        }
    return told


def best_of(scored: Sequence[Scored]) -> list[Summary]:
    """{n, gold, oracle} for n = 1, 2, 4 .. K: the mean gold reward of the best of n by the reward, and by gold itself.

    Of the rows whose responses all have a gold reward; K is the fewest responses of any. See `consensus.best_of_n`.
    """
    known = [(one.scores, one.golds) for one in scored if one.golds is not None and len(one.scores) > 1]
    if not known:
        return []
    fewest = min(len(golds) for _, golds in known)
    prompts = [one.prompt for one in scored if one.golds is not None and len(one.scores) > 1]
    curve = []
    for n in sorted({*(2**i for i in range(fewest.bit_length())), fewest}):
        at: Summary = {"n": n}
        for name, by in (("gold", 0), ("oracle", 1)):
            values = [best_of_n(both[by][None], both[1][None], n) for both in known]
            at[name] = mean_of(np.array(values), prompts)
        curve.append(at)
    return curve


# --- RewardBench

SECTIONS = {
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
                  "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 250,
               "xstest-should-respond": 154, "donotanswer": 136},
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
                  "hep-rust": 164},
    "Prior Sets": {"anthropic_helpful": 1, "anthropic_hhh": 1, "shp": 1, "summarize": 1},
}  # fmt: skip
"""RewardBench (Lambert et al. 2024, arXiv 2403.13787): section -> its subsets and their weights, which are their rows
but for math-prm, that counts as much as all code, and the prior sets."""

PRIOR_SETS = 0.5
"""Weight of that section in the score, where others have 1."""

SECTIONS_2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
"""RewardBench 2 (Malik et al. 2025, arXiv 2506.01937): sections, each a subset; the score is their mean."""


CORE = [subset for name, section in SECTIONS.items() if name != "Prior Sets" for subset in section]
"""Subsets of the rows that RewardBench publishes."""

TIES_WEIGHTS = (0.3, 0.3, 0.2, 0.2, 0.01)
"""In RewardBench 2's score of ties, of the five terms of `ties_score`."""


def reward_bench(scored: Sequence[Scored]) -> dict[str, Summary]:
    """{"RewardBench": .., "RewardBench 2": ..}: {score, sections, missing} of the ones whose subsets are there.

    In the first a pair is won by a higher score. In the second a row is won where the chosen response has the best
    score, in parts where others have it, too; `ties_score` is of the subset Ties. A section is the mean over its
    subsets that are there, by weight; `missing` are those that are not.
    """
    won: dict[int, dict[str, list[float]]] = {1: {}, 2: {}}
    for one in scored:
        if one.bench:
            top = one.scores == one.scores.max()
            share = float((top & one.best).sum() / top.sum())
            won[one.bench].setdefault(one.subset, []).append(share if one.bench == 2 else float(share == 1))
    means, means_2 = ({subset: float(np.mean(x)) for subset, x in of.items()} for of in won.values())
    benches = {}
    if set(means) & set(CORE):
        sections = {}
        for name, weights in SECTIONS.items():
            there = {subset: weight for subset, weight in weights.items() if subset in means}
            if there:
                sections[name] = sum(means[s] * w for s, w in there.items()) / sum(there.values())
        counts = {name: PRIOR_SETS if name == "Prior Sets" else 1.0 for name in sections}
        score = sum(sections[name] * count for name, count in counts.items()) / sum(counts.values())
        missing = [subset for subset in CORE if subset not in means]
        benches["RewardBench"] = {"score": score, "sections": sections, "missing": missing}
    if means_2:
        sections = {name: means_2[name] for name in SECTIONS_2 if name in means_2}
        if "Ties" in sections:
            sections["Ties"] = ties_score([one for one in scored if one.bench == 2 and one.subset == "Ties"])
        missing = [name for name in SECTIONS_2 if name not in means_2]
        benches["RewardBench 2"] = {
            "score": float(np.mean(list(sections.values()))),
            "sections": sections,
            "missing": missing,
        }
    return benches


def ties_score(scored: Sequence[Scored]) -> float:
    """RewardBench 2's score of the subset Ties: rows with the `id` "tied:N" (several good answers) or "ref:N" (one).

    With the gap g between the worst good and the best bad answer and the spread s of the good ones: shares of tied and
    of ref rows with g > 0; of the N with both, shares in which g of the tied row, and the lesser g of the two, is more
    than s; and the mean of tanh(lesser g / s - 1), which only breaks ties between models.

    Raises:
        UserError: an id of another form, or a row without good or without bad answers.
    """
    gaps: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spreads: dict[str, float] = {}
    for one in scored:
        kind, colon, number = one.id.partition(":")
        if kind not in gaps or not colon or one.best.all() or not one.best.any():
            raise UserError(
                f"a row of RewardBench 2's Ties has the id {one.id!r}; give chosen, rejected and ref:N or tied:N"
            )
        good, bad = one.scores[one.best], one.scores[~one.best]
        gaps[kind][number] = float(good.min() - bad.max())
        if kind == "tied":
            spreads[number] = float(good.max() - good.min())
    both = [number for number in gaps["tied"] if number in gaps["ref"]]
    tied, spread = (np.array([of[number] for number in both]) for of in (gaps["tied"], spreads))
    lesser = np.minimum(tied, np.array([gaps["ref"][number] for number in both]))
    with np.errstate(divide="ignore", invalid="ignore"):
        margins = np.nan_to_num(np.tanh(lesser / spread - 1), nan=0.0)
    right = [np.array(list(gaps[kind].values())) > 0 for kind in ("tied", "ref")]
    terms = (*right, tied > spread, lesser > spread, margins)
    return float(sum(w * np.mean(term) for w, term in zip(TIES_WEIGHTS, terms, strict=True) if len(term)))


# --- in words


def reward_lines(summary: Summary) -> list[str]:
    """Tables of what `reward_report` found."""
    rows = [(name, of) for name, of in [*summary.get("subsets", {}).items(), ("all", summary["accuracy"])]]
    cells = [
        [
            name,
            of["rows"],
            of["prompts"],
            of["accuracy"],
            of["interval"] and "{:.3f} to {:.3f}".format(*of["interval"]),
        ]
        for name, of in rows
    ]
    said = [text_table(["subset", "rows", "prompts", "accuracy", "95%"], cells)]
    if ties := summary["accuracy"]["ties"]:
        said.append(f"{ties} pairs with a tied label are left out")
    if unlabelled := summary["rows"] - summary["accuracy"]["rows"]:
        said.append(f"{unlabelled} of {summary['rows']} rows have no two responses that labels order, and no accuracy")
    for name, of in summary.get("reward_bench", {}).items():
        few = ", ".join(of["missing"][:3]) + (
            f" and {len(of['missing']) - 3} others" if len(of["missing"]) > 3 else ""
        )
        lacks = f"; no rows of {few}" if few else ""
        sections = ", ".join(f"{section} {value:.3f}" for section, value in of["sections"].items())
        said.append(f"{name}: {of['score']:.3f} ({sections}){lacks}")
    known = summary["calibration"]
    cells = [[of["confidence"], of["accuracy"], of["pairs"]] for of in known["bins"]]
    said.append(text_table(["confidence", "accuracy", "pairs"], cells))
    said.append(
        f"calibration error {known['ece']:.3f}, loss {known['loss']:.3f}; at temperature {known['temperature']:.3g}: "
        f"{known['ece_fitted']:.3f}, {known['loss_fitted']:.3f}"
    )
    shown = {
        who: {name: "unknown" if value is None else f"{value:.3f}" for name, value in of.items()}
        for who, of in summary["likings"].items()
    }
    reward, labels = shown["reward"], shown["labels"]
    said.append(
        f"length: the longer response wins {reward['longer_wins']} by the reward, {labels['longer_wins']} by the "
        f"labels; correlation {reward['length_correlation']}, {labels['length_correlation']}"
    )
    if summary["likings"]["reward"]["first"] is not None:
        said.append(
            f"place: the first in the row wins {reward['first']} by the reward, {labels['first']} by the labels"
        )
    if curve := summary.get("best_of_n"):
        cells = [[at["n"], *(at[x][y] for x in ("gold", "oracle") for y in ("mean", "se"))] for at in curve]
        said.append(text_table(["best of", "gold", "+-", "by gold itself", "+-"], cells))
    return said
