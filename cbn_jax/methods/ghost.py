# SPDX-License-Identifier: Apache-2.0
"""Ghost batch normalization: normalizes each part of a large batch separately."""

import jax
import jax.numpy as jnp

from cbn_jax.core.batch import batch_moments
from cbn_jax.core.checks import accepted, check_count, check_epsilon
from cbn_jax.core.devices import AxisName, total
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.moments import Moments
from cbn_jax.core.running import (
    RunningMoments,
    check_values,
    init_running,
    known_moments,
    update_running,
    usable_moments,
)
from cbn_jax.core.schedules import ScheduleFn, averaging
from cbn_jax.core.statistics import statistics_of
from cbn_jax.core.values import factory


@factory
def ghost_batch_norm(
    examples: int, *, momentum: float | ScheduleFn = 0.99, epsilon: float = 1e-5
) -> Estimator:
    """Ghost batch normalization: normalizes each part of a large batch separately.

    Each group of ``examples`` neighboring examples is normalized by its own moments. The
    running averages take the mean of the parts' means and variances.

    Use it to keep the noise of small batches in steps with a large batch. Use it also to
    imitate, on one device, several devices that normalize separately.

    Args:
      examples: number of examples in one part, at least 1. The batch on a device must be a
        multiple of it.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a schedule
        m ↦ α_m, the weight of the m-th batch.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``RunningMoments``. In training its statistics are
      ``[N, 1, …, 1, C]``.

    Raises:
      ValueError: an argument out of range; a batch that does not divide into parts; parts
        of fewer than two values; features that do not fit the state.
      TypeError: ``x`` is not floating point; the state is another method's.

    With a ``mask``, the running statistics normalize a part with fewer than two values that
    count. NaN or inf makes the output of its part NaN, and the averages skip it.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.ghost_batch_norm(examples=2)
      >>> x = jnp.array([[1.0], [3.0], [10.0], [20.0]])
      >>> statistics, state = estimator.train(estimator.init(features=1), x)
      >>> cbn.normalize(x, statistics)[:, 0].round(2)
      Array([-1.,  1., -1.,  1.], dtype=float32)

    Reference: Elad Hoffer, Itay Hubara, Daniel Soudry, "Train longer, generalize better:
    closing the generalization gap in large batch training of neural networks", 2017,
    arXiv:1705.08741.

    Differs from the paper: one step takes all parts into the running averages at once,
    instead of one after another.
    """
    name = "ghost_batch_norm"
    check_count("examples", examples, 1)
    check_epsilon(epsilon)
    average = averaging(momentum)

    def accept(state, x, mask):
        return accepted(name, state, RunningMoments, lambda s: s.mean, x, mask)

    def init(features, layer=None, params=None):
        del layer, params
        return init_running(features)

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        state, x = accept(state, x, mask)
        _check_parts(name, x, examples)
        parts = _moments_of_parts(x, mask, examples)
        new = update_running(state, _mean_of_parts(parts, axis_name), average)
        if mask is not None:
            parts = known_moments(parts, state)
        each = jax.tree.map(lambda leaf: _spread(leaf, x, examples), parts)
        return statistics_of(each, epsilon), new

    def infer(state, x, *, mask=None):
        state, _ = accept(state, x, mask)
        return statistics_of(state, epsilon)

    return Estimator(init, train, infer, epsilon)


def _moments_of_parts(x: jax.Array, mask: jax.Array | None, examples: int) -> Moments:
    """The moments of the parts, every field ``[parts, C]``."""
    shape = (x.shape[0] // examples, examples, *x.shape[1:])
    if mask is None:
        return jax.vmap(batch_moments)(x.reshape(shape))
    mask = jnp.broadcast_to(mask, x.shape).reshape(shape)
    return jax.vmap(lambda x, mask: batch_moments(x, mask=mask))(x.reshape(shape), mask)


def _mean_of_parts(parts: Moments, axis_name: AxisName) -> Moments:
    """The mean moments of all usable parts on all devices."""
    usable = usable_moments(parts)

    def sum_of(leaf):
        return jnp.where(usable, leaf, 0.0).sum(axis=0)

    sums = jax.tree.map(sum_of, (parts, jnp.ones_like(parts.size)))
    moments, count = total(sums, axis_name)
    least = jnp.maximum(count, 1.0)
    return Moments(moments.mean / least, moments.var / least, moments.size)


def _spread(leaf: jax.Array, x: jax.Array, examples: int) -> jax.Array:
    """One row per example, ``[N, 1, …, 1, C]``."""
    rows = jnp.repeat(leaf, examples, axis=0)
    return jnp.expand_dims(rows, tuple(range(1, x.ndim - 1)))


def _check_parts(name: str, x: jax.Array, examples: int) -> None:
    check_values(name, x, None, 1)
    if x.shape[0] % examples:
        raise ValueError(
            f"{name} got x of shape {x.shape} and examples={examples}, expected a multiple "
            f"of {examples} examples; write examples=... or drop the rest of the batch."
        )
    check_values(name, x[:examples], None)
