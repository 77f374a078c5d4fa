"""One visible pure function per optimiser step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.errors import UserError
from rlhf_jax.hosts.processes import pack
from rlhf_jax.models.kernels import joined
from rlhf_jax.sharding import Mesh, batch_sharding, replicated, tree_shardings
from rlhf_jax.tokens import Packed, to_microbatches
from rlhf_jax.training.packing import over_views, tree_sum, zeros_of
from rlhf_jax.training.state import TrainState, held_at_zero, in_float32, moves
from rlhf_jax.types import Batch, LossFn, Metrics, Params

Step = Callable[..., tuple[TrainState, Metrics]]
"""step(state, batch, key, frozen=None) -> (state, metrics)."""


def add_metrics(a: Metrics, b: Metrics) -> Metrics:
    """Metrics of two microbatches of one batch: sums, and maxima for names that end in _max."""
    of_both = {n: (jnp.maximum if n.endswith("_max") else jnp.add)(a[n], b[n]) for n in a if n in b}
    return {**a, **b, **of_both}


def no_metrics(shapes: Metrics) -> Metrics:
    """What `add_metrics` starts from."""
    lowest = {name: -jnp.inf if name.endswith("_max") else 0 for name in shapes}
    return {name: jnp.full(s.shape, lowest[name], s.dtype) for name, s in shapes.items()}


def settled(metrics: Metrics) -> Metrics:
    """Metrics that have been added up: NAME is divided by NAME_weight, which goes; NaN where that is 0."""
    weights = {name for name in metrics if name.removesuffix("_weight") in metrics and name.endswith("_weight")}
    return {
        name: value / metrics[f"{name}_weight"] if f"{name}_weight" in weights else value
        for name, value in metrics.items()
        if name not in weights
    }


def accumulated_grads(
    loss_fn: LossFn, params: Params, batch: Batch, key: jax.Array, num: int
) -> tuple[Params, Metrics]:
    """Gradients, float32, and metrics of loss_fn over microbatches, added up: exact, as the batch carries its weights.

    A batch with packed rows, {"packed": tokens.Packed, ...}, is read view by view, as many as hold rows: loss_fn gets
    the view and all else whole. Its text "ptx", if any, is a batch {"ptx": ...} of its own. What is not packed is
    `num` microbatches of equally many rows.

    Raises:
        UserError: the rows do not divide into `num` microbatches.
    """

    def of(batch: Batch, key: jax.Array) -> tuple[Params, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
        return in_float32(grads), {"loss/total": loss, **metrics}

    if isinstance(batch, dict) and "packed" in batch:
        rest = {name: value for name, value in batch.items() if name not in ("packed", "ptx")}

        def of_view(view: Packed, i: jax.Array | int) -> tuple[Params, Metrics]:
            return of({**rest, "packed": view}, jax.random.fold_in(key, i))

        total = over_views(batch["packed"], of_view, _nothing, _added)
        if "ptx" not in batch:
            return total
        return _added(total, accumulated_grads(loss_fn, params, {"ptx": batch["ptx"]}, key, num))
    if num == 1:
        return of(batch, key)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % num:
        raise UserError(f"a batch of {rows} rows does not divide by accumulate = {num}; change one of them")

    inputs = (to_microbatches(batch, num), jax.random.split(key, num))
    start = _nothing(jax.eval_shape(of, *jax.tree.map(lambda x: x[0], inputs)))
    return jax.lax.scan(lambda total, xs: (_added(total, of(*xs)), None), start, inputs)[0]


def _nothing(shapes: tuple[Params, Metrics]) -> tuple[Params, Metrics]:
    """What gradients and metrics of these shapes are added to."""
    return zeros_of(shapes[0]), no_metrics(shapes[1])


def _added(a: tuple[Params, Metrics], b: tuple[Params, Metrics]) -> tuple[Params, Metrics]:
    return tree_sum(a[0], b[0]), add_metrics(a[1], b[1])


def make_update(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    *,
    join: Callable[[Params, Params], Params] = joined,
    prepare: Callable[[Params, Batch], Batch] | None = None,
) -> Step:
    """The pure step (state, batch, key, frozen=None) -> (state, metrics), not yet compiled; scan it or jit it.

    With frozen parameters, loss_fn gets join(frozen, state.params); state.params alone is differentiated and trained.
    What loss_fn needs of the whole batch, `prepare`(all parameters, batch) computes before there are microbatches.

    A step whose loss or gradient is not finite changes neither parameters nor optimiser state; it is counted in
    `optim/skipped`. One whose gradient, beside a critic that of the policy, is 0 (no token is trained on, all groups
    are paid alike, every ratio is clipped) is counted in `optim/empty`, and moves nothing (`state.held_at_zero`).
    """
    tx = held_at_zero(optax.with_extra_args_support(tx))

    def update(state: TrainState, batch: Batch, key: jax.Array, frozen: Params = None) -> tuple[TrainState, Metrics]:
        whole = loss_fn if frozen is None else lambda params, *rest: loss_fn(join(frozen, params), *rest)
        if prepare is not None:
            batch = prepare(state.params if frozen is None else join(frozen, state.params), batch)
        grads, metrics = accumulated_grads(whole, state.params, batch, key, accumulate)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss/total"])
        empty = finite & ~moves(grads.get("policy", grads) if isinstance(grads, dict) else grads)
        updates, opt_state = tx.update(grads, state.opt_state, in_float32(state.params), step=state.step)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        state = TrainState(
            step=state.step + 1,
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        )
        unmoved = {"optim/skipped": ~finite, "optim/empty": empty}
        metrics = {
            **settled(metrics),
            "optim/grad_norm": norm,
            **{n: x.astype(jnp.float32) for n, x in unmoved.items()},
        }
        return state, {**metrics, "optim/filled": batch["packed"].filled} if "packed" in batch else metrics

    return update


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    *,
    mesh: Mesh,
    state: TrainState,
    frozen: Params = None,
    prepare: Callable[[Params, Batch], Batch] | None = None,
) -> Step:
    """The compiled step over `mesh`: state sharded by the rule table and donated, rows over data and fsdp.

    `state` and `frozen` may hold arrays or ShapeDtypeStructs; only their shapes are read. Usage:

        step = make_train_step(loss_fn, tx, mesh=mesh, state=state)
        state, metrics = step(state, batch, jax.random.fold_in(key, i))
    """
    shardings = tree_shardings(mesh, state)
    more = () if frozen is None else (tree_shardings(mesh, frozen),)
    return jax.jit(
        make_update(loss_fn, tx, accumulate, prepare=prepare),
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh), *more),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def fetch_scalars(metrics: Metrics) -> dict[str, float]:
    """Metrics on the host, in one transfer; none if there are none."""
    if not metrics:
        return {}
    return dict(zip(metrics, map(float, jax.device_get(pack(tuple(metrics.values())))), strict=True))
