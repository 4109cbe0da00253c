# SPDX-License-Identifier: Apache-2.0
"""A layer at some of its positions: x = ⟨P, θ⟩, where P = ∂x/∂θ is an input patch."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import max_dim, min_dim

from .layers import Params
from .moments import (
    AxisName,
    Moments,
    about_zero,
    device_count,
    device_moments,
    exchange,
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
      x: ``[n, C]``, the activations there.
      weight: ``[n, 1]``, one over the number of positions, 0 where a position does not
        count (``mask``). ``Σ weight · f`` is the sample's mean of f.
    """

    patches: Params
    x: jax.Array
    weight: jax.Array


def moments_and_sample(
    source: Source,
    x: jax.Array,
    samples: int | None,
    step: jax.Array,
    *,
    axis_name: AxisName = None,
    mask: jax.Array | None = None,
) -> tuple[Moments, Sample]:
    """Moments of the batch, and about ``samples`` of its positions.

    Equally many positions of each example; all of them where there are no more, or for
    None; at least one. Which ones is random, a function of ``step``. Nothing in the sample
    carries a gradient.

    Every device learns the positions of all, in the one collective of the moments: a few
    patches are less than the derivatives, as large as θ, that each would make of its own.
    """
    part = device_moments(x, mask)
    positions = math.prod(x.shape[1:-1])
    n = per_example(x.shape[0], positions, samples, axis_name)
    index = _strata(x.shape[0], positions, n, step, axis_name)
    sample = _take(source, lax.stop_gradient(x), index, mask)
    if axis_name is None:
        return about_zero(part), _weighted(sample)
    (parts, rows), _ = exchange((part, sample), (), axis_name)
    sample = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)
    return pool_devices(parts), _weighted(sample)


def _take(source: Source, x: jax.Array, index: jax.Array, mask: jax.Array | None) -> Sample:
    """The positions ``index`` ``[N, n]`` of this device, with weights 1 and 0."""
    dtype = wide(x.dtype)

    def at_index(values):
        values = values.reshape(x.shape[0], -1, values.shape[-1])
        return jnp.take_along_axis(values, index[..., None], 1).reshape(index.size, -1)

    patches = jax.tree.map(lambda p: p.astype(dtype), source.patches(index))
    values = at_index(x).astype(dtype)
    if mask is None:
        return Sample(patches, values, jnp.ones((index.size, 1), dtype))
    counts = at_index(jnp.broadcast_to(mask, (*x.shape[:-1], 1)).astype(bool))
    values = jnp.where(counts, values, 0.0)
    patches = jax.tree.map(lambda p: jnp.where(per_row(counts, p), p, 0.0), patches)
    return Sample(patches, values, counts.astype(dtype))


def _weighted(sample: Sample) -> Sample:
    """Weights that sum to one, or to zero."""
    return sample._replace(weight=sample.weight / jnp.maximum(sample.weight.sum(), 1.0))


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
    """Positions ``[examples, n]``, one in each of n equal parts of ``range(positions)``."""
    if n == positions:
        return jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (examples, n))
    key = jax.random.fold_in(jax.random.key(0), step.astype(jnp.uint32))
    # Drawn for the whole batch, so that many devices look where one would.
    jitter = jax.random.uniform(key, (examples * device_count(axis_name), n), jnp.float32)
    if axis_name is not None:
        first = lax.axis_index(axis_name) * examples
        jitter = lax.dynamic_slice_in_dim(jitter, first, examples)
    width = jnp.asarray(positions, jnp.float32) / jnp.asarray(n, jnp.float32)
    index = (jnp.arange(n, dtype=jnp.float32)[None] + jitter) * width
    return jnp.minimum(index.astype(jnp.int32), positions - 1)


def mean_patch(sample: Sample) -> Params:
    """E[P], leaves ``[*leaf.shape[:-1], groups]``."""
    return jax.tree.map(
        lambda p: (per_row(sample.weight, p) * p).sum(axis=0), sample.patches
    )


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
