"""Laws of comparisons as data: what rows become rankings, how raters are put together, pairs and K-wise batches."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_data import CHATML, LIMITS, USER, tiny, turn

from rlhf_jax import losses, reward
from rlhf_jax.config import RewardConfig
from rlhf_jax.data import ballots, schemas, sources
from rlhf_jax.data.collate import collate_preference, collate_ranking, eval_batches
from rlhf_jax.data.comparisons import preference_examples, ranking_examples
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import prompt_key, sft_examples
from rlhf_jax.data.gathering import gather
from rlhf_jax.data.rows import DroppedRow
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model

NAN = float("nan")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tiny())


def ranking(*ranks, texts="abcdefgh", **fields):
    items = [{"text": text, "rank": rank} for text, rank in zip(texts, ranks, strict=False)]
    return {"prompt": "a", "responses": items, **fields}


# --- rows


def test_labels_that_do_not_count_are_counted_where_they_say_something_else(tokenizer):
    up, down = {"ranks": [0, 1, 2]}, {"raters": [{"ranks": [2, 1, 0]}]}
    alike = [
        ranking(0, 1, 2), ranking(0, 1, 2, scores=[9, 5.5, -1]), ranking(0, 1, 2, scores=[None] * 3),
        ranking(0, 0, 2, **{"ranks": [1, 1, 3]}), ranking(None, None, None, scores=[3, 2, 1]),
    ]  # fmt: skip
    other = [
        ranking(0, 1, 2, scores=[1, 2, 3]), ranking(0, 0, 1, scores=[3, 2, 1]), ranking(0, 1, None, scores=[3, 2, 1]),
        ranking(2, 1, 0, **up), ranking(0, 1, 2, scores="high"), ranking(0, 1, 2, best=0), ranking(0, 1, 2, **down),
        ranking(0, 1, 2, raters=[{"best": 1, "ranks": [0, 1, 2]}]),
    ]  # fmt: skip
    for rows, count in ((alike, 0), (other, len(other)), (alike + other, len(other))):
        _, report = ranking_examples([{**row, "_where": "x"} for row in rows], tokenizer, LIMITS)
        assert report.remarks.get(ballots.OTHERS, 0) == count
    assert ballots.ranking_row(other[0]).ballots[0].ranks == [0, 1, 2]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"messages": USER}, "messages"),
        ({"prompt": "a", "id": 1}, "prompt-only"),
        ({"prompt": USER}, "conversational prompt-only"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"prompt": USER, "response": "b"}, "conversational prompt-completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": USER, "chosen": [], "rejected": []}, "conversational preference"),
        ({"chosen": "b", "rejected": "c"}, "preference with its prompt in both"),
        ({"chosen": USER, "rejected": USER}, "conversational preference with its prompt in both"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": ""}, "preference of HH transcripts"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired preference"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "stepwise supervision"),
        ({"prompt": "a", "responses": []}, "ranking"),
        ({"question": "a"}, "unknown"),
    ],
)
def test_every_dataset_type_has_its_name(row, kind):
    assert schemas.kind_of({**row, "_where": "f:1"}) == kind


def test_a_common_beginning_is_the_prompt_up_to_a_white_space():
    row = schemas.preference_row({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("The sky is", " blue.", " black.")
    with pytest.raises(DroppedRow) as caught:
        schemas.preference_row({"chosen": "The sky is", "rejected": "The sky is black."})
    assert caught.value.reason == "with an empty turn"
    with pytest.raises(UserError, match="share no beginning"):
        schemas.preference_row({"chosen": "bird", "rejected": "birch"})


def test_demonstrations_of_unpaired_preferences_are_the_good_ones(tokenizer):
    rows = [{"prompt": "a", "completion": text, "label": text == "b"} for text in "bcd"]
    examples, report = sft_examples(sources.rows_from(rows), tokenizer, LIMITS, loss_on="response")
    assert [tokenizer.decode(example["tokens"]) for example in examples] == ["a b"]
    assert report.dropped == {"labelled as bad": 2}
    assert report.kinds == {"unpaired preference": 3}


def test_strict_makes_a_drop_an_error(tokenizer):
    rows = sources.rows_from([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}])
    assert sft_examples(rows, tokenizer, LIMITS, loss_on="all")[1].kept == 1
    with pytest.raises(
        UserError, match=r'^row 1: "response" is empty; fix or remove the row \(data.strict is true\)$'
    ):
        sft_examples(rows, tokenizer, Limits(8, 16, "drop", strict=True), loss_on="all")


def test_a_response_that_was_cut_off_gets_no_stop_id(tokenizer):
    stop = tokenizer.eos_ids[0]
    whole, cut = ({"prompt": "a", "response": "b c", "finished": done} for done in (True, False))
    rows = sources.rows_from([whole, cut, {"prompt": "a", "response": "b c"}])
    examples, _ = sft_examples(rows, tokenizer, LIMITS, loss_on="response")
    assert [example["tokens"][-1] == stop for example in examples] == [True, False, True]
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "finished": [True, False]}
    [example], _ = preference_examples(sources.rows_from([pair]), tokenizer, LIMITS)
    assert (example["chosen"][-1] == stop, example["rejected"][-1] == stop) == (True, False)
    items = [{"text": "b", "rank": 0, "finished": False}, {"text": "c", "rank": 1}]
    [example], _ = ranking_examples([{"prompt": "a", "responses": items, "_where": "f:1"}], tokenizer, LIMITS)
    assert [ids[-1] == stop for ids in example["responses"]] == [False, True]
    with pytest.raises(UserError, match="\"finished\" is 'no'; give true or false"):
        schemas.sft_row({**whole, "finished": "no"})
    with pytest.raises(UserError, match=r'"finished" is True; give \[true or false of chosen'):
        schemas.preference_row({**pair, "finished": True})


def test_every_form_of_a_ranking_becomes_the_same():
    wanted = [("", [0.0, 2.0, 1.0])]
    prompt, texts = "a", ["b", "c", "d"]
    for row in [
        {"responses": [{"text": t, "rank": r} for t, r in zip(texts, [0, 2, 1], strict=True)]},
        {"responses": texts, "ranks": [0, 2, 1]},
        {"responses": texts, "raters": [{"ranks": [0, 2, 1]}]},
        {"responses": [[turn("assistant", t)] for t in texts], "ranks": [0, 2, 1]},
        {"responses": [turn("assistant", t) for t in texts], "ranks": [0, 2, 1]},
    ]:
        found = ballots.ranking_row({"prompt": prompt, **row})
        assert found.responses == texts and [(b.rater, b.ranks) for b in found.ballots] == wanted
    for row in [
        {"responses": texts, "scores": [0.5, -2, 0.1]},
        {"responses": [{"text": t, "score": s} for t, s in zip(texts, [0.5, -2, 0.1], strict=True)]},
    ]:
        [ballot] = ballots.ranking_row({"prompt": prompt, **row}).ballots
        assert np.argsort(ballot.ranks).tolist() == [0, 2, 1]
    chat = ballots.ranking_row({"prompt": USER, "responses": texts, "ranks": [0, None, 1], "rater": "ann"})
    assert chat.responses[0] == [turn("assistant", "b")]
    assert chat.ballots[0][0] == "ann"
    np.testing.assert_array_equal(chat.ballots[0][1], [0, NAN, 1])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"responses": "b"}, '"responses" is a str; give a list'),
        ({"responses": ["b", "c"]}, "nobody says which response is better; give each"),
        ({"responses": ["b", "c"], "ranks": [0]}, "ranks are 1 for 2 responses; give one"),
        ({"responses": ["b", "c"], "ranks": [0, "first"]}, "the rank 'first' is no finite number; number"),
        ({"responses": ["b", "c"], "ranks": [0, NAN]}, "the rank nan is no finite number; number"),
        ({"responses": ["b", "c"], "raters": ["ann"]}, '"raters" is a list; give a list of'),
        ({"responses": ["b", "c"], "raters": [{"rater": 3, "ranks": [0, 1]}]}, '"rater" is a int; give a name'),
        ({"responses": [{"answer": "b"}, "c"], "ranks": [0, 1]}, 'responses 0 has no "text" .found: answer.; add it'),
        ({"responses": ["b", "c"], "best": 2}, '"best" is 2; give the place of one of the 2 responses, from 0'),
        ({"responses": ["b", "c"], "best": True}, '"best" is True; give the place of one'),
        ({"completions": ["b"], "labels": [True]}, "stepwise supervision labels parts of one answer; give"),
        ({"chosen": "b", "rejected": "c", "votes": [10**39, 1, 0]}, "over 3.4e.38, the largest number of float32"),
    ],
)
def test_rows_that_are_no_ranking_say_so(row, expected):
    with pytest.raises(UserError, match=f"^f:7: .*{expected}"):
        ballots.ranking_row({"prompt": "a", **row, "_where": "f:7"})


def test_rankings_with_nothing_to_learn_are_counted(tokenizer):
    rows = [
        ranking(0, 1),
        ranking(1, 1, 1),
        {"prompt": "a", "responses": ["b", None, " "], "ranks": [0, 1, 2]},
        ranking(0, 1, texts="bb"),
        ranking(0, None),
    ]
    examples, report = ranking_examples(sources.rows_from(rows), tokenizer, LIMITS)
    assert len(examples) == 1
    assert report.dropped == {
        "with all responses tied": 2,
        "with fewer than two responses": 1,
        "with fewer than two ranked responses": 1,
    }


def test_equal_responses_are_one_and_unranked_ones_none(tokenizer):
    [example], _ = ranking_examples(sources.rows_from([ranking(0, 1, None, 4, texts="bcdb")]), tokenizer, LIMITS)
    assert [tokenizer.decode(ids) for ids in example["responses"]] == ["a b", "a c"]
    assert example["ranks"].tolist() == [2, 1]


# --- several raters


def test_votes_of_raters_are_shares_and_their_mean_the_order(tokenizer):
    raters = [
        {"rater": "x", "ranks": [0, 1, 2]},
        {"rater": "y", "ranks": [1, 0, 2]},
        {"rater": "z", "ranks": [0, 1, 1]},
    ]
    row = {"prompt": "a", "responses": ["b", "c", "d"], "raters": raters, "_where": "f:1"}
    [example], _ = ranking_examples([row], tokenizer, LIMITS)
    assert example["ranks"].tolist() == [0, 1, 2]
    assert example["labels"][0, 1] == pytest.approx(2 / 3)
    assert example["labels"][1, 2] == pytest.approx((1 + 1 + 0.5) / 3)
    pairs, _ = preference_examples([row], tokenizer, LIMITS)
    assert sorted(p["label"] for p in pairs) == pytest.approx([2 / 3, 5 / 6, 1])
    assert [p["weight"] for p in pairs] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("aggregate", ["bradley_terry", "plackett_luce", "crowd_bt"])
def test_rows_of_one_prompt_by_several_raters_become_one_ranking(tokenizer, aggregate):
    by = [("ann", [0, 1, 2]), ("bob", [0, 2, 1]), ("eve", [2, 1, 0])]
    rows = [{"prompt": "a", "responses": ["b", "c", "d"], "ranks": r, "rater": name} for name, r in by]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "e", "votes": [2, 0, 1]}]
    examples, report = ranking_examples(sources.rows_from(rows), tokenizer, LIMITS, aggregate=aggregate, prior=0.5)
    [example] = examples
    assert [tokenizer.decode(ids) for ids in example["responses"]] == ["a b", "a c", "a d", "a e"]
    assert example["ranks"].argmin() == 0
    np.testing.assert_allclose(example["labels"] + example["labels"].T, 1, rtol=1e-6)
    assert 0.5 < example["labels"][0, 1] < 1
    assert "4 rows joined to 1 prompts; 12 verdicts; 1 ties; 4 raters" in str(report)


def test_an_adversary_among_raters_is_named(tokenizer):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        truth = rng.permutation(4)
        for name in ("ann", "bob", "cy", "eve"):
            ranks = (3 - truth if name == "eve" else truth).tolist()
            rows.append({"prompt": f"a {i}", "responses": list("bcde"), "ranks": ranks, "rater": name})
    _, note = gather(sources.rows_from(rows), prompt_key, aggregate="crowd_bt", prior=0.5)
    assert "least reliable: eve 0.0" in note


def test_unpaired_answers_to_one_prompt_are_compared(tokenizer):
    labels = [("a", "b", True), ("a", "c", False), ("a", "d", False), ("b", "c", True)]
    rows = [{"prompt": p, "completion": c, "label": good} for p, c, good in labels]
    examples, report = preference_examples(sources.rows_from(rows), tokenizer, LIMITS)
    shown = {tuple(tokenizer.decode(e[name]) for name in ("chosen", "rejected")) for e in examples}
    assert shown == {("a b", "a c"), ("a b", "a d")}
    assert report.dropped == {"with fewer than two ranked responses": 1}
    assert "4 rows joined to 2 prompts" in str(report)


def test_a_tie_that_plackett_luce_does_not_take_says_so(tokenizer):
    tied = [{"prompt": "a", "responses": [f"b {c}" for c in "abcdefghijklm"], "ranks": [0] * 13}]
    with pytest.raises(UserError, match=r"a tie of 13 items .* aggregate with bradley_terry"):
        ranking_examples(sources.rows_from(tied), tokenizer, LIMITS, aggregate="plackett_luce")


# --- batches and losses


ROWS = [
    ranking(0, 1, 2, 3, texts="bcde"),
    ranking(1, 0, 1, texts="bcd"),
    ranking(2, 0, 0, 1, texts="gfed"),
    ranking(0, 1, texts="hd"),
]


def test_ranking_batches_pad_places_and_mask_them(tokenizer):
    examples, _ = ranking_examples(sources.rows_from(ROWS), tokenizer, LIMITS)
    batch = collate_ranking(examples, length=5, width=4, pad_id=tokenizer.pad_id)
    assert batch["mask"].sum(1).tolist() == [4, 3, 4, 2]
    assert batch["tokens"].shape == (4, 4, 5)
    assert batch["last"][3].tolist() == [2, 2, 0, 0]
    assert not batch["segment_ids"][3, 2:].any()
    assert batch["weights"].sum() == pytest.approx(1)
    assert batch["ranks"][1].tolist() == [1, 0, 1, 0]
    with pytest.raises(UserError, match="4 responses does not fit into 3"):
        collate_ranking(examples, length=5, width=3)


def test_rankings_and_their_pairs_have_equal_loss_and_gradient(tokenizer):
    """One forward pass per response against one per pair and side: the same loss, for the same parameters."""
    from tiny import ARCH

    model = Model(dataclasses.replace(ARCH, vocab_size=24), score_head=True)
    params = model.init(jax.random.key(0))
    rows = sources.rows_from(ROWS)
    found = {}
    for name, build, loss in [
        ("rankings", ranking_examples, losses.kwise_reward_loss),
        ("pairs", preference_examples, losses.pairwise_reward_loss),
    ]:
        examples, _ = build(rows, tokenizer, LIMITS)
        collate = partial(reward.KINDS[name].collate(examples), length=8, pad_id=0)
        batch = collate(examples)
        loss_fn = reward.objective(model, partial(loss, center_coef=0.01), reward.KINDS[name].inputs)
        (value, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, None)
        found[name] = value, metrics["reward_model/accuracy"], jax.tree.leaves(grads)
        assert batch["tokens"].shape[:2] == ((4, 4) if name == "rankings" else (6 + 2 + 5 + 1, 2))
    for a, b in zip(*[jax.tree.leaves(f) for f in found.values()], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_rankings_are_chosen_when_all_rows_are():
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert reward.kind_of_rows(RewardConfig(), ROWS) == "rankings"
    assert reward.kind_of_rows(RewardConfig(), [*ROWS, pair]) == "pairs"
    assert reward.kind_of_rows(RewardConfig(comparisons="pairs"), ROWS) == "pairs"
    assert reward.kind_of_rows(RewardConfig(comparisons="rankings"), [pair]) == "rankings"
    assert reward.kind_of_rows(RewardConfig(), [{"prompt": "a", "response": "b", "rating": 3}]) == "ratings"


def test_order_accuracy_is_a_mean_over_prompts(tokenizer):
    examples, _ = ranking_examples(sources.rows_from(ROWS), tokenizer, LIMITS)
    batches = eval_batches(examples, batch_size=3, collate=partial(collate_ranking, length=5, width=4))
    scores = np.array([[3, 2, 1, 0], [0, 1, 0, NAN], [5, 5, 5, 5], [0, 1, NAN, NAN]], float)
    found = reward.order_accuracy(scores, batches, [example["prompt_key"] for example in examples])
    assert (found["accuracy"], found["n"]) == (pytest.approx((1 + 1 + 0.5 + 0) / 4), 4)


def test_a_choice_compares_the_chosen_one_with_each_of_the_others_and_them_not(tokenizer):
    """Ziegler's rows: of one rater, and of two who chose differently; the loss is that of the choice."""
    rows = sources.rows_from([
        {"prompt": "a", "responses": ["b", "c", "d"], "best": 1},
        {"prompt": "b", "responses": ["e", "f"], "raters": [{"best": 0}, {"rater": "y", "ranks": [0, 1]}]},
    ])  # fmt: skip
    ranks, labels = ballots.ranking_row(rows[0]).consensus()
    assert ranks.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(labels[~np.eye(3, dtype=bool)], [0, NAN, 1, 1, NAN, 0])
    pairs, _ = preference_examples(rows, tokenizer, LIMITS)
    assert [tokenizer.decode(pair["chosen"][1:2]) for pair in pairs] == ["c", "c", "e"]
    examples, _ = ranking_examples(rows, tokenizer, LIMITS)
    batch = collate_ranking(examples, length=8, width=3)
    scores = jnp.asarray([[0.1, 0.7, -0.3], [0.2, -1.0, 0.0]])
    arrays = [jnp.asarray(batch[name]) for name in ("ranks", "mask", "weights")]
    value, _ = losses.best_of_n_reward_loss(scores, *arrays, center_coef=0.0)
    wanted = [np.log(np.exp([0.1, 0.7, -0.3]).sum()) - 0.7, np.log(np.exp([0.2, -1.0]).sum()) - 0.2]
    assert float(value) == pytest.approx(np.mean(wanted), rel=1e-5)


