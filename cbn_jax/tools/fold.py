# SPDX-License-Identifier: Apache-2.0
"""Folds a normalizer in inference into the layer before it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cbn_jax.core.checks import check_features_last, check_traits
from cbn_jax.core.estimator import Estimator, State
from cbn_jax.core.layers import Layer, LayerFn, check_layer
from cbn_jax.core.moments import align, wide

_REASON = (
    "got a method whose inference depends on the example, expected one mean and one "
    "scale per feature; normalize after the layer, or train with batch_norm(...)."
)


def fold(
    estimator: Estimator,
    state: State,
    layer: LayerFn | Layer | Any,
    params: jax.Array | Mapping[str, Any],
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Folds a normalizer in inference into the layer before it.

    Inference by running statistics is an affine map of each feature. The layer can contain
    this map: with f = inv_std · scale, the parameters ``kernel · f`` and
    ``(bias − mean) · f + beta`` make a layer that needs no normalizer. The arithmetic is in
    float32 (float64 for a float64 kernel).

    Args:
      estimator: any method whose inference does not use the example.
      state: its state after training, or a variable of nnx with it, such as ``norm.state``.
      layer: the layer before it. Pass an argument of ``run_layer``, or a dense layer or
        convolution of Flax (linen or nnx) of any rank, also grouped or transposed.
      params: the parameters of the layer: a kernel, or a mapping with ``kernel`` and
        optionally ``bias``, such as ``nnx.state(layer)``.
      scale: the normalizer's scale ``[C]``; None for 1.
      bias: the normalizer's bias ``[C]``; None for 0.

    Returns:
      ``kernel`` and ``bias`` in the dtype of the kernel. Give the layer a bias if it had
      none. A gated method is folded with the current gate.

    Raises:
      ValueError: a method with statistics per example, or corrected ones; parameters with
        other names, without features last or of other features than the state.
      TypeError: ``layer`` is no layer.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.batch_norm(epsilon=1e-9)
      >>> state = cbn.from_batch_stats(mean=jnp.array([1.0]), var=jnp.array([4.0]))
      >>> cbn.fold(estimator, state, cbn.dense, {"kernel": jnp.array([[6.0]])})
      {'kernel': Array([[3.]], dtype=float32), 'bias': Array([-0.5], dtype=float32)}
    """
    check_traits("fold", estimator.traits, {"per_example": _REASON, "corrected": _REASON})
    check_layer("fold", layer, "fold(estimator, state, layer, params)")
    state, params, scale, bias = _values((state, params, scale, bias))
    params = params if isinstance(params, Mapping) else {"kernel": params}
    if not {"kernel"} <= set(params) <= {"kernel", "bias"}:
        raise ValueError(
            f"fold got params with {sorted(params)}, expected kernel and perhaps bias; "
            "pass the parameters of one layer."
        )
    # Flax stores such kernels with their inputs last.
    transposed = getattr(layer, "transpose_kernel", False)
    kernel = jnp.asarray(params["kernel"])
    kernel = jnp.swapaxes(kernel, -1, -2) if transposed else kernel
    features, dtype = kernel.shape[-1], wide(kernel.dtype)
    affine = {"scale": scale, "beta": bias}
    check_features_last("fold", features, {**params, **affine, "kernel": kernel})
    statistics = estimator.infer(state, jnp.zeros((1, features), dtype))
    if any(value.ndim > 1 for value in statistics):
        raise ValueError(f"fold {_REASON}")

    def wider(value: Any) -> jax.Array:
        return jnp.asarray(value).astype(dtype)

    mean, factor = map(wider, statistics)
    if scale is not None:
        factor = factor * wider(scale)
    offset = params.get("bias")
    offset = jnp.zeros(features, dtype) if offset is None else wider(offset)
    offset = (offset - align(mean, offset)) * align(factor, offset)
    if bias is not None:
        offset = offset + align(wider(bias), offset)
    folded_kernel = wider(kernel) * align(factor, kernel)
    if transposed:
        folded_kernel = jnp.swapaxes(folded_kernel, -1, -2)
    folded = {"kernel": folded_kernel, "bias": offset}
    return {name: value.astype(kernel.dtype) for name, value in folded.items()}


def _values(tree: Any) -> Any:
    """The tree with each nnx variable replaced by its value."""

    def is_variable(node: Any) -> bool:
        return hasattr(node, "get_value")

    return jax.tree.map(
        lambda node: node.get_value() if is_variable(node) else node,
        tree,
        is_leaf=is_variable,
    )


def scale_and_shift(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, dtype: Any = None
) -> jax.Array:
    """The rest of a folded norm; None keeps the dtype of ``x``."""
    y = x.astype(wide(x.dtype))
    if scale is not None:
        y = y * align(scale, y).astype(y.dtype)
    if bias is not None:
        y = y + align(bias, y).astype(y.dtype)
    return y.astype(x.dtype if dtype is None else dtype)
