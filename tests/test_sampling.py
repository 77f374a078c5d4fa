"""Sampling: filters against sorting, draws against the exact law, rollouts against known chains and a real decoder."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.commands.plan.hlo import traffic
from rlhf_jax.config import ArchConfig, MeshConfig, SamplingConfig
from rlhf_jax.inference import engine
from rlhf_jax.inference.sampling import SamplingLaw, draw, draw_from_logits, keep_top_k, keep_top_p, sample
from rlhf_jax.inference.slots import choose_slots, take
from rlhf_jax.models import Model
from rlhf_jax.models.hf.layout import leaf_shapes, nested
from rlhf_jax.sharding import batch_sharding, make_mesh, put_batch, tree_shardings
from rlhf_jax.tokens import positions_from_mask

LOGITS = np.array([[1, 1.01, 1.001, 0, 0, 0, 2]], np.float32)
LARGEST = np.nextafter(np.float32(1), np.float32(0))  # below 1
KEY = jax.random.key(0)

top_k, top_p, draw = jax.jit(keep_top_k), jax.jit(keep_top_p), jax.jit(draw)


def law(**options):
    return SamplingLaw.from_config(SamplingConfig(**options))


def softmax(x):
    e = np.exp(np.float64(x) - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def law_of(logits, *, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities of one row of logits by sorting, in float64."""
    p = softmax(np.float64(logits) / temperature)
    order = np.sort(p)[::-1]
    if top_k:
        p = np.where(p >= order[min(top_k, len(p)) - 1], p, 0)
    p, order = p / p.sum(), np.sort(p)[::-1] / p.sum()
    if top_p < 1:
        p = np.where(p >= order[np.argmax(np.cumsum(order) >= top_p)], p, 0)
    return p / p.sum()


# ---- filters


@pytest.mark.parametrize(
    ("k", "kept"), [(1, {6}), (2, {6, 1}), (3, {6, 1, 2}), (4, {6, 1, 2, 0}), (5, set(range(7))), (7, set(range(7)))]
)
def test_top_k_known_answers(k, kept):
    assert set(np.flatnonzero(top_k(LOGITS, k)[0])) == kept


def test_top_k_of_zero_or_more_than_all_keeps_all():
    assert top_k(LOGITS, 0).all()
    assert top_k(LOGITS, 100).all()


@pytest.mark.parametrize(("p", "kept"), [(0.7, {6, 1, 2, 0}), (0.6, {6, 1, 2}), (0.5, {6, 1}), (0.0, {6})])
def test_top_p_known_answers(p, kept):
    assert set(np.flatnonzero(top_p(softmax(LOGITS).astype(np.float32), p)[0])) == kept


def test_top_p_of_one_keeps_all():
    assert top_p(softmax(100 * LOGITS).astype(np.float32), 1.0).all()


def test_top_k_equals_sorting():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 17)).astype(np.float32) * 10.0 ** rng.integers(-20, 20, (40, 1))
    rows = np.concatenate([rows, rng.integers(-2, 3, (40, 17))]).astype(np.float32)  # many ties
    rows[rng.random(rows.shape) < 0.1] = -np.inf
    rows[rng.random(rows.shape) < 0.1] = -0.0  # ties with 0.0
    for k in range(1, 20):
        threshold = np.sort(rows, axis=-1)[:, ::-1][:, min(k, 17) - 1]
        np.testing.assert_array_equal(top_k(rows, k), rows >= threshold[:, None], err_msg=str(k))


def test_top_p_equals_sorting():
    rng = np.random.default_rng(1)
    rows = rng.dirichlet(np.full(17, 0.3), 40)
    rows = np.concatenate([rows, rng.integers(0, 4, (40, 17)) + np.eye(17)[: 40 % 17].sum(0)]).astype(np.float32)
    rows[rng.random(rows.shape) < 0.2] = 0.0
    order = np.sort(rows.astype(np.float64), axis=-1)[:, ::-1]
    mass = np.cumsum(order, axis=-1) / order.sum(-1, keepdims=True)
    for p in (0.0, 0.0777, 0.3003, 0.5005, 0.9009, 0.9999):
        assert np.abs(mass - p).min() > 1e-6  # no row that rounding decides
        threshold = np.take_along_axis(order, np.argmax(mass >= p, axis=-1)[:, None], axis=-1)
        np.testing.assert_array_equal(top_p(rows, p), rows >= threshold, err_msg=str(p))


