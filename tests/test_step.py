"""Laws of one optimiser step: accumulation, skips, schedules, decay, Adam, clip, compilation, the mesh's errors."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import BIGRAMS, ONE, V, bigram_params, f64

from rlhf_jax import sft, sharding
from rlhf_jax.config import ArchConfig, MeshConfig, OptimConfig
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model
from rlhf_jax.training.loop import make_evaluate
from rlhf_jax.training.state import (
    TrainState,
    create_state,
    decay_mask,
    in_float32,
    learning_rates,
    make_optimizer,
    make_schedule,
)
from rlhf_jax.training.step import accumulated_grads, make_train_step, make_update

KEY = jax.random.key(0)
POLICY = bigram_params(0)["policy"]


def lm_loss(logprobs, weights):
    return -jnp.sum(weights * logprobs), {"loss/nll_max": jnp.max(-logprobs)}


def ragged_batch(seed: int, rows: int = 8, length: int = 7) -> dict:
    """Rows of 2 .. length tokens, weights a token mean over the whole batch."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, rows)
    lengths[:2] = 2, length
    mask = np.arange(length) < lengths[:, None]
    targets = mask & (np.arange(length) > 0)
    return {
        "tokens": jnp.asarray(rng.integers(0, V, (rows, length)), jnp.int32),
        "positions": jnp.asarray(np.where(mask, np.arange(length), 0), jnp.int32),
        "segment_ids": jnp.asarray(mask, jnp.int32),
        "weights": jnp.asarray(targets / targets.sum(), jnp.float32),
    }


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def differ(a, b) -> bool:
    return any(
        (np.asarray(x) != np.asarray(y)).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- accumulation


@pytest.mark.parametrize("num", [2, 4, 8])
def test_accumulated_equals_whole_batch_for_ragged_masks(num):
    loss_fn, batch = sft.objective(BIGRAMS.policy, lm_loss), ragged_batch(0)
    per_microbatch = np.asarray(batch["weights"]).reshape(-1, num, 7).sum((0, 2))
    assert per_microbatch.std() > 0  # a mean of microbatch means would be wrong here
    whole_grads, whole = accumulated_grads(loss_fn, POLICY, batch, KEY, 1)
    grads, metrics = accumulated_grads(loss_fn, POLICY, batch, KEY, num)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), grads, whole_grads)
    assert metrics.keys() == whole.keys() >= {"loss/total", "loss/nll_max"}
    for name in whole:
        np.testing.assert_allclose(metrics[name], whole[name], atol=1e-6, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("num", [1, 64, 1024])
def test_gradients_of_bfloat16_parameters_are_added_up_in_float32(num):
    """In bfloat16 256 + 1 is 256, so that a sum of 1024 equal gradients stood still at a quarter of it."""
    loss_fn = lambda params, batch, key: (params["x"].astype(jnp.float32).sum() * batch["x"].sum() / 1024, {})  # noqa: E731
    grads, _ = accumulated_grads(loss_fn, {"x": jnp.ones(2, jnp.bfloat16)}, {"x": jnp.ones(1024)}, KEY, num)
    np.testing.assert_array_equal(grads["x"], np.ones(2, np.float32))


def test_a_negative_maximum_survives_accumulation():
    loss_fn = lambda params, batch, key: (params["x"], {"x_max": batch["x"].max()})  # noqa: E731
    batch = {"x": jnp.asarray([-3.0, -5.0, -2.0, -4.0])}
    _, metrics = accumulated_grads(loss_fn, {"x": jnp.float32(0)}, batch, KEY, 2)
    assert metrics["x_max"] == -2.0  # a running maximum that starts at 0 would say 0


def test_rows_that_do_not_divide_into_microbatches_are_refused_with_the_numbers():
    loss_fn = sft.objective(BIGRAMS.policy, lm_loss)
    with pytest.raises(UserError, match=r"8 rows .* 3") as error:
        accumulated_grads(loss_fn, POLICY, ragged_batch(0), KEY, 3)
    assert "\n" not in str(error.value)


# --- steps that are not finite

SCALE = {"scale": jnp.float32(1.0)}


def breakable_loss(params, batch, key):
    """x^2, spoilt by batch["kind"]: 1 the loss is NaN, 2 infinite, 3 the loss is fine but its gradient is infinite."""
    x = params["scale"]
    root = jnp.sqrt(jnp.where(batch["kind"][0] == 3, x - jax.lax.stop_gradient(x), 1.0))  # sqrt(0) = 0, slope infinite
    spoilt = jnp.where(batch["kind"][0] == 1, jnp.nan, jnp.where(batch["kind"][0] == 2, jnp.inf, 0.0))
    return x**2 + spoilt + root - jax.lax.stop_gradient(root), {}


def breakable_batch(kind: int) -> dict:
    return {"kind": jnp.full(1, kind)}


@pytest.mark.parametrize("kind", [1, 2, 3], ids=["nan_loss", "inf_loss", "inf_gradient"])
def test_a_step_that_is_not_finite_changes_no_bit_of_params_and_optimiser_and_is_counted(kind):
    config = OptimConfig(learning_rate=0.1, weight_decay=0.1)
    tx = make_optimizer(config, make_schedule(config, 10))
    update = jax.jit(make_update(breakable_loss, tx))
    state, metrics = update(TrainState.create(SCALE, tx), breakable_batch(0), KEY)
    assert metrics["optim/skipped"] == 0 and differ(state.params, SCALE)
    after, metrics = update(state, breakable_batch(kind), KEY)
    assert metrics["optim/skipped"] == 1
    assert after.step == state.step + 1 == 2
    assert_same_bits(after.params, state.params)
    assert_same_bits(after.opt_state, state.opt_state)
    healed, metrics = update(after, breakable_batch(0), KEY)
    assert (
        metrics["optim/skipped"] == 0 and np.isfinite(healed.params["scale"]) and differ(healed.params, after.params)
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_gradient_changes_no_bit_of_params_and_optimiser_and_is_counted(accumulate):
    """Momentum and weight decay would move the weights; of microbatches one that has a token is enough."""
    config = OptimConfig(learning_rate=0.1, weight_decay=0.1)
    tx, batch = make_optimizer(config, make_schedule(config, 10)), ragged_batch(0)
    update = jax.jit(make_update(sft.objective(BIGRAMS.policy, lm_loss), tx, accumulate))
    state, metrics = update(TrainState.create(POLICY, tx), batch, KEY)
    assert metrics["optim/empty"] == 0 and differ(state.params, POLICY)
    after, metrics = update(state, {**batch, "weights": jnp.zeros_like(batch["weights"])}, KEY)
    assert (metrics["optim/empty"], metrics["optim/skipped"], metrics["optim/grad_norm"]) == (1, 0, 0)
    assert after.step == state.step + 1 == 2
    assert_same_bits((after.params, after.opt_state), (state.params, state.opt_state))
    of_one = batch["weights"] * (jnp.arange(8) == 3)[:, None]
    again, metrics = update(after, {**batch, "weights": of_one}, KEY)
    assert metrics["optim/empty"] == 0 and differ(again.params, after.params)
    _, metrics = update(again, {**batch, "weights": 1e-22 * of_one}, KEY)
    assert metrics["optim/empty"] == metrics["optim/grad_norm"] == 0  # float32 has no squares of such a gradient


def test_without_held_out_batches_an_evaluation_says_nothing():
    loss = lambda params, batch, key: pytest.fail("there is no batch")  # noqa: E731
    assert make_evaluate(loss, sharding.make_mesh(MeshConfig(), devices=ONE), [], jax.random.key(0))({}) == {}


def test_the_schedule_goes_by_the_step_and_does_not_lag_after_a_skip():
    config = OptimConfig(learning_rate=1.0, schedule="linear", clip_norm=0.0)
    tx = make_optimizer(config, make_schedule(config, 4))
    update = jax.jit(make_update(breakable_loss, tx))
    state = TrainState.create(SCALE, tx)
    for kind in (1, 1, 1, 0):  # Adam's first real step moves by the learning rate: at step 3 of 4 that is 1/4
        state, _ = update(state, breakable_batch(kind), KEY)
    np.testing.assert_allclose(1.0 - state.params["scale"], 0.25, rtol=1e-5)


# --- schedules, decay, Adam, clip


def numpy_schedule(kind: str, peak: float, end: float, warmup: int, total: int) -> np.ndarray:
    rates = []
    for i in range(total):
        done = (i - warmup) / max(total - warmup, 1)
        if i < warmup:
            rates.append(peak * (i + 1) / warmup)
        elif kind == "constant":
            rates.append(peak)
        elif kind == "linear":
            rates.append(peak + (end * peak - peak) * done)
        else:
            rates.append(peak * (end + (1 - end) * 0.5 * (1 + np.cos(np.pi * done))))
    return np.asarray(rates)


@pytest.mark.parametrize(
    ("kind", "warmup", "end"), itertools.product(["constant", "linear", "cosine"], [0, 1, 4], [0.0, 0.25])
)
def test_schedules_follow_their_formulas(kind, warmup, end):
    config = OptimConfig(learning_rate=0.3, schedule=kind, warmup_steps=warmup, end_fraction=end)
    rates = [*map(learning_rates(make_schedule(config, 12)), range(12))]
    np.testing.assert_allclose(rates, numpy_schedule(kind, 0.3, end, warmup, 12), rtol=1e-5, atol=1e-8)


def test_a_warm_up_longer_than_the_run_only_warms_up():
    config = OptimConfig(learning_rate=1.0, schedule="linear", warmup_steps=8)
    rates = [*map(learning_rates(make_schedule(config, 4)), range(4))]
    np.testing.assert_allclose(rates, [0.125, 0.25, 0.375, 0.5], rtol=1e-6)


EVERYTHING = ArchConfig(  # every parameter that a decoder can have
    vocab_size=24, width=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, ffn_width=32, max_positions=8,
    norm="layer", positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True, tied_head=False,
)  # fmt: skip


@pytest.mark.parametrize("score_head", [False, True])
def test_weight_decay_is_for_matrices_only(score_head):
    params = jax.eval_shape(Model(EVERYTHING, score_head=score_head).init, KEY)
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, decays in jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
        if decays
    }
    matrices = {"layers/attn/qkv", "layers/attn/out", "layers/mlp/up", "layers/mlp/down"}
    assert decayed == matrices | {"embed/tokens", "embed/positions"} | (set() if score_head else {"head/kernel"})


def test_decay_without_gradient_shrinks_matrices_by_rate_times_decay_and_leaves_the_rest():
    config = OptimConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5)
    tx = make_optimizer(config, make_schedule(config, 1))
    params = {
        "embed": {"tokens": jnp.ones((2, 3))},
        "final_norm": {"scale": jnp.ones(3)},
        "score": {"kernel": jnp.ones(3)},
    }
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, step=0)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["embed"]["tokens"], 0.95, rtol=1e-6)
    assert_same_bits(after["final_norm"], params["final_norm"])
    assert_same_bits(after["score"], params["score"])


