"""What the stages of the classic recipe must do on toys whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import math
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ARCH, BIGRAMS, ONE, bigram_params, toy_directory

from rlhf_jax import losses, ppo, reward, sft
from rlhf_jax.commands import quickstart
from rlhf_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PPOArgs,
    PPOConfig,
    PretrainArgs,
    QuickstartArgs,
    RewardArgs,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    SFTArgs,
    SFTConfig,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.data.collate import collate_sft
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import pack, sft_examples
from rlhf_jax.data.pairs import pairs_of, preference_of, shares_of
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.inference.scoring import Likelihood, RewardModel
from rlhf_jax.models.loading import load_model
from rlhf_jax.ppo import train as ppo_train
from rlhf_jax.sharding import make_mesh
from rlhf_jax.tasks import random_walks as walks
from rlhf_jax.training import supervised

LETTERS = "abcdefghijk"
RATE = OptimConfig(learning_rate=1e-2, schedule="constant")
DATA = DataConfig(batch_size=16, max_prompt_length=2, max_length=12, eval_batches=0)


def one_device_mesh(config=MeshConfig()):  # noqa: B008 (it is frozen)
    """On one device compiling is cheapest."""
    return make_mesh(config, devices=ONE)


@pytest.fixture(scope="module", autouse=True)
def stages_on_one_device():
    with pytest.MonkeyPatch.context() as patch:
        for module in (supervised, ppo_train):
            patch.setattr(module, "make_mesh", one_device_mesh)
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(str(toy_directory() / "tokenizer"))


def documents(num, seed):
    """Letters that mostly follow one another in the alphabet: text with something to learn and something to guess."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num):
        steps = 1 + rng.integers(0, 2, 7).cumsum() * 2 + np.arange(7)
        rows.append({"text": " ".join(LETTERS[i % 11] for i in rng.integers(11) + steps[: rng.integers(4, 8)])})
    return rows


