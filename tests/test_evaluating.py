"""`rlhf-jax evaluate`: win rates and their intervals, KL, perplexity, and that it goes on after any end."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ARCH, ONE, TOY_ROWS, toy_directory

from rlhf_jax import cli
from rlhf_jax.commands import sample
from rlhf_jax.commands.evaluate import run_evaluate
from rlhf_jax.commands.sample import print_rows, run_score
from rlhf_jax.config import (
    EvaluateArgs,
    JudgeConfig,
    MeshConfig,
    ModelConfig,
    RewardSourceConfig,
    SamplingConfig,
    ScoreArgs,
    SourceConfig,
)
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judges, report, sources
from rlhf_jax.feedback.judge import Judge
from rlhf_jax.feedback.sources import Sources
from rlhf_jax.inference.generate import Generator
from rlhf_jax.models import Model
from rlhf_jax.models.loading import load_model, save_model
from rlhf_jax.sharding import make_mesh

PROMPTS = TOY_ROWS["rows"][:20]
TOY = str(toy_directory() / "policy")
ALONE = [str(i) for i in range(50)]
"""Prompts of which each is in one row."""


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Compiling for eight costs more than these tests are worth."""
    for module in (judges, sources, sample):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, devices=ONE))


@pytest.fixture(scope="module")
def terse(tmp_path_factory) -> str:
    """The toy policy that stops where it would say its favourite node, so that it writes shorter."""
    mesh, path = make_mesh(MeshConfig(), devices=ONE), tmp_path_factory.mktemp("terse") / "model"
    loaded, tokenizer = load_model(ModelConfig(path=TOY), mesh, jax.random.key(0)), Tokenizer.load(TOY)
    order = list(range(ARCH.vocab_size))
    (stop,), (favourite,) = tokenizer.eos_ids, tokenizer.hf.encode("p", add_special_tokens=False)
    order[stop], order[favourite] = favourite, stop
    tokens = loaded.params["embed"]["tokens"]  # the output's, too
    params = {**loaded.params, "embed": {"tokens": jax.device_put(np.asarray(tokens)[order], tokens.sharding)}}
    save_model(path, loaded, params, tokenizer)
    return str(path)


def settings(output_dir: Path, **changes) -> EvaluateArgs:
    config = EvaluateArgs(
        model=ModelConfig(path=TOY),
        sampling=SamplingConfig(max_new_tokens=6, chunk=6),
        num_samples=2,
        max_prompt_length=2,
        batch_size=8,
        output_dir=str(output_dir),
        progress=False,
    )
    return replace(config, **changes)


def length(prompts, responses, **columns):
    return [float(len(text.split())) for text in responses]


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def longer(prompt, a, b):
    return 0.5 if len(a) == len(b) else float(len(a) > len(b))


# --- who beats whom


def test_a_model_against_itself_wins_half_and_is_at_no_distance(tmp_path):
    """Other samples of the same law: the interval holds 1/2. The same weights as reference: the KL is exactly 0."""
    twins = [SourceConfig(name="a"), SourceConfig(name="b")]
    config = settings(tmp_path / "e", sources=twins, reference=TOY, num_samples=4)
    found = run_evaluate(config, rows=PROMPTS, functions=[length])["models"]
    low, high = found["b"]["wins"]["reward"]["interval"]
    assert low < 0.5 < high and high - low < 0.3 and "wins" not in found["a"]
    assert all(of["kl"] == {"mean": 0.0, "se": 0.0} and of["kl_per_token"] == 0.0 for of in found.values())
    texts = [[r["text"] for r in row["responses"]] for row in read(tmp_path / "e" / "responses.jsonl")]
    assert [t[:4] for t in texts] != [t[4:] for t in texts]


def test_equal_texts_are_ties_whoever_compares(tmp_path, capsys):
    twins = [SourceConfig(name="a", temperature=0.0), SourceConfig(name="b", temperature=0.0)]
    config = settings(tmp_path / "e", sources=twins, judge=JudgeConfig(function="test_evaluating:longer"), pass_at=[2])
    found = run_evaluate(config, rows=PROMPTS, functions=[length])["models"]["b"]
    assert [found["wins"][by]["rate"] for by in ("reward", "judge")] == [0.5, 0.5]
    assert found["pass@2"]["rate"] == 1.0 and "pass@2" in capsys.readouterr().out  # every length is at least 1


