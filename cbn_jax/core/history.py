# SPDX-License-Identifier: Apache-2.0
"""Past iterations as functions of the layer's parameters, in a ring of slots."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .layers import Params
from .moments import (
    AxisName,
    Moments,
    Part,
    about_zero,
    align,
    device_moments,
    pool_devices,
)
from .patches import inner, product, pull
from .running import finite_moments
from .source import Source
from .statistics import std_of


class History(NamedTuple):
    """Moments of iterations as functions of the layer's parameters θ.

    ``S`` slots in a ring; an iteration s in it had parameters θₛ. Only the products with
    θₛ are kept, not θₛ itself: ``⟨d, θ − θₛ⟩ = ⟨d, θ⟩ − ⟨d, θₛ⟩``.

    Attributes:
      mean: ``[S, C]``, μₛ at θₛ.
      var: ``[S, C]``, σ²ₛ at θₛ.
      d_mean: ∂μₛ/∂θ, the mean input patch, each leaf ``[S, *leaf.shape[:-1], groups]``:
        the same for all features of a group.
      d_var: ∂σ²ₛ/∂θ, each leaf ``[S, *leaf.shape]``.
      mean_at: ``[S, C]``, ⟨∂μₛ/∂θ, θₛ⟩.
      var_at: ``[S, C]``, ⟨∂σ²ₛ/∂θ, θₛ⟩.
      size: ``[S, C]``, values behind the moments; 0 for an empty slot.
    """

    mean: jax.Array
    var: jax.Array
    d_mean: Params
    d_var: Params
    mean_at: jax.Array
    var_at: jax.Array
    size: jax.Array


def empty_history(slots: int, features: int, params: Params, groups: int) -> History:
    """Slots in which nothing counts yet."""

    def per_feature():
        return jnp.zeros((slots, features), jnp.float32)

    def per_param(last):
        return jax.tree.map(
            lambda leaf: jnp.zeros((slots, *leaf.shape[:-1], last), jnp.float32), params
        )

    return History(
        mean=per_feature(),
        var=per_feature(),
        d_mean=per_param(groups),
        d_var=per_param(features),
        mean_at=per_feature(),
        var_at=per_feature(),
        size=per_feature(),
    )


@jax.named_scope("transport")
def transport(history: History, params: Params, rho: float, dtype: Any) -> Moments:
    """Moments ``[S, C]`` of the iterations in the ring, moved to the current parameters.

    To first order: the variance may come out negative.
    """
    history = jax.tree.map(lambda leaf: leaf.astype(dtype), history)
    d_mean = rho * (product(history.d_mean, params) - history.mean_at)  # ρ ⟨∂μ/∂θ, Δθ⟩
    d_var = rho * (_inner(history.d_var, params) - history.var_at)  # ρ ⟨∂σ²/∂θ, Δθ⟩
    var = history.var + d_var - jnp.square(d_mean)  # ν − μ²
    return Moments(history.mean + d_mean, var, history.size)


def prepend(batch: Moments, past: Moments) -> Moments:
    """The current iteration in front of the past ones, ``[1 + S, C]``."""
    return jax.tree.map(lambda new, old: jnp.concatenate([new[None], old]), batch, past)


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

    The derivative of the law of total variance, with the shares w of the devices, their
    means μ_d and variances σ²_d, about any pivot c::

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
    x = x.astype(mean.dtype)
    # A layer in half precision takes the cotangent in it: 1/N would underflow there, and a
    # sum without it overflow, as would large deviations. So deviations go in by their size
    # and with 1/√N, and the rest follows.
    root, size = jnp.sqrt(jnp.maximum(count[0], 1.0)), std_of(var)
    size = jnp.where(size > 0, size, 1.0)
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
    moments, d_mean, d_var = jax.tree.map(
        lambda leaf: lax.stop_gradient(leaf)[None], (moments, d_mean, d_var)
    )
    return History(
        mean=moments.mean,
        var=moments.var,
        d_mean=d_mean,
        d_var=d_var,
        mean_at=product(d_mean, params),
        var_at=_inner(d_var, params),
        size=moments.size,
    )


@jax.named_scope("remember")
def push(history: History, entry: History, slot: jax.Array) -> History:
    """Overwrites one slot; features that are not finite leave theirs empty."""
    usable = finite_moments(Moments(entry.mean, entry.var, entry.size))
    usable &= jnp.isfinite(entry.mean_at) & jnp.isfinite(entry.var_at)

    def overwrite(ring, new):
        # A mean patch belongs to all features of its group.
        fits = usable.reshape(new.shape[-1], -1).any(axis=1)
        new = jnp.where(align(fits, new), new, 0.0).astype(ring.dtype)
        return lax.dynamic_update_slice_in_dim(ring, new, slot.astype(int), axis=0)

    return jax.tree.map(overwrite, history, entry)


def _inner(derivative: Params, params: Params) -> jax.Array:
    """``inner`` for every slot, ``[S, C]``."""
    # XLA's CPU backend is slow with all slots in one reduction, and with a loop unrolled.
    return lax.map(lambda d: inner(d, params), derivative)
