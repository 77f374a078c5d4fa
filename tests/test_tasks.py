"""Laws of the toys: their gold rewards, their rows, their tokenizer and their pictures."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runs import curves
from rlhf_jax.tasks import arithmetic, gsm8k, label_pairs, stories
from rlhf_jax.tasks import random_walks as walks
from rlhf_jax.tasks.verifiers import gsm8k as right

SEEDS = range(5)
LETTERS = "abcdefghijklmnopqrstu"


def best_walk(graph, start):
    """A shortest walk to the goal, in plain Python: breadth first over whole walks."""
    queue, seen = collections.deque([[start]]), {start}
    while queue:
        walk = queue.popleft()
        if walk[-1] == 0:
            return walk
        for node in range(len(graph.adjacency)):
            if graph.adjacency[walk[-1]][node] and node not in seen:
                seen.add(node)
                queue.append([*walk, node])
    return None


def text(walk):
    """A walk as its prompt and its response."""
    return LETTERS[walk[0]], " ".join(LETTERS[node] for node in walk[1:])


def score(graph, walk):
    """Optimality of one walk of node numbers."""
    prompt, response = text(walk)
    return walks.optimality(graph, [prompt], [response])[0]


def line_graph(num, max_length):
    """n-1 -> ... -> 1 -> 0 -> 1, and 1 <-> 2, so that walks can dawdle; node i is i + 1 nodes from the goal."""
    adjacency = np.zeros((num, num), dtype=bool)
    for node in range(1, num):
        adjacency[node, node - 1] = True
    adjacency[0, 1] = adjacency[1, 2] = True
    return walks.Graph(adjacency, max_length, np.arange(1, num + 1))


# --- random walks


@pytest.mark.parametrize("seed", SEEDS)
def test_graph_keeps_its_promises_and_knows_shortest_walks(seed):
    graph = walks.make_graph(seed)
    assert graph.adjacency.shape == (21, 21) and graph.adjacency.dtype == bool
    assert not graph.adjacency.diagonal().any()
    assert graph.adjacency.any(axis=1).all()
    assert graph.shortest.tolist() == [len(best_walk(graph, node)) for node in range(21)]
    assert graph.shortest.max() <= graph.max_length == 10


def test_edges_are_about_as_frequent_as_asked():
    share = np.mean([walks.make_graph(seed).adjacency.sum() / (21 * 20) for seed in range(40)])
    assert 0.09 < share < 0.14  # the conditions favour graphs with a few more edges


def test_impossible_graphs_are_refused():
    with pytest.raises(UserError, match="raise edge_probability"):
        walks.make_graph(0, edge_probability=0.0)
    with pytest.raises(UserError, match="between 2 and 26"):
        walks.make_graph(0, num_nodes=27)


def test_graphs_and_demonstrations_follow_their_seed():
    one, same, other = walks.make_graph(3), walks.make_graph(3), walks.make_graph(4)
    assert (one.adjacency == same.adjacency).all() and (one.adjacency != other.adjacency).any()
    assert walks.demonstrations(one, 50, 0) == walks.demonstrations(same, 50, 0)
    assert walks.demonstrations(one, 50, 0) != walks.demonstrations(one, 50, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_shortest_walks_score_one(seed):
    graph = walks.make_graph(seed)
    assert [score(graph, best_walk(graph, node)) for node in range(1, 21)] == [1.0] * 20


def test_optimality_is_the_formula_and_falls_with_length():
    graph = line_graph(5, 10)
    scores = [score(graph, [3, 2, *[1, 2] * detours, 1, 0]) for detours in range(4)]
    assert scores == pytest.approx([(10 - n) / (10 - 4) for n in (4, 6, 8, 10)])
    assert all(longer < shorter for shorter, longer in itertools.pairwise(scores))


def test_a_start_as_far_as_walks_may_be_scores_one_on_arrival():
    graph = line_graph(5, 5)
    assert score(graph, [4, 3, 2, 1, 0]) == 1.0
    assert score(graph, [4, 3, 2, 1]) == 0.0


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("d", ""),  # empty
        ("d", "c b"),  # never arrives
        ("d", "b a"),  # no such edge
        ("d", "c b a b"),  # goes on after the goal, along an edge
        ("d", "c b a b a"),  # goes on and arrives again
        ("d", "c b c b c b c b c b a"),  # 12 nodes
        ("d", "cba"),
        ("d", "c b a ."),
        ("d", "C B A"),
        ("d", "c b <eos> a"),
        ("d", "c b z a"),  # a letter of no node
        ("d", "once upon a time"),
        ("d", "d c b a"),  # repeats the start
        ("a", ""),  # starts at the goal
        ("a", "b a"),
        ("", "d c b a"),
        ("d c", "b a"),
        ("z", "a"),
    ],
)
def test_whatever_is_no_legal_arrival_scores_zero(prompt, response):
    graph = line_graph(5, 10)
    assert walks.optimality(graph, [prompt], [response]) == [0.0]
    assert walks.optimality(graph, ["d"], ["c b a"]) == [1.0]


def test_white_space_around_a_walk_does_not_matter():
    assert walks.optimality(line_graph(5, 10), ["d "], ["  c \n b a "]) == [1.0]


def test_optimality_agrees_with_a_search_over_all_walks():
    graph = line_graph(4, 5)
    paying = {
        walk: score(graph, walk)
        for n in range(1, 7)
        for walk in itertools.product(range(4), repeat=n)
        if score(graph, walk) > 0
    }
    # [1, 2, 1, 2, 1, 0] is too long, and [3, 2, 1, 2, 1, 0] too; five nodes of five score (5 - 5) = 0
    assert paying == {(1, 0): 1.0, (2, 1, 0): 1.0, (3, 2, 1, 0): 1.0, (1, 2, 1, 0): pytest.approx(1 / 3)}


@pytest.mark.parametrize("seed", SEEDS)
def test_demonstrations_are_legal_and_end_only_at_the_goal_or_the_limit(seed):
    graph = walks.make_graph(seed)
    rows = walks.demonstrations(graph, 300, seed)
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in walks.start_prompts()} == set(LETTERS[1:])
    for row in rows:
        walk = [LETTERS.index(letter) for letter in [row["prompt"], *row["response"].split(" ")]]
        assert all(graph.adjacency[here, there] for here, there in itertools.pairwise(walk))
        assert 0 not in walk[:-1] and (walk[-1] == 0 or len(walk) == 10) and len(walk) <= 10


def test_demonstrations_are_far_from_optimal(record_property):
    means = []
    for seed in SEEDS:
        rows = walks.demonstrations(walks.make_graph(seed), 1000, 0)
        graph = walks.make_graph(seed)
        scores = walks.optimality(graph, [row["prompt"] for row in rows], [row["response"] for row in rows])
        means.append(round(float(np.mean(scores)), 3))
    print("mean optimality of demonstrations, graph seeds 0..4:", means)
    record_property("mean_optimality", means)
    assert max(means) < 0.6 and np.mean(means) < 0.4 and min(means) > 0.03


# --- comparisons


def test_comparisons_err_as_often_as_asked():
    graph = walks.make_graph(0)
    first = walks.demonstrations(graph, 6000, 0)
    second = [first[index]["response"] for index in np.random.default_rng(1).permutation(6000)]
    columns = [row["prompt"] for row in first], [row["response"] for row in first], second
    for noise in (0.0, 0.1, 1.0):
        rows = walks.comparisons(graph, *columns, seed=0, noise=noise)
        prompts = [row["prompt"] for row in rows]
        chosen, rejected = (walks.optimality(graph, prompts, [r[k] for r in rows]) for k in ("chosen", "rejected"))
        wrong = np.mean(np.array(chosen) < np.array(rejected))
        assert len(rows) > 1000 and not np.any(np.array(chosen) == np.array(rejected))
        assert abs(wrong - noise) <= 4 * np.sqrt(noise * (1 - noise) / len(rows))


def test_label_pairs_skips_ties_and_repeats_and_follows_its_seed():
    columns = (["p"] * 4, ["a", "b", "c", "d"], ["A", "b", "C", "D"], [1, 1, 2, 0], [0, 0, 2, 1])
    assert label_pairs(*columns, seed=0, noise=0.0) == [
        {"prompt": "p", "chosen": "a", "rejected": "A"},
        {"prompt": "p", "chosen": "D", "rejected": "d"},
    ]
    many = (["p"] * 200, ["a"] * 200, ["b"] * 200, [1.0] * 200, [0.0] * 200)
    assert label_pairs(*many, seed=1, noise=0.5) == label_pairs(*many, seed=1, noise=0.5)
    assert label_pairs(*many, seed=1, noise=0.5) != label_pairs(*many, seed=2, noise=0.5)


def test_dropping_a_pair_leaves_the_other_labels():
    scores = np.zeros(200)
    full = label_pairs(["p"] * 200, ["a"] * 200, ["b"] * 200, scores + 1, scores, seed=3, noise=0.5)
    tied = label_pairs(["p"] * 200, ["a"] * 200, ["b"] * 200, scores + (np.arange(200) > 0), scores, seed=3, noise=0.5)
    assert tied == full[1:]


def test_label_pairs_refuses_ragged_columns_and_odd_noise():
    with pytest.raises(UserError, match=r"lengths \[1, 2, 1, 1, 1\]"):
        label_pairs(["p"], ["a", "b"], ["c"], [1], [0], seed=0, noise=0.1)
    with pytest.raises(UserError, match=r"noise 1\.5"):
        label_pairs(["p"], ["a"], ["c"], [1], [0], seed=0, noise=1.5)


# --- tokenizer


def test_tokenizer_round_trip(tmp_path):
    from transformers import AutoTokenizer

    walks.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 24 and tokenizer.bos_token is None
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    rows = walks.demonstrations(walks.make_graph(0), 100, 0)
    for row, special in itertools.product(rows, (False, True)):
        walk = f"{row['prompt']} {row['response']}"
        ids = tokenizer.encode(walk, add_special_tokens=special)
        assert ids == [3 + LETTERS.index(letter) for letter in walk.split(" ")]
        assert ids == [token for part in row.values() for token in tokenizer.encode(part)]
        assert tokenizer.decode(ids) == walk
        assert tokenizer.decode([*ids, 1, 0, 0], skip_special_tokens=True) == walk
    assert tokenizer.encode("f qa <eos> v") == [8, 2, 1, 2]
    assert tokenizer.decode([8, 1, 0]) == "f <eos> <pad>"
    assert set(tokenizer("f q")) == {"input_ids", "attention_mask"}


# --- stories


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("", 0.0),
        ("...!", 0.0),
        ("Tom was happy. He was not sad.", 0 / 2 + 0.07),
        ("Tom was happy. He had a nice hat", 2 / 2 + 0.08),
        ("HAPPY, happy!", 2 / 1 + 0.02),
        ("sad.", -1 + 0.01),
        ("They went home... They ate.", 0.05),
        ("happy " * 50, 3 + 0.5),
        ("sad " * 50, -3 + 0.5),
        ("word " * 100, 1.0),
        ("word " * 500, 1.0),
        ("Sue smiled.\n\nShe was scared! Was it dark?", (1 - 2) / 3 + 0.08),
    ],
)
def test_story_gold_by_hand(response, gold):
    assert stories.sentiment(["Once."], [response], other=[1]) == [pytest.approx(gold)]


def test_story_gold_can_be_hacked_by_length_and_ignores_the_prompt():
    plain, padded = "She was happy. He ran.", "She was happy and and and and. He ran and and and."
    assert stories.sentiment(["", ""], [padded, plain])[0] > stories.sentiment(["", ""], [padded, plain])[1]
    assert stories.sentiment(["so sad"], [plain]) == stories.sentiment(["so happy"], [plain])


def test_word_lists_are_disjoint_and_lower_case():
    assert not stories.POSITIVE & stories.NEGATIVE
    assert all(word.isascii() and word.isalpha() and word.islower() for word in stories.POSITIVE | stories.NEGATIVE)


def test_story_prompts_are_many_distinct_and_follow_their_seed():
    rows = stories.prompts(600, 0)
    texts = [row["prompt"] for row in rows]
    assert len(set(texts)) == 600 and all(prompt.endswith(".") and "{" not in prompt for prompt in texts)
    assert rows == stories.prompts(600, 0) != stories.prompts(600, 1)
    assert rows[:10] == stories.prompts(10, 0)
    total = sum(len(openings) for openings in stories._openings())
    assert len({row["prompt"] for row in stories.prompts(total, 0)}) == total
    with pytest.raises(UserError, match="ask for fewer"):
        stories.prompts(total + 1, 0)


def test_story_comparisons_prefer_the_happier_sample():
    prompts, a, b = ["p", "q"], ["She was sad.", "Fun!"], ["She was glad.", "Fun!"]
    rows = label_pairs(prompts, a, b, stories.sentiment(prompts, a), stories.sentiment(prompts, b), 0, 0.0)
    assert rows == [{"prompt": "p", "chosen": "She was glad.", "rejected": "She was sad."}]


# --- report


def test_text_table_lines_up():
    table = curves.text_table(["seed", "task", "gold"], [[0, "walks", 0.123456], [11, "stories", None]])
    assert table.splitlines() == [
        "seed  task       gold",
        "----  -------  ------",
        "   0  walks    0.1235",
        "  11  stories",
    ]
    with pytest.raises(UserError, match="row 0 has 1 cells for 2 headers"):
        curves.text_table(["a", "b"], [[1]])


def test_smoothing_keeps_straight_lines_and_damps_noise():
    line = np.linspace(0.0, 5.0, 100)
    np.testing.assert_allclose(curves.smooth(line), line, atol=1e-12)
    noise = np.random.default_rng(0).normal(size=240)
    assert curves.smooth(noise)[20:-20].std() < 0.4 * noise.std()


@pytest.mark.parametrize("gold", [True, False])
def test_learning_curves_are_a_picture(tmp_path, gold):
    history = [{"step": 0, "eval/loss": 1.0}]
    for step in range(30):
        line = {"step": step, "rollout/reward": step / 10, "rollout/kl": step / 5}
        history.append(line | ({"rollout/gold": -step / 10} if gold else {}))
    path = tmp_path / "new" / "curves.png"
    curves.learning_curves(path, history, "made up")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(path.read_bytes()[at : at + 4], "big") for at in (16, 20))
    assert width > 1000 and height > 400 and path.stat().st_size > 10_000


def drawn(gold):
    """The dots of the right panel, for rewards, KL and gold of 2, 3 and 5 times the step."""
    from matplotlib.figure import Figure

    lines = [{"step": s, "rollout/reward": 2.0 * s, "rollout/kl": 3.0 * s, "rollout/gold": 5.0 * s} for s in range(9)]
    figure = Figure()
    curves._draw_trade(figure, axes := figure.subplots(), lines, "rollout/gold" if gold else None)
    return axes.collections[0]


def test_right_panel_draws_gold_on_proxy_or_proxy_on_kl():
    steps = np.arange(9.0)
    np.testing.assert_array_equal(drawn(True).get_offsets(), np.stack([2 * steps, 5 * steps], 1))
    np.testing.assert_array_equal(drawn(True).get_array(), 3 * steps)
    np.testing.assert_array_equal(drawn(False).get_offsets(), np.stack([3 * steps, 2 * steps], 1))
    np.testing.assert_array_equal(drawn(False).get_array(), steps)


def test_learning_curves_need_a_rollout(tmp_path):
    with pytest.raises(UserError, match="rollout/reward"):
        curves.learning_curves(tmp_path / "x.png", [{"step": 0}], "empty")


def test_a_judge_of_stories_prefers_the_happier_and_of_equals_the_first():
    happy, sad = "Tom was happy.", "Tom was sad."
    assert stories.judge("", happy, sad) > 0.9 and stories.judge("", sad, happy) < 0.5
    assert 0.6 < stories.judge("", sad, sad) < 0.65


def test_small_sums_have_the_form_of_gsm8k_and_a_tokenizer_without_an_id_to_spare():
    rows, pairs, tokenizer = arithmetic.demonstrations(), arithmetic.preferences(), arithmetic.make_tokenizer()
    texts, answers = [row["response"] for row in rows], [row["answer"] for row in rows]
    assert len({row["prompt"][0]["content"] for row in rows}) == 25 and len(pairs) == 50
    assert right(texts, texts, answer=answers) == gsm8k.form(texts, texts) == [1.0] * 25
    assert len(tokenizer) == arithmetic.VOCABULARY  # a model with more would sample what is no text
    for pair in pairs:
        chosen, rejected = (pair[side][-1]["content"] for side in ("chosen", "rejected"))
        assert pair["chosen"][:-1] == pair["rejected"][:-1]
        answer = answers[[row["prompt"] for row in rows].index(pair["chosen"][:-1])]
        assert right(["", ""], [chosen, rejected], answer=[answer, answer]) == [1.0, 0.0]
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
