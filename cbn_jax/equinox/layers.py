# SPDX-License-Identifier: Apache-2.0
"""Equinox layers as pure functions of parameters that have the features last."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from cbn_jax.core.layers import Layer
from cbn_jax.core.windows import Patches, conv_patches, dense_patches


def check_layer(layer: Any) -> None:
    """Checks that the adapter knows which axis of a layer's output has the features."""
    if isinstance(layer, eqx.nn.Conv):
        return
    if isinstance(layer, eqx.nn.Linear):
        if "scalar" not in (layer.in_features, layer.out_features):
            return
        came = f"Linear({layer.in_features!r}, {layer.out_features!r})"
    else:
        came = layer.__name__ if isinstance(layer, type) else type(layer).__name__
    raise TypeError(
        f"Norm got layer={came}, expected an instance of eqx.nn.Linear (without scalar "
        "sizes) or eqx.nn.Conv; run other layers before the norm, and write "
        "Norm(estimator, num_features=..., axis_name=...)."
    )


def sizes_of(layer: eqx.nn.Linear | eqx.nn.Conv) -> tuple[Any, Any]:
    """The number of its input and of its output channels."""
    if isinstance(layer, eqx.nn.Conv):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def as_layer(layer: eqx.nn.Linear | eqx.nn.Conv) -> tuple[Layer, dict[str, jax.Array]]:
    """The module as a function of its parameters and inputs, both with features last."""

    def apply(params, inputs):
        kernel = jnp.moveaxis(params["kernel"], (-2, -1), (1, 0))
        module = eqx.tree_at(lambda module: module.weight, layer, kernel)
        if layer.bias is not None:
            bias = jnp.expand_dims(params["bias"], range(1, layer.bias.ndim))
            module = eqx.tree_at(lambda module: module.bias, module, bias)
        return jnp.moveaxis(jax.vmap(module)(jnp.moveaxis(inputs, -1, 1)), 1, -1)

    # Equinox stores [out, in, *window].
    params = {"kernel": jnp.moveaxis(layer.weight, (1, 0), (-2, -1))}
    if layer.bias is not None:
        params["bias"] = layer.bias.reshape(-1)
    return Layer(apply, _patches(layer), getattr(layer, "groups", 1)), params


def _patches(layer: eqx.nn.Linear | eqx.nn.Conv) -> Patches | None:
    """The patches of a layer; None if JAX must differentiate."""
    if isinstance(layer, eqx.nn.Linear):
        return dense_patches
    if layer.padding_mode != "ZEROS":
        return None
    return conv_patches(layer.stride, layer.padding, layer.dilation, layer.groups)
