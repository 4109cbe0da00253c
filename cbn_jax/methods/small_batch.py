# SPDX-License-Identifier: Apache-2.0
"""Streaming batch norm, with its window chosen from the batch size."""

import math

from cbn_jax.core.checks import check_count
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.schedules import ScheduleFn
from cbn_jax.core.values import factory

from .batch_norm import named_batch_norm
from .streaming import named_streaming

EXAMPLES = 32  # batch norm works from this batch size on; the window holds as many


@factory
def small_batch_norm(
    batch_size: int,
    *,
    micro_batches: int = 1,
    momentum: float | ScheduleFn = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """The method for models with batch norm at small batches, configured for a batch size.

    This is ``streaming_batch_norm`` with the shortest window that holds 32 examples,
    ``k = ⌈32 / batch_size⌉``. The window is 32 at batch size 1, 16 at 2 and 11 at 3. From
    batch size 32 on, one batch is enough, and the method is ``batch_norm``. Under gradient
    accumulation an iteration is a step of the optimizer, with all its micro-batches.

    Args:
      batch_size: number of examples per iteration, at least 1. If the devices share
        statistics (sharded ``jit``, ``axis_name``), count the examples on all devices.
        Otherwise count those on one device. Under gradient accumulation count the examples
        of one micro-batch.
      micro_batches: number of calls of ``train`` in one step of the optimizer, the
        ``every_k_schedule`` of ``optax.MultiSteps``. The window pools the micro-batches of
        a step exactly.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a schedule
        m ↦ α_m such as ``cumulative()``. With a decay, an average restarts if it differs
        from the window by more than three standard errors.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator. Its state is a ``StreamingState``, one array of the size of the layer's
      parameters and nine patches. From batch size 32 on it is a ``RunningMoments``.
      ``init`` needs the layer and its parameters, ``train`` needs its ``source``.

    Raises:
      ValueError: ``batch_size`` is not an int of at least 1; and what
        ``streaming_batch_norm`` and ``batch_norm`` raise.
      TypeError: ``x`` is not floating point; the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.small_batch_norm(batch_size=2)
      >>> estimator
      small_batch_norm(batch_size=2, micro_batches=1, momentum=0.99, epsilon=1e-05)
      >>> state = estimator.init(4, cbn.dense, jnp.ones((3, 4)))

    Reference: as for ``streaming_batch_norm``.
    """
    check_count("batch_size", batch_size, 1)
    check_count("micro_batches", micro_batches, 1)
    window = math.ceil(EXAMPLES / (batch_size * micro_batches))
    if batch_size >= EXAMPLES:
        return named_batch_norm("small_batch_norm", momentum, epsilon)
    options = 8, momentum, epsilon
    return named_streaming("small_batch_norm", window, micro_batches, *options)
