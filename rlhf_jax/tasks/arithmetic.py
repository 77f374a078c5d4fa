"""Small sums in the form of GSM8K: what stands in for a real data set where there is only a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.tasks.gsm8k import prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 362
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def solution(answer: int) -> str:
    """How an answer is written, which may be wrong."""
    return f"That makes {answer}.\n#### {answer}"


def questions(seed: int = 0) -> list[dict[str, str]]:
    """The 25 sums of two numbers below 5 in random order, as rows {question, answer} like those of GSM8K."""
    pairs = [divmod(i, 5) for i in np.random.default_rng(seed).permutation(25).tolist()]
    return [{"question": f"What is {a} + {b}?", "answer": solution(a + b)} for a, b in pairs]


def demonstrations(seed: int = 0) -> list[dict[str, Any]]:
    """Rows {prompt, answer, response} with the prompts of `gsm8k.prompts`."""
    rows = questions(seed)
    return [{**prompt, "response": row["answer"]} for prompt, row in zip(prompts(rows), rows, strict=True)]


def preferences(seed: int = 0) -> list[dict[str, Any]]:
    """Rows {chosen, rejected} of conversations: each sum with its right answer, and with two wrong ones."""
    draw, rows = np.random.default_rng(seed), []
    for row in demonstrations(seed):
        for wrong in draw.choice([n for n in range(9) if n != int(row["answer"])], 2, replace=False).tolist():
            texts = {"chosen": row["response"], "rejected": solution(wrong)}
            rows.append({n: [*row["prompt"], {"role": "assistant", "content": text}] for n, text in texts.items()})
    return rows


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and what the texts need, VOCABULARY tokens, with ChatML's template; a digit is a token of its own."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(models.BPE())
    digits, whole = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, whole])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = ["assistant\n"] * 25
    for row in demonstrations():
        texts += [f"user\n{row['prompt'][0]['content']}", row["response"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0])
    made.chat_template = TEMPLATE
    return made
