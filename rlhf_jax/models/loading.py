"""Models and tokenizers of a config, on the mesh; and back to a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from rlhf_jax.config import ArchConfig, LoRAConfig, ModelConfig
from rlhf_jax.config.functions import replace
from rlhf_jax.data.padding import with_own_padding
from rlhf_jax.data.tokenizer import FILES, Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.hosts.buckets import in_bucket
from rlhf_jax.hosts.processes import say, to_host
from rlhf_jax.keys import Purpose, branch
from rlhf_jax.models import Model, hf
from rlhf_jax.models.hf import hub, peft
from rlhf_jax.models.hf.family import ConfigJson
from rlhf_jax.models.kernels import joined, quantized
from rlhf_jax.models.lora import init_adapters, scale_of, sites
from rlhf_jax.sharding import Mesh, placed, replicated, tree_shardings
from rlhf_jax.types import Params

Head = Literal["vocabulary", "trained", "normal", "zeros"]
"""That of a language model, or the scalar one of a directory, or a fresh scalar one, drawn or zero."""
OF_MEMBERS = "members"
"""Where in a model directory the adapters and heads of an ensemble's members lie."""


@dataclass(frozen=True)
class Loaded:
    """A model, its parameters on the mesh, and the config.json and generation_config.json that it came from.

    Attributes:
        params: all parameters; of a model with a frozen base, its adapters and heads.
        frozen: that base, never changed and never copied.
        lora: the settings of the adapters; None without any.
        path: the directory that the model was read from.
    """

    model: Model
    params: Params
    base_config: ConfigJson | None = None
    base_generation: ConfigJson | None = None
    frozen: Params | None = None
    lora: LoRAConfig | None = None
    path: str = ""

    def whole(self, params: Params) -> Params:
        """All parameters of the model whose trained ones are `params`; no array is copied."""
        return joined(self.frozen, params)


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer that the config names, or the model directory's own."""
    path = config.tokenizer or config.path
    if not path:
        raise UserError("model.tokenizer and model.path are both empty; give one of them")
    directory = hub.local_directory(path, weights=False)
    return tokenizer_in(directory, config.eos_ids) or Tokenizer.load(str(hf.model_directory(directory)))


def tokenizer_in(path: str | Path, eos_ids: Sequence[int] = ()) -> Tokenizer | None:
    """The tokenizer of a directory, of an adapter its own or else that of its model, by whose files texts end."""
    folders = hf.layers_of(path)
    own = next((folder for folder in folders if any((folder / name).is_file() for name in FILES)), None)
    return None if own is None else Tokenizer.load(str(own), tuple(eos_ids), folders[-1])


