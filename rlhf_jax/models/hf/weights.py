"""Weights of a Hugging Face directory in and out, shard by shard, driven by `families.py`."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors.numpy import save_file

from rlhf_jax.config import ArchConfig
from rlhf_jax.config.rules import FLOAT32
from rlhf_jax.errors import UserError, tell
from rlhf_jax.hosts.copies import release
from rlhf_jax.hosts.processes import barrier, is_first, to_host
from rlhf_jax.models.hf.composite import BESIDE, text_part
from rlhf_jax.models.hf.config_json import OWN_ADAPTERS, family_of, find_family, read_json, to_json_like
from rlhf_jax.models.hf.directory import layers_of, model_directory, replacing_model
from rlhf_jax.models.hf.family import ConfigJson, Family, Tensor
from rlhf_jax.models.hf.heads import heads_in, members_of, own_adapters, with_heads
from rlhf_jax.models.hf.layout import Layout, Leaves, flattened, leaf_shapes, nested
from rlhf_jax.models.hf.seen import Seen, few
from rlhf_jax.models.hf.stored import DTYPES, Packed, Tensors, check_tied, left_out, stored_tensors
from rlhf_jax.sharding import Mesh, tree_shardings
from rlhf_jax.types import Params

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5 * 10**9
"""Largest weight file written, as in transformers."""

Index = tuple[slice, ...]
"""Where a part of an array lies in it."""
_Wanted = dict[str, tuple[Tensor, tuple[int, ...]]]  # stored name -> tensor, its place on the leaf's L and E


def _names(family: Family, layout: Layout, leaves: Iterable[str]) -> _Wanted:
    """Stored name -> (tensor, place) of all that these leaves consist of."""
    chosen = [(name, home) for name, tensor in family.tensors.items() for home in layout.homes(tensor)]
    found: _Wanted = {}
    for name, tensor in chosen:
        if tensor.leaf not in leaves:
            continue
        numbers = [layout.layers(tensor.leaf), range(layout.sizes["E"])][: name.count("{}")]
        for place in itertools.product(*(range(len(of)) for of in numbers)):
            found[name.format(*(of[i] for of, i in zip(numbers, place, strict=True)))] = tensor, place
    return found


def load_params(
    path: str | os.PathLike[str],
    arch: ArchConfig,
    *,
    score_head: bool | None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
) -> Params:
    """The weights of a Hugging Face directory, whose shape `read_config` gives, as our tree of jax arrays.

    Of a PEFT adapter they are its model's with the adapter merged. With `score_head` they have the scalar head of a
    reward or value model and no vocabulary head, else the reverse; None loads the trunk alone. Every device's part of
    a leaf is read from the files by itself, so the host holds one part and the pages of one stored tensor beside what
    its devices keep.

    Args:
        mesh: where the arrays lie, by the rule table; None for the first device.
        dtype: float32 or bfloat16; the scalar head and the bias of a sigmoid router are float32 all the same.

    Raises:
        UserError: tensors are missing, unknown, misshapen, quantized or cut short, or there is no trained score head.
    """
    folder = Path(path)
    family, layout, stored, shapes = _held(folder, arch, score_head)
    params = load_leaves(folder, arch, family, layout, stored, shapes, mesh=mesh, dtype=dtype)
    for each in layers_of(folder):
        if (beyond := left_out(each)) and is_first():
            said = f"{len(beyond)} adapters of modules that it does not target are left out: {few(beyond)}"
            tell(f"{each}: {said}", error=True)
        release(each)
    return params


def check_params(path: str | os.PathLike[str], arch: ArchConfig, *, score_head: bool | None) -> None:
    """Raise the UserError of `load_params`, as far as the headers of the files tell; reads no tensor, says nothing."""
    folder = Path(path)
    family, layout, stored, shapes = _held(folder, arch, score_head)
    _check_stored(folder, family, stored, _names(family, layout, shapes), layout, say=False)


def _held(
    folder: Path, arch: ArchConfig, score_head: bool | None
) -> tuple[Family, Layout, Tensors, dict[str, tuple[int, ...]]]:
    """(family, layout, stored tensors, leaf -> shape) of what `load_params` reads of a directory."""
    members = members_of(folder) if score_head else 0
    if score_head and own_adapters(folder):
        raise UserError(f"{folder} is the trunk of {members} members; name a reward model, such as {folder}/members/0")
    layout, config = Layout(arch, members=members), model_directory(folder) / "config.json"
    family = with_heads(family_of(text_part(read_json(config)), config).of(arch), members)
    stored = stored_tensors(folder)
    if stored and not any(name.startswith(family.prefix) for name in stored):
        trunk = {name for name in family.tensors if name.startswith(family.prefix)}
        bare = {name.removeprefix(family.prefix): tensor for name, tensor in family.tensors.items() if name in trunk}
        family = family._replace(tensors=bare | {n: t for n, t in family.tensors.items() if n not in trunk})
    if arch.tied_head:
        check_tied(folder, family, stored)
    return family, layout, stored, leaf_shapes(arch, score_head=score_head, members=members)


def load_leaves(
    folder: Path,
    arch: ArchConfig,
    family: Family,
    layout: Layout,
    stored: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    mesh: Mesh | None,
    dtype: str = "float32",
) -> Params:
    """The leaves of these shapes from the tensors of a directory, as `load_params` reads them."""
    wanted = _names(family, layout, shapes)
    _check_stored(folder, family, stored, wanted, layout)
    specs = {
        leaf: jax.ShapeDtypeStruct(shape, np.float32 if leaf in FLOAT32 else _DTYPES[dtype])
        for leaf, shape in shapes.items()
    }
    shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), specs)
    if mesh is not None:
        shardings = flattened(tree_shardings(mesh, nested(specs)))
    leaves, seen = {}, Seen(arch)
    for leaf, spec in specs.items():
        parts = {name: entry for name, entry in wanted.items() if entry[0].leaf == leaf and name in stored}
        read = functools.partial(_read_shard, parts, stored, layout, spec, seen)
        leaves[leaf] = _placed(read, spec, shardings[leaf])
    seen.report(folder)
    return nested(leaves)


def _placed(read: Callable[[Index], np.ndarray], spec: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    """An array whose parts `read` gives; the host holds one at a time, and reads it once for all its copies."""
    holders: dict[str, tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        assert index is not None  # a device that holds a part, as all of these do
        holders.setdefault(str(index), (index, []))[1].append(device)
    arrays = []
    for index, devices in holders.values():
        part = read(index)
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)


def _read_shard(
    parts: _Wanted, stored: Tensors, layout: Layout, spec: jax.ShapeDtypeStruct, seen: Seen, index: Index
) -> np.ndarray:
    """The part of a leaf at `index`, read from the files."""
    bounds = [range(*cut.indices(size)) for cut, size in zip(index, spec.shape, strict=True)]
    out = np.zeros([len(bound) for bound in bounds], spec.dtype)
    for name, (tensor, place) in parts.items():
        if any(number not in bound for number, bound in zip(place, bounds, strict=False)):
            continue
        target, inner = out, bounds[len(place) :]
        for number, bound in zip(place, bounds, strict=False):
            target = target[number - bound.start]
        whole = stored[name].lazy()
        for piece, within in layout.views(tensor, whole):
            sources, targets = list[Any](), list[slice]()
            for bound, lies in zip(inner, within, strict=True):  # of every axis what both have
                first = max(bound.start, lies.start)
                last = max(min(bound.stop, lies.stop), first)
                sources.append(slice(first - lies.start, last - lies.start))
                targets.append(slice(first - bound.start, last - bound.start))
            part = piece[(*sources, ...)]  # a view; of a single number it would be a copy without ...
            stored[name].bring(whole, part)
            target[tuple(targets)] = part
            seen.look(name, tensor.leaf, part, target[tuple(targets)])
    return out


def _check_stored(
    folder: Path, family: Family, stored: Tensors, wanted: _Wanted, layout: Layout, *, say: bool = True
) -> None:
    missing = {name: tensor.leaf for name, (tensor, _) in wanted.items() if name not in stored}
    missing = {name: leaf for name, leaf in missing.items() if leaf != "score/bias"}
    if "score/kernel" in missing.values():
        raise UserError(f"{folder} holds no trained score head (score.weight); train one with `rlhf-jax reward`")
    if missing and set(missing.values()) <= {"head/kernel", "head/bias"}:
        cure = "give a language model, or set tie_word_embeddings to true in config.json if its head is tied"
        raise UserError(f"{folder} holds no vocabulary head ({', '.join(missing)}); {cure}")
    heads = {name for name, tensor in family.tensors.items() if tensor.leaf.startswith(("head/", "score/"))}
    beside = [n for n in stored if family.whole and BESIDE.match(n)]
    unused = layout.unused(family.tensors) & stored.keys()
    others = [n for n in stored if n not in wanted and n not in heads and n not in {*beside, *unused}]
    extra = [n for n in others if not re.search(family.ignored, n)]
    ignored = (n for n in others if re.search(family.ignored, n))
    unread = [n for n in ignored if re.search(r"layers\.\d+\..*(_proj|norm)\.", n)]
    counts = {
        "in mxfp4 are read as bfloat16": sum(isinstance(tensor, Packed) for tensor in stored.values()),
        "of images or sound are not read": len(beside),
        "of layers that predict tokens beyond the next are not read": len(unread),
        "of keys and values in layers that see those of others are not read": len(unused),
    }
    for what, count in counts.items():
        if count and say and is_first():
            tell(f"{folder}: {count} tensors {what}", error=True)
    shapes = {name: layout.stored_shape(wanted[name][0]) for name in wanted if name in stored}
    shaped = [f"{n} {list(stored[n].shape)}, not {list(s)}" for n, s in shapes.items() if s != stored[n].shape]
    typed = [f"{n} ({stored[n].dtype})" for n in shapes if stored[n].dtype not in DTYPES]
    again = "make config.json agree with the weights, or download the directory again"
    if shaped and shaped[0].startswith("score.weight"):
        raise UserError(f"{folder} does not give one score: {shaped[0]}; take a reward model with one label")
    for items, what, cure in (
        (list(missing), "lacks tensors that config.json asks for", again),
        (extra, "has tensors that config.json does not mention", again),
        (shaped, "has tensors of other shapes than config.json says", again),
        (typed, "has quantized tensors", "save the model in bfloat16"),
    ):
        if items:
            raise UserError(f"{folder} {what}: {few(items)}; {cure}")


def save_model(
    path: str | os.PathLike[str],
    arch: ArchConfig,
    params: Params,
    *,
    eos_ids: Sequence[int],
    pad_id: int | None = None,
    score_head: bool = False,
    dtype: str = "float32",
    base_config: ConfigJson | None = None,
    base_generation: ConfigJson | None = None,
    shard_bytes: int = SHARD_BYTES,
    write_more: Callable[[Path], None] | None = None,
    trunk_of: int = 0,
    in_place: bool = False,
) -> None:
    """Writes config.json, generation_config.json and safetensors; what is in `path` beside an old model stays.

    The directory is written beside `path` and renamed: an interruption leaves the old one as it was. The host holds
    one layer of a leaf and the file being written. In a run of several hosts all call this, and the first writes.

    Args:
        params: our tree, jax or numpy arrays.
        score_head: a reward or value model; `_fold_score_bias` says what becomes of its bias.
        dtype: float32 or bfloat16.
        base_config: config.json of the model that training began with: family, bos, (default) pad, what is not ours.
        base_generation: its generation_config.json; all that it says is kept but stop and padding ids.
        shard_bytes: the largest weight file; more of them come with an index.
        write_more: writes further files, such as the tokenizer's, which else stays, into the new directory.
        in_place: the model is that of `path` in another form, so that all but its weights stays.
        trunk_of: so many members of a reward ensemble, whose adapters and heads `write_more` writes: params have none.

    Raises:
        UserError: no family has this shape, or params do not have it.
    """
    members = heads_in(leaves := flattened(params)) or trunk_of
    family, layout = with_heads(find_family(arch, base_config), members), Layout(arch, members=members)
    shapes = leaf_shapes(arch, score_head=None if trunk_of else score_head, members=members)
    if dtype not in _DTYPES:
        raise UserError(f"cannot save in dtype {dtype!r}; use one of: {', '.join(_DTYPES)}")
    if wrong := {leaf: np.shape(array) for leaf, array in leaves.items()}.items() ^ shapes.items():
        names = ", ".join(sorted({leaf for leaf, _ in wrong})[:3])
        raise UserError(f"arch and params disagree about {names}; save params with the arch that they have")
    leaves = _fold_score_bias(leaves) if score_head and not members else leaves
    tokens = _token_ids(family, eos_ids, pad_id, base_config or {}, score_head=score_head)
    said = to_json_like(family, arch, base_config or {}, score_head=score_head, members=members)
    config = said | tokens | {"dtype": dtype} | ({OWN_ADAPTERS: True} if trunk_of else {})
    generation = _generation(base_generation or {}, tokens)
    tensors = hf_tensors(family, layout, leaves, _DTYPES[dtype])
    if is_first():
        with replacing_model(Path(path), in_place=in_place, with_text=write_more is not None) as folder:
            for name, content in {"config.json": config, "generation_config.json": generation}.items():
                (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _write_weights(folder, tensors, _plan_files(family, layout, leaves, _DTYPES[dtype], shard_bytes))
            if write_more is not None:
                write_more(folder)
    else:
        for _ in tensors:  # fetching shards takes all hosts
            pass
    barrier(f"saved {Path(path).name}")  # whose directory may differ between processes


def _fold_score_bias(leaves: Leaves) -> Leaves:
    """A bias along the kernel, added to the final norm's, raises every score alike: b k / |k|^2.

    transformers' head has none: where the norm has none, or of an ensemble, ours is score.bias, which it ignores.
    """
    kernel, bias = (to_host(leaves[name]).astype(np.float64) for name in ("score/kernel", "score/bias"))
    if bias == 0 or ("final_norm/bias" in leaves and kernel.any()):
        leaves = dict(leaves)
        del leaves["score/bias"]
        if bias != 0:
            shift = kernel * bias / (kernel @ kernel)
            leaves["final_norm/bias"] = (to_host(leaves["final_norm/bias"]) + shift).astype(np.float32)
    return leaves


def _token_ids(
    family: Family, eos_ids: Sequence[int], pad_id: int | None, base: ConfigJson, *, score_head: bool
) -> ConfigJson:
    eos, pad = [int(token) for token in eos_ids], base.get("pad_token_id") if pad_id is None else int(pad_id)
    if score_head and pad in eos:
        pad = None  # transformers would take the score before the stop token; without padding it refuses batches
    stop = eos[0] if len(eos) == 1 else eos or None
    bos = base.get("bos_token_id")
    bos = family.defaults.get("bos_token_id") if bos is None else bos  # transformers wants one in some families
    return {"bos_token_id": bos, "eos_token_id": stop, "pad_token_id": pad}


def _generation(base: ConfigJson, tokens: ConfigJson) -> ConfigJson:
    """generation_config.json; that of the base may begin with another token than its config.json, or with none."""
    given = {key: ids for key, ids in tokens.items() if ids is not None and not (base and key == "bos_token_id")}
    return base | given


def hf_tensors(family: Family, layout: Layout, leaves: Leaves, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Stored names and arrays, one layer or expert of a leaf at a time; scalar heads stay float32."""
    for path, leaf in leaves.items():
        by_place: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for name, (tensor, place) in _names(family, layout, [path]).items():
            by_place.setdefault(place, []).append((name, tensor))
        for place, named in by_place.items():
            if place and place[1:] in ((), (0,)):  # a layer, on the devices
                layer = leaf[place[0]]
            array = to_host(layer[place[1:]] if place else leaf)
            for name, tensor in named:
                stored = np.empty(layout.stored_shape(tensor), np.float32 if path in FLOAT32 else dtype)
                for piece, within in layout.views(tensor, stored):
                    piece[...] = array[within]
                yield name, stored


def _plan_files(family: Family, layout: Layout, leaves: Leaves, dtype: np.dtype, shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of every file, in the order in which they are made."""
    files, size = [[]], 0  # type: tuple[list[list[str]], int]
    for path in leaves:
        entries = _names(family, layout, [path])
        for name in sorted(entries, key=lambda name: entries[name][1]):
            added = math.prod(layout.stored_shape(entries[name][0])) * dtype.itemsize
            if files[-1] and size + added > shard_bytes:
                files.append([])
                size = 0
            files[-1].append(name)
            size += added
    return files


def _write_weights(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], files: list[list[str]]) -> None:
    where: dict[str, str] = {}
    total = 0
    for number, names in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        held = dict(itertools.islice(tensors, len(names)))
        where |= dict.fromkeys(held, file)
        total += sum(array.nbytes for array in held.values())
        save_file(held, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # save_file makes it private
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
