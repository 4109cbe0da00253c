# SPDX-License-Identifier: Apache-2.0
"""A layer at some of its positions: x = ⟨P, θ⟩, where P = ∂x/∂θ is an input patch."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import max_dim, min_dim

from .layers import Params
from .moments import (
    AxisName,
    Moments,
    device_count,
    device_moments,
    pool_devices,
    wide,
)
from .source import Source

# A TPU multiplies in bfloat16 by default, which is not enough for statistics.
_matmul = functools.partial(jnp.matmul, precision="highest")
_einsum = functools.partial(jnp.einsum, precision="highest")


class Sample(NamedTuple):
    """Some positions of a batch.

    Attributes:
      patches: P, leaves ``[n, *leaf.shape[:-1], groups]``.
      weight: ``[n, 1]``, one over the number of positions, 0 where a position does not
        count (``mask``). ``Σ weight · f`` is the sample's mean of f.
    """

    patches: Params
    weight: jax.Array


def moments_and_sample(
    source: Source,
    x: jax.Array,
    samples: int | None,
    step: jax.Array,
    sums: Any = (),
    *,
    axis_name: AxisName = None,
    mask: jax.Array | None = None,
    pivot: jax.Array | None = None,
) -> tuple[Moments, Sample, Any]:
    """Moments of the batch, about ``samples`` of its positions, and the totals of ``sums``.

    Equally many positions of each example; one of some examples where there are more of
    them than samples; all positions for None. Which ones is a function of ``step``.
    Nothing in the sample carries a gradient.

    Every device learns the positions of all, in the one collective of the moments: a few
    patches are less than the derivatives, as large as θ, that each would make of its own.
    """
    part = device_moments(x, mask)
    positions = math.prod(x.shape[1:-1])
    n = per_example(x.shape[0], positions, samples, axis_name)
    index = _strata(x.shape[0], positions, n, step, axis_name)
    sample = _take(source, lax.stop_gradient(x), index, mask)
    place, there = _places(x.shape[0] * n, n, samples, step, axis_name)
    if place is not None:
        sample = jax.tree.map(lambda leaf: _rows_at(leaf, place, there), sample)
    moments, (sample, sums) = pool_devices(part, (sample, sums), axis_name, pivot)
    total = jnp.maximum(sample.weight.sum(), 1.0)
    return moments, sample._replace(weight=sample.weight / total), sums


def _take(source: Source, x: jax.Array, index: jax.Array, mask: jax.Array | None) -> Sample:
    """The positions ``index`` ``[N, n]`` of this device, with weights 1 and 0."""
    dtype = wide(x.dtype)
    patches = jax.tree.map(lambda p: p.astype(dtype), source.patches(index))
    if mask is None:
        return Sample(patches, jnp.ones((index.size, 1), dtype))
    counts = jnp.broadcast_to(mask, (*x.shape[:-1], 1)).astype(bool)
    counts = jnp.take_along_axis(counts.reshape(x.shape[0], -1), index, 1).reshape(-1, 1)
    patches = jax.tree.map(lambda p: jnp.where(per_row(counts, p), p, 0.0), patches)
    return Sample(patches, counts.astype(dtype))


def per_example(
    examples: int, positions: int, samples: int | None, axis_name: AxisName
) -> int:
    """How many positions of each example make about ``samples`` on all devices."""
    if samples is None:
        return positions
    share = samples // (examples * device_count(axis_name))
    return min_dim(positions, max_dim(1, share))  # also symbolic sizes


def _strata(
    examples: int, positions: int, n: int, step: jax.Array, axis_name: AxisName
) -> jax.Array:
    """Positions ``[examples, n]``, one in each of n equal parts of ``range(positions)``.

    Where in its part follows a sequence of low discrepancy, which costs no random numbers.
    Examples are counted over all devices, so that many look where one would.
    """
    if n == positions:
        return jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (examples, n))
    first = 0 if axis_name is None else lax.axis_index(axis_name) * examples
    example = (first + jnp.arange(examples)).astype(jnp.uint32)
    turns = _sequence(step, example[:, None], jnp.arange(n, dtype=jnp.uint32)[None])
    width = jnp.asarray(positions, jnp.float32) / jnp.asarray(n, jnp.float32)
    index = (jnp.arange(n, dtype=jnp.float32)[None] + turns) * width
    return jnp.minimum(index.astype(jnp.int32), positions - 1)


def _sequence(step: jax.Array, example: jax.Array, part: jax.Array) -> jax.Array:
    """Numbers from 0 to 1 that fill it evenly, along each argument and over all of them.

    Multiples of 1/g, 1/g², 1/g³ without their whole parts, where g⁴ = g + 1, in units of
    2⁻³². Whole numbers of 32 bits drop the whole parts by themselves.
    """
    a, b, c = (jnp.uint32(each) for each in (3518319155, 2882110345, 2360945575))
    turns = a * step.astype(jnp.uint32) + b * example + c * part
    return turns.astype(jnp.float32) * 2.0**-32


def _places(
    here: int, n: int, samples: int | None, step: jax.Array, axis_name: AxisName
) -> tuple[jax.Array | None, jax.Array | None]:
    """Which of this device's rows stand at each row of the sample, and whether any does.

    Of more examples than samples, evenly many are taken, others in every step.
    """
    every = here * device_count(axis_name)
    most = every if samples is None else samples
    few = n == 1 and isinstance(every, int) and every > most
    if axis_name is None and not few:
        return None, None
    rows = jnp.arange(every)
    if few:
        # Another sequence than that of the positions: their pairs fill the square.
        shift = _sequence(jnp.uint32(0), jnp.uint32(0), step.astype(jnp.uint32)) * every
        rows = (jnp.arange(most) * every // most + shift.astype(int)) % every
    if axis_name is None:
        return rows, None
    place = rows - lax.axis_index(axis_name) * here
    return jnp.clip(place, 0, here - 1), (place >= 0) & (place < here)


def _rows_at(leaf: jax.Array, place: jax.Array, there: jax.Array | None) -> jax.Array:
    rows = leaf[place]
    return rows if there is None else jnp.where(per_row(there, rows), rows, 0.0)


def product(patches: Params, params: Params) -> jax.Array:
    """⟨P, θ⟩ ``[n, C]``: the layer at the positions of the patches."""

    def one(patch, leaf):
        n, groups = patch.shape[0], patch.shape[-1]
        leaf = leaf.astype(patch.dtype)
        if groups == 1:  # a batched matrix product is far slower on a CPU
            return _matmul(patch.reshape(n, -1), leaf.reshape(-1, leaf.shape[-1]))
        patch, leaf = (
            patch.reshape(n, -1, groups),
            leaf.reshape(-1, groups, leaf.shape[-1] // groups),
        )
        return _einsum("ndg,dgc->ngc", patch, leaf).reshape(n, -1)

    return jax.tree.reduce(jnp.add, jax.tree.map(one, patches, params))


def pull(patches: Params, cotangent: jax.Array) -> Params:
    """Σₙ cotangentₙ Pₙ, the transpose of ``product``: leaves ``[*, C]``."""

    def one(patch):
        n, groups = patch.shape[0], patch.shape[-1]
        if groups == 1:
            pulled = _matmul(patch.reshape(n, -1).T, cotangent)
        else:
            each = cotangent.reshape(n, groups, -1)
            pulled = _einsum("ndg,ngc->dgc", patch.reshape(n, -1, groups), each)
        return pulled.reshape(*patch.shape[1:-1], -1)

    return jax.tree.map(one, patches)


def inner(derivative: Params, params: Params) -> jax.Array:
    """⟨d, θ⟩ per feature, ``[C]``: summed over all the parameters that feature c owns."""

    def one(d, leaf):
        return (d * leaf.astype(d.dtype)).sum(axis=range(leaf.ndim - 1))

    return jax.tree.reduce(jnp.add, jax.tree.map(one, derivative, params))


def per_row(values: jax.Array, leaf: jax.Array) -> jax.Array:
    """``[n, 1]`` against leaves ``[n, ...]``."""
    return values.reshape(-1, *(1,) * (leaf.ndim - 1))
