"""Best-of-n and rejection sampling: which row is kept, what the rewards of n are, and going on after any end."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import ONE, TOY_ROWS, toy_directory

from rlhf_jax import cli, sft
from rlhf_jax.commands import bestofn, rejection
from rlhf_jax.config import (
    BestOfNArgs,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RejectionArgs,
    RejectionConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import sources
from rlhf_jax.runs.run import Run
from rlhf_jax.sharding import make_mesh
from rlhf_jax.training import supervised

TOY = str(toy_directory() / "policy")
SAMPLING = SamplingConfig(max_new_tokens=6, chunk=6)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Compiling for eight costs more than these tests are worth."""
    for module in (sources, supervised):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, devices=ONE))


def short(prompts, responses, **columns):
    return [-float(len(text.split())) for text in responses]


def doubtful(prompts, responses, **columns):
    """A proxy of `short` that errs by up to one token."""
    scores = zip(short(prompts, responses), responses, strict=True)
    return [score + zlib.crc32(text.encode()) % 3 - 1 for score, text in scores]


def letters(prompts, responses, **columns):
    return [float(len(set(text.split()))) for text in responses]


def rows_in(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def sampling(path, **changes):
    config = BestOfNArgs(
        model=ModelConfig(path=TOY), num_samples=6, sampling=SAMPLING, max_prompt_length=2, batch_size=24,
        output=str(path), progress=False,
    )  # fmt: skip
    return replace(config, **changes)


def test_the_best_response_is_kept_and_the_rewards_of_every_n_are_reported(tmp_path, capsys):
    seen = {}

    def watched(prompts, responses, **columns):
        scores = short(prompts, responses)
        for prompt, response, score in zip(prompts, responses, scores, strict=True):
            seen.setdefault(prompt, []).append((score, response))
        return scores

    prompts = TOY_ROWS["rows"][:10]
    out = tmp_path / "best.jsonl"
    summary = bestofn.run(sampling(out), rows=prompts, functions=[watched], gold=letters)
    kept = rows_in(out)
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in prompts]
    for row in kept:
        assert len(seen[row["prompt"]]) == 6 and (row["score"], row["response"]) in seen[row["prompt"]]
        assert row["score"] == max(score for score, _ in seen[row["prompt"]])
        assert row["gold"] == letters([], [row["response"]])[0]
    curve = {at["n"]: at for at in summary["curve"]}
    assert list(curve) == [1, 2, 4, 6]
    everything = [[score for score, _ in each] for each in seen.values()]
    assert curve[1]["proxy"]["mean"] == pytest.approx(np.mean(everything)) and curve[1]["kl"] == 0
    assert curve[6]["proxy"]["mean"] == pytest.approx(np.mean([row["score"] for row in kept]))
    means = [at["proxy"]["mean"] for at in summary["curve"]]
    assert means == sorted(means) and means[0] < means[-1]
    assert curve[4]["kl"] == pytest.approx(np.log(4) - 3 / 4, rel=1e-6)
    assert json.loads(out.with_suffix(".summary.json").read_text()) == summary
    assert "best of" in capsys.readouterr().out


