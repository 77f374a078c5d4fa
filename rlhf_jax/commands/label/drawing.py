"""Responses that a policy draws while people rank the ones before: `rlhf-jax label --model.path DIR`."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import jax
import numpy as np

from rlhf_jax.config import CollectArgs, LabelArgs
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.rows import OF_ANSWERS, Row, carried, tell_left
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.votes import beside_vote
from rlhf_jax.errors import UserError, reason, tell
from rlhf_jax.feedback.phases import digest
from rlhf_jax.feedback.scorer import Scorer
from rlhf_jax.feedback.selection import select
from rlhf_jax.feedback.sources import load_drawer, prompts_of, within_limits
from rlhf_jax.inference.generate import Response
from rlhf_jax.models.contents import contents
from rlhf_jax.models.loading import load_tokenizer, same_ids
from rlhf_jax.runs.journal import Journal
from rlhf_jax.sharding import make_mesh

WAIT = 0.2
"""Seconds between two looks at how many items are left."""

ONLY_SOURCE = 0
"""The number of the policy among sources, as `collect` counts them."""


class Drawing:
    """A policy and a reward ensemble, which make rows to rank of prompts, some at once.

    Attributes:
        prompts: those that the policy can be shown.
    """

    def __init__(self, config: LabelArgs):
        """Load them.

        Raises:
            UserError: there are no prompts, or a model cannot be asked.
        """
        self.config, collect = config, collect_args(config)
        self.prompts = within_limits(collect, prompts_of(collect, rows_from(config.path, config.fields)))
        tell_left(self.prompts, lambda row: beside_vote(row).keys() | OF_ANSWERS | {"prompt"})
        self.mesh, longest = make_mesh(config.mesh), config.max_prompt_length
        tokenizer = load_tokenizer(config.model)
        self.drawer = load_drawer(
            config.model, tokenizer, config.sampling, self.mesh, seed=config.seed, longest=longest
        )
        self.scorer: Scorer | None = None
        if collect.select != "random":
            limits = Limits(longest, longest + config.sampling.max_new_tokens)
            self.scorer = Scorer(config.reward, self.mesh, limits, batch_size=config.batch_size)
            self.reads = all(same_ids(tokenizer, model.tokenizer) for model in self.scorer.models)

    @property
    def size(self) -> int:
        """Prompts whose responses make up a batch."""
        return max(self.config.batch_size // self.config.num_samples, 1)

    def __call__(self, start: int) -> list[Row]:
        """Rows {prompt, responses: [{text, finished}], information?} of a batch of prompts, the most of it first.

        They are those of `collect` with the same settings; a prompt without two different responses has none.
        """
        config, prompts = self.config, self.prompts[start : start + self.size]
        # As `collect` has it: then the number of a source, and the place of the batch.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), ONLY_SOURCE), start)
        options = {"samples": config.num_samples, "batch_size": self.size * config.num_samples}
        with jax.set_mesh(self.mesh.grid):
            drawn = self.drawer.generator.responses(self.drawer.loaded.params, prompts, key, **options)
            each = [drawn[i * config.num_samples :][: config.num_samples] for i in range(len(prompts))]
            members = self._members(prompts, each)
        rows = []
        for i, (prompt, responses) in enumerate(zip(prompts, each, strict=True)):
            rng = np.random.default_rng([config.seed, start + i])
            texts = [one.text for one in responses]
            said = None if members is None else members[i]
            chosen = select(config.select, texts, said, config.selected, rng)
            items = [{"text": texts[j], "finished": responses[j].finished} for j in chosen.places]
            told = {} if chosen.information is None else {"information": chosen.information}
            if len(items) > 1:
                rows.append({**carried(prompt), **told, "responses": items})
        return sorted(rows, key=lambda row: -row.get("information", 0.0))

    def _members(self, prompts: list[Row], each: list[list[Response]]) -> list[np.ndarray] | None:
        """What every member says of the responses to each prompt, [K, M] each; None where nobody is asked."""
        if self.scorer is None:
            return None
        rows = []
        for prompt, responses in zip(prompts, each, strict=True):
            for one in responses:
                ids = {"prompt_ids": one.prompt_ids.tolist(), "ids": one.ids.tolist()} if self.reads else {}
                rows.append({"prompt": prompt["prompt"], "response": one.text, "finished": one.finished, **ids})
        said = self.scorer.members(rows)
        return list(said.reshape(len(prompts), self.config.num_samples, -1))


def collect_args(config: LabelArgs) -> CollectArgs:
    """What `collect` would take to draw and choose the same, which checks it."""
    names = ("model", "num_samples", "sampling", "max_prompt_length", "batch_size", "reward", "select", "selected")
    return CollectArgs(**{name: getattr(config, name) for name in names}, data_path=config.path, seed=config.seed)


class Supply(contextlib.AbstractContextManager["Supply"]):
    """A thread that draws while fewer than `config.ahead` items wait for the busiest rater.

    What was drawn is in OUTPUT.drawn.part, which the same command goes on with.

    Attributes:
        batches: rows that are there at first, by batches: of an earlier command, or a first one.
        count: batches that all prompts make.
        left: what is drawn and left out, counted by what shows it.
        failure: what ended the drawing, if anything did.
    """

    def __init__(self, config: LabelArgs):
        """Load the models, and draw unless there are rows.

        Raises:
            UserError: the file was made with other settings, or nothing can be drawn.
        """
        self.ahead, self.drawing = config.ahead, Drawing(config)
        names = ("num_samples", "max_prompt_length", "batch_size", "select", "selected", "seed")
        decided_by = {name: getattr(config, name) for name in names} | {"sampling": asdict(config.sampling)}
        read = contents(config)
        decided_by |= {f"contents of {name}": read[name] for name in read if name.startswith(("model.", "reward."))}
        decided_by |= {"prompts": digest(self.drawing.prompts)}
        cure = "give the same, or another --output"
        self.journal = Journal(f"{config.output}.drawn", decided_by, overwrite=False, cure=cure)  # a line for a batch
        self.count = -(-len(self.drawing.prompts) // self.drawing.size)
        self.batches: list[list[Row]] = [batch["rows"] for batch in self.journal.rows]
        self.left: Counter[str] = Counter()
        self.failure: Exception | None = None
        self._end, self._thread = threading.Event(), threading.Thread(name="drawing", daemon=True)
        try:
            while not any(self.batches) and self._more():
                self.batches.append(self._drawn())
            if not any(self.batches):
                raise UserError(
                    "no prompt has two different responses; raise num_samples or sampling.temperature, and give "
                    "another --output"
                )
        except BaseException:
            self.journal.close()
            raise

    def prompts_in(self, batch: int) -> int:
        """How many prompts make up a batch."""
        return len(self.drawing.prompts[batch * self.drawing.size :][: self.drawing.size])

    def _more(self) -> bool:
        return len(self.journal.rows) * self.drawing.size < len(self.drawing.prompts)

    def _drawn(self) -> list[Row]:
        """The rows of the next batch, which are on disk."""
        rows = self.drawing(len(self.journal.rows) * self.drawing.size)
        self.journal.add([{"rows": rows}])
        return rows

    def start(self, add: Callable[[int, list[Row]], None], waiting: Callable[[], int]) -> None:
        """Begin to draw; `add` takes a batch's number and rows, `waiting` says what the busiest rater has left."""
        self._thread = threading.Thread(target=self._run, args=(add, waiting), name="drawing", daemon=True)
        self._thread.start()

    def _run(self, add: Callable[[int, list[Row]], None], waiting: Callable[[], int]) -> None:
        try:
            while self._more() and not self._end.is_set():
                if waiting() < self.ahead:
                    add(len(self.journal.rows), self._drawn())
                else:
                    self._end.wait(WAIT)
        except Exception as error:
            self.failure = error
            tell(f"label: no more is drawn ({reason(error)}); what is there can be ranked", error=True)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """End after the batch that is being drawn.

        Raises:
            UserError: drawing has failed.
        """
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self.journal.close()
        if self.failure is not None and kind is None:
            what = reason(self.failure)
            raise UserError(
                f"drawing failed ({what}); mend that, then give the same command again, which goes on here"
            )
