# SPDX-License-Identifier: Apache-2.0
"""Carried batch normalization: a window that moves with the weights at hardly any cost."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cbn_jax.core.carrying import (
    Window,
    carry_running,
    decay_of,
    empty_window,
    mean_at,
    no_patch,
    pool_patch,
    pool_window,
    remember,
    remember_patch,
    remember_window,
    usable_in,
)
from cbn_jax.core.checks import check_count, check_epsilon, in_dtype
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.layers import Params
from cbn_jax.core.moments import device_moments
from cbn_jax.core.running import RunningMoments, init_running
from cbn_jax.core.schedules import ScheduleFn
from cbn_jax.core.values import factory
from cbn_jax.core.windowed import windowed


class CarriedState(NamedTuple):
    """State of ``carried_batch_norm``.

    Attributes:
      running: averages of the window's moments, for inference.
      window: moments of the exponential window at the parameters of the last step.
      d_mean: p, the window's mean input patch, each leaf ``[*leaf.shape[:-1], groups]``.
      square: ``[C]``, |θ|² of the last step, without the bias.
    """

    running: RunningMoments
    window: Window
    d_mean: Params
    square: jax.Array


@factory
def carried_batch_norm(
    window: int = 16,
    *,
    micro_batches: int = 1,
    momentum: float | ScheduleFn = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """Carried batch normalization."""
    check_count("window", window, 1)
    check_count("micro_batches", micro_batches, 1)
    check_epsilon(epsilon)
    alone = window == micro_batches == 1  # batch norm

    def step(state, x, source, axis_name, mask):
        part, patch = device_moments(x, mask), source.mean_patch(mask)
        old, params = in_dtype((state, source.params), part.pivot.dtype)
        mean, square = mean_at(old.d_mean, params), _square(params)
        growth = _growth(square, old.square)
        keep = decay_of(window, micro_batches, state.running.steps)
        past = Window(mean, growth * old.window.var, keep * old.window.size)
        batch, patch = pool_patch(part, patch, axis_name, mean)
        pooled = pool_window(batch, past)
        usable, running = usable_in(batch, pooled, square), state.running
        if not alone:
            shift = mean - old.window.mean
            running = carry_running(usable, running, shift, growth)
        new = CarriedState(
            running=running,
            window=remember_window(usable, pooled, state.window),
            d_mean=remember_patch(usable, pooled.share, patch, state.d_mean),
            square=remember(usable, square, state.square),
        )
        return batch, pooled.moments, new

    def init_state(features, params, groups):
        return CarriedState(
            running=init_running(features),
            window=empty_window(features, groups),
            d_mean=no_patch(params, groups),
            square=jnp.zeros(features, jnp.float32),
        )

    return windowed(
        "carried_batch_norm",
        CarriedState,
        init_state,
        step,
        momentum=momentum,
        epsilon=epsilon,
        running="batch" if alone else "window",
        alone=alone,
    )


@jax.named_scope("transport")
def _square(params: Params) -> jax.Array:
    """|θ|² of the weights of each feature."""
    leaves = jax.tree.leaves(params)
    # One number per feature is a bias, on which the variance does not depend.
    weights = [leaf for leaf in leaves if leaf.ndim > 1] or leaves
    squares = [jnp.square(leaf).sum(axis=range(leaf.ndim - 1)) for leaf in weights]
    return jax.tree.reduce(jnp.add, squares)


def _growth(square: jax.Array, last: jax.Array) -> jax.Array:
    """|θₜ|² / |θₜ₋₁|², attached; 1 where there is no last step or no weight."""
    known = (last > 0) & (square > 0)
    return jnp.where(known, square / jnp.where(known, last, 1.0), 1.0)
