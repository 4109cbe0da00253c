# SPDX-License-Identifier: Apache-2.0
"""A method whose statistics stay fixed from a given step on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.checks import check_count, check_state_type, in_float32
from cbn_jax.core.estimator import Estimator, State
from cbn_jax.core.moments import align
from cbn_jax.core.statistics import Statistics
from cbn_jax.core.values import factory


class FrozenState(NamedTuple):
    """State of ``frozen``.

    Attributes:
      state: state of the wrapped estimator.
      trained: ``[C]``, the number of batches trained on so far, at most ``after``.
    """

    state: State
    trained: jax.Array


@factory
def frozen(estimator: Estimator, after: int) -> Estimator:
    """Freezes a method: after a given step, training uses the statistics of inference.

    From that step on the state does not change, and no gradient flows through the
    statistics. With ``after=0`` they are frozen from the first step. This is the usual way
    to fine-tune a trained network at a batch size of one or two. Late in training, freezing
    removes the difference between training and inference.

    Args:
      estimator: any method, wrapped or not.
      after: the number of training steps before freezing, counted by this wrapper; 0 or
        more.

    Returns:
      An Estimator whose state is a ``FrozenState``.

    Raises:
      ValueError: ``after`` is not an int of at least 0; and what the estimator raises.
      TypeError: the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.frozen(cbn.batch_norm(), after=1)
      >>> state = estimator.init(features=1)
      >>> for x in (jnp.array([[1.0], [3.0]]), jnp.array([[8.0], [9.0]])):
      ...     statistics, state = estimator.train(state, x)
      >>> statistics.mean  # of the first batch
      Array([2.], dtype=float32)

    Reference: Yuxin Wu, Justin Johnson, "Rethinking 'Batch' in BatchNorm", 2021,
    arXiv:2105.07576.
    """
    name = "frozen"
    check_count("after", after, 0)

    def accept(state):
        check_state_type(name, state, FrozenState)
        return in_float32(state)

    def init(features, layer=None, params=None):
        inside = estimator.init(features, layer, params)
        return FrozenState(inside, jnp.zeros(features, jnp.float32))

    def train(state, x, source=None, *, axis_name=None, mask=None):
        state = lax.stop_gradient(accept(state))
        fixed = lax.stop_gradient(estimator.infer(state.state, x, mask=mask))
        if after == 0:
            return fixed, state
        current, new = estimator.train(
            state.state, x, source, axis_name=axis_name, mask=mask
        )
        still = state.trained.max() >= after
        inside = jax.tree.map(lambda n, o: jnp.where(still, o, n), new, state.state)
        trained = jnp.minimum(state.trained + 1.0, float(after))
        return _chosen(still, fixed, current), FrozenState(inside, trained)

    def infer(state, x, *, mask=None):
        return estimator.infer(accept(state).state, x, mask=mask)

    return Estimator(init, train, infer, estimator.epsilon, estimator.traits)


def _chosen(still: jax.Array, fixed: Statistics, current: Statistics) -> Statistics:
    """Selects statistics; training may have them per example, inference for all."""

    def choose(f, c):
        f = align(f, c) if f.ndim < c.ndim else f
        return jnp.where(still, f.astype(c.dtype), align(c, f))

    return Statistics(*map(choose, fixed, current))
