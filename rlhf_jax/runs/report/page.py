"""The page of a report: one file with everything in it, made from a template that escapes every text."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf_jax import __version__
from rlhf_jax.errors import printable, shortened
from rlhf_jax.runs.report.charts import MOST_RUNS, pictures
from rlhf_jax.runs.report.diagnoses import diagnose
from rlhf_jax.runs.report.outcome import Story, differences, nats, outcome, time_by_part
from rlhf_jax.runs.report.reading import RunData, Sample

HERE = Path(__file__).parent
MOST_PAIRS, FEWER, LONGEST = 60, 5, 1500
"""Prompts whose samples are shown, of all runs together; of a page that were too large; characters of each text."""
LARGEST = 1_900_000
"""Bytes of a page."""
DIAGNOSIS = ("findings", "checked")


def page(runs: Sequence[RunData], stories: Sequence[Story] = (), *, live: int = 0) -> str:
    """The report as HTML; `live` is after how many milliseconds a page that is served asks anew, 0: never."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, finalize=visible
    )
    script, css = ((HERE / name).read_text() for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    stages = dict.fromkeys(run.stage for run in runs)
    template = environment.get_template(
        "page.html",
        globals={
            "title": runs[0].name if len(runs) == 1 else ", ".join(s.name for s in stories) or f"{len(runs)} runs",
            "runs": runs,
            "stories": stories,
            "outcomes": [outcome(run) for run in runs],
            "diagnosed": [dict(name=run.name, **dict(zip(DIAGNOSIS, diagnose(run), strict=True))) for run in runs],
            "groups": [group_of([run for run in runs if run.stage == stage]) for stage in stages],
            "details": [details_of(run) for run in runs],
            "live": live,
            "version": __version__,
            "css": Markup(css),
            "script": Markup(script),
            "script_hash": f"sha256-{digest}",
        },
    )
    sampled = [run for run in runs if run.samples]
    for most in (MOST_PAIRS, FEWER):
        html = template.render(samples=[before_and_after(run, max(most // len(sampled), 2)) for run in sampled])
        if len(html.encode()) <= LARGEST:
            break
    return html


def group_of(runs: Sequence[RunData]) -> dict[str, Any]:
    """What the template shows of runs of one stage together."""
    return {
        "stage": runs[0].stage,
        "names": [run.name for run in runs],
        "left_out": max(len(runs) - MOST_RUNS, 0),
        "pictures": pictures(runs),
        "differences": differences(runs) if len(runs) > 1 else [],
    }


def details_of(run: RunData) -> dict[str, Any]:
    """Time and settings of a run."""
    settings = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return {"name": run.name, "time": time_by_part(run), "settings": settings}


def before_and_after(run: RunData, most: int) -> dict[str, Any]:
    """What the same prompt was answered at first and at last, side by side; of prompts that came once, that."""
    told: dict[tuple[str, int], list[Sample]] = {}
    seen: dict[tuple[int, str], int] = {}
    for one in run.samples:
        number = seen[one.step, one.prompt] = seen.get((one.step, one.prompt), 0) + 1
        told.setdefault((one.prompt, number), []).append(one)
    pairs = [(each[0], each[-1]) if len(each) > 1 else (each[0],) for each in told.values()]
    pairs.sort(key=lambda pair: (len(pair) == 1, -pair[-1].step))
    shown = [
        {"prompt": shortened(pair[0].prompt, LONGEST), "sides": [side(one) for one in pair]} for pair in pairs[:most]
    ]
    return {"name": run.name, "pairs": shown, "left_out": max(len(pairs) - most, 0)}


def side(one: Sample) -> dict[str, str]:
    """A response as the template shows it."""
    when = f"step {one.step}" if one.step else "before training"
    reward, kl = ("" if v is None else form(v) for v, form in ((one.reward, "{:.3g}".format), (one.kl, nats)))
    return {"when": when, "text": shortened(one.response, LONGEST), "reward": reward, "kl": kl}


def visible(value: object) -> object:
    """What the template writes: of every text what cannot be seen, or turns the direction of writing, as an escape."""
    return value if isinstance(value, Markup) else printable(value, lines=True)
