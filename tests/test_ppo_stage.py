"""Laws of the PPO stage: its networks, checks, keys, what it saves; and that no setting of PPOConfig is idle."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ppo import PARAMS, batch_of, ppo_run, same_bits, score, updater
from tiny import BIGRAMS, ONE, STOP, TOY_ROWS, Bigram, iteration, make_experience, make_rollout, toy_directory, toy_run

from rlhf_jax.commands.plan import calibration
from rlhf_jax.commands.plan.plan import Row
from rlhf_jax.config import MeshConfig, PPOArgs, PPOConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.inference.reward_functions import RewardFailure
from rlhf_jax.models import hf
from rlhf_jax.online import guards
from rlhf_jax.online import loop as online_loop
from rlhf_jax.online import programs as programs_module
from rlhf_jax.online.core import ema
from rlhf_jax.online.iteration import LoopState, evaluate, first_state, iterate, key_at, roll_out
from rlhf_jax.online.method import Method
from rlhf_jax.online.networks import Networks
from rlhf_jax.online.programs import Programs
from rlhf_jax.ppo import Models, core, objective, train
from rlhf_jax.runs import directory
from rlhf_jax.sharding import make_mesh
from rlhf_jax.training.state import TrainState
from rlhf_jax.types import Rollout

NAN = float("nan")


@pytest.fixture
def one_device(monkeypatch):
    """The stage on one device, where compiling is cheapest."""
    monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=ONE))


def fake_programs(method: Method, seen: list) -> Programs:
    """Programs of an iteration that compute nothing: the update adds 1 to every parameter and notes its arguments."""
    rows, num = method.config.data.batch_size, method.config.sampling.max_new_tokens
    drawn = make_rollout(0, PARAMS["policy"], rows=rows, prompt_len=2, num=num)

    def rollout(params, tokens, mask, key, law, *_):
        seen.append(("rollout", params, key))
        return drawn

    def scores(params, ref, reward, rollout, host, kl_coef, temperature, teacher):
        per_row = {"reward": host - len(seen), "kl": jnp.zeros(rows)}  # every evaluation is worse than the one before
        return make_experience(0, PARAMS, rows=rows), kl_coef, {"rollout/reward": host.mean()}, per_row

    def update(state, experience, key, temperature, ptx, frozen):
        seen.append(("update", ptx, key))
        params = jax.tree.map(lambda p: p + 1.0, state.params)
        return dataclasses.replace(state, params=params), {
            "policy/loss": jnp.zeros(()),
            "optim/skipped": jnp.zeros(()),
            "optim/empty": jnp.zeros(()),
        }

    return dataclasses.replace(method.programs, rollout=rollout, score=scores, update=update)


real_setup = train.setup


def fake_setup(config, seen=None, **overrides):
    """`train.setup` with fake programs."""
    method, loop = real_setup(config, **overrides)
    return dataclasses.replace(method, programs=fake_programs(method, [] if seen is None else seen)), loop


@pytest.fixture
def fakes(monkeypatch, one_device):
    """A list of what the fake programs have been called with."""
    seen: list = []
    monkeypatch.setattr(train, "setup", functools.partial(fake_setup, seen=seen))
    return seen


# --- networks


def networks(**ppo) -> tuple[Networks, dict]:
    """The networks and what is trained."""
    reward_model = ppo.pop("reward_model", True)
    functions = None if reward_model else [lambda prompts, responses, **columns: [0.5] * len(prompts)]
    method, loop = train.setup(toy_run(reward_model=reward_model, **ppo), reward_functions=functions, **TOY_ROWS)
    return method.nets, loop.state.params


@pytest.mark.parametrize("value_init", ["auto", "reward_model"])
def test_the_critic_starts_as_the_reward_model(one_device, value_init):
    nets, params = networks(value_init=value_init)
    assert same_bits(params["value"], nets.reward)
    pairs = zip(jax.tree.leaves(params["value"]), jax.tree.leaves(nets.reward), strict=True)
    assert not any(
        a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in pairs
    )  # training donates its own


def test_a_critic_that_starts_as_the_reward_model_says_what_that_is_paid(one_device):
    """model_weight times the score, also on the scale of reward_standardize."""
    method, loop = train.setup(replace(toy_run(), reward__model_weight=-2.5), **TOY_ROWS)
    nets, value = method.nets, loop.state.params["value"]
    before = nets.reward["score"]
    assert same_bits(value["score"], jax.tree.map(lambda x: np.float32(-2.5) * x, before))
    trunk = lambda tree: {name: part for name, part in tree.items() if name != "score"}  # noqa: E731
    assert same_bits(trunk(value), trunk(nets.reward))
    scaled = nets.critic_head({**nets.reward, "score": {"kernel": before["kernel"] / 4, "bias": before["bias"] + 1}})
    assert scaled["bias"] == np.float32(-2.5) * (before["bias"] + 1)


@pytest.mark.parametrize("changes", [{"value_init": "zeros"}, {"reward_model": False}])
def test_the_critic_starts_as_the_policy_with_a_zero_head(one_device, changes):
    _, params = networks(**changes)
    value = params["value"]
    trunk = {name: tree for name, tree in value.items() if name != "score"}
    assert same_bits(trunk, {name: params["policy"][name] for name in trunk})
    assert trunk.keys() == {"embed", "layers", "final_norm"}
    assert not any(leaf.any() for leaf in jax.tree.leaves(value["score"]))


def test_on_a_shared_trunk_the_critic_is_a_head_alone(one_device):
    nets, params = networks(shared_trunk=True)
    assert params["value"].keys() == {"score"} and not params["value"]["score"]["kernel"].any()
    assert nets.models.shared_trunk


def test_the_reference_is_the_first_policy_and_no_alias_of_the_trained_one(one_device):
    nets, params = networks()
    assert same_bits(nets.ref, params["policy"])
    donated = jax.tree.map(lambda x: x + 0, params)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    assert same_bits(nets.ref, donated["policy"])


# --- the law that is sampled from and the law that is trained


@pytest.mark.parametrize(
    ("changes", "dtype", "recompute", "importance"),
    [
        ({}, "float32", False, "off"),
        ({"sampling__temperature": 0.5}, "float32", False, "off"),
        ({"sampling__top_k": 3}, "float32", False, "off"),
        ({"sampling__top_p": 0.9}, "bfloat16", True, "off"),
        ({"sampling__min_new_tokens": 1}, "float32", True, "off"),
        ({"ppo__old_logprobs": "recompute"}, "float32", True, "off"),
        ({"ppo__train_temperature": 0.5}, "float32", True, "sequence"),
        ({"ppo__train_temperature": 1.0}, "float32", False, "off"),
        ({"ppo__importance": "token"}, "float32", True, "token"),
        ({}, "bfloat16", True, "sequence"),
        ({"sampling__top_k": 3, "sampling__top_p": 0.9}, "bfloat16", True, "sequence"),
        ({"ppo__importance": "off"}, "bfloat16", True, "off"),
        ({"ppo__old_logprobs": "sampler"}, "bfloat16", False, "off"),
    ],
)
def test_old_logprobs_are_recomputed_and_tokens_weighted_where_the_sampler_has_another_law(
    changes, dtype, recompute, importance
):
    asked = told_to_score(replace(toy_run(), **changes), dtype=dtype)
    assert (asked["recompute"], asked["importance"]) == (recompute, importance)


def test_the_reward_model_is_weighed_as_the_config_says():
    assert told_to_score(replace(toy_run(), reward__model_weight=0.25))["model_weight"] == 0.25


@pytest.mark.slow
def test_there_is_no_kl_at_step_0_where_stop_ids_are_forbidden_at_first(one_device):
    """The sampler's law gives stop ids no mass there; paid as a KL to the reference, it would be one at step 0."""
    ppo, loop = train.setup(replace(toy_run(), sampling__min_new_tokens=4), **TOY_ROWS)
    with jax.set_mesh(ppo.mesh.grid):
        rollout, scored, _ = roll_out(ppo, loop, loop.policy, ppo.batch(0), ppo.inputs.key)
    assert scored[2]["rollout/logprob_gap_max"] > 1e-3
    assert scored[2]["rollout/kl"] == scored[2]["rollout/kl_k3"] == 0.0
    assert np.asarray(rollout.mask).sum(1).min() >= 5


