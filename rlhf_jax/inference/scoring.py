"""What models say of texts outside of PPO: scores of a reward model and of Python functions, log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.config import ModelConfig, RewardSourceConfig
from rlhf_jax.data.collate import collate_sft, eval_batches
from rlhf_jax.data.encoding import Example, Limits
from rlhf_jax.data.rows import Row
from rlhf_jax.data.schemas import answer_of, finished_of, ids_of, prompt_row
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import tell
from rlhf_jax.hosts.processes import to_host
from rlhf_jax.inference.reward_functions import Columns, combine
from rlhf_jax.models import Model
from rlhf_jax.models.loading import check_length, check_vocabulary, load_model, load_tokenizer
from rlhf_jax.sharding import Mesh, put_batch
from rlhf_jax.types import Params, RewardFn


def score_example(row: Row, tokenizer: Tokenizer, limits: Limits) -> Example:
    """{tokens int32[n], loss_mask, cut} of a {prompt, response, finished?} row; an empty response is a stop id.

    Raises:
        UserError: a missing field or a wrong type.
    """
    text = row.get("response", row.get("completion"))
    if isinstance(text, str) and not text.strip():
        row, ids = prompt_row(row), ids_of(row, "response_ids")  # such as special tokens
        said = text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        row = {**row, "response": said, "finished": finished_of(row), "ids": ids}
    else:
        row = answer_of(row)
    told = {"prompt": row["prompt"], "finished": row["finished"], "ids": row.get("ids")}
    response = tokenizer.encode_response(row["response"], **told)
    prompt, cut_prompt = limits.prompt(row, tokenizer.encode_prompt(row["prompt"]), tokenizer.bos_id)
    response, cut = limits.response(row, len(prompt), response)
    return _example(prompt + response, cut or cut_prompt)


def _example(tokens: list[int], cut: bool) -> Example:
    return {"tokens": np.asarray(tokens, np.int32), "loss_mask": np.ones(len(tokens), bool), "cut": cut}


class RewardModel:
    """A trained reward model that scores rows; longer ones than its limits are cut."""

    def __init__(self, config: ModelConfig, mesh: Mesh, limits: Limits, *, batch_size: int):
        """Load it; `batch_size` rows are scored at once."""
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self.mesh, self.limits, self.size = mesh, limits, -(-batch_size // ways) * ways
        self.tokenizer = load_tokenizer(config)
        with jax.set_mesh(mesh.grid):
            self.loaded = load_model(config, mesh, jax.random.key(0), head="trained", length=limits.max_length)
        self.arch = self.loaded.model.arch
        check_vocabulary(self.arch, self.tokenizer, config.path)
        self.forward = jax.jit(partial(score_sequences, self.loaded.model))

    def example(self, row: Row) -> Example:
        """The tokens of a {prompt, response, finished?} row."""
        return score_example(row, self.tokenizer, self.limits)

    def sampled(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> Example:
        """A prompt as a model saw it and what it wrote, in ids of the vocabulary that is this model's, too."""
        prompt, cut_prompt = self.limits.prompt({}, list(prompt_ids), self.tokenizer.bos_id)
        response, cut = self.limits.response({}, len(prompt), list(ids))
        return _example(prompt + response, cut or cut_prompt)

    def scores(self, examples: Sequence[Example], length: int) -> list[float]:
        """The scores of examples, padded to `length` tokens."""
        check_length(self.arch, length, "length of the longest row (after max_length)")
        collate = partial(collate_sft, length=length, reduction="token", pad_id=self.tokenizer.pad_id)
        scores: list[float] = []
        with jax.set_mesh(self.mesh.grid):
            for batch in eval_batches(examples, batch_size=self.size, collate=collate):
                arrays = {name: batch[name] for name in ("tokens", "positions", "segment_ids")}
                arrays["last"] = (batch["segment_ids"] > 0).sum(axis=1, dtype=np.int32) - 1
                scores += to_host(self.forward(self.loaded.params, **put_batch(self.mesh, arrays))).tolist()
        return scores[: len(examples)]


