"""GRPO, RLOO and REINFORCE++ as stages: advantages, KL, groups, meshes, swapping, resuming, learning."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BIGRAMS, ONE, TOY_ROWS, bigram_logprobs, bigram_params, f64, iteration, make_rollout, toy_directory

from rlhf_jax import cli, group
from rlhf_jax.config import (
    REINFORCE_PP,
    RLOO,
    DataConfig,
    GroupConfig,
    GRPOArgs,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ReinforcePPArgs,
    RewardSourceConfig,
    RLOOArgs,
    RunConfig,
    SamplingConfig,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError
from rlhf_jax.group import train
from rlhf_jax.inference.generate import decode
from rlhf_jax.online.epochs import make_epochs
from rlhf_jax.online.iteration import key_at, roll_out
from rlhf_jax.runs.metrics import RunMetrics
from rlhf_jax.runs.parts import Parts
from rlhf_jax.sharding import make_mesh, put, replicated
from rlhf_jax.training.packing import Sharing
from rlhf_jax.training.state import TrainState
from rlhf_jax.types import Rollout

KEY = jax.random.key(0)
PARAMS, REF, REWARD = {"policy": bigram_params(0)["policy"]}, bigram_params(1)["policy"], bigram_params(2)["value"]
MODELS = group.Models(BIGRAMS.policy, BIGRAMS.reward)
RUNS = {"grpo": GRPOArgs, "rloo": RLOOArgs, "reinforce_pp": ReinforcePPArgs}
PLAIN = GroupConfig(group_size=4, scale_rewards="none", kl_coef=0.0)
OPTIM = OptimConfig(learning_rate=0.05, schedule="linear", eps=1e-5)


def score(config, rollout, *, host=None, kl_coef=0.1, recompute=True, models=MODELS):
    program = group.make_score(models, config, recompute=recompute)
    host = jnp.zeros(rollout.mask.shape[0]) if host is None else jnp.asarray(host, jnp.float32)
    return program(PARAMS, REF, REWARD, rollout, host, jnp.float32(kl_coef), jnp.float32(1.0))


def batch_of(x, reduction="token"):
    from rlhf_jax.online.core import packed
    from rlhf_jax.tokens import token_weights

    weights = token_weights(x.mask, reduction)
    return {"experience": x, "packed": packed(x).at(0), "weights": weights, "temperature": jnp.float32(1.0)}


@functools.cache
def numbers():
    """(rollout, k1 f64[B, T] of the policy against the reference) by numpy."""
    rollout = make_rollout(4, PARAMS["policy"])
    return rollout, bigram_logprobs(PARAMS["policy"], rollout) - bigram_logprobs(REF, rollout)


NO_REWARD = group.Models(BIGRAMS.policy)
HOST = np.array([1.0, 2.0, 3.0, 6.0, -1.0, 0.5, 0.25, 4.0])


def advantages(config, **kwargs):
    x = score(config, numbers()[0], host=HOST, models=NO_REWARD, **kwargs)[0]
    return f64(x.advantages), np.asarray(x.mask)


def leave_one_out(scores):
    groups = scores.reshape(-1, 4)
    return (groups - (groups.sum(1, keepdims=True) - groups) / 3).reshape(-1)


# ---- scoring


def test_rloo_pays_the_kl_of_the_whole_response_before_the_baseline():
    _, k1 = numbers()
    found, mask = advantages(RLOO, kl_coef=0.1)
    expected = leave_one_out(HOST - 0.1 * k1.sum(1))
    np.testing.assert_allclose(found, np.where(mask, expected[:, None], 0), atol=1e-5)


def test_reinforce_pp_pays_each_token_the_kl_from_itself_on():
    _, k1 = numbers()
    found, mask = advantages(replace(REINFORCE_PP, whiten_advantages=False), kl_coef=0.1)
    expected = HOST[:, None] - 0.1 * k1[:, ::-1].cumsum(1)[:, ::-1]
    np.testing.assert_allclose(found, np.where(mask, expected, 0), atol=1e-5)
    found, mask = advantages(REINFORCE_PP, kl_coef=0.1)
    white = (expected - expected[mask].mean()) / expected[mask].std()
    np.testing.assert_allclose(found, np.where(mask, white, 0), atol=1e-4)


def test_a_baseline_of_the_group_and_the_kl_to_go_go_together():
    """REINFORCE++-baseline: the scores alone are compared."""
    _, k1 = numbers()
    config = replace(PLAIN, kl_coef=0.1, kl_in="reward", reward_to_go=True)
    found, mask = advantages(config, kl_coef=0.1)
    groups = HOST.reshape(-1, 4)
    expected = (groups - groups.mean(1, keepdims=True)).reshape(-1, 1) - 0.1 * k1[:, ::-1].cumsum(1)[:, ::-1]
    np.testing.assert_allclose(found, np.where(mask, expected, 0), atol=1e-5)


def test_with_the_kl_in_the_loss_the_reward_pays_none():
    found, mask = advantages(replace(PLAIN, kl_coef=0.1), kl_coef=0.1)
    groups = HOST.reshape(-1, 4)
    expected = (groups - groups.mean(1, keepdims=True)).reshape(-1, 1)
    np.testing.assert_allclose(found, np.where(mask, expected, 0), atol=1e-5)


def test_rows_that_were_cut_off_count_in_the_baseline_and_are_not_trained_on():
    rollout = numbers()[0]
    kept, _ = advantages(PLAIN)
    found, mask = advantages(replace(PLAIN, mask_truncated=True))
    cut = ~np.asarray(rollout.finished)
    assert 0 < cut.sum() < 8 and not mask[cut].any() and not found[cut].any()
    np.testing.assert_array_equal(found[~cut], kept[~cut])


def test_metrics_of_groups_say_how_many_have_nothing_to_learn_from():
    """Which what they are paid decides, after the clip and the penalties; the spread is that of the rewards."""
    rollout, host = numbers()[0], [0.1] * 4 + [1, 2, 3, 4]
    of = lambda config: score(config, rollout, host=host, models=NO_REWARD)[2]  # noqa: E731
    metrics = of(PLAIN)
    assert float(metrics["group/equal_fraction"]) == 0.5
    assert float(metrics["group/reward_std"]) == pytest.approx(np.std([1, 2, 3, 4]) / 2)
    assert 0 < rollout.finished[:4].sum() < 4
    for changes, equal in [({"reward_clip": 1.0}, 1.0), ({"missing_eos": "subtract", "missing_eos_value": 1.0}, 0.0)]:
        changed = of(replace(PLAIN, **changes))
        assert float(changed["group/equal_fraction"]) == equal
        assert changed["group/reward_std"] == metrics["group/reward_std"]
    for config in (REINFORCE_PP, replace(REINFORCE_PP, group_size=4)):  # nothing is compared
        assert "group/equal_fraction" not in of(config)


def test_the_kl_that_is_reported_is_that_of_numpy_and_the_policy_against_itself_has_none():
    rollout, k1 = numbers()
    config = replace(PLAIN, kl_coef=0.1)
    _, coef, metrics, rows = score(config, rollout)
    np.testing.assert_allclose(rows["kl"], k1.sum(1), atol=1e-5)
    assert float(coef) == np.float32(0.1) and float(metrics["rollout/kl"]) == pytest.approx(k1.sum(1).mean(), rel=1e-4)
    program = group.make_score(MODELS, config, recompute=True)
    same = program(PARAMS, PARAMS["policy"], REWARD, rollout, jnp.zeros(8), jnp.float32(0.1), jnp.float32(1.0))
    assert not same[3]["kl"].any()


def test_swapping_the_responses_of_a_prompt_swaps_what_they_teach():
    rollout, order = numbers()[0], np.array([2, 0, 3, 1, 5, 4, 7, 6])
    swapped = jax.tree.map(lambda x: x[order], rollout)
    for config in (GroupConfig(group_size=4), RLOO):
        a = score(config, rollout, host=HOST)[0]
        b = score(config, swapped, host=HOST[order])[0]
        np.testing.assert_allclose(a.advantages[order], b.advantages, atol=1e-6)
        assert not np.allclose(a.advantages, b.advantages)


# ---- the loss


def loss_of(config, x):
    return group.objective(MODELS, config)(PARAMS, batch_of(x, config.loss_reduction), KEY)


def experience(config=PLAIN, **changes):
    return dataclasses.replace(score(config, numbers()[0], host=HOST)[0], **changes)


def test_the_gradient_of_the_kl_alone_pulls_to_the_reference():
    """k3 is expm1(d) - d, so its gradient by the log-prob is 1 - exp(d), numpy's finite differences agree."""
    config = replace(PLAIN, kl_coef=0.5)
    x = experience(config)
    x = dataclasses.replace(x, advantages=jnp.zeros_like(x.advantages))
    mask, k1 = np.asarray(x.mask), numbers()[1]
    loss, metrics = loss_of(config, x)
    expected = (np.expm1(-k1) + k1)[mask].mean()
    assert float(metrics["policy/ref_kl"]) == pytest.approx(expected, rel=1e-4)
    assert float(loss) == pytest.approx(0.5 * expected, rel=1e-4)
    grad = jax.grad(lambda p: group.objective(MODELS, config)(p, batch_of(x), KEY)[0])(PARAMS)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grad)) > 1e-3


