"""`rlhf-jax quickstart`: the whole chain on random walks, whose true reward is known."""

from __future__ import annotations

import shlex
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from rlhf_jax import ppo, reward, sft
from rlhf_jax.config import (
    ArchConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PPOArgs,
    PPOConfig,
    QuickstartArgs,
    RewardArgs,
    RewardConfig,
    RewardSourceConfig,
    RunConfig,
    SamplingConfig,
    SFTArgs,
    SFTConfig,
)
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import Stopped, UserError, tell
from rlhf_jax.hosts import processes
from rlhf_jax.hosts.files import write_json
from rlhf_jax.hosts.json_text import from_json
from rlhf_jax.inference.generate import Generator
from rlhf_jax.models.loading import load_model, load_tokenizer
from rlhf_jax.runs.curves import learning_curves, text_table
from rlhf_jax.runs.directory import SUMMARY, Summary, earlier_summary, write_config
from rlhf_jax.runs.twin import in_buckets
from rlhf_jax.sharding import make_mesh
from rlhf_jax.tasks import random_walks as walks
from rlhf_jax.types import RewardFn

ARCH = ArchConfig(
    vocab_size=24, width=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, ffn_width=176, max_positions=32
)
SAMPLING = SamplingConfig(max_new_tokens=10, chunk=5)
DATA = DataConfig(batch_size=64, max_prompt_length=2, max_length=14, eval_batches=0)
ABOUT = """\
The task: walks on a graph of lettered nodes, from a start letter to the goal,
in few steps. Optimality is the true reward: 1 for a shortest walk, less for
longer ones, 0 for what is no walk to the goal. SFT imitates random walks, a
noisy rater says which of two walks is better, a reward model learns that, and
PPO learns from the reward model alone. There are no prompts but the start
letters, so held-out rows have them, too.
"""
STAGES = ("tokenizer", "sft", "reward_model", "ppo", "learning_curves.png")


def prepare_directory(config: QuickstartArgs) -> Summary | None:
    """The summary, if this quickstart is finished in its directory; else None, and the directory is there, empty.

    Raises:
        UserError: it holds another run or half of this one, or cannot be written to.
    """
    summary = earlier_summary("quickstart", config, [SUMMARY, *STAGES])
    if summary is not None:
        return summary
    path = Path(config.output_dir)
    there = [name for name in (*STAGES, "config.yaml", SUMMARY) if (path / name).exists()]
    if there and not config.overwrite:
        raise UserError(
            f"output_dir {path} holds a quickstart that was stopped, which cannot go on; choose another directory or "
            "pass --overwrite true"
        )
    for name in there:
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    path.mkdir(parents=True, exist_ok=True)
    write_config(path, "quickstart", config, "output_dir")
    return None


def sample_walks(model: str, num_each: int, seed: int, temperature: float = 1.0) -> tuple[list[str], list[str]]:
    """Prompts and responses: `num_each` walks of the model from every start node."""
    mesh = make_mesh(MeshConfig())
    settings = ModelConfig(path=model)
    tokenizer = load_tokenizer(settings)
    with jax.set_mesh(mesh.grid):
        loaded = load_model(settings, mesh, jax.random.key(seed))
        sampling = replace(SAMPLING, temperature=temperature)
        generator = Generator(loaded.model, tokenizer, sampling, mesh, max_prompt_length=DATA.max_prompt_length)
        drawn = generator.responses(loaded.params, walks.start_prompts(), jax.random.key(seed), samples=num_each)
    return [one.prompt for one in drawn], [one.text for one in drawn]


def collect(graph: walks.Graph, policy: str, config: QuickstartArgs, round_: int) -> list[dict[str, str]]:
    """Comparisons for one round: walks of the latest policy against others of its own, as likely and hotter ones.

    The hotter walks hold errors that a policy would otherwise exploit, because no rater ever saw them.
    """
    num_each = -(-config.comparisons // (2 * len(walks.start_prompts())))
    seed = config.seed + 100 * (round_ + 1)
    prompts, first = sample_walks(policy, num_each, seed)
    pairs = []
    for i, temperature in enumerate((1.0, 2.0)):
        _, second = sample_walks(policy, num_each, seed + 1 + i, temperature)
        pairs += walks.comparisons(graph, prompts, first, second, seed + i, config.rater_noise)
    return pairs


@partial(in_buckets, option="output_dir")
def run(config: QuickstartArgs) -> Summary:
    """SFT on random walks, then rounds of comparisons by a noisy rater, reward model and PPO; prints a table.

    Returns the summary, which summary.json holds too. A later round labels walks of the policy of the one before
    (Ouyang et al. 2022, section 3.1), adds them to the comparisons, and starts from SFT again.
    """
    started, path = time.time(), Path(config.output_dir)
    try:
        if (finished := processes.from_first(lambda: prepare_directory(config))) is not None:
            return finished
        graph = walks.make_graph(config.seed)
        processes.say(ABOUT)
        if processes.is_first():
            walks.make_tokenizer().save_pretrained(path / "tokenizer")
        processes.barrier("tokenizer")
        demos = walks.demonstrations(graph, 1100, config.seed)
        sft.run(sft_stage(config, path), rows=demos[:1000], eval_rows=demos[1000:])
        base = policy = str(path / "sft" / "model")
        prompts, first = sample_walks(base, 20, config.seed + 3)
        _, second = sample_walks(base, 20, config.seed + 4)
        held_out = walks.comparisons(graph, prompts, first, second, config.seed, 0.0)
        pairs: list[dict[str, str]] = []
        gold, starts = partial(walks.optimality, graph), walks.start_prompts()
        for round_ in range(config.rounds):
            of = f"{round_ + 1} of {config.rounds}"
            processes.say(
                f"\nround {of}: a rater compares walks of the newest policy; reward model; PPO from SFT again"
            )
            pairs += collect(graph, policy, config, round_)
            judged = reward.run(reward_stage(config, path), rows=pairs, eval_rows=held_out)
            tuned = ppo.run(ppo_stage(config, path), rows=starts * 32, eval_rows=starts * 6, gold=gold)
            policy = str(path / "ppo" / "model")
        return report(config, gold, demos, judged, tuned, started)
    except Stopped as stopped:  # a stage could continue, the chain cannot
        raise KeyboardInterrupt from stopped


def run_in(config: QuickstartArgs, path: Path, eval_every: int) -> RunConfig:
    """The run settings of a stage; a later round replaces the stages of the one before."""
    return RunConfig(str(path), True, config.seed, eval_every=eval_every, progress=config.progress)


def sft_stage(config: QuickstartArgs, path: Path) -> SFTArgs:
    """SFT from random weights."""
    return SFTArgs(
        model=ModelConfig(arch=ARCH, tokenizer=str(path / "tokenizer")),
        data=DATA,
        sft=SFTConfig(steps=300),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=20),
        sampling=SAMPLING,
        run=run_in(config, path / "sft", 100),
    )


