"""`rlhf-jax plan`: what it counts, against sums by hand; and, where the TPU compiler is installed, a real topology."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from test_programs import PRIME, largest_logits

from rlhf_jax import cli
from rlhf_jax.commands.plan import chips, flops, hlo, plan, programs, suggest
from rlhf_jax.commands.plan.presets import PRESETS, find_preset
from rlhf_jax.config import ArchConfig, MeshConfig, ModelConfig, PlanArgs, PPOArgs, SFTArgs
from rlhf_jax.errors import UserError
from rlhf_jax.models import Model
from rlhf_jax.models.hf.layout import leaf_shapes
from rlhf_jax.sharding import make_mesh, placed, put_batch, tree_shardings
from rlhf_jax.tokens import Blocks, token_logprobs

WITHOUT_COMPILER = importlib.util.find_spec("libtpu") is None
TINY = {"vocab_size": 64, "width": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(("name", "count"), [("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
                                              ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
                                              ("meta-llama/Llama-3.2-1B", 1_235_814_400),
                                              ("Qwen/Qwen2.5-0.5B", 494_032_768),
                                              ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
                                              ("Qwen/Qwen2.5-7B", 7_615_616_512),
                                              ("Qwen/Qwen3-0.6B", 596_049_920),
                                              ("Qwen/Qwen3-1.7B", 1_720_574_976),
                                              ("Qwen/Qwen3-4B", 4_022_468_096),
                                              ("Qwen/Qwen3-8B", 8_190_735_360),
                                              ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
                                              ("Qwen/Qwen3.5-9B", 8_953_803_264),
                                              ("google/gemma-3-1b-it", 999_885_952),
                                              ("google/gemma-4-31B-it", 30_697_345_340),
                                              ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
                                              ("HuggingFaceTB/SmolLM2-360M", 361_821_120),
                                              ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
                                              ("openai/gpt-oss-20b", 20_914_757_184)])  # fmt: skip
def test_presets_have_the_published_number_of_parameters(name, count):
    shapes = leaf_shapes(programs.find_arch(f"hf://{name}"), score_head=False)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
    assert find_preset(name.split("/")[1]) is PRESETS[name]
    assert find_preset(f"hf://{name.removesuffix('-it')}-Instruct@main") is PRESETS[name]


@pytest.mark.parametrize(("asked", "found"), [("auto", "splash"), ("flash", "splash"), ("plain", "plain")])
def test_attention_is_that_of_the_chips_that_are_planned_for_unless_it_is_to_be_plain(asked, found):
    config, mesh = ModelConfig(arch=ArchConfig(**TINY), attention=asked), make_mesh(MeshConfig())
    assert programs.abstract_model(config, mesh, 8, score_head=False, attention="splash").model.attention == found


def test_products_in_loops_and_recomputed_ones_are_counted():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))

    def of(function, **kwargs):
        return flops.count_flops(jax.make_jaxpr(function)(x, w), **kwargs)

    one = 2 * 4 * 8 * 8
    assert of(lambda x, w: x @ w) == one
    assert of(lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0]) == 5 * one
    assert of(jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), argnums=(0, 1))) == 3 * one
    layer = jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w)))
    assert of(jax.grad(layer, argnums=(0, 1))) > of(jax.grad(layer.__wrapped__, argnums=(0, 1)))
    loop = lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x)  # noqa: E731
    assert of(loop, unknown_trips=7) == 7 * one
    named = jax.named_scope("trips_2.5")(loop)
    assert [of(named, unknown_trips=trips) for trips in (0, 7)] == [0, 2.5 * one]
    assert [of(jax.named_scope(f"{kind}_4")(loop), fill=0.5) for kind in ("filled", "unfilled")] == [2 * one, 8 * one]


HLO = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %all-gather.1 = f32[16]{0} all-gather(%x), dimensions={0}
  %all-reduce.1 = f32[8]{0} all-reduce(%x), to_apply=%sum
  %add.1 = f32[8]{0} add(%x, %all-reduce.1)
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %add.1)
}
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] constant(6)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%scatter (q: f32[32]) -> f32[8] {
  %q = f32[32]{0} parameter(0)
  %all-reduce.2 = f32[32]{0} all-reduce(%q), to_apply=%sum
  ROOT %ds = f32[8]{0} dynamic-slice(%q), dynamic_slice_sizes={8}
}
ENTRY %main (a: (s32[], f32[8])) -> f32[8] {
  %a = (s32[], f32[8]{0}) parameter(0)
  %wide = f32[32]{0} constant({...})
  %fusion.1 = f32[8]{0} fusion(%wide), kind=kCustom, calls=%scatter
  %while.1 = (s32[], f32[8]{0}) while(%a), condition=%cond, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%while.1), index=1
}
"""


TWO_KINDS = """
%narrow (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%p), to_apply=%sum
}
%full (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %all-gather.1 = f32[32]{0} all-gather(%p), dimensions={0}
  ROOT %ds = f32[8]{0} dynamic-slice(%all-gather.1), dynamic_slice_sizes={8}
}
ENTRY %main (which: s32[], a: f32[8]) -> f32[8] {
  %which = s32[] parameter(0)
  %a = f32[8]{0} parameter(1)
  ROOT %out = f32[8]{0} conditional(%which, %a, %a), BRANCHES
}
"""


