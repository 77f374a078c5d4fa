"""`rlhf-jax evaluate`: models beside one another, and how often each beats a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.config import EvaluateArgs, SourceConfig
from rlhf_jax.data.examples import prompt_key, sft_examples
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.rows import Row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback import judge as judging
from rlhf_jax.feedback import report
from rlhf_jax.feedback.judge import Judge, Verdict
from rlhf_jax.feedback.judges import make_judge
from rlhf_jax.feedback.phases import Make, Phase, Phases, digest, name_of, open_journal
from rlhf_jax.feedback.report import mean_of, win_rate, wins_over
from rlhf_jax.feedback.sources import (
    Drawer,
    Measure,
    Sources,
    check_rewards,
    prompts_of,
    shots_of,
    verdicts,
    verdicts_of,
)
from rlhf_jax.inference.generate import Response, total_length
from rlhf_jax.inference.likelihood import Likelihood, example_of
from rlhf_jax.models.loading import Loaded, check_same_tokenizer, load_model
from rlhf_jax.runs.directory import SUMMARY, earlier_summary, names_given, write_config
from rlhf_jax.runs.journal import Journal

RESPONSES = "responses.jsonl"


class Evaluation:
    """What `rlhf-jax evaluate` works on: the responses of every source, then scores of them and verdicts."""

    def __init__(
        self,
        config: EvaluateArgs,
        prompts: Sequence[Row],
        text: Sequence[Row],
        journal: Journal,
        functions: Sequence[Callable[..., Any]] | None,
        judge: Judge | None,
    ):
        """Plan all phases.

        Raises:
            UserError: two sources have one name, or none has the baseline's.
        """
        self.config, self.prompts, self.text, self.phases = config, prompts, text, Phases(journal)
        self.sources = Sources(config, prompts, self.phases, config.sources)
        names = self.sources.names
        if config.baseline and config.baseline not in names:
            raise UserError(f"baseline {config.baseline!r} is none of the sources: {', '.join(names)}; name one")
        self.baseline = names.index(config.baseline) if config.baseline else 0
        self._texts: list[int] = []
        for number, source in enumerate(self.sources.sources):
            self.sources.draw(number, self._measure)
            if text:
                self._texts.append(self.phases.add(Phase(1, 1, partial(self._reader, source))))
        scored = functions or config.reward.model or config.reward.functions
        self._scores = self.sources.score(functions) if scored else None
        self._verdicts = self.phases.add(self._judging(judge)) if judge or config.judge.named() else None

    @cached_property
    def _reference(self) -> Loaded:
        settings = replace(self.config.model, path=self.config.reference, arch=None)
        length = total_length(self.config.sampling, self.config.max_prompt_length)
        return load_model(settings, self.sources.mesh, jax.random.key(0), length=length)

    def _likelihood(self, loaded: Loaded, pad_id: int) -> Likelihood:
        return Likelihood(loaded.model, self.sources.mesh, pad_id=pad_id, batch_size=self.config.batch_size)

    def _measure(self, drawer: Drawer) -> Measure:
        """Adds tokens, and where there is a reference the log-probs that the model itself and the reference give."""
        models: dict[str, Loaded] = {}
        if self.config.reference:
            check_same_tokenizer(drawer.tokenizer, self.config.reference, "reference")
            models = {"logprob": drawer.loaded, "ref_logprob": self._reference}
        readers = {name: self._likelihood(loaded, drawer.tokenizer.pad_id) for name, loaded in models.items()}

        def measure(drawn: Sequence[Response]) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = [{"tokens": len(one.ids)} for one in drawn]
            examples = [example_of(one.prompt_ids, one.ids) for one in drawn]
            for name, reader in readers.items():
                each = reader.targets(models[name].params, examples, drawer.temperature)
                for row, logprobs in zip(found, each, strict=True):
                    row[name] = float(logprobs.sum(dtype=np.float64))
            return found

        return measure

    def _reader(self, source: SourceConfig) -> Make:
        """Makes the row {nll, tokens} of all held-out rows."""
        drawer, config = self.sources.drawer(source), self.config
        limits = Limits(config.max_prompt_length, config.max_length)
        examples, report = sft_examples(list(self.text), drawer.tokenizer, limits, loss_on="response")
        tell(f"{name_of(source)}: held-out rows: {report}")
        model = replace(drawer.loaded.model, length=config.max_length)  # as `sft` on rows of this length has it
        loaded = replace(drawer.loaded, model=model)
        reader = self._likelihood(loaded, drawer.tokenizer.pad_id)

        def make(start: int, stop: int) -> list[dict[str, Any]]:
            with jax.set_mesh(self.sources.mesh.grid):
                logprobs = np.concatenate(reader.targets(drawer.loaded.params, examples))
            return [{"nll": float(-logprobs.sum(dtype=np.float64)), "tokens": len(logprobs)}]

        return make

    def _judging(self, judge: Judge | None) -> Phase:
        """Rows {verdicts} on the responses of each other source beside those of the baseline."""
        make_one = (lambda: judge) if judge else partial(make_judge, self.config.judge, self.sources.mesh)
        key = jax.random.fold_in(jax.random.key(self.config.seed), len(self.sources.sources))
        return Phase(len(self.prompts), self.sources.rows_at_once, partial(verdicts, make_one, self._groups, key))

    def _groups(self, i: int) -> list[tuple[Any, list[str]]]:
        """(prompt, [a response of another source, one of the baseline]), source by source."""
        prompt, items = self.prompts[i]["prompt"], self.sources.responses(i)
        texts = {name: [item["text"] for item in items if item["source"] == name] for name in self.sources.names}
        base = texts.pop(self.sources.names[self.baseline])
        return [(prompt, [a, b]) for own in texts.values() for a, b in zip(own, base, strict=False)]

    def _by_source(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of all responses [..., sum of K] as one array [..., K] for each source."""
        return np.split(values, np.cumsum(self.sources.each)[:-1], axis=-1)

    def responses(self, i: int) -> list[Row]:
        """All responses to prompt i as {text, finished, tokens, ..., source, score?}."""
        items = self.sources.responses(i)
        if self._scores is None:
            return items
        scores = self.phases.row(self._scores, i)["scores"]
        return [{**item, "score": score} for item, score in zip(items, scores, strict=True)]

    def rows(self, gold: Sequence[Sequence[float]] | None) -> list[Row]:
        """A row per prompt: its responses with all that was measured, and the verdicts on them."""
        found = []
        for i, prompt in enumerate(self.prompts):
            items = self.responses(i)
            if gold is not None:
                items = [{**item, "gold": value} for item, value in zip(items, gold[i], strict=True)]
            kept = {name: prompt[name] for name in ("id",) if name in prompt}
            judged = {} if self._verdicts is None else self.phases.row(self._verdicts, i)
            found.append({**kept, "prompt": prompt["prompt"], "responses": items, **judged})
        return found

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """What is known of every source, by name."""
        names, shown = self.sources.names, {"score": "reward", "gold": "gold"}
        columns = {
            name: np.array([[item.get(name) for item in row["responses"]] for row in rows], float)
            for name in ("finished", "tokens", "logprob", "ref_logprob", "score", "gold")
            if name in rows[0]["responses"][0]
        }
        of = {name: self._by_source(values) for name, values in columns.items()}
        judged, prompts = self._judged(rows), [prompt_key(row) for row in rows]
        models: dict[str, Any] = {}
        for s, name in enumerate(names):
            found: dict[str, Any] = {"responses": of["tokens"][s].size, "tokens": float(of["tokens"][s].mean())}
            found["unfinished"] = float(1 - of["finished"][s].mean())
            found |= {shown[c]: mean_of(of[c][s], prompts) for c in shown if c in of}
            if self._texts:
                read = self.phases.row(self._texts[s], 0)
                found["perplexity"] = float(np.exp(read["nll"] / read["tokens"]))
            if "ref_logprob" in of:
                ratio = of["logprob"][s] - of["ref_logprob"][s]
                found["kl"] = mean_of(ratio, prompts)
                found["kl_per_token"] = float(ratio.sum() / of["tokens"][s].sum())
            if s != self.baseline:
                wins = {shown[c]: wins_over(of[c][s], of[c][self.baseline]) for c in shown if c in of}
                wins |= {"judge": judged[name]} if judged else {}
                found["wins"] = {by: win_rate(each, prompts) for by, each in wins.items()}
            models[name] = found
        found = {"prompts": len(rows), "baseline": names[self.baseline], "models": models}
        if self._verdicts is not None:
            found["judge"] = judging.report([verdict for row in rows for verdict in verdicts_of(row)])
        return found

    def _judged(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Source -> float[N], the share of the verdicts on each prompt that it wins; NaN without one."""
        if self._verdicts is None:
            return {}
        each, names = self.sources.each, self.sources.names
        counts = [min(k, each[self.baseline]) for s, k in enumerate(each) if s != self.baseline]
        others = [name for s, name in enumerate(names) if s != self.baseline]
        found = {name: np.full(len(rows), np.nan) for name in others}
        for i, row in enumerate(rows):
            left = iter(verdicts_of(row))
            for name, count in zip(others, counts, strict=True):
                found[name][i] = _share_won([next(left) for _ in range(count)])
        return found


def _share_won(found: Sequence[Verdict]) -> float:
    """Of verdicts, won (1), tied (1/2) or lost (0) by the first; NaN if there are none."""
    outcomes = [(np.sign(v.share - 0.5) + 1) / 2 for v in found if v.share is not None]
    return float(np.mean(outcomes)) if outcomes else float("nan")


def run_evaluate(
    config: EvaluateArgs,
    *,
    rows: Any = None,
    text_rows: Any = None,
    functions: Sequence[Callable[..., Any]] | None = None,
    judge: Judge | None = None,
    gold: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Sample, measure, compare, and write config.output_dir; prints a table and returns the summary.

    `rows` (prompts), `text_rows` (held-out rows), `functions`, `judge` and `gold` replace those that the config names.
    """
    if judge is None and config.judge.named():
        config.judge.check_one()
    prompts, text_source = prompts_of(config, rows), config.text_path if text_rows is None else text_rows
    text = rows_from(text_source) if text_source else []
    check_rewards(config, prompts, functions, gold)
    made_of = {
        "prompts": digest(prompts),
        "text": digest(text),
        "demonstrations": [digest(shots_of(each)) for each in config.sources],
        "given in Python": list(names_given(functions=functions, judge=judge, gold=gold)),
    }
    found = earlier_summary("evaluate", config, [RESPONSES, SUMMARY], made_of)
    if found is None:
        found = _evaluate(config, prompts, text, made_of, functions, judge, gold)
    tell("\n".join(report.evaluation_lines(found)))
    return found


def _evaluate(
    config: EvaluateArgs,
    prompts: Sequence[Row],
    text: Sequence[Row],
    made_of: dict[str, Any],
    functions: Sequence[Callable[..., Any]] | None,
    judge: Judge | None,
    gold: Callable[..., Any] | None,
) -> dict[str, Any]:
    path = Path(config.output_dir)
    path.mkdir(parents=True, exist_ok=True)
    with open_journal(config, path / RESPONSES, made_of) as journal:
        work = Evaluation(config, prompts, text, journal, functions, judge)
        write_config(path, "evaluate", config, "output_dir")
        work.phases.fill("evaluate", progress=config.progress)
        out = work.rows(work.sources.gold(gold) if gold is not None or config.reward.gold else None)
        summary = {**work.summary(out), "made_of": made_of}
        journal.finish(out, summary, path / SUMMARY)
    return summary