def test_at_the_first_step_the_ratio_is_one_and_the_loss_minus_the_mean_advantage():
    x = experience()
    loss, metrics = loss_of(PLAIN, x)
    assert float(metrics["policy/ratio_max"]) == pytest.approx(1, abs=1e-5)
    assert float(loss) == pytest.approx(-f64(x.advantages)[np.asarray(x.mask)].mean(), abs=1e-5)


def test_fixed_weights_scale_the_loss_but_not_what_is_said_of_tokens():
    x = experience(priced := replace(PLAIN, kl_coef=0.5))
    said = {r: loss_of(replace(priced, loss_reduction=r), x)[1] for r in ("token", "fixed")}
    share = x.mask.mean()
    assert share < 0.8
    for name, value in said["token"].items():
        np.testing.assert_allclose(said["fixed"][name], value * (share if name.endswith("/loss") else 1), rtol=1e-5)


def test_minibatches_keep_the_rows_of_a_prompt_together_and_take_every_row_once_an_epoch():
    """All of a group, or as many as divide the minibatch; whatever a microbatch holds."""
    x = score(PLAIN, numbers()[0], host=HOST, models=NO_REWARD)[0]
    x = dataclasses.replace(x, advantages=jnp.broadcast_to(jnp.arange(8.0)[:, None], x.advantages.shape))
    for minibatches, together, tokens in ((2, 4, 0), (2, 4, 99), (4, 2, 99), (8, 1, 99)):
        seen = []

        def step(state, batch, key, frozen, seen=seen):
            rows = batch["experience"].advantages[:, 0]
            jax.debug.callback(lambda rows: seen.append(np.asarray(rows, int)), rows, ordered=True)
            return state, {}

        config = replace(PLAIN, minibatches=minibatches, epochs=4, microbatch_tokens=tokens)
        update = jax.jit(make_epochs(step, config, {"weights": "mask"}, Sharing(config.group_size)))
        update(TrainState(jnp.zeros((), jnp.int32), (), ()), x, KEY, jnp.float32(1.0))
        jax.effects_barrier()
        epochs = np.reshape(seen, (4, -1))
        assert (np.sort(epochs) == np.arange(8)).all() and len({tuple(rows) for rows in epochs.tolist()}) > 1
        blocks = epochs.reshape(-1, together)
        assert (blocks == blocks[:, :1] + np.arange(together)).all() and (blocks[:, 0] % together == 0).all()


