"""The report of a run: five ways to spoil one are named, a healthy one is not accused, and no text of others acts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from disk import fails

from rlhf_jax import cli
from rlhf_jax.commands.report import app_of
from rlhf_jax.config import WatchArgs
from rlhf_jax.errors import UserError
from rlhf_jax.runs.report import charts, html_of, outcome, reading, write_beside
from rlhf_jax.runs.report.diagnoses import diagnose
from rlhf_jax.runs.report.page import LARGEST
from rlhf_jax.runs.report.reading import Series, read_run, read_runs
from rlhf_jax.runs.run import Run

NUM = 60
TIME = np.linspace(0, 1, NUM)
RNG = np.random.default_rng(0)
MODEL = {"model": "runs/rm/model", "functions": []}
FUNCTION = {"model": "", "functions": ["m:f"]}


def noisy(values: np.ndarray, noise: float) -> np.ndarray:
    return values + noise * RNG.standard_normal(len(values))


def rising(start: float, end: float) -> np.ndarray:
    """As a reward rises: fast, then slowly."""
    return start + (end - start) * (1 - np.exp(-4 * TIME))


HEALTHY = {
    "rollout/reward": noisy(rising(-0.3, 1.3), 0.05),
    "rollout/objective": noisy(rising(-0.3, 1.1), 0.05),
    "rollout/reward_std": rising(1.0, 0.4),
    "rollout/gold": noisy(rising(0.3, 0.95), 0.02),
    "rollout/kl": np.maximum(noisy(rising(0, 4), 0.2), 0),
    "rollout/response_length": noisy(rising(40, 42), 1),
    "rollout/truncated_fraction": np.full(NUM, 0.02),
    "policy/approx_kl": np.full(NUM, 0.01),
    "policy/clip_fraction": noisy(np.full(NUM, 0.06), 0.01),
    "policy/entropy": rising(0.8, 0.04),
    "policy/first_ratio_max": np.full(NUM, 1.000001),
    "value/explained_variance": noisy(rising(-0.8, 0.8), 0.05),
    "optim/skipped": np.zeros(NUM),
    "optim/grad_norm": np.full(NUM, 0.5),
}
"""A run of PPO that learns: entropy falls to a twentieth, since it knows more."""

RATE = {
    "policy/approx_kl": np.r_[10.2, 0.0, np.zeros(NUM - 2)],
    "policy/clip_fraction": np.r_[0.75, np.zeros(NUM - 1)],
    "rollout/kl": np.r_[0, np.full(NUM - 1, 75.0)],
    "rollout/objective": np.r_[-0.3, np.full(NUM - 1, -7.1)],
    "rollout/gold": np.r_[0.3, np.zeros(NUM - 1)],
    "policy/entropy": np.r_[0.26, np.zeros(NUM - 1)],
}
PRICELESS = {"rollout/gold": noisy(0.3 + 2.2 * TIME - 1.9 * TIME**2, 0.01), "rollout/kl": noisy(40 * TIME, 1)}
LONGER = {"rollout/response_length": noisy(rising(40, 120), 1), "rollout/gold": noisy(np.full(NUM, 0.3), 0.02)}
BY_LENGTH = [{"step": s, "prompt": f"p{i}", "response": "x" * (20 + 9 * i), "reward": i + s / 9} for s in range(9)
             for i in range(4)]  # fmt: skip
EQUAL = {
    "group/equal_fraction": np.ones(NUM), "rollout/reward": np.ones(NUM), "rollout/objective": np.ones(NUM),
    "rollout/gold": np.full(NUM, 0.3), "policy/entropy": np.full(NUM, 0.8),
}  # fmt: skip
CUT = {"rollout/truncated_fraction": noisy(np.full(NUM, 0.5), 0.02)}


@pytest.fixture
def run_of(tmp_path):
    """A run directory with metrics by name, each float[n], as a run writes it."""

    def make(metrics, *, stage="ppo", settings=None, reward=FUNCTION, samples=(), name="run", summary=None, **record):
        path = tmp_path / name
        path.mkdir(parents=True)
        config = {stage: {"kl_coef": 0.05, **(settings or {})}, "reward": reward, "optim": {"learning_rate": 0.001},
                  "sampling": {"max_new_tokens": 64}, "run": {"output_dir": name}}  # fmt: skip
        num = max(map(len, metrics.values()), default=0)
        about = {"stage": stage, "status": "finished", "step": num, "total": num, "config": config, **record}
        (path / "run.json").write_text(json.dumps(about))
        lines = [
            {"step": i + 1, "time/elapsed_s": 1.0 + i, **{n: float(v[i]) for n, v in metrics.items() if i < len(v)}}
            for i in range(num)
        ]
        for file, rows in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
            (path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (path / "summary.json").write_text(json.dumps(summary or {}))
        return path

    return make


FLAT = {"rollout/objective": noisy(np.zeros(NUM), 0.05)}
NO_GOLD = {"rollout/gold": np.zeros(0), "rollout/response_length": LONGER["rollout/response_length"]}
FAR = {"rollout/kl": noisy(60 * TIME, 1), "rollout/objective": noisy(-2 * TIME, 0.05)}
NOT_FINITE = {"loss/total": rising(3, 1), "optim/skipped": np.r_[np.zeros(40), np.ones(20)]}
SPOILT = {
    "rate": (RATE, {}, "The learning rate is far too high"),
    "price": (PRICELESS, {"settings": {"kl_coef": 0.0}, "reward": MODEL}, "The KL has no price"),
    "length": (LONGER, {}, "hacked by length"),
    "length without gold": (NO_GOLD, {"samples": BY_LENGTH}, "hacked by length"),
    "equal": (EQUAL, {"stage": "grpo"}, "All groups are equal"),
    "cut": (CUT, {}, "Half of the responses are cut off"),
    "over-optimised": ({"rollout/gold": PRICELESS["rollout/gold"]}, {}, "Over-optimisation"),
    "kl": (FAR, {}, "KL rushes"),
    "entropy": (FLAT, {}, "Entropy has collapsed"),
    "clipped": ({"policy/clip_fraction": np.full(NUM, 0.4), **FLAT}, {}, "Too many tokens are clipped"),
    "apart": ({"rollout/reward_disagreement": rising(0.1, 0.4)}, {}, "disagree about what is rewarded"),
    "sft rate": ({"loss/total": noisy(rising(3, 9), 0.1)}, {"stage": "sft"}, "The learning rate is far too high"),
    "not finite": (NOT_FINITE, {"stage": "sft"}, "not finite"),
    "coin": ({"loss/total": rising(0.7, 0.6), "eval/accuracy": np.array([0.5, 0.49])}, {"stage": "reward"}, "coin"),
}
ALONE = ("sft", "reward")


@pytest.mark.parametrize("kind", SPOILT)
def test_what_spoilt_a_run_is_named_with_figures_and_a_cure(kind, run_of):
    metrics, options, title = SPOILT[kind]
    path = run_of(metrics if options.get("stage") in ALONE else {**HEALTHY, **metrics}, **options)
    found = {finding.title: finding for finding in diagnose(read_run(path))[0] if finding.level == "wrong"}
    named = next(finding for title_, finding in found.items() if title in title_)
    assert re.search(r"\d", named.evidence) and named.cure


LEARNS = {"loss/total": noisy(rising(3, 1), 0.05), "eval/total": rising(3, 1.1)}
GOOD = {
    "ppo": (HEALTHY, {"reward": MODEL}),
    "a verifier without a price": (HEALTHY, {"stage": "grpo", "settings": {"kl_coef": 0.0}}),
    "reasoning that grows and pays": (
        {**HEALTHY, "rollout/response_length": noisy(rising(40, 55), 1)}, {"stage": "grpo"}),
    "groups that are solved": (
        {**HEALTHY, "group/equal_fraction": noisy(rising(0.1, 0.85), 0.02)}, {"stage": "grpo"}),
    "a noisy reward": ({**HEALTHY, "rollout/gold": noisy(rising(0.3, 0.95), 0.15)}, {"reward": MODEL}),
    "a first iteration full of cut rows": ({**HEALTHY, "rollout/truncated_fraction": rising(0.6, 0.02)}, {}),
    "sft": (LEARNS, {"stage": "sft"}),
    "reward": ({**LEARNS, "eval/accuracy": np.array([0.6, 0.7])}, {"stage": "reward"}),
    "three steps": ({name: values[:3] for name, values in HEALTHY.items()}, {"reward": MODEL}),
    "nothing yet": ({}, {"status": "running"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_a_healthy_run_is_not_accused(kind, run_of):
    metrics, options = GOOD[kind]
    findings, checked = diagnose(read_run(run_of(metrics, **options)))
    assert findings == [] and {one.level for one in checked} <= {"good"}


def test_a_method_that_many_run_without_a_price_is_looked_at(run_of):
    path = run_of(HEALTHY, stage="grpo", settings={"kl_coef": 0.0}, reward=MODEL)
    [finding] = diagnose(read_run(path))[0]
    assert finding.level == "look" and "The KL has no price" in finding.title


def test_a_rise_is_told_from_noise_and_jumps_do_not_count_as_noise():
    steps = np.arange(100.0)
    flat = [RNG.standard_normal(100) for _ in range(50)]
    assert sum(Series(steps, one).rose() for one in flat) <= 5
    assert all(Series(steps, one + steps / 10).rose() and not Series(steps, one + steps / 10).fell() for one in flat)
    assert Series(steps, np.r_[-0.3, np.full(99, -7.0)]).fell()
    thin = Series(steps, steps).thinned(30)
    assert len(thin.values) <= 30 and thin.values.mean() == pytest.approx(49.5) and thin.values[0] == 1.5


class Tags(HTMLParser):
    """Counts tags, and gathers attributes that would load or run something."""

    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.acts: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        acting = {"src", "href", "action", "formaction", "data", "srcdoc"}
        self.acts += [(n, v) for n, v in attrs if n.startswith("on") or n in acting]


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }} </style> $x^2$ \u202e\x07'

ODD = "_$\\frac$"
"""No legend of matplotlib shows it, and as mathematics it is an error."""


def test_no_text_of_others_acts_on_the_page_and_nothing_is_loaded(run_of):
    rows = [{"step": s, "prompt": EVIL, "response": EVIL, "response_ids": [1], "reward": s} for s in (0, 5)]
    named = 'a<b> & "c" $d$'
    metrics = {"rollout/reward": TIME, "eval/reward": TIME[:2], EVIL: TIME}
    evil = {"samples": rows, "note": EVIL, "status": "failed", "settings": {"x": EVIL}, "summary": {"remarks": [EVIL]}}
    paths = [run_of(metrics, name=name, stage=stage, **evil)
             for name, stage in ((named, "ppo"), (ODD, "ppo"), ("z", EVIL))]  # fmt: skip
    (paths[0].parent / "recipe.json").write_text(json.dumps({EVIL: {"command": EVIL, "figures": {EVIL: 1}}}))
    html = html_of([paths[0].parent])
    page = Tags()
    page.feed(html)
    assert page.tags.count("script") == 1 and page.tags.count("img") == 0 and page.tags.count("style") >= 1
    assert page.acts == [] and "{{ 7*7 }}" in html
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert f"script-src &#39;sha256-{digest}&#39;" in policy or f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and not re.search(r"url\(\s*['\"]?(?!#)|@import", html)
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", html)
    assert all(sum(one.strip() == name for one in shown) == 1 for name in ('a&lt;b&gt; &amp; "c" $d$', ODD)), shown
    assert "\u202e" not in html and "\x07" not in html


def test_a_large_run_is_a_page_below_two_megabytes_and_says_what_is_left_out(run_of):
    long = {name: np.interp(np.linspace(0, 1, 3000), TIME, values) for name, values in HEALTHY.items()}
    rows = [{"step": s, "prompt": f"{i} " + "word " * 2000, "response": "y" * 9000} for s in (0, 9) for i in range(99)]
    html = html_of([run_of(long, samples=rows)])
    assert len(html.encode()) < LARGEST and "39 prompts more are in samples.jsonl" in html
    assert html.count('class="side"') == 120 and "before training" in html and "step 9" in html


def test_runs_are_compared_and_a_recipe_is_one_story(run_of, tmp_path):
    for round_ in (1, 2):
        run_of({"rollout/reward": TIME}, name=f"chain/round{round_}/ppo", settings={"kl_coef": round_ / 10})
        run_of(LEARNS, name=f"chain/round{round_}/sft", stage="sft")
    stage = {"command": "ppo", "status": "finished", "wall_s": 61, "figures": {"after.eval/gold": 0.75}}
    (tmp_path / "chain" / "recipe.json").write_text(json.dumps({"round1/ppo": stage, "round2/ppo": stage}))
    (tmp_path / "chain" / "summary.json").write_text(json.dumps({"rounds": [{"round": 1, "gold": 0.5}, {"round": 2,
                                                                             "gold": 0.75}]}))  # fmt: skip
    html = html_of([tmp_path / "chain"])
    assert "round 1: 0.5; round 2: 0.75" in html and "gold 0.75" in html
    assert re.search(r"<td>ppo.kl_coef</td><td>0.1</td><td>0.2</td>", html)
    assert html.count("<figcaption>Reward</figcaption>") == 1 and html.count("<h2>Curves of ") == 2
    again = [os.path.relpath(tmp_path / "chain"), tmp_path / "chain" / "round2" / ".." / "round1" / "ppo"]
    runs = read_runs([tmp_path / "chain", tmp_path / "chain" / "round1" / "ppo", *again])
    assert [run.name for run in runs].count("round1/ppo") == 1 and len(runs) == 4
    assert len(outcome.stories_of([tmp_path / "chain", *again])) == 1


def test_a_broken_line_or_file_is_left_out_and_no_run_fails_for_its_page(run_of, monkeypatch):
    path = run_of(HEALTHY)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"step": "x"}\n{"step": 3, "rollout/rew')
    (path / "summary.json").write_text("{")
    assert len(read_run(path).history) == NUM and write_beside(path) == "" and (path / "report.html").exists()
    monkeypatch.setattr("rlhf_jax.runs.report.html_of", lambda *_: 1 / 0)
    assert "report.html could not be written (ZeroDivisionError" in write_beside(path)
    with pytest.raises(UserError, match="holds no run"):
        read_runs([path.parent / "none"])


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_leaves_its_page_unless_told_otherwise(tmp_path, monkeypatch, wanted):
    monkeypatch.setattr("rlhf_jax.runs.run.write_beside", write_beside)
    options = ["--run.output_dir", str(tmp_path / "r"), "--run.report", str(wanted).lower(), "--run.progress", "false"]
    with Run("sft", cli.parse("sft", options), total=3) as out:
        for step in (1, 2, 3):
            out.metrics.write(step, {"loss/total": 3.0 / step})
        out.finish({})
    assert (tmp_path / "r" / "report.html").exists() == wanted
    assert not wanted or "the loss fell from 3 to 1; 3 steps in" in (tmp_path / "r" / "report.html").read_text()


def test_a_page_replaces_only_a_page_and_outlives_the_failure_to_write_it(run_of, tmp_path, monkeypatch, capsys):
    run, mine = str(run_of({"rollout/reward": TIME})), tmp_path / "mine.html"
    report = lambda output: cli.dispatch(["report", run, "--output", str(output)])  # noqa: E731
    mine.write_text("<!doctype html>\nmine")
    with pytest.raises(UserError, match=r"mine.html is there and no report; choose another --output$"):
        report(mine)
    with pytest.raises(UserError, match=r" is a directory; name an .html file in it$"):
        report(tmp_path)
    mine.write_text("")
    (Path(run) / "broken").mkdir()
    (Path(run) / "broken" / "run.json").write_text("{")
    for _ in range(2):
        report(mine)
    old = mine.read_text()
    assert f"! 1 are left out, since their run.json cannot be read: {run}/broken\n" in capsys.readouterr().err
    for name, of in (("open", ".mine.html.new"), ("replace", ".mine.html.new"), ("mkdir", "deep")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="what was to be written is in") as error:
            fails(patch, name, {0}, of=of)
            report(tmp_path / "deep" / "r.html" if name == "mkdir" else mine)
        kept = Path(str(error.value).split()[-1])
        assert kept.suffix == ".html" and kept.read_text() == old == mine.read_text()
        kept.unlink()
    assert not (tmp_path / "deep").exists()


def test_the_commands_write_a_page_of_several_runs_and_serve_one_that_follows(run_of, tmp_path, capsys, monkeypatch):
    paths = [run_of({"rollout/reward": TIME}, name=name) for name in ("a", "b")]
    output = tmp_path / "new" / "r.html"
    cli.dispatch(["report", *map(str, paths), "--output", str(output)])
    assert "MB), to be opened in a browser" in capsys.readouterr().out and "<strong>b</strong>" in output.read_text()
    for wrong in (["report"], ["report", str(tmp_path / "no")], ["watch"], ["watch", str(tmp_path / "no")]):
        with pytest.raises(UserError):
            cli.dispatch(wrong)
    app = app_of(WatchArgs(run=str(paths[0])))
    served = lambda path="/": b"".join(app({"PATH_INFO": path}, lambda status, headers: None)).decode()  # noqa: E731
    first = served()
    assert 'data-live="5000"' in first and served() == first and "one page" in served("/other")
    with open(paths[0] / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": NUM + 1, "rollout/reward": 99.0}) + "\n")
    assert served() != first
    record = json.loads((paths[0] / "run.json").read_text())
    (paths[0] / "run.json").write_text(json.dumps({**record, "status": "running"}))
    monkeypatch.setattr(reading, "is_held", lambda path: True)
    running = served()
    monkeypatch.setattr(reading, "is_held", lambda path: False)  # killed, which writes nothing
    assert "crashed" in served() and "crashed" not in running


def test_the_table_of_times_adds_up_what_the_lines_say_of_parts(run_of):
    metrics = {"time/rollout_s": np.array([1.0, 0.5]), "time/update_s": np.array([3.0, 3.0])}
    metrics["time/tokens_per_s"] = np.array([900.0, 900.0])
    path = run_of(metrics, summary={"wall_s": 10.0})
    assert outcome.time_by_part(read_run(path)) == [
        ("update", "6 s", "60%"),
        ("rollout", "1.5 s", "15%"),
        ("the end: last evaluation, weights, summary", "2.5 s", "25%"),
    ]
    assert outcome.time_by_part(read_run(run_of(FLAT, name="earlier"))) == []


def test_a_kl_that_rounds_to_nothing_has_no_sign(run_of):
    ends = {"eval/reward": 1.0, "eval/kl": -2e-8}
    rows = [{"step": 0, "prompt": "p", "response": "r", "reward": -1e-6, "kl": -1.4e-6}]
    run = run_of(FLAT, summary={"before": ends, "after": ends}, samples=rows)
    assert "at a KL of 0 nats" in outcome.outcome(read_run(run))
    assert "KL 0" in (html := html_of([run])) and "-1.4e-06" not in html and "-1e-06" in html


def test_one_evaluation_is_no_change(run_of):
    one = {"loss/total": rising(3, 1), "eval/total": np.array([2.5])}
    assert "sft: the held-out loss is 2.5; 60 steps" in outcome.outcome(read_run(run_of(one, stage="sft")))


def test_a_group_that_one_run_alone_has_is_one_row_of_what_differs(run_of):
    archs = ({"width": 8, "rope": {"theta": 1.0}}, None, {"width": 16, "rope": {"theta": 1.0}})
    runs = [read_run(run_of(FLAT, name=f"r{i}", settings={"arch": arch})) for i, arch in enumerate(archs)]
    assert outcome.differences(runs) == [("ppo.arch", "given", "None", "given")]
    assert outcome.differences(runs[::2]) == [("ppo.arch.width", "8", "16")]


def test_what_a_scale_is_called_stands_in_the_picture(run_of):
    low = np.linspace(-0.25, 1.5, NUM)
    both = {"rollout/reward": low, "rollout/gold": low, "rollout/kl": np.linspace(0, 2, NUM)}
    for label, pad in (("", 0.13), ("reward", 0.18)):
        _, axes = charts.canvas("step", label)
        assert axes.get_position().x0 == pad and axes.get_ylabel() == label
    assert ">reward</text>" in html_of([run_of(both)])
