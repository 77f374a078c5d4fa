"""Laws of packed rows: every token has its place, a network says of it what it says of the row alone, one compile."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ARCH, make_rollout, model_params
from tiny import bigram_params as some_params

from rlhf_jax import group, ppo
from rlhf_jax.config import RLOO, GroupConfig, MeshConfig, PPOConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.models import Model
from rlhf_jax.online.core import packed
from rlhf_jax.sharding import make_mesh
from rlhf_jax.tokens import Packed, token_weights
from rlhf_jax.training.packing import Layout, Sharing, first_fit, pack
from rlhf_jax.training.step import accumulated_grads

ROWS, PROMPT, NEW = 24, 4, 8


def ragged(seed: int, longest: int = NEW) -> tuple[jax.Array, jax.Array]:
    """tokens int32[R, S] and what is real of them: left-padded prompts, right-padded responses, two of them empty."""
    rng = np.random.default_rng(seed)
    prompt = np.arange(PROMPT) >= rng.integers(0, PROMPT, ROWS)[:, None]
    response = np.arange(NEW) < np.append([0, 0, longest], rng.integers(1, longest + 1, ROWS - 3))[:, None]
    tokens = rng.integers(0, 20, (ROWS, PROMPT + NEW)).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(np.concatenate([prompt, response], axis=1))


@functools.partial(jax.jit, static_argnames="layout")
def packed_of(tokens, real, layout) -> Packed:
    return pack(tokens, real, NEW, layout)


TOGETHER = Layout.of(ROWS, PROMPT, NEW, tokens=30, most=0)
SEVERAL = Layout.of(ROWS, PROMPT, NEW, tokens=30, most=0, sharing=Sharing(1, 1000))
APART = Layout.of(ROWS, PROMPT, NEW, tokens=0, most=8)


@pytest.mark.parametrize("layout", [TOGETHER, SEVERAL, APART], ids=["together", "several", "apart"])
@pytest.mark.parametrize("seed", range(3))
def test_every_token_of_every_row_has_one_column_and_a_row_stays_in_one_piece(layout, seed):
    tokens, real = (np.asarray(x) for x in ragged(seed))
    packed = jax.device_get(packed_of(tokens, real, layout))
    assert packed.tokens.shape == (layout.sequences, layout.microbatches, layout.length)
    found, counts = {}, np.zeros((ROWS, NEW + 1), int)
    names = ("tokens", "positions", "segment_ids", "row", "place", "ends")
    segments = zip(*(getattr(packed, name).reshape(-1, layout.length) for name in names), strict=True)
    for ids, positions, segment, row, place, ends in segments:
        for number in set(segment.tolist()) - {0}:
            (at,) = np.nonzero(segment == number)
            assert (np.diff(at) == 1).all() and (positions[at] == np.arange(len(at))).all()
            (own,) = set(row[at].tolist()) - {ROWS}
            spoken = at[row[at] == own]
            counts[own, place[spoken]] += 1
            assert ends[spoken].tolist() == [False] * (len(spoken) - 1) + [True] and spoken[-1] == at[-1]
            found[own] = ids[at].tolist()
        assert (row[segment == 0] == ROWS).all() and not ends[segment == 0].any()
    lengths = real[:, PROMPT:].sum(1)
    assert found == {r: tokens[r][real[r]].tolist() for r in range(ROWS) if lengths[r]}
    np.testing.assert_array_equal(counts, (np.arange(NEW + 1) <= lengths[:, None]) & (lengths[:, None] > 0))


def test_what_columns_say_returns_to_the_rows_by_views():
    tokens, real = ragged(3)
    packed = packed_of(tokens, real, TOGETHER)
    mask, used = np.asarray(real[:, PROMPT:]), int(packed.used)
    assert 1 < used < TOGETHER.microbatches
    targets, ends, rows = np.zeros((ROWS, NEW)), np.zeros(ROWS), np.zeros(ROWS, int)
    for i in range(used):
        view = packed.at(i)
        targets += view.to_rows(jnp.where(view.predicts, view.targets, 0), NEW)
        ends += view.at_ends(view.tokens)
        rows += np.asarray(view.rows)
    np.testing.assert_array_equal(targets, np.where(mask, tokens[:, PROMPT:], 0))
    last = np.asarray(tokens)[np.arange(ROWS), PROMPT + mask.sum(1) - 1]
    np.testing.assert_array_equal(ends, np.where(mask.any(1), last, 0))
    np.testing.assert_array_equal(rows, mask.any(1))
    assert all(not packed.at(i).rows.any() for i in range(used, TOGETHER.microbatches))


def test_rows_of_one_prompt_stand_behind_one_copy_of_it_as_far_as_a_sequence_holds_them():
    tokens, real = (np.array(x) for x in ragged(6))
    real[:3], tokens[:, :PROMPT], real[:, :PROMPT] = (
        True,
        tokens[::4, :PROMPT].repeat(4, 0),
        real[::4, :PROMPT].repeat(4, 0),
    )
    layout = Layout.of(ROWS, PROMPT, NEW, tokens=40, most=0, sharing=Sharing(4, 1000))
    assert (layout.length, layout.shared) == (PROMPT - 1 + 4 * (NEW + 1), True)
    long = Layout.of(64, 256, 1024, tokens=4096, most=0, sharing=Sharing(8, 2048))
    assert long.length == 27 * 128 > Sharing(8, 2048).columns(3, 256, 1024) == 3330  # three rows, in whole lanes
    packed = jax.device_get(packed_of(tokens, real, layout))
    lengths, prompts = real[:, PROMPT:].sum(1), real[:, :PROMPT].sum(1)
    leaders = range(0, ROWS, 4)
    assert (packed.segment_ids > 0).sum() == (lengths + (lengths > 0)).sum() + sum(
        prompts[g] - 1 for g in leaders if lengths[g : g + 4].any()
    )
    view, said = jax.tree.map(lambda x: x.reshape(-1, layout.length), packed), np.zeros((ROWS, NEW), int)
    for m, s in np.argwhere(view.predicts):
        segment = view.segment_ids[m] == view.segment_ids[m, s]
        seen = segment & (np.arange(layout.length) <= s) & np.isin(view.branches[m], [0, view.branches[m, s]])
        row, place = view.row[m, s], view.place[m, s]
        assert view.tokens[m][seen].tolist() == tokens[row][real[row]][: prompts[row] + place].tolist()
        assert view.positions[m][seen].tolist() == list(range(prompts[row] + place))
        said[row, place] += 1
    np.testing.assert_array_equal(said, real[:, PROMPT:])


def test_a_prompt_is_shared_where_it_is_long_and_a_microbatch_holds_several_responses():
    at = lambda prompt, new, tokens, width=4096: Sharing(8, width).together(64, prompt, new, tokens, 64)  # noqa: E731
    assert at(1024, 512, 8192) == 8 and at(1024, 512, 4096) == 5 and at(1024, 512, 1024) == 1
    assert at(256, 128, 1024, width=256) > 1 and at(8, 512, 8192, width=64) == 1


def test_a_sequence_is_for_several_rows_where_attention_to_its_columns_is_cheap_and_every_row_finds_room():
    """Rows between half and whole, of which a sequence for one holds one; full ones, which fill all there is."""
    at = lambda tokens, most, width: Sharing(1, width).together(most, 256, 256, tokens, most)  # noqa: E731
    assert [at(4096, 8, 4096), at(4096, 1, 4096), at(1023, 8, 4096), at(4096, 8, 256)] == [4, 1, 1, 1]
    # 16 full rows of 128 in sequences for three would leave an eighth of six empty; 2 x 1024 hold them.
    layout = Layout.of(16, 64, 64, tokens=1024, most=16, sharing=Sharing(1, 512))
    assert layout.full * layout.sequences * layout.length == 16 * 128
    for least, shares in ((NEW // 2, (0.8, 1)), (NEW, (0.99, 1))):
        response = np.arange(NEW) < np.random.default_rng(0).integers(least, NEW + 1, ROWS)[:, None]
        real = jnp.asarray(np.concatenate([np.arange(PROMPT) >= np.zeros((ROWS, 1)), response], axis=1))
        packed = packed_of(jnp.zeros((ROWS, PROMPT + NEW), jnp.int32), real, SEVERAL)
        assert (packed.segment_ids > 0).sum() == real.sum() and shares[0] <= packed.filled <= shares[1]
    assert packed.used == packed.full == SEVERAL.microbatches == ROWS // 2


def test_short_rows_take_few_microbatches_and_no_compilation_of_their_own():
    packed_of.clear_cache()
    used = [int(packed_of(*ragged(0, longest), TOGETHER).used) for longest in (1, 4, 8)]
    assert packed_of._cache_size() == 1
    assert used[0] < used[1] < used[2] <= TOGETHER.microbatches


def test_first_fit_needs_at_most_eleven_ninths_of_the_fewest_and_one():
    """The fewest are known: whole sequences of 64 are cut into pieces."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cuts = np.sort(rng.integers(1, 64, (12, 4)), axis=1)
        claims = rng.permutation(np.diff(cuts, axis=1, prepend=0, append=64).reshape(-1))
        sequence, first = (np.asarray(x) for x in jax.jit(first_fit, static_argnums=1)(jnp.asarray(claims), 64))
        taken = np.zeros((len(claims), 64), int)
        for to, at, claim in zip(sequence, first, claims, strict=True):
            taken[to, at : at + claim] += 1
        assert taken.max() == 1 and taken.sum() == claims.sum()
        assert taken.any(axis=1).sum() <= 11 / 9 * 12 + 1


