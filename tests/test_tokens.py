"""Positions, chunked log-probs, microbatches: equal to the plain way, and without its memory."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.tokens import (
    Blocks,
    from_microbatches,
    map_microbatches,
    positions_from_mask,
    to_microbatches,
    token_logprobs,
    token_weights,
)

B, T, V, D = 3, 13, 54, 4
RNG = np.random.default_rng(3)
HIDDEN = RNG.standard_normal((B, T, D)).astype(np.float32)
KERNEL = RNG.standard_normal((D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T))
WEIGHTS = RNG.standard_normal((2, B, T)).astype(np.float32)


ALL, SOME = np.ones((B, T), bool), np.random.default_rng(1).random((B, T)) < 0.4


def in_blocks(kernel):
    """Three blocks of 18 ids: 9 of the first half of the vocabulary and 9 of the second."""
    weights = jnp.moveaxis(kernel.reshape(D, 2, 3, 9), 2, 0).reshape(3, D, 18)
    return Blocks(weights, product, number=3, width=9)


def product(kernel, hidden):
    return jnp.einsum("btd,dv->btv", hidden, kernel, precision="highest")


@partial(jax.jit, static_argnames=("chunk", "shards", "cut"))
def logprobs(kernel, hidden, temperature, *, chunk, needed=ALL, shards=1, cut=False):
    """Log-probs, entropies, and the gradients by (kernel, hidden, temperature) of a weighted sum of both."""

    def loss(kernel, hidden, temperature):
        vocabulary = in_blocks(kernel) if cut else Blocks(kernel[None], product)
        options = {"chunk": chunk, "needed": needed, "shards": shards, "with_entropy": True}
        outputs = token_logprobs(vocabulary, hidden, TARGETS, temperature, **options)
        return sum(jnp.sum(w * x) for w, x in zip(WEIGHTS, outputs, strict=True)), outputs

    grads, outputs = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(kernel, hidden, temperature)
    return *outputs, *grads


def reference(kernel, hidden, temperature):
    """The same sum in float64 numpy: log-probs, entropies, and the function that they add up to."""
    logits = np.einsum("btd,dv->btv", hidden, kernel) / temperature
    logits = logits - logits.max(-1, keepdims=True)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_softmax, TARGETS[..., None], -1)[..., 0]
    entropy = -(np.exp(log_softmax) * log_softmax).sum(-1)
    return chosen, entropy, (WEIGHTS[0] * chosen).sum() + (WEIGHTS[1] * entropy).sum()


def test_positions_are_the_exclusive_cumulative_sum_and_zero_on_padding():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], bool)
    with jax.numpy_dtype_promotion("strict"):
        positions = positions_from_mask(mask)
    assert positions.dtype == jnp.int32
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 2]]
    np.testing.assert_array_equal(positions, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("chunk", [5, B * T])
def test_logprobs_and_entropy_equal_log_softmax(chunk, temperature):
    chosen, entropy = logprobs(KERNEL, HIDDEN, temperature, chunk=chunk)[:2]
    expected = reference(KERNEL.astype(np.float64), HIDDEN.astype(np.float64), temperature)
    np.testing.assert_allclose(chosen, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [5, B * T])
def test_gradients_equal_finite_differences(chunk):
    arguments = [KERNEL.astype(np.float64), HIDDEN.astype(np.float64), np.float64(0.7)]
    grads = logprobs(KERNEL, HIDDEN, 0.7, chunk=chunk)[2:]
    for i, grad in enumerate(grads):
        direction = np.random.default_rng(i).standard_normal(np.shape(grad))
        ends = [
            reference(*(x + sign * 1e-5 * direction if j == i else x for j, x in enumerate(arguments)))[2]
            for sign in (1, -1)
        ]
        np.testing.assert_allclose(np.sum(direction * grad), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("chunk", "shards", "cut"),
    [(1, 1, False), (5, 1, False), (B * T - 1, 1, False), (5, B, False), (5, 1, True), (5, B, True)],
)
@pytest.mark.parametrize("needed", [ALL, SOME, ~ALL])
def test_chunks_shards_blocks_and_what_is_not_needed_change_nothing(chunk, shards, cut, needed):
    # Of one chunk all is projected, and what is not needed is masked.
    whole = logprobs(KERNEL, HIDDEN, 0.7, chunk=B * T, needed=needed)
    for x in whole[:2]:
        assert not np.asarray(x)[~needed].any()
    for x, expected in zip(
        logprobs(KERNEL, HIDDEN, 0.7, chunk=chunk, needed=needed, shards=shards, cut=cut), whole, strict=True
    ):
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("chunk", "cut"), [(5, False), (5, True), (B * T, False)])
def test_logprobs_of_kept_ids_are_of_these_alone_renormalised(chunk, cut):
    """Up to 4 ids a position, the target among them; values and gradients against a masked softmax of everything."""
    rng, kept = np.random.default_rng(2), np.full((B, T, 4), -1, np.int32)
    for row, t in np.ndindex(B, T):
        others = rng.permutation(np.delete(np.arange(V), TARGETS[row, t]))[: rng.integers(0, 4)]
        ids = rng.permutation([*others, TARGETS[row, t]])
        kept[row, t, : len(ids)] = ids
    inside = (kept[..., None] == np.arange(V)).any(2)

    def of_kept(kernel, hidden):
        vocabulary = in_blocks(kernel) if cut else Blocks(kernel[None], product)
        options = {"needed": SOME, "kept": kept, "with_entropy": True}
        return token_logprobs(vocabulary, hidden, TARGETS, 0.7, chunk=chunk, **options)

    def of_all(kernel, hidden):
        log_p = jax.nn.log_softmax(jnp.where(inside, hidden @ kernel / 0.7, -1e30))
        chosen = jnp.take_along_axis(log_p, TARGETS[..., None], axis=-1)[..., 0]
        return jnp.where(SOME, chosen, 0.0), jnp.where(SOME, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), 0.0)

    def summed(of, *arguments):
        outputs = of(*arguments)
        return sum(jnp.sum(w * x) for w, x in zip(WEIGHTS, outputs, strict=True)), outputs

    found, expected = (
        jax.jit(jax.grad(partial(summed, of), argnums=(0, 1), has_aux=True))(KERNEL, HIDDEN)
        for of in (of_kept, of_all)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_only_chunks_with_a_needed_position_are_projected():
    calls = []

    def project(kernel, hidden):
        jax.debug.callback(lambda x: calls.append(x.shape[1]), hidden)
        return hidden @ kernel

    vocabulary = Blocks(KERNEL[None], project)
    run = jax.jit(lambda some: token_logprobs(vocabulary, jnp.asarray(HIDDEN), TARGETS, 1.0, chunk=4, needed=some)[0])
    for count in (0, 1, 4, 5, B * T):
        calls.clear()
        jax.block_until_ready(run(np.random.default_rng(count).permutation(B * T).reshape(B, T) < count))
        jax.effects_barrier()
        assert calls == [4] * -(-count // 4)


def test_on_a_mesh_chunks_are_of_rows_that_a_device_has():
    """Nothing but whether a chunk is needed, and sums of gradients, goes from device to device."""
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    shapes = [jax.ShapeDtypeStruct((16, 32, *more), d, sharding=rows) for *more, d in ((D, float), (int,), (bool,))]

    def loss(hidden, targets, needed):
        project = lambda kernel, h: jax.lax.with_sharding_constraint(h @ kernel, rows)  # noqa: E731
        return token_logprobs(Blocks(KERNEL[None], project), hidden, targets, 1.0, chunk=16, needed=needed, shards=8)[
            0
        ].sum()

    text = jax.jit(jax.grad(loss), out_shardings=rows).lower(*shapes).compile().as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    assert {math.prod(map(int, dims.split(","))) for dims in re.findall(rf"f32\[([\d,]*{V})\]", text)} <= {
        D * V,
        16 * V,
    }


def test_entropy_of_equal_logits_is_ln_v_and_zero_when_not_asked_for():
    equal = partial(token_logprobs, Blocks(np.zeros((1, B, T, V)), lambda x, _: x), HIDDEN, TARGETS, 1.0, chunk=B * T)
    np.testing.assert_allclose(equal(with_entropy=True)[1], math.log(V), rtol=1e-6)
    np.testing.assert_allclose(equal()[0], -math.log(V), rtol=1e-6)
    assert not equal()[1].any()


def test_log_softmax_is_float32_of_bfloat16_logits():
    logits = (40 * RNG.standard_normal((B, T, V))).astype(jnp.bfloat16)
    chosen, entropy = token_logprobs(
        Blocks(logits[None], lambda x, _: x), HIDDEN, TARGETS, 1.0, chunk=B * T, with_entropy=True
    )
    assert chosen.dtype == entropy.dtype == jnp.float32
    expected = jax.nn.log_softmax(logits.astype(jnp.float32))
    expected = np.take_along_axis(expected, TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, expected, rtol=1e-5, atol=1.6e-5)  # the last bit of logits of 200


def largest_logits(chunk):
    """Most elements of a float32 buffer with a vocabulary axis in the compiled forward and backward pass."""
    text = logprobs.lower(KERNEL, HIDDEN, 1.0, chunk=chunk).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    return max(math.prod(shape) for shape in shapes if V in shape or any(size % V == 0 for size in shape))


def test_chunked_logprobs_hold_no_whole_logits_forward_or_backward():
    assert largest_logits(B * T) >= B * T * V
    assert largest_logits(5) <= 5 * V


def test_microbatches_round_trip():
    tree = {"a": jnp.arange(24).reshape(12, 2), "b": jnp.arange(12.0)}
    for num in (1, 3, 4, 12):
        jax.tree.map(np.testing.assert_array_equal, from_microbatches(to_microbatches(tree, num)), tree)


def test_row_i_is_in_microbatch_i_modulo_their_number():
    np.testing.assert_array_equal(to_microbatches(jnp.arange(6), 3), [[0, 3], [1, 4], [2, 5]])


def test_microbatches_of_a_sharded_batch_move_no_row():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.zeros((32, 5)), NamedSharding(mesh, P("data")))
    out = NamedSharding(mesh, P(None, "data"))
    text = jax.jit(partial(to_microbatches, num=4), out_shardings=out).lower(x).compile().as_text()
    assert not re.search("all-gather|all-to-all|collective-permute|all-reduce", text)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 6])
def test_mapping_over_microbatches_equals_the_whole(rows):
    x = {"a": jnp.asarray(HIDDEN.reshape(-1, D)[:6]), "b": jnp.arange(6)}

    def fn(x):
        return {"c": jnp.cumsum(x["a"], axis=1) * x["b"][:, None], "d": x["b"] ** 2}

    jax.tree.map(np.testing.assert_array_equal, map_microbatches(fn, x, rows), fn(x))


def test_microbatch_really_splits_the_rows():
    sizes = []
    map_microbatches(lambda x: sizes.append(x.shape[0]) or x, jnp.arange(6), 2)
    assert set(sizes) == {2}


def test_microbatch_that_does_not_divide_the_batch_is_an_error():
    with pytest.raises(ValueError, match="batch of 6 rows is not a multiple of the microbatch 4; choose a divisor"):
        map_microbatches(lambda x: x, jnp.arange(6), 4)


def test_tokens_promote_no_dtype():
    def all_of_them(hidden, mask, temperature):
        vocabulary = Blocks(KERNEL[None], product)
        logprobs, entropy = token_logprobs(vocabulary, hidden, TARGETS, temperature, chunk=5, with_entropy=True)
        return logprobs, entropy, [token_weights(mask, r) for r in ("token", "sequence", "fixed")]

    with jax.numpy_dtype_promotion("strict"):
        shapes = jax.eval_shape(all_of_them, HIDDEN, np.ones((B, T), bool), np.float32(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}