@pytest.mark.parametrize(("few", "many"), [("a", "b"), ("b", "a")])
def test_every_response_is_judged_where_one_source_has_more(tmp_path, few, many):
    """Those of the source with fewer come round again, be it the baseline or not."""
    sources = [SourceConfig(name=name, num_samples=2 if name == few else 5) for name in "ab"]
    config = settings(tmp_path / "e", sources=sources, judge=JudgeConfig(function="test_evaluating:longer"))
    found = run_evaluate(config, rows=PROMPTS[:3])
    expected = []
    for row in read(tmp_path / "e" / "responses.jsonl"):
        of = {name: [x["text"] for x in row["responses"] if x["source"] == name] for name in "ab"}
        pairs = [{few: of[few][k % 2], many: of[many][k]} for k in range(5)]
        expected.append(np.mean([longer("", pair["b"], pair["a"]) for pair in pairs]))
    assert found["judge"]["pairs"] == 15
    assert found["models"]["b"]["wins"]["judge"]["rate"] == pytest.approx(np.mean(expected))


def test_length_orders_a_terse_and_a_talkative_model_whichever_is_the_baseline(tmp_path, terse):
    """By a function, and by a judge that a place and a doubt do not move; each win of one is a loss of the other."""
    sources = [SourceConfig(name="talk"), SourceConfig(name="terse", path=terse)]
    config = settings(tmp_path / "e", sources=sources, judge=JudgeConfig(function="test_evaluating:longer"))
    found = run_evaluate(config, rows=PROMPTS, functions=[length], gold=lambda p, r, **c: [-x for x in length(p, r)])
    talk, short = found["models"]["talk"], found["models"]["terse"]
    assert short["tokens"] < talk["tokens"] - 1 and short["unfinished"] < talk["unfinished"]
    assert short["reward"]["mean"] + 2 * short["reward"]["se"] < talk["reward"]["mean"]
    assert short["gold"]["mean"] == -short["reward"]["mean"]
    wins = short["wins"]
    assert wins["reward"]["interval"][1] < 0.5 and wins["judge"]["interval"][1] < 0.5
    assert wins["gold"]["rate"] == pytest.approx(1 - wins["reward"]["rate"])
    turned = run_evaluate(
        replace(config, baseline="terse", output_dir=str(tmp_path / "turned")), rows=PROMPTS, functions=[length]
    )["models"]["talk"]["wins"]
    for by in ("reward", "judge"):
        assert turned[by]["rate"] == pytest.approx(1 - wins[by]["rate"])
        assert turned[by]["interval"] == pytest.approx([1 - end for end in wins[by]["interval"][::-1]])


def test_a_reward_model_decides_who_wins_by_the_scores_of_score(tmp_path, terse):
    """Of the texts in responses.jsonl, with the stop token where they finished."""
    model, flat = str(toy_directory() / "reward"), str(tmp_path / "flat.jsonl")
    sources = [SourceConfig(name="talk"), SourceConfig(name="terse", path=terse)]
    config = settings(tmp_path / "e", sources=sources, reward=RewardSourceConfig(model=model))
    found = run_evaluate(config, rows=PROMPTS[:8])["models"]["terse"]
    rows = read(tmp_path / "e" / "responses.jsonl")
    items = [{**item, "prompt": row["prompt"]} for row in rows for item in row["responses"]]
    names = {"prompt": "prompt", "response": "text", "response_ids": "ids", "finished": "finished"}
    print_rows([{name: item[of] for name, of in names.items()} for item in items], flat)
    scored = run_score(
        ScoreArgs(
            ModelConfig(path=model),
            data_path=flat,
            max_prompt_length=2,
            max_length=8,
            output=str(tmp_path / "s.jsonl"),
        )
    )
    scores = np.array([row["score"] for row in scored]).reshape(8, 4)
    assert {item["finished"] for item in items} == {True, False} and scores.std() > 0.1
    np.testing.assert_allclose(np.reshape([item["score"] for item in items], (8, 4)), scores, rtol=1e-5, atol=1e-5)
    assert found["wins"]["reward"]["rate"] == pytest.approx(report.wins_over(scores[:, 2:], scores[:, :2]).mean())
    assert found["reward"]["mean"] == pytest.approx(scores[:, 2:].mean(), rel=1e-5)


