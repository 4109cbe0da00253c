# SPDX-License-Identifier: Apache-2.0
"""Windows over time of the statistics of the forward and the backward pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.backward import (
    Bidirectional,
    Correction,
    attach,
    bidirectional,
    pooled_means,
)
from cbn_jax.core.batch import batch_moments
from cbn_jax.core.checks import accepted, check_count, check_epsilon, in_dtype
from cbn_jax.core.moments import Moments, pool_two
from cbn_jax.core.running import (
    RunningMoments,
    check_values,
    finite_moments,
    independent,
    init_running,
    known_moments,
    restarted,
    update_running,
)
from cbn_jax.core.schedules import ScheduleFn, averaging, exponential
from cbn_jax.core.statistics import statistics_of
from cbn_jax.core.sums import count_values
from cbn_jax.core.values import factory


class BidirectionalState(NamedTuple):
    """State of ``bidirectional_batch_norm``.

    Attributes:
      running: averages of the window's moments, for inference.
      window: moments of the exponential window; ``size`` is the sum of the weights of its
        values.
    """

    running: RunningMoments
    window: Moments


@factory
def bidirectional_batch_norm(
    window: int = 16, *, momentum: float | ScheduleFn = 0.99, epsilon: float = 1e-5
) -> Bidirectional:
    """Exponential windows of the statistics of both passes, for norms without a layer.

    The forward pass normalizes by the moments (μ, σ²) of an exponential window. The window
    pools past moments unchanged, and includes the spread between batches. The gradient
    treats the moments as constants. The backward pass uses windows of the same length over
    E[g] and E[g z]. g is the gradient at the normalized value z::

        ∂L/∂x = (g − Q₁ − z Q₂) / σ
        Q₁ ← Q₁ + α (E[g] − Q₁),   Q₂ ← Q₂ + α (E[g z] − Q₂)

    α falls from 1 to 1/k while the window fills. ``window=1`` is batch norm.

    Use it if a norm has no layer before it: after a sum, a concatenation, an activation or
    a pooling. If there is a layer, ``small_batch_norm`` also follows the weights of that
    layer.

    Args:
      window: k ≥ 1, the effective number of iterations. The weights decrease as (1 − 1/k)ˢ.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a schedule
        m ↦ α_m such as ``cumulative()``. With a decay, an average restarts if it differs
        from the window by more than three standard errors.
      epsilon: added to the variance, inside the root.

    Returns:
      A ``Bidirectional`` whose state is a ``BidirectionalState``. The averages Q are
      ``BackwardStatistics`` with two rows; the optimizer writes them.

    Raises:
      ValueError: an argument out of range; features that do not fit the state; a mask that
        does not fit; backward statistics that an optimizer changed like weights.
      TypeError: ``x`` is not floating point; the state is another method's; training
        without ``at``.

    NaN or inf makes the output of its own step NaN, and the windows skip it. A window of
    one value has no variance. The running statistics then normalize that step.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.bidirectional_batch_norm(window=2)
      >>> state, backward = estimator.init(1), estimator.init_backward(1)
      >>> for x in (jnp.array([[1.0], [3.0]]), jnp.array([[4.0], [6.0]])):
      ...     statistics, state = estimator.at(backward).train(state, x)
      >>> statistics.mean  # weights 1/3 and 2/3
      Array([4.], dtype=float32)

    Reference: Junjie Yan, Ruosi Wan, Xiangyu Zhang, Wei Zhang, Yichen Wei, Jian Sun,
    "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization",
    ICLR 2020, arXiv:2001.06838, which averages the second moment and E[g z].

    Differs from the paper: the mean and E[g] are averaged too, so kernels need no
    centering. The windows are exponential. No factor pulls the output towards the running
    statistics.
    """
    name = "bidirectional_batch_norm"
    check_count("window", window, 1)
    check_epsilon(epsilon)
    average, keep = averaging(momentum), 1.0 - 1.0 / window
    alpha = exponential(keep)

    def init(features, layer=None, params=None):
        del layer, params
        nothing = Moments(*(jnp.zeros(features, jnp.float32) for _ in range(3)))
        return BidirectionalState(init_running(features), nothing)

    def train(state, x, source=None, *, axis_name=None, mask=None, backward):
        del source
        state, x = accepted(
            name, state, BidirectionalState, lambda s: s.window.mean, x, mask
        )
        check_values(name, x, axis_name, 1)
        state, given = lax.stop_gradient((state, x))
        batch = batch_moments(
            given, axis_name=axis_name, mask=mask, pivot=state.window.mean
        )
        past = in_dtype(state.window, batch.mean.dtype)
        pooled = pool_two(batch, past._replace(size=keep * past.size))
        used = known_moments(pooled, state.running)

        def rule(backward, sums, context):
            del context
            new = jnp.stack(pooled_means(sums, axis_name))
            share = alpha(backward.steps + 1.0)[None]
            mixed = backward.values + share * (new - backward.values)
            values = jnp.where(backward.steps[None] > 0, mixed, new)
            return Correction(*values), values

        size = count_values(x, mask)
        statistics = attach(rule, x, mask, statistics_of(used, epsilon), size, backward)
        if not callable(momentum):  # a schedule never restarts
            values = independent(x, pooled)
            running = restarted(state.running, pooled, values, epsilon)
            state = state._replace(running=running)
        return statistics, _remembered(state, batch, pooled, average)

    def infer(state, x, *, mask=None):
        state, _ = accepted(
            name, state, BidirectionalState, lambda s: s.window.mean, x, mask
        )
        return statistics_of(state.running, epsilon)

    return bidirectional(name, init, train, infer, epsilon, rows=2)


def _remembered(
    state: BidirectionalState, batch: Moments, pooled: Moments, average: ScheduleFn
) -> BidirectionalState:
    """A batch without a usable value does not change the state."""
    usable = finite_moments(pooled._replace(size=batch.size))
    window = jax.tree.map(
        lambda new, old: jnp.where(usable, new.astype(old.dtype), old), pooled, state.window
    )
    taken = pooled._replace(size=jnp.where(usable, pooled.size, 0.0))
    return BidirectionalState(update_running(state.running, taken, average), window)
