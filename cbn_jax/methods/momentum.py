# SPDX-License-Identifier: Apache-2.0
"""Momentum batch normalization: mixes past statistics with those of the batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import batch_moments
from cbn_jax.core.checks import accepted, check_epsilon, in_dtype
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
from cbn_jax.core.schedules import ScheduleFn, averaging, weights
from cbn_jax.core.statistics import statistics_of
from cbn_jax.core.values import factory


class MomentumState(NamedTuple):
    """State of ``momentum_batch_norm``.

    Attributes:
      running: averages of the batch's moments, for inference.
      past_mean: ``[C]``, the average that training uses, 0 before the first batch.
      past_var: ``[C]``, the same of the variances, 1 before the first batch.
    """

    running: RunningMoments
    past_mean: jax.Array
    past_var: jax.Array


@factory
def momentum_batch_norm(
    decay: float | ScheduleFn, *, momentum: float | ScheduleFn = 0.99, epsilon: float = 1e-5
) -> Estimator:
    """Momentum batch normalization: training uses an average of past and current moments.

    λ_m is the decay of step m. Training normalizes by::

        μ  ← λ_m μ  + (1 − λ_m) E[x]
        σ² ← λ_m σ² + (1 − λ_m) Var[x]

    Past moments enter unchanged, although the weights have moved since. Gradients flow
    through the current batch's share, with the factor 1 − λ_m. The method is
    ``streaming_batch_norm`` without the compensation for moving weights and without its
    gradient through the window.

    Use it as the simplest average, or to measure the benefit of a compensation.

    Args:
      decay: λ in [0, 1), the same for all batches and debiased. Alternatively a schedule
        m ↦ α_m = 1 − λ_m, the weight of the m-th batch. The paper's schedule is
        ``matched_noise(batch_size, steps)``.
      momentum: decay of the running averages in [0, 1), for inference; or a schedule.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``MomentumState``.

    Raises:
      ValueError: an argument out of range; ``train`` with fewer than two values per
        feature; features that do not fit the state; a mask that does not fit.
      TypeError: ``x`` is not floating point; the state is another method's.

    The running statistics normalize a feature with fewer than two values that count
    (``mask``). NaN or inf in a feature makes the output of that feature NaN in this step.
    Its averages skip the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.momentum_batch_norm(cbn.matched_noise(batch_size=2, steps=1000))
      >>> state = estimator.init(features=1)
      >>> statistics, state = estimator.train(state, jnp.array([[1.0], [3.0]]))
      >>> statistics.mean  # the first batch is batch norm
      Array([2.], dtype=float32)

    Reference: Hongwei Yong, Jianqiang Huang, Deyu Meng, Xiansheng Hua, Lei Zhang, "Momentum
    Batch Normalization for Deep Learning with Small Batch Size", ECCV 2020,
    doi:10.1007/978-3-030-58610-2_14.

    Differs from the paper: the average after the first batch is that batch exactly, for
    every schedule. The running averages for inference are debiased.
    """
    name = "momentum_batch_norm"
    check_epsilon(epsilon)
    average, for_inference = averaging(decay, "decay"), averaging(momentum)

    def accept(state, x, mask):
        return accepted(name, state, MomentumState, lambda s: s.past_mean, x, mask)

    def init(features, layer=None, params=None):
        del layer, params
        running = init_running(features)
        return MomentumState(
            running, jnp.zeros_like(running.mean), jnp.ones_like(running.var)
        )

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        state, x = accept(state, x, mask)
        check_values(name, x, axis_name)
        state = lax.stop_gradient(state)
        batch = batch_moments(x, axis_name=axis_name, mask=mask, pivot=state.past_mean)
        mixed = _mixed(state, batch, average)
        if mask is not None:
            mixed = known_moments(mixed, state.running)
        running = update_running(state.running, batch, for_inference)
        return statistics_of(mixed, epsilon), _remembered(state, running, batch, mixed)

    def infer(state, x, *, mask=None):
        state, _ = accept(state, x, mask)
        return statistics_of(state.running, epsilon)

    return Estimator(init, train, infer, epsilon)


def _mixed(state: MomentumState, batch: Moments, average: ScheduleFn) -> Moments:
    """The average with this batch; after the first batch, that batch alone."""
    state = in_dtype(state, batch.mean.dtype)
    steps = state.running.steps
    alpha = jnp.where(steps > 0, weights(average, steps + 1.0), 1.0)
    return Moments(
        mean=(1.0 - alpha) * state.past_mean + alpha * batch.mean,
        var=(1.0 - alpha) * state.past_var + alpha * batch.var,
        size=batch.size,
    )


def _remembered(
    state: MomentumState, running: RunningMoments, batch: Moments, mixed: Moments
) -> MomentumState:
    usable = usable_moments(batch)

    def choose(new, old):
        return lax.stop_gradient(jnp.where(usable, new.astype(old.dtype), old))

    return MomentumState(
        running, choose(mixed.mean, state.past_mean), choose(mixed.var, state.past_var)
    )
