"""The decoder as pure functions over a plain nested dict of arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import ArchConfig, ModelConfig
from rlhf_jax.config.rules import FLOAT32, Rules, over_tensor
from rlhf_jax.models import cache as cached
from rlhf_jax.models import decoder, vocabulary
from rlhf_jax.models.attention import REMAT, Attend, group_attention, platform_attention, platform_dtype
from rlhf_jax.models.cache import Cache, Columns
from rlhf_jax.models.decoding import unstacked
from rlhf_jax.models.delta import Path
from rlhf_jax.models.experts import Routing
from rlhf_jax.models.kernels import STACKS, Chained, attached, chained, stacks, stacks_of
from rlhf_jax.models.norms import Norm
from rlhf_jax.models.pure import Pure, pure
from rlhf_jax.models.rotary import BY_LENGTH, Tables
from rlhf_jax.models.stacking import cut, interleaved, runs_of, scanned
from rlhf_jax.models.views import Kind, kinds_of, scale_of, tables_of, views_of
from rlhf_jax.sharding import constrain_in_turn, constrain_rows, data_ways, looked_up, path_name
from rlhf_jax.tokens import token_logprobs
from rlhf_jax.types import Params

_M = TypeVar("_M")
Kept = dict[bool, Columns]
"""Keys and values of the last layer so far with the window, and without, that layers above may see."""


@dataclass(frozen=True)
class Model:
    """A decoder with a vocabulary head (policy, reference) or a scalar head (reward, value).

    Every method is a pure function of its arguments; parameters are a nested dict with layers stacked on a leading L.

    Attributes:
        arch: the shape.
        score_head: scalar head instead of vocabulary head.
        members: scalar heads of an ensemble on this trunk, on a last axis of scores; 0 is a single one without.
        own_adapters: every member has adapters of its own, too, a and b with a first axis of members (`members`).
        compute_dtype: dtype of activations (float32 or bfloat16).
        remat: none, dots or full.
        logprob_chunk: positions of a device whose logits are alive at once.
        attention: plain, blockwise, splash (TPU), splash_interpret or cudnn (GPU); decoding a token is always plain.
        lora_scale: factor of the adapters that lie beside kernels, if any do (`kernels`).
        length: tokens of the longest sequence of the run, prompt and response together. It alone decides a rotary law
            that depends on length (dynamic, longrope), so that samples, log-probs and scores of a run have one law; 0
            takes the width of the arrays.
        rules: where parameters lie on the mesh that it runs on (`Mesh.rules`); activations are pinned by it.
        balance_coef: weight of the load-balancing loss of experts (`experts.balanced`).
    """

    arch: ArchConfig
    score_head: bool = False
    compute_dtype: jnp.dtype = jnp.dtype("float32")  # noqa: RUF009
    remat: str = "none"
    logprob_chunk: int = 512
    attention: str = "plain"
    lora_scale: float = 1.0
    length: int = 0
    rules: Rules = field(default_factory=Rules)
    members: int = 0
    own_adapters: bool = False
    balance_coef: float = 0.0

    @classmethod
    def from_config(
        cls, config: ModelConfig, arch: ArchConfig, rules: Rules, *, score_head: bool = False, **more: Any
    ) -> Model:
        """The model that `config` describes, of a shape and with a mesh of these rules; `more`: other attributes."""
        dtype, kind = platform_dtype(config.compute_dtype), platform_attention(config.attention)
        chunk, coef = config.logprob_chunk, config.balance_coef if arch.num_experts else 0.0
        return cls(arch, score_head, dtype, config.remat, chunk, kind, rules=rules, balance_coef=coef, **more)

    @cached_property
    def _embed(self) -> Pure:
        return pure(lambda rngs: decoder.Embedding(self.arch, rngs=rngs))

    @cached_property
    def _sorts(self) -> list[tuple[str, bool]]:
        """Of every layer, what mixes tokens, and whether it has experts."""
        dense = self.arch.num_layers - self.arch.expert_layers
        return [(mixer, i >= dense) for i, mixer in enumerate(self.arch.mixers)]

    @cached_property
    def _blocks(self) -> dict[tuple[str, bool], Pure]:
        """The layer of each of these sorts."""
        made = lambda mixer, sparse: pure(lambda rngs: decoder.Block(self.arch, mixer, sparse=sparse, rngs=rngs))  # noqa: E731
        return {sort: made(*sort) for sort in dict.fromkeys(self._sorts)}

    @cached_property
    def _norm(self) -> Pure:
        return pure(lambda _: Norm(self.arch, (self.arch.width,), centered=self.arch.norm != "rms"))

    @cached_property
    def _head(self) -> Pure:
        return pure(lambda rngs: decoder.VocabularyHead(self.arch, rngs=rngs))

    def init(self, key: Array, dtype: str = "float32") -> Params:
        """Fresh parameters in `dtype` or, of `FLOAT32`, in that; the layers come from one vmapped trace by mixer."""
        embed, layers, norm, head = jax.random.split(key, 4)
        keys, sorts = jax.random.split(layers, self.arch.num_layers), self._sorts
        of = lambda sort: keys[np.array([i for i, other in enumerate(sorts) if other == sort])]  # noqa: E731
        made = {sort: jax.vmap(block.init)(of(sort)) for sort, block in self._blocks.items()}
        params = {
            "embed": self._embed.init(embed),
            "layers": interleaved(made, sorts),
            "final_norm": self._norm.init(norm),
        }
        if not self.score_head and (self.arch.head_bias or not self.arch.tied_head):
            params["head"] = self._head.init(head)
        params |= {"score": self.init_score(head, zeros=False)} if self.score_head else {}
        typed = lambda path, x: x if path_name(path) in FLOAT32 else x.astype(dtype)  # noqa: E731
        return jax.tree_util.tree_map_with_path(typed, params)

    def init_score(self, key: Array, *, zeros: bool) -> Params:
        """A fresh scalar head, float32: kernel [D], bias []; of an ensemble [E, D], [E]."""
        return pure(lambda rngs: decoder.ScoreHead(self.arch, zeros=zeros, members=self.members, rngs=rngs)).init(key)

    def with_score(self, params: Params, score: Params) -> Params:
        """The parameters of a scalar model on the trunk of `params`."""
        return {**{name: tree for name, tree in params.items() if name != "head"}, "score": score}

    def split(self, params: Params, top: int) -> Params:
        """The same parameters with all but the `top` layers in "lower/layers"."""
        at, mixers, layers = self.arch.num_layers - top, self.arch.mixers, params["layers"]
        lower, upper = cut(layers, mixers, 0, at), cut(layers, mixers, at, len(mixers))
        return {**params, "lower": {"layers": lower}, "layers": upper}

    def _views(
        self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"], branches: Int[Array, "B T"] | None = None
    ) -> dict[Kind, tuple[Tables | None, Attend | Path]]:
        return views_of(self.arch, self.attention, self.length, self._over("K"), positions, segment_ids, branches)

    def _over(self, letter: str) -> str | None:
        """The mesh axis that an axis of activations is split over, beside rows."""
        return over_tensor(self.rules.letters[letter])

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        branches: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Final hidden states; a token sees itself and what is before it in its own segment. 0 marks padding.

        Of a segment with `branches` it sees what is of branch 0 or of its own; positions go on from branch 0 in each.
        """
        return self.forward(params, tokens, positions, segment_ids, branches)[0]

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        branches: Int[Array, "B S"] | None = None,
        experts: Int[Array, "B S L k"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Routing | None]:
        """`apply`, and what its routers did if it has any; tokens go to `experts` where these are given, not -1."""
        embed = lambda *ids: self._embed.apply(params["embed"], *ids, self.compute_dtype)  # noqa: E731
        x, own = looked_up(self.rules, "embed/tokens", embed, tokens, positions)
        own = None if own is None else jnp.moveaxis(own, 2, 0)  # [L, B, S, I]
        views, kinds = self._views(positions, segment_ids, branches), kinds_of(self.arch)

        def block(kind: Kind, x: Array, params: Params, given: Array | None, own: Array | None, kept: Kept) -> Any:
            in_turn = lambda path, x: constrain_in_turn(self.rules, f"layers/{path_name(path)}", x)  # noqa: E731
            layer = attached(jax.tree_util.tree_map_with_path(in_turn, params), self.lora_scale)
            block = self._blocks[kind.mixer, "experts" in params]
            of_lower = kept.get(kind.local)
            return block.apply(layer, x, *views[kind], of_lower, None, segment_ids > 0, given, own)  # x [B, S, D]

        # One layer of every kind is compiled, and scanned over the stacked leaves [L, ...] beside its kind int[L].
        def layer(keeps: bool, mixer: str, x: Array, params: Params, inputs: Any, kept: Kept) -> tuple[Array, Any]:
            kind, *inputs = inputs
            of_mixer: list[Callable[..., Any]] = [partial(block, kind) for kind in views if kind.mixer == mixer]
            if self.remat != "none" and len(of_mixer) > 1:  # or the switch would store all that a branch computes anew
                of_mixer = [jax.checkpoint(of, policy=REMAT[self.remat]) for of in of_mixer]
            x, columns, routing = jax.lax.switch(kind, of_mixer, x, params, *inputs, kept)
            return constrain_rows(x), (routing, columns if keeps else None)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.remat], static_argnums=(0, 1))
        given = None if experts is None else jnp.moveaxis(experts, 2, 0)
        numbers = [[k for k in views if k.mixer == kind.mixer].index(kind) for kind in kinds]
        first, dense, routings = 0, self.arch.num_layers - self.arch.expert_layers, list[Routing]()
        kept = Kept()
        for stack, mixers in runs_of(params, self.arch):  # one, or cut where layers have other parts or are frozen
            last, keeps = first + len(mixers), first in self.arch.kept_layers
            chosen = None if given is None or "experts" not in stack else given[first - dense : last - dense]
            each = jnp.array(numbers[first:last], jnp.int32), chosen, None if own is None else own[first:last]
            x, (routing, columns) = scanned(partial(layer, keeps, kept=kept), x, stack, mixers, each)
            kept |= {kinds[first].local: jax.tree.map(lambda a: a[0], columns)} if keeps else {}
            first, routings = last, [*routings, *([] if routing is None else [routing])]
        routing = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routings) if routings else None
        return self._norm.apply(params["final_norm"], x), routing

    def project(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32, sharded over the vocabulary."""
        return vocabulary.project(self.arch, params, hidden, self._over("V"))

    def logprobs(
        self,
        params: Params,
        hidden: Float[Array, "B T D"],
        targets: Int[Array, "B T"],
        temperature: Float[Array, ""] | float = 1.0,
        *,
        needed: Bool[Array, "B T"] | None = None,
        kept: Int[Array, "B T K"] | None = None,
        with_entropy: bool = False,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Log-probs in nats of targets[:, t] given hidden[:, t] at a temperature; the entropy if asked, else 0.

        Both are 0 off `needed`, and chunks of positions without any that is needed cost nothing (None: all are). They
        are of the law of the ids `kept`, if these are given (-1: none).
        """
        shards, chunk = math.gcd(data_ways(), len(targets)), self.logprob_chunk
        positions = targets.size // shards if shards == data_ways() else 0  # else as it lies
        read = vocabulary.vocabulary_of(self.arch, params, positions, chunk, shards, self._over("V"))
        return token_logprobs(
            read,
            hidden,
            targets,
            temperature,
            chunk=chunk * read.number,
            needed=needed,
            kept=kept,
            shards=shards,
            with_entropy=with_entropy,
        )

    def next_logprobs(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        temperature: Float[Array, ""] | float = 1.0,
        *,
        needed: Bool[Array, "B S-1"] | None = None,
    ) -> Float[Array, "B S-1"]:
        """Log-probs in nats of tokens[:, 1:], each given those before it in its segment; 0 off `needed`."""
        hidden = self.apply(params, tokens, positions, segment_ids)
        return self.logprobs(params, hidden[:, :-1], tokens[:, 1:], temperature, needed=needed)[0]

    def scores(self, score: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T *E"]:
        """The scalar head `score`, or those of an ensemble, at every position, float32."""
        return pure(lambda rngs: decoder.ScoreHead(self.arch, zeros=True, rngs=rngs)).apply(score, hidden)

    def decoding_params(self, params: Params) -> Params:
        """A copy for decoding: compute dtype, one dict per layer, every weight split over the tensor axis alone.

        Make it once per rollout, not per token: it is here that fsdp shards are gathered, adapters merged and
        quantised kernels made dense. Norms and routers stay as they are: training computes them in float32, too.
        """

        return unstacked(params, self.arch, self.compute_dtype, self.rules, self.lora_scale)

    def merged(self, params: Params) -> Params:
        """The parameters, layers in one stack; adapters are added and kernels made dense when a layer is read."""
        layers = chained(stacks_of(params), lambda *parts: Chained(parts) if len(parts) > 1 else parts[0])
        rest = {name: tree for name, tree in params.items() if name not in STACKS}
        return {**rest, "layers": stacks(layers, self.lora_scale)}

    def prefill(
        self, params: Params, tokens: Int[Array, "B P"], mask: Bool[Array, "B P"], positions: Int[Array, "B P"]
    ) -> tuple[Float[Array, "B V"], list[Cache]]:
        """Logits after the last prompt token of left-padded prompts, and a cache of P columns, or states.

        A model whose rotary law depends on length must be given that of prompt and response first (`of_length`).
        """
        views = self._views(positions, mask.astype(jnp.int32))
        hidden, cache, _ = self._layers(params, tokens, positions, lambda i, kind: views[kind], None, None, mask)
        return self._next_logits(params, hidden), cache

    def decode(
        self,
        params: Params,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        sees: Bool[Array, "B P+S"],
        apart: Int[Array, "#B P+S"],
        shared: list[Columns | None],
        cache: list[Cache],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], list[Cache], Int[Array, "B L k"] | None]:
        """The next token of every row: logits of the one after, the new `cache`, and the token's experts, if any.

        Rows lie in X groups, one after another. Those of a group share the columns `shared` [X, K, P, N], those of its
        prompts, and have S of their own in `cache` [B, K, S, N], of which the token is written to column `index`.
        `sees` says which of both a token sees, itself included; `apart`, how many tokens they lie before it, is for
        layers with a window. A layer with a state has it in `cache`, at first that of a row's prompt.
        """
        masks, positions = (sees, sees & (apart < self.arch.sliding_window)), position[:, None]
        tables = {kind: tables_of(self.arch, self.length, positions, kind) for kind in set(kinds_of(self.arch))}

        def view(i: int, kind: Kind) -> tuple[Tables | None, Attend | None]:
            columns, softcap = shared[i], self.arch.attn_softcap
            if columns is None:
                return None, None
            law = partial(group_attention, mask=masks[kind.local], scale=scale_of(self.arch, kind), softcap=softcap)
            return tables[kind], partial(law, shared=columns)

        hidden, cache, routings = self._layers(params, token[:, None], positions, view, cache, index)
        experts = jnp.stack([routing.chosen[:, 0] for routing in routings], axis=1) if routings else None
        return self._next_logits(params, hidden), cache, experts

    def _layers(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        view: Callable[[int, Kind], tuple[Tables | None, Attend | Path | None]],
        cache: list[Cache] | None,
        index: Array | None,
        real: Array | None = None,
    ) -> tuple[Array, list[Cache], list[Routing]]:
        """Hidden states [B, T, D], the cache and what routers did, layer by layer, each with its own arrays.

        view(layer, kind) is what a layer of this kind is given to read the keys and values of that layer by, which is
        itself or one below; tokens are those of `real` (None: all).
        """
        if not self.length and self.arch.rope_scaling.kind in BY_LENGTH:
            raise ValueError("the rotary law depends on length; decode with of_length(model, prompt + new tokens)")
        embedded = self._embed.apply(params["embed"], tokens, positions, self.compute_dtype)
        x, own = jax.tree.map(constrain_rows, embedded)
        new_cache, routings, kinds = list[Cache](), list[Routing](), kinds_of(self.arch)
        for i, (layer, kind, of) in enumerate(zip(params["layers"], kinds, self.arch.kv_layers, strict=True)):
            entry = new_cache[of] if of < i else None if cache is None else cache[i]
            block, input_ = self._blocks[kind.mixer, "experts" in layer], None if own is None else own[:, :, i]
            x, entry, routing = block.apply(layer, x, *view(of, kind), entry, index, real, None, input_)
            x = constrain_rows(x)
            new_cache += [entry] if of == i else []
            routings += [] if routing is None else [routing]
        return x, self.pinned(new_cache), routings

    def pinned(self, cache: Any) -> Any:
        """A cache, or part of one, where it belongs: rows over the data axes, heads over tensor."""
        return cached.pinned(cache, self._over("K"), self._over("J"))

    def _next_logits(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B V"]:
        """Logits after the last of T tokens, whole rows on a device, since drawing looks at all of the vocabulary."""
        logits = self.project(params, self._norm.apply(params["final_norm"], hidden[:, -1:]))[:, 0]
        return constrain_rows(logits)


def by_width(model: _M) -> _M:
    """The model for sequences as long as its arrays are wide, such as text; a decoder of another kind as it is."""
    return dataclasses.replace(model, length=0) if isinstance(model, Model) else model


def of_length(model: _M, length: int) -> _M:
    """The model for sequences of `length` tokens, unless it has a length; a decoder of another kind as it is."""
    return dataclasses.replace(model, length=length) if isinstance(model, Model) and not model.length else model