def test_a_minibatch_without_a_token_that_is_trained_on_says_nothing_of_tokens():
    """Of two groups in a minibatch each the second was cut off: metrics are those of the first, packed or not."""
    config = replace(PLAIN, minibatches=2)
    x = score(config, numbers()[0], host=HOST, models=NO_REWARD)[0]
    x, held = (dataclasses.replace(x, mask=x.mask & jnp.array(rows)[:, None]) for rows in ([1] * 4 + [0] * 4, [0] * 8))
    params, none = dict(PARAMS), OptimConfig(learning_rate=0.0, schedule="constant")

    def said(x, minibatches, tokens):
        changed = replace(config, minibatches=minibatches, microbatch_tokens=tokens)
        update, tx, _ = group.make_group_step(MODELS, changed, none)
        state = TrainState.create(jax.tree.map(jnp.copy, params), tx)
        return jax.tree.map(float, jax.jit(update)(state, x, KEY, jnp.float32(1.0))[1])

    of_first = jax.tree.map(lambda leaf: leaf[:4], x)
    wanted = said(of_first, 1, 0)
    assert wanted["policy/entropy"] > 1 and wanted["policy/first_ratio_max"] == pytest.approx(1, abs=1e-5)
    for tokens in (0, 18):
        found = said(x, 2, tokens)
        tokenwise = [name for name in wanted if not name.startswith("optim/")]
        np.testing.assert_allclose([found[n] for n in tokenwise], [wanted[n] for n in tokenwise], rtol=1e-5, atol=1e-6)
        assert found["optim/grad_norm"] == pytest.approx(wanted["optim/grad_norm"] / 2, rel=1e-5)  # a step is a step
        nothing = said(held, 2, tokens)
        assert np.isnan(nothing["policy/entropy"]) and nothing["policy/ratio_max"] == -np.inf
        assert nothing["optim/grad_norm"] == nothing["optim/skipped"] == 0 and nothing["optim/empty"] == 2


