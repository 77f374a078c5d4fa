"""Laws of layers with experts: what they compute and cost, their balance, meshes, adapters, replay of routing."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import V, model_params, text_batch, toy_directory

from rlhf_jax import losses, sft
from rlhf_jax.commands.plan.flops import count_flops
from rlhf_jax.commands.plan.hlo import traffic
from rlhf_jax.config import ArchConfig, LoRAConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig, SFTArgs
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.inference.sampling import SamplingLaw, sample
from rlhf_jax.models import Model, hf
from rlhf_jax.models.exchange import over_devices, room
from rlhf_jax.models.experts import Experts, Routing, balance_loss, balanced
from rlhf_jax.models.grouped import COUNTED, Places, by_blocks, by_key, by_parts, collect, grouped, spread
from rlhf_jax.models.hf import stored
from rlhf_jax.models.kernels import attached, dense, merged, quantized
from rlhf_jax.models.loading import Loaded, adapted, load_model, save_model
from rlhf_jax.models.pure import pure
from rlhf_jax.online.core import packed, response_logprobs
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.sharding import make_mesh, put_batch, tree_shardings
from rlhf_jax.training import supervised
from rlhf_jax.training.state import TrainState, create_state, make_optimizer, make_schedule
from rlhf_jax.training.step import make_train_step, make_update

ARCH = ArchConfig(
    vocab_size=V, width=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=8, max_positions=40,
    num_experts=8, experts_per_token=2, qk_norm="head",
)  # fmt: skip
GLM = replace(
    ARCH, num_layers=2, router="sigmoid", router_groups=2, routed_scale=1.5, shared_width=8, dense_layers=1,
    dense_width=16,
)  # fmt: skip
OSS = replace(
    ARCH, qk_norm="none", mlp_bias=True, router_bias=True, attn_sinks=True, glu_limit=0.05, window_layers=(0,),
    sliding_window=3,
)  # fmt: skip
BESIDE = replace(ARCH, expert_width=6, router_scaled=True, norm_position="both", norm_topk=True)  # as in Gemma 4
LAW = SamplingLaw(jnp.float32(1), jnp.int32(0), jnp.float32(1), jnp.int32(0))


# --- one layer


def layer_and_inputs(experts: int, rows: int, width: int = 16):
    """(arch, a layer, its parameters, x [2, T, D], mask)."""
    arch = replace(ARCH, num_experts=experts, width=width, ffn_width=width)
    layer = pure(lambda rngs: Experts(arch, jax.nn.silu, rngs=rngs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), layer.init(jax.random.key(0)))
    x = rng.normal(size=(2, rows // 2, width)).astype(np.float32)
    return arch, layer, params, jnp.asarray(x), jnp.asarray(rng.random((2, rows // 2)) < 0.7)


def by_all_experts(arch, params, x, real):
    """The same by all experts for every token, weighed by 0 where they are not chosen."""
    probs = jax.nn.softmax(jnp.einsum("btd,de->bte", x, params["router"], precision="highest"))
    least = jnp.sort(probs, axis=-1)[..., -arch.experts_per_token, None]
    gates = jnp.where(probs >= least, probs, 0.0)
    gates = gates / gates.sum(-1, keepdims=True) * real[..., None]
    up = jnp.einsum("btd,edmf->mbtef", x, params["up"], precision="highest")
    y = jnp.einsum("btef,efd->bted", jax.nn.silu(up[0]) * up[1], params["down"], precision="highest")
    return jnp.einsum("bted,bte->btd", y, gates, precision="highest")


def test_a_layer_is_what_all_experts_make_weighed_by_the_router():
    """Blocks of several rows, and few tokens; padding gets nothing and counts nowhere, and no token is dropped."""
    experts = 4
    arch, layer, params, x, real = layer_and_inputs(experts, 160)
    weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    ours = lambda params, x: jnp.sum(weight * layer.apply(params, x, real)[0] * real[..., None])  # noqa: E731
    theirs = lambda params, x: jnp.sum(weight * by_all_experts(arch, params, x, real))  # noqa: E731
    (found, expected) = (jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(params, x) for fn in (ours, theirs))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), found, expected)
    apply = jax.jit(layer.apply)
    y, routing = apply(params, x, real)
    assert not y[~real].any() and (routing.chosen[~real] == experts).all()
    assert routing.counts.sum() == 2 * real.sum() == 2 * routing.tokens
    skewed = {**params, "router": params["router"] * 0 + 50 * (np.arange(experts) < 2)}  # all to the first two
    counts = apply(skewed, jnp.abs(x), real)[1].counts
    assert counts[:2].tolist() == [real.sum()] * 2 and not counts[2:].any()
    half = x.astype(jnp.bfloat16)  # the router is in float32 all the same
    jax.tree.map(
        np.testing.assert_array_equal, apply(params, half, real)[1], apply(params, half.astype(x.dtype), real)[1]
    )
    few, mask = x[:, :3], real[:, :3]  # which all experts get
    np.testing.assert_allclose(apply(params, few, mask)[0], by_all_experts(arch, params, few, mask), atol=1e-5)


@pytest.mark.parametrize(("number", "count"), [(5, 3), (COUNTED, 2), (3 * COUNTED + 1, 7)])
def test_keys_are_counted_into_the_order_of_a_stable_sort(number, count):
    keys = np.random.default_rng(number).integers(0, count + 1, number).astype(np.int32)  # the largest belong nowhere
    order, place, counts, first = by_key(jnp.asarray(keys), count)
    expected = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(place[expected], np.arange(number))
    np.testing.assert_array_equal(counts, np.bincount(keys, minlength=count + 1)[:count])
    np.testing.assert_array_equal(first, np.searchsorted(keys[expected], np.arange(count)))


def test_the_compiled_layer_costs_what_active_experts_cost():
    """Forward and backward: at most 1.15 times the products of the k experts of each token."""
    arch, layer, params, x, real = layer_and_inputs(16, 1024, width=64)
    loss = lambda params, x: jnp.sum(layer.apply(params, x, real)[0] ** 2)  # noqa: E731
    cost = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile().cost_analysis()["flops"]
    tokens, width = x.shape[0] * x.shape[1], x.shape[2]
    active = 3 * 2 * tokens * (arch.experts_per_token * 3 * width * arch.ffn_width + width * arch.num_experts)
    assert 1 < cost / active < 1.15


def test_no_pass_over_all_pairs_clears_what_nobody_reads():
    """Forward: a TPU would not join it with the gather before it. Over the axis of experts neither."""
    _, layer, params, x, real = layer_and_inputs(16, 1024, width=64)
    mesh = make_mesh(MeshConfig(data=1, expert=4), devices=jax.devices()[:4])
    for grid, gathers in ((contextlib.nullcontext(), 2), (jax.set_mesh(mesh.grid), 4)):
        with grid:
            text = str(jax.make_jaxpr(lambda params, x: layer.apply(params, x, real)[0])(params, x))
        found = re.findall(r":f32\[([\d,]+),64\] = gather\[.*?mode=GatherScatterMode\.(\w+)", text, re.DOTALL)
        assert len(found) >= gathers and {mode for _, mode in found} <= {"CLIP", "PROMISE_IN_BOUNDS"}, found


def test_of_rows_that_nobody_reads_nothing_gets_into_gradients():
    """Also where they are no numbers, as a TPU may leave them: padding gets 0, and so do places without a pair."""
    chosen = np.random.default_rng(0).integers(0, 4, (96, 2)).astype(np.int32)
    chosen[::3] = 4  # padding
    places = Places.of(jnp.asarray(chosen), 4)
    source, place = np.asarray(places.source), np.asarray(places.place)
    read, real = source < chosen.size, chosen[:, 0] < 4
    assert not read[-1] and (place[~real] == len(source)).all()
    x, rows = (np.random.default_rng(1).normal(size=(size, 3)).astype(np.float32) for size in (96, len(source)))
    given = jnp.where(read[:, None], rows, jnp.nan)
    (by_token,) = jax.vjp(lambda x: spread(x, places), jnp.asarray(x))[1](given)
    expected = np.where(real[:, None], rows[np.where(real[:, None], place, 0)].sum(1), 0)
    np.testing.assert_allclose(by_token, expected, rtol=1e-6)
    given = jnp.where(real[:, None, None], jnp.stack([x, x], axis=1), jnp.nan)
    (by_row,) = jax.vjp(lambda y: collect(y, places), jnp.asarray(rows))[1](given)
    np.testing.assert_array_equal(by_row, np.where(read[:, None], x[np.where(read, source // 2, 0)], 0))


def test_few_tokens_copy_no_weights_of_experts():
    """All bytes that the program moves are fewer than four times the weights'; by blocks they were nine times."""
    _, layer, params, x, real = layer_and_inputs(16, 32, width=64)
    compiled = jax.jit(lambda params, x: layer.apply(params, x, real)[0]).lower(params, x).compile()
    assert compiled.cost_analysis()["bytes accessed"] < 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_decoding_cuts_nothing_out_of_the_weights_of_experts():
    """A TPU would copy gate and up for every token: its kernel reads whole arrays. They are apart in what decodes."""
    arch, layer, _, x, real = layer_and_inputs(16, 32)
    model = Model(arch, compute_dtype=jnp.dtype("bfloat16"))
    params = model_params(model, 0)
    read, trained = model.decoding_params(params)["layers"][0]["experts"], params["layers"]["experts"]["up"][0]
    whole = trained.astype(jnp.bfloat16)
    np.testing.assert_array_equal(jnp.stack(read["up"].parts, axis=2), whole)

    def cuts(up):
        apply = jax.jit(lambda params: layer.apply(params, x.astype(jnp.bfloat16), real)[0])
        text = apply.trace({**read, "up": up}).lower(lowering_platforms=("tpu",)).as_text()
        return len(re.findall(r"stablehlo.slice %\w+ .* : \(tensor<16x16x2x16xbf16>\)", text))

    assert cuts(whole) == 2 and cuts(read["up"]) == 0


