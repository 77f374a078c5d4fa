"""What went wrong in a run, in words: a table of what to watch, each with its evidence and a cure.

Two levels: "wrong" is an accusation, "look" asks for a look. The limits are the module's constants. A metric alone is
seldom a fault (entropy falls where one answer is right, length rises where reasoning pays), so most accusations ask
for a second sign: the objective or the gold reward that did not rise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.runs.curves import smooth
from rlhf_jax.runs.report.evidence import LOWER, Finding, gained, improved, move, rate_of, span
from rlhf_jax.runs.report.reading import RunData, Series

CLIPPED, FAR_CLIPPED = 0.3, 0.5
"""Mean share of clipped tokens, and that of the first iterations, which is of a step far too large."""
FAR_KL = 0.2
"""Nats per token between the policy before and after the updates of one of the first iterations."""
RUSH = 10.0
"""Nats per response that the KL rose, beyond which a reward that pays less than the KL costs is a rush."""
COLLAPSED = 0.1
"""Share of the first entropy, below which it has collapsed."""
DRIFT, GROWN = 1.15, 1.5
"""Times the first length: what counts where length is paid, and what asks for a look."""
CUT, HALF_CUT = 0.15, 0.35
"""Share of responses that did not end by themselves."""
EQUAL, MOST_EQUAL = 0.5, 0.85
"""Share of groups whose rewards are all one and the same."""
APART = 1.5
"""Times the first disagreement of an ensemble."""
TOGETHER = 0.5
"""Correlation of the rewards of samples with their lengths, within an iteration."""
FEW = 8
"""Logged values below which a trend is not judged."""


class Watch(NamedTuple):
    """What to watch: `check` is asked where the run has one of `metrics`; the page shows it beside what is healthy."""

    name: str
    metrics: tuple[str, ...]
    healthy: str
    check: Callable[[RunData, Series], Finding | None]


def rate_online(run: RunData, kl: Series) -> Finding | None:
    """Steps so large that the policy is thrown away from where its samples came."""
    clipped = run.series("policy/clip_fraction")
    early = slice(0, 5)
    far = float(kl.values[early].mean()) > FAR_KL
    clips = clipped is not None and float(clipped.values[early].mean()) > FAR_CLIPPED
    if not (far or clips) or improved(run):
        return None
    objective = gained(run)
    said = [f"the updates of the first iterations moved the policy by {kl.values[early].mean():.3g} nats per token"]
    if clipped is not None:
        said.append(f"{clipped.values[early].mean():.0%} of the tokens were clipped (a few percent is ordinary)")
    if objective is not None:
        said.append(move(objective, "reward less KL"))
    cure = f"{rate_of(run)}: {LOWER}; fewer epochs, or a target_kl, end an iteration that goes too far"
    return Finding("wrong", "The learning rate is far too high", "; ".join(said), cure)


def rate_rows(run: RunData, loss: Series) -> Finding | None:
    """A loss that ends above where it began."""
    start = float(loss.values[:3].mean())
    worst = int(np.argmax(loss.values))
    if len(loss.values) < FEW or not (loss.last > 1.1 * abs(start) + 1e-9 and loss.last > start):
        return None
    said = (
        f"the loss went up from {start:.3g} to {loss.last:.3g} (steps {span(loss)}), highest {loss.values[worst]:.3g} "
        f"at {loss.steps[worst]:g}"
    )
    return Finding("wrong", "The learning rate is far too high", said, f"{rate_of(run)}: {LOWER}")


def skipped(run: RunData, series: Series) -> Finding | None:
    """Updates that were not finite."""
    share = float((series.values > 0).mean())
    if not share:
        return None
    where = series.steps[series.values > 0]
    said = f"{share:.0%} of the logged steps had a loss or gradient that was not finite, the first at {where[0]:g}"
    cure = f"lower {rate_of(run)}; --faults.debug_nans true names the operation"
    return Finding("wrong" if share > 0.05 else "look", "Updates were not finite and were left out", said, cure)


def kl_rush(run: RunData, kl: Series) -> Finding | None:
    """A KL that costs more than the reward it buys, or that nothing holds."""
    gold, reward = run.series("rollout/gold", "eval/gold"), run.series("rollout/reward")
    price = run.settings.get("kl_coef")
    said = [move(kl, "the KL to the reference")]
    said += [move(reward, "the reward")] if reward is not None else []
    said += [move(gold, "the gold reward, which training never sees,")] if gold is not None else []
    objective = gained(run)
    if price and kl.last - kl.first > RUSH and objective is not None and not objective.rose():
        said.append(move(objective, "reward less KL"))
        cure = f"raise kl_coef ({price:g}), lower {rate_of(run)}, or set kl_budget to what KL you can afford"
        return Finding("wrong", "The KL rushes away", "; ".join(said), cure)
    return None


def no_price(run: RunData, reward: Series) -> Finding | None:
    """A learned reward with nothing that holds the policy where the reward was learned."""
    source = run.config.get("reward")
    learned = isinstance(source, dict) and bool(source.get("model") or source.get("models"))
    if run.settings.get("kl_coef") != 0 or not learned:
        return None
    said = ["kl_coef is 0 and the reward is a model, which is right only near the responses that it was trained on"]
    for name, what in (("rollout/kl", "the KL to the reference"), ("rollout/gold", "the gold reward")):
        if (series := run.series(name)) is not None:
            said.append(move(series, what))
    said.append(move(reward, "the reward"))
    cure = "set kl_coef (0.05 for a reward model), or kl_budget; several reward models (reward.models) warn of it"
    gold = run.series("rollout/gold", "eval/gold")
    usual = run.stage == "grpo" and not (gold is not None and gold.fell())  # TRL's default, though not ours
    title = "The KL has no price: nothing holds the policy near the reference"
    return Finding("look" if usual else "wrong", title, "; ".join(said), cure)


def clips(run: RunData, clipped: Series) -> Finding | None:
    """Many clipped tokens all along."""
    if len(clipped.values) < FEW or clipped.mean <= CLIPPED:
        return None
    said = f"{clipped.mean:.0%} of the tokens were clipped on average; {move(clipped, 'the share')}"
    cure = f"lower {rate_of(run)}, or fewer epochs: clipped tokens have no gradient"
    return Finding("look" if improved(run) else "wrong", "Too many tokens are clipped", said, cure)


def critic(run: RunData, variance: Series) -> Finding | None:
    """A critic that knows nothing."""
    late, spread = variance.values[len(variance.values) // 2 :], run.series("rollout/reward_std")
    nothing_left = spread is not None and spread.last < 0.1 * spread.first  # of equal rewards there is none to explain
    if len(variance.values) < 2 * FEW or float(np.median(late)) > 0.02 or nothing_left:
        return None
    said = f"explained variance is {np.median(late):.2g} in the second half; {move(variance, 'it')}"
    cure = "raise value_optim.learning_rate, start with ppo.critic_warmup, or let it begin as the reward model"
    return Finding("look", "The critic explains nothing", said, cure)


def entropy(run: RunData, series: Series) -> Finding | None:
    """Entropy that is gone without a gain."""
    if len(series.values) < FEW or series.first <= 0 or series.last > COLLAPSED * series.first or improved(run):
        return None
    said = [move(series, "entropy per token")]
    if (objective := gained(run)) is not None:
        said.append(move(objective, "reward less KL") + ", so the certainty is not earned")
    cure = f"lower {rate_of(run)}, raise kl_coef, or add an entropy_coef of about 0.01"
    return Finding("wrong", "Entropy has collapsed: the policy says one thing only", "; ".join(said), cure)


def reward_by_length(run: RunData) -> tuple[float, int]:
    """(correlation of reward with length within an iteration, samples that say so); 0 of too few."""
    rows = [(one.step, one.length, one.reward) for one in run.samples if one.reward is not None]
    steps = {step for step, _, _ in rows}
    lengths, rewards = [], []
    for step in steps:
        group = np.array([(length, reward) for at, length, reward in rows if at == step], float)
        if len(group) > 1:
            lengths += list(group[:, 0] - group[:, 0].mean())
            rewards += list(group[:, 1] - group[:, 1].mean())
    if len(lengths) < FEW or not np.std(lengths) or not np.std(rewards):
        return 0.0, len(lengths)
    return float(np.corrcoef(lengths, rewards)[0, 1]), len(lengths)


def length(run: RunData, series: Series) -> Finding | None:
    """Responses that grow because length is paid, or that drift."""
    reward, gold = run.series("rollout/reward"), run.series("rollout/gold", "eval/gold")
    if len(series.values) < FEW or reward is None or not series.rose() or series.last < DRIFT * series.first:
        return None
    said = [move(series, "the mean length"), move(reward, "the reward")]
    within, count = reward_by_length(run)
    if count >= FEW:
        said.append(f"within an iteration, reward and length of {count} samples correlate by {within:.2f}")
    if gold is not None:
        said.append(move(gold, "the gold reward"))
    objective = gained(run)  # which does not rise where a policy is only broken, and long for that
    unearned = gold is not None and not gold.rose() and objective is not None and objective.rose()
    if reward.rose() and (within > TOGETHER or unearned):
        cure = (
            "score responses of all lengths alike (a length penalty, pairs of equal length for the reward model), set "
            "overlong_tokens, or raise kl_coef; see `rlhf-jax evaluate` for length-controlled wins"
        )
        return Finding("wrong", "The reward is hacked by length: longer responses are paid for being longer",
                       "; ".join(said), cure)  # fmt: skip
    if series.last < GROWN * series.first:
        return None
    cure = "read the samples: is what was added worth reading?"
    return Finding("look", "Responses grow", "; ".join(said), cure)


def cut(run: RunData, share: Series) -> Finding | None:
    """Responses without an end."""
    worst = max(share.mean, share.last)
    if worst < CUT or (share.last < CUT and share.fell()):
        return None
    sampling = run.config.get("sampling")
    longest = sampling.get("max_new_tokens") if isinstance(sampling, dict) else "?"
    said = f"{share.mean:.0%} of the responses were cut off after {longest} tokens; {move(share, 'the share')}"
    cure = "raise sampling.max_new_tokens; or teach the end: SFT on whole responses, missing_eos, overlong_tokens"
    title = "Half of the responses are cut off" if 0.4 < worst < 0.6 else "Many responses are cut off"
    return Finding("wrong" if worst > HALF_CUT else "look", title, said, cure)


def equal_groups(run: RunData, share: Series) -> Finding | None:
    """Groups that teach nothing."""
    reward = run.series("rollout/reward")
    solved = reward is not None and reward.rose() and share.first < EQUAL
    if share.mean < EQUAL or solved:
        return None
    said = [f"in {share.mean:.0%} of the groups all responses were paid the same, so their advantages are 0"]
    said += [move(reward, "the reward")] if reward is not None else []
    cure = (
        "take prompts that are neither always nor never solved, a finer reward, a larger group_size, a higher "
        "sampling.temperature, or redraws"
    )
    title = "All groups are equal: nothing to learn from" if share.mean > MOST_EQUAL else "Many groups are equal"
    return Finding("wrong" if share.mean > MOST_EQUAL else "look", title, "; ".join(said), cure)


def overoptimised(run: RunData, gold: Series) -> Finding | None:
    """Gold reward that falls while the one that is trained on rises."""
    proxy = run.series("rollout/reward") if len(gold.values) > FEW else run.series("eval/reward", "rollout/reward")
    if len(gold.values) < 4 or proxy is None:
        return None
    smoothed = smooth(gold.values)
    peak = int(np.argmax(smoothed))
    drop, margin = smoothed[peak] - gold.last, max(3 * gold.errors[1], 0.1 * abs(smoothed[peak] - smoothed[0]))
    after = proxy.values[proxy.steps >= gold.steps[peak]]
    rises = proxy.last > float(after[:5].mean()) or proxy.rose()
    if drop <= margin or not rises:
        return None
    where = f"stop near iteration {gold.steps[peak]:g} or set kl_budget to the KL there"
    where = where if peak else "this reward leads away from the gold one at once: look at what it pays"
    said = (
        f"the gold reward was {smoothed[peak]:.3g} at iteration {gold.steps[peak]:g} and is {gold.last:.3g} now, "
        f"while the trained one went from {proxy.first:.3g} to {proxy.last:.3g}"
    )
    cure = (
        f"{where}; raise kl_coef; compare "
        "responses of the new policy for a better reward model (a round of a recipe); take several (reward.models)"
    )
    return Finding("wrong", "Over-optimisation: the gold reward falls while the trained one rises", said, cure)


def disagreement(run: RunData, apart: Series) -> Finding | None:
    """Members of an ensemble that no longer agree about what is rewarded."""
    reward = run.series("eval/reward", "rollout/reward")
    if len(apart.values) < 2 or reward is None or apart.last <= APART * apart.first or not reward.last > reward.first:
        return None
    said = f"{move(apart, 'the disagreement of the reward models')}, while {move(reward, 'the reward')}"
    cure = "reward.combine lower_bound, disagreement_budget, kl_budget; new comparisons of these responses"
    return Finding("wrong", "The reward models disagree about what is rewarded", said, cure)


def same_law(run: RunData, ratio: Series) -> Finding | None:
    """Sampler and forward pass that are not of one law."""
    high = float(ratio.values.max())
    if high <= 1.05:
        return None
    said = f"the first step of an iteration compares a policy with itself, yet its largest ratio was {high:.3g}"
    cure = "set old_logprobs recompute, or importance; rlhf-jax certify finds the layer"
    return Finding("look", "Sampler and training disagree", said, cure)


def coin(run: RunData, accuracy: Series) -> Finding | None:
    """A model of preferences that is no better than a coin."""
    if accuracy.values[-1] > 0.55:
        return None
    said = f"{accuracy.values[-1]:.1%} of the held-out pairs are right at step {accuracy.steps[-1]:g}; a coin has 50%"
    cure = f"look at the rows (rlhf-jax data inspect), train longer, or change {rate_of(run)}"
    return Finding("wrong", "No better than a coin on held-out pairs", said, cure)


def overfits(run: RunData, held_out: Series) -> Finding | None:
    """A held-out loss that rises while the training loss falls."""
    loss = run.series("loss/total")
    low = int(np.argmin(held_out.values))
    best, last = float(held_out.values[low]), float(held_out.values[-1])
    if len(held_out.values) < 3 or last <= best + 0.1 * abs(best) or loss is None or not loss.fell():
        return None
    said = (
        f"the held-out loss was {best:.3g} at step {held_out.steps[low]:g} and is {last:.3g} now, while "
        f"that of training fell from {loss.first:.3g} to {loss.last:.3g}"
    )
    cure = "fewer epochs or more rows; run.keep_best, which is on unless you turn it off, has kept the best weights"
    return Finding("look", "Overfitting", said, cure)


def displaced(run: RunData, chosen: Series) -> Finding | None:
    """Chosen responses that lose likelihood too."""
    if len(chosen.values) < FEW or not chosen.fell() or chosen.last > -5:
        return None
    said = f"{move(chosen, 'the implicit reward of chosen responses')}: the policy leaves what people chose, too"
    cure = f"lower {rate_of(run)}, raise beta, or add the NLL of the chosen responses"
    return Finding("look", "Chosen responses become unlikely", said, cure)


WATCHES = (
    Watch("Size of the updates", ("policy/approx_kl",), "below 0.1 nats per token", rate_online),
    Watch("Training loss", ("loss/total",), "ends below where it began", rate_rows),
    Watch("Updates that were skipped", ("optim/skipped",), "0", skipped),
    Watch("KL to the reference", ("rollout/kl",), "rises slowly, and less than it earns", kl_rush),
    Watch("Price of the KL", ("rollout/reward",), "above 0 where the reward is a model", no_price),
    Watch("Clipped share", ("policy/clip_fraction",), "a few percent", clips),
    Watch("Explained variance of the critic", ("value/explained_variance",), "climbs towards 1", critic),
    Watch("Entropy", ("policy/entropy",), "falls no faster than the reward rises", entropy),
    Watch("Length of responses", ("rollout/response_length",), "steady, or longer for a gain", length),
    Watch("Responses that were cut off", ("rollout/truncated_fraction",), "near 0", cut),
    Watch("Groups with equal rewards", ("group/equal_fraction",), "below a half", equal_groups),
    Watch("Gold reward", ("rollout/gold", "eval/gold"), "rises with the trained one", overoptimised),
    Watch("Disagreement of reward models", ("eval/reward_disagreement", "rollout/reward_disagreement"),
          "steady", disagreement),
    Watch("First ratio of an iteration", ("policy/first_ratio_max",), "1", same_law),
    Watch("Accuracy on held-out pairs", ("eval/accuracy",), "well above a half", coin),
    Watch("Held-out loss", ("eval/total",), "falls, then stays", overfits),
    Watch("Reward of chosen responses", ("rewards/chosen",), "near 0 or above", displaced),
)  # fmt: skip


class Checked(NamedTuple):
    """A line of the table of what was looked at."""

    name: str
    figures: str
    healthy: str
    level: str


def diagnose(run: RunData) -> tuple[list[Finding], list[Checked]]:
    """(what is wrong or wants a look, the worst first; all that was looked at)."""
    findings, checked = list[Finding](), list[Checked]()
    online = run.series("rollout/reward") is not None
    for watch in WATCHES:
        series = run.series(*watch.metrics)
        if series is None or (online and watch.check in (rate_rows, overfits)):
            continue
        finding = watch.check(run, series)
        findings += [] if finding is None else [finding]
        figures = f"{series.first:.3g} to {series.last:.3g}"
        checked.append(Checked(watch.name, figures, watch.healthy, "good" if finding is None else finding.level))
    said = [str(remark) for remark in as_list(run.summary.get("remarks"))]
    findings += [Finding("look", "The run says of itself", remark, "") for remark in said]
    if stopped := run.summary.get("stopped"):
        findings.append(Finding("look", "A limit ended the run", str(stopped), ""))
    return sorted(findings, key=lambda one: one.level == "look"), checked


def as_list(value: object) -> Sequence[object]:
    """A list of JSON, or none."""
    return value if isinstance(value, list) else []