def run_in(path, **options):
    return RunConfig(output_dir=str(path), progress=False, eval_every=0, **options)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A language model of `documents`, and its summary."""
    path = tmp_path_factory.mktemp("pretrained")
    config = PretrainArgs(
        model=ModelConfig(arch=ARCH, tokenizer=str(toy_directory() / "tokenizer")), data=DATA,
        optim=replace(RATE, schedule="cosine"), run=run_in(path / "run"),
    )  # fmt: skip
    config = replace(config, sft__steps=150, sft__num_samples=0)
    return str(path / "run" / "model"), sft.run(config, rows=documents(600, 0), eval_rows=documents(100, 1))


def nll(model, tokenizer, rows):
    """Nats per token of documents."""
    mesh = one_device_mesh()
    examples, _ = sft_examples(rows, tokenizer, Limits(2, 12, "error"), loss_on="all")
    with jax.set_mesh(mesh.grid):
        loaded = load_model(ModelConfig(path=model), mesh, jax.random.key(0))
        reader = Likelihood(loaded.model, mesh, batch_size=len(examples))
        return -np.concatenate(reader.targets(loaded.params, examples)).mean()


# --- pretraining and SFT


def test_pretraining_lowers_the_held_out_loss_towards_what_there_is_to_guess(pretrained, tokenizer):
    """Each letter is one of two, the first one of eleven, and the end one of a few: about 0.9 nats per token."""
    model, summary = pretrained
    before = nll(str(toy_directory() / "policy"), tokenizer, documents(100, 1))
    assert before > 2.5 and 0.6 < summary["eval/total"] < 1.15
    assert summary["eval/total"] == pytest.approx(nll(model, tokenizer, documents(100, 1)), rel=1e-4)


def test_a_mixture_of_experts_learns_what_random_walks_have_to_teach(tmp_path):
    """The loss of a Qwen3-MoE on walks that it has not seen comes near the entropy of their steps."""
    walks.make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    stage = quickstart.sft_stage(QuickstartArgs(progress=False), tmp_path)
    experts = {"qk_norm": "head", "ffn_width": 16, "num_experts": 8, "experts_per_token": 2}
    arch = dataclasses.replace(quickstart.ARCH, width=32, head_dim=8, **experts)
    stage = replace(stage, model__arch=arch, sft__steps=120, sft__num_samples=0, run=run_in(tmp_path / "run"))
    stage = replace(stage, optim__learning_rate=1e-2)
    graph = walks.make_graph(0)
    demos = walks.demonstrations(graph, 3200, 0)
    summary = sft.run(stage, rows=demos[:3000], eval_rows=demos[3000:])
    choices = dict(zip(string.ascii_lowercase, graph.adjacency.sum(1), strict=False))
    paths = [[row["prompt"], *row["response"].split()] for row in demos[3000:]]
    nats = [math.log(choices[node]) for path in paths for node in path[:-1]]  # that a walk ends is sure
    entropy = sum(nats) / sum(map(len, paths))
    assert entropy - 0.05 < summary["eval/nll"] < entropy + 0.25


def test_the_loss_of_packed_documents_is_that_of_each_alone(pretrained, tokenizer):
    examples, _ = sft_examples(documents(40, 2), tokenizer, Limits(2, 12, "error"), loss_on="all")
    model, mesh = pretrained[0], one_device_mesh()
    with jax.set_mesh(mesh.grid):
        loaded = load_model(ModelConfig(path=model), mesh, jax.random.key(0))
        found = []
        for rows, length in ((pack(examples, 24), 24), (examples, 12)):
            batch = {name: jnp.asarray(x) for name, x in collate_sft(rows, length=length, reduction="token").items()}
            read = (batch["tokens"], batch["positions"], batch["segment_ids"])
            logprobs = loaded.model.next_logprobs(loaded.params, *read)
            found.append(-float(jnp.sum(batch["weights"][:, 1:] * logprobs)))
    assert len(pack(examples, 24)) < len(examples) / 2
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_prompt_tokens_label_changes_nothing(tokenizer):
    """A bigram sees one token: the middle one of three of the prompt is a label, and predicts another label alone."""
    policy, loss_fn = bigram_params(0)["policy"], sft.objective(BIGRAMS.policy, losses.next_token_loss)
    of = jax.jit(jax.value_and_grad(lambda *args: loss_fn(*args, None)[0]))

    def found(prompt, loss_on):
        row = {"prompt": prompt, "response": "e f"}
        examples, _ = sft_examples([row], tokenizer, Limits(4, 8, "error"), loss_on=loss_on)
        return of(policy, collate_sft(examples, length=8, reduction="token"))

    jax.tree.map(np.testing.assert_array_equal, found("a b c", "response"), found("a d c", "response"))
    assert found("a b c", "all")[0] != found("a d c", "all")[0]


def test_sft_teaches_to_stop_where_a_response_is_finished(tmp_path, pretrained, tokenizer):
    """After a k, where pretraining's documents mostly go on."""
    base, _ = pretrained
    rng = np.random.default_rng(0)
    rows = [{"prompt": LETTERS[i % 10], "response": f"{rng.choice(list('abcde'))} k"} for i in range(200)]
    config = SFTArgs(
        model=ModelConfig(path=base), data=DATA, sft=SFTConfig(steps=60, num_samples=0),
        optim=RATE, run=run_in(tmp_path / "run"),
    )  # fmt: skip
    sft.run(config, rows=rows[:160], eval_rows=rows[160:])

    def stops(model):
        """Mean probability of the stop id after each of the first three tokens of held-out rows."""
        mesh = one_device_mesh()
        tokens = [tokenizer.encode_prompt(f"{row['prompt']} {row['response']}") for row in rows[160:]]
        tokens = jnp.asarray([[*row, tokenizer.eos_ids[0]] for row in tokens])
        with jax.set_mesh(mesh.grid):
            loaded = load_model(ModelConfig(path=model), mesh, jax.random.key(0))
            hidden = loaded.model.apply(loaded.params, tokens, jnp.arange(4)[None] + 0 * tokens, jnp.ones_like(tokens))
            return jax.nn.softmax(loaded.model.project(loaded.params, hidden))[:, :3, tokenizer.eos_ids[0]].mean(0)

    before, after = stops(base), stops(str(tmp_path / "run" / "model"))
    assert after[2] > 0.95 > 0.5 > before[2] and after[:2].max() < 0.05, (before, after)


# --- the reward model


def responses(num, seed):
    """(prompt, response) of one to eight letters."""
    rng = np.random.default_rng(seed)
    letters = lambda: " ".join(rng.choice(list(LETTERS), rng.integers(1, 9)))  # noqa: E731
    return [(LETTERS[i % 5], letters()) for i in range(num)]


def gold(response):
    """Letters before g are good, later ones are not."""
    return sum(1 if letter < "g" else -1 for letter in response.split())


def preferences(num, seed):
    rows = []
    for (prompt, one), (_, two) in zip(responses(num, seed), responses(num, seed + 1), strict=True):
        if gold(one) != gold(two):
            better, worse = (one, two) if gold(one) > gold(two) else (two, one)
            rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return rows


