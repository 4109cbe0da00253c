# SPDX-License-Identifier: Apache-2.0
"""Sums over devices: the moments of a batch that is spread, in one collective."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .moments import Moments
from .sums import Part, about_zero, inverse, not_negative

AxisName = Hashable | None


def pool_devices(
    part: Part, sums: Any, axis_name: AxisName, pivot: jax.Array | None = None
) -> tuple[Moments, Any]:
    """Moments of the whole batch, and the totals of ``sums`` over the devices."""
    if axis_name is None:
        return about_zero(part), sums
    # Zeros made from the mean would count as different on every device.
    pivot = jnp.zeros(part.pivot.shape) if pivot is None else lax.stop_gradient(pivot)
    pivot = pivot.astype(part.pivot.dtype)
    totals, sums = lax.psum((_about(part, pivot), sums), axis_name)
    moments = _from_totals(totals, pivot)
    mean, var = lax.stop_gradient((moments.mean, moments.var))
    far = jnp.square(mean - pivot) > _FAR**2 * var

    def again():
        return _from_totals(lax.psum(_about(part, mean), axis_name), mean)

    # The condition is the same on all devices, so that either all or none of them take part
    # in the second collective.
    return lax.cond(far.any(), again, lambda: moments), sums


_FAR = 8.0  # standard deviations; with such a pivot squares lose two digits


class _Totals(NamedTuple):
    """Sums over the values of devices: 1, x − pivot and (x − pivot)²."""

    size: jax.Array
    first: jax.Array
    second: jax.Array


def _about(part: Part, pivot: jax.Array) -> _Totals:
    rest, var, size = part.moments
    offset = jnp.where(size > 0, (part.pivot - pivot) + rest, 0.0)
    return _Totals(size, size * offset, size * (var + jnp.square(offset)))


def _from_totals(totals: _Totals, pivot: jax.Array) -> Moments:
    share = inverse(totals.size)
    offset = totals.first * share
    var = not_negative(totals.second * share - jnp.square(offset))
    mean = jnp.where(totals.size > 0, pivot + offset, 0.0)
    return Moments(mean, var, totals.size)


def device_count(axis_name: AxisName) -> int:
    """The number of devices over which the batch is spread."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def total(sums: Any, axis_name: AxisName) -> Any:
    """The sums over all devices."""
    return sums if axis_name is None else lax.psum(sums, axis_name)


def of_devices(rows: Any, axis_name: AxisName) -> Any:
    """The rows of each device on every device: leaves ``[devices, ...]``, one collective.

    The rows are sent as a sum of one-hot rows instead of an ``all_gather``. The result
    then counts as the same on all devices, and ``shard_map`` accepts a state made of it as
    replicated.
    """
    if axis_name is None:
        return jax.tree.map(lambda leaf: leaf[None], rows)
    here = lax.axis_index(axis_name) == jnp.arange(lax.axis_size(axis_name))

    def row(leaf):
        return jnp.where(here.reshape(-1, *(1,) * leaf.ndim), leaf[None], 0.0)

    return lax.psum(jax.tree.map(row, rows), axis_name)