def test_a_judges_liking_for_a_place_is_in_the_report_and_not_in_the_win_rate(tmp_path):
    """Place A wins every answer: all pairs contradict themselves, so all are ties."""
    twins = [SourceConfig(name="a"), SourceConfig(name="b")]
    always_a = Judge(lambda questions, key: [1.0] * len(questions))
    found = run_evaluate(settings(tmp_path / "e", sources=twins), rows=PROMPTS, judge=always_a)
    assert found["models"]["b"]["wins"]["judge"]["rate"] == 0.5
    assert found["judge"]["slot_a"] == 1.0 and found["judge"]["consistency"] == 0.0
    assert found["judge"]["raw_first"] == 1.0  # what one order alone would have said


def test_a_pair_without_a_verdict_does_not_count(tmp_path):
    twins = [SourceConfig(name="a"), SourceConfig(name="b")]

    def moody(questions, key):  # knows only what it is asked about the first of the start nodes
        known = PROMPTS[0]["prompt"]
        return [float(len(a) >= len(b)) if prompt == known else "nonsense" for prompt, a, b in questions]

    found = run_evaluate(settings(tmp_path / "e", sources=twins), rows=PROMPTS, judge=Judge(moody))
    wins = found["models"]["b"]["wins"]["judge"]
    verdicts = [row["verdicts"] for row in read(tmp_path / "e" / "responses.jsonl")]
    asked = [of_one for of_one in verdicts if any(v["share"] is not None for v in of_one)]
    assert wins["prompts"] == len(asked) < len(PROMPTS)


def test_responses_that_a_reward_failed_on_are_counted_and_said(tmp_path, capsys):
    """Batches of 8 responses, 2 to a prompt: those of the first four prompts are lost."""

    def moody(prompts, responses, **columns):
        if PROMPTS[0]["prompt"] in prompts:
            raise OSError("gone")
        return length(prompts, responses)

    reward = RewardSourceConfig(functions=["a:b"], on_failure="skip", retries=0)
    found = run_evaluate(settings(tmp_path / "e", reward=reward), rows=PROMPTS, functions=[moody])
    assert found["unscored"] == 8 and "! 8 responses have no score" in capsys.readouterr().out
    scores = [[r["score"] for r in row["responses"]] for row in read(tmp_path / "e" / "responses.jsonl")]
    assert found["models"]["model"]["reward"]["mean"] == pytest.approx(np.mean(scores[4:]))


