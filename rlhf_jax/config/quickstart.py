"""The whole chain on a toy."""

from __future__ import annotations

from rlhf_jax.config.checks import SEEDS, check
from rlhf_jax.config.settings import PathText, settings


@settings
class QuickstartArgs:
    """`rlhf-jax quickstart`: SFT, reward model and PPO on random walks, made on the fly.

    Args:
        output_dir: where the stages and the report go.
        seed: of the graph, the data and the training.
        overwrite: replace an earlier quickstart in `output_dir`.
        progress: show progress bars.
        rounds: rounds of comparisons, reward model and PPO.
        comparisons: pairs of sampled walks that the simulated rater sees in a round; ties are left out.
        rater_noise: probability that the rater errs.
        iterations: PPO iterations of a round.
    """

    output_dir: PathText = "runs/quickstart"
    seed: int = 0
    overwrite: bool = False
    progress: bool = True
    rounds: int = 2
    comparisons: int = 6000
    rater_noise: float = 0.1
    iterations: int = 70

    def __post_init__(self) -> None:
        check(
            self, "", {"at least 1": "rounds comparisons iterations", "between 0 and 1": "rater_noise", SEEDS: "seed"}
        )