# --- contradictions


@pytest.mark.parametrize(
    ("ppo", "other", "words"),
    [
        ({}, {"sampling__temperature": 0.0}, ["sampling.temperature 0.0", "at least 0.01"]),
        ({"old_logprobs": "sampler"}, {"sampling__top_p": 0.9}, ["ppo.old_logprobs", "top_p"]),
        ({"old_logprobs": "sampler"}, {"sampling__min_new_tokens": 1}, ["ppo.old_logprobs", "min_new_tokens"]),
        ({"old_logprobs": "sampler", "train_temperature": 2.0}, {}, ["ppo.train_temperature 2", "recompute"]),
        ({"old_logprobs": "sampler", "importance": "token"}, {}, ["ppo.importance token", "recompute"]),
        ({"importance": "token"}, {"sampling__top_p": 0.9}, ["ppo.importance token", "sampling.top_p"]),
        ({"stop": "truncate"}, {"sampling__min_new_tokens": 1}, ["min_new_tokens", "ppo.truncate_after"]),
        ({"truncate_after": 2}, {}, ["ppo.truncate_after", "ppo.stop"]),
        ({"minibatches": 3, "accumulate": 2}, {}, ["data.batch_size 16", "6"]),
        ({"score_microbatch": 5}, {}, ["data.batch_size 16", "ppo.score_microbatch 5"]),
        ({}, {"sampling__microbatch": 5}, ["data.batch_size 16", "sampling.microbatch 5"]),
        ({"kl_target": 0.0}, {}, ["ppo.kl_target 0.0", "positive"]),
        ({"missing_eos": "subtract"}, {}, ["ppo.missing_eos_value -1.0", "positive"]),
        ({"ptx_coef": 1.0}, {}, ["ppo.ptx_coef 1.0", "ppo.ptx_path"]),
        ({"ptx_coef": 1.0, "ptx_path": "x", "ptx_batch_size": 3, "accumulate": 2}, {}, ["ppo.ptx_batch_size 3", "2"]),
        ({"value_init": "reward_model"}, {"reward__model": ""}, ["ppo.value_init", "reward.model"]),
        ({"value_init": "reward_model", "shared_trunk": True}, {}, ["ppo.value_init", "ppo.shared_trunk"]),
        ({}, {"reward__model": ""}, ["no reward", "reward.model", "reward.functions"]),
    ],
)
def test_settings_that_contradict_each_other_are_one_line_with_the_values_and_the_cure(one_device, ppo, other, words):
    with pytest.raises(UserError) as error:
        train.setup(replace(toy_run(**ppo), **other), **TOY_ROWS)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ppo", "other", "words"),
    [
        ({}, {"data__batch_size": 12}, ["data.batch_size 12", "8"]),
        ({"minibatches": 4}, {}, ["ppo.minibatches", "4", "8"]),
        ({"score_microbatch": 4}, {}, ["ppo.score_microbatch 4", "8"]),
        ({}, {"sampling__microbatch": 4}, ["sampling.microbatch 4", "8"]),
        ({"ptx_coef": 1.0, "ptx_path": "x", "ptx_batch_size": 4}, {}, ["ppo.ptx_batch_size", "4", "8"]),
    ],
)
def test_batches_that_do_not_divide_over_the_mesh_are_refused_before_anything_is_loaded(ppo, other, words):
    """On 8 devices along data."""
    with pytest.raises(UserError) as error:
        train.setup(replace(toy_run(**ppo), model__path="nowhere", **other), **TOY_ROWS)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_reward_model_with_another_tokenizer_is_refused(one_device, tmp_path):
    from rlhf_jax.data.tokenizer import Tokenizer
    from rlhf_jax.models.loading import check_same_tokenizer
    from rlhf_jax.tasks.random_walks import make_tokenizer

    make_tokenizer(9).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another tokenizer"):
        check_same_tokenizer(Tokenizer.load(str(tmp_path)), str(toy_directory() / "reward"), "reward model")


