"""DPO, KTO and RRHF as stages: what the losses are given, the reference, pairing, swapping, resuming, learning."""

from __future__ import annotations

import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BIGRAMS, V, bigram_params, f64, log_softmax, toy_directory

from rlhf_jax import losses, preference, reward
from rlhf_jax.config import (
    DataConfig,
    DPOArgs,
    DPOConfig,
    KTOArgs,
    ModelConfig,
    OptimConfig,
    RewardArgs,
    RewardConfig,
    RRHFArgs,
    RunConfig,
    bind,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.data.batches import fingerprint
from rlhf_jax.data.collate import collate_preference, collate_ranking, collate_unpaired, eval_batches
from rlhf_jax.data.comparisons import rating_examples, unpaired_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.packing import Packing
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.preference import of_all
from rlhf_jax.runs.directory import METRICS
from rlhf_jax.runs.metrics import RunMetrics
from rlhf_jax.training import supervised
from rlhf_jax.training.step import accumulated_grads

MODEL, PARAMS = BIGRAMS.policy, bigram_params(0)["policy"]
LIMITS = Limits(4, 12, "drop")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(str(toy_directory() / "tokenizer"))


def pair_examples(seed=0, num=5):
    """Prompts of 1 to 3 tokens and responses of 1 to 5, prompt and response in one array."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(num):
        prompt = rng.integers(2, V, rng.integers(1, 4))
        one, two = (np.concatenate([prompt, rng.integers(2, V, n)]).astype(np.int32) for n in rng.integers(1, 6, 2))
        examples.append({"chosen": one, "rejected": two, "label": 1.0, "margin": 0.0, "prompt_length": len(prompt)})
    return examples


def sum_logprob(params, tokens, start):
    """Of tokens[start:], each given the token before, numpy."""
    params = f64(params)
    law = log_softmax(params["embed"]["tokens"][tokens[:-1]] @ params["head"]["kernel"])
    return sum(law[t - 1, tokens[t]] for t in range(start, len(tokens)))


def expected_logprobs(params, examples):
    return np.array(
        [[sum_logprob(params, e[k], e["prompt_length"]) for k in ("chosen", "rejected")] for e in examples]
    )


# ---- batches and objective


def test_the_log_prob_of_a_response_is_over_its_tokens_alone():
    examples = pair_examples()
    batch = collate_preference(examples, length=9)
    np.testing.assert_allclose(of_all(MODEL, PARAMS, batch)[0], expected_logprobs(PARAMS, examples), rtol=1e-5)
    sizes = [[len(e[k]) - e["prompt_length"] for k in ("chosen", "rejected")] for e in examples]
    np.testing.assert_array_equal(batch["lengths"], sizes)


def test_padding_and_the_prompts_own_tokens_change_no_log_prob_but_through_the_condition():
    examples = pair_examples()
    short, long = (of_all(MODEL, PARAMS, collate_preference(examples, length=n, pad_id=n))[0] for n in (9, 14))
    np.testing.assert_allclose(short, long, rtol=1e-6)
    for example in examples:
        if example["prompt_length"] > 1:  # a bigram does not see it
            example["chosen"], example["rejected"] = (example[k].copy() for k in ("chosen", "rejected"))
            example["chosen"][0] = example["rejected"][0] = 3
    np.testing.assert_allclose(of_all(MODEL, PARAMS, collate_preference(examples, length=9))[0], short, rtol=1e-6)


def test_token_weights_make_the_mean_over_all_chosen_tokens_of_a_batch():
    batch = collate_preference(pair_examples(), length=9)
    assert not batch["token_weights"][:, 1].any()
    assert (batch["token_weights"] * batch["lengths"]).sum() == pytest.approx(1)
    np.testing.assert_allclose(batch["token_weights"][:, 0], 1 / batch["lengths"][:, 0].sum(), rtol=1e-6)


def test_fillers_of_an_evaluation_weigh_nothing_in_the_mean_over_tokens_either():
    examples = pair_examples()
    batches = eval_batches(examples, batch_size=3, collate=lambda e: collate_preference(e, length=9))
    whole = collate_preference(examples, length=9)
    for name in ("weights", "token_weights"):
        got = np.concatenate([batch[name] for batch in batches])
        np.testing.assert_allclose(got[:5], whole[name], rtol=1e-6)
        assert not got[5:].any()


def test_the_objective_is_the_loss_of_its_columns_plus_the_nll():
    examples = pair_examples()
    reference = expected_logprobs(bigram_params(1)["policy"], examples)
    for example, row in zip(examples, reference, strict=True):
        example["ref_logprobs"] = row.astype(np.float32)
    batch = collate_preference(examples, length=9)
    config = DPOConfig(beta=0.3, sft_coef=0.5)
    loss_fn = preference.objective(MODEL, bind(config.loss, config), sft_coef=config.sft_coef)
    (value, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(PARAMS, batch, None)
    policy = expected_logprobs(PARAMS, examples)
    margin = 0.3 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    nll = -policy[:, 0].sum() / batch["lengths"][:, 0].sum()
    assert float(value) == pytest.approx(np.log1p(np.exp(-margin)).mean() + 0.5 * nll, rel=1e-5)
    assert float(metrics["rewards/margin"]) == pytest.approx(margin.mean(), rel=1e-4)
    assert float(metrics["rewards/accuracy"]) == pytest.approx((margin > 0).mean())
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_a_loss_that_reads_what_no_batch_has_is_one_line():
    loss_fn = preference.objective(MODEL, lambda logprobs, colour: (logprobs.sum(), {}))
    with pytest.raises(UserError, match=r"the loss reads \['colour'\]"):
        loss_fn(PARAMS, collate_preference(pair_examples(), length=9), None)


def test_exo_without_label_smoothing_is_refused():
    with pytest.raises(UserError, match=r"exo_loss needs dpo\.label_smoothing above 0"):
        bind(losses.exo_loss, DPOConfig())(*[jnp.zeros((1, 2))] * 2, jnp.ones(1), jnp.ones(1))


def test_kto_in_microbatches_and_packed_has_the_baseline_of_the_batch_and_no_gradient_by_it():
    """Against the losses of log-probs in numpy, whose gradient by the other responses is 0."""
    rows = [{**e, "response": e["chosen"], "other": e["rejected"]} for e in pair_examples(num=8)]
    rng = np.random.default_rng(0)
    rows = [{**e, "label": float(i % 3 > 0), "ref_logprobs": rng.normal(size=2) - 15} for i, e in enumerate(rows)]
    batch = collate_unpaired(rows, length=9)
    packing = Packing.of(8, 2, 9, tokens=1, most=16, ways=1, shared=True)
    loss = partial(losses.kto_loss, beta=0.1, desirable_weight=1.0, undesirable_weight=1.5)
    loss_fn = preference.objective(MODEL, loss, logprobs=preference.own_and_baseline)

    def step(params, batch, num):
        return accumulated_grads(loss_fn, params, preference.with_baseline(MODEL, params, batch), KEY, num)

    expected = jnp.asarray(expected_logprobs(PARAMS, rows), jnp.float32)
    columns = {name: batch[name] for name in ("ref_logprobs", "labels", "weights")}
    value, metrics = loss(logprobs=expected, **columns)
    assert metrics["policy/kl_baseline"] > 0
    whole = step(PARAMS, batch, 1)
    for found in (whole, step(PARAMS, batch, 4), step(PARAMS, preference.pack_unpaired(batch, packing), 1)):
        assert found[1]["loss/total"] == pytest.approx(float(value), rel=1e-5)
        assert found[1]["policy/kl_baseline"] == pytest.approx(float(metrics["policy/kl_baseline"]), rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), found[0], whole[0])
    by_columns = jax.grad(lambda x: loss(logprobs=x, **columns)[0])(expected)
    assert not np.asarray(by_columns)[:, 1].any() and np.asarray(by_columns)[:, 0].all()


def test_the_best_response_of_a_ranking_is_what_to_imitate():
    rows = [np.arange(n, dtype=np.int32) for n in (3, 5, 4)]
    example = {"responses": rows, "ranks": np.array([2, 0, 1], np.float32), "prompt_length": 2}
    batch = collate_ranking([example], length=6, width=4)
    assert batch["lengths"].tolist() == [[1, 3, 2, 0]] and batch["mask"].tolist() == [[True, True, True, False]]
    np.testing.assert_allclose(batch["token_weights"], [[0, 1 / 3, 0, 0]], rtol=1e-6)


def test_the_fingerprint_of_rows_does_not_depend_on_what_the_reference_says():
    plain, told = pair_examples(), pair_examples()
    for example in told:
        example["ref_logprobs"] = np.zeros(2, np.float32)
    assert fingerprint(plain) == fingerprint(told) != fingerprint(pair_examples(1))


# ---- rows


UNPAIRED = [
    {"prompt": "a", "completion": "b c", "label": True},
    {"prompt": "a", "completion": "d", "label": False},
    {"prompt": "e", "response": "f g h", "label": 1},
]


def test_unpaired_rows_get_the_response_of_the_next_row_with_another_prompt(tokenizer):
    examples, _ = unpaired_examples(UNPAIRED, tokenizer, LIMITS)
    assert [example["label"] for example in examples] == [1.0, 0.0, 1.0]
    words = lambda text: [*tokenizer.encode_prompt(text), tokenizer.eos_ids[0]]  # noqa: E731
    assert [e["response"].tolist() for e in examples] == [words("a b c"), words("a d"), words("e f g h")]
    assert [e["other"].tolist() for e in examples] == [words("a f g h"), words("a f g h"), words("e b c")]


def test_preferences_are_unpaired_rows_too_and_what_divides_the_raters_is_dropped(tokenizer):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "votes": [1, 3, 0]},
        {"prompt": "d", "chosen": "e", "rejected": "f", "votes": [1, 1, 0]},
        {"prompt": "g", "chosen": "h", "rejected": "i"},
    ]
    examples, report = unpaired_examples(rows, tokenizer, LIMITS)
    assert [example["label"] for example in examples] == [0.0, 1.0, 1.0, 0.0]
    assert report.dropped == {"on which the raters are divided": 1}


def test_kto_needs_two_prompts_and_a_label(tokenizer):
    with pytest.raises(UserError, match="all rows have one prompt"):
        unpaired_examples(UNPAIRED[:2], tokenizer, LIMITS)
    with pytest.raises(UserError, match='no field "label"'):
        unpaired_examples([{"prompt": "a", "response": "b"}], tokenizer, LIMITS)


@pytest.mark.parametrize("rating", [None, "good", float("nan"), True])
def test_a_rating_is_a_number(tokenizer, rating):
    with pytest.raises(UserError, match='"rating" is'):
        rating_examples([{"prompt": "a", "response": "b", "rating": rating}], tokenizer, LIMITS)


def test_a_scale_of_half_a_point_is_legal_where_ratings_have_no_bins_and_ends_are_kept(tokenizer):
    RewardConfig(rating_low=0, rating_high=0.5)
    rows = [{"prompt": "a", "response": "b", "rating": r, "_where": f"x:{r}"} for r in (0, 0.5, 5)]
    assert len(rating_examples(rows, tokenizer, LIMITS)[0]) == 3
    assert len(rating_examples(rows[:2], tokenizer, LIMITS, ends=(0, 1))[0]) == 2
    settings = RewardConfig(rating_loss="rlhf_jax.losses:ordinal_rating_loss", rating_low=0, rating_high=4)
    with pytest.raises(UserError, match=r"^x:5: the rating 5 is not from reward.rating_low 0 to .*rating_high 4;"):
        reward.KINDS["ratings"].build(settings)(rows, tokenizer, LIMITS)


# ---- stages


def walks_of(num, seed=0):
    """(prompt, short walk, longer walk): the shorter one is the better."""
    rng = np.random.default_rng(seed)
    letters = lambda n: " ".join(rng.choice(list("fghijklmno"), n))  # noqa: E731
    return [("abcde"[i % 5], letters(2), letters(5)) for i in range(num)]


def preferences(num, seed=0):
    return [{"prompt": p, "chosen": s, "rejected": l} for p, s, l in walks_of(num, seed)]  # noqa: E741


def rankings(num, seed=0):
    shared = walks_of(num, seed)
    return [{"prompt": p, "responses": [l, s, s[:1]], "scores": [0, 1, 2]} for p, s, l in shared]  # noqa: E741


STAGES = {
    "dpo": (DPOArgs, preferences),
    "kto": (KTOArgs, preferences),
    "rrhf": (RRHFArgs, rankings),
}


def settings(stage, path, **changes):
    config = STAGES[stage][0](
        model=ModelConfig(path=str(toy_directory() / "policy")),
        data=DataConfig(batch_size=8, max_prompt_length=2, max_length=10),
        optim=OptimConfig(learning_rate=1e-2),
        run=RunConfig(output_dir=str(path), progress=False, eval_every=0),
    )
    return replace(config, **{f"{stage}__steps": 6, **changes})


def run_of(stage, path, num=32, **changes):
    _, make = STAGES[stage]
    return preference.run(settings(stage, path, **changes), rows=make(num), eval_rows=make(8, 1))


@pytest.fixture
def seen(monkeypatch):
    """The metrics of every logged step."""
    found = []
    log = RunMetrics.log

    def watching(self, step, metrics, *args, **kwargs):
        found.append(jax.device_get(metrics))
        log(self, step, metrics, *args, **kwargs)

    monkeypatch.setattr(RunMetrics, "log", watching)
    return found


def test_before_the_first_step_policy_and_reference_agree(tmp_path, seen):
    run_of("dpo", tmp_path / "run")
    assert seen[0]["loss/preference"] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(seen[0]["rewards/margin"]) < 1e-5
    assert seen[-1]["rewards/margin"] > 0.05 and seen[-1]["loss/preference"] < seen[0]["loss/preference"]


def test_kto_tells_good_from_bad_held_out_responses(tmp_path):
    """It starts at 1/2, whatever the labels. Its accuracy is of single responses against a threshold, not of pairs."""
    summary = run_of("kto", tmp_path / "run", kto__steps=80)
    assert summary["eval/preference"] < 0.42 and summary["eval/signed"] > 0.4


@pytest.mark.parametrize("stage", ["dpo", "rrhf"])
def test_a_stage_learns_what_it_is_shown(tmp_path, stage):
    summary = run_of(stage, tmp_path / "run", **{f"{stage}__steps": 25})
    assert summary["eval/accuracy"] > 0.9
    assert (tmp_path / "run" / "model" / "config.json").exists()


@pytest.mark.parametrize("loss", ["simpo_loss", "orpo_loss", "cpo_loss"])
def test_a_loss_that_names_no_reference_learns_and_costs_no_pass_over_the_rows(tmp_path, monkeypatch, loss):
    monkeypatch.setattr(supervised, "add_reference", lambda *args: pytest.fail("a reference pass"))
    options = {"dpo__loss": f"rlhf_jax.losses:{loss}", "dpo__beta": 2.0}
    before = run_of("dpo", tmp_path / "start", **options, dpo__steps=1)
    after = run_of("dpo", tmp_path / "run", **options, dpo__steps=100)
    assert after["eval/accuracy"] > 0.9 and after["eval/margin"] > before["eval/margin"] + 1


def test_a_function_given_to_a_stage_is_what_trains(tmp_path, seen):
    def mine(logprobs, weights, *, beta):
        return -beta * jnp.sum(weights * logprobs[:, 0]), {"mine/loss": jnp.float32(beta)}

    preference.run(
        settings("dpo", tmp_path / "run", dpo__beta=0.25), rows=preferences(32), eval_rows=preferences(8), loss=mine
    )
    assert all(metrics["mine/loss"] == 0.25 for metrics in seen)


def test_a_loss_or_metric_that_is_no_sum_over_rows_is_not_packed(tmp_path, capsys):
    def mine(logprobs, weights):
        return jnp.mean(jnp.exp(logprobs[:, 0])), {"mine/rows": jnp.float32(len(logprobs))}

    config = settings("dpo", tmp_path / "run", dpo__steps=1, data__microbatch_tokens=1)
    preference.run(config, rows=preferences(32), eval_rows=preferences(8), loss=mine)
    said = r"loss is [\d.]+ of some rows and [\d.]+ of two halves of them together, no sum over rows"
    assert re.search(f"data.pack auto: padded; {said}", capsys.readouterr().out)
    with pytest.raises(UserError, match=f"data.pack on: {said}; make it .* or set data.pack off"):
        config = replace(config, data__pack="on", run__output_dir=str(tmp_path / "other"))
        preference.run(config, rows=preferences(32), eval_rows=preferences(8), loss=mine)


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_packed_stage_learns_as_a_padded_one(tmp_path, seen, capsys, stage):
    """Sums run in another order, step after step: 1e-4."""
    changes = {"num": 64, "data__microbatch_tokens": 1}
    summaries = [run_of(stage, tmp_path / pack, data__pack=pack, **changes) for pack in ("off", "on")]
    held_out = [{name: value for name, value in summary.items() if "/" in name} for summary in summaries]
    steps = len(seen) // 2
    for padded, packed in zip([*seen[:steps], held_out[0]], [*seen[steps:], held_out[1]], strict=True):
        for name in padded:
            assert packed[name] == pytest.approx(padded[name], rel=1e-4, abs=1e-4), name
    lines = capsys.readouterr().out.splitlines()
    examples = {"dpo": 64, "kto": 128}[stage]
    assert lines.count(f"reference: asked about 48 of {examples} training examples, all that 6 steps reach") == 2
    (said,) = (line for line in lines if line.startswith("data.pack"))
    assert said.startswith("data.pack on: packed; packing computes ")
    assert ("prompts once for their responses" in said) == (stage == "dpo")


class Killed(BaseException):
    """Stands in for kill -9 where the process must live on."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_continues_to_the_same_bits(tmp_path, monkeypatch, stage):
    """The reference is that of the start, although the policy has moved on; a line is of all steps since the last."""
    kwargs = {"checkpoint__every": 2, "checkpoint__minutes": 0.0, "run__log_every": 3, "data__pack": "on"}
    run_of(stage, tmp_path / "whole", **kwargs)
    advance = RunMetrics.advance

    def kill(self, step, metrics):
        if step == 5:
            self.skips.checkpoints.wait()
            self._pending = None  # what was not written is lost
            raise Killed
        advance(self, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunMetrics, "advance", kill)
        run_of(stage, tmp_path / "killed", **kwargs)
    run_of(stage, tmp_path / "killed", **kwargs)
    whole, killed = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    rows = [[*map(json.loads, (tmp_path / name / METRICS).read_text().splitlines())] for name in ("whole", "killed")]
    lines = [[{n: v for n, v in row.items() if not n.startswith("time/")} for row in each] for each in rows]
    assert lines[0] == lines[1] and all("data/filled" in line for line in lines[0] if "loss/total" in line)


@pytest.mark.parametrize("loss", ["squared_rating_loss", "ordinal_rating_loss"])
def test_a_reward_model_of_ratings_orders_held_out_responses(tmp_path, loss):
    def rated(num, seed):
        rng = np.random.default_rng(seed)
        ratings = rng.integers(1, 6, num)
        texts = [" ".join(rng.choice(list("fghij"), 7 - int(r))) for r in ratings]  # a shorter walk is rated higher
        return [{"prompt": "a", "response": t, "rating": int(r)} for t, r in zip(texts, ratings, strict=True)]

    config = RewardArgs(
        model=ModelConfig(path=str(toy_directory() / "policy")),
        data=DataConfig(batch_size=32, max_prompt_length=2, max_length=10),
        reward=RewardConfig(steps=80, rating_loss=f"rlhf_jax.losses:{loss}"),
        optim=OptimConfig(learning_rate=1e-2),
        run=RunConfig(output_dir=str(tmp_path / "run"), progress=False, eval_every=0),
    )
    summary = reward.run(config, rows=rated(256, 0), eval_rows=rated(64, 1))
    assert summary["spearman"] > 0.9 and summary["n"] == 64


def test_the_agreement_of_ratings_is_spearmans_correlation_with_ties():
    batch = {"ratings": np.array([1, 2, 2, 4, 5]), "weights": np.ones(5)}

    def agree(scores):
        return reward.rating_agreement(np.array(scores, float)[:, None], [batch], list("pqrst"))["spearman"]

    assert agree([0, 1, 1, 7, 100]) == pytest.approx(1)
    assert agree([5, 4, 4, 3, 2]) == pytest.approx(-1)
    ranks = np.array([1, 2, 3, 4, 5.0]), np.array([1, 2.5, 2.5, 4, 5])
    assert agree([0, 1, 2, 3, 4]) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert agree([1, 1, 1, 1, 1]) is None


def test_rrhf_ranks_held_out_responses_as_the_raters_do(tmp_path):
    """Kendall's tau of p, the log-prob per token, and the scores, over the pairs of each prompt."""
    summary = run_of("rrhf", tmp_path / "run", num=64, rrhf__steps=60)
    assert 2 * summary["eval/accuracy"] - 1 > 0.9