def test_a_network_says_of_a_packed_row_what_it_says_of_the_row_alone():
    """Sums over keys run in another order: 2e-6."""
    model, (tokens, real) = Model(ARCH), ragged(4)
    params = model_params(model, 0)

    @jax.jit
    def said(view):
        hidden = model.apply(params, **view.inputs)
        logprobs = jnp.where(view.predicts, model.logprobs(params, hidden, view.targets)[0], 0)
        return view.to_rows(logprobs, NEW), view.to_rows(hidden[..., 0], NEW), view.at_ends(hidden[..., 0])

    found = []
    for layout in (TOGETHER, APART):
        packed = packed_of(tokens, real, layout)
        parts = [said(packed.at(i)) for i in range(int(packed.used))]
        found.append(jax.tree.map(lambda *xs: sum(xs), *parts))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=2e-6)
    assert np.abs(found[0][0])[np.asarray(real[:, PROMPT:])].min() > 0


def test_on_a_mesh_rows_lie_as_on_one_device_and_microbatches_over_the_devices():
    tokens, real = ragged(5)
    alone = jax.device_get(packed_of(tokens, real, TOGETHER))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)).grid):
        layout = Layout.of(ROWS, PROMPT, NEW, tokens=30, most=0)
        assert layout.sequences == 4 * TOGETHER.sequences
        packed = packed_of(tokens, real, layout)
        assert packed.tokens.addressable_shards[0].data.shape[0] == TOGETHER.sequences
    by_sequence = lambda x: np.asarray(x).swapaxes(0, 1).reshape(-1, PROMPT + NEW)[:ROWS]  # noqa: E731
    packed = dataclasses.replace(packed, full=alone.full)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(by_sequence(a), by_sequence(b)), packed, alone)