def reward_stage(config: QuickstartArgs, path: Path) -> RewardArgs:
    """A reward model on the SFT model's trunk."""
    return RewardArgs(
        model=ModelConfig(path=str(path / "sft" / "model")),
        data=DATA,
        reward=RewardConfig(epochs=4),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=20),
        run=run_in(config, path / "reward_model", 50),
    )


def ppo_stage(config: QuickstartArgs, path: Path) -> PPOArgs:
    """PPO from the SFT model."""
    rate = OptimConfig(learning_rate=1e-3, schedule="linear", eps=1e-5)
    return PPOArgs(
        model=ModelConfig(path=str(path / "sft" / "model")),
        data=DataConfig(batch_size=128, max_prompt_length=DATA.max_prompt_length),
        reward=RewardSourceConfig(model=str(path / "reward_model" / "model")),
        sampling=SAMPLING,
        ppo=PPOConfig(iterations=config.iterations, kl_controller="fixed", kl_coef=0.1),
        optim=rate,
        value_optim=rate,
        run=run_in(config, path / "ppo", 25),
    )


def report(
    config: QuickstartArgs, gold: RewardFn, demos: list[Row], judged: Summary, tuned: Summary, started: float
) -> Summary:
    """Print the table and a few walks, draw the curves, write summary.json."""
    path = Path(config.output_dir)
    prompts, before = sample_walks(str(path / "sft" / "model"), 50, config.seed + 9)
    _, after = sample_walks(str(path / "ppo" / "model"), 50, config.seed + 9)
    means = {
        "data": float(np.mean(gold([d["prompt"] for d in demos], [d["response"] for d in demos]))),
        "sft": float(np.mean(gold(prompts, before))),
        "ppo": float(np.mean(gold(prompts, after))),
    }
    summary = {
        "gold": means,
        "reward_model": {name: judged[name] for name in ("accuracy", "n")},
        "kl": tuned["after"]["eval/kl"],
        "wall_s": round(time.time() - started, 1),
    }
    if not processes.is_first():
        return summary
    write_json(path / SUMMARY, summary)
    history = [from_json(line) for line in (path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    learning_curves(path / "learning_curves.png", [h for h in history if "rollout/gold" in h], "PPO on random walks")
    rows = [[f"mean optimality, {name}", f"{means[name]:.3f}"] for name in means]
    rows += [
        ["reward model accuracy", f"{judged['accuracy']:.3f} (n = {judged['n']})"],
        ["KL to SFT, nats per walk", f"{summary['kl']:.2f}"],
        ["wall time, s", f"{summary['wall_s']:.0f}"],
    ]
    tell("\n" + text_table(["quickstart", "value"], rows))
    shown = [i * 137 % len(prompts) for i in range(5)]
    columns = ["start", "walk after SFT", "optimality", "walk after PPO", "optimality"]
    scores = gold(prompts, before), gold(prompts, after)
    samples = [[prompts[i], before[i], f"{scores[0][i]:.2f}", after[i], f"{scores[1][i]:.2f}"] for i in shown]
    tell("\n" + text_table(columns, samples))
    tell(f"\ncurves: {path / 'learning_curves.png'}   policy: {path / 'ppo' / 'model'}")
    tell("\n".join(["\ntry next:", *(f"  {command}" for command in to_try(path, prompts[0]))]))
    return summary


def to_try(path: Path, start: str) -> list[str]:
    """Commands that work with what is there after a quickstart."""
    policy, judge, samples = (
        shlex.quote(str(path / part)) for part in ("ppo/model", "reward_model/model", "ppo/samples.jsonl")
    )
    return [
        f"rlhf-jax runs {shlex.quote(str(path))}",
        f"rlhf-jax sample --model.path {policy} --prompts {start} --num_samples 4 --sampling.max_new_tokens 10",
        f"rlhf-jax score --model.path {judge} --data_path {samples}",
    ]
