"""One speed measurement of Tunix 0.1.7: SFT, generation or PPO, printed as one JSON line.

    python tunix_peer.py --task {sft,reward,generate,ppo} --size {42m,5m} --repeats 5

SFT is `PeftTrainer` on all parameters, generation its own `Sampler`, PPO its `PPOLearner` on an `RLCluster` with
separate policy, reference, value and reward models. Tunix has no reward-model trainer, so the reward task prints an
`unsupported` line. Two adaptations: one step in flight, so that a step has an end to time; and a scalar head of our
own, because `create_critic_model` replaces an `lm_head` that tied embeddings do not have.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import sys
import time
import warnings

os.environ.update(
    HF_HUB_OFFLINE="1", WANDB_DISABLED="true", WANDB_MODE="disabled", JAX_PLATFORMS="cpu",
    TOKENIZERS_PARALLELISM="false",
)  # fmt: skip

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tunix
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.dummy_model_creator import create_dummy_model
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft import utils as sft_utils
from tunix.sft.hooks import TrainingHooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

SIZES = {
    "42m": dict(width=512, layers=8, heads=8, ffn=1408, vocab=32000),
    "5m": dict(width=256, layers=4, heads=4, ffn=704, vocab=4096),
}
WARMUP = 2


class CompileCounter:
    """The number of programs XLA has compiled since it was made."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event, duration, **kwargs):
        self.count += event == "/jax/core/compile/backend_compile_duration"


class IdTokenizer:
    """Text is token ids with spaces between. End and padding lie outside the model's ids, so nothing stops early."""

    def __init__(self, vocab):
        self.vocab = vocab

    def encode(self, text, **kwargs):
        return [int(word) for word in text.split()]

    def decode(self, ids, **kwargs):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 0  # the sampler takes 0 for none

    def eos_id(self):
        return self.vocab

    def pad_id(self):
        return self.vocab + 1


