"""Responses of several models to the same prompts, and who is better, piece by piece into a journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax

from rlhf_jax.config import DrawArgs, ModelConfig, SourceConfig, resolve
from rlhf_jax.data.examples import columns_of, prompt_examples
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.rows import Row, where_of
from rlhf_jax.data.schemas import prompt_row, sft_row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.judge import Judge, Verdict
from rlhf_jax.feedback.phases import Make, Phase, Phases, name_of
from rlhf_jax.inference.generate import Generator, Response, total_length
from rlhf_jax.inference.reward_functions import RewardFailure, call_reward, columns_for, functions_of
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.inference.scoring import Scorer, function_inputs, plain
from rlhf_jax.keys import branch
from rlhf_jax.models.loading import Loaded, check_vocabulary, load_model, load_tokenizer, same_ids
from rlhf_jax.sharding import make_mesh


@dataclass(frozen=True)
class Drawer:
    """A model that is ready to respond, and the law by which it does."""

    loaded: Loaded
    tokenizer: Tokenizer
    generator: Generator
    temperature: float


Measure = Callable[[Sequence[Response]], list[dict[str, Any]]]
"""Further columns of responses."""


class Sources:
    """The responses of every source to every prompt, and scores of them.

    Attributes:
        sources: those given, or the config's model alone.
        each: responses of each to a prompt.
        columns: what reward functions get beside each prompt.
    """

    def __init__(self, config: DrawArgs, prompts: Sequence[Row], phases: Phases, sources: Sequence[SourceConfig] = ()):
        """Draws in phases that are added to `phases`.

        Raises:
            UserError: two sources have one name.
        """
        self.config, self.prompts, self.phases = config, prompts, phases
        self.columns = _columns([], prompts)
        self.sources = list(sources) or [SourceConfig()]
        self.names = [name_of(source) for source in self.sources]
        if len(set(self.names)) < len(self.names):  # as runs/a/model and runs/b/model have
            raise UserError(f"sources {', '.join(self.names)} are not told apart by these; give each a name")
        self.mesh = make_mesh(config.mesh)
        self.each = [source.num_samples or config.num_samples for source in self.sources]
        self._last: tuple[Any, Drawer] | None = None
        self._drawn: list[int] = []

    def responses(self, i: int) -> list[Row]:
        """All responses to prompt i, as {text, ids, finished, ..., source}."""
        return [
            {**item, "source": name}
            for name, number in zip(self.names, self._drawn, strict=True)
            for item in self.phases.row(number, i)["responses"]
        ]

    def draw(self, number: int, begin: Callable[[Drawer], Measure] | None = None) -> None:
        """Add the phase of a source, of rows {shown, prompt_ids, responses: [{text, ids, finished}]}.

        `begin` makes what adds columns to the responses. `shown` and `prompt_ids` are the prompt, without
        demonstrations before it, as the source's model is shown it.
        """
        size = max(self.config.batch_size // self.each[number], 1)
        phase = Phase(len(self.prompts), size, partial(self._sampler, number, size, begin))
        self._drawn.append(self.phases.add(phase))

    def _sampler(self, number: int, size: int, begin: Callable[[Drawer], Measure] | None) -> Make:
        source, each = self.sources[number], self.each[number]
        rows = [with_shots(row, shots_of(source)) for row in self.prompts]
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        drawer = self.drawer(source)
        limits = Limits(self.config.max_prompt_length)
        seen, report = prompt_examples(list(self.prompts), drawer.tokenizer, limits)
        if len(seen) != len(self.prompts):
            raise UserError(f"prompts: {report}; remove the empty ones")
        _, report = prompt_examples(rows, drawer.tokenizer, limits)
        if report.truncated:
            tell(f"{self.names[number]}: prompts: {report}")
        with jax.set_mesh(self.mesh.grid):
            measure = begin(drawer) if begin else lambda drawn: [{} for _ in drawn]

        def make(start: int, stop: int) -> list[dict[str, Any]]:
            repeated = [row for row in rows[start:stop] for _ in range(each)]
            noise = jax.random.fold_in(key, start)  # of the batch's first prompt
            with jax.set_mesh(self.mesh.grid):
                drawn = drawer.generator.responses(drawer.loaded.params, repeated, noise, batch_size=size * each)
                more = measure(drawn)
            items = [
                {"text": one.text, "ids": one.ids.tolist(), "finished": one.finished, **m}
                for one, m in zip(drawn, more, strict=True)
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
        config, settings = self.config, self._model(source)
        law: dict[str, Any] = {"temperature": source.temperature, "top_p": source.top_p}
        sampling = replace(config.sampling, **{name: value for name, value in law.items() if value is not None})
        program = (settings.path, sampling.top_p < 1)
        if self._last is None or self._last[0] != program:
            self._last = None  # frees the model before the next one is loaded
            tokenizer, longest = load_tokenizer(settings), config.max_prompt_length
            with jax.set_mesh(self.mesh.grid):
                key, length = branch(jax.random.key(config.seed), "sampler's weights"), total_length(sampling, longest)
                loaded = load_model(settings, self.mesh, key, length=length)
                check_vocabulary(loaded.model.arch, tokenizer, settings.path)
                generator = Generator(loaded.model, tokenizer, sampling, self.mesh, max_prompt_length=longest)
            self._last = (program, Drawer(loaded, tokenizer, generator, sampling.temperature))
        drawer = self._last[1]
        drawer.generator.law = SamplingLaw.from_config(sampling)
        return replace(drawer, temperature=sampling.temperature)

    def _model(self, source: SourceConfig) -> ModelConfig:
        model = self.config.model
        return replace(model, path=source.path, arch=None) if source.path else model

    def score(self, functions: Sequence[Callable[..., Any]] | None) -> int:
        """Add a phase of rows {scores} by config.reward; null where it failed and reward.on_failure is skip."""
        return self.phases.add(Phase(len(self.prompts), self.rows_at_once, partial(self._scorer, functions)))

    @property
    def rows_at_once(self) -> int:
        """Prompts whose responses make up a batch."""
        return max(self.config.batch_size // sum(self.each), 1)

    def _scorer(self, functions: Sequence[Callable[..., Any]] | None) -> Make:
        config, longest = self.config, self.config.max_prompt_length
        limits = {"max_prompt_length": longest, "max_length": longest + config.sampling.max_new_tokens}
        scorer = Scorer(config.reward, self.mesh, **limits, batch_size=config.batch_size, functions=functions)
        reads = [scorer.model is not None and self._reads(scorer.model.tokenizer, source) for source in self.sources]

        def make(start: int, stop: int) -> list[dict[str, Any]]:
            groups = [self._scored(i, reads) for i in range(start, stop)]
            rows = [row for each in groups for row in each]
            try:
                found: list[float | None] = scorer(rows).tolist()
            except RewardFailure:
                if config.reward.on_failure == "stop":
                    raise
                found = [None] * len(rows)
            left = iter(found)
            return [{"scores": [next(left) for _ in each]} for each in groups]

        return make

    def gold(self, function: Callable[..., Any] | None) -> list[list[float]]:
        """The gold reward of every response, by `function` or config.reward.gold."""
        config, groups = self.config.reward, [self._scored(i, []) for i in range(len(self.prompts))]
        inputs = function_inputs([row for each in groups for row in each])
        calls: dict[str, Any] = {"timeout": config.timeout, "retries": config.retries}
        left = iter(call_reward(function or resolve(config.gold), *inputs, **calls).tolist())
        return [[next(left) for _ in each] for each in groups]

    def _reads(self, tokenizer: Tokenizer, source: SourceConfig) -> bool:
        """Whether a source's ids mean the same to another tokenizer; if not, texts are read, and it is said."""
        if same_ids(load_tokenizer(self._model(source)), tokenizer):
            return True
        tell(f"{name_of(source)}: the reward model has another tokenizer, so it reads the texts of responses anew")
        return False

    def _scored(self, i: int, reads: Sequence[bool]) -> list[Row]:
        """All responses to prompt i as `Scorer` takes them, with ids of the sources that the reward model `reads`."""
        found = []
        for s, number in enumerate(self._drawn):
            drawn = self.phases.row(number, i)
            of_prompt = {"prompt": self.prompts[i]["prompt"], "shown": drawn["shown"], "columns": self.columns[i]}
            for item in drawn["responses"]:
                row = {**of_prompt, "response": item["text"], "finished": item["finished"]}
                if s < len(reads) and reads[s]:
                    row |= {"prompt_ids": drawn["prompt_ids"], "ids": item["ids"]}
                found.append(row)
        return found


