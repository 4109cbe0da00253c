# SPDX-License-Identifier: Apache-2.0
"""Nnx modules that normalize and activate in one step, or activate after a norm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cbn_jax.core.estimator import Estimator
from cbn_jax.methods.batch_norm import batch_norm
from cbn_jax.methods.evonorm import evonorm_b0, evonorm_s0
from cbn_jax.methods.group_norm import group_norm

from .norm import Norm


class EvoNormS0(Norm):
    """EvoNorm-S0 in place of norm and activation; see ``cbn_jax.evonorm_s0``.

    It takes the arguments of ``Norm``. Its parameters are ``scale``, ``bias`` and ``v``.

    Args:
      estimator: group norm with the number of groups; 32 groups if not given.
      **options: the arguments of ``Norm``, such as ``layer``, ``num_features`` and
        ``rngs``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from cbn_jax.nnx import EvoNormS0
      >>> norm = EvoNormS0(num_features=64, rngs=nnx.Rngs(0))
      >>> norm(jnp.ones((1, 4, 4, 64))).shape
      (1, 4, 4, 64)
    """

    def __init__(self, estimator: Estimator | None = None, **options: Any):
        super().__init__(group_norm(32) if estimator is None else estimator, **options)
        self.v = _v(self)

    def _output(self, x, statistics, mask):
        del mask
        y = evonorm_s0(x, statistics, self.v.get_value(), *self._affine())
        return y if self.dtype is None else y.astype(self.dtype)


class EvoNormB0(Norm):
    """EvoNorm-B0 in place of norm and activation; see ``cbn_jax.evonorm_b0``.

    It takes the arguments of ``Norm``. Its parameters are ``scale``, ``bias`` and ``v``.

    Args:
      estimator: the method for the standard deviation of the batch,
        ``batch_norm(epsilon=1e-3)`` if not given. Use any method with statistics per
        feature.
      **options: the arguments of ``Norm``, such as ``layer``, ``num_features`` and
        ``rngs``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from cbn_jax.nnx import EvoNormB0
      >>> norm = EvoNormB0(num_features=8, rngs=nnx.Rngs(0))
      >>> norm(jnp.ones((2, 4, 4, 8))).shape
      (2, 4, 4, 8)
    """

    def __init__(self, estimator: Estimator | None = None, **options: Any):
        default = batch_norm(epsilon=1e-3)
        super().__init__(default if estimator is None else estimator, **options)
        self.v = _v(self)

    def _output(self, x, statistics, mask):
        v, epsilon = self.v.get_value(), self.estimator.epsilon
        y = evonorm_b0(x, statistics, v, *self._affine(), epsilon=epsilon, mask=mask)
        return y if self.dtype is None else y.astype(self.dtype)


class TLU(nnx.Module):
    """The thresholded linear unit ``max(x, τ)``, which follows ``filter_response_norm``.

    Args:
      num_features: size of the last axis.
      threshold_init: initializer of τ, an ``nnx.Param`` ``threshold``.
      param_dtype: dtype of ``threshold``.
      rngs: random number generators for the initializer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from cbn_jax.nnx import TLU
      >>> TLU(2, rngs=nnx.Rngs(0))(jnp.array([[-1.0, 2.0]]))
      Array([[0., 2.]], dtype=float32)

    Reference: Saurabh Singh, Shankar Krishnan, "Filter Response Normalization Layer", CVPR
    2020, arXiv:1911.09737.
    """

    def __init__(
        self,
        num_features: int,
        *,
        threshold_init: Callable[..., jax.Array] = nnx.initializers.zeros,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        value = threshold_init(rngs.params(), (num_features,), param_dtype)
        self.threshold = nnx.Param(value)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The maximum of each value and the threshold of its feature."""
        threshold = self.threshold.get_value().astype(x.dtype)
        return jnp.maximum(x, jnp.broadcast_to(threshold, x.shape))


def _v(norm: Norm) -> nnx.Param:
    return nnx.Param(jnp.ones(norm.num_features, norm.param_dtype))
