# SPDX-License-Identifier: Apache-2.0
"""Diminishing batch normalization: one average for both training and inference."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import batch_moments
from cbn_jax.core.checks import (
    accepted,
    check_choice,
    check_epsilon,
    check_number,
    check_unit,
)
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.moments import Moments
from cbn_jax.core.running import check_values, has_variance, usable_moments
from cbn_jax.core.schedules import ScheduleFn, check_schedule, weights
from cbn_jax.core.statistics import Statistics, std_of
from cbn_jax.core.values import factory


class DiminishingState(NamedTuple):
    """State of ``diminishing_batch_norm``.

    Attributes:
      mean: ``[C]``, average of the means, 0 before the first batch.
      std: ``[C]``, average of the standard deviations, 1 before the first batch.
      steps: ``[C]``, the number m of batches seen.
    """

    mean: jax.Array
    std: jax.Array
    steps: jax.Array


@factory
def diminishing_batch_norm(
    alpha: float | ScheduleFn = 0.25,
    *,
    normalize_by: Literal["updated", "previous"] = "updated",
    epsilon: float = 1e-5,
) -> Estimator:
    """Diminishing batch normalization: one average for both training and inference.

    Batch m updates the averages. Training normalizes by these averages, as inference does::

        μ ← (1 − α_m) μ + α_m mean(x)
        σ ← (1 − α_m) σ + α_m std(x)
        y = (x − μ) / (σ + ε)

    α ≡ 1 is batch norm in training. A small α averages over about 1/α batches, which had
    other weights. If the weights move fast, the statistics lag behind. This method does not
    correct that lag; ``cross_iteration_batch_norm`` and ``streaming_batch_norm`` do.
    Gradients flow through the current batch's share, with the factor α_m.

    Use it if training and inference must agree. Place it after the activation, as the paper
    does. Before the activation, statistics and weights work against each other and a small
    constant α fails: gradients see only the share α of the statistics.

    Args:
      alpha: α in [0, 1], the same for all batches. Alternatively a schedule m ↦ α_m, m = 1,
        2, …, such as ``diminishing(power)``, ``cumulative()`` or one of optax. The values
        of a schedule are not checked. A constant mixes the initial mean 0 and deviation 1
        into the average; ``exponential(1 − α)`` does not.
      normalize_by: "updated" normalizes by the average that includes the current batch.
        "previous" normalizes by the average before it, the literal order of the paper's
        algorithm. With "previous" the first batch passes unchanged, except for ε, and no
        gradient flows through statistics.
      epsilon: added to the standard deviation, as published.

    Returns:
      An Estimator whose state is a ``DiminishingState``.

    Raises:
      ValueError: an argument out of range; ``train`` with too few values; features
        that do not fit the state.
      TypeError: ``x`` is not floating point; the state is another method's.

    The unchanged average normalizes a feature with fewer than two values that count
    (``mask``). NaN or inf in a feature makes the output of that feature NaN in this step.
    With "previous", only the value itself becomes NaN. The averages skip that batch.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.diminishing_batch_norm(cbn.diminishing(1.0))
      >>> state = estimator.init(features=1)
      >>> for x in (jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [8.0]])):
      ...     statistics, state = estimator.train(state, x)
      >>> statistics.mean, state.std  # of 2 and 5, of 1 and 3
      (Array([3.5], dtype=float32), Array([2.], dtype=float32))

    Reference: Yintai Ma, Diego Klabjan, "Diminishing Batch Normalization", IEEE TNNLS
    35(5), 2024, arXiv:1705.08011.

    Differs from the paper: its analysis takes the whole data set as one batch, for which
    both orders are close. With mini-batches, "updated" makes α = 1 batch norm. The caller
    places the layer before or after the activation. The paper gives neither ε nor the
    initial averages. Here they are 1e-5 and (0, 1).
    """
    name = "diminishing_batch_norm"
    check_schedule("alpha", alpha)
    if not callable(alpha):
        check_number("alpha", alpha)
        check_unit("alpha", alpha, "the weight of the current batch")
    check_choice("normalize_by", normalize_by, ("updated", "previous"))
    check_epsilon(epsilon)

    def accept(state, x, mask):
        return accepted(name, state, DiminishingState, lambda s: s.mean, x, mask)

    def init(features, layer=None, params=None):
        del layer, params

        def full(value):
            return jnp.full(features, value, jnp.float32)

        return DiminishingState(mean=full(0.0), std=full(1.0), steps=full(0.0))

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        state, x = accept(state, x, mask)
        check_values(name, x, axis_name)
        state = lax.stop_gradient(state)
        moments = batch_moments(x, axis_name=axis_name, mask=mask, pivot=state.mean)
        previous = jax.tree.map(lambda leaf: leaf.astype(moments.mean.dtype), state)
        updated = _update(previous, moments, alpha)
        used = updated if normalize_by == "updated" else previous
        if mask is not None:
            used = _choose(has_variance(moments), used, previous)
        new = lax.stop_gradient(_choose(usable_moments(moments), updated, state))
        return _statistics(used, epsilon), new

    def infer(state, x, *, mask=None):
        state, _ = accept(state, x, mask)
        return _statistics(state, epsilon)

    return Estimator(init, train, infer, epsilon)


def _update(
    state: DiminishingState, moments: Moments, alpha: float | ScheduleFn
) -> DiminishingState:
    """The average with one more batch; for α = 1 exactly that batch."""
    steps = state.steps + 1.0
    weight = weights(alpha, steps) if callable(alpha) else alpha
    return DiminishingState(
        mean=(1.0 - weight) * state.mean + weight * moments.mean,
        std=(1.0 - weight) * state.std + weight * std_of(moments.var),
        steps=steps,
    )


def _choose(
    condition: jax.Array, new: DiminishingState, old: DiminishingState
) -> DiminishingState:
    """Chooses by feature, in the dtype of the old state."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n.astype(o.dtype), o), new, old)


def _statistics(state: DiminishingState, epsilon: float) -> Statistics:
    return Statistics(state.mean, 1.0 / (state.std + epsilon))