# --- one iteration after the other


def test_no_two_rollouts_updates_or_evaluations_share_noise_except_evaluations_of_the_same_prompts(fakes):
    ppo, loop = train.setup(toy_run(), **TOY_ROWS)
    for i in range(5):
        loop, _, _ = iteration(ppo, loop, i)
    trained = [jax.random.key_data(key).tolist() for _, _, key in fakes]
    assert len(trained) == 10 and len({tuple(key) for key in trained}) == 10
    del fakes[:]
    evaluate(ppo, loop)
    evaluate(ppo, loop)
    first, second = ([tuple(jax.random.key_data(k).tolist()) for _, _, k in part] for part in (fakes[:1], fakes[1:]))
    assert first == second and not set(first) & {tuple(key) for key in trained}


def test_python_rewards_get_prompts_responses_and_columns_row_by_row_and_gold_is_only_logged(fakes):
    rows = [{**row, "answer": row["prompt"].upper()} for row in TOY_ROWS["rows"]]
    calls = []

    def my_reward(prompts, responses, *, answer):
        calls.append((prompts, responses, answer))
        return [ord(letter) / 7 for letter in answer]

    gold = lambda prompts, responses, **columns: [100.0] * len(prompts)  # noqa: E731
    config = replace(toy_run(reward_model=False), reward__function_weights=[0.5])
    ppo, loop = train.setup(config, rows=rows, eval_rows=rows[:5], reward_functions=[my_reward], gold=gold)
    _, metrics, _ = iteration(ppo, loop, 0)
    ((prompts, responses, answers),) = calls
    assert answers == [prompt.upper() for prompt in prompts] and len(responses) == len(prompts) == 16
    assert prompts == ppo.batch(0)["prompts"]
    np.testing.assert_allclose(metrics["rollout/reward"], np.mean([ord(a) / 14 for a in answers]), rtol=1e-6)
    assert metrics["rollout/gold"] == 100.0


def test_an_iteration_samples_from_the_newest_policy_and_evaluates_the_averaged_one(fakes):
    ppo, loop = train.setup(toy_run(ema_decay=0.75), **TOY_ROWS)
    leaf = lambda tree: float(tree["final_norm"]["scale"][0])  # noqa: E731
    start = leaf(loop.state.params["policy"])
    for i in range(2):
        loop, _, _ = iteration(ppo, loop, i)
    sampled_from = [leaf(params) - start for what, params, _ in fakes if what == "rollout"]
    np.testing.assert_allclose(sampled_from, [0.0, 1.0], atol=1e-6)
    average = 0.75 * (0.75 * 0.0 + 0.25 * 1.0) + 0.25 * 2.0
    np.testing.assert_allclose(leaf(loop.policy) - start, average, atol=1e-6)
    del fakes[:]
    evaluate(ppo, loop)
    np.testing.assert_allclose(leaf(fakes[0][1]) - start, average, atol=1e-6)


