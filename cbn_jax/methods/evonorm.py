# SPDX-License-Identifier: Apache-2.0
"""EvoNorm: two formulas that normalize and activate in one step."""

import jax
import jax.numpy as jnp

from cbn_jax.core.batch import instance_moments
from cbn_jax.core.checks import activations, check_mask
from cbn_jax.core.moments import align, wide
from cbn_jax.core.statistics import Statistics


def evonorm_s0(
    x: jax.Array,
    statistics: Statistics,
    v: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """EvoNorm-S0: ``x · sigmoid(v x) · inv_std · scale + bias``, in place of norm and ReLU.

    The standard deviation is that of a group of features in one example. ``statistics``
    come from ``group_norm(32)``. The formula subtracts no mean. ``EvoNormS0`` in
    ``cbn_jax.linen`` and ``cbn_jax.nnx`` is the module.

    Args:
      x: activations ``[..., C]``, floating point.
      statistics: statistics from ``group_norm``; the formula ignores their mean.
      v: learned ``[C]``, 1 at the start.
      scale: learned factor ``[C]``; None for 1.
      bias: learned offset ``[C]``; None for 0.

    Returns:
      The activated values, in the shape and dtype of ``x``.

    Raises:
      TypeError: ``x`` is not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x, norm = jnp.array([[0.0, 4.0]]), cbn.group_norm(num_groups=1)
      >>> statistics = norm.infer(norm.init(features=2), x)
      >>> cbn.evonorm_s0(x, statistics, v=jnp.zeros(2)).round(2)  # half of x / 2
      Array([[0., 1.]], dtype=float32)

    Reference: Hanxiao Liu, Andrew Brock, Karen Simonyan, Quoc V. Le, "Evolving
    Normalization-Activation Layers", NeurIPS 2020, arXiv:2004.02967.
    """
    given = activations("evonorm_s0", x)
    x = given.astype(wide(given.dtype))
    y = x * jax.nn.sigmoid(_aligned(v, x) * x) * _aligned(statistics.inv_std, x)
    return _affine(y, scale, bias).astype(given.dtype)


def evonorm_b0(
    x: jax.Array,
    statistics: Statistics,
    v: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float = 1e-3,
    mask: jax.Array | None = None,
) -> jax.Array:
    """EvoNorm-B0: ``x / max(σ, v x + σᵢ) · scale + bias``, in place of norm and ReLU.

    σ is the standard deviation of the batch, from ``batch_norm(epsilon=1e-3)`` or any other
    method with statistics per feature. σᵢ is that of the feature within the example. The
    formula subtracts no mean. ``EvoNormB0`` in ``cbn_jax.linen`` and ``cbn_jax.nnx`` is the
    module.

    Args:
      x: activations ``[..., C]``, floating point.
      statistics: statistics from a method for batches; the formula ignores their mean.
      v: learned ``[C]``, 1 at the start.
      scale: learned factor ``[C]``; None for 1.
      bias: learned offset ``[C]``; None for 0.
      epsilon: added to the variance within the example, inside the root.
      mask: True where a value counts in that variance.

    Returns:
      The activated values, in the shape and dtype of ``x``.

    Raises:
      TypeError: ``x`` is not floating point.
      ValueError: a mask that does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x, norm = jnp.array([[[1.0], [-3.0]]]), cbn.batch_norm(epsilon=1e-3)
      >>> statistics, _ = norm.train(norm.init(features=1), x)
      >>> cbn.evonorm_b0(x, statistics, v=jnp.zeros(1))[0, :, 0].round(1)  # x / 2
      Array([ 0.5, -1.5], dtype=float32)

    Reference: as for ``evonorm_s0``.
    """
    given = activations("evonorm_b0", x)
    check_mask("evonorm_b0", given, mask)
    x = given.astype(wide(given.dtype))
    own = jnp.sqrt(instance_moments(x, mask).var + epsilon)
    of_batch = 1.0 / _aligned(statistics.inv_std, x)
    y = x / jnp.maximum(of_batch, _aligned(v, x) * x + own)
    return _affine(y, scale, bias).astype(given.dtype)


def _aligned(value: jax.Array, x: jax.Array) -> jax.Array:
    return align(jnp.asarray(value), x).astype(x.dtype)


def _affine(y: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    if scale is not None:
        y = y * _aligned(scale, y)
    return y if bias is None else y + _aligned(bias, y)
