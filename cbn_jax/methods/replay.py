# SPDX-License-Identifier: Apache-2.0
"""Replay batch normalization: recomputes past outputs from stored inputs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import max_dim

from cbn_jax.core.checks import check_count, check_epsilon
from cbn_jax.core.devices import AxisName, device_count
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.layers import Params
from cbn_jax.core.moments import Moments, pool_two
from cbn_jax.core.patches import Sample, moments_and_sample, per_row, product
from cbn_jax.core.running import RunningMoments, finite_moments, init_running
from cbn_jax.core.schedules import ScheduleFn
from cbn_jax.core.values import factory
from cbn_jax.core.windowed import windowed


class ReplayState(NamedTuple):
    """State of ``replay_batch_norm``; a row is one position of a past batch.

    Attributes:
      running: averages of the window's moments, for inference.
      patches: P of each row, each leaf ``[rows, *leaf.shape[:-1], groups]`` with
        ``(window − 1) · samples`` rows (``samples`` empty rows for a window of one).
      size: ``[rows, 1]``, the number of values that a row represents; 0 for an empty row.
      slot: scalar, the iteration whose rows the next step overwrites.
    """

    running: RunningMoments
    patches: Params
    size: jax.Array
    slot: jax.Array


@factory
def replay_batch_norm(
    window: int = 16,
    *,
    samples: int = 16,
    momentum: float | ScheduleFn = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """Replay batch normalization: recomputes past outputs from stored inputs.

    The method stores inputs of the layer at ``samples`` positions of each of the last k − 1
    iterations. These are the input rows, or for a convolution the input patches P. Each
    step computes their outputs under the current weights, x = ⟨P, θₜ⟩. Mean and variance
    are those of the current batch and these values together. Each stored iteration has the
    weight of its whole batch.

    There is no Taylor term, so the method is exact to every order. The variance is that of
    real values and cannot be negative, for any learning rate and window. The gradient with
    respect to θ goes through the whole window. The only error is the sampling error if
    ``samples`` is smaller than the number of positions.

    Use it for dense layers, for which it is exact and its state is small, or as the
    reference for other methods. On convolutions ``streaming_batch_norm`` uses more
    positions at a lower cost.

    Args:
      window: k ≥ 1, the number of iterations pooled, including the current one; 1 is batch
        norm.
      samples: number of positions stored of each iteration. Each example contributes
        equally many, at random positions. A batch with fewer positions, as in a dense layer
        with at most ``samples`` examples, contributes all of them. Memory and cost are
        (k − 1) · ``samples`` rows, including empty ones. On dense layers write the batch
        size.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a schedule
        m ↦ α_m such as ``cumulative()``. With a decay, an average restarts if it differs
        from the window by more than three standard errors.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``ReplayState``. ``init`` needs the layer and its
      parameters, ``train`` needs its ``source``. Any layer that is linear in its parameters
      works. JAX differentiates the layers that are neither dense nor convolutions.

      Under an axis name the devices divide the ``samples`` among them. Every device keeps
      all rows, and the state is replicated. Without an axis name, never average the states
      of replicas that saw different data: averages of patches vary less than the patches.

    Raises:
      ValueError: an argument out of range; more examples than ``samples``; parameters
        without features last; ``train`` without a source, or with a state made for another
        layer, window or number of samples; a mask that differs per feature.
      TypeError: ``x`` is not floating point; the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> kernel = jnp.eye(2)
      >>> estimator = cbn.replay_batch_norm(window=2, samples=1)
      >>> state = estimator.init(2, cbn.dense, kernel)
      >>> for z in (jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0]])):
      ...     x, source = cbn.run_layer(cbn.dense, kernel, z)
      ...     statistics, state = estimator.train(state, x, source)
      >>> statistics.mean  # of both iterations, one example each
      Array([2., 2.], dtype=float32)

    Reference: the aim is that of Zhuliang Yao et al., "Cross-Iteration Batch
    Normalization", CVPR 2021, arXiv:2002.05712.

    Differs from the paper: the method stores past inputs instead of past statistics with a
    Taylor term. Gradients flow through the whole window. Statistics for inference come from
    the window.

    NaN or inf makes the output of its own step NaN and is not stored. A window of a single
    value has no variance. The running statistics then normalize that step.
    """
    check_count("window", window, 1)
    check_count("samples", samples, 1)
    check_epsilon(epsilon)
    slots = max(window - 1, 1)

    def init_state(features, params, groups):
        rows = slots * samples
        return ReplayState(
            running=init_running(features),
            patches=jax.tree.map(
                lambda p: jnp.zeros((rows, *p.shape[:-1], groups), jnp.float32), params
            ),
            size=jnp.zeros((rows, 1), jnp.float32),
            slot=jnp.zeros((), jnp.float32),
        )

    def step(state, x, source, axis_name, mask):
        batch, sample, _ = moments_and_sample(
            source,
            x,
            samples,
            state.running.steps.max(),
            axis_name=axis_name,
            mask=mask,
            pivot=state.running.mean,
        )
        pooled = pool_two(batch, _past_moments(state, source.params, batch.mean.dtype))
        if window > 1:
            _check_examples(x, samples, axis_name)
            rows = _padded(_rows(sample, batch), samples)
            state = _overwrite(state, rows, state.slot * samples)
        return batch, pooled, state._replace(slot=(state.slot + 1) % slots)

    return windowed(
        "replay_batch_norm",
        ReplayState,
        init_state,
        step,
        momentum=momentum,
        epsilon=epsilon,
        running="batch" if window == 1 else "window",
        alone=window == 1,
    )


class _Rows(NamedTuple):
    """Positions of one batch, as ``ReplayState`` keeps them."""

    patches: Params
    size: jax.Array


def _past_moments(state: ReplayState, params: Params, dtype: Any) -> Moments:
    """Moments ``[C]`` of all rows under the current parameters."""
    patches, size = jax.tree.map(
        lambda leaf: leaf.astype(dtype), (state.patches, state.size)
    )
    x = product(patches, params)
    total = size.sum()
    weight = size / jnp.where(total > 0, total, 1.0)
    mean = (weight * x).sum(axis=0)
    var = (weight * jnp.square(x - mean[None])).sum(axis=0)
    return Moments(mean, var, jnp.broadcast_to(total, mean.shape))


def _rows(sample: Sample, batch: Moments) -> _Rows:
    """The sample as rows; rows that are not finite are empty."""
    size = sample.weight * batch.size.max()
    finite = [
        jnp.isfinite(p).reshape(p.shape[0], -1).all(axis=1, keepdims=True)
        for p in jax.tree.leaves(sample.patches)
    ]
    usable = functools.reduce(jnp.logical_and, finite, size > 0)
    usable &= finite_moments(batch).any()  # otherwise an overflow stays in the window
    rows = _Rows(sample.patches, size)
    return jax.tree.map(lambda leaf: jnp.where(per_row(usable, leaf), leaf, 0.0), rows)


def _check_examples(x: jax.Array, samples: int, axis_name: AxisName) -> None:
    """Raises an error if there is not a row for each example."""
    examples = x.shape[0] * device_count(axis_name)
    if not isinstance(examples, int):  # a symbolic size may have bounds
        fits = max_dim(examples, samples) == samples
        write = f"give symbolic_shape constraints=['{x.shape[0]} <= {samples}']"
    else:
        fits = examples <= samples
        write = f"write samples={examples}"
    if not fits:
        raise ValueError(
            f"replay_batch_norm(samples={samples}) got {examples} examples, expected no "
            f"more examples than samples; {write}."
        )


def _padded(rows: _Rows, samples: int) -> _Rows:
    """Exactly ``samples`` rows, the last ones empty."""
    missing = samples - rows.size.shape[0]

    def padded(leaf):
        edges = [(0, missing, 0), *[(0, 0, 0)] * (leaf.ndim - 1)]
        return lax.pad(leaf, jnp.zeros((), leaf.dtype), edges)

    return jax.tree.map(padded, rows)


def _overwrite(state: ReplayState, rows: _Rows, start: jax.Array) -> ReplayState:
    """Replaces the rows of the oldest iteration by these rows."""

    def put(ring, new):
        new = lax.stop_gradient(new).astype(ring.dtype)
        return lax.dynamic_update_slice_in_dim(ring, new, start.astype(int), axis=0)

    old = _Rows(state.patches, state.size)
    return state._replace(**jax.tree.map(put, old, rows)._asdict())