@pytest.mark.parametrize("decay", [0.9, 0.992, 0.999])
def test_the_average_of_a_bfloat16_policy_is_kept_in_float32_and_evaluated_in_bfloat16(decay):
    """In bfloat16 a thousandth of what is added is rounded away, so that it stayed the first policy for ever."""
    mesh = make_mesh(MeshConfig(), devices=ONE)
    before, after = (TrainState(0, {"policy": {"w": jnp.full(3, x, jnp.bfloat16)}}, ()) for x in (1.0, 2.0))
    loop = first_state(SimpleNamespace(config=toy_run(), settings=PPOConfig(ema_decay=decay), mesh=mesh), before)
    for _ in range(200):
        loop = dataclasses.replace(loop, average=ema(loop.average, after.params["policy"], decay))
    expected = 2 - decay**200
    np.testing.assert_allclose(loop.average["w"], expected, rtol=1e-4)
    assert loop.policy["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(loop.policy["w"].astype(jnp.float32), expected, rtol=0.004)


def lines_of(path) -> list[dict]:
    return list(map(json.loads, (path / "metrics.jsonl").read_text().splitlines()))


def test_the_tokens_of_a_second_are_those_of_all_responses_since_the_line_before(fakes, tmp_path):
    """Not the slots; here every iteration has the responses of `fake_programs`. Evaluations are not in the seconds."""

    def reward(prompts, responses, **columns):
        time.sleep(0.02)
        return [0.5] * len(prompts)

    config = replace(toy_run(tmp_path / "run", reward_model=False, num_samples=0), run__log_every=3)
    train.run(config, reward_functions=[reward], **TOY_ROWS)
    mask = make_rollout(0, PARAMS["policy"], rows=16, prompt_len=2, num=6).mask
    counted, parts = [], ("data", "rollout", "reward", "score", "update", "save")
    for line in lines_of(tmp_path / "run"):
        if "rollout/reward" in line:
            seconds = sum(line.get(f"time/{part}_s", 0.0) for part in parts)
            counted.append((line["step"], line["time/tokens_per_s"] * seconds / int(mask.sum())))
    steps, iterations = zip(*counted, strict=True)
    assert steps == (2, 3, 4) and mask.sum() < mask.size
    np.testing.assert_allclose(iterations, [2, 1, 1], rtol=0.02)


def test_a_run_that_a_limit_ends_counts_all_that_came_before(fakes, tmp_path, monkeypatch):
    """Its last iteration has a line; where that was skipped, the updates before it are counted all the same."""
    config = replace(toy_run(tmp_path / "run", reward_model=False, kl_budget=0.5, num_samples=0), run__log_every=10)
    config = replace(config, reward__on_failure="skip", reward__retries=0)
    evaluated = iter([RewardFailure("down"), 0.1, 1.0])

    def scripted(method, loop):
        if isinstance(kl := next(evaluated), Exception):
            raise kl
        return {"eval/objective": 0.0, "eval/reward": 0.0, "eval/kl": kl, guards.DISAGREEMENT: 1.0}, []

    def setup(*args, **overrides):
        method, loop = fake_setup(*args, **overrides)
        update = method.programs.update
        empty = lambda *args: ((made := update(*args))[0], made[1] | {"optim/empty": jnp.ones(())})  # noqa: E731
        return dataclasses.replace(method, programs=dataclasses.replace(method.programs, update=empty)), loop

    calls = []

    def reward(prompts, responses, **columns):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("down")
        return [0.5] * len(prompts)

    monkeypatch.setattr(online_loop, "evaluate", scripted)
    monkeypatch.setattr(train, "setup", setup)
    summary = train.run(replace(config, ppo__iterations=8), reward_functions=[reward], **TOY_ROWS)
    assert [line["step"] for line in lines_of(tmp_path / "run") if "rollout/reward" in line] == [2]
    assert summary["iterations"] == 4 == directory.read_record(tmp_path / "run")["step"]
    assert summary["empty"] == 3 and summary["remarks"][1].startswith("3 updates had a gradient of 0")
    assert summary["reward_failed"] == {"iterations": 1, "evaluations": 1} and summary["before"] == {}
    assert (
        summary["first"]["eval/kl"] == 0.1 and "the reward failed in 1 iterations and 1 eval" in summary["remarks"][0]
    )


def test_a_run_whose_reward_failed_in_every_iteration_writes_no_model(fakes, tmp_path):
    config = replace(toy_run(tmp_path / "run", reward_model=False), reward__on_failure="skip", reward__retries=0)
    with pytest.raises(
        UserError, match="the reward failed in each of the 4 iterations: nothing was trained, no model"
    ):
        train.run(config, reward_functions=[lambda prompts, responses, **columns: 1 / 0], **TOY_ROWS)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(("held", "wanted", "shown"), [(5, 9, 5), (16 + 5, 19, 19), (40, 40, 40)])
def test_the_samples_of_an_evaluation_are_of_different_prompts_and_no_more_than_asked_for(fakes, held, wanted, shown):
    """Batches of 16, of which the last is filled up with copies of its last prompt."""
    prompts = [{"prompt": f"{a} {b}"} for a in "bcdefg" for b in "bcdefgh"][:held]
    config = replace(toy_run(num_samples=wanted), data__max_prompt_length=2)
    ppo, loop = train.setup(config, **{**TOY_ROWS, "eval_rows": prompts})
    _, samples = evaluate(ppo, loop)
    assert [row["prompt"] for row in samples] == [row["prompt"] for row in prompts[:shown]]


def write_text(path) -> str:
    """Sixty rows of pretraining text that depend on the file's name."""
    rows = [{"text": " ".join("abcdefghijk"[(i + len(path.name)) % 7 :])} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_every_optimiser_step_gets_pretraining_text_of_its_own(fakes, tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    ppo, loop = train.setup(toy_run(ptx_coef=1.0, ptx_path=text, ptx_batch_size=4, minibatches=2), **TOY_ROWS)
    for i in range(2):
        loop, _, _ = iteration(ppo, loop, i)
    batches = [jax.device_get(ptx) for what, ptx, _ in fakes if what == "update"]
    assert [batch["tokens"].shape for batch in batches] == [(4, 4, 8)] * 2  # epochs * minibatches, rows, length
    np.testing.assert_allclose(batches[0]["weights"].sum((1, 2)), 1.0, rtol=1e-6)
    for i in range(2):
        for j in range(4):
            np.testing.assert_array_equal(batches[i]["tokens"][j], ppo.text[i * 4 + j]["tokens"])
    config = toy_run(ptx_coef=1.0, ptx_path=text, ptx_batch_size=4096)
    with pytest.raises(UserError, match=r"of 4096; set ppo\.ptx_batch_size to at most"):
        train.setup(config, **TOY_ROWS)
    with pytest.raises(UserError, match=r"data\.max_length 4096 is more than the model's \d+ positions"):
        train.setup(replace(config, data__max_length=4096), **TOY_ROWS)


def test_iterations_by_hand_are_those_of_the_stage_bit_for_bit(one_device, tmp_path):
    """An iteration is a function of the method, the loop's state, a batch and a key: nothing else is carried."""
    config = replace(
        toy_run(tmp_path / "run", iterations=2, ema_decay=0.5, save_value_model=True), run__keep_best=False
    )
    method, loop = train.setup(config, **TOY_ROWS)
    with jax.set_mesh(method.mesh.grid):
        for i in range(2):
            loop, metrics, table = iterate(method, loop, method.batch(i), key_at(method, "training", i))
        assert table["rollout"].tokens.shape == (16, 6)
        results, samples = evaluate(method, loop)
        method.save(tmp_path / "hand", loop.kept(method))
    summary = train.run(config, **TOY_ROWS)
    assert results == summary["after"] and float(loop.kl_coef) == summary["kl_coef"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (written,) = [line for line in lines if line["step"] == 2 and "policy/loss" in line]
    assert {name: float(value) for name, value in metrics.items()}.items() <= written.items()
    assert len(samples) == config.ppo.num_samples
    for name in ("model", "value_model"):
        by_hand, by_stage = (tmp_path / place / name / "model.safetensors" for place in ("hand", "run"))
        assert by_hand.read_bytes() == by_stage.read_bytes()
    assert LoopState(**loop.tree()) == loop and loop.tree().keys() == {"state", "kl_coef", "average"}


# --- what is written


def test_actor_and_critic_are_saved_from_the_same_iteration_the_best_one(fakes, tmp_path):
    """The fakes' rewards fall with every call, so the evaluation before the first iteration is the best."""
    config = toy_run(tmp_path / "run", save_value_model=True, value_init="zeros")
    summary = train.run(config, **TOY_ROWS)
    assert summary["best_step"] == 0
    policy, value = (load(tmp_path / "run" / name, head) for name, head in (("model", False), ("value_model", True)))
    first = load(toy_directory() / "policy", False)
    assert same_bits(policy, first)
    assert same_bits(value["layers"], first["layers"]) and not value["score"]["kernel"].any()


@pytest.mark.parametrize(
    ("objectives", "best", "after"),
    [
        ([NAN, -1.0, NAN], 2, 2),
        ([NAN, NAN, -3.0], 4, 4),
        ([1.0, np.inf, NAN], 0, 0),
        ([NAN, np.inf, -np.inf], None, 4),
    ],
)
def test_an_evaluation_that_is_not_finite_is_never_the_best(fakes, tmp_path, monkeypatch, objectives, best, after):
    """`before` is the first one whatever it is, `after` that of the saved policy: the last if none is finite."""
    results = iter(zip((0, 2, 4), objectives, strict=True))

    def scripted(method, loop):
        step, objective = next(results)
        return {"eval/objective": objective, "eval/reward": float(step)}, []

    monkeypatch.setattr(online_loop, "evaluate", scripted)
    summary = train.run(toy_run(tmp_path / "run"), **TOY_ROWS)
    assert summary.get("best_step") == best
    assert (summary["before"]["eval/reward"], summary["after"]["eval/reward"]) == (0, after)
    first, last = (load(path, False) for path in (toy_directory() / "policy", tmp_path / "run" / "model"))
    np.testing.assert_allclose(last["final_norm"]["scale"] - first["final_norm"]["scale"], after, rtol=1e-6, atol=1e-6)


def test_without_keep_best_both_are_the_last_ones(fakes, tmp_path):
    config = replace(toy_run(tmp_path / "run", save_value_model=True), run__keep_best=False)
    train.run(config, **TOY_ROWS)
    first, last = load(toy_directory() / "reward", True), load(tmp_path / "run" / "value_model", True)
    np.testing.assert_allclose(last["score"]["kernel"], first["score"]["kernel"] + 4.0, rtol=1e-6)
    before, after = load(toy_directory() / "policy", False), load(tmp_path / "run" / "model", False)
    np.testing.assert_allclose(after["final_norm"]["scale"] - before["final_norm"]["scale"], 4.0, rtol=1e-6)


def test_a_run_says_of_each_part_what_it_took_over_the_plan(fakes, tmp_path, monkeypatch):
    """Rollout is prefill and decode; without figures of the devices it says why not, and has finished all the same."""
    config = replace(toy_run(tmp_path / "run"), run__calibrate=True)
    assert "figures of a cpu are not known" in train.run(config, **TOY_ROWS)["calibration"]["none"]
    monkeypatch.setitem(calibration.KINDS, "cpu", "v5e")
    row = lambda name, s: Row(name, 0, 0, 0, 1, 1, 1, {}, (), {"compute": s, "memory": s / 2}, 1, 0)  # noqa: E731
    rows = [row("prefill", 1.0), row("decode", 3.0), row("score", 2.0), row("update", 5.0)]
    monkeypatch.setattr(calibration, "analyse", lambda *planned: (rows, {}))
    said = train.run(replace(config, run__overwrite=True), **TOY_ROWS)["calibration"]
    planned = {part: figures["planned_s"] for part, figures in said["parts"].items()}
    assert (said["chip"], planned) == ("v5e", {"rollout": 4.0, "score": 2.0, "update": 5.0})
    assert calibration.read(str(tmp_path / "run")).ratios.keys() == planned.keys()


def load(path, head: bool):
    arch, _ = hf.read_config(path)
    return hf.load_params(path, arch, score_head=head)


def assert_stopped_and_continued_is_left_alone(config):
    """config(name) is a run; SIGTERM comes in the third iteration of "stopped". The models have the same bits.

    Returns the summaries of the run left alone and of the one that went on.
    """
    alone = train.run(config("alone"), **TOY_ROWS)
    calls = iter(range(100))

    def interrupted(config, **overrides):
        method, loop = train.setup(config, **overrides)

        def update(*args):
            if next(calls) == 2:
                signal.raise_signal(signal.SIGTERM)
            return method.programs.update(*args)

        return dataclasses.replace(method, programs=dataclasses.replace(method.programs, update=update)), loop

    with pytest.raises(Stopped):
        online_loop.run("ppo", config("stopped"), interrupted, **TOY_ROWS)
    again = train.run(config("stopped"), **TOY_ROWS)
    models = [Path(config(name).run.output_dir) / "model" for name in ("alone", "stopped")]
    files = sorted(path.name for path in models[0].glob("*.safetensors"))
    assert files
    for name in files:
        assert (models[0] / name).read_bytes() == (models[1] / name).read_bytes()
    return alone, again


@pytest.mark.slow
def test_a_run_with_every_option_at_once_trains_and_reports_its_invariants(one_device, tmp_path):
    options = {
        "iterations": 2, "minibatches": 2, "accumulate": 2, "score_microbatch": 8, "stop": "truncate",
        "truncate_after": 1, "missing_eos": "replace", "score_at": "after_eos", "kl_estimator": "k3",
        "whiten_rewards": True, "dual_clip": 3.0, "entropy_coef": 0.01, "loss_reduction": "sequence",
        "old_logprobs": "recompute", "shared_trunk": True,
        "ptx_coef": 1.0, "ptx_path": write_text(tmp_path / "text.jsonl"), "ptx_batch_size": 4, "target_kl": 10.0,
        "ema_decay": 0.5, "sample_every": 1, "save_value_model": True,
    }  # fmt: skip
    seen = []

    def counts(prompts, responses, **columns):
        seen.append((prompts, responses))
        return [0.1 * len(response) for response in responses]

    config = replace(toy_run(tmp_path / "run", **options), run__keep_best=False)
    summary = train.run(config, reward_functions=[counts], gold=counts, **TOY_ROWS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "rollout/reward" in line]
    assert [line["step"] for line in trained] == [1, 2] and summary["iterations"] == 2
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert trained[0]["rollout/kl"] == trained[0]["rollout/kl_k3"] == 0.0
    for line in trained:
        assert abs(line["policy/first_ratio_max"] - 1) < 2e-6 and line["policy/first_clip_fraction"] == 0.0
        assert line["optim/skipped"] == 0.0 and line["policy/epochs_taken"] == 2.0 and line["ptx/nll"] > 0
    assert trained[0]["optim/lr"] > trained[1]["optim/lr"] > 0
    assert {len(prompts) for prompts, _ in seen} == {16, 5}
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 1, 2}
    policy, value = (load(tmp_path / "run" / name, head) for name, head in (("model", False), ("value_model", True)))
    first = load(toy_directory() / "policy", False)
    assert differs(policy, first) and value["score"]["kernel"].any()
    assert differs(value["layers"], policy["layers"])  # the trunk that the head was trained on, not the average


# --- no setting is idle

ON_POLICY = make_experience(3, PARAMS)
UP_AND_DOWN = jnp.where(jnp.arange(6) % 2, 0.9, -0.9)[None, :] * ON_POLICY.mask
OFF_POLICY = dataclasses.replace(ON_POLICY, old_logprobs=ON_POLICY.old_logprobs + UP_AND_DOWN)


def scored(config: PPOConfig, **told):
    """All that scoring returns, for a rollout far above the reference."""
    rollout = make_rollout(4, PARAMS["policy"])
    rollout = Rollout(**{**vars(rollout), "logprobs": jnp.where(rollout.mask, -0.1, 0.0)})
    return score(config, rollout, **{"recompute": False, **told})


def weighted(config: PPOConfig):
    """The same with the policy's own log-probs, and tokens weighted by the difference."""
    return scored(config, recompute=True, importance="token")


def loss(config: PPOConfig):
    """The loss and metrics of an off-policy minibatch, with pretraining text if its coefficient is on."""
    ptx = {
        "tokens": jnp.full((2, 4), 3),
        "positions": jnp.broadcast_to(jnp.arange(4), (2, 4)),
        "segment_ids": jnp.ones((2, 4), jnp.int32),
        "weights": jnp.full((2, 4), 0.1),
    }
    old_values = OFF_POLICY.old_values + 0.8
    x = dataclasses.replace(OFF_POLICY, old_values=old_values)
    return objective(BIGRAMS, config)(PARAMS, batch_of(x, **({"ptx": ptx} if config.ptx_coef else {})), None)


def updated(config: PPOConfig):
    """Parameters and metrics after an update."""
    state, update = updater(replace(ppo_run(), ppo=config))
    state, metrics = update(state, OFF_POLICY)
    return state.params, state.step, metrics


def rates(config: PPOConfig):
    """The policy's learning rates of the first three iterations."""
    run = replace(ppo_run(), ppo=config, optim__schedule="linear")
    return [core.make_ppo_optimizer(run)[1](i) for i in range(3)]


def shapes(config: PPOConfig):
    """Rows that the loss and the networks see at once, while they are traced."""
    seen = []

    class Watching(Bigram):
        def apply(self, params, tokens, positions, segment_ids):
            seen.append(tokens.shape)
            return super().apply(params, tokens, positions, segment_ids)

    models = Models(Watching(), Watching())
    score(config, make_rollout(4, PARAMS["policy"]), models=models)
    state, update = updater(replace(ppo_run(), ppo=config), models)
    jax.eval_shape(update, state, OFF_POLICY)
    return sorted(set(seen))


def sampled(config: PPOConfig):
    """The rollout program around a sampler that draws full rows, and what that was asked: stop ids, routing."""
    full = make_rollout(4, PARAMS["policy"])
    tokens = full.tokens.at[:, 1].set(STOP).at[:, 3].set(STOP)
    full = Rollout(**{**vars(full), "tokens": tokens, "mask": jnp.ones_like(full.mask)})
    asked = []
    mesh = make_mesh(MeshConfig(), devices=ONE)
    nets = Networks(BIGRAMS_ON_TOY, None, None, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            programs_module,
            "make_sampler",
            lambda model, sampling, *stop_ids, carry, routing: (
                asked.append((*stop_ids, routing)) or (lambda *args, **options: full)
            ),
        )
        params = jax.tree.map(jnp.copy, PARAMS)
        programs, _ = train.make_programs(replace(toy_run(), ppo=config), nets, params, mesh, (STOP,))
    return asked, programs.rollout(*[None] * 5)


@dataclasses.dataclass(frozen=True)
class BigramWithDtype(Bigram):
    compute_dtype: jnp.dtype = np.dtype("float32")  # noqa: RUF009


BIGRAMS_ON_TOY = Models(BigramWithDtype(), BigramWithDtype())


def told(config: PPOConfig) -> tuple:
    """Which old log-probs scoring is told to take, and how to weight."""
    asked = told_to_score(replace(toy_run(), ppo=config))
    return asked["recompute"], {asked["importance"]: 0}  # a key of the tree: texts are no numbers


def told_to_score(run: PPOArgs, dtype: str = "float32") -> dict:
    """The keyword arguments with which the stage makes its scoring program."""
    models = Models(BigramWithDtype(compute_dtype=jnp.dtype(dtype)), BigramWithDtype())
    nets, params, asked = Networks(models, None, None, None, None), jax.tree.map(jnp.copy, PARAMS), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "make_score", lambda *args, **kwargs: asked.update(kwargs) or (lambda: None))
        train.make_programs(run, nets, params, make_mesh(MeshConfig(), devices=ONE), (STOP,))
    return asked


def staged(config: PPOConfig):
    """The stage's first parameters, average, KL coefficient and pretraining batch."""
    if config.ptx_path:
        config = replace(config, ptx_path=write_text(toy_directory() / config.ptx_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=ONE))
        method, loop = train.setup(replace(toy_run(), ppo=config), **TOY_ROWS)
    return loop.state.params, loop.average, loop.kl_coef, method.text and method.text[0]


def written(config: PPOConfig):
    """The files of a run with fake programs, and its sample rows."""
    out = toy_directory() / f"run_{abs(hash(config))}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=ONE))
        patch.setattr(train, "setup", fake_setup)
        train.run(replace(toy_run(out), ppo=config, run__overwrite=True), **TOY_ROWS)
    return sorted(p.name for p in out.iterdir()), (out / "samples.jsonl").read_text().count("\n")


def limited(config: PPOConfig):
    """Whether an evaluation of this KL, at which members disagree three times as much as before, ends the run."""
    before, after = ({"eval/kl": 3.0, guards.DISAGREEMENT: times} for times in (1.0, 3.0))
    return np.array([bool(guards.beyond(config, before, after))])


def double_loss(logprobs, old_logprobs, advantages, weights, *, clip_ratio):
    return -2 * clip_ratio * jnp.sum(weights * logprobs * advantages), {}


def reward_now(rewards, values, *, discount):
    return discount * rewards - values


def absolute_loss(values, old_values, returns, weights, *, value_clip):
    return jnp.sum(weights * jnp.abs(values - returns)) * value_clip, {}


PTX = {"ptx_coef": 1.0, "ptx_path": "one.jsonl", "ptx_batch_size": 4}
ADAPTIVE = {"kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 100.0}

# field: (what to look at, one setting, another setting)
EFFECTS = {
    "iterations": (rates, {"iterations": 4}, {"iterations": 5}),
    "epochs": (updated, {"epochs": 1}, {"epochs": 2}),
    "minibatches": (updated, {"epochs": 1}, {"epochs": 1, "minibatches": 2}),
    "accumulate": (shapes, {}, {"accumulate": 2}),
    "score_microbatch": (shapes, {}, {"score_microbatch": 2}),
    "microbatch_tokens": (shapes, {}, {"microbatch_tokens": 20}),
    "stop": (sampled, {}, {"stop": "truncate"}),
    "truncate_after": (sampled, {"stop": "truncate"}, {"stop": "truncate", "truncate_after": 2}),
    "missing_eos": (scored, {}, {"missing_eos": "replace"}),
    "missing_eos_value": (scored, {"missing_eos": "replace"}, {"missing_eos": "replace", "missing_eos_value": -2.0}),
    "score_at": (scored, {}, {"score_at": "after_eos"}),
    "kl_estimator": (scored, {}, {"kl_estimator": "k3"}),
    "kl_controller": (scored, ADAPTIVE, {**ADAPTIVE, "kl_controller": "fixed"}),
    "reward_standardize": (scored, {}, {"reward_standardize": "mean"}),
    "reward_clip": (scored, {}, {"reward_clip": 0.1}),
    "overlong_tokens": (scored, {}, {"overlong_tokens": 2}),
    "overlong_coef": (scored, {"overlong_tokens": 2}, {"overlong_tokens": 2, "overlong_coef": 2.0}),
    "kl_budget": (limited, {}, {"kl_budget": 2.0}),
    "disagreement_budget": (limited, {}, {"disagreement_budget": 2.0}),
    "kl_coef": (staged, {}, {"kl_coef": 0.1}),
    "kl_target": (scored, ADAPTIVE, {**ADAPTIVE, "kl_target": 1e3}),
    "kl_horizon": (scored, ADAPTIVE, {**ADAPTIVE, "kl_horizon": 50.0}),
    "whiten_rewards": (scored, {}, {"whiten_rewards": True}),
    "whiten_advantages": (scored, {}, {"whiten_advantages": False}),
    "whiten_variance": (scored, {}, {"whiten_variance": "bessel"}),
    "advantage": (scored, {}, {"advantage": "test_ppo_stage:reward_now"}),
    "discount": (scored, {}, {"discount": 0.9}),
    "gae_lambda": (scored, {}, {"gae_lambda": 0.5}),
    "clip_ratio": (loss, {}, {"clip_ratio": 0.1}),
    "clip_ratio_high": (loss, {"clip_ratio": 10.0}, {"clip_ratio": 10.0, "clip_ratio_high": 0.01}),
    "dual_clip": (loss, {"clip_ratio": 10.0}, {"clip_ratio": 10.0, "dual_clip": 1.01}),
    "max_log_ratio": (loss, {"clip_ratio": 10.0}, {"clip_ratio": 10.0, "max_log_ratio": 0.1}),
    "value_loss": (loss, {}, {"value_loss": "test_ppo_stage:absolute_loss"}),
    "value_clip": (loss, {}, {"value_clip": 0.0}),
    "value_coef": (loss, {}, {"value_coef": 0.2}),
    "entropy_coef": (loss, {}, {"entropy_coef": 0.1}),
    "loss_reduction": (updated, {"epochs": 1}, {"epochs": 1, "loss_reduction": "sequence"}),
    "old_logprobs": (told, {}, {"old_logprobs": "recompute"}),
    "train_temperature": (told, {}, {"train_temperature": 2.0}),
    "importance": (told, {"importance": "token"}, {"importance": "sequence"}),
    "importance_cap": (weighted, {"importance_cap": 0.1}, {"importance_cap": 0.2}),
    "importance_beyond": (weighted, {"importance_cap": 0.1}, {"importance_cap": 0.1, "importance_beyond": "clip"}),
    "replay_routing": (sampled, {}, {"replay_routing": True}),
    "trainable_layers": (staged, {}, {"trainable_layers": 1}),
    "shared_trunk": (staged, {}, {"shared_trunk": True}),
    "value_init": (staged, {}, {"value_init": "zeros"}),
    "critic_warmup": (rates, {}, {"critic_warmup": 1}),
    "ptx_coef": (loss, {}, {"ptx_coef": 1.0}),
    "ptx_path": (staged, PTX, {**PTX, "ptx_path": "another.jsonl"}),
    "ptx_batch_size": (staged, PTX, {**PTX, "ptx_batch_size": 2}),
    "target_kl": (updated, {"epochs": 2}, {"epochs": 2, "target_kl": 1e-6}),
    "ema_decay": (staged, {}, {"ema_decay": 0.9}),
    "policy_loss": (loss, {}, {"policy_loss": "test_ppo_stage:double_loss"}),
    "num_samples": (written, {"iterations": 2}, {"iterations": 2, "num_samples": 2}),
    "sample_every": (written, {"iterations": 2}, {"iterations": 2, "sample_every": 1}),
    "save_value_model": (written, {"iterations": 2}, {"iterations": 2, "save_value_model": True}),
}


def test_the_table_has_every_field_of_ppo_config():
    assert EFFECTS.keys() == {f.name for f in dataclasses.fields(PPOConfig)}


@functools.cache
def seen_by(look, config: PPOConfig):
    return look(config)


@pytest.mark.parametrize("name", EFFECTS)
def test_no_setting_is_idle(name):
    look, one, other = EFFECTS[name]
    one, other = PPOConfig(**one), PPOConfig(**other)
    changed = {f.name for f in dataclasses.fields(PPOConfig) if getattr(one, f.name) != getattr(other, f.name)}
    assert changed == {name}
    a, b = seen_by(look, one), seen_by(look, other)
    assert jax.tree.structure(a) != jax.tree.structure(b) or differs(a, b)


def differs(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


@pytest.mark.parametrize("look", sorted({look for look, _, _ in EFFECTS.values()}, key=lambda f: f.__name__))
def test_looking_twice_sees_the_same(look):
    """Otherwise the table would be satisfied by noise."""
    config = PPOConfig(iterations=2, epochs=1)
    a, b = look(config), look(config)
    assert jax.tree.structure(a) == jax.tree.structure(b) and not differs(a, b)


@pytest.mark.slow
def test_debug_nans_names_the_operation_of_an_iteration_and_its_rows(one_device, tmp_path):
    def broken(logprobs, old_logprobs, advantages, weights):
        return jnp.sum(weights * jnp.log(logprobs - 1)), {}

    config = replace(toy_run(tmp_path / "run", iterations=1), faults__debug_nans=True)
    with pytest.raises(UserError, match=r"^step 1: the first NaN came from log in .*broken at .*; rows "):
        train.run(config, policy_loss=broken, **TOY_ROWS)
