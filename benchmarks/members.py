"""What an ensemble of four costs to score with, over one model: heads or adapters on one trunk, models of their own.

    python -m benchmarks.members

Processor seconds of a compiled forward pass over 16 responses of 128 tokens, in turns, the median of `--times`; and
the parameters that are held. Adapters have rank 8 on every linear layer.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import ArchConfig, LoRAConfig, MeshConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.models import Model
from rlhf_jax.models.kernels import count
from rlhf_jax.models.loading import Loaded, adapted
from rlhf_jax.runs.curves import text_table
from rlhf_jax.sharding import make_mesh
from rlhf_jax.training.responses import Ensemble, response_scores, view_of

ARCH = ArchConfig(
    vocab_size=1024,
    width=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    ffn_width=688,
    max_positions=128,
)
ROWS, LENGTH, MEMBERS = 16, 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=12)
    args = parser.parse_args()
    shape = ROWS, 1, LENGTH
    batch = {
        "tokens": jax.random.randint(jax.random.key(0), shape, 3, ARCH.vocab_size),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "last": jnp.full((ROWS, 1), LENGTH - 1),
    }
    one, heads = Model(ARCH, score_head=True), Model(ARCH, score_head=True, members=MEMBERS)
    params = one.init(jax.random.key(0))
    adapters = Loaded(replace(heads, own_adapters=True), heads.init(jax.random.key(0)))
    adapters = adapted(adapters, LoRAConfig(rank=8), make_mesh(MeshConfig()), jax.random.key(1))
    asked = {
        "one model": (one, params),
        f"{MEMBERS} heads": (heads, heads.init(jax.random.key(0))),
        f"{MEMBERS} adapters": (adapters.model, adapters.whole(adapters.params)),
        f"{MEMBERS} models": (Ensemble((Loaded(one, {}),) * MEMBERS), [params] * MEMBERS),
    }
    programs = {name: jax.jit(partial(response_scores, model)) for name, (model, _) in asked.items()}
    spent: dict[str, list[float]] = {name: [] for name in asked}
    for number in range(args.times + 1):
        for name, program in programs.items():
            started = time.process_time()
            jax.block_until_ready(program(asked[name][1], view_of(batch)))
            if number:  # the first one compiles
                spent[name].append(time.process_time() - started)
    median = {name: float(np.median(each)) for name, each in spent.items()}
    rows = [
        [name, seconds, seconds / median["one model"], count(asked[name][1]) / count(params)]
        for name, seconds in median.items()
    ]
    print(text_table(["scored by", "CPU seconds", "over one model", "parameters over one model's"], rows))


if __name__ == "__main__":
    main()
