"""The shape of a decoder: every knob that the supported Hugging Face families turn."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rlhf_jax.config.checks import check, check_list
from rlhf_jax.config.rope import RopeScaling
from rlhf_jax.config.settings import settings
from rlhf_jax.errors import UserError


@settings
class ArchConfig:
    """The shape of a decoder, for a model that starts from random weights; a Hugging Face directory brings its own.

    Args:
        vocab_size: V, rows of the embedding.
        width: D, width of the residual stream.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: K, key-value heads; H must be a multiple.
        head_dim: N, width of a head.
        ffn_width: hidden width of the MLP, of each expert where there are experts.
        num_experts: MLPs in every layer, of which a token uses some; 0 for a single one.
        experts_per_token: how many a token uses.
        norm_topk: the weights of a token's experts are divided by their sum.
        router: scores of experts: softmax over all, or sigmoid of each, chosen by with a bias on top that no gradient
            trains (DeepSeek-V3, arXiv 2412.19437).
        router_groups: a token's experts are of `router_top_groups` of so many groups (sigmoid), those whose two best
            score most.
        router_top_groups: how many.
        routed_scale: what a token's experts add is multiplied by it.
        router_bias: bias on the router's scores before the softmax.
        router_scaled: routers see tokens through an RMSNorm of their own, over the root of the width, and what each
            expert adds is multiplied by a number (Gemma 4 26B-A4B).
        expert_width: hidden width of experts that stand beside the MLP of every layer, each with norms of its own; 0
            where experts replace it.
        glu_limit: the gate of experts is at most this and up lies within + and - it, and they make gate *
            sigmoid(glu_alpha * gate) * (up + 1); 0 for the plain gated MLP (GPT-OSS).
        glu_alpha: of that sigmoid.
        shared_width: hidden width of an MLP beside the experts that every token uses; 0 for none.
        dense_layers: the first layers, which have one MLP and no experts.
        dense_width: its hidden width.
        max_positions: longest sequence the positions allow.
        norm: rms (RMSNorm), layer (LayerNorm with bias) or layer_no_bias (LayerNorm without, Cohere).
        norm_eps: added to the variance.
        norm_offset: norms multiply by 1 + scale instead of scale (Gemma, Nemotron).
        norm_position: pre (before attention and MLP), post (on what they add, OLMo 2) or both (Gemma 2).
        full_head_dim: width of a head in layers without the window, which then have weights of other shapes; 0 where
            all layers are alike (Gemma 4).
        full_kv_heads: key-value heads of these.
        full_keys_as_values: their values are the keys, before norm and rotation.
        latent_width: keys and values of all heads come from one vector of this width (multi-head latent attention,
            DeepSeek-V2, arXiv 2405.04434); 0 where they come from the residual stream.
        latent_query_width: queries come from another; 0 where they do not.
        latent_rope_dim: dimensions of a head that turn then, the last ones, whose keys all heads share.
        latent_value_dim: width of a head's values.
        shared_kv_layers: the last layers have queries alone and see the keys and values of the last layer before them
            with a view like theirs, with the window or without (Brandon et al. 2024, arXiv 2405.12981; Gemma 4 E2B).
        shared_kv_ffn_width: hidden width of the MLP in these; 0 for ffn_width.
        layer_input_width: every layer adds something made of so many numbers by token, which come from a table of its
            own and from the embedding (per-layer embeddings, Gemma 4 E2B); 0 for none.
        value_norm: RMSNorm without a scale of the values of each head.
        layer_gain: what a layer leaves is multiplied by a number that no gradient trains.
        qk_norm: RMSNorm of queries and keys: none, head (each head by itself), turned (the same after the rotation,
            HunYuan) or all (all heads as one vector).
        parallel_residual: attention and MLP read the same input (GPT-NeoX).
        shared_norm: they read it through one norm (Phi, Cohere).
        positions: rotary or learned.
        position_offset: rows of the learned positions before that of the first token (OPT).
        rope_theta: base of the rotary frequencies.
        rope_local_theta: base in the layers with a window; 0 for rope_theta, scaled as the others are.
        rope_fraction: the part of every head that turns.
        rope_pairs: of that part 2i turns with 2i + 1 (GPT-J, GLM) instead of i with i + half.
        nope_layers: layers whose queries and keys do not turn, counted from 0 (SmolLM3).
        rope_scaling: how frequencies are stretched for long texts.
        sliding_window: tokens that a token sees in `window_layers`, itself included; 0 for all before it.
        window_layers: layers with the window, counted from 0.
        query_pre_attn_scalar: attention scores are divided by its root; 0 for head_dim.
        attention_multiplier: attention scores are multiplied by it instead; 0 for none (Granite).
        query_log_scale: queries grow by this times the logarithm of 1 + how often their position holds
            rope_scaling.original_max_positions; 0 for not (Ministral 3).
        attn_sinks: every head has a score that no key has, which takes a part of the softmax (GPT-OSS).
        attn_softcap: attention scores become cap * tanh(score / cap); 0 for no cap.
        logit_softcap: the same for logits.
        activation: the MLP's nonlinearity.
        gated_mlp: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        attn_gate: what attention mixes is multiplied by the sigmoid of a gate beside each query (Qwen3.5).
        delta_layers: layers with a gated DeltaNet in place of attention, counted from 0 (`models/delta.py`).
        delta_key_heads: of them, heads of queries and keys.
        delta_value_heads: heads of values, each with a state; a multiple of the key heads.
        delta_key_dim: width of a head of queries and keys.
        delta_value_dim: width of a head of values.
        delta_kernel: tokens that their convolution sees, its own included.
        qkv_bias: biases on the query, key and value projections.
        out_bias: bias on the attention's output projection.
        mlp_bias: biases on the projections of the MLP, or of experts.
        tied_head: use the embedding as the vocabulary projection.
        head_bias: bias on the vocabulary projection (Phi 1 and 2, GPT-J).
        scale_embedding: multiply embedded tokens by the root of the width (Gemma).
        embedding_multiplier: multiply embedded tokens by it (Granite).
        residual_multiplier: multiply by it what attention and MLP add to the residual stream (Granite).
        logit_multiplier: multiply logits by it (Cohere, Granite).
        init_std: standard deviation of fresh weights.
    """

    vocab_size: int = 512
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    ffn_width: int = 352
    num_experts: int = 0
    experts_per_token: int = 0
    norm_topk: bool = True
    router: Literal["softmax", "sigmoid"] = "softmax"
    router_groups: int = 1
    router_top_groups: int = 1
    routed_scale: float = 1.0
    router_bias: bool = False
    router_scaled: bool = False
    expert_width: int = 0
    glu_limit: float = 0.0
    glu_alpha: float = 1.702
    shared_width: int = 0
    dense_layers: int = 0
    dense_width: int = 0
    max_positions: int = 512
    norm: Literal["rms", "layer", "layer_no_bias"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: bool = False
    norm_position: Literal["pre", "post", "both"] = "pre"
    full_head_dim: int = 0
    full_kv_heads: int = 0
    full_keys_as_values: bool = False
    latent_width: int = 0
    latent_query_width: int = 0
    latent_rope_dim: int = 0
    latent_value_dim: int = 0
    shared_kv_layers: int = 0
    shared_kv_ffn_width: int = 0
    layer_input_width: int = 0
    value_norm: bool = False
    layer_gain: bool = False
    qk_norm: Literal["none", "head", "turned", "all"] = "none"
    parallel_residual: bool = False
    shared_norm: bool = False
    positions: Literal["rotary", "learned"] = "rotary"
    position_offset: int = 0
    rope_theta: float = 10000.0
    rope_local_theta: float = 0.0
    rope_fraction: float = 1.0
    rope_pairs: bool = False
    nope_layers: tuple[int, ...] = ()
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    sliding_window: int = 0
    window_layers: tuple[int, ...] = ()
    query_pre_attn_scalar: float = 0.0
    attention_multiplier: float = 0.0
    query_log_scale: float = 0.0
    attn_sinks: bool = False
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    gated_mlp: bool = True
    attn_gate: bool = False
    delta_layers: tuple[int, ...] = ()
    delta_key_heads: int = 0
    delta_value_heads: int = 0
    delta_key_dim: int = 0
    delta_value_dim: int = 0
    delta_kernel: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = True
    head_bias: bool = False
    scale_embedding: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        rules = {
            "at least 1": "vocab_size width num_heads num_kv_heads head_dim ffn_width max_positions router_groups",
            "above 0": "norm_eps rope_theta rope_fraction embedding_multiplier residual_multiplier logit_multiplier "
            "routed_scale",
            "at least 0": "init_std rope_local_theta sliding_window query_pre_attn_scalar attn_softcap logit_softcap "
            "attention_multiplier query_log_scale position_offset num_experts experts_per_token "
            "shared_width dense_layers dense_width glu_limit full_head_dim full_kv_heads "
            "latent_width latent_query_width latent_rope_dim latent_value_dim "
            "shared_kv_ffn_width layer_input_width expert_width",
            "between 1 and 9999": "num_layers",
            "between 0 and 9999": "shared_kv_layers",
            "finite": "glu_alpha",
        }
        rules["at least 1" if self.delta_layers else "at least 0"] += (
            " delta_key_heads delta_value_heads delta_key_dim delta_value_dim delta_kernel"
        )
        check(self, "model.arch.", rules)
        self._check_heads()
        self._check_shared()
        self._check_experts()
        if bool(self.sliding_window) != bool(self.window_layers):
            raise UserError(
                f"model.arch.sliding_window {self.sliding_window} and window_layers {list(self.window_layers)} "
                "belong together; give both or neither"
            )
        if self.delta_layers and self.delta_value_heads % self.delta_key_heads:
            raise UserError(
                f"model.arch.delta_value_heads {self.delta_value_heads} is not a multiple of "
                f"model.arch.delta_key_heads {self.delta_key_heads}; change one of them"
            )
        for name in ("window_layers", "nope_layers", "delta_layers"):
            check_list(self, name, "model.arch.")
            if any(not 0 <= layer < self.num_layers for layer in getattr(self, name)):
                raise UserError(
                    f"model.arch.{name} {list(getattr(self, name))} must lie in 0 to {self.num_layers - 1}; "
                    "leave out the others"
                )
        if self.shared_norm and not (self.parallel_residual and self.norm_position == "pre"):
            raise UserError("model.arch.shared_norm needs parallel_residual and norm_position pre; give them")
        if self.query_log_scale and not self.rope_scaling.original_max_positions:
            raise UserError("model.arch.query_log_scale needs rope_scaling.original_max_positions; give it")
        for name in ("short_factor", "long_factor"):
            count, pairs = len(getattr(self.rope_scaling, name)), self.full_rotary_dim // 2
            if self.rope_scaling.kind == "longrope" and count != pairs:
                raise UserError(
                    f"model.arch.rope_scaling.{name} has {count} numbers; give {pairs}, one for every pair of rotary "
                    "dimensions"
                )

    def _check_heads(self) -> None:
        for prefix, mixer in ("num", "attn"), ("full", "full"):
            if (heads := self.heads_of(mixer)[0]) and self.num_heads % heads:
                raise UserError(
                    f"model.arch.num_heads {self.num_heads} is not a multiple of model.arch.{prefix}_kv_heads "
                    f"{heads}; change one of them"
                )
        if bool(self.full_head_dim) != bool(self.full_kv_heads) or self.full_keys_as_values > bool(self.full_head_dim):
            raise UserError("model.arch.full_keys_as_values needs full_head_dim, and this full_kv_heads; give all")
        for name, turning in ("head_dim", self.rotary_dim), ("full_head_dim", self.full_rotary_dim):
            if self.positions == "rotary" and (turning % 2 or turning < 2 or self.rope_fraction > 1):
                raise UserError(
                    f"model.arch.{name} {getattr(self, name)} and rope_fraction {self.rope_fraction:g} make {turning} "
                    f"rotary dimensions; choose them so that it is an even number of at most {name}"
                )
        if self.latent_width and not (
            self.num_kv_heads == self.num_heads
            and 0 < self.latent_rope_dim < self.head_dim
            and 0 < self.latent_value_dim <= self.head_dim
        ):
            raise UserError(
                "model.arch.latent_width needs num_kv_heads num_heads, latent_rope_dim below head_dim, and "
                "latent_value_dim of at most head_dim; give them"
            )

    def _check_shared(self) -> None:
        where, own, near = "model.arch.", self.num_layers - self.shared_kv_layers, set(self.window_layers)
        if not {i in near for i in range(own, self.num_layers)} <= {i in near for i in range(own)}:
            raise UserError(
                f"{where}shared_kv_layers {self.shared_kv_layers} of {self.num_layers} layers have none below them "
                "with the same view, with the window or without; lower it"
            )
        odd = ["latent_width", "delta_layers", "attn_gate", "attn_sinks", "query_log_scale", "num_experts", "mlp_bias"]
        odd = [name for name in odd if getattr(self, name)] + ["qk_norm"] * (self.qk_norm in ("turned", "all"))
        if self.shared_kv_layers and odd:
            raise UserError(
                f"{where}shared_kv_layers is not written for {odd[0]} {getattr(self, odd[0])}; set it to 0"
            )
        if self.shared_kv_ffn_width and not self.shared_kv_layers:
            raise UserError(f"{where}shared_kv_ffn_width is of shared_kv_layers, which is 0; leave it out")

    def _check_experts(self) -> None:
        where, experts, groups = "model.arch.", self.num_experts, self.router_groups
        if self.experts_per_token > experts or bool(experts) != bool(self.experts_per_token):
            raise UserError(
                f"{where}experts_per_token {self.experts_per_token} is not between 1 and {where}num_experts "
                f"{experts}; change one of them, or set both to 0"
            )
        if self.dense_layers >= self.num_layers:
            raise UserError(
                f"{where}dense_layers {self.dense_layers} leaves none of {self.num_layers} layers to experts; lower it"
            )
        if self.dense_layers and not self.dense_width:
            raise UserError(f"{where}dense_layers {self.dense_layers} needs {where}dense_width; give it")
        if self.expert_width and (not experts or self.shared_width or self.dense_layers or self.parallel_residual):
            raise UserError(
                f"{where}expert_width needs {where}num_experts, and no shared_width, dense_layers or parallel_residual"
            )
        if self.router_scaled and not experts:
            raise UserError(f"{where}router_scaled is of experts; leave it out, or give {where}num_experts")
        if experts and self.mlp_bias and (self.shared_width or self.dense_layers or self.expert_width):
            raise UserError(f"{where}mlp_bias is of experts without shared or dense MLPs beside them; leave it out")
        if self.glu_limit and not (experts and self.gated_mlp and self.activation == "silu"):
            raise UserError(f"{where}glu_limit is of gated experts with activation silu; leave it out")
        if self.router_bias and not (experts and self.router == "softmax"):
            raise UserError(f"{where}router_bias is of experts with {where}router softmax; leave it out")
        if self.router == "softmax" and groups > 1:
            raise UserError(f"{where}router_groups {groups} needs {where}router sigmoid; give it, or 1 group")
        if self.router == "sigmoid" and (experts % groups or experts // groups < 2):
            raise UserError(f"{where}router_groups {groups} does not make groups of two or more of {experts} experts")
        if not 1 <= self.router_top_groups <= groups:
            raise UserError(f"{where}router_top_groups {self.router_top_groups} is not in 1 to {groups}; correct it")
        if self.experts_per_token > experts // groups * self.router_top_groups:
            raise UserError(
                f"{where}experts_per_token {self.experts_per_token} is more than {self.router_top_groups} of {groups} "
                f"groups of {experts} experts have; lower it"
            )

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.dense_layers if self.num_experts else 0

    @property
    def mixers(self) -> tuple[str, ...]:
        """What mixes the tokens of every layer: attn, latent, delta, or full, attention with heads of its own.

        Layers whose keys and values are those of others have queries in place of attn, full_queries of full.
        """
        usual = "latent" if self.latent_width else "attn"
        full = "full" if self.full_head_dim else usual
        attention = (usual if i in self.window_layers else full for i in range(self.num_layers))
        kinds = ["delta" if i in self.delta_layers else kind for i, kind in enumerate(attention)]
        own, queries = self.num_layers - self.shared_kv_layers, {"attn": "queries", "full": "full_queries"}
        return tuple(kind if i < own else queries[kind] for i, kind in enumerate(kinds))

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Of every layer, the one whose keys and values it sees: itself, or the last with its view and its own."""
        own, near = self.num_layers - self.shared_kv_layers, set(self.window_layers)
        last = {i in near: i for i in range(own)}
        return tuple(i if i < own else last[i in near] for i in range(self.num_layers))

    @property
    def kept_layers(self) -> range:
        """The layers from the lowest whose keys and values others see to the last that has its own."""
        own = self.num_layers - self.shared_kv_layers
        return range(min(self.kv_layers[own:], default=own), own)

    def heads_of(self, mixer: str) -> tuple[int, int]:
        """(key-value heads, width of a head) of layers with attention of this kind."""
        full = mixer in ("full", "full_queries")
        return (self.full_kv_heads, self.full_head_dim) if full else (self.num_kv_heads, self.head_dim)

    @property
    def position_rows(self) -> int:
        """Rows of the learned positions."""
        return self.max_positions + self.position_offset

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn."""
        return self.latent_rope_dim or int(self.head_dim * self.rope_fraction)

    @property
    def full_rotary_dim(self) -> int:
        """Those of a head in layers without the window."""
        return int(self.full_head_dim * self.rope_fraction) if self.full_head_dim else self.rotary_dim
