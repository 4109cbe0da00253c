# SPDX-License-Identifier: Apache-2.0
"""Streaming batch normalization: an exponential window that moves with the weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.checks import check_count, check_epsilon, in_dtype
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.layers import Params
from cbn_jax.core.moments import Moments, align, pool_two
from cbn_jax.core.patches import (
    Sample,
    inner,
    mean_patch,
    moments_and_sample,
    product,
    pull,
)
from cbn_jax.core.running import RunningMoments, finite_moments, init_running
from cbn_jax.core.schedules import ScheduleFn
from cbn_jax.core.values import factory
from cbn_jax.core.windowed import windowed


class StreamingState(NamedTuple):
    """State of ``streaming_batch_norm``.

    Attributes:
      running: averages of the window's moments, for inference.
      window: moments of the exponential window at the parameters below; ``size`` is the
        sum of the weights of its values.
      d_mean: p, their derivative ∂mean/∂θ, the mean input patch, each leaf
        ``[*leaf.shape[:-1], groups]``.
      d_var: G, ∂var/∂θ, like θ.
      params: θ of the last iteration.
    """

    running: RunningMoments
    window: Moments
    d_mean: Params
    d_var: Params
    params: Params


@factory
def streaming_batch_norm(
    window: int = 16,
    *,
    micro_batches: int = 1,
    samples: int | None = 8,
    momentum: float | ScheduleFn = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """Streaming batch normalization: an exponential window that moves with the weights.

    The window's moments (μ, σ²) and their derivatives (p, G) are carried from step to
    step. With Δ = θₜ − θₜ₋₁, P what the layer saw at a position (its input patch, so that
    x = ⟨P, θ⟩) and E the mean over the batch, one step is::

        μ'  = μ + ⟨p, Δ⟩
        σ²' = σ² + ⟨G, Δ⟩ + E[⟨P − p, Δ⟩²]
        (μ, σ²) ← (1 − a) · (μ', max(σ²', 0))  pooled with  a · (E[x], Var[x])
        G ← (1 − a) G + 2 E[(a (x − μ) + (1 − a) ⟨P − p, Δ⟩) (P − p)]
        p ← p + a E[P − p]

    where a falls from 1 to 1/k while the window fills. The quadratic term makes the
    transport exact in expectation. Where the weights turn by more than a radian in k steps
    its noise would grow: the window then shortens itself to the steps of one radian.

    The gradient with respect to θ goes through the current batch and through ⟨p, Δ⟩ and
    ⟨G, Δ⟩, the derivatives averaged over the window, which are as strong as a large batch's
    and less noisy than the current one's.

    Prefer it with 1 to 8 examples per step; ``small_batch_norm(batch_size)`` chooses the
    window. Its state is two arrays of the size of θ, whatever the window.

    Args:
      window: k ≥ 1, effective number of iterations: the weights fall off as (1 − 1/k)ˢ.
        k = 1 gives the statistics of batch norm.
      micro_batches: calls of ``train`` in one step of the optimizer, under gradient
        accumulation. Those of one step count alike, as one batch; the window is over steps.
      samples: about how many positions of the batch enter the terms with P, equally many
        of each example, at random within it. None takes all of them, and so does a batch
        with no more. Moments of the current batch always take all. Under an axis name
        the devices exchange these positions.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a schedule
        m ↦ α_m such as ``cumulative()``. An average with a decay restarts where the
        window contradicts it by more than three standard errors.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``StreamingState``. ``init`` needs the layer and its
      parameters, ``train`` its ``source``. Any layer that is linear in its parameters
      does. ``dense``, ``convolution`` and their like in Flax know what they saw at a
      position; JAX differentiates another layer at the sampled positions.

    Raises:
      ValueError: an argument out of range; parameters without features last; ``train``
        without a source, or with a state made for another layer; a mask that differs per
        feature.
      TypeError: ``x`` is not floating point; the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> kernel = jnp.eye(2)
      >>> estimator = cbn.streaming_batch_norm(window=2)
      >>> state = estimator.init(2, cbn.dense, kernel)
      >>> for z in (jnp.array([[1.0, 0.0]]), jnp.array([[4.0, 3.0]])):
      ...     x, source = cbn.run_layer(cbn.dense, kernel, z)
      ...     statistics, state = estimator.train(state, x, source)
      >>> statistics.mean  # weights 1/3 and 2/3
      Array([3., 2.], dtype=float32)

    Reference: the aim is that of Zhuliang Yao et al., "Cross-Iteration Batch
    Normalization", CVPR 2021, arXiv:2002.05712; the recursion is the one of Ashok
    Cutkosky, Francesco Orabona, "Momentum-Based Variance Reduction in Non-Convex SGD",
    2019, arXiv:1905.10018, applied to a layer's statistics, with averaged derivatives.
    "Streaming Normalization" of Qianli Liao, Kenji Kawaguchi, Tomaso Poggio, 2016,
    arXiv:1610.06160, is another method: it averages statistics and gradients over past
    samples as they were, and nothing there moves with the weights.

    Differs from the former: an exponential window that is linearized anew at every step,
    to second order, instead of k − 1 old ones to first order; gradients through the
    compensation; statistics for inference from the window, which move with the weights.

    NaN or inf makes the output of its own step NaN and is kept out of the state. Without a
    single value that counts (``mask``), the window is used as it is. A window of one value,
    as in the first step of a dense layer at batch size 1, has no variance: that step is
    normalized by the running statistics, which are 0 and 1 before training.
    """
    options = samples, momentum, epsilon
    return named_streaming("streaming_batch_norm", window, micro_batches, *options)


def named_streaming(
    name: str,
    window: int,
    micro_batches: int,
    samples: int | None,
    momentum: float | ScheduleFn,
    epsilon: float,
) -> Estimator:
    """``streaming_batch_norm`` whose errors speak of the function ``name``."""
    check_count("window", window, 1)
    check_count("micro_batches", micro_batches, 1)
    if samples is not None:
        check_count("samples", samples, 1)
    check_epsilon(epsilon)

    alone = window == micro_batches == 1  # batch norm

    def keep(steps):
        """A new step of the optimizer makes the window older, a micro-batch does not."""
        decay = 1.0 - 1.0 / window
        if micro_batches == 1:
            return decay
        return jnp.where(steps % micro_batches == 0, decay, 1.0)

    def step(state, x, source, axis_name, mask):
        steps = state.running.steps.max()
        batch, sample = moments_and_sample(
            source, x, samples, steps, axis_name=axis_name, mask=mask
        )
        old, params = in_dtype((state, source.params), batch.mean.dtype)
        sample = _centered(sample, old.d_mean)
        delta = jax.tree.map(jnp.subtract, params, old.params)
        moved = product(sample.patches, lax.stop_gradient(delta))  # ⟨P − p, Δ⟩
        spread = _spread(sample, moved)
        past = _transport(old, delta, spread)
        size = _past_size(keep(steps) * old.window.size, batch, past, spread, source.groups)
        pooled = pool_two(batch, past._replace(size=size))
        new = lax.stop_gradient(_absorb(old, batch, pooled, sample, moved, params))
        usable = finite_moments(pooled._replace(size=batch.size))
        if not alone:
            moved = lax.stop_gradient(past)
            new = new._replace(running=_carried(state.running, old.window, moved))
        return batch, pooled, _replace_usable(usable, new, state)

    return windowed(
        name,
        StreamingState,
        _init_state,
        step,
        momentum=momentum,
        epsilon=epsilon,
        running="batch" if alone else "window",
        alone=alone,
    )


def _init_state(features: int, params: Params, groups: int) -> StreamingState:
    def zeros(last):
        return jax.tree.map(
            lambda leaf: jnp.zeros((*leaf.shape[:-1], last), jnp.float32), params
        )

    return StreamingState(
        running=init_running(features),
        window=Moments(*(jnp.zeros(features, jnp.float32) for _ in range(3))),
        d_mean=zeros(groups),
        d_var=zeros(features),
        params=zeros(features),
    )


def _centered(sample: Sample, d_mean: Params) -> Sample:
    """The sample with P − p in place of P."""
    patches = jax.tree.map(lambda patch, p: patch - p[None], sample.patches, d_mean)
    return sample._replace(patches=patches)


@jax.named_scope("transport")
def _spread(sample: Sample, moved: jax.Array) -> jax.Array:
    """E[⟨P − p, Δ⟩²], the quadratic term. A non-finite batch must not enter the past."""
    spread = (sample.weight * jnp.square(moved)).sum(axis=0)
    return jnp.where(jnp.isfinite(spread), spread, 0.0)


@jax.named_scope("transport")
def _transport(old: StreamingState, delta: Params, spread: jax.Array) -> Moments:
    """The window's moments at the current parameters, (μ', max(σ²', 0))."""
    (d_mean,) = product(jax.tree.map(lambda p: p[None], old.d_mean), delta)  # ⟨p, Δ⟩
    var = jnp.maximum(old.window.var + inner(old.d_var, delta) + spread, 0.0)
    return old.window._replace(mean=old.window.mean + d_mean, var=var)


def _carried(running: RunningMoments, window: Moments, moved: Moments) -> RunningMoments:
    """The averages for inference move with the weights, as the window does."""
    known = (running.steps > 0) & (window.size > 0)
    known &= jnp.isfinite(moved.mean) & jnp.isfinite(moved.var)
    varies = (window.var > 0) & (moved.var > 0)
    shift = jnp.where(known, moved.mean - window.mean, 0.0)
    growth = moved.var / jnp.where(varies, window.var, 1.0)
    growth = jnp.where(known & varies, growth, 1.0)
    shift, growth = in_dtype((shift, growth), jnp.float32)
    return running._replace(mean=running.mean + shift, var=running.var * growth)


def _past_size(
    size: jax.Array, batch: Moments, past: Moments, spread: jax.Array, groups: int
) -> jax.Array:
    """The weight of the past: at most as many batches as θ takes to turn by one radian.

    The same for all features of a group, which share p: μ and p must stay consistent.
    """
    var = lax.stop_gradient(past.var)
    turn = jnp.minimum(spread / jnp.where(var > 0, var, 1.0), 1.0)  # squared, per step
    turn = jnp.sqrt(turn.reshape(groups, -1).mean(axis=1, keepdims=True))
    limit = batch.size.reshape(groups, -1) / jnp.where(turn > 0, turn, 1.0)
    limit = jnp.where(turn > 0, limit, jnp.inf)
    return jnp.minimum(size, limit.reshape(-1))


@jax.named_scope("derivatives")
def _absorb(
    old: StreamingState,
    batch: Moments,
    pooled: Moments,
    sample: Sample,
    moved: jax.Array,
    params: Params,
) -> StreamingState:
    """The state after this batch: pooled moments, and their p and G at ``params``."""
    a = batch.size / jnp.where(pooled.size > 0, pooled.size, 1.0)
    # G ← (1 − a) G + 2 E[(a (x − μ) + (1 − a) ⟨P − p, Δ⟩) (P − p)]
    toward = a[None] * (sample.x - pooled.mean[None]) + (1.0 - a)[None] * moved
    added = pull(sample.patches, 2.0 * sample.weight * toward)

    def toward_mean(p, mean):  # p ← p + a E[P − p], one share per group
        return p + align(a.reshape(p.shape[-1], -1).mean(axis=-1), p) * mean

    return StreamingState(
        running=old.running,
        window=pooled,
        d_mean=jax.tree.map(toward_mean, old.d_mean, mean_patch(sample)),
        d_var=jax.tree.map(lambda g, d: align(1.0 - a, g) * g + d, old.d_var, added),
        params=params,
    )


@jax.named_scope("remember")
def _replace_usable(usable: jax.Array, new: Any, old: Any) -> Any:
    """New values where they are usable and finite; leaves have features or groups last."""

    def choose(n, o):
        any_of_group = usable.reshape(n.shape[-1], -1).any(axis=1)
        n = n.astype(o.dtype)
        return jnp.where(align(any_of_group, n) & jnp.isfinite(n), n, o)

    return jax.tree.map(choose, new, old)
