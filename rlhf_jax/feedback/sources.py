"""What a command works on, and responses of several models to it, with scores and verdicts, into a journal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax

from rlhf_jax.config import DrawArgs, ModelConfig, SampleArgs, SamplingConfig, SourceConfig, SourcesArgs, resolve
from rlhf_jax.data.ballots import Ranking, ranking_row, remarks_of
from rlhf_jax.data.encoding import Encoder, Limits, Report
from rlhf_jax.data.examples import EMPTY, prompt_examples
from rlhf_jax.data.messages import text_of
from rlhf_jax.data.rows import EXTENSIONS, READ, DroppedRow, Row, carried, layout_of, tell_left, where_of
from rlhf_jax.data.schemas import columns_of, prompt_row, sft_row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import SPOILED, Tokenizer
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.judge import Judge
from rlhf_jax.feedback.judges import Group, asks_alone, check_judge, verdicts
from rlhf_jax.feedback.phases import Make, Phase, Phases, source_name
from rlhf_jax.feedback.reward_judge import check_against
from rlhf_jax.feedback.scorer import Scorer, check_scorers, golds_of, regrouped
from rlhf_jax.inference.generate import Generator, Response, total_length
from rlhf_jax.inference.reward_functions import columns_for, functions_of
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import Loaded, check_model, check_vocabulary, load_model, load_tokenizer, same_ids
from rlhf_jax.sharding import Mesh, make_mesh
from rlhf_jax.types import RewardFn

SAMPLED = "prompt length + sampling.max_new_tokens ="
"""What the longest sequence consists of."""


def prompts_of(config: DrawArgs | SampleArgs, rows: object = None) -> list[Row]:
    """The prompt rows of a config; `rows`, as `rows_from` takes them, replace its file."""
    source = config.data_path if rows is None else rows
    if file := next((text for text in config.prompts if text.endswith(EXTENSIONS) and os.path.isfile(text)), ""):
        raise UserError(f"prompts are texts, and {file} is a file; give it as --data_path {file}")
    prompts: list[Row] = [{"prompt": text, "_where": f"prompt {i}"} for i, text in enumerate(config.prompts)]
    prompts += rows_from(source) if source else []
    if not prompts:
        raise UserError("there are no prompts; give --prompts '[\"Once upon a time\"]' or --data_path FILE.jsonl")
    for row in prompts:
        row.pop("prompt_seen", None)  # of another limit
    return [prompt_row(row) for row in prompts]


def within_limits(config: DrawArgs | SampleArgs, prompts: list[Row]) -> list[Row]:
    """The prompts that the models of a config can be shown; says which of their fields rows with responses lack.

    Longer ones than config.max_prompt_length are dropped, or have in `prompt_seen` what is left (config.too_long);
    how many is said on standard error.
    """
    sources = (config.sources if isinstance(config, SourcesArgs) else []) or [SourceConfig()]
    names_of(sources)
    in_prompt = {"tools", "chat_template_kwargs"}  # of messages
    tell_left(prompts, lambda row: carried(row).keys() | (set() if isinstance(row["prompt"], str) else in_prompt))
    limits = Limits(config.max_prompt_length, too_long=config.too_long, group="")
    different = {(source.path, source.demonstrations, source.shots): source for source in sources}
    for source in different.values():
        prompts = fitting(prompts, load_tokenizer(of_source(config.model, source)), limits, shots_of(source))
    return prompts


def fitting(prompts: list[Row], tokenizer: Tokenizer, limits: Limits, shots: Sequence[Row]) -> list[Row]:
    """The prompts that are within the limits, with demonstrations before them; says what became of the others.

    Raises:
        UserError: none is left, or one has no token of its own.
    """
    encoder, kept, dropped, cuts = Encoder(tokenizer, limits), list[Row](), Counter[str](), 0
    for row in prompts:
        try:
            ids, cut = encoder.prompt(with_shots(row, shots))
            if not (tokenizer.encode_prompt(row["prompt"]) if shots else ids):
                raise DroppedRow(f"{row['_where']}: the prompt has no tokens", EMPTY)
        except DroppedRow as drop:
            dropped[drop.reason] += 1
            continue
        kept.append(row | encoder.seen(ids, cut))
        cuts += cut
    report = Report(len(kept), dict(dropped), cuts, remarks=dict(+encoder.remarks))
    if EMPTY in dropped:
        raise UserError(f"prompts: {report}; remove the empty ones")
    if not kept:
        raise UserError(f"no prompt is left: {report}; raise max_prompt_length, or set too_long truncate")
    if dropped or cuts or report.remarks:
        tell(f"{report.mark}prompts: {report}", error=True)
    return kept


def names_of(sources: Sequence[SourceConfig]) -> list[str]:
    """What rows call the sources; a UserError if two have one name, as runs/a/model and runs/b/model have."""
    names = [source_name(source) for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"sources {', '.join(names)} are not told apart by these; give each a name")
    return names


def of_source(model: ModelConfig, source: SourceConfig) -> ModelConfig:
    """The model of a source: its own, else the command's."""
    return replace(model, path=source.path, arch=None) if source.path else model