def test_a_reward_model_agrees_with_gold_and_is_normalised_on_fresh_samples_after_loading(tmp_path, pretrained):
    """And its scores depend neither on padding nor on what else is in the batch."""
    config = RewardArgs(
        model=ModelConfig(path=pretrained[0]), data=replace(DATA, batch_size=64), reward=RewardConfig(steps=80),
        optim=RATE, run=run_in(tmp_path / "run"),
    )  # fmt: skip
    summary = reward.run(config, rows=preferences(1500, 0), eval_rows=preferences(200, 10))
    assert summary["accuracy"] > 0.95
    saved = ModelConfig(path=str(tmp_path / "run" / "model"))
    reader = RewardModel(saved, one_device_mesh(), Limits(2, 12), batch_size=512)
    fresh = [reader.example({"prompt": p, "response": r}) for p, r in responses(4000, 20)]
    scores = np.array(reader.scores(fresh, 12))
    assert abs(scores.mean()) < 0.05 and abs(scores.std() - 1) < 0.05
    alone = RewardModel(saved, one_device_mesh(), Limits(2, 12), batch_size=8)
    np.testing.assert_allclose(alone.scores(fresh[40:47], 19), scores[40:47], atol=1e-5)


def test_a_reward_model_of_synthetic_feedback_knows_gold_pairs_better_than_its_labels(tmp_path, pretrained):
    """ALMoST: one source counts as better than another, which is right two times in three; gold labels nothing."""
    rng = np.random.default_rng(0)

    def written(share, rank):
        good = rng.random(rng.integers(1, 9)) < share
        text = " ".join(rng.choice(list("abcdef" if each else "ghijk")) for each in good)
        return {"text": text, "finished": True, "rank": rank}

    rows = [{"prompt": LETTERS[i % 5], "responses": [written(0.4, 1), written(0.6, 0)]} for i in range(1500)]
    pairs = pairs_of(rows, [shares_of(row) for row in rows])
    synthetic = [preference_of(rows, pair) for pair in pairs]
    agreement = np.mean([gold(row["chosen"]) > gold(row["rejected"]) for row in synthetic])
    config = RewardArgs(
        model=ModelConfig(path=pretrained[0]), data=replace(DATA, batch_size=64), reward=RewardConfig(steps=80),
        optim=RATE, run=run_in(tmp_path / "run"),
    )  # fmt: skip
    summary = reward.run(config, rows=synthetic, eval_rows=preferences(200, 10))
    assert 0.5 < agreement < 0.75 < summary["accuracy_interval"][0]


# --- PPO


def many_as(prompts, responses, **columns):
    """Nearly all of the letter a: what no document looks like."""
    return [sum(letter == "a" for letter in response.split()) / 4 for response in responses]


def ppo_from(base, path, iterations=40, rate=3e-3, **options):
    """A run on `many_as` of three to four letters, and the lines of its iterations."""
    optim = OptimConfig(learning_rate=rate, schedule="linear", eps=1e-5)
    config = PPOArgs(
        model=ModelConfig(path=base),
        data=DataConfig(batch_size=64, max_prompt_length=2, max_length=12),
        sampling=SamplingConfig(max_new_tokens=4, chunk=4),
        ppo=PPOConfig(iterations=iterations, num_samples=0, **options),
        optim=optim,
        value_optim=optim,
        run=run_in(path, keep_best=False),
    )
    prompts = [{"prompt": letter} for letter in LETTERS[:8]]
    summary = ppo.run(config, rows=prompts * 8, eval_rows=prompts * 8, reward_functions=[many_as])
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return summary, [line for line in lines if "rollout/kl" in line]


@pytest.mark.slow
def test_ppo_learns_stays_stable_at_four_epochs_and_ends_near_the_target_of_the_adaptive_kl(tmp_path, pretrained):
    """It begins with a price that would keep it at a KL of 0.05, and the controller finds one of a quarter of that."""
    options = {"kl_controller": "adaptive", "kl_target": 2.0, "kl_coef": 0.3, "kl_horizon": 500.0}
    summary, lines = ppo_from(pretrained[0], tmp_path / "run", iterations=150, rate=5e-4, **options)
    assert max(line["policy/ratio_max"] for line in lines) < 1.5
    last = np.mean([line["rollout/kl"] for line in lines[-15:]])
    assert abs(last / 2.0 - 1) < 0.3 and lines[-1]["ppo/kl_coef"] < 0.15
    assert summary["after"]["eval/reward"] > summary["before"]["eval/reward"] + 0.15


@pytest.mark.slow
def test_ptx_keeps_the_language_model_at_equal_reward(tmp_path, pretrained, tokenizer):
    base, text = pretrained[0], tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in documents(600, 0)))
    fixed = {"kl_controller": "fixed", "kl_coef": 0.02}
    ptx = {"ptx_coef": 0.05, "ptx_path": str(text), "ptx_batch_size": 16}
    found = {}
    for name, options in (("ppo", fixed), ("ptx", {**fixed, **ptx})):
        summary, _ = ppo_from(base, tmp_path / name, **options)
        found[name] = (
            summary["after"]["eval/reward"],
            nll(str(tmp_path / name / "model"), tokenizer, documents(100, 1)),
        )
    assert min(found["ppo"][0], found["ptx"][0]) > 0.7 and abs(found["ppo"][0] - found["ptx"][0]) < 0.1
    assert found["ptx"][1] < found["ppo"][1] - 0.5
