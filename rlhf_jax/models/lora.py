"""Low-rank adapters of a model (Hu et al. 2021, arXiv 2106.09685): where they go, and how they start.

An adapter belongs to one linear layer of transformers, by whose name it is chosen and saved. In the tree it lies
beside our kernel, `layers/attn/qkv_lora/query/{a, b}`; `whole` stands where transformers, too, has one layer for the
kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rlhf_jax.config import ArchConfig, LoRAConfig
from rlhf_jax.config.rules import LEAVES, stacked
from rlhf_jax.errors import UserError
from rlhf_jax.models.hf.family import Family, Tensor
from rlhf_jax.models.hf.layout import Layout, is_transposed, nested
from rlhf_jax.models.kernels import KERNELS, SUFFIX, WHOLE
from rlhf_jax.types import Params


class Site(NamedTuple):
    """A linear layer that can have an adapter.

    Attributes:
        module: its name in transformers, {} being the layer.
        tensor: its weight as a part of our kernel.
        part: query, key, value, gate, up or whole.
    """

    module: str
    tensor: Tensor
    part: str

    @property
    def leaf(self) -> str:
        """Path of the adapter in our tree; /a and /b follow."""
        return f"{self.tensor.leaf}{SUFFIX}/{self.part}"

    def _single(self, letters: str) -> str:
        """The axis that parts are cut from, S or M, as this part has it."""
        if self.part == WHOLE:
            return letters
        group = "Q" if self.part == "query" else "1"
        return letters.replace("S", group).replace("G", group).replace("M", "1")

    def axes(self) -> dict[str, str]:
        """Letters of a and b by path, L first, then E if it is of experts; R is the rank."""
        letters, first, split = LEAVES[self.tensor.leaf], stacked(self.tensor.leaf), sum(KERNELS[self.tensor.leaf])
        return {
            f"{self.leaf}/a": letters[:split] + "R",
            f"{self.leaf}/b": f"{first}R" + self._single(letters[split:]),
        }

    def stored(self) -> dict[str, Tensor]:
        """PEFT's tensors, names after the module's: A [R, inputs] and B [outputs, R], torch's Linear in any family."""
        inputs, outputs = self.tensor.axes.split()[:: 1 if self.transposed else -1]
        parts = self.tensor.parts if self.part == WHOLE else ()
        return {
            "lora_A.weight": Tensor(f"{self.leaf}/a", f"R {inputs}"),
            "lora_B.weight": Tensor(f"{self.leaf}/b", f"{self._single(outputs)} R", parts),
        }

    @property
    def transposed(self) -> bool:
        """Whether the layer is Conv1D, whose weight is [inputs, outputs]."""
        return is_transposed(self.tensor)


def sites(family: Family, targets: Sequence[str] = ()) -> list[Site]:
    """The linear layers of a family's blocks; those whose names end in one of `targets`, if there are any.

    Raises:
        UserError: a target that no layer has.
    """
    layers = []
    for name, tensor in family.tensors.items():
        if tensor.leaf in KERNELS and name.endswith(".weight"):  # not one tensor of all experts, which is no layer
            part = tensor.parts[0] if len(tensor.parts) == 1 else WHOLE
            layers.append(Site(name.removesuffix(".weight"), tensor, part))
    known = {site.module.partition("{}.")[2] for site in layers}
    for target in targets:
        if not any(_ends_in(name, target) for name in known):
            raise UserError(f"lora.targets names {target}, which this model lacks; it has {', '.join(sorted(known))}")
    return [site for site in layers if not targets or any(_ends_in(site.module, target) for target in targets)]


def _ends_in(module: str, target: str) -> bool:
    return f".{module}".endswith(f".{target}")


def adapter_axes(arch: ArchConfig, chosen: Sequence[Site]) -> dict[str, str]:
    """Letters of every leaf of the adapters by its path."""
    layout, own = Layout(arch), {path: letters for site in chosen for path, letters in site.axes().items()}
    homes = [(home.leaf, letters) for path, letters in own.items() for home in layout.homes(Tensor(path, letters))]
    return {path: letters for path, letters in homes if layout.layers(path)}


def adapter_shapes(arch: ArchConfig, chosen: Sequence[Site], rank: int) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of the adapters by its path."""
    layout, axes = Layout(arch, rank=rank), adapter_axes(arch, chosen)
    return {path: tuple(layout.sizes_of(path)[letter] for letter in letters) for path, letters in axes.items()}


def scale_of(lora: LoRAConfig) -> float:
    """The factor of (x A) B: alpha / rank, or alpha / sqrt(rank)."""
    return lora.alpha / (lora.rank**0.5 if lora.rank_stabilized else lora.rank)


def init_adapters(arch: ArchConfig, chosen: Sequence[Site], rank: int, key: Array) -> Params:
    """Fresh adapters, float32: A uniform in +- 1 / sqrt(inputs), as PEFT draws it, and B = 0, so nothing changes."""
    leaves = {}
    for i, (path, shape) in enumerate(adapter_shapes(arch, chosen, rank).items()):
        if path.endswith("/b"):
            leaves[path] = jnp.zeros(shape)
            continue
        first = KERNELS[path.partition(SUFFIX)[0]][0]
        bound = math.prod(shape[first:-1]) ** -0.5
        leaves[path] = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-bound, maxval=bound)
    return nested(leaves)