EQUAL = {
    "group": dict(scale_rewards="group"),
    "leave_one_out": dict(baseline="leave_one_out", scale_rewards="batch"),
    "whitened": dict(group_size=1, baseline="none", whiten_advantages=True),
    "sequence": dict(policy_loss="rlhf_jax.losses:sequence_policy_loss"),
}


@pytest.mark.parametrize("options", EQUAL.values(), ids=EQUAL)
def test_responses_that_are_all_paid_alike_move_no_weight_whatever_momentum_says(options):
    """Two minibatches: the whole of one iteration is empty, and the one after it goes on where the first stood."""
    config = replace(PLAIN, minibatches=2, **options)
    x, equal = (score(config, numbers()[0], host=h, models=NO_REWARD)[0] for h in (HOST, np.full(8, 0.7)))
    optim = OptimConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.1)
    update, tx, _ = group.make_group_step(MODELS, config, optim)
    update = jax.jit(update)
    state, said = update(TrainState.create(dict(PARAMS), tx), x, KEY, jnp.float32(1.0))
    after, none = update(state, equal, KEY, jnp.float32(1.0))
    assert (said["optim/empty"], none["optim/empty"], none["optim/skipped"]) == (0, 2, 0) and after.step == 4
    for a, b in zip(jax.tree.leaves(after)[1:], jax.tree.leaves(state)[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.leaves(after)[0] == 4


# ---- no setting is idle

FAR = Rollout(**{**vars(numbers()[0]), "logprobs": jnp.where(numbers()[0].mask, -0.1, 0.0)})


def scored(config):
    return score(config, FAR, host=HOST, recompute=False)


def loss(config):
    x = score(config, FAR, host=HOST, recompute=False)[0]
    up_and_down = jnp.where(jnp.arange(6) % 2, 0.9, -0.9)[None, :] * x.mask
    return loss_of(config, dataclasses.replace(x, old_logprobs=numbers()[0].logprobs + up_and_down))


def updated(config):
    update, tx, _ = group.make_group_step(MODELS, config, OPTIM)
    x = score(config, FAR, host=HOST, recompute=False)[0]
    x = dataclasses.replace(x, old_logprobs=numbers()[0].logprobs)
    state, metrics = jax.jit(update)(TrainState.create(PARAMS, tx), x, KEY, jnp.float32(1.0))
    return state.params, state.step, metrics


def rates(config):
    return [group.make_group_step(MODELS, config, OPTIM)[2](i) for i in range(3)]


def double_loss(logprobs, old_logprobs, advantages, weights, *, clip_ratio):
    return -2 * clip_ratio * jnp.sum(weights * logprobs * advantages), {}


def raw_scores(scores, *, group_size):
    return scores * group_size


KL = {"group_size": 4, "kl_coef": 0.1, "kl_in": "reward", "scale_rewards": "none"}
EFFECTS = {
    "iterations": (rates, {}, {"iterations": 7}),
    "epochs": (updated, {"epochs": 1}, {"epochs": 2}),
    "minibatches": (updated, {}, {"minibatches": 2}),
    "missing_eos": (scored, {}, {"missing_eos": "replace"}),
    "missing_eos_value": (scored, {"missing_eos": "replace"}, {"missing_eos": "replace", "missing_eos_value": -2.0}),
    "kl_coef": (loss, {}, {"kl_coef": 0.2}),
    "clip_ratio": (loss, {}, {"clip_ratio": 0.1}),
    "clip_ratio_high": (loss, {}, {"clip_ratio_high": 0.1}),
    "dual_clip": (loss, {"clip_ratio": 10.0}, {"clip_ratio": 10.0, "dual_clip": 1.01}),
    "max_log_ratio": (loss, {"clip_ratio": 10.0}, {"clip_ratio": 10.0, "max_log_ratio": 0.1}),
    "entropy_coef": (loss, {}, {"entropy_coef": 0.1}),
    "loss_reduction": (loss, {}, {"loss_reduction": "sequence"}),
    "policy_loss": (loss, {}, {"policy_loss": "test_group:double_loss"}),
    "group_size": (scored, {}, {"group_size": 4}),
    "advantage": (scored, {}, {"advantage": "test_group:raw_scores"}),
    "baseline": (scored, {}, {"baseline": "leave_one_out"}),
    "scale_rewards": (scored, {}, {"scale_rewards": "none"}),
    "whiten_advantages": (scored, {}, {"whiten_advantages": True}),
    "kl_in": (scored, {}, {"kl_in": "reward"}),
    "reward_to_go": (scored, KL, {**KL, "reward_to_go": True}),
    "discount": (scored, {**KL, "reward_to_go": True}, {**KL, "reward_to_go": True, "discount": 0.5}),
    "mask_truncated": (scored, {}, {"mask_truncated": True}),
}
ELSEWHERE = {"redraws"}  # test_groups_of_one_reward_are_drawn_again_alone_and_only_so_often


@pytest.mark.parametrize("name", EFFECTS)
def test_no_setting_is_idle(name):
    look, one, other = EFFECTS[name]
    a, b = (look(GroupConfig(**settings)) for settings in (one, other))
    leaves = [jax.tree.leaves(jax.device_get(x)) for x in (a, b)]
    same = jax.tree.structure(a) == jax.tree.structure(b)
    assert not same or any(not np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


def test_the_table_has_every_field_that_is_of_groups_alone():
    own = {f.name for f in dataclasses.fields(GroupConfig)} - {f.name for f in dataclasses.fields(group_base())}
    assert own <= EFFECTS.keys() | ELSEWHERE


def group_base():
    return GroupConfig.__mro__[1]


# ---- the stage


def run_config(method, path="", *, reward_model=True, **changes):
    config = RUNS[method](
        model=ModelConfig(path=str(toy_directory() / "policy")),
        data=DataConfig(batch_size=16, max_prompt_length=2, max_length=8),
        reward=RewardSourceConfig(model=str(toy_directory() / "reward") if reward_model else ""),
        sampling=SamplingConfig(max_new_tokens=6, chunk=3),
        optim=OptimConfig(learning_rate=1e-2, schedule="linear", eps=1e-5),
        run=RunConfig(output_dir=str(path), progress=False, eval_every=2, log_every=1),
    )
    return replace(config, **{f"{method}__iterations": 3, **changes})


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=ONE))


def logged(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", RUNS)
def test_a_run_from_start_to_finish(tmp_path, one_device, method):
    config = run_config(method, tmp_path / "run", run__keep_best=False)  # the best may be that before training
    summary = group.run(config, **TOY_ROWS)
    lines = [line for line in logged(tmp_path / "run") if "rollout/reward" in line]
    assert summary["iterations"] == len(lines) == 3 and summary["after"]["eval/kl"] != 0
    assert abs(lines[0]["rollout/kl"]) < 1e-5 and abs(lines[0]["policy/first_ratio_max"] - 1) < 1e-5
    assert not any(line["optim/skipped"] for line in lines)
    before, after = (path / "model.safetensors" for path in (toy_directory() / "policy", tmp_path / "run" / "model"))
    assert before.read_bytes() != after.read_bytes()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stage"] == method


@pytest.mark.parametrize(("method", "size"), [("grpo", 8), ("rloo", 4), ("reinforce_pp", 1)])
def test_rows_of_a_batch_are_whole_groups_of_one_prompt(one_device, method, size):
    few = {**TOY_ROWS, "rows": TOY_ROWS["rows"][:3]}  # they are taken several times to fill an iteration
    grpo, loop = train.setup(run_config(method), **few)
    prompts = grpo.batch(0)["prompts"]
    groups = [prompts[i : i + size] for i in range(0, 16, size)]
    assert all(len(set(each)) == 1 for each in groups) and len(set(prompts)) > 1
    rollout, _, _ = roll_out(grpo, loop, loop.policy, grpo.batch(0), KEY)
    assert size == 1 or len({tuple(row) for row in np.asarray(rollout.tokens[:size]).tolist()}) > 1


@pytest.mark.slow
def test_groups_of_one_reward_are_drawn_again_alone_and_only_so_often():
    """Here the first of four has a spread at once, the second when it is drawn again, the others never.

    What they are paid decides: the others' rewards differ, and are all clipped to one.
    """
    asked = []

    def reward(prompts, responses, **columns):
        asked.append(list(responses))
        return [float(i) if i < 4 and len(asked) < 3 else 1.0 + i for i in range(len(prompts))]

    def drawn(redraws):
        asked.clear()
        changes = {"grpo__group_size": 4, "grpo__redraws": redraws, "grpo__reward_clip": 1.0}
        config = run_config("grpo", reward_model=False, **changes)
        method, loop = train.setup(config, reward_functions=[reward], **TOY_ROWS)
        return iteration(method, loop, 0)[1:]

    metrics, table = drawn(0)
    once = np.asarray(table["rollout"].tokens)
    assert "group/drawn_again" not in metrics and [len(rows) for rows in asked] == [16]
    metrics, table = drawn(2)
    again = np.asarray(table["rollout"].tokens)
    assert [len(rows) for rows in asked] == [16, 12, 8]  # nobody is asked twice about a row that stays
    assert float(metrics["group/drawn_again"]) == 5 and float(metrics["group/equal_fraction"]) == 0.5
    np.testing.assert_array_equal(table["reward"][:4], [0, 1, 2, 3])
    assert np.array_equal(again[:4], once[:4]) and all((again[i : i + 4] != once[i : i + 4]).any() for i in (4, 8, 12))


def test_without_a_price_there_is_no_reference_nor_kl_and_from_one_reward_nothing_is_learned(
    tmp_path, one_device, capsys
):
    config = run_config("grpo", tmp_path / "run", reward_model=False, grpo__kl_coef=0.0, data__too_long="drop")
    long = [{"prompt": "a long prompt"}] * 2 * len(TOY_ROWS["rows"])
    sources = {
        **TOY_ROWS,
        "rows": TOY_ROWS["rows"] + long,
        "reward_functions": [lambda p, r, **columns: [1.0] * len(r)],
    }
    assert train.setup(config, **sources)[0].nets.ref is None
    summary = group.run(config, **sources)
    assert "eval/kl" not in summary["after"] and not any("rollout/kl" in line for line in logged(tmp_path / "run"))
    rows, evaluation, empty, groups, hidden = summary["remarks"]
    assert "most training rows were not read" in rows and "equals the one before training" in evaluation
    assert empty.startswith("3 updates had a gradient of 0") and "rollout/hidden_fraction" in hidden
    assert "every advantage was 0" in groups
    assert capsys.readouterr().out.splitlines()[-5:] == [f"! {remark}" for remark in summary["remarks"]]


def test_python_rewards_a_loss_and_a_gold_function_can_be_passed(tmp_path, one_device):
    seen = []

    def length(prompts, responses, **columns):
        seen.append(list(prompts))
        return [float(len(response)) for response in responses]

    def mine(logprobs, old_logprobs, advantages, weights, *, group_size):
        return -jnp.sum(weights * logprobs * advantages), {"mine/size": weights.sum() * group_size}

    config = run_config("grpo", tmp_path / "run", reward_model=False, grpo__group_size=4)
    group.run(config, reward_functions=[length], gold=length, policy_loss=mine, **TOY_ROWS)
    lines = [line for line in logged(tmp_path / "run") if "rollout/gold" in line]
    assert all(
        line["mine/size"] == pytest.approx(4) and line["rollout/gold"] == line["rollout/reward"] for line in lines
    )
    assert {len(prompts) for prompts in seen} == {16, 5}  # of a rollout, and the held-out ones without copies


def test_named_losses_are_those_of_the_papers(one_device):
    for name in ("sequence_mean_policy_loss", "cispo_policy_loss", "sequence_policy_loss"):
        method, loop = train.setup(run_config("grpo", grpo__policy_loss=f"rlhf_jax.losses:{name}"), **TOY_ROWS)
        _, metrics, _ = iteration(method, loop, 0)
        assert float(metrics["policy/ratio_max"]) == pytest.approx(1, abs=1e-5) and not float(metrics["optim/skipped"])


def test_rows_that_are_cut_answer_every_prompt_once_and_are_those_of_a_rollout_without_a_cut(
    tmp_path, monkeypatch, one_device
):
    """8 groups of 2 an iteration, up to 6 tokens, 2 of them in each rollout, by a policy that does not move.

    The second iteration's reward fails: its rows are gone, and no others.
    """
    made, asked, training, marks = [], [], [], list[str]()

    def reward(prompts, responses, number):
        if number[0] >= 0:
            training.append(number)
            asked.extend(zip(number, responses, strict=True))
            if len(training) == 2:
                raise RuntimeError("the judge is down")
        return [0.5] * len(prompts)

    def setup(*args, **kwargs):
        made.append(real(*args, **kwargs))
        return made[-1]

    real = train.setup
    monkeypatch.setattr(train, "setup", setup)
    monkeypatch.setattr(Parts, "mark", lambda self, name, *made, own=Parts.mark: marks.append(name) or own(self, name))
    changes = {"grpo__group_size": 2, "grpo__iterations": 4, "optim__learning_rate": 0.0, "run__eval_every": 0}
    cut = {"sampling__chunk": 1, "sampling__budget": 2, "model__eos_ids": [1, 4, 7, 10, 13]}
    config = run_config("grpo", tmp_path, reward_model=False, **changes, **cut)
    config = replace(config, reward__on_failure="skip", reward__retries=0)
    rows = [{**row, "number": i} for i, row in enumerate(TOY_ROWS["rows"])]
    held_out = [{**row, "number": -1} for row in TOY_ROWS["eval_rows"]]
    group.run(config, rows=rows, eval_rows=held_out, reward_functions=[reward])

    one = "data rollout data reward score update save"
    failed, last = one.replace(" score update", ""), one.replace("save", "evaluation save")
    assert " ".join(marks) == f"start {one} {failed} {one} {last}"
    ((method, _),) = made
    stream = [method.inputs.batches.rows([i])[0]["columns"]["number"][0] for i in range(32)]
    assert sorted(n for n, _ in asked) == sorted([*stream, *stream]) and all(len(n) == 16 for n in training)
    lines = [line for line in logged(tmp_path) if "rollout/reward" in line]
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert lines[0]["rollout/continued"] == 0 < lines[0]["rollout/unfinished"] + lines[0]["rollout/waiting"] == 16
    assert all(line["rollout/continued"] > 0 for line in lines[1:])
    assert lines[-1]["rollout/unfinished"] == lines[-1]["rollout/waiting"] == 0
    assert method.programs.cut.go_on._cache_size() == method.programs.cut.take._cache_size() == 1

    # The first 16 prompts began in the first rollout, with the noise of its key; the reference is the policy.
    first, _ = method.inputs.batches.rows(range(16))
    key = jax.random.split(key_at(method, "training", 0), 3)[0]
    arguments = method.nets.ref, first["tokens"], first["mask"], key, method.inputs.law, None, 2
    with jax.set_mesh(method.mesh.grid):
        texts, _ = decode(method.inputs.tokenizer, method.programs.rollout(*arguments), np.repeat(first["given"], 2))
    expected = sorted(zip(np.repeat(stream[:16], 2).tolist(), texts, strict=True))
    assert [pair for pair in sorted(asked) if pair[0] in stream[:16]] == expected
    assert len(set(map(len, texts))) > 2


MESHES = {"data": MeshConfig(8, 1, 1), "fsdp": MeshConfig(2, 4, 1)}


@functools.cache
def iteration_on(mesh_name):
    config = run_config("grpo", grpo__group_size=4, grpo__minibatches=2, grpo__epochs=2, sampling__budget=3)
    config = replace(config, optim__eps=1e-2, **({"mesh": MESHES[mesh_name]} if mesh_name else {}))
    with pytest.MonkeyPatch.context() as patch:
        if not mesh_name:
            patch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=ONE))
        method, loop = train.setup(config, **TOY_ROWS)
        with jax.set_mesh(method.mesh.grid):
            loop, metrics, table = iteration(method, loop, 0)
    metrics = {name: x for name, x in metrics.items() if name != "optim/filled"}  # what is computed is the mesh's
    return jax.device_get((loop.state.params, metrics, table))


