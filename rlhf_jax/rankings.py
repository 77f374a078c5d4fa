"""From many raters' comparisons to strengths. Floor 0."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def bradley_terry(wins: Float[Array, "M M"], *, prior: float, num_steps: int = 200) -> Float[Array, " M"]:
    """Maximum-likelihood Bradley-Terry strengths (log scale, mean 0): P(i beats j) = sigmoid(s_i - s_j).

    Bradley and Terry 1952, by the minorise-maximise iteration of Hunter 2004. `wins[i, j]` counts how often i beat j;
    `prior` adds that many wins and losses of every item against one of strength 0, which keeps undefeated items finite.
    """
    games = wins + wins.T
    total_wins = wins.sum(axis=1) + prior

    def improve(gamma: Array, _: None) -> tuple[Array, None]:
        expected = jnp.sum(games / (gamma[:, None] + gamma[None, :]), axis=1) + 2 * prior / (gamma + 1.0)
        return total_wins / expected, None

    gamma, _ = jax.lax.scan(improve, jnp.ones(wins.shape[0], jnp.float32), None, length=num_steps)
    strengths = jnp.log(gamma)
    return strengths - strengths.mean()
