"""The best of n responses."""

from __future__ import annotations

from rlhf_jax.config.feedback import DrawArgs
from rlhf_jax.config.settings import PathText, settings


@settings
class BestOfNArgs(DrawArgs):
    """All of `rlhf-jax bestofn`: several responses to every prompt, of which a reward chooses one.

    Args:
        num_samples: N, responses to each prompt; rewards are reported of the best of n = 1, 2, 4 .. N of them.
        output: the .jsonl file to write, a row {prompt, response, response_ids, finished, score} per prompt. Until it
            is whole, OUTPUT.part holds what there is; the same command goes on.
    """

    num_samples: int = 16
    output: PathText = ""
