"""A teacher as the reward: the gradient of the exact reverse KL, what the methods pay, and runs of distill."""

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
from tiny import (
    BIGRAMS,
    ONE,
    TOY_ROWS,
    Bigram,
    bigram_logprobs,
    bigram_params,
    f64,
    make_rollout,
    toy_directory,
    toy_run,
)

from rlhf_jax import group, ppo
from rlhf_jax.config import (
    DISTILL,
    BestOfNArgs,
    DataConfig,
    DistillArgs,
    GroupConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RewardSourceConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError
from rlhf_jax.group import train
from rlhf_jax.online.core import packed
from rlhf_jax.ppo import train as ppo_train
from rlhf_jax.sharding import make_mesh
from rlhf_jax.types import Rollout

V, T, START = 3, 3, 0
RESPONSES = np.array(list(itertools.product(range(V), repeat=T)))  # all [27, T]
TEACHER = bigram_params(5)["policy"]


def small(seed: int) -> dict:
    """A bigram of V tokens: the logits of the next token are a row of its table."""
    logits = np.random.default_rng(seed).normal(size=(V, V))
    return {"embed": {"tokens": jnp.eye(V)}, "head": {"kernel": jnp.asarray(logits, jnp.float32)}}


def law(params, tokens):
    """(log p of each token [N, T], the law at each place [N, T, V]) of responses after START."""
    before = np.pad(tokens, ((0, 0), (1, 0)), constant_values=START)[:, :T]
    table = jax.nn.log_softmax(params["embed"]["tokens"] @ params["head"]["kernel"])
    return table[before, tokens], table[before]


def far(log_p, log_q, how):
    """The divergence of laws p (the student's) and q [..., V] by its definition; jsd with a weight of 0.3 of q."""
    if how == "reverse_kl":
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    if how == "forward_kl":
        return far(log_q, log_p, "reverse_kl")
    mixture = jnp.log(0.3 * jnp.exp(log_q) + 0.7 * jnp.exp(log_p))
    return 0.3 * far(log_q, mixture, "reverse_kl") + 0.7 * far(log_p, mixture, "reverse_kl")


def exact(discount, student, teacher, how="reverse_kl"):
    """The reverse KL of whole responses, or a divergence of the next token where the student's prefixes are held."""
    logprobs, laws = law(student, RESPONSES)
    theirs, their_laws = law(teacher, RESPONSES)
    chance = jnp.exp(logprobs.sum(axis=1))
    if discount == 1:
        return jnp.sum(chance * (logprobs - theirs).sum(axis=1))
    return jnp.sum(jax.lax.stop_gradient(chance) * far(laws, their_laws, how).sum(axis=1))


@pytest.mark.parametrize(
    ("discount", "how"), [(0.0, "reverse_kl"), (1.0, "reverse_kl"), (0.0, "forward_kl"), (0.0, "jsd")]
)
def test_the_gradient_over_all_responses_is_that_of_the_exact_divergence(discount, how):
    student, teacher = small(0), small(1)
    logprobs, _ = law(student, RESPONSES)
    n, mask = len(RESPONSES), jnp.ones(RESPONSES.shape, bool)
    prompt, seen = jnp.full((n, 1), START), jnp.ones((n, 1), bool)
    rollout = Rollout(prompt, seen, jnp.asarray(RESPONSES), mask, logprobs, jnp.zeros(n, bool))
    config = replace(DISTILL, discount=discount)
    models = group.Models(Bigram(), teacher=Bigram())
    options = {"teacher_coef": 2.0, "teacher_divergence": how, "teacher_beta": 0.3}
    score = group.make_score(models, config, recompute=True, **options)
    one = jnp.float32(1.0)
    x, _, metrics, rows = score({"policy": student}, None, None, rollout, jnp.zeros(n), one, one, teacher)
    chance = jnp.exp(logprobs.sum(axis=1))
    weights = jnp.broadcast_to(chance[:, None], mask.shape)
    batch = {"experience": x, "packed": packed(x).at(0), "weights": weights, "temperature": one}
    loss = lambda params: group.objective(models, config)(params, batch, jax.random.key(0))[0]  # noqa: E731
    found = jax.grad(loss)({"policy": student})["policy"]["head"]["kernel"]
    expected = jax.grad(functools.partial(exact, discount, teacher=teacher, how=how))(student)["head"]["kernel"]
    np.testing.assert_allclose(found, 2 * expected, atol=2e-6)
    assert np.abs(expected).max() > 0.02
    whole = float(exact(discount, student, teacher, how))
    assert float(chance @ rows["reward"]) == pytest.approx(-2 * whole, rel=1e-4)
    k1 = (logprobs - law(teacher, RESPONSES)[0]).sum(axis=1).mean()
    assert float(metrics["rollout/teacher_kl"]) == pytest.approx(float(k1), rel=1e-4)


def paid():
    """(a rollout, log p_teacher - log p, f64[B, T]) by numpy."""
    policy = bigram_params(0)["policy"]
    rollout = make_rollout(4, policy)
    return rollout, bigram_logprobs(TEACHER, rollout) - bigram_logprobs(policy, rollout)


def scored(make, config, models, params, **options):
    program = make(dataclasses.replace(models, teacher=Bigram()), config, recompute=True, **options)
    arguments = params, bigram_params(1)["policy"], bigram_params(2)["value"], paid()[0], jnp.arange(8.0)
    return program(*arguments, jnp.float32(0.1), jnp.float32(1.0), TEACHER)


def test_ppo_pays_each_token_and_the_reward_of_a_response_is_their_sum_beside_the_others():
    config = PPOConfig(whiten_advantages=False, gae_lambda=1.0)
    of = functools.partial(scored, ppo.make_score, config, BIGRAMS, bigram_params(0))
    (x, _, metrics, rows), (more, _, _, other) = of(), of(teacher_coef=3.0)
    dense, mask = paid()[1], np.asarray(paid()[0].mask)
    to_go = np.where(mask, dense[:, ::-1].cumsum(1)[:, ::-1], 0)  # with lambda and gamma 1 returns are sums
    np.testing.assert_allclose(f64(more.returns) - f64(x.returns), 2 * to_go, atol=1e-4)
    np.testing.assert_allclose(f64(other["reward"]) - f64(rows["reward"]), 2 * dense.sum(1), atol=1e-4)
    assert float(metrics["rollout/teacher_kl"]) == pytest.approx(-dense.sum(1).mean(), rel=1e-4)


@pytest.mark.parametrize("to_go", [False, True])
def test_groups_pay_it_as_they_pay_the_kl_in_the_reward(to_go):
    config = GroupConfig(group_size=4, scale_rewards="none", kl_in="reward", reward_to_go=to_go, kl_coef=0.1)
    models, params = group.Models(BIGRAMS.policy), {"policy": bigram_params(0)["policy"]}
    x = scored(group.make_score, config, models, params)[0]
    rollout, dense = paid()
    k1 = bigram_logprobs(params["policy"], rollout) - bigram_logprobs(bigram_params(1)["policy"], rollout)
    cost, less = 0.1 * k1 - dense, lambda s: s - np.repeat(s.reshape(2, 4).mean(1), 4)
    expected = less(np.arange(8.0) - cost.sum(1))[:, None]
    if to_go:
        expected = less(np.arange(8.0))[:, None] - cost[:, ::-1].cumsum(1)[:, ::-1]
    np.testing.assert_allclose(x.advantages, np.where(rollout.mask, expected, 0), atol=1e-4)


# --- runs


@pytest.fixture
def one_device(monkeypatch):
    for module in (train, ppo_train):
        monkeypatch.setattr(module, "make_mesh", functools.partial(make_mesh, devices=ONE))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """The toy's policy, its head turned round: another law over the same ids."""
    from safetensors.numpy import load_file, save_file

    path = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(toy_directory() / "policy", path)
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if "lm_head" in name or "embed" in name)
    tensors[name] = np.ascontiguousarray(tensors[name][:, ::-1])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def distill_args(path, teacher: str, **changes) -> DistillArgs:
    config = DistillArgs(
        model=ModelConfig(path=str(toy_directory() / "policy")),
        data=DataConfig(batch_size=16, max_prompt_length=2, max_length=8),
        reward=RewardSourceConfig(teacher=teacher),
        sampling=SamplingConfig(max_new_tokens=6, chunk=3),
        optim=OptimConfig(learning_rate=3e-2, schedule="linear", eps=1e-5),
        run=RunConfig(output_dir=str(path), progress=False, eval_every=4, log_every=1),
    )
    return replace(config, **{"distill__iterations": 12, **changes})


