"""Makes group.npz: what TRL's own code computes for GRPO and RLOO, for tests that have no torch.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 && peer/bin/pip install trl==1.16.0
    peer/bin/python tests/golden/make_group.py

The code that runs is TRL's, in float64: `_compute_loss` of GRPOTrainer and RLOOTrainer, of objects made without their
constructors and given the few attributes that the method reads (the model's log-probs are fixed ones); and the lines
of `_generate_and_score_completions` from the rewards to the advantages, and those that correct for vLLM's law, which
are cut out of the method by their first and last statement. For INPUTS in ordinary, extreme (float32):
    INPUTS/mask        bool[B, T], response tokens
    INPUTS/logprobs, INPUTS/old, INPUTS/ref, INPUTS/sampler    [B, T]
    INPUTS/advantages  [B]
    INPUTS/CASE/loss   []
    INPUTS/CASE/grad   [B, T], of the loss by logprobs
CASE is a key of CASES. And for the advantages:
    rewards            [B], GROUP rows in a row share a prompt; those of one group are equal
    NAME/advantages    [B], NAME a key of ADVANTAGES

Extreme log-probs go down to thousands, log-ratios from -300 to 300; where TRL has no bound (a negative advantage
without delta, k3) they stop at 30, because exp of more would drown all other rows.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

B, T, GROUP = 12, 9, 4
LOW, HIGH, DELTA, BETA, CAP = 0.2, 0.28, 1.5, 0.3, 3.0
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "dapo_delta": {"loss_type": "dapo", "delta": DELTA},
    "grpo_kl": {"loss_type": "grpo", "beta": BETA},
    "dr_grpo_kl": {"loss_type": "dr_grpo", "beta": BETA},
    "dapo_kl": {"loss_type": "dapo", "beta": BETA},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1 + HIGH},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "gspo_delta": {"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": DELTA},
    "rloo": {},
    **{mode: {"loss_type": "grpo", "beta": BETA, "mode": mode} for mode in MODES},
}
ADVANTAGES: dict[str, dict[str, Any]] = {
    "grpo_group": {"scale_rewards": "group"},
    "grpo_batch": {"scale_rewards": "batch"},
    "grpo_none": {"scale_rewards": "none"},
    "rloo_plain": {"normalize_advantages": False},
}


def inputs(name: str) -> dict[str, np.ndarray]:
    """Random rows; `old` and `ref` are near `logprobs` in ordinary rows and far from them in extreme ones."""
    rng = np.random.default_rng({"ordinary": 0, "extreme": 1}[name])
    lengths = rng.integers(1, T + 1, B)
    lengths[0] = T
    advantages = rng.normal(size=B).astype(np.float32)
    if name == "ordinary":
        logprobs = -np.abs(rng.normal(size=(B, T))) * 1.5
        log_ratio, log_ref = rng.normal(size=(2, B, T)) * 0.2
        log_ratio[: B // 2] *= 3
    else:
        scale = np.array([0.0, 1e-4, 3.0, 40.0, 300.0, 2000.0])
        logprobs = -np.abs(rng.normal(size=(B, T))) * np.repeat(scale, 2)[rng.permutation(B), None]
        scale = np.array([0.0, 1e-4, 0.5, 3.0, 30.0, 100.0])
        log_ratio = rng.normal(size=(B, T)) * np.repeat(scale, 2)[rng.permutation(B), None]
        log_ratio = np.clip(log_ratio, -300, np.where(advantages > 0, 300, 30 / T)[:, None])
        log_ref = np.clip(rng.normal(size=(B, T)) * np.repeat(scale, 2)[rng.permutation(B), None], -300, 30)
    found = {"logprobs": logprobs, "old": logprobs - log_ratio, "ref": logprobs + log_ref, "advantages": advantages}
    found["sampler"] = found["old"] + np.random.default_rng(3).normal(size=(B, T)) * 0.7
    return {"mask": np.arange(T) < lengths[:, None]} | {k: v.astype(np.float32) for k, v in found.items()}


def rewards() -> np.ndarray:
    """float32[B]; the rewards of the second group are equal, and no sum of them is exact."""
    found = np.random.default_rng(2).normal(size=B).astype(np.float32) * 3 + 1
    found[GROUP : 2 * GROUP] = 0.1
    return found


def bare(cls: type, logprobs: Any, **attributes: Any) -> Any:
    """An object of a trainer's class whose model gives `logprobs`, with these attributes alone."""
    import torch

    same = lambda x, **_: x  # noqa: E731
    trainer = object.__new__(cls)
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same, num_processes=1
    )
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None)
    trainer.aux_loss_enabled = False
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def cut(cls: type, first: str, last: str) -> str:
    """The lines of `_generate_and_score_completions` from the text `first` up to the text `last`."""
    source = inspect.getsource(cls._generate_and_score_completions)
    return textwrap.dedent(source[source.index(first) : source.index(last)])


