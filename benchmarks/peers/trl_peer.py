"""One speed measurement of TRL 1.16, printed as one JSON line.

    python trl_peer.py --task {sft,reward,kwise4,kwise9,dpo,generate,grpo} --size {42m,5m} --lengths ragged --repeats 5

Steps are timed inside TRL's own trainers, from `on_step_begin` to `on_step_end`: forward, backward, clip at 1.0 and
fused AdamW, without the data loader; of GRPO with generation and rewards. A ranking of K responses is all its
K (K - 1) / 2 pairs, which is what `RewardTrainer` learns from. TRL has no sampler of its own: without vLLM its
trainers call `transformers`' `generate`, so that is what the generate task times. Every setting not named here is the
library's default, except that float32 replaces bfloat16, that gradient checkpointing, on by default in TRL, is off,
and that DPO's reference log-probs are computed before the first step, as ours are.
"""

import contextlib
import itertools
import os
import sys
import tempfile

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_DISABLED="true", TOKENIZERS_PARALLELISM="false",
    TRL_EXPERIMENTAL_SILENCE="1", CUDA_VISIBLE_DEVICES="", HF_HUB_DISABLE_TELEMETRY="1",
)  # fmt: skip

import torch
import transformers
import trl
from common import SIZES, WARMUP, Clock, left_padded, parse, rows, stop_ids, work_of
from datasets import Dataset
from torch_shapes import THREADS, config_of, make_tokenizer, policy_of

COMMON = dict(
    gradient_accumulation_steps=1, learning_rate=1e-5, max_grad_norm=1.0, bf16=False, fp16=False,
    gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
    disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip


class StepClock(transformers.TrainerCallback):
    """Times every optimiser step; `tokens` are those of the batches in order."""

    def __init__(self, clock, tokens):
        self.clock, self.tokens = clock, iter(tokens)

    def on_step_begin(self, *args, **kwargs):
        self.clock.begin()

    def on_step_end(self, *args, **kwargs):
        self.clock.end(next(self.tokens))


def pairs_of(row):
    return itertools.combinations(row.responses, 2)


def words(ids):
    """Text that the tokenizer reads as these ids, and that may stand behind other such text."""
    return "".join(f" {i}" for i in ids)


def trainer_of(task, size, batches, folder, clock):
    """A trainer whose steps are those of `batches`."""
    flat = [row for step in batches for row in step]
    pairs = [(row.prompt, *pair) for row in flat for pair in pairs_of(row)]
    num = len(pairs or flat) // len(batches)
    common = dict(output_dir=folder, per_device_train_batch_size=num, max_steps=len(batches), **COMMON)
    tokens = [sum(len(row.prompt) + len(ids) for row in step for ids in row.responses) for step in batches]
    given = dict(processing_class=make_tokenizer(size["vocab"]), callbacks=[StepClock(clock, tokens)])
    if task == "sft":
        columns = {
            "input_ids": [row.prompt + row.responses[0] for row in flat],
            "labels": [[-100] * len(row.prompt) + row.responses[0] for row in flat],
        }
        model, settings = policy_of(size), trl.SFTConfig(packing=False, **common)
        return trl.SFTTrainer(model=model, args=settings, train_dataset=Dataset.from_dict(columns), **given)
    if task == "dpo":
        texts = [[words(pair[0]), *(words(ids[:-1]) + " [END]" for ids in pair[1:])] for pair in pairs]
        columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*texts, strict=True)), strict=True))
        model = policy_of(size)
        settings = trl.DPOConfig(precompute_ref_log_probs=True, **common)
        return trl.DPOTrainer(model=model, args=settings, train_dataset=Dataset.from_dict(columns), **given)
    columns = {
        "chosen_ids": [prompt + chosen for prompt, chosen, _ in pairs],
        "rejected_ids": [prompt + rejected for prompt, _, rejected in pairs],
    }
    model = transformers.AutoModelForSequenceClassification.from_config(config_of(size, num_labels=1))
    return trl.RewardTrainer(
        model=model, args=trl.RewardConfig(**common), train_dataset=Dataset.from_dict(columns), **given
    )


