# SPDX-License-Identifier: Apache-2.0
"""Nnx layers as pure functions of their parameters."""

from typing import Any

import jax
from flax import nnx

from cbn_jax._adapters import outputs_last, patches_of
from cbn_jax.core.layers import Layer, dense_patches


def as_layer(layer: nnx.Module) -> tuple[Layer, Any]:
    """The module as a pure function of its parameters, a plain dict of arrays."""
    graph, params, others = nnx.split(layer, nnx.Param, ...)
    structure = jax.tree.structure(params)

    def apply(params, inputs):
        params = outputs_last(layer, params)
        params = jax.tree.unflatten(structure, jax.tree.leaves(params))
        return nnx.merge(graph, params, others)(inputs)

    params = outputs_last(layer, nnx.to_pure_dict(params))
    if isinstance(layer, nnx.Linear):
        return Layer(apply, dense_patches), params
    groups = getattr(layer, "feature_group_count", 1)
    return Layer(
        apply, patches_of(layer) if isinstance(layer, nnx.Conv) else None, groups
    ), params