@pytest.mark.parametrize("mesh_name", MESHES)
def test_an_iteration_is_the_same_on_every_mesh(mesh_name):
    """Groups of 4 rows lie on two devices or four; their baseline is of all of them. Rows are cut and go on."""
    found, expected = iteration_on(mesh_name), iteration_on(None)
    np.testing.assert_array_equal(found[2]["rollout"].tokens, expected[2]["rollout"].tokens)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(found[:2])[0], jax.tree.leaves(expected[:2]), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_each_program_compiles_once_for_any_lengths_and_temperatures(one_device):
    """Twenty iterations in refilled slots, whose rows fill one microbatch and several."""
    ends = {"model__eos_ids": [1, 4, 7, 10, 13], "sampling__slots": 5, "grpo__microbatch_tokens": 24}
    method, loop = train.setup(run_config("grpo", grpo__group_size=4, grpo__iterations=20, **ends), **TOY_ROWS)
    lengths, filled = set(), set()
    with jax.set_mesh(method.mesh.grid):
        for i, temperature in enumerate(np.linspace(0.2, 4, 20, dtype=np.float32)):
            law = dataclasses.replace(method.inputs.law, temperature=put(temperature, replicated(method.mesh)))
            tuned = dataclasses.replace(method, inputs=dataclasses.replace(method.inputs, law=law))
            loop, metrics, _ = iteration(tuned, loop, i)
            lengths.add(float(metrics["rollout/response_length"]))
            filled.add(float(metrics["optim/filled"]))
    programs = method.programs
    assert [x._cache_size() for x in (programs.rollout, programs.score, programs.update)] == [1, 1, 1]
    assert len(lengths) > 10 and len(filled) > 10 and max(lengths) > 1.5 * min(lengths)


