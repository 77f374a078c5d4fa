"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors.

`stored.py` reads them added to their model; here they are written, and those of an ensemble's members are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from rlhf_jax.config import ArchConfig, LoRAConfig
from rlhf_jax.config.settings import HUB
from rlhf_jax.errors import UserError, named, tell
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.models.hf import heads
from rlhf_jax.models.hf import weights as hf_weights
from rlhf_jax.models.hf.config_json import MEMBERS, read_json, understood
from rlhf_jax.models.hf.directory import ADAPTER
from rlhf_jax.models.hf.family import ConfigJson, Family
from rlhf_jax.models.hf.layout import Layout, flattened, leaf_shapes
from rlhf_jax.models.hf.stored import ADAPTER_WEIGHTS, PREFIX, read_header
from rlhf_jax.models.lora import Site, adapter_axes, adapter_shapes, scale_of, sites
from rlhf_jax.sharding import Mesh, placed
from rlhf_jax.types import Params


def adapter_config(
    lora: LoRAConfig, chosen: Sequence[Site], *, base: str, score_head: bool, known: Sequence[Site] = ()
) -> ConfigJson:
    """adapter_config.json of adapters at `chosen`, some of the `known`, on the model `base`, a directory or a name of
    the Hub.

    PEFT makes one adapter of twice the rank and alpha of those of an expert's gate and up, and so takes another factor
    where that is alpha / sqrt(rank). So of experts the same factor is written as alpha / rank. It also takes a target
    that ends as one of theirs to be of experts alone, so layers beside them that end so are named by their weights.
    """
    of_experts = set(_of_experts([*known, *chosen]))
    stabilized = lora.rank_stabilized and not _of_experts(chosen)
    names = [site.module.partition("{}.")[2].rpartition("{}.")[2] for site in chosen]
    beside = [name for name in names if "." in name and name.rpartition(".")[2] in of_experts]
    name, _, revision = base.removeprefix(HUB).partition("@")
    place = base if in_bucket(base) else named(Path(base).absolute())
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score_head else "CAUSAL_LM",
        "base_model_name_or_path": name if base.startswith(HUB) else place,
        "revision": revision if base.startswith(HUB) and revision else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha if stabilized == lora.rank_stabilized else scale_of(lora) * lora.rank,
        "use_rslora": stabilized,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(site.transposed for site in chosen),
        "target_modules": [name for name in names if name not in beside],
        **({"target_parameters": [f"{name}.weight" for name in beside]} if beside else {}),
        "modules_to_save": ["score"] if score_head else None,
        "inference_mode": True,
    }


def _of_experts(found: Sequence[Site]) -> list[str]:
    """The last parts of the names of those that are of experts."""
    return [site.module.rpartition(".")[2] for site in found if "/experts/" in site.tensor.leaf]


def _adapters_of(family: Family, chosen: Sequence[Site]) -> Family:
    """The family with the tensors of a file of adapters, and of score heads, in place of its own."""
    tensors = {f"{PREFIX}{site.module}.{name}": tensor for site in chosen for name, tensor in site.stored().items()}
    scores = {PREFIX + name: tensor for name, tensor in family.tensors.items() if tensor.leaf.startswith("score/")}
    return family._replace(tensors=tensors | scores)


def save_adapter(
    folder: Path, arch: ArchConfig, family: Family, lora: LoRAConfig, params: Params, *, base: str
) -> None:
    """Write what was trained of a model: adapters, and its score head if it has one, in `params`, host arrays.

    transformers' head has no bias; one that is not 0 is stored as score.bias, which PEFT leaves out.
    """
    leaves, score_head = flattened(params), "score" in params
    chosen, known, members = sites(family, lora.targets), sites(family), heads.heads_in(leaves)
    has, lacks = _of_experts(chosen), _of_experts([site for site in known if site not in chosen])
    if lacks and any(site.tensor.leaf == "layers/experts/up" for site in chosen):  # down alone it reads
        tell(f"! adapter: peft reads what experts have in {', '.join(has)} only beside pairs in {', '.join(lacks)}, "
             "so give others the merged model, or name all of these in lora.targets")  # fmt: skip
    stored_family = _adapters_of(heads.with_heads(family, members), chosen)
    if score_head and not np.any(leaves["score/bias"]):
        del leaves["score/bias"]
    layout = Layout(arch, members=members, rank=lora.rank, axes=adapter_axes(arch, chosen))
    stored = dict(hf_weights.hf_tensors(stored_family, layout, leaves, np.dtype(np.float32)))
    folder.mkdir(parents=True)
    save_file(stored, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = adapter_config(lora, chosen, base=base, score_head=score_head, known=known)
    config |= {MEMBERS: members} if members else {}
    (folder / ADAPTER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_members(folders: Sequence[Path], arch: ArchConfig, family: Family, mesh: Mesh) -> tuple[LoRAConfig, Params]:
    """The settings of the members of an ensemble on one trunk, and their adapters and heads, members on a first axis.

    `folders` are as `save_adapter` writes them, one for each.

    Raises:
        UserError: one is missing or broken, or has other settings than the first.
    """
    settings = [_settings_of(folder) for folder in folders]
    for folder, own in zip(folders, settings, strict=True):
        if own != settings[0]:
            cure = "put the member there that was trained with it"
            raise UserError(f"{folder / ADAPTER} has other settings than {folders[0]}; {cure}")
    lora = settings[0]
    chosen = sites(family, lora.targets)
    layout, stored_family = Layout(arch, rank=lora.rank, axes=adapter_axes(arch, chosen)), _adapters_of(family, chosen)
    shapes = {name: shape for name, shape in leaf_shapes(arch, score_head=True).items() if name.startswith("score/")}
    shapes |= adapter_shapes(arch, chosen, lora.rank)
    of = lambda folder: (read_header(folder / ADAPTER_WEIGHTS), shapes)  # noqa: E731
    each = [hf_weights.load_leaves(folder, arch, stored_family, layout, *of(folder), mesh=mesh) for folder in folders]
    return lora, placed(mesh, lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees), *each)


def _settings_of(folder: Path) -> LoRAConfig:
    raw = read_json(folder / ADAPTER)
    with understood(folder / ADAPTER):
        rank, alpha, targets = int(raw["r"]), float(raw["lora_alpha"]), list(raw["target_modules"])
        return LoRAConfig(rank, alpha, bool(raw["use_rslora"]), targets)