def test_preferences_are_rankings_of_two(tokenizer):
    rows = sources.rows_from(
        [{"prompt": "a", "chosen": "b", "rejected": "c", "votes": v} for v in ([3, 0, 0], [1, 2, 0], [1, 1, 1])]
    )
    examples, report = ranking_examples(rows, tokenizer, LIMITS)
    assert [example["ranks"].tolist() for example in examples] == [[0, 1], [1, 0]]
    assert report.dropped == {"with all responses tied": 1}
    pairs, _ = preference_examples(rows, tokenizer, LIMITS)
    assert [pair["label"] for pair in pairs] == pytest.approx([1, 2 / 3, 0.5])
    assert [tokenizer.decode(pair["chosen"][1:2]) for pair in pairs] == ["b", "c", "b"]  # the preferred one first
    batch = collate_preference(pairs, length=4)
    assert batch["weights"].tolist() == pytest.approx([1 / 3] * 3)


def test_chat_templates_close_each_response(tokenizer):
    chat = Tokenizer(tiny(CHATML))
    rows = sources.rows_from([{"prompt": USER, "responses": ["b", "c"], "ranks": [1, 0]}])
    [example], _ = ranking_examples(rows, chat, Limits(12, 16, "drop"))
    assert [ids[-1] for ids in example["responses"]] == [chat.end_id] * 2


