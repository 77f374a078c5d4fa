"""From many raters' comparisons to strengths. Floor 0."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def bradley_terry(wins: Float[Array, "M M"], *, prior: float, num_steps: int = 50) -> Float[Array, " M"]:
    """Maximum-likelihood Bradley-Terry strengths (log scale, mean 0): P(i beats j) = sigmoid(s_i - s_j).

    Bradley and Terry 1952, by Newton's method. (Hunter's minorise-maximise iteration creeps, and is far off after
    thousands of steps, where an item is undefeated and the prior is weak.) `wins[i, j]` counts how often i beat j;
    `prior` adds that many wins and losses of every item against one of strength 0, which keeps the undefeated finite.
    """

    def improve(strengths: Array, _: None) -> tuple[Array, None]:
        loses = jax.nn.sigmoid(strengths[None, :] - strengths[:, None])  # [i, j]: i loses to j
        surprise, curvature = wins * loses, (wins + wins.T) * loses * loses.T
        below, above = jax.nn.sigmoid(-strengths), jax.nn.sigmoid(strengths)
        gradient = jnp.sum(surprise - surprise.T, axis=1) + prior * (below - above)
        diagonal = curvature.sum(axis=1) + 2 * prior * below * above
        # Without a prior nothing fixes the mean; the ridge makes the matrix regular and moves no optimum.
        hessian = jnp.diag(diagonal + 1e-6 * diagonal.mean()) - curvature
        step = jnp.linalg.solve(hessian, gradient)
        return strengths + step / jnp.maximum(jnp.abs(step).max(), 1.0), None  # no step above 1, lest it overshoot

    strengths, _ = jax.lax.scan(improve, jnp.zeros(wins.shape[0], jnp.float32), None, length=num_steps)
    return strengths - strengths.mean()
