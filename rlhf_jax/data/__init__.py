"""From rows to step-indexed numpy batches: sources -> schemas -> tokenizer -> examples -> batches. Imports no jax."""
