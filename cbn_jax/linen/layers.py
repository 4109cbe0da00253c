# SPDX-License-Identifier: Apache-2.0
"""Linen layers as pure functions of their parameters."""

from typing import Any

import jax
from flax import linen as nn

from cbn_jax._adapters import outputs_last, patches_of
from cbn_jax.core.layers import Layer, dense_patches


def as_layer(layer: nn.Module) -> tuple[Layer, Any]:
    """The module as a pure function of its parameters, of any number of features."""
    module, variables = layer.unbind()
    params = variables.get("params", {})
    others = {name: value for name, value in variables.items() if name != "params"}

    def apply(params, inputs):
        width = {leaf.shape[-1] for leaf in jax.tree.leaves(params)}
        # Linen layers hold their width; a change of it is a change of the layer.
        if len(width) == 1 and isinstance(getattr(module, "features", None), int):
            resized = module.clone(features=width.pop())
        else:
            resized = module
        variables = {"params": outputs_last(module, params), **others}
        x: Any = resized.apply(variables, inputs)
        return x

    params = outputs_last(module, params)
    if isinstance(module, nn.Dense):
        return Layer(apply, dense_patches), params
    if isinstance(module, nn.Conv):
        return Layer(apply, patches_of(module), module.feature_group_count), params
    return Layer(apply, groups=getattr(module, "feature_group_count", 1)), params
