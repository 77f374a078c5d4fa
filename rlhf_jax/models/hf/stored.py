"""What a directory holds: its shape, and its tensors; of a PEFT adapter, those of its model with it added."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rlhf_jax.config import ArchConfig
from rlhf_jax.errors import UserError, reason, shown
from rlhf_jax.hosts.copies import have
from rlhf_jax.hosts.json_text import strict_json
from rlhf_jax.models.hf.composite import text_name, text_part
from rlhf_jax.models.hf.config_json import family_of, read_json, to_arch, understood
from rlhf_jax.models.hf.directory import ADAPTER, layers_of, model_directory, stands_on
from rlhf_jax.models.hf.family import ConfigJson, Family, Tensor
from rlhf_jax.models.hf.layout import is_transposed
from rlhf_jax.models.hf.targets import by_weight, kept_tied, matched, targeted

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Types that are read, by their names in a safetensors file."""
_TYPES: dict[str, Any] = DTYPES | {"U8": np.uint8}
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the name of every tensor of the adapted model."""
_LOW_RANK = re.compile(re.escape(PREFIX) + r"(.*)\.lora_(embedding_)?([AB])(?(2)|\.weight)")
_WHOLE = re.compile(re.escape(PREFIX) + r"((?!.*lora_).*?)(\.base_layer)?(\.weight|\.bias)")
_ONLY: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, None, "gaussian"),
    **dict.fromkeys(["use_dora", "use_qalora", "lora_bias"], (False, None)),
    **dict.fromkeys(["layer_replication", "alora_invocation_tokens", "trainable_token_indices"], (None,)),
    **dict.fromkeys(["use_bdlora", "arrow_config", "kasa_config", "monteclora_config"], (None, False)),
}  # fmt: skip
"""Keys of adapter_config.json whose other values mean something that is not W + scale B A -> those that may stand."""
_MERGE = "merge the adapter into its model with peft, and give that"


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def map(self) -> np.ndarray:
        """The tensor as it lies in the file; only pages that are read come into memory, until the view is dropped."""
        have(self.file, [(self.offset, self.offset + math.prod(self.shape) * np.dtype(_TYPES[self.dtype]).itemsize)])
        return self.lazy()

    def lazy(self) -> np.ndarray:
        """`map` of which nothing may be read but what `bring` has brought: what lies in a bucket is fetched then."""
        return np.memmap(self.file, _TYPES[self.dtype], "r", self.offset, self.shape)

    def bring(self, whole: np.ndarray, part: np.ndarray) -> None:
        """Have the values of `part` be there, a view of `whole`, which `lazy` gave."""
        if part.size:
            (start, _), (first, last) = np.lib.array_utils.byte_bounds(whole), np.lib.array_utils.byte_bounds(part)
            have(self.file, [(self.offset + first - start, self.offset + last - start)])


class Summed(NamedTuple):
    """A weight with an adapter: W + scale B A, or its transpose where the layer is Conv1D; read as a `Stored` is."""

    base: Stored | Summed | Packed
    a: Stored
    b: Stored
    scale: float
    transposed: bool
    shape: tuple[int, ...]
    dtype: str

    def map(self) -> np.ndarray:
        """The sum in float32."""
        delta = self.scale * (self.b.map().astype(np.float32) @ self.a.map().astype(np.float32))
        return self.base.map().astype(np.float32) + (delta.T if self.transposed else delta)

    def lazy(self) -> np.ndarray:
        """All of it."""
        return self.map()

    def bring(self, whole: np.ndarray, part: np.ndarray) -> None:
        """It is there."""


_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_PAIRS = np.concatenate([_FP4, -_FP4])[np.stack([np.arange(256) % 16, np.arange(256) // 16], axis=1)]
"""The two values of a byte, the one in the low bits first."""


class Packed(NamedTuple):
    """Kernels of experts in mxfp4 (OCP Microscaling Formats 1.0): 4-bit floats, and a power of two for every 32.

    Blocks are [E, outputs, inputs / 32, 16] bytes, scales [E, outputs, inputs / 32]; read as a `Stored` is.
    """

    blocks: Stored
    scales: Stored
    shape: tuple[int, ...]
    dtype: str = "BF16"

    def map(self) -> np.ndarray:
        """The kernels [E, inputs, outputs], exact in bfloat16."""
        whole = self.lazy()
        self.bring(whole, whole)
        return whole

    def lazy(self) -> np.ndarray:
        """An array of their shape, in which `bring` makes what is asked for."""
        experts, inputs, outputs = self.shape
        return np.empty((experts, outputs, inputs), ml_dtypes.bfloat16).swapaxes(1, 2)

    def bring(self, whole: np.ndarray, part: np.ndarray) -> None:
        """Make the values of `part`, a box of `whole` whose corners are its first and last elements in memory."""
        if not part.size:
            return
        dense, bounds = whole.swapaxes(1, 2), np.lib.array_utils.byte_bounds
        ends = (place - bounds(whole)[0] for place in (bounds(part)[0], bounds(part)[1] - dense.itemsize))
        low, high = (np.unravel_index(end // dense.itemsize, dense.shape) for end in ends)
        rows, first, last = slice(low[1], high[1] + 1), low[2] // 32, high[2] // 32 + 1  # in blocks of 32 inputs
        blocks, scales = self.blocks.lazy(), self.scales.lazy()
        for stored, of in (self.blocks, blocks), (self.scales, scales):
            stored.bring(of, of[low[0] : high[0] + 1, rows, first:last])
        for e in range(low[0], high[0] + 1):
            exponents = scales[e, rows, first:last, None, None].astype(np.int32) - 127
            with np.errstate(over="ignore"):
                values = np.ldexp(_FP4_PAIRS[blocks[e, rows, first:last]], exponents)
            dense[e, rows, 32 * first : 32 * last] = values.reshape(len(values), -1)


Readable = Stored | Summed | Packed
Tensors = Mapping[str, Readable]


def _unpacked(tensors: Tensors, where: Path) -> dict[str, Readable]:
    """Tensors with a `Packed` for every NAME_blocks and NAME_scales."""
    out = dict(tensors)
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        blocks, scales = out.pop(f"{name}_blocks"), out.pop(f"{name}_scales", None)
        if not isinstance(blocks, Stored) or not isinstance(scales, Stored) or {blocks.dtype, scales.dtype} != {"U8"}:
            raise UserError(f"{where}: {name}_blocks has no {name}_scales, or they are no bytes; download it again")
        if (*scales.shape, 16) != blocks.shape or len(scales.shape) != 3:
            raise UserError(f"{where}: {name} has blocks {list(blocks.shape)} for scales {list(scales.shape)}, "
                            "which is no mxfp4; download it again")  # fmt: skip
        out[name] = Packed(blocks, scales, (scales.shape[0], 32 * scales.shape[2], scales.shape[1]))
    return out


def read_config(path: str | os.PathLike[str]) -> tuple[ArchConfig, ConfigJson]:
    """The shape of the model in a Hugging Face directory (or of a config.json alone), and its config.json.

    Of a PEFT adapter, those of the model that it stands on, whose head is not tied if the adapter changes it alone.

    Raises:
        UserError: no such directory or config, an unknown family, a feature that the decoder lacks, or .bin weights.
    """
    folder = model_directory(path)
    where = folder / "config.json"
    if folder.is_file():
        folder, where = folder.parent, folder
    elif not folder.is_dir():
        raise UserError(f"no directory {folder}; for a model of the Hub, give hf://owner/name")
    if not where.is_file():
        run = (folder / "model" / "config.json").is_file()
        cure = str(folder / "model") if run else "a directory that `save_pretrained` or rlhf-jax wrote"
        raise UserError(f"{folder} has no config.json; give {cure}")
    raw = text_part(read_json(where))
    family = family_of(raw, where)
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        kind = family.classifier if family.classifier in (raw.get("architectures") or ()) else family.causal
        place = json.dumps(str(path), ensure_ascii=False)  # Python's string too, plain in a shell's quotes
        convert = f"import transformers as t; t.{kind}.from_pretrained({place}).save_pretrained({place})"
        command = f"python -c {shlex.quote(convert)}"
        raise UserError(f"{folder} has .bin weights only, which are pickles; where torch is installed, run {command}")
    arch = to_arch(raw, family, where)
    if arch.tied_head and len(layers_of(path)) > 1:
        head = next(name for name, tensor in family.tensors.items() if tensor.leaf == "head/kernel")
        arch = dataclasses.replace(arch, tied_head=head not in stored_tensors(Path(path)))
    return arch, raw


def read_generation(path: str | os.PathLike[str]) -> ConfigJson:
    """generation_config.json of a directory; empty if there is none."""
    file = model_directory(path) / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def stored_tensors(path: Path) -> dict[str, Readable]:
    """What the safetensors files of a directory hold, by name.

    Raises:
        UserError: a file is missing or cut short, or an adapter is of a kind or model that does not fit.
    """
    *adapters, path = layers_of(path)
    index, files = path / "model.safetensors.index.json", [path / "model.safetensors"]
    if not files[0].is_file() and index.is_file():
        with understood(index):
            names = sorted(set(read_json(index)["weight_map"].values()))
            if bad := [name for name in names if name in ("", ".", "..") or Path(name).name != name]:
                raise UserError(f"{index} names {shown(bad[0])}, which is no file beside it; download it again")
        files = [path / name for name in names]
    tensors: dict[str, Readable] = {}
    for file in files:
        tensors |= {text_name(name): tensor for name, tensor in read_header(file).items()}
    tensors = _unpacked(tensors, path)
    if adapters:
        arch, family = _shape_of(path / "config.json")
        tensors = _whole_names(family, tensors)
        if arch.tied_head:
            check_tied(path, family, tensors)
            tensors.pop(next(name for name, tensor in family.tensors.items() if tensor.leaf == "head/kernel"), None)
    for folder in reversed(adapters):
        with understood(folder / ADAPTER):
            tensors = _with_adapter(folder, tensors, family)
    return tensors


def _shape_of(config: Path) -> tuple[ArchConfig, Family]:
    raw = text_part(read_json(config))
    family = family_of(raw, config)
    arch = to_arch(raw, family, config)
    return arch, family.of(arch)


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name; a UserError if it is missing or cut short."""
    if not os.path.isfile(file):
        raise UserError(f"{file} is missing; download or save the model again")
    try:
        with safe_open(file, framework="numpy"):  # checks the header against the file's length
            pass
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = strict_json(handle.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        said = f"{file} is no complete safetensors file ({reason(error)})"
        raise UserError(f"{said}; download or save it again") from error
    header.pop("__metadata__", None)
    return {
        name: Stored(file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


def _with_adapter(folder: Path, base: dict[str, Readable], family: Family) -> dict[str, Readable]:
    """The tensors of a model with those of an adapter: low-rank pairs added, whole modules in place of its own.

    A model with a tied head has none in `base`, and none in the result where the adapter leaves the two tied. PEFT
    gives each module of modules_to_save weights of its own, so the other of the two keeps what it was, unless
    ensure_weight_tying says otherwise (`kept_tied`); whatever else an adapter holds whole is of both.
    """
    where, raw = folder / ADAPTER_WEIGHTS, read_json(folder / ADAPTER)
    for key, allowed in _ONLY.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise UserError(f"{folder / ADAPTER}: no support for {key} {shown(raw[key])}; {_MERGE}")
    for name in raw.get("target_parameters") or []:
        if not name.endswith(".weight"):
            raise UserError(f"{folder / ADAPTER}: no support for target_parameters {shown(name)}; {_MERGE}")
    names = {tensor.leaf: name for name, tensor in family.tensors.items()}
    embedding, head = names["embed/tokens"], names["head/kernel"]
    own = () if kept_tied(raw, "modules_to_save") else tuple(raw.get("modules_to_save") or ())
    tied, pairs = head not in base, {}  # type: tuple[bool, dict[str, dict[str, Stored]]]
    shared, single, tables = dict(base), {}, set()  # type: tuple[dict[str, Readable], dict[str, Readable], set[str]]
    for stored, tensor in read_header(where).items():
        if match := _LOW_RANK.fullmatch(stored):
            pairs.setdefault(match[1], {})[match[3]] = tensor
            tables |= {match[1]} if match[2] else set()  # [rows, width], where a layer is [outputs, inputs]
        elif match := _WHOLE.fullmatch(stored):
            name = family.renamed.get(match[1] + match[3], match[1] + match[3])
            if not match[2] and match[1].endswith(own):
                single[name] = tensor
            else:
                shared[embedding if tied and name == head else name] = tensor
        else:
            raise UserError(f"{where}: no support for {stored}; {_MERGE}")
    for module, pair in pairs.items():
        name = family.renamed.get(f"{module}.weight", f"{module}.weight")
        weight = shared.get(embedding if tied and name == head else name)
        if weight is None or len(pair) < 2:
            raise UserError(f"{where}: {module} is not in the model that the adapter names, or half is missing")
        if not targeted(raw, module):
            continue  # as PEFT does, which does not say so (`left_out`)
        transposed = module in tables or (_transposed(family, name) and not by_weight(raw, module))
        single[name] = _summed(raw, module, weight, pair, transposed, where)
    if tied and embedding in single:
        factors = {getattr(single[name], "scale", None) for name in (embedding, head) if name in single}
        if kept_tied(raw, "target_modules") and len(factors) == 1:
            single.pop(head, None)  # the head's pair is the embedding's
        else:
            single.setdefault(head, shared[embedding])
    return shared | single


def left_out(folder: Path) -> list[str]:
    """The modules of which an adapter's file has a pair that PEFT does not read, nor do we; none of a model."""
    if stands_on(folder) is None:
        return []
    raw, found = read_json(folder / ADAPTER), map(_LOW_RANK.fullmatch, read_header(folder / ADAPTER_WEIGHTS))
    return [module for module in dict.fromkeys(match[1] for match in found if match) if not targeted(raw, module)]


def _whole_names(family: Family, stored: dict[str, Readable]) -> dict[str, Readable]:
    """A model's tensors by the names that PEFT has: those of the whole model, be they of the bare trunk."""
    bare = not any(name.startswith(family.prefix) for name in stored)
    return {
        family.prefix + name if bare and _tensor_of(family, family.prefix + name) else name: tensor
        for name, tensor in stored.items()
    }


def _tensor_of(family: Family, name: str) -> Tensor | None:
    return family.tensors.get(re.sub(r"\.\d+\.", ".{}.", name))


def _transposed(family: Family, name: str) -> bool:
    """Whether a weight is that of Conv1D; by this PEFT goes too, whatever fan_in_fan_out says."""
    tensor = _tensor_of(family, name)
    return tensor is not None and is_transposed(tensor)


def check_tied(folder: Path, family: Family, stored: Tensors) -> None:
    """Raise a UserError if a directory holds a head beside the embedding to which it is tied, and they differ."""
    names = {tensor.leaf: name for name, tensor in family.tensors.items()}
    head, embedding = stored.get(names["head/kernel"]), stored.get(names["embed/tokens"])
    if head is not None and embedding is not None and not np.array_equal(head.map(), embedding.map()):
        cure = "set tie_word_embeddings to false in config.json"
        raise UserError(f"{folder}: {names['head/kernel']} is not the tied embedding; {cure}")


def _summed(
    raw: ConfigJson, module: str, base: Readable, pair: Mapping[str, Stored], transposed: bool, where: Path
) -> Summed:
    a, b = pair["A"], pair["B"]
    patterns = (raw.get("alpha_pattern") or {}).items()
    known = f"{module}.weight" if by_weight(raw, module) else module
    alphas = (alpha for key, alpha in patterns if matched(rf"(.*\.)?({key})", known, "alpha_pattern"))
    alpha = float(next(alphas, raw["lora_alpha"]))
    if not abs(alpha) < 1e9:
        raise UserError(f"lora_alpha is {shown(alpha)}, which no adapter has")
    rank, product = a.shape[0], (b.shape[0], a.shape[1])
    if base.shape != (product[::-1] if transposed else product) or b.shape[1] != rank:
        raise UserError(
            f"{where}: {module} is for another shape than {list(base.shape)}; name the model it was made on"
        )
    scale = alpha / (rank**0.5 if raw.get("use_rslora") else rank)
    return Summed(base, a, b, scale, transposed, base.shape, base.dtype)
