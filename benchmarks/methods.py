"""Every method on the same random walks: gold reward, KL to SFT, what is left of the language model, and time.

    python -m benchmarks.methods --output_dir runs/methods

A seed's graph, SFT model, comparisons and reward model are made as in the quickstart, once, and every method starts
from them; none sees the gold reward. methods.jsonl gets a line per method and seed, and the same command goes on with
those that are missing. The table has means over the seeds and their standard errors:

    gold   optimality of 1000 sampled walks (tasks.random_walks), the same starts for all
    gain   gold less that of SFT on the same seed: seeds differ in their graphs more than in what a method gains
    kl     to SFT in nats per walk: the mean of log p(walk) - log p_SFT(walk) over the method's own walks (best of n,
           which is no model: ln n - (n - 1) / n)
    nll    nats per token of 100 held-out demonstrations, the text that SFT was trained on
    s      wall time of the method alone, compilation included; cpu_s is the processor time of it
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.studies import Lines, Walks
from rlhf_jax import group, ppo, preference, reward
from rlhf_jax.commands import bestofn, rejection
from rlhf_jax.commands import quickstart as q
from rlhf_jax.commands.collect import run_collect
from rlhf_jax.config import (
    BestOfNArgs,
    CollectArgs,
    DPOArgs,
    DPOConfig,
    GroupArgs,
    GRPOArgs,
    KTOArgs,
    KTOConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RejectionArgs,
    RejectionConfig,
    RewardSourceConfig,
    RLOOArgs,
    RRHFArgs,
    RRHFConfig,
    RunConfig,
    SFTConfig,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.data.collate import collate_prompts
from rlhf_jax.data.encoding import Limits
from rlhf_jax.data.examples import prompt_examples, sft_examples
from rlhf_jax.inference.generate import Generator, decode
from rlhf_jax.inference.scoring import Likelihood
from rlhf_jax.models import Model
from rlhf_jax.models.loading import load_model, load_tokenizer
from rlhf_jax.online.core import packed, response_logprobs
from rlhf_jax.runs.curves import text_table
from rlhf_jax.sharding import make_mesh, put_batch
from rlhf_jax.tasks import random_walks as walks
from rlhf_jax.tasks import write_rows
from rlhf_jax.types import Params, Rollout

RATE = OptimConfig(learning_rate=3e-4, schedule="linear")
EXPERTS = dataclasses.replace(
    q.ARCH, qk_norm="head", ffn_width=q.ARCH.ffn_width // 2, num_experts=8, experts_per_token=2
)
"""As many active parameters of MLPs as the quickstart's model has."""
STEPS = 80
"""Optimiser steps of 64 rows of the methods that have no rollouts: three passes over the comparisons or so."""


class Task(Walks):
    """What the methods of one seed share: sft/ and reward_model/ in its directory, which has one for each method, too.

    Attributes:
        pairs, held_out: comparisons of SFT's walks, by a rater who errs and by one who does not.
    """

    def __init__(self, seed: int, root: Path, *, experts: bool, **options: Any):
        super().__init__(seed, root, arch=EXPERTS if experts else q.ARCH, **options)
        self.held_out, self.pairs = self.compared(20, 3, 0.0), q.collect(self.graph, self.base, self.config, 0)
        stage = replace(q.reward_stage(self.config, self.path), run__overwrite=False)
        reward.run(stage, rows=self.pairs, eval_rows=self.held_out)

    @property
    def judge(self) -> RewardSourceConfig:
        """The reward model."""
        return RewardSourceConfig(model=str(self.path / "reward_model" / "model"))

    def settings(self, out: Path) -> dict[str, Any]:
        """What the configs of the methods without rollouts have in common."""
        return {"model": ModelConfig(path=self.base), "data": q.DATA, "optim": RATE, "run": self.run(out)}

    def file(self, name: str, rows: list[dict[str, str]]) -> str:
        """Rows as JSON lines."""
        path = self.path / f"{name}.jsonl"
        write_rows(path, rows)
        return str(path)

    def drawn(self, output: Path) -> dict[str, Any]:
        """What the configs of the commands have in common that sample SFT's walks and ask the reward model."""
        return {
            "model": ModelConfig(path=self.base), "sampling": q.SAMPLING, "reward": self.judge, "progress": False,
            "max_prompt_length": q.DATA.max_prompt_length, "batch_size": 1280, "seed": self.config.seed,
            "overwrite": True, "output": str(output),
        }  # fmt: skip

    def run(self, out: Path) -> RunConfig:
        """A directory that is written anew."""
        return RunConfig(str(out), True, self.config.seed, eval_every=25, progress=False)


def by_best_of(task: Task, out: Path) -> dict[str, float]:
    """The best of 16 of SFT's walks by the reward model; its KL is ln n - (n - 1) / n, and it has no NLL."""
    config = BestOfNArgs(**task.drawn(out / "best.jsonl"), num_samples=16)
    last = bestofn.run(config, rows=walks.start_prompts() * 50, gold=task.gold)["curve"][-1]
    return {"gold": last["gold"]["mean"], "kl": last["kl"]}