# ---- draws


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_draw_follows_the_exact_law(size):
    """Evenly spaced uniforms hit every entry in proportion to its probability, to within one at either end."""
    rng, num = np.random.default_rng(size), 5000
    probs = (rng.gamma(1.0, size=size) * (rng.random(size) < 0.7)).astype(np.float32)
    probs[size // 2] = 3.0
    uniforms = ((np.arange(num) + 0.5) / num).astype(np.float32)
    counts = np.bincount(draw(np.tile(probs, (num, 1)), uniforms), minlength=size)
    expected = num * probs.astype(np.float64) / probs.astype(np.float64).sum()
    assert np.abs(counts - expected).max() < 2.5
    assert not counts[probs == 0].any()


@pytest.mark.parametrize("size", [49, 16640, 17001])
def test_every_vocabulary_is_drawn_from_in_its_order(size):
    """Of whole numbers, whose sums are exact, with uniforms in the middle of an entry; 130 and 133 blocks of 128."""
    probs = np.random.default_rng(size).integers(0, 4, size).astype(np.float32)
    total, middle = int(probs.sum()), np.unique(np.linspace(0, probs.sum() - 1, 300).astype(int)) + 0.5
    drawn = draw(np.tile(probs, (len(middle), 1)), (middle / total).astype(np.float32))
    np.testing.assert_array_equal(drawn, np.searchsorted(np.cumsum(probs), middle))


@pytest.mark.parametrize("candidates", [0, 8])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9}], ids=["all", "filtered"])
@pytest.mark.parametrize("temperature", [1e-18, 1e-9, 1e-6, 1e-4, 0.003, 0.0099, 0.02, 1.0])
def test_no_temperature_makes_a_token_that_is_not_or_a_log_prob_that_is_not_its_own(temperature, filters, candidates):
    """Compiled, the largest of the logits over 1e-6 was nats away from itself: ids beyond the vocabulary, NaN."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 50)).astype(np.float32) * 4
    rows[:, 1] = rows.max(axis=1) - 2 * np.float32(temperature)  # as likely as exp(-2) says, where float32 has such
    drawn = jax.jit(partial(draw_from_logits, candidates=candidates * bool(filters), filtered=bool(filters)))
    tokens, (logprobs, _) = drawn(rows, rng.random(300).astype(np.float32), law(temperature=temperature, **filters))
    expected = [
        law_of(row, temperature=temperature, **filters)[token] for row, token in zip(rows, tokens, strict=True)
    ]
    np.testing.assert_allclose(logprobs, np.log(expected), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("uniform", [0.0, LARGEST])
def test_no_uniform_draws_an_impossible_entry(uniform):
    rng = np.random.default_rng(0)
    probs = rng.gamma(0.1, size=(500, 50)) * 10.0 ** rng.integers(-20, 20, (500, 1)) * (rng.random((500, 50)) < 0.1)
    probs[np.arange(500), rng.integers(0, 50, 500)] = 10.0 ** rng.integers(-15, 5, 500)
    probs = probs.astype(np.float32)
    drawn = np.asarray(draw(probs, np.full(500, uniform, np.float32)))
    assert (probs[np.arange(500), drawn] > 0).all()


@pytest.mark.parametrize("size", [2, 50, 1000])
@pytest.mark.parametrize("tiny", [1e-30, 1e-12, 3e-11])
def test_neither_the_least_uniform_nor_a_border_draws_an_entry_that_is_all_but_impossible(size, tiny):
    """Each is one of 2**23 numbers: what stands first in a vocabulary would be drawn once in 8 million tokens."""
    probs = np.full((3, size), tiny, np.float32)
    probs[:, size - 1] = 1.0
    np.testing.assert_array_equal(draw(probs, np.array([0.0, 2.0**-23, 0.5], np.float32)), size - 1)
    blocks = np.array([[0.5, 0, tiny, 0.25, tiny, 0, 0.25]], np.float32)  # of two entries each
    drawn = [draw(blocks, np.array([u], np.float32)).item() for u in (0.0, 0.499, 0.5, 0.6, 0.75)]
    assert drawn == [0, 0, 3, 3, 6]


def test_the_only_possible_entry_is_drawn():
    uniforms = np.resize(np.array([0.0, 0.5, LARGEST], np.float32), 150)
    np.testing.assert_array_equal(
        draw(np.repeat(np.eye(50, dtype=np.float32), 3, axis=0), uniforms), np.arange(150) // 3
    )


@partial(jax.jit, static_argnames=("candidates", "filtered"))
def from_logits(logits, uniforms, law, *, candidates=0, filtered=True):
    rows = jnp.broadcast_to(logits[None], (uniforms.shape[0], logits.shape[0]))
    token, (logprob, _) = draw_from_logits(rows, uniforms, law, candidates=candidates, filtered=filtered)
    return token, logprob


THIRTEEN = np.random.default_rng(5).standard_normal(13).astype(np.float32)
THIRTEEN[9] = THIRTEEN[2] = 0.3  # a tie
FILTERS = [{"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.7, "temperature": 2.0}, {"temperature": 0.5}]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("candidates", [0, 12])
def test_tokens_and_logprobs_follow_the_law_on_both_paths(options, candidates):
    """Sorting candidates out first gives the law of the whole vocabulary, while they hold all that top-k keeps."""
    if candidates and "top_k" not in options:
        options = {**options, "top_k": 6}
    num = 4000
    uniforms = ((np.arange(num) + 0.5) / num).astype(np.float32)
    tokens, logprobs = map(np.asarray, from_logits(THIRTEEN, uniforms, law(**options), candidates=candidates))
    expected = law_of(THIRTEEN, **options)
    assert np.abs(np.bincount(tokens, minlength=13) - num * expected).max() < 2.5
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), atol=1e-5)


def test_unfiltered_path_follows_the_law():
    uniforms = ((np.arange(4000) + 0.5) / 4000).astype(np.float32)
    tokens, logprobs = map(np.asarray, from_logits(THIRTEEN, uniforms, law(temperature=0.5), filtered=False))
    expected = law_of(THIRTEEN, temperature=0.5)
    assert np.abs(np.bincount(tokens, minlength=13) - 4000 * expected).max() < 2.5
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), atol=1e-5)


@pytest.mark.parametrize("path", [{}, {"candidates": 12}, {"filtered": False}], ids=str)
def test_temperature_zero_is_greedy_and_not_turned_into_a_default(path):
    uniforms = np.linspace(0, LARGEST, 4000, dtype=np.float32)
    for logits in (THIRTEEN, np.minimum(THIRTEEN, 0.3)):  # the first of several largest
        tokens, logprobs = from_logits(logits, uniforms, law(temperature=0.0, top_k=4), **path)
        assert (np.asarray(tokens) == logits.argmax()).all()
        assert not np.asarray(logprobs).any()


def test_law_reaches_the_device_past_a_transfer_guard():
    with jax.transfer_guard("disallow"):
        found = law(temperature=0.5, top_k=3, top_p=0.9, min_new_tokens=2)
    found = jax.device_get(found)
    assert (found.temperature, found.top_k, found.top_p, found.min_new_tokens) == (0.5, 3, np.float32(0.9), 2)


# ---- rollouts of Markov chains


class Chain:
    """A policy whose next token depends on the last one only: params are logits [V, V]."""

    def __init__(self, size, on_decode=None):
        self.arch, self.on_decode = (
            SimpleNamespace(vocab_size=size, num_layers=1, expert_layers=0, experts_per_token=0),
            on_decode,
        )

    def decoding_params(self, params):
        return params

    def prefill(self, params, tokens, mask, positions):
        return params[tokens[:, -1]], [(jnp.zeros((len(tokens), 1, tokens.shape[1], 1)),)]

    def decode(self, params, token, position, sees, apart, shared, cache, index):
        if self.on_decode:
            jax.debug.callback(self.on_decode)
        return params[token], cache, None

    def pinned(self, cache):
        return cache


@partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids", "chunk"))
def chain(table, last, key, law, *, max_new_tokens, stop_ids=(), chunk=4):
    """A rollout after prompts of one token."""
    run = partial(sample, Chain(table.shape[0]), table, last[:, None], jnp.ones((last.shape[0], 1), bool), key, law)
    return run(max_new_tokens=max_new_tokens, stop_ids=stop_ids, chunk=chunk, filtered=False)


SUCCESSOR = (60 * np.roll(np.eye(8), 1, axis=1)).astype(np.float32)  # after i comes i + 1, after 7 comes 0
GREEDY = law(temperature=0.0)


def test_previous_plus_one_policy():
    prompt = np.array([[5, 0], [4, 3]])
    run = jax.jit(partial(sample, Chain(8), max_new_tokens=4, stop_ids=(), chunk=4))
    for temperature in (0.0, 1.0):
        rollout = run(SUCCESSOR, prompt, np.ones((2, 2), bool), KEY, law(temperature=temperature))
        sequence = np.concatenate([rollout.prompt, rollout.tokens], axis=1)
        np.testing.assert_array_equal(sequence, [[5, 0, 1, 2, 3, 4], [4, 3, 4, 5, 6, 7]])


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_a_row_ends_with_its_stop_token_at_every_chunk_size(chunk):
    """After 6 comes 7 at once; 2 with the last token; 1 would with the next, which a chunk of 4 computes."""
    last = np.array([6, 3, 2, 1, 0])
    rollout = chain(SUCCESSOR, last, KEY, GREEDY, max_new_tokens=5, stop_ids=(7,), chunk=chunk)
    lengths = np.array([1, 4, 5, 5, 5])
    np.testing.assert_array_equal(rollout.mask, np.arange(5) < lengths[:, None])
    np.testing.assert_array_equal(rollout.finished, [True, True, True, False, False])
    np.testing.assert_array_equal(rollout.tokens, np.where(rollout.mask, last[:, None] + 1 + np.arange(5), 0))


def test_the_first_of_several_stop_ids_ends_a_row_and_zero_is_one_like_the_others():
    rollout = chain(SUCCESSOR, np.array([0, 3, 5]), KEY, GREEDY, max_new_tokens=6, stop_ids=(3, 5, 0))
    tokens = np.where(rollout.mask, rollout.tokens, -1)
    np.testing.assert_array_equal(tokens, [[1, 2, 3, -1, -1, -1], [4, 5, -1, -1, -1, -1], [6, 7, 0, -1, -1, -1]])
    assert rollout.finished.all()


def test_without_stop_ids_every_row_runs_the_full_length():
    rollout = chain(SUCCESSOR, np.array([6, 0]), KEY, GREEDY, max_new_tokens=10)
    assert rollout.mask.all()
    assert not rollout.finished.any()


def test_no_stop_id_before_min_new_tokens():
    table = np.zeros((8, 8), np.float32)
    table[:, [2, 5]] = 30.0
    for number in (0, 3, 9):
        options = law(min_new_tokens=number)
        rollout = chain(table, np.zeros(6, int), KEY, options, max_new_tokens=6, stop_ids=(2, 5))
        np.testing.assert_array_equal(np.sum(rollout.mask, 1), min(number + 1, 6))
        assert rollout.finished.all() == (number < 6)
        others = np.asarray(rollout.logprobs)[:, :number]
        np.testing.assert_allclose(others, -np.log(6), rtol=1e-5)  # of the law without the two stop ids


def test_decoding_stops_at_the_end_of_the_chunk_in_which_the_last_row_ends():
    """From 5 the stop token 7 takes two tokens, from 4 three, from 0 seven; a chunk is two."""
    count = []
    model = Chain(8, lambda: count.append(1))
    run = jax.jit(partial(sample, model, max_new_tokens=10, stop_ids=(7,), chunk=2, filtered=False))
    for last, calls in [([5, 4], 4), ([6, 5], 2), ([5, 0], 8)]:
        count.clear()
        jax.block_until_ready(run(SUCCESSOR, np.array(last)[:, None], np.ones((2, 1), bool), KEY, GREEDY))
        jax.effects_barrier()
        assert len(count) == calls


FOUR = np.log(np.array([0.4, 0.3, 0.2, 0.1]))


def independent_draws(key, temperature):
    table = np.tile(FOUR, (4, 1)).astype(np.float32)
    return np.asarray(chain(table, np.zeros(32, int), key, law(temperature=temperature), max_new_tokens=64).tokens)


def test_successive_tokens_and_rows_are_independent_draws_of_the_law():
    tokens, p = independent_draws(KEY, 2.0), softmax(FOUR / 2)
    for counts, expected in [
        (np.bincount(tokens.ravel(), minlength=4), 2048 * p),
        (np.bincount((4 * tokens[:, :-1:2] + tokens[:, 1::2]).ravel(), minlength=16), 1024 * np.outer(p, p).ravel()),
        (np.bincount((4 * tokens[::2] + tokens[1::2]).ravel(), minlength=16), 1024 * np.outer(p, p).ravel()),
    ]:
        chi_square, freedom = np.sum((counts - expected) ** 2 / expected), len(counts) - 1
        assert chi_square < {3: 21.1, 15: 44.3}[freedom]  # one chance in 10,000


def test_keys_and_rows_bring_different_noise_and_one_key_the_same():
    first, again, other = (independent_draws(jax.random.key(key), 2.0) for key in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len({tuple(row) for row in np.concatenate([first, other])}) == 64


def random_chain(chunk):
    table = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    return chain(table, np.zeros(16, int), KEY, law(), max_new_tokens=10, stop_ids=(7, 1), chunk=chunk)


def test_logprobs_are_zero_off_the_mask():
    rollout = random_chain(4)
    assert 0 < np.sum(rollout.mask) < rollout.mask.size
    np.testing.assert_array_equal(np.asarray(rollout.logprobs) != 0, rollout.mask)


def test_chunk_size_changes_nothing():
    jax.tree.map(np.testing.assert_array_equal, random_chain(4), random_chain(10))


# ---- rollouts of a decoder

ARCH = ArchConfig(
    vocab_size=20, width=12, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=6, ffn_width=20, max_positions=32
)
MODEL = Model(ARCH)
LENGTHS = np.array([6, 2, 3, 6, 1, 4, 5, 3])
PROMPT_MASK = np.arange(6) >= 6 - LENGTHS[:, None]
PROMPT = np.where(PROMPT_MASK, np.random.default_rng(0).integers(0, 20, (8, 6)), 0).astype(np.int32)
EOS = 2
PROMPT[[0, 5], [2, 3]] = EOS  # inside a prompt it ends nothing
OPTIONS = {"max_new_tokens": 7, "stop_ids": (EOS,), "chunk": 4}
sampler = jax.jit(partial(sample, MODEL, **OPTIONS))


def weights():
    rng = np.random.default_rng(3)
    shapes = leaf_shapes(ARCH, score_head=False)
    return nested({k: (0.6 * rng.standard_normal(s) + ("scale" in k)).astype(np.float32) for k, s in shapes.items()})


PARAMS = weights()


def rollout_of(options, prompt=PROMPT, mask=PROMPT_MASK):
    return sampler(PARAMS, prompt, mask, KEY, law(**options))


@jax.jit
def teacher_forced(rollout, temperature):
    """Logits [B, T, V] before each response token, and the tokens' log-probs, by the training forward pass."""
    tokens = jnp.concatenate([rollout.prompt, rollout.tokens], axis=1)
    mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
    hidden = MODEL.apply(PARAMS, tokens, positions_from_mask(mask), mask.astype(jnp.int32))[:, 5:-1]
    return MODEL.project(PARAMS, hidden), MODEL.logprobs(PARAMS, hidden, rollout.tokens, temperature)[0]