def test_a_best_of_n_that_was_ended_goes_on_to_the_same_bytes(tmp_path):
    prompts, calls = TOY_ROWS["rows"][:12], []

    def ends(prompts, responses, **columns):
        calls.append(len(responses))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return short(prompts, responses)

    config = sampling(tmp_path / "best.jsonl", reward__timeout=0.0)
    with pytest.raises(KeyboardInterrupt):
        bestofn.run(config, rows=prompts, functions=[ends])
    assert not (tmp_path / "best.jsonl").exists()
    bestofn.run(config, rows=prompts, functions=[short])
    bestofn.run(sampling(tmp_path / "whole.jsonl"), rows=prompts, functions=[short])
    assert (tmp_path / "best.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_prompts_on_which_the_reward_fails_are_left_out_if_that_is_asked_for(tmp_path):
    def picky(prompts, responses, **columns):
        if prompts[0] == "c":
            raise ValueError("no")
        return short(prompts, responses)

    config = sampling(tmp_path / "best.jsonl", batch_size=6, reward__on_failure="skip", reward__retries=0)
    summary = bestofn.run(config, rows=[{"prompt": p} for p in "bcd"], functions=[picky])
    assert summary["prompts"] == 2 and [row["prompt"] for row in rows_in(tmp_path / "best.jsonl")] == ["b", "d"]


def test_a_best_of_n_without_a_reward_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing says which response is best; give reward\.model, reward\.judge or"):
        bestofn.run(sampling(tmp_path / "best.jsonl"), rows=TOY_ROWS["rows"])


def rejecting(path, **changes):
    config = RejectionArgs(
        model=ModelConfig(path=TOY),
        data=DataConfig(batch_size=8, max_prompt_length=2, max_length=10, eval_fraction=0.3),
        sampling=SAMPLING,
        rejection=RejectionConfig(rounds=2, num_samples=12, sample_batch_size=96),
        sft=SFTConfig(steps=40, num_samples=0),
        optim=OptimConfig(learning_rate=2e-2),
        run=RunConfig(output_dir=str(path), progress=False, eval_every=0),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of two rounds without an end in between."""
    out = tmp_path_factory.mktemp("rejection") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for module in (sources, supervised):
            patch.setattr(module, "make_mesh", lambda config: make_mesh(config, devices=ONE))
        rejection.run(rejecting(out), rows=TOY_ROWS["rows"], functions=[doubtful], gold=short)
    return out


def test_rounds_raise_the_gold_reward_and_start_from_one_another(whole):
    out = whole
    summary = json.loads((out / "summary.json").read_text())
    first, second = (each["curve"][0] for each in summary["rounds"])
    rise, error = second["gold"]["mean"] - first["gold"]["mean"], np.hypot(first["gold"]["se"], second["gold"]["se"])
    assert rise > 2 * error
    for number, each in enumerate(summary["rounds"]):
        texts = [row["response"].strip() for row in rows_in(out / f"round{number + 1}" / "best.jsonl")]
        assert each["best_empty"] == texts.count("") and each["kept"] == len(texts) - texts.count("")
    assert any(each["best_empty"] for each in summary["rounds"])
    lines = rows_in(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert (lines[1]["rollout/reward"], lines[1]["rollout/gold"]) == (second["proxy"]["mean"], second["gold"]["mean"])
    last = (out / "round2" / "sft" / "model" / "model.safetensors").read_bytes()
    assert (out / "model" / "model.safetensors").read_bytes() == last
    assert last != (out / "round1" / "sft" / "model" / "model.safetensors").read_bytes()
    assert rejection.run(rejecting(out), rows=TOY_ROWS["rows"], functions=[doubtful], gold=short) == summary


class Killed(BaseException):
    """Stands in for kill -9 where the process must live on."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["bestofn", "sft"])
def test_rounds_that_were_killed_go_on_to_the_same_bits(tmp_path, whole, monkeypatch, stage):
    """In the second round, before its samples or after them: what is finished is not done again."""
    run = lambda: rejection.run(  # noqa: E731
        rejecting(tmp_path / "run"), rows=TOY_ROWS["rows"], functions=[doubtful], gold=short
    )
    module = {"bestofn": bestofn, "sft": sft}[stage]
    own, calls = module.run, []

    def dies(config, **kwargs):
        calls.append(config)
        if len(calls) == 2:
            raise Killed
        return own(config, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "run", dies)
        run()
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(
            bestofn, "run", lambda config, own=bestofn.run, **kwargs: again.append(1) or own(config, **kwargs)
        )
        run()
    assert len(again) == (stage == "bestofn")
    one, other = (path / "model" / "model.safetensors" for path in (whole, tmp_path / "run"))
    assert one.read_bytes() == other.read_bytes()


def test_prompts_are_read_by_the_field_map_and_samples_as_they_are(tmp_path, one_device, monkeypatch):
    """And it is the runs within that are traced."""
    trained, traced = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: traced.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)

    def run_sft(config, rows, eval_rows):
        assert not traced and [row["response"] for row in eval_rows] == [" c d"]
        with Run("sft", config, total=1):
            trained.append((config.data.fields, rows))
        Path(config.run.output_dir, "model").mkdir(parents=True)
        return {}

    monkeypatch.setattr(sft, "run", run_sft)
    rows = [{"question": row["prompt"], "id": i} for i, row in enumerate(TOY_ROWS["rows"][:4])]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"question": " a", "answer": " c d"}) + "\n")
    fields = {"data__fields": ["prompt={question}", "response={answer}"], "data__eval_path": str(held_out)}
    rows = [{**row, "answer": " d"} for row in rows]
    changes = {**fields, "data__batch_size": 4, "rejection__rounds": 1, "run__profile": [1, 1]}
    config = rejecting(tmp_path / "run", **changes)
    rejection.run(config, rows=rows, functions=[short])
    ((fields, chosen),) = trained
    assert traced == [tmp_path / "run" / "round1" / "sft" / "profile"]
    assert fields == [] and {row["prompt"] for row in chosen} <= {row["question"] for row in rows}
    with pytest.raises(UserError, match=r"^data\.mixture \['more\.jsonl'\] does nothing in rejection"):
        replace(config, data__mixture=["more.jsonl"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__batch_size": 41}, r"examples do not fill one batch of 41; set data\.batch_size to at most"),
        ({"data__eval_path": "nowhere.jsonl"}, r"nowhere\.jsonl"),
        ({"data__strict": True, "data__max_length": 6, "data__too_long": "drop"}, "max_length 6 is less than the 7 "),
        ({"data__max_length": 6, "data__too_long": "error"}, "max_length 6 is less than the 7 tokens"),
        ({"lora__rank": 2, "lora__targets": ["nothing"]}, r"lora\.targets names nothing, which this model lacks"),
        ({"sft__accumulate": 8, "data__batch_size": 0, "data__eval_fraction": 0.9}, "do not fill one batch of 8"),
    ],
)
def test_what_the_training_would_refuse_is_said_before_anything_is_sampled(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        rejection.run(rejecting(tmp_path / "run", **changes), rows=TOY_ROWS["rows"], functions=[short])
    assert not (tmp_path / "run").exists()


def test_a_run_of_rejection_is_a_command_and_its_options_are_checked():
    config = cli.parse("rejection", ["--rejection.rounds", "3", "--sft.epochs", "2", "--reward.functions", "[a:b]"])
    assert isinstance(config, RejectionArgs) and (config.rejection.rounds, config.sft.epochs) == (3, 2)
    with pytest.raises(UserError, match=r"rejection\.rounds is 0; make it at least 1"):
        cli.parse("rejection", ["--rejection.rounds", "0"])
    assert jax.tree.leaves(config.reward.functions) == ["a:b"]
