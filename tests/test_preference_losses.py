"""Losses of preferences: equal to TRL's in values and gradients, known answers, soft labels, microbatches."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax import losses

GOLDEN = Path(__file__).parent / "golden"
spec = importlib.util.spec_from_file_location("make_preference", GOLDEN / "make_preference.py")
make_preference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_preference)
B, SETTINGS = make_preference.B, make_preference.SETTINGS

LOSSES = {
    "dpo_sigmoid": losses.dpo_loss,
    "dpo_hinge": losses.hinge_loss,
    "dpo_ipo": losses.ipo_loss,
    "dpo_exo_pair": losses.exo_loss,
    "dpo_nca_pair": losses.nca_loss,
    "dpo_robust": losses.robust_dpo_loss,
    "dpo_bco_pair": losses.bco_loss,
    "dpo_sppo_hard": losses.sppo_loss,
    "dpo_apo_zero": losses.apo_zero_loss,
    "dpo_apo_down": losses.apo_down_loss,
    "dpo_discopop": losses.discopop_loss,
    "dpo_sigmoid_norm": losses.length_normalised_dpo_loss,
    "kto_kto": losses.kto_loss,
    "kto_apo_zero_unpaired": losses.apo_zero_unpaired_loss,
    "orpo": losses.orpo_loss,
    "cpo_sigmoid": losses.cpo_loss,
    "cpo_simpo": losses.simpo_loss,
}
"""Case of the golden file -> the loss; "dpo_sft" is `dpo.sft_coef`'s."""


@functools.cache
def stored():
    with np.load(GOLDEN / "preference.npz") as arrays:
        return dict(arrays)


def options_of(case):
    """Hyperparameters of a case, those that its loss takes; TRL's sigmoid has no label smoothing."""
    known = SETTINGS[case.split("_")[0]] | ({"label_smoothing": 0.0} if case == "dpo_sigmoid" else {})
    return {name: known[name] for name in known if name in inspect.signature(LOSSES[case]).parameters}


def columns(logprobs, x, labels=None):
    """What a batch would hold; logprobs [2 B] of chosen, then rejected."""
    in_pairs = lambda v: jnp.stack([v[:B], v[B:]], axis=1)  # noqa: E731
    lengths = in_pairs(jnp.asarray(x["mask"].sum(1), jnp.float32))
    return {
        "logprobs": in_pairs(logprobs),
        "ref_logprobs": in_pairs(x["ref"]),
        "lengths": lengths,
        "labels": jnp.ones(B) if labels is None else labels,
        "margins": jnp.zeros(B),
        "weights": jnp.full(B, 1 / B),
        "token_weights": jnp.stack([jnp.full(B, 1 / lengths[:, 0].sum()), jnp.zeros(B)], axis=1),
    }


def call(loss, cols, **options):
    return loss(**{name: cols[name] for name in inspect.signature(loss).parameters if name in cols}, **options)


def ours(case, x):
    """(loss, gradient by log-probs of tokens, by logits or by scores), as the golden file has them."""
    if case.startswith("reward"):
        return of_scores(case, x)
    of_logits = case.startswith(("cpo", "orpo"))

    @jax.jit
    def value(leaf):
        token_logprobs = leaf
        if of_logits:
            targets = x["tokens"][:, 1:, None]
            token_logprobs = jnp.take_along_axis(jax.nn.log_softmax(leaf[:, :-1]), targets, axis=2)[..., 0]
        cols = columns(jnp.sum(token_logprobs * x["mask"][:, 1:], axis=1), x, x["labels"] if "kto" in case else None)
        nll = losses.next_token_loss(cols["logprobs"], cols["token_weights"])[0]
        if case == "dpo_sft":
            return nll
        sft_coef = SETTINGS["cpo"]["sft_coef"] if case.startswith("cpo") else 0.0
        return call(LOSSES[case], cols, **options_of(case))[0] + sft_coef * nll

    return jax.device_get(jax.value_and_grad(value)(x["logits" if of_logits else "logprobs"]))


def of_scores(case, x):
    """(loss, gradient by scores) of the reward model."""
    margins = x["margins"] if case == "reward_margin" else np.zeros(B, np.float32)
    center = SETTINGS["reward"]["center_coef"] if case == "reward_center" else 0.0

    def value(scores):
        rows = jnp.full(B, 1 / B), margins, jnp.ones(B)
        return losses.pairwise_reward_loss(scores[:B], scores[B:], *rows, center_coef=center)[0]

    return jax.device_get(jax.value_and_grad(value)(jnp.asarray(x["scores"])))


def check_against(arrays, rows):
    names = ("mask", "logprobs", "ref", "labels", "tokens", "logits", "scores", "margins")
    x = {name: arrays[f"{rows}/{name}"] for name in names}
    cases = [key.split("/")[1] for key in arrays if key.startswith(rows) and key.endswith("/loss")]
    of_reward_model = {"reward_plain", "reward_margin", "reward_center"}
    assert set(cases) >= set(LOSSES) - {"dpo_discopop"} | {"dpo_sft"} | of_reward_model
    for case in cases:
        loss, grad = ours(case, x)
        np.testing.assert_allclose(loss, arrays[f"{rows}/{case}/loss"], rtol=1e-5, atol=1e-5, err_msg=case)
        expected = arrays[f"{rows}/{case}/grad"]
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6, err_msg=case)
        assert rows == "extreme" or np.abs(expected[:B]).max() > 1e-4


