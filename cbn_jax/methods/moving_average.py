# SPDX-License-Identifier: Apache-2.0
"""Moving average batch normalization: second moments of both passes, averaged."""

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
from cbn_jax.core.checks import (
    accepted,
    check_count,
    check_epsilon,
    check_number,
    in_dtype,
)
from cbn_jax.core.running import check_values
from cbn_jax.core.schedules import ScheduleFn, averaging, weights
from cbn_jax.core.statistics import Statistics
from cbn_jax.core.sums import count_values
from cbn_jax.core.values import factory


class MovingAverageState(NamedTuple):
    """State of ``moving_average_batch_norm``.

    Attributes:
      square: ``[C]``, the running average R of second moments, 1 before the first batch.
      window: ``[k, C]``, the second moments of the last k batches, the newest first.
      steps: ``[C]``, the number t of batches seen.
    """

    square: jax.Array
    window: jax.Array
    steps: jax.Array


@factory
def moving_average_batch_norm(
    window: int = 16,
    *,
    warmup_steps: int = 100,
    limit: float = 5.0,
    limit_steps: int = 1_000,
    momentum: float | ScheduleFn = 0.98,
    epsilon: float = 1e-5,
) -> Bidirectional:
    """Moving average batch normalization (MABN): second moments of both passes, averaged.

    The method subtracts no mean. Instead, the kernels before it are centered. V is the mean
    of E[x²] over the last k batches, and R its running average::

        r = clip(√(V + ε) / √(R + ε), 1 / L, L)
        y = x / √(V + ε) · r
        ∂L/∂x = (r g − x Q / √(V + ε)) / √(V + ε)

    g is the gradient at ``y``, and Q the mean of E[g y] over the last k batches. The
    gradient treats V, r and Q as constants. V and Q are those of the current batch alone in
    the first k batches and in the first ``warmup_steps``. L is 1 in the first
    ``limit_steps`` batches, then ``limit``.

    Use it after convolutions of deep networks. Center their kernels, as published:
    ``Norm(moving_average_batch_norm(16), layer=nn.Conv(...), kernel=cbn_jax.center)``.

    Args:
      window: k ≥ 1, the number of batches in the windows. In the paper a window holds 32
        examples.
      warmup_steps: the number t of batches from which the windows are used.
      limit: the final L ≥ 1.
      limit_steps: number of batches with L = 1, at least ``warmup_steps``.
      momentum: decay of R in [0, 1), the fraction kept; or a schedule m ↦ α_m.
      epsilon: added to the second moments, inside the roots.

    Returns:
      A ``Bidirectional`` whose state is a ``MovingAverageState``. Its
      ``BackwardStatistics`` have k rows; the optimizer writes them.

    Raises:
      ValueError: an argument out of range; features that do not fit the state; a mask that
        does not fit; backward statistics that an optimizer changed like weights.
      TypeError: ``x`` is not floating point; the state is another method's; training
        without ``at``.

    NaN or inf makes the output of its own step NaN, and the averages skip it. R normalizes
    a feature without a value that counts (``mask``).

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.moving_average_batch_norm(window=2)
      >>> state, backward = estimator.init(1), estimator.init_backward(1)
      >>> x = jnp.array([[2.0], [14.0]])
      >>> statistics, state = estimator.at(backward).train(state, x)
      >>> cbn.normalize(x, statistics)[:, 0].round(1)  # divided by 10
      Array([0.2, 1.4], dtype=float32)

    Reference: Junjie Yan, Ruosi Wan, Xiangyu Zhang, Wei Zhang, Yichen Wei, Jian Sun,
    "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization",
    ICLR 2020, arXiv:2001.06838.

    Differs from the authors' code: R is debiased, so it starts at the first batch. Any
    batch size and any number of dimensions are accepted. Devices may share statistics.
    """
    name = "moving_average_batch_norm"
    check_count("window", window, 1)
    check_count("warmup_steps", warmup_steps, 0)
    check_count("limit_steps", limit_steps, 0)
    _check_limit(limit)
    check_epsilon(epsilon)
    average = averaging(momentum)

    def accept(state, x, mask):
        return accepted(name, state, MovingAverageState, lambda s: s.square, x, mask)

    def windowed(steps, rows):
        """The mean of a full window after the warm-up, else its newest row."""
        ready = (steps > window) & (steps >= warmup_steps)
        return jnp.where(ready, rows.mean(axis=0), rows[0])

    def factor(state, used):
        """r, clipped to [1 / L, L]."""
        steps = state.steps + 1.0
        most = jnp.where(steps > max(limit_steps, warmup_steps), limit, 1.0)
        ratio = jnp.sqrt((used + epsilon) / (state.square + epsilon))
        return jnp.clip(ratio, 1.0 / most, most)

    def follow(state, used, rows):
        """The state after a batch; after the first batch R is that batch alone."""
        steps = state.steps + 1.0
        mixed = state.square + weights(average, steps) * (used - state.square)
        square = jnp.where(state.steps > 0, mixed, used)
        return MovingAverageState(square, rows, steps)

    def init(features, layer=None, params=None):
        del layer, params
        one = jnp.ones(features, jnp.float32)
        return MovingAverageState(
            square=one,
            window=jnp.zeros((window, features), jnp.float32),
            steps=jnp.zeros_like(one),
        )

    def train(state, x, source=None, *, axis_name=None, mask=None, backward):
        del source
        state, x = accept(state, x, mask)
        check_values(name, x, axis_name, 1)
        old, given = lax.stop_gradient((state, x))
        batch = batch_moments(given, axis_name=axis_name, mask=mask)
        square = batch.var + jnp.square(batch.mean)
        state = in_dtype(old, square.dtype)
        rows = _pushed(state.window, square)
        used = jnp.where(batch.size > 0, windowed(state.steps + 1.0, rows), state.square)
        r = factor(state, used)

        def rule(backward, sums, r):
            values = _pushed(backward.values, pooled_means(sums, axis_name).gz)
            gz = windowed(backward.steps + 1.0, values) / jnp.square(r)
            return Correction(jnp.zeros_like(gz), gz), values

        statistics = Statistics(jnp.zeros_like(used), r * lax.rsqrt(used + epsilon))
        size = count_values(x, mask)
        statistics = attach(rule, x, mask, statistics, size, backward, r)
        usable = jnp.isfinite(square) & (batch.size > 0)
        return statistics, _chosen(usable, follow(state, used, rows), old)

    def infer(state, x, *, mask=None):
        state, _ = accept(state, x, mask)
        inv_std = lax.rsqrt(state.square + epsilon)
        return Statistics(jnp.zeros_like(inv_std), inv_std)

    return bidirectional(name, init, train, infer, epsilon, rows=window)


def _pushed(rows: jax.Array, newest: jax.Array) -> jax.Array:
    """The window with one more batch, without its oldest."""
    return jnp.concatenate([newest[None].astype(rows.dtype), rows[:-1]])


def _chosen(
    usable: jax.Array, new: MovingAverageState, old: MovingAverageState
) -> MovingAverageState:
    return jax.tree.map(lambda n, o: jnp.where(usable, n.astype(o.dtype), o), new, old)


def _check_limit(limit: float) -> None:
    check_number("limit", limit)
    if not limit >= 1.0:
        raise ValueError(
            f"limit is {limit!r}, expected a limit of at least 1, such as 5.0."
        )
