"""The curves of a report, drawn by matplotlib as SVG whose colours are those of the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from rlhf_jax.runs.curves import smooth
from rlhf_jax.runs.report.reading import RunData, Series

INK, QUIET, LINE = "#010203", "#010204", "#010205"
COLOURS = tuple(f"#01030{i}" for i in range(8))
"""Stand for the page's colours, which `themed` puts in their place."""
VARIABLES = {INK: "--ink", QUIET: "--quiet", LINE: "--line", **{c: f"--c{i}" for i, c in enumerate(COLOURS)}}

MOST_POINTS = 300
"""Points of a curve that are drawn; of more, means of neighbours."""
MOST_RUNS = len(COLOURS)
"""Runs that are told apart in one picture."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf_jax",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}


class Chart(NamedTuple):
    """A picture of metrics against the step: the first of `measured` that is there, and that of the evaluations.

    `online` is whether it says something of a method that learns from its own samples; its loss does not.
    """

    title: str
    measured: tuple[str, ...]
    held_out: str = ""
    error: str = ""
    online: bool = True


CHARTS = (
    Chart("Reward", ("rollout/reward",), "eval/reward", "eval/reward_se"),
    Chart("Reward less the price of the KL", ("rollout/objective",), "eval/objective"),
    Chart("Gold reward, which training never sees", ("rollout/gold",), "eval/gold"),
    Chart("KL to the reference, nats per response", ("rollout/kl",), "eval/kl"),
    Chart("Length of responses, tokens", ("rollout/response_length",)),
    Chart("Share of responses cut off", ("rollout/truncated_fraction",)),
    Chart("Entropy, nats per token", ("policy/entropy",)),
    Chart("Share of clipped tokens", ("policy/clip_fraction",)),
    Chart("Explained variance of the critic", ("value/explained_variance",)),
    Chart("Share of groups with equal rewards", ("group/equal_fraction",)),
    Chart("Disagreement of reward models", ("rollout/reward_disagreement",), "eval/reward_disagreement"),
    Chart("Loss", ("loss/nll", "loss/preference", "loss/pairwise", "loss/total"), "eval/total", online=False),
    Chart("Accuracy on pairs", ("reward_model/accuracy", "rewards/accuracy"), "eval/accuracy", online=False),
    Chart("Margin of chosen over rejected", ("reward_model/margin", "rewards/margin"), "eval/margin"),
    Chart("Implicit reward of chosen responses", ("rewards/chosen",), "eval/chosen"),
    Chart("Norm of the gradient", ("optim/grad_norm",)),
    Chart("Price of a nat", ("ppo/kl_coef",)),
    Chart("Learning rate", ("optim/lr",)),
    Chart("Tokens per second", ("time/tokens_per_s",)),
)
"""What matters, as far as a run has it."""


class Picture(NamedTuple):
    """A drawn chart: its title, what it shows in words, and the SVG."""

    title: str
    words: str
    svg: str


def pictures(runs: Sequence[RunData]) -> list[Picture]:
    """The charts of runs of one stage, all in each; those whose metrics no run has, or never moved, are left out."""
    online = any(run.series("rollout/reward") for run in runs)
    drawn = [picture(chart, runs) for chart in CHARTS if chart.online or not online]
    drawn.append(trade(runs, "Reward against KL", "rollout/kl", "rollout/reward", "KL, nats", "reward"))
    drawn.append(trade(runs, "Gold against trained reward", "rollout/reward", "rollout/gold", "trained", "gold"))
    return [one for one in drawn if one is not None]


def picture(chart: Chart, runs: Sequence[RunData]) -> Picture | None:
    """Measured values pale, smoothed ones dark in the band of what is measured nearby; evaluations as points."""
    told = [(run, run.series(*chart.measured), run.series(chart.held_out)) for run in runs[:MOST_RUNS]]
    told = [(run, measured, held_out) for run, measured, held_out in told if measured or held_out]
    values = np.concatenate([series.values for each in told for series in each[1:] if series] or [np.zeros(0)])
    if len(np.unique(values)) < 2:
        return None
    figure, axes = canvas("step")
    words = []
    for colour, (run, measured, held_out) in zip(COLOURS, told, strict=False):
        label = called(run) if len(runs) > 1 else None
        if measured is not None:
            curve(axes, measured.thinned(MOST_POINTS), colour, label)
            words.append(f"{run.name}: {measured.first:.3g} to {measured.last:.3g}")
        if held_out is not None:
            dots = COLOURS[1] if len(runs) == 1 and measured is not None else colour
            points(axes, held_out, run.series(chart.error), dots, label if measured is None else None)
            words.append(f"held out {held_out.values[0]:.3g} to {held_out.values[-1]:.3g}")
    if len(runs) > 1 and len(told) > 1:
        legend(axes)
    return Picture(chart.title, "; ".join(words), svg_of(figure))


def curve(axes: Axes, series: Series, colour: str, label: str | None) -> None:
    """One metric: a pale line of values, a band of their spread, a dark line of their trend."""
    steps, values = series
    if len(values) < 10:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)
        return
    trend, half = smooth(values), max(len(values) // 24, 2)
    rest = np.abs(values - trend)
    spread = np.array([rest[max(0, i - half) : i + half + 1].mean() for i in range(len(rest))])
    axes.fill_between(steps, trend - spread, trend + spread, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.45)
    axes.plot(steps, trend, color=colour, linewidth=1.8, label=label)


def points(axes: Axes, series: Series, errors: Series | None, colour: str, label: str | None) -> None:
    """Evaluations, with 95% of where the mean may lie if its standard error is known."""
    bars = None
    if errors is not None:
        known = dict(zip(errors.steps, errors.values, strict=True))
        bars = [1.96 * known.get(step, 0.0) for step in series.steps]
    axes.errorbar(
        series.steps, series.values, yerr=bars, color=colour, linewidth=1, linestyle="--", marker="o", markersize=4,
        capsize=2, label=label,
    )  # fmt: skip


def trade(runs: Sequence[RunData], title: str, across: str, up: str, x_label: str, y_label: str) -> Picture | None:
    """One metric against another, a dot per iteration, darker the later it is."""
    told = []
    for run in runs[:MOST_RUNS]:
        x, y = run.series(across), run.series(up)
        if x is not None and y is not None:
            both, i, j = np.intersect1d(x.steps, y.steps, return_indices=True)
            x, y = (Series(both, one).thinned(MOST_POINTS) for one in (x.values[i], y.values[j]))
            told.append((run, x.values, y.values))
    told = [each for each in told if len(each[1]) > 2]
    if not told:
        return None
    figure, axes = canvas(x_label, y_label)
    for colour, (run, xs, ys) in zip(COLOURS, told, strict=False):
        shades: Any = np.linspace(0.15, 0.9, len(xs))  # an array, which the types of matplotlib do not know
        axes.scatter(xs, ys, s=16, color=colour, alpha=shades, linewidths=0, label=called(run))
    if len(told) > 1:
        legend(axes)
    words = [f"{run.name}: from ({x[0]:.3g}, {y[0]:.3g}) to ({x[-1]:.3g}, {y[-1]:.3g})" for run, x, y in told]
    return Picture(title, "later iterations are darker; " + "; ".join(words), svg_of(figure))


def called(run: RunData) -> str:
    """A run's name in a legend, where matplotlib leaves out what begins with an underscore."""
    return f" {run.name}" if run.name.startswith("_") else run.name


def legend(axes: Axes) -> None:
    """Say which colour is whose; a name is no mathematics."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        axes.legend(loc="best", frameon=False, fontsize=8)


def canvas(x_label: str, y_label: str = "") -> tuple[Figure, Axes]:
    """An empty picture: two scales and a faint grid."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7))
        left = 0.18 if y_label else 0.13  # room for the numbers, and for what they are
        axes = figure.add_axes((left, 0.17, 0.98 - left, 0.8))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    return figure, axes


def svg_of(figure: Figure) -> str:
    """The picture as an SVG element, which takes its colours and its size from the page."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|\n *(?=\n)", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # they would be there once in every picture
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r'"[^"]*"', lambda quoted: re.sub(r"(\d\.\d\d)\d+", r"\1", quoted[0]), text)  # hundredths of a point