@pytest.mark.parametrize("rows", ["ordinary", "extreme"])
def test_losses_and_gradients_equal_those_of_trl(rows):
    check_against(stored(), rows)


@pytest.mark.parametrize("rows", ["ordinary", "extreme"])
def test_losses_and_gradients_equal_those_of_trl_live(rows):
    pytest.importorskip("torch", reason="needs torch and trl: the golden file stands in for them")
    pytest.importorskip("trl")
    x = make_preference.inputs(rows)
    found = make_preference.computed(rows, x)
    check_against({f"{rows}/{name}": value for name, value in (x | found).items()}, rows)


def test_golden_inputs_are_what_the_script_makes():
    for rows in ("ordinary", "extreme"):
        for name, value in make_preference.inputs(rows).items():
            np.testing.assert_array_equal(value, stored()[f"{rows}/{name}"])
    extreme = stored()["extreme/logprobs"].sum(1) - stored()["extreme/ref"]
    assert np.abs(extreme).max() > 1000 and (extreme == 0).sum() >= 2


# ---- laws of all


def random_columns(seed=0, pairs=6):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = rng.uniform(0.5, 1, pairs).astype(np.float32)
    return {
        "logprobs": -np.abs(draw(pairs, 2)) * 5,
        "ref_logprobs": -np.abs(draw(pairs, 2)) * 5,
        "lengths": rng.integers(1, 9, (pairs, 2)).astype(np.float32),
        "labels": np.array([1, 0.75, 0.5, 0.25, 0, 1], np.float32)[:pairs],
        "margins": np.abs(draw(pairs)),
        "weights": weights / weights.sum(),
        "token_weights": np.stack([weights / 50, 0 * weights], 1),
    }


ALL = pytest.mark.parametrize("case", LOSSES)
OF_PAIRS = pytest.mark.parametrize("case", [case for case in LOSSES if not case.startswith("kto")])


@ALL
def test_losses_promote_no_dtype(case):
    with jax.numpy_dtype_promotion("strict"):
        shapes = jax.eval_shape(partial(call, LOSSES[case], **options_of(case)), random_columns())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}


@ALL
def test_losses_and_metrics_of_microbatches_add_up(case):
    """KTO's baseline is of a microbatch: it adds up where it is the same in each."""
    cols = random_columns()
    if case == "kto_kto":
        cols["ref_logprobs"][:, 1] = cols["logprobs"][:, 1] - 0.3
    whole = call(LOSSES[case], cols, **options_of(case))
    parts = [
        call(LOSSES[case], {name: value[rows] for name, value in cols.items()}, **options_of(case))
        for rows in (slice(0, 2), slice(2, 6))
    ]
    jax.tree.map(lambda a, b, w: np.testing.assert_allclose(a + b, w, rtol=1e-5, atol=1e-6), *parts, whole)


@ALL
def test_a_row_without_weight_changes_nothing(case):
    cols = random_columns()
    for name in ("weights", "token_weights"):
        cols[name][5] = 0
    before = call(LOSSES[case], cols, **options_of(case))
    cols["logprobs"][5] -= 7
    cols["ref_logprobs"][5] += 3
    assert jax.tree.map(float, before) == jax.tree.map(float, call(LOSSES[case], cols, **options_of(case)))


@OF_PAIRS
def test_a_soft_label_is_the_expectation_over_raters_and_swapping_a_pair_and_its_label_changes_nothing(case):
    cols, fun = random_columns(pairs=1), partial(call, LOSSES[case], **options_of(case))
    cols["token_weights"] *= 0
    at = [float(fun({**cols, "labels": np.array([label], np.float32)})[0]) for label in (0.0, 0.3, 1.0)]
    assert at[1] == pytest.approx(0.7 * at[0] + 0.3 * at[2], rel=1e-5)
    swapped = {name: value[:, ::-1] if value.ndim == 2 else value for name, value in cols.items()}
    assert float(fun({**swapped, "labels": np.array([0.7], np.float32)})[0]) == pytest.approx(at[1], rel=1e-5)


@pytest.mark.parametrize("case", [case for case in LOSSES if not case.startswith(("kto", "dpo_discopop"))])
def test_where_it_starts_the_chosen_response_is_pushed_up_against_the_rejected_one(case):
    """But for DiscoPOP, whose valley begins further right (the paper's fig. 3)."""
    cols = random_columns()
    cols["logprobs"] *= 0.1
    cols |= {"labels": np.ones(6, np.float32), "ref_logprobs": cols["logprobs"], "lengths": cols["lengths"] * 0 + 4}
    if case == "orpo":
        cols["token_weights"] *= 0
    grad = jax.grad(lambda p: call(LOSSES[case], {**cols, "logprobs": p}, **options_of(case))[0])(cols["logprobs"])
    assert (grad[:, 0] < grad[:, 1]).all()


