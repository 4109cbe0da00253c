# SPDX-License-Identifier: Apache-2.0
"""Mean and variance of values, and of the union of groups of values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Moments(NamedTuple):
    """Mean and biased variance of ``size`` values per feature.

    Attributes:
      mean: ``[..., C]``.
      var: ``[..., C]``, not negative, divided by ``size`` and not by ``size − 1``.
      size: ``[..., C]``, the number of values; 0 if there was none.
    """

    mean: jax.Array
    var: jax.Array
    size: jax.Array


def pool_moments(moments: Moments) -> Moments:
    """Moments of the union of groups, from the moments of each: the law of total variance.

    The function is exact for groups of any size, so it joins devices, iterations and
    replicas alike.

    Args:
      moments: moments of ``G`` groups, every field ``[G, C]``.

    Returns:
      Moments of all their values together, every field ``[C]``. Groups with ``size = 0`` do
      not count. If all groups are empty, mean and variance are 0.

    Example:
      Two groups, {0, 2} and {4}:

      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> pair = cbn.Moments(
      ...     mean=jnp.array([[1.0], [4.0]]),
      ...     var=jnp.array([[1.0], [0.0]]),
      ...     size=jnp.array([[2.0], [1.0]]),
      ... )
      >>> cbn.pool_moments(pair).mean
      Array([2.], dtype=float32)
    """
    mean, var, count = moments
    total = count.sum(axis=0)
    share = count / jnp.where(total > 0, total, 1.0)[None]
    mean = jnp.where(count > 0, mean, 0.0)
    # Differences from the rounded mean keep the digits that a sum of large means would
    # lose.
    pivot = lax.stop_gradient((share * mean).sum(axis=0))
    offset = jnp.where(count > 0, mean - pivot[None], 0.0)
    center = (share * offset).sum(axis=0)
    spread = jnp.where(count > 0, var + jnp.square(offset - center[None]), 0.0)
    return Moments(pivot + center, (share * spread).sum(axis=0), total)


def pool_two(current: Moments, past: Moments) -> Moments:
    """``pool_moments`` of two groups, every field ``[C]``."""
    total = current.size + past.size
    share = current.size / jnp.where(total > 0, total, 1.0)
    offset = current.mean - past.mean
    spread = current.var + (1.0 - share) * jnp.square(offset)
    return Moments(
        mean=past.mean + share * offset,
        var=(1.0 - share) * past.var + share * spread,
        size=total,
    )


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of statistics: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def align(per_feature: jax.Array, x: jax.Array) -> jax.Array:
    """Adds leading axes of size 1 to ``[C]`` (or more), up to the rank of ``x``."""
    return jnp.expand_dims(per_feature, range(x.ndim - per_feature.ndim))
