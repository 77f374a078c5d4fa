"""The decoder as pure functions over a plain nested dict of arrays: the only place that splits and merges modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.config import ArchConfig, ModelConfig
from rlhf_jax.models import decoder
from rlhf_jax.models.rotary import Tables, rotary_tables
from rlhf_jax.sharding import ROWS, constrain
from rlhf_jax.tokens import token_logprobs
from rlhf_jax.types import Params

REMAT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}

View = tuple[Tables | None, Bool[Array, "B T S"]]


def pure(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[[Array], Params], Callable[..., Any]]:
    """(init, apply) of a module: init(key) -> nested dict of arrays, apply(params, *args) -> outputs."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(params=key))))

    def apply(params: Params, *args: Any) -> Any:
        return nnx.merge(graph, params)(*args)

    return init, apply


def platform_dtype(name: str) -> jnp.dtype:
    """The compute dtype that a config names; auto is float32 on CPU, bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


@dataclass(frozen=True)
class Model:
    """A decoder with a vocabulary head (policy, reference) or a scalar head (reward, value).

    Every method is a pure function of its arguments; parameters are a nested dict with layers stacked on a leading L.

    Attributes:
        arch: the shape.
        score_head: scalar head instead of vocabulary head.
        compute_dtype: dtype of activations (float32 or bfloat16).
        remat: none, dots or full.
        logprob_chunk: positions whose logits are alive at once.
    """

    arch: ArchConfig
    score_head: bool = False
    compute_dtype: jnp.dtype = jnp.dtype("float32")  # noqa: RUF009
    remat: str = "none"
    logprob_chunk: int = 256

    @classmethod
    def from_config(cls, config: ModelConfig, arch: ArchConfig, *, score_head: bool = False) -> Model:
        """The model that `config` describes, with the shape `arch`."""
        return cls(arch, score_head, platform_dtype(config.compute_dtype), config.remat, config.logprob_chunk)

    @cached_property
    def _embed(self) -> Any:
        return pure(lambda rngs: decoder.Embedding(self.arch, rngs=rngs))

    @cached_property
    def _block(self) -> Any:
        return pure(lambda rngs: decoder.Block(self.arch, rngs=rngs))

    @cached_property
    def _norm(self) -> Any:
        return pure(lambda _: decoder.Norm(self.arch, (self.arch.width,), centered=self.arch.norm == "layer"))

    @cached_property
    def _head(self) -> Any:
        return pure(lambda rngs: decoder.VocabularyHead(self.arch, rngs=rngs))

    def init(self, key: Array) -> Params:
        """Fresh parameters; the layers come from one vmapped trace."""
        embed, layers, norm, head = jax.random.split(key, 4)
        params = {
            "embed": self._embed[0](embed),
            "layers": jax.vmap(self._block[0])(jax.random.split(layers, self.arch.num_layers)),
            "final_norm": self._norm[0](norm),
        }
        if self.score_head:
            return {**params, "score": self.init_score(head, zeros=False)}
        return params if self.arch.tied_head else {**params, "head": self._head[0](head)}

    def init_score(self, key: Array, *, zeros: bool) -> Params:
        """A fresh scalar head, float32: kernel [D], bias []."""
        return pure(lambda rngs: decoder.ScoreHead(self.arch, zeros=zeros, rngs=rngs))[0](key)

    def with_score(self, params: Params, score: Params) -> Params:
        """The parameters of a scalar model on the trunk of `params`."""
        return {
            "embed": params["embed"],
            "layers": params["layers"],
            "final_norm": params["final_norm"],
            "score": score,
        }

    def _views(
        self, positions: Int[Array, "B T"], mask: Bool[Array, "B T S"], columns: Int[Array, " T"]
    ) -> tuple[View, View]:
        """What a layer is given, (rotary tables, mask), without and with the window; `columns` are the queries'."""
        rotary, window = self.arch.positions == "rotary", self.arch.sliding_window
        tables = rotary_tables(positions, self.arch) if rotary else None
        if not window:
            return (tables, mask), (tables, mask)
        near = columns[:, None] - jnp.arange(mask.shape[-1])[None] < window
        local = rotary_tables(positions, self.arch, local=True) if rotary and self.arch.rope_local_theta else tables
        return (tables, mask), (local, mask & near[None])

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
    ) -> Float[Array, "B S D"]:
        """Final hidden states; a token sees itself and what is before it in its own segment. 0 marks padding."""
        causal = jnp.tril(jnp.ones((1, tokens.shape[1], tokens.shape[1]), bool))
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & causal
        views = self._views(positions, mask, jnp.arange(tokens.shape[1]))
        local = jnp.zeros(self.arch.num_layers, bool).at[jnp.array(self.arch.window_layers, int)].set(True)
        one_view = len(self.arch.window_layers) in (0, self.arch.num_layers)  # of either kind
        x = constrain(self._embed[1](params["embed"], tokens, positions, self.compute_dtype), *ROWS, None, None)

        def layer(x: Array, inputs: tuple[Params, Array]) -> tuple[Array, None]:
            params, local = inputs
            if one_view:
                view = views[len(self.arch.window_layers) > 0]
            else:
                view = jax.tree.map(lambda full, near: jnp.where(local, near, full), *views)
            y = self._block[1](params, x, *view)[0]
            return constrain(y, *ROWS, None, None), None

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.remat])
        x, _ = jax.lax.scan(layer, x, (params["layers"], local))
        return self._norm[1](params["final_norm"], x)

    def project(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32, sharded over the vocabulary."""
        precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
        if "head" in params:
            letters, kernel = "btd,dv->btv", params["head"]["kernel"]
        else:
            letters, kernel = "btd,vd->btv", params["embed"]["tokens"]
        logits = jnp.einsum(
            letters, hidden, kernel.astype(hidden.dtype), precision=precision, preferred_element_type=jnp.float32
        )
        return constrain(decoder.softcapped(logits, self.arch.logit_softcap), *ROWS, None, "tensor")

    def logprobs(
        self,
        params: Params,
        hidden: Float[Array, "B T D"],
        targets: Int[Array, "B T"],
        temperature: Float[Array, ""] | float = 1.0,
        *,
        with_entropy: bool = False,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Log-probs in nats of targets[:, t] given hidden[:, t] at a temperature; the entropy if asked, else 0."""
        return token_logprobs(
            lambda h: self.project(params, h),
            hidden,
            targets,
            temperature,
            chunk=self.logprob_chunk,
            with_entropy=with_entropy,
        )

    def scores(self, score: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """The scalar head `score` at every position, float32."""
        return pure(lambda rngs: decoder.ScoreHead(self.arch, zeros=True, rngs=rngs))[1](score, hidden)

    def decoding_params(self, params: Params) -> Params:
        """A copy for decoding: compute dtype, one dict per layer. Make it once per rollout, not per token.

        Norms stay as they are, since training computes them in float32, too. A tied head is laid out as [D, V], which
        a product with few rows reads a third faster than [V, D].
        """
        cast = jax.tree_util.tree_map_with_path(
            lambda path, x: x if "_norm" in jax.tree_util.keystr(path) else x.astype(self.compute_dtype), params
        )
        if self.arch.tied_head:
            cast["head"] = {"kernel": jax.lax.optimization_barrier(cast["embed"]["tokens"].T)}
        layers = [jax.tree.map(lambda x, i=i: x[i], cast["layers"]) for i in range(self.arch.num_layers)]
        return {**cast, "layers": layers}

    def prefill(
        self, params: Params, tokens: Int[Array, "B P"], mask: Bool[Array, "B P"], positions: Int[Array, "B P"]
    ) -> tuple[Float[Array, "B V"], list[decoder.Cache]]:
        """Logits after the last prompt token of left-padded prompts, and a cache of P columns."""
        causal = jnp.tril(jnp.ones((1, tokens.shape[1], tokens.shape[1]), bool))
        allowed = (mask[:, :, None] == mask[:, None, :]) & causal
        return self._decode(params, tokens, positions, allowed, None, None)

    def decode(
        self,
        params: Params,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        mask: Bool[Array, "B S"],
        cache: list[decoder.Cache],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], list[decoder.Cache]]:
        """One token per row, written to column `index` of the cache: logits of the next. `mask` includes it."""
        return self._decode(params, token[:, None], position[:, None], mask[:, None, :], cache, index)

    def _decode(
        self, params: Params, tokens: Array, positions: Array, mask: Array, cache: list | None, index: Array | None
    ) -> tuple[Array, list[decoder.Cache]]:
        columns = jnp.arange(tokens.shape[1]) if index is None else index[None]
        views = self._views(positions, mask, columns)
        x = self._embed[1](params["embed"], tokens, positions, self.compute_dtype)
        new_cache = []
        for i, layer in enumerate(params["layers"]):
            view = views[i in self.arch.window_layers]
            x, entry = self._block[1](layer, x, *view, cache[i] if cache is not None else None, index)
            new_cache.append(entry)
        hidden = self._norm[1](params["final_norm"], x[:, -1:])
        return self.project(params, hidden)[:, 0], new_cache