def numpy_adam(
    params: dict, grads: list[dict], rates: np.ndarray, config: OptimConfig, decays: tuple[str, ...]
) -> dict:
    """AdamW after a clip by global norm, in float64; TensorFlow adds eps to the root before the bias correction."""
    params = {name: np.array(x, np.float64) for name, x in params.items()}
    m, v = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        norm = np.sqrt(sum((g**2).sum() for g in grad.values()))
        scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name, g in grad.items():
            m[name] = config.b1 * m[name] + (1 - config.b1) * scale * g
            v[name] = config.b2 * v[name] + (1 - config.b2) * (scale * g) ** 2
            c1, c2 = 1 - config.b1**t, 1 - config.b2**t
            if config.eps_form == "tensorflow":
                update = m[name] * np.sqrt(c2) / c1 / (np.sqrt(v[name]) + config.eps)
            else:
                update = (m[name] / c1) / (np.sqrt(v[name] / c2) + config.eps)
            decay = config.weight_decay * params[name] if name in decays else 0.0
            params[name] = params[name] - rate * (update + decay)
    return params


def optimise(config: OptimConfig, params: dict, grads: list[dict]) -> dict:
    """The library's optimiser on given gradients: the loss is their inner product with the parameters."""
    tx = make_optimizer(config, make_schedule(config, len(grads)))
    inner = lambda params, batch, key: (sum(jnp.sum(params[n] * batch[n][0]) for n in params), {})  # noqa: E731
    update, state = jax.jit(make_update(inner, tx)), TrainState.create(jax.tree.map(jnp.asarray, params), tx)
    for grad in grads:
        state, metrics = update(state, {n: jnp.asarray(g[None], jnp.float32) for n, g in grad.items()}, KEY)
        norm = np.sqrt(sum((g**2).sum() for g in grad.values()))
        np.testing.assert_allclose(metrics["optim/grad_norm"], norm, rtol=1e-5)  # the norm before the clip
    return state.params


