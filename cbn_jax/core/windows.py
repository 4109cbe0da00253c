# SPDX-License-Identifier: Apache-2.0
"""Input patches of layers: that of a position, P = ∂x/∂θ, and their mean."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .moments import wide

Params = Any  # a pytree whose leaves have features last
Padding = str | int | Sequence[int | tuple[int, int]]
LayerFn = Callable[[Params, Any], jax.Array]
#: ``(params, inputs, place, grid) -> P`` at some positions.
At = Callable[[Params, Any, jax.Array, tuple[int, ...]], Params]
#: ``(params, inputs, grid, weight) -> E[P]``.
Mean = Callable[[Params, Any, tuple[int, ...], jax.Array | None], Params]


class Patches(NamedTuple):
    """The input patches of a layer, in the form of its parameters.

    Attributes:
      at: ``(params, inputs, place, grid) -> P``. ``place`` is ``[n]``, rows of ``x`` as a
        matrix ``[N · positions, C]``, and ``grid = x.shape[1:-1]``. Leaves are
        ``[n, *leaf.shape[:-1], groups]``.
      mean: ``(params, inputs, grid, weight) -> E[P]`` in float32. ``weight`` is
        ``[N, *grid]`` and sums to one, or None for the plain mean. Leaves are
        ``[*leaf.shape[:-1], groups]``.
    """

    at: At
    mean: Mean


def conv_patches(
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
    input_dilation: int | Sequence[int] = 1,
) -> Patches:
    """The windows of a convolution with these options."""

    def windows(params, inputs):
        kernel, _ = kernel_and_bias(params)
        rank, window = kernel.ndim - 2, kernel.shape[:-2]
        if inputs.ndim < rank + 2:
            raise ValueError(
                f"a convolution got inputs of shape {inputs.shape}, expected [N, *space, "
                "channels] for its patches; a single example is inputs[None]."
            )
        inputs, pads = padded_inputs(inputs, padding, window, dilation)
        stride, spread = per_dimension(strides, rank), per_dimension(dilation, rank)
        apart, extent = per_dimension(input_dilation, rank), _extent(window, spread)
        if isinstance(pads, str):
            space = _extent(inputs.shape[-1 - rank : -1], apart)
            pads = lax.padtype_to_pads(space, extent, stride, pads)
        return _Windows(inputs, window, extent, pads, stride, spread, apart)

    def at(params, inputs, place, grid):
        cuts = _cut(windows(params, inputs), place, grid)
        return _like(params, _by_group(cuts, groups))

    def mean(params, inputs, grid, weight):
        seen = windows(params, inputs)
        if weight is None:
            mean = _mean_window(seen, grid)
        else:
            mean = _weighted_window(seen, weight)
        return _only(_like(params, _by_group(mean, groups)[None]))

    return Patches(at, mean)


class _Windows(NamedTuple):
    """Inputs of a convolution, and the places of its windows in them, by dimension."""

    inputs: jax.Array
    window: Sequence[int]
    extent: Sequence[int]
    pads: Sequence[tuple[int, int]]
    stride: Sequence[int]
    spread: Sequence[int]
    apart: Sequence[int]


def _cut(windows: _Windows, place: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    """The windows ``[n, *window, in]`` at some positions."""
    inputs, rank = windows.inputs, len(windows.window)
    each = inputs.reshape(-1, *inputs.shape[-1 - rank :])  # with further batch axes
    zero = jnp.zeros((), each.dtype)
    around = [
        (*pad, each - 1) for pad, each in zip(windows.pads, windows.apart, strict=True)
    ]
    padded = lax.pad(each, zero, [(0, 0, 0), *around, (0, 0, 0)])
    example, *there = jnp.unravel_index(place, (each.shape[0], *grid[-rank:]))
    start = [axis * step for axis, step in zip(there, windows.stride, strict=True)]
    every = tuple(slice(None, None, step) for step in windows.spread)

    def cut(example, *start):
        corner = (example, *start, jnp.zeros_like(example))
        size = (1, *windows.extent, padded.shape[-1])
        return lax.dynamic_slice(padded, corner, size)[(0, *every)]

    # One gather: devices that share a batch add up their parts.
    return jax.vmap(cut)(example, *start)


def _mean_window(windows: _Windows, grid: tuple[int, ...]) -> jax.Array:
    """The mean ``[*window, in]`` of all windows.

    It is a product with the shares of the entries that each tap reads. The examples come
    last, so that devices that share a batch add up single patches.
    """
    rank, inputs = len(windows.window), windows.inputs
    space = inputs.shape[-1 - rank : -1]
    each = inputs.reshape(-1, *inputs.shape[-1 - rank :]).astype(wide(inputs.dtype))
    shares = [
        _shares(windows, axis, size, outs)
        for axis, (size, outs) in enumerate(zip(space, grid[-rank:], strict=True))
    ]
    whole = functools.reduce(np.kron, shares)
    each = each.reshape(each.shape[0], -1, each.shape[-1])
    mean = jnp.matmul(whole.astype(each.dtype), each, precision="highest").mean(0)
    return mean.reshape(*windows.window, -1)


def _weighted_window(windows: _Windows, weight: jax.Array) -> jax.Array:
    """The weighted sum ``[*window, in]`` of all windows.

    It is the derivative of a convolution with one feature.
    """
    rank, inputs = len(windows.window), windows.inputs
    inputs = inputs.reshape(-1, *inputs.shape[-1 - rank :]).astype(weight.dtype)
    weight = weight.reshape(inputs.shape[0], *weight.shape[weight.ndim - rank :], 1)
    axes = (0, rank + 1, *range(1, rank + 1))
    order = lax.ConvDimensionNumbers(axes, (rank + 1, rank, *range(rank)), axes)

    def run(kernel):
        return lax.conv_general_dilated(
            inputs,
            kernel,
            windows.stride,
            windows.pads,
            windows.apart,
            windows.spread,
            order,
            precision="highest",
        )

    kernel = lax.full_like(inputs, 0, shape=(*windows.window, inputs.shape[-1], 1))
    return jax.vjp(run, kernel)[1](weight)[0][..., 0]


def _shares(windows: _Windows, axis: int, size: int, outs: int) -> np.ndarray:
    """The share of the outputs that read entry h at tap k, ``[taps, size]``."""
    taps = np.arange(windows.window[axis])[:, None]
    start = np.arange(outs) * windows.stride[axis] - windows.pads[axis][0]
    entry, between = np.divmod(start + taps * windows.spread[axis], windows.apart[axis])
    inside = (between == 0) & (entry >= 0) & (entry < size)
    shares = np.zeros((len(taps), size))
    np.add.at(shares, (np.nonzero(inside)[0], entry[inside]), 1.0 / outs)
    return shares


def _by_group(cuts: jax.Array, groups: int) -> jax.Array:
    """Windows ``[..., in]`` as ``[..., in / groups, groups]``."""
    return jnp.swapaxes(cuts.reshape(*cuts.shape[:-1], groups, -1), -1, -2)


def _dense_at(params, inputs, place, grid):
    del grid
    rows = inputs.reshape(-1, inputs.shape[-1])
    return _like(params, rows[place][..., None])


def _dense_mean(params, inputs, grid, weight):
    del grid
    rows = tuple(range(inputs.ndim - 1))
    if weight is None:
        mean = jnp.mean(inputs, axis=rows, dtype=wide(inputs.dtype))
    else:
        # Rows of weight zero are finite already.
        mean = (jnp.asarray(inputs, weight.dtype) * weight[..., None]).sum(axis=rows)
    return _only(_like(params, mean[None, :, None]))


#: The rows of a dense layer.
dense_patches = Patches(_dense_at, _dense_mean)


def _like(params: Params, patches: jax.Array) -> Params:
    """Patches in the form of the parameters; the patch of a bias is 1."""
    if not isinstance(params, dict):
        return patches
    ones = jnp.ones((patches.shape[0], patches.shape[-1]), patches.dtype)
    return {name: patches if name == "kernel" else ones for name in params}


def _only(patches: Params) -> Params:
    """The single patch of leaves with one row."""
    return jax.tree.map(lambda leaf: leaf[0], patches)


def patches_by_position(apply: LayerFn, groups: int) -> At:
    """Patches by differentiation, for any layer.

    Every position costs a weight gradient of one feature per group for the whole batch.
    Gradients of single examples would cost less. But for convolutions XLA computes them
    wrongly if a batch is spread over devices under ``jit``.
    """

    def patches(params, inputs, place, grid):
        del grid
        # Zero times NaN is NaN: one bad position would make all others NaN.
        inputs = jax.tree.map(finite, inputs)
        narrow = one_per_group(params, groups)
        x, back = jax.vjp(lambda params: apply(params, inputs), narrow)
        zeros = lax.full_like(x, 0).reshape(-1, groups)  # spread over devices like x

        def at(place):
            hot = zeros.at[place].set(1.0)
            return back(hot.reshape(x.shape))[0]

        with jax.default_matmul_precision("highest"):
            return jax.vmap(at)(place)

    return patches


def one_per_group(params: Params, groups: int) -> Params:
    """The parameters of the first feature of every group."""
    return jax.tree.map(lambda p: p[..., :: p.shape[-1] // groups], params)


def finite(inputs: jax.Array) -> jax.Array:
    """Replaces non-finite inputs by zeros."""
    return jnp.where(jnp.isfinite(inputs), inputs, jnp.zeros_like(inputs))


def kernel_and_bias(params: Params) -> tuple[jax.Array, jax.Array | None]:
    if isinstance(params, dict):
        return params["kernel"], params.get("bias")
    return params, None


def per_dimension(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _extent(sizes: Sequence[Any], dilation: Sequence[int]) -> list[Any]:
    """The extents of dilated sizes."""
    return [(size - 1) * each + 1 for size, each in zip(sizes, dilation, strict=True)]


def padded_inputs(
    inputs: jax.Array,
    padding: Padding,
    window: Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[jax.Array, str | list[tuple[int, int]]]:
    """Pads with values other than zeros; also returns the remaining zero padding."""
    rank = len(window)
    if padding not in ("CIRCULAR", "REFLECT", "CAUSAL"):
        return inputs, _pads(padding, rank)
    extent = _extent(window, per_dimension(dilation, rank))
    if padding == "CAUSAL":
        return inputs, [(size - 1, 0) for size in extent]
    sides = [(0, 0)] * (inputs.ndim - rank - 1)
    sides += [((size - 1) // 2, size // 2) for size in extent]
    mode = "wrap" if padding == "CIRCULAR" else "reflect"
    return jnp.pad(inputs, [*sides, (0, 0)], mode=mode), "VALID"


def _pads(padding: Padding, rank: int) -> str | list[tuple[int, int]]:
    """A word unchanged; numbers as (low, high) for each dimension."""
    if isinstance(padding, str):
        return padding
    sides = [padding] * rank if isinstance(padding, int) else padding
    return [(side, side) if isinstance(side, int) else side for side in sides]