class Scorer:
    """What `config` (a `reward` group) makes of responses: weight * reward model + sum of weights * functions."""

    def __init__(
        self,
        config: RewardSourceConfig,
        mesh: Mesh,
        limits: Limits,
        *,
        batch_size: int,
        functions: Sequence[RewardFn] | None = None,
    ):
        """`functions` replace the config's."""
        self.weight, self.length = config.model_weight, limits.max_length
        self.functions = combine(config, functions)
        model = ModelConfig(path=config.model)
        self.model = RewardModel(model, mesh, limits, batch_size=batch_size) if config.model else None

    def __call__(self, rows: Sequence[Row]) -> np.ndarray:
        """float32[N] for rows {prompt, response, finished, shown, columns, prompt_ids?, ids?}.

        `shown` is the prompt as text and `columns` are what functions get beside it. `prompt_ids` and `ids` are of a
        sampler whose vocabulary is the reward model's, and just these are scored; without them texts are read.

        Raises:
            RewardFailure: a function raised or ran out of time.
        """
        scores = np.zeros(len(rows), np.float32)
        if self.model is not None:
            text = ("prompt", "response", "finished")
            examples = [
                self.model.sampled(row["prompt_ids"], row["ids"])
                if "prompt_ids" in row
                else self.model.example({**{name: row[name] for name in text}, "_where": "a response"})
                for row in rows
            ]
            if cut := sum(example["cut"] for example in examples):
                tell(f"{cut} of {len(rows)} responses or prompts are cut to {self.length} tokens of the reward model")
            by_model = np.asarray(self.model.scores(examples, self.length), np.float32)
            scores += np.float32(self.weight) * by_model
        if self.functions is not None:
            scores += self.functions(*function_inputs(rows))
        return scores


def function_inputs(rows: Sequence[Row]) -> tuple[list[str], list[str], Columns]:
    """(prompts, responses, columns) for reward functions, of rows {shown, response, columns}."""
    columns = {name: [row["columns"][name] for row in rows] for name in rows[0]["columns"]}
    return [row["shown"] for row in rows], [row["response"] for row in rows], columns


def score_sequences(
    model: Model,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    last: Int[Array, " B"],
) -> Float[Array, " B"]:
    """The reward of each sequence: the scalar head at index `last`, its last real token, the stop token if any."""
    hidden = model.apply(params, tokens, positions, segment_ids)
    at_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return model.scores(params["score"], at_last)[:, 0]


class Likelihood:
    """A compiled model that reads texts; all batches have one shape per length."""

    def __init__(self, model: Model, mesh: Mesh, *, pad_id: int, batch_size: int, multiple: int = 64):
        """`batch_size` rows are read at once, padded to a multiple of `multiple` tokens."""
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self.mesh, self.pad_id, self.multiple = mesh, pad_id, multiple
        self.size, self.limit = -(-batch_size // ways) * ways, model.arch.max_positions
        self.forward = jax.jit(model.next_logprobs)

    def targets(self, params: Params, examples: Sequence[Example], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probs float32[n] of the n targets of each {tokens, loss_mask} example, in nats."""
        longest = max(len(example["tokens"]) for example in examples)
        length = max(longest, min(-(-longest // self.multiple) * self.multiple, self.limit))
        collate = partial(collate_sft, length=length, reduction="token", pad_id=self.pad_id)
        rows: list[np.ndarray] = []
        for batch in eval_batches(examples, batch_size=self.size, collate=collate):
            arrays = put_batch(self.mesh, {name: batch[name] for name in ("tokens", "positions", "segment_ids")})
            rows += list(to_host(self.forward(params, **arrays, temperature=np.float32(temperature))))
        return [
            row[: len(example["tokens"]) - 1][np.asarray(example["loss_mask"])[1:]]
            for row, example in zip(rows, examples, strict=False)  # the last batch is filled up
        ]


def example_of(prompt: Sequence[int] | np.ndarray, response: Sequence[int] | np.ndarray) -> Example:
    """{tokens, loss_mask} of a prompt and the response whose tokens are targets."""
    tokens: np.ndarray = np.asarray([*prompt, *response], np.int32)
    return {"tokens": tokens, "loss_mask": np.arange(len(tokens)) >= max(len(prompt), 1)}
