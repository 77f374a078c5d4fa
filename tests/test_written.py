"""What a model sampled is what is scored, written and trained, and what reward functions see: on real tokenizers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_round_trip import KINDS
from tiny import ARCH, ONE, model_params

from rlhf_jax.commands import bestofn, collect, datasets, evaluate, rate, sample
from rlhf_jax.commands.label.items import item_of
from rlhf_jax.config import (
    BestOfNArgs,
    CollectArgs,
    DataAggregateArgs,
    DataConfig,
    EvaluateArgs,
    GroupConfig,
    GRPOArgs,
    JudgeArgs,
    MeshConfig,
    ModelConfig,
    PPOArgs,
    PPOConfig,
    RateArgs,
    RewardSourceConfig,
    SamplingConfig,
    ScoreArgs,
)
from rlhf_jax.data.chat import MERGED
from rlhf_jax.data.comparisons import preference_examples, ranking_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import sft_examples
from rlhf_jax.data.pairs import pairs_of, preference_of, shares_of
from rlhf_jax.data.sources import rows_from
from rlhf_jax.data.tokenizer import OTHER_IDS, STOPPED, Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judges, sources
from rlhf_jax.feedback.judge import Judge
from rlhf_jax.group import train as group_train
from rlhf_jax.inference import generate
from rlhf_jax.inference.reward_functions import call_reward, columns_for
from rlhf_jax.models import Model
from rlhf_jax.models.loading import Loaded, load_model, save_model
from rlhf_jax.online import core
from rlhf_jax.online.iteration import python_rewards, sample_rows
from rlhf_jax.ppo import train as ppo_train
from rlhf_jax.sharding import make_mesh
from rlhf_jax.training.responses import response_scores
from rlhf_jax.types import Rollout

SAMPLING = SamplingConfig(max_new_tokens=6, chunk=6)
LONGEST = 24
LIMITS = Limits(LONGEST, LONGEST + 6, "truncate")
ANSWERED = [
    {"role": "user", "content": "is it two, yes or no"},
    {"role": "assistant", "content": "yes, it is"},
    {"role": "user", "content": "no it is two"},
]
PROMPTS = [
    {"prompt": "it is", "id": "a"},
    {"prompt": [{"role": "user", "content": "yes"}], "id": "b"},
    {"prompt": ANSWERED, "id": "c"},  # loses its start
]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Compiling for eight costs more than these tests are worth."""
    for module in (sources, sample, judges, ppo_train, group_train):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, devices=ONE))


@pytest.fixture(scope="module", params=["byte BPE", "ChatML", "blank, always", "legacy", "WordPiece"])
def models(request, tmp_path_factory) -> Path:
    """policy/ and reward/ with one tokenizer: a random decoder that stops now and then, a random scalar model."""
    return made(tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("models"), "ChatML")


def made(path: Path, kind: str) -> Path:
    KINDS[kind]().save_pretrained(path / "tokenizer")
    tokenizer = Tokenizer.load(str(path / "tokenizer"))
    for seed, name in enumerate(("policy", "reward")):
        model = Model(replace(ARCH, vocab_size=tokenizer.vocab_size), score_head=name == "reward")
        params = jax.device_put(model_params(model, seed), jax.sharding.SingleDeviceSharding(ONE[0]))
        save_model(path / name, Loaded(model, params), params, tokenizer)
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def drawn(monkeypatch) -> list[generate.Response]:
    """All that is sampled meanwhile, in its order."""
    found, real = [], generate.Generator.responses

    def spy(self, *args, **kwargs):
        found.extend(now := real(self, *args, **kwargs))
        return now

    monkeypatch.setattr(generate.Generator, "responses", spy)
    return found


def settings(cls, models, **changes):
    config = cls(model=ModelConfig(path=str(models / "policy")), num_samples=3, sampling=SAMPLING, batch_size=9)
    return replace(config, max_prompt_length=LONGEST, too_long="truncate", **changes)


def rollout_of(drawn) -> Rollout:
    """What was sampled as PPO has it: prompts padded on the left, responses on the right."""
    width, num = LONGEST, SAMPLING.max_new_tokens
    left = lambda ids: np.r_[np.zeros(width - len(ids), int), ids]  # noqa: E731
    right = lambda ids: np.r_[ids, np.zeros(num - len(ids), int)]  # noqa: E731
    return Rollout(
        prompt=jnp.asarray([left(one.prompt_ids) for one in drawn], jnp.int32),
        prompt_mask=jnp.asarray([left(np.ones(len(one.prompt_ids), int)) > 0 for one in drawn]),
        tokens=jnp.asarray([right(one.ids) for one in drawn], jnp.int32),
        mask=jnp.asarray([right(np.ones(len(one.ids), int)) > 0 for one in drawn]),
        logprobs=jnp.zeros((len(drawn), num)),
        finished=jnp.asarray([one.finished for one in drawn]),
    )


