"""One speed measurement of TRL 1.16: SFT, reward modelling or generation, printed as one JSON line.

    python trl_peer.py --task {sft,reward,generate} --size {42m,5m} --repeats 5

SFT and reward steps are timed inside TRL's own trainers, from `on_step_begin` to `on_step_end`: forward, backward,
clip at 1.0 and fused AdamW, without the data loader. TRL has no sampler of its own: without vLLM its trainers call
`transformers`' `generate`, so that is what the generate task times. Every setting not named here is the library's
default, except that float32 replaces bfloat16 and gradient checkpointing, on by default in TRL, is off.
"""

import argparse
import contextlib
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

SIZES = {
    "42m": dict(width=512, layers=8, heads=8, ffn=1408, vocab=32000),
    "5m": dict(width=256, layers=4, heads=4, ffn=704, vocab=4096),
}
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
    """A word-level tokenizer the trainers insist on and never tokenize with; padding lies outside the model's ids."""
    words = {str(i): i for i in range(vocab)} | {"[PAD]": vocab}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="1", pad_token="[PAD]", unk_token="0"
    )


class StepClock(transformers.TrainerCallback):
    """Wall-clock seconds of every optimiser step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def train_seconds(task, size, steps, *, batch, length):
    """Seconds of each of `steps` optimiser steps of `SFTTrainer` or `RewardTrainer` on full batches of random ids."""
    rng = np.random.default_rng(0)

    def rows():
        return rng.integers(1, size["vocab"], (batch * steps, length)).tolist()

    common = dict(
        per_device_train_batch_size=batch, gradient_accumulation_steps=1, max_steps=steps, max_length=length,
        learning_rate=1e-5, max_grad_norm=1.0, bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        if task == "sft":
            ids = rows()
            trainer = trl.SFTTrainer(
                model=transformers.LlamaForCausalLM(llama_config(size)),
                args=trl.SFTConfig(output_dir=folder, packing=False, **common),
                train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
                processing_class=make_tokenizer(size["vocab"]),
                callbacks=[clock],
            )
        else:
            trainer = trl.RewardTrainer(
                model=transformers.LlamaForSequenceClassification(llama_config(size, num_labels=1)),
                args=trl.RewardConfig(output_dir=folder, **common),
                train_dataset=Dataset.from_dict({"chosen_ids": rows(), "rejected_ids": rows()}),
                processing_class=make_tokenizer(size["vocab"]),
                callbacks=[clock],
            )
        batches = []
        collate = trainer.data_collator

        def counting_collate(examples):
            out = collate(examples)
            batches.append(tuple(out["input_ids"].shape))
            return out

        trainer.data_collator = counting_collate
        trainer.train()
    expected = (batch if task == "sft" else 2 * batch, length)
    if set(batches) != {expected} or len(clock.seconds) != steps:
        raise RuntimeError(f"measured batches {set(batches)} and {len(clock.seconds)} steps, not {expected} x {steps}")
    return clock.seconds


def generate_seconds(size, calls, *, batch, prompt, new):
    """Seconds of each of `calls` sampled generations of exactly `new` tokens."""
    model = transformers.LlamaForCausalLM(llama_config(size)).eval()
    sampling = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_p=0.9, top_k=50, min_new_tokens=new, max_new_tokens=new
    )
    seconds = []
    for call in range(calls):
        ids = torch.randint(1, size["vocab"], (batch, prompt), generator=torch.Generator().manual_seed(call))
        start = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=sampling)
        seconds.append(time.perf_counter() - start)
        if tuple(out.shape) != (batch, prompt + new):
            raise RuntimeError(f"generated {tuple(out.shape)}, not {(batch, prompt + new)}")
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["sft", "reward", "generate"], required=True)
    parser.add_argument("--size", choices=list(SIZES), default="42m")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    size, calls = SIZES[args.size], WARMUP + args.repeats

    with contextlib.redirect_stdout(sys.stderr):  # standard output carries the JSON line alone
        if args.task == "generate":
            batch, prompt, new = 16, 64, 128
            seconds = generate_seconds(size, calls, batch=batch, prompt=prompt, new=new)
            tokens = batch * new
        else:
            rows, prompt, new = 8, 256, 0
            seconds = train_seconds(args.task, size, calls, batch=rows, length=prompt)
            batch = 2 * rows if args.task == "reward" else rows  # 8 pairs are 16 sequences
            tokens = batch * prompt

    median = statistics.median(seconds[WARMUP:])
    print(
        json.dumps(
            {
                "system": "trl",
                "version": f"{trl.__version__} (torch {torch.__version__}, transformers {transformers.__version__})",
                "task": args.task,
                "model": args.size,
                "batch": batch,
                "prompt_len": prompt,
                "gen_len": new,
                "seconds_median": median,
                "seconds_min": min(seconds[WARMUP:]),
                "tokens_per_s": tokens / median,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "compile_s": seconds[0] - median,
                "compiles_after_warmup": None,
            }
        )
    )


if __name__ == "__main__":
    main()
