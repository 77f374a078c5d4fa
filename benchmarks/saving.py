"""What saves cost: time per step without and with them, time that a save holds up the loop, bytes on disk.

python -m benchmarks.saving --width 512 --layers 8 --every 10

Prints one JSON line. `blocked_ms` is what one save holds up the loop for (the copy to the host), `background_ms` how
long it goes on writing and checking behind the training; `synchronous_ms` is the same save waited for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.config import ArchConfig, MeshConfig, OptimConfig
from rlhf_jax.losses import next_token_loss
from rlhf_jax.models import Model
from rlhf_jax.models.kernels import count
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.sft import objective
from rlhf_jax.sharding import make_mesh, put_batch, tree_shardings
from rlhf_jax.training.state import TrainState, create_state, make_optimizer, make_schedule
from rlhf_jax.training.step import make_train_step


def run_steps(step: Any, state: TrainState, batch: Any, steps: int, every: int, kept: Checkpoints | None) -> Any:
    """Milliseconds of each step, of each save's hold-up, and the state."""
    times, blocked, key = [], [], jax.random.key(0)
    for i in range(steps):
        began = time.perf_counter()
        state, metrics = step(state, batch, key)
        if kept is not None and (i + 1) % every == 0:
            jax.block_until_ready(metrics)
            saving = time.perf_counter()
            kept.save(i + 1, {"state": state}, {"best": None})
            blocked.append(1e3 * (time.perf_counter() - saving))
        jax.block_until_ready(metrics)
        times.append(1e3 * (time.perf_counter() - began))
    return times, blocked, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 512), ("layers", 8), ("vocab", 8192), ("batch", 8), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    args = parser.parse_args()
    arch = ArchConfig(
        vocab_size=args.vocab, width=args.width, num_layers=args.layers, num_heads=args.width // 64,
        num_kv_heads=args.width // 64, head_dim=64, ffn_width=3 * args.width, max_positions=args.length,
    )  # fmt: skip
    mesh, optim = make_mesh(MeshConfig()), OptimConfig(learning_rate=3e-4)
    tx = make_optimizer(optim, make_schedule(optim, args.steps))
    shape = (args.batch, args.length)
    tokens = np.random.default_rng(0).integers(0, args.vocab, shape, np.int32)
    positions = np.broadcast_to(np.arange(args.length, dtype=np.int32), shape)
    weights = np.full(shape, 1 / tokens.size, np.float32)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": np.ones(shape, np.int32), "weights": weights}
    with jax.set_mesh(mesh.grid), tempfile.TemporaryDirectory() as folder:
        model = Model(arch)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        params = jax.jit(model.init, out_shardings=tree_shardings(mesh, shapes))(jax.random.key(0))
        numbers = count(params)
        state = create_state(params, tx, mesh)
        step = make_train_step(objective(model, next_token_loss), tx, mesh=mesh, state=state)
        placed = put_batch(mesh, batch)
        _, _, state = run_steps(step, state, placed, 3, args.every, None)
        without, _, state = run_steps(step, state, placed, args.steps, args.every, None)
        kept = Checkpoints(Path(folder) / "checkpoints", keep_last=1, keep_every=0)
        kept.save(0, {"state": state}, {"best": None})  # the first one imports and makes things
        kept.wait()
        saved, blocked, state = run_steps(step, state, placed, args.steps, args.every, kept)
        kept.wait()
        began = time.perf_counter()
        kept.save(args.steps + 1, {"state": state}, {"best": None})
        begun = time.perf_counter()
        kept.wait()
        done = time.perf_counter()
        size = sum(path.stat().st_size for path in kept.path(args.steps + 1).rglob("*") if path.is_file())
    line = {
        "device": jax.devices()[0].device_kind,
        "parameters": numbers,
        "bytes": size,
        "bytes_per_parameter": round(size / numbers, 2),
        "step_ms": round(statistics.median(without), 1),
        "mean_step_ms": round(statistics.fmean(without), 1),
        "mean_step_ms_saving": round(statistics.fmean(saved), 1),
        "every": args.every,
        "overhead_ms_per_save": round((statistics.fmean(saved) - statistics.fmean(without)) * args.every, 1),
        "blocked_ms": round(statistics.median(blocked), 1),
        "background_ms": round(1e3 * (done - begun), 1),
        "synchronous_ms": round(1e3 * (done - began), 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
