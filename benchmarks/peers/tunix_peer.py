"""One speed measurement of Tunix 0.1.7: SFT, generation or PPO, printed as one JSON line.

    python tunix_peer.py --task {sft,generate,ppo,grpo} --size {42m,5m} --lengths ragged --repeats 5

SFT is `PeftTrainer` on all parameters, generation its own `Sampler`, PPO its `PPOLearner` on an `RLCluster` with
separate policy, reference, value and reward models, GRPO its `GRPOLearner` without a price of the KL. Tunix has no
trainer of reward models or DPO. Three adaptations: one step in flight, so that a step has an end to time; a scalar
head of our own, because `create_critic_model` replaces an `lm_head` that tied embeddings do not have; and GRPO's loss
is the mean over tokens, because the default divides a response of a stop token alone by its length 0.
"""

import contextlib
import os
import sys
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
from common import SIZES, WARMUP, Clock, parse, rows, stop_ids, work_of
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.dummy_model_creator import create_dummy_model
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft import utils as sft_utils
from tunix.sft.hooks import TrainingHooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput


class CompileCounter:
    """The number of programs XLA has compiled since it was made."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event, duration, **kwargs):
        self.count += event == "/jax/core/compile/backend_compile_duration"


class IdTokenizer:
    """Text is token ids with spaces between; 0, which no row has, is padding, and ends are told by other means."""

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
        return 0


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


def texts(step):
    return [" ".join(map(str, row.prompt)) for row in step]


class StepClock(TrainingHooks):
    """Times every step: the first begins with training, the others where the one before ends.

    With one step in flight the trainer waits for the loss of a step before it starts the next.
    """

    def __init__(self, clock, compiles, tokens):
        self.clock, self.compiles, self.tokens, self.compiled = clock, compiles, iter(tokens), []

    def on_train_step_start(self, *args):
        if self.compiled:
            self.on_train_end()
        self.clock.begin()
        self.compiled.append(self.compiles.count)

    def on_train_end(self, *args):
        self.clock.end(next(self.tokens))

    def on_train_start(self, *args): ...
    def on_train_step_end(self, *args): ...
    def on_eval_step_start(self, *args): ...
    def on_eval_step_end(self, *args): ...


def train_sft(size, batches, work, clock, compiles):
    """Time SFT steps on `batches`, padded to the work's length; returns the compile count before each."""
    ids = [[row.prompt + row.responses[0] for row in step] for step in batches]
    inputs = [
        TrainingInput(
            input_tokens=np.array([row + [0] * (work.prompt - len(row)) for row in step], np.int32),
            input_mask=np.array([np.arange(work.prompt) < len(row) for row in step]),
        )
        for step in ids
    ]
    trainer = PeftTrainer(
        make_model(size, 0),
        make_optimizer(),
        TrainingConfig(eval_every_n_steps=10**9, max_steps=len(inputs), max_inflight_computations=1),
    ).with_gen_model_input_fn(
        lambda x: {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": sft_utils.build_positions_from_mask(x.input_mask),
            "attention_mask": sft_utils.make_causal_attn_mask(x.input_mask),
        }
    )
    hooks = StepClock(clock, compiles, [sum(map(len, step)) for step in ids])
    trainer.with_training_hooks(hooks)
    trainer.train(inputs)
    return hooks.compiled


def drawn(tokens, work):
    """Tokens of each response; Tunix leaves the stop token out."""
    return [min(len(ids) + 1, work.new) for ids in tokens]


def generate(size, batches, work, stops, clock, compiles):
    """Time generations: of exactly `new` tokens with filters, or of up to as many by temperature alone."""
    heads = size["heads"]
    sampler = Sampler(
        make_model(size, 0),
        IdTokenizer(size["vocab"]),
        CacheConfig(
            cache_size=work.prompt + work.new, num_layers=size["layers"], num_kv_heads=heads,
            head_dim=size["width"] // heads,
        ),
    )  # fmt: skip
    law, compiled = dict(top_p=1.0, eos_tokens=stops) if stops else dict(top_p=0.9, top_k=50), []
    for call, step in enumerate(batches):
        compiled.append(compiles.count)
        clock.begin()
        out = sampler(
            texts(step), max_generation_steps=work.new, max_prompt_length=work.prompt, temperature=1.0, seed=call,
            **law,
        )  # fmt: skip
        lengths = drawn(out.tokens, work)
        clock.end(sum(lengths))
        if len(lengths) != work.prompts or (not stops and set(lengths) != {work.new}):
            raise RuntimeError(f"generated sequences of {lengths}, not {work.prompts} of {work.new}")
    return compiled


