"""What is measured of a model that responds: log-probs of its own samples, and of held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import jax
import numpy as np

from rlhf_jax.config import EvaluateArgs, SourceConfig
from rlhf_jax.data.examples import sft_examples
from rlhf_jax.data.limits import Limits
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import tell
from rlhf_jax.feedback.phases import Make, source_name
from rlhf_jax.feedback.sources import Drawer, Measure, Sources
from rlhf_jax.inference.generate import Response, total_length
from rlhf_jax.inference.likelihood import Likelihood, example_of
from rlhf_jax.models.loading import Loaded, check_same_tokenizer, load_model


def measuring(config: EvaluateArgs, sources: Sources) -> Callable[[Drawer], Measure]:
    """Makes, of a model, what adds to its responses their tokens and, where the config names a reference, the
    log-probs that the model itself and the reference give to them."""

    @cache
    def reference() -> Loaded:
        model = replace(config.model, path=config.reference, arch=None)
        length = total_length(config.sampling, config.max_prompt_length)
        return load_model(model, sources.mesh, jax.random.key(0), length=length)

    def begin(drawer: Drawer) -> Measure:
        models: dict[str, Loaded] = {}
        if config.reference:
            check_same_tokenizer(drawer.tokenizer, config.reference, "reference")
            models = {"logprob": drawer.loaded, "ref_logprob": reference()}
        readers = {name: _reader(config, sources, loaded, drawer) for name, loaded in models.items()}

        def measure(drawn: Sequence[Response]) -> list[Row]:
            rows: list[Row] = [{"tokens": len(one.ids)} for one in drawn]
            examples = [example_of(one.prompt_ids, one.ids) for one in drawn]
            for name, reader in readers.items():
                of_each = reader.targets(models[name].params, examples, drawer.temperature)
                for row, logprobs in zip(rows, of_each, strict=True):
                    row[name] = float(logprobs.sum(dtype=np.float64))
            return rows

        return measure

    return begin


def held_out(config: EvaluateArgs, sources: Sources, source: SourceConfig, text: Sequence[Row]) -> Make:
    """Makes the one row {nll, tokens} of a source on all held-out rows."""
    drawer = sources.drawer(source)
    limits = Limits(config.max_prompt_length, config.max_length)
    examples, counts = sft_examples(list(text), drawer.tokenizer, limits, loss_on="response")
    tell(f"{source_name(source)}: held-out rows: {counts}")
    model = replace(drawer.loaded.model, length=config.max_length)  # as `sft` on rows of this length has it
    reader = _reader(config, sources, replace(drawer.loaded, model=model), drawer)

    def make(start: int, stop: int) -> list[Row]:
        with jax.set_mesh(sources.mesh.grid):
            logprobs = np.concatenate(reader.targets(drawer.loaded.params, examples))
        return [{"nll": float(-logprobs.sum(dtype=np.float64)), "tokens": len(logprobs)}]

    return make


def _reader(config: EvaluateArgs, sources: Sources, loaded: Loaded, drawer: Drawer) -> Likelihood:
    return Likelihood(loaded.model, sources.mesh, pad_id=drawer.tokenizer.pad_id, batch_size=config.batch_size)
