"""`rlhf-jax rejection`: rounds of best-of-n samples and SFT on them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from rlhf_jax import sft
from rlhf_jax.commands import bestofn
from rlhf_jax.config import BestOfNArgs, ModelConfig, RejectionArgs, SFTArgs
from rlhf_jax.config.functions import replace
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.collate import collate_sft
from rlhf_jax.data.encoding import Example, Limits
from rlhf_jax.data.examples import prompt_examples, sft_examples
from rlhf_jax.data.rows import Row, carried
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.feedback.phases import digest
from rlhf_jax.hosts.files import replacing
from rlhf_jax.hosts.processes import say
from rlhf_jax.models.loading import load_tokenizer
from rlhf_jax.runs.directory import Summary, names_given
from rlhf_jax.runs.run import Run
from rlhf_jax.runs.twin import in_buckets
from rlhf_jax.training.loop import claim_directory
from rlhf_jax.training.supervised import inputs_of
from rlhf_jax.types import RewardFn


@in_buckets
def run(
    config: RejectionArgs,
    *,
    rows: object = None,
    functions: Sequence[RewardFn] | None = None,
    gold: RewardFn | None = None,
) -> Summary:
    """Run the rounds and write the run directory, with the last round's model; returns its summary.

    A round is a step of the run: it is saved when it ends, and within it sampling and SFT continue by themselves.
    `rows` (dicts with a prompt), `functions` and `gold` replace those that the config names.
    """
    given = names_given(rows=rows, functions=functions, gold=gold)
    finished, files = claim_directory("rejection", config, given)
    if finished is not None:
        return finished
    total, path = config.rejection.rounds, Path(config.run.output_dir)
    source = config.data.path if rows is None else rows
    mapped = rows_from(source, config.data.fields) if rows is not None or source else None
    prompts = bestofn.checked_prompts(sampling_of(config, 0), mapped, functions, gold)
    held_out = rows_from(config.data.eval_path, config.data.fields) if config.data.eval_path else None
    check_training(training_of(config, 0), prompts, held_out)
    shown = ("rollout/reward", "rollout/gold")
    with Run("rejection", config, total=total, shown=shown, given=given, files=files, of_runs=True) as out:
        tree, notes = out.restore({"round": jnp.zeros((), jnp.int32)}, {"prompts": digest(prompts)})
        done = list(notes.get("rounds", []))
        if not out.resumed:  # from here on what a round has left is of this very run
            out.save_now(0, tree, {"rounds": done})
        for k in range(out.start, total):
            try:
                done.append(one_round(config, k, prompts, held_out, functions, gold))
            except Stopped as stopped:
                line = f"rejection: stopped in round {k + 1} of {total}; {out.how_to_continue()}"
                raise Stopped(line, config.run.exit_code_when_stopped) from stopped
            out.metrics.write(k + 1, metrics_of(done[-1]))
            out.metrics.bar.update(1)
            tree = {"round": jnp.asarray(k + 1, jnp.int32)}
            out.save_now(k + 1, tree, {"rounds": done})
            out.save_if_due(k + 1, tree, {"rounds": done})
        with replacing(path / "model") as new:
            shutil.copytree(place(config, total - 1) / "sft" / "model", new, dirs_exist_ok=True)
        return out.finish({"rounds": done})


def one_round(
    config: RejectionArgs,
    k: int,
    prompts: Sequence[Row],
    held_out: list[Row] | None,
    functions: Sequence[RewardFn] | None,
    gold: RewardFn | None,
) -> Summary:
    """Round k from 0 on, or what is left of it: the summary of its samples, and of its SFT the held-out loss.

    `best_empty` are the best responses that are empty, which the SFT does not get; `kept` are the rows that its limits
    leave, held-out ones of eval_fraction included. To count them they are tokenised once more than the SFT does:
    little beside what it took to draw each of them num_samples times.
    """
    best = sampling_of(config, k)
    output = Path(best.output)
    summary = finished(output)
    if summary is None:
        summary = bestofn.run(best, rows=prompts, functions=functions, gold=gold)
    best_rows = rows_from(str(output))
    chosen = [row for row in best_rows if row["response"].strip()]
    if empty := len(best_rows) - len(chosen):
        say(f"! round {k + 1}: the best response to {empty} of {len(best_rows)} prompts is empty, and left out")
    if not chosen:
        raise UserError(f"round {k + 1}: the best response to every prompt is empty; look at {output}")
    training = training_of(config, k)
    kept = learned(training, load_tokenizer(training.model), chosen)
    trained = sft.run(training, rows=chosen, eval_rows=held_out)
    losses = {name: trained[name] for name in ("eval/total",) if name in trained}  # none without held-out rows
    return {**summary, "best_empty": empty, "kept": len(kept), **losses}


def learned(training: SFTArgs, tokenizer: Tokenizer, rows: list[Row]) -> list[Example]:
    """The examples that an SFT makes of rows, before it packs them."""
    return sft_examples(rows, tokenizer, Limits.of(training.data), loss_on=training.sft.loss_on)[0]


def check_training(training: SFTArgs, prompts: Sequence[Row], held_out: list[Row] | None) -> None:
    """Raise a UserError, before anything is sampled, for what the SFT of the samples would refuse after it.

    Every prompt stands there with a response of one letter, so that there are as many rows as there can be.
    """
    data, sampling = training.data, training.sampling
    able = replace(training, data__strict=False)  # a prompt that is too long is not sampled from
    rows = [{**carried(prompt), "response": "a"} for prompt in prompts]
    mesh, tokenizer, train, rest = inputs_of(able, "sft", rows, held_out)
    size = data.batch_size or mesh.row_ways * training.sft.accumulate
    Batches(learned(able, tokenizer, train), batch_size=size, seed=training.run.seed, collate=collate_sft)
    if held_out:
        learned(training, tokenizer, rest)
    if data.too_long == "error" or (data.too_long == "drop" and data.strict):
        examples, _ = prompt_examples(list(prompts), tokenizer, Limits.of(able.data))
        longest = max(len(example["tokens"]) for example in examples) + sampling.max_new_tokens
        if longest > data.max_length:
            raise UserError(
                f"data.max_length {data.max_length} is less than the {longest} tokens of the longest prompt and "
                "sampling.max_new_tokens, and a row over it would be an error after it was sampled; raise it to "
                f"{longest} or set data.too_long truncate"
            )


def finished(output: Path) -> Summary | None:
    """The summary of samples that are all there; None if they are to be made."""
    try:
        summary: Summary = json.loads(output.with_suffix(".summary.json").read_text())
        return summary if len(output.read_bytes().splitlines()) == summary["prompts"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def place(config: RejectionArgs, k: int) -> Path:
    """The directory of round k."""
    return Path(config.run.output_dir) / f"round{k + 1}"


def policy_of(config: RejectionArgs, k: int) -> ModelConfig:
    """The model that round k samples from and trains."""
    if k == 0:
        return config.model
    return replace(config.model, path=str(place(config, k - 1) / "sft" / "model"), arch=None, tokenizer="")


def sampling_of(config: RejectionArgs, k: int) -> BestOfNArgs:
    """What round k draws."""
    return BestOfNArgs(
        model=policy_of(config, k),
        data_path=config.data.path,
        num_samples=config.rejection.num_samples,
        sampling=config.sampling,
        max_prompt_length=config.data.max_prompt_length,
        too_long=config.data.too_long,
        batch_size=config.rejection.sample_batch_size,
        reward=config.reward,
        seed=(config.run.seed + k) % 2**32,
        overwrite=True,
        progress=config.run.progress,
        mesh=config.mesh,
        output=str(place(config, k) / "best.jsonl"),
    )


def training_of(config: RejectionArgs, k: int) -> SFTArgs:
    """What round k trains on that; its samples are no rows for the field map of the prompts."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(SFTArgs)}
    run = replace(config.run, output_dir=str(place(config, k) / "sft"), overwrite=False, push_to_hub="")
    return SFTArgs(**{**settings, "model": policy_of(config, k), "data": replace(config.data, fields=[]), "run": run})


def metrics_of(summary: Summary) -> dict[str, float]:
    """The rewards of the policy that a round began with, and those of its best samples."""
    one, best = summary["curve"][0], summary["curve"][-1]
    metrics = {"rollout/reward": one["proxy"]["mean"], "rollout/best_reward": best["proxy"]["mean"]}
    if "gold" in one:
        metrics |= {"rollout/gold": one["gold"]["mean"], "rollout/best_gold": best["gold"]["mean"]}
    return metrics | ({"eval/total": summary["eval/total"]} if "eval/total" in summary else {})