def scores_of_ppo(models, drawn) -> np.ndarray:
    """What the reward model says of rollouts, by the function of PPO's score program."""
    mesh, rollout = make_mesh(MeshConfig(), devices=ONE), rollout_of(drawn)
    loaded = load_model(ModelConfig(path=str(models / "reward")), mesh, jax.random.key(0), head="trained")
    with jax.set_mesh(mesh.grid):
        score = jax.jit(lambda params, x: response_scores(loaded.model, params, core.packed(x).at(0)))
        return np.asarray(score(loaded.params, rollout))


def sampled(drawn) -> list[list[int]]:
    """Prompt and response of each, as the model saw and wrote them."""
    return [[*one.prompt_ids.tolist(), *one.ids.tolist()] for one in drawn]


def trained(build, rows, tokenizer, *names, **options) -> list[list[int]]:
    """The token sequences of all examples; nothing may be read anew."""
    examples, report = build(rows_from(rows), tokenizer, LIMITS, **options)
    assert not {OTHER_IDS, MERGED, STOPPED} & report.remarks.keys()
    found = [example[name] for example in examples for name in names]
    return [ids.tolist() for each in found for ids in (each if isinstance(each, list) else [each])]


def test_what_was_sampled_is_scored_written_and_trained(models, tmp_path, drawn):
    """bestofn, `score` of its rows and PPO say one number, and every reader sees the ids; cut prompts as they were."""
    reward = RewardSourceConfig(model=str(models / "reward"))
    bestofn.run(settings(BestOfNArgs, models, output=str(tmp_path / "b.jsonl"), reward=reward), rows=PROMPTS)
    wanted, whole = scores_of_ppo(models, drawn).reshape(len(PROMPTS), -1), sampled(drawn)
    best = [3 * i + int(scores.argmax()) for i, scores in enumerate(wanted)]
    rows, tokenizer = read(tmp_path / "b.jsonl"), Tokenizer.load(str(models / "tokenizer"))
    np.testing.assert_allclose([row["score"] for row in rows], wanted.max(axis=1), atol=1e-5)
    files = {"data_path": str(tmp_path / "b.jsonl"), "output": str(tmp_path / "s.jsonl")}
    again = sample.run_score(
        ScoreArgs(ModelConfig(path=reward.model), max_prompt_length=LONGEST, max_length=LONGEST + 6, **files)
    )
    np.testing.assert_allclose([row["score"] for row in again], wanted.max(axis=1), atol=1e-5)
    spoken = [i for i, row in enumerate(rows) if row["response"].strip()]
    kept = [rows[i] for i in spoken]
    assert trained(sft_examples, kept, tokenizer, "tokens", loss_on="response") == [whole[best[i]] for i in spoken]
    for row, i in zip(rows, best, strict=True):
        assert tokenizer.response_text(row["response_ids"], row["prompt"]) == row["response"] == drawn[i].text
    assert any(len(one.prompt_ids) == LONGEST for one in drawn) == (tokenizer.vocab_size > 99)  # words are few

    config = settings(CollectArgs, models, label="reward", reward=reward, output=str(tmp_path / "c.jsonl"))
    [*ranked] = collect.run_collect(config, rows=PROMPTS)
    items = [item for row in ranked for item in row["responses"]]
    np.testing.assert_allclose([item["score"] for item in items], wanted.reshape(-1), atol=1e-5)
    assert [item["ids"] for item in items] == [one.ids.tolist() for one in drawn[:9]]
    spoken = {tuple(ids) for ids, item in zip(whole, items, strict=False) if item["text"].strip()}
    assert {tuple(ids) for ids in trained(ranking_examples, ranked, tokenizer, "responses")} <= spoken
    pairs = collect.run_collect(replace(config, schema="preference", overwrite=True), rows=PROMPTS)
    assert {tuple(ids) for ids in trained(preference_examples, pairs, tokenizer, "chosen", "rejected")} <= spoken
    one_each = collect.run_collect(replace(config, schema="sft", overwrite=True), rows=PROMPTS)
    assert {tuple(ids) for ids in trained(sft_examples, one_each, tokenizer, "tokens", loss_on="response")} <= spoken


LOSSLESS = [kind for kind in KINDS if kind not in ("WordPiece", "white space")]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_rounds_of_sampling_and_training_grow_no_blank(kind):
    """A policy that has learned its own best text writes that text, round after round; with ids or read anew."""
    tokenizer = Tokenizer(KINDS[kind]())
    for row in PROMPTS:
        for text in ("it is", " it is", "  it is", "it is ", ", yes", "'s"):
            said = text
            for _ in range(3):
                response = said if isinstance(row["prompt"], str) else [{"role": "assistant", "content": said}]
                ids = tokenizer.encode_response(response)
                said = tokenizer.response_text(ids, row["prompt"])
                assert said == text and tokenizer.encode_response(response, ids=ids) == ids


