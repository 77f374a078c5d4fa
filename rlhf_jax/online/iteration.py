"""One iteration of a method, and its evaluation: functions of the method and of what the loop carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from rlhf_jax.data.collate import Batch
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizer import BROKEN, HIDDEN
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judges import plain_text
from rlhf_jax.hosts.processes import to_host
from rlhf_jax.inference.generate import decode
from rlhf_jax.inference.intervals import mean_and_error
from rlhf_jax.inference.reward_functions import call_reward, of_own_rows
from rlhf_jax.keys import NUMBERS, Purpose
from rlhf_jax.online.core import Scored
from rlhf_jax.online.cut import Drawn, empty_pool, gather
from rlhf_jax.online.method import Method
from rlhf_jax.online.pool import Pool
from rlhf_jax.runs.parts import Mark, unmarked
from rlhf_jax.sharding import put, put_batch, replicated
from rlhf_jax.training.nans import first_nan
from rlhf_jax.training.state import TrainState, in_float32
from rlhf_jax.types import Metrics, Params, Rollout

Table = dict[str, Any]
"""What a table of samples is made of: "rollout" and numbers per row by name, as "reward"."""


UNSHOWN = {"rollout/hidden_fraction": HIDDEN, "rollout/broken_fraction": BROKEN}
"""Metric -> which of the responses it is the share of (`Tokenizer.unshown`)."""


class NotFinite(UserError):
    """An update with a loss or gradient that is not finite, under faults.debug_nans; says which operation made it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoopState:
    """All arrays that an iteration changes.

    Attributes:
        state: the training state; its parameters are {"policy": ...} and what else the method trains.
        kl_coef: float32[], the price of a nat.
        average: the averaged policy, float32; None without `ema_decay`.
        pool: rows under way; None unless rows are cut (`sampling.budget`).
    """

    state: TrainState
    kl_coef: jax.Array
    average: Params | None = None
    pool: Pool | None = None

    @property
    def policy(self) -> Params:
        """The policy that is evaluated and saved: the average if there is one."""
        policy = self.state.params["policy"]
        return policy if self.average is None else jax.tree.map(lambda a, p: a.astype(p.dtype), self.average, policy)

    def tree(self) -> dict[str, Any]:
        """What a checkpoint holds; LoopState(**tree) is the way back."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def kept(self, method: Method) -> dict[str, Any]:
        """The part of `tree` that the models at the end are made of."""
        critic, tree = method.nets.critic is not None, {} if self.average is None else {"average": self.average}
        needed = {"policy": self.average is None or (critic and method.nets.models.shared_trunk), "value": critic}
        params = {name: self.state.params[name] for name in needed if needed[name]}
        return {**tree, "state": {"params": params}} if params else tree


def first_state(method: Method, state: TrainState) -> LoopState:
    """What the loop carries at first; `state` becomes a part of it."""
    average = jax.tree.map(jnp.copy, in_float32(state.params["policy"])) if method.settings.ema_decay else None
    pool = empty_pool(method) if method.config.sampling.cut else None
    return LoopState(state, put(np.float32(method.settings.kl_coef), replicated(method.mesh)), average, pool)


def key_at(method: Method, purpose: Purpose, index: int) -> jax.Array:
    """The key of an iteration or of a held-out batch; integers go to the device explicitly, for transfer guards."""
    key = method.inputs.key
    for number in (NUMBERS[purpose], index):
        key = jax.random.fold_in(key, put(np.uint32(number), key.sharding))
    return key


def next_batch(
    method: Method, loop: LoopState, i: int, key: jax.Array, mark: Mark = unmarked
) -> tuple[LoopState, Batch, Drawn | None]:
    """The batch of iteration i, for `iterate` with the same key; where rows are cut the responses as well, and a loop
    whose pool is without them.
    """
    cut = method.programs.cut
    if cut is None or loop.pool is None:
        batch = method.batch(i)
        mark("data")
        return loop, batch, None
    policy = method.nets.policy.whole(loop.state.params["policy"])
    pool, batch, drawn = gather(method, cut, policy, loop.pool, i, jax.random.split(key, 3)[0], mark)
    return replace(loop, pool=pool), batch, drawn


def iterate(
    method: Method,
    loop: LoopState,
    batch: Batch,
    key: jax.Array,
    drawn: Drawn | None = None,
    mark: Mark = unmarked,
) -> tuple[LoopState, Metrics, Table]:
    """Rollout, score, update, averaged policy: (the next state, metrics, the arrays of a table of samples).

    `mark` is told when rollout, reward (in Python), score and update end.

    `batch` is of `method.batch`; responses that are `drawn` are taken as they are. The arrays of `loop.state` are
    donated; all that is returned lies on the devices.

    Raises:
        RewardFailure: a Python reward failed; `loop` is as it was.
        NotFinite: under faults.debug_nans.
    """
    rollout_key, update_key, again_key = jax.random.split(key, 3)
    again = again_key if method.redraws else None
    given = None if drawn is None else drawn.rollout
    rollout, scored, gold = roll_out(method, loop, loop.state.params["policy"], batch, rollout_key, again, given, mark)
    experience, kl_coef, metrics, per_row = scored
    temperature, update = method.temperature, method.programs.update
    arguments = (loop.state, experience, update_key, temperature, batch.get("ptx"), method.nets.frozen)
    state, updates = update(*arguments)
    if method.config.faults.debug_nans and updates["optim/skipped"] > 0:
        raise NotFinite(first_nan(update, *arguments))
    mark("update", updates["optim/skipped"])
    average = loop.average
    if average is not None:
        average = method.programs.average(average, state.params["policy"])
    counts = {} if drawn is None else drawn.counts
    if gold is not None:
        counts = {**counts, "rollout/gold": gold}
    counted = {name: put(np.float32(number), replicated(method.mesh)) for name, number in counts.items()}
    metrics = {**metrics, **updates, **counted}
    return LoopState(state, kl_coef, average, loop.pool), metrics, {"rollout": rollout, **per_row}


def roll_out(
    method: Method,
    loop: LoopState,
    policy: Params,
    batch: Batch,
    key: jax.Array,
    again: jax.Array | None = None,
    drawn: Rollout | None = None,
    mark: Mark = unmarked,
) -> tuple[Rollout, Scored, float | None]:
    """A rollout of a batch of prompts with `policy` (without what is kept), its score, and its mean gold reward.

    One that is `drawn` already is taken as it is.
    With `again`, a key, groups whose responses are paid alike are drawn again, method.redraws times at most, and
    counted in group/drawn_again. Their Python rewards alone are asked for anew.
    """
    nets, programs, law, mesh = method.nets, method.programs, method.inputs.law, method.mesh
    placed, params = put_batch(mesh, (batch["tokens"], batch["mask"])), {**loop.state.params, "policy": policy}
    rows, redrawn, more = len(batch["prompts"]), 0, range(0 if again is None else method.redraws)
    valid = np.asarray(batch.get("valid", np.ones(rows, bool)))  # others fill a batch up
    samples = rows // len(batch["tokens"])
    noises = [] if again is None else [jax.random.fold_in(again, put(np.uint32(i), again.sharding)) for i in more]

    def draw(key: jax.Array, wanted: np.ndarray) -> Rollout:
        """With `wanted`, bool[B], which says it of whole groups, others have empty rows."""
        active = put_batch(mesh, wanted[::samples]) if noises else None
        made = programs.rollout(nets.policy.whole(policy), *placed, key, law, active, samples)
        mark("rollout", made.mask)
        return made

    def score() -> Scored:
        host = put_batch(mesh, paid.rewards)
        law = loop.kl_coef, method.temperature
        return programs.score(params, nets.ref, nets.reward, rollout, host, *law, nets.teacher)

    rollout = draw(key, np.ones(rows, bool)) if drawn is None else drawn
    paid = python_rewards(method, batch, rollout, key, valid)
    if method.inputs.judge is not None and "valid" not in batch:  # `evaluate` looks at all that is held out
        method.inputs.judge.check_answered(paid.rewards)
    mark("reward")
    scored = score()
    mark("score", scored[3]["reward"])
    for noise in noises:
        wanted = to_host(scored[3]["alike"])
        if not wanted.any():
            break
        redrawn += int(wanted.sum()) // method.group_size
        new = draw(noise, wanted)
        rollout = replaced(rollout, new, put_batch(mesh, wanted))
        paid = python_rewards(method, batch, rollout, noise, wanted, paid)
        mark("reward")
        scored = score()
        mark("score", scored[3]["reward"])
    if noises:
        scored[2]["group/drawn_again"] = put(np.float32(redrawn), replicated(mesh))
    scored[2].update({name: put(np.float32(number), replicated(mesh)) for name, number in paid.counts.items()})
    gold = None if paid.golds is None else float(paid.golds[valid].mean())
    return replace(rollout, kept=None, experts=None), scored, gold


@jax.jit
def replaced(old: Rollout, new: Rollout, rows: Bool[Array, " B"]) -> Rollout:
    """A rollout with some rows of another one to the same prompts."""
    return jax.tree.map(lambda o, n: jnp.where(rows.reshape(-1, *[1] * (o.ndim - 1)), n, o), old, new)


class Paid(NamedTuple):
    """What Python says of responses.

    Attributes:
        rewards: f32[B], a judge's among them; NaN where it gave no answer, 0 without any Python reward.
        golds: f32[B]; None without a gold function.
        counts: metrics of what rewards that read texts said nothing of, or did not see; empty where none does.
    """

    rewards: np.ndarray
    golds: np.ndarray | None
    counts: dict[str, float]


def python_rewards(
    method: Method,
    batch: Batch,
    rollout: Rollout,
    key: jax.Array,
    wanted: np.ndarray | None = None,
    earlier: Paid | None = None,
) -> Paid:
    """Python rewards of a rollout, and the gold ones; text leaves the device if needed.

    What a judge writes is drawn with a branch of the rollout's `key`. Only the rows that are wanted, bool[B], are
    asked for; the others have what they had `earlier`.
    """
    inputs, source, mesh = method.inputs, method.config.reward, method.mesh
    wanted = np.ones(len(batch["prompts"]), bool) if wanted is None else wanted
    paid = np.zeros(len(wanted), np.float32)
    before, judge = earlier or Paid(paid, None, {}), inputs.judge
    if inputs.reward is None and judge is None and inputs.gold is None:
        return before
    texts, unshown = decode(inputs.tokenizer, rollout, batch["given"])
    rows, counts, golds = (batch["prompts"], texts, batch["columns"]), dict[str, float](), before.golds
    if inputs.reward is not None:
        paid = paid + of_own_rows(inputs.reward, mesh, *rows, wanted=wanted)
    if judge is not None:
        asked = [plain_text(prompt) for prompt in batch["given"]], *rows[1:]
        ask = partial(judge, key=jax.random.fold_in(key, put(np.uint32(NUMBERS["judge"]), key.sharding)))
        paid = paid + of_own_rows(ask, mesh, *asked, wanted=wanted, everywhere=judge.everywhere)
    rewards = np.where(wanted, paid, before.rewards)
    if judge is not None:
        counts["rollout/unanswered"] = float(np.isnan(rewards).sum())
    if judge is not None or inputs.reward is not None:
        counts |= {name: unshown[what] / len(texts) for name, what in UNSHOWN.items()}
    if inputs.gold is not None:
        of_gold = partial(call_reward, inputs.gold, timeout=source.timeout, retries=source.retries)
        of_wanted = of_own_rows(of_gold, mesh, *rows, wanted=wanted)
        golds = of_wanted if golds is None else np.where(wanted, of_wanted, golds)
    return Paid(rewards, golds, counts)


def evaluate(method: Method, loop: LoopState) -> tuple[dict[str, float], list[Row]]:
    """eval/reward, kl, objective, gold and reward_disagreement over the held-out prompts; and samples.

    Responses of which a judge said nothing are counted in eval/unanswered, and left out of reward and objective.
    """
    parts: list[dict[str, np.ndarray]] = []
    golds, weights, prompts = [], [], list[str]()
    samples: list[Row] = []
    for batch, table, rows, gold in held_out(method, loop):
        parts.append(rows)
        golds.append(gold or 0.0)
        weights.append(batch["valid"].sum())
        valid = batch["valid"].sum()  # behind it are copies, which fill a batch up
        prompts += batch["prompts"][:valid]
        if (wanted := method.settings.num_samples - len(samples)) > 0:
            samples += sample_rows(method, to_host(table), batch, min(valid, wanted))
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    metrics, known = dict[str, float](), np.ones(len(prompts), bool)
    if method.inputs.judge is not None:
        method.inputs.judge.check_answered(rows["reward"])
        known = ~np.isnan(rows["reward"])
        metrics["eval/unanswered"] = float((~known).sum())
    reward = objective = rows["reward"][known]
    if "kl" in rows:
        objective = reward - method.settings.kl_coef * rows["kl"][known]
    mean, error = mean_and_error(reward, list(compress(prompts, known)))
    metrics |= {
        "eval/reward": mean,
        "eval/reward_se": float("nan") if error is None else error,
        **({"eval/kl": float(rows["kl"].mean())} if "kl" in rows else {}),
        "eval/objective": float(objective.mean()),
    }
    if "members" in rows and rows["members"].shape[1] > 1:
        metrics["eval/reward_disagreement"] = float(rows["members"].std(axis=1).mean())
    if method.inputs.gold is not None:
        metrics["eval/gold"] = float(np.average(golds, weights=weights))
    return metrics, samples


def held_out(method: Method, loop: LoopState) -> Iterator[tuple[Batch, Table, dict[str, np.ndarray], float | None]]:
    """(a held-out batch, its responses, the numbers of its valid rows, mean gold), the same noise every time."""
    policy = loop.policy
    for i, batch in enumerate(method.inputs.held_out):
        key, _ = jax.random.split(key_at(method, "evaluation", i))  # as in `iterate`, so that nothing compiles anew
        rollout, (_, _, _, per_row), gold = roll_out(method, loop, policy, batch, key)
        rows = {name: x[batch["valid"]] for name, x in to_host(per_row).items()}
        yield batch, {"rollout": rollout, **per_row}, rows, gold


def sample_rows(method: Method, table: Table, batch: Batch, count: int) -> list[Row]:
    """The first `count` rows of a batch as sft rows, with reward and, where there is a reference, kl, of its fetched
    table.
    """
    rollout, rows = table["rollout"], list[Row]()
    for i, (prompt, seen) in enumerate(zip(batch["given"][:count], batch["seen"], strict=False)):
        ids = rollout.tokens[i][rollout.mask[i]].tolist()
        text = method.inputs.tokenizer.response_text(ids, prompt)
        row = {"prompt": prompt, **seen, "response": text, "response_ids": ids, "finished": bool(rollout.finished[i])}
        numbers = {name: float(table[name][i]) for name in ("reward", "kl") if name in table}
        rows.append({**row, **{name: None if np.isnan(x) else x for name, x in numbers.items()}})
    return rows
