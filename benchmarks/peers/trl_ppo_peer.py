"""One speed measurement of PPO in TRL 1.12, the last release with a PPO trainer, printed as one JSON line.

    python trl_ppo_peer.py --task ppo --size {42m,5m} --repeats 5

A measurement is one whole iteration of `trl.experimental.ppo.PPOTrainer`: the rollout, the scoring by the policy,
reference, value and reward models, and four epochs of one minibatch; it runs from one `on_step_end` to the next.
The four models are separate. Differences from the other peers that are TRL's own: policy and value model share one
backward and one AdamW, gradients are not clipped, and the rollout's log-probabilities are the sampler's.
Gradient checkpointing and bfloat16, on by default, are off.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_DISABLED="true", TOKENIZERS_PARALLELISM="false",
    TRL_EXPERIMENTAL_SILENCE="1", CUDA_VISIBLE_DEVICES="", HF_HUB_DISABLE_TELEMETRY="1",
)  # fmt: skip

import numpy as np
import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer

SIZES = {
    "42m": dict(width=512, layers=8, heads=8, ffn=1408, vocab=32000),
    "5m": dict(width=256, layers=4, heads=4, ffn=704, vocab=4096),
}
BATCH, PROMPT, NEW, EPOCHS = 16, 64, 64, 4
WARMUP = 2
THREADS = 2


def llama_config(size, **extra):
    """The Llama shape under test, with no end-of-sequence token, so that nothing stops generation early."""
    return transformers.LlamaConfig(
        hidden_size=size["width"], num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"], intermediate_size=size["ffn"], vocab_size=size["vocab"],
        max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype="float32", **extra,
    )  # fmt: skip


def make_tokenizer(vocab):
    """A word-level tokenizer for the padding id, which lies outside the model's ids: no sampled token is padding."""
    words = {str(i): i for i in range(vocab)} | {"[PAD]": vocab}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="1", pad_token="[PAD]", unk_token="0"
    )


class IterationClock(transformers.TrainerCallback):
    """Wall-clock time at the start of training and at the end of every PPO iteration."""

    def __init__(self):
        self.times = []

    def on_train_begin(self, *args, **kwargs):
        self.times.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())


def iteration_seconds(size, iterations):
    """Seconds of each of `iterations` PPO iterations."""
    policy = transformers.LlamaForCausalLM(llama_config(size))
    reference = transformers.LlamaForCausalLM(llama_config(size))
    reference.load_state_dict(policy.state_dict())
    reward, value = (transformers.LlamaForSequenceClassification(llama_config(size, num_labels=1)) for _ in range(2))

    shapes, plain_generate = [], policy.generate

    def checked_generate(*args, **kwargs):
        out = plain_generate(*args, **kwargs)
        shapes.append(tuple(out.sequences.shape))
        return out

    policy.generate = checked_generate
    ids = np.random.default_rng(0).integers(1, size["vocab"], (BATCH * iterations, PROMPT)).tolist()
    clock = IterationClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
                num_mini_batches=1, num_ppo_epochs=EPOCHS, local_rollout_forward_batch_size=BATCH,
                response_length=NEW, temperature=1.0, total_episodes=BATCH * iterations, num_sample_generations=0,
                learning_rate=1e-6, bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=True,
                report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            ),
            processing_class=make_tokenizer(size["vocab"]),
            model=policy, ref_model=reference, reward_model=reward, value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    if set(shapes) != {(BATCH, PROMPT + NEW)} or len(shapes) != iterations or len(clock.times) != iterations + 1:
        raise RuntimeError(f"rollouts {shapes} and {len(clock.times) - 1} iterations, not {iterations} full batches")
    return [after - before for before, after in itertools.pairwise(clock.times)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["ppo"], default="ppo")
    parser.add_argument("--size", choices=list(SIZES), default="42m")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)

    with contextlib.redirect_stdout(sys.stderr):  # standard output carries the JSON line alone
        seconds = iteration_seconds(SIZES[args.size], WARMUP + args.repeats)

    median = statistics.median(seconds[WARMUP:])
    print(
        json.dumps(
            {
                "system": "trl",
                "version": f"{trl.__version__} (torch {torch.__version__}, transformers {transformers.__version__})",
                "task": args.task,
                "model": args.size,
                "batch": BATCH,
                "prompt_len": PROMPT,
                "gen_len": NEW,
                "seconds_median": median,
                "seconds_min": min(seconds[WARMUP:]),
                "tokens_per_s": BATCH * NEW / median,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "compile_s": seconds[0] - median,
                "compiles_after_warmup": None,
            }
        )
    )


if __name__ == "__main__":
    main()
