"""The decoder: equal to transformers and to plain numpy, indifferent to padding, packing, remat, caching and dtype."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import ArchConfig, MeshConfig
from rlhf_jax.inference.sampling import SamplingLaw, sample
from rlhf_jax.models import Model, decoder, hf, rotary
from rlhf_jax.models.hf.layout import flattened, leaf_shapes, nested
from rlhf_jax.models.kernels import einsum
from rlhf_jax.sharding import make_mesh
from rlhf_jax.tokens import positions_from_mask

ROTARY = ArchConfig(
    vocab_size=19, width=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_width=20, max_positions=32,
    rope_theta=100.0,
)  # fmt: skip
LEARNED = dataclasses.replace(
    ROTARY, num_kv_heads=4, norm="layer", positions="learned", gated_mlp=False, activation="gelu_tanh",
    qkv_bias=True, out_bias=True, mlp_bias=True, tied_head=False,
)  # fmt: skip
ARCHS = {"rotary": ROTARY, "learned": LEARNED}
GREEDY = SamplingLaw(jnp.float32(0), jnp.int32(0), jnp.float32(1), jnp.int32(0))
DOCUMENT = np.array([[3, 7, 1, 0, 18, 5]])  # 0 is a token like the others

both = pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)


def random_params(arch, *, score_head=False, seed=0):
    """Weights large enough that norms, biases and attention all matter."""
    rng, leaves = np.random.default_rng(seed), {}
    for leaf, shape in leaf_shapes(arch, score_head=score_head).items():
        leaves[leaf] = (0.4 * rng.standard_normal(shape) + ("scale" in leaf)).astype(np.float32)
    return nested(leaves)


@partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, mask, segment_ids=None, positions=None):
    """Logits [B, S, V] of padded rows."""
    positions = positions_from_mask(mask) if positions is None else positions
    segment_ids = mask.astype(jnp.int32) if segment_ids is None else segment_ids
    return model.project(params, model.apply(params, tokens, positions, segment_ids))


def padded(tokens, left, right, pad=0):
    """One row and its mask with padding on both sides."""
    tokens, width = np.asarray(tokens), ((0, 0), (left, right))
    return np.pad(tokens, width, constant_values=pad), np.pad(np.ones_like(tokens, bool), width)


# ---- against a real model


@pytest.fixture(scope="module")
def stories(shared_data):
    path = shared_data / "models" / "stories260K-hf"
    arch, _ = hf.read_config(path)
    return Model(arch), hf.load_params(path, arch, score_head=False), np.load(path / "golden.npz")


def test_logits_of_stories(stories):
    model, params, golden = stories
    tokens = golden["prompt_ids"][None]
    logits = logits_of(model, params, tokens, np.ones_like(tokens, bool))
    np.testing.assert_allclose(logits[0], golden["logits"], atol=1e-4)


def test_greedy_story(stories):
    model, params, golden = stories
    prompt, story = golden["prompt_ids"][None], golden["greedy_ids"]
    num = len(story) - prompt.shape[1]
    draw = jax.jit(partial(sample, model, max_new_tokens=num, stop_ids=(1,), chunk=num, filtered=False))
    rollout = draw(params, prompt, np.ones_like(prompt, bool), jax.random.key(0), GREEDY)
    np.testing.assert_array_equal(np.concatenate([prompt[0], rollout.tokens[0]]), story)


# ---- against numpy


def numpy_norm(arch, params, x):
    x = x - x.mean(-1, keepdims=True) if arch.norm == "layer" else x
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + arch.norm_eps) * params["scale"]
    return x + params["bias"] if arch.norm == "layer" else x


def numpy_rotary(x, theta):
    """x [S, N] turned in the complex plane: dimension i is the real, i + N/2 the imaginary part."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], 1)