def by_rejection(task: Task, out: Path) -> str:
    """SFT on the best of 16 walks by the reward model, twice."""
    held_out = task.file("held_out", task.demos[1000:])  # only looked at: the last weights are kept
    config = RejectionArgs(
        **task.settings(out), sampling=q.SAMPLING, reward=task.judge, sft=SFTConfig(steps=STEPS, num_samples=0),
        rejection=RejectionConfig(rounds=2, num_samples=16, sample_batch_size=1280),
    )  # fmt: skip
    config = replace(config, data__eval_path=held_out, run__keep_best=False)
    rejection.run(config, rows=walks.start_prompts() * 32)
    return str(out / "model")


def by_dpo(task: Task, out: Path, **settings: Any) -> str:
    """DPO, or with another `loss` one of its kin."""
    config = DPOArgs(**task.settings(out), dpo=DPOConfig(steps=STEPS, **settings))
    preference.run(config, rows=task.pairs, eval_rows=task.held_out)
    return str(out / "model")


def by_kto(task: Task, out: Path) -> str:
    """KTO on the comparisons, taken apart: twice as many rows."""
    preference.run(
        KTOArgs(**task.settings(out), kto=KTOConfig(steps=2 * STEPS)), rows=task.pairs, eval_rows=task.held_out
    )
    return str(out / "model")


def by_rrhf(task: Task, out: Path) -> str:
    """RRHF on eight walks to each prompt, ranked by the reward model."""
    collect = CollectArgs(**task.drawn(out / "ranked.jsonl"), num_samples=8, label="reward")
    rows = run_collect(collect, rows=walks.start_prompts() * 32)
    config = RRHFArgs(**task.settings(out / "run"), rrhf=RRHFConfig(steps=STEPS))
    preference.run(replace(config, data__batch_size=16), rows=rows[20:], eval_rows=rows[:20])
    return str(out / "run" / "model")


def by_ppo(task: Task, out: Path, **changes: Any) -> str:
    """The quickstart's PPO, with changes."""
    config = replace(q.ppo_stage(task.config, task.path), run=task.run(out), **changes)
    ppo.run(config, rows=walks.start_prompts() * 32, eval_rows=walks.start_prompts() * 6)
    return str(out / "model")


def by_ppo_ptx(task: Task, out: Path) -> str:
    """PPO with the loss on SFT's demonstrations."""
    text = task.file("demonstrations", task.demos[:1000])
    options = {"ppo__ptx_coef": 0.05, "ppo__ptx_path": text, "ppo__ptx_batch_size": 64}
    return by_ppo(task, out, data__max_length=q.DATA.max_length, **options)


def by_group(task: Task, out: Path, name: str, make: Callable[..., GroupArgs], kl_coef: float) -> str:
    """GRPO or RLOO, with the rollouts and rates of the quickstart's PPO."""
    like = q.ppo_stage(task.config, task.path)
    config = make(model=like.model, data=like.data, reward=like.reward, sampling=like.sampling, optim=like.optim)
    settings = {"iterations": task.config.iterations, "epochs": like.ppo.epochs, "kl_coef": kl_coef}
    settings = {f"{name}__{key}": value for key, value in settings.items()}
    config = replace(config, run=task.run(out), **settings)
    group.run(config, rows=walks.start_prompts() * 32, eval_rows=walks.start_prompts() * 6)
    return str(out / "model")


METHODS: dict[str, Callable[[Task, Path], str | dict[str, float]]] = {
    "best-of-16": by_best_of,
    "rejection": by_rejection,
    "RRHF": by_rrhf,
    "DPO": by_dpo,
    "KTO": by_kto,
    "ORPO": partial(by_dpo, loss="rlhf_jax.losses:orpo_loss", beta=1.0),
    "SimPO": partial(by_dpo, loss="rlhf_jax.losses:simpo_loss", beta=2.0),
    "GRPO": partial(by_group, name="grpo", make=GRPOArgs, kl_coef=0.2),
    "RLOO": partial(by_group, name="rloo", make=RLOOArgs, kl_coef=0.1),
    "PPO": by_ppo,
    "PPO-ptx": by_ppo_ptx,
    "LoRA-PPO": partial(by_ppo, lora=LoRAConfig(rank=8), optim__learning_rate=3e-3, value_optim__learning_rate=3e-3),
}
"""Name -> what makes a policy in `out`, which it returns, or what was measured. All claim to learn beyond SFT."""


