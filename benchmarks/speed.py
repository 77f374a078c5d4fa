"""Steady-state speed of SFT, reward-model, generation and PPO steps; one JSON line per measurement.

    python -m benchmarks.speed --task sft --task ppo --size 42m
    python -m benchmarks.speed --peer trl=PYTHON --peer trl_ppo=PYTHON --peer tunix=PYTHON --peer bare=PYTHON

Every measurement runs in a process of its own, ours and the peers' in turn (benchmarks/peers/README.md has the
settings and how to make the peers' environments). Random weights, float32 on CPU unless --dtype says otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = ("sft", "reward", "generate", "ppo")
PEERS = {"trl": "trl_peer.py", "trl_ppo": "trl_ppo_peer.py", "tunix": "tunix_peer.py", "bare": "bare_jax.py"}
PEER_TASKS = {"trl": TASKS[:3], "trl_ppo": ("ppo",), "tunix": ("sft", "generate", "ppo"), "bare": ("sft", "generate")}
SIZES = {
    "42m": dict(width=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64, ffn_width=1408, vocab_size=32000),
    "5m": dict(width=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64, ffn_width=704, vocab_size=4096),
}
WARMUP = 2
HUGE_PAGES = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}
"""A step's temporaries are gigabytes that are given back and faulted in again; this keeps them, in 2 MiB pages."""


