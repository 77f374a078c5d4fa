"""`rlhf-jax inspect` and `rlhf-jax convert`: a model looked at, or written in another form."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import cli, reward
from rlhf_jax.config import (
    ArchConfig,
    ConvertArgs,
    InspectArgs,
    MeshConfig,
    ModelConfig,
    RopeScaling,
    no_code_below,
)
from rlhf_jax.config.functions import replace
from rlhf_jax.config.rules import Rules, parse_rules
from rlhf_jax.data.loading import load_rows
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError, reason, tell
from rlhf_jax.hosts import buckets
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.copies import upload_model
from rlhf_jax.hosts.files import check_writable, written
from rlhf_jax.hosts.outputs import keeping
from rlhf_jax.models import Model, hf
from rlhf_jax.models.cache import column_bytes, state_bytes
from rlhf_jax.models.hf import hub
from rlhf_jax.models.hf.config_json import find_family, understood
from rlhf_jax.models.hf.directory import ADAPTER
from rlhf_jax.models.hf.family import ConfigJson
from rlhf_jax.models.hf.layout import flattened, leaf_shapes
from rlhf_jax.models.kernels import Quantization, quantized
from rlhf_jax.models.loading import load_tokenizer, padded, same_ids, tokenizer_in
from rlhf_jax.models.lora import adapter_shapes, sites
from rlhf_jax.runs.checkpoint import Checkpoints, damage
from rlhf_jax.runs.directory import CHECKPOINTS, RECORD, SUMMARY, read_record, read_summary
from rlhf_jax.runs.push import check_repository, model_card, push
from rlhf_jax.sharding import make_mesh, mesh_sizes, shard_shape
from rlhf_jax.training.supervised import examples_of
from rlhf_jax.types import Params

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
MASTER, ADAM, GRADIENT, COPY = 4, 8, 4, 2
"""Bytes per parameter: float32 weights, Adam's two moments, the gradient, a bfloat16 copy for decoding."""

LORA_RANK = 16

ONLINE = ("ppo", "grpo", "rloo", "reinforce_pp", "distill")
"""Stages whose state has the policy's parameters beside others."""

WHOLE = ("config.json", ADAPTER)
"""Files that make a directory one of a model, or of an adapter."""

PARTIAL = (("lora", "rank"), ("ppo", "trainable_layers"))
"""Settings with which a checkpoint holds a part of the model."""


def size(num_bytes: float) -> str:
    """Bytes in the unit that reads best."""
    power = min(int(math.log(max(num_bytes, 1), 1024)), len(UNITS) - 1)
    return f"{num_bytes / 1024**power:.4g} {UNITS[power]}"