def some_gradients(num: int, size: float) -> tuple[dict, list[dict]]:
    rng = np.random.default_rng(3)
    shapes = {"kernel": (3, 2), "bias": (2,)}
    params = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return params, [{n: size * 4.0 ** -(i % 3) * rng.normal(size=s) for n, s in shapes.items()} for i in range(num)]


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("eps_form", ["standard", "tensorflow"])
def test_the_optimiser_is_adamw_with_a_clip_as_numpy_computes_it(eps_form, clip_norm):
    config = OptimConfig(
        learning_rate=0.1, schedule="linear", warmup_steps=2, b1=0.8, b2=0.95, eps=1e-3, eps_form=eps_form,
        weight_decay=0.1, clip_norm=clip_norm,
    )  # fmt: skip
    params, grads = some_gradients(6, size=2.0)
    rates = numpy_schedule("linear", 0.1, 0.0, 2, 6)
    expected = numpy_adam(params, grads, rates, config, decays=("kernel",))
    found = optimise(config, params, grads)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-6, rtol=0)


def test_the_clip_bounds_large_gradients_and_leaves_small_ones():
    rates, kwargs = {}, {"learning_rate": 0.1, "schedule": "constant"}
    for size in (0.01, 10.0):
        params, grads = some_gradients(4, size)
        on, off = (optimise(OptimConfig(clip_norm=c, **kwargs), params, grads) for c in (1.0, 0.0))
        rates[size] = max(np.abs(on[n] - off[n]).max() for n in params)
    assert rates[0.01] < 1e-7 and rates[10.0] > 1e-3


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_a_decay_that_float32_rounds_to_1_is_refused_and_the_largest_that_is_allowed_trains(name):
    """With 1 the first update would be 0, or infinite, and nothing said so: 1 - b^t is 0."""
    with pytest.raises(UserError, match=rf"^optim.{name} is 0.99999999; make it at least 0 and at most 0.9999999$"):
        OptimConfig(learning_rate=1e-3, **{name: 0.99999999}).check("optim.")
    config = OptimConfig(learning_rate=1e-3, schedule="constant", **{name: 0.9999999})
    config.check("optim.")
    params, tx = {"w": jnp.ones(2)}, make_optimizer(config, make_schedule(config, 1))
    updates, _ = tx.update({"w": jnp.full(2, 0.5)}, tx.init(params), params, step=jnp.int32(0))
    np.testing.assert_allclose(updates["w"], -1e-3, rtol=0.3)


