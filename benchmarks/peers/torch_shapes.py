"""The model and the tokenizer of the peers that run PyTorch."""

import tokenizers
import transformers

THREADS = 2


def config_of(size, **extra):
    """The shape under test, with no end-of-sequence token, so that nothing stops unless it is told to."""
    kind, head = transformers.LlamaConfig, size["width"] // size["heads"]
    if "experts" in size:
        kind = transformers.Qwen3MoeConfig
        extra |= dict(
            head_dim=head, num_experts=size["experts"], num_experts_per_tok=size["top"], norm_topk_prob=True,
            moe_intermediate_size=size["ffn"],
        )  # fmt: skip
    if "delta_heads" in size:
        kind = transformers.Qwen3_5TextConfig
        extra |= dict(
            head_dim=head, linear_num_key_heads=size["delta_heads"], linear_num_value_heads=size["delta_heads"],
            linear_key_head_dim=size["delta_width"], linear_value_head_dim=size["delta_width"],
        )  # fmt: skip
    return kind(
        hidden_size=size["width"], num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"], intermediate_size=size["ffn"], vocab_size=size["vocab"],
        max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype="float32", **extra,
    )  # fmt: skip


def policy_of(size):
    """A language model with random weights."""
    return transformers.AutoModelForCausalLM.from_config(config_of(size))


def make_tokenizer(vocab, eos=1):
    """Words are ids with spaces between; [PAD] is 0, which no row has."""
    special = {0: "[PAD]", 2: "[UNK]", eos: "[END]"}
    words = {special.get(i, str(i)): i for i in range(vocab)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="[END]", pad_token="[PAD]", unk_token="[UNK]"
    )
