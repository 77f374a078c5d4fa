"""What a network says of the responses of a batch, whether they are padded one by one or packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rlhf_jax.hosts.processes import say
from rlhf_jax.models import Model
from rlhf_jax.models.experts import Routing
from rlhf_jax.models.loading import Loaded
from rlhf_jax.models.members import scored
from rlhf_jax.tokens import Packed
from rlhf_jax.training.packing import over_views
from rlhf_jax.training.sums import Differences, differences
from rlhf_jax.types import Batch, Metrics, Params

Says = Callable[[Model, Params, Packed], Float[Array, "R ..."]]
"""A number for every response of a view [M, S], or one of each member; 0 for those that it does not hold."""

OfSaid = Callable[[Float[Array, "B K"], Batch], tuple[Array, Metrics]]
"""A loss of what a network says of the responses of a batch."""


@dataclass(frozen=True)
class Ensemble:
    """Reward models that score together; their parameters are a list of each one's.

    Attributes:
        sources: each as it was loaded, without its parameters.
    """

    sources: tuple[Loaded, ...]

    @property
    def models(self) -> tuple[Model, ...]:
        """Those that compute."""
        return tuple(one.model for one in self.sources)


def first_of(params: Params | list[Params]) -> Params:
    """The parameters of a model, of an ensemble those of its first."""
    return params[0] if isinstance(params, list) else params


def view_of(batch: Batch) -> Packed:
    """The view of a batch: that of a microbatch of packed rows, else its B K rows, each a sequence of its own."""
    if "packed" in batch:
        return batch["packed"]
    tokens, positions, segment_ids = (
        batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "positions", "segment_ids")
    )
    rows, width = tokens.shape[0], batch["last"].shape[1]
    prompts = batch.get("prompt_lengths", jnp.ones(rows // width, jnp.int32))  # scores need no more than the ends
    place = positions - jnp.repeat(prompts, width)[:, None] + 1
    speaks = (segment_ids > 0) & (place >= 0)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    ends = speaks & (positions == batch["last"].reshape(-1, 1))
    return Packed(tokens, positions, segment_ids, jnp.where(speaks, row, rows), place, ends, num_rows=rows)


def of_view(batch: Batch, view: Packed) -> Batch:
    """The batch with weights 0 for examples that the view does not hold: losses add up over microbatches."""
    if "packed" not in batch:
        return batch
    return of_rows(batch, view.rows.reshape(len(batch["weights"]), -1))  # all responses of an example, or none


def of_rows(batch: Batch, held: Bool[Array, "B K"]) -> Batch:
    """The batch with weights 0 for responses that are not held."""
    weighed = {"weights": batch["weights"] * held.any(axis=1)}
    if "token_weights" in batch:
        weighed["token_weights"] = batch["token_weights"] * held
    return {**batch, **weighed}


def no_sums(loss: OfSaid, batch: Batch, *, baseline: bool) -> Differences:
    """What of a loss is no sum over the rows of a batch, where a network said random numbers.

    With `baseline` all but the first response have one log-ratio to the reference, as KTO's `prepare` makes it.
    """
    rng = np.random.default_rng(0)
    said = -rng.uniform(1, 9, batch["last"].shape).astype(np.float32)
    ratios = rng.normal(size=said.shape).astype(np.float32)
    if baseline:
        ratios[:, 1:] = 0.3
    batch = {**batch, "ref_logprobs": said - ratios}

    def of_held(rows: Array) -> tuple[Array, Metrics]:
        held = jnp.broadcast_to(rows[:, None], said.shape)
        heard = held.at[:, 1:].set(True) if baseline else held
        return loss(jnp.where(heard, said, 0.0), of_rows(batch, held))

    return differences(of_held, len(said))


def response_scores(model: Model | Ensemble, params: Params, view: Packed) -> Float[Array, "R ..."]:
    """The score of every response of a view, where its last token stands; 0 for those that the view does not hold.

    Of an ensemble, [R, M], those of all its members.
    """
    if isinstance(model, Ensemble):
        each = [response_scores(one, own, view) for one, own in zip(model.models, params, strict=True)]
        return jnp.concatenate([said.reshape(view.num_rows, -1) for said in each], axis=1)
    return scores_and_routing(model, params, view)[0]


def scores_and_routing(model: Model, params: Params, view: Packed) -> tuple[Float[Array, "R ..."], Routing | None]:
    """`response_scores` of one model, and what its routers did, if it has any."""
    scores, routing = scored(model, params, **view.inputs)
    return view.at_ends(scores), routing


def standardised(score: Params, mean: np.ndarray, std: np.ndarray) -> Params:
    """A scalar head, or those of an ensemble [E], whose scores are (score - mean) / std.

    A std of 0, or of rounding alone (1e-5 of the mean), is taken for 1, which is said: nothing is known of the scale.
    """
    known = std > 1e-5 * np.abs(mean)
    if np.any(~known & (std != 1)):
        say(f"! scores of {mean} +- {std} are all alike but for rounding: they are shifted to 0 and not scaled")
    gain = (1.0 / np.where(known, std, 1.0)).astype(np.float32)
    return {"kernel": score["kernel"] * gain[..., None], "bias": (score["bias"] - mean.astype(np.float32)) * gain}


def of_batch(says: Says, model: Model, params: Params, batch: Batch) -> Float[Array, "B K ..."]:
    """What a network says of all responses of a batch, of all its microbatches if it is packed."""
    if "packed" not in batch:
        said = says(model, params, view_of(batch))
    else:
        said = over_views(batch["packed"], lambda view, _: says(model, params, view))
    return by_example(said, batch)


def by_example(said: Float[Array, "R ..."], batch: Batch) -> Float[Array, "B K ..."]:
    """What is said of all responses of a batch, those to one prompt beside one another."""
    rows = len(batch["weights"])
    return said.reshape(rows, len(said) // rows, *said.shape[1:])