def test_the_ids_that_a_token_was_drawn_from_come_along_and_its_logprob_is_of_these():
    """Top-p within top-k, stop ids forbidden at first: by a forward pass over the same ids."""
    options = law(top_k=6, top_p=0.9, temperature=0.7, min_new_tokens=2)
    run = jax.jit(partial(sample, MODEL, **OPTIONS, candidates=6, carry=True))
    rollout = run(PARAMS, PROMPT, PROMPT_MASK, KEY, options)
    kept, mask = np.asarray(rollout.kept), np.asarray(rollout.mask)
    assert kept.shape == (*mask.shape, 6) and (kept[~mask] == -1).all() and not (kept[:, :2] == EOS).any()
    assert ((kept == np.asarray(rollout.tokens)[..., None]).sum(-1) == 1)[mask].all()
    counts = (kept >= 0).sum(-1)[mask]
    assert counts.min() < counts.max() <= 6

    @jax.jit
    def forward(rollout):
        tokens = jnp.concatenate([rollout.prompt, rollout.tokens], axis=1)
        real = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
        hidden = MODEL.apply(PARAMS, tokens, positions_from_mask(real), real.astype(jnp.int32))[:, 5:-1]
        return MODEL.logprobs(PARAMS, hidden, rollout.tokens, 0.7, needed=rollout.mask, kept=rollout.kept)[0]

    np.testing.assert_allclose(forward(rollout), rollout.logprobs, atol=2e-5)


