# SPDX-License-Identifier: Apache-2.0
"""Past iterations as functions of the layer's parameters, in a ring of slots."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .carrying import Window, mean_at, of_groups, usable_in
from .checks import in_dtype
from .devices import AxisName, pool_devices
from .layers import Params
from .moments import Moments, align
from .patches import inner, product, pull
from .source import Source
from .statistics import std_of
from .sums import Part, about_zero, device_moments


class History(NamedTuple):
    """Moments of iterations as functions of the layer's parameters θ.

    The ring has ``S`` slots. An iteration s in it had parameters θₛ. The history keeps only
    the products with θₛ, not θₛ itself: ``⟨d, θ − θₛ⟩ = ⟨d, θ⟩ − ⟨d, θₛ⟩``.

    Attributes:
      window: ``[5, S, C]``, the rows of a ``Window``: μₛ and σ²ₛ at θₛ, the number of their
        values (0 for an empty slot), ⟨∂μₛ/∂θ, θₛ⟩ and ⟨∂σ²ₛ/∂θ, θₛ⟩.
      d_mean: ∂μₛ/∂θ, the mean input patch, each leaf ``[S, *leaf.shape[:-1], groups]``. All
        features of a group share it.
      d_var: ∂σ²ₛ/∂θ, each leaf ``[S, *leaf.shape]``.
    """

    window: jax.Array
    d_mean: Params
    d_var: Params


def empty_history(slots: int, features: int, params: Params, groups: int) -> History:
    """A history with only empty slots."""

    def per_param(last):
        return jax.tree.map(
            lambda leaf: jnp.zeros((slots, *leaf.shape[:-1], last), jnp.float32), params
        )

    return History(
        window=jnp.zeros((len(Window._fields), slots, features), jnp.float32),
        d_mean=per_param(groups),
        d_var=per_param(features),
    )


@jax.named_scope("transport")
def transport(history: History, params: Params, rho: float, dtype: Any) -> Moments:
    """Moments ``[S, C]`` of the iterations in the ring, moved to the current parameters.

    The move is to first order, so the variance may be negative.
    """
    rows, d_mean, d_var = in_dtype(history, dtype)
    old = Window(*rows)
    shift = rho * (product(d_mean, params) - old.mean_at)  # ρ ⟨∂μ/∂θ, Δθ⟩
    growth = rho * (_inner(d_var, params) - old.var_at)  # ρ ⟨∂σ²/∂θ, Δθ⟩
    var = old.var + growth - jnp.square(shift)  # ν − μ²
    return Moments(old.mean + shift, var, old.size)


def this_iteration(
    x: jax.Array,
    source: Source,
    axis_name: AxisName,
    mask: jax.Array | None,
    pivot: jax.Array,
) -> tuple[Moments, History]:
    """Moments of this iteration, and the iteration as a ``History`` of a single slot."""
    part = device_moments(x, mask)
    here = about_zero(part)
    d_mean, d_var = _derivatives(lax.stop_gradient((here, x)), source, mask)
    if axis_name is None:
        return here, _slot(here, d_mean, d_var, source.params)
    moments, d_mean, d_var = _pool_derivatives(part, d_mean, d_var, axis_name, pivot)
    return moments, _slot(moments, d_mean, d_var, source.params)


def _pool_derivatives(
    part: Part, d_mean: Params, d_var: Params, axis_name: AxisName, pivot: jax.Array
) -> tuple[Moments, Params, Params]:
    """Moments of all devices together, and their derivatives.

    Derivative of the law of total variance. w are the shares of the devices, μ_d their
    means, σ²_d their variances, and c is any pivot::

        ∂μ = Σ w ∂μ_d      ∂σ² = Σ w (∂σ²_d + 2 (μ_d − c) ∂μ_d) − 2 (μ − c) ∂μ
    """
    here = lax.stop_gradient(about_zero(part))
    # Every position counts for all features or for none.
    sums = (
        jax.tree.map(lambda d: here.size[0] * d, d_mean),
        jax.tree.map(
            lambda d, s: align(here.size, d) * (d + s),
            d_var,
            _outer(d_mean, 2.0 * (here.mean - pivot)),
        ),
    )
    moments, sums = pool_devices(part, sums, axis_name, pivot)
    total = jnp.maximum(moments.size[0], 1.0)
    d_mean, d_var = jax.tree.map(lambda s: s / total, sums)
    mean = lax.stop_gradient(moments.mean)
    between = _outer(d_mean, 2.0 * (mean - pivot))
    return moments, d_mean, jax.tree.map(jnp.subtract, d_var, between)


def _outer(d_mean: Params, factor: jax.Array) -> Params:
    """``factor · ∂μ`` for every feature, from the ∂μ of its group."""
    rows = jax.tree.map(lambda d: d[None], d_mean)
    return pull(rows, factor[None])


@jax.named_scope("derivatives")
def _derivatives(
    seen: tuple[Moments, jax.Array], source: Source, mask: jax.Array | None
) -> tuple[Params, Params]:
    """∂μ and ∂σ² of this device's values."""
    (mean, var, count), x = seen
    # The cotangent has the dtype of the layer. In half precision 1/N would underflow. A sum
    # without 1/N would overflow, and so would large deviations. The deviations are
    # therefore divided by their standard deviation and by √N, and the result is rescaled.
    root, size = jnp.sqrt(jnp.maximum(count[0], 1.0)), jnp.ones_like(var)
    if x.dtype != mean.dtype:
        size = std_of(jnp.where(var > 0, var, 1.0))
    x = x.astype(mean.dtype)
    cotangent = (x - align(mean, x)) / align(size * root, x)
    if mask is not None:
        cotangent = jnp.where(mask, cotangent, 0.0)
    d_var = jax.tree.map(
        lambda d: d.astype(mean.dtype) * align(2.0 * size / root, d),
        source.pullback(cotangent, masked=mask is not None),
    )
    return source.mean_patch(mask), d_var


def _slot(moments: Moments, d_mean: Params, d_var: Params, params: Params) -> History:
    params = lax.stop_gradient(params)
    moments, d_mean, d_var = lax.stop_gradient((moments, d_mean, d_var))
    window = Window(*moments, mean_at(d_mean, params), inner(d_var, params))
    slot = History(jnp.stack(window), d_mean, d_var)
    return slot._replace(
        window=slot.window[:, None],
        d_mean=jax.tree.map(lambda leaf: leaf[None], d_mean),
        d_var=jax.tree.map(lambda leaf: leaf[None], d_var),
    )


@jax.named_scope("remember")
def push(history: History, entry: History, slot: jax.Array) -> History:
    """Overwrites one slot; it stays empty for features that are not finite."""
    new, at = Window(*entry.window[:, 0]), slot.astype(int)
    usable = usable_in(Moments(new.mean, new.var, new.size), new.mean_at, new.var_at)

    def overwrite(ring, new, axis=0):
        fits = of_groups(usable, new.shape[-1])
        new = jnp.where(align(fits, new), new, 0.0).astype(ring.dtype)
        return lax.dynamic_update_slice_in_dim(ring, new, at, axis)

    return History(
        window=overwrite(history.window, entry.window, axis=1),
        d_mean=jax.tree.map(overwrite, history.d_mean, entry.d_mean),
        d_var=jax.tree.map(overwrite, history.d_var, entry.d_var),
    )


def _inner(derivative: Params, params: Params) -> jax.Array:
    """``inner`` for every slot, ``[S, C]``."""
    # XLA's CPU backend is slow with all slots in one reduction, and with a loop unrolled.
    return lax.map(lambda d: inner(d, params), derivative)
