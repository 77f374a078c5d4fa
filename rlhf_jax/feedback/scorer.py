"""What a `reward` group makes of responses outside of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhf_jax.config import ModelConfig, RewardSourceConfig
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, tell
from rlhf_jax.feedback.judges import check_judge, plain_text
from rlhf_jax.feedback.reward_judge import RewardJudge
from rlhf_jax.inference.reward_functions import RewardFailure, call_reward, combine
from rlhf_jax.inference.scoring import RewardModel, check_combine, combined, function_inputs
from rlhf_jax.models.loading import check_model
from rlhf_jax.sharding import Mesh
from rlhf_jax.types import RewardFn


def check_scorers(config: RewardSourceConfig, length: int, what: str) -> None:
    """Raise a UserError if a model of a `reward` group cannot be loaded, or not for `length` tokens (`what`)."""
    for path in config.paths:
        check_model(ModelConfig(path=path), length, what, head="trained")
    check_judge(config.judge)


def regrouped(values: Iterable[Any], groups: Iterable[Sequence[Row]]) -> list[list[Any]]:
    """A value for each row of all groups, as lists of a group's."""
    left = iter(values)
    return [[next(left) for _ in group] for group in groups]


def golds_of(gold: RewardFn, groups: Sequence[Sequence[Row]], config: RewardSourceConfig) -> list[list[float]]:
    """The gold rewards of groups of rows {shown, response, columns}."""
    texts = function_inputs([row for group in groups for row in group])
    return regrouped(call_reward(gold, *texts, timeout=config.timeout, retries=config.retries).tolist(), groups)


class Scorer:
    """What `config` (a `reward` group) makes of responses: weighted reward models, functions and judge, summed."""

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
        self.config, self.length = config, limits.max_length
        self.functions = combine(config, functions)
        load = partial(RewardModel, mesh=mesh, limits=limits, batch_size=batch_size)
        self.models = [load(ModelConfig(path=path)) for path in config.paths]
        check_combine(config.combine, [model.loaded for model in self.models], "reward.combine")
        self.judge = RewardJudge(config.judge, mesh) if config.judge.named() else None

    def __call__(self, rows: Sequence[Row], key: jax.Array) -> np.ndarray:
        """float32[N] for rows {prompt, response, finished, shown, columns, prompt_ids?, ids?, response_ids?}.

        `shown` is the prompt as text and `columns` are what functions get beside it. `prompt_ids` and `ids` are of a
        sampler whose vocabulary is the reward model's, and just these are scored; without them texts are read. NaN
        where a judge gave no answer; `key` is of what it writes.

        Raises:
            RewardFailure: a function raised or ran out of time, or a judge has gone.
        """
        scores = np.zeros(len(rows), np.float32)
        if self.models:
            each, options = [self._by(model, rows) for model in self.models], self.config
            by_model, _ = combined(each, combine=options.combine, combine_coef=options.combine_coef)
            scores += np.float32(options.model_weight) * by_model
        if self.functions is not None:
            scores += self.functions(*function_inputs(rows))
        if self.judge is not None:
            _, responses, columns = function_inputs(rows)
            scores += self.judge([plain_text(row["prompt"]) for row in rows], responses, columns, key)
        return scores

    def of_groups(
        self, groups: Sequence[Sequence[Row]], key: jax.Array, before: Sequence[float | None] | None = None
    ) -> list[Row]:
        """Rows {scores} of groups of rows; the rest as of a call.

        null where the reward failed and `on_failure` is skip, or where a judge gave no answer. `before` are the scores
        of all earlier groups, where these are the last: a judge that has answered none of all fails, too.
        """
        rows = [row for group in groups for row in group]
        try:
            said = self(rows, key)
            if self.judge is not None and before is not None:
                self.judge.check_answered(np.array([*before, *said], float))
            scores = [None if np.isnan(score) else score for score in said.tolist()]
        except RewardFailure:
            if self.config.on_failure == "stop":
                raise
            scores = [None] * len(rows)
        return [{"scores": each} for each in regrouped(scores, groups)]

    def members(self, rows: Sequence[Row]) -> np.ndarray:
        """float32[N, M], what each member of the reward models says; the rest as of a call.

        Raises:
            UserError: there is one member alone.
        """
        said = [self._by(model, rows) for model in self.models]
        _, members = combined(said, combine="mean", combine_coef=0.0)
        if members.shape[1] < 2:
            raise UserError(
                f"reward model {self.config.paths[0]} has no other member to disagree with; name several in "
                "reward.models, or train one with reward.members"
            )
        return members

    def _by(self, model: RewardModel, rows: Sequence[Row]) -> np.ndarray:
        text, remarks = ("prompt", "response", "finished", "response_ids"), Counter[str]()
        examples = [
            model.sampled(row["prompt_ids"], row["ids"])
            if "prompt_ids" in row
            else model.example({**{name: row[name] for name in text if name in row}, "_where": "a response"}, remarks)
            for row in rows
        ]
        if cut := sum(example["cut"] for example in examples):
            tell(f"{cut} of {len(rows)} responses or prompts are cut to {self.length} tokens of the reward model")
        for remark, count in (+remarks).items():
            tell(f"of what the reward model reads of {len(rows)} responses: {count} {remark}")
        return model.scores(examples, self.length)
