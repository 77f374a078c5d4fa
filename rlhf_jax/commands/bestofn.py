"""`rlhf-jax bestofn`: of n responses to each prompt, the one that a reward likes best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.advantages import best_of_n_kl
from rlhf_jax.commands.collect import claim, end
from rlhf_jax.config import BestOfNArgs
from rlhf_jax.data.consensus import best_of_n
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.pairs import answer_fields
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.phases import Phases, digest
from rlhf_jax.feedback.report import mean_of
from rlhf_jax.feedback.sources import Sources, check_rewards, prompts_of
from rlhf_jax.runs.directory import names_given


def run(
    config: BestOfNArgs,
    *,
    rows: Any = None,
    functions: Sequence[Callable[..., Any]] | None = None,
    gold: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Sample, score, write the best rows to config.output; prints the rewards of best-of-n and returns the summary.

    `rows` (dicts with a prompt), `functions` and `gold` replace those that the config names.
    """
    if not (functions or config.reward.model or config.reward.functions):
        raise UserError("nothing says which response is best; give reward.model or reward.functions")
    prompts = prompts_of(config, rows)
    check_rewards(config, prompts, functions, gold)
    given = list(names_given(functions=functions))
    with claim(config, {"prompts": digest(prompts), "given in Python": given}) as journal:
        phases = Phases(journal)
        work = Sources(config, prompts, phases)
        work.draw(0)
        scores = work.score(functions)
        phases.fill("bestofn", progress=config.progress)
        found = [phases.row(scores, i)["scores"] for i in range(len(prompts))]
        golds = np.array(work.gold(gold)) if gold is not None or config.reward.gold else None
        proxy = np.array(found, float)  # NaN where the reward failed and the batch is skipped
        known = np.flatnonzero(~np.isnan(proxy).any(axis=1)).tolist()
        if not known:
            raise UserError("the reward failed on every prompt; mend it and give the command again")
        out = [best_row(prompts[i], work.responses(i), proxy[i], None if golds is None else golds[i]) for i in known]
        keys = [prompt_key(prompts[i]) for i in known]
        curve = curve_of(proxy[known], None if golds is None else golds[known], keys)
        summary = {"prompts": len(known), "samples": config.num_samples, "curve": curve}
        end("bestofn", config, journal, out, summary)
    return summary


def best_row(prompt: Row, responses: Sequence[Row], scores: np.ndarray, golds: np.ndarray | None) -> Row:
    """An sft row, with score and perhaps gold, of the best response, of equals the first."""
    i = int(scores.argmax())
    kept = {name: prompt[name] for name in ("id",) if name in prompt}
    row = {**kept, "prompt": prompt["prompt"], **answer_fields(responses[i])}
    return {**row, "score": float(scores[i]), **({} if golds is None else {"gold": float(golds[i])})}


def curve_of(proxy: np.ndarray, gold: np.ndarray | None, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """{n, kl, proxy, gold?} for n = 1, 2, 4 .. N of scores [B, N]; the rewards are {mean, se} over `prompts` [B].

    Every n is estimated from all N samples (`rankings.best_of_n`). kl, nats, is exact where no two samples tie.
    """
    num = proxy.shape[1]
    rewards = {"proxy": proxy, **({} if gold is None else {"gold": gold})}
    return [
        {
            "n": n,
            "kl": float(best_of_n_kl(n)),
            **{name: mean_of(best_of_n(proxy, values, n)[:, None], prompts) for name, values in rewards.items()},
        }
        for n in sorted({*(2**i for i in range(num.bit_length())), num})
        if n <= num
    ]
