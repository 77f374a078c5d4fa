"""Reward ensembles, heads on one trunk or several models, and the guards against a reward that is exploited."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ppo_stage import assert_stopped_and_continued_is_left_alone
from tiny import ARCH, BIGRAMS, ONE, TOY_ROWS, bigram_params, make_rollout, toy_directory, toy_run

from rlhf_jax import advantages as adv
from rlhf_jax import group, ppo, reward
from rlhf_jax.commands import inspection, sample
from rlhf_jax.config import (
    ConvertArgs,
    DataConfig,
    GroupConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardArgs,
    RewardConfig,
    RewardSourceConfig,
    RunConfig,
    ScoreArgs,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError
from rlhf_jax.losses import pairwise_reward_loss
from rlhf_jax.models import hf
from rlhf_jax.models.hf.layout import flattened
from rlhf_jax.models.loading import Loaded, load_model, load_tokenizer, save_model
from rlhf_jax.online import guards
from rlhf_jax.online import loop as online_loop
from rlhf_jax.ppo import networks, train
from rlhf_jax.sharding import make_mesh
from rlhf_jax.training import supervised
from rlhf_jax.training.responses import Ensemble, standardised


def same_bits(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(7, 4)).astype(np.float32)


@pytest.fixture
def one_device(monkeypatch):
    for module in (train, supervised, sample):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, devices=ONE))


# --- formulas


def by_numpy(scores, combine, coef):
    scores = np.float64(scores)
    mean, std = scores.mean(axis=1), scores.std(axis=1)
    return {"mean": mean, "min": scores.min(axis=1), "lower_bound": mean - coef * std}[combine]


@pytest.mark.parametrize("combine", ["mean", "min", "lower_bound"])
def test_members_are_combined_as_numpy_does_it_in_any_order_and_equal_ones_are_one(combine):
    of = functools.partial(adv.combined, combine=combine, combine_coef=0.7)
    found = of(jnp.asarray(SCORES))
    np.testing.assert_allclose(found, by_numpy(SCORES, combine, 0.7), rtol=1e-5)
    np.testing.assert_allclose(adv.disagreement(SCORES), SCORES.std(axis=1), rtol=1e-5)
    for order in itertools.permutations(range(4)):
        assert same_bits(of(jnp.asarray(SCORES[:, order])), found)
    for many in (2, 3, 7):
        assert same_bits(of(jnp.repeat(jnp.asarray(SCORES[:, :1]), many, axis=1)), jnp.asarray(SCORES[:, 0]))


def test_a_long_response_is_punished_from_nothing_to_the_coefficient():
    """Yu et al. 2025, eq. 13, with a maximum of 10 tokens and 4 of them soft."""
    lengths = np.arange(11)
    found = adv.overlong_penalty(jnp.asarray(lengths), 10, overlong_tokens=4, overlong_coef=2.0)
    np.testing.assert_allclose(found, 2.0 * np.where(lengths <= 6, 0.0, (6 - lengths) / 4), rtol=1e-6)
    assert not adv.overlong_penalty(jnp.asarray(lengths), 10, overlong_tokens=0, overlong_coef=2.0).any()


def test_members_are_what_was_loaded():
    loaded = [Loaded(BIGRAMS.policy, {"score": i}, {"model_type": f"{i}"}, {}, path=f"m{i}") for i in range(3)]
    assert networks.members(networks.together(loaded)) == loaded


# --- the scoring program

ROLLOUT = make_rollout(4, bigram_params(0)["policy"])
MEMBERS = [bigram_params(seed)["value"] for seed in (2, 3, 4)]
BOTH = {
    "ppo": (ppo.make_score, PPOConfig(), BIGRAMS, bigram_params(0)),
    "grpo": (group.make_score, GroupConfig(group_size=4), group.Models(*[BIGRAMS.policy] * 2), bigram_params(0)),
}


def scored(method, members, *, host=0.0, options=None, **settings):
    """(experience, next price, metrics, rows) of an ensemble of bigrams, or of one that is no list."""
    make, config, models, params = BOTH[method]
    params = params if method == "ppo" else {"policy": params["policy"]}
    if isinstance(members, list):
        models = dataclasses.replace(models, reward=Ensemble((Loaded(models.reward, {}),) * len(members)))
    program = make(models, dataclasses.replace(config, **settings), recompute=True, **(options or {}))
    one, ref = jnp.float32(1.0), bigram_params(1)["policy"]
    return program(params, ref, members, ROLLOUT, jnp.full(8, host), jnp.float32(0.1), one)


@pytest.mark.parametrize("method", BOTH)
def test_an_ensemble_of_equal_members_is_the_single_model_and_others_are_combined(method):
    alone = scored(method, MEMBERS[0])
    same = scored(method, MEMBERS[:1] * 3, options={"combine": "lower_bound"})
    assert same_bits(same[0], alone[0]) and same_bits(same[3]["reward"], alone[3]["reward"])
    assert same[2]["rollout/reward_disagreement"] == 0 and same_bits(
        {name: same[2][name] for name in alone[2]}, alone[2]
    )
    each = np.stack([scored(method, member)[3]["reward"] for member in MEMBERS], axis=1)
    for combine in ("mean", "min", "lower_bound"):
        options = {"combine": combine, "combine_coef": 0.5, "model_weight": 2.0}
        _, _, metrics, rows = scored(method, MEMBERS, host=0.25, options=options)
        np.testing.assert_allclose(rows["reward"], 2 * by_numpy(each, combine, 0.5) + 0.25, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows["members"], each, rtol=1e-6)
        np.testing.assert_allclose(metrics["rollout/reward_disagreement"], each.std(axis=1).mean(), rtol=1e-5)


@pytest.mark.parametrize("method", BOTH)
def test_what_is_paid_is_clipped_and_less_the_penalty_of_length(method):
    plain = scored(method, MEMBERS[0])
    raw, lengths = np.asarray(plain[3]["reward"]), np.asarray(ROLLOUT.mask.sum(axis=1))
    limit = float(np.abs(raw).mean())
    guarded = scored(method, MEMBERS[0], reward_clip=limit, overlong_tokens=3, overlong_coef=0.5)
    penalty = -0.5 * np.clip((lengths - 3) / 3, 0, 1)
    paid = np.clip(raw, -limit, limit) + penalty
    assert same_bits(guarded[3]["reward"], plain[3]["reward"])  # what is reported is the reward itself
    moved = float(guarded[2]["rollout/objective"] - plain[2]["rollout/objective"])
    assert moved == pytest.approx((paid - raw).mean(), abs=1e-6)
    assert guarded[2]["rollout/clipped_fraction"] == (np.abs(raw) > limit).mean() > 0
    assert guarded[2]["rollout/overlong_penalty"] == pytest.approx(penalty.mean())
    assert not same_bits(guarded[0].advantages, plain[0].advantages)


# --- one model with several heads


def reward_args(path, **settings) -> RewardArgs:
    return RewardArgs(
        model=ModelConfig(path=str(toy_directory() / "policy")),
        data=DataConfig(batch_size=8, max_prompt_length=2, max_length=10, eval_batches=0),
        reward=RewardConfig(**{"steps": 3, **settings}),
        optim=OptimConfig(learning_rate=0.02),
        run=RunConfig(output_dir=str(path), progress=False),
    )


def pairs(count, seed):
    rng = np.random.default_rng(seed)
    letters = "bcdefghij"
    walks = [" ".join(rng.choice(list(letters), 4)) for _ in range(2 * count)]
    rows = [{"prompt": letters[i % 5], "chosen": walks[2 * i], "rejected": walks[2 * i + 1]} for i in range(count)]
    return [row for row in rows if row["chosen"] != row["rejected"]]


def test_the_loss_of_members_is_the_mean_over_them_of_their_own_draws():
    scores, counts = RNG.normal(size=(6, 2, 3)).astype(np.float32), RNG.integers(0, 3, (6, 3)).astype(np.float32)
    weights = np.float32([0.1, 0.2, 0.3, 0.1, 0.1, 0.2])
    batch = {"weights": weights, "margins": np.zeros(6), "labels": np.ones(6), "member_weights": counts}
    loss = functools.partial(pairwise_reward_loss, center_coef=0.0)
    total, metrics = reward.of_members(loss, reward.of_pairs, scores, batch)
    each = np.log1p(np.exp(-(scores[:, 0] - scores[:, 1])))  # [B, E]
    assert total == pytest.approx((weights[:, None] * counts * each).sum(axis=0).mean(), rel=1e-5)
    right = (scores[:, 0] > scores[:, 1]) * weights[:, None] * counts
    assert metrics["reward_model/accuracy"] == pytest.approx(right.sum(axis=0).mean(), rel=1e-5)


def test_every_member_draws_as_many_prompts_as_there_are_by_the_seed_alone(capsys):
    rows = [{"prompt_key": key, "n": i} for i, key in enumerate("abcdefabcdfff")]
    resampled = functools.partial(reward.resampled, of="prompts")
    drawn = resampled(rows, members=4, seed=1)
    by_key = {row["prompt_key"]: row["member_weights"] for row in drawn}
    assert np.stack(list(by_key.values())).sum(axis=0).tolist() == [6.0] * 4
    assert all((row["member_weights"] == by_key[row["prompt_key"]]).all() for row in drawn)
    assert "reward.members 4: drawn with replacement, they see" in capsys.readouterr().out
    again = {row["n"]: row["member_weights"] for row in resampled(rows[::-1], members=4, seed=1)}
    assert all((again[row["n"]] == row["member_weights"]).all() for row in drawn)
    assert any((again[row["n"]] != row["member_weights"]).any() for row in resampled(rows, members=4, seed=2))


def test_a_draw_of_rows_counts_each_by_itself(capsys):
    rows = [{"prompt_key": key, "n": i} for i, key in enumerate("aaaaaaaabb")]
    drawn = reward.resampled(rows, members=4, seed=1, of="rows")
    counts = np.stack([row["member_weights"] for row in drawn])  # [rows, members]
    assert counts.sum(axis=0).tolist() == [10.0] * 4
    assert len(np.unique(counts[:8], axis=0)) > 1  # a prompt's rows differ
    assert "of 10 rows" in capsys.readouterr().out
    resample = reward.task_of(reward_args("", members=4, bootstrap="rows")).resample
    assert len({tuple(row["member_weights"]) for row in resample(rows)[:8]}) > 1


def test_heads_on_one_trunk_are_trained_saved_loaded_and_each_scores_as_a_model_of_its_own(one_device, tmp_path):
    data = {"rows": pairs(32, 0), "eval_rows": pairs(12, 1)}
    summary = reward.run(reward_args(tmp_path / "run", members=3), **data)
    assert len(summary["members"]) == 3 and summary["n"] == 12
    assert reward.task_of(reward_args("", members=3)).resample is not None
    assert reward.task_of(reward_args("", members=3, bootstrap="off")).resample is None
    path, mesh = tmp_path / "run" / "model", make_mesh(reward_args("").mesh, devices=ONE)
    config = json.loads((path / "config.json").read_text())
    assert config["num_labels"] == config["reward_members"] == hf.members_of(path) == 3
    load = functools.partial(load_model, mesh=mesh, key=jax.random.key(0), head="trained")
    loaded = load(ModelConfig(path=str(path)))
    assert loaded.params["score"]["kernel"].shape == (3, ARCH.width) and loaded.model.members == 3
    # Each head by itself.
    hidden = loaded.model.apply(loaded.params, *(jnp.ones((1, 4), jnp.int32) * x for x in (5, jnp.arange(4)[None], 1)))
    scores = loaded.model.scores(loaded.params["score"], hidden)
    single = dataclasses.replace(loaded.model, members=0)
    for i in range(3):
        own = jax.tree.map(lambda x, i=i: x[i], loaded.params["score"])
        assert same_bits(single.scores(own, hidden), scores[..., i])
    assert len(np.unique(scores[0, -1])) == 3
    # The critic of equal heads is that head.
    equal = jax.tree.map(lambda x: jnp.stack([x[1]] * 3), loaded.params["score"])
    alone = networks.with_one_head(replace(loaded, params={**loaded.params, "score": equal}), mesh)
    assert same_bits(alone.params["score"], jax.tree.map(lambda x: x[1], loaded.params["score"]))
    # What stands on it, and what scores with it.
    config = replace(reward_args(tmp_path / "two", members=2, head_init="trained"), model__path=str(path))
    with pytest.raises(UserError, match=r"has 3 trained heads, not reward.members 2; set it to 3"):
        reward.run(config, **data)
    lora, key = LoRAConfig(rank=2), jax.random.key(0)
    fresh = ModelConfig(path=str(toy_directory() / "policy"))
    fresh = load_model(fresh, mesh, key, head="normal", lora=lora, members=3)
    save_model(tmp_path / "lora", fresh, fresh.params, load_tokenizer(ModelConfig(path=str(path))))
    merged, adapter = (load(ModelConfig(path=str(tmp_path / name))) for name in ("lora", "lora/adapter"))
    assert merged.model.members == adapter.model.members == 3
    np.testing.assert_allclose(merged.params["score"]["kernel"], adapter.params["score"]["kernel"], atol=1e-6)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": r["prompt"], "response": r["chosen"]}) + "\n" for r in pairs(6, 2)))
    said = sample.run_score(ScoreArgs(
        ModelConfig(path=str(path)), data_path=str(rows), combine="lower_bound", combine_coef=0.5,
        max_prompt_length=2, max_length=10, output=str(tmp_path / "scored.jsonl"),
    ))  # fmt: skip
    members = np.array([row["scores"] for row in said])
    np.testing.assert_allclose([row["score"] for row in said], by_numpy(members, "lower_bound", 0.5), rtol=1e-4)
    each = sample.run_score(ScoreArgs(
        models=[str(path), str(toy_directory() / "reward")], data_path=str(rows), combine="min",
        max_prompt_length=2, max_length=10, output=str(tmp_path / "each.jsonl"),
    ))  # fmt: skip
    assert np.array([row["scores"] for row in each]).shape == (6, 4)
    np.testing.assert_allclose([row["score"] for row in each], np.min([row["scores"] for row in each], axis=1))


# --- a run


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """A second reward model: the toy's with its head turned round and larger."""
    path = tmp_path_factory.mktemp("other") / "reward"
    shutil.copytree(toy_directory() / "reward", path)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["score.weight"] = -3 * tensors["score.weight"][:, ::-1].copy()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def test_weights_are_averaged_as_numpy_does_it_and_equal_ones_stay_and_other_shapes_are_refused(tmp_path, other):
    policy, first, copy = toy_directory() / "policy", toy_directory() / "reward", tmp_path / "copy"
    shutil.copytree(first, copy)

    def written(*average):
        args = ConvertArgs(str(first), str(tmp_path / "mean"), dtype="float32", average=[*average], overwrite=True)
        return flattened(hf.load_params(inspection.run_convert(args), ARCH, score_head=True))

    one, two = (flattened(hf.load_params(path, ARCH, score_head=True)) for path in (first, other))
    for leaf, array in written(other, str(copy)).items():
        np.testing.assert_allclose(array, (2 * one[leaf] + two[leaf]) / 3, atol=1e-6)
    assert same_bits(written(str(copy), str(copy)), one)
    with pytest.raises(UserError, match=r"^average .*policy: score/bias, score/kernel is not as in"):
        written(str(policy))