def token_batch(rows: int, length: int, vocab: int, seed: int = 0) -> dict[str, Any]:
    """Full rows of random ids; 3 and up, so that none is special."""
    import numpy as np

    return {
        "tokens": np.random.default_rng(seed).integers(3, vocab, (rows, length), dtype=np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy(),
        "segment_ids": np.ones((rows, length), np.int32),
    }


def make_sft(model: Any, mesh: Any) -> tuple[Callable[[int], Any], dict[str, int]]:
    """One optimiser step on 8 x 256 tokens."""
    import numpy as np

    from rlhf_jax.losses import next_token_loss
    from rlhf_jax.sft import objective

    batch = token_batch(8, 256, model.arch.vocab_size)
    batch["weights"] = np.full((8, 256), 1 / (8 * 255), np.float32)
    return train_step(model, mesh, objective(model, next_token_loss), batch), {
        "batch": 8,
        "prompt_len": 256,
        "gen_len": 0,
    }


def make_reward(model: Any, mesh: Any) -> tuple[Callable[[int], Any], dict[str, int]]:
    """One optimiser step on 8 pairs of 256 tokens."""
    from functools import partial

    import numpy as np

    from rlhf_jax.losses import pairwise_reward_loss
    from rlhf_jax.reward import objective

    model = dataclasses.replace(model, score_head=True)
    batch = {name: x.reshape(8, 2, 256) for name, x in token_batch(16, 256, model.arch.vocab_size).items()}
    ones = np.ones(8, np.float32)
    batch |= {"last": np.full((8, 2), 255, np.int32), "weights": ones / 8, "labels": ones, "margins": 0 * ones}
    loss = objective(model, partial(pairwise_reward_loss, center_coef=0.0))
    return train_step(model, mesh, loss, batch), {"batch": 16, "prompt_len": 256, "gen_len": 0}


def train_step(model: Any, mesh: Any, loss_fn: Any, batch: Any) -> Callable[[int], Any]:
    """AdamW with a clip at 1.0 on one batch."""
    import jax

    from rlhf_jax.config import OptimConfig
    from rlhf_jax.sharding import put_batch, replicated
    from rlhf_jax.training.state import create_state, make_optimizer, make_schedule
    from rlhf_jax.training.step import make_train_step

    config = OptimConfig(learning_rate=1e-4, weight_decay=0.01, clip_norm=1.0)
    tx = make_optimizer(config, make_schedule(config, 1000))
    box = [create_state(jax.jit(model.init)(jax.random.key(0)), tx, mesh)]
    step = make_train_step(loss_fn, tx, mesh=mesh, state=box[0])
    placed, key = put_batch(mesh, batch), jax.device_put(jax.random.key(1), replicated(mesh))

    def run(i: int) -> Any:
        box[0], metrics = step(box[0], placed, key)
        return box[0], metrics

    return run


def make_generate(model: Any, mesh: Any) -> tuple[Callable[[int], Any], dict[str, int]]:
    """16 prompts of 64, exactly 128 new tokens, temperature 1, top-p 0.9, top-k 50."""
    import jax
    import numpy as np

    from rlhf_jax.config import SamplingConfig
    from rlhf_jax.inference.generate import make_sampler
    from rlhf_jax.inference.sampling import SamplingLaw
    from rlhf_jax.sharding import put_batch

    config = SamplingConfig(max_new_tokens=128, min_new_tokens=128, top_p=0.9, top_k=50, chunk=64)
    rollout = jax.jit(make_sampler(model, config, (2,)))
    params, law = jax.jit(model.init)(jax.random.key(0)), SamplingLaw.from_config(config)
    prompt = put_batch(mesh, token_batch(16, 64, model.arch.vocab_size)["tokens"])
    mask = put_batch(mesh, np.ones((16, 64), bool))

    def run(i: int) -> Any:
        out = rollout(params, prompt, mask, jax.random.key(i), law)
        assert int(out.mask.sum()) == 16 * 128, "stopped early"
        return out

    return run, {"batch": 16, "prompt_len": 64, "gen_len": 128}


def make_ppo(model: Any, mesh: Any) -> tuple[Callable[[int], Any], dict[str, int]]:
    """One PPO iteration: 16 prompts of 64, 64 new tokens, four models of the same size, 4 epochs x 1 minibatch."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from rlhf_jax.config import DataConfig, PPOArgs, PPOConfig, SamplingConfig
    from rlhf_jax.inference.sampling import SamplingLaw
    from rlhf_jax.models.loading import Loaded
    from rlhf_jax.online.networks import Networks
    from rlhf_jax.ppo import core
    from rlhf_jax.ppo.train import make_programs
    from rlhf_jax.sharding import batch_sharding, put_batch, replicated

    sampling = SamplingConfig(max_new_tokens=64, chunk=64)
    config = PPOArgs(sampling=sampling, data=DataConfig(batch_size=16), ppo=PPOConfig(epochs=4, minibatches=1))
    scalar = dataclasses.replace(model, score_head=True)
    keys = jax.random.split(jax.random.key(0), 3)
    policy, reward, value = (jax.jit(m.init)(k) for m, k in zip((model, scalar, scalar), keys, strict=True))
    params = {"policy": jax.tree.map(jnp.copy, policy), "value": value}
    nets = Networks(core.Models(model, scalar, scalar), Loaded(model, policy), policy, reward, None)
    programs, first = make_programs(config, nets, params, mesh, ())  # no stop ids: exactly 64 tokens
    law = jax.device_put(SamplingLaw.from_config(sampling), replicated(mesh))
    prompt = put_batch(mesh, token_batch(16, 64, model.arch.vocab_size)["tokens"])
    mask = put_batch(mesh, np.ones((16, 64), bool))
    host = jax.device_put(np.zeros(16, np.float32), batch_sharding(mesh))
    box = [first, jax.device_put(np.float32(0.05), replicated(mesh))]

    def run(i: int) -> Any:
        k1, k2 = jax.random.split(jax.device_put(jax.random.key(i), replicated(mesh)))
        state, coef = box
        rollout = programs.rollout(state.params["policy"], prompt, mask, k1, law)
        experience, coef, metrics, _ = programs.score(
            state.params, nets.ref, nets.reward, rollout, host, coef, law.temperature
        )
        state, updates = programs.update(state, experience, k2, law.temperature, None)
        box[:] = [state, coef]
        return state, metrics, updates

    return run, {"batch": 16, "prompt_len": 64, "gen_len": 64}


def measure(task: str, size: str, repeats: int, dtype: str) -> dict[str, Any]:
    """Our own measurement, in this process."""
    import jax

    import rlhf_jax
    from rlhf_jax.config import ArchConfig, MeshConfig, ModelConfig
    from rlhf_jax.models import Model
    from rlhf_jax.sharding import make_mesh

    compiles: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiles.append(name) if name.endswith("backend_compile_duration") else None
    )
    mesh = make_mesh(MeshConfig())
    model = Model.from_config(ModelConfig(compute_dtype=dtype), ArchConfig(**SIZES[size]), mesh.rules)
    makers = {"sft": make_sft, "reward": make_reward, "generate": make_generate, "ppo": make_ppo}
    with jax.set_mesh(mesh.grid):
        run, shape = makers[task](model, mesh)
        times = []
        for i in range(WARMUP + repeats):
            if i == WARMUP:
                compiles.clear()
            since = time.perf_counter()
            jax.block_until_ready(run(i))
            times.append(time.perf_counter() - since)
    steady = times[WARMUP:]
    median = statistics.median(steady)
    tokens = shape["batch"] * (shape["gen_len"] or shape["prompt_len"])
    return {
        "system": "rlhf_jax",
        "version": f"{rlhf_jax.__version__} (jax {jax.__version__}, {jax.devices()[0].device_kind})",
        "task": task,
        "model": size,
        **shape,
        "seconds_median": round(median, 4),
        "seconds_min": round(min(steady), 4),
        "tokens_per_s": round(tokens / median, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "compile_s": round(times[0] - median, 2),
        "compiles_after_warmup": len(compiles),
    }


def child(command: list[str], environment: dict[str, str]) -> None:
    """Run one measurement in a process of its own and pass its last line on."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        print(json.dumps({"failed": command[1:], "error": done.stderr.strip().splitlines()[-1:]}), flush=True)
    else:
        print(done.stdout.strip().splitlines()[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="repeat for several; default all")
    parser.add_argument("--size", action="append", choices=tuple(SIZES), help="repeat for several; default both")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--huge-pages", action="store_true", help="glibc's huge pages, for all systems")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in args.peer)
    unknown = set(peers) - set(PEERS)
    if unknown:
        parser.error(f"unknown peer {sorted(unknown)}; choose from {sorted(PEERS)}")
    pages = HUGE_PAGES if args.huge_pages else {}
    for size in args.size or SIZES:
        for task in args.task or TASKS:
            common = ["--task", task, "--size", size, "--repeats", str(args.repeats)]
            if args.in_process:
                print(json.dumps(measure(task, size, args.repeats, args.dtype)), flush=True)
                continue
            child([sys.executable, "-m", "benchmarks.speed", "--in-process", "--dtype", args.dtype, *common], pages)
            for name, python in peers.items():
                if task in PEER_TASKS[name]:
                    child([python, str(Path(__file__).parent / "peers" / PEERS[name]), *common], pages)


if __name__ == "__main__":
    main()
