# SPDX-License-Identifier: Apache-2.0
"""Filter response normalization: divides each feature of an example by its RMS."""

import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import instance_moments
from cbn_jax.core.checks import accepted, check_epsilon
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.groups import StepCount
from cbn_jax.core.running import check_values
from cbn_jax.core.statistics import Statistics, identity_where
from cbn_jax.core.values import factory


@factory
def filter_response_norm(*, epsilon: float = 1e-6) -> Estimator:
    """Filter response normalization: divides each feature of an example by its RMS.

    Let E be the mean over the positions of one example::

        y = x / √(E[x²] + ε)

    The method subtracts no mean, so an activation with a learned threshold follows it. That
    activation is the thresholded linear unit ``max(y, τ)``, ``TLU`` in ``cbn_jax.linen``
    and ``cbn_jax.nnx``. The output depends neither on the batch size nor on the other
    examples.

    Use it in convolutional networks that should not use batch statistics. For dense layers
    use group norm. The paper trains with a learning-rate warm-up.

    Args:
      epsilon: added to the mean square, inside the root.

    Returns:
      An Estimator whose state is a ``StepCount``, which affects nothing. Its statistics are
      ``[N, 1, …, 1, C]``, with mean 0.

    Raises:
      ValueError: ``epsilon`` out of range; ``train`` without a value; features that do not
        fit the state; a mask that does not fit.
      TypeError: ``x`` is not floating point; the state is another method's.

    With a ``mask``, a feature without a value that counts passes unchanged. NaN or inf
    makes the output of its feature and example NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.filter_response_norm()
      >>> x = jnp.array([[[0.0], [2.0]]])  # one example, two positions, one feature
      >>> statistics = estimator.infer(estimator.init(features=1), x)
      >>> cbn.normalize(x, statistics)[0, :, 0].round(2)
      Array([0.  , 1.41], dtype=float32)

    Reference: Saurabh Singh, Shankar Krishnan, "Filter Response Normalization Layer:
    Eliminating Batch Dependence in the Training of Deep Neural Networks", CVPR 2020,
    arXiv:1911.09737.

    Differs from the paper: ε is not learned. The paper learns ε if a feature map has one
    position, as after dense layers. With the fixed ε the output is then nearly the sign of
    ``x``.
    """
    name = "filter_response_norm"
    check_epsilon(epsilon)

    def accept(state, x, mask):
        return accepted(name, state, StepCount, lambda s: s.steps, x, mask)

    def statistics_of_examples(x, mask):
        moments = instance_moments(x, mask)
        square = moments.var + jnp.square(moments.mean)
        statistics = Statistics(jnp.zeros_like(square), lax.rsqrt(square + epsilon))
        return identity_where(moments.size < 1, statistics)

    def init(features, layer=None, params=None):
        del layer, params
        return StepCount(jnp.zeros(features, jnp.float32))

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        state, x = accept(state, x, mask)
        check_values(name, x, axis_name, 1)
        return statistics_of_examples(x, mask), StepCount(
            lax.stop_gradient(state.steps) + 1.0
        )

    def infer(state, x, *, mask=None):
        _, x = accept(state, x, mask)
        return statistics_of_examples(x, mask)

    return Estimator(init, train, infer, epsilon, frozenset({"per_example"}))