@pytest.mark.parametrize("eps_form", ["standard", "tensorflow"])
@pytest.mark.parametrize("b2", [0.95, 0.999, 0.9999])
def test_bfloat16_parameters_have_the_moments_of_float32_ones(b2, eps_form):
    """A decay of 0.999 is 1 in bfloat16: the second moment only ever grew."""
    options = {"learning_rate": 0.01, "schedule": "constant", "clip_norm": 1.0, "weight_decay": 0.1}
    config = OptimConfig(b2=b2, eps_form=eps_form, **options)
    tx = make_optimizer(config, make_schedule(config, 60))
    loss = lambda params, batch, key: (jnp.sum(params["x"].astype(jnp.float32) * batch["x"][0]), {})  # noqa: E731
    update, rng = jax.jit(make_update(loss, tx)), np.random.default_rng(0)
    short, exact = (TrainState.create({"x": jnp.ones(8, dtype)}, tx) for dtype in (jnp.bfloat16, jnp.float32))
    for i in range(60):
        given = {"x": jnp.asarray(rng.normal(size=(1, 8)) * (20 if i < 3 else 0.5), jnp.bfloat16).astype(jnp.float32)}
        exact, _ = update(dataclasses.replace(exact, params=in_float32(short.params)), given, KEY)
        short, _ = update(short, given, KEY)
        rounded = in_float32(short.params)["x"]
        np.testing.assert_allclose(rounded, exact.params["x"], rtol=0.004)  # half of the last bit
    assert short.params["x"].dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), short.opt_state, exact.opt_state)


