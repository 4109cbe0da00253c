# SPDX-License-Identifier: Apache-2.0
"""Past iterations as functions of the layer's parameters, in a ring of slots."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._moments import Moments, align
from ._running import usable_moments
from ._source import Params, Source


class History(NamedTuple):
    """Moments of past iterations as functions of the layer's parameters θ.

    ``S`` slots in a ring; an iteration s in it had parameters θₛ. Only the products with
    θₛ are kept, not θₛ itself: ``⟨d, θ − θₛ⟩ = ⟨d, θ⟩ − ⟨d, θₛ⟩``.

    Attributes:
      mean: ``[S, C]``, μₛ at θₛ.
      var: ``[S, C]``, σ²ₛ at θₛ.
      d_mean: ∂μₛ/∂θ, each leaf ``[S, *leaf.shape]``.
      d_var: ∂σ²ₛ/∂θ, the same.
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


def empty_history(slots: int, features: int, params: Params) -> History:
    """Slots in which nothing counts yet."""

    def per_feature():
        return jnp.zeros((slots, features), jnp.float32)

    def per_param():
        return jax.tree.map(
            lambda leaf: jnp.zeros((slots, *leaf.shape), jnp.float32), params
        )

    return History(
        mean=per_feature(),
        var=per_feature(),
        d_mean=per_param(),
        d_var=per_param(),
        mean_at=per_feature(),
        var_at=per_feature(),
        size=per_feature(),
    )


def transport(history: History, params: Params, dtype: Any) -> Moments:
    """Moments ``[S, C]`` of the past iterations, moved to today's parameters."""
    history = jax.tree.map(lambda leaf: leaf.astype(dtype), history)
    d_mean = _inner(history.d_mean, params) - history.mean_at  # ⟨∂μ/∂θ, Δθ⟩
    d_var = _inner(history.d_var, params) - history.var_at  # ⟨∂σ²/∂θ, Δθ⟩
    var = jnp.maximum(history.var + d_var - jnp.square(d_mean), 0.0)  # ν ≥ μ²
    return Moments(history.mean + d_mean, var, history.size)


def prepend(current: Moments, past: Moments) -> Moments:
    """The current iteration in front of the past ones, ``[1 + S, C]``."""
    return jax.tree.map(lambda new, old: jnp.concatenate([new[None], old]), current, past)


def entry_of(moments: Moments, x: jax.Array, source: Source, mask: Any) -> History:
    """What the window remembers of one iteration: a history with a single slot."""
    mean, var, count = moments
    x = x.astype(mean.dtype)
    if mask is None:
        weight = jnp.broadcast_to(1.0 / count[0], (*x.shape[:-1], 1))
        deviation = x - align(mean, x)
    else:
        counts = jnp.broadcast_to(mask, x.shape).astype(bool)
        weight = jnp.where(counts, 1.0 / align(jnp.maximum(count, 1.0), x), 0.0)
        deviation = jnp.where(counts, x - align(mean, x), 0.0)
    d_var, d_mean = jax.tree.map(
        lambda leaf: leaf[None].astype(mean.dtype),
        source.pullback(2.0 * deviation * weight, weight),
    )
    return History(
        mean=mean[None],
        var=var[None],
        d_mean=d_mean,
        d_var=d_var,
        mean_at=_inner(d_mean, source.params),
        var_at=_inner(d_var, source.params),
        size=count[None],
    )


def push(history: History, entry: History, slot: jax.Array) -> History:
    """Overwrites one slot; features that are not finite leave theirs empty."""
    usable = usable_moments(Moments(entry.mean, entry.var, entry.size))
    usable &= jnp.isfinite(entry.mean_at) & jnp.isfinite(entry.var_at)

    def overwrite(ring, new):
        new = jnp.where(align(usable[0], new), new, 0.0)
        new = jnp.broadcast_to(new, (1, *ring.shape[1:])).astype(ring.dtype)
        return lax.dynamic_update_slice_in_dim(ring, new, slot.astype(int), axis=0)

    return jax.tree.map(overwrite, history, entry)


def _inner(derivative: Params, params: Params) -> jax.Array:
    """⟨d, θ⟩ per slot and feature, ``[S, C]``: summed over all that feature c owns."""

    def product(d, leaf):
        return (d * leaf[None].astype(d.dtype)).sum(axis=range(1, d.ndim - 1))

    return jax.tree.reduce(jnp.add, jax.tree.map(product, derivative, params))