def rankings_given(rows: object, fields: list[str], *, unlabelled: bool = True) -> tuple[list[Ranking], int]:
    """(the responses to each prompt, `unlabelled` too; how many rows were dropped); the rest as in `rows_from`.

    Says which of the rows' fields rows with verdicts lack."""
    rankings, dropped = [], 0
    given = rows_from(rows, fields)
    for what, count in remarks_of(given).items():
        tell(f"{count} {what}", error=True)
    tell_left(given, lambda row: carried(row).keys() | READ.get(layout_of(row), set()))
    for row in given:
        try:
            rankings.append(replace(ranking_row(row, unlabelled=unlabelled), fields=carried(row)))
        except DroppedRow:
            dropped += 1
    if spoiled := sum("\ufffd" in text_of(text) for one in rankings for text in one.responses):
        tell(f"{spoiled} {SPOILED}", error=True)
    return rankings, dropped


def reward_columns(functions: Sequence[RewardFn], prompts: Sequence[Row]) -> list[Row]:
    """What reward functions get beside each prompt.

    Raises:
        UserError: for the first prompt row whose columns a function does not take, with its place.
    """
    where = [where_of(row) for row in prompts]
    return columns_for(functions, [row["prompt"] for row in prompts], [columns_of(row) for row in prompts], where)


def check_rewards(
    config: DrawArgs, prompts: Sequence[Row], functions: Sequence[RewardFn] | None, gold: RewardFn | None
) -> None:
    """Raise a UserError if a reward function, the gold one or a judge of pairs cannot take the columns of the rows."""
    asked = functions_of(config.reward, functions)
    if gold is not None or config.reward.gold:
        asked.append(gold or resolve(config.reward.gold))
    columns = reward_columns(asked, prompts)
    check_against(config.reward.judge, columns, [where_of(row) for row in prompts])


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


@dataclass(frozen=True)
class Drawer:
    """A model that is ready to respond, and the temperature at which it does."""

    loaded: Loaded
    tokenizer: Tokenizer
    generator: Generator
    temperature: float


def load_drawer(
    model: ModelConfig, tokenizer: Tokenizer, sampling: SamplingConfig, mesh: Mesh, *, seed: int, longest: int
) -> Drawer:
    """Load a model that responds to prompts of up to `longest` tokens; `seed` is of weights that no directory has."""
    with jax.set_mesh(mesh.grid):
        key = branch(jax.random.key(seed), "sampler's weights")
        loaded = load_model(model, mesh, key, length=total_length(sampling, longest))
        check_vocabulary(loaded.model.arch, tokenizer, model.path)
        generator = Generator(loaded.model, tokenizer, sampling, mesh, max_prompt_length=longest)
    return Drawer(loaded, tokenizer, generator, sampling.temperature)


Measure = Callable[[Sequence[Response]], list[Row]]
"""Further columns of responses."""


