# SPDX-License-Identifier: Apache-2.0
"""Exponential windows of a layer's outputs that move with the weights of the layer.

The features of a group have the same inputs. They therefore share one mean patch and one
weight of the past.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .checks import in_dtype
from .devices import AxisName, pool_devices
from .layers import Params
from .moments import Moments, align
from .patches import inner, product
from .running import RunningMoments, finite_moments
from .sums import Part, about_zero


class Window(NamedTuple):
    """Values of an exponential window for each feature, at the weights of the last step.

    A state stores these numbers as the rows of one array ``[5, C]``, ``Window(*rows)``. A
    step then needs one kernel instead of five.

    Attributes:
      mean: ``[C]``.
      var: ``[C]``.
      size: ``[C]``, the sum of the weights of its values.
      mean_at: ``[C]``, ⟨p, θ⟩, the reference for the next move of the mean.
      var_at: ``[C]``, the reference for the next move of the variance; see the method.
    """

    mean: jax.Array
    var: jax.Array
    size: jax.Array
    mean_at: jax.Array
    var_at: jax.Array


def empty_window(features: int) -> jax.Array:
    """The rows of a window without values."""
    return jnp.zeros((len(Window._fields), features), jnp.float32)


def no_patch(params: Params, groups: int) -> Params:
    """The mean patch of an empty window."""
    return jax.tree.map(
        lambda leaf: jnp.zeros((*leaf.shape[:-1], groups), jnp.float32), params
    )


def decay_of(window: int, micro_batches: int, steps: jax.Array) -> float | jax.Array:
    """The weight that the past keeps; 1 for a micro-batch within a step."""
    decay = 1.0 - 1.0 / window
    if micro_batches == 1:
        return decay
    return jnp.where(steps.max() % micro_batches == 0, decay, 1.0)


def share_of(batch: Moments, past: Moments) -> jax.Array:
    """The share ``[C]`` of the batch in a window of batch and past."""
    size = batch.size + past.size
    return batch.size / jnp.where(size > 0, size, 1.0)


def of_groups(per_feature: jax.Array, groups: int) -> jax.Array:
    """``[C]`` reduced to ``[groups]``, the value of the first feature of each group.

    The features of a group have the same inputs.
    """
    return per_feature[:: per_feature.size // groups]


def usable_in(moments: Moments, *more: jax.Array) -> jax.Array:
    """The features ``[C]`` that a window may use: moments and ``more`` are finite."""
    finite = (jnp.isfinite(each) for each in more)
    return functools.reduce(jnp.logical_and, finite, finite_moments(moments))


def remember(usable: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """New numbers ``[..., C]`` for usable features; other features keep the old ones."""
    return jnp.where(align(usable, old), new.astype(old.dtype), old)


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
    usable: jax.Array, share: jax.Array, patch: Params, d_mean: Params
) -> Params:
    """The mean patch with the batch, p ← p + a (E[P] − p)."""

    def one(p, patch):
        groups, wide_p = p.shape[-1], p.astype(patch.dtype)
        new = wide_p + align(of_groups(share, groups), p) * (patch - wide_p)
        fits = align(of_groups(usable, groups), p) & jnp.isfinite(new)
        return jnp.where(fits, new, wide_p).astype(p.dtype)

    return jax.tree.map(one, d_mean, patch)


def carry_running(
    usable: jax.Array, running: RunningMoments, shift: jax.Array, growth: jax.Array
) -> RunningMoments:
    """The averages for inference move with the weights, as the window does."""
    shift, growth = in_dtype(lax.stop_gradient((shift, growth)), running.mean.dtype)
    known = usable & (running.steps > 0) & jnp.isfinite(growth)
    return running._replace(
        mean=running.mean + jnp.where(known, shift, 0.0),
        var=running.var * jnp.where(known, growth, 1.0),
    )


def mean_at(d_mean: Params, params: Params) -> jax.Array:
    """⟨p, θ⟩ ``[C]``, the mean of the window under the parameters."""
    return product(jax.tree.map(lambda p: p[None], d_mean), params)[0]


def shift_of(mean: jax.Array, last: jax.Array) -> jax.Array:
    """⟨p, θₜ⟩ − ⟨p, θₜ₋₁⟩; 0 if it is within the rounding of the mean."""
    shift = mean - last
    rounding = 8.0 * jnp.finfo(mean.dtype).eps * jnp.abs(mean)
    return jnp.where(jnp.abs(shift) > rounding, shift, 0.0)


@jax.custom_jvp
def mean_like(value: jax.Array, d_mean: Params, params: Params) -> jax.Array:
    """``value``, which equals ⟨p, θ⟩ and is a constant, with its derivative."""
    del d_mean, params
    return value


@mean_like.defjvp
def _mean_like(primals, tangents):
    value, d_mean, _ = primals
    # The rule calls the function again, because a second derivative also differentiates
    # this value.
    return mean_like(*primals), mean_at(in_dtype(d_mean, value.dtype), tangents[2])


@jax.custom_jvp
def var_like(value: jax.Array, d_var: Params, params: Params) -> jax.Array:
    """``value``, which equals ⟨G, θ⟩ and is a constant, with its derivative."""
    del d_var, params
    return value


@var_like.defjvp
def _var_like(primals, tangents):
    value, d_var, _ = primals
    return var_like(*primals), inner(in_dtype(d_var, value.dtype), tangents[2])