def guarded(path, other, **changes):
    settings = {"reward_standardize": "mean_std", "reward_clip": 2.0, "overlong_tokens": 2, "kl_controller": "fixed"}
    config = replace(toy_run(path, **settings), reward__model="", reward__combine="lower_bound")
    return replace(config, reward__models=[str(toy_directory() / "reward"), other], **changes)


def test_a_guarded_run_of_an_ensemble_starts_on_its_scale_and_goes_on_as_if_left_alone(one_device, tmp_path, other):
    summary, again = assert_stopped_and_continued_is_left_alone(lambda name: guarded(tmp_path / name, other))
    lines = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "rollout/reward" in line]
    assert all(0 <= line["rollout/clipped_fraction"] <= 1 for line in trained)
    assert summary["before"]["eval/reward_disagreement"] > 0 and len(summary["reward_scale"]["std"]) == 2
    assert summary["before"]["eval/reward"] == pytest.approx(-summary["before"]["eval/reward_disagreement"], abs=1e-4)
    assert {**again, "wall_s": 0} == {**summary, "wall_s": 0}


@pytest.mark.parametrize(("limit", "words"), [("kl_budget", "the KL of "), ("disagreement_budget", "disagreement")])
def test_a_run_beyond_a_limit_ends_and_keeps_the_best_within_it(
    one_device, tmp_path, other, monkeypatch, limit, words
):
    if limit == "disagreement_budget":
        monkeypatch.setattr(guards, "DISAGREEMENT", "eval/kl_and_one")  # of two toys it hardly moves
        plain = online_loop.evaluate
        later = lambda *args: ((r := plain(*args))[0] | {"eval/kl_and_one": 1 + abs(r[0]["eval/kl"])}, r[1])  # noqa: E731
        monkeypatch.setattr(online_loop, "evaluate", later)
    budget = {"kl_budget": 1e-6, "disagreement_budget": 1.0 + 1e-6}[limit]
    config = guarded(tmp_path / "run", other, **{f"ppo__{limit}": budget})
    summary = train.run(config, **TOY_ROWS)
    assert summary["iterations"] == 2 and words in summary["stopped"] and summary["best_step"] == 0
    assert summary["after"] == summary["before"]
    first, last = (
        hf.load_params(p, ARCH, score_head=False) for p in (toy_directory() / "policy", tmp_path / "run/model")
    )
    assert same_bits(first, last)


