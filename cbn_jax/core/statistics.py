# SPDX-License-Identifier: Apache-2.0
"""The result of every estimator, and the one formula that uses it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .checks import activations
from .moments import Moments, align, wide


class Statistics(NamedTuple):
    """Location and inverse scale that normalize activations.

    The inverse standard deviation includes ε. One type therefore serves methods that
    average σ instead of σ², leave a batch unchanged (``mean=0, inv_std=1``), or use
    statistics per example. It also serves mixes of two normalizations, because a mix of
    affine maps of ``x`` is an affine map of ``x``.

    Attributes:
      mean: broadcastable against ``x``; ``[C]`` for batch statistics.
      inv_std: the same, 1 / √(variance + ε).
    """

    mean: jax.Array
    inv_std: jax.Array


def statistics_of(moments: Moments, epsilon: float) -> Statistics:
    """Mean and 1 / √(variance + ε) of the given moments."""
    return Statistics(moments.mean, jax.lax.rsqrt(moments.var + epsilon))


def std_of(var: jax.Array) -> jax.Array:
    """√var; 0 with gradient 0 if nothing varies."""
    constant = var == 0
    return jnp.where(constant, 0.0, jnp.sqrt(jnp.where(constant, 1.0, var)))


def identity_where(condition: jax.Array, statistics: Statistics) -> Statistics:
    """Mean 0 and scale 1, which leave ``x`` unchanged, where the condition is true."""
    return Statistics(
        jnp.where(condition, 0.0, statistics.mean),
        jnp.where(condition, 1.0, statistics.inv_std),
    )


def compose(first: Statistics, then: Statistics) -> Statistics:
    """One step that normalizes by ``first``, and the result by ``then``."""
    # A scale of 0 (the variance overflowed) makes every output 0, for all means.
    scale = jnp.where(first.inv_std > 0, first.inv_std, 1.0)
    return Statistics(first.mean + then.mean / scale, first.inv_std * then.inv_std)


def blend(weight: jax.Array, one: Statistics, other: Statistics) -> Statistics:
    """The mix of ``weight`` times ``one`` and (1 − ``weight``) times ``other``."""
    share = weight * one.inv_std
    inv_std = share + (1.0 - weight) * other.inv_std
    share = share / jnp.where(inv_std > 0, inv_std, 1.0)
    return Statistics(other.mean + share * (one.mean - other.mean), inv_std)


@jax.named_scope("normalize")
def normalize(
    x: jax.Array,
    statistics: Statistics,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Normalizes activations: ``(x − mean) · inv_std · scale + bias``.

    All methods use this function. The arithmetic is in float32 (float64 if ``x`` or
    ``dtype`` is float64), with one rounding at the end.

    Args:
      x: activations ``[..., C]``, floating point.
      statistics: from an estimator's ``train`` or ``infer``.
      scale: learned factor, broadcastable against ``x``, usually ``[C]``; None for 1.
      bias: learned offset, broadcastable against ``x``, usually ``[C]``; None for 0.
      dtype: floating dtype of the result; None for that of ``x``.

    Returns:
      The normalized activations, in the shape of ``x``.

    Raises:
      TypeError: ``x`` or ``dtype`` is not floating point.
      ValueError: ``x`` has fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x = jnp.array([[1.0], [3.0]])
      >>> cbn.normalize(x, cbn.Statistics(jnp.array([2.0]), jnp.array([1.0])))
      Array([[-1.],
             [ 1.]], dtype=float32)

    Differs from ``flax.linen.BatchNorm``: the output keeps the dtype of ``x`` even if the
    parameters have a wider one.
    """
    x = activations("normalize", x)
    asked = _result_dtype(x.dtype if dtype is None else dtype)
    wider = wide(jnp.float64 if jnp.float64 in (x.dtype, asked) else x.dtype)

    def aligned(value):
        return align(jnp.asarray(value), x).astype(wider)

    factor = aligned(statistics.inv_std)
    if scale is not None:
        factor = factor * aligned(scale)
    y = (x.astype(wider) - aligned(statistics.mean)) * factor
    if bias is not None:
        y = y + aligned(bias)
    return y.astype(asked)


def _result_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"normalize got dtype={jnp.dtype(dtype)}, expected a floating-point dtype; "
            "write dtype=jnp.float32."
        )
    return jax.dtypes.canonicalize_dtype(dtype)