@pytest.mark.parametrize("spread", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("middle", [0.5, 0.8, 0.97])
def test_intervals_hold_the_truth_as_often_as_they_say(spread, middle):
    """40 prompts whose chances differ by a beta law, three comparisons each, 2000 times."""
    rng = np.random.default_rng(0)
    chances = rng.beta(middle / spread, (1 - middle) / spread, (2000, 40))
    shares = rng.binomial(3, chances) / 3
    held, widths = [], []
    for row in shares:
        low, high = report.win_rate(row, ALONE[:40])["interval"]
        held.append(low <= middle <= high)
        widths.append(high - low)
    assert np.mean(held) > 0.92
    assert np.mean(widths) < 1.3 * 3.92 * shares.mean(axis=1).std()  # and not by being too wide


def test_a_win_rate_of_all_ties_or_all_wins_is_no_certainty():
    assert report.win_rate(np.ones(20), ALONE[:20])["interval"][0] < 0.9
    low, high = report.win_rate(np.full(20, 0.5), ALONE[:20])["interval"]
    assert low < 0.5 < high
    assert report.win_rate(np.full(3, np.nan), ALONE[:3]) == {"rate": None, "interval": None, "prompts": 0}


# --- measures


def test_kl_and_perplexity_are_those_of_the_models(tmp_path, monkeypatch, terse):
    """Against log-probs of the very ids that were drawn, row by row, at another temperature than 1."""
    print_rows([{"prompt": "b", "response": " c d a"}, {"prompt": "c", "response": " e"}], str(tmp_path / "t.jsonl"))
    drawn, draw = [], Generator.responses

    def spy(self, *args, **kwargs):
        found = draw(self, *args, **kwargs)
        drawn.extend(found)
        return found

    monkeypatch.setattr(Generator, "responses", spy)
    config = settings(
        tmp_path / "e", sources=[SourceConfig(temperature=0.7, path=terse, name="x")], reference=TOY,
        text_path=str(tmp_path / "t.jsonl"),
    )  # fmt: skip
    found = run_evaluate(config, rows=PROMPTS[:6])["models"]["x"]
    mesh, tokenizer, model = make_mesh(MeshConfig(), devices=ONE), Tokenizer.load(TOY), Model(ARCH)
    load = lambda path: load_model(ModelConfig(path=path), mesh, jax.random.key(0)).params  # noqa: E731
    params = {"own": load(terse), "ref": load(TOY)}

    def logprob(name, prompt, response, temperature):
        tokens = jnp.asarray([[*prompt, *response]])
        hidden = model.apply(params[name], tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
        each = model.logprobs(params[name], hidden[:, :-1], tokens[:, 1:], temperature)[0][0]
        return float(each[len(prompt) - 1 :].sum())

    items = [item for row in read(tmp_path / "e" / "responses.jsonl") for item in row["responses"]]
    both = np.array([[logprob(n, one.prompt_ids, one.ids, 0.7) for n in ("own", "ref")] for one in drawn])
    assert [item["tokens"] for item in items] == [len(one.ids) for one in drawn]
    assert [item["finished"] for item in items] == [one.ids[-1] in tokenizer.eos_ids for one in drawn]
    np.testing.assert_allclose([[item["logprob"], item["ref_logprob"]] for item in items], both, rtol=1e-4)
    ratio = both[:, 0] - both[:, 1]
    assert found["kl"]["mean"] == pytest.approx(ratio.mean(), rel=1e-3)
    assert found["kl_per_token"] == pytest.approx(ratio.sum() / sum(len(one.ids) for one in drawn), rel=1e-3)
    texts = [(tokenizer.encode_prompt(r["prompt"]), tokenizer.encode_response(r["response"]))
             for r in read(tmp_path / "t.jsonl")]  # fmt: skip
    nll = -sum(logprob("own", *text, 1.0) for text in texts) / sum(len(response) for _, response in texts)
    assert found["perplexity"] == pytest.approx(np.exp(nll), rel=1e-4)


def test_standard_errors_are_of_prompts_not_of_responses():
    values = np.repeat(np.random.default_rng(0).normal(size=(50, 1)), 8, axis=1)  # eight equal responses tell no more
    assert report.mean_of(values, ALONE[:50])["se"] == pytest.approx(values[:, 0].std(ddof=1) / 50**0.5)


def test_wins_count_every_pair_of_samples_and_ties_half():
    own, other = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0, 3.0]])
    assert report.wins_over(own, other).tolist() == [(0.5 + 1 + 0 + 1 + 1 + 0) / 6]


# --- the directory