def test_an_evaluation_measures_what_was_sampled(chat_models, tmp_path, drawn):
    """Scores, log-probs and tokens in responses.jsonl are of the ids beside them; the KL to itself is 0."""
    reward = RewardSourceConfig(model=str(chat_models / "reward"))
    config = settings(EvaluateArgs, chat_models, output_dir=str(tmp_path / "e"), reward=reward)
    found = evaluate.run_evaluate(replace(config, reference=config.model.path), rows=PROMPTS)
    items = [item for row in read(tmp_path / "e" / "responses.jsonl") for item in row["responses"]]
    assert [item["ids"] for item in items] == [one.ids.tolist() for one in drawn]
    assert [item["tokens"] for item in items] == [len(one.ids) for one in drawn]
    np.testing.assert_allclose([item["score"] for item in items], scores_of_ppo(chat_models, drawn), atol=1e-5)
    loaded = load_model(config.model, make_mesh(MeshConfig(), devices=ONE), jax.random.key(0))
    tokenizer = Tokenizer.load(str(chat_models / "tokenizer"))
    for item, one in list(zip(items, drawn, strict=True))[::4]:
        tokens = jnp.asarray([*one.prompt_ids, *one.ids])[None]
        hidden = loaded.model.apply(loaded.params, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
        each = loaded.model.logprobs(loaded.params, hidden[:, :-1], tokens[:, 1:])[0][0]
        assert item["logprob"] == pytest.approx(float(each[len(one.prompt_ids) - 1 :].sum()), rel=1e-4)
        assert item["text"] == one.text == tokenizer.response_text(item["ids"], "it is")  # ChatML puts nothing before
    [of] = found["models"].values()
    assert of["kl"]["mean"] == 0


def test_rows_that_pass_on_responses_pass_on_their_ids(chat_models, tmp_path):
    """`judge`, `rate`, `data aggregate` and the labelling page."""
    tokenizer = Tokenizer.load(str(chat_models / "tokenizer"))
    ids = [tokenizer.encode_response([{"role": "assistant", "content": text}]) for text in ("it is", "no", "yes, two")]
    items = [
        {"text": text, "ids": own, "finished": True, "score": n, "model": "m"}
        for n, (text, own) in enumerate(zip(("it is", "no", "yes, two"), ids, strict=True))
    ]
    rows = [{"prompt": PROMPTS[1]["prompt"], "responses": items}]
    judge = Judge(lambda questions, key: [float(len(a) > len(b)) for _, a, b in questions])
    judged = collect.run_judge(JudgeArgs(output=str(tmp_path / "j.jsonl"), progress=False), rows=rows, judge=judge)
    length = lambda prompts, responses, **columns: [len(text) for text in responses]  # noqa: E731
    ranks = rate.run(RateArgs(output=str(tmp_path / "r.jsonl")), rows=rows, function=length)
    ratings = rate.run(RateArgs(verdict="rating"), rows=rows, function=length)
    (tmp_path / "c.jsonl").write_text(json.dumps(rows[0]))
    joined = datasets.run_aggregate(DataAggregateArgs(path=str(tmp_path / "c.jsonl")))
    shown = [{**row, "responses": item_of(row).ranking.items()} for row in rows_from(rows)]
    for found in (judged, ranks, joined, shown):
        assert [item["ids"] for item in found[0]["responses"]] == ids
        assert [item["model"] for item in found[0]["responses"]] == ["m"] * 3
    assert [row["response_ids"] for row in ratings] == ids
    pairs = [preference_of(judged, pair) for pair in pairs_of(judged, [shares_of(judged[0])])]
    assert all(row["chosen_ids"] == ids[2] or row["rejected_ids"] == ids[1] for row in pairs)


def ppo(models, **overrides):
    return ppo_train.setup(PPOArgs(**online(models), ppo=PPOConfig(num_samples=9)), **overrides)[0]


def grpo(models, **overrides):
    return group_train.setup(GRPOArgs(**online(models), grpo=GroupConfig(group_size=3, num_samples=9)), **overrides)[0]


def online(models) -> dict:
    data = DataConfig(batch_size=9, max_prompt_length=LONGEST, max_length=LONGEST + 6, too_long="truncate")
    mesh = MeshConfig(data=1)
    return {"model": ModelConfig(path=str(models / "policy")), "data": data, "sampling": SAMPLING, "mesh": mesh}


def test_messages_are_a_column_for_functions_that_take_it():
    """The same for all rows of a data set: None beside a text; what a template is given beside them is not said."""
    tools = {"role": "template", "content": "", "tools": [{"name": "f"}]}
    said = PROMPTS[1]["prompt"]
    found = columns_for([], ["a", said, [tools, *said]], [{"k": 1}, {}, {"k": 2}], ["x:1", "x:2", "x:3"])
    assert found == [{"k": 1, "messages": None}, {"k": None, "messages": said}, {"k": 2, "messages": said}]
    assert columns_for([], ["a", "b"], [{"k": 1}, {"k": 2}], ["x:1", "x:2"]) == [{"k": 1}, {"k": 2}]
    with pytest.raises(UserError, match='x:2: the field "messages" has the name by which'):
        columns_for([], [said, said], [{}, {"messages": 3}], ["x:1", "x:2"])
    both = {"k": [1, 2], "messages": [None, said]}
    for fn in (
        lambda prompts, responses, k: k,
        lambda prompts, responses, k, messages: [len(turns or "") + k[0] for turns in messages],
        lambda prompts, responses, **columns: [len(columns) - 1, 1],
    ):
        assert len(call_reward(fn, ["a", "b"], ["c", "d"], both, timeout=0, retries=0)) == 2
        columns_for([fn], ["a", said], [{"k": 1}, {"k": 2}], ["x:1", "x:2"])
    with pytest.raises(UserError, match=r"x:2: reward function .* 'z'"):
        columns_for([lambda prompts, responses, k: k], ["a", "b"], [{"k": 1}, {"k": 2, "z": 3}], ["x:1", "x:2"])


class Watched:
    """A reward function that keeps what it is given, by response."""

    def __init__(self):
        self.seen = {}

    def __call__(self, prompts, responses, *, messages, id):
        for row in zip(prompts, responses, messages, id, strict=True):
            self.seen[row[1], row[3]] = row
        return [float(len(text)) for text in responses]


def test_reward_functions_see_one_text_in_every_command_and_stage(chat_models, tmp_path, drawn):
    """The prompt as the model is shown it, its messages, and the response: bestofn, collect, evaluate, PPO, GRPO."""
    tokenizer = Tokenizer.load(str(chat_models / "tokenizer"))
    commands = {
        "bestofn": lambda fn, gold, **options: bestofn.run(
            settings(BestOfNArgs, chat_models, output=str(tmp_path / "b.jsonl")), functions=[fn], gold=gold, **options
        ),
        "collect": lambda fn, gold, **options: collect.run_collect(
            settings(CollectArgs, chat_models, output=str(tmp_path / "c.jsonl"), label="reward"),
            functions=[fn], gold=gold, **options,
        ),
        "evaluate": lambda fn, gold, **options: evaluate.run_evaluate(
            settings(EvaluateArgs, chat_models, output_dir=str(tmp_path / "e")), functions=[fn], gold=gold, **options
        ),
    }  # fmt: skip
    asked = {row["id"]: row["prompt"] for row in PROMPTS}
    found = {}
    for name, run in commands.items():
        reward, gold = Watched(), Watched()
        run(reward, gold, rows=PROMPTS)
        assert gold.seen == reward.seen
        found[name] = reward.seen
    nine = drawn[:9]  # the same seed, the same samples
    of = {row["id"]: nine[3 * i : 3 * i + 3] for i, row in enumerate(PROMPTS)}
    for name, method_of, rows in (("ppo", ppo, PROMPTS * 3), ("grpo", grpo, PROMPTS)):
        reward, gold = Watched(), Watched()
        method = method_of(chat_models, rows=rows, eval_rows=PROMPTS[:1], reward_functions=[reward], gold=gold)
        batch, left = method.batch(0), {name: list(each) for name, each in of.items()}
        ours = [left[name].pop() for name in batch["columns"]["id"]]
        rollout = rollout_of(ours)
        python_rewards(method, batch, rollout, jax.random.key(0))
        assert gold.seen == reward.seen
        found[name] = reward.seen
        table = {"rollout": jax.tree.map(np.asarray, rollout), "reward": np.zeros(9)}
        table = sample_rows(method, table, batch, len(batch["given"]))
        spoken = [i for i, row in enumerate(table) if row["response"].strip()]
        wanted = [sampled(ours)[i] for i in spoken]
        kept = [table[i] for i in spoken]
        assert trained(sft_examples, kept, tokenizer, "tokens", loss_on="response") == wanted
    for (response, name), (prompt, _, messages, _) in found["bestofn"].items():
        assert prompt == tokenizer.prompt_text(asked[name])
        assert messages == (asked[name] if name != "a" else None)
        assert any(one.text == response for one in nine)
    for seen in found.values():
        assert seen == found["bestofn"]
