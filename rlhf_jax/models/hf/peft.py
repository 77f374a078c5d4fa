"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors. `stored.py` reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from rlhf_jax.config import ArchConfig, LoRAConfig
from rlhf_jax.config.settings import HUB
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.models.hf import weights as hf_weights
from rlhf_jax.models.hf.config_json import MEMBERS
from rlhf_jax.models.hf.directory import ADAPTER
from rlhf_jax.models.hf.family import ConfigJson, Family
from rlhf_jax.models.hf.layout import Layout, flattened
from rlhf_jax.models.hf.stored import ADAPTER_WEIGHTS, PREFIX
from rlhf_jax.models.lora import Site, adapter_axes, sites
from rlhf_jax.types import Params


def adapter_config(lora: LoRAConfig, chosen: Sequence[Site], *, base: str, score_head: bool) -> ConfigJson:
    """adapter_config.json of adapters at `chosen` on the model `base`, a directory or a name of the Hub."""
    name, _, revision = base.removeprefix(HUB).partition("@")
    place = base if in_bucket(base) else str(Path(base).absolute())
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score_head else "CAUSAL_LM",
        "base_model_name_or_path": name if base.startswith(HUB) else place,
        "revision": revision if base.startswith(HUB) and revision else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(site.transposed for site in chosen),
        "target_modules": [site.module.partition("{}.")[2].rpartition("{}.")[2] for site in chosen],
        "modules_to_save": ["score"] if score_head else None,
        "inference_mode": True,
    }


def save_adapter(
    folder: Path, arch: ArchConfig, family: Family, lora: LoRAConfig, params: Params, *, base: str
) -> None:
    """Write what was trained of a model: adapters, and its score head if it has one, in `params`, host arrays.

    transformers' head has no bias; one that is not 0 is stored as score.bias, which PEFT leaves out.
    """
    leaves, score_head = flattened(params), "score" in params
    chosen = sites(family, lora.targets)
    tensors = {f"{PREFIX}{site.module}.{name}": tensor for site in chosen for name, tensor in site.stored().items()}
    members = hf_weights.heads_in(leaves)
    known = hf_weights.with_heads(family, members).tensors
    heads = {PREFIX + name: tensor for name, tensor in known.items() if tensor.leaf.startswith("score/")}
    if score_head and not np.any(leaves["score/bias"]):
        del leaves["score/bias"]
    layout = Layout(arch, members=members, rank=lora.rank, axes=adapter_axes(arch, chosen))
    stored = dict(
        hf_weights.hf_tensors(family._replace(tensors=tensors | heads), layout, leaves, np.dtype(np.float32))
    )
    folder.mkdir()
    save_file(stored, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = adapter_config(lora, chosen, base=base, score_head=score_head) | ({MEMBERS: members} if members else {})
    (folder / ADAPTER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
