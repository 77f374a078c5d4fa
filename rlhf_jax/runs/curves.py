"""What a study shows at its end: a table in plain text and learning curves as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.files import replace_file

GOLD_COLOUR = "#c27c0e"
PROXY_COLOUR = "#2c6fad"
COLOUR_MAP = "viridis"

History = Sequence[Mapping[str, float]]
"""Lines of metrics.jsonl."""


def text_table(headers: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table in plain text: a line of headers, a rule, a line per row; numbers stand right, all else left.

    Floats are written with four significant digits, None as nothing.

    Raises:
        UserError: a row has more or fewer cells than there are headers.
    """
    for index, row in enumerate(rows):
        if len(row) != len(headers):
            raise UserError(f"row {index} has {len(row)} cells for {len(headers)} headers; give one cell per header")
    lines = [[str(header) for header in headers]]
    for row in rows:
        cells = ("" if v is None else f"{v:.4g}" if isinstance(v, float | np.floating) else str(v) for v in row)
        lines.append(list(cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, width in enumerate(widths):
        values = [row[i] for row in rows if row[i] is not None]
        right = values and all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in values)
        for line in lines:
            line[i] = line[i].rjust(width) if right else line[i].ljust(width)
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def learning_curves(path_png: str | Path, history: History, title: str) -> None:
    """Draws gold and proxy (reward-model) reward over a PPO run as a PNG of two panels.

    Left, both rewards against the iteration, each with its own scale as their units differ: pale as measured, dark
    smoothed. Right, gold against proxy reward, one dot per iteration coloured by KL, so that over-optimisation shows
    as a bend downwards. Without gold, the left panel has the proxy alone and the right one draws it against KL.
    `history`: those with "rollout/reward" are drawn, which have "step", "rollout/kl" (nats), maybe "rollout/gold".

    Raises:
        UserError: no line of `history` has a rollout's reward.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = [line for line in history if "rollout/reward" in line]
    if not lines:
        raise UserError(f'none of {len(history)} history items has "rollout/reward"; pass the metrics of a PPO run')
    gold = [line for line in lines if "rollout/gold" in line]
    figure = Figure(figsize=(10.5, 4.2), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.06))
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2)
    _draw_rewards(left, lines, gold)
    _draw_trade(figure, right, gold or lines, "rollout/gold" if gold else None)
    Path(path_png).parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    replace_file(path_png, drawn.getvalue())


def _draw_rewards(axes: Axes, lines: History, gold: History) -> None:
    """The left panel: proxy reward, and gold on a second scale if there is any, against the iteration."""
    from matplotlib.ticker import MaxNLocator

    _tidy(axes, "PPO iteration", "reward-model reward")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves = [_draw_curve(axes, lines, "rollout/reward", PROXY_COLOUR, "reward model (proxy)")]
    if gold:
        axes.yaxis.label.set_color(PROXY_COLOUR)
        axes.tick_params(axis="y", colors=PROXY_COLOUR)
        other = axes.twinx()
        _tidy(other, "", "gold reward")
        other.grid(False)
        other.spines["right"].set(visible=True, color="0.6")
        other.spines["left"].set_visible(False)
        other.yaxis.label.set_color(GOLD_COLOUR)
        other.tick_params(axis="y", colors=GOLD_COLOUR)
        curves.append(_draw_curve(other, gold, "rollout/gold", GOLD_COLOUR, "gold"))
    axes.legend(handles=curves, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)


def _draw_curve(axes: Axes, lines: History, key: str, colour: str, label: str) -> Line2D:
    """One quantity against the step, pale as measured and dark as smoothed; returns the dark line."""
    steps, values = (np.array([line[name] for line in lines], dtype=float) for name in ("step", key))
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    return axes.plot(steps, smooth(values), color=colour, linewidth=2.0, label=label)[0]


def smooth(values: np.ndarray) -> np.ndarray:
    """Straight-line fits over windows of about a twelfth of the run, float[n]; unlike means unbiased at the ends."""
    num, half = len(values), len(values) // 24
    smoothed = np.empty(num)
    for index in range(num):
        window = np.arange(max(0, index - half), min(num, index + half + 1))
        offsets = window - window.mean()
        slope = offsets @ values[window] / max(offsets @ offsets, 1)
        smoothed[index] = values[window].mean() + slope * (index - window.mean())
    return smoothed


def _draw_trade(figure: Figure, axes: Axes, lines: History, gold_key: str | None) -> None:
    """The right panel: gold against proxy coloured by KL, or proxy against KL coloured by iteration."""
    proxy, kl = ("rollout/reward", "reward-model reward"), ("rollout/kl", "KL from the reference (nats)")
    x, y, shade = (proxy, (gold_key, "gold reward"), kl) if gold_key else (kl, proxy, ("step", "PPO iteration"))
    _tidy(axes, x[1], y[1])
    across, up, colour = (np.array([line[key] for line in lines], dtype=float) for key, _ in (x, y, shade))
    dots = axes.scatter(across, up, c=colour, cmap=COLOUR_MAP, s=26, alpha=0.85, linewidths=0.3, edgecolors="white")
    bar = figure.colorbar(dots, ax=axes, label=shade[1], pad=0.02)
    bar.outline.set_visible(False)


def _tidy(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, a faint grid, and no frame but the two scales."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")