def verdicts(
    make_one: Callable[[], Judge], groups_of: Callable[[int], list[tuple[Any, list[str]]]], key: jax.Array
) -> Make:
    """Makes rows {verdicts} on all pairs of the responses of each group (prompt, responses) that a thing has.

    A judge reads messages as a transcript, since the models that it compares may be shown them in different templates.
    """
    judge = make_one()

    def make(start: int, stop: int) -> list[dict[str, Any]]:
        groups = [[(plain(prompt), texts) for prompt, texts in groups_of(i)] for i in range(start, stop)]
        found = iter(judge.verdicts([one for each in groups for one in each], jax.random.fold_in(key, start)))
        return [{"verdicts": [asdict(v) for _ in each for v in next(found)]} for each in groups]

    return make


def verdicts_of(row: dict[str, Any]) -> list[Verdict]:
    """The verdicts of a journal's row."""
    return [Verdict(**verdict) for verdict in row.get("verdicts", [])]


def prompts_of(config: DrawArgs, rows: Any) -> list[Row]:
    """The prompt rows of a config, or those given."""
    found: list[Row] = [{"prompt": text, "_where": f"prompt {i}"} for i, text in enumerate(config.prompts)]
    source = config.data_path if rows is None else rows
    found += rows_from(source) if source else []
    if not found:
        raise UserError("there are no prompts; give --prompts '[\"Once upon a time\"]' or --data_path FILE.jsonl")
    return [prompt_row(row) for row in found]


def check_rewards(
    config: DrawArgs,
    prompts: Sequence[Row],
    functions: Sequence[Callable[..., Any]] | None,
    gold: Callable[..., Any] | None,
) -> None:
    """Raise a UserError, with its place, for the first prompt row whose columns a reward function does not take."""
    asked = functions_of(config.reward, functions)
    if gold is not None or config.reward.gold:
        asked.append(gold or resolve(config.reward.gold))
    _columns(asked, prompts)


def _columns(functions: Sequence[Callable[..., Any]], prompts: Sequence[Row]) -> list[Row]:
    where = [where_of(row) for row in prompts]
    return columns_for(functions, [row["prompt"] for row in prompts], [columns_of(row) for row in prompts], where)


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