def test_a_student_comes_nearer_to_its_teacher_and_goes_on_as_if_left_alone(one_device, tmp_path, teacher):
    summary = group.run(distill_args(tmp_path / "alone", teacher), **TOY_ROWS)
    assert summary["after"]["eval/reward"] > 0.7 * summary["before"]["eval/reward"]  # which is minus the KL
    lines = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "rollout/teacher_kl" in line]
    assert len(trained) == 12 and all(
        line["rollout/reward"] == pytest.approx(-line["rollout/teacher_kl"]) for line in trained
    )

    def stopping(config, **overrides):
        method, loop = train.setup(config, **overrides)
        calls = iter(range(99))

        def update(*args):
            if next(calls) == 6:
                raise KeyboardInterrupt
            return method.programs.update(*args)

        return dataclasses.replace(method, programs=dataclasses.replace(method.programs, update=update)), loop

    from rlhf_jax.online import loop as online_loop

    config = distill_args(tmp_path / "stopped", teacher, checkpoint__every=4)
    with pytest.raises(KeyboardInterrupt):
        online_loop.run("distill", config, stopping, **TOY_ROWS)
    group.run(config, **TOY_ROWS)
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("alone", "stopped")]
    assert models[0] == models[1]


def test_a_teacher_of_another_tokenizer_is_refused_by_content_and_one_must_be_there(one_device, tmp_path, teacher):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"b"', '"0"').replace('"c"', '"b"').replace('"0"', '"c"'))
    for config, run in (
        (distill_args("", str(other)), train.setup),
        (replace(toy_run(), reward__teacher=str(other)), ppo_train.setup),
    ):
        with pytest.raises(UserError, match=r"^teacher .*other has another tokenizer than the policy; give one"):
            run(config, **TOY_ROWS)
    with pytest.raises(UserError, match=r"distill has no teacher; set reward\.teacher"):
        train.setup(distill_args("", ""), **TOY_ROWS)
    forward = {"reward__teacher_divergence": "forward_kl"}
    for config, run in (
        (distill_args("", teacher, distill__discount=1.0, **forward), train.setup),
        (replace(toy_run(), reward__teacher=teacher, **forward), ppo_train.setup),
    ):
        with pytest.raises(UserError, match=r"reward.teacher_divergence forward_kl is lessened token by token"):
            run(config, **TOY_ROWS)
    with pytest.raises(UserError, match=r"reward.teacher x pays tokens, and here responses are scored"):
        BestOfNArgs(reward=RewardSourceConfig(teacher="x"))
    with pytest.raises(UserError, match=r"grpo.discount 0.5 does nothing without grpo.reward_to_go"):
        GroupConfig(discount=0.5).check("grpo")