@pytest.mark.parametrize(
    "branches", ["branch_computations={%narrow, %full}", "true_computation=%full, false_computation=%narrow"]
)
def test_of_a_conditional_the_branch_that_moves_most_counts_alone(branches):
    found = hlo.traffic(TWO_KINDS.replace("BRANCHES", branches))
    assert found.collectives == {"all-gather": 128}


def test_collectives_of_a_loop_are_multiplied_by_its_trips():
    found = hlo.traffic(HLO)
    assert found.collectives == {"all-gather": 6 * 64, "all-reduce": 6 * 2 * 32, "reduce-scatter": 128}
    assert found.memory == 6 * 3 * 32 + (8 + 8) * 4 * 1 + 0 * 128
    assert (8,) in found.buffers


RING = """
%windowed_dot_general_body_ag.1 (p: (bf16[8], u32[])) -> (bf16[8], u32[]) {
  %two = u32[] constant(2)
  %p = (bf16[8]{0}, u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=1
  %x = bf16[8]{0} get-tuple-element(%p), index=0
  %start.1 = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %done.1 = bf16[8]{0} collective-permute-done(%start.1)
  %start.2 = (bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%done.1), source_target_pairs={{0,1},{1,0}}
  %done.2 = bf16[8]{0} collective-permute-done(%start.2)
  %add.1 = u32[] add(%i, %two)
  ROOT %t = (bf16[8]{0}, u32[]) tuple(%done.2, %add.1)
}
%cond (p: (bf16[8], u32[])) -> pred[] {
  %p = (bf16[8]{0}, u32[]) parameter(0)
  %n = u32[] constant(16)
  %i = u32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (a: (bf16[8], u32[])) -> bf16[8] {
  %a = (bf16[8]{0}, u32[]) parameter(0)
  %shard = f32[32]{0} constant({...})
  %token = token[] after-all()
  %send = (f32[32]{0}, u32[], token[]) send(%shard, %token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %while.1 = (bf16[8]{0}, u32[]) while(%a), condition=%cond, body=%windowed_dot_general_body_ag.1
  ROOT %out = bf16[8]{0} get-tuple-element(%while.1), index=0
}
"""  # noqa: E501


def test_a_ring_that_takes_two_steps_at_a_time_is_one_all_gather():
    """16 shards of 16 bytes; and what is handed to another slice counts apart."""
    assert hlo.traffic(RING).collectives == {"all-gather": 16 * 16, hlo.BETWEEN_SLICES: 128}
    by_one = RING.replace("u32[] constant(2)", "u32[] constant(1)")
    assert hlo.traffic(by_one).collectives["all-gather"] == 2 * 16 * 16


@pytest.mark.parametrize("space", [1, 3])
def test_what_is_fetched_ahead_is_read_once(space):
    """32 bytes to the chip's scratchpad (of v4 to its CMEM), where the product that reads them costs no memory."""
    text = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%x)
  %done = f32[8]{0:S(1)} copy-done(%start)
  ROOT %out = f32[8]{0:S(1)} multiply(%done, %done)
}
"""
    assert 32 <= hlo.traffic(text.replace("S(1)", f"S({space})")).memory <= 36  # and a counter


def test_of_what_is_only_cut_the_cuts_are_read():
    """A layer out of a stack: its own bytes, read and written, and those of what is added to it."""
    text = """
%cut (p: f32[8,4], q: f32[4]) -> f32[4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %slice.1 = f32[1,4]{1,0} slice(%p), slice={[2:3], [0:4]}
  %bitcast = f32[4]{0} bitcast(%slice.1)
  ROOT %add = f32[4]{0} add(%bitcast, %q)
}
ENTRY %main (x: f32[8,4], y: f32[4]) -> f32[4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[4]{0} parameter(1)
  %slice.2 = f32[2,4]{1,0} slice(%x), slice={[0:2], [0:4]}
  ROOT %fusion = f32[4]{0} fusion(%x, %y), kind=kLoop, calls=%cut
}
"""
    assert hlo.traffic(text).memory == 2 * 32 + 3 * 16
    assert hlo.traffic(text.replace("add(%bitcast, %q)", "custom-call(%bitcast, %q, %p)")).memory == 224
    # Also within a fusion of the fusion.
    nested = text.replace("%cut (", "%inner (").replace(
        "ENTRY",
        """%cut (p: f32[8,4], q: f32[4]) -> f32[4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[4]{0} parameter(1)
  ROOT %fusion.1 = f32[4]{0} fusion(%p, %q), kind=kLoop, calls=%inner
}
ENTRY""",
    )
    assert hlo.traffic(nested).memory == hlo.traffic(text.replace("slice(%p)", "dynamic-slice(%p, %q)")).memory == 112
    # So of a table in which rows are looked up; the numbers of the rows are read, too.
    looked_up = text.replace("slice(%p)", "gather(%p, %q)").replace("slice(%x)", "gather(%x, %y)")
    assert hlo.traffic(looked_up).memory == (2 * 32 + 16) + 3 * 16


def test_collectives_beside_the_cores_are_counted():
    """As tpu7x has them, in a computation that is started and waited for."""
    text = """
