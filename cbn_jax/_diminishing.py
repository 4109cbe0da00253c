# SPDX-License-Identifier: Apache-2.0
"""Diminishing batch normalization: one average of statistics, in training and inference."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._checks import (
    check_activations,
    check_choice,
    check_epsilon,
    check_number,
    check_state,
    check_unit,
    check_values,
)
from ._estimator import Estimator
from ._moments import Moments, batch_moments
from ._running import Averaging, usable_moments, weights
from ._statistics import Statistics, std_of


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


class Convergence(NamedTuple):
    """What ``diminishing_convergence`` found.

    Attributes:
      statistics: the averaged statistics converge.
      gradient: the gradient at weights and statistics tends to zero.
    """

    statistics: bool
    gradient: bool


def diminishing_convergence(alpha_power: float, learning_rate_power: float) -> Convergence:
    """Whether training with ``diminishing_batch_norm`` provably converges.

    For weights α_m and learning rates η_m of the order of 1/mʰ and 1/mᵏ. Statistics
    converge (theorem 7 of the paper) if Σ α_m and Σₘ α_m Σ_{n≤m} η_n are finite. The
    gradient vanishes (theorem 11) if also Σₘ m α_m Σ_{n≤m} η_n is finite, Σ η_m is not,
    and Σ η²_m is. A constant is the power 0. Sufficient conditions, for smooth losses on
    compact sets and the whole data set as one batch: False means that the theorems do not
    say.

    Args:
      alpha_power: h, at least 0.
      learning_rate_power: k, at least 0.

    Returns:
      A ``Convergence``, two truth values.

    Raises:
      ValueError: a negative power.

    Example:
      >>> import cbn_jax as cbn
      >>> cbn.diminishing_convergence(alpha_power=2.001, learning_rate_power=1.0)
      Convergence(statistics=True, gradient=True)
      >>> cbn.diminishing_convergence(alpha_power=1.0, learning_rate_power=0.5)
      Convergence(statistics=False, gradient=False)

    Reference: as for ``diminishing_batch_norm``, section on convergence.

    Differs from the paper, which sums its series up as k ≥ 1 with h > 1, or h > 2 for the
    gradient: summed term by term they also converge for k < 1, with h larger by 1 − k; and
    beyond k = 1 the learning rates break the paper's own condition Σ η_m = ∞.
    """
    for name, power in (
        ("alpha_power", alpha_power),
        ("learning_rate_power", learning_rate_power),
    ):
        if not power >= 0.0:
            raise ValueError(f"{name} is {power!r}, expected a number from 0 on.")
    growth = max(1.0 - learning_rate_power, 0.0)  # Σ_{n≤m} η_n = O(m^growth), or a log
    return Convergence(
        statistics=alpha_power > 1.0 + growth,
        gradient=alpha_power > 2.0 + growth and 0.5 < learning_rate_power <= 1.0,
    )


def diminishing_batch_norm(
    alpha: float | Averaging = 0.25,
    *,
    order: Literal["blend", "lagged"] = "blend",
    epsilon: float = 1e-5,
) -> Estimator:
    """Diminishing batch normalization: one average of statistics, also used in training.

    Batch m moves the average, and training normalizes by it, as inference does::

        μ ← (1 − α_m) μ + α_m mean(x)
        σ ← (1 − α_m) σ + α_m std(x)
        y = (x − μ) / (σ + ε)

    α ≡ 1 is batch norm in training. Small α averages over about 1/α batches, whose weights
    were others: statistics lag behind where the weights move fast, and nothing corrects
    that (``cross_iteration_batch_norm`` and ``streaming_batch_norm`` do). Gradients flow
    through the current batch's share, with the factor α_m.

    Prefer it where training and inference must agree, and place it after the activation,
    as the paper does. Before the activation, where statistics and weights work against each
    other, a small constant α fails: gradients see only the share α of the statistics.

    Args:
      alpha: α in [0, 1], the same for all batches; or a rule m ↦ α_m, m = 1, 2, …, such as
        ``diminishing(power)``, ``cumulative`` or a schedule of optax; what a rule returns
        is not checked. A constant takes part of the start, mean 0 and deviation 1, into the
        average; ``exponential(1 − α)`` does not.
      order: "blend" takes the current batch into the average before normalizing; "lagged"
        afterwards, the literal order of the paper's algorithm: the first batch is left as
        it is, but for ε, and no gradient flows through statistics.
      epsilon: added to the standard deviation, as published.

    Returns:
      An Estimator whose state is a ``DiminishingState``.

    Raises:
      ValueError: an argument out of range; ``train`` with one value per feature; features
        that do not fit the state.
      TypeError: ``x`` is not floating point; the state is another method's.

    Features without a single value that counts (``mask``) are normalized by the average as
    it is. NaN or inf in a feature makes that feature's output NaN in this step (with
    "lagged" only where it stands); the averages do not take it in.

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

    Differs from the paper: its analysis takes the whole data set as one batch, where both
    orders are close; "blend" is the one that makes α = 1 batch norm with mini-batches. The
    layer normalizes before or after the activation, as you place it. ε and the start of
    the averages, which the paper does not give, are 1e-5 and (0, 1).
    """
    name = "diminishing_batch_norm"
    if not callable(alpha):
        check_number("alpha", alpha)
        check_unit("alpha", alpha, "the weight of the current batch")
    check_choice("order", order, ("blend", "lagged"))
    check_epsilon(epsilon)

    def check(state, x):
        check_activations(name, x)
        check_state(name, state, DiminishingState, lambda s: s.mean, x)

    def init(features, params=None, groups=1):
        del params, groups
        zeros, ones = jnp.zeros(features, jnp.float32), jnp.ones(features, jnp.float32)
        return DiminishingState(mean=zeros, std=ones, steps=jnp.zeros_like(zeros))

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        check(state, x)
        check_values(name, x, axis_name, mask)
        state = lax.stop_gradient(state)
        moments = batch_moments(x, axis_name=axis_name, mask=mask)
        before = jax.tree.map(lambda leaf: leaf.astype(moments.mean.dtype), state)
        after = _take_in(before, moments, alpha)
        usable = usable_moments(moments)
        state_next = jax.tree.map(
            lambda new, old: jnp.where(usable, new.astype(old.dtype), old),
            lax.stop_gradient(after),
            state,
        )
        if order == "lagged":
            after = before
        elif mask is not None:
            empty = moments.size == 0
            after = jax.tree.map(lambda new, old: jnp.where(empty, old, new), after, before)
        return _statistics(after, epsilon), state_next

    def infer(state, x):
        check(state, x)
        return _statistics(state, epsilon)

    return Estimator(init, train, infer)


def _take_in(
    state: DiminishingState, moments: Moments, alpha: float | Averaging
) -> DiminishingState:
    """The average with one more batch; exactly the batch for α = 1."""
    steps = state.steps + 1.0
    weight = weights(alpha, steps) if callable(alpha) else alpha
    return DiminishingState(
        mean=(1.0 - weight) * state.mean + weight * moments.mean,
        std=(1.0 - weight) * state.std + weight * std_of(moments.var),
        steps=steps,
    )


def _statistics(state: DiminishingState, epsilon: float) -> Statistics:
    return Statistics(state.mean, 1.0 / (state.std + epsilon))