def importance(mode: str, x: dict[str, Any]) -> Any:
    """The ratio of a mode, [B, T] or [B, 1], by TRL's statements."""
    import trl.trainer.grpo_trainer as grpo

    first = "                mask = completion_mask if tool_mask is None"
    code = cut(
        grpo.GRPOTrainer, first, "            # Compute the per-token log probabilities for the reference model"
    )
    settings = {"mode": mode, "clip_min": None, "clip_max": CAP}
    names = {
        **vars(grpo), "self": SimpleNamespace(**{f"vllm_importance_sampling_{k}": v for k, v in settings.items()}),
        "completion_mask": x["mask"].long(), "tool_mask": None, "old_per_token_logps": x["old"],
        "sampling_per_token_logps": x["sampler"],
    }  # fmt: skip
    exec(code, names)
    return names["vllm_importance_sampling_ratio"]


def loss_of(case: str, x: dict[str, Any]) -> tuple[Any, Any]:
    """(loss, leaf of its gradient) of a case by TRL, on float64 tensors."""
    from trl import GRPOTrainer, RLOOTrainer

    leaf = x["logprobs"].clone().requires_grad_()
    ids = x["mask"].long()
    batch = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": ids}
    batch |= {"advantages": x["advantages"], "old_per_token_logps": x["old"], "ref_per_token_logps": x["ref"]}
    if case == "rloo":
        batch["old_logps"] = (x["old"] * x["mask"]).sum(1)
        return bare(RLOOTrainer, leaf, epsilon_low=LOW, epsilon_high=HIGH)._compute_loss(None, batch), leaf
    settings = CASES[case]
    mode = settings.get("mode")
    if mode:
        batch["importance_sampling_ratio"] = importance(mode, x)
    trainer = bare(
        GRPOTrainer, leaf, loss_type=settings["loss_type"], beta=settings.get("beta", 0.0), epsilon_low=LOW,
        epsilon_high=settings.get("epsilon_high", HIGH), max_completion_length=T, top_entropy_quantile=1.0,
        importance_sampling_level=settings.get("importance_sampling_level", "token"), off_policy_mask_threshold=None,
        use_vllm=bool(mode), vllm_importance_sampling_correction=True, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=settings.get("delta"), use_bias_correction_kl=False, steps_per_generation=1),
    )  # fmt: skip
    return trainer._compute_loss(None, batch | {"num_items_in_batch": ids.sum()}), leaf


def losses(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CASE/loss and CASE/grad of all cases."""
    import torch

    tensors = {name: torch.from_numpy(v).double() if v.dtype == np.float32 else torch.from_numpy(v)
               for name, v in x.items()}  # fmt: skip
    found = {}
    for case in CASES:
        loss, leaf = loss_of(case, tensors)
        loss.backward()
        found[f"{case}/loss"], found[f"{case}/grad"] = loss.detach().numpy(), leaf.grad.numpy()
    return found


def advantages(name: str) -> np.ndarray:
    """The advantages of `rewards()` by TRL's statements."""
    import torch
    import trl.trainer.grpo_trainer as grpo
    import trl.trainer.rloo_trainer as rloo

    module, cls = (grpo, grpo.GRPOTrainer) if name.startswith("grpo") else (rloo, rloo.RLOOTrainer)
    first = "        unscorable_mask =" if name.startswith("grpo") else "        grouped_rewards ="
    last = "advantages = torch.nan_to_num(advantages, nan=0.0)\n"
    code = cut(cls, first, "        " + last) + last
    values = torch.from_numpy(rewards()).double()
    settings = {"multi_objective_aggregation": "sum_then_normalize", "reward_weights": torch.ones(1).double()}
    names = {
        **vars(module), "self": SimpleNamespace(**settings, **ADVANTAGES[name]), "num_generations": GROUP,
        "device": "cpu", "rewards_per_func": values[:, None], "rewards": values,
    }  # fmt: skip
    exec(code, names)
    return names["advantages"].numpy()


def main() -> None:
    import torch
    import trl

    torch.use_deterministic_algorithms(True)
    print(f"trl {trl.__version__}, torch {torch.__version__}")
    arrays = {"rewards": rewards()}
    for name in ("ordinary", "extreme"):
        x = inputs(name)
        arrays |= {f"{name}/{key}": value for key, value in (x | losses(x)).items()}
    arrays |= {f"{name}/advantages": advantages(name) for name in ADVANTAGES}
    wrong = [case for case, value in arrays.items() if not np.isfinite(value).all()]
    if wrong:
        sys.exit(f"not finite in TRL: {wrong}")
    path = Path(__file__).with_name("group.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