def test_plan_counts_what_all_devices_of_a_mesh_multiply():
    """A quarter of the tokens and an even share of the experts each, room to spare, blocks not all full."""
    _, layer, params, x, real = layer_and_inputs(16, 1024, width=64)
    mesh = make_mesh(MeshConfig(data=1, expert=4), devices=jax.devices()[:4])
    x, real = x.reshape(4, -1, 64), real.reshape(4, -1)
    run = lambda params, x: layer.apply(params, x, real)[0]  # noqa: E731
    trained = jax.grad(lambda params, x: jnp.sum(jax.checkpoint(run)(params, x) ** 2), argnums=(0, 1))
    alone = [count_flops(jax.make_jaxpr(f)(params, x).jaxpr) for f in (run, trained)]
    with jax.set_mesh(mesh.grid):
        # Further rounds, for loads that are uneven, count nothing: forward, and where they are differentiated.
        for f, one in zip((run, trained), alone, strict=True):
            assert 1 < count_flops(jax.make_jaxpr(f)(params, x).jaxpr) / one < 1.5
        moved = traffic(jax.jit(trained).lower(params, x).compile().as_text()).collectives["all-to-all"]
    swap = 4 * room(2 * x.shape[1], 4) * x.shape[2] * 4  # bytes: two experts of each token of a device, in float32
    # There and back: forward, perhaps again, and backward; and the experts' ids.
    assert 4 * swap <= moved <= 6.2 * swap