def numpy_attention(arch, params, x):
    """Head by head and query by query."""
    group, out = arch.num_heads // arch.num_kv_heads, 0.0
    for kv in range(arch.num_kv_heads):
        slots = [x @ params["qkv"][:, kv, s] + params.get("qkv_bias", np.zeros(params["qkv"].shape[1:]))[kv, s]
                 for s in range(group + 2)]  # fmt: skip
        if arch.positions == "rotary":
            slots[:-1] = [numpy_rotary(slot, arch.rope_theta) for slot in slots[:-1]]
        for g in range(group):
            y = np.zeros_like(slots[g])
            for t in range(len(x)):
                weights = np.exp(slots[-2][: t + 1] @ slots[g][t] / np.sqrt(arch.head_dim))
                y[t] = weights @ slots[-1][: t + 1] / weights.sum()
            out = out + y @ params["out"][kv, g]
    return out + params.get("out_bias", 0.0)


def numpy_mlp(arch, params, x):
    up = np.einsum("sd,dmf->smf", x, params["up"]) + params.get("up_bias", 0.0)
    gate = up[:, 0]
    if arch.activation == "silu":
        act = gate / (1 + np.exp(-gate))
    else:
        act = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return (act * up[:, 1] if arch.gated_mlp else act) @ params["down"] + params.get("down_bias", 0.0)


def numpy_logits(arch, params, tokens):
    """Logits [S, V] of one unpadded document, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = params["embed"]["tokens"][tokens]
    if arch.positions == "learned":
        x = x + params["embed"]["positions"][: len(tokens)]
    for i in range(arch.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        x = x + numpy_attention(arch, layer["attn"], numpy_norm(arch, layer["attn_norm"], x))
        x = x + numpy_mlp(arch, layer["mlp"], numpy_norm(arch, layer["mlp_norm"], x))
    head = params["embed"]["tokens"].T if arch.tied_head else params["head"]["kernel"]
    return numpy_norm(arch, params["final_norm"], x) @ head


@both
def test_logits_equal_plain_numpy(arch):
    params = random_params(arch)
    logits = logits_of(Model(arch), params, *padded(DOCUMENT, 0, 4))
    np.testing.assert_allclose(logits[0, :6], numpy_logits(arch, params, DOCUMENT[0]), atol=1e-4)


def test_activations_by_name():
    found = {name: float(fn(jnp.float32(1.5))) for name, fn in decoder.ACTIVATIONS.items()}
    expected = {"silu": 1.2263617, "gelu": 1.3997892, "gelu_tanh": 1.3995716, "relu": 1.5, "relu2": 2.25}
    assert found == pytest.approx(expected, rel=1e-6)


# ---- invariances


@both
def test_padding_changes_nothing(arch):
    """Left, right, on both sides, with any token as padding: the documents' logits stay."""
    model, params = Model(arch), random_params(arch)
    rows = [padded(DOCUMENT, 4, 0), padded(DOCUMENT, 0, 4), padded(DOCUMENT, 1, 3), padded(DOCUMENT, 2, 2, pad=9)]
    tokens, mask = (np.concatenate(x) for x in zip(*rows, strict=True))
    logits = logits_of(model, params, tokens, mask)
    alone = logits_of(model, params, *padded(DOCUMENT, 0, 0))
    for row, valid in zip(np.asarray(logits), mask, strict=True):
        np.testing.assert_allclose(row[valid], alone[0], atol=1e-5)


@both
def test_packed_documents_do_not_see_one_another(arch):
    model, params = Model(arch), random_params(arch)
    first, second = DOCUMENT[:, :4], DOCUMENT[:, 3:]
    tokens = np.concatenate([first, second, [[9, 9, 9]]], axis=1)
    segments = np.array([[1] * 4 + [2] * 3 + [0] * 3])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0, 0]])
    packed = logits_of(model, params, tokens, segments > 0, segments, positions)[0]
    alone = [logits_of(model, params, *padded(doc, 0, 10 - doc.shape[1]))[0] for doc in (first, second)]
    np.testing.assert_allclose(packed[:4], alone[0][:4], atol=1e-5)
    np.testing.assert_allclose(packed[4:7], alone[1][:3], atol=1e-5)


