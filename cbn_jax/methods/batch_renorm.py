# SPDX-License-Identifier: Apache-2.0
"""Batch renormalization: the batch's statistics, pulled towards the running ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import batch_moments
from cbn_jax.core.checks import (
    accepted,
    check_count,
    check_epsilon,
    check_number,
    in_dtype,
)
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.moments import Moments
from cbn_jax.core.running import (
    RunningMoments,
    check_values,
    init_running,
    known_moments,
    update_running,
)
from cbn_jax.core.schedules import ScheduleFn, averaging
from cbn_jax.core.statistics import Statistics, statistics_of
from cbn_jax.core.values import factory


class _Limits(NamedTuple):
    """The limits of r and d, ``[C]``."""

    r: jax.Array
    d: jax.Array


@factory
def batch_renorm(
    momentum: float | ScheduleFn = 0.99,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    warmup_steps: int = 5_000,
    r_steps: int | None = None,
    d_steps: int | None = None,
    epsilon: float = 1e-5,
) -> Estimator:
    """Batch renormalization: the batch's statistics, pulled towards the running ones.

    Let (μ, σ) be the statistics of the batch, (μ', σ') those of the running averages before
    the batch, and σ = √(Var + ε)::

        r = clip(σ / σ', 1 / r_max, r_max)
        d = clip((μ − μ') / σ', −d_max, d_max)
        y = (x − μ) / σ · r + d

    The gradient treats r and d as constants. If neither is clipped, ``y`` equals the output
    of inference. The gradient is that of batch norm, times r.

    The method starts as batch norm. After ``warmup_steps`` batches the limits grow linearly
    until they are ``r_max`` after ``r_steps`` batches and ``d_max`` after ``d_steps``.

    Use it if training and inference must agree and a batch holds many examples, as in
    reinforcement learning. It needs no layer. With two examples its gradient is as noisy as
    that of batch norm. ``small_batch_norm`` also averages that noise.

    Args:
      momentum: decay of the running averages in [0, 1), the fraction kept. Alternatively a
        schedule m ↦ α_m, the weight of the m-th batch. Choose it large enough to average
        many batches, because training uses the running averages.
      r_max: the final limit of r, at least 1.
      d_max: the final limit of d, not negative.
      warmup_steps: number of batches of plain batch norm. The paper's 5,000 are for long
        training. For fine-tuning from ``from_batch_stats`` the averages are ready, and the
        limits have their final values from the start.
      r_steps: number of batches until r has its final limit. None means
        8 · ``warmup_steps``, the paper's 40,000.
      d_steps: number of batches until d has its final limit. None means
        5 · ``warmup_steps``, the paper's 25,000.
      epsilon: added to the variances, inside the roots.

    Returns:
      An Estimator whose state is a ``RunningMoments``.

    Raises:
      ValueError: an argument out of range; ``train`` with fewer than two values per
        feature; features that do not fit the state; a mask that does not fit.
      TypeError: ``x`` is not floating point; the state is another method's.

    The running statistics normalize a feature with fewer than two values that count
    (``mask``). NaN or inf in a feature makes the output of that feature NaN in this step.
    Its running averages skip the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.batch_renorm(warmup_steps=0)
      >>> state = cbn.from_batch_stats(mean=jnp.array([0.0]), var=jnp.array([1.0]))
      >>> x = jnp.array([[1.0], [3.0]])
      >>> statistics, state = estimator.train(state, x)
      >>> cbn.normalize(x, statistics)[:, 0].round(2)  # nothing is clipped: (x − 0) / 1
      Array([1., 3.], dtype=float32)

    Reference: Sergey Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence
    in Batch-Normalized Models", 2017, arXiv:1702.03275.

    Differs from the paper: the running averages are debiased. They average the variance
    instead of the standard deviation.

    Differs from the class that reinforcement-learning code bases copy: ε is the same in σ,
    σ' and the output, so that a feature of small variance has variance 1. The limits grow
    instead of jumping, unless ``r_steps`` and ``d_steps`` equal ``warmup_steps``.
    """
    name = "batch_renorm"
    check_epsilon(epsilon)
    check_count("warmup_steps", warmup_steps, 0)
    ends = (
        _end("r_steps", r_steps, 8, warmup_steps),
        _end("d_steps", d_steps, 5, warmup_steps),
    )
    _check_limits(r_max, d_max)
    average = averaging(momentum)

    def accept(state, x, mask):
        return accepted(name, state, RunningMoments, lambda s: s.mean, x, mask)

    def limits(steps):
        r_part, d_part = (_grown(steps, warmup_steps, end) for end in ends)
        return _Limits(1.0 + r_part * (r_max - 1.0), d_part * d_max)

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
        return _renormalized(moments, state, limits(state.steps), epsilon), new

    def infer(state, x, *, mask=None):
        state, _ = accept(state, x, mask)
        return statistics_of(state, epsilon)

    return Estimator(init, train, infer, epsilon)


def _renormalized(
    moments: Moments, running: RunningMoments, limits: _Limits, epsilon: float
) -> Statistics:
    """The mean and the scale that give (x − μ) / σ · r + d."""
    batch = statistics_of(moments, epsilon)
    past, limits = in_dtype((running, limits), batch.mean.dtype)
    past = Statistics(past.mean, lax.rsqrt(past.var + epsilon))
    r = jnp.clip(past.inv_std / batch.inv_std, 1.0 / limits.r, limits.r)
    d = jnp.clip((batch.mean - past.mean) * past.inv_std, -limits.d, limits.d)
    r, d = lax.stop_gradient((r, d))
    inv_std = batch.inv_std * r
    return Statistics(batch.mean - d / inv_std, inv_std)


def _grown(steps: jax.Array, start: int, end: int) -> jax.Array:
    """0 until ``start`` batches and 1 from ``end`` on; 0 if there is no average yet."""
    part = jnp.clip((steps - start) / max(end - start, 1), 0.0, 1.0)
    return jnp.where(steps > 0, jnp.where(steps >= end, 1.0, part), 0.0)


def _end(name: str, steps: int | None, times: int, warmup_steps: int) -> int:
    if steps is None:
        return times * warmup_steps
    check_count(name, steps, warmup_steps)
    return steps


def _check_limits(r_max: float, d_max: float) -> None:
    check_number("r_max", r_max)
    check_number("d_max", d_max)
    if not r_max >= 1.0:
        raise ValueError(
            f"r_max is {r_max!r}, expected a limit of at least 1, such as 3.0."
        )
    if not d_max >= 0.0:
        raise ValueError(
            f"d_max is {d_max!r}, expected a limit of at least 0, such as 5.0."
        )
