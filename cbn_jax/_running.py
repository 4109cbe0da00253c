# SPDX-License-Identifier: Apache-2.0
"""Running moments: what training saw, averaged for inference.

All rules are ``r ← r + α_m (batch − r)`` and differ in α_m, the weight of the m-th batch.
With α₁ = 1 there is nothing to debias: after one step the average is that step's value.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


def diminishing(power: float = 1.0) -> Averaging:
    """Weights that shrink as a power: α_m = 1 / mᵖ.

    With p = 1 all batches count alike (``cumulative``); with p > 1 early ones count more,
    and with p = 2 the first keeps half of all weight for ever; with p < 1 late ones do.

    Args:
      power: p, not negative; 0 keeps the last batch only.

    Returns:
      The rule m ↦ α_m.

    Raises:
      ValueError: a negative ``power``.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.diminishing(2.0)(jnp.array([1.0, 4.0]))
      Array([1.    , 0.0625], dtype=float32)
    """
    if not power >= 0.0:
        raise ValueError(f"power is {power!r}, expected p from 0 on in α_m = 1 / m**p.")
    return lambda m: m**-power


def averaging(momentum: float | Averaging) -> Averaging:
    """A rule as it is, a number as the decay of an exponential average."""
    return momentum if callable(momentum) else exponential(momentum)


LONG = 1e6  # batches behind an average from elsewhere: weights no longer change


def running_moments(mean: jax.Array, var: jax.Array) -> RunningMoments:
    """Running moments from elsewhere, such as the ``batch_stats`` of a trained Flax layer.

    Args:
      mean: ``[C]``.
      var: ``[C]``, biased (Flax's is; PyTorch's times (n − 1)/n, n values per feature).

    Returns:
      A state for ``batch_norm`` and what is put around it. It counts as very many batches:
      training on, an exponential average goes on at its own pace, and one over all batches
      hardly moves.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> batch_stats = {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}
      >>> cbn.running_moments(**batch_stats).var
      Array([4.], dtype=float32)
    """
    mean, var = jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32)
    if mean.shape != var.shape:
        raise ValueError(
            f"running_moments got mean of shape {mean.shape} and var of shape {var.shape}, "
            "expected [features] for both."
        )
    return RunningMoments(mean, var, jnp.full_like(mean, LONG))


def find_running(states: Any) -> list[RunningMoments]:
    """All running moments in a tree."""
    return [
        leaf for leaf in jax.tree.leaves(states, is_leaf=is_running) if is_running(leaf)
    ]


def is_running(node: Any) -> bool:
    """Whether a node of a tree is one."""
    return isinstance(node, RunningMoments)


def weights(average: Averaging, steps: jax.Array) -> jax.Array:
    """α_m of each feature. Schedules of optax take one count at a time."""
    return jax.vmap(average)(steps)


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
    # The first batch is all there is to average, whatever the rule.
    alpha = jnp.where(steps > 1, weights(average, jnp.maximum(steps, 1.0)), 1.0)

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
