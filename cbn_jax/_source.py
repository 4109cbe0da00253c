# SPDX-License-Identifier: Apache-2.0
"""Where activations came from: a layer, and the way back to its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from ._moments import AxisName

Params = Any  # a pytree whose leaves have features last
LayerFn = Callable[[Params, Any], jax.Array]


class Pullback(Protocol):
    def __call__(self, each: jax.Array, shared: jax.Array) -> tuple[Params, Params]: ...


class Source(NamedTuple):
    """The layer behind ``x``, made by ``run_layer``. Nothing in it carries a gradient.

    Attributes:
      params: θ, the parameters with which the layer was run.
      pullback: ``(each, shared)`` ↦ two cotangents of θ, summed over all devices: one for
        the cotangent ``each`` ``[..., C]`` of ``x``, one for ``shared``, ``[..., 1]`` if it
        is the same for every feature (its result may then have a last axis of 1, to be
        broadcast) or ``[..., C]``. Feature c of ``x`` depends on ``θ[..., c]`` alone, so
        the cotangent 1/N yields the derivatives of all feature means at once, and
        2 (x − mean) / N those of all variances.
      axis_name: the axis over which ``pullback`` sums.
    """

    params: Params
    pullback: Pullback
    axis_name: AxisName = None


def run_layer(
    layer_fn: LayerFn, params: Params, inputs: Any, *, axis_name: AxisName = None
) -> tuple[jax.Array, Source]:
    """Runs a layer that is linear in its parameters and keeps the way back to them.

    Any such layer will do: dense or convolution, with strides, padding, dilation, groups,
    with or without bias. Nothing here knows convolutions; differentiation does.

    Args:
      layer_fn: ``(params, inputs) -> x`` with ``x`` of shape ``[..., C]``. Feature c must
        depend on entry c of the parameters' last axis alone. A layer that computes all
        features alike should accept parameters of C + 1 features as well (plain ``lax``
        and ``jnp`` code does): both pullbacks then take one pass instead of two.
      params: pytree whose leaves have features last.
      inputs: pytree of arrays, the layer's input.
      axis_name: axis or axes over which the batch is spread, as for ``batch_moments``;
        give the same one to ``estimator.train``.

    Returns:
      ``x``, differentiable as ever, and its source. A source that is never pulled back
      costs nothing under ``jit``.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> dense = lambda kernel, z: z @ kernel
      >>> x, source = cbn.run_layer(dense, jnp.ones((3, 4)), jnp.ones((2, 3)))
      >>> sums, _ = source.pullback(jnp.ones((2, 4)), jnp.ones((2, 1)))
      >>> sums[0]
      Array([2., 2., 2., 2.], dtype=float32)
    """
    x = layer_fn(params, inputs)
    params, inputs = lax.stop_gradient((params, inputs))

    def pullback(each: jax.Array, shared: jax.Array) -> tuple[Params, Params]:
        local = _pull_both(layer_fn, _varying(params, axis_name), inputs, each, shared)
        return local if axis_name is None else lax.psum(local, axis_name)

    return x, Source(params, pullback, axis_name)


def _pull_both(layer_fn, params, inputs, each, shared):
    """Both pullbacks: in one pass where the layer can be run with one feature more."""
    wider = jax.tree.map(lambda p: jnp.concatenate([p, p[..., :1]], -1), params)
    width = (*each.shape[:-1], each.shape[-1] + 1)
    if shared.shape[-1] == 1 and _output_shape(layer_fn, wider, inputs) == width:
        both = _pull(layer_fn, wider, inputs, jnp.concatenate([each, shared], -1))
        return tuple(
            jax.tree.map(lambda p, part=part: p[..., part], both)
            for part in (slice(None, -1), slice(-1, None))
        )
    shared = jnp.broadcast_to(shared, each.shape)
    return tuple(_pull(layer_fn, params, inputs, cotangent) for cotangent in (each, shared))


def _pull(layer_fn, params, inputs, cotangent):
    x, pull = jax.vjp(lambda p: layer_fn(p, inputs), params)
    return pull(cotangent.astype(x.dtype))[0]


def _output_shape(layer_fn, params, inputs):
    """Shape of the layer's output, None where it does not run with these parameters.

    Grouped convolutions and layers of fixed width refuse a feature more, each with an
    exception of its own.
    """
    try:
        return getattr(jax.eval_shape(layer_fn, params, inputs), "shape", None)
    except Exception:
        return None


def _varying(params: Params, axis_name: AxisName) -> Params:
    """A copy of replicated parameters that counts as different on each device.

    Inside ``shard_map`` the derivative with respect to a replicated value is summed over
    the devices by JAX itself; a sum of our own on top would multiply it by their number.
    With respect to a varying copy the derivative stays local, there as under ``pmap`` and
    ``vmap``, and the one sum in ``run_layer`` is right everywhere.
    """
    if axis_name is None:
        return params

    def cast(leaf):
        try:
            return lax.pcast(leaf, axis_name, to="varying")
        except ValueError:  # varying already, or an axis for which the notion is void
            return leaf

    return jax.tree.map(cast, params)
