# SPDX-License-Identifier: Apache-2.0
"""Where activations came from: a layer, and the way back to its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from .layers import (
    Layer,
    LayerFn,
    Params,
    as_layer,
    finite,
    one_per_group,
    patches_by_position,
)


class Pullback(Protocol):
    def __call__(
        self, each: jax.Array, shared: jax.Array, *, masked: bool = False
    ) -> tuple[Params, Params]: ...


class Source(NamedTuple):
    """The layer behind ``x``, made by ``run_layer``.

    Attributes:
      params: θ, the parameters with which the layer was run, the only thing here that
        carries a gradient.
      pullback: ``(each, shared)`` ↦ two cotangents of θ, this device's part: one for the
        cotangent ``each`` ``[..., C]`` of ``x``, one for ``shared`` ``[..., 1]``, the same
        for every feature, its leaves ``[..., groups]``. Feature c of ``x`` depends on
        ``θ[..., c]`` alone, so the cotangent 1/N yields the derivatives of all feature
        means at once, and 2 (x − mean) / N those of all variances. ``masked``
        replaces non-finite inputs by 0, because 0 times NaN is NaN.
      patches: ``index`` ``[N, n]`` ↦ ∂x/∂θ at those positions of ``x``, see ``Layer``.
      groups: of the layer.
    """

    params: Params
    pullback: Pullback
    patches: Callable[[jax.Array], Params]
    groups: int = 1


def run_layer(
    layer: LayerFn | Layer, params: Params, inputs: Any
) -> tuple[jax.Array, Source]:
    """Runs a layer that is linear in its parameters and keeps its derivatives available.

    Any such layer works: dense or convolution, with strides, padding, dilation, groups,
    with or without bias. JAX differentiates a plain function; ``dense`` and
    ``convolution`` also know their input patches, for which a plain function costs a
    weight gradient of one feature for each position that an estimator looks at.

    Args:
      layer: a ``Layer``, or a function ``(params, inputs) -> x`` with ``x`` of shape
        ``[..., C]``; see there for what it must do.
      params: pytree whose leaves have features last.
      inputs: pytree of arrays, the layer's input.

    Returns:
      ``x`` and its source. Gradients flow through ``x`` as without this function. A source
      that is never used costs nothing under ``jit``.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x, source = cbn.run_layer(cbn.dense, jnp.ones((3, 4)), jnp.ones((2, 3)))
      >>> sums, _ = source.pullback(jnp.ones((2, 4)), jnp.ones((2, 1)))
      >>> sums[0]
      Array([2., 2., 2., 2.], dtype=float32)
    """
    layer = as_layer(layer)
    x = layer.apply(params, inputs)
    return x, source_of(layer, params, inputs, x)


def source_of(layer: Layer, params: Params, inputs: Any, x: jax.Array) -> Source:
    """The source of activations that a layer has already computed."""
    fixed, inputs = lax.stop_gradient((params, inputs))

    def pullback(
        each: jax.Array, shared: jax.Array, *, masked: bool = False
    ) -> tuple[Params, Params]:
        seen = jax.tree.map(finite, inputs) if masked else inputs
        return _pull_both(layer, _varying(fixed, each), seen, each, shared)

    def patches(index: jax.Array) -> Params:
        if layer.patches is not None:
            return layer.patches(fixed, inputs, index, x.shape[1:-1])
        narrow = one_per_group(fixed, layer.groups)
        _check_narrow(layer, narrow, inputs, (*x.shape[:-1], layer.groups))
        differentiate = patches_by_position(layer.apply, layer.groups)
        return differentiate(_varying(fixed, x), inputs, index, x.shape[1:-1])

    return Source(params, pullback, patches, layer.groups)


def _pull_both(layer, params, inputs, each, shared):
    """The pullback of ``each``, and that of ``shared`` for one feature of every group."""

    def pull(params, cotangent):
        x, back = jax.vjp(lambda p: layer.apply(p, inputs), params)
        return back(cotangent.astype(x.dtype))[0]

    groups = layer.groups
    narrow = one_per_group(params, groups)
    # Spread over the devices like ``each``, also where it is the same on all of them.
    shared = jnp.repeat(shared + lax.full_like(each[..., :1], 0), groups, -1)
    _check_narrow(layer, narrow, inputs, shared.shape)
    with jax.default_matmul_precision("highest"):
        return pull(params, each), pull(narrow, shared)


def _check_narrow(layer, params, inputs, shape):
    try:
        came = getattr(jax.eval_shape(layer.apply, params, inputs), "shape", None)
    # Layers refuse parameters of another width each with an exception of their own.
    except Exception as error:
        came = f"{type(error).__name__}: {error}".splitlines()[0]
    if came != shape:
        raise ValueError(
            f"a layer with groups={layer.groups} was run with one feature per group and "
            f"gave {came}, expected {shape}; let it read its width off its parameters and "
            "be linear in them (activations come after the normalizer), and if it is a "
            "grouped convolution write run_layer(Layer(layer_fn, groups=...), ...)."
        )


def _varying(params: Params, like: jax.Array) -> Params:
    """A copy of replicated parameters that counts as different wherever ``like`` does.

    Inside ``shard_map`` the derivative with respect to a replicated value is summed over
    the devices by JAX itself; a sum of our own on top would multiply it by their number,
    and groups of devices that normalize by themselves would be mixed. With respect to a
    varying copy the derivative stays local, there as under ``pmap`` and ``vmap``, and the
    estimator's one sum is right everywhere.
    """
    zero = lax.full_like(like, 0, shape=())
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), params)
