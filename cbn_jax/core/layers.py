# SPDX-License-Identifier: Apache-2.0
"""Layers that are linear in their parameters, and their known properties."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from .windows import (
    LayerFn,
    Padding,
    Params,
    Patches,
    conv_patches,
    dense_patches,
    kernel_and_bias,
    padded_inputs,
    per_dimension,
)


class Layer(NamedTuple):
    """A layer ``x = apply(params, inputs)``, linear in its parameters.

    ``run_layer`` also takes a plain function; a ``Layer`` has more information. ``dense``
    and ``convolution`` have all of it.

    Attributes:
      apply: ``(params, inputs) -> x`` with ``x`` of shape ``[..., C]``. Feature c of ``x``
        depends on entry c of the parameters' last axis alone. The function must take the
        number of features from its parameters, because it also runs with one feature per
        group.
      patches: the input patches ∂x/∂θ, at some positions of ``x`` and on average. With
        None, JAX differentiates ``apply`` for them.
      groups: number of groups of features of equal size. Each group has its own inputs
        (``feature_group_count`` of a convolution). 1 if all features have the same inputs.
    """

    apply: LayerFn
    patches: Patches | None = None
    groups: int = 1


def as_layer(layer: LayerFn | Layer) -> Layer:
    """A plain function as a layer without further information."""
    return layer if isinstance(layer, Layer) else Layer(layer)


def check_layer(method: str, layer: Any, call: str) -> None:
    """Checks that ``layer`` is a layer, not its parameters."""
    if isinstance(layer, Layer) or callable(layer):
        return
    is_array = hasattr(layer, "shape")
    came = f"an array of shape {layer.shape} as layer" if is_array else f"{layer=}"
    raise TypeError(
        f"{method} got {came}, expected the layer before the norm; write {call} with a "
        "layer such as cbn_jax.dense or cbn_jax.convolution(...)."
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

    Parameters are a kernel ``[*window, in / groups, C]``, or a dict of ``kernel`` and
    optionally ``bias`` ``[C]``. Inputs are ``[N, *space, in]``.

    Args:
      strides: one number, or one per dimension.
      padding: "SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (in one dimension), one
        number for all sides, or per dimension a number or (low, high).
      dilation: dilation of the kernel, one number or one per dimension.
      groups: ``feature_group_count``.
      input_dilation: dilation of the inputs, one number or one per dimension.

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
        kernel, bias = kernel_and_bias(params)
        rank = kernel.ndim - 2
        space = "DHW"[-rank:] if rank <= 3 else "".join(map(str, range(rank)))
        inputs, pads = padded_inputs(inputs, padding, kernel.shape[:-2], dilation)
        x = lax.conv_general_dilated(
            inputs,
            kernel,
            per_dimension(strides, rank),
            pads,
            per_dimension(input_dilation, rank),
            per_dimension(dilation, rank),
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
            feature_group_count=groups,
        )
        return x if bias is None else x + bias.reshape((1,) * (x.ndim - 1) + (-1,))

    patches = conv_patches(strides, padding, dilation, groups, input_dilation)
    return Layer(apply, patches, groups)


def masked_kernel(kernel: jax.Array, mask: jax.Array) -> jax.Array:
    """The kernel that a layer with a mask uses."""
    return kernel * mask


def _dense(params: Params, inputs: jax.Array) -> jax.Array:
    kernel, bias = kernel_and_bias(params)
    x = inputs @ kernel
    return x if bias is None else x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


#: ``x = inputs @ kernel (+ bias)`` on the last axis. Parameters are the kernel
#: ``[in, C]``, or a dict of ``kernel`` and optionally ``bias``.
dense = Layer(_dense, dense_patches)
