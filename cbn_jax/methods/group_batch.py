# SPDX-License-Identifier: Apache-2.0
"""Group and batch statistics, mixed by a learned weight."""

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import instance_moments, pool_examples
from cbn_jax.core.checks import accepted
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.groups import (
    Order,
    branch,
    check_divides,
    check_group_size,
    check_options,
    mixed,
    pool_groups,
)
from cbn_jax.core.moments import Moments
from cbn_jax.core.running import (
    RunningMoments,
    check_values,
    has_variance,
    init_running,
    known_moments,
    update_running,
)
from cbn_jax.core.schedules import ScheduleFn, averaging
from cbn_jax.core.statistics import Statistics, identity_where, statistics_of
from cbn_jax.core.values import factory


@factory
def group_batch_norm(
    mix: jax.typing.ArrayLike,
    *,
    num_groups: int = 32,
    order: Order = "group_first",
    momentum: float | ScheduleFn = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """Group normalization mixed with batch normalization, by a learned weight w.

    G(x) is ``x`` normalized by groups of features within each example. B(x) is ``x``
    normalized by batch statistics, or by running ones in inference::

        group_first    y = w G(x) + (1 − w) B(G(x))
        batch_first    y = w G(B(x)) + (1 − w) B(x)
        parallel       y = w G(x) + (1 − w) B(x)

    w = 1 is group norm, except that in batch_first G acts on B(x). w = 0 is batch norm, in
    group_first that of G(x). Every order is one affine map of ``x``. The layer reads
    feature maps once for moments and once to normalize them, for every order.

    Prefer it to group norm if a batch holds a few examples. ``small_batch_norm`` has better
    batch statistics with one or two examples.

    The weight is learned like any parameter. A Flax module learns it with
    ``Norm(learned(group_batch_norm, num_groups=8))``. The module's parameter is a scalar
    whose sigmoid is w, initially 0.73 as published. Outside of Flax modules call this
    function with the parameter.

    Args:
      mix: w in [0, 1], a scalar or ``[C]``; may be traced.
      num_groups: number of groups of neighboring features, a divisor of the number of
        features. Normalizing a group of two values, as after a narrow dense layer, keeps
        little more than signs.
      order: which normalizer sees ``x``.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a schedule
        m ↦ α_m such as ``cumulative()``.
      epsilon: added to the variances, inside the root.

    Returns:
      An Estimator whose state is a ``RunningMoments`` of the input of B. Its statistics are
      ``[N, 1, …, 1, C]``.

    Raises:
      ValueError: an argument out of range; features that are no multiple of
        ``num_groups``, that do not fit the state, or that leave groups of one value.
      TypeError: ``x`` is not floating point; the state is another method's.

    B uses the running statistics for features with fewer than two values in the whole
    batch: a single example after a dense layer, or a ``mask``. Before the first batch, G
    alone normalizes such features, as in inference. A group with fewer than two values
    passes through G unchanged. NaN or inf makes the output of its feature, and of the group
    in its example, NaN. The averages skip it.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x = jnp.array([[1.0, 3.0], [2.0, 6.0]])
      >>> estimator = cbn.group_batch_norm(mix=1.0, num_groups=1)
      >>> statistics, state = estimator.train(estimator.init(features=2), x)
      >>> cbn.normalize(x, statistics).round(2)  # of each example by itself
      Array([[-1.,  1.],
             [-1.,  1.]], dtype=float32)

    Reference: Agus Gunawan, Xu Yin, Kang Zhang, "Understanding and Improving Group
    Normalization", 2022, arXiv:2207.01972.

    Differs from the paper, as far as the authors' code shows: batch statistics are over
    examples and positions instead of examples only. Inference uses running statistics, so
    that a prediction does not depend on the other examples in its batch. Variances are
    biased, with ε inside the root. ``group_norm_plus`` is the layer as published.
    """
    name = "group_batch_norm"
    check_options(mix, num_groups, order, epsilon)
    average = averaging(momentum)

    def accept(state, x, mask):
        state, x = accepted(name, state, RunningMoments, lambda s: s.mean, x, mask)
        check_group_size(name, x, num_groups)
        return state, x

    def group(instance):
        moments = pool_groups(instance, num_groups)
        return identity_where(~has_variance(moments), statistics_of(moments, epsilon))

    def batch_branch(moments, known, x):
        return branch(statistics_of(moments, epsilon), mix, known, moments, x)

    def init(features, layer=None, params=None):
        del layer, params
        check_divides(name, features, num_groups)
        return init_running(features)

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        state, x = accept(state, x, mask)
        check_values(name, x, axis_name, 1)
        state = lax.stop_gradient(state)

        def batch(instance):
            seen = pool_examples(instance, axis_name, state.mean)
            known = has_variance(seen) | (state.steps > 0)
            moments = known_moments(seen, state)
            return batch_branch(moments, known, x)._replace(moments=seen)

        instance = instance_moments(x, mask)
        statistics, seen = mixed(order, instance, group, batch, _normalized)
        return statistics, update_running(state, seen, average)

    def infer(state, x, *, mask=None):
        state, x = accept(state, x, mask)
        instance = instance_moments(x, mask)
        running = Moments(*(leaf.astype(instance.mean.dtype) for leaf in state))
        known = batch_branch(running, state.steps > 0, x)
        return mixed(order, instance, group, lambda _: known, _normalized)[0]

    return Estimator(init, train, infer, epsilon, frozenset({"per_example"}))


def _normalized(moments: Moments, statistics: Statistics) -> Moments:
    """The moments after normalizing; an overflow stays non-finite, so no state takes it."""
    return Moments(
        (moments.mean - statistics.mean) * statistics.inv_std,
        jnp.where(
            statistics.inv_std > 0, moments.var * jnp.square(statistics.inv_std), jnp.inf
        ),
        moments.size,
    )
