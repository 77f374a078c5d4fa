"""`rlhf-jax collect` and `rlhf-jax judge`: responses to prompts, and which of them are better. Floor 4."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from rlhf_jax import judge as judging
from rlhf_jax.asking import make_judge
from rlhf_jax.config import CollectRun, JudgeRun, SourceConfig, resolve, to_dict
from rlhf_jax.data import labels
from rlhf_jax.data.ballots import Ranking, ranking_row
from rlhf_jax.data.schemas import DroppedRow, Row, prompt_row, sft_row, text_of
from rlhf_jax.data.sources import rows_from
from rlhf_jax.directory import flat, names_given, write_text
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.generate import Generator
from rlhf_jax.inference import check_output
from rlhf_jax.interrupts import Interrupts
from rlhf_jax.journal import Journal
from rlhf_jax.judge import Judge, Verdict
from rlhf_jax.rewards import RewardFailure, call_reward
from rlhf_jax.sampling import SamplingLaw
from rlhf_jax.scoring import Scorer, columns, plain
from rlhf_jax.sharding import make_mesh
from rlhf_jax.stage import check_vocabulary, load_model, load_tokenizer
from rlhf_jax.summaries import describe, gold_agreement, label_agreement, lines
from rlhf_jax.types import Params

UNMADE = {"output", "overwrite", "progress", "data_path", "path", "fields", "prompts", "schema", "length_filter"}
UNMADE |= {"reward.gold", *(f"{group}.{name}" for group in ("reward", "judge") for name in ("timeout", "retries"))}
UNMADE |= {"judge.workers", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.rollout_tensor"}
"""Options that do not decide what OUTPUT.part holds; rows count by their digest."""

Make = Callable[[int, int], list[dict[str, Any]]]
"""(start, stop) -> the journal's rows for prompts start .. stop - 1."""


@dataclass(frozen=True)
class Phase:
    """A pass over all prompts, `size` of them at once; `begin` loads what it needs when its turn comes."""

    size: int
    begin: Callable[[], Make]


def fill(journal: Journal, phases: Sequence[Phase], count: int, *, name: str, progress: bool) -> None:
    """Make the rows that the journal lacks: those of phase k on prompt i are row k * count + i.

    Work begins at the start of a batch, so the shapes and the noise of every batch are the same after any end.

    Raises:
        Stopped: a signal came; the batch that was being made is on disk.
    """
    interrupts = Interrupts(tqdm.write)
    total = count * len(phases)
    bar = tqdm(total=total, initial=len(journal.rows), desc=name, disable=not progress, dynamic_ncols=True)
    try:
        for k, phase in enumerate(phases):
            done = len(journal.rows) - k * count
            if done >= count:
                continue
            first = done // phase.size * phase.size
            journal.cut(k * count + first)
            make = phase.begin()
            for start in range(first, count, phase.size):
                journal.add(make(start, min(start + phase.size, count)))
                bar.update(len(journal.rows) - bar.n)
                if interrupts.received and len(journal.rows) < total:
                    raise Stopped(
                        f"{name}: stopped by {interrupts.received} after {len(journal.rows)} of {total} rows, which "
                        f"{journal.path} holds; the same command goes on"
                    )
    finally:
        bar.close()
        interrupts.close()


