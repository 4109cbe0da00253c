# SPDX-License-Identifier: Apache-2.0
"""Linen layers as pure functions of their parameters."""

from typing import Any

from flax import errors
from flax import linen as nn
from flax.core import meta, unfreeze

from cbn_jax._adapters import (
    Kernel,
    LayerError,
    known_layer,
    outputs_last,
    unknown_layer,
    used_params,
)
from cbn_jax.core.layers import Layer

KNOWN = nn.Dense, nn.Conv, nn.ConvTranspose
LINEAR = *KNOWN, nn.ConvLocal, nn.DenseGeneral, nn.Einsum, nn.Embed


def as_layer(
    layer: nn.Module, inputs: Any, kernel: Kernel | None = None
) -> tuple[Layer, Any]:
    """A bound module as a pure function of its parameters, and the parameters it uses.

    Args:
      layer: the module.
      inputs: the inputs of its call.
      kernel: a change of its kernel.

    Raises:
      ValueError: the module is not linear in its parameters.
    """
    module, variables = layer.unbind()
    variables = meta.unbox(variables)
    params = unfreeze(variables.get("params", {}))
    if is_known(layer):
        params = used_params(layer, params, kernel, getattr(layer, "mask", None))

        def known(params, inputs):
            plain = _plain(module, params["kernel"].shape[-1])
            x: Any = plain.apply({"params": outputs_last(module, params)}, inputs)
            return x

        return known_layer(layer, known), params

    params = used_params(layer, params, kernel)

    def unknown(params, inputs):
        try:
            own = {**variables, "params": outputs_last(module, params)}
            x: Any = module.apply(own, inputs)
        except errors.InvalidRngError as error:
            raise LayerError(_name(layer), "draws random numbers") from error
        return x

    return unknown_layer(_name(layer), unknown, params, inputs), params


def is_known(layer: nn.Module) -> bool:
    """Whether the module is a layer of Flax with its own arithmetic."""
    if type(layer) not in KNOWN:
        return False
    names = "dot_general", "dot_general_cls", "conv_general_dilated"
    names = *names, "conv_general_dilated_cls"
    injected = any(getattr(layer, name, None) is not None for name in names)
    promote = type(layer).__dataclass_fields__["promote_dtype"].default
    return not injected and getattr(layer, "promote_dtype", None) is promote


def _plain(module: Any, features: int) -> Any:
    """The module with another width, for an already masked kernel."""
    if isinstance(module, nn.Dense):  # it has no mask
        return module.clone(features=features)
    return module.clone(features=features, mask=None)


def _name(module: nn.Module) -> str:
    return f"{type(module).__name__} at {'/'.join(module.path) or 'the root'}"
