# SPDX-License-Identifier: Apache-2.0
"""Nnx layers as pure functions of their parameters."""

import copy
import inspect
from typing import Any

import jax
from flax import nnx

from cbn_jax._adapters import (
    Kernel,
    changed_params,
    known_layer,
    outputs_last,
    unknown_layer,
    used_params,
)
from cbn_jax.core.layers import Layer

KNOWN = nnx.Linear, nnx.Conv, nnx.ConvTranspose


def as_layer(
    layer: nnx.Module, inputs: Any, kernel: Kernel | None = None
) -> tuple[Layer, Any]:
    """The module as a pure function of its parameters, and these as it uses them.

    Args:
      layer: the module.
      inputs: what it was called with; None before the first call, when nobody knows
        whether a layer of another kind is linear.
      kernel: a change of its kernel.

    Raises:
      ValueError: the module is not linear in its parameters.
    """
    graph, variables, others = nnx.split(layer, nnx.Param, ...)
    structure = jax.tree.structure(variables)
    known = is_known(layer)
    mask = getattr(layer, "mask", None) if known else None
    params = used_params(layer, nnx.to_pure_dict(variables), kernel, mask)

    def apply(params, inputs):
        params = jax.tree.leaves(outputs_last(layer, params))
        module = nnx.merge(graph, jax.tree.unflatten(structure, params), others)
        if known and mask is not None:
            module.mask = None  # the kernel is masked already
        return module(inputs)

    if known:
        return known_layer(layer, apply, params, inputs), params
    if inputs is None:
        return Layer(apply, groups=jax.tree.leaves(params)[0].shape[-1]), params
    return unknown_layer(type(layer).__name__, apply, params, inputs), params


def is_known(layer: nnx.Module) -> bool:
    """Whether it is a layer of Flax with its own arithmetic."""
    if type(layer) not in KNOWN:
        return False
    defaults = inspect.signature(type(layer).__init__).parameters
    names = "dot_general", "conv_general_dilated", "promote_dtype"
    return all(
        getattr(layer, name) is defaults[name].default for name in names if name in defaults
    )


def run_changed(layer: nnx.Module, kernel: Kernel, inputs: Any) -> jax.Array:
    """The output of a layer whose kernel is changed before its use."""
    twin: Any = copy.copy(layer)  # the same variables, except for the kernel
    params = {"kernel": twin.kernel.get_value()}
    twin.kernel = nnx.Param(changed_params(layer, params, kernel)["kernel"])
    return twin(inputs)
