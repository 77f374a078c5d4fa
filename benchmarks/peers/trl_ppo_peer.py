"""One speed measurement of PPO in TRL 1.12, the last release with a PPO trainer, printed as one JSON line.

    python trl_ppo_peer.py --task ppo --size {42m,5m} --lengths ragged --repeats 5

A measurement is one whole iteration of `trl.experimental.ppo.PPOTrainer`: the rollout, the scoring by the policy,
reference, value and reward models, and four epochs of one minibatch; it runs from one `on_step_end` to the next.
The four models are separate. Differences from the other peers that are TRL's own: policy and value model share one
backward and one AdamW, gradients are not clipped, and the rollout's log-probabilities are the sampler's.
Gradient checkpointing and bfloat16, on by default, are off.
"""

import contextlib
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
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

EPOCHS = 4


class IterationClock(transformers.TrainerCallback):
    """Times every PPO iteration: the first begins with training, the others where the one before ends."""

    def __init__(self, clock, drawn):
        self.clock, self.drawn = clock, drawn

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.end(self.drawn[-1])
        if len(self.clock.steps) < state.max_steps:
            self.clock.begin()


def run(size, batches, work, stops, clock):
    """Time the PPO iterations on `batches`."""
    policy = policy_of(size)
    reference = policy_of(size)
    reference.load_state_dict(policy.state_dict())
    reward, value = (
        transformers.AutoModelForSequenceClassification.from_config(config_of(size, num_labels=1)) for _ in range(2)
    )

    width, drawn, plain_generate = max(len(row.prompt) for step in batches for row in step), [], policy.generate

    def checked_generate(*args, **kwargs):
        out = plain_generate(*args, **kwargs)
        new = out.sequences[:, width:]
        ended = torch.isin(new, torch.tensor(stops, dtype=new.dtype)).cumsum(1)
        drawn.append(int((ended == 0).sum() + (ended.max(1).values > 0).sum()))
        if len(new) != work.prompts or (not stops and new.shape[1] != work.new):
            raise RuntimeError(f"rollout of {tuple(new.shape)}, not {(work.prompts, work.new)}")
        return out

    def truncate(stop_token_id, pad_token_id, responses):
        """TRL's `truncate_response`, for a list of stop ids."""
        ends = ppo_trainer.first_true_indices(torch.isin(responses, torch.tensor(stops))).unsqueeze(-1)
        return torch.masked_fill(responses, torch.arange(responses.shape[1]) > ends, pad_token_id)

    policy.generate = checked_generate
    ppo_trainer.truncate_response = truncate
    tokenizer = make_tokenizer(size["vocab"])
    ids = [
        torch.where(torch.from_numpy(mask), torch.from_numpy(tokens).long(), tokenizer.pad_token_id)
        for tokens, mask in (left_padded(step, width) for step in batches)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder, per_device_train_batch_size=work.prompts, gradient_accumulation_steps=1,
                num_mini_batches=1, num_ppo_epochs=EPOCHS, local_rollout_forward_batch_size=work.prompts,
                response_length=work.new, temperature=1.0, total_episodes=work.prompts * len(batches),
                num_sample_generations=0, learning_rate=1e-6, bf16=False, fp16=False, gradient_checkpointing=False,
                use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            ),
            processing_class=tokenizer,
            model=policy, ref_model=reference, reward_model=reward, value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": torch.cat(ids).tolist()}),
            data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
            callbacks=[IterationClock(clock, drawn)],
        )  # fmt: skip
        if stops:  # a field of the config takes one id only
            policy.generation_config.eos_token_id = trainer.stop_token_id = stops
        trainer.train()


def main():
    args = parse(__doc__, ("ppo",), tuple(SIZES))
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    size, clock = SIZES[args.size], Clock(args.turns)
    stops = stop_ids(args.lengths, size["vocab"])
    batches = rows("ppo", args.lengths, size["vocab"], WARMUP + args.repeats)
    with contextlib.redirect_stdout(sys.stderr):  # standard output carries the JSON line alone
        run(size, batches, work_of("ppo", args.lengths), stops, clock)
    version = f"{trl.__version__} (torch {torch.__version__}, transformers {transformers.__version__})"
    clock.report(args, "trl", version, None)


if __name__ == "__main__":
    main()
