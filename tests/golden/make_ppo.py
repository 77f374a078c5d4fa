"""Makes ppo.npz: what TRL's own code computes between the networks and the gradient of PPO, for tests without torch.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 && peer/bin/pip install trl==1.12.0
    peer/bin/python tests/golden/make_ppo.py

1.12 is the last TRL with PPO. Its `PPOTrainer.train` is one long method, so two stretches of its source are cut out,
from a marked line to another, and run as they are on random arrays: from the no-EOS penalty to the whitened advantages
(SHAPE), and the losses of a minibatch (LOSS). `masked_whiten` and `masked_var` are called directly.

For ROWS in ordinary, extreme (float32; B rows of T tokens, of which the first `lengths` are real):
    ROWS/{lengths [B], finished bool[B], scores [B], logprobs, ref, values, new_logprobs, new_values [B, T]}
    ROWS/CASE/{rewards, advantages, returns, kl} [B, T]   CASE of CASES; the score is in the slot after the stop id
    ROWS/CASE/{policy_loss, value_loss, value_clip} []
    ROWS/CASE/{d_logprobs, d_values} [B, T], gradients of policy_loss + 0.1 value_loss
    ROWS/whiten_{shift,keep}_{bessel,biased} [B, T], of `values` over the real tokens, 0 elsewhere
Log-ratios of extreme rows go up to 15 and log-probs down to -300; k3 takes part in ordinary rows only.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

B, T, EOS, PAD = 6, 7, 1, 0
CASES = {
    "plain": {},
    "k3": {"kl_estimator": "k3", "kl_coef": 0.2},
    "whitened_rewards": {"whiten_rewards": True},
    "penalty": {"missing_eos_penalty": 1.5},
    "discounted": {"gamma": 0.97, "lam": 0.8, "cliprange": 0.1, "cliprange_value": 0.05},
}
DEFAULTS = {
    "kl_estimator": "k1", "kl_coef": 0.05, "whiten_rewards": False, "missing_eos_penalty": None, "gamma": 1.0,
    "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1,
}  # fmt: skip
SHAPE = ("contain_eos_token = torch.any", "advantages = torch.masked_fill(advantages, padding_mask, 0)")
LOSS = ("new_logprobs = torch.masked_fill(", "loss = pg_loss + args.vf_coef * vf_loss")


def inputs(name: str) -> dict[str, np.ndarray]:
    """Random rows: one that fills T, one of a single token, one that fills T and stops there."""
    rng = np.random.default_rng({"ordinary": 0, "extreme": 1}[name])
    lengths = np.array([T, 1, T, *rng.integers(2, T, B - 3)])
    finished = np.array([False, True, True, True, False, True])
    draw = lambda scale: rng.normal(size=(B, T)) * scale  # noqa: E731
    if name == "ordinary":
        logprobs, moves, scale = -np.abs(draw(1.5)), draw(0.3), 1.0
        ref = logprobs + draw(0.5)
    else:
        logprobs, moves, scale = -np.abs(draw(120.0)), draw(9.0).clip(-15, 15), 30.0
        ref = logprobs + draw(40.0)
    values = draw(scale)
    found = {
        "scores": rng.normal(size=B) * scale,
        "logprobs": logprobs,
        "ref": ref,
        "values": values,
        "new_logprobs": logprobs + moves,
        "new_values": values + draw(0.3 * scale),
    }
    found = {key: value.astype(np.float32) for key, value in found.items()}
    return {**found, "lengths": lengths, "finished": finished}


def stretch(source: str, borders: tuple[str, str]) -> Any:
    """The lines of `source` from the one that begins with the first border to the one with the second, compiled."""
    lines = source.splitlines()
    start, end = (next(i for i, line in enumerate(lines) if line.strip().startswith(border)) for border in borders)
    return compile(textwrap.dedent("\n".join(lines[start : end + 1])), borders[0], "exec")


def of_case(x: dict[str, np.ndarray], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """What TRL makes of the rows under these settings."""
    import torch
    from trl.experimental.ppo import ppo_trainer

    source = inspect.getsource(ppo_trainer.PPOTrainer.train)
    args = SimpleNamespace(**{**DEFAULTS, **settings})
    tokens = np.where(np.arange(T) < x["lengths"][:, None], 5, PAD)
    tokens[np.arange(B), x["lengths"] - 1] = np.where(x["finished"], EOS, 5)
    to = lambda name: torch.from_numpy(x[name]).clone()  # noqa: E731
    names = {
        **vars(ppo_trainer),
        "args": args,
        "self": SimpleNamespace(processing_class=SimpleNamespace(eos_token_id=EOS), args=args),
        "responses": torch.from_numpy(tokens),
        "postprocessed_responses": torch.from_numpy(tokens),
        "sequence_lengths": torch.from_numpy(x["lengths"] - 1),
        "scores": to("scores"),
        "logprobs": to("logprobs"),
        "ref_logprobs": to("ref"),
        "values": to("values"),
    }
    exec(stretch(source, SHAPE), names)
    new_logprobs, new_values = to("new_logprobs").requires_grad_(), to("new_values").requires_grad_()
    names |= {
        "new_logprobs": new_logprobs,
        "vpred_temp": torch.cat([new_values, torch.zeros(B, 1)], dim=1)[..., None],
        "context_length": 1,
        "micro_batch_inds": torch.arange(B),
        "mb_advantage": names["advantages"],
        "mb_logprobs": names["logprobs"],
        "mb_return": names["returns"],
        "mb_values": names["values"],
    }
    exec(stretch(source, LOSS), names)
    names["loss"].backward()
    found = {
        **{name: names[name] for name in ("rewards", "advantages", "returns", "kl")},
        "policy_loss": names["pg_loss"],
        "value_loss": names["vf_loss"],
        "value_clip": names["vf_clipfrac"],
        "d_logprobs": new_logprobs.grad,
        "d_values": new_values.grad,
    }
    return {name: value.detach().numpy() for name, value in found.items()}


def whitened(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """TRL's masked_whiten, and the same with the variance that its masked_var gives with unbiased=False."""
    import torch
    from trl.experimental.ppo.ppo_trainer import masked_mean, masked_var, masked_whiten

    mask = torch.from_numpy(np.arange(T) < x["lengths"][:, None])
    values, found = torch.from_numpy(x["values"]), {}
    mean = masked_mean(values, mask)
    for name, shift in (("shift", True), ("keep", False)):
        biased = (values - mean) * torch.rsqrt(masked_var(values, mask, unbiased=False) + 1e-8)
        found[f"whiten_{name}_bessel"] = masked_whiten(values, mask, shift_mean=shift)
        found[f"whiten_{name}_biased"] = biased if shift else biased + mean
    return {name: torch.masked_fill(value, ~mask, 0).numpy() for name, value in found.items()}


def computed(rows: str, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CASE/NAME of all cases that take part with these rows, and the whitened values, by TRL."""
    cases = {case: settings for case, settings in CASES.items() if rows == "ordinary" or case != "k3"}
    found = {f"{case}/{name}": value for case, s in cases.items() for name, value in of_case(x, s).items()}
    return found | whitened(x)


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
    path = Path(__file__).with_name("ppo.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
