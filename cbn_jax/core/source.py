# SPDX-License-Identifier: Apache-2.0
"""The layer that made activations, and the way back to its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from .layers import Layer, LayerFn, Params, as_layer
from .moments import wide
from .windows import finite, one_per_group, patches_by_position


class Pullback(Protocol):
    def __call__(self, cotangent: jax.Array, *, masked: bool = False) -> Params: ...


class Source(NamedTuple):
    """The layer that made ``x``; ``run_layer`` returns it.

    Attributes:
      params: θ, the parameters of this run of the layer. Only this field carries a
        gradient.
      pullback: maps the cotangent ``[..., C]`` of ``x`` to that of θ, this device's part.
        Feature c of ``x`` depends on ``θ[..., c]`` alone. The cotangent 2 (x − mean) / N
        therefore yields the derivatives of all feature variances at once. ``masked``
        replaces non-finite inputs by 0, because 0 times NaN is NaN.
      mean_patch: maps ``mask`` to E[P], the mean of ∂x/∂θ over this device's positions that
        count, in float32. Leaves are ``[*leaf.shape[:-1], groups]``, shared by all features
        of a group. ``mask`` is None or ``[..., 1]``.
      patches: maps ``place`` ``[n]`` to ∂x/∂θ at those rows of ``x`` as a matrix
        ``[-1, C]``.
      groups: the groups of the layer.
    """

    params: Params
    pullback: Pullback
    mean_patch: Callable[[jax.Array | None], Params]
    patches: Callable[[jax.Array], Params]
    groups: int = 1


def run_layer(
    layer: LayerFn | Layer, params: Params, inputs: Any
) -> tuple[jax.Array, Source]:
    """Runs a layer that is linear in its parameters and keeps its derivatives available.

    Any such layer works: dense or convolution, with strides, padding, dilation or groups,
    with or without bias. ``dense`` and ``convolution`` compute their input patches
    directly. JAX differentiates a plain function. This costs one weight gradient of one
    feature for each position that an estimator uses.

    Args:
      layer: a ``Layer``, or a function ``(params, inputs) -> x`` with ``x`` of shape
        ``[..., C]``. ``Layer`` lists the requirements.
      params: pytree whose leaves have features last.
      inputs: pytree of arrays, the layer's input.

    Returns:
      ``x`` and its source. Gradients flow through ``x`` as without this function. An unused
      source costs nothing under ``jit``.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x, source = cbn.run_layer(cbn.dense, jnp.ones((3, 4)), jnp.ones((2, 3)))
      >>> source.pullback(jnp.ones((2, 4)))[0]
      Array([2., 2., 2., 2.], dtype=float32)
    """
    layer = as_layer(layer)
    x = layer.apply(params, inputs)
    return x, source_of(layer, params, inputs, x)


def source_of(layer: Layer, params: Params, inputs: Any, x: jax.Array) -> Source:
    """The source of activations that a layer has already computed."""
    fixed, inputs = lax.stop_gradient((params, inputs))
    known = layer.patches

    def pullback(cotangent: jax.Array, *, masked: bool = False) -> Params:
        seen = jax.tree.map(finite, inputs) if masked else inputs
        return _pull(layer, _varying(fixed, cotangent), seen, cotangent)

    def mean_patch(mask: jax.Array | None) -> Params:
        seen = inputs if mask is None else jax.tree.map(finite, inputs)
        grid = x.shape[1:-1]
        if known is None or not all(isinstance(size, int) for size in grid):  # symbolic
            weight = _weight(x, mask)
            return _sum_by_pullback(layer, _varying(fixed, x), seen, x, weight)
        weight = None if mask is None else _weight(x, mask)
        return known.mean(fixed, seen, grid, weight)

    def patches(place: jax.Array) -> Params:
        if known is not None:
            return known.at(fixed, inputs, place, x.shape[1:-1])
        narrow = one_per_group(fixed, layer.groups)
        _check_narrow(layer, narrow, inputs, (*x.shape[:-1], layer.groups))
        differentiate = patches_by_position(layer.apply, layer.groups)
        return differentiate(_varying(fixed, x), inputs, place, x.shape[1:-1])

    return Source(params, pullback, mean_patch, patches, layer.groups)


def _pull(layer: Layer, params: Params, inputs: Any, cotangent: jax.Array) -> Params:
    with jax.default_matmul_precision("highest"):
        x, back = jax.vjp(lambda params: layer.apply(params, inputs), params)
        return back(cotangent.astype(x.dtype))[0]


def _weight(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """One over the number of positions that count, ``[N, *grid]``, and 0 at others."""
    counts = lax.full_like(x, 1, wide(x.dtype), shape=x.shape[:-1])
    if mask is not None:
        counts = jnp.where(jnp.broadcast_to(mask, (*x.shape[:-1], 1))[..., 0], counts, 0.0)
    return counts / jnp.maximum(counts.sum(), 1.0)


def _sum_by_pullback(
    layer: Layer, params: Params, inputs: Any, x: jax.Array, weight: jax.Array
) -> Params:
    """Σ weight · P, from one feature of every group."""
    shape = (*x.shape[:-1], layer.groups)
    narrow = one_per_group(params, layer.groups)
    _check_narrow(layer, narrow, inputs, shape)
    # In half precision small weights underflow, and a sum without them overflows.
    root = jnp.sqrt(jnp.maximum(weight.max(), jnp.finfo(weight.dtype).tiny))
    cotangent = jnp.broadcast_to((weight / root)[..., None], shape)
    pulled = _pull(layer, narrow, inputs, cotangent)
    return jax.tree.map(lambda leaf: leaf.astype(weight.dtype) * root, pulled)


def _check_narrow(layer, params, inputs, shape):
    try:
        came = getattr(jax.eval_shape(layer.apply, params, inputs), "shape", None)
    # Each layer refuses parameters of another width with its own exception.
    except Exception as error:
        came = f"{type(error).__name__}: {error}".splitlines()[0]
    if came != shape:
        raise ValueError(
            f"run_layer ran a layer with groups={layer.groups} with one feature per group "
            f"and got {came}, expected {shape}; take the width from the shapes of the "
            "parameters, put activations after the norm, and for a grouped convolution "
            "write run_layer(Layer(layer_fn, groups=...), ...)."
        )


def _varying(params: Params, like: jax.Array) -> Params:
    """A copy of replicated parameters that varies over the devices like ``like``.

    Inside ``shard_map``, JAX sums the derivative with respect to a replicated value over
    the devices. A second sum in the estimator would multiply it by the number of devices.
    It would also mix groups of devices that normalize separately. The derivative with
    respect to a varying copy stays local, as under ``pmap`` and ``vmap``. The estimator's
    one sum is then correct everywhere.
    """
    zero = lax.full_like(like, 0, shape=())
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), params)