@both
def test_a_later_token_changes_nothing_earlier(arch):
    model, params = Model(arch), random_params(arch)
    tokens, mask = padded(DOCUMENT, 0, 4)
    changed = tokens.copy()
    changed[0, 3] = 11
    before, after = (np.asarray(logits_of(model, params, t, mask))[0] for t in (tokens, changed))
    np.testing.assert_array_equal(before[:3], after[:3])
    assert (np.abs(before[3:6] - after[3:6]).max(axis=1) > 1e-2).all()


def test_rows_do_not_see_one_another():
    model, params = Model(ROTARY), random_params(ROTARY)
    tokens, mask = (np.repeat(x, 4, axis=0) for x in padded(DOCUMENT, 0, 4))
    changed = tokens.copy()
    changed[1] = 5
    before, after = (np.asarray(logits_of(model, params, t, mask)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[[0, 2, 3]], after[[0, 2, 3]])


def test_rotary_positions_are_relative():
    """All positions shifted alike change no logit."""
    model, params = Model(ROTARY), random_params(ROTARY)
    tokens, mask = padded(DOCUMENT, 0, 4)
    positions = np.arange(10)[None]
    near, far = (logits_of(model, params, tokens, mask, None, p)[0, :6] for p in (positions, positions + 20))
    np.testing.assert_allclose(far, near, atol=1e-4)


def test_distance_matters_to_rotary_and_learned_positions():
    for arch in (ROTARY, LEARNED):
        tokens, mask = padded(DOCUMENT, 0, 4)
        positions = np.arange(10)[None]
        model, params = Model(arch), random_params(arch)
        near, far = (logits_of(model, params, tokens, mask, None, p)[0, 1:6] for p in (positions, 2 * positions))
        assert np.abs(near - far).max() > 1e-2


def test_rotation_by_position_zero_is_the_identity_and_keeps_lengths():
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 3, 6)).astype(np.float32)
    turned = rotary.rotate(x, rotary.rotary_tables(np.array([[0, 1, 500]]), ArchConfig(head_dim=6, rope_theta=100.0)))
    np.testing.assert_array_equal(turned[..., 0, :], x[..., 0, :])
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    assert np.abs(turned - x)[..., 1:, :].max() > 0.1


# ---- remat


def loss_of(model, params, tokens, mask):
    hidden = model.apply(params, tokens, positions_from_mask(mask), mask.astype(np.int32))
    return jnp.sum(jnp.sin(hidden[:, :6].astype(jnp.float32)))


@pytest.mark.parametrize(
    "letters", ["btd,dmf->btmf", "btd,dkgn->btkgn", "btkgn,kgnd->btd", "btf,fd->btd", "btd,d->bt"]
)
def test_products_are_of_matrices_on_a_cpu_alone_and_equal_those_of_all_axes(letters):
    # With more axes gradients of weights copy the largest array of a layer; across devices the axes stay as split.
    sizes, rng = dict(b=3, t=5, d=8, m=2, f=6, k=2, g=3, n=4), np.random.default_rng(0)
    x, kernel, ct = (rng.standard_normal([sizes[c] for c in part]) for part in re.split(",|->", letters))
    inputs, weight, outputs = re.split(",|->", letters)

    def of(x, kernel):
        return (einsum(letters, x, kernel) * ct.astype(np.float32)).sum()

    args = x.astype(np.float32), kernel.astype(np.float32)
    np.testing.assert_allclose(einsum(letters, *args), np.einsum(letters, x, kernel), atol=1e-5)
    by_x, by_kernel = jax.grad(of, (0, 1))(*args)
    np.testing.assert_allclose(by_x, np.einsum(f"{outputs},{weight}->{inputs}", ct, kernel), atol=1e-5)
    np.testing.assert_allclose(by_kernel, np.einsum(f"{inputs},{outputs}->{weight}", x, ct), atol=1e-5)

    def axes():
        eqns = jax.make_jaxpr(jax.grad(of, (0, 1)))(*args).eqns
        return {var.aval.ndim for eqn in eqns if eqn.primitive.name == "dot_general" for var in eqn.invars}

    assert axes() == {2}
    with jax.set_mesh(make_mesh(MeshConfig(data=-1)).grid):
        assert max(axes()) > 2


