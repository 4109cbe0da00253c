# SPDX-License-Identifier: Apache-2.0
"""Mean and variance of a batch: accurate in float32, one collective."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .checks import check_activations

AxisName = Hashable | None


class Moments(NamedTuple):
    """Mean and biased variance of ``size`` values per feature.

    Attributes:
      mean: ``[..., C]``.
      var: ``[..., C]``, not negative, divided by ``size`` and not by ``size − 1``.
      size: ``[..., C]``, how many values stand behind them; 0 where there was none.
    """

    mean: jax.Array
    var: jax.Array
    size: jax.Array


def pool_moments(moments: Moments) -> Moments:
    """Moments of the union of groups, from the moments of each: the law of total variance.

    Exact for groups of any size, so it joins devices, iterations and replicas alike.

    Args:
      moments: moments of ``G`` groups, every field ``[G, C]``.

    Returns:
      Moments of all their values together, every field ``[C]``. Groups with ``size = 0``
      have no say; where all are empty, mean and variance are 0.

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
    # Differences to one of the means keep the digits that a sum of large means would lose.
    offset = jnp.where(count > 0, mean - mean[:1], 0.0)
    center = (share * offset).sum(axis=0)
    spread = jnp.where(count > 0, var + jnp.square(offset - center[None]), 0.0)
    return Moments(mean[0] + center, (share * spread).sum(axis=0), total)


def pool_two(current: Moments, past: Moments) -> Moments:
    """``pool_moments`` of two, every field ``[C]``."""
    return pool_moments(jax.tree.map(lambda *pair: jnp.stack(pair), current, past))


def batch_moments(
    x: jax.Array, *, axis_name: AxisName = None, mask: jax.Array | None = None
) -> Moments:
    """Mean and biased variance of each feature over all other axes.

    ``var = E[(x − c)²] − E[x − c]²`` about a pivot c taken from the data itself. The
    textbook form, c = 0, loses all digits of the variance once the mean is a few thousand
    standard deviations; with a value of the batch as c nothing cancels, and the two sums
    do not wait for each other, so that a compiler can take both in one pass. The relative
    error of the variance stays below 1e-5 in float32 up to mean/std = 1e5.

    Args:
      x: activations ``[..., C]``, floating point, at least two axes, not empty.
      axis_name: axis or axes of ``shard_map``, ``pmap`` or ``vmap`` over which the batch
        is spread. Leave it None under ``jit``, also with a sharded batch.
      mask: broadcastable to ``x``, True where a value counts. Values that do not count may
        be anything, NaN included: they reach neither the moments nor their gradients.

    Returns:
      Moments, every field ``[C]``, in float32 (float64 for float64 input). A feature
      without a single value that counts has mean 0, variance 0, size 0. A feature with
      NaN or inf among its values has moments that are not finite.

    Raises:
      TypeError: ``x`` is not floating point.
      ValueError: ``x`` is empty or has fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.batch_moments(jnp.array([[1.0], [3.0]])).var
      Array([1.], dtype=float32)

    Under an axis name every device learns the moments of all others in one collective of
    ``devices · 4C`` numbers and pools them exactly. A matrix ``[N, C]`` and a masked batch
    are read once more, for the pivot. XLA's CPU backend reads ``x`` once for each sum, as
    it does for Flax's default.
    """
    part = device_moments(x, mask)
    if axis_name is None:
        return about_zero(part)
    parts, _ = exchange(part, (), axis_name)
    return pool_devices(parts)


class Part(NamedTuple):
    """What one device contributes to a batch's moments.

    Attributes:
      pivot: ``[C]``, a value near the mean.
      moments: of ``x − pivot``, whose mean has digits that ``x`` in float32 has not.
    """

    pivot: jax.Array
    moments: Moments


@jax.named_scope("moments")
def device_moments(x: jax.Array, mask: jax.Array | None = None) -> Part:
    """This device's part of ``batch_moments``."""
    check_activations("batch_moments", x)
    x = jnp.asarray(x, wide(x.dtype))
    return _about_pivot(x) if mask is None else _masked_about_pivot(x, mask)


def about_zero(part: Part) -> Moments:
    """The moments of ``x`` itself."""
    return part.moments._replace(mean=part.pivot + part.moments.mean)


def pool_devices(parts: Part) -> Moments:
    """Moments of the whole batch, from the parts of all devices, every field ``[D, C]``."""
    first = parts.pivot[0]
    mean = parts.moments.mean + (parts.pivot - first[None])
    return about_zero(Part(first, pool_moments(parts.moments._replace(mean=mean))))


