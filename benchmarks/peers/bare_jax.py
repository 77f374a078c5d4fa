"""The floor: SFT steps and generation in plain JAX, with no library between, printed as one JSON line.

    python bare_jax.py --task {sft,generate} --size {42m,5m} --repeats 5

A Llama-shaped decoder in float32 (rotary half-split, RMSNorm, SwiGLU, tied embeddings) as a dictionary of arrays and
one function, AdamW by hand, and a `lax.scan` over a fixed key-value cache: what XLA gives for the same arithmetic.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from common import SIZES, WARMUP, Clock, parse, rows, work_of


def init(key, *, width, layers, heads, ffn, vocab):
    """Random parameters: normal with standard deviation 0.02, norms at one."""
    shapes = dict(q=(width, width), k=(width, width), v=(width, width), o=(width, width),
                  gate=(width, ffn), up=(width, ffn), down=(ffn, width))  # fmt: skip

    def normal(key, shape):
        return 0.02 * jax.random.normal(key, shape, jnp.float32)

    def layer(key):
        keys = jax.random.split(key, len(shapes))
        weights = {name: normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
        return weights | {"norm_attn": jnp.ones(width), "norm_ffn": jnp.ones(width)}

    embed_key, *layer_keys = jax.random.split(key, layers + 1)
    return {"embed": normal(embed_key, (vocab, width)), "layers": [layer(k) for k in layer_keys],
            "norm": jnp.ones(width)}  # fmt: skip


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


def rotate(x, positions):
    """Rotary embedding of x, float32[B, H, T, N], at positions int32[T]; the halves of N pair up."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / 10_000.0 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def forward(params, tokens, start, cache, *, heads):
    """Final hidden states of tokens, int32[B, T], at positions start..start+T-1, and the updated cache.

    `cache` is a list of (keys, values), float32[B, H, S, N] per layer, or None to attend within `tokens` alone.
    Heads stand before positions because one decoding step is then a third faster on a CPU than the other way round.
    """
    x = params["embed"][tokens]
    positions = start + jnp.arange(tokens.shape[1])
    new_cache = []
    for index, p in enumerate(params["layers"]):
        h = rms_norm(x, p["norm_attn"])
        q, k, v = ((h @ p[name]).reshape(*h.shape[:2], heads, -1).swapaxes(1, 2) for name in "qkv")
        q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[index][0], k, (0, 0, start, 0))
            v = jax.lax.dynamic_update_slice(cache[index][1], v, (0, 0, start, 0))
        new_cache.append((k, v))
        scores = jnp.einsum("bhtn,bhsn->bhts", q, k) / q.shape[-1] ** 0.5
        scores = jnp.where(jnp.arange(k.shape[2]) <= positions[:, None], scores, -1e30)
        attended = jnp.einsum("bhts,bhsn->bhtn", jax.nn.softmax(scores), v).swapaxes(1, 2)
        x = x + attended.reshape(x.shape) @ p["o"]
        h = rms_norm(x, p["norm_ffn"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return rms_norm(x, params["norm"]), new_cache


def make_sft_step(*, heads, learning_rate=1e-5, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip=1.0):
    """One optimiser step: next-token cross-entropy, gradients clipped by global norm, AdamW."""

    def loss_fn(params, tokens):
        hidden, _ = forward(params, tokens, 0, None, heads=heads)
        logits = hidden[:, :-1] @ params["embed"].T
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    def step(params, m, v, count, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / norm), grads)
        count = count + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, grads)

        def update(p, m, v):
            direction = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            return p - learning_rate * (direction + weight_decay * p)

        return jax.tree.map(update, params, m, v), m, v, count, loss

    return jax.jit(step, donate_argnums=(0, 1, 2, 3))


def make_generate(*, heads, new, top_k=50, top_p=0.9):
    """Sampling of `new` tokens after each of a batch of equally long prompts, at temperature 1."""

    def sample(params, hidden, key):
        best, ids = jax.lax.top_k(hidden @ params["embed"].T, top_k)
        probs = jax.nn.softmax(best)
        best = jnp.where(jnp.cumsum(probs, axis=-1) - probs < top_p, best, -jnp.inf)
        pick = jax.random.categorical(key, best)
        return jnp.take_along_axis(ids, pick[:, None], axis=-1)

    def generate(params, prompts, key):
        batch, prompt = prompts.shape
        width = params["embed"].shape[1]
        empty = jnp.zeros((batch, heads, prompt + new, width // heads))
        cache = [(empty, empty) for _ in params["layers"]]
        first_key, *keys = jax.random.split(key, new)
        hidden, cache = forward(params, prompts, 0, cache, heads=heads)
        token = sample(params, hidden[:, -1], first_key)

        def body(carry, key):
            token, position, cache = carry
            hidden, cache = forward(params, token, position, cache, heads=heads)
            token = sample(params, hidden[:, -1], key)
            return (token, position + 1, cache), token[:, 0]

        _, rest = jax.lax.scan(body, (token, prompt, cache), jnp.stack(keys))
        return jnp.concatenate([token, rest.T], axis=1)

    return jax.jit(generate)


def main():
    args = parse(__doc__, ("sft", "generate"))
    if args.lengths == "ragged":
        raise SystemExit("the floor is that of full lengths")
    compiles = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: event == "/jax/core/compile/backend_compile_duration" and compiles.append(event)
    )

    size, work, clock, compiled = SIZES[args.size], work_of(args.task, args.lengths), Clock(args.turns), []
    heads = size["heads"]
    params = init(jax.random.key(0), **size)
    if args.task == "sft":
        step = make_sft_step(heads=heads)
        m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        state = params, m, v, jnp.zeros((), jnp.int32)
    else:
        generate = make_generate(heads=heads, new=work.new)

    for call, batch in enumerate(rows(args.task, args.lengths, size["vocab"], WARMUP + args.repeats)):
        tokens = np.array([row.prompt + (row.responses or [[]])[0] for row in batch], np.int32)
        key = jax.random.key(call)
        clock.begin()
        if args.task == "sft":
            *state, loss = step(*state, tokens)
            jax.block_until_ready((state, loss))
        else:
            out = jax.block_until_ready(generate(params, tokens, key))
            if out.shape != (work.prompts, work.new):
                raise RuntimeError(f"generated {out.shape}, not {(work.prompts, work.new)}")
        clock.end(work.prompts * (work.new or work.prompt))
        compiled.append(len(compiles))
    clock.report(args, "bare_jax", f"jax {jax.__version__}", compiled[-1] - compiled[WARMUP - 1])


if __name__ == "__main__":
    main()