# --- methods

POLICY, CRITIC = Model(ARCH), Model(ARCH, score_head=True)
PARAMS = {"policy": model_params(POLICY, 0), "value": model_params(CRITIC, 1)}
REF, SCORER, ONE = model_params(POLICY, 2), model_params(CRITIC, 3), jnp.float32(1.0)
METHODS = {
    "ppo": (ppo.Models(POLICY, CRITIC, CRITIC), PPOConfig(score_at="after_eos", entropy_coef=0.01)),
    "grpo": (group.Models(POLICY, CRITIC), GroupConfig(group_size=4, mask_truncated=True)),
    "rloo": (group.Models(POLICY, CRITIC), RLOO),
}


@pytest.mark.parametrize("name", METHODS)
def test_scores_and_gradients_of_packed_rows_are_those_of_rows_apart(name):
    """Sums run in another order: 1e-5, of gradients up to 4 and of advantages, which are divided by a deviation."""
    models, config = METHODS[name]
    module, params = (ppo, PARAMS) if name == "ppo" else (group, {"policy": PARAMS["policy"]})
    rollout, host = make_rollout(4, some_params(0)["policy"], rows=16), jnp.linspace(-1, 1, 16)
    of_group = {n: jnp.repeat(getattr(rollout, n)[::4], 4, axis=0) for n in ("prompt", "prompt_mask")}
    rollout, sharing = dataclasses.replace(rollout, **of_group), Sharing(4, 16) if module is group else None

    def both(config, x):
        found = module.make_score(models, config, recompute=True)(params, REF, SCORER, rollout, host, ONE, ONE)
        x = found[0] if x is None else x
        weights = {"weights": token_weights(x.mask, config.loss_reduction)}
        if name == "ppo":
            weights["value_weights"] = token_weights(x.value_mask, config.loss_reduction)
        batch = {"experience": x, "packed": packed(x, config, sharing=sharing), "temperature": ONE, **weights}
        grads = accumulated_grads(module.objective(models, config), params, batch, jax.random.key(0), 1)
        return found, grads, batch["packed"].used

    apart, grads, used = jax.jit(functools.partial(both, replace(config, microbatch_tokens=0)))(None)
    x = apart[0]
    found, packed_grads, many = jax.jit(functools.partial(both, replace(config, microbatch_tokens=24)))(x)
    assert used == 1 and many > 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, apart)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), packed_grads, grads)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[0])) > 1e-2