class Meter:
    """Measures policies; made once, since it compiles."""

    def __init__(self, policy: str):
        """`policy` is a model of the shape that all have."""
        self.mesh, settings = make_mesh(MeshConfig()), ModelConfig(path=policy)
        self.tokenizer, longest = load_tokenizer(settings), q.DATA.max_prompt_length
        with jax.set_mesh(self.mesh.grid):
            self.model = self.load(policy).model
            self.generator = Generator(self.model, self.tokenizer, q.SAMPLING, self.mesh, max_prompt_length=longest)
            self.reader = Likelihood(self.model, self.mesh, batch_size=100)
        starts, _ = prompt_examples(walks.start_prompts() * 50, self.tokenizer, Limits(longest, too_long="error"))
        self.batch = collate_prompts(starts, buckets=self.generator.buckets, pad_id=self.tokenizer.pad_id)
        self.logprobs = jax.jit(partial(walk_logprobs, self.model))

    def load(self, policy: str) -> Any:
        return load_model(ModelConfig(path=policy), self.mesh, jax.random.key(0))

    def __call__(self, task: Task, policy: str) -> dict[str, float]:
        """Gold reward, KL to SFT and NLL of a policy."""
        with jax.set_mesh(self.mesh.grid):
            ours, reference = self.load(policy).params, self.load(task.base).params
            placed = put_batch(self.mesh, {name: self.batch[name] for name in ("tokens", "mask")})
            key = jax.random.key(task.config.seed + 9)
            rollout = self.generator.rollout(ours, placed["tokens"], placed["mask"], key, self.generator.law)
            kl = self.logprobs(ours, rollout) - self.logprobs(reference, rollout)
            held_out, _ = sft_examples(task.demos[1000:], self.tokenizer, Limits.of(q.DATA), loss_on="response")
            nll = -np.concatenate(self.reader.targets(ours, held_out))
        texts, _ = decode(self.tokenizer, rollout, self.batch["given"])
        gold = walks.optimality(task.graph, self.batch["prompts"], texts)
        return {"gold": float(np.mean(gold)), "kl": float(jnp.mean(kl)), "nll": float(nll.mean())}


def walk_logprobs(model: Model, params: Params, rollout: Rollout) -> Float[Array, " B"]:
    """log p of whole responses, stop tokens included."""
    num = rollout.tokens.shape[1]
    logprobs, *_ = response_logprobs(model, params, packed(rollout).at(0), jnp.ones(()), num)
    return jnp.sum(jnp.where(rollout.mask, logprobs, 0.0), axis=1)


def run_one(task: Task, name: str, measure: Meter) -> dict[str, Any]:
    """The line of a method on a seed."""
    made: str | dict[str, float]
    if name == "SFT":
        made, used = task.base, {"wall_s": task.made["wall_s"]}
    else:
        out, wall, cpu = task.path / name, time.perf_counter(), time.process_time()
        out.mkdir(parents=True, exist_ok=True)
        made = METHODS[name](task, out)
        used = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    numbers = {**(measure(task, made) if isinstance(made, str) else made), **used}
    return {"method": name, "seed": task.config.seed, **{key: round(value, 4) for key, value in numbers.items()}}


def mean(lines: list[dict[str, Any]], column: str) -> tuple[float, float]:
    """Mean over the seeds and its standard error; not a number with fewer than one and two of them."""
    values = np.array([line[column] for line in lines if column in line])
    return (float(values.mean()) if len(values) else np.nan,
            float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.nan)  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """Methods by rows, in the order of `METHODS`, and which of them exceed SFT by two standard errors."""
    start = {line["seed"]: line["gold"] for line in lines if line["method"] == "SFT"}
    rows, learned, failed = [], [], []
    for name in ["SFT", *METHODS]:
        own = [line for line in lines if line["method"] == name]
        if not own:
            continue
        pairs = [line for line in own if line["seed"] in start and name != "SFT"]
        gain, error = mean([{"gain": line["gold"] - start[line["seed"]]} for line in pairs], "gain")
        if not np.isnan(error):
            (learned if gain > 2 * error else failed).append(name)
        times = [mean(own, column)[0] for column in ("wall_s", "cpu_s")]
        gold, kl, nll = (shown(*mean(own, column)) for column in ("gold", "kl", "nll"))
        rows.append(
            [name, len(own), gold, shown(gain, error), kl, nll, *(round(t, 1) if t > 0 else None for t in times)]
        )
    headers = ["method", "seeds", "gold", "gain over SFT", "KL to SFT", "NLL of demos", "s", "cpu s"]
    verdict = f"Above SFT by more than two standard errors: {', '.join(learned) or 'none'}."
    return text_table(headers, rows) + "\n" + verdict + (f" Not: {', '.join(failed)}." if failed else "")


def shown(value: float, error: float) -> str | None:
    """A mean with its standard error, if there is one."""
    return None if np.isnan(value) else f"{value:.3f}" + ("" if np.isnan(error) else f" +- {error:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=["SFT", *METHODS], default=["SFT", *METHODS])
    parser.add_argument("--comparisons", type=int, default=3000, help="pairs that the rater sees")
    parser.add_argument("--iterations", type=int, default=40, help="of the methods with rollouts")
    parser.add_argument("--experts", action="store_true", help="all models of the shape EXPERTS, a Qwen3-MoE")
    args = parser.parse_args()
    root, measure = Path(args.output_dir), None
    lines = Lines(root / "methods.jsonl")
    for seed in args.seeds:
        missing = [name for name in args.methods if not lines.has(seed=seed, method=name)]
        if not missing:
            continue
        task = Task(seed, root, experts=args.experts, comparisons=args.comparisons, iterations=args.iterations)
        measure = measure or Meter(task.base)
        for name in missing:
            lines.add(run_one(task, name, measure))
    print("\n" + table(lines.all))


if __name__ == "__main__":
    main()
