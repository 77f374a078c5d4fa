"""What the methods share that learn from their own samples: prompts, rollouts, rewards, updates, the loop.

`core` is pure functions, `programs` compiles them, `stage` holds a method's parts, `loop` runs them.
"""
