# SPDX-License-Identifier: Apache-2.0
"""Exponential windows of a layer's outputs that are carried along with its weights.

Features come in groups that see the same inputs, and so have one mean patch and one weight
of the past.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .checks import in_dtype
from .layers import Params
from .moments import AxisName, Moments, Part, about_zero, align, pool_devices
from .patches import inner, product
from .running import RunningMoments


class Window(NamedTuple):
    """Moments of an exponential window, at the parameters of the last step.

    Attributes:
      mean: ``[C]``.
      var: ``[C]``.
      size: ``[groups]``, the sum of the weights of its values.
    """

    mean: jax.Array
    var: jax.Array
    size: jax.Array


def empty_window(features: int, groups: int) -> Window:
    """A window without values."""
    zero = jnp.zeros(features, jnp.float32)
    return Window(zero, jnp.zeros_like(zero), jnp.zeros(groups, jnp.float32))


def no_patch(params: Params, groups: int) -> Params:
    """The mean patch of an empty window."""
    return jax.tree.map(
        lambda leaf: jnp.zeros((*leaf.shape[:-1], groups), jnp.float32), params
    )


def decay_of(window: int, micro_batches: int, steps: jax.Array) -> float | jax.Array:
    """The weight that the past keeps: a micro-batch within a step leaves it as it is."""
    decay = 1.0 - 1.0 / window
    if micro_batches == 1:
        return decay
    return jnp.where(steps.max() % micro_batches == 0, decay, 1.0)


class Pooled(NamedTuple):
    """A window with a batch.

    Attributes:
      moments: of both, ``[C]``.
      share: a ``[groups]``, that of the batch.
      size: ``[groups]``.
    """

    moments: Moments
    share: jax.Array
    size: jax.Array


def pool_window(batch: Moments, past: Window) -> Pooled:
    """The past and the batch together."""
    features = past.mean.size
    # Every position counts for all features or for none.
    here = batch.size[:: features // past.size.size]
    size = here + past.size
    share = here / jnp.where(size > 0, size, 1.0)
    a = per_feature(share, features)
    offset = batch.mean - past.mean
    spread = batch.var + (1.0 - a) * jnp.square(offset)
    mean, var = past.mean + a * offset, (1.0 - a) * past.var + a * spread
    return Pooled(Moments(mean, var, per_feature(size, features)), share, size)


class Usable(NamedTuple):
    """What a state may take in.

    Attributes:
      features: ``[C]``, those that have a value and are finite.
      groups: ``[groups]``, those with such a feature.
    """

    features: jax.Array
    groups: jax.Array


def usable_in(batch: Moments, pooled: Pooled, *more: jax.Array) -> Usable:
    """The features that are finite with the batch, as are ``more``."""
    finite = (jnp.isfinite(each) for each in (pooled.moments.var, *more))
    usable = functools.reduce(jnp.logical_and, finite, batch.size > 0)
    return Usable(usable, usable.reshape(pooled.share.size, -1).any(axis=1))


def remember(usable: Usable, new: Any, old: Any) -> Any:
    """New numbers of features that are usable; all others stay as of their last step."""

    def one(new, old):
        return jnp.where(usable.features, new.astype(old.dtype), old)

    return jax.tree.map(one, new, old)


def remember_window(usable: Usable, pooled: Pooled, old: Window) -> Window:
    """The window with the batch."""
    mean, var, _ = pooled.moments
    mean, var = remember(usable, (mean, var), (old.mean, old.var))
    size = jnp.where(usable.groups, pooled.size.astype(old.size.dtype), old.size)
    return Window(mean, var, size)


def pool_patch(
    part: Part, patch: Params, axis_name: AxisName, pivot: jax.Array
) -> tuple[Moments, Params]:
    """Moments and mean patch of the batch on all devices, in one collective."""
    if axis_name is None:
        return about_zero(part), patch
    sums = jax.tree.map(lambda p: part.moments.size[0] * p, patch)
    batch, sums = pool_devices(part, sums, axis_name, pivot)
    least = jnp.maximum(batch.size[0], 1.0)
    return batch, jax.tree.map(lambda each: each / least, sums)


def remember_patch(
    usable: Usable, share: jax.Array, patch: Params, d_mean: Params
) -> Params:
    """The mean patch with the batch, p ← p + a (E[P] − p)."""

    def one(p, patch):
        wide_p = p.astype(patch.dtype)
        new = wide_p + align(share, p) * (patch - wide_p)
        fits = align(usable.groups, p) & jnp.isfinite(new)
        return jnp.where(fits, new, wide_p).astype(p.dtype)

    return jax.tree.map(one, d_mean, patch)


def carry_running(
    usable: Usable, running: RunningMoments, shift: jax.Array, growth: jax.Array
) -> RunningMoments:
    """The averages for inference move with the weights, as the window does."""
    shift, growth = in_dtype(lax.stop_gradient((shift, growth)), running.mean.dtype)
    known = usable.features & (running.steps > 0)
    known &= jnp.isfinite(shift) & jnp.isfinite(growth)
    return running._replace(
        mean=running.mean + jnp.where(known, shift, 0.0),
        var=running.var * jnp.where(known, growth, 1.0),
    )


def mean_at(d_mean: Params, params: Params) -> jax.Array:
    """⟨p, θ⟩ ``[C]``, the mean of the window under the parameters."""
    return product(jax.tree.map(lambda p: p[None], d_mean), params)[0]


def shift_of(mean: jax.Array, last: jax.Array) -> jax.Array:
    """⟨p, θₜ⟩ − ⟨p, θₜ₋₁⟩; within the rounding of the mean, the weights stand still."""
    shift = mean - last
    rounding = 8.0 * jnp.finfo(mean.dtype).eps * jnp.abs(mean)
    return jnp.where(jnp.abs(shift) > rounding, shift, 0.0)


@jax.custom_jvp
def mean_like(value: jax.Array, d_mean: Params, params: Params) -> jax.Array:
    """``value``, which is ⟨p, θ⟩ and a constant, with its derivative."""
    del d_mean, params
    return value


@mean_like.defjvp
def _mean_like(primals, tangents):
    value, d_mean, _ = primals
    # Called again, because a second derivative differentiates this value too.
    return mean_like(*primals), mean_at(in_dtype(d_mean, value.dtype), tangents[2])


@jax.custom_jvp
def var_like(value: jax.Array, d_var: Params, params: Params) -> jax.Array:
    """``value``, which is ⟨G, θ⟩ and a constant, with its derivative."""
    del d_var, params
    return value


@var_like.defjvp
def _var_like(primals, tangents):
    value, d_var, _ = primals
    return var_like(*primals), inner(in_dtype(d_var, value.dtype), tangents[2])


def per_feature(per_group: jax.Array, features: int) -> jax.Array:
    """``[groups]`` as ``[C]``."""
    groups = per_group.size
    shape = groups, features // groups
    return jnp.broadcast_to(per_group[:, None], shape).reshape(-1)