def test_rows_that_are_given_are_followed():
    rollout = rollout_of({})
    followed = sampler(PARAMS, PROMPT, PROMPT_MASK, KEY, law(), None, rollout.tokens)
    jax.tree.map(np.testing.assert_array_equal, followed, rollout)


def test_the_decoder_ends_some_rows_early():
    """What the laws below rest on."""
    mask = np.asarray(rollout_of({}).mask)
    assert mask.sum(1).min() < mask.sum(1).max()
    assert len({tuple(row) for row in np.asarray(rollout_of({}).tokens)}) == 8


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_logprobs_equal_teacher_forced_ones(temperature):
    rollout = rollout_of({"temperature": temperature})
    expected = teacher_forced(rollout, temperature)[1]
    np.testing.assert_allclose(rollout.logprobs, np.where(rollout.mask, expected, 0), atol=1e-5)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6, "temperature": 2.0}, {"top_k": 5, "top_p": 0.5}])
def test_filtered_logprobs_are_of_the_filtered_law(options):
    rollout = rollout_of(options)
    logits, tokens = np.asarray(teacher_forced(rollout, 1.0)[0]), np.asarray(rollout.tokens)
    for b, t in zip(*np.nonzero(rollout.mask), strict=True):
        expected = np.log(law_of(logits[b, t], **options)[tokens[b, t]])
        np.testing.assert_allclose(rollout.logprobs[b, t], expected, atol=2e-5)


