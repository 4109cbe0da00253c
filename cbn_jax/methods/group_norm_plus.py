# SPDX-License-Identifier: Apache-2.0
"""Group norm plus, with the conventions of the published code."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import batch_moments, instance_moments
from cbn_jax.core.checks import accepted
from cbn_jax.core.devices import AxisName, device_count
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.groups import (
    Order,
    StepCount,
    branch,
    check_divides,
    check_group_size,
    check_options,
    mixed,
    pool_groups,
)
from cbn_jax.core.moments import Moments, wide
from cbn_jax.core.running import check_values, has_variance
from cbn_jax.core.statistics import Statistics, identity_where, normalize, std_of
from cbn_jax.core.values import factory


@factory
def group_norm_plus(
    mix: jax.typing.ArrayLike,
    *,
    num_groups: int = 32,
    order: Order = "group_first",
    epsilon: float = 1e-5,
) -> Estimator:
    """Group norm plus, with the conventions of the published code.

    This is ``group_batch_norm`` with three changes. B normalizes over the examples of a
    batch only, separately at each position. Standard deviations use n − 1, and ε is added
    to them. Inference uses the statistics of the batch that it predicts.

    A prediction therefore depends on the other examples in its batch, and a training batch
    needs at least two examples. Use this layer for comparisons, and ``group_batch_norm``
    for anything else.

    Args:
      mix: w in [0, 1], a scalar or ``[C]``; may be traced.
      num_groups: number of groups of neighboring features, a divisor of the number of
        features. Normalizing a group of two values, as after a narrow dense layer, keeps
        little more than signs.
      order: which normalizer sees ``x``.
      epsilon: added to the standard deviations.

    Returns:
      An Estimator whose state is a ``StepCount``. Its statistics have the shape
      of ``x``.

    Raises:
      ValueError: an argument out of range; features that are no multiple of
        ``num_groups``, that do not fit the state, or that leave groups of one value;
        ``train`` with a single example.
      TypeError: ``x`` is not floating point; the state is another method's.

    G alone normalizes a position with fewer than two values, because of a ``mask`` or
    because inference gets a single example. A group with fewer than two values passes
    through G unchanged.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x = jnp.array([[1.0, 3.0], [2.0, 6.0]])
      >>> estimator = cbn.group_norm_plus(mix=0.0, num_groups=1, order="parallel")
      >>> statistics, state = estimator.train(estimator.init(features=2), x)
      >>> cbn.normalize(x, statistics).round(2)  # of each place by itself
      Array([[-0.71, -0.71],
             [ 0.71,  0.71]], dtype=float32)

    Reference: as for ``group_batch_norm``; the conventions are those of the first author's
    code, agusgun/CS-570-Project on GitHub.

    Differs from that code: a single example is an error in training, and G alone normalizes
    it in inference, instead of NaN. A position that does not vary has finite gradients.
    """
    name = "group_norm_plus"
    check_options(mix, num_groups, order, epsilon)

    def accept(state, x, mask):
        state, x = accepted(name, state, StepCount, lambda s: s.steps, x, mask)
        check_group_size(name, x, num_groups)
        return state, x

    def statistics_of_batch(x, axis_name, mask):
        x = x.astype(wide(x.dtype))
        if mask is not None:
            # A NaN that does not count would give 0 times NaN in gradients.
            x = jnp.where(mask, x, 0.0)

        def group(x):
            moments = pool_groups(instance_moments(x, mask), num_groups)
            return identity_where(~has_variance(moments), _unbiased(moments, epsilon))

        def batch(x):
            moments = _place_moments(x, axis_name, mask)
            known = has_variance(moments)
            return branch(_unbiased(moments, epsilon), mix, known, moments, x)

        return mixed(order, x, group, batch, normalize)[0]

    def init(features, layer=None, params=None):
        del layer, params
        check_divides(name, features, num_groups)
        return StepCount(jnp.zeros(features, jnp.float32))

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        state, x = accept(state, x, mask)
        check_values(name, x, axis_name, 1)
        _check_examples(name, x, axis_name)
        statistics = statistics_of_batch(x, axis_name, mask)
        return statistics, StepCount(lax.stop_gradient(state.steps) + 1.0)

    def infer(state, x, *, mask=None):
        _, x = accept(state, x, mask)
        return statistics_of_batch(x, None, mask)

    return Estimator(init, train, infer, epsilon, frozenset({"per_example"}))


def _unbiased(moments: Moments, epsilon: float) -> Statistics:
    """Standard deviations with n − 1, as in torch.std, plus ε."""
    var = moments.var * moments.size / jnp.maximum(moments.size - 1.0, 1.0)
    return Statistics(moments.mean, 1.0 / (std_of(var) + epsilon))


def _place_moments(x: jax.Array, axis_name: AxisName, mask: jax.Array | None) -> Moments:
    """Moments over the examples at each position, ``[1, ..., C]``."""
    flat = (x.shape[0], math.prod(x.shape[1:]))
    rows = x.reshape(flat)
    if mask is not None:
        mask = jnp.broadcast_to(mask, x.shape).reshape(flat)
    moments = batch_moments(rows, axis_name=axis_name, mask=mask)
    return jax.tree.map(lambda leaf: leaf.reshape(1, *x.shape[1:]), moments)


def _check_examples(name: str, x: jax.Array, axis_name: AxisName) -> None:
    examples = x.shape[0] * device_count(axis_name)
    if isinstance(examples, int) and examples < 2:  # otherwise the shape is symbolic
        raise ValueError(
            f"{name} got x of shape {x.shape}, expected at least two examples, because it "
            "normalizes over examples; write group_batch_norm(...) instead."
        )