def test_of_what_goes_over_the_axis_a_ragged_product_multiplies_little_more_than_the_pairs():
    """On TPU, where the room that a device keeps for a crowd costs nothing: whole blocks, at most 1.15 times."""
    _, _, params, x, _ = layer_and_inputs(16, 1024, width=64)
    x = x.reshape(4, -1, 64)
    chosen = jnp.asarray(np.random.default_rng(2).integers(0, 16, (*x.shape[:2], 2)), jnp.int32)

    def rows(x, chosen, up, down, bias):  # in place of the products: of how many rows they are
        counts = Places.of(chosen, down.shape[0]).counts.sum()
        return jnp.broadcast_to(counts.astype(jnp.float32), (*chosen.shape, x.shape[1]))

    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=4), devices=jax.devices()[:4]).grid):
        found = jax.jit(functools.partial(over_devices, rows))(x, chosen, params["up"], params["down"], None)
    multiplied = sum(found[chosen // 4 == device].max() for device in range(4))
    assert 1 < multiplied / chosen.size < 1.15


def test_the_balance_loss_is_that_of_transformers():
    arch, layer, params, x, real = layer_and_inputs(8, 60)
    apply = jax.jit(layer.apply)
    routings = [apply({**params, "router": params["router"] * scale}, x, real)[1] for scale in (1.0, 0.3)]
    found = balance_loss(jax.tree.map(lambda *parts: jnp.stack(parts), *routings))
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    logits = [np.array(x.reshape(-1, 16) @ (params["router"] * scale)) for scale in (1.0, 0.3)]
    expected = modeling.load_balancing_loss_func(
        tuple(map(torch.from_numpy, logits)), 8, arch.experts_per_token, torch.from_numpy(np.array(real))
    )
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)


def test_loads_are_the_busiest_expert_over_the_mean_the_idle_ones_and_a_loss_that_is_k_where_all_is_even():
    counts, probs = jnp.array([[8.0, 0, 0, 0], [2, 2, 2, 2]]), jnp.array([[1.0, 1, 1, 1], [1, 1, 1, 1]])
    routing = Routing(jnp.zeros((2, 1, 4, 2), jnp.int32), counts, probs, jnp.full(2, 4.0))
    loss, metrics = balanced(0.5, jnp.float32(1), {"loss": 3}, routing, jnp.float32(0.25))
    assert metrics["experts/load_max"] == 4 and metrics["loss"] == 3
    assert metrics["experts/idle"] / metrics["experts/idle_weight"] == 3 / 8
    assert metrics["experts/balance_loss"] / metrics["experts/balance_loss_weight"] == 2
    assert loss == 1 + 0.5 * 0.25 * 2
    crowded = routing._replace(probs=jnp.array([[4.0, 0, 0, 0], [1, 1, 1, 1]]))
    assert balance_loss(crowded) > balance_loss(routing)
    assert balanced(0.0, jnp.float32(1), {}, routing, jnp.float32(1))[0] == 1


# --- adapters, quantised kernels, files


def test_adapters_and_quantised_kernels_of_experts_are_their_products_and_come_back_from_files(tmp_path):
    tokenizer = Tokenizer.load(str(toy_directory() / "tokenizer"))
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    model = Model(replace(ARCH, norm_eps=1e-6))
    with jax.set_mesh(mesh.grid):
        params = jax.device_put(model_params(model, 0), tree_shardings(mesh, model_params(model, 0)))
        save_model(tmp_path / "base", Loaded(model, params), params, tokenizer)
        base = load_model(ModelConfig(path=str(tmp_path / "base")), mesh, jax.random.key(0))
        lora = LoRAConfig(rank=2, targets=["q_proj", "gate_proj", "up_proj", "down_proj"])
        loaded = adapted(base, lora, mesh, jax.random.key(1))
        filled = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), loaded.params)
        save_model(tmp_path / "tuned", loaded, filled, tokenizer)
        scale, whole = loaded.model.lora_scale, loaded.whole(filled)["layers"]
        layer = jax.tree.map(lambda x: x[0], whole)["experts"]
        up, plain = attached(layer, scale)["up"], merged(layer, scale)["up"]
        assert up.a.shape == (8, 16, 4) and not np.allclose(plain, layer["up"])
        places = Places.of(jnp.arange(12, dtype=jnp.int32).reshape(6, 2) % 8, 8)
        x = spread(jax.random.normal(jax.random.key(3), (6, 16)), places)
        np.testing.assert_allclose(grouped(x, up, places), grouped(x, plain, places), rtol=1e-4, atol=1e-5)
        # What a TPU computes is what others do, gate and up apart.
        np.testing.assert_allclose(by_parts(x, plain, places), by_blocks(x, plain, places), rtol=1e-4, atol=1e-5)
        # The merged model, and the adapter on its base, are read as the same weights.
        for folder in (tmp_path / "tuned", tmp_path / "tuned" / "adapter"):
            again = hf.load_params(folder, base.model.arch, score_head=False)
            np.testing.assert_allclose(again["layers"]["experts"]["up"][0], plain, rtol=1e-5, atol=1e-6)
        names = json.loads((tmp_path / "tuned" / "adapter" / "adapter_config.json").read_text())["target_modules"]
        assert set(names) == {"self_attn.q_proj", "gate_proj", "up_proj", "down_proj"}
    for how, bound in (("int8", 0.01), ("nf4", 0.15)):
        small = quantized(model_params(model, 0), how)
        assert small["layers"]["experts"]["up"].scale.shape[:2] == (1, 8)
        found, given = dense(small["layers"]["experts"]["down"]), params["layers"]["experts"]["down"]
        assert np.abs(found - given).max() < bound * np.abs(given).max()


