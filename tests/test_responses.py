"""Laws of packed responses: the same losses, gradients, scores and log-probs as rows that are padded one by one."""

from functools import partial

import jax
import numpy as np
import pytest
from tiny import ARCH, model_params

from rlhf_jax.config import DataConfig, MeshConfig
from rlhf_jax.data.collate import collate_preference, collate_ranking
from rlhf_jax.data.packing import Packing, cheapest_packing, fill, pack_responses, pack_texts, sequences_needed
from rlhf_jax.inference.scoring import Likelihood, example_of
from rlhf_jax.losses import dpo_loss, kwise_reward_loss, pairwise_reward_loss
from rlhf_jax.models import Model
from rlhf_jax.preference import objective as preference_objective
from rlhf_jax.preference import sequence_logprobs
from rlhf_jax.reward import KINDS
from rlhf_jax.reward import objective as reward_objective
from rlhf_jax.sharding import make_mesh, put_batch
from rlhf_jax.training import supervised
from rlhf_jax.training.responses import of_batch, response_scores
from rlhf_jax.training.step import accumulated_grads

LENGTH, ROWS, ONE = 24, 16, jax.devices()[:1]
POLICY, SCORER = Model(ARCH, logprob_chunk=16), Model(ARCH, score_head=True)


def ranked(seed: int, width: int) -> list[dict]:
    """Examples of up to `width` responses, prompts of 0 to 9 tokens, some of the longest that there may be."""
    rng = np.random.default_rng(seed)
    examples = []
    for b in range(ROWS):
        prompt = rng.integers(2, 20, 0 if b == 0 else rng.integers(1, 10))
        count = width if width == 2 or b == 1 else rng.integers(2, width + 1)
        longest = LENGTH - len(prompt) if b in (2, 3) else 8
        answers = [rng.integers(2, 20, rng.integers(1, longest + 1)) for _ in range(count)]
        examples.append({
            "prompt_length": len(prompt), "responses": [np.append(prompt, a).astype(np.int32) for a in answers],
            "ranks": rng.integers(0, 3, count), "label": float(rng.random() < 0.8), "margin": 0.1 * b,
            "weight": float(b != 5), "ref_logprobs": rng.normal(size=count) - 9,
        })  # fmt: skip
    return [{**x, "chosen": x["responses"][0], "rejected": x["responses"][1]} for x in examples]


def batch_of(kind: str) -> dict:
    if kind == "pairs":
        return collate_preference(ranked(0, 2), length=LENGTH)
    return collate_ranking(ranked(1, int(kind)), length=LENGTH, width=int(kind))


def packing_of(
    batch: dict, *, ways: int = 1, shared: bool = True, tokens: int = 3 * LENGTH, times: int = 1
) -> Packing:
    rows, width, length = batch["tokens"].shape
    needed, most = -(-width // times), rows * width
    return Packing.of(rows, needed, times * length, tokens=tokens, most=most, ways=ways, shared=shared)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["pairs", "4", "9"])
