"""Text in, text out: prompts to responses through the sampler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from rlhf_jax.config import SamplingConfig
from rlhf_jax.data.collate import collate_prompts, eval_batches
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.messages import Messages
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError, tell
from rlhf_jax.hosts.processes import to_host
from rlhf_jax.inference.sampling import SamplingLaw, sample
from rlhf_jax.models import Model
from rlhf_jax.models.loading import check_length
from rlhf_jax.models.model import of_length
from rlhf_jax.sharding import Mesh, put_batch
from rlhf_jax.types import Params, Rollout


def make_sampler(
    model: Model, config: SamplingConfig, stop_ids: tuple[int, ...], *, carry: bool = False, routing: bool = False
) -> Callable[..., Rollout]:
    """The sampler of this config, not yet compiled: (params, prompt, prompt_mask, key, law, active, *, samples) ->
    Rollout, the last two as in `sample`. With `carry`, what top-k kept comes along, and no ties beyond the k-th; with
    `routing` the experts of each token.

    Raises:
        UserError: the model has none.
    """
    if routing and not model.arch.num_experts:
        raise UserError("replay_routing is of models with experts, and this one has none; leave it out")
    filtered = config.top_k > 0 or config.top_p < 1
    return partial(
        sample,
        model,
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids,
        chunk=config.chunk,
        candidates=(1 if carry else 2) * config.top_k if filtered else 0,
        filtered=filtered,
        carry=carry and config.top_k > 0,
        routing=routing,
        # Where no stop id can be drawn nothing ends early, and all rows begin at once.
        slots=config.slots or (0 if config.min_new_tokens < config.max_new_tokens else None),
        microbatch=config.microbatch,
    )


def total_length(config: SamplingConfig, max_prompt_length: int) -> int:
    """Tokens of the longest prompt and response together; prompts without buckets have up to max_prompt_length."""
    return max(config.prompt_buckets or [max_prompt_length]) + config.max_new_tokens


def spread(prompts: int, samples: int, ways: int) -> int:
    """How often a prompt stands in a batch that draws `samples` for each of so many over `ways` shards of rows.

    Once where that divides; else the least that does, which must be a divisor of `samples`; all of them where none is.
    """
    return next(n for n in range(1, samples + 1) if samples % n == 0 and (prompts * n % ways == 0 or n == samples))


class Response(NamedTuple):
    """What was drawn.

    Attributes:
        prompt: as text.
        prompt_ids: int32[p], what the model saw of it.
        text: of the response, as rows hold it (`Tokenizer.response_text`).
        ids: int32[n], of the response, the stop id included.
        finished: it ended in a stop id, and was not cut off.
    """

    prompt: str
    prompt_ids: np.ndarray
    text: str
    ids: np.ndarray
    finished: bool


class Generator:
    """A compiled sampler with its tokenizer.

    Attributes:
        law: what is drawn from, for `rollout`.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, config: SamplingConfig, mesh: Mesh, *, max_prompt_length: int
    ):
        """Prompts lose their start over max_prompt_length; they are padded to config.prompt_buckets, or to that.

        Raises:
            UserError: prompt and response are longer than the model's positions.
        """
        self.tokenizer, self.mesh, self.microbatch = tokenizer, mesh, config.microbatch
        self.limits, self.buckets = Limits(max_prompt_length), tuple(config.prompt_buckets or [max_prompt_length])
        check_length(model.arch, total_length(config, max_prompt_length), "prompt length + sampling.max_new_tokens =")
        self.law = SamplingLaw.from_config(config)
        model = of_length(model, total_length(config, max_prompt_length))  # one law in all buckets
        self.rollout = jax.jit(make_sampler(model, config, tokenizer.eos_ids), static_argnames="samples")

    def responses(
        self,
        params: Params,
        rows: Sequence[Row],
        key: jax.Array,
        *,
        samples: int = 1,
        batch_size: int = 0,
        first: int = 0,
    ) -> list[Response]:
        """`samples` responses, one after another, to each prompt that has tokens; `batch_size` at once (0: all).

        Batch i, of whole prompts, gets the noise of fold_in(key, first + i).
        """
        examples, _ = prompt_examples(list(rows), self.tokenizer, self.limits)
        # Prompts of a batch: with their samples they fill whole microbatches and all shards of rows.
        ways = self.mesh.row_ways
        multiple = math.lcm(ways // math.gcd(ways, samples), max(self.microbatch // samples, 1))
        size = -(-max(batch_size // samples, 1) // multiple) * multiple if batch_size else 0
        size = size or -(-len(examples) // multiple) * multiple
        times = spread(size, samples, ways)
        collate = partial(collate_prompts, buckets=self.buckets, pad_id=self.tokenizer.pad_id)
        responses: list[Response] = []
        for i, batch in enumerate(eval_batches(examples, batch_size=size, collate=collate)):
            arrays = (np.repeat(batch[name], times, axis=0) for name in ("tokens", "mask", "valid"))
            prompt, prompt_mask, valid = put_batch(self.mesh, tuple(arrays))  # the last batch is filled up
            noise = jax.random.fold_in(key, first + i)
            rollout = self.rollout(params, prompt, prompt_mask, noise, self.law, valid, samples=samples // times)
            tokens, mask, finished = to_host((rollout.tokens, rollout.mask, rollout.finished))
            drawn = (example for example in examples[i * size : (i + 1) * size] for _ in range(samples))
            for row, example in enumerate(drawn):
                ids = tokens[row][mask[row]]
                text = self.tokenizer.response_text(ids.tolist(), example["given"])
                responses.append(Response(example["prompt"], example["tokens"], text, ids, bool(finished[row])))
        unshown = Counter[str]()
        for one in responses:
            unshown.update(self.tokenizer.unshown(one.ids.tolist(), one.text))
        for what, count in unshown.items():
            tell(f"{count} of {len(responses)} {what}", error=True)
        return responses

    def rows(
        self, params: Params, rows: Sequence[Row], key: jax.Array, *, samples: int = 1, **options: int
    ) -> list[Row]:
        """The `responses` as sft rows, which read as what was sampled; all `rows` have tokens."""
        responses = self.responses(params, rows, key, samples=samples, **options)
        told = ("prompt", "prompt_seen")
        prompts = ({name: row[name] for name in told if name in row} for row in rows for _ in range(samples))
        return [
            {**prompt, "response": one.text, "response_ids": one.ids.tolist(), "finished": one.finished}
            for prompt, one in zip(prompts, responses, strict=True)
        ]


def decode(
    tokenizer: Tokenizer, rollout: Rollout, prompts: Sequence[str | Messages]
) -> tuple[list[str], Counter[str]]:
    """The responses of a rollout to `prompts` (texts or messages), as rows and reward functions have them.

    And how many of these texts do not show what of their ids (`Tokenizer.unshown`).
    """
    tokens, mask = to_host((rollout.tokens, rollout.mask))
    of_rows = [ids[kept].tolist() for ids, kept in zip(tokens, mask, strict=True)]
    texts = [tokenizer.response_text(ids, prompt) for ids, prompt in zip(of_rows, prompts, strict=True)]
    return texts, sum(map(tokenizer.unshown, of_rows, texts), Counter[str]())