class Killed(BaseException):
    """Stands in for kill -9 where the process must live on."""


@pytest.mark.parametrize(("method", "budget"), [("grpo", 0), ("rloo", 3)])
def test_a_killed_run_continues_to_the_same_bits(tmp_path, monkeypatch, one_device, method, budget):
    changes = {"checkpoint__every": 1, "checkpoint__minutes": 0.0, f"{method}__iterations": 4, "run__eval_every": 0}
    changes["sampling__budget"] = budget
    group.run(run_config(method, tmp_path / "whole", **changes), **TOY_ROWS)
    advance = RunMetrics.advance

    def kill(self, step, *args):
        if step == 3:
            self.skips.checkpoints.wait()
            self._pending = None  # what was not written is lost
            raise Killed
        advance(self, step, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunMetrics, "advance", kill)
        group.run(run_config(method, tmp_path / "killed", **changes), **TOY_ROWS)
    group.run(run_config(method, tmp_path / "killed", **changes), **TOY_ROWS)
    whole, killed = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


ALONE = "compares responses to one prompt, but {0}.group_size is 1; raise it, or set {0}.{1} none"
REFUSED = {
    "grpo --grpo.group_size 1": "grpo.baseline group " + ALONE.format("grpo", "baseline"),
    "rloo --rloo.group_size 1": "rloo.baseline leave_one_out " + ALONE.format("rloo", "baseline"),
    "reinforce_pp --reinforce_pp.scale_rewards group": "reinforce_pp.scale_rewards group "
    + ALONE.format("reinforce_pp", "scale_rewards"),
    "reinforce_pp --reinforce_pp.scale_rewards batch": "reinforce_pp.scale_rewards batch would divide scores that "
    "have no baseline by their deviation, which may be 0; set reinforce_pp.scale_rewards none, and "
    "reinforce_pp.whiten_advantages true instead",
    "grpo --grpo.reward_to_go true": "grpo.reward_to_go is of the KL in the reward; set grpo.kl_in reward, or it to "
    "false",
    "grpo --grpo.stop truncate --grpo.truncate_after 64": "grpo.truncate_after 64 is not below "
    "sampling.max_new_tokens 64, so no row would ever stop; lower it",
    "grpo --sampling.budget 10": "sampling.budget 10 is not a multiple of sampling.chunk 32; change one of them",
    "sample --sampling.budget 32": "sampling.budget 32 is of ppo, grpo, rloo and reinforce_pp, whose rows go on in "
    "the next iteration; set it to 0",
    "rloo --rloo.clip_ratio 0": "rloo.clip_ratio is 0.0; make it at least 0.000001",
}