class Sources:
    """The responses of every source to every prompt, and scores of them.

    Attributes:
        sources: those given, or the config's model alone.
        names: what rows call them.
        each: responses of each to a prompt.
    """

    def __init__(self, config: DrawArgs, prompts: Sequence[Row], phases: Phases, sources: Sequence[SourceConfig] = ()):
        """Draws in phases that are added to `phases`.

        Raises:
            UserError: two sources have one name.
        """
        self.config, self.prompts, self.phases = config, prompts, phases
        self.sources = list(sources) or [SourceConfig()]
        self.names = names_of(self.sources)
        self.mesh = make_mesh(config.mesh)
        self.each = [source.num_samples or config.num_samples for source in self.sources]
        self._at_once = max(config.batch_size // sum(self.each), 1)  # prompts whose responses make up a batch
        self._length = total_length(config.sampling, config.max_prompt_length)
        self._columns = reward_columns([], prompts)
        self._last: tuple[tuple[str, bool], Drawer] | None = None
        self._drawn: list[Phase] = []
        self._scored: Phase | None = None

    def responses(self, i: int) -> list[Row]:
        """All responses to prompt i, as {text, ids, finished, ..., source, score?}."""
        drawn = zip(self.names, self._drawn, strict=True)
        items: list[Row] = [{**item, "source": name} for name, phase in drawn for item in phase[i]["responses"]]
        scores = [{"score": score} for score in self._scored[i]["scores"]] if self._scored else [{}] * len(items)
        return [item | score for item, score in zip(items, scores, strict=True)]

    # --- drawing

    def draw(self, number: int, begin: Callable[[Drawer], Measure] | None = None) -> None:
        """Add the phase of a source, of rows {shown, prompt_ids, responses: [{text, ids, finished}]}.

        `begin` makes what adds columns to the responses. `shown` and `prompt_ids` are the prompt, without
        demonstrations before it, as the source's model is shown it.
        """
        size = max(self.config.batch_size // self.each[number], 1)
        check_model(self._model(self.sources[number]), self._length, SAMPLED)
        self._drawn.append(self.phases.add(len(self.prompts), size, partial(self._drawing, number, size, begin)))

    def _drawing(self, number: int, size: int, begin: Callable[[Drawer], Measure] | None) -> Make:
        source, each = self.sources[number], self.each[number]
        rows = [with_shots(row, shots_of(source)) for row in self.prompts]
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        drawer = self.drawer(source)
        limits = Limits(self.config.max_prompt_length)
        seen, _ = prompt_examples(list(self.prompts), drawer.tokenizer, limits)
        with jax.set_mesh(self.mesh.grid):
            measure = begin(drawer) if begin else lambda drawn: [{} for _ in drawn]

        def make(start: int, stop: int) -> list[Row]:
            noise = jax.random.fold_in(key, start)  # of the batch's first prompt
            with jax.set_mesh(self.mesh.grid):
                drawn = drawer.generator.responses(
                    drawer.loaded.params, rows[start:stop], noise, samples=each, batch_size=size * each
                )
                measured = measure(drawn)
            items = [
                {"text": one.text, "ids": one.ids.tolist(), "finished": one.finished, **more}
                for one, more in zip(drawn, measured, strict=True)
            ]
            return [
                {
                    "shown": example["prompt"],
                    "prompt_ids": example["tokens"].tolist(),
                    "responses": items[i * each : (i + 1) * each],
                }
                for i, example in enumerate(seen[start:stop])
            ]

        return make

    def drawer(self, source: SourceConfig) -> Drawer:
        """The sampler of a source; one that differs in temperature alone shares model and program with the last."""
        config, model, sampling = self.config, self._model(source), self.config.sampling
        if source.temperature is not None:
            sampling = replace(sampling, temperature=source.temperature)
        if source.top_p is not None:
            sampling = replace(sampling, top_p=source.top_p)
        program = (model.path, sampling.top_p < 1)
        if self._last is None or self._last[0] != program:
            self._last = None  # frees the model before the next one is loaded
            limits = {"seed": config.seed, "longest": config.max_prompt_length}
            self._last = (program, load_drawer(model, load_tokenizer(model), sampling, self.mesh, **limits))
        drawer = self._last[1]
        drawer.generator.law = SamplingLaw.from_config(sampling)
        return replace(drawer, temperature=sampling.temperature)

    def _model(self, source: SourceConfig) -> ModelConfig:
        return of_source(self.config.model, source)

    # --- scores and verdicts

    def score(self, functions: Sequence[RewardFn] | None) -> Phase:
        """Add a phase of rows {scores} by config.reward.

        null where it failed and reward.on_failure is skip, or where a judge gave no answer.
        """
        check_scorers(self.config.reward, self._length, SAMPLED)
        self._scored = self.phases.add(len(self.prompts), self._at_once, partial(self._scoring, functions))
        return self._scored

    def members(self) -> Phase:
        """Add a phase of rows {members}, what each member of config.reward's models says of each response."""
        check_scorers(self.config.reward, self._length, SAMPLED)
        return self.phases.add(len(self.prompts), self._at_once, partial(self._scoring, None, by_member=True))

    def _scoring(self, functions: Sequence[RewardFn] | None, *, by_member: bool = False) -> Make:
        config = self.config
        limits = Limits(config.max_prompt_length, self._length)
        scorer = Scorer(config.reward, self.mesh, limits, batch_size=config.batch_size, functions=functions)
        key = jax.random.fold_in(jax.random.key(config.seed), len(self.sources) + 1)
        reads = [False] * len(self.sources)  # whether a source's ids mean the same to the reward model
        if scorer.models:
            tokenizers = [load_tokenizer(self._model(one)) for one in self.sources]
            reads = [all(same_ids(one, model.tokenizer) for model in scorer.models) for one in tokenizers]
            for name in [name for name, same in zip(self.names, reads, strict=True) if not same]:
                tell(f"{name}: the reward model has another tokenizer, so it reads the texts of responses anew")

        def make(start: int, stop: int) -> list[Row]:
            groups = [self._to_score(i, reads) for i in range(start, stop)]
            if by_member:
                members = scorer.members([row for each in groups for row in each]).tolist()
                return [{"members": each} for each in regrouped(members, groups)]
            before = self._scored.scores() if self._scored and stop == len(self.prompts) else None
            return scorer.of_groups(groups, jax.random.fold_in(key, start), before)

        return make

    def unscored(self) -> dict[str, int]:
        """{unscored: how many responses have no score}; empty where all have one, or none was asked for."""
        count = self._scored.scores().count(None) if self._scored else 0
        return {"unscored": count} if count else {}

    def judge(
        self, config: SourcesArgs, judge: Judge | None, groups_of: Callable[[int, list[Row]], list[Group]]
    ) -> Phase:
        """Add a phase of rows {verdicts}; groups_of(i, responses) are the responses to prompt i to be compared."""
        key = jax.random.fold_in(jax.random.key(config.seed), len(self.sources))
        groups = lambda i: groups_of(i, self.responses(i))  # noqa: E731
        if judge is None:
            check_judge(config.judge)
        begin = partial(verdicts, config, judge, groups, key)
        return self.phases.add(len(self.prompts), self._at_once, begin, apart=asks_alone(config.judge, judge))

    def gold(self, function: RewardFn | None) -> list[list[float]] | None:
        """The gold reward of every response, by `function` or config.reward.gold; None if there is neither."""
        config = self.config.reward
        if function is None and not config.gold:
            return None
        groups = [self._to_score(i, [False] * len(self.sources)) for i in range(len(self.prompts))]
        return golds_of(function or resolve(config.gold), groups, config)

    def _to_score(self, i: int, reads: Sequence[bool]) -> list[Row]:
        """All responses to prompt i as `Scorer` takes them, with ids of the sources whose ids it `reads`."""
        rows = []
        for drawn, with_ids in zip(self._drawn, reads, strict=True):
            phase = drawn[i]
            seen = {"prompt": self.prompts[i]["prompt"], "shown": phase["shown"], "columns": self._columns[i]}
            for item in phase["responses"]:
                ids = {"prompt_ids": phase["prompt_ids"], "ids": item["ids"]} if with_ids else {}
                rows.append({**seen, "response": item["text"], "finished": item["finished"], **ids})
        return rows
