"""Laws of low-rank adapters and quantised bases: what they compute, what is trained, where it lies."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_ppo_stage import assert_stopped_and_continued_is_left_alone
from test_preferences import pair_examples, preferences
from test_preferences import settings as dpo_settings
from test_step import assert_same_bits, differ
from tiny import ARCH, ONE, TOY_ROWS, V, iteration, model_params, save_random, toy_directory, toy_run

from rlhf_jax import losses, preference, reward, sft
from rlhf_jax.commands.inspection import run_convert
from rlhf_jax.config import (
    ArchConfig,
    ConvertArgs,
    DataConfig,
    DPOConfig,
    GroupConfig,
    GRPOArgs,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RewardArgs,
    RewardConfig,
    RewardSourceConfig,
    RunConfig,
    SamplingConfig,
    SFTArgs,
    SFTConfig,
    bind,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.data.collate import collate_preference
from rlhf_jax.errors import Stopped, UserError
from rlhf_jax.group import train as group_train
from rlhf_jax.inference.sampling import SamplingLaw, sample
from rlhf_jax.models import Model, hf
from rlhf_jax.models.hf.layout import flattened
from rlhf_jax.models.hf.table import FAMILIES
from rlhf_jax.models.kernels import Adapted, Stack, dense, joined, multiplied_out, quantized
from rlhf_jax.models.lora import init_adapters, scale_of, sites
from rlhf_jax.ppo import train as ppo_train
from rlhf_jax.preference import of_all
from rlhf_jax.sharding import make_mesh, put_batch, replicated, tree_shardings
from rlhf_jax.training import loop, supervised
from rlhf_jax.training.state import create_state, make_optimizer, make_schedule
from rlhf_jax.training.step import accumulated_grads, make_train_step, make_update

KEY = jax.random.key(0)
GROUPED = ArchConfig(
    vocab_size=V, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=64, max_positions=40
)
GPT2 = dataclasses.replace(
    GROUPED, num_kv_heads=4, norm="layer", positions="learned", gated_mlp=False, qkv_bias=True, out_bias=True,
    mlp_bias=True, activation="gelu_tanh", tied_head=True,
)  # fmt: skip
MODEL = Model(GROUPED)
ADAPTED = Model(GROUPED, lora_scale=2.5)
PARAMS = model_params(MODEL, 0, std=0.1)
TARGETS = ([], ["q_proj", "v_proj"], ["mlp.up_proj", "o_proj"], ["k_proj", "gate_proj", "down_proj"])


def adapters(arch: ArchConfig, targets=(), rank=3, *, zero=False) -> dict:
    """Fresh adapters, with a random B unless `zero`."""
    fresh = init_adapters(arch, sites(hf.find_family(arch), targets), rank, KEY)
    noise = lambda path, x: x + 0.3 * jax.random.normal(jax.random.fold_in(KEY, x.size), x.shape) * (not zero)  # noqa: E731
    return jax.tree_util.tree_map_with_path(noise, fresh)


def batch(rows=4, length=9) -> dict:
    tokens = jax.random.randint(KEY, (rows, length), 0, V)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    weights = jnp.full((rows, length), 1 / (rows * (length - 1)))
    return {"tokens": tokens, "positions": positions, "segment_ids": jnp.ones_like(tokens), "weights": weights}


def merged(model: Model, params: dict) -> dict:
    """What is saved, as arrays."""
    whole = lambda leaf: jnp.stack([leaf[i] for i in range(leaf.shape[0])])  # noqa: E731
    return jax.tree.map(lambda leaf: whole(leaf) if isinstance(leaf, Stack) else leaf, model.merged(params))


@functools.partial(jax.jit, static_argnums=0)
def logits(model: Model, params: dict) -> jax.Array:
    x = batch()
    return model.project(params, model.apply(params, x["tokens"], x["positions"], x["segment_ids"]))


def lm_loss(logprobs, weights):
    return -jnp.sum(weights * logprobs), {}


LOSS = sft.objective(ADAPTED, lm_loss)


# --- what adapters compute


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_with_b_zero_logits_have_the_bits_of_the_base(targets):
    assert_same_bits(logits(MODEL, PARAMS), logits(ADAPTED, joined(PARAMS, adapters(GROUPED, targets, zero=True))))


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_merged_equals_adapted(targets):
    whole = joined(PARAMS, adapters(GROUPED, targets))
    assert np.abs(logits(ADAPTED, whole) - logits(MODEL, PARAMS)).max() > 0.1
    np.testing.assert_allclose(logits(ADAPTED, whole), logits(MODEL, merged(ADAPTED, whole)), atol=1e-5)


def test_an_adapter_is_scale_times_a_b_on_its_own_module_alone():
    value = adapters(GROUPED, ["v_proj"])
    found = merged(ADAPTED, joined(PARAMS, value))
    parts = value["layers"]["attn"]["qkv_lora"]["value"]
    delta = 2.5 * np.einsum("ldr,lrksn->ldksn", parts["a"], parts["b"])
    before, after = PARAMS["layers"]["attn"]["qkv"], found["layers"]["attn"]["qkv"]
    np.testing.assert_allclose(after[..., -1:, :], before[..., -1:, :] + delta, atol=1e-6)
    assert_same_bits(after[..., :-1, :], before[..., :-1, :])
    rest = lambda tree: {**tree, "layers": {**tree["layers"], "attn": {"out": tree["layers"]["attn"]["out"]}}}  # noqa: E731
    assert_same_bits(rest(found), rest(PARAMS))


def test_no_update_is_lost_in_a_kernel_that_is_kept_in_bfloat16():
    kernel, a, b = (jax.random.normal(jax.random.fold_in(KEY, i), (9, 9)) for i in range(3))
    kernel, b = kernel.astype(jnp.bfloat16), b * 1e-4  # below half an ulp of most weights
    found = multiplied_out(Adapted(kernel, a, b, 2.5))
    np.testing.assert_allclose(found - kernel.astype(jnp.float32), 2.5 * np.asarray(a) @ b, atol=3e-7)


def test_gradients_are_those_of_the_merged_kernel_by_the_chain_rule():
    trained = adapters(GROUPED)
    whole = joined(PARAMS, trained)
    found, _ = accumulated_grads(lambda p, *rest: LOSS(joined(PARAMS, p), *rest), trained, batch(), KEY, 1)
    dense_grads = jax.grad(lambda p: sft.objective(MODEL, lm_loss)(p, batch(), KEY)[0])(merged(ADAPTED, whole))
    d_qkv, d_down = dense_grads["layers"]["attn"]["qkv"], dense_grads["layers"]["mlp"]["down"]
    query, down = trained["layers"]["attn"]["qkv_lora"]["query"], trained["layers"]["mlp"]["down_lora"]["whole"]
    expected = {
        "query a": 2.5 * np.einsum("ldksn,lrksn->ldr", d_qkv[..., :2, :], query["b"]),
        "query b": 2.5 * np.einsum("ldksn,ldr->lrksn", d_qkv[..., :2, :], query["a"]),
        "down a": 2.5 * np.einsum("lfd,lrd->lfr", d_down, down["b"]),
        "down b": 2.5 * np.einsum("lfd,lfr->lrd", d_down, down["a"]),
    }
    got = found["layers"]["attn"]["qkv_lora"]["query"], found["layers"]["mlp"]["down_lora"]["whole"]
    for (name, value), leaf in zip(expected.items(), [g[n] for g in got for n in "ab"], strict=True):
        np.testing.assert_allclose(leaf, value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("how", ["bfloat16", "int8", "nf4"])
def test_the_sampler_draws_from_the_adapted_law(how):
    base = jax.tree.map(lambda x: x.astype(how), PARAMS) if how == "bfloat16" else quantized(PARAMS, how)
    whole = joined(base, adapters(GROUPED))
    prompt = batch()["tokens"][:, :3]
    law = SamplingLaw(jnp.float32(1), jnp.int32(0), jnp.float32(1), jnp.int32(0))
    drawn = sample(
        ADAPTED, whole, prompt, jnp.ones_like(prompt, bool), KEY, law,
        max_new_tokens=6, stop_ids=(V - 1,), chunk=3, candidates=0, filtered=False, microbatch=0,
    )  # fmt: skip
    tokens = jnp.concatenate([prompt, drawn.tokens], axis=1)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    hidden = ADAPTED.apply(whole, tokens, positions, jnp.ones_like(tokens))[:, 2:-1]
    forced, _ = ADAPTED.logprobs(whole, hidden, drawn.tokens)
    np.testing.assert_allclose(np.where(drawn.mask, forced, 0), drawn.logprobs, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_every_family_adapts_every_linear_layer_of_its_blocks_but_routers(family):
    found = sites(family)
    matrices = [
        n
        for n, t in family.tensors.items()
        if "{}" in n and n.endswith("weight") and t.axes.count(" ") == 1 and t.axes != "E D"
    ]
    assert sorted(site.module + ".weight" for site in found) == sorted(n for n in matrices if "norm" not in n)


def test_a_family_whose_layers_are_fused_in_transformers_has_one_adapter_for_them():
    whole = joined(model_params(Model(GPT2), 0, std=0.1), adapters(GPT2))
    assert set(whole["layers"]["attn"]["qkv_lora"]) == {"whole"}
    model = Model(GPT2, lora_scale=0.5)
    np.testing.assert_allclose(logits(model, whole), logits(Model(GPT2), merged(model, whole)), atol=1e-5)


def test_a_target_that_no_layer_has_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"names c_attn.*self_attn\.q_proj"):
        sites(hf.find_family(GROUPED), ["q_proj", "c_attn"])
    with pytest.raises(UserError, match="names proj"):  # a part of a name is no name
        sites(hf.find_family(GROUPED), ["proj"])


# --- what is trained


def test_a_step_moves_the_adapters_alone_and_leaves_the_frozen_bits():
    trained = adapters(GROUPED, zero=True)
    before = jax.tree.map(np.array, PARAMS)
    tx = make_optimizer(
        OptimConfig(learning_rate=0.1, weight_decay=0.1), make_schedule(OptimConfig(learning_rate=3e-4), 10)
    )
    mesh = make_mesh(MeshConfig(), devices=ONE)
    state = create_state(jax.tree.map(jnp.copy, trained), tx, mesh)
    step = make_train_step(LOSS, tx, 2, mesh=mesh, state=state, frozen=PARAMS)
    for i in range(2):
        state, _ = step(state, batch(), jax.random.fold_in(KEY, i), PARAMS)
    assert_same_bits(before, PARAMS)
    assert jax.tree.structure(state.params) == jax.tree.structure(trained)
    for x, y in zip(jax.tree.leaves(trained), jax.tree.leaves(state.params), strict=True):
        assert differ(x, y)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(trained))


def test_nothing_frozen_is_the_program_of_before():
    tx = make_optimizer(OptimConfig(), make_schedule(OptimConfig(learning_rate=3e-4), 10))
    state = create_state(jax.tree.map(jnp.copy, PARAMS), tx, make_mesh(MeshConfig(), devices=ONE))
    update = make_update(LOSS, tx)
    assert str(jax.make_jaxpr(update)(state, batch(), KEY)) == str(jax.make_jaxpr(update)(state, batch(), KEY, None))


@pytest.mark.parametrize("how", ["none", "int8", "nf4"])
def test_sharded_equals_unsharded(how):
    config = OptimConfig(learning_rate=0.01, eps=1e-2)  # a large epsilon keeps the update smooth in the gradient
    tx = make_optimizer(config, make_schedule(config, 10))
    base, x = quantized(PARAMS, how), batch(rows=8)
    results = []
    for mesh in (make_mesh(MeshConfig(), devices=ONE), make_mesh(MeshConfig(2, 2, 2))):
        with jax.set_mesh(mesh.grid):
            frozen = jax.device_put(base, tree_shardings(mesh, base))
            state = create_state(jax.tree.map(jnp.copy, adapters(GROUPED)), tx, mesh)
            step = make_train_step(LOSS, tx, mesh=mesh, state=state, frozen=frozen)
            for i in range(2):
                key = jax.device_put(jax.random.key(i), replicated(mesh))
                state, metrics = step(state, put_batch(mesh, x), key, frozen)
            results.append(jax.device_get((state.params, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *results)


# --- quantised bases


def test_nf4_holds_its_sixteen_values_exactly_and_rounds_to_the_nearest():
    values = np.array([-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0,
                       0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1])  # fmt: skip
    kernel = np.zeros((1, 64, 1, 1, 2), np.float32)
    kernel[0, :16, 0, 0, 0] = 3 * values
    kernel[0, :4, 0, 0, 1] = [
        2,
        2 * 0.87,
        2 * 0.85,
        2 * 0.04,
    ]  # the border of the last two is 0.8615, of 0 and next 0.0398
    got = dense(quantized({"layers": {"attn": {"qkv": kernel, "out": kernel}, "mlp": {"up": kernel, "down": kernel}}},
                          "nf4")["layers"]["attn"]["qkv"])  # fmt: skip
    np.testing.assert_allclose(got[..., 0], kernel[..., 0], atol=1e-6)
    np.testing.assert_allclose(got[0, :4, 0, 0, 1], 2 * np.array([1, 1, 0.72295684, 0.0795803]), atol=1e-6)


@pytest.mark.parametrize(("how", "bound"), [("int8", 0.5 / 127.5), ("nf4", (1 - 0.6961928) / 2)])
def test_a_quantised_weight_is_within_half_a_step_of_the_largest_of_its_block(how, bound):
    small = quantized(PARAMS, how)
    for path in (("attn", "qkv"), ("attn", "out"), ("mlp", "up"), ("mlp", "down")):
        kernel, q = (tree["layers"][path[0]][path[1]] for tree in (PARAMS, small))
        scale = np.asarray(q.scale) * (127.5 if how == "int8" else 1)
        for axis, (n, m) in enumerate(zip(kernel.shape, scale.shape, strict=True)):
            scale = scale.repeat(n // m, axis)
        assert (np.abs(dense(q) - kernel) <= bound * scale * 1.0001).all(), path
        assert np.abs(kernel).max() <= scale.max() * 1.0001


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_quantising_what_was_quantised_finds_the_same_codes(how):
    once = quantized(PARAMS, how)
    twice = quantized(merged(ADAPTED, once), how)
    for part, leaf in (("attn", "qkv"), ("attn", "out"), ("mlp", "up"), ("mlp", "down")):
        codes = [np.asarray(tree["layers"][part][leaf].qvalue, np.int32) for tree in (once, twice)]
        np.testing.assert_array_equal(*(np.maximum(x, -127) for x in codes))  # +-127.5 is a tie of int8


@pytest.mark.parametrize(("how", "bits"), [("int8", 8), ("nf4", 4)])
def test_a_compiled_program_holds_so_many_bits_for_a_quantised_weight(how, bits):
    small = quantized(PARAMS, how)["layers"]
    kernels = {name: {leaf: q.qvalue for leaf, q in small[name].items() if hasattr(q, "qvalue")} for name in small}
    kernels = {name: tree for name, tree in kernels.items() if tree}
    program = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(jnp.int32).sum(), tree)).lower(kernels).compile()
    count = sum(x.size for x in jax.tree.leaves(kernels))
    assert program.memory_analysis().argument_size_in_bytes == count * bits / 8


# --- stages


@pytest.fixture
def one_device(monkeypatch):
    """Stages on one device, where compiling is cheapest."""
    for stage in (group_train, ppo_train, supervised):
        monkeypatch.setattr(stage, "make_mesh", functools.partial(make_mesh, devices=ONE))


def rows():
    return [{"prompt": row["prompt"], "response": "ABC"[: 1 + i % 3]} for i, row in enumerate(TOY_ROWS["rows"])]


EXPERTS = dataclasses.replace(ARCH, qk_norm="head", ffn_width=8, num_experts=4, experts_per_token=2)
HYBRID = dataclasses.replace(
    ARCH, num_layers=2, qk_norm="head", attn_gate=True, norm_offset=True, rope_fraction=0.5, delta_layers=(0,),
    delta_key_heads=1, delta_value_heads=2, delta_key_dim=4, delta_value_dim=6, delta_kernel=3,
)  # fmt: skip


def policy_of(path, arch):
    """A random policy of this shape for the toy."""
    save_random(path / "policy", Model(arch), 0, toy_directory() / "tokenizer")
    return str(path / "policy")


def sft_run(output_dir, policy, *, steps=3, quantize="none", **lora) -> SFTArgs:
    return SFTArgs(
        model=ModelConfig(path=policy, quantize=quantize),
        data=DataConfig(batch_size=8, max_prompt_length=2, max_length=8),
        sft=SFTConfig(steps=steps, num_samples=2),
        sampling=SamplingConfig(max_new_tokens=4, chunk=4),
        lora=LoRAConfig(rank=2, **lora),
        optim=OptimConfig(learning_rate=0.05),
        run=RunConfig(output_dir=str(output_dir), progress=False, eval_every=2),
    )


def test_a_quantised_model_without_adapters_and_random_weights_with_them_are_refused():
    with pytest.raises(UserError, match=r"model.quantize nf4.*lora.rank"):
        SFTArgs(model=ModelConfig(path="x", quantize="nf4"))
    with pytest.raises(UserError, match=r"lora.rank 2.*random"):
        SFTArgs(model=ModelConfig(arch=GROUPED), lora=LoRAConfig(rank=2))


def test_scale_is_alpha_over_the_rank_or_its_root():
    assert scale_of(LoRAConfig(rank=16, alpha=32)) == 2
    assert scale_of(LoRAConfig(rank=16, alpha=32, rank_stabilized=True)) == 8


@pytest.mark.parametrize(("arch", "quantize"), [(ARCH, "none"), (EXPERTS, "nf4")], ids=["dense", "experts"])
def test_sft_with_adapters_learns_saves_them_merged_and_beside_and_continues_by_the_bits(
    one_device, tmp_path, arch, quantize
):
    config = functools.partial(sft_run, policy=policy_of(tmp_path, arch), quantize=quantize)
    sft.run(config(tmp_path / "alone"), rows=rows(), eval_rows=rows())
    lines = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    losses_seen = [line["eval/total"] for line in lines if "eval/total" in line]
    assert losses_seen[-1] < losses_seen[0]
    model, adapter = (flattened(params_of(tmp_path / "alone" / name)) for name in ("model", "model/adapter"))
    bound = {"none": 1e-6, "nf4": 0.2}[quantize]  # an adapter of a quantised model is put on the whole one
    for leaf, array in model.items():
        np.testing.assert_allclose(array, adapter[leaf], atol=bound, err_msg=leaf)

    calls = iter(range(100))

    def stopped(mesh, batch):
        if next(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return put_batch(mesh, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "put_batch", stopped)
        sft.run(config(tmp_path / "stopped"), rows=rows(), eval_rows=rows())
    with pytest.raises(UserError, match=r"trains adapters.*rlhf-jax resume"):
        run_convert(ConvertArgs(model=str(tmp_path / "stopped"), output=str(tmp_path / "half")))
    sft.run(config(tmp_path / "stopped"), rows=rows(), eval_rows=rows())
    for name in ("model/model.safetensors", "model/adapter/adapter_model.safetensors"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def params_of(path, *, score_head=False):
    return hf.load_params(path, hf.read_config(path)[0], score_head=score_head)


def test_a_reward_model_with_adapters_keeps_its_normalised_head(one_device, tmp_path):
    config = RewardArgs(
        model=ModelConfig(path=str(toy_directory() / "policy")),
        data=DataConfig(batch_size=8, max_prompt_length=2, max_length=10),
        reward=RewardConfig(steps=4),
        lora=LoRAConfig(rank=2),
        optim=OptimConfig(learning_rate=0.05),
        run=RunConfig(output_dir=str(tmp_path / "run"), progress=False),
    )
    reward.run(config, rows=preferences(32), eval_rows=preferences(8, 1))
    model, adapter = (params_of(tmp_path / "run" / n, score_head=True) for n in ("model", "model/adapter"))
    assert np.abs(model["score"]["kernel"]).max() > 0
    for leaf, array in flattened(model).items():
        np.testing.assert_allclose(array, flattened(adapter)[leaf], atol=1e-6, err_msg=leaf)


# --- PPO


def ppo_stage(output_dir="", **changes):
    config = toy_run(output_dir, **changes.pop("ppo", {}), reward_model=changes.pop("reward_model", True))
    return replace(config, lora=LoRAConfig(rank=2), **changes)


def pointers(tree) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize(
    ("ppo", "base"), [({}, "reward"), ({"value_init": "zeros"}, "ref"), ({"shared_trunk": True}, None)], ids=str
)
def test_the_reference_is_the_policys_base_and_the_critic_stands_on_a_base_that_is_there(one_device, ppo, base):
    method, loop = ppo_train.setup(ppo_stage(ppo=ppo), **TOY_ROWS)
    nets, params = method.nets, loop.state.params
    whole = nets.models.whole(nets.frozen, params)
    assert nets.ref["layers"]["attn"]["qkv"] is whole["policy"]["layers"]["attn"]["qkv"]
    assert set(params["policy"]) == {"layers"} and set(params["value"]) <= {"layers", "score"}
    if base is not None:
        on = {"ref": nets.ref, "reward": nets.reward}[base]
        assert on["embed"]["tokens"] is whole["value"]["embed"]["tokens"]
    assert not pointers(params) & (pointers(nets.ref) | pointers(nets.reward))  # the state is donated, these are not
    assert_same_bits(
        params["value"]["score"],
        nets.reward["score"] if base == "reward" else jax.tree.map(jnp.zeros_like, params["value"]["score"]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_kl_at_step_0_is_exactly_0_and_only_adapters_and_heads_change_of_which_the_critics_is_saved(
    one_device, tmp_path, quantize
):
    config = ppo_stage(ppo={"old_logprobs": "recompute", "save_value_model": True}, model__quantize=quantize)
    method, loop = ppo_train.setup(config, **TOY_ROWS)
    frozen = jax.tree.map(np.array, method.nets.frozen)
    before = jax.tree.map(np.array, loop.state.params)
    kls = []
    with jax.set_mesh(method.mesh.grid):
        for i in range(2):
            loop, metrics, _ = iteration(method, loop, i)
            kls.append((float(metrics["rollout/kl"]), float(metrics["rollout/kl_k3"])))
        method.save(tmp_path, loop.kept(method))
    assert kls[0] == (0, 0) and kls[1][1] > 1e-6
    assert_same_bits(frozen, method.nets.frozen)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(loop.state.params), strict=True):
        assert differ(x, y)
    assert_same_bits(
        params_of(tmp_path / "value_model", score_head=True)["score"], loop.state.params["value"]["score"]
    )


@pytest.mark.slow
def test_ppo_with_adapters_stopped_and_continued_ends_as_one_left_alone_bit_by_bit(one_device, tmp_path):
    """Rows of a policy of layers with a state and with attention are cut and go on, some of them after the stop."""
    options = {"model__path": policy_of(tmp_path, HYBRID), "model__quantize": "int8", "sampling__budget": 3}
    assert_stopped_and_continued_is_left_alone(
        lambda name: ppo_stage(tmp_path / name, run__keep_best=False, **options)
    )


def test_grpo_with_adapters_has_the_frozen_model_for_a_reference_whatever_the_price_of_its_kl(one_device):
    path = toy_directory()
    config = GRPOArgs(
        model=ModelConfig(path=str(path / "policy")),
        data=DataConfig(batch_size=16, max_prompt_length=2),
        reward=RewardSourceConfig(model=str(path / "reward")),
        sampling=SamplingConfig(max_new_tokens=4, chunk=4),
        grpo=GroupConfig(group_size=4, kl_coef=0.0, old_logprobs="recompute"),
        lora=LoRAConfig(rank=2),
        optim=OptimConfig(learning_rate=0.05),
    )
    method, loop = group_train.setup(config, **TOY_ROWS)
    frozen, before = (jax.tree.map(np.array, tree) for tree in (method.nets.frozen, loop.state.params))
    kls = []
    with jax.set_mesh(method.mesh.grid):
        for i in range(2):
            loop, metrics, _ = iteration(method, loop, i)
            kls.append(float(metrics["rollout/kl_k3"]))
    assert kls[0] == 0 and kls[1] > 1e-6
    assert method.nets.ref is method.nets.frozen
    assert_same_bits(frozen, method.nets.frozen)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(loop.state.params), strict=True):
        assert differ(x, y)


# --- DPO


def test_the_reference_of_dpo_is_the_frozen_model_bit_by_bit_so_its_first_loss_is_ln_2():
    whole, columns = joined(PARAMS, adapters(GROUPED, zero=True)), collate_preference(pair_examples(), length=9)
    columns["ref_logprobs"] = jax.jit(functools.partial(of_all, MODEL))(PARAMS, columns)[0]
    loss_fn = preference.objective(ADAPTED, bind(losses.dpo_loss, DPOConfig()))
    value, metrics = jax.jit(loss_fn)(whole, columns, KEY)
    assert float(value) == float(np.float32(np.log(2)))
    assert float(metrics["rewards/margin"]) == 0


def test_dpo_moves_the_adapters_alone_from_a_loss_of_ln_2(tmp_path, monkeypatch):
    seen = {}

    def watched(work, out):
        loaded = work.loaded
        seen["frozen"], seen["before"] = loaded.frozen, jax.device_get((loaded.frozen, loaded.params))
        params = supervised.fit(work, out)
        seen["after"] = jax.device_get((loaded.frozen, params))
        return params

    monkeypatch.setattr(preference, "fit", watched)
    config = replace(dpo_settings("dpo", tmp_path / "run"), lora=LoRAConfig(rank=2))
    preference.run(config, rows=preferences(32), eval_rows=preferences(8, 1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss/preference" in line)
    assert first["loss/preference"] == pytest.approx(np.log(2), rel=1e-6)
    assert lines[-1]["eval/preference"] < first["loss/preference"]
    assert_same_bits(seen["before"][0], seen["after"][0])
    for x, y in zip(jax.tree.leaves(seen["before"][1]), jax.tree.leaves(seen["after"][1]), strict=True):
        assert differ(x, y)
    base, tuned = (
        load_file(path / "model.safetensors") for path in (toy_directory() / "policy", tmp_path / "run/model")
    )
    changed = {name for name in base if (base[name] != tuned[name]).any()}
    assert changed == {name for name in base if "_proj" in name}  # embeddings, norms and head have the base's bits
