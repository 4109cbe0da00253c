# SPDX-License-Identifier: Apache-2.0
"""Running moments: averages over the batches of training, for inference.

All averages are ``r ← r + α_m (batch − r)``; they differ in α_m, the weight of batch m.
With α₁ = 1 there is nothing to debias: after one step the average is that step's value.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .checks import in_dtype
from .moments import AxisName, Moments, device_count
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


LONG = 1e6  # batches behind an average from elsewhere: weights no longer change


def from_batch_stats(mean: jax.Array, var: jax.Array) -> RunningMoments:
    """A state of ``batch_norm`` from the ``batch_stats`` of a trained Flax layer.

    The averages have the weight of very many batches. An exponential average then
    continues at its own pace, and an average over all batches hardly changes.

    Args:
      mean: ``[C]``.
      var: ``[C]``, biased (Flax's is; PyTorch's times (n − 1)/n, n values per feature).

    Returns:
      A ``RunningMoments``, also the state of wrappers around ``batch_norm`` that add none.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> batch_stats = {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}
      >>> cbn.from_batch_stats(**batch_stats).var
      Array([4.], dtype=float32)
    """
    # Copies: a state is donated, and what it was made of may be used again.
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
    """Takes one batch into the average; a feature without usable moments stays as it is."""
    running, moments = lax.stop_gradient((running, moments))
    moments = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moments)
    usable = usable_moments(moments)
    steps = running.steps + usable.astype(jnp.float32)
    alpha = weights(average, jnp.maximum(steps, 1.0))

    def blend(old, new):
        # The first batch is all there is to average, whatever the schedule. A difference
        # to the start, 1, would cost a small variance its digits.
        blended = jnp.where(steps > 1, old + alpha * (new - old), new)
        return jnp.where(usable, blended, old)

    return RunningMoments(
        mean=blend(running.mean, moments.mean),
        var=blend(running.var, moments.var),
        steps=steps,
    )


def independent(x: jax.Array, window: Moments) -> jax.Array:
    """Estimates the number of independent values in a window of batches like ``x``.

    Neighbors in an image are alike: n positions of an example count as √n values.
    """
    positions = jnp.asarray(math.prod(x.shape[1:-1]), window.size.dtype)
    return window.size / jnp.sqrt(positions)[None]


def restarted(
    running: RunningMoments, window: Moments, values: jax.Array, epsilon: float
) -> RunningMoments:
    """Restarts the running moments of features where the window contradicts them.

    After a conversion, a large step or a change of the data, an average of many windows is
    out of date. If its mean or variance is more than three standard errors from that of
    the window, it takes the window's moments. A window without variance contradicts
    nothing.

    Args:
      running: the averages.
      window: the window's moments, ``[C]``.
      values: ``[C]``, the number of independent values in the window. With fewer than
        eight nothing restarts.
      epsilon: ε. Variances with it are compared, because those normalize.
    """
    running, window = lax.stop_gradient((running, window))
    old = in_dtype(running, window.mean.dtype)
    inv_std = lax.rsqrt(window.var + epsilon)
    # Deviations in squared standard errors. That of the variance is (r − 1)² / r with the
    # ratio r of both, which is log(r)² for a small deviation.
    ratio = (old.var + epsilon) * jnp.square(inv_std)
    mean_off = jnp.square((window.mean - old.mean) * inv_std) * values > 9.0
    var_off = jnp.square(ratio - 1.0) * values > 18.0 * ratio
    past = finite_moments(window) & (window.var > 0) & (values >= 8) & (mean_off | var_off)
    mean, var = in_dtype((window.mean, window.var), jnp.float32)
    return running._replace(
        mean=jnp.where(past, mean, running.mean), var=jnp.where(past, var, running.var)
    )


# A single value has no variance. Where the number of values is static, too few are an
# error; elsewhere such a feature is normalized by the running statistics and leaves them
# as they are.


def check_values(method: str, x: jax.Array, axis_name: AxisName, least: int = 2) -> None:
    """A batch has at least so many values per feature, here and on the other devices."""
    count = math.prod(x.shape[:-1]) * device_count(axis_name)
    if isinstance(count, int) and count < least:  # else the shape is symbolic
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
    """True for features of more than one value; in a window, values have weights."""
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
    """True for features whose moments an average may take in."""
    return finite_moments(moments) & has_variance(moments)


def finite_moments(moments: Moments) -> jax.Array:
    """True for features whose moments a window may take in, also those of one value.

    One overflow or NaN must not enter a state: it shows in its own step and in no other.
    """
    # A mean that is not finite makes the variance NaN.
    return jnp.isfinite(moments.var) & (moments.size > 0)