%gathered (p: f32[8]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  ROOT %all-gather = f32[16]{0} all-gather(%p), dimensions={0}
}
ENTRY %main (x: f32[8]) -> f32[16] {
  %x = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[16]{0}) call-start(%x), async_execution_thread="sparsecore", to_apply=%gathered
  ROOT %done = f32[16]{0} call-done(%start)
}
"""
    assert dict(hlo.traffic(text).collectives) == {"all-gather": 64}


def test_a_loop_that_looks_at_its_data_runs_as_often_as_it_is_said_to():
    text = HLO.replace("  ROOT %lt = pred[] compare(%i, %n), direction=LT",
                       "  %lt = pred[] compare(%i, %n), direction=LT\n  ROOT %and = pred[] and(%lt, %lt)")  # fmt: skip
    for trips in (0, 3):
        assert hlo.traffic(text, unknown_trips=trips).collectives["all-gather"] == trips * 64
    named = re.sub(r"(body=%body)", r'\1, metadata={op_name="jit(f)/trips_8/while/body/trips_0.5/while"}', text)
    assert hlo.traffic(named, unknown_trips=3).collectives["all-gather"] == 0.5 * 64


def test_what_is_packed_costs_what_its_tokens_cost():
    """A reward step of 16 pairs in microbatches of one sequence a device: half as many rounds for half the tokens."""
    config = cli.parse("reward", [f"--model.arch={json.dumps(TINY)}", "--data.batch_size=16", "--data.max_length=32",
                                  "--data.microbatch_tokens=32", "--mesh.data=8"])  # fmt: skip
    mesh, costs = make_mesh(config.mesh), {}
    with jax.set_mesh(mesh.grid):
        for fill in (0.4, 1.0):
            [program] = programs.programs_of(config, mesh, attention="plain", fill=fill)
            traced = program.function.trace(*program.arguments)
            text = traced.lower().compile().as_text()
            shares = (fill / 2, fill, 1.0)
            costs[fill] = [(flops.count_flops(traced.jaxpr, fill=f), hlo.traffic(text, fill=f).memory) for f in shares]
    (half, _), (some, _), (whole, _) = costs[0.4]
    assert 2 * half == some == pytest.approx(0.4 * whole)  # nothing but products of rows
    (_, half), (_, some), (_, whole) = costs[0.4]
    assert 0 < some - half == pytest.approx((whole - some) / 3, rel=1e-6)  # the optimiser's bytes stay
    assert len(set(costs[1.0])) == 1  # padded: whatever they hold, slots cost the same


def test_fsdp_moves_the_weights_that_theory_says():
    """On 8 fake devices: every weight gathered for each pass that reads it, every gradient summed."""
    config = cli.parse("sft", [f"--model.arch={json.dumps({**TINY, 'tied_head': True})}", "--mesh.data=1",
                               "--mesh.fsdp=8", "--data.batch_size=8", "--data.max_length=32",
                               "--model.remat=full"])  # fmt: skip
    assert isinstance(config, SFTArgs)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh.grid):
        [program] = programs.programs_of(config, mesh, attention="plain")
        text = program.function.trace(*program.arguments).lower().compile().as_text()
    arch = config.model.arch
    layers = sum(
        int(np.prod(shape)) * 2  # bfloat16
        for name, shape in leaf_shapes(arch, score_head=False).items()
        if name.startswith("layers/") and "norm" not in name
    )
    gathered = hlo.traffic(text).collectives["all-gather"]
    assert 2 * layers <= gathered <= 8 * layers  # forward and backward; at most in float32, with the embedding


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_no_program_holds_the_logits_of_a_batch(stage):
    """[B, T, V] in float32, as a device would hold it: 4 rows and 23 of 46 ids, by chunks of 4 positions."""
    arch = {**TINY, "vocab_size": 2 * PRIME, "max_positions": 64}
    config = cli.parse(stage, [f"--model.arch={json.dumps(arch)}", "--model.logprob_chunk=4", "--mesh.data=2",
                               "--mesh.fsdp=2", "--mesh.tensor=2", "--data.batch_size=16", "--data.max_length=64",
                               *(["--data.max_prompt_length=32", "--sampling.max_new_tokens=32", "--ppo.minibatches=1",
                                  "--reward.functions=[tests.tiny:none]"] if stage == "ppo" else [])])  # fmt: skip
    mesh, texts = make_mesh(config.mesh), {}
    with jax.set_mesh(mesh.grid):
        for program in programs.programs_of(config, mesh, attention="plain"):
            texts[program.name] = program.function.trace(*program.arguments).lower().compile().as_text()
    length = 32 if stage == "ppo" else 63
    for name, text in texts.items():
        assert largest_logits(text) < 4 * length * PRIME, name


@pytest.mark.parametrize("looped", [False, True])
def test_gradients_that_nobody_reads_are_not_computed(looped):
    """Of a frozen projection: forward, once more, and the gradient of what it projects.

    In a loop of as many microbatches as hold rows nothing is left out that is not left out of its body.
    """
    kernel, hidden = jnp.ones((1, 4, 32)), jnp.ones((2, 8, 4))

    def loss(kernel, hidden):
        vocabulary = Blocks(kernel, lambda kernel, h: jnp.einsum("btd,dv->btv", h, kernel))
        return token_logprobs(vocabulary, hidden, jnp.zeros((2, 8), jnp.int32), 1.0, chunk=4)[0].sum()

    def counted(argnums):
        grads, zeros = jax.grad(loss, argnums), jax.tree.map(jnp.zeros_like, (kernel, hidden))
        start = zeros[argnums] if isinstance(argnums, int) else zeros
        run = lambda times, *args: jax.lax.fori_loop(0, times, lambda i, _: grads(*args), start)  # noqa: E731
        jaxpr = jax.make_jaxpr(run)(1, kernel, hidden) if looped else jax.make_jaxpr(grads)(kernel, hidden)
        return flops.count_flops(flops.without_unread(jaxpr)) / (2 * 16 * 4 * 32)

    assert (counted(1), counted((0, 1))) == (3, 4) and (looped or counted(0) == 3)


@pytest.mark.parametrize(
    ("tied", "most"), [(True, 2**30), (False, 2**30), (True, 8 * 16 * 512 // 5), (False, 1 << 14)]
)
def test_log_probs_in_chunks_gather_and_sum_once_however_many_there_are(tied, most, monkeypatch):
    """Of the whole projection, or of some blocks of it where weights and gradient would take more than `most`."""
    monkeypatch.setattr("rlhf_jax.models.vocabulary.MOST", most)
    arch = ArchConfig(vocab_size=512, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_width=32,
                      tied_head=tied, head_bias=not tied)  # fmt: skip
    mesh, rng, grads, moved = make_mesh(MeshConfig(fsdp=4, tensor=2)), np.random.default_rng(0), [], []
    hidden = put_batch(mesh, rng.normal(size=(4, 16, 16)).astype(np.float32))
    targets, needed = put_batch(mesh, (rng.integers(0, 512, (4, 16), dtype=np.int32), rng.random((4, 16)) < 0.6))
    for chunk in (512, 8, 2):  # at once, two and eight rounds
        model = Model.from_config(ModelConfig(logprob_chunk=chunk, compute_dtype="float32"), arch, mesh.rules)
        with jax.set_mesh(mesh.grid):
            params = placed(mesh, model.init, jax.random.key(0))

            def loss(params, hidden, model=model):
                logprobs, entropy = model.logprobs(params, hidden, targets, needed=needed, with_entropy=True)
                return logprobs.sum() + 0.1 * entropy.sum()

            step = jax.jit(
                jax.grad(loss, argnums=(0, 1)), out_shardings=(tree_shardings(mesh, params), hidden.sharding)
            )
            moved.append(sum(hlo.traffic(step.lower(params, hidden).compile().as_text()).collectives.values()))
            grads.append(step(params, hidden))
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grads[0], other)
    assert moved[2] <= 1.1 * moved[1], moved


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "expert": 2}])
def test_no_device_gets_the_rows_of_all(axes):
    """Of 32 pairs of 512 tokens a device embeds those of the devices that share its table, forward and backward."""
    arch = ArchConfig(vocab_size=32000, width=256, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_width=8)
    if "expert" in axes:
        arch = dataclasses.replace(arch, num_experts=4, experts_per_token=2)
    mesh = make_mesh(MeshConfig(**axes))
    model = Model(arch, rules=mesh.rules)
    batch = put_batch(mesh, {name: np.ones((32, 2, 512), np.int32) for name in ("tokens", "positions", "segment_ids")})
    with jax.set_mesh(mesh.grid):
        params = placed(mesh, model.init, jax.random.key(0))
        rows = lambda batch: {name: x.reshape(64, 512) for name, x in batch.items()}  # noqa: E731
        loss = lambda params, batch: (model.apply(params, **rows(batch)) ** 2).sum()  # noqa: E731
        step = jax.jit(jax.grad(loss), out_shardings=tree_shardings(mesh, params))
        text = step.lower(params, batch).compile().as_text()
    moved = re.findall(r"f32\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)", text)
    assert moved and not any(shape.startswith(("64,512,", "32,512,", "32000,")) for shape in moved), moved


def test_a_plan_in_a_notebook_on_a_tpu_leaves_the_process_as_it_is(monkeypatch):
    device = SimpleNamespace(core_on_chip=0)
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **options: SimpleNamespace(devices=[device]))
    before = dict(os.environ), jax.config.jax_platforms
    assert chips.find_topology("v5e:1x1") == (chips.CHIPS["v5e"], [device])
    assert (dict(os.environ), jax.config.jax_platforms) == before


def test_bad_plans_are_one_line(capsys):
    def said(*arguments):
        with pytest.raises(SystemExit) as caught:
            cli.main(["plan", *arguments])
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert "topology is empty; write --topology v5e:4x4" in said()
    assert "which stage this is; write --stage" in said("--topology", "v5e:4x4")
    assert "topology 'v9:4x4' is unknown; write a generation (v4, v5e, v5p, v6e, tpu7x)" in said(
        "--topology", "v9:4x4", "--stage", "sft"
    )
    with pytest.raises(UserError, match=r"hf://a/b has no preset; known are meta-llama/"):
        programs.find_arch("hf://a/b")


def test_verdicts_name_the_program_and_the_cure():
    def row(name, arguments, peak):
        return plan.Row(name, arguments, 0, peak, 1, 1, 1, {}, (), {"compute": 1, "memory": 2, "network": 1}, 1, 0)

    chip = chips.CHIPS["v5e"]
    small = row("update", 1 * chips.GIB, 2 * chips.GIB)
    assert plan.verdict([small], chip).startswith("fits: the largest program, update, needs 2.00 GiB of 15.75 GiB")
    assert small.bound == "memory"
    cures = [("update", 9, "mesh.fsdp"), ("update", 1, "model.remat"), ("decode", 1, "sampling.microbatch")]
    for name, arguments, cure in [*cures, ("score", 1, "set score_microbatch")]:
        assert cure in plan.verdict([row(name, arguments * chips.GIB, 20 * chips.GIB)], chip)
    everything = dict.fromkeys([*hlo.COLLECTIVES, hlo.BETWEEN_SLICES], 999.5 * chips.GIB)
    waits = {**small.seconds, hlo.BETWEEN_SLICES: 1234.5}
    large = {"name": "reference", "arguments": 99.5 * chips.GIB, "memory": 9999.5 * chips.GIB, "flops": 1.2345e18}
    large = dataclasses.replace(small, **large, collectives=everything, seconds=waits, tokens=10**9)
    lines = plan.shown([small, large], chip, 4)
    assert max(map(len, lines)) <= 100 and "tokens/s" in "".join(lines)
    assert len({len(line) for line in lines[:3]}) == 1
    assert plan.exchange_lines([small, large]) == ["reference: all-to-all 999.50 GiB"]


def test_a_ppo_config_gives_the_three_programs():
    config = cli.parse("ppo", [f"--model.arch={json.dumps(TINY)}", "--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2",
                               "--data.batch_size=8", "--data.max_prompt_length=8", "--sampling.max_new_tokens=8",
                               "--sampling.chunk=4", "--ppo.minibatches=2", "--mesh.rollout_tensor=1",
                               "--reward.functions=[tests.tiny:none]"])  # fmt: skip
    assert isinstance(config, PPOArgs)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh.grid):
        found = programs.programs_of(config, mesh, attention="plain")
        texts = {p.name: p.function.trace(*p.arguments).lower().compile().as_text() for p in found}
    assert [(p.name, p.tokens, p.loops) for p in found] == [("rollout", 64, 2), ("score", 128, 1), ("update", 512, 1)]
    for text in texts.values():
        assert (8, 8, 64) not in hlo.traffic(text).buffers  # no [B, T, V] in float32
    before, whole = (hlo.traffic(texts["rollout"], unknown_trips=n) for n in (0, 2))
    decoding = whole.collectives["all-gather"] - before.collectives["all-gather"]
    weights = sum(int(np.prod(s)) for n, s in leaf_shapes(config.model.arch, score_head=False).items())
    assert decoding < 16 * weights / 10  # no weight moves per token


def test_decoding_reads_the_experts_of_its_device_and_the_rows_of_the_rollouts_mesh():
    """By hand: with half of the experts on each device; and with half of all weights, and twice the rows."""
    arch = ArchConfig(**TINY, num_experts=4, experts_per_token=2)
    given = [f"--model.arch={json.dumps({**TINY, 'num_experts': 4, 'experts_per_token': 2})}", "--data.batch_size=16",
             "--grpo.group_size=2", "--sampling.max_new_tokens=8", "--reward.functions=[tests.tiny:none]"]  # fmt: skip

    def least(**axes):
        config = cli.parse("grpo", [*given, *(f"--mesh.{axis}={size}" for axis, size in axes.items())])
        mesh = make_mesh(config.mesh)
        model = Model.from_config(ModelConfig(compute_dtype="bfloat16"), arch, mesh.rules)
        with jax.set_mesh(mesh.grid):
            return programs._decoded(model, placed(mesh, model.init, jax.random.key(0)), config, mesh, (8, 4), 2, 1.0)

    experts = sum(2 * math.prod(shape) for name, shape in leaf_shapes(arch, score_head=False).items()
                  if re.search("experts/(up|down)", name))  # fmt: skip
    router = 3 * 4 * 32 * 4  # which stays whole, and is counted with them
    alone = least(data=8)
    assert alone - least(data=4, expert=2) == 8 * (experts + router) / 2
    # One prompt and two responses of a device, with half of their 8 tokens: 2 kinds, 2 heads of 8, 3 layers, 2 bytes.
    assert 2 * least(data=8, rollout_tensor=2) - alone == 8 * (4 + 2 * 4) * 2 * 2 * 8 * 3 * 2


@pytest.mark.parametrize("sizes", [(1, 8, 1, 4), (2, 4, 1, 8), (2, 1, 4, 0)], ids=str)
def test_weights_move_to_the_rollouts_layout_without_ever_being_whole(sizes):
    """From fsdp over 8 to tensor over 4: traded within groups of 4, then gathered from the 2 groups."""
    arch = {**TINY, "num_heads": 8, "num_kv_heads": 8, "ffn_width": 96, "tied_head": False}
    axes = zip(("data", "fsdp", "tensor", "rollout_tensor"), sizes, strict=True)
    config = cli.parse("ppo", [f"--model.arch={json.dumps(arch)}", "--data.batch_size=8", "--ppo.minibatches=1",
                               "--data.max_prompt_length=8", "--sampling.max_new_tokens=8",
                               "--reward.functions=[tests.tiny:none]",
                               *(f"--mesh.{axis}={size}" for axis, size in axes)])  # fmt: skip
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh.grid):
        rollout = programs.programs_of(config, mesh, attention="plain")[0]
        text = rollout.function.trace(*rollout.arguments).lower().compile().as_text()
    gathered = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", text)}
    shapes = leaf_shapes(config.model.arch, score_head=False)
    whole = {shape[1:] for name, shape in shapes.items() if name.startswith("layers/") and len(shape) > 2}
    whole.add(shapes["head/kernel"])  # the embedding is whole, for its lookup
    assert rollout.name == "rollout" and gathered and not whole & gathered, whole & gathered


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        (["--grpo.epochs=2"], True),
        (["--grpo.kl_coef=0", "--sampling.budget=4"], False),
        (["--grpo.kl_coef=0", "--lora.rank=2"], True),
    ],
)
def test_a_grpo_config_gives_the_programs_of_ppo_without_a_critic(tmp_path, options, reference):
    """And without a price of the KL no reference, unless adapters stand on it."""
    shape = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 8,
             "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = cli.parse("grpo", [f"--model.path={tmp_path}", "--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2",
                                "--data.batch_size=8", "--data.max_prompt_length=8", "--sampling.max_new_tokens=8",
                                "--sampling.chunk=4", "--grpo.group_size=4", "--reward.functions=[tests.tiny:none]",
                                *options])  # fmt: skip
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh.grid):
        found = programs.programs_of(config, mesh, attention="plain")
        assert all(p.function.trace(*p.arguments).jaxpr.eqns for p in found)
    tokens = [("rollout", 64), ("score", 128), ("update", 128 * config.grpo.epochs)]
    assert [(p.name, p.tokens) for p in found] == tokens
    rows = 16 if config.sampling.cut else 4  # those under way, or the prompts, twice each for the mesh
    assert len(jax.tree.leaves(found[0].arguments[1])[0]) == rows
    params, ref, reward_model = found[1].arguments[:3]
    assert params.keys() == {"policy"} and (ref is not None) == reference and reward_model is None


@pytest.mark.parametrize(
    ("stage", "options", "expected"),
    [
        ("pretrain", [], [("step", 8 * 16)]),
        ("reward", [], [("step", 2 * 8 * 16)]),
        ("reward", ["--reward.comparisons=rankings"], [("step", 3 * 8 * 16)]),
        ("reward", ["--reward.comparisons=ratings"], [("step", 8 * 16)]),
        ("dpo", [], [("reference", 2 * 8 * 16), ("step", 2 * 8 * 16)]),
        ("dpo", ["--dpo.loss=rlhf_jax.losses:simpo_loss"], [("step", 2 * 8 * 16)]),
        ("kto", [], [("reference", 2 * 8 * 16), ("step", 2 * 8 * 16)]),
        ("rrhf", ["--rrhf.accumulate=2"], [("step", 3 * 8 * 16)]),
    ],
)
def test_the_programs_of_stages_that_train_one_model(stage, options, expected):
    config = cli.parse(stage, [f"--model.arch={json.dumps(TINY)}", "--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2",
                               "--data.batch_size=8", "--data.max_length=16", *options])  # fmt: skip
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh.grid):
        found = programs.programs_of(config, mesh, attention="plain", width=3)
        traced = [program.function.trace(*program.arguments) for program in found]
    assert [(program.name, program.tokens) for program in found] == expected
    assert all(t.jaxpr.eqns for t in traced)


def test_heads_that_do_not_divide_by_the_rollouts_tensor_axis_are_one_line():
    config = cli.parse("ppo", [f"--model.arch={json.dumps(TINY)}", "--mesh.data=8", "--mesh.rollout_tensor=4",
                               "--data.batch_size=64", "--ppo.minibatches=2",
                               "--reward.functions=[tests.tiny:none]"])  # fmt: skip
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh.grid), pytest.raises(UserError, match=r"layers/attn/out .* dimension 2 .* tensor = 4"):
        programs.programs_of(config, mesh, attention="plain")


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_COMPILER, reason="the TPU compiler (libtpu) is not installed")
def test_a_topology_may_be_of_single_chips_and_of_chips_that_are_two_devices():
    """To JAX a chip of tpu7x is two devices, each with half of its memory; one of v4 is one, as its runtime has it."""
    names = {
        "v5e:1x1": (1, 16),
        "v6e:1x1": (1, 32),
        "v4:2x2x1": (4, 32),
        "tpu7x:1x1x1": (2, 96),
        "tpu7x:2x2x2": (16, 96),
    }
    program = (
        "from rlhf_jax.commands.plan.chips import GIB, find_topology\n"
        f"for chip, devices in map(find_topology, {list(names)}): print(len(devices), chip.memory / GIB)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}  # in a process of its own, as the compiler wants
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=600
    )
    found = [line.split() for line in done.stdout.splitlines()]
    assert [(int(count), float(memory)) for count, memory in found] == list(names.values()), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_COMPILER, reason="the TPU compiler (libtpu) is not installed")
def test_to_draw_a_token_logits_are_read_and_nothing_of_their_size_is_written():
    """Three times: for the largest, for the sum and for those of blocks. Once it was eight, some of them written."""
    program = """