def test_greedy_tokens_are_the_teacher_forced_argmax():
    rollout = rollout_of({"temperature": 0.0})
    logits, _ = teacher_forced(rollout, 1.0)
    np.testing.assert_array_equal(rollout.tokens, np.where(rollout.mask, np.argmax(logits, -1), 0))


def test_changing_the_law_compiles_nothing():
    first, compiled = rollout_of({}), sampler._cache_size()
    laws = {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.5}, {"top_k": 2}, {"min_new_tokens": 5}
    rollouts = [first, *map(rollout_of, laws)]
    assert sampler._cache_size() == compiled
    assert len({np.asarray(rollout.tokens).tobytes() for rollout in rollouts}) == 5


def test_prompts_padded_with_the_stop_id_work():
    """GPT-2 and Llama have no other: what is padding is said by the mask."""
    rollout = rollout_of({}, prompt=np.where(PROMPT_MASK, PROMPT, EOS))
    for name in ("tokens", "mask", "logprobs", "finished"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(rollout_of({}), name))


@pytest.fixture
def narrow(monkeypatch):
    """Caches are read in parts of two columns and four, of eight."""
    monkeypatch.setattr(engine, "LEAST", 2)


# The filters are on above and off below: they do not matter where they keep everything.
unfiltered = partial(sample, MODEL, **OPTIONS, filtered=False)


