"""The loop of every method that learns from its own samples: iterations, evaluations, tables, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from rlhf_jax.config import OnlineArgs
from rlhf_jax.data.collate import Batch
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import say
from rlhf_jax.inference.reward_functions import RewardFailure, WrongRewards
from rlhf_jax.online import guards
from rlhf_jax.online.iteration import LoopState, NotFinite, Table, evaluate, iterate, key_at, next_batch, sample_rows
from rlhf_jax.online.law import TrainedLaw
from rlhf_jax.online.method import Method
from rlhf_jax.runs.directory import names_given
from rlhf_jax.runs.outcome import not_better, not_rewarded
from rlhf_jax.runs.run import Run
from rlhf_jax.training.loop import check_rewarded, check_trained, claim_directory, describe, settled_on
from rlhf_jax.training.state import learning_rates

SHOWN = ("rollout/reward", "rollout/gold", "rollout/kl", "time/tokens_per_s")


def run(
    stage: str, config: OnlineArgs, setup: Callable[..., tuple[Method, LoopState]], **overrides: Any
) -> dict[str, Any]:
    """Train the method of `setup(config, **overrides)` and write the run directory; returns its summary.

    The summary has `before` and `after`: the evaluation before training and that of the policy that is kept.
    """
    given = names_given(**overrides)
    finished, files = claim_directory(stage, config, given)
    if finished is not None:
        return finished
    method, loop = setup(config, **overrides)
    total, batches = method.settings.iterations, method.inputs.batches
    tokens = config.data.batch_size * config.sampling.max_new_tokens
    with jax.set_mesh(method.mesh.grid):
        facts = {"new_tokens_per_iteration_at_most": tokens, "prompts_left_over_by_each_epoch": batches.left_over}
        lines = describe(stage, method.mesh, method.nets.policy, iterations=total, **facts)
        law = TrainedLaw.of(method.settings, config.sampling, method.nets.models.policy.compute_dtype)
        for line in (*lines, settled_on(config, total), *law.remarks(method.settings)):
            say(line)
        with Run(stage, config, total=total, shown=SHOWN, given=given, files=files, agree_every=1) as out:
            tree, notes = out.restore(loop.tree(), method.facts())
            out.skips.rows_of = batches.where
            loop, notes = train(out, method, LoopState(**tree), notes)
            done, failed = notes.get("iterations", total), notes.get("reward_failed", {}).get("iterations", 0)
            check_rewarded(done, failed, out.dir)
            check_trained(out.skips.total, (done - failed) * method.steps, out.dir)
            out.metrics.bar.doing("writing the model")
            method.save(out.dir, out.restore_best(loop.kept(method)))
            judge = method.inputs.judge
            remarks = [*method.inputs.remarks, *(judge.remarks() if judge else [])]
            remarks += not_rewarded(notes.get("reward_failed", {}))
            remarks += not_better(notes["before"], out.metrics.last, out.best.step)
            summary = {
                "iterations": total,
                **_judged(method, notes),
                "kl_coef": float(loop.kl_coef),
                **out.calibration(config),
            }
            return out.finish(summary, remarks, done)


def train(out: Run, method: Method, loop: LoopState, notes: dict[str, Any]) -> tuple[LoopState, dict[str, Any]]:
    """The iterations from out.start on, up to a limit (`guards`).

    `notes` are {before, after}, the evaluation before training and that of the kept policy; and where there are such
    reward_scale, that of the reward models; judged, what a judge was asked; alarm, the iteration after which one was
    given; why the run ended (stopped) and after how many iterations; reward_failed, how many iterations and
    evaluations were skipped for that; first, the first evaluation there is, if the one before training was skipped;
    and unevaluated, if a reward failed in the evaluation after out.start.
    """
    config, settings, total, mark = method.config, method.settings, out.total, out.metrics.parts.mark
    rates = learning_rates(method.programs.schedule)
    begins = not notes
    if (judge := method.inputs.judge) is not None and "judged" in notes:
        judge.restore(notes["judged"])
    if begins and settings.reward_standardize != "off":
        notes = {"reward_scale": guards.first_scale(method, loop)}
    if "reward_scale" in notes:
        method = guards.on_scale(method, notes["reward_scale"])
        loop = guards.critic_on_scale(method, loop) if begins else loop
    if begins:
        notes = _evaluated(out, method, loop, 0, notes)
        out.save_if_due(0, loop.tree(), _judged(method, notes))
    if "unevaluated" in notes:
        notes = _evaluated(out, method, loop, out.start, {n: note for n, note in notes.items() if n != "unevaluated"})
    mark("start")
    drawn_tokens: list[jax.Array] = []  # of each iteration since the last line
    for i in range(out.start, total):
        if "stopped" in notes:
            break
        key, unchanged, step = key_at(method, "training", i), loop, i + 1
        evaluates = step == total or (config.run.eval_every and step % config.run.eval_every == 0)
        loop, batch, drawn = next_batch(method, unchanged, i, key, mark)
        if drawn is not None:
            out.skips.drawn[i] = drawn.where
        try:
            loop, metrics, table = iterate(method, loop, batch, key, drawn, mark)
        except (RewardFailure, WrongRewards) as error:
            mark("reward")
            loop = _without_reward(out, method, unchanged, loop, i, notes, error)
            notes = _failed(notes, "iterations")
        except NotFinite as error:
            raise UserError(f"step {step}: {error}; rows {out.skips.rows(step)}") from error.__cause__
        else:
            out.metrics.advance(step, metrics, method.steps)
            drawn_tokens.append(table["rollout"].mask.sum())
            show = settings.num_samples > 0 and step % settings.sample_every == 0
            if show or step % config.run.log_every == 0 or evaluates:  # which may end the run
                host, write = {"optim/lr": rates(i)}, partial(_write_samples, out, method, step, batch)
                samples = table if show else None
                out.metrics.log(step, metrics, host, tokens=drawn_tokens, table=samples, on_table=write)
                drawn_tokens = []
        notes = _judged(method, notes)
        if evaluates:
            notes = _evaluated(out, method, loop, step, notes)
            mark("evaluation")
        out.save_if_due(step, loop.tree(), _judged(method, notes))
        mark("save")
    return loop, notes


def _judged(method: Method, notes: dict[str, Any]) -> dict[str, Any]:
    """The notes with what the judge, if there is one, was asked so far, by processes before this one too."""
    judge = method.inputs.judge
    return notes if judge is None else {**notes, "judged": judge.counts()}


def _failed(notes: dict[str, Any], what: str) -> dict[str, Any]:
    """The notes with one more of the iterations or evaluations whose reward failed."""
    failed = {"iterations": 0, "evaluations": 0, **notes.get("reward_failed", {})}
    return {**notes, "reward_failed": {**failed, what: failed[what] + 1}}


def _write_samples(out: Run, method: Method, step: int, batch: Batch, table: Table) -> None:
    out.metrics.samples(step, sample_rows(method, table, batch, method.settings.num_samples))


def _ends_the_run(method: Method, error: UserError) -> bool:
    """Whether a reward's failure does; else its batch is left out."""
    return method.config.reward.on_failure == "stop" or isinstance(error, WrongRewards)


