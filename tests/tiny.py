"""Small things that several test files share: a model that numpy can follow, a rollout, a toy run directory."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.config import (
    ArchConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PPOArgs,
    PPOConfig,
    RewardSourceConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import Model
from rlhf_jax.models.loading import Loaded, save_model
from rlhf_jax.online.iteration import LoopState, iterate, key_at, next_batch
from rlhf_jax.online.method import Method
from rlhf_jax.ppo import Experience, Models
from rlhf_jax.sharding import make_mesh, tree_shardings
from rlhf_jax.tasks import random_walks as walks
from rlhf_jax.tokens import Blocks, token_logprobs
from rlhf_jax.types import Rollout

V, D = 24, 16
STOP = 1
ONE = jax.devices()[:1]

ARCH = ArchConfig(
    vocab_size=V, width=D, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_width=32, max_positions=40
)


@dataclass(frozen=True)
class Bigram:
    """Stands in for models.Model where compiling must be cheap: the state is the embedding of the current token."""

    logprob_chunk: int = 64
    balance_coef: float = 0.0
    own_adapters: bool = False
    arch: ArchConfig = ARCH

    def apply(self, params, tokens, positions, segment_ids, branches=None):
        return params["embed"]["tokens"][tokens]

    def logprobs(self, params, hidden, targets, temperature=1.0, **options):
        vocabulary = Blocks(params["head"]["kernel"][None], lambda kernel, h: h @ kernel)
        return token_logprobs(vocabulary, hidden, targets, temperature, chunk=self.logprob_chunk, **options)

    def next_logprobs(self, params, tokens, positions, segment_ids, temperature=1.0, **options):
        hidden = self.apply(params, tokens, positions, segment_ids)
        return self.logprobs(params, hidden[:, :-1], tokens[:, 1:], temperature, **options)[0]

    def forward(self, *inputs, **options):
        return self.apply(*inputs, **options), None

    def scores(self, score, hidden):
        return hidden @ score["kernel"] + score["bias"]


BIGRAMS = Models(Bigram(), Bigram(), Bigram())


def bigram_params(seed: int) -> dict:
    """{"policy", "value"} of two bigrams; the names are those of the sharding rules."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.7 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    policy = {"embed": {"tokens": draw(V, D)}, "head": {"kernel": draw(D, V)}}
    value = {"embed": {"tokens": draw(V, D)}, "score": {"kernel": draw(D) * 0.3, "bias": draw()}}
    return {"policy": policy, "value": value}


def f64(tree):
    """Any tree of arrays as numpy, floats in float64."""
    to = lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)  # noqa: E731
    return jax.tree.map(to, tree)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, numpy."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def states_before(rollout: Rollout) -> np.ndarray:
    """int[B, T], the token that stands before each response token: all that a bigram sees."""
    sequence = np.concatenate([np.asarray(rollout.prompt), np.asarray(rollout.tokens)], axis=1)
    return sequence[:, rollout.prompt.shape[1] - 1 : -1]