def test_left_padding_changes_no_sampled_token():
    more = ((0, 0), (3, 0))
    prompt, mask = np.pad(PROMPT, more, constant_values=7), np.pad(PROMPT_MASK, more)
    rollout = jax.jit(unfiltered)(PARAMS, prompt, mask, KEY, law())
    np.testing.assert_array_equal(rollout.tokens, rollout_of({}).tokens)
    np.testing.assert_allclose(rollout.logprobs, rollout_of({}).logprobs, atol=1e-5)


def token_by_token(samples):
    """Tokens, mask and log-probs [B, T] drawn with the full forward pass of every row at every token."""
    prompt, prompt_mask = (np.repeat(x, samples, axis=0) for x in (PROMPT, PROMPT_MASK))
    uniforms, num = jax.random.uniform(KEY, (len(prompt), 7)), len(prompt)
    tokens, mask, logprobs = (np.zeros((num, 7), kind) for kind in (np.int32, bool, np.float32))
    done = np.zeros(num, bool)

    @jax.jit
    def one(tokens, mask, t, uniform):
        ids, real = jnp.concatenate([prompt, tokens], axis=1), jnp.concatenate([prompt_mask, mask], axis=1)
        hidden = MODEL.apply(PARAMS, ids, positions_from_mask(real), real.astype(jnp.int32))
        logits = MODEL.project(PARAMS, jax.lax.dynamic_slice_in_dim(hidden, 5 + t, 1, axis=1))[:, 0]
        return draw_from_logits(logits, uniform, law(), candidates=0, filtered=False)

    for t in range(7):
        token, (logprob, _) = one(tokens, mask, t, uniforms[:, t])
        tokens[:, t], logprobs[:, t] = np.where(done, 0, token), np.where(done, 0, logprob)
        mask[:, t], done = ~done, done | (np.asarray(token) == EOS)
    return tokens, mask, logprobs, done


