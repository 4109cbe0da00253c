# SPDX-License-Identifier: Apache-2.0
"""A layer at some of its positions: x = ⟨P, θ⟩, where P = ∂x/∂θ is an input patch."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import max_dim, min_dim

from .devices import AxisName, device_count, pool_devices
from .layers import Params
from .moments import Moments, wide
from .source import Source
from .sums import device_moments

# By default a TPU multiplies in bfloat16, which is not accurate enough for statistics.
_matmul = functools.partial(jnp.matmul, precision="highest")
_einsum = functools.partial(jnp.einsum, precision="highest")


class Sample(NamedTuple):
    """Some positions of a batch.

    Attributes:
      patches: P, leaves ``[n, *leaf.shape[:-1], groups]``.
      weight: ``[n, 1]``, one over the number of positions; 0 for a position that does not
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

    Each example contributes equally many positions. If there are more examples than
    samples, some examples contribute one each. None takes all positions. The choice is a
    function of ``step``. The sample carries no gradient.

    Every device receives the positions of all devices, in the one collective of the
    moments. A few patches are smaller than the derivatives of each device, which are as
    large as θ.
    """
    part = device_moments(x, mask)
    place, here = _places(x.shape[:-1], samples, step, axis_name)
    sample = _take(source, lax.stop_gradient(x), place, here, mask)
    moments, (sample, sums) = pool_devices(part, (sample, sums), axis_name, pivot)
    total = jnp.maximum(sample.weight.sum(), 1.0)
    return moments, sample._replace(weight=sample.weight / total), sums


def _take(
    source: Source,
    x: jax.Array,
    place: jax.Array,
    here: jax.Array | None,
    mask: jax.Array | None,
) -> Sample:
    """The positions of this device, with weights 1; zeros for those of other devices."""
    dtype = wide(x.dtype)
    patches = jax.tree.map(lambda p: p.astype(dtype), source.patches(place))
    counts = here
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*x.shape[:-1], 1)).astype(bool).reshape(-1)[place]
        counts = mask if here is None else mask & here
    if counts is None:
        return Sample(patches, jnp.ones((place.size, 1), dtype))
    counts = counts[:, None]
    patches = jax.tree.map(lambda p: jnp.where(per_row(counts, p), p, 0.0), patches)
    return Sample(patches, counts.astype(dtype))


def per_example(
    examples: int, positions: int, samples: int | None, axis_name: AxisName
) -> int:
    """Positions per example that give about ``samples`` on all devices."""
    if samples is None:
        return positions
    share = samples // (examples * device_count(axis_name))
    return min_dim(positions, max_dim(1, share))  # works for symbolic sizes too


def _places(
    shape: tuple[int, ...], samples: int | None, step: jax.Array, axis_name: AxisName
) -> tuple[jax.Array, jax.Array | None]:
    """Rows ``[n]`` of this device's ``x`` as a matrix, and which of them it has.

    Examples are counted over all devices, so that the sample is that of one device with the
    whole batch. A device without an example of the sample uses any other example in its
    place.
    """
    examples, positions = shape[0], math.prod(shape[1:])
    n = per_example(examples, positions, samples, axis_name)
    rows = _rows(examples * device_count(axis_name), n, samples, step)
    example, part = rows // n, rows % n
    position = _position(example, part, n, positions, step)
    if axis_name is None:
        return example * positions + position, None
    own = example - lax.axis_index(axis_name) * examples
    here = (own >= 0) & (own < examples)
    return jnp.clip(own, 0, examples - 1) * positions + position, here


def _rows(examples: int, n: int, samples: int | None, step: jax.Array) -> jax.Array:
    """The rows of the sample, n of each example.

    If there are more examples than samples, evenly spaced examples are taken, other ones in
    every step.
    """
    known = isinstance(examples, int)  # not a symbolic size
    if samples is None or not known or examples <= samples:
        return jnp.arange(examples * n)
    # The sequence differs from that of the positions, so that their pairs fill the square.
    shift = _sequence(jnp.uint32(0), jnp.uint32(0), step.astype(jnp.uint32)) * examples
    return (jnp.arange(samples) * examples // samples + shift.astype(int)) % examples


def _position(
    example: jax.Array, part: jax.Array, n: int, positions: int, step: jax.Array
) -> jax.Array:
    """A position in one of n equal parts of ``range(positions)``.

    The place within its part follows a low-discrepancy sequence, which needs no random
    numbers.
    """
    if n == positions:
        return part
    turns = _sequence(step, example.astype(jnp.uint32), part.astype(jnp.uint32))
    width = jnp.asarray(positions, jnp.float32) / jnp.asarray(n, jnp.float32)
    place = ((part.astype(jnp.float32) + turns) * width).astype(part.dtype)
    return jnp.minimum(place, positions - 1)


def _sequence(step: jax.Array, example: jax.Array, part: jax.Array) -> jax.Array:
    """Numbers that fill [0, 1] evenly, along each argument and over all of them.

    They are the fractional parts of multiples of 1/g, 1/g², 1/g³ with g⁴ = g + 1, in units
    of 2⁻³². 32-bit integers drop the whole parts by overflow.
    """
    a, b, c = (jnp.uint32(each) for each in (3518319155, 2882110345, 2360945575))
    turns = a * step.astype(jnp.uint32) + b * example + c * part
    return turns.astype(jnp.float32) * 2.0**-32


def product(patches: Params, params: Params) -> jax.Array:
    """⟨P, θ⟩ ``[n, C]``: the output of the layer at the positions of the patches."""

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
    """⟨d, θ⟩ per feature, ``[C]``: the sum over all the parameters of feature c."""

    def one(d, leaf):
        return (d * leaf.astype(d.dtype)).sum(axis=range(leaf.ndim - 1))

    return jax.tree.reduce(jnp.add, jax.tree.map(one, derivative, params))


def per_row(values: jax.Array, leaf: jax.Array) -> jax.Array:
    """``[n, 1]`` reshaped to broadcast against leaves ``[n, ...]``."""
    return values.reshape(-1, *(1,) * (leaf.ndim - 1))
