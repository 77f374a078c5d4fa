"""What the methods share that learn from their own samples: prompts, rollouts, rewards, updates, the loop.

`core` is pure functions, `programs` compiles them, `method` is what stays, `iteration` one round, `loop` all of them.
"""