def frozen_bytes(arch: ArchConfig, how: Quantization) -> int:
    """Bytes of a frozen base as it is stored: kernels in codes with their scales, the rest in float32."""
    base = jax.eval_shape(lambda: quantized(Model(arch).init(jax.random.key(0)), how))
    return sum(math.prod(x.shape) * jax.dtypes.itemsize_bits(x.dtype) // 8 for x in jax.tree.leaves(base))


def memory(arch: ArchConfig, count: int, batch: int, length: int) -> list[tuple[str, float]]:
    """What the stages hold beside activations, all devices together."""
    trained = count * (MASTER + ADAM + GRADIENT)
    cache = batch * (length * column_bytes(arch, COPY) + state_bytes(arch, COPY))
    shapes = adapter_shapes(arch, sites(find_family(arch)), LORA_RANK)
    adapters = sum(math.prod(shape) for shape in shapes.values()) * (MASTER + ADAM + GRADIENT)
    return [
        ("SFT or reward model: weights, Adam, gradient", trained),
        ("PPO: policy and critic trained, reference and reward model kept", 2 * trained + 2 * count * MASTER),
        ("GRPO, RLOO: no critic, reference and reward model kept", trained + 2 * count * MASTER),
        ("PPO, critic on the policy's trunk, Python reward", trained + count * MASTER),
        *(
            (f"SFT with LoRA of rank {LORA_RANK}, base in {'float32' if how == 'none' else how}", base + adapters)
            for how in ("none", "int8", "nf4")
            for base in [frozen_bytes(arch, how)]
        ),
        (f"rollout: bfloat16 copy and KV cache of {batch} x {length} tokens", count * COPY + cache),
    ]


def special_tokens(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Lines on the tokenizer: its size, special ids and template."""
    text = tokenizer.hf.convert_ids_to_tokens
    bos = "none" if tokenizer.bos_id is None else f"{tokenizer.bos_id} {text(tokenizer.bos_id)!r}"
    note = "" if tokenizer.hf.pad_token_id is not None else " (it has none; a stop id fills in)"
    template = "yes" if tokenizer.hf.chat_template else "none; messages become a Human/Assistant transcript"
    return [
        ("tokenizer", f"{type(tokenizer.hf).__name__}, {tokenizer.vocab_size:,} ids"),
        ("begin", bos),
        ("stop", ", ".join(f"{i} {text(i)!r}" for i in tokenizer.eos_ids)),
        ("pad", f"{tokenizer.pad_id} {text(tokenizer.pad_id)!r}{note}"),
        ("chat template", template),
    ]


def describe(arch: ArchConfig) -> str:
    """What sets the model apart, in words."""
    plain, words = ArchConfig(), []
    skip = {"vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_width", "init_std"}
    for field in dataclasses.fields(arch):
        value = getattr(arch, field.name)
        if field.name in skip or value == getattr(plain, field.name):
            continue
        if field.name == "rope_scaling":
            value = f"{value.kind} x{value.factor:g}"
        elif field.name in ("window_layers", "nope_layers", "delta_layers"):
            value = f"{len(value)} of {arch.num_layers}"
        words.append(field.name if value is True else f"{field.name} {value}")
    return ", ".join(words)


def layout_table(shapes: dict[str, tuple[int, ...]], sizes: dict[str, int], rules: Rules) -> list[str]:
    """One line for every parameter: shape, mesh axes, bytes of its float32 shard on a device; and sums."""
    rows, total = [("parameter", "shape", "sharded over", "bytes per device")], 0
    for name, shape in shapes.items():
        splits = rules.of(name, shape)
        held = math.prod(shard_shape(name, shape, splits, sizes)) * MASTER
        total += held
        axes = ", ".join("+".join(split) or "-" for split in splits) or "-"
        rows.append((name, " x ".join(map(str, shape)) or "scalar", axes, size(held)))
    rows.append(("sum", "", "", size(total)))
    rows.append(("with Adam and gradient", "", "", size(total * (MASTER + ADAM + GRADIENT) // MASTER)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def run_inspect(config: InspectArgs) -> dict[str, Any]:
    """Print what the model is, what it costs in training and rollout, and its tokenizer; returned as a dict too."""
    path = Path(hub.local_directory(config.model))
    arch, raw = hf.read_config(path)
    weights = path.is_dir() and (any(path.glob("*.safetensors")) or any(path.glob("*.index.json")))
    named = (raw.get("architectures") or [""])[0]
    score_head = hf.has_score_head(path) if weights else named.endswith("SequenceClassification")
    members = hf.members_of(path) if score_head and path.is_dir() else 0
    own = score_head and hf.own_adapters(path)
    shapes = leaf_shapes(arch, score_head=None if own else score_head, members=members)
    count = sum(math.prod(shape) for shape in shapes.values())
    kind = f"scores of {members} members" if members else "scores (reward or value model)"
    kind += " with adapters of their own, beside this trunk" if own else ""
    kind = kind if score_head else "logits (language model)"
    lines = [
        ("model", str(config.model)),
        ("family", f"{raw['model_type']}, {kind}" + ("" if weights else "; no weights here")),
        ("parameters", f"{count:,}"),
        ("shape", f"{arch.num_layers} layers, width {arch.width}, {arch.num_heads} heads of {arch.head_dim} "
                  f"({arch.num_kv_heads} key-value), MLP {arch.ffn_width}"),
        ("vocabulary", f"{arch.vocab_size:,}, head {'tied' if arch.tied_head else 'untied'}"),
        ("features", describe(arch) or "plain Llama"),
    ]  # fmt: skip
    if (tokenizer := tokenizer_in(path)) is not None:
        lines += special_tokens(tokenizer)
    needs = memory(arch, count, config.batch, config.length)
    for name, value in lines:
        tell(f"{name:<15}{value}")
    tell("\nmemory, all devices together, without activations")
    for name, held in needs:
        tell(f"  {size(held):>10}  {name}")
    if config.mesh != MeshConfig():
        sizes = mesh_sizes(config.mesh)
        tell(f"\nmesh {' x '.join(f'{axis} {size}' for axis, size in sizes.items())}")
        tell("\n".join(layout_table(shapes, sizes, parse_rules(config.mesh.rules, expert=config.mesh.expert != 1))))
    return {**dict(lines), "parameters": count, "memory": dict(needs)}


def run_convert(config: ConvertArgs) -> Path:
    """Write the model as the config says, to a directory, a bucket, the Hub, or two of them; returns the directory.

    What goes to a bucket or the Hub alone is made in a directory that is gone once it is there.
    """
    if config.push:
        check_repository(config.push, "push")
    remote, url = in_bucket(config.output), config.output.rstrip("/")
    if remote and not config.overwrite and any(buckets.exists(f"{url}/{name}") for name in WHOLE):
        raise UserError(f"output {config.output} holds a model; give --overwrite true to replace it")
    with tempfile.TemporaryDirectory(prefix="rlhf-jax-") as place:
        away = remote or not config.output
        target = Path(f"{place}/model" if away else config.output)
        dtype = convert(config, target)
        with keeping(Path(place), Path(place).parent, f"output {url}") if away else contextlib.nullcontext():
            if remote:
                upload_model(target, url)
                tell(f"wrote {config.output}: {dtype}")
            if config.push:
                push(target, config.push, _card(config, dtype), "give the same command again")
    return target


def _card(config: ConvertArgs, dtype: str) -> str:
    """The card of a model that was converted, of a run's with what its record and summary say."""
    for run in (Path(config.model), Path(config.model).parent):
        if (record := read_record(run)) is not None and record["stage"]:
            summary = read_summary(run, "--run.overwrite true") if (run / SUMMARY).is_file() else {}
            return model_card(config.push, record["stage"], record["config"], {**summary, "step": record["step"]})
    return model_card(config.push, "convert", {"model": {"path": config.model}, "dtype": dtype}, {})


def convert(config: ConvertArgs, target: Path) -> str:
    """Write the model as the config says to a directory; returns the dtype of its weights."""
    source = Path(hub.local_directory(config.model))
    if target.exists() and not target.is_dir():
        raise UserError(f"output {target} is a file; name a directory")
    check_writable(target.parent, f"output {target}")
    if any((target / name).exists() for name in WHOLE) and not config.overwrite:
        raise UserError(f"output {target} holds a model; give --overwrite true to replace it")
    of_run = (source / CHECKPOINTS).is_dir()
    dtype = config.dtype if config.dtype != "auto" else "float32" if of_run else "bfloat16"
    if of_run:
        model = _of_checkpoint(source, config.step)
    elif config.step:
        raise UserError(f"step {config.step} is asked for, but {source} has no checkpoints; leave step out")
    else:
        model = _of_directory(source, "float32" if config.average else dtype)
    if config.average:
        model = averaged(model, config)
    arch, params, tokenizer, pad_id = model.arch, model.params, model.tokenizer, model.pad_id
    with written(f"output {target}"):
        if tokenizer and "score" in params:
            arch, params, tokenizer = padded(target, arch, params, tokenizer)
            pad_id = tokenizer.pad_id
        hf.save_model(
            target,
            arch,
            params,
            eos_ids=model.eos_ids,
            pad_id=pad_id,
            score_head="score" in params,
            dtype=dtype,
            base_config=model.raw,
            base_generation=model.generation,
            shard_bytes=int(config.shard_gb * 1e9),
            # Given without a tokenizer as well: that of another model goes, which would be taken for this one's.
            write_more=lambda folder: tokenizer.save(str(folder)) if tokenizer else None,
            in_place=target.resolve() == source.resolve() and not config.average,
        )
    if config.output and Path(config.output) == target:
        tell(f"wrote {target}: {hf.find_family(model.arch, model.raw).model_type} in {dtype}")
    return dtype


class Source(NamedTuple):
    """A model to be written.

    Attributes:
        raw: config.json of the model itself, or of that which its run began with.
        generation: its generation_config.json.
        eos_ids: of the tokenizer, or of config.json where there is none.
        pad_id: of the tokenizer that a run padded by; None for that of config.json.
    """

    arch: ArchConfig
    raw: ConfigJson | None
    params: Params
    tokenizer: Tokenizer | None
    generation: ConfigJson
    eos_ids: Sequence[int]
    pad_id: int | None = None


def _of_directory(source: Path, dtype: str) -> Source:
    arch, raw = hf.read_config(source)
    score_head, folder = hf.has_score_head(source), hf.model_directory(source)
    params = hf.load_params(source, arch, score_head=score_head, dtype=dtype)
    tokenizer = tokenizer_in(source)
    eos = raw.get("eos_token_id")
    stops = [] if eos is None else eos if isinstance(eos, list) else [eos]
    with understood(folder / "config.json"):
        eos_ids = tokenizer.eos_ids if tokenizer else tuple(int(i) for i in stops)
    return Source(arch, raw, params, tokenizer, hf.read_generation(folder), eos_ids)


def averaged(model: Source, config: ConvertArgs) -> Source:
    """The model with the mean of its weights and of those of the directories config.average; equal ones give theirs.

    Raises:
        UserError: a directory of another shape, another kind of head or another tokenizer.
    """
    apart = jax.tree.map(jnp.zeros_like, model.params)
    for path in config.average:
        other = _of_directory(Path(hub.local_directory(path)), "float32")
        shapes = [{name: x.shape for name, x in flattened(one.params).items()} for one in (model, other)]
        names = [field.name for field in dataclasses.fields(ArchConfig)]
        differ = [name for name in names if getattr(model.arch, name) != getattr(other.arch, name)]
        differ += sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()} if not differ else ())
        if differ:
            raise UserError(
                f"average {path}: {', '.join(differ[:3])} is not as in {config.model}; name models of a kind"
            )
        if model.tokenizer and other.tokenizer and not same_ids(model.tokenizer, other.tokenizer):
            raise UserError(f"average {path}: another tokenizer than that of {config.model}; name models of one")
        apart = jax.tree.map(lambda total, x, first: total + (x - first), apart, other.params, model.params)
    count = 1 + len(config.average)
    tell(f"the mean of the weights of {count} models")
    return model._replace(params=jax.tree.map(lambda first, total: first + total / count, model.params, apart))