def test_a_head_whose_scores_differ_by_rounding_alone_is_shifted_and_not_scaled(capsys):
    """Of an ensemble each member by its own: a spread of 1e-7 is one where the mean is as small."""
    mean, std = np.array([5.0, 5.0, -1e-7, 0.0, 2.0]), np.array([3e-7, 0.5, 2e-7, 0.0, 0.0])
    head = {"kernel": jnp.ones((5, 3)), "bias": jnp.asarray(mean, jnp.float32) + 1}
    found = standardised(head, mean, std)
    np.testing.assert_allclose(found["kernel"][:, 0], [1, 2, 5e6, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(found["bias"], [1, 2, 5e6, 1, 1], rtol=1e-6)
    assert "all alike but for rounding: they are shifted to 0 and not scaled" in capsys.readouterr().out
    one = standardised({"kernel": head["kernel"][0], "bias": head["bias"][0]}, mean[0], np.ones(()))
    assert (float(one["bias"]), capsys.readouterr().out) == (1.0, "")


def test_the_scale_is_of_reward_models_alone_so_that_functions_that_fail_are_not_asked_for_it(one_device):
    fails = lambda prompts, responses: pytest.fail("is asked")  # noqa: E731
    config = toy_run(reward_standardize="mean_std")
    scales = []
    for functions in ([], [fails]):
        method, loop = train.setup(config, reward_functions=functions, gold=fails if functions else None, **TOY_ROWS)
        with jax.set_mesh(method.mesh.grid):
            scales.append(guards.first_scale(method, loop))
    assert scales[0] == scales[1] and scales[0]["std"][0] > 0


@pytest.mark.parametrize("init", ["auto", "zeros"])
def test_a_critic_that_starts_from_the_reward_model_starts_on_its_scale(one_device, init):
    """Whose score is 0 in the mean, and so is then what the critic says of the same tokens; one of zeros stays so."""
    config = toy_run(reward_standardize="mean_std", value_init=init)
    method, loop = train.setup(config, **TOY_ROWS)
    with jax.set_mesh(method.mesh.grid):
        scaled = guards.on_scale(method, {"mean": [3.0], "std": [0.5]})
        moved = guards.critic_on_scale(scaled, loop)
    before, after = loop.state.params["value"]["score"], moved.state.params["value"]["score"]
    expected = before if init == "zeros" else scaled.nets.reward["score"]
    assert same_bits(flattened(after), flattened(expected)) and bool(jnp.any(before["kernel"])) == (init == "auto")
    assert same_bits(flattened(moved.state.params["policy"]), flattened(loop.state.params["policy"]))
    if init == "auto":
        np.testing.assert_allclose(after["bias"], (before["bias"] - 3) / 0.5, rtol=1e-6)
        np.testing.assert_allclose(after["kernel"], before["kernel"] / 0.5, rtol=1e-6)


def test_limits_and_the_alarm_say_what_they_saw():
    before, after = ({"eval/kl": kl, "eval/reward": r, guards.DISAGREEMENT: d} for kl, r, d in ((0, 0, 1), (3, 1, 2)))
    assert guards.beyond(PPOConfig(kl_budget=3.0, disagreement_budget=2.0), before, after) == ""
    assert guards.beyond(PPOConfig(kl_budget=2.5), before, after) == "the KL of 3 nats is above kl_budget 2.5"
    assert "disagreement 2 is above" in guards.beyond(PPOConfig(disagreement_budget=1.9), before, after)
    assert guards.beyond(PPOConfig(kl_budget=9.0), before, {"eval/kl": float("nan")})
    assert "rose from 0 to 1 and the disagreement of its members from 1 to 2" in guards.alarm(before, after)
    assert guards.alarm(before, {**after, "eval/reward": -1}) == guards.alarm(before, {"eval/reward": 1}) == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "a", "models": ["b"]}, "reward.model and reward.models are both given"),
        ({"models": ["a", "a"]}, "are not different directories"),
        ({"model": "a", "model_weight": -1.0, "combine": "min"}, "makes the least score of an ensemble the largest"),
    ],
)
def test_rewards_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        RewardSourceConfig(**settings)


