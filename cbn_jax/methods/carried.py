# SPDX-License-Identifier: Apache-2.0
"""Carried batch normalization: a window that moves with the weights at very low cost."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.carrying import (
    Window,
    carry_running,
    decay_of,
    empty_window,
    mean_like,
    no_patch,
    pool_patch,
    remember,
    remember_patch,
    share_of,
    shift_of,
    usable_in,
)
from cbn_jax.core.checks import check_count, check_epsilon, in_dtype
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.layers import Params
from cbn_jax.core.moments import Moments, pool_two
from cbn_jax.core.patches import product
from cbn_jax.core.running import RunningMoments, init_running
from cbn_jax.core.schedules import ScheduleFn
from cbn_jax.core.sums import device_moments
from cbn_jax.core.values import factory
from cbn_jax.core.windowed import windowed


class CarriedState(NamedTuple):
    """State of ``carried_batch_norm``.

    Attributes:
      running: averages of the window's moments, for inference.
      window: ``[5, C]``, the rows of a ``Window``: mean, variance and size of the
        exponential window at the weights of the last step, and ⟨p, θ⟩ and ‖θ‖² (without
        the bias) there.
      d_mean: p, the window's mean input patch, each leaf ``[*leaf.shape[:-1], groups]``.
    """

    running: RunningMoments
    window: jax.Array
    d_mean: Params


@factory
def carried_batch_norm(
    window: int = 16,
    *,
    micro_batches: int = 1,
    momentum: float | ScheduleFn = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """Carried batch normalization: a window that moves with the weights at very low cost.

    The state holds the mean input patch p and the moments (μ, σ²) of an exponential window
    of past batches. P is the input patch of a position, so that x = ⟨P, θ⟩. E is the mean
    over the batch, and ‖θ‖ the norm of a feature's weights. One step is::

        μ'  = ⟨p, θₜ⟩
        σ²' = σ² · ‖θₜ‖² / ‖θₜ₋₁‖²
        (μ, σ²) ← (1 − a) · (μ', σ²')  pooled with  a · (E[x], Var[x])
        p ← p + a (E[P] − p)

    a falls from 1 to 1/k while the window fills. The mean is exact for any change of the
    weights, because it is linear in them. The variance is exact if only the length of the
    weights changes, or if the inputs are white. Otherwise the variance lags behind within
    the window.

    The gradient is that of these equations. It goes through ⟨p, θₜ⟩ and ‖θₜ‖² at full
    strength. As in batch norm, it therefore has no component along the weights of a
    feature.

    Use it with 1 to 8 examples per step if memory, compile time or step time matter. Its
    state is one patch and eight numbers per feature. ``streaming_batch_norm`` moves the
    variance exactly.

    Args:
      window: k ≥ 1, the effective number of iterations. The weights decrease as (1 − 1/k)ˢ.
        k = 1 gives the statistics of batch norm. ``⌈32 / batch_size⌉`` is a good choice.
      micro_batches: number of calls of ``train`` in one step of the optimizer, under
        gradient accumulation. All micro-batches of a step have equal weight and form one
        batch. The window counts steps.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a schedule
        m ↦ α_m such as ``cumulative()``. With a decay, an average restarts if it differs
        from the window by more than three standard errors.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``CarriedState``. ``init`` needs the layer and its
      parameters, ``train`` needs its ``source``. Any layer that is linear in its parameters
      works. A parameter of one number per feature counts as a bias, not as a weight, unless
      the layer has no other parameters.

    Raises:
      ValueError: an argument out of range; parameters without features last; ``train``
        without a source, or with a state made for another layer; a mask that differs per
        feature.
      TypeError: ``x`` is not floating point; the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.carried_batch_norm(window=2)
      >>> state = estimator.init(2, cbn.dense, jnp.eye(2))
      >>> z = jnp.array([[1.0, 0.0], [3.0, 4.0]])
      >>> for kernel in (jnp.eye(2), 10 * jnp.eye(2)):  # the weights grow tenfold
      ...     x, source = cbn.run_layer(cbn.dense, kernel, z)
      ...     statistics, state = estimator.train(state, x, source)
      >>> statistics.mean
      Array([20., 20.], dtype=float32)

    Reference: the aim is that of Zhuliang Yao, Yue Cao, Shuxin Zheng, Gao Huang, Stephen
    Lin, "Cross-Iteration Batch Normalization", CVPR 2021, arXiv:2002.05712.

    Differs from the paper: the window is exponential instead of k − 1 old iterations. The
    mean moves by its derivative. The variance moves by the radial part of its derivative,
    which needs no array of the size of θ. Gradients flow through the compensation.
    Statistics for inference come from the window and move with the weights.

    NaN or inf makes the output of its own step NaN, and the state skips it. If no value
    counts (``mask``), the step uses the unchanged window. A window of one value has no
    variance, as in the first step of a dense layer at batch size 1. The running statistics
    then normalize that step. They are 0 and 1 before training.
    """
    check_count("window", window, 1)
    check_count("micro_batches", micro_batches, 1)
    check_epsilon(epsilon)
    alone = window == micro_batches == 1  # batch norm

    def step(state, x, source, axis_name, mask):
        part, patch = device_moments(x, mask), source.mean_patch(mask)
        batch, patch = pool_patch(part, patch, axis_name, state.running.mean)
        (_, rows, d_mean), params = in_dtype((state, source.params), batch.mean.dtype)
        old = Window(*rows)
        mean, of_batch = _means(d_mean, patch, params)
        shift, square = shift_of(mean, old.mean_at), _square(params)
        growth = _growth(square, old.var_at)
        keep = decay_of(window, micro_batches, state.running.steps)
        past = Moments(
            mean=mean_like(old.mean + shift, d_mean, params),
            var=growth * old.var,
            size=keep * old.size,
        )
        pooled, share = pool_two(batch, past), share_of(batch, past)
        usable, running = usable_in(batch, pooled.var, square), state.running
        if not alone:
            running = carry_running(usable, running, shift, growth)
        new = Window(*pooled, mean + share * (of_batch - mean), square)
        new = CarriedState(
            running=running,
            window=remember(usable, jnp.stack(new), state.window),
            d_mean=remember_patch(usable, share, patch, state.d_mean),
        )
        return batch, pooled, new

    def init_state(features, params, groups):
        return CarriedState(
            running=init_running(features),
            window=empty_window(features),
            d_mean=no_patch(params, groups),
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
def _means(d_mean: Params, patch: Params, params: Params) -> tuple[jax.Array, jax.Array]:
    """⟨p, θ⟩ and ⟨E[P], θ⟩ in one product, as constants."""
    both = jax.tree.map(lambda p, new: jnp.stack([p, new]), d_mean, patch)
    mean, of_batch = product(both, lax.stop_gradient(params))
    return mean, of_batch


@jax.named_scope("transport")
def _square(params: Params) -> jax.Array:
    """‖θ‖² of the weights of each feature."""
    leaves = jax.tree.leaves(params)
    # One number per feature is a bias, on which the variance does not depend.
    weights = [leaf for leaf in leaves if leaf.ndim > 1] or leaves
    squares = [jnp.square(leaf).sum(axis=range(leaf.ndim - 1)) for leaf in weights]
    return jax.tree.reduce(jnp.add, squares)


def _growth(square: jax.Array, last: jax.Array) -> jax.Array:
    """‖θₜ‖² / ‖θₜ₋₁‖², differentiable; 1 if there is no last step or no weight."""
    known = (last > 0) & (square > 0)
    return jnp.where(known, square / jnp.where(known, last, 1.0), 1.0)
