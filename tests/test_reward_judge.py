"""A judge as the reward: what scores mean, rows without an answer, and runs of the methods that are paid by one."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ensembles import BOTH, MEMBERS, ROLLOUT
from test_judge import language_model, server  # noqa: F401
from test_ppo_stage import assert_stopped_and_continued_is_left_alone
from tiny import ONE, TOY_ROWS, bigram_params, iteration, toy_directory, toy_run

from rlhf_jax import cli, ppo
from rlhf_jax.commands import bestofn, collect, rewards
from rlhf_jax.commands.evaluate import run_evaluate as evaluate_command
from rlhf_jax.config import (
    BestOfNArgs,
    CollectArgs,
    EvaluateArgs,
    GroupConfig,
    GRPOArgs,
    ModelConfig,
    RewardJudgeConfig,
    RewardSourceConfig,
    SamplingConfig,
    bind,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.config.group import REINFORCE_PP, RLOO
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import sources
from rlhf_jax.feedback.judge import NO_ANSWER, NONSENSE
from rlhf_jax.feedback.judges import chosen, filled
from rlhf_jax.feedback.reward_judge import RewardJudge, parse_score
from rlhf_jax.group import train as group_train
from rlhf_jax.inference.reward_functions import RewardFailure
from rlhf_jax.online.checks import check_unanswered
from rlhf_jax.online.iteration import evaluate
from rlhf_jax.ppo import train
from rlhf_jax.sharding import make_mesh

KEY, MESH = jax.random.key(0), make_mesh(toy_run().mesh, devices=ONE)


# --- what is said

SAID = {
    7.0: ["7", " 7.", "**7**", "7/10", "Score: 7", "The score is 7.", "I'd give it 7 out of 10, for it is short.",
          "[[7]] although 3 would do", "Two points are odd.\n\nRating: 7/10", "Rating: 7\nIt has 3 faults.", 7, 7.0],
    7.5: ["7.5", "7.5/10", 7.5],
    10.0: ["10", "10/10"],
    NONSENSE: ["", "good", "0", "11", "7 or 8", "7/5", "-3", "7/10 or 8/10", "seven", None, float("nan"), "v1.7b"],
}  # fmt: skip


@pytest.mark.parametrize(("answer", "score"), [(answer, score) for score, each in SAID.items() for answer in each])
def test_a_written_score_means_one_number_or_nothing(answer, score):
    assert parse_score(answer, scale=10) == score


def test_of_continuations_that_begin_alike_each_has_its_own_share():
    choices = [[1], [1, 0], [1, 0, 0], [2]]
    own = np.array([0.1, 0.2, 0.05, 0.4])  # of a rest that is none of them
    within = np.array([own[:3].sum(), own[1:3].sum(), own[2], own[3]])
    np.testing.assert_allclose(chosen(np.log(within)[None], choices)[0], own / own.sum())


def judge_of(ask=None, **settings) -> RewardJudge:
    settings = settings if "model" in settings or "url" in settings else {"url": "http://localhost", **settings}
    judge = RewardJudge(RewardJudgeConfig(**settings), MESH)
    judge.ask = ask or judge.ask
    return judge


def test_our_own_model_says_the_expectation_over_the_probabilities_of_the_scores(language_model):  # noqa: F811
    """Of 1 to 10 each as an answer, and 1 not as the beginning of 10, by the model's logits in numpy."""
    settings = {"model": ModelConfig(path=str(language_model)), "template": "{prompt} {response} Score:", "scale": 10}
    judge = judge_of(**settings, max_prompt_length=60, weight=2.0)
    prompts, responses = ["Tea?", "Coffee or milk?"], ["yes", "both, please"]
    found = judge(prompts, responses, {}, KEY)
    model, params, tokenizer = judge.ask.loaded.model, judge.ask.loaded.params, judge.ask.tokenizer

    def chance(ids, answer):
        tokens = np.array([*ids, *tokenizer.hf(answer)["input_ids"]])[None]
        hidden = model.apply(params, tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
        logits = np.asarray(model.project(params, hidden), np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.exp(sum(logprobs[i - 1, tokens[0, i]] for i in range(len(ids), tokens.shape[1])))

    for question, value in zip(zip(prompts, responses, strict=True), found, strict=True):
        ids = tokenizer.encode_prompt(filled(judge.config, question))
        p = np.array([chance(ids, f" {score}") for score in range(1, 11)])
        p[0] -= p[9]
        expected = (p / p.sum()) @ np.arange(1, 11)
        assert value == pytest.approx(2 * (expected - 5.5) / 4.5, abs=1e-5)
    assert found[0] != found[1] and (judge(prompts, responses, {}, KEY) == found).all()
    long = judge([*prompts, "x" * 99], [*responses, "y"], {}, KEY)  # which is counted, and moves no other
    assert np.isnan(long[2]) and np.allclose(long[:2], found) and judge.unanswered == 1
    assert judge.remarks() == [
        "reward.judge gave no answer to 1 of 7 responses, which taught nothing (rollout/unanswered)"
    ]


def test_a_judge_of_a_run_that_goes_on_counts_from_where_it_stood(language_model):  # noqa: F811
    """What tokenising had to say of questions as well, or its line would be of all responses and count the last."""
    first, again = (judge_of(model=ModelConfig(path=str(language_model)), max_prompt_length=60) for _ in range(2))
    first.asked, first.unanswered = 7, 2
    assert first.counts() == {"asked": 7, "unanswered": 2}
    first.ask.remarks["hold a stop token"] += 3
    again.restore(json.loads(json.dumps(first.counts())))
    assert again.remarks() == first.remarks() and "of 7 responses 3 hold a stop token" in again.remarks()[0]
    again.ask.remarks += first.ask.remarks  # it is a count as it was
    assert again.counts()["remarks"] == {"hold a stop token": 6}


def test_scores_and_shares_are_brought_to_one_scale_and_votes_averaged():
    said = {"good": [5.0, 4.0], "fair": [3.0, NONSENSE], "lost": [NO_ANSWER, NONSENSE]}
    asked = []

    def ask(questions, key):
        asked.extend(questions)
        taken = {name: iter(each) for name, each in said.items()}
        return [next(taken[response]) for _, response in questions]

    judge = judge_of(ask, scale=5, votes=2, temperature=1.0, weight=0.5)
    found = judge(["p"] * 3, [*said], {}, KEY)
    np.testing.assert_array_equal(found, np.float32([0.5 * 0.75, 0.0, np.nan]))
    assert asked[:2] == [("p", "good")] * 2 and found.dtype == np.float32
    pairs = judge_of(lambda questions, key: [0.9 if a == "new" else 0.3 for _, a, _ in questions], against="before")
    assert pairs(["p"] * 2, ["new", "old"], {"before": ["old", "old"]}, KEY).tolist() == pytest.approx([0.6, 0.0])


def test_a_server_is_asked_for_scores_and_one_that_answers_nothing_is_a_reward_that_failed(server):  # noqa: F811
    server.says = lambda response, _: f"Score: {len(response)}"
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    judge = judge_of(url=url, template="{prompt}|{response}|", retries=0)
    found = judge(["p", "odd", "broken", "q"], ["x", "x", "x", "x" * 10], {}, KEY)
    np.testing.assert_array_equal(found, np.float32([-1, np.nan, np.nan, 1]))
    with pytest.raises(RewardFailure, match=r"^reward.judge.url: 2 questions in a row .*; mend that, or set reward"):
        judge(["broken"] * 2, ["x", "y"], {}, KEY)
    with pytest.raises(RewardFailure, match="none of 2 responses got an answer that says anything"):
        judge.check_answered(judge(["odd"] * 2, ["x", "y"], {}, KEY))


def test_of_a_servers_log_probs_the_score_is_expected_over_the_tokens_that_are_one(server):  # noqa: F811
    server.says = lambda response, _: (
        {"7": 0.3, " 7": 0.2, "The": 0.2, "10": 0.1, "8": 0.1} if response else {"No": 1.0}
    )
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    judge = judge_of(url=url, template="{prompt}|{response}|", retries=0, top_logprobs=4)
    found = judge(["p", "p", "odd"], ["x", "", "x"], {}, KEY)  # of the second no token is a score, the third has none
    assert found[0] == pytest.approx(((0.5 * 7 + 0.1 * 10) / 0.6 - 5.5) / 4.5) and np.isnan(found[1:]).all()
    body = server.seen[0][2]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 4, 1)


# --- rows without an answer


@pytest.mark.parametrize("method", BOTH)
def test_a_row_without_an_answer_teaches_nothing_and_moves_no_baseline_and_no_metric_of_rewards(method):
    host = np.arange(8.0)
    host[[1, 6]] = np.nan
    make, config, models, params = BOTH[method]
    params = params if method == "ppo" else {"policy": params["policy"]}
    penalties = {"reward_clip": 3.0, "missing_eos": "replace"}  # a number for rows that have none
    settings = {"whiten_advantages": False} if method == "ppo" else {"group_size": 4, "scale_rewards": "batch"}
    settings |= penalties
    program = make(models, replace(config, **settings), recompute=True)
    one, ref = jnp.float32(1.0), bigram_params(1)["policy"]
    of = jax.jit(lambda host: program(params, ref, MEMBERS[0], ROLLOUT, jnp.float32(host), one, one))
    x, _, metrics, rows = of(host)
    whole = of(np.nan_to_num(host))[0]
    known, mask = ~np.isnan(host), np.asarray(ROLLOUT.mask)
    assert (np.asarray(x.mask) == mask & known[:, None]).all() and not x.advantages[~known].any()
    assert (np.isnan(rows["reward"]) == ~known).all()
    scores = np.asarray(rows["reward"], np.float64)
    wanted = [np.nanmean(scores), np.nanstd(scores), (np.abs(scores[known]) > 3).mean()]
    names = ("rollout/reward", "rollout/reward_std", "rollout/clipped_fraction")
    np.testing.assert_allclose([metrics[name] for name in names], wanted, rtol=1e-5)
    if method == "ppo":
        assert not x.value_mask[~known].any()
        np.testing.assert_array_equal(x.advantages[known], whole.advantages[known])
        return
    spread = np.nanstd(scores.reshape(2, 4), axis=1).mean()
    np.testing.assert_allclose(metrics["group/reward_std"], spread, rtol=1e-5)
    paid = np.where(ROLLOUT.finished, np.clip(scores, -3, 3), -1.0)
    paid[~known] = np.nan
    expected = paid - np.repeat(np.nanmean(paid.reshape(2, 4), axis=1), 4)
    expected /= np.nanstd(paid, ddof=1) + 1e-4
    np.testing.assert_allclose(x.advantages[:, 0], np.where(known, expected, 0), atol=1e-5)


def test_advantages_of_ones_own_must_leave_out_what_has_no_score():
    """Those of the library do, whatever the config; with a judge alone is it asked."""
    for settings in (GroupConfig(), RLOO, REINFORCE_PP):
        check_unanswered(bind(settings.advantage, settings), settings.group_size, "grpo.advantage")
    with pytest.raises(UserError, match=r"^grpo.advantage makes \[nan, nan, .* as jnp.nanmean does$"):
        check_unanswered(lambda scores: scores - scores.mean(), 2, "grpo.advantage")


# --- runs


@pytest.fixture
def one_device(monkeypatch):
    for module in (train, sources, rewards):
        monkeypatch.setattr(module, "make_mesh", functools.partial(make_mesh, devices=ONE))


def test_a_run_that_our_own_model_pays_goes_on_as_if_left_alone(one_device, tmp_path, language_model):  # noqa: F811
    judge = RewardJudgeConfig(
        model=ModelConfig(path=str(language_model)), template="{prompt} {response} Score:", max_prompt_length=18,
    )  # fmt: skip

    def config(name):
        return replace(toy_run(tmp_path / name, reward_model=False), reward__judge=judge, run__log_every=1)

    alone, again = assert_stopped_and_continued_is_left_alone(config)
    assert {**again, "wall_s": 0} == {**alone, "wall_s": 0} and again["judged"]["asked"] == 4 * 16 + 3 * 5  # no copies
    assert any("reward.judge gave no answer to" in line for line in again["remarks"])
    lines = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    counts = [line["rollout/unanswered"] for line in lines if "rollout/unanswered" in line]
    assert len(counts) == 4 and 0 < sum(counts) < 64  # longer questions than 18 bytes
    assert all(-1 < line["rollout/reward"] < 1 for line in lines if "rollout/reward" in line)
    assert alone["before"]["eval/unanswered"] >= 0 and alone["before"]["eval/reward"] != 0


def many_vowels(prompt, a, b):
    count = lambda text: sum(letter in "aeiou" for letter in text)  # noqa: E731
    return "?" if "q" in a + b else "A" if count(a) > count(b) else "B" if count(b) > count(a) else "tie"


def of_no_b(prompt, a, b):
    return "?" if "b" in prompt else "A" if len(a) > len(b) else "tie"


def places(prompts, responses, **columns):
    return list(range(len(responses)))


def test_rows_without_an_answer_alone_in_a_redraw_or_at_the_end_of_an_evaluation_do_not_end_the_run(monkeypatch):
    """A judge has failed where it says nothing of a whole batch, or of all that is held out."""
    monkeypatch.setattr(group_train, "make_mesh", functools.partial(make_mesh, devices=ONE))
    toy, judge = toy_run(), RewardJudgeConfig(function="test_reward_judge:of_no_b", against="response")
    config = GRPOArgs(
        model=toy.model, data=replace(toy.data, batch_size=4), sampling=toy.sampling, run=toy.run,
        reward=RewardSourceConfig(judge=judge, functions=["test_reward_judge:places"]),
        grpo=GroupConfig(iterations=2, group_size=2, redraws=2, num_samples=5),
    )  # fmt: skip
    rows = lambda *prompts: [{"prompt": prompt, "response": " c d e"} for prompt in prompts]  # noqa: E731
    method, loop = group_train.setup(config, rows=rows("b", "c"), eval_rows=rows(*"cdefb"))
    with jax.set_mesh(method.mesh.grid):
        _, metrics, _ = iteration(method, loop, 0)
        assert metrics["rollout/unanswered"] == 2 and metrics["group/drawn_again"] == 2
        method, loop = group_train.setup(config, rows=rows("b", "b"), eval_rows=rows(*"cdefb"))
        results, samples = evaluate(
            method, replace(loop, state__params=jax.tree.map(lambda x: 2 * x, loop.state.params))
        )
        assert results["eval/unanswered"] == 1
        # The KL of responses needs no judge: it is of all rows, as `kl_budget` needs it.
        kl, paid = (np.array([row[name] for row in samples], float) for name in ("kl", "reward"))
        known = ~np.isnan(paid)
        assert len(kl) == 5 and known.sum() == 4 and results["eval/kl"] == pytest.approx(kl.mean()) != kl[known].mean()
        assert results["eval/objective"] == pytest.approx((paid - config.grpo.kl_coef * kl)[known].mean())
        last = replace(method, inputs__held_out=method.inputs.held_out[1:])
        for failing, count in ((lambda: iteration(method, loop, 0), 4), (lambda: evaluate(last, loop), 1)):
            with pytest.raises(RewardFailure, match=f"none of {count} responses got an answer that says anything"):
                failing()


def test_the_best_of_n_beats_the_response_that_a_column_holds_and_what_has_no_answer_is_counted(one_device, tmp_path):
    judge = RewardJudgeConfig(function="test_reward_judge:many_vowels", against="response", both_orders=False)
    config = BestOfNArgs(
        model=ModelConfig(path=str(toy_directory() / "policy")), sampling=SamplingConfig(max_new_tokens=5, chunk=5),
        num_samples=6, max_prompt_length=2, batch_size=12, output=str(tmp_path / "best.jsonl"), progress=False,
        reward=RewardSourceConfig(judge=judge),
    )  # fmt: skip
    rows = [{**row, "response": " a b c"} for row in TOY_ROWS["rows"][:6]]
    summary = bestofn.run(config, rows=rows)
    drawn = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert len(drawn) == 6 and all(row["score"] in (-1, 0, 1) and "q" not in row["response"] for row in drawn)
    assert summary["unscored"] > 0 and summary["curve"][-1]["proxy"]["mean"] >= summary["curve"][0]["proxy"]["mean"]
    with pytest.raises(UserError, match=r"no text in the field 'response', which reward.judge.against names"):
        bestofn.run(replace(config, overwrite=True), rows=TOY_ROWS["rows"][:6])


def test_a_judge_that_says_nothing_of_a_batch_ends_no_command_and_one_that_says_nothing_at_all_does(
    one_device, tmp_path
):
    """Batches of one prompt; a judge has failed where it says nothing of all prompts, as in a run (the law above)."""
    judge = RewardJudgeConfig(function="test_reward_judge:of_no_b", against="response")
    drawn = {
        "model": ModelConfig(path=str(toy_directory() / "policy")), "num_samples": 2, "max_prompt_length": 2,
        "sampling": SamplingConfig(max_new_tokens=5, chunk=5), "batch_size": 2, "progress": False,
        "reward": RewardSourceConfig(judge=judge),
    }  # fmt: skip
    rows = lambda *prompts: [{"prompt": prompt, "response": " c d e"} for prompt in prompts]  # noqa: E731
    best = BestOfNArgs(**drawn, output=str(tmp_path / "best.jsonl"))
    labelled = CollectArgs(**drawn, output=str(tmp_path / "rows.jsonl"), label="reward")
    measured = EvaluateArgs(**drawn, output_dir=str(tmp_path / "evaluation"))
    unscored = lambda ranked: sum(item["score"] is None for row in ranked for item in row["responses"])  # noqa: E731
    summary = bestofn.run(best, rows=rows(*"bcb"))
    assert (summary["unscored"], summary["without_score"], summary["prompts"]) == (4, 2, 1)
    assert unscored(collect.run_collect(labelled, rows=rows(*"bcb"))) == 4
    assert evaluate_command(measured, rows=rows(*"bcb"))["unscored"] == 4
    for command, config in ((bestofn.run, best), (collect.run_collect, labelled), (evaluate_command, measured)):
        with pytest.raises(RewardFailure, match="none of 6 responses got an answer that says anything"):
            command(replace(config, overwrite=True), rows=rows(*"bbb"))
    skips = {"overwrite": True, "reward__on_failure": "skip"}
    with pytest.raises(UserError, match="the reward failed on every prompt"):
        bestofn.run(replace(best, **skips), rows=rows(*"bbb"))
    assert unscored(collect.run_collect(replace(labelled, **skips), rows=rows(*"bbb"))) == 6
    assert evaluate_command(replace(measured, **skips), rows=rows(*"bbb"))["unscored"] == 6


def test_a_judge_is_evaluated_as_a_reward_on_pairs(one_device, tmp_path, capsys):
    judge = RewardJudgeConfig(function="test_reward_judge:many_vowels", against="earlier")
    config = EvaluateArgs(output_dir=str(tmp_path), reward=RewardSourceConfig(judge=judge), progress=False)
    rows = [{"prompt": f"p{i}", "chosen": "aa", "rejected": "bb", "earlier": "ab"} for i in range(3)]
    rows.append({**rows[0], "prompt": "p", "chosen": "q"})
    summary = rewards.evaluate_reward(config, rows=rows, functions=None, gold=None)
    assert summary["unscored"] == 1 and "1 rows with a response that" in capsys.readouterr().out


MISTAKES = {
    "ppo --reward.judge.function a:b": "compares two responses; set reward.judge.against, or name a function",
    "ppo --reward.judge.scale 5": "reward.judge has settings, but no judge",
    "ppo --reward.judge.url http://x --reward.judge.scale 1": "reward.judge.scale is 1; make it at least 2",
    "ppo --reward.judge.url http://x --reward.judge.weight 0": "weight is 0.0; make it finite and not 0",
    "grpo --reward.judge.url http://x --reward.judge.template hi": r"has no \{prompt\}; write \{prompt\} and \{resp",
    "ppo --reward.judge.top_logprobs 5": "top_logprobs is of reward.judge.url, which is empty",
    "ppo --reward.judge.url http://x --reward.judge.votes 2 --reward.judge.top_logprobs 5": "judge.top_logprobs 0",
    "rloo --reward.judge.url x": "reward.judge.url is no http address",
    "ppo --reward.judge.url http://x --reward.judge.model.path y": "reward.judge.url and reward.judge.model.path are",
}


@pytest.mark.parametrize(("line", "expected"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_one_line(line, expected):
    with pytest.raises(UserError, match=expected):
        cli.parse(line.split()[0], line.split()[1:])


def test_prompt_rows_must_hold_what_pairs_are_made_of(one_device):
    judge = RewardJudgeConfig(function="test_reward_judge:many_vowels", against="earlier")
    config = replace(toy_run(reward_model=False), reward__judge=judge)
    with pytest.raises(UserError, match=r"row 0: no text in the field 'earlier'"):
        ppo.train.setup(config, **TOY_ROWS)
