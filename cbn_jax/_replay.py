# SPDX-License-Identifier: Apache-2.0
"""Replay batch normalization: remembered inputs, seen through today's weights."""

import functools
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
from ._moments import Moments, pool_two
from ._patches import Sample, moments_and_sample, per_row, product
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


class Memory(NamedTuple):
    """What the layer saw at some positions of the past iterations.

    Attributes:
      patches: P, each leaf ``[(window − 1) · samples, *leaf.shape[:-1], groups]``.
      size: ``[(window − 1) · samples, 1]``, how many values a row stands for; 0 for none.
    """

    patches: Params
    size: jax.Array


class ReplayState(NamedTuple):
    """State of ``replay_batch_norm``.

    Attributes:
      running: averages of the window's moments, for inference.
      memory: of the last ``window − 1`` iterations (of one, left empty, where that is 0).
      slot: scalar, the iteration in the memory that is overwritten next.
    """

    running: RunningMoments
    memory: Memory
    slot: jax.Array


def replay_batch_norm(
    window: int = 16,
    *,
    samples: int = 16,
    momentum: float | Averaging = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """Replay batch normalization: remembered inputs, seen through today's weights.

    Keeps what the layer saw (its input rows, or for a convolution its input patches P) at
    ``samples`` positions of each of the last k − 1 iterations, and computes what it would
    answer today, x = ⟨P, θₜ⟩. Mean and variance are those of the current batch and these
    values together, each remembered iteration with the weight of its whole batch.

    No Taylor term, so it is exact to every order: the variance is one of real values and
    cannot be negative, no learning rate or window breaks it, and the gradient with respect
    to θ goes through all of the window. What remains is the sampling error where
    ``samples`` is smaller than the number of positions.

    Prefer it for dense layers, where it is exact and its state is small, or as the
    yardstick for other methods; on convolutions ``streaming_batch_norm`` uses more
    positions for less.

    Args:
      window: k ≥ 1, iterations pooled, the current one included; 1 is batch norm.
      samples: positions remembered of each iteration, equally many of each example, at
        random within; where a batch has fewer, as in a dense layer with ``samples``
        examples or less, all of them. Memory and cost are (k − 1) · ``samples`` rows,
        whether in use or not: on dense layers write the batch size.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a rule
        m ↦ α_m such as ``cumulative``.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``ReplayState``. ``init`` needs the layer's
      parameters, ``train`` a ``source`` with patches: ``run_layer`` with ``dense`` or
      ``convolution``, or a Flax Dense or Conv. Under an axis name the devices share out
      ``samples`` among them, every device keeps all rows, and the state is replicated.

    Raises:
      ValueError: an argument out of range; more examples than ``samples``; parameters
        without features last; ``train`` without a source, with one of other parameters,
        without patches or of another ``axis_name``; features, window or samples that do
        not fit the state; a mask that differs per feature.
      TypeError: ``x`` is not floating point; the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> kernel = jnp.eye(2)
      >>> estimator = cbn.replay_batch_norm(window=2, samples=1)
      >>> state = estimator.init(features=2, params=kernel)
      >>> for z in (jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0]])):
      ...     x, source = cbn.run_layer(cbn.dense, kernel, z)
      ...     statistics, state = estimator.train(state, x, source)
      >>> statistics.mean  # of both iterations, one example each
      Array([2., 2.], dtype=float32)

    Reference: the aim is that of Zhuliang Yao et al., "Cross-Iteration Batch
    Normalization", CVPR 2021, arXiv:2002.05712.

    Differs from it: past inputs instead of past statistics with a Taylor term; gradients
    through the whole window; statistics for inference from the window.

    NaN or inf makes the output of its own step NaN and is not remembered.
    """
    name = "replay_batch_norm"
    check_count("window", window, 1)
    check_count("samples", samples, 1)
    check_epsilon(epsilon)
    average = averaging(momentum)
    slots = max(window - 1, 1)

    def check(state, x):
        check_activations(name, x)
        check_state(name, state, ReplayState, lambda s: s.running.mean, x)
        if len(state.memory.size) != slots * samples:
            raise ValueError(
                f"{name}(window={window}, samples={samples}) got a state with "
                f"{len(state.memory.size)} rows, expected {slots * samples}; make it with "
                "an estimator of the same window and samples."
            )

    def init(features, params=None, groups=1):
        check_features_last(name, features, params)
        rows = slots * samples
        return ReplayState(
            running=init_running(features),
            memory=Memory(
                patches=jax.tree.map(
                    lambda p: jnp.zeros((rows, *p.shape[:-1], groups), jnp.float32), params
                ),
                size=jnp.zeros((rows, 1), jnp.float32),
            ),
            slot=jnp.zeros((), jnp.float32),
        )

    def train(state, x, source=None, *, axis_name=None, mask=None):
        check(state, x)
        source = check_source(name, x, source, state.memory.patches, axis_name)
        check_patches(name, source)
        check_mask(name, x, mask)
        if window == 1:
            check_values(name, x, axis_name, mask)
        state = lax.stop_gradient(state)
        batch, sample = moments_and_sample(
            source, x, samples, state.running.steps.max(), axis_name=axis_name, mask=mask
        )
        past = _replayed(state.memory, source.params, batch.mean.dtype)
        pooled = pool_two(batch, past)
        if mask is not None:
            pooled = known_moments(pooled, state.running)
        seen = pooled._replace(size=batch.size)
        memory = state.memory
        if window > 1:
            rows = _rows_of(sample, batch, samples)
            memory = _remember(memory, rows, state.slot * samples)
        return statistics_of(pooled, epsilon), lax.stop_gradient(
            ReplayState(
                running=update_running(state.running, seen, average),
                memory=memory,
                slot=(state.slot + 1) % slots,
            )
        )

    def infer(state, x):
        check(state, x)
        return statistics_of(state.running, epsilon)

    return Estimator(init, train, infer)


def _replayed(memory: Memory, params: Params, dtype: Any) -> Moments:
    """Moments ``[C]`` of what is remembered, under today's parameters."""
    memory = jax.tree.map(lambda leaf: leaf.astype(dtype), memory)
    x = product(memory.patches, params)
    total = memory.size.sum()
    weight = memory.size / jnp.where(total > 0, total, 1.0)
    mean = (weight * x).sum(axis=0)
    var = (weight * jnp.square(x - mean[None])).sum(axis=0)
    return Moments(mean, var, jnp.broadcast_to(total, mean.shape))


def _rows_of(sample: Sample, batch: Moments, samples: int) -> Memory:
    """What is remembered of this iteration: ``samples`` rows."""
    size = sample.weight * batch.size.max()
    finite = [
        jnp.isfinite(p).reshape(len(p), -1).all(axis=1, keepdims=True)
        for p in jax.tree.leaves(sample.patches)
    ]
    usable = functools.reduce(jnp.logical_and, finite, size > 0)
    usable &= usable_moments(batch).any()  # else one overflow would stay for a window
    rows = Memory(sample.patches, size)
    rows = jax.tree.map(lambda leaf: jnp.where(per_row(usable, leaf), leaf, 0.0), rows)
    missing = samples - len(rows.size)
    if missing < 0:
        raise ValueError(
            f"replay_batch_norm(samples={samples}) got {len(rows.size)} examples, expected "
            f"no more examples than samples; write samples={len(rows.size)}."
        )
    return jax.tree.map(
        lambda leaf: jnp.pad(leaf, [(0, missing), *[(0, 0)] * (leaf.ndim - 1)]), rows
    )


def _remember(memory: Memory, rows: Memory, start: jax.Array) -> Memory:
    """Overwrites the oldest iteration."""
    return jax.tree.map(
        lambda ring, new: lax.dynamic_update_slice_in_dim(
            ring, new.astype(ring.dtype), start.astype(int), axis=0
        ),
        memory,
        rows,
    )
