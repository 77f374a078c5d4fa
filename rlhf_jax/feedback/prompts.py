"""What a command works on, named by its config or given by its caller: prompts, or responses to them."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_jax.config import DrawArgs, JudgeArgs, RateArgs, SampleArgs, SourceConfig, resolve
from rlhf_jax.data.ballots import Ranking, ranking_row
from rlhf_jax.data.rows import DroppedRow, Row, where_of
from rlhf_jax.data.schemas import columns_of, prompt_row, sft_row
from rlhf_jax.data.sources import rows_from
from rlhf_jax.errors import UserError
from rlhf_jax.inference.reward_functions import columns_for, functions_of
from rlhf_jax.types import RewardFn


def prompts_of(config: DrawArgs | SampleArgs, rows: object = None) -> list[Row]:
    """The prompt rows of a config; `rows`, as `rows_from` takes them, replace its file."""
    source = config.data_path if rows is None else rows
    prompts: list[Row] = [{"prompt": text, "_where": f"prompt {i}"} for i, text in enumerate(config.prompts)]
    prompts += rows_from(source) if source else []
    if not prompts:
        raise UserError("there are no prompts; give --prompts '[\"Once upon a time\"]' or --data_path FILE.jsonl")
    return [prompt_row(row) for row in prompts]


def kept_fields(prompt: Row) -> Row:
    """The fields of a prompt row that the rows made of it keep: its id, if it has one, and the prompt."""
    return {name: prompt[name] for name in ("id", "prompt") if name in prompt}


def rankings_given(config: JudgeArgs | RateArgs, rows: object) -> tuple[list[Ranking], int]:
    """(the responses to each prompt, labelled or not; how many rows were dropped); `rows` replace config.path."""
    rankings, dropped = [], 0
    for row in rows_from(config.path if rows is None else rows, config.fields):
        try:
            rankings.append(ranking_row(row, unlabelled=True))
        except DroppedRow:
            dropped += 1
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
    """Raise a UserError if the reward functions, or the gold one, do not take the columns of the prompt rows."""
    asked = functions_of(config.reward, functions)
    if gold is not None or config.reward.gold:
        asked.append(gold or resolve(config.reward.gold))
    reward_columns(asked, prompts)


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
