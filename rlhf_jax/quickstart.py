"""`rlhf-jax quickstart`: the whole chain on random walks, whose true reward is known. Floor 4."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from rlhf_jax import ppo, reward, sft
from rlhf_jax.config import (
    ArchConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPORun,
    QuickstartConfig,
    RewardConfig,
    RewardRun,
    RewardSourceConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
    SFTRun,
    to_dict,
)
from rlhf_jax.errors import UserError
from rlhf_jax.generate import Generator
from rlhf_jax.sharding import make_mesh
from rlhf_jax.stage import load_model, load_tokenizer
from rlhf_jax.tasks import random_walks as walks
from rlhf_jax.tasks.report import learning_curves, text_table

ARCH = ArchConfig(
    vocab_size=24, width=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, ffn_width=176, max_positions=32
)
SAMPLING = SamplingConfig(max_new_tokens=10, chunk=5)
DATA = DataConfig(batch_size=64, max_prompt_length=2, max_length=14, eval_batches=0)
OURS = ("tokenizer", "sft", "reward_model", "ppo", "config.yaml", "summary.json", "learning_curves.png")


def prepare_directory(config: QuickstartConfig) -> Path:
    """The output directory, emptied of an earlier quickstart if that is allowed."""
    path = Path(config.output_dir)
    found = [name for name in OURS if (path / name).exists()]
    if found and not config.overwrite:
        raise UserError(f"output_dir {path} holds another run ({found[0]}); choose another or pass --overwrite true")
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file; choose a directory")
    for name in found:
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    path.mkdir(parents=True, exist_ok=True)
    return path


def sample_walks(model: str, num_each: int, seed: int, temperature: float = 1.0) -> tuple[list[str], list[str]]:
    """Prompts and responses: `num_each` walks of the model from every start node."""
    mesh = make_mesh(MeshConfig())
    settings = ModelConfig(path=model)
    tokenizer = load_tokenizer(settings)
    with jax.set_mesh(mesh):
        loaded = load_model(settings, mesh, jax.random.key(seed))
        sampling = SamplingConfig(max_new_tokens=SAMPLING.max_new_tokens, chunk=SAMPLING.chunk, temperature=temperature)
        generator = Generator(loaded.model, tokenizer, sampling, mesh, max_prompt_length=DATA.max_prompt_length)
        return generator.texts(loaded.params, walks.start_prompts() * num_each, jax.random.key(seed))


def run(config: QuickstartConfig) -> dict[str, Any]:
    """SFT on random walks, comparisons by a noisy rater, reward model, PPO; prints a table and returns the summary."""
    started = time.time()
    path = prepare_directory(config)
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    graph = walks.make_graph(config.seed)
    gold = partial(walks.optimality, graph)
    walks.make_tokenizer().save_pretrained(path / "tokenizer")
    run_in = partial(RunConfig, seed=config.seed, progress=config.progress)

    demos = walks.demonstrations(graph, 1100, config.seed)
    sft.run(
        SFTRun(
            model=ModelConfig(arch=ARCH, tokenizer=str(path / "tokenizer")),
            data=DATA,
            sft=SFTConfig(steps=300),
            optim=OptimConfig(learning_rate=3e-3, warmup_steps=20),
            sampling=SAMPLING,
            run=run_in(output_dir=str(path / "sft"), eval_every=100),
        ),
        rows=demos[:1000],
        eval_rows=demos[1000:],
    )
    policy = ModelConfig(path=str(path / "sft" / "model"))

    num_each = -(-config.comparisons // len(walks.start_prompts()))
    prompts, first = sample_walks(policy.path, num_each, config.seed + 1)
    _, second = sample_walks(policy.path, num_each, config.seed + 2, temperature=1.5)
    pairs = walks.comparisons(graph, prompts, first, second, config.seed, config.rater_noise)
    fresh = [sample_walks(policy.path, 20, config.seed + 3 + i)[1] for i in range(2)]
    held_out = walks.comparisons(graph, walks_prompts(20), *fresh, config.seed + 1, 0.0)
    reward_summary = reward.run(
        RewardRun(
            model=policy,
            data=DATA,
            reward=RewardConfig(epochs=6),
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=20),
            run=run_in(output_dir=str(path / "reward_model"), eval_every=50),
        ),
        rows=pairs,
        eval_rows=held_out,
    )
    rate = OptimConfig(learning_rate=1e-3, schedule="linear", eps=1e-5)
    ppo_summary = ppo.run(
        PPORun(
            model=policy,
            data=DataConfig(batch_size=128, max_prompt_length=2),
            reward=RewardSourceConfig(model=str(path / "reward_model" / "model")),
            sampling=SAMPLING,
            ppo=PPOConfig(iterations=config.iterations, kl_controller="fixed", kl_coef=0.05),
            optim=rate,
            value_optim=rate,
            run=run_in(output_dir=str(path / "ppo"), eval_every=20),
        ),
        rows=walks.start_prompts() * 32,
        eval_rows=walks.start_prompts() * 6,
        gold=gold,
    )
    return report(config, path, gold, demos, reward_summary, ppo_summary, started)


def walks_prompts(num_each: int) -> list[str]:
    """Every start node `num_each` times, as text."""
    return [row["prompt"] for row in walks.start_prompts() * num_each]


def report(
    config: QuickstartConfig,
    path: Path,
    gold: Any,
    demos: list[dict[str, str]],
    reward_summary: dict[str, Any],
    ppo_summary: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """Print the table and a few walks, draw the curves, write summary.json."""
    prompts, before = sample_walks(str(path / "sft" / "model"), 50, config.seed + 9)
    _, after = sample_walks(str(path / "ppo" / "model"), 50, config.seed + 9)
    means = {
        "data": float(np.mean(gold([d["prompt"] for d in demos], [d["response"] for d in demos]))),
        "sft": float(np.mean(gold(prompts, before))),
        "ppo": float(np.mean(gold(prompts, after))),
    }
    summary = {
        "gold": means,
        "reward_model": {"accuracy": reward_summary["accuracy"], "n": reward_summary["n"]},
        "kl": ppo_summary["after"]["eval/kl"],
        "wall_s": round(time.time() - started, 1),
    }
    (path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    history = [json.loads(line) for line in (path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    learning_curves(
        path / "learning_curves.png", [h for h in history if "rollout/gold" in h], "PPO on random walks"
    )
    rows = [[f"mean optimality, {name}", f"{means[name]:.3f}"] for name in means]
    rows += [
        ["reward model accuracy", f"{reward_summary['accuracy']:.3f} (n = {reward_summary['n']})"],
        ["KL to SFT, nats per walk", f"{summary['kl']:.2f}"],
        ["wall time, s", f"{summary['wall_s']:.0f}"],
    ]
    print("\n" + text_table(["quickstart", "value"], rows))
    shown = [i * 137 % len(prompts) for i in range(5)]
    columns = ["start", "walk after SFT", "optimality", "walk after PPO", "optimality"]
    scores = gold(prompts, before), gold(prompts, after)
    samples = [[prompts[i], before[i], f"{scores[0][i]:.2f}", after[i], f"{scores[1][i]:.2f}"] for i in shown]
    print("\n" + text_table(columns, samples))
    print(f"\ncurves: {path / 'learning_curves.png'}   policy: {path / 'ppo' / 'model'}")
    return summary