def test_remat_changes_neither_value_nor_gradient():
    params, inputs = random_params(ROTARY), padded(DOCUMENT, 0, 4)
    results = [
        jax.jit(jax.value_and_grad(partial(loss_of, Model(ROTARY, remat=remat))))(params, *inputs)
        for remat in ("none", "dots", "full")
    ]
    for other in results[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), other, results[0])


def test_remat_computes_products_again():
    """none keeps every product of the forward pass, dots recomputes attention's, full all of them."""
    params, inputs = random_params(ROTARY), padded(DOCUMENT, 0, 4)
    products = [
        str(jax.make_jaxpr(jax.grad(partial(loss_of, Model(ROTARY, remat=remat))))(params, *inputs)).count(
            "dot_general["
        )
        for remat in ("none", "dots", "full")
    ]
    assert products[0] < products[1] < products[2]


# ---- decoding


@both
def test_prefill_and_decode_equal_the_full_forward_at_every_position(arch):
    model, params = Model(arch), random_params(arch)
    tokens = np.stack([DOCUMENT[0], DOCUMENT[0, ::-1]])
    prompt_mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    lengths, num = prompt_mask.sum(1), 3
    prompt = np.zeros((2, 5), int)
    for row, length in enumerate(lengths):
        prompt[row, 5 - length :] = tokens[row, :length]
    later = np.stack([tokens[0, 3:6], [4, 0, 12]])
    full_tokens, full_mask = np.hstack([prompt, later]), np.hstack([prompt_mask, np.ones((2, num), bool)])
    expected = np.asarray(logits_of(model, params, full_tokens, full_mask))

    decode_params = jax.jit(model.decoding_params)(params)
    logits, cache = jax.jit(model.prefill)(decode_params, prompt, prompt_mask, positions_from_mask(prompt_mask))
    np.testing.assert_allclose(logits, expected[:, 4], atol=1e-5)
    # Two groups of one row, each with columns [B, K, num, N] of its own.
    own = jax.tree.map(lambda x: np.zeros((*x.shape[:2], num, x.shape[3]), x.dtype), cache)
    decode = jax.jit(model.decode)
    for t in range(num):
        mask = np.hstack([prompt_mask, np.broadcast_to(np.arange(num) <= t, (2, num))])
        apart = (5 + t - np.arange(5 + num))[None]
        logits, own, _ = decode(decode_params, later[:, t], lengths + t, mask, apart, cache, own, t)
        np.testing.assert_allclose(logits, expected[:, 5 + t], atol=1e-5)


def test_decoding_params_are_the_layers_one_by_one_in_the_compute_dtype():
    params = random_params(LEARNED)
    model = Model(LEARNED, compute_dtype=jnp.dtype("bfloat16"))
    found = jax.jit(model.decoding_params)(params)

    def expected(path, x):
        return x if "_norm" in jax.tree_util.keystr(path) else x.astype(jnp.bfloat16)

    assert len(found["layers"]) == LEARNED.num_layers
    whole = jax.tree_util.tree_map_with_path(expected, params)
    for i, layer in enumerate(found.pop("layers")):
        jax.tree.map(np.testing.assert_array_equal, layer, jax.tree.map(lambda x, i=i: x[i], whole["layers"]))
        assert layer["attn_norm"]["scale"].dtype == jnp.float32 and layer["attn"]["qkv"].dtype == jnp.bfloat16
    del whole["layers"]
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), found, whole)


# ---- dtypes


@both
def test_bfloat16_is_close_to_float32(arch):
    params, inputs = random_params(arch), padded(DOCUMENT, 0, 4)
    exact = np.asarray(logits_of(Model(arch), params, *inputs))[0, :6]
    rounded = logits_of(Model(arch, compute_dtype=jnp.dtype("bfloat16")), params, *inputs)
    error = np.abs(np.asarray(rounded)[0, :6] - exact).max() / exact.std()
    assert 1e-4 < error < 0.1  # neither float32 in disguise nor wrong