@pytest.mark.parametrize("loss", ["kwise_reward_loss", "plackett_luce_reward_loss"])
def test_a_reward_model_learns_from_rankings(tmp_path, loss):
    """Three raters rank four walks by how many steps they have; one of them says the opposite."""
    from tiny import toy_directory

    from rlhf_jax.config import DataConfig, ModelConfig, OptimConfig, RewardArgs, RunConfig

    rows = []
    for first in "abcdefgh":
        for second in "ijkl":
            texts = [" ".join("mnopq"[: k + 1]) for k in range(4)]
            raters = [{"rater": name, "ranks": ranks} for name, ranks in [("x", [3, 2, 1, 0]), ("y", [3, 2, 1, 0])]]
            raters.append({"rater": "liar", "ranks": [0, 1, 2, 3]})
            rows.append({"prompt": f"{first} {second}", "responses": texts[: 3 + len(rows) % 2], "raters": raters})
            for rater in raters:
                rater["ranks"] = rater["ranks"][: 3 + (len(rows) - 1) % 2]
    config = RewardArgs(
        model=ModelConfig(path=str(toy_directory() / "policy")),
        data=DataConfig(batch_size=8, max_prompt_length=4, max_length=12, length_buckets=[8]),
        reward=RewardConfig(steps=30, aggregate="crowd_bt", kwise_loss=f"rlhf_jax.losses:{loss}"),
        optim=OptimConfig(learning_rate=1e-2),
        run=RunConfig(output_dir=str(tmp_path / "run"), progress=False, eval_every=0),
    )
    summary = reward.run(config, rows=rows[:24], eval_rows=rows[24:])
    assert summary["accuracy"] > 0.95 and summary["n"] == 8
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert f'"loss/{loss.removesuffix("_reward_loss")}"' in lines
    assert (tmp_path / "run" / "model" / "config.json").is_file()
