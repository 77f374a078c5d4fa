"""What programs cost against the share of token slots that hold tokens; one JSON line per program.

    python -m benchmarks.shares --size 5m --rows 64 --figure shares.png

Rows have lengths as a constant chance of ending at each token makes them, cut at the longest; in a rollout stop ids
are that chance, and its tokens are those of prompts and responses, since both are computed. One process, all shares in
turns, medians. The cost is CPU seconds. `against` is the cost over that of full rows and over the share: 1 where cost
follows tokens. `within` is how far costs are from a line through the origin, as a part of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.common import SIZES, Row, Work
from benchmarks.programs import make_training, model_of, ppo_programs
from rlhf_jax.config import MeshConfig, SamplingConfig
from rlhf_jax.inference.generate import make_sampler
from rlhf_jax.inference.sampling import SamplingLaw
from rlhf_jax.models import Model
from rlhf_jax.runs.curves import COLOUR_MAP
from rlhf_jax.sharding import Mesh, batch_sharding, make_mesh, put_batch, replicated
from rlhf_jax.types import Rollout

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
STOPS = {0.2: 0.0199, 0.4: 0.0088, 0.6: 0.00455, 0.8: 0.00183, 1.0: 0.0}
"""Of the vocabulary: with chance s at each token the mean of 256 is (1 - (1 - s)^256) / s."""

PROMPT, NEW = 64, 256
"""Tokens of a prompt of the rollout, and of the longest response."""

Runs = dict[float, Callable[[], tuple[Any, float]]]
"""By share: a run, which returns what to wait for and the share that there really was; in a rollout of responses."""


def lengths(share: float, rows: int, longest: int) -> np.ndarray:
    """Of rows in a random order, as a constant chance of ending at each token makes them; their mean is the share."""
    places = (np.arange(rows) + 0.5) / rows
    low, high = 0.0, 1.0
    for _ in range(50):  # bisection of the chance
        chance = (low + high) / 2
        sizes = np.clip(np.ceil(np.log(places) / np.log1p(-min(max(chance, 1e-9), 0.999))), 2, longest).astype(int)
        low, high = (chance, high) if sizes.mean() > share * longest else (low, chance)
    return np.random.default_rng(0).permutation(sizes)


def reward_runs(size: str, rows: int, model: Model, mesh: Mesh) -> Runs:
    """Steps of a reward model on pairs of up to 512 tokens, behind prompts of two, so that nothing is shared."""
    work, ids = Work(rows // 2, 2, 512), np.random.default_rng(0).integers(3, SIZES[size]["vocab"], 512).tolist()
    steps = [
        [Row(ids[:2], [ids[2:a], ids[2:b]]) for a, b in lengths(share, rows, 512).reshape(-1, 2)] for share in SHARES
    ]
    run = make_training("reward", work, steps, model, mesh, pack="on")
    tokens = [sum(2 + len(ids) for row in step for ids in row.responses) / (rows * 512) for step in steps]
    return {share: lambda i=i: (run(i)[0], tokens[i]) for i, share in enumerate(SHARES)}


def ppo_runs(size: str, rows: int, model: Model, mesh: Mesh) -> dict[str, Runs]:
    """Scoring and one epoch of updates of rows of up to 128 + 128 tokens."""
    work = Work(rows, 1, 128, 128)
    (programs, first), nets, _ = ppo_programs(work, model, mesh, (), epochs=1)
    number = lambda x: jax.device_put(np.float32(x), replicated(mesh))  # noqa: E731
    key, box = jax.device_put(jax.random.key(0), replicated(mesh)), [first]
    host = jax.device_put(np.zeros(rows, np.float32), batch_sharding(mesh))
    rng = np.random.default_rng(0)

    def rollout_of(share: float) -> Rollout:
        sizes = lengths(share, rows, 128)[:, None]
        ids = rng.integers(3, SIZES[size]["vocab"], (2, rows, 128), dtype=np.int32)
        prompt, mask = np.arange(128) >= 128 - sizes, np.arange(128) < sizes
        logprobs = np.where(mask, -8.0, 0.0).astype(np.float32)
        return Rollout(*put_batch(mesh, (ids[0], prompt, ids[1], mask, logprobs, mask[:, -1])))

    def score(rollout: Rollout) -> Any:
        return programs.score(box[0].params, nets.ref, nets.reward, rollout, host, number(0.05), number(1))[0]

    def update(experience: Any) -> Any:
        box[0], metrics = programs.update(box[0], experience, key, number(1), None, None)
        return box[0], metrics

    rollouts = {share: rollout_of(share) for share in SHARES}
    scored = {share: score(rollout) for share, rollout in rollouts.items()}
    return {
        "ppo score": {share: lambda s=share: (score(rollouts[s]), s) for share in SHARES},
        "ppo update": {share: lambda s=share: (update(scored[s]), s) for share in SHARES},
    }


def rollout_runs(size: str, rows: int, model: Model, mesh: Mesh) -> Runs:
    """Rollouts of prompts of 64 and up to 256 new tokens."""
    vocab, config = SIZES[size]["vocab"], SamplingConfig(max_new_tokens=NEW)
    params, law = jax.jit(model.init)(jax.random.key(0)), SamplingLaw.from_config(config)
    prompt = np.random.default_rng(0).integers(3, vocab, (rows, PROMPT), dtype=np.int32)
    placed = put_batch(mesh, (prompt, np.ones((rows, PROMPT), bool)))
    stops = {share: np.linspace(3, vocab - 1, round(part * vocab)).astype(int) for share, part in STOPS.items()}
    # The program of full rows knows stop ids, too: none is drawn that is not in the vocabulary.
    samplers = {s: jax.jit(make_sampler(model, config, tuple(map(int, ids)) or (vocab,))) for s, ids in stops.items()}

    def run(share: float) -> tuple[Any, float]:
        out = samplers[share](params, *placed, jax.random.key(1), law)
        return out, float(jnp.mean(out.mask))

    return {share: lambda s=share: run(s) for share in SHARES}


def measured(name: str, runs: Runs, repeats: int) -> dict[str, Any]:
    """The line of a program: medians of so many runs at each share, all in turns, after one that compiles."""
    spent: dict[float, list[tuple[float, float]]] = {share: [] for share in SHARES}
    real = {}
    for i in range(1 + repeats):
        for share, run in runs.items():
            since = time.perf_counter(), time.process_time()
            out, real[share] = run()
            jax.block_until_ready(out)
            if i:
                spent[share].append((time.perf_counter() - since[0], time.process_time() - since[1]))
    seconds, cpu = ([statistics.median(each[of] for each in spent[share]) for share in SHARES] for of in (0, 1))
    shares, line = [real[share] for share in SHARES], dict[str, Any](program=name)
    if name == "rollout":
        line["response_shares"] = [round(share, 3) for share in shares]
        shares = [(PROMPT + share * NEW) / (PROMPT + NEW) for share in shares]
    against = [each / cpu[-1] / (share / shares[-1]) for each, share in zip(cpu, shares, strict=True)]
    return line | {
        "shares": [round(share, 3) for share in shares],
        "seconds": [round(each, 3) for each in seconds],
        "cpu_seconds": [round(each, 3) for each in cpu],
        "against": [round(each, 3) for each in against],
        "within": round((max(against) - min(against)) / (max(against) + min(against)), 3),
    }


def draw(path: Path, lines: list[dict[str, Any]]) -> None:
    """Costs over that of full rows on the nearest line through the origin, one colour a program; 15 % shaded."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.fill_between([0, 1], [0, 0.85], [0, 1.15], color="0.9", linewidth=0)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    for line, colour in zip(lines, colormaps[COLOUR_MAP](np.linspace(0.1, 0.8, len(lines))), strict=True):
        nearest = (max(line["against"]) + min(line["against"])) / 2
        costs = [share * each / nearest for share, each in zip(line["shares"], line["against"], strict=True)]
        axes.plot(line["shares"], costs, "o-", color=colour, label=line["program"])
    axes.set(xlabel="share of token slots that hold tokens", ylabel="CPU seconds, over the line's of full rows")
    axes.set(xlim=(0, 1.05), ylim=(0, 1.2))
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="5m", choices=tuple(SIZES))
    parser.add_argument("--rows", type=int, default=128, help="of the reward step and of PPO; twice as many prompts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--figure", default="", metavar="PNG", help="where to draw it")
    args = parser.parse_args()
    mesh, lines = make_mesh(MeshConfig()), []
    with jax.set_mesh(mesh.grid):
        model = model_of(args.size, mesh, "auto")
        made = {
            "reward step": reward_runs(args.size, args.rows, model, mesh),
            **ppo_runs(args.size, args.rows, model, mesh),
            "rollout": rollout_runs(args.size, 2 * args.rows, model, mesh),
        }
        for name, runs in made.items():
            lines.append(measured(name, runs, args.repeats))
            print(json.dumps(lines[-1]), flush=True)
    if args.figure:
        draw(Path(args.figure), lines)


if __name__ == "__main__":
    main()
