"""What models say of texts outside of PPO: scores of a reward model, log-probs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rlhf_jax import advantages as adv
from rlhf_jax.config import ModelConfig
from rlhf_jax.data.encoding import Example, Limits
from rlhf_jax.data.packing import pack_texts
from rlhf_jax.data.rows import Row
from rlhf_jax.data.schemas import answer_of, finished_of, ids_of, prompt_row
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import to_host
from rlhf_jax.inference.reward_functions import Columns
from rlhf_jax.models import Model
from rlhf_jax.models.loading import Loaded, check_length, check_vocabulary, load_model, load_tokenizer
from rlhf_jax.models.members import scored
from rlhf_jax.sharding import Mesh, put_batch
from rlhf_jax.types import Params


def score_example(row: Row, tokenizer: Tokenizer, limits: Limits, remarks: Counter[str] | None = None) -> Example:
    """{tokens int32[n], loss_mask, cut} of a {prompt, response, finished?} row; an empty response is a stop id.

    `remarks` counts what tokenising has to say.

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
    told = {"prompt": row["prompt"], "finished": row["finished"], "ids": row.get("ids"), "remarks": remarks}
    response = tokenizer.encode_response(row["response"], **told)
    prompt, cut_prompt = limits.prompt(row, tokenizer.encode_prompt(row["prompt"], remarks), tokenizer.bos_id)
    response, cut = limits.response(row, len(prompt), response)
    return {**example_of(prompt, response), "cut": cut or cut_prompt}


class RewardModel:
    """A trained reward model that scores rows; longer ones than its limits are cut."""

    def __init__(self, config: ModelConfig, mesh: Mesh, limits: Limits, *, batch_size: int):
        """Load it; `batch_size` rows are scored at once."""
        ways = mesh.row_ways
        self.mesh, self.limits, self.size = mesh, limits, -(-batch_size // ways) * ways
        self.tokenizer = load_tokenizer(config)
        with jax.set_mesh(mesh.grid):
            self.loaded = load_model(config, mesh, jax.random.key(0), head="trained", length=limits.max_length)
        self.arch = self.loaded.model.arch
        check_vocabulary(self.arch, self.tokenizer, config.path)
        self.forward = jax.jit(lambda params, inputs: scored(self.loaded.model, params, **inputs)[0])

    def example(self, row: Row, remarks: Counter[str] | None = None) -> Example:
        """The tokens of a {prompt, response, finished?} row; `remarks` counts what tokenising has to say."""
        return score_example(row, self.tokenizer, self.limits, remarks)

    def sampled(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> Example:
        """A prompt as a model saw it and what it wrote, in ids of the vocabulary that is this model's, too."""
        prompt, cut_prompt = self.limits.prompt({}, list(prompt_ids), self.tokenizer.bos_id)
        response, cut = self.limits.response({}, len(prompt), list(ids))
        return {**example_of(prompt, response), "cut": cut or cut_prompt}

    def scores(self, examples: Sequence[Example], length: int) -> np.ndarray:
        """Scores float32[N] of examples of up to `length` tokens, where the last token stands, the stop token if any.

        Of an ensemble [N, E].
        """
        check_length(self.arch, length, "length of the longest row (after max_length)")
        members = self.loaded.model.members
        scores = np.zeros((len(examples), members) if members else len(examples), np.float32)
        with jax.set_mesh(self.mesh.grid):
            for view in pack_texts(examples, length, self.size):
                said = to_host(self.forward(self.loaded.params, put_batch(self.mesh, view.inputs)))
                scores[view.row[view.ends]] = said[view.ends]
        return scores


def check_combine(combine: str, models: Sequence[Loaded], option: str) -> None:
    """Raise a UserError if reward models are to be combined otherwise than by their mean, and there is one member."""
    members = sum(max(1, loaded.model.members) for loaded in models)
    if combine != "mean" and members < 2:
        raise UserError(
            f"{option} {combine} is of an ensemble, and there is no more than one member; set it to mean, name "
            "several models, or train one with reward.members"
        )


def combined(scores: Sequence[np.ndarray], *, combine: str, combine_coef: float) -> tuple[np.ndarray, np.ndarray]:
    """(one score float32[N], the members' float32[N, M]) of the scores of one reward model or several."""
    members = np.concatenate([each.reshape(len(each), -1) for each in scores], axis=1)
    if members.shape[1] == 1:
        return members[:, 0], members
    return np.asarray(adv.combined(jnp.asarray(members), combine=combine, combine_coef=combine_coef)), members


def function_inputs(rows: Sequence[Row]) -> tuple[list[str], list[str], Columns]:
    """(prompts, responses, columns) for reward functions, of rows {shown, response, columns}."""
    columns = {name: [row["columns"][name] for row in rows] for name in rows[0]["columns"]}
    return [row["shown"] for row in rows], [row["response"] for row in rows], columns


def column_logprobs(
    model: Model,
    params: Params,
    inputs: dict[str, Array],
    needed: Bool[Array, "M S"],
    temperature: Float[Array, ""],
) -> Float[Array, "M S"]:
    """Log-probs of the token after each column of packed texts, in nats; 0 where it is not needed."""
    targets = jnp.roll(inputs["tokens"], -1, axis=1)
    return model.logprobs(params, model.apply(params, **inputs), targets, temperature, needed=needed)[0]


class Likelihood:
    """A compiled model that reads texts, several in a sequence; one shape per length of the longest."""

    def __init__(self, model: Model, mesh: Mesh, *, batch_size: int, multiple: int = 64):
        """`batch_size` sequences are read at once, of a multiple of `multiple` tokens that holds the longest text."""
        ways = mesh.row_ways
        self.mesh, self.multiple = mesh, multiple
        self.size, self.limit = -(-batch_size // ways) * ways, model.arch.max_positions
        self.forward = jax.jit(partial(column_logprobs, model))

    def targets(self, params: Params, examples: Sequence[Example], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probs float32[n] of the n targets of each {tokens, loss_mask} example, in nats."""
        longest = max(len(example["tokens"]) for example in examples)
        length = max(longest, min(-(-longest // self.multiple) * self.multiple, self.limit))
        logprobs = [np.zeros(len(example["tokens"]), np.float32) for example in examples]
        for view in pack_texts(examples, length, self.size):
            held = view.predicts
            arrays = put_batch(self.mesh, (view.inputs, held))
            said = to_host(self.forward(params, *arrays, np.float32(temperature)))
            for row in set(view.row[held].tolist()):
                at = held & (view.row == row)
                logprobs[row][view.positions[at] + 1] = said[at]
        masks = [np.append(False, example["loss_mask"][1:]).astype(bool) for example in examples]
        return [row[mask] for row, mask in zip(logprobs, masks, strict=True)]


def example_of(prompt: Sequence[int] | np.ndarray, response: Sequence[int] | np.ndarray) -> Example:
    """{tokens, loss_mask} of a prompt and the response whose tokens are targets."""
    tokens: np.ndarray = np.asarray([*prompt, *response], np.int32)
    return {"tokens": tokens, "loss_mask": np.arange(len(tokens)) >= max(len(prompt), 1)}
