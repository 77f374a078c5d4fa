"""The model and the tokenizer of the peers that run PyTorch."""

import tokenizers
import transformers

THREADS = 2


def llama_config(size, **extra):
    """The Llama shape under test, with no end-of-sequence token, so that nothing stops unless it is told to."""
    return transformers.LlamaConfig(
        hidden_size=size["width"], num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"], intermediate_size=size["ffn"], vocab_size=size["vocab"],
        max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype="float32", **extra,
    )  # fmt: skip


def make_tokenizer(vocab, eos=1):
    """Words are ids with spaces between; [PAD] is 0, which no row has."""
    special = {0: "[PAD]", 2: "[UNK]", eos: "[END]"}
    words = {special.get(i, str(i)): i for i in range(vocab)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="[END]", pad_token="[PAD]", unk_token="[UNK]"
    )
