# SPDX-License-Identifier: Apache-2.0
"""Mean and variance of the values on one device, accurate in float32."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .checks import activations, check_mask
from .moments import Moments, align, wide


class Part(NamedTuple):
    """The part of a batch's moments from one device.

    Attributes:
      pivot: ``[C]``, the rounded mean; the gradient of the mean flows through it.
      moments: moments of ``x − pivot``; their mean is the rounding error of the pivot.
    """

    pivot: jax.Array
    moments: Moments


@jax.named_scope("moments")
def device_moments(x: jax.Array, mask: jax.Array | None = None) -> Part:
    """This device's part of ``batch_moments``."""
    x = activations("batch_moments", x)
    check_mask("batch_moments", x, mask)
    x = x.astype(wide(x.dtype))
    if 0 in x.shape:
        return _nothing(x)
    return _part(x) if mask is None else _masked_part(x, mask)


def about_zero(part: Part) -> Moments:
    """The moments of ``x`` itself."""
    return part.moments._replace(mean=part.pivot)


def count_values(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The number of values of each feature that count on this device, ``[C]``."""
    rows, dtype = tuple(range(x.ndim - 1)), wide(x.dtype)
    if mask is None:
        return jnp.full(x.shape[-1], math.prod(x.shape[:-1]), dtype)
    return jnp.broadcast_to(mask, x.shape).astype(bool).sum(axis=rows, dtype=dtype)


def _part(x: jax.Array) -> Part:
    rows = tuple(range(x.ndim - 1))
    count = jnp.full(x.shape[-1], math.prod(x.shape[:-1]), x.dtype)
    return _about_mean(x, _start(x), count, lambda values: values.sum(axis=rows))


def _masked_part(x: jax.Array, mask: jax.Array) -> Part:
    rows = tuple(range(x.ndim - 1))
    mask = jnp.broadcast_to(mask, x.shape).astype(bool)
    count = mask.sum(axis=rows, dtype=x.dtype)

    def total(values):
        return jnp.where(mask, values, 0.0).sum(axis=rows)

    # The middle position may be masked, so the start is the mean.
    start = lax.stop_gradient(total(x * align(inverse(count), x)))
    # A NaN that does not count would give 0 times NaN in gradients.
    return _about_mean(jnp.where(mask, x, align(start, x)), start, count, total)


def _about_mean(
    x: jax.Array,
    start: jax.Array,
    count: jax.Array,
    total: Callable[[jax.Array], jax.Array],
) -> Part:
    """The mean, then the squares of deviations from it.

    The nearest float32 number may still be a standard deviation away from the mean, so the
    function keeps the rounding error.
    """
    share = inverse(count)
    # The division comes before the sum. After the sum, XLA may fuse a division with the
    # additions below, and then round the mean differently in each place that uses it.
    offset = total((x - align(start, x)) * align(share, x))
    mean = start + offset
    pivot = lax.stop_gradient(mean)  # gradients flow through the sums alone
    rest = offset - (pivot - start)
    var = not_negative(_squares(total, x, pivot) * share - jnp.square(rest))
    rest = lax.stop_gradient(rest)  # the gradient of the mean flows once
    return Part(mean, Moments(rest, var, count))


def inverse(count: jax.Array) -> jax.Array:
    return 1.0 / jnp.maximum(count, 1.0)


def not_negative(var: jax.Array) -> jax.Array:
    """NaN for a negative variance: a scale of 0 would hide an overflow, NaN shows it."""
    return jnp.where(var < jnp.inf, jnp.maximum(var, 0.0), jnp.nan)


@functools.partial(jax.checkpoint, static_argnums=0)
def _squares(
    total: Callable[[jax.Array], jax.Array], x: jax.Array, pivot: jax.Array
) -> jax.Array:
    """Σ (x − pivot)². The gradient recomputes the deviations instead of keeping them."""
    return total(jnp.square(x - align(pivot, x)))


def _start(x: jax.Array) -> jax.Array:
    """A value within the range of the feature: the middle position, averaged over examples.

    The rounding error of the mean grows with its distance from the start. A value between
    the least and the greatest of N values is at most √N standard deviations away. The batch
    axis is averaged instead of sliced, because it may be sharded.
    """
    middle = lax.stop_gradient(x)
    for axis in range(1, x.ndim - 1):
        at = x.shape[axis] // 2
        middle = lax.slice_in_dim(middle, at, at + 1, axis=axis)
    share = 1.0 / jnp.asarray(x.shape[0], x.dtype)
    return (middle * share).sum(axis=range(x.ndim - 1))


def _nothing(x: jax.Array) -> Part:
    """The part of a batch without a value."""
    zero = jnp.zeros(x.shape[-1], x.dtype)
    return Part(zero, Moments(zero, zero, zero))
