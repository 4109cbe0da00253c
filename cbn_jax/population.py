# SPDX-License-Identifier: Apache-2.0
"""Statistics of the whole population: recomputed from data, or pooled over replicas."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._adaptive import GateState
from ._moments import Moments, pool_moments, pool_two
from ._running import RunningMoments, find_running, is_running

States = Any  # the states of a model's normalizers, in any tree


def examples_of(batch: Any) -> int:
    """The length of the first array in a batch: its number of examples."""
    return len(jax.tree.leaves(batch)[0])


def recompute(
    update: Callable[[States, Any], States],
    states: States,
    batches: Iterable[Any],
    *,
    size: Callable[[Any], Any] = examples_of,
) -> States:
    """Running moments that are those of all the data, exactly, under final weights.

    A running average remembers weights that training has left behind, and knows none that
    an optimizer averages (``optax.ema``, schedule-free). This takes one pass over the data
    in training mode, from fresh states, and pools the moments of all batches by the law of
    total variance: means and variances are those of all values of the pass together. In it
    a layer sees what the layers before it make of batches, as in training.

    Where a window holds more than a batch (streaming, replay, ``running="window"``), it
    fills during the pass, and windows take the place of batches; the first and last few
    batches then count a little less.

    Args:
      update: ``(states, batch) -> states``: one forward pass in training mode with the
        weights that will predict; jit it.
      states: those of the model, as ``update`` takes them, such as linen's ``batch_stats``
        or ``nnx.state(model, nnx.BatchStat)``. Only their form and their gates are used.
      batches: the data; wrap it in a progress bar if you like.
      size: how much a batch counts, by default its number of examples; with a mask its
        sum.

    Returns:
      The states with new running moments, and windows that are at home in these weights.

    Raises:
      ValueError: no batches; states without running moments (those of group norm plus, and
        of ``diminishing_batch_norm``, whose averages are the method).

    Values that are not finite, and features without a value that counts, are left out.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import cbn_jax
      >>> from cbn_jax.population import recompute
      >>> estimator = cbn_jax.batch_norm()
      >>> update = jax.jit(lambda state, x: estimator.train(state, x)[1])
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[6.0], [6.0], [9.0]])]
      >>> recompute(update, estimator.init(features=1), batches).mean  # of all five
      Array([5.], dtype=float32)

    Differs from "precise BN" elsewhere, which averages the variances of batches: with two
    examples a batch they are half of the population's.
    """
    states = jax.tree.map(_fresh, states, is_leaf=_is_node)
    totals = [Total(Moments(*r), r.steps) for r in find_running(states)]
    if not totals:
        raise ValueError(
            "recompute got states without running moments, expected those of a model; pass "
            "batch_stats, or nnx.state(model, nnx.BatchStat)."
        )
    taken = 0
    for batch in batches:
        states = update(_with_running(states, _restarted), batch)
        totals = _take_in(totals, find_running(states), jnp.float32(size(batch)))
        taken += 1
    if not taken:
        raise ValueError("recompute got no batches, expected at least one.")
    each = iter(totals)
    return _with_running(states, lambda _: _running(*next(each)))


def pool_replicas(states: States) -> States:
    """One model's states from those of replicas that saw different data.

    For replicas that train without an ``axis_name``, whose normalizers part ways. The mean
    of their variances would leave out how far their means are apart.

    Args:
      states: every leaf ``[replicas, ...]``, as ``pmap`` keeps them.

    Returns:
      The states without that axis: running moments pooled by the law of total variance,
      each replica with the weight of its batches; everything else from the first replica.

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
    each = iter(find_running(states))

    def pooled(_):
        replicas = next(each)
        return _running(pool_moments(Moments(*replicas)), replicas.steps.max(axis=0))

    return _with_running(jax.tree.map(lambda leaf: leaf[0], states), pooled)


class Total(NamedTuple):
    """What has been seen of one normalizer's population, and in how many batches."""

    moments: Moments
    steps: jax.Array


@jax.jit
def _take_in(
    totals: list[Total], batch: list[RunningMoments], size: jax.Array
) -> list[Total]:
    """One more batch; one that was not usable for a feature has no step, and no weight."""

    def one(total, running):
        moments = Moments(running.mean, running.var, size * running.steps)
        return Total(pool_two(total.moments, moments), total.steps + running.steps)

    return list(map(one, totals, batch))


def _running(moments: Moments, steps: jax.Array) -> RunningMoments:
    """As before the first batch where nothing was seen."""
    var = jnp.where(moments.size > 0, moments.var, 1.0)
    return RunningMoments(moments.mean, var, steps)


def _fresh(node: Any) -> Any:
    """As ``init`` makes it: all zeros, but for variances and for gates, which stay."""
    if isinstance(node, GateState):
        return node._replace(state=jax.tree.map(_fresh, node.state, is_leaf=_is_node))
    return _restarted(node) if is_running(node) else jnp.zeros_like(node)


def _restarted(running: RunningMoments) -> RunningMoments:
    zeros = jnp.zeros_like(running.mean)
    return RunningMoments(zeros, jnp.ones_like(zeros), zeros)


def _is_node(node: Any) -> bool:
    return isinstance(node, RunningMoments | GateState)


def _with_running(
    states: States, change: Callable[[RunningMoments], RunningMoments]
) -> States:
    return jax.tree.map(
        lambda leaf: change(leaf) if is_running(leaf) else leaf,
        states,
        is_leaf=is_running,
    )