def test_hidden_states_have_the_compute_dtype_logits_and_scores_are_float32():
    model, params = Model(ROTARY, compute_dtype=jnp.dtype("bfloat16")), random_params(ROTARY)
    ids = jax.ShapeDtypeStruct((2, 5), "int32")
    hidden = jax.eval_shape(model.apply, params, ids, ids, ids)
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(model.project, params, hidden).dtype == jnp.float32
    assert (
        jax.eval_shape(model.scores, {"kernel": np.ones(12, "f"), "bias": np.ones((), "f")}, hidden).dtype == "float32"
    )
    grads = jax.eval_shape(jax.grad(partial(loss_of, model)), params, *padded(DOCUMENT, 0, 4))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


# ---- parameters and heads


@pytest.mark.parametrize("score_head", [False, True])
@both
def test_fresh_parameters_have_the_shapes_of_the_tables(arch, score_head):
    shapes = jax.eval_shape(Model(arch, score_head=score_head).init, jax.random.key(0))
    found = {leaf: value.shape for leaf, value in flattened(shapes).items()}
    assert found == leaf_shapes(arch, score_head=score_head)


def test_fresh_weights_follow_init_std_and_layers_differ():
    arch = dataclasses.replace(ROTARY, vocab_size=200, width=64, head_dim=16, ffn_width=100, init_std=0.05)
    params = jax.jit(Model(arch, score_head=True).init)(jax.random.key(0))
    residual = 0.05 / (2 * arch.num_layers) ** 0.5
    layers = params["layers"]
    for leaf, std in [
        (params["embed"]["tokens"], 0.05), (layers["attn"]["qkv"], 0.05), (layers["mlp"]["up"], 0.05),
        (layers["attn"]["out"], residual), (layers["mlp"]["down"], residual), (params["score"]["kernel"], 65**-0.5),
    ]:  # fmt: skip
        np.testing.assert_allclose(np.std(leaf), std, rtol=0.25 if leaf.ndim == 1 else 0.05)
    for leaf in (layers["attn"]["qkv"], layers["mlp"]["down"]):
        assert (leaf[0] != leaf[1]).mean() > 0.99
    assert params["score"]["bias"] == 0
    assert (layers["attn_norm"]["scale"] == 1).all()


def test_score_head_of_zeros():
    score = Model(ROTARY).init_score(jax.random.key(0), zeros=True)
    assert (score["kernel"].shape, score["bias"].shape) == ((12,), ())
    assert not score["kernel"].any()
    assert not score["bias"].any()


def test_with_score_puts_the_head_on_the_trunk():
    policy, score = random_params(LEARNED), {"kernel": np.arange(12, dtype=np.float32), "bias": np.float32(0.5)}
    params = Model(LEARNED, score_head=True).with_score(policy, score)
    assert flattened(params).keys() == leaf_shapes(LEARNED, score_head=True).keys()
    assert params["layers"] is policy["layers"]
    model, (tokens, mask) = Model(LEARNED, score_head=True), padded(DOCUMENT, 0, 4)
    hidden = jax.jit(model.apply)(params, tokens, positions_from_mask(mask), mask.astype(np.int32))
    expected = np.asarray(hidden, np.float64) @ score["kernel"] + 0.5
    np.testing.assert_allclose(model.scores(score, hidden), expected, rtol=1e-5, atol=1e-5)


def test_logprobs_are_of_the_projected_logits():
    model, params = Model(LEARNED, logprob_chunk=4), random_params(LEARNED)
    tokens, _ = padded(DOCUMENT, 0, 4)
    hidden = np.random.default_rng(0).standard_normal((1, 10, 12)).astype(np.float32)
    logprobs, _ = jax.jit(model.logprobs)(params, hidden, tokens, 0.5)
    expected = jax.nn.log_softmax(hidden @ params["head"]["kernel"] / 0.5)
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, tokens[..., None], -1)[..., 0], atol=1e-4)
