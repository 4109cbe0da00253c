# SPDX-License-Identifier: Apache-2.0
"""Group normalization: the usual alternative to batch norm at small batches."""

import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import instance_moments
from cbn_jax.core.checks import accepted, check_count, check_epsilon
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.groups import StepCount, check_divides, check_group_size, pool_groups
from cbn_jax.core.running import check_values, has_variance
from cbn_jax.core.statistics import identity_where, statistics_of
from cbn_jax.core.values import factory


@factory
def group_norm(num_groups: int = 32, *, epsilon: float = 1e-5) -> Estimator:
    """Group normalization: statistics of groups of features within each example.

    The layer normalizes each example by itself. The output depends neither on the batch
    size nor on the other examples. Training and inference are the same function.
    ``num_groups=1`` takes all features and positions of an example together. With as many
    groups as features, the method is instance norm.

    Args:
      num_groups: number of groups of neighboring features, a divisor of the number of
        features. Normalizing a group of two values, as after a narrow dense layer, keeps
        little more than signs.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``StepCount``, the number of batches, which affects
      nothing. Its statistics are ``[N, 1, …, 1, C]``.

    Raises:
      ValueError: an argument out of range; features that are no multiple of
        ``num_groups``, that do not fit the state, or that leave groups of one value.
      TypeError: ``x`` is not floating point; the state is another method's.

    With a ``mask``, a group of fewer than two values passes unchanged. NaN or inf makes the
    output of its group in its example NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x = jnp.array([[1.0, 3.0], [2.0, 6.0]])
      >>> estimator = cbn.group_norm(num_groups=1)
      >>> statistics = estimator.infer(estimator.init(features=2), x)
      >>> cbn.normalize(x, statistics).round(2)  # each example by itself
      Array([[-1.,  1.],
             [-1.,  1.]], dtype=float32)

    Reference: Yuxin Wu, Kaiming He, "Group Normalization", ECCV 2018, arXiv:1803.08494.

    Differs from ``flax.linen.GroupNorm``: ε is 1e-5 as in the paper's code, not 1e-6.
    Variances are accurate at any mean.
    """
    name = "group_norm"
    check_count("num_groups", num_groups, 1)
    check_epsilon(epsilon)

    def accept(state, x, mask):
        state, x = accepted(name, state, StepCount, lambda s: s.steps, x, mask)
        check_group_size(name, x, num_groups)
        return state, x

    def statistics_of_groups(x, mask):
        moments = pool_groups(instance_moments(x, mask), num_groups)
        return identity_where(~has_variance(moments), statistics_of(moments, epsilon))

    def init(features, layer=None, params=None):
        del layer, params
        check_divides(name, features, num_groups)
        return StepCount(jnp.zeros(features, jnp.float32))

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        state, x = accept(state, x, mask)
        check_values(name, x, axis_name, 1)
        statistics = statistics_of_groups(x, mask)
        return statistics, StepCount(lax.stop_gradient(state.steps) + 1.0)

    def infer(state, x, *, mask=None):
        _, x = accept(state, x, mask)
        return statistics_of_groups(x, mask)

    return Estimator(init, train, infer, epsilon, frozenset({"per_example"}))
