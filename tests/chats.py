"""Chat templates of every family, in our words, conversations, and a tokenizer that has all their special tokens."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>"]
SPECIAL += ["[INST]", "[/INST]", "<|U|>", "<|A|>", "<|done|>", "<|over|>"]
ADDED = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
]  # as Qwen's: they stay where special tokens are left out
WORDS = (
    r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Llama 3's kind
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEAF = CHATML.partition("{% if add_generation_prompt")[0]  # knows no add_generation_prompt
TRIMS = CHATML.replace("m.content", "m.content | trim")
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TWO_CLOSE = (  # as Command-R's
    "{% for m in messages %}{{ ('<|U|>' if m.role == 'user' else '<|A|>') + m.content + '<|over|><|done|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|A|>' }}{% endif %}"
)
DEEPSEEK = (  # the prompt opens a thought, which answers of the past do not have
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|A|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '<|U|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|A|><think>\n' }}{% endif %}"
)
THINKS = """
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set parts = m.content.split('</think>') %}
{%- set thought = m.reasoning_content or (parts[0].split('<think>')[-1] if parts | length > 1 else '') %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.last %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}
{{- parts[-1].lstrip('\n') + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}OPENING{%- endif %}"""
EMPTY_THOUGHT = THINKS.replace("OPENING", "")  # as Qwen 3's: the last answer has a thought, if an empty one
OPENED_THOUGHT = THINKS.replace("OPENING", "{{- '<think>\n' }}")  # as Qwen 3 Thinking's

TEMPLATES = {
    "chatml": CHATML,
    "deaf": DEAF,
    "trims": TRIMS,
    "default system": DEFAULT_SYSTEM,
    "llama": LLAMA,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi": PHI,
    "two close": TWO_CLOSE,
    "deepseek": DEEPSEEK,
    "empty thought": EMPTY_THOUGHT,
    "opened thought": OPENED_THOUGHT,
}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def answer(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


TALK = [user("a"), answer("b"), user("c")]
CONVERSATIONS = {
    "plain": ([user("hi there")], answer("yes, it is")),
    "blanks": ([user(" hi\n")], answer(" yes \n")),
    "line breaks": ([user("hi")], answer("\nyes\n\n")),
    "system": ([{"role": "system", "content": "Be brief."}, user("hi")], answer("yes")),
    "several turns": (TALK, answer("d 茶 😀")),
    "thought": ([user("hi")], answer("<think>\nhm\n</think>\n\nyes")),
    "thought apart": ([user("hi")], answer("yes", reasoning_content="hm")),
}


def chat_tokenizer(template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE that cuts words as Llama 3's does and joins two line breaks; <eos> ends a text."""
    names = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "Ġy", "ye"]
    merges = [("Ċ", "Ċ"), ("Ġ", "y"), ("y", "e")]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, merges))
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([*names[:3], *SPECIAL])
    fast.add_tokens(ADDED)
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")
    hf.chat_template = template
    return hf
