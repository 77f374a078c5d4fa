"""Makes preference.npz: what TRL's own code computes for its losses of preferences, for tests that have no torch.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 && peer/bin/pip install trl==1.16.0
    peer/bin/python tests/golden/make_preference.py

The code that runs is TRL's: `_compute_loss` of DPOTrainer and KTOTrainer, `get_batch_loss_metrics` of ORPOTrainer and
CPOTrainer, `compute_loss` of RewardTrainer (forward, masks and reductions included). Their constructors, which want a
model and a dataset, do not: each object is made without them and gets the few attributes that the method reads;
`Accelerator` is one whose gathering returns its argument, and the model is a function that returns fixed log-probs
(DPO, KTO), logits (ORPO, CPO) or scores (reward).

Rows 0 .. B-1 are the chosen responses, B .. 2 B - 1 the rejected ones. For INPUTS in ordinary, extreme (float32):
    INPUTS/mask        bool[2 B, S], which tokens belong to the response
    INPUTS/logprobs    [2 B, S - 1] of tokens 1 .., zero off the mask
    INPUTS/ref         [2 B], sums under the reference
    INPUTS/labels      [B], of KTO; there the second half of the rows are responses to other prompts
    INPUTS/tokens      int64[2 B, S], INPUTS/logits [2 B, S, V], of ORPO and CPO
    INPUTS/scores      [2 B], INPUTS/margins [B], of the reward model
    INPUTS/CASE/loss   []
    INPUTS/CASE/grad   of the loss, by logprobs, by logits or by scores
CASE is dpo_KIND, kto_KIND, cpo_KIND, orpo or reward_KIND, KIND a loss_type of TRL, or what the reward model's loss has
beside its plain form; SETTINGS are its arguments. Extreme log-ratios and scores go up to thousands. Left out: aot and
aot_unpaired, which sort over a batch and are no sum over rows, and discopop on extreme rows, where TRL gives NaN.

ORPO's NLL is over prompt and response in TRL; its attention mask, which the fixed logits do not read, is that of the
response here, so that the NLL is over that alone.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

B, S, V = 6, 9, 7
SETTINGS = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1, "discopop_tau": 0.05},
    "kto": {"beta": 0.2, "desirable_weight": 1.0, "undesirable_weight": 0.7},
    "orpo": {"beta": 0.25},
    "cpo": {"beta": 2.0, "label_smoothing": 0.1, "target_margin": 0.5, "sft_coef": 0.4},
    "reward": {"center_coef": 0.01},
}
KINDS = {
    "dpo": "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard apo_zero apo_down discopop sft sigmoid_norm",
    "kto": "kto apo_zero_unpaired",
    "cpo": "sigmoid simpo",
    "reward": "plain margin center",
}


def inputs(name: str) -> dict[str, np.ndarray]:
    """Random rows; log-probs of extreme ones differ from the reference's by up to thousands."""
    rng = np.random.default_rng({"ordinary": 0, "extreme": 1}[name])
    start, end = rng.integers(1, 4, (2 * B, 1)), rng.integers(5, S + 1, (2 * B, 1))
    start[B:] = start[:B]  # one prompt
    places = np.arange(S)
    mask = (places >= start) & (places < end)
    scale = (
        1.5 if name == "ordinary" else np.repeat([0.0, 1e-4, 3.0, 40.0, 200.0, 900.0], 2)[rng.permutation(12), None]
    )
    logprobs = -np.abs(rng.normal(size=(2 * B, S - 1))) * scale * mask[:, 1:]
    ref = logprobs.sum(1) + rng.normal(size=2 * B) * (1.0 if name == "ordinary" else 400.0)
    if name == "extreme":
        ref[[0, B]] = logprobs[[0, B]].sum(1)  # a pair at which policy and reference agree
    logits = rng.normal(size=(2 * B, S, V)) * (1.0 if name == "ordinary" else 40.0)
    found = {"logprobs": logprobs, "ref": np.minimum(ref, 0), "logits": logits, "labels": np.array([1, 0, 1, 1, 0, 0])}
    tokens = rng.integers(0, V, (2 * B, S))
    scores = rng.normal(size=2 * B) * (1.0 if name == "ordinary" else 1000.0)
    found |= {"scores": scores, "margins": np.abs(rng.normal(size=B))}
    found = {key: value.astype(np.float32) for key, value in found.items()}
    return {**found, "mask": mask, "tokens": tokens}


def bare(cls: type, **attributes: Any) -> Any:
    """An object of a trainer's class with these attributes alone, for whatever else the method reads."""
    import torch

    same = lambda x: x  # noqa: E731
    trainer = object.__new__(cls)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def outputs_of(logprobs: Any) -> Any:
    """What TRL's fused head returns; only the log-probs matter to the loss."""
    import torch

    zeros = torch.zeros_like(logprobs)
    return SimpleNamespace(
        log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros > 1, log_sum_sq_probs=zeros
    )


