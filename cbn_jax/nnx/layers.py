# SPDX-License-Identifier: Apache-2.0
"""Nnx layers as pure functions of their parameters."""

import inspect
from typing import Any

import jax
from flax import nnx

from cbn_jax._adapters import (
    Kernel,
    LayerError,
    changed_params,
    known_layer,
    outputs_last,
    unknown_layer,
    used_params,
)
from cbn_jax.core.layers import Layer

KNOWN = nnx.Linear, nnx.Conv, nnx.ConvTranspose
LINEAR = *KNOWN, nnx.LinearGeneral, nnx.Einsum, nnx.Embed


def as_layer(
    layer: nnx.Module, inputs: Any, kernel: Kernel | None = None
) -> tuple[Layer, Any]:
    """The module as a pure function of its parameters, and the parameters it uses.

    Args:
      layer: the module.
      inputs: the inputs of its call. None before the first call; whether a layer of another
        kind is linear is then unknown.
      kernel: a change of its kernel.

    Raises:
      ValueError: the module is not linear in its parameters.
    """
    graph, variables, others = nnx.split(layer, nnx.Param, ...)
    others = jax.tree.map(lambda leaf: leaf, others)  # own copies of the variables
    structure = jax.tree.structure(variables)
    known = is_known(layer)
    mask = getattr(layer, "mask", None) if known else None
    params = used_params(layer, nnx.to_pure_dict(variables), kernel, mask)

    def apply(params, inputs):
        params = jax.tree.leaves(outputs_last(layer, params))
        given = jax.tree.unflatten(structure, params)
        module: Any = nnx.merge(graph, given, others, copy=True)
        if known and mask is not None:
            module.mask = None  # the kernel is masked already
        x = module(inputs)
        _check_draws(layer, others, module)
        return x

    if inputs is None:
        return Layer(apply, groups=_groups(layer, params)), params
    if known:
        return known_layer(layer, apply), params
    return unknown_layer(type(layer).__name__, apply, params, inputs), params


def _groups(layer: nnx.Module, params: Any) -> int:
    """The groups of its features, before its inputs are known."""
    if is_known(layer):
        return getattr(layer, "feature_group_count", 1)
    widths = [leaf.shape[-1] for leaf in jax.tree.leaves(params) if leaf.ndim > 0]
    return widths[0] if widths else 1


def _check_draws(layer: nnx.Module, before: Any, module: nnx.Module) -> None:
    """Refuses random draws: a layer runs several times, and each run draws new numbers."""
    counts = jax.tree.leaves(nnx.filter_state(before, nnx.RngCount))
    after = jax.tree.leaves(nnx.state(module, nnx.RngCount))
    if any(one is not other for one, other in zip(counts, after, strict=True)):
        raise LayerError(type(layer).__name__, "draws random numbers")


def is_known(layer: nnx.Module) -> bool:
    """Whether the module is a layer of Flax with its own arithmetic."""
    cls = getattr(type(layer), "recorded_from", type(layer))
    if cls not in KNOWN:
        return False
    defaults = inspect.signature(cls.__init__).parameters
    names = "dot_general", "conv_general_dilated", "promote_dtype"
    return all(
        getattr(layer, name) is defaults[name].default for name in names if name in defaults
    )


def run_changed(layer: nnx.Module, kernel: Kernel, inputs: Any) -> jax.Array:
    """The output of a layer whose kernel is changed before its use."""
    graph, params, others = nnx.split(layer, nnx.Param, ...)
    changed = changed_params(layer, nnx.to_pure_dict(params), kernel)
    structure = jax.tree.structure(params)
    changed = jax.tree.unflatten(structure, jax.tree.leaves(changed))
    # The other variables belong to the layer itself, which may write them.
    return nnx.merge(graph, changed, others)(inputs)