def _of_checkpoint(run: Path, step: int) -> Source:
    """What a run's checkpoint would be saved as if the run ended there: of PPO and its kin the policy or its average.

    `step` 0 is the newest one, not the best.

    Raises:
        UserError: no such run, it trains a part of the model, or the checkpoint is not there or not intact.
    """
    record = read_record(run)
    if record is None:
        raise UserError(f"{run} holds no run ({RECORD} is missing or broken); `rlhf-jax runs` lists runs")
    stage = record["stage"]
    try:
        told = record["config"]["model"]
        if arch := told.get("arch"):
            arch = ArchConfig(**arch | {"rope_scaling": RopeScaling(**arch["rope_scaling"])})
        settings = ModelConfig(**told | {"arch": arch or None})
    except (KeyError, TypeError) as error:
        raise UserError(f"{run / RECORD} does not say what model the run trains ({reason(error)})") from error
    if any(record["config"].get(group, {}).get(name) for group, name in PARTIAL):
        raise UserError(
            f"{run} trains adapters or top layers alone, which join the rest at its end; `rlhf-jax resume {run}` first"
        )
    with at_home(record):
        base = Path(hub.local_directory(settings.path)).absolute()
        tokens = Path(hub.local_directory(settings.tokenizer, weights=False)).absolute()
    arch, raw = (settings.arch, None) if settings.arch else hf.read_config(base)
    checkpoints = Checkpoints(run / CHECKPOINTS, keep_last=1, keep_every=0)
    # Only looked at: the run may still be writing there.
    steps = checkpoints.steps()
    if step and step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}, but of {', '.join(map(str, steps)) or 'none'}")
    tried = [step] if step else reversed(steps)
    chosen = next((each for each in tried if not damage(checkpoints.path(each))), None)
    if chosen is None:
        raise UserError(f"{run} has no intact checkpoint yet; wait for one, or let checkpoint.minutes be less")
    members = record["config"]["reward"].get("members", 1) if stage == "reward" else 1
    model = Model(arch, score_head=stage == "reward", members=members if members > 1 else 0)
    # As the stages keep them: LoopState.tree, and the state of `loop.train`.
    place = ["average"] if record["config"].get(stage, {}).get("ema_decay") else ["state", "params"]
    dtype = "float32" if place == ["average"] else settings.param_dtype
    params = jax.jit(lambda: model.init(jax.random.key(0), dtype))()  # where the saved ones go
    place += ["policy"] if stage in ONLINE and place[0] == "state" else []
    tree = checkpoints.restore(chosen, functools.reduce(lambda node, name: {name: node}, reversed(place), params))
    params = functools.reduce(lambda node, name: node[name], place, tree)
    tell(f"{run}: checkpoint of step {chosen}" + (", the average" if place == ["average"] else ""))
    tokenizer = load_tokenizer(replace(settings, path=str(base), tokenizer=str(tokens) if settings.tokenizer else ""))
    if stage == "reward":
        params = _normalised(run, record, model, params, tokenizer)
    generation = hf.read_generation(base) if settings.path else {}
    return Source(arch, raw, params, tokenizer, generation, tokenizer.eos_ids, tokenizer.pad_id)


def at_home(record: dict[str, Any]) -> contextlib.chdir[str]:
    """The working directory of a run, from which its paths are told, if this machine has it."""
    return contextlib.chdir(record["cwd"] if Path(record["cwd"]).is_dir() else ".")


def _normalised(run: Path, record: dict[str, Any], model: Model, params: Params, tokenizer: Tokenizer) -> Params:
    """The parameters of a reward model with the head that the run would save, by scores of its training rows."""
    config = cli.parse("reward", ["--config", str((run / "config.yaml").absolute())])
    if config.reward.normalize != "off" and "rows" in record["given"]:
        tell(f"{run}: its rows came from Python, so the head is as trained, not normalised")
        return params
    model = replace(model, length=config.data.max_length)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])  # where the parameters are
    with no_code_below(run), at_home(record), jax.set_mesh(mesh.grid):
        split = load_rows(config.data, None, None, config.run.seed)
        config = replace(config, reward__comparisons=reward.kind_of_rows(config.reward, split[0]))
        train_set, _, collate, _ = examples_of(reward.task_of(config), config.data, tokenizer, *split)
        return reward.as_saved(config, model, params, params, mesh, train_set, collate)
