# SPDX-License-Identifier: Apache-2.0
"""The recommended method, for someone who does not want to choose."""

from ._checks import check_count
from ._estimator import Estimator
from ._running import Averaging
from ._streaming import streaming_batch_norm

EXAMPLES = 32  # what batch norm needs, and what the window is to hold


def small_batch_norm(
    batch_size: int, *, momentum: float | Averaging = 0.99, epsilon: float = 1e-5
) -> Estimator:
    """The method we recommend for small batches, set up for a batch size.

    ``streaming_batch_norm`` with a window that holds 32 examples, the batch size from
    which on batch norm works: k = 32 / batch_size iterations, at least 1.

    Args:
      batch_size: examples per iteration, at least 1, on all devices together where
        statistics are synchronized (sharded ``jit``, ``axis_name``), on one of them where
        they are not; the micro-batch under gradient accumulation.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a rule
        m ↦ α_m such as ``cumulative``.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator, see ``streaming_batch_norm`` for its state and what it raises.

    Raises:
      ValueError: ``batch_size`` is not a whole number from 1 on.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.small_batch_norm(batch_size=2)
      >>> state = estimator.init(features=4, params=jnp.ones((3, 4)))

    Reference: as for ``streaming_batch_norm``.
    """
    check_count("batch_size", batch_size, 1)
    window = max(1, round(EXAMPLES / batch_size))
    return streaming_batch_norm(window, momentum=momentum, epsilon=epsilon)