def bigram_law(policy: dict, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    """float64[B, T, V], log-probs of every token at every response position, numpy."""
    policy = f64(policy)
    return log_softmax(policy["embed"]["tokens"][states_before(rollout)] @ policy["head"]["kernel"] / temperature)


def bigram_logprobs(policy: dict, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    """float64[B, T], log-probs of the response tokens, 0 off the mask, numpy."""
    chosen = np.take_along_axis(bigram_law(policy, rollout, temperature), np.asarray(rollout.tokens)[..., None], -1)
    return np.where(rollout.mask, chosen[..., 0], 0.0)


def bigram_values(value: dict, rollout: Rollout) -> np.ndarray:
    """float64[B, T], the value before each response token, numpy."""
    value = f64(value)
    return value["embed"]["tokens"][states_before(rollout)] @ value["score"]["kernel"] + value["score"]["bias"]


def make_rollout(seed: int, policy: dict, *, rows=8, prompt_len=3, num=6, temperature=1.0) -> Rollout:
    """Ragged responses; finished rows end in STOP, the others fill all of T. Log-probs are the bigram's."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, V, (rows, num))
    lengths = rng.integers(1, num + 1, rows)
    lengths[0], lengths[1] = num, 1  # one full row and the shortest one are always there
    finished = (lengths < num) | (rng.random(rows) < 0.3)
    finished[0] = False
    tokens[finished, lengths[finished] - 1] = STOP
    mask = np.arange(num) < lengths[:, None]
    prompt_mask = np.arange(prompt_len) >= rng.integers(0, prompt_len, rows)[:, None]
    rollout = Rollout(
        prompt=jnp.asarray(rng.integers(2, V, (rows, prompt_len)), jnp.int32),
        prompt_mask=jnp.asarray(prompt_mask),
        tokens=jnp.asarray(tokens, jnp.int32),
        mask=jnp.asarray(mask),
        logprobs=jnp.zeros((rows, num)),
        finished=jnp.asarray(finished),
    )
    logprobs = jnp.asarray(bigram_logprobs(policy, rollout, temperature), jnp.float32)
    return Rollout(**{**vars(rollout), "logprobs": logprobs})


def make_experience(seed: int, params: dict, **kwargs) -> Experience:
    """An experience with random advantages and returns, whose old log-probs and values are those of `params`."""
    rng = np.random.default_rng(seed)
    rollout = make_rollout(seed, params["policy"], **kwargs)
    mask = np.asarray(rollout.mask)
    masked = lambda x: jnp.asarray(np.where(mask, x, 0.0), jnp.float32)  # noqa: E731
    values = bigram_values(params["value"], rollout)
    whole = np.concatenate([np.asarray(rollout.prompt_mask), mask], axis=1)
    return Experience(
        tokens=jnp.concatenate([rollout.prompt, rollout.tokens], axis=1),
        segment_ids=jnp.asarray(whole, jnp.int32),
        mask=rollout.mask,
        value_mask=rollout.mask,
        old_logprobs=rollout.logprobs,
        old_values=masked(values),
        advantages=masked(rng.normal(size=mask.shape)),
        returns=masked(values + rng.normal(size=mask.shape)),
    )


def model_params(model: Model, seed: int, std: float = 0.3) -> dict:
    """Random parameters of a decoder, without compiling its initialiser."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))

    def draw(path, leaf):
        normal = rng.normal(size=leaf.shape)
        return jnp.asarray(1 + 0.1 * normal if "norm" in jax.tree_util.keystr(path) else std * normal, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def text_batch(rows: int, length: int, least: int) -> dict:
    """Rows of `least` to `length` tokens for `sft.objective`; all tokens but the first are targets."""
    rng = np.random.default_rng(0)
    mask = np.arange(length) < rng.integers(least, length + 1, rows)[:, None]
    targets = mask & (np.arange(length) > 0)
    return {
        "tokens": rng.integers(0, V, (rows, length)).astype(np.int32),
        "positions": np.where(mask, np.arange(length), 0).astype(np.int32),
        "segment_ids": mask.astype(np.int32),
        "weights": (targets / targets.sum()).astype(np.float32),
    }


def byte_tokenizer(*, bos=False, pad: str | None = "<pad>", chat_template: str | None = None, **options):
    """A tokenizer of UTF-8 bytes without any file: <pad> 0, <bos> 1, <eos> 2, bytes from 3, ChatML's tokens last.

    Args:
        bos: put <bos> before every text.
        pad: the pad token; may be <eos>, or None for no pad token.
        options: of PreTrainedTokenizerFast, such as padding_side.
    """
    names = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens([name for name in names if name[:1] == "<" and len(name) > 1])
    if bos:
        post = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        fast.post_processor = post
    tokens = {"eos_token": "<eos>", "bos_token": "<bos>" if bos else None, "pad_token": pad}
    tokens = {name: token for name, token in tokens.items() if token is not None}
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, **tokens, **options)
    hf.chat_template = chat_template
    return hf


def metaspace_tokenizer(scheme: str = "always", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """SentencePiece's kind: BPE with ▁ for a blank, bytes for what is unknown, and a ▁ of its own before a text.

    Args:
        scheme: always, first or never, of the Metaspace pre-tokenizer; or legacy, as in Llama 2's tokenizer.json.
    """
    merges = [
        ("▁", "t"),
        ("▁t", "w"),
        ("i", "t"),
        ("▁", "it"),
        ("▁", "i"),
        ("▁i", "s"),
        ("y", "e"),
        ("ye", "s"),
        ("▁", "yes"),
    ]
    singles = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehilnorstwy,.'"]
    names = ["<unk>", "<s>", "</s>", *singles, *("".join(pair) for pair in merges)]
    model = tokenizers.models.BPE(
        {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    fast = tokenizers.Tokenizer(model)
    decoders, normalizers = tokenizers.decoders, tokenizers.normalizers
    if scheme == "legacy":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        stripped = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), *stripped])
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        spaced = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        fast.decoder = decoders.Sequence(spaced + [decoders.Strip(" ", 1, 0)] * (scheme != "never"))
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    hf.chat_template = chat_template
    return hf


def word_tokenizer(kind: str = "white space", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Words between white space, or WordPiece's, whose parts within a word start with ##."""
    words = ["<unk>", "<s>", "</s>", "yes", "no", "it", "is", "two", ",", ".", "'", "s", "##s", "##it", "##o", "t"]
    vocab = {word: i for i, word in enumerate(words)}
    if kind == "WordPiece":
        fast = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="<unk>"))
        fast.decoder = tokenizers.decoders.WordPiece(cleanup=False)
        fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
        fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    hf.chat_template = chat_template
    return hf


@functools.cache
def toy_directory() -> Path:
    """policy/ and reward/, a random decoder and a random scalar model for random walks; removed when Python ends."""
    path = Path(tempfile.mkdtemp(prefix="rlhf_jax_toy"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    walks.make_tokenizer().save_pretrained(path / "tokenizer")
    for seed, name in enumerate(("policy", "reward")):
        save_random(path / name, Model(ARCH, score_head=name == "reward"), seed, path / "tokenizer")
    return path


def save_random(path: Path, model: Model, seed: int, tokenizer: Path) -> None:
    """A model directory with random parameters."""
    params = model_params(model, seed)
    params = jax.device_put(params, tree_shardings(make_mesh(MeshConfig(), devices=ONE), params))
    save_model(path, Loaded(model, params), params, Tokenizer.load(str(tokenizer)))


TOY_ROWS = {"rows": walks.start_prompts() * 2, "eval_rows": walks.start_prompts()[:5]}


def toy_run(output_dir: Path | str = "", *, reward_model: bool = True, **ppo) -> PPOArgs:
    """A PPO run on `toy_directory`: 16 prompts of 2 columns, 6 new tokens."""
    path, optim = toy_directory(), OptimConfig(learning_rate=1e-2, schedule="linear", eps=1e-5)
    return PPOArgs(
        model=ModelConfig(path=str(path / "policy")),
        data=DataConfig(batch_size=16, max_prompt_length=2, max_length=8),
        reward=RewardSourceConfig(model=str(path / "reward") if reward_model else ""),
        sampling=SamplingConfig(max_new_tokens=6, chunk=3),
        ppo=PPOConfig(**{"iterations": 4, "epochs": 2, **ppo}),
        optim=optim,
        value_optim=optim,
        run=RunConfig(output_dir=str(output_dir), progress=False, eval_every=2),
    )


def iteration(method: Method, loop: LoopState, i: int):
    """Iteration i of a method, as the loop calls it: (the next state, metrics, table)."""
    key = key_at(method, "training", i)
    loop, batch, drawn = next_batch(method, loop, i, key)
    return iterate(method, loop, batch, key, drawn)