@pytest.mark.parametrize("line", REFUSED)
def test_settings_that_contradict_each_other_are_one_line(line):
    command, *arguments = line.split()
    with pytest.raises(UserError) as error:
        cli.parse(command, arguments)
    assert str(error.value) == REFUSED[line]


def test_a_batch_that_is_no_whole_groups_is_refused():
    with pytest.raises(UserError, match=r"data\.batch_size 16, .* is not divisible by grpo\.group_size 3"):
        train.setup(run_config("grpo", grpo__group_size=3), **TOY_ROWS)
    with pytest.raises(UserError, match=r"sampling\.microbatch 2 is not a multiple of grpo\.group_size 4"):
        train.setup(run_config("grpo", grpo__group_size=4, sampling__microbatch=2), **TOY_ROWS)
    for other in ({"grpo__stop": "truncate"}, {"grpo__redraws": 1}, {"sampling__prompt_buckets": [1, 2]}):
        (name,) = (name.replace("__", r"\.") for name in other)
        with pytest.raises(UserError, match=rf"sampling\.budget 3 does not go with {name} .*; leave one of them out"):
            train.setup(run_config("grpo", sampling__budget=3, **other), **TOY_ROWS)


def test_an_option_of_a_method_leaves_its_other_defaults():
    config = cli.parse("rloo", ["--rloo.group_size", "2"])
    assert config.rloo == replace(RLOO, group_size=2)