def _without_reward(
    out: Run, method: Method, before: LoopState, loop: LoopState, i: int, notes: dict[str, Any], error: UserError
) -> LoopState:
    """What follows iteration i, whose reward failed: its batch is skipped, or the run ends, saved as it was before."""
    if _ends_the_run(method, error):
        out.save_now(i, before.tree(), notes)
        raise UserError(f"iteration {i + 1}: {error}; then {out.how_to_continue()}") from error
    out.metrics.flush()
    out.metrics.write(i + 1, {"rollout/skipped": 1.0})
    out.say(f"{out.stage}: iteration {i + 1} is skipped: {error}")
    out.metrics.bar.update(1)
    # The updates that were not taken are counted, so that the learning rate goes on.
    return replace(loop, state=replace(loop.state, step=loop.state.step + method.steps))


def _evaluated(out: Run, method: Method, loop: LoopState, step: int, notes: dict[str, Any]) -> dict[str, Any]:
    """Log an evaluation and its samples; the notes with what it changes.

    The best one has the highest reward less KL at the configured kl_coef: reward alone would pick the most
    over-optimised policy. While none was finite, the last one is kept. One beyond a limit is never the best.
    """
    out.metrics.flush()
    if not method.inputs.held_out:
        guards.check(method, {})
        return {"before": {}, "after": {}, **notes}
    out.metrics.bar.doing("evaluating")
    try:
        results, samples = evaluate(method, loop)
    except (RewardFailure, WrongRewards) as error:
        if _ends_the_run(method, error):
            if step:
                out.save_now(step, loop.tree(), {**notes, "unevaluated": True})
            raise UserError(f"evaluation after iteration {step}: {error}; then {out.how_to_continue()}") from error
        out.say(f"{out.stage}: the evaluation after iteration {step} is skipped: {error}")
        return _failed({"before": {}, "after": {}, **notes}, "evaluations")
    out.metrics.write(step, results)
    out.metrics.samples(step, samples)
    notes = {"before": results, "after": results, **notes}
    if not notes["before"]:
        notes = {"first": results, **notes}
    first = notes["before"] or notes["first"]
    if first is results:
        guards.check(method, results)
    if why := guards.beyond(method.settings, first, results):
        notes |= {"iterations": step, "stopped": why}
        out.say(f"{out.stage}: stopped after iteration {step}: {why}")
    elif (line := guards.alarm(first, results)) and "alarm" not in notes:
        notes["alarm"] = step
        out.say(f"{out.stage}: iteration {step}: {line}")
    best = out.best.keep(step, float("nan") if why else results["eval/objective"])
    return {**notes, "after": results} if best or out.best.step is None else notes
