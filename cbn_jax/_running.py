# SPDX-License-Identifier: Apache-2.0
"""Running moments: what training saw, averaged for inference.

All rules are ``r ← r + α_m (batch − r)`` and differ in α_m, the weight of the m-th batch.
With α₁ = 1 there is nothing to debias: after one step the average is that step's value.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._checks import check_fraction
from ._moments import Moments

Averaging = Callable[[jax.Array], jax.Array]  # m = 1, 2, … -> α_m


class RunningMoments(NamedTuple):
    """Average of the moments of all batches so far.

    Attributes:
      mean: ``[C]``, 0 before the first batch.
      var: ``[C]``, biased as in Flax, 1 before the first batch.
      steps: ``[C]``, the number m of batches seen.
    """

    mean: jax.Array
    var: jax.Array
    steps: jax.Array


def exponential(momentum: float = 0.99) -> Averaging:
    """Exponential average with decay β, debiased: α_m = (1 − β) / (1 − βᵐ).

    The weights of the last batches fall off as 1, β, β², … and sum to one at every step.

    Args:
      momentum: the decay β in [0, 1), the fraction kept; 0 keeps the last batch only.

    Returns:
      The rule m ↦ α_m.

    Raises:
      ValueError: ``momentum`` outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.exponential(0.5)(jnp.array([1.0, 2.0]))
      Array([1.       , 0.6666667], dtype=float32)

    Differs from Flax and PyTorch, whose averages start at 0 and 1 and stay biased
    towards them for several times 1 / (1 − β) steps.
    """
    check_fraction("momentum", momentum)
    log_decay = math.log(momentum) if momentum else -math.inf
    return lambda m: jnp.expm1(log_decay) / jnp.expm1(log_decay * m)


def cumulative(m: jax.Array) -> jax.Array:
    """Plain mean of all batches: α_m = 1 / m. A rule itself, not a factory.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.cumulative(jnp.array([1.0, 4.0]))
      Array([1.  , 0.25], dtype=float32)
    """
    return 1.0 / m


def averaging(momentum: float | Averaging) -> Averaging:
    """A rule as it is, a number as the decay of an exponential average."""
    return momentum if callable(momentum) else exponential(momentum)


def init_running(features: int) -> RunningMoments:
    """Running moments before the first batch."""
    return RunningMoments(
        mean=jnp.zeros(features, jnp.float32),
        var=jnp.ones(features, jnp.float32),
        steps=jnp.zeros(features, jnp.float32),
    )


def update_running(
    running: RunningMoments, moments: Moments, average: Averaging
) -> RunningMoments:
    """Takes one batch into the average; a feature without usable moments stays as it is."""
    running, moments = lax.stop_gradient((running, moments))
    moments = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moments)
    usable = usable_moments(moments)
    steps = running.steps + usable.astype(jnp.float32)
    alpha = average(jnp.maximum(steps, 1.0))

    def blend(old, new):
        return old + jnp.where(usable, alpha * (new - old), 0.0)

    return RunningMoments(
        mean=blend(running.mean, moments.mean),
        var=blend(running.var, moments.var),
        steps=steps,
    )


def usable_moments(moments: Moments) -> jax.Array:
    """True for features whose moments are finite and come from at least one value.

    One overflow or NaN must not live on in a state: its own step shows it, the next
    does not remember it.
    """
    # A mean that is not finite makes the variance NaN.
    return jnp.isfinite(moments.var) & (moments.size > 0)


def known_moments(moments: Moments, running: RunningMoments) -> Moments:
    """The batch's moments, or the running ones for features without a single value."""
    empty = moments.size == 0
    return Moments(
        mean=jnp.where(empty, running.mean.astype(moments.mean.dtype), moments.mean),
        var=jnp.where(empty, running.var.astype(moments.var.dtype), moments.var),
        size=moments.size,
    )