def test_what_is_finished_is_not_done_again_and_what_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    each = [SourceConfig(name="a"), SourceConfig(name="b", temperature=0.5)]
    reference = Path(shutil.copytree(TOY, tmp_path / "reference"))
    config = settings(tmp_path / "e", sources=each, reference=str(reference))
    whole = run_evaluate(config, rows=PROMPTS, functions=[length])
    assert json.loads((tmp_path / "e" / "summary.json").read_text()) == whole
    shown = capsys.readouterr().out
    files = {p.name: p.read_bytes() for p in (tmp_path / "e").iterdir()}
    assert set(files) == {"config.yaml", "responses.jsonl", "summary.json"}
    broken = Path(shutil.copytree(tmp_path / "e", tmp_path / "f"))
    with monkeypatch.context() as patch:
        patch.setattr(Sources, "drawer", lambda *args: pytest.fail("it is finished"))
        assert run_evaluate(config, rows=PROMPTS, functions=[length]) == whole
        assert shown in capsys.readouterr().out
        with pytest.raises(UserError, match=r"holds evaluate with another config: seed 0 there, 1 here"):
            run_evaluate(replace(config, seed=1), rows=PROMPTS, functions=[length])
        with pytest.raises(UserError, match="holds evaluate of other rows or functions"):
            run_evaluate(config, rows=PROMPTS[1:], functions=[length])
        (reference / "config.json").write_text((reference / "config.json").read_text() + " ")  # trained again
        with pytest.raises(UserError, match="holds an evaluation of other contents of reference; choose another"):
            run_evaluate(config, rows=PROMPTS, functions=[length])
        shutil.rmtree(reference)  # what is gone has not changed
        assert run_evaluate(config, rows=PROMPTS, functions=[length]) == whole
    shutil.copytree(TOY, reference)
    again = replace(config, output_dir=str(broken), overwrite=True)
    monkeypatch.setattr("rlhf_jax.runs.journal.Journal.finish", lambda self, *_: None)
    run_evaluate(again, rows=PROMPTS, functions=[length])
    monkeypatch.undo()
    part = broken / "responses.jsonl.part"
    lines = part.read_bytes()
    part.write_bytes(lines[: len(lines) * 2 // 3])
    for name in ("summary.json", "responses.jsonl"):
        (broken / name).unlink()
    monkeypatch.setattr("rlhf_jax.feedback.sources.make_mesh", lambda config: make_mesh(config, devices=ONE))
    assert run_evaluate(replace(again, overwrite=False), rows=PROMPTS, functions=[length]) == whole
    assert (broken / "responses.jsonl").read_bytes() == files["responses.jsonl"]


MISTAKES = {
    "evaluate --output_dir e": "there are no prompts",
    "evaluate --prompts [b]": "output_dir is empty; say where to write",
    "evaluate --prompts [b] --output_dir taken": r"output_dir taken holds another run \(config.yaml\); choose another",
    "evaluate --prompts [b] --overwrite true --output_dir run": r"run holds a run or a recipe \(run.json\); choose",
    "evaluate --prompts [b] --output_dir e --sources '[{name: a}, {name: a}]'": "sources a, a are not told apart",
    "evaluate --prompts [b] --output_dir e --sources '[{name: a}]' --baseline c": "'c' is none of the sources: a;",
    "evaluate --reference r --sources '[{top_p: 0.9}]'": "of a model's own samples, but top_p draws them from another",
    "evaluate --reference r --sampling.top_k 4": "but sampling.top_k draws them from another law",
    "evaluate --reference r --sources '[{temperature: 0}]'": "but temperature 0 draws them from another law",
    "evaluate --reference r --sampling.temperature 1e-5": "but temperature 1e-05 draws them from another law",
    "evaluate --prompts [b] --output_dir e --text_path no.jsonl": "no.jsonl: no such file",
    "evaluate --prompts [b] --output_dir e --judge.function a:b --judge.url http://x": "name one judge",
    "evaluate --pass_at [1,5]": r"pass_at \[1, 5\] are not different numbers from 1 to 4, the responses",
    "evaluate --prompts [b] --output_dir e --pass_at [1]": "pass_at asks for a reward; give reward.functions or",
    "evaluate --max_length 0": "max_length is 0; make it at least 1",
    "evaluate --prompts [b] --output_dir e": "model.tokenizer and model.path are both empty",
}


@pytest.mark.parametrize(("line", "expected"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_one_line(line, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("# rlhf-jax ppo --config x\nmodel: {}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UserError, match=expected) as error:
        cli.dispatch(shlex.split(line))
    assert "\n" not in str(error.value)


def test_a_reference_with_another_vocabulary_is_refused(tmp_path):
    from rlhf_jax.tasks.random_walks import make_tokenizer

    shutil.copytree(TOY, tmp_path / "other")
    make_tokenizer(9).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"reference .*other has another tokenizer than the policy"):
        run_evaluate(settings(tmp_path / "e", reference=str(tmp_path / "other")), rows=PROMPTS[:2])
