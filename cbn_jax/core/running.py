# SPDX-License-Identifier: Apache-2.0
"""Running moments: averages over the batches of training, for inference.

All averages are ``r ← r + α_m (batch − r)``. They differ in α_m, the weight of batch m.
With α₁ = 1 no debiasing is needed: after one step the average is that step's value.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .checks import in_dtype
from .devices import AxisName, device_count
from .moments import Moments
from .schedules import ScheduleFn, weights


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


LONG = 1e6  # batches of an imported average, so many that weights no longer change


def from_batch_stats(mean: jax.Array, var: jax.Array) -> RunningMoments:
    """A state of ``batch_norm`` from the ``batch_stats`` of a trained Flax layer.

    The averages get the weight of very many batches. An exponential average then continues
    with its own decay, and an average over all batches hardly changes.

    Args:
      mean: ``[C]``.
      var: ``[C]``, biased. Flax's is biased. Multiply PyTorch's by (n − 1)/n, with n values
        per feature.

    Returns:
      A ``RunningMoments``. Wrappers around ``batch_norm`` without a state of their own use
      it too.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> batch_stats = {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}
      >>> cbn.from_batch_stats(**batch_stats).var
      Array([4.], dtype=float32)
    """
    # The arrays are copied: a state may be donated, and the caller may use the originals
    # again.
    mean, var = jnp.array(mean, jnp.float32), jnp.array(var, jnp.float32)
    if mean.shape != var.shape:
        raise ValueError(
            f"from_batch_stats got mean of shape {mean.shape} and var of shape "
            f"{var.shape}, expected [features] for both."
        )
    return RunningMoments(mean, var, jnp.full_like(mean, LONG))


def init_running(features: int) -> RunningMoments:
    """Running moments before the first batch."""
    return RunningMoments(
        mean=jnp.zeros(features, jnp.float32),
        var=jnp.ones(features, jnp.float32),
        steps=jnp.zeros(features, jnp.float32),
    )


def update_running(
    running: RunningMoments, moments: Moments, average: ScheduleFn
) -> RunningMoments:
    """Adds one batch to the average; unchanged for features without usable moments."""
    running, moments = lax.stop_gradient((running, moments))
    moments = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moments)
    usable = usable_moments(moments)
    steps = running.steps + usable.astype(jnp.float32)
    alpha = weights(average, jnp.maximum(steps, 1.0))

    def blend(old, new):
        # The first average is the first batch, for every schedule. A difference from the
        # initial 1 would cost a small variance its digits.
        blended = jnp.where(steps > 1, old + alpha * (new - old), new)
        return jnp.where(usable, blended, old)

    return RunningMoments(
        mean=blend(running.mean, moments.mean),
        var=blend(running.var, moments.var),
        steps=steps,
    )


def independent(x: jax.Array, window: Moments) -> jax.Array:
    """Estimates the number of independent values in a window of batches like ``x``.

    Neighbors in an image are similar: n positions of an example count as √n values.
    """
    positions = jnp.asarray(math.prod(x.shape[1:-1]), window.size.dtype)
    return window.size / jnp.sqrt(positions)[None]


def restarted(
    running: RunningMoments, window: Moments, values: jax.Array, epsilon: float
) -> RunningMoments:
    """Restarts the running moments of features that differ from the window.

    After a conversion, a large step or a change of the data, an average of many windows is
    out of date. If its mean or variance differs from that of the window by more than three
    standard errors, the average takes the window's moments. A window without variance
    restarts nothing.

    Args:
      running: the averages.
      window: the window's moments, ``[C]``.
      values: ``[C]``, the number of independent values in the window. With fewer than
        eight, nothing restarts.
      epsilon: ε. The function compares variances plus ε, because these normalize.
    """
    running, window = lax.stop_gradient((running, window))
    old = in_dtype(running, window.mean.dtype)
    inv_std = lax.rsqrt(window.var + epsilon)
    # Deviations in squared standard errors. For the variance it is (r − 1)² / r, with r the
    # ratio of both variances. For a small deviation this is about log(r)².
    ratio = (old.var + epsilon) * jnp.square(inv_std)
    mean_off = jnp.square((window.mean - old.mean) * inv_std) * values > 9.0
    var_off = jnp.square(ratio - 1.0) * values > 18.0 * ratio
    past = finite_moments(window) & (window.var > 0) & (values >= 8) & (mean_off | var_off)
    mean, var = in_dtype((window.mean, window.var), jnp.float32)
    return running._replace(
        mean=jnp.where(past, mean, running.mean), var=jnp.where(past, var, running.var)
    )


# A single value has no variance. If the number of values is static, too few values are an
# error. Otherwise the running statistics normalize such a feature, and it does not change
# them.


def check_values(method: str, x: jax.Array, axis_name: AxisName, least: int = 2) -> None:
    """Checks for at least ``least`` values per feature, on this and the other devices."""
    count = math.prod(x.shape[:-1]) * device_count(axis_name)
    if isinstance(count, int) and count < least:  # otherwise the shape is symbolic
        more = "use more examples, axis_name=..., or small_batch_norm(batch_size=1)."
        raise ValueError(
            f"{method} got x of shape {x.shape}, {'one' if count else 'no'} value per "
            f"feature in training, expected at least {'two' if least > 1 else 'one'}; "
            f"{more if count else 'skip an empty batch.'}"
        )


def several_values(x: jax.Array, axis_name: AxisName) -> bool:
    """Whether a batch without a mask is known to hold two values per feature."""
    count = math.prod(x.shape[:-1]) * device_count(axis_name)
    return isinstance(count, int) and count > 1


def has_variance(moments: Moments) -> jax.Array:
    """True for features with more than one value; in a window, values have weights."""
    return moments.size > 1


def known_moments(moments: Moments, running: RunningMoments) -> Moments:
    """The batch's moments, or the running ones for features without a variance."""
    known = has_variance(moments)
    return Moments(
        mean=jnp.where(known, moments.mean, running.mean.astype(moments.mean.dtype)),
        var=jnp.where(known, moments.var, running.var.astype(moments.var.dtype)),
        size=moments.size,
    )


def usable_moments(moments: Moments) -> jax.Array:
    """True for features whose moments an average may include."""
    return finite_moments(moments) & has_variance(moments)


def finite_moments(moments: Moments) -> jax.Array:
    """True for features whose moments a window may include, even those of one value.

    An overflow or NaN must not enter a state. It affects the output of its own step only.
    """
    # If the mean is not finite, the variance is NaN.
    return jnp.isfinite(moments.var) & (moments.size > 0)