@pytest.mark.parametrize(("samples", "slots", "microbatch"), [(1, 3, 0), (3, None, 0), (3, 2, 0), (3, 6, 12)], ids=str)
def test_any_slots_and_samples_of_a_prompt_give_the_tokens_of_one_row_after_another(
    samples, slots, microbatch, narrow, monkeypatch
):
    """Three slots get two prompts and more, groups of several two contexts, of which one may be another prompt's.

    Half of the prompts are not drawn: their rows are empty, and those of the others as if they were. The longest come
    first, so that those of up to three tokens are prefilled in three columns.
    """
    widths, prefill = list[tuple[int, int]](), engine.Engine.prefill

    def watched(self, index, width):
        longest = take(self.masks, index[:, :1]).sum()
        jax.debug.callback(lambda longest: widths.append((int(longest), width)), longest)
        return prefill(self, index, width)

    monkeypatch.setattr(engine.Engine, "prefill", watched)
    options = {"samples": samples, "slots": slots, "microbatch": microbatch, "chunk": 2}
    run = jax.jit(partial(unfiltered, **options))
    *expected, finished = token_by_token(samples)
    for active in (np.ones(8, bool), np.arange(8) % 3 != 1):
        rollout = run(PARAMS, PROMPT, PROMPT_MASK, KEY, law(), active)
        drawn = np.repeat(active, samples)
        tokens, mask, logprobs = (np.where(drawn[:, None], x, 0) for x in expected)
        np.testing.assert_array_equal(rollout.tokens, tokens)
        np.testing.assert_array_equal(rollout.mask, mask)
        np.testing.assert_allclose(rollout.logprobs, logprobs, atol=1e-5)
        np.testing.assert_array_equal(rollout.finished, finished & drawn)
        np.testing.assert_array_equal(rollout.prompt, np.repeat(PROMPT, samples, axis=0))
    assert run._cache_size() == 1
    jax.effects_barrier()
    assert all(width == (6 if longest > 3 else 3) for longest, width in widths)
    if slots == 3:
        assert {width for _, width in widths} == {3, 6}


