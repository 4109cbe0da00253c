# SPDX-License-Identifier: Apache-2.0
"""Streaming batch normalization: an exponential window that moves with the weights."""

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
    remember,
    remember_patch,
    share_of,
    usable_in,
    var_like,
)
from cbn_jax.core.checks import check_count, check_epsilon, in_dtype
from cbn_jax.core.devices import AxisName
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.layers import Params
from cbn_jax.core.moments import Moments, pool_two
from cbn_jax.core.past_rows import PastRows, empty_rows, remember_rows
from cbn_jax.core.patches import Sample, moments_and_sample
from cbn_jax.core.running import RunningMoments, init_running
from cbn_jax.core.schedules import ScheduleFn
from cbn_jax.core.source import Source
from cbn_jax.core.sums import count_values
from cbn_jax.core.transport import derivative, factors, growth, past_size, run
from cbn_jax.core.values import factory
from cbn_jax.core.windowed import windowed


class StreamingState(NamedTuple):
    """State of ``streaming_batch_norm`` and ``small_batch_norm``.

    Attributes:
      running: averages of the window's moments, for inference.
      window: ``[5, C]``, the rows of a ``Window``: mean, variance and size of the
        exponential window at the weights of the last step, and ⟨p, θ⟩ and ⟨G, θ⟩ there.
      d_mean: p = ∂μ/∂θ, the window's mean input patch, each leaf
        ``[*leaf.shape[:-1], groups]``.
      d_var: G = ∂σ²/∂θ, in the form of θ.
      rows: a few positions of past batches.
    """

    running: RunningMoments
    window: jax.Array
    d_mean: Params
    d_var: Params
    rows: PastRows


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

    The state carries the window's moments (μ, σ²) and their derivatives (p, G) from step to
    step. Δ is θₜ − θₜ₋₁. P is the input patch of a position, so that x = ⟨P, θ⟩. E is the
    mean over the batch, and Ê the mean over eight positions of past batches. One step is::

        μ'  = ⟨p, θₜ⟩
        σ²' = σ² + ⟨G, Δ⟩ + Ê[⟨P − p, Δ⟩²]
        (μ, σ²) ← (1 − a) · (μ', max(σ²', 0))  pooled with  a · (E[x], Var[x])
        G ← (1 − a) (G + 2 Ê[⟨P − p, Δ⟩ (P − p)]) + 2 a E[(x − μ) (P − p)]
        p ← p + a E[P − p]

    a falls from 1 to 1/k while the window fills. The quadratic term makes the transport
    exact in expectation. Its noise would grow if the weights turn by more than a radian in
    k steps. The window then shortens to the steps in which the weights turn by one radian.

    The gradient with respect to θ goes through the current batch, through μ' along p, and
    through σ²' along the new G. The derivatives averaged over the window are as strong as
    those of a large batch. They are less noisy than those of the current batch.

    Use it with 1 to 8 examples per step. ``small_batch_norm(batch_size)`` chooses the
    window. The state is one array of the size of θ and nine patches, for every window.
    ``carried_batch_norm`` needs no array of the size of θ.

    Args:
      window: k ≥ 1, the effective number of iterations. The weights decrease as (1 − 1/k)ˢ.
        k = 1 gives the statistics of batch norm.
      micro_batches: number of calls of ``train`` in one step of the optimizer, under
        gradient accumulation. All micro-batches of a step have equal weight and form one
        batch. The window counts steps.
      samples: number of positions of the batch that enter G. Each example contributes
        equally many. If the batch has more examples than ``samples``, some examples
        contribute one position each. None takes all positions. The moments and the mean
        patch always use all positions. Under an axis name the devices exchange the sampled
        positions.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a schedule
        m ↦ α_m such as ``cumulative()``. With a decay, an average restarts if it differs
        from the window by more than three standard errors.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``StreamingState``. ``init`` needs the layer and its
      parameters, ``train`` needs its ``source``. Any layer that is linear in its parameters
      works. ``dense``, ``convolution`` and their counterparts in Flax compute the input
      patch of a position directly. JAX differentiates any other layer at the sampled
      positions.

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

    Differs from the former: the window is exponential. Every step linearizes it again, to
    second order, instead of k − 1 old iterations to first order. Gradients flow through the
    compensation. Statistics for inference come from the window and move with the weights.
    The state does not keep the last weights. It keeps the values under them of ⟨G, θ⟩ and
    of the eight positions.

    NaN or inf makes the output of its own step NaN, and the state skips it. If no value
    counts (``mask``), the step uses the unchanged window. A window of one value has no
    variance, as in the first step of a dense layer at batch size 1. The running statistics
    then normalize that step. They are 0 and 1 before training.
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
    """``streaming_batch_norm`` with the function ``name`` in its error messages."""
    check_count("window", window, 1)
    check_count("micro_batches", micro_batches, 1)
    if samples is not None:
        check_count("samples", samples, 1)
    check_epsilon(epsilon)

    alone = window == micro_batches == 1  # batch norm

    def step(state, x, source, axis_name, mask):
        batch, sample, patch = _look(source, x, samples, state, axis_name, mask)
        now, params = in_dtype((state, source.params), batch.mean.dtype)
        old = Window(*now.window)
        seen = run(now.d_mean, now.d_var, now.rows, old, sample, patch, params)
        keep = decay_of(window, micro_batches, state.running.steps)
        size = past_size(keep * old.size, batch, seen, source.groups)
        past = Moments(old.mean + seen.shift, seen.var, size)
        fixed = lax.stop_gradient(batch)
        pooled, share = pool_two(fixed, past), share_of(fixed, past)
        cotangent, var_at = factors(sample, seen, share)
        usable, running = usable_in(batch, pooled.var, var_at), state.running
        if not alone:
            grown = growth(past.var, old.var)
            running = carry_running(usable, running, seen.shift, grown)
        moved = share * seen.of_batch  # of ⟨p, θ⟩, by the batch
        new = Window(*pooled, seen.mean + moved, var_at)
        first, steps = old.size[0] == 0, state.running.steps[0]
        x, masked = seen.x[:-2] - moved[None], mask is not None
        new = StreamingState(
            running=running,
            window=remember(usable, jnp.stack(new), state.window),
            d_mean=remember_patch(usable, share, patch, state.d_mean),
            d_var=derivative(usable, share, state.d_var, seen, cotangent),
            rows=remember_rows(usable, first, steps, state.rows, sample, x, masked),
        )
        # The gradient goes through the new G, so that the step need not keep the last one.
        past = past._replace(
            mean=mean_like(past.mean, now.d_mean, params),
            var=var_like(past.var, new.d_var, params),
        )
        return batch, pool_two(batch, past), new

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
    d_mean = no_patch(params, groups)
    return StreamingState(
        running=init_running(features),
        window=empty_window(features),
        d_mean=d_mean,
        d_var=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params),
        rows=empty_rows(features, params, groups, d_mean),
    )


def _look(
    source: Source,
    x: jax.Array,
    samples: int | None,
    state: StreamingState,
    axis_name: AxisName,
    mask: jax.Array | None,
) -> tuple[Moments, Sample, Params]:
    """Moments of the batch, some of its positions, and its mean patch."""
    size, patch = count_values(x, mask)[0], source.mean_patch(mask)
    sums = patch if axis_name is None else jax.tree.map(lambda p: size * p, patch)
    batch, sample, sums = moments_and_sample(
        source,
        x,
        samples,
        state.running.steps[0],
        sums,
        axis_name=axis_name,
        mask=mask,
        pivot=state.running.mean,
    )
    if axis_name is None:
        return batch, sample, patch
    least = jnp.maximum(batch.size[0], 1.0)
    return batch, sample, jax.tree.map(lambda each: each / least, sums)
