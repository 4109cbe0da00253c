# SPDX-License-Identifier: Apache-2.0
"""Layers that are linear in their parameters, and what is known about them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

Params = Any  # a pytree whose leaves have features last
Padding = str | int | Sequence[int | tuple[int, int]]
LayerFn = Callable[[Params, Any], jax.Array]


class Patches(Protocol):
    def __call__(
        self, params: Params, inputs: Any, index: jax.Array, grid: tuple[int, ...]
    ) -> Params: ...


class Layer(NamedTuple):
    """A layer ``x = apply(params, inputs)``, linear in its parameters.

    ``run_layer`` takes a plain function too; a ``Layer`` says more. ``dense`` and
    ``convolution`` make complete ones.

    Attributes:
      apply: ``(params, inputs) -> x`` with ``x`` of shape ``[..., C]``, where feature c
        depends on entry c of the parameters' last axis alone. It must read the number of
        features off its parameters, because it is also run with one feature per group.
      patches: what the layer saw at some positions of ``x``, ``(params, inputs, index,
        grid) -> ∂x/∂θ``; None to differentiate ``apply`` for them. ``index`` is ``[N, n]``,
        positions in ``grid = x.shape[1:-1]`` of each entry of the first axis. The result is
        a pytree like ``params`` with leaves ``[N · n, *leaf.shape[:-1], groups]``.
      groups: the features come in that many groups of equal size, each with inputs of its
        own (``feature_group_count`` of a convolution); 1 if all see the same inputs.
    """

    apply: LayerFn
    patches: Patches | None = None
    groups: int = 1


def as_layer(layer: LayerFn | Layer) -> Layer:
    """A plain function as a layer about which nothing more is known."""
    return layer if isinstance(layer, Layer) else Layer(layer)


def check_layer(method: str, layer: Any, call: str) -> None:
    """A layer, not its parameters."""
    if isinstance(layer, Layer) or callable(layer):
        return
    is_array = hasattr(layer, "shape")
    came = f"an array of shape {layer.shape} as layer" if is_array else f"{layer=}"
    raise TypeError(
        f"{method} got {came}, expected the layer before it; write {call} with what "
        "run_layer takes, such as cbn_jax.dense or cbn_jax.convolution(...)."
    )


def convolution(
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    input_dilation: int | Sequence[int] = 1,
) -> Layer:
    """A convolution in 1 to 3 (or more) dimensions, features last.

    Parameters are a kernel ``[*window, in / groups, C]``, or a dict of ``kernel`` and, if
    you like, ``bias`` ``[C]``. Inputs are ``[N, *space, in]``.

    Args:
      strides: one number, or one per dimension.
      padding: "SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (in one dimension), one
        number for all sides, or per dimension a number or (low, high).
      dilation: of the kernel, one number or one per dimension.
      groups: ``feature_group_count``.
      input_dilation: of the inputs, one number or one per dimension.

    Returns:
      A Layer that every estimator of this library accepts.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> layer = cbn.convolution(strides=2)
      >>> x, source = cbn.run_layer(layer, jnp.ones((3, 3, 3, 8)), jnp.ones((2, 8, 8, 3)))
      >>> x.shape
      (2, 4, 4, 8)
    """

    def apply(params, inputs):
        kernel, bias = _kernel_and_bias(params)
        rank = kernel.ndim - 2
        space = "DHW"[-rank:] if rank <= 3 else "".join(map(str, range(rank)))
        inputs, pads = _padded(inputs, padding, kernel.shape[:-2], dilation)
        x = lax.conv_general_dilated(
            inputs,
            kernel,
            _per_dimension(strides, rank),
            pads,
            _per_dimension(input_dilation, rank),
            _per_dimension(dilation, rank),
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
            feature_group_count=groups,
        )
        return x if bias is None else x + bias.reshape((1,) * (x.ndim - 1) + (-1,))

    cut = conv_patches(strides, padding, dilation, groups, input_dilation)
    return Layer(apply, cut, groups)


def conv_patches(
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
    input_dilation: int | Sequence[int] = 1,
) -> Patches:
    """The windows of a convolution with these options."""

    def patches(params, inputs, index, grid):
        kernel, _ = _kernel_and_bias(params)
        rank, window = kernel.ndim - 2, kernel.shape[:-2]
        if inputs.ndim < rank + 2:
            raise ValueError(
                f"a convolution got inputs of shape {inputs.shape}, expected [N, *space, "
                "channels] where its patches are needed; a single example is inputs[None]."
            )
        inputs, pads = _padded(inputs, padding, window, dilation)
        stride, spread = _per_dimension(strides, rank), _per_dimension(dilation, rank)
        apart = _per_dimension(input_dilation, rank)
        extent = _extent(window, spread)
        if isinstance(pads, str):
            space = _extent(inputs.shape[-1 - rank : -1], apart)
            pads = lax.padtype_to_pads(space, extent, stride, pads)
        # Further batch axes of the inputs come first in the grid.
        rows = inputs.reshape(index.shape[0], -1, *inputs.shape[-1 - rank :])
        zero = jnp.zeros((), rows.dtype)
        around = [(*pad, each - 1) for pad, each in zip(pads, apart, strict=True)]
        padded = lax.pad(rows, zero, [(0, 0, 0), (0, 0, 0), *around, (0, 0, 0)])
        other, *place = jnp.unravel_index(index, (rows.shape[1], *grid[-rank:]))
        start = [at * step for at, step in zip(place, stride, strict=True)]
        every = tuple(slice(None, None, step) for step in spread)

        def cut(example, other, *start):
            corner = (other, *start, jnp.zeros_like(other))
            size = (1, *extent, example.shape[-1])
            return lax.dynamic_slice(example, corner, size)[(0, *every)]

        # Mapped over the examples, so that a batch spread over devices stays there.
        per_position = jax.vmap(cut, (None, *[0] * (rank + 1)))
        cuts = jax.vmap(per_position)(padded, other, *start)
        cuts = cuts.reshape(index.size, *window, groups, -1)
        return _like(params, jnp.swapaxes(cuts, -1, -2))

    return patches


def patches_by_position(apply: LayerFn, groups: int) -> Patches:
    """Patches by differentiation, for any layer.

    Every position costs a weight gradient of one feature per group for the whole batch.
    Gradients of single examples would cost less, but XLA computes those of convolutions
    wrongly where a batch is spread over devices under ``jit``.
    """

    def patches(params, inputs, index, grid):
        del grid
        # Zero times NaN is NaN: one bad position would spoil all the others.
        inputs = jax.tree.map(finite, inputs)
        narrow = one_per_group(params, groups)
        x, back = jax.vjp(lambda params: apply(params, inputs), narrow)
        positions = math.prod(x.shape[:-1])
        first = jnp.arange(index.shape[0])[:, None] * (positions // index.shape[0])
        place = (first + index).reshape(-1)
        zeros = lax.full_like(x, 0).reshape(positions, groups)  # spread over devices as x

        def at(place):
            hot = zeros.at[place].set(1.0)
            return back(hot.reshape(x.shape))[0]

        with jax.default_matmul_precision("highest"):
            return jax.vmap(at)(place)

    return patches


def masked_kernel(kernel: jax.Array, mask: jax.Array) -> jax.Array:
    """The kernel that a layer with a mask uses."""
    return kernel * mask


def one_per_group(params: Params, groups: int) -> Params:
    """The parameters of the first feature of every group."""
    return jax.tree.map(lambda p: p[..., :: p.shape[-1] // groups], params)


def finite(inputs: jax.Array) -> jax.Array:
    """Replaces non-finite inputs by zeros."""
    return jnp.where(jnp.isfinite(inputs), inputs, jnp.zeros_like(inputs))


def _dense(params: Params, inputs: jax.Array) -> jax.Array:
    kernel, bias = _kernel_and_bias(params)
    x = inputs @ kernel
    return x if bias is None else x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def dense_patches(params, inputs, index, grid):
    """The rows of a dense layer."""
    del grid
    rows = inputs.reshape(index.shape[0], -1, inputs.shape[-1])
    cut = jnp.take_along_axis(rows, index[..., None], axis=1)
    return _like(params, cut.reshape(index.size, -1, 1))


#: ``x = inputs @ kernel (+ bias)`` on the last axis. Parameters are the kernel ``[in, C]``,
#: or a dict of ``kernel`` and, if you like, ``bias``.
dense = Layer(_dense, dense_patches)


def _kernel_and_bias(params: Params) -> tuple[jax.Array, jax.Array | None]:
    if isinstance(params, dict):
        return params["kernel"], params.get("bias")
    return params, None


def _like(params: Params, patches: jax.Array) -> Params:
    """Patches in the form of the parameters; a bias always sees a one."""
    if not isinstance(params, dict):
        return patches
    ones = jnp.ones((patches.shape[0], patches.shape[-1]), patches.dtype)
    return {name: patches if name == "kernel" else ones for name in params}


def _per_dimension(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _extent(sizes: Sequence[Any], dilation: Sequence[int]) -> list[Any]:
    """The extents of dilated sizes."""
    return [(size - 1) * each + 1 for size, each in zip(sizes, dilation, strict=True)]


def _padded(
    inputs: jax.Array,
    padding: Padding,
    window: Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[jax.Array, str | list[tuple[int, int]]]:
    """Pads by other values than zeros; also gives the padding by zeros that remains."""
    rank = len(window)
    if padding not in ("CIRCULAR", "REFLECT", "CAUSAL"):
        return inputs, _pads(padding, rank)
    extent = _extent(window, _per_dimension(dilation, rank))
    if padding == "CAUSAL":
        return inputs, [(size - 1, 0) for size in extent]
    sides = [(0, 0)] * (inputs.ndim - rank - 1)
    sides += [((size - 1) // 2, size // 2) for size in extent]
    mode = "wrap" if padding == "CIRCULAR" else "reflect"
    return jnp.pad(inputs, [*sides, (0, 0)], mode=mode), "VALID"


def _pads(padding: Padding, rank: int) -> str | list[tuple[int, int]]:
    """A word as it is, numbers as (low, high) for each dimension."""
    if isinstance(padding, str):
        return padding
    sides = [padding] * rank if isinstance(padding, int) else padding
    return [(side, side) if isinstance(side, int) else side for side in sides]
