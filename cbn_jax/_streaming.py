# SPDX-License-Identifier: Apache-2.0
"""Streaming batch normalization: an exponential window that moves with the weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._checks import (
    check_activations,
    check_count,
    check_epsilon,
    check_features_last,
    check_mask,
    check_patches,
    check_source,
    check_state,
    check_values,
)
from ._estimator import Estimator
from ._layer import Params
from ._moments import Moments, align, pool_two
from ._patches import Sample, inner, mean_patch, moments_and_sample, product, pull
from ._running import (
    Averaging,
    RunningMoments,
    averaging,
    init_running,
    known_moments,
    update_running,
    usable_moments,
)
from ._statistics import statistics_of


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


def streaming_batch_norm(
    window: int = 16,
    *,
    samples: int | None = 8,
    momentum: float | Averaging = 0.99,
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
        k = 1 is batch norm.
      samples: about how many positions of the batch are looked at for the terms with P,
        spread evenly over the examples and at random within; all where a batch has no
        more, or for None. Moments of the current batch always take all. Under an axis name
        these positions are what the devices exchange, all of them for None.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a rule
        m ↦ α_m such as ``cumulative``.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``StreamingState``. ``init`` needs the layer's
      parameters, ``train`` a ``source`` with patches: ``run_layer`` with ``dense`` or
      ``convolution``, or a Flax Dense or Conv.

    Raises:
      ValueError: an argument out of range; parameters without features last; ``train``
        without a source, with one of other parameters, without patches or of another
        ``axis_name``; features that do not fit the state; a mask that differs per feature.
      TypeError: ``x`` is not floating point; the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> kernel = jnp.eye(2)
      >>> estimator = cbn.streaming_batch_norm(window=2)
      >>> state = estimator.init(features=2, params=kernel)
      >>> for z in (jnp.array([[1.0, 0.0]]), jnp.array([[4.0, 3.0]])):
      ...     x, source = cbn.run_layer(cbn.dense, kernel, z)
      ...     statistics, state = estimator.train(state, x, source)
      >>> statistics.mean  # weights 1/3 and 2/3
      Array([3., 2.], dtype=float32)

    Reference: the aim is that of Zhuliang Yao et al., "Cross-Iteration Batch
    Normalization", CVPR 2021, arXiv:2002.05712; the recursion is the one of Ashok
    Cutkosky, Francesco Orabona, "Momentum-Based Variance Reduction in Non-Convex SGD",
    2019, arXiv:1905.10018, applied to a layer's statistics, with averaged derivatives.

    Differs from the former: an exponential window that is linearized anew at every step,
    to second order, instead of k − 1 old ones to first order; gradients through the
    compensation; statistics for inference from the window.

    NaN or inf makes the output of its own step NaN and is kept out of the state. Without a
    single value that counts (``mask``), the window is used as it is.
    """
    name = "streaming_batch_norm"
    check_count("window", window, 1)
    if samples is not None:
        check_count("samples", samples, 1)
    check_epsilon(epsilon)
    keep = 1.0 - 1.0 / window
    average = averaging(momentum)

    def check(state, x):
        check_activations(name, x)
        check_state(name, state, StreamingState, lambda s: s.running.mean, x)

    def init(features, params=None, groups=1):
        check_features_last(name, features, params)

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

    def train(state, x, source=None, *, axis_name=None, mask=None):
        check(state, x)
        source = check_source(name, x, source, state.d_mean, axis_name)
        check_patches(name, source)
        check_mask(name, x, mask)
        if window == 1:
            check_values(name, x, axis_name, mask)
        state = lax.stop_gradient(state)
        batch, sample = moments_and_sample(
            source, x, samples, state.running.steps.max(), axis_name=axis_name, mask=mask
        )
        dtype = batch.mean.dtype
        old = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), source.params)
        sample = _centered(sample, old.d_mean)
        delta, moved = _displaced(sample, params, old.params)
        spread = (sample.weight * jnp.square(moved)).sum(axis=0)
        spread = jnp.where(jnp.isfinite(spread), spread, 0.0)  # NaN now is not past
        past = _transported(old, delta, spread)
        past = past._replace(
            size=_weight(keep * old.window.size, batch, past, spread, source.groups)
        )
        pooled = pool_two(batch, past)
        if mask is not None:
            pooled = known_moments(pooled, old.running)
        batch, params, believed = lax.stop_gradient((batch, params, pooled))
        seen = believed._replace(size=batch.size)
        new = StreamingState(
            update_running(state.running, seen, average),
            believed,
            *_derivatives(old, batch, believed, sample, moved),
            params,
        )
        after = _where(usable_moments(seen), new, state)
        return statistics_of(pooled, epsilon), after

    def infer(state, x):
        check(state, x)
        return statistics_of(state.running, epsilon)

    return Estimator(init, train, infer)