def train(task, size, batches, clock):
    """Time the steps on `batches`, in their order, and see that they had all rows and no more padding than asked."""
    shapes = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(task, size, batches, folder, clock)
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        collate = trainer.data_collator

        def counting_collate(examples):
            out = collate(examples)
            shapes.append(tuple(out["input_ids"].shape))
            return out

        trainer.data_collator = counting_collate
        trainer.train()
    sequences = len(batches[0]) * (1 if task == "sft" else 2 * len(list(pairs_of(batches[0][0]))))
    widths = [max(len(row.prompt) + len(ids) for row in step for ids in row.responses) for step in batches]
    if shapes != [(sequences, width) for width in widths]:
        raise RuntimeError(f"measured batches {shapes}, not {sequences} rows of {widths}")


def train_grpo(size, batches, work, stops, clock):
    """Time iterations of `GRPOTrainer`: generation, rewards at random and one optimiser step."""
    drawn = []

    def reward(completion_ids, **kwargs):
        drawn.append(sum(map(len, completion_ids)))
        return torch.rand(len(completion_ids)).tolist()

    model = policy_of(size)
    model.generation_config.eos_token_id = stops
    prompts = [words(row.prompt) for step in batches for row in step]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=trl.GRPOConfig(
                output_dir=folder, per_device_train_batch_size=work.sequences, max_steps=len(batches),
                num_generations=work.responses, max_completion_length=work.new, shuffle_dataset=False, **COMMON,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=make_tokenizer(size["vocab"], eos=stops[0]),
            callbacks=[StepClock(clock, (drawn[i] for i in itertools.count()))],
        )  # fmt: skip
        trainer.train()


def generate(size, batches, work, stops, clock):
    """Time generations: of exactly `new` tokens with filters, or of up to as many by temperature alone."""
    model = policy_of(size).eval()
    law = dict(top_k=0, top_p=1.0, eos_token_id=stops) if stops else dict(top_k=50, top_p=0.9, min_new_tokens=work.new)
    sampling = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, max_new_tokens=work.new, pad_token_id=0, **law
    )
    for step in batches:
        width = max(len(row.prompt) for row in step)
        ids, mask = (torch.from_numpy(x) for x in left_padded(step, width))
        clock.begin()
        out = model.generate(input_ids=ids.long(), attention_mask=mask.long(), generation_config=sampling)
        new = out[:, width:]
        ended = torch.isin(new, torch.tensor(stops, dtype=new.dtype)).cumsum(1)
        clock.end(int((ended == 0).sum() + (ended.max(1).values > 0).sum()))
        if len(out) != work.prompts or (not stops and new.shape[1] != work.new):
            raise RuntimeError(f"generated {tuple(new.shape)}, not {(work.prompts, work.new)}")


def main():
    args = parse(__doc__, ("sft", "reward", "kwise4", "kwise9", "dpo", "generate", "grpo"), tuple(SIZES))
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    size, work, clock = SIZES[args.size], work_of(args.task, args.lengths), Clock(args.turns)
    batches = rows(args.task, args.lengths, size["vocab"], WARMUP + args.repeats)
    stops = stop_ids(args.lengths, size["vocab"])

    with contextlib.redirect_stdout(sys.stderr):  # standard output carries the JSON line alone
        if args.task == "generate":
            generate(size, batches, work, stops, clock)
        elif args.task == "grpo":
            train_grpo(size, batches, work, stops, clock)
        else:
            train(args.task, size, batches, clock)
    version = f"{trl.__version__} (torch {torch.__version__}, transformers {transformers.__version__})"
    clock.report(args, "trl", version, None)


if __name__ == "__main__":
    main()