def test_limits_of_what_is_not_there_are_refused(one_device, tmp_path):
    with pytest.raises(UserError, match="disagreement_budget 2 needs several members"):
        train.run(toy_run(tmp_path / "run", disagreement_budget=2.0), **TOY_ROWS)
    alone = {"rows": TOY_ROWS["rows"]}
    for setting, words in {
        "kl_budget": "kl_budget 2 needs .* held-out prompts",
        "disagreement_budget": "disagreement_budget 2 needs .* held-out prompts",
        "reward_standardize": "reward_standardize needs held-out prompts",
    }.items():
        value = "mean" if setting == "reward_standardize" else 2.0
        config = toy_run(tmp_path / setting, **{setting: value})
        with pytest.raises(UserError, match=words):
            train.run(replace(config, data__eval_fraction=0.0), **alone)
    with pytest.raises(UserError, match=r"ppo.reward_standardize is of reward models, and there is none"):
        train.setup(toy_run(reward_model=False, reward_standardize="mean"), reward_functions=[len], **TOY_ROWS)
    lone, words = {"combine": "lower_bound"}, "lower_bound is of an ensemble, and there is no more than one member"
    with pytest.raises(UserError, match=rf"reward.combine {words}; set it to mean"):
        train.setup(replace(toy_run(), reward__combine="lower_bound"), **TOY_ROWS)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    score = ScoreArgs(models=[str(toy_directory() / "reward")], data_path=str(tmp_path / "rows.jsonl"), **lone)
    with pytest.raises(UserError, match=f"combine {words}"):
        sample.run_score(replace(score, output=str(tmp_path / "out.jsonl")))
    with pytest.raises(UserError, match=r"ppo.overlong_tokens 7 is more than sampling.max_new_tokens 6"):
        train.setup(toy_run(overlong_tokens=7), **TOY_ROWS)