def _centered(sample: Sample, d_mean: Params) -> Sample:
    """The sample with P − p in place of P."""
    patches = jax.tree.map(lambda patch, p: patch - p[None], sample.patches, d_mean)
    return sample._replace(patches=patches)


@jax.named_scope("transport")
def _displaced(sample: Sample, params: Params, old: Params) -> tuple[Params, jax.Array]:
    """Δ, and how far it moves each of the sample, ⟨P − p, Δ⟩."""
    delta = jax.tree.map(jnp.subtract, params, old)
    return delta, product(sample.patches, lax.stop_gradient(delta))


@jax.named_scope("transport")
def _transported(old: StreamingState, delta: Params, spread: jax.Array) -> Moments:
    """The window's moments at today's parameters."""
    (d_mean,) = product(jax.tree.map(lambda p: p[None], old.d_mean), delta)  # ⟨p, Δ⟩
    var = jnp.maximum(old.window.var + inner(old.d_var, delta) + spread, 0.0)
    return old.window._replace(mean=old.window.mean + d_mean, var=var)


def _weight(
    size: jax.Array, batch: Moments, past: Moments, spread: jax.Array, groups: int
) -> jax.Array:
    """The past's weight: at most as many batches as the weights take to turn a radian.

    The same for all features of a group, as p is: else μ and p would not belong together.
    """
    var = lax.stop_gradient(past.var)
    turn = jnp.minimum(spread / jnp.where(var > 0, var, 1.0), 1.0)  # squared, per step
    turn = jnp.sqrt(turn.reshape(groups, -1).mean(axis=1, keepdims=True))
    limit = batch.size.reshape(groups, -1) / jnp.where(turn > 0, turn, 1.0)
    limit = jnp.where(turn > 0, limit, jnp.inf)
    return jnp.minimum(size, limit.reshape(-1))


@jax.named_scope("derivatives")
def _derivatives(
    old: StreamingState,
    batch: Moments,
    pooled: Moments,
    sample: Sample,
    moved: jax.Array,
) -> tuple[Params, Params]:
    """The pooled moments' p and G at today's parameters."""
    share = batch.size / jnp.where(pooled.size > 0, pooled.size, 1.0)  # a
    toward = share[None] * (sample.x - pooled.mean[None]) + (1.0 - share)[None] * moved
    d_var = pull(sample.patches, 2.0 * sample.weight * toward)
    d_mean = mean_patch(sample)

    def step(p, mean):
        return p + align(share.reshape(p.shape[-1], -1).mean(axis=-1), p) * mean

    return (
        jax.tree.map(step, old.d_mean, d_mean),
        jax.tree.map(lambda g, d: align(1.0 - share, g) * g + d, old.d_var, d_var),
    )


@jax.named_scope("remember")
def _where(usable: jax.Array, new: Any, old: Any) -> Any:
    """The new of what is usable and finite, for leaves with features or groups last."""

    def choose(n, o):
        any_of_group = usable.reshape(n.shape[-1], -1).any(axis=1)
        n = n.astype(o.dtype)
        return jnp.where(align(any_of_group, n) & jnp.isfinite(n), n, o)

    return jax.tree.map(choose, new, old)
