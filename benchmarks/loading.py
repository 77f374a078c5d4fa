"""Peak host memory and time of loading a made-up checkpoint over fake CPU devices.

    python -m benchmarks.loading --gib 2 --devices 8

A child process loads it with fsdp over all devices. Prints one JSON line. `peak_rss_mb` is the largest resident set
above that of a process that has imported jax and started its devices. On CPU the arrays themselves lie in host memory,
so the least possible `ratio` (peak over the bytes of all shards) is 1; on an accelerator what is above 1 is all that
the host needs. `limit_ratio` is 1.5 plus the share of the largest tensor, and `ok` says that the peak is below it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

LAYERS, VOCABULARY = 16, 32_000
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def arch_of(num_bytes: float, itemsize: int) -> Any:
    """A Llama shape with about so many bytes of weights; every dimension divides by 8."""
    from rlhf_jax.config import ArchConfig

    width = 64
    while True:
        heads, ffn = width // 64, -(-(width * 8 // 3) // 64) * 64
        count = VOCABULARY * width + LAYERS * (4 * width**2 + 3 * width * ffn + 2 * width) + width
        if count * itemsize >= num_bytes:
            return ArchConfig(
                vocab_size=VOCABULARY, width=width, num_layers=LAYERS, num_heads=heads, num_kv_heads=heads,
                head_dim=64, ffn_width=ffn, max_positions=2048,
            )  # fmt: skip
        width += 64


def tensors_of(arch: Any, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Stored names and random tensors, one at a time."""
    from rlhf_jax.models.hf.families import LLAMA
    from rlhf_jax.models.hf.layout import Layout, leaf_shapes

    layout, leaves, rng = Layout(arch), leaf_shapes(arch, score_head=False), np.random.default_rng(0)
    for layer in [None, *range(arch.num_layers)]:
        for name, tensor in LLAMA.tensors.items():
            if tensor.leaf in leaves and ("{}" in name) == (layer is not None):
                values = rng.random(layout.stored_shape(tensor), np.float32) - 0.5
                yield name.format(layer), values.astype(dtype)


def write_checkpoint(folder: Path, gib: float, dtype: str, file_bytes: float = 5e8) -> tuple[int, int]:
    """(bytes of all tensors, of the largest) of a new directory, in several files with an index."""
    from safetensors.numpy import save_file

    from rlhf_jax.models.hf.config_json import to_json
    from rlhf_jax.models.hf.families import LLAMA

    arch, where, held, sizes = arch_of(gib * 2**30, DTYPES[dtype].itemsize), {}, {}, []

    def flush() -> None:
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, name))
        held.clear()

    folder.mkdir(parents=True, exist_ok=True)
    for name, array in tensors_of(arch, DTYPES[dtype]):
        held[name] = array
        sizes.append(array.nbytes)
        if sum(array.nbytes for array in held.values()) > file_bytes:
            flush()
    flush()
    (folder / "config.json").write_text(json.dumps(to_json(LLAMA, arch, score_head=False)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sum(sizes), max(sizes)


def peak_bytes() -> int:
    """The largest resident set of this process so far (Linux); getrusage would count the parent's at the fork, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def load(folder: Path, dtype: str) -> dict[str, Any]:
    """What loading costs this process, which has done nothing else."""
    import jax

    from rlhf_jax.config import MeshConfig
    from rlhf_jax.models import hf
    from rlhf_jax.sharding import make_mesh

    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    for device in jax.devices():
        jax.device_put(np.zeros(1), device).block_until_ready()
    before, start = peak_bytes(), time.perf_counter()
    params = hf.load_params(folder, hf.read_config(folder)[0], score_head=False, mesh=mesh, dtype=dtype)
    jax.block_until_ready(params)
    seconds, peak = time.perf_counter() - start, peak_bytes() - before
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    return {"sharded_bytes": sum(shards), "largest_shard": max(shards), "peak_bytes": peak, "seconds": seconds}


def measure(gib: float, dtype: str, stored: str, devices: int) -> dict[str, Any]:
    """Write a checkpoint, load it in a child process, and put the figures together."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_loading") as temporary:
        total, largest = write_checkpoint(Path(temporary), gib, stored)
        arguments = [sys.executable, "-m", "benchmarks.loading", "--load", temporary, "--dtype", dtype]
        home = Path(__file__).parents[1]
        done = subprocess.run(arguments, env=env, cwd=home, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    sharded, peak = found["sharded_bytes"], found["peak_bytes"]
    limit = 1.5 * sharded + largest
    return {
        "benchmark": "loading", "stored": stored, "dtype": dtype, "devices": devices, "checkpoint_bytes": total,
        "sharded_bytes": sharded, "largest_tensor": largest, "largest_shard": found["largest_shard"],
        "peak_rss_mb": round(peak / 1e6, 1), "ratio": round(peak / sharded, 3),
        "limit_ratio": round(limit / sharded, 3), "ok": peak < limit,
        "seconds": round(found["seconds"], 2), "mb_per_s": math.floor(total / 1e6 / found["seconds"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the arrays")
    parser.add_argument("--stored", choices=DTYPES, default="float32", help="of the checkpoint")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(Path(arguments.load), arguments.dtype)))
        return
    print(json.dumps(measure(arguments.gib, arguments.dtype, arguments.stored, arguments.devices)))


if __name__ == "__main__":
    main()
