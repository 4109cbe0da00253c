# SPDX-License-Identifier: Apache-2.0
"""Statistics of the whole population: recomputed from data, or pooled over replicas."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cbn_jax.core.moments import Moments, pool_moments, pool_two
from cbn_jax.core.named import Name, find_running, map_named, put_running
from cbn_jax.core.running import RunningMoments
from cbn_jax.wrappers.adaptive import find_gates

States = Any  # the states of a model's normalizers, in any tree


def recompute(
    update: Callable[[States, Any], States],
    states: States,
    batches: Iterable[Any],
    *,
    size: Callable[[Any], Any] | None = None,
) -> States:
    """Exact running moments of all the data, under the final weights.

    A running average contains batches under old weights. It contains none under weights
    that an optimizer averages (``optax.ema``, schedule-free). This function makes one pass
    over the data in training mode, starting from fresh states. It pools the moments of all
    batches by the law of total variance. The resulting means and variances are those of all
    values of the pass together. As in training, each layer sees the outputs of the layers
    before it for one batch at a time.

    The window of a method may hold more than one batch (streaming, replay,
    ``running="window"``). The window then fills during the pass, and the function pools
    windows instead of batches. The first and last few batches then have a slightly smaller
    weight.

    Args:
      update: ``(states, batch) -> states``: one forward pass in training mode with the
        weights used for prediction. Jit it.
      states: the states of the model, in the form that ``update`` takes, such as linen's
        ``batch_stats`` or ``nnx.state(model, nnx.BatchStat)``. Only their form and their
        gates are used.
      batches: the data, any iterable. ``tqdm.tqdm(batches)`` shows a progress bar.
      size: ``batch -> weight``. None means the number of examples, the length of all arrays
        in the batch. With a mask, return the sum of the mask.

    Returns:
      The states with new running moments, and windows computed under these weights.

    Raises:
      ValueError: no batches; without ``size``, a batch whose arrays differ in length;
        states without running moments (those of group norm plus, and of
        ``diminishing_batch_norm``, whose averages are the method).

    A batch does not count for a feature that is not finite in it, or that has fewer than
    two values that count in it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.population import recompute
      >>> estimator = cbn_jax.batch_norm()
      >>> update = jax.jit(lambda state, x: estimator.train(state, x)[1])
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[6.0], [6.0], [9.0]])]
      >>> recompute(update, estimator.init(features=1), batches).mean  # of all five
      Array([5.], dtype=float32)

    Differs from "precise BN" elsewhere, which averages the variances of batches. With two
    examples per batch these are half of the population's variance.
    """
    states = _fresh(states)
    if not find_running(states):
        raise ValueError(
            "recompute got states without running moments, expected those of a model; pass "
            "batch_stats, or nnx.state(model, nnx.BatchStat)."
        )
    total = {
        place: _Total(Moments(*running), running.steps)
        for place, running in find_running(states).items()
    }
    batch = None
    for batch in batches:
        states = update(put_running(states, find_running(_fresh(states))), batch)
        weight = _examples(batch) if size is None else size(batch)
        total = _added(total, find_running(states), jnp.float32(weight))
    if batch is None:
        raise ValueError("recompute got no batches, expected at least one.")
    pooled = {place: _running(seen.moments, seen.steps) for place, seen in total.items()}
    return put_running(states, pooled)


def pool_replicas(states: States) -> States:
    """The states of one model, from those of replicas that saw different data.

    Use it for replicas that train without an ``axis_name``, so that their normalizers
    differ. The mean of their variances would omit the differences between their means.

    Args:
      states: every leaf ``[replicas, ...]``, as ``pmap`` keeps them.

    Returns:
      The states without that axis. Running moments are pooled by the law of total variance,
      with the number of batches of each replica as its weight. All other values are those
      of the first replica.

    Raises:
      ValueError: states without running moments.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.population import pool_replicas
      >>> replicas = cbn_jax.RunningMoments(
      ...     mean=jnp.array([[0.0], [2.0]]),
      ...     var=jnp.array([[1.0], [1.0]]),
      ...     steps=jnp.array([[5.0], [5.0]]),
      ... )
      >>> pool_replicas(replicas).var
      Array([2.], dtype=float32)
    """
    if not find_running(states):
        raise ValueError(
            "pool_replicas got states without running moments, expected the batch_stats of "
            "a model, every leaf with a leading axis of replicas."
        )

    def pooled(replicas):
        return _running(pool_moments(Moments(*replicas)), replicas.steps.max(axis=0))

    moments = {place: pooled(running) for place, running in find_running(states).items()}
    return put_running(jax.tree.map(lambda leaf: leaf[0], states), moments)


class _Total(NamedTuple):
    """Moments of all batches so far in one normalizer, and the number of batches."""

    moments: Moments
    steps: jax.Array


def _examples(batch: Any) -> int:
    """The common length of all arrays in the batch."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    first = {shape[:1] for shape in shapes}
    if len(first) == 1 and () not in first:
        return first.pop()[0]
    raise ValueError(
        f"recompute got a batch of arrays of shapes {shapes}, expected the same first "
        "axis in all; write size=lambda batch: ... for the number of examples in a batch."
    )


@jax.jit
def _added(
    total: dict[Name, _Total], batch: dict[Name, RunningMoments], size: jax.Array
) -> dict[Name, _Total]:
    """Adds one batch. A feature that is not usable in it has no step and no weight."""

    def add(total, running):
        moments = Moments(running.mean, running.var, size * running.steps)
        return _Total(pool_two(total.moments, moments), total.steps + running.steps)

    return {place: add(total[place], batch[place]) for place in total}


def _running(moments: Moments, steps: jax.Array) -> RunningMoments:
    """A feature without a value has variance 1, as before the first batch."""
    var = jnp.where(moments.size > 0, moments.var, 1.0)
    return RunningMoments(moments.mean, var, steps)


def _fresh(states: States) -> States:
    """Fresh states as from ``init``: zeros, running variances of 1, and gates unchanged."""
    running = {
        place: RunningMoments(
            # Each array needs its own buffer, otherwise the state cannot be donated.
            jnp.zeros_like(old.mean),
            jnp.ones_like(old.var),
            jnp.zeros_like(old.steps),
        )
        for place, old in find_running(states).items()
    }
    gates = find_gates(states)

    def fresh(name, leaf):
        return leaf if name in gates else jnp.zeros_like(leaf)

    return put_running(map_named(fresh, states), running)
