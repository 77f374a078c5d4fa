"""State, step and loop of training on rows that stay as they are."""