def one(logprobs, ref=(0.0, 0.0), *, label=1.0, margin=0.0, lengths=(1, 1)):
    arrays = {"logprobs": [logprobs], "ref_logprobs": [ref], "lengths": [lengths], "labels": [label]}
    arrays |= {"margins": [margin], "weights": [1.0], "token_weights": [[0.0, 0.0]]}
    return {name: np.array(value, np.float32) for name, value in arrays.items()}


def test_dpo_of_a_policy_that_is_its_reference_is_log_2_with_half_beta_as_gradient():
    cols = one((-5.0, -9.0), (-5.0, -9.0))
    loss, grad = jax.value_and_grad(
        lambda p: call(losses.dpo_loss, {**cols, "logprobs": p}, beta=0.1, label_smoothing=0.0)[0]
    )(cols["logprobs"])
    assert float(loss) == pytest.approx(math.log(2))
    np.testing.assert_allclose(grad, [[-0.05, 0.05]], rtol=1e-6)


def test_dpo_known_answers():
    dpo = lambda *args, smooth=0.0, **kwargs: float(  # noqa: E731
        call(losses.dpo_loss, one(*args, **kwargs), beta=0.5, label_smoothing=smooth)[0]
    )
    assert dpo((-2.0, -6.0), (-3.0, -3.0)) == pytest.approx(math.log1p(math.exp(-2)))
    assert dpo((-2.0, -6.0), (-3.0, -3.0), margin=2.0) == pytest.approx(math.log(2))
    assert dpo((-2.0, -6.0), (-3.0, -3.0), label=0.0) == pytest.approx(math.log1p(math.exp(2)))
    assert dpo((-2.0, -6.0), (-3.0, -3.0), smooth=0.25) == pytest.approx(dpo((-2.0, -6.0), (-3.0, -3.0), label=0.75))


def test_ipo_is_least_where_the_log_ratios_per_token_differ_by_its_target():
    ipo = lambda p: call(losses.ipo_loss, {**one(0, lengths=(4, 2)), "logprobs": p}, beta=0.1)[0]  # noqa: E731
    at = jnp.array([[-4.0, -12.0]])  # -1 and -6 per token: 5 apart, 1 / (2 beta)
    assert float(ipo(at)) == 0 and not jax.grad(ipo)(at).any()
    assert jax.grad(ipo)(at + jnp.array([[1.0, 0.0]]))[0, 0] > 0 > jax.grad(ipo)(at - jnp.array([[1.0, 0.0]]))[0, 0]


@pytest.mark.parametrize("mean", [-30.0, -1e-3, -1e-9, 0.0])
def test_orpo_is_finite_where_the_model_is_sure(mean):
    cols = one((3 * mean, -3.0), lengths=(3, 3))
    loss, grad = jax.value_and_grad(lambda p: call(losses.orpo_loss, {**cols, "logprobs": p}, beta=0.1)[0])(
        cols["logprobs"]
    )
    assert np.isfinite(loss) and np.isfinite(grad).all()


def test_discopop_is_finite_and_all_but_zero_far_out():
    for d in (-1000.0, 1000.0):
        cols = one((d, 0.0))
        fun = lambda p: call(losses.discopop_loss, {**cols, "logprobs": p}, beta=1.0, discopop_tau=0.05)[0]  # noqa: B023, E731
        value, grad = jax.value_and_grad(fun)(cols["logprobs"])
        assert float(value) == pytest.approx(max(-d, 0.0)) and np.isfinite(grad).all()


def kto(mismatched, label, own=0.0):
    cols = one((own, mismatched), label=label)
    options = {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 2.0}
    fun = lambda p: call(losses.kto_loss, {**cols, "logprobs": p}, **options)[0]  # noqa: E731
    value, grad = jax.value_and_grad(fun)(cols["logprobs"])
    return float(value), grad[0]


def test_kto_known_answers():
    assert kto(0.0, 1.0)[0] == 0.5 and kto(0.0, 0.0)[0] == 1.0  # undesirable ones weigh double here
    assert kto(2.0, 1.0, own=2.0)[0] == 0.5  # as good as the KL
    assert kto(-3.0, 1.0)[0] == 0.5  # an estimate below 0 counts as 0
    assert kto(4.0, 1.0)[0] == pytest.approx(1 / (1 + math.exp(-2)))
    assert kto(4.0, 1.0)[1][0] < 0 < kto(4.0, 0.0)[1][0] and kto(4.0, 1.0)[1][1] == 0  # no gradient by the baseline


@ALL
def test_gradients_equal_finite_differences(case):
    """KTO's second column is its baseline, which has no gradient."""
    cols, own = random_columns(), 1 if case.startswith("kto") else 2

    def of(x):
        logprobs = jnp.concatenate([x, cols["logprobs"][:, own:]], axis=1)
        return call(LOSSES[case], {**cols, "logprobs": logprobs}, **options_of(case))[0]

    check_grads(jax.jit(of), (cols["logprobs"][:, :own],), 1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)