def instance_moments(x: jax.Array, mask: jax.Array | None = None) -> Moments:
    """Moments of each feature of each example, over the example's positions.

    Every field is ``[N, 1, …, 1, C]``. A matrix ``[N, C]`` has one position an example:
    its variances are 0.
    """
    positions = jnp.asarray(x[:, None] if x.ndim == 2 else x)  # vmap keeps one of NumPy
    if mask is None:
        moments = jax.vmap(batch_moments)(positions)
    else:
        mask = jnp.broadcast_to(mask, x.shape).reshape(positions.shape)
        moments = jax.vmap(lambda x, mask: batch_moments(x, mask=mask))(positions, mask)
    rows = tuple(range(1, x.ndim - 1))
    return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, rows), moments)


def pool_examples(instance: Moments, axis_name: AxisName = None) -> Moments:
    """Batch moments, every field ``[C]``, from those of all examples on all devices."""
    each = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), instance)
    moments = pool_moments(each)
    if axis_name is None:
        return moments
    devices, _ = exchange(moments, (), axis_name)
    return pool_moments(devices)


def _about_pivot(x: jax.Array) -> Part:
    """A pivot per feature, and the moments of ``x − pivot``."""
    pivot, offset, var = _offset_and_var(x)
    return Part(pivot, Moments(offset, var, jnp.full_like(var, x.size // x.shape[-1])))


@jax.custom_jvp
def _offset_and_var(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = tuple(range(x.ndim - 1))
    pivot = _pivot(x)
    offset = (x - align(pivot, x)).mean(axis=rows)
    # Without the barrier XLA's CPU backend computes x − pivot once, writes it to memory
    # and reads it back twice; with it, each sum subtracts on the fly.
    again = lax.optimization_barrier(pivot)
    spread = jnp.square(x - align(again, x)).mean(axis=rows)
    return pivot, offset, jnp.maximum(spread - jnp.square(offset), 0.0)


@_offset_and_var.defjvp
def _offset_and_var_jvp(primals, tangents):
    """The textbook derivative: shorter and better conditioned than that of the sums."""
    (x,), (x_dot,) = primals, tangents
    rows = tuple(range(x.ndim - 1))
    pivot, offset, var = _offset_and_var(x)
    offset_dot = x_dot.mean(axis=rows)
    deviation = x - align(pivot + offset, x)  # as in normalize, which XLA sees
    var_dot = 2.0 * (deviation * x_dot).mean(axis=rows)
    return (pivot, offset, var), (jnp.zeros_like(pivot), offset_dot, var_dot)


def _pivot(x: jax.Array) -> jax.Array:
    """A typical value per feature: the middle position, averaged over the examples.

    The rounding error of the variance grows with (pivot − mean)² / variance, so any value
    of the batch would do but an outlier, and first positions often are: corners, start
    tokens. The batch axis is not sliced but averaged, because it may be sharded.
    """
    middle = tuple(n // 2 for n in x.shape[1:-1])
    return x[(slice(None), *middle)].mean(axis=0)


def _masked_about_pivot(x: jax.Array, mask: jax.Array) -> Part:
    rows = tuple(range(x.ndim - 1))
    mask = jnp.broadcast_to(mask, x.shape).astype(bool)
    count = mask.sum(axis=rows, dtype=x.dtype)

    def mean_of(values):
        return values.sum(axis=rows) / jnp.maximum(count, 1.0)

    # The middle position may not count, so the pivot is the mean: two passes.
    pivot = lax.stop_gradient(mean_of(jnp.where(mask, x, 0.0)))
    shifted = jnp.where(mask, x - align(pivot, x), 0.0)
    offset = mean_of(shifted)
    var = mean_of(jnp.square(shifted)) - jnp.square(offset)
    return Part(pivot, Moments(offset, jnp.maximum(var, 0.0), count))


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of statistics: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def align(per_feature: jax.Array, x: jax.Array) -> jax.Array:
    """Leading axes of size 1 for ``[C]`` (or more), until its rank is that of ``x``."""
    return jnp.expand_dims(per_feature, range(x.ndim - per_feature.ndim))


def exchange(rows: Any, sums: Any, axis_name: AxisName) -> tuple[Any, Any]:
    """What all devices have, on every device, in one collective.

    Each leaf of ``rows`` is stacked to ``[devices, ...]``, each of ``sums`` is added up.
    Rows travel as a sum of one-hot rows instead of an ``all_gather``: the result is known
    to be the same on all devices, so that ``shard_map`` accepts a state made of it as
    replicated.
    """
    if axis_name is None:
        return jax.tree.map(lambda leaf: leaf[None], rows), sums
    here = lax.axis_index(axis_name) == jnp.arange(lax.axis_size(axis_name))

    def row(leaf):
        return jnp.where(here.reshape(-1, *(1,) * leaf.ndim), leaf[None], 0.0)

    return lax.psum((jax.tree.map(row, rows), sums), axis_name)