def check_vocabulary(arch: ArchConfig, tokenizer: Tokenizer, what: str) -> None:
    """Raise a UserError unless every id of the tokenizer has a row in the embedding."""
    if tokenizer.vocab_size > arch.vocab_size:
        raise UserError(
            f"{what}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {arch.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def check_same_tokenizer(tokenizer: Tokenizer, path: str, what: str) -> None:
    """Raise a UserError if the directory, that of `what`, holds a tokenizer that maps text to other ids.

    Says if its chat template is another one.
    """
    own = tokenizer_in(hub.local_directory(path, weights=False))
    if own is None:
        return
    if not same_ids(own, tokenizer):
        raise UserError(f"{what} {path} has another tokenizer than the policy; give one that has the policy's")
    if own.hf.chat_template != tokenizer.hf.chat_template:
        say(f"! {what} {path} has another chat template than the policy, and reads messages in the policy's")


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether ids mean the same to two tokenizers; a token for padding may be one's own, as a reward model's is."""
    theirs, ours = a.hf.get_vocab(), b.hf.get_vocab()
    own = {a.hf.pad_token, b.hf.pad_token} & (theirs.keys() ^ ours.keys())
    return not dict(theirs.items() ^ ours.items()).keys() - own


def check_balance(config: ModelConfig, arch: ArchConfig) -> None:
    """Raise a UserError if a model without experts is to balance their load."""
    if config.balance_coef and not arch.num_experts:
        raise UserError(
            f"model.balance_coef {config.balance_coef:g} is of models with experts, and this one has none; set it to 0"
        )


def check_targets(config: ModelConfig, lora: LoRAConfig, arch: ArchConfig) -> None:
    """Raise a UserError if adapters are to go on layers that the model lacks."""
    if lora.rank:
        base = hf.read_config(hub.local_directory(config.path))[1] if config.path else None
        sites(hf.find_family(arch, base), lora.targets)


def check_length(arch: ArchConfig, length: int, what: str) -> None:
    """Raise a UserError if sequences of `length` tokens, named by `what`, exceed the model's positions."""
    if length > arch.max_positions:
        cure = "sampling.max_new_tokens" if "sampling.max_new_tokens" in what else "it"
        raise UserError(f"{what} {length} is more than the model's {arch.max_positions} positions; lower {cure}")


def arch_of(config: ModelConfig) -> ArchConfig:
    """The shape of the model that `load_model` would load.

    Raises:
        UserError: neither path nor arch, or both; or the directory does not say.
    """
    if config.path and config.arch is not None:
        raise UserError("model.path and model.arch are both given; leave one out (--model.arch null undoes a file's)")
    if not config.path and config.arch is None:
        raise UserError("model.path and model.arch are both empty; give a Hugging Face directory or a shape")
    return hf.read_config(hub.local_directory(config.path))[0] if config.arch is None else config.arch


def check_model(config: ModelConfig, length: int, what: str, *, head: Head = "vocabulary") -> None:
    """Raise the UserError of `load_tokenizer`, `load_model` and a `check_length` that names the length by `what`.

    As far as config.json and the headers of files tell: so hours of work do not come before what could have been said.
    """
    tokenizer, arch = load_tokenizer(config), arch_of(config)
    path = _checked(config, head) if config.path else ""
    check_length(arch, length, f"{config.path or 'model.arch'}: {what}")
    check_vocabulary(arch, tokenizer, config.path)
    if path:
        hf.check_params(path, arch, score_head=None if hf.own_adapters(path) else head == "trained")


def load_model(
    config: ModelConfig,
    mesh: Mesh,
    key: jax.Array,
    *,
    head: Head = "vocabulary",
    lora: LoRAConfig = LoRAConfig(),  # noqa: B008 (it is frozen)
    length: int = 0,
    members: int = 0,
    own_adapters: bool = False,
) -> Loaded:
    """The model of a directory, or one with random weights in the shape config.arch, placed on the mesh.

    `head` asks for a policy (vocabulary), or a scalar model whose head is the directory's trained one or a fresh one.
    With adapters (lora.rank) all else but the head is frozen. `length` is that of the run's longest sequence, prompt
    and response together (`Model.length`), `key` that of the weights (`keys.branch`). `members` is of a fresh head
    (`Model.members`); a trained one has its own. With `own_adapters` so are the adapters.

    Raises:
        UserError: neither path nor arch, or both; whatever is wrong with the directory; or a shape that no Hugging
            Face family can hold.
    """
    arch = arch_of(config)
    if head == "trained" and not config.path:
        raise UserError("a trained score head was asked for, but model.path is empty; name a reward model's directory")
    load = partial(_load_directory, config) if config.path else partial(_random, config, arch)
    loaded = load(mesh, key, head, members)
    own = own_adapters or loaded.model.own_adapters
    loaded = replace(loaded, model__length=length, model__own_adapters=own)
    if config.quantize != "none":
        small = quantized(loaded.params, config.quantize, free=True)
        loaded = replace(loaded, params=jax.device_put(small, tree_shardings(mesh, small)))
    return adapted(loaded, lora, mesh, key)


def _random(config: ModelConfig, arch: ArchConfig, mesh: Mesh, key: jax.Array, head: Head, members: int) -> Loaded:
    hf.find_family(arch)  # what could not be saved is refused before it is trained
    model = Model.from_config(config, arch, mesh.rules, score_head=head != "vocabulary", members=members)

    def init(key: jax.Array) -> Params:
        params = model.init(key, config.param_dtype)
        return {**params, "score": model.init_score(key, zeros=True)} if head == "zeros" else params

    return Loaded(model, placed(mesh, init, key))


def _checked(config: ModelConfig, head: Head) -> str:
    """Where the config's directory lies on this machine; a UserError if it is to be of a language model and is not."""
    path = hub.local_directory(config.path)
    if head == "vocabulary" and hf.has_score_head(path):
        raise UserError(f"{config.path} is a reward or value model; give a language model")
    return path


def _load_directory(config: ModelConfig, mesh: Mesh, key: jax.Array, head: Head, members: int) -> Loaded:
    path = _checked(config, head)
    arch, base = hf.read_config(path)
    hf.find_family(arch, base)
    score_head = {"vocabulary": False, "trained": True}.get(head)
    if score_head and hf.own_adapters(path):
        return _load_members(config, Path(path), mesh)
    members = hf.members_of(path) if score_head else members
    params = hf.load_params(path, arch, score_head=score_head, mesh=mesh, dtype=config.param_dtype)
    model = Model.from_config(config, arch, mesh.rules, score_head=head != "vocabulary", members=members)
    if score_head is None:
        score = jax.jit(partial(model.init_score, zeros=head == "zeros"), out_shardings=replicated(mesh))(key)
        params = model.with_score(params, score)
    return Loaded(model, params, base, hf.read_generation(path), path=config.path)


def _load_members(config: ModelConfig, path: Path, mesh: Mesh) -> Loaded:
    """A reward ensemble of adapters on one trunk, as `save_model` writes it to `path`."""
    (arch, base), members = hf.read_config(path), hf.members_of(path)
    trunk = hf.load_params(path, arch, score_head=None, mesh=mesh, dtype=config.param_dtype)
    where = config.path if in_bucket(config.path) else str(path)
    folders = [Path(hub.local_directory(f"{where}/{OF_MEMBERS}/{i}")) for i in range(members)]
    lora, own = peft.load_members(folders, arch, hf.find_family(arch, base), mesh)
    model = Model.from_config(config, arch, mesh.rules, score_head=True, members=members, own_adapters=True)
    model = replace(model, lora_scale=scale_of(lora))
    return Loaded(model, joined(trunk, own), base, hf.read_generation(path), path=config.path)


def adapted(loaded: Loaded, lora: LoRAConfig, mesh: Mesh, key: jax.Array, purpose: Purpose = "adapters") -> Loaded:
    """The model frozen, with adapters and its score head to train; as it is if lora.rank is 0.

    Of an abstract key, the shapes of that.
    """
    if not lora.rank:
        return loaded
    arch, members = loaded.model.arch, loaded.model.members if loaded.model.own_adapters else 0
    if members and arch.num_experts:
        raise UserError("reward.member_adapters: of a model with experts members cannot have any; leave it out")
    chosen = sites(hf.find_family(arch, loaded.base_config), lora.targets)

    def init(key: jax.Array) -> Params:
        fresh = partial(init_adapters, arch, chosen, lora.rank)
        return jax.vmap(fresh)(jax.random.split(key, members)) if members else fresh(key)

    adapters = placed(mesh, lambda key: init(branch(key, purpose)), key)
    heads = {name: tree for name, tree in loaded.params.items() if name == "score"}
    base = {name: tree for name, tree in loaded.params.items() if name != "score"}
    model = replace(loaded.model, lora_scale=scale_of(lora))
    return replace(loaded, model=model, params={**adapters, **heads}, frozen=base, lora=lora)


def save_model(path: Path, loaded: Loaded, params: Params, tokenizer: Tokenizer) -> None:
    """A Hugging Face directory with the tokenizer, written by process 0; all processes call it.

    With adapters, `params` are these and the head: the model is saved with them merged, and `adapter` in it is a
    directory that PEFT loads. Where each member of an ensemble has its own, the model is their trunk alone, and
    `members/0` and so on are such directories.
    """
    model, lora = loaded.model, loaded.lora
    arch, trained = model.arch, to_host(params) if lora else {}  # takes all processes
    members = model.members if model.own_adapters else 0
    whole = loaded.frozen if members else loaded.whole(params)
    whole = params if loaded.frozen is None else model.merged(whole)
    if model.score_head:
        arch, whole, tokenizer = padded(path, arch, whole, tokenizer)

    def write_more(folder: Path) -> None:
        tokenizer.save(str(folder))
        if lora is not None:
            family = hf.find_family(model.arch, loaded.base_config)
            own = [(f"{OF_MEMBERS}/{i}", jax.tree.map(lambda x, i=i: x[i], trained)) for i in range(members)]
            for name, tree in own or [("adapter", trained)]:
                peft.save_adapter(folder / name, model.arch, family, lora, tree, base=loaded.path)

    hf.save_model(
        path,
        arch,
        whole,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        score_head=model.score_head,
        base_config=loaded.base_config,
        base_generation=loaded.base_generation,
        write_more=write_more,
        trunk_of=members,
    )


def padded(path: Path, arch: ArchConfig, params: Params, tokenizer: Tokenizer) -> tuple[ArchConfig, Params, Tokenizer]:
    """A model that scores and its tokenizer as they are saved in `path`: padding is a token of its own.

    Where no id is free for that, the embedding gets more rows.
    """
    own, rows = with_own_padding(tokenizer, arch.vocab_size)
    if own.pad_id != tokenizer.pad_id:
        more = f", with {rows - arch.vocab_size} more rows of the embedding" if rows > arch.vocab_size else ""
        say(
            f"{path}: padding is {own.hf.pad_token} ({own.pad_id}){more}; the tokenizer's {tokenizer.pad_id} ends "
            "responses, and transformers reads a score at the last token that is no padding"
        )
    if rows > arch.vocab_size:
        embed = {name: to_host(params["embed"][name]) for name in ("tokens", "by_layer") if name in params["embed"]}
        zeros = {name: np.zeros((rows - len(table), *table.shape[1:]), table.dtype) for name, table in embed.items()}
        wide = {name: np.concatenate([table, zeros[name]]) for name, table in embed.items()}
        arch, params = replace(arch, vocab_size=rows), {**params, "embed": {**params["embed"], **wide}}
    return arch, params, own