def test_every_token_of_every_response_has_one_column(kind, shared):
    batch = batch_of(kind)
    packed = pack_responses(batch, packing_of(batch, shared=shared))["packed"]
    rows, width, _ = batch["tokens"].shape
    for r, (ids, real) in enumerate(
        zip(*(batch[n].reshape(-1, LENGTH) for n in ("tokens", "segment_ids")), strict=True)
    ):
        size, prompt = int(real.sum()), int(batch["prompt_lengths"][r // width])
        at = packed.row == r
        first = max(prompt - 1, 0)  # a response begins with its own copy of the last token of its prompt
        assert packed.tokens[at].tolist() == ids[first:size].tolist()
        assert packed.positions[at].tolist() == list(range(first, size))
        assert packed.place[at].tolist() == [p - prompt + 1 for p in range(first, size)]
        assert packed.ends[at].tolist() == [False] * (size - first - 1) + [True] * (size > 0)
    # All responses of an example lie in one microbatch; microbatches fill up from the first.
    microbatches = packed.row.swapaxes(0, 1)
    held = [set((x[x < packed.num_rows] // width).tolist()) for x in microbatches]
    assert sum(map(len, held)) == rows and set.union(*held) == set(range(rows))
    assert [bool(x) for x in held] == sorted((bool(x) for x in held), reverse=True)
    columns = int((packed.segment_ids > 0).sum())
    real, found = int(batch["segment_ids"].sum()), (batch["lengths"] > 0).sum(axis=1)
    saved = ((found - 1) * np.maximum(batch["prompt_lengths"] - 1, 0)).sum()  # where all fit into one sequence
    assert real - saved <= columns < real if shared else columns == real
    if shared and kind == "pairs":
        assert columns < real - 0.5 * saved


def losses(kind: str):
    """(loss function, parameters, what a network says) of a reward model and of a policy."""
    if kind == "pairs":
        reward, inputs = partial(pairwise_reward_loss, center_coef=0.1), KINDS["pairs"].inputs
        dpo = partial(dpo_loss, beta=0.3, label_smoothing=0.1)
        policy = preference_objective(POLICY, dpo, sft_coef=0.5)
    else:
        reward, inputs = partial(kwise_reward_loss, center_coef=0.1), KINDS["rankings"].inputs
        policy = None
    return reward_objective(SCORER, reward, inputs), policy


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["pairs", "9"])
def test_losses_gradients_scores_and_logprobs_are_those_of_padded_rows(kind, shared):
    """Sums run in another order: 2e-6 of scores and log-probs, 1e-5 of gradients. Rankings in longer sequences."""
    batch, key = batch_of(kind), jax.random.key(0)
    packed = pack_responses(batch, packing_of(batch, shared=shared, times=1 if kind == "pairs" else 3))
    assert 1 < int(packed["packed"].used) < packed["packed"].tokens.shape[1]
    for loss_fn, model, says in zip(losses(kind), (SCORER, POLICY), (response_scores, sequence_logprobs), strict=True):
        if loss_fn is None:
            continue
        params = model_params(model, 1)
        said = [jax.jit(partial(of_batch, says, model))(params, x) for x in (batch, packed)]
        np.testing.assert_allclose(said[1], said[0], atol=2e-5, rtol=2e-6)
        step = jax.jit(partial(accumulated_grads, loss_fn, num=1))
        for found, expected in zip(*(jax.tree.leaves(step(params, x, key)) for x in (packed, batch)), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_one_compilation_for_any_lengths():
    step = jax.jit(partial(accumulated_grads, losses("pairs")[0], num=1))
    params, used = model_params(SCORER, 1), set()
    for seed in range(3):
        batch = collate_preference(ranked(seed, 2), length=LENGTH)
        packed = pack_responses(batch, packing_of(batch))
        used.add(int(packed["packed"].used))
        step(params, packed, jax.random.key(0))
    assert step._cache_size() == 1 and len(used) > 1


def test_on_a_mesh_the_gradients_are_the_same():
    batch = batch_of("pairs")
    loss_fn, params = losses("pairs")[1], model_params(POLICY, 1)
    step = partial(accumulated_grads, loss_fn, num=1)
    expected = jax.jit(step)(params, batch, jax.random.key(0))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    packed = pack_responses(batch, packing_of(batch, ways=4, tokens=LENGTH))
    with jax.set_mesh(mesh.grid):
        found = jax.jit(step)(params, put_batch(mesh, packed), jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


def test_any_lengths_fit_into_the_microbatches_there_are():
    """The worst that first fit may meet: responses that fill sequences alone, an uneven number of them."""
    for width, tokens, most in ((2, 1, 3), (9, 5 * LENGTH, 32), (3, 4 * LENGTH, 7)):
        full = [np.full(LENGTH, 3, np.int32)] * width
        examples = [{"prompt_length": 2, "responses": full, "ranks": np.arange(width)} for _ in range(7)]
        batch = collate_ranking(examples, length=LENGTH, width=width)
        for times in (1, 2):
            needed = -(-width // times)
            packing = Packing.of(7, needed, times * LENGTH, tokens=tokens, most=most, ways=1, shared=False)
            packed = pack_responses(batch, packing)
            assert len(set(packed["packed"].row.reshape(-1).tolist()) - {7 * width}) == 7 * width
            assert fill([packed], LENGTH)[1] == 1 <= fill([packed], LENGTH)[0]


@pytest.mark.parametrize(("tokens", "width", "times"), [(9 * LENGTH, 4096, 2), (9 * LENGTH, 1, 1), (LENGTH, 4096, 1)])
def test_sequences_are_for_as_many_rows_as_cost_least(tokens, width, times):
    """Responses of more than half a sequence; a network whose attention is cheap, one whose is not, and no room."""
    answers = [np.full(LENGTH // 2 + 1 + i % 4, 3, np.int32) for i in range(3 * ROWS)]
    examples = [{"prompt_length": 1, "responses": answers[3 * i : 3 * i + 3], "ranks": [0, 1, 2]} for i in range(ROWS)]
    data = DataConfig(batch_size=ROWS, max_length=LENGTH, microbatch_tokens=tokens)
    of = partial(supervised.packing_of, data, (ROWS, 3, LENGTH), 1, make_mesh(MeshConfig(), devices=ONE))
    some = [collate_ranking(examples[i:] + examples[:i], length=LENGTH, width=3) for i in range(2)]
    pack, packed = cheapest_packing(pack_responses, of, some, some, times=tokens // LENGTH, width=width)
    assert {x["packed"].tokens.shape[-1] for x in (*packed, pack(some[0]))} == {times * LENGTH}
    share = np.mean([x["packed"].filled for x in packed])
    assert share > (0.85 if times > 1 else 0.5)


def test_examples_that_need_few_sequences_fit_into_microbatches_of_few():
    """Rankings of nine short responses behind one prompt need a few sequences, not nine, and always find them."""
    for shared in (True, False):
        batches = [collate_ranking(ranked(seed, 9)[4:], length=LENGTH, width=9) for seed in range(8)]
        needed = max(sequences_needed(batch, LENGTH, shared=shared) for batch in batches)
        packing = Packing.of(ROWS - 4, needed, LENGTH, tokens=1, most=9 * ROWS, ways=1, shared=shared)
        assert packing.sequences == needed <= 9 - shared
        for batch in batches:
            packed = pack_responses(batch, packing)["packed"]
            assert set(packed.row.reshape(-1).tolist()) >= set(np.flatnonzero(batch["lengths"]).tolist())
    with pytest.raises(ValueError, match="finds no room"):
        pack_responses(batches[0], Packing(1, 100, LENGTH, shared=False))


def test_texts_of_one_prompt_stand_behind_it_once_and_are_read_as_alone():
    rng, shared, other = np.random.default_rng(5), [3, 4, 5, 6], [7, 8]
    texts = [(shared if i % 3 else other, rng.integers(2, 20, 1 + i % 5).tolist()) for i in range(23)]
    examples = [example_of(prompt, answer) for prompt, answer in texts]
    views = pack_texts(examples, LENGTH, 2)
    assert all(view.tokens.shape == (2, LENGTH) for view in views)
    assert {r for view in views for r in view.row.reshape(-1).tolist()} == set(range(24))
    assert sum(int((view.segment_ids > 0).sum()) for view in views) < 0.75 * sum(len(x["tokens"]) for x in examples)
    params, mesh = model_params(POLICY, 1), make_mesh(MeshConfig(), devices=jax.devices()[:1])
    reader = Likelihood(POLICY, mesh, batch_size=2, multiple=LENGTH)
    together, alone = reader.targets(params, examples), [reader.targets(params, [x])[0] for x in examples]
    for found, expected, (_, answer) in zip(together, alone, texts, strict=True):
        assert len(found) == len(answer)
        np.testing.assert_allclose(found, expected, atol=1e-5)
