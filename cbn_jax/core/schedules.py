# SPDX-License-Identifier: Apache-2.0
"""Schedules: functions of the number of batches, such as the weights of an average."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .checks import check_count, check_fraction
from .values import Value, factory, is_factory

ScheduleFn = Callable[[jax.Array], jax.Array]  # a Schedule, or a schedule of optax


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Schedule(Value):
    """A function of the number of batches that compares, prints and pickles as its call.

    Methods that take a schedule also take a plain function, such as a schedule of optax.
    A plain function compares by identity.

    Attributes:
      rule: the function.
    """

    rule: ScheduleFn

    def __call__(self, steps: jax.Array) -> jax.Array:
        """The value after ``steps`` batches."""
        return self.rule(steps)


@factory
def exponential(momentum: float = 0.99) -> Schedule:
    """Weights of an exponential average with decay β, debiased: α_m = (1 − β) / (1 − βᵐ).

    The weights of the last batches decrease as 1, β, β², … and sum to one at every step.

    Args:
      momentum: the decay β in [0, 1), the fraction kept; 0 keeps only the last batch.

    Returns:
      The schedule m ↦ α_m, the weight of the m-th batch.

    Raises:
      ValueError: ``momentum`` outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.exponential(0.5)(jnp.array([1.0, 2.0]))
      Array([1.       , 0.6666667], dtype=float32)

    Differs from Flax and PyTorch: their averages start at 0 and 1 and stay biased towards
    them for several times 1 / (1 − β) steps.
    """
    check_fraction("momentum", momentum)
    log_decay = math.log(momentum) if momentum else -math.inf
    return Schedule(lambda m: jnp.expm1(log_decay) / jnp.expm1(log_decay * m))


@factory
def cumulative() -> Schedule:
    """Weights of the plain mean of all batches: α_m = 1 / m.

    Returns:
      The schedule m ↦ α_m, the weight of the m-th batch.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.cumulative()(jnp.array([1.0, 4.0]))
      Array([1.  , 0.25], dtype=float32)
    """
    return Schedule(lambda m: 1.0 / m)


@factory
def diminishing(power: float = 1.0) -> Schedule:
    """Weights that decrease as a power: α_m = 1 / mᵖ.

    With p = 1 all batches have the same weight (``cumulative``). With p > 1 early batches
    have more weight: with p = 2 the first batch always keeps half of all weight. With p < 1
    late batches have more weight.

    Args:
      power: p, not negative; 0 keeps only the last batch.

    Returns:
      The schedule m ↦ α_m, the weight of the m-th batch.

    Raises:
      ValueError: a negative ``power``.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.diminishing(2.0)(jnp.array([1.0, 4.0]))
      Array([1.    , 0.0625], dtype=float32)
    """
    if not power >= 0.0:
        raise ValueError(
            f"power is {power!r}, expected a number p of at least 0 in 1 / m**p."
        )
    return Schedule(lambda m: m**-power)


@factory
def ramp(steps: int) -> Schedule:
    """A burn-in that lengthens the window gradually, from 1 to k in ``steps`` iterations.

    Args:
      steps: number of iterations until the whole window is in use, at least 1.

    Returns:
      The schedule for ``cross_iteration_batch_norm(burn_in=...)``. It maps the number of
      iterations so far to the share of the past iterations in use.

    Raises:
      ValueError: ``steps`` is not an int of at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.ramp(4)(jnp.array([0.0, 1.0, 8.0]))
      Array([0.  , 0.25, 1.  ], dtype=float32)
    """
    check_count("steps", steps, 1)
    return Schedule(lambda seen: jnp.minimum(seen / steps, 1.0))


@factory
def matched_noise(batch_size: int, steps: int, *, like: int = 32) -> Schedule:
    """Weights that reduce the noise of small batches to that of larger ones.

    With q = min(batch_size / like, 1) and T = ``steps``, the weight of the m-th batch is::

        α_m = 1 + q − q ^ (max(T − m, 0) / (T − 1))

    The weight falls from 1 to q. At first the weights of the network move fastest, and the
    average is the batch alone.

    Args:
      batch_size: number of examples per batch, at least 1.
      steps: T, the number of batches until training ends, at least 2.
      like: number of examples of a batch with the noise wanted at the end.

    Returns:
      The schedule for ``momentum_batch_norm``, m ↦ α_m.

    Raises:
      ValueError: an argument is not a whole number in its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.matched_noise(batch_size=8, steps=101)(jnp.array([1.0, 51.0, 101.0]))
      Array([1.  , 0.75, 0.25], dtype=float32)

    Reference: Hongwei Yong et al., "Momentum Batch Normalization for Deep Learning with
    Small Batch Size", ECCV 2020, doi:10.1007/978-3-030-58610-2_14.
    """
    check_count("batch_size", batch_size, 1)
    check_count("steps", steps, 2)
    check_count("like", like, 1)
    q = min(batch_size / like, 1.0)
    return Schedule(lambda m: 1.0 + q - q ** (jnp.maximum(steps - m, 0.0) / (steps - 1)))


def rescale_decay(decay: float, batch_size: int, like: int = 32) -> float:
    """Adapts a decay to the batch size, so that its memory holds as many examples.

    The result is ``decay ** (batch_size / like)``. An average with decay 0.99 holds about
    100 batches. That is 3,200 examples at 32 per batch, but 100 at one. This function keeps
    the 3,200. Use it for ``momentum``, and for the decays of an optimizer, such as b2 of
    Adam.

    Args:
      decay: the fraction kept at each step of ``like`` examples, in [0, 1).
      batch_size: number of examples per step, at least 1.
      like: number of examples per step for which ``decay`` was chosen.

    Returns:
      The decay for steps of ``batch_size``, a float.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> import cbn_jax as cbn
      >>> momentum = cbn.rescale_decay(0.99, batch_size=1)
      >>> round(momentum, 5)
      0.99969
      >>> estimator = cbn.small_batch_norm(batch_size=1, momentum=momentum)

    Reference: Martin Marek, Sanae Lotfi, Aditya Somasundaram, Andrew Gordon Wilson, Micah
    Goldblum, "Small Batch Size Training for Language Models: When Vanilla SGD Works, and
    Why Gradient Accumulation Is Wasteful", NeurIPS 2025, arXiv:2507.07101.
    """
    check_fraction("decay", decay)
    check_count("batch_size", batch_size, 1)
    check_count("like", like, 1)
    return decay ** (batch_size / like)


def averaging(momentum: float | ScheduleFn, name: str = "momentum") -> ScheduleFn:
    """A schedule unchanged; a number as the decay of an exponential average."""
    check_schedule(name, momentum)
    if callable(momentum):
        return momentum
    check_fraction(name, momentum)
    return exponential(momentum)


def check_schedule(name: str, value: Any) -> None:
    """Refuses ``cumulative`` without parentheses, which makes a schedule but is not one."""
    if is_factory(value):
        raise TypeError(
            f"{name} is the function {value.__name__}, expected a number or a schedule; "
            f"write {name}={value.__name__}(...)."
        )


def weights(average: ScheduleFn, steps: jax.Array) -> jax.Array:
    """α_m of each feature; schedules of optax take one count at a time."""
    return jax.vmap(average)(steps)
