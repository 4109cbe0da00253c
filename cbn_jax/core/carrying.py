# SPDX-License-Identifier: Apache-2.0
"""Exponential windows of a layer's outputs that are carried along with its weights.

Features come in groups that see the same inputs, and so have one mean patch and one weight
of the past.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .checks import in_dtype
from .layers import Params
from .moments import AxisName, Moments, Part, about_zero, align, pool_devices
from .patches import inner, product
from .running import RunningMoments, finite_moments


class Window(NamedTuple):
    """What an exponential window knows of each feature, at the weights of the last step.

    A state has these numbers as the rows of one array ``[5, C]``, which costs a step one
    kernel instead of five: ``Window(*rows)``.

    Attributes:
      mean: ``[C]``.
      var: ``[C]``.
      size: ``[C]``, the sum of the weights of its values.
      mean_at: ``[C]``, ⟨p, θ⟩, from which the mean moves on.
      var_at: ``[C]``, what the variance moves on from, see the method.
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
    """The weight that the past keeps: a micro-batch within a step leaves it as it is."""
    decay = 1.0 - 1.0 / window
    if micro_batches == 1:
        return decay
    return jnp.where(steps.max() % micro_batches == 0, decay, 1.0)


def share_of(batch: Moments, past: Moments) -> jax.Array:
    """The share of the batch in a window of both, a ``[C]``."""
    size = batch.size + past.size
    return batch.size / jnp.where(size > 0, size, 1.0)


def of_groups(per_feature: jax.Array, groups: int) -> jax.Array:
    """``[C]`` as ``[groups]``, the number of the first feature of each group.

    The features of a group see the same inputs.
    """
    return per_feature[:: per_feature.size // groups]


def usable_in(moments: Moments, *more: jax.Array) -> jax.Array:
    """The features ``[C]`` whose moments a window may take in, with finite ``more``."""
    finite = (jnp.isfinite(each) for each in more)
    return functools.reduce(jnp.logical_and, finite, finite_moments(moments))


def remember(usable: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """New numbers ``[..., C]`` of usable features; others stay as of their last step."""
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