import jax, jax.numpy as jnp
from rlhf_jax.commands.plan import chips, hlo
from rlhf_jax.inference.sampling import SamplingLaw, draw_from_logits
one = jax.sharding.SingleDeviceSharding(chips.find_topology("v6e:1x1")[1][0])
given = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
law = SamplingLaw(*(given(dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.int32)))
draw = jax.jit(lambda *xs: draw_from_logits(*xs, candidates=0, filtered=False))
compiled = draw.lower(given(jnp.float32, 256, 151936), given(jnp.float32, 256), law).compile()
print(hlo.traffic(compiled.as_text(), unknown_trips=1).memory / (256 * 151936 * 4))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3.5


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_COMPILER, reason="the TPU compiler (libtpu) is not installed")
def test_on_a_topology_of_two_dimensions_gradients_are_scattered_where_weights_lie_over_an_axis_of_each():
    """Over both at once the compiler has no reduce-scatter: it sums all of them, which moves twice as much."""
    arch = {"vocab_size": 512, "width": 1024, "num_layers": 2, "num_heads": 8, "num_kv_heads": 8, "head_dim": 128,
            "ffn_width": 4096, "max_positions": 128}  # fmt: skip
    arguments = ["plan", "--topology", "v5e:8x8", "--json", "true", "--stage", "sft", "--model.arch", json.dumps(arch),
                 "--data.batch_size", "64", "--data.max_length", "128", "--mesh.data", "8", "--mesh.fsdp", "8",
                 "--mesh.rules", "[D=fsdp+data]"]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax", *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    moved = json.loads(done.stdout.splitlines()[-1])["collectives"]
    assert moved["reduce-scatter"] > moved["all-reduce"], moved


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_COMPILER, reason="the TPU compiler (libtpu) is not installed")
def test_a_plan_for_a_real_topology():
    arguments = ["plan", "--topology", "v5e:2x2", "--json", "true", "--stage", "ppo", "--data.batch_size", "8",
                 "--model.arch",
                 json.dumps({**TINY, "width": 128, "head_dim": 64, "num_heads": 2, "vocab_size": 8192}),
                 "--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.rollout_tensor", "2",
                 "--data.max_prompt_length", "64", "--sampling.max_new_tokens", "128", "--model.logprob_chunk", "16",
                 "--ppo.minibatches", "1",
                 "--reward.functions", "[tests.tiny:none]"]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax", *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["name"] for row in rows] == ["prefill", "decode", "score", "update"]
    assert all(row["fits"] and row["peak"] > 0 and row["flops"] > 0 for row in rows)
    # 2 rows a chip: no program holds their logits, nor, with these sizes, anything as large.
    assert all(math.prod(row["largest_float32"]) < 2 * 128 * 8192 for row in rows)
    bad = subprocess.run(
        [sys.executable, "-m", "rlhf_jax", *arguments, "--mesh.fsdp", "3"], capture_output=True, text=True,
        env=environment, timeout=600,
    )  # fmt: skip
    assert bad.returncode == 2 and "there are 4 devices" in bad.stderr and "Traceback" not in bad.stderr


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_COMPILER, reason="the TPU compiler (libtpu) is not installed")
def test_a_plan_of_two_slices_counts_what_goes_between_them():
    """Of a step: the gradient's shards, once, in float32 or half of that; all else stays within a slice."""
    arguments = ["plan", "--topology", "v5e:2x2", "--json", "true", "--stage", "sft", "--data.batch_size", "8",
                 "--model.arch", json.dumps({**TINY, "width": 512, "head_dim": 128, "ffn_width": 1024}),
                 "--mesh.slices", "2", "--mesh.data", "2", "--mesh.fsdp", "4", "--data.max_length", "128"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax", *arguments], capture_output=True, text=True, timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    arch = cli.parse("sft", arguments[9:11]).model.arch
    shards = sum(int(np.prod(shape)) for shape in leaf_shapes(arch, score_head=False).values()) / 4  # of one slice
    assert 2 * shards <= row["collectives"][hlo.BETWEEN_SLICES] < 1.2 * 4 * shards
    assert row["devices"] == 8 and row["seconds"][hlo.BETWEEN_SLICES] > 0


def a_row(peak_gib, seconds):
    return [plan.Row("step", 0, 0, peak_gib * chips.GIB, 1, 1, 1, {}, (), {"compute": seconds}, 1, 0)], {}


def test_suggest_compiles_the_best_until_a_few_fit_and_ranks_them(monkeypatch, capsys):
    tried = []

    def compiled(config, *_):  # the third is the fastest; the first does not fit
        tried.append(config)
        return a_row(1 if len(tried) > 1 else 20, abs(len(tried) - 3) + 1.0)

    monkeypatch.setattr(suggest, "analyse", compiled)
    given = ["--model.arch", json.dumps(TINY), "--data.batch_size", "32", "--data.max_length", "64"]
    suggest.suggest(cli.parse("sft", given), chips.CHIPS["v5e"], [None] * 4, PlanArgs(topology="v5e:2x2"))
    out, waiting = capsys.readouterr()
    assert len(tried) == 1 + suggest.FEW <= suggest.TRIED
    assert "no     --mesh" in out and "does not fit" in out and out.count("MFU in the step") == len(tried)
    assert waiting.count("plan: setting ") == len(tried) and "plan: setting 2 of 6 at most, minutes each" in waiting
    last = out.partition("fastest by the roofline:")[2].splitlines()[1]
    assert cli.parse("sft", [*given, *shlex.split(last.partition("per token")[2])]) == tried[2]


def test_suggest_goes_on_from_the_fastest_while_what_it_waits_for_grows_less(monkeypatch, capsys):
    tried = []

    def compiled(config, *_):  # memory binds until microbatches are few, then compute, of which dots saves some
        tried.append(config)
        seconds = {"memory": 3.0 * config.ppo.accumulate, "compute": 5.0 - (config.model.remat == "dots")}
        return [plan.Row("update", 0, 0, chips.GIB, 1, 1, 1, {}, (), seconds, 1, 0)], {}

    monkeypatch.setattr(suggest, "analyse", compiled)
    given = ["--config", "qwen2.5_0.5b_lora_ppo", "--model.remat", "full", "--ppo.accumulate", "2"]
    suggest.suggest(cli.parse("ppo", given), chips.CHIPS["v5e"], [None], PlanArgs(topology="v5e:1x1"))
    found = [(one.ppo.accumulate, one.model.remat) for one in tried]
    assert found[-2:] == [(1, "full"), (1, "dots")] and set(found[:-2]) == {(2, "full")}
    last = capsys.readouterr().out.partition("fastest by the roofline:")[2].splitlines()[1]
    assert cli.parse("ppo", [*given, *shlex.split(last.partition("per token")[2])]) == tried[-1]
    # Text of one length has no packed microbatches to make larger.
    assert (
        suggest.improved(cli.parse("sft", ["--config", "smollm2_360m_sft", "--sft.accumulate", "1"]), "memory") is None
    )
    more = suggest.improved(cli.parse("reward", ["--config", "llama3.2_1b_reward"]), "network")
    assert more.data.microbatch_tokens == 8192


def test_suggest_finds_two_axes_for_weights_and_fewer_minibatches_on_a_large_slice():
    """From 8x8 on one axis over both dimensions of a slice has its gradients summed whole: the network binds."""
    config = cli.parse("ppo", ["--config", "llama3_8b_ppo", "--mesh.rules", "[]", "--mesh.data", "1", "--mesh.fsdp",
                               "256", "--ppo.minibatches", "4"])  # fmt: skip
    chip, dims = chips.CHIPS["v5e"], (16, 16)
    order = suggest.ranked(config, chip, 256, dims)
    two = [one for one in order if "D=fsdp+data" in one.mesh.rules and one.mesh.data > 1]
    assert two[: suggest.FEW] == order[: suggest.FEW] and any(one.ppo.minibatches == 2 for one in two[: suggest.FEW])
    # Over one axis of data, as in the preset, it takes not much more by the sum.
    seconds = [suggest.estimate(one, chip, dims).seconds for one in two]
    assert any(one.mesh.tensor == 1 and one.mesh.data == 16 and took < (1 + suggest.ROUGH) * min(seconds)
               for one, took in zip(two, seconds, strict=True))  # fmt: skip
    # What was compiled for it: 29.3 s an iteration as given; 15.1 over two axes, in two minibatches.
    preset = cli.parse("ppo", ["--config", "llama3_8b_ppo"])
    before, after = (1024 * suggest.estimate(one, chip, dims).seconds for one in (config, preset))
    assert before == pytest.approx(29.3, rel=suggest.ROUGH) and after == pytest.approx(15.1, rel=suggest.ROUGH)
    # Rows still go evenly over the devices, and a rule of one's own for D is kept.
    for one in suggest.candidates(preset, 256):
        ways = one.mesh.data * one.mesh.fsdp
        assert one.data.batch_size % (ways * one.ppo.minibatches) == 0 and one.mesh.rules == preset.mesh.rules