def test_every_shard_of_a_mesh_refills_its_own_slots_and_rows_go_on_as_if_they_were_not_cut(narrow):
    """8 shards of 2 prompts and 2 samples of each, with 2 slots; what crosses them is whether all are done.

    Rows that are cut after two tokens go on behind what they have, with a window and with the ids that top-k kept.
    """
    arch = dataclasses.replace(ARCH, num_kv_heads=4, num_layers=2, sliding_window=3, window_layers=(1,))
    model, mesh = Model(arch), make_mesh(MeshConfig(data=8))
    params = jax.tree.map(lambda x: 6 * x, model.init(KEY))
    prompt, mask = (np.tile(x, (2, 1)) for x in (PROMPT, PROMPT_MASK))
    options = {**OPTIONS, "candidates": 6, "carry": True, "samples": 2, "chunk": 2}
    expected = jax.jit(partial(sample, model, **options))(params, prompt, mask, KEY, law(top_k=6))
    noise, rollout, lengths = jax.random.uniform(KEY, (32, 7)), jax.tree.map(jnp.zeros_like, expected), []
    with jax.set_mesh(mesh.grid):
        placed = jax.device_put(params, tree_shardings(mesh, params)), *put_batch(mesh, (prompt, mask))
        run = jax.jit(partial(sample, model, slots=16, budget=2, **options), out_shardings=batch_sharding(mesh))
        rollout, noise = put_batch(mesh, jax.device_get((rollout, noise)))
        arguments = [*placed, KEY, law(top_k=6), put_batch(mesh, np.ones(16, bool)), noise, rollout]
        refilled = run.lower(*arguments).compile()
        for _ in range(4):
            arguments[-1] = refilled(*arguments)
            lengths.append(np.asarray(arguments[-1].mask).sum(1))
    for name in ("tokens", "mask", "finished", "kept"):
        np.testing.assert_array_equal(getattr(arguments[-1], name), getattr(expected, name))
    np.testing.assert_allclose(arguments[-1].logprobs, expected.logprobs, atol=1e-4)
    full = np.asarray(expected.mask).sum(1)
    np.testing.assert_array_equal(lengths, [np.minimum(full, most) for most in (2, 4, 6, 7)])
    assert len(set(full)) > 2
    assert set(traffic(refilled.as_text()).collectives) <= {"all-reduce"}


def test_slots_are_chosen_from_the_bytes_of_weights_and_cache():
    """A position of the cache has 2 x 1 layer x 2 heads x 6 x 4 bytes = 96; a group of 4 in slots 2 prompts."""
    params = {"w": np.zeros(96 * 50 * 64, np.uint8)}  # 64 rows of 50 columns
    assert choose_slots(MODEL, params, 200, 1, 30, 20) == 64
    assert choose_slots(MODEL, params, 127, 1, 30, 20) == 127  # all, where that is less than twice as many
    assert choose_slots(MODEL, params, 66, 4, 30, 20) == 4 * (64 * 50 // (4 * 20 + 2 * 30)) == 88
    assert choose_slots(MODEL, params, 65, 4, 30, 20) == 260  # of several samples, less than three times as many
    assert choose_slots(MODEL, {}, 100, 3, 30, 20) == 18  # at least 16, in whole groups


@pytest.mark.parametrize("microbatch", [5, 16, 40])
def test_a_microbatch_that_does_not_divide_the_rows_is_as_many_as_do(microbatch):
    """4 prompts of 3 samples, as a mesh of 4 devices draws 6 of each of 2 (`generate.spread`)."""
    run = partial(sample, Chain(8), max_new_tokens=4, stop_ids=(7,), chunk=2, samples=3)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    inputs = table, np.arange(4)[:, None], np.ones((4, 1), bool), KEY, law()
    whole, parts = (jax.jit(partial(run, microbatch=n))(*inputs) for n in (0, microbatch))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_microbatches_change_nothing():
    rollout = jax.jit(partial(unfiltered, microbatch=2))(PARAMS, PROMPT, PROMPT_MASK, KEY, law())
    for name in ("prompt", "prompt_mask", "tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(rollout_of({}), name))


def test_a_mesh_changes_nothing():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.device_put(PARAMS, tree_shardings(mesh, PARAMS))
    batch = put_batch(mesh, {"prompt": PROMPT, "mask": PROMPT_MASK})
    with jax.set_mesh(mesh.grid):
        rollout = jax.jit(unfiltered)(params, batch["prompt"], batch["mask"], KEY, law())
    assert len(rollout.tokens.sharding.device_set) == 8
    np.testing.assert_array_equal(rollout.tokens, rollout_of({}).tokens)
    np.testing.assert_allclose(rollout.logprobs, rollout_of({}).logprobs, atol=1e-5)
