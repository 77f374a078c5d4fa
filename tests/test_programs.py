"""Laws of PPO's compiled programs: compiled once, no logits of a whole batch in memory, one transfer per iteration."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from tiny import TOY_ROWS, Bigram, iteration, make_experience, make_rollout, model_params, toy_run
from tiny import bigram_params as some_params

from rlhf_jax.config import ArchConfig, SamplingConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.hosts.processes import pack
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.models import Model
from rlhf_jax.online.iteration import evaluate, sample_rows
from rlhf_jax.online.method import Method
from rlhf_jax.ppo import Models, make_ppo_step, make_score, train
from rlhf_jax.runs.run import Run
from rlhf_jax.sharding import make_mesh, replicated
from rlhf_jax.training.state import TrainState


@pytest.fixture(scope="module")
def ppo() -> list:
    """PPO with a reward model on all 8 devices, and what its loop carries, which the tests put back: they share it,
    since compiling takes most of their time.
    """
    return [*train.setup(toy_run(iterations=40, kl_target=0.01, kl_horizon=100.0, ema_decay=0.9), **TOY_ROWS)]


def with_temperature(method: Method, temperature: float) -> Method:
    law = SamplingLaw.from_config(SamplingConfig(max_new_tokens=6, temperature=temperature))
    inputs = dataclasses.replace(method.inputs, law=jax.device_put(law, replicated(method.mesh)))
    return dataclasses.replace(method, inputs=inputs)


@pytest.mark.slow
def test_every_program_compiles_once_while_temperature_kl_coefficient_and_learning_rate_change(ppo):
    method, coefs, temperatures = ppo[0], [], np.linspace(0.5, 2.0, 20)
    programs, packed = method.programs, pack._cache_size()
    with jax.set_mesh(method.mesh.grid):
        for i, temperature in enumerate(temperatures):
            ppo[1], metrics, _ = iteration(with_temperature(method, temperature), ppo[1], i)
            pack(tuple(metrics.values()))
            coefs.append(float(metrics["ppo/kl_coef"]))
            if i == 10:
                evaluate(method, ppo[1])
    assert len(set(coefs)) > 10  # the adaptive controller was at work
    rates = [float(programs.schedule(i)) for i in range(20)]
    assert len(set(rates)) == 20
    sizes = {name: getattr(programs, name)._cache_size() for name in ("rollout", "score", "update", "average")}
    assert sizes == {"rollout": 1, "score": 1, "update": 1, "average": 1}
    assert pack._cache_size() - packed <= 1  # 0 where an earlier test packed as many scalars


class Fetches:
    """Counts what comes from the devices to the host: a jax.device_get counts once, whatever it holds."""

    def __init__(self, monkeypatch):
        self.count, self.inside = 0, False
        get, array, value = jax.device_get, ArrayImpl.__array__, ArrayImpl._value.fget

        def counted(fetch):
            def wrapped(*args, **kwargs):
                if self.inside:
                    return fetch(*args, **kwargs)
                self.count, self.inside = self.count + 1, True
                try:
                    return fetch(*args, **kwargs)
                finally:
                    self.inside = False

            return wrapped

        monkeypatch.setattr(jax, "device_get", counted(get))
        monkeypatch.setattr(ArrayImpl, "__array__", counted(array))
        monkeypatch.setattr(ArrayImpl, "_value", property(counted(value)))


def test_the_counter_sees_every_way_to_the_host(monkeypatch):
    mesh = make_mesh(toy_run().mesh)
    x = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    ways = [float, int, bool, np.asarray, np.array, str, lambda x: x.item(), lambda x: x.tolist(), lambda x: f"{x:d}"]
    for way in [*ways, lambda x: jax.device_get((x, x))]:
        with monkeypatch.context() as patch:
            fetches = Fetches(patch)
            way(jax.jit(lambda x: x + 1)(x))  # a fresh array: a fetched one keeps its value
            assert fetches.count == 1, way


@pytest.mark.slow
def test_an_iteration_fetches_once_from_the_devices_and_sends_nothing_unasked(ppo, tmp_path, monkeypatch):
    method, loop = ppo
    config = replace(method.config, run__output_dir=str(tmp_path / "run"))
    tables = []
    with jax.set_mesh(method.mesh.grid), Run("ppo", config, total=8) as out:
        loop, _, _ = iteration(method, loop, 20)
        fetches = Fetches(monkeypatch)
        with jax.transfer_guard("disallow"):
            for i in range(8):
                loop, metrics, table = iteration(method, loop, 21 + i)
                tokens = [table["rollout"].mask.sum()]
                table = table if i % 4 == 3 else None  # a sample table travels with the metrics of its iteration
                out.metrics.log(i + 1, metrics, {}, tokens=tokens, table=table, on_table=tables.append)
                assert fetches.count == i  # metrics are fetched while the next iteration runs
            out.metrics.flush()
        assert fetches.count == 8
        monkeypatch.undo()
        ppo[1] = loop
        out.finish({})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0].keys() >= {"rollout/reward", "rollout/kl", "policy/first_ratio_max", "value/explained_variance"}
    assert all(abs(line["policy/first_ratio_max"] - 1) < 2e-6 for line in lines)
    assert len(tables) == 2 and len(sample_rows(method, tables[0], {"given": ["p"] * 16, "seen": [{}] * 16}, 3)) == 3


# --- memory

PRIME = 23  # the vocabulary: a buffer of logits is one whose size it divides
LONG = ArchConfig(
    vocab_size=PRIME, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_width=32, max_positions=16
)
ROWS, PROMPT, NEW = 4, 3, 12
LOGITS = ROWS * NEW * PRIME


def largest_logits(text: str) -> int:
    """Elements of the largest float32 buffer in a compiled program, of any layout, that has the vocabulary in it."""
    shapes = [[int(d) for d in dims.split(",")] for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    return max((math.prod(dims) for dims in shapes if math.prod(dims) % PRIME == 0), default=0)


def compiled(kind: str, chunk: int) -> str:
    """The update or the scoring program of a decoder whose logits come in chunks of so many positions, as text."""
    policy = Model(LONG, logprob_chunk=chunk)
    models = Models(policy, Bigram())
    params = {"policy": model_params(policy, 0), "value": some_params(0)["value"]}
    run = toy_run(epochs=2, entropy_coef=0.1)
    one = jnp.float32(1.0)
    if kind == "score":
        rollout = make_rollout(0, some_params(0)["policy"], rows=ROWS, prompt_len=PROMPT, num=NEW)
        program = make_score(models, run.ppo, recompute=True)
        lowered = jax.jit(program).lower(params, params["policy"], None, rollout, jnp.zeros(ROWS), one, one)
    else:
        x = make_experience(0, some_params(0), rows=ROWS, prompt_len=PROMPT, num=NEW)
        update, tx, _ = make_ppo_step(models, run)
        lowered = jax.jit(update).lower(TrainState.create(params, tx), x, jax.random.key(0), one)
    return lowered.compile().as_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["update", "score"])
def test_no_buffer_holds_the_logits_of_a_whole_batch_when_they_come_in_chunks(kind):
    columns = ROWS * (PROMPT + NEW)
    chunked, whole = largest_logits(compiled(kind, 16)), largest_logits(compiled(kind, columns))
    assert 16 * PRIME <= chunked < LOGITS
    assert whole == columns * PRIME  # without chunks there is such a buffer, so that the test can fail


def test_the_reader_of_programs_finds_logits_in_any_layout():
    assert largest_logits("f32[4,12,23]{2,1,0} f32[7]") == LOGITS
    assert largest_logits("fusion(f32[48,23]{1,0} %a)") == largest_logits("f32[1104]{0}") == LOGITS
    assert largest_logits("f32[3,4,4,23]") == LOGITS
    assert largest_logits("f32[4,12,16]{2,1,0}, s32[4,12,23]") == 0