def of_dpo(kind: str, x: dict[str, Any]) -> tuple[Any, Any]:
    from trl import DPOTrainer

    settings = SETTINGS["dpo"]
    leaf = x["logprobs"].clone().requires_grad_()
    trainer = bare(
        DPOTrainer, loss_types=[kind], loss_weights=[1.0], beta=settings["beta"], ld_alpha=None, use_weighting=False,
        label_smoothing=settings["label_smoothing"], f_divergence_type="reverse_kl", precompute_ref_logps=True,
        aux_loss_enabled=False, args=SimpleNamespace(discopop_tau=settings["discopop_tau"]),
    )  # fmt: skip
    inside = x["mask"][:, 1:]
    batch = {
        "input_ids": x["tokens"],
        "attention_mask": x["mask"].long(),
        "completion_mask": x["mask"].long(),
        "ref_chosen_logps": x["ref"][:B],
        "ref_rejected_logps": x["ref"][B:],
    }
    return trainer._compute_loss(lambda **_: outputs_of(leaf * inside), batch, False), leaf


def of_kto(kind: str, x: dict[str, Any]) -> tuple[Any, Any]:
    from trl import KTOTrainer

    leaf = x["logprobs"].clone().requires_grad_()
    trainer = bare(
        KTOTrainer, loss_type=kind, calculate_KL=kind == "kto", precompute_ref_logps=True, aux_loss_enabled=False,
        **SETTINGS["kto"],
    )  # fmt: skip
    batch = {
        "input_ids": x["tokens"][:B],
        "KL_input_ids": x["tokens"][B:],
        "attention_mask": x["mask"][:B].long(),
        "KL_attention_mask": x["mask"][B:].long(),
        "completion_mask": x["mask"][:B].long(),
        "KL_completion_mask": x["mask"][B:].long(),
        "label": x["labels"].long(),
        "ref_logps": x["ref"][:B],
        "ref_KL_logps": x["ref"][B:],
    }

    def model(input_ids: Any, **_: Any) -> Any:
        logprobs = leaf * x["mask"][:, 1:]
        return outputs_of(logprobs[B:] if input_ids is batch["KL_input_ids"] else logprobs[:B])

    return trainer._compute_loss(model, batch, False), leaf


def of_logits(name: str, kind: str, x: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    leaf = x["logits"].clone().requires_grad_()
    settings = SETTINGS[name]
    smoothing = settings.get("label_smoothing", 0.0) if kind == "sigmoid" else 0.0  # our SimPO has none
    common = {"beta": settings["beta"], "is_encoder_decoder": False, "aux_loss_enabled": False}
    if name == "orpo":
        trainer = bare(ORPOTrainer, padding_value=0, **common)
    else:
        trainer = bare(
            CPOTrainer, loss_type=kind, pad_token_id=0, alpha=0.0, cpo_alpha=settings["sft_coef"],
            simpo_gamma=settings["target_margin"], label_smoothing=smoothing, **common,
        )  # fmt: skip
    batch = {}
    for side, rows in (("chosen", slice(0, B)), ("rejected", slice(B, 2 * B))):
        batch[f"{side}_input_ids"] = x["tokens"][rows]
        batch[f"{side}_attention_mask"] = x["mask"][rows].long()
        batch[f"{side}_labels"] = torch.where(x["mask"][rows], x["tokens"][rows], -100)
    return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=leaf), batch)[0], leaf


def of_reward(kind: str, x: dict[str, Any]) -> tuple[Any, Any]:
    from trl import RewardTrainer

    leaf = x["scores"].clone().requires_grad_()
    center = SETTINGS["reward"]["center_coef"] if kind == "center" else None
    trainer = bare(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=center))
    batch = {"attention_mask": x["mask"].long()} | ({"margin": x["margins"]} if kind == "margin" else {})
    return trainer.compute_loss(lambda **_: SimpleNamespace(logits=leaf[:, None]), batch), leaf


def computed(rows: str, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CASE/loss and CASE/grad of all cases that take part with these rows, by TRL."""
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in x.items()}
    found = {}
    cases = [(name, kind) for name, kinds in KINDS.items() for kind in kinds.split()] + [("orpo", "")]
    for name, kind in cases:
        if (rows, kind) == ("extreme", "discopop"):
            continue
        if name in ("dpo", "kto"):
            loss, leaf = (of_dpo if name == "dpo" else of_kto)(kind, tensors)
        elif name == "reward":
            loss, leaf = of_reward(kind, tensors)
        else:
            loss, leaf = of_logits(name, kind, tensors)
        loss.backward()
        case = f"{name}_{kind}".rstrip("_")
        found[f"{case}/loss"], found[f"{case}/grad"] = loss.detach().numpy(), leaf.grad.numpy()
    return found


def main() -> None:
    import torch
    import trl

    torch.use_deterministic_algorithms(True)
    print(f"trl {trl.__version__}, torch {torch.__version__}")
    arrays = {}
    for rows in ("ordinary", "extreme"):
        x = inputs(rows)
        found = computed(rows, x)
        if wrong := [name for name, value in found.items() if not np.isfinite(value).all()]:
            sys.exit(f"not finite in TRL on {rows} rows: {wrong}")
        arrays |= {f"{rows}/{key}": value for key, value in (x | found).items()}
    path = Path(__file__).with_name("preference.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
