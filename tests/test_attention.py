"""The attention switch: every program against the plain one in float32, values and gradients."""

import contextlib
import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import ArchConfig, MeshConfig
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model
from rlhf_jax.models.attention import Branches, _block, make_attend, platform_attention
from rlhf_jax.models.blockwise import SIZE
from rlhf_jax.sharding import make_mesh
from rlhf_jax.tokens import positions_from_mask

ROWS, KV_HEADS, GROUPS, LENGTH, WIDTH = 2, 2, 2, 150, 16


def arrays(seed=0):
    """Queries, keys, values; ids of a left-padded row and of two packed documents with padding behind."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((ROWS, KV_HEADS, GROUPS, LENGTH, WIDTH)).astype(np.float32)
    k, v = rng.standard_normal((2, ROWS, KV_HEADS, LENGTH, WIDTH)).astype(np.float32)
    ids = np.ones((ROWS, LENGTH), np.int32)
    ids[0, :33] = 0
    ids[1, 70:] = 2
    ids[1, 140:] = 0
    return (q, k, v), ids


CASES = [
    *[("splash_interpret", *case) for case in itertools.product([0, 1, 40, 200], [0.0, 2.0], ["float32", "bfloat16"])],
    *[("blockwise", *case) for case in ((0, 0.0, "float32"), (40, 2.0, "float32"), (200, 0.0, "bfloat16"))],
]


@pytest.mark.parametrize(("kind", "window", "softcap", "dtype"), CASES)
def test_kernels_and_blocks_are_plain_attention_in_values_and_gradients(kind, window, softcap, dtype):
    bound = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    args, ids = arrays()
    if not softcap:
        args = (*args, np.linspace(-3, 3, KV_HEADS * GROUPS).reshape(KV_HEADS, GROUPS))  # sinks
    args = tuple(np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)) for x in args)  # the same numbers for both
    real = (ids > 0)[:, None, None, :, None]
    wanted_change = np.random.default_rng(1).standard_normal((ROWS, KV_HEADS, GROUPS, LENGTH, WIDTH))

    def loss(args, kind, dtype):
        attend = make_attend(kind, jnp.asarray(ids), window=window, scale=0.3, softcap=softcap, heads_over=None)
        out = attend(*(jnp.asarray(x, dtype) for x in args)).astype(jnp.float32)
        return jnp.sum(jnp.where(real, out * wanted_change, 0)), jnp.where(real, out, 0)

    (_, expected), expected_grads = jax.value_and_grad(loss, has_aux=True)(args, "plain", "float32")
    (_, found), grads = jax.value_and_grad(loss, has_aux=True)(args, kind, dtype)
    for got, wanted in zip((found, *grads), (expected, *expected_grads), strict=True):
        np.testing.assert_allclose(got, wanted, atol=bound * max(np.abs(wanted).max(), 1))


@pytest.mark.parametrize("attention", ["plain", "cudnn"])  # which is plain in float32
def test_responses_behind_one_prompt_are_what_they_are_alone(attention):
    """Windows, soft-caps and learned distances of MIXED: each of three branches equals prompt and branch alone."""
    model = dataclasses.replace(Model(MIXED), attention=attention)
    params, rng = model.init(jax.random.key(0)), np.random.default_rng(2)
    prompt, answers = rng.integers(0, 23, 9), [rng.integers(0, 23, n) for n in (5, 1, 12)]
    ids, at, branch = list(prompt), list(range(9)), [0] * 9
    for k, answer in enumerate(answers, 1):
        ids, at = ids + answer.tolist(), at + list(range(9, 9 + len(answer)))
        branch += [k] * len(answer)
    # Another text before it in the sequence, and padding behind.
    other = [3, 4, 5], [0, 1, 2], [1] * 3, [0] * 3
    tokens, positions, segments, branches = (
        jnp.asarray([[*first, *rest, 0, 0]], jnp.int32)
        for first, rest in zip(other, (ids, at, [2] * len(ids), branch), strict=True)
    )
    apply = jax.jit(model.apply)
    shared = apply(params, tokens, positions, segments, branches)[0]
    start = 3 + 9
    for answer in answers:
        row = jnp.asarray([[*prompt, *answer]], jnp.int32)
        own = apply(params, row, jnp.arange(row.shape[1], dtype=jnp.int32)[None], jnp.ones_like(row))[0]
        np.testing.assert_allclose(shared[start : start + len(answer)], own[9:], atol=1e-5)
        np.testing.assert_allclose(shared[3:12], own[:9], atol=1e-5)
        start += len(answer)


@pytest.mark.parametrize("kind", ["splash_interpret", "blockwise"])
@pytest.mark.parametrize(("window", "softcap", "mesh"), [(0, 0.0, None), (40, 2.0, MeshConfig(data=2, tensor=2))])
def test_kernels_and_blocks_with_branches_are_plain_attention_in_values_and_gradients(kind, window, softcap, mesh):
    args, segments = arrays()
    if mesh is not None:
        args = (*args, np.linspace(-3, 3, KV_HEADS * GROUPS).reshape(KV_HEADS, GROUPS).astype(np.float32))  # sinks
    branches, positions = np.zeros((2, *segments.shape), np.int32)
    for row, begin, ends in ((0, 60, (90, 150)), (1, 20, (30, 50, 70)), (1, 75, (100, 140))):
        first = 33 if row == 0 else 0 if begin == 20 else 70
        positions[row, first:begin] = np.arange(begin - first)
        for k, (start, end) in enumerate(zip((begin, *ends), ends, strict=False), 1):
            branches[row, start:end], positions[row, start:end] = k, begin - first + np.arange(end - start)
    real = (segments > 0)[:, None, None, :, None]
    wanted_change = np.random.default_rng(1).standard_normal((ROWS, KV_HEADS, GROUPS, LENGTH, WIDTH))
    read = jnp.asarray(segments), Branches(jnp.asarray(branches), jnp.asarray(positions))
    over = None if mesh is None else "tensor"

    def loss(args, kind):
        attend = make_attend(kind, *read, window=window, scale=0.3, softcap=softcap, heads_over=over)
        out = attend(*args)
        return jnp.sum(jnp.where(real, out * wanted_change, 0)), jnp.where(real, out, 0)

    both = functools.partial(jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1), args)
    (_, expected), expected_grads = both("plain")
    grid = contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh, jax.devices()[:4]).grid)
    with grid:
        (_, found), grads = both(kind)
    for got, wanted in zip((found, *grads), (expected, *expected_grads), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * max(np.abs(wanted).max(), 1))


@pytest.mark.parametrize("groups", [1, 4])
def test_the_kernel_is_given_the_mask_of_branches_once_for_all_query_heads(groups):
    """On TPU the kernel takes four bytes for each pair of columns, made and read in every layer."""
    segments = jnp.ones((1, 256), jnp.int32)
    read = segments, Branches(segments, jnp.arange(256, dtype=jnp.int32)[None])
    q, k = jnp.ones((1, KV_HEADS, groups, 256, WIDTH)), jnp.ones((1, KV_HEADS, 256, WIDTH))
    change = jax.grad(
        lambda *args: make_attend("splash", *read, window=0, scale=1.0, softcap=0.0, heads_over=None)(*args).sum()
    )
    sizes = [
        math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"bool\[([\d,]+)\]", str(jax.make_jaxpr(change)(q, k, k)))
    ]
    assert max(sizes) == 256 * 256


def test_blocks_of_the_kernel_are_large_also_where_the_columns_do_not_divide():
    """Of 2432 or 4480 columns, which are whole lanes, only blocks of 128 divide: 361 and 1225 steps."""
    wanted = {64: (128, 1), 150: (256, 1), 640: (384, 4), 1024: (512, 4), 2432: (512, 25), 4480: (512, 81)}
    assert {n: (_block(n), (-(-n // _block(n))) ** 2) for n in wanted} == wanted


MIXED = ArchConfig(
    vocab_size=23, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=20, max_positions=256,
    sliding_window=7, window_layers=(0, 2), attn_softcap=3.0, rope_local_theta=100.0, attn_sinks=True,
)  # fmt: skip


def test_blocks_in_which_nothing_is_seen_are_not_touched():
    """Three documents of two blocks each: numbers that would spoil all they meet lie in the second one."""
    ids = jnp.repeat(jnp.arange(1, 4, dtype=jnp.int32), 2 * SIZE)[None]
    attend = make_attend("blockwise", ids, window=0, scale=0.3, softcap=0.0, heads_over=None)
    spoiled = ids == 2
    x = jnp.where(spoiled, jnp.nan, 1.0)[:, None, :, None]
    own = lambda x: jnp.sum(jnp.where(spoiled[:, None, None, :, None], 0, attend(x[:, :, None], x, x)))  # noqa: E731
    total, grads = jax.jit(jax.value_and_grad(own))(x)
    assert total == 4 * SIZE
    np.testing.assert_array_equal(jnp.isnan(grads[:, 0, :, 0]), spoiled)


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize(
    ("kind", "remat", "length"),
    [*[("splash_interpret", remat, 20) for remat in ("none", "dots", "full")], ("blockwise", "dots", 150)],
)
def test_a_model_with_another_program_is_the_plain_model_on_one_device_and_on_a_mesh(mesh, kind, remat, length):
    plain = Model(MIXED)
    kernel = dataclasses.replace(plain, attention=kind, remat=remat)
    params = plain.init(jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, 23, (4, length)).astype(np.int32)
    mask = np.arange(length)[None] >= np.array([[0], [5], [11], [0]])
    inputs = tokens, positions_from_mask(mask), mask.astype(np.int32)

    def loss(model, params):
        hidden = model.apply(params, *inputs)
        return jnp.sum(jnp.where(mask[:, :, None], jnp.sin(hidden), 0))

    expected = jax.jit(jax.value_and_grad(lambda p: loss(plain, p)))(params)
    if mesh is None:
        found = jax.jit(jax.value_and_grad(lambda p: loss(kernel, p)))(params)
    else:
        with jax.set_mesh(make_mesh(mesh).grid):
            found = jax.jit(jax.value_and_grad(lambda p: loss(kernel, p)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4), found, expected)


def test_prefill_with_the_kernel_is_plain_prefill():
    plain = Model(MIXED)
    kernel = dataclasses.replace(plain, attention="splash_interpret")
    params = plain.decoding_params(plain.init(jax.random.key(0)))
    tokens = np.random.default_rng(1).integers(0, 23, (2, 20)).astype(np.int32)
    mask = np.arange(20)[None] >= np.array([[0], [9]])
    expected, _ = plain.prefill(params, tokens, mask, positions_from_mask(mask))
    found, _ = kernel.prefill(params, tokens, mask, positions_from_mask(mask))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_which_program_a_platform_gets(monkeypatch):
    assert platform_attention("auto") == "blockwise"
    with pytest.raises(UserError, match=r"model.attention flash needs a TPU or GPU, not cpu; set it to auto or plain"):
        platform_attention("flash")
    for platform, kind in (("tpu", "splash"), ("gpu", "cudnn")):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert platform_attention("auto") == platform_attention("flash") == kind
        assert platform_attention("plain") == "plain"