def iterate(task, size, batches, work, stops, clock, compiles):
    """Time iterations of PPO or GRPO; returns the compile count before each."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    others = {}
    if task == "ppo":
        scalar = dict(critic=make_model(size, 1, ScalarLlama), reward=make_model(size, 2, ScalarLlama))
        others = dict(reference=make_model(size, 0), **scalar)
    cluster = RLCluster(
        actor=make_model(size, 0),
        tokenizer=IdTokenizer(size["vocab"]),
        cluster_config=ClusterConfig(
            role_to_mesh=dict.fromkeys(Role, mesh),
            training_config=RLTrainingConfig(
                actor_optimizer=make_optimizer(), critic_optimizer=make_optimizer(), eval_every_n_steps=10**9,
                max_steps=10**9, mini_batch_size=work.prompts, train_micro_batch_size=work.prompts,
                max_inflight_computations=1,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=work.new, max_prompt_length=work.prompt, kv_cache_size=work.prompt + work.new,
                temperature=1.0, top_p=1.0, top_k=None, eos_tokens=stops or None,
            ),
        ),
        **others,
    )  # fmt: skip
    if task == "ppo":
        learner = PPOLearner(rl_cluster=cluster, ppo_config=PPOConfig(num_iterations=4))
    else:
        rng = np.random.default_rng(0)
        learner = GRPOLearner(
            rl_cluster=cluster,
            reward_fns=lambda prompts, completions, **_: rng.random(len(completions)).tolist(),
            algo_config=GRPOConfig(
                num_generations=work.responses, num_iterations=1, beta=0.0, loss_agg_mode="token-mean"
            ),
        )
    lengths, plain_generate, compiled = [], cluster.generate, []

    def checked_generate(*args, **kwargs):
        out = plain_generate(*args, **kwargs)
        lengths.append(drawn(out.tokens, work))
        return out

    cluster.generate = checked_generate

    def pulled():  # the learner pulls a batch at the start of an iteration, after the one before has finished
        for number, step in enumerate(batches):
            prompts = np.array(texts(step))  # a list would be split into single strings
            if number:
                clock.end(sum(lengths[-1]))
            clock.begin()
            compiled.append(compiles.count)
            yield {"prompts": prompts}
        clock.end(sum(lengths[-1]))

    learner.train(pulled())
    full = [[work.new] * work.sequences] * len(batches)
    if list(map(len, lengths)) != list(map(len, full)) or (not stops and lengths != full):
        raise RuntimeError(f"rollouts {lengths} in {len(batches)} iterations")
    return compiled


def main():
    args = parse(__doc__, ("sft", "generate", "ppo", "grpo"))
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    size, work, compiles = SIZES[args.size], work_of(args.task, args.lengths), CompileCounter()
    stops, clock = stop_ids(args.lengths, size["vocab"]), Clock(args.turns)
    batches = rows(args.task, args.lengths, size["vocab"], WARMUP + args.repeats)
    with contextlib.redirect_stdout(sys.stderr):  # standard output carries the JSON line alone
        if args.task == "sft":
            compiled = train_sft(size, batches, work, clock, compiles)
        elif args.task == "generate":
            compiled = generate(size, batches, work, stops, clock, compiles)
        else:
            compiled = iterate(args.task, size, batches, work, stops, clock, compiles)
    clock.report(args, "tunix", f"{tunix.__version__} (jax {jax.__version__})", compiles.count - compiled[WARMUP])


if __name__ == "__main__":
    main()
