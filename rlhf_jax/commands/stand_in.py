"""A model of 22 thousand parameters that half knows its sums, in place of a real one where there is only a CPU."""

from __future__ import annotations

from pathlib import Path

from rlhf_jax import sft
from rlhf_jax.config import ArchConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, SFTArgs, SFTConfig
from rlhf_jax.tasks import arithmetic

ARCH = ArchConfig(
    vocab_size=arithmetic.VOCABULARY, width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, ffn_width=64,
    max_positions=32, init_std=0.15,
)  # fmt: skip


def stand_in(directory: str = "stand_in", steps: int = 40) -> str:
    """A model's directory below `directory`, with a chat template; it is trained there the first time, in seconds.

    With a few more steps it would know all sums, and there would be nothing left to learn.

    Raises:
        UserError: the directory holds something else.
    """
    path = Path(directory)
    if not (tokenizer := path / "tokenizer").exists():
        arithmetic.make_tokenizer().save_pretrained(tokenizer)
    sft.run(
        SFTArgs(
            model=ModelConfig(arch=ARCH, tokenizer=str(tokenizer)),
            data=DataConfig(batch_size=16, max_prompt_length=12, max_length=20, eval_fraction=0.2),
            sft=SFTConfig(steps=steps, num_samples=0),
            optim=OptimConfig(learning_rate=1e-2, warmup_steps=10, schedule="linear", b2=0.99),
            run=RunConfig(output_dir=str(path / "sft"), eval_every=0, progress=False, report=False),
        ),
        rows=arithmetic.demonstrations(),
    )
    return str(path / "sft" / "model")
