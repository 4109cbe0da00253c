# SPDX-License-Identifier: Apache-2.0
"""Batch normalization, the baseline for all other methods."""

from cbn_jax.core.batch import batch_moments
from cbn_jax.core.checks import accepted, check_epsilon
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.running import (
    RunningMoments,
    check_values,
    init_running,
    known_moments,
    update_running,
)
from cbn_jax.core.schedules import ScheduleFn, averaging
from cbn_jax.core.statistics import statistics_of
from cbn_jax.core.values import factory


@factory
def batch_norm(momentum: float | ScheduleFn = 0.99, *, epsilon: float = 1e-5) -> Estimator:
    """Batch normalization: statistics of the current batch.

    Training normalizes by ``E[x]`` and ``Var[x]`` over all axes but the last. Inference
    uses their running averages. The state is a ``RunningMoments``.

    Use it if a batch holds about 16 or more values per feature and example group. With
    fewer values, use ``small_batch_norm``.

    Args:
      momentum: decay of the running averages in [0, 1), the fraction kept at each step.
        PyTorch's ``momentum`` is one minus this decay. Alternatively a schedule m ↦ α_m,
        the weight of the m-th batch, such as ``cumulative()``.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``RunningMoments``.

    Raises:
      ValueError: ``momentum`` or ``epsilon`` out of range; ``train`` with fewer than two
        values per feature; features that do not fit the state; a mask that does not fit.
      TypeError: ``x`` is not floating point; the state is another method's.

    The running statistics normalize a feature with fewer than two values that count
    (``mask``), and its state does not change. NaN or inf in a feature makes the output of
    that feature NaN in this step. Its running averages skip the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.batch_norm(momentum=0.9)
      >>> state = estimator.init(features=1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> statistics, state = estimator.train(state, x)
      >>> cbn.normalize(x, statistics).round(3)
      Array([[-1.],
             [ 1.]], dtype=float32)
      >>> state.mean
      Array([2.], dtype=float32)

    Reference: Sergey Ioffe, Christian Szegedy, "Batch Normalization: Accelerating Deep
    Network Training by Reducing Internal Covariate Shift", 2015, arXiv:1502.03167.

    Differs from ``flax.linen.BatchNorm``: the running averages are debiased. Moments are
    accurate at any mean, whereas Flax's default loses the variance from mean/std = 1e3 on.
    A batch with one value per feature is an error. Masks are exact across devices.

    Differs from the paper: the running variance is the biased one, as in Flax.
    """
    return named_batch_norm("batch_norm", momentum, epsilon)


def named_batch_norm(name: str, momentum: float | ScheduleFn, epsilon: float) -> Estimator:
    """``batch_norm`` with the function ``name`` in its error messages."""
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
        check_values(name, x, axis_name)
        moments = batch_moments(x, axis_name=axis_name, mask=mask, pivot=state.mean)
        new = update_running(state, moments, average)
        if mask is not None:
            moments = known_moments(moments, state)
        return statistics_of(moments, epsilon), new

    def infer(state, x, *, mask=None):
        state, _ = accept(state, x, mask)
        return statistics_of(state, epsilon)

    return Estimator(init, train, infer, epsilon)