class Collection:
    """What `rlhf-jax collect` works on."""

    def __init__(self, config: CollectRun, prompts: Sequence[Row], journal: Journal):
        """The rows of `journal` are first the responses of each source, then the labels."""
        self.config, self.prompts, self.journal = config, prompts, journal
        self.sources = config.sources or [SourceConfig()]
        self.mesh = make_mesh(config.mesh)
        self._last: tuple[Any, Generator, Params] | None = None
        self.each = [source.num_samples or config.num_samples for source in self.sources]

    def responses(self, i: int) -> list[Row]:
        """All responses to prompt i, as {text, finished, source}."""
        count = len(self.prompts)
        return [
            {**item, "source": name_of(source)}
            for s, source in enumerate(self.sources)
            for item in self.journal.rows[s * count + i]["responses"]
        ]

    def label(self, i: int) -> dict[str, Any]:
        """The scores or verdicts on them; empty without."""
        at = len(self.sources) * len(self.prompts) + i
        return self.journal.rows[at] if at < len(self.journal.rows) else {}

    def sampling(self, number: int) -> Phase:
        """Rows {responses: [{text, finished}]} of one source."""
        size = max(self.config.batch_size // self.each[number], 1)
        return Phase(size, partial(self._sampler, number, size))

    def _sampler(self, number: int, size: int) -> Make:
        config, source, each = self.config, self.sources[number], self.each[number]
        rows = [with_shots(row, shots_of(source)) for row in self.prompts]
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        generator, params = self._generator(source)

        def make(start: int, stop: int) -> list[dict[str, Any]]:
            repeated = [row for row in rows[start:stop] for _ in range(each)]
            noise = jax.random.fold_in(key, start)  # of the batch's first prompt
            with jax.set_mesh(self.mesh):
                _, texts, done = generator.texts(params, repeated, noise, batch_size=size * each)
            if len(texts) != len(repeated):
                raise UserError(f"{rows[start]['_where']} or one soon after it has no tokens; remove it")
            items = [{"text": text, "finished": finished} for text, finished in zip(texts, done, strict=True)]
            return [{"responses": items[i : i + each]} for i in range(0, len(items), each)]

        return make

    def _generator(self, source: SourceConfig) -> tuple[Generator, Params]:
        """The sampler of a source; one that differs in temperature alone shares model and program with the last."""
        config = self.config
        settings = replace(config.model, path=source.path or config.model.path)
        law: dict[str, Any] = {"temperature": source.temperature, "top_p": source.top_p}
        sampling = replace(config.sampling, **{name: value for name, value in law.items() if value is not None})
        program = (settings.path, sampling.top_p < 1)
        if self._last is None or self._last[0] != program:
            self._last = None  # frees the model before the next one is loaded
            tokenizer, longest = load_tokenizer(settings), config.max_prompt_length
            with jax.set_mesh(self.mesh):
                loaded = load_model(settings, self.mesh, jax.random.key(config.seed))
                check_vocabulary(loaded.model.arch, tokenizer, settings.path)
                generator = Generator(loaded.model, tokenizer, sampling, self.mesh, max_prompt_length=longest)
            self._last = (program, generator, loaded.params)
        _, generator, params = self._last
        generator.law = SamplingLaw.from_config(sampling)
        return generator, params

    def scoring(self, functions: Sequence[Callable[..., Any]] | None) -> Phase:
        """Rows {scores} by config.reward; null where a function failed and reward.on_failure is skip."""
        return Phase(max(self.config.batch_size // sum(self.each), 1), partial(self._scorer, functions))

    def _scorer(self, functions: Sequence[Callable[..., Any]] | None) -> Make:
        config, longest = self.config, self.config.max_prompt_length
        limits = {"max_prompt_length": longest, "max_length": longest + config.sampling.max_new_tokens}
        scorer = Scorer(config.reward, self.mesh, **limits, batch_size=config.batch_size, functions=functions)

        def make(start: int, stop: int) -> list[dict[str, Any]]:
            groups = [self.responses(i) for i in range(start, stop)]
            try:
                found: list[float | None] = scorer(scored_rows(self.prompts[start:stop], groups)).tolist()
            except RewardFailure:
                if config.reward.on_failure == "stop":
                    raise
                found = [None] * sum(map(len, groups))
            left = iter(found)
            return [{"scores": [next(left) for _ in items]} for items in groups]

        return make

    def judging(self, judge: Judge | None) -> Phase:
        """Rows {verdicts} on all pairs of the responses to a prompt."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), len(self.sources))
        make_one = (lambda: judge) if judge else partial(make_judge, self.config.judge, self.mesh)
        groups = lambda i: (plain(self.prompts[i]["prompt"]), [item["text"] for item in self.responses(i)])  # noqa: E731
        return Phase(max(self.config.batch_size // sum(self.each), 1), partial(_verdicts, make_one, groups, key))

    def ranked(self, i: int) -> Row:
        """A ranking row of prompt i, labelled if there are labels."""
        items, label = self.responses(i), self.label(i)
        if self.config.label == "sources":
            names = [name_of(source) for source in self.sources]
            items = [{**item, "rank": names.index(item["source"])} for item in items]
        if "scores" in label:
            items = [{**item, "score": score} for item, score in zip(items, label["scores"], strict=True)]
        if "verdicts" in label:
            places = judging.ranks(len(items), verdicts_of(label))
            items = [{**item, "rank": place} for item, place in zip(items, places, strict=True)]
        kept = {name: self.prompts[i][name] for name in ("id",) if name in self.prompts[i]}
        rater = {"rater": self.config.label} if self.config.label != "none" else {}
        return {**kept, "prompt": self.prompts[i]["prompt"], "responses": items, **rater}


def _verdicts(make_one: Callable[[], Judge], group_of: Callable[[int], tuple[str, list[str]]], key: jax.Array) -> Make:
    judge = make_one()

    def make(start: int, stop: int) -> list[dict[str, Any]]:
        found = judge.verdicts([group_of(i) for i in range(start, stop)], jax.random.fold_in(key, start))
        return [{"verdicts": [asdict(verdict) for verdict in verdicts]} for verdicts in found]

    return make


def run_collect(
    config: CollectRun,
    *,
    rows: Any = None,
    functions: Sequence[Callable[..., Any]] | None = None,
    judge: Judge | None = None,
    gold: Callable[..., Any] | None = None,
) -> list[Row]:
    """Sample, label, and write config.output; prints a summary, writes it beside the output, and returns the rows.

    `rows` (dicts with a prompt), `functions`, `judge` and `gold` replace those that the config names.
    """
    prompts = prompts_of(config, rows)
    given = names_given(functions=functions, judge=judge)
    if config.label == "reward" and not (functions or config.reward.model or config.reward.functions):
        raise UserError("label is reward, but nothing scores; give reward.model or reward.functions")
    if config.label == "judge" and judge is None:
        config.judge.check_one()
    decided_by = {"prompts": digest(prompts), "demonstrations": [digest(shots_of(each)) for each in config.sources]}
    with open_journal(config, {**decided_by, "given in Python": given}) as journal:
        work = Collection(config, prompts, journal)
        phases = [work.sampling(number) for number in range(len(work.sources))]
        phases += [work.scoring(functions)] if config.label == "reward" else []
        phases += [work.judging(judge)] if config.label == "judge" else []
        fill(journal, phases, len(prompts), name="collect", progress=config.progress)
        ranked = [work.ranked(i) for i in range(len(prompts))]
        verdicts = [verdicts_of(work.label(i)) for i in range(len(prompts))]
        shares = [
            judged_shares(v) if config.label == "judge" else labels.shares_of(r)
            for v, r in zip(verdicts, ranked, strict=True)
        ]
        pairs = labels.pairs_of(ranked, shares)
        kept = labels.FILTERS[config.length_filter](ranked, pairs)
        if config.schema == "ranking":
            out = ranked
        elif config.schema == "preference":
            out = [labels.preference_of(ranked, pair) for pair in kept]
        else:
            out = [best for row in ranked if (best := labels.demonstration_of(row)) is not None]
        summary = describe(config, ranked, pairs, kept)
        if config.label == "judge":
            summary["judge"] = judging.report([verdict for each in verdicts for verdict in each])
        if gold is not None or config.reward.gold:
            summary["gold"] = gold_agreement(kept, gold_of(config, prompts, ranked, gold))
        return end("collect", config, journal, out, summary)


def run_judge(config: JudgeRun, *, rows: Any = None, judge: Judge | None = None) -> list[Row]:
    """Have the responses of rows compared and write config.output; prints a report, and returns the rankings.

    `rows` and `judge` replace those that the config names. Labels that are there are compared with the verdicts.
    """
    if judge is None:
        config.judge.check_one()
    given: list[Ranking] = []
    dropped = 0
    for row in rows_from(config.path if rows is None else rows, config.fields):
        try:
            given.append(ranking_row(row, unlabelled=True))
        except DroppedRow:
            dropped += 1
    given = given[: config.limit or None]
    if not given:
        raise UserError(f"none of {dropped} rows has two responses to compare; give ranking or preference rows")
    groups = [(plain(one.prompt), [text_of(response) for response in one.responses]) for one in given]
    decided_by = {"rows": digest(groups), "given in Python": names_given(judge=judge)}
    with open_journal(config, decided_by) as journal:
        make_one = (lambda: judge) if judge else partial(make_judge, config.judge, make_mesh(config.mesh))
        key = jax.random.key(config.seed)
        phase = Phase(config.batch_size, partial(_verdicts, make_one, groups.__getitem__, key))
        fill(journal, [phase], len(groups), name="judge", progress=config.progress)
        verdicts = [verdicts_of(row) for row in journal.rows]
        out = [ranking_of(one, found) for one, found in zip(given, verdicts, strict=True)]
        summary: dict[str, Any] = {"rows": len(out), "dropped": dropped}
        summary["judge"] = judging.report([verdict for each in verdicts for verdict in each])
        summary |= {"labels": label_agreement(given, verdicts)} if any(one.ballots for one in given) else {}
        return end("judge", config, journal, out, summary)


def open_journal(config: CollectRun | JudgeRun, decided_by: dict[str, Any]) -> Journal:
    """OUTPUT.part, made of the config and of `decided_by`.

    Raises:
        UserError: no output is named, or it cannot be written.
    """
    if not config.output:
        raise UserError("output is empty; name the .jsonl file to write, as --output rows.jsonl")
    check_output(config.output, config.overwrite)
    options = {name: value for name, value in flat(to_dict(config)) if name not in UNMADE}
    return Journal(Path(config.output), {**options, **decided_by}, overwrite=config.overwrite)


def end(
    name: str, config: CollectRun | JudgeRun, journal: Journal, out: list[Row], summary: dict[str, Any]
) -> list[Row]:
    """Write OUTPUT and the summary beside it, and print it."""
    path = Path(config.output)
    write_text(path.with_suffix(".summary.json"), json.dumps(summary, indent=1) + "\n")
    journal.finish(out)
    print("\n".join([*lines(summary), f"{name}: {len(out)} rows, {path}"]))
    return out


def prompts_of(config: CollectRun, rows: Any) -> list[Row]:
    """The prompt rows of a config, or those given."""
    found: list[Row] = [{"prompt": text, "_where": f"prompt {i}"} for i, text in enumerate(config.prompts)]
    source = config.data_path if rows is None else rows
    found += rows_from(source) if source else []
    if not found:
        raise UserError("there are no prompts; give --prompts '[\"Once upon a time\"]' or --data_path FILE.jsonl")
    return [prompt_row(row) for row in found]


def digest(rows: Sequence[Any]) -> str:
    """16 hexadecimal digits that change with rows, but not with where they come from."""
    told = [{k: v for k, v in row.items() if k != "_where"} if isinstance(row, dict) else row for row in rows]
    return hashlib.blake2b(json.dumps(told, sort_keys=True, default=repr).encode(), digest_size=8).hexdigest()


def name_of(source: SourceConfig) -> str:
    """What rows call a source."""
    shown = {"temperature": source.temperature, "top_p": source.top_p, "shots": source.shots or None}
    parts = [Path(source.path).name, *(f"{name}={value:g}" for name, value in shown.items() if value is not None)]
    return source.name or " ".join(part for part in parts if part) or "model"


def shots_of(source: SourceConfig) -> list[Row]:
    """The demonstrations that stand before every prompt of a source."""
    return [sft_row(row) for row in rows_from(source.demonstrations)[: source.shots]] if source.shots else []


def with_shots(row: Row, shots: Sequence[Row]) -> Row:
    """A prompt row with demonstrations before it: earlier turns, or texts with an empty line between.

    Raises:
        UserError: the ones are messages, the others texts.
    """
    prompt = row["prompt"]
    for shot in reversed(shots):
        if isinstance(prompt, str) != isinstance(shot["prompt"], str):
            raise UserError(f"{shot['_where']}: prompts and demonstrations must both be texts, or both messages")
        before = shot["prompt"] + shot["response"]
        prompt = f"{before}\n\n{prompt}" if isinstance(prompt, str) else before + prompt
    return {**row, "prompt": prompt}


def scored_rows(prompts: Sequence[Row], groups: Sequence[list[Row]]) -> list[Row]:
    """Rows {prompt, response, finished, ...} of all responses."""
    return [
        {**prompt, "response": item["text"], "finished": item["finished"]}
        for prompt, items in zip(prompts, groups, strict=True)
        for item in items
    ]


def verdicts_of(label: dict[str, Any]) -> list[Verdict]:
    """The verdicts of a journal's row."""
    return [Verdict(**verdict) for verdict in label.get("verdicts", [])]


def judged_shares(verdicts: Sequence[Verdict]) -> labels.Shares:
    """What a judge says of the pairs that it has decided."""
    return {(v.first, v.second): v.share for v in verdicts if v.share is not None}


def ranking_of(one: Ranking, verdicts: Sequence[Verdict]) -> Row:
    """A ranking row by a judge."""
    places = judging.ranks(len(one.responses), verdicts)
    items = [
        {"text": text_of(response), "rank": place, "finished": done, **more}
        for response, place, done, more in zip(one.responses, places, one.finished, one.extra, strict=True)
    ]
    return {"prompt": one.prompt, "responses": items, "rater": "judge"}


def gold_of(
    config: CollectRun, prompts: Sequence[Row], ranked: Sequence[Row], gold: Callable[..., Any] | None
) -> list[list[float]]:
    """The gold reward of every response."""
    rows = scored_rows(prompts, [row["responses"] for row in ranked])
    texts = [plain(row["prompt"]) for row in rows], [row["response"] for row in rows]
    calls: dict[str, Any] = {"timeout": config.reward.timeout, "retries": config.reward.retries}
    left = iter(call_reward(gold or resolve(config.reward.gold), *texts, columns(rows), **calls).tolist())
    return [[next(left) for _ in row["responses"]] for row in ranked]