def test_rates_of_a_run_that_is_ended_by_hand_are_those_of_its_schedule_wherever_it_is():
    """A list of them for 2 * 10^9 steps would not fit into memory."""
    total = 2**31 - 1
    config = OptimConfig(learning_rate=1e-3, schedule="linear", end_fraction=0.5, warmup_steps=10_000)
    schedule = make_schedule(config, total)
    rates = learning_rates(schedule)
    for count in (0, 4095, 4096, 9_999, 10_000, total // 2, total - 1):
        exact = 1e-3 * min((count + 1) / 10_000, 1 - 0.5 * max(count - 10_000, 0) / (total - 10_000))
        np.testing.assert_allclose([rates(count), schedule(jnp.int32(count))], exact, rtol=1e-5)


@pytest.mark.parametrize("eps_form", ["standard", "tensorflow"])
@pytest.mark.parametrize("size", [1e-12, 1e-17, 1e-19, 1e-24, 1e-30])
def test_the_smallest_epsilon_that_is_allowed_bounds_steps_whose_squared_gradients_are_0_in_float32(size, eps_form):
    """With 1e-30 a gradient of 1e-20, whose square is none, made a step of 10^10 rates."""
    with pytest.raises(UserError, match=r"^optim.eps is 1e-30; make it 0, or 1e-18 to 1e\+18 in size, "):
        OptimConfig(learning_rate=1e-3, eps=1e-30).check("optim.")
    config = OptimConfig(learning_rate=1e-3, schedule="constant", eps=1e-18, eps_form=eps_form, clip_norm=0.0)
    config.check("optim.")
    params, tx = {"w": jnp.ones(2)}, make_optimizer(config, make_schedule(config, 1))
    updates, _ = tx.update({"w": jnp.full(2, size)}, tx.init(params), params, step=jnp.int32(0))
    assert 0 <= -updates["w"][0] <= 4e-3


def test_tensorflows_epsilon_makes_early_updates_smaller_and_late_ones_equal():
    grad, moved = {"x": jnp.full(1, 1e-4)}, {}
    for form in ("standard", "tensorflow"):
        config = OptimConfig(learning_rate=1.0, schedule="constant", eps=1e-5, eps_form=form, clip_norm=0.0, b2=0.99)
        tx = make_optimizer(config, make_schedule(config, 1))
        state, sizes = tx.init(grad), []
        update = jax.jit(lambda state, tx=tx: tx.update(grad, state, grad, step=jnp.zeros((), jnp.int32)))
        for _ in range(800):
            updates, state = update(state)
            sizes.append(-updates["x"][0])
        moved[form] = np.asarray(sizes)
    ratio = moved["tensorflow"] / moved["standard"]
    np.testing.assert_allclose(ratio[0], 0.55, rtol=1e-3)  # sqrt(v) = 1e-5, as large as eps: (1 + 0.1) / (1 + 1)
    assert (np.diff(ratio[:200]) > 0).all()
    np.testing.assert_allclose(ratio[-1], 1.0, rtol=1e-3)


# --- the compiled step


def train_step_of(mesh, params, tx):
    state = create_state(jax.tree.map(jnp.copy, params), tx, mesh)
    return state, make_train_step(sft.objective(BIGRAMS.policy, lm_loss), tx, mesh=mesh, state=state)


def test_the_step_compiles_once_and_its_state_is_donated():
    mesh = sharding.make_mesh(MeshConfig())
    config = OptimConfig(learning_rate=3e-4, schedule="linear")
    state, step = train_step_of(mesh, POLICY, make_optimizer(config, make_schedule(config, 5)))
    first = state
    for i in range(5):
        state, metrics = step(state, sharding.put_batch(mesh, ragged_batch(i)), jax.random.fold_in(KEY, i))
    assert step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert state.step == 5 and np.isfinite(metrics["loss/total"])


def test_a_plain_optax_optimiser_trains_too():
    mesh = sharding.make_mesh(MeshConfig(data=1), devices=ONE)
    state, step = train_step_of(mesh, POLICY, optax.sgd(0.5))
    batch = ragged_batch(0)
    grads = jax.grad(lambda p: sft.objective(BIGRAMS.policy, lm_loss)(p, batch, KEY)[0])(POLICY)
    state, _ = step(state, batch, KEY)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, f64(POLICY), f64(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, expected)


# --- the mesh and its errors


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_axis_takes_the_rest_of_the_devices():
    assert dict(sharding.make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(sharding.make_mesh(MeshConfig(data=-1), devices=ONE).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(data=-1, fsdp=-1), ["-1", "data", "fsdp"]),
        (MeshConfig(data=0), ["0", "positive"]),
        (MeshConfig(data=2, fsdp=3), ["2*3*1 = 6", "8 devices", "mesh.data"]),
        (MeshConfig(data=-1, fsdp=3), ["2*3*1 = 6", "8 devices"]),
        (MeshConfig(data=16), ["16", "8 devices"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_its_numbers(config, words):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(config)
    assert all(word in one_line(error) for word in words)


def test_a_parameter_without_a_rule_is_an_error_and_not_replicated():
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(UserError) as error:
        create_state({"adapter": {"down": jnp.zeros((4, 2))}}, optax.sgd(1.0), mesh)
    assert all(word in one_line(error) for word in ("adapter/down", "(4, 2)", "rules.LEAVES"))


def test_a_dimension_that_does_not_divide_is_refused_with_its_numbers():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    with pytest.raises(UserError) as error:
        sharding.tree_shardings(mesh, {"embed": {"tokens": jax.ShapeDtypeStruct((V, 12), jnp.float32)}})
    assert all(word in one_line(error) for word in ("embed/tokens", "(24, 12)", "12", "fsdp = 8"))


def test_rows_that_do_not_divide_are_refused_with_their_numbers():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding.check_rows(mesh, 12, "data.batch_size")
    with pytest.raises(UserError) as error:
        sharding.check_rows(mesh, 6, "data.batch_size")
    assert all(word in one_line(error) for word in ("data.batch_size 6", "data*fsdp = 4", "multiple of 4"))


def test_every_parameter_of_a_decoder_and_of_its_optimiser_has_a_rule_of_its_rank():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tx = make_optimizer(OptimConfig(weight_decay=0.1), make_schedule(OptimConfig(learning_rate=3e-4), 1))
    for score_head in (False, True):
        params = jax.eval_shape(Model(EVERYTHING, score_head=score_head).init, KEY)
        state = jax.eval_shape(lambda p: TrainState.create(p, tx), params)
        shardings = sharding.tree_shardings(mesh, state)
        for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            assert len(place.spec) == leaf.ndim
            place.shard_shape(leaf.shape)
        moment = shardings.opt_state[1].mu["layers"]["attn"]["qkv"]  # [0] is the clip
        assert moment.spec == shardings.params["layers"]["attn"]["qkv"].spec == P(None, "fsdp", "tensor", None, None)
