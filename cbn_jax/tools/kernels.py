# SPDX-License-Identifier: Apache-2.0
"""Changes of a kernel before a layer uses it."""

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import batch_moments


def center(kernel: jax.Array) -> jax.Array:
    """Subtracts from each filter its mean over all inputs.

    The output of a layer then does not change with the mean of its input patch, and the
    mean of the output is near zero. ``moving_average_batch_norm`` needs that, because it
    subtracts no mean::

        Norm(cbn_jax.moving_average_batch_norm(), layer=nn.Conv(...), kernel=cbn_jax.center)

    Args:
      kernel: ``[..., C]``, outputs last, floating point.

    Returns:
      The centered kernel; gradients flow through the mean.

    Raises:
      TypeError: ``kernel`` is not floating point.
      ValueError: it has fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.center(jnp.array([[1.0], [3.0]]))[:, 0]
      Array([-1.,  1.], dtype=float32)

    Reference: Junjie Yan et al., "Towards Stabilizing Batch Statistics in Backward
    Propagation of Batch Normalization", ICLR 2020, arXiv:2001.06838.
    """
    mean = batch_moments(kernel).mean
    return (kernel - _as_row(mean, kernel)).astype(kernel.dtype)


def standardize(kernel: jax.Array, *, epsilon: float = 1e-10) -> jax.Array:
    """Weight standardization: each filter gets mean 0 and variance 1 over its inputs.

    Together with group norm it is the usual choice for convolutions at small batches::

        Norm(cbn_jax.group_norm(32), layer=nn.Conv(...), kernel=cbn_jax.standardize)

    Args:
      kernel: ``[..., C]``, outputs last, floating point.
      epsilon: added to the variance, inside the root.

    Returns:
      The standardized kernel; gradients flow through mean and variance.

    Raises:
      TypeError: ``kernel`` is not floating point.
      ValueError: it has fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.standardize(jnp.array([[1.0], [5.0]]))[:, 0]
      Array([-1.,  1.], dtype=float32)

    Reference: Siyuan Qiao, Huiyu Wang, Chenxi Liu, Wei Shen, Alan Yuille, "Micro-Batch
    Training with Batch-Channel Normalization and Weight Standardization", 2019,
    arXiv:1903.10520.

    Differs from the authors' PyTorch code, which divides by the unbiased deviation plus
    1e-5. This function follows Big Transfer's JAX code.
    """
    moments = batch_moments(kernel)
    scale = _as_row(lax.rsqrt(moments.var + epsilon), kernel)
    return ((kernel - _as_row(moments.mean, kernel)) * scale).astype(kernel.dtype)


def _as_row(per_filter: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.expand_dims(per_filter, tuple(range(kernel.ndim - 1)))