def test_a_shape_that_transformers_cannot_run_is_refused():
    """OLMoE's heads share the width in transformers: norms of other widths would not load."""
    wide = replace(ARCH, qk_norm="all")
    assert hf.find_family(replace(wide, head_dim=4)).model_type == "olmoe"
    for arch in (wide, replace(ARCH, norm_topk=False, qk_norm="none"), replace(ARCH, gated_mlp=False)):
        with pytest.raises(UserError, match="no Hugging Face family has this shape; the nearest, "):
            hf.find_family(arch)


def test_kernels_in_mxfp4_are_read_as_the_dense_ones_of_transformers(tmp_path, monkeypatch):
    """Blocks of 32 four-bit numbers, the low half of a byte first, times two to the scale - 127; saved dense."""
    arch, rng = replace(OSS, width=64, ffn_width=32, num_experts=2), np.random.default_rng(0)
    hf.save_model(tmp_path, arch, jax.tree.map(np.asarray, model_params(Model(arch), 0)), eos_ids=[2])
    tensors, expected = load_file(tmp_path / "model.safetensors"), {}
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-value for value in values]
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{leaf}"
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = rng.integers(110, 140, blocks.shape[:3], np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        halves = [[values[byte % 16], values[byte // 16]] for byte in blocks.ravel()]
        dense = np.reshape(halves, (experts, outputs, inputs // 32, 32)) * 2.0 ** (scales[..., None] - 127.0)
        expected[name] = dense.reshape(experts, outputs, inputs).swapaxes(1, 2)
        with contextlib.suppress(ImportError):
            import torch
            from transformers.integrations.mxfp4 import convert_moe_packed_tensors

            theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
            np.testing.assert_array_equal(theirs.float().numpy(), expected[name])
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, raw = hf.read_config(tmp_path)
    assert found == arch
    params = hf.load_params(tmp_path, arch, score_head=False)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    apart = hf.load_params(tmp_path, arch, score_head=False, mesh=mesh)  # of blocks that two devices share, half each
    jax.tree.map(np.testing.assert_array_equal, apart, params)
    fetched, packed = [], stored.stored_tensors(tmp_path)[name]  # of one expert of two, half of the bytes
    monkeypatch.setattr(stored, "have", lambda file, ranges: fetched.extend(ranges))
    whole = packed.lazy()
    packed.bring(whole, whole[1:])
    assert 2 * sum(end - start for start, end in fetched) == blocks.nbytes + scales.nbytes
    np.testing.assert_array_equal(whole[1].astype(np.float64), expected[name][1])
    hf.save_model(tmp_path / "dense", arch, params, eos_ids=[2], dtype="bfloat16", base_config=raw)
    assert "quantization_config" not in hf.read_config(tmp_path / "dense")[1]
    saved = load_file(tmp_path / "dense" / "model.safetensors")
    for name, kernel in expected.items():
        np.testing.assert_array_equal(saved[name].astype(np.float64), kernel)
    with pytest.raises(UserError, match="no support for quantization_config"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
        hf.read_config(tmp_path)


# --- meshes


# A large epsilon keeps Adam's update smooth in the gradient: near 0 it is the sign, which rounding would decide.
OPTIM = OptimConfig(learning_rate=0.01, schedule="constant", eps=1e-2)
TX = make_optimizer(OPTIM, make_schedule(OPTIM, 2))
KEY = jax.random.key(0)


def greedy(model: Model, params, batch):
    """Two greedy tokens of every row, and their experts."""
    law = replace(LAW, temperature=jnp.float32(0))
    prompts = batch["tokens"][:, :3], batch["segment_ids"][:, :3] > 0
    options = {"max_new_tokens": 2, "stop_ids": (), "chunk": 2, "filtered": False, "routing": True}
    rollout = sample(model, params, *prompts, KEY, law, **options)
    return rollout.tokens, rollout.experts


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        (GLM, {"data": 1, "expert": 4}),
        (OSS, {"fsdp": 2, "data": 1, "expert": 2, "tensor": 2}),
        (BESIDE, {"fsdp": 2, "data": 1, "expert": 2}),
    ],
    ids=["4", "8", "beside"],
)
def test_a_mesh_with_an_axis_for_experts_gives_the_numbers_of_one_device(tmp_path, arch, sizes):
    """Metrics, parameters after a step, tokens; a step from what a checkpoint brought back is the same to the bit."""
    model, batch = Model(arch, balance_coef=0.1), text_batch(8, 9, 3)
    loss_fn = sft.objective(model, losses.next_token_loss)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape) / x.size, model_params(model, 0))
    update = make_update(loss_fn, TX)
    expected, metrics = jax.jit(update)(TrainState.create(params, TX), batch, KEY)
    drawn = jax.jit(functools.partial(greedy, model))(params, batch)
    mesh = make_mesh(MeshConfig(**sizes), devices=jax.devices()[: math.prod(sizes.values())])
    model = replace(model, rules=mesh.rules)
    assert tree_shardings(mesh, params)["layers"]["experts"]["up"].spec[1] == "expert"
    with jax.set_mesh(mesh.grid):
        batch = put_batch(mesh, batch)
        state = create_state(params, TX, mesh)
        tokens = jax.jit(functools.partial(greedy, model))(state.params, batch)
        step = make_train_step(sft.objective(model, losses.next_token_loss), TX, mesh=mesh, state=state)
        state, found = step(state, batch, KEY)
        kept = Checkpoints(tmp_path, keep_last=1, keep_every=0)
        kept.save(1, {"state": state}, {"step": 1, "best": None})
        kept.wait()
        after = jax.tree.map(np.array, state.params)
        state, _ = step(state, batch, KEY)
        on = jax.tree.map(np.array, state)
        again, _ = step(kept.restore(1, {"state": state})["state"], batch, KEY)
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6), after, expected.params)
    jax.tree.map(np.testing.assert_array_equal, tokens, drawn)
    jax.tree.map(np.testing.assert_array_equal, on, again)


def test_the_default_batch_of_few_rows_divides_over_the_axis_of_experts_too(tmp_path):
    rows = [{"prompt": "a", "response": letter} for letter in "bcdefghijk"]
    model = ModelConfig(arch=ARCH, tokenizer=str(toy_directory() / "tokenizer"))
    config = SFTArgs(model=model, mesh=MeshConfig(data=2, expert=4), run=RunConfig(output_dir=str(tmp_path / "run")))
    config = replace(config, data=replace(config.data, max_length=8, max_prompt_length=4, eval_fraction=0.0))
    claim = supervised.begin("sft", config, "sft", rows=rows, eval_rows=None, loss=None)
    with jax.set_mesh(claim.mesh.grid):
        work = supervised.setup(sft.task_of(config), claim)
    assert work.claim.config.data.batch_size == 8


@pytest.mark.parametrize(("tokens", "top", "ways"), [(8, 8, 8), (32, 8, 8), (16, 4, 4), (512, 8, 8)])
def test_even_loads_go_in_one_round_however_few_the_tokens(tokens, top, ways):
    """Eight tokens on each of eight devices, as in decoding, took two rounds every time with a quarter more alone."""
    rng, most = np.random.default_rng(tokens), []
    for _ in range(50):  # the experts of every token of every device are drawn at random, 16 on a device
        chosen = np.argpartition(rng.random((ways, tokens, 16 * ways)), top)[..., :top] // 16
        most.append(max(np.bincount(one.reshape(-1)).max() for one in chosen))
    assert np.mean(np.array(most) <= room(tokens * top, ways)) > 0.95
    assert room(2048 * 8, 8) == 1.25 * 2048 and room(4, 2) == 4  # in training, and no more than there are


def test_a_crowd_at_one_device_is_served_in_further_rounds():
    """All tokens to the experts of one device, four times an even share: nothing is dropped."""
    _, layer, params, x, real = layer_and_inputs(8, 64)
    params = {**params, "router": params["router"] * 0.01 + 50 * (np.arange(8) < 2)}
    mesh = make_mesh(MeshConfig(data=1, expert=4), devices=jax.devices()[:4])
    apply = lambda params, x: layer.apply(params, x, real)[0]  # noqa: E731
    loss = lambda params, x: jnp.sum(apply(params, jnp.abs(x)) ** 2)  # noqa: E731
    expected = jax.jit(jax.value_and_grad(loss))(params, x)
    with jax.set_mesh(mesh.grid):
        found = jax.jit(jax.value_and_grad(loss))(params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)


# --- replay


def test_replayed_tokens_go_to_the_experts_they_were_sampled_with():
    """By the sampler's weights nothing differs; by others the experts stay, and the metric counts what would not."""
    model = Model(GLM)
    params = model_params(model, 0)
    rng = np.random.default_rng(3)
    prompt, mask = jnp.asarray(rng.integers(0, V, (4, 3)), jnp.int32), jnp.ones((4, 3), bool)
    options = {"max_new_tokens": 4, "stop_ids": (1, 2, 3, 4), "chunk": 2, "filtered": False, "routing": True}
    rollout = jax.jit(functools.partial(sample, model, **options))(params, prompt, mask, jax.random.key(0), LAW)
    assert rollout.experts.shape == (4, 4, 1, 2) and (rollout.experts[rollout.mask] >= 0).all()
    assert (rollout.experts[~rollout.mask] == -1).all() and not rollout.mask.all()
    view = packed(rollout).at(0)

    @jax.jit
    def read(params, experts):
        logprobs, _, _, routing = response_logprobs(model, params, view, jnp.float32(1), 4, None, experts)
        return logprobs, routing

    logprobs, routing = read(params, rollout.experts)
    assert routing.replayed.sum() == rollout.mask.sum() and routing.differs.sum() == 0
    np.testing.assert_allclose(logprobs, rollout.logprobs, atol=1e-5)
    other = jax.tree.map(lambda x: x, params)
    other["layers"]["experts"]["router"] = -params["layers"]["experts"]["router"]
    _, routing = read(other, rollout.experts)
    assert routing.differs.sum() > 0.9 * rollout.mask.sum()
    held = view.of_tokens(rollout.experts)[:, :, 0]
    np.testing.assert_array_equal(jnp.where(held >= 0, routing.chosen[0], -1), held)
