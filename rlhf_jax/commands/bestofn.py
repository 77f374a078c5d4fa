"""`rlhf-jax bestofn`: of n responses to each prompt, the one that a reward likes best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.advantages import best_of_n_kl
from rlhf_jax.config import BestOfNArgs
from rlhf_jax.data.consensus import best_of_n
from rlhf_jax.data.examples import prompt_key
from rlhf_jax.data.pairs import answer_fields
from rlhf_jax.data.rows import Row, carried
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.phases import Phases, digest, named, open_journal
from rlhf_jax.feedback.report import mean_of, write_and_tell
from rlhf_jax.feedback.scorer import check_scorers
from rlhf_jax.feedback.sources import SAMPLED, Sources, check_rewards, prompts_of, within_limits
from rlhf_jax.inference.generate import total_length
from rlhf_jax.runs.directory import Summary, names_given
from rlhf_jax.types import RewardFn


def run(
    config: BestOfNArgs,
    *,
    rows: object = None,
    functions: Sequence[RewardFn] | None = None,
    gold: RewardFn | None = None,
) -> Summary:
    """Sample, score, write the best rows to config.output; prints the rewards of best-of-n and returns the summary.

    `rows` (dicts with a prompt), `functions` and `gold` replace those that the config names.
    """
    prompts = checked_prompts(config, rows, functions, gold)
    output, prompts = named(config.output), within_limits(config, prompts)
    decided_by = {"prompts": digest(prompts), "given in Python": names_given(functions=functions)}
    with open_journal(config, output, decided_by) as journal:
        phases = Phases(journal)
        sources = Sources(config, prompts, phases)
        sources.draw(0)
        scored = sources.score(functions)
        phases.fill("bestofn", progress=config.progress)

        # [prompts, samples], NaN where the reward failed (on_failure skip) or a judge gave no answer.
        proxy = np.array([row["scores"] for row in scored.rows], float)
        known = np.flatnonzero(~np.isnan(proxy).all(axis=1)).tolist()
        golds = sources.gold(gold)
        if not known:
            raise UserError("the reward failed on every prompt; mend it and give the command again")
        rewards = {"proxy": proxy} if golds is None else {"proxy": proxy, "gold": np.array(golds)}
        curve = curve_of(rewards, [prompt_key(prompt) for prompt in prompts])
        out: list[Row] = []  # sft rows
        for i in known:
            best = int(np.nanargmax(proxy[i]))  # of equals the first
            told = {
                name: float(values[i][best]) for name, values in zip(("score", "gold"), rewards.values(), strict=False)
            }
            out.append({**carried(prompts[i]), **answer_fields(sources.responses(i)[best]), **told})
        lost = {"without_score": len(prompts) - len(known)} if len(known) < len(prompts) else {}
        summary: Summary = {"prompts": len(known), "samples": config.num_samples, "curve": curve}
        summary |= {**sources.unscored(), **lost}
        write_and_tell("bestofn", journal, out, summary)
    return summary


def checked_prompts(
    config: BestOfNArgs, rows: object, functions: Sequence[RewardFn] | None, gold: RewardFn | None
) -> list[Row]:
    """The prompts; a UserError if there is no reward, or one that cannot be asked about them."""
    if not (functions or config.reward.named()):
        raise UserError("nothing says which response is best; give reward.model, reward.judge or reward.functions")
    prompts = prompts_of(config, rows)
    check_rewards(config, prompts, functions, gold)
    check_scorers(config.reward, total_length(config.sampling, config.max_prompt_length), SAMPLED)
    return prompts


def curve_of(rewards: dict[str, np.ndarray], prompts: Sequence[str]) -> list[Summary]:
    """{n, kl, proxy, gold?} for n = 1, 2, 4 .. N, of rewards {proxy, gold?} [B, N]: their {mean, se} over `prompts`.

    Every n is estimated from all N samples (`consensus.best_of_n`), ordered by the proxy; one without a proxy (NaN) is
    never the best. kl, in nats, is exact where all have one and no two tie.
    """
    proxy = rewards["proxy"]
    num = proxy.shape[1]
    return [
        {
            "n": n,
            "kl": float(best_of_n_kl(n)),
            **{name: mean_of(best_of_n(proxy, values, n)[:, None], prompts) for name, values in rewards.items()},
        }
        for n in sorted({*(2**i for i in range(num.bit_length())), num})
        if n <= num
    ]
