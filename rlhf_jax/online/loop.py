"""The loop of every method that learns from its own samples: iterations, evaluations, tables, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.errors import UserError
from rlhf_jax.inference.reward_functions import RewardFailure
from rlhf_jax.online.stage import Online
from rlhf_jax.runs.directory import names_given
from rlhf_jax.runs.run import Run
from rlhf_jax.training.claim import claim_directory
from rlhf_jax.training.loop import check_trained, describe
from rlhf_jax.training.state import learning_rates

SHOWN = ("rollout/reward", "rollout/gold", "rollout/kl", "time/tokens_per_s")


def run(stage: str, config: Any, method: Callable[..., Online], **overrides: Any) -> dict[str, Any]:
    """Train `method(config, **overrides)` and write the run directory; returns its summary.

    The summary has `before` and `after`: the first evaluation and that of the policy that is kept.
    """
    given = names_given(**overrides)
    finished, files = claim_directory(stage, config, given)
    if finished is not None:
        return finished
    online = method(config, **overrides)
    total = online.settings.iterations
    tokens = config.data.batch_size * config.sampling.max_new_tokens
    with jax.set_mesh(online.mesh.grid):
        facts = {"new_tokens_per_iteration": tokens, "prompts_left_over_by_each_epoch": online.batches.left_over}
        describe(stage, online.mesh, online.nets.policy, iterations=total, **facts)
        with Run(stage, config, total=total, shown=SHOWN, given=given, files=files, agree_every=1) as out:
            tree, notes = out.restore(online.tree(), online.identity())
            online.put_tree(tree)
            out.rows_of = online.batches.where
            notes = train(out, online, notes)
            updates = total * online.settings.epochs * online.settings.minibatches
            check_trained(out.skipped, updates, out.dir)
            online.save(out.dir, out.restore_best(online.to_save()))
            return out.finish({"iterations": total, **notes, "kl_coef": float(online.kl_coef)})


def train(out: Run, online: Online, notes: dict[str, Any]) -> dict[str, Any]:
    """The iterations from out.start on. `notes` {before, after}: the first evaluation and that of the kept policy."""
    config, settings, total = online.config, online.settings, out.total
    tokens = config.data.batch_size * config.sampling.max_new_tokens
    rates = learning_rates(online.programs.schedule, total)
    if not notes:
        before, _ = _evaluate(out, online, 0)
        notes = {"before": before, "after": before}
        out.save_if_due(0, online.tree(), notes)
    out.restart_clock()
    logged = out.start
    for i in range(out.start, total):
        done = _iterate(out, online, i, notes)
        show = done is not None and settings.num_samples and (i + 1) % settings.sample_every == 0
        if done is not None and (show or (i + 1) % config.run.log_every == 0 or i + 1 == total):
            metrics, host, table = done
            prompts = online.batch(i)["given"] if show else []
            write = lambda fetched, i=i, prompts=prompts: out.samples(i + 1, online.table(fetched, prompts))  # noqa: E731
            host["optim/lr"] = rates[i]
            new = tokens * (i + 1 - logged)
            out.log(i + 1, metrics, host, tokens=new, table=table if show else None, on_table=write)
            logged = i + 1
        if i + 1 == total or (config.run.eval_every and (i + 1) % config.run.eval_every == 0):
            results, kept = _evaluate(out, online, i + 1)
            notes = {**notes, "after": results if kept else notes["after"]}
            out.restart_clock()
        out.save_if_due(i + 1, online.tree(), notes)
    return notes


def _iterate(out: Run, online: Online, i: int, notes: dict[str, Any]) -> tuple[Any, dict[str, float], Any] | None:
    """Iteration i, or None if its reward failed and the batch is to be skipped."""
    try:
        done = online.iteration(i)
    except RewardFailure as error:
        if online.config.reward.on_failure == "stop":
            out.save_now(i, online.tree(), notes)
            raise UserError(f"iteration {i + 1}: {error}; then {out.how_to_continue()}") from error
        out.flush()
        out.write(i + 1, {"rollout/skipped": 1.0})
        out.say(f"{out.stage}: iteration {i + 1} is skipped: {error}")
        online.skip_update()
        out.bar.update(1)
        return None
    out.advance(i + 1, done[0]["optim/skipped"], online.settings.epochs * online.settings.minibatches)
    return done


def _evaluate(out: Run, online: Online, step: int) -> tuple[dict[str, float], bool]:
    """Log an evaluation and its samples; returns it and whether its policy is the one to keep.

    The best one has the highest reward less KL at the configured kl_coef: reward alone would pick the most
    over-optimised policy. While none was finite, the last one is kept.
    """
    out.flush()
    try:
        results, samples = online.evaluate()
    except RewardFailure as error:
        if online.config.reward.on_failure == "stop":
            raise UserError(f"evaluation after iteration {step}: {error}; then {out.how_to_continue()}") from error
        out.say(f"{out.stage}: the evaluation after iteration {step} is skipped: {error}")
        return {}, False
    out.write(step, results)
    out.samples(step, samples)
    best = out.keep_if_best(step, results["eval/objective"])
    return results, best or out.best.step is None