class ScalarLlama(nnx.Module):
    """Tunix's Llama 3 with one scalar per position in place of the vocabulary: a reward or a value model."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.backbone = Llama3(config, rngs=rngs)
        self.score = nnx.Linear(config.embed_dim, 1, use_bias=False, rngs=rngs)

    def __call__(self, input_tokens, positions, cache, attention_mask, segment_ids=None):
        x = self.backbone.embedder.encode(input_tokens)
        for layer in self.backbone.layers:
            _, x = layer(x, positions, None, attention_mask)
        return self.score(self.backbone.final_norm(x)), None


def make_model(size, seed, kind=Llama3):
    config = ModelConfig(
        num_layers=size["layers"], vocab_size=size["vocab"], embed_dim=size["width"], hidden_dim=size["ffn"],
        num_heads=size["heads"], head_dim=size["width"] // size["heads"], num_kv_heads=size["heads"],
        rope_theta=10_000, norm_eps=1e-5, weight_tying=True,
    )  # fmt: skip
    model = create_dummy_model(kind, config, dtype=jnp.float32, random_seed=seed)
    ones = jax.tree.map(lambda x: jnp.ones_like(x) if x.ndim == 1 else x, nnx.state(model))  # it draws norms too
    nnx.update(model, ones)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))}
    if dtypes != {"float32"}:
        raise RuntimeError(f"parameters are {dtypes}, not float32")
    return model


def make_optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))


def make_prompts(rng, size, batch, prompt):
    return [" ".join(map(str, row)) for row in rng.integers(1, size["vocab"], (batch, prompt))]


class StepClock(TrainingHooks):
    """Times at which each step starts and training ends, with the compile count then.

    With one step in flight the trainer waits for the loss of a step before it starts the next, so differences of
    starts are whole steps.
    """

    def __init__(self, compiles):
        self.compiles, self.marks = compiles, []

    def mark(self, *args):
        self.marks.append((time.perf_counter(), self.compiles.count))

    on_train_step_start = on_train_end = mark

    def on_train_start(self, *args): ...
    def on_train_step_end(self, *args): ...
    def on_eval_step_start(self, *args): ...
    def on_eval_step_end(self, *args): ...


def sft_marks(size, steps, compiles, *, batch, length):
    """Time and compile count at the start of each of `steps` SFT steps and at the end of the last."""
    rng = np.random.default_rng(0)
    batches = [
        TrainingInput(
            input_tokens=rng.integers(1, size["vocab"], (batch, length), dtype=np.int32),
            input_mask=np.ones((batch, length), dtype=bool),
        )
        for _ in range(steps)
    ]
    trainer = PeftTrainer(
        make_model(size, 0),
        make_optimizer(),
        TrainingConfig(eval_every_n_steps=10**9, max_steps=steps, max_inflight_computations=1),
    ).with_gen_model_input_fn(
        lambda x: {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": sft_utils.build_positions_from_mask(x.input_mask),
            "attention_mask": sft_utils.make_causal_attn_mask(x.input_mask),
        }
    )
    clock = StepClock(compiles)
    trainer.with_training_hooks(clock)
    trainer.train(batches)
    if trainer.train_steps != steps:
        raise RuntimeError(f"trained {trainer.train_steps} steps, not {steps}")
    return clock.marks


def generate_marks(size, calls, compiles, *, batch, prompt, new):
    """Time and compile count before each of `calls` generations of exactly `new` tokens and after the last."""
    heads = size["heads"]
    sampler = Sampler(
        make_model(size, 0),
        IdTokenizer(size["vocab"]),
        CacheConfig(
            cache_size=prompt + new, num_layers=size["layers"], num_kv_heads=heads, head_dim=size["width"] // heads
        ),
    )
    rng = np.random.default_rng(0)
    prompts = [make_prompts(rng, size, batch, prompt) for _ in range(calls)]
    marks = [(time.perf_counter(), compiles.count)]
    for call in range(calls):
        out = sampler(
            prompts[call], max_generation_steps=new, max_prompt_length=prompt, temperature=1.0, top_p=0.9, top_k=50,
            seed=call,
        )  # fmt: skip
        marks.append((time.perf_counter(), compiles.count))
        lengths = {len(tokens) for tokens in out.tokens}
        if lengths != {new} or len(out.tokens) != batch:
            raise RuntimeError(f"generated {len(out.tokens)} sequences of {lengths} tokens, not {batch} of {new}")
    return marks


def ppo_marks(size, iterations, compiles, *, batch, prompt, new):
    """Time and compile count at the start of each of `iterations` PPO iterations and at the end of the last."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cluster = RLCluster(
        actor=make_model(size, 0),
        reference=make_model(size, 0),
        critic=make_model(size, 1, ScalarLlama),
        reward=make_model(size, 2, ScalarLlama),
        tokenizer=IdTokenizer(size["vocab"]),
        cluster_config=ClusterConfig(
            role_to_mesh=dict.fromkeys(Role, mesh),
            training_config=RLTrainingConfig(
                actor_optimizer=make_optimizer(), critic_optimizer=make_optimizer(), eval_every_n_steps=10**9,
                max_steps=10**9, mini_batch_size=batch, train_micro_batch_size=batch, max_inflight_computations=1,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=new, max_prompt_length=prompt, kv_cache_size=prompt + new, temperature=1.0,
                top_p=1.0, top_k=None,
            ),
        ),
    )  # fmt: skip
    learner = PPOLearner(rl_cluster=cluster, ppo_config=PPOConfig(num_iterations=4))
    lengths = []
    generate = cluster.generate

    def checked_generate(*args, **kwargs):
        out = generate(*args, **kwargs)
        lengths.append(tuple(len(tokens) for tokens in out.tokens))
        return out

    cluster.generate = checked_generate
    rng = np.random.default_rng(0)
    marks = []

    def batches():  # the learner pulls a batch at the start of an iteration, after the one before has finished
        for _ in range(iterations):
            prompts = np.array(make_prompts(rng, size, batch, prompt))  # a list would be split into single strings
            marks.append((time.perf_counter(), compiles.count))
            yield {"prompts": prompts}
        marks.append((time.perf_counter(), compiles.count))

    learner.train(batches())
    steps = cluster.actor_trainer.train_steps, cluster.critic_trainer.train_steps
    if set(lengths) != {(new,) * batch} or len(lengths) != iterations or steps != (4 * iterations,) * 2:
        raise RuntimeError(f"rollouts {lengths} and {steps} updates of policy and value in {iterations} iterations")
    return marks


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["sft", "reward", "generate", "ppo"], required=True)
    parser.add_argument("--size", choices=list(SIZES), default="42m")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    head = {
        "system": "tunix",
        "version": f"{tunix.__version__} (jax {jax.__version__})",
        "task": args.task,
        "model": args.size,
    }
    if args.task == "reward":
        print(json.dumps(head | {"unsupported": "Tunix has no reward-model trainer"}))
        return

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    size, calls, compiles = SIZES[args.size], WARMUP + args.repeats, CompileCounter()
    with contextlib.redirect_stdout(sys.stderr):  # standard output carries the JSON line alone
        if args.task == "sft":
            batch, prompt, new = 8, 256, 0
            marks = sft_marks(size, calls, compiles, batch=batch, length=prompt)
        else:
            batch, prompt, new = (16, 64, 128) if args.task == "generate" else (16, 64, 64)
            measure = generate_marks if args.task == "generate" else ppo_marks
            marks = measure(size, calls, compiles, batch=batch, prompt=prompt, new=new)
    if len(marks) != calls + 1:
        raise RuntimeError(f"{len(marks)} marks for {calls} steps")

    seconds = [after - before for (before, _), (after, _) in itertools.pairwise(marks)]
    median = statistics.median(seconds[WARMUP:])
    print(
        json.dumps(
            head
            | {
                "batch": batch,
                "prompt_len": prompt,
                "gen_len": new,
                "seconds_median": median,
                "seconds_min": min(seconds[WARMUP:]),
                "tokens_per_s": batch * (new or prompt) / median,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "compile_s": seconds[0] - median,
                "compiles_after_warmup": marks[-1][1] - marks[WARMUP][1],
            }
        )
    )


if __name__ == "__main__":
    main()
